"""The README: its commands run or parse, its tables are those of the runs, its tests exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inference
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "images_for_readme"))

import tables  # noqa: E402

COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_tables_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert tables.fill(README) == README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)
    scripts = {"inference.py": inference.parse, "train.py": train.parse}
    for script, parse in scripts.items():
        if script in words:
            parse(words[words.index(script) + 1 :])
    for word in words:
        if word.endswith((".py", ".txt")) or word.startswith("tests"):
            assert (ROOT / word).exists(), word
    assert words[0] in {"python3", "docker", "torchrun"}, "say how to check this one"


def test_the_two_first_commands_set_themselves_up_and_ci_runs_the_second() -> None:
    first, second = COMMANDS[:2]
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


FIRST = r"inference\.py --input tests/samples\n```\n\n```\n"


@pytest.mark.parametrize(
    ("form", "shown", "fewest"),
    [("ascii", rf"{FIRST}(.*?)```", 5), ("csv", r"```\n(path,character,.*?)```", 4)],
)
def test_shown_output_is_what_inference_prints(form: str, shown: str, fewest: int) -> None:
    shown = re.search(shown, README, re.DOTALL)
    command = [sys.executable, "inference.py", "--input", "tests/samples", "--format", form]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in shown[1].splitlines() if line != "..."]
    assert len(lines) >= fewest
    assert set(lines) <= set(run.stdout.splitlines())


def test_figures_outside_the_tables() -> None:
    parameters = tables.record("shipped")["parameters"]
    assert f"{parameters / 1e6:.2f} M parameters" in README
    command = [sys.executable, "-m", "pytest", "--collect-only"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    collected = re.search("([0-9]+) tests collected", run.stdout)[1]
    assert f"\n{collected} passed\n" in README


def test_tests_named_in_the_sturdiness_table_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 15
    assert named <= defined, named - defined


def test_pictures_are_there() -> None:
    linked = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert linked
    assert all((ROOT / path).is_file() for path in linked)
