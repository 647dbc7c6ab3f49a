"""Proves: a save leaves the old file or the new one, whole, and says which.  No file can run code.  What is
damaged, of another kind or not there is one line that says what to do.  Files of torch and of safetensors are
told apart by what they hold, never by their names."""
import argparse
import builtins
import collections
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import load, load_backbone, open_backbone
from model import vit
from run import Mistake

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}


def same(found):
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[k], WEIGHTS[k]) for k in WEIGHTS)


# ------------------------------------------------- save
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "x.pth", {})


def test_files_are_as_readable_as_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "x.pth", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.pth").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_keeps_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "x.pth", WEIGHTS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(Mistake, match="x.pth: cannot be written.*what was there is as it was"):
            checkpoint.save(tmp_path / "x.pth", {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(load(tmp_path / "x.pth")) and os.listdir(tmp_path) == ["x.pth"]


def test_a_bug_in_what_is_saved_keeps_its_traceback_and_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "x.pth", WEIGHTS)
    with pytest.raises((TypeError, AttributeError)):
        checkpoint.save(tmp_path / "x.pth", {"a": (i for i in range(3))})
    assert same(load(tmp_path / "x.pth")) and os.listdir(tmp_path) == ["x.pth"]


# ------------------------------------------------- load
def test_safetensors_under_any_name_and_torch_under_theirs(tmp_path):
    for name in ("x.safetensors", "UPPER.SAFETENSORS", "renamed.pth", "noname"):
        save_file(WEIGHTS, tmp_path / name, {"format": "pt", "arch": "vit"})
        assert same(load(tmp_path / name))
    torch.save(WEIGHTS, tmp_path / "y.safetensors")
    assert same(load(tmp_path / "y.safetensors"))
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.pth"))


def test_numbers_and_paths_that_people_leave_in_a_checkpoint(tmp_path):
    left = {
        "best": np.float64(71.5), "seen": np.int64(3), "done": np.bool_(True), "half": np.float16(0.5),
        "curve": np.arange(3.0), "ids": np.arange(4, dtype=np.uint8), "none": np.array([]),
        "dtype": np.dtype("f4"),
        "args": argparse.Namespace(output_dir=Path("/x/y"), data=PureWindowsPath("c:/data")),
        "order": collections.OrderedDict(a=1), "names": {"b", "a"},
    }
    torch.save({"model": WEIGHTS, **left}, tmp_path / "x.pth")
    found = load(tmp_path / "x.pth")
    assert same(found["model"]) and found["best"] == 71.5 and found["names"] == {"a", "b"}
    assert found["seen"] == 3 and found["half"] == 0.5 and found["curve"].tolist() == [0, 1, 2]
    assert found["args"].output_dir == PurePosixPath("/x/y")
    # the names of numpy before version 2, and of Python 3.13
    torch.save({"best": np.float64(71.5), "at": Path("/x")}, tmp_path / "old.pth",
               _use_new_zipfile_serialization=False)
    raw = (tmp_path / "old.pth").read_bytes().replace(b"cnumpy._core.", b"cnumpy.core.")
    raw = raw.replace(b"cpathlib\n", b"cpathlib._local\n")
    (tmp_path / "old.pth").write_bytes(raw)
    assert load(tmp_path / "old.pth") == {"best": 71.5, "at": PurePosixPath("/x")}


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    torch.save({"model": WEIGHTS, "args": Malicious(tmp_path / "owned")}, tmp_path / "x.pth")
    with pytest.raises(Mistake, match=r"asks for \w+\.system, which is refused") as e:
        load_backbone(tmp_path / "x.pth")
    assert not (tmp_path / "owned").exists() and "\n" not in str(e.value)


def test_what_asks_for_a_class_is_told_how_to_be_saved_again(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(Mistake, match="asks for torch.nn.modules.linear.Linear.*if you trust.*torch.save"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [
    b"", b"hello", b"PK\x03\x04broken", bytes(range(256)) * 9, b"{\"a\": 1}  {", b"\x80\x02}q\x00.",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"<!DOCTYPE html>" * 9,
    b"\x10\0\0\0\0\0\0\0{not a header of ", b"\xff\xff\xff\xff\xff\xff\xff\x7f{",
])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Mistake, match=f"{name}: not a checkpoint") as e:
        load(tmp_path / name)
    assert "\n" not in str(e.value)


def test_truncated_and_missing_files(tmp_path):
    torch.save({"a": torch.zeros(20000)}, tmp_path / "x.pth")
    save_file({"a": torch.zeros(20000)}, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / f"half.{name}").write_bytes((tmp_path / name).read_bytes()[:40000])
        with pytest.raises(Mistake, match="not a checkpoint"):
            load_backbone(tmp_path / f"half.{name}")
    for name in ("none.pth", "."):
        with pytest.raises(Mistake, match="no such checkpoint"):
            load_backbone(name)


def test_a_file_of_somebody_else_is_named(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "x.pth")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(Mistake, match=r"x.pth: cannot be read \(Permission denied\)"):
        load(tmp_path / "x.pth")


def test_a_folder_is_named_as_what_it_is(tmp_path):
    with pytest.raises(Mistake, match="no such checkpoint file, but a folder: give a file in it"):
        load(tmp_path)


@pytest.mark.slow
def test_shards_of_torch_load_after_the_line_that_joins_them(tmp_path):
    import torch.distributed.checkpoint as dcp
    dcp.save({"model": {"a": WEIGHTS["a"]}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    with pytest.raises(Mistake, match="join them with") as e:
        load(tmp_path / "shards")
    command = str(e.value).split("'")[1].split()
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:-1], tmp_path / "joined.pth"], check=True, cwd=tmp_path)
    assert torch.equal(load(tmp_path / "joined.pth")["model"]["a"], WEIGHTS["a"])


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(Mistake, match="pip install safetensors"):
        load(tmp_path / "x.safetensors")


