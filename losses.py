"""The three losses of MMC, Eq. (1)-(3).  This is the file to read first.

Tensors in, a float32 scalar out; no model, no options.  Eq. (4) is their weighted sum, in pretrain.py.
A contrastive loss at ln(1 + number of negatives) means that the network says nothing, or has collapsed.

Shapes: B images on this rank, V global views, L local crops, N patches, C head width, W ranks, A anchors."""
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed import all_gather, all_sum, world_size


def reconstruction(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. (1): mean absolute error over the corrupted pixels only.

        L_rec = sum_i M_i |x_i - xhat_i| / sum_i M_i,   i over pixels and channels of the batch on all ranks

    pred: (..., K) carries gradient.  target: the same shape, normalised pixels of the clean view.
    mask: bool, True = corrupted, broadcastable to pred.  No gradient reaches an uncorrupted pixel.
    The mean of this over W ranks is the loss of the joined batch: the denominator is summed over them."""
    mask = mask.expand_as(pred)
    error = (pred.float() - target.float()).abs() * mask
    return error.sum() * world_size() / all_sum(mask.sum()).clamp(min=1)


def global_contrast(u: Tensor, w: Tensor, tau: float) -> Tensor:
    """Eq. (3): InfoNCE of student CLS queries against the teacher's CLS keys of all ranks.

        L_cls = - mean_b log exp(u_b.w_b/tau) / sum_j exp(u_b.w_j/tau),   j over one view's W*B teacher keys

    u: (V+L, B, C) student, global views first, carries gradient.  w: (V, B, C) teacher, none.  Both are
    normalised here.  Averaged over the pairs (student crop i, teacher view j) with i != j: cross-view, local
    crops against both views.  The gather changes the loss: without it the negatives are those of one rank.
    Gathered keys need equal batches, and the labels of rank r begin at r*B; forgetting either is invisible
    on one rank."""
    u, w = F.normalize(u.float(), dim=-1), F.normalize(w.detach().float(), dim=-1)
    loss = 0.0
    for j in range(len(w)):
        keys, first = all_gather(w[j])                                 # (W*B, C)
        q = torch.cat([u[i] for i in range(len(u)) if i != j])         # (n*B, C), n = V+L-1 crops
        labels = first + torch.arange(u.shape[1], device=u.device).repeat(len(u) - 1)
        loss = loss + F.cross_entropy(q @ keys.T / tau, labels)        # logits (n*B, W*B)
    return loss / len(w)


def patch_contrast(q: Tensor, k: Tensor, tau: float, anchors: Tensor | None = None,
                   negatives: str | int = "others", block: int = 392) -> Tensor:
    """Eq. (2): every patch finds its own clean version among the patches of *other* images, on this rank,
    in one view.

        L_pat = - mean_a log exp(q_a.k_a/tau) / Z_a
        Z_a   = exp(q_a.k_a/tau) + sum_(b' != b(a), p') exp(q_a.k_(b'p')/tau)

    q: (A, C) student, carries gradient.  k: (B, N, C) teacher, none.  Both are normalised here.
    anchors: (A,) index of each q among the B*N patches, None when A = B*N in order.
    negatives: 'others' = all patches of the other images; 'position' = only those at the same place of the
    grid; a number = only those at so many places, drawn anew by torch's generator, the same for all images.
    The own image's other patches are neither positive nor negative.
    Plain form: tests/test_losses.py."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.detach().float(), dim=-1)
    B, N, C = k.shape
    if anchors is None:
        anchors = torch.arange(B * N, device=q.device)
    if negatives == "position":
        logits = torch.einsum("ac,bac->ab", q, k[:, anchors % N]) / tau                       # (A, B)
        return F.cross_entropy(logits, anchors // N)
    pool = k if negatives == "others" else k[:, torch.randperm(N)[:negatives].to(k.device)]   # (B, n, C)
    return PatchInfoNCE.apply(q, k.flatten(0, 1), pool, anchors, tau, block)


class PatchInfoNCE(torch.autograd.Function):
    """Exact blocked InfoNCE.  Only q needs a gradient, and that of a row needs that row only, so it is formed
    in forward, `block` rows at a time, and no (A, B*N) matrix is ever kept.

    keys: (B*N, C), of which row `anchors` (A,) is the positive.  pool: (B, n, C) the negatives, those of the
    anchor's own image left out."""

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, pool: Tensor, anchors: Tensor, tau: float,
                block: int) -> Tensor:
        (B, n, _), dq, total = pool.shape, torch.empty_like(q), q.new_zeros(())
        image = anchors // (len(keys) // B)                                                   # (A,)
        pool, buffer = pool.flatten(0, 1), q.new_empty(2, min(block, len(q)), B * n)         # (B*n, C)
        for start in range(0, len(q), block):
            rows = slice(start, min(start + block, len(q)))
            r = torch.arange(rows.stop - start, device=q.device)
            own, b = keys[anchors[rows]], image[rows]                          # (r, C) positives; (r,)
            positive = (q[rows] * own).sum(-1) / tau                                          # (r,)
            logits = torch.mm(q[rows] / tau, pool.T, out=buffer[0, :len(r)])                  # (r, B*n)
            logits.view(-1, B, n)[r, b] = -torch.inf
            logits[r, b * n] = positive                                # in place of one of the own image's
            p = torch.softmax(logits, -1, out=buffer[1, :len(r)])
            p_own = p[r, b * n]                                                # (r,) exp(positive) / Z_a
            p[r, b * n] = 0
            total -= p_own.clamp(min=1e-38).log().sum()
            dq[rows] = (p @ pool + (p_own - 1)[:, None] * own) / (tau * len(q))
        ctx.save_for_backward(dq)
        return total / len(q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.saved_tensors[0], *[None] * 5


@torch.no_grad()
def mean_cosines(q: Tensor, k: Tensor, anchors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For the log: mean cosine of the positives and of the negatives (patches of other images); shapes as in
    `patch_contrast`.  From sums alone: sum_(b != b') q_b.k_b' = (sum q).(sum k) - sum_b q_b.k_b."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    B, N, C = k.shape
    anchors = torch.arange(B * N, device=q.device) if anchors is None else anchors
    qs, ks = k.new_zeros(B, C).index_add_(0, anchors // N, q), k.sum(1)                # (B, C) sums per image
    negative = ((qs.sum(0) * ks.sum(0)).sum() - (qs * ks).sum()) / (len(q) * (B - 1) * N)
    return (q * k.reshape(B * N, C)[anchors]).sum(-1).mean(), negative
