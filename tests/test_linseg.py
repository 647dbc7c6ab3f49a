"""Proves: mIoU and accuracy equal scikit-learn's, windows equal a plain evaluation, images and labels stay
aligned under every augmentation, each published layout is read (COCO's label maps as pycocotools draws them),
a half-converted Cityscapes and lists of paths too, and the probe learns, resumes, refuses."""
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

import labelmaps
import linseg
import probes
from data import LoaderDied, generator_of
from images import BadImage, normalize
from labelmaps import Pairs, Samples, augment
from linseg import confusion, likeliest, scores, sliding_logits, windows
from model import ViT
from run import Mistake
from studies import layouts

ROOT = Path(__file__).parent.parent


# ---- the score
def test_scores_equal_scikit_learn():
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 6, (3, 40, 50), generator=g) for _ in range(2))
    truth[truth == 4] = 1                                              # class 4 is nowhere
    guess[guess == 4] = 2
    truth[truth == 5] = 3                                              # class 5 is predicted only: IoU 0
    truth[torch.rand(truth.shape, generator=g) < 0.2] = 255
    counts = sum(confusion(p, t, 7) for p, t in zip(guess, truth, strict=True))
    miou, accuracy, iou = scores(counts)
    kept = truth != 255
    t = truth[kept].numpy()
    p = guess[kept].numpy()
    for c in (0, 1, 2, 3, 5):
        assert iou[c].item() == pytest.approx(100 * jaccard_score(t == c, p == c), abs=1e-6)
    assert iou[[4, 6]].isnan().all() and iou[5] == 0
    assert miou == pytest.approx(100 * jaccard_score(t, p, average="macro", labels=[0, 1, 2, 3, 5]), abs=1e-6)
    assert accuracy == pytest.approx(100 * accuracy_score(t, p), abs=1e-6)


def test_the_likeliest_class_equals_the_plain_argmax():
    logits = torch.randn(41, 6, 9, generator=torch.Generator().manual_seed(0))
    logits[7] = logits[30]                                             # of equals, the first
    plain = torch.nn.functional.interpolate(logits[None], size=(50, 70), mode="bilinear")[0].argmax(0)
    for together in (1, 16, 100):
        assert torch.equal(likeliest(logits, (50, 70), together), plain)


# ---- the sliding window
def test_windows_cover_everything():
    assert windows(512, 512, 341) == [0] and windows(513, 512, 341) == [0, 1]
    assert windows(853, 512, 341) == [0, 341] and windows(854, 512, 341) == [0, 341, 342]


def test_sliding_window_equals_one_forward_and_averages():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
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
    monkeypatch.setattr(labelmaps, "distort", lambda x, r: x)
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
    assert torch.equal(labelmaps.distort(grey, r), grey)
    assert (labelmaps.distort(grey, [0.1, 1.0, *r[2:]]) == 132).all()     # brightness +32
    assert (labelmaps.distort(grey, [0.9, 0, 0.0, 0.1, *r[4:]]) == 50).all()        # contrast 0.5
    assert (labelmaps.distort(grey, [*r[:5], 0.1, 1.0, *r[7:]]) == 100).all()       # saturation leaves grey


def test_each_pass_is_a_permutation_drawn_once(world, monkeypatch):
    drawn = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: (drawn.append(1), real(*a, **k))[1])
    samples = Samples(Pairs(world / "pairs", num_classes=3), 16, seed=0)
    n = len(samples.pairs)
    passes = [[samples[epoch * n + i]["index"] for i in range(n)] for epoch in range(2)]
    assert [sorted(p) for p in passes] == [list(range(n))] * 2 and passes[0] != passes[1]
    assert len(drawn) == 2
    assert passes[1][3] == Samples(samples.pairs, 16, seed=0)[n + 3]["index"]     # whatever was asked before


# ---- layouts
def save(path, array, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **more)


def write_world(out, layout, n, n_val):
    options = ["--out", out, "--layout", layout, "--n", n, "--n_val", n_val]
    layouts.main(layouts.get_args([str(option) for option in options]))


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
    assert Pairs(ade).read(0)[1].unique().tolist() == [6, 32, 255] and len(Pairs(ade).classes) == 150
    assert Pairs(city).read(0)[1].unique().tolist() == [0, 18, 255]    # road, bicycle; 0 is unlabelled
    save(city / "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png", label % 19)
    assert Pairs(city).read(0)[1].unique().tolist() == [0, 7, 14]
    assert Pairs(pair).layout == "pairs" and Pairs(pair).read(0)[1].unique().tolist() == [0, 7, 33]
    write_world(tmp_path / "voc", "voc", 3, 2)
    assert (len(Pairs(tmp_path / "voc")), len(Pairs(tmp_path / "voc", "val"))) == (3, 2)
    assert Pairs(tmp_path / "voc").layout == "voc"
    with pytest.raises(Mistake, match="trainaug"):
        Pairs(tmp_path / "voc", layout="voc_aug")


