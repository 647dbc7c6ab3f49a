"""The tables and the page of benchmark.py: result lines go in, Markdown and HTML come out.

A line is what `run.record` writes.  Lines of one evaluation, on one set of images, make a table; lines of one
checkpoint that differ in the seed only make a row of it, with their mean and standard deviation.  The best of
ours is bold; the paper's numbers, on the paper's data, stand below in italics."""
import base64
import html
import io
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import checkpoint
import run


# ------------------------------------------------- the tables
class Column(NamedTuple):
    """key: where the number is among the metrics.  best: the largest (max) or the smallest (min) is bold."""
    head: str
    key: str
    best: str = "max"
    digits: int = 1


class Table(NamedTuple):
    """paper: rows {head: number} by name, for data whose name holds the key."""
    title: str
    columns: list[Column]
    paper: dict[str, dict[str, dict[str, str]]] = {}


TABLES = {
    "zeroshot": Table(
        "Tables 1 and 5 (which names no architecture): one clicked patch, mIoU in %, overlap O",
        [Column(f"t = {t}", f"miou {t}") for t in ("0.1", "0.2", "0.3", "0.4")]
        + [Column("best t", "best"), Column("auto", "auto"), Column("everything", "everything", ""),
           Column("O", "overlap", "min", 3)],
        {"COCO": {
            "MMC, ViT-B": {"best t": "38.4", "O": ".55"},
            "iBOT": {"best t": "36.2", "O": ".56"},
            "DINO": {"best t": "35.1", "O": ".66"},
            "MAE": {"best t": "30.1", "O": ".76"},
            "random": {"t = 0.1": "16.8", "t = 0.2": "16.6", "t = 0.3": "16.2", "t = 0.4": "15.5"},
        }}),
    "linseg": Table(
        "Table 3, and Table 1 Lin.: linear segmentation, in %",
        [Column("mIoU", "miou"), Column("pixel accuracy", "accuracy")],
        {"coco": {"MMC, ViT-B": {"mIoU": "46.4"}}, "ade20k": {"MMC": {"mIoU": "37.0"}},
         "cityscapes": {"MMC": {"mIoU": "62.6"}}, "voc": {"MMC, augmented set": {"mIoU": "77.7"}}}),
    "davis": Table(
        "Table 2: DAVIS-2017, in %",
        [Column("J&F", "J&F-Mean"), Column("J", "J-Mean"), Column("F", "F-Mean")],
        {"": {"MMC, ViT-S": {"J&F": "60.3"}, "iBOT, ViT-S": {"J&F": "59.7"}, "DINO, ViT-S": {"J&F": "57.7"},
              "MMC, ViT-B": {"J&F": "63.8"}, "DINO, ViT-B": {"J&F": "62.3"}}}),
    "knn": Table(
        "Tables 4, 6, 11: k-NN, in %",
        [Column(f"{head}, k = {k}", f"{head.lower()} {k}")
         for k in (10, 20) for head in ("CLS", "PAT", "hybrid")],
        {"": {"MMC, ViT-S, ImageNet-100, 200 epochs": {"CLS, k = 10": "77.5", "PAT, k = 10": "77.0"}}}),
    "fewshot": Table(
        "Table 8: 5-way 1-shot, in %",
        [Column("accuracy", "accuracy"), Column("of 95 % +-", "ci95", ""), Column("best F1", "f1_best")],
        {"": {"MAE (always yes)": {"best F1": "33.3"}}}),
    "retrieval": Table(
        "Table 9: revisited Oxford and Paris, mAP in %",
        [Column("medium", "medium map"), Column("hard", "hard map")]),
    "variance": Table(
        "Table 10: variance of the features",
        [Column("CLS over crops", "crops", "", 3), Column("patches over masks", "masks", "", 3),
         Column("CLS, normalised", "crops_normalised", "min", 3),
         Column("patches, normalised", "masks_normalised", "min", 3)],
        {"": {"MMC": {"CLS over crops": ".19", "patches over masks": ".32"},
              "DINO": {"CLS over crops": ".43", "patches over masks": "1.00"}}}),
}
Cell = tuple[str, str]                         # text, and how it is set: "", "bold", "italic"


