"""The READMEs: commands run or parse, links lead somewhere, figures are those of the records."""

import contextlib
import csv
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import inference
import train
from images_for_readme import codes, drawings, measure, study, tables

IMAGES = ROOT / "images_for_readme"
RECORDS = study.read_records()
RUNS = [record for record in RECORDS.values() if record["kind"] == "run"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in study.PAGES}
OF_SHIPPED_WEIGHTS = (*measure.PARTS, "peers", "bench-inference")  # the last by --keep
README = TEXTS["README.md"]
STUDY = TEXTS["images_for_readme/README.md"]
COMMANDS = [
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
]

# Numbers

TEST = RECORDS["shipped"]["test"]
THROUGH_INFERENCE = RECORDS["shipped"]["through_inference"]
FIELD = RECORDS["field"]["rows"][-1]  # the mean of the sets
BOXES = RECORDS["forms"]["rows"][-1]  # the mean of the kinds
DOUBT = {row["threshold"]: row for row in RECORDS["field"]["doubt"]}
VALIDATION = {name: run["validation"]["accuracy"] for name, run in RECORDS.items() if "test" in run}
GPU = RECORDS["bench-gpu"]
USUAL_LOOP = RECORDS["bench-baseline"]
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
CLAIMS = {  # words of a sentence, {} for its number: what the number is in the records
    "this gains about {} points": FIELD["accuracy"] - RECORDS["alone"]["rows"][-1]["accuracy"],
    "about {} % of the field sets are answered": DOUBT["0.9"]["answered"],
    "about {} % of these rightly": DOUBT["0.9"]["right"],
    "about {} % are left without": RECORDS["scenes"]["means"]["junk"],
    "Expect about {} % on EMNIST's": TEST["accuracy"],
    "about {} % of test are right": THROUGH_INFERENCE["accuracy"],
    "about {} % with 0/O": THROUGH_INFERENCE["alike"],
    "These are {} pictures of 13": FIELD["pictures"],
    "in boxes about {} % of whole": BOXES["of whole ones, %"],
    "about {} % of the empty ones are": BOXES["empty ones answered, %"],
    "is worth about {} points": VALIDATION["taught-one"] - VALIDATION["taught-none"],
    "is about {} points below": VALIDATION["before"] - VALIDATION["small-taught"],
    "reaches in about {} s": USUAL_LOOP["baseline_seconds"],
    "ours takes about {} s": USUAL_LOOP["seconds"],
    "20 epochs took about {} s": GPU["full_run_seconds"],
    "on validation after about {} s": GPU["seconds_to_target"],
    "and about {} s to compile": GPU["build_seconds"],
}


def sentences(text: str) -> str:
    """Return pages on one line, without code and without what the study writes into them."""
    text = re.sub(r"```.*?```", "", tables.BLOCK.sub("", text), flags=re.DOTALL)
    return " ".join(text.split())


def find_claims(words: str) -> list[re.Match]:
    pattern = re.escape(words).replace(r"\{\}", NUMBER)
    return [*re.finditer(pattern, sentences(README + STUDY))]


@pytest.mark.parametrize("words", CLAIMS)
def test_a_number_in_a_sentence_is_that_of_the_records_rounded(words):
    (match,) = find_claims(words)
    decimals = len(match[1].partition(".")[2])
    assert float(match[1].replace(",", "")) == pytest.approx(CLAIMS[words], abs=0.51 / 10**decimals)


