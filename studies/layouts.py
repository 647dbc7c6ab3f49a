"""Write the toy world to disk, in the layouts of real data sets, with exact truth.

    python -m studies.layouts --out /tmp/toy --layout sheet      # look at the world: /tmp/toy/sheet.png
    python -m studies.layouts --out /tmp/coco --layout coco --n 200 --n_val 50

The evaluations read these layouts: coco (2017), voc (2012), davis (2017, 480p), and folder, which is images
in class folders. The same options write the same files. A thousand scenes take about 6 s on one core.

Shapes: H, W pixels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

import run
from figure import voc_palette
from toy import CLASSES, SPLITS, scene, video

# Colours of 0 background and objects 1 to 4 on the sheet.
SHEET = np.array([
    (38, 38, 46),
    (242, 142, 43),
    (78, 155, 207),
    (89, 191, 110),
    (225, 87, 89),
], np.uint8)


# ------------------------------------------------- single files
def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def save_mask(path, numbers):
    """Numbers (H, W), 0 to 255, as a palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(voc_palette())
    image.save(path)


def save_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


# ------------------------------------------------- COCO
def polygons(mask):
    """Exact outlines of the connected parts of mask (H, W), each a list [x0, y0, x1, y1, ...].

    An outline goes down along the left ends of the rows and up along the right ends. Returns None where
    a row of a part has a gap."""
    parts, count = ndimage.label(mask)
    outlines = []
    for number in range(1, count + 1):
        rows = np.flatnonzero((parts == number).any(1))
        part = parts[rows] == number                                 # (rows, W)
        left = part.argmax(1)
        right = part.shape[1] - part[:, ::-1].argmax(1)
        if part.sum() != (right - left).sum():
            return None
        y = np.stack([rows, rows + 1], 1).ravel()                    # upper and lower edge of each row
        down = np.stack([left.repeat(2), y], 1)
        up = np.stack([right.repeat(2), y], 1)[::-1]
        outlines.append(np.concatenate([down, up]).ravel().tolist())
    return outlines


def run_lengths(mask):
    """COCO's uncompressed run lengths of mask (H, W): column by column, zeros first."""
    columns = mask.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(columns, prepend=0))
    counts = np.diff([0, *edges, mask.size])
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def coco_annotation(mask, category, crowd, as_runs):
    """mask: (H, W) of one object or one crowd.  as_runs: run lengths even where polygons would do."""
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]       # x, y, width, height
    outlines = None
    if not crowd and not as_runs:
        outlines = polygons(mask)
    return {
        "category_id": coco_id(category),
        "iscrowd": int(crowd),
        "area": int(mask.sum()),
        "bbox": [int(value) for value in box],
        "segmentation": outlines or run_lengths(mask),
    }


def coco_id(category):
    """COCO's category ids have gaps; so have these: 2, 5, 8, ..."""
    return 3 * category + 2


def coco_objects(drawn, crowd):
    """The objects of a scene as triples of mask (H, W), category, is a crowd.

    crowd: the objects of the scene's class become one crowd, at the end."""
    objects = []
    together = []                                                    # numbers of the crowd's objects
    for number, category in enumerate(drawn.categories, 1):
        if crowd and category == drawn.label:
            together.append(number)
        else:
            objects.append((drawn.instances == number, category, False))
    if together:
        objects.append((np.isin(drawn.instances, together), drawn.label, True))
    return objects


def write_coco(out, split, n, size, seed):
    """Every 5th object is in run lengths; every 8th scene has a crowd, if its class has several objects."""
    images = []
    annotations = []
    for i in range(n):
        drawn = scene(i, seed, split, size)
        name = f"{i + 1:012d}.jpg"
        save_image(out / f"{split}2017" / name, drawn.image)
        images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
        crowd = i % 8 == 7 and drawn.categories.count(drawn.label) > 1
        for mask, category, is_crowd in coco_objects(drawn, crowd):
            number = len(annotations) + 1
            annotation = coco_annotation(mask, category, is_crowd, as_runs=number % 5 == 0)
            annotation["id"] = number
            annotation["image_id"] = i + 1
            annotations.append(annotation)
    truth = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": coco_id(category), "name": name} for category, name in enumerate(CLASSES)],
    }
    path = out / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(truth))


