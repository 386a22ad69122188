"""Join the cells of forms to codes, and find the likeliest valid one of each.

    python3 inference.py --input cells --format csv --topk 36 --output cells.csv
    python3 -m images_for_readme.codes cells.csv valid.txt > codes.csv

Cells of one form are rows whose path is the same up to the last `_`, in their order, such as
cells/anna_00.png. valid.txt holds a code a line, of any lengths. A cell without a character may
stand anywhere where a code is shorter than the row of cells; one within a code, where a character
should be, speaks for no character and costs what such a gap costs. Columns of the csv:

    form, read, confidence: the code as read, a blank as a space, what is no character as ?; the
        probability of its most doubtful cell
    likeliest: the valid code that is; without a list, there are only the first three columns
    lead: by how many nats it leads over the next
    behind: how many nats it is behind the code as read: far, if none of the list was written
    do: `accept` where lead and behind are within their limits, else `look`

What the limits promise, on drawn forms of 8 digits with 500 valid codes: at most 1 of 100 accepted
codes is wrong. Of codes that are not on the list, 1 of 200 is accepted at most where the list is
one at random; where it is one in ten of a row of numbers, about 1 of 8, as a neighbour that
differs in a doubtful cell alone may be on it.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ALPHABET + " ?"  # what a cell shows: a character, nothing, something else
BLANK = COLUMNS.index(" ")
ROW = ("path", "character", "confidence", "alternatives", "error")
SMALLEST = 1e-6  # probability of what inference.py writes as 0.0000
FLOOR = 1e-3  # probability that a cell shows what the net does not see in it, at least
DENIED = 1e-30  # probability of what a person or a pattern rules out
GAP = 0.05  # fraction of a code's characters that people leave out or a cell doesn't hold
LEAD = 4.0  # nats; both chosen on drawn forms, see the study
BEHIND = 10.0  # nats
NO_NEXT = 1e6  # nats: a lead, where no other code could be
ELEMENT = r"(\[[^\]]+\]|\\d|[\w.])(?:\{(\d+)\})?"  # of a pattern: what a place allows, how often


class UsageError(Exception):
    """What was asked for can't be done; one line for the user."""


class Choice(NamedTuple):
    """The likeliest valid code of a form."""

    code: int | None  # its place in the list; None: none of these
    lead: float  # nats over the next
    behind: float  # nats behind the code as read


# What is read


