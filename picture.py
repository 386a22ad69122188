"""Bring any picture of a handwritten character to the form that EMNIST's own have.

    prepare("picture.jpg", 28)  # (1, 28, 28) uint8, ink 255 on 0; 2 where polarity is in doubt

`read` a file, upright and reduced -> `to_grey` -> `fit`. Knows neither torch nor CNN.
"""

import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Read by Pillow's own code alone; EPS, PDF and the like, which start programs, are not. TGA is the
# last, as it has no signature: almost any bytes may be taken for it.
FORMATS = "PNG JPEG BMP DIB GIF TIFF WEBP AVIF JPEG2000 PPM SGI QOI PCX ICO TGA".split()
HEIC = (".heic", ".heif", ".hif")
RAWS = tuple(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .x3f".split()
)
UNREAD = {  # suffixes of pictures that we don't read: what they are, and the way out
    HEIC: "HEIC: pip install pillow-heif, or save it as JPEG",
    (".jxl",): "JPEG XL: save it as PNG",
    (".pdf",): "PDF: take its pages out with pdftoppm -png, and cut them",
    (".svg", ".svgz", ".eps"): "a drawing, not pixels: save it as PNG",
    (".psd", ".xcf"): "a picture of layers: save it as PNG",
    RAWS: "a camera's raw file: develop it to JPEG",
}
SUFFIXES = sum(UNREAD, ()) + tuple(  # of files that are pictures, read or not
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .bmp .dib .gif .tif .tiff .webp .avif .jp2 .j2k .j2c "
    ".jpc .jpf .jpx .pbm .pgm .ppm .pnm .pfm .sgi .bw .rgb .rgba .qoi .pcx .ico .tga".split()
)
with suppress(ImportError):  # an optional package
    import pillow_heif

    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    FORMATS.insert(-1, "HEIF")
    del UNREAD[HEIC]

WORKING_SIDE = 96  # px: pictures are reduced as far as their longer side stays this long
NARROW = 4  # px: and their shorter side this long
BLANK = "blank: no ink found"

SMALL = 14  # px: a shorter character, in a picture of WORKING_SIDE or more, is read again
CLEAR = 40  # px: at the resolution that makes it this long
AROUND = 1.5  # of its length: how far its surroundings are read with it

FORMED = (21 / 28, 26.5 / 28)  # of the side: the length of EMNIST's characters, traces included
TRACE = 0.1  # of the contrast: the outermost trace of a character
OFFSET = 1 / 28  # of the side: EMNIST's characters are no farther off the centre

SHADED = 24  # px: a smaller picture is no photograph: nothing in it but the character, no shading
EVEN = 0.1  # of the contrast: how far the levels of paper deviate where it is not shaded
GRID, WINDOW = 40, 21  # px: side of the grid on which paper is estimated; over more it is even
GRAIN = 3  # grey levels: what paper deviates from its estimate
CLOSE = 0.3  # of the two votes of area and border: less between them, and either may be ink
FAINTEST = 8  # grey levels of 256 between paper and ink, at least
SIGNAL = 3  # deviations of noise between paper and ink, at least
INK = 0.45  # of the way from paper to ink, by their means: where ink begins

SPECK = 0.02  # of the area of the largest part: what is smaller is dirt; an i's dot is some 0.05
RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie
LONG = 0.4  # of the side: what lies along the border and is longer belongs to no character
LINED = 0.9  # of a side: what lines all four as far is the frame of an empty box
FAINTER = 0.8  # of the character's level: rules and box edges are fainter

FINE, MARGIN = 64, 9  # px: the character's length while its strokes are evened, and room around it
SHARPEN, BLURRED = 0.5, 11  # how much is added of what is finer than so many px
STROKE = 2.3 / 22  # of its length: width of strokes; EMNIST's median
EDGE = 0.3  # of full ink: where the finished character ends
LONGEST = 22 / 28  # of the result's side: its longest side; EMNIST's median 23.6 / 28


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
            raise ValueError(_reason(error, path)) from None
        return fit(grey, side, lambda box: _look_closer(path, grey.shape, box))


