"""Bring any picture file of a handwritten character to the form that EMNIST's own have.

    prepare("picture.jpg", 28)  # (28, 28) uint8, ink 255 on 0

`read` a file, upright and reduced -> `to_grey` -> `first_view`: what is ink -> `to_emnist_form`.
That first reading does for tidy pictures. Where frames, rules, shadows or the table around a card
leave doubt, `propose` gives every plain reading of the picture: a view of it, and which parts of
the view's ink are the character's; or that nothing is written. Each says what it keeps and leaves
out, by which the readings are compared beside what the net makes of them. Knows neither torch nor
CNN. Constants whose source is not said were tuned on ../shared/field and ../shared/scenes.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from operator import mul
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BLANK = "blank: nothing is written"
SQUARE = np.ones((3, 3), np.uint8)  # reaches all 8 neighbours of a pixel


class Features(NamedTuple):
    """What a reading keeps of the picture's ink, and what it leaves out."""

    left_out: float = 0.0  # fraction of the ink farther in than the rim, but that of ruled lines
    parts_left_out: float = 0.0  # how many, of those that lie mostly within the rim
    parts_kept: float = 0.0  # how many beyond the first
    offset: float = 0.0  # of what is kept from the picture's centre, half sides
    at_rim: float = 0.0  # fraction of what is kept that lies on the rim
    open_ends: float = 0.0  # 1: a line is taken out that ends free, as strokes do
    unlikely: float = 0.0  # 1: the shade taken for ink, light or dark, is more likely the paper's
    blank: float = 0.0  # 1: nothing is kept
    blank_and_small: float = 0.0  # by how many octaves the picture is smaller than SMALL_SIDE
    # Of the ink that blank leaves out, the longest part within the rim, as a fraction of the side
    stroke_extent: float = 0.0  # in the view of thin strokes
    ink_extent: float = 0.0  # in the first view


# Nats, of each feature, fitted by images_for_readme/readings.py on scenes, forms and field sets
WEIGHTS = Features(
    left_out=-1.39,
    parts_left_out=-1.9,
    parts_kept=-0.92,
    offset=-1.25,
    at_rim=-2.97,
    open_ends=-0.81,
    unlikely=-1.71,
    blank=-1.33,
    blank_and_small=-0.97,
    stroke_extent=-3.31,
    ink_extent=-2.11,
)


class Reading(NamedTuple):
    """One way to see the character in a picture or, without an image, that there is none."""

    image: np.ndarray | None  # (size, size) uint8, ink 255 on 0
    features: Features

    @property
    def score(self) -> float:
        """Nats by which this reading is more likely than another, but for what the net says."""
        return sum(map(mul, self.features, WEIGHTS))


def prepare(path: str | os.PathLike, size: int) -> np.ndarray:
    """Read a picture file and fit the character in it: (size, size) uint8, ink 255 on 0.

    Raises ValueError, one line for the user, for whatever is wrong with the file, and if it holds
    no ink.
    """
    _, _, reading = read_first(path, size)
    if reading.image is None:
        raise ValueError(BLANK)
    return reading.image


def fit(grey: np.ndarray, size: int) -> np.ndarray:
    """Fit the character in a grey picture to the form of EMNIST's: (size, size) uint8.

    grey: (H, W) uint8, ink darker or lighter than the paper; of more than some 100 px a side it is
    slow. Ink becomes 255 on 0, centred by its bounding box. Raises ValueError if there is no ink.
    """
    reading, _ = read_all_ink(grey, size)
    if reading.image is None:
        raise ValueError(BLANK)
    return reading.image


def read_first(path: str | os.PathLike, size: int) -> tuple[Image.Image, np.ndarray, Reading]:
    """Return a picture as read, grey (H, W) uint8, and its first reading: all ink but specks.

    A character that is small in a large picture is read again, larger: then grey is what is around
    it. Raises ValueError as `read` does.
    """
    picture = read(path)
    grey = to_grey(picture)
    reading, box = read_all_ink(grey, size)
    is_large = max(grey.shape) >= WORKING_LENGTH and min(grey.shape) >= ENLARGED_SIDE
    if box and is_large and max(box[2:]) < SMALL_LENGTH:
        grey = to_grey(read_larger(path, box, grey.shape))
        reading, _ = read_all_ink(grey, size)
    return picture, grey, reading


