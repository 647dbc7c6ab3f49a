"""The tables and the page of benchmark.py: result lines go in, Markdown and HTML come out.

A line is what `run.record` writes.  Lines of one evaluation, on one set of images, make a table; lines of one
checkpoint that differ in the seed only make a row of it, with their mean and standard deviation.  The best of
ours is bold; the paper's numbers, on the paper's data, stand below in italics."""
import base64
import html
import json
import mimetypes
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkpoint
import run


# ------------------------------------------------- the tables
class Column(NamedTuple):
    """key: where the number is among the metrics.  best: max or min, of which the number is bold."""
    head: str
    key: str
    best: Callable | None = max
    digits: int = 1


class Table(NamedTuple):
    title: str
    columns: list[Column]


TABLES = {
    "zeroshot": Table("Tables 1 and 5 (which names no architecture): one clicked patch, mIoU in %, "
                      "overlap O", [
        Column("t = 0.1", "miou 0.1"),
        Column("t = 0.2", "miou 0.2"),
        Column("t = 0.3", "miou 0.3"),
        Column("t = 0.4", "miou 0.4"),
        Column("best t", "best"),
        Column("auto", "auto"),
        Column("everything", "everything", None),
        Column("O", "overlap", min, 3),
    ]),
    "linseg": Table("Table 3, and Table 1 Lin.: linear segmentation, in %", [
        Column("mIoU", "miou"),
        Column("pixel accuracy", "accuracy"),
    ]),
    "davis": Table("Table 2: DAVIS-2017, in %", [
        Column("J&F", "J&F-Mean"),
        Column("J", "J-Mean"),
        Column("F", "F-Mean"),
    ]),
    "knn": Table("Tables 4, 6, 11: k-NN, in %", [
        Column("CLS, k = 10", "cls 10"),
        Column("PAT, k = 10", "pat 10"),
        Column("hybrid, k = 10", "hybrid 10"),
        Column("CLS, k = 20", "cls 20"),
        Column("PAT, k = 20", "pat 20"),
        Column("hybrid, k = 20", "hybrid 20"),
    ]),
    "fewshot": Table("Table 8: 5-way 1-shot, in %", [
        Column("accuracy", "accuracy"),
        Column("of 95 % +-", "ci95", None),
        Column("best F1", "f1_best"),
    ]),
    "retrieval": Table("Table 9: revisited Oxford and Paris, mAP in %", [
        Column("medium", "medium map"),
        Column("hard", "hard map"),
    ]),
    "variance": Table("Table 10: variance of the features", [
        Column("CLS over crops", "crops", None, 3),
        Column("patches over masks", "masks", None, 3),
        Column("CLS, normalised", "crops_normalised", min, 3),
        Column("patches, normalised", "masks_normalised", min, 3),
    ]),
}
# The paper's rows: evaluation | what the name of the data holds | title | column: number | ...
PAPER = """zeroshot | COCO | MMC, ViT-B | best t: 38.4 | O: .55
zeroshot | COCO | iBOT | best t: 36.2 | O: .56
zeroshot | COCO | DINO | best t: 35.1 | O: .66
zeroshot | COCO | MAE | best t: 30.1 | O: .76
zeroshot | COCO | random | t = 0.1: 16.8 | t = 0.2: 16.6 | t = 0.3: 16.2 | t = 0.4: 15.5
linseg | coco | MMC, ViT-B | mIoU: 46.4
linseg | ade20k | MMC | mIoU: 37.0
linseg | cityscapes | MMC | mIoU: 62.6
linseg | voc | MMC, augmented set | mIoU: 77.7
davis | | MMC, ViT-S | J&F: 60.3
davis | | iBOT, ViT-S | J&F: 59.7
davis | | DINO, ViT-S | J&F: 57.7
davis | | MMC, ViT-B | J&F: 63.8
davis | | DINO, ViT-B | J&F: 62.3
knn | | MMC, ViT-S, ImageNet-100, 200 epochs | CLS, k = 10: 77.5 | PAT, k = 10: 77.0
fewshot | | MAE (always yes) | best F1: 33.3
variance | | MMC | CLS over crops: .19 | patches over masks: .32
variance | | DINO | CLS over crops: .43 | patches over masks: 1.00"""
PICTURES = {                                   # how the names of the files begin: title
    "prompt_cat": "cat",
    "prompt_coffee": "coffee",
    "similarity_coco": "similarities on COCO",
    "similarity_voc": "similarities on VOC",
}


