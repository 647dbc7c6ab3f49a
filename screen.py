"""What `python data.py` says of a set, and how it reads some images of each split, evenly spaced: the sizes,
the numbers in masks and the unreadable files that it tells are those of these images.

Shapes: H x W pixels."""
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

import figure
from data import described, evenly
from images import BadImage, read_image
from labelmaps import IGNORE, Pairs
from retrieval import Revisited
from run import Mistake
from scenes import Scenes, check_sides
from videos import Clip

SAMPLE = 24                              # images of a split that are read; every third is drawn
WHOLE = {                                # images of a whole set; of DAVIS, sequences
    "mini-imagenet test": 12_000, "davis train": 60, "davis val": 30,
    "coco train2017": 118_287, "coco val2017": 5_000, "cityscapes train": 2_975, "cityscapes val": 500,
    "voc train": 1_464, "voc val": 1_449, "voc trainaug": 10_582, "ade20k train": 20_210, "ade20k val": 2_000,
}


# ------------------------------------------------- one image, and what is known of its pixels
class Seen(NamedTuple):
    """numbers: (H, W) of objects or classes, or None."""
    title: str
    image: Tensor                        # (3, H, W) uint8
    numbers: np.ndarray | None = None


def of_images(source, i: int) -> Seen:
    title = Path(source.name(i)).stem
    if source.labels is not None and source.labels[i] >= 0:
        title = str(source.classes[source.labels[i]])
    return Seen(title, source.read(i))


def of_pairs(pairs: Pairs, i: int) -> Seen:
    image, label = pairs.read(i)
    return Seen(Path(pairs.name(i)).stem, image, label.numpy())


def of_scenes(scenes: Scenes, i: int) -> Seen:
    image = scenes.read(i)
    numbers = np.zeros(image.shape[1:], np.uint8)
    for k, (_, mask) in enumerate(scenes.objects(i), start=1):
        check_sides(scenes.name(i), numbers.shape, mask.shape)
        mask = Image.fromarray(mask).resize(numbers.shape[::-1], Image.Resampling.NEAREST)
        numbers[np.asarray(mask)] = min(k, IGNORE - 1)
    return Seen(Path(scenes.name(i)).stem, image, numbers)


def of_clips(clips: list[Clip], i: int) -> Seen:
    return Seen(clips[i].name, read_image(clips[i].frames[0], upright=False), clips[i].first)


def of_queries(images: Revisited, i: int) -> Seen:
    return Seen(Path(images.name(i)).stem, images.read(i, crop=True))


# ------------------------------------------------- the screen
def about_source(source) -> str:
    if hasattr(source, "about"):
        return source.about
    return described(len(source), source.classes, source.left_out)


class Screen:
    """What is said of a set.  commands: those that can run.  refused: why others cannot.  rows: of the sheet.
    largest: number in the masks that were read."""

    def __init__(self, path: str, layout: str):
        self.path = shlex.quote(path)
        self.layout = layout
        self.commands: list[str] = []
        self.refused: list[str] = []
        self.rows: list[tuple] = []
        self.largest = 0

    def say(self, title: str, text: str) -> None:
        print(textwrap.fill(f"{title:>12}  {text}", 110, subsequent_indent=" " * 14, break_on_hyphens=False,
                            break_long_words=False))

    def attempt(self, title: str, opener: Callable):
        """What opener() returns; None, and the reason said, where that is a mistake."""
        try:
            return opener()
        except Mistake as e:
            self.refused.append(str(e))
            self.say(title, f"NO: {e}")
            return None

    def split(self, title: str, opener: Callable, reader: Callable, about: Callable = about_source):
        """Open a split, read some of its images, and say what it holds.  Returns the source, or None.

        reader: (source, i) -> Seen.  about: source -> text, for a source of another kind than data.py's."""
        return self.attempt(title, lambda: self.look(title, opener(), reader, about))

    def look(self, title: str, source, reader: Callable, about: Callable):
        """Raises Mistake for an annotation that would end a script, and where no image can be read."""
        sizes = set()
        bad = []
        counts = np.zeros(256, int)      # of pixels, by their number
        row = []
        chosen = evenly(SAMPLE, len(source))
        for place, i in enumerate(chosen):
            try:
                seen = reader(source, i)
            except BadImage as e:
                bad.append(str(e))
                continue
            H, W = seen.image.shape[1:]
            sizes.add((H * W, f"{W} x {H}"))
            if seen.numbers is not None:
                counts += np.bincount(seen.numbers.ravel(), minlength=256)
            if place % 3 == 0:
                row += panels_of(seen)
        if not sizes:
            raise Mistake(f"none of the {len(chosen)} images that were tried can be read; {bad[0]}")

        if row:
            self.rows.append((title, row))
        self.largest = max(self.largest, *np.flatnonzero(counts[:IGNORE]), 0)
        whole = WHOLE.get(f"{self.layout} {title.split()[-1]}", len(source))
        of_set = f"; the whole set has {whole:,}" if whole != len(source) else ""
        numbers = numbers_text(counts, "labels" if reader is of_pairs else "objects")
        readable = f"{len(chosen) - len(bad)} read, {size_text(sizes)}{numbers}"
        self.say(title, f"{about(source)}{of_set}; {readable}")
        if bad:
            self.say("unreadable", f"{len(bad)} of {len(chosen)}, such as {bad[0]}; more than --max_bad (a "
                     "hundredth) end a script")
        return source

    def runs(self, command: str, *needed) -> None:
        """The command can run if all that it needs could be opened."""
        if all(one is not None for one in needed):
            self.commands.append(command)


def panels_of(seen: Seen) -> list[tuple]:
    """The image, and its numbers painted on it, for a contact sheet."""
    photo = seen.image.permute(1, 2, 0).numpy()
    if seen.numbers is None:
        return [(seen.title, photo)]
    painted = figure.painted(photo, seen.numbers)
    painted[seen.numbers == IGNORE] = figure.WHITE
    return [(seen.title, photo), ("", painted)]


def size_text(sizes: set[tuple[int, str]]) -> str:
    """'320 x 240 to 640 x 480 pixels', the least and the largest of (area, size)."""
    ends = dict.fromkeys([min(sizes)[1], max(sizes)[1]])
    return " to ".join(ends) + " pixels"


def numbers_text(counts: np.ndarray, noun: str) -> str:
    """', labels 0 ... 14, 3.1 % not scored', or nothing without masks.  counts: (256,) pixels."""
    if not counts.any():
        return ""
    found = np.flatnonzero(counts[:IGNORE])
    text = f", {noun} {found.min()} ... {found.max()}" if len(found) else f", no {noun}"
    if counts[IGNORE]:
        text += f", {100 * counts[IGNORE] / counts.sum():.2g} % not scored"
    return text
