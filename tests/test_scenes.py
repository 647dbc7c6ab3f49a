"""Proves: masks equal pycocotools' to the pixel; every layout is read as the toy world wrote it; what is
broken, odd or foreign in an annotation file is named, counted or refused, in one line."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as official

import scenes
import toy
from data import ToyImages
from run import Mistake
from scenes import Coco, ToyScenes, Voc
from studies import layouts


def smooth_masks(n, size, seed=0):
    """(n, size, size) bool: random blobs, none of them empty."""
    x = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size=(size, size), mode="bicubic")[:, 0]
    return x > x.flatten(1).quantile(0.7, dim=1)[:, None, None]


# ------------------------------------------------- masks
def officially(segmentation, h, w):
    rle = official.frPyObjects(segmentation, h, w)
    return official.decode(official.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def assert_close(mine, theirs):
    """IoU >= 0.99 above 32x32 pixels, below it at most one pixel off the boundary."""
    if theirs.sum() > 32 * 32:
        assert (mine & theirs).sum() >= 0.99 * (mine | theirs).sum()
    t = torch.from_numpy(theirs)[None].float()
    grown = F.max_pool2d(t, 3, 1, 1)[0] > 0
    shrunk = -F.max_pool2d(-t, 3, 1, 1)[0] > 0
    m = torch.from_numpy(mine)
    assert not (m & ~grown).any() and not (shrunk & ~m).any()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_every_real_annotation_equals_pycocotools(real_data, split):
    content = json.loads((real_data / f"coco/annotations/instances_{split}.json").read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    same = 0
    for a in content["annotations"]:
        h, w = sizes[a["image_id"]]
        mine = scenes.segmentation_mask(a["segmentation"], h, w)
        theirs = officially(a["segmentation"], h, w)
        if isinstance(a["segmentation"], dict):
            assert (mine == theirs).all()
        assert_close(mine, theirs)
        same += (mine == theirs).all()
        assert (scenes.rle_mask(official.encode(np.asfortranarray(theirs, np.uint8))) == theirs).all()
    assert same == len(content["annotations"])  # to the pixel, in fact


def test_any_polygon_equals_pycocotools():
    rng = np.random.default_rng(0)
    for i in range(200):  # crossing itself, leaving the image, spikes
        h, w = rng.integers(5, 70, 2)
        rings = []
        for n in rng.integers(3, 9, 1 + i % 3):
            rings.append((rng.uniform(-0.2, 1.2, (n, 2)) * (w, h)).ravel().round(2).tolist())
        assert (scenes.polygon_mask(rings, h, w) == officially(rings, h, w)).all()
    square = [2, 1, 6, 1, 6, 4, 2, 4]
    mask = scenes.polygon_mask([square, [7.0, 4.0, 9.0, 4.0, 9.0, 5.0, 7.0, 5.0]], 6, 10)
    assert mask[1:4, 2:6].all() and mask[4, 7:9].all() and mask.sum() == 14
    assert not scenes.polygon_mask([[1, 1, 5, 5]], 9, 9).any()
    assert not scenes.polygon_mask([[]], 9, 9).any()


def test_corners_far_outside_are_cut_off():
    """What is left is what pycocotools draws of the whole polygon, but for a rounded edge."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        h, w = rng.integers(20, 70, 2)
        ring = (rng.uniform(-15, 15, (6, 2)) * (w, h)).ravel().round(2).tolist()
        assert_close(scenes.polygon_mask([ring], h, w), officially([ring], h, w))
    tracemalloc.start()
    everything = [-3e8, -2e8, 2e8, -2e8, 2e8, 3e8, -1e8, 3e8]
    assert scenes.polygon_mask([everything], 30, 40).all()
    assert not scenes.polygon_mask([[1e8, 1e8, 2e8, 1e8, 2e8, 2e8]], 30, 40).any()
    assert scenes.polygon_mask([[-1e8, 0, 20, 0, 20, 1e8, -1e8, 1e8]], 30, 40)[:, :20].all()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_run_lengths_equal_pycocotools():
    for seed, size in enumerate((1, 7, 64, 301)):
        mask = (torch.rand(size, size + 3, generator=torch.Generator().manual_seed(seed)) > 0.6).numpy()
        mask[: size // 2, : size // 2] = True  # long runs: differences of many characters
        rle = official.encode(np.asfortranarray(mask, np.uint8))
        assert (scenes.rle_mask(rle) == mask).all()
        assert (scenes.rle_mask(rle | {"counts": rle["counts"].decode()}) == mask).all()
        assert (scenes.rle_mask(layouts.run_lengths(mask)) == mask).all()


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"size": [2, 2], "counts": [1, 2]}, "cover 3 pixels of 2x2"),
        ({"size": [2, 2], "counts": "1 "}, "character"),
        ({"size": [2, 2], "counts": "P"}, "end within"),
        ({"size": [2, 2], "counts": [5, -1]}, "cover"),
        ({"size": [2, 2]}, "counts"),
        ({"size": [2, 2], "counts": [1, None]}, "no whole numbers"),
        ({"size": [2, 2], "counts": [10**30]}, "no whole numbers"),
        (
            {"size": [2000000, 2000000], "counts": [4000000000000]},
            r"size \[2000000, 2000000\] in an image of",
        ),
        ([[1, 2, 3]], "3 coordinates"),
        (None, "neither"),
        ([1, 2, 3, 4], "neither"),  # a box
        ([[0, 0, float("nan"), 1, 1, 1]], "no number"),
        ([[0, 0, float("inf"), 1, 1, 1]], "infinite"),
    ],
)
def test_broken_segmentations_are_named(broken, words):
    with pytest.raises(ValueError, match=words):
        scenes.segmentation_mask(broken, 2, 2)


