"""Proves: mixing and augmentations are what their definition says, and importing them is cheap."""
import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import augment
from augment import RAND_OPS, mix, moved, rand_augment, rand_op, soft_targets, three_augment
from data import generator_of


def test_mixing_by_its_definition():
    x = torch.rand(6, 3, 16, 16)
    y = soft_targets(torch.arange(6) % 3, 3, 0.1)
    assert torch.allclose(y.sum(1), torch.ones(6))
    assert y[0].tolist() == pytest.approx([0.9333, 0.0333, 0.0333], 1e-2)
    a, b = mix(x, y, np.random.default_rng(0), 0.8, 0)
    lam = np.random.default_rng(0).beta(0.8, 0.8)
    assert torch.allclose(a, lam * x + (1 - lam) * x.flip(0))
    assert torch.allclose(b, lam * y + (1 - lam) * y.flip(0))
    for seed in range(20):
        a, b = mix(x, y, np.random.default_rng(seed), 0, 1.0)
        own = (a == x).all(1)                                          # (B, S, S)
        assert ((a == x.flip(0)).all(1) | own).all()
        share = own[0].float().mean().item()
        assert torch.allclose(b, share * y + (1 - share) * y.flip(0), atol=1e-6)
    assert mix(x, y, None, 0, 0)[0] is x


def test_mixup_and_cutmix_take_turns():
    x = torch.rand(6, 3, 16, 16)
    y = soft_targets(torch.arange(6) % 3, 3, 0.1)
    cut = 0
    for seed in range(60):
        mixed = mix(x, y, np.random.default_rng(seed), 0.8, 1.0)[0]
        cut += bool(((mixed == x) | (mixed == x.flip(0))).all())
    assert 18 < cut < 42                                               # half of the time


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_rand_ops_by_their_magnitude(image):
    assert len(RAND_OPS) == 15
    not_by_magnitude = {"AutoContrast", "Equalize", "Invert", "PosterizeIncreasing"}
    for name in set(RAND_OPS) - not_by_magnitude:
        nothing = rand_op(name, image, 0.0, 1)
        assert (nothing.int() - image.int()).abs().max() <= 1, name
        assert not torch.equal(rand_op(name, image, 0.9, 1), image), name
    posterized = rand_op("PosterizeIncreasing", image, 0.9, 1)         # 4 - int(3.6) = 1 bit
    assert torch.equal(posterized, image & 0b10000000)
    assert torch.equal(rand_op("SolarizeIncreasing", image, 1.0, 1), 255 - image)
    assert torch.equal(rand_op("Invert", image, 0.5, 1), 255 - image)
    bright = rand_op("BrightnessIncreasing", torch.full_like(image, 100), 0.5, 1)
    assert (bright == 145).all()                                       # 1 + 0.45
    right = rand_op("TranslateXRel", image, 1.0, 1)                    # 0.45 * 20 = 9 pixels
    assert torch.equal(right[:, :, 9:], image[:, :, :11])
    assert torch.equal(moved(image, angle=90.0), image.rot90(-1, (1, 2)))
    with pytest.raises(ValueError, match="'Sharpen' is not known"):
        rand_op("Sharpen", image, 0.5, 1)


def test_rand_augment_draws_every_operation_both_ways(image, monkeypatch):
    calls = []

    def record(name, image, m, sign):
        calls.append((name, m, sign))
        return image
    monkeypatch.setattr(augment, "rand_op", record)
    for i in range(400):
        rand_augment(image, generator_of(i))
    names, magnitudes, signs = zip(*calls, strict=True)
    assert set(names) == set(RAND_OPS)
    assert 340 < len(calls) < 460                                      # half of 2 * 400
    assert np.mean(magnitudes) == pytest.approx(0.9, abs=0.01) and max(magnitudes) <= 1
    assert np.mean(signs) == pytest.approx(0, abs=0.15) and set(signs) == {-1, 1}


@pytest.mark.parametrize("recipe", [rand_augment, three_augment])
def test_recipes_depend_on_the_generator_alone(image, recipe):
    drawn = [recipe(image, generator_of(i)) for i in range(30)]
    assert all(d.shape == image.shape and d.dtype == torch.uint8 for d in drawn)
    assert torch.equal(drawn[3], recipe(image, generator_of(3)))
    assert sum(not torch.equal(d, image) for d in drawn) > 15


def test_torchvision_is_imported_where_it_is_used():
    module = ast.parse(Path(augment.__file__).read_text())
    at_the_top = [ast.unparse(node) for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert at_the_top and not any("torchvision" in line for line in at_the_top)
