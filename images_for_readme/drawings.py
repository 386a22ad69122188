"""The pictures of both READMEs, drawn from the study's records and from tests/samples."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image, ImageOps

import picture
from CNN import ALPHABET, SIZE
from tests import strokes

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "tests" / "samples"
FITTED = (  # samples that show what fitting does
    "A_photo.jpg G_shade.jpg 1_pencil.jpg 8_photo.jpg F_thin.png W_fat.png 2_tiny.png K_KRAFT.JPG "
    "C_glass.png 3_chalk.png T_dark.png P_strip.png"
).split()
COLOURS = 128  # of a picture's palette: a third of the bytes


def strip(records: dict[str, dict]) -> None:
    """Show every other sample with its answer and confidence, as inference.py gave them."""
    lines = records["samples"]["csv"][:-1]
    rows = list(csv.DictReader(lines))[::2]
    figure, grid = plt.subplots(2, len(rows) // 2, figsize=(11, 2.9))
    command = "$ python3 inference.py --input tests/samples --format csv"
    figure.suptitle(command, x=0.01, ha="left", family="monospace", fontsize=11)
    for cell, row in zip(grid.flat, rows, strict=True):
        show_image(cell, open_as_seen(ROOT / row["path"], 128))
        text = f"{row['character']},{row['confidence']}"
        cell.set_xlabel(text, family="monospace", fontsize=10, labelpad=3)


def fitting(records: dict[str, dict]) -> None:
    """Show on drawings of ours how EMNIST's files are turned, and pictures fitted."""
    upright = []
    for seed, character in enumerate("2457ABEFGJLR"):
        upright.append(strokes.emnist_picture(character, strokes.hand(seed)))
    rows = {
        "as EMNIST's\nfiles hold it": [image.T for image in upright],
        "turned upright\nby train.py": upright,
        "as it came": [open_as_seen(SAMPLES / name, 96) for name in FITTED],
        "fitted by\npicture.py": [fit_sample(name) for name in FITTED],
    }
    grid = plt.subplots(len(rows), len(FITTED), figsize=(11, 4))[1]
    for axes, (text, images) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center")
        for cell, image in zip(axes, images, strict=True):
            show_image(cell, image)


def learning_curves(records: dict[str, dict]) -> None:
    """Compare the original project's nine runs and a default one on validation."""
    axes = plt.subplots(figsize=(8, 4.5))[1]
    for name in [*(f"run{number}" for number in range(1, 10)), "default-3"]:
        wrong = [100 - accuracy for accuracy in records[name]["curve"]["accuracy"]]
        style = "k-" if name == "default-3" else "-"
        axes.plot(range(1, len(wrong) + 1), wrong, style, label=name)
    axes.set(yscale="log", xlabel="epochs", ylabel="wrong on validation, % (logarithmic)")
    ticks = (6, 8, 10, 15, 20, 30, 50)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(ncols=2)


def confusion(records: dict[str, dict]) -> None:
    """Show what the shipped weights take for what."""
    counts = np.array(records["shipped"]["confusion"])
    errors = 100 * counts / counts.sum(1, keepdims=True) * (1 - np.eye(len(ALPHABET)))
    figure, axes = plt.subplots(figsize=(6.5, 5.4))
    chart = axes.imshow(errors, norm=LogNorm(0.01, 100), cmap="Blues")
    axes.set_xticks(range(len(ALPHABET)), ALPHABET, fontsize=7)
    axes.set_yticks(range(len(ALPHABET)), ALPHABET, fontsize=7)
    axes.set(xlabel="answer", ylabel="truth")
    figure.colorbar(chart, label="% of the row's pictures", format="%g", shrink=0.8)


def fit_sample(name: str) -> np.ndarray:
    """Return the first reading of a sample: (28, 28) uint8."""
    return picture.prepare(str(SAMPLES / name), SIZE)


def show_image(axes: plt.Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[], frame_on=False)


def open_as_seen(path: Path, side: int) -> np.ndarray:
    """Return a picture of any mode as people see it, on a white square: (side, side, 4) uint8."""
    image = picture.read(str(path))
    if image.mode in ("I", "F"):
        image = Image.fromarray(picture.to_grey(image))
    image = ImageOps.pad(image.convert("RGBA"), (side, side), color=(0, 0, 0, 0))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))


def photograph_report(file: Path) -> None:
    """Photograph the page of --report in chromium."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "report.html")
        command = [sys.executable, "inference.py", "--input", "tests/samples", "--report", page]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        browser = "chromium --headless --no-sandbox --hide-scrollbars --window-size=1180,700"
        files = [f"--user-data-dir={scratch}/profile", f"--screenshot={file}", page.as_uri()]
        subprocess.run([*browser.split(), *files], check=True, capture_output=True)


DRAWINGS = {drawing.__name__: drawing for drawing in (strip, fitting, learning_curves, confusion)}


def draw(name: str, records: dict[str, dict], folder: Path) -> None:
    """Write a picture of the study, or `report`, as folder/name.png."""
    file = folder / f"{name}.png"
    if name == "report":
        photograph_report(file)
    else:
        with plt.rc_context({"figure.constrained_layout.use": True}):
            DRAWINGS[name](records)
            plt.savefig(file, dpi=150)
            plt.close()
    image = Image.open(file).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
