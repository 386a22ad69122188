"""train.py's parts against hand-made cases, slow loops and other libraries, and the whole of it."""

import os
import pty
import re
import resource
import sys
import threading
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import strokes
import torch
import torch.nn.functional as F
from conftest import train_in_fork
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
    config = Config(batch_size=36, epochs=2, augment="none", outliers=0)
    shown = list(train.batches(split, 0, config, CPU))
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


def test_calibrate_finds_the_temperature_and_the_bias_that_made_the_labels():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(8000, 36, generator=generator)
    bias = torch.zeros(36)
    bias[3] = 1.5
    for truth in (0.5, 2.0):
        p = ((logits + bias) / truth).softmax(1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        temperature, found = CNN.calibrate(logits, labels)
        assert temperature == pytest.approx(truth, rel=0.06)
        assert found[3] - found[4:].mean() == pytest.approx(1.5, abs=0.2)
        assert found[4:].std() < 0.2


@pytest.mark.parametrize(
    ("errors", "groups"),
    [("UV:14", []), ("UV:15", ["UV"]), ("UV:8 VU:7", ["UV"]),  # both ways count
     ("O0:15", ["0O"]),  # of the rarer one: there are 500 zeros, 100 of each other
     ("AB:20 CD:20 BC:20 Z2:50", ["2Z", "ABCD"])],
)  # fmt: skip
def test_lookalikes_are_groups_of_pairs_confused_often_enough(errors, groups):
    confusion = torch.diag(torch.tensor([500] + [100] * 35))
    for error in errors.split():
        truth, answer = (ALPHABET.index(character) for character in error[:2])
        confusion[truth, [truth, answer]] += torch.tensor([-1, 1]) * int(error[3:])
    assert CNN.find_lookalikes(confusion) == groups


def test_training_learns_and_the_weights_file_tells_all(run_train, tiny_emnist, tmp_path):
    flags = ["--epochs", 10, "--dropout", 0, "--augment", "none", "--outliers", 0]
    status, out, err = run_train(*flags)
    assert status == 0
    *epochs, last = err.splitlines()
    assert [line.partition(":")[0] for line in epochs] == [f"epoch {n}/10" for n in range(1, 11)]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in epochs]
    assert losses[-1] < 0.1 * losses[0]
    assert last == f"wrote {tmp_path}/model.pt"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    net, test = CNN.load(tmp_path / "model.pt"), train.read_emnist(tiny_emnist, train=False)
    logits = CNN.predict(net, test.images)[0] / net.card.temperature
    figures = CNN.compute_metrics(logits, test.labels)
    confusion = CNN.count_confusions(logits, test.labels)
    assert figures["accuracy"] > 50
    assert net.card.metrics["test"] == pytest.approx(figures, rel=1e-4)
    assert out.splitlines()[1].split()[::2] == ["accuracy", f"{figures['accuracy']:.4f}"]
    truth, answer, count = re.search(r"truth>answer: (.)>(.) (\d+), ", out).groups()
    assert confusion[ALPHABET.index(truth), ALPHABET.index(answer)] == int(count)
    assert confusion.fill_diagonal_(0).max() == int(count)
    assert net.card.alphabet == ALPHABET
    assert net.card.temperature != 1
    settings = net.card.metrics["settings"]
    assert (settings["lr"], settings["augment"], settings["epochs"]) == (0.003, "none", 10)


def test_best_epoch_by_validation_is_kept_and_test_is_read_once(config, monkeypatch):
    sizes, predict = [], CNN.predict

    def see(net: CNN.Net, images: torch.Tensor, precision: torch.dtype) -> tuple:
        sizes.append(len(images))
        return predict(net, images)

    monkeypatch.setattr(CNN, "predict", see)
    monkeypatch.setattr(CNN, "calibrate", lambda logits, labels: (1.0, torch.zeros(36)))
    config = replace(config, lr=0.05, epochs=6, schedule="constant", ema=0.0, outliers=0.0)
    results = train.train(config)
    best = min(entry["nll"] for entry in results["history"])
    assert best < results["history"][-1]["nll"]
    both = train.read_emnist(config.data, train=True)
    held = train.held_out(both.images)
    logits = predict(CNN.load(config.out), both.images[held])[0]
    assert F.cross_entropy(logits, both.labels[held]).item() == pytest.approx(best, rel=1e-5)
    assert results["validation"]["nll"] == pytest.approx(best, rel=1e-5)
    assert sizes.count(72) == 1


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "sgd"])
def test_the_other_optimizers_lower_the_loss(config, optimizer):
    changed = {"optimizer": optimizer, "lr": 0.003, "batch_size": 138, "epochs": 2}
    plain = {"schedule": "constant", "warmup": 0, "augment": "none", "dropout": 0.0}
    config = replace(config, **changed, **plain)
    group = train.create_state(config, CPU).optimizer.param_groups[0]
    assert (group["weight_decay"], group.get("momentum", 0.9)) == (0.05, 0.9)
    first, second = (entry["loss"] for entry in train.train(config)["history"])
    assert second < first


def test_steps_take_their_rate_and_the_average_forgets_the_start(config, monkeypatch):
    config = replace(config, epochs=1, ema=0.3)  # which it reaches at the fourth of 8 steps
    seen = []

    def see(state: train.State, path: Path) -> None:
        seen.append((state.optimizer.param_groups[0]["lr"], *deepcopy([state.net, state.average])))

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)  # one at every step
    monkeypatch.setattr(train, "save_checkpoint", see)
    train.train(config)
    slow = train.create_state(config, CPU).net.state_dict()
    assert len(seen) == 8
    for step, (rate, net, average) in enumerate(seen):
        assert rate == pytest.approx(train.learning_rate(step, 8, config))
        decay = min(0.3, (step + 1) / (step + 11))
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():  # batch statistics as well
                slow[name] = decay * slow[name] + (1 - decay) * tensor
                assert_close(average.state_dict()[name], slow[name], atol=1e-5, rtol=1e-4)


