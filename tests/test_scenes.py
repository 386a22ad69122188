"""Pictures as phones and forms bring them: other readings are proposed, and the net chooses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import strokes
from PIL import Image, ImageDraw

import inference
from images_for_readme import study
from picture import WEIGHTS

CHARACTERS = "247ABEFKTX"
MERGED = str.maketrans("OIL", "011")  # what nobody can tell apart alone
PAPER = 240.0
INK = 45.0


def cell(character: str, side: int, longest: float) -> np.ndarray:
    """Draw a character in the middle of a square of paper."""
    writer = strokes.hand(ord(character), 0.09)
    return PAPER + (INK - PAPER) * strokes.ink(character, writer, (side, side), longest=longest)


def drawn_over(grey: np.ndarray, draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    image = Image.fromarray(grey.astype(np.uint8))
    draw(ImageDraw.Draw(image))
    return np.asarray(image, float)


def framed(character: str) -> np.ndarray:
    grey = cell(character, 56, 31)
    return drawn_over(grey, lambda pen: pen.rectangle((0, 0, 55, 55), outline=40, width=3))


def small_framed(character: str) -> np.ndarray:
    grey = cell(character, 20, 11)
    return drawn_over(grey, lambda pen: pen.rectangle((0, 0, 19, 19), outline=80))


def crossed_by_a_rule(character: str) -> np.ndarray:
    grey = cell(character, 160, 96)
    return drawn_over(grey, lambda pen: pen.line((0, 85, 159, 85), fill=60, width=2))


def on_its_box(character: str) -> np.ndarray:
    grey = cell(character, 100, 66)
    bottom = int(np.flatnonzero((grey < 140).any(1))[-1])
    return drawn_over(grey, lambda pen: pen.rectangle((8, 8, 91, bottom), outline=60, width=2))


def circled(character: str) -> np.ndarray:
    grey = cell(character, 160, 80)
    return drawn_over(grey, lambda pen: pen.ellipse((12, 12, 147, 147), outline=45, width=4))


def shadowed(character: str) -> np.ndarray:
    grey = cell(character, 240, 140)
    y, x = np.mgrid[-1:1:240j, -1:1:240j]
    return grey * (1 - 0.5 / (1 + np.exp(-(x + 0.4 * y) / 0.02)))


def on_a_table(character: str) -> np.ndarray:
    card = Image.fromarray(cell(character, 180, 108).astype(np.uint8))
    table = Image.new("L", (260, 260), 80)
    turned = card.convert("RGBA").rotate(6, expand=True)
    table.paste(turned.convert("L"), (35, 35), turned.getchannel("A"))
    return np.asarray(table, float)


def with_clutter(character: str) -> np.ndarray:
    grey = cell(character, 120, 60)
    return drawn_over(grey, lambda pen: [pen.ellipse((x, 6, x + 9, 15), fill=45) for x in (8, 102)])


def in_a_corner(character: str) -> np.ndarray:
    grey = cell(character, 80, 48)
    return drawn_over(grey, lambda pen: pen.line((2, 0, 2, 76, 79, 76), fill=45, width=4))


def beside_a_bar(character: str) -> np.ndarray:
    faint = PAPER - (PAPER - cell(character, 72, 40)) / 2
    return drawn_over(faint, lambda pen: pen.rectangle((0, 0, 71, 6), fill=20))


def two_levels(character: str) -> np.ndarray:
    ink = strokes.ink(character, strokes.hand(ord(character), 0.1), (28, 28), longest=24)
    return np.where(ink > 0.5, 0.0, 255.0)


def small_in_a_photograph(character: str) -> np.ndarray:
    page = np.zeros((300, 400))
    page[150:175, 250:275] = strokes.ink(character, strokes.hand(ord(character)), (25, 25))
    photograph = strokes.photograph(page, np.random.default_rng(1)).resize((1200, 900))
    return np.asarray(photograph.convert("L"), float)


def cut_tight(character: str, length: int = 90, pen: float = 0.09) -> np.ndarray:
    ink = strokes.ink(character, strokes.hand(ord(character), pen), (200, 200))
    box = Image.fromarray(ink > 0.4).getbbox()
    cut = Image.fromarray(ink).crop(box)
    size = [max(2, round(side * length / max(cut.size))) for side in cut.size]
    return PAPER + (INK - PAPER) * np.asarray(cut.resize(size, Image.Resampling.BOX))


def thumbnail_cut_tight(character: str) -> np.ndarray:
    return cut_tight(character, 12 + ord(character) % 12, pen=0.15)


def negative_cut_tight(character: str) -> np.ndarray:
    return 255 - thumbnail_cut_tight(character)


KINDS = [
    small_in_a_photograph,
    cut_tight,
    thumbnail_cut_tight,
    negative_cut_tight,
    with_clutter,
    in_a_corner,
    beside_a_bar,
    two_levels,
    framed,
    small_framed,
    crossed_by_a_rule,
    on_its_box,
    circled,
    shadowed,
    on_a_table,
]


def save(grey: np.ndarray, path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 2, grey.shape)
    Image.fromarray((grey + noise).clip(0, 255).astype(np.uint8)).save(path)


def answers(folder: Path, capfd: pytest.CaptureFixture) -> dict[str, str | None]:
    """Return the answers by the picture's name, without its suffix."""
    inference.main(["--input", str(folder), "--no-adapt", "--format", "json"])
    rows = map(json.loads, capfd.readouterr().out.splitlines())
    return {Path(row["path"]).stem: row["character"] for row in rows}


