"""Proves: each solution in docs/exercises applies to this code as it stands, is as short as it says, trains,
and does what its exercise asks for, beside a value worked out by hand or another way to the same end."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from model import patchify
from studies.ablation import copy_of_code as patched

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "exercises"
TEXT = (FOLDER / "README.md").read_text()
FILES_AND_LINES = {                            # what a solution may touch, and the most lines it may add
    "remove_loss": ({"pretrain.py"}, 10),
    "broken_teacher": ({"pretrain.py"}, 2),
    "koleo": ({"pretrain.py"}, 10),
    "mae": ({"masking.py"}, 5),
    "dino_ibot": ({"pretrain.py", "losses.py", "model.py"}, 60),
}
STOPPED = 75
TINY = ("--arch vit_micro --patch_size 8 --global_crops_size 32 --local_crops_number 2 --local_crops_size 16 "
        "--head_hidden_dim 32 --head_out_dim 16 --batch_size 4 --epochs 2 --warmup_epochs 1 --num_workers 0 "
        "--log_every 1 --knn_every 0 --precision fp32 --device cpu").split()


def lines_of(patch: str, sign: str) -> list[str]:
    """The lines that a patch adds (+) or removes (-), without blank lines and comments."""
    changed = [line[1:].strip() for line in patch.splitlines()
               if line.startswith(sign) and not line.startswith(3 * sign)]
    return [line for line in changed if line and not line.startswith("#")]


def load(code: Path, name: str):
    """One module of a copy; what it imports comes from the code under test."""
    spec = importlib.util.spec_from_file_location(f"patched_{name}", code / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(code: Path, images: Path, out: Path, *options: str, ranks: int = 1, steps: int = 3):
    """A few steps in a process of its own.  Returns the lines of its log, and its checkpoint."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "pretrain.py", *TINY, "--data", str(images), "--output_dir", str(out),
         "--stop_at", str(steps), *options],
        cwd=code, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    stopped = f"exitcode  : {STOPPED}" in done.stderr if ranks > 1 else done.returncode == STOPPED
    assert stopped, done.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return lines, torch.load(out / "last.pth", weights_only=True)


# ------------------------------------------------- without training
@pytest.mark.parametrize("name", FILES_AND_LINES)
def test_a_solution_applies_and_is_as_short_as_the_page_says(name, tmp_path):
    patch = (FOLDER / f"{name}.patch").read_text()
    files, limit = FILES_AND_LINES[name]
    assert set(re.findall(r"^\+\+\+ b/(\S+)$", patch, re.M)) == files
    added, removed = len(lines_of(patch, "+")), len(lines_of(patch, "-"))
    assert added <= limit
    lines = "line" if added == 1 else "lines"
    assert f"[`{name}.patch`]({name}.patch): {added} {lines} added, {removed} removed" in TEXT
    code = patched(tmp_path / "code", name)
    for file in files:
        compile((code / file).read_text(), file, "exec")


def test_every_solution_is_tested_and_named():
    assert {path.stem for path in FOLDER.glob("*.patch")} == set(FILES_AND_LINES)
    assert set(re.findall(r"\]\((\w+)\.patch\)", TEXT)) == set(FILES_AND_LINES)


def test_the_broken_teacher_goes_on_top_of_dino(tmp_path):
    assert "on top of exercise 5" in " ".join(TEXT.split())
    patched(tmp_path / "code", "dino_ibot", "broken_teacher")


def test_the_options_that_the_page_names_exist(tmp_path):
    code = patched(tmp_path / "code", "koleo", "mae")
    source = (code / "pretrain.py").read_text() + (ROOT / "run.py").read_text()
    source += (FOLDER / "dino_ibot.patch").read_text() + (ROOT / "studies" / "views.py").read_text()
    for name in set(re.findall(r"(?<![\w-])--([a-z]\w*)", TEXT)) - {"w_NAME", "nproc_per_node"}:
        assert f'"--{name}"' in source or f'"{name}": dict(' in source, name


def test_koleo_by_hand(tmp_path):
    """On the unit circle at 0, 60 and 180 degrees the nearest are 1, 1 and sqrt(3) away."""
    koleo = load(patched(tmp_path / "code", "koleo"), "pretrain").koleo
    angles = torch.tensor([0.0, 60.0, 180.0]).deg2rad()
    z = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    assert koleo(z).item() == pytest.approx(-math.log(3) / 6, abs=1e-6)
    z = torch.randn(8, 16, requires_grad=True)
    koleo(z).backward()
    assert z.grad.abs().sum(1).min() > 0


@pytest.mark.slow
def test_mae_masks_are_whole_patches_and_grey(tmp_path):
    """By options alone: exactly 75 % of the patches, each as often as another; the patch makes them grey."""
    masking = load(patched(tmp_path / "code", "mae"), "masking")
    args = pretrain.get_args(["--noise_p", "1", "--drop_perc", "0.75", "0.75", "--drop_align", "8",
                              "--drop_block", "0.001"])
    crops = pretrain.crops(args)
    masks = [crops.draw_corruption(torch.Generator().manual_seed(i)).mask for i in range(30)]
    share = patchify(torch.cat(masks)[:, None].float(), 8).mean(-1)    # (60, 36)
    assert set(share.unique().tolist()) == {0.0, 1.0}
    assert (share.sum(1) == 27).all()
    assert 0.5 < share.mean(0).min() and share.mean(0).max() < 0.95

    x = torch.randn(4, 3, 48, 48)
    mask = torch.cat(masks)[:4]
    out = masking.gmml(x, mask, torch.full((4,), -1.0), torch.zeros(4, dtype=torch.long))
    assert torch.equal(out, x * ~mask[:, None])