def test_step_is_compiled_when_asked_and_by_itself_on_a_gpu_only(config, monkeypatch):
    calls = MagicMock()
    monkeypatch.setattr(torch, "compile", calls)
    for device, flag, count in (("cpu", None, 0), ("cpu", True, 1), ("cuda", None, 2)):
        machine = CPU._replace(device=torch.device(device))
        train.make_loss(CNN.Net("tiny"), replace(config, compile=flag), machine)
        assert calls.call_count == count
    train.make_loss(CNN.Net("tiny"), replace(config, compile=False), machine)
    assert calls.call_count == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_gpu_learns_in_compiled_steps(config):
    config = replace(config, device="cuda", arch="default", epochs=10, augment="none")
    assert train.train(config)["test"]["accuracy"] > 50


EVERY = """--arch large --epochs 7 --batch-size 64 --optimizer sgd --lr 0.25 --weight-decay 0.0
    --warmup 0 --schedule constant --dropout 0.0 --augment tone,warp --ema 0.5 --no-xavier
    --precision bfloat16 --seed 5 --init i.pt --extra ours --extra-fraction 0.5 --outliers 0.1
    --data elsewhere --out weights.pt --device cuda:1 --compile --no-wandb --resume"""
BAD = """--arch run2; --optimizer lion; --lr fast; --schedule linear; --augment warp,,tone
    ; --precision float16; --speed 3; --epochs 0; --batch-size 1; --lr -1; --lr nan; --lr inf
    ; --weight-decay -1; --warmup -1; --dropout 1.5; --ema -1; --ema 1; --seed -1
    ; --extra-fraction 0.6; --outliers -0.1"""


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
            assert str(value) == word
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
    host = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    smaller = "free some, or try a smaller --batch-size"
    for error, remedy in ((full, smaller), (host, smaller), (lacking, "try --no-compile")):
        monkeypatch.setattr(F, "cross_entropy", MagicMock(side_effect=error))
        assert run_train().error.endswith(f"{error}: {remedy}")
    monkeypatch.setattr(train, "EMNIST", MagicMock(side_effect=MemoryError()))  # not the data's
    assert run_train().error.startswith("out of memory: ")


def test_a_fault_of_our_own_shows_itself(run_train, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", MagicMock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_train()


def test_wrong_files_are_told_before_anything_is_downloaded(run_train, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "ensure_emnist", MagicMock(side_effect=AssertionError))
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    error = run_train("--init", tmp_path / "bad.pt").error
    assert error.startswith(f"--init: {tmp_path}/bad.pt: no weights of ours")
    assert run_train("--init", "absent.pt").error.startswith("--init: ")
    assert run_train("--extra", "absent").error.startswith("--extra absent: ")


def test_a_full_disk_costs_warnings_and_the_weights_wait_for_room(
    run_train, tmp_path, disk_for, monkeypatch
):
    waits = []

    def make_room(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            disk_for(resource.RLIM_INFINITY)

    monkeypatch.setattr(train.time, "sleep", make_room)
    disk_for(100_000)  # bytes: weights have some 600,000
    status, _, err = run_train()
    assert (status, len(waits)) == (0, 3)
    warning = f"no checkpoint at step %d: {tmp_path}/model.checkpoint.pt: File too large"
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert said[:3] == [f"warning: {warning % step}" for step in (8, 16, 24)]
    of_weights = [line.startswith(f"warning: --out {tmp_path}/model.pt: ") for line in said[3:]]
    assert of_weights == [True] * 3
    (weights,) = tmp_path.iterdir()
    assert CNN.load(weights).card.metrics["test"]["accuracy"] >= 0


def test_results_that_nobody_can_take_are_one_line_and_the_weights_are_there(tiny_emnist, tmp_path):
    """Stdout, on a full disk, is the process's own: Python flushes it once more at the end."""
    said = tmp_path / "said"
    flags = ["--epochs", 1, "--data", tiny_emnist, "--out", tmp_path / "model.pt"]
    process = train_in_fork(said, *flags, stdout="/dev/full")
    process.join()
    *_, wrote, error = said.read_text().splitlines()
    assert wrote == f"wrote {tmp_path / 'model.pt'}"
    assert error.startswith("train.py: error: stdout: [Errno 28] No space left on device: ")
    assert process.exitcode == 1
    CNN.load(tmp_path / "model.pt")


def test_progress_says_epoch_loss_and_images_a_second(config, monkeypatch):
    """In a terminal that says that it has no columns and no rows, as CI's."""
    ours, terminal = pty.openpty()
    drawn = []

    def read() -> None:
        with suppress(OSError):  # at its end
            while True:
                drawn.append(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        train.train(config)
    reader.join()
    os.close(ours)
    lines = b"".join(drawn).decode().replace("\n", "\r").split("\r")
    last = [line for line in lines if "100%" in line][-1]
    assert re.match(r"epoch 3/3, loss \d\.\d{3}: 100%\|.*\| 384/384 \[.* images/s\]", last)


def test_training_that_diverges_is_one_line_and_keeps_the_old_weights(run_train, tmp_path):
    (tmp_path / "model.pt").write_text("old")
    error = run_train("--optimizer", "sgd", "--precision", "float32", "--lr", "1e30").error
    assert error.startswith("the loss is not finite: step 8: try a lower --lr, without ")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
