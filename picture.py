"""Bring any picture file of a handwritten character to the form that EMNIST's own have.

    prepare("picture.jpg", 28)  # (28, 28) uint8, ink 255 on 0

`read` a file, upright and reduced -> `to_grey` -> one or more readings, each of which finds a
character and brings it `to_emnist_form`. The first reading does for tidy pictures. Where frames,
rules, shadows or the table around a card leave doubt, `propose` gives plain alternatives, among
which the net chooses. Knows neither torch nor CNN. Constants whose source is not said were tuned on
../shared/field and ../shared/scenes, by the answers of the net.
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

Images = list[np.ndarray | None]  # (size, size) uint8, ink 255 on 0; None: nothing is there
BLANK = "blank: no ink found"
SQUARE = np.ones((3, 3), np.uint8)  # reaches all 8 neighbours of a pixel


class Reading(NamedTuple):
    """One way to see the character in a picture."""

    image: np.ndarray | None  # (size, size) uint8, ink 255 on 0; None: no character is there
    penalty: float = 0.0  # nats by which the net must like it better than a reading without


def prepare(path: str, size: int) -> np.ndarray:
    """Read a picture file and fit the character in it: (size, size) uint8, ink 255 on 0.

    Raises ValueError, one line for the user, for whatever is wrong with the file, and if it holds
    no ink.
    """
    return read_first(path, size)[0]


def read_first(path: str, size: int) -> tuple[np.ndarray, bool | None]:
    """Return what `prepare` does, and whether `propose` should be asked for other readings.

    None: it need not be asked at all, as the picture is in EMNIST's form.
    """
    with explained(path):
        return fit_first(to_grey(read(path)), size)


def fit(grey: np.ndarray, size: int) -> np.ndarray:
    """Fit the character in a grey picture to the form of EMNIST's: (size, size) uint8.

    grey: (H, W) uint8, ink darker or lighter than the paper. Ink becomes 255 on 0, centred by its
    bounding box. Raises ValueError(BLANK) if there is no ink.
    """
    return fit_first(grey, size)[0]


def fit_first(grey: np.ndarray, size: int) -> tuple[np.ndarray, bool | None]:
    """Return what `fit` does, and the doubt about it as `read_first` does."""
    emnist_image = as_emnist(grey, size)
    if emnist_image is not None:
        return emnist_image, None
    character = find_character(lighten_ink(grey))
    image = to_emnist_form(character, size) if character else None
    if image is None:
        raise ValueError(BLANK)
    return image, character.in_doubt


# Read a file

# To add a format: Pillow's name in FORMATS (of a plug-in, in readable_formats), its suffixes, by
# which folders are searched, in SUFFIXES and out of UNREAD
FORMATS = (  # read by Pillow's own code alone; EPS and the like, which start programs, are not
    "PNG JPEG BMP DIB GIF TIFF WEBP AVIF JPEG2000 PPM SGI QOI PCX ICO "
    "TGA"  # the last, as it has no signature: almost any bytes may be taken for it
).split()
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
RAW_SUFFIXES = tuple(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .x3f".split()
)
UNREAD = {  # suffixes of pictures that are not read: what they are, and the way out
    **dict.fromkeys(HEIC_SUFFIXES, "HEIC: pip install pillow-heif, or save it as JPEG"),
    ".jxl": "JPEG XL: save it as PNG",
    ".pdf": "PDF: take its pages out with pdftoppm -png, and cut them",
    **dict.fromkeys((".svg", ".svgz", ".eps"), "a drawing, not pixels: save it as PNG"),
    **dict.fromkeys((".psd", ".xcf"), "a picture of layers: save it as PNG"),
    **dict.fromkeys(RAW_SUFFIXES, "a camera's raw file: develop it to JPEG"),
}
SUFFIXES = tuple(UNREAD) + tuple(  # of files that are pictures, read or not
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .bmp .dib .gif .tif .tiff .webp .avif .jp2 .j2k .j2c "
    ".jpc .jpf .jpx .pbm .pgm .ppm .pnm .pfm .sgi .bw .rgb .rgba .qoi .pcx .ico .tga".split()
)
WORKING_LENGTH = 96  # px: pictures are reduced as far as their longer side stays this long
WORKING_WIDTH = 4  # px: and their shorter side this long


@cache
def readable_formats() -> list[str]:
    """Return the formats to be read: HEIF too, where the package pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return ["HEIF", *FORMATS]


