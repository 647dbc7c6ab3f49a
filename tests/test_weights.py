"""Proves: the recipe of mmc.pth trains on train images only, of every set, and keeps the blocks it says."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pretrain import TINY

import pretrain
from checkpoint import load_backbone
from run import Mistake
from studies import weights

DATA = os.environ.get("MMC_TEST_DATA")


def write(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def sets(tmp_path):
    """All four sets with few images, each different."""
    seed = 0
    for name, classes in (("imagenette", ("fish", "dog")), ("imagewoof", ("beagle",))):
        for split, n in (("train", 6), ("val", 2)):
            for label in classes:
                for i in range(n):
                    seed += 1
                    write(tmp_path / name / split / label / f"{split}_{label}_{i}.png", seed)
    voc = tmp_path / "voc"
    for split in ("train", "val"):
        seed += 1
        write(voc / f"JPEGImages/{split}_a.jpg", seed)
        lists = voc / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{split}_a\n")
        seed += 1
        write(tmp_path / f"coco/{split}2017/{split}_b.jpg", seed)
    return tmp_path


def command(sets: Path, *more: str):
    options = []
    for name in ("imagenette", "imagewoof", "voc", "coco"):
        options += [f"--{name}", str(sets / name)]
    return weights.get_args([*options, "--out", str(sets / "out"), *more])


def test_only_train_images_are_gathered(sets):
    assert weights.gather(command(sets), sets / "images") == 12 + 6 + 1 + 1
    found = [path.relative_to(sets / "images") for path in (sets / "images").glob("*/*/*")]
    train = [path for path in found if path.parts[0] == "train"]
    val = [path for path in found if path.parts[0] == "val"]
    assert len(train) == 20 and all(path.name.startswith("train_") for path in train)
    assert {path.parts[1] for path in train} == {"fish", "dog", "beagle", "voc", "coco"}
    assert len(val) == 4 and {path.parts[1] for path in val} == {"fish", "dog"}
    assert weights.gather(command(sets), sets / "images") == 20        # again: nothing is in the way


@pytest.mark.parametrize("name", [
    "imagenette/val/fish/val_fish_0.png", "imagewoof/val/beagle/val_beagle_1.png",
    "voc/JPEGImages/val_a.jpg", "coco/val2017/val_b.jpg"])
def test_a_validation_image_among_those_of_training_is_refused(sets, name):
    twin = sets / "imagewoof/train/beagle/copy.png"
    twin.write_bytes((sets / name).read_bytes())
    with pytest.raises(Mistake, match="copy.png is the validation image .*leave it out"):
        weights.gather(command(sets), sets / "images")


def test_a_large_photograph_is_gathered_as_a_smaller_copy(sets, monkeypatch):
    monkeypatch.setattr(weights, "SHORT", 30)
    weights.gather(command(sets), sets / "images")
    copy = sets / "images/train/coco/train_b.jpg"
    assert not copy.is_symlink() and Image.open(copy).size == (30, 30)


def test_a_set_without_train_images_is_named(sets):
    (sets / "coco/train2017/train_b.jpg").unlink()
    with pytest.raises(Mistake, match="--coco .*no train images"):
        weights.gather(command(sets), sets / "images")
    shutil.rmtree(sets / "imagewoof/train")
    with pytest.raises(Mistake, match="--imagewoof .*no train images"):
        weights.gather(command(sets), sets / "images")


def test_the_recipe_is_one_of_pretrain():
    args = pretrain.get_args(["--data", "x", *weights.RECIPE.split()])
    assert (args.arch, args.epochs, args.global_crops_size) == ("vit_mini", 75, 112)


@pytest.mark.slow
def test_the_weights_have_the_blocks_that_are_kept(sets):
    weights.main(command(sets, "--blocks", "1", "--", *TINY, "--epochs", "1", "--precision", "fp32"))
    short, report = load_backbone(str(sets / "out/mmc.pth"))
    whole, _ = load_backbone(str(sets / "out/run/backbone.pth"))
    assert (short.depth, whole.depth) == (1, 4) and "0 dropped" in report


@pytest.mark.skipif(not DATA, reason="MMC_TEST_DATA names no real images")
def test_no_real_train_image_is_a_validation_image(tmp_path):
    root = Path(DATA)
    args = weights.get_args(["--imagenette", str(root / "imagenette"), "--imagewoof", str(root / "imagewoof"),
                             "--voc", str(root / "VOCdevkit"), "--coco", str(root / "coco"), "--out", "x"])
    assert weights.gather(args, tmp_path) == 9469 + 1000 + 80 + 80
