"""What the study measures of a weights file, mostly by running inference.py on labelled pictures.

A labelled set is a folder SET/CHARACTER/PICTURE; ../shared/field holds thirteen of them. The scores
of a set are these also in the tests and the benchmarks.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import CNN
import train
from images_for_readme.codes import BEHIND, LEAD, choose, join, read_forms, score_all

ROOT = Path(__file__).resolve().parents[1]

# Scores

MERGED = str.maketrans("OIL", "011")  # what nobody can tell apart alone
SCORES = ("accuracy", "alike", "alphabet")
CLASSIFY = """import inference, json, sys
from images_for_readme import original
original.register()
for arguments in json.load(sys.stdin):
    if inference.main(arguments) > 1:  # 1: some pictures have no answer
        sys.exit("inference.py has failed")
"""


def classify(folders: Iterable[Path], *flags: str) -> list[list[dict]]:
    """Run inference.py on each folder, all in one process; return the rows of each."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        files = []
        for number, folder in enumerate(folders):
            files.append(Path(scratch, f"{number}.json"))
            output = ["--format", "json", "--topk", "36", "--output", str(files[-1])]
            runs.append(["--input", str(folder), *output, *flags])
        command = [sys.executable, "-c", CLASSIFY]
        subprocess.run(command, cwd=ROOT, check=True, text=True, input=json.dumps(runs))
        return [read_rows(file.read_text()) for file in files]