def _reason(error: Exception, path: str) -> str:
    """Say in one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        for suffixes, way_out in UNREAD.items():
            if path.lower().endswith(suffixes):
                return f"not read here: {way_out}"
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
    if path.lower().endswith(RAWS):  # many would pass for a TIFF, the camera's thumbnail
        raise UnidentifiedImageError
    # of a path, Pillow 13 maps raw TIFFs to memory and turns them wrong
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
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
    if mode in ("LA", "PA") or ("transparency" in picture.info and not mode.startswith("I")):
        return picture.convert("RGBA")
    if mode in ("L", "RGB", "RGBA", "I", "F"):
        return picture
    return picture.convert("L" if mode == "1" else "I" if mode.startswith("I;16") else "RGB")


def _look_closer(path: str, shape: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """Read again, with its surroundings, a character in a box of a picture read in this shape."""
    x, y, width, height = box
    length = max(width, height)
    picture = read(path, round(max(shape) * CLEAR / length))
    scale = max(picture.size) / max(shape)  # the shorter side may be a pixel or two, rounded up
    x, y, reach = x + width / 2, y + height / 2, AROUND * length
    corners = np.array([x - reach, y - reach, x + reach, y + reach]) * scale
    corners = corners.clip(0, (*picture.size, *picture.size)).round().astype(int)
    return to_grey(picture.crop(corners.tolist()))


def to_grey(image: Image.Image) -> np.ndarray:
    """Return a picture in mode L, RGB, RGBA, I or F as grey uint8 (H, W), transparency as paper.

    Colours are projected on the line along which they vary most, so that red ink on green paper of
    the same lightness keeps its contrast.
    """
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        low, high = values.min(), values.max()
        return ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    if image.mode == "RGBA":
        image = _on_paper(image)
    if image.mode != "RGB":
        return np.asarray(image if image.mode == "L" else image.convert("L"))
    colours = np.asarray(image)
    if (colours == colours[..., :1]).all():
        return colours[..., 0].copy()
    points = colours.reshape(-1, 3)
    sample = np.ascontiguousarray(points[:: 1 + len(points) // 4096].T, np.float32)
    sample -= sample.mean(1, keepdims=True)
    _, axes = np.linalg.eigh(sample @ sample.T)
    axis = axes[:, -1] * np.sign(axes[:, -1].sum() or 1) / np.abs(axes[:, -1]).sum()
    return np.asarray(image.convert("L", (*axis.tolist(), -255 * np.minimum(axis, 0).sum())))


def _on_paper(picture: Image.Image) -> Image.Image:
    """Lay a picture with transparency on what is paper to it.

    What is opaque may be a character with its own paper, which then goes on, or the character
    alone: then paper is black or white, whichever is farther.
    """
    alpha = np.asarray(picture.getchannel("A"))
    opaque = alpha > alpha.max() / 2
    light = np.asarray(picture.convert("L"))[opaque]
    paper = 255 if light.sum() < 128 * light.size else 0
    if opaque.mean() > 0.5 and light.std() > 32:
        paper = int(np.median(light))
    ground = Image.new("RGBA", picture.size, (paper, paper, paper, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def fit(grey: np.ndarray, side: int, look_closer: Callable | None = None) -> np.ndarray:
    """Fit a grey picture of a character to the form of EMNIST's: (1 or 2, side, side) uint8.

    grey: (H, W) uint8, ink darker or lighter than the paper. Ink becomes 255 on 0, centred by its
    bounding box. Where it is in doubt which is ink, the likelier comes first, then the other.
    look_closer: returns a better picture of the box of a character that is small in a reduced one.
    Raises ValueError(BLANK) if there is no ink.
    """
    if (formed := _as_formed(grey, side)) is not None:
        return formed[None]
    found = _find(grey)
    if look_closer and max(found[0].box[2:]) < SMALL and max(grey.shape) >= WORKING_SIDE:
        with suppress(Exception):  # the first look has to do
            found = _find(look_closer(found[0].box))
    return np.stack([_form(character, side) for character in found])


def _as_formed(grey: np.ndarray, side: int) -> np.ndarray | None:
    """Return a picture of EMNIST's own, be it enlarged or negative, as it was; None for others.

    It is a square of a multiple of `side`, of one level along its border, and holds the character
    as those do.
    """
    rows, columns = grey.shape
    border = _border(grey)
    low, high = int(border.min()), int(border.max())
    if rows != columns or rows % side or high - low > FAINTEST:
        return None
    ink = cv2.absdiff(grey, np.full_like(grey, (low + high) // 2))
    ink = cv2.resize(ink, (side, side), interpolation=cv2.INTER_AREA)
    x, y, width, height = np.array(cv2.boundingRect(np.uint8(ink > TRACE * ink.max()))) / side
    centred = max(abs(x + width / 2 - 0.5), abs(y + height / 2 - 0.5)) <= OFFSET
    if not centred or ink.max() < FAINTEST or not FORMED[0] <= max(width, height) <= FORMED[1]:
        return None
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX)


class Character(NamedTuple):
    """A character found in a picture."""

    light: np.ndarray  # (H, W) uint8, ink lighter than paper, and nothing beside the character
    paper: float  # the paper's level
    contrast: float  # how far the level of ink is above it
    box: tuple[int, ...]  # left, top, width, height


def _find(grey: np.ndarray) -> list[Character]:
    """Return the character, or two where it may be darker or lighter than the paper."""
    _, contrast, *deviations = _split(grey)
    if min(grey.shape) >= SHADED and min(deviations) > EVEN * contrast:
        grey = _without_shadows(grey)
    mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    inset = int(RIM / 2 * min(mask.shape))  # the outermost may be a frame
    inner = mask[inset : mask.shape[0] - inset, inset : mask.shape[1] - inset]
    vote = mask.mean() + _border(inner).mean() - 1  # paper is most of the area and of the border
    likelier = 255 - grey if vote > 0 else grey
    lights = [likelier] if abs(vote) > CLOSE else [likelier, 255 - likelier]
    found = [character for character in map(_find_light, lights) if character]
    if not found:
        raise ValueError(BLANK)
    return found


def _border(grey: np.ndarray) -> np.ndarray:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _split(grey: np.ndarray) -> tuple[float, float, float, float]:
    """Tell dark from light (Otsu 1979): the dark's mean, the light's above it, both deviations."""
    mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    high, high_deviation = cv2.meanStdDev(grey, mask=mask)
    low, low_deviation = cv2.meanStdDev(grey, mask=1 - mask)
    return low.item(), high.item() - low.item(), low_deviation.item(), high_deviation.item()


def _without_shadows(grey: np.ndarray) -> np.ndarray:
    """Bring paper to level 128: it is what is most in any window, so its median."""
    small = cv2.resize(grey, (GRID, GRID), interpolation=cv2.INTER_AREA)
    relief = grey - cv2.resize(cv2.medianBlur(small, WINDOW), grey.shape[::-1]).astype(np.float32)
    relief -= relief.clip(-GRAIN, GRAIN)
    return (relief + 128).clip(0, 255).astype(np.uint8)


def _find_light(light: np.ndarray) -> Character | None:
    """Find a character lighter than the paper, (H, W) uint8."""
    paper, contrast, _, _ = _split(light)
    small = min(light.shape) < SHADED
    least = FAINTEST if small else max(FAINTEST, SIGNAL * _noise(light))
    if min(contrast, np.ptp(light)) < least:
        return None
    parts = _keep_character(np.uint8(light > paper + INK * contrast), light, paper)
    if cv2.countNonZero(parts) < 2:  # px: a dot
        return None
    box = cv2.boundingRect(parts)
    if not small and _is_frame(parts, box):
        raise ValueError(BLANK)  # for both polarities: in the other its inside would be the ink
    around = cv2.dilate(parts, np.ones((3, 3)), iterations=1 if small else 2)  # edges of strokes
    return Character(np.where(around, light, np.uint8(paper)), paper, contrast, box)


def _is_frame(parts: np.ndarray, box: tuple[int, ...]) -> bool:
    """Say whether ink does no more than line the picture on all four sides: an empty box."""
    x, y, width, height = box
    ink, high, wide = parts[y:, x:][:height, :width], round(RIM * height), round(RIM * width)
    sides = ink[:high].any(0), ink[-high:].any(0), ink[:, :wide].any(1), ink[:, -wide:].any(1)
    lined = min(side.mean() for side in sides) > LINED
    return lined and ink.size > 0.5 * parts.size and not ink[high:-high, wide:-wide].any()


def _noise(grey: np.ndarray) -> float:
    """Return the standard deviation of noise, by what no smooth surface has (Immerkær 1996)."""
    kernel = np.outer((1, -2, 1), (1, -2, 1)).astype(np.float32)
    steps = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel)).ravel()
    return float(np.partition(steps, steps.size // 2)[steps.size // 2]) / (6 * 0.6745)  # median


def _keep_character(mask: np.ndarray, light: np.ndarray, paper: float) -> np.ndarray:
    """Return of a mask of ink, (H, W) uint8, only those parts that are of the character.

    The others are specks; in pictures of some size also what lies along the border (frames, the
    table beside the card), what comes in from it while the character is clear of it, and rules and
    box edges, fainter than the character.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 3:
        return mask
    stats[0] = 0  # the paper
    x, y, width, height, area = stats.T
    rows, columns = mask.shape
    if min(rows, columns) < SHADED:
        return (area >= SPECK * area.max()).astype(np.uint8)[labels]
    rim_y, rim_x = round(RIM * rows), round(RIM * columns)
    inner = labels[rim_y : rows - rim_y, rim_x : columns - rim_x]
    inside = np.bincount(inner.ravel(), minlength=count) * (area > 0)
    along = (np.maximum(width / columns, height / rows) > LONG) & (inside < 0.05 * area)
    main = (inside * ~along).argmax()
    keep = (area > 0) & (area >= SPECK * area[main]) & ~along
    touching = np.min([x, y, columns - x - width, rows - y - height], axis=0) <= 1
    if not touching[main]:
        keep &= ~touching | ((inside >= 0.5 * area) & (area >= 0.2 * area[main]))
    peaks = np.zeros(count)
    np.maximum.at(peaks, labels.ravel(), light.ravel() - paper)
    most = peaks[keep & (area >= 0.2 * area[main])].max(initial=0)
    faint = peaks < FAINTER * most
    size = np.maximum(width, height)
    keep &= ~(faint & (touching | (size > 0.25 * size[main])))
    return keep.astype(np.uint8)[labels]


