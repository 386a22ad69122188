"""Draw what ../shared/scenes/draw.py lacks, for fitting the weights of readings.

    python3 -m images_for_readme.scenes more_scenes   # more_scenes/KIND/CHARACTER_NUMBER.png

Kinds named empty_... hold no character. All is drawn with tests/strokes.py, from seeds.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from tests import strokes

PAPER = 243.0  # grey level
INK = 45.0
EMPTY = 36  # pictures of each empty kind


class Drawer:
    """Random numbers, and hands of which each writes one character."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.hands = seed * 10**6

    def cover(self, character: str, width: int, height: int, longest: float) -> np.ndarray:
        """Return how far ink covers the pixels, (height, width), with a hand of its own."""
        self.hands += 1
        hand = strokes.hand(self.hands, self.random.uniform(0.05, 0.14))
        return strokes.ink(character, hand, (width, height), form=self.hands, longest=longest)

    def thickness(self, side: int) -> int:
        return max(1, round(side * self.random.uniform(0.01, 0.11)))


def on_paper(cover: np.ndarray, ink: float = INK) -> np.ndarray:
    return PAPER + (ink - PAPER) * cover


def shifted(cover: np.ndarray, right: int, down: int) -> np.ndarray:
    """Move ink; what leaves the picture is gone."""
    move = np.float32([[1, 0, right], [0, 1, down]])
    return cv2.warpAffine(cover, move, cover.shape[::-1])


def draw_sides(grey: np.ndarray, sides: str, thick: int, inset: int = 0) -> np.ndarray:
    """Draw sides of a box, of t, b, l, r, `inset` px from the border."""
    grey = grey.copy()
    near = slice(inset, inset + thick)
    rows, columns = grey.shape
    if "t" in sides:
        grey[near] = INK
    if "b" in sides:
        grey[rows - inset - thick : rows - inset] = INK
    if "l" in sides:
        grey[:, near] = INK
    if "r" in sides:
        grey[:, columns - inset - thick : columns - inset] = INK
    return grey


