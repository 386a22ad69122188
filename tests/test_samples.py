"""The pictures of tests/samples: what they cover, and that the shipped weights read them."""

from pathlib import Path

import numpy as np
import strokes
from conftest import ROOT
from PIL import Image

import CNN
import inference

SAMPLES = Path(__file__).parent / "samples"
FILES = sorted(SAMPLES.iterdir())
RIGHT, RIGHT_BUT_FOR_LOOKALIKES = 41, 42  # of 43; O and 0, among others, differ by context alone


def test_samples_are_what_strokes_draws(tmp_path):
    strokes.write_samples(tmp_path)
    assert {path.name[0] for path in FILES} == set(CNN.ALPHABET)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    for path in FILES:
        with Image.open(path) as kept, Image.open(tmp_path / path.name) as drawn:
            assert (kept.mode, kept.size) == (drawn.mode, drawn.size)
            difference = _grey(kept) - _grey(drawn)
        # encoders and resampling may change a little from one Pillow to the next
        assert np.abs(difference).mean() < 2, path.name


def _grey(picture: Image.Image) -> np.ndarray:
    """Return a picture as float64, white 255, whatever its mode."""
    white = {"I;16": 65535, "F": 1.0}.get(picture.mode)
    if white is None:
        picture, white = picture.convert("RGBA"), 255
    return np.asarray(picture, np.float64) * (255 / white)


def test_shipped_weights_read_the_samples(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert inference.main(["--input", "tests/samples"]) == 0
    lines = [line.split(", ", 1) for line in capfd.readouterr().out.splitlines()]
    assert [path for _, path in lines] == [f"tests/samples/{path.name}" for path in FILES]

    answers = {Path(path).name: chr(int(code)) for code, path in lines}
    wrong = {name: answer for name, answer in answers.items() if name[0] != answer}
    groups = [set(group) for group in CNN.load(ROOT / "model.pt").card.lookalikes]
    unlike = {n: a for n, a in wrong.items() if not any({n[0], a} <= group for group in groups)}
    assert len(FILES) - len(wrong) >= RIGHT, wrong
    assert len(FILES) - len(unlike) >= RIGHT_BUT_FOR_LOOKALIKES, unlike
