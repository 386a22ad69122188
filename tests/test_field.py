"""Real pictures by other hands: what the shipped weights and the fit must reach on them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import inference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "images_for_readme"))

import study  # noqa: E402

FIELD = ROOT.parent / "shared" / "field"
BARS = (93.6, 94.8, 93.6)  # mean of sets: all; 0/O and 1/I/L merged; the set's alphabet known
LOWEST = 85.0  # of any set, its alphabet known


@pytest.mark.skipif(not FIELD.is_dir(), reason=f"needs the field sets, {FIELD}")
def test_field_sets_reach_the_bars(capfd):
    scores = {}
    for folder in filter(Path.is_dir, FIELD.iterdir()):  # each alone, as its share of digits is
        inference.main(["--input", str(folder), "--format", "json", "--topk", "36"])
        rows = map(json.loads, capfd.readouterr().out.splitlines())
        named = [row | {"truth": Path(row["path"]).parent.name} for row in rows]
        scores[folder.name] = study.score(named)
    assert (np.mean(list(scores.values()), axis=0) >= BARS).all(), scores
    assert min(known for *_, known in scores.values()) >= LOWEST, scores
