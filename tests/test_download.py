"""How train.py gets EMNIST: from a local HTTP server that misbehaves, and from a damaged folder."""

import gzip
import hashlib
import http.server
import io
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import train

COUNTS = {  # by stem; as many per class as EMNIST has, in small
    "emnist-digits-train": 40,
    "emnist-digits-test": 20,
    "emnist-letters-train": 52,
    "emnist-letters-test": 26,
}


def idx(items: np.ndarray) -> bytes:
    return struct.pack(f">{1 + items.ndim}I", 0x800 + items.ndim, *items.shape) + items.tobytes()


def tiny_files(seed: int = 0) -> dict[str, bytes]:
    """Return EMNIST's eight files in small: name and content."""
    random, files = np.random.default_rng(seed), {}
    for stem, count in COUNTS.items():
        low, classes = (1, 26) if "letters" in stem else (0, 10)
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{stem}-images-idx3-ubyte"] = idx(images)
        files[f"{stem}-labels-idx1-ubyte"] = idx((np.arange(count) % classes + low).astype("u1"))
    return files


def pack(files: dict[str, bytes]) -> bytes:
    """Pack files as NIST's gzip.zip does, with one that nobody wants."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"emnist-mnist-test-labels-idx1-ubyte": b"", **files}.items():
            archive.writestr(f"gzip/{name}.gz", gzip.compress(content))
    return buffer.getvalue()


FILES = tiny_files()
ZIP = pack(FILES)


def write(root: Path, files: dict[str, bytes] = FILES) -> Path:
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def content(raw: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".lock"}


# Ways of a server to answer, good and bad


class Request(http.server.BaseHTTPRequestHandler):
    """One request; what it answers stands in the server's `plan`, by path."""

    def do_GET(self) -> None:
        server = self.server.owner
        server.requests.append((self.path, dict(self.headers)))
        answers = server.plan[self.path]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *args: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    @property
    def start(self) -> int:
        return int(self.headers.get("Range", "bytes=0-")[6:-1])

    def head_range(self) -> None:
        span = f"bytes {self.start}-{len(ZIP) - 1}/{len(ZIP)}"
        size = len(ZIP) - self.start
        self.head(206 if self.start else 200, Content_Range=span, Content_Length=size)


Answer = Callable[[Request], None]


def whole(request: Request) -> None:
    request.head_range()
    request.wfile.write(ZIP[request.start :])


def status(code: int) -> Answer:
    return lambda request: request.head(code)


def knows_no_ranges(request: Request, body: bytes = ZIP, **headers: object) -> None:
    request.head(200, Content_Length=len(body), **headers)
    request.wfile.write(body)


def other(body: bytes, **headers: object) -> Answer:
    return lambda request: knows_no_ranges(request, body, **headers)


def cut(size: int) -> Answer:
    def answer(request: Request) -> None:
        request.head_range()
        request.wfile.write(ZIP[request.start :][:size])

    return answer


