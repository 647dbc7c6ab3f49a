"""Zero-shot prompt segmentation: click a patch, threshold its similarity to all others (Tables 1, 5, 8).

    python zeroshot.py --ckpt mmc.pth dino.pth random:vit_s --coco /data/coco --json rows.jsonl     # Table 1
    python zeroshot.py --ckpt mmc.pth --voc /data/VOCdevkit --similarity fig5.png            # Table 5, Fig. 5
    python zeroshot.py --ckpt mmc.pth dino.pth --image photo.jpg --point 120,88 --out fig.png  # one image
    python zeroshot.py --ckpt mmc.pth --fewshot /data/mini-imagenet                                 # Table 8

Protocol.  The image is stretched to 480x480 (the nearest multiple of the patch); tokens of the
last block after the final norm, L2-normalised; mask = cosine to the prompt's patch >= t, t = 0, .1 ... .9;
"best" = best single t.  [D], all options: target = union of a category's objects; prompt = a random patch of
it; targets below 3 patches left out; truth at patches by majority; mean over an image's categories, then
images, with three other means beside it.  Paper: MMC 38.4, iBOT 36.2, DINO 35.1, MAE 30.1; random weights
16.8 16.6 16.2 15.5 at t = .1 .2 .3 .4.

Beyond the paper: --stride and --upsample (masks finer than 30x30), an automatic threshold, --points and
--background_points (several clicks).  Cost: the network's, all else is 3 %; ViT-S 1.5 images/s, ViT-B 0.5 on
one CPU core.

Shapes: N = h*w tokens, D width, K masks, Q prompts, T thresholds, H x W pixels, P patch size, S stride,
g x g whole patches, G x G tokens of a square image."""
import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from tqdm import tqdm

import distributed
from checkpoint import load_backbone, short_name
from coco import Coco, Scenes, ToyScenes, Voc
from data import Files, generator_of, normalize, read_image
from features import extract_features
from figure import beside, cut_out, densities, heat, marked, painted, sheet
from model import ViT

THRESHOLDS = tuple(i / 10 for i in range(10))                          # 0, .1, ... .9
BINS = 200                                                             # of the densities, over [-1, 1]
MAX_TOKENS = 20_000                                                    # of a picture: attention is quadratic
PROTOCOL = ("target", "prompt", "points", "background_points", "combine", "min_patches", "truth", "upsample",
            "crowd", "seed")
MEANS = {"miou": "mean per image", "miou_pairs": "all prompts", "miou_category": "per category",
         "miou_instance": "instances"}


# ------------------------------------------------- one image: features, prompt, mask
@torch.no_grad()
def patch_features(vit: ViT, x: Tensor, block: int = -1) -> Tensor:
    """(B, 3, H, W) normalised -> (B, N, D) float32 L2-normalised patch tokens of a block, by default of the
    last, after the final norm."""
    tokens = vit(x) if block == -1 else vit.intermediate(x, [block], norm=True)[0]
    return F.normalize(tokens[:, vit.num_prefix_tokens:].float(), dim=-1)


def similarity_map(z: Tensor, points: Tensor, combine: str = "max") -> Tensor:
    """Cosine of every patch to the prompts; several are joined by their max or mean.

    z: (N, D) normalised.  points: (Q, n) patch numbers.  Returns (Q, N)."""
    s = z[points] @ z.T                                                # (Q, n, N)
    return s.amax(1) if combine == "max" else s.mean(1)


def take_away(similarity: Tensor, z: Tensor, background: Tensor) -> Tensor:
    """What is more like one of the background prompts than like the prompts gets -1: no threshold takes it.

    similarity: (Q, N).  background: (Q, m) patch numbers."""
    return similarity.masked_fill((z[background] @ z.T).amax(1) > similarity, -1.0)