# ------------------------------------------------- the other layouts
def write_voc(out, split, n, size, seed):
    """Classes are 1..10; background pixels that touch an object are void (255)."""
    out = out / "VOC2012"
    names = [f"toy_{split}_{i:06d}" for i in range(n)]
    for i, name in enumerate(names):
        drawn = scene(i, seed, split, size)
        objects = drawn.instances > 0
        void = ndimage.binary_dilation(objects) & ~objects
        class_of = np.array([0] + [category + 1 for category in drawn.categories])
        save_image(out / "JPEGImages" / f"{name}.jpg", drawn.image)
        save_mask(out / "SegmentationClass" / f"{name}.png", np.where(void, 255, class_of[drawn.instances]))
        save_mask(out / "SegmentationObject" / f"{name}.png", np.where(void, 255, drawn.instances))
    lists = out / "ImageSets/Segmentation"
    save_list(lists / f"{split}.txt", names)
    if split == "val":
        train = (lists / "train.txt").read_text().split()
        save_list(lists / "trainval.txt", train + names)


def write_davis(out, split, n, size, seed):
    """Videos of 20 frames, size pixels high and 7/4 as wide; train and val show different ones."""
    names = [f"toy-{split}-{i:03d}" for i in range(n)]
    for i, name in enumerate(names):
        index = i + 1_000_000 * SPLITS[split]
        images, instances = video(index, 20, seed, (size, size * 7 // 4))
        for t in range(len(images)):
            save_image(out / "JPEGImages/480p" / name / f"{t:05d}.jpg", images[t])
            save_mask(out / "Annotations/480p" / name / f"{t:05d}.png", instances[t])
    save_list(out / "ImageSets/2017" / f"{split}.txt", names)


def write_folder(out, split, n, size, seed):
    """Images in class folders, as ImageNet has them."""
    for i in range(n):
        drawn = scene(i, seed, split, size)
        save_image(out / split / CLASSES[drawn.label] / f"{i:06d}.png", drawn.image)


def write_sheet(out, size, seed, columns=8):
    """One picture of the world. Classes are rows: scenes to the left, their instances to the right."""
    cell = max(size, 128)
    side = cell + 4
    margin = 68
    width = margin + 2 * columns * side + 12
    sheet = Image.new("RGB", (width, len(CLASSES) * side + 4), "white")
    write = ImageDraw.Draw(sheet).text

    def paste(picture, left, top):
        picture = Image.fromarray(picture)
        picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))

    for row, name in enumerate(CLASSES):
        top = row * side
        write((8, top + side // 2 - 4), name, fill="black")
        for column in range(columns):
            drawn = scene(row + len(CLASSES) * column, seed, "train", size)
            left = margin + column * side
            paste(drawn.image, left, top + 4)
            paste(SHEET[drawn.instances], left + columns * side + 8, top + 4)
    sheet.save(out / "sheet.png")


# ------------------------------------------------- command line
WRITERS = {"coco": write_coco, "voc": write_voc, "davis": write_davis, "folder": write_folder}


def get_args(argv=None):
    p = run.Parser(__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder to write: new, or empty")
    p.add_argument("--layout", required=True, choices=[*WRITERS, "sheet"])
    p.add_argument("--n", type=run.at_least(0), default=100,
                   help="training scenes; for davis videos of 20 frames")
    p.add_argument("--n_val", type=run.at_least(0), default=20, help="validation scenes or videos")
    p.add_argument("--size", type=run.at_least(16), default=64, help="side, for davis height, in pixels")
    p.add_argument("--seed", type=run.at_least(0), default=0,
                   help="another seed: other scenes of the same classes")
    p.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    return p.parse_args(argv)


def make_folder(out, force):
    """Raises Mistake if out is a file, or holds anything without force."""
    if out.exists() and not out.is_dir():
        raise run.Mistake(f"--out {out} is a file; expected a folder, new or empty")
    with run.writing(out, "--out "):
        out.mkdir(parents=True, exist_ok=True)
        full = any(out.iterdir())
    if full and not force:
        raise run.Mistake(f"--out {out} is not an empty folder; give another, or --force to write into it")


def main(args):
    make_folder(args.out, args.force)
    with run.writing(args.out, "--out "):
        if args.layout == "sheet":
            write_sheet(args.out, args.size, args.seed)
        else:
            write = WRITERS[args.layout]
            write(args.out, "train", args.n, args.size, args.seed)
            write(args.out, "val", args.n_val, args.size, args.seed)
    print(f"wrote layout {args.layout} to {args.out}")


if __name__ == "__main__":
    run.script(main, get_args)
