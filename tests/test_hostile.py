"""inference.py against pictures that want to crash it, stall it, fill its memory or get out.

The fuzz test runs over 700 mutated files, over more with

    FUZZ_FILES=200000 FUZZ_SEED=2 pytest tests/test_hostile.py -k fuzz
"""

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import misbehaving
import numpy as np
import pytest
import torch
from PIL import Image
from strokes import drawn

import CNN
import inference
import picture
from picture import FORMATS


@pytest.fixture
def errors_of(weights: Path, capfd: pytest.CaptureFixture) -> Callable:
    """Run the command in this process over a folder or paths; return {name: error}, "" if answered.

    Checks that each picture has one row, in order, and that nothing but the closing line is said.
    """

    def run(given: Path | list[Path], *flags: object, deaths: bool = False) -> dict[str, str]:
        paths = given if isinstance(given, list) else sorted(given.iterdir())
        inputs = given if isinstance(given, list) else [given]
        words = ["--input", *inputs, "--model", weights, "--format", "json", *flags]
        code = inference.main(list(map(str, words)))
        out, err = capfd.readouterr()
        rows = list(map(json.loads, out.splitlines()))
        assert [row["path"] for row in rows] == list(map(str, paths))
        assert all(bool(row["character"]) == (row["error"] is None) for row in rows)
        assert code == (any(row["error"] for row in rows) or not rows)
        if deaths:  # what replaces a dead process may start when the pool is gone, here not unheard
            err = re.sub(r"Traceback .*\n(?:  .*\n)+FileNotFoundError: .*\n", "", err)
        assert err.count("\n") == 1
        assert err.splitlines()[-1].startswith(f"{len(paths):,} pictures: ")
        return {os.path.basename(row["path"]): row["error"] or "" for row in rows}

    return run


def saved(form: str, side: int = 200) -> bytes:
    file = io.BytesIO()
    drawn(side=side).save(file, form)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """Write a PNG by hand, so that its header can say anything."""

    def block(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    blocks = block(b"IHDR", header) + block(b"IDAT", data) + block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + blocks


HUGE = 2**31 - 1
BOMBS = {  # all that has to be said to be too large, or is no picture at all
    "bomb.png": png(20_000, 20_000, 1, 0, zlib.compress(bytes(20_000 * 2_501), 9)),
    "just a warning.png": png(9_500, 9_500, 1, 0, zlib.compress(bytes(9_500 * 1_189), 9)),
    "enormous.png": png(HUGE, HUGE, 8, 6, b""),
    "huge.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, HUGE, HUGE, 1, 24, *[0] * 6),
    "huge.ppm": b"P6 99999999 99999999 255 ",
}
UNSOUND = {
    "empty.png": b"",
    "text.png": b"hello, I am a picture\n" * 9,
    "truncated.png": saved("PNG")[:900],
    "truncated.jpg": saved("JPEG")[:700],
    "thin.png": png(HUGE, 1, 8, 0, b""),
    "digits.pgm": b"P5 " + b"9" * 100_000 + b" 1 255 ",
    "huge.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 32, 0),
    # a directory that points to itself, again and again
    "itself.tiff": b"II*\0" + struct.pack("<IHHHIII", 8, 1, 330, 4, 1, 8, 8),
}


def test_files_that_are_no_sound_picture_are_errors(errors_of, tmp_path):
    for name, content in (UNSOUND | BOMBS).items():
        (tmp_path / name).write_bytes(content)
    drawn().save(tmp_path / "sound.png")
    started = time.monotonic()
    errors = errors_of(tmp_path)
    assert time.monotonic() - started < 20
    assert errors.pop("sound.png") == ""
    assert all(errors.values()), errors
    assert errors["text.png"] == "not a picture in a format that is read here"
    for name in BOMBS:
        assert "too large" in errors[name] or "not a picture" in errors[name], errors[name]
    assert "too large" in errors["bomb.png"]
    assert "too large" in errors["just a warning.png"]


def test_what_is_no_file_is_never_opened(errors_of, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe of a link.png")
    (tmp_path / "link.png").symlink_to("pipe of a link.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.png"))
    started = time.monotonic()
    errors = errors_of(tmp_path, "--timeout", 10)
    server.close()
    assert time.monotonic() - started < 10
    assert "No such file" in errors.pop("nowhere.png")
    assert "symbolic links" in errors.pop("itself.png")
    assert set(errors.values()) == {"can't be read: not a regular file"}


def test_a_picture_that_kills_or_stalls_its_decoder_is_the_only_one_lost(
    errors_of, tmp_path, monkeypatch
):
    """And the processes that read pictures do without torch."""
    monkeypatch.setattr(inference, "do_all", misbehaving.do_all)
    names = [f"sound{i:03d}.png" for i in range(150)] + ["torch.png"]
    bad = ("kill.png", "leave.png", "hang.png", "bloat.png", "odd.png")
    for i, name in enumerate(bad):  # spread over several chunks
        names[31 * i + 7 : 31 * i + 7] = [name]
    for name in names:
        drawn().save(tmp_path / name)
    paths = [tmp_path / name for name in names]
    started = time.monotonic()
    errors = errors_of(paths, "--timeout", 1, "--workers", 2, deaths=True)
    assert time.monotonic() - started < 60  # each has its 1 s, not its chunk of 64 the sum of them
    assert {name: error for name, error in errors.items() if error} == {
        "kill.png": "its decoder died (exit code -9)",
        "leave.png": "its decoder died (exit code 3)",
        "hang.png": "takes more than 1 s to decode",
        "bloat.png": "can't be read: MemoryError()",
        "odd.png": r"can't be read: KeyError('new\nline')",
    }


def test_many_that_take_long_together_are_read_once_each(errors_of, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "do_all", misbehaving.do_all)
    paths = [tmp_path / f"slow.{i}.png" for i in range(24)]  # of 0.1 s, in one chunk
    for path in paths:
        drawn().save(path)
    page = tmp_path / "page.html"  # its thumbnails are of what has been read
    assert set(errors_of(paths, "--timeout", 2, "--report", page).values()) == {""}
    assert page.read_text("utf-8").count("data:image/webp") == len(paths)


def test_workers_that_die_as_they_start_end_the_run_in_one_line(
    weights, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(inference, "confine", misbehaving.die)
    drawn().save(tmp_path / "a.png")
    command = ["--model", str(weights), "--input", str(tmp_path / "a.png"), "--workers", "1"]
    assert inference.main(command) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), "died as they started" in err) == ("", 1, True), err