def test_a_half_converted_cityscapes_is_read_file_by_file(tmp_path):
    """The conversion to train ids stopped after the first city; both cities show the same four things."""
    rows = np.repeat(np.arange(4), 4)[:, None] * np.ones((1, 32), int)
    ids = np.array([0, 7, 8, 11], np.uint8)[rows]
    train_ids = np.array([255, 0, 1, 2], np.uint8)[rows]
    photo = np.zeros((16, 32, 3), np.uint8)
    for split in ("train", "val"):
        for city in ("aachen", "bochum"):
            save(tmp_path / f"leftImg8bit/{split}/{city}/{city}_0_leftImg8bit.png", photo)
            save(tmp_path / f"gtFine/{split}/{city}/{city}_0_gtFine_labelIds.png", ids)
        save(tmp_path / f"gtFine/{split}/aachen/aachen_0_gtFine_labelTrainIds.png", train_ids)
        save(tmp_path / f"leftImg8bit/{split}/aachen/preview.png", train_ids)
        pairs = Pairs(tmp_path, split)
        assert len(pairs) == 2 and pairs.left_out == {"images not named *_leftImg8bit.png": 1}
        for i in range(2):
            assert np.array_equal(pairs.read(i)[1].numpy(), train_ids), pairs.name(i)


def test_voc_lists_of_names_and_of_paths(tmp_path):
    voc = tmp_path / "VOC2012"
    for i in range(4):
        save(voc / f"JPEGImages/{i}.jpg", np.zeros((8, 8, 3), np.uint8))
        save(voc / f"SegmentationClass/{i}.png", np.full((8, 8), 1, np.uint8))
        save(voc / f"SegmentationClassAug/{i}.png", np.full((8, 8), 2, np.uint8))
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes(b"\xef\xbb\xbf0\n1\n\n")
    (lists / "val.txt").write_text("2\n3\n")
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in range(3)]      # as DeepLab's
    (lists / "trainaug.txt").write_text("".join(lines))
    assert len(Pairs(tmp_path)) == 2 and Pairs(tmp_path).read(0)[1].unique().tolist() == [1]
    aug = Pairs(tmp_path, layout="voc_aug")
    assert len(aug) == 3 and [Path(aug.name(i)).name for i in range(3)] == ["0.jpg", "1.jpg", "2.jpg"]
    assert aug.read(0)[1].unique().tolist() == [2]
    assert Pairs(tmp_path, "val", "voc_aug").read(0)[1].unique().tolist() == [2]      # SBD's labels, too
    (lists / "trainaug.txt").write_text("0 1 2\n")
    with pytest.raises(Mistake, match="0 1 2.*expected a name, or the paths"):
        Pairs(tmp_path, layout="voc_aug")


def test_files_that_are_no_data_are_left_out_and_counted(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / f"images/{split}/a.jpg", np.zeros((8, 8, 3), np.uint8))
        save(tmp_path / f"labels/{split}/a.png", np.zeros((8, 8), np.uint8))
        (tmp_path / f"images/{split}/._a.jpg").write_bytes(b"\0\5\26\7")            # macOS on exFAT
        (tmp_path / f"labels/{split}/._a.png").write_bytes(b"\0\5\26\7")
        (tmp_path / f"images/{split}/notes.txt").write_text("x")
    pairs = Pairs(tmp_path, num_classes=1)
    assert len(pairs) == 1 and pairs.left_out == {".txt": 1, "hidden": 1}


def test_labels_describe_stored_pixels(tmp_path):
    """An EXIF tag that turns the photo by 180 degrees does not turn the label."""
    photo = np.zeros((16, 16, 3), np.uint8)
    photo[:8, :8] = 220
    label = (photo[..., 0] > 0).astype(np.uint8)
    exif = Image.Exif()
    exif[0x112] = 3
    save(tmp_path / "images/train/a.jpg", photo, exif=exif, quality=95)
    save(tmp_path / "labels/train/a.png", label)
    image, read = Pairs(tmp_path, num_classes=2).read(0)
    assert torch.equal(image[0] > 110, read == 1)


