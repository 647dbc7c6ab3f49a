"""Zero-shot prompt segmentation: click a patch, threshold its similarity to all others (Tables 1 and 5).

    python zeroshot.py --ckpt mmc.pth dino.pth random:vit_b --coco /data/coco --json rows.jsonl     # Table 1
    python zeroshot.py --ckpt mmc.pth --voc /data/VOCdevkit --similarity fig5.png            # Table 5, Fig. 5
    python zeroshot.py --ckpt mmc.pth dino.pth --image photo.jpg --point 120,88 --out fig.png      # Fig. 1, 6

Protocol (prompts.py).  The image is stretched to 480x480 (the nearest multiple of the patch); tokens of the
last block after the final norm, L2-normalised; mask = cosine to the prompt's patch >= t, t = 0, .1 ... .9;
"best" = best single t, "auto" = a threshold from the similarities alone, "all" = the mask that takes
everything.  Ours where the paper is silent, and options: target = union of a category's objects; prompt = a
random patch of it; targets below 3 patches left out; truth at patches by majority; mean over an image's
categories, then over images, with three other means below it.

Paper, ViT-B on IN1K: MMC 38.4, iBOT 36.2, DINO 35.1, MAE 30.1; random weights 16.8 16.6 16.2 15.5 at t = .1
.2 .3 .4.  Overlap in Table 5: MMC .55, iBOT .56, DINO .66, MAE .76.

Beyond the paper, by clicks.py: --contiguous keeps the part of a mask that was clicked, --centre takes the
image's mean token away first; --stride and --upsample make finer masks; --points and --background_points are
several clicks.  Cost: the network's; on one CPU core ViT-S 1.5 images/s, ViT-B 0.5.

Shapes: N = h*w tokens, D width, H x W pixels, P patch size, S stride."""
import argparse
import csv
import math
from dataclasses import asdict, fields

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import data
import figure
import run
from checkpoint import short_name
from clicks import picture_tokens, select, working_size
from distributed import say
from images import normalize, read_image
from model import ViT
from prompts import THRESHOLDS, Protocol, Result, mean_iou, network_features, overlap, prompt_table
from run import Mistake, count
from scenes import Coco, Scenes, ToyScenes, Voc
from toy import SPLITS

PICTURE = "point background_point threshold heads kmeans out"
IDLE = {                                       # options that have no effect beside another
    "image": "split limit target prompt min_patches truth crowd points background_points csv similarity json "
             "batch_size num_workers max_bad",
    "coco": PICTURE,
    "voc": f"{PICTURE} crowd",
    "toy": f"{PICTURE} crowd max_bad",
}
OF_MASK = ("background_point", "threshold", "combine", "centre", "contiguous")
MEANS = {
    "miou": "mean per image",
    "miou_pairs": "all prompts",
    "miou_category": "per category",
    "miou_instance": "instances",
}


# ------------------------------------------------- the table
def table_main(args, vits: list[ViT], device: torch.device) -> None:
    """A row of the table for each checkpoint, and the files that were asked for."""
    scenes = open_scenes(args)
    say(scenes.about)
    results = {}
    for ckpt, vit in zip(args.ckpt, vits, strict=True):
        results[ckpt] = run_one(args, ckpt, vit, scenes, device)
    if args.csv:
        write_csv(args.csv, results)
    if args.similarity:
        curves = [density_curves(ckpt, result) for ckpt, result in results.items()]
        with run.writing(args.similarity, "--similarity "):
            figure.beside(curves).save(args.similarity)
        say(f"densities drawn in {args.similarity}")


def run_one(args, ckpt: str, vit: ViT, scenes: Scenes, device: torch.device) -> Result:
    """Evaluate one checkpoint, say and record what came out."""
    protocol = protocol_of(args, vit)
    choices = asdict(protocol) | {"precision": args.precision}
    words = ", ".join(f"{name} {value}" for name, value in choices.items())
    say(f"{short_name(ckpt)}: {len(scenes)} images, {words}")
    vit.patch_embed.stride = protocol.stride
    result = prompt_table(
        network_features(vit, device), scenes, protocol, vit.patch_size,
        args.batch_size, args.num_workers, args.max_bad,
    )
    summary = result.summary()
    run.record(
        args.json, eval="zeroshot", ckpt=ckpt, weights=checkpoint.digest(vit),
        data=scenes.title, data_digest=data.digest(scenes), protocol=choices,
        metrics=summary, seconds=result.seconds, device=device,
    )
    say(table_of(summary, protocol))
    result.unreadable.say()
    return result


