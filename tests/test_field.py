"""Real pictures by other hands: what the shipped weights and the fit must reach on them."""

import json
from pathlib import Path

import numpy as np
import pytest

import CNN
import inference

ROOT = Path(__file__).resolve().parents[1]
FIELD = ROOT.parent / "shared" / "field"
BARS = (93.6, 94.8, 93.6)  # mean of sets: all; 0/O and 1/I/L merged; the set's alphabet known
LOWEST = 85.0  # of any set, its alphabet known
MERGED = str.maketrans("OIL", "011")


@pytest.mark.skipif(not FIELD.is_dir(), reason=f"needs the field sets, {FIELD}")
def test_field_sets_reach_the_bars(capfd: pytest.CaptureFixture) -> None:
    sets: dict[str, list[tuple[str, list[str]]]] = {}
    for folder in filter(Path.is_dir, FIELD.iterdir()):  # each alone, as its share of digits is
        inference.main(["--input", str(folder), "--format", "json", "--topk", "36"])
        for answer in map(json.loads, capfd.readouterr().out.splitlines()):
            ranked = [answer["character"], *answer["alternatives"]]
            sets.setdefault(folder.name, []).append((Path(answer["path"]).parent.name, ranked))
    scores = {name: score(answers) for name, answers in sets.items()}
    mean = np.mean(list(scores.values()), axis=0)
    assert (mean >= BARS).all(), scores
    assert min(known for *_, known in scores.values()) >= LOWEST, scores


def score(answers: list[tuple[str, list[str]]]) -> tuple[float, float, float]:
    """Return per cent right as ../shared/field/score.py does, from characters ranked by doubt."""
    labels = {label for label, _ in answers}
    parts = (CNN.ALPHABET[:10], CNN.ALPHABET[10:], CNN.ALPHABET)
    alphabet = next(part for part in parts if labels <= set(part))
    right = [
        (
            ranked[0] == label,
            ranked[0].translate(MERGED) == label.translate(MERGED),
            next(c for c in ranked if c in alphabet) == label,
        )
        for label, ranked in answers
    ]
    return tuple(100 * np.mean(right, axis=0))
