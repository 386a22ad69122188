"""Bring any picture file of a handwritten character to the form that EMNIST's own have.

    prepare("picture.jpg", 28)  # (28, 28) uint8, ink 255 on 0

`read` a file, upright and reduced -> `to_grey` -> one or more readings, each of which finds a
character and gives it EMNIST's `form`. The first reading does for tidy pictures. Where frames,
rules, shadows or the table around a card leave doubt, `propose` gives plain alternatives, among
which the net chooses. Knows neither torch nor CNN.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BLANK = "blank: no ink found"


class Reading(NamedTuple):
    """One way to see the character in a picture."""

    image: np.ndarray | None  # (side, side) uint8, ink 255 on 0; None: no character is there
    penalty: float = 0.0  # nats by which the net must like it better than a reading without


def prepare(path: str, side: int) -> np.ndarray:
    """Read a picture file and fit the character in it: (side, side) uint8, ink 255 on 0.

    Raises ValueError, one line for the user, for whatever is wrong with the file, and if it holds
    no ink.
    """
    return read_first(path, side)[0]


def fit(grey: np.ndarray, side: int) -> np.ndarray:
    """Fit the character in a grey picture to the form of EMNIST's: (side, side) uint8.

    grey: (H, W) uint8, ink darker or lighter than the paper. Ink becomes 255 on 0, centred by its
    bounding box. Raises ValueError(BLANK) if there is no ink.
    """
    return fit_first(grey, side)[0]


def read_first(path: str, side: int) -> tuple[np.ndarray, bool | None]:
    """Return the first reading of a picture file, and whether `propose` should be asked as well.

    Not at all (None) where the picture is in EMNIST's form: that is the only reading. The image is
    as of `prepare`, which also says what is raised.
    """
    with explained(path):
        return fit_first(to_grey(read(path)), side)


def fit_first(grey: np.ndarray, side: int) -> tuple[np.ndarray, bool | None]:
    """Return the first reading of a grey picture and, as `read_first` does, the doubt about it."""
    emnist_image = as_emnist(grey, side)
    if emnist_image is not None:
        return emnist_image, None
    character = find_character(lighten_ink(grey))
    return form(character, side), character.in_doubt


# Read a file

# To add a format: Pillow's name for it here, and its suffixes, by which folders are searched
FORMATS = (  # read by Pillow's own code alone; EPS and the like, which start programs, are not
    "PNG JPEG BMP DIB GIF TIFF WEBP AVIF JPEG2000 PPM SGI QOI PCX ICO "
    "TGA"  # the last, as it has no signature: almost any bytes may be taken for it
).split()
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
RAW_SUFFIXES = tuple(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .x3f".split()
)
UNREAD = {  # suffixes of pictures that are not read: what they are, and the way out
    HEIC_SUFFIXES: "HEIC: pip install pillow-heif, or save it as JPEG",
    (".jxl",): "JPEG XL: save it as PNG",
    (".pdf",): "PDF: take its pages out with pdftoppm -png, and cut them",
    (".svg", ".svgz", ".eps"): "a drawing, not pixels: save it as PNG",
    (".psd", ".xcf"): "a picture of layers: save it as PNG",
    RAW_SUFFIXES: "a camera's raw file: develop it to JPEG",
}
SUFFIXES = sum(UNREAD, ()) + tuple(  # of files that are pictures, read or not
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .bmp .dib .gif .tif .tiff .webp .avif .jp2 .j2k .j2c "
    ".jpc .jpf .jpx .pbm .pgm .ppm .pnm .pfm .sgi .bw .rgb .rgba .qoi .pcx .ico .tga".split()
)
WORKING_SIDE = 96  # px: pictures are reduced as far as their longer side stays this long
NARROWEST_SIDE = 4  # px: and their shorter side this long


@cache
def readable_formats() -> list[str]:
    """Return the formats to be read: HEIF too, where the package pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return ["HEIF", *FORMATS]


