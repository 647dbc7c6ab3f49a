"""Videos with object masks, DAVIS-2017's or your own: find, read, and score by J&F.

J is how well masks overlap, F how well their contours meet, as in the official evaluation.  Departs from the
official code: decay is right beyond 255 frames (there an index overflows), and object numbers may have gaps.
What is not there, or is no mask of object numbers, is a Mistake.

Shapes: H x W pixels, T scored frames."""
import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import counted, read_text, walk
from figure import Array, voc_palette
from images import BadImage, Unreadable, read_image, read_numbers
from run import Mistake, plural, writing

Numbers = dict[str, float]                     # the seven of the official evaluation, by NAMES
NAMES = ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
MAX_OBJECT = 64                                # larger numbers in a mask are shades of grey
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")


def few(names: list) -> str:
    """Up to eight names for a message, and how many there are."""
    shown = ", ".join(map(str, names[:8]))
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)})"


@dataclass
class Clip:
    """A video: its frames, the masks of the annotated ones, and the first of these, (H, W) uint8."""
    name: str
    frames: list[Path]
    masks: list[Path]
    first: Array

    def about(self) -> str:
        return f"{plural(len(self.frames), 'frame')}, {plural(self.objects(), 'object')}"

    def objects(self) -> int:
        return len(object_numbers(self.first))


def described(where: str, clips: list[Clip], left_out: Counter) -> str:
    """The source's line: what there is, and what is left out by suffix."""
    frames = sum(len(clip.frames) for clip in clips)
    objects = sum(clip.objects() for clip in clips)
    return (f"{where}: {plural(len(clips), 'sequence')}, {plural(frames, 'frame')}, "
            f"{plural(objects, 'object')}; left out: {counted(left_out) or 'nothing'}")


def images_in(folder: Path, left_out: Counter) -> list[Path]:
    """The images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg."""
    def order(path):
        parts = re.split(r"(\d+)", path.stem)                          # text, number, text, ..., text
        parts[1::2] = map(int, parts[1::2])
        return parts, path.name
    paths = map(Path, walk(folder, left_out, only=set()))
    return sorted(paths, key=order)


def find_clips(args, left_out: Counter) -> list[Clip]:
    """The videos that the options name; files that are no images are counted.  Raises Mistake."""
    if args.video:
        folder = Path(args.video).resolve()
        mask = Path(args.first_mask).resolve()
        if os.path.isfile(folder):
            raise Mistake(f"{folder} is a file; make a folder: ffmpeg -i {folder.name} frames/%05d.jpg")
        frames = [path for path in images_in(folder, left_out) if path.resolve() != mask]
        clip = open_clip(folder, frames, [mask])
        numbers = object_numbers(read_numbers(mask))
        if 255 in numbers and len(numbers) > 1:
            raise Mistake(f"{mask}: has 255 beside {few(numbers[:-1])}: expected 1, 2, ... for objects, or "
                          "255 for one; were they made by a JPEG?")
        return [clip]

    root = Path(args.davis)
    clips = []
    for name in sequences(root / f"ImageSets/2017/{args.split}.txt", args.sequences):
        frame_folder = root / "JPEGImages/480p" / name
        mask_folder = root / "Annotations/480p" / name
        masks = images_in(mask_folder, left_out)
        if not masks:
            raise Mistake(f"{mask_folder}: no mask there, but {args.split}.txt lists it")
        frames = masks                                                 # enough to score what others made
        if args.ckpt or args.overlay:
            frames = images_in(frame_folder, left_out)
        clip = open_clip(frame_folder, frames, masks)
        if frames[0].stem != masks[0].stem:
            raise Mistake(f"{frames[0]}: the first frame has no mask, only {masks[0].name}")
        clips.append(clip)
    return clips


def sequences(listing: Path, chosen: list[str] | None) -> list[str]:
    """The names in a list of ImageSets, or those of them that are chosen.  Raises Mistake."""
    expected = "no such list; --davis holds JPEGImages, Annotations and ImageSets"
    names = read_text(listing, f"{listing}: {expected}").split()
    unknown = sorted(set(chosen or []) - set(names))
    if unknown or not names:
        raise Mistake(f"{listing}: does not list {few(unknown) or 'any sequence'}")
    return list(dict.fromkeys(chosen or names))


