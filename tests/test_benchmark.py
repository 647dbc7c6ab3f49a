"""Proves: one command measures all that it has data for, with the scripts' own numbers; an interrupted run
that goes on gives the same report as an unbroken one, whatever the number of ranks; a checkpoint that cannot
be measured costs its own cells and the report says why, while a bug keeps its traceback; the tables hold the
mean and spread over the seeds, the best in bold, the paper's rows; the page is one file."""
import argparse
import json
import re

import pytest
import torch

import benchmark
import checkpoint
import report
import run
import zeroshot
from run import Mistake
from studies import layouts

CKPTS = ["random:vit_micro/8", "random:vit_micro/16"]
EVALS = {"zeroshot": 2, "knn": 1, "fewshot": 1, "variance": 1, "davis": 1, "linseg": 2}       # sets of images


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """Whoever commits while the tests run does not change the lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "commit", lambda: "abc1234")
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy world in the layouts of COCO, VOC, DAVIS and class folders."""
    root = tmp_path_factory.mktemp("toy")
    numbers = {"coco": (8, 4), "voc": (8, 4), "davis": (0, 1), "folder": (40, 160)}
    for layout, (n, n_val) in numbers.items():
        layouts.main(layouts.get_args(["--out", f"{root}/{layout}", "--layout", layout, "--n", str(n),
                                       "--n_val", str(n_val), "--size", "32"]))
    return root


def command(toy, out, *more, ckpts=CKPTS):
    return benchmark.get_args([
        "--ckpt", *map(str, ckpts), "--out", str(out), "--quick", "--size", "64", "--crop_size", "32",
        "--coco", f"{toy}/coco", "--voc", f"{toy}/voc", "--davis", f"{toy}/davis",
        "--imagenette", f"{toy}/folder", "--also", "linseg", "--crop 32 --iters 3",
        "--also", "variance", "--limit 2 --views 3", "--num_workers", "0", "--device", "cpu", *more])


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    benchmark.main(command(toy, out))
    return out


def lines_of(out):
    return run.read_lines(out / "results.jsonl")


@pytest.mark.slow
def test_everything_is_measured_once(unbroken):
    found = [line["eval"] for line in lines_of(unbroken)]
    assert {name: found.count(name) for name in EVALS} == {name: 2 * n for name, n in EVALS.items()}
    keys = {tuple(line) for line in lines_of(unbroken)}
    assert len(keys) == 1, "all lines have the same keys"
    text = (unbroken / "report.md").read_text()
    assert "needs --ade20k" in text and "needs --coco" not in text
    assert text.count("toy-val-000") >= 2 and text.count("pictures/prompt_cat") == 2


