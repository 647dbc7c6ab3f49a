"""What davis.py and videos.py must do: propagate as the plain quadratic form does, ties included; keep DINO's
rules of context and output; score as the official evaluation does (masks by hand, scipy's dilation as the
oracle); write, resume and refuse as the help says, on any number of ranks; never take shades of grey for
objects; follow objects with trained features far better than with random ones."""
import csv
import json
import math
import os
import runpy
import shutil
import sys
from collections import Counter, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_dilation

import davis
import distributed
import toy
import videos
from checkpoint import load_backbone
from figure import voc_palette
from images import normalize, read_image
from model import ViT
from run import Mistake


# ------------------------------------------------- propagation
def plain(query, keys, labels, radius=12, topk=5, temp=0.1):
    """The protocol as it reads: all tokens against all of the context; the far and the weak are dropped."""
    n, h, w, D = keys.shape
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    a = torch.bmm(query.reshape(1, -1, D).expand(n, -1, -1), keys.flatten(1, 2).mT)      # (F, hw, hw)
    a = (a / temp).exp()
    a = a * near if radius else a
    a = a.transpose(0, 1).flatten(1)                                   # (hw, F*hw), queries as rows
    a[a < a.topk(min(topk, a.shape[1]), dim=1)[0][:, -1:]] = 0
    a = a / a.sum(1, keepdim=True)
    return (a @ labels.flatten(0, 2)).view(h, w, -1)


def problem(n, h, w, C, seed=0, D=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    query, keys = (torch.randn(*s, h, w, D, generator=g, dtype=dtype) for s in ((), (n,)))
    labels = torch.rand(n, h, w, C, generator=g, dtype=dtype)
    return F.normalize(query, dim=-1), F.normalize(keys, dim=-1), labels / labels.sum(-1, keepdim=True)


@pytest.mark.parametrize("n, h, w, C, radius, topk, temp", [
    (8, 17, 11, 3, 4, 5, 0.1), (8, 11, 17, 3, 4, 5, 0.1), (1, 9, 13, 2, 12, 5, 0.1), (3, 6, 5, 2, 0, 5, 0.1),
    (2, 5, 1, 2, 1, 1, 0.1), (2, 7, 7, 4, 1, 40, 1.0), (1, 3, 3, 2, 1, 500, 0.1),
    (4, 30, 52, 5, 12, 5, 0.07)])
def test_propagation_equals_the_plain_form(n, h, w, C, radius, topk, temp):
    for dtype in (torch.float32, torch.float64):
        data = problem(n, h, w, C, dtype=dtype)
        fast, slow = davis.propagate(*data, radius, topk, temp), plain(*data, radius, topk, temp)
        assert fast.dtype == dtype and fast.shape == (h, w, C)
        assert (fast - slow).abs().max() < 1e-6
        assert torch.equal(fast.argmax(-1), slow.argmax(-1))


def test_everything_that_ties_with_the_kth_is_kept():
    query, keys, labels = problem(4, 12, 9, 3)
    keys[2] = keys[1]                                                  # two identical frames, other labels
    assert (davis.propagate(query, keys, labels, 3, 5) - plain(query, keys, labels, 3, 5)).abs().max() < 1e-6
    both = davis.propagate(query, keys[1:3], labels[1:3], 3, 1)        # top 1, held by both: the mean of both
    one, other = (davis.propagate(query, keys[i:i + 1], labels[i:i + 1], 3, 1) for i in (1, 2))
    assert (both - (one + other) / 2).abs().max() < 1e-6 and (one - other).abs().max() > 0.1

    query, keys = query[..., :16].sign() / 4, keys[..., :16].sign() / 4  # cosines in eighths: ties all over
    for topk in (1, 5, 20):
        fast, slow = davis.propagate(query, keys, labels, 3, topk), plain(query, keys, labels, 3, topk)
        assert (fast - slow).abs().max() < 1e-6
    blank = torch.ones(4, 6, 5, 8) / math.sqrt(8)  # nothing to see: all of the window votes alike
    labels = torch.rand(4, 6, 5, 2)
    got = davis.propagate(blank[0], blank, labels, 1, 5)
    assert torch.allclose(got[2, 2], labels[:, 1:4, 1:4].mean((0, 1, 2)), atol=1e-6)
    assert torch.allclose(got[0, 0], labels[:, :2, :2].mean((0, 1, 2)), atol=1e-6)


def test_small_temperatures_do_not_overflow():
    data = problem(3, 8, 8, 2)
    best = davis.propagate(*data, 3, 1)
    assert (davis.propagate(*data, 3, 5, temp=1e-4) - best).abs().max() < 0.6
    assert davis.propagate(*data, 3, 5, temp=1e-4).isfinite().all()


@pytest.mark.parametrize("size", [(40, 70), (70, 40)])
def test_track_is_the_protocol_spelled_out(size):
    """First frame once, then a queue of the previous ones; soft labels handed on; the output stretched.

    Where two stretched channels tie (both at their maximum, say) rounding decides: left out, at most 3 %."""
    vit, P, last = small_vit(), 8, 2
    images, instances = toy.video(1, frames=6, size=size)
    frames, first = torch.from_numpy(images).permute(0, 3, 1, 2), np.where(instances[0] == 2, 7, instances[0])
    got = list(davis.track(vit, frames, first, last, 3, 5, 0.1, size=40, size_multiple=16))

    h, w = (5, 8) if size[1] > size[0] else (8, 5)                     # 40 x 70 -> 40 x 64
    ids = np.unique(first)
    small = np.array(Image.fromarray(first).resize((w, h), Image.Resampling.NEAREST))
    queue, context = deque(maxlen=last), None
    for t, frame in enumerate(frames):
        x = F.interpolate(frame[None].float() / 255, size=(h * P, w * P), mode="bilinear")
        z = F.normalize(vit(normalize(x))[0, 1:], dim=-1).view(h, w, -1)
        if t == 0:
            assert np.array_equal(got[0], first)
            context = z, torch.from_numpy(small[..., None] == ids).float()
            continue
        keys, labels = (torch.stack(s) for s in zip(context, *queue, strict=True))
        assert len(keys) == 1 + min(t - 1, last)
        soft = plain(z, keys, labels, 3)
        queue.append((z, soft))
        big = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=P, mode="bilinear")[0]
        for c in big:
            if c.max() > 0:
                c -= c.min().clone()
                c /= c.max().clone()
        best, second = big.topk(2, 0)[0]
        mask, clear = (np.array(Image.fromarray(x).resize(size[::-1], Image.Resampling.NEAREST))
                       for x in (ids[big.argmax(0)], (best - second > 1e-5).numpy()))
        assert np.array_equal(got[t][clear], mask[clear]) and clear.mean() > 0.97, t
    assert set(np.unique(got)) <= {0, 1, 3, 4, 7}