def test_labels_in_other_png_modes(tmp_path):
    """A palette, 1 bit, grey saved as RGB: the same numbers; long comments in the file do not matter."""
    from PIL.PngImagePlugin import PngInfo
    label = np.eye(8, dtype=np.uint8)
    comment = PngInfo()
    comment.add_text("workflow", "x" * (2 << 20), zip=True)
    save(tmp_path / "images/train/a.png", np.zeros((8, 8, 3), np.uint8), pnginfo=comment)
    path = tmp_path / "labels/train/a.png"
    palette = Image.fromarray(label)
    palette.putpalette([0, 0, 0, 200, 0, 0] + [0] * 762)
    grey = Image.fromarray(np.repeat(label[..., None], 3, axis=2))
    path.parent.mkdir(parents=True)
    for picture in (palette, Image.fromarray(label > 0), grey):
        picture.save(path, pnginfo=comment)
        assert np.array_equal(Pairs(tmp_path, num_classes=2).read(0)[1].numpy(), label)
    save(path, np.random.default_rng(0).integers(0, 2, (8, 8, 3), dtype=np.uint8))
    with pytest.raises(BadImage, match="has colours"):
        Pairs(tmp_path, num_classes=2).read(0)


def test_wrong_layouts_and_labels_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="none of the layouts.*leftImg8bit"):
        Pairs(tmp_path / "empty")
    with pytest.raises(Mistake, match="no such folder"):
        Pairs(tmp_path / "nowhere")
    save(tmp_path / "images/train/a.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "labels/train").mkdir(parents=True)
    with pytest.raises(Mistake, match="1 files are missing"):
        Pairs(tmp_path)
    save(tmp_path / "labels/train/a.png", np.zeros((8, 9), np.uint8))
    with pytest.raises(BadImage, match=r"shape \(8, 9\)"):
        Pairs(tmp_path).read(0)
    for numbers, found in ((np.full((8, 8), 3, np.uint8), 3), (np.full((8, 8), 300, np.uint16), 300)):
        Image.fromarray(numbers).save(tmp_path / "labels/train/a.png")
        with pytest.raises(BadImage, match=f"holds class {found}, expected 0 ... 2 or 255"):
            Pairs(tmp_path, num_classes=3).read(0)
    voc = tmp_path / "voc"
    write_world(voc, "voc", 1, 1)
    label = next((voc / "VOC2012/SegmentationClass").glob("toy_train*"))
    with Image.open(label) as im:
        size = im.size
    save(label, np.full(size[::-1], 77, np.uint8))
    with pytest.raises(BadImage, match="holds class 77, expected 0 ... 20"):
        Pairs(voc).read(0)


# ---- COCO's label maps
def official_label(coco, image, number) -> np.ndarray:
    """pycocotools' masks: crowd regions, then objects from large to small."""
    label = np.zeros((image["height"], image["width"]), np.uint8)
    annotations = coco.imgToAnns[image["id"]]
    masks = [coco.annToMask(a).astype(bool) for a in annotations]
    order = sorted(range(len(masks)), key=lambda i: (not annotations[i]["iscrowd"], -masks[i].sum()))
    for i in order:
        a = annotations[i]
        label[masks[i]] = 255 if a["iscrowd"] else number[a["category_id"]]
    return label


def test_coco_labels_equal_pycocotools(tmp_path, capsys):
    from pycocotools.coco import COCO
    ids = [90, 3, 17]                                                  # not in order, with gaps
    boxes = [(0, 0, 40, 40, 90, 0), (10, 10, 12, 12, 3, 0), (5, 5, 30, 30, 17, 0), (20, 0, 28, 48, 3, 1)]
    annotations = []
    for k, (x, y, w, h, category, crowd) in enumerate(boxes):
        ring = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append({"id": k, "image_id": 1, "category_id": category, "iscrowd": crowd, "area": 1,
                            "bbox": [x, y, w, h], "segmentation": [ring]})
    for split in ("train2017", "val2017"):
        save(tmp_path / split / "a.jpg", np.zeros((48, 50, 3), np.uint8))
        save(tmp_path / split / "b.jpg", np.zeros((8, 8, 3), np.uint8))
        content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 50},
                              {"id": 2, "file_name": "b.jpg", "height": 8, "width": 8}],
                   "annotations": annotations, "categories": [{"id": k, "name": f"c{k}"} for k in ids]}
        path = tmp_path / f"annotations/instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    pairs = Pairs(tmp_path)
    assert pairs.layout == "coco" and pairs.classes == ["background", "c3", "c17", "c90"]
    official = official_label(COCO(str(path)), content["images"][0], {3: 1, 17: 2, 90: 3})
    label = pairs.read(0)[1].numpy()
    assert np.array_equal(label, official)
    assert (label[12, 12], label[6, 6], label[1, 1], label[45, 45], label[45, 1]) == (1, 2, 3, 255, 0)
    assert (pairs.read(1)[1] == 0).all()                               # an image without objects


