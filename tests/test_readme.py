"""The READMEs: commands run or parse, links lead somewhere, figures are those of the records."""

import contextlib
import csv
import hashlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
import train

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "images_for_readme"
sys.path.insert(0, str(IMAGES))

import study  # noqa: E402

TEXTS = {page: page.read_text() for page in study.PAGES}
README = TEXTS[ROOT / "README.md"]
MARK = re.compile("<!--= .*?<!--/-->", re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
]


def test_figures_are_those_of_the_records():
    assert study.drifted() == [], "python3 images_for_readme/study.py tables"


def test_no_figure_is_typed_by_hand():
    for text in TEXTS.values():
        assert not re.findall(r"\d\.\d+ ?%", MARK.sub("", text))
        # a line that begins with a mark is raw HTML to GitHub: nothing but the mark may be on it
        assert not re.findall(r"^<!--= [^\n]*<!--/-->[^\n]+", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    assert words[0] in {"python3", "docker", "torchrun"}, "say how to check this one"
    for script, parse in {"inference.py": inference.parse, "train.py": train.parse}.items():
        if script in words:
            parse(words[words.index(script) + 1 :])
    for word in words:
        if word.endswith((".py", "requirements.txt")) or word.startswith("tests"):
            assert (ROOT / word).exists(), word


def test_the_two_first_commands_set_themselves_up_and_ci_runs_the_second():
    for command in COMMANDS[:2]:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_shown_output_is_what_inference_prints():
    command = [sys.executable, "inference.py", "--input", "tests/samples", "--format", "csv"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, told = study.records()["samples"]["csv"]
    assert told.partition(" (")[0] in run.stderr
    kept = list(csv.DictReader(lines))
    for row, new in zip(kept, csv.DictReader(run.stdout.splitlines()), strict=True):
        for key in ("path", "character", "lookalike", "error"):
            assert row[key] == new[key], "python3 images_for_readme/study.py measure samples"
        assert float(row["confidence"]) == pytest.approx(float(new["confidence"]), abs=0.02)
    codes = [f"{ord(row['character']):03d}, {row['path']}" for row in kept]
    assert study.records()["samples"]["ascii"][:-1] == codes


def test_the_lines_of_python_print_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = re.search(r"```python\n(.*?)```\s+prints `(.*?)`", README, re.DOTALL).groups()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    assert out.getvalue() == printed + "\n"


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), link
            heads = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert not anchor or anchor in anchors, link


def test_pages_and_pictures_are_small_and_used():
    pictures = list(IMAGES.glob("*.png"))
    shown = "".join(TEXTS.values())
    assert all(f"{picture.name})" in shown for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) <= 400_000
    assert sum(file.stat().st_size for file in IMAGES.iterdir() if file.is_file()) <= 1_000_000
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", study.PICTURES)
def test_picture_is_drawn_again_as_it_is_kept(name, tmp_path):
    study.draw(name, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as new, Image.open(IMAGES / f"{name}.png") as kept:
        assert new.size == kept.size
        difference = np.subtract(new.convert("L"), kept.convert("L"), dtype=np.float32)
    assert np.abs(difference).mean() < 2, f"python3 images_for_readme/study.py draw {name}"


def test_a_run_is_recorded_and_repeated_by_its_name(tiny_emnist, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RECORDS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(train, "load_splits", train.load_splits)  # to have it back
    study.RECORDS.write_text("")
    files, found = ["--data", str(tiny_emnist), "--weights", str(tmp_path)], []
    flags = ["--arch", "run1", "--epochs", "2", "--batch-size", "32", "--what", "a try"]
    for more in (flags, []):
        study.records.cache_clear()
        monkeypatch.setattr(sys, "argv", ["study.py", "train", "mine", *more, *files])
        study.main()
        found.append(study.records()["mine"])
    study.records.cache_clear()
    first, again = found
    assert (first["what"], first["settings"]["arch"]) == ("a try", "run1")
    assert len(first["curve"]["nll"]) == 2
    for key in ("settings", "curve", "test"):
        assert again[key] == first[key]


@pytest.mark.parametrize("name", ["shipped", "field", "sizes", "samples"])
def test_what_was_measured_are_the_shipped_weights(name):
    weights = hashlib.sha256((ROOT / "model.pt").read_bytes()).hexdigest()
    settings = study.records()[name]["settings"]
    assert settings["sha256"] == weights, f"python3 images_for_readme/study.py measure {name}"
