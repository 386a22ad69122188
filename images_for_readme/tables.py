"""The tables of both READMEs, written from the study's records.

In a README a table stands between `<!-- table: NAME -->` and `<!-- end -->`, what a command prints
between `<!-- output: NAME -->` and `<!-- end -->`; NAME is looked up in TABLES.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from images_for_readme.measure import FIRST_MEAN, SCORES

Records = dict[str, dict]  # by name
BLOCK = re.compile(r"(<!-- (?:table|output): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
METRICS = {
    "accuracy": ("all 36 classes, % right", ".2f"),
    "digits": ("of digits", ".2f"),
    "letters": ("of letters", ".2f"),
    "digits_known": ("of digits, when only digits can be answered", ".2f"),
    "letters_known": ("of letters, when only letters can be answered", ".2f"),
    "classes": ("mean of the classes", ".2f"),
    "nll": ("negative log-likelihood, nats", ".4f"),
    "ece": ("expected calibration error", ".4f"),
}
FEATURES = {  # of a reading, in picture.py; the first two are the net's
    "log_p": "log probability of its likeliest character, a nat",
    "distance": "distance to that character's class mean, a median of validation",
    "left_out": "ink off the rim and off lines that is left out, all of it",
    "parts_left_out": "each part left out that lies mostly off the rim",
    "parts_kept": "each part kept beyond the first",
    "offset": "offset of what is kept from the centre, half a side",
    "at_rim": "kept ink in the outer 12 %, all of it",
    "open_ends": "a line is taken out that ends free, as strokes do",
    "unlikely": "ink is as light, or as dark, as paper is more likely to be",
    "blank": "blank: nothing is kept",
    "blank_and_small": "blank: each octave by which the side is below 40 px",
    "stroke_extent": "blank: longest part among thin strokes, a side",
    "ink_extent": "blank: longest part in the first view, a side",
}


def format_cell(value: object) -> str:
    """Write a cell: large numbers with commas, small ones with as many decimals as they need."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.3f}"


