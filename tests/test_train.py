"""train.py's parts against hand-made cases, slow loops and other libraries, and the whole of it."""

import math
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import strokes
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SHORT
from PIL import Image, ImageFilter
from torch.testing import assert_close

import CNN
import train
from CNN import ALPHABET
from train import Config, Machine, Split

CPU = Machine(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def split(tiny_emnist) -> Split:
    """The 144 pictures to train on of the tiny EMNIST."""
    return train.read_emnist(tiny_emnist, train=True)


@pytest.fixture
def batch(split) -> torch.Tensor:
    """Pictures as the augmentations take them: (144, 1, 28, 28) in [0, 1]."""
    return split.images.unsqueeze(1) / 255


@pytest.fixture
def config(tiny_emnist, tmp_path) -> Config:
    """The settings of a run of 24 short steps."""
    files = ["--data", str(tiny_emnist), "--out", str(tmp_path / "model.pt")]
    return train.parse([*SHORT, *files, "--precision", "float32"])


def contents(images: torch.Tensor) -> list[bytes]:
    return [picture.tobytes() for picture in images.numpy()]


def test_labels_belong_to_their_characters_and_pictures_are_upright(tiny_emnist):
    for part, per_class, start in ((True, 4, 0), (False, 2, 5000)):
        images, labels, _ = train.read_emnist(tiny_emnist, train=part)
        assert (images.shape, images.dtype) == ((36 * per_class, 28, 28), torch.uint8)
        hands = [strokes.hand(start + i) for i in range(per_class)]
        for label, character in enumerate("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            drawn = [strokes.emnist_picture(character, h, form=i) for i, h in enumerate(hands)]
            assert set(contents(images[labels == label])) == {d.tobytes() for d in drawn}


def test_copies_of_a_picture_are_on_one_side_of_the_cut_whatever_their_order():
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 256, (10_000, 28, 28), generator=generator, dtype=torch.uint8)
    images = torch.cat([noise, noise[::2], noise[:100].repeat(5, 1, 1)])
    images[0, 14, 14] ^= 1  # one bit makes it another picture
    images = images[torch.randperm(len(images), generator=generator)]
    held = train.held_out(images)
    validation, training = set(contents(images[held])), set(contents(images[~held]))
    assert validation.isdisjoint(training)
    assert 0.04 < len(validation) / len(validation | training) < 0.06
    shipped = [20, 54, 55, 73, 78, 115, 148, 171]  # by the code that cut for the shipped weights
    assert train.held_out(noise).nonzero().flatten().tolist()[:8] == shipped


def test_epochs_show_every_picture_once_each_in_another_order(split):
    shown = list(train.batches(split, 0, Config(batch_size=36, epochs=2, augment="none"), CPU))
    orders, plain = [], dict(zip(contents(split.images), split.labels.tolist(), strict=True))
    for epoch in (shown[:4], shown[4:]):
        assert [images.shape for images, _ in epoch] == [(36, 1, 28, 28)] * 4
        images, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        orders.append(contents((images[:, 0] * 255).round().byte()))
        assert dict(zip(orders[-1], labels.tolist(), strict=True)) == plain
    assert orders[0] != orders[1]


def test_learning_rate_at_its_corners():
    def rates(steps: int, **settings: object) -> list[float]:
        return [train.learning_rate(step, steps, Config(**settings)) for step in range(steps)]

    cosine = rates(1000, lr=0.5, warmup=100)
    corners = [cosine[step] for step in (0, 49, 99, 100, 400, 550)]
    assert corners == pytest.approx([0.005, 0.25, 0.5, 0.5, 0.375, 0.25])  # cos 60° and 90°
    assert 0 < cosine[999] < 0.5 * 1e-5
    constant = rates(8, lr=0.01, warmup=3, schedule="constant")
    assert constant == pytest.approx([0.001] * 3 + [0.01] * 5)


@pytest.mark.parametrize("names", [*train.AUGMENTATIONS, Config.augment])
def test_augment_leaves_every_other_picture_and_keeps_the_ink_of_the_rest_full(split, names):
    before, plain, batches = split.images.clone(), split.images.unsqueeze(1) / 255, []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(train.augment(split.images, names))
    batch, again, other = batches
    assert torch.equal(batch, again)
    assert not torch.equal(batch, other)
    assert torch.equal(split.images, before)
    assert (batch.shape, batch.dtype) == ((144, 1, 28, 28), torch.float32)
    assert torch.equal(batch[1::2], plain[1::2])
    assert (batch[::2] - plain[::2]).abs().amax((1, 2, 3)).gt(0.02).float().mean() > 0.2
    assert batch.amax((1, 2, 3)).gt(0.9999).float().mean() > 0.98  # all but the faintest
    assert 0 <= batch.min() <= batch.max() <= 1
    assert torch.equal(train.augment(split.images, "none"), plain)
    blank = train.augment(torch.zeros(3, 28, 28, dtype=torch.uint8), names)
    assert 0 <= blank.min() <= blank.max() <= 1


def test_warp_is_affine_grid_of_its_matrices_and_a_bent_one(batch, monkeypatch):
    draws, knots = torch.rand(6, 144, 1, 1), torch.randn(144, 2, 5, 5)
    monkeypatch.setattr(torch, "rand", lambda *size, device: draws.view(size))
    monkeypatch.setattr(torch, "randn", lambda *size, device: knots.view(size))
    matrices = []
    for angle, shear, scale, stretch, right, down in (draws * 2 - 1).view(6, 144).T.tolist():
        cos, sin = np.cos(np.radians(15) * angle), np.sin(np.radians(15) * angle)
        turned, sheared = np.array([[cos, -sin], [sin, cos]]), np.array([[1, 0.25 * shear], [0, 1]])
        larger = np.diag(np.exp([0.15 * (scale + stretch), 0.15 * (scale - stretch)]))
        shift = np.array([[right], [down]]) * 2 / 14  # 2 px; affine_grid's unit is 14 px
        matrices.append(np.hstack([larger @ turned @ sheared, shift]))
    theta = torch.from_numpy(np.stack(matrices)).float()
    grid = F.affine_grid(theta, batch.shape, align_corners=False)
    bend = F.interpolate(knots * 0.8 / 14, (28, 28), mode="bilinear")
    expected = F.grid_sample(batch, grid + bend.movedim(1, 3), align_corners=False)
    assert_close(train.warp(batch), expected, atol=2e-5, rtol=0)


@pytest.fixture
def draw_most(monkeypatch):
    """Let an augmentation take the pictures named, part after part, and its largest amounts."""

    def draw(*parts: list[int]) -> None:
        left = iter(torch.tensor(part, dtype=torch.int64) for part in parts)
        monkeypatch.setattr(train, "pick", lambda _, *shares: [next(left) for _ in shares])
        monkeypatch.setattr(train, "uniform", lambda _, low, high: torch.tensor(float(high)))

    return draw


def filtered(picture: torch.Tensor, kernel: ImageFilter.Filter) -> torch.Tensor:
    """Filter a picture (1, 28, 28) in [0, 1] with Pillow, which leaves its border: cut it off."""
    whole = Image.fromarray(np.uint8(picture[0].mul(255).round())).filter(kernel)
    return torch.from_numpy(np.asarray(whole, np.float32)[None, 1:-1, 1:-1]) / 255


def test_stroke_thins_a_third_and_thickens_a_third_as_pillow_does(batch, draw_most):
    change = train.stroke(batch) - batch
    low, high = change.amin((1, 2, 3)), change.amax((1, 2, 3))
    thinner, thicker = (low < 0) & (high <= 0), (high > 0) & (low >= 0)
    assert (thinner.sum(), thicker.sum(), (low == high).sum()) == (48, 48, 48)
    draw_most([3], [99])
    changed, inside = train.stroke(batch)[..., 1:-1, 1:-1], batch[..., 1:-1, 1:-1]
    thin = torch.lerp(inside[3], filtered(batch[3], ImageFilter.MinFilter(3)), 0.9)
    assert_close(changed[3], thin, atol=1e-5, rtol=0)
    assert_close(changed[99], filtered(batch[99], ImageFilter.MaxFilter(3)), atol=1e-5, rtol=0)


def test_resolution_is_pillows_shrinking_then_bicubic_in_a_quarter(batch, draw_most):
    assert (train.resolution(batch) != batch).flatten(1).any(1).sum() in range(33, 38)
    draw_most(*([i] for i in range(len(train.LOW_SIZES))))
    ours = train.resolution(batch)
    assert min(train.LOW_SIZES) == (7, 7)
    for i, (height, width) in enumerate(train.LOW_SIZES):
        small = Image.fromarray(batch[i, 0].numpy()).resize((width, height), Image.BILINEAR)
        small = torch.from_numpy(np.array(small))[None, None]
        expected = F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1)
        assert_close(ours[i : i + 1], expected, atol=1e-5, rtol=0)


