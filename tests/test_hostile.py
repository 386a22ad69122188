"""inference.py against pictures that want to crash it, stall it, fill its memory or get out.

The fuzz test runs over 5,000 mutated files, over more with

    FUZZ_FILES=200000 FUZZ_SEED=2 pytest tests/test_hostile.py -k fuzz
"""

import functools
import io
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import misbehaving
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

import CNN
import inference

SIZE = 28


@pytest.fixture
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Any weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    CNN.save(CNN.Net(), path)
    return path


def picture(side: int = 24, seed: int = 0) -> Image.Image:
    """Return a dark cross on light, with some noise."""
    grey = np.random.default_rng(seed).integers(200, 255, (side, side))
    grey[side // 2 - 2 : side // 2 + 2, 4:-4] = grey[4:-4, side // 2 - 2 : side // 2 + 2] = 20
    return Image.fromarray(grey.astype(np.uint8))


@pytest.fixture
def pool() -> Iterator[inference.Pool]:
    """Two workers, as the command starts them."""
    pool = inference.Pool(2, timeout=30, thumbnails=False)
    yield pool
    pool.close()


@pytest.fixture
def misbehaving_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[inference.Pool]:
    """Two workers whose decoder does what a picture's name says, with a second for each picture."""
    monkeypatch.setattr(inference, "work", misbehaving.work)
    pool = inference.Pool(2, timeout=1, thumbnails=False)
    yield pool
    pool.close()


def through(pool: inference.Pool, paths: list[Path]) -> dict[str, str]:
    """Run pictures through a pool: {name: error}; check that each came once, in order and whole."""
    listing = iter([(os.fspath(path), "") for path in paths])
    found = [picture for ready in pool.run(listing, SIZE) for picture in ready]
    assert [picture.path for picture in found] == [os.fspath(path) for path in paths]
    for picture in found:
        assert bool(picture.error) != (len(picture.ink) == SIZE * SIZE)
        assert len(picture.error.splitlines()) <= 1
    return {os.path.basename(picture.path): picture.error for picture in found}


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """Write a PNG by hand, so that its header can say anything."""

    def block(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    blocks = block(b"IHDR", header) + block(b"IDAT", data) + block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + blocks


def endless_gif() -> bytes:
    """Return a GIF whose first frame is sound and which is then all frames."""
    file = io.BytesIO()
    picture().save(file, "GIF", save_all=True, append_images=[picture(seed=1)], loop=0)
    whole = file.getvalue()
    frame = whole[whole.rindex(b"!\xf9") : -1]
    return whole[:-1] + frame * 20_000


def looping_tiff() -> bytes:
    """Return a TIFF whose only directory points to itself, again and again."""
    entry = struct.pack("<HHII", 330, 4, 1, 8)  # SubIFDs: this directory
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8)


def hostile_files() -> dict[str, bytes]:
    """Return files that no picture should be got from, by name."""
    sound = io.BytesIO()
    picture(200).save(sound, "PNG")
    jpeg = io.BytesIO()
    picture(200).save(jpeg, "JPEG")
    huge = 2**31 - 1
    return {
        "empty.png": b"",
        "one byte.jpg": b"\xff",
        "zeros.bmp": bytes(5000),
        "text.png": b"hello, I am a picture\n" * 9,
        "truncated.png": sound.getvalue()[:900],
        "truncated.jpg": jpeg.getvalue()[:700],
        "bomb.png": png(20_000, 20_000, 1, 0, zlib.compress(bytes(20_000 * 2_501), 9)),
        "just a warning.png": png(9_500, 9_500, 1, 0, zlib.compress(bytes(9_500 * 1_189), 9)),
        "enormous.png": png(huge, huge, 8, 6, b""),
        "thin.png": png(huge, 1, 8, 0, b""),
        "nothing.png": png(0, 0, 8, 0, b""),
        "no data.png": png(50, 50, 8, 0, b""),
        "wrong depth.png": png(50, 50, 77, 3, zlib.compress(bytes(2600))),
        "inflating.png": png(50, 50, 8, 0, zlib.compress(bytes(200_000_000), 9)),
        "huge.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, huge, huge, 1, 24, *[0] * 6),
        "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",",
        "huge.ppm": b"P6 99999999 99999999 255 ",
        "digits.pgm": b"P5 " + b"9" * 100_000 + b" 1 255 ",
        "huge.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 32, 0),
        "itself.tiff": looping_tiff(),
        "vector.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "document.jpg": b"%PDF-1.7\n1 0 obj<<>>endobj\n",
        "meta.bmp": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>",
        "table.png": b"SIMPLE  =                    T" + b" " * 5000,
    }


def test_files_that_are_no_sound_picture_are_errors(pool: inference.Pool, tmp_path: Path) -> None:
    files = hostile_files()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    picture().save(tmp_path / "sound.png")
    started = time.monotonic()
    errors = through(pool, sorted(tmp_path.iterdir()))
    assert time.monotonic() - started < 20
    assert errors.pop("sound.png") == ""
    inflating = errors.pop("inflating.png")  # Pillow takes the rows that it needs and stops
    assert inflating in ("", inference.BLANK) or "read" in inflating
    assert {name for name, error in errors.items() if not error} == set()
    for name in ("bomb.png", "just a warning.png", "enormous.png", "huge.ppm", "huge.bmp"):
        assert "too large" in errors[name] or "not a picture" in errors[name], (name, errors[name])
    assert "too large" in errors["bomb.png"]
    assert "too large" in errors["just a warning.png"]


def test_of_an_endless_animation_the_first_frame_counts(
    pool: inference.Pool, tmp_path: Path
) -> None:
    (tmp_path / "endless.gif").write_bytes(endless_gif())
    started = time.monotonic()
    assert through(pool, [tmp_path / "endless.gif"]) == {"endless.gif": ""}
    assert time.monotonic() - started < 5


def test_what_is_no_file_is_never_opened(pool: inference.Pool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe of a link.png")
    (tmp_path / "link.png").symlink_to("pipe of a link.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "terminal.png").symlink_to("/dev/tty")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.png"))
    started = time.monotonic()
    errors = through(pool, sorted(tmp_path.iterdir()))
    server.close()
    assert time.monotonic() - started < 5
    assert len(errors) == 8
    regular = {name for name, error in errors.items() if "not a regular file" not in error}
    assert regular == {"itself.png", "nowhere.png", *regular & {"terminal.png"}}
    assert "No such file" in errors["nowhere.png"]
    assert "symbolic links" in errors["itself.png"]


def test_folders_that_vanish_or_are_closed_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    (tmp_path / "0.png").touch()
    listing = inference.find([str(tmp_path)], Counter())
    assert next(listing) == (f"{tmp_path}/0.png", "")
    shutil.rmtree(tmp_path / "a")
    real = os.scandir

    def scandir(path: str):
        if path.endswith("b/"):  # the tests may run as root, whom no permission stops
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(listing) == [
        (f"{tmp_path}/a/", "folder can't be listed: No such file or directory"),
        (f"{tmp_path}/b/", "folder can't be listed: Permission denied"),
        (f"{tmp_path}/c/1.png", ""),
    ]


def test_pictures_that_vanish_or_change_while_it_runs_are_one_line_each(
    pool: inference.Pool, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i:04d}.png" for i in range(1500)]
    for path in paths:
        picture().save(path)
    listing = iter([(str(path), "") for path in paths])
    errors: list[str] = []
    for ready in pool.run(listing, SIZE):
        errors += [found.error for found in ready]
        if len(errors) == len(ready) > 0:  # the first
            for gone, torn in zip(paths[900::3], paths[901::3], strict=True):
                gone.unlink()
                torn.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert len(errors) == 1500
    assert errors[:300] == [""] * 300
    assert "No such file" in errors[1497]
    assert errors[1498]
    assert errors[1499] == ""


def test_a_picture_that_kills_or_stalls_its_decoder_is_the_only_one_lost(
    misbehaving_pool: inference.Pool, tmp_path: Path
) -> None:
    bad = ("kill", "leave", "hang", "bloat", "garble")
    for i in range(150):
        picture().save(tmp_path / f"sound{i:03d}.png")
    for i, name in enumerate(bad):
        picture().save(tmp_path / f"{name}.png")
        picture().save(tmp_path / f"sound{i * 30:03d}-{name}.png")
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.name.partition("-")[0])
    for i, name in enumerate(bad):  # spread over several chunks
        paths.insert(31 * i + 7, paths.pop(paths.index(tmp_path / f"{name}.png")))
    errors = through(misbehaving_pool, paths)
    lost = {name: error for name, error in errors.items() if error}
    assert set(lost) == {f"{name}.png" for name in bad}
    assert lost["kill.png"] == "its decoder died (Killed)"
    assert lost["leave.png"] == "its decoder died (3)"
    assert lost["hang.png"] == "takes more than 1 s to decode"
    assert lost["bloat.png"] == "takes too much memory"


