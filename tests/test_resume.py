"""A training that was killed, asked to end or given a damaged file ends as if it had not been."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import strokes
import torch
from conftest import train_in_fork

import CNN
import train

KILLS = 10
CHECKPOINT = "model.checkpoint.pt"
EPOCHS = ["--epochs", "8"]  # of 8 steps


def content(path: Path) -> tuple[str, dict[str, bytes]]:
    rest = torch.load(path, weights_only=True)
    weights = rest.pop("state_dict")
    return repr(rest), {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.fixture
def uninterrupted(run_train, tmp_path) -> tuple[str, dict[str, bytes]]:
    """What the weights file of a training holds that nothing interrupts."""
    assert run_train(*EPOCHS).status == 0
    expected = content(tmp_path / "model.pt")
    (tmp_path / "model.pt").unlink()
    return expected


def train_until(run_train, monkeypatch, step: int, number: signal.Signals, *flags: object):
    """Train until a signal comes at a step; return the outcome."""
    rate = train.learning_rate

    def strike(at: int, *rest: object) -> float:
        if at == step:
            os.kill(os.getpid(), number)
        return rate(at, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train, "learning_rate", strike)
        return run_train(*flags)


@pytest.fixture
def interrupted(run_train, monkeypatch, tmp_path) -> Path:
    """A checkpoint of step 13 of 24."""
    assert train_until(run_train, monkeypatch, 12, signal.SIGTERM).status == 143
    return tmp_path / CHECKPOINT


def step_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(
    run_train, uninterrupted, tiny_emnist, tmp_path
):
    random, checkpoint, steps = np.random.default_rng(5), tmp_path / CHECKPOINT, [0]
    said, flags = tmp_path / "said", ["--data", tiny_emnist, "--out", tmp_path / "model.pt"]
    for _ in range(KILLS):
        process = train_in_fork(said, {}, *EPOCHS, *flags, "--resume")
        before = checkpoint.exists() and checkpoint.stat().st_ino
        while not checkpoint.exists() or checkpoint.stat().st_ino == before:  # nothing new yet
            assert process.is_alive(), said.read_text()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))  # half of the time is spent in writing checkpoints
        process.kill()
        process.join()
        steps.append(step_in(checkpoint))
    assert steps == sorted(set(steps))  # nothing that a checkpoint held was lost
    assert steps[-1] < 64
    outcome = run_train(*EPOCHS, "--resume")
    assert outcome.err.startswith(f"going on from {checkpoint}, step {steps[-1]}\n")
    assert content(tmp_path / "model.pt") == uninterrupted
    assert set(os.listdir(tmp_path)) <= {"model.pt", "said", CHECKPOINT + ".part"}


def test_signals_save_and_say_how_to_go_on(
    run_train, monkeypatch, uninterrupted, tiny_emnist, tmp_path
):
    for number, status, step in ((signal.SIGTERM, 143, 12), (signal.SIGINT, 130, 40)):
        outcome = train_until(run_train, monkeypatch, step, number, *EPOCHS, "--resume")
        assert (outcome.status, outcome.out) == (status, "")
        last = outcome.err.splitlines()[-1]
        assert last == "stopped at your request; go on with the same command and --resume"
        assert os.listdir(tmp_path) == [CHECKPOINT]
        assert step_in(tmp_path / CHECKPOINT) == step + 1
    (tmp_path / "moved").symlink_to(tiny_emnist)  # the data may have moved
    assert run_train(*EPOCHS, "--resume", "--data", tmp_path / "moved").status == 0
    assert content(tmp_path / "model.pt") == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "moved"]


def test_damaged_checkpoint_is_named_and_stays(run_train, interrupted, tmp_path):
    whole = interrupted.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:5439], "weights"):
        if damaged == "weights":
            CNN.save(CNN.Net("run1"), interrupted)
        else:
            interrupted.write_bytes(damaged)
        error = run_train("--resume").error
        assert error.startswith(f"--resume: {interrupted} is damaged: ")
        assert error.endswith(": delete it to train anew")
        assert os.listdir(tmp_path) == [CHECKPOINT]


def test_other_settings_other_data_and_a_training_anew_are_refused(
    run_train, interrupted, tmp_path
):
    before, made = interrupted.read_bytes(), f"--resume: {interrupted} was made with: "
    error = run_train("--resume", "--lr", 0.01, "--arch", "run7").error
    assert (
        error == f"{made}arch run1, not run7, lr 0.003, not 0.01: pass the same settings and files"
    )
    more = strokes.write_tiny_emnist(tmp_path / "more", per_class=6)
    assert run_train("--resume", "--data", more).error.startswith(f"{made}pictures 138, not ")
    error = run_train().error
    assert error == f"{interrupted}: a training was cut short: use --resume, or delete it"
    assert interrupted.read_bytes() == before


def test_resume_without_a_checkpoint_starts_and_a_seed_repeats_a_run(run_train, tmp_path):
    outcome, found = run_train("--resume"), []
    start = f"--resume: no checkpoint at {tmp_path / CHECKPOINT}: training from step 0"
    assert outcome.err.splitlines()[0] == start
    for seed in (0, 1):
        found.append(content(tmp_path / "model.pt"))
        assert run_train("--seed", seed).status == 0
    assert found[1] == found[0] != content(tmp_path / "model.pt")


def test_another_number_of_ranks_goes_on_and_says_so(run_train, interrupted):
    saved = torch.load(interrupted, weights_only=True)
    saved["settings"]["ranks"] = 4
    torch.save(saved, interrupted)
    status, _, err = run_train("--resume")
    assert status == 0
    going_on, warning, *_ = err.splitlines()
    assert going_on.startswith("going on from ")
    assert warning == "warning: ranks 4, not 1: this run can't be repeated bit for bit"


def test_another_file_to_start_from_is_refused(run_train, monkeypatch, tmp_path):
    CNN.save(CNN.Net("run1"), tmp_path / "start.pt")
    flags = ["--init", tmp_path / "start.pt"]
    assert train_until(run_train, monkeypatch, 12, signal.SIGTERM, *flags).status == 143
    CNN.save(CNN.Net("run1"), tmp_path / "start.pt")
    error = run_train("--resume", *flags).error
    assert error.startswith(f"--resume: {tmp_path / CHECKPOINT} was made with: init_md5 ")
    assert error.endswith(": pass the same settings and files")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("2.00 GiB")])
def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(
    run_train, interrupted, monkeypatch, error
):
    monkeypatch.setattr(torch, "load", MagicMock(side_effect=error))
    assert run_train("--resume").error.startswith("out of memory: ")
    assert interrupted.exists()
