"""Proves: layer decay by hand and as timm's, mixing and augmentations by their definition, test accuracy on
any number of ranks, exact resume, that it learns, and one clear line for each mistake."""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import free_port

import finetune
from augment import RAND_OPS, mix, moved, rand_augment, soft_targets, three_augment
from data import generator_of
from finetune import Classifier, get_args, layer_of, param_groups
from model import ViT

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
COLOURS = {"red": (200, 60, 60), "green": (60, 180, 80), "blue": (70, 90, 220)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three classes that a linear layer can tell apart: 8 train and 5 val images each, so 15 for 2 ranks."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for part, n in (("train", 8), ("val", 5)):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                photo = (np.array(colour) + rng.normal(0, 40, (40, 48, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(photo).save(root / part / name / f"{i}.png")
    return root


def options(world, out, *more):
    return ["--ckpt", "random:vit_micro/8", "--data", str(world), "--size", "32", "--output_dir", str(out),
            "--batch_size", "6", "--epochs", "3", "--warmup_epochs", "1", "--num_workers", "0", "--lr",
            "0.05", "--log_every", "1", *more]


def train(world, out, *more):
    finetune.main(get_args(options(world, out, *more)))
    return torch.load(out / "last.pth", weights_only=True)


# ---- groups
def test_layer_decay_by_hand():
    model = Classifier(ViT(32, 8, 16, 2, 2), 3)
    rates = {id(p): g for g in param_groups(model, 0.05, 0.5) for p in g["params"]}
    table = {"backbone.cls_token": (0.125, 0), "backbone.pos_embed": (0.125, 0),
             "backbone.patch_embed.proj.weight": (0.125, 0.05), "backbone.patch_embed.proj.bias": (0.125, 0),
             "backbone.blocks.0.attn.qkv.weight": (0.25, 0.05), "backbone.blocks.0.norm1.weight": (0.25, 0),
             "backbone.blocks.1.mlp.fc2.weight": (0.5, 0.05), "backbone.blocks.1.mlp.fc2.bias": (0.5, 0),
             "backbone.norm.weight": (1.0, 0), "head.weight": (1.0, 0.05), "head.bias": (1.0, 0)}
    params = dict(model.named_parameters())
    assert len(rates) == len(params)
    for name, (scale, decay) in table.items():
        group = rates[id(params[name])]
        assert (group["scale"], group["weight_decay"]) == (scale, decay), name


def test_layer_decay_equals_timm():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    ours = Classifier(ViT(224, 16, 192, 12, 3), 5)
    wanted = {id(p): (g["lr_scale"], g["weight_decay"]) for g in param_groups_layer_decay(
        theirs, weight_decay=0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65)
        for p in g["params"]}
    named = {n: wanted[id(p)] for n, p in theirs.named_parameters()}
    got = {id(p): (g["scale"], g["weight_decay"]) for g in param_groups(ours, 0.05, 0.65)
           for p in g["params"]}
    for name, p in ours.named_parameters():
        short = name.removeprefix("backbone.")
        if short.split(".")[0] != "norm":                              # timm puts it into the last block
            assert got[id(p)] == pytest.approx(named[short]), name
    assert layer_of("backbone.norm.weight", 12) == 13


# ---- mixing, augmentation
def test_mixing_by_its_definition():
    x, y = torch.rand(6, 3, 16, 16), soft_targets(torch.arange(6) % 3, 3, 0.1)
    assert torch.allclose(y.sum(1), torch.ones(6))
    assert y[0].tolist() == pytest.approx([0.9333, 0.0333, 0.0333], 1e-2)
    a, b = mix(x, y, np.random.default_rng(0), 0.8, 0)
    lam = np.random.default_rng(0).beta(0.8, 0.8)
    assert torch.allclose(a, lam * x + (1 - lam) * x.flip(0))
    assert torch.allclose(b, lam * y + (1 - lam) * y.flip(0))
    for seed in range(20):
        a, b = mix(x, y, np.random.default_rng(seed), 0, 1.0)
        own = (a == x).all(1)                                          # (B, S, S)
        assert ((a == x.flip(0)).all(1) | own).all()
        share = own[0].float().mean().item()
        assert torch.allclose(b, share * y + (1 - share) * y.flip(0), atol=1e-6)
    assert mix(x, y, None, 0, 0)[0] is x
    both = [mix(x, y, np.random.default_rng(s), 0.8, 1.0)[0] for s in range(60)]
    cut = sum(bool(((a == x) | (a == x.flip(0))).all()) for a in both)
    assert 18 < cut < 42                                               # half of the time


def test_rand_augment_ranges():
    assert len(RAND_OPS) == 15
    x = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("Rotate ShearX ShearY TranslateXRel TranslateYRel SolarizeAdd SolarizeIncreasing "
                 "ColorIncreasing ContrastIncreasing BrightnessIncreasing SharpnessIncreasing").split():
        assert (RAND_OPS[name](x, 0.0, 1).int() - x.int()).abs().max() <= 1, name    # magnitude 0: nothing
        assert not torch.equal(RAND_OPS[name](x, 0.9, 1), x), name
    assert torch.equal(RAND_OPS["PosterizeIncreasing"](x, 0.9, 1), x & 0b10000000)   # 4 - int(3.6) = 1 bit
    assert torch.equal(RAND_OPS["SolarizeIncreasing"](x, 1.0, 1), 255 - x)
    bright = RAND_OPS["BrightnessIncreasing"](torch.full_like(x, 100), 0.5, 1)
    assert (bright == 145).all()                                       # 1 + 0.45
    assert torch.equal(RAND_OPS["TranslateXRel"](x, 1.0, 1)[:, :, 9:], x[:, :, :11])  # 0.45 * 20 = 9 pixels
    assert torch.equal(moved(x, angle=90.0), x.rot90(-1, (1, 2)))
    for augment in (rand_augment, three_augment):
        drawn = [augment(x, generator_of(i)) for i in range(30)]
        assert all(d.shape == x.shape and d.dtype == torch.uint8 for d in drawn)
        assert torch.equal(drawn[3], augment(x, generator_of(3)))
        assert sum(not torch.equal(d, x) for d in drawn) > 15


# ---- whole runs
def test_it_learns_and_is_tested_again(world, tmp_path, capsys):
    last = train(world, tmp_path, "--epochs", "12", "--lr", "0.2", "--json", str(tmp_path / "r.jsonl"),
                 "--linear", "--predictions", str(tmp_path / "p.csv"))
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row["top1"] > 80 and last["best"] >= row["top1"] and row["n_val"] == 15
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 16
    said = capsys.readouterr().out
    assert "recipe linear probe" in said and "RANDOM weights" in said and "most often taken for" in said
    finetune.main(get_args(["--eval", str(tmp_path / "best.pth"), "--data", str(world), "--num_workers",
                            "0"]))
    assert f"top-1 {last['best']:.2f} %" in capsys.readouterr().out
    first = finetune.load_backbone("random:vit_micro/8")[0]
    torch.manual_seed(0)                                               # from scratch: the run's seed
    first.init_weights(fixed_pos=False)
    assert all(torch.equal(v, last["model"][f"backbone.{k}"]) for k, v in first.state_dict().items())


def test_resume_is_exact(world, tmp_path, monkeypatch):
    whole = train(world, tmp_path / "whole", "--accum", "2")
    real, calls = finetune.mix, []

    class Stop:
        asked = False

    def counting(*args):
        calls.append(1)
        Stop.asked = len(calls) == 4
        return real(*args)
    monkeypatch.setattr(finetune, "mix", counting)
    monkeypatch.setattr(finetune.distributed, "StopSignal", lambda: Stop)
    with pytest.raises(SystemExit) as e:
        train(world, tmp_path / "cut", "--accum", "2")
    assert e.value.code == 75 and torch.load(tmp_path / "cut/last.pth", weights_only=True)["step"] == 4
    monkeypatch.undo()
    cut = train(world, tmp_path / "cut", "--accum", "2")
    assert whole["step"] == cut["step"] == 6 and whole["best"] == cut["best"]
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())