def read(path: str, length: int = WORKING_LENGTH) -> Image.Image:
    """Read a picture upright, in mode L, RGB, RGBA, I or F, `length` px long or somewhat more.

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
        factor = reduction(picture, length)
        picture.draft(None, (picture.width // factor, picture.height // factor))  # of a JPEG
        picture.load()
        plain = to_plain_mode(picture)
        factor = reduction(plain, length)
        if factor > 1:
            plain = plain.reduce(factor)
        if plain.info:
            with suppress(Exception):  # a damaged EXIF block says nothing about the picture
                ImageOps.exif_transpose(plain, in_place=True)
        return plain


def reduction(picture: Image.Image, length: int) -> int:
    """Return how many times smaller a picture may be; of a long strip its narrow side decides."""
    by_longer = max(picture.size) // length
    by_shorter = min(picture.size) // WORKING_WIDTH
    return max(1, min(by_longer, by_shorter))


def to_plain_mode(picture: Image.Image) -> Image.Image:
    """Convert to mode L, RGB, RGBA, I or F, whichever loses nothing."""
    mode = picture.mode
    if picture.has_transparency_data and not mode.startswith("I"):
        return picture.convert("RGBA")
    if mode in ("L", "RGB", "I", "F"):
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
        suffix = os.path.splitext(path)[1].lower()
        is_damaged = suffix in HEIC_SUFFIXES and "HEIF" in readable_formats()
        if suffix in UNREAD and not is_damaged:
            return f"not read here: {UNREAD[suffix]}"
        return "not a picture in a format that is read here"
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
        return cv2.normalize(values, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
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
INK_LIMIT = 0.5  # of the area; EMNIST's mean is 0.17. What is more is paper, in a frame
TRACE_LEVEL = 0.1  # of the contrast: of the outermost trace of EMNIST's characters
LEAST_CONTRAST = 8  # grey levels of 256 between paper and ink
NOISE_LIMIT = 3  # deviations of noise: paper and ink differ by more
INK_LEVEL = 0.45  # of the way from paper to ink, by their means: where ink begins
PHOTO_SIDE = 24  # px: a picture with a shorter side is no photograph, so neither shaded nor noisy
SHADING_LIMIT = 0.1  # of the contrast: how far the levels of evenly lit paper deviate
PAPER_GRID = 40  # cells a side, in which the level of paper is estimated
PAPER_WINDOW = 21  # cells a side, of the median that is taken over them
PAPER_GRAIN = 3  # grey levels that paper deviates from its estimate
FRAME_INSET = 0.12  # of the shorter side: where the border's vote is taken, within most frames
CROP_INSET = 0.06  # the same, where the character may fill its picture
SPECK_AREA = 0.02  # of that of the largest part: what is smaller is dirt; an i's dot has some 0.05
RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie
SMALL_LENGTH = 14  # px: a shorter character, in a picture that was reduced, is read again


def as_emnist(grey: np.ndarray, size: int) -> np.ndarray | None:
    """Return a picture of EMNIST's own, be it enlarged or negative, as it was; None for others.

    It is a square of a multiple of `size`, of one level along its border, and holds the character
    as those do, and nothing around it.
    """
    rows, columns = grey.shape
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    low = int(border.min())
    high = int(border.max())
    if rows != columns or rows % size or high - low > LEAST_CONTRAST:
        return None
    ink = cv2.absdiff(grey, np.full_like(grey, (low + high) // 2))
    ink = cv2.resize(ink, (size, size), interpolation=cv2.INTER_AREA)
    most = int(ink.max())
    mask = np.uint8(ink > TRACE_LEVEL * most)
    x, y, width, height = np.array(cv2.boundingRect(mask)) / size
    off_centre = max(abs(x + width / 2 - 0.5), abs(y + height / 2 - 0.5))
    shortest, longest = EMNIST_LENGTHS
    if off_centre > EMNIST_OFFSET or not shortest <= max(width, height) <= longest:
        return None
    if most < LEAST_CONTRAST or cv2.mean(ink)[0] > INK_LIMIT * most:
        return None
    if cv2.connectedComponents(mask)[0] > 2:  # paper and the character
        parts = tell_parts(mask)
        if find_rings(parts, parts.area > 0).any():
            return None
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX)


def lighten_ink(grey: np.ndarray) -> np.ndarray:
    """Return a grey picture with its ink lighter than the paper, and the paper evenly lit."""
    if min(grey.shape) >= PHOTO_SIDE:
        grey = even_light(grey)
    return 255 - grey if vote_on_paper(grey, CROP_INSET) > 0 else grey


def mask_light(grey: np.ndarray) -> np.ndarray:
    """Return the mask (H, W) uint8, of 0 and 1, of the lighter of two levels (Otsu 1979)."""
    return cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]


def even_light(grey: np.ndarray) -> np.ndarray:
    """Bring paper to level 128 where both dark and light deviate too much for evenly lit paper.

    Paper is what is most in any window, so its median.
    """
    mask = mask_light(grey)
    light, light_deviation = cv2.meanStdDev(grey, mask=mask)
    dark, dark_deviation = cv2.meanStdDev(grey, mask=1 - mask)
    limit = SHADING_LIMIT * (light.item() - dark.item())
    if min(light_deviation.item(), dark_deviation.item()) <= limit:
        return grey
    cells = cv2.resize(grey, (PAPER_GRID, PAPER_GRID), interpolation=cv2.INTER_AREA)
    paper = cv2.resize(cv2.medianBlur(cells, PAPER_WINDOW), grey.shape[::-1])
    relief = grey - paper.astype(np.float32)
    relief -= relief.clip(-PAPER_GRAIN, PAPER_GRAIN)
    return (relief + 128).clip(0, 255).astype(np.uint8)


def vote_on_paper(grey: np.ndarray, inset: float) -> float:
    """Return how far light is more likely paper than dark is, -1 to 1.

    Paper has most of the area of the whole picture, and most of the border, which is taken `inset`
    (a fraction of the shorter side) in from the edge.
    """
    mask = mask_light(grey)
    cut = int(inset * min(mask.shape))
    inner = mask[cut : mask.shape[0] - cut, cut : mask.shape[1] - cut]
    border = np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]])
    return float(mask.mean() + border.mean() - 1)


class Character(NamedTuple):
    """A character found in a picture."""

    light: np.ndarray  # (H, W) uint8, ink lighter than paper
    paper: float  # the paper's level
    contrast: float  # how far the level of ink is above it
    mask: np.ndarray  # (H, W) uint8: 1 where its ink is
    in_doubt: bool = False  # it is small, or ink touches the border: others may be better


def find_character(light: np.ndarray) -> Character | None:
    """Find the character in a picture (H, W) uint8 of ink lighter than the paper; None: no ink."""
    mask = mask_light(light)
    paper = cv2.mean(light, mask=1 - mask)[0]
    contrast = cv2.mean(light, mask=mask)[0] - paper
    noise = noise_deviation(light) if min(light.shape) >= PHOTO_SIDE else 0
    if min(contrast, np.ptp(light)) < max(LEAST_CONTRAST, NOISE_LIMIT * noise):
        return None
    parts = tell_parts(np.uint8(light > paper + INK_LEVEL * contrast))
    mask = parts.mask(parts.area >= SPECK_AREA * parts.area.max())
    if cv2.countNonZero(mask) < 2:  # px: a dot
        return None
    box = cv2.boundingRect(mask)
    is_small = max(box[2:]) < SMALL_LENGTH and max(mask.shape) >= WORKING_LENGTH
    is_tight = box == (0, 0, *mask.shape[::-1])
    is_at_border = bool(parts.touching.any()) and not is_tight
    return Character(light, paper, contrast, mask, is_small or is_at_border)


def noise_deviation(grey: np.ndarray) -> float:
    """Return the standard deviation of noise, by what no smooth surface has (Immerkær 1996)."""
    kernel = np.outer((1, -2, 1), (1, -2, 1)).astype(np.float32)
    steps = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel)).ravel()
    median = np.partition(steps, steps.size // 2)[steps.size // 2]
    return float(median) / (6 * 0.6745)  # the kernel's norm; a normal deviation's median


class Parts(NamedTuple):
    """The connected parts of a mask of ink; arrays are (n,), lengths in px."""

    labels: np.ndarray  # (H, W) int32: the part that a pixel belongs to, from 1; 0 is paper
    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray
    area: np.ndarray
    inside: np.ndarray  # pixels that lie farther in than the rim
    touching: np.ndarray  # whether it touches the picture's border

    def mask(self, chosen: np.ndarray) -> np.ndarray:
        """Return the mask (H, W) uint8 of those parts for which `chosen`, (n,) bool, is true."""
        return np.concatenate([[False], chosen]).astype(np.uint8)[self.labels]


def tell_parts(mask: np.ndarray) -> Parts:
    """Tell apart the connected parts of a mask (H, W) uint8 of ink."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    left, top, width, height, area = stats[1:].T
    right = left + width
    bottom = top + height
    rows, columns = mask.shape
    rim_y = round(RIM * rows)
    rim_x = round(RIM * columns)
    inner = labels[rim_y : rows - rim_y, rim_x : columns - rim_x]
    inside = np.bincount(inner.ravel(), minlength=count)[1:]
    to_border = np.min([left, top, columns - right, rows - bottom], axis=0)
    return Parts(labels, left, top, right, bottom, area, inside, to_border <= 1)


