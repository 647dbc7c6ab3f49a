"""Proves: the schedules and groups are what they say; every combination of losses trains the right parts; an
interrupted run equals an unbroken one, bit for bit; NaN, broken images, other options and wrong arguments end
in one clear line."""
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import free_port, run_ranks
from test_data import write_broken, write_zoo

import distributed
import monitor
import pretrain
import run
import training
from model import MMC, cosine_schedule, vit
from pretrain import get_args, param_groups
from run import Mistake
from toy import scene

ROOT = Path(__file__).parent.parent
TINY = ("--arch vit_micro --patch_size 8 --global_crops_size 32 --local_crops_number 2 --local_crops_size 16 "
        "--head_hidden_dim 32 --head_out_dim 16 --batch_size 4 --epochs 2 --warmup_epochs 1 --num_workers 0 "
        "--log_every 1 --knn_every 0").split()


def train(images, out, *more):
    pretrain.main(get_args([*TINY, "--data", str(images), "--output_dir", str(out), *more]))
    return torch.load(out / "last.pth", weights_only=True)


def steps(out):
    """step -> losses, the last line of each step."""
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return {x["step"]: {k: v for k, v in x.items() if k not in ("images_per_s", "seconds")}
            for x in lines if "step" in x}


def same(a, b):
    """Bit-exact equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "options")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return train(images, out), steps(out)


def command(images, out, *more, ranks=1):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *launch * (ranks > 1), str(ROOT / "pretrain.py"), *TINY, "--data", str(images),
            "--output_dir", str(out), *more]


def launch(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---- schedules, groups, losses ----

def test_cosine_schedule_by_hand():
    s = cosine_schedule(1.0, 0.1, 14, warmup=4)
    assert s[:4] == [0.25, 0.5, 0.75, 1.0] and s[4] == 1.0 and s[-1] == pytest.approx(0.1)
    assert s[4 + 3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 9)) / 2)
    assert all(a >= b for a, b in zip(s[4:], s[5:], strict=False)) and len(s) == 14
    assert cosine_schedule(1.0, 0.0, 3, warmup=10) == pytest.approx([0.1, 0.2, 0.3])     # longer than the run
    m = cosine_schedule(0.996, 1.0, 5)
    assert m[0] == 0.996 and m[-1] == 1.0 and m == sorted(m)


def test_no_decay_on_biases_and_norms():
    model = MMC(vit("vit_micro", 32, 8), hidden=32, out=16)
    decayed, free = param_groups(model, 0.04)
    assert decayed["weight_decay"] == 0.04 and free["weight_decay"] == 0
    ids = {id(p) for p in free["params"]}
    assert all((id(p) in ids) == (n.endswith("bias") or "norm" in n or p.ndim == 1)
               for n, p in model.named_parameters())


def test_paper_defaults():
    args = get_args(["--data", "x", "--arch", "vit_base"])
    assert (args.arch, args.epochs, args.batch_size) == ("vit_b", 400, 48)
    assert (args.temp, args.weight_decay) == (0.2, 0.04)
    assert (args.head_hidden_dim, args.local_crops_number, args.global_crops_scale) == (4096, 10, [0.25, 1.0])
    assert get_args(["--data", "x"]).epochs == 500
    assert get_args(["--data", "x", "--local_crops_number", "0"]).global_crops_scale == [0.2, 1.0]
    assert args.drop_align == 16 and get_args([]).drop_align == 1
    assert get_args([]).arch == "vit_micro" and get_args(["--epochs", "3"]).epochs == 3


@pytest.mark.slow
@pytest.mark.parametrize("on", ["rec", "pat", "cls", "rec pat", "rec cls", "pat cls"])
def test_each_combination_of_losses(images, tmp_path, on):
    weights = [x for w in ("rec", "pat", "cls") for x in (f"--w_{w}", str(float(w in on)))]
    last = train(images, tmp_path, *weights, "--epochs", "1")
    heads = {who: {k.split(".")[0][2:] for k in last[who] if k.startswith("h_")}
             for who in ("student", "teacher")}
    assert heads["student"] == set(on.split()) and heads["teacher"] == set(on.split()) - {"rec"}
    assert all(math.isfinite(x["loss"]) for x in steps(tmp_path).values())


@pytest.mark.slow
def test_masked_anchors_same_position_and_no_norm(images, tmp_path):
    """From the same weights and crops, negatives at the same position only are a part of all negatives: the
    patch loss of the first step is smaller, the other losses are equal."""
    first = {}
    for negatives in ("position", "others"):
        last = train(images, tmp_path / negatives, "--patch_negatives", negatives, "--patch_tokens", "masked",
                     "--head_norm", "none", "--drop_align", "8", "--epochs", "1")
        first[negatives] = steps(tmp_path / negatives)[1]
        assert not any("running_mean" in k for k in last["student"])
    few, many = first["position"], first["others"]
    assert 0 < few["pat"] < many["pat"] and few["rec"] == many["rec"] and few["cls"] == many["cls"]
    assert {"lr", "momentum", "grad_norm", "pat_std", "cls_std", "pat_pos", "pat_neg"} <= few.keys()


@pytest.mark.slow
def test_loss_falls_and_teacher_follows(images, tmp_path):
    last = train(images, tmp_path, "--epochs", "10", "--lr", "2e-2", "--momentum_teacher", "0.9")
    losses = [x["rec"] for x in steps(tmp_path).values()]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert not torch.equal(last["teacher"]["backbone.norm.weight"], last["student"]["backbone.norm.weight"])
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert torch.equal(backbone["backbone"]["pos_embed"], last["teacher"]["backbone.pos_embed"])
    assert backbone["arch"]["patch_size"] == 8 and (tmp_path / "result.png").stat().st_size > 1000
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] > 0


@pytest.mark.slow
def test_speed_leaves_evaluations_out(tmp_path, monkeypatch):
    """k-NN before training and after epoch 1 takes half a second each: in `seconds`, not in images_per_s."""
    def slow(*args, **kwargs):
        time.sleep(0.5)
        return {"cls": {10: 50.0}, "pat": {10: 50.0}}
    monkeypatch.setattr(monitor, "knn_of", slow)
    for i in range(8):
        path = tmp_path / ("train", "val")[i % 2] / "ab"[i // 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(i, size=40).image).save(path)
    train(tmp_path, tmp_path / "out", "--knn_every", "1")
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines if "knn_cls" in x] == [0, 1, 2]
    last = [x for x in lines if "step" in x][-1]
    assert last["step"] == 2 and 2 * 4 / last["images_per_s"] < last["seconds"] - 0.99


@pytest.mark.parametrize(("speed", "said"), [
    (8.0, "an epoch takes about 1.0 minutes on this machine\n"),
    (0.08, "an epoch takes about 100.0 minutes on this machine, and all 20 take 1.4 days: README.md has a "
     'recipe for a laptop under "Your own photos"\n')])
def test_a_cpu_tells_how_long_an_epoch_takes(capsys, monkeypatch, speed, said):
    """10 steps of 48 images are done, and an epoch has 10."""
    monkeypatch.setattr(training.Guard, "after_step", lambda guard, step: None)
    watch = object.__new__(monitor.Monitor)
    watch.args = Namespace(data="photos", epochs=20)
    watch.device = torch.device("cpu")
    watch.first = 3
    watch.images_seen = 480
    watch.steps_per_epoch = 10
    watch.speed = lambda: speed
    for step in (12, 13, 14):
        watch.after_step(step)
    assert capsys.readouterr().out == said


# ---- survival ----

class Killed(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """A function: the next run dies in its step n, before the weights change."""
    def arrange(n: int):
        real = training.Guard.check

        def check(guard, step, *rest):
            if step == n - 1:
                monkeypatch.setattr(training.Guard, "check", real)
                raise Killed
            real(guard, step, *rest)
        monkeypatch.setattr(training.Guard, "check", check)
    return arrange


@pytest.mark.parametrize(("workers", "at"), [(0, 4), pytest.param(2, 8, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(images, tmp_path, unbroken, killed_at, workers, at):
    """Killed at a step without a last save: goes on from the save before, at step at - 1, in the middle of an
    epoch."""
    more = ["--save_every", "1", "--num_workers", str(workers)]
    killed_at(at)
    with pytest.raises(Killed):
        train(images, tmp_path, *more)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == at - 1
    last = train(images, tmp_path, *more)
    assert same(last, unbroken[0]) and steps(tmp_path) == unbroken[1]


@pytest.mark.slow
def test_stop_at_a_step_saves_and_goes_on_the_same(images, tmp_path, unbroken, capsys):
    with pytest.raises(SystemExit) as e:
        train(images, tmp_path, "--stop_at", "6")
    assert e.value.code == 75 and "after step 6" in capsys.readouterr().err
    assert same(train(images, tmp_path), unbroken[0]) and steps(tmp_path) == unbroken[1]


@pytest.mark.slow
def test_saves_by_rank_0s_clock(images, tmp_path, monkeypatch):
    """With --save_every 0m each step is due; the ranks hear it from rank 0, not from their own clocks."""
    real, saved = pretrain.save_run, []
    monkeypatch.setattr(pretrain, "save_run", lambda *a: saved.append(a[-1]) or real(*a))
    train(images, tmp_path / "always", "--save_every", "0m", "--epochs", "1")
    assert saved == [1, 2, 3, 4, 5, 6]
    saved.clear()
    train(images, tmp_path / "never", "--epochs", "1")
    assert saved == [6]


def other_folders(rank, ranks, folder):
    """Rank 1 finds nothing where rank 0 finds a checkpoint."""
    first = []
    with distributed.main_first():
        first = list(folder.glob("done*"))
        (folder / f"done{rank}").touch()
    assert len(first) == rank                                          # rank 1 came second
    args = get_args([*TINY, "--data", "x", "--output_dir", str(folder / f"{rank}")])
    with pytest.raises(Mistake, match="a folder that all machines share"):
        training.claim_folder(args, set(), {"step": 6, "options": {}} if rank == 0 else None)


@pytest.mark.slow
def test_ranks_with_folders_of_their_own_are_refused(tmp_path):
    (tmp_path / "0").mkdir()
    run_ranks(other_folders, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_resume_equals_the_unbroken_run(images, tmp_path, ranks):
    extra = ["--num_workers", "2"] if ranks == 1 else []
    whole = launch(images, tmp_path / "whole", *extra, ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(images, tmp_path / "cut", *extra, ranks=ranks), text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    if ranks == 1:
        process.send_signal(signal.SIGTERM)
    else:  # as a scheduler does: to one of the ranks only
        children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        os.kill(int(children[0]), signal.SIGUSR1)
    error = process.communicate(timeout=120)[1]
    assert "stopped by a signal after step" in error
    assert process.returncode == (75 if ranks == 1 else 1)              # 1 is torchrun's own code
    stopped = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["step"]
    assert 3 <= stopped < 12
    again = launch(images, tmp_path / "cut", *extra, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert f"going on from {tmp_path / 'cut'}/last.pth, step {stopped}" in again.stdout
    a, b = (torch.load(tmp_path / n / "last.pth", weights_only=True) for n in ("whole", "cut"))
    assert same(a, b) and steps(tmp_path / "whole") == steps(tmp_path / "cut")


POISON = """
import os, sys, torch, pretrain, distributed
class Event:
    record = synchronize = lambda self: None
