"""Proves: what `python data.py DIR` says of every layout is true, of whole and of broken folders; the
commands that it names are accepted by their scripts, and where it names none, its code is 2; ImageNet-100 is
chosen from a thousand classes wherever class folders are read, and belongs to the run."""
import importlib
import pickle
import random
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
import data
import finetune
import pretrain
import probes
from run import Mistake
from studies import inspect_data, layouts
from toy import scene

ROOT = Path(__file__).parent.parent
RANDOM = "--ckpt random:vit_micro/8"
TINY = ("--arch vit_micro --patch_size 8 --global_crops_size 16 --local_crops_number 0 --head_hidden_dim 16 "
        "--head_out_dim 8 --batch_size 50 --epochs 1 --warmup_epochs 0 --num_workers 0 --knn_every 0").split()


def write_layout(root, name, n=30, n_val=24, size=32):
    """A folder in one of the toy world's layouts."""
    root = Path(root)
    layouts.main(layouts.get_args(["--out", str(root), "--layout", name, "--n", str(n), "--n_val", str(n_val),
                                   "--size", str(size)]))
    return root


@pytest.fixture
def look(capsys):
    """What is said of a folder, with single spaces, and its commands.  What ends with code 2 ends with '2:'
    and its line."""
    def say(path, *more):
        capsys.readouterr()
        code = ""
        try:
            inspect_data.main(inspect_data.get_args([str(path), *map(str, more)]))
        except Mistake as e:
            code = f" 2: {e}"
        lines = capsys.readouterr().out.splitlines()
        commands = [line.split("python ")[1] for line in lines if line.strip().startswith("runs  python")]
        assert bool(commands) == (code == "")
        for command in commands:
            accepted(command)
        return " ".join(" ".join(lines).split()) + code, {name_of(command) for command in commands}
    return say


def name_of(command):
    """'probes.py knn', 'pretrain.py'."""
    words = command.split()
    return " ".join(words[:2]) if words[0] == "probes.py" else words[0]


def accepted(command):
    script, *argv = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).get_args(argv)


OF_PHOTOS = {"pretrain.py", "probes.py variance"}
OF_CLASSES = OF_PHOTOS | {"finetune.py", "probes.py fewshot"}
OF_SPLITS = OF_CLASSES | {"probes.py knn", "probes.py layers"}


# ------------------------------------------------- whole sets
@pytest.mark.slow
def test_the_toy_worlds_layouts(look, tmp_path):
    coco, can = look(write_layout(tmp_path / "coco", "coco"))
    assert can == {"zeroshot.py", "probes.py linseg"} and "NO" not in coco
    assert "seen as coco" in coco and "COCO val2017: 24 images, 10 classes" in coco
    assert "classes background, candy, starfish" in coco and "24 read, 32 x 32 pixels, labels 0 ... " in coco
    assert "the whole set has 118,287" in coco

    voc, can = look(write_layout(tmp_path / "voc", "voc"))
    assert can == {"zeroshot.py", "probes.py linseg"} and "seen as voc" in voc and "NO" not in voc
    assert "linseg train 30 images, 21 classes" in voc and "% not scored" in voc

    davis, can = look(write_layout(tmp_path / "davis", "davis", 1, 2))
    assert can == {"davis.py"} and "val DAVIS: 2 sequences, 40 frames" in davis
    assert "train DAVIS: 1 sequence, 20 frames" in davis and "56 x 32 pixels, objects 0 ... " in davis

    folder, can = look(write_layout(tmp_path / "folder", "folder", 30, 160))
    assert can == OF_SPLITS and "train 30 images, 10 classes; 24 read, 32 x 32 pixels" in folder
    assert "classes brick, candy, " in folder and "3 images each" in folder and "NO" not in folder

    toy, can = look("toy")
    assert can == OF_SPLITS and "train 4000 images, 10 classes" in toy


