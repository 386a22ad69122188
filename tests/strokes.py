"""Draw characters as a human hand might: for tests, benchmarks and figures; nothing is copied.

All is computed from seeds with numpy and Pillow, so that the same call draws the same picture.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# One way to write a character a line, lower case among them: strokes between slashes, each the
# points that the pen passes, x to the right and y down, in hundredths of the character's height.
# The pen runs smoothly through them; a point written twice is a corner, so that two points between
# corners are a straight line.
FORMS = """
0 50,0 26,16 18,52 28,86 50,100 72,86 80,50 72,14 50,0
0 58,2 32,10 16,48 24,88 48,100 74,80 82,40 70,10 46,2
1 30,24 54,0 54,0 52,100
1 28,26 54,0 54,0 52,98 / 26,99 80,98
2 18,24 30,5 54,0 77,14 75,36 50,66 14,98 14,98 86,97
2 18,20 42,0 74,10 76,34 52,68 26,95 14,90 22,80 44,86 62,95 88,92
3 18,14 46,0 75,11 72,34 42,46 42,46 76,58 80,84 48,100 14,86
3 18,3 80,2 80,2 44,42 44,42 76,52 82,80 52,100 14,88
4 32,0 12,60 12,60 92,58 / 66,26 64,100
4 68,100 68,0 68,0 10,68 10,68 94,66
5 26,2 21,44 21,44 52,37 82,58 74,90 42,100 12,88 / 26,3 84,0
5 82,2 28,3 28,3 22,46 22,46 54,40 80,62 70,92 36,99 14,84
6 68,0 36,24 17,64 28,95 60,98 80,76 62,54 36,60 19,78
6 58,0 30,34 18,72 38,100 70,92 76,66 50,54 24,72
7 12,4 86,2 86,2 58,46 42,100
7 14,12 14,3 14,3 86,2 86,2 54,50 40,100 / 34,52 78,47
8 76,13 50,0 25,13 33,35 66,56 79,80 50,100 21,82 33,58 66,37 77,16
8 50,48 26,36 26,12 50,0 74,12 74,36 50,48 / 50,48 20,62 20,88 50,100 80,88 80,62 50,48
9 78,22 52,0 24,18 28,44 56,48 78,24 78,24 74,62 62,100
9 76,16 46,0 20,24 36,48 66,42 78,16 78,16 76,100
A 10,100 48,0 48,0 90,100 / 26,64 77,62
A 80,20 46,6 14,36 18,78 42,94 70,74 80,20 80,20 80,78 98,96
A 10,100 30,34 50,0 68,32 88,100 / 20,62 80,60
B 22,2 20,98 / 16,4 60,1 76,22 60,45 24,47 24,47 72,51 85,75 64,97 16,98
B 26,0 24,98 / 24,64 52,45 82,60 80,88 54,100 25,88
C 84,18 60,0 28,13 12,50 28,88 60,100 86,84
C 78,20 50,2 22,24 14,62 36,98 68,98 88,80
D 22,2 20,98 / 12,3 58,5 86,44 68,86 12,98
D 76,66 50,45 18,62 18,90 44,100 74,82 / 78,0 77,84 94,98
E 80,2 22,4 22,4 20,98 20,98 82,96 / 22,48 70,47
E 16,56 50,54 82,44 70,18 40,14 14,46 22,86 54,98 88,82
F 24,2 20,100 / 18,4 84,1 / 22,48 68,46
F 84,14 64,0 48,20 46,100 / 20,46 78,44
G 84,18 58,0 24,14 12,52 28,90 60,98 84,80 84,54 / 56,56 94,54
G 82,14 50,1 18,30 16,72 44,98 76,88 80,56 80,56 50,57
G 76,16 48,2 20,20 26,46 52,52 76,30 78,8 78,8 80,76 56,100 20,88
H 18,0 18,100 / 82,0 81,100 / 18,50 82,48
H 24,0 20,100 / 21,70 48,44 72,52 76,100
I 50,2 50,98 / 22,3 80,2 / 20,98 80,97
I 52,0 48,100 / 30,2 74,0 / 26,99 72,98
J 66,2 68,70 50,98 22,92 12,72 / 36,3 96,0
J 72,0 72,72 52,100 24,92 14,68
K 20,0 20,100 / 82,2 22,56 / 38,44 86,100
K 24,0 20,100 / 72,34 24,68 24,68 78,100
L 22,0 22,98 22,98 84,96
L 30,0 20,97 20,97 76,98
M 10,100 18,0 18,0 50,64 50,64 82,0 82,0 92,100
M 6,10 10,90 / 10,44 28,12 44,28 48,90 / 48,44 66,12 84,24 90,90
M 8,100 10,0 10,0 50,70 50,70 90,0 90,0 92,100
N 16,100 18,0 18,0 82,98 82,98 84,0
N 20,10 22,98 / 21,50 44,16 70,20 80,50 82,98
O 50,0 16,14 4,50 16,86 50,100 84,86 96,50 84,14 50,0
O 60,3 24,8 5,46 18,90 54,99 88,78 94,36 68,4 42,6
P 24,2 20,100 / 14,6 62,2 82,26 62,54 22,56
P 26,0 22,100 / 26,14 50,0 78,14 74,44 44,56 24,44
Q 50,0 16,14 4,48 16,84 48,96 82,84 94,48 82,14 50,0 / 56,66 98,104
Q 74,14 46,0 18,20 24,46 50,50 74,30 76,6 76,6 72,100 72,100 94,82
R 24,2 20,100 / 14,6 62,2 80,26 60,50 24,52 / 44,52 86,100
R 18,14 32,10 30,98 / 30,50 48,22 66,14 86,26
S 80,14 54,0 24,10 24,34 54,50 80,68 74,92 44,100 14,86
S 76,10 46,2 26,22 42,44 70,60 74,86 44,99 18,90
T 10,3 92,0 / 50,2 49,100
T 48,0 45,78 58,98 84,88 / 18,32 80,28
U 14,0 14,60 28,92 52,100 76,90 86,60 86,0
U 14,4 15,60 34,92 64,84 80,50 82,4 82,4 82,74 98,98
V 10,0 48,100 48,100 90,0
V 6,6 14,4 48,100 48,100 76,20 96,0
W 4,0 27,100 27,100 50,34 50,34 74,100 74,100 97,0
W 6,6 10,62 28,92 46,72 50,20 50,20 56,78 74,94 92,60 94,4
X 12,2 88,98 / 86,0 14,100
X 14,8 30,6 70,94 90,92 / 88,4 12,98
Y 12,0 48,52 / 88,0 48,52 48,52 46,100
Y 14,2 46,56 / 84,0 50,54 22,100
Y 14,0 20,38 44,48 72,36 82,0 82,0 80,70 60,98 26,90
Z 14,4 84,2 84,2 14,97 14,97 88,96
Z 14,6 84,3 84,3 16,96 16,96 88,94 / 28,52 74,47
"""
GLYPHS: dict[str, list[list[str]]] = {}
for line in FORMS.split("\n")[1:-1]:
    GLYPHS.setdefault(line[0], []).append(line[2:].split(" / "))


class Hand(NamedTuple):
    """How somebody writes. Lengths are parts of the character's height."""

    pen: float  # width of the line
    slant: float  # shear to the right
    turn: float  # degrees, clockwise
    aspect: float  # width of the 100 x 100 grid over its height
    wobble: float  # how far points stray, smoothly, so that joints stay joined
    pressure: float  # by how much the line's width varies
    overshoot: float  # how far strokes end beyond, or short of, where they should
    seed: int  # of all that strays