torch.cuda.Event = Event
class Late(pretrain.Monitor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.late = bool(os.environ["LATE"])
pretrain.Monitor = Late
real = pretrain.prepare
calls = []
def poisoned(*args):
    calls.append(1)
    inputs = real(*args)
    if len(calls) == 8 and distributed.rank() == distributed.world_size() - 1:
        inputs.corrupted[0, 0, 0, 0] = float("nan")
    return inputs
pretrain.prepare = poisoned
pretrain.main(pretrain.get_args(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "late"), [(1, ""), (2, ""), (2, "1")])
def test_nan_stops_all_ranks_and_keeps_the_last_checkpoint(images, tmp_path, ranks, late):
    """late: the flags are read one step after, as on CUDA."""
    (tmp_path / "poison.py").write_text(POISON)
    cmd = command(images, tmp_path / "out", "--epochs", "4", ranks=ranks)
    cmd[cmd.index(str(ROOT / "pretrain.py"))] = str(tmp_path / "poison.py")
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=120,
                       env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LATE": late})
    assert p.returncode == (3 if ranks == 1 else 1), p.stderr
    assert f"rank {ranks - 1}: not finite at step 7: lr" in p.stderr
    said = [x.split("poison.py: ")[1] for x in p.stderr.splitlines() if "nothing of this step was kept" in x]
    assert len(said) == ranks and all("rec" in x and ".png" in x for x in said), p.stderr
    last = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    per_epoch = 6 // ranks
    assert last["step"] == 7 // per_epoch * per_epoch
    assert all(v.isfinite().all() for part in ("student", "teacher") for v in last[part].values())


@pytest.mark.slow
def test_accum_takes_the_mean_gradient_of_its_batches(tmp_path, monkeypatch):
    """Two batches of 4 in one step, or in two steps that move nothing; AdamW's first moment tells the
    gradients."""
    moments = []

    def note(_args, _student, _teacher, optimizer, *_):
        moments.append([s["exp_avg"].clone() for s in optimizer.state.values()])
    monkeypatch.setattr(pretrain, "save_run", note)
    monkeypatch.setattr(pretrain.Monitor, "finish", lambda *_: None)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(scene(i, size=40).image).save(tmp_path / "images" / f"{i}.png")
    still = ["--epochs", "1", "--drop_path", "0", "--clip_grad", "0", "--lr", "0", "--min_lr", "0",
             "--weight_decay", "0", "--save_every", "1", "--data", str(tmp_path / "images")]
    for accum in ("1", "2"):
        pretrain.main(get_args([*TINY, *still, "--accum", accum, "--output_dir", str(tmp_path / accum)]))
    first, second, both = moments
    for a, b, c in zip(first, second, both, strict=True):
        g1, g2 = a / 0.1, (b - 0.9 * a) / 0.1
        torch.testing.assert_close(c / 0.1, (g1 + g2) / 2, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_other_options_are_refused(images, tmp_path, capsys):
    train(images, tmp_path, "--epochs", "1")
    with pytest.raises(Mistake, match="--lr 0.0005 -> 0.01"):
        train(images, tmp_path, "--epochs", "1", "--lr", "0.01")
    train(images, tmp_path, "--epochs", "2", "--num_workers", "1")                            # harmless
    train(images, tmp_path, "--epochs", "3", "--lr", "0.01", "--force")
    assert json.loads((tmp_path / "run.json").read_text())["options"]["lr"] == 0.01


@pytest.mark.slow
def test_odd_images_train_and_broken_ones_meet_the_ceiling(tmp_path):
    (tmp_path / "zoo").mkdir()
    n = write_zoo(tmp_path / "zoo", copies=3) + write_broken(tmp_path / "zoo") + 1
    (tmp_path / "zoo" / "0.jpg").write_text("the first file of all is broken")
    train(tmp_path / "zoo", tmp_path / "out", "--max_bad", "0.2", "--epochs", "1", "--batch_size", "5")
    named = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n_unreadable_train"] == len(named) > 0
    assert 1 <= len(named) <= 5 and all("_" not in Path(x).name for x in named)
    assert (tmp_path / "out" / "result.png").exists()
    p = launch(tmp_path / "zoo", tmp_path / "out2", "--epochs", "3", "--batch_size", "5")
    assert p.returncode == 2 and f"of {n} images are unreadable" in p.stderr and "Traceback" not in p.stderr


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path):
    """Files may not grow above 100 kB: the second epoch's save fails, in one line, and loses nothing."""
    train(images, tmp_path, "--epochs", "1")
    run.LOCKS.clear()                                                  # as if that process had ended
    before = (tmp_path / "last.pth").read_bytes()
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    cmd = command(images, tmp_path)
    cmd[1:2] = ["-c", limit + f"sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); "
                "runpy.run_path(sys.argv[0], run_name='__main__')", cmd[1]]
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=120)
    assert p.returncode == 2 and "last.pth: cannot be written (" in p.stderr and "Traceback" not in p.stderr
    assert (tmp_path / "last.pth").read_bytes() == before and not list(tmp_path.glob(".last*"))