def open_clip(folder: Path, frames: list[Path], masks: list[Path]) -> Clip:
    """A clip with its first mask.  Raises Mistake for no frame, two of a name, no object, another size."""
    if not frames:
        raise Mistake(f"{folder}: no images there")
    if len({path.stem for path in frames}) < len(frames):
        raise Mistake(f"{folder}: two images of one name, such as 1.jpg and 1.png; keep one of them")
    first = read_mask(masks[0])
    if not first.any():
        raise Mistake(f"{masks[0]}: 0 objects; expected 0 for the background, other numbers for the objects")
    clip = Clip(folder.name, frames, masks, first)
    check_size(frames[0], read_image(frames[0], upright=False), clip)
    return clip


def check_size(path: Path, frame: Tensor, clip: Clip) -> None:
    """Raises Mistake for a frame of another size than the first mask."""
    size = tuple(frame.shape[1:])
    if size != clip.first.shape:
        raise Mistake(f"{path}: height and width {size}, {clip.masks[0]} has {clip.first.shape}")


def read_frames(clip: Clip, unreadable: Unreadable) -> Iterator[Tensor]:
    """The frames, one at a time, with a progress bar.  One that cannot be read is noted, and the frame before
    it comes again.  Raises Mistake where there is none before, and for another size than the first mask's."""
    frame = None
    for path in tqdm(clip.frames, desc=clip.name, unit="frame", leave=False, disable=None):
        try:
            frame = read_image(path, upright=False)
        except BadImage:
            if frame is None:
                raise
            unreadable.note(path)
        check_size(path, frame, clip)
        yield frame


def read_mask(path: Path, binary: bool | None = None) -> Array:
    """A mask of object numbers -> (H, W) uint8.

    255 is object 1 if `binary`, else void, which is 0; by default it is object 1 if there is no other.
    Raises BadImage for values that are no object numbers: shades of grey of soft edges or of a JPEG."""
    mask = read_numbers(path)
    strange = ((mask < 0) | (mask > MAX_OBJECT)) & (mask != 255)
    blurred = path.suffix.lower() in LOSSY and len(np.unique(mask)) > 2
    if strange.any() or blurred:
        found = np.unique(mask).tolist()
        raise BadImage(f"{path}: has {len(found)} different values, {few(found)}; expected 0 for the "
                       f"background and 1 to {MAX_OBJECT} for objects, or 0 and 255 for one: save it as PNG, "
                       "without soft edges")
    if binary is None:
        binary = not ((mask > 0) & (mask < 255)).any()
    return np.where(mask == 255, int(binary), mask).astype(np.uint8)


def object_numbers(mask: Array) -> list[int]:
    """The numbers in a mask (H, W) uint8, without the background's."""
    return np.setdiff1d(mask, 0).tolist()


def write_overlay(clip: Clip, folder: Path, out: Path) -> None:
    """Frames with coloured masks in out/NAME/FRAME.jpg, and out/NAME.webp, an animation of 150 at most."""
    colours = np.array(voc_palette()).reshape(-1, 3)
    step = math.ceil(len(clip.frames) / 150)
    shown = []
    with writing(out):
        (out / clip.name).mkdir(parents=True, exist_ok=True)
        frames = read_frames(clip, Unreadable(len(clip.frames), max_bad=1))
        for i, frame in enumerate(frames):
            name = clip.frames[i].stem
            mask = read_mask(folder / f"{name}.png")
            photo = frame.permute(1, 2, 0).numpy()
            painted = photo * 0.5 + colours[mask] * 0.8
            picture = np.where(mask[..., None], painted.clip(0, 255), photo)
            picture[boundary(mask)] = 255
            image = Image.fromarray(picture.astype(np.uint8))
            image.save(out / clip.name / f"{name}.jpg", quality=90)
            if i % step == 0:
                image.thumbnail((480, 480))
                shown.append(image)
        animation = out / f"{clip.name}.webp"
        shown[0].save(
            animation, save_all=True, append_images=shown[1:],
            duration=42 * step, loop=0,
        )


# ------------------------------------------------- two masks
def jaccard(mask: Array, truth: Array) -> float:
    """J: intersection over union of two (H, W) bool masks; 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    if not union:
        return 1.0
    return np.count_nonzero(mask & truth) / union


def boundary(mask: Array) -> Array:
    """Contours of (H, W) bools or numbers: where the right, lower or lower right neighbour differs."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right = mask != padded[:-1, 1:]
    lower = mask != padded[1:, :-1]
    return right | lower | (mask != padded[1:, 1:])


