"""Draw characters as a human hand might: for tests, benchmarks and figures; nothing is copied.

    python3 tests/strokes.py tests/samples     # redraws the sample pictures

The name of a sample begins with its character: `A_photo.jpg` shows an A. All is computed from
seeds with numpy and Pillow, so that the same call draws the same picture.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EMNIST_SIDE, EMNIST_LONGEST = 28, 24  # px: the picture, and the character in it
GRID = 100  # the glyphs below are written in hundredths of the character's height

# A glyph is a list of strokes, one a line, each the points that the pen passes, x to the right and
# y down. The pen runs smoothly through them; a point written twice is a corner, so that two points
# between corners are a straight line. Forms after the first are other ways to write the character,
# lower case among them.
GLYPHS: dict[str, list[list[str]]] = {
    "0": [
        ["50,0 26,16 18,52 28,86 50,100 72,86 80,50 72,14 50,0"],
        ["58,2 32,10 16,48 24,88 48,100 74,80 82,40 70,10 46,2"],
    ],
    "1": [
        ["30,24 54,0 54,0 52,100"],
        ["28,26 54,0 54,0 52,98", "26,99 80,98"],
    ],
    "2": [
        ["18,24 30,5 54,0 77,14 75,36 50,66 14,98 14,98 86,97"],
        ["18,20 42,0 74,10 76,34 52,68 26,95 14,90 22,80 44,86 62,95 88,92"],
    ],
    "3": [
        ["18,14 46,0 75,11 72,34 42,46 42,46 76,58 80,84 48,100 14,86"],
        ["18,3 80,2 80,2 44,42 44,42 76,52 82,80 52,100 14,88"],
    ],
    "4": [
        ["32,0 12,60 12,60 92,58", "66,26 64,100"],
        ["68,100 68,0 68,0 10,68 10,68 94,66"],
    ],
    "5": [
        ["26,2 21,44 21,44 52,37 82,58 74,90 42,100 12,88", "26,3 84,0"],
        ["82,2 28,3 28,3 22,46 22,46 54,40 80,62 70,92 36,99 14,84"],
    ],
    "6": [
        ["68,0 36,24 17,64 28,95 60,98 80,76 62,54 36,60 19,78"],
        ["58,0 30,34 18,72 38,100 70,92 76,66 50,54 24,72"],
    ],
    "7": [
        ["12,4 86,2 86,2 58,46 42,100"],
        ["14,12 14,3 14,3 86,2 86,2 54,50 40,100", "34,52 78,47"],
    ],
    "8": [
        ["76,13 50,0 25,13 33,35 66,56 79,80 50,100 21,82 33,58 66,37 77,16"],
        [
            "50,48 26,36 26,12 50,0 74,12 74,36 50,48",
            "50,48 20,62 20,88 50,100 80,88 80,62 50,48",
        ],
    ],
    "9": [
        ["78,22 52,0 24,18 28,44 56,48 78,24 78,24 74,62 62,100"],
        ["76,16 46,0 20,24 36,48 66,42 78,16 78,16 76,100"],
    ],
    "A": [
        ["10,100 48,0 48,0 90,100", "26,64 77,62"],
        ["80,20 46,6 14,36 18,78 42,94 70,74 80,20 80,20 80,78 98,96"],
        ["10,100 30,34 50,0 68,32 88,100", "20,62 80,60"],
    ],
    "B": [
        ["22,2 20,98", "16,4 60,1 76,22 60,45 24,47 24,47 72,51 85,75 64,97 16,98"],
        ["26,0 24,98", "24,64 52,45 82,60 80,88 54,100 25,88"],
    ],
    "C": [
        ["84,18 60,0 28,13 12,50 28,88 60,100 86,84"],
        ["78,20 50,2 22,24 14,62 36,98 68,98 88,80"],
    ],
    "D": [
        ["22,2 20,98", "12,3 58,5 86,44 68,86 12,98"],
        ["76,66 50,45 18,62 18,90 44,100 74,82", "78,0 77,84 94,98"],
    ],
    "E": [
        ["80,2 22,4 22,4 20,98 20,98 82,96", "22,48 70,47"],
        ["16,56 50,54 82,44 70,18 40,14 14,46 22,86 54,98 88,82"],
    ],
    "F": [
        ["24,2 20,100", "18,4 84,1", "22,48 68,46"],
        ["84,14 64,0 48,20 46,100", "20,46 78,44"],
    ],
    "G": [
        ["84,18 58,0 24,14 12,52 28,90 60,98 84,80 84,54", "56,56 94,54"],
        ["82,14 50,1 18,30 16,72 44,98 76,88 80,56 80,56 50,57"],
        ["76,16 48,2 20,20 26,46 52,52 76,30 78,8 78,8 80,76 56,100 20,88"],
    ],
    "H": [
        ["18,0 18,100", "82,0 81,100", "18,50 82,48"],
        ["24,0 20,100", "21,70 48,44 72,52 76,100"],
    ],
    "I": [
        ["50,2 50,98", "22,3 80,2", "20,98 80,97"],
        ["52,0 48,100", "30,2 74,0", "26,99 72,98"],
    ],
    "J": [
        ["66,2 68,70 50,98 22,92 12,72", "36,3 96,0"],
        ["72,0 72,72 52,100 24,92 14,68"],
    ],
    "K": [
        ["20,0 20,100", "82,2 22,56", "38,44 86,100"],
        ["24,0 20,100", "72,34 24,68 24,68 78,100"],
    ],
    "L": [
        ["22,0 22,98 22,98 84,96"],
        ["30,0 20,97 20,97 76,98"],
    ],
    "M": [
        ["10,100 18,0 18,0 50,64 50,64 82,0 82,0 92,100"],
        ["6,10 10,90", "10,44 28,12 44,28 48,90", "48,44 66,12 84,24 90,90"],
        ["8,100 10,0 10,0 50,70 50,70 90,0 90,0 92,100"],
    ],
    "N": [
        ["16,100 18,0 18,0 82,98 82,98 84,0"],
        ["20,10 22,98", "21,50 44,16 70,20 80,50 82,98"],
    ],
    "O": [
        ["50,0 16,14 4,50 16,86 50,100 84,86 96,50 84,14 50,0"],
        ["60,3 24,8 5,46 18,90 54,99 88,78 94,36 68,4 42,6"],
    ],
    "P": [
        ["24,2 20,100", "14,6 62,2 82,26 62,54 22,56"],
        ["26,0 22,100", "26,14 50,0 78,14 74,44 44,56 24,44"],
    ],
    "Q": [
        ["50,0 16,14 4,48 16,84 48,96 82,84 94,48 82,14 50,0", "56,66 98,104"],
        ["74,14 46,0 18,20 24,46 50,50 74,30 76,6 76,6 72,100 72,100 94,82"],
    ],
    "R": [
        ["24,2 20,100", "14,6 62,2 80,26 60,50 24,52", "44,52 86,100"],
        ["18,14 32,10 30,98", "30,50 48,22 66,14 86,26"],
    ],
    "S": [
        ["80,14 54,0 24,10 24,34 54,50 80,68 74,92 44,100 14,86"],
        ["76,10 46,2 26,22 42,44 70,60 74,86 44,99 18,90"],
    ],
    "T": [
        ["10,3 92,0", "50,2 49,100"],
        ["48,0 45,78 58,98 84,88", "18,32 80,28"],
    ],
    "U": [
        ["14,0 14,60 28,92 52,100 76,90 86,60 86,0"],
        ["14,4 15,60 34,92 64,84 80,50 82,4 82,4 82,74 98,98"],
    ],
    "V": [
        ["10,0 48,100 48,100 90,0"],
        ["6,6 14,4 48,100 48,100 76,20 96,0"],
    ],
    "W": [
        ["4,0 27,100 27,100 50,34 50,34 74,100 74,100 97,0"],
        ["6,6 10,62 28,92 46,72 50,20 50,20 56,78 74,94 92,60 94,4"],
    ],
    "X": [
        ["12,2 88,98", "86,0 14,100"],
        ["14,8 30,6 70,94 90,92", "88,4 12,98"],
    ],
    "Y": [
        ["12,0 48,52", "88,0 48,52 48,52 46,100"],
        ["14,2 46,56", "84,0 50,54 22,100"],
        ["14,0 20,38 44,48 72,36 82,0 82,0 80,70 60,98 26,90"],
    ],
    "Z": [
        ["14,4 84,2 84,2 14,97 14,97 88,96"],
        ["14,6 84,3 84,3 16,96 16,96 88,94", "28,52 74,47"],
    ],
}


@dataclass(frozen=True)
class Hand:
    """How somebody writes. Lengths are parts of the character's height."""

    pen: float = 0.07  # width of the line
    slant: float = 0.0  # shear to the right
    turn: float = 0.0  # degrees, clockwise
    aspect: float = 0.85  # width of the 100 x 100 grid over its height
    wobble: float = 0.02  # how far points stray, smoothly, so that joints stay joined
    pressure: float = 0.15  # by how much the line's width varies
    overshoot: float = 0.015  # how far strokes end beyond, or short of, where they should
    seed: int = 0  # of all that strays


