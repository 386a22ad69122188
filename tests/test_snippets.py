"""The snippets in Codes in boxes and, in the study, in Without torch, run as they stand there."""

import contextlib
import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from strokes import drawn

import CNN
from picture import prepare

CODES = {"anna": "40716352", "ben": "40716852", "gap": "4071 352"}
SHOWN = "CNN.py picture.py inference.py report.html model.pt tests images_for_readme".split()


@pytest.fixture
def snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return the snippets of a section, in a folder that looks like the project's."""
    for name in SHOWN:
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def snippets_of(section: str, page: str) -> list[str]:
        text = (ROOT / page).read_text()
        found = re.search(rf"^##+ {section}\n(.*?)(?:^##|\Z)", text, re.DOTALL | re.MULTILINE)
        return re.findall(r"```(?:python|bash)\n(.*?)```", found[1], re.DOTALL)

    return snippets_of


def test_codes_in_boxes_are_cut_read_and_looked_up(snippets, tmp_path):
    cut, look_up = snippets("Codes in boxes", "README.md")
    (tmp_path / "cells").mkdir()
    for person, code in CODES.items():
        strip = Image.new("L", (8 * 60, 60), 255)
        for i, character in enumerate(code):
            if character != " ":
                strip.paste(drawn(character, 40, seed=i), (60 * i + 10, 10))
            ImageDraw.Draw(strip).rectangle((60 * i, 0, 60 * i + 59, 59), outline=90)
        strip.save(tmp_path / "form.png")
        exec(cut, {})
        for cell in (tmp_path / "cells").glob("form_*.png"):
            cell.rename(cell.with_name(cell.name.replace("form", person)))
    valid = ["40716352", "40716852", "40716359", "12345678"]
    (tmp_path / "valid.txt").write_text("\n".join(valid))
    run = subprocess.run(look_up, shell=True, capture_output=True, text=True)

    rows = list(csv.DictReader(run.stdout.splitlines()))
    assert [row["form"] for row in rows] == [f"cells/{person}" for person in sorted(CODES)]
    for row, (_, code) in zip(rows, sorted(CODES.items()), strict=True):
        assert row["read"] == code
        assert row["likeliest"] == code.replace(" ", "6")
        assert row["do"] == "accept"


def test_without_torch_the_probabilities_are_the_same(snippets, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export, use = snippets("Without torch", "images_for_readme/README.md")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(export, {})
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["model.onnx"]
    alone = ["-c", f"import sys; sys.modules['torch'] = None\n{use}"]
    run = subprocess.run([sys.executable, *alone], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("Q\n", 0), run.stderr

    files = sorted((tmp_path / "tests" / "samples").iterdir())
    images = np.stack([prepare(str(file), CNN.SIZE) for file in files])
    net = CNN.load("model.pt")
    with torch.inference_mode():
        logits = net(torch.from_numpy(images).unsqueeze(1) / 255)
    expected = (logits / net.card.temperature).softmax(1).numpy()
    session = onnxruntime.InferenceSession("model.onnx")
    for count in (1, len(files)):
        batch = images[:count, None] / np.float32(255)
        probabilities = session.run(None, {"images": batch})[0]
        assert np.abs(probabilities - expected[:count]).max() < 1e-4