def test_slow_pictures_are_shown_as_they_come_and_shared_out(
    misbehaving_pool: inference.Pool, tmp_path: Path
) -> None:
    for i in range(20):  # a chunk of 2 seconds, longer than the limit for one
        picture().save(tmp_path / f"slow{i:02d}.png")
    listing = iter([(str(path), "") for path in sorted(tmp_path.iterdir())])
    started = time.monotonic()
    times = []
    for ready in misbehaving_pool.run(listing, SIZE):
        assert not any(found.error for found in ready)
        times += [time.monotonic() - started] * len(ready)
    assert len(times) == 20
    assert len(misbehaving_pool.workers) == 2
    assert times[0] < times[-1] / 2


class Wire:
    """A connection that has two requests and then closes, and keeps what is answered."""

    def __init__(self, *requests: list[Path]) -> None:
        self.requests = [b"\0".join([b"28", *map(os.fsencode, paths)]) for paths in requests]
        self.sent: list[bytes] = []

    def recv_bytes(self) -> bytes:
        if not self.requests:
            raise EOFError
        return self.requests.pop(0)

    def send_bytes(self, message: bytes) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("thumbnails", [False, True])
def test_a_worker_answers_in_raw_bytes_under_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thumbnails: bool
) -> None:
    sound = [tmp_path / "a.png", tmp_path / "b.tif", tmp_path / "c.jpg"]
    picture().save(sound[0])
    Image.fromarray(np.asarray(picture(), np.float32)).save(sound[1])
    picture(300).convert("RGB").save(sound[2])
    blank, bomb, broken = (tmp_path / name for name in ("blank.png", "bomb.png", "broken.png"))
    Image.new("L", (9, 9), 30).save(blank)
    bomb.write_bytes(hostile_files()["bomb.png"])
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    limits, silenced = [], []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    monkeypatch.setattr(os, "dup2", lambda *handles: silenced.append(handles[1]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    wire = Wire(sound, [blank, bomb, sound[0], broken])
    with warnings.catch_warnings():
        inference.work(wire, thumbnails)
    assert limits[0][0] == resource.RLIMIT_AS
    assert limits[0][1][0] <= inference.WORKER_BYTES
    assert silenced == [2]
    ready, errors, views, block, other_errors, other_views, other_block = wire.sent
    assert (ready, errors) == (b"ready", b"\0\0")
    assert [bool(view) for view in views.split(b"\0")] == [thumbnails] * 3
    expected, _, _ = inference.fit(
        [inference.to_grey(inference.load(str(path))) for path in sound], SIZE
    )
    assert block == expected.tobytes()
    reasons = other_errors.decode().split("\0")
    assert reasons[0] == inference.BLANK
    assert "too large" in reasons[1]
    assert reasons[2] == ""
    assert "Truncated" in reasons[3]
    assert len(other_views.split(b"\0")) == 4
    assert other_block == expected[0].tobytes()


def test_what_a_decoder_does_becomes_a_reason_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: `work` and `prepare` end a worker's life elsewhere."""

    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    paths = [tmp_path / name for name in ("text.png", "pipe.png", "exif.png", "sound.png")]
    text, pipe, exif, sound = map(str, paths)
    paths[0].write_text("no picture")
    os.mkfifo(pipe)
    picture().save(exif, exif=b"Exif\0\0nonsense")
    picture().save(sound)
    not_regular = "can't be read: not a regular file"
    errors, _, block = inference.prepare([text, pipe, exif, sound], SIZE)
    assert errors == ["not a picture in a format that is read here", not_regular, "", ""]
    assert block[: SIZE**2] == block[SIZE**2 :]
    regular = os.stat(sound)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: regular)  # a pipe in its place a moment later
        assert inference.prepare([pipe], SIZE)[0] == [not_regular]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", exhaust)
        assert inference.prepare([sound], SIZE)[0] == ["takes too much memory"]
    monkeypatch.setattr(inference, "FLUSH_SECONDS", -1)
    assert inference.prepare([sound, sound], SIZE)[0] == [""]


def test_paths_too_long_for_a_pipe_wait_for_their_turn(
    pool: inference.Pool, tmp_path: Path
) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 4)
    deep.mkdir(parents=True)
    picture().save(deep / "0.png")
    for i in range(1, 600):
        os.link(deep / "0.png", deep / f"{i}.png")
    assert set(through(pool, sorted(deep.iterdir())).values()) == {""}


