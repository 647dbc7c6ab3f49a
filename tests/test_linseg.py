"""Proves: mIoU and accuracy equal scikit-learn's, windows equal a plain evaluation, images and labels stay
aligned under every augmentation, each published layout is read, and the probe learns, resumes, refuses."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

import linseg
import probes
import toy
from data import generator_of
from linseg import Pairs, augment, confusion, scores, sliding_logits, windows
from model import ViT

ROOT = Path(__file__).parent.parent


# ---- the score
def test_scores_equal_scikit_learn():
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 6, (3, 40, 50), generator=g) for _ in range(2))
    truth[truth == 4], guess[guess == 4] = 1, 2                        # class 4 is nowhere
    truth[truth == 5] = 3                                              # class 5 is predicted only: IoU 0
    truth[torch.rand(truth.shape, generator=g) < 0.2] = 255
    counts = sum(confusion(p, t, 7) for p, t in zip(guess, truth, strict=True))
    miou, accuracy, iou = scores(counts)
    kept = truth != 255
    t, p = truth[kept].numpy(), guess[kept].numpy()
    for c in (0, 1, 2, 3, 5):
        assert iou[c].item() == pytest.approx(100 * jaccard_score(t == c, p == c), abs=1e-6)
    assert iou[[4, 6]].isnan().all() and iou[5] == 0
    assert miou == pytest.approx(100 * jaccard_score(t, p, average="macro", labels=[0, 1, 2, 3, 5]), abs=1e-6)
    assert accuracy == pytest.approx(100 * accuracy_score(t, p), abs=1e-6)


# ---- the sliding window
def test_windows_cover_everything():
    assert windows(512, 512, 341) == [0] and windows(513, 512, 341) == [0, 1]
    assert windows(853, 512, 341) == [0, 341] and windows(854, 512, 341) == [0, 341, 342]


def test_sliding_window_equals_one_forward_and_averages():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    from data import normalize
    with torch.no_grad():
        assert torch.allclose(sliding_logits(conv, image, 32, 21), conv(normalize(image[None]))[0], atol=1e-6)
        calls = []

        def counting(x):                                               # window k answers k everywhere
            calls.append(1)
            return torch.full((1, 2, 32, 32), float(len(calls)))
        out = sliding_logits(counting, image.repeat(1, 1, 2)[:, :, :48], 32, 16)
        assert out.shape == (2, 32, 48) and len(calls) == 2
        assert (out[..., :16] == 1).all() and (out[..., 16:32] == 1.5).all() and (out[..., 32:] == 2).all()
        small = sliding_logits(counting, image[:, :20, :10], 32, 16)
        assert small.shape == (2, 20, 10)


# ---- augmentation
def test_images_and_labels_stay_aligned(monkeypatch):
    """The image is its own label (distortion off): a shift by one pixel would show at every edge."""
    monkeypatch.setattr(linseg, "distort", lambda x, r: x)
    label = torch.zeros(60, 90, dtype=torch.uint8)
    label[10:30, 20:50], label[35:55, 50:85], label[40:50, 5:25] = 1, 2, 3
    flips = 0
    for seed in range(40):
        x, y = augment((label * 60).expand(3, -1, -1).contiguous(), label, 48, generator_of(seed))
        assert x.shape == (3, 48, 48) and y.shape == (48, 48)
        inside, wrong = y != 255, ((x[0].float() / 60 - y.float()).abs() > 0.5) & (y != 255)
        assert wrong.sum() <= 0.06 * inside.sum()                      # blurred edges only
        core = torch.nn.functional.max_pool2d(y[None].float(), 5, 1, 2)[0] == -torch.nn.functional.max_pool2d(
            -y[None].float(), 5, 1, 2)[0]
        assert not (wrong & core).any(), seed                          # away from edges: never
        assert (x[0][~inside] == 0).all()
        flips += torch.equal(augment((label * 60).expand(3, -1, -1), label, 48, generator_of(seed))[1], y)
    assert flips == 40                                                 # the generator decides everything


def test_distortion_is_within_its_ranges():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    r = [0.9, 0, 0.5, 0.9, 0.9, 0.9, 0, 0.9, 0, 0]                     # nothing happens
    assert torch.equal(linseg.distort(grey, r), grey)
    assert (linseg.distort(grey, [0.1, 1.0, *r[2:]]) == 132).all()     # brightness +32
    assert (linseg.distort(grey, [0.9, 0, 0.0, 0.1, *r[4:]]) == 50).all()        # contrast 0.5
    assert (linseg.distort(grey, [*r[:5], 0.1, 1.0, *r[7:]]) == 100).all()       # saturation leaves grey


# ---- layouts
def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_published_layouts(tmp_path):
    photo, label = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    label[:10], label[10:, :15] = 7, 33
    ade, city, pair = (tmp_path / n for n in ("ade", "city", "pair"))
    for part in ("training", "validation"):
        save(ade / f"images/{part}/a.jpg", photo)
        save(ade / f"annotations/{part}/a.png", label)
    for part in ("train", "val"):
        save(city / f"leftImg8bit/{part}/ulm/ulm_1_leftImg8bit.png", photo)
        save(city / f"gtFine/{part}/ulm/ulm_1_gtFine_labelIds.png", label)
        save(pair / f"images/{part}/a.jpg", photo)
        save(pair / f"labels/{part}/a.png", label)
    assert Pairs(ade).read(0)[1].unique().tolist() == [6, 32, 255] and len(Pairs(ade).names) == 150
    assert Pairs(city).read(0)[1].unique().tolist() == [0, 18, 255]    # road, bicycle; 0 is unlabelled
    save(city / "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png", label % 19)
    assert Pairs(city).read(0)[1].unique().tolist() == [0, 7, 14]
    assert Pairs(pair).layout == "pairs" and Pairs(pair).read(0)[1].unique().tolist() == [0, 7, 33]
    toy.main(["--out", str(tmp_path / "voc"), "--layout", "voc", "--n", "3", "--n_val", "2"])
    assert (len(Pairs(tmp_path / "voc")), len(Pairs(tmp_path / "voc", "val"))) == (3, 2)
    assert Pairs(tmp_path / "voc").layout == "voc"
    with pytest.raises(ValueError, match="trainaug"):
        Pairs(tmp_path / "voc", layout="voc_aug")


def test_wrong_layouts_and_labels_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of the layouts.*leftImg8bit"):
        Pairs(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        Pairs(tmp_path / "nowhere")
    save(tmp_path / "images/train/a.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "labels/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="1 files are missing"):
        Pairs(tmp_path)
    save(tmp_path / "labels/train/a.png", np.zeros((8, 9), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(8, 9\)"):
        Pairs(tmp_path).read(0)
    for numbers, found in ((np.full((8, 8), 3, np.uint8), 3), (np.full((8, 8), 300, np.uint16), 300)):
        Image.fromarray(numbers).save(tmp_path / "labels/train/a.png")
        with pytest.raises(ValueError, match=f"holds class {found}, expected 0 ... 2 or 255"):
            Pairs(tmp_path, num_classes=3).read(0)
    voc = tmp_path / "voc"
    toy.main(["--out", str(voc), "--layout", "voc", "--n", "1", "--n_val", "1"])
    label = next((voc / "VOC2012/SegmentationClass").glob("toy_train*"))
    with Image.open(label) as im:
        size = im.size
    save(label, np.full(size[::-1], 77, np.uint8))
    with pytest.raises(ValueError, match="holds class 77, expected 0 ... 20"):
        Pairs(voc).read(0)


# ---- the whole probe
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Blocks of three colours, which are the classes."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    colours = np.array([(200, 60, 60), (60, 180, 80), (70, 90, 220)])
    for i in range(24):
        label = rng.integers(0, 3, (2, 2)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
        photo = (colours[label] + rng.normal(0, 10, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        part = "train" if i < 18 else "val"
        save(root / f"pairs/images/{part}/{i}.png", photo)
        save(root / f"pairs/labels/{part}/{i}.png", label)
    torch.manual_seed(0)
    vit = ViT(64, 8, 32, 4, 2)
    torch.save({"arch": vit.config, "step": 0, "backbone": vit.state_dict()}, root / "vit.pth")
    return root


def run(world, out, *more):
    argv = ["linseg", "--ckpt", str(world / "vit.pth"), "--data", str(world / "pairs"), "--num_classes", "3",
            "--crop", "64", "--iters", "40", "--batch_size", "4", "--lr", "3e-2", "--num_workers", "0",
            "--output_dir", str(out), *more]
    args = probes.get_parser().parse_args(argv)
    args.main(args)
    return torch.load(out / "last.pth", weights_only=True)


def test_it_learns_resumes_exactly_and_reports(world, tmp_path, capsys, monkeypatch):
    whole = run(world, tmp_path / "whole", "--json", str(tmp_path / "r.jsonl"))
    said, row = capsys.readouterr().out, json.loads((tmp_path / "r.jsonl").read_text())
    assert "mIoU" in said and "blocks [2, 3, 4]" in said and (tmp_path / "whole/predictions.png").is_file()
    assert row["miou"] > 70 and row["accuracy"] > 80 and len(row["iou"]) == 3

    class Asked:
        asked, calls = False, 0

    def stop_after_five(data):
        Asked.calls += 1
        Asked.asked = Asked.calls > 20                                 # 5 iterations of 4 samples
    real = linseg.Samples.__getitem__
    monkeypatch.setattr(linseg.Samples, "__getitem__", lambda s, n: (stop_after_five(s), real(s, n))[1])
    monkeypatch.setattr(linseg.distributed, "StopSignal", lambda: Asked)
    with pytest.raises(SystemExit) as e:
        run(world, tmp_path / "cut")
    assert e.value.code == 75
    assert 0 < torch.load(tmp_path / "cut/last.pth", weights_only=True)["step"] < 40
    monkeypatch.undo()
    cut = run(world, tmp_path / "cut")
    assert all(torch.equal(v, cut["head"][k]) for k, v in whole["head"].items())
    with pytest.raises(ValueError, match="--lr 0.03 -> 0.2"):
        run(world, tmp_path / "cut", "--lr", "0.2")


def test_other_weights_at_the_same_path_are_refused(world, tmp_path):
    ckpt = tmp_path / "again.pth"
    shutil.copy(world / "vit.pth", ckpt)
    run(world, tmp_path / "out", "--ckpt", str(ckpt), "--iters", "1")
    content = torch.load(ckpt, weights_only=True)
    content["backbone"]["cls_token"] += 1
    torch.save(content, ckpt)
    with pytest.raises(ValueError, match="began with other weights"):
        run(world, tmp_path / "out", "--ckpt", str(ckpt), "--iters", "1", "--force")
    shutil.copy(world / "vit.pth", tmp_path / "moved.pth")
    run(world, tmp_path / "out", "--ckpt", str(tmp_path / "moved.pth"), "--iters", "1")  # the same weights


def test_broken_pairs_are_counted_and_meet_the_ceiling(world, tmp_path, capfd):
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    bad = tmp_path / "pairs/labels/train/0.png"
    bad.write_bytes(b"no picture")
    more = "--data", str(tmp_path / "pairs"), "--iters", "10"
    run(world, tmp_path / "a", *more, "--max_bad", "0.5")
    assert "1 training pairs could not be read" in capfd.readouterr().out
    with pytest.raises(SystemExit) as e:
        run(world, tmp_path / "b", *more)
    said = f"1 of 18 training pairs cannot be read, more than --max_bad 0.01: {bad}"
    assert e.value.code == 2 and said in capfd.readouterr().err


def test_what_a_worker_cannot_read_ends_the_script_in_one_line(world, tmp_path):
    """Without care the script waits for ever for a worker that ignores SIGTERM."""
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    for label in (tmp_path / "pairs/labels/train").iterdir():
        label.write_bytes(b"no picture")
    options = ["--ckpt", str(world / "vit.pth"), "--data", str(tmp_path / "pairs"), "--num_classes", "3",
               "--crop", "64", "--num_workers", "1", "--output_dir", str(tmp_path / "out")]
    p = subprocess.run([sys.executable, str(ROOT / "probes.py"), "linseg", *options], capture_output=True,
                       text=True, timeout=90)
    said = [x for x in p.stderr.splitlines() if "probes.py:" in x]
    assert p.returncode == 2 and "Traceback" not in p.stderr, p.stderr
    assert len(said) == 1 and "pairs in a row cannot be read" in said[0]


def test_mistakes(world, tmp_path):
    for wrong, said in ((["--crop", "4"], "patches of 8"), (["--blocks", "9"], "blocks 1 ... 4"),
                        (["--iters", "0"], "1 or more"), (["--json", "nowhere/x"], "no folder nowhere"),
                        (["--layout", "ade20k"], "no images; expected images/{training")):
        with pytest.raises(ValueError, match=said):
            run(world, tmp_path / "x", *wrong)