def empty_corner(drawer: Drawer, character: str) -> np.ndarray:
    """Two or three sides of a box, as a cell cut by a grid that is off shows them."""
    height = int(drawer.random.integers(20, 110))
    width = round(height * drawer.random.uniform(0.6, 1.5))
    sides = str(drawer.random.choice(["tl", "tr", "bl", "br", "tlr", "tlb"]))
    thick = drawer.thickness(min(height, width))
    inset = int(drawer.random.integers(0, 1 + height // 12))
    return draw_sides(np.full((height, width), PAPER), sides, thick, inset)


def empty_comb(drawer: Drawer, character: str) -> np.ndarray:
    """A base line with the separators of a comb."""
    side = int(drawer.random.integers(40, 110))
    thick = drawer.thickness(side) // 2 + 1
    grey = draw_sides(np.full((side, side), PAPER), "b", thick)
    low = round(side * drawer.random.uniform(0.5, 0.85))
    grey[low:] = np.minimum(grey[low:], draw_sides(grey, "lr", thick)[low:])
    return grey


def empty_specks(drawer: Drawer, character: str) -> np.ndarray:
    """Paper with a few specks."""
    side = int(drawer.random.integers(20, 110))
    grey = np.full((side, side), PAPER)
    for x, y in drawer.random.integers(0, side, (drawer.random.integers(1, 4), 2)):
        size = max(1, side // 40)
        grey[y : y + size, x : x + size] = INK
    return grey


def corner(drawer: Drawer, character: str) -> np.ndarray:
    """A character, off the centre, in the same two or three sides of a box."""
    grey = empty_corner(drawer, character)
    height, width = grey.shape
    longest = drawer.random.uniform(0.45, 0.75) * min(height, width)
    right, down = (drawer.random.uniform(-0.1, 0.1, 2) * (width, height)).round()
    cover = shifted(drawer.cover(character, width, height, longest), right, down)
    return np.minimum(grey, on_paper(cover))


def clutter(drawer: Drawer, character: str) -> np.ndarray:
    """A character with crumbs, holes or a page number lying free beside it."""
    side = int(drawer.random.integers(60, 160))
    grey = on_paper(drawer.cover(character, side, side, 0.5 * side))
    kind = drawer.random.choice(["crumbs", "holes", "number"])
    places = drawer.random.permutation([(0.1, 0.12), (0.9, 0.12), (0.1, 0.9), (0.88, 0.9)])
    for x, y in places[: drawer.random.integers(1, 4)] * side:
        if kind == "number":
            small = drawer.cover(str(drawer.random.integers(10)), side, side, 0.12 * side)
            small = shifted(small, round(x - side / 2), round(y - side / 2))
            grey = np.minimum(grey, on_paper(small))
        else:
            size = side * (0.07 if kind == "holes" else drawer.random.uniform(0.02, 0.05))
            cv2.circle(grey, (round(x), round(y)), max(1, round(size)), INK, -1, cv2.LINE_AA)
    return grey


def between_lines(drawer: Drawer, character: str) -> np.ndarray:
    """A character, often a narrow digit, between the sides of a narrow box."""
    height = int(drawer.random.integers(30, 110))
    width = round(height * drawer.random.uniform(0.5, 0.9))
    grey = on_paper(drawer.cover(character, width, height, 0.62 * min(width * 1.4, height)))
    sides = str(drawer.random.choice(["lr", "lrb", "tblr"]))
    return draw_sides(grey, sides, drawer.thickness(width) // 2 + 1)


def cut_at_border(drawer: Drawer, character: str) -> np.ndarray:
    """A character that touches one or two borders, as a tight crop has it."""
    side = int(drawer.random.integers(40, 120))
    cover = drawer.cover(character, side, side, 0.7 * side)
    rows = np.flatnonzero((cover > 0.4).any(1))
    columns = np.flatnonzero((cover > 0.4).any(0))
    top, bottom, left, right = drawer.random.integers(0, side // 6, 4)
    for _ in range(drawer.random.integers(1, 3)):
        match drawer.random.integers(4):
            case 0:
                top = rows[0]
            case 1:
                bottom = side - 1 - rows[-1]
            case 2:
                left = columns[0]
            case 3:
                right = side - 1 - columns[-1]
    return on_paper(cover[top : side - bottom, left : side - right])


def tight(drawer: Drawer, character: str) -> np.ndarray:
    """A character that fills its 16x16 px, or as many, in two levels or in more."""
    cover = drawer.cover(character, 120, 120, 96)
    rows = np.flatnonzero((cover > 0.4).any(1))
    columns = np.flatnonzero((cover > 0.4).any(0))
    crop = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if crop.shape[1] < crop.shape[0] / 2:  # a 1 stays narrow
        crop = cv2.copyMakeBorder(crop, 0, 0, 24, 24, cv2.BORDER_CONSTANT)
    side = int(drawer.random.choice([12, 16, 16, 20, 32]))
    small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
    if drawer.random.random() < 0.6:
        small = np.float32(small > 0.4)
    return 255 * small if drawer.random.random() < 0.5 else on_paper(small)


def bar(drawer: Drawer, character: str) -> np.ndarray:
    """Faint ink beside a black bar at the rim."""
    side = int(drawer.random.integers(48, 110))
    cover = drawer.cover(character, side, side, 0.55 * side)
    grey = on_paper(cover, drawer.random.uniform(120, 185))
    thick = round(side * drawer.random.uniform(0.04, 0.16))
    grey = draw_sides(grey, str(drawer.random.choice(list("tblr"))), thick)
    return grey


def two_level(drawer: Drawer, character: str) -> np.ndarray:
    """28x28 px of two levels, the character as long and as central as EMNIST's."""
    drawer.hands += 1
    hand = strokes.hand(drawer.hands, drawer.random.uniform(1, 6) / 24)
    cover = strokes.ink(character, hand, (28, 28), form=drawer.hands, longest=24)
    return 255 * np.float64(cover > 0.5)


EMPTY_KINDS = (empty_corner, empty_comb, empty_specks)
KINDS = (corner, clutter, between_lines, cut_at_border, tight, bar, two_level)


def draw(top: Path, seed: int = 1, rounds: int = 3) -> None:
    """Draw every kind into its folder: each character `rounds` times, or EMPTY pictures."""
    drawer = Drawer(seed)
    for kind in (*EMPTY_KINDS, *KINDS):
        folder = top / kind.__name__
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{character}_{n}" for character in strokes.ALPHABET for n in range(rounds)]
        for name in names[:EMPTY] if kind in EMPTY_KINDS else names:
            grey = kind(drawer, name[0])
            if kind not in (two_level, tight):
                grey = grey + drawer.random.normal(0, 2, grey.shape)
            cv2.imwrite(str(folder / f"{name}.png"), np.uint8(grey.clip(0, 255)))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
