"""Images with object masks: COCO, PASCAL VOC and the toy world behind one interface, without pycocotools.

    scenes = Coco("/data/coco", "val2017")             # or Voc("/data/VOCdevkit"), or ToyScenes(ToyImages())
    image = scenes.read(0)                             # (3, H, W) uint8
    for category, mask in scenes.objects(0):           # "dog", (H, W) bool: one object at a time
        ...

A scene source has `len()`, `read(i)`, `name(i)` and `about` as every image source (data.py), and besides
`objects(i)`, `categories` (the names of all), `title`, and `left_out`, which counts what is no object by the
reason.  Masks describe the pixels as they are stored, so photos are not turned by their EXIF tag.  A mask has
the size that its annotation was made at, which may be another than the file's.

Masks equal the official ones to the pixel; the tests hold them against pycocotools.

Shapes: H x W pixels of the annotation, n corners of a polygon."""
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import ToyImages, described, read_text
from images import MAX_PIXELS, read_image, read_numbers
from run import Mistake
from toy import CLASSES

Array = np.ndarray
VOC_NAMES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
             "person pottedplant sheep sofa train tvmonitor").split()
VOC_VOID = 255
COCO_FIELDS = {"images": {"id", "file_name"}, "annotations": {"image_id"}, "categories": {"id", "name"}}
FINE = 5                                       # COCO's polygons are drawn in fifths of a pixel
FARTHEST = 1e12                                # a corner beyond it is no coordinate


