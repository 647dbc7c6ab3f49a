"""The recipe of mmc.pth: gather train images, pretrain without their labels, keep the first blocks.

    python -m studies.weights --imagenette imagenette --out out/weights
    python -m studies.weights --imagenette imagenette --imagewoof imagewoof --voc VOCdevkit --coco coco \\
        --out out/weights                                                   # more images without labels

The first is that of mmc.pth, which took seven minutes on an H200, as far as epoch 66 of 75.

It links the train images of every set into OUT/images/train (a smaller copy of what is larger than SHORT),
and the validation images of imagenette into OUT/images/val, which pretrain.py uses for k-NN only.  An image
whose file is, to the byte, a validation image of any of the sets is refused.  Then it runs pretrain.py with
RECIPE (what follows `--` comes on top), and writes OUT/mmc.pth, the first BLOCKS blocks in float16.
`probes.py layers` tells how good each block is.

The same command goes on with a run that was cut off."""
import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import checkpoint
import pretrain
import run
from images import EXTENSIONS, read_image, resize_short
from report import markdown
from scenes import find_voc, read_voc_list
from studies import gpu
from studies.ablation import call

RECIPE = f"{gpu.RECIPE} --epochs 75 --knn_every 20"
BLOCKS = 4
SHORT = 224                                    # pixels: the short side of an image, at most


def class_folders(root: Path, split: str) -> Iterator[tuple[str, Path]]:
    """(class, file) of the images of ROOT/SPLIT/CLASS/."""
    for file in sorted((root / split).glob("*/*")):
        if file.suffix.lower() in EXTENSIONS:
            yield file.parent.name, file


def images_of(args, split: str) -> dict[str, list[tuple[str, Path]]]:
    """{set: (folder, file) of its images}, of the sets that are given.  split: train or val."""
    found = {"imagenette": list(class_folders(Path(args.imagenette), split))}
    if args.imagewoof:
        found["imagewoof"] = list(class_folders(Path(args.imagewoof), split))
    if args.voc:
        found["voc"] = [("voc", image) for image, _ in read_voc_list(find_voc(args.voc), split)]
    if args.coco:
        files = sorted((Path(args.coco) / f"{split}2017").glob("*.jpg"))
        found["coco"] = [("coco", file) for file in files]
    return found


def digest(file: Path) -> bytes:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()


def gather(args, folder: Path) -> int:
    """Fill FOLDER/train and FOLDER/val by `place`; the number of train images.  Raises Mistake where a set
    has none, and for a train image that is a validation image, too."""
    val = images_of(args, "val")
    held_out = {digest(file): file for images in val.values() for _, file in images}
    n = 0
    for name, images in images_of(args, "train").items():
        if not images:
            raise run.Mistake(f"--{name} {getattr(args, name)}: no train images found")
        for label, file in images:
            twin = held_out.get(digest(file))
            if twin:
                raise run.Mistake(f"{file} is the validation image {twin}: leave it out of the train images")
            place(file, folder / "train" / label)
        print(f"{name}: {len(images)} train images")
        n += len(images)
    for label, file in val["imagenette"]:
        place(file, folder / "val" / label)
    return n


def place(file: Path, folder: Path) -> None:
    """Link the image into the folder, or write a copy there whose short side is SHORT, if its own is longer:
    crops are small, and a small image is read sooner."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    if target.is_symlink() or target.exists():
        return
    with Image.open(file) as image:
        short = min(image.size)
    if short <= SHORT:
        target.symlink_to(file.resolve())
    else:
        pixels = resize_short(read_image(file), SHORT)
        part = folder / f".{file.name}"                                # so that a cut leaves no half image
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(part, quality=90)
        part.replace(target)


def clicks_table(runs: list[dict], lines: list[dict]) -> str:
    """Markdown: one click on train images, with the first blocks of each run: best t (which) / auto."""
    about = {one["name"]: one for one in runs}
    rows = {}
    for line in lines:                         # first those of VOC, then those of COCO
        file = Path(line["ckpt"]).stem
        name, blocks = file.rsplit("_blocks", 1)
        one = about[name]
        knn = f"{one['knn_cls']:.1f} / {one['knn_pat']:.1f}"
        row = rows.setdefault(file, [one["about"], str(one["epochs"]), knn, blocks])
        found = line["metrics"]
        row.append(f"{found['best']:.1f} ({found['best_threshold']}) / {found['auto']:.1f}")
    heads = ["trained at", "epochs", "k-NN CLS / PAT, all blocks", "blocks kept", "VOC train", "COCO train"]
    return markdown(heads, list(rows.values()))


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    with run.writing(out, "--out "):
        gather(args, out / "images")
    call(pretrain, "--data", out / "images", "--output_dir", out / "run", *RECIPE.split(), *args.pretrain)
    call(checkpoint, out / "run/backbone.pth", "--to", out / "mmc.pth", "--half", "--blocks", args.blocks)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    p = run.Parser(description=__doc__)
    a = p.add_argument
    a("--imagenette", required=True, metavar="DIR", help="folder with train/ and val/ of class folders")
    a("--imagewoof", metavar="DIR", help="another one, of which train/ is taken")
    a("--voc", metavar="DIR", help="PASCAL VOC, of which ImageSets/Segmentation/train.txt is taken")
    a("--coco", metavar="DIR", help="COCO, of which train2017/ is taken")
    a("--blocks", type=run.count, default=BLOCKS, help="blocks that are kept (default: %(default)s)")
    a("--out", required=True, metavar="DIR", help="folder of links, run and mmc.pth")
    args = p.parse_args(argv[:cut])
    args.pretrain = argv[cut + 1:]
    return args


if __name__ == "__main__":
    run.script(main, get_args)
