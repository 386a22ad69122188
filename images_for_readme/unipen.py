"""Draw UNIPEN's characters, pen strokes of 318 writers, as labelled pictures for train.py --extra.

    python3 images_for_readme/unipen.py train_r01_v07 unipen_pictures
    python3 train.py --extra unipen_pictures/pictures.csv

The first folder is the distribution, unpacked (doi 10.5281/zenodo.1195803, CC BY 4.0); the second
gets a folder per class: unipen_pictures/A/val_val01_A_123.png, and says in pictures.csv who wrote
each. The format is described by Guyon et al. 1994, doi 10.1109/ICPR.1994.576870. Neither its files
nor the pictures are committed.
"""

import csv
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

CREDIT = (
    "UNIPEN data set of on-line handwriting, train_r01_v07, The International Unipen Foundation, "
    "CC BY 4.0, doi 10.5281/zenodo.1195803"
)
WRITER_LIMIT = 400  # characters of one writer; two writers have 8,876
ASPECT_LIMITS = (1 / 5, 4)  # width over height of a character; those of NARROW_CLASSES are slimmer
NARROW_CLASSES = "1IJLijlft"
FRAGMENTED_PROVIDER = "ibm"  # where strokes of a character are sometimes labelled one by one
FRAGMENT_GAP = 2  # components from one of them to the next

CHARACTER_LENGTH = 60  # px, longer side of a drawn character without the pen's width
MARGIN = 14  # px of paper around it
PEN_WIDTHS = (0.05, 0.12)  # of the character's length, drawn from a log-uniform distribution
POINT_DISTANCE = 1.5  # px, between the points of a smoothed stroke
SMOOTHING_PASSES = 3  # of the kernel (1, 2, 1) / 4: some of the tablets had 72 dpi
SUBPIXEL_BITS = 4  # of the coordinates that OpenCV draws at


class Component(NamedTuple):
    """What the pen wrote, or passed over, between two changes of its state."""

    is_down: bool
    writer: str
    numbers: list[str]  # x, y and more of each point


class Character(NamedTuple):
    """A labelled character: strokes, each (points, 2) float, x to the right and y downwards."""

    label: str
    writer: str
    strokes: list[np.ndarray]


def read_lines(path: Path, includes: dict[str, Path]) -> Iterator[str]:
    """Yield the lines of a file and of those it includes, whose names may differ in case."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(".INCLUDE"):
            yield from read_lines(includes[line.split()[1].lower()], includes)
        else:
            yield line


def read_characters(path: Path, provider: str, includes: dict[str, Path]) -> Iterator[Character]:
    """Yield the characters of a file of the distribution's data/."""
    writer = path.stem
    columns = 2  # of a point; the first two are x and y
    resolution = {"X": 1.0, "Y": 1.0}  # points per inch or mm; one provider's differ
    components = []
    segments = []  # which components, label
    numbers: list[str] = []
    for line in read_lines(path, includes):
        words = line.split()
        if not line.startswith("."):
            numbers += words
            continue
        numbers = []
        match words:
            case [".PEN_DOWN" | ".PEN_UP" as pen, *_]:
                components.append(Component(pen == ".PEN_DOWN", writer, numbers))
            case [".WRITER_ID", name, *_]:
                writer = name
            case [".COORD", *names]:
                columns = len(names)
            case [keyword, value, *_] if "_POINTS_PER_" in keyword:
                resolution[keyword[1]] = float(value)
            case [".SEGMENT", "CHARACTER", extent, *_, label] if re.fullmatch(r'"\w"', label):
                segments.append((extent, label[1]))
    if provider == FRAGMENTED_PROVIDER:
        segments = without_fragments(segments)
    components = [component for component in components if component.numbers]  # as they are counted
    scale = np.array([resolution["Y"] / resolution["X"], -1])  # in the files y grows upwards
    for extent, label in segments:
        writer = components[int(re.match(r"\d+", extent)[0])].writer
        strokes = [points * scale for points in find_strokes(extent, components, columns)]
        yield Character(label, f"{provider}_{writer}", strokes)


