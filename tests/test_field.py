"""Real pictures by other hands: what the shipped weights and the fit must reach on them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import inference
from images_for_readme import measure

FIELD = ROOT.parent / "shared" / "field"
BARS = {"accuracy": 93.6, "alike": 94.8, "alphabet": 93.6}  # per cent, means of the sets
LOWEST = 85.0  # per cent right of any set whose alphabet is known


def classify(folder: Path, file: Path, alphabet: str) -> list[dict]:
    """Return the answers to a set, in this process, which has imported torch already."""
    output = ["--format", "json", "--output", str(file)]
    inference.main(["--input", str(folder), "--alphabet", alphabet, "--workers", "1", *output])
    return measure.read_rows(file.read_text())


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> list[dict[str, float]]:
    """The scores of each set by a run of its own, to which the answers adapt."""
    if not FIELD.is_dir():
        pytest.skip(f"needs the field sets, {FIELD}")
    file = tmp_path_factory.mktemp("field") / "answers.json"
    scores = []
    for folder in filter(Path.is_dir, FIELD.iterdir()):
        rows = classify(folder, file, "0-9A-Z")
        alphabet = measure.find_alphabet(folder)
        told = rows if alphabet == "0-9A-Z" else classify(folder, file, alphabet)
        scores.append(measure.score(rows, told))
    return scores


@pytest.mark.parametrize("name", BARS)
def test_field_sets_reach_the_bar(scores, name):
    assert np.mean([score[name] for score in scores]) >= BARS[name], scores


def test_no_field_set_is_far_below_the_others(scores):
    assert min(score["alphabet"] for score in scores) >= LOWEST, scores
