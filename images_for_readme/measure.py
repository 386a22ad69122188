"""Measure model.pt and the study's weights: the README's figures that no run itself holds.

    python3 images_for_readme/measure.py --data data --weights data/study --field ../shared/field

Each part leaves images_for_readme/runs/PART.json, from which figures.py draws; --only names parts
to make again. --weights holds what study.py trained: default-0 to default-4, lever-* and
origin-short. --field holds folders SET/LABEL/IMAGE and a score.py that runs inference.py over them.
Takes 10 minutes on two cores.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import strokes  # noqa: E402
import study  # noqa: E402

import CNN  # noqa: E402
import inference  # noqa: E402
import train  # noqa: E402
from CNN import ALPHABET, SIZE  # noqa: E402

MODEL = HERE.parent / "model.pt"
NOBODY = ("0O", "1IL")  # what score.py counts as one character each
SIDES = (28, 20, 14, 10, 8, 7)  # px, to which test pictures are shrunk
SHARES = (0.5, 0.15, 0.1, 0.07, 0.05, 0.03)  # of a photograph's height that its character takes
TOLERANCE = 0.3  # per cent, between float32 here and the device's arithmetic in inference.py
ONE_IN = 4  # of the test pictures are shrunk: six sizes of all would take ten minutes
THRESHOLDS = [i / 100 for i in range(100)] + [0.995, 0.999]  # of --min-confidence


class Answers(NamedTuple):
    """Logarithms of calibrated probabilities (N, 36), labels (N,), whether there is ink (N,)."""

    logs: Tensor
    labels: Tensor
    inked: Tensor

    @property
    def confidence(self) -> Tensor:
        return self.logs.amax(1).exp() * self.inked

    @property
    def right(self) -> Tensor:
        return (self.logs.argmax(1) == self.labels) & self.inked

    def accuracy(self, groups: tuple[str, ...] = (), alphabet: str = ALPHABET) -> float:
        """Return per cent right, with groups counted as one character, answers of an alphabet."""
        fold = torch.arange(len(ALPHABET))
        for group in groups:
            members = [ALPHABET.index(character) for character in group]
            fold[members] = members[0]
        allowed = torch.tensor([ALPHABET.index(character) for character in alphabet])
        answers = allowed[self.logs[:, allowed].argmax(1)]
        right = (fold[answers] == fold[self.labels]) & self.inked
        return 100 * right.double().mean().item()


class Bench:
    """What there is to measure, and with what."""

    def __init__(self, data: Path, weights: Path, field: Path) -> None:
        self.weights, self.field_folder = weights, field
        self.net = CNN.load(MODEL)
        self.test = train.read_emnist(data, train=False)

    def describe(self, source: str) -> str:
        if source == "test":
            return f"{len(self.test.labels):,} test pictures of the EMNIST sample"
        if source == "field":
            count = sum(len(pictures) for pictures in self.field.values())
            return f"{count:,} pictures of {len(self.field)} field sets"
        return {"samples": "tests/samples", "drawn": "photographs drawn by our code"}[source]

    def load(self, name: str) -> CNN.Net:
        return CNN.load(self.weights / f"{name}.pt")

    @cached_property
    def on_test(self) -> Answers:
        return answer(self.net, *self.test)

    @cached_property
    def field(self) -> dict[str, list[inference.Picture]]:
        """Read and fit the pictures of every field set, as inference.py does."""
        sets = {}
        for folder in sorted(path for path in self.field_folder.iterdir() if path.is_dir()):
            paths = [path for path, _ in inference.find([str(folder)], Counter())]
            sets[folder.name] = [prepare(path) for path in paths]
        return sets

    def on_field(self, net: CNN.Net) -> dict[str, Answers]:
        return {name: answer_pictures(net, pictures) for name, pictures in self.field.items()}


def prepare(path: str) -> inference.Picture:
    errors, _, ink = inference.prepare([path], SIZE)
    return inference.Picture(path, ink, errors[0])


def answer(net: CNN.Net, images: Tensor, labels: Tensor, inked: Tensor | None = None) -> Answers:
    """Classify pictures (N, 28, 28) uint8 in the form of EMNIST's."""
    logs = (train.predict(net, images, torch.float32) / net.temperature).log_softmax(1)
    return Answers(logs, labels, torch.ones_like(labels) > 0 if inked is None else inked)


