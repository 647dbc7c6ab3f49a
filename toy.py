"""A small generated world with exact truth: scenes with instance masks and class labels, and videos.

    python toy.py --out /tmp/toy --layout sheet                     # look at it first: /tmp/toy/sheet.png
    python toy.py --out /tmp/coco --layout coco --n 200 --n_val 50  # or voc, davis, folder

Ten classes. A class is a silhouette (the global cue) with its own surface texture (the local cue, seen in any
8x8 window of a 64-pixel image). What tells two scenes of one class apart is what augmentation removes: place,
size, turn, hue, brightness. Colour says nothing of the class; uneven light hides a part of what it says of
the objects.

10-NN accuracy, chance 10 %: raw pixels 12, colour histograms 13 (tests/test_toy.py: under 35), an untrained
ViT 17 with CLS, 22 with PAT.  Objects of the scene's class cover 40 % of it on average.

A scene is a function of (seed, split, index); at 64x64 it takes about 2.5 ms on one core.
Lengths are in "toy pixels": the short side of every image has 64 of them, whatever its size."""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

# Knobs; after turning one, look at `--layout sheet`.
TEXTURE_CONTRAST = 0.22      # std of luminance on objects; change this line to 0.06 (harder)
TEXTURE_SCALE = (0.9, 1.15)  # magnification, hides frequency; change this line to (0.6, 1.8) (harder)
POLARITY_FLIP = 0.0          # share of objects with light and dark swapped; change this line to 0.5 (harder)
DEFORM = 0.05                # bending of silhouettes; change this line to 0.25 (harder)
COVERAGE = (0.38, 0.54)      # of the image by its class; change this line to (0.1, 0.2) (harder)
DISTRACTOR = 0.4             # share of scenes with an object of another class; change this line to 0 (easier)
TILT = 0.25                  # radians by which texture leans; change this line to 3.14 (much harder)
LIGHT = 0.13                 # std of the lights' brightness; change this line to 0 (easier)
CHROMA = 0.04                # std of their colour; change this line to 0 for a grey world (easier)
OWN = 0.13                   # strength of each surface's own hue; change this line to 0 (harder)
BACKDROP = 0.06              # amplitude of each wave of the background; change this line to 0 (smooth)
WAVES = (5, 10)              # its wavelengths, toy pixels
SPOT = (24, 60)              # wavelengths of the lights, toy pixels; longer: harder
GRAIN = 0.02                 # pixel noise; change this line to 0.08 to drown the texture (harder)

SPLITS = {"train": 0, "val": 1, "test": 2}
VIDEO = 3                    # the videos' number among the splits
SS = 2                       # samples per pixel and axis
TURN = np.arange(2048) * (2 * np.pi / 2048)                  # angles at which silhouettes are tabulated
TO_RGB = np.array([[0, -0.344, 1.772], [1.402, -0.714, 0]])  # (Cb, Cr) @ TO_RGB: a colour of zero luminance


# ------------------------------------------------- textures: (p, q) in toy pixels -> tone in [0, 1]
def soft(d):
    """Signed distance in toy pixels -> [0, 1]: an edge one pixel wide."""
    return np.clip(d + 0.5, 0, 1)


def wrap(x, period):
    """x as its signed distance from the nearest multiple of period."""
    return x - period * np.round(x / period)


def lines(x, period, width):
    return soft(width / 2 - np.abs(wrap(x, period)))


def dots(p, q, a=5.2, radius=1.55):
    h = a * 0.866
    return soft(radius - np.hypot(wrap(p + a / 2 * (np.round(q / h) % 2), a), wrap(q, h)))


def scales(p, q, a=7.0):
    """Rows of half discs, each over the next row and darker at its rim."""
    h = a / 2
    row = np.floor(q / h)
    y = q - row * h
    d, under = (np.hypot(wrap(p + h * ((row + i) % 2), a), y + h * i) for i in (0, 1))
    return np.where(d < h, soft(h - 1.2 - d), soft(h + 1.3 - under) * 0.8)


def speckle(p, q):
    waves = (1.47, 0.1), (0.9, 1.1), (0.14, 1.33), (-0.8, 0.97), (-1.1, 0.5), (1.12, 0.77), (-0.31, 1.52)
    return soft(0.55 * sum(np.cos(a * p + b * q + 5 * i * i) for i, (a, b) in enumerate(waves)))


