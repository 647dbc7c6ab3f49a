"""One process or many: the device, the ranks, what they tell each other, who prints, how they are stopped.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.  Without them everything here is the case of one process and
does nothing.  The ranks talk through NCCL on CUDA and through gloo elsewhere."""
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")              # Windows lacks the last two
SIGNALS = [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]
PATIENCE = timedelta(hours=2)                  # rank 0 evaluates alone while the others wait for it


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, then MPS, then CPU; with several ranks each takes the CUDA device of its number.

    Raises ValueError for a device that this machine does not have."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and not several():
            name = "mps"
    try:
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(name)
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as e:           # unknown, not built in, or too few
        raise ValueError(f"torch cannot use it here ({str(e).splitlines()[0]}); expected auto, cuda, mps or "
                         "cpu, and no more ranks than devices") from e
    return torch.device(name)


def several() -> bool:
    """Did torchrun start more than one rank?"""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def fast_precision(device: torch.device, width: int = 384) -> str:
    """'bf16' on CUDA, and on a CPU whose products for a ViT of this width are clearly faster with it; else
    'fp32'."""
    faster = device.type == "cuda" or (device.type == "cpu" and width >= 192 and bf16_gain(width) > 1.3)
    return everywhere("bf16" if faster else "fp32")[0]


def bf16_gain(width: int) -> float:
    """How many times faster a product of a ViT's MLP is in bf16 than in float32 on this CPU; a few ms."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, width, dtype=dtype)
        b = torch.ones(width, 4 * width, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]


def join(device: torch.device) -> None:
    """Join the other ranks, if torchrun started any."""
    if several() and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def finish() -> None:
    """Leave the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first():
    """Rank 0 runs the block before the others do."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def everywhere(value) -> list:
    """The small object that each rank brings, in the order of the ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def say(*words) -> None:
    """print() on rank 0 only, above a progress bar if one is shown.

    A reader that goes away (`| head -1`) does not end the run: what follows is not printed."""
    if not is_main():
        return
    try:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DistributedDataParallel around it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def all_gather(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate x of all ranks along dimension 0, without gradient; every rank must bring the same shape.

    Returns ((W*B, ...), the row at which this rank's own begin)."""
    if not dist.is_initialized():
        return x.detach(), 0
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts), rank() * len(x)


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, without gradient; x itself stays as it is."""
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_mean(x: Tensor) -> Tensor:
    """Mean of x over the ranks, without gradient."""
    return all_sum(x) / world_size()


# ------------------------------------------------- signals
class StopSignal:
    """Signals ask for a stop; a loop looks at `asked` once a step.  A second SIGINT stops at once."""

    def __init__(self):
        self.asked = 0                                                 # or the signal's number
        self.before = {s: signal.signal(s, self.handle) for s in SIGNALS}

    def handle(self, number: int, _frame) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.asked = number

    def release(self) -> None:
        """Signals end the process again, as they did before."""
        for s, handler in self.before.items():
            signal.signal(s, handler)


def ignore_signals() -> None:
    """For loader workers: the training process decides when to stop, and they end with it."""
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)