def read_rows(file: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Return the rows of a csv that has these columns; paths may be any bytes."""
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.DictReader(stream, restval="")
        rows = list(reader)
    for column in columns:
        if column not in (reader.fieldnames or ()):
            raise UsageError(f"{file}: no column {column!r}: give what inference.py writes")
    return rows


def read_cell(row: dict[str, str]) -> np.ndarray:
    """Return the probabilities of a cell by column, more than 0: (38,).

    What the characters listed leave to 1 is the blank's, or, where a cell shows none, the "?"'s.
    """
    try:
        listed = {pair[0]: float(pair[2:]) for pair in row["alternatives"].split()}
        is_blank = row["error"].startswith("blank")
        if is_blank or row["character"]:
            listed[" " if is_blank else row["character"]] = float(row["confidence"] or 1)
    except ValueError as error:
        raise UsageError(f"{row['path']}: {error}: give what inference.py writes") from error
    listed.setdefault("?" if row["error"] else " ", 1 - sum(listed.values()))
    p = np.array([listed.get(column, 0) for column in COLUMNS])
    return np.maximum(p, SMALLEST)


def read_forms(
    rows: list[dict[str, str]], corrections: dict[str, str], places: list[str]
) -> dict[str, np.ndarray]:
    """Return of each form the probabilities of its cells by column: (cells, 38).

    corrections: characters by path, " " for an empty cell: a person's word counts. places: which
    characters each allows; none: all.
    """
    cells: dict[str, list[np.ndarray]] = {}
    for row in rows:
        form, mark, number = row["path"].rpartition("_")
        if not mark or "/" in number:
            raise UsageError(f"{row['path']}: no cell of a form: name it FORM_NUMBER.png")
        p = read_cell(row)
        place = len(cells.setdefault(form, []))
        if place < len(places):
            p *= [column in places[place] + " ?" for column in COLUMNS]
            p[-1] += FLOOR
        if row["path"] in corrections:
            p = np.eye(len(COLUMNS))[COLUMNS.index(corrections[row["path"]])]
        cells[form].append(p / p.sum())
    for form, some in cells.items():
        if places and len(some) != len(places):
            raise UsageError(f"{form}: {len(some)} cells, but the pattern has {len(places)} places")
    return {form: np.stack(some) for form, some in cells.items()}


def read_corrections(file: Path) -> dict[str, str]:
    """Return characters by path, " " where somebody says that a cell is empty."""
    corrections = {}
    for row in read_rows(file, ("path", "character")):
        corrections[row["path"]] = row["character"].upper() or " "
        if corrections[row["path"]] not in [*ALPHABET, " "]:
            raise UsageError(f"{file}: {row['character']}: expected 0-9, A-Z, or nothing")
    return corrections


def read_pattern(text: str) -> list[str]:
    """Return which characters each place allows; text: a pattern, or a file of a line a place."""
    if Path(text).is_file():
        lines = Path(text).read_text("utf-8-sig", "replace").split()
        text = "".join(f"[{line.strip('[]')}]" for line in lines)
    if not re.fullmatch(f"(?:{ELEMENT})+", text):
        raise UsageError(f"--pattern {text}: expected such as [A-HJ-NPR-Z0-9]{{9}}[0-9]{{8}}")
    places = []
    for element, count in re.findall(ELEMENT, text):
        try:
            allowed = re.findall(element, ALPHABET, re.IGNORECASE)
        except re.error as error:
            raise UsageError(f"--pattern {element}: {error}") from error
        places += ["".join(allowed)] * int(count or 1)
    return places


def read_valid(file: Path) -> list[str]:
    """Return the codes of a list, each once, in capitals and without spaces."""
    lines = file.read_text("utf-8-sig", "replace").upper().splitlines()
    codes = dict.fromkeys("".join(line.split()) for line in lines)
    valid = [code for code in codes if code]
    if not valid:
        raise UsageError(f"{file}: no codes: expected one a line")
    return valid


# What was written


def join(p: np.ndarray) -> tuple[str, float]:
    """Return the code as read, and its least confidence."""
    read = "".join(COLUMNS[column] for column in p.argmax(1))
    return read, p[:, :-1].max(1).min()


def compute_scores(p: np.ndarray) -> np.ndarray:
    """Return log probabilities of columns, nats; where no character is, any can be, at a cost."""
    gap = GAP * p[:, BLANK:].sum(1)
    of_codes = p + gap[:, None]
    of_codes[:, BLANK] = p[:, BLANK]
    return np.log(np.where(of_codes > 0, np.maximum(of_codes, FLOOR), DENIED))


def score_codes(scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return how well codes of n characters fit m cells, nats, (V,); -inf if they are too long.

    scores: (m, 38). codes: (V, n) columns. A code stands where it fits best, in order, and the
    other cells are blank: best[:, i] is that of its first i characters in the cells so far.
    """
    best = np.full((len(codes), codes.shape[1] + 1), -np.inf)
    best[:, 0] = 0
    for cell in scores:
        filled = best[:, :-1] + cell[codes]
        best += cell[BLANK]
        np.maximum(best[:, 1:], filled, out=best[:, 1:])
    return best[:, -1]


def score_all(forms: Iterable[np.ndarray], valid: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the codes as read, (F,), and of all valid codes, (F, V), nats."""
    of_forms = [compute_scores(p) for p in forms]
    of_valid = np.empty((len(of_forms), len(valid)))
    for length in {len(code) for code in valid}:
        chosen = [i for i, code in enumerate(valid) if len(code) == length]
        found = [[ALPHABET.find(character) for character in valid[i]] for i in chosen]
        codes = np.array(found)  # -1, of what is not in the alphabet: the "?"
        for i, scores in enumerate(of_forms):
            of_valid[i, chosen] = score_codes(scores, codes)
    return np.array([scores.max(1).sum() for scores in of_forms]), of_valid


def choose(as_read: np.ndarray, scores: np.ndarray) -> list[Choice]:
    """Return the likeliest code of each form by itself."""
    choices = []
    for read, row in zip(as_read, scores, strict=True):
        code = int(row.argmax())
        next_best = np.delete(row, code).max(initial=-NO_NEXT)
        behind = read - row[code]
        choices.append(Choice(code if behind < np.inf else None, row[code] - next_best, behind))
    return choices


def assign(as_read: np.ndarray, scores: np.ndarray, limit: float) -> list[Choice]:
    """Return the likeliest code of each form if each code belongs to one form at most.

    Of all assignments it is the best, where none of these is `limit` nats behind what was read. The
    lead is over the best assignment that gives this form another code.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UsageError("--once needs scipy: pip install scipy") from error
    over_none = np.maximum(scores - as_read[:, None] + limit, -NO_NEXT)
    gains = np.pad(over_none.clip(0), ((0, 0), (0, len(scores))))  # the last columns: none of these
    forms, codes = linear_sum_assignment(gains, maximize=True)
    total = gains[forms, codes].sum()
    choices = []
    for form, code in zip(forms, codes, strict=True):
        if not gains[form, code]:
            choices.append(Choice(None, 0, np.inf))
            continue
        others = gains.copy()
        others[form] = np.pad(over_none[form], (0, len(scores)), constant_values=-NO_NEXT)
        others[form, code] = -NO_NEXT
        lead = total - others[linear_sum_assignment(others, maximize=True)].sum()
        choices.append(Choice(int(code), lead, as_read[form] - scores[form, code]))
    return choices


# The command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("cells", type=Path, help="csv of inference.py --topk 36")
    add("valid", type=Path, nargs="?", help="the codes that can be, one a line")
    add("--corrections", type=Path, metavar="CSV", help="of its --report: they count")
    add("--once", action="store_true", help="each valid code belongs to one form at most")
    add("--pattern", metavar="PATTERN", help="what each cell can show, or a file of a line a cell")
    add("--lead", type=float, default=LEAD, metavar="NATS", help="at least [%(default)s]")
    add("--behind", type=float, default=BEHIND, metavar="NATS", help="at most [%(default)s]")
    return parser.parse_args(arguments)


def find_codes(args: argparse.Namespace) -> list[list[str]]:
    """Return the rows of the csv that is asked for, its head first."""
    corrections = read_corrections(args.corrections) if args.corrections else {}
    places = read_pattern(args.pattern) if args.pattern else []
    forms = read_forms(read_rows(args.cells, ROW), corrections, places)
    table = [["form", "read", "confidence"]]
    for form, p in forms.items():
        read, confidence = join(p)
        table.append([form, read, f"{confidence:.4f}"])
    if not args.valid:
        return table
    valid = read_valid(args.valid)
    as_read, scores = score_all(forms.values(), valid)
    choices = assign(as_read, scores, args.behind) if args.once else choose(as_read, scores)
    table[0] += ["likeliest", "lead", "behind", "do"]
    for row, (code, lead, behind) in zip(table[1:], choices, strict=True):
        if code is None:
            row += ["", "", "", "look"]
            continue
        do = "accept" if lead >= args.lead and behind <= args.behind else "look"
        shown = f"{lead:.1f}" if lead < NO_NEXT / 2 else ""
        row += [valid[code], shown, f"{max(behind, 0):.1f}", do]
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        table = find_codes(parse(arguments))
    except (OSError, csv.Error, UsageError) as error:
        print(f"codes: {error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
