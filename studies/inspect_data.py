"""What a folder holds, and which commands can run on it.

    python data.py /data/coco                                  # the layout is found
    python data.py /data/mine --as pairs --sheet mine.png      # or named; and a picture of images and masks
    python data.py /data/imagenet --classes in100
    python data.py pets --download                             # one of torchvision's sets

Sets are opened by the code of the scripts, so that what is accepted here is accepted there.  Of each split
some images are read, evenly spaced: the sizes, the numbers in masks and the unreadable files that are told
are those of these images.  Exit code 0 where a command can run, 2 where none can.

Shapes: H x W pixels."""
import argparse
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import figure
import run
from data import NAMED, SPLITS, described, evenly, has_splits, labelled, with_classes_of
from images import BadImage, read_image
from knn import draw_episodes
from labelmaps import CLASSES, IGNORE, Pairs, find_layout
from probes import MiniImageNet, open_few_shot
from retrieval import Revisited
from run import Mistake
from scenes import Coco, Scenes, Voc, check_sides, find_voc
from videos import Clip, few, find_clips
from videos import described as about_clips

SAMPLE = 24                              # images of a split that are read; every third is drawn
ARCHIVES = {".tar", ".zip", ".gz", ".tgz"}
SIGNS = {                                # by which a layout is known, even where half of it is missing
    "mini-imagenet": ["test.csv"],
    "revisited": ["gnd_*.pkl"],
    "davis": ["ImageSets/2017", "*/480p"],
    "coco": ["annotations/instances_*.json", "train2017", "val2017"],
    "voc": ["ImageSets/Segmentation", "JPEGImages", "VOC2012", "VOCdevkit/VOC2012"],
    "cityscapes": ["leftImg8bit", "gtFine"],
    "ade20k": ["annotations/training", "annotations/validation", "images/training"],
    "pairs": ["labels"],
}
FROM = {                                 # docs/DATA.md says more
    "mini-imagenet": "ImageNet's images; test.csv of https://github.com/twitter-research/meta-learning-lstm",
    "revisited": "http://cmp.felk.cvut.cz/revisitop/",
    "davis": "DAVIS-2017-trainval-480p.zip of https://davischallenge.org/davis2017/code.html",
    "coco": "{train,val}2017.zip, annotations_trainval2017.zip of https://cocodataset.org/#download",
    "voc": "VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    "cityscapes": "{leftImg8bit,gtFine}_trainvaltest.zip of https://www.cityscapes-dataset.com",
    "ade20k": "ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu",
}
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
    title = source.name(i)
    if source.labels is not None and source.labels[i] >= 0:
        title = source.classes[source.labels[i]]
    return Seen(title, source.read(i))


def of_pairs(pairs: Pairs, i: int) -> Seen:
    image, label = pairs.read(i)
    return Seen(pairs.name(i), image, label.numpy())


def of_scenes(scenes: Scenes, i: int) -> Seen:
    image = scenes.read(i)
    numbers = np.zeros(image.shape[1:], np.uint8)
    for k, (_, mask) in enumerate(scenes.objects(i), start=1):
        check_sides(scenes.name(i), numbers.shape, mask.shape)
        mask = Image.fromarray(mask).resize(numbers.shape[::-1], Image.Resampling.NEAREST)
        numbers[np.asarray(mask)] = min(k, IGNORE - 1)
    return Seen(scenes.name(i), image, numbers)


def of_clips(clips: list[Clip], i: int) -> Seen:
    return Seen(clips[i].name, read_image(clips[i].frames[0], upright=False), clips[i].first)


def of_queries(images: Revisited, i: int) -> Seen:
    return Seen(images.name(i), images.read(i, crop=True))


def panels_of(seen: Seen) -> list[tuple]:
    """The image, and its numbers painted on it, for a contact sheet."""
    photo = seen.image.permute(1, 2, 0).numpy()
    if seen.numbers is None:
        return [(seen.title, photo)]
    painted = figure.painted(photo, seen.numbers)
    painted[seen.numbers == IGNORE] = figure.WHITE
    return [(seen.title, photo), ("", painted)]


