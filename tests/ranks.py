"""Run a function on several gloo ranks: run_ranks(f, 2, folder) calls f(rank, 2, folder) in two processes."""
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, f, ranks, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    f(rank, ranks, folder)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(f, ranks: int, folder: Path) -> None:
    mp.spawn(_rank, (f, ranks, free_port(), folder), nprocs=ranks)
