"""Proves: AP and mAP by hand and against an independent form of the revisited protocol, the published layout
end to end, with unreadable images and queries without positives, and that a pickle cannot run anything."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import probes
import retrieval
from retrieval import average_precision, places, read_truth, scores, search
from run import Mistake
from toy import scene


def test_average_precision_by_hand():
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([1], 1) == pytest.approx((0 / 1 + 1 / 2) / 2)
    # ranks 0 and 3: (1 + 1) / 2 and (1/3 + 2/4) / 2, over two positives
    assert average_precision([0, 3], 2) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 2)
    assert average_precision([3, 0], 4) == pytest.approx((1 + (1 / 3 + 1 / 2) / 2) / 4)    # two not found


def test_junk_is_taken_out_of_the_ranking():
    order = np.array([5, 3, 9, 1, 7])
    assert places(order, [9, 7], [5, 1]).tolist() == [1, 2]
    assert places(order, [9, 7], []).tolist() == [2, 4]


def spelled_out(order, gnd, setup):
    """Walks down each list and integrates precision over recall."""
    rows = []
    for ranking, g in zip(order, gnd, strict=True):
        good = set(g["easy"]) | set(g["hard"]) if setup == "medium" else set(g["hard"])
        skip = set(g["junk"]) if setup == "medium" else set(g["junk"]) | set(g["easy"])
        if not good:
            continue
        seen, hits, area, precision, at = 0, 0, 0.0, 1.0, []
        for i in ranking:
            if i in skip:
                continue
            seen += 1
            if i in good:
                hits += 1
                area += ((hits - 1) / (seen - 1) if seen > 1 else 1.0) / 2 + hits / seen / 2
                at.append(seen)
            precision = hits / seen
        assert 0 <= precision <= 1
        tops = [min(max(at), k) for k in (1, 5, 10)]
        rows.append([area / len(good), *(sum(a <= k for a in at) / k for k in tops)])
    return 100 * np.mean(rows, 0)


def test_protocol_against_the_spelled_out_form():
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(60) for _ in range(12)])
    gnd = []
    for q in range(12):
        mixed, cut = rng.permutation(60), np.sort(rng.integers(0, 30, 3))
        easy, hard, junk = mixed[:cut[0]], mixed[cut[0]:cut[1]], mixed[cut[1]:cut[2]]
        gnd.append({"easy": easy if q else [], "hard": hard if q else [], "junk": junk})   # one without any
    for setup in ("medium", "hard"):
        got = scores(order, gnd, setup)
        assert [got[k] for k in ("map", "mp@1", "mp@5", "mp@10")] == pytest.approx(
            list(spelled_out(order, gnd, setup)), abs=1e-9)
        assert got["queries"] <= 11


def test_search():
    q, d = torch.randn(7, 5), torch.randn(30, 5)
    assert np.array_equal(search(q, d), (q @ d.T).argsort(1, descending=True).numpy())
    d[3:6] = d[2]                                                      # equals stay in the database's order
    ranks = {i: place for place, i in enumerate(search(q, d)[0].tolist())}
    assert ranks[3] - ranks[2] == ranks[4] - ranks[3] == ranks[5] - ranks[4] == 1


@pytest.fixture
def world(tmp_path):
    """30 images and 4 queries in the published layout; queries are copies of images with a box."""
    names = [f"all_souls_{i:06d}" for i in range(30)]
    (tmp_path / "jpg").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(scene(i, size=64).image).save(tmp_path / "jpg" / f"{name}.jpg", quality=95)
    gnd = [{"bbx": [0.0, 0.0, 64.0, 64.0], "easy": np.array([i]), "hard": np.array([i + 10, i + 20]),
            "junk": np.array([i + 1])} for i in range(4)]
    truth = {"imlist": names, "qimlist": names[:4], "gnd": gnd}
    write_truth(tmp_path, truth)
    return tmp_path


def write_truth(root, truth, protocol=2):
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=protocol))


def rows_of(world):
    return [json.loads(line) for line in (world / "r.jsonl").read_text().splitlines()]


def run(world, *more):
    argv = ["retrieval", "--ckpt", "random:vit_micro/8", "--data", str(world), "--imsize", "64", *more]
    probes.main(probes.get_args(argv))


@pytest.mark.slow
def test_published_layout_end_to_end(world, capsys):
    run(world, "--json", str(world / "r.jsonl"), "--picture", str(world / "p.png"))
    said = capsys.readouterr().out
    (row,) = rows_of(world)
    assert "medium  mAP" in said and "4 queries, 30 images" in said and (world / "p.png").is_file()
    assert "query_crop True" in said and "(4 of 4 queries)" in said
    metrics = row["metrics"]                                           # each query finds itself first
    assert metrics["medium"]["mp@1"] == 100 and metrics["hard"]["map"] < 100
    assert metrics["medium"]["queries"] == 4 and metrics["n_unreadable"] == 0
    run(world, "--multi_scale", "--no-query_crop", "--head", "pat")


@pytest.mark.slow
def test_several_checkpoints(world):
    run(world, "--ckpt", "random:vit_micro/8", "random:vit_t/16", "--json", str(world / "r.jsonl"))
    assert [row["ckpt"] for row in rows_of(world)] == ["random:vit_micro/8", "random:vit_t/16"]
    with pytest.raises(Mistake, match="no such checkpoint"):           # before any work
        run(world, "--ckpt", "random:vit_micro/8", "nowhere.pth", "--json", str(world / "r.jsonl"))
    assert len(rows_of(world)) == 2


def test_every_pickle_of_numpy(world):
    """Protocol 5 builds arrays in another way than those before; numpy's numbers; names of numpy 1 and 2."""
    truth = read_truth(world / "gnd_roxford5k.pkl")
    truth["gnd"][0] |= {"bbx": np.array([0, 0, 64, 64.0]), "easy": [np.int64(0)], "junk": np.array([], int)}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        write_truth(world, truth, protocol)
        content = (world / "gnd_roxford5k.pkl").read_bytes()
        read = read_truth(world / "gnd_roxford5k.pkl")
        assert [g["hard"].tolist() for g in read["gnd"]] == [[i + 10, i + 20] for i in range(4)]
        if protocol == 3:                                              # others write lengths before names
            other = content.replace(b"numpy._core", b"numpy.core")
            (world / "gnd_roxford5k.pkl").write_bytes(other)
            assert read_truth(world / "gnd_roxford5k.pkl")["gnd"][0]["easy"] == [0]


