"""What several tests need: a tiny EMNIST, weights, a run of train.py here or in a fork."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import strokes
import torch

import CNN

os.environ.setdefault("OMP_NUM_THREADS", "1")  # quickest for so little, several at a time
os.environ.pop("PYTHONUNBUFFERED", None)  # stdout as users have it
ROOT = Path(__file__).resolve().parent.parent
CNN.ARCHITECTURES["tiny"] = partial(CNN.two_blocks, 16, 32, 64)  # learns in a second
SHORT = ["--arch", "tiny", "--batch-size", "16", "--epochs", "3", "--warmup", "5"]
SHORT += ["--device", "cpu", "--no-wandb"]
FORKS = multiprocessing.get_context("forkserver")  # a process costs a fork, no import of torch
FORKS.set_forkserver_preload(["train", "conftest"])
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"  # where it finds them


@pytest.fixture(scope="session")
def tiny_emnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `train.py --data`: 4 pictures a class to train on, 2 to test on."""
    return strokes.write_tiny_emnist(tmp_path_factory.mktemp("emnist"))


@pytest.fixture
def config(tiny_emnist: Path, tmp_path: Path):
    """The Config of a run of 24 short steps."""
    import train

    files = ["--data", str(tiny_emnist), "--out", str(tmp_path / "model.pt")]
    return train.parse([*SHORT, *files, "--precision", "float32"])


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of no merit whose answers differ from picture to picture, with a temperature."""
    torch.manual_seed(5)
    net = CNN.Net().train()
    drawn = np.stack([strokes.emnist_picture(c, strokes.hand(1)) for c in CNN.ALPHABET])
    with torch.no_grad():
        for _ in range(30):  # until the norms know what they normalise
            net(torch.from_numpy(drawn).unsqueeze(1) / 255)
        net.fc2.weight.mul_(4)
    net.card.temperature = 1.7
    net.card.lookalikes = ["0O", "1IL"]
    width = net.fc2.in_features
    everything_is_typical = 1e-3 * torch.eye(width), torch.zeros(36, width), 1.0
    net.card.statistics = CNN.ClassStatistics(*everything_is_typical, torch.zeros(36, 0, width))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    CNN.save(net, path)
    return path


@pytest.fixture
def disk_for(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python 3.11 would leave bytecode cut short, and fail on it ever after (cpython#126606)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """Put back what train.py sets for its whole process; obey Ctrl-C, also in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    socket.setdefaulttimeout(None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_in_fork(said: Path, *flags: object, **how: object) -> multiprocessing.Process:
    """Run train.py in a process of its own; what it says goes to a file. how: see _train."""
    process = FORKS.Process(target=_train, args=(said, list(map(str, flags))), kwargs=how)
    process.start()
    return process


def _train(
    said: Path, flags: list[str], environ: Mapping = {}, stdout: Path | None = None, prepare=None
) -> None:
    import train

    os.environ.update(environ)
    for number, path in ((1, stdout or said), (2, said)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if prepare:
        prepare()
    sys.exit(train.main([*SHORT, *flags]))


@contextmanager
def signal_at(step: int, number: signal.Signals) -> Iterator[None]:
    """Let a signal come in a step of a training in this process."""
    import train

    learning_rate = train.learning_rate

    def strike(at: int, *rest: object) -> float:
        if at == step:
            os.kill(os.getpid(), number)
        return learning_rate(at, *rest)

    with patch.object(train, "learning_rate", strike):
        yield


class Outcome(NamedTuple):
    """How a script ended, and all that it said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line for the user of a training that could not go on."""
        *before, line = self.err.splitlines()
        assert (self.status, self.out) == (1, "")
        assert line.startswith("train.py: error: ")
        assert "error: " not in "".join(before)
        return line.removeprefix("train.py: error: ")


@pytest.fixture
def run_train(tiny_emnist: Path, tmp_path: Path, capsys) -> Callable:
    """Run train.py in this process on the tiny EMNIST, 8 steps an epoch, 24 by default."""
    import train

    plain = [*SHORT, "--data", tiny_emnist, "--out", tmp_path / "model.pt"]

    def run(*flags: object) -> Outcome:
        capsys.readouterr()
        try:
            status, error = train.main([str(word) for word in (*plain, *flags)]), ""
        except SystemExit as end:  # its text is what the interpreter would print
            status, error = (1, f"{end}\n") if isinstance(end.code, str) else (end.code, "")
        out, err = capsys.readouterr()
        return Outcome(status, out, err + error)

    return run
