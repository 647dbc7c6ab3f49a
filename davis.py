"""Video label propagation on DAVIS-2017, with J&F (Table 2): frozen features, no training, one command.

    python davis.py --ckpt out/backbone.pth --davis /data/DAVIS --json davis.jsonl     # propagate, then score
    python davis.py --eval_only PREDICTIONS --davis /data/DAVIS                     # score any method's PNGs
    python davis.py --ckpt out/backbone.pth --video frames/ --first_mask mask.png --overlay   # your own video
    torchrun --nproc_per_node=8 davis.py ...                              # the ranks share out the sequences

DINO's protocol.  Frame: short side 480, long side floored to a multiple of 64.  Context: the
first frame, once, and up to 7 frames before this one (never the first again).  Affinity exp(cos / 0.1) within
12 tokens to each side; the 5 largest over all context tokens stay, with all that ties with the fifth.  Soft
labels are handed on, only the output is hardened.  Score: the official one, less first and last frame.
Paper: ViT-S MMC 60.3, iBOT 59.7, DINO 57.7; ViT-B MMC 63.8, DINO 62.3.  A frame of ViT-S/16 on one CPU core:
features 1.3 s, propagation 0.13 s, metric 0.01 s; 1 GB of memory.

Departs from DINO's script: where a patch size P does not divide 480 or 64, the short side is floored to a
multiple of P and the long one to the largest multiple of P within 64 (476x840 at P = 14); red is divided by
ImageNet's 0.229 (there 0.228); the resized frame is not rounded to bytes; cosines are ranked before the
exponential, so that a small --temp cannot overflow.  Departs from the official score: decay is right beyond
255 frames (there an index overflows), and object numbers may have gaps.

Writes OUT/SEQUENCE/FRAME.png (palette), options.json beside them (so that a run can go on), three tables.
Shapes: h x w tokens of a frame, D width, F context frames, C = 1 + objects, H x W pixels; for a band of rows
Q queries, L keys per frame, g places looked at."""
import argparse
import csv
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

import distributed
from checkpoint import digest, load_backbone
from data import EXTENSIONS, BadImage, normalize, read_image
from model import ViT

PROTOCOL = ("n_last_frames", "size_mask_neighborhood", "topk", "temp", "size", "size_multiple", "block")
NAMES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
BAND = 8                # rows of queries at a time: their keys are a view, their similarities fit the cache
MAX_OBJECTS = 64        # more numbers than this in a mask are shades of grey
NEAREST = Image.Resampling.NEAREST
# PASCAL VOC's colours: bit 3j + c of the number is bit 7 - j of channel c
PALETTE = [sum((i >> 3 * j + c & 1) << 7 - j for j in range(3)) for i in range(256) for c in range(3)]


# ------------------------------------------------- propagation
def propagate(query: Tensor, keys: Tensor, labels: Tensor, radius: int = 12, topk: int = 5,
              temp: float = 0.1) -> Tensor:
    """Soft labels of one frame from those of its context frames.

        label_i = sum_j a_ij label_j / sum_j a_ij
        a_ij    = exp(q_i.k_j / temp) where q_i.k_j >= the topk-th largest of i's, else 0
        j: the tokens of all F frames with |row_i - row_j| <= radius and |column_i - column_j| <= radius

    query: (h, w, D), keys: (F, h, w, D), L2-normalised.  labels: (F, h, w, C).  radius 0: the whole frame.
    Returns (h, w, C).  Fastest with h >= w.  The plain quadratic form stands in tests/test_davis.py.

    Exact: the topk largest lie at topk places at most, so only the best of the F frames at each place is
    ranked, and all F are looked at in the topk + 1 best places; if the last of these ties, everywhere."""
    (n, h, w, D), out = keys.shape, []
    radius = radius or max(h, w)
    row, column = torch.arange(h, device=keys.device), torch.arange(w, device=keys.device)
    for top in range(0, h, BAND):
        band, halo = slice(top, top + BAND), slice(max(0, top - radius), top + BAND + radius)
        q, k = query[band].reshape(1, -1, D), keys[:, halo].flatten(1, 2)
        sims = torch.bmm(q.expand(n, -1, -1), k.mT)                                      # (F, Q, L)
        far_row = (row[band, None, None, None] - row[halo, None]).abs() > radius
        far_column = (column[:, None, None] - column).abs() > radius
        best = sims.amax(0).masked_fill_((far_row | far_column).view(sims.shape[1:]), -torch.inf)
        for places in (min(topk + 1, best.shape[1]), best.shape[1]):
            value, place = best.topk(places)                                             # (Q, g), best first
            chosen = sims.gather(2, place.expand(n, -1, -1)).masked_fill_(value == -torch.inf, -torch.inf)
            kth = chosen.transpose(0, 1).flatten(1).topk(min(topk, n * places))[0][:, -1:]
            if (value[:, -1:] < kth).all():  # else a tie may be left out
                break
        a = ((chosen - value[:, :1]) / temp).exp() * (chosen >= kth)                     # (F, Q, g)
        known = labels[:, halo].flatten(1, 2)[:, place]                                  # (F, Q, g, C)
        out.append((a[..., None] * known).sum((0, 2)) / a.sum((0, 2))[:, None])
    return torch.cat(out).view(h, w, -1)


