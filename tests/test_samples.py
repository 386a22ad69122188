"""The shipped weights read tests/samples; the name of a sample begins with its character."""

from pathlib import Path

import numpy as np
from conftest import ROOT

import CNN
import inference
import picture
from images_for_readme import samples

FILES = sorted((ROOT / "tests" / "samples").iterdir())
RIGHT, RIGHT_BUT_FOR_LOOKALIKES = 41, 42  # of 43; O and 0, among others, differ by context alone


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


def test_samples_are_drawn_by_our_own_code(tmp_path):
    samples.write_samples(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    for path in FILES:
        kept = picture.to_grey(picture.read(path)).astype(float)
        drawn = picture.to_grey(picture.read(tmp_path / path.name)).astype(float)
        # encoders and resampling may change a little from one Pillow to the next
        assert np.abs(kept - drawn).mean() < 2, path.name
