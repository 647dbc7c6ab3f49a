"""Proves: each loss equals its equation by hand and in plain code, value and gradient; no gradient reaches an
uncorrupted pixel or a key; two ranks give the loss and the gradient of one rank on the joined batch."""
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from losses import global_contrast, mean_cosines, patch_contrast, reconstruction

TAU = 0.2


def plain_patch_contrast(q, k, tau, anchors=None):
    """Eq. (2), one anchor at a time, as it is written."""
    B, N, _ = k.shape
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    losses = []
    for row, a in enumerate(range(B * N) if anchors is None else anchors.tolist()):
        b, p = divmod(a, N)
        positive = (q[row] @ k[b, p] / tau).exp()
        negative = sum((k[other] @ q[row] / tau).exp().sum() for other in range(B) if other != b)
        losses.append(-(positive / (positive + negative)).log())
    return torch.stack(losses).mean()


def plain_global_contrast(u, w, tau):
    """Eq. (3), pair by pair, image by image."""
    u, w, pairs = F.normalize(u, dim=-1), F.normalize(w, dim=-1), []
    for i in range(len(u)):
        for j in range(len(w)):
            if i != j:
                s = (u[i] @ w[j].T / tau).exp()
                pairs.append(-(s.diagonal() / s.sum(1)).log().mean())
    return torch.stack(pairs).mean()


def test_reconstruction_by_hand():
    pred, target = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
        torch.tensor([[0.0, 5.0], [3.5, 0.0]]),
    )
    mask = torch.tensor([[True, True], [True, False]])
    loss = reconstruction(pred, target, mask)
    assert loss.item() == pytest.approx((1 + 3 + 0.5) / 3)
    loss.backward()
    assert torch.allclose(pred.grad, torch.tensor([[1, -1], [-1, 0]]) / 3)  # nothing at the uncorrupted pixel


