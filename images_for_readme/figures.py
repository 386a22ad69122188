"""Draw the README's figures from runs/*.json and from characters that our own code draws.

    pip install -r tests/requirements.txt              # for matplotlib
    python3 images_for_readme/figures.py               # all but the next, in 5 s
    python3 images_for_readme/figures.py --only report # a photograph, by the command `chromium`

Needs neither EMNIST nor the field sets: study.py and measure.py have left what is drawn here in
runs/. `strip` adds the sample pictures, `fitting` runs inference.py's own code.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import strokes  # noqa: E402
from study import RUNS, record, validation_nll  # noqa: E402
from tables import OPTIMIZERS, length  # noqa: E402

import inference  # noqa: E402

SAMPLES = ROOT / "tests" / "samples"
SIZE = strokes.EMNIST_SIDE
PAPER, INK, SOFT = "#f4f3ef", "#23262b", "#767b84"  # one card that reads well on light and dark
COLOURS = ["#1f6fb4", "#d1642a", "#2f8f5b", "#a3458f", "#8a6d1d", "#5b5fc7", "#b03a48", "#5a7a84"]
ORIGIN_RUNS = {"sgd": "run3", "adagrad": "run4", "adam": "run5", "adamw": "run6"}
PALE_TO_DARK = LinearSegmentedColormap.from_list("errors", ["#b9d3e8", "#1f6fb4", "#0a1f3c"])
LEAST = 80  # per cent right; what is below is written at the edge
MARKED = (0.5, 0.8, 0.9, 0.95, 0.99)  # values of --min-confidence to write at the curves
FEWEST = 20  # pictures in a bin whose share of right answers says anything
FITTED = ["A_photo.jpg", "G_shade.jpg", "1_pencil.jpg", "8_photo.jpg", "F_thin.png", "W_fat.png"]
FITTED += ["2_tiny.png", "K_KRAFT.JPG", "C_glass.png", "3_chalk.png", "T_dark.png", "P_strip.png"]

plt.rcParams.update(
    {
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
        "axes.grid": True, "grid.color": "#dcdad3", "axes.axisbelow": True, "legend.frameon": False,
        "axes.prop_cycle": mpl.cycler(color=COLOURS), "figure.constrained_layout.use": True,
        "axes.titlesize": 10, "axes.titlelocation": "left",
    }
)  # fmt: skip


def kept(pattern: str) -> list[str]:
    return sorted(path.stem for path in RUNS.glob(f"{pattern}.json"))


def wrong(run: dict) -> np.ndarray:
    """Return per cent wrong on validation after every epoch."""
    return 100 - np.array([epoch["accuracy"] for epoch in run["history"]])


def write_beside(axes: Axes, labels: Iterable[tuple[float, float, str, str]], gap: float) -> None:
    """Write (x, y, text, colour) right of points on a logarithmic axis, `gap` decades apart."""
    lowest = -np.inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        lowest = max(np.log10(y), lowest + gap)
        axes.annotate(text, (x, 10**lowest), (5, 0), textcoords="offset points", color=colour,
                      va="center", fontsize=8)  # fmt: skip


def log_ticks(axis: mpl.axis.Axis, values: Iterable[float]) -> None:
    axis.set_ticks(list(values), [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


# The figures


def learning_curves() -> Figure:
    """Compare the origin's runs and our default, epoch by epoch, on validation."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    labels = []
    for name, colour in zip(kept("run[1-9]"), [*COLOURS, INK], strict=True):
        curve = wrong(record(name))
        epochs = np.arange(1, len(curve) + 1)
        style = ":" if name == "run6" else "-"  # or it would hide Run 5, which it equals
        axes.plot(epochs, curve, style, color=colour, marker="o", markersize=2.5, linewidth=1.2)
        labels.append((epochs[-1], curve[-1], f"Run {name[3]}", colour))
    seeds = np.array([wrong(record(name)) for name in kept("default-*")])
    epochs, mean = np.arange(1, seeds.shape[1] + 1), seeds.mean(0)
    axes.fill_between(epochs, seeds.min(0), seeds.max(0), color="#c01f2e", alpha=0.25, linewidth=0)
    axes.plot(epochs, mean, color="#c01f2e", linewidth=2)
    labels.append((epochs[-1], mean[-1], f"default, {len(seeds)} seeds", "#c01f2e"))
    axes.set(yscale="log", xlabel="epochs", ylabel="wrong on validation, % (logarithmic)")
    axes.set(xlim=(0.5, 33.5), title=f"Learning curves; {record('origin-short')['data']}")
    log_ticks(axes.yaxis, (6, 7, 8, 10, 15, 20, 30, 50, 80))
    axes.set_xticks((1, *range(5, 31, 5)))
    write_beside(axes, labels, gap=0.035)
    return figure


