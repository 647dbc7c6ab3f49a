"""A small generated world with exact truth: scenes with instance masks and class labels, and videos.

    python -m studies.layouts --out /tmp/toy --layout sheet      # look at it first: /tmp/toy/sheet.png

There are ten classes. A class is a silhouette (the global cue) with its own surface texture (the local cue,
seen in any 8x8 window of a 64-pixel image). Scenes of one class differ in what augmentation removes: place,
size, turn, hue, brightness. Colour does not tell the class; uneven light blurs what it tells about objects.

10-NN accuracy, chance 10 %: raw pixels 12, colour histograms 13 (tests/test_toy.py: under 35), an untrained
ViT 17 with CLS, 22 with PAT. Objects of the scene's class cover 40 % of it on average.

A scene depends only on (seed, split, index). At 64x64 it takes about 2.5 ms on one core.

Lengths are in "toy pixels": the short side of every image has 64 of them, whatever its size in pixels.
Shapes: H, W pixels; h, w samples, SAMPLES times as many; n things; T frames."""
import math
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt

import numpy as np
from numpy import cos, sin

# The knobs. After turning one, look at the world with `--layout sheet`.
TEXTURE_CONTRAST = 0.22      # how strong textures are (std of luminance); change this line to 0.06: harder
TEXTURE_SCALE = (0.9, 1.15)  # range of their magnification; change this line to (0.6, 1.8): harder
POLARITY_FLIP = 0.0          # share of things with light and dark swapped; change this line to 0.5: harder
DEFORM = 0.05                # how far silhouettes are bent, at most; change this line to 0.25: harder
COVERAGE = (0.38, 0.54)      # share of the image covered by its class; change this line to (0.1, 0.2): harder
DISTRACTOR = 0.4             # share of scenes with a thing of another class; change this line to 0: easier
TILT = 0.25                  # how far textures are turned, in radians; change this line to 3.14: much harder
LIGHT = 0.13                 # how uneven the light is (std of brightness); change this line to 0: easier
CHROMA = 0.04                # how coloured the light is (std of colour); change this line to 0: white, easier
OWN = 0.13                   # how strong each surface's own colour is; change this line to 0: harder
BACKDROP = 0.06              # how strong the background's pattern is; change this line to 0: plain, easier
WAVES = (5, 10)              # wavelengths of that pattern; change this line to (20, 40): smooth, easier
SPOT = (24, 60)              # wavelengths of the light; longer ones are harder, try (48, 120)
GRAIN = 0.02                 # noise of each pixel (std); change this line to 0.08: it drowns textures, harder

CLASSES = ("candy", "starfish", "kite", "fish", "donut", "brick", "waffle", "leaf", "flower", "tent")
SPLITS = {"train": 0, "val": 1, "test": 2}
VIDEO = 3                                           # the videos' number among the splits
SIDE = 64                                           # toy pixels on an image's short side
SAMPLES = 2                                         # samples per pixel along each axis
TURN = 2 * pi
ANGLES = np.arange(2048) * (TURN / 2048)            # where silhouettes are tabulated
PER_RADIAN = np.float32(len(ANGLES) / TURN)
TO_RGB = np.array([                                 # (Cb, Cr) @ TO_RGB is a colour of zero luminance
    [0, -0.344, 1.772],
    [1.402, -0.714, 0],
])
Size = int | tuple[int, int]                        # pixels: the side of a square, or (H, W)


