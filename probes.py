"""What is in the features: probes of frozen backbones (Tables 4, 6, 8, 10, 11, Fig. 9).

    python probes.py knn --ckpt mmc.pth dino.pth --data /imagenette           # Tables 4, 6, 11: knn.py
    python probes.py fewshot --ckpt mmc.pth --data /mini-imagenet             # Table 8
    python probes.py variance --ckpt mmc.pth --data /imagenette/val           # Table 10
    python probes.py layers --ckpt out/last.pth --data /imagenette            # Fig. 9, and k-NN of each block
    python probes.py linseg --ckpt mmc.pth --data /VOCdevkit                  # Table 3: linseg.py
    python probes.py retrieval --ckpt mmc.pth --data /roxford5k               # Table 9: retrieval.py

fewshot: 5-way 1-shot episodes of CLS.  Chance is 20 % of accuracy; "always yes" has an F1 of 33.3, which is
the paper's value for MAE.
variance: of CLS over 128 random crops of an image, and of each patch token over 128 noise maskings of half of
its centre crop.  Paper (no architecture named): MMC .19 / .32, DINO .43 / 1.00.  The scale of the tokens is a
network's own; the variance of L2-normalised tokens, times D, stands beside it.
layers: k-NN and prompt IoU of each block, after the final norm, and, from a checkpoint of pretraining, a
picture of what the student's reconstruction head makes of the last blocks.

Images are cropped to 224 px, or to the multiple of the patch size below it.  Cost: that of the network.

Shapes: n images, S pixels of a side, R views, N patches, D width, E episodes."""
import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm

import checkpoint
import data
import figure
import run
from clicks import block_features
from data import ImageFolder, ToyImages, evenly, generator_of, labelled, open_images, read_text
from distributed import say
from images import ROOM, BadImage, Unreadable, centre_crop, crop_size, denormalize, normalize, to_device
from knn import KS, draw_episodes, extract_features, few_shot, knn_of, knn_of_blocks
from masking import GMML, corruption_of_views, gmml, random_resized_crop
from model import MMC, ViT, unpatchify
from run import Mistake

Found = tuple[dict, dict]                      # what a probe returns: its protocol, and its numbers


# ------------------------------------------------- k-NN
def knn_probe(args, ckpt, vit, sources, size, device, unreadable) -> Found:
    say(f"k-NN: cosine, votes exp(cosine / {args.temp:g})")
    result = knn_of(
        vit, *sources, size, device, args.nb_knn, args.temp,
        batch_size=args.batch_size,
        workers=args.num_workers,
        unreadable=unreadable,
    )
    for head, accuracy in result.items():
        cells = [f"k={k} {percent:.1f}" for k, percent in accuracy.items()]
        say(f"{head.upper():>6}  {'  '.join(cells)}")
    return {"temp": args.temp}, result


# ------------------------------------------------- few-shot by threshold
class MiniImageNet(ImageFolder):
    """mini-ImageNet's layout: ROOT/images, and ROOT/test.csv of filename,label lines.  Raises Mistake."""

    def __init__(self, root: Path, only: list[str] | None = None):
        table = root / "test.csv"
        text = read_text(table, f"{table}: cannot be read")
        self.root = str(root)
        self.files = []
        names = []
        for line in csv.DictReader(text.splitlines()):
            label = line.get("label")
            if label and (only is None or label in only):
                self.files.append(str(root / "images" / line["filename"]))
                names.append(label)
        self.classes = sorted(set(names))
        if missing := sorted(set(only or ()) - set(names)):
            raise Mistake(f"{table}: no image of {', '.join(missing[:5])}, which --classes names")
        if not names:
            raise Mistake(f"{table}: no lines of filename,label")
        self.labels = [self.classes.index(name) for name in names]
        self.about = data.described(len(names), self.classes)