def optimizers() -> Figure:
    """Compare the optimizers over a grid of learning rates, and each at its best."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2))
    for row, (optimizer, text) in enumerate(OPTIMIZERS.items()):
        names = kept(f"grid-{optimizer}-*")
        grid = sorted((record(name)["settings"]["lr"], validation_nll(name)) for name in names)
        left.plot(*zip(*grid, strict=True), marker="o", markersize=4, label=text)
        runs = [record(name) for name in kept(f"fair-{optimizer}-*")]
        tested = [run["test"]["accuracy"] for run in runs]
        right.plot(tested, [row] * len(tested), "o", color=COLOURS[row], markersize=5)
        text = f"{np.mean(tested):.1f} % at {runs[0]['settings']['lr']:g}"
        right.text(np.mean(tested), row - 0.22, text, ha="center", va="bottom", fontsize=8)
        origin = record(ORIGIN_RUNS[optimizer])["test"]["accuracy"]
        right.plot(max(origin, LEAST), row, "x", color=COLOURS[row], markersize=6)
        if origin < LEAST:
            right.annotate(f"{origin:.0f} %", (LEAST, row), (6, 0), textcoords="offset points",
                           va="center", fontsize=8)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="learning rate (logarithmic)",
             ylabel="best NLL on validation, nats (n = 18,159)",
             title=f"Net run1, {length('grid-sgd-0.1')}")  # fmt: skip
    left.set_ylim(0.45, 1.1)  # Adagrad at 0.1 lies far above
    log_ticks(left.yaxis, (0.5, 0.6, 0.7, 0.8, 1))
    left.legend(loc="upper left")
    right.set(xlabel=f"right on test, %\ndots: seeds, {length('fair-sgd-0')}\n"
              "crosses: the origin's rate, 5 epochs of all",
              yticks=range(len(OPTIMIZERS)), yticklabels=OPTIMIZERS.values(),
              title="Each at its own best rate (n = 30,400)")  # fmt: skip
    right.invert_yaxis()
    right.margins(x=0.15, y=0.2)
    return figure


def confusion() -> Figure:
    """Show what the shipped weights take for what, and the ten pairs confused most."""
    table = np.array(record("shipped")["confusion"])
    alphabet = strokes.ALPHABET
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 5.4), width_ratios=(5, 2))
    share = 100 * table / table.sum(1, keepdims=True)
    errors = np.where((share > 0) & ~np.eye(len(table), dtype=bool), share, np.nan)
    left.imshow(np.eye(len(table)), cmap=ListedColormap([PAPER, "#cfccc4"]))
    shown = left.imshow(errors, norm=LogNorm(0.05, 100), cmap=PALE_TO_DARK)
    places = range(len(alphabet))
    left.set(xticks=places, yticks=places, xticklabels=alphabet, yticklabels=alphabet,
             xlabel="answer", ylabel="truth")  # fmt: skip
    left.set_title(f"Errors of the shipped weights; n = {table.sum():,} test pictures")
    left.tick_params(labelsize=7, length=0)
    left.grid(False)
    bar = figure.colorbar(shown, ax=left, label="% of the truth's pictures (log)", shrink=0.8)
    log_ticks(bar.ax.yaxis, (0.1, 1, 10, 100))
    pairs = table + table.T
    upper = np.triu_indices(len(alphabet), 1)
    worst = np.argsort(-pairs[upper])[:10]
    for row, (i, j) in enumerate(zip(upper[0][worst], upper[1][worst], strict=True)):
        right.barh(row, table[i, j], color=COLOURS[0])
        right.barh(row, table[j, i], left=table[i, j], color=COLOURS[1])
    names = [f"{alphabet[upper[0][k]]} {alphabet[upper[1][k]]}" for k in worst]
    right.set(yticks=range(10), yticklabels=names, xlabel="errors: first taken for second (blue),"
              "\nsecond for first (orange)", title="The ten worst pairs")  # fmt: skip
    right.invert_yaxis()
    return figure


def sizes() -> Figure:
    """Show accuracy against picture size, for ours and for the origin's way."""
    measured = record("sizes")
    rows, epochs = measured["rows"], record("origin-short")["settings"]["epochs"]
    figure, axes = plt.subplots(figsize=(7, 4))
    lines = {
        "ours": "shipped weights, inference.py's fit",
        "origin_net_our_fit": f"origin's net and recipe ({epochs} epochs), our fit",
        "origin": "the same, fitted by Resize((28, 28)) as the origin did",
    }
    for key, text in lines.items():
        axes.plot([row["px"] for row in rows], [row[key] for row in rows], marker="o", label=text)
    axes.set(xlabel="side of the picture, px", ylabel="right, %",
             title=f"Test pictures shrunk and saved so; n = {measured['n']:,}")  # fmt: skip
    axes.set_xticks([row["px"] for row in rows])
    axes.legend(loc="lower right")
    return figure


