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


REASONS = {
    "absent": "HTTP Error 404", "cut short": "not found or corrupted", "stall": "timed out",
    "web page": "not found or corrupted", "no network": "Connection refused",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_failed_download_is_one_line_and_can_be_repeated(
    run_train, archive, files, address, tmp_path, monkeypatch, kind
):
    data, source, patience = tmp_path / "data", tmp_path / "gzip.zip", socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 100))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        stalling = f"http://127.0.0.1:{silent.getsockname()[1]}/gzip.zip"
        url = {"no network": NOBODY, "stall": stalling}.get(kind, address)
        monkeypatch.setattr(EMNIST, "url", url)
        if kind in ("cut short", "web page"):
            source.write_bytes(archive[:-2000] if kind == "cut short" else b"<html>Sign in!</html>")
        error = run_train("--data", data).error
    assert error.startswith(f"no EMNIST in {data}: ")
    assert REASONS[kind] in error
    assert error.endswith(f"without a network, put {url} (562 MB) there first")

    source.write_bytes(archive)
    monkeypatch.setattr(EMNIST, "url", address)
    status, _, err = run_train("--epochs", 1, "--data", data)
    assert status == 0
    assert f"EMNIST is not in {data}/EMNIST/raw yet: {address}, 562 MB" in err
    assert content(data) == files | {GZIP: archive}


def test_a_damaged_archive_that_was_put_there_is_named(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(EMNIST, "url", NOBODY)
    (tmp_path / GZIP).parent.mkdir(parents=True)
    (tmp_path / GZIP).write_bytes(b"cut short")
    outcome = run_train("--data", tmp_path)
    assert f"{tmp_path / GZIP} is damaged or incomplete: it is downloaded again" in outcome.err
    assert (tmp_path / GZIP).read_bytes() == b"cut short"


def test_damaged_file_is_one_line_that_says_what_to_delete(run_train, files, tmp_path):
    data, bad = tmp_path / "data", "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"
    (data / bad).parent.mkdir(parents=True)
    for damaged in (files[bad][:-30], b"<html>" * 9, b""):
        for path, whole in (files | {bad: damaged}).items():
            (data / path).write_bytes(whole)
        error = run_train("--data", data).error
        assert error.startswith(f"no EMNIST in {data}: ")
        assert f": delete all but gzip.zip in {data}/EMNIST/raw and start again" in error
