"""The reader of UNIPEN's format, on a small distribution of what is odd in the real one."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from images_for_readme import unipen

HEADER = """.COMMENT a block of text
    with an indented .PEN_DOWN
 1 2 3 and numbers
.COORD X Y T
.X_POINTS_PER_INCH 100
.Y_POINTS_PER_INCH 200
"""
PEN = """.INCLUDE TST/head.DOC
.WRITER_ID ann
.PEN_DOWN
0 0 1 0 10 2
0 20 3
.PEN_UP
.PEN_DOWN
5 0 4
10 0 5
.PEN_UP
10 0 6
.WRITER_ID bob
.PEN_DOWN
10 20 7
15 20 8
20 20 9
"""


def segment(extent: str, label: str) -> str:
    return f'.SEGMENT CHARACTER {extent} ? "{label}"\n'


def write(folder: Path, segments: str, provider: str = "tst") -> Path:
    """Write a distribution of one file with these segments."""
    start = f".VERSION 1.0\n.INCLUDE {provider}/data/pen.dat\n"
    for path, text in {
        f"include/{provider}/Head.doc": HEADER,
        f"include/{provider}/data/pen.dat": PEN.replace("TST", provider.upper()),
        f"data/1b/{provider}/pen.dat": start + segments,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def read(folder: Path, provider: str = "tst") -> list[unipen.Character]:
    included = folder / "include"
    names = {str(path.relative_to(included)).lower(): path for path in included.rglob("*.*")}
    return unipen.read_characters(folder / "data/1b" / provider / "pen.dat", provider, names)


def strokes_of(folder: Path, extent: str) -> list[list[tuple[float, float]]]:
    (character,) = read(write(folder, segment(extent, "A")))
    return [list(map(tuple, stroke.tolist())) for stroke in character.strokes]


A, B, C = [(0, 0), (0, -10), (0, -20)], [(10, 0), (20, 0)], [(20, -20), (30, -20), (40, -20)]


@pytest.mark.parametrize(
    ("extent", "strokes"),
    [
        ("0-1", [A, B]),
        ("1-3", [B, C]),  # 2 is a pen-up: the empty one before it does not count
        ("0,3", [A, C]),
        ("0:1-1:0", [A[1:], B[:1]]),
    ],
)
def test_segments_name_components_or_points(tmp_path, extent, strokes):
    assert strokes_of(tmp_path, extent) == strokes


def test_neighbours_of_one_label_are_left_out_of_ibm(tmp_path):
    segments = segment("0", "E") + segment("1", "E") + segment("3", "E")
    assert list(read(write(tmp_path, segments, "ibm"), "ibm")) == []
    assert len(list(read(write(tmp_path, segments)))) == 3
    apart = segment("0", "E") + segment("3", "E")
    assert len(list(read(write(tmp_path, apart, "ibm"), "ibm"))) == 2


def test_a_character_is_drawn_upright_with_its_pen():
    stem = np.array([(0, 0), (0, -100)], float)
    foot = np.array([(0, 0), (60, 0)], float)
    picture = unipen.draw(unipen.Character("L", "writer", [stem, foot]), pen_width=0.1)
    x, y, width, height = cv2.boundingRect(np.uint8(picture < 128))
    assert picture[0, 0] == 255
    assert (height, width) == pytest.approx((66, 42), abs=2)  # 60 and 36 px and the pen's 6
    ink = (picture < 128)[y : y + height, x : x + width]
    assert ink[4:-4, 2].all()  # the stem is to the left
    assert ink[-3, 4:-4].all()  # and the foot below
    assert not ink[: height // 2, width // 2 :].any()


def test_pictures_lie_in_folders_of_their_class_and_writers_are_balanced(
    tmp_path, monkeypatch, capsys
):
    write(tmp_path, segment("0-1", "a") * 9 + segment("1-3", "B") * 3)
    monkeypatch.setattr(unipen, "WRITER_LIMIT", 5)
    monkeypatch.setattr("sys.argv", ["unipen.py", str(tmp_path), str(tmp_path / "pictures")])
    unipen.main()
    names = sorted(path.name for path in (tmp_path / "pictures" / "A").iterdir())
    assert len(names) + len(list((tmp_path / "pictures").glob("B/*.png"))) == 5
    assert capsys.readouterr().out.startswith("5 pictures of 1 writers in ")
    listed = list(train.list_extra(tmp_path / "pictures" / "pictures.csv"))
    by_folder = train.list_extra(tmp_path / "pictures")
    assert [row[:2] for row in listed] == [row[:2] for row in by_folder]
    assert {writer for _, _, writer in listed} == {"tst_ann"}