def coverage() -> Figure:
    """Show how much is answered and how much of that is right, as --min-confidence rises."""
    measured = record("coverage")
    figure, axes = plt.subplots(figsize=(7, 4))
    marked = [measured["thresholds"].index(threshold) for threshold in MARKED]
    for key, text in (("test", "EMNIST's test"), ("field", "the field sets together")):
        curve = measured[key]
        points = list(zip(curve["answered"], curve["right"], strict=True))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, markevery=marked,
                  label=f"{text}, n = {curve['n']:,}")  # fmt: skip
        side = {"va": "bottom", "ha": "left"} if key == "test" else {"va": "top", "ha": "right"}
        for at, threshold in zip(marked, MARKED, strict=True):
            axes.annotate(f"{threshold:g}", points[at], (0, 4 if key == "test" else -4),
                          textcoords="offset points", fontsize=8, **side)  # fmt: skip
    axes.set(xlabel="answered, %", ylabel="right of the answered, %",
             title="Coverage against accuracy; beside the dots: --min-confidence")  # fmt: skip
    axes.legend(loc="lower left")
    return figure


def reliability() -> Figure:
    """Compare confidences with how often they are right."""
    measured = record("reliability")
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5.5, 5.5), height_ratios=(3, 1), sharex=True
    )
    upper.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    for place, (key, text) in enumerate({"test": "EMNIST's test", "field": "field sets"}.items()):
        bins = measured[key]
        counts = np.array(bins["counts"])
        enough = counts >= FEWEST
        points = np.array(bins["confidence"])[enough], np.array(bins["right"])[enough]
        upper.plot(*points, marker="o", markersize=4,
                   label=f"{text}: n = {bins['n']:,}, ECE {bins['ece']:.3f}")  # fmt: skip
        width = 1 / len(counts)
        left = (np.arange(len(counts)) + 0.1 + 0.4 * place) * width
        lower.bar(left, counts, 0.4 * width, align="edge", color=COLOURS[place])
    title = f"Reliability; of {len(counts)} bins, those of {FEWEST} pictures or more"
    upper.set(ylabel="share of answers that are right", title=title)
    upper.legend(loc="upper left")
    lower.set(yscale="log", xlabel="confidence", ylabel="pictures", xlim=(0, 1))
    return figure


