"""Proves: each loss equals its equation by hand and in its plain form, value and gradient, at any temperature
and for any size of a block; no gradient reaches an uncorrupted pixel or a key; two ranks give the loss and
the gradient of one rank on the joined batch."""
import math

import pytest
import torch
import torch.nn.functional as F
from plain_forms import plain_global_contrast, plain_patch_contrast
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import global_contrast, mean_cosines, patch_contrast, reconstruction, rows_at_a_time

TAU = 0.2


# ---- Eq. (1)
def test_reconstruction_by_hand():
    pred = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[0.0, 5.0], [3.5, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss = reconstruction(pred, target, mask)
    assert loss.item() == pytest.approx((1 + 3 + 0.5) / 3)
    loss.backward()
    expected = torch.tensor([[1, -1], [-1, 0]]) / 3                    # nothing at the uncorrupted pixel
    assert torch.allclose(pred.grad, expected)


def test_reconstruction_of_channels_and_of_nothing():
    x = torch.randn(2, 3, 4)
    y = torch.randn(2, 3, 4)
    mask = torch.rand(2, 1, 4) > 0.5
    expected = ((x - y).abs() * mask).sum() / (mask.sum() * 3)
    assert reconstruction(x, y, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = torch.zeros(2, 1, 4, dtype=torch.bool)
    assert reconstruction(x, y, nothing).item() == 0


# ---- Eq. (2)
def test_patch_contrast_by_hand():
    """Two images of one patch: positive cosine 1, negative 0."""
    q = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    expected = -math.log(math.exp(5) / (math.exp(5) + math.exp(0)))
    assert patch_contrast(q, k, TAU).item() == pytest.approx(expected, rel=1e-4)
    assert plain_patch_contrast(q, k, TAU).item() == pytest.approx(expected, rel=1e-4)


def test_the_plain_form_is_the_equation():
    """Anchor by anchor, as Eq. (2) is written: the patches of the own image are left out of the sum."""
    q = torch.randn(6, 8)
    k = torch.randn(3, 2, 8)
    u = F.normalize(q, dim=-1)
    w = F.normalize(k, dim=-1)
    total = 0.0
    for a in range(6):
        b, p = divmod(a, 2)
        positive = (u[a] @ w[b, p] / TAU).exp()
        negative = sum((w[other] @ u[a] / TAU).exp().sum() for other in range(3) if other != b)
        total -= (positive / (positive + negative)).log() / 6
    assert plain_patch_contrast(q, k, TAU).item() == pytest.approx(total.item(), rel=1e-5)


def both_forms(q, k, tau, anchors=None):
    """Loss and gradient of ours in float32, and of the plain form in float64; both of 3 times the loss."""
    ours = q.clone().requires_grad_()
    plain = q.double().requires_grad_()
    fast = patch_contrast(ours, k, tau, anchors)
    slow = plain_patch_contrast(plain, k.double(), tau, anchors)
    (3 * fast).backward()
    (3 * slow).backward()
    return fast.item(), ours.grad.double(), slow.item(), plain.grad


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("block", [1, 5, 784])
def test_patch_contrast_equals_plain(subset, block, monkeypatch):
    monkeypatch.setattr(losses, "CPU_ROWS", block)
    g = torch.Generator().manual_seed(1)
    k = torch.randn(4, 6, 16, generator=g, dtype=torch.double).float()
    anchors = torch.tensor([0, 3, 7, 12, 13, 23]) if subset else None
    q = torch.randn(6 if subset else 24, 16, generator=g)
    fast, fast_grad, slow, slow_grad = both_forms(q, k, TAU, anchors)
    assert fast == pytest.approx(slow, abs=1e-5)
    assert torch.allclose(fast_grad, slow_grad, atol=1e-6) and slow_grad.abs().max() > 1e-3


@pytest.mark.parametrize("tau", [1.0, 0.05, 0.01, 0.001])
def test_patch_contrast_at_any_temperature(tau, monkeypatch):
    monkeypatch.setattr(losses, "CPU_ROWS", 7)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(24, 16, generator=g)
    k = torch.randn(4, 6, 16, generator=g)
    fast, fast_grad, slow, slow_grad = both_forms(q, k, tau)
    assert fast == pytest.approx(slow, rel=1e-5)
    assert (fast_grad - slow_grad).abs().max() < 1e-3 * slow_grad.abs().max()
    near = k.flatten(0, 1) + 0.1 * q                                   # positives that are found
    fast, fast_grad, slow, slow_grad = both_forms(near, k, tau)
    assert fast == pytest.approx(slow, rel=1e-5, abs=1e-6)
    assert torch.allclose(fast_grad, slow_grad, atol=1e-4)


def test_patch_contrast_far_from_its_positive():
    """Positive cosine 1/8, negative 1, temperature 0.01: the positive's share of Z is exp(-87.5)."""
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    k = torch.tensor([[[0.125, (1 - 0.125 ** 2) ** 0.5]], [[1.0, 0.0]]])
    loss = patch_contrast(q, k, 0.01, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(87.5 / 2, rel=1e-5)            # the second anchor's loss is 0
    loss.backward()
    assert q.grad[0, 1].item() == pytest.approx(-(1 - 0.125 ** 2) ** 0.5 / 0.01 / 2, rel=1e-4)


class Calls(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("negatives", ["others", "position", 2])
def test_no_number_becomes_a_tensor_on_the_way(negatives):
    """x[i] = 0 makes one on the CPU, and a GPU waits for it: tests/test_cuda.py sees that on a GPU only."""
    q = torch.randn(12, 8, requires_grad=True)
    k = torch.randn(3, 4, 8)
    with Calls() as calls:
        patch_contrast(q, k, 0.2, torch.arange(12), negatives).backward()
        global_contrast(q.view(4, 3, 8), torch.randn(2, 3, 8), 0.2).backward()
    assert "lift_fresh" not in calls.names
    with Calls() as calls:
        k[torch.arange(2), torch.arange(2)] = 0
    assert "lift_fresh" in calls.names


def test_rows_at_a_time():
    """At ViT-S's 9,408 patches a CPU takes blocks for its cache, and a GPU three large ones."""
    assert rows_at_a_time(torch.empty(48, 196, 8)) == 392
    rows = rows_at_a_time(torch.empty(48, 196, 8, device="meta"))
    assert math.ceil(9408 / rows) == 3
    assert rows_at_a_time(torch.empty(4096, 196, 8, device="meta")) == 392


def test_patch_contrast_at_the_same_position():
    q = torch.randn(6, 8)
    k = torch.randn(3, 2, 8)
    u = F.normalize(q, dim=-1).view(3, 2, 8)
    w = F.normalize(k, dim=-1)
    places = [F.cross_entropy(u[:, p] @ w[:, p].T / TAU, torch.arange(3)) for p in range(2)]
    expected = torch.stack(places).mean().item()
    assert patch_contrast(q, k, TAU, negatives="position").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [5, 784])
def test_patch_contrast_with_some_negatives(block, monkeypatch):
    """Two of six places: as in the equation with the other places' negatives left out; positives of all."""
    monkeypatch.setattr(losses, "CPU_ROWS", block)
    q = torch.randn(24, 16, requires_grad=True)
    k = torch.randn(4, 6, 16)
    torch.manual_seed(3)
    places = torch.randperm(6)[:2]
    torch.manual_seed(3)
    loss = patch_contrast(q, k, TAU, negatives=2)
    loss.backward()

    p = q.detach().clone().requires_grad_()
    s = torch.einsum("ac,bnc->abn", F.normalize(p, dim=-1), F.normalize(k, dim=-1)) / TAU   # (24, 4, 6)
    rows = []
    for a in range(24):
        image, place = divmod(a, 6)
        others = [b for b in range(4) if b != image]
        logits = torch.cat([s[a, image, place][None], s[a, others][:, places].flatten()])
        rows.append(F.cross_entropy(logits[None], torch.tensor([0])))
    plain = torch.stack(rows).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert torch.allclose(q.grad, p.grad, atol=1e-6) and p.grad.abs().max() > 1e-3
    every = patch_contrast(q, k, TAU)
    capped = patch_contrast(q, k, TAU, negatives=99)
    assert capped.item() == pytest.approx(every.item(), abs=1e-5)


# ---- Eq. (3)
@pytest.mark.parametrize("crops", [2, 5])
def test_global_contrast_equals_plain(crops):
    q = torch.randn(crops, 4, 16, requires_grad=True)
    k = torch.randn(2, 4, 16, requires_grad=True)
    p = q.detach().clone().requires_grad_()
    loss = global_contrast(q, k, TAU)
    plain = plain_global_contrast(p, k.detach(), TAU)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    loss.backward()
    plain.backward()
    assert torch.allclose(q.grad, p.grad, atol=1e-6)
    assert k.grad is None                                              # none into the teacher


# ---- all of them
def test_chance_level_is_log_of_the_number_of_negatives():
    same = torch.ones(4 * 9, 8)
    loss = patch_contrast(same, same.view(4, 9, 8), TAU)
    assert loss.item() == pytest.approx(math.log(1 + 3 * 9), rel=1e-5)
    loss = global_contrast(torch.ones(2, 4, 8), torch.ones(2, 4, 8), TAU)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)


def test_losses_are_float32_whatever_comes_in():
    q = torch.randn(8, 4, dtype=torch.bfloat16)
    k = torch.randn(2, 4, 4, dtype=torch.bfloat16)
    assert patch_contrast(q, k, TAU).dtype == torch.float32
    assert global_contrast(q.view(2, 4, 4), k, TAU).dtype == torch.float32
    big = torch.full((2, 2, 4), 6e4, dtype=torch.float16)              # normalising this in float16 overflows
    assert global_contrast(big, big, TAU).isfinite()


@pytest.mark.parametrize("negatives", ["others", "position", 2])
def test_without_an_anchor_there_is_nothing_to_learn(negatives):
    q = torch.zeros(0, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = patch_contrast(q, torch.randn(2, 4, 8), 0.2, none, negatives)
    loss.backward()
    assert loss == 0 and q.grad.shape == (0, 8)


def test_mean_cosines_equal_the_matrix():
    q = torch.randn(12, 8)
    k = torch.randn(3, 4, 8)
    s = F.normalize(q, dim=-1) @ F.normalize(k.view(12, 8), dim=-1).T
    image = torch.arange(12) // 4
    other = image[:, None] != image
    positive, negative = mean_cosines(q, k)
    assert positive.item() == pytest.approx(s.diagonal().mean().item(), abs=1e-6)
    assert negative.item() == pytest.approx(s[other].mean().item(), abs=1e-6)
    some = torch.tensor([1, 2, 9])
    negative = mean_cosines(q[some], k, some)[1]
    assert negative.item() == pytest.approx(s[some][other[some]].mean().item(), abs=1e-6)


def two_ranks(rank, ranks, folder):
    torch.manual_seed(0)
    q = torch.randn(3, 8, 16)
    k = torch.randn(2, 8, 16)
    x = torch.randn(8, 3, 5)
    y = torch.randn(8, 3, 5)
    mask = torch.rand(8, 1, 5) > 0.7
    part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    q = q[:, part].requires_grad_()
    x = x[part].requires_grad_()
    contrast = global_contrast(q, k[:, part], TAU)
    loss = torch.stack([contrast, reconstruction(x, y[part], mask[part])])
    loss.sum().backward()
    # DDP takes the mean
    torch.save((loss.detach(), q.grad / ranks, x.grad / ranks), folder / f"{ranks}-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    run_ranks(two_ranks, 2, tmp_path)
    two_ranks(0, 1, tmp_path)
    one, first, second = (torch.load(tmp_path / f) for f in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert torch.allclose((first[0] + second[0]) / 2, one[0], atol=1e-6)
    assert torch.allclose(torch.cat([first[1], second[1]], 1), one[1], atol=1e-6)
    assert torch.allclose(torch.cat([first[2], second[2]]), one[2], atol=1e-6)
    assert one[1].abs().max() > 1e-3 and one[2].abs().max() > 1e-3