def test_distillation_and_centre_by_hand(tmp_path):
    code = patched(tmp_path / "code", "dino_ibot")
    losses, model = load(code, "losses"), load(code, "model")
    q = torch.tensor([[math.log(3) / 10, 0.0]], requires_grad=True)    # at 0.1 a softmax of 3/4, 1/4
    k = torch.tensor([[0.0, 0.04 * math.log(4)]])                      # at 0.04 a softmax of 1/5, 4/5
    loss = losses.distillation(q, k, 0.1, 0.04)
    assert loss.item() == pytest.approx(-0.2 * math.log(3 / 4) - 0.8 * math.log(1 / 4), abs=1e-5)
    loss.backward()
    assert q.grad[0].tolist() == pytest.approx([5.5, -5.5], abs=1e-4)  # (softmax - target) / 0.1

    centre = torch.tensor([1.0, 0.0])
    out = losses.centred(torch.tensor([[2.0, 0.0], [4.0, 2.0]]), centre)
    assert out.tolist() == [[1.0, 0.0], [3.0, 2.0]]                    # minus the centre as it was
    assert centre.tolist() == pytest.approx([1.2, 0.1])

    head = model.PrototypeHead(12, 16, 8)
    assert "centre" in dict(head.named_buffers())
    assert head(torch.randn(5, 12)).abs().max() <= 1 + 1e-5            # cosines


def test_measured_numbers_are_those_of_the_results():
    rows = [json.loads(line) for line in (ROOT / "results/toy/results.jsonl").read_text().splitlines()]
    part = TEXT[TEXT.index("## 1."):]
    for variant, *said in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", part, re.M):
        ending = "_untrained" if variant == "untrained" else ""
        runs = [row for row in rows if row["variant"] == variant or ending]
        assert len({row["seed"] for row in runs}) == 3
        for name, value in zip(("knn_cls", "knn_pat", "prompt_iou"), said, strict=True):
            found = {row["seed"]: row[name + ending] for row in runs}
            assert sum(found.values()) / 3 == pytest.approx(float(value), abs=0.06)


def test_measured_numbers_of_the_exercises_are_those_of_the_results():
    rows = [json.loads(line) for line in (ROOT / "results/exercises/results.jsonl").read_text().splitlines()]
    names = ("knn_cls", "knn_pat", "prompt_iou")
    found = {row["row"]: [row[name] for name in names] for row in rows}
    found["untrained"] = [rows[0][f"{name}_untrained"] for name in names]
    part = TEXT[:TEXT.index("## 1.")]
    said = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", part, re.M)
    assert len(said) == len(found) == 7
    for row, *numbers in said:
        assert [float(number) for number in numbers] == pytest.approx(found[row], abs=0.06)


# ------------------------------------------------- with a few steps of training
@pytest.mark.slow
def test_without_the_reconstruction_it_trains_as_with_its_weight_at_0(images, tmp_path):
    lines, state = train(patched(tmp_path / "code", "remove_loss"), images, tmp_path / "a")
    expected, other = train(ROOT, images, tmp_path / "b", "--w_rec", "0")
    for line, plain in zip(lines, expected, strict=True):
        assert line["loss"] == plain["loss"] and "rec" not in line
    assert state["student"].keys() == other["student"].keys()
    assert all(torch.equal(value, other["student"][name]) for name, value in state["student"].items())


@pytest.mark.slow
def test_the_broken_teacher_is_the_student(images, tmp_path):
    _, state = train(patched(tmp_path / "code", "broken_teacher"), images, tmp_path / "out")
    assert len(state["teacher"]) > 50
    assert all(torch.equal(value, state["student"][name]) for name, value in state["teacher"].items())


@pytest.mark.slow
def test_koleo_is_logged_weighted_and_summed(images, tmp_path):
    lines, _ = train(patched(tmp_path / "code", "koleo"), images, tmp_path / "out", "--w_koleo", "0.5")
    for line in lines:
        parts = line["rec"] + line["pat"] + line["cls"] + 0.5 * line["koleo"]
        assert line["loss"] == pytest.approx(parts, abs=1e-4)


@pytest.mark.slow
def test_mae_trains(images, tmp_path):
    lines, _ = train(patched(tmp_path / "code", "mae"), images, tmp_path / "out", "--noise_p", "1",
                     "--drop_perc", "0.75", "0.75", "--drop_block", "0.001", "--w_pat", "0", "--w_cls", "0")
    assert len(lines) == 3 and all(line["loss"] == line["rec"] for line in lines)


@pytest.mark.slow
def test_dino_ibot_trains_and_its_centre_is_that_of_all_ranks(images, tmp_path):
    code = patched(tmp_path / "code", "dino_ibot")
    options = ["--temp", "0.1", "--patch_tokens", "masked"]
    lines, state = train(code, images, tmp_path / "long", *options)
    assert len(lines) == 3
    centre = state["teacher"]["h_cls.centre"]
    assert centre.abs().max() > 0 and not state["student"]["h_cls.centre"].any()
    assert lines[0]["cls"] < math.log(1024) < lines[0]["pat"]

    _, one = train(code, images, tmp_path / "one", *options, "--batch_size", "8", steps=1)
    _, two = train(code, images, tmp_path / "two", *options, ranks=2, steps=1)
    for name in ("h_cls.centre", "h_pat.centre"):
        torch.testing.assert_close(one["teacher"][name], two["teacher"][name], rtol=1e-4, atol=1e-6)