def small_vit(seed=0, dim=64, depth=2):
    torch.manual_seed(seed)
    return ViT(64, 8, dim, depth, 2).eval().requires_grad_(False)


def test_channels_without_contrast():
    labels = torch.zeros(3, 4, 3)
    labels[..., 0] = 1  # objects 5 and 9 are gone: all background
    ids = np.array([0, 5, 9], np.uint8)
    assert (davis.harden(labels, 4, ids, (20, 30)) == 0).all()
    assert (davis.harden(labels.roll(1, -1), 4, ids, (20, 30)) == 5).all()
    labels[1, 1] = torch.tensor([0.9, 0.1, 0])  # a tenth, but the most that object 5 has
    mask = davis.harden(labels, 4, ids, (12, 16))
    assert mask[5, 5] == 5 and mask.shape == (12, 16) and mask.dtype == np.uint8 and (mask != 9).all()


def test_of_channels_that_tie_the_first_wins():
    """As argmax has it, which is many times as slow over a leading dimension."""
    g = torch.Generator().manual_seed(0)
    ids = np.array([0, 3, 5, 8], np.uint8)
    for levels in (2, 4, 1000):
        labels = torch.randint(levels, (6, 7, 4), generator=g) / levels
        x = F.interpolate(labels.permute(2, 0, 1)[None], scale_factor=4, mode="bilinear")[0]
        low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        x = (x - low) / (high - low)
        ties = ((x == x.amax(0)).sum(0) > 1).sum()
        assert ties > 10 or levels == 1000
        assert np.array_equal(davis.harden(labels, 4, ids, (24, 28)), ids[x.argmax(0)])
    same = torch.rand(5, 5, 1, generator=g).expand(-1, -1, 3)
    assert (davis.harden(same, 4, ids[:3], (20, 20)) == 0).all()


@pytest.mark.parametrize("frame, patch, pixels", [
    ((480, 854), 16, (480, 832)), ((480, 854), 8, (480, 832)), ((480, 854), 14, (476, 840)),
    ((854, 480), 16, (832, 480)), ((1080, 1920), 16, (480, 832)), ((480, 910), 16, (480, 896)),
    ((480, 480), 16, (480, 448)), ((10, 10), 100, (400, 400))])
def test_frame_size(frame, patch, pixels):
    assert davis.frame_size(*frame, 480, 64, patch) == pixels


# ------------------------------------------------- the score
def box(shape, *spans):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*s) for s in spans)] = True
    return mask


def test_jaccard_by_hand():
    a, b, empty = box((9, 9), (1, 5), (1, 5)), box((9, 9), (3, 7), (1, 5)), np.zeros((9, 9), bool)
    assert videos.jaccard(a, b) == 8 / 24 and videos.jaccard(a, a) == 1
    assert videos.jaccard(empty, empty) == 1 and videos.jaccard(a, empty) == 0 == videos.jaccard(empty, a)


