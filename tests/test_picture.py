"""Any picture file to EMNIST's form, whatever pen, paper, light, size and mode.

Two fits are compared by `overlap`: shared ink over ink. What is read in the end: test_scenes.py.
"""

import numpy as np
import pytest
import strokes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from picture import BLANK, fit, prepare, to_grey

SIZE = 28
SIDES = st.integers(24, 150)
NOISES = ["uniform", "grain", "faint", "shaded"]


def ink(side: int = 100, character: str = "5", **options: float) -> np.ndarray:
    """Draw a character: (side, side) float32, 0 paper, 1 ink."""
    return strokes.ink(character, strokes.hand(3, pen=0.09), (side, side), **options)


def dark(ink: np.ndarray) -> np.ndarray:
    return np.uint8(255 - 255 * ink)


def fit_one(grey: np.ndarray) -> np.ndarray:
    """Return the fit, as every fit is."""
    image = fit(grey, SIZE)
    assert image.shape == (SIZE, SIZE)
    assert image.dtype == np.uint8
    assert image.max() == 255
    return image


PLAIN = fit_one(dark(ink()))


def overlap(one: np.ndarray, other: np.ndarray = PLAIN) -> float:
    a, b = one > 100, other > 100
    return (a & b).sum() / (a | b).sum()


def test_the_character_is_centred_and_as_long_as_emnists():
    aside = np.pad(ink(), ((0, 90), (40, 0)))
    for drawn in (ink(), ink(longest=30), ink(30), aside):
        image = fit_one(dark(drawn))
        rows, columns = (np.flatnonzero((image > 64).any(axis)) for axis in (1, 0))
        assert 22 <= rows[-1] - rows[0] + 1 <= 24
        assert abs(rows[0] + rows[-1] - 27) <= 1
        assert abs(columns[0] + columns[-1] - 27) <= 1


@pytest.mark.parametrize("side", [30, 85, 200])
@pytest.mark.parametrize("seed", range(3))
def test_shading_and_noise_leave_the_character_dark_or_light(side, seed):
    seen = to_grey(strokes.photograph(ink(side), np.random.default_rng(seed)))
    assert overlap(fit_one(seen)) > 0.75
    assert overlap(fit_one(255 - seen)) > 0.75


@pytest.mark.parametrize(("side", "width"), [(100, 6), (40, 4), (300, 4)])
def test_the_dot_of_an_i_stays(side, width):
    drawn = np.zeros((side, side), np.float32)
    middle = side // 2
    drawn[side * 4 // 10 : side * 9 // 10, middle : middle + width] = 1
    top = side // 8
    drawn[top : top + round(1.4 * width), middle : middle + round(1.4 * width)] = 1
    photograph = to_grey(strokes.photograph(drawn, np.random.default_rng(3)))
    for grey in (dark(drawn), photograph):
        inked = (fit_one(grey) > 100).any(1)
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


def test_neither_one_colour_nor_a_gradient_across_a_narrow_strip_is_ink():
    pictures = [np.tile(np.uint8([198, 205, 212]), (141, 1))]  # thin as strokes, nothing is left
    for shape in ((1, 1), (1, 40), (40, 1), (28, 28), (100, 300)):
        pictures += [np.full(shape, level, np.uint8) for level in (0, 128, 255)]
    for picture in pictures:
        with pytest.raises(ValueError, match=BLANK):
            fit(picture, SIZE)


def test_colours_of_equal_lightness_keep_their_contrast():
    mask = ink() > 0.5
    colours = np.where(mask[..., None], (220, 60, 60), (0, 172, 60)).astype(np.uint8)
    picture = Image.fromarray(colours)
    light = np.asarray(picture.convert("L"))
    assert int(light.max()) - int(light.min()) < 3, "as grey there is nothing to see"
    assert overlap(fit_one(to_grey(picture))) > 0.85


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (250, 240, 60)])
def test_what_is_transparent_is_paper(colour):
    alpha = Image.fromarray(np.uint8(255 * ink()))
    picture = Image.new("RGBA", alpha.size, colour)  # the same one under the transparent part
    picture.putalpha(alpha)
    assert overlap(fit_one(to_grey(picture))) > 0.9


@pytest.mark.parametrize("character", "5T")
@pytest.mark.parametrize("pen", [0.07, 0.3])
@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_emnists_own_pictures_come_back_as_they_were(character, pen, how):
    """Made as EMNIST's were: binary 128 px, blurred by 1, cropped, padded, to 28 px."""
    binary = strokes.ink(character, strokes.hand(3, pen=pen), (128, 128)) > 0.5
    blurred = Image.fromarray(np.uint8(255) * binary).filter(ImageFilter.GaussianBlur(1))
    cropped = blurred.crop(blurred.getbbox())
    side = round(max(cropped.size) * 28 / 24.5)
    square = Image.new("L", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    small = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
    picture = np.uint8(small * 255 / small.max())
    for side in (SIZE, 3 * SIZE):
        seen = np.asarray(Image.fromarray(picture).resize((side, side), how))
        for grey in (seen, 255 - seen):
            assert np.abs(fit_one(grey).astype(int) - picture).mean() < 4


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
    image = Image.fromarray(dark(ink()))
    if mode == "I;16":
        image = Image.fromarray(np.uint16(65535 - 65535 * ink()))
    elif mode == "CMYK":
        image = image.convert("RGB").convert(mode)
    else:
        image = image.convert(mode)
    for suffix in SAVED[mode]:
        image.save(tmp_path / f"a{suffix}")
        assert overlap(prepare(tmp_path / f"a{suffix}", SIZE)) > 0.85


def test_the_first_frame_counts(tmp_path):
    upright = Image.fromarray(dark(ink()))
    turned = [upright.rotate(90 * i, fillcolor=255) for i in (1, 2)]
    upright.save(tmp_path / "many.gif", save_all=True, append_images=turned)
    assert overlap(prepare(tmp_path / "many.gif", SIZE)) > 0.85
