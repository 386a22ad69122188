"""A training that was killed, asked to end or given damaged files ends as if nothing had happened.

Each training runs in a process of its own, forked from one that has imported train.py already.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch

import CNN
import train

KILLS = 20
EPOCHS, STEPS_PER_EPOCH = 15, 8  # of 138 pictures in batches of 16
FLAGS = ["--arch", "run1", "--epochs", EPOCHS, "--batch-size", 16, "--warmup", 10, "--no-wandb"]
CHECKPOINT, PREVIOUS = "model.checkpoint.pt", "model.checkpoint.previous.pt"

TRAININGS = """
import builtins, json, os, signal, sys, time
import torch, torchvision.datasets
import train

torch.set_num_threads(1)

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, number, when):
    # die at a call of a function: before it, after it, or having done a half of it
    function, calls = getattr(owner, name), [0]
    def patched(*args, **options):
        calls[0] += 1
        if calls[0] == number and when == "before":
            die()
        result = function(*args, **options)
        if calls[0] == number and when == "after":
            die()
        if calls[0] == number and when == "half-written":
            file = result
            class Half:
                def __enter__(self):
                    return self
                def __exit__(self, *error):
                    die()
                def write(self, data):
                    file.write(data[: len(data) // 2])
                    file.flush()
                    die()
            return Half()
        return result
    setattr(owner, name, patched)

def tell_steps(pipe):
    take_step = train.take_step
    def telling(*args):
        take_step(*args)
        os.write(pipe, b".")
    train.take_step = telling

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.CHECKPOINT_SECONDS = order["seconds"]
        if order["die"]:
            name, number, when = order["die"]
            at_call(os, name, number, when)
        tell_steps(tells)
        status = train.main(order["flags"])
        sys.stderr.flush()
        os._exit(status)
    os.close(tells)
    steps = 0
    while order["kill"] is None or steps < order["kill"][0]:
        if not (data := os.read(told, 2**16 if order["kill"] is None else 1)):
            break
        steps += len(data)
    if order["kill"]:
        time.sleep(order["kill"][1])
        os.kill(child, signal.SIGKILL)
    os.close(told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status), flush=True)
"""


@dataclass
class Outcome:
    """How a training ended: its exit status, minus a signal's number, and all that it said."""

    status: int
    said: str


class Trainings:
    """Starts trainings one after another in forks of one process."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAININGS],
            env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(
        self,
        folder: Path,
        *flags: object,
        kill: tuple[int, float] | None = None,
        die: tuple[str, int, str] | None = None,
        seconds: float = 1000,
    ) -> Outcome:
        """Train into folder/model.pt, a checkpoint written after every epoch and some `seconds`.

        kill: after so many steps and seconds. die: at which function of os, which of its calls,
        and "before", "after" or "half-written".
        """
        out = folder / "model.pt"
        all_flags = ["--data", self.data, "--out", out, "--device", "cpu", *FLAGS, *flags]
        order = {"flags": list(map(str, all_flags)), "said": str(folder.parent / "said")}
        order |= {"kill": kill, "die": die, "seconds": seconds}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        status = json.loads(self.process.stdout.readline())
        return Outcome(status, (folder.parent / "said").read_text())

    def close(self) -> None:
        self.process.kill()  # it waits for orders; its end by itself would take seconds
        self.process.wait()


@pytest.fixture(scope="module")
def trainings(tiny_emnist: Path) -> Iterator[Trainings]:
    started = Trainings(tiny_emnist)
    yield started
    started.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights file of a training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    folder.mkdir()
    outcome = trainings.run(folder)
    assert outcome.status == 0, outcome.said
    assert names(folder) == ["model.pt"]
    return (folder / "model.pt").read_bytes()


@pytest.fixture(scope="module")
def interrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two last checkpoints of a training killed near its end."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    folder.mkdir()
    moment = ("replace", 2 * 110 - 1, "after")  # the first save renames one file, others two
    assert trainings.run(folder, die=moment, seconds=0).status == -signal.SIGKILL
    assert (step_in(folder / CHECKPOINT), step_in(folder / PREVIOUS)) == (110, 109)
    return folder


@pytest.fixture
def copied(interrupted: Path, folder: Path) -> Path:
    """A copy of it to do things to."""
    for name in (CHECKPOINT, PREVIOUS):
        shutil.copy(interrupted / name, folder / name)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def step_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


def assert_finishes(
    trainings: Trainings, folder: Path, uninterrupted: bytes, *flags: object
) -> Outcome:
    outcome = trainings.run(folder, "--resume", *flags)
    assert outcome.status == 0, outcome.said
    assert (folder / "model.pt").read_bytes() == uninterrupted
    assert names(folder) == ["model.pt"]  # no checkpoint and nothing half-written is left
    return outcome


# Killed


IN_A_WRITE = [  # of a checkpoint: its file made, filled and synced, two renames
    ("fdopen", "half-written"),
    ("fsync", "before"),
    ("replace", "before"),
    ("replace", "after"),
]


def test_killed_twenty_times_it_ends_bit_for_bit_the_same(trainings, folder, uninterrupted):
    random = np.random.default_rng(5)
    moments = [("anywhere", "")] * (KILLS - 2 * len(IN_A_WRITE)) + 2 * IN_A_WRITE
    steps, said = [0], []
    for i, (function, when) in enumerate(moments[j] for j in random.permutation(KILLS)):
        moment = {"kill": (int(random.integers(0, 5)), random.uniform(0, 0.01))}
        if when:
            moment = {"die": (function, int(random.integers(1, 9)), when)}
        outcome = trainings.run(folder, "--resume", **moment, seconds=0)
        assert outcome.status == -signal.SIGKILL, (i, moment, outcome.said)
        kept = [step_in(folder / n) for n in (CHECKPOINT, PREVIOUS) if (folder / n).exists()]
        steps.append(max(kept, default=0))
        said.append(outcome.said)
    assert steps == sorted(steps)  # nothing that a checkpoint held was lost
    assert KILLS < steps[-1] < EPOCHS * STEPS_PER_EPOCH
    assert not any("damaged" in text for text in said)
    assert_finishes(trainings, folder, uninterrupted)


@pytest.mark.parametrize("call", [1, 2], ids=["between the renames", "after both"])
def test_killed_at_the_renames(trainings, copied, uninterrupted, call):
    newest, previous = step_in(copied / CHECKPOINT), step_in(copied / PREVIOUS)
    outcome = trainings.run(copied, "--resume", die=("replace", call, "after"), seconds=0)
    assert outcome.status == -signal.SIGKILL
    assert (copied / CHECKPOINT).exists() == (call == 2)
    assert step_in(copied / PREVIOUS) == newest > previous
    source = copied / (CHECKPOINT if call == 2 else PREVIOUS)
    outcome = assert_finishes(trainings, copied, uninterrupted)
    assert f"going on from {source}, step {newest + call - 1} of 120" in outcome.said


def test_killed_while_it_writes_the_weights_it_keeps_the_old_ones(trainings, copied, uninterrupted):
    CNN.save(CNN.Net("run1"), copied / "model.pt")  # of an earlier training
    earlier = (copied / "model.pt").read_bytes()
    checkpoints = (120 - step_in(copied / CHECKPOINT) + 7) // 8  # one an epoch
    moment = ("fsync", checkpoints + 1, "before")
    outcome = trainings.run(copied, "--resume", die=moment)
    assert outcome.status == -signal.SIGKILL
    assert (copied / "model.pt").read_bytes() == earlier
    assert step_in(copied / CHECKPOINT) == 120
    assert_finishes(trainings, copied, uninterrupted)


# Asked to end


def test_signals_save_and_leave(trainings, tiny_emnist, tmp_path, uninterrupted):
    signals = {signal.SIGTERM: 143, signal.SIGINT: 130}
    processes = {}
    for number in signals:  # side by side
        out = tmp_path / number.name / "out" / "model.pt"
        out.parent.mkdir(parents=True)
        flags = ["--data", tiny_emnist, "--out", out, "--device", "cpu", *FLAGS]
        processes[number] = subprocess.Popen(
            [sys.executable, train.__file__, *map(str, flags)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for number, process in processes.items():
        for line in process.stderr:
            if line.startswith("epoch 2/15"):
                break
        process.send_signal(number)
    for number, process in processes.items():
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == signals[number]
        assert stdout == ""
        last = stderr.splitlines()[-1]
        assert last == "stopped at your request; go on with the same command and --resume"
        folder = tmp_path / number.name / "out"
        assert names(folder) == [PREVIOUS, CHECKPOINT]
        assert 16 < step_in(folder / CHECKPOINT) < 120
        assert_finishes(trainings, folder, uninterrupted)


def test_second_signal_and_one_before_the_training_are_obeyed_at_once():
    stop = train.Stop()
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)
    stop = train.Stop()
    stop.training = True
    stop(signal.SIGTERM, None)
    assert stop.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_signal_while_the_data_is_read_ends_it_with_its_code(monkeypatch, tiny_emnist, folder):
    def reading(root: Path, train: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(train, "read_emnist", reading)
    flags = ["--data", str(tiny_emnist), "--out", str(folder / "model.pt"), "--no-wandb"]
    try:
        assert train.main(flags) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert names(folder) == []


# Damaged


def flip_a_weight(path: Path) -> None:
    """Change one bit in the middle of the largest tensor; torch.load would not notice."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", data, largest.header_offset + 26)
    data[largest.header_offset + 30 + name + extra + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lack_the_net(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["net"]
    torch.save(state, path)


DAMAGES = [
    cut,
    flip_a_weight,
    lack_the_net,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: path.write_text("not a checkpoint"),
    lambda path: torch.save([1, 2], path),
    lambda path: (path.unlink(), path.mkdir()),
]
NAMES = ["cut", "bit", "incomplete", "empty", "zeros", "text", "foreign", "folder"]


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=NAMES[:-1])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    trainings, copied, uninterrupted, damage: Callable
):
    damage(copied / CHECKPOINT)
    previous = step_in(copied / PREVIOUS)
    outcome = assert_finishes(trainings, copied, uninterrupted)
    warning, going_on = outcome.said.splitlines()[:2]
    assert warning.startswith(f"warning: {copied / CHECKPOINT} is damaged (")
    assert going_on == f"going on from {copied / PREVIOUS}, step {previous} of 120"


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
def test_two_damaged_checkpoints_are_one_line_and_stay(
    trainings, copied, damage: Callable, interrupted
):
    for name in (CHECKPOINT, PREVIOUS):
        damage(copied / name)
    outcome = trainings.run(copied, "--resume")
    assert outcome.status == 1
    *warnings, error = outcome.said.splitlines()
    assert len(warnings) == 2
    what_to_do = f"to train anew, delete {copied}/model.checkpoint*.pt"
    assert error == f"train.py: error: --resume: no sound checkpoint: {what_to_do}"
    assert names(copied) == names(interrupted)


