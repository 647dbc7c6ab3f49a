"""Proves: masks equal pycocotools'; the score equals plain loops at any batch size; the densities' overlap
equals the closed form; few-shot equals scikit-learn; every layout is read, every mistake of a user is one
clear line; pictures are drawn.  With MMC_TEST_DATA also on real annotations, images and weights."""

import csv
import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as official
from scipy.stats import norm
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import coco
import toy
import zeroshot
from checkpoint import load_backbone
from data import generator_of, normalize
from model import ViT
from zeroshot import THRESHOLDS


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def blobs(n, size, seed=0):
    """(n, size, size) bool: smooth random shapes, none of them empty."""
    x = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size=(size, size), mode="bicubic")[:, 0]
    return x > x.flatten(1).quantile(0.7, dim=1)[:, None, None]


def run(*words):
    zeroshot.main(zeroshot.get_parser().parse_args([str(w) for w in words]))


def options(**changed):
    args = zeroshot.get_parser().parse_args(["--ckpt", "none", "--toy"])
    zeroshot.check(args)
    vars(args).update(changed)
    return args


@pytest.fixture(scope="module")
def vit():
    return load_backbone("random:vit_micro/8")[0]


# ------------------------------------------------- masks
def officially(segmentation, h, w):
    rle = official.frPyObjects(segmentation, h, w)
    return official.decode(official.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def assert_close(mine, theirs):
    """IoU >= 0.99 above 32x32 pixels, below it at most one pixel off the boundary."""
    if theirs.sum() > 32 * 32:
        assert (mine & theirs).sum() >= 0.99 * (mine | theirs).sum()
    t = torch.from_numpy(theirs)[None].float()
    grown, shrunk = F.max_pool2d(t, 3, 1, 1)[0] > 0, -F.max_pool2d(-t, 3, 1, 1)[0] > 0
    m = torch.from_numpy(mine)
    assert not (m & ~grown).any() and not (shrunk & ~m).any()


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_every_real_annotation_equals_pycocotools(real_data, split):
    content = json.loads((real_data / f"coco/annotations/instances_{split}.json").read_text())
    sizes, same = {i["id"]: (i["height"], i["width"]) for i in content["images"]}, 0
    for a in content["annotations"]:
        h, w = sizes[a["image_id"]]
        mine, theirs = coco.segmentation_mask(a["segmentation"], h, w), officially(a["segmentation"], h, w)
        if isinstance(a["segmentation"], dict):
            assert (mine == theirs).all()
        assert_close(mine, theirs)
        same += (mine == theirs).all()
        assert (coco.rle_mask(official.encode(np.asfortranarray(theirs, np.uint8))) == theirs).all()
    assert same == len(content["annotations"])  # to the pixel, in fact


def test_any_polygon_equals_pycocotools():
    rng = np.random.default_rng(0)
    for i in range(200):  # crossing itself, leaving the image, spikes
        h, w = rng.integers(5, 70, 2)
        rings = [
            (rng.uniform(-0.2, 1.2, (n, 2)) * (w, h)).ravel().round(2).tolist()
            for n in rng.integers(3, 9, 1 + i % 3)
        ]
        assert (coco.polygon_mask(rings, h, w) == officially(rings, h, w)).all()
    square = [2, 1, 6, 1, 6, 4, 2, 4]
    mask = coco.polygon_mask([square, [7.0, 4.0, 9.0, 4.0, 9.0, 5.0, 7.0, 5.0]], 6, 10)
    assert mask[1:4, 2:6].all() and mask[4, 7:9].all() and mask.sum() == 14
    assert not coco.polygon_mask([[1, 1, 5, 5]], 9, 9).any() and not coco.polygon_mask([[]], 9, 9).any()


def test_run_lengths_equal_pycocotools():
    for seed, size in enumerate((1, 7, 64, 301)):
        mask = (torch.rand(size, size + 3, generator=torch.Generator().manual_seed(seed)) > 0.6).numpy()
        mask[: size // 2, : size // 2] = True  # long runs: differences of many characters
        rle = official.encode(np.asfortranarray(mask, np.uint8))
        assert (coco.rle_mask(rle) == mask).all()
        assert (coco.rle_mask(rle | {"counts": rle["counts"].decode()}) == mask).all()
        assert (coco.rle_mask(toy.run_lengths(mask)) == mask).all()


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"size": [2, 2], "counts": [1, 2]}, "cover 3 pixels of 2x2"),
        ({"size": [2, 2], "counts": "1 "}, "character"),
        ({"size": [2, 2], "counts": "P"}, "end within"),
        ({"size": [2, 2], "counts": [5, -1]}, "cover"),
        ({"size": [2, 2]}, "counts"),
        ([[1, 2, 3]], "3 coordinates"),
        (None, "neither"),
        ([1, 2, 3, 4], "neither"),
    ],
)
def test_broken_segmentations_are_named(broken, words):
    with pytest.raises(ValueError, match=words):
        coco.segmentation_mask(broken, 2, 2)


