"""Frozen features of many images, and classes by what is near: k-NN and few-shot (Tables 4, 6, 8, 11).

    accuracy = knn_of(vit, open_images(args, "train"), open_val(args), 224, device)
    accuracy["cls"][10]                                                # percent, at k = 10

Features are CLS, PAT (the mean of the patch tokens) and hybrid (both, side by side), after the final norm,
L2-normalised, of the centre crop of an image whose short side is 256/224 of it.  k-NN: the k train images
with the largest cosine vote, weighted by exp(cosine / 0.07); the paper reports k = 10.  Few-shot: 5-way
1-shot episodes of CLS, nearest support by cosine.

Cost: that of the network, and of one matrix product of all test with all train features.

Shapes: n train images, m test images, b of a chunk, B of a batch, T tokens, D width, E episodes."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CentreCrop, generator_of, init_worker, next_batch
from images import BadImage, Unreadable, normalize, to_device
from model import ViT
from run import Mistake

KS = (10, 20, 50, 100)
GROUP = 64                                     # train images per group in the search of the nearest
WAYS = 5                                       # classes of an episode
QUERIES = 15                                   # of each class
Features = dict[str, Tensor]                   # "cls": (n, D), "pat": (n, D)
Accuracy = dict[str, dict[int, float]]         # "cls", "pat" or "hybrid": {k: percent}


# ------------------------------------------------- frozen features
@torch.no_grad()
def extract_features(
    vit: ViT,
    images,
    size: int,
    device: torch.device,
    batch_size: int = 128,
    workers: int = 0,
    blocks: Sequence[int] = (-1,),
    unreadable: Unreadable | None = None,
) -> tuple[list[Features], Tensor]:
    """Features of all readable images, for each of the blocks, and labels (n,).

    The features are L2-normalised, float32, on the CPU.  unreadable: counts and names the images that cannot
    be read.  Raises BadImage where none can."""
    loader = DataLoader(
        CentreCrop(images, size),
        batch_size,
        num_workers=workers,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    unreadable = unreadable or Unreadable(len(images), max_bad=1.0)
    parts = [[] for _ in blocks]
    labels = []
    for _ in tqdm(range(len(loader)), "features", leave=False, disable=None):
        x, y, index, readable = next_batch(batches)
        for i in index[~readable].tolist():
            unreadable.note(images.name(i))
        labels.append(y[readable])

        x = normalize(to_device(x, device))
        outputs = vit.intermediate(x, list(blocks), norm=True)
        for of_block, tokens in zip(parts, outputs, strict=True):
            tokens = tokens[readable].float()                          # (B, T, D)
            cls = tokens[:, 0]
            pat = tokens[:, vit.num_prefix_tokens:].mean(1)
            both = torch.stack([cls, pat])                             # (2, B, D)
            both = F.normalize(both, dim=-1)
            of_block.append(both.cpu())

    labels = torch.cat(labels)
    if not len(labels):
        raise BadImage(f"none of the {len(images)} images can be read, such as {images.name(0)}")
    features = []
    for of_block in parts:
        cls, pat = torch.cat(of_block, dim=1)                          # (n, D)
        features.append({"cls": cls, "pat": pat})
    return features, labels


def hybrid(features: Features) -> Tensor:
    """CLS and PAT side by side, (n, 2D), normalised again."""
    both = torch.cat([features["cls"], features["pat"]], dim=1)
    return F.normalize(both, dim=-1)


# ------------------------------------------------- nearest neighbours
@torch.no_grad()
def knn_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    ks: Sequence[int] = KS,
    temp: float = 0.07,
    chunk: int = 256,
) -> Tensor:
    """Weighted k-NN (Wu et al. 2018): each of the k nearest train images votes exp(cosine / temp) for its
    class.  Votes are divided by that of the nearest, which changes no prediction and cannot overflow.

    train: (n, D), test: (m, D), L2-normalised; the search runs on the device of `train`.  labels: (n,) ints
    from 0.  A k above n uses all n.  Returns predictions (len(ks), m) on the CPU.  Memory: chunk * n
    similarities, in a buffer that is used again.  `plain_knn` in tests/plain_forms.py is the plain form."""
    n = len(train)
    labels = labels.to(train.device)
    classes = labels.max().item() + 1
    columns = math.ceil(n / GROUP) * GROUP
    most = min(max(ks), n)
    buffer = train.new_full((chunk, columns), -torch.inf)
    predictions = []
    for queries in test.split(chunk):
        queries = queries.to(train.device)
        sims = buffer[:len(queries)]                                   # (b, columns)
        torch.mm(queries, train.T, out=sims[:, :n])
        cosine, index = largest(sims, most)                            # (b, k), best first
        lead = cosine - cosine[:, :1]
        vote = (lead / temp).exp()
        voter = labels[index]
        votes = vote.new_zeros(len(ks), len(queries), classes)
        for row, k in zip(votes, ks, strict=True):
            row.scatter_add_(1, voter[:, :k], vote[:, :k])
        predictions.append(votes.argmax(-1))
    return torch.cat(predictions, dim=1).cpu()


def largest(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as sims.topk(k, dim=1), and faster for long rows.

    The k largest lie in the k groups with the largest maxima, and only these are ranked.
    sims: (b, groups * GROUP)."""
    groups = sims.shape[1] // GROUP
    if groups <= 2 * k:
        return sims.topk(k, dim=1)
    sims = sims.view(len(sims), groups, GROUP)
    _, best = sims.amax(2).topk(k, dim=1)
    best, _ = best.sort(1)                                             # (b, k) groups
    whole = best[..., None].expand(-1, -1, GROUP)
    candidates = sims.gather(1, whole).flatten(1)
    values, place = candidates.topk(k, dim=1)
    group = best.gather(1, place // GROUP)
    return values, group * GROUP + place % GROUP


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = KS,
    temp: float = 0.07,
) -> dict[int, float]:
    """{k: accuracy in percent}."""
    predictions = knn_predict(train, train_labels, test, ks, temp)
    hits = predictions == test_labels                                  # (len(ks), m)
    shares = hits.float().mean(1)
    return {k: 100 * share for k, share in zip(ks, shares.tolist(), strict=True)}


