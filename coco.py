"""Images with object masks: COCO, PASCAL VOC and the toy world behind one interface, without pycocotools.

    scenes = Coco("/data/coco", "val2017")             # or Voc("/data/VOCdevkit"), or ToyScenes(200)
    image = scenes.read(0)                             # (3, H, W) uint8
    masks, names = scenes.masks(0)                     # (K, H, W) bool, one per object; their category names

A scene source is an image source of data.py (`len()`, `read(i)`, `name(i)`) with `masks(i)`, `categories`
(all names), `title`, and `left_out`, which counts the annotations that are no object, by the reason.  Masks
have the size that the annotation was made at, which may differ from the image file's.  They are the official
ones to the pixel: tests/test_zeroshot.py holds them against pycocotools.  Shapes: K objects, H x W pixels of
the annotation."""
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import BadImage, read_image
from toy import CLASSES, ToyImages

VOC_NAMES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
             "person pottedplant sheep sofa train tvmonitor").split()


# ------------------------------------------------- segmentations
def decode_counts(text: str | bytes) -> np.ndarray:
    """COCO's compressed run lengths: little-endian groups of 5 bits, each a character from '0' on whose bit
    32 says that more follow and whose bit 16, in a number's last, is the sign; from the fourth run on, the
    difference to the run before the last.  Raises ValueError for other characters, and an end within a
    number."""
    counts, value, shift = [], 0, 0
    for char in text.encode() if isinstance(text, str) else text:
        bits = char - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(char)!r} in compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= bool(bits & 16) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return np.array(counts, dtype=np.int64)


