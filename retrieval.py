"""Image retrieval on the revisited Oxford and Paris sets (Table 9): mAP and mP@k, Medium and Hard.

    python probes.py retrieval --ckpt mmc.pth --data /data/roxford5k
    python probes.py retrieval --ckpt mmc.pth dino.pth --data /data/rparis6k --imsize 1024 --multi_scale

Layout, as published: DIR/jpg/NAME.jpg and DIR/gnd_roxford5k.pkl (any gnd_*.pkl): {"imlist", "qimlist", "gnd":
[{"bbx", "easy", "hard", "junk"} per query]}.  The pickle is opened by an unpickler that builds lists, dicts,
numbers and numpy arrays and refuses all else.

An image: long side at most --imsize (never enlarged), sides floored to whole patches; CLS (or PAT) of the
last block, averaged over the scales, L2-normalised; dot products.  A query is cropped to its box, as the
sets' authors say; --no-query_crop is DINO's habit.  Boxes are in stored pixels, so EXIF turns no image.
Medium: easy and hard count, junk is taken out.  Hard: hard counts, junk and easy are taken out.  AP by
trapezoids.  Queries without a positive are left out of the mean.  Paper: see its Table 9, all rows ViT-B.

Shapes: Q queries, n images of the database, D width."""
import argparse
import os
import pickle
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import figure
import run
from distributed import say
from images import BadImage, Unreadable, normalize, read_image, resize
from model import ViT
from run import Mistake

KAPPAS = (1, 5, 10)
KINDS = "easy hard junk"
SETUPS = {                               # which images count, and which are taken out of the ranking
    "medium": ("easy hard", "junk"),
    "hard": ("hard", "junk easy"),
}
PROTOCOL = "head imsize scales query_crop precision".split()
ALLOWED = set("numpy.ndarray numpy.dtype _codecs.encode builtins.bytes __builtin__.bytes".split())
for maker in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"):
    ALLOWED |= {f"numpy.core.{maker}", f"numpy._core.{maker}"}


# ------------------------------------------------- the set
class Plain(pickle.Unpickler):
    """Reads numbers, strings, containers and numpy arrays, which need what is ALLOWED; raises UnpicklingError
    for anything else."""

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_truth(path: Path) -> dict:
    """A gnd_*.pkl -> {"imlist": [n names], "qimlist": [Q names], "gnd": [Q dicts]}.  Raises Mistake."""
    try:
        with open(path, "rb") as f:
            truth = Plain(f, encoding="latin1").load()
        check_truth(truth)
    except Exception as e:               # what is no such pickle can raise almost any kind
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise Mistake(f"{path}: not a ground truth of the revisited sets ({what}); expected imlist, qimlist, "
                      "and gnd with bbx, easy, hard, junk") from e
    return truth


def check_truth(truth: dict) -> None:
    """Raises ValueError for images that do not exist and boxes that are none."""
    n = len(truth["imlist"])
    for query, known in zip(truth["qimlist"], truth["gnd"], strict=True):
        for i in numbers(known, KINDS):
            if not 0 <= i < n:
                raise ValueError(f"query {query}: index {i} of {n} images")
        box = known["bbx"]
        if len(box) != 4 or not np.isfinite(box).all():
            raise ValueError(f"query {query}: a box of {len(box)} numbers, {box}")


def numbers(known: dict, kinds: str) -> np.ndarray:
    """The images of some kinds, such as "easy hard", in a query's ground truth."""
    lists = [np.ravel(known[kind]) for kind in kinds.split()]
    return np.concatenate(lists).astype(int)


class Revisited:
    """The images of a set: n of the database, and then the queries.  Raises Mistake."""

    def __init__(self, root: str):
        folder = Path(root) / "jpg"
        has_folder = os.path.isdir(folder)
        found = list(Path(root).glob("gnd_*.pkl"))
        if len(found) != 1 or not has_folder:
            raise Mistake(f"--data {root}: expected DIR/jpg/*.jpg and one DIR/gnd_*.pkl, found {len(found)} "
                          f"gnd_*.pkl and {'a' if has_folder else 'no'} jpg/")
        truth = read_truth(found[0])
        names = [*truth["imlist"], *truth["qimlist"]]
        self.root = root
        self.title = found[0].stem.removeprefix("gnd_")
        self.files = [f"{folder}/{name}.jpg" for name in names]
        self.n = len(truth["imlist"])
        self.gnd = truth["gnd"]
        self.about = f"{len(self.gnd)} queries, {self.n} images"
        lost = [file for file in self.files if not os.path.isfile(file)]
        if lost:
            raise Mistake(f"{root}: {len(lost)} of {len(names)} images are missing, the first {lost[0]}")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i]

    def read(self, i: int, crop: bool) -> Tensor:
        """(3, H, W) uint8; of a query only its box, if crop.  Raises BadImage."""
        image = read_image(self.files[i], upright=False)
        if crop and i >= self.n:
            return cropped(image, self.gnd[i - self.n]["bbx"])
        return image