def number_at(metrics: dict, key: str) -> float | None:
    for name in key.split():
        metrics = metrics.get(name) if isinstance(metrics, dict) else None
    return metrics


def place(name: str, names: dict) -> int:
    """In the order of names; the unknown last."""
    return list(names).index(name) if name in names else len(names)


def grouped(lines: list[dict]) -> dict[tuple, list[dict]]:
    """The lines of a table row, by (eval, data and its digest): {row: lines that differ in the seed}."""
    tables = {}
    for line in lines:
        protocol = dict(line["protocol"])
        seed = protocol.pop("seed", None)
        where = line["eval"], line.get("data"), line["data_digest"], protocol.get("layout", "")
        row = line["ckpt"], line["weights"], json.dumps(protocol, sort_keys=True)
        tables.setdefault(where, {}).setdefault(row, {})[seed] = line  # a later line of a seed replaces
    return {where: {row: list(seeds.values()) for row, seeds in rows.items()}
            for where, rows in sorted(tables.items(), key=lambda item: list(TABLES).index(item[0][0]))}


def row_title(line: dict, names: dict[str, str]) -> str:
    protocol = line["protocol"]
    size = protocol.get("size") or protocol.get("crop") or protocol.get("imsize")
    return f"{names.get(line['ckpt']) or checkpoint.short_name(line['ckpt'])}, {size} px"


def cell_of(lines: list[dict], column: Column) -> tuple[float | None, str]:
    """The mean over the seeds, and how it is written, with the standard deviation where there are several."""
    values = [number_at(line["metrics"], column.key) for line in lines]
    values = [value for value in values if value is not None]
    if not values:
        return None, ""
    text = f"{statistics.mean(values):.{column.digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):.{column.digits}f}"
    return statistics.mean(values), text


def rows_of(table: Table, data_name: str, rows: dict[tuple, list[dict]], names: dict,
            mark: Callable[[dict], str]) -> list[list[Cell]]:
    """Ours, the best in bold, then the paper's in italics.  mark: what follows a row's title."""
    out = []
    for lines in rows.values():
        out.append([(row_title(lines[-1], names) + mark(lines[-1]), "")])
    for column in table.columns:
        cells = [cell_of(lines, column) for lines in rows.values()]
        values = [round(value, column.digits) for value, _ in cells if value is not None]
        best = {"max": max, "min": min}[column.best](values) if column.best and len(values) > 1 else None
        for row, (value, text) in zip(out, cells, strict=True):
            is_best = value is not None and best == round(value, column.digits)
            row.append((text, "bold" if is_best else ""))
    for key, paper in table.paper.items():
        for name, numbers in paper.items() if key in data_name else ():
            row = [(f"paper: {name}", "italic")]
            out.append(row + [(numbers.get(column.head, ""), "italic") for column in table.columns])
    return out


def sections(lines: list[dict], names: dict[str, str], mark=lambda line: "") -> list[tuple]:
    """(title, heads, rows of cells) for each table whose evaluation is among the lines."""
    out = []
    lines = sorted(lines, key=lambda line: (str(line["data"]), place(line["ckpt"], names)))
    for (name, data_name, _, layout), rows in grouped(lines).items():
        table = TABLES[name]
        line = next(iter(rows.values()))[-1]
        images = f", {line['metrics']['n_images']} images" if "n_images" in line["metrics"] else ""
        heads = ["weights", *(column.head for column in table.columns)]
        parts = Path(data_name or layout).parts
        where = "/".join(parts[-2:] if parts[-1] == "val" else parts[-1:])
        title = f"{table.title}; {where}{images}"
        out.append((title, heads, rows_of(table, layout or str(data_name), rows, names, mark)))
    return out