def test_tone_blurs_bends_the_contrast_and_adds_grain(batch, draw_most):
    draw_most([3], [4], [])
    changed = train.tone(batch)
    blurred = filtered(batch[3], ImageFilter.BoxBlur(1))
    assert_close(changed[3, :, 1:-1, 1:-1], blurred, atol=0.01, rtol=0)
    assert_close(changed[4], batch[4] ** math.exp(0.7), atol=1e-5, rtol=0)
    draw_most([], [], list(range(144)))
    grey = torch.full_like(batch, 0.5)
    assert (train.tone(grey) - grey).std().item() == pytest.approx(0.12, rel=0.02)


def test_measure_and_confuse_are_what_numpy_counts():
    random = np.random.default_rng(0)
    labels = random.integers(0, 36, 400)
    logits = random.normal(0, 2, (400, 36)).astype(np.float32) + 3 * np.eye(36, dtype="f")[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right, digit = probabilities.max(1), logits.argmax(1) == labels, labels < 10
    known = np.where(digit, logits[:, :10].argmax(1), logits[:, 10:].argmax(1) + 10) == labels
    gaps = [(confidence - right)[np.floor(confidence * 15) == i].sum() for i in range(15)]
    expected = {"accuracy": right, "digits": right[digit], "letters": right[~digit]}
    expected |= {"digits_known": known[digit], "letters_known": known[~digit]}
    expected["classes"] = [right[labels == i].mean() for i in range(36)]
    expected = {name: 100 * np.mean(values) for name, values in expected.items()}
    expected["nll"] = -np.log(probabilities[np.arange(400), labels]).mean()
    expected["ece"] = np.abs(gaps).sum() / 400
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    assert CNN.compute_metrics(*tensors) == pytest.approx(expected, rel=1e-4)
    table = np.zeros((36, 36), int)
    np.add.at(table, (labels, logits.argmax(1)), 1)
    assert np.array_equal(CNN.count_confusions(*tensors), table)


def test_calibrate_finds_the_temperature_that_made_the_labels():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(4000, 36, generator=generator)
    for truth in (0.5, 2.0):
        labels = torch.multinomial((logits / truth).softmax(1), 1, generator=generator)[:, 0]
        found = CNN.calibrate(logits, labels)
        assert found == pytest.approx(truth, rel=0.06)
        best, *others = (F.cross_entropy(logits / (found * f), labels) for f in (1, 1.02, 0.98))
        assert best <= min(others)


@pytest.mark.parametrize(
    ("errors", "groups"),
    [("UV:14", []), ("UV:15", ["UV"]), ("UV:8 VU:7", ["UV"]),  # both ways count
     ("O0:15", ["0O"]),  # of the rarer one: there are 500 zeros, 100 of each other
     ("LI:20 I1:20 Z2:50", ["1IL", "2Z"]), ("AB:20 CD:20 BC:20", ["ABCD"])],
)  # fmt: skip
def test_lookalikes_are_groups_of_pairs_confused_often_enough(errors, groups):
    confusion = torch.diag(torch.tensor([500] + [100] * 35))
    for error in errors.split():
        truth, answer = (ALPHABET.index(character) for character in error[:2])
        confusion[truth, [truth, answer]] += torch.tensor([-1, 1]) * int(error[3:])
    assert CNN.find_lookalikes(confusion) == groups


def test_training_learns_and_the_weights_file_tells_all(run_train, tiny_emnist, tmp_path):
    status, out, err = run_train("--epochs", 10, "--augment", "none", "--precision", "float32")
    assert status == 0
    *epochs, last = err.splitlines()
    assert [line.partition(":")[0] for line in epochs] == [f"epoch {n}/10" for n in range(1, 11)]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in epochs]
    assert losses[-1] < 0.1 * losses[0]
    assert last == f"wrote {tmp_path}/model.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    net, test = CNN.load(tmp_path / "model.pt"), train.read_emnist(tiny_emnist, train=False)
    logits = CNN.predict(net, test.images)[0] / net.card.temperature
    figures, confusion = (
        CNN.compute_metrics(logits, test.labels),
        CNN.count_confusions(logits, test.labels),
    )
    assert figures["accuracy"] > 50
    assert net.card.metrics["test"] == pytest.approx(figures, rel=1e-4)
    assert out.splitlines()[1].split()[::2] == ["accuracy", f"{figures['accuracy']:.4f}"]
    i, j = divmod(confusion.fill_diagonal_(0).argmax().item(), 36)
    assert f"truth>answer: {ALPHABET[i]}>{ALPHABET[j]} {confusion[i, j]}, " in out
    assert net.card.alphabet == ALPHABET
    assert net.card.temperature != 1
    settings = net.card.metrics["settings"]
    assert (settings["lr"], settings["augment"], settings["epochs"]) == (0.003, "none", 10)