@pytest.mark.parametrize("size", [(14_000, 1), (19_000, 2)])
def test_a_long_strip_takes_little_memory(tmp_path, size):
    strip = Image.new("L", size, 255)
    strip.paste(0, (2000, 0, 12_000, 1))
    path = str(tmp_path / "strip.png")
    strip.save(path)
    tracemalloc.start()
    with suppress(ValueError):  # there may be no character in it
        picture.prepare(path, 28)
        picture.propose(picture.to_grey(picture.read(path)), 28)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_only_what_is_wrong_with_a_file_is_called_so(tmp_path, monkeypatch):
    drawn().save(tmp_path / "a.png")
    assert picture.prepare(tmp_path / "a.png", 28).max() == 255  # a Path, not a str
    for name, error, expected in (
        ("to_grey", ZeroDivisionError, ZeroDivisionError),
        ("to_grey", MemoryError, MemoryError),
        ("to_plain_mode", MemoryError, ValueError),  # while decoding, which is said to be it
    ):
        with monkeypatch.context() as patch:
            patch.setattr(picture, name, Mock(side_effect=error))
            with pytest.raises(expected) as raised:
                picture.prepare(tmp_path / "a.png", 28)
    assert "takes more memory than there is" in str(raised.value)


UNREAD = {  # what the error of a file has to say
    "a.heic": "pillow-heif",
    "b.HEIF": "pillow-heif",
    "c.svg": "a drawing",
    "d.pdf": "pdftoppm",
    "e.jxl": "JPEG XL",
    "f.nef": "raw file",
    "g.DNG": "raw file",
}


def test_pictures_that_are_not_read_say_what_they_are_and_the_way_out(
    errors_of, tmp_path, monkeypatch
):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)  # the processes that read have it from here
    folder = tmp_path / "in"
    folder.mkdir()
    for name in UNREAD:
        (folder / name).write_bytes(b"\0\0\0\x1cftypheic and so on")
    drawn().save(folder / "g.DNG", "TIFF")  # as if it were the camera's thumbnail
    errors = errors_of(folder)
    for name, expected in UNREAD.items():
        assert errors[name].startswith("not read here: ")
        assert expected in errors[name]