def test_reconstruction_of_channels_and_of_nothing():
    x, y, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 1, 4) > 0.5
    expected = ((x - y).abs() * mask).sum() / (mask.sum() * 3)
    assert reconstruction(x, y, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert reconstruction(x, y, torch.zeros(2, 1, 4, dtype=torch.bool)).item() == 0


def test_patch_contrast_by_hand():
    """Two images of one patch: positive cosine 1, negative 0."""
    q = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    expected = -math.log(math.exp(5) / (math.exp(5) + math.exp(0)))
    assert patch_contrast(q, k, TAU).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("block", [5, 784])
def test_patch_contrast_equals_plain(subset, block):
    g = torch.Generator().manual_seed(1)
    k = torch.randn(4, 6, 16, generator=g, dtype=torch.double).float()
    anchors = torch.tensor([0, 3, 7, 12, 13, 23]) if subset else None
    q = torch.randn(6 if subset else 24, 16, generator=g)
    a, b = q.clone().requires_grad_(), q.clone().double().requires_grad_()
    fast, plain = (
        patch_contrast(a, k, TAU, anchors, block=block),
        plain_patch_contrast(b, k.double(), TAU, anchors),
    )
    assert fast.item() == pytest.approx(plain.item(), abs=1e-5)
    (3 * fast).backward()
    (3 * plain).backward()
    assert torch.allclose(a.grad.double(), b.grad, atol=1e-6) and b.grad.abs().max() > 1e-3


def test_patch_contrast_at_the_same_position():
    q, k = torch.randn(6, 8), torch.randn(3, 2, 8)
    u, w = F.normalize(q, dim=-1).view(3, 2, 8), F.normalize(k, dim=-1)
    expected = torch.stack(
        [F.cross_entropy(u[:, p] @ w[:, p].T / TAU, torch.arange(3)) for p in range(2)]
    ).mean()
    assert patch_contrast(q, k, TAU, negatives="position").item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("block", [5, 784])
def test_patch_contrast_with_some_negatives(block):
    """Two of six places: as in the equation with the other places' negatives left out; positives of all."""
    q, k = torch.randn(24, 16, requires_grad=True), torch.randn(4, 6, 16)
    places = torch.manual_seed(3) and torch.randperm(6)[:2]
    torch.manual_seed(3)
    loss = patch_contrast(q, k, TAU, negatives=2, block=block)
    loss.backward()
    p = q.detach().clone().requires_grad_()
    s = torch.einsum("ac,bnc->abn", F.normalize(p, dim=-1), F.normalize(k, dim=-1)) / TAU   # (24, 4, 6)
    image, place = torch.arange(24) // 6, torch.arange(24) % 6
    rows = []
    for a in range(24):
        others = [b for b in range(4) if b != image[a]]
        rows.append(F.cross_entropy(torch.cat([s[a, image[a], place[a]][None],
                                               s[a, others][:, places].flatten()])[None], torch.tensor([0])))
    plain = torch.stack(rows).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert torch.allclose(q.grad, p.grad, atol=1e-6) and p.grad.abs().max() > 1e-3
    every, capped = patch_contrast(q, k, TAU), patch_contrast(q, k, TAU, negatives=99)
    assert capped.item() == pytest.approx(every.item(), abs=1e-5)


def test_collapse_is_log_of_the_number_of_negatives():
    same = torch.ones(4 * 9, 8)
    assert patch_contrast(same, same.view(4, 9, 8), TAU).item() == pytest.approx(
        math.log(1 + 3 * 9), rel=1e-5
    )
    assert global_contrast(torch.ones(2, 4, 8), torch.ones(2, 4, 8), TAU).item() == pytest.approx(
        math.log(4), rel=1e-5
    )


@pytest.mark.parametrize("crops", [2, 5])
def test_global_contrast_equals_plain(crops):
    u, w = torch.randn(crops, 4, 16, requires_grad=True), torch.randn(2, 4, 16, requires_grad=True)
    v = u.detach().clone().requires_grad_()
    loss, plain = global_contrast(u, w, TAU), plain_global_contrast(v, w.detach(), TAU)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    loss.backward()
    plain.backward()
    assert torch.allclose(u.grad, v.grad, atol=1e-6)
    assert w.grad is None                                              # none into the teacher


def test_losses_are_float32_whatever_comes_in():
    q, k = torch.randn(8, 4, dtype=torch.bfloat16), torch.randn(2, 4, 4, dtype=torch.bfloat16)
    assert patch_contrast(q, k, TAU).dtype == torch.float32
    assert global_contrast(q.view(2, 4, 4), k, TAU).dtype == torch.float32
    big = torch.full((2, 2, 4), 6e4, dtype=torch.float16)              # normalising this in float16 overflows
    assert global_contrast(big, big, TAU).isfinite()


def test_mean_cosines_equal_the_matrix():
    q, k, N = torch.randn(12, 8), torch.randn(3, 4, 8), 4
    s = F.normalize(q, dim=-1) @ F.normalize(k.view(12, 8), dim=-1).T
    image = torch.arange(12) // N
    other = image[:, None] != image
    positive, negative = mean_cosines(q, k)
    assert positive.item() == pytest.approx(s.diagonal().mean().item(), abs=1e-6)
    assert negative.item() == pytest.approx(s[other].mean().item(), abs=1e-6)
    some = torch.tensor([1, 2, 9])
    assert mean_cosines(q[some], k, some)[1].item() == pytest.approx(
        s[some][other[some]].mean().item(), abs=1e-6
    )


def two_ranks(rank, ranks, folder):
    torch.manual_seed(0)
    u, w = torch.randn(3, 8, 16), torch.randn(2, 8, 16)
    x, y, mask = torch.randn(8, 3, 5), torch.randn(8, 3, 5), torch.rand(8, 1, 5) > 0.7
    part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    u, x = u[:, part].requires_grad_(), x[part].requires_grad_()
    loss = torch.stack([global_contrast(u, w[:, part], TAU), reconstruction(x, y[part], mask[part])])
    loss.sum().backward()
    # DDP takes the mean
    torch.save((loss.detach(), u.grad / ranks, x.grad / ranks), folder / f"{ranks}-{rank}.pt")


def test_two_ranks_equal_one(tmp_path):
    run_ranks(two_ranks, 2, tmp_path)
    two_ranks(0, 1, tmp_path)
    one, first, second = (torch.load(tmp_path / f) for f in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert torch.allclose((first[0] + second[0]) / 2, one[0], atol=1e-6)
    assert torch.allclose(torch.cat([first[1], second[1]], 1), one[1], atol=1e-6)
    assert torch.allclose(torch.cat([first[2], second[2]]), one[2], atol=1e-6)
    assert one[1].abs().max() > 1e-3 and one[2].abs().max() > 1e-3
