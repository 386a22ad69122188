"""Time inference.py against the naive loop, against decoding alone, and over very many files.

    python3 tests/benchmarks/inference_speed.py small photos startup many

The pictures are drawn by tests/strokes.py. Baseline: the origin's way, one picture at a time,
opened, resized, classified by its net (run8, float32) and printed, on as many threads as torch
likes. Limit: Pillow's decoding alone in as many processes as there are cores. Ours: the whole
command, less the time it takes for one picture. The three are timed in turn, ROUNDS times; a
ratio is the median of the rounds'. SCRIPT in the environment: another inference.py.
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
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "images_for_readme")]

import strokes  # noqa: E402

import CNN  # noqa: E402

SCRIPT = os.environ.get("SCRIPT", ROOT / "inference.py")
COUNTS = {"small": 20_000, "photos": 5_000, "many": 200_000}  # pictures
DISTINCT = 360  # drawings at most; the files are copies of them
ROUNDS = 3


def draw(folder: Path, kind: str, count: int) -> list[Path]:
    """Write `count` pictures: PNGs of 28x28 as EMNIST's, or JPEGs of 800x600 as a phone's."""
    folder.mkdir(parents=True)
    suffix = "png" if kind == "small" else "jpg"
    files = [folder / f"{i:06d}{CNN.ALPHABET[i % 36]}.{suffix}" for i in range(count)]
    for i, file in enumerate(files):
        character, writer = file.stem[-1], strokes.hand(i)
        if i >= DISTINCT:
            file.write_bytes(files[i % DISTINCT].read_bytes())
        elif kind == "small":
            Image.fromarray(strokes.emnist_picture(character, writer, form=i)).save(file)
        else:
            ink = strokes.ink(character, writer, (800, 600))
            strokes.photograph(ink, np.random.default_rng(i)).save(file, quality=85)
    return files


def baseline(files: list[Path]) -> None:
    """Classify as the origin does: a Python loop, one picture at a time."""
    net = CNN.Net("run8", **CNN.ORIGIN).eval()
    with open(os.devnull, "w") as out, torch.no_grad():
        for path in files:
            picture = Image.open(path).convert("L").resize((CNN.SIZE, CNN.SIZE))
            pixels = torch.from_numpy(np.array(picture, np.float32) / 255)
            answer = net(pixels[None, None]).argmax(1).item()
            print(f"{ord(CNN.ALPHABET[answer]):03d}, {path}", file=out)


def decode(path: Path) -> None:
    Image.open(path).load()


def limit(files: list[Path]) -> None:
    """Decode, and nothing else, in all cores."""
    with get_context("fork").Pool() as pool:
        pool.map(decode, files, chunksize=64)


def seconds(work: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def ours(path: Path) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, SCRIPT, "--input", path], check=True, **quiet)


def compare(kind: str, count: int) -> dict:
    """Return pictures/s of baseline, limit and ours, and how many times the baseline ours are."""
    rates: dict[str, list[float]] = {"baseline": [], "limit": [], "ours": []}
    with tempfile.TemporaryDirectory() as top:
        files = draw(Path(top) / kind, kind, count)
        part = files[: max(1, count // 10)]  # enough to time the slow loop
        baseline(files[:20])
        for _ in range(ROUNDS):
            rates["baseline"].append(len(part) / seconds(baseline, part))
            rates["limit"].append(count / seconds(limit, files))
            alone = seconds(ours, files[0])
            rates["ours"].append(count / (seconds(ours, Path(top) / kind) - alone))
    rates["ratio"] = [o / b for o, b in zip(rates["ours"], rates["baseline"], strict=True)]
    middle = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    return {"pictures": count, **middle}


def startup() -> dict:
    """Return the time to classify one picture as a multiple of `import torch`."""
    bare, one = [sys.executable, "-c", "import torch"], next((ROOT / "tests/samples").iterdir())
    times = [(seconds(subprocess.run, bare), seconds(ours, one)) for _ in range(2 * ROUNDS + 1)]
    ratio = statistics.median(first / bare for bare, first in times)
    return {"ratio": round(ratio, 3), "import_torch": round(min(times)[0], 2)}


def memory(pid: int) -> float:
    """Return the resident memory of a process and its descendants, MB (proportional shares)."""
    children = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    own = int(rollup[rollup.index("Pss:") + 1]) / 1e3
    return own + sum(memory(int(child)) for child in " ".join(children).split())


def many(count: int) -> dict:
    """Run over hard links to a few hundred files; return memory and rate along the way."""
    found: dict[str, list] = {"done": [], "seconds": [], "rate": [], "MB": []}
    with tempfile.TemporaryDirectory() as top:
        files = draw(Path(top) / "drawn", "small", DISTINCT)
        for i in range(count):
            folder = Path(top) / "links" / f"{i // 10_000:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(files[i % len(files)], folder / f"{i:07d}.png")
        command = [sys.executable, SCRIPT, "--input", Path(top) / "links"]
        start, last, before = time.perf_counter(), 0.0, 0
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for done, _ in enumerate(run.stdout, 1):
            if done in (1, count // 10, count // 2, count * 99 // 100):
                now = time.perf_counter() - start
                row = (done, round(now, 1), round((done - before) / (now - last)), memory(run.pid))
                for values, value in zip(found.values(), row, strict=True):
                    values.append(value)
                last, before = now, done
        if run.wait() or done != count:
            sys.exit(f"{done:,} lines for {count:,} pictures, exit status {run.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="of small, photos, startup, many")
    parser.add_argument("--part", type=float, default=1, help="of the pictures")
    parser.add_argument("--keep", action="store_true", help="as the record bench-inference")
    args, results = parser.parse_args(), {}
    for name in args.what:
        count = round(args.part * COUNTS.get(name, 0))
        if name == "startup":
            results[name] = startup()
        else:
            results[name] = many(count) if name == "many" else compare(name, count)
        print(name, results[name], flush=True)
    if args.keep:
        import study

        study.keep("bench-inference", "pictures drawn by tests/strokes.py", results)


if __name__ == "__main__":
    main()