# ------------------------------------------------- what is said of a set
def span(values: list[str]) -> str:
    """'3 to 7', from the first to the last, or '3' if they are alike."""
    return " to ".join(dict.fromkeys([values[0], values[-1]]))


def numbers_text(counts: np.ndarray, noun: str) -> str:
    """', labels 0 ... 14, 3.1 % not scored', or nothing without masks.  counts: (256,) pixels."""
    if not counts.any():
        return ""
    found = np.flatnonzero(counts[:IGNORE])
    text = f", {noun} {found.min()} ... {found.max()}" if len(found) else f", no {noun}"
    if counts[IGNORE]:
        text += f", {100 * counts[IGNORE] / counts.sum():.2g} % not scored"
    return text


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
        sizes = []
        bad = []
        row = []
        counts = np.zeros(256, int)      # of pixels, by their number
        chosen = evenly(SAMPLE, len(source))
        for place, i in enumerate(chosen):
            try:
                seen = reader(source, i)
            except BadImage as e:
                bad.append(str(e))
                continue
            H, W = seen.image.shape[1:]
            sizes.append((H * W, f"{W} x {H}"))
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
        pixels = span([size for _, size in sorted(sizes)])
        self.say(title, f"{about(source)}{of_set}; {len(sizes)} read, {pixels} pixels{numbers}")
        if bad:
            self.say("unreadable", f"{len(bad)} of {len(chosen)}, such as {bad[0]}; more than --max_bad (a "
                     "hundredth) end a script")
        return source

    def runs(self, command: str, *needed) -> None:
        """The command can run if all that it needs could be opened."""
        if None not in needed:
            self.commands.append(command)


# ------------------------------------------------- layouts
def layout_of(root: Path) -> tuple[str, set[str]]:
    """The layout whose signs a folder has, and the names of its parts that are signs; "folder" is images of
    any kind."""
    for layout, signs in SIGNS.items():
        found = [path for sign in signs for path in root.glob(sign)]
        if found:
            return layout, {path.relative_to(root).parts[0] for path in found}
    return "folder", set()


def given_names(root: Path) -> dict[str, str]:
    """{WordNet id, or number: name}, where a list of the set's own lies in the folder or above."""
    names = {}
    for folder in (root, *root.resolve().parents[:3]):
        for file in ("LOC_synset_mapping.txt", "words.txt", "objectInfo150.txt"):
            path = folder / file
            if path.is_file():
                for line in path.read_text(errors="replace").splitlines():
                    words = line.split("\t") if "\t" in line else line.split(" ", 1)
                    names.setdefault(words[0].strip(), words[-1].split(",")[0].strip())
    return names


# ------------------------------------------------- images without masks
def see_folder(screen: Screen, root: Path, args) -> None:
    own = argparse.Namespace(**vars(args), data=args.path, val_data=None)
    train = screen.split("train", lambda: data.open_images(own), of_images)
    val = screen.attempt("val", lambda: data.open_val(own))
    if val is not None:
        screen.split("val", lambda: val, of_images)
    if train is None:
        return
    say_classes(screen, root, train, val, args.classes)
    if val is not None and val.labels is None and "ILSVRC2012_val_" in val.name(0):
        screen.say("val", "ImageNet's, not in class folders: docs/DATA.md says how to sort them")

    data_is = f"--data {screen.path}" + (f" --classes {shlex.quote(args.classes)}" if args.classes else "")
    screen.runs(f"pretrain.py {data_is}")
    screen.runs(f"probes.py variance --ckpt mmc.pth {data_is}")
    marked = screen.attempt("labels", lambda: labelled(train, "train images"))
    if marked is None:
        return
    tested = screen.attempt("labels", lambda: with_classes_of(
        marked, labelled(val, "val images"), "train and val"))
    for script in ("probes.py knn", "probes.py layers", "finetune.py"):
        screen.runs(f"{script} --ckpt mmc.pth {data_is}", tested)
    if val is None:
        screen.runs(f"finetune.py --ckpt mmc.pth {data_is} --val_split 0.2")
    screen.attempt("few-shot", lambda: see_few_shot(screen, open_few_shot(own), data_is))


def see_few_shot(screen: Screen, images, data_is: str) -> None:
    """Raises Mistake where no episode can be drawn."""
    images = labelled(images, "few-shot")
    draw_episodes(torch.tensor(images.labels), episodes=1)
    screen.runs(f"probes.py fewshot --ckpt mmc.pth {data_is}")


