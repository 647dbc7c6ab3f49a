"""Proves: every odd image is read right and every broken one is named; folders of any shape open; ranks
share out the same global batch for any number of ranks and go on in the middle of an epoch; nothing that is
evaluated on is trained on."""
import argparse
import hashlib
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    Batches,
    ImageFolder,
    ToyImages,
    Views,
    labelled,
    open_images,
    open_val,
    seed_of,
    share_of_epoch,
    with_classes_of,
)
from images import BadImage, centre_crop, read_image, read_numbers
from run import Mistake


def picture(mode="RGB", size=(40, 30)):
    """A smooth picture, red to the right, green downwards, so that an upside-down decode is seen."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 0 * x + 60], -1).astype(np.uint8)).convert(mode)


def write_zoo(folder, copies=1):
    """Every readable oddity that users bring.  Returns how many files."""
    for i in range(copies):
        def at(name, i=i):
            return folder / f"{i}_{name}"
        for mode in ("RGB", "L", "CMYK"):
            picture(mode).save(at(f"{mode}.jpg"), quality=95)
        for mode in ("RGB", "L", "LA", "RGBA", "P", "1"):
            picture(mode).save(at(f"{mode}.png"))
        Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)).save(at("16bit.png"))
        exif = Image.Exif()
        exif[0x0112] = 6
        picture().save(at("turned.jpg"), exif=exif, quality=95)
        picture(size=(1, 1)).save(at("dot.png"))
        picture(size=(300, 2)).save(at("line.bmp"))
        picture().save(at("web.webp"))
        picture().save(at("anim.gif"), save_all=True, append_images=[picture()])
        picture().save(at("upper.JPG"))
        picture().save(at("scan.tiff"))
    return len(list(folder.iterdir()))


def write_broken(folder):
    good = io.BytesIO()
    picture().save(good, "JPEG")
    (folder / "truncated.jpg").write_bytes(good.getvalue()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is a letter, not a picture")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)                        # a 3.6 gigapixel PNG
    chunk = b"IHDR" + header
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
                                      + struct.pack(">I", zlib.crc32(chunk)))
    return 4


def test_odd_images_are_read(tmp_path, monkeypatch):
    n = write_zoo(tmp_path)
    source = ImageFolder(tmp_path)
    assert len(source) == n == 17 and source.labels is None
    for i in range(n):
        x = source.read(i)
        assert x.dtype == torch.uint8 and x.shape[0] == 3 and x.ndim == 3, source.name(i)
    truth = torch.from_numpy(np.array(picture())).permute(2, 0, 1).float()
    def close(name, expected=truth, tolerance=12):
        return (read_image(tmp_path / name).float() - expected).abs().mean() < tolerance

    assert all(close(f"0_{n}")
               for n in ("RGB.jpg", "RGB.png", "RGBA.png", "web.webp", "upper.JPG", "scan.tiff"))
    assert (close("0_CMYK.jpg", tolerance=40) and
            read_image(tmp_path / "0_CMYK.jpg")[0, 0, -1] > read_image(tmp_path / "0_CMYK.jpg")[0, 0, 0])
    assert read_image(tmp_path / "0_turned.jpg").shape == (3, 40, 30)                     # upright by its tag
    grey = read_image(tmp_path / "0_16bit.png")
    assert grey.max() > 240 and grey.float().std() > 50                                  # scaled, not clipped
    assert torch.equal(read_image(tmp_path / "0_L.png")[0], read_image(tmp_path / "0_L.png")[2])
    monkeypatch.delattr("torchvision.io.decode_jpeg")                  # deprecated since torchvision 0.29
    assert close("0_RGB.jpg") and close("0_upper.JPG")


def test_broken_images_are_named(tmp_path):
    write_broken(tmp_path)
    for name in ("truncated.jpg", "empty.png", "text.jpg", "bomb.png", "missing.png"):
        with pytest.raises(BadImage, match=name):
            read_image(tmp_path / name)


def test_a_bad_image_is_replaced_by_its_neighbour(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("no")
    (tmp_path / "2.png").write_text("no")
    views = Views(ImageFolder(tmp_path), lambda image, g: {"x": image[0, 0, 0]}, seed=0)
    assert [int(views[0, i]["x"]) for i in range(4)] == [0, 150, 150, 150]
    assert [views[0, i]["bad"] for i in range(4)] == [-1, 1, 2, -1]
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("no")
    with pytest.raises(BadImage, match="png"):
        views[0, 0]


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)


def arguments(data, val_data=None, **more):
    return argparse.Namespace(data=str(data), val_data=val_data and str(val_data), data_root="data",
                              download=False, **more)


def test_folders_flat_nested_labelled(tmp_path):
    make(tmp_path / "flat", "a.png", "b.jpg", ".hidden.png")
    make(tmp_path / "nested", "x/1.png", "y/deep/2.png", "3.png")
    make(tmp_path / "classes", "cat/1.png", "cat/more/2.png", "dog/3.png")
    flat, nested, classes = (ImageFolder(tmp_path / n) for n in ("flat", "nested", "classes"))
    assert (len(flat), flat.labels) == (2, None) and (len(nested), nested.labels) == (3, None)
    assert classes.classes == ["cat", "dog"] and classes.labels == [0, 0, 1]
    assert flat.about == "2 images, no labels (no class folders); left out: 1 hidden"
    assert "1 images lie beside the 2 folders" in nested.about
    assert classes.about == "3 images, 2 classes"


def test_what_is_no_data_is_left_out_and_counted(tmp_path):
    """Dot names, other files, a few images beside the class folders, links that lead in a circle."""
    make(tmp_path, *(f"{c}/{i}.png" for c in ("ant", "bee") for i in range(10)), "preview.png",
         ".ipynb_checkpoints/1.png", "ant/.Trash/2.png", "bee/._3.png", "bee/4.JFIF.png")
    (tmp_path / "ant" / "notes.txt").write_text("x")
    (tmp_path / "bee" / "video.mp4").write_text("x")
    (tmp_path / "ant" / "again").symlink_to(tmp_path / "ant")
    (tmp_path / "bee" / "up").symlink_to(tmp_path)
    source = ImageFolder(tmp_path)
    assert source.classes == ["ant", "bee"] and len(source) == 21
    assert source.about == ("21 images, 2 classes; left out: 1 .mp4, 1 .txt, 3 hidden, 1 images beside the "
                            "class folders, 2 links to folders that are there already")


def test_all_suffixes_of_images_are_read(tmp_path):
    for suffix in ("jfif", "jpe", "JPEG"):
        picture().save(tmp_path / f"a.{suffix}", format="JPEG")
    source = ImageFolder(tmp_path)
    assert len(source) == 3 and all(source.read(i).shape == (3, 30, 40) for i in range(3))


def test_a_folder_that_cannot_be_opened_is_a_mistake(tmp_path, monkeypatch):
    """Root may open everything, so the refusal is played."""
    make(tmp_path, "a/1.png", "b/2.png")
    real = os.scandir

    def refuse(folder):
        if str(folder).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(Mistake, match="b: this folder cannot be opened .Permission denied"):
        ImageFolder(tmp_path)


def test_split_folders_are_found(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    for folder in (tmp_path, tmp_path / "train"):
        train, val = (open_images(arguments(folder), split) for split in ("train", "val"))
        assert [len(train), len(val)] == [2, 2] and "train" in train.name(0) and "val" in val.name(0)
    assert open_images(arguments(tmp_path / "val"), "val") is None


def test_a_class_called_train_is_a_class(tmp_path):
    make(tmp_path, *(f"{c}/{i}.png" for c in ("bus", "car", "train") for i in range(3)))
    source = open_images(arguments(tmp_path), "train")
    assert source.classes == ["bus", "car", "train"] and len(source) == 9
    assert open_images(arguments(tmp_path), "val") is None


def test_chosen_classes(tmp_path):
    make(tmp_path, *(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "abc" for i in range(2)))
    names = tmp_path / "names.txt"
    names.write_text("\ufeffc\na\n\n")
    args = arguments(tmp_path, classes=str(names))
    train, val = open_images(args, "train"), open_images(args, "val")
    assert train.classes == val.classes == ["a", "c"] and len(train) == len(val) == 4
    names.write_text("a\nz\n")
    with pytest.raises(Mistake, match="1 of 2 classes asked for have no images here, such as z"):
        open_images(args, "train")
    for content, said in (("a\n", "names 1 classes"), (None, "cannot be read")):
        names.unlink() if content is None else names.write_text(content)
        with pytest.raises(Mistake, match=said):
            open_images(args, "train")
    assert len(data.chosen_classes("in100")) == 100


def test_classes_are_matched_by_name(tmp_path):
    """A val split may lack a class, and not have one that train lacks."""
    make(tmp_path, *(f"train/{c}/1.png" for c in "abc"))
    make(tmp_path, "val/a/1.png", "val/c/1.png", "other/a/1.png", "other/z/1.png")
    train, val, other = (ImageFolder(tmp_path / n) for n in ("train", "val", "other"))
    assert with_classes_of(train, val, "x").labels == [0, 2]
    assert with_classes_of(train, val, "x").classes == ["a", "b", "c"]
    with pytest.raises(Mistake, match="train has no z"):
        with_classes_of(train, other, "x")


def test_the_digest_tells_the_images_wherever_they_lie(tmp_path):
    for place in ("here", "there"):
        make(tmp_path / place, "a/1.png", "b/2.png")
    here, there = (ImageFolder(tmp_path / p) for p in ("here", "there"))
    assert data.digest(here) == data.digest(there)
    make(tmp_path / "there", "b/3.png")
    assert data.digest(here) != data.digest(ImageFolder(tmp_path / "there"))


def test_wrong_paths_say_so(tmp_path):
    with pytest.raises(Mistake, match="no such folder"):
        open_images(arguments(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="holds no image"):
        ImageFolder(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(Mistake, match="left out: 1 .txt"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(Mistake, match="it is a file"):
        ImageFolder(tmp_path / "empty" / "notes.txt")
    with pytest.raises(Mistake, match="--download"):
        open_images(argparse.Namespace(data="cifar10", data_root=str(tmp_path), download=False))


def test_named_set_without_network(tmp_path, monkeypatch):
    class Fake:
        classes = ["a", "b"]
        targets = [0, 1, 1]
        def __init__(self, root, train, download):
            self.train = train
        def __len__(self):
            return 3
        def __getitem__(self, i):
            return picture("L"), self.targets[i]
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    source = open_images(arguments("cifar10"), "val")
    assert (source.labels == [0, 1, 1] and source.read(0).shape == (3, 30, 40)
            and source.name(2) == "cifar10/val/2" and source.about == "3 images, 2 classes")


def test_labels_that_stand_beside_the_file_and_labels_that_are_unknown(tmp_path, monkeypatch):
    """torchvision's cars keep (file, label) pairs; STL-10 marks images without a label by -1."""
    class Fake:
        classes = ["a", "b"]
        _samples = [("a.jpg", 1), ("b.jpg", -1), ("c.jpg", 0)]
        def __init__(self, root, split, download):
            pass
        def __len__(self):
            return 3
    monkeypatch.setattr("torchvision.datasets.StanfordCars", Fake)
    source = open_images(arguments("cars"), "train")
    assert source.labels == [1, -1, 0] and labelled(source, "x").labels == [1, 0]


