"""How train.py gets EMNIST: by torchvision, from wherever its address leads to, or by hand."""

import gzip
import hashlib
import io
import socket
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import EMNIST

NOBODY = "http://127.0.0.1:9/gzip.zip"  # refuses connections
GZIP = "EMNIST/raw/gzip.zip"


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def files(tiny_emnist) -> dict[str, bytes]:
    """The eight files of the tiny EMNIST, by their place in --data."""
    return content(tiny_emnist)


@pytest.fixture
def archive(files, monkeypatch) -> bytes:
    """The files packed as NIST's gzip.zip has them, with one that nobody wants."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for path, data in {"emnist-mnist-test-labels-idx1-ubyte": b"", **files}.items():
            packed.writestr(f"gzip/{Path(path).name}.gz", gzip.compress(data, 1))
    monkeypatch.setattr(EMNIST, "md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(EMNIST, "url", NOBODY)
    return buffer.getvalue()


@pytest.fixture
def address(tmp_path):
    """Where tmp_path/gzip.zip is served."""
    serve = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}/gzip.zip"
        server.shutdown()


def test_archive_put_there_by_hand_needs_no_network(run_train, archive, files, tmp_path):
    data = tmp_path / "data"
    (data / GZIP).parent.mkdir(parents=True)
    (data / GZIP).write_bytes(archive)
    assert run_train("--epochs", 1, "--data", data).status == 0
    assert content(data) == files | {GZIP: archive}
    (data / "EMNIST/raw/emnist-letters-test-labels-idx1-ubyte").unlink()  # unpacking was cut short
    assert run_train("--epochs", 1, "--data", data).status == 0
    assert content(data) == files | {GZIP: archive}


def test_failed_downloads_and_a_damaged_archive_are_told_and_it_can_be_repeated(
    run_train, archive, files, address, tmp_path, monkeypatch
):
    data = tmp_path / "data"
    (data / GZIP).parent.mkdir(parents=True)
    (data / GZIP).write_bytes(b"cut short")
    (tmp_path / "gzip.zip").write_bytes(archive[:-2000])
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 100))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stalling = f"http://127.0.0.1:{silent.getsockname()[1]}/gzip.zip"
        for url, reason in (
            (NOBODY, "Connection refused"),
            (stalling, "timed out"),
            (address, "not found or corrupted"),  # as it is cut short
        ):
            monkeypatch.setattr(EMNIST, "url", url)
            outcome = run_train("--data", data)
            assert f"{data / GZIP} is damaged or incomplete: it is downloaded" in outcome.err
            assert outcome.error.startswith(f"no EMNIST in {data}: ")
            assert reason in outcome.error
            assert outcome.error.endswith(f"without a network, put {url} (562 MB) there first")

    (tmp_path / "gzip.zip").write_bytes(archive)
    status, _, err = run_train("--epochs", 1, "--data", data)
    assert status == 0
    assert f"EMNIST is not in {data}/EMNIST/raw yet: {address}, 562 MB" in err
    assert content(data) == files | {GZIP: archive}


def test_damaged_file_is_one_line_that_says_what_to_delete(run_train, files, tmp_path):
    data, bad = tmp_path / "data", "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"
    (data / bad).parent.mkdir(parents=True)
    for damaged in (files[bad][:-30], b""):
        for path, whole in (files | {bad: damaged}).items():
            (data / path).write_bytes(whole)
        error = run_train("--data", data).error
        assert error.startswith(f"no EMNIST in {data}: ")
        assert f": delete all but gzip.zip in {data}/EMNIST/raw and start again" in error