@pytest.mark.slow
def test_killed_twice_and_resumed_gives_the_same_report(toy, unbroken, tmp_path, monkeypatch):
    record = run.record
    done = []

    def killed(*args, **line):
        if len(done) in (4, 9):
            done.append("killed")
            raise KeyboardInterrupt
        done.append("measured")
        record(*args, **line)

    monkeypatch.setattr(run, "record", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(command(toy, tmp_path))
        with open(tmp_path / "results.jsonl", "a") as f:
            f.write('{"eval": "zeroshot", "ckpt"')             # half a line
    benchmark.main(command(toy, tmp_path))
    assert done.count("measured") == len(lines_of(unbroken)), "nothing was measured twice"
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_text() == (unbroken / name).read_text()
    benchmark.main(command(toy, tmp_path))
    assert done.count("measured") == len(lines_of(unbroken)), "a finished run measures nothing"
    lost = next(tmp_path.glob("pictures/similarity_*"))
    lost.unlink()                                              # killed between a line and its picture
    benchmark.main(command(toy, tmp_path))
    assert lost.exists() and (tmp_path / "report.md").read_text() == (unbroken / "report.md").read_text()


@pytest.mark.slow
def test_ranks_share_out_the_measurements(toy, unbroken, tmp_path, monkeypatch):
    for rank in "10":                                          # one after the other, as they do not meet
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        benchmark.main(command(toy, tmp_path))
    assert len(lines_of(tmp_path)) == len(lines_of(unbroken))
    assert (tmp_path / "report.md").read_text() == (unbroken / "report.md").read_text()


@pytest.mark.slow
def test_numbers_are_those_of_the_script(toy, unbroken, tmp_path):
    zeroshot.main(zeroshot.get_args([
        "--ckpt", *CKPTS, "--coco", f"{toy}/coco", "--limit", "20", "--size", "64", "--num_workers", "0",
        "--device", "cpu", "--json", str(tmp_path / "own.jsonl")]))
    ours = [line for line in lines_of(unbroken) if line["data"] == "COCO val2017"]
    for line, own in zip(ours, run.read_lines(tmp_path / "own.jsonl"), strict=True):
        for volatile in ("seconds", "date"):
            line.pop(volatile)
            own.pop(volatile)
        line["metrics"].pop("images_per_s")
        own["metrics"].pop("images_per_s")
        assert line == own


@pytest.mark.slow
def test_one_that_cannot_be_measured_costs_its_cells_only(toy, tmp_path):
    vit, _ = checkpoint.load_backbone(CKPTS[0])
    vit.blocks[0].norm1.weight.fill_(3e38)                     # finite; its features are not
    checkpoint.export(vit, tmp_path / "large.pth", 0)
    vit.norm.weight[3] = torch.nan
    checkpoint.export(vit, tmp_path / "nan.pth", 0)
    ckpts = [tmp_path / "nan.pth", tmp_path / "large.pth", *CKPTS]
    skip = ["--skip", "davis", "linseg", "fewshot", "variance"]
    benchmark.main(command(toy, tmp_path / "out", *skip, "--crop_size", "40", ckpts=ckpts))

    found = [(line["eval"], line["ckpt"]) for line in lines_of(tmp_path / "out")]
    assert found == [("zeroshot", CKPTS[0]), ("zeroshot", CKPTS[1])] * 2 + [("knn", CKPTS[0])]
    text = (tmp_path / "out/report.md").read_text()
    assert re.search("- nan, zeroshot on VOC val: .*not finite in 1 keys: norm.weight", text)
    assert "- large, zeroshot on VOC val: its features are not finite" in text
    assert re.search("- random:vit_micro/16, knn on .*: --size 40 is not a multiple of the patch size", text)
    with pytest.raises(Mistake, match="absent.pth: no such checkpoint file"):
        benchmark.main(command(toy, tmp_path / "out", *skip, ckpts=["absent.pth"]))


def test_a_bug_keeps_its_traceback(toy, tmp_path, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError
    monkeypatch.setattr(zeroshot, "table_main", bug)
    with pytest.raises(ZeroDivisionError):
        benchmark.main(command(toy, tmp_path, "--skip", "davis"))


@pytest.mark.parametrize(("more", "message"), [
    (["--also", "zero", "--limit 3"], "--also zero: expected one of zeroshot"),
    (["--voc", "nowhere"], "nowhere: no PASCAL VOC"),
    (["--imagenette", "nowhere"], "nowhere: no such folder"),
    (["--also", "knn", "--nb_kn"], "unrecognized|ambiguous|expected"),
])
def test_what_a_user_does_wrong_is_said_before_the_work(toy, tmp_path, more, message):
    with pytest.raises(Mistake, match=message):
        benchmark.main(command(toy, tmp_path / "out", *more))
    assert not lines_of(tmp_path / "out")


@pytest.mark.slow
def test_the_page_is_one_file(unbroken):
    page = (unbroken / "report.html").read_text()
    assert page.count('src="data:image/') == page.count("<img") == 10
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "<script" not in page


# ------------------------------------------------- the tables
def line(ckpt, best, seed=0, **protocol):
    return {"eval": "zeroshot", "ckpt": ckpt, "weights": ckpt, "data": "COCO val2017", "data_digest": "d",
            "protocol": {"size": 480, "seed": seed, **protocol}, "metrics": {"best": best, "n_images": 5}}


def rows_of(lines):
    [(title, table)] = report.sections(lines, {"a.pth": "ours"})
    heads, _, *rows = [line[2:-2].split(" | ") for line in table.splitlines()]
    best = heads.index("best t")
    return title, {row[0]: row[best] for row in rows}


def test_seeds_become_mean_and_spread_and_the_best_is_bold():
    title, rows = rows_of([line("a.pth", 20.0), line("a.pth", 22.0, seed=1), line("b.pth", 20.0)])
    assert title.endswith("COCO val2017, 5 images")
    assert rows["ours, 480 px"] == "**21.0 +- 1.4**" and rows["b, 480 px"] == "20.0"
    assert rows["*paper: MMC, ViT-B*"] == "*38.4*"


def test_the_papers_rows_name_evaluations_and_columns_that_are_there():
    for row in report.PAPER.splitlines():
        eval, _, _, *cells = [cell.strip() for cell in row.split("|")]
        heads = {column.head for column in report.TABLES[eval].columns}
        for cell in cells:
            head, number = cell.split(": ")
            assert head in heads and float(number) > 0, row


def test_the_smallest_overlap_is_bold():
    a = line("a.pth", 1.0)
    b = line("b.pth", 2.0)
    a["metrics"]["overlap"] = 0.5
    b["metrics"]["overlap"] = 0.6
    [(_, table)] = report.sections([a, b], {})
    assert "| **0.500** |\n" in table and "| 0.600 |\n" in table


def test_another_protocol_is_another_row_and_a_later_line_replaces():
    _, rows = rows_of([line("a.pth", 20.0), line("a.pth", 30.0, size=240), line("a.pth", 21.0)])
    assert rows["ours, 480 px"] == "21.0" and rows["ours, 240 px"] == "**30.0**"


def test_markdown_and_html_hold_the_same_cells(tmp_path):
    text = report.markdown(["x", "y", "z"], [["a & b", "**1.0**", ""], ["*c*", "2", "3"]])
    assert text == "| x | y | z |\n|---|---|---|\n| a & b | **1.0** |  |\n| *c* | 2 | 3 |\n"
    page = report.page_of(f"# Title\n\nWords.\n\n{text}\n- one\n- two\n", tmp_path)
    assert "<h1>Title</h1>" in page and "<p>Words.</p>" in page and "<li>one</li>\n<li>two</li>" in page
    assert "<td>a &amp; b</td><td><b>1.0</b></td><td></td>" in page and "<td><i>c</i></td>" in page


def test_a_line_counts_for_the_options_that_made_it(tmp_path):
    job = argparse.Namespace(eval="knn", digest="d")
    network = argparse.Namespace(weights="w")
    own = argparse.Namespace(size=112, temp=0.07, seed=3, json=tmp_path / "lines.jsonl")
    assert not benchmark.is_there(job, network, own)
    run.append_json(own.json, {"eval": "knn", "weights": "w", "data_digest": "d",
                               "protocol": {"size": 112, "temp": 0.07}})
    assert benchmark.is_there(job, network, own)
    for name, value in (("size", 224), ("temp", 0.1)):
        other = argparse.Namespace(**vars(own) | {name: value})
        assert not benchmark.is_there(job, network, other)
    assert not benchmark.is_there(job, argparse.Namespace(weights="v"), own)


def test_lines_are_json(unbroken):
    for text in (unbroken / "results.jsonl").read_text().splitlines():
        assert json.loads(text)["protocol"]