def test_characters_are_read_whatever_is_around_them(tmp_path, capfd):
    for kind in KINDS:
        for character in CHARACTERS:
            save(kind(character), tmp_path / f"{character}-{kind.__name__}.png")
    right: dict[str, list[bool]] = {}
    for name, answer in answers(tmp_path, capfd).items():
        is_right = (answer or "").translate(MERGED) == name[0].translate(MERGED)
        right.setdefault(name[2:], []).append(is_right)
    fractions = {kind: np.mean(of_kind) for kind, of_kind in right.items()}
    assert len(fractions) == len(KINDS)
    assert min(fractions.values()) >= 0.75, fractions
    assert np.mean(list(fractions.values())) >= 0.93, fractions


def test_what_holds_no_character_is_blank(tmp_path, capfd):
    box = np.full((60, 48), PAPER)
    for name, sides in {"one": "l", "three": "tlr", "four": "tblr"}.items():
        grey = box.copy()
        for side in sides:
            part = {"t": np.s_[:2], "b": np.s_[-2:], "l": np.s_[:, :2], "r": np.s_[:, -2:]}[side]
            grey[part] = 60
        save(grey, tmp_path / f"{name}.png")
    inset = drawn_over(box, lambda pen: pen.rectangle((4, 4, 43, 55), outline=60, width=2))
    save(inset, tmp_path / "inset.png")
    corner = drawn_over(box, lambda pen: pen.line((3, 0, 3, 55, 47, 55), fill=60, width=3))
    save(corner, tmp_path / "corner.png")
    rule = drawn_over(box, lambda pen: pen.line((0, 50, 47, 50), fill=60, width=2))
    save(rule, tmp_path / "rule.png")
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    save(PAPER * (1 - 0.4 / (1 + np.exp(-(x + y / 2) / 0.03))), tmp_path / "shadow.png")
    assert set(answers(tmp_path, capfd).values()) == {None}


def test_weights_are_those_of_the_record():
    weights = study.read_records()["readings"]["weights"]
    known = {"log_p": inference.LOG_P_WEIGHT, "distance": inference.DISTANCE_WEIGHT}
    assert weights == known | WEIGHTS._asdict()


def test_doubt_between_readings_is_doubt_of_the_answer(tmp_path, capfd):
    two = np.concatenate([cell("E", 80, 60), cell("K", 80, 60)], axis=1)
    save(two, tmp_path / "two.png")
    inference.main(["--input", str(tmp_path), "--no-adapt", "--format", "json"])
    row = json.loads(capfd.readouterr().out)
    assert (row["confidence"] or 0) < 0.9 or row["error"]
