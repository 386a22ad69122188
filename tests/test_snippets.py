"""The README's snippets in Without torch, run as they stand there."""

import contextlib
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

import CNN
from picture import prepare


@pytest.fixture
def snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return the snippets of a section, in a folder that looks like the project's."""
    for name in ("CNN.py", "picture.py", "inference.py", "report.html", "model.pt", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def snippets_of(section: str) -> list[str]:
        text = (ROOT / "README.md").read_text()
        found = re.search(rf"^## {section}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
        return re.findall(r"```(?:python|bash)\n(.*?)```", found[1], re.DOTALL)

    return snippets_of


def printed(snippet: str, names: dict) -> list[list[str]]:
    """Run a snippet; return the words of each line that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet, names)
    return [line.split() for line in out.getvalue().splitlines()]


def test_without_torch_the_probabilities_are_the_same(snippets, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export, use = snippets("Without torch")
    printed(export, {})
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
