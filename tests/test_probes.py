"""Proves: k-NN equals scikit-learn's with the same weights, a plain loop and its plain form, at any chunk
size and temperature, with ties; images that cannot be read are counted and named; few-shot equals
scikit-learn and leaves out small classes; variance by hand; layers' picture and numbers; the command line
says what it evaluates, and loads no more than that."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_forms import plain_knn
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import data
import probes
from data import Subset, ToyImages
from images import BadImage, Unreadable, centre_crop
from knn import draw_episodes, extract_features, few_shot, hybrid, knn_accuracy, knn_of, knn_predict, largest
from model import MMC, ViT
from run import Mistake
from studies import layouts

CPU = torch.device("cpu")


def features(n, m, classes=5, dim=16):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=g)
    y, t = (torch.randint(classes, (k,), generator=g) for k in (n, m))
    a, b = (F.normalize(means[c] + 2 * torch.randn(len(c), dim, generator=g), dim=-1) for c in (y, t))
    return a, y, b, t


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Broken(ToyImages):
    """A source whose images from the fifth on cannot be read."""

    def read(self, i):
        if i >= 4:
            raise BadImage(f"{i}")
        return super().read(i)


def write(folder, n, n_val):
    """Scenes of 32 pixels in class folders, in folder/train and folder/val."""
    words = ["--out", folder, "--layout", "folder", "--n", n, "--n_val", n_val, "--size", 32]
    layouts.main(layouts.get_args([str(w) for w in words]))


def run_probe(*words):
    probes.main(probes.get_args([str(w) for w in words]))


# ------------------------------------------------- k-NN
def test_knn_equals_scikit_learn():
    a, y, b, t = features(400, 150)
    for k in (1, 10, 50):
        oracle = KNeighborsClassifier(
            k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
        ).fit(a, y)
        assert (knn_predict(a, y, b, [k])[0].numpy() == oracle.predict(b)).all()
        assert knn_accuracy(a, y, b, t, [k])[k] == pytest.approx(100 * oracle.score(b, t), abs=1e-4)


def test_knn_equals_a_plain_loop_at_any_chunk():
    a, y, b, _ = features(120, 37)
    plain = []
    for q in b:
        s = a @ q
        best = s.argsort(descending=True)[:20]
        votes = [sum((s[i] / 0.07).exp().item() for i in best if y[i] == c) for c in range(5)]
        plain.append(int(np.argmax(votes)))
    assert plain_knn(a, y, b, 20).tolist() == plain
    for chunk in (1, 7, 256):
        assert knn_predict(a, y, b, [20], chunk=chunk)[0].tolist() == plain


@pytest.mark.parametrize("temp", [10.0, 0.07, 0.01, 1e-3, 1e-6])
def test_knn_is_right_at_any_temperature(temp):
    """Against votes in float64, whose exponents do not overflow once the maximum is taken away."""
    a, y, b, _ = features(300, 80)
    s, index = (b @ a.T).double().topk(20, dim=1)
    votes = torch.zeros(80, 5, dtype=torch.float64)
    votes.scatter_add_(1, y[index], ((s - s[:, :1]) / temp).exp())
    assert torch.equal(knn_predict(a, y, b, [20], temp)[0], votes.argmax(1))
    if temp == 1e-6:
        assert torch.equal(knn_predict(a, y, b, [20], temp), knn_predict(a, y, b, [1], temp))


def test_k_above_the_number_of_images_uses_them_all():
    a, y, b, _ = features(30, 8)
    assert torch.equal(knn_predict(a, y, b, [30]), knn_predict(a, y, b, [100]))


def test_the_largest_are_found_in_the_best_groups():
    g = torch.Generator().manual_seed(0)
    for n, k in ((64 * 50, 20), (64 * 3, 20), (64 * 41, 20), (64 * 200, 1)):
        sims = torch.randn(9, n, generator=g)
        value, index = largest(sims, k)
        assert torch.equal(value, sims.topk(k, 1)[0]) and torch.equal(sims.gather(1, index), value)
    a, y, b, _ = features(5000, 40)                                    # no multiple of the group
    assert torch.equal(knn_predict(a, y, b, [20])[0], plain_knn(a, y, b, 20))


def test_ties_count_as_often_as_they_occur():
    """Every train image is there three times: k = 30 sees what k = 10 saw, each with three votes."""
    a, y, b, _ = features(3000, 60)
    once = knn_predict(a, y, b, [10])
    assert torch.equal(knn_predict(a.repeat(3, 1), y.repeat(3), b, [30], chunk=7), once)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_knn_is_the_same_on_cuda():
    a, y, b, _ = features(5000, 400)
    assert torch.equal(knn_predict(a.cuda(), y, b), knn_predict(a, y, b))


# ------------------------------------------------- features
def test_features_and_hybrid():
    images = ToyImages("val", 6, 32)
    vit = ViT(32, 8, 16, 1, 2).eval()
    [f], labels = extract_features(vit, images, 32, CPU, batch_size=4)
    assert f["cls"].shape == f["pat"].shape == (6, 16) and labels.tolist() == images.labels
    assert torch.allclose(f["pat"].norm(dim=1), torch.ones(6)) and hybrid(f).shape == (6, 32)


def test_blocks_are_what_the_last_block_is():
    images = ToyImages("val", 6, 32)
    vit = ViT(32, 8, 16, 2, 2).eval()
    both, _ = extract_features(vit, images, 32, CPU, blocks=[1, 2])
    [last], _ = extract_features(vit, images, 32, CPU, batch_size=2, workers=2)
    assert len(both) == 2 and torch.allclose(both[1]["pat"], last["pat"], atol=1e-6)
    assert not torch.allclose(both[0]["pat"], last["pat"], atol=1e-2)


def test_a_batch_of_unreadable_images_is_left_out_and_counted(capsys):
    vit = ViT(32, 8, 16, 1, 2).eval()
    images = Broken("val", 6, 32)
    count = Unreadable(6, max_bad=0.5)
    [f], labels = extract_features(vit, images, 32, CPU, batch_size=4, unreadable=count)
    assert len(f["cls"]) == 4 and labels.tolist() == [0, 1, 2, 3]
    assert count.names == ["toy/val/000004", "toy/val/000005"]
    with pytest.raises(Mistake, match="none of the 2 images"):
        extract_features(vit, Subset(images, [4, 5]), 32, CPU)
    with pytest.raises(Mistake, match="2 of 6 images cannot be read, more than --max_bad 0.2"):
        extract_features(vit, images, 32, CPU, unreadable=Unreadable(6, max_bad=0.2))
    accuracy = knn_of(vit, ToyImages("val", 6, 32), images, 32, CPU, [1])
    assert accuracy["cls"][1] == 100                                   # of the four that are read
    assert "left out: 2 unreadable images: toy/val/000004, toy/val/000005" in capsys.readouterr().out


def test_centre_crop_is_centred_and_keeps_the_aspect():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    image[:, :, 140:160] = 255
    crop = centre_crop(image, 56, 64)
    assert crop.shape == (3, 56, 56)
    columns = crop[0].float().mean(0)
    assert (columns * torch.arange(56)).sum() / columns.sum() == pytest.approx(27.5, abs=0.6)
    assert centre_crop(torch.zeros(3, 1, 1, dtype=torch.uint8), 56, 64).shape == (3, 56, 56)


# ------------------------------------------------- few-shot
def test_few_shot_equals_scikit_learn():
    labels = torch.arange(200) % 8
    z = F.normalize(unit(8, 12)[labels] + unit(200, 12, seed=1), dim=-1)
    episodes = draw_episodes(labels, 20)
    assert episodes.shape == (20, 5, 16)
    own = labels[episodes]
    assert (own == own[:, :, :1]).all() and all(len(set(e)) == 5 for e in own[:, :, 0].tolist())
    assert all(len(set(e)) == 80 for e in episodes.flatten(1).tolist())
    got, right, yes, same = few_shot(z, episodes), [], [], []
    for e in episodes:
        nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(z[e[:, 0]], labels[e[:, 0]])
        right.append(nearest.score(z[e[:, 1:].flatten()], labels[e[:, 1:].flatten()]))
        yes.append((z[e[:, 1:].flatten()] @ z[e[:, 0]].T).flatten())
        same.append((labels[e[:, 1:].flatten()][:, None] == labels[e[:, 0]]).flatten())
    assert got["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4) and got["accuracy"] > 40
    for t, f1 in got["f1"].items():
        assert f1 == pytest.approx(100 * f1_score(torch.cat(same), torch.cat(yes) >= float(t)), abs=0.05)
    same_for_all = few_shot(unit(1, 12).expand(200, -1), episodes)
    assert list(same_for_all["f1"].values()) == pytest.approx([100 / 3] * 9)  # always yes
    with pytest.raises(Mistake, match="need 5 classes of 16 images: here are 4 classes, 1"):
        draw_episodes(torch.tensor([0] * 20 + [1] * 20 + [2] * 20 + [3] * 15))


def test_few_shot_leaves_out_a_class_that_is_too_small():
    """The episodes are those without the class."""
    large = torch.arange(100) % 5
    small = torch.cat([large, torch.full((15,), 5)])
    assert torch.equal(draw_episodes(small, 30), draw_episodes(large, 30))


@pytest.mark.slow
def test_few_shot_reads_class_folders_and_mini_imagenet(tmp_path, capsys):
    write(tmp_path / "f", 0, 160)
    (tmp_path / "mini/images").mkdir(parents=True)
    lines = ["filename,label"]
    for path in sorted((tmp_path / "f/val").rglob("*.png")):
        (tmp_path / "mini/images" / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
        lines.append(f"{path.parent.name}_{path.name},{path.parent.name}")
    (tmp_path / "mini/test.csv").write_text("\n".join(lines) + "\n")
    options = ["fewshot", "--ckpt", "random:vit_micro/8", "--size", 32, "--num_workers", 0, "--data"]
    results = []
    for folder in ("f", "f/val", "mini"):
        run_probe(*options, tmp_path / folder, "--json", tmp_path / "o.jsonl")
        results.append(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])["metrics"])
    assert results[0]["accuracy"] == results[1]["accuracy"] == pytest.approx(results[2]["accuracy"], abs=1e-6)
    assert 19 < results[0]["accuracy"] < 30 and results[0]["f1_best"] > 33
    assert "160 images of 10 classes, 0 unreadable" in capsys.readouterr().out
    with pytest.raises(Mistake, match="no class folders"):
        run_probe(*options, tmp_path / "mini/images")

    small = sorted((tmp_path / "f/val").iterdir())[3]
    for path in sorted(small.iterdir())[:2]:
        path.unlink()
    next(iter(sorted(small.iterdir()))).write_text("not a picture")
    with pytest.raises(Mistake, match="1 of 158 images cannot be read, more than --max_bad 0"):
        run_probe(*options, tmp_path / "f", "--max_bad", 0)
    run_probe(*options, tmp_path / "f", "--json", tmp_path / "o.jsonl")
    said = capsys.readouterr().out
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])
    assert f"left out, as they have fewer than 16 images: {small.name}" in said
    assert line["protocol"]["classes_left_out"] == [small.name]
    assert line["metrics"]["n_unreadable"] == 1 and line["metrics"]["unreadable"][0].startswith(str(small))


# ------------------------------------------------- variance
def test_variance_by_hand():
    """A stub whose CLS is the mean of the image and whose patches are constant: the variance of the one is
    that of the numbers seen, of the other 0."""
    seen, images = [], ToyImages("val", 2, 64)

    def stub(x):
        seen.append(x.mean((1, 2, 3)))
        return torch.stack([seen[-1], 0 * seen[-1] + 1], 1), torch.ones(len(x), 4, 3)
    v = probes.variance_of(stub, images, 32, 2, 10, CPU)
    crops = [torch.cat(seen)[i:i + 10] for i in (0, 20)]
    assert v["crops"] == pytest.approx(sum(c.var().item() / 2 for c in crops) / 2, rel=1e-5)
    assert v["masks"] == v["masks_normalised"] == 0 and v["crops_normalised"] > 0
    noisy = torch.cat(seen)[10:20]                                     # the maskings are all different
    assert len(noisy.unique()) == 10
    again = probes.variance_of(stub, images, 32, 2, 10, CPU, batch=3)
    assert list(v.values()) == pytest.approx(list(again.values()), rel=1e-5)      # batches do not matter


def test_variance_counts_what_it_cannot_read():
    def stub(x):
        return x.mean((2, 3)), x.flatten(2)
    count = Unreadable(6, max_bad=0.5)
    v = probes.variance_of(stub, Broken("val", 6, 32), 32, 6, 4, CPU, unreadable=count)
    assert v["crops"] > 0 and len(count.names) == 2
    with pytest.raises(Mistake, match="none of the images can be read"):
        probes.variance_of(stub, Subset(Broken("val", 6, 32), [5]), 32, 1, 4, CPU)


# ------------------------------------------------- layers
@pytest.mark.slow
def test_layers_from_a_pretraining_checkpoint(tmp_path, capsys, monkeypatch):
    vit = ViT(64, 8, 32, 2, 2)
    student = MMC(vit, hidden=32, out=8)
    arch = vit.config | {"fixed_pos": False}                           # as our first files have it
    torch.save({"arch": arch, "student": student.state_dict(), "teacher": student.state_dict()},
               tmp_path / "last.pth")
    monkeypatch.setattr(data, "ToyImages", lambda split, seed=0: ToyImages(split, 40, 64, seed))
    options = ["layers", "--data", "toy", "--size", 48, "--limit", 10, "--num_workers", 0]
    run_probe(*options, "--picture", tmp_path / "l.png", "--json", tmp_path / "o.jsonl",
              "--ckpt", tmp_path / "last.pth", "random:vit_micro/8")
    said = capsys.readouterr().out
    assert said.count("block  1  k-NN CLS") == 2 and "prompt IoU" in said and "look at" in said
    assert "no picture of reconstructions" in said and (tmp_path / "l_1.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [len(line["metrics"]["prompt_iou"]) for line in lines] == [2, 4]
    with pytest.raises(Mistake, match="--blocks 3: expected 1 to 2"):
        run_probe(*options, "--blocks", 3, "--ckpt", tmp_path / "last.pth")


def test_layers_picture_needs_two_images():
    student = MMC(ViT(32, 8, 16, 2, 2), pat=False, cls=False, hidden=16)
    assert probes.layers_picture(student, Broken("val", 6, 32), 32, [1, 2]).width > 100
    assert probes.layers_picture(student, Subset(Broken("val", 6, 32), [0, 5]), 32, [2]) is None


# ------------------------------------------------- command line
@pytest.fixture
def folder(tmp_path) -> Path:
    """20 and 10 images in class folders, two classes."""
    for split, n in (("train", 100), ("val", 50)):
        write(tmp_path / "all" / split, 0, n)
        for c in sorted((tmp_path / "all" / split / "val").iterdir())[:2]:
            shutil.copytree(c, tmp_path / "d" / split / c.name)
    return tmp_path / "d"


def test_knn_says_what_it_evaluates(folder, tmp_path, capsys):
    options = ["knn", "--size", 32, "--num_workers", 0, "--nb_knn", 1, 5, "--data", folder]
    run_probe(*options, "--ckpt", "random:vit_micro/8", "random:vit_micro/16", "--json", tmp_path / "o.jsonl")
    said = capsys.readouterr().out
    assert "train: 20 images, 2 classes" in said and "test: 10 images, 2 classes" in said
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["ckpt"] for line in lines] == ["random:vit_micro/8", "random:vit_micro/16"]
    assert lines[0]["weights"] != lines[1]["weights"] and lines[0]["protocol"]["temp"] == 0.07
    assert set(lines[0]["metrics"]["hybrid"]) == {"1", "5"} and said.count("HYBRID  k=1") == 2
    cls = lines[0]["metrics"]["cls"]["5"]

    one = next((folder / "val").rglob("*.png"))
    picture = one.read_bytes()
    one.write_text("not a picture")
    with pytest.raises(Mistake, match="1 of 30 images cannot be read, more than --max_bad 0.01"):
        run_probe(*options, "--ckpt", "random:vit_micro/8")
    run_probe(*options, "--ckpt", "random:vit_micro/8", "--max_bad", 0.1, "--json", tmp_path / "o.jsonl")
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])["metrics"]
    assert line["n_unreadable"] == 1 and line["unreadable"] == [str(one)]
    assert f"left out: 1 unreadable images: {one}" in capsys.readouterr().out

    one.write_bytes(picture)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "x.png").write_bytes(picture)
    (folder / "train" / "overview.png").write_bytes(picture)
    run_probe(*options, "--ckpt", "random:vit_micro/8", "--json", tmp_path / "o.jsonl")
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])["metrics"]
    assert line["cls"]["5"] == cls
    assert "train: 20 images, 2 classes; left out: 1 hidden, 1 images beside" in capsys.readouterr().out


def test_a_val_split_may_lack_classes_and_says_why_it_has_none(folder, tmp_path, capsys):
    write(tmp_path / "three", 30, 0)
    for c in sorted((tmp_path / "three" / "train").iterdir())[2:3]:
        shutil.copytree(c, folder / "train" / c.name)                  # a third class
    options = ["knn", "--size", 32, "--nb_knn", 1, "--num_workers", 0, "--ckpt", "random:vit_micro/8"]
    options.append("--data")
    run_probe(*options, folder, "--json", tmp_path / "o.jsonl")
    line = json.loads((tmp_path / "o.jsonl").read_text())["metrics"]
    assert "test: 10 images, 2 classes" in capsys.readouterr().out and line["cls"]["1"] > 0
    with pytest.raises(Mistake, match="train has no"):
        run_probe(*options, folder / "val", "--val_data", folder / "train")
    with pytest.raises(Mistake, match="no test images: .* --val_data"):
        run_probe(*options, folder / "val")
    for path in list((folder / "val").rglob("*.png")):
        path.rename(folder / "val" / f"{path.parent.name}_{path.name}")
    with pytest.raises(Mistake, match=r"test images: labels are needed, but 10 images, no labels \(no class"):
        run_probe(*options, folder)


@pytest.mark.parametrize("words, match", [
    ("--temp 0", "--temp: '0'.*more than 0"),
    ("--temp -1", "--temp: '-1'.*more than 0"),
    ("--nb_knn 0", "--nb_knn.*1 or more"),
    ("--size 60", "--size 60 is not a multiple of the patch size 8 of the network: try 56"),
    ("--ckpt nowhere.pth", "nowhere.pth"),
    ("--data nowhere", "nowhere"),
])
def test_a_users_mistake_is_named(words, match):
    with pytest.raises(Mistake, match=match):
        run_probe("knn", "--ckpt", "random:vit_micro/8", "--data", "toy", *words.split())


@pytest.mark.slow
def test_a_probe_loads_what_it_needs():
    code = """import sys, probes
probes.get_args(["knn", "--ckpt", "x", "--data", "y"])
print({"linseg", "retrieval", "zeroshot", "scenes", "davis", "torchvision", "scipy"} & set(sys.modules))"""
    root = Path(probes.__file__).parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stdout + found.stderr
