"""Proves: the toy world is a function of seed and index and stays what it was, its truth fits its pictures,
its videos keep their objects, its class cannot be read from colour, and studies/layouts.py writes the layouts
that it names, with exact truth."""
import json

import numpy as np
import pytest
from PIL import Image

import toy
from run import Mistake
from studies import layouts


# ------------------------------------------------- the world
def test_scenes_are_a_function_of_seed_split_and_index():
    a, b = toy.scene(7), toy.scene(7)
    assert (a.image == b.image).all() and (a.instances == b.instances).all() and a.categories == b.categories
    for other in (toy.scene(8), toy.scene(7, seed=1), toy.scene(7, split="val")):
        assert (a.image != other.image).any()
    assert toy.scene(7, size=(48, 80)).image.shape == (48, 80, 3)


def quarters(image):
    """Mean colour (4, 3) of the quarters of an image: upper left, upper right, lower left, lower right."""
    halves = np.split(image, 2, axis=0)
    return [part.mean((0, 1)) for half in halves for part in np.split(half, 2, axis=1)]


@pytest.mark.parametrize("options, categories, areas, colours", [
    (dict(index=0), [0, 0], [2412, 912, 772],
     [[119.91, 130.74, 147.45], [102.91, 139.71, 124.9], [102.23, 133.35, 112.04], [121.96, 122.22, 141.56]]),
    (dict(index=4, seed=3, split="val"), [4, 4], [2363, 744, 989],
     [[160.46, 131.56, 116.4], [168.15, 108.1, 122.91], [150.28, 109.75, 114.73], [151.19, 135.43, 113.73]]),
    (dict(index=29, split="test", size=32), [1, 9, 9], [598, 23, 178, 225],
     [[103.45, 144.09, 85.99], [120.25, 145.54, 150.66], [100.99, 152.98, 137.35], [89.75, 137.5, 85.79]]),
    (dict(index=17, seed=1, size=(48, 80)), [7, 6], [2631, 1078, 131],
     [[104.1, 143.87, 89.24], [97.24, 141.09, 97.05], [90.27, 153.18, 103.38], [103.21, 151.11, 108.2]]),
])
def test_scenes_stay_what_they_were(options, categories, areas, colours):
    """Published numbers rest on them.  Not a hash, since another processor may round some value otherwise."""
    s = toy.scene(**options)
    assert s.categories == categories
    assert np.abs(np.bincount(s.instances.ravel()) - areas).max() <= 1
    assert np.abs(quarters(s.image) - np.array(colours)).max() < 0.02


@pytest.mark.parametrize("options, areas, colours", [
    (dict(index=0), [6035, 326, 180, 381, 246],
     [[149.94, 109.68, 179.64], [159.58, 122.12, 164.41], [142.0, 99.67, 153.66], [145.66, 104.43, 170.83]]),
    (dict(index=5, seed=2, size=(48, 80)), [3290, 146, 112, 141, 151],
     [[98.12, 131.44, 151.97], [109.22, 140.38, 174.36], [102.21, 136.7, 165.29], [99.94, 141.84, 163.91]]),
])
def test_videos_stay_what_they_were(options, areas, colours):
    images, ids = toy.video(frames=3, **options)
    assert np.abs(np.bincount(ids[-1].ravel()) - areas).max() <= 1
    assert np.abs(quarters(images[-1]) - np.array(colours)).max() < 0.02


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'valid': have train, val, test"):
        toy.scene(0, split="valid")


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