def auto_threshold(similarity: Tensor, prompts: int = 1) -> Tensor:
    """A threshold for each map, from its mean, the level of what is not meant, to its maximum, the prompt:
    midway for one prompt, and nearer to the maximum the more prompts share the work.

        t = mean + (1 - 1 / (2 * prompts)) * (max - mean)

    With trained weights this comes within a point of the best single threshold, or above it (README).  The
    rule was picked on 160 COCO images.
    similarity: (..., N), before `take_away`.  Returns (..., 1)."""
    low, high = similarity.mean(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    return low + (1 - 0.5 / prompts) * (high - low)


def segment(similarity: Tensor, threshold: float | str = "auto", prompts: int = 1) -> Tensor:
    """(..., N) similarities -> bool masks, similarity >= threshold; 'auto' picks one for each map."""
    return similarity >= (auto_threshold(similarity, prompts) if threshold == "auto" else threshold)


def to_pixels(maps: Tensor, grid: tuple[int, int], patch: int, stride: int, smooth: bool) -> Tensor:
    """Maps of tokens (Q, h*w) -> (Q, H, W) pixels: the token of the nearest centre, or linear in between."""
    size = [(n - 1) * stride + patch for n in grid]
    y, x = ((2 * (torch.arange(s, device=maps.device) + 0.5 - patch / 2) / stride / max(n - 1, 1) - 1)
            for s, n in zip(size, grid, strict=True))                  # -1 and 1 are the outer centres
    where = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps.view(len(maps), 1, *grid), where.to(maps.dtype),
                         "bilinear" if smooth else "nearest", "border", align_corners=True)[:, 0]


# ------------------------------------------------- truth, prompts and the score
def patch_cover(masks: Tensor, h: int, w: int, overlap: float = 1.0) -> Tensor:
    """(K, H, W) bool -> (K, h*w): which share of each of the h x w windows of the stretched mask is covered,
    exactly.  overlap: side of a window in strides (patch size / stride)."""
    def shares(n: int, pixels: int) -> Tensor:                     # (n, pixels): of each pixel in each window
        step = pixels / (n - 1 + overlap)
        start, at = torch.arange(n)[:, None] * step, torch.arange(pixels)
        end = torch.minimum(start + overlap * step, at + 1)
        return (end - torch.maximum(start, at)).clamp(0) / (overlap * step)
    H, W = masks.shape[1:]
    return (shares(h, H) @ masks.float() @ shares(w, W).T).flatten(1)


def majority(cover: Tensor) -> Tensor:
    """At least half, with room for rounding."""
    return cover >= 0.5 - 1e-5


def draw_points(truth: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(Q, N) bool -> (Q, n) random patches of each mask, distinct while it has more; the first stay."""
    order = (torch.rand(truth.shape, generator=generator) + truth).argsort(1, descending=True)
    return order.gather(1, torch.arange(n)[None] % truth.sum(1, keepdim=True).clamp(1))


def centre_point(truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """(Q, N) bool -> (Q,) the patch deepest inside each mask."""
    depth = [distance_transform_edt(np.pad(t.view(grid).numpy(), 1))[1:-1, 1:-1] for t in truth]
    return torch.tensor([int(d.argmax()) for d in depth])


def iou_sweep(similarity: Tensor, truth: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> Tensor:
    """Foreground IoU of `similarity >= t` against the truth at every threshold, in one pass: similarities
    fall into the bins between thresholds, and a cumulated count from above gives each intersection and
    union.

    similarity: (Q, N) cosines.  truth: (Q, N) bool, each row with a True.  Returns (Q, T)."""
    t = torch.tensor(thresholds, dtype=similarity.dtype, device=similarity.device)
    bins = torch.bucketize(similarity, t, right=True) + (len(t) + 1) * truth       # thresholds <= similarity
    rows = 2 * (len(t) + 1) * torch.arange(len(similarity), device=similarity.device)[:, None]
    count = torch.bincount((bins + rows).flatten(), minlength=2 * (len(t) + 1) * len(similarity))
    count = count.view(len(similarity), 2, -1).flip(2).cumsum(2).flip(2)                     # (Q, 2, T + 1)
    outside, inside = count[:, :, 1:].unbind(1)
    return inside.float() / (outside + truth.sum(1, keepdim=True))


def iou(mask: Tensor, truth: Tensor) -> Tensor:
    """(Q, N), (Q, N) bool -> (Q,)."""
    return (mask & truth).sum(1) / (mask | truth).sum(1)


def prompt_iou(features: Callable[[Tensor], Tensor], scenes: Iterable, grid: tuple[int, int], seed: int = 0,
               min_patches: int = 3) -> Tensor:
    """The default protocol without files: IoU per threshold (..., T), mean over masks, then over images.

    features: image (3, H, W) uint8 -> (..., N, D) normalised; the leading dimensions are several networks or
    blocks at once, with the same prompts.  scenes: (image, masks (K, H, W) bool) pairs."""
    rows = []
    for i, (image, masks) in enumerate(scenes):
        truth = majority(patch_cover(masks, *grid))
        truth = truth[truth.sum(1) >= min_patches]                             # (K, N)
        if len(truth):
            z, points = features(image), draw_points(truth, 1, generator_of(seed, "prompt", i))
            iou = [iou_sweep(similarity_map(x, points), truth).mean(0) for x in z.view(-1, *z.shape[-2:])]
            rows.append(torch.stack(iou).view(*z.shape[:-2], -1))
    return torch.stack(rows).mean(0) if rows else torch.full((len(THRESHOLDS),), torch.nan)


# ------------------------------------------------- similarity within and between categories
def pair_counts(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs i < j of an image's labelled patches: histograms (2, BINS) of their cosines over [-1, 1] and
    sums (2,), first of pairs with the same label (intra), then of different ones (inter).  z: (N, D).
    labels: (N,), -1 = none."""
    z, labels = z[labels >= 0], labels[labels >= 0]
    i, j = torch.triu_indices(len(z), len(z), 1, device=z.device)
    cosine, differ = (z @ z.T)[i, j], (labels[i] != labels[j]).long()
    bins = ((cosine + 1) * BINS / 2).long().clamp(0, BINS - 1) + BINS * differ
    sums = torch.zeros(2, dtype=torch.float64, device=z.device).index_add_(0, differ, cosine.double())
    return torch.bincount(bins, minlength=2 * BINS).view(2, BINS).cpu(), sums.cpu()


def overlap(counts: Tensor) -> float:
    """O = integral of min(p_intra, p_inter) of two histograms (2, BINS); nan where one of them is empty."""
    p = counts.double() / counts.sum(1, keepdim=True)
    return p.amin(0).sum().item()


# ------------------------------------------------- a set of images
@dataclass
class Result:
    """rows: (target, image, category, IoU (T,), IoU with the automatic threshold), one per prompt."""
    rows: list[tuple] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=lambda: {"class": 0, "instance": 0})
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.long))
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    images: int = 0
    seconds: float = 0.0


