"""What is in the features: probes of frozen backbones (Tables 3, 4, 6, 9, 10, 11, Fig. 9).

    # any checkpoint that load_backbone reads; each probe says more with --help
    python probes.py knn --ckpt out/backbone.pth --data /imagenette            # Tables 4, 6, 11
    python probes.py linseg --ckpt out/backbone.pth --data /VOCdevkit          # Table 3: linseg.py
    python probes.py retrieval --ckpt out/backbone.pth --data /roxford5k       # Table 9: retrieval.py
    python probes.py variance --ckpt out/backbone.pth --data /imagenette/val   # Table 10
    python probes.py layers --ckpt out/last.pth --data /imagenette             # Fig. 9, semantics by block

knn: resize, centre crop, L2-normalise, cosine, top-k votes weighted by exp(sim / 0.07); heads CLS, PAT (mean
of the patch tokens) and hybrid (both, concatenated); k = 10 is the paper's choice.
variance: of CLS over 128 random resized crops of an image, and of each patch token over 128 noise maskings of
half of its centre crop; mean over dimensions, positions, images.  Paper (ViT-S): MMC .19 / .32, DINO .43 /
1.00.  The scale of a network's tokens is its own, so the L2-normalised variant stands beside it.
layers: k-NN and prompt IoU by block (after the final norm), and, from a pretraining checkpoint that holds the
student with its reconstruction head, what that head paints from each of the last blocks.

Shapes: n train, m test images, D width, N patches, k neighbours, C classes."""
import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import distributed
import figure
import linseg
import retrieval
import zeroshot
from checkpoint import load_backbone
from coco import Coco, ToyScenes, Voc
from data import (
    BadImage,
    denormalize,
    generator_of,
    labelled,
    normalize,
    open_images,
    open_val,
    same_classes,
)
from features import CentreCrop, centre_crop, crop_size, extract_features
from masking import GMML, Augmentation, MultiCrop, gmml, random_resized_crop
from model import MMC, ViT, unpatchify

KS = (10, 20, 50, 100)
GROUP = 64                                     # train images per group of the k-NN search


def hybrid(features: dict[str, Tensor]) -> Tensor:
    """CLS and PAT side by side, (n, 2D), normalised again."""
    return F.normalize(torch.cat([features["cls"], features["pat"]], dim=1), dim=-1)


