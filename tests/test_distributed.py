"""Training under torchrun: two gloo processes on the CPU do what one process does."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train

# 8 steps an epoch on 138 pictures; signals are heeded at steps 50 and 100 of 104
FLAGS = ["--arch", "run1", "--batch-size", 16, "--epochs", 13, "--warmup", 10, "--dropout", 0]
FLAGS += ["--augment", "none", "--precision", "float32", "--device", "cpu"]
WATCH = """
import os, shutil, sys

def watch(event, args):
    name = os.path.basename(args[1]) if event == "os.rename" else ""
    if name.startswith("model"):
        first = not os.path.exists("renames")
        with open("renames", "a") as file:
            file.write(f"{os.environ['RANK']} {name}\\n")
        if first and name == "model.checkpoint.pt":
            shutil.copy(args[0], "first.pt")

if "RANK" in os.environ:
    sys.addaudithook(watch)
"""


def flags(data: Path, folder: Path, *more: object) -> list[str]:
    files = ["--data", data, "--out", folder / "model.pt", "--no-wandb"]
    return list(map(str, [*files, *FLAGS, *more]))


@contextmanager
def torchrun(data: Path, folder: Path, *more: object) -> Iterator[subprocess.Popen]:
    """Start two ranks of train.py.

    They tell of each rename in folder.parent/renames, and copy the first checkpoint to first.pt.
    """
    (folder.parent / "sitecustomize.py").write_text(WATCH)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [sys.executable, *ranks, train.__file__, *flags(data, folder, *more)],
        env=os.environ | {"PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            yield job
        finally:
            job.terminate()  # where a test failed; it ends its ranks


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def two_ranks(tiny_emnist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of --out after a training by two ranks, its stdout and its stderr."""
    folder = new_folder(tmp_path_factory.mktemp("ranks") / "out")
    with torchrun(tiny_emnist, folder) as job:
        stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    return folder, stdout, stderr


def test_two_ranks_reach_the_weights_of_one_process(two_ranks, tiny_emnist, monkeypatch):
    """After an epoch, and against one process in float64.

    In float32 rounding decides now and then which pixel a pooling takes, and each such change moves
    a gradient by 1 / sqrt(windows): the paths part slowly. Torch's own batch norm rounds 100 to
    1,000 times coarser than ours, so that float32 in one process would be the worse measure.
    """
    net = train.Net
    monkeypatch.setattr(train, "Net", lambda *args, **options: net(*args, **options).double())
    split, _ = train.cut_validation(train.read_emnist(tiny_emnist, train=True))
    config = train.parse(flags(tiny_emnist, two_ranks[0]))
    run = train.Run(config, 8, train.Ranks(0, 1, torch.device("cpu")))
    start = run.net.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    run.net.train()
    for images, labels in train.batches(run, split):
        train.take_step(run, images.double(), labels)

    theirs = torch.load(two_ranks[0].parent / "first.pt", weights_only=True)
    assert theirs["step"] == run.step == 8
    for exact, ours in ((run.net, theirs["net"]), (run.average, theirs["average"])):
        assert ours.keys() == exact.state_dict().keys()
        for name, tensor in exact.state_dict().items():
            distance = (ours[name] - tensor).double().norm()
            path = (start[name] - tensor).double().norm()
            assert distance <= (1e-4 if "running" in name else 1e-2) * path, name


def test_one_rank_writes_and_talks(two_ranks):
    folder, stdout, stderr = two_ranks
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    renames = (folder.parent / "renames").read_text().splitlines()
    assert {line.split()[0] for line in renames} == {"0"}
    assert renames.count("0 model.checkpoint.pt") == 13  # one an epoch
    assert renames.count("0 model.pt") == 1
    assert stdout.count("most frequent confusions on test") == 1
    epochs = [line for line in stderr.splitlines() if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in epochs] == [f"epoch {n}/13" for n in range(1, 14)]


def test_sigterm_to_torchrun_saves_and_resume_ends_the_same(two_ranks, tiny_emnist, tmp_path):
    folder = new_folder(tmp_path / "out")
    with torchrun(tiny_emnist, folder) as job:
        for line in job.stderr:
            if line.startswith("epoch 1/13"):
                break
        job.send_signal(signal.SIGTERM)
        stdout, stderr = job.communicate(timeout=200)
    assert job.returncode != 0
    assert stdout == ""
    assert stderr.count("stopped at your request; go on with the same command and --resume") == 1
    saved = torch.load(folder / "model.checkpoint.pt", weights_only=True)["step"]
    assert saved in (50, 100)

    with torchrun(tiny_emnist, folder, "--resume") as job:
        stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert stderr.count(f"model.checkpoint.pt, step {saved} of 104") == 1
    assert (folder / "model.pt").read_bytes() == (two_ranks[0] / "model.pt").read_bytes()
    assert stdout == two_ranks[1]
    assert {line[0] for line in (tmp_path / "renames").read_text().splitlines()} == {"0"}


