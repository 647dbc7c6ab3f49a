"""Sets of images: find them in any folder, and feed them to the ranks in an order that can be repeated.

    --data DIR   any folder: flat or nested, with class folders or not; DIR/train and DIR/val where they exist
    --data toy   the generated world of toy.py
    --data pets  cifar10, cifar100, stl10, flowers102, pets, cars, aircraft, through torchvision (--download)
    python data.py DIR    what is there, and which commands can run on it (studies/inspect_data.py)

An image source has `len()`, `read(i)` -> (3, H, W) uint8, `name(i)`, `labels` (or None), `classes`, and
`about`, a line on what it holds.  Everything random about a training image comes from a generator seeded by
(seed, epoch, index), so that no worker, rank or batch changes it."""
import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from images import EXTENSIONS, BadImage, centre_crop, decoding, pil_to_tensor, read_image
from run import Mistake, plural, script
from toy import CLASSES, Scene, scene

MAX_STRAYS = 0.1                               # share of images beside the class folders that is left out
SPLITS = {"train", "val", "valid", "validation", "test"}


class LoaderDied(Mistake):
    """A loader process was killed; what was trained until then can be saved."""


def seed_of(*parts) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def evenly(n: int, total: int) -> list[int]:
    """At most n indices of `total`, evenly spaced from the first to the last."""
    return torch.linspace(0, total - 1, min(n, total)).long().tolist()