def stretch(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, *size), antialiased bicubic."""
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def unions(masks: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
    """Objects (K, H, W) and their categories -> one mask per category, and the categories, sorted."""
    kinds = sorted(set(names))
    return torch.stack([masks[[n == kind for n in names]].any(0) for kind in kinds]), kinds


@torch.no_grad()
def evaluate(vit: ViT, scenes: Scenes, size: int, device: torch.device, args: argparse.Namespace) -> Result:
    """Prompt every object and category of all images.  args: batch_size, stride and what `score` reads."""
    result, P, S = Result(), vit.patch_size, args.stride or vit.patch_size
    vit.patch_embed.stride, batch, start = S, [], time.perf_counter()
    for i in tqdm(range(len(scenes)), desc=scenes.title, unit="image", leave=False, disable=None):
        masks, names = scenes.masks(i)
        if names:
            image = scenes.read(i)
            check_sides(scenes.name(i), image.shape[1:], masks.shape[1:])
            batch.append((scenes.name(i), stretch(image, (size, size)), masks, names))
        if len(batch) == args.batch_size or i == len(scenes) - 1 and batch:
            z = patch_features(vit, normalize(torch.stack([b[1] for b in batch]).to(device))).cpu()
            for (name, _, masks, names), tokens in zip(batch, z, strict=True):
                score(result, name, tokens, masks, names, size, P, S, args)
            batch = []
    result.seconds, vit.patch_embed.stride = time.perf_counter() - start, P
    return result


def check_sides(name: str, image: tuple[int, int], masks: tuple[int, int]) -> None:
    """Raises ValueError where the masks are not of the image's form, such as of one that lies on its side."""
    (H, W), (h, w) = image, masks
    if abs(H * w - W * h) > H + W + h + w:                             # a copy of another size may round
        raise ValueError(f"{name}: the image is {W} x {H} pixels, its masks {w} x {h}; is it turned by EXIF?")


