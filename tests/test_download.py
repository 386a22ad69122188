"""How train.py gets EMNIST: by torchvision, from a local server that may misbehave, or by hand."""

import gzip
import hashlib
import io
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import EMNIST

RAW = Path("EMNIST", "raw")


@pytest.fixture(scope="module")
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
    return buffer.getvalue()


@pytest.fixture
def serve(archive, monkeypatch):
    """Return a function that puts EMNIST on a server which sends what it is given, or stalls."""
    servers, released = [], threading.Event()

    def start(sent: bytes, stall: bool = False) -> None:
        class Request(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if sent else 404)
                self.send_header("Content-Length", str(len(archive) if stall else len(sent)))
                self.end_headers()
                self.wfile.write(sent)
                released.wait(30 * stall)

            def log_message(self, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Request))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/gzip.zip"
        monkeypatch.setattr(EMNIST, "url", url)

    monkeypatch.setattr(EMNIST, "url", "http://127.0.0.1:9/gzip.zip")  # nobody is there
    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_archive_put_there_by_hand_needs_no_network(run_train, serve, archive, files, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gzip.zip").write_bytes(archive)
    assert run_train("--epochs", 1, "--data", tmp_path / "data").status == 0
    assert content(tmp_path / "data") == files | {"gzip.zip": archive}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("absent", "HTTP Error 404"), ("cut short", "not found or corrupted"), ("stall", "timed out"),
     ("web page", "not found or corrupted"), ("no network", "Connection refused")],
)  # fmt: skip
def test_failed_download_is_one_line_leaves_nothing_and_can_be_repeated(
    run_train, serve, archive, files, tmp_path, monkeypatch, kind, reason
):
    patience, data = socket.setdefaulttimeout, tmp_path / "data"
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 100))
    sent = {"absent": b"", "web page": b"<html>Sign in!</html>"}.get(kind, archive[:-2000])
    if kind != "no network":
        serve(sent, stall=kind == "stall")
    error = run_train("--data", data).error
    assert error.startswith(f"no EMNIST in {data}: ")
    assert reason in error
    assert f"put {EMNIST.url} (562 MB) into {data} by other means" in error
    assert content(data) == {}

    serve(archive)
    status, _, err = run_train("--epochs", 1, "--data", data)
    assert status == 0
    assert f"{data}: EMNIST is not there yet: {EMNIST.url}, 562 MB" in err
    assert content(data) == files  # these eight and nothing else
    serve(b"")
    assert run_train("--epochs", 1, "--data", data).status == 0  # without a download


def test_damaged_file_is_one_line_that_says_what_to_delete(run_train, files, tmp_path):
    data, bad = tmp_path / "data", str(RAW / "emnist-letters-train-images-idx3-ubyte")
    (data / RAW).mkdir(parents=True)
    for damaged in (files[bad][:-30], b"<html>" * 9, b""):
        for path, whole in (files | {bad: damaged}).items():
            (data / path).write_bytes(whole)
        error = run_train("--data", data).error
        assert error.startswith(f"no EMNIST in {data}: ")
        assert f": delete {data}/EMNIST, put " in error
