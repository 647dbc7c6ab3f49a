"""Proves: AP and mAP by hand and against an independent form of the revisited protocol, the published layout
end to end, and that a pickle cannot run anything."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import probes
import retrieval
from retrieval import average_precision, evaluate, places, read_truth, search
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
        got = evaluate(order, gnd, setup)
        assert [got[k] for k in ("map", "mp@1", "mp@5", "mp@10")] == pytest.approx(
            list(spelled_out(order, gnd, setup)), abs=1e-9)
        assert got["queries"] <= 11


def test_search_in_chunks():
    q, d = torch.randn(7, 5), torch.randn(30, 5)
    assert np.array_equal(search(q, d, 2), (q @ d.T).argsort(1, descending=True).numpy())


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
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return tmp_path


def run(world, *more):
    argv = ["retrieval", "--ckpt", "random:vit_micro/8", "--data", str(world), "--imsize", "64", *more]
    args = probes.get_parser().parse_args(argv)
    args.main(args)


def test_published_layout_end_to_end(world, capsys):
    run(world, "--json", str(world / "r.jsonl"), "--picture", str(world / "p.png"))
    said, row = capsys.readouterr().out, json.loads((world / "r.jsonl").read_text())
    assert "medium  mAP" in said and "4 queries, cropped" in said and (world / "p.png").is_file()
    assert row["medium"]["mp@1"] == 100 and row["hard"]["map"] < 100   # each query finds itself first
    run(world, "--multi_scale", "--no-query_crop", "--head", "pat")


def test_a_pickle_cannot_run_anything(world):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {world}/ran",)
    (world / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": Evil()}))
    with pytest.raises(ValueError, match="system, which is refused"):
        run(world)
    assert not (world / "ran").exists()


def test_bad_input_is_named(world):
    truth = read_truth(world / "gnd_roxford5k.pkl")
    for change, said in (({"gnd": [g | {"hard": [99]} for g in truth["gnd"]]}, "index 99 of 30"),
                         ({"gnd": [g | {"bbx": [1]} for g in truth["gnd"]]}, "box of 1"),
                         ({"gnd": truth["gnd"][:2]}, "not a ground truth"),
                         ({"imlist": [*truth["imlist"], "lost"]}, "1 of 35 images are missing")):
        (world / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth | change))
        with pytest.raises(ValueError, match=said):
            run(world)
    (world / "gnd_roxford5k.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="not a ground truth"):
        run(world)
    (world / "gnd_roxford5k.pkl").unlink()
    with pytest.raises(ValueError, match="expected DIR/jpg"):
        run(world)


def test_query_box_is_cut_and_never_empty():
    image = torch.arange(48).view(1, 6, 8).expand(3, -1, -1).byte()
    assert torch.equal(retrieval.cropped(image, [2.0, 1.0, 5.0, 4.0]), image[:, 1:4, 2:5])
    assert torch.equal(retrieval.cropped(image, [7.0, 1.0, 7.0, 4.0]), image)