def score(result: Result, image: str, z: Tensor, masks: Tensor, names: list[str], size: int, P: int, S: int,
          args: argparse.Namespace) -> None:
    """Add one image's prompts and pairs to the result.  Prompts are drawn on the grid of whole patches,
    seeded by the image's name, so that they stay the same at any stride, --limit and batch size.  args:
    prompt, points, background_points, combine, min_patches, truth, upsample, seed."""
    g, G, k = size // P, (size - P) // S + 1, P // S             # patches, tokens of a side; tokens per patch
    for kind, (m, kinds) in (("class", unions(masks, names)), ("instance", (masks, names))):
        whole = patch_cover(m, g, g)                                   # (K, g*g)
        cover = whole if k == 1 else patch_cover(m, G, G, k)           # (K, N)
        if kind == "class":
            counts, sums = pair_counts(z, torch.where(majority(cover.amax(0)), cover.argmax(0), -1))
            result.counts, result.sums = result.counts + counts, result.sums + sums
        keep = majority(whole).sum(1) >= args.min_patches
        result.skipped[kind] += int((~keep).sum())
        if not keep.any():
            continue
        inside, truth = majority(whole[keep]), majority(cover[keep])
        rng = generator_of(args.seed, kind, image)
        points = draw_points(inside, args.points, rng)
        if args.prompt == "center":
            points[:, 0] = centre_point(inside, (g, g))
        maps = similarity_map(z, on_tokens(points, g, G), args.combine)                      # (Q, N)
        t = auto_threshold(maps, args.points)
        if args.background_points and not inside.all(1).any():
            maps = take_away(maps, z, on_tokens(draw_points(~inside, args.background_points, rng), g, G))
        if args.truth == "pixel":
            maps = to_pixels(maps, (G, G), P, S, args.upsample).flatten(1)
            truth = F.interpolate(m[None, keep].float(), (size, size), mode="nearest-exact")[0].flatten(1) > 0
        kinds = [n for n, kept in zip(kinds, keep.tolist(), strict=True) if kept]
        values = zip(kinds, iou_sweep(maps, truth), iou(maps >= t, truth).tolist(), strict=True)
        result.rows += [(kind, image, *v) for v in values]
    result.images += 1


def on_tokens(patch: Tensor, g: int, G: int) -> Tensor:
    """Numbers in a grid of g x g patches -> in the grid of G x G tokens with the same first and last."""
    k = (G - 1) // max(g - 1, 1)
    return patch // g * k * G + patch % g * k


def means(rows: list[tuple], by: int | None) -> np.ndarray:
    """(T + 1,) percent, thresholds then auto: mean within groups of equal row[by], then over the groups; nan
    without rows."""
    if not rows:
        return np.full(len(THRESHOLDS) + 1, np.nan)
    values = np.array([[*r[3].tolist(), r[4]] for r in rows])
    keys = np.array([r[by] if by is not None else "" for r in rows])
    return 100 * np.mean([values[keys == k].mean(0) for k in np.unique(keys)], 0)


def summarize(result: Result, scenes: Scenes, args: argparse.Namespace) -> dict:
    """What --json holds: the four means in percent, each {threshold: mIoU}, where there are such targets, the
    first of them the default definition, whose best and automatic values stand beside it; overlap, intra,
    inter (None where a set has one category per image only); counts.  Raises ValueError where there was
    nothing to prompt."""
    rows = {kind: [r for r in result.rows if r[0] == kind] for kind in ("class", "instance")}
    asked = rows[args.target]
    if not asked:
        raise ValueError(f"{scenes.title}: no {args.target} of {args.min_patches} or more patches in "
                         f"{len(scenes)} images")
    values = means(asked, 1), means(asked, None), means(asked, 2), means(rows["instance"], None)
    table = {k: {f"{t:.1f}": round(x, 3) for t, x in zip(THRESHOLDS, v.tolist(), strict=False)}
             for k, v in zip(MEANS, values, strict=True) if not np.isnan(v[0])}
    best = max(table["miou"], key=table["miou"].get)
    likeness = [overlap(result.counts), *(result.sums / result.counts.sum(1)).tolist()]
    likeness = [None if math.isnan(v) else round(v, 4) for v in likeness]
    return {**table, "best_threshold": float(best), "best": table["miou"][best],
            "auto": round(values[0][-1], 3),
            "auto_others": {k: round(v[-1], 3) for k, v in zip(MEANS, values, strict=True) if k in table},
            **dict(zip(("overlap", "intra", "inter"), likeness, strict=True)),
            "n_categories": len({r[2] for r in asked}), "n_prompts": len(asked),
            "n_skipped": result.skipped[args.target], "n_images": result.images,
            "left_out": dict(scenes.left_out), "images_per_s": round(result.images / result.seconds, 3)}


def say(s: dict, min_patches: int) -> None:
    """The table of one checkpoint."""
    print(f"{'mIoU at t =':>14}" + "".join(f"{t:6.1f}" for t in THRESHOLDS) + "     best (t)    auto")
    for k, word in MEANS.items():
        if k not in s:
            print(f"{word:>14}  no target of {min_patches} or more patches")
            continue
        best = max(s[k], key=s[k].get)
        print(f"{word:>14}" + "".join(f"{v:6.1f}" for v in s[k].values())
              + f"{s[k][best]:7.1f} ({best}){s['auto_others'][k]:8.1f}")
    prompts = f"{s['n_prompts']} prompts of {s['n_categories']} categories in {s['n_images']} images"
    likeness = ", ".join(f"{k} {'without pairs' if s[k] is None else format(s[k], '.3f')}"
                         for k in ("intra", "inter", "overlap"))
    left = "".join(f", {n} {why}" for why, n in s["left_out"].items())
    print(f"similarity: {likeness}; {prompts}; left out: {s['n_skipped']} targets below {min_patches} "
          f"patches{left}; {s['images_per_s']:.2f} images/s", flush=True)