def test_one_polygon_without_its_list_is_a_polygon():
    ring = [2, 1, 6, 1, 6, 4, 2, 4]
    flat = scenes.segmentation_mask(ring, 6, 10)
    assert flat.sum() == 12 and (flat == scenes.segmentation_mask([ring], 6, 10)).all()


def test_patch_cover_is_the_share_of_each_window():
    masks = smooth_masks(3, 48).float()
    pooled = F.avg_pool2d(masks[:, None], 8).flatten(1)
    assert torch.allclose(scenes.patch_cover(masks > 0, 6, 6), pooled, atol=1e-6)
    assert torch.allclose(scenes.patch_cover(masks[1] > 0, 6, 6), pooled[1], atol=1e-6)
    pooled = F.avg_pool2d(masks[:, None], 8, 4).flatten(1)
    assert torch.allclose(scenes.patch_cover(masks > 0, 11, 11, 2), pooled, atol=1e-6)
    fine = masks[:, :30, :42].repeat_interleave(7, 1).repeat_interleave(5, 2)  # 210 x 210: of whole windows
    pooled = F.avg_pool2d(fine[:, None], (30, 15)).flatten(1)
    assert torch.allclose(scenes.patch_cover(masks[:, :30, :42] > 0, 7, 14), pooled, atol=1e-5)
    half = torch.tensor([[True, False]])
    assert scenes.majority(scenes.patch_cover(half, 1, 1)).item()


# ------------------------------------------------- layouts
def write_toy(layout, path, n):
    layouts.main(layouts.get_args(["--out", str(path), "--layout", layout, "--n", "0", "--n_val", str(n)]))