def propose(grey: np.ndarray, size: int) -> list[Reading]:
    """Return every plain reading of a grey picture (H, W) uint8.

    Of each view the ink, with and without ruled lines, and of its parts all or some; and that
    nothing is written. What may be EMNIST's own is read as it is, too, and of views only in the
    first one. Of readings with the same image the likeliest is returned.
    """
    readings = []
    views = see(grey)
    emnist_image = as_emnist(grey, size)
    if emnist_image is not None:
        readings.append(Reading(emnist_image, Features()))
        views = islice(views, 1)
    may_have_lines = min(grey.shape) >= PHOTO_SIDE
    extents = []  # of the ink that is on no line, in each view
    for view, is_unlikely in views:
        extents.append(0.0)
        if view:
            of_view, extents[-1] = read_view(view, is_unlikely, may_have_lines, size)
            readings += of_view
    stroke_extent = extents[1] if len(extents) > 2 else extents[0]  # as thin strokes show it
    readings.append(read_blank(grey, stroke_extent, extents[0]))
    likeliest: dict[bytes | None, Reading] = {}
    for reading in sorted(readings, key=lambda reading: -reading.score):
        pixels = None if reading.image is None else reading.image.tobytes()
        likeliest.setdefault(pixels, reading)
    return list(likeliest.values())


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
STRIP_LENGTH = 1536  # px: but no strip stays longer
SMALL_LENGTH = 14  # px: a shorter character, in a picture that was reduced, is read again
CLEAR_LENGTH = 40  # px: to this length
SURROUNDINGS = 1.5  # of its length: how far what is around it is read again as well