def hand(seed: int) -> Hand:
    """Return somebody's hand: another for every seed."""
    rng = np.random.default_rng(seed)
    return Hand(
        pen=float(rng.uniform(0.045, 0.11)),
        slant=float(rng.normal(0.08, 0.10)),
        turn=float(rng.normal(0, 4)),
        aspect=float(rng.uniform(0.7, 1.0)),
        wobble=float(rng.uniform(0.01, 0.03)),
        pressure=float(rng.uniform(0.05, 0.25)),
        overshoot=float(rng.uniform(0.0, 0.025)),
        seed=seed,
    )


def _spline(points: np.ndarray) -> np.ndarray:
    """Run a Catmull-Rom spline through points (n, 2), closed where the last is the first."""
    if len(points) == 2:
        return np.linspace(points[0], points[1], 24)
    closed = np.array_equal(points[0], points[-1])
    before = points[-2] if closed else 2 * points[0] - points[1]
    after = points[1] if closed else 2 * points[-1] - points[-2]
    p = np.concatenate([before[None], points, after[None]])
    t = np.linspace(0, 1, 16)[:, None]
    pieces = [
        0.5
        * (
            2 * b
            + (c - a) * t
            + (2 * a - 5 * b + 4 * c - d) * t**2
            + (3 * b - a - 3 * c + d) * t**3
        )
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate(pieces)


def _path(stroke: str) -> np.ndarray:
    """Return the way of the pen (n, 2), in character heights, along one stroke of a glyph."""
    points = np.array([[float(v) for v in point.split(",")] for point in stroke.split()]) / GRID
    corners = [i for i in range(1, len(points)) if np.array_equal(points[i - 1], points[i])]
    return np.concatenate([_spline(run) for run in np.split(points, corners)])


def _stray(rng: np.random.Generator, amount: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a smooth random displacement of the plane, of standard deviation `amount`."""
    waves = rng.normal(0, 4.0, (6, 2))  # radians a height: most are longer than the character
    phases = rng.uniform(0, 2 * math.pi, (2, 6))
    scale = amount * math.sqrt(2 / 6)

    def displace(points: np.ndarray) -> np.ndarray:
        return points + scale * np.stack([np.sin(points @ waves.T + p).sum(1) for p in phases], 1)

    return displace


def paths(character: str, writer: Hand, form: int = 0) -> list[np.ndarray]:
    """Return the strokes of a character as (n, 3): x, y and the line's width.

    form: which way to write it, modulo the number of ways in GLYPHS. All in character heights;
    y runs down.
    """
    forms = GLYPHS[character]
    rng = np.random.default_rng([writer.seed, ord(character), form])
    displace = _stray(rng, writer.wobble)
    angle = math.radians(writer.turn)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    strokes = []
    for stroke in forms[form % len(forms)]:
        points = displace(_path(stroke))
        for end, inner in ((0, 3), (-1, -4)):
            direction = points[end] - points[inner]
            length = max(float(np.hypot(*direction)), 1e-6)
            points[end] += direction / length * rng.normal(0, writer.overshoot)
        points = (points - 0.5) * [writer.aspect, 1.0]
        points[:, 0] -= writer.slant * points[:, 1]
        position = np.linspace(0, 1, len(points))
        swell = np.sin(rng.uniform(3, 8) * position + rng.uniform(0, 6)) * writer.pressure
        ends = 1 - writer.pressure * (np.exp(-position * 12) + np.exp((position - 1) * 8))
        width = writer.pen * (1 + swell) * ends
        strokes.append(np.column_stack([points @ rotation, width]))
    return strokes


def ink(
    character: str,
    writer: Hand,
    size: tuple[int, int],
    *,
    form: int = 0,
    longest: float | None = None,
    offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Draw a character: (height, width) float32, 0 paper, 1 ink, edges between.

    size: (width, height), px. longest: longest side of the character, line included, px; by default
    7 tenths of the shorter side. offset: of its centre from the picture's, as a part of the size.
    """
    width, height = size
    strokes = paths(character, writer, form)
    longest = longest or 0.7 * min(size)
    reach = [(s[:, :2] - s[:, 2:] / 2, s[:, :2] + s[:, 2:] / 2) for s in strokes]
    low = np.min([lows.min(0) for lows, _ in reach], axis=0)
    high = np.max([highs.max(0) for _, highs in reach], axis=0)
    finer = 2 if max(size) > 1000 else 4 if max(size) > 100 else 16
    scale = finer * longest / float((high - low).max())
    centre = finer * np.array(size) * (0.5 + np.array(offset))

    canvas = Image.new("L", (width * finer, height * finer))
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        points = (stroke[:, :2] - (low + high) / 2) * scale + centre
        widths = stroke[:, 2] * scale
        for (x, y), radius in zip(points, widths / 2, strict=True):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        for (a, b), line in zip(pairwise(points), widths, strict=False):
            draw.line((*a, *b), fill=255, width=max(round(line), 1))
    return np.asarray(canvas.reduce(finer), np.float32) / 255


def emnist_picture(character: str, writer: Hand, form: int = 0) -> np.ndarray:
    """Draw a character as EMNIST holds it, upright: (28, 28) uint8, ink 255 on 0, 24 px long."""
    side = (EMNIST_SIDE, EMNIST_SIDE)
    grey = ink(character, writer, side, form=form, longest=EMNIST_LONGEST)
    blurred = Image.fromarray(np.uint8(255 * grey)).filter(ImageFilter.GaussianBlur(0.4))
    picture = np.asarray(blurred, np.float32)
    return np.uint8(np.round(picture * (255 / picture.max())))


def photograph(ink: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Show ink (height, width) on unevenly lit, grained paper."""
    light = np.linspace(1, random.uniform(0.6, 0.9), ink.shape[1])[:, None]
    picture = light * (225, 220, 205) * (1 - ink[..., None]) + ink[..., None] * (40, 45, 90)
    picture += random.normal(0, 4, (*ink.shape, 1))
    return Image.fromarray(np.uint8(picture.clip(0, 255)))


def _idx(values: np.ndarray) -> bytes:
    """Return an array of bytes in the IDX format (LeCun): magic, dimensions, values."""
    header = bytes([0, 0, 8, values.ndim])
    header += b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_tiny_emnist(
    root: Path, per_class: int = 4, test_per_class: int = 2, seed: int = 0
) -> Path:
    """Write an EMNIST of our own drawing where torchvision.datasets.EMNIST(root) finds it.

    As in the real one the pictures are transposed on disk, digits are labelled 0-9, letters 1-26,
    and the order is shuffled. No two pictures are the same. Returns root.
    """
    raw = Path(root) / "EMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, characters, first in (("digits", ALPHABET[:10], 0), ("letters", ALPHABET[10:], 1)):
        for part, count in (("train", per_class), ("test", test_per_class)):
            pairs = [(c, i) for c in characters for i in range(count)]
            pairs = [pairs[i] for i in rng.permutation(len(pairs))]
            start = 10_000 * seed + (0 if part == "train" else 5_000)
            images = [emnist_picture(c, hand(start + i), form=i).T for c, i in pairs]
            labels = [characters.index(c) + first for c, _ in pairs]
            name = f"emnist-{split}-{part}"
            (raw / f"{name}-images-idx3-ubyte").write_bytes(_idx(np.stack(images)))
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(_idx(np.array(labels)))
    return Path(root)


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Return (height, width) float32 in about [-1, 1], varying over 1 / cells of the picture."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def _light(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return (height, width) in [0, 1]: how the light falls off to one side and comes back."""
    width, height = size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    wave = np.sin(1.3 * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    return (0.5 + 0.5 * wave) * (1 - 0.25 * (x * x + y * y))


def colour(
    coverage: np.ndarray,
    pen: tuple[int, int, int] = (0, 0, 0),
    paper: tuple[int, int, int] = (255, 255, 255),
    *,
    shading: float = 0.0,
    grain: float = 0.0,
    blur: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Lay ink (height, width) on paper: (height, width, 3) uint8.

    shading: how unevenly it is lit. grain: of the paper and the camera. Both as parts of white.
    blur: Gaussian, px.
    """
    rng = np.random.default_rng(seed)
    height, width = coverage.shape
    if grain:  # a dry line lets the paper through
        coverage = coverage * (1 - 2 * grain * np.abs(_smooth_noise(rng, (width, height), 40)))
    picture = coverage[..., None] * pen + (1 - coverage[..., None]) * np.array(paper, np.float32)
    if blur:
        picture = Image.fromarray(np.uint8(picture)).filter(ImageFilter.GaussianBlur(blur))
        picture = np.asarray(picture, np.float32)
    picture = picture * (1 - shading * (1 - _light(rng, (width, height))[..., None]))
    picture += (
        255 * grain * _smooth_noise(rng, (width, height), max(width, height) // 3 + 2)[..., None]
    )
    return np.uint8(np.clip(np.round(picture), 0, 255))


@dataclass(frozen=True)
class Sample:
    """One sample picture: what is written, how, on what, and as which file."""

    name: str  # begins with the character
    writer: int  # seed of the hand
    size: tuple[int, int]
    form: int = 0
    fill: float = 0.7  # longest side of the character over the shorter side of the picture
    offset: tuple[float, float] = (0.0, 0.0)
    pen: tuple[int, int, int] = (25, 25, 30)
    paper: tuple[int, int, int] = (255, 255, 255)
    shading: float = 0.0
    grain: float = 0.0
    blur: float = 0.0
    mode: str = "RGB"  # of the file
    width: float = 0.0  # of the line, where it is not the hand's own


BLUE, RED, PENCIL, WHITE = (28, 50, 140), (170, 30, 40), (105, 105, 110), (255, 255, 255)
BLACKBOARD, CREAM, KRAFT, NIGHT = (38, 66, 56), (247, 240, 222), (196, 160, 116), (18, 22, 40)
SAMPLES = [
    Sample("0_scan.png", 11, (64, 80), mode="L"),
    Sample("1_pencil.jpg", 12, (240, 320), 0, pen=PENCIL, paper=CREAM, shading=0.15, grain=0.02),
    Sample("2_tiny.png", 13, (12, 12), mode="L", fill=0.9, width=0.11),
    Sample("2_form.tif", 27, (90, 90), 1, pen=BLUE, offset=(0.1, -0.08)),
    Sample("3_chalk.png", 14, (200, 200), pen=(235, 235, 225), paper=BLACKBOARD, grain=0.05),
    Sample("4_marker.webp", 35, (400, 300), pen=RED, width=0.13, offset=(-0.2, 0.0)),
    Sample("5_fax.png", 16, (100, 100), mode="1"),
    Sample("6_canvas.gif", 17, (60, 60), pen=WHITE, paper=(0, 0, 0), mode="P"),
    Sample("7_receipt.bmp", 18, (48, 72), 1, mode="L"),
    Sample("8_photo.jpg", 19, (800, 600), 0, 0.4, (0.15, 0.1), BLUE, CREAM, 0.35, 0.03, 1.5),
    Sample("9_emnist.png", 20, (28, 28), pen=WHITE, paper=(0, 0, 0), mode="L", fill=0.86),
    Sample("A_photo.jpg", 21, (640, 480), 0, 0.6, (0, 0), (35, 35, 60), CREAM, 0.45, 0.03, 1.2),
    Sample("A_scan.png", 22, (120, 110), 1, mode="L"),
    Sample("B_deep.png", 23, (160, 160), mode="I;16"),
    Sample("C_glass.png", 24, (180, 220), pen=(20, 90, 70), mode="RGBA"),
    Sample("D_poster.jpg", 25, (2000, 1600), 0, 0.8, pen=RED, paper=KRAFT, shading=0.3, width=0.1),
    Sample("D_note.gif", 26, (80, 80), 1, pen=BLUE, paper=(255, 246, 150), mode="P"),
    Sample("E_print.jpg", 28, (150, 150), mode="CMYK"),
    Sample("E_script.png", 29, (100, 100), 1, pen=BLUE),
    Sample("F_thin.png", 30, (300, 300), mode="L", width=0.012),
    Sample("G_shade.jpg", 31, (360, 480), 0, 0.6, (0, 0.1), PENCIL, WHITE, 0.4, 0.02),
    Sample("H_sideways.jpg", 32, (300, 200), pen=BLUE, paper=CREAM, grain=0.02),
    Sample("H_small.png", 33, (24, 20), 1, 0.9, mode="L", width=0.1),
    Sample("I_serif.png", 34, (70, 110), mode="L"),
    Sample("J_ink.webp", 35, (256, 256), pen=(60, 20, 90), paper=CREAM),
    Sample("K_KRAFT.JPG", 36, (500, 500), pen=(40, 28, 20), paper=KRAFT, shading=0.25, grain=0.04),
    Sample("L_night.png", 37, (128, 128), pen=(250, 220, 90), paper=NIGHT),
    Sample("M_sticker.gif", 38, (140, 120), pen=RED, mode="P transparent"),
    Sample("N_float.tif", 39, (64, 64), mode="F"),
    Sample("N_script.png", 40, (200, 160), 1, pen=(0, 90, 60)),
    Sample("O_round.bmp", 41, (90, 90), pen=BLUE),
    Sample("P_strip.png", 42, (600, 90), 0, 0.85, (-0.35, 0), mode="L"),
    Sample("Q_card.jpg", 43, (220, 300), 0, 0.75, pen=(20, 20, 20), paper=CREAM, shading=0.35),
    Sample("R_pixels.ppm", 44, (32, 32), 0, 0.8, width=0.1),
    Sample("S_wall.jpg", 45, (480, 640), 0, 0.8, (0, 0), WHITE, (150, 70, 60), 0.3, 0.05, 1.0),
    Sample("T_dark.png", 46, (110, 110), pen=(120, 200, 255), paper=NIGHT, mode="P"),
    Sample("T_script.png", 47, (90, 130), 1, mode="L"),
    Sample("U_grey.png", 48, (72, 72), pen=(120, 120, 120), paper=(190, 190, 190), mode="LA"),
    Sample("V_tick.png", 49, (2000, 1000), 0, 0.6, (0.2, 0), mode="P", width=0.05),
    Sample("W_fat.png", 50, (150, 130), 0, 0.85, width=0.15, mode="L"),
    Sample("X_ballot.png", 51, (40, 40), 0, 0.75, pen=BLUE),
    Sample("Y_script.jpg", 52, (130, 180), 2, pen=BLUE, paper=CREAM, grain=0.02),
    Sample("Z_bar.png", 53, (100, 100), 1, mode="L"),
]
SIDEWAYS = 6  # EXIF orientation: the picture is to be turned by 90 degrees clockwise to be upright
ORIENTATION = 0x0112  # EXIF tag


def sample_picture(sample: Sample) -> Image.Image:
    """Draw a sample, in the mode that its file will have."""
    writer = hand(sample.writer)
    if sample.width:
        writer = replace(writer, pen=sample.width)
    longest = sample.fill * min(sample.size)
    options = {"form": sample.form, "longest": longest, "offset": sample.offset}
    coverage = ink(sample.name[0], writer, sample.size, **options)
    look = {"shading": sample.shading, "grain": sample.grain, "blur": sample.blur}
    picture = Image.fromarray(
        colour(coverage, sample.pen, sample.paper, **look, seed=sample.writer)
    )
    if sample.mode == "RGBA":  # all the ink, and nothing but ink, is opaque
        picture = Image.new("RGB", sample.size, sample.pen)
        picture.putalpha(Image.fromarray(np.uint8(255 * coverage)))
    elif sample.mode == "P transparent":
        picture = picture.quantize(8)
        picture.info["transparency"] = picture.getpixel((0, 0))
    elif sample.mode == "1":
        picture = picture.convert("1", dither=Image.Dither.NONE)
    elif sample.mode == "P":
        picture = picture.quantize(8)
    elif sample.mode == "I;16":
        picture = Image.fromarray(np.uint16(65535 * (1 - coverage)))
    elif sample.mode == "F":
        picture = Image.fromarray(1 - coverage)
    else:
        picture = picture.convert(sample.mode)
    return picture


def write_samples(folder: Path) -> None:
    """Draw every sample picture into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        picture, options = sample_picture(sample), {}
        if "sideways" in sample.name:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = SIDEWAYS
        if sample.name.lower().endswith(".jpg"):
            options["quality"] = 70
        if sample.name.endswith(".png"):
            options["optimize"] = True
        if "transparency" in picture.info:
            options["transparency"] = picture.info["transparency"]
        picture.save(folder / sample.name, **options)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER, to draw the sample pictures into")
    write_samples(Path(sys.argv[1]))
