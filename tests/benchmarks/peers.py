"""Compare inference.py with what people would use instead, on labelled pictures, on one core.

    pip install -r requirements.txt -r tests/benchmarks/peers_requirements.txt
    apt-get install tesseract-ocr
    python3 tests/benchmarks/peers.py ../shared/field        # --keep: as the record peers

Each is called as its documentation says for a single character. All but ours get the pictures as
Tesseract's asks for: ink dark, the character enlarged, a white border, by which all three gain, 8,
9 and 21 points. Lower case counts as upper. Accuracy, alike and alphabet are those of the study;
RapidOCR can't be told an alphabet. Speeds count from file to answer, models loaded.
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
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "images_for_readme")]

import study  # noqa: E402

DIGITS, LETTERS = study.ALPHABET[:10], study.ALPHABET[10:]
SIDE = 48  # px, longer side; of 32, 40, 48 and 64 the best for RapidOCR and ddddocr
Answers = tuple[list[str], float]  # what is read in each picture, and in how many seconds


def prepare(path: Path, border: int, target: str) -> str:
    """Write a picture dark on light, enlarged, with a white border, for the others to read."""
    image = Image.open(path).convert("L")
    grey = np.asarray(image)
    if np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])) < 128:
        image = ImageOps.invert(image)
    size = [max(1, round(side * SIDE / max(image.size))) for side in image.size]
    ImageOps.expand(image.resize(size, Image.Resampling.BICUBIC), border, 255).save(target)
    return target


def one_by_one(read: Callable[[str], str], paths: list[Path], folder: str) -> Answers:
    read(prepare(paths[0], 4, f"{folder}/one.png"))  # loads the model
    start = time.perf_counter()
    texts = [read(prepare(path, 4, f"{folder}/one.png")) for path in paths]
    return texts, time.perf_counter() - start


def ours(paths: list[Path], alphabet: str, folder: str) -> Answers:
    command = [sys.executable, ROOT / "inference.py", "--workers", "1", "--format", "json"]
    command += ["--alphabet", alphabet, "--input", *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rate = re.search(r"\(([\d,]+) pictures/s\)", run.stderr)[1].replace(",", "")
    texts = [json.loads(line)["character"] for line in run.stdout.splitlines()]
    return texts, len(paths) / float(rate)


def rapidocr(paths: list[Path], alphabet: str, folder: str) -> Answers:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    engine = RapidOCR(params={threads: 1, "Global.log_level": "critical"})

    def read(file: str) -> str:
        return "".join(engine(file, use_det=False, use_cls=False, use_rec=True).txts or ())

    return one_by_one(read, paths, folder)


def ddddocr(paths: list[Path], alphabet: str, folder: str) -> Answers:
    from ddddocr import DdddOcr

    engine = DdddOcr(beta=True, show_ad=False)  # the better here of its two models
    engine.set_ranges(alphabet + alphabet.lower())
    return one_by_one(lambda f: engine.classification(Path(f).read_bytes()), paths, folder)


def tesseract(paths: list[Path], alphabet: str, folder: str) -> Answers:
    start = time.perf_counter()
    files = [prepare(path, 10, f"{folder}/{i}.png") for i, path in enumerate(paths)]
    names, allowed = Path(folder, "names.txt"), alphabet + alphabet.lower()
    names.write_text("\n".join(files))
    command = ["tesseract", names, "stdout", "--psm", "10", "-c"]
    command += [f"tessedit_char_whitelist={allowed}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    pages = run.stdout.split("\f")  # one after each picture but the last
    return pages[: len(paths)], time.perf_counter() - start


def measure(peer: Callable, sets: list[list[Path]]) -> dict:
    """Return the study's scores of each set, and the rate over all."""
    rows, rates = {}, []  # path: free, then its alphabet told
    for kind in (DIGITS + LETTERS, DIGITS, LETTERS):
        paths = [p for held in sets if {p.parent.name for p in held} <= set(kind) for p in held]
        with tempfile.TemporaryDirectory() as folder:
            texts, seconds = peer(paths, kind, folder)
        rates.append(len(paths) / seconds)
        for path, text in zip(paths, texts, strict=True):
            read = (re.findall(f"[{kind}]", text.upper()) or [""])[0]
            row = {"character": read, "alternatives": {}, "truth": path.parent.name}
            rows.setdefault(path, []).append(row)
    free = [study.score([rows[path][0] for path in held]) for held in sets]
    told = [study.score([rows[path][-1] for path in held]) for held in sets]
    scores = [(accuracy, alike, known[2]) for (accuracy, alike, _), known in zip(free, told)]  # noqa: B905
    return {"rate": rates[0], **dict(zip(study.SCORES, zip(*scores)))}  # noqa: B905


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("field", type=Path, help="holds SET/LABEL/IMAGE")
    parser.add_argument("--pictures", type=int, default=80, help="of a set, evenly [%(default)s]")
    parser.add_argument("--keep", action="store_true", help="as the record peers")
    args = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    sets = {}
    for folder in sorted(path for path in args.field.iterdir() if path.is_dir()):
        files = sorted(p for p in folder.glob("*/*") if p.suffix in (".png", ".jpg", ".jpeg"))
        number = min(args.pictures, len(files))
        sets[folder.name] = [files[i * len(files) // number] for i in range(number)]
    shown = subprocess.check_output(["tesseract", "--version"], text=True).split()[1]
    peers = {"ours": ours, f"RapidOCR {version('rapidocr')}": rapidocr}
    peers |= {f"ddddocr {version('ddddocr')}": ddddocr, f"Tesseract {shown}": tesseract}
    rows = {name: measure(peer, list(sets.values())) for name, peer in peers.items()}
    for name, row in rows.items():
        print(name, {key: round(np.mean(values), 1) for key, values in row.items()})
    if args.keep:
        figures = {key: [row[key] for row in rows.values()] for key in rows["ours"]}
        data = f"{sum(map(len, sets.values()))} pictures of {len(sets)} field sets"
        study.keep("peers", data, {"set": list(sets), "peer": list(rows), **figures})


if __name__ == "__main__":
    main()