def triangles(p, q, a=5.0):
    p, q = p * np.pi / a, q * np.pi / a / math.sqrt(3)
    return soft(2.5 * np.sin(2 * q) * np.sin(p + q) * np.sin(p - q))


# ------------------------------------------------- silhouettes: angle -> radius
def superellipse(t, a, b, power):
    return (np.abs(np.cos(t) / a) ** power + np.abs(np.sin(t) / b) ** power) ** (-1 / power)


def polygon(t, sides, power):
    corner = 2 * np.pi / sides
    return sum(np.maximum(np.cos(t - i * corner), 0) ** power for i in range(sides)) ** (-1 / power)


def fish(t):
    tail = np.abs(wrap(t - np.pi, 2 * np.pi))                 # 0 in the middle of the tail
    fin = 1.8 - 0.35 * np.exp(-((tail / 0.16) ** 2))
    return np.where(tail < 0.42, fin, superellipse(t, 1.25, 0.8, 2))


# name: (texture, silhouette, radius of a hole).  Change a line to make another class of it.
WORLD = {
    "candy": (lambda p, q: lines(p, 3.7, 1.85), lambda t: np.ones_like(t), 0),
    "starfish": (dots, lambda t: np.exp(0.36 * np.cos(5 * t)), 0),
    "kite": (lambda p, q: soft(1.2 * np.sin(p) * np.sin(q)),
             lambda t: superellipse(t, 1.35 + 0.25 * np.cos(t), 0.9, 1.15), 0),
    "fish": (scales, fish, 0),
    "donut": (speckle, lambda t: np.ones_like(t), 0.42),
    "brick": (lambda p, q: 1 - np.maximum(lines(q, 4.5, 1.3), lines(p + 4.5 * (q // 4.5 % 2), 9, 1.3)),
              lambda t: superellipse(t, 1.5, 0.85, 9), 0),
    "waffle": (lambda p, q: np.maximum(lines(p, 4.6, 1.4), lines(q, 4.6, 1.4)),
               lambda t: superellipse(t, 1, 1, 5), 0),
    "leaf": (lambda p, q: lines(q + 1.1 * np.abs(wrap(p, 9)), 4.8, 2.2),
             lambda t: np.sqrt(0.56 * np.sin(t) ** 2 + 2) - 0.75 * np.abs(np.sin(t)), 0),
    "flower": (triangles, lambda t: 0.72 + 0.4 * np.abs(np.cos(3 * t)), 0),
    "tent": (lambda p, q: soft(0.75 - np.abs(np.abs(wrap(p, 8.4)) - 1.5)), lambda t: polygon(t, 3, 7), 0),
}
CLASSES = tuple(WORLD)


@lru_cache(maxsize=None)
def prepared(kind):
    """Class number -> texture; radius at TURN and of the hole, for unit mean square; texture's mean and std.

    Mean and std let draw() give every class the same brightness and contrast."""
    texture, silhouette, hole = WORLD[CLASSES[kind]]
    radius = silhouette(TURN)
    full = 1 / math.sqrt(1 - hole**2)
    sample = texture(*np.meshgrid(np.arange(0, 150, 0.43), np.arange(0, 150, 0.43)))
    radius = full * radius / np.sqrt((radius**2).mean())
    return texture, radius, full * hole, float(sample.mean()), float(sample.std())


# ------------------------------------------------- things, and how they are drawn
@dataclass
class Thing:
    """One object. Lengths in toy pixels, angles in radians."""
    kind: int                # class index
    x: float
    y: float
    radius: float            # of the disc of equal area
    angle: float             # of the silhouette
    lean: float              # of the texture, from the silhouette's frame
    bend: np.ndarray         # (4,) two phases and two amounts of deformation
    phase: np.ndarray        # (2,) where the texture starts
    magnify: float           # of the texture
    contrast: float          # of the texture; negative: light and dark exchanged


@dataclass
class Scene:
    """image: uint8 (H, W, 3).  instances: uint8 (H, W), 0 = background, i = visible part of object i = 1..n.
    categories: the n objects' class indices.  label: the scene's class index."""
    image: np.ndarray
    instances: np.ndarray
    categories: list[int]
    label: int


def random_thing(rng, kind, x, y, radius):
    angle, f2, f3 = rng.uniform(0, 2 * np.pi, 3)
    bend = np.array([f2, f3, *rng.uniform(0, DEFORM, 2)])
    sign = -1 if rng.random() < POLARITY_FLIP else 1
    lean = rng.uniform(-TILT, TILT) - angle
    return Thing(kind, x, y, radius, angle, lean, bend, rng.uniform(0, 100, 2), rng.uniform(*TEXTURE_SCALE),
                 sign * TEXTURE_CONTRAST)


def waves(k, turn, phase, x, y):
    """Sum of plane waves of wave numbers k, directions turn and phases (n,), at x (1, w), y (h, 1)."""
    return sum(np.cos(k[i] * (np.cos(turn[i]) * x + np.sin(turn[i]) * y) + phase[i]) for i in range(len(k)))


def random_lights(rng):
    """Soft coloured lights over objects and background: a function of x (1, w), y (h, 1)."""
    turn, phase = rng.uniform(0, 2 * np.pi, (2, 3, 6))
    k = 2 * np.pi / rng.uniform(*SPOT, (3, 6))
    strength = np.array([LIGHT, CHROMA, CHROMA]) / math.sqrt(3)      # six cosines have variance 3

    def lights(x, y):
        field = [s * waves(k[c], turn[c], phase[c], x, y) for c, s in enumerate(strength)]
        return field[0][..., None] + np.stack(field[1:], -1) @ TO_RGB

    return lights


def random_backdrop(rng):
    """The background's pattern, another in each scene: two plane waves, a function of x (1, w), y (h, 1)."""
    turn, phase = rng.uniform(0, 2 * np.pi, (2, 2))
    k = 2 * np.pi / rng.uniform(*WAVES, 2)

    def pattern(x, y):
        return BACKDROP * waves(k, turn, phase, x, y).astype(np.float32)

    return pattern


def surface_colours(rng, kinds):
    """Colours of zero luminance (1 + n, 3): of the background and of n things.  The hues of background and
    things are at random; things of the scene's main class share one, as objects of a kind often do."""
    hue = rng.uniform(0, 2 * np.pi)
    others = hue + rng.uniform(np.pi / 3, 5 * np.pi / 3, 1 + len(kinds))
    main = max(set(kinds), key=kinds.count)
    hues = np.array([hue] + [others[0] if k == main else o for k, o in zip(kinds, others[1:], strict=True)])
    return OWN * np.stack([np.cos(hues), np.sin(hues)], 1) @ TO_RGB


def draw(tones, ids, thing, number, step):
    """Paint thing's brightness on tones (h, w) and its number on ids (h, w); step: toy pixels per sample."""
    texture, radius, hole, mean, std = prepared(thing.kind)
    f2, f3, a2, a3 = thing.bend
    radius = thing.radius * radius * (1 + a2 * np.cos(2 * TURN + f2) + a3 * np.cos(3 * TURN + f3))
    spans = [np.clip((centre + np.array([-1, 1]) * radius.max()) / step + (-1, 1), 0, n).astype(int)
             for centre, n in zip((thing.x, thing.y), ids.shape[::-1], strict=True)]
    box = slice(*spans[1]), slice(*spans[0])
    dx, dy = (((np.arange(*span) + 0.5) * step - centre).astype(np.float32)
              for span, centre in zip(spans, (thing.x, thing.y), strict=True))
    c, s = np.float32(math.cos(thing.angle)), np.float32(math.sin(thing.angle))
    u, v = c * dx + s * dy[:, None], c * dy[:, None] - s * dx        # the object's own frame
    rho, turn = np.sqrt(u * u + v * v), np.arctan2(v, u) * np.float32(len(TURN) / (2 * np.pi))
    depth = radius.astype(np.float32)[turn.astype(np.int32) % len(TURN)] - rho
    inside = (depth > 0) & (rho >= hole * thing.radius)
    u, v, depth = u[inside], v[inside], depth[inside]

    c, s = np.float32(math.cos(thing.lean) / thing.magnify), np.float32(math.sin(thing.lean) / thing.magnify)
    p, q = np.stack([c * u + s * v, c * v - s * u]) + thing.phase[:, None].astype(np.float32)
    light = thing.contrast / std * (texture(p, q) - mean)
    tones[box][inside] = light - 0.1 * (1 - np.clip(depth / 1.5, 0, 1))        # a thin dark rim
    ids[box][inside] = number


def pool(x):
    """Sum of each pixel's samples: (SS*H, SS*W, ...) -> (H, W, ...)."""
    return sum(x[i::SS, j::SS] for i in range(SS) for j in range(SS))


def render(rng, lights, colours, backdrop, things, size, pan=(0, 0)):
    """Things, back to front -> image uint8 (H, W, 3), instances uint8 (H, W) with i + 1 for things[i]."""
    h, w = size
    step = 64 / min(h, w)
    x, y = (np.arange(w) + 0.5) * step + pan[0], (np.arange(h) + 0.5) * step + pan[1]
    fine = [(np.arange(SS * n) + 0.5) * step / SS + p for n, p in zip((w, h), pan, strict=True)]
    tones, ids = backdrop(fine[0][None], fine[1][:, None]), np.zeros((SS * h, SS * w), np.uint8)
    for i, thing in enumerate(things):
        draw(tones, ids, thing, i + 1, step / SS)
    tone = pool(tones) / SS**2 + GRAIN * rng.standard_normal((h, w), np.float32)
    image = 0.5 + tone[..., None] + lights(x[None], y[:, None]) + pool(colours[ids]) / SS**2
    votes = [pool((ids == i).astype(np.uint8)) for i in range(len(things) + 1)]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), np.argmax(votes, 0).astype(np.uint8)


# ------------------------------------------------- scenes and videos
def field(size):
    """int or (H, W) in pixels -> (H, W), and width and height in toy pixels."""
    h, w = (size, size) if isinstance(size, int) else size
    return (h, w), np.array([w, h]) * 64 / min(h, w)


def scene(index, seed=0, split="train", size=64) -> Scene:
    """Scene index of a split: 1 to 3 large objects of class index % 10, sometimes a small one of another.

    size: an int or (H, W).  Square scenes of all sizes show the same."""
    (h, w), wide = field(size)
    rng = np.random.default_rng((seed, SPLITS[split], index))
    label, n = index % len(CLASSES), int(rng.choice((1, 2, 3), p=(0.4, 0.35, 0.25)))
    area = rng.uniform(*COVERAGE) * wide.prod() * (0.8 if n == 1 else 1) / n
    first, apart, things = rng.uniform(0, 2 * np.pi), (0.0, 0.24, 0.29)[n - 1], []
    for turn in first + 2 * np.pi * np.arange(n) / n:
        x, y = wide * (0.5 + apart * np.array([np.cos(turn), np.sin(turn)]) + rng.uniform(-0.06, 0.06, 2))
        things.append(random_thing(rng, label, x, y, math.sqrt(area / np.pi) * rng.uniform(0.88, 1.12)))
    if rng.random() < DISTRACTOR:
        other = (label + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)
        radius = math.sqrt(rng.uniform(0.03, 0.07) * wide.prod() / np.pi)
        thing = random_thing(rng, other, *rng.uniform(radius, wide - radius), radius)
        things.insert(int(rng.integers(0, n + 1)), thing)
    colours = surface_colours(rng, [thing.kind for thing in things])
    image, instances = render(rng, random_lights(rng), colours, random_backdrop(rng), things, (h, w))
    seen, instances = np.unique(np.append(0, instances), return_inverse=True)     # hidden things leave no gap
    instances = instances[1:].reshape(h, w).astype(np.uint8)
    return Scene(image, instances, [things[i - 1].kind for i in seen[1:]], label)


def video(index, frames=20, seed=0, size=(64, 112)) -> tuple[np.ndarray, np.ndarray]:
    """Three or four objects change places, turn and grow or shrink; those in front hide those behind.

    Returns images uint8 (T, H, W, 3), instances uint8 (T, H, W); numbers stay, frame 0 shows all objects."""
    size, wide = field(size)
    rng = np.random.default_rng((seed, VIDEO, index))
    n = int(rng.integers(3, 5))
    radius, gap = rng.uniform(9, 13, n), 0
    while gap < 1.1:                                          # apart in frame 0, smaller where crowded
        radius *= 0.995
        begin = rng.uniform(14, wide - 14, (n, 2))
        pairs = [(i, j) for i in range(n) for j in range(i)]
        gap = min(math.dist(begin[i], begin[j]) / (radius[i] + radius[j]) for i, j in pairs)
    way = np.roll(begin, 1, 0) + rng.uniform(-4, 4, (n, 2)) - begin
    side = way[:, ::-1] * (1, -1) * rng.uniform(-0.2, 0.2, (n, 1))
    spin, grow, drift = rng.uniform(-1.2, 1.2, n), rng.uniform(-0.25, 0.25, n), rng.uniform(-8, 8, 2)
    kinds = rng.permutation(len(CLASSES))[:n]
    things = [random_thing(rng, int(kind), 0, 0, 0) for kind in kinds]
    angle, lights, out = [thing.angle for thing in things], random_lights(rng), []
    colours, backdrop = surface_colours(rng, kinds.tolist()), random_backdrop(rng)
    for t in np.linspace(0, 1, frames):
        ease = t * t * (3 - 2 * t)
        for i, thing in enumerate(things):
            thing.x, thing.y = begin[i] + ease * way[i] + math.sin(np.pi * ease) * side[i]
            thing.angle, thing.radius = angle[i] + spin[i] * t, radius[i] * (1 + grow[i] * t)
        out.append(render(rng, lights, colours, backdrop, things, size, drift * t))
    images, instances = map(np.stack, zip(*out, strict=True))
    return images, instances


class ToyImages:
    """n scenes of a split as a data set.  Drawn at first reading, then kept in memory."""

    def __init__(self, split="train", n=4000, size=64, seed=0):
        if split not in SPLITS:
            raise ValueError(f"toy split {split!r}: have {', '.join(SPLITS)}")
        self.split, self.n, self.size, self.seed = split, n, size, seed
        self.classes, self.labels = list(CLASSES), [i % len(CLASSES) for i in range(n)]
        self.cache = {}

    def __len__(self):
        return self.n

    def scene(self, i) -> Scene:
        return scene(i, self.seed, self.split, self.size)

    def read(self, i) -> torch.Tensor:
        """uint8 (3, H, W), the cache's own: do not write into it."""
        if not 0 <= i < self.n:
            raise IndexError(f"toy scene {i} of {self.n}")
        if i not in self.cache:
            self.cache[i] = torch.from_numpy(self.scene(i).image).permute(2, 0, 1).contiguous()
        return self.cache[i]

    def name(self, i) -> str:
        return f"toy/{self.split}/{i:06d}"


# ------------------------------------------------- writers: the layouts of real data sets
def polygons(mask):
    """Exact outlines [x0, y0, x1, y1, ...] of a mask's parts; None if a row has a gap in a part."""
    (parts, n), found = ndimage.label(mask), []
    for i in range(1, n + 1):
        y = np.flatnonzero((parts == i).any(1)).repeat(2)
        part = parts[y] == i
        left, right = part.argmax(1), part.shape[1] - part[:, ::-1].argmax(1)
        if part.sum() != (right - left).sum():
            return None
        y = y + np.tile((0, 1), len(y) // 2)
        down, up = np.stack([left, y], 1), np.stack([right, y], 1)[::-1]
        found.append(np.concatenate([down, up]).ravel().tolist())
    return found


def run_lengths(mask):
    """COCO's uncompressed RLE: column by column, zeros first."""
    edges = np.flatnonzero(np.diff(mask.T.ravel().astype(np.int8), prepend=0))
    return {"counts": np.diff([0, *edges, mask.size]).tolist(), "size": list(mask.shape)}


def coco_annotation(mask, kind, crowd, as_runs):
    ys, xs = np.nonzero(mask)
    box = [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
    outline = None if crowd or as_runs else polygons(mask)
    return {"category_id": 3 * kind + 2, "iscrowd": int(crowd), "area": int(mask.sum()), "bbox": box,
            "segmentation": outline or run_lengths(mask)}


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def save_mask(path, mask):
    """Palette PNG with PASCAL VOC's colours: bit 3j + c of the number is bit 7 - j of channel c."""
    image = Image.fromarray(mask.astype(np.uint8))
    bits = [[i >> 3 * j + c & 1 for j in (0, 1, 2)] for i in range(256) for c in (0, 1, 2)]
    image.putpalette([128 * a + 64 * b + 32 * c for a, b, c in bits])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_coco(out, split, n, size, seed):
    """Category ids have gaps; every 5th object is in run lengths; every 8th scene has a crowd."""
    images, annotations = [], []
    for i in range(n):
        s, name = scene(i, seed, split, size), f"{i + 1:012d}.jpg"
        save_image(out / f"{split}2017" / name, s.image)
        images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
        crowd = i % 8 == 7 and s.categories.count(s.label) > 1
        numbers = [[k + 1] for k, kind in enumerate(s.categories) if not crowd or kind != s.label]
        if crowd:
            numbers.append([k + 1 for k, kind in enumerate(s.categories) if kind == s.label])
        for ks in numbers:
            mask, kind, number = np.isin(s.instances, ks), s.categories[ks[0] - 1], len(annotations) + 1
            annotations.append(coco_annotation(mask, kind, len(ks) > 1, number % 5 == 0))
            annotations[-1] |= {"id": number, "image_id": i + 1}
    categories = [{"id": 3 * kind + 2, "name": name} for kind, name in enumerate(CLASSES)]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(truth))


def write_voc(out, split, n, size, seed):
    """Classes are 1..10; background pixels that touch an object are void (255)."""
    out, names = out / "VOC2012", [f"toy_{split}_{i:06d}" for i in range(n)]
    for i, name in enumerate(names):
        s = scene(i, seed, split, size)
        void = (s.instances == 0) & ndimage.binary_dilation(s.instances > 0)
        classes = np.array([0, *(kind + 1 for kind in s.categories)])[s.instances]
        save_image(out / "JPEGImages" / f"{name}.jpg", s.image)
        save_mask(out / "SegmentationClass" / f"{name}.png", np.where(void, 255, classes))
        save_mask(out / "SegmentationObject" / f"{name}.png", np.where(void, 255, s.instances))
    lists = out / "ImageSets/Segmentation"
    save_list(lists / f"{split}.txt", names)
    if split == "val":
        save_list(lists / "trainval.txt", (lists / "train.txt").read_text().split() + names)


def write_davis(out, split, n, size, seed):
    names = [f"toy-{split}-{i:03d}" for i in range(n)]
    for i, name in enumerate(names):
        pair = video(i + 1_000_000 * SPLITS[split], 20, seed, (size, size * 7 // 4))
        for t, (image, instances) in enumerate(zip(*pair, strict=True)):
            save_image(out / "JPEGImages/480p" / name / f"{t:05d}.jpg", image)
            save_mask(out / "Annotations/480p" / name / f"{t:05d}.png", instances)
    save_list(out / "ImageSets/2017" / f"{split}.txt", names)


def write_folder(out, split, n, size, seed):
    for i in range(n):
        s = scene(i, seed, split, size)
        save_image(out / split / CLASSES[s.label] / f"{i:06d}.png", s.image)


def write_sheet(out, size, seed, columns=8):
    """Classes as rows: scenes to the left, their instances to the right."""
    cell, side, margin = max(size, 128), max(size, 128) + 4, 68
    tones = np.array([(38, 38, 46), (242, 142, 43), (78, 155, 207), (89, 191, 110), (225, 87, 89)], np.uint8)
    sheet = Image.new("RGB", (margin + 2 * columns * side + 12, len(CLASSES) * side + 4), "white")
    for row, name in enumerate(CLASSES):
        ImageDraw.Draw(sheet).text((8, row * side + side // 2 - 4), name, fill="black")
        for column in range(columns):
            s = scene(row + len(CLASSES) * column, seed, "train", size)
            for left, picture in ((0, s.image), (columns * side + 8, tones[s.instances])):
                picture = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
                sheet.paste(picture, (margin + left + column * side, row * side + 4))
    sheet.save(out / "sheet.png")


LAYOUTS = dict(coco=write_coco, voc=write_voc, davis=write_davis, folder=write_folder, sheet=write_sheet)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder to write: new, or empty")
    p.add_argument("--layout", required=True, help=", ".join(LAYOUTS))
    p.add_argument("--n", type=int, default=100, help="training scenes; for davis videos of 20 frames")
    p.add_argument("--n_val", type=int, default=20, help="validation scenes or videos")
    p.add_argument("--size", type=int, default=64, help="side, for davis height, in pixels")
    p.add_argument("--seed", type=int, default=0, help="another seed: other scenes of the same classes")
    p.add_argument("--force", action="store_true", help="write into a folder that is not empty")

    def fail(message):
        print(f"toy.py: {message}", file=sys.stderr)
        sys.exit(2)

    p.error = fail
    args = p.parse_args(argv)
    if args.layout not in LAYOUTS:
        fail(f"--layout {args.layout}: have {', '.join(LAYOUTS)}")
    if min(args.n, args.n_val, args.seed) < 0 or args.size < 16:
        fail("--n, --n_val and --seed must not be negative, --size at least 16")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()) and not args.force):
        fail(f"--out {args.out} is not an empty folder (--force writes into a full one)")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.layout == "sheet":
        write_sheet(args.out, args.size, args.seed)
    else:
        for split, n in (("train", args.n), ("val", args.n_val)):
            LAYOUTS[args.layout](args.out, split, n, args.size, args.seed)
    print(f"wrote layout {args.layout} to {args.out}")


if __name__ == "__main__":
    main()
