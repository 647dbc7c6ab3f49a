"""What a click selects, and how well: the one prompt protocol of table, pretraining and layers (Table 1, 5).

    features = network_features(vit, device)                   # or anything else: (B, 3, S, S) -> (B, N, D)
    result = prompt_table(features, Coco("/data/coco"), Protocol(size=480), vit.patch_size)
    result.summary()["best"]                                   # mean IoU in percent

An image is stretched to a square.  The mask of a prompt is every token whose cosine to the prompt's token is
at least t.  `Protocol` holds all choices; its defaults are the paper's, where the paper names one.
zeroshot.py is the command line, and says which these are.

Shapes: B images, N = h*w tokens, D width, Q prompts, n points of a prompt, T thresholds, H x W
pixels; a stretched image has S x S pixels, g x g whole patches and G x G tokens, more than patches where the
stride is below the patch size."""
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clicks import connected, middle_pixels, patch_features, prompt_maps, to_pixels
from data import generator_of, init_worker, next_batch
from images import BadImage, Unreadable, normalize, resize, to_device
from model import ViT
from run import Mistake
from scenes import Scenes, check_sides, majority, patch_cover

THRESHOLDS = tuple(i / 10 for i in range(10))
BINS = 200                                     # of the densities, over [-1, 1]
Features = Callable[[Tensor], Tensor]          # (B, 3, S, S) uint8 -> (B, N, D) L2-normalised, on the CPU


def network_features(vit: ViT, device: torch.device) -> Features:
    """The tokens of a network, for `prompt_table`."""
    def features(images: Tensor) -> Tensor:
        x = normalize(to_device(images, device))
        return patch_features(vit, x).cpu()
    return features


