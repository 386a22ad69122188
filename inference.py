"""Name the handwritten character in every picture of a folder.

    python3 inference.py --input tests/samples

prints one line per picture, the ASCII code of the character and the path, in sorted order:

    048, tests/samples/0_scan.png
    049, tests/samples/1_pencil.jpg
    050, tests/samples/2_form.tif

Digits and letters, 36 classes; any picture that Pillow reads, of one character, of any size, dark
on light or light on dark. `--format csv` or `json` adds confidences, alternatives and errors,
`--report FILE.html` makes a page to look through. Results go to stdout or `--output`, all else to
stderr. Exit code: 0 all answered, 1 some could not be, 2 wrong usage, 130 interrupted.
"""

import argparse
import base64
import csv
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache, lru_cache
from itertools import islice, permutations
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

    import CNN

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


class Halt(Exception):  # noqa: N818 - not always an error
    """Why the run can't begin, or can't go on: one line for the user, exit code 2."""


def load(path: str, side: int = WORKING_SIDE) -> Image.Image:
    """Read a picture upright, in mode L, RGB, RGBA, I or F, reduced to `side` px or somewhat more.

    Of an animation, the first frame. Pipes, sockets and devices are refused without being opened.
    Raises OSError, ValueError or whatever else Pillow raises for bytes that are no sound picture.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # replaced since; it did not block, though
            raise ValueError("not a regular file")
        with Image.open(file, formats=_formats()) as picture:
            factor = _factor(picture, side)
            picture.draft(None, (picture.width // factor, picture.height // factor))  # of a JPEG
            picture.load()
            plain = _plain(picture)
            factor = _factor(plain, side)
            return _upright(plain.reduce(factor) if factor > 1 else plain)


@cache
def _formats() -> tuple[str, ...]:
    """Return the allowed formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


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