@cache
def readable_formats() -> list[str]:
    """Return the formats to be read: HEIF too, where the package pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return ["HEIF", *FORMATS]


def read(path: str | os.PathLike, length: int = WORKING_LENGTH) -> Image.Image:
    """Read a picture upright, in mode L, RGB, RGBA, I or F, reduced to `length` px or more.

    Of an animation, the first frame. Raises ValueError, one line for the user, for whatever is
    wrong with the file.
    """
    path = os.fspath(path)
    try:
        return decode(path, length)
    except Exception as error:  # Pillow raises nearly everything for broken files
        raise ValueError(explain(error, path)) from None


def decode(path: str, length: int) -> Image.Image:
    """Do what `read` does; pipes and devices are refused without being opened.

    Raises OSError, ValueError or whatever else Pillow raises for bytes that are no sound picture.
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
    longer = max(picture.size)
    by_width = max(min(picture.size) // WORKING_WIDTH, longer // STRIP_LENGTH)
    return max(1, min(longer // length, by_width))


def read_larger(path: str | os.PathLike, box: tuple, shape: tuple[int, int]) -> Image.Image:
    """Read what is around a small character again, the character CLEAR_LENGTH px long.

    box: left, top, width, height of the character, px of the picture as it was read: `shape`.
    """
    x, y, width, height = box
    length = max(width, height)
    picture = read(path, round(max(shape) * CLEAR_LENGTH / length))
    scale = max(picture.size) / max(shape)  # the shorter side may be rounded up
    centre = np.array([x + width / 2, y + height / 2])
    reach = SURROUNDINGS * length
    corners = np.concatenate([centre - reach, centre + reach]) * scale
    limits = (*picture.size, *picture.size)  # of left, top, right, bottom
    return picture.crop(corners.clip(0, limits).round().astype(int).tolist())


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
    if isinstance(error, MemoryError):
        return "too large: decoding it takes more memory than there is"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "can't be read: " + "".join(c if c.isprintable() else "?" for c in text)[:200]


UNPRINTABLE = re.compile(  # backslash, control characters and bytes that are not UTF-8
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str) -> str:
    r"""Return text as one line that can't steer a terminal: \n, \x1b, a byte 0xff as \udcff."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


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


# Views: grey levels as ink on paper

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
CLOSE_VOTE = 0.3  # of two: with less between them, either dark or light may be ink
TINY_SIDE = 12  # px: a picture with a shorter side has no strokes to tell apart
ENLARGED_SIDE = 64  # px: smaller pictures are enlarged to this side, to find strokes
STROKE_LIMIT = 0.22  # of the shorter side; what is wider is a shadow, a table, paper
NOISE_SLOPE = 0.61  # of its deviation by px: the slope of white noise, by Sobel's kernels
EDGE_SLOPE = 0.15  # of the contrast by px: edges of drawn clouds have 0.12 at most, of ink 0.2


class View(NamedTuple):
    """A picture as ink on paper."""

    light: np.ndarray  # (H, W) uint8, ink lighter than paper
    paper: float  # the paper's level
    contrast: float  # how far the level of ink is above it
    mask: np.ndarray  # (H, W) uint8: 1 where ink is


def first_view(grey: np.ndarray) -> View | None:
    """See all that is darker, or lighter, than evenly lit paper as ink; None: there is none."""
    light = lighten_ink(grey)
    noise = noise_deviation(light) if min(light.shape) >= PHOTO_SIDE else 0
    return find_ink(light, max(LEAST_CONTRAST, NOISE_LIMIT * noise))


def see(grey: np.ndarray) -> Iterator[tuple[View | None, bool]]:
    """Yield the views of a picture, and whether ink is unlikely to be as light or dark as there.

    First all ink, then thin strokes, then each with ink and paper the other way round.
    """
    yield first_view(grey), False
    if min(grey.shape) >= TINY_SIDE:
        ink_is_light = vote_on_paper(grey, FRAME_INSET) <= 0
        yield strokes_view(grey, ink_is_light), False
        yield strokes_view(grey, not ink_is_light), True
    yield inverted_view(grey), True


def inverted_view(grey: np.ndarray) -> View | None:
    """See as paper what the first view takes for ink; None where the vote on it is clear."""
    if abs(vote_on_paper(grey, CROP_INSET)) >= CLOSE_VOTE:
        return None
    light = 255 - lighten_ink(grey)
    return find_ink(light, LEAST_CONTRAST)


def strokes_view(grey: np.ndarray, ink_is_light: bool) -> View | None:
    """See what is thin, and lighter or darker than around it, as ink; None: nothing is.

    That is what a morphological opening, or closing for dark ink, takes away (top-hat, black-hat),
    so that shadows and the table around a card are gone.
    """
    scale = min(ENLARGED_SIDE / min(grey.shape), STRIP_LENGTH / max(grey.shape))
    if scale > 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    width = max(3, round(STROKE_LIMIT * min(grey.shape)) | 1)  # px, odd
    operation = cv2.MORPH_TOPHAT if ink_is_light else cv2.MORPH_BLACKHAT
    beyond = 0 if ink_is_light else 255  # the level beyond the border: paper's
    kernel = np.ones((width, width), np.uint8)
    border = {"borderType": cv2.BORDER_CONSTANT, "borderValue": beyond}
    light = cv2.morphologyEx(grey, operation, kernel, **border)
    noise = noise_deviation(grey)
    view = find_ink(light, max(LEAST_CONTRAST, NOISE_LIMIT * noise))
    if view is None:
        return None
    steepest_cloud = np.hypot(EDGE_SLOPE * view.contrast, NOISE_SLOPE * noise)
    return view if edge_slope(light, view.mask) >= steepest_cloud else None


def find_ink(light: np.ndarray, least_contrast: float) -> View | None:
    """Tell ink from paper in (H, W) uint8 of two levels, ink the lighter; None: there is none."""
    mask = mask_light(light)
    paper = cv2.mean(light, mask=1 - mask)[0]
    contrast = cv2.mean(light, mask=mask)[0] - paper
    if min(contrast, np.ptp(light)) < least_contrast:
        return None
    return View(light, paper, contrast, np.uint8(light > paper + INK_LEVEL * contrast))


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

    Most of any window is paper, so that the window's median is paper's level there.
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


def noise_deviation(grey: np.ndarray) -> float:
    """Return the standard deviation of noise; the kernel is blind to smooth surfaces.

    Source: Immerkær 1996, Computer Vision and Image Understanding 64(2); the median for his mean.
    """
    kernel = np.outer((1, -2, 1), (1, -2, 1)).astype(np.float32)
    steps = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel)).ravel()
    median = np.partition(steps, steps.size // 2)[steps.size // 2]
    return float(median) / (6 * 0.6745)  # the kernel's norm; a normal deviation's median


def edge_slope(light: np.ndarray, mask: np.ndarray) -> float:
    """Return how steep the edge of a mask is on the average, grey levels by px."""
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, SQUARE)
    across = cv2.Sobel(light, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(light, cv2.CV_32F, 0, 1, scale=1 / 8)
    return cv2.mean(cv2.magnitude(across, down), mask=edge)[0]


# Parts of the ink: connected ones, and ruled lines

RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie
LINE_LENGTH = 0.7  # of the picture's side: lines are longer
LINE_THICKNESS = 0.2  # of the picture's side: and not thicker
LINE_RIM = 0.2  # of the picture's side: and lie at the rim, or go from border to border
LINE_REACH = 4  # px: an end that is as near to a line across is joined to it
SOFT_EDGE = 2  # px: so far go the soft edges of lines and of strokes
LINE_GAP = 7  # px: where a line is taken out, strokes on both of its sides are joined over it
SPECK_AREA = 0.02  # of that of the largest part: what is smaller is dirt; an i's dot has some 0.05


class Parts(NamedTuple):
    """The connected parts of a mask of ink; arrays are (n,), lengths in px."""

    labels: np.ndarray  # (H, W) int32: the part that a pixel belongs to, from 1; 0 is paper
    area: np.ndarray
    inside: np.ndarray  # pixels that lie farther in than the rim
    off_line: np.ndarray  # of these, pixels that are on no line
    touching: np.ndarray  # whether it touches the picture's border

    def mask(self, chosen: np.ndarray) -> np.ndarray:
        """Return the mask (H, W) uint8 of those parts for which `chosen`, (n,) bool, is true."""
        return np.concatenate([[False], chosen]).astype(np.uint8)[self.labels]

    def without_specks(self, chosen: np.ndarray) -> np.ndarray:
        """Drop parts under SPECK_AREA of the one chosen that has most pixels inside the rim."""
        main = np.where(chosen, self.inside + 0.01 * self.area, -1).argmax()
        return chosen & (self.area >= SPECK_AREA * self.area[main])


def tell_parts(mask: np.ndarray, lines: np.ndarray | None = None) -> Parts:
    """Tell apart the connected parts of a mask of ink; mask and lines, if any: (H, W) uint8."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    left, top, width, height, area = stats[1:].T
    rows, columns = mask.shape
    to_border = np.min([left, top, columns - left - width, rows - top - height], axis=0)
    inner = inner_area(mask.shape)
    inside = np.bincount(labels[inner].ravel(), minlength=count)[1:]
    off_line = inside
    if lines is not None:
        off_line = np.bincount(labels[inner][lines[inner] == 0], minlength=count)[1:]
    return Parts(labels, area, inside, off_line, to_border <= 1)


def inner_area(shape: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of a picture that lie farther in than its rim."""
    rim_y = round(RIM * shape[0])
    rim_x = round(RIM * shape[1])
    return slice(rim_y, shape[0] - rim_y), slice(rim_x, shape[1] - rim_x)


def find_extent(mask: np.ndarray) -> float:
    """Return how long the longest part of a mask is within the rim, as a fraction of the side."""
    inner = np.ascontiguousarray(mask[inner_area(mask.shape)])
    _, _, stats, _ = cv2.connectedComponentsWithStats(inner, connectivity=8)
    lengths = stats[1:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]] / inner.shape
    return float(lengths.max(initial=0))


def find_lines(mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the mask (H, W) uint8 of ruled lines, and whether one has an open end.

    An end is open that is neither at the picture's border nor at a line across.
    """
    flat, flat_boxes = find_flat_lines(mask, anywhere=True)
    upright, upright_boxes = find_flat_lines(np.ascontiguousarray(mask.T), anywhere=False)
    is_open = has_open_end(flat_boxes, upright.T) or has_open_end(upright_boxes, flat.T)
    return flat | upright.T, is_open


def find_flat_lines(mask: np.ndarray, anywhere: bool) -> tuple[np.ndarray, list[tuple]]:
    """Return the mask (H, W) uint8 of lines from left to right, and their bounding boxes.

    A line is straight to a pixel, long and thin. It lies at the rim of the picture or, where it may
    lie anywhere, goes from border to border.
    """
    lines = np.zeros_like(mask)
    boxes = []
    rows, columns = mask.shape
    length = np.ones((1, max(5, round(LINE_LENGTH * columns))), np.uint8)
    tolerant = cv2.dilate(mask, np.ones((3, 1), np.uint8))
    straight = cv2.morphologyEx(tolerant, cv2.MORPH_OPEN, length) & mask
    _, labels, stats, centres = cv2.connectedComponentsWithStats(straight, connectivity=8)
    for label in range(1, len(stats)):
        x, y, width, height, area = stats[label]
        position = centres[label][1] / rows
        at_rim = min(position, 1 - position) < LINE_RIM
        goes_across = anywhere and x <= 1 and x + width >= columns - 1
        if area / width <= LINE_THICKNESS * rows + 1 and (at_rim or goes_across):
            lines |= np.uint8(labels == label)
            boxes.append((x, y, width, height))
    return lines, boxes


def has_open_end(boxes: list[tuple], across: np.ndarray) -> bool:
    """Say whether one of some flat lines, given by their boxes, has an open end."""
    for x, y, width, height in boxes:
        rows = slice(max(0, y - 1), y + height + 1)
        for end in (x, x + width):
            near = across[rows, max(0, end - LINE_REACH) : end + LINE_REACH]
            if 2 < end < across.shape[1] - 2 and not near.any():
                return True
    return False


def take_out(view: View, lines: np.ndarray) -> View | None:
    """Take the lines out of a view; what then is ink is told anew. None: nothing is."""
    rest = view.mask & ~lines  # masks hold 0 and 1: `& ~m` clears where m is 1
    down = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((LINE_GAP, 1), np.uint8))
    across = cv2.morphologyEx(rest, cv2.MORPH_CLOSE, np.ones((1, LINE_GAP), np.uint8))
    rest |= (down | across) & lines
    removed = cv2.dilate(view.mask & ~rest, SQUARE, iterations=SOFT_EDGE) & ~rest
    light = np.where(removed, np.uint8(view.paper), view.light)
    return find_ink(light, LEAST_CONTRAST)


# Readings: which parts of the ink are the character's

LEAST_AREA = 12  # px, of the ink of a character in a photograph
SMALL_SIDE = 40  # px: in pictures with a shorter side, less is seen of a character
SINGLE_PARTS = 3  # so many of the largest parts are read each alone, and left out alone


def read_all_ink(grey: np.ndarray, size: int) -> tuple[Reading, tuple | None]:
    """Take all ink in a grey picture (H, W) for the character, but for specks.

    Returns the box of that ink, too: left, top, width and height, px. It is None without ink, and
    for what may be EMNIST's own, which is taken as it is.
    """
    emnist_image = as_emnist(grey, size)
    if emnist_image is not None:
        return Reading(emnist_image, Features()), None
    view = first_view(grey)
    if view is None:
        return read_blank(grey, 0.0, 0.0), None
    parts = tell_parts(view.mask)
    chosen = parts.area >= SPECK_AREA * parts.area.max()
    reading = read_chosen(view, parts, chosen, Features(), size)
    return reading or read_blank(grey, 0.0, 0.0), cv2.boundingRect(parts.mask(chosen))


def read_blank(grey: np.ndarray, stroke_extent: float, ink_extent: float) -> Reading:
    """Return the reading of a picture (H, W) that nothing is written, though there is some ink."""
    octaves = max(0.0, float(np.log2(SMALL_SIDE / min(grey.shape))))
    features = Features(
        blank=1.0,
        blank_and_small=octaves,
        stroke_extent=stroke_extent,
        ink_extent=ink_extent,
    )
    return Reading(None, features)


def read_view(
    view: View, is_unlikely: bool, may_have_lines: bool, size: int
) -> tuple[list[Reading], float]:
    """Return the readings of a view, and the extent of its ink that is on no line."""
    common = Features(unlikely=float(is_unlikely))
    if not may_have_lines:
        return read_parts(view, None, common, size), find_extent(view.mask)
    lines, is_open = find_lines(view.mask)
    readings = read_parts(view, lines, common, size)
    if not lines.any():
        return readings, find_extent(view.mask)
    rest = take_out(view, lines)
    if rest is None:
        return readings, 0.0
    common = common._replace(open_ends=float(is_open))
    return readings + read_parts(rest, None, common, size), find_extent(rest.mask)


def read_parts(view: View, lines: np.ndarray | None, common: Features, size: int) -> list[Reading]:
    """Return the readings of a view that keep some of its parts; `common`: what they share."""
    parts = tell_parts(view.mask, lines)
    least = LEAST_AREA if min(view.mask.shape) >= PHOTO_SIDE else 2
    choices = [chosen for chosen in choose_parts(parts) if parts.area[chosen].sum() >= least]
    readings = [read_chosen(view, parts, chosen, common, size) for chosen in choices]
    return [reading for reading in readings if reading]


def read_chosen(
    view: View, parts: Parts, chosen: np.ndarray, common: Features, size: int
) -> Reading | None:
    """Take the parts chosen, (n,) bool, for the character; None: nothing of it is left."""
    mask = parts.mask(chosen)
    image = to_emnist_form(view, mask, size)
    if image is None:
        return None
    rows, columns = mask.shape
    left, top, width, height = cv2.boundingRect(mask)
    x = (2 * left + width) / columns - 1
    y = (2 * top + height) / rows - 1
    is_inner = parts.inside > 0.5 * parts.area
    left_out = parts.without_specks(np.ones_like(chosen)) & is_inner & ~chosen
    features = common._replace(
        left_out=float(parts.off_line[~chosen].sum() / max(1, parts.off_line.sum())),
        parts_left_out=float(left_out.sum()),
        parts_kept=float(chosen.sum() - 1),
        offset=float(np.hypot(x, y)),
        at_rim=float(1 - parts.inside[chosen].sum() / parts.area[chosen].sum()),
    )
    return Reading(image, features)


def choose_parts(parts: Parts) -> list[np.ndarray]:
    """Return what may be the character among the parts, (n,) bool each.

    All of them, all but what comes in from the border, each of the larger ones, all but that one;
    a tiny picture has room for a character alone.
    """
    everything = parts.without_specks(np.ones(len(parts.area), bool))
    if min(parts.labels.shape) < TINY_SIDE:
        return [everything]
    from_border = parts.touching & (parts.inside < 0.5 * parts.area)
    proposals = [everything, parts.without_specks(~from_border)]
    by_area = np.argsort(-np.where(everything, parts.area, 0), kind="stable")
    for part in by_area[:SINGLE_PARTS]:
        alone = np.arange(len(everything)) == part
        proposals += [alone, parts.without_specks(everything & ~alone)]
    return list({choice.tobytes(): choice for choice in proposals}.values())


# A picture of EMNIST's own, as it is

EMNIST_LENGTHS = (21 / 28, 26.5 / 28)  # of the side: of EMNIST's characters, with their traces
EMNIST_OFFSET = 1 / 28  # of the side: they are no farther off the centre
INK_LIMIT = 0.5  # of the area; EMNIST's mean is 0.17. What is more is paper, in a frame
TRACE_LEVEL = 0.1  # of the contrast: of the outermost trace of EMNIST's characters


def as_emnist(grey: np.ndarray, size: int) -> np.ndarray | None:
    """Return a picture of EMNIST's own, be it enlarged or negative, as it was; None for others.

    It is a square of a multiple of `size`, of one level along its border, and holds the character
    as those do.
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
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX)


# EMNIST's form

FINE_LENGTH = 64  # px: the character's length while its strokes are evened
MARGIN = 9  # px: and the room around it
SHARPENING = 0.5  # how much is added of what is finer than BLUR
BLUR = 11  # px, of a box, twice
STROKE_WIDTH = 2.3 / 22  # of the character's length; EMNIST's median
INK_END = 0.3  # of full ink: where the finished character ends
LENGTH = 22 / 28  # of the result's side, of ink above INK_END; EMNIST's median with fainter ink
# is 23.6 / 28


def to_emnist_form(view: View, mask: np.ndarray, size: int) -> np.ndarray | None:
    """Scale, centre, and bring to the width of EMNIST's strokes: (size, size) uint8.

    mask: (H, W) uint8 of the character's ink. None where sharpening or thinning leaves nothing of
    it, as of a speck in a long strip. A stroke's width is twice its area over the length of its
    outline.
    """
    light, paper, contrast, _ = view
    reach = 1 if min(mask.shape) < PHOTO_SIDE else SOFT_EDGE
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
    outline = max(np.hypot(across, down).sum(), 1.0)
    width = 2 * ink.sum() / outline
    ink = move_outline(ink, (STROKE_WIDTH * FINE_LENGTH - width) / 2)
    if ink.max() <= INK_END:
        return None
    box = cv2.boundingRect(np.uint8(ink > INK_END))
    ink = square(ink, box, LENGTH * size, size, 0)
    return cv2.normalize(ink, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)


def move_outline(ink: np.ndarray, change: float) -> np.ndarray:
    """Move the outline of ink out by `change` px, in if below 0; between whole px, mix both."""
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