# Other readings: strokes alone, without lines, without some of the parts

PENALTY = 3.0  # nats, of a proposal; 0 if merely enlarged, twice this with the unlikely polarity
CLOSE_VOTE = 0.3  # of two: with less between them, either dark or light may be ink
TINY_SIDE = 12  # px: a picture with a shorter side has no strokes to tell apart
ENLARGED_SIDE = 64  # px: smaller pictures are enlarged to this side
CLEAR_LENGTH = 40  # px, to which a small character is read again
SURROUNDINGS = 1.5  # of its length: how far what is around it is read again as well
STROKE_LIMIT = 0.22  # of the shorter side; what is wider is a shadow, a table, paper
EDGE_SLOPE = 0.15  # of the contrast by px: edges of drawn clouds have 0.12 at most, of ink 0.2
LEAST_AREA = 12  # px, of the ink of a character
LINE_LENGTH = 0.7  # of the picture's side: lines are longer
LINE_THICKNESS = 0.12  # of the picture's side: and not thicker
LINE_RIM = 0.2  # of the picture's side: and lie at the rim, or go from border to border
LINE_GAP = 7  # px: where a line is taken out, strokes on both of its sides are joined over it
UNDERLINE_ASPECT = 4  # width over height: underlines are flatter
UNDERLINE_LENGTH = 0.2  # of the picture's width: and longer