def write_csv(path: str, ckpt: str, result: Result, scenes: Scenes, args: argparse.Namespace) -> None:
    """Append a line per category: prompts, mIoU at each threshold, auto; empty where it had no prompt."""
    with open(path, "a", newline="") as f:
        for kind in scenes.categories:
            rows = [r for r in result.rows if r[0] == args.target and r[2] == kind]
            values = [f"{v:.2f}" for v in means(rows, None)] if rows else [""] * (len(THRESHOLDS) + 1)
            csv.writer(f).writerow([ckpt, kind, len(rows), *values])


# ------------------------------------------------- few-shot by threshold
class MiniImageNet(Files):
    """mini-ImageNet's layout as an image source: DIR/images, and DIR/test.csv of `filename,label` lines."""

    def __init__(self, root: Path):
        with open(root / "test.csv", newline="") as f:
            lines = [r[:2] for r in csv.reader(f) if len(r) > 1 and r[0] != "filename"]
        if not lines:
            raise ValueError(f"{root / 'test.csv'}: no lines of filename,label")
        self.files, self.classes = [str(root / "images" / n) for n, _ in lines], sorted({c for _, c in lines})
        self.labels = [self.classes.index(c) for _, c in lines]


def draw_episodes(labels: Tensor, episodes: int = 600, ways: int = 5, queries: int = 15,
                  seed: int = 0) -> Tensor:
    """(n,) labels -> (episodes, ways, 1 + queries) image numbers: each row is of a class of its own, the
    support first.  Raises ValueError where there are too few classes, or images of a class."""
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    small, rng = sum(len(m) <= queries for m in members), generator_of(seed, "few-shot")
    if len(members) < ways or small:
        raise ValueError(f"{ways}-way episodes with {queries} queries need {ways} classes of {queries + 1} "
                         f"images: here are {len(members)} classes, {small} of them smaller")
    def some(n, of): return torch.randperm(of, generator=rng)[:n].tolist()
    return torch.stack([torch.stack([members[c][some(1 + queries, len(members[c]))]
                                     for c in some(ways, len(members))]) for _ in range(episodes)])


def few_shot(z: Tensor, episodes: Tensor) -> dict:
    """One-shot classification (Table 8).  Accuracy: is the support nearest to a query of its class?  F1:
    each query is asked of each support "same class?", yes where cosine >= t; counted over all episodes.

    z: (n, D) normalised.  episodes: (E, ways, 1 + queries).  Returns {"accuracy", "ci95": percent, "f1":
    {threshold: percent}}; always yes gives 33.3 at 5 ways."""
    support, query = z[episodes[:, :, 0]], z[episodes[:, :, 1:]]
    cosine = torch.einsum("ewqd,evd->ewqv", query, support)            # (E, ways, queries, ways)
    own = torch.arange(cosine.shape[1])
    right, f1 = 100 * (cosine.argmax(-1) == own[:, None]).float().mean((1, 2)), {}
    same = (own[:, None, None] == own).expand(cosine.shape)
    for t in THRESHOLDS[1:]:
        yes = cosine >= t
        f1[f"{t:.1f}"] = 200 * (yes & same).sum().item() / (yes.sum() + same.sum()).item()
    return {"accuracy": right.mean().item(), "ci95": 1.96 * right.std().item() / len(right) ** 0.5, "f1": f1}


