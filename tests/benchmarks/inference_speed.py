"""Time inference.py against the naive loop, against decoding alone, and over very many files.

    python3 -m tests.benchmarks.inference_speed small photos startup many

The pictures are drawn by tests/strokes.py. Naive loop: the original project's way, one picture at a
time, opened, resized, classified by its net (run8, float32) and printed, on as many threads as
torch likes. Decoding: Pillow's alone in as many processes as there are cores. Ours: the whole
command, less the time it takes for one picture. The three are timed in turn, ROUNDS times; a ratio
is the median of the rounds'.
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

import CNN
from images_for_readme import study
from images_for_readme.measure import ROOT
from tests import strokes

OURS = [sys.executable, str(ROOT / "inference.py"), "--input"]
COUNTS = {"small": 20_000, "photos": 5_000, "many": 200_000, "startup": 1}  # pictures
DISTINCT = 360  # drawings at most; the files are links to them
ROUNDS = 3
STARTS = 7  # of a process, to time it
PICTURES = {"small": "PNG 28x28", "photos": "JPEG 800x600"}


def draw(folder: Path, what: str, count: int) -> list[Path]:
    """Write `count` pictures: PNGs of 28x28 as EMNIST's, or JPEGs of 800x600 as a phone's."""
    suffix = ".jpg" if what == "photos" else ".png"
    files = [folder / f"{i // 10_000:03d}" / f"{i:07d}{suffix}" for i in range(count)]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        character = CNN.ALPHABET[i % 36]
        writer = strokes.hand(i)
        if i >= DISTINCT:
            os.link(files[i % DISTINCT], file)
        elif what == "photos":
            ink = strokes.ink(character, writer, (800, 600))
            strokes.photograph(ink, np.random.default_rng(i)).save(file, quality=85)
        else:
            Image.fromarray(strokes.emnist_picture(character, writer, form=i)).save(file)
    return files


def time_naive_loop(files: list[Path]) -> float:
    """Classify as the original project does, a picture at a time; return pictures a second."""
    net = CNN.Net("run8").eval()
    start = time.perf_counter()
    with open(os.devnull, "w") as out, torch.no_grad():
        for path in files:
            picture = Image.open(path).convert("L").resize((CNN.SIZE, CNN.SIZE))
            pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
            answer = net(pixels[None, None]).argmax(1).item()
            print(f"{ord(CNN.ALPHABET[answer]):03d}, {path}", file=out)
    return len(files) / (time.perf_counter() - start)


def decode(path: Path) -> None:
    Image.open(path).load()


def time_decoding(files: list[Path]) -> float:
    """Decode, and nothing else, in all cores; return pictures a second."""
    start = time.perf_counter()
    with get_context("fork").Pool() as pool:
        pool.map(decode, files, chunksize=64)
    return len(files) / (time.perf_counter() - start)


def seconds(*command: object) -> float:
    """Return how long a command takes."""
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=PIPE, stderr=DEVNULL)
    return time.perf_counter() - start


def compare(what: str, count: int, folder: Path) -> dict:
    """Return pictures a second of the naive loop, of decoding and of ours, as a row of a table."""
    files = draw(folder, what, count)
    part = files[: max(1, count // 10)]  # enough to time the slow loop
    time_naive_loop(files[:20])  # to warm up
    rounds = []
    for _ in range(ROUNDS):
        naive = time_naive_loop(part)
        decoding = time_decoding(files)
        ours = count / (seconds(*OURS, folder) - seconds(*OURS, files[0]))
        rounds.append((naive, decoding, ours, ours / naive))
    heads = ("naive loop", "decoding", "ours", "ours : naive")
    return {"": PICTURES[what], **dict(zip(heads, np.median(rounds, axis=0), strict=True))}


def time_start(folder: Path) -> dict:
    """Return the time to classify one picture as a multiple of `import torch`."""
    (file,) = draw(folder, "small", 1)
    bare = []
    ratios = []
    for _ in range(STARTS):
        bare.append(seconds(sys.executable, "-c", "import torch"))
        ratios.append(seconds(*OURS, file) / bare[-1])
    return {"ratio": np.median(ratios), "import_torch": min(bare)}


def measure_memory(pid: int) -> float:
    """Return the resident memory of a process and its descendants, MB (proportional shares)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    total = int(rollup[rollup.index("Pss:") + 1]) / 1e3
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            total += measure_memory(int(child))
    return total


def watch_memory(count: int, folder: Path) -> list[dict]:
    """Return seconds and memory along the way over very many files."""
    draw(folder, "many", count)
    start = time.perf_counter()
    process = subprocess.Popen([*OURS, folder], stdout=PIPE, stderr=DEVNULL)
    rows = []
    done = 0
    for done, _ in enumerate(process.stdout, 1):
        if done in (1, count // 10, count // 2, count * 99 // 100):
            passed = time.perf_counter() - start
            rows.append({"done": done, "seconds": passed, "MB": measure_memory(process.pid)})
    if process.wait() or done != count:
        sys.exit(f"{done:,} lines for {count:,} pictures, exit status {process.returncode}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=COUNTS)
    parser.add_argument("--part", type=float, default=1, help="of the pictures")
    parser.add_argument("--keep", action="store_true", help="as the record bench-inference")
    args = parser.parse_args()
    content = {"rows": []}
    for what in args.what:
        count = max(1, round(args.part * COUNTS[what]))
        with tempfile.TemporaryDirectory() as scratch:
            if what == "startup":
                content["startup"] = time_start(Path(scratch))
            elif what == "many":
                content["memory"] = watch_memory(count, Path(scratch))
            else:
                content["rows"].append(compare(what, count, Path(scratch)))
        print(what, content, flush=True)
    if args.keep:
        study.keep("bench-inference", "pictures drawn by tests/strokes.py", content)


if __name__ == "__main__":
    main()