@pytest.mark.parametrize(
    "answer", [(b"", b"", b"few"), (b"\xff", b"", b""), (b"bad\0bad", b"", b"")]
)
def test_a_worker_that_lies_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(inference, "work", functools.partial(misbehaving.lie, answer=answer))
    pool = inference.Pool(1, timeout=10, thumbnails=False)
    for name in "ab":
        picture().save(tmp_path / f"{name}.png")
    error = "its decoder gave no answer that can be"
    assert through(pool, sorted(tmp_path.iterdir())) == {"a.png": error, "b.png": error}
    pool.close()


def test_workers_that_never_start_are_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference, "work", misbehaving.never_start)
    picture().save(tmp_path / "a.png")
    pool = inference.Pool(2, timeout=1, thumbnails=False)
    with pytest.raises(inference.Halt, match="don't start"):
        list(pool.run(iter([(str(tmp_path / "a.png"), "")]), SIZE))
    pool.close()


def test_a_slow_real_picture_runs_into_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoder but Pillow's own: 88 million pixels, within its limit, take some 0.3 s."""
    Image.new("L", (9400, 9400), 255).save(tmp_path / "large.png", compress_level=1)
    monkeypatch.setattr(inference, "FLUSH_SECONDS", 0)
    pool = inference.Pool(1, timeout=0.02, thumbnails=False)
    errors = through(pool, [tmp_path / "large.png"])
    pool.close()
    assert errors == {"large.png": "takes more than 0.02 s to decode"}