def say_classes(screen: Screen, root: Path, train, val=None, chosen: str | None = None) -> None:
    """Names, how many images each has, and which of all (but not of chosen ones) have none."""
    if not train.classes:
        return
    names = given_names(root)
    titled = [f"{c} ({names[c]})" if c in names else c for c in train.classes]
    counts = sorted(Counter(train.labels).values())
    screen.say("classes", f"{few(titled)}; {span(list(map(str, counts)))} images each")
    empty = []
    if hasattr(train, "root") and not isinstance(train, MiniImageNet) and not chosen:
        folders = {path.name for path in Path(train.root).glob("[!.]*/")}
        empty += [f"train/{name}" for name in folders - set(train.classes)]
    if val is not None and val.classes:
        empty += [f"val/{name}" for name in set(train.classes) - set(val.classes)]
    if empty:
        screen.say("empty", f"no image in {few(sorted(empty))}")


def see_mini_imagenet(screen: Screen, root: Path, args) -> None:
    only = data.chosen_classes(args.classes)
    images = screen.split("test", lambda: MiniImageNet(root, only), of_images)
    if images is not None:
        say_classes(screen, root, images)
        screen.attempt("few-shot", lambda: see_few_shot(screen, images, f"--data {screen.path}"))


def see_revisited(screen: Screen, root: Path, args) -> None:
    images = screen.split("images", lambda: Revisited(str(root)), of_queries)
    screen.runs(f"probes.py retrieval --ckpt mmc.pth --data {screen.path}", images)


# ------------------------------------------------- images with masks
def see_coco(screen: Screen, root: Path, args) -> None:
    see_scenes(screen, "--coco", Coco, root, ("train2017", "val2017"))
    see_labels(screen, root, args, "coco")


def see_voc(screen: Screen, root: Path, args) -> None:
    folder = screen.attempt("lists", lambda: find_voc(root))
    if folder is None:
        return
    see_scenes(screen, "--voc", Voc, root, ("train", "val"))
    see_labels(screen, root, args, "voc")
    if (folder / "ImageSets/Segmentation/trainaug.txt").is_file():
        see_labels(screen, root, args, "voc_aug")


def see_scenes(screen: Screen, option: str, kind: Callable, root: Path, splits: tuple[str, str]) -> None:
    """Objects, for zero-shot segmentation.  The second split is the one that is scored."""
    for split in splits:
        scenes = screen.split(split, partial(kind, root, split), of_scenes)
    screen.runs(f"zeroshot.py --ckpt mmc.pth {option} {screen.path}", scenes)


def see_labels(screen: Screen, root: Path, args, layout: str | None = None) -> None:
    """Label maps, for linear segmentation."""
    layout = layout or screen.layout
    opened = []
    for split in ("train", "val"):
        title = "trainaug" if (layout, split) == ("voc_aug", "train") else split
        opener = partial(Pairs, root, split, layout, args.num_classes)
        pairs = screen.split(f"linseg {title}", opener, of_pairs)
        opened.append(pairs)
        if pairs is not None and layout in ("pairs", "ade20k"):
            say_lonely(screen, pairs)
    if None in opened:
        return
    names = given_names(root)
    screen.say("classes", few([names.get(name, name) for name in opened[0].classes]))
    command = f"probes.py linseg --ckpt mmc.pth --data {screen.path}"
    if layout != find_layout(root):
        command += f" --layout {layout}"
    if layout not in CLASSES and layout != "coco":
        command += f" --num_classes {args.num_classes or screen.largest + 1}"
    screen.runs(command)


def say_lonely(screen: Screen, pairs: Pairs) -> None:
    """Labels that belong to no image."""
    labels = {pair.label for pair in pairs.pairs}
    folders = {label.parent for label in labels}
    there = {path for folder in folders for path in folder.glob("[!.]*.png")}
    lonely = sorted(path.name for path in there - labels)
    if lonely:
        screen.say("alone", f"masks without an image: {few(lonely)}")