def propose(path: str, size: int) -> list[Reading]:
    """Return other readings of a picture file than the first, for the net to choose among.

    A small character is read again, larger; where polarity is in doubt, all is read inverted; then
    thin strokes alone are taken, in both polarities, with and without ruled lines, and of their
    parts all or some. Some readings may be alike. All are without an image where nothing but the
    lines of an empty form is found. Raises ValueError as `prepare` does.
    """
    with explained(path):
        grey = to_grey(read(path))
        enlarged = enlarge_small_character(path, grey)
    readings = []
    if enlarged is not None:
        grey = enlarged
        readings.append(Reading(fit_ink(lighten_ink(grey), size)))
    if abs(vote_on_paper(grey, CROP_INSET)) < CLOSE_VOTE:
        readings.append(Reading(fit_ink(255 - lighten_ink(grey), size), PENALTY))
    if min(grey.shape) < TINY_SIDE:
        return readings
    ink_is_light = vote_on_paper(grey, FRAME_INSET) <= 0
    likely, is_empty_form = fit_strokes(grey, ink_is_light, size)
    if is_empty_form:
        return [Reading(None)]
    unlikely, _ = fit_strokes(grey, not ink_is_light, size)
    readings += [Reading(image, PENALTY) for image in likely]
    readings += [Reading(image, 2 * PENALTY) for image in unlikely if image is not None]
    return readings


def fit_ink(light: np.ndarray, size: int) -> np.ndarray | None:
    """Fit all that is ink in a picture, lighter than paper; None where nothing is."""
    character = find_character(light)
    return to_emnist_form(character, size) if character else None