def read_rows(text: str) -> list[dict]:
    """Return the rows of `--format json`, each with its truth: the name of the picture's folder."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [row | {"truth": Path(row["path"]).parent.name} for row in rows]


def find_alphabet(folder: Path) -> str:
    """Return the --alphabet of a labelled set, by the names of its folders."""
    labels = "".join(path.name for path in folder.iterdir())
    if labels.isdigit():
        return "0-9"
    return "A-Z" if labels.isalpha() else "0-9A-Z"


def accuracy(rows: list[dict], merged: dict[int, str] | None = None) -> float:
    """Return how many answers are right, per cent; a picture without an answer is wrong."""
    right = 0
    for row in rows:
        answer = row["character"] or ""
        right += answer.translate(merged or {}) == row["truth"].translate(merged or {})
    return 100 * right / len(rows)


def score(rows: list[dict], told: list[dict]) -> dict[str, float]:
    """Return the SCORES of a labelled set, per cent.

    accuracy: of all answers. alike: the same with 0/O and 1/I/L counted as one character each.
    alphabet: of `told`, the rows of a run with the set's --alphabet.
    """
    values = (accuracy(rows), accuracy(rows, MERGED), accuracy(told))
    return dict(zip(SCORES, values, strict=True))


def calibration_error(rows: list[dict]) -> float:
    """Return the expected calibration error of the answers, a fraction."""
    answered = [row for row in rows if row["character"]]
    confidence = torch.tensor([row["confidence"] for row in answered])
    right = torch.tensor([float(row["character"] == row["truth"]) for row in answered])
    return CNN.calibration_error(confidence, right)


def doubt(rows: list[dict]) -> list[dict]:
    """Return what each --min-confidence leaves, and how much of that is right, per cent."""
    entries = []
    for threshold in (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        answered = [row for row in rows if row["character"] and row["confidence"] >= threshold]
        entry = {"threshold": f"{threshold:g}", "answered": 100 * len(answered) / len(rows)}
        entries.append(entry | {"right": accuracy(answered)})
    return entries


# Parts: each returns what it was measured on, and what was found, for a record

SIDES = (28, 20, 14, 10, 8, 7)  # px, to which test pictures are shrunk
SINGLE_CLASS = 15  # pictures: a smaller class says too little about a folder of one class
FIRST_SETS = (  # which records before 2026-11-28 are of
    "chars74k_hnd chars74k_hnd_rerendered chars74k_trj_thin hwd1000_canvas28 kassel16x8 "
    "optdigits32 optdigits8 tama_canvas"
).split()
FIRST_MEAN = "mean of the first eight"
STAND_IN = """import os, sys
os.execv(sys.executable, [sys.executable, {script!r}, *sys.argv[1:], *{flags!r}])
"""


def write_test(folder: Path, test: CNN.Split, side: int) -> Path:
    """Write EMNIST's test pictures as inference.py may meet them, into folders by character."""
    for number, (image, label) in enumerate(zip(test.images.numpy(), test.labels, strict=True)):
        file = folder / CNN.ALPHABET[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((side, side)).save(file)
    return folder


def shipped(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on EMNIST's test: by the net in float32, and by inference.py."""
    net = CNN.load(args.model)
    test = train.read_emnist(args.data, train=False)
    logits = CNN.predict(net, test.images)[0] / net.card.temperature
    (rows,) = classify([write_test(scratch, test, CNN.SIZE)], *args.flags)
    content = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "bytes": args.model.stat().st_size,
        "temperature": net.card.temperature,
        "validation": net.card.metrics["validation"],
        "test": CNN.compute_metrics(logits, test.labels),
        "through_inference": score(rows, rows),
        "confusion": CNN.count_confusions(logits, test.labels).tolist(),
        "doubt": doubt(rows),
    }
    return f"{len(rows):,} test pictures of the EMNIST sample", content


def field(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on labelled sets, each by a run of its own; the last row is their mean.

    The row before it, for comparing with older records, is the mean of FIRST_SETS.
    """
    folders = [path for path in sorted(args.field.resolve().iterdir()) if path.is_dir()]
    rows = []
    pooled = []
    for folder, answers in zip(folders, classify(folders, *args.flags), strict=True):
        (told,) = classify([folder], "--alphabet", find_alphabet(folder), *args.flags)
        row = {"set": folder.name, "pictures": len(answers), **score(answers, told)}
        rows.append(row | {"ECE": calibration_error(answers)})
        pooled += answers
    first = [row for row in rows if row["set"] in FIRST_SETS]
    means = [average(first, FIRST_MEAN)] if len(first) == len(FIRST_SETS) else []
    data = f"{len(pooled):,} pictures of {len(folders)} field sets"
    return data, {"rows": [*rows, *means, average(rows, "mean of sets")], "doubt": doubt(pooled)}


def average(rows: list[dict], name: str) -> dict:
    """Return the row that is the mean of the rows of some sets."""
    mean = {key: np.mean([row[key] for row in rows]) for key in (*SCORES, "ECE")}
    return {"set": name, "pictures": sum(row["pictures"] for row in rows), **mean}


def alone(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on labelled sets, each picture judged alone."""
    args.flags.append("--no-adapt")
    return field(args, scratch)


def single(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on folders of a single class, adapted to each and not."""
    (rows,) = classify(
        [args.field.resolve()], "--no-adapt", *args.flags
    )  # no neighbour has a say here
    rows_by_folder: dict[Path, list[dict]] = {}
    for row in rows:
        rows_by_folder.setdefault(Path(row["path"]).parent, []).append(row)
    alone = {
        folder: accuracy(rows)
        for folder, rows in rows_by_folder.items()
        if len(rows) >= SINGLE_CLASS
    }
    adapted = [accuracy(rows) for rows in classify(alone, *args.flags)]
    lost = {folder: alone[folder] - right for folder, right in zip(alone, adapted, strict=True)}
    worst = [folder for folder in alone if lost[folder] > 10]
    row = {
        "classes": len(alone),
        "adapted, %": np.mean(adapted),
        "alone, %": np.mean([*alone.values()]),
        "lose more than 3 points": sum(points > 3 for points in lost.values()),
        "lose more than 10": ", ".join(f"{f.parent.name}/{f.name} {lost[f]:.0f}" for f in worst),
    }
    return f"{len(alone)} classes of the field sets, each a folder", {"rows": [row]}


def score_drawn(script: Path, args: argparse.Namespace, scratch: Path) -> list[str]:
    """Draw pictures into scratch/drawn and score them, both by a script of ../shared.

    It scores the inference.py of the folder that it is started in: one that adds our flags. Returns
    the lines that it prints.
    """
    draw = [sys.executable, str(script.resolve())]
    drawn = str(scratch / "drawn")
    subprocess.run([*draw, drawn], cwd=ROOT, check=True)
    stand_in = STAND_IN.format(script=str(ROOT / "inference.py"), flags=args.flags)
    (scratch / "inference.py").write_text(stand_in)
    command = [*draw, "--score", drawn]
    run = subprocess.run(command, cwd=scratch, check=True, text=True, stdout=subprocess.PIPE)
    return run.stdout.splitlines()


def scenes(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Draw scenes and score them."""
    *lines, means = score_drawn(args.scenes, args, scratch)
    pairs = [line.split() for line in lines]
    rows = [{"kind": kind, "right, %": float(right)} for kind, right in pairs]
    means = {group: float(right) for group, right in re.findall(r"(\w+) ([\d.]+)", means)}
    return "scenes drawn by ../shared/scenes/draw.py", {"rows": rows, "means": means}


FORM_SCORES = ("right, %", "of whole ones, %", "called blank, %", "empty ones answered, %")
DPI = (100, 150, 200, 300)
GRID_MM = (0, 0.25, 0.5, 0.75, 1)  # by which the grid that cuts a form is off, in x and in y


def forms(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Draw rows of boxes and score their cells, by kind of box; the last row is the kinds' mean."""
    by_kind: dict[str, list] = {}
    for line in score_drawn(args.forms, args, scratch)[1:-1]:
        kind, part, *scores = line.split()
        if kind != "mean" or part == "all":
            by_kind.setdefault(kind, []).append([float(text) for text in scores])
    rows = []
    for kind, scores_of_fields in by_kind.items():
        row: dict = {"boxes": kind}
        for key, value in zip(FORM_SCORES, np.mean(scores_of_fields, axis=0), strict=True):
            row[key] = "" if np.isnan(value) else value  # of the control no box is empty
        rows.append(row)
    return "forms drawn by ../shared/forms/draw.py", {"rows": rows}


def cells(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Draw the same rows of thin boxes, each time with one thing the same in all of them."""
    sys.path.insert(0, str(args.forms.resolve().parent))
    drawing = importlib.import_module(args.forms.stem)
    hands = drawing.read_hands(scratch / "hands.pickle")
    changes = list_changes(drawing)
    for name, (patches, off) in changes.items():
        with patch.multiple(drawing, **patches):
            thin = {"thin": drawing.KINDS["thin"]}
            drawing.draw(scratch / name, hands, thin, off=off)
    rows = [{"the same in all": name} for name in changes]
    for part, alphabet in drawing.ALPHABETS.items():
        folders = [scratch / name / "thin" / part for name in changes]
        runs = classify(folders, "--alphabet", alphabet, *args.flags)
        for row, answers in zip(rows, runs, strict=True):
            truths = [Path(answer["path"]).stem[-1] for answer in answers]
            pairs = zip(answers, truths, strict=True)
            filled = [answer | {"truth": truth} for answer, truth in pairs if truth not in "_-"]
            row[f"{part}, %"] = accuracy(filled, MERGED)
    for row in rows:
        row["mean, %"] = np.mean([value for value in row.values() if isinstance(value, float)])
    return "thin boxes drawn by ../shared/forms/draw.py, by 24 writers", {"rows": rows}


def list_changes(drawing: ModuleType) -> dict[str, tuple[dict, tuple]]:
    """Return what is the same in all rows drawn: how draw.py is patched, and its grid, in px."""
    plain = (2, 6)  # px of 200 dpi: draw.py's own
    unchanged = {"Row": drawing.Row}
    changes: dict[str, tuple[dict, tuple]] = {"nothing": (unchanged, plain)}
    for dpi in DPI:
        changes[f"{dpi} dpi"] = ({"Row": partial(draw_at, drawing.Row, dpi)}, plain)
    for level in drawing.LEVELS:
        changes[level] = ({"degrade": partial(degrade_to, drawing.degrade, level)}, plain)
    for pen, colour in drawing.PENS.items():
        changes[f"{pen} pen"] = ({"PENS": dict.fromkeys(drawing.PENS, colour)}, plain)
    for off in GRID_MM:
        changes[f"grid off by {off:g} mm"] = (unchanged, (off * 200 / 25.4,) * 2)
    return changes


def draw_at(
    row: Callable, our_dpi: int, boxes: int, size: np.ndarray, dpi: int = 0, *more
) -> object:
    """Make draw.py's Row, of another resolution."""
    return row(boxes, size, our_dpi, *more)


def degrade_to(degrade: Callable, our_level: str, rng, picture, level: str, dpi: int) -> np.ndarray:
    """Degrade a page to another level."""
    return degrade(rng, picture, our_level, dpi)


def sizes(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on every fourth test picture, shrunk."""
    test = train.read_emnist(args.data, train=False)
    few = CNN.Split(test.images[::4], test.labels[::4])
    folders = [write_test(scratch / str(side), few, side) for side in SIDES]
    rows = []
    for side, answers in zip(SIDES, classify(folders, *args.flags), strict=True):
        rows.append({"side, px": side, "ours, %": accuracy(answers)})
    return "every 4th test picture of the EMNIST sample, shrunk by Pillow, bicubic", {"rows": rows}


def samples(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Run inference.py over tests/samples as a user does; keep the lines that it prints."""
    lines = {}
    for form in ("ascii", "csv"):
        command = [sys.executable, "inference.py", "--input", "tests/samples", "--format", form]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        lines[form] = [*run.stdout.splitlines(), run.stderr.splitlines()[-1]]
    return "tests/samples", lines


LISTS = 20  # of valid codes, each kind, that a form meets
LIST_CODES = 500


def draw_lists(code: str, generator: np.random.Generator) -> dict[str, list[str]]:
    """Return lists of other codes that can be valid beside this one."""
    in_a_row = int(code) - generator.integers(10 * LIST_CODES) + np.arange(10 * LIST_CODES)
    numbers = {
        "one in ten of a row": generator.permutation(in_a_row),
        "at random": generator.integers(10 ** len(code), size=LIST_CODES),
    }
    lists = {}
    for kind, some in numbers.items():
        padded = [f"{number % 10 ** len(code):0{len(code)}}" for number in some[:LIST_CODES]]
        lists[kind] = [other for other in padded if other != code]
    return lists


def draw_forms(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Draw rows of 8 boxes of all kinds and read them; return cells and truth by form.

    "_" in the truth: the box is empty; "-": a digit was crossed out and written again.
    """
    command = [sys.executable, str(args.forms.resolve()), str(scratch / "forms")]
    subprocess.run(command, cwd=ROOT, check=True)
    folders = [
        path for path in sorted(scratch.glob("forms/*/number")) if "control" not in str(path)
    ]
    rows = []
    truth: dict[str, str] = {}
    for folder in classify(folders, "--alphabet", "0-9", *args.flags):
        for row in folder:
            cell = row["path"].removesuffix(".png")  # FORM_12_C
            form = cell[: -len("_12_C")]
            truth[form] = truth.get(form, "") + cell[-1]
            listed = " ".join(f"{c}:{p}" for c, p in row["alternatives"].items())
            shown = {key: row[key] or "" for key in ("character", "confidence", "error")}
            rows.append(shown | {"path": cell[: -len("_C")], "alternatives": listed})
    return read_forms(rows, {}, []), truth


def codes(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Look drawn codes up in valid ones, with the true one among them and without it.

    An empty box stands for any digit; codes with a digit written again are left out.
    """
    cells, truth = draw_forms(args, scratch)
    generator = np.random.default_rng(0)
    found: dict[tuple[str, str], list] = {}
    for form, p in cells.items():
        code = re.sub("_", lambda _: str(generator.integers(10)), truth[form])
        for _ in range(LISTS if code.isdigit() else 0):
            for kind, others in draw_lists(code, generator).items():
                as_read, scores = score_all([p], [code, *others])
                choices = [*choose(as_read, scores), *choose(as_read, scores[:, 1:])]
                accepted = [c.lead >= LEAD and c.behind <= BEHIND for c in choices]
                is_read = join(p)[0] == truth[form].replace("_", " ")
                for boxes in ("all", Path(form).parent.parent.name):
                    entry = (is_read, choices[0].code == 0, *accepted)
                    found.setdefault((kind, boxes), []).append(entry)
    rows = []
    for (kind, boxes), entries in sorted(found.items(), reverse=True):
        is_read, right, accepted, accepted_without = np.array(entries).T
        rows.append({
            "500 valid codes": kind,
            "boxes": boxes,
            "right without a list, %": 100 * is_read.mean(),
            "likeliest is right, %": 100 * right.mean(),
            "accepted, %": 100 * accepted.mean(),
            "wrong of 1,000 accepted": 1000 * (~right[accepted]).mean(),
            "accepted, the true one not listed, %": 100 * accepted_without.mean(),
        })  # fmt: skip
    return f"{len(cells)} rows of 8 boxes drawn by ../shared/forms/draw.py", {"rows": rows}


ALL = (shipped, field, alone, single, scenes, forms, cells, sizes, samples, codes)
PARTS = {part.__name__: part for part in ALL}