def test_a_bug_while_a_file_is_read_keeps_its_traceback(tmp_path, monkeypatch):
    torch.save({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(checkpoint.formats, "select", lambda under: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_backbone(tmp_path / "x.pth")


def test_a_run_of_other_sizes_is_not_restored():
    small, large, here = torch.nn.Linear(3, 3), torch.nn.Linear(3, 4), torch.nn.Linear(3, 3)
    for wrong, words in ((large.state_dict(), r"run of other sizes \(size mismatch for weight.*\[4, 3\]"),
                         ({"weight": small.weight}, "Missing key.*bias"),
                         (small.state_dict() | {"more": torch.ones(2)}, "Unexpected key.*more")):
        with pytest.raises(Mistake, match=f"last.pth: .*{words}.*give another --output_dir") as e:
            checkpoint.restore("last.pth", [(here, wrong)])
        assert "\n" not in str(e.value)
    checkpoint.restore("last.pth", [(here, small.state_dict())])
    assert checkpoint.digest(here) == checkpoint.digest(small)


# ------------------------------------------------- the rest
def test_random_weights_say_so_and_repeat():
    before = torch.random.get_rng_state()
    (a, report), (b, _) = load_backbone("random:vit_micro/8"), load_backbone("random:vit_micro/8")
    assert torch.equal(before, torch.random.get_rng_state()) and "RANDOM" in report
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.patch_size == 8 and not a.training and not any(p.requires_grad for p in a.parameters())
    for name in ("random:vit_x", "random:", "random:vit_s/x", "random:vit_s/0", "random:vit_s/-16",
                 "random:vit_s/13", "random:vit_s/²", "random:vit_s/9999999"):
        with pytest.raises(Mistake, match="expected random:ARCH"):
            load_backbone(name)


def test_open_backbone_takes_the_options_that_a_script_has(tmp_path, capsys):
    torch.save({"student": vit("vit_micro").state_dict(), "teacher": vit("vit_micro").state_dict()},
               tmp_path / "x.pth")
    cpu = torch.device("cpu")
    args = argparse.Namespace(checkpoint_key="student", num_heads=8, precision="bf16")
    found = open_backbone(args, tmp_path / "x.pth", cpu)
    said = capsys.readouterr().out
    assert "weights of 'student'" in said and "8 heads (--num_heads)" in said and said.count("\n") == 1
    assert found.bf16 and found.config["num_heads"] == 8
    found = open_backbone(argparse.Namespace(), tmp_path / "x.pth", cpu)
    assert "weights of 'teacher'" in capsys.readouterr().out and not found.bf16


def test_digest_and_short_name():
    a = vit("vit_micro")
    b = {k: v.clone() for k, v in a.state_dict().items()}
    assert checkpoint.digest(a) == checkpoint.digest(a.state_dict()) == checkpoint.digest(b)
    b["cls_token"][0, 0, 0] += 1e-6
    assert checkpoint.digest(a) != checkpoint.digest(b)
    # Runs remember their weights by it, so it may never change.
    assert checkpoint.digest({"x": torch.arange(8.0), "y": torch.ones(2, 2).half()}) == "a23dda75cbad8e25"
    names = [checkpoint.short_name(x) for x in ("random:vit_s/16", "out/a/backbone.pth", "weights/dino.pth")]
    assert names == ["random:vit_s/16", "a/backbone", "dino"]