def open_few_shot(args):
    """What --data names: mini-ImageNet, a val split, or else the folder itself."""
    root = Path(args.data)
    only = data.chosen_classes(args.classes)
    if (root / "test.csv").is_file() and (root / "images").is_dir():
        return MiniImageNet(root, only)
    if not root.is_dir() or data.has_splits(root):
        return open_images(args, "val")
    images = open_images(args)
    if images.labels is None and (root / "val").is_dir():
        images = ImageFolder(root / "val", only)
    return images


def few_shot_probe(args, ckpt, vit, sources, size, device, unreadable) -> Found:
    images = sources[0]
    [features], labels = extract_features(
        vit, images, size, device, args.batch_size, args.num_workers, unreadable=unreadable)
    episodes = draw_episodes(labels, seed=args.seed)
    unreadable.say()
    least = episodes.shape[-1]
    counts = torch.bincount(labels, minlength=len(images.classes))
    small = [str(name) for name, n in zip(images.classes, counts, strict=True) if n < least]
    if small:
        say(f"left out, as they have fewer than {least} images: {', '.join(small)}")

    say(f"5-way 1-shot, 600 episodes of 75 queries, CLS, {len(labels)} images of "
        f"{len(images.classes)} classes, {len(unreadable.names)} unreadable")
    result = few_shot(features["cls"], episodes)
    f1 = result["f1"]
    best = max(f1, key=f1.get)
    result["f1_best"] = f1[best]
    say(f"accuracy {result['accuracy']:.1f} +- {result['ci95']:.1f} % (chance 20)")
    cells = [f"{t}: {percent:.1f}" for t, percent in f1.items()]
    say(f"F1 (always yes: 33.3) at t = {'  '.join(cells)}  best {f1[best]:.1f} ({best})")
    return {"seed": args.seed, "classes_left_out": small}, result


# ------------------------------------------------- variance
def variance_over_views(parts: list[Tensor]) -> Tensor:
    """Parts (r, ..., D) of the features of R views -> (2,): their variance over the views, the mean over all
    else, and D times that of the L2-normalised features."""
    features = torch.cat(parts).float()
    D = features.shape[-1]
    directions = F.normalize(features, dim=-1)
    normalised = D * directions.var(0).mean()
    return torch.stack([features.var(0).mean(), normalised])


@torch.no_grad()
def variance_of(
    encode: Callable, images, size: int, n: int, views: int, device,
    seed: int = 0, batch: int = 64, unreadable: Unreadable | None = None,
) -> dict[str, float]:
    """Table 10: {"crops": of CLS over random crops, "masks": of the patches over maskings, and the two
    "_normalised"}, means over n images, evenly spaced.

    encode: (B, 3, S, S) normalised -> CLS (B, D), patches (B, N, D).  views: 2 or more.  Crops are those of
    pretraining without colour; each masking overwrites half of the centre crop with noise."""
    half_noise = GMML(noise_p=1.0, drop_perc=(0.5, 0.5))
    unreadable = unreadable or Unreadable(n, max_bad=1.0)
    found = []
    for i in tqdm(evenly(n, len(images)), "variance", leave=False, disable=None):
        try:
            image = images.read(i)
        except BadImage:
            unreadable.note(images.name(i))
            continue
        g = generator_of(seed, "variance", i)
        crops = [random_resized_crop(image, size, (0.25, 1.0), 0.5, g) for _ in range(views)]
        cls = []
        for part in torch.stack(crops).split(batch):
            tokens, _ = encode(normalize(part.to(device)))
            cls.append(tokens)

        clean = normalize(centre_crop(image, size).to(device))
        patches = []
        for part in torch.arange(views).tensor_split(math.ceil(views / batch)):     # none of one view
            mask, alien, noise_seed = corruption_of_views(half_noise, size, [g] * len(part))
            x = clean.expand(len(part), -1, -1, -1)
            _, tokens = encode(gmml(x, mask.to(device), alien, noise_seed))
            patches.append(tokens)
        of_image = [variance_over_views(cls), variance_over_views(patches)]
        found.append(torch.stack(of_image, dim=1).cpu())
    if not found:
        raise Mistake(f"variance: none of the images can be read, such as {images.name(0)}")
    means = torch.stack(found).mean(0).flatten()
    names = "crops masks crops_normalised masks_normalised".split()
    return dict(zip(names, means.tolist(), strict=True))