def see_davis(screen: Screen, root: Path, args) -> None:
    lists = sorted(path.stem for path in (root / "ImageSets/2017").glob("[!.]*.txt"))
    for split in lists or ["val"]:
        left_out = Counter()
        own = argparse.Namespace(
            video=None, davis=root, split=split, sequences=None, ckpt=["mmc.pth"], overlay=False)
        about = partial(about_clips, "DAVIS", left_out=left_out)
        clips = screen.split(split, partial(find_clips, own, left_out), of_clips, about)
        screen.runs(f"davis.py --ckpt mmc.pth --davis {screen.path} --split {split}", clips)


SEE = {
    "coco": see_coco, "voc": see_voc, "ade20k": see_labels, "cityscapes": see_labels, "davis": see_davis,
    "revisited": see_revisited, "folder": see_folder, "mini-imagenet": see_mini_imagenet, "pairs": see_labels,
}


# ------------------------------------------------- what lies around
def say_level(screen: Screen, root: Path, own: set[str]) -> None:
    """Sets that lie above or below, and archives.  own: parts of the set that was seen."""
    root = root.resolve()
    if screen.layout == "folder":
        for above in root.parents[:3]:
            layout, parts = layout_of(above)
            if root.relative_to(above).parts[0] in parts:
                screen.say("level", f"this is a part of {above}, {layout}")
                break
        if root.parent.name in SPLITS:
            screen.say("level", f"this is one class of {root.parent}")
    if root.name in SPLITS - {"train"} and has_splits(root.parent):
        screen.say("level", f"this is one split of {root.parent}")
    below = []
    for folder in sorted(root.glob("[!.]*/"))[:50]:
        layout, parts = layout_of(folder)
        if folder.name not in own and (parts or has_splits(folder)):
            below.append(f"{folder.name} ({layout})")
    if below:
        screen.say("level", f"sets of their own lie in it, give one of them: {few(below)}")
    for folder in (root, root / "train", root / "val"):
        packed = sorted(path.name for path in folder.glob("[!.]*") if path.suffix in ARCHIVES)
        if packed:
            screen.say("packed", f"not unpacked in {folder}: {few(packed)}")


# ------------------------------------------------- the script
def main(args: argparse.Namespace) -> None:
    run.check_outputs(args, "sheet")
    root = Path(args.path)
    named = not root.is_dir() and args.path in ("toy", *NAMED)
    if not named and not root.is_dir():
        raise Mistake(f"{args.path}: no such folder, and not one of toy, {', '.join(NAMED)}")
    layout, parts = ("folder", set()) if named else layout_of(root)
    layout = args.layout or layout
    if args.classes and layout not in ("folder", "mini-imagenet"):
        raise Mistake(f"--classes chooses among class folders, and {args.path} is seen as {layout}")
    screen = Screen(args.path, layout)
    print(f"{args.path}: " + ("by its name" if named else f"seen as {layout}; --as names another layout"))
    SEE[layout](screen, root, args)
    if not named:
        say_level(screen, root, parts)
    if screen.refused and layout in FROM:
        screen.say("from", f"{FROM[layout]}; docs/DATA.md shows the layout")
    for command in screen.commands:
        print(f"{'runs':>12}  python {command}")                       # in one line, to be copied

    if args.sheet and screen.rows:
        with run.writing(args.sheet):
            figure.sheet(screen.rows).save(args.sheet)
        screen.say("look at", args.sheet)
    if not screen.commands:
        raise Mistake(f"no command can run on it, seen as {layout}: {screen.refused[0]}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = run.Parser(description=__doc__)
    p.add_argument("path", metavar="PATH", help=f"a folder, or toy, {', '.join(NAMED)}")
    p.add_argument("--as", dest="layout", choices=list(SEE), help="the layout (default: found by its files)")
    p.add_argument("--sheet", metavar="PNG", help="draw images and masks of each split into this file")
    p.add_argument("--num_classes", type=run.at_least(1), help="of a folder of pairs, as for linseg")
    run.add_shared(p, "classes data_root download")
    args = p.parse_args(argv)
    if args.sheet and Path(args.sheet).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise Mistake(f"--sheet {args.sheet}: expected a name that ends in .png, .jpg or .webp")
    return args


if __name__ == "__main__":
    run.script(main, get_args)
