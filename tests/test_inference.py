"""inference.py: what it reads, what it answers, in which form, and with which exit code."""

import csv
import errno
import fcntl
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import CNN
import inference

ROOT = Path(__file__).parents[1]
HOSTILE = (  # names that paths can have on Linux, each of a picture
    b'comma, and "quote".png',
    b"new\nline.png",
    b"return\r.png",
    b"escape\x1b[31m.png",
    b"not utf-8 \xff\xfe.png",
    b"tab\t and back\\slash.png",
    "über \u202egnp.\u2028.png".encode(),
    b"<script>alert(1)</script>.png".replace(b"/", b"\\"),
    b"'; rm -rf ~ #.PNG",
    b"-rf.png",
    b"=1+1.png",
)


def glyph(character: str = "F", side: int = 64, seed: int = 3) -> Image.Image:
    """Draw a character dark on white, with room around it."""
    hand = replace(strokes.hand(seed), pen=0.12)
    ink = strokes.ink(character, hand, (side, side), longest=0.7 * side)
    return Image.fromarray((255 - 255 * np.asarray(ink)).astype(np.uint8))


def fitted(path: Path) -> np.ndarray:
    images, inked, _ = inference.fit([inference.to_grey(inference.load(os.fspath(path)))], CNN.SIZE)
    assert inked.all()
    return images[0]


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of no merit whose answers differ from picture to picture, with a temperature."""
    torch.manual_seed(5)
    net = CNN.Net()
    with torch.no_grad():
        net.fc2.weight.mul_(12)
    net.temperature, net.lookalikes = 1.7, ["0O", "1IL"]
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    CNN.save(net, path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 144 characters and some with hostile names, with a blank, a wreck and a text."""
    top = tmp_path_factory.mktemp("pictures")
    for i, character in enumerate(CNN.ALPHABET * 4):
        place = top / f"part{i % 3}" / ("deep" if i % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        glyph(character, 40 + i % 7, seed=i).save(place / f"{i:03d}_{character}.png")
    for i, name in enumerate(HOSTILE):
        glyph("3AQ7"[i % 4], 48, seed=i).save(top / os.fsdecode(name), "PNG")
    Image.new("L", (30, 30), 90).save(top / "blank.png")
    (top / "wreck.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (top / "notes.txt").write_text("not a picture")
    return top


@pytest.fixture
def run(weights: Path, capfdbinary: pytest.CaptureFixture):
    """Run the command in this process; return exit code, stdout and stderr."""

    def run_in_process(*arguments: object) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        try:
            code = inference.main(["--model", str(weights), *map(str, arguments)])
        except SystemExit as end:  # argparse's
            code = end.code
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run_in_process


def rows(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode("utf-8", "surrogateescape"), newline="")))


# What it reads


def deep(grey: Image.Image, low: int, high: int) -> Image.Image:
    values = low + (high - low) * (np.asarray(grey, float) / 255)
    return Image.fromarray(values.astype(np.uint16))


def clear(grey: Image.Image, colour: int) -> Image.Image:
    """Return ink of a colour on transparent ground."""
    picture = Image.new("RGBA", grey.size, (colour, colour, colour, 0))
    picture.putalpha(ImageOps.invert(grey))
    return picture


def with_clear_palette(grey: Image.Image) -> Image.Image:
    palette = grey.quantize(8)
    lightest = max(range(8), key=lambda i: sum(palette.getpalette()[3 * i : 3 * i + 3]))
    palette.info["transparency"] = lightest
    return palette