@pytest.mark.slow
def test_the_real_sets(look, real_data):
    said, can = look(real_data / "imagenette")
    assert can == OF_SPLITS and "train 9469 images, 10 classes" in said and "val 1500 images" in said
    said, can = look(real_data / "imagewoof")
    assert can == OF_SPLITS and "100 images each" in said
    said, can = look(real_data / "coco")
    assert "left out: 6 crowd regions" in said and "81 classes" in said and "airplane" in said
    assert can == {"zeroshot.py", "probes.py linseg"} and "labels 0 ... 80" in said
    said, can = look(real_data / "VOCdevkit")
    assert can == {"zeroshot.py", "probes.py linseg"} and "linseg val 80 images, 21 classes" in said
    said, can = look(real_data / "DAVIS")
    assert can == {"davis.py"} and "3 sequences, 139 frames, 3 objects" in said and "854 x 480" in said
    said, can = look(real_data / "photos")
    assert can == OF_PHOTOS and "4 images, no labels" in said
    said, can = look(real_data / "weights")
    assert not can and "2: no command can run" in said and "left out: 1 .pth" in said
    said, can = look(real_data / "imagenette/train/n01440764")
    assert can == OF_PHOTOS and "this is one class of" in said
    said, can = look(real_data / "VOCdevkit/VOC2012/JPEGImages")
    assert can == OF_PHOTOS and "this is a part of" in said and "VOC2012, voc" in said


def write_pictures(folder, n, size=32):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(scene(i, size=size).image).save(folder / f"{i:03d}.jpg")


PATHS = {  # of an image and its labels; the labels are 0 ... 10, and cityscapes' are numbers of its classes
    "ade20k": ("images/{}ing/{}.jpg", "annotations/{}ing/{}.png"),
    "cityscapes": ("leftImg8bit/{}/ulm/{}_leftImg8bit.png", "gtFine/{}/ulm/{}_gtFine_labelTrainIds.png"),
    "pairs": ("images/{}/{}.jpg", "labels/{}/{}.png"),
}


def write_labels(root, layout, n=5, n_val=4):
    for split, number in (("train", n), ("val", n_val)):
        for i in range(number):
            drawn = scene(i, split=split, size=32)
            class_of = np.array([0, *(category + 1 for category in drawn.categories)], np.uint8)
            for pattern, array in zip(PATHS[layout], (drawn.image, class_of[drawn.instances]), strict=True):
                path = root / pattern.format(split, f"{i:03d}").replace("valing", "validation")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes", "voc_aug", "pairs"])