@pytest.mark.slow
def test_real_coco_labels_equal_pycocotools(real_data):
    from pycocotools.coco import COCO
    root = real_data / "coco"
    for split in ("train", "val"):
        coco = COCO(str(root / f"annotations/instances_{split}2017.json"))
        number = {category: k for k, category in enumerate(sorted(coco.cats), start=1)}
        pairs = Pairs(root, split)
        assert len(pairs.classes) == 81 and pairs.classes[1] == "person" and pairs.classes[80] == "toothbrush"
        by_name = {image["file_name"]: image for image in coco.imgs.values()}
        seen = Counter()
        for i in range(len(pairs)):
            label = pairs.read(i)[1].numpy()
            assert np.array_equal(label, official_label(coco, by_name[Path(pairs.name(i)).name], number))
            seen.update(np.unique(label).tolist())
        assert seen[255] and len(seen) > 50


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


def run_probe(world, out, *more):
    argv = ["linseg", "--ckpt", str(world / "vit.pth"), "--data", str(world / "pairs"), "--num_classes", "3",
            "--crop", "64", "--iters", "40", "--batch_size", "4", "--lr", "3e-2", "--num_workers", "0",
            "--output_dir", str(out), *more]
    args = probes.get_args(argv)
    probes.main(args)
    return torch.load(out / "last.pth", weights_only=True)


def test_it_learns_resumes_exactly_and_reports(world, tmp_path, capsys, monkeypatch):
    whole = run_probe(world, tmp_path / "whole", "--json", str(tmp_path / "r.jsonl"))
    said, row = capsys.readouterr().out, json.loads((tmp_path / "r.jsonl").read_text())
    assert "linseg, pairs: 18 train, 6 test images, 3 classes" in said
    assert "mIoU" in said and "blocks [2, 3, 4]" in said and (tmp_path / "whole/predictions.png").is_file()
    metrics = row["metrics"]
    assert metrics["miou"] > 70 and metrics["accuracy"] > 80 and len(metrics["iou"]) == 3
    assert metrics["n_unreadable"] == 0 and row["eval"] == "linseg" and row["protocol"]["crop"] == 64

    with pytest.raises(SystemExit) as e:
        run_probe(world, tmp_path / "cut", "--stop_at", "6")
    assert e.value.code == 75
    assert torch.load(tmp_path / "cut/last.pth", weights_only=True)["step"] == 6

    def killed(loader):                                                # a worker dies in the 12th iteration
        if len(asked) == 5:
            raise LoaderDied("a loader process was killed")
        asked.append(1)
        return real(loader)
    asked, real = [], linseg.next_batch
    monkeypatch.setattr(linseg, "next_batch", killed)
    with pytest.raises(LoaderDied):
        run_probe(world, tmp_path / "cut")
    assert torch.load(tmp_path / "cut/last.pth", weights_only=True)["step"] == 11
    monkeypatch.undo()
    cut = run_probe(world, tmp_path / "cut")
    assert all(torch.equal(v, cut["head"][k]) for k, v in whole["head"].items())
    with pytest.raises(Mistake, match="--lr 0.03 -> 0.2"):
        run_probe(world, tmp_path / "cut", "--lr", "0.2")
    with pytest.raises(Mistake, match=r"size mismatch for conv\."):           # before anything is written
        run_probe(world, tmp_path / "cut", "--num_classes", "4", "--force")
    assert torch.load(tmp_path / "cut/last.pth", weights_only=True)["options"]["num_classes"] == 3