MODES = {
    "grey": ("png", lambda g: g),
    "negative": ("png", ImageOps.invert),
    "faint": ("png", lambda g: g.point(lambda v: 150 + v // 4)),
    "bilevel": ("png", lambda g: g.convert("1")),
    "palette": ("png", lambda g: g.quantize(8)),
    "clear palette": ("png", with_clear_palette),
    "clear palette gif": ("gif", with_clear_palette),
    "grey and alpha": ("png", lambda g: clear(g, 0).convert("LA")),
    "black on clear": ("png", lambda g: clear(g, 0)),
    "white on clear": ("webp", lambda g: clear(g, 255)),
    "colour": ("png", lambda g: ImageOps.colorize(g, (20, 30, 120), (235, 230, 200))),
    "opaque": ("png", lambda g: g.convert("RGBA")),
    "cmyk": ("tif", lambda g: g.convert("RGB").convert("CMYK")),
    "cmyk jpeg": ("jpg", lambda g: g.convert("RGB").convert("CMYK")),
    "ycbcr": ("tif", lambda g: g.convert("RGB").convert("YCbCr")),
    "lab": (
        "tif",
        lambda g: Image.merge("LAB", (g, Image.new("L", g.size), Image.new("L", g.size))),
    ),
    "16 bit": ("png", lambda g: deep(g, 0, 65535)),
    "16 bit, 12 used": ("tif", lambda g: deep(g, 0, 4095)),
    "16 bit negative": ("tif", lambda g: deep(g, 60000, 1000)),
    "32 bit": ("tif", lambda g: Image.fromarray(np.asarray(g, np.int32) * 8_000_000)),
    "float": ("tif", lambda g: Image.fromarray(np.asarray(g, np.float32) / 255)),
    "float, NaN": (
        "tif",
        lambda g: Image.fromarray(np.where(np.eye(64) > 0, np.nan, g / np.float32(9))),
    ),
    "jpeg": ("jpg", lambda g: g.convert("RGB")),
    "upper case": ("JPEG", lambda g: g),
    "bmp": ("bmp", lambda g: g),
    "dib": ("dib", lambda g: g),
    "gif": ("gif", lambda g: g),
    "tiff": ("tiff", lambda g: g),
    "webp": ("webp", lambda g: g),
    "avif": ("avif", lambda g: g),
    "jpeg 2000": ("jp2", lambda g: g),
    "pgm": ("pgm", lambda g: g),
    "pbm": ("pbm", lambda g: g.convert("1")),
    "pfm": ("pfm", lambda g: Image.fromarray(np.asarray(g, np.float32))),
    "sgi": ("sgi", lambda g: g),
    "qoi": ("qoi", lambda g: g.convert("RGB")),
    "pcx": ("pcx", lambda g: g),
    "ico": ("ico", lambda g: g),
    "tga": ("tga", lambda g: g.convert("RGB")),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_format_and_polarity_gives_the_same_character(mode: str, tmp_path: Path) -> None:
    suffix, convert = MODES[mode]
    glyph().save(tmp_path / "plain.png")
    path = tmp_path / f"picture.{suffix}"
    form = {"jpg": "JPEG", "JPEG": "JPEG", "tif": "TIFF", "pfm": "PPM"}.get(suffix)
    convert(glyph()).save(path, form)
    assert likeness(fitted(path), fitted(tmp_path / "plain.png")) > 0.93


@pytest.mark.parametrize("side", [12, 20, 28, 100, 191, 193, 500, 2000])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_any_size_gives_the_same_character(side: int, suffix: str, tmp_path: Path) -> None:
    glyph(side=200).save(tmp_path / "plain.png")
    glyph(side=side).save(tmp_path / f"sized.{suffix}", quality=95)
    same = likeness(fitted(tmp_path / f"sized.{suffix}"), fitted(tmp_path / "plain.png"))
    assert same > (0.9 if side > 20 else 0.7)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_flags_are_obeyed(suffix: str, tmp_path: Path) -> None:
    upright = glyph(side=80).crop((10, 0, 70, 80))
    upright.save(tmp_path / "upright.png")
    t = Image.Transpose
    stored_as = {2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE}
    stored_as |= {6: t.ROTATE_90, 7: t.TRANSVERSE, 8: t.ROTATE_270}
    for flag, turn in stored_as.items():
        exif = Image.Exif()
        exif[274] = flag
        stored = upright.transpose(turn)
        stored.save(tmp_path / f"flag.{suffix}", exif=exif)
        assert (
            likeness(fitted(tmp_path / f"flag.{suffix}"), fitted(tmp_path / "upright.png")) > 0.93
        )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_many_frames_the_first_counts(suffix: str, tmp_path: Path) -> None:
    glyph("F").save(tmp_path / "plain.png")
    others = [glyph(character) for character in "XYZ" * 5]
    glyph("F").save(tmp_path / f"many.{suffix}", save_all=True, append_images=others, loop=0)
    assert likeness(fitted(tmp_path / f"many.{suffix}"), fitted(tmp_path / "plain.png")) > 0.93


def test_no_ink_is_no_character(run, tmp_path: Path) -> None:
    for i, (size, level) in enumerate([((1, 1), 0), ((9, 9), 255), ((300, 200), 128)]):
        Image.new("L", size, level).save(tmp_path / f"{i}.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    code, out, err = run("--input", tmp_path)
    assert (code, out) == (1, b"")
    assert err.count("blank: no ink found") == 4
    assert "4 pictures: 4 blank" in err


# What it finds


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a.b", "a-b", "B", "a b"]), max_size=3), max_size=9
    )
)
def test_the_order_is_that_of_sorted_paths(tmp_path_factory: pytest.TempPathFactory, tree) -> None:
    top = tmp_path_factory.mktemp("tree")
    for i, parts in enumerate(tree):
        place = top.joinpath(*parts)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").touch()
        (place / f"a{i}.PNG").touch()
    found = [path for path, _ in inference.find([str(top)], Counter())]
    assert found == [path.as_posix() for path in sorted(top.rglob("*.[pP][nN][gG]"))]


def test_inputs_come_in_the_order_given_and_paths_as_pathlib_writes_them(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "a/1.png", "noted.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        glyph().save(tmp_path / name, "PNG")
    code, out, _ = run("--input", "./b/", "noted.txt", ".", "b", "--format", "json")
    paths = [json.loads(line)["path"] for line in out.splitlines()]
    assert code == 0
    assert paths == ["b/2.png", "noted.txt", "a/1.png", "b/2.png"]


def test_a_long_flat_jpeg_is_read_as_the_png_is(tmp_path: Path) -> None:
    strip = Image.new("L", (9800, 100), 255)
    strip.paste(glyph("P", 90), (400, 5))
    for form in ("png", "jpg"):
        strip.save(tmp_path / f"strip.{form}")
    errors, _, ink = inference.prepare([str(tmp_path / f"strip.{f}") for f in ("png", "jpg")], 28)
    assert errors == ["", ""]
    png, jpg = np.frombuffer(ink, np.uint8).reshape(2, 28, 28).astype(float)
    assert np.abs(png - jpg).mean() < 16


def test_links_to_folders_are_not_followed_and_deep_folders_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    depth = 1100  # beyond Python's stack
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("deep.png").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path)
    passed_over: Counter[str] = Counter()
    found = list(inference.find([str(tmp_path)], passed_over))
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own removal recurses
    assert found == [(f"{tmp_path}/{'d/' * depth}deep.png", "")]
    assert passed_over == {"links to folders": 2}


# What it writes


def test_ascii_lines_are_the_origins_one_for_each_picture(run, folder: Path) -> None:
    code, out, err = run("--input", folder)
    lines = out.decode().splitlines()
    assert code == 1
    assert len(lines) == 144 + len(HOSTILE)
    assert all(re.fullmatch(r"\d{3}, /[^\x00-\x1f\x7f]+\.(png|PNG)", line) for line in lines)
    assert {chr(int(line[:3])) for line in lines} <= set(CNN.ALPHABET)
    assert any(line.endswith(r"/new\nline.png") for line in lines)
    assert any(line.endswith(r"/not utf-8 \xff\xfe.png") for line in lines)
    assert any(line.endswith('/comma, and "quote".png') for line in lines)
    assert "blank.png: blank" in err
    assert "wreck.jpg: " in err
    assert (
        f"{146 + len(HOSTILE)} pictures: {144 + len(HOSTILE)} answered, 1 blank, 1 unreadable"
        in err
    )
    assert "1 other files passed over" in err


def test_csv_and_json_carry_every_path_to_the_byte(run, folder: Path) -> None:
    _, lines, _ = run("--input", folder)
    _, table, table_err = run("--input", folder, "--format", "csv", "--topk", 36)
    _, objects, _ = run("--input", folder, "--format", "json", "--topk", 36)
    of_csv, of_json = rows(table), [json.loads(line) for line in objects.splitlines()]
    on_disk = {os.fsencode(path) for path in folder.rglob("*") if path.is_file()}
    on_disk.remove(os.fsencode(folder / "notes.txt"))
    for found in (of_csv, of_json):
        assert sorted(os.fsencode(row["path"]) for row in found) == sorted(on_disk)
    for row, entry in zip(of_csv, of_json, strict=True):
        assert row["path"] == entry["path"]
        assert row["character"] == (entry["character"] or "")
        assert row["error"] == (entry["error"] or "")
        others = dict(pair.split(":") for pair in row["alternatives"].split())
        assert {c: float(p) for c, p in others.items()} == entry["alternatives"]
        if entry["character"]:
            p = [entry["confidence"], *entry["alternatives"].values()]
            assert p == sorted(p, reverse=True)
            assert sum(p) == pytest.approx(1, abs=0.003)
            assert len(p) == 36
        else:
            assert entry["confidence"] is None
    answers = [f"{ord(row['character']):03d}".encode() for row in of_csv if row["character"]]
    assert answers == [line[:3] for line in lines.splitlines()]
    assert "blank" not in table_err.replace("1 blank", "")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_character_small_in_a_large_picture_is_read_at_its_own_resolution(
    orientation: int, tmp_path: Path
) -> None:
    random, close, images = np.random.default_rng(0), [], []
    for i, character in enumerate("2A5RKW8G"):
        drawn = np.zeros((1200, 1600))
        drawn[700:820, 1100:1220] = strokes.ink(character, strokes.hand(i), (120, 120))
        noise = random.normal(0, 4, drawn.shape)
        grey = Image.fromarray(np.uint8((220 - 170 * drawn + noise).clip(0, 255)))
        close.append(np.asarray(grey.crop((1040, 640, 1280, 880)).reduce(2)))
        turned = grey.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else grey
        exif = Image.Exif()
        exif[0x0112] = orientation  # 6: to be turned by 90 degrees clockwise
        turned.save(tmp_path / "picture.png", exif=exif)
        errors, _, block = inference.prepare([str(tmp_path / "picture.png")], CNN.SIZE)
        assert errors == [""]
        images.append(np.frombuffer(block, np.uint8).reshape(CNN.SIZE, CNN.SIZE))
    expected, _, _ = inference.fit(close, CNN.SIZE)
    coarse, _, _ = inference.fit(
        [np.asarray(Image.fromarray(c).reduce(6)) for c in close], CNN.SIZE
    )
    near, far = (np.abs(np.subtract(i, expected, dtype=float)).mean() for i in (images, coarse))
    assert near < far / 3


def test_a_second_look_at_a_long_flat_picture_finds_the_place(tmp_path: Path) -> None:
    picture = np.full((200, 6000), 255, np.uint8)
    picture[60:140, 4000:4016] = picture[124:140, 4000:4060] = 0  # an L, 80 px tall
    Image.fromarray(picture).save(tmp_path / "l.png")
    shape = inference.to_grey(inference.load(str(tmp_path / "l.png"))).shape
    place = np.array([100, 4030, 80]) * max(shape) / 6000
    seen = inference.read_closer(str(tmp_path / "l.png"), shape, place)
    assert (seen < 128).sum() / (seen.shape[0] / 200) ** 2 == pytest.approx(2000, rel=0.2)


def test_no_second_look_where_the_file_shows_no_more(tmp_path: Path) -> None:
    for side in (28, 150):  # read as they are
        glyph(side=side).save(tmp_path / "f.png")
        assert inference.read_closer(str(tmp_path / "f.png"), (side, side), np.full(3, 9.0)) is None


def test_answers_are_those_of_float_where_a_cpu_has_no_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = CNN.load(ROOT / "model.pt")
    drawn = [strokes.emnist_picture(c, strokes.hand(1)) for c in CNN.ALPHABET]
    images = torch.from_numpy(np.stack(drawn)).unsqueeze(1)  # (36, 1, 28, 28)
    monkeypatch.setattr(CNN, "runs_in_int8", lambda net: False)
    with torch.inference_mode():
        logits, expected = inference.quickest(net)(images), net(images / 255)
    assert logits.dtype == torch.float32
    assert (logits.softmax(1) - expected.softmax(1)).abs().max() < 0.1
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_a_second_look_that_fails_leaves_the_first(tmp_path: Path, monkeypatch: object) -> None:
    picture = np.full((400, 400), 255, np.uint8)
    picture[200:240, 200:206] = picture[200:206, 200:225] = 0
    Image.fromarray(picture).save(tmp_path / "l.png")
    found = []

    def fail(path: str, shape: tuple[int, ...], place: np.ndarray) -> None:
        found.append(place[2])
        raise OSError("it is gone")

    monkeypatch.setattr(inference, "read_closer", fail)
    errors, _, block = inference.prepare([str(tmp_path / "l.png")], CNN.SIZE)
    assert errors == [""]
    assert len(block) == CNN.SIZE**2
    assert found[0] < inference.SMALL


def test_the_same_answers_for_any_batch_size_and_number_of_workers(run, folder: Path) -> None:
    outputs = {
        run("--input", folder, "--format", "csv", "--batch-size", size, "--workers", workers)[1]
        for size, workers in ((7, 1), (64, 3), (100, 2), (1000, 1))
    }
    assert len(outputs) == 1


def test_answers_are_those_of_the_net_alone(run, folder: Path, weights: Path) -> None:
    """By another route: the plain net in float32, one picture at a time."""
    _, out, _ = run("--input", folder, "--format", "json")
    net = CNN.load(weights)
    same = 0
    entries = [entry for entry in map(json.loads, out.splitlines()) if entry["character"]]
    for entry in entries:
        image = torch.from_numpy(fitted(Path(entry["path"]))).view(1, 1, 28, 28) / 255
        with torch.inference_mode():
            p = (net(image) / net.temperature).softmax(1)[0]
        assert p[CNN.ALPHABET.index(entry["character"])] == pytest.approx(
            entry["confidence"], abs=0.06
        )
        same += CNN.ALPHABET[p.argmax()] == entry["character"]
    assert same >= 0.97 * len(entries)  # bfloat16 may turn what is nearly even


def test_an_alphabet_restricts_and_renormalises(run, folder: Path) -> None:
    _, out, _ = run("--input", folder, "--format", "json", "--topk", 36)
    _, few, _ = run("--input", folder, "--format", "json", "--topk", 36, "--alphabet", "0-3x")
    for line, small in zip(out.splitlines(), few.splitlines(), strict=True):
        line, small = json.loads(line), json.loads(small)
        if not line["character"]:
            continue
        everything = {line["character"]: line["confidence"]} | line["alternatives"]
        allowed = {small["character"]: small["confidence"]} | small["alternatives"]
        assert set(allowed) == set("0123X")
        total = sum(everything[c] for c in "0123X")
        if total > 0.05:  # of figures rounded to 4 places
            for c in "0123X":
                assert allowed[c] == pytest.approx(everything[c] / total, abs=0.02)


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("0-9", "0123456789"),
        ("A-Z", CNN.ALPHABET[10:]),
        ("a-c9", "9ABC"),
        ("8-B", "89AB"),
        ("zZz", "Z"),
        ("ABCDEFGHJKLMNPRSTUVWXYZ0123456789", CNN.ALPHABET.translate(str.maketrans("", "", "IOQ"))),
    ],
)
def test_alphabets(text: str, characters: str) -> None:
    assert inference.parse_alphabet(text, CNN.ALPHABET) == characters


