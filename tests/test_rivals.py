"""Proves: the comparison with other methods trains each on the same images for the same time, as many tries
each, judges on images it has not seen, and takes the try that won."""
import shutil
import subprocess
import sys

import pytest

import pretrain as core
import run
from studies import ablation, rivals


@pytest.fixture
def images(tmp_path):
    """Two classes of 130 images: links to one file, as only names matter here."""
    one = tmp_path / "one.jpg"
    shutil.copy(ablation.ROOT / "docs/cat.jpg", one)
    for name in ("a", "b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(130):
            (folder / f"{i:03d}.jpg").symlink_to(one)
    return tmp_path / "data"


def test_every_method_has_four_tries_and_names_patches_that_apply(tmp_path):
    for tries in rivals.METHODS.values():
        assert len(tries) == 4
    for patches in (["dino_ibot", "prototypes"], ["mae"]):
        copy = ablation.copy_of_code(tmp_path / "code", *patches)
        changed = [path.name for path in copy.glob("*.py")
                   if path.read_text() != (ablation.ROOT / path.name).read_text()]
        assert changed


@pytest.mark.slow
def test_prototypes_do_not_move_and_heads_have_batchnorm(tmp_path):
    copy = ablation.copy_of_code(tmp_path / "code", *rivals.HEADS)
    program = """
from torch import nn
from model import MMC, vit
head = MMC(vit("vit_micro", 16, 8)).h_cls
print(head.prototypes.weight.requires_grad, sum(isinstance(x, nn.BatchNorm1d) for x in head.modules()))
"""
    found = subprocess.check_output([sys.executable, "-c", program], cwd=copy, text=True)
    assert found.split() == ["False", "3"]


def test_train_and_held_out_images_of_a_try_are_apart(images, tmp_path):
    part = rivals.part_of(images, tmp_path / "work", 20)
    for name in ("a", "b"):
        train = {path.name for path in (part / "train" / name).iterdir()}
        held_out = {path.name for path in (part / "val" / name).iterdir()}
        assert (len(train), len(held_out)) == (20, 100)
        assert not train & held_out
    again = rivals.part_of(images, tmp_path / "work", 30)
    assert len(list((again / "train" / "a").iterdir())) == 30


def test_options_of_every_try_parse_and_its_epochs_follow_from_the_time(images, tmp_path, monkeypatch):
    """With a clock that gives 0.01 s an image, 10 s are 1,000 images, 25 epochs of 40."""
    seen = []

    def pretrain(code, options, device):
        options = [str(option) for option in options]
        seen.append(options)
        folder = rivals.Path(options[options.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text('{"knn_cls": 30.0, "knn_pat": 20.0}')
        batch = int(options[options.index("--batch_size") + 1])
        steps = int(options[options.index("--stop_at") + 1]) if "--stop_at" in options else 0
        return 5 + 0.01 * steps * batch

    monkeypatch.setattr(rivals, "pretrain", pretrain)
    monkeypatch.setattr(rivals, "measure", lambda *_: {"best": 25.0, "overlap": 0.6})
    out = tmp_path / "out"
    command = ["--data", str(images), "--voc", "VOC", "--out", str(out), "--work", str(tmp_path / "work"),
               "--seconds", "10", "--per_class", "20", "--device", "cpu"]
    rivals.main(rivals.get_args(command))
    rows = run.read_lines(out / "tries.jsonl")
    assert len(rows) == 4 * len(rivals.METHODS)
    for row in rows:
        assert (row["epochs"], row["images"], row["images_per_s"], row["score"]) == (25, 1000, 100.0, 25.0)

    for options in seen:
        core.get_args(options)

    rivals.main(rivals.get_args(command))      # nothing is run twice
    assert len(run.read_lines(out / "tries.jsonl")) == len(rows)


def test_the_best_try_needs_all_of_them(tmp_path):
    args = rivals.get_args(["--data", "d", "--voc", "v", "--out", str(tmp_path), "--final"])
    for number, score in enumerate([20.0, 31.0, 30.0]):
        run.append_json(tmp_path / "tries.jsonl", {"method": "DINO", "try": number, "score": score})
    with pytest.raises(run.Mistake, match="DINO has 3 of 4 tries"):
        rivals.best_try("DINO", args)
    run.append_json(tmp_path / "tries.jsonl", {"method": "DINO", "try": 3, "score": 1.0})
    assert rivals.best_try("DINO", args)["try"] == 1
