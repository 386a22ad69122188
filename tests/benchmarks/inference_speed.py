"""Time inference.py against the naive loop, against decoding alone, and over very many files.

    python3 tests/benchmarks/inference_speed.py small photos startup many

The pictures are drawn by tests/strokes.py. Baseline: the origin's way, one picture at a time,
opened, resized, classified by its net (run8, float32) and printed, on as many threads as torch
likes. Limit: Pillow's decoding alone in as many processes as there are cores. Ours: the whole
command, less the time it takes for one picture. The three are timed in turn, ROUNDS times; a
ratio is the median of the rounds'.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "images_for_readme")]

import strokes  # noqa: E402
import study  # noqa: E402

import CNN  # noqa: E402

OURS = [sys.executable, ROOT / "inference.py", "--input"]
COUNTS = {"small": 20_000, "photos": 5_000, "many": 200_000, "startup": 1}  # pictures
DISTINCT = 360  # drawings at most; the files are links to them
ROUNDS = 3


def draw(folder: Path, kind: str, count: int) -> list[Path]:
    """Write `count` pictures: PNGs of 28x28 as EMNIST's, or JPEGs of 800x600 as a phone's."""
    files = [folder / f"{i // 10_000:03d}" / f"{i:07d}" for i in range(count)]
    files = [file.with_suffix(".jpg" if kind == "photos" else ".png") for file in files]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        character, writer = CNN.ALPHABET[i % 36], strokes.hand(i)
        if i >= DISTINCT:
            os.link(files[i % DISTINCT], file)
        elif kind == "photos":
            ink = strokes.ink(character, writer, (800, 600))
            strokes.photograph(ink, np.random.default_rng(i)).save(file, quality=85)
        else:
            Image.fromarray(strokes.emnist_picture(character, writer, form=i)).save(file)
    return files


def baseline(files: list[Path]) -> float:
    """Classify as the origin does, a picture at a time, in a Python loop; return the rate."""
    net, start = CNN.Net("run8").eval(), time.perf_counter()
    with open(os.devnull, "w") as out, torch.no_grad():
        for path in files:
            picture = Image.open(path).convert("L").resize((CNN.SIZE, CNN.SIZE))
            pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
            answer = net(pixels[None, None]).argmax(1).item()
            print(f"{ord(CNN.ALPHABET[answer]):03d}, {path}", file=out)
    return len(files) / (time.perf_counter() - start)


def decode(path: Path) -> None:
    Image.open(path).load()


def limit(files: list[Path]) -> float:
    """Decode, and nothing else, in all cores; return the rate."""
    start = time.perf_counter()
    with get_context("fork").Pool() as pool:
        pool.map(decode, files, chunksize=64)
    return len(files) / (time.perf_counter() - start)


def seconds(*command: object) -> float:
    start, quiet = time.perf_counter(), {"stdout": PIPE, "stderr": DEVNULL}
    subprocess.run(list(map(str, command)), check=True, **quiet)
    return time.perf_counter() - start


def compare(kind: str, count: int, folder: Path) -> dict:
    """Return pictures/s of baseline, limit and ours, and how many times the baseline ours are."""
    files, rows = draw(folder, kind, count), []
    part = files[: max(1, count // 10)]  # enough to time the slow loop
    baseline(files[:20])
    for _ in range(ROUNDS):
        slow, best = baseline(part), limit(files)
        ours = count / (seconds(*OURS, folder) - seconds(*OURS, files[0]))
        rows.append((slow, best, ours, ours / slow))
    names = ("pictures", "baseline", "limit", "ours", "ratio")
    return dict(zip(names, (count, *np.median(rows, axis=0).round(2).tolist()), strict=True))


def startup(kind: str, count: int, folder: Path) -> dict:
    """Return the time to classify one picture as a multiple of `import torch`."""
    one = [*OURS, *draw(folder, kind, count)]
    times = [(seconds(sys.executable, "-c", "import torch"), seconds(*one)) for _ in range(7)]
    ratio = np.median([first / bare for bare, first in times])
    return {"ratio": round(ratio.item(), 3), "import_torch": round(min(times)[0], 2)}


def memory(pid: int) -> float:
    """Return the resident memory of a process and its descendants, MB (proportional shares)."""
    children = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    own = int(rollup[rollup.index("Pss:") + 1]) / 1e3
    return own + sum(memory(int(child)) for child in " ".join(children).split())


def many(kind: str, count: int, folder: Path) -> dict:
    """Return seconds and memory along the way over very many files."""
    draw(folder, kind, count)
    start, rows = time.perf_counter(), []
    process = subprocess.Popen([*OURS, folder], stdout=PIPE, stderr=DEVNULL)
    for done, _ in enumerate(process.stdout, 1):
        if done in (1, count // 10, count // 2, count * 99 // 100):
            rows.append((done, round(time.perf_counter() - start, 1), memory(process.pid)))
    if process.wait() or done != count:
        sys.exit(f"{done:,} lines for {count:,} pictures, exit status {process.returncode}")
    return dict(zip(("done", "seconds", "MB"), map(list, zip(*rows)), strict=True))  # noqa: B905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=COUNTS)
    parser.add_argument("--part", type=float, default=1, help="of the pictures")
    parser.add_argument("--keep", action="store_true", help="as the record bench-inference")
    args, results = parser.parse_args(), {}
    for name in args.what:
        measure = {"startup": startup, "many": many}.get(name, compare)
        with tempfile.TemporaryDirectory() as folder:
            count = max(1, round(args.part * COUNTS[name]))
            results[name] = measure(name, count, Path(folder))
        print(name, results[name], flush=True)
    if args.keep:
        study.keep("bench-inference", "pictures drawn by tests/strokes.py", results)


if __name__ == "__main__":
    main()
