"""The study: its records, its pictures, and the figures of both READMEs.

    python3 images_for_readme/study.py train run9 --data data     # repeat a run of the study
    python3 images_for_readme/study.py train mine --arch large    # a new one, with train.py's flags
    python3 images_for_readme/study.py measure                    # model.pt: all of MEASURED
    python3 images_for_readme/study.py measure field --model mine.pt --name field-mine
    python3 images_for_readme/study.py draw                       # the pictures, from the records
    python3 images_for_readme/study.py tables                     # the READMEs, from the records
    python3 images_for_readme/study.py check                      # what of the READMEs has drifted

Every run and measurement is a line of runs.jsonl; one made again replaces its line. In the READMEs
a figure stands between `<!--= run9/test/accuracy .2f -->` and `<!--/-->`; for tables see TABLES.
"""

import argparse
import csv
import difflib
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import strokes  # noqa: E402

import CNN  # noqa: E402
import picture  # noqa: E402
import train  # noqa: E402
from CNN import ALPHABET, DIGITS, ECE_BINS, SIZE  # noqa: E402

RECORDS = HERE / "runs.jsonl"
PAGES = ROOT / "README.md", HERE / "README.md"
SAMPLES = ROOT / "tests" / "samples"
MERGED = str.maketrans("OIL", "011")  # what nobody can tell apart alone
THRESHOLDS = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of --min-confidence
SCORES = ("accuracy", "alike", "alphabet")
SIDES = (28, 20, 14, 10, 8, 7)  # px, to which test pictures are shrunk