def read(path: str, side: int = WORKING_SIDE) -> Image.Image:
    """Read a picture upright, in mode L, RGB, RGBA, I or F, reduced to `side` px or somewhat more.

    Of an animation, the first frame. Pipes and devices are refused without being opened. Raises
    OSError, ValueError or whatever else Pillow raises for bytes that are no sound picture.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    if path.lower().endswith(RAW_SUFFIXES):  # many would pass for a TIFF, the camera's thumbnail
        raise UnidentifiedImageError
    # of a path, Pillow 13 maps raw TIFFs to memory and turns them wrong
    with open(path, "rb") as file, Image.open(file, formats=readable_formats()) as picture:
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns
            raise Image.DecompressionBombError
        factor = reduction(picture, side)
        picture.draft(None, (picture.width // factor, picture.height // factor))  # of a JPEG
        picture.load()
        plain = to_plain_mode(picture)
        factor = reduction(plain, side)
        if factor > 1:
            plain = plain.reduce(factor)
        if plain.info:
            with suppress(Exception):  # a damaged EXIF block says nothing about the picture
                ImageOps.exif_transpose(plain, in_place=True)
        return plain


def reduction(picture: Image.Image, side: int) -> int:
    """Return how many times smaller a picture may be; of a long strip its narrow side decides."""
    by_longer = max(picture.size) // side
    by_shorter = min(picture.size) // NARROWEST_SIDE
    return max(1, min(by_longer, by_shorter))


def to_plain_mode(picture: Image.Image) -> Image.Image:
    """Convert to mode L, RGB, RGBA, I or F, whichever loses nothing."""
    mode = picture.mode
    if mode in ("LA", "PA") or ("transparency" in picture.info and not mode.startswith("I")):
        return picture.convert("RGBA")
    if mode in ("L", "RGB", "RGBA", "I", "F"):
        return picture
    if mode == "1":
        return picture.convert("L")
    return picture.convert("I" if mode.startswith("I;16") else "RGB")


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn whatever reading a file may raise into a ValueError of one line for the user."""
    cv2.setNumThreads(1)  # there are workers enough
    try:
        yield
    except Exception as error:  # Pillow raises nearly everything for broken files
        if str(error) == BLANK:
            raise
        raise ValueError(explain(error, path)) from None


def explain(error: Exception, path: str) -> str:
    """Say in one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        for suffixes, way_out in UNREAD.items():
            if path.lower().endswith(suffixes):
                return f"not read here: {way_out}"
        return "not a picture in a format that is read here"
    if isinstance(error, MemoryError):
        return "takes too much memory"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: over {Image.MAX_IMAGE_PIXELS:,} pixels"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "can't be read: " + "".join(c if c.isprintable() else "?" for c in text)[:200]


# To grey


def to_grey(picture: Image.Image) -> np.ndarray:
    """Return a picture in mode L, RGB, RGBA, I or F as grey uint8 (H, W), transparency as paper.

    Colours are projected on the line along which they vary most, so that red ink on green paper of
    the same lightness keeps its contrast.
    """
    if picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
        low = values.min()
        high = values.max()
        return ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    if picture.mode == "L":
        return np.asarray(picture)
    if picture.mode == "RGBA":
        picture = on_paper(picture)
    colours = np.asarray(picture)  # (H, W, 3)
    if (colours == colours[..., :1]).all():
        return colours[..., 0].copy()
    points = colours.reshape(-1, 3)
    sample = np.ascontiguousarray(points[:: 1 + len(points) // 4096].T, np.float32)  # (3, n)
    sample -= sample.mean(1, keepdims=True)
    _, axes = np.linalg.eigh(sample @ sample.T)
    axis = axes[:, -1] * np.sign(axes[:, -1].sum() or 1) / np.abs(axes[:, -1]).sum()
    offset = -255 * np.minimum(axis, 0).sum()  # so that the darkest colour is not below 0
    return np.asarray(picture.convert("L", (*axis.tolist(), offset)))


def on_paper(picture: Image.Image) -> Image.Image:
    """Lay a picture in mode RGBA on what is paper to it; return it in mode RGB.

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


# The first reading: all ink, but for specks

