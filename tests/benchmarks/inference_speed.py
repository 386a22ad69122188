"""Time inference.py against the naive loop, against decoding alone, and over very many files.

    python3 tests/benchmarks/inference_speed.py                     # small photos startup
    python3 tests/benchmarks/inference_speed.py many                # 200,000 files

The pictures are drawn by tests/strokes.py. Baseline: the origin's way, one picture at a time,
opened, resized, classified by its net (run8, float32) and printed, on as many threads as torch
likes. Limit: Pillow's decoding alone in as many processes as there are cores. Ours: the whole
command, less the time it takes for one picture. The three are timed in turn, --rounds times; a
ratio is the median of the rounds'.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "images_for_readme")]

import strokes  # noqa: E402

import CNN  # noqa: E402

CORES = len(os.sched_getaffinity(0))
DISTINCT = {"small": 360, "photos": 36}  # drawings; the files are copies of them


def draw(folder: Path, kind: str, count: int) -> list[Path]:
    """Write `count` pictures: PNGs of 28x28 as EMNIST's, or JPEGs of 800x600 as a phone's."""
    folder.mkdir(parents=True)
    files, drawn = [], []
    for i in range(min(count, DISTINCT[kind])):
        character, writer = CNN.ALPHABET[i % len(CNN.ALPHABET)], strokes.hand(i)
        path = folder / f"{i:06d}{character}.{'png' if kind == 'small' else 'jpg'}"
        if kind == "small":
            Image.fromarray(strokes.emnist_picture(character, writer, form=i)).save(path)
        else:
            ink = strokes.ink(character, writer, (800, 600))
            strokes.photograph(ink, np.random.default_rng(i)).save(path, quality=85)
        drawn.append(path.read_bytes())
        files.append(path)
    for i in range(len(files), count):
        path = folder / f"{i:06d}{files[i % len(drawn)].name[6:]}"
        path.write_bytes(drawn[i % len(drawn)])
        files.append(path)
    return files


def baseline(files: list[Path]) -> None:
    """Classify as the origin does: a Python loop, one picture at a time."""
    import torch

    net = CNN.Net("run8", **CNN.ORIGIN).eval()
    with open(os.devnull, "w") as out, torch.no_grad():
        for path in files:
            picture = Image.open(path).convert("L").resize((CNN.SIZE, CNN.SIZE))
            pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
            answer = net(pixels[None, None]).argmax(1).item()
            print(f"{ord(CNN.ALPHABET[answer]):03d}, {path}", file=out)


def decode(path: Path) -> int:
    with Image.open(path) as picture:
        picture.load()
    return 0


def limit(files: list[Path]) -> None:
    """Decode, and nothing else, in all cores."""
    with get_context("fork").Pool(CORES) as pool:
        for _ in pool.imap_unordered(decode, files, chunksize=64):
            pass


def ours(*paths: Path) -> None:
    command = [sys.executable, str(ROOT / "inference.py"), "--input", *map(str, paths)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )


def seconds(work: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def compare(kind: str, count: int, rounds: int) -> dict:
    """Print pictures/s of baseline, limit and ours, and how many times the baseline ours are."""
    with tempfile.TemporaryDirectory() as top:
        files = draw(Path(top) / kind, kind, count)
        part = files[: max(1, count // 10)]  # enough to time the slow loop
        baseline(files[:20])
        rates: dict[str, list[float]] = {"baseline": [], "limit": [], "ours": []}
        for _ in range(rounds):
            rates["baseline"].append(len(part) / seconds(baseline, part))
            rates["limit"].append(count / seconds(limit, files))
            alone = seconds(ours, files[0])
            rates["ours"].append(count / (seconds(ours, Path(top) / kind) - alone))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [o / b for o, b in zip(rates["ours"], rates["baseline"], strict=True)]
    middle["ratio"] = statistics.median(ratios)
    print(
        f"{kind:<8}{count:>8,}{middle['baseline']:>12,.0f}{middle['limit']:>12,.0f}"
        f"{middle['ours']:>12,.0f}{middle['ratio']:>8.1f}x",
        flush=True,
    )
    return {"pictures": count, **{name: round(value, 2) for name, value in middle.items()}}


def startup(rounds: int) -> dict:
    """Print the time to classify one picture as a multiple of `import torch`."""
    bare = [sys.executable, "-c", "import torch"]
    ratios = []
    for _ in range(max(rounds, 5)):
        first = seconds(subprocess.run, bare)
        ratios.append(seconds(ours, next((ROOT / "tests/samples").iterdir())) / first)
    print(
        f"one picture: {statistics.median(ratios):.2f} x import torch ({first:.2f} s)", flush=True
    )
    return {"ratio": round(statistics.median(ratios), 3), "import_torch": round(first, 2)}


def memory(pid: int) -> float:
    """Return the resident memory of a process and its descendants, MB (proportional shares)."""
    total = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        total += sum(memory(int(child)) for child in task.read_text().split())
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            total += int(line.split()[1]) / 1e3
    return total


def many(count: int) -> list[dict]:
    """Run over hard links to a few hundred files; print memory and rate along the way."""
    with tempfile.TemporaryDirectory() as top:
        files = draw(Path(top) / "drawn", "small", DISTINCT["small"])
        for i in range(count):
            folder = Path(top) / "links" / f"{i // 10_000:03d}"
            if i % 10_000 == 0:
                folder.mkdir(parents=True)
            os.link(files[i % len(files)], folder / f"{i:07d}.png")
        command = [sys.executable, str(ROOT / "inference.py"), "--input", str(Path(top) / "links")]
        start = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        print(f"{'done':>12}{'seconds':>10}{'pictures/s':>12}{'MB':>8}")
        marks = {1, *(count * part // 100 for part in (10, 50, 99))}
        last, at, rows = 0, start, []
        for done, _ in enumerate(run.stdout, 1):
            if done in marks:
                now = time.perf_counter()
                rate = (done - last) / (now - at)
                print(f"{done:>12,}{now - start:>10.1f}{rate:>12,.0f}{memory(run.pid):>8,.0f}")
                row = {"done": done, "seconds": now - start, "rate": rate, "MB": memory(run.pid)}
                rows.append({name: round(value, 1) for name, value in row.items()})
                last, at = done, now
        if run.wait() or done != count:
            sys.exit(f"{done:,} lines for {count:,} pictures, exit status {run.returncode}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="of small, photos, startup, many")
    parser.add_argument("--small", type=int, default=20_000, help="PNGs of 28x28")
    parser.add_argument("--photos", type=int, default=5_000, help="JPEGs of 800x600")
    parser.add_argument("--many", type=int, default=200_000, help="hard links")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write bench-inference.json")
    args = parser.parse_args()
    what = args.what or ["small", "photos", "startup"]
    print(f"{CORES} cores, Python {sys.version.split()[0]}, Pillow {Image.__version__}")
    if {"small", "photos"} & set(what):
        print(f"{'':<8}{'pictures':>8}{'baseline/s':>12}{'limit/s':>12}{'ours/s':>12}{'':>9}")
    work = {
        "small": lambda: compare("small", args.small, args.rounds),
        "photos": lambda: compare("photos", args.photos, args.rounds),
        "startup": lambda: startup(args.rounds),
        "many": lambda: many(args.many),
    }
    results = {name: work[name]() for name in work if name in what}
    if args.keep:
        import study

        study.keep("bench-inference", "pictures drawn by tests/strokes.py", results)


if __name__ == "__main__":
    main()
