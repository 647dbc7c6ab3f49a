"""Images: read any file, find them in any folder, feed them to the ranks in an order that can be repeated.

    --data DIR   any folder: flat or nested, with class folders or not; DIR/train and DIR/val if they exist
    --data toy   the generated world of toy.py
    --data pets  cifar10, cifar100, stl10, flowers102, pets, cars, aircraft, through torchvision (--download)

An image source is anything with `len()`, `read(i)` -> (3, H, W) uint8, `name(i)`, `labels` (or None) and
`classes`. Everything random about a training image comes from a generator of its own, seeded by (seed, epoch,
index): it does not depend on the worker, the rank or the batch.  A file that cannot be read is replaced by
the next one that can."""
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import distributed
from toy import ToyImages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 178_956_970                       # Pillow's own limit for a decompression bomb


class BadImage(ValueError):
    """A file that is not a readable image; the message names it."""


def seed_of(*parts) -> int:
    """A 63-bit seed from any printable parts, the same on every machine:
    seed_of(0, 'epoch', 3) != seed_of(0, 3)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator_of(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; on CUDA without waiting for the copy, which is not safe elsewhere (MPS)."""
    return x.to(device, non_blocking=device.type == "cuda")


def normalize(x: Tensor) -> Tensor:
    """uint8 0..255 or float 0..1 (..., 3, H, W) -> float32 normalised by ImageNet's mean and deviation."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def denormalize(x: Tensor) -> Tensor:
    """The inverse of `normalize`, clipped, as uint8."""
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (x.float() * std + mean).mul(255).round().clamp(0, 255).byte()


def read_image(path: str | os.PathLike) -> Tensor:
    """Any image file -> (3, H, W) uint8 RGB, upright by its EXIF tag; grey, palette, CMYK, alpha, 16-bit are
    converted. Ordinary JPEGs go through torchvision's decoder (3x faster; a later torchvision may drop it),
    everything else through Pillow.
    Raises BadImage for what is missing, broken, truncated, no image, or above MAX_PIXELS."""
    try:
        with Image.open(path) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"{im.width}x{im.height} is more than {MAX_PIXELS} pixels")
            if im.format == "JPEG" and im.mode in ("RGB", "L") and hasattr(torchvision.io, "decode_jpeg"):
                data = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
                return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB,
                                                  apply_exif_orientation=True)
            return pil_to_tensor(im)
    except Exception as e:  # decoders raise OSError, SyntaxError, RuntimeError, struct.error, ...
        raise BadImage(f"{path}: not a readable image ({type(e).__name__}: "
                       f"{str(e).splitlines()[0] if str(e) else ''})") from e


def pil_to_tensor(im: Image.Image) -> Tensor:
    """Pillow image of any mode -> (3, H, W) uint8 RGB, upright."""
    im = ImageOps.exif_transpose(im)
    if im.mode in ("I", "F") or im.mode.startswith("I;16"):                 # 16-bit grey: keep the upper byte
        a = np.asarray(im).astype(np.float64)
        im = Image.fromarray((a / (257 if a.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if im.mode == "P":                                                      # a palette may carry transparency
        im = im.convert("RGBA")
    return torch.from_numpy(np.array(im.convert("RGB"))).permute(2, 0, 1).contiguous()


class Files:
    """Image files below a folder, nested or flat.  With two or more folders of images at the top, their names
    are the classes; otherwise there are no labels.  Raises ValueError for a missing or empty folder."""

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder of images"
                             + (" (it is a file)" if self.root.exists() else ""))
        found, others = [], 0
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            subfolders.sort()
            kept = [f for f in files if Path(f).suffix.lower() in EXTENSIONS and not f.startswith(".")]
            others += len(files) - len(kept)
            found += [os.path.join(folder, f) for f in kept]
        if not found:
            raise ValueError(f"{self.root}: holds no image ({others} other files); "
                             f"expected {' '.join(sorted(EXTENSIONS))}")
        self.files = sorted(found)
        tops = [Path(f).relative_to(self.root).parts for f in self.files]
        self.classes = sorted({t[0] for t in tops if len(t) > 1})
        labelled = len(self.classes) > 1 and all(len(t) > 1 for t in tops)
        self.classes = self.classes if labelled else []
        self.labels = [self.classes.index(t[0]) for t in tops] if labelled else None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> Tensor:
        return read_image(self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]


class Named:
    """One of torchvision's data sets as an image source.

    name, split: as in `NAMED`; root: where torchvision keeps it."""

    def __init__(self, name: str, split: str, root: str, download: bool):
        cls, splits, targets = NAMED[name]
        try:
            with distributed.main_first():                             # or the ranks would write one file
                kind = cls(root, **splits[split], download=download)
        except (RuntimeError, OSError) as e:                           # not there; no network
            hint = "add --download" if not download else str(e).splitlines()[0]
            raise ValueError(f"{name} ({split}) is not under {root}: {hint}, or give --data_root") from e
        self.kind, self.split, self.title = kind, split, name
        labels = next(getattr(kind, t) for t in targets if hasattr(kind, t))
        self.labels = [int(x[-1] if isinstance(x, tuple) else x) for x in labels]
        self.classes = [str(c) for c in getattr(kind, "classes", sorted(set(self.labels)))]

    def __len__(self) -> int:
        return len(self.kind)

    def read(self, i: int) -> Tensor:
        try:
            return pil_to_tensor(self.kind[i][0])
        except Exception as e:
            raise BadImage(f"{self.name(i)}: {e}") from e

    def name(self, i: int) -> str:
        return f"{self.title}/{self.split}/{i}"


_tv = torchvision.datasets
NAMED = {  # name: (class, arguments per split, attributes that may hold the labels)
    "cifar10": (_tv.CIFAR10, {"train": {"train": True}, "val": {"train": False}}, ["targets"]),
    "cifar100": (_tv.CIFAR100, {"train": {"train": True}, "val": {"train": False}}, ["targets"]),
    "stl10": (_tv.STL10, {"train": {"split": "train+unlabeled"}, "val": {"split": "test"}}, ["labels"]),
    "flowers102": (_tv.Flowers102, {"train": {"split": "train"}, "val": {"split": "test"}}, ["_labels"]),
    "pets": (_tv.OxfordIIITPet, {"train": {"split": "trainval"}, "val": {"split": "test"}}, ["_labels"]),
    "cars": (_tv.StanfordCars, {"train": {"split": "train"}, "val": {"split": "test"}},
             ["_labels", "_samples"]),
    "aircraft": (_tv.FGVCAircraft, {"train": {"split": "trainval"}, "val": {"split": "test"}}, ["_labels"]),
}


def open_images(data: str, split: str = "train", data_root: str = "data", download: bool = False,
                toy_size: int = 64, toy_n: int = 4000, seed: int = 0):
    """The image source that `--data` names.  split: 'train' or 'val'.

    A folder with subfolders train/ and val/ is split by them; DIR/train finds DIR/val beside it.  Returns
    None where there is no val split.  Raises ValueError."""
    if data == "toy":
        return ToyImages(split, toy_n, toy_size, seed)
    if data in NAMED and not Path(data).is_dir():
        return Named(data, split, data_root, download)
    root = Path(data)
    if not root.exists():
        raise ValueError(f"--data {data}: no such folder, and not one of toy, {', '.join(NAMED)}")
    if split == "train":
        return Files(root / "train" if (root / "train").is_dir() else root)
    val = root / "val" if (root / "train").is_dir() else root.parent / "val" if root.name == "train" else None
    return Files(val) if val is not None and val.is_dir() else None


def open_val(args, **more):
    """Images to test on: those of --val_data, in its val/ if it has one, or else the val split of --data.
    Returns None where there is none.  args: data, val_data, data_root, download; more: of `open_images`."""
    if args.val_data and Path(args.val_data).is_dir():
        inner = Path(args.val_data) / "val"
        return Files(inner if inner.is_dir() else args.val_data)
    return open_images(args.val_data or args.data, "val", args.data_root, args.download, **more)


def same_classes(a, b, what: str) -> None:
    """Raises ValueError naming the classes that only one of two lists has."""
    if list(a) != list(b):
        odd = sorted(set(map(str, a)) ^ set(map(str, b)))[:5]
        raise ValueError(f"{what} have {len(a)} and {len(b)} classes; only one of them has "
                         f"{', '.join(odd) or 'them in this order'}")


class Part:
    """Chosen images of a source."""

    def __init__(self, images, index: list[int]):
        self.images, self.index, self.classes = images, index, images.classes
        self.labels = [images.labels[i] for i in index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Tensor:
        return self.images.read(self.index[i])

    def name(self, i: int) -> str:
        return self.images.name(self.index[i])


def labelled(images, where: str):
    """The source itself, without what has no label (STL-10 has such).  Raises ValueError."""
    if images.labels is None:
        raise ValueError(f"{where}: no classes, or one only; expected two or more class folders, DIR/CLASS/* "
                         "or DIR/train/CLASS/*")
    known = [i for i, y in enumerate(images.labels) if y >= 0]
    return images if len(known) == len(images) else Part(images, known)


class Views(Dataset):
    """transform(image, generator) of item (epoch, index), the generator seeded by (seed, epoch, index).

    Returns what the transform returns (a dict) with "index" added, "read" = which image was read, and
    "bad" = index, or -1 if it was readable.  A bad image is replaced by the next readable one, the same on
    every worker.  Raises BadImage after 100 in a row."""

    def __init__(self, images, transform: Callable, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        epoch, index = item
        for step in range(min(100, len(self))):
            try:
                image = self.images.read((index + step) % len(self))
                break
            except BadImage as e:
                error = e
        else:
            raise error
        views = self.transform(image, generator_of(self.seed, "view", epoch, index))
        return views | {"index": index, "read": (index + step) % len(self), "bad": index if step else -1}


class EpochSampler(Sampler):
    """This rank's share of each epoch's permutation, as (epoch, index).  Whole global batches only, the
    rest is dropped.

    Step s of an epoch holds items s*G ... (s+1)*G of the permutation, G = W*B, and rank r takes the r-th B
    of these: the global batch is the same for any number of ranks.  `set_epoch(epoch, step)` starts in the
    middle of an epoch."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.steps = n // (batch_size * self.ranks)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.step) * self.batch_size

    def __iter__(self):
        order = torch.randperm(self.n, generator=generator_of(self.seed, "order", self.epoch))
        order = (order[:self.steps * self.ranks * self.batch_size]
                 .view(self.steps, self.ranks, self.batch_size))
        for index in order[self.step:, self.rank].flatten().tolist():
            yield self.epoch, index


def train_loader(views: Views, batch_size: int, workers: int, pin: bool = False) -> DataLoader:
    """Batches of `views` in the order of an EpochSampler; `loader.sampler.set_epoch` moves it.  Raises
    ValueError where one global batch needs more images than there are."""
    sampler = EpochSampler(len(views), batch_size, views.seed)
    if sampler.steps == 0:
        raise ValueError(f"{len(views)} images do not fill one global batch of {batch_size * sampler.ranks}: "
                         f"lower --batch_size (now {batch_size} per rank, {sampler.ranks} ranks)")
    return DataLoader(views, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin, drop_last=True,
                      persistent_workers=workers > 0, worker_init_fn=init_worker,
                      prefetch_factor=4 if workers else None)


def init_worker(_worker: int) -> None:
    """One thread per loader process, and no signals: the training process decides when to stop."""
    torch.set_num_threads(1)
    distributed.ignore_signals()
