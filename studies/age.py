"""Marks the rows of the page of results whose code has changed since they were measured, as far as the lines
and git tell.  Changes of docstrings and comments do not count."""
import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = " †"
SHARED = "model.py checkpoint.py formats.py images.py data.py "
FILES = {                                      # what an evaluation depends on
    "zeroshot": SHARED + "zeroshot.py prompts.py clicks.py scenes.py",
    "knn": SHARED + "probes.py knn.py",
    "fewshot": SHARED + "probes.py knn.py",
    "variance": SHARED + "probes.py masking.py",
    "davis": SHARED + "davis.py videos.py",
    "linseg": SHARED + "linseg.py labelmaps.py scenes.py",
    "retrieval": SHARED + "retrieval.py",
}


@cache
def code_of(commit: str, file: str) -> str:
    """What Python makes of a file at a commit, without docstrings and comments; empty where git has none."""
    try:
        found = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True, text=True)
    except OSError:                            # no git here
        return ""
    if found.returncode:
        return ""
    tree = ast.parse(found.stdout)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del body[0]
    return ast.dump(tree)


@cache
def changed_since(commit: str, eval: str) -> str:
    """The files of an evaluation whose code differs from that of a commit."""
    files = FILES[eval].split()
    return ", ".join(file for file in files if code_of(commit, file) != code_of("HEAD", file))


def mark(line: dict) -> str:
    return MARK if changed_since(str(line["commit"]), line["eval"]) else ""


def marked_part(lines: list[dict]) -> str:
    """What the mark of a row means, for each kind of row that has it."""
    found = {}
    for line in lines:
        changed = changed_since(str(line["commit"]), line["eval"])
        if changed:
            found[f"{line['eval']} by {line['commit']}: {changed}"] = True
    return "".join(f"-{MARK} {text}\n" for text in found)
