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

import CNN
import train
from train import Config, Machine

MACHINES = [Machine(torch.device("cpu"), torch.float32, rank, 2) for rank in range(2)]
CONFIG = Config(arch="run1", batch_size=16, epochs=12, warmup=10)  # 96 steps
WATCH = """
import os, sys
def watch(event, args):
    if event == "os.rename" and "model" in str(args[1]):
        with open("renames", "a") as file:
            file.write(f"{os.environ['RANK']} {os.path.basename(args[1])}\\n")
if "RANK" in os.environ:
    sys.addaudithook(watch)
"""


def torchrun(data: Path, folder: Path, *flags: str) -> subprocess.Popen:
    """Start two ranks of train.py, which tell of each rename in folder/renames."""
    (folder / "sitecustomize.py").write_text(WATCH)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = ["--data", data, "--out", folder / "out" / "model.pt", "--no-wandb", "--device", "cpu"]
    plain = ["--arch", "run1", "--batch-size", 16, "--epochs", 12, "--warmup", 10]
    command = [sys.executable, *ranks, train.__file__, *files, *plain, "--precision", "float32"]
    environ, pipe = os.environ | {"PYTHONPATH": str(folder)}, subprocess.PIPE
    options = {"env": environ, "cwd": folder, "stdout": pipe, "stderr": pipe, "text": True}
    return subprocess.Popen([*map(str, command), *flags], **options)


def train_by_hand(split: train.Split, steps: int) -> dict[str, torch.Tensor]:
    """Take steps with the mean of two ranks' gradients, in one process.

    Each rank has its own batch statistics; those of the first are kept.
    """
    state = train.start(CONFIG, MACHINES[0]._replace(world=1), len(split.labels))
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


def test_two_ranks_share_the_work_stop_resume_and_the_first_writes(tiny_emnist, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    job = torchrun(tiny_emnist, tmp_path)
    for line in job.stderr:
        if line.startswith("epoch 1/12"):
            break
    job.send_signal(signal.SIGTERM)
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode != 0
    assert stdout == ""
    assert stderr.count("stopped at your request; go on with the same command and --resume") == 1
    saved = torch.load(out / "model.checkpoint.pt", weights_only=True)
    assert 8 <= saved["step"] < 96
    both = train.read_emnist(tiny_emnist, train=True)
    held = train.held_out(both.images)
    split = train.Split(both.images[~held], both.labels[~held])
    for name, tensor in train_by_hand(split, saved["step"]).items():
        torch.testing.assert_close(saved["net"][name], tensor, atol=1e-5, rtol=1e-4)

    job = torchrun(tiny_emnist, tmp_path, "--resume")
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert stderr.count(f"model.checkpoint.pt, step {saved['step']}") == 1
    epochs = [line.partition(":")[0] for line in stderr.splitlines() if line.startswith("epoch ")]
    assert epochs == [f"epoch {n}/12" for n in range(saved["step"] // 8 + 1, 13)]
    assert stdout.count("most confused on test") == 1
    assert [path.name for path in out.iterdir()] == ["model.pt"]
    assert CNN.load(out / "model.pt").figures["test"]["accuracy"] > 40
    renames = (tmp_path / "renames").read_text().splitlines()
    assert {line.split()[0] for line in renames} == {"0"}
    assert renames.count("0 model.pt") == 1


def test_ranks_share_each_batch_of_a_single_process_and_augment_it_differently(tiny_emnist):
    split, machines = train.read_emnist(tiny_emnist, train=True), [MACHINES[0]._replace(world=1)]
    config = Config(batch_size=8, augment="none", epochs=1)
    feeds = [train.batches(split, 0, config, machine) for machine in machines + MACHINES]
    for (images, labels), first, second in zip(*feeds, strict=True):
        assert torch.equal(images, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))
    same = train.Split(split.images[:1].repeat(32, 1, 1), split.labels[:1].repeat(32))
    config = Config(batch_size=16, augment="warp", epochs=1)
    first, second = (next(train.batches(same, 0, config, machine))[0] for machine in MACHINES)
    assert not torch.equal(first, second)


def test_batch_that_ranks_cannot_share_is_one_line(tiny_emnist, monkeypatch):
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    with pytest.raises(SystemExit, match="--batch-size 15: 2 processes"):
        train.load_splits(Config(batch_size=15, data=tiny_emnist), MACHINES[1])
