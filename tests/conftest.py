"""Shared by all tests: where the real images are, and two threads unless OMP_NUM_THREADS says otherwise."""

import os
import signal
from pathlib import Path

import pytest
import torch

import distributed

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A run inside the test process installs handlers; the next test must not meet them."""
    before = [signal.getsignal(s) for s in distributed.SIGNALS]
    yield
    for s, handler in zip(distributed.SIGNALS, before, strict=True):
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images (imagenette, coco, VOCdevkit, DAVIS, weights).
    Tests that use it skip without it."""
    root = Path(os.environ.get("MMC_TEST_DATA") or "nowhere")
    if not root.is_dir():
        pytest.skip("set MMC_TEST_DATA to a folder with imagenette/, coco/, VOCdevkit/, DAVIS/, weights/")
    return root