def test_contour_by_hand():
    drawn = videos.boundary(box((5, 5), (2, 4), (2, 4)))
    assert ["".join(np.where(row, "#", ".")) for row in drawn[1:4]] == [".###.", ".#.#.", ".###."]
    edge = videos.boundary(box((4, 4), (2, 4), (2, 4)))  # the border of the picture is no contour
    assert ["".join(np.where(row, "#", ".")) for row in edge] == ["....", ".###", ".#..", ".#.."]


def test_boundary_f_by_hand():
    shape = (480, 854)
    assert math.ceil(0.008 * math.hypot(*shape)) == 8
    a, empty = box(shape, (100, 200), (100, 200)), np.zeros(shape, bool)
    assert videos.boundary_f(empty, empty) == 1
    assert videos.boundary_f(a, empty) == 0 == videos.boundary_f(empty, a)
    assert videos.boundary_f(a, a) == 1
    assert videos.boundary_f(box(shape, (108, 208), (100, 200)), a) == 1  # 8 pixels off: still a match
    assert videos.boundary_f(box(shape, (109, 209), (100, 200)), a) < 1
    more, p = a | box(shape, (0, 480), (400, 854)), 400 / 880          # 480 pixels of contour too many
    assert videos.boundary_f(more, a) == pytest.approx(2 * p / (p + 1))


def test_boundary_f_equals_dilation_by_a_disk():
    rng, n = np.random.default_rng(0), 0
    for shape in ((240, 320), (300, 200)):                             # radius 3.2 -> 4, 2.9 -> 3
        radius = math.ceil(0.008 * math.hypot(*shape))
        y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
        disk = x * x + y * y <= radius * radius
        for _ in range(4):
            noise = [binary_dilation(rng.random(shape) < 0.002, iterations=i) for i in (3, 4)]
            m, t = noise[0], noise[1] & (rng.random(shape) < 0.999)
            a, b = videos.boundary(m), videos.boundary(t)
            p, r = ((u & binary_dilation(v, disk)).sum() / u.sum() for u, v in ((a, b), (b, a)))
            assert videos.boundary_f(m, t) == pytest.approx(2 * p * r / (p + r), abs=1e-12) and 0.05 < p < 1
            n += 1
    assert n == 8


def test_mean_recall_decay():
    assert videos.statistics(np.array([1.0, 0.8, 0.6, 0.4, 0.2])) == pytest.approx((0.6, 0.6, 0.9 - 0.3))
    assert videos.statistics(np.array([0.5]))[1] == 0                   # recall: strictly above 0.5
    long = np.linspace(1, 0, 1001)  # an 8-bit index would end in frame 1000 % 256
    assert videos.statistics(long)[2] == pytest.approx(long[:251].mean() - long[750:].mean()) == 0.75
    assert videos.summary(np.array([1.0, 0.0]), np.array([0.5, 0.5]))["J&F-Mean"] == 0.5


# ------------------------------------------------- the command
def run(**given) -> None:
    """The command line, in this process: run(topk=3, overlay=True) is --topk 3 --overlay."""
    argv = ["--device", "cpu"] if "ckpt" in given else []
    for name, value in given.items():
        if value is True:
            argv.append(f"--{name}")
        else:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    davis.main(davis.get_args(argv))


def images_in(folder):
    return videos.images_in(folder, Counter())