def variance_probe(args, ckpt, vit, sources, size, device, unreadable) -> Found:
    images = sources[0]
    unreadable.total = min(args.limit, len(images))
    say(f"variance: {unreadable.total} images, {args.views} crops and {args.views} noise maskings of half "
        f"the area, seed {args.seed}")

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vit(x)
        return tokens[:, 0], tokens[:, vit.num_prefix_tokens:]

    v = variance_of(
        encode, images, size, args.limit, args.views, device, args.seed, unreadable=unreadable)
    unreadable.say()
    say(f"CLS over crops {v['crops']:.3f} (normalised x D {v['crops_normalised']:.3f})   patches over "
        f"maskings {v['masks']:.3f} (normalised x D {v['masks_normalised']:.3f})")
    return {"limit": args.limit, "views": args.views, "seed": args.seed}, v


# ------------------------------------------------- layers
def student_of(ckpt: str, vit: ViT) -> MMC | None:
    """The student with its reconstruction head from a checkpoint of pretraining (last.pth), whose teacher is
    `vit`; None for a file of another kind, or without that head."""
    if ckpt.startswith("random:"):
        return None
    state = checkpoint.load(ckpt).get("student")
    if not isinstance(state, dict) or "h_rec.0.weight" not in state:
        return None
    hidden = len(state["h_rec.0.weight"])
    student = MMC(ViT(**vit.config), rec=True, pat=False, cls=False, hidden=hidden)
    parts = ("backbone.", "h_rec.")
    student.load_state_dict({name: w for name, w in state.items() if name.startswith(parts)})
    return student.eval().requires_grad_(False)


@torch.no_grad()
def layers_picture(student: MMC, images, size: int, blocks: list[int]) -> figure.Picture | None:
    """Fig. 9: 6 images, corrupted, and what h_rec makes of all patches of each block; below each the mean
    absolute difference to the original.  None where fewer than two images can be read."""
    dataset = data.CentreCrop(images, size)
    crops = {}
    for i in evenly(6, len(images)):
        crop, *_, readable = dataset[i]
        if readable:
            crops[i] = crop
    if len(crops) < 2:
        return None
    vit = student.backbone
    P = vit.patch_size
    side = size // P
    clean = normalize(torch.stack(list(crops.values())))               # (n, 3, S, S)
    generators = [Generator().manual_seed(i) for i in crops]
    corruption = corruption_of_views(GMML(noise_p=0.0, align=P), size, generators)
    corrupted = gmml(clean, *corruption)
    panels = {"corrupted": corrupted}
    outputs = vit.intermediate(corrupted, blocks, norm=True)
    for block, tokens in zip(blocks, outputs, strict=True):            # (n, T, D)
        patches = student.h_rec(tokens[:, vit.num_prefix_tokens:])
        panels[f"block {block}"] = unpatchify(patches, P, side, side)

    rows = []
    for row, i in enumerate(crops):
        original = photo(clean[row])
        above = [("original", original)]
        below = [("", 255 + 0 * original)]
        for title, x in panels.items():
            difference = (x[row] - clean[row]).abs().mean(0)
            above.append((title, photo(x[row])))
            below.append((f"difference {difference.mean():.2f}", figure.heat(difference, 0, 2)))
        rows.append((Path(images.name(i)).name, above))
        rows.append(("", below))
    return figure.sheet(rows)


def photo(x: Tensor) -> figure.Array:
    """(3, H, W) normalised -> (H, W, 3) uint8."""
    return denormalize(x).permute(1, 2, 0).numpy()