def boundary_f(mask: Array, truth: Array) -> float:
    """F of two (H, W) bool masks: harmonic mean of the shares of each contour within ceil(0.008 * diagonal)
    pixels of the other; 1 if neither has a contour, 0 if one has none."""
    from scipy.spatial import cKDTree
    radius = math.ceil(0.008 * math.hypot(*mask.shape))                # 8 at 854x480
    ours = np.argwhere(boundary(mask))
    theirs = np.argwhere(boundary(truth))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    # The nearest of the other contour, by a search tree: the same as dilation by a disk, and sooner.
    to_theirs, _ = cKDTree(theirs).query(ours, distance_upper_bound=radius + 1)
    to_ours, _ = cKDTree(ours).query(theirs, distance_upper_bound=radius + 1)
    precision = (to_theirs <= radius).mean()
    recall = (to_ours <= radius).mean()
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


# ------------------------------------------------- one object of a video
def statistics(values: Array) -> tuple[float, float, float]:
    """Of (T,) frames: mean; recall = share above 0.5; decay = mean of the first quarter minus the last's.
    Neighbouring quarters share a frame, as in the official code."""
    edges = np.linspace(1, len(values), 5) + 1e-10
    edges = np.round(edges).astype(int) - 1
    first_quarter = values[:edges[1] + 1]
    last_quarter = values[edges[3]:]
    recall = (values > 0.5).mean()
    return values.mean(), recall, first_quarter.mean() - last_quarter.mean()


def summary(j: Array, f: Array) -> Numbers:
    """The seven official numbers of an object, as fractions, from its (T,) J and F."""
    overlap = statistics(j)
    contour = statistics(f)
    mean = (overlap[0] + contour[0]) / 2
    numbers = map(float, [mean, *overlap, *contour])
    return dict(zip(NAMES, numbers, strict=True))


def mean_of(rows: Iterable[Numbers]) -> Numbers:
    """The mean of each of the seven numbers."""
    rows = list(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES}


# ------------------------------------------------- all objects of a video
def score(name: str, truth: list[Path], folder: Path) -> dict[str, Numbers]:
    """Score the PNGs in `folder` against all annotations of a sequence but for the first and the last.

    Returns {"judo_1": the seven numbers, ...} of the objects of the first annotation.  Raises Mistake for
    missing frames and for other sizes."""
    binary = not read_mask(truth[0], binary=False).any()               # DAVIS-2016: 0 and 255
    objects = object_numbers(read_mask(truth[0], binary))
    scored = truth[1:-1]
    missing = [p.name for p in scored if not (folder / p.name).is_file()]
    if missing:
        raise Mistake(f"{folder}: {len(missing)} of {len(scored)} frames are missing: {few(missing)}")

    scores = {number: [] for number in objects}                        # (T, 2): J and F
    for path in scored:
        true = read_mask(path, binary)
        mask = read_mask(folder / path.name)
        if true.shape != mask.shape:
            raise Mistake(f"{folder / path.name}: height and width {mask.shape}, its truth {true.shape}")
        for number in objects:
            pair = (mask == number, true == number)
            scores[number].append([jaccard(*pair), boundary_f(*pair)])
    return {f"{name}_{number}": summary(*np.array(found).T) for number, found in scores.items()}


def write_tables(out: Path, split: str, scored: dict[str, dict[str, Numbers]]) -> dict[str, dict]:
    """Write the official tables, as fractions, and return them: {table: {row: the seven numbers}}.

    scored: {sequence: {object: the seven numbers}}."""
    objects = {}
    for rows in scored.values():
        objects |= rows
    tables = {
        "global": {split: mean_of(objects.values())},
        "per-object": objects,
        "per-sequence": {name: mean_of(rows.values()) for name, rows in scored.items()},
    }
    for kind, rows in tables.items():
        path = out / f"{kind}_results-{split}.csv"
        with writing(path), open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
            table = csv.writer(f)
            table.writerow(["Name", *NAMES])
            for name, row in rows.items():
                values = [f"{row[key]:.5f}" for key in NAMES]
                table.writerow([name, *values])
    return tables