def read_text(path: Path, complaint: str) -> str:
    """Text with names of any bytes.  Raises Mistake: the complaint, and why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as e:
        raise Mistake(f"{complaint} ({e.strerror})") from e


# ------------------------------------------------- sources
def walk(root: str | Path, left_out: Counter, only: Container[str] | None = None) -> Iterator[str]:
    """Paths of all images below a folder, unsorted: the one walk of every script.

    Names that begin with a dot are no data.  A folder to which links lead is entered once.  What is no image
    is counted in `left_out` by suffix.  only: the folders to enter at the top.  Raises Mistake."""
    waiting = [str(root)]
    seen = set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            left_out["links to folders that are there already"] += 1
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as e:
            raise Mistake(f"{folder}: this folder cannot be opened ({e.strerror})") from e
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            link = entry.is_symlink()                  # may lead nowhere, or to itself
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir()
            if is_folder:
                if only is None or folder != str(root) or entry.name in only:
                    waiting.insert(0 if link else len(waiting), entry.path)        # links come last
            elif suffix in EXTENSIONS and (link or entry.is_file()):
                yield entry.path
            else:
                left_out[suffix or "without suffix"] += 1


def counted(left_out: Counter) -> str:
    """'3 .txt, 1 hidden', in the order of the names; '' for nothing."""
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()) if count)


def described(n: int, classes: list, left_out: Counter | None = None, why: str = "") -> str:
    """'N images, K classes; left out: 3 .txt', or why there are no classes."""
    labels = f"{len(classes)} classes" if classes else "no labels"
    reason = f" ({why})" if why else ""
    left = f"; left out: {counted(left_out)}" if left_out else ""
    return f"{plural(n, 'image')}, {labels}{reason}{left}"


class ImageFolder:
    """Image files below a folder, nested or flat.  Two or more folders of images at the top are the classes,
    and a few images beside them are left out.  only: the classes to take, by folder name.  Raises Mistake."""

    def __init__(self, root: str | Path, only: list[str] | None = None):
        root = str(root)
        if not os.path.isdir(root):
            found = "it is a file" if os.path.exists(root) else "there is nothing"
            raise Mistake(f"{root}: expected a folder of images, but {found}")
        self.root = root
        left_out = Counter()
        self.files = sorted(walk(root, left_out, only))
        start = len(root.rstrip(os.sep)) + 1
        tops = []                                      # the folder of each file at the top, "" for none
        for file in self.files:
            end = max(file.find(os.sep, start), start)
            tops.append(sys.intern(file[start:end]))
        strays = tops.count("")
        names = sorted(set(tops) - {""})
        missing = sorted(set(only or []) - set(names))
        if missing:
            raise Mistake(f"{root}: {len(missing)} of {len(only)} classes asked for have no images here, "
                          f"such as {', '.join(missing[:5])}")
        if not tops:
            raise Mistake(f"{root}: holds no image ({described(0, [], left_out)}); expected "
                          f"{' '.join(sorted(EXTENSIONS))}")
        why = ""                                       # there are no classes
        if len(names) < 2:
            why = f"one folder only, {names[0]}" if names else "no class folders"
        elif strays > MAX_STRAYS * len(tops):
            why = f"{strays} images lie beside the {len(names)} folders"
        elif strays:
            self.files = list(compress(self.files, tops))
            tops = filter(None, tops)
            left_out["images beside the class folders"] = strays
        self.classes = [] if why else names
        number = {name: i for i, name in enumerate(names)}
        self.labels = None if why else [number[top] for top in tops]
        self.about = described(len(self.files), self.classes, left_out, why)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> Tensor:
        return read_image(self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]


NAMED = {  # name: class in torchvision.datasets, its argument for the split, which is train, which is val
    "cifar10": ("CIFAR10", "train", True, False),
    "cifar100": ("CIFAR100", "train", True, False),
    "stl10": ("STL10", "split", "train+unlabeled", "test"),
    "flowers102": ("Flowers102", "split", "train", "test"),
    "pets": ("OxfordIIITPet", "split", "trainval", "test"),
    "cars": ("StanfordCars", "split", "train", "test"),
    "aircraft": ("FGVCAircraft", "split", "trainval", "test"),
}
LABELS = ("targets", "labels", "_labels", "_samples")  # where these classes keep them


class Named:
    """One of torchvision's data sets.  name, split: as in `NAMED`; root: where torchvision keeps it."""

    def __init__(self, name: str, split: str, root: str, download: bool):
        import torchvision
        kind, argument, train, val = NAMED[name]
        chosen = {argument: train if split == "train" else val}
        try:
            with distributed.main_first():                             # or the ranks would write one file
                self.set = getattr(torchvision.datasets, kind)(root, **chosen, download=download)
        except (RuntimeError, OSError, ValueError) as e:               # not there; no network; page gone
            hint = str(e).splitlines()[0] if download else "add --download"
            raise Mistake(f"{name} ({split}) is not under {root}: {hint}, or give --data_root") from e
        labels = next(getattr(self.set, name) for name in LABELS if hasattr(self.set, name))
        labels = [x[-1] if isinstance(x, tuple) else x for x in labels]        # some are (file, label)
        self.labels = list(map(int, labels))
        self.classes = list(map(str, self.set.classes))
        self.prefix = f"{name}/{split}"
        self.about = described(len(labels), self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        with decoding(self.name(i)):
            image = self.set[i][0]
        return pil_to_tensor(image)

    def name(self, i: int) -> str:
        return f"{self.prefix}/{i}"


@dataclass(eq=False)
class ToyImages:
    """n scenes of the toy world, drawn when they are first asked for and then kept in memory."""
    split: str = "train"
    n: int = 4000
    size: int = 64
    seed: int = 0

    def __post_init__(self):
        self.classes = list(CLASSES)
        self.labels = [i % len(CLASSES) for i in range(self.n)]
        self.scenes = {}
        self.about = described(self.n, self.classes)

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        if i not in self.scenes:
            self.scenes[i] = scene(i, self.seed, self.split, self.size)
        return self.scenes[i]

    def read(self, i: int) -> Tensor:
        return torch.from_numpy(self.scene(i).image).permute(2, 0, 1).contiguous()

    def name(self, i: int) -> str:
        return f"toy/{self.split}/{i:06d}"


class Subset:
    """Chosen images of a source."""

    def __init__(self, images, index: list[int]):
        self.images = images
        self.index = index
        self.root = getattr(images, "root", "")
        self.classes = images.classes
        self.labels = images.labels and [images.labels[i] for i in index]
        self.about = described(len(index), self.classes)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Tensor:
        return self.images.read(self.index[i])

    def name(self, i: int) -> str:
        return self.images.name(self.index[i])


# ------------------------------------------------- what --data names
def open_images(args, split: str = "train", toy_seed: int = 0):
    """Open the image source that --data names (args: data, data_root, download, classes).  split: 'train', or
    'val', which is None where there is none.  Raises Mistake."""
    root = Path(args.data)
    is_folder = os.path.isdir(root)
    only = chosen_classes(getattr(args, "classes", None))
    if only and not is_folder:
        raise Mistake(f"--classes chooses among class folders, and --data {args.data} is no folder")
    if getattr(args, "download", False) and not {args.data, getattr(args, "val_data", None)} & NAMED.keys():
        raise Mistake(f"--download has no effect with --data {args.data}")
    if args.data == "toy":
        return ToyImages(split, seed=toy_seed)
    if args.data in NAMED and not is_folder:
        return Named(args.data, split, args.data_root, args.download)
    if not os.path.exists(root):
        raise Mistake(f"{args.data}: no such folder, and not one of toy, {', '.join(NAMED)}")
    if split == "train":
        return ImageFolder(root / "train" if has_splits(root) else root, only)
    val = root.with_name("val") if root.name == "train" else root / "val"
    if os.path.isdir(val) and (root.name == "train" or has_splits(root)):
        return ImageFolder(val, only)


def has_splits(root: Path) -> bool:
    """Is root/train a split, and not a class called train (as COCO has one) among other classes?"""
    if not os.path.isdir(root / "train"):
        return False
    folders = {path.name for path in root.glob("[!.]*") if path.is_dir()}
    return "val" in folders or folders <= SPLITS


def open_val(args, toy_seed: int = 0):
    """Images to test on: --val_data's, in its val/ if it has one, else the val split of --data, or None."""
    given = args.val_data
    if given is not None:
        if os.path.isdir(given):
            inner = Path(given) / "val"
            only = chosen_classes(getattr(args, "classes", None))
            return ImageFolder(inner if os.path.isdir(inner) else given, only)
        args = type(args)(**vars(args) | {"data": given})
    return open_images(args, "val", toy_seed)


def chosen_classes(given: str | None) -> list[str] | None:
    """--classes: folder names in a file, one a line; 'in100' is ImageNet-100.  Raises Mistake."""
    if given is None:
        return None
    path = Path(__file__).with_name("in100.txt") if given == "in100" else Path(given)
    text = read_text(path, f"--classes {given}: expected in100, or a file; it cannot be read")
    names = {line.strip() for line in text.split("\n")} - {""}
    if len(names) < 2:
        raise Mistake(f"--classes {given}: names {len(names)} classes; expected two or more")
    return sorted(names)


def labelled(images, where: str):
    """The source without images that have no label (STL-10 has such).  Raises Mistake if it has no labels."""
    if images is None or images.labels is None:
        about = "there is no such split" if images is None else images.about
        raise Mistake(f"{where}: labels are needed, but {about}; expected two or more class folders, "
                      "DIR/CLASS/* or DIR/train/CLASS/*")
    known = [i for i, label in enumerate(images.labels) if label >= 0]
    return images if len(known) == len(images) else Subset(images, known)


def with_classes_of(train, val, where: str):
    """val with the class numbers of train.  It may lack classes; one that train lacks raises Mistake."""
    if list(train.classes) == list(val.classes):
        return val
    unknown = sorted(map(str, set(val.classes) - set(train.classes)))
    if unknown:
        raise Mistake(f"{where}: {len(train.classes)} and {len(val.classes)} classes; train has no "
                      f"{', '.join(unknown[:5])}")
    val = Subset(val, range(len(val)))
    val.labels = [train.classes.index(val.classes[label]) for label in val.labels]
    val.classes = train.classes
    return val


def digest(images) -> str:
    """12 hex digits that tell the names of a source's images, wherever its folder lies."""
    start = len(getattr(images, "root", ""))
    names = "".join(images.name(i)[start:] + "\n" for i in range(len(images)))
    return hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=6).hexdigest()