def test_seeds_are_stable():
    assert seed_of(0, "view", 1, 2) == seed_of(0, "view", 1, 2) != seed_of(0, "view", 12)
    assert 0 <= seed_of("x") < 2 ** 63


def test_ranks_share_the_same_global_batch(monkeypatch):
    def order(rank, ranks, batch_size, step=0):
        monkeypatch.setattr("distributed.rank", lambda: rank)
        monkeypatch.setattr("distributed.world_size", lambda: ranks)
        items = [i for e, i in share_of_epoch(50, batch_size, 1, epoch=3, step=step) if e == 3]
        return torch.tensor(items).view(-1, batch_size)
    one, two = order(0, 1, 8), torch.cat([order(0, 2, 4), order(1, 2, 4)], 1)
    assert torch.equal(one, two) and len(set(one.flatten().tolist())) == 48
    assert torch.equal(order(0, 1, 8, step=2), one[2:])


def test_loader_refuses_less_than_a_batch():
    with pytest.raises(Mistake, match="lower --batch_size"):
        Batches(Views(ToyImages("train", 10, 16), lambda image, g: {}, 0), 16)


def test_images_to_test_on(tmp_path):
    def of(name, val_data):
        found = open_val(arguments(name, val_data))
        return found and (found.files if hasattr(found, "files") else found.name(0))
    for name in ("set/train/a/1.png", "set/val/a/2.png", "flat/a/3.png", "flat/train/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    sets, flat = str(tmp_path / "set"), str(tmp_path / "flat")
    assert of(sets, None) == of(flat, sets) == of(None, sets) == [f"{sets}/val/a/2.png"]
    assert of(sets, f"{sets}/train") == [f"{sets}/train/a/1.png"] and of(flat, None) is None
    assert of(sets, flat) == [f"{flat}/a/3.png", f"{flat}/train/4.png"]
    assert of(sets, "toy") == of("toy", None) == "toy/val/000000"
    with pytest.raises(Mistake, match="no such folder"):
        of(sets, str(tmp_path / "none"))


def digests(files):
    return {hashlib.sha256(open(f, "rb").read()).digest() for f in files}


def test_nothing_that_is_evaluated_on_is_trained_on(real_data):
    """By content: imagenette's val, COCO, VOC, imagewoof, DAVIS are not in imagenette/train."""
    train = ImageFolder(real_data / "imagenette" / "train")
    known = digests(train.files)
    assert len(known) == len(train) > 9000
    for name in ("imagenette/val", "coco", "VOCdevkit", "imagewoof", "DAVIS/JPEGImages"):
        other = ImageFolder(real_data / name)
        assert not known & digests(other.files), name


@pytest.mark.slow
def test_toy_splits_share_no_scene():
    train, val = (ToyImages(split, 300) for split in ("train", "val"))
    seen = [{source.read(i).numpy().tobytes() for i in range(300)} for source in (train, val)]
    assert len(seen[0]) == len(seen[1]) == 300 and not seen[0] & seen[1]


# ---- loaders ----

def test_batches_own_epochs_accumulation_and_resume():
    """Steps of a run that begins in the middle are those of the whole run."""
    def of(first, last, accum=1, batch_size=4):
        views = Views(ToyImages("train", 20, 16), lambda image, g: {"x": torch.rand(2, generator=g)}, seed=3)
        batches = Batches(views, batch_size, accum)
        return batches.per_epoch, {step: [b["index"].tolist() for b in parts]
                                   for step, parts in batches.steps(first, last)}
    per_epoch, whole = of(0, 12)
    assert per_epoch == 5 and list(whole) == list(range(12))
    epoch = sum((whole[s][0] for s in range(5)), [])
    assert sorted(epoch) == list(range(20)) and whole[5] != whole[0]
    assert of(7, 12)[1] == {s: whole[s] for s in range(7, 12)}
    per_epoch, joined = of(0, 4, accum=2, batch_size=2)
    assert per_epoch == 5 and [sum(parts, []) for parts in joined.values()] == [whole[s][0] for s in range(4)]


def test_a_killed_worker_is_one_line():
    def dies():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
        yield
    with pytest.raises(data.LoaderDied, match="--num_workers 0"):
        data.next_batch(dies())

    def bug():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
        yield
    with pytest.raises(RuntimeError, match="Caught"):
        data.next_batch(bug())


# ---- pixels ----

def test_deep_images_are_stretched(tmp_path):
    """0 to 1, 0 to 255, 12 and 16 bits, 32 bits: all read as their 8-bit twin."""
    a = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    twins = {"f01.tif": a, "f255.tif": a * 255, "u16.png": (a * 65535).astype(np.uint16),
             "u12.png": (a * 4095).astype(np.uint16), "i32.tif": (a * 2e9).astype(np.int32)}
    for name, values in twins.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name)[0].numpy() - a * 255).max() < 1.1, name