def test_sets_with_labels(look, tmp_path, layout):
    if layout == "voc_aug":
        write_layout(tmp_path, "voc", 5, 4)
        lists = tmp_path / "VOC2012/ImageSets/Segmentation"
        shutil.copy(lists / "train.txt", lists / "trainaug.txt")
        shutil.copytree(tmp_path / "VOC2012/SegmentationClass", tmp_path / "VOC2012/SegmentationClassAug")
    else:
        write_labels(tmp_path, layout)
    said, can = look(tmp_path)
    assert f"seen as {layout.removesuffix('_aug')}" in said and "probes.py linseg" in can
    assert ("--layout voc_aug" in said) == (layout == "voc_aug") and "linseg val 4 images" in said
    if layout == "pairs":
        largest = max(int(np.asarray(Image.open(path)).max()) for path in tmp_path.glob("labels/*/*.png"))
        assert f"--num_classes {largest + 1}" in said and f"labels 0 ... {largest}" in said
    if layout == "cityscapes":
        assert "classes road, sidewalk, building" in said
    if layout == "ade20k":
        rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0\t1\t1\tthing {i}, other" for i in range(1, 151))]
        (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
        assert "classes thing 1, thing 2" in look(tmp_path)[0]


def test_revisited_and_mini_imagenet(look, tmp_path):
    write_pictures(tmp_path / "r/jpg", 6)
    names = [f"{i:03d}" for i in range(6)]
    known = {"bbx": [0, 0, 20, 30], "easy": [0], "hard": [1], "junk": [2]}
    truth = {"imlist": names[:4], "qimlist": names[4:], "gnd": [known, known]}
    (tmp_path / "r/gnd_rparis6k.pkl").write_bytes(pickle.dumps(truth))
    said, can = look(tmp_path / "r")
    assert can == {"probes.py retrieval"} and "2 queries, 4 images" in said and "20 x 30" in said

    write_pictures(tmp_path / "mini/images", 100)
    lines = ["filename,label", *(f"{i:03d}.jpg,n0{i % 5}" for i in range(100))]
    (tmp_path / "mini/test.csv").write_text("\n".join(lines))
    (tmp_path / "words.txt").write_text("n00\tentity, thing\nn01\tbird\n")
    said, can = look(tmp_path / "mini")
    assert can == {"probes.py fewshot"} and "100 images, 5 classes; the whole set has 12,000" in said
    assert "n00 (entity), n01 (bird), n02" in said and "20 images each" in said
    (tmp_path / "two.txt").write_text("n01\nn09\n")
    said, _ = look(tmp_path / "mini", "--classes", tmp_path / "two.txt")
    assert "no image of n09, which --classes names" in said


@pytest.mark.slow
def test_the_contact_sheet(look, tmp_path):
    root = write_layout(tmp_path / "voc", "voc", 9, 9)
    said, _ = look(root, "--sheet", tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert f"look at {tmp_path / 'sheet.png'}" in said and min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500        # photos, and masks painted on them
    assert "2: --sheet" in look(root, "--sheet", tmp_path / "sheet.doc")[0]


# ------------------------------------------------- broken ones
def test_the_wrong_level(look, tmp_path):
    """A folder above the set, or within it."""
    write_layout(tmp_path / "all/coco", "coco", 5, 5)
    write_layout(tmp_path / "all/nette", "folder", 20, 10)
    said, can = look(tmp_path / "all")
    assert "sets of their own lie in it, give one of them: coco (coco), nette (folder)" in said
    said, can = look(tmp_path / "all/coco/val2017")
    assert can == OF_PHOTOS and f"this is a part of {tmp_path / 'all/coco'}, coco" in said
    said, can = look(tmp_path / "all/coco/annotations")
    assert not can and "2: no command can run on it, seen as folder" in said and "left out: 2 .json" in said
    said, can = look(tmp_path / "all/nette/val")
    assert f"this is one split of {tmp_path / 'all/nette'}" in said and "probes.py knn" not in can
    said, can = look(tmp_path / "all/nette/train/kite")
    assert f"this is one class of {tmp_path / 'all/nette/train'}" in said and can == OF_PHOTOS


def test_a_missing_split(look, tmp_path):
    coco = write_layout(tmp_path / "coco", "coco", 5, 5)
    (coco / "annotations/instances_val2017.json").unlink()
    said, can = look(coco)
    assert not can and "val2017 NO:" in said and "--split can be train2017" in said
    assert "from {train,val}2017.zip, annotations_trainval2017.zip of https://cocodataset.org" in said
    voc = write_layout(tmp_path / "voc", "voc", 5, 5)
    (voc / "VOC2012/ImageSets/Segmentation/train.txt").unlink()
    said, can = look(voc)
    assert can == {"zeroshot.py"} and "linseg train NO:" in said       # one click needs val only
    folder = write_layout(tmp_path / "folder", "folder", 160, 10)
    shutil.rmtree(folder / "val")
    said, can = look(folder)
    assert can == OF_CLASSES - {"probes.py fewshot"}
    assert "labels are needed, but there is no such split" in said
    assert "--val_split 0.2" in said
    said, can = look(folder / "train")
    assert can == OF_CLASSES and "--val_split 0.2" in said


def test_masks_without_images(look, tmp_path):
    write_labels(tmp_path / "pairs", "pairs")
    photo = sorted((tmp_path / "pairs/images/train").iterdir())[0]
    photo.unlink()
    said, can = look(tmp_path / "pairs")
    assert f"masks without an image: {photo.stem}.png" in said and can == {"probes.py linseg"}
    shutil.rmtree(tmp_path / "pairs/images")
    said, can = look(tmp_path / "pairs")
    assert not can and "linseg train NO:" in said and "no images; expected images/{train,val}" in said
    voc = write_layout(tmp_path / "voc", "voc", 5, 5)
    shutil.rmtree(voc / "VOC2012/JPEGImages")
    said, can = look(voc)
    assert not can and "5 of 5 images are absent" in said and "from VOCtrainval_11-May-2012.tar" in said


def test_masks_in_colour(look, tmp_path):
    """As a drawing program, or a careless converter, writes them."""
    root = write_layout(tmp_path / "voc", "voc", 5, 5)
    for path in (root / "VOC2012").glob("Segmentation*/*.png"):
        Image.open(path).convert("RGB").save(path)
    said, can = look(root)
    assert not can and "has colours; expected a palette or grey PNG of numbers" in said
    davis = write_layout(tmp_path / "davis", "davis", 1, 1)
    for path in davis.glob("Annotations/480p/*/*.png"):
        Image.open(path).convert("RGB").save(path)
    said, can = look(davis)
    assert not can and "val NO:" in said and "has colours" in said


def test_an_empty_class(look, tmp_path):
    root = write_layout(tmp_path / "a", "folder", 160, 20)
    for path in (root / "val/kite").iterdir():
        path.unlink()
    said, can = look(root)
    assert "no image in val/kite" in said and "finetune.py" in can
    for path in (root / "train/fish").iterdir():
        path.unlink()
    said, can = look(root)
    assert "no image in train/fish, val/kite" in said and "train has no fish" in said
    assert can == OF_PHOTOS


def test_half_unpacked(look, tmp_path):
    """ImageNet's archive of archives; half of COCO's photos; a download that broke off."""
    folder = write_layout(tmp_path / "in1k", "folder", 20, 10)
    for path in (folder / "train/n01558993.tar", folder / "val.zip"):
        path.write_bytes(b"x")
    said, can = look(folder)
    assert f"not unpacked in {folder}: val.zip" in said and "n01558993.tar" in said
    assert "left out: 1 .tar" in said
    coco = write_layout(tmp_path / "coco", "coco", 6, 6)
    for path in sorted((coco / "val2017").iterdir())[3:]:
        path.unlink()
    said, can = look(coco)
    assert not can and "3 of 6 images are absent, such as" in said
    davis = write_layout(tmp_path / "davis", "davis", 1, 2)
    shutil.rmtree(next(davis.glob("Annotations/480p/toy-val-*")))
    said, can = look(davis)
    assert can == {"davis.py"} and "--split train" in said and "val NO:" in said
    assert "Annotations/480p/toy-val-" in said
    photos = tmp_path / "photos"
    write_pictures(photos, 12)
    (photos / "000.jpg").write_bytes(b"")
    said, can = look(photos)
    assert can == OF_PHOTOS and "unreadable 1 of 12, such as" in said
    assert "000.jpg: not a readable image" in said


def test_imagenets_test_images_beside_each_other(look, tmp_path):
    root = write_layout(tmp_path / "in1k", "folder", 20, 10)
    shutil.rmtree(root / "val")
    write_pictures(root / "val", 3)
    for path in (root / "val").iterdir():
        path.rename(path.with_name(f"ILSVRC2012_val_{path.name}"))
    said, can = look(root)
    assert "docs/DATA.md says how to sort them" in said and "probes.py knn" not in can


def test_wrong_words(look, tmp_path):
    for path, more, said in ((tmp_path / "none", (), "no such folder, and not one of toy, cifar10"),
                             (tmp_path, ("--as", "voc"), "no PASCAL VOC"),
                             (tmp_path, ("--as", "davis"), "no such list"),
                             (tmp_path, ("--as", "ade20k"), "expected images/{training,validation}"),
                             (tmp_path, ("--as", "coco", "--classes", "in100"), "seen as coco"),
                             ("pets", ("--data_root", tmp_path), "add --download"),
                             ("cars", ("--data_root", tmp_path, "--download"), "original URL is broken")):
        text, can = look(path, *more)
        assert " 2: " in text and said in text and not can


@pytest.mark.slow
def test_the_command_line(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    command = [sys.executable, "data.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("data.py: no command can run on it, seen as folder: ")


# ------------------------------------------------- --classes
@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 classes named by WordNet ids, one image each of train and val; ImageNet-100's are among them."""
    root = tmp_path_factory.mktemp("in1k")
    chosen = data.chosen_classes("in100")
    others = random.Random(0).sample(range(10_000_000, 99_999_999), 900)
    names = [*chosen, *(f"n{number}" for number in others)]
    assert len(set(names)) == 1000
    image = Image.fromarray(scene(0, size=16).image)
    image.save(root / "image.png")
    content = (root / "image.png").read_bytes()
    (root / "image.png").unlink()
    for split in ("train", "val"):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            (folder / f"{name}_1.png").write_bytes(content)
    return root


@pytest.mark.slow
def test_in100_is_chosen_from_a_thousand_classes(thousand, tmp_path, capsys, monkeypatch, look):
    """In pretraining and in k-NN, each with a line that says so; list and content belong to the run."""
    chosen = data.chosen_classes("in100")
    words = [*TINY, "--data", str(thousand), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]

    def slowly(*args, **more):
        time.sleep(1.2)
        return data.open_images(*args, **more)
    monkeypatch.setattr(pretrain, "open_images", slowly)
    pretrain.main(pretrain.get_args([*words, "--classes", "in100"]))
    assert f"{thousand}: 100 images, 100 classes; listed in 1 s" in capsys.readouterr().out
    monkeypatch.undo()
    stored = torch.load(tmp_path / "out/last.pth", weights_only=True)["options"]
    assert stored["classes"] == "in100" and stored["images"].startswith("100 (")
    with pytest.raises(Mistake, match="--classes in100 -> None, .*--images 100 .* -> 1000 "):
        pretrain.main(pretrain.get_args(words))
    another = next(path.name for path in (thousand / "train").iterdir() if path.name not in chosen)
    monkeypatch.setattr(data, "chosen_classes", lambda given: [*chosen[1:], another])
    with pytest.raises(Mistake, match="holds a run with other options: --images 100 .* -> 100 "):
        pretrain.main(pretrain.get_args([*words, "--classes", "in100"]))
    monkeypatch.undo()

    capsys.readouterr()
    knn = f"knn {RANDOM} --size 16 --num_workers 0 --device cpu --data".split()
    probes.main(probes.get_args([*knn, str(thousand), "--classes", "in100"]))
    said = capsys.readouterr().out
    assert "train: 100 images, 100 classes" in said and "test: 100 images, 100 classes" in said
    assert "train 100 images, 100 classes" in look(thousand, "--classes", "in100")[0]


def test_every_script_that_reads_class_folders_chooses(thousand, tmp_path):
    chosen = sorted(data.chosen_classes("in100"))
    common = ["--data", str(thousand), "--classes", "in100"]
    for probe in ("knn", "layers", "variance", "fewshot"):
        args = probes.get_args([probe, *RANDOM.split(), *common])
        for images in probes.open_sources(args):
            assert images.classes == chosen and len(images) == 100
    args = finetune.get_args([*RANDOM.split(), *common])
    for images in classifier.open_pair(args):
        assert images.classes == chosen and len(images) == 100
    assert "classes" in finetune.PROTOCOL and "classes" not in finetune.MAY_CHANGE | pretrain.MAY_CHANGE


def test_wrong_lists_are_mistakes(thousand, tmp_path):
    path = tmp_path / "list.txt"
    args = Namespace(data=str(thousand), classes=str(path), data_root="data", download=False, val_data=None)
    known = data.chosen_classes("in100")[:2]
    for content, said in (([*known, "tench"], "1 of 3 classes asked for have no images here, such as tench"),
                          (known[:1], "names 1 classes; expected two or more"),
                          ([], "names 0 classes")):
        path.write_text("\n".join(content))
        with pytest.raises(Mistake, match=said):
            data.open_images(args)
    path.write_bytes(b"\xff\xfe\x00\n\x80\n")                          # no text
    with pytest.raises(Mistake, match="2 of 2 classes asked for have no images here"):
        data.open_images(args)
    path.unlink()
    with pytest.raises(Mistake, match="cannot be read"):
        data.open_images(args)
    for name in ("toy", "pets"):
        with pytest.raises(Mistake, match=f"--data {name} is no folder"):
            data.open_images(Namespace(data=name, classes="in100", data_root="data", download=False))