def few_shot_main(args: argparse.Namespace, device: torch.device) -> None:
    root = Path(args.fewshot)
    mini = (root / "test.csv").is_file() and (root / "images").is_dir()
    images = MiniImageNet(root) if mini else Files(root / "val" if (root / "val").is_dir() else root)
    if images.labels is None:
        raise ValueError(f"--fewshot {root}: no class folders, nor images/ and test.csv of mini-ImageNet")
    for ckpt in args.ckpt:
        vit, source = load_backbone(ckpt, args.checkpoint_key)
        size = working_size(args.size or 224, vit.patch_size)
        z, labels = extract_features(vit.to(device), images, size, device, args.batch_size)
        r = few_shot(z["cls"], draw_episodes(labels, seed=args.seed))
        best = max(r["f1"], key=r["f1"].get)
        print(f"{source}\n5-way 1-shot, 600 episodes of 75 queries, CLS at {size} px, {len(labels)} images "
              f"of {len(images.classes)} classes, {len(images) - len(labels)} unreadable")
        print(f"accuracy {r['accuracy']:.1f} +- {r['ci95']:.1f} % (chance 20); F1 (always yes: 33.3) at t = "
              + "  ".join(f"{t}: {v:.1f}" for t, v in r["f1"].items()),
              f"best {r['f1'][best]:.1f} ({best})", sep="  ", flush=True)
        distributed.append_json(args.json, {
            "eval": "fewshot", "ckpt": ckpt, "data": args.fewshot, "size": size, **r,
            "best_threshold": float(best), "best": r["f1"][best]})


# ------------------------------------------------- one picture
def kmeans(z: Tensor, k: int, seed: int = 0, steps: int = 30) -> Tensor:
    """Spherical k-means of (N, D) normalised tokens -> (N,) cluster numbers, the largest first.  Each first
    centre is the token that is least like those before it."""
    centres = z[torch.randint(len(z), (1,), generator=generator_of(seed, "kmeans"))]
    for _ in range(k - 1):
        centres = torch.cat([centres, z[(z @ centres.T).amax(1).argmin()][None]])
    for _ in range(steps):
        nearest = (z @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, z)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=-1), centres)
    return torch.bincount(nearest, minlength=k).argsort(descending=True).argsort()[nearest]


def fit(image: Tensor, size: int, patch: int) -> Tensor:
    """(3, H, W) uint8 -> short side `size`, the aspect kept but for rounding to multiples of the patch."""
    scale = size / min(image.shape[1:])
    return stretch(image, tuple(working_size(s * scale, patch) for s in image.shape[1:]))