@pytest.mark.slow
def test_two_ranks_follow_one_rank_with_the_joined_batch(images, tmp_path):
    """rec and cls of 2 x 4 images equal those of 1 x 8, step by step, where nothing else depends on the rank:
    noise only (an alien comes from the rank's own batch), heads without BatchNorm, no drop path, no pat."""
    same_for_both = "--noise_p 1 --head_norm none --drop_path 0 --w_pat 0 --epochs 4".split()
    train(images, tmp_path / "one", *same_for_both, "--batch_size", "8")
    p = launch(images, tmp_path / "two", *same_for_both, ranks=2)
    assert p.returncode == 0, p.stderr
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 12
    for step, a in one.items():
        for name in ("rec", "cls", "grad_norm"):
            assert two[step][name] == pytest.approx(a[name], rel=2e-4), (step, name)


@pytest.mark.slow
def test_a_second_trial_in_a_folder_does_not_train_past_its_stop(images, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises((SystemExit, Mistake)) as e:
            train(images, tmp_path, "--stop_at", "2", "--log_every", "10")
    assert "--stop_at 2: " in str(e.value) and "is at step 2 already" in str(e.value)
    assert list(steps(tmp_path)) == [2], "the last step is logged"


@pytest.mark.slow
def test_a_run_may_be_longer_after_its_warmup_was_cut(images, tmp_path, capsys):
    train(images, tmp_path, "--epochs", "1", "--warmup_epochs", "10")
    assert "a tenth of it is warm-up" in capsys.readouterr().out
    assert train(images, tmp_path, "--epochs", "2", "--warmup_epochs", "10")["step"] == 12
    assert "--epochs 1 -> 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_twice(images, tmp_path):
    for split in ("train", "val"):
        for i, image in enumerate(sorted(images.glob("*.png"))):
            folder = tmp_path / "data" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image.name).symlink_to(image)
    for _ in range(2):
        train(tmp_path / "data", tmp_path / "out", "--epochs", "1")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "knn_cls" in line] == [0, 1]