# ------------------------------------------------- loaders
@dataclass(eq=False)
class CentreCrop(Dataset):
    """Images for evaluation: uint8 (3, size, size), label (-1 without), index, readable or not."""
    images: object
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int, bool]:
        label = self.images.labels[i] if self.images.labels else -1
        try:
            image = centre_crop(self.images.read(i), self.size)
        except BadImage:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), label, i, False
        return image, label, i, True


@dataclass(eq=False)
class Views(Dataset):
    """transform(image, generator) of item (epoch, index), the generator seeded by (seed, epoch, index).

    Returns the dict of the transform with "index", "read" = which image was read, and "bad" = index, or -1 if
    it was readable.  A bad image gives way to the next readable one.  Raises BadImage after 100 in a row."""
    images: object
    transform: Callable
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        epoch, index = item
        for step in range(100):
            read = (index + step) % len(self)
            try:
                image = self.images.read(read)
                break
            except BadImage:
                if step == 99:
                    raise
        views = self.transform(image, generator_of(self.seed, "view", epoch, index))
        return views | {"index": index, "read": read, "bad": index if step else -1}


def share_of_epoch(n: int, per_step: int, seed: int, epoch: int, step: int = 0) -> list[tuple[int, int]]:
    """What this rank sees of an epoch from a step on, as (epoch, index).  Whole global batches only: a step
    takes the next W*B of the permuted images, and rank r the r-th B of these, B = per_step.  The global batch
    is the same for any number of ranks."""
    ranks = distributed.world_size()
    steps = n // (per_step * ranks)
    order = torch.randperm(n, generator=generator_of(seed, "order", epoch))
    order = order[:steps * ranks * per_step].view(steps, ranks, per_step)
    mine = order[step:, distributed.rank()].flatten()
    return [(epoch, index) for index in mine.tolist()]


