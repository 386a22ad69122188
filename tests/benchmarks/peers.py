"""Compare inference.py with what people would use instead, on labelled pictures, on one core.

    pip install -r requirements.txt -r tests/benchmarks/peers_requirements.txt
    apt-get install tesseract-ocr
    python3 tests/benchmarks/peers.py ../shared/field        # --keep: as the record peers

Each is called as its documentation says for a single character. All but ours get the pictures as
Tesseract's asks for: ink dark, the character enlarged, a white border, by which all three gain, 8,
9 and 21 points. Lower case counts as upper. Accuracy, alike and alphabet are those of the study;
RapidOCR can't be told an alphabet. Speeds count from file to answer, the start left out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "images_for_readme")]

import study  # noqa: E402

DIGITS, LETTERS = study.ALPHABET[:10], study.ALPHABET[10:]
PICTURES = 80  # of a set, evenly, at most
SIDE = 48  # px, longer side; of 32, 40, 48 and 64 the best for RapidOCR and ddddocr


def prepare(path: Path, border: int, target: Path) -> str:
    """Write a picture dark on light, enlarged, with a white border, for the others to read."""
    image = Image.open(path).convert("L")
    grey = np.asarray(image)
    if np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])) < 128:
        image = ImageOps.invert(image)
    size = [max(1, round(side * SIDE / max(image.size))) for side in image.size]
    ImageOps.expand(image.resize(size, Image.Resampling.BICUBIC), border, 255).save(target)
    return str(target)


def ours(files: list[str], alphabet: str) -> list[str]:
    command = [sys.executable, ROOT / "inference.py", "--workers", "1", "--format", "json"]
    command += ["--alphabet", alphabet, "--input", *files]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line)["character"] for line in run.stdout.splitlines()]


def rapidocr(files: list[str], alphabet: str) -> list[str]:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    engine = RapidOCR(params={threads: 1, "Global.log_level": "critical"})
    flags = {"use_det": False, "use_cls": False, "use_rec": True}
    return ["".join(engine(file, **flags).txts or ()) for file in files]


def ddddocr(files: list[str], alphabet: str) -> list[str]:
    from ddddocr import DdddOcr

    engine = DdddOcr(beta=True, show_ad=False)  # the better here of its two models
    engine.set_ranges(alphabet + alphabet.lower())
    return [engine.classification(Path(file).read_bytes()) for file in files]


def tesseract(files: list[str], alphabet: str) -> list[str]:
    command = ["tesseract", "stdin", "stdout", "--psm", "10", "-c"]
    command += [f"tessedit_char_whitelist={alphabet}{alphabet.lower()}"]
    names = "\n".join(files)
    run = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    return run.stdout.split("\f")[: len(files)]  # one after each picture but the last


def measure(peer: Callable, sets: list[list[Path]]) -> dict:
    """Return the study's scores of each set, and the rate over all."""
    rows, rates = {}, []  # rows of a path: free, then its alphabet told
    for kind in (DIGITS + LETTERS, DIGITS, LETTERS):
        paths = [p for held in sets if {p.parent.name for p in held} <= set(kind) for p in held]
        times = []
        for part in (paths[:1], paths[:1], paths):  # once to warm up, once to time the start
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                files = [str(path) for path in part]
                if peer is not ours:
                    border, targets = 10 if peer is tesseract else 4, map("{}.png".format, count())
                    files = [prepare(p, border, Path(folder, n)) for p, n in zip(part, targets)]  # noqa: B905
                texts = peer(files, kind)
            times.append(time.perf_counter() - start)
        rates.append((len(paths) - 1) / (times[2] - times[1]))
        for path, text in zip(paths, texts, strict=True):
            read = (re.findall(f"[{kind}]", text.upper()) or [""])[0]
            row = {"character": read, "alternatives": {}, "truth": path.parent.name}
            rows.setdefault(path, []).append(row)
    free = np.array([study.score([rows[path][0] for path in held]) for held in sets])
    free[:, 2] = [study.score([rows[path][-1] for path in held])[2] for held in sets]
    return {"rate": rates[0], **dict(zip(study.SCORES, free.T.tolist(), strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("field", type=Path, help="holds SET/LABEL/IMAGE")
    parser.add_argument("--keep", action="store_true", help="as the record peers")
    args = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    files = [sorted(folder.glob("*/*.png")) for folder in sorted(args.field.iterdir())]
    sets = [paths[:: -(-len(paths) // PICTURES)] for paths in files if paths]
    names = [paths[0].parents[1].name for paths in sets]
    shown = subprocess.check_output(["tesseract", "--version"], text=True).split()[1]
    peers = {"ours": ours, f"RapidOCR {version('rapidocr')}": rapidocr}
    peers |= {f"ddddocr {version('ddddocr')}": ddddocr, f"Tesseract {shown}": tesseract}
    rows = {name: measure(peer, sets) for name, peer in peers.items()}
    for name, row in rows.items():
        print(name, {key: round(np.mean(values), 1) for key, values in row.items()})
    if args.keep:
        figures = {key: [row[key] for row in rows.values()] for key in rows["ours"]}
        data = f"{sum(map(len, sets))} pictures of {len(sets)} field sets"
        study.keep("peers", data, {"set": names, "peer": list(rows), **figures})


if __name__ == "__main__":
    main()