def _factor(picture: Image.Image, side: int) -> int:
    """Return how many times smaller a picture may be; of a long strip its narrow side decides."""
    return max(1, min(max(picture.size) // side, min(picture.size) // NARROW))


def _upright(picture: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF orientation says."""
    if not picture.info:  # no EXIF there
        return picture
    with suppress(Exception):  # a damaged EXIF block says nothing about the picture
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def to_grey(picture: Image.Image) -> np.ndarray:
    """Return a picture in mode L, RGB, RGBA, I or F as grey uint8 (H, W), transparency as paper.

    Colours are projected on the line along which they vary most, so that red ink on green paper of
    the same lightness keeps its contrast.
    """
    if picture.mode in ("I", "F"):
        values = np.asarray(picture, np.float64)
        finite = np.isfinite(values)
        values = np.where(finite, values, np.median(values[finite]) if finite.any() else 0)
        low, high = values.min(), values.max()
        return ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    if picture.mode == "RGBA":
        picture = _on_paper(picture)
    if picture.mode != "RGB":
        return np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    colours = np.asarray(picture)
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    if np.array_equal(red, green) and np.array_equal(green, blue):
        return red
    points = colours.reshape(-1, 3)
    sample = np.ascontiguousarray(points[:: 1 + len(points) // 4096].T, np.float32)
    sample -= sample.mean(1, keepdims=True)
    _, axes = np.linalg.eigh(sample @ sample.T)
    axis = axes[:, -1] * np.sign(axes[:, -1].sum() or 1) / np.abs(axes[:, -1]).sum()
    return np.asarray(picture.convert("L", (*axis.tolist(), -255 * np.minimum(axis, 0).sum())))


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


SMALL = 14  # px: a shorter character, in a picture that was reduced, is read again
CLEAR = 40  # px: at the resolution that makes it this long
AROUND = 1.5  # of its length: how far its surroundings are read with it

LONGEST = 22 / 28  # of the result's side: longest side of a character, EMNIST's median 23.6 / 28
STROKE = 2.7 / 28  # of the result's side: width of strokes, EMNIST's median 2.9 / 28
FINE = 2  # strokes are made thinner and thicker on a grid this many times finer than the result
INKED = 0.8  # mean level of ink weighed by itself: EMNIST's median
EDGE = 0.25  # of full ink: where a character ends
FAINT = 0.1  # of full ink: the outermost trace of a character
FORMED = (20.8 / 28, 26.7 / 28)  # of the side: the length of EMNIST's characters, traces included
OFFSET = 0.75 / 28  # of the side: EMNIST's characters are no farther off the centre

EXACT = 0.25  # of the pixels: so many are of exactly one level only where that was drawn
SHADED = 12  # px: a smaller picture is no photograph, its paper has no shading
GRID = 40  # px: side of the grid on which shading is estimated
WINDOW = 0.3  # of the picture's side: strokes are narrower than this, shadows wider
VEIL = 0.3  # of full ink: what shadows may leave after the shading is taken away

NOISE = 2  # deviations above its level that paper reaches
SIGNAL = 4  # deviations above its level that ink reaches at least
NEIGHBOURS = 0.2  # correlation of neighbouring pixels: below it, a small picture is but noise
FAINTEST = 8  # grey levels of 256 between paper and ink, at least

SPECK = 0.02  # of the area of the largest part: what is smaller is dirt; an i's dot is some 0.05
FRAMED = 24  # px: a smaller picture shows nothing beside its character
RIM = 0.12  # of the picture's side: where frames, rules and neighbours lie


def fit(pictures: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring pictures of one character each to the form that EMNIST's own have.

    pictures: grey uint8 (H, W), any sizes, ink darker or lighter than the paper.
    Returns (N, size, size) uint8, ink 255 on 0; (N,) bool, False where there is no ink; and (N, 3),
    the centre y and x and the length of each character, px. What a picture becomes does not depend
    on the others.
    """
    places = np.zeros((len(pictures), 3))
    fine = np.zeros((len(pictures), FINE * size, FINE * size), np.float32)
    out = np.zeros((len(pictures), size, size), np.float32)
    formed, inked = np.zeros((2, len(pictures)), bool)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        shapes.setdefault(picture.shape, []).append(i)
    for members in shapes.values():
        indices = np.array(members)
        ink, inked[indices] = find_ink(np.stack([pictures[i] for i in members]))
        places[indices] = where = _extent(ink, EDGE)
        formed[indices] = own = _is_formed(ink, size)
        if own.any():
            height = ink.shape[1]
            rows = _averages(np.zeros(1), np.array([height / size]), size, height)[0]
            out[indices[own]] = rows @ ink[own] @ rows.T
        if not own.all():
            fine[indices[~own]] = _place(ink[~own], where[~own], FINE * size)
    out[~formed] = _even_strokes(fine[~formed])
    out *= 255 / np.maximum(out.max((1, 2), keepdims=True), 1e-3)  # as in EMNIST
    return out.round().astype(np.uint8), inked, places


def find_ink(greys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell ink from paper in (N, H, W) uint8: ink (N, H, W) in [0, 1], and whether there is any."""
    counts = _histograms(greys)
    dark = _is_dark(greys, _otsu(counts))
    height = np.where(dark[:, None, None], 255 - greys, greys)  # of the ink above the paper
    uneven = ~_is_even(counts) & (min(greys.shape[1:]) >= SHADED)
    unit = np.ones(len(greys))
    if uneven.any():
        height[uneven], unit[uneven] = _flatten(greys[uneven])
    levels = _levels(_histograms(height), unit, np.where(uneven, VEIL, 0))
    threshold, low, gain = (x.astype(np.float32)[:, None, None] for x in levels[:3])
    ink = ((height - low) * gain).clip(0, 1) * _belongs(height > threshold)
    inked = levels.found
    if min(greys.shape[1:]) < FRAMED:
        inked &= _likeness(greys) > NEIGHBOURS
    return ink * inked[:, None, None], inked


def _histograms(values: np.ndarray) -> np.ndarray:
    """Count the levels of each picture: (N, 256)."""
    keys = values + np.arange(len(values))[:, None, None] * 256
    return np.bincount(keys.ravel(), minlength=len(values) * 256).reshape(-1, 256)


def _otsu(counts: np.ndarray) -> np.ndarray:
    """Return the levels (N,) above which lies the upper of two classes (Otsu 1979)."""
    number = counts.cumsum(1).astype(np.float64)
    mass = (counts * np.arange(256)).cumsum(1)
    expected = number * (mass[:, -1:] / number[:, -1:])
    between = (expected - mass) ** 2 / np.maximum(number * (number[:, -1:] - number), 1)
    return between.argmax(1)


def _likeness(greys: np.ndarray) -> np.ndarray:
    """Return the correlation (N,) of pixels with the next ones across and down."""
    values = greys.astype(np.float32)
    steps = [np.diff(values, axis=axis).reshape(len(values), -1) for axis in (1, 2)]
    steps = np.concatenate(steps, 1)
    number = max(1, steps.shape[1])
    return 1 - (steps * steps).sum(1) / number / (2 * values.var((1, 2)) + 1e-6)


def _is_dark(greys: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Say where ink is darker than paper: paper is most of the area and of the border."""
    light = greys > threshold[:, None, None]
    share, border = light.mean((1, 2)), _border(light, 0)
    if min(light.shape[1:]) >= FRAMED:  # the border may be a frame
        inner = _border(light, round(RIM / 2 * min(light.shape[1:])))
        border = np.where(share < 0.5, np.minimum(border, inner), np.maximum(border, inner))
    return share + border > 1


def _border(mask: np.ndarray, inset: int) -> np.ndarray:
    height, width = mask.shape[1:]
    mask = mask[:, inset : height - inset, inset : width - inset]
    return np.concatenate([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1).mean(1)


def _is_even(counts: np.ndarray) -> np.ndarray:
    """Say where there are two tones, or one of much of the paper with all others to one side."""
    sums = np.pad(counts.cumsum(1), ((0, 0), (1, 0)))
    row, total = np.arange(len(sums)), sums[:, -1]
    near = sums[:, 9:] - sums[:, :-9]  # pixels within 4 levels of each level from 4 to 251
    mode = near.argmax(1) + 4
    below = sums[row, np.maximum(mode - 12, 0)]
    above = total - sums[row, np.minimum(mode + 13, 256)]
    much = (near.max(1) > 0.5 * total) | (counts.max(1) > EXACT * total)
    one_paper = much & (np.minimum(below, above) < 0.02 * total)
    first = (counts > 0).argmax(1)
    last = 255 - (counts[:, ::-1] > 0).argmax(1)
    ends = near[row, (first - 4).clip(0, 247)] + near[row, (last - 4).clip(0, 247)]
    return one_paper | (ends > 0.97 * total)


def _flatten(greys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the shading of the paper away.

    The paper is what remains when everything narrower than WINDOW is filled with what surrounds it.
    Returns the height of ink above paper, uint8 (N, H, W), and how many of its levels make one grey
    level, (N,).
    """
    (down_y, up_y), (down_x, up_x) = map(_grid, greys.shape[1:])
    greys = greys.astype(np.float32)
    small = down_y @ greys @ down_x.T  # (N, 40, 40)
    flat = small.reshape(len(small), -1, 1)
    surface = _surface(*small.shape[1:])
    terms = surface.T @ flat
    rest = flat - surface @ terms
    skew = (rest * rest * rest).mean((1, 2))  # ink is the rarer side
    trend = surface[:, :3] @ terms[:, :3]
    sign = np.where(skew < 0, -1, 1)[:, None, None].astype(np.float32)
    trend = sign * trend.reshape(small.shape)
    paper = sign * small - trend
    for function in (np.minimum, np.maximum):
        for axis in (1, 2):
            paper = _running(function, paper, max(1, round(WINDOW / 2 * paper.shape[axis])), axis)
    height = sign * greys - up_y @ (paper + trend) @ up_x.T
    low, high = height.min((1, 2)), height.max((1, 2))
    unit = 255 / np.maximum(high - low, 1)
    return ((height - low[:, None, None]) * unit[:, None, None]).astype(np.uint8), unit


@lru_cache(256)
def _grid(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices that average `length` pixels to at most GRID, and interpolate back."""
    count = min(length, GRID)
    down = _averages(np.zeros(1), np.array([length / count]), count, length)[0]
    position = (np.arange(length) + 0.5) * count / length - 0.5
    distance = position.clip(0, count - 1)[:, None] - np.arange(count)
    return down, np.maximum(1 - np.abs(distance), 0).astype(np.float32)


@lru_cache(256)
def _surface(height: int, width: int) -> np.ndarray:
    """Return an orthonormal basis (height * width, 6) of the quadratic surfaces."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].reshape(2, -1)
    return np.linalg.qr(np.stack([x**0, x, y, x * y, x * x, y * y], 1))[0].astype(np.float32)


def _running(function: np.ufunc, values: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """Return the minimum or maximum over the window of `reach` pixels to both sides."""
    pad = [(0, 0)] * 3
    pad[axis] = (reach, reach)
    out, span, window = np.moveaxis(np.pad(values, pad, mode="edge"), axis, 0), 1, 2 * reach + 1
    while span < window:  # each element stands for `span` pixels from its own on
        step = min(span, window - span)
        out = function(out[:-step], out[step:])
        span += step
    return np.moveaxis(out, 0, axis)


class Levels(NamedTuple):
    """Where ink begins, what level is 0 ink, ink per level above it, whether there is ink: (N,)."""

    threshold: np.ndarray
    low: np.ndarray
    gain: np.ndarray
    found: np.ndarray


def _levels(counts: np.ndarray, unit: np.ndarray, veil: np.ndarray) -> Levels:
    """Find the levels of paper and ink in histograms (N, 256) of heights, `unit` per grey level."""
    value, row = np.arange(256), np.arange(len(counts))
    threshold = _otsu(counts)
    above = counts * (value > threshold[:, None])
    mean = (above * value).sum(1, keepdims=True) / np.maximum(above.sum(1, keepdims=True), 1)
    core = (above * (value >= mean)).cumsum(1)  # without the blurred edges of strokes
    high = (4 * core >= 3 * core[:, -1:]).argmax(1)
    sums = counts.cumsum(1)
    paper = (2 * sums >= sums[row, threshold][:, None]).argmax(1)
    third = (3 * sums >= sums[:, -1:]).argmax(1)  # paper, too, and within noise if all is noise
    found = (high - paper > FAINTEST * unit) & (high - third > SIGNAL * _noise(counts, third))
    low = paper + np.maximum(NOISE * _noise(counts, paper), veil * (high - paper))
    low = np.minimum(low, (paper + high) / 2)
    gain = np.where(found, 1 / np.maximum(high - low, 1), 0)
    return Levels(np.maximum(threshold, low), low, gain, found)


def _noise(counts: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return how far the values below a level deviate from it; ink has no part in that."""
    distance = np.maximum(level[:, None] - np.arange(256), 0)
    number = counts.cumsum(1)[np.arange(len(counts)), level]
    return np.sqrt((counts * distance**2).sum(1) / np.maximum(number, 1))


def _belongs(mask: np.ndarray) -> np.ndarray:
    """Return (N, H, W) bool: False on and around specks, rules and neighbours in a mask of ink."""
    count, height, width = mask.shape
    edges = np.zeros((count, height + 1, width + 2), np.int8)  # an empty row after each picture
    edges[:, :height, 1:-1] = mask
    steps = np.diff(edges, axis=2)
    row, start = np.divmod(np.flatnonzero(steps == 1), width + 1)
    end = np.flatnonzero(steps == -1) % (width + 1)
    if not len(row):
        return np.ones_like(mask)
    label = _connect(row, start, end, width)
    dirt = _dirt(label, row, start, end, mask.shape)
    if not dirt.any():
        return np.ones_like(mask)
    row, start, end = row[dirt], start[dirt], end[dirt]
    steps[:] = 0
    flat = steps.reshape(-1, width + 1)
    flat[row, start], flat[row, end] = 1, -1
    out = flat.cumsum(1, dtype=np.int8).reshape(steps.shape)[:, :height, :width] > 0
    if min(height, width) >= FRAMED:  # and the blurred edges of what goes
        for axis in (1, 2):
            out = _running(np.maximum, out, 1, axis)
    return ~out


def _connect(row: np.ndarray, start: np.ndarray, end: np.ndarray, width: int) -> np.ndarray:
    """Label the runs of pixels [start, end) in rows, in order, by the first run of their part.

    Runs in neighbouring rows that touch, be it by a corner, belong to one part. Labels spread along
    touching pairs, and along labels of labels, until nothing changes.
    """
    key = width + 2
    first = np.searchsorted(row * key + end, (row + 1) * key + start)
    last = np.searchsorted(row * key + start, (row + 1) * key + end, side="right")
    number = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(row)), number)
    lower = np.arange(number.sum()) + np.repeat(first - number.cumsum() + number, number)
    label = np.arange(len(row))
    while len(upper):
        a, b = label[upper], label[lower]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while (label != label[label]).any():
            label = label[label]
        differ = label[upper] != label[lower]
        upper, lower = upper[differ], lower[differ]
    return label


def _dirt(
    label: np.ndarray, row: np.ndarray, start: np.ndarray, end: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Say which runs of pixels belong to parts that are not of the character.

    These are specks; in pictures of some size also what lies along the border (frames, rules, the
    table beside the card), and what comes in from it while the character itself is clear of it.
    """
    count, height, width = shape
    picture, y = np.divmod(row, height + 1)
    order = np.argsort(label, kind="stable")
    bounds = np.flatnonzero(np.diff(label[order], prepend=-1))

    def over_part(function: np.ufunc, values: np.ndarray) -> np.ndarray:
        return function.reduceat(values[order], bounds)

    def most(values: np.ndarray) -> np.ndarray:  # of each part's picture
        best = np.zeros(count)
        np.maximum.at(best, owner, values)
        return best[owner]

    owner = picture[order][bounds]
    area = over_part(np.add, end - start)
    dirt = np.zeros(len(bounds), bool)
    if min(height, width) >= FRAMED:
        rim_y, rim_x = RIM * height, RIM * width
        inner = (np.minimum(end, width - rim_x) - np.maximum(start, rim_x)).clip(0)
        inside = over_part(np.add, inner * ((y >= rim_y) & (y < height - rim_y)))
        border = (y <= 1) | (y >= height - 2) | (start <= 1) | (end >= width - 1)
        touches = over_part(np.logical_or, border)
        tall = over_part(np.maximum, y) - over_part(np.minimum, y) + 1
        wide = over_part(np.maximum, end) - over_part(np.minimum, start)
        along = (inside < 0.05 * area) & ((tall > 0.4 * height) | (wide > 0.4 * width))
        best = most(inside * ~along)
        along &= best > 0.005 * height * width
        main = (inside == best) & ~along
        free = most(main & ~touches) > 0
        small = (inside < 0.5 * area) | (area < 0.2 * most(area * main))
        dirt = along | (touches & ~main & free & small)
    dirt |= area < SPECK * most(area * ~dirt)
    where = np.empty(len(label), int)
    where[order] = np.repeat(np.arange(len(bounds)), np.diff(bounds, append=len(label)))
    return dirt[where]


def _is_formed(ink: np.ndarray, size: int) -> np.ndarray:
    """Say which of (N, H, W) are EMNIST's own, enlarged or not, to be taken as they are.

    They are squares of a multiple of EMNIST's side that hold the character as those do.
    """
    _, height, width = ink.shape
    if height != width or height % size:
        return np.zeros(len(ink), bool)
    y, x, longest = _extent(ink, FAINT).T
    formed = (longest > FORMED[0] * height) & (longest < FORMED[1] * height)
    return formed & (np.maximum(np.abs(y - height / 2), np.abs(x - width / 2)) < OFFSET * height)


def _place(ink: np.ndarray, places: np.ndarray, side: int) -> np.ndarray:
    """Scale and centre the characters at `places` in pictures (N, H, W): (N, side, side)."""
    _, height, width = ink.shape
    y, x, longest = places.T
    step = longest / (LONGEST * side)  # pixels per pixel of the result
    rows = _cubic(y - step * side / 2, step, side, height)
    columns = _cubic(x - step * side / 2, step, side, width)
    return (rows @ ink @ columns.transpose(0, 2, 1)).clip(0, 1)


def _extent(ink: np.ndarray, level: float) -> np.ndarray:
    """Return the centre y and x and the longest side, px, of characters (N, H, W): (N, 3)."""
    (top, bottom), (left, right) = _ends(ink.max(2), level), _ends(ink.max(1), level)
    longest = np.maximum(bottom - top, right - left)
    return np.stack([(top + bottom) / 2, (left + right) / 2, np.maximum(longest, 1e-3)], 1)


def _ends(profile: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where profiles (N, L) first and last reach a level of their height, px (N,) each."""
    row = np.arange(len(profile))
    edge = level * profile.max(1)
    padded = np.pad(profile, ((0, 0), (1, 1)))

    def first(values: np.ndarray) -> np.ndarray:
        i = np.maximum((values > edge[:, None]).argmax(1), 1)
        here, before = values[row, i], values[row, i - 1]
        return i - 0.5 - (here - edge) / np.maximum(here - before, 1e-6)

    return first(padded), profile.shape[1] - first(padded[:, ::-1])


def _averages(start: np.ndarray, step: np.ndarray, count: int, length: int) -> np.ndarray:
    """Return (N, count, length): row i averages pixels from start + i * step, `step` of them."""
    edge = start[:, None] + np.arange(count + 1) * step[:, None]
    pixel = np.arange(length)
    overlap = np.minimum(edge[:, 1:, None], pixel + 1) - np.maximum(edge[:, :-1, None], pixel)
    return (overlap.clip(0) / step[:, None, None]).astype(np.float32)


def _cubic(start: np.ndarray, step: np.ndarray, count: int, length: int) -> np.ndarray:
    """Return (N, count, length): row i resamples as Pillow's BICUBIC, around start + (i + .5) step.

    Beyond the picture is paper, 0.
    """
    reach = np.maximum(step, 1)[:, None, None].astype(np.float32)
    beyond = int(np.ceil(2 * reach.max()))
    centre = start[:, None] + (np.arange(count) + 0.5) * step[:, None]
    pixel = np.arange(-beyond, length + beyond) + 0.5
    x = np.abs(pixel - centre[:, :, None]).astype(np.float32) / reach
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (weights / np.maximum(weights.sum(2, keepdims=True), 0.5))[
        :, :, beyond : beyond + length
    ]


def _even_strokes(fine: np.ndarray) -> np.ndarray:
    """Bring strokes in (N, side, side) to EMNIST's width and level, at 1 / FINE the resolution."""
    side = fine.shape[1]
    change = (STROKE * side - _stroke_width(fine)) / 2  # px, on each side of the stroke
    change = np.maximum(change, -side / 8)  # what is thicker than that is no stroke
    fine = _thicken(fine, change)
    step = FINE * (1 + 2 * change / (LONGEST * side))
    count = side // FINE
    rows = _averages((side - step * count) / 2, step, count, side)
    out = (rows @ fine @ rows.transpose(0, 2, 1)).clip(0, 1)
    level = (out * out).sum((1, 2)) / np.maximum(out.sum((1, 2)), 1e-6)
    return (out * np.maximum(INKED / np.maximum(level, 0.1), 1)[:, None, None]).clip(0, 1)


def _stroke_width(ink: np.ndarray) -> np.ndarray:
    """Return the mean width of strokes, px (N,): twice the area over the length of the outline."""
    across, down = np.diff(ink[:, :-1], axis=2), np.diff(ink[:, :, :-1], axis=1)
    outline = np.sqrt(across * across + down * down).sum((1, 2))
    return 2 * ink.sum((1, 2)) / np.maximum(outline, 1e-6)


def _thicken(ink: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Move the outline out by `change` px (N,), by a cross and a square in turn, as by a disc."""
    ink = ink.copy()
    for function, left in ((np.maximum, change.copy()), (np.minimum, -change)):
        square = False
        while (some := np.flatnonzero(left > 0)).size:
            part = np.minimum(left[some], 1).astype(np.float32)
            old = ink[some]
            down, across = _running(function, old, 1, 1), _running(function, old, 1, 2)
            new = _running(function, down, 1, 2) if square else function(down, across)
            ink[some] = old + part[:, None, None] * (new - old)
            left[some] -= part
            square = not square
    return ink


def read_closer(path: str, shape: tuple[int, ...], place: np.ndarray) -> np.ndarray | None:
    """Read again a character that is small in its picture, with its surroundings.

    shape: of the picture as it was loaded; place: the character's centre y and x and length there.
    Returns grey uint8 (H, W); None where the file shows no more. Raises as `load` does.
    """
    y, x, length = place
    if max(shape) < WORKING_SIDE:  # for sure it was not reduced
        return None
    picture = load(path, round(max(shape) * CLEAR / length))
    scale = max(picture.size) / max(shape)  # the shorter side may be a pixel or two, rounded up
    if scale < 1.5:
        return None
    reach = AROUND * length
    box = np.array([x - reach, y - reach, x + reach, y + reach]) * scale
    return to_grey(picture.crop(box.clip(0, 2 * picture.size).round().astype(int).tolist()))


def find(inputs: Iterable[str], passed_over: Counter) -> Iterator[tuple[str, str]]:
    """Yield (path, error) of every picture, lazily, each folder's in the order of its names.

    A file in `inputs` is always taken, in a folder what has a picture's suffix; an input given
    twice counts once. Folders in folders are searched, links to folders in them are not. error is
    "" but for a folder that can't be listed. Counts in `passed_over` what is left out.
    """
    for path in dict.fromkeys(PurePath(name).as_posix() for name in inputs):
        if not os.path.isdir(path):
            yield path, ""
            continue
        levels = [("" if path == "." else path.rstrip("/") + "/", None)]
        while levels:
            folder, names = levels.pop()
            if names is None:
                names, error = _list(folder or ".", passed_over)
                if error:
                    yield folder or ".", error
            while names:  # popped, so that the names of a large folder are freed as they are used
                name = names.pop()
                if name.endswith("/"):
                    levels += [(folder, names), (folder + name, None)]
                    break
                yield folder + name, ""


def _list(folder: str, passed_over: Counter) -> tuple[list[str], str]:
    """Return the pictures and folders (ending in /) in a folder, last name first, and an error."""
    names, error = [], ""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "/")
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    passed_over["links to folders"] += 1
                elif entry.name.lower().endswith(SUFFIXES):
                    names.append(entry.name)
                else:
                    passed_over["other files"] += 1
    except OSError as problem:
        error = f"folder can't be listed: {problem.strerror}"
    names.sort(key=lambda name: name.removesuffix("/"), reverse=True)
    return names, error


CHUNK = 64  # pictures that a worker is sent at a time
AHEAD = 4 * CHUNK  # pictures taken from the listing per worker, beyond the last one answered
FLUSH_SECONDS = 0.25  # after which a worker answers what it has and hands back the rest
REQUEST_BYTES = 8000  # a pipe takes so many at once, even if the worker does not read
START_SECONDS = 60  # that a worker may take to start
WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads; the processes are enough
    "MALLOC_MMAP_THRESHOLD_": str(2**26),  # glibc's: keep freed memory rather than give it back and
    "MALLOC_TRIM_THRESHOLD_": str(2**27),  # ask for it again with every batch, a page fault each
}
WORKER_BYTES = 3 * 2**30  # of address space; a picture just under Pillow's bomb limit takes a third


class Picture(NamedTuple):
    """What a worker makes of a file: size * size bytes of ink, or an error."""

    path: str
    ink: bytes
    error: str
    thumbnail: str = ""  # data URI, where a report is asked for


def work(connection: Connection, thumbnails: bool) -> None:
    """Read and fit the pictures that come over the connection, until it closes.

    In: the size, then paths, NUL between all. Out, for as many of the paths as were done: errors
    ("" for none) and thumbnails, NUL between them, and a block with size * size bytes for each that
    has no error. No pickles: a process that a hostile picture took over gains nothing by them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others print what files tell them to
    _limit_memory()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    connection.send_bytes(b"ready")
    try:
        while True:
            size, *paths = connection.recv_bytes().split(b"\0")
            errors, views, block = prepare(map(os.fsdecode, paths), int(size), thumbnails)
            connection.send_bytes("\0".join(errors).encode())
            connection.send_bytes("\0".join(views).encode())
            connection.send_bytes(block)
    except (EOFError, OSError):  # the other side is gone
        return


def _limit_memory() -> None:
    """Make a picture that would eat the memory a MemoryError, where the system can."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not this one
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = WORKER_BYTES if hard == resource.RLIM_INFINITY else min(hard, WORKER_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def prepare(
    paths: Iterable[str], size: int, thumbnails: bool = False
) -> tuple[list[str], list[str], bytes]:
    """Read pictures until all are or FLUSH_SECONDS are over, fit them; see `work`."""
    sound, greys, errors, views = [], [], [], []
    started = time.monotonic()
    for path in paths:
        error, view = "", ""
        try:
            picture = load(path)
            greys.append(to_grey(picture))
            sound.append((len(errors), path))
            view = thumbnail(picture) if thumbnails else ""
        except Exception as problem:  # Pillow raises nearly everything for broken files
            error = _reason(problem)
        errors.append(error)
        views.append(view)
        if time.monotonic() - started > FLUSH_SECONDS:
            break
    images, inked, places = fit(greys, size)
    for i in np.flatnonzero(inked & (places[:, 2] < SMALL)):
        with suppress(Exception):  # the first look has to do
            closer = read_closer(sound[i][1], greys[i].shape, places[i])
            if closer is not None:
                image, clear, _ = fit([closer], size)
                images[i] = image[0] if clear[0] else images[i]
    for (i, _), has_ink in zip(sound, inked, strict=True):
        errors[i] = "" if has_ink else BLANK
    return errors, views, images[inked].tobytes()


def _reason(error: Exception) -> str:
    """Say in one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that is read here"
    if isinstance(error, MemoryError):
        return "takes too much memory"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"too large: over {Image.MAX_IMAGE_PIXELS:,} pixels"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "can't be read: " + escaped(text)[:200]


@cache
def _context() -> multiprocessing.context.BaseContext:
    """Return the quickest way to start processes that doesn't copy this one, threads and all."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with suppress(ValueError, FileNotFoundError):  # Windows; a system with no writable folder
        context = multiprocessing.get_context("forkserver")
        tempfile.gettempdir()  # where the server has its socket
        context.set_forkserver_preload(["numpy", "PIL.Image", "PIL.ImageOps"])
        return context
    return multiprocessing.get_context("spawn")


class Worker:
    """A process that decodes pictures, so that what a file does to its decoder ends with it."""

    def __init__(self, thumbnails: bool) -> None:
        context = _context()
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=work, args=(far_end, thumbnails), daemon=True)
        self.process.start()
        far_end.close()
        self.ready = False
        self.given: deque[list[tuple[int, str]]] = deque()  # the job in hand, and the next
        self.deadline = time.monotonic() + START_SECONDS

    def end(self) -> int | None:
        """Kill the process; return the exit code that it had before, None if it was alive."""
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        return code


class Pool:
    """Worker processes that read and fit pictures, whatever single files do to them.

    A worker that dies, or is `timeout` seconds over a picture, is replaced. What it had in hand is
    tried again, each picture alone; one that is then lost again gets an error.
    """

    def __init__(self, workers: int, timeout: float, thumbnails: bool) -> None:
        self.limit, self.timeout, self.thumbnails = workers, timeout, thumbnails
        self.jobs: deque[list[tuple[int, str]]] = deque()  # numbered paths
        self.answered: dict[int, Picture] = {}
        self.failed_starts = 0
        self.workers = [Worker(thumbnails)]  # the others start when there is work for them

    def run(self, listing: Iterator[tuple[str, str]], size: int) -> Iterator[list[Picture]]:
        """Yield the pictures of (path, error) pairs in order, in lists of what is ready.

        An empty list says that nothing more became ready for a moment. Few are held at a time.
        """
        self.size, taken, given, more = size, 0, 0, True
        while more or given < taken:
            while more and taken - given < AHEAD * self.limit:
                listed = list(enumerate(islice(listing, CHUNK), taken))
                self.answered |= {i: Picture(path, b"", e) for i, (path, e) in listed if e}
                if job := [(i, path) for i, (path, error) in listed if not error]:
                    self.jobs.append(job)
                taken, more = taken + len(listed), len(listed) == CHUNK
            self._assign()
            ready = []
            while given in self.answered:
                ready.append(self.answered.pop(given))
                given += 1
            yield ready
            if given < taken:
                self._receive()

    def _assign(self) -> None:
        """Give each worker a job and then the next, so that none waits; start more workers."""
        for depth in (0, 1):
            for worker in self.workers:
                if self.jobs and worker.ready and len(worker.given) == depth:
                    self._give(worker, self.jobs.popleft())
        if self.jobs and len(self.workers) < self.limit and all(w.ready for w in self.workers):
            self.workers.append(Worker(self.thumbnails))

    def _give(self, worker: Worker, job: list[tuple[int, str]]) -> None:
        request = b"\0".join([str(self.size).encode(), *(os.fsencode(path) for _, path in job)])
        if worker.given and len(request) > REQUEST_BYTES:  # would block until the first is done
            self.jobs.appendleft(job)
            return
        if not worker.given:
            worker.deadline = time.monotonic() + self.timeout + FLUSH_SECONDS
        worker.given.append(job)
        with suppress(OSError):  # died while idle; _receive finds its connection closed
            worker.connection.send_bytes(request)

    def _receive(self) -> None:
        """Wait a moment for answers, take them in, replace workers that died or take too long."""
        busy = {w.connection: w for w in self.workers if w.given or not w.ready}
        for connection in wait(list(busy), timeout=0.05):
            worker = busy.pop(connection)
            try:
                self._take(worker)
            except (EOFError, OSError, ValueError):
                worker.process.join(1)  # its pipe closes a moment before it is gone
                self._bury(worker, "")
        for worker in busy.values():
            if time.monotonic() > worker.deadline:
                self._bury(worker, f"takes more than {self.timeout:g} s to decode")

    def _take(self, worker: Worker) -> None:
        """Take in an answer; what it leaves of the job goes to all workers, in equal parts."""
        message = worker.connection.recv_bytes()
        if not worker.ready:
            worker.ready, self.failed_starts = True, 0
            return
        errors = message.decode().split("\0")
        views = worker.connection.recv_bytes().decode().split("\0")
        block = worker.connection.recv_bytes()
        if len(views) != len(errors) or len(block) != errors.count("") * self.size**2:
            raise ValueError("not an answer")
        start, job = 0, worker.given.popleft()
        worker.deadline = time.monotonic() + self.timeout + FLUSH_SECONDS
        for (i, path), error, view in zip(job, errors, views, strict=False):
            end = start if error else start + self.size**2
            self.answered[i] = Picture(path, block[start:end], error, view)
            start = end
        left = job[len(errors) :]
        part = -(-len(left) // self.limit) or 1
        self.jobs.extendleft(left[i : i + part] for i in reversed(range(0, len(left), part)))

    def _bury(self, worker: Worker, why: str) -> None:
        """Remove a worker that died or, for the reason given, has to; see to its pictures."""
        code, job = worker.end(), worker.given.popleft() if worker.given else []
        self.workers.remove(worker)
        self.jobs.extendleft(worker.given)
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == 3:
                raise Halt(f"the processes that read pictures don't start (exit code {code})")
        elif len(job) > 1:
            self.jobs.extendleft([numbered] for numbered in reversed(job))
        elif job:
            (i, path), cause = job[0], signal.strsignal(-code) if code and code < 0 else code
            died = "gave no answer that can be" if code is None else f"died ({cause})"
            self.answered[i] = Picture(path, b"", why or f"its decoder {died}")

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.end()


BLOCK = 64  # pictures: a batch is filled up to whole blocks, as kernels differ by batch size
KINDS = ("answered", "doubtful", "blank", "unreadable")


class Result(NamedTuple):
    """The answer for one picture; no character where there is none, and `error` says why."""

    path: str
    character: str = ""
    confidence: float = 0.0
    alternatives: tuple[tuple[str, float], ...] = ()  # the next likely; all, without an answer
    lookalike: str = ""  # the group, such as "1IL", that holds the two likeliest characters
    error: str = ""
    picture: Picture | None = None  # for the report

    @property
    def kind(self) -> str:
        """Return what the summary counts this under."""
        if self.character:
            return "answered"
        return "doubtful" if self.alternatives else "blank" if self.error == BLANK else "unreadable"


class Classifier:
    """A net made ready to answer, out of the characters of `alphabet`."""

    def __init__(self, net: "CNN.Net", alphabet: str, topk: int, minimum: float) -> None:
        self.device = net.fc2.weight.device
        self.characters = parse_alphabet(alphabet, net.alphabet)
        self.classes = [net.alphabet.index(character) for character in self.characters]
        self.temperature, self.topk, self.minimum = net.temperature, topk, minimum
        self.lookalikes = {a + b: g for g in net.lookalikes for a, b in permutations(g, 2)}
        self.logits = quickest(net)

    def answer(self, pictures: list[Picture]) -> list[Result]:
        """Classify pictures; those with an error keep it."""
        sound = [picture.ink for picture in pictures if not picture.error]
        answers = iter(self._likeliest(sound) if sound else ())
        results = []
        for picture in pictures:
            path, _, error, view = picture
            seen = picture if view else None
            if error:
                results.append(Result(path, error=error, picture=seen))
                continue
            ranked = next(answers)
            (best, confidence), others = ranked[0], ranked[1 : self.topk]
            pair = self.lookalikes.get(best + ranked[1][0], "") if len(ranked) > 1 else ""
            if confidence < self.minimum:
                error = f"no answer: {confidence:.4f} is below --min-confidence {self.minimum:g}"
                best, others = "", ranked[: self.topk]
            results.append(Result(path, best, confidence, others, pair, error, seen))
        return results

    def _likeliest(self, inks: list[bytes]) -> list[tuple[tuple[str, float], ...]]:
        """Return the likeliest characters, two or more, of each picture, with probabilities."""
        import torch

        from CNN import SIZE

        padding = bytes(-len(inks) % BLOCK * SIZE**2)
        pixels = torch.frombuffer(bytearray(b"".join([*inks, padding])), dtype=torch.uint8)
        with torch.inference_mode():
            images = pixels.view(-1, 1, SIZE, SIZE).to(self.device)
            logits = self.logits(images)[: len(inks), self.classes] / self.temperature
            top = logits.softmax(1).topk(min(max(2, self.topk), len(self.classes)))
        if not top.values.isfinite().all():
            raise Halt("--model: its weights give no finite answers: take others")
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [tuple(zip([self.characters[i] for i in r], p, strict=True)) for r, p in rows]


def quickest(net: "CNN.Net") -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """Return a net as a function from ink (N, 1, 28, 28) uint8 to logits, fit for its device."""
    import torch

    import CNN

    with suppress(ValueError):  # another net, or a CPU without such instructions
        return CNN.Int8Net(net)
    device = net.fc2.weight.device
    dtype = CNN.mixed_precision(device) if device.type == "cpu" else torch.float32
    fused = net.fused().to(dtype, memory_format=torch.channels_last)
    fused.fc2.float()  # the full resolution for probabilities
    fused.fc2.register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    return lambda images: fused(images.to(dtype) / 255)


def parse_alphabet(text: str, known: str) -> str:
    """Return the characters that --alphabet allows, in the order of `known`; case folds.

    text: characters and ranges such as A-F, in any mixture. Raises Halt for any not known.
    """
    allowed = set()
    folded = text.upper() if text.isascii() else text
    for match in re.finditer("(.)-(.)|(.)", folded, re.DOTALL):
        first, last = (match[1], match[2]) if match[1] else (match[3], match[3])
        if first not in known or last not in known or known.index(first) > known.index(last):
            raise Halt(f"--alphabet: {match[0]!r} is not a character or range of {known}")
        allowed.update(known[known.index(first) : known.index(last) + 1])
    if not allowed:
        raise Halt(f"--alphabet: empty, expected characters of {known}")
    return "".join(character for character in known if character in allowed)


def classify(
    pictures: Iterable[list[Picture]], classifier: Classifier, batch_size: int, threads: int
) -> Iterator[list[Result]]:
    """Yield the results of lists of pictures in their order, a few passes of the net at a time."""
    passes: deque[Future] = deque()
    gathered: list[Picture] = []
    with ThreadPoolExecutor(threads) as executor:
        for ready in pictures:
            gathered += ready
            while len(gathered) >= batch_size or (gathered and not ready):
                passes.append(executor.submit(classifier.answer, gathered[:batch_size]))
                del gathered[:batch_size]
            while passes and (passes[0].done() or len(passes) > 2 * threads):
                yield passes.popleft().result()
        passes.append(executor.submit(classifier.answer, gathered))
        while passes:
            yield passes.popleft().result()


UNPRINTABLE = re.compile(  # backslash, control characters and bytes that are not UTF-8
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str) -> str:
    """Return text as one line that can't steer a terminal, and never the same for two texts.

    A backslash is doubled, \\n and the like spelt out, \\x1b or \\xff a byte, \\u202e a character.
    """
    return UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code >= 0x80 else match[0].encode("unicode_escape").decode()


def ascii_line(result: Result) -> str:
    """Write as the origin did: ASCII code and path; `---` for an answer that is too doubtful."""
    if result.character:
        return f"{ord(result.character):03d}, {escaped(result.path)}\n"
    return f"---, {escaped(result.path)}\n" if result.kind == "doubtful" else ""


def csv_line(result: Result) -> str:
    """Write as a row of RFC 4180, with the bytes of the path as they are."""
    alternatives = " ".join(f"{character}:{p:.4f}" for character, p in result.alternatives)
    confidence = f"{result.confidence:.4f}" if result.confidence else ""
    path, error = (
        '"' + text.replace('"', '""') + '"' if CSV_SPECIAL.search(text) else text
        for text in (result.path, result.error)
    )
    return f"{path},{result.character},{confidence},{alternatives},{result.lookalike},{error}\n"


def json_line(result: Result) -> str:
    """Write as a JSON object; bytes of the path that are not UTF-8 as \\udc80 to \\udcff."""
    content = {
        "path": result.path,
        "character": result.character or None,
        "confidence": round(result.confidence, 4) or None,
        "alternatives": {character: round(p, 4) for character, p in result.alternatives},
        "lookalike": result.lookalike or None,
        "error": result.error or None,
    }
    return json.dumps(content) + "\n"


CSV_SPECIAL = re.compile('[,"\r\n]')
CSV_HEADER = "path,character,confidence,alternatives,lookalike,error\n"
LINES = {"ascii": ascii_line, "csv": csv_line, "json": json_line}


def partial(file: Path, flag: str) -> Path:
    """Return FILE.partial, which takes what becomes FILE when it is complete. Raises Halt."""
    file = Path(os.path.realpath(file))  # of a link, what it points to is replaced
    if file.exists() and not file.is_file():
        raise Halt(f"{flag} {file}: not a regular file, can't be replaced")
    if not os.access(file.parent, os.W_OK):
        raise Halt(f"{flag} {file}: its folder is missing or can't be written to")
    return file.with_name(file.name + ".partial")


def _lock(stream: IO[bytes], file: Path) -> None:
    """Hold what becomes FILE until it is closed, or two runs would mix their rows. Raises Halt."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Halt(f"--output {file}: another run is writing to it: wait, or stop it") from None
    except (ImportError, OSError):  # Windows, some network drives: nothing is held
        pass


class Output:
    """Writes results in order to stdout, or to FILE.partial, which becomes FILE when all is done.

    resume: go on with FILE.partial, or else FILE: what has no answer there is tried again, and at
    the end all rows come in the order of the listing, new ones in place of old. settings: what the
    answers depend on, by flag. Raises Halt if FILE.partial was begun with others.
    """

    def __init__(self, file: Path | None, form: str, resume: bool, settings: dict) -> None:
        self.form, self.size, self.failed = form, 0, 0  # size: bytes of the rows there already
        self.done: dict[str, bool] = {}  # the pictures they answer, and whether by a character
        self.places: dict[str, int] = {}  # in the listing, where there are such rows
        self.partial = partial(file, "--output") if file else None
        try:
            self.stream = self._open(resume, settings) if file else sys.stdout.buffer
        except OSError as error:
            raise Halt(f"--output {error.filename or file}: {error.strerror}") from None
        if form == "csv" and not self.size:
            self.stream.write(CSV_HEADER.encode())

    def _open(self, resume: bool, settings: dict) -> IO[bytes]:
        """Open FILE.partial after its last whole row; keep the settings beside it."""
        file, self.settings = self.partial.with_suffix(""), Path(f"{self.partial}.settings")
        source = self.partial if self.partial.exists() else file
        if resume and source.exists():
            # Of a complete file, or by a note that is not ours, nothing is known.
            with suppress(FileNotFoundError, ValueError, AttributeError):
                begun = json.loads(self.settings.read_text()) if source == self.partial else {}
                if others := [f"{k} {v}" for k, v in begun.items() if settings.get(k) != v]:
                    what = f"{source} was begun with {', '.join(others)}"
                    raise Halt(f"--resume: {what}: give the same again, or start without --resume")
            for _, end, path, character, alternatives in self._rows(source):
                self.size = end
                if character or alternatives:
                    self.done[path] = bool(character)
            if source == file:
                shutil.copyfile(file, self.partial)
        stream = open(self.partial, "ab")  # noqa: SIM115 - closed by finish
        _lock(stream, file)
        if stream.tell() and not self.size:
            print(f"inference.py: starting anew, not from {self.partial}", file=sys.stderr)
        stream.truncate(self.size)
        self.settings.write_text(json.dumps(settings))
        return stream

    def _rows(self, file: Path) -> Iterator[tuple]:
        """Yield start, end, path, character and alternatives of each whole row of a file."""
        start, row = 0, b""
        with open(file, "rb") as lines:
            for line in lines:
                row += line
                if not row.endswith(b"\n") or (self.form == "csv" and row.count(b'"') % 2):
                    continue  # torn, or a quoted path that goes on in the next line
                text, end = row.decode("utf-8", "surrogateescape"), start + len(row)
                yield start, end, *self._parse(text, f"{file}, byte {start}")
                start, row = end, b""

    def _parse(self, row: str, place: str) -> tuple:
        """Return path, character and alternatives, "" for none; of a header, no path."""
        with suppress(ValueError, KeyError, TypeError, AttributeError, csv.Error):
            if self.form == "json":
                content = json.loads(row)
                return str(content["path"]), content["character"], content["alternatives"]
            if self.form == "ascii":
                code, path = re.fullmatch("([0-9]{3}|---), (.+)\n", row).groups()
                return path, code.strip("-"), code
            if row == CSV_HEADER:
                return "", "", ""
            path, character, _, alternatives, _, _ = next(csv.reader([row]))
            if len(character) < 2:
                return path, character, alternatives
        what = f"no {self.form} row of this program: {escaped(row[:60])}"
        raise Halt(f"--resume: {place}: {what}")

    def holds(self, path: str) -> bool:
        """Tell whether there is an answer already for a path, which is the next of the listing."""
        if not self.size:
            return False
        path = escaped(path) if self.form == "ascii" else path
        self.places[path] = len(self.places)
        self.failed += not self.done.get(path, True)
        return path in self.done

    def write(self, results: list[Result]) -> None:
        """Write and flush, so that a run cut short leaves all it had."""
        text = "".join(map(LINES[self.form], results))
        self.stream.write(text.encode("utf-8", "surrogateescape"))
        self.stream.flush()

    def finish(self) -> None:
        """Give the file, now complete, its name."""
        self.stream.flush()
        if self.partial:
            os.fsync(self.stream.fileno())
            self.stream.close()
            if self.size:
                self._sort()
            self.partial.replace(self.partial.with_suffix(""))
            self.settings.unlink(missing_ok=True)

    def _sort(self) -> None:
        """Put the rows of FILE.partial in the order of the listing, the last for each picture."""
        rows = {
            path: (start, end)
            for start, end, path, *answer in self._rows(self.partial)
            if any(answer) or path in self.places or not path  # no errors of what is gone
        }
        ordered = Path(f"{self.partial}.ordered")
        with open(self.partial, "rb") as old, open(ordered, "wb") as new:
            for path in sorted(rows, key=lambda path: self.places.get(path, -1)):
                old.seek(rows[path][0])
                new.write(old.read(rows[path][1] - rows[path][0]))
            new.flush()
            os.fsync(new.fileno())
        ordered.replace(self.partial)


THUMBNAIL_SIDE = 96  # px


def thumbnail(picture: Image.Image) -> str:
    """Return a picture that `load` returned as a data URI, small enough for a page of thousands."""
    if picture.mode in ("I", "F"):
        picture = Image.fromarray(to_grey(picture))
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    form = "PNG" if picture.mode == "RGBA" or max(picture.size) < THUMBNAIL_SIDE // 2 else "JPEG"
    file = io.BytesIO()
    picture.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


class Report:
    """Writes a page for going through the results by eye; FILE only appears when all is done."""

    def __init__(self, file: Path | None) -> None:
        self.partial, self.rows = partial(file, "--report") if file else None, 0
        if self.partial:
            self.stream = open(self.partial, "w", encoding="ascii")  # noqa: SIM115
            head, self.foot = PAGE.split("ROWS")
            self.stream.write(head)

    def write(self, results: list[Result]) -> None:
        """Add results, as JSON that can't end the script element that it stands in."""
        for result in results if self.partial else ():
            _, ink, _, view = result.picture or Picture(result.path, b"", "")
            row = [escaped(result.path), *result[1:6], base64.b64encode(ink).decode(), view]
            text = json.dumps(row).replace("<", "\\u003c")
            self.stream.write((",\n" if self.rows else "") + text)
            self.rows += 1

    def finish(self) -> None:
        """Close the page and give it its name."""
        if self.partial:
            self.stream.write(self.foot)
            self.stream.close()
            self.partial.replace(self.partial.with_suffix(""))


class Talk:
    """What goes to stderr: one line for each error, on a terminal a bar, and the closing line."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.counts: Counter[str] = Counter()
        self.started = time.monotonic()
        self.bar = tqdm(unit=" pictures", leave=False, dynamic_ncols=True, disable=None)

    def follow(self, results: list[Result], say_errors: bool) -> None:
        """Count results and name those without an answer."""
        for result in results:
            self.counts[result.kind] += 1
            if say_errors and result.kind in ("blank", "unreadable"):
                self.say(f"{escaped(result.path)}: {result.error}")
        self.bar.update(len(results))

    def say(self, message: str) -> None:
        """Write a line, above the bar if there is one."""
        self.bar.clear()
        print(message, file=sys.stderr)

    def close(self, passed_over: Counter[str]) -> None:
        """Write the closing line."""
        seconds = time.monotonic() - self.started
        self.bar.close()
        total = self.counts.total()
        parts = [f"{self.counts[kind]:,} {kind}" for kind in KINDS if self.counts[kind]]
        parts += [f"{count:,} {kind} passed over" for kind, count in sorted(passed_over.items())]
        rate = f"{total / seconds:,.0f} pictures/s"
        self.say(f"{total:,} pictures: {', '.join(parts) or 'none found'} ({rate})")


ROUNDS = (64, 1024)  # pictures that a rank is dealt at a time under torchrun: at first, at most


class Ranks:
    """The processes of one torchrun; alone, without it."""

    def __init__(self) -> None:
        alone = "TORCHELASTIC_RUN_ID" not in os.environ  # schedulers set RANK for their own ends
        self.rank = 0 if alone else int(os.environ["RANK"])
        self.count = 1 if alone else int(os.environ["WORLD_SIZE"])

    def answers(
        self,
        listing: Iterator[tuple[str, str]],
        classified: Callable[[Iterator[tuple[str, str]]], Iterator[list[Result]]],
    ) -> Iterator[list[Result]]:
        """Yield all results in order on rank 0, nothing on the others.

        Rank 0 alone lists, and deals each rank a block of each round, so that all agree on what
        there is. A rank that dies closes its connections, which ends the others with an error.
        """
        if self.count == 1:
            yield from classified(listing)
            return
        from torch import distributed

        with _stdout_on_stderr():  # torch 2.10 greets there
            _together(distributed.init_process_group, "gloo", timeout=timedelta(days=1))
        last, size = False, ROUNDS[0]
        while not last:
            shares, dealt = None, [None]
            if self.rank == 0:
                blocks = [list(islice(listing, size)) for _ in range(self.count)]
                shares = [(block, len(blocks[-1]) < size) for block in blocks]
                size = min(2 * size, ROUNDS[1])
            _together(distributed.scatter_object_list, dealt, shares)
            block, last = dealt[0]
            own = [result for results in classified(iter(block)) for result in results]
            gathered: list | None = [None] * self.count if self.rank == 0 else None
            _together(distributed.gather_object, own, gathered)
            yield from gathered or ()
        distributed.destroy_process_group()


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send what libraries print to where talk belongs: stdout is for results."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _together(function: Callable, *arguments: object, **settings: object) -> None:
    """Call what all ranks have to call. Raises ConnectionError when one of them is lost."""
    try:
        function(*arguments, **settings)
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])[:80]  # less a source line
        raise ConnectionError(f"another process of this torchrun is lost ({reason})") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and a message where it is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, count = parser.add_argument, number(int, 1, 1_000_000)
    probability, seconds = number(float, 0, 1), number(float, 0.1, 1_000_000)
    model = Path(__file__).with_name("model.pt")
    add("--input", nargs="+", required=True, metavar="PATH", help="folders, pictures, or both")
    add("--model", type=Path, default=model, metavar="FILE", help="weights [model.pt beside this]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, or cpu]")
    add("--alphabet", default="0-9A-Z", metavar="CHARS", help="what can be answered [%(default)s]")
    add("--min-confidence", type=probability, default=0, metavar="P", help="below: no answer")
    add("--topk", type=count, default=3, metavar="K", help="characters in csv, json [%(default)s]")
    add("--format", choices=LINES, default="ascii", help="of the results [%(default)s]")
    add("--output", type=Path, metavar="FILE", help="where results go instead of stdout")
    add("--resume", action="store_true", help="go on where a run with this --output was cut short")
    add("--report", type=Path, metavar="FILE", help="a page for going through the pictures by eye")
    add("--batch-size", type=count, default=64, metavar="N", help="of the net [%(default)s]")
    add("--workers", type=count, default=share, metavar="N", help="to read [one per core]")
    add("--timeout", type=seconds, default=30, metavar="S", help="per picture [%(default)s s]")
    args = parser.parse_args(arguments)
    if args.resume and not args.output:
        parser.error("--resume needs the --output of the run that was cut short")
    if args.resume and args.report:
        parser.error("--report shows every picture, --resume skips some: leave one of them out")
    if args.format == "ascii" and not args.report and args.topk != parser.get_default("topk"):
        print("inference.py: --topk shows in --format csv and json, --report", file=sys.stderr)
    return args


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from low to high for argparse."""

    def parse_number(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return value

    parse_number.__name__ = "number"  # named in argparse's message for what is none
    return parse_number


def run(args: argparse.Namespace) -> int:
    """Classify everything in args.input; return the exit code, 0 or 1. Raises Halt."""
    for name in args.input:
        if not os.path.lexists(name):
            raise Halt(f"--input {escaped(name)}: no such file or folder")
    taken = {os.path.realpath(args.model)} | {
        os.path.realpath(name) for name in args.input if not os.path.isdir(name)
    }
    for file, flag in ((args.output, "--output"), (args.report, "--report")):
        if file:
            part = partial(file, flag)
            inside = file.suffix.lower() in SUFFIXES and file.exists()
            if inside or {os.path.realpath(file), str(part), f"{part}.settings"} & taken:
                name = escaped(str(file))
                raise Halt(f"{flag} {name}: would replace what is read: choose another")
            taken.add(os.path.realpath(file))
    with ThreadPoolExecutor(1) as beside, ExitStack() as stack:
        pool = beside.submit(Pool, args.workers, args.timeout, bool(args.report))
        stack.callback(lambda: pool.result().close())
        net = load_net(args.model, args.device)  # torch is imported while the pool starts
        classifier = Classifier(net, args.alphabet, args.topk, args.min_confidence)
        gc.freeze()  # nothing of torch is looked through again
        return answer_all(args, pool.result(), classifier, Ranks())


def answer_all(args: argparse.Namespace, pool: Pool, classifier: Classifier, ranks: Ranks) -> int:
    """Find, classify and write; return the exit code."""
    from CNN import SIZE

    def answer(listing: Iterator[tuple[str, str]]) -> Iterator[list[Result]]:
        return classify(pool.run(listing, SIZE), classifier, args.batch_size, args.workers)

    passed_over: Counter[str] = Counter()
    listing = find(args.input, passed_over)
    if ranks.rank > 0:
        deque(ranks.answers(listing, answer), maxlen=0)
        return 0
    noted = settings(args) if args.output else {}
    output = Output(args.output, args.format, args.resume, noted)
    report, talk = Report(args.report), Talk()
    if output.done:
        talk.say(f"{len(output.done):,} pictures are answered already")
    listing = (pair for pair in listing if not output.holds(pair[0]))
    for results in ranks.answers(listing, answer):
        output.write(results)
        report.write(results)
        talk.follow(results, say_errors=args.format == "ascii")
    output.finish()
    report.finish()
    talk.close(passed_over)
    return 1 if output.failed or talk.counts.total() > talk.counts["answered"] else 0


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return what the answers depend on besides the pictures and this program."""
    with open(args.model, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    given = {"--alphabet": args.alphabet, "--min-confidence": args.min_confidence}
    return {"--model of SHA-256": digest, "--topk": args.topk, "--format": args.format} | given


def load_net(path: Path, device: str) -> "CNN.Net":
    """Load the weights onto a device, which may be `auto`. Raises Halt."""
    import torch

    import CNN

    torch.set_num_threads(1)  # `classify` runs passes of the net side by side instead
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()  # which `meta` can't
    except (RuntimeError, AssertionError) as error:  # torch's, for a device that isn't there
        raise Halt(f"--device {device}: {str(error).splitlines()[0]}") from None
    try:
        return CNN.load(path, device)
    except OSError as error:
        raise Halt(f"--model {path}: {error.strerror}") from None
    except ValueError as error:
        raise Halt(f"--model {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    if sys.stderr is None:  # closed by whoever started this
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the end
    args = parse(arguments)
    if sys.stdout is None and not args.output:
        print("inference.py: stdout is closed: name a file with --output", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        return run(args)
    except Halt as reason:
        message, code = f"{reason}", 2
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        message = f"stopped by {signal.Signals(code - 128).name}" + _how_to_go_on(args)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError) as error:  # a full disk, a lost rank, a GPU without memory
        message, code = str(error).partition("\n")[0] + _how_to_go_on(args), 2
    print(f"inference.py: {message}", file=sys.stderr)
    return code


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _how_to_go_on(args: argparse.Namespace) -> str:
    if not args.output or not os.path.isfile(f"{os.path.realpath(args.output)}.partial"):
        return ""
    but = " and without --report" if args.report else ""
    return f"; the same command with --resume{but} goes on with {args.output}"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Characters, most doubtful first</title>
<style>
:root { color-scheme: light dark; --soft: light-dark(#5f6570, #9aa1ad);
  --line: light-dark(#d9dce1, #343840); --mark: light-dark(#0b62d6, #6db0ff) }
* { box-sizing: border-box }
body { margin: 0; font: 14px/1.4 system-ui, sans-serif }
body, header { background: light-dark(#fff, #16181c); color: light-dark(#1a1c20, #e8e9ec) }
header { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1.25rem;
  align-items: center; padding: .6rem 1rem; border-bottom: 1px solid var(--line) }
h1 { font-size: 1rem; margin: 0 }
small { margin-left: auto }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; font: inherit }
select, input { font: inherit; accent-color: var(--mark); vertical-align: middle }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .6rem;
  padding: 1rem }
article { display: grid; grid-template-columns: 96px 84px 1fr; gap: .2rem .7rem; padding: .6rem;
  border: 1px solid var(--line); border-radius: 8px; background: light-dark(#f6f7f9, #1e2126);
  content-visibility: auto; contain-intrinsic-size: auto 150px; scroll-margin: 4.5rem 0 1rem }
article:focus { outline: 2px solid var(--mark); outline-offset: 1px }
figure { margin: 0; height: 96px; display: grid; place-items: center }
figure > * { max-width: 100%; max-height: 96px; image-rendering: pixelated }
img { min-width: 56px; object-fit: contain }
canvas { width: 84px; height: 84px; border: 1px solid var(--line) }
b { font: 600 2.4rem/1 ui-monospace, monospace; display: block }
meter { width: 100% }
.doubt b { color: #d9822b }
.soft { color: var(--soft); overflow-wrap: anywhere }
.path { grid-column: 1 / -1; font-size: 12px }
</style>
<header>
<h1 id="count"></h1>
<label>Answer <select id="answer"><option value="">all</option></select></label>
<label>Confidence at most <input id="doubt" type="range" min="0" max="1" step="0.01" value="1">
<output id="limit"></output></label>
<label><input id="alike" type="checkbox"> look-alikes only</label>
<label>Order <select id="order"><option value="2">doubt</option><option value="0">path</option>
<option value="1">answer</option></select></label>
<small class="soft"><kbd>j</kbd> <kbd>k</kbd> or arrows: move, <kbd>a</kbd> answer,
<kbd>d</kbd> doubt, <kbd>Esc</kbd> back</small>
</header>
<main id="list"></main>
<p id="end"></p>
<script type="application/json" id="rows">[
ROWS
]</script>
<script>
"use strict"
const get = id => document.getElementById(id), list = get("list"), step = 120
const rows = JSON.parse(get("rows").textContent)
const percent = p => (100 * p).toFixed(1) + "\\u00a0%"
const kind = ([, character, , others, , error]) => character
  || (others.length ? "no answer" : error.startsWith("blank") ? "blank" : "unreadable")
const soft = textContent => ({ textContent, className: "soft" })
const add = (parent, name, properties) =>
  Object.assign(parent.appendChild(document.createElement(name)), properties)
let shown = [], built = 0

function addCard(row) {
  const [path, character, confidence, others, alike, error, ink, view] = row
  const article = add(list, "article", { tabIndex: -1, className: confidence < 0.9 ? "doubt" : "",
    ariaLabel: `${kind(row)}, ${percent(confidence)}, ${path}` })
  const [left, middle, right] = ["figure", "figure", "div"].map(name => add(article, name))
  if (view) add(left, "img", { src: view, alt: "as it came" })
  if (ink) {
    const pixels = Array.from(atob(ink), c => c.charCodeAt(0)), side = Math.sqrt(pixels.length)
    const levels = Uint8ClampedArray.from(pixels.flatMap(level => [level, level, level, 255]))
    const canvas = add(middle, "canvas", { width: side, height: side })
    canvas.getContext("2d").putImageData(new ImageData(levels, side), 0, 0)
  }
  add(right, "b", { textContent: character || "\\u2013" })
  if (confidence) {
    add(right, "meter", { value: confidence })
    add(right, "span", { textContent: percent(confidence) + " " })
    add(right, "span", soft(others.map(([c, p]) => `${c}\\u00a0${percent(p)}`).join(", ")))
  }
  if (alike) add(right, "div", soft(`${[...alike].join(", ")} look alike`))
  if (error) add(right, "div", soft(error))
  add(article, "div", { textContent: path, className: "soft path" })
}
const more = () => shown.slice(built, built += step).forEach(addCard)
function show() {
  const answer = get("answer").value, doubt = +get("doubt").value, by = +get("order").value
  get("limit").value = percent(doubt)
  shown = rows.filter(row => (!answer || kind(row) === answer) && row[2] <= doubt
    && (row[4] || !get("alike").checked))
  shown.sort((a, b) => (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : a[2] - b[2]))
  get("count").textContent = `${shown.length} of ${rows.length} pictures`
  list.replaceChildren()
  built = 0
  more()
  scrollTo(0, 0)
}
function move(by) {
  const cards = list.children, now = [...cards].indexOf(document.activeElement)
  const next = now < 0 ? 0 : Math.max(0, now + by)
  if (next >= cards.length - 1) more()
  cards[next]?.focus({ preventScroll: true })
  cards[next]?.scrollIntoView({ block: "nearest" })
}
for (const value of [...new Set(rows.map(kind))].sort())
  add(get("answer"), "option", { value, textContent: value })
for (const id of ["answer", "doubt", "alike", "order"]) get(id).addEventListener("input", show)
addEventListener("keydown", event => {
  const wide = getComputedStyle(list).gridTemplateColumns.split(" ").length
  const moves = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide }
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (event.key === "Escape") move(0)
  else if (event.target.matches("select, input")) return
  else if (event.key === "a") get("answer").focus()
  else if (event.key === "d") get("doubt").focus()
  else if (event.key in moves) move(moves[event.key])
  else return
  event.preventDefault()
})
new IntersectionObserver(seen => seen[0].isIntersecting && more(), { rootMargin: "1500px" })
  .observe(get("end"))
show()
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
