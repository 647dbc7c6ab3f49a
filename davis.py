"""Video label propagation on DAVIS-2017, with J&F (Table 2): frozen features, no training, one command.

    python davis.py --ckpt out/backbone.pth --davis /data/DAVIS --json davis.jsonl     # propagate, then score
    python davis.py --eval_only PREDICTIONS --davis /data/DAVIS                        # score anybody's PNGs
    python davis.py --ckpt out/backbone.pth --video frames/ --first_mask mask.png --overlay   # your own video
    torchrun --nproc_per_node=8 davis.py ...                               # the ranks share out the sequences

DINO's protocol.  A frame is resized to a short side of 480; its long side is floored to a multiple of 64.
The context of a frame is the first frame, once, and up to 7 frames before it.  The affinity of two tokens is
exp(cos / 0.1) within 12 tokens to each side; the 5 largest over all context tokens vote, and all that ties
with the fifth.  Soft labels are handed on, only the output is hardened.  The score is the official one,
without first and last frame.  Paper: ViT-S MMC 60.3, iBOT 59.7, DINO 57.7; ViT-B MMC 63.8, DINO 62.3.
A frame of ViT-S/16 on one CPU core: features 1.3 s, propagation 0.1 s, score 0.01 s; 1 GB of memory.

Departs from DINO's script: where a patch size P does not divide 480 or 64, the short side is floored to a
multiple of P and the long one to the largest multiple of P within 64 (476x840 at P = 14); red is divided by
ImageNet's 0.229 (there 0.228); the resized frame is not rounded to bytes; cosines are ranked before the
exponential, so that a small --temp cannot overflow.  videos.py says how the score departs from the official.

Writes OUT/SEQUENCE/FRAME.png (palette), options.json beside them so that a run can go on, and three tables;
with several checkpoints OUT/NAME/... for each.
Shapes: h x w tokens of a frame, D width, M context frames, C = 1 + objects, H x W pixels; for a band of rows
Q queries, L keys per frame, g places."""
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import distributed
import run
import videos
from checkpoint import digest, open_backbone, short_name
from clicks import patch_features
from distributed import is_main, say
from figure import Array, voc_palette
from images import Unreadable, normalize, to_device
from model import ViT
from run import Mistake, count, plural, writing
from videos import NAMES, Clip, few, mean_of, object_numbers, read_frames, score

PROTOCOL = ["n_last_frames", "size_mask_neighborhood", "topk", "temp", "size", "size_multiple", "block"]
IDLE = {                # options that have no effect beside another
    "davis": ["first_mask"],
    "video": ["split", "sequences", "json"],
    "eval_only": [*PROTOCOL, "overwrite", "checkpoint_key", "num_heads", "device", "precision", "max_bad"],
}
MAX_TOKENS = 1 << 16    # of a frame; a strip of 4x60,000 pixels would have 13 million
BAND = 8                # rows of queries at a time: their keys are a view, their similarities fit the cache


# ------------------------------------------------- propagation
def propagate(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    radius: int = 12,
    topk: int = 5,
    temp: float = 0.1,
) -> Tensor:
    """Soft labels of one frame from those of its context frames.

        label_i = sum_j a_ij label_j / sum_j a_ij
        a_ij    = exp(q_i.k_j / temp) where q_i.k_j >= the topk-th largest of i's, else 0
        j: the tokens of all M frames with |row_i - row_j| <= radius and |column_i - column_j| <= radius

    query: (h, w, D), keys: (M, h, w, D), L2-normalised.  labels: (M, h, w, C).  radius 0: the whole frame.
    Returns (h, w, C).  Fastest with h >= w.

    This is exact: the topk largest lie at topk places at most, so it is enough to look at all M frames in the
    topk + 1 places that are best in any frame.  Where the last of these ties, all places are looked at."""
    h, w, _ = query.shape
    parts = []
    complete = []
    for top in range(0, h, BAND):
        part, no_tie = propagate_band(query, keys, labels, top, radius, topk, temp, topk + 1)
        parts.append(part)
        complete.append(no_tie)

    for i, no_tie in enumerate(torch.stack(complete).tolist()):        # the one wait for the device
        if not no_tie:
            parts[i], _ = propagate_band(query, keys, labels, i * BAND, radius, topk, temp, h * w)
    return torch.cat(parts).view(h, w, -1)


