"""Fit the weights by which the readings of a picture are compared: WEIGHTS in picture.py.

    python3 -m images_for_readme.readings

Conditional logistic regression: of each picture all readings go through one softmax of their
scores, and what is fitted is the likelihood of the truth, a character or blank, over all readings.
The data: the labelled sets of ../shared/field, scenes by ../shared/scenes and by scenes.py, forms
by ../shared/forms, and EMNIST's validation images. Prints and records the weights; they are copied
into picture.py and inference.py by hand, and a test compares them with the record. Takes ten
minutes on two cores.
"""

import csv
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import CNN
import picture
import train
from images_for_readme import scenes, study
from images_for_readme.measure import MERGED

SHARED = study.ROOT.parent / "shared"
FORM_ALPHABETS = {"number": "0123456789", "surname": CNN.ALPHABET[10:], "vin": CNN.ALPHABET}
CUT_OFF = 0.12  # of a character's ink: where a grid cuts off more, a cell is left out
EVERY = 2  # of the pictures of field sets and forms; all give the same weights
VALIDATION = 1500  # of EMNIST's validation images
RIDGE = 1e-3  # of the squared weights
LEAST_P = 1e-4  # of the truth: so that no single picture decides


class Example(NamedTuple):
    """A picture, and its truth."""

    group: str  # pictures of a kind; a group of n counts as the square root of n
    path: Path
    truth: str  # "" where there is no character
    alphabet: str = CNN.ALPHABET  # what may be answered


class Readings(NamedTuple):
    """All readings of the examples."""

    owner: Tensor  # (R,): the example that a reading is of
    known: Tensor  # (R, 2 + features): log p and distance of its character, what it keeps
    p_truth: Tensor  # (R,): how likely the truth is in the reading


def list_examples(scratch: Path, data: Path) -> Iterator[Example]:
    """Yield the examples; scenes, forms and EMNIST's pictures are drawn into `scratch`."""
    for folder in sorted(path for path in (SHARED / "field").iterdir() if path.is_dir()):
        for path in sorted(folder.glob("*/*"))[::EVERY]:
            yield Example(f"field/{folder.name}", path, path.parent.name)
    script = str(SHARED / "scenes" / "draw.py")
    subprocess.run([sys.executable, script, str(scratch / "scenes")], cwd=study.ROOT, check=True)
    scenes.draw(scratch / "more")
    for folder in sorted([*scratch.glob("scenes/*"), *scratch.glob("more/*")]):
        if not folder.name.startswith("junk"):
            for path in sorted(folder.iterdir()):
                truth = "" if folder.name.startswith("empty") else path.name[0]
                yield Example(f"{folder.parent.name}/{folder.name}", path, truth)
    yield from list_cells(scratch / "forms")
    yield from write_validation(scratch / "emnist", data)


def list_cells(folder: Path) -> Iterator[Example]:
    """Draw forms and yield those of their cells that are whole or empty."""
    script = str(SHARED / "forms" / "draw.py")
    subprocess.run([sys.executable, script, str(folder)], cwd=study.ROOT, check=True)
    with open(folder / "truth.csv", newline="") as file:
        cut_off = {
            (row["field"], row["cell"]): float(row["cut_off"]) for row in csv.DictReader(file)
        }
    for path in sorted(folder.glob("*/*/*.png"))[::EVERY]:
        kind, field = path.parts[-3:-1]
        truth = path.stem[-1].replace("_", "")
        if truth != "-" and cut_off[field, path.stem] <= CUT_OFF:
            yield Example(f"forms/{kind}", path, truth, FORM_ALPHABETS[field])


def write_validation(folder: Path, data: Path) -> Iterator[Example]:
    """Write some of EMNIST's validation images as pictures, each once, and yield them."""
    both = train.read_emnist(data, train=True)
    held = train.held_out(both.images)
    images = both.images[held]
    labels = both.labels[held]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    for i in order[:VALIDATION].tolist():
        path = folder / f"{i}.png"
        Image.fromarray(images[i].numpy()).save(path)
        yield Example("emnist", path, CNN.ALPHABET[labels[i]])


def read(example: Example) -> list[picture.Reading]:
    """Return all readings of an example."""
    _, grey, _ = picture.read_first(example.path, CNN.SIZE)
    return picture.propose(grey, CNN.SIZE)