# ------------------------------------------------- run lengths
def decode_counts(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths.

    A number is written in groups of 5 bits, the lowest first, each as a character from '0' on.  Bit 32 says
    that another group follows, and bit 16 of the last group is the sign.  From the fourth run on, the number
    is the difference to the run before the last.  Raises ValueError for any other text."""
    if isinstance(text, str):
        text = text.encode()
    counts = []
    value = 0
    shift = 0
    for char in text:
        bits = char - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(char)!r} in compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return counts


def rle_mask(rle: dict) -> Array:
    """{"size": [H, W], "counts": list or compressed text} -> (H, W) bool.  Runs go down the columns, zeros
    first.  Raises ValueError where they do not fill H x W exactly."""
    h, w = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = decode_counts(counts)
    try:
        counts = np.array(counts, dtype=np.int64)
    except (TypeError, OverflowError) as e:
        raise ValueError(f"run lengths are no whole numbers ({e})") from e
    if (counts < 0).any() or counts.sum() != h * w:
        raise ValueError(f"run lengths cover {counts.sum()} pixels of {h}x{w}")
    is_object = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_object, counts).reshape(w, h).T


# ------------------------------------------------- polygons
def cut(corners: Array, axis: int, sign: int, limit: float) -> Array:
    """The part of a polygon (n, 2) where sign * coordinate <= limit (Sutherland and Hodgman 1974)."""
    depth = limit - sign * corners[:, axis]
    if (depth >= 0).all():
        return corners
    kept = []
    for i in range(len(corners)):
        if (depth[i - 1] >= 0) != (depth[i] >= 0):
            share = depth[i - 1] / (depth[i - 1] - depth[i])
            kept.append(corners[i - 1] + share * (corners[i] - corners[i - 1]))
        if depth[i] >= 0:
            kept.append(corners[i])
    return np.array(kept).reshape(-1, 2)


def crossings(corners: Array) -> tuple[Array, Array]:
    """Where the edges of a ring (n, 2) cross the middle of a pixel column: the columns, and for each crossing
    the first row whose centre is below.

    Corners are rounded to fine columns and rows, FINE to a pixel, and an edge follows these.  The middle of
    pixel column c lies between the fine columns 5c + 2 and 5c + 3; an edge counts there at the upper of its
    two fine rows."""
    start = (FINE * corners + 0.5).astype(np.int64)
    delta = np.roll(start, -1, axis=0) - start
    steps = np.abs(delta).max(axis=1, initial=0)
    edge = np.repeat(np.arange(len(start)), steps)
    first = steps.cumsum() - steps
    step = np.arange(len(edge)) - first[edge]                          # 0, 1, ... along each edge
    steps = steps[edge, None]

    def point(step):
        return start[edge] + (2 * delta[edge] * step[:, None] + steps) // (2 * steps)

    a = point(step)
    b = point(step + 1)
    left, top = np.minimum(a, b).T
    crosses = (a[:, 0] != b[:, 0]) & (left % FINE == 2)
    return (left[crosses] - 2) // FINE, (top[crosses] + 2) // FINE


def polygon_mask(rings: list[list[float]], h: int, w: int) -> Array:
    """Rings [x0, y0, x1, y1, ...] in pixels -> (H, W) bool, the union of their insides.

    A pixel is inside where the ray from its centre upwards crosses the ring an odd number of times; a ring of
    two corners has no inside.  What is farther outside than the image is wide or high is cut off first, so
    that a wild corner costs nothing.  Raises ValueError for a ring that is none."""
    mask = np.zeros((h, w), bool)
    for ring in rings:
        if len(ring) % 2:
            raise ValueError(f"polygon of {len(ring)} coordinates")
        corners = np.array(ring, float).reshape(-1, 2)
        if not (np.abs(corners) < FARTHEST).all():                     # true for NaN, too
            raise ValueError("polygon with a corner that is no number, or infinite")
        for axis, length in ((0, w), (1, h)):
            corners = cut(corners, axis, 1, 2 * length)
            corners = cut(corners, axis, -1, length)
        column, row = crossings(corners)
        seen = (column >= 0) & (column < w)
        if not seen.any():
            continue
        column = column[seen]
        row = row[seen].clip(0, h)
        x = column.min()
        y = row.min()
        odd = np.zeros((row.max() - y + 1, column.max() - x + 1), bool)
        np.logical_xor.at(odd, (row - y, column - x), True)
        inside = np.logical_xor.accumulate(odd[:-1], axis=0)
        height, width = inside.shape
        mask[y:y + height, x:x + width] |= inside
    return mask


def segmentation_mask(segmentation: list | dict, h: int, w: int) -> Array:
    """COCO's "segmentation" of either kind -> (H, W) bool.  One polygon may stand without the list around it.
    Raises ValueError for what is no segmentation, or is broken."""
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if segmentation["size"] != [h, w]:
            raise ValueError(f"run lengths of size {segmentation['size']} in an image of {[h, w]}")
        return rle_mask(segmentation)
    rings = segmentation if isinstance(segmentation, list) else [None]
    is_ring = [isinstance(ring, list) for ring in rings]
    if len(rings) > 4 and not any(is_ring):                            # four numbers are a box
        return polygon_mask([rings], h, w)
    if not all(is_ring):
        raise ValueError("neither polygons nor run lengths (size and counts)")
    return polygon_mask(rings, h, w)


# ------------------------------------------------- sources
class Scenes:
    """What the sources share.  A subclass gives `objects(i)` and sets `files`, if it has any."""

    def __init__(self, title: str, categories: list[str]):
        self.title = title
        self.categories = categories
        self.left_out = Counter()
        self.files = []

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """By it the prompts of an image are seeded: another for each image of a set."""
        return self.files[i].name

    def read(self, i: int) -> Tensor:
        """(3, H, W) uint8.  Raises BadImage."""
        return read_image(self.files[i], upright=False)

    def objects(self, i: int) -> Iterator[tuple[str, Array]]:
        """The category and the mask (H, W) bool of each object; a mask may be empty."""
        raise NotImplementedError

    def classes(self, i: int) -> dict[str, Array]:
        """{category: the union of its objects, (H, W) bool}, sorted by name."""
        unions = {}
        for category, mask in self.objects(i):
            if mask.any():
                unions[category] = unions.get(category, False) | mask
        return dict(sorted(unions.items()))

    @property
    def about(self) -> str:
        return f"{self.title}: {described(len(self), self.categories, self.left_out)}"

    def set_files(self, files: list[Path]) -> None:
        """Raises Mistake where there are none, or some are not on this disk."""
        self.files = files
        absent = [file for file in files if not os.path.isfile(file)]
        if not files:
            raise Mistake(f"{self.title}: no image is listed")
        if absent:
            raise Mistake(f"{self.title}: {len(absent)} of {len(files)} images are absent, such as "
                          f"{absent[0]}")


def check_sides(name: str, image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Raises Mistake where a mask (H, W) has not the form of its image; a copy of another size may round."""
    H, W = image
    h, w = mask
    if abs(H * w - W * h) > H + W + h + w:
        raise Mistake(f"{name}: the image is stored as {W} x {H} pixels, its masks are {w} x {h}: were they "
                      "drawn after a turn by EXIF? Turn the stored pixels, or the masks")


def patch_cover(mask: Tensor, h: int, w: int, overlap: float = 1.0) -> Tensor:
    """(..., H, W) bool -> (..., h*w): which share of each of the h x w windows of the stretched mask is
    covered, exactly.  overlap: side of a window in strides (patch size / stride)."""
    rows = shares(h, mask.shape[-2], overlap)
    columns = shares(w, mask.shape[-1], overlap)
    return (rows @ mask.float() @ columns.T).flatten(-2)


def shares(windows: int, pixels: int, overlap: float) -> Tensor:
    """(windows, pixels): which share of a window each pixel fills, along one side."""
    step = pixels / (windows - 1 + overlap)
    size = overlap * step
    start = torch.arange(windows)[:, None] * step
    pixel = torch.arange(pixels)
    begin = torch.maximum(start, pixel)
    end = torch.minimum(start + size, pixel + 1)
    return (end - begin).clamp(0) / size


def majority(cover: Tensor) -> Tensor:
    """At least half, with room for rounding."""
    return cover >= 0.5 - 1e-5


# ------------------------------------------------- COCO
class Coco(Scenes):
    """DIR/annotations/instances_SPLIT.json with the images in DIR/SPLIT.  crowd: crowd regions are objects,
    too.  Raises Mistake for files that are missing, not COCO's, or broken."""

    def __init__(
        self, root: str | Path, split: str = "val2017",
        crowd: bool = False, limit: int | None = None,
    ):
        self.path = Path(root) / "annotations" / f"instances_{split}.json"
        content = read_coco(self.path)
        categories = by_id(self.path, content["categories"], "name")
        images = by_id(self.path, content["images"], "file_name")
        super().__init__(f"COCO {split}", [categories[k]["name"] for k in sorted(categories)])
        self.images = list(images.values())[:limit]
        self.set_files([Path(root) / split / image["file_name"] for image in self.images])
        self.annotations = {same_id(image["id"]): [] for image in self.images}
        self.sort_annotations(content["annotations"], images, categories, crowd)

    def sort_annotations(self, annotations: list, images: dict, categories: dict, crowd: bool) -> None:
        """Keep those that are objects of our images, each with its category's name."""
        boxes = []
        for a in annotations:
            image_id = same_id(a["image_id"])
            category = same_id(a.get("category_id"))
            where = f"annotation {a.get('id')} of image {image_id}"
            if image_id not in images:
                self.left_out["annotations of unlisted images"] += 1
            elif image_id not in self.annotations:                     # beyond the limit
                continue
            elif a.get("iscrowd") and not crowd:
                self.left_out["crowd regions"] += 1
            elif not a.get("segmentation"):
                self.left_out["boxes without a mask"] += 1
                boxes.append(where)
            elif category not in categories:
                raise Mistake(f"{self.path}: {where}: lacks, or does not know, {category}")
            else:
                name = categories[category]["name"]
                self.annotations[image_id].append((name, where, a["segmentation"]))
        if boxes and not any(self.annotations.values()):
            raise Mistake(f"{self.path}: {len(boxes)} objects have a box and no mask, such as {boxes[0]}: it "
                          "lacks a segmentation, which is needed here")
        if annotations and self.left_out["annotations of unlisted images"] == len(annotations):
            raise Mistake(f"{self.path}: no annotation belongs to a listed image: image_id is such as "
                          f"{annotations[0]['image_id']!r}, the images' id such as {self.images[0]['id']!r}")

    def name(self, i: int) -> str:
        return self.images[i]["file_name"]                             # may name a folder, too

    def objects(self, i: int) -> Iterator[tuple[str, Array]]:
        image = self.images[i]
        h = image.get("height")
        w = image.get("width")
        if not (isinstance(h, int) and isinstance(w, int) and 0 < h * w <= MAX_PIXELS):
            raise Mistake(f"{self.path}: image {image['id']} has height {h!r} and width {w!r}")
        for name, where, segmentation in self.annotations[same_id(image["id"])]:
            try:
                mask = segmentation_mask(segmentation, h, w)
            except ValueError as e:
                raise Mistake(f"{self.path}: {where}: {e}") from e
            yield name, mask


def read_coco(path: Path) -> dict:
    """The content of an annotation file.  Raises Mistake."""
    if not os.path.exists(path):
        splits = sorted(found.stem[len("instances_"):] for found in path.parent.glob("instances_*.json"))
        hint = "expected DIR/annotations/instances_SPLIT.json and DIR/SPLIT/"
        if splits:
            hint = f"--split can be {', '.join(splits)}"
        raise Mistake(f"{path}: no such file; {hint}")
    try:
        content = json.loads(path.read_bytes())                        # UTF-8 or -16, with a mark or without
    except OSError as e:
        raise Mistake(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise Mistake(f"{path}: not JSON ({e})") from e
    lacks = COCO_FIELDS.keys() - (content if isinstance(content, dict) else {})
    if lacks:
        raise Mistake(f"{path}: not COCO's instances_*.json: lacks {', '.join(sorted(lacks))}")
    for part, needed in COCO_FIELDS.items():
        for entry in content[part]:
            if not isinstance(entry, dict) or not needed <= entry.keys():
                raise Mistake(f"{path}: not COCO's layout: {part} need {', '.join(sorted(needed))}, found "
                              f"{str(entry)[:80]}")
    return content


def same_id(given):
    """Some programs write the number of an id as text, here or there."""
    return int(given) if str(given).isdecimal() else given


def by_id(path: Path, entries: list[dict], title: str) -> dict:
    """{id: entry}.  Raises Mistake where two entries share an id, or objects would go to both."""
    found = {}
    for entry in entries:
        key = same_id(entry["id"])
        if key in found:
            raise Mistake(f"{path}: id {key} belongs to {found[key][title]} and to {entry[title]}: were sets "
                          "joined without new ids?")
        found[key] = entry
    return found


# ------------------------------------------------- PASCAL VOC
class Voc(Scenes):
    """VOC2012, or its parents: the images of ImageSets/Segmentation/SPLIT.txt.

    An object of SegmentationObject has the class that most of its pixels have in SegmentationClass; without
    the former (SBD, or a list that names its masks) a class counts as one object.  Void belongs to nothing.
    Raises Mistake for missing folders and absent images."""

    def __init__(self, root: str | Path, split: str = "val", limit: int | None = None):
        super().__init__(f"VOC {split}", VOC_NAMES)
        pairs = read_voc_list(find_voc(root), split)[:limit]
        self.class_masks = [mask for _, mask in pairs]
        self.set_files([image for image, _ in pairs])

    def objects(self, i: int) -> Iterator[tuple[str, Array]]:
        path = self.class_masks[i]
        classes = read_numbers(path)
        objects_path = path.parent.with_name("SegmentationObject") / path.name
        instances = classes
        if path.parent.name == "SegmentationClass" and objects_path.is_file():
            instances = read_numbers(objects_path)
        if instances.shape != classes.shape:
            raise Mistake(f"{objects_path}: {instances.shape} pixels, {path}: {classes.shape}")
        for number in np.setdiff1d(instances, (0, VOC_VOID)):
            mask = (instances == number) & (classes > 0) & (classes != VOC_VOID)
            most = int(np.bincount(classes[mask], minlength=1).argmax())
            if most > len(VOC_NAMES):
                raise Mistake(f"{path}: class {most}; VOC has 1 to {len(VOC_NAMES)}")
            yield VOC_NAMES[most - 1], mask


def find_voc(root: str | Path) -> Path:
    """The folder that holds ImageSets/Segmentation: `root`, or below it.  Raises Mistake."""
    for below in (".", "VOC2012", "VOCdevkit/VOC2012"):
        if os.path.isdir(Path(root) / below / "ImageSets/Segmentation"):
            return Path(root) / below
    raise Mistake(f"{root}: no PASCAL VOC: expected ImageSets/Segmentation, JPEGImages, SegmentationClass")


def read_voc_list(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (image, class mask) files of ImageSets/Segmentation/SPLIT.txt.  A line is a name, or two paths
    below the root, as DeepLab's lists have them.  Raises Mistake."""
    path = root / "ImageSets/Segmentation" / f"{split}.txt"
    if not os.path.exists(path):
        there = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise Mistake(f"{path}: no such file; --split can be {', '.join(there)}")
    pairs = []
    for line in read_text(path, f"{path}: cannot be read").splitlines():
        match line.split():
            case [name]:
                image = f"JPEGImages/{name}.jpg"
                mask = f"SegmentationClass/{name}.png"
            case [image, mask]:
                pass
            case []:
                continue
            case _:
                raise Mistake(f"{path}: {line!r}: expected a name, or the paths of an image and its mask")
        pairs.append((root / image.lstrip("/"), root / mask.lstrip("/")))
    return pairs


# ------------------------------------------------- the toy world
class ToyScenes(Scenes):
    """The first n scenes of the toy world's images: exact truth, nothing to download."""

    def __init__(self, images: ToyImages, n: int | None = None):
        super().__init__(f"toy {images.split}", list(CLASSES))
        self.images = images
        self.files = range(len(images))[:n]                            # drawn, and not read
        self.read = images.read
        self.name = images.name

    def objects(self, i: int) -> Iterator[tuple[str, Array]]:
        scene = self.images.scene(i)
        for number, category in enumerate(scene.categories, start=1):
            yield CLASSES[category], scene.instances == number
