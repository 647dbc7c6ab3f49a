"""Proves: what README and docs/*.md tell one to type exists and is accepted by the script's own parser; the
Python lines run; every picture, link and file is there; the map names every module; README stays short."""
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
ELSEWHERE = {"index-url", "nproc_per_node", "nnodes", "is-ancestor"}   # options of pip, torchrun, git
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
SCRIPT = re.compile(r"(?:-m (studies\.\w+)|(?<![\w/.])([\w/]+)\.py)(?=\s|$)(.*)")


def inline_code(text: str) -> list[str]:
    """What stands between single backticks, in one line each."""
    without = FENCE.sub("", text)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command that starts one of our scripts."""
    lines = []
    for language, block in FENCE.findall(text):
        if language in ("sh", "bash"):
            lines += block.replace("\\\n", " ").splitlines()
    for code in inline_code(text):             # a script alone is its name, not a whole command
        if code.startswith(("python ", "torchrun ")) and " --" in code:
            lines.append(code)
    found = []
    for line in lines:
        for part in re.split(r"&&|;|(?<!\S)&(?!\S)", line.split(" #")[0]):
            match = SCRIPT.search(part)
            if match and ("python" in part or "torchrun" in part):
                module = match[1] or match[2].replace("/", ".")
                found.append((module, shlex.split(match[3])))
    return found


STARTED = {"data": "studies.inspect_data"}     # where the options of a script are, if not in itself
COMMANDS = [(page, *command) for page, text in TEXTS.items() for command in commands(text)]


def options(module: str, *words: str) -> set[str]:
    """Names of the options that a script says it has."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(module).get_args([*words, "--help"])
    return set(re.findall(r"--([\w-]+)", shown.getvalue()))


@pytest.mark.parametrize(("page", "module", "argv"), COMMANDS,
                         ids=[f"{page}-{i}-{module}" for i, (page, module, _) in enumerate(COMMANDS)])
def test_a_command_is_accepted(page, module, argv, tmp_path, monkeypatch):
    if module == "tests.stress":               # has a parser of its own, and no get_args
        source = (ROOT / "tests" / "stress.py").read_text()
        assert all(f'"{word}"' in source for word in argv if word.startswith("--"))
        return
    monkeypatch.chdir(tmp_path)
    importlib.import_module(STARTED.get(module, module)).get_args(argv)


def test_enough_commands_were_found():
    modules = {module for _, module, _ in COMMANDS}
    assert len(COMMANDS) > 25
    assert {"pretrain", "zeroshot", "davis", "probes", "finetune", "demo", "benchmark"} <= modules
    with pytest.raises(Exception, match="nonsense"):
        importlib.import_module("zeroshot").get_args(["--ckpt", "a", "--coco", "b", "--nonsense", "1"])


def test_options_named_alone_exist():
    known = set(ELSEWHERE)
    for module in ("pretrain", "zeroshot", "davis", "finetune", "demo", "benchmark", "checkpoint",
                   "studies.gpu", "studies.bench", "studies.ablation", "studies.layouts",
                   "studies.inspect_data", "studies.masks", "studies.rivals", "studies.tokens",
                   "studies.weights"):
        known |= options(module)
    for probe in ("knn", "fewshot", "variance", "layers", "linseg", "retrieval"):
        known |= options("probes", probe)
    for patch in ROOT.glob("docs/exercises/*.patch"):                  # a solution may add options
        known |= set(re.findall(r'"--(\w+)"', patch.read_text()))
    for page, text in TEXTS.items():
        for code in inline_code(text):
            unknown = set(re.findall(r"(?:^| )--([a-z][a-z0-9_-]*)(?!\w)", code)) - known
            assert not unknown, f"{page}: {code}"


def test_the_lines_of_python_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    [block] = [block for language, block in FENCE.findall(README) if language == "python"]
    lines = [line for line in block.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) == 5
    names: dict = {}
    exec(block, names)
    assert names["z"].shape == (30 * 45, 160) and names["mask"].shape == (30, 45)
    assert names["similarity"][18 * 45 + 22].item() == pytest.approx(1)
    assert names["mask"][18, 22] and 0 < names["mask"].float().mean() < 0.5
    assert names["mask"].dtype == torch.bool


def test_links_and_pictures_exist():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", text)):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_files_named_in_the_text_exist():
    for page, text in TEXTS.items():
        for code in inline_code(text):
            if re.fullmatch(r"[\w/]+\.(py|json|md|svg)", code) and "/" in code:
                assert (ROOT / code).exists(), f"{page}: {code}"


def test_the_map_names_every_file():
    table = README.split("## Where to start reading")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == {path.name for path in ROOT.glob("*.py")}
    for name in ("mmc.pth", "in100.txt", "pyproject.toml", "studies/", "results/", "tests/", "docs/", ".ci/"):
        assert f"`{name}`" in table and (ROOT / name).exists()


def test_readme_is_short_and_begins_with_a_picture():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("![") for line in lines[:12])
    assert "pip install -r requirements.txt && python pretrain.py" in lines
    assert "pip install -r requirements-dev.txt && python -m pytest" in lines      # what .ci/run looks for