def enlarge_small_character(path: str, grey: np.ndarray) -> np.ndarray | None:
    """Read a character that is small in its picture again, larger; None if it is not small."""
    if min(grey.shape) < ENLARGED_SIDE:
        return None
    character = find_character(lighten_ink(grey))
    x, y, width, height = cv2.boundingRect(character.mask) if character else (0, 0, 0, 0)
    length = max(width, height)
    if not 0 < length < SMALL_LENGTH:
        return None
    picture = read(path, round(max(grey.shape) * CLEAR_LENGTH / length))
    scale = max(picture.size) / max(grey.shape)  # the shorter side may be rounded up
    centre = np.array([x + width / 2, y + height / 2])
    reach = SURROUNDINGS * length
    corners = np.concatenate([centre - reach, centre + reach]) * scale
    limits = (*picture.size, *picture.size)  # of left, top, right, bottom
    return to_grey(picture.crop(corners.clip(0, limits).round().astype(int).tolist()))


def fit_strokes(grey: np.ndarray, ink_is_light: bool, size: int) -> tuple[Images, bool]:
    """Fit what is thin in a grey picture and lighter, or darker, than around it.

    Returns images, None among them where nothing is there, and whether nothing but the lines of an
    empty form is: then there are no images. Masks hold 0 and 1: `& ~m` clears where m is 1.
    """
    if min(grey.shape) < ENLARGED_SIDE:
        scale = ENLARGED_SIDE / min(grey.shape)
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    light = thin_strokes(grey, ink_is_light)
    contrast = cv2.mean(light, mask=mask_light(light))[0]
    mask = np.uint8(light > INK_LEVEL * contrast)
    is_faint = contrast < max(LEAST_CONTRAST, NOISE_LIMIT * noise_deviation(grey))
    if is_faint or edge_slope(light, mask) < EDGE_SLOPE * contrast:
        return [None], False
    images = fit_parts(light, contrast, mask, size)
    lines, is_corner = find_lines(mask)
    if not lines.any():
        return images, False
    rest = join_over(mask & ~lines, lines)
    removed = cv2.dilate(mask & ~rest, SQUARE) & ~rest
    without_lines = fit_parts(np.where(removed, np.uint8(0), light), contrast, rest, size)
    if not is_corner and all(image is None for image in without_lines):
        return [], True
    return images + without_lines, False


def thin_strokes(grey: np.ndarray, ink_is_light: bool) -> np.ndarray:
    """Return ink on paper of level 0, (H, W) uint8: what is thinner than STROKE_LIMIT.

    It is what a morphological opening, or closing for dark ink, takes away (top-hat, black-hat),
    so that shadows and the table around a card are gone.
    """
    width = max(3, round(STROKE_LIMIT * min(grey.shape)) | 1)  # px, odd
    operation = cv2.MORPH_TOPHAT if ink_is_light else cv2.MORPH_BLACKHAT
    paper = 0 if ink_is_light else 255  # beyond the border
    kernel = np.ones((width, width), np.uint8)
    border = {"borderType": cv2.BORDER_CONSTANT, "borderValue": paper}
    return cv2.morphologyEx(grey, operation, kernel, **border)


def edge_slope(light: np.ndarray, mask: np.ndarray) -> float:
    """Return how steep the edge of a mask is on the average, grey levels by px."""
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, SQUARE)
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
    down = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((LINE_GAP, 1), np.uint8))
    across = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((1, LINE_GAP), np.uint8))
    return rest | ((down | across) & lines)


def fit_parts(light: np.ndarray, contrast: float, mask: np.ndarray, size: int) -> Images:
    """Fit what may be the character among the parts of ink; None where that is next to nothing.

    light: (H, W) uint8, ink on paper of level 0; mask: (H, W) uint8, of the ink.
    """
    images = []
    for chosen in choose_parts(mask):
        character = Character(light, 0.0, contrast, chosen)
        is_empty = cv2.countNonZero(chosen) < LEAST_AREA
        images.append(None if is_empty else to_emnist_form(character, size))
    return images


def choose_parts(mask: np.ndarray) -> list[np.ndarray]:
    """Return masks of what may be the character among the parts of a mask of ink.

    All of it, or what does not come in from the border; of these, all of it, or what a ring is
    drawn around, or what is underlined.
    """
    parts = tell_parts(mask)
    everything = np.ones(len(parts.area), bool)
    from_border = parts.touching & (parts.inside < 0.5 * parts.area)
    choices = []
    for chosen in (everything, ~from_border):
        chosen = without_specks(parts, chosen)
        for left_out in (~everything, find_rings(parts, chosen), find_underlines(parts, chosen)):
            choice = without_specks(parts, chosen & ~left_out)
            if not any(np.array_equal(choice, earlier) for earlier in choices):
                choices.append(choice)
    return [parts.mask(choice) for choice in choices]


