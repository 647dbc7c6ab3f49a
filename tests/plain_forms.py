"""The equations and protocols as they are written, slow and obvious.

The fast forms are held equal to these by the tests, and are timed against them by studies/bench.py.

Shapes: B images, V views, N patches, C or D width, A anchors, W = 1 rank."""
import torch
import torch.nn.functional as F
from torch import Tensor


def plain_patch_contrast(q: Tensor, k: Tensor, tau: float, anchors: Tensor | None = None) -> Tensor:
    """Eq. (2) with its whole matrix.  q: (A, C).  k: (B, N, C).  anchors: (A,), None for all patches."""
    B, N, _ = k.shape
    q = F.normalize(q, dim=-1)
    keys = F.normalize(k, dim=-1).flatten(0, 1)                        # (B*N, C)
    every = torch.arange(B * N, device=k.device)
    if anchors is None:
        anchors = every
    same_image = (anchors // N)[:, None] == every // N                 # (A, B*N)
    positive = anchors[:, None] == every
    logits = q @ keys.T / tau
    logits = logits.masked_fill(same_image & ~positive, -torch.inf)
    return F.cross_entropy(logits, anchors)


def plain_global_contrast(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """Eq. (3), pair by pair.  q: (V+L, B, C).  k: (V, B, C)."""
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    pairs = []
    for i, crop in enumerate(q):
        for j, view in enumerate(k):
            if i != j:
                s = (crop @ view.T / tau).exp()                        # (B, B)
                pairs.append(-(s.diagonal() / s.sum(1)).log().mean())
    return torch.stack(pairs).mean()


def plain_propagation(
    query: Tensor, keys: Tensor, labels: Tensor, radius: int = 12, topk: int = 5
) -> Tensor:
    """DAVIS: labels of a frame from those before, with one dense affinity (sources, targets).

    query: (h, w, D) and keys: (n, h, w, D), normalised.  labels: (n, h, w, K).  Returns (h, w, K)."""
    n, h, w, D = keys.shape
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([rows, columns], dim=-1).view(h * w, 2)
    distance = (place[:, None] - place).abs().amax(-1)                 # (h*w, h*w)
    near = (distance <= radius).repeat(n, 1).to(keys.device)

    affinity = (keys.view(-1, D) @ query.view(-1, D).T / 0.1).exp() * near
    kth = affinity.topk(topk, dim=0).values[-1]
    affinity[affinity < kth] = 0
    affinity = affinity / affinity.sum(0)
    return (affinity.T @ labels.flatten(0, 2)).view(h, w, -1)


def plain_knn(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """Weighted k-NN, 100 test images at a time: all similarities, the k largest, one-hot votes.

    train: (n, D) and test: (m, D), normalised.  labels: (n,).  Returns classes (m,)."""
    classes = int(labels.max()) + 1
    found = []
    for some in test.split(100):
        similarity, index = (some @ train.T).topk(k, dim=1)            # (100, k)
        weight = (similarity / 0.07).exp()
        votes = F.one_hot(labels[index], classes) * weight[..., None]  # (100, k, classes)
        found.append(votes.sum(1).argmax(1))
    return torch.cat(found)