# ------------------------------------------------- where prompts are
def draw_points(inside: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(Q, N) bool -> (Q, n) random tokens of each mask.  One with fewer than n gives them again, in the same
    order; the first points do not depend on n."""
    luck = torch.rand(inside.shape, generator=generator)
    order = (luck + inside).argsort(1, descending=True)                # those of the mask are above 1: first
    size = inside.sum(1, keepdim=True).clamp(1)
    return order.gather(1, torch.arange(n) % size)


def centre_point(inside: Tensor, grid: tuple[int, int]) -> Tensor:
    """(Q, N) bool -> (Q,) the token deepest inside each mask."""
    from scipy.ndimage import distance_transform_edt
    deepest = []
    for mask in inside:
        padded = np.pad(mask.view(grid).numpy(), 1)                    # the image's border is an edge, too
        depth = distance_transform_edt(padded)[1:-1, 1:-1]
        deepest.append(int(depth.argmax()))
    return torch.tensor(deepest)


def on_tokens(patch: Tensor, g: int, G: int) -> Tensor:
    """Numbers in a grid of g x g patches -> in the grid of G x G tokens with the same first and last."""
    step = (G - 1) // max(g - 1, 1)
    return patch // g * step * G + patch % g * step


# ------------------------------------------------- scores
def iou(mask: Tensor, truth: Tensor) -> Tensor:
    """(Q, N), (Q, N) bool -> (Q,)."""
    return (mask & truth).sum(1) / (mask | truth).sum(1)


def pair_counts(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs i < j of an image's labelled tokens: histograms (2, BINS) of their cosines over [-1, 1], and
    sums (2,); first of pairs with the same label (intra), then of others (inter).

    z: (N, D).  labels: (N,), -1 = none."""
    known = labels >= 0
    z = z[known]
    labels = labels[known]
    i, j = torch.triu_indices(len(z), len(z), 1)
    cosine = (z @ z.T)[i, j]
    differ = (labels[i] != labels[j]).long()
    bins = ((cosine + 1) * BINS / 2).long().clamp(0, BINS - 1)
    counts = torch.bincount(bins + BINS * differ, minlength=2 * BINS)
    sums = torch.bincount(differ, cosine.double(), minlength=2)
    return counts.view(2, BINS), sums


def overlap(counts: Tensor) -> float:
    """O = integral of min(p_intra, p_inter) of two histograms (2, BINS); nan where one of them is empty."""
    p = counts.double() / counts.sum(1, keepdim=True)
    return p.amin(0).sum().item()


# ------------------------------------------------- a set of images
@dataclass
class Protocol:
    """The choices of the protocol; the command line's options of these names say what they mean."""
    size: int = 480
    stride: int | None = None                                          # that of the patches
    target: str = "class"
    prompt: str = "random"
    points: int = 1
    background_points: int = 0
    combine: str = "max"
    centre: bool = False
    contiguous: bool = False
    min_patches: int = 3
    truth: str = "patch"
    upsample: bool = False
    crowd: bool = False
    seed: int = 0


class Target(NamedTuple):
    """A mask of an image.  inside: (g*g,) bool, the patches where prompts are drawn.  cover: (N,), the share
    of each token that is covered.  truth: (N,) bool, or (S*S,) of pixels."""
    category: str
    inside: Tensor
    cover: Tensor
    truth: Tensor


class Prepared(NamedTuple):
    """An image, ready to be prompted.  targets: by kind, "class" and "instance".  empty: objects without a
    pixel.  unreadable: why there is no image."""
    name: str
    image: Tensor | None = None
    targets: dict[str, list[Target]] | None = None
    empty: int = 0
    unreadable: str = ""


class PromptScenes(Dataset):
    """Scenes, brought to the grids of the protocol in the loader's processes.  left_out: what is no target,
    by the reason."""

    def __init__(self, scenes: Scenes, protocol: Protocol, patch_size: int, max_bad: float = 0.01):
        self.scenes = scenes
        self.left_out = Counter(scenes.left_out)
        self.unreadable = Unreadable(len(scenes), max_bad)
        self.pixel_truth = protocol.truth == "pixel"
        self.size = protocol.size
        self.patch = patch_size
        self.stride = protocol.stride or patch_size
        self.g = self.size // patch_size
        self.G = (self.size - patch_size) // self.stride + 1

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> Prepared:
        """One mask at a time, as a large photo may have hundreds of objects."""
        name = self.scenes.name(i)
        empty = 0
        instances = []
        unions = {}                                                    # {category: all of its objects}
        try:
            image = self.scenes.read(i)
            for category, mask in self.scenes.objects(i):
                check_sides(name, image.shape[1:], mask.shape)
                if mask.any():
                    instances.append(self.target(category, mask))
                    unions[category] = unions.get(category, False) | mask
                else:
                    empty += 1
        except BadImage as e:
            return Prepared(name, unreadable=str(e))
        if not instances:
            return Prepared(name, empty=empty)
        classes = [self.target(category, unions[category]) for category in sorted(unions)]
        image = resize(image, (self.size, self.size))
        return Prepared(name, image, {"class": classes, "instance": instances}, empty)

    def prepared(self, num_workers: int = 0) -> Iterator[Prepared]:
        """The images that have an object.  Counts the others, and raises Mistake for too many unreadable."""
        loader = iter(DataLoader(self, None, num_workers=num_workers, worker_init_fn=init_worker))
        for _ in tqdm(range(len(self)), self.scenes.title, unit="image", leave=False, disable=None):
            scene = next_batch(loader)
            if scene.unreadable:
                self.unreadable.note(scene.unreadable)
            if scene.empty:
                self.left_out["objects of zero area"] += scene.empty
            if scene.image is not None:
                yield scene

    def target(self, category: str, mask: np.ndarray) -> Target:
        """(H, W) bool, on the grids."""
        mask = torch.from_numpy(mask)
        patches = patch_cover(mask, self.g, self.g)
        cover = patches
        if self.G > self.g:
            cover = patch_cover(mask, self.G, self.G, self.patch / self.stride)
        truth = majority(cover)
        if self.pixel_truth:
            size = (self.size, self.size)
            pixels = F.interpolate(mask[None, None].byte(), size, mode="nearest-exact")
            truth = pixels.flatten() > 0
        return Target(category, majority(patches), cover, truth)


class Row(NamedTuple):
    """One prompt.  kind: "class" or "instance".  iou: at each threshold, with the automatic one, and of the
    mask that takes everything."""
    kind: str
    image: str
    category: str
    iou: dict[str, float]


@dataclass
class Result:
    """The prompts and the pairs of a set of images.  images: how many have an object.  counts, sums: as of
    `pair_counts`."""
    protocol: Protocol
    source: PromptScenes
    rows: list[Row] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.long))
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    images: int = 0
    seconds: float = 0.0

    @property
    def unreadable(self) -> Unreadable:
        return self.source.unreadable

    def add(self, scene: Prepared, z: Tensor) -> None:
        """One more image, with its tokens z (N, D)."""
        self.images += 1
        cover = torch.stack([target.cover for target in scene.targets["class"]])
        labels = torch.where(majority(cover.amax(0)), cover.argmax(0), -1)
        counts, sums = pair_counts(z, labels)
        self.counts += counts
        self.sums += sums
        for kind, targets in scene.targets.items():
            large = [target for target in targets if target.inside.sum() >= self.protocol.min_patches]
            self.skipped[kind] += len(targets) - len(large)
            if not large:
                continue
            generator = generator_of(self.protocol.seed, kind, scene.name)
            found = self.prompt(large, z, generator)
            for target, scores in zip(large, found, strict=True):
                self.rows.append(Row(kind, scene.name, target.category, scores))

    def prompt(self, targets: list[Target], z: Tensor, generator: torch.Generator) -> list[dict[str, float]]:
        """Row.iou of each of Q targets.

        Prompts are drawn on the grid of whole patches, seeded by the image's name, so that they stay the
        same at any stride, limit and batch size."""
        choice = self.protocol
        grid = self.source
        inside = torch.stack([target.inside for target in targets])    # (Q, g*g)
        truth = torch.stack([target.truth for target in targets])      # (Q, N), or (Q, S*S)
        points = draw_points(inside, choice.points, generator)
        if choice.prompt == "center":
            points[:, 0] = centre_point(inside, (grid.g, grid.g))
        points = on_tokens(points, grid.g, grid.G)
        background = None
        if choice.background_points:
            background = draw_points(~inside, choice.background_points, generator)
            background = on_tokens(background, grid.g, grid.G)
            background[inside.all(1)] = -1                             # nothing is beside such a target
        maps, auto = prompt_maps(z, points, background, choice.combine, choice.centre)
        shape = (grid.G, grid.G)
        if choice.truth == "pixel":
            maps = to_pixels(maps, shape, grid.patch, grid.stride, choice.upsample).flatten(1)
            points = middle_pixels(points, grid.G, grid.patch, grid.stride)
            shape = (grid.size, grid.size)
        thresholds = {f"{t:.1f}": t for t in THRESHOLDS} | {"auto": auto}
        scores = {}                                                    # of (Q,) each
        for name, t in thresholds.items():
            masks = maps >= t
            if choice.contiguous:
                masks = connected(masks, points, shape)
            scores[name] = iou(masks, truth)
        scores["everything"] = truth.float().mean(1)
        table = torch.stack(list(scores.values()), 1)                  # (Q, T + 2)
        return [dict(zip(scores, row, strict=True)) for row in table.tolist()]

    def asked(self) -> list[Row]:
        """The prompts of the protocol's kind of target."""
        return [row for row in self.rows if row.kind == self.protocol.target]

    def summary(self) -> dict:
        """Four means in percent, each {threshold: mean IoU}, where there are such targets.  The first is the
        default definition; its best value, the automatic one, and that of everything stand beside it.  Then
        overlap, intra and inter, nan without pairs, and counts.  Raises Mistake without any target."""
        asked = self.asked()
        instances = [row for row in self.rows if row.kind == "instance"]
        if not asked:
            scenes = self.source.scenes
            raise Mistake(f"{scenes.title}: no {self.protocol.target} of {self.protocol.min_patches} or more "
                          f"patches in {len(scenes)} images")
        means = {
            "miou": mean_iou(asked, "image"),
            "miou_pairs": mean_iou(asked),
            "miou_category": mean_iou(asked, "category"),
        }
        if instances:
            means["miou_instance"] = mean_iou(instances)
        auto = {}
        everything = {}
        for name, mean in means.items():
            for key, value in mean.items():
                mean[key] = round(value, 3)
            auto[name] = mean.pop("auto")
            everything[name] = mean.pop("everything")
        miou = means["miou"]
        best = max(miou, key=miou.get)
        intra, inter = (self.sums / self.counts.sum(1)).tolist()
        return {
            **means,
            "best_threshold": float(best),
            "best": miou[best],
            "auto": auto["miou"],
            "auto_others": auto,
            "everything": everything["miou"],
            "everything_others": everything,
            "overlap": round(overlap(self.counts), 4),
            "intra": round(intra, 4),
            "inter": round(inter, 4),
            "n_categories": len({row.category for row in asked}),
            "n_prompts": len(asked),
            "n_skipped": self.skipped[self.protocol.target],
            "n_images": self.images,
            "left_out": dict(self.source.left_out),
            **self.unreadable.for_json(),
            "images_per_s": round(self.images / self.seconds, 3),
        }