def prompt_iou(args, vit, images, blocks: list[int], device) -> tuple[dict[int, float], list[str]]:
    """{block: best mean IoU in percent}, by the protocol of prompts.py, on the scenes of --coco or --voc, or
    on `images` where they are toy scenes, and else empty; and the images that cannot be read."""
    from prompts import Protocol, prompt_tables
    from scenes import Coco, ToyScenes, Voc
    P = vit.patch_size
    size = round(480 / P) * P
    limit = args.limit or 200
    if args.coco:
        scenes = Coco(args.coco, limit=limit)
    elif args.voc:
        scenes = Voc(args.voc, limit=limit)
    elif isinstance(images, ToyImages):
        scenes = ToyScenes(images, limit)
        size = vit.config["img_size"]
    elif args.limit:
        raise Mistake("--limit counts the scenes of --coco or --voc: give one")
    else:
        return {}, []
    say(f"prompts: {scenes.about}; {size} px")

    def features(images: Tensor) -> list[Tensor]:
        x = normalize(to_device(images, device))
        return [z.cpu() for z in block_features(vit, x, blocks)]

    tables = prompt_tables(
        features, scenes, Protocol(size=size), P,
        num_workers=args.num_workers, max_bad=args.max_bad,
    )
    unreadable = tables[0].unreadable
    unreadable.say()
    iou = {}
    for block, table in zip(blocks, tables, strict=True):
        summary = table.summary()
        iou[block] = summary["best"]
    say(f"IoU of the mask that takes everything: {summary['everything']:.1f}")
    return iou, unreadable.names


