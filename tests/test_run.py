"""Proves: a user's mistake is one line and everything else keeps its traceback; a run folder belongs to one
run and one set of options; options that a stored run did not know do not stop it; JSON is JSON; the log
begins anew with a new run."""
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import run
import training
from run import Mistake

ROOT = Path(__file__).parent.parent


def parser():
    p = run.Parser()
    run.add_shared(p, "output_dir force seed")
    p.add_argument("--width", type=int, default=8)
    return p


def args_of(folder, *more):
    return parser().parse_args(["--output_dir", str(folder), *more])


# ---- mistakes and bugs ----

def test_a_mistake_is_one_line_and_code_2(capsys):
    def main(args):
        raise Mistake("expected an apple, found a pear")
    with pytest.raises(SystemExit) as e:
        run.script(main, Namespace)
    assert e.value.code == 2 and capsys.readouterr().err.endswith(": expected an apple, found a pear\n")


@pytest.mark.parametrize("error", [ValueError("x"), OSError("y"), KeyError("z")])
def test_any_other_error_keeps_its_traceback(error):
    def main(args):
        raise error
    with pytest.raises(type(error)):
        run.script(main, Namespace)


BUG = """
import sys
sys.path.insert(0, {root!r})
import {module}, pretrain, run
{change}
run.script(pretrain.main, pretrain.get_args)
"""
BUGS = {  # a student's slip in each place: the module and function that it is in must be named
    "losses": ("def global_contrast(q, k, tau):\n    a, b, c = q.shape[:2]\n"
               "pretrain.global_contrast = global_contrast", "global_contrast"),
    "masking": ("def draw_corruption(self, g):\n    return self.nothing\n"
                "masking.MultiCrop.draw_corruption = draw_corruption", "draw_corruption"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "workers"), [("losses", 0), ("masking", 0), ("masking", 1)])