def cropped(image: Tensor, box) -> Tensor:
    """The part of (3, H, W) in a box (left, top, right, bottom) in pixels; the whole if that is empty."""
    left, top, right, bottom = (max(0, int(v)) for v in box)
    part = image[:, top:bottom, left:right]
    return part if part.numel() else image


# ------------------------------------------------- features
@torch.no_grad()
def describe(
    vit: ViT, image: Tensor, device, imsize: int, scales: list[float], head: str,
) -> Tensor:
    """(3, H, W) uint8 -> (D,) L2-normalised: CLS or PAT, the mean over the scales of the image."""
    P = vit.patch_size
    sides = image.shape[1:]
    shrink = min(1.0, imsize / max(sides))
    total = 0.0
    for scale in scales:
        size = []
        for side in sides:
            patches = int(side * (shrink * scale) + 1e-6) // P
            size.append(max(1, patches) * P)
        x = resize(image.float() / 255, size).clamp(0, 1)
        x = normalize(x.to(device))
        tokens = vit(x[None], cls_only=head == "cls")[0]               # (T, D), or (1, D)
        if head == "pat":
            tokens = tokens[vit.num_prefix_tokens:]
        total = total + tokens.float().mean(0)
    return F.normalize(total, dim=0).cpu()


def search(queries: Tensor, database: Tensor) -> np.ndarray:
    """(Q, D), (n, D) -> (Q, n) image numbers, best first; ties in the database's order."""
    similarity = queries @ database.T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


# ------------------------------------------------- the score
def average_precision(ranks: np.ndarray, positives: int) -> float:
    """AP by trapezoids.  ranks: (r,) places, from 0, of the positives in the list without junk.

        AP = 1/positives * sum_j (P_before + P_at) / 2,  P_at = (j + 1) / (rank_j + 1),
        P_before = j / rank_j, and 1 at rank 0"""
    ranks = np.sort(ranks).astype(float)
    j = np.arange(len(ranks))
    before = np.where(ranks > 0, j / np.maximum(ranks, 1), 1.0)
    at = (j + 1) / (ranks + 1)
    return float((before + at).sum() / 2 / positives)


def places(order: np.ndarray, positive, junk) -> np.ndarray:
    """Places of the positives in a ranking (n,) of image numbers once the junk is taken out, from 0."""
    kept = order[~np.isin(order, junk)]
    return np.flatnonzero(np.isin(kept, positive))


def scores(order: np.ndarray, gnd: list[dict], setup: str) -> dict[str, float]:
    """{"map", "mp@1", ...}: percent, means over the queries that have a positive; "queries": how many do.

    order: (Q, n) image numbers, best first."""
    positive, junk = SETUPS[setup]
    rows = []
    for ranking, known in zip(order, gnd, strict=True):
        found = places(ranking, numbers(known, positive), numbers(known, junk))
        if len(found) == 0:
            continue
        row = [average_precision(found, len(found))]
        for kappa in KAPPAS:
            top = min(found.max() + 1, kappa)                          # as the sets' authors
            row.append((found < top).sum() / top)
        rows.append(row)
    names = ["map", *(f"mp@{kappa}" for kappa in KAPPAS)]
    means = 100 * np.mean(rows or [[np.nan] * len(names)], axis=0)
    return dict(zip(names, means.tolist(), strict=True), queries=len(rows))