# ------------------------------------------------- layouts
def write_toy(layout, path, n):
    toy.main(["--out", str(path), "--layout", layout, "--n", "0", "--n_val", str(n)])


def test_coco_and_voc_give_what_the_toy_world_wrote(tmp_path):
    for layout in ("coco", "voc"):
        write_toy(layout, tmp_path / layout, 16)
    truth, scenes = coco.ToyScenes(16), coco.Coco(tmp_path / "coco")
    crowded = coco.Coco(tmp_path / "coco", crowd=True)
    voc = coco.Voc(tmp_path / "voc")
    names = {coco.VOC_NAMES[i]: name for i, name in enumerate(toy.CLASSES)}
    for i in range(16):
        masks, kinds = truth.masks(i)
        exact = dict(zip(*reversed(zeroshot.unions(masks, kinds)), strict=True))
        found = dict(zip(*reversed(zeroshot.unions(*crowded.masks(i))), strict=True))
        assert exact.keys() == found.keys() and all(torch.equal(exact[k], found[k]) for k in exact)
        found = dict(zip(*reversed(zeroshot.unions(*voc.masks(i))), strict=True))
        assert {names[k] for k in found} == exact.keys() and len(voc.masks(i)[1]) == len(kinds)
        assert all(torch.equal(exact[names[k]], found[k]) for k in found)
        scenes.masks(i)
    assert scenes.left_out["crowd regions"] > 0 and not crowded.left_out and len(scenes.categories) == 10
    assert scenes.name(0) == "000000000001.jpg" and scenes.read(0).shape == (3, 64, 64)
    for path in (tmp_path / "voc/VOC2012/SegmentationObject").iterdir():  # SBD has class masks only
        path.unlink()
    assert coco.Voc(tmp_path / "voc/VOC2012", limit=3).masks(2)[1] == sorted(
        set(voc.masks(2)[1]), key=coco.VOC_NAMES.index
    )


def small_coco(path, **changed):
    """A COCO folder of two 40x60 images with one square each, and changes to its JSON."""
    square = [[10, 10, 40, 10, 40, 30, 10, 30]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 3, "segmentation": square} for i in (1, 2)
        ],
        "categories": [{"id": 3, "name": "box"}, {"id": 5, "name": "unseen"}],
    } | changed
    (path / "annotations").mkdir(parents=True)
    (path / "val2017").mkdir()
    (path / "annotations/instances_val2017.json").write_text(
        json.dumps({k: v for k, v in content.items() if v is not None})
    )
    for i in (1, 2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), np.uint8)).save(
            path / f"val2017/{i}.png"
        )
    return path


