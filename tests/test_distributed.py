"""Training under torchrun: two gloo processes on the CPU."""

import math
import signal
import socket
import subprocess
import sys
from copy import deepcopy
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, train_in_fork

import CNN
import train
from train import Config, Machine, Split

MACHINES = [Machine(torch.device("cpu"), torch.float32, rank, 2) for rank in range(2)]
ALONE = MACHINES[0]._replace(world=1)
CONFIG = Config(arch="tiny", batch_size=16, epochs=8, warmup=5, outliers=0.25)  # 64 steps


def train_in_ranks(tmp_path: Path, *flags: object) -> list[Process]:
    """Run train.py in two forks with what torchrun tells its ranks; what they say goes to files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environ = {"TORCHELASTIC_RUN_ID": "any", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": port}
    ranks = []
    for rank in ("0", "1"):
        own = {**environ, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(train_in_fork(tmp_path / f"said by {rank}", *flags, environ=own))
    return ranks


def test_what_ends_both_ranks_is_said_once(tmp_path):
    first, second = train_in_ranks(tmp_path, "--init", "absent", "--out", tmp_path / "model.pt")
    first.join(100)
    second.terminate()  # as torchrun does when one has ended
    second.join(100)
    assert first.exitcode == 1
    said = [(tmp_path / f"said by {rank}").read_text() for rank in (0, 1)]
    assert [text.count("train.py: error: --init: ") for text in said] == [1, 0]


def train_by_hand(split: Split, steps: int) -> dict[str, torch.Tensor]:
    """Take steps with the mean of two ranks' gradients, in one process.

    Each rank has its own batch statistics; those of the first are kept.
    """
    state = train.create_state(CONFIG, ALONE)
    feeds = [train.batches(split, 0, CONFIG, machine) for machine in MACHINES]
    for step in range(steps):
        nets = [state.net, deepcopy(state.net)]
        for net, feed in zip(nets, feeds, strict=True):
            images, labels = next(feed)  # it seeds the dropout of its rank as well
            net.zero_grad()
            logits = net(images)
            loss = F.cross_entropy(logits[:8], labels)
            loss += 0.5 * (-logits[8:].log_softmax(1).mean() - math.log(36))
            (loss / 2).backward()
        for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
            ours.grad += theirs.grad
        state.optimizer.param_groups[0]["lr"] = train.learning_rate(step, 64, CONFIG)
        state.optimizer.step()
    return state.net.state_dict()


def test_two_ranks_share_the_work_and_the_first_writes_also_when_stopped(
    tiny_emnist, tmp_path, tmp_path_factory
):
    flags = ["--epochs", "8", "--precision", "float32", "--outliers", "0.25"]
    flags += ["--data", tiny_emnist, "--out", tmp_path / "model.pt"]
    script = tmp_path_factory.mktemp("script") / "train_tiny.py"
    script.write_text("import sys, conftest, train\nsys.exit(train.main())\n")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = [sys.executable, "-m", *map(str, (*torchrun, *SHORT, *flags))]
    pipe = subprocess.PIPE
    stopped = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    for line in stopped.stderr:
        if line.startswith("epoch 1/8"):
            break
    stopped.send_signal(signal.SIGTERM)
    stdout, stderr = stopped.communicate(timeout=200)
    assert (stopped.returncode != 0, stdout) == (True, "")
    assert stderr.count("stopped at your request; go on with the same command and --resume") == 1
    (checkpoint,) = tmp_path.iterdir()
    saved = torch.load(checkpoint, weights_only=True)
    assert 8 <= saved["step"] < 64
    both = train.read_emnist(tiny_emnist, train=True)
    held = train.held_out(both.images)
    by_hand = train_by_hand(Split(both.images[~held], both.labels[~held]), saved["step"])
    for name, tensor in by_hand.items():
        torch.testing.assert_close(saved["net"][name], tensor, atol=1e-5, rtol=1e-4)

    resumed = train_in_ranks(tmp_path, *flags, "--resume")
    for process in resumed:
        process.join(100)
    said = [tmp_path / "said by 0", tmp_path / "said by 1"]
    texts = [file.read_text() for file in said]
    assert [process.exitcode for process in resumed] == [0, 0], texts
    epochs = [line.partition(":")[0] for line in texts[0].splitlines() if line[:5] == "epoch"]
    done = saved["step"] // 8
    assert epochs == [f"epoch {n}/8" for n in range(done + 1, 9)]
    assert texts[0].count("most confused on test") == 1
    assert texts[1].count("epoch") + texts[1].count("most confused") == 0
    assert CNN.load(tmp_path / "model.pt").card.metrics["test"]["accuracy"] > 40
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.pt", *said]


def test_ranks_share_each_batch_of_one_process(tiny_emnist, monkeypatch):
    split = train.read_emnist(tiny_emnist, train=True)
    config = Config(batch_size=8, augment="none", outliers=0.0)
    alone = train.batches(split, 17, config, ALONE)
    ranks = [train.batches(split, 17, config, machine) for machine in MACHINES]
    for _ in range(9):
        images, labels = next(alone)
        for rank, feed in enumerate(ranks):
            own_images, own_labels = next(feed)
            assert torch.equal(images[rank::2], own_images)
            assert torch.equal(labels[rank::2], own_labels)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    with pytest.raises(SystemExit, match="--batch-size 15: 2 ranks"):
        train.load_splits(Config(batch_size=15, data=tiny_emnist), MACHINES[0])
