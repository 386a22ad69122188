"""What several tests need: where the project is, and an EMNIST of our own drawing."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import strokes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds the three scripts."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_emnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `train.py --data`: 4 pictures a class to train on, 2 to test on."""
    return strokes.write_tiny_emnist(tmp_path_factory.mktemp("emnist"))


@pytest.fixture
def disk_for() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