def markdown(heads: list[str], rows: list[list[Cell]]) -> str:
    around = {"": "", "bold": "**", "italic": "*"}
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [f"{around[style]}{text}{around[style]}" if text else "" for text, style in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------- the report
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1em;color:#222}
h1{font-size:1.6em}h2{font-size:1.1em;margin-top:2em}.wide{overflow-x:auto}img{max-width:100%;max-height:320px}
table{border-collapse:collapse}td,th{padding:.25em .7em;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}tr{border-bottom:1px solid #ddd}th{border-bottom:2px solid #888}
i{color:#666}figure{display:inline-block;margin:.5em .5em 1em 0}figcaption{color:#666}"""


def html_table(heads: list[str], rows: list[list[Cell]]) -> str:
    tags = {"": "{}", "bold": "<b>{}</b>", "italic": "<i>{}</i>"}
    body = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = [f"<tr>{body}</tr>"]
    for row in rows:
        cells = [f"<td>{tags[style].format(html.escape(text))}</td>" for text, style in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def html_picture(path: Path, title: str) -> str:
    """The picture itself, as a data URI, so that the page is one file."""
    buffer = io.BytesIO()
    image = Image.open(path).convert("RGB")
    image.thumbnail((1200, 1200))
    image.save(buffer, "JPEG", quality=85)
    text = base64.b64encode(buffer.getvalue()).decode()
    title = html.escape(title)
    return (f'<figure><img alt="{title}" src="data:image/jpeg;base64,{text}">'
            f"<figcaption>{title}</figcaption></figure>")


def find_pictures(out: Path, photos: list[str], networks: dict[str, str]) -> list[tuple[Path, str]]:
    """(file, title) of each picture that is there.  networks: {name: digest of the weights}."""
    titles = {f"prompt_{Path(photo).stem}": Path(photo).stem for photo in photos}
    titles |= {"similarity_coco": "similarities on COCO", "similarity_voc": "similarities on VOC"}
    found = []
    for begin, title in titles.items():
        for name, weights in networks.items():
            for path in sorted(out.glob(f"pictures/{begin}_{weights}_*.png")):
                found.append((path, f"{title}: {name}"))
    for name, weights in networks.items():
        for folder in sorted(out.glob(f"davis/{weights}_*/overlay/*/")):
            frames = sorted(folder.glob("*.jpg"))
            if frames:
                found.append((frames[len(frames) // 2], f"{folder.name}: {name}"))
    return found


def write_report(out: Path, names: dict[str, str], missing: list[str], pictures: list[tuple]) -> None:
    """report.md and report.html from results.jsonl and failed.jsonl.  pictures: (path, title)."""
    lines = run.read_lines(out / "results.jsonl")
    left_out = list(missing)
    for line in run.read_lines(out / "failed.jsonl"):
        text = f"{line['name']}, {line['eval']} on {line['data']}: {line['why']}"
        if text not in left_out:
            left_out.append(text)
    left_out = left_out or ["nothing"]
    code = ", ".join(sorted({str(line["commit"]) for line in lines}))
    machine = "; ".join(sorted({f"torch {line['torch']}, {line['device']}" for line in lines}))
    about = (f"Ours, and in italics the paper's numbers, on the paper's data. Measured with code {code}; "
             f"{machine}.")

    text = [f"# Benchmark\n\n{about}\n"]
    page = [f"<h1>Benchmark</h1><p>{html.escape(about)}</p>"]
    for title, heads, rows in sections(lines, names):
        text.append(f"## {title}\n\n{markdown(heads, rows)}")
        page.append(f"<h2>{html.escape(title)}</h2>{html_table(heads, rows)}")
    text.append("## Not measured\n\n" + "".join(f"- {line}\n" for line in left_out))
    items = "".join(f"<li>{html.escape(line)}</li>" for line in left_out)
    page.append(f"<h2>Not measured</h2><ul>{items}</ul><h2>Pictures</h2>")
    text.append("## Pictures\n")
    for path, title in pictures:
        text.append(f"![{title}]({path.relative_to(out)})\n")
        page.append(html_picture(path, title))
    head = ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Benchmark</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>')
    write(out / "report.md", "\n".join(text))
    write(out / "report.html", head + "\n".join(page) + "</html>\n")


def write(path: Path, text: str) -> None:
    """Another rank may write the same file: it is always one of the two."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with run.writing(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