def test_damaged_checkpoint_never_replaces_the_good_one(trainings, copied, uninterrupted):
    cut(copied / CHECKPOINT)
    previous = step_in(copied / PREVIOUS)
    outcome = trainings.run(copied, "--resume", die=("fdopen", 1, "half-written"), seconds=0)
    assert outcome.status == -signal.SIGKILL
    assert step_in(copied / PREVIOUS) == previous
    assert_finishes(trainings, copied, uninterrupted)


# Changed


def test_changed_settings_are_named_and_refused(trainings, copied, interrupted):
    outcome = trainings.run(copied, "--resume", "--lr", 0.01, "--epochs", 20)
    assert outcome.status == 1
    changed = "--epochs 15, not 20, --lr 0.003, not 0.01"
    error = f"--resume: {copied / CHECKPOINT} was made with {changed}: pass the same settings"
    assert outcome.said == f"train.py: error: {error}\n"
    for name in (CHECKPOINT, PREVIOUS):
        assert (copied / name).read_bytes() == (interrupted / name).read_bytes()


def test_other_data_is_named_and_refused(trainings, copied, interrupted, tmp_path):
    more = strokes.write_tiny_emnist(tmp_path / "more", per_class=6)
    outcome = trainings.run(copied, "--resume", "--data", more)
    assert outcome.status == 1
    changed = f"other --data, of {STEPS_PER_EPOCH} steps per epoch"
    error = f"--resume: {copied / CHECKPOINT} was made with {changed}: pass the same settings"
    assert outcome.said == f"train.py: error: {error}\n"
    for name in (CHECKPOINT, PREVIOUS):
        assert (copied / name).read_bytes() == (interrupted / name).read_bytes()