def format_table(rows: Iterable[dict]) -> str:
    """Write rows, dicts by column, as a table of Markdown; numbers stand to the right."""
    rows = [{head: format_cell(value) for head, value in row.items()} for row in rows]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    marks = []
    for head in heads:
        is_text = any(re.search("[A-Za-z]{3}", row[head]) for row in rows)
        marks.append("---" if is_text else "---:")
    lines = [heads, marks, *([row[head] for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(records: Records, names: list[str], key: str = "rows") -> str:
    """Show the rows of records, one after another."""
    return format_table([row for name in names for row in records[name][key]])


def show_peers(records: Records) -> str:
    """Show how other programs read; not how fast, as much of their time is that of starting."""
    rows = [dict(row) for row in records["peers"]["rows"]]
    for row in rows:
        row.pop("pictures/s", None)
    return format_table(rows)


def show_lines(records: Records, form: str, numbers: list[int | None]) -> str:
    """Show lines that inference.py printed over tests/samples; None: some are left out."""
    lines = records["samples"][form]
    shown = ["..." if number is None else lines[number] for number in numbers]
    return "\n".join(("```", *shown, "```"))


def show_summary(records: Records) -> str:
    """Show the table that the README begins with."""
    shipped = records["shipped"]
    test = shipped["test"]
    known = f"{test['digits_known']:.1f} · {test['letters_known']:.1f}"
    field = records["field"]
    means = " · ".join(f"{field['rows'][-1][score]:.1f}" for score in SCORES)
    field_on = (
        f"{field['data']}: right · with 0/O and 1/I/L as one · where it is told whether digits "
        "or letters come"
    )
    scenes = records["scenes"]["means"]
    drawn = f"{scenes['scene']:.1f} · {scenes['empty']:.1f} %"
    boxes = records["forms"]["rows"][-1]
    cells = f"{boxes['of whole ones, %']:.1f} · {boxes['empty ones answered, %']:.1f} %"
    bench = records["bench-inference"]
    speed = " · ".join(f"{row['ours']:,.0f}" for row in bench["rows"])
    machine = f"two cores, {bench['machine'].partition(',')[0]}"
    rows = [
        ("right, of all 36 classes", f"{test['accuracy']:.1f} %", "half of EMNIST's test set"),
        ("right, digits alone · letters alone", f"{known} %", "the same, told which of them"),
        ("right, by other hands", f"{means} %", field_on),
        ("right in shadows, frames, on rules · empty ones blank", drawn, "drawn scenes"),
        ("right in boxes of forms · empty ones answered", cells, "drawn forms, six kinds of box"),
        ("small PNGs · photographs a second", speed, machine),
        ("weights", f"{shipped['bytes'] / 1e6:.1f} MB", f"{shipped['parameters']:,} parameters"),
    ]
    return format_table([dict(zip(("", "here", "on"), row, strict=True)) for row in rows])


def show_weights(records: Records) -> str:
    """Show the weights by which readings are compared, with what they weigh."""
    weights = records["readings"]["weights"]
    rows = [{"": FEATURES[name], "nats": f"{weight:.2f}"} for name, weight in weights.items()]
    return format_table(rows)


def show_shipped(records: Records) -> str:
    """Show the metrics of the shipped weights on validation and test."""
    shipped = records["shipped"]
    rows = []
    for key, (text, form) in METRICS.items():
        values = {split: format(shipped[split][key], form) for split in ("validation", "test")}
        rows.append({"": text, **values})
    return format_table(rows)


def show_doubt(records: Records) -> str:
    """Show what --min-confidence leaves on EMNIST and on the field sets."""
    rows = []
    for emnist, field in zip(records["shipped"]["doubt"], records["field"]["doubt"], strict=True):
        rows.append({
            "threshold": emnist["threshold"],
            "EMNIST: answered, %": emnist["answered"],
            "right, %": emnist["right"],
            "field sets: answered, %": field["answered"],
            "right of these, %": field["right"],
        })  # fmt: skip
    return format_table(rows)


def show_sizes(records: Records) -> str:
    """Show how well small pictures are read, beside a net of the original project."""
    pairs = zip(records["sizes"]["rows"], records["sizes-original"]["rows"], strict=True)
    return format_table([ours | theirs for ours, theirs in pairs])


def compare(records: Records, pattern: str) -> str:
    """Compare the weights whose records' names match; if they differ by their seed alone, in a row.

    What was measured of the weights NAME elsewhere is in the records field-NAME, alone-NAME (with
    --no-adapt) and scenes-NAME; of the shipped ones, in field, alone and scenes. Of field sets it
    is the mean of the first eight, as older records have no others.
    """
    groups: dict[str, list[dict]] = {}
    for name, record in records.items():
        if re.fullmatch(pattern, name):
            suffix = "" if name == "shipped" else f"-{name}"
            field = records.get(f"field{suffix}", record if "rows" in record else None)
            alone = records.get(f"alone{suffix}")
            scenes = records.get(f"scenes{suffix}")
            entry = {
                "claimed": record.get("claimed"),
                "test": record.get("test"),
                "field": find_scores(field) if field else None,
                "alone": find_scores(alone) if alone else None,
                "scenes": [scenes["means"][group] for group in ("scene", "junk")]
                if scenes
                else None,
            }
            groups.setdefault(record["what"], []).append(entry)
    return format_table([compare_seeds(what, group) for what, group in groups.items()])


def find_scores(record: dict) -> list[float]:
    """Return the SCORES of a record of field sets: the mean of the first eight, or of all."""
    by_set = {row.get("set"): row for row in record["rows"]}
    mean = by_set.get(FIRST_MEAN, record["rows"][-1])
    return [mean[score] for score in SCORES]


def compare_seeds(what: str, group: list[dict]) -> dict[str, str]:
    """Return the row of a table on records that differ by their seed alone."""
    tests = [entry["test"] for entry in group if entry["test"]]
    right = [test["accuracy"] for test in tests]
    row = {
        "": what,
        "claimed, %": str(group[0]["claimed"] or ""),
        "EMNIST test, %": f"{np.mean(right):.2f}" if tests else "",
        "of the seeds": f"{min(right):.2f}-{max(right):.2f}" if len(tests) > 1 else "",
        "NLL": f"{np.mean([test['nll'] for test in tests]):.4f}" if tests else "",
    }
    heads = {"field": "field sets, %", "alone": "judged alone, %", "scenes": "scenes · junk, %"}
    for key, head in heads.items():
        values = [entry[key] for entry in group if entry[key]]
        row[head] = " · ".join(f"{x:.1f}" for x in np.mean(values, axis=0)) if values else ""
    return row


TABLES: dict[str, Callable[[Records], str]] = {
    "summary": show_summary,
    "ascii": partial(show_lines, form="ascii", numbers=[0, 1, None, 42, 43]),
    "csv": partial(show_lines, form="csv", numbers=[0, 1, 2, 33]),
    "peers": show_peers,
    "shipped": show_shipped,
    "seeds": partial(compare, pattern="default-."),
    "field": partial(show, names=["field"]),
    "ways": partial(compare, pattern="way-."),
    "levers": partial(compare, pattern="lever-.*"),
    "halves": partial(compare, pattern="explore-.*"),
    "adapting": partial(compare, pattern="field|alone"),
    "single": partial(show, names=["single"]),
    "scenes": partial(show, names=["scenes"]),
    "forms": partial(show, names=["forms"]),
    "cells": partial(show, names=["cells"]),
    "readings": show_weights,
    "mixes": partial(compare, pattern="before|shipped|mix-[048]-.*"),
    "fonts": partial(compare, pattern="before|fonts-.*"),
    "corrections": partial(compare, pattern="own-.*"),
    "sizes": show_sizes,
    "doubt": show_doubt,
    "codes": partial(show, names=["codes"]),
    "runs": partial(compare, pattern="run[1-9]"),
    "optimizers": partial(compare, pattern="fair-.*"),
    "rates": partial(compare, pattern="grid-.*"),
    "steps": partial(compare, pattern="step-.*"),
    "ceiling": partial(show, names=["seeds"]),
    "larger": partial(compare, pattern="size-.*"),
    "smaller": partial(compare, pattern="before|small-taught|taught-.*"),
    "speed": partial(show, names=["bench-inference"]),
    "memory": partial(show, names=["bench-inference"], key="memory"),
    "training": partial(show, names=["bench-cpu", "bench-gpu"]),
    "cost": partial(show, names=["bench-gpu"], key="cost"),
}


def fill(text: str, records: Records) -> str:
    """Return a README with every table written anew."""

    def write(block: re.Match) -> str:
        return block[1] + TABLES[block[2]](records) + "\n" + block[3]

    return BLOCK.sub(write, text)
