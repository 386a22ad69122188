"""Bring any picture of a handwritten character to the form that EMNIST's own have.

    prepare("picture.jpg", 28)  # (1, 28, 28) uint8, ink 255 on 0; 2 where polarity is in doubt

`read` a file, upright and reduced -> `to_grey` -> `fit`. Knows neither torch nor CNN. Callers read
in processes, one picture at a time.
"""

import os
import stat
import warnings
from contextlib import suppress

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {  # read by Pillow's own code alone; EPS, PDF and the like, which start programs, are not
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "SGI": (".sgi", ".bw", ".rgb", ".rgba"),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "ICO": (".ico",),
    "TGA": (".tga",),  # last: has no signature, so almost any bytes may be taken for it
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
WORKING_SIDE = 96  # px; pictures are reduced as long as their longer side is no less,
NARROW = 4  # px, and their shorter side no less than this
BLANK = "blank: no ink found"

SMALL = 14  # px: a shorter character, in a picture that was reduced, is read again
CLEAR = 40  # px: at the resolution that makes it this long
AROUND = 1.5  # of its length: how far its surroundings are read with it

LONGEST = 22 / 28  # of the result's side: longest side of a character, EMNIST's median 23.6 / 28
STROKE = 2.7 / 22  # of the character's length: width of strokes, EMNIST's median 2.9 / 23.6
FINE = 88  # px: length of the character while strokes are made thinner or thicker
FORMED = (20 / 28, 26 / 28)  # of the side: the length of EMNIST's characters
OFFSET = 0.75 / 28  # of the side: EMNIST's characters are no farther off the centre

SHADED = 24  # px: a smaller picture is no photograph, its paper has no shading
GRID = 40  # px: side of the grid on which the paper is estimated
WINDOW = 0.3  # of the picture's side: strokes are narrower than this, shadows wider
EVEN = 0.1  # of the contrast: how far 8 of 10 pixels of even paper are apart at most
VEIL = 0.3  # of full ink: what shadows may leave after the shading is taken away
FAINTEST = 8  # grey levels of 256 between paper and ink, at least
SIGNAL = 4  # deviations above its level that ink reaches at least
NOISE = 2  # deviations above its level that paper reaches
NEIGHBOURS = 0.2  # correlation of neighbouring pixels: below it, a small picture is but noise
CLOSE = 0.5  # of the two votes of area and border, how many may be between dark and light ink

SPECK = 0.02  # of the area of the largest part: what is smaller is dirt; an i's dot is some 0.05
RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie


def prepare(path: str, side: int) -> np.ndarray:
    """Read a picture file and fit it: (1 or 2, side, side) uint8, ink 255 on 0; see `fit`.

    A character that is small in its picture is read again at a resolution of its own. Raises
    ValueError, one line for the user, for whatever is wrong with the file.
    """
    cv2.setNumThreads(1)  # there are processes enough
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            grey = to_grey(read(path))
        except Exception as error:  # Pillow raises nearly everything for broken files
            raise ValueError(_reason(error)) from None
        inks = _find_inks(grey)
        box = cv2.boundingRect(inks[0])
        if max(box[2:]) < SMALL and max(grey.shape) >= WORKING_SIDE:
            with suppress(Exception):  # the first look has to do
                inks = _find_inks(_look_closer(path, grey.shape, box))
    return np.stack([_form(ink, side) for ink in inks])


def _reason(error: Exception) -> str:
    """Say in one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that is read here"
    if isinstance(error, MemoryError):
        return "takes too much memory"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"too large: over {Image.MAX_IMAGE_PIXELS:,} pixels"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "can't be read: " + "".join(c if c.isprintable() else "?" for c in text)[:200]


def read(path: str, side: int = WORKING_SIDE) -> Image.Image:
    """Read a picture upright, in mode L, RGB, RGBA, I or F, reduced to `side` px or somewhat more.

    Of an animation, the first frame. Pipes and devices are refused without being opened. Raises
    OSError, ValueError or whatever else Pillow raises for bytes that are no sound picture.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path, formats=tuple(FORMATS)) as picture:
        factor = _factor(picture, side)
        picture.draft(None, (picture.width // factor, picture.height // factor))  # of a JPEG
        picture.load()
        plain = _plain(picture)
        factor = _factor(plain, side)
        plain = plain.reduce(factor) if factor > 1 else plain
        if plain.info:
            with suppress(Exception):  # a damaged EXIF block says nothing about the picture
                ImageOps.exif_transpose(plain, in_place=True)
        return plain


def _factor(picture: Image.Image, side: int) -> int:
    """Return how many times smaller a picture may be; of a long strip its narrow side decides."""
    return max(1, min(max(picture.size) // side, min(picture.size) // NARROW))


def _plain(picture: Image.Image) -> Image.Image:
    """Convert to mode L, RGB, RGBA, I or F, whichever loses nothing."""
    mode = picture.mode
    if "transparency" in picture.info and not mode.startswith("I"):
        return picture.convert("RGBA")
    if mode in ("L", "RGB", "RGBA", "I", "F"):
        return picture
    if mode in ("LA", "PA", "La", "RGBa"):
        return picture.convert("RGBA")
    if mode in ("LAB", "YCbCr"):
        return picture.getchannel(0)  # lightness; LAB converts to nothing else
    return picture.convert("L" if mode == "1" else "I" if mode.startswith("I;16") else "RGB")


def _look_closer(path: str, shape: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """Read again, with its surroundings, a character in a box of a picture read in this shape."""
    x, y, width, height = box
    length = max(width, height)
    picture = read(path, round(max(shape) * CLEAR / length))
    scale = max(picture.size) / max(shape)  # the shorter side may be a pixel or two, rounded up
    x, y, reach = x + width / 2, y + height / 2, AROUND * length
    corners = np.array([x - reach, y - reach, x + reach, y + reach]) * scale
    return to_grey(picture.crop(corners.clip(0, 2 * picture.size).round().astype(int).tolist()))


def to_grey(image: Image.Image) -> np.ndarray:
    """Return a picture in mode L, RGB, RGBA, I or F as grey uint8 (H, W), transparency as paper.

    Colours are projected on the line along which they vary most, so that red ink on green paper of
    the same lightness keeps its contrast.
    """
    if image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        finite = np.isfinite(values)
        values = np.where(finite, values, np.median(values[finite]) if finite.any() else 0)
        low, high = values.min(), values.max()
        return ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    if image.mode == "RGBA":
        image = _on_paper(image)
    if image.mode != "RGB":
        return np.asarray(image if image.mode == "L" else image.convert("L"))
    colours = np.asarray(image)
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    if np.array_equal(red, green) and np.array_equal(green, blue):
        return red.copy()
    points = colours.reshape(-1, 3)
    sample = np.ascontiguousarray(points[:: 1 + len(points) // 4096].T, np.float32)
    sample -= sample.mean(1, keepdims=True)
    _, axes = np.linalg.eigh(sample @ sample.T)
    axis = axes[:, -1] * np.sign(axes[:, -1].sum() or 1) / np.abs(axes[:, -1]).sum()
    return np.asarray(image.convert("L", (*axis.tolist(), -255 * np.minimum(axis, 0).sum())))


def _on_paper(picture: Image.Image) -> Image.Image:
    """Lay a picture with transparency on what is paper to it.

    What is opaque may be the character alone: then paper is black or white, whichever is farther.
    Or it may be a character on its own paper: then that goes on.
    """
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
    light = np.asarray(picture.convert("RGB").convert("L"), np.float32)
    area = alpha.sum() or 1
    mean = (light * alpha).sum() / area
    deviation = np.sqrt((alpha * (light - mean) ** 2).sum() / area)
    if area > 0.5 * alpha.size and deviation > 32:
        paper = int(np.median(light[alpha > 0.5]))
    else:
        paper = 255 if mean < 128 else 0
    ground = Image.new("RGBA", picture.size, (paper, paper, paper, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def fit(grey: np.ndarray, side: int) -> np.ndarray:
    """Fit a grey picture of a character to the form of EMNIST's: (1 or 2, side, side) uint8.

    grey: (H, W) uint8, ink darker or lighter than the paper. Ink becomes 255 on 0, centred by its
    bounding box. Where it is in doubt which is ink, the likelier comes first, then the other.
    Raises ValueError(BLANK) if there is no ink.
    """
    return np.stack([_form(ink, side) for ink in _find_inks(grey)])


def _find_inks(grey: np.ndarray) -> list[np.ndarray]:
    """Return ink, (H, W) uint8, 255 full, 0 paper, by each polarity that it may have."""
    threshold, light = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    vote = light.mean() + border.mean() - 1  # paper is most of the area and of the border
    polarities = [vote > 0] if abs(vote) > CLOSE else [vote > 0, vote <= 0]
    inks = [_find_ink(255 - grey if dark else grey) for dark in polarities]
    inks = [ink for ink in inks if ink is not None]
    if not inks:
        raise ValueError(BLANK)
    return inks


def _find_ink(height: np.ndarray) -> np.ndarray | None:
    """Tell ink from paper in (H, W) uint8, ink lighter: 0 to 255, None where there is none."""
    veil = 0.0
    counts = np.bincount(height.ravel(), minlength=256)
    threshold = _otsu(counts)
    sums = counts.cumsum()
    if min(height.shape) >= SHADED:
        ends = np.searchsorted(
            sums[: threshold + 1], (0.1 * sums[threshold], 0.9 * sums[threshold])
        )
        contrast = np.searchsorted(sums, 0.99 * sums[-1]) - np.searchsorted(sums, 0.01 * sums[-1])
        if ends[1] - ends[0] > EVEN * contrast:
            height, veil = _flatten(height), VEIL
            counts = np.bincount(height.ravel(), minlength=256)
            threshold = _otsu(counts)
            sums = counts.cumsum()
    paper, third = np.searchsorted(sums, (sums[threshold] / 2, sums[-1] / 3))
    above = counts[threshold + 1 :]
    levels = np.arange(threshold + 1, 256)
    number = above.sum()
    if not number:
        return None
    core = above * (levels >= (above * levels).sum() / number)
    core = core.cumsum()
    high = levels[np.searchsorted(core, 0.75 * core[-1])]
    clear = (
        sums[min(paper + 4, 255)]
        - sums[max(paper - 5, 0)]
        + sums[min(high + 4, 255)]
        - sums[max(high - 5, 0)]
        > 0.9 * sums[-1]
    )
    if high - paper <= FAINTEST:
        return None
    if not clear and high - third <= SIGNAL * _noise(counts, third):
        return None
    low = paper + max(NOISE * _noise(counts, paper), veil * (high - paper))
    low = min(low, (paper + high) / 2)
    threshold = max(threshold, low)
    ink = cv2.convertScaleAbs(cv2.subtract(height, low), alpha=255 / max(high - low, 1))
    if not clear and min(height.shape) < SHADED and _likeness(height) < NEIGHBOURS:
        return None
    return _keep_character(ink, cv2.threshold(height, threshold, 1, cv2.THRESH_BINARY)[1])


def _otsu(counts: np.ndarray) -> int:
    """Return the level above which lies the upper of two classes (Otsu 1979)."""
    number = counts.cumsum().astype(np.float64)
    mass = (counts * np.arange(256)).cumsum()
    expected = number * (mass[-1] / number[-1])
    return int(((expected - mass) ** 2 / np.maximum(number * (number[-1] - number), 1)).argmax())


def _noise(counts: np.ndarray, level: int) -> float:
    """Return how far the values below a level deviate from it; ink has no part in that."""
    below = counts[: level + 1]
    return float(np.sqrt((below * np.arange(level, -1, -1) ** 2).sum() / max(below.sum(), 1)))


def _likeness(grey: np.ndarray) -> float:
    """Return the correlation of pixels with the next ones across and down."""
    values = grey.astype(np.float32)
    steps = np.concatenate([np.diff(values, axis=axis).ravel() for axis in (0, 1)])
    return 1 - float((steps * steps).mean() / (2 * values.var() + 1e-6)) if len(steps) else 0.0


def _flatten(height: np.ndarray) -> np.ndarray:
    """Take the shading of the paper away: what is left when all that is narrow is filled."""
    rows, columns = height.shape
    grid = (min(columns, GRID), min(rows, GRID))
    small = cv2.resize(height, grid, interpolation=cv2.INTER_AREA)
    window = np.ones([round(WINDOW * n) | 1 for n in small.shape], np.uint8)
    paper = cv2.morphologyEx(small, cv2.MORPH_OPEN, window, borderType=cv2.BORDER_REPLICATE)
    paper = cv2.resize(paper, (columns, rows), interpolation=cv2.INTER_LINEAR)
    return cv2.normalize(cv2.subtract(height, paper), None, 0, 255, cv2.NORM_MINMAX)


def _keep_character(ink: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Leave only the parts of ink that are of the character, and what lies close around them."""
    rows, columns = mask.shape
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    x, y, width, height, area = stats.T
    keep = np.ones(count, bool)
    keep[0] = False
    if count > 2:
        main_area = area[1:].max()
        if min(rows, columns) >= SHADED:
            rim_y, rim_x = round(RIM * rows), round(RIM * columns)
            inner = labels[rim_y : rows - rim_y, rim_x : columns - rim_x]
            inside = np.bincount(inner.ravel(), minlength=count)
            touches = (x <= 1) | (y <= 1) | (x + width >= columns - 1) | (y + height >= rows - 1)
            long = (height > 0.4 * rows) | (width > 0.4 * columns)
            along = long & (inside < 0.05 * area)
            inside[0] = 0
            main = int((inside * ~along).argmax())
            if inside[main]:
                main_area = area[main]
                keep &= ~along
                if not touches[main]:
                    small = (inside < 0.5 * area) | (area < 0.2 * main_area)
                    keep &= ~(touches & small)
        keep &= area >= SPECK * main_area
    kept = keep.astype(np.uint8)[labels]
    reach = 2 if min(rows, columns) >= SHADED else 1
    return ink * cv2.dilate(kept, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))


def _form(ink: np.ndarray, side: int) -> np.ndarray:
    """Scale, centre and even out ink (H, W): (side, side) uint8."""
    rows, columns = ink.shape
    x, y, width, height = cv2.boundingRect(ink)
    if rows == columns and rows % side == 0:
        offset = max(abs(2 * x + width - columns), abs(2 * y + height - rows)) / 2
        long = max(width, height) / rows
        if FORMED[0] < long < FORMED[1] and offset <= OFFSET * rows + 0.5:
            small = cv2.resize(ink, (side, side), interpolation=cv2.INTER_AREA)
            return cv2.normalize(small, None, 0, 255, cv2.NORM_MINMAX)
    scale = FINE / max(width, height)
    pad = 12
    crop = ink[y : y + height, x : x + width]
    crop = cv2.copyMakeBorder(crop, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=0)
    large = cv2.resize(
        crop,
        None,
        fx=scale,
        fy=scale,
        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC,
    )
    large = cv2.copyMakeBorder(large, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    mask = cv2.threshold(large, 100, 1, cv2.THRESH_BINARY)[1]
    inner = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    outer = cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
    distance = inner - outer  # px inside the outline
    outline = np.count_nonzero((inner > 0) & (inner < 1.5))
    stroke = 2 * np.count_nonzero(mask) / max(outline, 1)
    change = np.clip((STROKE * FINE - stroke) / 2, -FINE / 8, pad - 2)
    solid = (np.clip(distance + change + 0.5, 0, 1) * 255).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(cv2.threshold(solid, 127, 255, cv2.THRESH_BINARY)[1])
    if not width:
        solid = large
        x, y, width, height = cv2.boundingRect(mask)
    scale = LONGEST * side / max(width, height)
    small = cv2.resize(
        solid[y : y + height, x : x + width],
        (max(1, round(width * scale)), max(1, round(height * scale))),
        interpolation=cv2.INTER_AREA,
    )
    out = np.zeros((side, side), np.uint8)
    top, left = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
    out[top : top + small.shape[0], left : left + small.shape[1]] = small
    out = cv2.GaussianBlur(out, (3, 3), 0.5)
    return cv2.normalize(out, None, 0, 255, cv2.NORM_MINMAX)