def save(path, mask, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(voc_palette())
    image.save(path)


TINY = dict(ckpt="random:vit_micro/16", size=32, size_multiple=16)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A DAVIS folder of two toy videos of 6 frames, 48x80."""
    root = tmp_path_factory.mktemp("davis")
    for name, i in (("judo", 0), ("surf", 1)):
        for t, (image, mask) in enumerate(zip(*toy.video(i, frames=6, size=(48, 80)), strict=True)):
            save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", image)
            save(root / f"Annotations/480p/{name}/{t:05d}.png", mask, palette=True)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("judo\r\nsurf\n")
    return root


@pytest.mark.slow
def test_one_command_propagates_scores_resumes_and_refuses(world, tmp_path, capsys, monkeypatch):
    out, line = tmp_path / "out", tmp_path / "r.jsonl"
    given = dict(TINY, davis=str(world), output_dir=str(out))
    run(**given, json=str(line), overlay=True)
    printed = capsys.readouterr().out
    assert "RANDOM weights" in printed and "size_mask_neighborhood 12" in printed and "ms a frame" in printed
    assert f"{world}: 2 sequences, 12 frames, 8 objects; left out: nothing" in printed
    assert "J&F-Mean  J-Mean  J-Recall  J-Decay  F-Mean  F-Recall  F-Decay" in printed

    written = json.loads(line.read_text())
    result = written["metrics"]
    assert {f"judo_{k}" for k in (1, 2, 3)} <= set(result["objects"]) and written["protocol"]["topk"] == 5
    assert written["protocol"]["precision"] == "fp32" and result["n_unreadable"] == 0
    assert result["J&F-Mean"] == pytest.approx((result["J-Mean"] + result["F-Mean"]) / 2)
    assert result["J-Mean"] == pytest.approx(np.mean([o["J-Mean"] for o in result["objects"].values()]))
    assert set(videos.NAMES) <= set(result["objects"]["judo_1"])
    rows = {kind: list(csv.DictReader((out / f"{kind}_results-val.csv").open()))
            for kind in ("global", "per-sequence", "per-object")}
    assert [r["Name"] for r in rows["per-sequence"]] == ["judo", "surf"]
    assert [r["Name"] for r in rows["per-object"]] == list(result["objects"])
    assert 100 * float(rows["global"][0]["J&F-Mean"]) == pytest.approx(result["J&F-Mean"], abs=1e-3)

    first = Image.open(out / "judo/00000.png")
    truth = Image.open(world / "Annotations/480p/judo/00000.png")
    assert first.mode == "P" and first.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert np.array_equal(first, truth)
    assert Image.open(out / "overlay/judo.webp").n_frames == 6 and (out / "overlay/surf/00005.jpg").is_file()

    written, track = (out / "surf/00003.png").stat().st_mtime_ns, davis.track
    monkeypatch.setattr(davis, "track", None)                          # whoever propagates now, falls
    run(**given)
    before = (out / "global_results-val.csv").stat().st_mtime_ns
    run(davis=str(world), eval_only=str(out), json=str(line), output_dir=str(tmp_path / "again"))
    again = json.loads(line.read_text().splitlines()[1])
    assert again["metrics"] == result and (out / "surf/00003.png").stat().st_mtime_ns == written
    assert (tmp_path / "again/per-object_results-val.csv").read_bytes() == \
        (out / "per-object_results-val.csv").read_bytes()
    assert (out / "global_results-val.csv").stat().st_mtime_ns == before       # none where the masks are
    with pytest.raises(Mistake, match=r"judo: masks made otherwise \(topk 5, now 3\): give --overwrite"):
        run(**given | {"topk": 3})
    monkeypatch.setattr(davis, "track", track)
    (out / "surf/00003.png").unlink()                                  # only this sequence is done again
    run(**given)
    lines = [x for x in capsys.readouterr().out.splitlines() if ": 6 frames" in x]
    assert ["ms a frame" in x for x in lines[-2:]] == [False, True]
    assert (out / "surf/00003.png").is_file() and json.loads((out / "surf/options.json").read_text())["done"]
    run(**given | {"topk": 3, "overwrite": True, "sequences": ["judo"]})
    assert json.loads((out / "judo/options.json").read_text())["topk"] == 3


@pytest.mark.slow
def test_a_stopped_run_is_not_taken_for_a_finished_one(world, tmp_path, monkeypatch):
    given = dict(TINY, davis=str(world), output_dir=str(tmp_path), sequences=["judo"])
    run(**given)
    left = [1, 1, 1]

    def interrupted(path, upright):
        if left and left.pop():
            return read_image(path, upright)
        raise KeyboardInterrupt

    monkeypatch.setattr(videos, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**given, topk=1, overwrite=True)
    monkeypatch.setattr(videos, "read_image", read_image)
    assert len(list((tmp_path / "judo").glob("*.png"))) == 6           # all there, but of two kinds
    old = (tmp_path / "judo/00005.png").stat().st_mtime_ns
    run(**given, topk=1)
    assert (tmp_path / "judo/00005.png").stat().st_mtime_ns > old
    assert json.loads((tmp_path / "judo/options.json").read_text())["done"]
    save(tmp_path / "surf/00000.png", np.zeros((48, 80), np.uint8))
    with pytest.raises(Mistake, match="surf: masks made otherwise .not by davis.py"):
        run(**given | {"sequences": ["surf"]})


def test_scoring_names_what_is_missing(tmp_path):
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 5:20], mask[25:35, 30:50] = 1, 4
    for t in range(5):
        save(truth / f"{t:05d}.png", mask * (t < 3), palette=True)      # both leave the picture in frame 3
        save(pred / f"{t:05d}.png", np.where(mask == 4, 9, mask) * (t < 3), palette=True)
    save(truth / "00001.png", np.where(mask == 0, 255, mask))           # void is background
    save(pred / "00007.png", mask)
    (pred / "._00008.png").write_bytes(b"a Macintosh wrote this")
    found = videos.score("walk", images_in(truth), pred)
    assert list(found) == ["walk_1", "walk_4"]
    assert found["walk_1"]["J&F-Mean"] == 1  # right in frames 1, 2 and, empty, in 3
    assert found["walk_4"]["J-Mean"] == pytest.approx(1 / 3) == found["walk_4"]["F-Mean"]
    (pred / "00002.png").unlink()
    with pytest.raises(Mistake, match="pred: 1 of 3 frames are missing: 00002.png"):
        videos.score("walk", images_in(truth), pred)
    save(pred / "00002.png", mask[:30])
    with pytest.raises(Mistake, match=r"00002.png: height and width \(30, 60\), its truth \(40, 60\)"):
        videos.score("walk", images_in(truth), pred)
    (pred / "00000.png").unlink()  # first and last are not scored: nor needed
    (pred / "00004.png").unlink()
    save(pred / "00002.png", mask)
    videos.score("walk", images_in(truth), pred)


def test_masks_of_every_kind(tmp_path):
    def read(array, binary=None):
        save(tmp_path / "m.png", array)
        return videos.read_mask(tmp_path / "m.png", binary).tolist()
    grey = np.array([[0, 255]], np.uint8)
    assert read(grey) == [[0, 1]] and read(grey, binary=False) == [[0, 0]]          # DAVIS-2016
    assert read(grey > 0) == [[0, 1]] and read(np.stack([grey] * 3, -1)) == [[0, 1]]
    assert read(np.stack([grey, grey * 0 + 255], -1)) == [[0, 1]]                   # with alpha
    assert read(np.array([[0, 2, 255]], np.uint8)) == [[0, 2, 0]]  # 255 is void beside objects
    for bad, why in ((np.zeros((2, 2, 3), np.uint8) + np.array([1, 2, 3], np.uint8), "has colours"),
                     (np.array([[0, 999]], np.uint16), "has 2 different values, 0, 999; expected 0 for the"),
                     (np.array([[0, 254, 255]], np.uint8), "has 3 different values, 0, 254, 255; .*as PNG")):
        with pytest.raises(Mistake, match=f"m.png: {why}"):
            read(bad)
    (tmp_path / "m.png").write_text("no image")
    with pytest.raises(Mistake, match="m.png: not a readable image"):
        videos.read_mask(tmp_path / "m.png")


def test_shades_of_grey_are_no_objects(tmp_path, capsys):
    """A JPEG of a mask, and a mask with soft edges: dozens of values around 0 and 255."""
    images, instances = toy.video(3, frames=2, size=(48, 80))
    for t, image in enumerate(images):
        save(tmp_path / f"clip/{t}.png", image)
    given = dict(TINY, video=tmp_path / "clip", output_dir=tmp_path / "out", overwrite=True)
    two = Image.fromarray((instances[0] == 1) * np.uint8(255))
    two.save(tmp_path / "mask.jpg", quality=95)
    two.resize((40, 24), Image.Resampling.BILINEAR).resize((80, 48)).save(tmp_path / "soft.png")
    Image.fromarray(instances[0] * np.uint8(4)).save(tmp_path / "faint.jpeg", quality=50)      # all below 64
    for name in ("mask.jpg", "soft.png", "faint.jpeg"):
        with pytest.raises(Mistake, match=rf"{name}: has \d+ different values, .*save it as PNG"):
            run(**given, first_mask=tmp_path / name)
    for name, image in (("sound.png", two), ("rgb.png", two.convert("RGB")), ("one.png", two.convert("1"))):
        image.save(tmp_path / name)
        run(**given, first_mask=tmp_path / name)
        assert "clip: 1 sequence, 2 frames, 1 object; left out: nothing" in capsys.readouterr().out


def test_davis_2016_masks_are_understood(world, tmp_path):
    for t in range(4):
        mask = np.array(Image.open(world / f"Annotations/480p/judo/{t:05d}.png")) == 1
        save(tmp_path / f"truth/{t:05d}.png", mask * np.uint8(255))
        save(tmp_path / f"pred/{t:05d}.png", mask * np.uint8(255 if t % 2 else 1))
    found = videos.score("judo", images_in(tmp_path / "truth"), tmp_path / "pred")
    assert found == {"judo_1": pytest.approx(dict.fromkeys(videos.NAMES, 1.0) | {"J-Decay": 0, "F-Decay": 0})}


def test_a_video_of_ones_own(tmp_path, capsys):
    images, instances = toy.video(3, frames=3, size=(48, 80))
    for t, image in zip((1, 2, 10), images, strict=True):
        save(tmp_path / f"clip/{t}.jpg", image)
    save(tmp_path / "mask.png", (instances[0] == 1) * np.uint8(255))
    given = dict(TINY, video=str(tmp_path / "clip"), first_mask=str(tmp_path / "mask.png"),
                 output_dir=str(tmp_path / "out"))
    assert [p.stem for p in images_in(tmp_path / "clip")] == ["1", "2", "10"]
    run(**given, overlay=True)
    assert "clip: 3 frames, 1 object" in (printed := capsys.readouterr().out) and "not scored" in printed
    assert {p.name for p in (tmp_path / "out/clip").glob("*.png")} == {"1.png", "2.png", "10.png"}
    assert set(np.unique(Image.open(tmp_path / "out/clip/1.png"))) == {0, 1}
    assert (tmp_path / "out/overlay/clip.webp").is_file()
    save(tmp_path / "mask.png", instances[0])
    with pytest.raises(Mistake, match="first_mask"):                 # another mask is another result
        run(**given)

    (tmp_path / "clip/2.jpg").unlink()
    (tmp_path / "clip/10.jpg").unlink()
    run(**given, overwrite=True)                                        # one frame: its mask, and no score
    run(**given, n_last_frames=0, overwrite=True)
    save(tmp_path / "clip/2.jpg", images[0][:40])
    with pytest.raises(Mistake, match=r"2.jpg: height and width \(40, 80\), .*mask.png has \(48, 80\)"):
        run(**given, overwrite=True)
    (tmp_path / "clip/2.jpg").write_bytes(b"?")
    with pytest.raises(Mistake, match="1 of 2 images cannot be read, more than --max_bad 0.01, .*2.jpg"):
        run(**given, overwrite=True)
    for mask, why in ((np.zeros((48, 80)), "mask.png: 0 objects"), (np.ones((9, 9)), "1.jpg: height"),
                      (np.arange(200)[None], "mask.png: has 200 different values, 0, 1, 2, 3, 4, 5, 6, 7, ")):
        save(tmp_path / "mask.png", mask.astype(np.uint8))
        with pytest.raises(Mistake, match=why):
            run(**given, overwrite=True)


def test_two_ranks_share_the_sequences(world, tmp_path, monkeypatch, capsys):
    """Both by turns in this process, as two real ones need 10 s to start; rank 0 gets rank 1's results."""
    given = dict(TINY, davis=str(world), topk=4)
    run(**given, output_dir=str(tmp_path / "one"), json=str(tmp_path / "one.jsonl"))
    said = {}

    def all_gather_object(out, found):
        said[distributed.rank()] = found
        out[:] = [said.get(0), said[1]]

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        run(**given, output_dir=str(tmp_path / "two"), json=str(tmp_path / "two.jsonl"))
    one, two = (json.loads((tmp_path / f"{n}.jsonl").read_text()) for n in ("one", "two"))
    assert list(said[0][0]) == ["judo"] and list(said[1][0]) == ["surf"]
    assert one["metrics"] == two["metrics"]
    assert list(one["metrics"]["objects"]) == list(two["metrics"]["objects"])
    printed = capsys.readouterr().out
    assert printed.count("judo: 6 frames") == printed.count("surf: 6 frames") == 2     # rank 0 prints all


@pytest.mark.parametrize("given, why", [
    (dict(ckpt="x"), "one of the arguments --davis --video is required"),
    (dict(davis="."), "one of the arguments --ckpt --eval_only is required"),
    (dict(davis=".", eval_only="x", ckpt="x"), "not allowed with"),
    (dict(video=".", ckpt="x"), "with --first_mask"), (dict(davis="nowhere", ckpt="x"), "no such list"),
    (dict(video=".", first_mask="m.png", eval_only="x"), "it is not scored"),
    (dict(davis=".", ckpt="x", topk=0), "--topk: '0': expected a whole number, 1 or more"),
    (dict(davis=".", ckpt="x", temp=0), "more than 0"),
    (dict(davis=".", ckpt="x", n_last_frames=-1), "0 or more"),
    (dict(davis=".", ckpt="x", first_mask="m.png"), "--first_mask has no effect with --davis"),
    (dict(video=".", ckpt="x", first_mask="m.png", json="j"), "--json has no effect with --video"),
    (dict(davis=".", eval_only="x", topk=3), "--topk has no effect with --eval_only"),
    (dict(davis=".", eval_only="x", overwrite=True), "--overwrite has no effect with --eval_only"),
    (dict(video=__file__, first_mask="m.png", ckpt="x"), "ffmpeg")])
def test_wrong_options_in_one_line(given, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=why) as e:
        run(**given)
    assert "\n" not in str(e.value)


def test_a_mistake_ends_the_script_with_2_and_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for argv, said in ((["--davis", "none", "--ckpt", "x"], "none/Image"), (["--topk", "five"], "--topk")):
        monkeypatch.setattr(sys, "argv", ["davis.py", *argv])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(davis.__file__, run_name="__main__")
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("davis.py: ") and said in err


def test_a_folder_with_holes(world, tmp_path):
    lists = tmp_path / "ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("judo\n")
    given = dict(TINY, davis=str(tmp_path), output_dir=str(tmp_path / "out"))
    with pytest.raises(Mistake, match="Annotations/480p/judo: this folder cannot be opened"):
        run(**given)
    (tmp_path / "Annotations/480p/judo").mkdir(parents=True)
    with pytest.raises(Mistake, match="Annotations/480p/judo: no mask there, but val.txt lists it"):
        run(**given)
    (tmp_path / "JPEGImages/480p/judo").mkdir(parents=True)
    save(tmp_path / "Annotations/480p/judo/00001.png", np.ones((48, 80), np.uint8))
    with pytest.raises(Mistake, match="JPEGImages/480p/judo: no images there"):
        run(**given)
    save(tmp_path / "JPEGImages/480p/judo/00000.jpg", np.ones((48, 80, 3), np.uint8))
    with pytest.raises(Mistake, match="00000.jpg: the first frame has no mask, only 00001.png"):
        run(**given)
    with pytest.raises(Mistake, match="does not list surf"):
        run(**given, sequences=["surf"])


def test_an_unreadable_frame_is_named_and_the_one_before_comes_again(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "davis")
    bad = tmp_path / "davis/JPEGImages/480p/judo/00002.jpg"
    bad.write_bytes(b"?")
    given = dict(TINY, davis=tmp_path / "davis", output_dir=tmp_path / "out", json=tmp_path / "r.jsonl")
    with pytest.raises(Mistake, match=f"1 of 12 images cannot be read, more than --max_bad 0.01, .* {bad}"):
        run(**given)
    for _ in range(2):                                                 # the second time nothing is propagated
        run(**given, max_bad=0.1)
        assert f"left out: 1 unreadable images: {bad}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[0]["metrics"] == lines[1]["metrics"] and lines[0]["metrics"]["unreadable"] == [str(bad)]
    assert len(list((tmp_path / "out/judo").glob("*.png"))) == 6
    bad.with_name("00000.jpg").write_bytes(b"?")                       # nothing can stand in for the first
    with pytest.raises(Mistake, match="00000.jpg: not a readable image"):
        run(**given, max_bad=1, overwrite=True)


def test_several_checkpoints_and_precisions(world, tmp_path, capsys):
    two = ["random:vit_micro/16", "random:vit_micro/8"]
    given = dict(TINY, davis=world, output_dir=tmp_path / "out", json=tmp_path / "r.jsonl", sequences="judo")
    run(**given | {"ckpt": two})
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["ckpt"] for line in lines] == two
    assert lines[0]["weights"] != lines[1]["weights"] and lines[0]["metrics"] != lines[1]["metrics"]
    assert lines[0]["data_digest"] == lines[1]["data_digest"]
    for line, name in zip(lines, ("random_vit_micro_16", "random_vit_micro_8"), strict=True):
        table = (tmp_path / "out" / name / "global_results-val.csv").read_text().splitlines()[1].split(",")
        assert 100 * float(table[1]) == pytest.approx(line["metrics"]["J&F-Mean"], abs=1e-3)
    with pytest.raises(Mistake, match="another one would write to .*random_vit_micro_8, too"):
        run(**given | {"ckpt": [two[1], two[1]]})
    with pytest.raises(Mistake, match="no-such-file"):                 # all are opened before any work
        run(**given | {"ckpt": [two[0], "no-such-file"], "output_dir": tmp_path / "none"})
    assert not (tmp_path / "none/random_vit_micro_16").exists()

    run(**given, precision="bf16")
    line = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1])
    assert line["protocol"]["precision"] == "bf16" and (tmp_path / "out/judo/00005.png").is_file()
    with pytest.raises(Mistake, match="precision bf16, now fp32"):
        run(**given)
    with pytest.raises(Mistake, match="--block: .*this network has blocks 1"):
        run(**given, block=40)
    capsys.readouterr()