def test_best_epoch_by_validation_is_kept_and_test_is_read_once(config, monkeypatch):
    sizes, predict = [], CNN.predict
    see = lambda net, images, _: (sizes.append(len(images)), predict(net, images))[1]  # noqa: E731
    monkeypatch.setattr(CNN, "predict", see)
    results = train.train(replace(config, lr=0.02, epochs=6, schedule="constant", ema=0.0))
    best = min(entry["nll"] for entry in results["history"])
    assert best < results["history"][-1]["nll"]
    both = train.read_emnist(config.data, train=True)
    held = train.held_out(both.images)
    logits = predict(CNN.load(config.out), both.images[held])[0]
    assert F.cross_entropy(logits, both.labels[held]).item() == pytest.approx(best, rel=1e-5)
    assert results["validation"]["nll"] <= best  # by the temperature
    assert sizes.count(72) == 1


@pytest.mark.parametrize("arch", CNN.ARCHITECTURES)
def test_every_net_and_every_optimizer_lowers_the_loss(config, arch):
    optimizer = {"run1": "adagrad", "run7": "adam", "run8": "sgd"}.get(arch, "adamw")
    changed = {"arch": arch, "optimizer": optimizer, "lr": 0.003, "batch_size": 138, "epochs": 2}
    plain = {"schedule": "constant", "warmup": 0, "augment": "none", "dropout": 0.0}
    config = replace(config, **changed, **plain)
    group = train.start(config, CPU, 138).optimizer.param_groups[0]
    assert (group["weight_decay"], group.get("momentum", 0.9)) == (0.05, 0.9)
    first, second = (entry["loss"] for entry in train.train(config)["history"])
    assert second < first
    assert CNN.load(config.out).card.arch == arch