def nearest_accuracy(train, train_labels, val, val_labels, k=10):
    """Percent of val whose class has the most votes of its k nearest neighbours, by cosine."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    val = val / np.linalg.norm(val, axis=1, keepdims=True)
    nearest = np.argsort(-val @ train.T, axis=1)[:, :k]
    votes = np.eye(len(toy.CLASSES))[train_labels[nearest]].sum(1)
    return 100 * (votes.argmax(1) == val_labels).mean()


@pytest.mark.slow
def test_class_is_not_readable_from_colour():
    """10-NN on raw pixels at 16x16 and on joint colour histograms: under 35 % (chance 10)."""
    pixels, colours, labels = {}, {}, {}
    for split, n in (("train", 600), ("val", 200)):
        scenes = [toy.scene(i, split=split) for i in range(n)]
        images = np.stack([s.image for s in scenes]) / 255                           # (n, 64, 64, 3)
        small = images.reshape(n, 16, 4, 16, 4, 3).mean((2, 4))
        pixels[split] = small.reshape(n, -1) - 0.5
        bins = (images * 3.999).astype(int) @ np.array([16, 4, 1])                   # (n, 64, 64), 64 bins
        colours[split] = np.stack([np.bincount(b.ravel(), minlength=64) for b in bins])
        labels[split] = np.array([s.label for s in scenes])
    for x in (pixels, colours):
        assert nearest_accuracy(x["train"], labels["train"], x["val"], labels["val"]) < 35


# ------------------------------------------------- what is written
def write(out, layout, *options):
    layouts.main(layouts.get_args(["--out", str(out), "--layout", layout, *options]))


@pytest.mark.parametrize("layout, wanted", [
    ("coco", ["annotations/instances_val2017.json", "val2017/000000000001.jpg"]),
    ("voc", ["VOC2012/SegmentationClass/toy_val_000000.png", "VOC2012/ImageSets/Segmentation/val.txt"]),
    ("davis", ["Annotations/480p/toy-val-000/00000.png", "ImageSets/2017/val.txt"]),
    ("folder", ["val/candy/000000.png", "train/starfish/000001.png"]), ("sheet", ["sheet.png"])])
def test_layouts(tmp_path, layout, wanted):
    write(tmp_path, layout, "--n", "2", "--n_val", "2", "--size", "32")
    for name in wanted:
        assert (tmp_path / name).is_file(), name
    if layout == "coco":
        truth = json.loads((tmp_path / wanted[0]).read_text())
        assert len(truth["images"]) == 2 and truth["annotations"]
    if layout == "voc":
        s, mask = toy.scene(0, split="val", size=32), np.array(Image.open(tmp_path / wanted[0]))
        inside = (mask != 255) & (s.instances > 0)
        assert (mask[inside] == np.array([0, *s.categories])[s.instances][inside] + 1).all()
    if layout == "davis":
        _, instances = toy.video(1_000_000, size=(32, 56))
        mask = Image.open(tmp_path / wanted[0])
        assert (np.array(mask) == instances[0]).all()
        assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]              # PASCAL VOC's colours


def test_coco_truth_is_that_of_the_scenes(tmp_path):
    """pycocotools reads each annotation back as the very mask; there are polygons, run lengths and crowds."""
    from pycocotools import mask as official

    layouts.write_coco(tmp_path, "val", 40, 64, 0)
    truth = json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    covered = {image["id"]: np.zeros((64, 64), int) for image in truth["images"]}
    kinds = set()
    for a in truth["annotations"]:
        s = toy.scene(a["image_id"] - 1, split="val")
        runs = a["segmentation"]
        kinds.add(("crowd" if a["iscrowd"] else "one", type(runs).__name__))
        if isinstance(runs, list):
            runs = official.merge(official.frPyObjects(runs, 64, 64))
        else:
            runs = official.frPyObjects(runs, 64, 64)
        mask = official.decode(runs) > 0
        numbers = np.unique(s.instances[mask])
        assert (mask == np.isin(s.instances, numbers)).all() and mask.sum() == a["area"]
        assert {toy.CLASSES[s.categories[k - 1]] for k in numbers} == {names[a["category_id"]]}
        assert (len(numbers) > 1) == bool(a["iscrowd"])
        assert a["bbox"] == official.toBbox(official.encode(np.asfortranarray(mask, np.uint8))).tolist()
        covered[a["image_id"]] += mask
    assert kinds == {("one", "list"), ("one", "dict"), ("crowd", "dict")}
    for number, count in covered.items():                                            # each object once
        assert (count == (toy.scene(number - 1, split="val").instances > 0)).all()


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(Mistake, match="not an empty folder"):
        write(tmp_path / "full", "folder", "--n", "1", "--n_val", "0")
    with pytest.raises(Mistake, match="is a file"):
        write(tmp_path / "full" / "x", "folder")
    with pytest.raises(Mistake, match="'tiff'.*coco"):
        write(tmp_path / "new", "tiff")
    with pytest.raises(Mistake, match="--size.*16 or more"):
        write(tmp_path / "new", "folder", "--size", "8")
    assert not (tmp_path / "new").exists()
    write(tmp_path / "full", "folder", "--n", "1", "--n_val", "0", "--force")
    assert (tmp_path / "full" / "train" / "candy" / "000000.png").is_file()