@pytest.mark.slow
def test_keep_milestones(images, tmp_path):
    train(images, tmp_path, "--keep", "1")
    kept = sorted(p.name for p in tmp_path.glob("backbone_*.pth"))
    assert kept == ["backbone_0001.pth", "backbone_0002.pth"]


# ---- a user's mistakes: one line each, code 2 ----

MISTAKES = [
    (["--data", "/no/such/folder"], "no such folder"),
    (["--arch", "vit_x"], "vit_x"),
    (["--global_crops_size", "30"], "multiple of"),
    (["--batch_size", "1"], "2 or more"),
    (["--batch_size", "500"], "lower --batch_size"),
    (["--w_rec", "0", "--w_pat", "0", "--w_cls", "0"], "above 0"),
    (["--drop_align", "7"], "drop_align"),
    (["--drop_align", "0"], "drop_align"),
    (["--drop_block", "0"], "0.001 to 1.0"),
    (["--temp", "0"], "more than 0"),
    (["--jitter", "nan", "0", "0", "0"], "0.0 or more"),
    (["--save_every", "soon"], "expected steps"),
    (["--epochs", "0"], "1 or more"),
]


@pytest.mark.parametrize(("wrong", "said"), MISTAKES)
def test_mistakes_are_named(images, tmp_path, wrong, said):
    with pytest.raises(Mistake, match=said) as e:
        train(images, tmp_path / "out", *wrong)
    assert "\n" not in str(e.value) and not (tmp_path / "out" / "last.pth").exists()


