"""Proves: k-NN equals scikit-learn's with the same weights and a plain loop, at any chunk size."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from model import ViT
from probes import centre_crop, extract_features, hybrid, knn_accuracy, knn_predict
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


def test_centre_crop_is_centred_and_keeps_the_aspect():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    image[:, :, 140:160] = 255
    crop = centre_crop(image, 56, 64)
    assert crop.shape == (3, 56, 56)
    columns = crop[0].float().mean(0)
    assert (columns * torch.arange(56)).sum() / columns.sum() == pytest.approx(27.5, abs=0.6)
    assert centre_crop(torch.zeros(3, 1, 1, dtype=torch.uint8), 56, 64).shape == (3, 56, 56)
