"""Any picture file to EMNIST's form, whatever pen, paper, light, size and mode.

Every picture here is drawn by this file or strokes.py. Two fits are compared by `overlap`: shared
ink over ink.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import strokes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

import inference
from picture import BLANK, fit, prepare, propose, to_grey

SIZE = 28
FIVE = [[(70, 10), (30, 12), (27, 45)], [(27, 45), (60, 42), (75, 62), (62, 86), (25, 88)]]
SLIM = [[(50, 30), (50, 90)]]  # an i, but for its dot
DOT = (46, 4, 54, 12)


def draw(lines=FIVE, *, side=100, width=7.0, margin=0.2, dot=None) -> np.ndarray:
    """Draw lines given in a box of 100 units, dark on white, `side` px and a margin around it."""
    scale, times = side / 100, 4  # drawn larger, then reduced, for smooth edges
    edge = round(side * margin)
    whole = side + 2 * edge
    picture = Image.new("L", (whole * times, whole * times), 255)
    pen = ImageDraw.Draw(picture)
    for line in lines:
        points = [((x * scale + edge) * times, (y * scale + edge) * times) for x, y in line]
        pen.line(points, 0, max(1, round(width * scale * times)), joint="curve")
    if dot:
        pen.ellipse([(v * scale + edge) * times for v in dot], 0)
    return np.asarray(picture.reduce(times))


def fit_one(grey: np.ndarray) -> np.ndarray:
    """Return the fit, as every fit is."""
    image = fit(grey, SIZE)
    assert image.shape == (SIZE, SIZE)
    assert image.dtype == np.uint8
    assert image.max() == 255
    return image


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one > 100, other > 100
    return (a & b).sum() / (a | b).sum()


def photographed(picture: np.ndarray, seed: int, noise: float = 4) -> np.ndarray:
    """Put the drawing on paper under uneven light, seen with some blur and noise."""
    y, x = np.mgrid[: len(picture), : len(picture)] / len(picture)
    ink = np.asarray(Image.fromarray(255 - picture).filter(ImageFilter.GaussianBlur(0.7))) / 255
    seen = 220 * (1 - 0.25 * x - 0.3 * y * y) * (1 - 0.5 * ink)
    seen += np.random.default_rng(seed).normal(0, noise, picture.shape)
    return seen.clip(0, 255).astype(np.uint8)


def emnist_like(lines, width=12) -> np.ndarray:
    """Make a picture as EMNIST's were: binary 128 px, blurred by 1, cropped, padded, to 28 px."""
    ink = Image.fromarray(255 - draw(lines, side=100, width=width, margin=0.2))
    ink = ink.point(lambda v: 255 * (v > 127)).filter(ImageFilter.GaussianBlur(1))
    left, top, right, bottom = ink.getbbox()
    side = round(max(right - left, bottom - top) * 28 / 24.5)
    square = Image.new("L", (side, side))
    square.paste(ink.crop(ink.getbbox()), ((side - right + left) // 2, (side - bottom + top) // 2))
    small = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
    return (small * 255 / small.max()).astype(np.uint8)


def test_the_character_is_centred_and_as_long_as_emnists():
    aside = np.pad(draw(), ((0, 90), (40, 0)), "edge")
    for grey in (draw(), draw(margin=1.0), draw(side=30), aside):
        image = fit_one(grey)
        rows, columns = (np.flatnonzero((image > 64).any(axis)) for axis in (1, 0))
        assert 22 <= rows[-1] - rows[0] + 1 <= 24
        assert abs(rows[0] + rows[-1] - 27) <= 1
        assert abs(columns[0] + columns[-1] - 27) <= 1


@pytest.mark.parametrize("side", [24, 40, 85, 200])
@pytest.mark.parametrize("seed", range(3))
def test_shading_and_noise_leave_the_character_dark_or_light(side, seed):
    plain = fit_one(draw(side=side, width=10))
    seen = photographed(draw(side=side, width=10), seed)
    assert overlap(fit_one(seen), plain) > 0.75
    if side > 40:
        assert overlap(fit_one(255 - seen), plain) > 0.75


def test_a_cast_shadow_is_not_ink():
    picture = photographed(draw(side=150, margin=0.4), 1).astype(float)
    y, x = np.mgrid[: len(picture), : len(picture)]
    depth = (x + 0.3 * y - 0.8 * len(picture)) / 10  # a penumbra of some 20 px
    shadow = (picture * (1 - 0.4 / (1 + np.exp(-depth)))).astype(np.uint8)
    assert overlap(fit_one(shadow), fit_one(draw(side=150))) > 0.7


BESIDE = {  # what is not ink, as slices of an 84 px picture
    "specks": [np.s_[y : y + 2, x : x + 2] for y, x in ((3, 5), (78, 80), (6, 70), (78, 4))],
    "a neighbour's stroke": [np.s_[30:60, :4]],
    "line below": [np.s_[-4:-2]],
    "line at the side": [np.s_[:, :2]],
    "two lines": [np.s_[-4:-2], np.s_[1:3]],
    "frame": [np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]],
    "table": [np.s_[:6]],
}
SIDES = st.integers(24, 150)
NOISES = ["uniform", "grain", "faint", "shaded"]


@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("kind", BESIDE)
def test_a_reading_leaves_out_what_lies_beside_the_character(kind, noise):
    picture = draw(side=60).copy()
    plain = fit_one(picture)
    for place in BESIDE[kind]:
        picture[place] = 40
    picture = photographed(picture, 2, noise) if noise else picture
    images = [one.image for one in propose(picture, SIZE)]
    assert max(overlap(image, plain) for image in images if image is not None) > 0.75


@pytest.mark.parametrize(("side", "width", "margin"), [(100, 6, 0.2), (40, 6, 0.0), (300, 2, 0.1)])
@pytest.mark.parametrize("photo", [False, True])
def test_the_dot_of_an_i_stays(side, width, margin, photo):
    radius = max(width, 4) * 0.7
    dot = (50 - radius, 12 - radius, 50 + radius, 12 + radius)
    picture = draw(SLIM, side=side, width=width, margin=margin, dot=dot)
    image = fit_one(photographed(picture, 3) if photo and margin else picture)
    inked = (image > 100).any(1)
    starts = np.flatnonzero(np.diff(inked.astype(int), prepend=0) == 1)
    assert len(starts) == 2, "dot and stem, with a gap between them"
    assert starts[0] < 5


@given(st.integers(0, 2**32 - 1), SIDES, SIDES, st.sampled_from(NOISES))
@settings(max_examples=60, deadline=None)
def test_noise_alone_is_not_ink(seed, height, width, kind):
    random, shape = np.random.default_rng(seed), (height, width)
    if kind == "uniform":
        picture = random.integers(0, 256, shape)
    else:
        picture = 200 + random.normal(0, {"grain": 20, "faint": 1, "shaded": 3}[kind], shape)
    if kind == "shaded":
        picture = picture * np.linspace(1, 0.6, width)
    with pytest.raises(ValueError, match=BLANK):
        fit(picture.clip(0, 255).astype(np.uint8), SIZE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (8, 8), (28, 28), (100, 300)])