# ------------------------------------------------- the script
def rank(
    vit: ViT,
    images: Revisited,
    args,
    device,
) -> tuple[np.ndarray, list[int], Unreadable]:
    """(Q, n) image numbers, best first, and the numbers of the Q queries: those that can be read."""
    unreadable = Unreadable(len(images), args.max_bad)
    features = {}
    for i in tqdm(range(len(images)), "features", mininterval=1):
        try:
            image = images.read(i, args.query_crop)
        except BadImage as e:
            unreadable.note(str(e))
            continue
        features[i] = describe(vit, image, device, args.imsize, args.scales, args.head)
    readable = np.array(list(features))
    n = (readable < images.n).sum()
    if n in (0, len(features)):
        raise Mistake(f"{images.root}: no query, or no image of the database, can be read")
    stacked = torch.stack(list(features.values()))                     # (n + Q, D)
    order = search(stacked[n:], stacked[:n])
    queries = readable[n:] - images.n
    return readable[order], queries.tolist(), unreadable


def picture_rows(
    images: Revisited,
    order: np.ndarray,
    queries: list[int],
    crop: bool,
) -> list[tuple]:
    """The first queries with their best results, each said to be easy, hard, junk or wrong."""
    def square(i: int) -> np.ndarray:
        photo = images.read(i, crop).permute(1, 2, 0).numpy()
        padded = ImageOps.pad(Image.fromarray(photo), (figure.CELL, figure.CELL))
        return np.asarray(padded)

    rows = []
    for query, ranking in zip(queries[:6], order, strict=False):
        place = images.n + query
        known = images.gnd[query]
        panels = [("query", square(place))]
        for i in ranking[:5]:
            kinds = [kind for kind in KINDS.split() if i in numbers(known, kind)]
            panels.append((kinds[0] if kinds else "wrong", square(i)))
        rows.append((Path(images.name(place)).stem, panels))
    return rows


def run_one(
    args,
    ckpt: str,
    vit: ViT,
    images: Revisited,
    device,
) -> tuple[np.ndarray, list[int]]:
    """Rank for one checkpoint, say and record the scores.  Returns what `rank` does."""
    started = time.time()
    order, queries, unreadable = rank(vit, images, args, device)
    unreadable.say()
    say(checkpoint.short_name(ckpt))
    gnd = [images.gnd[query] for query in queries]
    metrics = {}
    for setup in SETUPS:
        result = scores(order, gnd, setup)
        shown = "  ".join(f"mP@{kappa} {result[f'mp@{kappa}']:.2f}" for kappa in KAPPAS)
        without = len(queries) - result["queries"]
        left = f"; {without} without a positive are left out" if without else ""
        say(f"{setup:>7}  mAP {result['map']:.2f}  {shown}   ({result['queries']} of {len(images.gnd)} "
            f"queries{left})")
        metrics[setup] = result
    run.record(
        args.json,
        eval="retrieval",
        ckpt=ckpt,
        weights=checkpoint.digest(vit),
        data=args.data,
        data_digest=data.digest(images),
        protocol={name: getattr(args, name) for name in PROTOCOL},
        metrics=metrics | unreadable.for_json(),
        seconds=time.time() - started,
        device=device,
    )
    return order, queries


def main(args) -> None:
    device = run.begin(args, one_process=True)
    run.check_outputs(args, "json", "picture")
    images = Revisited(args.data)
    say(f"retrieval, {images.title}: {images.about}")
    say(", ".join(f"{name} {getattr(args, name)}" for name in PROTOCOL))
    vits = [checkpoint.open_backbone(args, ckpt, device) for ckpt in args.ckpt]
    rows = []
    for ckpt, vit in zip(args.ckpt, vits, strict=True):
        order, queries = run_one(args, ckpt, vit, images, device)
        if args.picture:
            rows += picture_rows(images, order, queries, args.query_crop)
    if args.picture:
        with run.writing(args.picture):
            figure.sheet(rows).save(args.picture)
        say(f"look at {args.picture}")


def add_options(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    run.add_shared(p, "ckpt checkpoint_key num_heads")
    a("--data", required=True, help="folder with jpg/ and gnd_roxford5k.pkl or gnd_rparis6k.pkl")
    a("--head", default="cls", choices=["cls", "pat"], help="which feature describes an image")
    a("--imsize", type=run.count, default=224,
      help="pixels of the long side (DINO 224; the sets' authors 1024)")
    a("--multi_scale", dest="scales", action="store_const", const=[1, 2 ** -0.5, 0.5], default=[1],
      help="average over scales 1, 1/sqrt(2), 1/2")
    a("--query_crop", default=True, action=argparse.BooleanOptionalAction,
      help="[D] crop a query to its box (the sets' authors: yes; DINO: no)")
    a("--picture", help="write the first queries and their best results to this PNG")
    run.add_shared(p, "max_bad device precision json")
    p.set_defaults(main=main)