def fitting() -> Figure:
    """Show on drawings of ours how EMNIST's files are turned, and pictures fitted."""
    stored = [strokes.emnist_picture(c, strokes.hand(i)).T for i, c in enumerate("2457ABEFGJLR")]
    paths = [SAMPLES / name for name in FITTED]
    fitted, _, _ = inference.fit(
        [inference.to_grey(inference.load(str(path))) for path in paths], SIZE
    )
    rows = {
        "as EMNIST's files\nhold it": stored,
        "turned upright\nby train.py": [picture.T for picture in stored],
        "as it came\n(width x height, px)": [shown(path, 96) for path in paths],
        "fitted by\ninference.py": list(fitted),
    }
    figure, grid = plt.subplots(len(rows), len(paths), figsize=(11, 4.2))
    for axes, (text, pictures) in zip(grid, rows.items(), strict=True):
        for cell, picture in zip(axes, pictures, strict=True):
            draw(cell, picture)
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center")
    for cell, path in zip(grid[2], paths, strict=True):
        with Image.open(path) as picture:
            cell.set_title("{} x {}".format(*picture.size), fontsize=8, loc="center")
    return figure


def strip() -> Figure:
    """Show every other sample picture with its answer and confidence; what is wrong in orange."""
    rows = record("samples")["rows"][::2]
    figure, grid = plt.subplots(2, len(rows) // 2, figsize=(11, 2.8))
    for cell, row in zip(grid.flat, rows, strict=True):
        path = ROOT / row["path"]
        draw(cell, shown(path, 128))
        right = row["character"] == path.name[0]
        sure = row["confidence"] > 0.99
        text = row["character"] + (" > 99 %" if sure else f"  {100 * row['confidence']:.0f} %")
        cell.set_xlabel(text, color=INK if right else COLOURS[1], fontsize=10, labelpad=3)
    return figure


def draw(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def shown(path: Path, side: int) -> np.ndarray:
    """Return a picture of any mode as people see it, on a square: (side, side, 3)."""
    picture = inference.load(str(path))
    if picture.mode in ("I", "F"):
        picture = Image.fromarray(inference.to_grey(picture))
    picture = picture.convert("RGBA")
    scale = side / max(picture.size)
    size = [max(1, round(scale * length)) for length in picture.size]
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize(size, way)
    white = Image.new("RGBA", picture.size, "white")
    square = Image.new("RGBA", (side, side), PAPER)
    place = (side - picture.width) // 2, (side - picture.height) // 2
    square.paste(Image.alpha_composite(white, picture), place)
    return np.asarray(square.convert("RGB"))


FIGURES: dict[str, Callable[[], Figure]] = {
    figure.__name__: figure
    for figure in (
        learning_curves, optimizers, confusion, sizes, coverage, reliability, fitting, strip
    )
}  # fmt: skip


def save(name: str, folder: Path) -> None:
    """Write a figure as a PNG of few colours, a third of the bytes."""
    figure = FIGURES[name]()
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)
    with Image.open(folder / f"{name}.png") as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(folder / f"{name}.png", optimize=True)


def report(folder: Path) -> None:
    """Photograph the page that inference.py --report makes of the sample pictures."""
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    chromium += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    chromium += ["--disable-component-update", "--window-size=1180,760"]
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        command = [sys.executable, "inference.py", "--input", "tests/samples", "--report", page]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        chromium += [f"--user-data-dir={scratch}/profile", "--virtual-time-budget=3000"]
        picture = folder / "report.png"
        command = [*chromium, f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the figures")
    parser.add_argument("--only", default=",".join(FIGURES), help="by comma [%(default)s]")
    args = parser.parse_args()
    for name in args.only.split(","):
        if name == "report":
            report(args.out)
        else:
            save(name, args.out)


if __name__ == "__main__":
    main()