def rle_mask(rle: dict) -> np.ndarray:
    """{"size": [H, W], "counts": list or compressed text} -> (H, W) bool.  Runs go column by column, zeros
    first. Raises ValueError where they do not fill H x W exactly."""
    (h, w), counts = rle["size"], rle["counts"]
    counts = decode_counts(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != h * w:
        raise ValueError(f"run lengths cover {counts.sum()} pixels of {h}x{w}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(w, h).T


def polygon_mask(rings: list[list[float]], h: int, w: int) -> np.ndarray:
    """Rings [x0, y0, x1, y1, ...] in pixels -> (H, W) bool, the union of their insides.

    A pixel is inside where the ray from its centre upwards crosses the ring an odd number of times.  As in
    the official masks, corners are rounded to fifths of a pixel, and edges follow that finer grid: between
    its columns 5c + 2 and 5c + 3, where the centres of pixel column c lie, an edge counts at the upper of
    its two fine rows. A ring of two corners has no inside.  Raises ValueError for an odd number of
    coordinates."""
    mask = np.zeros((h, w), bool)
    for ring in rings:
        if len(ring) % 2:
            raise ValueError(f"polygon of {len(ring)} coordinates")
        start = (5 * np.array(ring, float).reshape(-1, 2) + 0.5).astype(np.int64)        # (n, 2) x, y
        delta = np.roll(start, -1, 0) - start
        steps = np.abs(delta).max(1, initial=0)                        # one per fine row or column, the more
        edge = np.repeat(np.arange(len(start)), steps)
        at = np.arange(len(edge)) - np.repeat(steps.cumsum() - steps, steps)
        n, d = steps[edge, None], delta[edge]
        a, b = (start[edge] + (2 * d * t[:, None] + n) // (2 * n) for t in (at, at + 1))    # rounded, half up
        left, top = np.minimum(a, b).T
        column, row = (left - 2) // 5, ((top + 2) // 5).clip(0, h)     # row: the first with its centre below
        crossed = (a[:, 0] != b[:, 0]) & (left % 5 == 2) & (column >= 0) & (column < w)
        if crossed.any():
            column, row = column[crossed], row[crossed]
            x, y = column.min(), row.min()                             # beyond the crossings all is outside
            flips = np.zeros((row.max() - y + 1, column.max() - x + 1), np.int32)
            np.add.at(flips, (row - y, column - x), 1)
            inside = flips[:-1].cumsum(0) % 2 == 1
            mask[y:y + len(inside), x:x + inside.shape[1]] |= inside
    return mask


def segmentation_mask(segmentation: list | dict, h: int, w: int) -> np.ndarray:
    """COCO's "segmentation" of either kind -> (H, W) bool.  Raises ValueError for what is none, or is
    broken."""
    try:
        return rle_mask(segmentation) if isinstance(segmentation, dict) else polygon_mask(segmentation, h, w)
    except (KeyError, TypeError, OverflowError) as e:
        raise ValueError(f"neither polygons nor run lengths ({type(e).__name__}: {e})") from e


# ------------------------------------------------- scene sources
class Scenes:
    """What the sources share: a subclass sets `files` and gives `objects(i)`, (mask (H, W), name) pairs."""

    def __init__(self, title: str, categories: list[str]):
        self.title, self.categories, self.left_out = title, categories, Counter()
        self.files: list[Path] = []

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """What the prompts of an image are seeded by: different for each of a set."""
        return self.files[i].name

    def read(self, i: int) -> Tensor:
        """(3, H, W) uint8.  Raises BadImage."""
        return read_image(self.files[i])

    def objects(self, i: int) -> Iterator[tuple[np.ndarray, str]]:
        raise NotImplementedError

    def masks(self, i: int) -> tuple[Tensor, list[str]]:
        """(K, H, W) bool and K category names.  Objects without a pixel are left out and counted; K may be
        0."""
        masks, names = [], []
        for mask, name in self.objects(i):
            if mask.any():
                masks, names = [*masks, mask], [*names, name]
            else:
                self.left_out["objects of zero area"] += 1
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 1, 1, dtype=torch.bool), names

    def keep(self, files: list[Path], limit: int | None) -> None:
        """The first `limit` files only.  Raises ValueError, with their number, if any is absent."""
        self.files = files[:limit]
        absent = [f for f in self.files if not f.is_file()]
        if absent or not self.files:
            raise ValueError(f"{self.title}: " + ("no image is listed" if not absent else
                             f"{len(absent)} of {len(self.files)} images are absent, such as {absent[0]}"))


class Coco(Scenes):
    """DIR/annotations/instances_SPLIT.json, with the images in DIR/SPLIT.  crowd: take crowd regions for
    objects. Raises ValueError for a file that is missing or not COCO's, for absent images, for broken
    annotations."""

    def __init__(self, root: str | Path, split: str = "val2017", crowd: bool = False,
                 limit: int | None = None):
        self.path, self.crowd = Path(root) / "annotations" / f"instances_{split}.json", crowd
        if not self.path.is_file():
            there = sorted(p.stem[10:] for p in self.path.parent.glob("instances_*.json"))
            raise ValueError(f"{self.path}: no such file; " + (f"--split can be {', '.join(there)}" if there
                             else "expected DIR/annotations/instances_SPLIT.json and DIR/SPLIT/"))
        try:
            content = json.loads(self.path.read_text())
        except ValueError as e:
            raise ValueError(f"{self.path}: not JSON ({e})") from e
        lacks = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
        if lacks:
            raise ValueError(f"{self.path}: not COCO's instances_*.json: lacks {', '.join(sorted(lacks))}")
        try:
            self.names = {c["id"]: c["name"] for c in content["categories"]}
            super().__init__(f"COCO {split}", [self.names[k] for k in sorted(self.names)])
            self.images, self.annotations = content["images"], defaultdict(list)
            files = [Path(root) / split / image["file_name"] for image in self.images]
            for a in content["annotations"]:
                self.annotations[a["image_id"]].append(a)
            unlisted = set(self.annotations) - {image["id"] for image in self.images}
        except (KeyError, TypeError) as e:
            raise ValueError(f"{self.path}: not COCO's layout ({type(e).__name__}: {e})") from e
        if unlisted:
            self.left_out["annotations of unlisted images"] = sum(len(self.annotations[k]) for k in unlisted)
        self.keep(files, limit)

    def name(self, i: int) -> str:
        return self.images[i]["file_name"]                             # may be in a folder

    def objects(self, i: int) -> Iterator[tuple[np.ndarray, str]]:
        image = self.images[i]
        for a in self.annotations[image["id"]]:
            if a.get("iscrowd") and not self.crowd:
                self.left_out["crowd regions"] += 1
                continue
            where = f"{self.path}: annotation {a.get('id')} of image {image['id']}"
            try:
                name, size = self.names[a["category_id"]], (image["height"], image["width"])
                segmentation = a["segmentation"]
            except KeyError as e:
                raise ValueError(f"{where}: lacks, or does not know, {e}") from e
            try:
                yield segmentation_mask(segmentation, *size), name
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from e


class Voc(Scenes):
    """VOC2012, or its parents: the images of ImageSets/Segmentation/SPLIT.txt.  An object of
    SegmentationObject has the class that most of its pixels have in SegmentationClass; without the former
    (SBD) a class counts as one object.  Void (255) belongs to nothing.  Raises ValueError for missing
    folders and absent images."""

    def __init__(self, root: str | Path, split: str = "val", limit: int | None = None):
        super().__init__(f"VOC {split}", VOC_NAMES)
        roots = [Path(root) / below for below in (".", "VOC2012", "VOCdevkit/VOC2012")]
        self.root = next((r for r in roots if (r / "ImageSets/Segmentation").is_dir()), None)
        if self.root is None:
            raise ValueError(f"{root}: no PASCAL VOC: expected ImageSets/Segmentation, JPEGImages, "
                             "SegmentationClass")
        listed = self.root / "ImageSets/Segmentation" / f"{split}.txt"
        if not listed.is_file():
            there = sorted(p.stem for p in listed.parent.glob("*.txt"))
            raise ValueError(f"{listed}: no such file; --split can be {', '.join(there)}")
        self.keep([self.root / "JPEGImages" / f"{name}.jpg" for name in listed.read_text().split()], limit)

    def objects(self, i: int) -> Iterator[tuple[np.ndarray, str]]:
        path = self.root / "SegmentationClass" / f"{self.files[i].stem}.png"
        classes, objects = read_numbers(path), self.root / "SegmentationObject" / path.name
        instances = read_numbers(objects) if objects.is_file() else classes
        if instances.shape != classes.shape:
            raise ValueError(f"{objects}: {instances.shape} pixels, {path}: {classes.shape}")
        for k in np.setdiff1d(instances, (0, 255)):
            mask = (instances == k) & (classes > 0) & (classes < 255)
            kind = int(np.bincount(classes[mask], minlength=1).argmax())
            if kind > len(VOC_NAMES):
                raise ValueError(f"{path}: class {kind}; VOC has 1 to {len(VOC_NAMES)}")
            yield mask, VOC_NAMES[kind - 1]


class ToyScenes(Scenes):
    """n scenes of the toy world: exact truth, nothing to download."""

    def __init__(self, n: int = 200, split: str = "val", size: int = 64, seed: int = 0):
        super().__init__(f"toy {split}", list(CLASSES))
        self.images = ToyImages(split, n, size, seed)
        self.read, self.name = self.images.read, self.images.name

    def __len__(self) -> int:
        return len(self.images)

    def objects(self, i: int) -> Iterator[tuple[np.ndarray, str]]:
        s = self.images.scene(i)
        for k, kind in enumerate(s.categories, start=1):
            yield s.instances == k, CLASSES[kind]


def read_numbers(path: Path) -> np.ndarray:
    """A palette or grey PNG of class or object numbers -> (H, W) uint8.  Raises BadImage."""
    try:
        with Image.open(path) as image:
            numbers = np.array(image)
    except Exception as e:                                             # as in data.read_image
        raise BadImage(f"{path}: not a readable mask ({type(e).__name__})") from e
    if numbers.ndim != 2:
        raise BadImage(f"{path}: has colours; expected a palette or grey PNG of numbers")
    return numbers