def answer_in_int8(net: CNN.Net, images: Tensor) -> Tensor:
    """Return calibrated logits as inference.py computes them on a CPU with VNNI."""
    quick = CNN.Int8Net(net)
    with torch.inference_mode():
        parts = images.unsqueeze(1).split(train.EVALUATION_BATCH)
        return torch.cat([quick(part) for part in parts]) / net.temperature


def answer_pictures(net: CNN.Net, pictures: list[inference.Picture]) -> Answers:
    """Classify what inference.py made of files in folders named after their character."""
    inks = b"".join(picture.ink or bytes(SIZE**2) for picture in pictures)
    images = torch.frombuffer(bytearray(inks), dtype=torch.uint8).view(-1, SIZE, SIZE)
    labels = [ALPHABET.index(Path(picture.path).parent.name) for picture in pictures]
    inked = [not picture.error for picture in pictures]
    return answer(net, images, torch.tensor(labels), torch.tensor(inked))


# The parts


def shipped(bench: Bench) -> dict:
    """Measure model.pt on test, as train.py does at its end."""
    logits = bench.on_test.logs
    labels = bench.test.labels
    return {
        "parameters": sum(parameter.numel() for parameter in bench.net.parameters()),
        "bytes": MODEL.stat().st_size,
        "temperature": bench.net.temperature,
        "lookalikes": bench.net.lookalikes,
        "validation": bench.net.figures["validation"],
        "test": train.measure(logits, labels),
        "test_int8": train.measure(answer_in_int8(bench.net, bench.test.images), labels),
        "confusion": train.confuse(logits, labels).tolist(),
    }


def known(bench: Bench) -> dict:
    """Estimate how much of what is left is the task, not the net."""
    groups = tuple(bench.net.lookalikes)
    answers, labels = bench.on_test.logs.argmax(1), bench.test.labels
    figures = train.measure(bench.on_test.logs, labels)
    wrong = answers != labels
    alike = torch.eye(len(ALPHABET)) > 0
    for a, b in (pair for group in groups for pair in permutations(group, 2)):
        alike[ALPHABET.index(a), ALPHABET.index(b)] = True
    digits = (labels < train.DIGITS).double().mean().item()
    in_alphabet = digits * figures["digits_known"] + (1 - digits) * figures["letters_known"]
    return {
        "groups": groups,
        "accuracy": figures["accuracy"],
        "nll": figures["nll"],
        "accuracy_0O_1IL_merged": bench.on_test.accuracy(NOBODY),
        "accuracy_groups_merged": bench.on_test.accuracy(groups),
        "accuracy_alphabet_known": in_alphabet,
        "errors_within_groups": 100 * alike[answers, labels][wrong].double().mean().item(),
        "seeds": compare_seeds([answer(bench.load(f"default-{i}"), *bench.test) for i in range(5)]),
    }


def compare_seeds(nets: list[Answers]) -> dict:
    """Say where nets that differ by their seed agree, and what the mean of them answers."""
    labels = nets[0].labels
    answers = torch.stack([net.logs.argmax(1) for net in nets])  # (nets, N)
    right = answers == labels
    pairs = list(permutations(range(len(nets)), 2))
    same = torch.stack([answers[a] == answers[b] for a, b in pairs])  # (pairs, N)
    first = torch.stack([right[a] for a, _ in pairs])
    mean = torch.stack([net.logs.exp() for net in nets]).mean(0)
    return {
        "nets": len(nets),
        "ensemble": train.measure(mean.log(), labels),
        "agree": 100 * same.double().mean().item(),
        "agree_where_wrong": 100 * same[~first].double().mean().item(),
        "all_wrong": 100 * (~right).all(0).double().mean().item(),
    }


ORIGIN_WAY = "origin-short.json; Resize((28, 28)) of the grey picture, nothing else"