def token_at(point: tuple[float, float], old: tuple[int, int], new: tuple[int, int], P: int, S: int) -> int:
    """The token nearest to a pixel (x, y) of an image that was resized from (height, width) old to new."""
    n = [(side - P) // S + 1 for side in new]
    at = [round(((p + 0.5) * b / a - P / 2) / S) for p, a, b in zip(point[::-1], old, new, strict=True)]
    row, column = (min(max(i, 0), last - 1) for i, last in zip(at, n, strict=True))
    return row * n[1] + column


def picture_tokens(vit: ViT, image: Tensor, device: torch.device, size: int, stride: int | None,
                   block: int = -1) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(3, H, W) uint8 -> the image of short side `size`, (3, H', W') uint8, its tokens (N, D) on the CPU, and
    their grid.  Sets the network's stride (None: the patch size).  Raises ValueError above MAX_TOKENS."""
    x, vit.patch_embed.stride = fit(image, size, vit.patch_size), stride or vit.patch_size
    grid = vit.patch_embed.grid(*x.shape[1:])
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(f"{math.prod(grid)} tokens, more than {MAX_TOKENS}: lower --size or raise --stride")
    return x, patch_features(vit, normalize(x[None].to(device)), block)[0].cpu(), grid


def prompted(z: Tensor, on: list[int], off: list[int], threshold: float | str = "auto",
             combine: str = "max") -> tuple[Tensor, float]:
    """Tokens z (N, D), those clicked on and beside the object -> similarity (N,) and the threshold for it."""
    s = similarity_map(z, torch.tensor([on]), combine)
    t = auto_threshold(s, len(on)).item() if threshold == "auto" else threshold
    return (take_away(s, z, torch.tensor([off])) if off else s)[0], t


@torch.no_grad()
def picture_row(vit: ViT, image: Tensor, device: torch.device,
                args: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """The titled cells of one checkpoint.  args: size, stride, point, background_point, threshold, combine,
    upsample, heads, kmeans, seed."""
    P, S = vit.patch_size, args.stride or vit.patch_size
    x, z, grid = picture_tokens(vit, image, device, args.size or 480, S)
    old, new = tuple(image.shape[1:]), tuple(x.shape[1:])
    attention = vit.attention(normalize(x[None].to(device)))[0].cpu()  # (heads, N)
    photo = x.permute(1, 2, 0).numpy()
    def pixels(values, smooth=True): return to_pixels(values[None].float(), grid, P, S, smooth)[0]
    cells = [("image", photo)]
    if args.point:
        on, off = ([token_at(p, old, new, P, S) for p in found]
                   for found in (args.point, args.background_point))
        s, t = prompted(z, on, off, args.threshold, args.combine)
        low, high = s.min().item(), s.max().item()
        mask = segment(pixels(s, args.upsample), t).numpy()
        cells = [("prompt", marked(photo, old, args.point, args.background_point)),
                 (f"similarity, {low:.2f} to {high:.2f}", heat(pixels(s), low, high)),
                 (f"mask, t = {t:.2f}{' (auto)' * (args.threshold == 'auto')}", cut_out(photo, mask))]
    maps = {f"head {i + 1}": a for i, a in enumerate(attention)}
    maps = maps if args.heads else {"CLS attention": attention.mean(0)}
    cells += [(title, heat(pixels(a), 0, a.quantile(0.99).item())) for title, a in maps.items()]
    clusters = pixels(kmeans(z, args.kmeans, args.seed), smooth=False).long().numpy()
    return [*cells, (f"k-means, k = {args.kmeans}", painted(photo, clusters))]


def picture_main(args: argparse.Namespace, device: torch.device) -> None:
    image, rows = read_image(args.image), []
    for x, y in args.point + args.background_point:
        if not (0 <= x < image.shape[2] and 0 <= y < image.shape[1]):
            raise ValueError(f"point {x:g},{y:g} is outside of {args.image}, which is {image.shape[2]} "
                             f"pixels wide and {image.shape[1]} high")
    for ckpt in args.ckpt:
        vit, source = load_backbone(ckpt, args.checkpoint_key)
        print(source, flush=True)
        rows.append((short_name(ckpt), picture_row(vit.to(device), image, device, args)))
    sheet(rows).save(args.out)
    print(f"drawn in {args.out}")


# ------------------------------------------------- the command
def working_size(size: float, patch: int) -> int:
    """The multiple of the patch that is nearest to `size` pixels."""
    return max(1, round(size / patch)) * patch


def check_stride(stride: int | None, patch: int) -> None:
    if stride and patch % stride:
        raise ValueError(f"--stride {stride} does not divide the patch size {patch}")


def open_scenes(args: argparse.Namespace) -> Scenes:
    if args.toy:
        return ToyScenes(args.limit or 200, args.split or "val", seed=args.seed)
    if args.voc:
        return Voc(args.voc, args.split or "val", args.limit)
    return Coco(args.coco, args.split or "val2017", args.crowd, args.limit)


def table_main(args: argparse.Namespace, device: torch.device) -> None:
    panels = []
    if args.csv:
        columns = ["ckpt", "category", "prompts", *(f"t{t:.1f}" for t in THRESHOLDS), "auto"]
        Path(args.csv).write_text(",".join(columns) + "\n")
    for ckpt in args.ckpt:
        vit, source = load_backbone(ckpt, args.checkpoint_key)
        P, scenes = vit.patch_size, open_scenes(args)
        size = working_size(args.size or (vit.config["img_size"] if args.toy else 480), P)
        protocol = {"data": scenes.title, "size": size, "stride": args.stride or P}
        protocol |= {k: getattr(args, k) for k in PROTOCOL}
        words = ", ".join(f"{k} {v}" for k, v in protocol.items())
        print(f"{source}\nprotocol: {len(scenes)} images, {words}", flush=True)
        result = evaluate(vit.to(device), scenes, size, device, args)
        summary = summarize(result, scenes, args)
        say(summary, args.min_patches)
        distributed.append_json(args.json, {"eval": "zeroshot", "ckpt": ckpt, **protocol, **summary})
        if args.csv:
            write_csv(args.csv, ckpt, result, scenes, args)
        total = result.counts.sum(1, keepdim=True).double()
        panels.append(densities(
            (result.counts / total).numpy(), (result.sums / total[:, 0]).tolist(), ["intra", "inter"],
            short_name(ckpt), f"{scenes.title}, overlap O = {overlap(result.counts):.3f}"))
    if args.similarity:
        beside(panels).save(args.similarity)
        print(f"densities drawn in {args.similarity}")


def pair(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: expected x,y in pixels, such as 120,88") from e
    return x, y


def threshold(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a cosine, or auto") from e


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error, a = distributed.fail, p.add_argument
    a("--ckpt", nargs="+", required=True, help="checkpoints of any method; random:ARCH/PATCH is the "
      "untrained row")
    a("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
    a("--size", type=int, help="pixels of a side, to the nearest multiple of the patch (paper 480; --toy: as "
      "in training; --image: of the short side; --fewshot: 224)")
    a("--stride", type=int, help="pixels between patches, a divisor of the patch size; half of it: masks "
      "twice as fine, four times the tokens (default: the patch size, as in the paper)")
    a("--batch_size", type=int, default=8, help="images per forward (default 8); does not change the result")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--seed", type=int, default=0, help="of the random prompts and episodes")
    a("--json", help="append the result to this file, one JSON line per checkpoint; mIoU in percent")

    a = p.add_argument_group("what to evaluate: one of").add_argument
    a("--coco", metavar="DIR", help="folder of annotations/instances_SPLIT.json and SPLIT/")
    a("--voc", metavar="DIR", help="VOCdevkit, or VOC2012")
    a("--toy", action="store_true", help="generated scenes")
    a("--image", metavar="FILE", help="draw prompt, similarity, mask, attention and k-means of one image in "
      "--out")
    a("--fewshot", metavar="DIR", help="class folders, or mini-ImageNet's images/ and test.csv: 5-way 1-shot")

    a = p.add_argument_group("table").add_argument
    a("--split", help="default: val2017 of COCO, val elsewhere")
    a("--limit", type=int, help="only the first images (toy: 200)")
    a("--target", default="class", choices=["class", "instance"], help="[D] all objects of a category "
      "together (default), or one by one")
    a("--prompt", default="random", choices=["random", "center"], help="[D] a random patch of the target "
      "(default), or the deepest inside it")
    a("--min_patches", type=int, default=3, help="[D] smaller targets are left out (default 3)")
    a("--truth", default="patch", choices=["patch", "pixel"], help="[D] compare patches (default), or pixels "
      "of the resized image")
    a("--crowd", action="store_true", help="[D] COCO's crowd regions are objects, too (default: left out, "
      "counted)")
    a("--points", type=int, default=1, help="prompts per target (paper 1)")
    a("--background_points", type=int, default=0, help="prompts beside the target; what is more like them is "
      "taken away (paper 0)")
    a("--csv", help="write the mIoU of each category to this file")
    a("--similarity", nargs="?", const="similarity.png", metavar="PNG", help="draw the densities of the "
      "similarities within and between categories (default similarity.png)")

    a = p.add_argument_group("table and picture").add_argument
    a("--upsample", default=None, action=argparse.BooleanOptionalAction, help="interpolate the similarity to "
      "pixels before the threshold (default: in pictures; in a table it needs --truth pixel)")
    a("--combine", default="max", choices=["max", "mean"], help="of the similarities to several prompts "
      "(default max)")

    a = p.add_argument_group("picture").add_argument
    a("--point", type=pair, action="append", default=[], metavar="X,Y", help="pixel on the object, once or "
      "more; without: attention and k-means only")
    a("--background_point", type=pair, action="append", default=[], metavar="X,Y", help="pixel beside it, "
      "any number")
    a("--threshold", type=threshold, default="auto", help="cosine, or auto (default): from the map's mean "
      "and maximum")
    a("--heads", action="store_true", help="attention of each head (default: their mean)")
    a("--kmeans", type=int, default=3, metavar="K", help="clusters of the tokens (paper 3)")
    a("--out", default="zeroshot.png", help="where the picture goes (default zeroshot.png)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, or make no sense."""
    given = [k for k in ("coco", "voc", "toy", "image", "fewshot") if getattr(args, k)]
    if len(given) != 1:
        raise ValueError(f"give one of --coco, --voc, --toy, --image, --fewshot, not {len(given)}")
    for name in ("limit", "size", "stride", "points", "min_patches", "batch_size", "kmeans"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.background_points < 0:
        raise ValueError(f"--background_points {args.background_points}: expected 0 or more")
    if args.upsample and args.truth == "patch" and not args.image:
        raise ValueError("--upsample compares pixels: add --truth pixel")
    if args.background_point and not args.point:
        raise ValueError("--background_point takes away from the mask of a --point: give one")
    distributed.check_outputs(args, "json", "csv", "similarity", "out")
    args.upsample = bool(args.image) if args.upsample is None else args.upsample


def main(args: argparse.Namespace) -> None:
    check(args)
    device = distributed.init(args.device)
    distributed.one_process("zeroshot.py")
    for ckpt in args.ckpt:                                             # all of them, before any work
        check_stride(args.stride, load_backbone(ckpt, args.checkpoint_key)[0].patch_size)
    (picture_main if args.image else few_shot_main if args.fewshot else table_main)(args, device)


if __name__ == "__main__":
    distributed.run(lambda: main(get_parser().parse_args()))