class Batches:
    """The batches of a training run: epochs, accumulation and the place of a resume are kept here.
    Its `steps` give, for each step, a list of `accum` dicts of tensors.  Raises LoaderDied, and Mistake for
    less than one step."""

    def __init__(self, views: Views, batch_size: int, accum: int = 1, workers: int = 0, pin: bool = False):
        self.accum = accum
        ranks = distributed.world_size()
        needed = batch_size * accum * ranks
        self.per_epoch = len(views) // needed
        if self.per_epoch == 0:
            raise Mistake(f"{len(views)} images do not fill one global batch of {needed}: lower --batch_size "
                          f"(now {batch_size} per rank, {ranks} ranks)")
        self.share = partial(share_of_epoch, len(views), batch_size * accum, views.seed)
        self.items = []                                # the sampler, refilled in place: (epoch, index)
        self.loader = DataLoader(
            views, batch_size, sampler=self.items, pin_memory=pin,
            num_workers=workers, worker_init_fn=init_worker,
            persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        )

    def steps(self, first: int, last: int) -> Iterator[tuple[int, list[dict]]]:
        """(step, batches) from step `first` to before `last`, counted over the whole run."""
        for step in range(first, last):
            epoch, of_epoch = divmod(step, self.per_epoch)
            if step == first or of_epoch == 0:
                self.items[:] = self.share(epoch, of_epoch)
                loader = iter(self.loader)
                if hasattr(signal, "SIGCHLD"):         # torch's handler raises in any line
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield step, [next_batch(loader) for _ in range(self.accum)]


def next_batch(loader: Iterator) -> dict:
    try:
        return next(loader)
    except RuntimeError as e:
        if "DataLoader worker" not in str(e) or str(e).startswith("Caught"):
            raise
        raise LoaderDied("a loader process was killed, often for want of memory or of shared memory "
                         "(/dev/shm): try fewer --num_workers; --num_workers 0 needs neither") from e


def init_worker(_worker: int) -> None:
    """One thread per loader process, and no signals: the training process decides when to stop."""
    torch.set_num_threads(1)
    distributed.ignore_signals()


if __name__ == "__main__":
    from studies.inspect_data import get_args, main
    script(main, get_args)
