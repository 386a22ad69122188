"""The READMEs: commands run or parse, links lead somewhere, figures are those of the records."""

import contextlib
import csv
import hashlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import inference
import train
from images_for_readme import drawings, study, tables

IMAGES = ROOT / "images_for_readme"
RECORDS = study.read_records()
RUNS = [record for record in RECORDS.values() if record["kind"] == "run"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in study.PAGES}
README = TEXTS["README.md"]
STUDY = TEXTS["images_for_readme/README.md"]
COMMANDS = [
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
]
ANCHORS = {
    name: [
        re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")
        for head in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    ]
    for name, text in TEXTS.items()
}


# Numbers


class Claim(NamedTuple):
    """A number in a sentence, and what it is in the records."""

    page: str
    words: str  # {} stands for the number
    find: Callable[[dict], float]
    tolerance: float = 0.5


def find_mean(records: dict, name: str) -> float:
    """Return the accuracy of some weights on labelled sets, the mean of the sets."""
    return records[name]["rows"][-1]["accuracy"]


def find_doubt(records: dict, key: str) -> float:
    """Return what a --min-confidence of 0.9 means on the field sets."""
    return next(row for row in records["field"]["doubt"] if row["threshold"] == "0.9")[key]


def find_validation(records: dict, name: str) -> float:
    return records[name]["validation"]["accuracy"]


IN_README = partial(Claim, "README.md")
IN_STUDY = partial(Claim, "images_for_readme/README.md")
CLAIMS = [
    IN_README(
        "this gains about {} points", lambda r: find_mean(r, "field") - find_mean(r, "alone")
    ),
    IN_README("about {} % of the field sets are answered", lambda r: find_doubt(r, "answered")),
    IN_README("about {} % of these rightly", lambda r: find_doubt(r, "right")),
    IN_README("about {} % are left without", lambda r: r["scenes"]["means"]["junk"]),
    IN_README("Expect about {} % on EMNIST's", lambda r: r["shipped"]["test"]["accuracy"]),
    IN_README("about {} s on an H100", lambda r: r["bench-gpu"]["full_run_seconds"]),
    IN_README("of about {} minutes each", lambda r: r["bench-cpu"]["rows"][0]["s/epoch"] / 60),
    IN_README("writers went from about {} %", lambda r: find_mean(r, "field-own-before")),
    IN_README("% to about {} %, while", lambda r: find_mean(r, "field-own-gentle")),
    IN_README("stayed at about {} %", lambda r: r["own-gentle"]["test"]["accuracy"]),
    IN_README("About {} pictures of each", lambda r: int(r["peers"]["data"].split()[0]) / 8, 5),
    IN_STUDY(
        "about {} % of test are right", lambda r: r["shipped"]["through_inference"]["accuracy"]
    ),
    IN_STUDY("about {} % with 0/O", lambda r: r["shipped"]["through_inference"]["alike"]),
    IN_STUDY("These are {} pictures of 8", lambda r: r["field"]["rows"][-1]["pictures"], 0),
    IN_STUDY(
        "teacher is worth about {} points",
        lambda r: find_validation(r, "taught-one") - find_validation(r, "taught-none"),
        0.05,
    ),
    IN_STUDY(
        "the small net is about {} points below",
        lambda r: find_validation(r, "before") - find_validation(r, "small-taught"),
        0.05,
    ),
    IN_STUDY("reaches in about {} s", lambda r: r["bench-baseline"]["baseline_seconds"]),
    IN_STUDY("ours takes about {} s", lambda r: r["bench-baseline"]["seconds"]),
    IN_STUDY("on validation after about {} s", lambda r: r["bench-gpu"]["seconds_to_target"]),
    IN_STUDY("and about {} s to compile", lambda r: r["bench-gpu"]["build_seconds"]),
]
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


def sentences(page: str) -> str:
    """Return a page on one line, without code and without what the study writes into it."""
    text = re.sub(r"```.*?```", "", tables.BLOCK.sub("", TEXTS[page]), flags=re.DOTALL)
    return " ".join(text.split())


def find_claim(claim: Claim) -> re.Match:
    matches = [*re.finditer(re.escape(claim.words).replace(r"\{\}", NUMBER), sentences(claim.page))]
    assert len(matches) == 1
    return matches[0]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_a_number_in_a_sentence_agrees_with_the_records(claim):
    number = float(find_claim(claim)[1].replace(",", ""))
    assert number == pytest.approx(claim.find(RECORDS), abs=claim.tolerance)


@pytest.mark.parametrize("page", TEXTS)
def test_what_is_about_a_number_is_held_to_the_records(page):
    held = {find_claim(claim).start(1) for claim in CLAIMS if claim.page == page}
    for match in re.finditer("[Aa]bout " + NUMBER, sentences(page)):
        assert match.start(1) in held, match[0]


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_records(page):
    assert tables.fill(TEXTS[page], RECORDS) == TEXTS[page], "-m images_for_readme.study tables"


@pytest.mark.parametrize("page", TEXTS)
def test_marks_stand_on_lines_of_their_own(page):
    for line in TEXTS[page].splitlines():
        if "<!--" in line:
            assert re.fullmatch(r"<!-- (table: \w+|output: \w+|end) -->", line)