def number_at(metrics: dict, key: str) -> float | None:
    for name in key.split():
        metrics = metrics.get(name) if isinstance(metrics, dict) else None
    return metrics


def row_title(line: dict, names: dict[str, str]) -> str:
    ckpt = line["ckpt"]
    protocol = line["protocol"]
    size = protocol.get("size") or protocol.get("crop") or protocol.get("imsize")
    return f"{names.get(ckpt) or checkpoint.short_name(ckpt)}, {size} px"


def spread(values: list[float], digits: int) -> str:
    """The mean, with the standard deviation where there are several values."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.{digits}f}"
    return text


def column_of(column: Column, rows: list[list[dict]]) -> list[str]:
    """The texts of a column, one for each row, the best in bold."""
    texts = []
    means = {}                                 # by the number of the row
    for row, lines in enumerate(rows):
        values = [number_at(line["metrics"], column.key) for line in lines]
        values = [value for value in values if value is not None]
        texts.append(spread(values, column.digits))
        if values:
            means[row] = round(statistics.mean(values), column.digits)
    if column.best and len(means) > 1:
        best = column.best(means.values())
        for row, mean in means.items():
            if mean == best:
                texts[row] = f"**{texts[row]}**"
    return texts


def rows_of(
    eval: str,
    data_name: str,
    rows: list[list[dict]],
    names: dict,
    mark: Callable,
) -> list:
    """Ours, then the paper's in italics, as Markdown."""
    columns = TABLES[eval].columns
    titles = [row_title(lines[-1], names) + mark(lines[-1]) for lines in rows]
    texts = [column_of(column, rows) for column in columns]
    out = list(zip(titles, *texts, strict=True))
    for line in PAPER.splitlines():
        paper_eval, where, name, *cells = [cell.strip() for cell in line.split("|")]
        if paper_eval == eval and where in data_name:
            numbers = dict(cell.split(": ") for cell in cells)
            texts = [f"*{numbers[column.head]}*" if column.head in numbers else "" for column in columns]
            out.append([f"*paper: {name}*", *texts])
    return out


def sections(
    lines: list[dict],
    names: dict[str, str],
    mark=lambda line: "",
) -> list[tuple[str, str]]:
    """(title, table in Markdown) of each evaluation and set of images among the lines.

    names: {checkpoint: title}, in the order of the rows.  mark: what follows the title of a line's row."""
    places = {ckpt: i for i, ckpt in enumerate(names)}
    evals = list(TABLES)

    def place(line: dict) -> tuple:
        return evals.index(line["eval"]), str(line["data"]), places.get(line["ckpt"], len(names))

    tables = {}
    for line in sorted(lines, key=place):
        protocol = dict(line["protocol"])
        seed = protocol.pop("seed", None)
        where = line["eval"], line["data"], line["data_digest"], protocol.get("layout", "")
        row = line["ckpt"], line["weights"], json.dumps(protocol, sort_keys=True)
        rows = tables.setdefault(where, {})
        rows.setdefault(row, {})[seed] = line                          # a later line of a seed replaces

    out = []
    for (eval, data_name, _, layout), rows in tables.items():
        table = TABLES[eval]
        rows = [list(seeds.values()) for seeds in rows.values()]
        metrics = rows[0][-1]["metrics"]
        images = f", {metrics['n_images']} images" if "n_images" in metrics else ""
        parts = Path(data_name or layout).parts
        where = "/".join(parts[-2:] if parts[-1] == "val" else parts[-1:])
        heads = ["weights", *(column.head for column in table.columns)]
        cells = rows_of(eval, layout or str(data_name), rows, names, mark)
        out.append((f"{table.title}; {where}{images}", markdown(heads, cells)))
    return out


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |\n" for cells in [heads, *rows]]
    lines.insert(1, f"|{'---|' * len(heads)}\n")
    return "".join(lines)