@pytest.mark.parametrize("level", [0, 7, 128, 255])
def test_one_colour_is_not_ink(shape, level):
    with pytest.raises(ValueError, match=BLANK):
        fit(np.full(shape, level, np.uint8), SIZE)


def test_a_gradient_across_a_narrow_strip_is_not_ink():
    """Thinned to the width of strokes, nothing of it is left."""
    with pytest.raises(ValueError, match=BLANK):
        fit(np.tile(np.uint8([198, 205, 212]), (141, 1)), SIZE)


def test_colours_of_equal_lightness_keep_their_contrast():
    mask = draw() < 128
    colours = np.where(mask[..., None], (220, 60, 60), (0, 172, 60)).astype(np.uint8)
    picture = Image.fromarray(colours)
    light = np.asarray(picture.convert("L"))
    assert int(light.max()) - int(light.min()) < 3, "as grey there is nothing to see"
    assert overlap(fit_one(to_grey(picture)), fit_one(draw())) > 0.85


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (250, 240, 60)])
def test_what_is_transparent_is_paper(ink):
    alpha = Image.fromarray(255 - draw())
    picture = Image.new("RGBA", alpha.size, ink)  # the same colour under the transparent part
    picture.putalpha(alpha)
    assert overlap(fit_one(to_grey(picture)), fit_one(draw())) > 0.9


@pytest.mark.parametrize("lines", [FIVE, [[(20, 20), (80, 20)], [(50, 20), (50, 90)]]])
@pytest.mark.parametrize("width", [7, 12, 28])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_emnists_own_pictures_come_back_as_they_were(lines, width, times, how):
    picture = emnist_like(lines, width)
    larger = Image.fromarray(picture).resize((SIZE * times, SIZE * times), how)
    for seen in (np.asarray(larger), 255 - np.asarray(larger)):
        difference = fit_one(seen).astype(int) - picture
        assert np.abs(difference).mean() < 4


MERGED = str.maketrans("OIL", "011")


def fraction_right(folder: Path, capfd) -> float:
    """Return how many pictures, named by their character, the whole product answers right."""
    inference.main(["--input", str(folder), "--no-adapt", "--format", "json"])
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    pairs = [(row["character"] or "", Path(row["path"]).name[0]) for row in rows]
    return np.mean([a.translate(MERGED) == b.translate(MERGED) for a, b in pairs])