def test_doubtful_answers_are_none_and_marked_in_each_format(run, folder: Path) -> None:
    _, out, _ = run("--input", folder, "--format", "json")
    confidence = {e["path"]: e["confidence"] for e in map(json.loads, out.splitlines())}
    sure = sorted(p for p in confidence.values() if p)
    limit = sure[len(sure) // 2]
    flags = ("--input", folder, "--min-confidence", limit)
    _, out, err = run(*flags, "--format", "json")
    doubtful = 0
    for entry in map(json.loads, out.splitlines()):
        if confidence[entry["path"]] is not None and entry["character"] is None:
            doubtful += 1
            assert entry["confidence"] <= limit
            assert len(entry["alternatives"]) == 3
            assert "--min-confidence" in entry["error"]
    assert 0.3 * len(sure) < doubtful < 0.7 * len(sure)
    assert f"{doubtful} doubtful" in err
    code, out, _ = run(*flags)
    assert code == 1
    assert out.count(b"---, ") == doubtful
    table = rows(run(*flags, "--format", "csv")[1])
    assert (
        sum("--min-confidence" in row["error"] and not row["character"] for row in table)
        == doubtful
    )


@pytest.mark.parametrize(("alphabet", "group"), [("O0", "0O"), ("L1", "1IL"), ("0A", None)])
def test_lookalikes_are_named_where_the_two_best_are_of_a_group(
    run, folder: Path, alphabet: str, group: str | None
) -> None:
    flags = ("--input", folder / "part0", "--alphabet", alphabet, "--topk", 1)
    entries = list(map(json.loads, run(*flags, "--format", "json")[1].splitlines()))
    assert {entry["lookalike"] for entry in entries} == {group}
    assert {row["lookalike"] for row in rows(run(*flags, "--format", "csv")[1])} == {group or ""}


def test_topk_is_said_to_have_no_effect_on_ascii(run, folder: Path) -> None:
    _, out, err = run("--input", folder / "part0", "--topk", 5)
    assert out == run("--input", folder / "part0")[1]
    assert "--topk shows in --format csv and json" in err


# How it ends


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphabet", "0-9?"], "'?'"),
        (["--alphabet", "9-0"], "9-0"),
        (["--alphabet", ""], "empty"),
        (["--alphabet", "ß"], "ß"),
        (["--model", "missing.pt"], "missing.pt"),
        (["--model", "."], "folder"),
        (["--model", __file__], "not a weights file"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "--device meta: "),
        (["--batch-size", "0"], "--batch-size"),
        (["--topk", "none"], "--topk"),
        (["--min-confidence", "1.5"], "--min-confidence"),
        (["--min-confidence", "nan"], "--min-confidence"),
        (["--timeout", "-1"], "--timeout"),
        (["--format", "xml"], "xml"),
        (["--resume"], "--output"),
        (["--resume", "--output", "a", "--report", "b"], "--report shows every picture"),
        (["--output", "/dev/null"], "not a regular file"),
        (["--output", "missing/out.csv"], "folder is missing"),
        (["--report", "."], "not a regular file"),
        (["--nonsense"], "--nonsense"),
        (["--input", "missing\x1b[2J"], r"missing\x1b[2J: no such"),
    ],
)
def test_wrong_usage_is_one_clear_message_and_2_with_nothing_written(
    run,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--input", folder, *flags)
    assert code == 2
    assert out == b""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--output", "--report"])
def test_what_is_read_is_never_replaced(
    run, weights: Path, folder: Path, tmp_path: Path, flag: str
) -> None:
    single = tmp_path / "single"
    glyph().save(single, "PNG")
    (tmp_path / "link").symlink_to(weights)
    named = {file: file for file in (single, weights, tmp_path / "link", folder / "blank.png")}
    for name in ("a.partial", "b.partial.settings"):  # taken on the way to a, b
        glyph().save(tmp_path / name, "PNG")
        named[tmp_path / name] = tmp_path / name[0]
    for read, file in named.items():
        before = read.read_bytes()
        code, out, err = run("--input", folder, *(p for p in named if p != weights), flag, file)
        assert (code, out) == (2, b"")
        assert err == f"inference.py: {flag} {file}: would replace what is read: choose another\n"
        assert read.read_bytes() == before
    code, _, err = run("--input", single, "--output", tmp_path / "x", "--report", tmp_path / "x")
    assert code == 2
    assert "--report" in err


def test_weights_without_finite_answers_are_refused(run, folder: Path, tmp_path: Path) -> None:
    net = CNN.Net()
    with torch.no_grad():
        net.fc2.weight.fill_(3e38)
    CNN.save(net, tmp_path / "huge.pt")
    code, out, err = run("--input", folder / "part1", "--model", tmp_path / "huge.pt")
    assert (code, out) == (2, b"")
    assert err == "inference.py: --model: its weights give no finite answers: take others\n"


def test_on_a_terminal_a_bar_shows_and_errors_stand_above_it(
    run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    code, out, err = run("--input", folder)
    plain = run("--input", folder)
    assert (code, out) == plain[:2]
    assert " pictures/s" in err
    lines = [line.rpartition("\r")[2] for line in err.split("\n")]
    assert [line for line in lines if "blank: no ink" in line] == [
        f"{folder}/blank.png: {inference.BLANK}"
    ]


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(weights: Path, folder: Path, tmp_path: Path, redirection: str) -> None:
    def end(*flags: object) -> subprocess.CompletedProcess:
        words = map(str, command(weights, "--input", folder / "part1", *flags))
        line = f"{shlex.join(words)} {redirection}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True)

    without, written = end(), end("--output", tmp_path / "out")
    assert (without.returncode, written.returncode) == (0 if redirection == "2>&-" else 2, 0)
    assert (tmp_path / "out").read_bytes().count(b"\n") == 48
    assert without.stderr == (
        "inference.py: stdout is closed: name a file with --output\n" * (redirection == ">&-")
    )
    assert without.stdout.count("\n") == 48 * (redirection == "2>&-")


def test_0_when_all_are_answered(run, folder: Path, tmp_path: Path) -> None:
    assert run("--input", folder / "part1")[0] == 0
    assert run("--input", tmp_path)[0] == 0  # none found: said, but nothing went wrong
    assert "none found" in run("--input", tmp_path)[2]


COUNT = 2500


def command(weights: Path, *arguments: object) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "inference.py"),
        "--model",
        str(weights),
        *map(str, arguments),
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_resume_goes_on(
    run, weights: Path, folder: Path, tmp_path: Path, number: int, code: int
) -> None:
    many = tmp_path / "many"  # enough for a second, however fast
    many.mkdir()
    for i in range(COUNT):
        os.link(folder / "part0" / "deep" / "003_3.png", many / f"{i:05d}.png")
    output = tmp_path / "out.json"
    flags = ("--input", many, "--format", "json", "--output", output)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as CI in the background
    process = subprocess.Popen(command(weights, *flags), stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, ignored)
    part = tmp_path / "out.json.partial"
    while not (part.exists() and part.stat().st_size > 1000):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "--resume" in err
    assert "Traceback" not in err
    assert not output.exists()
    answered = part.read_bytes().splitlines()
    assert 0 < len(answered) < COUNT
    code, _, err = run(*flags, "--resume")
    assert code == 0
    assert f"{len(answered):,} pictures are answered already" in err
    entries = list(map(json.loads, output.read_bytes().splitlines()))
    assert [entry["path"] for entry in entries] == sorted(map(str, many.iterdir()))
    assert len({entry["character"] for entry in entries}) == 1
    assert not part.exists()


def test_a_reader_that_leaves_ends_it_quietly(weights: Path, folder: Path) -> None:
    line = " ".join(command(weights, "--input", f"'{folder}'", "--batch-size", 1)) + " | head -n 1"
    end = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert end.stdout.count("\n") == 1
    assert "Traceback" not in end.stderr
    assert "rror" not in end.stderr


# Going on


@pytest.mark.parametrize("form", ["ascii", "csv", "json"])
def test_resume_gives_the_file_of_a_run_that_was_not_cut(
    run, folder: Path, tmp_path: Path, form: str
) -> None:
    whole, cut, part = (tmp_path / name for name in ("whole", "cut", "cut.partial"))
    assert run("--input", folder, "--format", form, "--output", whole)[:2] == (1, b"")
    content = whole.read_bytes()
    random = np.random.default_rng(1)
    lengths = [0, 30, len(inference.CSV_HEADER), len(content) - 1, len(content)]
    for end in [*lengths, *random.integers(0, len(content), 4)]:
        part.write_bytes(content[:end])
        flags = ("--input", folder, "--format", form, "--output", cut, "--resume")
        assert run(*flags)[:2] == (1, b"")
        assert cut.read_bytes() == content, end
        assert not part.exists()


@pytest.mark.parametrize("form", ["ascii", "csv", "json"])
def test_resume_tries_again_what_had_no_answer_and_keeps_the_order(
    run, tmp_path: Path, form: str
) -> None:
    pictures, output, whole = tmp_path / "pictures", tmp_path / "link", tmp_path / "whole"
    output.symlink_to(tmp_path / "out")
    pictures.mkdir()
    flags = ("--input", pictures, "--format", form, "--output", output)
    for name in "bdf":
        glyph(name.upper()).save(pictures / f"{name}.png")
    for name in "ceg":
        (pictures / f"{name}.png").write_bytes(b"torn")
    assert run(*flags)[0] == 1
    (pictures / "g.png").unlink()
    glyph("C").save(pictures / "c.png")
    glyph("A").save(pictures / "a.png")  # new
    code, _, err = run(*flags, "--resume")
    assert code == 1
    assert "3 pictures are answered already" in err
    assert "3 pictures: 2 answered, 1 unreadable" in err
    glyph("E").save(pictures / "e.png")
    assert run(*flags, "--resume")[0] == 0
    assert run(*flags[:-1], whole)[0] == 0
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()  # nothing of g.png
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "pictures", "whole"]
    assert output.is_symlink()