def test_exif_turns_a_photo_but_not_what_masks_describe(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture().save(tmp_path / "turned.png", exif=exif)
    stored, upright = read_image(tmp_path / "turned.png", upright=False), read_image(tmp_path / "turned.png")
    assert torch.equal(stored, upright.flip(1, 2)) and not torch.equal(stored, upright)
    picture().save(tmp_path / "turned.jpg", exif=exif)
    stored, upright = read_image(tmp_path / "turned.jpg", upright=False), read_image(tmp_path / "turned.jpg")
    assert torch.equal(stored, upright.flip(1, 2))


def test_a_strip_is_cut_before_it_is_resized():
    strip = torch.zeros(3, 4, 60_000, dtype=torch.uint8)
    strip[..., 29_990:30_010] = 200
    crop = centre_crop(strip, 224, 256)
    assert crop.shape == (3, 224, 224) and crop.float().mean() > 150


def test_number_masks(tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    rgb = np.stack([numbers] * 3, -1)
    forms = {"grey.png": numbers, "rgb.png": rgb, "deep.png": numbers.astype(np.uint16)}
    for name, array in forms.items():
        Image.fromarray(array).save(tmp_path / name)
        assert np.array_equal(read_numbers(tmp_path / name), numbers), name
    picture().save(tmp_path / "colours.png")
    Image.fromarray(numbers.astype(np.float32)).save(tmp_path / "fractions.tif")
    for name, said in (("colours.png", "has colours"), ("fractions.tif", "fractions"), ("none.png", "not a")):
        with pytest.raises(BadImage, match=said):
            read_numbers(tmp_path / name)


def test_listing_many_names_takes_no_time(monkeypatch):
    """A million names, without a disk: seconds, where a search of a list for each would take hours."""
    folders = {f"/x/c{c:04d}": [f"{i:05d}.jpg" for i in range(200)] for c in range(1000)}
    monkeypatch.setattr(data, "walk", lambda root, left_out, only=None: (
        f"{folder}/{name}" for folder, names in folders.items() for name in names))
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    start = time.perf_counter()
    source = ImageFolder("/x")
    assert len(source) == 200_000 and len(source.classes) == 1000 and time.perf_counter() - start < 5
