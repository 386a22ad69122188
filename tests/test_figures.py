"""The README's figures: the records they are drawn from, and that they can be drawn again."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train

IMAGES = Path(__file__).resolve().parent.parent / "images_for_readme"
sys.path.insert(0, str(IMAGES))

import figures  # noqa: E402
import study  # noqa: E402

RECORDS = {path.stem: json.loads(path.read_text()) for path in (IMAGES / "runs").glob("*.json")}
MEASURED = ("shipped", "known", "sizes", "coverage", "reliability", "field", "framing", "samples")
# The origin's table: net, batch, optimizer, learning rate, weight decay, epochs, Xavier, warm-up
ORIGIN = {
    "run1": ("run1", 64, "adamw", 1e-4, 0.1, 5, False, 0),
    "run2": ("run1", 64, "adamw", 1e-4, 0.1, 5, True, 200),
    "run3": ("run1", 128, "sgd", 1e-4, 1e-4, 5, True, 500),
    "run4": ("run1", 128, "adagrad", 1e-4, 1e-4, 5, True, 500),
    "run5": ("run1", 128, "adam", 1e-5, 1e-4, 5, True, 500),
    "run6": ("run1", 128, "adamw", 1e-5, 1e-4, 5, True, 500),
    "run7": ("run7", 128, "adamw", 1e-4, 1e-4, 5, True, 500),
    "run8": ("run8", 64, "adamw", 1e-4, 1e-4, 5, True, 500),
    "run9": ("run8", 64, "adamw", 1e-4, 1e-4, 30, True, 500),
}
COLUMNS = ("arch", "batch_size", "optimizer", "lr", "weight_decay", "epochs", "xavier", "warmup")


def bound(settings: dict) -> dict:
    """Return all settings of a planned run, defaults included."""
    settings = {"one_in": 1} | settings
    one_in = settings.pop("one_in")
    return train.bound_settings(train.Config(**settings)) | {"one_in": one_in}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_is_drawn_again_as_it_is_kept(name: str, tmp_path: Path) -> None:
    figures.save(name, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as new, Image.open(IMAGES / f"{name}.png") as kept:
        assert new.size == kept.size
        assert kept.width >= 800
        difference = np.subtract(new.convert("L"), kept.convert("L"), dtype=np.float32)
    assert np.abs(difference).mean() < 2  # of 255; another matplotlib may move a letter


def test_figures_are_small() -> None:
    assert sum(path.stat().st_size for path in IMAGES.glob("*.png")) < 1_000_000


@pytest.mark.parametrize("name", RECORDS)
def test_record_says_what_was_run_where_and_on_what(name: str) -> None:
    record = RECORDS[name]
    assert record["settings"]
    assert "torch" in record["machine"]
    assert record["data"]


@pytest.mark.parametrize("name", ORIGIN)
def test_settings_of_the_nine_runs_are_the_origins(name: str) -> None:
    settings = bound(study.plan()[name])
    assert tuple(settings[column] for column in COLUMNS) == ORIGIN[name]
    assert (settings["schedule"], settings["augment"], settings["ema"]) == ("constant", "none", 0)
    assert settings["one_in"] == 1


def test_no_run_is_listed_twice() -> None:
    runs = study.plan() | study.fair_plan()
    assert len(runs) == len(study.plan()) + len(study.fair_plan())
    seen: dict[str, str] = {}
    for name, settings in runs.items():
        other = seen.setdefault(json.dumps(bound(settings), sort_keys=True), name)
        assert other == name


def test_finished_runs_had_the_settings_that_are_planned() -> None:
    runs = study.plan() | study.fair_plan()
    finished = runs.keys() & RECORDS.keys()
    assert {"run1", "run8", "default-0", "default-4", "origin-short"} <= finished
    for name in finished:
        assert {"one_in": 1} | RECORDS[name]["settings"] == bound(runs[name]), name
        assert len(RECORDS[name]["history"]) == RECORDS[name]["settings"]["epochs"], name


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_are_the_shipped_weights(name: str, root: Path) -> None:
    weights = hashlib.sha256((root / "model.pt").read_bytes()).hexdigest()
    assert RECORDS[name]["settings"]["sha256"] == weights, "run images_for_readme/measure.py"


def test_accuracy_is_the_same_by_every_way() -> None:
    accuracy = RECORDS["shipped"]["test"]["accuracy"]
    confusion = np.array(RECORDS["shipped"]["confusion"])
    bins = RECORDS["reliability"]["test"]
    ways = [
        100 * np.trace(confusion) / confusion.sum(),
        100 * np.dot(bins["counts"], bins["right"]) / sum(bins["counts"]),
        RECORDS["coverage"]["test"]["right"][0],
        RECORDS["known"]["accuracy"],
    ]
    assert ways == pytest.approx([accuracy] * len(ways), abs=0.01)
    gaps = np.abs(np.subtract(bins["right"], bins["confidence"]))
    error = np.dot(gaps, bins["counts"]) / sum(bins["counts"])
    assert error == pytest.approx(bins["ece"], abs=1e-4)