EMNIST_LENGTHS = (21 / 28, 26.5 / 28)  # of the side: of EMNIST's characters, with their traces
EMNIST_OFFSET = 1 / 28  # of the side: they are no farther off the centre
MOST_INK = 0.5  # of the area; EMNIST's mean is 0.17. What is more is paper, in a frame
TRACE = 0.1  # of the contrast: the outermost trace of a character
FAINTEST_INK = 8  # grey levels of 256 between paper and ink, at least
LEAST_SIGNAL = 3  # deviations of noise between paper and ink, at least
INK_LEVEL = 0.45  # of the way from paper to ink, by their means: where ink begins
SHORTEST_PHOTO_SIDE = 24  # px: a smaller picture is no photograph, so not shaded
EVEN_PAPER = 0.1  # of the contrast: how far the levels of paper deviate where it is not shaded
PAPER_GRID = 40  # cells a side, in which the level of paper is estimated
PAPER_WINDOW = 21  # cells a side, of the median that is taken over them
PAPER_GRAIN = 3  # grey levels that paper deviates from its estimate
FRAME_INSET = 0.12  # of the shorter side: what is farther out may be a frame, and has no vote
CROP_INSET = 0.06  # the same, where the character may fill its picture
CLOSE_VOTE = 0.3  # of two: with less between them, either dark or light may be ink
SPECK = 0.02  # of the area of the largest part: what is smaller is dirt; an i's dot is some 0.05
RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie
SMALL_CHARACTER = 14  # px, of its longer side in a picture of WORKING_SIDE: is read again


def as_emnist(grey: np.ndarray, side: int) -> np.ndarray | None:
    """Return a picture of EMNIST's own, be it enlarged or negative, as it was; None for others.

    It is a square of a multiple of `side`, of one level along its border, and holds the character
    as those do, and nothing around it.
    """
    rows, columns = grey.shape
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    low = int(border.min())
    high = int(border.max())
    if rows != columns or rows % side or high - low > FAINTEST_INK:
        return None
    ink = cv2.absdiff(grey, np.full_like(grey, (low + high) // 2))
    ink = cv2.resize(ink, (side, side), interpolation=cv2.INTER_AREA)
    most = int(ink.max())
    mask = np.uint8(ink > TRACE * most)
    x, y, width, height = np.array(cv2.boundingRect(mask)) / side
    off_centre = max(abs(x + width / 2 - 0.5), abs(y + height / 2 - 0.5))
    shortest, longest = EMNIST_LENGTHS
    if off_centre > EMNIST_OFFSET or not shortest <= max(width, height) <= longest:
        return None
    if most < FAINTEST_INK or cv2.mean(ink)[0] > MOST_INK * most:
        return None
    if cv2.connectedComponents(mask)[0] > 2:  # paper and the character
        parts = tell_parts(mask)
        if find_rings(parts, parts.area > 0).any():
            return None
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX)


def lighten_ink(grey: np.ndarray) -> np.ndarray:
    """Return a grey picture with its ink lighter than the paper, and the paper evenly lit."""
    if min(grey.shape) >= SHORTEST_PHOTO_SIDE and is_shaded(grey):
        grey = without_shadows(grey)
    return 255 - grey if vote_on_paper(grey, CROP_INSET) > 0 else grey


def is_shaded(grey: np.ndarray) -> bool:
    """Say whether both dark and light deviate too much for ink and evenly lit paper."""
    mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    light, light_deviation = cv2.meanStdDev(grey, mask=mask)
    dark, dark_deviation = cv2.meanStdDev(grey, mask=1 - mask)
    contrast = light.item() - dark.item()
    return min(light_deviation.item(), dark_deviation.item()) > EVEN_PAPER * contrast


def without_shadows(grey: np.ndarray) -> np.ndarray:
    """Bring paper to level 128: it is what is most in any window, so its median."""
    cells = cv2.resize(grey, (PAPER_GRID, PAPER_GRID), interpolation=cv2.INTER_AREA)
    paper = cv2.resize(cv2.medianBlur(cells, PAPER_WINDOW), grey.shape[::-1])
    relief = grey - paper.astype(np.float32)
    relief -= relief.clip(-PAPER_GRAIN, PAPER_GRAIN)
    return (relief + 128).clip(0, 255).astype(np.uint8)


def vote_on_paper(grey: np.ndarray, inset: float) -> float:
    """Return how far light is more likely paper than dark is, -1 to 1, without an outer `inset`.

    Paper has most of the area, and most of its border.
    """
    mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    cut = int(inset * min(mask.shape))
    inner = mask[cut : mask.shape[0] - cut, cut : mask.shape[1] - cut]
    border = np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]])
    return float(mask.mean() + border.mean() - 1)