# ------------------------------------------------- the ten classes
def texture(name, p, q):
    """The tone, 0 to 1, of a class's surface at (p, q), in toy pixels.  Change a case: another class."""
    match name:
        case "candy":
            return bars(p, 3.7, 1.85)
        case "starfish":
            return dots(p, q)
        case "kite":                                # a chequerboard
            return soft(1.2 * sin(p) * sin(q))
        case "fish":
            return scales(p, q)
        case "donut":
            return speckle(p, q)
        case "brick":
            shift = 4.5 * (q // 4.5 % 2)            # of every second row, by half a brick
            return 1 - np.maximum(bars(q, 4.5, 1.3), bars(p + shift, 9, 1.3))
        case "waffle":
            return np.maximum(bars(p, 4.6, 1.4), bars(q, 4.6, 1.4))
        case "leaf":                                # veins that meet at an angle
            return bars(q + 1.1 * abs(wrap(p, 9)), 4.8, 2.2)
        case "flower":
            return triangles(p, q)
        case "tent":                                # stripes in pairs
            return soft(0.75 - abs(abs(wrap(p, 8.4)) - 1.5))


def silhouette(name, angle):
    """The distance from the centre to a class's outline at angle, in any unit."""
    match name:
        case "candy" | "donut":
            return np.ones_like(angle)
        case "starfish":
            return np.exp(0.36 * cos(5 * angle))
        case "kite":
            return superellipse(angle, 1.35 + 0.25 * cos(angle), 0.9, 1.15)
        case "fish":
            tail = abs(wrap(angle - pi, TURN))                     # 0 in the middle of the tail
            fin = 1.8 - 0.35 * np.exp(-((tail / 0.16) ** 2))
            return np.where(tail < 0.42, fin, superellipse(angle, 1.25, 0.8, 2))
        case "brick":
            return superellipse(angle, 1.5, 0.85, 9)
        case "waffle":
            return superellipse(angle, 1, 1, 5)
        case "leaf":                                # where two discs overlap
            return np.sqrt(0.56 * sin(angle) ** 2 + 2) - 0.75 * abs(sin(angle))
        case "flower":
            return 0.72 + 0.4 * abs(cos(3 * angle))
        case "tent":                                # a triangle with round corners
            total = 0
            for i in range(3):
                side = cos(angle - i * (TURN / 3))
                total = total + np.maximum(side, 0) ** 7
            return total ** (-1 / 7)


SPECKLE = [                  # wave numbers along p and q
    (1.47, 0.1),
    (0.9, 1.1),
    (0.14, 1.33),
    (-0.8, 0.97),
    (-1.1, 0.5),
    (1.12, 0.77),
    (-0.31, 1.52),
]


def soft(distance):
    """Signed distance from an edge, positive inside -> tone, 0 to 1.  The edge is one toy pixel wide."""
    return np.clip(distance + 0.5, 0, 1)


def wrap(x, period):
    """The signed distance of x from the nearest multiple of period."""
    return x - period * np.round(x / period)


def bars(x, period, width):
    return soft(width / 2 - abs(wrap(x, period)))


def dots(p, q):
    """Discs on a grid of equal triangles."""
    side = 5.2
    height = side * 0.866
    shift = side / 2 * (np.round(q / height) % 2)   # of every second row
    distance = np.hypot(wrap(p + shift, side), wrap(q, height))
    return soft(1.55 - distance)


def scales(p, q):
    """Rows of half discs, each over the next row and darker at its rim."""
    radius = 3.5
    row = np.floor(q / radius)
    y = q - row * radius
    shift = radius * (row % 2)
    upper = np.hypot(wrap(p + shift, 7), y)
    lower = np.hypot(wrap(p + (radius - shift), 7), y + radius)
    light = soft(radius - 1.2 - upper)
    dark = soft(radius + 1.3 - lower) * 0.8
    return np.where(upper < radius, light, dark)


def speckle(p, q):
    """Spots without order: waves of similar length in seven directions."""
    total = 0
    for i, (a, b) in enumerate(SPECKLE):
        total = total + cos(a * p + b * q + 5 * i * i)
    return soft(0.55 * total)


def triangles(p, q):
    p = p * pi / 5
    q = q * pi / 5 / sqrt(3)
    return soft(2.5 * sin(2 * q) * sin(p + q) * sin(p - q))


def superellipse(angle, a, b, power):
    """Half axes a and b; nearly a diamond for power 1, an ellipse for 2, nearly a rectangle for 9."""
    x = abs(cos(angle) / a) ** power
    y = abs(sin(angle) / b) ** power
    return (x + y) ** (-1 / power)


@cache
def prepared(name):
    """What draw() needs of a class, computed once: radius (2048,) at ANGLES and radius of the hole, for the
    area of the unit disc; mean and std of the tone, which give all classes equal brightness and contrast."""
    radius = silhouette(name, ANGLES)
    hole = 0.42 if name == "donut" else 0
    full = 1 / sqrt(1 - hole**2)
    radius = full * radius / np.sqrt((radius**2).mean())
    line = np.arange(0, 150, 0.43)
    tone = texture(name, *np.meshgrid(line, line))
    return radius, full * hole, float(tone.mean()), float(tone.std())


# ------------------------------------------------- things, and how they are drawn
@dataclass
class Thing:
    """One object. Lengths in toy pixels, angles in radians."""
    category: int            # index of its class
    centre: np.ndarray       # (x, y)
    radius: float            # of the disc of equal area
    angle: float             # by which the silhouette is turned
    lean: float              # by which the texture is turned against the silhouette
    bend: np.ndarray         # (2048,) factor of the silhouette's radius at ANGLES
    start: np.ndarray        # (2,) where the texture begins
    magnify: float           # of the texture
    contrast: float          # of the texture; negative: light and dark swapped


@dataclass
class Scene:
    image: np.ndarray        # uint8 (H, W, 3)
    instances: np.ndarray    # uint8 (H, W): 0 background, i the visible part of object i = 1..n
    categories: list[int]    # class indices of the n objects
    label: int               # class index of the scene


def random_thing(rng, category, centre=None, radius=None):
    angle, begin2, begin3 = rng.uniform(0, TURN, 3)
    wave2, wave3 = rng.uniform(0, DEFORM, 2)
    bend = 1 + wave2 * cos(2 * ANGLES + begin2)
    bend += wave3 * cos(3 * ANGLES + begin3)
    contrast = -TEXTURE_CONTRAST if rng.random() < POLARITY_FLIP else TEXTURE_CONTRAST
    lean = rng.uniform(-TILT, TILT) - angle         # so the texture starts out nearly upright in the image
    start = rng.uniform(0, 100, 2).astype(np.float32)
    magnify = rng.uniform(*TEXTURE_SCALE)
    return Thing(category, centre, radius, angle, lean, bend, start, magnify, contrast)


def random_waves(rng, lengths, *shape):
    """Plane waves (*shape, 3), each with its wave number, direction and phase."""
    direction, phase = rng.uniform(0, TURN, (2, *shape))
    number = TURN / rng.uniform(*lengths, shape)
    return np.stack([number, direction, phase], -1)


def add(waves, x, y):
    """The sum of waves (m, 3) at x (W,), y (H,) -> (H, W), by cos(u + v) = cos u cos v - sin u sin v."""
    number, direction, phase = waves.T
    u = np.outer(number * cos(direction), x) + phase[:, None]         # (m, W)
    v = np.outer(number * sin(direction), y)                         # (m, H)
    return cos(v).T @ cos(u) - sin(v).T @ sin(u)


def add_lights(lights, x, y):
    """The colour that lights (3, 6, 3) add at x (W,), y (H,) -> (H, W, 3)."""
    luma, cb, cr = [add(waves, x, y) for waves in lights]
    norm = sqrt(3)                             # six waves have variance 3
    colour = CHROMA / norm * np.stack([cb, cr], -1) @ TO_RGB
    return LIGHT / norm * luma[..., None] + colour


def surface_colours(rng, categories):
    """Colours of zero luminance (1 + n, 3), of the background and of n things.  Hues are random, but things
    of the commonest class share one, as objects of a kind often do."""
    hue = rng.uniform(0, TURN)
    apart = rng.uniform(pi / 3, 5 * pi / 3, 1 + len(categories))
    commonest = max(set(categories), key=categories.count)
    shared = np.array(categories) == commonest
    hues = hue + np.append(0, np.where(shared, apart[0], apart[1:]))
    chroma = np.stack([cos(hues), sin(hues)], 1)
    return OWN * chroma @ TO_RGB


def turned(x, y, angle, magnify=1):
    """Coordinates in a frame that is turned by angle and magnified, float32."""
    c = np.float32(math.cos(angle) / magnify)
    s = np.float32(math.sin(angle) / magnify)
    return c * x + s * y, c * y - s * x


def centres(count, step):
    return (np.arange(count) + 0.5) * step


def near(axis, centre, far):
    """The part of a rising axis within far of centre: its slice, and distances from centre in float32."""
    part = slice(*np.searchsorted(axis, (centre - far, centre + far)))
    return part, (axis[part] - centre).astype(np.float32)


def draw(tones, ids, thing, number, x, y):
    """Paint a thing on tones (h, w), and its number on ids (h, w).  Samples lie at x (w,), y (h,)."""
    name = CLASSES[thing.category]
    radius, hole, mean, std = prepared(name)
    outline = thing.radius * radius * thing.bend
    far = outline.max() + 1                         # 1 more, so that rounding cuts nothing off
    centre_x, centre_y = thing.centre
    columns, dx = near(x, centre_x, far)
    rows, dy = near(y, centre_y, far)

    u, v = turned(dx, dy[:, None], thing.angle)     # the thing's own frame
    distance = np.sqrt(u * u + v * v)
    turn = np.arctan2(v, u) * PER_RADIAN
    entry = turn.astype(np.int32) % len(ANGLES)
    depth = outline.astype(np.float32)[entry] - distance
    inside = (depth > 0) & (distance >= hole * thing.radius)

    p, q = turned(u[inside], v[inside], thing.lean, thing.magnify)   # and the texture's
    start_p, start_q = thing.start
    tone = texture(name, p + start_p, q + start_q)
    rim = 1 - np.clip(depth[inside] / 1.5, 0, 1)                     # thin and dark
    light = thing.contrast / std * (tone - mean)
    tones[rows, columns][inside] = light - 0.1 * rim
    ids[rows, columns][inside] = number


def pool(x):
    """The sum of each pixel's samples: (h, w, ...) -> (H, W, ...)."""
    total = 0
    for i, j in np.ndindex(SAMPLES, SAMPLES):
        total = total + x[i::SAMPLES, j::SAMPLES]
    return total


def render(rng, things, colours, lights, backdrop, size, pan=(0, 0)):
    """Draw things, given back to front, on a backdrop: image uint8 (H, W, 3), instances uint8 (H, W) of 0..n.

    colours: (1 + n, 3).  lights: waves (3, 6, 3).  backdrop: waves (2, 3).  size: (H, W).
    pan: toy pixels by which lights and backdrop are moved."""
    H, W = size
    step = SIDE / min(size)
    right, down = pan
    x = centres(SAMPLES * W, step / SAMPLES)                         # (w,)
    y = centres(SAMPLES * H, step / SAMPLES)                         # (h,)
    pattern = add(backdrop, x + right, y + down)
    tones = BACKDROP * pattern.astype(np.float32)                    # (h, w)
    ids = np.zeros(tones.shape, np.uint8)                            # (h, w)
    for number, thing in enumerate(things, 1):
        draw(tones, ids, thing, number, x, y)

    grain = GRAIN * rng.standard_normal(size, np.float32)
    tone = pool(tones) / SAMPLES**2 + grain                          # (H, W)
    colour = pool(colours[ids]) / SAMPLES**2                         # (H, W, 3)
    x = centres(W, step) + right
    y = centres(H, step) + down
    light = add_lights(lights, x, y)                                 # (H, W, 3)
    image = 0.5 + tone[..., None] + light + colour
    image = np.clip(image, 0, 1) * 255 + 0.5                         # so that astype() rounds

    votes = []                                                       # samples of each number in each pixel
    for number in range(len(things) + 1):
        mine = ids == number
        votes.append(pool(mine.astype(np.uint8)))
    instances = np.argmax(votes, 0)
    return image.astype(np.uint8), instances.astype(np.uint8)


# ------------------------------------------------- scenes and videos
def extent(size):
    """Returns (H, W) in pixels, and (width, height) in toy pixels."""
    size = np.broadcast_to(size, 2)
    return size, size[::-1] * SIDE / size.min()


def random_things(rng, label, wide):
    """One to three large things of class label round the middle, sometimes a small one of another class."""
    n = rng.choice((1, 2, 3), p=(0.4, 0.35, 0.25))
    area = rng.uniform(*COVERAGE) * wide.prod() / n
    if n == 1:
        area *= 0.8
    first = rng.uniform(0, TURN)
    apart = (0.0, 0.24, 0.29)[n - 1]
    things = []
    for turn in first + TURN * np.arange(n) / n:
        direction = np.array([cos(turn), sin(turn)])
        centre = 0.5 + apart * direction + rng.uniform(-0.06, 0.06, 2)
        radius = sqrt(area / pi) * rng.uniform(0.88, 1.12)
        things.append(random_thing(rng, label, wide * centre, radius))

    if rng.random() < DISTRACTOR:
        other = label + int(rng.integers(1, len(CLASSES)))
        area = rng.uniform(0.03, 0.07) * wide.prod()
        radius = sqrt(area / pi)
        centre = rng.uniform(radius, wide - radius)
        thing = random_thing(rng, other % len(CLASSES), centre, radius)
        things.insert(rng.integers(0, n + 1), thing)
    return things


def scene(index: int, seed: int = 0, split: str = "train", size: Size = 64) -> Scene:
    """Scene index of a split: 1 to 3 large objects of class index % 10, sometimes a small one of another.

    Square scenes of all sizes show the same.  Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"toy split {split!r}: have {', '.join(SPLITS)}")
    size, wide = extent(size)
    rng = np.random.default_rng((seed, SPLITS[split], index))
    label = index % len(CLASSES)
    things = random_things(rng, label, wide)
    colours = surface_colours(rng, [thing.category for thing in things])
    lights = random_waves(rng, SPOT, 3, 6)
    backdrop = random_waves(rng, WAVES, 2)
    image, ids = render(rng, things, colours, lights, backdrop, size)

    seen, numbers = np.unique(np.append(0, ids), return_inverse=True)      # hidden things leave no gap
    instances = numbers[1:].reshape(size).astype(np.uint8)
    categories = [things[i - 1].category for i in seen[1:]]
    return Scene(image, instances, categories, label)


def random_places(rng, n, wide):
    """Centres (n, 2) and radii (n,) of n discs that do not touch; where it is crowded they are smaller."""
    radius = rng.uniform(9, 13, n)
    i, j = np.triu_indices(n, 1)                                           # every pair
    gap = 0
    while gap < 1.1:
        radius *= 0.995
        centre = rng.uniform(14, wide - 14, (n, 2))
        distance = np.linalg.norm(centre[i] - centre[j], axis=1)
        gap = (distance / (radius[i] + radius[j])).min()
    return centre, radius


def video(index: int, frames: int = 20, seed: int = 0,
          size: Size = (64, 112)) -> tuple[np.ndarray, np.ndarray]:
    """Three or four objects change places, turn and grow or shrink; those in front hide those behind.

    Returns images uint8 (T, H, W, 3) and instances uint8 (T, H, W), where each object keeps its number.
    Frame 0 shows all objects."""
    size, wide = extent(size)
    rng = np.random.default_rng((seed, VIDEO, index))
    n = rng.integers(3, 5)
    begin, radius = random_places(rng, n, wide)
    end = np.roll(begin, 1, 0) + rng.uniform(-4, 4, (n, 2))                # about where another one was
    way = end - begin
    curve = rng.uniform(-0.2, 0.2, (n, 1))
    side = way[:, ::-1] * (1, -1) * curve                                  # across the way
    spin = rng.uniform(-1.2, 1.2, n)
    grow = rng.uniform(-0.25, 0.25, n)
    drift = rng.uniform(-8, 8, 2)
    categories = rng.permutation(len(CLASSES))[:n].tolist()
    things = [random_thing(rng, category) for category in categories]
    angle = [thing.angle for thing in things]
    lights = random_waves(rng, SPOT, 3, 6)
    colours = surface_colours(rng, categories)
    backdrop = random_waves(rng, WAVES, 2)

    images = []
    instances = []
    for t in np.linspace(0, 1, frames):
        ease = t * t * (3 - 2 * t)                                         # slow, fast, slow
        place = begin + ease * way + math.sin(pi * ease) * side            # (n, 2)
        for i, thing in enumerate(things):
            thing.centre = place[i]
            thing.angle = angle[i] + spin[i] * t
            thing.radius = radius[i] * (1 + grow[i] * t)
        image, ids = render(rng, things, colours, lights, backdrop, size, drift * t)
        images.append(image)
        instances.append(ids)
    return np.stack(images), np.stack(instances)
