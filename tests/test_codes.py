"""codes.py: codes by the likeliest of all readings, by brute force; its csv, and its errors."""

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from images_for_readme import codes

HEAD = "path,character,confidence,alternatives,lookalike,error\n"
BLANK = ",0.9000,1:0.0600 7:0.0400,,blank: nothing is written"


def write(top: Path, **forms: list[str]) -> Path:
    """Write the csv of forms; a cell is a character that is read surely, or the end of its row."""
    file = top / "cells.csv"
    lines = []
    for form, cells in forms.items():
        for number, cell in enumerate(cells):
            rest = f"{cell},1.0000,,," if len(cell) == 1 else cell
            lines.append(f'"in, a_b/{form}_{number:02}.png",{rest}\n')
    file.write_text(HEAD + "".join(lines))
    return file


@pytest.fixture
def run(tmp_path, capsys):
    """Return what runs the command: rows by form, with what follows the folder of the form."""

    def run_it(cells: Path, valid: str | None, *flags: object) -> dict[str, dict[str, str]]:
        arguments = [str(cells), *map(str, flags)]
        if valid is not None:
            (tmp_path / "valid.txt").write_text(valid)
            arguments.insert(1, str(tmp_path / "valid.txt"))
        assert codes.main(arguments) == 0
        rows = csv.DictReader(capsys.readouterr().out.splitlines())
        return {row.pop("form").removeprefix("in, a_b/"): row for row in rows}

    return run_it


def columns(row: dict[str, str], names: str) -> list[str]:
    return [row[name] for name in names.split()]


def test_cells_are_joined_with_their_least_confidence(run, tmp_path):
    old_blank = ",,,,blank: no ink found"
    doubtful = ",0.5000,O:0.5000 0:0.3000,0O,no answer: 0.5000 is below --min-confidence 0.9"
    cells = {"b": ["B", "0,0.7000,O:0.2000 Q:0.1000,0O,"], "a": ["A", BLANK, old_blank, doubtful]}
    rows = run(write(tmp_path, **cells, c=["1", ",,,,can't be read: it is none"]), None)
    assert list(rows) == ["b", "a", "c"]
    scribble = ",0.8000,A:0.1500 4:0.0500,,no single character: what is written looks like none"
    assert run(write(tmp_path, a=["A", scribble]), None)["a"] == {
        "read": "A?",
        "confidence": "0.1500",
    }
    assert rows["b"] == {"read": "B0", "confidence": "0.7000"}
    assert rows["a"] == {"read": "A  O", "confidence": "0.5000"}
    assert (rows["c"]["read"], float(rows["c"]["confidence"]) < 0.1) == ("1?", True)


