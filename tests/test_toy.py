"""Proves: the toy world is a function of seed and index, its truth fits its pictures, its videos keep their
objects, its class cannot be read from colour, and what it writes are the layouts that it names."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import toy
from probes import knn_accuracy


def test_scenes_are_a_function_of_seed_split_and_index():
    a, b = toy.scene(7), toy.scene(7)
    assert (a.image == b.image).all() and (a.instances == b.instances).all() and a.categories == b.categories
    for other in (toy.scene(8), toy.scene(7, seed=1), toy.scene(7, split="val")):
        assert (a.image != other.image).any()
    assert toy.scene(7, size=(48, 80)).image.shape == (48, 80, 3)


def test_truth_fits_the_picture():
    for i in range(40):
        s = toy.scene(i)
        assert set(np.unique(s.instances)) == {*range(1 + len(s.categories))}                # no gap
        assert s.label == i % 10 and s.label in s.categories
        mine = np.isin(s.instances, [k + 1 for k, c in enumerate(s.categories) if c == s.label])
        assert 0.2 < mine.mean() < 0.75 and s.image[mine].std() > s.image[s.instances == 0].std() / 2


def test_videos_keep_their_objects_and_their_colours():
    images, ids = toy.video(3, frames=6)
    again, _ = toy.video(3, frames=6)
    assert images.shape == (6, 64, 112, 3) and (images == again).all()
    assert set(np.unique(ids)) == set(np.unique(ids[0])) and 4 <= len(np.unique(ids)) <= 5
    k = np.bincount(ids[0].ravel())[1:].argmax() + 1
    first, last = (images[t][ids[t] == k].mean(0) for t in (0, -1))
    red_minus_blue = [c[0] - c[2] for c in (first, last)]
    assert abs(red_minus_blue[0] - red_minus_blue[1]) < 30
    assert (images[0] != images[-1]).any(-1).mean() > 0.5


def test_class_is_not_readable_from_colour():
    """10-NN on raw pixels at 16x16 and on joint colour histograms: under 35 % (chance 10)."""
    x, y = {}, {}
    for split, n in (("train", 600), ("val", 200)):
        source = toy.ToyImages(split, n)
        images = torch.stack([source.read(i) for i in range(n)]).float() / 255
        small = torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)
        bins = (images * 3.999).long()
        joint = 16 * bins[:, 0] + 4 * bins[:, 1] + bins[:, 2]
        joint = torch.nn.functional.one_hot(joint, 64).float().mean((1, 2))
        x[split], y[split] = (small - 0.5, joint), torch.tensor(source.labels)
    for train, val in zip(x["train"], x["val"], strict=True):
        normal = torch.nn.functional.normalize
        got = knn_accuracy(normal(train, dim=1), y["train"], normal(val, dim=1), y["val"], [10])[10]
        assert got < 35


@pytest.mark.parametrize("layout, wanted", [
    ("coco", ["annotations/instances_val2017.json", "val2017/000000000001.jpg"]),
    ("voc", ["VOC2012/SegmentationClass/toy_val_000000.png", "VOC2012/ImageSets/Segmentation/val.txt"]),
    ("davis", ["Annotations/480p/toy-val-000/00000.png", "ImageSets/2017/val.txt"]),
    ("folder", ["val/candy/000000.png", "train/starfish/000001.png"]), ("sheet", ["sheet.png"])])
def test_layouts(tmp_path, layout, wanted):
    toy.main(["--out", str(tmp_path), "--layout", layout, "--n", "2", "--n_val", "2", "--size", "32"])
    for name in wanted:
        assert (tmp_path / name).is_file(), name
    if layout == "coco":
        truth = json.loads((tmp_path / wanted[0]).read_text())
        assert len(truth["images"]) == 2 and truth["annotations"]
    if layout == "voc":
        s, mask = toy.scene(0, split="val", size=32), np.array(Image.open(tmp_path / wanted[0]))
        inside = (mask != 255) & (s.instances > 0)
        assert (mask[inside] == np.array([0, *s.categories])[s.instances][inside] + 1).all()


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for argv, said in ((["--out", str(tmp_path / "full"), "--layout", "coco"], "not an empty folder"),
                       (["--out", str(tmp_path / "new"), "--layout", "tiff"], "have coco")):
        with pytest.raises(SystemExit) as e:
            toy.main(argv)
        assert e.value.code == 2 and said in capsys.readouterr().err