def test_a_strip_is_refused_before_the_work(tmp_path):
    save(tmp_path / "clip/0.png", np.zeros((4, 60000, 3), np.uint8))
    mask = np.zeros((4, 60000), np.uint8)
    mask[1:3, 100:200] = 1
    save(tmp_path / "mask.png", mask)
    given = dict(ckpt="random:vit_micro/16", video=tmp_path / "clip", output_dir=tmp_path / "out")
    with pytest.raises(Mistake, match=r"\(4, 60000\) would become \(480, 7200000\), more than 65536 tokens"):
        run(**given, first_mask=tmp_path / "mask.png")
    assert not (tmp_path / "out/clip").exists()


def test_files_of_a_folder(tmp_path):
    """Numeric order, whatever the digits; other files are counted; what a system leaves behind is no data."""
    for name in ("a10.png", "a2.png", "a02.png", "b1.jpeg", "²3.png", ".a.png", "._a2.png", "notes.txt", "x"):
        (tmp_path / name).touch()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a3.png").touch()                                # a folder below is not entered
    left_out = Counter()
    names = [path.name for path in videos.images_in(tmp_path, left_out)]
    assert names == ["a02.png", "a2.png", "a10.png", "b1.jpeg", "²3.png"]
    assert left_out == {".txt": 1, "without suffix": 1, "hidden": 2}