def protocol_of(args, vit: ViT) -> Protocol:
    given = {field.name: getattr(args, field.name) for field in fields(Protocol)}
    size = args.size or (vit.config["img_size"] if args.toy else 480)
    given["size"] = working_size(size, vit.patch_size)
    given["stride"] = args.stride or vit.patch_size
    return Protocol(**given)


def open_scenes(args) -> Scenes:
    if args.coco:
        return Coco(args.coco, args.split or "val2017", args.crowd, args.limit)
    split = args.split or "val"
    if args.voc:
        return Voc(args.voc, split, args.limit)
    if split not in SPLITS:
        raise Mistake(f"--split {split}: the toy world has {', '.join(SPLITS)}")
    return ToyScenes(data.ToyImages(split, args.limit or 200, seed=args.seed))


def table_of(summary: dict, protocol: Protocol) -> str:
    """What is printed for one checkpoint."""
    head = "".join(f"{t:6.1f}" for t in THRESHOLDS)
    lines = [f"{'mIoU at t =':>14}{head}     best (t)    auto     all"]
    for name, title in MEANS.items():
        if name not in summary:
            lines.append(f"{title:>14}  no target of {protocol.min_patches} or more patches")
            continue
        mean = summary[name]
        best = max(mean, key=mean.get)
        values = "".join(f"{value:6.1f}" for value in mean.values())
        auto = summary["auto_others"][name]
        everything = summary["everything_others"][name]
        lines.append(f"{title:>14}{values}{mean[best]:7.1f} ({best}){auto:8.1f}{everything:8.1f}")

    cosines = []
    for name in ("intra", "inter", "overlap"):
        value = summary[name]
        cosines.append(f"{name} without pairs" if math.isnan(value) else f"{name} {value:.3f}")
    lines.append(f"similarity: {', '.join(cosines)}")
    left_out = [f"{summary['n_skipped']} targets below {protocol.min_patches} patches"]
    left_out += [f"{count} {what}" for what, count in summary["left_out"].items()]
    lines.append(f"{summary['n_prompts']} prompts of {summary['n_categories']} categories in "
                 f"{summary['n_images']} images; left out: {', '.join(left_out)}; "
                 f"{summary['images_per_s']:.2f} images/s")
    return "\n".join(lines)


def write_csv(path: str, results: dict[str, Result]) -> None:
    """A line per checkpoint and category, empty where the category had no prompt."""
    thresholds = [f"t{t:.1f}" for t in THRESHOLDS]
    lines = [["ckpt", "category", "prompts", *thresholds, "auto", "everything"]]
    for ckpt, result in results.items():
        for category in result.source.scenes.categories:
            rows = [row for row in result.asked() if row.category == category]
            means = mean_iou(rows).values() if rows else []
            values = [f"{mean:.2f}" for mean in means] or [""] * (len(THRESHOLDS) + 2)
            lines.append([ckpt, category, len(rows), *values])
    with run.writing(path, "--csv "), \
            open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        csv.writer(f).writerows(lines)


def density_curves(ckpt: str, result: Result) -> figure.Picture:
    """The picture of Fig. 5 for one checkpoint."""
    total = result.counts.sum(1).double()
    text = f"{result.source.scenes.title}, overlap O = {overlap(result.counts):.3f}"
    shares = (result.counts / total[:, None]).numpy()
    means = (result.sums / total).tolist()
    return figure.densities(shares, means, ["intra", "inter"], short_name(ckpt), text)


