"""One process or many: the device, the ranks, the gather, who prints, and how a run is asked to stop.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without them everything here is the one-process case and does
nothing. NCCL on CUDA, gloo elsewhere.  Exit codes of every script: 0 done, 2 a user's mistake, 3 training
went wrong (NaN), 75 stopped by a signal after saving: start the same command again."""
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STOPPED, FAILED, MISUSED = 75, 3, 2            # 75 is EX_TEMPFAIL of sysexits.h
PICTURES = ".png", ".jpg", ".webp"
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


def init(device: str = "auto") -> torch.device:
    """Join the other ranks, if any, and pick this rank's device.  device: 'auto' (CUDA, then MPS, then CPU)
    or a torch device name.  Raises ValueError for a device that this machine does not have."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and ranks == 1 else "cpu")
    if device == "meta":
        raise ValueError("--device meta: computes nothing; expected auto, cuda, mps or cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    try:
        if device == "cuda":
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as e:           # unknown, not built in, or too few
        raise ValueError(f"--device {device}: torch cannot use it here ({str(e).splitlines()[0]}); expected "
                         "auto, cuda, mps or cpu, and no more ranks than devices") from e
    if ranks > 1 and not dist.is_initialized():
        # rank 0 alone evaluates while the others wait: as long as the slowest probe may take
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return torch.device(device)


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def main_first():
    """Rank 0 runs the block before the others do."""
    if rank():
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and is_main():
            dist.barrier()


def everywhere(value) -> list:
    """The small object that each rank brings."""
    out = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(out, value)
    return out


def say(*words) -> None:
    """print() on rank 0 only."""
    if is_main():
        print(*words, flush=True)


def append_json(path: str | os.PathLike | None, line: dict) -> None:
    """One more line of a jsonl file, on rank 0; nothing without a path."""
    if path and is_main():
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")


def fail(message: str, code: int = MISUSED, together: bool = False) -> None:
    """End a script with one line on stderr and no traceback; by default on a user's mistake, exit code 2.

    together: every rank fails now; wait until all have said why, as torchrun kills the rest when one ends."""
    # one write with its line end: print() makes two, and ranks then mix their lines
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {message}\n")
    sys.stderr.flush()
    if together and dist.is_initialized():
        dist.barrier()
    finish()
    raise SystemExit(code)


def run(script: Callable[[], None]) -> None:
    """A script from its command line: a ValueError is the user's mistake and an OSError that of the disk or
    the network, one line and exit code 2, also where a loader worker met it."""
    try:
        script()
    except BaseException as e:
        # lets go of loaders: at exit Python would ask their workers by SIGTERM, which they ignore, and wait
        traceback.clear_frames(e.__traceback__)
        if not isinstance(e, (ValueError, OSError)):
            raise
        fail(re.sub(r"(?s)^Caught .*\n[\w.]+: ", "", str(e).strip()))  # without a worker's traceback
    finish()


def check_outputs(args, *names: str) -> None:
    """Raises ValueError for a file that cannot be written, now and not after hours of work: a folder that is
    not there, a folder in its place, a picture with no format."""
    for name in names:
        given = getattr(args, name, None)
        path = Path(given or "").absolute()
        if given and not path.parent.is_dir():
            raise ValueError(f"--{name} {given}: there is no folder {Path(given).parent}")
        if given and path.is_dir():
            raise ValueError(f"--{name} {given}: is a folder, expected a file to write")
        if given and name in ("picture", "similarity", "out") and path.suffix.lower() not in PICTURES:
            raise ValueError(f"--{name} {given}: expected a name that ends in {', '.join(PICTURES)}")


def one_process(script: str) -> None:
    """Raises ValueError under torchrun, for what would do its work once per rank."""
    if world_size() > 1:
        raise ValueError(f"{script} is one process: start it with python, not with torchrun")


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's --signal) ask for a stop; the loop looks at `asked` once a step,
    and the ranks agree on it.  A second SIGINT stops at once.  Loader workers ignore all
    three (`ignore_signals`)."""

    def __init__(self):
        self.asked = 0                                                 # or the signal's number
        self.before = {s: signal.signal(s, self.handle) for s in SIGNALS}

    def release(self) -> None:
        """After the loop, when all is saved: signals end the process again; one that came too late for the
        last step ends it now."""
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if self.asked:
            fail("stopped by a signal after the last step, which is saved; start the same command again",
                 STOPPED)

    def handle(self, number: int, _frame) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.asked = number


def ignore_signals() -> None:
    """For loader workers: the parent decides when to stop, and they end with it."""
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)


def all_gather(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate x of all ranks along dimension 0, without gradient; every rank must bring the same shape.

    Returns ((W*B, ...), where this rank's rows begin)."""
    if not dist.is_initialized():
        return x.detach(), 0
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.detach().contiguous())
    return torch.cat(out), dist.get_rank() * len(x)


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, without gradient; x itself stays as it is."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_mean(x: Tensor) -> Tensor:
    """Mean of x over the ranks, without gradient."""
    return all_sum(x) / world_size()