@cache
def records() -> dict[str, dict]:
    """Return all records by name, in the order of the file."""
    lines = RECORDS.read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def keep(
    name: str, data: str, figures: dict, device: str | torch.device = "cpu", **more: object
) -> None:
    """Write what the command that runs has found as the record of that name."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    known, command = records().get(name, {}), shlex.join(["python3", *sys.argv])
    record = {"name": name, "kind": "benchmark", "what": name}
    record |= {key: known[key] for key in ("kind", "what", "claimed") if key in known}
    record |= {"command": command, "machine": machine(device), "data": data, "commit": commit}
    record |= {key: value for key, value in more.items() if value} | figures
    short = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    lines = map(json.dumps, (records() | {name: short}).values())
    RECORDS.write_text("\n".join(lines) + "\n")
    records.cache_clear()


def machine(device: str | torch.device) -> str:
    """Name what a run was made on."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{cpu[1] if cpu else 'CPU'}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def train_run(name: str, args: argparse.Namespace) -> None:
    """Train a run: with train.py's flags, or without any with the settings of its record."""
    known = dict(records().get(name, {}).get("settings", {}))
    one_in = known.pop("one_in", 1) if args.one_in is None else args.one_in
    known = {k: v for k, v in known.items() if v != str(getattr(train.Config, k))}  # no "None"
    config = train.parse(args.flags) if args.flags else train.Config(**known)
    args.weights.mkdir(parents=True, exist_ok=True)
    files = {"data": args.data, "out": args.weights / f"{name}.pt"}
    config = replace(config, **files, wandb=False, resume=True)
    load = train.load_splits

    def thin(*arguments: object) -> tuple[train.Split, ...]:
        learnt, *others = load(*arguments)
        few = {"images": learnt.images[::one_in], "labels": learnt.labels[::one_in]}
        return learnt._replace(**few), *others

    train.load_splits, start = thin, time.monotonic()
    results = train.train(config)
    history = results["history"][:: -(-len(results["history"]) // 50)]
    figures = {
        "settings": config.bound | {"one_in": one_in},
        "seconds": time.monotonic() - start,
        "validation": results["validation"],
        "test": results["test"],
        "curve": {key: [epoch[key] for epoch in history] for key in ("loss", "accuracy", "nll")},
    }
    data = "EMNIST sample" + f", one in {one_in} of train" * (one_in > 1)
    device = CNN.choose_device(config.device)
    keep(name, data, figures, device, kind="run", what=args.what)


# What is measured of model.pt, mostly by running inference.py


def answer(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Run inference.py on folders named after the character that their pictures show."""
    command = [sys.executable, "inference.py", "--format", "json", "--topk", "36", *args.flags]
    command += ["--model", str(args.model.resolve()), "--input", str(folder)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if run.returncode not in (0, 1):  # 1: a picture has no answer
        sys.exit(f"{shlex.join(command)} ended with {run.returncode}")
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return [row | {"truth": Path(row["path"]).parent.name} for row in rows]


def score(rows: list[dict]) -> list[float]:
    """Return per cent right: at all, with MERGED as one, out of the set's kind of characters."""
    kinds = (ALPHABET[:DIGITS], ALPHABET[DIGITS:], ALPHABET)
    kind = next(kind for kind in kinds if {row["truth"] for row in rows} <= set(kind))
    right = []
    for row in rows:
        ranked, truth = [row["character"] or "", *row["alternatives"]], row["truth"]
        known = next((character for character in ranked if character in kind), "")
        alike = ranked[0].translate(MERGED) == truth.translate(MERGED)
        right.append((ranked[0] == truth, alike, known == truth))
    return (100 * np.mean(right, axis=0)).tolist()


def weigh_doubt(rows: list[dict]) -> dict:
    """Say what each --min-confidence leaves, and how far confidences are off: ECE, a fraction."""
    confidence = np.array([row["confidence"] or 0 for row in rows])
    right = np.array([row["character"] == row["truth"] for row in rows])
    parts = [confidence >= threshold for threshold in THRESHOLDS]
    bins = np.minimum(confidence * ECE_BINS, ECE_BINS - 1).astype(int)
    return {
        "ece": abs(np.bincount(bins, confidence - right)).sum() / len(rows),
        "threshold": THRESHOLDS,
        "answered": [100 * part.mean() for part in parts],
        "right": [100 * right[part].mean() for part in parts],
    }


def write_test(folder: Path, test: train.Split, side: int = SIZE) -> Path:
    """Write EMNIST's test pictures as files, shrunk to `side` px by Pillow, bicubic."""
    for i, (image, label) in enumerate(zip(test.images.numpy(), test.labels, strict=True)):
        path = folder / f"{side}" / ALPHABET[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((side, side)).save(path)
    return folder / f"{side}"


def shipped(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on EMNIST's test: by the net in float32, and by inference.py."""
    net, test = CNN.load(args.model), train.read_emnist(args.data, train=False)
    logits = CNN.predict(net, test.images)[0] / net.card.temperature
    rows = answer(write_test(scratch, test), args)
    return f"{len(rows):,} test pictures of the EMNIST sample", {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "bytes": args.model.stat().st_size,
        "temperature": net.card.temperature,
        "validation": net.card.metrics["validation"],
        "test": CNN.compute_metrics(logits, test.labels),
        "through_inference": score(rows),
        "confusion": CNN.count_confusions(logits, test.labels).tolist(),
        "doubt": weigh_doubt(rows),
    }


def field(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on the field sets, each by a run of its own; the last of each list is the mean."""
    folders = sorted(path for path in args.field.resolve().iterdir() if path.is_dir())
    sets = [answer(folder, args) for folder in folders]
    everything, count = [row for rows in sets for row in rows], [len(rows) for rows in sets]
    columns = np.array([[*score(rows), weigh_doubt(rows)["ece"]] for rows in sets]).T
    figures = {"set": [*(folder.name for folder in folders), "mean of sets"]}
    figures |= {"pictures": [*count, sum(count)], "doubt": weigh_doubt(everything)}
    for name, column in zip((*SCORES, "ece"), columns, strict=True):
        figures[name] = [*column.tolist(), column.mean()]
    return f"{len(everything):,} pictures of {len(sets)} field sets", figures


def sizes(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Measure on every fourth test picture, shrunk."""
    test = train.Split(*(part[::4] for part in train.read_emnist(args.data, train=False)[:2]))
    right = [score(answer(write_test(scratch, test, side), args))[0] for side in SIDES]
    data = "every 4th test picture of the EMNIST sample, shrunk by Pillow, bicubic"
    return data, {"n": len(test.labels), "px": SIDES, "right": right}


def samples(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Run inference.py over tests/samples as a user does; keep the lines that it prints."""
    lines = {}
    for form in ("ascii", "csv"):
        command = [sys.executable, "inference.py", "--input", "tests/samples", "--format", form]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        lines[form] = [*run.stdout.splitlines(), run.stderr.splitlines()[-1]]
    return "tests/samples", lines


def tests(args: argparse.Namespace, scratch: Path) -> tuple[str, dict]:
    """Run the tests and keep their last line, such as "300 passed in 90.00s"."""
    run = subprocess.run([sys.executable, "-m", "pytest"], cwd=ROOT, capture_output=True, text=True)
    return "tests", {"lines": run.stdout.splitlines()[-1:]}


MEASURED = {part.__name__: part for part in (shipped, field, sizes, samples, tests)}


def measure(part: str, args: argparse.Namespace) -> None:
    """Measure a part and keep its record, with the digest of the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        data, figures = MEASURED[part](args, Path(scratch))
    settings = {"weights": args.model.name, "flags": args.flags}
    settings["sha256"] = hashlib.sha256(args.model.read_bytes()).hexdigest()
    keep(args.name or part, data, figures, kind="measured", what=args.what, settings=settings)


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table; columns of figures, which have no letters, stand to the right."""
    rows = [list(row) for row in rows]
    words = [any(re.search("[^\\W\\d_]{3}", cell) for cell in column) for column in zip(*rows)]  # noqa: B905
    lines = [head, ["---" if word else "---:" for word in words], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(*arguments: str) -> str:
    """Put lists of records side by side. Each argument: its_head=record/key:format."""
    heads, sources = zip(*(argument.split("=") for argument in arguments), strict=True)
    parts = [source.partition(":") for source in sources]
    lists = [[format(item, form) for item in look_up(path)] for path, _, form in parts]
    return table([head.replace("_", " ") for head in heads], zip(*lists, strict=True))


def runs(pattern: str) -> str:
    """Compare the records whose names match; runs that differ by their seed alone, in a row."""
    groups: dict[str, list[dict]] = {}
    for name, record in records().items():
        if re.fullmatch(pattern, name):
            groups.setdefault(record["what"], []).append(record)
    rows = []
    for what, group in groups.items():
        right = [record["test"]["accuracy"] for record in group if "test" in record]
        nll = [record["test"]["nll"] for record in group if "test" in record]
        fields = [records().get(f"field-{r['name']}".removesuffix("-shipped"), r) for r in group]
        means = [[f[key][-1] for key in SCORES] for f in fields if "set" in f]
        rows.append({
            "": what,
            "claimed, %": str(group[0].get("claimed", "")),
            "EMNIST test, %": f"{np.mean(right):.2f}" if right else "",
            "of the seeds": f"{min(right):.2f}-{max(right):.2f}" if len(right) > 1 else "",
            "NLL": f"{np.mean(nll):.4f}" if nll else "",
            "field sets, %": " · ".join(map("{:.1f}".format, np.mean(means, 0))) if means else "",
        })  # fmt: skip
    head = [column for column in rows[0] if any(row[column] for row in rows)]
    return table(head, [[row[column] for column in head] for row in rows])


def peers() -> str:
    """Compare ours, which comes first, with other programs; say where they read more."""
    found, rows = records()["peers"], []
    for i, program in enumerate(found["peer"]):
        means = [f"{np.mean(found[key][i]):.1f}" for key in SCORES]
        sets = zip(found["set"], found["accuracy"][i], found["accuracy"][0], strict=True)
        better = [
            f"{name} {theirs:.1f} to {ours:.1f}" for name, theirs, ours in sets if theirs > ours
        ]
        rows.append([program, *means, f"{found['rate'][i]:,.0f}", ", ".join(better)])
    return table(["", *(f"{key}, %" for key in SCORES), "pictures/s", "reads more than ours"], rows)


def lines(path: str, *numbers: str) -> str:
    """Show lines of a record, by number or as given, such as ..."""
    shown = [look_up(f"{path}/{number}") if number.isdigit() else number for number in numbers]
    return "\n".join(("```", *shown, "```"))


TABLES = {function.__name__: function for function in (columns, runs, peers, lines)}


def look_up(path: str) -> object:
    """Return what stands in a record, by the names on the way to it."""
    first, _, rest = path.partition("/*/")  # what follows * is looked up in each item of a list
    found = records()
    for key in first.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return [item[rest] for item in found] if rest else found


def value(words: str) -> str:
    """Return what a README's mark asks for: a table, or a figure of a record in a format."""
    name, *arguments = words.split()
    if name in TABLES:
        return f"\n{TABLES[name](*arguments)}\n"
    return format(look_up(name), *arguments)


def fill(text: str) -> str:
    """Return a README with every table and figure written anew."""
    form = re.compile(r"(<!--= (.*?) -->).*?(<!--/-->)", re.DOTALL)
    return form.sub(lambda mark: mark[1] + value(mark[2]) + mark[3], text)


def drifted() -> list[str]:
    """Return the lines of the READMEs that are not (-) and should be (+) what the records say."""
    pages = [page.read_text() for page in PAGES]
    pairs = [(page.splitlines(), fill(page).splitlines()) for page in pages]
    return [line for old, new in pairs for line in difflib.ndiff(old, new) if line[0] in "-+"]


FITTED = ["A_photo.jpg", "G_shade.jpg", "1_pencil.jpg", "8_photo.jpg", "F_thin.png", "W_fat.png"]
FITTED += ["2_tiny.png", "K_KRAFT.JPG", "C_glass.png", "3_chalk.png", "T_dark.png", "P_strip.png"]


def learning_curves() -> None:
    """Compare the origin's nine runs and a default one, epoch by epoch, on validation."""
    axes = plt.subplots(figsize=(8, 4.5))[1]
    for name, style in [*((f"run{i}", "-") for i in range(1, 10)), ("default-3", "k-")]:
        wrong = [100 - right for right in records()[name]["curve"]["accuracy"]]
        axes.plot(range(1, len(wrong) + 1), wrong, style, label=name)
    axes.set(yscale="log", xlabel="epochs", ylabel="wrong on validation, % (logarithmic)")
    axes.set_yticks(ticks := (6, 8, 10, 15, 20, 30, 50), [*map(str, ticks)])
    axes.minorticks_off()
    axes.legend(ncols=2)


def confusion() -> None:
    """Show what the shipped weights take for what."""
    pictures = np.array(records()["shipped"]["confusion"])
    errors = 100 * pictures / pictures.sum(1, keepdims=True) * (1 - np.eye(len(ALPHABET)))
    figure, axes = plt.subplots(figsize=(6.5, 5.4))
    shown = axes.imshow(errors, norm=LogNorm(0.01, 100), cmap="Blues")
    axes.set_xticks(range(len(ALPHABET)), ALPHABET, fontsize=7)
    axes.set_yticks(range(len(ALPHABET)), ALPHABET, fontsize=7)
    axes.set(xlabel="answer", ylabel="truth")
    figure.colorbar(shown, label="% of the row's pictures", format="%g", shrink=0.8)


def fitting() -> None:
    """Show on drawings of ours how EMNIST's files are turned, and pictures fitted."""
    upright = [strokes.emnist_picture(c, strokes.hand(i)) for i, c in enumerate("2457ABEFGJLR")]
    rows = {
        "as EMNIST's\nfiles hold it": [picture.T for picture in upright],
        "turned upright\nby train.py": upright,
        "as it came": [shown(SAMPLES / name, 96) for name in FITTED],
        "fitted by\npicture.py": [picture.prepare(str(SAMPLES / name), SIZE)[0] for name in FITTED],
    }
    grid = plt.subplots(len(rows), len(FITTED), figsize=(11, 4))[1]
    for axes, (text, images) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center")
        for cell, image in zip(axes, images, strict=True):
            draw_image(cell, image)


def strip() -> None:
    """Show every other sample picture with its answer and confidence, as inference.py gave them."""
    rows = list(csv.DictReader(records()["samples"]["csv"][:-1]))[::2]
    figure, grid = plt.subplots(2, len(rows) // 2, figsize=(11, 2.9))
    command = "$ python3 inference.py --input tests/samples --format csv"
    figure.suptitle(command, x=0.01, ha="left", family="monospace", fontsize=11)
    for cell, row in zip(grid.flat, rows, strict=True):
        draw_image(cell, shown(ROOT / row["path"], 128))
        text = f"{row['character']},{row['confidence']}"
        cell.set_xlabel(text, family="monospace", fontsize=10, labelpad=3)


def draw_image(axes: plt.Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[], frame_on=False)


def shown(path: Path, side: int) -> np.ndarray:
    """Return a picture of any mode as people see it, on a square: (side, side, 3)."""
    image = picture.read(str(path))
    if image.mode in ("I", "F"):
        image = Image.fromarray(picture.to_grey(image))
    image = ImageOps.pad(image.convert("RGBA"), (side, side), color=(0, 0, 0, 0))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))


PICTURES = {f.__name__: f for f in (strip, fitting, learning_curves, confusion)}


def draw(name: str, folder: Path = HERE) -> None:
    """Draw a picture of the study; `report` photographs the page of --report in chromium."""
    with tempfile.TemporaryDirectory() as scratch:
        raw, page = Path(scratch) / "raw.png", Path(scratch) / "report.html"
        if name == "report":
            command = [sys.executable, "inference.py", "--input", "tests/samples", "--report", page]
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            browser = "chromium --headless --no-sandbox --hide-scrollbars --window-size=1180,700"
            files = [f"--user-data-dir={scratch}/profile", f"--screenshot={raw}", page.as_uri()]
            subprocess.run([*browser.split(), *files], check=True, capture_output=True)
        else:
            with plt.rc_context({"figure.constrained_layout.use": True}):
                PICTURES[name]()
                plt.savefig(raw, dpi=150)
        few = Image.open(raw).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(folder / f"{name}.png", optimize=True)  # a third of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("do", choices=("train", "measure", "draw", "tables", "check"))
    add("names", nargs="*", help="of a run, of parts to measure, of pictures [all but report]")
    add("--data", type=Path, default=Path("data"), help="folder of EMNIST")
    add("--weights", type=Path, default=Path("data/study"), help="folder for what train writes")
    add("--one-in", type=int, help="learn from every N-th picture only")
    add("--model", type=Path, default=ROOT / "model.pt", help="what is measured")
    add("--field", type=Path, default=ROOT.parent / "shared" / "field", help="SET/LABEL/IMAGE")
    add("--name", help="of the record, where it isn't the part's")
    add("--what", help="one line for the tables")
    args, args.flags = parser.parse_known_args()  # of train.py or inference.py
    if args.do == "train":
        train_run(args.names[0], args)
    elif args.do == "measure":
        for part in args.names or MEASURED:
            measure(part, args)
    elif args.do == "draw":
        for name in args.names or PICTURES:
            draw(name)
    elif args.do == "tables":
        for page in PAGES:
            page.write_text(fill(page.read_text()))
    else:
        sys.exit("\n".join(drifted()) or 0)


if __name__ == "__main__":
    main()