def see(examples: list[Example], model: Path) -> Readings:
    """Return all readings of examples, as the net sees them."""
    net = CNN.load(model)
    statistics = net.card.statistics
    with Pool() as pool:
        of_each = pool.map(read, examples, chunksize=64)
    owner = torch.tensor([i for i, readings in enumerate(of_each) for _ in readings])
    readings = [reading for readings in of_each for reading in readings]
    empty = np.zeros((CNN.SIZE, CNN.SIZE), np.uint8)
    images = [empty if one.image is None else one.image for one in readings]
    logits, features = CNN.predict(net, torch.from_numpy(np.stack(images)))
    log_p = (logits / net.card.temperature).log_softmax(1)
    distances = CNN.square_distances(CNN.whiten(features, statistics.whitening), statistics.means)
    may_be = torch.tensor([[c in one.alphabet for c in CNN.ALPHABET] for one in examples])[owner]
    log_p = log_p.where(may_be, -torch.inf).log_softmax(1)
    best, answers = log_p.max(1, keepdim=True)
    distance = distances.gather(1, answers) / statistics.median
    of_reading = torch.tensor([one.features for one in readings])
    is_blank = of_reading[:, picture.Features._fields.index("blank"), None] > 0
    known = torch.cat([best.where(~is_blank, 0), distance.where(~is_blank, 0), of_reading], 1)
    is_truth = torch.tensor([is_same(example.truth) for example in examples])[owner]
    p = log_p.exp().where(~is_blank, 0)
    p_truth = (torch.cat([p, is_blank], 1) * is_truth).sum(1)
    return Readings(owner, known.double(), p_truth.double())


def is_same(truth: str) -> list[bool]:
    """Say of each character, and of none, whether it is the truth or drawn alike."""
    same = [one.translate(MERGED) == truth.translate(MERGED) for one in CNN.ALPHABET]
    return [*same, truth == ""]


def find_likelihood(weights: Tensor, readings: Readings, count: int) -> Tensor:
    """Return how likely the truth of each example is, (count,), 0 where it has no readings."""
    scores = readings.known @ weights
    top = torch.full([count], -torch.inf, dtype=scores.dtype)
    top = top.scatter_reduce(0, readings.owner, scores.detach(), "amax")
    p = (scores - top[readings.owner]).exp()
    total = torch.zeros(count, dtype=p.dtype).index_add(0, readings.owner, p)
    right = torch.zeros(count, dtype=p.dtype).index_add(0, readings.owner, p * readings.p_truth)
    return right / total


def fit(readings: Readings, importance: Tensor) -> Tensor:
    """Return the weights (2 + features,) by which the truth is most likely; a small ridge."""
    weights = torch.zeros(readings.known.shape[1], dtype=torch.float64)
    weights[0] = 1.0  # starts as the net says, for the likelihood has more than one maximum
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        likelihood = find_likelihood(weights, readings, len(importance))
        loss = -(importance * likelihood.clamp(LEAST_P).log()).sum() / importance.sum()
        loss = loss + RIDGE * weights[2:].square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return weights.detach()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        examples = list(list_examples(Path(scratch), study.ROOT / "data"))
        readings = see(examples, study.ROOT / "model.pt")
    sizes = Counter(example.group for example in examples)
    importance = torch.tensor([sizes[example.group] ** -0.5 for example in examples])
    weights = fit(readings, importance.double())
    names = ("log_p", "distance", *picture.Features._fields)
    content = {name: round(weight, 2) for name, weight in zip(names, weights.tolist(), strict=True)}
    print(content)
    likely = find_likelihood(weights, readings, len(examples)) > 0.5
    rows = []
    for group in sizes:
        of_group = torch.tensor([example.group == group for example in examples])
        rows.append(
            {
                "group": group,
                "pictures": sizes[group],
                "likely, %": 100 * likely[of_group].double().mean().item(),
            }
        )
        print(*rows[-1].values())
    study.keep(
        "readings",
        f"{len(examples):,} pictures of {len(sizes)} kinds",
        {"weights": content, "rows": rows},
    )


if __name__ == "__main__":
    main()