@torch.no_grad()
def knn_predict(train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int] = KS, temp: float = 0.07,
                chunk: int = 256) -> Tensor:
    """Weighted k-NN (Wu et al. 2018): each of the k nearest train images votes exp(cos / temp) for its class.

    train (n, D), test (m, D): L2-normalised.  labels: (n,) ints from 0.  A k above n uses all n.
    Returns predictions (len(ks), m).  Memory: chunk * n similarities, in a buffer that is used again."""
    classes, n, out = int(labels.max()) + 1, len(train), []
    buffer = test.new_full((chunk, -(-n // GROUP) * GROUP), -torch.inf)
    for q in test.split(chunk):
        torch.mm(q, train.T, out=buffer[:len(q), :n])
        sims, index = top(buffer[:len(q)], min(max(ks), n))                               # (b, k), best first
        votes = torch.zeros(len(ks), len(q), classes, device=q.device)
        for v, k in zip(votes, ks, strict=True):
            v.scatter_add_(1, labels[index[:, :k]], (sims[:, :k] / temp).exp())
        out.append(votes.argmax(-1))
    return torch.cat(out, dim=1)


def top(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """sims.topk(k, 1) for rows of G groups of GROUP: the k largest lie in the k groups with the largest
    maxima, and only these are ranked.  sims: (b, G*GROUP)."""
    b, groups = len(sims), sims.shape[1] // GROUP
    if groups <= 2 * k:
        return sims.topk(k, dim=1)
    sims = sims.view(b, groups, GROUP)
    best = sims.amax(2).topk(k, dim=1)[1].sort(1)[0]                                      # (b, k)
    value, at = sims.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1).topk(k, dim=1)
    return value, best.gather(1, at // GROUP) * GROUP + at % GROUP


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor,
                 ks: Sequence[int] = KS, temp: float = 0.07) -> dict[int, float]:
    """{k: accuracy in percent}."""
    hits = knn_predict(train, train_labels, test, ks, temp) == test_labels
    return {k: 100 * h.float().mean().item() for k, h in zip(ks, hits, strict=True)}


def knn_of(vit: ViT, train, val, size: int, device: torch.device, ks: Sequence[int] = KS,
           temp: float = 0.07, **kwargs) -> dict[str, dict[int, float]]:
    """k-NN of a backbone from labelled image sources: {"cls" | "pat" | "hybrid": {k: percent}}."""
    (a, ya), (b, yb) = (extract_features(vit, images, size, device, **kwargs) for images in (train, val))
    a, b = a | {"hybrid": hybrid(a)}, b | {"hybrid": hybrid(b)}
    return {head: knn_accuracy(a[head], ya, b[head], yb, ks, temp) for head in a}


# ------------------------------------------------- variance
def spread(features: Tensor) -> Tensor:
    """(R, ...) features of R views of an image -> [variance over the views, the same of L2-normalised
    features], each a mean over what remains."""
    return torch.stack([f.var(0).mean() for f in (features, F.normalize(features, dim=-1))])


@torch.no_grad()
def variance_of(encode, images, size: int, n: int, views: int, device, seed: int = 0,
                batch: int = 64) -> Tensor:
    """Table 10: (2, 2) means over n images; rows CLS over random crops, patches over maskings; columns raw,
    L2-normalised.

    encode: (B, 3, size, size) normalised -> CLS (B, D), patches (B, N, D).  Crops as in pretraining (area
    0.25 to 1, mirrored or not, no colour); each masking overwrites half of the centre crop with noise."""
    draw = MultiCrop(Augmentation(size, local_number=0), GMML(1.0, (0.5, 0.5)))
    at, rows = torch.linspace(0, len(images) - 1, min(n, len(images))).long().tolist(), []
    for i in tqdm(at, "variance", mininterval=1):
        try:
            image = images.read(i)
        except BadImage as e:
            print(f"left out: {e}")
            continue
        g = generator_of(seed, "variance", i)
        crops = torch.stack([random_resized_crop(image, size, (0.25, 1.0), 0.5, g) for _ in range(views)])
        cls = torch.cat([encode(normalize(x.to(device)))[0].float() for x in crops.split(batch)])
        clean, patches = normalize(centre_crop(image, size, round(size * 256 / 224)).to(device)), []
        for part in torch.arange(views).tensor_split(-(-views // batch)):       # none of one image
            drawn = [draw.draw_masks(g) for _ in part]
            mask, kind = (torch.stack([d[k][0] for d in drawn]) for k in ("mask", "kind"))
            noisy = gmml(clean.expand(len(part), -1, -1, -1), mask.to(device), kind)
            patches.append(encode(noisy)[1].float())
        rows.append(torch.stack([spread(cls), spread(torch.cat(patches))]).cpu())
    if not rows:
        raise ValueError("variance: no readable image")
    return torch.stack(rows).mean(0)


def variance_main(args: argparse.Namespace) -> None:
    if min(args.views, args.limit) < 1:
        raise ValueError(f"--views {args.views}, --limit {args.limit}: expected 1 or more")
    device, vit, size = begin(args)
    images = open_images(args.data, "train", args.data_root, args.download)
    print(f"variance: {min(args.limit, len(images))} images, {args.views} crops of {size} px and "
          f"{args.views} noise maskings of half the area, seed {args.seed}")

    def encode(x):
        tokens = vit(x)
        return tokens[:, 0], tokens[:, vit.num_prefix_tokens:]
    v = variance_of(encode, images, size, args.limit, args.views, device, args.seed).tolist()
    print(f"CLS over crops {v[0][0]:.3f} (normalised x D {v[0][1] * vit.embed_dim:.3f})   patches over "
          f"maskings {v[1][0]:.3f} (normalised x D {v[1][1] * vit.embed_dim:.3f})")
    note(args, "variance", size=size, views=args.views, limit=args.limit, crops=v[0][0], masks=v[1][0],
         crops_normalised=v[0][1] * vit.embed_dim, masks_normalised=v[1][1] * vit.embed_dim)


# ------------------------------------------------- layers
def student_of(path: str) -> MMC | None:
    """The student with its reconstruction head from a pretraining checkpoint (last.pth); None for a file of
    another kind, or without that head."""
    content = {} if str(path).startswith("random:") else checkpoint.load(path)
    state = content.get("student", {})
    if not isinstance(state, dict) or "h_rec.0.weight" not in state:
        return None
    backbone = ViT(**content["arch"])
    student = MMC(backbone, True, False, False, hidden=len(state["h_rec.0.weight"]))
    student.load_state_dict({k: v for k, v in state.items() if k.startswith(("backbone.", "h_rec."))})
    return student.eval().requires_grad_(False)


@torch.no_grad()
def layers_picture(student: MMC, images, size: int, blocks: list[int], n: int = 6):
    """Fig. 9: rows of images, the corrupted input and what h_rec paints from each block (all patches), with
    the mean absolute difference to the original below."""
    P, g, rows = student.backbone.patch_size, size // student.backbone.patch_size, []
    draw = MultiCrop(Augmentation(size, local_number=0), GMML(0.0, block=0.3, align=P))
    ready = CentreCrop(images, size)
    at = [i for i in torch.linspace(0, len(images) - 1, min(n, len(images))).long().tolist() if ready[i][2]]
    if not at:
        raise ValueError("layers: no readable image for the picture")
    clean = normalize(torch.stack([ready[i][0] for i in at]))
    drawn = [draw.draw_masks(torch.Generator().manual_seed(i)) for i in at]
    corrupted = gmml(clean, *(torch.stack([d[k][0] for d in drawn]) for k in ("mask", "kind")))
    tokens = student.backbone.intermediate(corrupted, blocks, norm=True)
    painted = [unpatchify(student.h_rec(t[:, student.backbone.num_prefix_tokens:]), P, g, g) for t in tokens]

    def photo(x):
        return denormalize(x).permute(1, 2, 0).numpy()
    for i, number in enumerate(at):
        top_row = [("original", photo(clean[i])), ("corrupted", photo(corrupted[i]))]
        below = [("", np.full_like(photo(clean[i]), 255)),
                 ("differences", figure.heat((corrupted[i] - clean[i]).abs().mean(0), 0, 2))]
        for block, x in zip(blocks, painted, strict=True):
            difference = (x[i] - clean[i]).abs().mean(0)
            top_row.append((f"block {block}", photo(x[i])))
            below.append((f"block {block}: mean {difference.mean():.2f}", figure.heat(difference, 0, 2)))
        rows += [(Path(images.name(number)).name, top_row), ("", below)]
    return figure.sheet(rows)


def block_iou(vit: ViT, scenes, blocks: list[int], device) -> list[float]:
    """Best mean prompt IoU in percent over the thresholds, for the tokens of each block after the final norm:
    zeroshot.py's default protocol at 480 px (the toy world at its own 64)."""
    side = 64 if isinstance(scenes, ToyScenes) else 480
    side = side // vit.patch_size * vit.patch_size

    def of_classes():
        for i in range(len(scenes)):
            masks, names = scenes.masks(i)
            if len(names):
                kinds = torch.tensor([sorted(set(names)).index(n) for n in names])
                image = F.interpolate(scenes.read(i)[None], size=(side, side), mode="bicubic", antialias=True)
                yield image[0], torch.stack([masks[kinds == k].any(0) for k in kinds.unique()])

    @torch.no_grad()
    def tokens(image):                                                 # (blocks, N, D)
        found = torch.cat(vit.intermediate(normalize(image[None].to(device)), blocks, norm=True))
        return F.normalize(found[:, vit.num_prefix_tokens:].float(), dim=-1).cpu()
    grid = (side // vit.patch_size,) * 2
    return (100 * zeroshot.prompt_iou(tokens, of_classes(), grid).max(-1)[0]).tolist()


def layers_main(args: argparse.Namespace) -> None:
    device, vit, size = begin(args)
    blocks = args.blocks or list(range(1, vit.depth + 1))
    train, val = open_pair(args)
    print(f"layers: blocks {blocks}, k-NN as in `knn` with k = 10, {len(train)} train and {len(val)} test "
          f"images at {size} px")
    (a, ya), (b, yb) = (extract_features(vit, x, size, device, args.batch_size, args.num_workers, blocks,
                                         args.cache) for x in (train, val))
    a, b = ([x] if isinstance(x, dict) else x for x in (a, b))
    rows = [{head: knn_accuracy(x[head], ya, y[head], yb, [10])[10] for head in ("cls", "pat")}
            for x, y in zip(a, b, strict=True)]
    scenes = (Coco(args.coco, limit=args.limit) if args.coco else Voc(args.voc, limit=args.limit) if args.voc
              else ToyScenes(args.limit) if args.data == "toy" else None)
    iou = block_iou(vit, scenes, blocks, device) if scenes is not None else []
    for i, (block, row) in enumerate(zip(blocks, rows, strict=True)):
        if iou:
            row["prompt_iou"] = iou[i]
        print(f"block {block:2}  k-NN CLS {row['cls']:.1f}  PAT {row['pat']:.1f}"
              + (f"  prompt IoU, best t {row['prompt_iou']:.1f}" if iou else ""))
    note(args, "layers", size=size, blocks=blocks, knn=rows)
    student = student_of(args.ckpt)
    if student is None:
        print("no picture of reconstructions: this checkpoint holds no student with a reconstruction head; "
              "give a last.pth of pretrain.py")
    else:
        last = [block for block in blocks if block > vit.depth // 2] or blocks
        layers_picture(student, val, size, last).save(args.picture)
        print(f"look at {args.picture}")


# ------------------------------------------------- command line
def begin(args) -> tuple[torch.device, ViT, int]:
    """Device, network and crop size; says what was loaded."""
    distributed.check_outputs(args, "json", "picture")
    device = distributed.init(args.device)
    distributed.one_process(f"probes.py {args.probe}")
    vit, report = load_backbone(args.ckpt, args.checkpoint_key)
    print(report)
    return device, vit.to(device), crop_size(vit, args.size)


def note(args, probe: str, **values) -> None:
    """One JSON line to --json."""
    distributed.append_json(args.json, {"probe": probe, "ckpt": args.ckpt, "data": args.data, **values})


def open_pair(args):
    """Labelled train and val images with the same classes.  Raises ValueError."""
    train, val = open_images(args.data, "train", args.data_root, args.download), open_val(args)
    if val is None or train.labels is None or val.labels is None:
        raise ValueError(f"--data {args.data}: k-NN needs class folders and a val split: "
                         "DIR/train/CLASS/*, DIR/val/CLASS/*, or give --val_data")
    same_classes(train.classes, val.classes, "train and val")
    return labelled(train, "train images"), labelled(val, "val images")


def knn_main(args: argparse.Namespace) -> None:
    if min(args.nb_knn) < 1:
        raise ValueError(f"--nb_knn {' '.join(map(str, args.nb_knn))}: expected 1 or more")
    device, vit, size = begin(args)
    train, val = open_pair(args)
    print(f"k-NN: short side {round(size * 256 / 224)}, centre {size}, cosine, weights exp(sim/{args.temp}), "
          f"{len(train)} train, {len(val)} test images, {len(train.classes)} classes")
    result = knn_of(vit, train, val, size, device, args.nb_knn, args.temp, batch_size=args.batch_size,
                    workers=args.num_workers, cache=args.cache)
    for head, accuracy in result.items():
        print(f"{head.upper():>6}  " + "  ".join(f"k={k} {a:.1f}" for k, a in accuracy.items()))
    note(args, "knn", size=size, **result)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = distributed.fail
    sub = parser.add_subparsers(dest="probe", required=True)

    def probe(name: str, text: str, description: str):
        p = sub.add_parser(name, help=text, description=description,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
        p.error, a = distributed.fail, p.add_argument
        a("--ckpt", required=True,
          help="checkpoint of any method, or random:ARCH/PATCH for the untrained row")
        a("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
        a("--num_workers", type=int, default=2, help="loader processes (2)")
        a("--device", default="auto", help="auto, cuda, mps or cpu")
        a("--json", help="append the result to this file, one JSON line")
        return p

    def images(p, main):
        a = p.add_argument
        a("--data", required=True,
          help="folder of class folders (train/ and val/), 'toy', or a torchvision set")
        a("--val_data", help="folder of the test images, if it is not beside the train images")
        a("--data_root", default="data", help="where torchvision keeps its sets")
        a("--download", action="store_true", help="let torchvision download the named set")
        a("--size", type=int,
          help="pixels of the centre crop; 224 (paper) or the nearest multiple of the patch below")
        a("--batch_size", type=int, default=128, help="images per forward (128)")
        a("--cache", help="folder that keeps features, under a hash of the weights and files")
        p.set_defaults(main=main)
        return a
    a = images(probe("knn", "weighted k-nearest-neighbour accuracy", __doc__), knn_main)
    a("--nb_knn", type=int, nargs="+", default=list(KS), help="numbers of neighbours; the paper reports 10")
    a("--temp", type=float, default=0.07, help="temperature of the votes (0.07)")
    linseg.add_options(probe("linseg", "linear segmentation on frozen features", linseg.__doc__))
    retrieval.add_options(probe("retrieval", "revisited Oxford and Paris", retrieval.__doc__))
    a = images(probe("variance", "feature variance under crops and masks", __doc__), variance_main)
    a("--limit", type=int, default=100, help="images, evenly spaced (100)")
    a("--views", type=int, default=128, help="crops and maskings of each (paper 128)")
    a("--seed", type=int, default=0, help="of the crops and maskings")
    a = images(probe("layers", "k-NN and reconstruction from each block", __doc__), layers_main)
    a("--blocks", type=int, nargs="+", help="blocks, from 1 (default: all)")
    a("--coco", help="COCO folder: prompt IoU by block, as well (with --data toy: on toy scenes)")
    a("--voc", help="VOCdevkit folder: the same")
    a("--limit", type=int, default=200, help="scenes for the prompt IoU (200)")
    a("--picture", default="layers.png", help="where the picture of reconstructions goes")
    return parser


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    distributed.run(lambda: arguments.main(arguments))
