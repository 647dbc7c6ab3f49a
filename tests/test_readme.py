"""Proves: what the README tells one to type exists: each script, each of its options, each picture; the
documented option of any script is an option of some script; its tables are those of results/."""
import re
from pathlib import Path

import pytest

import ablation
from monitor import read_lines

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
INLINE = [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))]
LINES = [line.split("#")[0] for block in FENCED for line in re.sub(r"\\\n", " ", block).splitlines()] + INLINE
COMMANDS = [(m[1], m[2]) for line in LINES if (m := re.search(r"([\w/]+)\.py\b(.* --.*)", line))]
BORROWED = {"probes": ["linseg", "retrieval"],                                 # options come from there, too
            "ablation": ["pretrain", "zeroshot", "finetune"]}


def options(script):
    """Names of all options that a script defines, by its source."""
    files = [script, *BORROWED.get(script, [])]
    found = re.findall(r'"--([a-z_0-9]+)"', "".join((ROOT / f"{f}.py").read_text() for f in files))
    return {"help", *found}


def test_enough_commands_were_found():
    assert len(COMMANDS) > 20 and {"pretrain", "zeroshot", "davis", "probes", "finetune", "bench"} <= {
        script for script, _ in COMMANDS}


@pytest.mark.parametrize(("script", "rest"), COMMANDS, ids=[f"{s}{i}" for i, (s, _) in enumerate(COMMANDS)])
def test_a_command_has_options_that_exist(script, rest):
    for name in re.findall(r" --([a-z_0-9]+)", rest):
        assert name.removeprefix("no-") in options(script), f"{script}.py has no --{name}"


def test_options_named_alone_exist():
    known = set().union(*(options(p.stem) for p in ROOT.glob("*.py")))
    alone = re.findall(r"(?:^| )--(?!no-)([a-z_0-9]+)", "\n".join(x for x in INLINE if ".py" not in x), re.M)
    assert len(alone) > 10 and set(alone) <= known


def test_pictures_and_files_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT) + re.findall(r"^\| `(\w+\.py)`", TEXT, re.M):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", sorted(p.parent.name for p in ROOT.glob("results/*/table.md")))
def test_tables_are_those_of_the_results(name):
    folder = ROOT / "results" / name
    rows = read_lines(folder / "results.jsonl")
    table = ablation.table(rows, rows[0]["study"])
    assert (folder / "table.md").read_text() == table and table in TEXT
    assert not [x for r in rows for x in r["options"] if x.startswith("/")]        # a path of one machine