def without_fragments(segments: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out neighbours of the same label: they may be strokes of one character."""
    fragments = set()
    for one, other in pairwise(segments):
        end = int(one[0].split("-")[-1])
        if one[1] == other[1] and int(other[0].split("-")[0]) - end <= FRAGMENT_GAP:
            fragments |= {one, other}
    return [segment for segment in segments if segment not in fragments]


def find_strokes(extent: str, components: list[Component], columns: int) -> Iterator[np.ndarray]:
    """Yield the strokes (points, 2) of a segment, such as 3-4, 3:5-4:10 (points) or 3,7-8."""
    for part in extent.split(","):
        start, _, end = part.partition("-")
        first, _, first_point = start.partition(":")
        last, _, last_point = (end or first).partition(":")
        for number in range(int(first), int(last) + 1):
            component = components[number]
            points = np.array(component.numbers, float).reshape(-1, columns)[:, :2]
            if last_point and number == int(last):
                points = points[: int(last_point) + 1]
            if first_point and number == int(first):
                points = points[int(first_point) :]
            if component.is_down and len(points):
                yield points


def is_plausible(character: Character) -> bool:
    """Say whether a character has points enough, and a width and height that its class allows."""
    if sum(map(len, character.strokes)) < 3:
        return False
    width, height = np.ptp(np.concatenate(character.strokes), axis=0)
    narrowest, widest = ASPECT_LIMITS
    too_narrow = width < narrowest * height and character.label not in NARROW_CLASSES
    return max(width, height) > 0 and width <= widest * height and not too_narrow


def smooth(stroke: np.ndarray, distance: float) -> np.ndarray:
    """Return the stroke with points at equal distances along it, smoothed; its ends stay."""
    steps = np.hypot(*np.diff(stroke, axis=0).T)
    along = np.concatenate([[0], np.cumsum(steps)])
    places = np.linspace(0, along[-1], 2 + int(along[-1] / distance))
    points = np.stack([np.interp(places, along, axis) for axis in stroke.T], axis=1)
    for _ in range(SMOOTHING_PASSES):
        points[1:-1] = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4
    return points


def draw(character: Character, pen_width: float) -> np.ndarray:
    """Draw a character in black on white: (H, W) uint8; pen_width is a fraction of its length."""
    points = np.concatenate(character.strokes)
    scale = CHARACTER_LENGTH / np.ptp(points, axis=0).max()
    width, height = np.ptp(points, axis=0) * scale + 2 * MARGIN
    picture = np.full((round(height), round(width)), 255, np.uint8)
    thickness = round(pen_width * CHARACTER_LENGTH)
    for stroke in character.strokes:
        places = smooth((stroke - points.min(axis=0)) * scale, POINT_DISTANCE) + MARGIN
        fixed = np.int32(np.round(places * 2**SUBPIXEL_BITS))
        cv2.polylines(picture, [fixed], False, 0, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    return picture


def read_distribution(folder: Path) -> dict[str, list[Character]]:
    """Return the plausible characters of a distribution by writer."""
    included = folder / "include"
    includes = {str(path.relative_to(included)).lower(): path for path in included.rglob("*.*")}
    by_writer = defaultdict(list)
    for path in sorted((folder / "data").glob("1[abc]/**/*.dat")):  # digits, capitals, lower case
        provider = path.relative_to(folder / "data").parts[1]
        for character in read_characters(path, provider, includes):
            if is_plausible(character):
                by_writer[character.writer].append(character)
    return by_writer


def main() -> None:
    generator = random.Random(0)
    rows = []
    by_writer = read_distribution(Path(sys.argv[1]))
    pictures = Path(sys.argv[2])
    pictures.mkdir(parents=True, exist_ok=True)
    (pictures / "CREDIT.txt").write_text(CREDIT, encoding="utf-8")  # goes into the weights file
    for writer, characters in by_writer.items():
        chosen = generator.sample(characters, min(len(characters), WRITER_LIMIT))
        for number, character in enumerate(chosen):
            folder = pictures / character.label.upper()
            folder.mkdir(exist_ok=True)
            pen_width = np.exp(generator.uniform(*np.log(PEN_WIDTHS)))
            name = re.sub(r"[^\w-]", "_", f"{writer}_{character.label}_{number:03}")
            path = folder / f"{name}.png"
            cv2.imwrite(str(path), draw(character, pen_width))
            rows.append((path, folder.name, writer))
    with open(pictures / "pictures.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "character", "writer"), *sorted(rows)])
    print(f"{len(rows):,} pictures of {len(by_writer)} writers in {pictures}")


if __name__ == "__main__":
    main()