def test_frames_that_would_share_a_mask_or_are_the_mask(tmp_path, capsys):
    images, instances = toy.video(3, frames=2, size=(48, 80))
    for t, image in enumerate(images):
        save(tmp_path / f"clip/{t}.png", image)
    mask = tmp_path / "clip/first.png"                                 # lies among the frames
    save(mask, instances[0])
    given = dict(TINY, video=tmp_path / "clip", first_mask=mask, output_dir=tmp_path / "out")
    run(**given)
    assert "1 sequence, 2 frames, " in capsys.readouterr().out
    save(tmp_path / "clip/1.bmp", images[1])
    with pytest.raises(Mistake, match="two images of one name"):
        run(**given, overwrite=True)
    (tmp_path / "clip/1.bmp").unlink()
    with pytest.raises(Mistake, match="clip: the masks would lie among the frames"):
        run(**given | {"output_dir": tmp_path}, overwrite=True)


def test_names_that_are_not_utf8(world, tmp_path):
    name = os.fsdecode("café".encode("latin-1"))
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(world / kind / "480p/judo", tmp_path / kind / "480p" / name)
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\r\n")     # byte-order mark
    run(**TINY, davis=tmp_path, output_dir=tmp_path / "out", json=tmp_path / "r.jsonl", overlay=True)
    assert b"caf\xe9_1" in (tmp_path / "out/per-object_results-val.csv").read_bytes()
    assert f"{name}_1" in json.loads((tmp_path / "r.jsonl").read_text())["metrics"]["objects"]