# ------------------------------------------------- one picture
def kmeans(z: Tensor, k: int, seed: int = 0, steps: int = 30) -> Tensor:
    """Spherical k-means of (N, D) normalised tokens -> (N,) cluster numbers, the largest first.  Each first
    centre is the token that is least like those before it."""
    first = torch.randint(len(z), (1,), generator=data.generator_of(seed, "kmeans"))
    centres = z[first]
    for _ in range(k - 1):
        farthest = (z @ centres.T).amax(1).argmin()
        centres = torch.cat([centres, z[farthest][None]])
    for _ in range(steps):
        nearest = (z @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, z)
        filled = sums.any(1, keepdim=True)
        centres = torch.where(filled, F.normalize(sums, dim=-1), centres)
    size = torch.bincount(nearest, minlength=k)
    rank = size.argsort(descending=True).argsort()
    return rank[nearest]


@torch.no_grad()
def picture_row(vit: ViT, image: Tensor, device: torch.device,
                args) -> list[tuple[str, figure.Array]]:
    """The titled cells of one checkpoint.  args: size, stride, point, background_point, threshold, combine,
    centre, contiguous, upsample, heads, kmeans, seed."""
    tokens = picture_tokens(vit, image, device, args.size or 480, args.stride)
    photo = tokens.image.permute(1, 2, 0).numpy()
    cells = [("image", photo)]
    if args.point:
        values, t, mask = select(
            tokens, args.point, args.background_point,
            args.threshold, args.combine, args.centre, args.upsample, args.contiguous,
        )
        low = values.min().item()
        high = values.max().item()
        clicked = figure.marked(photo, tokens.given, args.point, args.background_point)
        chosen = " (auto)" if args.threshold == "auto" else ""
        cells = [
            ("prompt", clicked),
            (f"similarity, {low:.2f} to {high:.2f}", figure.heat(tokens.pixels(values), low, high)),
            (f"mask, t = {t:.2f}{chosen}", figure.cut_out(photo, mask.numpy())),
        ]

    x = normalize(tokens.image[None].to(device))
    attention = vit.attention(x)[0].cpu()                              # (heads, N)
    maps = {"CLS attention": attention.mean(0)}
    if args.heads:
        maps = {f"head {i}": weights for i, weights in enumerate(attention, start=1)}
    for title, weights in maps.items():
        high = weights.quantile(0.99).item()
        cells.append((title, figure.heat(tokens.pixels(weights), 0, high)))
    clusters = kmeans(tokens.z, args.kmeans, args.seed)
    numbers = tokens.pixels(clusters, smooth=False).long().numpy()
    cells.append((f"k-means, k = {args.kmeans}", figure.painted(photo, numbers)))
    return cells


def picture_main(args, vits: list[ViT], device: torch.device) -> None:
    image = read_image(args.image)
    _, H, W = image.shape
    for x, y in args.point + args.background_point:
        if not (0 <= x < W and 0 <= y < H):
            raise Mistake(f"point {x:g},{y:g} is outside of {args.image}, {W} pixels wide and {H} high")
    rows = []
    for ckpt, vit in zip(args.ckpt, vits, strict=True):
        rows.append((short_name(ckpt), picture_row(vit, image, device, args)))
    with run.writing(args.out, "--out "):
        figure.sheet(rows).save(args.out)
    say(f"drawn in {args.out}")


