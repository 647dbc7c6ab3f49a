"""Proves: layer decay by hand and as timm's, test accuracy on any number of ranks, exact resume, that it
learns, that what cannot be read is left out and said, and one clear line for each mistake."""
import csv
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

import checkpoint
import classifier
import data
import finetune
from classifier import Classifier
from data import LoaderDied
from finetune import get_args, layer_of, param_groups
from model import ViT
from run import Mistake

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
COLOURS = {"red": (200, 60, 60), "green": (60, 180, 80), "blue": (70, 90, 220)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three classes that a linear layer can tell apart: 8 train and 5 val images each, so 15 for 2 ranks."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for split, n in (("train", 8), ("val", 5)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                photo = (np.array(colour) + rng.normal(0, 40, (40, 48, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(photo).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run of three epochs."""
    out = tmp_path_factory.mktemp("trained")
    train(world, out)
    return out


@pytest.fixture
def copy(world, tmp_path):
    """The world, to be spoilt."""
    return Path(shutil.copytree(world, tmp_path / "copy"))


def options(world, out, *more):
    return ["--ckpt", "random:vit_micro/8", "--data", str(world), "--size", "32", "--output_dir", str(out),
            "--batch_size", "6", "--epochs", "3", "--warmup_epochs", "1", "--num_workers", "0", "--lr",
            "0.05", "--log_every", "1", "--precision", "fp32", "--device", "cpu", *more]


def train(world, out, *more):
    """What is left in last.pth."""
    finetune.main(get_args(options(world, out, *more)))
    return torch.load(out / "last.pth", weights_only=True)


def evaluate(path, world, *more):
    fixed = ["--num_workers", "0", "--device", "cpu"]
    finetune.main(get_args(["--eval", str(path), "--data", str(world), *fixed, *more]))


def scores_of(out):
    """The lines of log.jsonl that tests wrote."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "top1" in line]


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.reader(f))


def torchrun(ranks, *args):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    command = [sys.executable, *launch, str(ROOT / "finetune.py"), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


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


@pytest.mark.slow
def test_layer_decay_equals_timm():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    ours = Classifier(ViT(224, 16, 192, 12, 3), 5)
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=0.65,
                                      no_weight_decay_list=theirs.no_weight_decay())
    wanted = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: wanted[id(p)] for name, p in theirs.named_parameters()}
    got = {id(p): (g["scale"], g["weight_decay"]) for g in param_groups(ours, 0.05, 0.65)
           for p in g["params"]}
    for name, p in ours.named_parameters():
        short = name.removeprefix("backbone.")
        if short.split(".")[0] != "norm":                              # timm puts it into the last block
            assert got[id(p)] == pytest.approx(named[short]), name
    assert layer_of("backbone.norm.weight", 12) == 13


# ---- whole runs
def test_it_learns_and_is_tested_again(world, tmp_path, capsys):
    last = train(world, tmp_path, "--epochs", "12", "--lr", "0.2", "--json", str(tmp_path / "r.jsonl"),
                 "--linear", "--predictions", str(tmp_path / "p.csv"))
    [row] = read_json(tmp_path / "r.jsonl")
    assert row["metrics"]["top1"] > 80 and row["metrics"]["best"] >= row["metrics"]["top1"]
    assert row["protocol"]["n_val"] == 15 and row["protocol"]["recipe"] == "transfer"
    assert row["protocol"]["linear"] and row["protocol"]["seed"] == 0
    assert len(read_csv(tmp_path / "p.csv")) == 16
    said = capsys.readouterr().out
    assert "linear True" in said and "RANDOM weights" in said and "most often taken for" in said
    assert "24 images, 3 classes" in said and "15 images, 3 classes" in said
    evaluate(tmp_path / "best.pth", world)
    assert f"top-1 {row['metrics']['best']:.2f} %" in capsys.readouterr().out

    first = checkpoint.load_backbone("random:vit_micro/8")[0]
    torch.manual_seed(0)                                               # from scratch: the run's seed
    first.init_weights()
    assert all(torch.equal(v, last["model"][f"backbone.{k}"]) for k, v in first.state_dict().items())


def test_resume_is_exact(world, tmp_path):
    whole = train(world, tmp_path / "whole", "--accum", "2")
    with pytest.raises(SystemExit) as e:
        train(world, tmp_path / "cut", "--accum", "2", "--stop_at", "3")
    assert e.value.code == 75 and torch.load(tmp_path / "cut/last.pth", weights_only=True)["step"] == 3
    cut = train(world, tmp_path / "cut", "--accum", "2")
    assert whole["step"] == cut["step"] == 6
    assert scores_of(tmp_path / "whole") == scores_of(tmp_path / "cut")
    assert same_weights(whole["model"], cut["model"])
    best = [torch.load(tmp_path / name / "best.pth", weights_only=True) for name in ("whole", "cut")]
    assert best[0]["top1"] == best[1]["top1"] and same_weights(best[0]["model"], best[1]["model"])


@pytest.mark.slow
def test_a_stop_after_an_epoch_is_tested_and_so_is_a_kill(world, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        train(world, tmp_path, "--stop_at", "4")                       # the last step of epoch 1
    assert [line["epoch"] for line in scores_of(tmp_path)] == [1]

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(finetune, "predict", killed)                         # last.pth of epoch 1 is there
        train(world, tmp_path)
    train(world, tmp_path)
    assert {line["epoch"] for line in scores_of(tmp_path)} == {1, 2, 3}
    best = torch.load(tmp_path / "best.pth", weights_only=True)["top1"]
    assert best == pytest.approx(max(line["top1"] for line in scores_of(tmp_path)), abs=1e-4)


def test_a_finished_run_is_tested_and_reported_again(world, tmp_path, trained, capsys):
    shutil.copytree(trained, tmp_path / "again")
    torch.save({"top1": 101.0}, tmp_path / "again/best.pth")           # is read back, and not overwritten
    capsys.readouterr()
    train(world, tmp_path / "again", "--json", str(tmp_path / "r.jsonl"))
    [row] = read_json(tmp_path / "r.jsonl")
    assert row["metrics"]["top1"] == pytest.approx(scores_of(trained)[-1]["top1"], abs=1e-3)
    assert row["metrics"]["best"] == 101.0
    assert "step 12" in capsys.readouterr().out


def test_a_new_run_forgets_the_best_of_the_one_before(world, tmp_path):
    torch.save({"top1": 101.0}, tmp_path / "best.pth")
    train(world, tmp_path, "--epochs", "1")
    assert torch.load(tmp_path / "best.pth", weights_only=True)["top1"] <= 100


@pytest.mark.slow
def test_several_checkpoints_train_as_each_would_alone(world, tmp_path, trained):
    both = ["random:vit_micro/8", str(trained / "best.pth")]
    more = ["--epochs", "1", "--json", str(tmp_path / "r.jsonl")]
    finetune.main(get_args([*options(world, tmp_path / "both", *more), "--ckpt", *both]))
    rows = read_json(tmp_path / "r.jsonl")
    assert [row["ckpt"] for row in rows] == both and rows[0]["weights"] != rows[1]["weights"]
    names = ["random_vit_micro_8", "best"]
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == sorted(names)
    alone = train(world, tmp_path / "alone", "--epochs", "1", "--ckpt", both[1])
    beside = torch.load(tmp_path / "both/best/last.pth", weights_only=True)
    assert same_weights(alone["model"], beside["model"])
    missing = str(tmp_path / "no.pth")
    with pytest.raises(Mistake, match="no such checkpoint"):           # before the first of them trains
        finetune.main(get_args([*options(world, tmp_path / "two"), "--ckpt", both[0], missing]))
    assert not (tmp_path / "two").exists()


def test_precision_is_that_of_the_run(world, tmp_path):
    auto = train(world, tmp_path / "auto", "--epochs", "1", "--precision", "auto")
    assert auto["options"]["precision"] == "fp32"                      # a ViT as narrow as this one, on a CPU
    last = train(world, tmp_path, "--epochs", "1", "--precision", "bf16")
    assert last["options"]["precision"] == "bf16"
    assert all(p.dtype == torch.float32 for p in last["model"].values())
    with pytest.raises(Mistake, match="precision bf16 -> fp32"):
        train(world, tmp_path, "--epochs", "1")


def test_what_is_tested_is_never_the_train_folder_by_accident(world, tmp_path, trained, capsys):
    (tmp_path / "one").mkdir()
    shutil.copytree(world / "train", tmp_path / "one/train")
    with pytest.raises(Mistake, match="no val split"):
        evaluate(trained / "best.pth", tmp_path / "one")
    shutil.copytree(world / "val", tmp_path / "flat")
    for where in ([world], [tmp_path / "flat"], [tmp_path / "one", "--val_data", str(world)]):
        evaluate(trained / "best.pth", *where)
        assert "of 15 images" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_share_the_test_images(world, tmp_path, trained):
    """15 images on 2 ranks: the same answer for each as on one."""
    test = ["--eval", str(trained / "best.pth"), "--data", str(world), "--num_workers", "0"]
    for ranks in (1, 2):
        p = torchrun(ranks, *test, "--predictions", str(tmp_path / f"{ranks}.csv"))
        assert p.returncode == 0, p.stderr
    one, two = ([row[:3] for row in read_csv(tmp_path / f"{ranks}.csv")] for ranks in (1, 2))
    assert one == two and len(one) == 16


def test_last_is_read_as_best_is(world, tmp_path, trained, capsys):
    """Heads of vit_micro are not what its width suggests: the file must say so."""
    path = trained / "last.pth"
    assert checkpoint.load_backbone(str(path))[0].config["num_heads"] == 4
    capsys.readouterr()
    evaluate(path, world / "val", "--predictions", str(tmp_path / "32.csv"))   # a folder of test images only
    assert f"top-1 {scores_of(trained)[-1]['top1']:.2f} % of 15 images" in capsys.readouterr().out
    evaluate(path, world / "val", "--size", "48", "--predictions", str(tmp_path / "48.csv"))
    assert (tmp_path / "48.csv").read_text() != (tmp_path / "32.csv").read_text()


# ---- images
def test_few_images_of_each_class(world):
    images = data.ImageFolder(world / "train")
    for wanted, n in (({"fraction": 0.5, "shots": None}, 4), ({"fraction": None, "shots": 3}, 3)):
        part = classifier.of_each_class(images, seed=0, **wanted)
        assert np.bincount(part.labels).tolist() == [n] * 3
        assert part.index == classifier.of_each_class(images, seed=0, **wanted).index
        assert part.index != classifier.of_each_class(images, seed=1, **wanted).index


def test_transforms_reach_spawned_workers(world):
    args = get_args(options(world, "unused"))
    views = finetune.views_of(data.ImageFolder(world / "train"), args)
    assert pickle.loads(pickle.dumps(views))[0, 1]["image"].shape == (3, 32, 32)


def test_images_without_label_are_left_out(world):
    images = data.Subset(data.ImageFolder(world / "train"), [0, 8, 16, 17])
    images.labels[1] = -1
    assert data.labelled(images, "x").labels == [0, 2, 2]


def test_a_held_out_share_is_the_same_for_every_seed(world):
    def split(seed):
        flat = ["--ckpt", "x", "--data", str(world / "val"), "--val_split", "0.2"]
        args = get_args([*flat, "--seed", str(seed)])
        return [images.index for images in classifier.open_pair(args)]
    train, val = split(0)
    assert [train, val] == split(1) and len(val) == 3 and sorted(train + val) == list(range(15))


def test_val_may_lack_a_class(copy, tmp_path):
    """Blue is class 0 of train; without it, green must not become 0."""
    shutil.rmtree(copy / "val/blue")
    args = get_args(options(copy, tmp_path))
    _, val = classifier.open_pair(args)
    assert val.classes == ["blue", "green", "red"] and set(val.labels) == {1, 2}
    train(copy, tmp_path / "out", "--epochs", "1", "--predictions", str(tmp_path / "p.csv"))
    assert {row[1] for row in read_csv(tmp_path / "p.csv")[1:]} == {"green", "red"}


def test_chosen_classes_only(world, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\n")
    last = train(world, tmp_path / "out", "--epochs", "1", "--classes", str(tmp_path / "names.txt"))
    assert last["classes"] == ["blue", "red"] and last["model"]["head.weight"].shape[0] == 2


def test_unreadable_test_images_are_left_out_and_said(copy, tmp_path, trained, capsys):
    path = trained / "best.pth"
    evaluate(path, copy, "--json", str(tmp_path / "r.jsonl"), "--predictions", str(tmp_path / "all.csv"))
    bad = copy / "val/red/2.png"
    bad.write_text("hello")
    with pytest.raises(Mistake, match="1 of 15 images cannot be read, more than --max_bad 0.01"):
        evaluate(path, copy)
    capsys.readouterr()
    evaluate(path, copy, "--max_bad", "0.1", "--json", str(tmp_path / "r.jsonl"), "--predictions",
             str(tmp_path / "p.csv"))
    said = capsys.readouterr().out
    assert f"left out: 1 unreadable images: {bad}" in said and "of 14 images" in said
    metrics = read_json(tmp_path / "r.jsonl")[1]["metrics"]
    assert metrics["n_unreadable"] == 1 and metrics["unreadable"] == [str(bad)]

    before = read_csv(tmp_path / "all.csv")[1:]
    rows = read_csv(tmp_path / "p.csv")[1:]
    assert [row for row in rows if row[2] == ""] == [[str(bad), "red", "", ""]]
    assert [row for row in rows if row[0] != str(bad)] == [row for row in before if row[0] != str(bad)]
    right = sum(row[1] == row[2] for row in rows)
    assert metrics["top1"] == pytest.approx(100 * right / 14, abs=1e-3)


@pytest.mark.slow
def test_an_unreadable_training_image_counts_once_an_epoch(copy, tmp_path):
    """1 of 24 is below --max_bad 0.05 for any number of epochs; its replacement keeps its own label."""
    (copy / "train/blue/7.png").write_text("hello")                    # replaced by the first green one
    args = get_args(options(copy, tmp_path / "out", "--max_bad", "0.05", "--epochs", "6"))
    view = finetune.views_of(data.ImageFolder(copy / "train"), args)[0, 7]
    assert view["read"] == 8 and view["bad"] == 7
    train(copy, tmp_path / "out", "--max_bad", "0.05", "--epochs", "6", "--json", str(tmp_path / "r.jsonl"))
    assert read_json(tmp_path / "r.jsonl")[0]["metrics"]["n_unreadable_train"] == 1
    assert (tmp_path / "out/bad_images.txt").read_text().splitlines() == [str(copy / "train/blue/7.png")]
    with pytest.raises(SystemExit) as e:
        train(copy, tmp_path / "strict", "--max_bad", "0.04")
    assert e.value.code == 2


@pytest.mark.slow
def test_an_unreadable_training_image_on_two_ranks(copy, tmp_path):
    (copy / "train/blue/7.png").write_text("hello")
    p = torchrun(2, *options(copy, tmp_path / "out", "--max_bad", "0.05", "--epochs", "6"))
    assert p.returncode == 0, p.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text need a file system that has them")
def test_names_that_are_no_text_survive(copy, tmp_path, trained):
    odd = os.fsencode(copy / "val/red") + b"/caf\xe9.png"
    shutil.copy(copy / "val/red/0.png", odd)
    evaluate(trained / "best.pth", copy, "--predictions", str(tmp_path / "p.csv"))
    assert os.fsdecode(odd) in [row[0] for row in read_csv(tmp_path / "p.csv")]


# ---- what can go wrong
def test_a_loader_that_dies_leaves_a_checkpoint(world, tmp_path, monkeypatch):
    real = data.next_batch
    calls = []

    def dying(loader):
        calls.append(1)
        if len(calls) == 3:
            raise LoaderDied("a loader process was killed: try --num_workers 0")
        return real(loader)
    with monkeypatch.context() as m, pytest.raises(LoaderDied, match="--num_workers 0"):
        m.setattr(data, "next_batch", dying)
        train(world, tmp_path)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 2
    assert train(world, tmp_path)["step"] == 12


def test_force_compares_shapes_before_it_overwrites(world, tmp_path, trained):
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    before = (out / "run.json").read_text()
    for option, said in ((["--head", "cls"], "head.weight"), (["--linear"], "trained other weights")):
        with pytest.raises(Mistake, match="other options.* --force"):
            train(world, out, *option)
        with pytest.raises(Mistake, match=said):
            train(world, out, *option, "--force")
    assert (out / "run.json").read_text() == before


def test_force_takes_the_new_decay(world, tmp_path, trained):
    out = Path(shutil.copytree(trained, tmp_path / "out"))
    last = train(world, out, "--force", "--epochs", "4", "--weight_decay", "0.3", "--layer_decay", "0.5")
    groups = last["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3}
    assert groups[0]["scale"] == 0.5 ** 5 and last["step"] == 16


def test_other_images_are_another_run(copy, tmp_path):
    train(copy, tmp_path / "out", "--epochs", "1")
    moved = copy.rename(tmp_path / "moved")                            # the folder may move
    train(moved, tmp_path / "out", "--epochs", "1")
    shutil.copy(moved / "val/red/0.png", moved / "val/red/9.png")
    with pytest.raises(Mistake, match="test_images"):
        train(moved, tmp_path / "out", "--epochs", "1")


def test_mistakes_are_named(world, tmp_path):
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "two/val/other").mkdir(parents=True)
    (tmp_path / "two/val/red").mkdir()
    photo = next((world / "train/red").iterdir()).read_bytes()
    for folder in ("one/train/a", "two/val/other", "two/val/red"):
        (tmp_path / folder / "x.png").write_bytes(photo)
    torch.save({"model": {}}, tmp_path / "foreign.pth")
    no = str(tmp_path / "no")
    for wrong, said in ((["--data", str(tmp_path / "one")], "labels are needed"),
                        (["--data", no], "no such folder"),
                        (["--shots", "9"], "class blue has only 8"), (["--shots", "0"], "1 or more"),
                        (["--shots", "2", "--fraction", "0.5"], "one of them"),
                        (["--val_split", "1.5"], "at most 1"),
                        (["--val_split", "0.5"], "there is a val split"),
                        (["--smoothing", "2"], "0.0 to 0.99"),
                        (["--batch_size", "1"], "two images"), (["--mixup", "-1"], "0.0 or more"),
                        (["--json", f"{no}/x"], "--json .*cannot be written"),
                        (["--predictions", f"{no}/x"], "--predictions .*cannot be written"),
                        (["--val_data", str(tmp_path / "two/val")], "train has no other"),
                        (["--size", "30"], "not a multiple of the patch size 8 .*try 24"),
                        (["--fraction", "2"], "at most 1"), (["--batch_size", "99"], "lower --batch_size"),
                        (["--size", "0"], "1 or more"), (["--json", str(tmp_path)], "cannot be written"),
                        (["--picture", str(tmp_path / "x")], "ends in .png"),
                        (["--eval", "x"], "give --ckpt"), (["--warmup_epochs", "nan"], "0.0 or more"),
                        (["--linear", "--layer_decay", "0.5"], "--layer_decay: no effect with --linear"),
                        (["--picture", "x.png", "--json", "y"], "--json: no effect with --picture"),
                        (["--ckpt", "a/x.pth", "b/x.pth"], "same name"),
                        (["--ckpt", "a.pth", "b.pth", "--predictions", "p.csv"], "one --ckpt")):
        with pytest.raises(Mistake, match=said):
            train(world, tmp_path / "out", *wrong)
    with pytest.raises(Mistake, match="--epochs: no effect with --eval"):
        evaluate("x", world, "--epochs", "3")
    with pytest.raises(Mistake, match="no arch, classes, head, size"):
        evaluate(tmp_path / "foreign.pth", world)


def test_the_picture_shows_augmentations(world, tmp_path):
    finetune.main(get_args(options(world, tmp_path / "out", "--picture", str(tmp_path / "x.png"))))
    assert Image.open(tmp_path / "x.png").width > 600 and not (tmp_path / "out").exists()


def test_help_documents_every_option():
    for action in finetune.get_parser()._actions:
        assert action.help and len(action.help) > 10, action.dest