def test_odd_annotations_are_left_out_and_counted(tmp_path):
    square = [[10, 10, 40, 10, 40, 30, 10, 30]]
    notes = [
        {"id": 1, "image_id": 1, "category_id": 3, "segmentation": square},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 5, 5]]},
        {
            "id": 3,
            "image_id": 1,
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [40, 60], "counts": [2400]},
        },
        {"id": 4, "image_id": 77, "category_id": 3, "segmentation": square},
        {"id": 5, "image_id": 1, "category_id": 5, "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]]},
    ]
    path, out = small_coco(tmp_path / "c", annotations=notes), tmp_path / "o.jsonl"
    run(
        "--ckpt",
        "random:vit_micro/8",
        "--coco",
        path,
        "--size",
        48,
        "--json",
        out,
        "--csv",
        tmp_path / "o.csv",
        "--similarity",
        tmp_path / "s.png",
    )
    line = json.loads(out.read_text())  # strict JSON: no NaN in it
    assert line["left_out"] == {
        "annotations of unlisted images": 1,
        "objects of zero area": 1,
        "crowd regions": 1,
    }
    assert line["n_prompts"] == 1 and line["n_skipped"] == 1 and line["n_images"] == 1
    assert line["inter"] is None and line["overlap"] is None and -1 <= line["intra"] <= 1
    rows = list(csv.DictReader(open(tmp_path / "o.csv")))
    assert (
        [r["prompts"] for r in rows] == ["1", "0"] and rows[1]["t0.0"] == "" and float(rows[0]["auto"]) >= 0
    )
    assert Image.open(tmp_path / "s.png").size == (420, 260)


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
            dict(annotations=[{"id": 8, "image_id": 1, "category_id": 3, "segmentation": [[1, 2, 3]]}]),
            "8 of image 1: .*coordinates",
        ),
        (dict(annotations=[]), "no class of 3 or more patches in 2 images"),
        (dict(images=[3]), "not COCO's layout"),
    ],
)
def test_bad_coco_files_are_named(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        run("--ckpt", "random:vit_micro/8", "--coco", small_coco(tmp_path / "c", **changed), "--size", 32)


# ------------------------------------------------- similarity, prompts, masks
def test_patch_cover_is_the_share_of_each_window():
    masks = blobs(3, 48).float()
    assert torch.allclose(
        zeroshot.patch_cover(masks > 0, 6, 6), F.avg_pool2d(masks[:, None], 8).flatten(1), atol=1e-6
    )
    assert torch.allclose(
        zeroshot.patch_cover(masks > 0, 11, 11, 2), F.avg_pool2d(masks[:, None], 8, 4).flatten(1), atol=1e-6
    )
    fine = masks[:, :30, :42].repeat_interleave(7, 1).repeat_interleave(5, 2)  # 210 x 210: of whole windows
    assert torch.allclose(
        zeroshot.patch_cover(masks[:, :30, :42] > 0, 7, 14),
        F.avg_pool2d(fine[:, None], (30, 15)).flatten(1),
        atol=1e-5,
    )
    half = torch.tensor([[[True, False]]])
    assert zeroshot.majority(zeroshot.patch_cover(half, 1, 1)).item()


@pytest.mark.parametrize("P, S", [(8, 8), (8, 4), (14, 7), (7, 7)])
def test_to_pixels(P, S):
    h, w = 5, 7
    maps = unit(2, h * w)
    near, smooth = (zeroshot.to_pixels(maps, (h, w), P, S, kind) for kind in (False, True))
    assert near.shape == smooth.shape == (2, (h - 1) * S + P, (w - 1) * S + P)
    grid = maps.view(2, h, w)
    if P == S:
        assert torch.equal(near, grid.repeat_interleave(P, 1).repeat_interleave(P, 2))
        plain = F.interpolate(grid[:, None], scale_factor=P, mode="bilinear")[:, 0]
        assert torch.allclose(smooth, plain, atol=1e-5)
    c = P // 2  # the pixels around a token's centre
    centres = near[:, c::S, c::S][:, :h, :w]
    assert torch.equal(centres, grid)
    if P % 2:
        assert torch.allclose(smooth[:, c::S, c::S][:, :h, :w], grid, atol=1e-5)


def test_points_lie_in_the_mask_and_do_not_depend_on_their_number():
    truth = blobs(20, 12).flatten(1)
    one, five = (zeroshot.draw_points(truth, n, generator_of(1)) for n in (1, 5))
    assert torch.equal(one, five[:, :1]) and truth.gather(1, five).all()
    assert all(len(set(row)) == 5 for row in five.tolist())
    small = torch.zeros(1, 12, dtype=torch.bool)
    small[0, [3, 7]] = True
    assert sorted(set(zeroshot.draw_points(small, 5, generator_of(1))[0].tolist())) == [3, 7]
    drawn = torch.cat([zeroshot.draw_points(small, 1, generator_of(i)) for i in range(200)])
    assert 60 < (drawn == 3).sum() < 140


def test_centre_is_the_deepest_patch():
    truth = torch.zeros(2, 9, 12, dtype=torch.bool)
    truth[0, 2:7, 3:8] = True
    truth[1] = True  # the image's border counts as an edge
    assert zeroshot.centre_point(truth.flatten(1), (9, 12))[0] == 4 * 12 + 5
    assert zeroshot.centre_point(truth.flatten(1), (9, 12))[1] // 12 == 4


def test_several_prompts():
    z = unit(30, 8)
    cos, points = z @ z.T, torch.tensor([[3, 9], [4, 4]])
    best = torch.maximum(cos[3], cos[9])
    got = zeroshot.similarity_map(z, points)
    assert torch.allclose(got[0], best, atol=1e-6) and torch.allclose(got[1], cos[4], atol=1e-6)
    mean = zeroshot.similarity_map(z, points, combine="mean")
    assert torch.allclose(mean[0], (cos[3] + cos[9]) / 2, atol=1e-6)
    left = zeroshot.take_away(got[:1], z, torch.tensor([[20]]))[0]
    assert left[20] == -1 and left[3] > 0.999 and torch.equal(left == -1, cos[20] > best)
    one = zeroshot.similarity_map(z, points[1:, :1])
    assert torch.equal(zeroshot.take_away(one, z, points[1:, :1]), one)  # a tie is the object's


def test_segment():
    s = torch.tensor([[1.0, 0.9, 0.8, 0.1, 0.0, 0.1, 0.05, 0.1], [1.0, 0.5, 0.4, 0.5, 0.45, 0.4, 0.5, 0.3]])
    assert zeroshot.segment(s).sum(1).tolist() == [3, 1]
    assert zeroshot.segment(s, prompts=2).sum(1).tolist() == [2, 1]
    assert zeroshot.auto_threshold(s)[1, 0].item() == pytest.approx((1 + 4.05 / 8) / 2)
    assert zeroshot.segment(s, 0.45).sum(1).tolist() == [3, 5]
    assert zeroshot.segment(torch.ones(4)).all()  # nothing to tell apart


# ------------------------------------------------- the score
def test_sweep_equals_the_plain_loop():
    g = torch.Generator().manual_seed(0)
    s = (torch.randn(40, 300, generator=g) * 0.4).clamp(-1, 1)
    s[:, ::5] = (s[:, ::5] * 10).round() / 10  # exactly on the thresholds, too
    truth = torch.rand(40, 300, generator=g) > 0.6
    for thresholds in (THRESHOLDS, (0.3,), (-1.0, 0.0, 0.05)):
        plain = torch.stack([zeroshot.iou(s >= t, truth) for t in thresholds], 1)
        assert torch.equal(zeroshot.iou_sweep(s, truth, thresholds), plain)
    loop = [
        sum(a and b for a, b in zip(p, t, strict=True)) / sum(a or b for a, b in zip(p, t, strict=True))
        for p, t in zip((s >= 0.2).tolist(), truth.tolist(), strict=True)
    ]
    assert zeroshot.iou_sweep(s, truth)[:, 2].tolist() == pytest.approx(loop)


def test_prompt_iou_of_perfect_features_is_one():
    scenes = [(torch.zeros(3, 48, 48, dtype=torch.uint8), m[None]) for m in blobs(4, 48)]
    scenes.append((scenes[0][0], torch.zeros(1, 48, 48, dtype=torch.bool)))  # nothing to prompt: left out

    def perfect(image):
        m = next(m for x, m in scenes if x is image)
        inside = zeroshot.majority(zeroshot.patch_cover(m, 6, 6))[0]
        return torch.stack([inside, ~inside], 1).float()

    scenes = [(x.clone(), m) for x, m in scenes]
    got = zeroshot.prompt_iou(perfect, scenes, (6, 6))
    assert got[1:].tolist() == pytest.approx([1.0] * 9) and got[0] < 1
    assert zeroshot.prompt_iou(perfect, scenes[-1:], (6, 6)).isnan().all()


def test_the_four_means_equal_plain_loops(vit, tmp_path):
    """The whole protocol again, on 8 toy scenes, as one would write it down."""
    run("--ckpt", "random:vit_micro/8", "--toy", "--limit", 8, "--size", 64, "--json", tmp_path / "o.jsonl")
    got = json.loads((tmp_path / "o.jsonl").read_text())
    rows, scenes = [], coco.ToyScenes(8)
    for i in range(8):
        masks, names = scenes.masks(i)
        z = zeroshot.patch_features(vit, normalize(scenes.read(i)[None]))[0]
        for target, found in (
            (
                "class",
                [
                    (k, torch.stack([m for m, n in zip(masks, names, strict=True) if n == k]).any(0))
                    for k in sorted(set(names))
                ],
            ),
            ("instance", list(zip(names, masks, strict=True))),
        ):
            truth = [F.avg_pool2d(m[None].float(), 8).flatten() >= 0.5 for _, m in found]
            kept = [(k, t) for (k, _), t in zip(found, truth, strict=True) if t.sum() >= 3]
            if not kept:
                continue
            points = zeroshot.draw_points(
                torch.stack([t for _, t in kept]), 1, generator_of(0, target, scenes.name(i))
            )
            for (k, t), p in zip(kept, points[:, 0].tolist(), strict=True):
                s = z @ z[p]
                rows.append(
                    (
                        target,
                        i,
                        k,
                        [100 * (((s >= x) & t).sum() / ((s >= x) | t).sum()).item() for x in THRESHOLDS],
                    )
                )

    def mean(x):
        return sum(x) / len(x)

    for j, t in enumerate(f"{t:.1f}" for t in THRESHOLDS):
        of = [(i, k, v[j]) for target, i, k, v in rows if target == "class"]
        by = {
            c: mean([mean([r[2] for r in of if r[c] == key]) for key in {r[c] for r in of}]) for c in (0, 1)
        }
        assert got["miou"][t] == pytest.approx(by[0], abs=1e-2)
        assert got["miou_category"][t] == pytest.approx(by[1], abs=1e-2)
        assert got["miou_pairs"][t] == pytest.approx(mean([r[2] for r in of]), abs=1e-2)
        assert got["miou_instance"][t] == pytest.approx(
            mean([v[j] for target, _, _, v in rows if target == "instance"]), abs=1e-2
        )
    assert got["best"] == max(got["miou"].values()) == got["miou"][f"{got['best_threshold']:.1f}"]
    assert got["n_prompts"] == sum(r[0] == "class" for r in rows)


def values(result):
    return torch.tensor([[*r[3].tolist(), r[4]] for r in result.rows]), [r[:3] for r in result.rows]


def test_the_result_does_not_depend_on_batch_or_limit(vit):
    device = torch.device("cpu")
    all_at_once = zeroshot.evaluate(vit, coco.ToyScenes(6), 64, device, options(batch_size=8))
    one_by_one = zeroshot.evaluate(vit, coco.ToyScenes(6), 64, device, options(batch_size=1))
    three = zeroshot.evaluate(vit, coco.ToyScenes(3), 64, device, options(batch_size=2))
    (a, keys), (b, others), (c, first) = map(values, (all_at_once, one_by_one, three))
    assert keys == others and first == keys[: len(first)]
    assert (a - b).abs().max() < 0.05 and (
        a[: len(c)] - c
    ).abs().max() < 0.05  # a patch on the threshold may flip
    assert (all_at_once.counts - one_by_one.counts).abs().sum() < 20


def test_classes_without_an_instance_that_is_large_enough(vit, capsys):
    result = zeroshot.evaluate(vit, coco.ToyScenes(6), 64, torch.device("cpu"), options())
    result.rows = [r for r in result.rows if r[0] == "class"]
    summary = zeroshot.summarize(result, coco.ToyScenes(6), options())
    assert "miou_instance" not in summary and summary["best"] == max(summary["miou"].values())
    zeroshot.say(summary, 3)
    assert "instances  no target of 3 or more patches" in capsys.readouterr().out


def test_masks_of_another_form_are_refused(vit):
    zeroshot.check_sides("x", (427, 640), (427, 640))
    zeroshot.check_sides("a smaller copy", (160, 240), (427, 640))
    zeroshot.check_sides("a larger photo", (3999, 6000), (427, 640))
    with pytest.raises(ValueError, match="640 x 427 pixels, its masks 427 x 640"):
        zeroshot.check_sides("x.jpg", (427, 640), (640, 427))
    scenes = coco.ToyScenes(1)
    scenes.read = lambda i: torch.zeros(3, 64, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="its masks 64 x 64"):
        zeroshot.evaluate(vit, scenes, 64, torch.device("cpu"), options())


def test_stride_pixels_and_points(vit):
    device, scenes = torch.device("cpu"), coco.ToyScenes(2)
    for changed in (
        dict(stride=4),
        dict(stride=4, truth="pixel", upsample=True),
        dict(truth="pixel"),
        dict(prompt="center"),
        dict(points=5, background_points=3, combine="mean"),
        dict(target="instance"),
    ):
        v, keys = values(zeroshot.evaluate(vit, scenes, 64, device, options(**changed)))
        assert len(v) and v.isfinite().all() and (v >= 0).all() and (v <= 1).all()
        assert vit.patch_embed.stride == 8
    whole = zeroshot.evaluate(vit, scenes, 64, device, options())
    pixel = zeroshot.evaluate(vit, scenes, 64, device, options(truth="pixel"))
    assert (values(whole)[0] - values(pixel)[0]).abs().mean() < 0.08  # the same masks, a finer truth
    g, G = 8, 15
    p = torch.tensor([0, 7, 9, 63])  # corner, corner, (1, 1), corner
    assert zeroshot.on_tokens(p, g, G).tolist() == [0, 14, 2 * 15 + 2, 14 * 15 + 14]
    assert torch.equal(zeroshot.on_tokens(p, g, g), p)


# ------------------------------------------------- densities
@pytest.mark.parametrize("distance, sigma", [(0.0, 0.2), (0.2, 0.1), (0.3, 0.15)])
def test_overlap_equals_the_closed_form_of_two_normals(distance, sigma):
    edges = np.linspace(-1, 1, zeroshot.BINS + 1)
    counts = torch.from_numpy(np.diff([norm.cdf(edges, m, sigma) for m in (-distance / 2, distance / 2)]))
    assert zeroshot.overlap(counts * 1e6) == pytest.approx(2 * norm.cdf(-distance / 2 / sigma), abs=1e-3)
    assert math.isnan(zeroshot.overlap(torch.tensor([[1, 2], [0, 0]])))


def test_pair_counts_equal_a_plain_loop():
    z, labels = unit(40, 6), torch.arange(40) % 5 - 1
    counts, sums = zeroshot.pair_counts(z, labels)
    plain, total = torch.zeros(2, zeroshot.BINS, dtype=torch.long), [0.0, 0.0]
    for i in range(40):
        for j in range(i + 1, 40):
            if labels[i] >= 0 and labels[j] >= 0:
                c, row = (z[i] @ z[j]).item(), int(labels[i] != labels[j])
                plain[row, min(int((c + 1) * 100), 199)] += 1
                total[row] += c
    assert (counts - plain).abs().sum() <= 4 and torch.equal(
        counts.sum(1), plain.sum(1)
    )  # a rounded edge may move
    assert sums.tolist() == pytest.approx(total, abs=1e-4)
    assert zeroshot.pair_counts(z, torch.full((40,), -1))[0].sum() == 0


# ------------------------------------------------- few-shot
def test_few_shot_equals_scikit_learn():
    labels = torch.arange(200) % 8
    z = F.normalize(unit(8, 12)[labels] + unit(200, 12, seed=1), dim=-1)
    episodes = zeroshot.draw_episodes(labels, 20)
    assert episodes.shape == (20, 5, 16)
    own = labels[episodes]
    assert (own == own[:, :, :1]).all() and all(len(set(e)) == 5 for e in own[:, :, 0].tolist())
    assert all(len(set(e)) == 80 for e in episodes.flatten(1).tolist())
    got, right, yes, same = zeroshot.few_shot(z, episodes), [], [], []
    for e in episodes:
        nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(z[e[:, 0]], labels[e[:, 0]])
        right.append(nearest.score(z[e[:, 1:].flatten()], labels[e[:, 1:].flatten()]))
        yes.append((z[e[:, 1:].flatten()] @ z[e[:, 0]].T).flatten())
        same.append((labels[e[:, 1:].flatten()][:, None] == labels[e[:, 0]]).flatten())
    assert got["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4) and got["accuracy"] > 40
    for t, f1 in got["f1"].items():
        assert f1 == pytest.approx(100 * f1_score(torch.cat(same), torch.cat(yes) >= float(t)), abs=0.05)
    same_for_all = zeroshot.few_shot(unit(1, 12).expand(200, -1), episodes)
    assert list(same_for_all["f1"].values()) == pytest.approx([100 / 3] * 9)  # always yes
    with pytest.raises(ValueError, match="need 5 classes of 16 images: here are 4 classes, 1"):
        zeroshot.draw_episodes(torch.tensor([0] * 20 + [1] * 20 + [2] * 20 + [3] * 15))


def test_few_shot_reads_class_folders_and_mini_imagenet(tmp_path, capsys):
    toy.main(
        ["--out", str(tmp_path / "f"), "--layout", "folder", "--n", "0", "--n_val", "160", "--size", "32"]
    )
    (tmp_path / "mini/images").mkdir(parents=True)
    lines = ["filename,label"]
    for path in sorted((tmp_path / "f/val").rglob("*.png")):
        (tmp_path / "mini/images" / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
        lines.append(f"{path.parent.name}_{path.name},{path.parent.name}")
    (tmp_path / "mini/test.csv").write_text("\n".join(lines) + "\n")
    results = []
    for folder in ("f", "f/val", "mini"):
        run(
            "--ckpt",
            "random:vit_micro/8",
            "--fewshot",
            tmp_path / folder,
            "--size",
            32,
            "--json",
            tmp_path / "o.jsonl",
        )
        results.append(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1]))
    assert results[0]["accuracy"] == results[1]["accuracy"] == pytest.approx(results[2]["accuracy"], abs=1e-6)
    assert 19 < results[0]["accuracy"] < 30 and results[0]["best"] > 33
    assert "160 images of 10 classes, 0 unreadable" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no class folders"):
        run("--ckpt", "random:vit_micro/8", "--fewshot", tmp_path / "mini/images")


# ------------------------------------------------- pictures
def test_kmeans_finds_what_is_apart():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 9)
    z = F.normalize(
        torch.eye(3)[labels] + 0.05 * torch.randn(79, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    assert torch.equal(zeroshot.kmeans(z, 3), labels)  # numbered by size
    assert zeroshot.kmeans(z, 1).unique().tolist() == [0]
    assert zeroshot.kmeans(torch.ones(6, 3) / 3**0.5, 4).max() < 4  # fewer tokens apart than clusters


def test_token_at():
    old, new = (100, 300), (48, 144)
    assert (
        zeroshot.token_at((0, 0), old, new, 8, 8) == 0
        and zeroshot.token_at((299, 99), old, new, 8, 8) == 6 * 18 - 1
    )
    for point in ((120, 88), (7, 50), (299, 3)):
        x, y = point
        assert zeroshot.token_at(point, old, new, 8, 8) == int(y * 0.48 // 8) * 18 + int(
            (x + 0.5) * 0.48 // 8
        )
    assert zeroshot.token_at((150, 50), old, new, 8, 4) in (
        5 * 35 + 17,
        6 * 35 + 17,
        5 * 35 + 18,
        6 * 35 + 18,
    )


@pytest.mark.parametrize(
    "words, cells",
    [
        (["--point", "20,30"], 5),
        (["--point", "20,30", "--point", "70,10", "--background_point", "1,1", "--threshold", "0.3"], 5),
        ([], 3),
        (["--heads", "--stride", "4", "--no-upsample", "--point", "99,49"], 8),
    ],
)
def test_pictures(tmp_path, words, cells):
    image = tmp_path / "photo.png"
    Image.fromarray(toy.scene(0, size=(50, 100)).image).save(image)
    run(
        "--ckpt",
        "random:vit_micro/8",
        "random:vit_micro/16",
        "--image",
        image,
        "--size",
        48,
        "--out",
        tmp_path / "f.png",
        *words,
    )
    picture = Image.open(tmp_path / "f.png")
    assert picture.width == cells * 308 + 8 and picture.height == 2 * (150 + 60)
    assert np.asarray(picture).std() > 20


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--image nope.jpg", "nope.jpg"),
        ("--toy --image x.jpg", "not 2"),
        ("", "not 0"),
        ("--toy --stride 5", "does not divide"),
        ("--toy --upsample", "--truth pixel"),
        ("--toy --limit 0", "--limit 0"),
        ("--coco nowhere", "nowhere.*no such file"),
        ("--voc nowhere", "no PASCAL VOC"),
        ("--fewshot nowhere", "nowhere"),
        ("--toy --split foo", "foo"),
        ("--toy --background_points -1", "0 or more"),
        ("--toy --json nowhere/x.json", "no folder nowhere"),
        ("--image x --background_point 1,1", "give one"),
        ("--toy --limit 2 --min_patches 9999", "no class of 9999"),
    ],
)
def test_mistakes_are_one_line(words, reason):
    with pytest.raises(ValueError, match=reason) as e:
        run("--ckpt", "random:vit_micro/8", *words.split())
    assert "\n" not in str(e.value)