def working_size(height: int, width: int, size: int, multiple: int, patch: int) -> tuple[int, int]:
    """Pixels (height, width) to which a frame is resized: short side `size` and long side in proportion,
    floored to a multiple of the patch and to the largest multiple of the patch within `multiple`."""
    unit, short = max(1, multiple // patch) * patch, max(1, size // patch) * patch
    long = max(1, size * max(height, width) // min(height, width) // unit) * unit
    return (long, short) if height > width else (short, long)


def frame_features(vit: ViT, frame: Tensor, size: tuple[int, int], block: int = -1) -> Tensor:
    """(3, H, W) uint8 -> (h, w, D) float32 L2-normalised patch tokens of a block, after the final norm."""
    x = F.interpolate(frame[None].float() / 255, size=size, mode="bilinear")
    z = vit.intermediate(normalize(x), [block], norm=True)[0][0, vit.num_prefix_tokens:]
    return F.normalize(z.float(), dim=-1).view(size[0] // vit.patch_size, size[1] // vit.patch_size, -1)


def harden(labels: Tensor, patch: int, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, C) soft labels -> (H, W) uint8 object numbers: bilinear to pixels, each channel stretched to
    [0, 1], the largest wins, nearest to `size`.  A channel without contrast becomes 1, or stays 0."""
    x = F.interpolate(labels.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear")[0]
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = torch.where(high > low, (x - low) / (high - low), (high > 0).float())            # (C, h*P, w*P)
    return np.array(Image.fromarray(ids[x.argmax(0).cpu().numpy()]).resize(size[::-1], NEAREST))


@torch.no_grad()
def track(vit: ViT, frames: Iterable[Tensor], first: np.ndarray, n_last_frames: int = 7,
          size_mask_neighborhood: int = 12, topk: int = 5, temp: float = 0.1, size: int = 480,
          size_multiple: int = 64, block: int = -1, seconds: Counter | None = None) -> Iterator[np.ndarray]:
    """The masks (H, W) uint8 of a video's frames, from that of the first, which comes out as it went in.

    frames: (3, H, W) uint8, all of one size, taken one at a time.  first: (H, W) uint8, 0 = background.
    seconds: "features" and "propagation" are added to it.  Memory does not grow with the video's length."""
    device, seconds = next(vit.parameters()).device, Counter() if seconds is None else seconds
    ids, P = np.unique(np.append(first, np.uint8(0))), vit.patch_size
    H, W = working_size(*first.shape, size, size_multiple, P)
    turn = (1, 0, 2) if W > H else (0, 1, 2)                           # `propagate` likes h >= w
    for t, frame in enumerate(frames):
        start = clock(device)
        z = frame_features(vit, frame.to(device), (H, W), block).permute(turn)           # (h, w, D)
        seconds["features"] += clock(device) - start
        start = clock(device)
        if t == 0:
            mask, small = first, np.array(Image.fromarray(first).resize((W // P, H // P), NEAREST))
            known = torch.from_numpy(small[..., None] == ids).float().to(device).permute(turn)   # (h, w, C)
            keys, labels = (x.new_empty(1 + n_last_frames, *x.shape) for x in (z, known))
        else:
            used = min(t, 1 + n_last_frames)
            known = propagate(z, keys[:used], labels[:used], size_mask_neighborhood, topk, temp)
            mask = harden(known.permute(turn), P, ids, first.shape)
        if t == 0 or n_last_frames:
            slot = 1 + (t - 1) % n_last_frames if t else 0             # slot 0 stays, the others take turns
            keys[slot], labels[slot] = z, known
        seconds["propagation"] += clock(device) - start
        yield mask


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


# ------------------------------------------------- the score
def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two (H, W) bool masks; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Contours of (H, W) bools or numbers: where the right, lower or lower right neighbour differs."""
    m = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != m[:-1, 1:]) | (mask != m[1:, :-1]) | (mask != m[1:, 1:])


def boundary_f(mask: np.ndarray, truth: np.ndarray) -> float:
    """F of two (H, W) bool masks: harmonic mean of the shares of each contour within ceil(0.008 * diagonal)
    pixels of the other; 1 if neither has a contour, 0 if one has none.  A search tree gives the same as
    dilation by a disk, sooner."""
    radius = math.ceil(0.008 * math.hypot(*mask.shape))                # 8 at 854x480
    a, b = np.argwhere(boundary(mask)), np.argwhere(boundary(truth))
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    precision, recall = ((cKDTree(y).query(x, distance_upper_bound=radius + 1)[0] <= radius).mean()
                         for x, y in ((a, b), (b, a)))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Of (T,) frames: mean; recall = share above 0.5; decay = mean of the first quarter minus the last's.
    Neighbouring quarters share a frame, as in the official code."""
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return values.mean(), (values > 0.5).mean(), values[:edges[1] + 1].mean() - values[edges[3]:].mean()


def summary(j: np.ndarray, f: np.ndarray) -> dict[str, float]:
    """The seven official numbers of an object, as fractions, from its (T,) J and F."""
    numbers = *statistics(j), *statistics(f)
    return dict(zip(NAMES, map(float, ((numbers[0] + numbers[3]) / 2, *numbers)), strict=True))


def mean_of(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES}


def score(name: str, truth: list[Path], folder: Path) -> dict[str, dict[str, float]]:
    """{"judo_1": the seven numbers, ...} of the PNGs in `folder` against the annotation but for its first and
    last frame.  The objects are those of the first annotation.  Prints which frames and objects are left out.
    Raises ValueError for missing frames and for masks of another size."""
    binary = not read_mask(truth[0], binary=False).any()               # DAVIS-2016: 0 and 255
    ids, seen, scored = np.setdiff1d(read_mask(truth[0], binary), 0).tolist(), set(), truth[1:-1]
    missing = [p.name for p in scored if not (folder / p.name).is_file()]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(scored)} frames are missing: {few(missing)}")
    j, f = np.zeros((2, len(ids), len(scored)))
    for t, path in enumerate(scored):
        true, mask = read_mask(path, binary), read_mask(folder / path.name)
        if true.shape != mask.shape:
            raise ValueError(f"{folder / path.name}: height and width {mask.shape}, its truth {true.shape}")
        seen |= set(np.flatnonzero(np.bincount(mask.ravel())).tolist())
        for i, k in enumerate(ids):
            j[i, t], f[i, t] = jaccard(mask == k, true == k), boundary_f(mask == k, true == k)
    frames = {p.stem for p in folder.glob("*.png")} - {p.stem for p in truth}
    for what, found in (("frames without annotation, not scored", frames),
                        ("objects in no predicted frame, scored as empty", set(ids) - seen),
                        ("objects that the first annotation does not have, ignored", seen - {0, *ids})):
        if found:
            print(f"{name}: {what}: {few(sorted(found))}")
    return {f"{name}_{k}": summary(j[i], f[i]) for i, k in enumerate(ids)}


# ------------------------------------------------- files
@dataclass
class Clip:
    """A video: its frames, and the masks of the annotated ones, that of the first frame first."""
    name: str
    frames: list[Path]
    masks: list[Path]


def few(names: list) -> str:
    return ", ".join(map(str, names[:8])) + (f", ... ({len(names)})" if len(names) > 8 else "")


def read_mask(path: Path, binary: bool | None = None) -> np.ndarray:
    """A palette, grey or 1-bit mask -> (H, W) uint8.  255 is object 1 if `binary`, else void, 0; by default
    it is object 1 if there is no other.  Raises BadImage for no image, colours, or numbers above 255."""
    try:
        with Image.open(path) as image:
            mask = np.array(image)
    except Exception as e:                                             # as in data.read_image
        raise BadImage(f"{path}: not a readable mask ({type(e).__name__})") from e
    if mask.ndim == 3:                                                 # grey, but saved as RGB or with alpha
        mask, colours = mask[..., 0], mask[..., :3 if mask.shape[2] > 2 else 1]
        if (colours != mask[..., None]).any():
            raise BadImage(f"{path}: has colours; expected a palette or grey PNG of object numbers")
    mask = mask * 255 if mask.dtype == bool else mask
    if mask.max() > 255:
        raise BadImage(f"{path}: has numbers up to {mask.max()}; expected 8 bits")
    if binary is None:
        binary = not ((mask > 0) & (mask < 255)).any()
    return np.where(mask == 255, int(binary), mask).astype(np.uint8)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg."""
    def order(path):
        return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", path.stem)]
    found = [p for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
    return sorted(found, key=order)


def find_clips(args: argparse.Namespace) -> list[Clip]:
    """The videos that the options name.  Raises ValueError for what is not there."""
    if args.video:
        folder = Path(args.video).resolve()
        if folder.is_file():
            raise ValueError(f"{folder} is a file; make a folder: ffmpeg -i {folder.name} frames/%05d.jpg")
        clips = [Clip(folder.name, images_in(folder), [Path(args.first_mask)])]
    else:
        root = Path(args.davis)
        listed = root / "ImageSets/2017" / f"{args.split}.txt"
        if not listed.is_file():
            raise ValueError(f"{listed}: no such list; --davis holds JPEGImages, Annotations and ImageSets")
        names = listed.read_text().split()
        unknown = sorted(set(args.sequences or []) - set(names))
        if unknown or not names:
            raise ValueError(f"{listed}: does not list {few(unknown) or 'any sequence'}")
        frames, masks = root / "JPEGImages/480p", root / "Annotations/480p"
        clips = [Clip(n, images_in(frames / n), images_in(masks / n)) for n in args.sequences or names]
    for clip in clips:
        if not clip.masks:
            raise ValueError(f"{masks / clip.name}: no mask there, but {listed.name} lists it")
        if not clip.frames and (args.ckpt or args.overlay):
            raise ValueError(f"{args.video or frames / clip.name}: no images there")
        if args.davis and args.ckpt and clip.frames[0].stem != clip.masks[0].stem:
            raise ValueError(f"{clip.frames[0]}: the first frame has no mask, only {clip.masks[0].name}")
    return clips


def plan(clip: Clip, folder: Path, weights: str, args: argparse.Namespace) -> dict | None:
    """What the masks of a clip depend on, to be stored beside them; None if they are all there.
    Raises ValueError for masks made otherwise, and for a first mask without objects or with too many."""
    first = read_mask(clip.masks[0])
    n = len(np.setdiff1d(first, 0))
    if not 0 < n <= MAX_OBJECTS:
        raise ValueError(f"{clip.masks[0]}: {n} objects; expected 0 = background, 1 to {MAX_OBJECTS} others")
    options = {"weights": weights, "first_mask": digest({"": torch.from_numpy(first)}),
               "frames": len(clip.frames)}
    options |= {k: getattr(args, k) for k in PROTOCOL}
    stored = folder / "options.json"
    old = json.loads(stored.read_text() or "{}") if stored.is_file() else {}
    if args.overwrite or not old and not any(folder.glob("*.png")):
        return options
    differ = few([f"{k} {old.get(k)}, now {v}" for k, v in options.items() if old.get(k) != v])
    if differ:
        raise ValueError(f"{folder}: masks made otherwise ({differ if old else 'not by davis.py'}): "
                         "give --overwrite or another --output_dir")
    return None if old["done"] and all((folder / f"{p.stem}.png").is_file() for p in clip.frames) else options


def read_frames(clip: Clip, size: tuple[int, int]) -> Iterator[Tensor]:
    """The frames, one at a time, with a progress bar.  Raises ValueError for one that cannot be read or has
    another size (height, width) than the first mask."""
    for path in tqdm(clip.frames, desc=clip.name, unit="frame", leave=False, disable=None):
        frame = read_image(path)
        if frame.shape[1:] != size:
            raise ValueError(f"{path}: height and width {tuple(frame.shape[1:])}, {clip.masks[0]} has {size}")
        yield frame


def write_masks(clip: Clip, folder: Path, vit: ViT, options: dict, seconds: Counter) -> None:
    """Propagate one clip into palette PNGs; options.json says "done" only after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(options | {"done": False}))
    first, constants = read_mask(clip.masks[0]), {k: options[k] for k in PROTOCOL}
    masks = track(vit, read_frames(clip, first.shape), first, **constants, seconds=seconds)
    for path, mask in zip(clip.frames, masks, strict=True):
        image = Image.fromarray(mask)
        image.putpalette(PALETTE)
        image.save(folder / f"{path.stem}.png")
    (folder / "options.json").write_text(json.dumps(options | {"done": True}))


def write_overlay(clip: Clip, folder: Path, out: Path) -> None:
    """Frames with coloured masks in out/NAME/FRAME.jpg, and out/NAME.webp, an animation of 150 at most."""
    (out / clip.name).mkdir(parents=True, exist_ok=True)
    colours, step, shown = np.array(PALETTE).reshape(-1, 3), math.ceil(len(clip.frames) / 150), []
    for i, path in enumerate(clip.frames):
        picture, mask = read_image(path).permute(1, 2, 0).numpy(), read_mask(folder / f"{path.stem}.png")
        picture = np.where(mask[..., None], picture * 0.5 + colours[mask] * 0.8, picture).clip(0, 255)
        picture[boundary(mask)] = 255
        image = Image.fromarray(picture.astype(np.uint8))
        image.save(out / clip.name / f"{path.stem}.jpg", quality=90)
        if i % step == 0:
            image.thumbnail((480, 480))
            shown.append(image)
    animation = out / f"{clip.name}.webp"
    shown[0].save(animation, save_all=True, append_images=shown[1:], duration=42 * step, loop=0)


def write_results(results: dict[str, dict], out: Path, args: argparse.Namespace) -> None:
    """The overall line, the JSON line and the tables.  results: {sequence: {object: the seven numbers}}."""
    objects = {name: row for found in results.values() for name, row in found.items()}
    overall = mean_of(objects.values())
    print(f"{args.split}: {len(results)} sequences, {len(objects)} objects; percent, mean over the objects")
    print("  ".join(NAMES) + "\n" + "  ".join(f"{100 * overall[k]:{len(k)}.1f}" for k in NAMES))
    if args.json:
        protocol = {k: getattr(args, k) for k in ("ckpt", *PROTOCOL)} if args.ckpt else {}
        line = {"eval": "davis", "davis": args.davis, "split": args.split, "masks": str(out), **protocol}
        distributed.append_json(args.json, line | overall | {"objects": objects})
    for kind, rows in (("global", {args.split: overall}), ("per-object", objects),
                       ("per-sequence", {name: mean_of(found.values()) for name, found in results.items()})):
        with open(out / f"{kind}_results-{args.split}.csv", "w", newline="") as file:
            table = [[name, *(f"{row[k]:.5f}" for k in NAMES)] for name, row in rows.items()]
            csv.writer(file).writerows([["Name", *NAMES], *table])


def main(args: argparse.Namespace) -> None:
    device, clips = distributed.init(args.device), find_clips(args)
    out, todo, results = Path(args.eval_only or args.output_dir), {}, {}
    if args.ckpt:
        vit, source = load_backbone(args.ckpt, args.checkpoint_key)
        weights = digest(vit.state_dict())
        distributed.say(f"{source}\nDAVIS: {', '.join(f'{k} {getattr(args, k)}' for k in PROTOCOL)}; tokens "
                        "after the final norm; scored without first and last frame")
        todo = {c.name: plan(c, out / c.name, weights, args) for c in clips}   # refuse before work is spent
        vit.to(device)
    for clip in clips[distributed.rank()::distributed.world_size()]:
        seconds, n = Counter(), len(clip.frames or clip.masks)
        if todo.get(clip.name):
            write_masks(clip, out / clip.name, vit, todo[clip.name], seconds)
        line = f"{clip.name}: {n} frames" + ", not scored" * (len(clip.masks) < 3)
        if len(clip.masks) > 2:
            start = time.perf_counter()
            found = results[clip.name] = score(clip.name, clip.masks, out / clip.name)
            seconds["metric"] = time.perf_counter() - start
            mean = mean_of(found.values())
            line += f", {len(found)} objects" + "".join(
                f"  {k} {100 * mean[k + '-Mean']:.1f}" for k in ("J&F", "J", "F"))
        if args.overlay:
            write_overlay(clip, out / clip.name, out / "overlay")
        times = ", ".join(f"{k} {1000 * s / n:.0f}" for k, s in seconds.items())
        print(line + f"  (ms per frame: {times})" * bool(times), flush=True)
    gathered = distributed.everywhere(results)
    results = {c.name: g[c.name] for c in clips for g in gathered if c.name in g}
    if distributed.is_main() and results:
        write_results(results, out, args)
    distributed.say(f"written to {out}")


def get_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error, a = distributed.fail, p.add_argument
    a("--ckpt", help="checkpoint of any method, or random:ARCH/PATCH for the untrained row")
    a("--checkpoint_key", help="weights other than the teacher's, by their name in the file")
    a("--davis", help="folder of JPEGImages/480p, Annotations/480p and ImageSets/2017")
    a("--split", default="val", help="list in ImageSets/2017; sequences with one mask are only propagated")
    a("--sequences", nargs="+", help="only these of the list")
    a("--eval_only", metavar="FOLDER", help="in place of --ckpt: score FOLDER/SEQUENCE/FRAME.png, anyone's")
    a("--video", metavar="FOLDER", help="in place of --davis: frames of your own")
    a("--first_mask", metavar="PNG", help="its first frame's mask: 0 background, 1, 2, ... objects; or 0/255")
    a("--output_dir", default="out/davis", help="masks, tables, overlays; what is finished there is kept")
    a("--overwrite", action="store_true", help="propagate again what is finished, or was made otherwise")
    a("--overlay", action="store_true", help="also write frames with coloured masks, and an animation")
    a("--json", help="append the seven numbers, as fractions, overall and per object, as one JSON line")
    a("--n_last_frames", type=int, default=7, help="frames of context beside the first (DINO: 7)")
    a("--size_mask_neighborhood", type=int, default=12, help="reach to each side, tokens (DINO: 12); 0: all")
    a("--topk", type=int, default=5, help="context tokens that vote (DINO: 5)")
    a("--temp", type=float, default=0.1, help="of the votes, exp(cos / temp) (DINO: 0.1)")
    a("--size", type=int, default=480, help="short side in pixels; a small one wants a small --size_multiple")
    a("--size_multiple", type=int, default=64, help="the long side is floored to a multiple of it, in pixels")
    a("--block", type=int, default=-1, help="block whose tokens are compared, from 1; -1: the last")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, or make no sense."""
    if bool(args.davis) == bool(args.video) or bool(args.video) != bool(args.first_mask):
        raise ValueError("give --davis FOLDER, or --video FOLDER with --first_mask PNG")
    if bool(args.ckpt) == bool(args.eval_only) or args.video and args.eval_only:
        raise ValueError("give --ckpt FILE, or with --davis --eval_only FOLDER to score masks that are there")
    if min(args.topk, args.size, args.size_multiple) < 1 or args.temp <= 0:
        raise ValueError("--topk, --size, --size_multiple and --temp must be above 0")
    if min(args.n_last_frames, args.size_mask_neighborhood) < 0:
        raise ValueError("--n_last_frames and --size_mask_neighborhood must not be negative")
    distributed.check_outputs(args, "json")


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    distributed.run(lambda: (check(arguments), main(arguments)))