def test_data_may_have_moved(trainings, tiny_emnist, copied, uninterrupted, tmp_path):
    (tmp_path / "moved").symlink_to(tiny_emnist)
    assert_finishes(trainings, copied, uninterrupted, "--data", tmp_path / "moved")


# Started anew, or by the same command again and again


@pytest.mark.parametrize("kept", [[CHECKPOINT, PREVIOUS], [PREVIOUS]], ids=["both", "previous"])
def test_training_anew_never_writes_over_a_checkpoint(trainings, copied, interrupted, kept):
    for name in {CHECKPOINT, PREVIOUS} - {*kept}:
        (copied / name).unlink()
    outcome = trainings.run(copied)
    assert outcome.status == 1
    found = f"a training was cut short at step {step_in(copied / kept[0])} of 120"
    what_to_do = f"--resume goes on with it; to train anew, delete {copied}/model.checkpoint*.pt"
    assert outcome.said == f"train.py: error: --out {copied}/model.pt: {found}: {what_to_do}\n"
    assert names(copied) == sorted(kept)
    for name in kept:
        assert (copied / name).read_bytes() == (interrupted / name).read_bytes()
    for path in copied.glob("model.checkpoint*.pt"):
        path.unlink()
    assert trainings.run(copied).status == 0


def test_training_anew_never_writes_over_a_damaged_checkpoint(trainings, copied):
    cut(copied / CHECKPOINT)
    size = (copied / CHECKPOINT).stat().st_size
    outcome = trainings.run(copied)
    assert outcome.status == 1
    assert "cut short at a step that can't be read: --resume goes on" in outcome.said
    assert (copied / CHECKPOINT).stat().st_size == size


