"""Training under torchrun: two gloo processes on the CPU."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SHORT

import CNN
import train
from train import Config, Machine, Split

MACHINES = [Machine(torch.device("cpu"), torch.float32, rank, 2) for rank in range(2)]
ALONE = MACHINES[0]._replace(world=1)
CONFIG = Config(arch="run1", batch_size=16, epochs=12, warmup=5)  # 96 steps
WATCH = """
import os, sys
watch = lambda event, args: event == "os.rename" and "model" in str(args[1]) and os.write(
    2, f"rank {os.environ['RANK']} renames {os.path.basename(args[1])}\\n".encode())
"RANK" in os.environ and sys.addaudithook(watch)
"""


def torchrun(data: Path, folder: Path) -> subprocess.Popen:
    """Start two ranks of train.py, which say on stderr what they rename."""
    (folder / "out").mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(WATCH)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*SHORT, "--epochs", "12", "--precision", "float32", "--data", str(data)]
    command = [sys.executable, *ranks, train.__file__, *flags, "--out", "out/model.pt"]
    environ, pipe = os.environ | {"PYTHONPATH": str(folder)}, subprocess.PIPE
    options = {"env": environ, "cwd": folder, "stdout": pipe, "stderr": pipe, "text": True}
    return subprocess.Popen(command, **options)


def train_by_hand(split: Split, steps: int) -> dict[str, torch.Tensor]:
    """Take steps with the mean of two ranks' gradients, in one process.

    Each rank has its own batch statistics; those of the first are kept.
    """
    state = train.start(CONFIG, ALONE, len(split.labels))
    feeds = [train.batches(split, 0, CONFIG, machine) for machine in MACHINES]
    for step in range(steps):
        nets = [state.net, deepcopy(state.net)]
        for net, feed in zip(nets, feeds, strict=True):
            images, labels = next(feed)  # it seeds the dropout of its rank as well
            net.zero_grad()
            (F.cross_entropy(net(images), labels) / 2).backward()
        for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
            ours.grad += theirs.grad
        state.optimizer.param_groups[0]["lr"] = train.learning_rate(step, 96, CONFIG)
        state.optimizer.step()
    return state.net.state_dict()


def test_two_ranks_share_the_work_and_the_first_writes_also_when_stopped(tiny_emnist, tmp_path):
    whole, stopped = (torchrun(tiny_emnist, tmp_path / name) for name in ("whole", "stopped"))
    for line in stopped.stderr:
        if line.startswith("epoch 1/12"):
            break
    stopped.send_signal(signal.SIGTERM)
    stdout, stderr = stopped.communicate(timeout=200)
    assert stopped.returncode != 0
    assert stdout == ""
    assert stderr.count("stopped at your request; go on with the same command and --resume") == 1
    (checkpoint,) = (tmp_path / "stopped" / "out").iterdir()
    saved = torch.load(checkpoint, weights_only=True)
    assert 8 <= saved["step"] < 96
    both = train.read_emnist(tiny_emnist, train=True)
    held = train.held_out(both.images)
    by_hand = train_by_hand(Split(both.images[~held], both.labels[~held]), saved["step"])
    for name, tensor in by_hand.items():
        torch.testing.assert_close(saved["net"][name], tensor, atol=1e-5, rtol=1e-4)

    stdout, stderr = whole.communicate(timeout=200)
    assert whole.returncode == 0, stderr
    epochs = [line.partition(":")[0] for line in stderr.splitlines() if line.startswith("epoch ")]
    assert epochs == [f"epoch {n}/12" for n in range(1, 13)]
    assert stdout.count("most confused on test") == 1
    (weights,) = (tmp_path / "whole" / "out").iterdir()
    assert CNN.load(weights).figures["test"]["accuracy"] > 40
    assert stderr.count("rank 0 renames model.pt") == 1
    assert "rank 1" not in stderr


def test_ranks_share_each_batch_of_one_process_and_augment_it_differently(tiny_emnist, monkeypatch):
    split, config = train.read_emnist(tiny_emnist, train=True), Config(batch_size=8, augment="none")
    feeds = [train.batches(split, 17, config, machine) for machine in (ALONE, *MACHINES)]
    for _ in range(9):
        (images, labels), *halves = map(next, feeds)
        assert torch.equal(images, torch.cat([half[0] for half in halves]))
        assert torch.equal(labels, torch.cat([half[1] for half in halves]))
    same = Split(split.images[:1].repeat(32, 1, 1), split.labels[:1].repeat(32))
    config = Config(batch_size=16, augment="warp")
    first, second = (next(train.batches(same, 0, config, machine))[0] for machine in MACHINES)
    assert not torch.equal(first, second)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    with pytest.raises(SystemExit, match="--batch-size 15: 2 processes"):
        train.load_splits(Config(batch_size=15, data=tiny_emnist), MACHINES[0])
