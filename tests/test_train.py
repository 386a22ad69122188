"""train.py's parts against hand-made cases, slow loops and other libraries, and the whole of it."""

import bz2
import errno
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

import CNN
import train
from CNN import ALPHABET

ALL = ",".join(train.AUGMENTATIONS)
CPU = torch.device("cpu")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "emnist"


@pytest.fixture(scope="module")
def split(tiny_emnist: Path) -> train.Split:
    """The 144 pictures to train on of the tiny EMNIST."""
    return train.read_emnist(tiny_emnist, train=True)


@pytest.fixture(scope="module")
def glyphs() -> torch.Tensor:
    """One drawing of each character, (36, 28, 28) uint8, upright."""
    return torch.from_numpy(
        np.stack([strokes.emnist_picture(c, strokes.hand(1)) for c in ALPHABET])
    )


@pytest.fixture
def batch(split: train.Split) -> torch.Tensor:
    """Pictures as the augmentations take them: (144, 1, 28, 28) in [0, 1]."""
    torch.manual_seed(7)
    return train.augment(split.images, "none")


# Data


@pytest.mark.parametrize(("part", "per_class", "start"), [(True, 4, 0), (False, 2, 5000)])
def test_every_label_belongs_to_its_character_and_every_picture_is_upright(
    tiny_emnist, part, per_class, start
):
    images, labels = train.read_emnist(tiny_emnist, train=part)
    assert images.shape == (36 * per_class, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for label, character in enumerate("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        found = {picture.numpy().tobytes() for picture in images[labels == label]}
        drawn = [
            strokes.emnist_picture(character, strokes.hand(start + i), form=i)
            for i in range(per_class)
        ]
        assert found == {picture.tobytes() for picture in drawn}


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)


def contents(images: torch.Tensor) -> list[bytes]:
    return [picture.tobytes() for picture in images.numpy()]


def test_validation_and_train_share_no_picture_however_often_it_is_repeated():
    distinct = pictures(10_000)
    repeats = torch.cat([distinct, distinct[::2], distinct[:100].repeat(5, 1, 1)])
    repeats[0, 14, 14] ^= 1  # one bit makes it another picture
    parts = train.cut_validation(train.Split(repeats, torch.arange(len(repeats)) % 36))
    held_in, held_out = (set(contents(part.images)) for part in parts)
    assert held_in.isdisjoint(held_out)
    assert held_in | held_out == set(contents(repeats))
    assert sum(len(part.labels) for part in parts) == len(repeats)
    assert 0.04 < len(held_out) / len(held_in | held_out) < 0.06


def test_validation_is_the_same_whatever_the_order_and_the_labels():
    images = pictures(3_000)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    parts = train.cut_validation(train.Split(images, torch.arange(3_000)))
    others = train.cut_validation(train.Split(images[order], torch.arange(3_000)[order]))
    for part, other in zip(parts, others, strict=True):
        assert dict(zip(contents(part.images), part.labels.tolist(), strict=True)) == dict(
            zip(contents(other.images), other.labels.tolist(), strict=True)
        )
        assert torch.equal(images[part.labels], part.images)  # labels go with their pictures
    alone = train.cut_validation(train.Split(images[:10], torch.arange(10)))[1]
    assert set(alone.labels.tolist()) == {n for n in parts[1].labels.tolist() if n < 10}


def test_validation_is_cut_by_the_hash_that_the_shipped_weights_were_chosen_with():
    images = pictures(500, seed=2)
    generator = torch.Generator().manual_seed(20170217)
    factors = [2 * n + 1 for n in torch.randint(2**62, (98,), generator=generator).tolist()]
    assert factors[0] == 6877652269420637545  # what torch draws must not change either
    expected = []
    for i, picture in enumerate(images.numpy()):
        words = np.frombuffer(picture.tobytes(), "<i8").tolist()
        total = sum(w * f for w, f in zip(words, factors, strict=True)) % 2**64
        signed = total - 2**64 if total >= 2**63 else total
        if (signed >> 32) % 20 == 0:
            expected.append(i)
    held_out = train.cut_validation(train.Split(images, torch.arange(500)))[1]
    assert held_out.labels.tolist() == expected


# Learning rate


def rates(steps: int, **settings: object) -> list[float]:
    config = train.Config(**settings)
    return [train.learning_rate(step, steps, config) for step in range(steps)]


def test_learning_rate_at_its_corners():
    cosine = rates(1000, lr=0.5, warmup=100)
    assert cosine[0] == pytest.approx(0.005)
    assert cosine[49] == pytest.approx(0.25)
    assert cosine[99] == cosine[100] == max(cosine) == 0.5
    assert cosine[550] == pytest.approx(0.25)  # half-way down
    assert 0 < cosine[999] < 0.5 * 1e-5
    assert all(a > b for a, b in pairwise(cosine[100:]))
    assert train.learning_rate(1000, 1000, train.Config(lr=0.5, warmup=100)) == 0


def test_learning_rate_without_warm_up_and_in_a_run_that_ends_before_it():
    assert rates(10, lr=2.0, warmup=0)[0] == 2.0
    assert rates(5, lr=1.0, warmup=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates(3, lr=1.0, warmup=3) == pytest.approx([1 / 3, 2 / 3, 1])


def test_constant_learning_rate_is_the_origins():
    constant = rates(8, lr=0.01, warmup=3, schedule="constant")
    assert constant == pytest.approx([0.001] * 3 + [0.01] * 5)


@pytest.mark.parametrize(("steps", "warmup"), [(40, 10), (7, 2), (100, 1)])
def test_learning_rate_is_torchs_linear_and_cosine(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedulers = torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=max(1, warmup - 1))
    expected = []
    for _ in range(warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rise.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    fall = schedulers.CosineAnnealingLR(optimizer, steps - warmup)
    for _ in range(steps - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        fall.step()
    assert rates(steps, lr=0.3, warmup=warmup) == pytest.approx(expected, rel=1e-6, abs=1e-9)


# Augmentation


@pytest.mark.parametrize("name", train.AUGMENTATIONS)
def test_augmentation_keeps_form_and_range_and_is_seeded(batch, name):
    function, before = train.AUGMENTATIONS[name], batch.clone()
    torch.manual_seed(1)
    changed = function(batch)
    assert torch.equal(batch, before)  # the pictures given are not written to
    assert changed.shape == batch.shape
    assert changed.dtype == batch.dtype
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6
    assert (changed - batch).abs().amax((1, 2, 3)).gt(0.02).float().mean() > 0.2
    torch.manual_seed(1)
    assert torch.equal(function(batch), changed)
    torch.manual_seed(2)
    assert not torch.equal(function(batch), changed)
    torch.testing.assert_close(function(batch, 0.0), batch, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", train.AUGMENTATIONS)
def test_augmentation_grows_with_its_strength(batch, name):
    distances = []
    for strength in (0.25, 0.5, 1.0):
        torch.manual_seed(3)
        changed = train.AUGMENTATIONS[name](batch, strength)
        distances.append((changed - batch).square().mean().item())
    assert 0 < distances[0] < distances[1] < distances[2]


def test_warp_is_affine_grid_of_its_matrices_and_a_bent_one(batch, monkeypatch):
    images = batch[:40]
    generator = torch.Generator().manual_seed(5)
    draws = torch.rand(6, 40, 1, 1, generator=generator)
    knots = torch.randn(40, 2, 5, 5, generator=generator)
    monkeypatch.setattr(torch, "rand", lambda *size, device: draws.view(size))
    monkeypatch.setattr(torch, "randn", lambda *size, device: knots.view(size))
    ours = train.warp(images, 0.8)

    angle, shear, scale, stretch, right, down = ((draws * 2 - 1) * 0.8).view(6, 40).tolist()
    matrices = []
    for i in range(40):
        turn = np.radians(15) * angle[i]
        turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        sheared = np.array([[1, 0.25 * shear[i]], [0, 1]])
        larger = np.diag(np.exp([0.15 * (scale[i] + stretch[i]), 0.15 * (scale[i] - stretch[i])]))
        shift = np.array([[right[i]], [down[i]]]) * 2 / 14  # px; affine_grid's unit is 14 px
        matrices.append(np.hstack([larger @ turned @ sheared, shift]))
    theta = torch.from_numpy(np.stack(matrices)).float()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    bend = F.interpolate(knots * 0.8 * 0.8 / 14, (28, 28), mode="bilinear")
    expected = F.grid_sample(images, grid + bend.movedim(1, 3), align_corners=False)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_warp_shifts_by_two_pixels_at_most(batch, monkeypatch):
    def only_shift(*size: int, device: object) -> torch.Tensor:
        draws = torch.full(size, 0.5)
        draws[4], draws[5] = 1, 0  # right, and down the other way
        return draws

    monkeypatch.setattr(torch, "rand", only_shift)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(size))
    expected = torch.zeros_like(batch)
    expected[..., 2:, :-2] = batch[..., :-2, 2:]
    torch.testing.assert_close(train.warp(batch), expected, atol=1e-4, rtol=0)


def test_stroke_thins_a_third_and_thickens_a_third(batch):
    torch.manual_seed(4)
    change = train.stroke(batch) - batch
    low, high = change.amin((1, 2, 3)), change.amax((1, 2, 3))
    thinner, thicker, same = (low < 0) & (high <= 0), (high > 0) & (low >= 0), (low == high)
    assert (thinner.sum(), thicker.sum(), same.sum()) == (48, 48, 48)


def test_stroke_at_most_is_pillows_minimum_and_maximum(batch, monkeypatch):
    from PIL import ImageFilter

    halves = torch.arange(72), torch.arange(72, 144)
    monkeypatch.setattr(train, "pick", lambda images, *shares: halves)
    monkeypatch.setattr(train, "uniform", lambda images, low, high: torch.full((72, 1, 1, 1), high))
    changed = train.stroke(batch, 1.0)
    for i, (filtered, most) in {
        3: (ImageFilter.MinFilter, 0.9),
        99: (ImageFilter.MaxFilter, 1),
    }.items():
        picture = Image.fromarray(np.uint8(batch[i, 0].mul(255).round()))
        extreme = torch.from_numpy(np.asarray(picture.filter(filtered(3)), np.float32)) / 255
        expected = torch.lerp(batch[i, 0], extreme, most)
        torch.testing.assert_close(
            changed[i, 0, 1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-5, rtol=0
        )


def test_resolution_is_interpolate_down_and_up_in_a_quarter(batch, monkeypatch):
    torch.manual_seed(6)
    changed = (train.resolution(batch) != batch).any(3).any(2).any(1)
    assert changed.sum() == 36
    monkeypatch.setattr(train, "pick", lambda images, *shares: (torch.arange(144),))
    ours = train.resolution(batch)
    assert min(train.LOW_SIZES) == (7, 7)
    for i in range(144):
        size = train.LOW_SIZES[i % len(train.LOW_SIZES)]
        small = F.interpolate(batch[i : i + 1], size, mode="bilinear", antialias=True)
        expected = F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1)
        torch.testing.assert_close(ours[i : i + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", [5, 7, 12, 28])
def test_resampler_shrinks_as_pillow_does(batch, target):
    matrix = train.resampler(target, 28, "bilinear", CPU)
    ours = matrix @ batch[0, 0] @ matrix.T
    picture = Image.fromarray(batch[0, 0].numpy())
    theirs = np.asarray(picture.resize((target, target), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_augment_leaves_every_other_picture_and_keeps_the_ink_of_the_rest_full(split):
    torch.manual_seed(8)
    batch = train.augment(split.images, ALL)
    plain = split.images.unsqueeze(1) / 255
    assert batch.shape == (144, 1, 28, 28)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[1::2], plain[1::2])
    assert all(not torch.equal(a, b) for a, b in zip(batch[::2], plain[::2], strict=True))
    torch.testing.assert_close(batch.amax((1, 2, 3)), torch.ones(144))
    assert batch.min() >= 0
    torch.manual_seed(8)
    assert torch.equal(train.augment(split.images, ALL), batch)
    assert torch.equal(train.augment(split.images, "none"), plain)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_augment_takes_small_batches_and_blank_pictures(split, count):
    assert train.augment(split.images[:count], ALL).shape == (count, 1, 28, 28)
    blank = train.augment(torch.zeros(count, 28, 28, dtype=torch.uint8), ALL)
    assert blank.isfinite().all()
    assert blank.max() <= 1


# Evaluation


def random_answers(count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 36, generator=generator)
    labels = torch.randint(0, 36, (count,), generator=generator)
    logits[torch.arange(count), labels] += 3
    return logits, labels


def test_measure_is_what_slow_loops_count():
    logits, labels = random_answers()
    figures = train.measure(logits, labels)
    per_class, losses = {c: [] for c in range(36)}, []
    right = {
        name: [] for name in ("accuracy", "digits", "letters", "digits_known", "letters_known")
    }
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        kind, part = ("digits", range(10)) if label < 10 else ("letters", range(10, 36))
        for values in (per_class[label], right["accuracy"], right[kind]):
            values.append(row.index(max(row)) == label)
        right[f"{kind}_known"].append(max(part, key=lambda c: row[c]) == label)
        losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    expected = {name: 100 * sum(values) / len(values) for name, values in right.items()}
    expected["classes"] = 100 * sum(sum(v) / len(v) for v in per_class.values()) / 36
    expected["nll"] = sum(losses) / len(losses)
    expected["ece"] = train.calibration_error(logits, labels)
    assert figures == pytest.approx(expected, rel=1e-5)


def test_measure_of_a_hand_made_case():
    answers = {"0": "O", "1": "1", "O": "O", "Z": "2"}  # by truth; all else is unlikely
    logits = torch.full((4, 36), -10.0)
    for row, (truth, answer) in zip(logits, answers.items(), strict=True):
        row[ALPHABET.index(truth)] = 4
        row[ALPHABET.index(answer)] = 5
    labels = torch.tensor([ALPHABET.index(truth) for truth in answers])
    figures = train.measure(logits, labels)
    half = {"accuracy": 50, "digits": 50, "letters": 50, "classes": 50}
    assert figures == pytest.approx(
        half
        | {"digits_known": 100, "letters_known": 100}
        | {"nll": math.log(1 + math.e) / 2, "ece": figures["ece"]},
        abs=1e-4,
    )


def confident(confidences: list[float], right: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits whose best answer has a confidence, and labels it meets or misses."""
    logits = torch.full((len(right), 36), -100.0)
    logits[:, 0] = torch.tensor(confidences).log()
    logits[:, 1] = (1 - torch.tensor(confidences)).log()
    return logits, torch.tensor([0 if r else 2 for r in right])


def test_calibration_error_of_hand_made_cases():
    honest = confident([0.8] * 5, [True] * 4 + [False])
    assert train.calibration_error(*honest) == pytest.approx(0, abs=1e-6)
    proud = confident([0.8] * 5, [True] * 2 + [False] * 3)
    assert train.calibration_error(*proud) == pytest.approx(0.4, abs=1e-6)
    both = confident([0.8] * 5 + [0.6] * 5, [True] * 2 + [False] * 3 + [True] * 4 + [False])
    assert train.calibration_error(*both) == pytest.approx(0.5 * 0.4 + 0.5 * 0.2, abs=1e-6)
    certain = confident([1.0] * 4, [True] * 4)
    assert train.calibration_error(*certain) == pytest.approx(0, abs=1e-6)


def test_calibration_error_is_what_a_slow_loop_finds():
    random = np.random.default_rng(1)
    confidences = random.uniform(0.5, 1, 3000).tolist()
    right = (random.random(3000) < 0.75).tolist()  # the lower ones are too low, others too high
    bins: list[list[float]] = [[] for _ in range(15)]
    for confidence, answer in zip(confidences, right, strict=True):
        bins[int(confidence * 15)].append(confidence - answer)
    expected = sum(abs(sum(gaps)) for gaps in bins) / 3000
    assert train.calibration_error(*confident(confidences, right)) == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0])
def test_calibrate_finds_the_temperature_that_made_the_labels(truth):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(4000, 36, generator=generator)
    labels = torch.multinomial((logits / truth).softmax(1), 1, generator=generator)[:, 0]
    found = train.calibrate(logits, labels)
    assert found == pytest.approx(truth, rel=0.06)
    nll = [F.cross_entropy(logits / t, labels).item() for t in (found, found * 1.02, found / 1.02)]
    assert nll[0] == min(nll)


def test_confuse_counts_pairs():
    logits, labels = random_answers()
    expected = np.zeros((36, 36), int)
    for answer, label in zip(logits.argmax(1).tolist(), labels.tolist(), strict=True):
        expected[label, answer] += 1
    assert np.array_equal(train.confuse(logits, labels), expected)


def table(counts: dict[str, int], **errors: int) -> torch.Tensor:
    """Return a confusion table: pictures by character, and errors such as OI=3: O read as I."""
    confusion = torch.zeros(36, 36, dtype=torch.int64)
    for i, character in enumerate(ALPHABET):
        confusion[i, i] = counts.get(character, 100)
    for pair, count in errors.items():
        truth, answer = (ALPHABET.index(c) for c in pair.strip("_"))
        confusion[truth, answer] += count
        confusion[truth, truth] -= count
    return confusion


def test_lookalikes_are_groups_of_pairs_confused_often_enough():
    assert train.find_lookalikes(table({})) == []
    assert train.find_lookalikes(table({}, UV=14)) == []
    assert train.find_lookalikes(table({}, UV=15)) == ["UV"]
    assert train.find_lookalikes(table({}, UV=8, VU=7)) == ["UV"]  # both ways count
    assert train.find_lookalikes(table({"0": 500}, O0=15)) == ["0O"]  # of the rarer one
    assert train.find_lookalikes(table({"0": 500}, _0O=15)) == ["0O"]
    assert train.find_lookalikes(table({"0": 500, "O": 500}, O0=15)) == []
    chained = table({}, LI=20, I1=20, Z2=50)
    assert train.find_lookalikes(chained) == ["1IL", "2Z"]
    joined = table({}, AB=20, CD=20, BC=20)
    assert train.find_lookalikes(joined) == ["ABCD"]
    assert train.find_lookalikes(table(dict.fromkeys(ALPHABET, 0))) == []


def test_worst_confusions_are_the_largest_errors_in_order():
    confusion = table({}, O0=30, I1=20, L1=25)
    expected = [("O", "0", 30), ("L", "1", 25), ("I", "1", 20)]
    assert train.worst_confusions(confusion) == expected
    assert train.worst_confusions(confusion, 2) == expected[:2]
    assert train.worst_confusions(table({})) == []


def test_table_of_results_shows_each_figure_of_each_split():
    figures = {name: float(i) for i, name in enumerate(train.measure(*random_answers()))}
    confusion = table({}, O0=30, I1=20).tolist()
    results = {"validation": figures, "confusion": confusion}
    results["test"] = {name: value + 50 for name, value in figures.items()}
    text = train.format_results(results)
    rows = [line.split()[-2:] for line in text.splitlines()[1:-1]]
    assert sorted(float(a) for a, _ in rows) == list(range(8))
    assert all(float(b) == float(a) + 50 for a, b in rows)
    assert text.splitlines()[-1].endswith("truth>answer: O>0 30, I>1 20")


# Learning


def small_run(**settings: object) -> train.Run:
    plain = {"batch_size": 36, "warmup": 0, "dropout": 0.0, "augment": "none", "arch": "run1"}
    config = train.Config(**(plain | {"precision": "float32", "epochs": 60} | settings))
    return train.Run(config, 1, train.Ranks(0, 1, CPU))


def test_net_overfits_36_glyphs(glyphs):
    run = small_run(arch="default", lr=0.003, precision="auto")
    labels = torch.arange(36)
    images = train.augment(glyphs, "none").contiguous(memory_format=torch.channels_last)
    run.net.train()
    for _ in range(60):
        train.take_step(run, images, labels)
    for net in (run.net, run.average):
        figures = train.measure(train.predict(net, glyphs, torch.float32), labels)
        assert figures["accuracy"] == 100
        assert figures["nll"] < 0.1


@pytest.mark.parametrize(
    ("optimizer", "lr", "kind"),
    [
        ("adamw", 0.001, torch.optim.AdamW),
        ("adam", 0.001, torch.optim.Adam),
        ("sgd", 0.01, torch.optim.SGD),
        ("adagrad", 0.003, torch.optim.Adagrad),
    ],
)
def test_optimizers_lower_the_loss(glyphs, optimizer, lr, kind):
    run = small_run(optimizer=optimizer, lr=lr, schedule="constant")
    assert type(run.optimizer) is kind
    group = run.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.05
    assert group.get("momentum", 0.9) == 0.9
    images, losses = train.augment(glyphs, "none"), []
    run.net.train()
    for _ in range(4):
        train.take_step(run, images, torch.arange(36))
        losses.append(run.losses.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.9 * losses[0]


def test_step_takes_the_scheduled_rate_and_moves_the_average(glyphs):
    run = small_run(lr=0.01, warmup=3, schedule="constant", ema=0.6)
    images = train.augment(glyphs, "none")
    slow = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    for step in range(25):
        train.take_step(run, images, torch.arange(36))
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001 if step < 3 else 0.01)
        decay = min(0.6, (step + 1) / (step + 11))  # it forgets the start first
        for name, tensor in run.net.state_dict().items():
            if tensor.is_floating_point():
                slow[name] = decay * slow[name] + (1 - decay) * tensor
    for name, tensor in run.average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, slow[name], atol=1e-5, rtol=1e-4)
    run = small_run(lr=0.01, ema=0.0)
    train.take_step(run, images, torch.arange(36))
    for ours, theirs in zip(run.average.parameters(), run.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_epochs_show_every_picture_once_each_in_another_order(split):
    run = small_run(batch_size=36)
    run.steps_per_epoch = 4
    epochs = []
    for epoch in range(2):
        run.step = 4 * epoch
        shown = list(train.batches(run, split))
        assert [images.shape for images, _ in shown] == [(36, 1, 28, 28)] * 4
        order = (
            torch.cat([images for images, _ in shown]),
            torch.cat([labels for _, labels in shown]),
        )
        names = dict(zip(contents(order[0]), order[1].tolist(), strict=True))
        plain = train.augment(split.images, "none")
        assert names == dict(zip(contents(plain), split.labels.tolist(), strict=True))
        epochs.append(contents(order[0]))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("flag", "compiled"), [(None, 0), (False, 0), (True, 1)])
def test_net_is_compiled_on_the_cpu_only_when_asked(monkeypatch, flag, compiled):
    calls = []
    monkeypatch.setattr(train.Net, "compile", lambda net: calls.append(net))
    run = small_run(compile=flag)
    run.build()
    assert calls == [run.net] * compiled


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_batches_of_a_resumed_epoch_are_the_same_whatever_the_chunks(split, chunk):
    """A GPU augments CHUNK_STEPS batches at once, and may be stopped in the midst of them."""
    run = small_run(batch_size=16, augment=ALL)
    assert run.chunk == 1  # on the CPU
    run.chunk, run.steps_per_epoch = chunk, 9
    run.step = 9
    epoch = list(train.batches(run, split))
    assert len(epoch) == 9
    for position in range(9):
        run.step = 9 + position
        left = list(train.batches(run, split))
        assert len(left) == 9 - position
        for ours, theirs in zip(left, epoch[position:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpoints_that_are_due_are_the_first_ranks_affair(split, monkeypatch, tmp_path):
    """The others would wait for their device at every step from then on."""
    reported = []
    monkeypatch.setattr(train.Progress, "report", lambda self: reported.append(self.run.step))
    for rank, expected in ((0, [1, 2, 3, 4]), (1, [4])):
        run = small_run()
        run.steps_per_epoch, run.ranks = 4, train.Ranks(rank, 2, CPU)
        run.losses = torch.zeros(4)
        checkpoints = train.Checkpoints(tmp_path / "model.pt")
        monkeypatch.setattr(checkpoints, "save", lambda run: None)
        checkpoints.due = 0
        progress = train.Progress(run, train.Log(False, {}))
        train.train_epoch(run, split, progress, checkpoints, train.Stop())
        assert reported == expected
        reported.clear()


def trained(data: Path, folder: Path, **settings: object) -> tuple[bytes, dict]:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"arch": "run1", "epochs": 3, "batch_size": 16, "warmup": 5, "wandb": False}
    files = {"data": data, "out": folder / "model.pt", "device": "cpu"}
    results = train.train(train.Config(**(plain | files | settings)))
    return (folder / "model.pt").read_bytes(), results


def test_seed_repeats_a_run_bit_for_bit(tiny_emnist, tmp_path):
    first, again, other = (
        trained(tiny_emnist, tmp_path, epochs=2, seed=seed) for seed in (0, 0, 1)
    )
    assert again[0] == first[0]
    assert other[0] != first[0]
    assert again[1]["test"] == first[1]["test"] != other[1]["test"]


class Recorder:
    """Stands in for train.Log and keeps what it is told."""

    def __init__(self, enabled: bool, config: dict, run_id: str | None = None) -> None:
        self.run_id, self.entries, self.finished = "id", [], None
        Recorder.last = self
        self.config = config

    def metrics(self, step: int, **values: float) -> None:
        self.entries.append((step, values))

    def finish(self, *values: object) -> None:
        self.finished = values

    def close(self) -> None:
        pass


def test_best_epoch_by_validation_is_kept_and_all_is_logged(tiny_emnist, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Log", Recorder)
    monkeypatch.setattr(train, "REPORT_STEPS", 5)
    _, results = trained(tiny_emnist, tmp_path, lr=0.02, epochs=6, schedule="constant", ema=0.0)
    history, net = results["history"], CNN.load(tmp_path / "model.pt")
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    best = min(history, key=lambda entry: entry["nll"])
    validation = train.cut_validation(train.read_emnist(tiny_emnist, train=True))[1]
    logits = train.predict(net, validation.images, CNN.mixed_precision(CPU))
    assert F.cross_entropy(logits, validation.labels).item() == pytest.approx(best["nll"], rel=1e-3)
    for part in ("validation", "test"):  # no digit is held out: nan
        assert results[part] == pytest.approx(net.figures[part], rel=0, abs=0, nan_ok=True)
    assert results["validation"]["nll"] <= best["nll"]  # by the temperature
    test = train.read_emnist(tiny_emnist, train=False)
    logits = train.predict(net, test.images, CNN.mixed_precision(CPU)) / net.temperature
    assert results["test"] == pytest.approx(train.measure(logits, test.labels), rel=1e-3)
    assert np.sum(results["confusion"]) == 72

    log = Recorder.last
    losses = {step: values for step, values in log.entries if "train/loss" in values}
    assert sorted(losses) == list(range(0, 48, 5))
    assert losses[0]["lr"] == pytest.approx(0.002)
    epochs = [values for _, values in log.entries if "epoch" in values]
    assert [values["val/nll"] for values in epochs] == [entry["nll"] for entry in history]
    assert all(values["images/s"] > 0 for values in epochs)
    assert log.finished == (results["test"], results["confusion"], tmp_path / "model.pt")
    assert log.config["lr"] == "0.02"


def test_speed_of_a_resumed_epoch_is_that_of_its_rest(tiny_emnist, tmp_path, monkeypatch):
    take_step, stop = train.take_step, train.Stop()

    def stopped(run: train.Run, *batch: torch.Tensor) -> None:
        take_step(run, *batch)
        if run.step == 14 and not stop.signal:
            stop(signal.SIGTERM, None)

    plain = {"arch": "run1", "epochs": 2, "batch_size": 16, "warmup": 5}
    config = train.Config(data=tiny_emnist, out=tmp_path / "model.pt", device="cpu", **plain)
    monkeypatch.setattr(train, "Log", Recorder)
    monkeypatch.setattr(train, "take_step", stopped)
    with pytest.raises(train.InterruptedTraining):
        train.train(config, stop)
    history = train.train(replace(config, resume=True))["history"]
    (values,) = (values for _, values in Recorder.last.entries if "images/s" in values)
    assert values["images/s"] == pytest.approx(2 * 16 / history[1]["seconds"])


def test_terminal_shows_a_bar_with_the_loss(tiny_emnist, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(train, "REPORT_STEPS", 1)
    trained(tiny_emnist, tmp_path, epochs=2)
    shown = terminal.getvalue()
    assert re.search(r"epoch 2/2.*pictures/s.*loss=\d\.\d{3}", shown)
    assert "100%" in shown


# Command line

VALUES = {
    "arch": "run8",
    "epochs": 7,
    "batch_size": 64,
    "optimizer": "sgd",
    "lr": 0.25,
    "weight_decay": 0.0,
    "warmup": 0,
    "schedule": "constant",
    "dropout": 0.0,
    "augment": "tone,warp",
    "ema": 0.5,
    "precision": "bfloat16",
    "seed": 5,
    "data": Path("elsewhere"),
    "out": Path("weights.pt"),
    "device": "cuda:1",
}


@pytest.mark.parametrize("name", VALUES)
def test_flags_set_their_setting_alone(name):
    flag = "--" + name.replace("_", "-")
    assert train.parse([flag, str(VALUES[name])]) == replace(train.Config(), **{name: VALUES[name]})
    assert VALUES[name] != getattr(train.Config(), name)


def test_switches_and_defaults():
    assert train.parse([]) == train.Config()
    for name, flag, value in [
        ("xavier", "--no-xavier", False),
        ("wandb", "--no-wandb", False),
        ("compile", "--compile", True),
        ("compile", "--no-compile", False),
        ("resume", "--resume", True),
    ]:
        assert train.parse([flag]) == replace(train.Config(), **{name: value})
        assert getattr(train.Config(), name) != value
    switches = {"xavier", "wandb", "compile", "resume"}
    assert {entry.name for entry in fields(train.Config)} == switches | VALUES.keys()


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default in asdict(train.Config()).items():
        assert "--" + name.replace("_", "-") in text
        assert f"(default: {default})" in text


@pytest.mark.parametrize(
    "words",
    [
        "--arch run2",
        "--epochs 0",
        "--epochs 1.5",
        "--batch-size 1",
        "--batch-size -4",
        "--optimizer lion",
        "--lr 0",
        "--lr -1",
        "--lr nan",
        "--lr inf",
        "--lr fast",
        "--weight-decay -0.1",
        "--weight-decay nan",
        "--warmup -1",
        "--schedule linear",
        "--dropout 1",
        "--dropout -0.1",
        "--augment blur",
        "--augment warp,,tone",
        "--augment none,warp",
        "--ema 1",
        "--precision float16",
        "--seed -1",
        "--seed 9223372036854775808",
        "--device gpu",
        "--device nonsense:0",
        "--speed 3",
    ],
)
def test_bad_values_exit_with_2_and_one_clear_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(words.split())
    assert end.value.code == 2
    usage, _, error = capsys.readouterr().err.rpartition(": error: ")
    assert usage.startswith("usage: ")
    assert words.split()[0] in error
    assert error.count("\n") == 1


# What goes wrong outside


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Put back the handlers that train.main sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_main(tiny_emnist: Path, tmp_path: Path, capsys) -> Callable:
    """Run train.py's main on the tiny EMNIST; return status, stdout, stderr."""

    def run(*flags: object) -> tuple[int, str, str]:
        plain = ["--data", tiny_emnist, "--out", tmp_path / "model.pt", "--device", "cpu"]
        plain += ["--arch", "run1", "--batch-size", 16, "--epochs", 3, "--warmup", 5, "--no-wandb"]
        capsys.readouterr()
        status = train.main([str(word) for word in (*plain, *flags)])
        return status, *capsys.readouterr()

    return run


def the_error(outcome: tuple[int, str, str]) -> str:
    """Return the one line that a training which failed has to say."""
    status, out, err = outcome
    assert status == 1
    assert out == ""
    *before, line = err.splitlines()
    assert not any("error" in other for other in before)
    assert line.startswith("train.py: error: ")
    return line.removeprefix("train.py: error: ")


def test_absent_data_without_a_network_is_one_message(run_main, tmp_path, monkeypatch):
    refusing = train.Archive(
        sources=("http://127.0.0.1:1/a.zip", "http://127.0.0.1:1/b.zip"), tries=1
    )
    monkeypatch.setattr(train.ensure_emnist, "__defaults__", (refusing,))
    status, out, err = run_main("--data", tmp_path / "data")
    assert status == 1
    assert out == ""
    message = err[err.index("train.py: error: ") :]
    assert message.count("error: ") == 1
    assert message.count("Connection refused") == 2
    assert f"put it into {tmp_path}/data/EMNIST/raw" in message
    assert "Traceback" not in err


def test_read_only_folder_for_the_weights_is_one_line(run_main):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may write anywhere
    try:
        error = the_error(run_main("--out", folder / "model.pt"))
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)
    assert error == f"--out {folder}/model.pt: Permission denied: choose a folder to write to"


def test_places_where_no_weights_can_be_are_one_line(run_main, tmp_path):
    error = the_error(run_main("--out", tmp_path))
    assert error == f"--out {tmp_path}: is no regular file, expected the name of one"
    os.mkfifo(tmp_path / "pipe")
    error = the_error(run_main("--out", tmp_path / "pipe"))
    assert error == f"--out {tmp_path}/pipe: is no regular file, expected the name of one"
    error = the_error(run_main("--out", tmp_path / "absent" / "model.pt"))
    assert error.startswith(f"--out {tmp_path}/absent/model.pt: No such file or directory")
    (tmp_path / "file").write_text("")
    error = the_error(run_main("--out", tmp_path / "file" / "model.pt"))
    assert error.startswith(f"--out {tmp_path}/file/model.pt: Not a directory")


def test_weights_go_where_a_link_points(run_main, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "model.pt").symlink_to(tmp_path / "kept" / "real.pt")
    assert run_main()[0] == 0
    assert (tmp_path / "model.pt").is_symlink()
    assert CNN.load(tmp_path / "kept" / "real.pt").figures["test"]["accuracy"] >= 0


def test_results_that_nobody_takes_cost_one_line_and_no_weights(tiny_emnist, tmp_path):
    flags = ["--data", tiny_emnist, "--out", tmp_path / "model.pt", "--device", "cpu", "--no-wandb"]
    flags += ["--arch", "run1", "--batch-size", 16, "--epochs", 1]
    command = shlex.join([sys.executable, train.__file__, *map(str, flags)])
    full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("train.py: error: [Errno 28] No space left")
    assert CNN.load(tmp_path / "model.pt").figures["test"]["accuracy"] >= 0
    silent = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True, text=True)
    assert silent.returncode == 0
    assert "negative log-likelihood" in silent.stdout


def test_a_step_that_cannot_be_compiled_is_one_line(tiny_emnist, tmp_path):
    flags = ["--data", tiny_emnist, "--out", tmp_path / "model.pt", "--device", "cpu", "--no-wandb"]
    flags += ["--arch", "run1", "--batch-size", 16, "--epochs", 1, "--compile"]
    nowhere = {"CXX": "/absent", "PATH": "/absent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    command = [sys.executable, train.__file__, *map(str, flags)]
    run = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True)
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "train.py: error: " in line]
    assert len(lines) == 1
    assert lines[0].startswith("train.py: error: the step can't be compiled: ")
    assert lines[0].endswith(": try --no-compile")
    assert "Traceback" not in run.stderr


def test_device_that_can_hold_nothing_is_one_line(run_main):
    assert the_error(run_main("--device", "meta")).startswith("--device meta: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_device_that_is_absent_is_one_line(run_main):
    error = the_error(run_main("--device", "cuda"))
    assert error.startswith("--device cuda: ")
    assert error.endswith(": try --device cpu")


def test_batch_larger_than_the_data_is_one_line(run_main):
    assert the_error(run_main("--batch-size", 139)) == "--batch-size 139: only 138 pictures"


def test_disk_too_full_for_checkpoints_costs_a_warning_each(run_main, tmp_path, disk_for):
    disk_for(600_000)  # bytes: weights have 363,000, a checkpoint 1,400,000
    status, _, err = run_main()
    assert status == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    place = tmp_path / "model.checkpoint.pt"
    assert warnings == [
        f"warning: no checkpoint at step {step}: {place}: File too large" for step in (8, 16, 24)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert CNN.load(tmp_path / "model.pt").figures["test"]["accuracy"] >= 0


def test_disk_too_full_for_the_weights_is_one_line_and_keeps_the_old_ones(
    run_main, tmp_path, disk_for
):
    CNN.save(CNN.Net("run1"), tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    disk_for(100_000)
    error = the_error(run_main())
    where = f"--out {tmp_path}/model.pt: File too large"
    assert error == f"{where}: make room, then --resume writes it"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == before


def test_disk_that_fills_up_keeps_the_last_good_checkpoint(run_main, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert "No space left on device: make room" in the_error(run_main())
    assert len(calls) == 4  # three checkpoints and the weights
    assert [path.name for path in tmp_path.iterdir()] == ["model.checkpoint.previous.pt"]
    status, _, err = run_main("--resume")
    assert status == 0
    assert "going on from" in err
    assert "step 8 of 24" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_loss_that_is_not_finite_is_named_and_the_good_state_kept(
    run_main, tmp_path, monkeypatch, value, shown
):
    backward = train.Run.eager_backward

    def spoilt(run: train.Run, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = backward(run, images, labels)
        return torch.full_like(loss, value) if run.step == 12 else loss

    (tmp_path / "model.pt").write_text("of an earlier training")
    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "eager_backward", spoilt)
        error = the_error(run_main())
    rate = train.learning_rate(12, 24, train.Config(warmup=5))
    rescued, checkpoint = tmp_path / "model.rescued.pt", tmp_path / "model.checkpoint.pt"
    assert error == (
        f"the loss is {shown} at step 12, learning rate {rate:.3g}; {rescued} has the weights of "
        f"epoch 1: delete {tmp_path}/model.checkpoint*.pt and train anew with a lower --lr"
    )
    assert {*tmp_path.iterdir()} == {tmp_path / "model.pt", checkpoint, rescued}
    assert (tmp_path / "model.pt").read_text() == "of an earlier training"
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 8
    net = CNN.load(rescued)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state["average"][name])
    assert net.figures["validation"]["nll"] <= state["history"][0]["nll"]  # by the temperature
    rescued.rename(tmp_path / "model.pt")
    assert not train.is_done(train.parse(["--out", str(tmp_path / "model.pt")]))
    assert run_main("--resume")[0] == 0


@pytest.mark.parametrize(("lr", "what"), [("1e39", "weights"), ("1e30", "answers on validation")])
def test_training_that_diverges_never_saves_what_became_of_it(run_main, tmp_path, lr, what):
    flags = ["--optimizer", "sgd", "--lr", lr, "--precision", "float32", "--epochs", 2]
    error = the_error(run_main(*flags, "--batch-size", 128))  # one step an epoch, its loss finite
    rate = f"{float(lr) / 5:.3g}"
    assert error == (
        f"{what} are not finite at step 0, learning rate {rate}; no epoch was finished: "
        "train anew with a lower --lr"
    )
    assert list(tmp_path.iterdir()) == []


def test_gpu_memory_that_is_full_is_one_line(run_main, monkeypatch):
    def full(*args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train.Run, "eager_backward", full)
    assert the_error(run_main()) == "out of GPU memory: try a --batch-size below 16"


# The whole


def test_training_then_inference(tiny_emnist, tmp_path, root, glyphs):
    """train.py as a user starts it, then inference.py with its weights on drawn pictures."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--data", tiny_emnist, "--out", tmp_path / "model.pt", "--no-wandb", "--device", "cpu"]
    flags += ["--epochs", 14, "--batch-size", 16, "--warmup", 20]
    end = subprocess.run(
        [sys.executable, root / "train.py", *map(str, flags)],
        capture_output=True,
        text=True,
        env=environ,
        cwd=tmp_path,
    )
    assert end.returncode == 0, end.stderr
    net = CNN.load(tmp_path / "model.pt")
    rows = end.stdout.splitlines()
    assert rows[0].split() == ["validation", "test"]
    assert rows[1].endswith(f"{net.figures['test']['accuracy']:10.2f}")
    said = end.stderr.splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == [f"epoch {n}/14" for n in range(1, 15)]
    assert all("images/s" in line for line in said[:-1])
    assert said[-1] == f"wrote {tmp_path}/model.pt"

    folder = tmp_path / "pictures"
    folder.mkdir()
    drawn = [strokes.emnist_picture(c, strokes.hand(3), form=0) for c in ALPHABET]
    for character, picture in zip(ALPHABET, drawn, strict=True):
        Image.fromarray(picture).save(folder / f"{character}.png")
        large = Image.fromarray(255 - picture).resize((140, 140), Image.Resampling.BICUBIC)
        large.convert("RGB").save(folder / f"{character}.jpg")
    end = subprocess.run(
        [
            sys.executable,
            root / "inference.py",
            "--input",
            folder,
            "--model",
            tmp_path / "model.pt",
        ],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert end.returncode == 0, end.stderr
    answers = {}
    for line in end.stdout.splitlines():
        code, _, path = line.partition(", ")
        answers[Path(path).name] = chr(int(code))
    assert len(answers) == 72
    right = {
        suffix: sum(answers[f"{c}.{suffix}"] == c for c in ALPHABET) for suffix in ("png", "jpg")
    }
    assert min(right.values()) >= 27, right
    logits = train.predict(net, torch.from_numpy(np.stack(drawn)), torch.float32)
    evaluated = [ALPHABET[i] for i in logits.argmax(1)]
    agreeing = sum(answers[f"{c}.png"] == e for c, e in zip(ALPHABET, evaluated, strict=True))
    assert agreeing >= 34


# The shipped weights on the real test pictures


@pytest.fixture(scope="module")
def real_test(tmp_path_factory: pytest.TempPathFactory) -> train.Split:
    """The 30,400 test pictures of the sample of EMNIST."""
    packed = sorted(SHARED.glob("*-test-*.bz2"))
    if not packed:
        pytest.skip(f"the sample of EMNIST is not at {SHARED}")
    root = tmp_path_factory.mktemp("real")
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in packed:
        (raw / path.stem).write_bytes(bz2.decompress(path.read_bytes()))
    split = train.read_emnist(root, train=False)
    shutil.rmtree(root)
    return split


def test_shipped_weights_reach_what_they_say(real_test, root, monkeypatch):
    monkeypatch.setattr(train, "EVALUATION_BATCH", 256)  # the quickest on a CPU
    net = CNN.load(root / "model.pt")
    quick = net.fused().to(memory_format=torch.channels_last)
    logits = train.predict(quick, real_test.images, CNN.mixed_precision(CPU))
    figures = train.measure(logits / net.temperature, real_test.labels)
    assert len(real_test.labels) == 30_400
    assert figures["nll"] <= 0.183
    assert figures["accuracy"] >= 93.9
    assert figures["digits_known"] >= 99.70
    assert figures["letters_known"] >= 95.6
    assert figures["ece"] <= 0.01
    rates = {name for name in figures if name not in ("nll", "ece")}
    assert net.figures["test"].keys() == figures.keys()
    for name in rates:
        assert net.figures["test"][name] == pytest.approx(figures[name], abs=0.12), name
    assert net.figures["test"]["nll"] == pytest.approx(figures["nll"], abs=5e-4)
    assert net.figures["test"]["ece"] == pytest.approx(figures["ece"], abs=1e-3)


def test_real_pictures_are_upright_and_labelled_as_our_drawings(real_test):
    """The mean picture of a class is nearest to our drawing of its character, and only upright."""
    real = torch.stack([real_test.images[real_test.labels == c].float().mean(0) for c in range(36)])
    drawn = torch.stack(
        [
            torch.from_numpy(
                np.mean([strokes.emnist_picture(c, strokes.hand(i), form=i) for i in range(12)], 0)
            ).float()
            for c in ALPHABET
        ]
    )

    def matches(reals: torch.Tensor) -> int:
        flat = [
            F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True)) for x in (reals, drawn)
        ]
        return int(((flat[0] @ flat[1].T).argmax(1) == torch.arange(36)).sum())

    assert matches(real) >= 18
    for other in (real.mT, real.flip(1), real.flip(2), real.rot90(1, (1, 2)), real.roll(1, 0)):
        assert matches(other) <= 12


def test_a_twentieth_of_the_real_pictures_is_held_out(real_test):
    held_out = train.cut_validation(real_test)[1]
    assert 0.045 < len(held_out.labels) / len(real_test.labels) < 0.055
    per_class = held_out.labels.bincount(minlength=36) / real_test.labels.bincount(minlength=36)
    assert per_class.min() > 0.01
    assert per_class.max() < 0.1