def test_all_checkpoints_are_opened_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(zeroshot, "evaluate", lambda *_: pytest.fail("worked first"))
    table = tmp_path / "kept.csv"
    table.write_text("an older table")
    for more, reason in (
        (["no.pth"], "no such checkpoint"),
        (["random:vit_micro/14", "--stride", "4"], "does not divide the patch size 14"),
    ):
        with pytest.raises(ValueError, match=reason):
            run("--ckpt", "random:vit_micro/8", *more, "--toy", "--csv", table)
    assert table.read_text() == "an older table"


def test_exit_code(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 48)).save(tmp_path / "x.png")
    for words in (
        ["--image", str(tmp_path / "x.png"), "--point", "64,3"],
        ["--image", "x", "--point", "3"],
        ["--bogus"],
    ):
        monkeypatch.setattr(sys, "argv", ["zeroshot.py", "--ckpt", "random:vit_micro/8", *words])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(zeroshot.__file__, run_name="__main__")
        assert e.value.code == 2
    err = capsys.readouterr().err
    assert (
        "point 64,3 is outside" in err
        and "64 pixels wide" in err
        and "Traceback" not in err
        and "expected x,y" in err
    )


# ------------------------------------------------- real images and weights
def test_foreign_weights_beat_random_ones(real_data, tmp_path):
    weights = real_data / "weights/vits14_dinov2_saliency_fp16.pth"
    run(
        "--ckpt",
        weights,
        "random:vit_s/14",
        "--coco",
        real_data / "coco",
        "--limit",
        12,
        "--size",
        224,
        "--json",
        tmp_path / "o.jsonl",
    )
    foreign, random = (json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines())
    assert foreign["size"] == 224 and foreign["n_prompts"] == random["n_prompts"]
    assert foreign["best"] > random["best"] + 5 and foreign["overlap"] < random["overlap"]
    assert zeroshot.working_size(480, 14) == 476 and zeroshot.working_size(480, 16) == 480


def test_voc_is_read(real_data):
    scenes = coco.Voc(real_data / "VOCdevkit", limit=10)
    found = [scenes.masks(i) for i in range(10)]
    assert all(len(masks) == len(names) > 0 and set(names) <= set(coco.VOC_NAMES) for masks, names in found)
    assert all(
        (masks.sum(0) <= 1).all() and masks.shape[1:] == scenes.read(i).shape[1:]
        for i, (masks, _) in enumerate(found)
    )


def test_stride_shifts_with_the_image():
    """Half the stride sees what the whole stride sees of the shifted image, but for the position
    embedding."""
    vit = ViT(32, 8, 16, 1, 2).eval()
    vit.pos_embed.data.zero_()
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    vit.patch_embed.stride = 4
    fine = vit.patch_embed(x).view(1, 9, 9, 16)
    vit.patch_embed.stride = 8
    assert torch.allclose(fine[:, ::2, ::2].flatten(1, 2), vit.patch_embed(x), atol=1e-5)
    assert torch.allclose(fine[:, 1::2, 1::2].flatten(1, 2), vit.patch_embed(x[:, :, 4:36, 4:36]), atol=1e-5)
