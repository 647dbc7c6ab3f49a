"""Proves: prompts lie where they should; the four means equal the protocol written down once more; the result
depends on no batch, limit or worker; the densities' overlap equals its closed form."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

import prompts
import run
import scenes
from checkpoint import load_backbone
from clicks import block_features
from data import ToyImages, generator_of
from images import normalize
from prompts import THRESHOLDS, Protocol, network_features, prompt_table
from run import Mistake
from scenes import ToyScenes
from studies import masks

CPU = torch.device("cpu")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def smooth_masks(n, size, seed=0):
    """(n, size, size) bool: random blobs, none of them empty."""
    x = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size=(size, size), mode="bicubic")[:, 0]
    return x > x.flatten(1).quantile(0.7, dim=1)[:, None, None]


@pytest.fixture(scope="module")
def vit():
    return load_backbone("random:vit_micro/8")[0]


@pytest.fixture(scope="module")
def toys():
    return ToyImages("val", 8)


def table(vit, toys, n, batch_size=8, num_workers=0, **choices):
    protocol = Protocol(**{"size": 64} | choices)
    vit.patch_embed.stride = protocol.stride or vit.patch_size
    try:
        features = network_features(vit, CPU)
        return prompt_table(
            features, ToyScenes(toys, n), protocol, vit.patch_size, batch_size, num_workers=num_workers
        )
    finally:
        vit.patch_embed.stride = vit.patch_size


class Blobs(scenes.Scenes):
    """One blob an image; the last image has nothing."""

    def __init__(self, masks):
        super().__init__("blobs", ["blob"])
        self.masks = masks
        self.files = list(range(len(masks)))

    def name(self, i):
        return str(i)

    def read(self, i):
        return torch.full((3, 48, 48), i, dtype=torch.uint8)

    def objects(self, i):
        yield "blob", self.masks[i].numpy()


# ------------------------------------------------- similarity, prompts, masks
def test_points_lie_in_the_mask_and_do_not_depend_on_their_number():
    truth = smooth_masks(20, 12).flatten(1)
    one, five = (prompts.draw_points(truth, n, generator_of(1)) for n in (1, 5))
    assert torch.equal(one, five[:, :1]) and truth.gather(1, five).all()
    assert all(len(set(row)) == 5 for row in five.tolist())
    small = torch.zeros(1, 12, dtype=torch.bool)
    small[0, [3, 7]] = True
    assert sorted(set(prompts.draw_points(small, 5, generator_of(1))[0].tolist())) == [3, 7]
    drawn = torch.cat([prompts.draw_points(small, 1, generator_of(i)) for i in range(200)])
    assert 60 < (drawn == 3).sum() < 140


def test_centre_is_the_deepest_patch():
    truth = torch.zeros(2, 9, 12, dtype=torch.bool)
    truth[0, 2:7, 3:8] = True
    truth[1] = True  # the image's border counts as an edge
    assert prompts.centre_point(truth.flatten(1), (9, 12))[0] == 4 * 12 + 5
    assert prompts.centre_point(truth.flatten(1), (9, 12))[1] // 12 == 4


def test_a_full_target_leaves_the_background_of_others(vit):
    """One object fills the image, one does not: the second is scored as if it were alone."""

    class Two(Blobs):
        whole = True

        def objects(self, i):
            if self.whole:
                yield "ground", np.ones((48, 48), bool)
            yield "blob", self.masks[i].numpy()

    scene = Two(smooth_masks(1, 48))
    protocol = Protocol(size=48, background_points=3)
    both = prompt_table(network_features(vit, CPU), scene, protocol, 8)
    blob, ground = both.rows[:2]
    assert (blob.category, ground.category) == ("blob", "ground") and ground.iou["everything"] == 1
    plain = prompt_table(network_features(vit, CPU), scene, Protocol(size=48), 8)
    assert ground == plain.rows[1] and blob.iou["0.0"] != plain.rows[0].iou["0.0"]


def test_prompts_of_finer_tokens_are_those_of_the_patches():
    g, G = 8, 15
    p = torch.tensor([0, 7, 9, 63])  # corner, corner, (1, 1), corner
    assert prompts.on_tokens(p, g, G).tolist() == [0, 14, 2 * 15 + 2, 14 * 15 + 14]
    assert torch.equal(prompts.on_tokens(p, g, g), p)


# ------------------------------------------------- the score
def test_iou_equals_the_plain_loop():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(40, 300, generator=g) > 0.4
    b = torch.rand(40, 300, generator=g) > 0.6
    loop = []
    for p, t in zip(a.tolist(), b.tolist(), strict=True):
        pairs = list(zip(p, t, strict=True))
        loop.append(sum(x and y for x, y in pairs) / sum(x or y for x, y in pairs))
    assert prompts.iou(a, b).tolist() == pytest.approx(loop)


def test_perfect_features_have_an_iou_of_one():
    masks = torch.cat([smooth_masks(4, 48), torch.zeros(1, 48, 48, dtype=torch.bool)])

    def perfect(images):
        inside = scenes.majority(scenes.patch_cover(masks[images[:, 0, 0, 0].long()], 6, 6))
        return torch.stack([inside, ~inside], -1).float()

    protocol = Protocol(size=48)
    result = prompt_table(perfect, Blobs(masks), protocol, 8, batch_size=3)
    got = result.summary()
    assert list(got["miou"].values())[1:] == pytest.approx([100] * 9) and got["miou"]["0.0"] < 100
    assert got["n_images"] == 4 and got["left_out"] == {"objects of zero area": 1}
    shares = [scenes.majority(scenes.patch_cover(m, 6, 6)).float().mean().item() for m in masks[:4]]
    assert got["everything"] == pytest.approx(100 * np.mean(shares), abs=1e-3) == got["miou"]["0.0"]
    with pytest.raises(Mistake, match="blobs: no class of 3 or more patches in 1 images"):
        prompt_table(perfect, Blobs(masks[4:]), protocol, 8).summary()


def test_the_four_means_equal_plain_loops(vit, toys):
    """The whole protocol again, on 8 toy scenes, as one would write it down."""
    got = table(vit, toys, 8).summary()
    rows = []
    source = ToyScenes(toys)
    for i in range(8):
        names = [name for name, _ in source.objects(i)]
        masks = torch.stack([torch.from_numpy(mask) for _, mask in source.objects(i)])
        z = prompts.patch_features(vit, normalize(source.read(i)[None]))[0]
        unions = []
        for k in sorted(set(names)):
            unions.append((k, masks[[n == k for n in names]].any(0)))
        for target, found in (("class", unions), ("instance", list(zip(names, masks, strict=True)))):
            truth = [F.avg_pool2d(m[None].float(), 8).flatten() >= 0.5 for _, m in found]
            kept = [(k, t) for (k, _), t in zip(found, truth, strict=True) if t.sum() >= 3]
            if not kept:
                continue
            inside = torch.stack([t for _, t in kept])
            points = prompts.draw_points(inside, 1, generator_of(0, target, source.name(i)))
            for (k, t), p in zip(kept, points[:, 0].tolist(), strict=True):
                s = z @ z[p]
                scores = [100 * (((s >= x) & t).sum() / ((s >= x) | t).sum()).item() for x in THRESHOLDS]
                rows.append((target, i, k, scores))

    def mean(x):
        return sum(x) / len(x)

    for j, t in enumerate(f"{t:.1f}" for t in THRESHOLDS):
        of = [(i, k, v[j]) for target, i, k, v in rows if target == "class"]
        by = {}
        for c in (0, 1):
            by[c] = mean([mean([r[2] for r in of if r[c] == key]) for key in {r[c] for r in of}])
        assert got["miou"][t] == pytest.approx(by[0], abs=1e-2)
        assert got["miou_category"][t] == pytest.approx(by[1], abs=1e-2)
        assert got["miou_pairs"][t] == pytest.approx(mean([r[2] for r in of]), abs=1e-2)
        instances = mean([v[j] for target, _, _, v in rows if target == "instance"])
        assert got["miou_instance"][t] == pytest.approx(instances, abs=1e-2)
    assert got["best"] == max(got["miou"].values()) == got["miou"][f"{got['best_threshold']:.1f}"]
    assert got["n_prompts"] == sum(r[0] == "class" for r in rows)


def values(result):
    scores = torch.tensor([list(row.iou.values()) for row in result.rows])
    return scores, [(row.kind, row.image, row.category) for row in result.rows]


def test_the_result_does_not_depend_on_batch_or_limit(vit, toys):
    all_at_once = table(vit, toys, 6)
    one_by_one = table(vit, toys, 6, batch_size=1)
    three = table(vit, toys, 3, batch_size=2)
    (a, keys), (b, others), (c, first) = map(values, (all_at_once, one_by_one, three))
    assert keys == others and first == keys[: len(first)]
    assert (a - b).abs().max() < 0.05  # a patch on the threshold may flip
    assert (a[: len(c)] - c).abs().max() < 0.05
    assert (all_at_once.counts - one_by_one.counts).abs().sum() < 20


def test_the_result_does_not_depend_on_workers(vit, toys):
    here, there = table(vit, toys, 6), table(vit, toys, 6, num_workers=2)
    assert here.rows == there.rows and torch.equal(here.counts, there.counts)
    assert here.skipped == there.skipped and here.images == there.images


def test_tables_of_several_kinds_of_tokens_are_those_of_each(vit, toys):
    def of_blocks(images):
        return block_features(vit, normalize(images), [1, -1])

    given = (ToyScenes(toys, 3), Protocol(size=64), 8)
    both = prompts.prompt_tables(of_blocks, *given)
    for i, result in enumerate(both):
        alone = prompt_table(lambda images, i=i: of_blocks(images)[i], *given)
        assert alone.rows == result.rows and alone.summary()["overlap"] == result.summary()["overlap"]
    assert both[0].rows != both[1].rows


def test_classes_without_an_instance_that_is_large_enough(vit, toys):
    result = table(vit, toys, 6)
    result.rows = [row for row in result.rows if row.kind == "class"]
    summary = result.summary()
    assert "miou_instance" not in summary and summary["best"] == max(summary["miou"].values())


def test_stride_pixels_and_points(vit, toys):
    for changed in (
        dict(stride=4),
        dict(stride=4, truth="pixel", upsample=True),
        dict(truth="pixel"),
        dict(prompt="center"),
        dict(points=5, background_points=3, combine="mean"),
        dict(target="instance"),
    ):
        v, keys = values(table(vit, toys, 2, **changed))
        assert len(v) and v.isfinite().all() and (v >= 0).all() and (v <= 1).all()
    whole = table(vit, toys, 2)
    pixel = table(vit, toys, 2, truth="pixel")
    assert (values(whole)[0] - values(pixel)[0]).abs().mean() < 0.08  # the same masks, a finer truth


# ------------------------------------------------- densities
@pytest.mark.parametrize("distance, sigma", [(0.0, 0.2), (0.2, 0.1), (0.3, 0.15)])
def test_overlap_equals_the_closed_form_of_two_normals(distance, sigma):
    edges = np.linspace(-1, 1, prompts.BINS + 1)
    counts = torch.from_numpy(np.diff([norm.cdf(edges, m, sigma) for m in (-distance / 2, distance / 2)]))
    assert prompts.overlap(counts * 1e6) == pytest.approx(2 * norm.cdf(-distance / 2 / sigma), abs=1e-3)
    assert math.isnan(prompts.overlap(torch.tensor([[1, 2], [0, 0]])))


def test_pair_counts_equal_a_plain_loop():
    z, labels = unit(40, 6), torch.arange(40) % 5 - 1
    counts, sums = prompts.pair_counts(z, labels)
    plain, total = torch.zeros(2, prompts.BINS, dtype=torch.long), [0.0, 0.0]
    for i in range(40):
        for j in range(i + 1, 40):
            if labels[i] >= 0 and labels[j] >= 0:
                c, row = (z[i] @ z[j]).item(), int(labels[i] != labels[j])
                plain[row, min(int((c + 1) * 100), 199)] += 1
                total[row] += c
    assert (counts - plain).abs().sum() <= 4  # a rounded edge may move
    assert torch.equal(counts.sum(1), plain.sum(1))
    assert sums.tolist() == pytest.approx(total, abs=1e-4)
    assert prompts.pair_counts(z, torch.full((40,), -1))[0].sum() == 0


# ------------------------------------------------- the study of better masks
def test_the_study_of_masks_finds_what_a_table_finds(vit, tmp_path):
    """Its one pass gives for each protocol what zeroshot.py gives."""
    toy = ToyScenes(ToyImages("val", 4))
    results = masks.measure(vit, toy, 48, CPU)
    args = Namespace(json=tmp_path / "lines.jsonl")
    cells = masks.column(args, "random", vit, toy, "instance", results, CPU)
    assert len(cells) == 13 and len(run.read_lines(args.json)) == 12
    protocol = Protocol(48, 8, target="instance", points=3, centre=True, contiguous=True)
    found = prompt_table(network_features(vit, CPU), toy, protocol, 8).summary()
    line = run.read_lines(args.json)[7]
    assert line["metrics"]["miou"] == found["miou"] and line["metrics"]["auto"] == found["auto"]
    assert cells[-1] == f"{found['everything']:.1f}"