def crop(character: str, hand: int, longest: int, thick: bool, blurred: bool) -> np.ndarray:
    """Draw a character that touches the edges of its picture, ink 255 on 0."""
    writer = strokes.hand(hand)
    ink = Image.fromarray((255 * strokes.ink(character, writer, (200, 200))).astype(np.uint8))
    if thick:
        ink = ink.filter(ImageFilter.MaxFilter(9))
    ink = ink.crop(ink.point(lambda level: 255 * (level > 100)).getbbox())
    if blurred:
        ink = ink.filter(ImageFilter.GaussianBlur(max(ink.size) / longest))
    size = [max(2, round(side * longest / max(ink.size))) for side in ink.size]
    return np.asarray(ink.resize(size, Image.Resampling.BOX))


@pytest.mark.parametrize("negative", [False, True])
def test_thumbnails_cropped_tight_are_read(tmp_path, capfd, negative):
    for i, character in enumerate(strokes.ALPHABET * 3):
        side = (12, 14, 16, 20, 23)[i % 5]
        grey = crop(character, i, side, thick=i % 3 > 0, blurred=i % 3 > 1)
        image = Image.fromarray(grey if negative else 255 - grey)
        image.save(tmp_path / f"{character}{i}.png")
    assert fraction_right(tmp_path, capfd) >= 0.85


def test_a_ring_that_touches_all_edges_is_not_blank(tmp_path, capfd):
    for rows, columns in ((16, 16), (20, 16), (16, 11)):
        y, x = (np.linspace(-1, 1, n) for n in (rows, columns))
        radius = np.hypot(y[:, None], x)
        for inner in (0.6, 0.8):
            ring = (radius < 1.05) & (radius > inner)
            for name, grey in (("light", ring), ("dark", ~ring)):
                image = Image.fromarray(np.uint8(255) * grey)
                image.save(tmp_path / f"0-{rows}-{columns}-{inner}-{name}.png")
    assert fraction_right(tmp_path, capfd) >= 0.8


def test_rules_and_box_edges_are_left_out(tmp_path, capfd):
    for i, character in enumerate(strokes.ALPHABET * 2):
        random = np.random.default_rng(i)
        side = 120
        ink = np.zeros((side, side))
        ink[25:95, 25:95] = strokes.ink(character, strokes.hand(i), (70, 70))
        faint = random.uniform(1 / 3, 2 / 3)
        for place in random.choice(4, random.integers(1, 3), replace=False):
            at = random.integers(6, 12)
            rule = np.zeros((side, side))
            rule[at : at + 3, int(random.integers(0, 30)) :] = faint
            ink = np.maximum(ink, np.rot90(rule, place))
        grey = 215 - 150 * ink + random.normal(0, 3, ink.shape)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / f"{character}{i}.png")
    assert fraction_right(tmp_path, capfd) >= 0.95


def test_a_character_small_in_a_large_photograph_is_read(tmp_path, capfd):
    for i, character in enumerate("2345789ACEHKMNRTUWXY"):
        page = np.zeros((600, 800))
        page[300:340, 500:540] = strokes.ink(character, strokes.hand(i), (40, 40))
        photograph = strokes.photograph(page, np.random.default_rng(i))
        photograph.resize((1600, 1200)).save(tmp_path / f"{character}.jpg")
    assert fraction_right(tmp_path, capfd) >= 0.9


SAVED = {  # mode and format of files
    "L": (".png", ".bmp", ".tif", ".pgm"),
    "1": (".png", ".tif", ".pbm"),
    "P": (".png", ".gif"),
    "RGB": (".jpg", ".webp", ".ppm", ".jp2", ".qoi"),
    "RGBA": (".png", ".webp", ".tga"),
    "LA": (".png",),
    "CMYK": (".jpg", ".tif"),
    "I;16": (".png", ".tif"),
    "F": (".tif",),
}


@pytest.mark.parametrize("mode", SAVED)
def test_every_mode_and_format_gives_the_same_character(mode, tmp_path):
    grey = draw(side=80)
    image = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else "L")
    deep = mode == "I;16"
    image = Image.fromarray(grey.astype(np.uint16) * 257) if deep else image.convert(mode)
    for suffix in SAVED[mode]:
        image.save(tmp_path / f"a{suffix}")
        assert overlap(prepare(str(tmp_path / f"a{suffix}"), SIZE), fit_one(grey)) > 0.85


def test_the_first_frame_counts(tmp_path):
    upright = Image.fromarray(draw(side=80))
    turned = [upright.rotate(90 * i, fillcolor=255) for i in (1, 2)]
    upright.save(tmp_path / "many.gif", save_all=True, append_images=turned)
    assert overlap(prepare(str(tmp_path / "many.gif"), SIZE), fit_one(draw(side=80))) > 0.85


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(draw()).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    Image.new("L", (9, 9), 200).save(tmp_path / "blank.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name, message in {
        "text.png": "not a picture in a format that is read here",
        "half.png": "too large: over 100 pixels",
        "missing.png": "can't be read: No such file or directory",
        "blank.png": BLANK,
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            prepare(str(tmp_path / name), SIZE)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^can't be read: .*$"):
        prepare(str(tmp_path / "half.png"), SIZE)