def test_where_nothing_can_be_written_it_works_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with a read-only tree has no folder for the socket of a fork server."""

    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    picture().save(tmp_path / "a.png")
    inference._context.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", gettempdir)
        pool = inference.Pool(1, timeout=30, thumbnails=False)
        assert through(pool, [tmp_path / "a.png"]) == {"a.png": ""}
        pool.close()
    inference._context.cache_clear()


def test_workers_end_with_the_process_that_they_work_for(weights: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "0.png")
    for i in range(1, 3000):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    command = [sys.executable, inference.__file__, "--model", weights, "--input", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    family = descendants(process.pid)
    assert len(family) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and theirs."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # one for each thread
    children = [int(child) for file in lists for child in file.read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]


# Fuzzing


def seeds() -> dict[str, bytes]:
    """Return small sound pictures in every format that this Pillow writes, by suffix and mode."""
    grey, found = picture(), {}
    variants = {"L": grey, "RGB": grey.convert("RGB"), "RGBA": grey.convert("RGBA")}
    variants |= {
        "1": grey.convert("1"),
        "P": grey.quantize(16),
        "CMYK": grey.convert("RGB").convert("CMYK"),
    }
    variants |= {
        "LA": grey.convert("LA"),
        "I;16": Image.fromarray(np.asarray(grey, np.uint16) * 200),
    }
    variants |= {"F": Image.fromarray(np.asarray(grey, np.float32))}
    for name, suffixes in inference.FORMATS.items():
        for mode, variant in variants.items():
            file = io.BytesIO()
            try:
                variant.save(file, name)
            except (OSError, KeyError, ValueError):  # a mode that the format hasn't
                continue
            found[f"{mode}{suffixes[0]}"] = file.getvalue()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma", "zstd"):
        file = io.BytesIO()
        variants["RGB"].save(file, "TIFF", compression=compression)
        found[f"{compression}.tif"] = file.getvalue()
    return found


def mutated(content: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    """Damage a file in one to four of the ways that break decoders."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at = int(
            random.integers(0, max(1, min(len(data), 400 if random.random() < 0.7 else 10**9)))
        )
        length = int(random.integers(1, 9))
        match random.integers(0, 8):
            case 0:
                data[at : at + 1] = (
                    bytes([data[at] ^ (1 << int(random.integers(8)))]) if data else b""
                )
            case 1:
                data[at : at + length] = random.bytes(length)
            case 2:
                data[at : at + 4] = random.choice(
                    [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
                )
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = random.bytes(length)
            case 6:
                other = others[random.integers(len(others))]
                data[at:] = other[int(random.integers(len(other))) :]
            case 7:
                data[at:at] = data[at : at + 200] * int(random.integers(1, 20))
    return bytes(data)


def test_fuzz_every_file_ends_as_one_picture_or_one_error(tmp_path: Path) -> None:
    count = int(os.environ.get("FUZZ_FILES", "5000"))
    random = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "1")))
    sound = seeds()
    assert {name.partition(".")[2] for name in sound} >= {"png", "jpg", "gif", "tif", "webp", "tga"}
    names, contents = list(sound), list(sound.values())
    pool = inference.Pool(2, timeout=10, thumbnails=True)
    answered = 0
    for batch in range(0, count, 1000):
        paths = []
        for i in range(batch, min(batch + 1000, count)):
            which = random.integers(len(names))
            paths.append(tmp_path / f"{i}-{names[which]}")
            paths[-1].write_bytes(mutated(contents[which], contents, random))
        errors = through(pool, paths)
        answered += sum(not error for error in errors.values())
        stalled = {name: e for name, e in errors.items() if "takes more than" in e}
        assert not stalled
        for path in paths:
            path.unlink()
    pool.close()
    assert count * 0.05 < answered < count * 0.95  # the damage was neither none nor all


