"""Shared by all tests: where the real images are, and two threads unless OMP_NUM_THREADS says otherwise."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import distributed
from toy import scene

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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 toy scenes as a flat folder: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        Image.fromarray(scene(i, size=40).image).save(folder / f"{i:02d}.png")
    return folder