def test_paths_to_write_are_tried_first(world, tmp_path):
    (tmp_path / "file").touch()
    given = dict(TINY, davis=world)
    with pytest.raises(Mistake, match="--json .*none/r.jsonl: cannot be written"):
        run(**given, output_dir=tmp_path / "out", json=tmp_path / "none/r.jsonl")
    with pytest.raises(Mistake, match="--output_dir .*file/out: cannot be written"):
        run(**given, output_dir=tmp_path / "file/out")


# ------------------------------------------------- what it is for
def toy_score(vit, count=3, frames=16):
    rows = []
    for i in range(count):
        images, truth = toy.video(1000 + i, frames=frames)
        masks = davis.track(vit, torch.from_numpy(images).permute(0, 3, 1, 2), truth[0], size=128,
                            size_multiple=8, size_mask_neighborhood=4)     # 16 x 28 tokens
        pairs = list(zip(masks, truth, strict=True))[1:-1]
        for k in range(1, truth[0].max() + 1):
            each = [(videos.jaccard(m == k, t == k), videos.boundary_f(m == k, t == k)) for m, t in pairs]
            rows.append(videos.summary(*np.array(each).T))
    return videos.mean_of(rows)["J&F-Mean"]


def train_on_textures(vit, steps=200, scenes=100, crop=64):
    """A few seconds of naming the class under each token, in 64-pixel crops of 128-pixel scenes."""
    drawn, P = [toy.scene(i, seed=5, size=128) for i in range(scenes)], vit.patch_size
    images = normalize(torch.from_numpy(np.stack([s.image for s in drawn])).permute(0, 3, 1, 2))
    labels = np.stack([np.array([0, *(c + 1 for c in s.categories)])[s.instances] for s in drawn])
    labels, g = torch.from_numpy(labels), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = torch.nn.Linear(vit.embed_dim, 1 + len(toy.CLASSES))
    optimizer = torch.optim.AdamW([*vit.requires_grad_(True).parameters(), *head.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i, corner = (torch.randint(*size, generator=g) for size in ((scenes, (24,)), (129 - crop, (2,))))
        y, x = corner.tolist()
        z = F.normalize(vit(images[i, :, y:y + crop, x:x + crop])[:, 1:], dim=-1)
        y, x = (slice(start + P // 2, start + crop, P) for start in (y, x))
        loss = F.cross_entropy(10 * head(z).flatten(0, 1), labels[i, y, x].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return vit.requires_grad_(False)


@pytest.mark.slow
def test_trained_features_follow_toy_objects_far_better_than_random_ones(monkeypatch):
    """Several objects that pass behind each other.  Seen: random 0.23, trained 0.47."""
    monkeypatch.setattr(toy, "OWN", 0.0)                               # colour alone would follow them
    monkeypatch.setattr(toy, "CHROMA", 0.10)
    vit = small_vit()
    random, trained = toy_score(vit), toy_score(train_on_textures(vit))
    print(f"toy J&F: random {random:.2f}, trained {trained:.2f}")
    assert trained > 1.5 * random and trained > random + 0.12


@pytest.mark.slow
def test_real_video(real_data):
    """Nine frames of blackswan at half size with a real backbone, in the whole chain of track and score."""
    folder = real_data / "DAVIS"
    vit, _ = load_backbone(str(next((real_data / "weights").glob("vits14*.pth"))))
    frames = images_in(folder / "JPEGImages/480p/blackswan")[:9]
    truth = [videos.read_mask(folder / f"Annotations/480p/blackswan/{p.stem}.png") for p in frames]
    masks = list(davis.track(vit, map(read_image, frames), truth[0], size=224))
    assert masks[3].shape == (480, 854)
    pairs = [(m == 1, t == 1) for m, t in zip(masks, truth, strict=True)][1:]
    j, f = np.mean([(videos.jaccard(*p), videos.boundary_f(*p)) for p in pairs], axis=0)
    print(f"blackswan, 8 frames at 224 pixels: J {j:.2f} F {f:.2f}")
    assert j > 0.7 and f > 0.4
