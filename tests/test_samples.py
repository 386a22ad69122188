"""The shipped weights read tests/samples; the name of a sample begins with its character."""

from pathlib import Path

from conftest import ROOT

import CNN
import inference

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