def without_specks(parts: Parts, chosen: np.ndarray) -> np.ndarray:
    """Return `chosen`, (n,) bool, without parts far smaller than that with most pixels inside."""
    if not chosen.any():
        return chosen
    main = np.where(chosen, parts.inside + 0.01 * parts.area, -1).argmax()
    return chosen & (parts.area >= SPECK_AREA * parts.area[main])


def find_rings(parts: Parts, chosen: np.ndarray) -> np.ndarray:
    """Say which of the parts chosen, (n,) bool, go around another of some size."""
    rings = np.zeros_like(chosen)
    for i in np.flatnonzero(chosen):
        within = (parts.left > parts.left[i]) & (parts.right < parts.right[i])
        within &= (parts.top > parts.top[i]) & (parts.bottom < parts.bottom[i])
        rings[i] = (chosen & within & (parts.area > 0.1 * parts.area[i])).any()
    return rings


def find_underlines(parts: Parts, chosen: np.ndarray) -> np.ndarray:
    """Say which of the parts chosen, (n,) bool, are flat and below all others."""
    width = parts.right - parts.left
    is_flat = width > UNDERLINE_ASPECT * (parts.bottom - parts.top)
    flat = chosen & is_flat & (width > UNDERLINE_LENGTH * parts.labels.shape[1])
    others = chosen & ~flat
    return flat & (parts.top >= parts.bottom[others].max(initial=0) - 2) & others.any()


# EMNIST's form

FINE_LENGTH = 64  # px: the character's length while its strokes are evened
MARGIN = 9  # px: and the room around it
SHARPENING = 0.5  # how much is added of what is finer than BLUR
BLUR = 11  # px, of a box, twice
STROKE_WIDTH = 2.3 / 22  # of the character's length; EMNIST's median
INK_END = 0.3  # of full ink: where the finished character ends
LENGTH = 22 / 28  # of the result's side, of ink above INK_END; EMNIST's median with fainter ink
# is 23.6 / 28


def to_emnist_form(character: Character, size: int) -> np.ndarray | None:
    """Scale, centre, and bring to the width of EMNIST's strokes: (size, size) uint8.

    None where it is thinner than a pixel of a long strip. A stroke's width is twice its area over
    the length of its outline.
    """
    light, paper, contrast, mask, _ = character
    reach = 1 if min(mask.shape) < PHOTO_SIDE else 2  # px: so far go the soft edges of strokes
    around = cv2.dilate(mask, SQUARE, iterations=reach)
    light = np.where(around, light, np.uint8(paper))
    canvas = FINE_LENGTH + 2 * MARGIN
    large = square(light, cv2.boundingRect(mask), FINE_LENGTH, canvas, paper)
    height = large.astype(np.float32) - paper
    blurred = cv2.blur(cv2.blur(height, (BLUR, BLUR)), (BLUR, BLUR))
    height += SHARPENING * (height - blurred)
    if height.max() <= 0:
        return None
    ink = (height / min(contrast, height.max())).clip(0, 1)
    across = np.diff(ink[:-1], axis=1)
    down = np.diff(ink[:, :-1], axis=0)
    outline = np.hypot(across, down).sum()
    width = 2 * ink.sum() / outline
    ink = thicken(ink, (STROKE_WIDTH * FINE_LENGTH - width) / 2)
    box = cv2.boundingRect(np.uint8(ink > INK_END))
    ink = square(ink, box, LENGTH * size, size, 0)
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


def square(image: np.ndarray, box: tuple, length: float, size: int, paper: float) -> np.ndarray:
    """Return (size, size) with what is in a box at its centre, `length` px long."""
    x, y, width, height = box
    cut = round(max(width, height) * size / length)  # px of the image to a side of the result
    left = x + (width + cut) // 2  # in the padded image
    top = y + (height + cut) // 2
    padded = cv2.copyMakeBorder(image, cut, cut, cut, cut, cv2.BORDER_CONSTANT, value=paper)
    crop = padded[top : top + cut, left : left + cut]
    how = cv2.INTER_AREA if cut > size else cv2.INTER_CUBIC
    return cv2.resize(crop, (size, size), interpolation=how)