def test_queries_without_positives_are_counted(world, capsys):
    truth = read_truth(world / "gnd_roxford5k.pkl")
    truth["gnd"][1] |= {"easy": np.array([], int), "hard": []}
    truth["gnd"][2] |= {"hard": np.array([])}
    write_truth(world, truth)
    run(world, "--json", str(world / "r.jsonl"))
    said = capsys.readouterr().out
    assert "(3 of 4 queries; 1 without a positive are left out)" in said
    assert "(2 of 4 queries; 2 without a positive are left out)" in said
    assert [rows_of(world)[0]["metrics"][setup]["queries"] for setup in ("medium", "hard")] == [3, 2]


def test_unreadable_images_are_as_if_they_were_not_there(world, capsys):
    """A positive that cannot be read is no positive: the scores equal those of a set without it."""
    run(world, "--json", str(world / "r.jsonl"))
    broken = world / "jpg" / "all_souls_000010.jpg"                    # hard for query 0
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    with pytest.raises(Mistake, match="1 of 34 images cannot be read, more than --max_bad 0.01.*000010.jpg"):
        run(world)
    run(world, "--max_bad", "0.1", "--json", str(world / "r.jsonl"))
    assert "left out: 1 unreadable images" in capsys.readouterr().out

    broken.write_bytes(content)
    truth = read_truth(world / "gnd_roxford5k.pkl")
    truth["imlist"].remove("all_souls_000010")
    for i, known in enumerate(truth["gnd"]):
        known |= {"hard": np.array([i + 9, i + 19] if i else [19])}
    write_truth(world, truth)
    run(world, "--json", str(world / "r.jsonl"))
    whole, unreadable, without = rows_of(world)
    assert unreadable["metrics"]["n_unreadable"] == 1
    assert "000010.jpg" in unreadable["metrics"]["unreadable"][0]
    for setup in ("medium", "hard"):
        assert unreadable["metrics"][setup] == without["metrics"][setup] != whole["metrics"][setup]


def test_boxes_describe_stored_pixels(world):
    """An EXIF tag that turns a photo does not move the box, and the photo is the same to the network."""
    photo = np.zeros((40, 64, 3), np.uint8)
    photo[:20, :32] = 220
    exif = Image.Exif()
    exif[0x112] = 3
    path = world / "jpg" / "all_souls_000000.jpg"
    truth = read_truth(world / "gnd_roxford5k.pkl")
    truth["gnd"][0] |= {"bbx": [0, 0, 32, 20]}
    write_truth(world, truth)
    Image.fromarray(photo).save(path, exif=exif, quality=95)
    images = retrieval.Revisited(str(world))
    assert images.read(30, crop=True).shape == (3, 20, 32) and (images.read(30, crop=True) > 200).all()
    assert torch.equal(images.read(30, crop=False), images.read(0, crop=True))


def test_a_pickle_cannot_run_anything(world):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {world}/ran",)
    (world / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": Evil()}))
    with pytest.raises(Mistake, match="system, which is refused"):
        run(world)
    assert not (world / "ran").exists()


def test_bad_input_is_named(world):
    truth = read_truth(world / "gnd_roxford5k.pkl")
    for change, said in (({"gnd": [g | {"hard": [99]} for g in truth["gnd"]]}, "index 99 of 30"),
                         ({"gnd": [g | {"bbx": [1]} for g in truth["gnd"]]}, "box of 1"),
                         ({"gnd": truth["gnd"][:2]}, "not a ground truth"),
                         ({"imlist": [*truth["imlist"], "lost"]}, "1 of 35 images are missing")):
        (world / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth | change))
        with pytest.raises(Mistake, match=said):
            run(world)
    (world / "gnd_roxford5k.pkl").write_bytes(b"no pickle")
    with pytest.raises(Mistake, match="not a ground truth"):
        run(world)
    (world / "gnd_roxford5k.pkl").unlink()
    with pytest.raises(Mistake, match="expected DIR/jpg"):
        run(world)


def test_query_box_is_cut_and_never_empty():
    image = torch.arange(48).view(1, 6, 8).expand(3, -1, -1).byte()
    assert torch.equal(retrieval.cropped(image, [2.0, 1.0, 5.0, 4.0]), image[:, 1:4, 2:5])
    assert torch.equal(retrieval.cropped(image, [7.0, 1.0, 7.0, 4.0]), image)
