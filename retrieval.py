"""Image retrieval on the revisited Oxford and Paris sets (Table 9): mAP, mP@k, Medium, Hard.

    python probes.py retrieval --ckpt mmc.pth --data /data/roxford5k
    python probes.py retrieval --ckpt mmc.pth --data /data/rparis6k --imsize 1024 --multi_scale

Layout, as published: DIR/jpg/NAME.jpg and DIR/gnd_roxford5k.pkl (any gnd_*.pkl): {"imlist", "qimlist", "gnd":
[{"bbx", "easy", "hard", "junk"} per query]}.  The pickle is opened by an unpickler that builds lists, dicts,
numbers and numpy arrays and refuses all else.

An image: long side at most --imsize (never enlarged), sides floored to whole patches; CLS (or PAT) of the
last block, averaged over the scales, L2-normalised; dot products.  A query is cropped to its box, as the
sets' authors say; --no-query_crop is DINO's habit.
Medium: easy and hard count, junk is taken out.  Hard: hard counts, junk and easy are taken out.  AP by
trapezoids.  Queries without a positive are left out of the mean.  Paper (MMC, ViT-S): see its Table 9.

Shapes: Q queries, n images of the database, D width."""
import argparse
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import distributed
import figure
from checkpoint import load_backbone
from data import normalize, read_image
from model import ViT

KAPPAS = (1, 5, 10)
SETUPS = {"medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy"))}
SAFE = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")}
SAFE |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class Plain(pickle.Unpickler):
    """Reads numbers, strings, containers and numpy arrays; raises UnpicklingError for anything else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_truth(path: Path) -> dict:
    """A gnd_*.pkl -> {"imlist": [n names], "qimlist": [Q names], "gnd": [Q dicts]}.  Raises ValueError."""
    try:
        with open(path, "rb") as f:
            truth = Plain(f, encoding="latin1").load()
        n = len(truth["imlist"])
        for q, g in zip(truth["qimlist"], truth["gnd"], strict=True):
            wrong = [i for k in ("easy", "hard", "junk") for i in g[k] if not 0 <= int(i) < n]
            if wrong or len(g["bbx"]) != 4:
                raise ValueError(f"query {q}: index {wrong[0]} of {n} images" if wrong else
                                 f"query {q}: a box of {len(g['bbx'])} numbers")
    except Exception as e:                                             # a damaged pickle raises anything
        said = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise ValueError(f"{path}: not a ground truth of the revisited sets ({said}); expected imlist, "
                         "qimlist, gnd with bbx, easy, hard, junk") from e
    return truth


# ------------------------------------------------- features
@torch.no_grad()
def describe(vit: ViT, image: Tensor, imsize: int, scales: tuple[float, ...], head: str, device) -> Tensor:
    """(3, H, W) uint8 -> (D,) L2-normalised: CLS or PAT, the mean over the scales of the image."""
    P, total = vit.patch_size, 0.0
    H, W = image.shape[1:]
    for scale in scales:
        k = min(1.0, imsize / max(H, W)) * scale
        size = [max(P, int(s * k + 1e-6) // P * P) for s in (H, W)]
        x = F.interpolate(image[None].float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        tokens = vit(normalize(x.to(device)))[0].float()
        total = total + (tokens[0] if head == "cls" else tokens[vit.num_prefix_tokens:].mean(0))
    return F.normalize(total, dim=0).cpu()


def cropped(image: Tensor, box) -> Tensor:
    """The part of (3, H, W) in a box (left, top, right, bottom) in pixels; the whole if that is empty."""
    left, top, right, bottom = (max(0, int(v)) for v in box)
    part = image[:, top:bottom, left:right]
    return part if part.numel() else image


def upright_box(path: Path, box):
    """Boxes are in the file's own pixels; a picture that EXIF turns is never asked for in these sets."""
    with Image.open(path) as im:
        if ImageOps.exif_transpose(im).size != im.size:
            raise ValueError(f"{path}: is turned by its EXIF tag, so its query box does not fit")
    return box


# ------------------------------------------------- the score
def average_precision(ranks: np.ndarray, positives: int) -> float:
    """AP by trapezoids.  ranks: (r,) places, from 0, of the positives in the list without junk.

        AP = 1/positives * sum_j (P_before + P_at) / 2,  P_at = (j + 1) / (rank_j + 1),
        P_before = j / rank_j, and 1 at rank 0"""
    j, ranks = np.arange(len(ranks)), np.sort(np.asarray(ranks)).astype(float)
    before = np.where(ranks > 0, j / np.maximum(ranks, 1), 1.0)
    return float((before + (j + 1) / (ranks + 1)).sum() / 2 / positives)


def places(order: np.ndarray, positive, junk) -> np.ndarray:
    """Places of the positives in a ranking (n,) of image numbers once the junk is taken out, from 0."""
    kept = order[~np.isin(order, np.asarray(junk, dtype=int))]
    return np.flatnonzero(np.isin(kept, np.asarray(positive, dtype=int)))