# ------------------------------------------------- the command
def pair(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: expected x,y in pixels, such as 120,88") from e
    return x, y


def cosine(text: str) -> float | str:
    return text if text == "auto" else run.between(-1.0, 1.0)(text)


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    shared = "ckpt checkpoint_key num_heads batch_size num_workers max_bad device precision seed json"
    run.add_shared(p, shared, batch_size=8)
    p.add_argument("--size", type=count, help="pixels of a side, to the nearest multiple of the "
                   "patch (paper 480; --toy: as in training; --image: of the short side)")
    p.add_argument("--stride", type=count, help="pixels between patches, a divisor of the patch "
                   "size; half of it: masks twice as fine, four times the tokens (default: the patch size)")

    what = p.add_argument_group("what to evaluate: one of")
    a = what.add_mutually_exclusive_group(required=True).add_argument
    a("--coco", metavar="DIR", help="folder of annotations/instances_SPLIT.json and SPLIT/")
    a("--voc", metavar="DIR", help="VOCdevkit, or VOC2012")
    a("--toy", action="store_true", help="generated scenes")
    a("--image", metavar="FILE", help="draw prompt, similarity, mask, attention and k-means of one image")

    a = p.add_argument_group("table").add_argument
    a("--split", help="default: val2017 of COCO, val elsewhere")
    a("--limit", type=count, help="only the first images (toy: 200)")
    a("--target", default="class", choices=["class", "instance"], help="all objects of a category together "
      "(default), or one by one")
    a("--prompt", default="random", choices=["random", "center"], help="a random patch of the target "
      "(default), or the deepest inside it; also written centre",
      type=lambda text: text.replace("centre", "center"))
    a("--min_patches", type=count, default=3, help="smaller targets are left out (default 3)")
    a("--truth", default="patch", choices=["patch", "pixel"], help="compare patches (default), or pixels of "
      "the resized image")
    a("--crowd", action="store_true", help="COCO's crowd regions are objects, too (default: left out, "
      "counted)")
    a("--points", type=count, default=1, help="points of a prompt (paper 1)")
    a("--background_points", type=run.at_least(0), default=0, help="points beside the target; what is more "
      "like them is taken away (paper 0)")
    a("--csv", metavar="FILE", help="write the mIoU of each category to this file")
    a("--similarity", nargs="?", const="similarity.png", metavar="PNG", help="draw the densities of the "
      "similarities within and between categories (default similarity.png)")

    a = p.add_argument_group("table and picture").add_argument
    a("--upsample", action=argparse.BooleanOptionalAction, help="interpolate the similarity to pixels before "
      "the threshold (default: in pictures; in a table it needs --truth pixel)")
    a("--combine", default="max", choices=["max", "mean"], help="of the similarities to several points "
      "(default max)")
    a("--centre", action="store_true", help="take the image's mean token from all tokens first: better masks "
      "where objects are small (paper: no)")
    a("--contiguous", action="store_true", help="keep the parts of a mask that hold a click: better masks of "
      "single objects (paper: no)")

    a = p.add_argument_group("picture").add_argument
    a("--point", type=pair, action="append", default=[], metavar="X,Y", help="pixel on the object, once or "
      "more; without: attention and k-means only")
    a("--background_point", type=pair, action="append", default=[], metavar="X,Y", help="pixel beside it")
    a("--threshold", type=cosine, default="auto", help="cosine, or auto (default)")
    a("--heads", action="store_true", help="attention of each head (default: their mean)")
    a("--kmeans", type=run.between(1, 256), default=3, metavar="K", help="clusters of the tokens (paper 3)")
    a("--out", default="zeroshot.png", help="where the picture goes (default zeroshot.png)")
    args = p.parse_args(argv)
    check(args)
    return args


def check(args) -> None:
    """Raises Mistake for options that do not go together."""
    for mode, idle in IDLE.items():
        if getattr(args, mode):
            run.refuse_idle(args, idle.split(), f"--{mode}")
    if args.upsample and args.truth == "patch" and not args.image:
        raise Mistake("--upsample compares pixels: add --truth pixel")
    if args.image and not args.point:
        run.refuse_idle(args, OF_MASK, "an --image without a --point: give one")
    if args.upsample is None:
        args.upsample = bool(args.image)


def main(args) -> None:
    run.check_outputs(args, "json", "csv", "similarity")
    if args.image:
        run.check_outputs(args, "out")
    device = run.begin(args, one_process=True)
    # All checkpoints are opened before any work.
    vits = [checkpoint.open_backbone(args, ckpt, device) for ckpt in args.ckpt]
    for vit in vits:
        if args.stride and vit.patch_size % args.stride:
            raise Mistake(f"--stride {args.stride} does not divide the patch size {vit.patch_size}")
    part = picture_main if args.image else table_main
    part(args, vits, device)


if __name__ == "__main__":
    run.script(main, get_args)