def test_ranks_share_each_batch_of_a_single_process(tiny_emnist):
    split = train.read_emnist(tiny_emnist, train=True)
    config = train.Config(batch_size=8, augment="none", arch="run1")
    cpu = torch.device("cpu")
    runs = [train.Run(config, 18, train.Ranks(0, 1, cpu))]
    for rank in range(2):
        runs.append(train.Run(config, 18, train.Ranks(0, 1, cpu)))
        runs[-1].ranks = train.Ranks(rank, 2, cpu)
    seen = []
    for one, first, second in zip(*(train.batches(run, split) for run in runs), strict=True):
        for whole, halves in zip(one, zip(first, second, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(halves))
        seen.extend(picture.numpy().tobytes() for picture in one[0])
    assert len(seen) == len(set(seen)) == 18 * 8  # every picture once


def test_augmentation_and_dropout_differ_between_ranks(tiny_emnist):
    split = train.read_emnist(tiny_emnist, train=True)
    same = train.Split(split.images[:1].repeat(32, 1, 1), split.labels[:1].repeat(32))
    cpu = torch.device("cpu")
    run = train.Run(train.Config(batch_size=16, augment="warp"), 2, train.Ranks(0, 1, cpu))
    drawn = []
    for rank in (0, 1, 1):
        run.ranks = train.Ranks(rank, 2, cpu)
        drawn.append((*next(train.batches(run, same)), torch.rand(4)))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][2], drawn[1][2])
    assert torch.equal(drawn[1][0], drawn[2][0])
    assert torch.equal(drawn[1][2], drawn[2][2])


def test_batch_that_ranks_cannot_share_is_one_line_before_any_download(tmp_path):
    with pytest.raises(train.TrainingError) as error:
        train.load_splits(
            train.Config(batch_size=15, data=tmp_path / "absent"),
            train.Ranks(0, 2, torch.device("cpu")),
        )
    assert str(error.value) == "--batch-size 15: not shared by 2 evenly"
    assert not (tmp_path / "absent").exists()


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Put back the handlers that train.main sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_other_ranks_keep_silent_but_for_their_own_errors(
    monkeypatch, capsys, tmp_path, signal_handlers
):
    monkeypatch.setattr(train, "_rank", lambda: 1)
    train.say("a line that the first rank says too")
    assert capsys.readouterr().err == ""
    assert train.main(["--out", str(tmp_path), "--no-wandb", "--device", "cpu"]) == 1
    expected = "is no regular file, expected the name of one"
    assert capsys.readouterr().err == f"train.py: rank 1: error: --out {tmp_path}: {expected}\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_error_that_all_ranks_meet_is_said_by_the_first(
    monkeypatch, capsys, tmp_path, signal_handlers, rank
):
    monkeypatch.setattr(train, "_rank", lambda: rank)
    ranks = train.Ranks(rank, 2, torch.device("cpu"))
    monkeypatch.setattr(train, "join_ranks", lambda device: ranks)
    assert train.main(flags(tmp_path, tmp_path, "--batch-size", 15)) == 1
    line = "train.py: error: --batch-size 15: not shared by 2 evenly\n"
    assert capsys.readouterr().err == ("" if rank else line)


def test_batch_that_ranks_cannot_share_is_one_line_of_ours(tmp_path):
    with torchrun(tmp_path, new_folder(tmp_path / "out"), "--batch-size", 15) as job:
        _, stderr = job.communicate(timeout=100)
    assert job.returncode != 0
    assert stderr.count("error: --batch-size 15: not shared by 2 evenly") == 1
    assert f'File "{train.__file__}"' not in stderr


# Batch norm over the batches of all ranks


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(32, 7), (6, 5, 9, 4)], ids=["1d", "2d"])
def test_synced_norm_of_one_rank_is_torchs(group_of_one, shape):
    torch.manual_seed(3)
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    theirs = torch.nn.Sequential(kind(shape[1]))
    torch.nn.init.uniform_(theirs[0].weight, 0.5, 2)
    torch.nn.init.normal_(theirs[0].bias)
    ours = train.synchronise_norms(copy.deepcopy(theirs))
    assert isinstance(ours[0], train.SyncedNorm)
    for _ in range(3):
        images = torch.randn(shape) * 2 + 1
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((theirs, ours), inputs, strict=True)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        weights = torch.randn(shape)  # of a loss that batch norm does not make zero
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(*(x.grad for x in inputs), atol=1e-5, rtol=1e-4)
    for name, parameter in theirs.named_parameters():
        ours_too = ours.get_parameter(name).grad
        torch.testing.assert_close(ours_too, parameter.grad, atol=1e-4, rtol=1e-4)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_synced_norm_of_constants_is_finite(group_of_one):
    norm = train.synchronise_norms(torch.nn.Sequential(torch.nn.BatchNorm1d(100)))
    images = torch.linspace(1000, 1100, 100).repeat(64, 1).requires_grad_()
    norm(images).sum().backward()
    assert images.grad.isfinite().all()
    assert norm(images).isfinite().all()


def test_synced_norms_stay_on_the_device_of_the_net():
    net = train.synchronise_norms(train.Net().to("meta"))
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