def knn_of_blocks(
    vit: ViT,
    train,
    val,
    size: int,
    device: torch.device,
    ks: Sequence[int] = KS,
    temp: float = 0.07,
    unreadable: Unreadable | None = None,
    **options,
) -> list[Accuracy]:
    """k-NN with labelled images, for each block.

    Says which images cannot be read; `unreadable` may set a limit.  options: batch_size, workers, blocks, as
    of `extract_features`.  The search runs on CUDA if the network does, and else on the CPU."""
    unreadable = unreadable or Unreadable(len(train) + len(val), max_bad=1.0)
    options["unreadable"] = unreadable
    train_blocks, train_labels = extract_features(vit, train, size, device, **options)
    val_blocks, val_labels = extract_features(vit, val, size, device, **options)
    unreadable.say()

    place = device if device.type == "cuda" else torch.device("cpu")
    results = []
    for known, asked in zip(train_blocks, val_blocks, strict=True):
        known["hybrid"] = hybrid(known)
        asked["hybrid"] = hybrid(asked)
        accuracy = {}
        for head in known:
            near = known[head].to(place)
            accuracy[head] = knn_accuracy(near, train_labels, asked[head], val_labels, ks, temp)
        results.append(accuracy)
    return results


def knn_of(*given, **options) -> Accuracy:
    """The same of the last block."""
    return knn_of_blocks(*given, **options)[0]


# ------------------------------------------------- few-shot
def draw_episodes(labels: Tensor, episodes: int = 600, seed: int = 0) -> Tensor:
    """(n,) labels -> (E, WAYS, 1 + QUERIES) image numbers: each row is of one class, support first.

    Classes of too few images are left out.  Raises Mistake where fewer than WAYS remain."""
    _, counts = labels.unique(return_counts=True)
    members = labels.argsort(stable=True).split(counts.tolist())       # the images of each class
    large = [m for m in members if len(m) > QUERIES]
    if len(large) < WAYS:
        small = len(members) - len(large)
        raise Mistake(f"{WAYS}-way episodes with {QUERIES} queries need {WAYS} classes of {QUERIES + 1} "
                      f"images: here are {len(members)} classes, {small} of them smaller")
    g = generator_of(seed, "few-shot")
    drawn = []
    for _ in range(episodes):
        chosen = torch.randperm(len(large), generator=g)[:WAYS]
        for c in chosen.tolist():
            order = torch.randperm(len(large[c]), generator=g)
            drawn.append(large[c][order[:1 + QUERIES]])
    return torch.stack(drawn).view(episodes, WAYS, -1)


def few_shot(z: Tensor, episodes: Tensor) -> dict:
    """One-shot classification (Table 8).  Accuracy: is the nearest support of the query's class?  F1: each
    query is asked "same class?" of each support, yes where cosine >= t; counted over all episodes.

    z: (n, D) normalised.  episodes: (E, WAYS, 1 + QUERIES).  Returns {"accuracy", "ci95": percent, "f1":
    {threshold: percent}}; always yes gives 33.3 at 5 ways."""
    support = z[episodes[:, :, 0]]
    query = z[episodes[:, :, 1:]]
    cosine = torch.einsum("ewqd,evd->ewqv", query, support)            # (E, WAYS, QUERIES, WAYS)
    way = torch.arange(WAYS)
    hits = cosine.argmax(-1) == way[:, None]
    accuracy = 100 * hits.float().mean((1, 2))                         # (E,)
    ci95 = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
    same = way[:, None, None] == way
    same = same.expand_as(cosine)
    f1 = {}
    for tenths in range(1, 10):
        yes = cosine >= tenths / 10
        right = (yes & same).sum().item()
        asked = (yes.sum() + same.sum()).item()
        f1[f"0.{tenths}"] = 200 * right / asked
    return {"accuracy": accuracy.mean().item(), "ci95": ci95, "f1": f1}
