"""Too slow for the test suite: interrupts real runs again and again, and compares with an unbroken one.

    python tests/stress.py kill --n 20            # SIGTERM and kill -9 at random steps, 1 rank; --ranks 2
    python tests/stress.py save --n 50            # kill -9 at a random moment of checkpoint.save

kill: every tensor of last.pth and every logged loss must equal the unbroken run's.  save: the file must
load and be one state, whole.  Prints one line per interruption; ends with code 1 on a difference."""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from test_pretrain import command, same, steps  # noqa: E402

import checkpoint  # noqa: E402
from toy import scene  # noqa: E402

MORE = ("--epochs", "10", "--save_every", "4")                         # 60 steps; saves at epochs' ends, too


def start(images: Path, out: Path, ranks: int) -> subprocess.Popen:
    return subprocess.Popen(command(images, out, *MORE, ranks=ranks), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True)


def kill_all(out: Path) -> None:
    """kill -9 of every process that has `out` on its command line: torchrun starts ranks in sessions of
    their own, and orphans would go on writing."""
    subprocess.run(["pkill", "-9", "-f", str(out)], check=False)


def logged(out: Path) -> int:
    return max(steps(out), default=0) if (out / "log.jsonl").exists() else 0


def kill(folder: Path, n: int, ranks: int) -> int:
    images = folder / "images"
    images.mkdir()
    for i in range(24):
        Image.fromarray(scene(i, size=40).image).save(images / f"{i:02d}.png")
    start(images, folder / "whole", ranks).wait()
    whole, losses = torch.load(folder / "whole/last.pth", weights_only=True), steps(folder / "whole")
    last, failed = max(losses), 0
    for i in range(n):
        out, at, kind = folder / f"cut{i}", random.randrange(1, last), [signal.SIGTERM, signal.SIGKILL][i % 2]
        p = start(images, out, ranks)
        while p.poll() is None and logged(out) < at:
            time.sleep(0.01)
        time.sleep(random.random() * 0.05)                             # anywhere within the step
        if p.poll() is None:
            kill_all(out) if kind == signal.SIGKILL else p.send_signal(kind)
        code, reached = p.wait(), logged(out)
        again = start(images, out, ranks).wait()
        cut = torch.load(out / "last.pth", weights_only=True)
        ok = again == 0 and same(whole, cut) and steps(out) == losses
        failed += not ok
        print(f"{kind.name} after step {reached} of {last}: code {code}, resumed: "
              f"{'equal' if ok else 'DIFFERENT'}", flush=True)
    return failed


def save(folder: Path, n: int) -> int:
    path, failed, partial = folder / "last.pth", 0, 0

    def state(step):
        return {"step": step, **{f"w{i}": torch.full((1024, 512), float(step)) for i in range(20)}}   # 40 MB
    checkpoint.save(path, state(0))
    began = time.time()
    checkpoint.save(path, state(0))
    one = time.time() - began
    for i in range(n):
        child = os.fork()
        if child == 0:
            for step in range(100 * i + 1, 100 * i + 100):
                checkpoint.save(path, state(step))
            os._exit(0)
        time.sleep(one * random.uniform(0, 3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = checkpoint.load(path)
        ok = all((v == content["step"]).all() for k, v in content.items() if k != "step")
        failed += not ok
        left = list(folder.glob(".last.pth.*"))
        partial += bool(left)
        for p in left:
            p.unlink()
    print(f"{n} kills, {partial} of them within a save: {n - failed} files load whole (one save {one:.2f} s)")
    return failed


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["kill", "save"])
    p.add_argument("--n", type=int, default=20)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as d:
        sys.exit(bool(kill(Path(d), args.n, args.ranks) if args.what == "kill" else save(Path(d), args.n)))
