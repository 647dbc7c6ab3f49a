"""Proves: docs/RESULTS.md is what `python -m studies.results` makes of results/, and a number that was edited
by hand is named; no path of one machine is in the lines; a row that older code measured is marked."""
import re

import pytest

import run
from studies import age, results


@pytest.fixture(scope="module")
def made():
    return results.page()


def test_the_page_is_generated(made):
    found = results.differences(results.PAGE.read_text(), made)
    why = "edited by hand, or results/ changed: run `python -m studies.results`"
    assert not found, f"{why}; {'; '.join(found)}"


def test_an_edited_number_is_named(made):
    row = next(line for line in made.splitlines() if line.startswith("| (d)"))
    number = re.search(r"\d\d\.\d", row)[0]
    found = results.differences(made.replace(row, row.replace(number, "99.9", 1)), made)
    assert len(found) == 1 and f"99.9 is {number} in results/" in found[0] and "(d)" in found[0]


def test_a_line_too_many_is_found(made):
    assert results.differences(made + "by hand\n", made)


def test_the_mark_of_age_is_no_difference(made):
    marked = made.replace("| mmc.pth, 240 px |", f"| mmc.pth, 240 px{age.MARK} |")
    assert not results.differences(marked, made)


def test_the_command_checks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "page", lambda: "| a | 1.5 |\n")
    results.main(results.get_args([]))
    results.main(results.get_args(["--check"]))
    assert capsys.readouterr().out == "wrote RESULTS.md\nthe same\n"
    (tmp_path / "RESULTS.md").write_text("| a | 1.6 |\n")
    with pytest.raises(run.Mistake, match=r"line 1, a: 1.6 is 1.5 in results/"):
        results.main(results.get_args(["--check"]))


def test_older_code_is_told_by_what_it_does_not_by_its_words(monkeypatch):
    now = '"""Two."""\ndef f():\n    """Doc."""\n    return 1  # comment\n'
    texts = {"old": '"""One."""\ndef f():\n    return 1\n', "older": "def f():\n    return 2\n", "HEAD": now}

    def git(command, **_):
        commit = command[2].split(":")[0]
        return type("Done", (), {"returncode": int(commit not in texts), "stdout": texts.get(commit, "")})
    monkeypatch.setattr(age.subprocess, "run", git)
    age.code_of.cache_clear()
    age.changed_since.cache_clear()
    assert age.changed_since("old", "retrieval") == ""
    assert "retrieval.py" in age.changed_since("older", "retrieval")
    assert age.mark({"commit": None, "eval": "retrieval"}) == age.MARK
    age.code_of.cache_clear()
    age.changed_since.cache_clear()


def test_lines_name_no_folder_of_one_machine():
    for file in sorted(results.RESULTS.glob("**/*.json*")):
        assert not re.search(r'"/(work|tmp|home|root)/', file.read_text()), file


def test_every_line_of_the_benchmark_is_whole():
    keys = {tuple(line) for line in results.lines_of("benchmark.jsonl")}
    assert len(keys) == 1 and "commit" in keys.pop()