def propagate_band(query, keys, labels, top, radius, topk, temp, places):
    """`propagate` for the BAND rows from `top` on, with votes from the best `places` of each token.

    Returns (Q, C), and a bool: no other place can tie with those that vote."""
    M, h, w, D = keys.shape
    radius = radius or max(h, w)
    band = slice(top, top + BAND)
    halo = slice(max(0, top - radius), top + BAND + radius)            # the rows within reach
    q = query[band].reshape(1, -1, D)                                  # (1, Q, D)
    k = keys[:, halo].flatten(1, 2)                                    # (M, L, D)
    cosines = torch.bmm(q.expand(M, -1, -1), k.mT)                     # (M, Q, L)

    row = torch.arange(h, device=keys.device)
    column = torch.arange(w, device=keys.device)
    far_row = (row[band, None] - row[halo]).abs() > radius
    far_column = (column[:, None] - column).abs() > radius
    far = far_row[:, None, :, None] | far_column[:, None, :]
    far = far.view(cosines.shape[1:])                                  # (Q, L)
    best = cosines.amax(0)
    best = best.masked_fill_(far, -torch.inf)                          # (Q, L)
    value, place = best.topk(min(places, best.shape[1]))               # (Q, g), best first

    cosines = cosines.gather(2, place.expand(M, -1, -1))
    cosines = cosines.masked_fill_(value == -torch.inf, -torch.inf)    # (M, Q, g)
    ranked = cosines.transpose(0, 1).flatten(1)                        # (Q, M*g)
    kth = ranked.topk(min(topk, ranked.shape[1])).values[:, -1:]       # (Q, 1)
    votes = ((cosines - value[:, :1]) / temp).exp()
    votes = votes * (cosines >= kth)                                   # (M, Q, g)

    known = labels[:, halo].flatten(1, 2)
    known = known[:, place]                                            # (M, Q, g, C)
    mixed = (votes[..., None] * known).sum((0, 2))
    mixed = mixed / votes.sum((0, 2))[:, None]
    return mixed, (value[:, -1:] < kth).all()