@pytest.mark.slow
def test_a_mistake_ends_with_code_2_and_one_line(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    p = launch(tmp_path / "texts", tmp_path / "out")
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "holds no image" in p.stderr


@pytest.mark.parametrize(("script", "wrong"), [
    ("pretrain", ["--patch_negatives", "0"]), ("pretrain", ["--nonsense", "1"]),
    ("finetune", ["--epochs", "x"]), ("zeroshot", []), ("davis", ["--topk", "x"]), ("probes", ["knn"]),
    ("probes", ["nothing"])])
def test_a_wrong_option_is_one_line(script, wrong, capsys):
    with pytest.raises(SystemExit) as e:
        run.script(lambda args: None, lambda: importlib.import_module(script).get_args(wrong))
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_devices_and_ranks(monkeypatch):
    for name in ("gpu", "cuda:99", "xpu:7"):
        with pytest.raises(Mistake, match=f"--device {name}"):
            run.begin(Namespace(device=name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Mistake, match="start it with python"):
        run.begin(Namespace(device="cpu"), one_process=True)


def test_a_signal_after_the_last_step_still_counts(capsys):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    stop = distributed.StopSignal()
    signal.raise_signal(signal.SIGUSR1)
    assert stop.asked and not heard
    stop.release()
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [1]
    signal.signal(signal.SIGUSR1, before)


def test_help_documents_every_option():
    for action in pretrain.get_parser()._actions:
        assert action.help and len(action.help) > 10, action.dest