def same(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_coco_and_voc_give_what_the_toy_world_wrote(tmp_path):
    for layout in ("coco", "voc"):
        write_toy(layout, tmp_path / layout, 16)
    truth = ToyScenes(ToyImages("val", 16))
    coco = Coco(tmp_path / "coco")
    crowded = Coco(tmp_path / "coco", crowd=True)
    voc = Voc(tmp_path / "voc")
    names = dict(zip(scenes.VOC_NAMES, toy.CLASSES, strict=False))
    for i in range(16):
        exact = truth.classes(i)
        assert same(exact, crowded.classes(i))
        assert same(exact, {names[k]: mask for k, mask in voc.classes(i).items()})
        assert len(list(voc.objects(i))) == len(list(truth.objects(i)))
    assert coco.left_out["crowd regions"] > 0 and not crowded.left_out and len(coco.categories) == 10
    assert (
        f"COCO val2017: 16 images, 10 classes; left out: {coco.left_out['crowd regions']} crowd" in coco.about
    )
    assert coco.name(0) == "000000000001.jpg" and coco.read(0).shape == (3, 64, 64)
    for path in (tmp_path / "voc/VOC2012/SegmentationObject").iterdir():  # SBD has class masks only
        path.unlink()
    assert [name for name, _ in Voc(tmp_path / "voc/VOC2012", limit=3).objects(2)] == sorted(
        voc.classes(2), key=scenes.VOC_NAMES.index
    )
    assert len(ToyScenes(truth.images, 3)) == 3 and "3 images, 10 classes" in ToyScenes(truth.images, 3).about


SQUARE = [[10, 10, 40, 10, 40, 30, 10, 30]]


def small_coco(path, write=lambda text: text.encode(), **changed):
    """A COCO folder of two 40x60 images with one square each, and changes to its JSON."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 3, "segmentation": SQUARE} for i in (1, 2)
        ],
        "categories": [{"id": 3, "name": "box"}, {"id": 5, "name": "unseen"}],
    } | changed
    content = {k: v for k, v in content.items() if v is not None}
    (path / "annotations").mkdir(parents=True)
    (path / "val2017").mkdir()
    text = json.dumps(content, ensure_ascii=False)
    (path / "annotations/instances_val2017.json").write_bytes(write(text))
    for i in (1, 2):
        noise = np.random.default_rng(i).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(noise).save(path / f"val2017/{i}.png")
    return path


def note(i, **changed):
    return {"id": 10 + i, "image_id": i, "category_id": 3, "segmentation": SQUARE} | changed


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(annotations=None), "lacks annotations"),
        (dict(images=[]), "no image is listed"),
        (
            dict(images=[{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 4} for i in range(7)]),
            "7 of 7 images are absent",
        ),
        (
            dict(categories=[{"id": 4, "name": "other"}]),
            "annotation 11 of image 1: lacks, or does not know, 3",
        ),
        (
            dict(annotations=[{"id": 8, "image_id": 1, "category_id": 3}]),
            "annotation 8 of image 1: .*segmentation",
        ),
        (
            dict(annotations=[note(1, segmentation=[]), note(2, segmentation=[])]),
            "2 objects have a box and no mask",
        ),
        (dict(images=[3]), "not COCO's layout: images need file_name, id, found 3"),
        (dict(categories=[{"id": 3}]), "not COCO's layout: categories need id, name"),
        (
            dict(images=[{"id": 1, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]),
            "id 1 belongs to 1.png and to 2.png",
        ),
        (dict(categories=[{"id": 3, "name": "a"}, {"id": "3", "name": "b"}]), "id 3 belongs to a and to b"),
        (
            dict(annotations=[note(1, image_id="x1.png")]),
            "no annotation belongs to a listed image: .*'x1.png'",
        ),
    ],
)
def test_bad_coco_files_are_named(tmp_path, changed, words):
    with pytest.raises(Mistake, match=words) as e:
        Coco(small_coco(tmp_path / "c", **changed))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(annotations=[note(1, id=8, segmentation=[[1, 2, 3]])]), "8 of image 1: .*coordinates"),
        (
            dict(annotations=[note(1, id=8, segmentation=[[1, 2, 3, 4, float("nan"), 0]])]),
            "8 of image 1: .*number",
        ),
        (dict(annotations=[note(1, segmentation={"size": [60, 40], "counts": [2400]})]), r"size \[60, 40\]"),
        (
            dict(images=[{"id": 1, "file_name": "1.png", "height": 10**6, "width": 10**6}]),
            "has height 1000000",
        ),
        (dict(images=[{"id": 1, "file_name": "1.png", "width": 60}]), "has height None"),
    ],
)
def test_bad_objects_are_named_when_they_are_read(tmp_path, changed, words):
    with pytest.raises(Mistake, match=words):
        list(Coco(small_coco(tmp_path / "c", **changed)).objects(0))


def test_ids_may_be_numbers_or_text(tmp_path):
    notes = [note(1, image_id="1", category_id="3"), note(2, image_id="0002")]
    coco = Coco(small_coco(tmp_path / "c", annotations=notes))
    assert [[name for name, _ in coco.objects(i)] for i in (0, 1)] == [["box"], ["box"]]
    assert not coco.left_out


def test_odd_annotations_are_left_out_and_counted(tmp_path):
    notes = [
        note(1),
        note(1, iscrowd=1, segmentation={"size": [40, 60], "counts": [2400]}),
        note(1, image_id=77),
        note(1, segmentation=[]),
    ]
    coco = Coco(small_coco(tmp_path / "c", annotations=notes))
    assert len(list(coco.objects(0))) == 1
    assert coco.left_out == {
        "crowd regions": 1,
        "annotations of unlisted images": 1,
        "boxes without a mask": 1,
    }
    assert coco.about.endswith("1 annotations of unlisted images, 1 boxes without a mask, 1 crowd regions")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotation_files_of_any_unicode(tmp_path, encoding):
    path = small_coco(
        tmp_path / "c",
        lambda text: text.encode(encoding),
        categories=[{"id": 3, "name": "苹果"}, {"id": 5, "name": "Äpfel"}],
    )
    assert Coco(path).categories == ["苹果", "Äpfel"]


def test_files_in_folders_and_images_without_annotations(tmp_path):
    path = small_coco(
        tmp_path / "c",
        images=[{"id": i, "file_name": f"cam 1/{i}.png", "height": 40, "width": 60} for i in (20, 7)],
        annotations=[note(7)],
    )
    (path / "val2017/cam 1").mkdir()
    for i, name in ((1, "20.png"), (2, "7.png")):
        (path / f"val2017/{i}.png").rename(path / "val2017/cam 1" / name)
    coco = Coco(path)
    assert [coco.name(i) for i in (0, 1)] == ["cam 1/20.png", "cam 1/7.png"]
    assert list(coco.classes(0)) == [] and list(coco.classes(1)) == ["box"]


def test_photos_are_not_turned_by_exif(tmp_path):
    """Masks describe the stored pixels, and a photo that is upside down has the same sides."""
    path = small_coco(tmp_path / "c")
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[10:30, 10:40] = 200
    exif = Image.Exif()
    exif[0x112] = 3
    for name, options in (("1.png", {}), ("2.jpg", {"quality": 95})):
        Image.fromarray(upright).save(path / "val2017" / name, exif=exif, **options)
    (path / "val2017/2.jpg").rename(path / "val2017/2.png")
    coco = Coco(path)
    for i in (0, 1):
        assert (coco.read(i)[0].numpy()[next(coco.objects(i))[1]] > 150).all()


def test_masks_of_another_form_are_refused():
    scenes.check_sides("x", (427, 640), (427, 640))
    scenes.check_sides("a smaller copy", (160, 240), (427, 640))
    scenes.check_sides("a larger photo", (3999, 6000), (427, 640))
    with pytest.raises(Mistake, match="640 x 427 pixels, its masks are 427 x 640"):
        scenes.check_sides("x.jpg", (427, 640), (640, 427))


def test_voc_lists_of_paths(tmp_path):
    """DeepLab's trainaug.txt names images and masks."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (30, 20)).save(root / f"JPEGImages/{i}.jpg")
        for folder, number in (("SegmentationClass", 1), ("SegmentationClassAug", 2)):
            mask = np.zeros((20, 30), np.uint8)
            mask[5:15, 5:15] = number
            Image.fromarray(mask).save(root / folder / f"{i}.png")
    lists = root / "ImageSets/Segmentation"
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in range(2)]
    (lists / "trainaug.txt").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    (lists / "val.txt").write_text("2\r\n")
    (lists / "odd.txt").write_text("a b c\n")
    aug = Voc(tmp_path, "trainaug")
    assert len(aug) == 2 and aug.name(1) == "1.jpg" and list(aug.classes(1)) == ["bicycle"]
    assert list(Voc(tmp_path).classes(0)) == ["aeroplane"]
    with pytest.raises(Mistake, match="odd.txt: 'a b c': expected a name, or the paths"):
        Voc(tmp_path, "odd")
    with pytest.raises(Mistake, match="--split can be odd, trainaug, val"):
        Voc(tmp_path, "nope")
    (root / "JPEGImages/1.jpg").unlink()
    with pytest.raises(Mistake, match="1 of 2 images are absent"):
        Voc(tmp_path, "trainaug")


@pytest.mark.slow
def test_a_large_photo_holds_one_mask_at_a_time(tmp_path):
    """150 objects on 4 megapixels: as bytes together they were 600 MB."""
    rings = [[x, 40, x + 200, 40, x + 200, 400, x, 400] for x in range(0, 1500, 10)]
    path = small_coco(
        tmp_path / "c",
        images=[{"id": 1, "file_name": "1.png", "height": 2000, "width": 2000}],
        annotations=[note(1, segmentation=[ring]) for ring in rings],
    )
    coco = Coco(path)
    tracemalloc.start()
    assert sum(int(mask.sum()) for _, mask in coco.objects(0)) == 150 * 200 * 360
    assert list(coco.classes(0)) == ["box"]
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