def mean_iou(rows: list[Row], by: str = "") -> dict[str, float]:
    """Rows -> the names of Row.iou, in percent: the mean within groups of equal "image" or "category", then
    over the groups; without `by` over all rows."""
    values = np.array([list(row.iou.values()) for row in rows])        # (rows, T + 2)
    keys = np.array([getattr(row, by) if by else "" for row in rows])
    groups = [values[keys == key].mean(0) for key in np.unique(keys)]
    percent = 100 * np.mean(groups, axis=0)
    return dict(zip(rows[0].iou, percent.tolist(), strict=True))


def prompt_table(features: Features, *given, **options) -> Result:
    """`prompt_tables` for one kind of tokens: the same other arguments, one Result."""
    return prompt_tables(lambda images: [features(images)], *given, **options)[0]


def prompt_tables(
    features: Callable[[Tensor], list[Tensor]],
    scenes: Scenes,
    protocol: Protocol,
    patch_size: int,
    batch_size: int = 8,
    num_workers: int = 0,
    max_bad: float = 0.01,
) -> list[Result]:
    """`prompt_table` for several kinds of tokens in one pass, such as those of each block: `features`
    returns a list of them.  batch_size and num_workers do not change the result.

    Raises Mistake for broken annotations, and for more unreadable images than the share max_bad."""
    grid = PromptScenes(scenes, protocol, patch_size, max_bad)
    images = grid.prepared(num_workers)
    results = [Result(protocol, grid)]
    start = time.perf_counter()
    while batch := list(islice(images, batch_size)):
        tokens = features(torch.stack([scene.image for scene in batch]))
        while len(results) < len(tokens):
            results.append(Result(protocol, grid))
        for result, of_batch in zip(results, tokens, strict=True):
            for scene, z in zip(batch, of_batch, strict=True):
                result.add(scene, z)
    for result in results:
        result.seconds = time.perf_counter() - start
    return results