def _form(character: Character, side: int) -> np.ndarray:
    """Scale, centre, and bring to the width of EMNIST's strokes: (side, side) uint8."""
    light, paper, contrast, box = character
    large = _square(light, box, FINE, FINE + 2 * MARGIN, paper).astype(np.float32) - paper
    blurred = cv2.blur(cv2.blur(large, (BLURRED, BLURRED)), (BLURRED, BLURRED))
    large += SHARPEN * (large - blurred)
    if large.max() <= 0:  # thinner than a pixel of a long strip
        raise ValueError(BLANK)
    ink = (large / min(contrast, large.max())).clip(0, 1)
    outline = np.hypot(np.diff(ink[:-1], axis=1), np.diff(ink[:, :-1], axis=0)).sum()
    ink = _thicken(ink, (STROKE * FINE - 2 * ink.sum() / outline) / 2)
    ink = _square(ink, cv2.boundingRect(np.uint8(ink > EDGE)), LONGEST * side, side, 0)
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)


def _thicken(ink: np.ndarray, change: float) -> np.ndarray:
    """Move the outline out by `change` px, between two whole numbers of them."""
    change = min(max(change, -FINE / 8), MARGIN - 2)
    least = int(abs(change))
    move = cv2.dilate if change > 0 else cv2.erode
    sizes = [(2 * reach + 1, 2 * reach + 1) for reach in (least, least + 1)]
    less, more = (move(ink, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, size)) for size in sizes)
    return less + (abs(change) - least) * (more - less)


def _square(
    image: np.ndarray, box: tuple[int, ...], length: float, side: int, paper: float
) -> np.ndarray:
    """Return (side, side) with what is in a box at its centre, `length` px long."""
    x, y, width, height = box
    whole = round(max(width, height) * side / length)
    top, left = y + (height + whole) // 2, x + (width + whole) // 2
    padded = cv2.copyMakeBorder(image, *4 * [whole], cv2.BORDER_CONSTANT, value=paper)
    square = padded[top : top + whole, left : left + whole]
    how = cv2.INTER_AREA if whole > side else cv2.INTER_CUBIC
    return cv2.resize(square, (side, side), interpolation=how)