def test_what_is_tested_is_never_the_train_folder_by_accident(world, tmp_path, capsys):
    train(world, tmp_path / "out", "--epochs", "1")
    (tmp_path / "one").mkdir()
    shutil.copytree(world / "train", tmp_path / "one/train")
    test = ["--eval", str(tmp_path / "out/best.pth"), "--device", "cpu", "--num_workers", "0", "--data"]
    with pytest.raises(ValueError, match="no val split"):
        finetune.main(finetune.get_args([*test, str(tmp_path / "one")]))
    shutil.copytree(world / "val", tmp_path / "flat")
    for where in ([str(world)], [str(tmp_path / "flat")], [str(tmp_path / "one"), "--val_data", str(world)]):
        finetune.main(finetune.get_args([*test, *where]))
        assert "of 15 images" in capsys.readouterr().out


def test_ranks_share_the_test_images(world, tmp_path):
    """15 images on 2 ranks: the same answer for each as on one."""
    train(world, tmp_path)
    rows = []
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        p = subprocess.run([sys.executable, *launch * (ranks > 1), str(ROOT / "finetune.py"), "--eval",
                            str(tmp_path / "best.pth"), "--data", str(world), "--num_workers", "0",
                            "--predictions", str(tmp_path / f"{ranks}.csv")], capture_output=True, text=True,
                           timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert p.returncode == 0, p.stderr
        rows.append([x.split(",")[:3] for x in (tmp_path / f"{ranks}.csv").read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 16


def test_few_images_of_each_class(world):
    images = finetune.open_images(str(world), "train")
    for kwargs, n in (({"fraction": 0.5, "shots": None}, 4), ({"fraction": None, "shots": 3}, 3)):
        part = finetune.chosen(images, seed=0, **kwargs)
        assert np.bincount(part.labels).tolist() == [n] * 3
        assert part.index == finetune.chosen(images, seed=0, **kwargs).index != finetune.chosen(
            images, seed=1, **kwargs).index


def test_last_is_read_as_best_is(world, tmp_path, capsys):
    """Heads of vit_micro are not what its width suggests: the file must say so."""
    last = train(world, tmp_path)
    assert finetune.load_backbone(str(tmp_path / "last.pth"))[0].config["num_heads"] == 4
    finetune.main(get_args(["--eval", str(tmp_path / "last.pth"), "--num_workers", "0",
                            "--data", str(world / "val")]))            # a folder of test images only
    assert f"top-1 {last['top1']:.2f} % of 15 images" in capsys.readouterr().out
    finetune.main(get_args(["--eval", str(tmp_path / "last.pth"), "--num_workers", "0", "--size", "48",
                            "--data", str(world / "val"), "--predictions", str(tmp_path / "48.csv")]))
    finetune.main(get_args(["--eval", str(tmp_path / "last.pth"), "--num_workers", "0",
                            "--data", str(world / "val"), "--predictions", str(tmp_path / "32.csv")]))
    assert (tmp_path / "48.csv").read_text() != (tmp_path / "32.csv").read_text()


def test_transforms_reach_spawned_workers(world, tmp_path):
    loader = finetune.train_loader(
        finetune.Views(finetune.open_images(str(world)), finetune.CropAndAugment(32, "rand"), 0), 4, 0)
    assert pickle.loads(pickle.dumps(loader.dataset))[0, 1]["image"].shape == (3, 32, 32)


def test_an_unreadable_image_counts_once_a_run(world, tmp_path):
    """1 of 24 is below --max_bad 0.05 for any number of epochs and ranks; its replacement keeps its
    own label."""
    shutil.copytree(world, tmp_path / "w")
    (tmp_path / "w/train/blue/7.png").write_text("hello")              # replaced by the first green one
    guard = finetune.Watch(get_args(options(world, tmp_path)), finetune.open_images(str(tmp_path / "w")), CPU)
    guard.bad = {7}
    guard.epoch_end(1)
    assert guard.bad == set()
    views = finetune.Views(guard.images, finetune.CropAndAugment(32, "none"), 0)
    assert views[0, 7]["read"] == 8 and views[0, 7]["bad"] == 7
    port = f"--master_port={free_port()}"
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port,
                        str(ROOT / "finetune.py"),
                        *options(tmp_path / "w", tmp_path / "out", "--max_bad", "0.05", "--epochs", "6")],
                       capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stderr


def test_images_without_label_are_left_out(world):
    images = finetune.Part(finetune.open_images(str(world)), [0, 8, 16, 17])
    images.labels[1] = -1
    assert finetune.labelled(images, "x").labels == [0, 2, 2]


def test_a_held_out_share_is_the_same_for_every_seed(world):
    def split(seed):
        return [x.index for x in finetune.open_split(get_args(
            ["--ckpt", "x", "--data", str(world / "val"), "--val_split", "0.2", "--seed", str(seed)]))]
    (train, val), again = split(0), split(1)
    assert [train, val] == again and len(val) == 3 and sorted(train + val) == list(range(15))


def test_mistakes_are_named(world, tmp_path):
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "two/val/other").mkdir(parents=True)
    photo = next((world / "train/red").iterdir()).read_bytes()
    (tmp_path / "one/train/a/x.png").write_bytes(photo)
    (tmp_path / "two/val/other/x.png").write_bytes(photo)
    (tmp_path / "two/val/red").mkdir()
    (tmp_path / "two/val/red/x.png").write_bytes(photo)
    for wrong, said in ((["--data", str(tmp_path / "one")], "no classes"),
                        (["--data", str(tmp_path / "no")], "no such folder"),
                        (["--shots", "9"], "class blue has only 8"), (["--shots", "0"], "1 or more"),
                        (["--shots", "2", "--fraction", "0.5"], "one of them"),
                        (["--val_split", "1.5"], "below 1"), (["--smoothing", "2"], "below 1"),
                        (["--batch_size", "1"], "two images"), (["--mixup", "-1"], "0 or more"),
                        (["--json", str(tmp_path / "no/x")], "no folder"),
                        (["--predictions", str(tmp_path / "no/x")], "no folder"),
                        (["--val_data", str(tmp_path / "two/val")], "one of them has blue, green, other"),
                        (["--size", "30"], "not a multiple of the patch size 8 .*try 24"),
                        (["--fraction", "2"], "at most 1"), (["--batch_size", "99"], "lower --batch_size"),
                        (["--size", "0"], "not a multiple"), (["--json", str(tmp_path)], "is a folder"),
                        (["--picture", str(tmp_path / "x")], "ends in .png"),
                        (["--eval", "x"], "give --ckpt")):
        with pytest.raises(ValueError, match=said):
            train(world, tmp_path / "out", *wrong)


def test_help_documents_every_option():
    for action in finetune.get_parser()._actions:
        assert action.help and len(action.help) > 10, action.dest