def test_what_is_about_a_number_is_held_to_the_records():
    held = {match.start(1) for words in CLAIMS for match in find_claims(words)}
    for match in re.finditer("[Aa]bout " + NUMBER, sentences(README + STUDY)):
        assert match.start(1) in held, match[0]


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_records_and_exact_percentages_stand_there_only(page):
    assert tables.fill(TEXTS[page], RECORDS) == TEXTS[page], "-m images_for_readme.study tables"
    for line in TEXTS[page].splitlines():
        if "<!--" in line:
            assert re.fullmatch(r"<!-- (table: \w+|output: \w+|end) -->", line)
    assert re.findall(r"\d\.\d+ ?%", sentences(TEXTS[page])) == []


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    assert words[0] in {"python3", "docker", "torchrun", "ruff"}, "say how to check this one"
    parsers = {
        "inference.py": inference.parse,
        "train.py": train.parse,
        "images_for_readme.codes": codes.parse,
        "images_for_readme.study": study.parse,
    }
    for number, word in enumerate(words):
        if word in parsers:
            parsers[word](words[number + 1 :])
        if words[number - 1] == "-m" and word.startswith(("tests.", "images_for_readme.")):
            word = word.replace(".", "/") + ".py"
        if word.endswith((".py", "requirements.txt")) or word.startswith("tests"):
            assert (ROOT / word).exists(), word


def test_the_first_two_commands_set_themselves_up_and_ci_runs_the_second():
    for command in COMMANDS[:2]:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_shown_output_is_what_inference_prints_in_both_formats(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    assert inference.main(["--input", "tests/samples", "--format", "csv"]) == 0
    out, err = capfd.readouterr()
    *lines, closing = RECORDS["samples"]["csv"]
    assert closing.partition(" (")[0] in err
    recorded = list(csv.DictReader(lines))
    for old, new in zip(recorded, csv.DictReader(out.splitlines()), strict=True):
        for key in ("path", "character", "lookalike", "error"):
            assert old[key] == new[key], "-m images_for_readme.study measure samples"
        assert float(old["confidence"]) == pytest.approx(float(new["confidence"]), abs=0.02)
    codes = [f"{ord(row['character']):03d}, {row['path']}" for row in recorded]
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


def find_anchors(page: Path) -> set[str]:
    """Return what the headings of a page can be linked by, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in find_anchors(target), link


def test_pages_and_pictures_are_small_and_every_picture_is_shown():
    assert len(README.splitlines()) <= 245
    pictures = list(IMAGES.glob("*.png"))
    assert sum(picture.stat().st_size for picture in pictures) <= 400_000
    assert sum(file.stat().st_size for file in IMAGES.iterdir() if file.is_file()) <= 1_000_000
    for picture in pictures:
        assert f"{picture.name})" in README + STUDY, picture


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_picture_is_drawn_again_as_it_is_kept(name, tmp_path):
    drawings.draw(name, RECORDS, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as new, Image.open(IMAGES / f"{name}.png") as kept:
        assert new.size == kept.size
        difference = np.subtract(new.convert("L"), kept.convert("L"), dtype=np.float32)
    assert np.abs(difference).mean() < 2, f"-m images_for_readme.study draw {name}"


# Records


def test_runs_can_be_repeated_with_nothing_left_to_defaults_or_are_said_to_be_history():
    for record in RUNS:
        if "history" in record:
            with pytest.raises(SystemExit):
                study.find_config(record)
        else:
            settings = dict(record["settings"])
            settings.pop("one_in", None)
            assert study.list_settings(study.find_config(record)) == settings, record["name"]


def test_measured_weights_come_from_a_recorded_run_or_are_said_to_be_history():
    for record in RECORDS.values():
        if record["kind"] == "measured" and "history" not in record:
            weights = re.match(r"[\w.-]*\w", record["settings"]["weights"])[0]
            assert weights == "model.pt" or weights.removesuffix(".pt") in RECORDS, record["name"]


@pytest.mark.parametrize("name", OF_SHIPPED_WEIGHTS)
def test_what_the_readme_shows_is_of_the_shipped_weights(name):
    settings = RECORDS[name]["settings"]
    digest = study.digest(ROOT / "model.pt")
    assert settings["sha256"] == digest, f"-m images_for_readme.study measure {name}"


def test_the_readme_shows_no_other_records():
    known = {name: RECORDS[name] for name in OF_SHIPPED_WEIGHTS}
    assert tables.fill(README, known) == README
