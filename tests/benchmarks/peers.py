"""Compare inference.py with what people would use instead, on labelled pictures, on one core.

    pip install -r requirements.txt -r tests/benchmarks/peers_requirements.txt
    apt-get install tesseract-ocr
    python3 -m tests.benchmarks.peers ../shared/field        # --keep: as the record peers

Each is called as its documentation says for a single character. All but ours get the pictures as
Tesseract's asks for: ink dark, the character enlarged, a white border, by which all three gain, 8,
9 and 21 points. Lower case counts as upper. The scores are those of the study, each set a run of
its own; RapidOCR can't be told an alphabet. Speeds count from file to answer, less the start.
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

import CNN
from images_for_readme import measure, study

PICTURES = 80  # of a set, evenly, at most
SIDE = 48  # px, longer side; of 32, 40, 48 and 64 the best for RapidOCR and ddddocr
BORDER = 4  # px of white around it
TESSERACT_BORDER = 10  # px, as its documentation asks for


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
    command = [sys.executable, measure.ROOT / "inference.py", "--workers", "1", "--format", "json"]
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


def time_answers(peer: Callable, paths: list[Path], alphabet: str) -> tuple[list[str], float]:
    """Return what a program answers for pictures, and its seconds from file to answer."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [str(path) for path in paths]
        if peer is not ours:
            border = TESSERACT_BORDER if peer is tesseract else BORDER
            targets = [Path(folder, f"{number}.png") for number in range(len(paths))]
            pairs = zip(paths, targets, strict=True)
            files = [prepare(path, border, target) for path, target in pairs]
        texts = peer(files, alphabet)
    seconds = time.perf_counter() - start
    allowed = [re.findall(f"[{alphabet}]", text.upper()) for text in texts]
    return [characters[0] if characters else "" for characters in allowed], seconds


def measure_peer(peer: Callable, sets: list[list[Path]]) -> tuple[list[dict], float]:
    """Return a program's scores of each set, and its pictures a second over all."""
    one = sets[0][:1]
    time_answers(peer, one, CNN.ALPHABET)  # to warm up
    start = time_answers(peer, one, CNN.ALPHABET)[1]
    set_scores = []
    seconds = 0.0
    for paths in sets:
        answers, passed = time_answers(peer, paths, CNN.ALPHABET)
        seconds += passed - start
        alphabet = measure.find_alphabet(paths[0].parents[1])
        characters = "".join(c for c in CNN.ALPHABET if re.match(f"[{alphabet}]", c))
        told = answers
        if characters != CNN.ALPHABET:
            told, _ = time_answers(peer, paths, characters)
        truths = [path.parent.name for path in paths]
        set_scores.append(measure.score(pair_up(answers, truths), pair_up(told, truths)))
    pictures = sum(len(paths) - 1 for paths in sets)
    return set_scores, pictures / seconds


def pair_up(answers: list[str], truths: list[str]) -> list[dict]:
    """Return rows that can be scored."""
    pairs = zip(answers, truths, strict=True)
    return [{"character": answer, "truth": truth} for answer, truth in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("field", type=Path, help="holds SET/LABEL/IMAGE")
    parser.add_argument("--keep", action="store_true", help="as the record peers")
    args = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    sets = []
    for folder in sorted(args.field.iterdir()):
        paths = sorted(folder.glob("*/*.png"))
        if paths:
            every = -(-len(paths) // PICTURES)
            sets.append(paths[::every])
    release = subprocess.check_output(["tesseract", "--version"], text=True).split()[1]
    peers = {
        "ours": ours,
        f"RapidOCR {version('rapidocr')}": rapidocr,
        f"ddddocr {version('ddddocr')}": ddddocr,
        f"Tesseract {release}": tesseract,
    }
    rows = []
    for name, peer in peers.items():
        set_scores, rate = measure_peer(peer, sets)
        if peer is ours:
            our_scores = set_scores
        more = []
        for paths, theirs, ours_ in zip(sets, set_scores, our_scores, strict=True):
            if theirs["accuracy"] > ours_["accuracy"]:
                name_of_set = paths[0].parents[1].name
                more.append(f"{name_of_set} {theirs['accuracy']:.1f} to {ours_['accuracy']:.1f}")
        mean = {key: np.mean([entry[key] for entry in set_scores]) for key in measure.SCORES}
        row = {"": name, **{f"{key}, %": value for key, value in mean.items()}}
        rows.append(row | {"pictures/s": rate, "reads more than ours": ", ".join(more)})
        print(rows[-1], flush=True)
    if args.keep:
        data = f"{sum(map(len, sets))} pictures of {len(sets)} field sets"
        study.keep("peers", data, {"rows": rows})


if __name__ == "__main__":
    main()