def test_heic_is_read_where_pillow_heif_is_installed(errors_of, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    drawn(side=200).save(tmp_path / "plain.png")
    pillow_heif.from_pillow(drawn(side=200)).save(tmp_path / "phone.heic", quality=90)
    (tmp_path / "wreck.heic").write_bytes((tmp_path / "phone.heic").read_bytes()[:400])
    errors = errors_of(tmp_path)
    assert (errors["phone.heic"], errors["plain.png"]) == ("", "")
    assert "pip install" not in errors["wreck.heic"] != ""


def test_a_gpu_without_memory_is_one_line_and_a_fault_of_our_own_shows_where_it_is(
    weights, tmp_path, monkeypatch, capfd
):
    drawn().save(tmp_path / "a.png")
    command = ["--model", str(weights), "--input", str(tmp_path)]
    fault = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    monkeypatch.setattr(CNN.Net, "features", Mock(side_effect=fault))
    assert inference.main(command) == 2
    told = "inference.py: CUDA out of memory: try a smaller --batch-size\n"
    assert capfd.readouterr().err == told
    monkeypatch.setattr(CNN.Net, "features", Mock(side_effect=RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        inference.main(command)


def test_no_code_is_taken_from_the_folder_it_runs_in(weights, tmp_path):
    drawn().save(tmp_path / "a.png")
    for module in ("numpy", "random", "multiprocessing", "picture"):
        (tmp_path / f"{module}.py").write_text("open('taken', 'w')")
    command = [sys.executable, inference.__file__, "--model", weights, "--input", "a.png"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "taken").exists()


# Fuzzing


def seeds() -> dict[str, bytes]:
    """Return small sound pictures in every format that this Pillow writes, by suffix and mode."""
    grey, found = drawn(), {}
    variants = {mode: grey.convert(mode) for mode in ("L", "RGB", "RGBA", "1", "LA", "F")}
    variants |= {"P": grey.quantize(16), "CMYK": grey.convert("RGB").convert("CMYK")}
    variants |= {"I;16": Image.fromarray(np.asarray(grey, np.uint16) * 200)}
    packed = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma", "zstd")
    ways = [(name, mode, {}) for name in FORMATS for mode in variants]
    ways += [("TIFF", "RGB", {"compression": way}) for way in packed]
    for name, mode, options in ways:
        file = io.BytesIO()
        with suppress(OSError, KeyError, ValueError):  # a mode that the format hasn't
            variants[mode].save(file, name, **options)
            found[f"{mode}{options.get('compression', '')}.{name.lower()}"] = file.getvalue()
    return found


def mutated(content: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    """Damage a file, mostly its head, in one to four of the ways that break decoders."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(max(1, min(len(data), random.choice([400, 400, len(data)])))))
        other = others[random.integers(len(others))]
        new = [
            random.bytes(int(random.integers(9))),
            [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"][random.integers(3)],
            data[at : at + 200] * int(random.integers(1, 20)),
            other[int(random.integers(len(other))) :],
        ][random.integers(4)]
        data[at : at + int(random.choice([0, 1, len(new), len(new), len(data)]))] = new
    return bytes(data)


def test_fuzz_every_file_ends_as_one_picture_or_one_error(errors_of, tmp_path):
    count = int(os.environ.get("FUZZ_FILES", "700"))
    random = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "1")))
    sound, answered = seeds(), 0
    suffixes = {name.partition(".")[2] for name in sound}
    assert suffixes >= {"png", "jpeg", "gif", "tiff", "webp", "tga"}
    names, contents = list(sound), list(sound.values())
    for start in range(0, count, 1500):
        paths = []
        for i in range(start, min(start + 1500, count)):
            which = random.integers(len(names))
            paths.append(tmp_path / f"{i}-{names[which]}")
            paths[-1].write_bytes(mutated(contents[which], contents, random))
        errors = errors_of(paths, "--timeout", 10, "--report", tmp_path / "page.html")
        answered += sum(not error for error in errors.values())
        assert not [error for error in errors.values() if "takes more than" in error]
    assert count * 0.05 < answered < count * 0.95  # the damage was neither none nor all