# ------------------------------------------------- the report
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1em;color:#222}
h1{font-size:1.6em}h2{font-size:1.1em;margin-top:2em}
.wide{overflow-x:auto}img{max-width:100%;max-height:320px}
table{border-collapse:collapse}td{padding:.25em .7em;text-align:right;white-space:nowrap}
td:first-child{text-align:left}tr{border-bottom:1px solid #ddd}
tr:first-child{border-bottom:2px solid #888;font-weight:bold}
i{color:#666}figure{display:inline-block;margin:.5em .5em 1em 0}figcaption{color:#666}"""


FORMS = [                                      # of Markdown, and what they are in HTML
    (r"^(\w.*)$", r"<p>\1</p>"),
    (r"^# (.*)$", r"<h1>\1</h1>"),
    (r"^## (.*)$", r"<h2>\1</h2>"),
    (r"^- (.*)$", r"<li>\1</li>"),
    (r"(^<li>.*\n)+", r"<ul>\n\g<0></ul>\n"),
    (r"\*\*(.+?)\*\*", r"<b>\1</b>"),
    (r"\*(.+?)\*", r"<i>\1</i>"),
]


def page_of(text: str, out: Path) -> str:
    """A report in Markdown as a page of HTML that holds its pictures.  out: the folder of the report."""
    text = html.escape(text)
    text = re.sub(r"(^\|.*\n)+", html_table, text, flags=re.MULTILINE)
    for markdown, tags in FORMS:
        text = re.sub(markdown, tags, text, flags=re.MULTILINE)
    text = re.sub(r"!\[(.*)\]\((.*)\)", lambda match: html_picture(out, *match.groups()), text)
    return (f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Benchmark</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>{text}</html>\n')


def html_table(match: re.Match) -> str:
    head, _, *body = match[0].splitlines()
    rows = [line[2:-2].replace(" | ", "</td><td>") for line in [head, *body]]
    rows = [f"<tr><td>{row}</td></tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>\n'


def html_picture(out: Path, title: str, path: str) -> str:
    """As a data URI, so that the page is one file."""
    kind, _ = mimetypes.guess_type(path)
    text = base64.b64encode((out / html.unescape(path)).read_bytes()).decode()
    return (f'<figure><img alt="{title}" src="data:{kind};base64,{text}">'
            f"<figcaption>{title}</figcaption></figure>")


def find_pictures(out: Path, networks: list) -> list[tuple[Path, str]]:
    """(file, title) of each picture that is there."""
    found = []
    for begin, title in PICTURES.items():
        for network in networks:
            for path in sorted(out.glob(f"pictures/{begin}_{network.weights}_*.png")):
                found.append((path, f"{title}: {network.name}"))
    for network in networks:
        for folder in sorted(out.glob(f"davis/{network.weights}_*/overlay/*/")):
            frames = sorted(folder.glob("*.jpg"))
            if frames:
                found.append((frames[len(frames) // 2], f"{folder.name}: {network.name}"))
    return found


def write_report(out: Path, networks: list, missing: list[str]) -> None:
    """report.md and report.html from results.jsonl, failed.jsonl and the pictures.

    networks: each with ckpt, name, weights.  missing: what is not measured, and why."""
    lines = run.read_lines(out / "results.jsonl")
    left_out = list(missing)
    for line in run.read_lines(out / "failed.jsonl"):
        left_out.append(f"{line['name']}, {line['eval']} on {line['data']}: {line['why']}")
    code = {str(line["commit"]) for line in lines}
    code = ", ".join(sorted(code))
    machine = {f"torch {line['torch']}, {line['device']}" for line in lines}
    machine = "; ".join(sorted(machine))
    names = {network.ckpt: network.name for network in networks}

    about = f"the paper's numbers, on the paper's data. Measured with code {code}; {machine}."
    text = [f"# Benchmark\n\nOurs, and in italics {about}\n"]
    for title, table in sections(lines, names):
        text.append(f"## {title}\n\n{table}")
    text.append("## Not measured\n")
    text += [f"- {line}" for line in dict.fromkeys(left_out)]
    text.append("\n## Pictures\n")
    for path, title in find_pictures(out, networks):
        text.append(f"![{title}]({path.relative_to(out)})\n")
    report = "\n".join(text)
    files = {"report.md": report, "report.html": page_of(report, out)}
    for name, content in files.items():
        with checkpoint.whole_file(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