@pytest.mark.parametrize("page", TEXTS)
def test_exact_percentages_stand_in_tables_only(page):
    assert re.findall(r"\d\.\d+ ?%", sentences(page)) == []


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    assert words[0] in {"python3", "docker", "torchrun", "ruff"}, "say how to check this one"
    parsers = {
        "inference.py": inference.parse,
        "train.py": train.parse,
        "images_for_readme.study": study.parse,
    }
    for number, word in enumerate(words):
        if word in parsers:
            parsers[word](words[number + 1 :])
        if words[number - 1] == "-m" and word.startswith(("tests.", "images_for_readme.")):
            word = word.replace(".", "/") + ".py"
        if word.endswith((".py", "requirements.txt")) or word.startswith("tests"):
            assert (ROOT / word).exists(), word


def test_the_first_two_commands_set_themselves_up():
    for command in COMMANDS[:2]:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_ci_runs_the_second_command():
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_shown_output_is_what_inference_prints():
    command = [sys.executable, "inference.py", "--input", "tests/samples", "--format", "csv"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, closing = RECORDS["samples"]["csv"]
    assert closing.partition(" (")[0] in run.stderr
    recorded = list(csv.DictReader(lines))
    for old, new in zip(recorded, csv.DictReader(run.stdout.splitlines()), strict=True):
        for key in ("path", "character", "lookalike", "error"):
            assert old[key] == new[key], "-m images_for_readme.study measure samples"
        assert float(old["confidence"]) == pytest.approx(float(new["confidence"]), abs=0.02)


def test_both_formats_that_are_shown_have_the_same_answers():
    rows = csv.DictReader(RECORDS["samples"]["csv"][:-1])
    codes = [f"{ord(row['character']):03d}, {row['path']}" for row in rows]
    assert RECORDS["samples"]["ascii"][:-1] == codes


def test_the_lines_of_python_print_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n([^`]*)```\s+prints `(.*?)`", README)
    assert snippets
    for code, printed in snippets:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        assert out.getvalue() == printed + "\n"


# Pages and pictures


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in ANCHORS[target.relative_to(ROOT).as_posix()], link


def test_pages_and_their_pictures_are_small():
    assert len(README.splitlines()) <= 290
    pictures = IMAGES.glob("*.png")
    assert sum(picture.stat().st_size for picture in pictures) <= 400_000
    assert sum(file.stat().st_size for file in IMAGES.iterdir() if file.is_file()) <= 1_000_000


def test_every_picture_is_shown():
    for picture in IMAGES.glob("*.png"):
        assert f"{picture.name})" in README + STUDY, picture


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_picture_is_drawn_again_as_it_is_kept(name, tmp_path):
    drawings.draw(name, RECORDS, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as new, Image.open(IMAGES / f"{name}.png") as kept:
        assert new.size == kept.size
        difference = np.subtract(new.convert("L"), kept.convert("L"), dtype=np.float32)
    assert np.abs(difference).mean() < 2, f"-m images_for_readme.study draw {name}"


# Records


def test_a_run_is_recorded_and_repeated_by_its_name(tiny_emnist, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RECORDS", tmp_path / "runs.jsonl")
    study.RECORDS.write_text("")
    files = ["--data", str(tiny_emnist), "--weights", str(tmp_path)]
    flags = ["--arch", "run1", "--epochs", "2", "--batch-size", "32", "--what", "a try"]
    study.main(["train", "mine", *flags, *files])
    record = study.read_records()["mine"]
    study.main(["train", "mine", *files])
    repeated = study.read_records()["mine"]
    assert record["what"] == "a try"
    assert record["settings"]["arch"] == "run1"
    assert len(record["curve"]["nll"]) == 2
    for key in ("what", "settings", "curve", "test"):
        assert repeated[key] == record[key]


@pytest.mark.parametrize(
    "record", [run for run in RUNS if "history" not in run], ids=lambda run: run["name"]
)
def test_a_run_can_be_repeated_or_is_said_to_be_history(record):
    config = study.find_config(record)
    settings = {name: str(getattr(config, name)) for name in record["settings"] if name != "one_in"}
    assert settings == {name: str(record["settings"][name]) for name in settings}


def test_only_what_cannot_be_repeated_is_said_to_be_history():
    for record in RUNS:
        if "history" in record:
            with pytest.raises(SystemExit):
                study.find_config(record)


def test_measured_weights_come_from_a_recorded_run_or_are_said_to_be_history():
    for record in RECORDS.values():
        if record["kind"] == "measured" and "history" not in record:
            weights = re.match(r"[\w.-]*\w", record["settings"]["weights"])[0]
            assert weights == "model.pt" or weights.removesuffix(".pt") in RECORDS, record["name"]


@pytest.mark.parametrize("name", ["shipped", "field", "scenes", "sizes", "samples"])
def test_what_was_measured_are_the_shipped_weights(name):
    weights = hashlib.sha256((ROOT / "model.pt").read_bytes()).hexdigest()
    settings = RECORDS[name]["settings"]
    assert settings["sha256"] == weights, f"-m images_for_readme.study measure {name}"
