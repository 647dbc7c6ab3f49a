"""Proves: no script runs what a stranger put into a checkpoint, and each says so in one line, code 2."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import toy

ROOT = Path(__file__).parent.parent
SCRIPTS = {  # what follows --ckpt FILE
    "zeroshot.py": ["--toy"], "davis.py": ["--davis", "davis"], "probes.py knn": ["--data", "toy"],
    "probes.py linseg": ["--data", "x"], "probes.py variance": ["--data", "toy"],
    "probes.py layers": ["--data", "toy"], "finetune.py": ["--data", "toy"], "demo.py": [],
}
SCRIPTS = {k: v for k, v in SCRIPTS.items() if (ROOT / k.split()[0]).exists()}
RUNNER = """
import runpy, sys, types
sys.path.insert(0, {root!r})
sys.modules["gradio"] = types.ModuleType("gradio")   # demo.py asks for it first; it refuses before it uses it
for line in {calls!r}:
    sys.argv = line
    try:
        runpy.run_path(line[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code
    print("CODE", code, line[0], flush=True)
"""


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_checkpoint_is_refused_by_every_script(tmp_path):
    evil = tmp_path / "last.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Evil(tmp_path / "ran")}, evil)
    toy.main(["--out", str(tmp_path / "davis"), "--layout", "davis", "--n", "1", "--n_val", "1"])
    calls = [[str(ROOT / s.split()[0]), *s.split()[1:], "--ckpt", str(evil), *more] for s, more in
             SCRIPTS.items()]
    calls.append([str(ROOT / "pretrain.py"), "--data", "toy", "--output_dir", str(tmp_path)])  # to go on from
    p = subprocess.run([sys.executable, "-c", RUNNER.format(root=str(ROOT), calls=calls)], text=True,
                       capture_output=True, timeout=240, cwd=tmp_path)
    codes = [x.split()[1] for x in p.stdout.splitlines() if x.startswith("CODE")]
    assert codes == ["2"] * len(calls), p.stdout + p.stderr
    assert p.stderr.count("system, which is refused") == len(calls) and "Traceback" not in p.stderr
    assert not (tmp_path / "ran").exists()


def test_the_file_would_have_run(tmp_path):
    """The test above proves something only if opening the file without care does run it."""
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="refused"):
        checkpoint.load(tmp_path / "evil.pth")