@pytest.mark.slow
def test_several_checkpoints_each_have_a_folder(world, tmp_path):
    shutil.copy(world / "vit.pth", tmp_path / "b.pth")
    more = ["--ckpt", str(world / "vit.pth"), "random:vit_micro/8", "--iters", "2"]
    with pytest.raises(FileNotFoundError):                             # of run_probe itself: no DIR/last.pth
        run_probe(world, tmp_path / "out", *more, "--json", str(tmp_path / "r.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["ckpt"] for row in rows] == [str(world / "vit.pth"), "random:vit_micro/8"]
    assert len({row["weights"] for row in rows}) == 2
    assert len(list((tmp_path / "out").rglob("last.pth"))) == 2
    with pytest.raises(Mistake, match="no such checkpoint"):           # seen before any work
        run_probe(world, tmp_path / "none", "--ckpt", str(world / "vit.pth"), "nowhere.pth")
    assert not (tmp_path / "none").exists()


def test_two_checkpoints_whose_folder_is_the_same_are_refused_before_the_work(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    shutil.copy(world / "vit.pth", "a_b.pth")
    torch.manual_seed(1)
    other = ViT(64, 8, 32, 4, 2)
    torch.save({"arch": other.config, "step": 0, "backbone": other.state_dict()}, "a/b.pth")
    with pytest.raises(Mistake, match="--ckpt a_b.pth: another one has the folder .*out/a_b"):
        run_probe(world, tmp_path / "out", "--ckpt", "a/b.pth", "a_b.pth")
    assert not (tmp_path / "out").exists()


def test_other_weights_at_the_same_path_are_refused(world, tmp_path):
    ckpt = tmp_path / "again.pth"
    shutil.copy(world / "vit.pth", ckpt)
    run_probe(world, tmp_path / "out", "--ckpt", str(ckpt), "--iters", "1")
    content = torch.load(ckpt, weights_only=True)
    content["backbone"]["cls_token"] += 1
    torch.save(content, ckpt)
    with pytest.raises(Mistake, match="other options: --weights"):
        run_probe(world, tmp_path / "out", "--ckpt", str(ckpt), "--iters", "1")
    shutil.copy(world / "vit.pth", tmp_path / "moved.pth")             # the same weights
    run_probe(world, tmp_path / "out", "--ckpt", str(tmp_path / "moved.pth"), "--iters", "1")


@pytest.mark.slow
def test_broken_pairs_are_counted_and_meet_the_ceiling(world, tmp_path, capfd):
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    bad = tmp_path / "pairs/labels/train/0.png"
    bad.write_bytes(b"no picture")
    more = "--data", str(tmp_path / "pairs"), "--iters", "10"
    run_probe(world, tmp_path / "a", *more, "--max_bad", "0.5", "--json", str(tmp_path / "r.jsonl"))
    said = capfd.readouterr().out
    assert "1 unreadable images replaced" in said and f"gave way to another: {bad}: not a readable" in said
    assert (tmp_path / "a/bad_images.txt").read_text() == str(tmp_path / "pairs/images/train/0.png") + "\n"
    with pytest.raises(SystemExit) as e:
        run_probe(world, tmp_path / "b", *more)
    captured = capfd.readouterr()
    assert e.value.code == 2 and "1 of 18 images are unreadable, more than --max_bad 0.01" in captured.err
    assert str(bad) in captured.out                                    # which, and why

    bad = tmp_path / "pairs/labels/val/20.png"
    bad.write_bytes(b"no picture")
    said = f"1 of 6 images cannot be read, more than --max_bad 0.1, such as {bad}"
    with pytest.raises(Mistake, match=said):
        run_probe(world, tmp_path / "a", *more, "--max_bad", "0.1")
    run_probe(world, tmp_path / "a", *more, "--max_bad", "0.5", "--json", str(tmp_path / "r.jsonl"))
    assert f"left out: 1 unreadable images: {bad}" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["metrics"]["n_unreadable"] for row in rows] == [0, 1]
    assert [row["metrics"]["n_unreadable_train"] for row in rows] == [1, 1]


@pytest.mark.slow
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
                        (["--iters", "0"], "1 or more"), (["--json", "nowhere/x"], "nowhere/x: cannot be"),
                        (["--layout", "ade20k"], "no images; expected images/{training"),
                        (["--layout", "coco"], "instances_train2017.json: no such file")):
        with pytest.raises(Mistake, match=said):
            run_probe(world, tmp_path / "x", *wrong)
    write_world(tmp_path / "voc", "voc", 1, 1)
    with pytest.raises(Mistake, match="--num_classes: voc has its own 21 classes"):
        run_probe(world, tmp_path / "x", "--data", str(tmp_path / "voc"))