def test_one_command_with_resume_starts_and_ends_a_training(trainings, folder, uninterrupted):
    outcome = assert_finishes(trainings, folder, uninterrupted)
    start = f"--resume: no checkpoint at {folder / CHECKPOINT}: training from step 0"
    assert outcome.said.splitlines()[0] == start
    written = (folder / "model.pt").stat().st_ino
    outcome = trainings.run(folder, "--resume", "--data", folder / "absent")
    assert outcome.status == 0
    done = f"--resume: {folder / 'model.pt'} is done; to train anew, leave --resume out"
    assert outcome.said == f"{done}\n"
    assert (folder / "model.pt").stat().st_ino == written
    assert names(folder) == ["model.pt"]

    outcome = trainings.run(folder, "--resume", "--epochs", 1)
    assert outcome.status == 0
    assert outcome.said.splitlines()[0] == start
    assert (folder / "model.pt").read_bytes() != uninterrupted


@pytest.mark.parametrize(
    "write",
    [lambda path: CNN.save(CNN.Net("run1"), path), lambda path: path.write_text("no weights")],
    ids=["shipped", "text"],
)
def test_weights_that_do_not_say_how_they_were_made_are_not_done(trainings, folder, write):
    write(folder / "model.pt")
    outcome = trainings.run(folder, "--resume", "--epochs", 1)
    assert outcome.status == 0
    assert "training from step 0" in outcome.said
    assert CNN.load(folder / "model.pt").figures["settings"]["epochs"] == 1