class Character(NamedTuple):
    """A character found in a picture."""

    light: np.ndarray  # (H, W) uint8, ink lighter than paper, and nothing beside the character
    paper: float  # the paper's level
    contrast: float  # how far the level of ink is above it
    box: tuple[int, ...]  # left, top, width, height, px
    in_doubt: bool = False  # it is small, or ink touches the border: others may be better


def find_character(light: np.ndarray) -> Character:
    """Find the character in a picture (H, W) uint8 of ink lighter than the paper.

    Raises ValueError(BLANK) where there is none.
    """
    mask = cv2.threshold(light, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    paper = cv2.mean(light, mask=1 - mask)[0]
    contrast = cv2.mean(light, mask=mask)[0] - paper
    is_small = min(light.shape) < SHORTEST_PHOTO_SIDE
    least = FAINTEST_INK if is_small else max(FAINTEST_INK, LEAST_SIGNAL * noise_deviation(light))
    if min(contrast, np.ptp(light)) < least:
        raise ValueError(BLANK)
    parts = tell_parts(np.uint8(light > paper + INK_LEVEL * contrast))
    mask = parts.mask(parts.area >= SPECK * parts.area.max())
    if cv2.countNonZero(mask) < 2:  # px: a dot
        raise ValueError(BLANK)
    box = cv2.boundingRect(mask)
    edges = 1 if is_small else 2  # px around the mask that belong to its strokes
    around = cv2.dilate(mask, np.ones((3, 3)), iterations=edges)
    light = np.where(around, light, np.uint8(paper))
    is_far = max(box[2:]) < SMALL_CHARACTER and max(mask.shape) >= WORKING_SIDE
    is_tight = box == (0, 0, *mask.shape[::-1])
    at_border = bool(parts.touching.any()) and not is_tight
    return Character(light, paper, contrast, box, is_far or at_border)


def noise_deviation(grey: np.ndarray) -> float:
    """Return the standard deviation of noise, by what no smooth surface has (Immerkær 1996)."""
    kernel = np.outer((1, -2, 1), (1, -2, 1)).astype(np.float32)
    steps = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel)).ravel()
    median = np.partition(steps, steps.size // 2)[steps.size // 2]
    return float(median) / (6 * 0.6745)  # the kernel's norm; a normal deviation's median


class Parts(NamedTuple):
    """The connected parts of a mask of ink; arrays are (n,), lengths in px."""

    labels: np.ndarray  # (H, W) int32: the part that a pixel belongs to, from 1; 0 is paper
    x: np.ndarray  # of the left
    y: np.ndarray  # of the top
    width: np.ndarray
    height: np.ndarray
    area: np.ndarray
    inside: np.ndarray  # pixels that lie farther in than the rim
    touching: np.ndarray  # whether it touches the picture's border

    def mask(self, kept: np.ndarray) -> np.ndarray:
        """Return the mask (H, W) uint8 of those parts for which `kept`, (n,) bool, is true."""
        return np.concatenate([[False], kept]).astype(np.uint8)[self.labels]


def tell_parts(mask: np.ndarray) -> Parts:
    """Tell apart the connected parts of a mask (H, W) uint8 of ink."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    x, y, width, height, area = stats[1:].T
    rows, columns = mask.shape
    rim_y = round(RIM * rows)
    rim_x = round(RIM * columns)
    inner = labels[rim_y : rows - rim_y, rim_x : columns - rim_x]
    inside = np.bincount(inner.ravel(), minlength=count)[1:]
    to_border = np.min([x, y, columns - x - width, rows - y - height], axis=0)
    return Parts(labels, x, y, width, height, area, inside, to_border <= 1)


# Other readings: strokes alone, without lines, without some of the parts

THICKEST_STROKE = 0.22  # of the shorter side; what is wider is a shadow, a table, paper
PENALTY = 3.0  # nats, of a proposal; twice that of one where ink is on the unlikely side of paper
FEWEST_PIXELS = 12  # px: a picture with a shorter side has but one reading
ENLARGED_SIDE = 64  # px: smaller pictures are enlarged to this side
CLEAR_CHARACTER = 40  # px: the length to which a small character is read again
SURROUNDINGS = 1.5  # of its length: how far what is around it is read again as well
SHARP_EDGE = 0.15  # of the contrast by px: edges of drawn clouds have 0.12 at most, of ink 0.2
LINE_LENGTH = 0.7  # of the picture's side: lines are longer
LINE_THICKNESS = 0.12  # of the picture's side: and not thicker
LINE_RIM = 0.2  # of the picture's side: and lie at the rim, or go from border to border
GAP = 7  # px: where a line is taken out, strokes on both of its sides are joined over it


def propose(path: str, side: int) -> list[Reading]:
    """Return other readings of a picture file than the first, for the net to choose among.

    Some may be alike. All are without an image where nothing but the lines of an empty form is
    found. Raises ValueError as `prepare` does.
    """
    with explained(path):
        grey = to_grey(read(path))
        closer = look_closer(path, grey)
    readings = []
    if closer is not None:
        grey = closer
    light = lighten_ink(grey)
    if closer is not None:
        readings.append(Reading(fit_all(light, side)))
    if abs(vote_on_paper(grey, CROP_INSET)) < CLOSE_VOTE:
        readings.append(Reading(fit_all(255 - light, side), PENALTY))
    if min(grey.shape) < FEWEST_PIXELS:
        return readings
    ink_is_light = vote_on_paper(grey, FRAME_INSET) <= 0
    likely = propose_strokes(grey, ink_is_light, side)
    if not likely:
        return [Reading(None)]
    readings += [Reading(image, PENALTY) for image in likely]
    others = propose_strokes(grey, not ink_is_light, side)
    return readings + [Reading(image, 2 * PENALTY) for image in others if image is not None]


def fit_all(light: np.ndarray, side: int) -> np.ndarray | None:
    """Fit all that is ink in a picture, lighter than paper; None where nothing is."""
    try:
        return form(find_character(light), side)
    except ValueError:
        return None


def look_closer(path: str, grey: np.ndarray) -> np.ndarray | None:
    """Read a character that is small in its picture again, larger; None if it is not small."""
    if min(grey.shape) < ENLARGED_SIDE:
        return None
    try:
        x, y, width, height = find_character(lighten_ink(grey)).box
    except ValueError:
        return None
    length = max(width, height)
    if length >= SMALL_CHARACTER:
        return None
    picture = read(path, round(max(grey.shape) * CLEAR_CHARACTER / length))
    scale = max(picture.size) / max(grey.shape)  # the shorter side may be rounded up
    x += width / 2
    y += height / 2
    reach = SURROUNDINGS * length
    corners = np.array([x - reach, y - reach, x + reach, y + reach]) * scale
    corners = corners.clip(0, (*picture.size, *picture.size)).round().astype(int)
    return to_grey(picture.crop(corners.tolist()))


def propose_strokes(grey: np.ndarray, ink_is_light: bool, side: int) -> list[np.ndarray | None]:
    """Return readings of what is thin in a grey picture and lighter, or darker, than around it.

    None among them: nothing is there. No reading: nothing but the lines of an empty form.
    """
    if min(grey.shape) < ENLARGED_SIDE:
        scale = ENLARGED_SIDE / min(grey.shape)
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    light = thin_strokes(grey, ink_is_light)
    mask = cv2.threshold(light, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    contrast = cv2.mean(light, mask=mask)[0]
    mask = np.uint8(light > INK_LEVEL * contrast)
    if contrast < max(FAINTEST_INK, LEAST_SIGNAL * noise_deviation(grey)):
        return [None]
    if edge_slope(light, mask) < SHARP_EDGE * contrast:
        return [None]
    images = [fit_parts(light, contrast, parts, side) for parts in choose_parts(mask)]
    lines, is_corner = find_lines(mask)
    if not lines.any():
        return images
    rest = join_over(mask & ~lines, lines)
    light = np.where(cv2.dilate(mask & ~rest, np.ones((3, 3))) & ~rest, np.uint8(0), light)
    without_lines = [fit_parts(light, contrast, parts, side) for parts in choose_parts(rest)]
    if not is_corner and all(image is None for image in without_lines):
        return []
    return images + without_lines


def thin_strokes(grey: np.ndarray, ink_is_light: bool) -> np.ndarray:
    """Return ink on paper of level 0, (H, W) uint8: what is thinner than THICKEST_STROKE.

    It is what a morphological opening, or closing for dark ink, takes away (top-hat, black-hat),
    so that shadows and the table around a card are gone.
    """
    size = max(3, round(THICKEST_STROKE * min(grey.shape)) | 1)  # px, odd
    operation = cv2.MORPH_TOPHAT if ink_is_light else cv2.MORPH_BLACKHAT
    paper = 0 if ink_is_light else 255  # beyond the border
    padded = cv2.copyMakeBorder(grey, size, size, size, size, cv2.BORDER_CONSTANT, value=paper)
    hat = cv2.morphologyEx(padded, operation, np.ones((size, size), np.uint8))
    return hat[size:-size, size:-size]


def edge_slope(light: np.ndarray, mask: np.ndarray) -> float:
    """Return how steep the edge of a mask is on the average, grey levels by px."""
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    across = cv2.Sobel(light, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(light, cv2.CV_32F, 0, 1, scale=1 / 8)
    return cv2.mean(cv2.magnitude(across, down), mask=edge)[0]


def find_lines(mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return a mask (H, W) uint8 of ruled lines, and whether they are two that form a corner.

    A line is straight to a pixel, along an axis, long and thin. It lies at the rim of the picture
    or, if it lies flat, goes from border to border. Two in a corner may be an L or a 7.
    """
    lines = np.zeros_like(mask)
    sides = set()
    for is_upright in (False, True):
        turned = np.ascontiguousarray(mask.T) if is_upright else mask
        rows, columns = turned.shape
        length = np.ones((1, max(5, round(LINE_LENGTH * columns))), np.uint8)
        tolerant = cv2.dilate(turned, np.ones((3, 1), np.uint8))
        straight = cv2.morphologyEx(tolerant, cv2.MORPH_OPEN, length) & turned
        _, labels, stats, centres = cv2.connectedComponentsWithStats(straight, connectivity=8)
        for label in range(1, len(stats)):
            x, _, width, _, area = stats[label]
            position = centres[label][1] / rows
            at_rim = min(position, 1 - position) < LINE_RIM
            across = not is_upright and x <= 1 and x + width >= columns - 1
            if area / width <= LINE_THICKNESS * rows + 1 and (at_rim or across):
                line = np.uint8(labels == label)
                lines |= line.T if is_upright else line
                sides.add((is_upright, position > 0.5))
    directions = {is_upright for is_upright, _ in sides}
    return lines, len(sides) == 2 and len(directions) == 2


def join_over(rest: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Join strokes of a mask over the lines that were taken out of it."""
    down = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((GAP, 1), np.uint8))
    across = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((1, GAP), np.uint8))
    return rest | ((down | across) & lines)


def choose_parts(mask: np.ndarray) -> list[np.ndarray]:
    """Return masks of what may be the character among the parts of a mask of ink.

    All of it, or what does not come in from the border; of these, all of it, or what a ring is
    drawn around, or what is underlined.
    """
    parts = tell_parts(mask)
    everything = np.ones(len(parts.area), bool)
    from_border = parts.touching & (parts.inside < 0.5 * parts.area)
    choices = []
    for kept in (everything, ~from_border):
        kept = without_specks(parts, kept)
        for left_out in (~everything, find_rings(parts, kept), find_underlines(parts, kept)):
            choice = without_specks(parts, kept & ~left_out)
            if not any(np.array_equal(choice, earlier) for earlier in choices):
                choices.append(choice)
    return [parts.mask(choice) for choice in choices]


def without_specks(parts: Parts, kept: np.ndarray) -> np.ndarray:
    """Return `kept`, (n,) bool, without parts far smaller than that with most pixels inside."""
    if not kept.any():
        return kept
    main = np.where(kept, parts.inside + 0.01 * parts.area, -1).argmax()
    return kept & (parts.area >= SPECK * parts.area[main])


def find_rings(parts: Parts, kept: np.ndarray) -> np.ndarray:
    """Say which of the parts kept, (n,) bool, go around another of some size."""
    rings = np.zeros_like(kept)
    right = parts.x + parts.width
    bottom = parts.y + parts.height
    for i in np.flatnonzero(kept):
        beside = (parts.x <= parts.x[i]) | (right >= right[i])
        beside |= (parts.y <= parts.y[i]) | (bottom >= bottom[i])
        rings[i] = (kept & ~beside & (parts.area > 0.1 * parts.area[i])).any()
    return rings


def find_underlines(parts: Parts, kept: np.ndarray) -> np.ndarray:
    """Say which of the parts kept, (n,) bool, is flat and below all others."""
    flat = kept & (parts.width > 4 * parts.height) & (parts.width > 0.2 * parts.labels.shape[1])
    bottom = parts.y + parts.height
    for i in np.flatnonzero(flat):
        kept_others = kept & (np.arange(len(kept)) != i)
        flat[i] = parts.y[i] >= bottom[kept_others].max(initial=0) - 2
    return flat if (kept & ~flat).any() else np.zeros_like(kept)


def fit_parts(light: np.ndarray, contrast: float, mask: np.ndarray, side: int) -> np.ndarray | None:
    """Fit what a mask keeps of ink on paper of level 0; None where that is next to nothing."""
    if cv2.countNonZero(mask) < FEWEST_PIXELS:
        return None
    around = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=2)  # edges of strokes
    light = np.where(around, light, np.uint8(0))
    try:
        return form(Character(light, 0.0, contrast, cv2.boundingRect(mask)), side)
    except ValueError:
        return None


# EMNIST's form

FINE_LENGTH = 64  # px: the character's length while its strokes are evened
MARGIN = 9  # px: and the room around it
SHARPENING = 0.5  # how much is added of what is finer than BLUR
BLUR = 11  # px, of a box, twice
STROKE = 2.3 / 22  # of its length: width of strokes; EMNIST's median
EDGE = 0.3  # of full ink: where the finished character ends
LONGEST = (
    22 / 28
)  # of the result's side: EMNIST's median is 23.6 / 28 with the traces that EDGE cuts


def form(character: Character, side: int) -> np.ndarray:
    """Scale, centre, and bring to the width of EMNIST's strokes: (side, side) uint8.

    A stroke's width is twice its area over the length of its outline.
    """
    canvas = FINE_LENGTH + 2 * MARGIN
    large = square(character.light, character.box, FINE_LENGTH, canvas, character.paper)
    height = large.astype(np.float32) - character.paper
    blurred = cv2.blur(cv2.blur(height, (BLUR, BLUR)), (BLUR, BLUR))
    height += SHARPENING * (height - blurred)
    if height.max() <= 0:  # thinner than a pixel of a long strip
        raise ValueError(BLANK)
    ink = (height / min(character.contrast, height.max())).clip(0, 1)
    across = np.diff(ink[:-1], axis=1)
    down = np.diff(ink[:, :-1], axis=0)
    outline = np.hypot(across, down).sum()
    width = 2 * ink.sum() / outline
    ink = thicken(ink, (STROKE * FINE_LENGTH - width) / 2)
    box = cv2.boundingRect(np.uint8(ink > EDGE))
    ink = square(ink, box, LONGEST * side, side, 0)
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)


def thicken(ink: np.ndarray, change: float) -> np.ndarray:
    """Move the outline out by `change` px, between two whole numbers of them."""
    change = min(max(change, -FINE_LENGTH / 8), MARGIN - 2)
    whole = int(abs(change))
    move = cv2.dilate if change > 0 else cv2.erode
    moved = []
    for reach in (whole, whole + 1):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        moved.append(move(ink, disc))
    return moved[0] + (abs(change) - whole) * (moved[1] - moved[0])


def square(
    image: np.ndarray, box: tuple[int, ...], length: float, side: int, paper: float
) -> np.ndarray:
    """Return (side, side) with what is in a box at its centre, `length` px long."""
    x, y, width, height = box
    cut = round(max(width, height) * side / length)  # px of the image to a side of the result
    left = x + (width + cut) // 2  # in the padded image
    top = y + (height + cut) // 2
    padded = cv2.copyMakeBorder(image, cut, cut, cut, cut, cv2.BORDER_CONSTANT, value=paper)
    crop = padded[top : top + cut, left : left + cut]
    how = cv2.INTER_AREA if cut > side else cv2.INTER_CUBIC
    return cv2.resize(crop, (side, side), interpolation=how)