@pytest.mark.parametrize("ema", [0.6, 0.0])
def test_steps_take_their_rate_and_the_average_forgets_the_start(config, monkeypatch, ema):
    config, seen = replace(config, ema=ema), []

    def see(state: train.State, path: Path) -> None:
        seen.append((state.optimizer.param_groups[0]["lr"], *deepcopy([state.net, state.average])))

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)  # one at every step
    monkeypatch.setattr(train, "save_checkpoint", see)
    train.train(config)
    slow = train.start(config, CPU, 138).net.state_dict()
    assert len(seen) == 24
    for step, (rate, net, average) in enumerate(seen):
        assert rate == pytest.approx(train.learning_rate(step, 24, config))
        decay = min(ema, (step + 1) / (step + 11)) if ema else 0
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():  # batch statistics as well
                slow[name] = decay * slow[name] + (1 - decay) * tensor
                assert_close(average.state_dict()[name], slow[name], atol=1e-5, rtol=1e-4)


def test_step_is_compiled_on_the_cpu_only_when_asked(config, monkeypatch):
    calls = MagicMock(side_effect=lambda step, **how: step)
    monkeypatch.setattr(torch, "compile", calls)
    for flag, count in ((None, 0), (False, 0), (True, 1)):
        train.train(replace(config, compile=flag, epochs=1))
        assert calls.call_count == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_gpu_learns_in_compiled_steps(config):
    config = replace(config, device="cuda", arch="default", epochs=10, augment="none")
    assert train.train(config)["test"]["accuracy"] > 50