def hand(seed: int, pen: float = 0) -> Hand:
    """Return somebody's hand, another for every seed, with a pen of their own or the one given."""
    rng = np.random.default_rng(seed)
    own, slant, turn = rng.uniform(0.045, 0.11), rng.normal(0.08, 0.10), rng.normal(0, 4)
    lows, highs = (0.7, 0.01, 0.05, 0.0), (1.0, 0.03, 0.25, 0.025)
    return Hand(pen or own, slant, turn, *rng.uniform(lows, highs), seed)


def _spline(points: np.ndarray) -> np.ndarray:
    """Run a Catmull-Rom spline through points (n, 2), closed where the last is the first."""
    if len(points) == 2:
        return np.linspace(points[0], points[1], 24)
    closed = np.array_equal(points[0], points[-1])
    before = points[-2] if closed else 2 * points[0] - points[1]
    after = points[1] if closed else 2 * points[-1] - points[-2]
    p = np.concatenate([before[None], points, after[None]])
    t = np.linspace(0, 1, 16)[:, None]
    pieces = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        square, cube = 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
        pieces.append(0.5 * (2 * b + (c - a) * t + square * t**2 + cube * t**3))
    return np.concatenate(pieces)


def _path(stroke: str) -> np.ndarray:
    """Return the way of the pen (n, 2), in character heights, along one stroke of a glyph."""
    points = np.array([point.split(",") for point in stroke.split()], float) / 100
    corners = [i for i in range(1, len(points)) if np.array_equal(points[i - 1], points[i])]
    return np.concatenate([_spline(run) for run in np.split(points, corners)])


