"""Proves: k-NN equals scikit-learn's with the same weights and a plain loop, at any chunk size, with ties;
features are kept on disk under what they depend on; variance by hand; layers' picture and numbers."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

import probes
from data import BadImage, Part
from features import centre_crop, extract_features
from model import ViT
from probes import hybrid, knn_accuracy, knn_predict, top
from toy import ToyImages


def features(n, m, classes=5, dim=16):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(classes, dim, generator=g)
    y, t = (torch.randint(classes, (k,), generator=g) for k in (n, m))
    a, b = (F.normalize(means[c] + 2 * torch.randn(len(c), dim, generator=g), dim=-1) for c in (y, t))
    return a, y, b, t


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
    for chunk in (1, 7, 256):
        assert knn_predict(a, y, b, [20], chunk=chunk)[0].tolist() == plain


def test_k_above_the_number_of_images_uses_them_all():
    a, y, b, _ = features(30, 8)
    assert torch.equal(knn_predict(a, y, b, [30]), knn_predict(a, y, b, [100]))


def test_features_and_hybrid():
    images = ToyImages("val", 6, 32)
    vit = ViT(32, 8, 16, 1, 2).eval()
    f, labels = extract_features(vit, images, 32, torch.device("cpu"), batch_size=4)
    assert f["cls"].shape == f["pat"].shape == (6, 16) and labels.tolist() == images.labels
    assert torch.allclose(f["pat"].norm(dim=1), torch.ones(6)) and hybrid(f).shape == (6, 32)


def test_a_batch_of_unreadable_images_is_left_out():
    class Broken(ToyImages):
        def read(self, i):
            if i >= 4:
                raise BadImage(f"{i}")
            return super().read(i)
    vit = ViT(32, 8, 16, 1, 2).eval()
    f, labels = extract_features(vit, Broken("val", 6, 32), 32, torch.device("cpu"), batch_size=4)
    assert len(f["cls"]) == 4 and labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="none of the 2 images"):
        extract_features(vit, Part(Broken("val", 6, 32), [4, 5]), 32, torch.device("cpu"))


def test_centre_crop_is_centred_and_keeps_the_aspect():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    image[:, :, 140:160] = 255
    crop = centre_crop(image, 56, 64)
    assert crop.shape == (3, 56, 56)
    columns = crop[0].float().mean(0)
    assert (columns * torch.arange(56)).sum() / columns.sum() == pytest.approx(27.5, abs=0.6)
    assert centre_crop(torch.zeros(3, 1, 1, dtype=torch.uint8), 56, 64).shape == (3, 56, 56)


def test_the_largest_are_found_in_the_best_groups():
    g = torch.Generator().manual_seed(0)
    for n, k in ((64 * 50, 20), (64 * 3, 20), (64 * 41, 20), (64 * 200, 1)):
        sims = torch.randn(9, n, generator=g)
        value, index = top(sims, k)
        assert torch.equal(value, sims.topk(k, 1)[0]) and torch.equal(sims.gather(1, index), value)
    a, y, b, _ = features(5000, 40)                                    # no multiple of the group
    plain = torch.stack([F.one_hot(y[i], 5).mul((s[i] / 0.07).exp()[:, None]).sum(0).argmax()
                         for s in b @ a.T for i in [s.topk(20)[1]]])
    assert torch.equal(knn_predict(a, y, b, [20])[0], plain)


def test_ties_count_as_often_as_they_occur():
    """Every train image is there three times: k = 30 sees what k = 10 saw, each with three votes."""
    a, y, b, _ = features(3000, 60)
    once = knn_predict(a, y, b, [10])
    assert torch.equal(knn_predict(a.repeat(3, 1), y.repeat(3), b, [30], chunk=7), once)


def test_features_are_kept_under_what_they_depend_on(tmp_path, monkeypatch):
    images, vit = ToyImages("val", 6, 32), ViT(32, 8, 16, 2, 2).eval()
    first = extract_features(vit, images, 32, torch.device("cpu"), cache=str(tmp_path))[0]
    monkeypatch.setattr(ViT, "intermediate", None)                     # a second forward would raise
    again = extract_features(vit, images, 32, torch.device("cpu"), cache=str(tmp_path))[0]
    monkeypatch.undo()
    assert all(torch.equal(first[k], again[k]) for k in first) and len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight[0, 0] += 1
    extract_features(vit, images, 32, torch.device("cpu"), cache=str(tmp_path))
    extract_features(vit, images, 24, torch.device("cpu"), cache=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    both = extract_features(vit, images, 32, torch.device("cpu"), blocks=[1, 2])[0]
    last = extract_features(vit, images, 32, torch.device("cpu"))[0]
    assert len(both) == 2 and torch.allclose(both[1]["pat"], last["pat"], atol=1e-6)


def test_variance_by_hand():
    """A stub whose CLS is the mean of the image and whose patches are constant: the variance of the one is
    that of the numbers seen, of the other 0."""
    seen, images = [], ToyImages("val", 2, 64)

    def stub(x):
        seen.append(x.mean((1, 2, 3)))
        return torch.stack([seen[-1], 0 * seen[-1] + 1], 1), torch.ones(len(x), 4, 3)
    v = probes.variance_of(stub, images, 32, 2, 10, torch.device("cpu"))
    crops = [torch.cat(seen)[i:i + 10] for i in (0, 20)]
    assert v[0, 0].item() == pytest.approx(sum(c.var().item() / 2 for c in crops) / 2, rel=1e-5)
    assert v[1].tolist() == [0, 0] and v[0, 1] > 0
    noisy = torch.cat(seen)[10:20]                                     # the maskings are all different
    assert len(noisy.unique()) == 10
    again = probes.variance_of(stub, images, 32, 2, 10, torch.device("cpu"), batch=3)
    assert torch.allclose(v, again, rtol=1e-5)                         # batches do not matter


def test_layers_from_a_pretraining_checkpoint(tmp_path, capsys):
    from model import MMC
    vit = ViT(64, 8, 32, 2, 2)
    student = MMC(vit, hidden=32, out=8)
    torch.save({"arch": vit.config, "student": student.state_dict(), "teacher": student.state_dict()},
               tmp_path / "last.pth")
    argv = ["layers", "--data", "toy", "--size", "48", "--limit", "10", "--num_workers", "0", "--picture",
            str(tmp_path / "l.png"), "--ckpt"]
    monkey = probes.open_images
    probes.open_images = lambda data, split, *a: ToyImages(split, 40, 64)
    try:
        for ckpt in (str(tmp_path / "last.pth"), "random:vit_micro/8"):
            args = probes.get_parser().parse_args([*argv, ckpt])
            args.main(args)
    finally:
        probes.open_images = monkey
    said = capsys.readouterr().out
    assert said.count("block  1  k-NN CLS") == 2 and "prompt IoU" in said and "look at" in said
    assert "no picture of reconstructions" in said and (tmp_path / "l.png").is_file()
