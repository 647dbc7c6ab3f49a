"""Proves: every odd image is read right and every broken one is named; folders of any shape open; samplers
share out the same global batch for any number of ranks and go on in the middle of an epoch; nothing that is
evaluated on is trained on."""
import argparse
import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BadImage, EpochSampler, Files, Views, open_images, read_image, seed_of, train_loader


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
    source = Files(tmp_path)
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
    views = Views(Files(tmp_path), lambda image, g: {"x": image[0, 0, 0]}, seed=0)
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


def test_folders_flat_nested_labelled(tmp_path):
    make(tmp_path / "flat", "a.png", "b.jpg", ".hidden.png")
    make(tmp_path / "nested", "x/1.png", "y/deep/2.png", "3.png")
    make(tmp_path / "classes", "cat/1.png", "cat/more/2.png", "dog/3.png")
    flat, nested, classes = (Files(tmp_path / n) for n in ("flat", "nested", "classes"))
    assert (len(flat), flat.labels) == (2, None) and (len(nested), nested.labels) == (3, None)
    assert classes.classes == ["cat", "dog"] and classes.labels == [0, 0, 1]


def test_split_folders_are_found(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    for data_dir in (tmp_path, tmp_path / "train"):
        train, val = open_images(str(data_dir), "train"), open_images(str(data_dir), "val")
        assert [len(train), len(val)] == [2, 2] and "train" in train.name(0) and "val" in val.name(0)
    assert open_images(str(tmp_path / "val"), "val") is None


def test_wrong_paths_say_so(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_images(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        Files(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="1 other files"):
        Files(tmp_path / "empty")
    with pytest.raises(ValueError, match="--download"):
        open_images("cifar10", data_root=str(tmp_path))


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
    monkeypatch.setitem(data.NAMED, "cifar10", (Fake, *data.NAMED["cifar10"][1:]))
    source = open_images("cifar10", "val", str(tmp_path))
    assert (source.labels == [0, 1, 1] and source.read(0).shape == (3, 30, 40)
            and source.name(2) == "cifar10/val/2")


def test_labels_that_stand_beside_the_file_and_labels_that_are_unknown(tmp_path, monkeypatch):
    """torchvision's cars keep (file, label) pairs; STL-10 marks images without a label by -1."""
    class Fake:
        _samples = [("a.jpg", 1), ("b.jpg", -1), ("c.jpg", 0)]
        def __init__(self, root, split, download):
            pass
        def __len__(self):
            return 3
    monkeypatch.setitem(data.NAMED, "cars", (Fake, *data.NAMED["cars"][1:]))
    source = open_images("cars", "train", str(tmp_path))
    assert source.labels == [1, -1, 0] and data.labelled(source, "x").labels == [1, 0]


def test_seeds_are_stable():
    assert seed_of(0, "view", 1, 2) == seed_of(0, "view", 1, 2) != seed_of(0, "view", 12)
    assert 0 <= seed_of("x") < 2 ** 63


def test_ranks_share_the_same_global_batch(monkeypatch):
    def order(rank, ranks, batch_size, step=0):
        monkeypatch.setattr("distributed.rank", lambda: rank)
        monkeypatch.setattr("distributed.world_size", lambda: ranks)
        sampler = EpochSampler(50, batch_size, seed=1)
        sampler.set_epoch(3, step)
        items = [i for e, i in sampler if e == 3]
        assert len(items) == len(sampler)
        return torch.tensor(items).view(-1, batch_size)
    one, two = order(0, 1, 8), torch.cat([order(0, 2, 4), order(1, 2, 4)], 1)
    assert torch.equal(one, two) and len(set(one.flatten().tolist())) == 48
    assert torch.equal(order(0, 1, 8, step=2), one[2:])


def test_loader_refuses_less_than_a_batch():
    with pytest.raises(ValueError, match="lower --batch_size"):
        train_loader(Views(data.ToyImages("train", 10, 16), lambda image, g: {}, 0), 16, 0)


def test_images_to_test_on(tmp_path):
    def of(name, val_data):
        args = argparse.Namespace(data=name, val_data=val_data, data_root="data", download=False)
        found = data.open_val(args, seed=0)
        return found and (found.files if hasattr(found, "files") else found.name(0))
    for name in ("set/train/a/1.png", "set/val/a/2.png", "flat/a/3.png", "flat/train/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    sets, flat = str(tmp_path / "set"), str(tmp_path / "flat")
    assert of(sets, None) == of(flat, sets) == of(None, sets) == [f"{sets}/val/a/2.png"]
    assert of(sets, f"{sets}/train") == [f"{sets}/train/a/1.png"] and of(flat, None) is None
    assert of(sets, flat) == [f"{flat}/a/3.png", f"{flat}/train/4.png"]
    assert of(sets, "toy") == of("toy", None) == "toy/val/000000"
    with pytest.raises(ValueError, match="no such folder"):
        of(sets, str(tmp_path / "none"))


def digests(files):
    return {hashlib.sha256(open(f, "rb").read()).digest() for f in files}


def test_nothing_that_is_evaluated_on_is_trained_on(real_data):
    """By content: imagenette's val, COCO, VOC, imagewoof, DAVIS are not in imagenette/train."""
    train = open_images(real_data / "imagenette" / "train", "train")
    known = digests(train.files)
    assert len(known) == len(train) > 9000
    for name in ("imagenette/val", "coco", "VOCdevkit", "imagewoof", "DAVIS/JPEGImages"):
        other = Files(real_data / name)
        assert not known & digests(other.files), name


def test_toy_splits_share_no_scene():
    train, val = (open_images("toy", split, toy_n=300) for split in ("train", "val"))
    seen = [{source.read(i).numpy().tobytes() for i in range(300)} for source in (train, val)]
    assert len(seen[0]) == len(seen[1]) == 300 and not seen[0] & seen[1]
