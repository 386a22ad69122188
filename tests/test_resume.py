"""A training that was killed, asked to end or given a damaged file ends as if it had not been."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import conftest
import pytest
import strokes
import torch

import train

CHECKPOINT = "model.checkpoint.pt"


def content(path: Path) -> tuple[str, dict[str, bytes]]:
    rest = torch.load(path, weights_only=True)
    weights = rest.pop("state_dict")
    return repr(rest), {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, in every process: how sums are rounded depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tiny_emnist, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """What the weights file of a training holds that nothing interrupts."""
    path = tmp_path_factory.mktemp("uninterrupted") / "model.pt"
    train.train(train.parse([*conftest.SHORT, "--data", str(tiny_emnist), "--out", str(path)]))
    return content(path)


@pytest.fixture
def interrupted(run_train, tmp_path) -> Path:
    """A checkpoint of step 4 of 24."""
    with conftest.signal_at(3, signal.SIGTERM):
        assert run_train().status == 143
    return tmp_path / CHECKPOINT


def step_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def be_killed(checkpoints: int, replaced: bool) -> None:
    """Write so many checkpoints, one a step; die before or after the last is in place."""
    replace = os.replace
    written = []

    def replace_or_die(part: Path, path: Path) -> None:
        written.append(part)
        is_last = len(written) == checkpoints
        if replaced or not is_last:
            replace(part, path)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die
    train.CHECKPOINT_SECONDS = -1
    torch.set_num_threads(1)


def test_killed_again_and_again_it_ends_bit_for_bit_the_same(
    run_train, uninterrupted, tiny_emnist, tmp_path
):
    checkpoint = tmp_path / CHECKPOINT
    flags = ["--data", tiny_emnist, "--out", tmp_path / "model.pt", "--resume"]
    step = 0
    for count, replaced in ((1, False), (8, True), (5, False)):  # 8 steps are an epoch
        prepare = partial(be_killed, count, replaced)
        process = conftest.train_in_fork(tmp_path / "said", *flags, prepare=prepare)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        step += count if replaced else count - 1
        assert step_in(checkpoint) == step
    outcome = run_train("--resume")
    assert outcome.err.startswith(f"going on from {checkpoint}, step {step}\n")
    assert content(tmp_path / "model.pt") == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "said"]


def test_signals_save_and_say_how_to_go_on(run_train, uninterrupted, tiny_emnist, tmp_path):
    for number, status, step in ((signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 15)):
        with conftest.signal_at(step, number):
            outcome = run_train("--resume")
        assert (outcome.status, outcome.out) == (status, "")
        last = outcome.err.splitlines()[-1]
        assert last == "stopped at your request; go on with the same command and --resume"
        assert os.listdir(tmp_path) == [CHECKPOINT]
        assert step_in(tmp_path / CHECKPOINT) == step + 1
    (tmp_path / "moved").symlink_to(tiny_emnist)  # the data may have moved
    assert run_train("--resume", "--data", tmp_path / "moved").status == 0
    assert content(tmp_path / "model.pt") == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "moved"]


def test_a_signal_that_the_parent_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with train.noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_damaged_checkpoint_is_named_and_stays(run_train, interrupted, tmp_path):
    whole = interrupted.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    for damaged in (b"", b"not a checkpoint", whole[:half], flipped):
        interrupted.write_bytes(damaged)
        error = run_train("--resume").error
        assert error.startswith(f"--resume: {interrupted} is damaged: ")
        assert error.endswith(": delete it to train anew")
        assert os.listdir(tmp_path) == [CHECKPOINT]


def test_other_settings_other_data_and_a_training_anew_are_refused(
    run_train, interrupted, tmp_path
):
    before = interrupted.read_bytes()
    made = f"--resume: {interrupted} was made with: "
    changed = "arch tiny, not large, lr 0.003, not 0.01"
    error = run_train("--resume", "--lr", 0.01, "--arch", "large").error
    assert error == f"{made}{changed}: pass the same settings and files"
    fewer = strokes.write_tiny_emnist(tmp_path / "fewer", per_class=2)
    assert run_train("--resume", "--data", fewer).error.startswith(f"{made}pictures 138, not ")
    error = run_train().error
    assert error == f"{interrupted}: a training was cut short: use --resume, or delete it"
    assert interrupted.read_bytes() == before


def test_resume_without_a_checkpoint_starts_and_a_seed_repeats_a_run(
    run_train, uninterrupted, tmp_path
):
    outcome = run_train("--resume")
    start = f"--resume: no checkpoint at {tmp_path / CHECKPOINT}: training from step 0"
    assert outcome.err.splitlines()[0] == start
    assert content(tmp_path / "model.pt") == uninterrupted
    assert run_train("--seed", 1).status == 0
    assert content(tmp_path / "model.pt")[1] != uninterrupted[1]


def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(run_train, interrupted, monkeypatch):
    full = torch.OutOfMemoryError("2.00 GiB")
    monkeypatch.setattr(torch, "load", MagicMock(side_effect=full))
    assert run_train("--resume").error.startswith("out of memory: ")
    assert interrupted.exists()