def stall(request: Request) -> None:
    request.head_range()
    request.wfile.write(ZIP[request.start :][: len(ZIP) // 2])
    request.wfile.flush()
    request.server.owner.released.wait(10)


def never_ends(request: Request) -> None:
    request.head(200)
    request.wfile.write(ZIP + b"more")


def wrong_range(request: Request) -> None:
    request.head(206, Content_Range=f"bytes 7-{len(ZIP) - 1}/{len(ZIP)}")
    request.wfile.write(ZIP[7:])


def nonsense(request: Request) -> None:
    request.wfile.write(b"220 smtp.example ready\r\n")


@dataclass
class Server:
    """An HTTP server on 127.0.0.1 that answers as `plan` says and remembers what it was asked."""

    plan: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def archive(self, *sources: list[Answer]) -> train.Archive:
        """Return an Archive whose sources answer so, each a list for one request after another."""
        self.plan = {f"/{i}/gzip.zip": list(answers) for i, answers in enumerate(sources)}
        return train.Archive(
            sources=tuple(self.address + path for path in self.plan),
            md5=hashlib.md5(ZIP).hexdigest(),
            size=len(ZIP),
            stall=0.3,
            tries=2,
            pause=0.01,
        )

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Request) as listener:
        listener.daemon_threads, listener.block_on_close = True, False
        listener.owner = Server(address=f"http://127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        yield listener.owner
        listener.owner.released.set()
        listener.shutdown()


# From nothing


def test_fetches_what_torchvision_then_reads(server, tmp_path, capsys):
    archive = server.archive([whole])
    train.ensure_emnist(tmp_path, archive)
    raw = tmp_path / "EMNIST" / "raw"
    assert content(raw) == FILES  # these eight and nothing else

    from torchvision.datasets import EMNIST  # 2 s to import

    for stem, count in COUNTS.items():
        split, part = stem.split("-")[1:]
        data = EMNIST(tmp_path, split=split, train=part == "train").data
        assert data.numpy().tobytes() == FILES[f"{stem}-images-idx3-ubyte"][16:]
        assert len(data) == count

    said = capsys.readouterr().err
    assert f"EMNIST, 0 MB: fetching {archive.sources[0]} to {raw}" in said
    assert "EMNIST: 100 %" in said
    assert "python" not in server.requests[0][1]["User-Agent"].lower().replace("train.py", "")


def test_official_archive_has_its_size_md5_and_several_hosts():
    archive = train.ARCHIVE
    assert archive.size // 10**6 == 561
    assert archive.md5 == "58c8d27c78d21e728a6bc7b3cc06412e"
    assert len({url.split("/")[2] for url in archive.sources}) >= 2
    assert all(url.startswith("https://") for url in archive.sources)


MISBEHAVIOURS = {
    "403": (status(403), "HTTP 403"),
    "404": (status(404), "HTTP 404"),
    "503": (status(503), "HTTP 503"),
    "wrong file": (other(pack(tiny_files(seed=1)) + b"!"), "bytes, expected"),
    "wrong file of the right size": (other(bytes(len(ZIP))), "its MD5 is"),
    "web page": (other(b"<html>Sign in!</html>", Content_Type="text/html"), "a web page"),
    "truncated": (other(ZIP[:-5]), "bytes, expected"),
    "always cut at once": (cut(10), "cut after"),
    "endless": (never_ends, "more than"),
    "stall": (stall, "nothing came for 0.3 s"),
    "wrong range": (wrong_range, "sends range"),
    "not HTTP": (nonsense, "220 smtp"),
}


@pytest.mark.parametrize(("answer", "reason"), MISBEHAVIOURS.values(), ids=MISBEHAVIOURS)
def test_second_source_serves_when_the_first_fails(server, tmp_path, capsys, answer, reason):
    archive = server.archive([answer], [whole])
    train.ensure_emnist(tmp_path, archive)
    assert content(tmp_path / "EMNIST" / "raw") == FILES
    said = capsys.readouterr().err
    assert any(archive.sources[0] in line and reason in line for line in said.splitlines())


def test_second_source_serves_when_the_first_host_is_gone(server, tmp_path, capsys):
    archive = server.archive([whole])
    gone = "http://127.0.0.1:9/gzip.zip"
    train.ensure_emnist(tmp_path, replace(archive, sources=(gone, *archive.sources)))
    assert content(tmp_path / "EMNIST" / "raw") == FILES
    assert "refused" in capsys.readouterr().err


def test_busy_source_is_asked_again(server, tmp_path):
    train.ensure_emnist(tmp_path, server.archive([status(503), whole]))
    assert content(tmp_path / "EMNIST" / "raw") == FILES
    assert len(server.requests) == 2


def test_closed_source_is_not_asked_again(server, tmp_path):
    train.ensure_emnist(tmp_path, server.archive([status(403)], [whole]))
    assert [path for path, _ in server.requests] == ["/0/gzip.zip", "/1/gzip.zip"]


# Resuming

HALF = len(ZIP) // 2


def test_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    train.ensure_emnist(tmp_path, server.archive([cut(HALF), cut(HALF // 2), whole]))
    assert server.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]
    assert content(tmp_path / "EMNIST" / "raw") == FILES


def test_stalled_connection_is_resumed(server, tmp_path):
    train.ensure_emnist(tmp_path, server.archive([stall, whole]))
    assert server.ranges() == [None, f"bytes={HALF}-"]
    assert content(tmp_path / "EMNIST" / "raw") == FILES


@pytest.mark.parametrize("answer", [whole, knows_no_ranges])
def test_next_run_continues_what_the_last_one_got(server, tmp_path, answer):
    with pytest.raises(train.TrainingError):
        train.ensure_emnist(tmp_path, server.archive([cut(HALF), status(404)]))
    raw = tmp_path / "EMNIST" / "raw"
    assert content(raw) == {"gzip.zip.part": ZIP[:HALF]}
    train.ensure_emnist(tmp_path, server.archive([answer]))
    assert server.ranges()[-1] == f"bytes={HALF}-"
    assert content(raw) == FILES


@pytest.mark.parametrize("size", [HALF, len(ZIP), len(ZIP) + 9])
def test_damaged_beginning_is_fetched_anew(server, tmp_path, size):
    raw = write(tmp_path, {"gzip.zip.part": bytes(size)})
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert server.ranges()[-1] is None
    assert content(raw) == FILES


def test_source_without_ranges_that_is_cut_costs_nothing(server, tmp_path):
    raw = write(tmp_path, {"gzip.zip.part": ZIP[:HALF]})

    def cut_without_ranges(request: Request) -> None:
        request.head(200, Content_Length=len(ZIP))
        request.wfile.write(ZIP[:9])

    with pytest.raises(train.TrainingError, match="cut after 9 of"):
        train.ensure_emnist(tmp_path, server.archive([cut_without_ranges]))
    assert content(raw) == {"gzip.zip.part": ZIP[:HALF]}


def test_web_page_does_not_cost_what_was_fetched(server, tmp_path):
    raw = write(tmp_path, {"gzip.zip.part": ZIP[:HALF]})
    answer = other(b"<html>Sign in!</html>", Content_Type="text/html")
    with pytest.raises(train.TrainingError, match="web page"):
        train.ensure_emnist(tmp_path, server.archive([answer]))
    assert content(raw) == {"gzip.zip.part": ZIP[:HALF]}


def test_killed_process_leaves_what_the_next_one_continues(server, tmp_path):
    archive = replace(server.archive([stall]), stall=10)
    part = tmp_path / "EMNIST" / "raw" / "gzip.zip.part"
    child = os.fork()
    if child == 0:
        train.ensure_emnist(tmp_path, archive)
        os._exit(0)
    deadline = time.monotonic() + 5
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    server.released.set()

    kept = part.stat().st_size
    assert 0 < kept <= HALF
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert server.ranges() == [None, f"bytes={kept}-"]
    assert content(part.parent) == FILES


def test_second_process_waits_and_finds_it_done(server, tmp_path, capsys):
    archive = server.archive([cut(HALF), whole])
    archive = replace(archive, pause=0.5)
    both = [threading.Thread(target=train.ensure_emnist, args=(tmp_path, archive)) for _ in "12"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(10)
    assert content(tmp_path / "EMNIST" / "raw") == FILES
    assert len(server.requests) == 2  # those of one process
    assert "another process is at work here" in capsys.readouterr().err


# When nothing helps, and by hand


def test_one_message_says_what_failed_and_what_to_put_where(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive = server.archive([status(403)], [status(404)], [cut(10)])
    with pytest.raises(train.TrainingError) as caught:
        train.ensure_emnist(Path("data"), archive)
    message = str(caught.value)
    for url, reason in zip(archive.sources, ("HTTP 403", "HTTP 404", "cut after"), strict=True):
        assert any(url in line and reason in line for line in message.splitlines())
    assert str(tmp_path / "data" / "EMNIST" / "raw") in message  # absolute
    assert "gzip.zip" in message
    assert archive.md5 in message
    assert "emnist-{digits,letters}-{train,test}-{images-idx3,labels-idx1}-ubyte.gz" in message


def test_archive_put_there_by_hand_is_used_and_kept(server, tmp_path):
    raw = write(tmp_path, {"gzip.zip": ZIP})
    train.ensure_emnist(tmp_path, server.archive([status(404)]))
    assert content(raw) == {"gzip.zip": ZIP, **FILES}
    assert server.requests == []


@pytest.mark.parametrize("folder", ["", "gzip"])
def test_loose_files_put_there_by_hand_are_used(server, tmp_path, folder):
    raw = write(tmp_path, {})
    (raw / folder).mkdir(exist_ok=True)
    for name, data in FILES.items():
        (raw / folder / f"{name}.gz").write_bytes(gzip.compress(data))
    train.ensure_emnist(tmp_path, server.archive([status(404)]))
    assert {name: (raw / name).read_bytes() for name in FILES} == FILES
    assert server.requests == []


def test_wrong_archive_put_there_by_hand_is_named(server, tmp_path, capsys):
    raw = write(tmp_path, {"gzip.zip": ZIP[:-1]})
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == {"gzip.zip": ZIP[:-1], **FILES}
    assert f"{raw}/gzip.zip: not used: its MD5 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-30],
        lambda data: b"<html>" + data,
        lambda data: data[:30] + b"\xff\xff\xff\xff" + data[34:],
        lambda data: gzip.compress(b"not an IDX file"),
    ],
    ids=["cut", "no gzip", "flipped bits", "other content"],
)
def test_damaged_loose_file_is_named_and_fetched(server, tmp_path, capsys, damage):
    packed = {f"{name}.gz": gzip.compress(data) for name, data in FILES.items()}
    bad = "emnist-letters-test-images-idx3-ubyte.gz"
    raw = write(tmp_path, {**packed, bad: damage(packed[bad])})
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert {name: (raw / name).read_bytes() for name in FILES} == FILES
    assert "emnist-letters-test-*.gz: not used" in capsys.readouterr().err
    assert not (raw / ".unpacking").exists()


# A folder that is half there


def put(data: bytes, offset: int, *values: int) -> bytes:
    return data[:offset] + bytes(values) + data[offset + len(values) :]


IMAGES, LABELS = "emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte"
DAMAGES = {
    "half of the images": (IMAGES, lambda data: data[: len(data) // 2], "bytes for 52 items"),
    "images too long": (IMAGES, lambda data: data + b"0", "bytes for 52 items"),
    "no bytes": (IMAGES, lambda data: b"", "0 bytes, cut short"),
    "header cut": (IMAGES, lambda data: data[:15], "15 bytes, cut short"),
    "web page": (IMAGES, lambda data: b"<html>" * 40, "not headed"),
    "labels for images": (IMAGES, lambda data: FILES[LABELS] + bytes(40), "not headed"),
    "other picture size": (IMAGES, lambda data: put(data, 15, 27), "not headed"),
    "no pictures": (IMAGES, lambda data: put(data[:16], 7, 0), "16 bytes for 0 items"),
    "zeros at the end": (IMAGES, lambda data: data[:-784] + bytes(784), "blank"),
    "half of the labels": (LABELS, lambda data: data[:30], "30 bytes for 52 items"),
    "gzip": (LABELS, gzip.compress, "not headed"),
    "label 27": (LABELS, lambda data: put(data, 20, 27), "labels from 1 to 27, expected 1 to 26"),
    "label 0": (LABELS, lambda data: put(data, 59, 0), "labels from 0 to 26, expected 1 to 26"),
    "fewer labels": (LABELS, lambda data: put(data[:-1], 7, 51), "52 pictures with 51 labels"),
}


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_mended(server, tmp_path, capsys, name, damage, reason):
    files = FILES | {name: damage(FILES[name])}
    assert files != FILES
    raw = write(tmp_path, files)
    before = {path.name: path.stat().st_ino for path in raw.iterdir()}
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == FILES
    replaced = {file for file in FILES if (raw / file).stat().st_ino != before[file]}
    assert replaced == {IMAGES, LABELS}  # the pair: an old half may not fit a new one
    said = capsys.readouterr().err
    assert any("emnist-letters-train" in line and reason in line for line in said.splitlines())
    assert "digits" not in said.replace(name, "").replace(str(tmp_path), "")


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_absent_file_is_named_and_fetched(server, tmp_path, capsys, name):
    raw = write(tmp_path, {file: data for file, data in FILES.items() if file != name})
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == FILES
    assert f"{raw}/{name}: absent" in capsys.readouterr().err


def test_damage_that_cannot_be_mended_is_not_misread(server, tmp_path, capsys):
    raw = write(tmp_path, FILES | {LABELS: FILES[LABELS][:-1]})
    with pytest.raises(train.TrainingError, match="could not be fetched"):
        train.ensure_emnist(tmp_path, server.archive([status(404)]))
    assert LABELS in capsys.readouterr().err
    assert (raw / IMAGES).read_bytes() == FILES[IMAGES]  # what was good is still there


def test_whole_folder_is_left_alone(server, tmp_path, capsys):
    shorter = tiny_files(seed=2)
    shorter["emnist-digits-train-images-idx3-ubyte"] = idx(np.full((7, 28, 28), 9, np.uint8))
    shorter["emnist-digits-train-labels-idx1-ubyte"] = idx(np.full(7, 3, np.uint8))
    raw = write(tmp_path, shorter)
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == shorter
    assert not (raw / ".lock").exists()
    assert server.requests == []
    assert capsys.readouterr().err == ""


# The disk


def test_small_disk_is_refused_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 10**6))
    with pytest.raises(train.TrainingError, match=r"needs 334 MB there, 1 MB are free"):
        train.ensure_emnist(tmp_path, server.archive([whole]))
    assert server.requests == []


def test_disk_that_fills_up_while_fetching(server, tmp_path, disk_for):
    disk_for(HALF)
    with pytest.raises(train.TrainingError, match=r"raw: EMNIST can't be put there: File too"):
        train.ensure_emnist(tmp_path, server.archive([whole]))
    disk_for(10**9)
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(tmp_path / "EMNIST" / "raw") == FILES


def test_disk_that_fills_up_while_unpacking(server, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    raw = write(tmp_path, FILES | {IMAGES: b"half"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(train.TrainingError, match="No space left on device"):
            train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == FILES | {IMAGES: b"half", "gzip.zip.part": ZIP}
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert content(raw) == FILES
    assert len(server.requests) == 1  # what was fetched is not fetched again


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """Return a folder in which this process may not write, not even if root started it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_folder_is_one_message(server, foreign_folder):
    with pytest.raises(train.TrainingError, match=f"{foreign_folder}.*: Permission denied"):
        train.ensure_emnist(foreign_folder, server.archive([whole]))
    assert server.requests == []


def test_file_in_place_of_the_folder_is_one_message(server, tmp_path):
    (tmp_path / "EMNIST").write_text("a file")
    with pytest.raises(train.TrainingError, match="Not a directory"):
        train.ensure_emnist(tmp_path, server.archive([whole]))


# Talk


def test_terminal_shows_a_bar(server, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train.ensure_emnist(tmp_path, server.archive([whole]))
    assert "100%|" in terminal.getvalue()
    assert "EMNIST: 100 %" not in terminal.getvalue()


def test_log_file_gets_few_lines(server, tmp_path, capsys):
    train.ensure_emnist(tmp_path, server.archive([cut(HALF), whole]))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("%")]
    assert 1 <= len(lines) <= 10