def evaluate(order: np.ndarray, gnd: list[dict], setup: str) -> dict[str, float]:
    """{"map", "mp@1", ... , "queries"}: percent, means over the queries that have a positive.

    order: (Q, n) image numbers, best first."""
    positive, junk = ([np.concatenate([np.asarray(g[k], dtype=int).ravel() for k in names]) for g in gnd]
                      for names in SETUPS[setup])
    rows = []
    for ranking, good, bad in zip(order, positive, junk, strict=True):
        if len(good):
            at = places(ranking, good, bad)
            top = [min(at.max() + 1, k) for k in KAPPAS]               # as the sets' authors
            rows.append([average_precision(at, len(good)), *((at < k).sum() / k for k in top)])
    means = 100 * np.mean(rows, 0) if rows else np.full(1 + len(KAPPAS), np.nan)
    return dict(zip(["map", *(f"mp@{k}" for k in KAPPAS)], map(float, means), strict=True)) | {
        "queries": len(rows)}


def search(queries: Tensor, database: Tensor, chunk: int = 64) -> np.ndarray:
    """(Q, D), (n, D) -> (Q, n) image numbers, best first; ties in the database's order."""
    return torch.cat([(q @ database.T).argsort(dim=1, descending=True, stable=True)
                      for q in queries.split(chunk)]).numpy()


def main(args: argparse.Namespace) -> None:
    distributed.check_outputs(args, "json", "picture")
    device, root = distributed.init(args.device), Path(args.data)
    distributed.one_process("probes.py retrieval")
    found = sorted(root.glob("gnd_*.pkl"))
    if len(found) != 1 or not (root / "jpg").is_dir():
        raise ValueError(f"--data {root}: expected DIR/jpg/*.jpg and one DIR/gnd_*.pkl, found "
                         f"{len(found)} gnd_*.pkl and {'a' if (root / 'jpg').is_dir() else 'no'} jpg/")
    truth = read_truth(found[0])
    names, queries, gnd = truth["imlist"], truth["qimlist"], truth["gnd"]
    files = [root / "jpg" / f"{n}.jpg" for n in [*names, *queries]]
    lost = [f for f in files if not f.is_file()]
    if lost:
        raise ValueError(f"{root}: {len(lost)} of {len(files)} images are missing, the first {lost[0]}")
    vit, report = load_backbone(args.ckpt, args.checkpoint_key)
    vit = vit.to(device)
    scales = (1, 2 ** -0.5, 0.5) if args.multi_scale else (1,)
    print(report)
    print(f"retrieval, {found[0].stem[4:]}: {len(queries)} queries{', cropped' if args.query_crop else ''}, "
          f"{len(names)} images, {args.head.upper()}, long side {args.imsize}, "
          f"scales {', '.join(f'{s:.3g}' for s in scales)}")
    features = torch.empty(len(files), vit.embed_dim)
    for i, path in enumerate(tqdm(files, "features", mininterval=1)):
        image = read_image(path)
        if i >= len(names) and args.query_crop:
            image = cropped(image, upright_box(path, gnd[i - len(names)]["bbx"]))
        features[i] = describe(vit, image, args.imsize, scales, args.head, device)
    order = search(features[len(names):], features[:len(names)])
    result = {setup: evaluate(order, gnd, setup) for setup in SETUPS}
    for setup, r in result.items():
        print(f"{setup:>7}  mAP {r['map']:.2f}  " + "  ".join(f"mP@{k} {r[f'mp@{k}']:.2f}" for k in KAPPAS)
              + f"   ({r['queries']} of {len(queries)} queries)")
    if args.picture:
        picture(root, truth, order, args.query_crop).save(args.picture)
        print(f"look at {args.picture}")
    distributed.append_json(args.json, {
        "probe": "retrieval", "ckpt": args.ckpt, "data": args.data, "head": args.head, "imsize": args.imsize,
        "scales": scales, "query_crop": args.query_crop, **result})


def picture(root: Path, truth: dict, order: np.ndarray, crop: bool, n: int = 6, top: int = 5) -> Image.Image:
    """The first queries with their best results, each said to be easy, hard, junk or wrong."""
    def square(image: Tensor) -> np.ndarray:
        whole = ImageOps.pad(Image.fromarray(image.permute(1, 2, 0).numpy()), (figure.CELL, figure.CELL))
        return np.asarray(whole)
    rows = []
    for name, g, ranking in list(zip(truth["qimlist"], truth["gnd"], order, strict=True))[:n]:
        query = read_image(root / "jpg" / f"{name}.jpg")
        cells = [("query", square(cropped(query, g["bbx"]) if crop else query))]
        for i in ranking[:top]:
            kind = next((k for k in ("easy", "hard", "junk") if i in np.asarray(g[k])), "wrong")
            cells.append((kind, square(read_image(root / "jpg" / f"{truth['imlist'][i]}.jpg"))))
        rows.append((name, cells))
    return figure.sheet(rows)


def add_options(p: argparse.ArgumentParser) -> None:
    a = p.add_argument
    a("--data", required=True, help="folder with jpg/ and gnd_roxford5k.pkl or gnd_rparis6k.pkl")
    a("--head", default="cls", choices=["cls", "pat"], help="which feature describes an image")
    a("--imsize", type=int, default=224, help="pixels of the long side (DINO 224; the sets' authors 1024)")
    a("--multi_scale", action="store_true", help="average over scales 1, 1/sqrt(2), 1/2")
    a("--query_crop", default=True, action=argparse.BooleanOptionalAction,
      help="[D] crop a query to its box (the sets' authors: yes; DINO: no)")
    a("--picture", help="write the first queries and their best results to this PNG")
    p.set_defaults(main=main)
