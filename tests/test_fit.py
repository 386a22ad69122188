"""The fit: whatever pen, paper, light, size and mode, one character comes out in EMNIST's form.

Every picture here is drawn by this file. Two fits are compared by `overlap`: shared ink over ink.
"""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

import inference

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


def fit_one(picture: np.ndarray) -> np.ndarray:
    images, inked, _ = inference.fit([picture], SIZE)
    assert inked[0]
    assert images.shape == (1, SIZE, SIZE)
    assert images.dtype == np.uint8
    assert images.max() == 255
    return images[0]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one > 100, other > 100
    return (a & b).sum() / (a | b).sum()


def photographed(picture: np.ndarray, seed: int, noise: float = 4) -> np.ndarray:
    """Put the drawing on paper under uneven light, seen with some blur and noise."""
    random = np.random.default_rng(seed)
    height, width = picture.shape
    y, x = np.mgrid[0:height, 0:width] / height
    light = 1 - 0.25 * x - 0.3 * y * y
    ink = np.asarray(Image.fromarray(255 - picture).filter(ImageFilter.GaussianBlur(0.7))) / 255
    seen = 220 * light * (1 - 0.5 * ink) + random.normal(0, noise, picture.shape)
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


@pytest.mark.parametrize("side", [12, 20, 40, 100, 250])
def test_the_polarity_makes_no_difference(side):
    picture = draw(side=side)
    np.testing.assert_array_equal(fit_one(picture), fit_one(255 - picture))


def test_the_character_is_centred_and_as_long_as_emnists():
    for picture in (
        draw(),
        draw(margin=1.0),
        draw(side=30),
        np.pad(draw(), ((0, 90), (40, 0)), "edge"),
    ):
        image = fit_one(picture)
        rows, columns = (np.flatnonzero((image > 64).any(axis)) for axis in (1, 0))
        assert 22 <= rows[-1] - rows[0] + 1 <= 24
        assert abs(rows[0] + rows[-1] - 27) <= 1
        assert abs(columns[0] + columns[-1] - 27) <= 1


@pytest.mark.parametrize("side", [24, 40, 85, 200])
@pytest.mark.parametrize("seed", range(3))
def test_shading_and_noise_leave_the_character(side, seed):
    plain = fit_one(draw(side=side, width=10))
    assert overlap(fit_one(photographed(draw(side=side, width=10), seed)), plain) > 0.75


def test_light_ink_on_shaded_dark_paper_is_found():
    light = 255 - photographed(draw(), 0)
    assert overlap(fit_one(light), fit_one(draw())) > 0.75


def test_a_cast_shadow_is_not_ink():
    picture = photographed(draw(side=150, margin=0.4), 1).astype(float)
    y, x = np.mgrid[: len(picture), : len(picture)]
    depth = (x + 0.3 * y - 0.8 * len(picture)) / 10  # a penumbra of some 20 px
    shadow = (picture * (1 - 0.4 / (1 + np.exp(-depth)))).astype(np.uint8)
    assert overlap(fit_one(shadow), fit_one(draw(side=150))) > 0.7


def test_specks_are_not_ink():
    picture = draw().copy()
    plain = fit_one(picture)
    for y, x in ((3, 5), (120, 130), (8, 100), (130, 4)):
        picture[y : y + 2, x : x + 2] = 0
    assert overlap(fit_one(picture), plain) > 0.95


@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("kind", ["line below", "line at the side", "two lines", "frame", "table"])
def test_what_lies_along_the_border_is_not_ink(kind, noise):
    picture = draw(side=60).copy()
    plain = fit_one(picture)
    if kind in ("line below", "two lines"):
        picture[-4:-2] = 40
    if kind == "two lines":
        picture[1:3] = 40
    if kind == "line at the side":
        picture[:, :2] = 40
    if kind == "frame":
        picture[:2] = picture[-2:] = picture[:, :2] = picture[:, -2:] = 40
    if kind == "table":
        picture[:6] = 40
    picture = photographed(picture, 2, noise) if noise else picture
    assert overlap(fit_one(picture), plain) > 0.75


def test_a_neighbours_stroke_is_not_ink():
    picture = draw(side=60).copy()
    plain = fit_one(picture)
    picture[30:60, :4] = 0
    assert overlap(fit_one(picture), plain) > 0.95


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


def test_strokes_come_to_one_width():
    fitted = [fit_one(draw(side=200, width=width)) for width in (1, 2, 4, 8, 12, 16)]
    widths = inference._stroke_width(np.stack(fitted) / np.float32(255))
    assert (widths > 2.2).all()
    assert (widths < 3.4).all()  # 28ths of the side; EMNIST's quartiles are 2.5 and 3.4
    for image in fitted:
        assert overlap(image, fitted[3]) > 0.6


@pytest.mark.parametrize(
    ("side", "least"), [(8, 0.5), (10, 0.55), (14, 0.65), (16, 0.7), (20, 0.75)]
)
def test_tiny_pictures_keep_what_their_greys_say(side, least):
    whole = draw(side=320, margin=0, width=12)
    tiny = np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.BOX))
    assert overlap(fit_one(tiny), fit_one(whole)) > least


@given(
    st.integers(0, 2**32 - 1),
    st.integers(8, 150),
    st.integers(8, 150),
    st.sampled_from(["uniform", "grain", "faint", "shaded"]),
)
@settings(max_examples=60, deadline=None)
def test_noise_alone_is_not_ink(seed, height, width, kind):
    random = np.random.default_rng(seed)
    picture = np.full((height, width), 200.0)
    if kind == "uniform":
        picture = random.integers(0, 256, (height, width)).astype(float)
    if kind == "grain":
        picture += random.normal(0, 20, picture.shape)
    if kind == "faint":
        picture += random.normal(0, 1, picture.shape)
    if kind == "shaded":
        picture = picture * np.linspace(1, 0.6, width) if width >= 24 <= height else picture
        picture += random.normal(0, 3, picture.shape)
    images, inked, _ = inference.fit([picture.clip(0, 255).astype(np.uint8)], SIZE)
    assert not inked[0]
    assert not images.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (8, 8), (28, 28), (100, 300)])
