"""The tables of both READMEs, written from the study's records.

In a README a table stands between `<!-- table: NAME -->` and `<!-- end -->`, what a command prints
between `<!-- output: NAME -->` and `<!-- end -->`; NAME is looked up in TABLES.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from images_for_readme.measure import SCORES

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


def show_lines(records: Records, form: str, numbers: list[int | None]) -> str:
    """Show lines that inference.py printed over tests/samples; None: some are left out."""
    lines = records["samples"][form]
    shown = ["..." if number is None else lines[number] for number in numbers]
    return "\n".join(("```", *shown, "```"))


def show_summary(records: Records) -> str:
    """Show the table that the README begins with."""
    shipped = records["shipped"]
    test = shipped["test"]
    field = [f"{records['field']['rows'][-1][score]:.1f}" for score in SCORES]
    speed = [f"{row['ours']:,.0f}" for row in records["bench-inference"]["rows"]]
    scenes = records["scenes"]["means"]["scene"]
    gpu = records["bench-gpu"]["full_run_seconds"]
    rows = [
        ("of all 36 classes", f"{test['accuracy']:.1f} %", "EMNIST: half of its test set"),
        ("of digits alone", f"{test['digits_known']:.1f} %", "the same, --alphabet 0-9"),
        ("of letters alone", f"{test['letters_known']:.1f} %", "the same, --alphabet A-Z"),
        ("by other hands", f"{field[0]} %", f"{records['field']['data']}, no training data"),
        ("with 0/O and 1/I/L as one", f"{field[1]} %", "the same"),
        ("with digits or letters known", f"{field[2]} %", "the same"),
        ("in shadows, frames, boxes", f"{scenes:.1f} %", "drawn scenes"),
        ("small PNGs · photographs a second", " · ".join(speed), "two cores of an AMD EPYC"),
        ("training", f"{gpu:.0f} s", "an H100"),
        ("weights", f"{shipped['bytes'] / 1e6:.1f} MB", f"{shipped['parameters']:,} parameters"),
    ]
    return format_table([dict(zip(("right", " ", "on"), row, strict=True)) for row in rows])


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
    """Compare the records whose names match; those that differ by their seed alone, in a row."""
    groups: dict[str, list[dict]] = {}
    for name, record in records.items():
        if re.fullmatch(pattern, name):
            sets = records.get("field" if name == "shipped" else f"field-{name}", record)
            means = [sets["rows"][-1][score] for score in SCORES] if "rows" in sets else None
            groups.setdefault(record["what"], []).append(record | {"field": means})
    rows = []
    for what, group in groups.items():
        right = [record["test"]["accuracy"] for record in group if "test" in record]
        nll = [record["test"]["nll"] for record in group if "test" in record]
        field = [record["field"] for record in group if record["field"]]
        rows.append({
            "": what,
            "claimed, %": str(group[0].get("claimed", "")),
            "EMNIST test, %": f"{np.mean(right):.2f}" if right else "",
            "of the seeds": f"{min(right):.2f}-{max(right):.2f}" if len(right) > 1 else "",
            "NLL": f"{np.mean(nll):.4f}" if nll else "",
            "field sets, %": " · ".join(f"{x:.1f}" for x in np.mean(field, 0)) if field else "",
        })  # fmt: skip
    return format_table(rows)


TABLES: dict[str, Callable[[Records], str]] = {
    "summary": show_summary,
    "ascii": partial(show_lines, form="ascii", numbers=[0, 1, 2, None, 41, 42, 43]),
    "csv": partial(show_lines, form="csv", numbers=[0, 1, 2, 33]),
    "peers": partial(show, names=["peers"]),
    "shipped": show_shipped,
    "seeds": partial(compare, pattern="default-."),
    "field": partial(show, names=["field"]),
    "ways": partial(compare, pattern="way-."),
    "levers": partial(compare, pattern="lever-.*"),
    "halves": partial(compare, pattern="explore-.*"),
    "adapting": partial(compare, pattern="field|field-alone"),
    "single": partial(show, names=["single"]),
    "scenes": partial(show, names=["scenes"]),
    "fonts": partial(compare, pattern="before|fonts-.*"),
    "corrections": partial(compare, pattern="own-.*"),
    "sizes": show_sizes,
    "doubt": show_doubt,
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