def test_a_second_run_with_the_same_output_is_refused(run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open(f"{output}.partial", "wb") as held:
        held.write(b"048, a.png\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in ((), ("--resume",)):
            code, _, err = run("--input", folder, "--output", output, *flags)
            assert code == 2
            place = f"--output {output}: another run is writing to it"
            assert err == f"inference.py: {place}: wait, or stop it\n"
    assert Path(f"{output}.partial").read_bytes() == b"048, a.png\n"


def test_where_there_are_no_locks_none_is_held(
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run("--input", folder, "--output", tmp_path / "out")[0] == 1  # of blank.png
    assert (tmp_path / "out").read_bytes() == run("--input", folder)[1]


def test_resume_counts_doubtful_answers_of_before(run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--input", folder / "part1", "--min-confidence", 1, "--output", output)
    assert run(*flags)[0] == 1
    before = output.read_bytes()
    assert b"---, " in before
    code, _, err = run(*flags, "--resume")
    assert code == 1
    assert "0 pictures: none found" in err
    assert output.read_bytes() == before


@pytest.mark.parametrize("form", ["ascii", "csv"])
def test_resume_takes_no_name_for_another(run, tmp_path: Path, form: str) -> None:
    """Names are bytes: a newline, and backslash and n; two bytes, and the same as a character."""
    pictures, output = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    names = [b"1\n.png", b"1\\n.png", b"2\x9f.png", "2\x9f.png".encode(), b"2\\x9f.png"]
    paths = [pictures / os.fsdecode(name) for name in names]
    flags = ("--input", pictures, "--format", form, "--output", output, "--resume")
    for path in paths:
        glyph().save(path, "PNG")
        code, _, err = run(*flags)
        assert code == 0
        assert "1 pictures: 1 answered" in err
    assert run(*flags[:-3])[1] == output.read_bytes()
    assert len(set(output.read_bytes().splitlines())) >= len(names)


@pytest.mark.parametrize(("form", "other"), [("csv", "json"), ("json", "ascii"), ("ascii", "csv")])
def test_resume_refuses_a_file_of_another_form(
    run, folder: Path, tmp_path: Path, form: str, other: str
) -> None:
    output = tmp_path / "out"
    run("--input", folder, "--format", other, "--output", output)
    content = output.read_bytes()
    code, out, err = run("--input", folder, "--format", form, "--output", output, "--resume")
    assert (code, out) == (2, b"")
    assert f"--resume: {output}, byte 0: no {form} row of this program" in err
    assert err.count("\n") == 1
    assert output.read_bytes() == content
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--alphabet", "0-9"),
        ("--min-confidence", "0.5"),
        ("--topk", "2"),
        ("--format", "ascii"),
        ("--model", "other.pt"),
    ],
)
def test_resume_refuses_other_settings_and_names_them(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    CNN.save(CNN.Net(), Path("other.pt"))
    begin = ["--input", str(folder / "part1"), "--model", str(weights), "--output", "out"]
    begin += ["--format", "json"]
    with monkeypatch.context() as patch:
        patch.setattr(inference.Output, "finish", lambda self: 1 / 0)  # cut short, all but done
        with pytest.raises(ZeroDivisionError):
            inference.main(begin)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in files} == {"other.pt", "out.partial", "out.partial.settings"}
    capsys.readouterr()
    assert inference.main([*begin, "--resume", *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert f"out.partial was begun with {flags[0]} " in err[-1]
    assert err[-1].count(" --") == 3  # two flags of the advice
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert inference.main([*begin, "--resume", "--batch-size", "9"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["other.pt", "out"]


@pytest.mark.parametrize("note", [b"[1]", b"7", b"{", b"\xff"])
def test_resume_passes_over_a_note_and_a_path_of_another_kind(
    run, folder: Path, tmp_path: Path, note: bytes
) -> None:
    row = b'{"path": ["a"], "character": "A", "alternatives": {}}\n'
    (tmp_path / "out.partial").write_bytes(row)
    (tmp_path / "out.partial.settings").write_bytes(note)
    flags = ("--format", "json", "--output", tmp_path / "out", "--resume")
    whole = run("--input", folder, "--format", "json")
    assert run("--input", folder, *flags)[0] == whole[0]
    assert (tmp_path / "out").read_bytes() == row + whole[1]


@pytest.mark.parametrize("place", ["n" * 250, "folder"])
def test_a_file_that_cannot_be_written_is_one_line_without_a_hint(
    run, folder: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder.partial").mkdir()
    code, out, err = run("--input", folder, "--output", tmp_path / place)
    assert (code, out) == (2, b"")
    assert err.count("\n") == 1
    assert "too long" in err or "Is a directory" in err
    assert "--resume" not in err


def test_a_full_disk_is_one_line_and_keeps_what_was_written(weights: Path, folder: Path) -> None:
    end = subprocess.run(
        command(weights, "--input", folder),
        stdout=open("/dev/full", "wb"),  # noqa: SIM115
        stderr=subprocess.PIPE,
        text=True,
    )
    assert end.returncode == 2
    assert "No space left on device" in end.stderr.splitlines()[-1]
    assert "Traceback" not in end.stderr


# Several processes


def torchrun(weights: Path, *arguments: object) -> list[str]:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*ranks, *command(weights, *arguments)[1:]]


def test_two_ranks_write_what_one_process_writes(run, weights: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for i, name in enumerate(HOSTILE):
        glyph("3AQ7"[i % 4], 30, seed=i).save(many / os.fsdecode(name), "PNG")
    for i in range(3 * inference.ROUNDS[1]):  # more than a round, not a whole number of them
        os.link(many / os.fsdecode(HOSTILE[i % len(HOSTILE)]), many / f"{i}.png")
    flags = ("--input", many, "--format", "csv")
    end = subprocess.run(torchrun(weights, *flags), capture_output=True)
    assert end.returncode == 0, end.stderr.decode()
    assert end.stdout == run(*flags)[1]
    assert end.stderr.count(b" pictures: ") == 1


def test_ranks_are_dealt_few_pictures_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[list[int]] = []

    def scatter(own: list, shares: list) -> None:
        dealt.append([len(block) for block, _ in shares])
        own[0], others[:] = shares[0], shares[1][0]

    def gather(own: list, gathered: list) -> None:
        gathered[:] = [own, others]

    others: list[tuple[str, str]] = []
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "scatter_object_list", scatter)
    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    ranks = inference.Ranks()
    ranks.count = 2
    pairs = [(f"{i}.png", "") for i in range(8500)]
    answers = [
        pair for own in ranks.answers(iter(pairs), lambda block: [list(block)]) for pair in own
    ]
    assert answers == pairs
    assert dealt[:-1] == [[n, n] for n in (64, 128, 256, 512, 1024, 1024, 1024)]
    assert dealt[-1] == [436, 0]


def test_a_lost_rank_fails_the_job_and_resume_finishes_it(
    run, weights: Path, folder: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for i in range(5 * inference.ROUNDS[1]):
        os.link(folder / "part0" / "deep" / "003_3.png", many / f"{i:05d}.png")
    output, part = tmp_path / "out.json", tmp_path / "out.json.partial"
    flags = ("--input", many, "--format", "json", "--output", output)
    job = subprocess.Popen(torchrun(weights, *flags), stderr=subprocess.PIPE, text=True)
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(rank_process(job.pid, 1), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "--resume" in err
    assert not output.exists()
    assert run(*flags, "--resume")[0] == 0
    paths = [json.loads(line)["path"] for line in output.read_bytes().splitlines()]
    assert paths == sorted(map(str, many.iterdir()))


def rank_process(parent: int, rank: int) -> int:
    """Return the process of a rank among the children of torchrun."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise LookupError(rank)