def test_a_bug_of_ones_own_is_shown_whole(tmp_path, module, workers):
    change, name = BUGS[module]
    script = tmp_path / "student.py"
    script.write_text(BUG.format(root=str(ROOT), module=module, change=change))
    options = ("--epochs 1 --batch_size 8 --knn_every 0 --arch vit_micro --head_hidden_dim 16 --num_workers "
               f"{workers} --output_dir {tmp_path / 'out'} --data {tmp_path / 'images'}").split()
    (tmp_path / "images").mkdir()
    from PIL import Image
    for i in range(8):
        Image.new("RGB", (224, 224), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    command = [sys.executable, str(script), *options, "--local_crops_number", "0"]
    p = subprocess.run(command, capture_output=True, text=True, timeout=120,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert p.returncode == 1 and "Traceback" in p.stderr and name in p.stderr


def test_a_workers_mistake_is_told_without_its_traceback(capsys):
    def main(args):
        raise Mistake("Caught BadImage in DataLoader worker process 0.\nOriginal Traceback ...\n  File\n"
                      "images.BadImage: a.jpg: not a readable image")
    with pytest.raises(SystemExit):
        run.script(main, Namespace)
    assert capsys.readouterr().err.endswith(": a.jpg: not a readable image\n")


# ---- options ----

@pytest.mark.parametrize(("kind", "good", "bad"), [
    (run.at_least(1), {"1": 1, "30": 30}, ["0", "-1", "1.5", "x"]),
    (run.at_least(0.0), {"0": 0.0, "2e-3": 0.002}, ["-1", "nan", "inf", "x"]),
    (run.above(0.0), {"0.1": 0.1}, ["0", "-0.1"]),
    (run.between(0.0, 1.0), {"0": 0.0, "1": 1.0}, ["1.1", "-0.1"])])
def test_types_of_options(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    p = run.Parser()
    p.add_argument("--x", type=kind)
    for text in bad:
        with pytest.raises(Mistake, match="expected a"):
            p.parse_args([f"--x={text}"])


def test_shared_options_tell_their_defaults():
    p = run.Parser()
    run.add_shared(p, "num_workers seed", num_workers=5)
    assert p.parse_args([]).num_workers == 5 and "(default: 5)" in p.format_help()


def test_files_to_write_are_tried_first(tmp_path):
    for name, given, said in (("json", tmp_path / "no" / "a.json", "cannot be written"),
                              ("json", tmp_path, "directory"), ("picture", tmp_path / "a.txt", "ends in")):
        with pytest.raises(Mistake, match=said):
            run.check_outputs(Namespace(**{name: str(given)}), name)
    run.check_outputs(Namespace(json=str(tmp_path / "fine.json")), "json")
    assert not (tmp_path / "fine.json").exists()


def test_a_folder_is_the_same_with_a_slash_at_its_end():
    p = run.Parser()
    run.add_shared(p, "data val_data seed")
    args = p.parse_args(["--data", "photos/", "--val_data", "./val"])
    assert (args.data, args.val_data) == ("photos", "val")
    for seed in ("-1", str(2 ** 63), "1.5"):
        with pytest.raises(Mistake, match="--seed"):
            p.parse_args(["--data", "x", f"--seed={seed}"])


# ---- the folder of a run ----

def test_other_options_are_refused_and_new_ones_are_not(tmp_path):
    stored = {"step": 3, "options": training.options_of(args_of(tmp_path))}
    training.claim_folder(args_of(tmp_path), set(), stored)
    with pytest.raises(Mistake, match="--width 8 -> 9; give another --output_dir"):
        training.claim_folder(args_of(tmp_path, "--width", "9"), set(), stored)
    training.claim_folder(args_of(tmp_path, "--width", "9"), {"width"}, stored)
    training.claim_folder(args_of(tmp_path, "--width", "9", "--force"), set(), stored)
    del stored["options"]["width"]                                     # a run from before this option
    training.claim_folder(args_of(tmp_path), set(), stored)
    with pytest.raises(Mistake, match="--width 8 -> 9"):
        training.claim_folder(args_of(tmp_path, "--width", "9"), set(), stored)
    with pytest.raises(Mistake, match="not written by this script"):
        training.claim_folder(args_of(tmp_path), set(), {"step": 1, "options": "x"})


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(tmp_path):
    training.claim_folder(args_of(tmp_path), set(), None)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; from pathlib import Path\n"
            f"try: run.lock(Path({str(tmp_path)!r}))\nexcept run.Mistake as e: print(e)")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another run writes there" in p.stdout, p.stderr


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Mistake, match="--output_dir .*file: cannot be written"):
        training.claim_folder(args_of(tmp_path / "file"), set(), None)


def test_a_new_run_does_not_take_over_the_lines_of_a_dead_one(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "knn_cls": 99.0}\n')
    (tmp_path / ".last.pth.123").write_text("half a file")
    training.begin_log(args_of(tmp_path), new=False)
    assert (tmp_path / "log.jsonl").exists() and not (tmp_path / ".last.pth.123").exists()
    training.begin_log(args_of(tmp_path), new=True)
    assert not (tmp_path / "log.jsonl").exists()
    assert json.loads((tmp_path / "run.json").read_text())["options"]["width"] == 8


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    import torch
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flush")
    stub = Namespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    args = Namespace(output_dir=str(tmp_path), save_every="15m", tensorboard=True)
    guard = training.Guard(args, [], torch.device("cpu"), 4, save=None)
    guard.write({"step": 2, "epoch": 0.5, "loss": 1.23456789})
    guard.write({"epoch": 3, "knn_cls": 50.0})
    assert written == [("step", 2, 2), ("epoch", 0.5, 2), ("loss", 1.234568, 2), "flush",
                       ("epoch", 3, 12), ("knn_cls", 50.0, 12), "flush"]
    assert run.read_lines(tmp_path / "log.jsonl")[0]["loss"] == 1.234568
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with pytest.raises(Mistake, match="--tensorboard: .*pip install tensorboard"):
        training.Guard(args, [], torch.device("cpu"), 4, save=None)


# ---- results ----

def test_json_is_json(tmp_path):
    file = tmp_path / "a.jsonl"
    run.append_json(file, {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -0.5}, "e": "caf\udce9"})
    assert run.read_lines(file)[0] == {"a": None, "b": [1.0, None], "c": {"d": -0.5}, "e": "caf\udce9"}
    with open(file, "a") as f:
        f.write('{"half": ')
    assert len(run.read_lines(file)) == 1


def test_half_a_line_left_by_a_kill_costs_no_other(tmp_path):
    file = tmp_path / "a.jsonl"
    run.append_json(file, {"step": 1})
    file.write_text(file.read_text() + '{"step": 2, "lo')
    run.append_json(file, {"step": 3})
    run.append_json(file, {"step": 4})
    assert [line["step"] for line in run.read_lines(file)] == [1, 3, 4]


def test_a_record_has_the_same_keys_everywhere(tmp_path):
    import torch
    line = run.record(str(tmp_path / "a.jsonl"), eval="knn", ckpt="x.pth", weights="w", data="d",
                      data_digest="e", protocol={"k": 10}, metrics={"cls": 50.0}, seconds=1.23,
                      device=torch.device("cpu"))
    assert set(line) == {"eval", "ckpt", "weights", "data", "data_digest", "protocol", "metrics", "seconds",
                         "device", "torch", "commit", "date"}
    assert run.read_lines(tmp_path / "a.jsonl") == [line]


@pytest.mark.slow
def test_head_closing_the_pipe_does_not_end_a_script():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; from distributed import say\n"
            "def main(args):\n    for i in range(5000): say(i)\n    sys.stderr.write('to the end')\n"
            "run.script(main, lambda: None)")
    p = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -c \"$CODE\" | head -1"],
                       capture_output=True, text=True, env=os.environ | {"CODE": code})
    assert p.stdout == "0\n" and "to the end" in p.stderr and "Traceback" not in p.stderr, p.stderr