def test_the_likeliest_code_is_that_of_all_placements_by_brute_force():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 40)
    valid = ["".join(rng.choice([*"0123AB"], length)) for length in lengths]
    p = rng.dirichlet(np.full(38, 0.1), 5)
    (as_read,), (scores,) = codes.score_all([p], valid)

    def cost(cell: np.ndarray, character: str) -> float:
        shown = cell["0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(character)]
        return math.log(max(shown + codes.GAP * (cell[36] + cell[37]), codes.FLOOR))

    for code, score in zip(valid, scores, strict=True):
        best = -math.inf
        for places in itertools.combinations(range(5), len(code)):
            at = dict(zip(places, code, strict=True))
            likely = [
                cost(cell, at[i]) if i in at else math.log(max(cell[36], codes.FLOOR))
                for i, cell in enumerate(p)
            ]
            best = max(best, sum(likely))
        assert score == pytest.approx(best)
    (choice,) = codes.choose(np.array([as_read]), scores[None])
    first, second = sorted(scores)[:-3:-1]
    expected = (scores.argmax(), first - second, as_read - first)
    assert choice == pytest.approx(expected)


def test_with_once_the_assignment_and_its_leads_are_the_best_of_all_by_brute_force():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        forms, count = rng.integers(1, 5, 2)
        scores = -rng.gamma(2, 4, (forms, count))
        as_read = np.zeros(forms)
        totals = {}
        for picks in itertools.product([None, *range(count)], repeat=forms):
            taken = [pick for pick in picks if pick is not None]
            if len(taken) == len(set(taken)):
                each = [-10 if pick is None else scores[i, pick] for i, pick in enumerate(picks)]
                totals[picks] = sum(each)
        best = max(totals, key=totals.get)
        choices = codes.assign(as_read, scores, 10)
        assert tuple(choice.code for choice in choices) == best
        for i, choice in enumerate(choices):
            others = [totals[p] for p in totals if p[i] not in (None, best[i])]
            if best[i] is not None and others:
                assert choice.lead == pytest.approx(totals[best] - max(others))
                assert choice.behind == pytest.approx(-scores[i, best[i]])


def test_names_of_any_length_stand_anywhere_in_the_row_and_gaps_decide_nothing(run, tmp_path):
    end = ",0.9999,,,blank: nothing is written"
    file = write(
        tmp_path, a=[*"KIM", end, end], b=[end, *"KIM", end], c=["L", BLANK, "E", end, end],
        d=["X", "Y", *"ZZZ"],
    )  # fmt: skip
    rows = run(file, "Kim\nLEE\nLIE\nLOPEZ\n")
    for form, read in {"a": "KIM  ", "b": " KIM "}.items():
        assert columns(rows[form], "read likeliest do") == [read, "KIM", "accept"]
    assert columns(rows["c"], "read lead do") == ["L E  ", "0.0", "look"]
    gap = -math.log(codes.GAP * 0.9)
    assert 0.5 < float(rows["c"]["behind"]) <= gap + 0.1
    assert (float(rows["d"]["behind"]) > codes.BEHIND, rows["d"]["do"]) == (True, "look")
    assert columns(run(file, "LOPEZES")["a"], "likeliest lead behind do") == ["", "", "", "look"]


def test_a_person_counts_for_more_than_the_net_and_the_list(run, tmp_path):
    file = write(tmp_path, a=[*"123"], b=[*"123"], c=[*"123"])
    told = tmp_path / "corrections.csv"
    lines = ['"in, a_b/a_01.png",7', '"in, a_b/b_02.png",', '"in, a_b/elsewhere_02.png",9']
    told.write_text("\n".join(["path,character", *lines]))
    rows = run(file, "123\n173\n12\n", "--corrections", told)
    assert columns(rows["a"], "read likeliest do") == ["173", "173", "accept"]
    assert columns(rows["b"], "read likeliest do") == ["12 ", "12", "look"]  # 123 may have a gap
    assert columns(rows["c"], "read likeliest") == ["123", "123"]
    assert float(run(file, "123", "--corrections", told)["a"]["behind"]) > 50


def test_a_pattern_leaves_out_what_a_place_does_not_allow(run, tmp_path):
    o, i = "O,0.9000,0:0.0800 Q:0.0200,0O,", "I,0.6000,1:0.3000 L:0.1000,1IL,"
    (tmp_path / "places.txt").write_text("A-HJ-NPR-Z\nA-HJ-NPR-Z\n0-9\n")
    file = write(tmp_path, a=["A", i, o], b=["A", "B", "C"])
    for pattern in ("[A-HJ-NPR-Z]{2}[0-9]", tmp_path / "places.txt"):
        rows = run(file, None, "--pattern", pattern)
        assert rows["a"]["read"] == "AL0"
        assert float(rows["a"]["confidence"]) == pytest.approx(1, abs=0.02)  # 0, of digits and ?
        assert rows["b"]["read"] == "AB?"


def test_two_forms_do_not_share_a_code_with_once(run, tmp_path):
    doubtful = ["1", "2", "3,0.5000,8:0.5000,,"]
    file = write(tmp_path, a=doubtful, b=[*"123"], c=[*"123"])
    alone = run(file, "123\n128\n555\n")
    assert {row["likeliest"] for row in alone.values()} == {"123"} or alone["a"]["lead"] == "0.0"
    rows = run(file, "123\n128\n555\n", "--once")
    assert rows["a"]["likeliest"] == "128"
    assert sorted(rows[form]["likeliest"] for form in "bc") == ["", "123"]


@pytest.mark.parametrize(
    ("cells", "flags", "said"),
    [
        (HEAD + "a.png,1,1.0,,,\n", [], "a.png: no cell of a form"),
        ("path,character\na_0.png,1\n", [], "cells.csv: no column 'confidence'"),
        (HEAD + "a_0.png,1,much,,,\n", [], "a_0.png: could not convert"),
        (None, [], "No such file"),
        (HEAD, ["/dev/null"], "/dev/null: no codes"),
        (HEAD + "a_0.png,1,1.0,,,\n", ["--pattern", "[0-9]{2}"], "a: 1 cells, but the pattern has"),
        (HEAD, ["--pattern", "[9-0]"], "--pattern [9-0]: bad character range"),
        (HEAD, ["--pattern", "(a|b)"], "--pattern (a|b): expected such as"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(cells, flags, said, tmp_path, capsys):
    file = tmp_path / "cells.csv"
    if cells is not None:
        file.write_text(cells)
    assert codes.main([str(file), *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), said in err) == ("", 1, True), err


def test_without_scipy_only_once_is_missing(tmp_path):
    file = write(tmp_path, a=[*"12"])
    (tmp_path / "valid.txt").write_text("12\n13\n")
    script = "import sys; sys.modules['scipy'] = None; from images_for_readme import codes; "
    command = [sys.executable, "-c", script + "sys.exit(codes.main(sys.argv[1:]))", str(file)]
    for flag, status, said in (("--behind=9", 0, ""), ("--once", 2, "--once needs scipy")):
        run = subprocess.run(
            [*command, str(tmp_path / "valid.txt"), flag], cwd=ROOT, capture_output=True, text=True
        )
        assert (run.returncode, said in run.stderr) == (status, True), run.stderr