def layers_probe(args, ckpt, vit, sources, size, device, unreadable) -> Found:
    blocks = args.blocks or list(range(1, vit.depth + 1))
    say(f"layers: blocks {blocks}, k-NN as in `knn` with k = 10")
    iou, bad_scenes = prompt_iou(args, vit, sources[1], blocks, device)
    results = knn_of_blocks(
        vit, *sources, size, device, [10],
        blocks=blocks,
        batch_size=args.batch_size,
        workers=args.num_workers,
        unreadable=unreadable,
    )
    unreadable.names += bad_scenes
    cls = {}
    pat = {}
    for block, result in zip(blocks, results, strict=True):
        cls[block] = result["cls"][10]
        pat[block] = result["pat"][10]
        prompts = f"  prompt IoU, best t {iou[block]:.1f}" if iou else ""
        say(f"block {block:2}  k-NN CLS {cls[block]:.1f}  PAT {pat[block]:.1f}{prompts}")
    late = [block for block in blocks if block > vit.depth // 2]
    draw_layers(args, ckpt, vit, sources[1], size, late or blocks)
    protocol = {"blocks": blocks, "k": 10, "coco": args.coco, "voc": args.voc, "limit": args.limit}
    return protocol, {"knn_cls": cls, "knn_pat": pat, "prompt_iou": iou}


def draw_layers(args, ckpt: str, vit: ViT, images, size: int, blocks: list[int]) -> None:
    """Save the picture of one checkpoint; of several, each has a name of its own."""
    student = student_of(ckpt, vit)
    if student is None:
        say("no picture of reconstructions: this checkpoint holds no student with a reconstruction head; "
            "give a last.pth of pretrain.py")
        return
    picture = layers_picture(student, images, size, blocks)
    if picture is None:
        say("no picture of reconstructions: fewer than 2 readable images")
        return
    path = Path(args.picture)
    if len(args.ckpt) > 1:
        path = path.with_stem(f"{path.stem}_{args.ckpt.index(ckpt) + 1}")
    with run.writing(path):
        picture.save(path)
    say(f"look at {path}")


# ------------------------------------------------- command line
PROBES = {"knn": knn_probe, "fewshot": few_shot_probe, "variance": variance_probe, "layers": layers_probe}


def open_sources(args) -> list:
    """The images of a probe, and what they hold, said: train and test for knn and layers, one source for the
    others.  Raises Mistake."""
    if args.probe == "variance":
        images = open_images(args)
    elif args.probe == "fewshot":
        images = labelled(open_few_shot(args), f"--data {args.data}")
    else:
        train = labelled(open_images(args), "train images")
        say(f"train: {train.about}")
        test = data.open_val(args)
        if test is None:
            raise Mistake(f"--data {args.data}: no test images: expected DIR/train and DIR/val, or give "
                          "--val_data")
        test = labelled(test, "test images")
        say(f"test: {test.about}")
        return [train, data.with_classes_of(train, test, "train and test")]
    say(f"images: {images.about}")
    return [images]


def main(args) -> None:
    if args.probe not in PROBES:
        args.main(args)
        return
    run.check_outputs(args, "json", "picture")
    device = run.begin(args, one_process=True)
    networks = [checkpoint.open_backbone(args, ckpt, device) for ckpt in args.ckpt]
    for vit in networks:
        crop_size(vit.patch_size, args.size)                           # a mistake is told before the work
    deepest = min(vit.depth for vit in networks)
    blocks = getattr(args, "blocks", None) or [1]
    if max(blocks) > deepest:
        raise Mistake(f"--blocks {max(blocks)}: expected 1 to {deepest}, the blocks of the network")
    sources = open_sources(args)
    for ckpt, vit in zip(args.ckpt, networks, strict=True):
        run_one(args, ckpt, vit, sources, device)


def run_one(args, ckpt: str, vit: ViT, sources: list, device) -> None:
    """One probe of one checkpoint: says and records it."""
    began = time.perf_counter()
    size = crop_size(vit.patch_size, args.size)
    unreadable = Unreadable(sum(map(len, sources)), args.max_bad)
    say(f"{ckpt}: short side {round(size * ROOM)}, centre {size} px, {args.precision}")
    probe = PROBES[args.probe]
    protocol, metrics = probe(args, ckpt, vit, sources, size, device, unreadable)
    run.record(
        args.json,
        eval=args.probe,
        ckpt=ckpt,
        weights=checkpoint.digest(vit),
        data=args.data,
        data_digest="-".join(map(data.digest, sources)),
        protocol={"size": size, "precision": args.precision, **protocol},
        metrics=metrics | unreadable.for_json(),
        seconds=time.perf_counter() - began,
        device=device,
    )


def get_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = run.Parser(description=__doc__)
    probes = parser.add_subparsers(dest="probe", required=True, metavar="PROBE")
    shared = "ckpt checkpoint_key num_heads device precision json data data_root download max_bad size"

    def add(name: str, about: str, more: str):
        p = probes.add_parser(name, help=about, description=__doc__)
        run.add_shared(p, f"{shared} classes {more}")
        return p

    p = add("knn", "weighted k-nearest-neighbour accuracy", "val_data num_workers batch_size")
    p.add_argument("--nb_knn", type=run.count, nargs="+", default=KS, help="values of k (10 20 50 100)")
    p.add_argument("--temp", type=run.above(0.0), default=0.07, help="of the votes (default 0.07)")

    add("fewshot", "5-way 1-shot classification", "num_workers batch_size seed")

    p = add("variance", "feature variance under crops and masks", "seed")
    p.add_argument("--limit", type=run.count, default=100, help="images, evenly spaced (default 100)")
    p.add_argument("--views", type=run.at_least(2), default=128,
                   help="crops and maskings of each (paper 128)")

    p = add("layers", "k-NN and reconstruction of each block", "val_data num_workers batch_size")
    p.add_argument("--blocks", type=run.count, nargs="+", help="blocks, from 1 (default: all)")
    p.add_argument("--limit", type=run.count, help="scenes for the prompt IoU (default 200)")
    p.add_argument("--picture", default="layers.png", help="of reconstructions (default layers.png)")
    p = p.add_mutually_exclusive_group()
    p.add_argument("--coco", help="COCO folder, for the prompt IoU (with --data toy: toy scenes)")
    p.add_argument("--voc", help="VOCdevkit folder, for the same")

    for name, about in (("linseg", "linear segmentation"), ("retrieval", "revisited Oxford and Paris")):
        p = probes.add_parser(name, help=about)
        if argv[:1] == [name]:                                         # loaded only when it is asked for
            script = import_module(name)
            p.description = script.__doc__
            script.add_options(p)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run.script(main, get_args)
