"""The three losses of MMC, Eq. (1)-(3).  This is the file to read first.

Tensors in, a float32 scalar out; no model, no options.  Eq. (4) is their weighted sum, in pretrain.py.
A contrastive loss at ln(1 + number of negatives) is at chance level: untrained or collapsed.

To add a loss, write a function here and its line in pretrain.py.  A loss with a state that all ranks share,
such as DINO's centre, keeps it as a buffer of the teacher's head (`register_buffer` in model.py): there it is
saved and resumed with the run, and no EMA touches it.  Update it with a mean over ranks (distributed.py).

Shapes: B images on this rank, V global views, L local crops, N patches, C head width, W ranks, A anchors."""
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed import all_gather, all_sum, world_size

CPU_ROWS = 392                                 # of a block of Eq. (2): its similarities stay in the cache
GPU_BYTES = 256 * 2 ** 20                      # of a block elsewhere


def reconstruction(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. (1): mean absolute error over the corrupted pixels only.

        L_rec = sum_i M_i |x_i - xhat_i| / sum_i M_i,   i over pixels and channels of the batch on all ranks

    pred: (..., K) carries gradient.  target: the same shape, normalised pixels of the clean view.
    mask: bool, True = corrupted, broadcastable to pred.  No gradient reaches an uncorrupted pixel.
    The denominator is summed over the W ranks, so that the mean of this over the ranks, which is what
    DistributedDataParallel takes, is the loss of the joined batch."""
    mask = mask.expand_as(pred)
    error = (pred.float() - target.float()).abs()
    error = (error * mask).sum()
    corrupted = all_sum(mask.sum()).clamp(min=1)
    return error * world_size() / corrupted


def patch_contrast(
    q: Tensor, k: Tensor, tau: float,
    anchors: Tensor | None = None, negatives: str | int = "others",
) -> Tensor:
    """Eq. (2), in a fast form; the plain one is `plain_patch_contrast` in tests/plain_forms.py.  Every patch
    finds its own clean version among the patches of *other* images, on this rank, in one view.

        L_pat = - mean_a log exp(q_a.k_a/tau) / Z_a
        Z_a   = exp(q_a.k_a/tau) + sum_(b' != b(a), p') exp(q_a.k_(b'p')/tau)

    q: (A, C) student, carries gradient.  k: (B, N, C) teacher, none.  Both are normalised here.
    anchors: (A,) index of each q among the B*N patches; None when A = B*N in order.
    negatives: 'others' = all patches of the other images; 'position' = only those at the same place of the
    grid; a number = only those at so many places, drawn anew by torch's generator, the same for all images.
    The own image's other patches are neither positive nor negative."""
    q = unit(q)
    k = unit(k.detach())
    B, N, _ = k.shape
    if anchors is None:
        anchors = torch.arange(B * N, device=q.device)
    if len(anchors) == 0:                                              # no patch was damaged enough
        return q.sum() * 0.0
    if negatives == "position":
        there = k[:, anchors % N]                                      # (B, A, C)
        logits = torch.einsum("ac,bac->ab", q, there) / tau            # (A, B)
        return F.cross_entropy(logits, anchors // N)

    pool = k                                                           # (B, n, C) negatives
    if negatives != "others":
        places = torch.randperm(N)[:negatives]
        places = places.to(k.device, non_blocking=k.is_cuda)
        pool = k[:, places]
    keys = k.flatten(0, 1)                                             # (B*N, C)
    return PatchInfoNCE.apply(q, keys, pool, anchors, tau)


def unit(x: Tensor) -> Tensor:
    """(..., C) -> the same direction at length 1, in float32."""
    return F.normalize(x.float(), dim=-1)


def rows_at_a_time(pool: Tensor) -> int:
    """Rows of a block of Eq. (2): those that fit the cache of a CPU, or a budget of memory elsewhere, where
    few large products are faster."""
    if pool.device.type == "cpu":
        return CPU_ROWS
    B, n, _ = pool.shape
    row = 2 * 4 * B * n                                                # bytes in two float32 matrices
    return max(CPU_ROWS, GPU_BYTES // row)


class PatchInfoNCE(torch.autograd.Function):
    """Eq. (2) by blocks of rows, so that no (A, B*N) matrix is ever kept.

    Only q needs a gradient, and that of a row needs that row alone: it is formed in forward already.
    keys: (B*N, C), of which row `anchors` (A,) is the positive.  pool: (B, n, C) the negatives; those of the
    anchor's own image are left out."""

    @staticmethod
    def forward(ctx, q, keys, pool, anchors, tau):
        A = len(q)
        B, n, _ = pool.shape
        image = anchors // (len(keys) // B)                            # (A,)
        block = min(rows_at_a_time(pool), A)
        pool = pool.flatten(0, 1)                                      # (B*n, C)
        logits_buffer = q.new_empty(block, B * n)
        p_buffer = q.new_empty(block, B * n)
        dq = torch.empty_like(q)
        total = q.new_zeros(())

        for start in range(0, A, block):
            rows = slice(start, start + block)
            query = q[rows]                                            # (r, C)
            positive = keys[anchors[rows]]                             # (r, C)
            own = image[rows]                                          # (r,)
            seat = own * n             # a column of the own image is free: the positive sits there
            r = torch.arange(len(query), device=q.device)

            logits = logits_buffer[:len(query)]                        # (r, B*n)
            torch.mm(query / tau, pool.T, out=logits)
            of_own_image = own[:, None, None].expand(-1, 1, n)
            # scatter_, because a number that is assigned by index makes a GPU wait
            logits.view(-1, B, n).scatter_(1, of_own_image, -torch.inf)
            logits[r, seat] = (query * positive).sum(-1) / tau
            p = p_buffer[:len(query)]                                  # (r, B*n) = exp(logits) / Z
            torch.softmax(logits, -1, out=p)

            # -log p_own = (largest logit - own logit) - log(largest p), as p_own itself may underflow
            behind = logits.amax(-1) - logits[r, seat]
            loss = behind - p.amax(-1).log()                           # (r,)
            total += loss.sum()

            pull = p[r, seat] - 1                                      # (r,) towards the positive
            p.scatter_(1, seat[:, None], 0.0)
            gradient = p @ pool + pull[:, None] * positive             # (r, C)
            dq[rows] = gradient / (tau * A)
        ctx.save_for_backward(dq)
        return total / A

    @staticmethod
    def backward(ctx, grad):
        (dq,) = ctx.saved_tensors
        return grad * dq, None, None, None, None


def global_contrast(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """Eq. (3): InfoNCE of student CLS queries against the teacher's CLS keys of all ranks.

        L_cls = - mean_b log exp(q_b.k_b/tau) / sum_j exp(q_b.k_j/tau),   j over the W*B keys of one view

    q: (V+L, B, C) student, global views first, carries gradient.  k: (V, B, C) teacher, none.  Both are
    normalised here.  The mean runs over the pairs (student crop i, teacher view j) with i != j: global views
    against the other view, local crops against both.

    The gather changes the loss: without it the negatives are those of one rank.  It needs equal batches, and
    the labels of rank r begin at r*B; forgetting either is invisible on one rank."""
    q = unit(q)
    k = unit(k.detach())
    B = q.shape[1]
    loss = 0.0
    for j, view in enumerate(k):
        keys, first = all_gather(view)                                 # (W*B, C)
        queries = torch.cat([q[:j], q[j + 1:]])                        # (V+L-1, B, C)
        logits = queries.flatten(0, 1) @ keys.T / tau                  # ((V+L-1)*B, W*B)
        labels = first + torch.arange(B, device=q.device)
        labels = labels.repeat(len(queries))
        loss = loss + F.cross_entropy(logits, labels)
    return loss / len(k)


@torch.no_grad()
def mean_cosines(
    q: Tensor,
    k: Tensor,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For the log: mean cosine of the positives, and of the negatives (patches of other images).

    Shapes as in `patch_contrast`.  The second comes from sums over images alone:
    sum_(b != b') q_b.k_b' = (sum_b q_b).(sum_b k_b) - sum_b q_b.k_b"""
    q = unit(q)
    k = unit(k)
    B, N, _ = k.shape
    if anchors is None:
        anchors = torch.arange(B * N, device=q.device)
    own_key = k.flatten(0, 1)[anchors]                                 # (A, C)
    positive = (q * own_key).sum(-1).mean()

    k_sum = k.sum(1)                                                   # (B, C)
    q_sum = torch.zeros_like(k_sum)
    q_sum.index_add_(0, anchors // N, q)                               # (B, C)
    every = (q_sum.sum(0) * k_sum.sum(0)).sum()
    own = (q_sum * k_sum).sum()
    return positive, (every - own) / (len(q) * (B - 1) * N)