def sizes(bench: Bench) -> dict:
    """Measure on test pictures shrunk to SIDES, each saved as that small picture."""
    images, labels = (part[::ONE_IN] for part in bench.test)
    origin, rows = bench.load("origin-short"), []
    for side in SIDES:
        small = [Image.fromarray(image.numpy()).resize((side, side)) for image in images]
        fitted, inked = fit(small)
        row = {
            "px": side,
            "ours": answer(bench.net, fitted, labels, inked),
            "origin": answer(origin, prepare_as_origin(small), labels),
            "origin_net_our_fit": answer(origin, fitted, labels, inked),
        }
        rows.append({k: v if k == "px" else v.accuracy() for k, v in row.items()})
    return {
        "data": f"every {ONE_IN}th of {bench.describe('test')}",
        "n": len(labels),
        "shrunk_by": "Pillow's resize, bicubic",
        "origin": ORIGIN_WAY,
        "rows": rows,
    }


def fit(pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
    images, inked, _ = inference.fit([inference.to_grey(picture) for picture in pictures], SIZE)
    return torch.from_numpy(images), torch.from_numpy(inked)


def prepare_as_origin(pictures: list[Image.Image]) -> Tensor:
    """Bring pictures to the net's size in the origin's way: torchvision's Resize, bilinear."""
    size, grey = (SIZE, SIZE), (picture.convert("L") for picture in pictures)
    resized = [np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in grey]
    return torch.from_numpy(np.stack(resized))


def coverage(bench: Bench) -> dict:
    """Say, for values of --min-confidence, what part is answered and how much of that is right."""
    return {
        "thresholds": THRESHOLDS,
        "test": cover(bench.on_test),
        "field": cover(pool(bench.on_field(bench.net))),
    }


def cover(answers: Answers) -> dict:
    rows = [answers.confidence >= max(threshold, 1e-9) for threshold in THRESHOLDS]
    return {
        "n": len(answers.labels),
        "answered": [100 * row.double().mean().item() for row in rows],
        "right": [100 * answers.right[row].double().mean().item() for row in rows],
    }


def pool(sets: dict[str, Answers]) -> Answers:
    return Answers(*(torch.cat(parts) for parts in zip(*sets.values(), strict=True)))


def reliability(bench: Bench) -> dict:
    """Compare confidences with how often they are right, in the bins of the calibration error."""
    field = bench.on_field(bench.net)
    splits = {"test": bench.on_test, **field, "field": pool(field)}
    return {name: {"n": len(a.labels), **reliable(a)} for name, a in splits.items()}


def reliable(answers: Answers) -> dict:
    confidence, right = answers.confidence[answers.inked], answers.right[answers.inked].float()
    bins = (confidence * train.ECE_BINS).long().clamp(max=train.ECE_BINS - 1)
    counts = bins.bincount(minlength=train.ECE_BINS)
    sums = [bins.bincount(values, train.ECE_BINS) for values in (confidence, right)]
    return {
        "ece": ((sums[0] - sums[1]).abs().sum() / counts.sum()).item(),
        "counts": counts.tolist(),
        "confidence": (sums[0] / counts.clamp(1)).tolist(),
        "right": (sums[1] / counts.clamp(1)).tolist(),
    }


def field(bench: Bench) -> dict:
    """Score the field sets: the shipped weights and their seeds, the levers, the origin's way.

    A row holds per cent right, the same with NOBODY merged, and with the set's alphabet known.
    """
    names = [p.stem for kind in ("default", "lever") for p in bench.weights.glob(f"{kind}-*.pt")]
    names = [*sorted(names), "origin-short"]
    nets = {"model.pt": bench.net} | {name: bench.load(name) for name in names}
    rows = {name: score(bench.on_field(net)) for name, net in nets.items()}
    for name in ("model.pt", "origin-short"):
        rows[f"{name}, unfitted"] = score(as_origin(bench, nets[name]))
    rows["origin-short, transposed"] = score(as_origin(bench, nets["origin-short"], transpose=True))
    script = [sys.executable, str(bench.field_folder.resolve() / "score.py")]
    run = subprocess.run(script, cwd=HERE.parent, capture_output=True, text=True, check=True)
    told = [float(word) for word in run.stdout.split()[-3:]]
    if np.abs(np.subtract(told, rows["model.pt"]["mean of sets"])).max() > TOLERANCE:
        sys.exit(f"score.py has means {told}, but here they are {rows['model.pt']}")
    pictures = {name: len(pictures) for name, pictures in bench.field.items()}
    return {"origin": ORIGIN_WAY, "pictures": pictures, "rows": rows, "score.py": run.stdout}


def as_origin(bench: Bench, net: CNN.Net, transpose: bool = False) -> dict[str, Answers]:
    """Answer the field sets with pictures only resized and, as the origin did, transposed."""
    sets = {}
    for name, pictures in bench.field.items():
        images = prepare_as_origin([Image.open(picture.path) for picture in pictures])
        images = images.mT.contiguous() if transpose else images
        sets[name] = answer(net, images, answer_pictures(net, pictures).labels)
    return sets


def score(sets: dict[str, Answers]) -> dict[str, list[float]]:
    rows = {}
    for name, answers in sets.items():
        labels = {ALPHABET[label] for label in answers.labels.tolist()}
        parts = ALPHABET[: train.DIGITS], ALPHABET[train.DIGITS :], ALPHABET
        alphabet = next(part for part in parts if labels <= set(part))
        known = answers.accuracy(alphabet=alphabet)
        rows[name] = [answers.accuracy(), answers.accuracy(NOBODY), known]
    return rows | {"mean of sets": np.mean(list(rows.values()), axis=0).tolist()}


def framing(bench: Bench) -> dict:
    """Measure on drawn photographs whose character takes less and less of the height.

    Without the second look, too: with inference.SMALL at 0 no character counts as small.
    """
    rows, small = [], inference.SMALL
    with tempfile.TemporaryDirectory() as folder:
        for share in SHARES:
            paths = [photograph(i, share, Path(folder)) for i in range(5 * len(ALPHABET))]
            row = {"share": share}
            for key, inference.SMALL in (("first look", 0), ("second look", small)):
                answers = answer_pictures(bench.net, [prepare(path) for path in paths])
                row[key] = answers.accuracy()
            rows.append(row)
    return {"n": len(paths), "px": (1600, 1200), "rows": rows}


def photograph(seed: int, share: float, folder: Path) -> str:
    """Save the photograph of a character, `share` of its height tall, somewhere on the paper."""
    random, character = np.random.default_rng(seed), ALPHABET[seed % len(ALPHABET)]
    height, width, side = 1200, 1600, round(1200 * share)
    ink = np.zeros((height, width))
    top, left = (random.integers(0.2 * n, 0.8 * n - side + 1) for n in (height, width))
    drawn = strokes.ink(character, strokes.hand(seed), (side, side), longest=side - 2)
    ink[top : top + side, left : left + side] = drawn
    path = folder / character / f"{seed}.jpg"
    path.parent.mkdir(exist_ok=True)
    strokes.photograph(ink, random).save(path, quality=85)
    return str(path)


def samples(bench: Bench) -> dict:
    """Run inference.py over tests/samples."""
    command = ["inference.py", "--input", "tests/samples", "--format", "json"]
    run = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    return {"command": command, "rows": [json.loads(line) for line in run.stdout.splitlines()]}


PARTS: dict[str, tuple[Callable[[Bench], dict], str]] = {  # with what each reads
    "shipped": (shipped, "test"),
    "known": (known, "test"),
    "sizes": (sizes, "test"),
    "coverage": (coverage, "test, field"),
    "reliability": (reliability, "test, field"),
    "field": (field, "field"),
    "framing": (framing, "drawn"),
    "samples": (samples, "samples"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("data/study"))
    parser.add_argument("--field", type=Path, default=Path("../shared/field"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma [%(default)s]")
    args = parser.parse_args()
    bench = Bench(args.data, args.weights, args.field)
    for name in args.only.split(","):
        part, data = PARTS[name]
        figures = part(bench)
        record = {
            "settings": {"weights": "model.pt", "sha256": digest(MODEL), "part": name},
            "machine": study.machine(torch.device("cpu")),
            "data": ", ".join(bench.describe(source) for source in data.split(", ")),
        }
        study.write(name, record | figures)
        print(f"{name}.json", file=sys.stderr)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