def frame_size(height: int, width: int, size: int, multiple: int, patch: int) -> tuple[int, int]:
    """Pixels (height, width) to which a frame is resized: short side `size` and long side in proportion,
    floored to a multiple of the patch and to the largest multiple of the patch within `multiple`."""
    short = max(1, size // patch) * patch
    unit = max(1, multiple // patch) * patch
    long = size * max(height, width) // min(height, width)
    long = max(1, long // unit) * unit
    return (long, short) if height > width else (short, long)


def frame_features(vit: ViT, frame: Tensor, size: tuple[int, int], block: int) -> Tensor:
    """(3, H, W) uint8 -> (h, w, D) float32 L2-normalised patch tokens of a block, after the final norm."""
    x = frame[None].float() / 255
    x = F.interpolate(x, size=size, mode="bilinear")
    z = patch_features(vit, normalize(x), block)[0]                    # (h*w, D)
    return z.unflatten(0, vit.patch_embed.grid(*size))


def harden(labels: Tensor, patch: int, ids: Array, size: tuple[int, int]) -> Array:
    """(h, w, C) soft labels -> (H, W) uint8 object numbers: bilinear to pixels, each channel stretched to
    [0, 1], the largest wins, nearest to `size`.  A channel without contrast becomes 1, or stays 0.  Of
    channels that tie, the first wins."""
    x = labels.permute(2, 0, 1)[None]
    x = F.interpolate(x, scale_factor=patch, mode="bilinear")[0]
    low = x.amin((1, 2), keepdim=True)
    high = x.amax((1, 2), keepdim=True)
    stretched = (x - low) / (high - low)
    x = torch.where(high > low, stretched, (high > 0).float())         # (C, h*P, w*P)
    winner = x.max(0).indices.byte().cpu()                             # argmax(0) is many times as slow
    return resized(ids[winner.numpy()], size)


def resized(mask, size):
    """(H, W) uint8 -> `size` = (height, width), nearest."""
    image = Image.fromarray(mask)
    image = image.resize(size[::-1], Image.Resampling.NEAREST)
    return np.array(image)


@torch.no_grad()
def track(
    vit: ViT,
    frames: Iterable[Tensor],
    first: Array,
    n_last_frames: int = 7,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
    temp: float = 0.1,
    size: int = 480,
    size_multiple: int = 64,
    block: int = -1,
) -> Iterator[Array]:
    """The masks (H, W) uint8 of a video's frames, from that of the first, which comes out as it went in.

    frames: (3, H, W) uint8, all of one size, taken one at a time.  first: (H, W) uint8, 0 = background.
    Memory does not grow with the video's length."""
    device = vit.cls_token.device
    P = vit.patch_size
    size = frame_size(*first.shape, size, size_multiple, P)
    turn = (1, 0, 2) if size[1] > size[0] else (0, 1, 2)               # `propagate` likes h >= w
    ids = np.array([0, *object_numbers(first)], np.uint8)              # (C,)

    for t, frame in enumerate(frames):
        z = frame_features(vit, to_device(frame, device), size, block)
        z = z.permute(turn)                                            # (h, w, D)
        if t == 0:
            mask = first
            small = resized(first, vit.patch_embed.grid(*size))
            soft = torch.from_numpy(small[..., None] == ids).float()
            soft = soft.to(device).permute(turn)                       # (h, w, C)
            keys = z.new_empty(1 + n_last_frames, *z.shape)
            labels = soft.new_empty(1 + n_last_frames, *soft.shape)
        else:
            used = min(t, 1 + n_last_frames)
            soft = propagate(z, keys[:used], labels[:used], size_mask_neighborhood, topk, temp)
            mask = harden(soft.permute(turn), P, ids, first.shape)
        if t == 0 or n_last_frames:
            slot = 1 + (t - 1) % n_last_frames if t else 0             # slot 0 stays, the others take turns
            keys[slot] = z
            labels[slot] = soft
        yield mask


# ------------------------------------------------- one checkpoint
@dataclass
class Entry:
    """A row of the table: a checkpoint, or in its place masks that are there already."""
    ckpt: str                                  # or the folder of --eval_only
    masks: Path                                # holds SEQUENCE/FRAME.png
    out: Path                                  # gets tables and overlays
    vit: ViT | None = None
    weights: str = ""                          # their digest
    protocol: dict = field(default_factory=dict)


def entry_of(args, ckpt: str, vit: ViT, folder: Path) -> Entry:
    """A checkpoint whose masks and tables go to `folder`.  Raises Mistake."""
    try:
        vit.block_number(args.block)
    except ValueError as e:
        raise Mistake(f"--block: {ckpt}: {e}") from e
    protocol = {name: getattr(args, name) for name in [*PROTOCOL, "precision"]}
    protocol["num_heads"] = vit.config["num_heads"]
    return Entry(ckpt, folder, folder, vit, digest(vit), protocol)


def write_masks(clip: Clip, entry: Entry, overwrite: bool, unreadable: Unreadable) -> bool:
    """Propagate a clip into palette PNGs; False if that was done before, with the same options.  These lie
    beside the masks, in options.json, which says "done" only after the last.

    Raises Mistake for masks that were made otherwise, and where they would lie among the frames."""
    folder = entry.masks / clip.name
    if folder.resolve() == clip.frames[0].resolve().parent:
        raise Mistake(f"{folder}: the masks would lie among the frames: give another --output_dir")
    P = entry.vit.patch_size
    H, W = frame_size(*clip.first.shape, entry.protocol["size"], entry.protocol["size_multiple"], P)
    if H * W > MAX_TOKENS * P ** 2:
        raise Mistake(f"{clip.masks[0]}: height and width {clip.first.shape} would become {H, W}, more than "
                      f"{MAX_TOKENS} tokens; cut the frames, or lower --size")
    about = folder / "options.json"
    options = entry.protocol | {"weights": entry.weights, "frames": len(clip.frames)}
    options["first_mask"] = digest({"": torch.from_numpy(clip.first)})
    paths = [folder / f"{frame.stem}.png" for frame in clip.frames]
    there = [path for path in paths if path.is_file()]
    if there and not overwrite:
        before = [{}, *run.read_lines(about)][-1]                      # {} for masks of others
        differ = []
        for name, value in options.items():
            if before.get(name) != value:
                differ.append(f"{name} {before.get(name)}, now {value}")
        if differ:
            why = few(differ) if before else "not by davis.py"
            raise Mistake(f"{folder}: masks made otherwise ({why}): give --overwrite or another --output_dir")
        if before["done"] and there == paths:
            for name in before["unreadable"]:
                unreadable.note(name)
            return False

    noted = len(unreadable.names)
    protocol = {name: options[name] for name in PROTOCOL}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(options | {"done": False}))
        masks = track(entry.vit, read_frames(clip, unreadable), clip.first, **protocol)
        for path, mask in zip(paths, masks, strict=True):
            image = Image.fromarray(mask)
            image.putpalette(voc_palette())
            image.save(path)
        done = {"done": True, "unreadable": unreadable.names[noted:]}
        about.write_text(json.dumps(options | done))
    return True


def one_video(args, clip: Clip, entry: Entry, unreadable: Unreadable) -> tuple[dict, str]:
    """Propagate a clip, score it, draw it.  Returns {object: the seven numbers}, empty if it has one mask,
    and a line to print."""
    line = f"{clip.name}: {clip.about()}"
    start = time.perf_counter()
    if entry.vit and write_masks(clip, entry, args.overwrite, unreadable):
        seconds = time.perf_counter() - start
        line += f", {1000 * seconds / len(clip.frames):.0f} ms a frame"
    if args.overlay:
        videos.write_overlay(clip, entry.masks / clip.name, entry.out / "overlay")
    if len(clip.masks) <= 2:
        return {}, f"{line}, not scored"
    rows = score(clip.name, clip.masks, entry.masks / clip.name)
    mean = percent(mean_of(rows.values()))
    return rows, f"{line}; J&F {mean['J&F-Mean']:.1f}  J {mean['J-Mean']:.1f}  F {mean['F-Mean']:.1f}"


def run_one(args, clips: list[Clip], entry: Entry, device: torch.device) -> None:
    """Each rank propagates and scores its share of the clips; rank 0 says and writes what all found."""
    start = time.perf_counter()
    frames = sum(len(clip.frames) for clip in clips)
    unreadable = Unreadable(frames, args.max_bad)
    found = {}
    for clip in clips[distributed.rank()::distributed.world_size()]:
        found[clip.name] = one_video(args, clip, entry, unreadable)
        say(found[clip.name][1])
    shares = distributed.everywhere((found, unreadable.names))
    if not is_main():
        return

    for others, names in shares[1:]:                                   # rank 0 has said its own
        found = found | others
        for _, line in others.values():
            say(line)
        for name in names:
            unreadable.note(name)
    scored = {}
    for clip in clips:
        rows, _ = found[clip.name]
        if rows:
            scored[clip.name] = rows
    if scored:
        seconds = time.perf_counter() - start
        say_and_record(args, clips, entry, scored, unreadable, seconds, device)
    unreadable.say()
    say(f"written to {entry.out}")


def percent(row: dict[str, float]) -> dict[str, float]:
    return {name: 100 * value for name, value in row.items()}


def say_and_record(args, clips, entry, scored, unreadable, seconds, device):
    """The JSON line, the three tables, and the overall numbers.  scored: {sequence: {object: numbers}}."""
    tables = videos.write_tables(entry.out, args.split, scored)
    overall = percent(tables["global"][args.split])
    objects = {name: percent(row) for name, row in tables["per-object"].items()}
    first_masks = {clip.name: torch.from_numpy(clip.first) for clip in clips}
    run.record(
        args.json, eval="davis", ckpt=entry.ckpt, weights=entry.weights,
        data=args.davis, data_digest=digest(first_masks),
        protocol=entry.protocol | {"split": args.split, "sequences": len(scored)},
        metrics=overall | unreadable.for_json() | {"objects": objects},
        seconds=seconds, device=device,
    )
    counted = f"{plural(len(scored), 'sequence')}, {plural(len(objects), 'object')}"
    say(f"{args.split}: {counted}; percent, mean over the objects")
    say("  ".join(NAMES))
    say("  ".join(f"{overall[name]:{len(name)}.1f}" for name in NAMES))


# ------------------------------------------------- the command
def main(args) -> None:
    device = run.begin(args)
    out = Path(args.output_dir)
    run.check_outputs(args, "json")
    with writing(out, "--output_dir "):
        out.mkdir(parents=True, exist_ok=True)
        run.lock(out)

    left_out = Counter()
    clips = videos.find_clips(args, left_out)
    say(videos.described(args.davis or args.video, clips, left_out))
    if args.eval_only:
        entries = [Entry(args.eval_only, Path(args.eval_only), out)]
    else:
        constants = ", ".join(f"{name} {getattr(args, name)}" for name in PROTOCOL)
        say(f"protocol: {constants}; tokens after the final norm; scored without first and last frame")
        entries = open_entries(args, out, device)
    for entry in entries:
        run_one(args, clips, entry, device)


def open_entries(args, out: Path, device: torch.device) -> list[Entry]:
    """All checkpoints, opened before the work, each with a folder of its own."""
    entries = {}
    for ckpt in args.ckpt:
        folder = out
        if len(args.ckpt) > 1:
            folder = out / re.sub(r"[^\w.-]", "_", short_name(ckpt))
        if folder in entries:
            raise Mistake(f"--ckpt {ckpt}: another one would write to {folder}, too; rename the file, or "
                          "evaluate it alone with another --output_dir")
        entries[folder] = entry_of(args, ckpt, open_backbone(args, ckpt, device), folder)
    return list(entries.values())


def get_args(argv=None):
    p = run.Parser(description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", **run.SHARED["ckpt"] | {"required": False})
    what.add_argument("--eval_only", metavar="FOLDER", help="score FOLDER/SEQUENCE/FRAME.png, anybody's")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--davis", help="folder of JPEGImages/480p, Annotations/480p and ImageSets/2017")
    source.add_argument("--video", metavar="FOLDER", help="frames of your own")
    option = p.add_argument
    option("--first_mask", metavar="PNG",
           help="of the first frame of --video: 0 background, 1, 2, ... objects; or 0 and 255")
    option("--split", default="val",
           help="list in ImageSets/2017; a sequence with one mask is propagated and not scored")
    option("--sequences", nargs="+", help="only these of the list")
    option("--overwrite", action="store_true", help="make masks anew, however those there were made")
    option("--overlay", action="store_true", help="also write frames with coloured masks, and an animation")
    option("--n_last_frames", type=run.at_least(0), default=7,
           help="frames of context besides the first, those just before (DINO: 7)")
    option("--size_mask_neighborhood", type=run.at_least(0), default=12,
           help="reach of the votes to each side, in tokens (DINO: 12); 0: the whole frame")
    option("--topk", type=count, default=5, help="context tokens that vote (DINO: 5)")
    option("--temp", type=run.above(0.0), default=0.1, help="of the votes, exp(cos / temp) (DINO: 0.1)")
    option("--size", type=count, default=480, help="short side of a resized frame (DINO: 480)")
    option("--size_multiple", type=count, default=64,
           help="the long side is floored to a multiple of it, in pixels; lower it with a small --size")
    option("--block", type=int, default=-1, help="block whose tokens are compared, from 1; -1: the last")
    shared = "checkpoint_key num_heads device precision json max_bad output_dir"
    run.add_shared(p, shared, output_dir="out/davis")
    args = p.parse_args(argv)

    for mode, idle in IDLE.items():
        if getattr(args, mode):
            run.refuse_idle(args, idle, f"--{mode}")
    if args.video and (args.eval_only or not args.first_mask):
        raise Mistake("give --video FOLDER with --first_mask PNG and --ckpt FILE; it is not scored")
    return args


if __name__ == "__main__":
    run.script(main, get_args)