@pytest.mark.parametrize("level", [0, 7, 128, 255])
def test_one_colour_is_not_ink(shape, level):
    images, inked, _ = inference.fit([np.full(shape, level, np.uint8)], SIZE)
    assert not inked[0]
    assert not images.any()


def test_colours_of_equal_lightness_keep_their_contrast():
    mask = draw() < 128
    colours = np.where(mask[..., None], (220, 60, 60), (0, 172, 60)).astype(np.uint8)
    picture = Image.fromarray(colours)
    light = np.asarray(picture.convert("L"))
    assert int(light.max()) - int(light.min()) < 3, "as grey there is nothing to see"
    assert overlap(fit_one(inference.to_grey(picture)), fit_one(draw())) > 0.85


def test_grey_in_colour_is_grey():
    picture = Image.fromarray(draw())
    np.testing.assert_array_equal(inference.to_grey(picture.convert("RGB")), draw())


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (250, 240, 60)])
def test_what_is_transparent_is_paper(ink):
    alpha = Image.fromarray(255 - draw())
    picture = Image.new("RGBA", alpha.size, ink)  # the same colour under the transparent part
    picture.putalpha(alpha)
    assert overlap(fit_one(inference.to_grey(picture)), fit_one(draw())) > 0.9


@pytest.mark.parametrize("flip", [False, True])
def test_paper_with_a_transparent_border_goes_on(flip):
    card = Image.fromarray(255 - draw() if flip else draw()).convert("RGBA")
    picture = Image.new("RGBA", (card.width + 40, card.height + 40), (0, 0, 0, 0))
    picture.paste(card, (20, 20))
    assert overlap(fit_one(inference.to_grey(picture)), fit_one(draw())) > 0.9


@pytest.mark.parametrize(("mode", "scale"), [("I", 200), ("F", 1e-3), ("F", 1e6)])
def test_deep_pictures_are_read_over_their_own_range(mode, scale):
    values = draw().astype(np.float32) * scale
    picture = Image.fromarray(values.astype(np.int32) if mode == "I" else values)
    assert picture.mode == mode
    assert overlap(fit_one(inference.to_grey(picture)), fit_one(draw())) > 0.95


@pytest.mark.parametrize("lines", [FIVE, [[(20, 20), (80, 20)], [(50, 20), (50, 90)]]])
@pytest.mark.parametrize("width", [7, 12, 28])
@pytest.mark.parametrize("times", [1, 3, 10])
@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_emnists_own_pictures_come_back_as_they_were(lines, width, times, how):
    picture = emnist_like(lines, width)
    larger = Image.fromarray(picture).resize((SIZE * times, SIZE * times), how)
    for seen in (np.asarray(larger), 255 - np.asarray(larger)):
        difference = fit_one(seen).astype(int) - picture
        assert np.abs(difference).mean() < 4


def test_a_picture_is_fitted_alike_in_any_company():
    random = np.random.default_rng(0)
    pictures = [photographed(draw(side=s, width=w), s) for s in (20, 30, 60) for w in (4, 8, 14)]
    pictures += [draw(side=20, width=w) for w in (4, 8, 14)] + [emnist_like(FIVE)] * 2
    pictures += [np.full(pictures[0].shape, 90, np.uint8), np.full((5, 5), 1, np.uint8)]
    alone = [inference.fit([picture], SIZE) for picture in pictures]
    for _ in range(3):
        order = random.permutation(len(pictures))
        images, inked, _ = inference.fit([pictures[i] for i in order], SIZE)
        for image, has_ink, i in zip(images, inked, order, strict=True):
            np.testing.assert_array_equal(image, alone[i][0][0])
            assert has_ink == alone[i][1][0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 12), st.floats(0.1, 0.9))
@settings(max_examples=80, deadline=None)
def test_parts_are_those_that_a_flood_fills(seed, height, width, density):
    mask = np.random.default_rng(seed).random((3, height, width)) < density
    flooded = np.zeros(mask.shape, int)
    for n, y, x in np.argwhere(mask):
        stack = [] if flooded[n, y, x] else [(y, x)]
        fill = flooded.max() + 1 if stack else 0
        while stack:
            i, j = stack.pop()
            if 0 <= i < height and 0 <= j < width and mask[n, i, j] and not flooded[n, i, j]:
                flooded[n, i, j] = fill
                stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    edges = np.diff(np.pad(mask, ((0, 0), (0, 1), (1, 1))).astype(np.int8), axis=2)
    row, start = np.divmod(np.flatnonzero(edges == 1), width + 1)
    end = np.flatnonzero(edges == -1) % (width + 1)
    labels = inference._connect(row, start, end, width)
    truth = flooded[row // (height + 1), row % (height + 1), start]
    assert len(set(zip(labels, truth, strict=True))) == len(set(labels)) == len(set(truth))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 60), (60, 1), (2, 2), (3, 300), (12, 13), (512, 512)]
)
def test_any_shape_is_fitted_without_a_warning(shape):
    random = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in (random.integers(0, 256, shape), 255 * (random.random(shape) < 0.2)):
            images, inked, _ = inference.fit([picture.astype(np.uint8)], SIZE)
            assert inked[0] == (images.max() == 255)
