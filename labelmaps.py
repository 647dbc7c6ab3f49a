"""Segmentation sets: images with the class of each pixel, in the layouts in which they are published.

    train = Pairs("/data/VOCdevkit", "train")
    image, label = train.read(0)          # (3, H, W) uint8; (H, W) uint8 of 0 ... C-1 and 255

255 is never scored.  The layout is found by its folders.  Labels describe the pixels as they are stored, so
photos are not turned by their EXIF tag.

Samples(train, crop=512, seed=0) is an endless stream of augmented training crops: short side crop *
uniform(0.5, 2), a random crop, mirrored or not, photometric distortion.

Shapes: H x W pixels, C classes."""
import math
import os
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import generator_of, walk
from images import BadImage, read_image, read_numbers, resize_short
from run import Mistake
from scenes import VOC_NAMES, Coco, find_voc, read_voc_list

Array = np.ndarray

IGNORE = 255
VOC = ["background", *VOC_NAMES]
CITY_CLASSES = {                          # by their number in *_labelIds.png
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic_light",
    20: "traffic_sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}
LAYOUTS = {
    "ade20k": "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png, 0 = not scored",
    "cityscapes": "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, "
                  "gtFine/{train,val}/CITY/*_gtFine_label{TrainIds,Ids}.png",
    "voc": "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/{train,val}.txt}",
    "voc_aug": "as voc, with SegmentationClassAug/ and ImageSets/Segmentation/trainaug.txt",
    "coco": "{train,val}2017/*.jpg, annotations/instances_{train,val}2017.json",
    "pairs": "images/{train,val}/NAME.jpg, labels/{train,val}/NAME.png",
}
SIGNS = {                                 # what is there only in this layout
    "ImageSets/Segmentation": "voc",
    "VOC2012/ImageSets/Segmentation": "voc",
    "VOCdevkit/VOC2012/ImageSets/Segmentation": "voc",
    "leftImg8bit": "cityscapes",
    "annotations/training": "ade20k",
    "annotations/instances_train2017.json": "coco",
    "labels": "pairs",
}


# ------------------------------------------------- from the numbers of a file to classes
def table_of(numbers: Iterable[int]) -> Array:
    """(256,) uint8: the place of each number among some; all others are not scored."""
    table = np.full(256, IGNORE, np.uint8)
    for place, number in enumerate(numbers):
        table[number] = place
    return table


CLASSES_ALREADY = table_of(range(256))
ADE20K = table_of(range(1, 151))
CITY_IDS = table_of(CITY_CLASSES)


class Pair(NamedTuple):
    """An image, the file of its label, and the class that each of the 256 numbers in that file means."""
    image: Path
    label: Path
    table: Array = CLASSES_ALREADY


# ------------------------------------------------- layouts: (root, split, left_out) -> pairs
def find_layout(root: Path) -> str:
    """Raises Mistake where there is none."""
    for sign, layout in SIGNS.items():
        if os.path.exists(root / sign):
            return layout
    expected = "; ".join(f"{layout}: {text}" for layout, text in LAYOUTS.items())
    raise Mistake(f"--data {root}: none of the layouts is there; {expected}")


def images_in(folder: Path, left_out: Counter) -> list[Path]:
    """All images below a folder, in the order of their names; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return [Path(file) for file in sorted(walk(folder, left_out))]


def find_pairs(
    root: Path, split: str, left_out: Counter,
    labels: str = "labels", table: Array = CLASSES_ALREADY,
) -> list[Pair]:
    """Each image of a folder, nested or not, with the label of the same name in another folder."""
    images = root / "images" / split
    pairs = []
    for image in images_in(images, left_out):
        label = root / labels / split / image.relative_to(images)
        pairs.append(Pair(image, label.with_suffix(".png"), table))
    return pairs


def find_ade20k(root: Path, split: str, left_out: Counter) -> list[Pair]:
    folder = "training" if split == "train" else "validation"
    return find_pairs(root, folder, left_out, "annotations", ADE20K)


def find_cityscapes(root: Path, split: str, left_out: Counter) -> list[Pair]:
    """A label that was converted to *_labelTrainIds.png holds classes, and one that was not holds raw ids: a
    folder may have some of each."""
    ending = "_leftImg8bit.png"
    pairs = []
    for image in images_in(root / "leftImg8bit" / split, left_out):
        if not image.name.endswith(ending):
            left_out[f"images not named *{ending}"] += 1
            continue
        stem = image.name.removesuffix(ending) + "_gtFine_label"
        folder = root / "gtFine" / split / image.parent.name
        pair = Pair(image, folder / f"{stem}TrainIds.png")
        if not os.path.isfile(pair.label):
            pair = Pair(image, folder / f"{stem}Ids.png", CITY_IDS)
        pairs.append(pair)
    return pairs


def find_voc_pairs(root: Path, split: str, _left_out: Counter) -> list[Pair]:
    files = read_voc_list(find_voc(root), split)
    return [Pair(image, label) for image, label in files]


def find_voc_aug(root: Path, split: str, left_out: Counter) -> list[Pair]:
    """VOC with SBD's labels, for more training images than VOC has."""
    pairs = []
    chosen = "trainaug" if split == "train" else split
    for pair in find_voc_pairs(root, chosen, left_out):
        folder = pair.label.parent
        if folder.name == "SegmentationClass":                         # a list may name another
            folder = folder.with_name("SegmentationClassAug")
        pairs.append(pair._replace(label=folder / pair.label.name))
    return pairs


FINDERS = {
    "ade20k": find_ade20k,
    "cityscapes": find_cityscapes,
    "voc": find_voc_pairs,
    "voc_aug": find_voc_aug,
    "pairs": find_pairs,
}
CLASSES = {
    "ade20k": [str(number) for number in range(1, 151)],
    "cityscapes": list(CITY_CLASSES.values()),
    "voc": VOC,
    "voc_aug": VOC,
}


class CocoLabels(Coco):
    """COCO's objects painted into one label map per image."""

    def sort_annotations(self, annotations, images, categories, crowd):
        """As in Coco, with a category of their own for crowd regions."""
        for annotation in annotations:
            if annotation.get("iscrowd"):
                annotation["category_id"] = "crowd"
        categories = categories | {"crowd": {"name": "crowd"}}
        super().sort_annotations(annotations, images, categories, crowd=True)

    def label(self, i: int) -> Array:
        """(H, W) uint8: 0 = background, 1 ... 80 = the categories in the order of their ids.  Where objects
        overlap, the smaller is on top [D].  A crowd region lies below all objects and is not scored."""
        def area(named: tuple[str, Array]) -> float:
            name, mask = named
            return math.inf if name == "crowd" else mask.sum()

        image = self.images[i]
        label = np.zeros((image["height"], image["width"]), np.uint8)
        number = {name: k for k, name in enumerate(self.categories, start=1)}
        for name, mask in sorted(self.objects(i), key=area, reverse=True):
            label[mask] = number.get(name, IGNORE)
        return label


# ------------------------------------------------- one split of a set
class Pairs:
    """Images with labels.  classes: names of the C classes; num_classes: C, where the layout has no names.
    Raises Mistake for a layout that is not there, and for missing files."""

    def __init__(self, root: str | Path, split: str = "train", layout: str = "auto",
                 num_classes: int | None = None):
        root = Path(root)
        if not os.path.isdir(root):
            raise Mistake(f"--data {root}: no such folder")
        if layout == "auto":
            layout = find_layout(root)
        self.root = str(root)
        self.layout = layout
        self.coco = None
        if layout == "coco":
            self.coco = CocoLabels(root, f"{split}2017")
            self.left_out = self.coco.left_out
            self.pairs = [Pair(image, self.coco.path) for image in self.coco.files]
            self.classes = ["background", *self.coco.categories]
        else:
            self.left_out = Counter()
            self.pairs = FINDERS[layout](root, split, self.left_out)
            self.classes = CLASSES.get(layout) or [str(k) for k in range(num_classes or 0)]

        files = chain(*(pair[:2] for pair in self.pairs))
        lost = [file for file in files if not os.path.isfile(file)]
        if lost or not self.pairs:
            found = f"{len(lost)} files are missing, the first {lost[0]}" if lost else "no images"
            raise Mistake(f"{root}, {split}: {found}; expected {LAYOUTS[self.layout]}")

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return str(self.pairs[i].image)

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8, (H, W) uint8.  Raises BadImage, also where image and label differ in size, and for
        a number that is no class."""
        pair = self.pairs[i]
        image = read_image(pair.image, upright=False)
        size = tuple(image.shape[1:])
        numbers = self.coco.label(i) if self.coco else read_numbers(pair.label)
        if numbers.shape != size:
            raise BadImage(f"{pair.label}: shape {numbers.shape}, expected one number for each pixel, {size}")
        known = numbers.clip(0, 255)
        label = pair.table[known]
        limit = len(self.classes) or IGNORE
        wrong = (numbers != known) | ((label >= limit) & (label != IGNORE))
        if wrong.any():
            raise BadImage(f"{pair.label}: holds class {numbers[wrong].max()}, expected 0 ... {limit - 1} or "
                           f"{IGNORE}")
        return image, torch.from_numpy(label)


# ------------------------------------------------- training samples
def augment(image: Tensor, label: Tensor, crop: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A training sample: (3, crop, crop) uint8 and (crop, crop) uint8, padded with 0 and 255 where the image
    is smaller.  The same resize, crop and mirror for both; photometric distortion for the image."""
    scale, down, right, mirror, *colour = torch.rand(14, generator=g).tolist()
    short = round(crop * (0.5 + 1.5 * scale))
    image = resize_short(image, short, "bilinear")
    size = image.shape[1:]
    label = F.interpolate(label[None, None], size=size, mode="nearest-exact")[0]

    H = max(crop, size[0])
    W = max(crop, size[1])
    beyond = [0, W - size[1], 0, H - size[0]]
    image = F.pad(image, beyond)
    label = F.pad(label, beyond, value=IGNORE)
    both = torch.cat([image, label])                                   # (4, H, W)

    top = int(down * (H - crop + 1))
    left = int(right * (W - crop + 1))
    both = both[:, top:top + crop, left:left + crop]
    if mirror < 0.5:
        both = both.flip(-1)
    return distort(both[:3], colour), both[3].contiguous()


def distort(image: Tensor, draws: list[float]) -> Tensor:
    """SSD's photometric distortion, each with probability 1/2: brightness +-32 of 255, contrast 0.5 to 1.5
    before or after saturation 0.5 to 1.5 and hue +-0.05 turns.  image: uint8; draws: ten numbers from 0 to
    1."""
    from torchvision.transforms.v2 import functional as tvf
    if_bright, bright, contrast, if_contrast, order, if_saturated, saturation, if_hue, hue, _ = draws
    contrast = contrast + 0.5 if if_contrast < 0.5 else 1.0
    x = image.float() / 255
    if if_bright < 0.5:
        x = x + (2 * bright - 1) * 32 / 255
    if order < 0.5:
        x = x * contrast
    x = x.clamp(0, 1)
    if if_saturated < 0.5:
        x = tvf.adjust_saturation(x, saturation + 0.5)
    if if_hue < 0.5:
        x = tvf.adjust_hue(x, 0.1 * hue - 0.05)
    if order >= 0.5:
        x = x * contrast
    x = x.clamp(0, 1) * 255
    return x.round().byte()


class Samples(Dataset):
    """Sample n of an endless stream of training crops: pass after pass over the pairs, each in another order.
    All of it is drawn from (seed, n), so that no worker, rank or interruption changes it.

    A pair that cannot be read gives way to the next: "bad" is its number, or -1, and "fault" what is wrong
    with it.  Raises BadImage after 100 in a row."""

    def __init__(self, pairs: Pairs, crop: int, seed: int):
        self.pairs = pairs
        self.crop = crop
        self.seed = seed
        self.epoch = None                 # `order` is of this one

    def __getitem__(self, n: int) -> dict:
        total = len(self.pairs)
        epoch, place = divmod(n, total)
        if epoch != self.epoch:
            g = generator_of(self.seed, "order", epoch)
            self.order = torch.randperm(total, generator=g).tolist()
            self.epoch = epoch
        index = self.order[place]
        fault = ""
        for step in range(min(100, total)):
            try:
                image, label = self.pairs.read(self.order[(place + step) % total])
                break
            except BadImage as e:
                fault = fault or str(e)
        else:
            raise BadImage(f"{step + 1} pairs in a row cannot be read, the first: {fault}")
        image, label = augment(image, label, self.crop, generator_of(self.seed, "crop", n))
        return {
            "image": image,
            "label": label,
            "index": index,
            "bad": index if fault else -1,
            "fault": fault,
        }