EVERY = """--arch run8 --epochs 7 --batch-size 64 --optimizer sgd --lr 0.25 --weight-decay 0.0
    --warmup 0 --schedule constant --dropout 0.0 --augment tone,warp --ema 0.5 --no-xavier
    --precision bfloat16 --seed 5 --init i.pt --extra ours --extra-share 0.5 --teacher t.pt
    --data elsewhere --out weights.pt --device cuda:1 --compile --no-wandb --resume"""
BAD = """--arch run2; --epochs 0; --batch-size 1; --optimizer lion; --lr fast; --lr -1; --lr nan
    ; --schedule linear; --augment warp,,tone; --precision float16; --extra-share 0.6; --speed 3"""


def test_every_flag_sets_its_setting_and_help_names_it(run_train):
    assert train.parse([]) == Config()
    status, out, _ = run_train("--help")
    words, text = EVERY.split(), " ".join(out.split())
    assert status == 0
    for name, value in asdict(train.parse(words)).items():
        flag, default = name.replace("_", "-"), getattr(Config(), name)
        assert f"--no-{flag}" in words if value is False else f"--{flag}" in words
        if not isinstance(value, bool):
            word = words[words.index(f"--{flag}") + 1]
            assert str(value) in (word, f"[{Path(word)!r}]")
        assert value != default
        assert f"--{flag}" in text
        assert f"(default: {default})" in text


def test_bad_values_exit_with_2_and_one_clear_line(run_train):
    for words in map(str.split, BAD.split(";")):
        status, _, err = run_train(*words)
        usage, _, error = err.rpartition(": error: ")
        assert (status, error.count("\n"), usage[:7]) == (2, 1, "usage: ")
        assert words[0] in error


def test_what_the_machine_lacks_is_one_line_with_a_remedy(run_train, monkeypatch, tmp_path):
    for place in (tmp_path, tmp_path / "absent" / "model.pt"):
        error = run_train("--out", place).error
        assert error == f"--out {place}: can't be written there: choose another file"
    for name in ("nonsense", "cuda:99"):
        error = run_train("--device", name).error
        assert (error.startswith(f"--device {name}: "), error[-18:]) == (True, ": try --device cpu")
    assert run_train("--batch-size", 139).error.startswith("--batch-size 139: ")
    full = torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
    lacking = torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: no g++ found")
    for error, remedy in ((full, "a smaller --batch-size"), (lacking, "--no-compile")):
        monkeypatch.setattr(F, "cross_entropy", MagicMock(side_effect=error))
        assert run_train().error.endswith(f"{error}: try {remedy}")


def test_disk_too_full_for_checkpoints_costs_a_warning_each(run_train, tmp_path, disk_for):
    disk_for(12_000_000)  # bytes: weights have 8,500,000, a checkpoint 39,000,000
    status, _, err = run_train("--arch", "default")
    assert status == 0
    warning = f"no checkpoint at step %d: {tmp_path}/model.checkpoint.pt: File too large"
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: {warning % step}" for step in (8, 16, 24)]
    (weights,) = tmp_path.iterdir()
    assert CNN.load(weights).card.metrics["test"]["accuracy"] >= 0


def test_training_that_diverges_is_one_line_and_keeps_the_old_weights(run_train, tmp_path):
    (tmp_path / "model.pt").write_text("old")
    error = run_train("--optimizer", "sgd", "--precision", "float32", "--lr", "1e30").error
    assert error == "the loss is not finite: step 8: try a lower --lr"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
