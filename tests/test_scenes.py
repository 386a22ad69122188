"""Pictures as phones and forms bring them: other readings are proposed, and the net chooses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import strokes
from PIL import Image, ImageDraw

import inference
from inference import Candidate, Classifier, choose
from picture import Reading, find_lines, propose

CHARACTERS = "23456789ABCDEFHKMNPRTUWXY"  # without look-alikes
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


def underlined(character: str) -> np.ndarray:
    grey = cell(character, 160, 80)
    return drawn_over(grey, lambda pen: pen.line((35, 138, 125, 140), fill=45, width=4))


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


KINDS = [
    framed,
    small_framed,
    crossed_by_a_rule,
    on_its_box,
    circled,
    underlined,
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
        right.setdefault(name[2:], []).append(answer == name[0])
    fractions = {kind: np.mean(of_kind) for kind, of_kind in right.items()}
    assert len(fractions) == len(KINDS)
    assert min(fractions.values()) >= 0.75, fractions
    assert np.mean(list(fractions.values())) >= 0.88, fractions


def test_what_holds_no_character_is_blank(tmp_path, capfd):
    box = np.full((60, 48), PAPER)
    for name, sides in {"one": "l", "three": "tlr", "four": "tblr", "other": "b"}.items():
        grey = box.copy()
        for side in sides:
            part = {"t": np.s_[:2], "b": np.s_[-2:], "l": np.s_[:, :2], "r": np.s_[:, -2:]}[side]
            grey[part] = 60
        save(grey, tmp_path / f"{name}.png")
    inset = drawn_over(box, lambda pen: pen.rectangle((4, 4, 43, 55), outline=60, width=2))
    save(inset, tmp_path / "inset.png")
    rule = drawn_over(box, lambda pen: pen.line((0, 50, 47, 50), fill=60, width=2))
    save(rule, tmp_path / "rule.png")
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    save(PAPER * (1 - 0.4 / (1 + np.exp(-(x + y / 2) / 0.03))), tmp_path / "shadow.png")
    assert set(answers(tmp_path, capfd).values()) == {None}


def test_an_l_cut_tight_is_no_frame(tmp_path, capfd):
    grey = np.full((90, 60), PAPER)
    grey[:, :9] = INK
    grey[-9:] = INK
    save(grey, tmp_path / "L.png")
    assert answers(tmp_path, capfd) == {"L": "L"}


def test_lines_are_straight_long_thin_and_at_the_rim_or_across():
    mask = np.zeros((100, 100), np.uint8)
    mask[10:12] = 1  # a rule, from border to border
    mask[:, 95:97] = 1  # the side of a box
    mask[30:70, 50:54] = 1  # a stroke: short
    mask[50:90, 5:40] = 1  # a blot: thick
    lines, is_corner = find_lines(mask)
    expected = np.zeros_like(mask)
    expected[10:12] = 1
    expected[:, 95:97] = 1
    assert np.array_equal(lines, expected)
    assert is_corner, "two lines, one lying and one upright, may be an L or a 7"


def test_a_tidy_picture_has_few_other_readings(tmp_path):
    save(cell("K", 120, 80), tmp_path / "K.png")
    readings = propose(str(tmp_path / "K.png"), 28)
    assert 1 <= len(readings) <= 4
    assert all(one.image is None or one.image.shape == (28, 28) for one in readings)


def candidate(character: str, score: float) -> Candidate:
    return Candidate(np.zeros((28, 28), np.uint8), ((character, 0.9),), distance=1.0, score=score)


def test_the_reading_with_the_best_score_is_chosen():
    first = candidate("0", -11)
    other = candidate("7", -9)
    assert choose(first, [other]) is other
    assert choose(first, [candidate("7", -12)]) is first
    assert choose(first, []) is first


def test_a_picture_is_blank_where_all_other_readings_are():
    assert choose(candidate("0", -1), [None, None]) is None


def test_where_a_reading_is_blank_an_image_has_to_look_like_a_character():
    good = candidate("7", -13.9)
    poor = candidate("7", -14.1)
    assert choose(poor, [None, good]) is good
    assert choose(poor, [None, poor]) is None
    assert choose(None, [good]) is good, "the first reading was blank"
    assert choose(None, [poor]) is None


def test_a_penalty_is_taken_off_the_score(weights):
    classifier = Classifier(inference.parse(["--input", "x", "--model", str(weights)]))
    image = np.uint8(strokes.ink("K", strokes.hand(1), (28, 28), longest=22) * 255)
    plain, doubtful = classifier.judge(["x", "x"], [Reading(image), Reading(image, penalty=3.0)])
    assert plain.score - doubtful.score == pytest.approx(3)
    assert plain.ranked == doubtful.ranked