def paths(character: str, writer: Hand, form: int = 0) -> list[np.ndarray]:
    """Return the strokes of a character as (n, 3): x, y and the line's width.

    form: which way to write it, modulo the number of ways in GLYPHS. All in character heights;
    y runs down.
    """
    forms = GLYPHS[character]
    rng = np.random.default_rng([writer.seed, ord(character), form])
    waves = rng.normal(0, 4.0, (6, 2))  # radians a height: most are longer than the character
    phases = rng.uniform(0, 2 * math.pi, (2, 6))
    cos, sin = math.cos(math.radians(writer.turn)), math.sin(math.radians(writer.turn))
    strokes = []
    for stroke in forms[form % len(forms)]:
        points = _path(stroke)
        strayed = np.stack([np.sin(points @ waves.T + phase).sum(1) for phase in phases], 1)
        points += writer.wobble * math.sqrt(2 / 6) * strayed
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
        strokes.append(np.column_stack([points @ [[cos, sin], [-sin, cos]], width]))
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
    strokes = paths(character, writer, form)
    longest = longest or 0.7 * min(size)
    low = np.min([(s[:, :2] - s[:, 2:] / 2).min(0) for s in strokes], axis=0)
    high = np.max([(s[:, :2] + s[:, 2:] / 2).max(0) for s in strokes], axis=0)
    finer = 2 if max(size) > 1000 else 4 if max(size) > 100 else 16
    scale = finer * longest / float((high - low).max())
    centre = finer * np.array(size) * (0.5 + np.array(offset))

    canvas = Image.new("L", (size[0] * finer, size[1] * finer))
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        points, widths = (stroke[:, :2] - (low + high) / 2) * scale + centre, stroke[:, 2] * scale
        for (x, y), radius in zip(points, widths / 2, strict=True):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        for (a, b), line in zip(pairwise(points), widths, strict=False):
            draw.line((*a, *b), fill=255, width=max(round(line), 1))
    return np.asarray(canvas.reduce(finer), np.float32) / 255


def drawn(character: str = "F", side: int = 64, seed: int = 3) -> Image.Image:
    """Draw a character dark on white, with a broad pen and room around it."""
    grey = ink(character, hand(seed, pen=0.12), (side, side))
    return Image.fromarray((255 - 255 * grey).astype(np.uint8))


def emnist_picture(character: str, writer: Hand, form: int = 0) -> np.ndarray:
    """Draw a character as EMNIST holds it, upright: (28, 28) uint8, ink 255 on 0, 24 px long."""
    grey = ink(character, writer, (28, 28), form=form, longest=24)
    blurred = Image.fromarray(np.uint8(255 * grey)).filter(ImageFilter.GaussianBlur(0.4))
    picture = np.asarray(blurred, np.float32)
    return np.uint8(np.round(picture * (255 / picture.max())))


def photograph(ink: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Show ink (height, width) on unevenly lit, grained paper."""
    light = np.linspace(1, random.uniform(0.6, 0.9), ink.shape[1])[:, None]
    picture = light * (225, 220, 205) * (1 - ink[..., None]) + ink[..., None] * (40, 45, 90)
    picture += random.normal(0, 4, (*ink.shape, 1))
    return Image.fromarray(np.uint8(picture.clip(0, 255)))


def write_tiny_emnist(root: Path, per_class: int = 4) -> Path:
    """Write an EMNIST of our own drawing where torchvision.datasets.EMNIST(root) finds it.

    As in the real one the pictures are transposed on disk, digits are labelled 0-9, letters 1-26,
    and the order is shuffled. There are 2 pictures of each character to test on, no two the same.
    Returns root.
    """
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, characters, first in (("digits", ALPHABET[:10], 0), ("letters", ALPHABET[10:], 1)):
        for part, count, start in (("train", per_class, 0), ("test", 2, 5000)):
            pairs = [(c, i) for c in characters for i in range(count)]
            pairs = [pairs[i] for i in rng.permutation(len(pairs))]
            images = np.stack([emnist_picture(c, hand(start + i), form=i).T for c, i in pairs])
            labels = np.array([characters.index(c) + first for c, _ in pairs], np.uint8)
            for name, values in (("images-idx3", images), ("labels-idx1", labels)):
                # IDX (LeCun): a magic number, that of dimensions, their sizes, the bytes
                head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
                path = raw / f"emnist-{split}-{part}-{name}-ubyte"
                path.write_bytes(head + values.tobytes())
    return root