pictures = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 255)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(pictures, max_size=4))
def test_fit_takes_any_pictures_and_treats_each_alone(batch: list[np.ndarray]) -> None:
    images, inked, _ = inference.fit(batch, SIZE)
    assert images.shape == (len(batch), SIZE, SIZE)
    assert images.dtype == np.uint8
    assert inked.shape == (len(batch),)
    assert inked.dtype == bool
    for picture, image, has_ink in zip(batch, images, inked, strict=True):
        alone, alone_inked, _ = inference.fit([picture], SIZE)
        assert alone_inked[0] == has_ink
        assert not has_ink or np.array_equal(alone[0], image)
        assert has_ink == image.any()


FLAGS = "--model --device --alphabet --min-confidence --topk --format --output --resume --report"
WORDS = f"--input {FLAGS} --batch-size --workers --timeout x 1 -1 0.5 csv json".split()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=6))
def test_any_command_line_is_understood_or_refused_with_2(words: list[str]) -> None:
    code = 0
    try:
        args = inference.parse(["--input", "x", *words])
        assert min(args.batch_size, args.topk, args.workers) >= 1
        assert 0 <= args.min_confidence <= 1
    except SystemExit as end:
        code = end.code
    helped = any(word and ("-h" in word or "--help".startswith(word)) for word in words)
    assert code == 2 or (code == 0 and (helped or args))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_any_alphabet_is_understood_or_refused(text: str) -> None:
    known = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if text and set(text) <= set(known + known.lower()):
        assert set(inference.parse_alphabet(text, known)) == set(text.upper())
    elif not set(text) <= set(known + known.lower() + "-"):
        with pytest.raises(inference.Halt, match="--alphabet"):
            inference.parse_alphabet(text, known)


hard = st.sampled_from("\\\n\x1b\x9f\u2028\u202e\udc9f\udcff\udc5cnxu09f5c")


@given(st.text() | st.text(hard))
def test_escaped_is_one_line_without_control_characters_and_can_be_undone(text: str) -> None:
    shown = inference.escaped(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode().decode() == shown  # no lone surrogates
    assert "\x1b" not in shown
    if text.isprintable() and "\\" not in text:
        assert shown == text

    def undone(match: re.Match) -> str:
        letter, code = match[0][1], match[0][2:]
        if code:
            return chr(int(code, 16) + 0xDC00 * (letter == "x" and int(code, 16) >= 0x80))
        return {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[letter]

    escapes = r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|[nrt\\])"
    assert re.sub(escapes, undone, shown) == text
