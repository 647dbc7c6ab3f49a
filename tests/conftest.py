"""Shared by all tests: where the real images are, and one thread per test process (two cores, often busy)."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("MMC_TEST_THREADS", 2)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images (imagenette, coco, VOCdevkit, DAVIS, weights).
    Tests that use it skip without it."""
    root = Path(os.environ.get("MMC_TEST_DATA") or "nowhere")
    if not root.is_dir():
        pytest.skip("set MMC_TEST_DATA to a folder with imagenette/, coco/, VOCdevkit/, DAVIS/, weights/")
    return root
