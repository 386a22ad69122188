"""Train the net on EMNIST's digits and letters, merged into 36 classes, and write model.pt.

    python3 train.py                                 # a GPU box, a laptop: what is there is used
    python3 train.py --resume                        # go on after a crash or preemption, or start
    torchrun --nproc-per-node 4 train.py             # several GPUs, the same global batch

Expect 94.1 % right on test (a 215k-image sample of EMNIST) after 53 s on an H100; two CPU cores
learn 1,400 pictures a second, so need an hour and a half. Progress goes to stderr, the table of
results to stdout. Validation, cut from train, chooses the epoch; test is read once, at the end.
"""

import argparse
import glob
import gzip
import hashlib
import http.client
import logging
import math
import os
import queue
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

import CNN
from CNN import ALPHABET, ARCHITECTURES, SIZE, Net

DIGITS = 10  # the first classes of ALPHABET
LETTER_OFFSET = 9  # EMNIST counts its letters 1-26; ours are 10-35
VALIDATION_ONE_IN = 20  # about 5 % of train
EVALUATION_BATCH = 2048
ECE_BINS = 15  # the customary number, Guo et al. 2017, arXiv 1706.04599
LOOKALIKE_RATE = 0.15  # on validation the worst pairs are at 20 % and more, the next at 12 %
CHECKPOINT_SECONDS = 120
REPORT_STEPS = 50  # between two points of the loss curve
CHUNK_STEPS = 16  # batches that a GPU augments at once, to launch fewer kernels

# How far the augmentations go, chosen on validation and on the field sets together
WARP_ANGLE = math.radians(15)
WARP_SHEAR = 0.25
WARP_SCALE = 0.15  # of the logarithm: size and aspect, each
WARP_SHIFT = 2.0  # px
WARP_BEND = 0.8  # px, standard deviation of the elastic displacement at its knots
LOW_SIZES = [(7, 7), (8, 8), (10, 10), (12, 12), (14, 14), (16, 8), (9, 14)]  # px, height, width


class TrainingError(Exception):
    """Something outside the code ended the training; the message is for the user."""


class SharedError(TrainingError):
    """One that every rank meets alike, so that the first one's line is enough."""


def say(line: str) -> None:
    """Write a line for people, above a progress bar where there is one; of all ranks, the first."""
    if _rank() == 0:
        tqdm.write(line, file=sys.stderr)


def _rank() -> int:
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


# Configuration


def setting(default: object, text: str, **more: object) -> object:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Every setting of a run: its default, type and help stand here and nowhere else."""

    arch: str = setting("default", "net", choices=list(ARCHITECTURES))
    epochs: int = setting(20, "passes over the training data")
    batch_size: int = setting(512, "pictures per step, over all processes")
    optimizer: str = setting("adamw", "optimizer", choices=["adamw", "adam", "sgd", "adagrad"])
    lr: float = setting(3e-3, "highest learning rate")
    weight_decay: float = setting(0.05, "weight decay")
    warmup: int = setting(500, "steps of the warm-up stage")
    schedule: str = setting("cosine", "learning rate after it", choices=["cosine", "constant"])
    dropout: float = setting(CNN.DROPOUT, "dropout probability")
    augment: str = setting("warp,stroke,resolution,tone", "augmentations, by comma, or none")
    ema: float = setting(0.999, "decay of the moving average of the weights; 0: none")
    xavier: bool = setting(True, "Xavier initialisation rather than torch's own")
    precision: str = setting("auto", "arithmetic", choices=["auto", "float32", "bfloat16"])
    seed: int = setting(0, "repeats a run, on the CPU bit for bit")
    data: Path = setting(Path("data"), "folder of EMNIST, downloaded there when absent")
    out: Path = setting(Path("model.pt"), "weights file to write")
    device: str = setting("auto", "cpu, cuda, cuda:1, …; auto: cuda where there is one")
    compile: bool | None = setting(None, "compile the step; by default on a GPU only")
    wandb: bool = setting(True, "log to Weights & Biases")
    resume: bool = setting(False, "go on from the checkpoint beside --out, or start")


UNBOUND = {"data", "out", "device", "compile", "wandb", "resume"}  # may differ on --resume
RANGES = {  # lowest value and end
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),  # there is no variance to normalise by in one picture
    "lr": (1e-9, math.inf),
    "warmup": (0, math.inf),
    "weight_decay": (0, math.inf),
    "dropout": (0, 1),
    "ema": (0, 1),
    "seed": (0, 2**63),
}


def parse(argv: list[str] | None = None) -> Config:
    """Turn a command line into a Config, exiting with 2 and a usage line when it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for entry in fields(Config):
        flag = "--" + entry.name.replace("_", "-")
        options = {"default": entry.default, **entry.metadata}
        if entry.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = entry.type
        parser.add_argument(flag, **options)
    config = Config(**vars(parser.parse_args(argv)))
    names = config.augment.split(",")
    if config.augment != "none" and not set(names) <= set(AUGMENTATIONS):
        parser.error(f"--augment {config.augment}: expected none or some of {[*AUGMENTATIONS]}")
    for name, (low, end) in RANGES.items():
        if not low <= getattr(config, name) < end:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(config, name)}: must be at least {low} and below {end}")
    try:
        torch.device(config.device.replace("auto", "cpu"))
    except RuntimeError:
        parser.error(f"--device {config.device}: expected auto, cpu, cuda or cuda:1")
    return config


# Processes


class Ranks(NamedTuple):
    """This process among those that torchrun started: a single one is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def join_ranks(device: str) -> Ranks:
    """Choose the device and, under torchrun, join its process group. Raises TrainingError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    among_others = "TORCHELASTIC_RUN_ID" in os.environ
    if among_others and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device).item()  # which `meta` can't
    except (AssertionError, RuntimeError) as error:
        raise TrainingError(f"--device {device}: {_first_line(error)}: try --device cpu") from None
    if not among_others:
        return Ranks(0, 1, torch.device(device))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, whose losses all depend on it."""

    @staticmethod
    def forward(context: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(context, gradient)


class SyncedNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, as nn.SyncBatchNorm, which needs GPUs."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        moments = torch.stack([wide.mean(axes), wide.square().mean(axes)])  # (2, C)
        mean, square = _SumOverRanks.apply(moments) / dist.get_world_size()
        variance = (square - mean.square()).clamp(min=0)  # rounding may take it below
        count = x.numel() / x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronise_norms(net: nn.Module) -> nn.Module:
    """Make every batch norm see the global batch, in place, its weights and names kept."""
    for name, child in net.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synced = SyncedNorm(child.num_features, device=child.weight.device)
            synced.load_state_dict(child.state_dict())
            setattr(net, name, synced)
        else:
            synchronise_norms(child)
    return net


# The files of EMNIST


@dataclass(frozen=True)
class Archive:
    """EMNIST's one archive and the ways to get it."""

    sources: tuple[str, ...] = (
        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",  # as torchvision 0.29
        "https://drive.usercontent.google.com/download"  # the copy of the PyPI package emnist
        "?id=1R0blrtCsGEVLjVL3eijHMxrwahRUDK26&confirm=t",
        "https://web.archive.org/web/2022id_/"  # as NIST's former place had it
        "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/gzip.zip",
    )
    md5: str = "58c8d27c78d21e728a6bc7b3cc06412e"  # torchvision's; whatever the source, it decides
    size: int = 561_753_746  # bytes; TensorFlow Datasets, url_checksums/emnist.txt
    unpacked: int = 425_600 * (SIZE * SIZE + 1) + 4 * (16 + 8)  # bytes of the 8 files we need
    stall: float = 30  # seconds without a byte after which a connection is given up
    tries: int = 4  # in a row that bring less than 1 % of the archive, before the next source
    pause: float = 0.5  # seconds before connecting again, doubled by each try that brought less


ARCHIVE = Archive()
LABEL_RANGES = {"digits": (0, 9), "letters": (1, 26)}  # lowest and highest label of a split
STEMS = [f"emnist-{split}-{part}" for split in LABEL_RANGES for part in ("train", "test")]
USER_AGENT = "Mozilla/5.0 (compatible; train.py)"  # NIST answers 403 to Python's own
WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may pass in a moment


class SourceError(Exception):
    """A source did not deliver; `final` where asking it again would not help."""

    def __init__(self, message: str, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


def ensure_emnist(root: Path, archive: Archive = ARCHIVE) -> None:
    """Make torchvision.datasets.EMNIST(root) readable: digits and letters, train and test.

    Whole files are left alone. A pair of images and labels of which one is absent, cut short,
    misheaded or wrong is named and replaced: from gzip.zip or its .gz files where someone put them
    into root/EMNIST/raw, else from the network. Raises TrainingError.
    """
    raw = Path(root) / "EMNIST" / "raw"
    faults = _faults(raw)
    for fault in faults.values():
        say(f"{raw}/{fault}")
    if not faults:
        return
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _alone(raw / ".lock"):
            for stem in _faults(raw):  # looked at again: another process may have mended them
                _install_loose(raw, stem)
            if faults := _faults(raw):
                _install_archive(raw, list(faults), archive)
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"{raw}: EMNIST can't be put there: {reason}: mend that or choose another --data"
        raise TrainingError(what) from error


def _names(stem: str) -> tuple[str, str]:
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def _faults(folder: Path) -> dict[str, str]:
    """Return by stem what is wrong with a pair of IDX files; whole pairs are left out."""
    faults = {}
    for stem in STEMS:
        try:
            _check_pair(folder, stem)
        except ValueError as error:
            faults[stem] = str(error)
    return faults


def _check_pair(folder: Path, stem: str) -> None:
    """Raise ValueError, which starts with a file's name, unless images and labels are whole."""
    images, labels = _names(stem)
    count, last = _read_idx(folder / images, (SIZE, SIZE), tail=SIZE * SIZE)
    if not any(last):  # no picture is blank; a file system may give zeros for what it lost
        raise ValueError(f"{images}: its last picture is blank, so it was half-written")
    others, values = _read_idx(folder / labels, ())
    low, high = LABEL_RANGES[stem.split("-")[1]]
    if min(values) < low or max(values) > high:
        found = f"{min(values)} to {max(values)}"
        raise ValueError(f"{labels}: labels from {found}, expected {low} to {high}")
    if count != others:
        raise ValueError(f"{images}: {count:,} pictures with {others:,} labels")


def _read_idx(path: Path, shape: tuple[int, ...], tail: int | None = None) -> tuple[int, bytes]:
    """Return the number of items in an IDX file and its last `tail` bytes, or all of its items.

    shape: of one item. The format (LeCun, yann.lecun.com/exdb/mnist): big-endian int32s, the first
    0x08 (uint8) and the number of dimensions, then the dimensions, then the items. Raises
    ValueError, which starts with the file's name.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(8 + 4 * len(shape))
            if len(header) < 8 + 4 * len(shape):
                raise ValueError(f"{path.name}: {size} bytes, cut short within its header")
            magic, count, *found = struct.unpack(f">{len(header) // 4}I", header)
            if magic != 0x801 + len(shape) or tuple(found) != shape:
                raise ValueError(f"{path.name}: not headed as an IDX file of EMNIST's shape")
            expected = len(header) + count * math.prod(shape)
            if size != expected or not count:
                raise ValueError(f"{path.name}: {size:,} bytes for {count:,} items of its header")
            file.seek(len(header) if tail is None else size - tail)
            return count, file.read()
    except FileNotFoundError:
        raise ValueError(f"{path.name}: absent") from None
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two trainings do not write to one folder at the same time.

    Where there are no such locks (Windows, some network drives) nothing is held.
    """
    with path.open("a") as file:
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{path.parent}: another process is at work here, waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install_loose(raw: Path, stem: str) -> None:
    """Unpack a pair of .gz files that someone put into the folder, if it is whole."""
    for folder in (raw, raw / "gzip"):
        if all((folder / f"{name}.gz").is_file() for name in _names(stem)):
            try:
                return _install(folder, stem, raw)
            except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
                say(f"{folder}/{stem}-*.gz: not used: {error}")


def _install_archive(raw: Path, stems: list[str], archive: Archive) -> None:
    """Unpack the pairs that are wanted from gzip.zip, fetched unless it is there."""
    path = raw / "gzip.zip"
    found = _md5(path) if path.is_file() else None
    if found != archive.md5:
        if found:
            say(f"{path}: not used: its MD5 is {found}, expected {archive.md5}")
        path = raw / "gzip.zip.part"
        path.touch()
        _require_space(raw, archive.size - path.stat().st_size + archive.unpacked)
        _fetch(path, archive)
    _require_space(raw, archive.unpacked)
    with zipfile.ZipFile(path) as file:
        for stem in stems:
            _install(zipfile.Path(file, "gzip/"), stem, raw)
    (raw / "gzip.zip.part").unlink(missing_ok=True)  # but never what a person put there


def _install(source: Path | zipfile.Path, stem: str, raw: Path) -> None:
    """Unpack a pair of .gz files in `source` beside its place, check it, then move it there."""
    scratch = raw / ".unpacking"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        for name in _names(stem):
            with (
                (source / f"{name}.gz").open("rb") as packed,
                gzip.open(packed) as content,
                (scratch / name).open("wb") as file,
            ):
                shutil.copyfileobj(content, file, 2**20)
                file.flush()
                os.fsync(file.fileno())
        _check_pair(scratch, stem)
        images, labels = _names(stem)
        (raw / labels).unlink(missing_ok=True)  # a crash here must not leave old beside new
        os.replace(scratch / images, raw / images)
        os.replace(scratch / labels, raw / labels)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder}: EMNIST needs {needed / 1e6:,.0f} MB there, {free / 1e6:,.0f} MB are free: "
            "make room or choose another folder with --data"
        )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(part: Path, archive: Archive) -> None:
    """Bring the whole archive to `part`, from the first source that delivers it.

    What `part` holds is kept and continued by whichever source: the MD5 tells in the end whether
    it all belongs together. Raises TrainingError if no source delivers.
    """
    megabytes, failures = f"{archive.size // 10**6} MB", ""
    for url in archive.sources:
        say(f"EMNIST, {megabytes}: fetching {url} to {part}")
        try:
            return _fetch_from(url, part, archive)
        except SourceError as error:
            failures += f"  {url}: {error}\n"
            say(f"{url}: {error}")
    raise TrainingError(
        f"EMNIST could not be fetched:\n{failures}"
        f"Fetch gzip.zip ({megabytes}, MD5 {archive.md5}) by other means and put it into "
        f"{part.parent.resolve()}, or put there its 8 files "
        "emnist-{digits,letters}-{train,test}-{images-idx3,labels-idx1}-ubyte.gz; then start again"
    )


def _fetch_from(url: str, part: Path, archive: Archive) -> None:
    """Complete `part` from one source, connecting again as long as that brings something."""
    fruitless = mismatches = 0
    while True:
        start = part.stat().st_size
        try:
            if start < archive.size:
                _transfer(url, part, archive)
            if (found := _md5(part)) == archive.md5:
                return
            os.truncate(part, 0)
            mismatches += 1
            again = start > 0 and mismatches == 1  # the fault may be in what was there before
            raise SourceError(f"its MD5 is {found}, expected {archive.md5}", final=not again)
        except SourceError as error:
            gained = part.stat().st_size - start
            fruitless = 0 if gained > archive.size / 100 else fruitless + 1
            if error.final or fruitless == archive.tries:
                raise
            say(f"{url}: {error}; trying again")
            time.sleep(archive.pause * 2**fruitless)


def _transfer(url: str, part: Path, archive: Archive) -> None:
    """Write to `part` what one connection brings, and show how far it got."""
    start = done = part.stat().st_size
    silent = not sys.stderr.isatty()
    bar = tqdm(total=archive.size, initial=start, unit="B", unit_scale=True, disable=silent)
    with bar, part.open("r+b") as file:
        for offset, chunk in _receive(url, start, archive):
            file.seek(offset)
            file.write(chunk)
            before, done = done, offset + len(chunk)
            bar.update(done - before)
            if silent and 10 * done // archive.size > 10 * before // archive.size:
                say(f"EMNIST: {10 * done // archive.size}0 %")
    if done < archive.size:
        raise SourceError(f"cut after {done:,} of {archive.size:,} bytes", final=False)


def _receive(url: str, start: int, archive: Archive) -> Iterator[tuple[int, bytes]]:
    """Yield the archive from `start` on (from 0 if the source knows no ranges), with offsets.

    Raises SourceError for whatever the network or the server does instead.
    """
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=archive.stall) as response:
            offset = _offset(response, start, archive.size)
            while chunk := response.read1(2**20):
                if offset + len(chunk) > archive.size:
                    raise SourceError(f"sends more than the {archive.size:,} bytes of the archive")
                yield offset, chunk
                offset += len(chunk)
    except urllib.error.HTTPError as error:
        again = error.code in WORTH_RETRYING
        raise SourceError(f"HTTP {error.code} {error.reason}", final=not again) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # what urllib's URLError wraps
        if isinstance(reason, TimeoutError):
            reason = f"nothing came for {archive.stall:g} s"
        raise SourceError(f"{reason}" or type(reason).__name__, final=False) from None


def _offset(response: http.client.HTTPResponse, start: int, size: int) -> int:
    """Return where in the archive the body of an answer begins, its headers checked."""
    if response.headers.get_content_type() == "text/html":
        raise SourceError("sends a web page, not the archive")
    if response.status == 206:
        found = response.headers["Content-Range"] or "none"
        if found not in (f"bytes {start}-{size - 1}/{size}", f"bytes {start}-{size - 1}/*"):
            raise SourceError(f"sends range {found}, expected bytes {start}-{size - 1}/{size}")
        return start
    if response.length not in (None, size):
        raise SourceError(f"sends {response.length:,} bytes, expected {size:,}")
    return 0


# Data


class Split(NamedTuple):
    """Resident pictures: images (N, 28, 28) uint8, upright, ink 255 on 0; labels (N,) int64."""

    images: Tensor
    labels: Tensor


def read_emnist(root: Path, train: bool) -> Split:
    """Merge EMNIST's digits and letters: its pictures turned upright, its letters after 9."""
    from torchvision.datasets import EMNIST  # 2 s to import

    digits, letters = (EMNIST(str(root), split=name, train=train) for name in ("digits", "letters"))
    images = torch.cat([digits.data, letters.data]).transpose(1, 2).contiguous()
    labels = torch.cat([digits.targets, letters.targets + LETTER_OFFSET])
    return Split(images, labels)


def held_out(images: Tensor) -> Tensor:
    """Say which pictures (N, 28, 28) uint8 are for validation: (N,) bool, some 5 %.

    A hash of the pixels decides, so that copies of a picture (the sample of EMNIST repeats some)
    end on the same side, whatever their order. It is the sum of the picture's 98 words of 8 bytes
    times fixed random odd numbers, modulo 2^64.
    """
    words = images.flatten(1).contiguous().view(torch.int64)  # (N, 98)
    generator = torch.Generator().manual_seed(20170217)  # any constant: the cut must never change
    factors = torch.randint(2**62, (words.shape[1],), generator=generator) * 2 + 1
    mixed = sum(words[:, i] * factors[i] for i in range(words.shape[1]))
    return (mixed >> 32) % VALIDATION_ONE_IN == 0


def cut_validation(split: Split) -> tuple[Split, Split]:
    """Split train into train and validation."""
    held = held_out(split.images)
    return Split(*(part[~held] for part in split)), Split(*(part[held] for part in split))


# Augmentation: functions of a batch (N, 1, 28, 28) in [0, 1], on its device, knowing no loop; at
# strength 0 each is the identity.


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw one number per picture, shaped (N, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def pick(images: Tensor, *shares: float) -> tuple[Tensor, ...]:
    """Draw the indices of disjoint random parts of the pictures, as large as the shares say."""
    order = torch.randperm(len(images), device=images.device)
    ends = [0, *(round(sum(shares[: i + 1]) * len(images)) for i in range(len(shares)))]
    return tuple(order[start:end] for start, end in pairwise(ends))


@cache
def resampler(target: int, source: int, mode: str, device: torch.device) -> Tensor:
    """Return the matrix (target, source) that resamples a column: resampling is linear."""
    eye = torch.eye(source, device=device)[None, None]
    return F.interpolate(eye, (target, source), mode=mode, antialias=target < source)[0, 0]


def warp(images: Tensor, strength: float = 1.0) -> Tensor:
    """Rotate, scale, stretch, shear and shift, with a smooth elastic displacement on top."""
    n, device = len(images), images.device
    draws = (torch.rand(6, n, 1, 1, device=device) * 2 - 1) * strength  # each in [-1, 1]
    angle, shear, scale, stretch, right, down = draws
    cos, sin = torch.cos(angle * WARP_ANGLE), torch.sin(angle * WARP_ANGLE)
    shear = shear * WARP_SHEAR
    across = torch.exp((scale + stretch) * WARP_SCALE)
    along = torch.exp((scale - stretch) * WARP_SCALE)
    shift = WARP_SHIFT * 2 / SIZE  # grid_sample's unit is half a side

    x = (torch.arange(SIZE, device=device) * 2 + 1) / SIZE - 1  # (28,) centres of pixels
    y = x[:, None]
    knots = torch.randn(n, 2, 5, 5, device=device) * (WARP_BEND * 2 / SIZE * strength)
    spread = resampler(SIZE, 5, "bilinear", device)
    bend = spread @ knots @ spread.T  # (N, 2, 28, 28)
    source_x = across * (cos * x + (shear * cos - sin) * y) + right * shift + bend[:, 0]
    source_y = along * (sin * x + (shear * sin + cos) * y) + down * shift + bend[:, 1]
    grid = torch.stack([source_x, source_y], dim=-1)  # (N, 28, 28, 2)
    return F.grid_sample(images, grid, align_corners=False)


def stroke(images: Tensor, strength: float = 1.0) -> Tensor:
    """Thin a third of the pictures, thicken another, by grey morphology, each by its own amount."""
    images = images.clone()
    fewer, more = pick(images, 1 / 3, 1 / 3)
    thin, thick = images[fewer], images[more]
    eroded = -F.max_pool2d(-thin, 3, stride=1, padding=1)
    dilated = F.max_pool2d(thick, 3, stride=1, padding=1)
    images[fewer] = torch.lerp(thin, eroded, uniform(thin, 0, 0.9 * strength))
    images[more] = torch.lerp(thick, dilated, uniform(thick, 0, strength))
    return images


def resolution(images: Tensor, strength: float = 1.0) -> Tensor:
    """Take a quarter of the pictures down to a few pixels and back: thumbnails, coarse scans."""
    images, device = images.clone(), images.device
    (chosen,) = pick(images, 1 / 4)
    part = images[chosen]
    turn = torch.arange(len(part), device=device) % len(LOW_SIZES)

    def down_and_up(sides: tuple[int, ...]) -> Tensor:  # (N / 4, 1, 28, 28) matrices
        down = [resampler(k, SIZE, "bilinear", device) for k in sides]
        up = [resampler(SIZE, k, "bicubic", device) for k in sides]
        return torch.stack([u @ d for u, d in zip(up, down, strict=True)])[turn].unsqueeze(1)

    rows, columns = map(down_and_up, zip(*LOW_SIZES, strict=True))
    coarse = (rows @ part @ columns.mT).clamp(0, 1)  # (N / 4, 1, 28, 28)
    images[chosen] = torch.lerp(part, coarse, strength)
    return images


def tone(images: Tensor, strength: float = 1.0) -> Tensor:
    """Blur, bend the contrast, add grain, each to its own random part of the pictures."""
    images = images.clone()
    (chosen,) = pick(images, 1 / 4)
    soft = images[chosen]
    blurred = F.avg_pool2d(soft, 3, stride=1, padding=1)
    images[chosen] = torch.lerp(soft, blurred, uniform(soft, 0, strength))
    (chosen,) = pick(images, 1 / 3)
    bent = images[chosen]
    images[chosen] = bent.clamp(1e-6) ** torch.exp(uniform(bent, -0.7, 0.7) * strength)
    (chosen,) = pick(images, 1 / 5)
    grainy = images[chosen]
    images[chosen] += torch.randn_like(grainy) * uniform(grainy, 0, 0.12 * strength)
    return images.clamp(0, 1)


AUGMENTATIONS = {function.__name__: function for function in (warp, stroke, resolution, tone)}


def augment(images: Tensor, names: str) -> Tensor:
    """Turn resident pictures (N, 28, 28) uint8 into a batch (N, 1, 28, 28) in [0, 1].

    Every other picture stays as it is: on clean pictures the net may use what the augmentations
    destroy, the small differences of form between the 0 and the O of EMNIST's writers. The ink of
    the others is brought back to a maximum of 1, which EMNIST's pictures and fitted ones have.
    """
    batch = images.unsqueeze(1).float() / 255
    if names == "none":
        return batch
    changed = batch[::2]
    for name in names.split(","):
        changed = AUGMENTATIONS[name](changed)
    batch[::2] = changed / changed.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return batch


# Learning rate


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Return the rate of a step of `steps`: the warm-up stage, then the schedule.

    cosine rises in a line to lr and falls along a half cosine to zero. constant is the origin's:
    a tenth of lr during the warm-up stage, lr after it.
    """
    if config.schedule == "constant":
        return config.lr / 10 if step < config.warmup else config.lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


# Evaluation


@torch.no_grad()
def predict(net: Net, images: Tensor, precision: torch.dtype) -> Tensor:
    """Return the logits (N, classes), float32, of resident pictures (N, 28, 28) uint8."""
    net.eval()
    logits = []
    for part in images.split(EVALUATION_BATCH):
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits.append(net(augment(part, "none")).float())
    return torch.cat(logits)


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the figures of a split: rates in per cent, NLL in nats.

    digits, letters: of the pictures that are; *_known: the same when only digits, or only letters,
    can be answered. classes: mean over the classes. ece: expected calibration error, a fraction.
    """
    right = (logits.argmax(1) == labels).float()
    digit = labels < DIGITS
    counts = labels.bincount(minlength=len(ALPHABET)).clamp(1)
    per_class = right.new_zeros(len(ALPHABET)).index_add_(0, labels, right) / counts
    known_digits = logits[digit, :DIGITS].argmax(1) == labels[digit]
    known_letters = logits[~digit, DIGITS:].argmax(1) + DIGITS == labels[~digit]
    rates = {
        "accuracy": right.mean(),
        "digits": right[digit].mean(),
        "letters": right[~digit].mean(),
        "classes": per_class[labels.unique()].mean(),
        "digits_known": known_digits.float().mean(),
        "letters_known": known_letters.float().mean(),
    }
    figures = {name: 100 * rate.item() for name, rate in rates.items()}
    figures["nll"] = F.cross_entropy(logits, labels).item()
    figures["ece"] = calibration_error(logits, labels)
    return figures


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of the best answers, in ECE_BINS equal bins."""
    confidence, answer = logits.softmax(1).max(1)
    right = (answer == labels).float()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, device=logits.device).index_add_(0, bins, confidence - right)
    return (gaps.abs().sum() / len(labels)).item()


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that gives the least NLL: the best of a fine grid, 0.25 to 4."""
    temperatures = torch.logspace(-2, 2, 1001, base=2).tolist()
    losses = [F.cross_entropy(logits / t, labels).item() for t in temperatures]
    return temperatures[losses.index(min(losses))]


def confuse(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the confusion table (36, 36), int64: row the truth, column the answer."""
    classes = len(ALPHABET)
    pairs = labels * classes + logits.argmax(1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).cpu()


def find_lookalikes(confusion: Tensor) -> list[str]:
    """Return the groups of characters that nobody can tell apart alone, such as "1IL".

    Two characters are alike if their confusions, both ways, reach LOOKALIKE_RATE of the pictures
    of the rarer one; a group is what such pairs connect.
    """
    counts = confusion.sum(1)
    rates = (confusion + confusion.T) / torch.minimum(counts[:, None], counts).clamp(1)
    groups = [{i} for i in range(len(ALPHABET))]
    for i, j in (rates.triu(1) >= LOOKALIKE_RATE).nonzero().tolist():
        joined = groups[i] | groups[j]
        for member in joined:
            groups[member] = joined
    found = {"".join(ALPHABET[i] for i in sorted(group)) for group in groups if len(group) > 1}
    return sorted(found)


def worst_confusions(confusion: Tensor, most: int = 10) -> list[tuple[str, str, int]]:
    """Return the most frequent errors: (truth, answer, count)."""
    errors = confusion - confusion.diag().diag()
    counts, places = errors.flatten().topk(most)
    width = len(ALPHABET)
    return [
        (ALPHABET[place // width], ALPHABET[place % width], count)
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]


# State of a run and its checkpoint


class Run:
    """All that changes while training; what `state` returns is enough to go on bit for bit."""

    def __init__(self, config: Config, steps_per_epoch: int, ranks: Ranks) -> None:
        self.config, self.steps_per_epoch, self.ranks = config, steps_per_epoch, ranks
        torch.manual_seed(config.seed)
        net = Net(config.arch, dropout=config.dropout, xavier=config.xavier)
        self.net = net.to(ranks.device, memory_format=torch.channels_last)
        self.average = deepcopy(self.net).requires_grad_(False)
        if ranks.world > 1:
            synchronise_norms(self.net)
        self.optimizer = make_optimizer(self.net, config)
        self.step = 0  # steps taken since the start of the training
        self.losses = torch.zeros(steps_per_epoch, device=ranks.device)  # of this epoch's steps
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []  # one entry per finished epoch
        self.log_id: str | None = None
        auto = CNN.mixed_precision(ranks.device)
        self.precision = auto if config.precision == "auto" else getattr(torch, config.precision)
        self.chunk = CHUNK_STEPS if ranks.device.type == "cuda" else 1
        self.forward: nn.Module = self.net
        self.backward: Callable = self.eager_backward
        self.averaged = _floats(self.average), _floats(self.net)

    def build(self) -> None:
        """Compile the step where asked and spread it over the ranks; no weight changes."""
        device = self.ranks.device
        if self.config.compile or (self.config.compile is None and device.type == "cuda"):
            self.net.compile()
        if self.ranks.world > 1:
            places = [device.index] if device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(self.net, device_ids=places)
        elif device.type == "cuda":
            self.backward = GraphedBackward(self)

    def eager_backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradients of the mean loss in the net and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        mixed = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision, enabled=mixed):
            loss = F.cross_entropy(self.forward(images), labels)
        loss.backward()
        return loss.detach()

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def state(self) -> dict:
        return {
            "settings": bound_settings(self.config),
            "step": self.step,
            "losses": self.losses,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "history": self.history,
            "log_id": self.log_id,
        }

    def restore(self, state: dict) -> None:
        self.step, self.history, self.log_id = state["step"], state["history"], state["log_id"]
        self.losses.copy_(state["losses"])
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = {key: tensor.to(self.ranks.device) for key, tensor in state["best"].items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights and batch statistics towards the net's.

        The decay grows from 0 in the first steps, so that the average forgets the start.
        """
        decay = min(self.config.ema, self.step / (self.step + 10)) if self.config.ema else 0.0
        torch._foreach_lerp_(*self.averaged, 1 - decay)


def _floats(net: nn.Module) -> list[Tensor]:
    return [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]


class GraphedBackward:
    """Forward and backward as one CUDA graph, replayed: Python launches one thing, not hundreds."""

    def __init__(self, run: Run) -> None:
        batch, device = run.config.batch_size, run.ranks.device
        form = torch.zeros(batch, 1, SIZE, SIZE, device=device)
        self.images = form.to(memory_format=torch.channels_last)
        self.labels = torch.zeros(batch, dtype=torch.int64, device=device)
        before = deepcopy(run.net.state_dict())
        side = torch.cuda.Stream()  # the documented way to warm up before a capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run.eager_backward(self.images, self.labels)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run.eager_backward(self.images, self.labels)
        run.net.load_state_dict(before)  # the batch statistics of the blank pictures forgotten

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss


def make_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, **shared),
        "adam": lambda p: torch.optim.Adam(p, **shared),
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, **shared),
        "adagrad": lambda p: torch.optim.Adagrad(p, **{**shared, "fused": None}),
    }
    return kinds[config.optimizer](net.parameters())


def bound_settings(config: Config) -> dict[str, object]:
    """Return the settings that make a run what it is, those that --resume must find unchanged."""
    return {name: value for name, value in asdict(config).items() if name not in UNBOUND}


# The log at Weights & Biases

LOG_SECONDS = 30  # the most that wandb may cost a training, whatever happens to it
LOG_AXES = {"train/*": "step", "lr": "step", "val/*": "epoch", "images/s": "epoch"}
LOG_QUEUE = 10_000  # entries that wait while wandb starts or hangs; more are dropped


class Log:
    """A training's log at Weights & Biases; its methods do nothing where it is off.

    All of wandb, its import included, runs on one daemon thread that takes jobs from a queue, so
    that nothing it does or fails to do holds the training up. A failure costs one warning.
    run_id: of the run to go on with. limit: seconds that `close` waits at most.
    """

    def __init__(
        self, enabled: bool, config: dict, run_id: str | None = None, limit: float = LOG_SECONDS
    ) -> None:
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._limit, self._warned, self._folder = limit, False, None
        self._jobs: queue.Queue[Callable | None] = queue.Queue(LOG_QUEUE)
        self._thread = threading.Thread(target=self._work, args=(config,), daemon=True)
        if enabled:
            self._thread.start()

    def metrics(self, step: int, **values: float) -> None:
        """Log what was measured at a step; with `epoch` where LOG_AXES asks for it."""
        self._do(lambda run: run.log({"step": step, **values}))

    def finish(self, figures: dict, confusion: list[list[int]], weights: Path) -> None:
        """Log the test figures, the confusion matrix [actual][predicted] and the weights file."""
        self._do(lambda run: _log_results(run, figures, confusion, weights))

    def close(self) -> None:
        """Wait until wandb has sent or stored what it has, but no longer than the limit."""
        if not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._jobs.put_nowait(None)
        self._thread.join(self._limit - 1)
        if self._thread.is_alive():
            self._warn(f"not done {self._limit:g} s after the training")
            with suppress(Exception):  # not a public name; without it the service outlives us
                self._session._connection._proc._process.kill()
            threading.Thread(target=_leave, daemon=True).start()
            self._thread.join(1)

    def _do(self, job: Callable) -> None:
        if self._thread.is_alive():
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                self._warn(f"{LOG_QUEUE:,} entries are waiting, new ones are dropped")

    def _warn(self, reason: object) -> None:
        """Say in one line what went wrong first; what follows from it is no news."""
        if not self._warned:
            self._warned = True
            later = f"; send what it has with: wandb sync {self._folder}" if self._folder else ""
            say(f"warning: wandb: {' '.join(str(reason).split())[:300]}{later}")

    def _work(self, config: dict) -> None:
        try:
            run = self._open(config)
            while job := self._jobs.get():
                job(run)
            run.finish()
            if self._folder and shutil.disk_usage(self._folder).free < 2**20:  # wandb is silent
                self._warn("the disk is full, the log is not whole")
        except BaseException as error:  # SystemExit too, which wandb raises
            self._warn(f"{type(error).__name__}: {error}")
        _leave()

    def _open(self, config: dict) -> object:
        """Start the run, online if a key is known and the server answers, otherwise offline."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it may hang at exit to send them
        logging.raiseExceptions = False  # or wandb's log file prints tracebacks on a full disk
        import wandb  # takes a second, and not everyone has it

        project = os.environ.get("WANDB_PROJECT", "emnist")
        start = partial(wandb.init, project=project, id=self.run_id, resume="allow", config=config)
        failure = None
        chosen = self._set_up(wandb).settings.mode != "online" or "WANDB_MODE" in os.environ
        try:
            known = chosen or wandb.login(prompt=False, verify=False)
            run = start(mode=None if known else "offline")
        except wandb.Error as error:
            if chosen:
                raise
            failure = error
            wandb.teardown()  # frees the run's id
            self._set_up(wandb)
            run = start(mode="offline")
        if run.disabled:
            return run
        for name, axis in LOG_AXES.items():
            run.define_metric(name, step_metric=axis)

        self._folder = Path(run.dir).parent
        if failure:
            self._warn(f"logging offline: {failure}")
        elif run.offline:
            say(f"wandb: logging offline; send it with: wandb sync {self._folder}")
        else:
            say(f"wandb: {run.url}")
        return run

    def _set_up(self, wandb: object) -> object:
        """Start wandb's service: silent, so that it never asks, and its patience within ours."""
        settings = wandb.Settings(silent=True, console="off", finish_timeout_raises=True)
        settings.init_timeout, settings.finish_timeout = self._limit / 3, self._limit / 2
        self._session = wandb.setup(settings)
        return self._session


def _leave() -> None:
    """End wandb's service; if that hangs it does so here, not at the interpreter's exit."""
    with suppress(BaseException):
        import wandb

        wandb.teardown()


def _log_results(run: object, figures: dict, confusion: list[list[int]], weights: Path) -> None:
    import wandb

    columns = ["Actual", "Predicted", "nPredictions"]
    rows = [
        [actual, predicted, int(count)]
        for actual, counts in zip(ALPHABET, confusion, strict=True)
        for predicted, count in zip(ALPHABET, counts, strict=True)
    ]
    table = wandb.Table(columns=columns, data=rows)
    chart = wandb.plot_table("wandb/confusion_matrix/v1", table, {name: name for name in columns})
    run.log({"test/confusion": chart})
    run.summary.update({f"test/{name}": value for name, value in figures.items()})
    artifact = wandb.Artifact("emnist-cnn", type="model")
    artifact.add_file(str(weights), name="model.pt")
    run.log_artifact(artifact)


# The loop


class Stop:
    """Remembers a polite request to end (SIGTERM, Ctrl-C), that a checkpoint may be written first.

    A second one, and one that comes before the training has begun, is obeyed at once.
    """

    def __init__(self) -> None:
        self.signal, self.training = 0, False

    def __call__(self, number: int, frame: object) -> None:
        at_once = self.signal or not self.training
        self.signal = number
        if at_once:
            raise KeyboardInterrupt


def batches(run: Run, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what is left of this epoch: augmented pictures (B, 1, 28, 28) and labels (B,).

    Every rank draws the same order and takes its share of each global batch. A GPU augments
    several batches at once, to launch fewer kernels. Random numbers are seeded anew for each such
    chunk from seed, rank and step, so that a run resumed at any step goes on with the same batches;
    on the CPU, whose chunks are one batch, with the same dropout too.
    """
    config, ranks = run.config, run.ranks
    epoch, position = divmod(run.step, run.steps_per_epoch)
    generator = torch.Generator().manual_seed(hash((config.seed, epoch)))
    order = torch.randperm(len(split.labels), generator=generator).to(ranks.device)
    order = order[: run.steps_per_epoch * config.batch_size]
    order = order.view(run.steps_per_epoch, ranks.world, -1)[:, ranks.rank]  # (steps, B)
    for start in range(position - position % run.chunk, run.steps_per_epoch, run.chunk):
        torch.manual_seed(hash((config.seed, ranks.rank, epoch, start)))
        rows = order[start : start + run.chunk]
        images = augment(split.images[rows.flatten()], config.augment)
        images = images.to(memory_format=torch.channels_last)
        chunk = zip(images.split(rows.shape[1]), split.labels[rows], strict=True)
        yield from islice(chunk, max(0, position - start), None)


def take_step(run: Run, images: Tensor, labels: Tensor) -> None:
    """Forward, backward, one step of the optimizer, all without waiting for the device."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.steps, run.config)
    loss = run.backward(images, labels)
    run.optimizer.step()
    run.losses[run.step % run.steps_per_epoch] = loss
    run.step += 1
    run.update_average()


class DivergenceError(SharedError):
    """The loss, the weights or the answers are no longer finite."""

    def __init__(self, what: str, step: int, run: Run) -> None:
        rate = learning_rate(step, run.steps, run.config)
        super().__init__(f"{what} at step {step}, learning rate {rate:.3g}")


class InterruptedTraining(Exception):  # noqa: N818 (nothing went wrong)
    """A signal asked the training to end; its number is the argument."""


class Checkpoints:
    """Two generations of a run's state beside the weights file: the newest and the one before."""

    def __init__(self, out: Path) -> None:
        self.out = out
        stem = out.name.removesuffix(".pt")
        self.newest = out.with_name(f"{stem}.checkpoint.pt")
        self.previous = out.with_name(f"{stem}.checkpoint.previous.pt")
        self.both = out.with_name(f"{stem}.checkpoint*.pt")
        self.rescued = out.with_name(f"{stem}.rescued.pt")  # weights, after a divergence
        self.due = time.monotonic() + CHECKPOINT_SECONDS

    @property
    def kept(self) -> list[Path]:
        return [path for path in (self.newest, self.previous) if path.exists()]

    def require_none(self) -> None:
        """Raise SharedError if there are any: a training anew would write over them."""
        if kept := self.kept:
            raise SharedError(
                f"--out {self.out}: a training was cut short at {_how_far(kept[0])}: --resume goes "
                f"on with it; to train anew, delete {self.both}"
            )

    def save(self, run: Run) -> None:
        """Write the state; a disk that is full costs a warning, not the training."""
        if not run.ranks.first:
            return
        self._sweep()
        try:
            if self.newest.exists():
                os.replace(self.newest, self.previous)
            CNN.write_atomically(run.state(), self.newest)
        except OSError as error:
            say(f"warning: no checkpoint at step {run.step}: {self.newest}: {error.strerror}")
        self.due = time.monotonic() + CHECKPOINT_SECONDS

    def restore(self, run: Run) -> None:
        """Set the run to the newest state that can be read. Raises SharedError if none can."""
        if not (kept := self.kept):
            say(f"--resume: no checkpoint at {self.newest}: training from step 0")
            return
        for path in kept:
            try:
                state = _read_checkpoint(path, run.ranks.device)
                changed = _differences(state["settings"], bound_settings(run.config))
                if not changed and len(state["losses"]) != run.steps_per_epoch:
                    changed = f"other --data, of {len(state['losses'])} steps per epoch"
                if not changed:
                    run.restore(state)
            except Exception as error:  # whatever reading damaged bytes may raise
                say(f"warning: {path} is damaged ({_first_line(error)})")
                continue
            if changed:
                raise SharedError(
                    f"--resume: {path} was made with {changed}: pass the same settings"
                )
            say(f"going on from {path}, step {run.step:,} of {run.steps:,}")
            if path == self.previous and run.ranks.first:
                self.newest.unlink(missing_ok=True)  # or the next one would put it over the good
            return
        raise SharedError(f"--resume: no sound checkpoint: to train anew, delete {self.both}")

    def remove(self) -> None:
        """Forget the checkpoints of a training that is done."""
        self._sweep()
        for path in (self.newest, self.previous):
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what a process killed while it wrote has left."""
        for name in (self.out.name, self.newest.name):
            for part in self.out.parent.glob(f".{glob.escape(name)}.*.part"):
                part.unlink(missing_ok=True)


def _read_checkpoint(path: Path, device: torch.device) -> dict:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load compares no checksums
            raise ValueError(f"{damaged} is not as it was written")
    return torch.load(path, map_location=device, weights_only=True)


def _how_far(checkpoint: Path) -> str:
    try:
        state = _read_checkpoint(checkpoint, torch.device("cpu"))
        steps = state["settings"]["epochs"] * len(state["losses"])
        return f"step {state['step']:,} of {steps:,}"
    except Exception:  # whatever reading damaged bytes may raise
        return "a step that can't be read"


def _differences(theirs: dict, ours: dict) -> str:
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"--{n.replace('_', '-')} {theirs.get(n)}, not {ours[n]}" for n in names)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class Progress:
    """What people see while the net learns: a bar on a terminal, the loss curve in the log."""

    def __init__(self, run: Run, log: Log) -> None:
        self.run, self.log, self.reported = run, log, run.step
        silent = not (run.ranks.first and sys.stderr.isatty())
        self.bar = tqdm(total=0, unit="pictures", unit_scale=True, leave=False, disable=silent)

    def start_epoch(self) -> None:
        run = self.run
        self.first, self.began = run.step, time.monotonic()  # what this process takes of the epoch
        batch, epoch = run.config.batch_size, run.step // run.steps_per_epoch + 1
        self.bar.reset(run.steps_per_epoch * batch)
        self.bar.update(run.step % run.steps_per_epoch * batch)
        self.bar.set_description(f"epoch {epoch}/{run.config.epochs}")

    def report(self) -> None:
        """Fetch the losses since the last report, show and log them.

        Raises DivergenceError unless they and the weights, that may be saved next, are finite.
        """
        run = self.run
        first = (run.step - 1) // run.steps_per_epoch * run.steps_per_epoch
        losses = run.losses[max(self.reported, first) - first : run.step - first].tolist()
        for step, loss in enumerate(losses, run.step - len(losses)):
            if not math.isfinite(loss):
                raise DivergenceError(f"the loss is {loss}", step, run)
            if step % REPORT_STEPS == 0:
                rate = learning_rate(step, run.steps, run.config)
                self.log.metrics(step, **{"train/loss": loss, "lr": rate})
        if not all(tensor.isfinite().all() for tensor in _floats(run.net)):
            raise DivergenceError("weights are not finite", run.step - 1, run)
        self.reported = run.step
        if losses:
            self.bar.set_postfix(loss=f"{losses[-1]:.3f}")


def train_epoch(
    run: Run, split: Split, progress: Progress, checkpoints: Checkpoints, stop: Stop
) -> None:
    """Take the steps that are left of this epoch. Raises InterruptedTraining when told to stop."""
    on_cpu = run.ranks.device.type == "cpu"
    end = (run.step // run.steps_per_epoch + 1) * run.steps_per_epoch
    run.net.train()
    progress.start_epoch()
    for images, labels in batches(run, split):
        take_step(run, images, labels)
        progress.bar.update(run.config.batch_size)
        stopping = must_stop(run, stop)
        saving = stopping or (run.ranks.first and time.monotonic() > checkpoints.due)
        if run.step == end or saving or (on_cpu and run.step % REPORT_STEPS == 0):
            progress.report()  # waits for the device: on a GPU, for the end of the epoch
        if run.step < end and saving:
            checkpoints.save(run)
        if run.step < end and stopping:
            raise InterruptedTraining(stop.signal)


def must_stop(run: Run, stop: Stop) -> bool:
    """Tell whether a signal came; ranks agree on it, or one would wait for another for ever."""
    if run.ranks.world == 1:
        return bool(stop.signal)
    if run.step % REPORT_STEPS:
        return False
    flag = torch.tensor(stop.signal, device=run.ranks.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    stop.signal = int(flag)
    return bool(stop.signal)


def finish_epoch(run: Run, validation: Split, progress: Progress) -> None:
    """Measure the averaged weights on validation and keep the best; say and log how it went."""
    seconds = time.monotonic() - progress.began
    speed = (run.step - progress.first) * run.config.batch_size / seconds
    logits = predict(run.average, validation.images, run.precision)
    if not logits.isfinite().all():
        raise DivergenceError("answers on validation are not finite", run.step - 1, run)
    figures = measure(logits, validation.labels)
    epoch = run.step // run.steps_per_epoch
    entry = {"epoch": epoch, "loss": run.losses.mean().item(), "seconds": seconds, **figures}
    if all(entry["nll"] < earlier["nll"] for earlier in run.history):
        run.best = {key: tensor.clone() for key, tensor in run.average.state_dict().items()}
    run.history.append(entry)
    say(
        f"epoch {epoch}/{run.config.epochs}: loss {entry['loss']:.4f}, "
        f"validation nll {figures['nll']:.4f}, {figures['accuracy']:.2f} % right, "
        f"{speed:,.0f} images/s"
    )
    values = {f"val/{name}": value for name, value in figures.items()}
    progress.log.metrics(run.step, epoch=epoch, **values, **{"images/s": speed})


def load_splits(config: Config, ranks: Ranks) -> tuple[Split, Split, Split]:
    """Return train, validation and test, resident on the device. Raises TrainingError."""
    if config.batch_size % ranks.world:
        raise SharedError(f"--batch-size {config.batch_size}: not shared by {ranks.world} evenly")
    if ranks.first:
        ensure_emnist(config.data)
    if ranks.world > 1:
        dist.barrier()
    train, validation = cut_validation(read_emnist(config.data, train=True))
    test = read_emnist(config.data, train=False)
    if len(train.labels) < config.batch_size:
        raise SharedError(f"--batch-size {config.batch_size}: only {len(train.labels)} pictures")
    splits = (train, validation, test)
    return tuple(Split(*(part.to(ranks.device) for part in split)) for split in splits)


def train(config: Config, stop: Stop | None = None) -> dict:
    """Train as the settings say, write the weights, return the figures of every epoch and of test.

    Returns {"history": per epoch, "validation": figures, "test": figures, "confusion": 36 rows};
    nothing on other ranks than the first and where --resume finds it done. Raises TrainingError,
    one line for the user, and InterruptedTraining, a checkpoint written, when `stop` got a signal.
    """
    stop = stop or Stop()
    ranks = join_ranks(config.device)
    check_writable(config.out)
    checkpoints = Checkpoints(config.out)
    if not config.resume:
        checkpoints.require_none()
    elif not checkpoints.kept and is_done(config):
        say(f"--resume: {config.out} is done; to train anew, leave --resume out")
        return {}
    training, validation, test = load_splits(config, ranks)
    run = Run(config, len(training.labels) // config.batch_size, ranks)
    if config.resume:
        checkpoints.restore(run)
    run.build()
    settings = {name: str(value) for name, value in asdict(config).items()}
    with closing(Log(config.wandb and ranks.first, settings, run.log_id)) as log:
        run.log_id = log.run_id
        progress = Progress(run, log)
        stop.training = True
        try:
            while run.step < run.steps:
                train_epoch(run, training, progress, checkpoints, stop)
                if ranks.first:
                    finish_epoch(run, validation, progress)
                checkpoints.save(run)
        except DivergenceError as error:
            raise SharedError(f"{error}; {rescue(run, validation, test, checkpoints)}") from None
        progress.bar.close()
        if not ranks.first:
            return {}
        results = finish(run, validation, test, config.out)
        log.finish(results["test"], results["confusion"], config.out)
    checkpoints.remove()
    return results


def check_writable(out: Path) -> None:
    """Find out before the training whether the weights can be written after it."""
    try:
        folder = os.path.dirname(os.path.realpath(out))
        with tempfile.TemporaryFile(dir=folder):  # nameless: a kill leaves nothing
            pass
    except OSError as error:
        raise TrainingError(f"--out {out}: {error.strerror}: choose a folder to write to") from None
    if out.exists() and not out.is_file():
        raise TrainingError(f"--out {out}: is no regular file, expected the name of one")


def is_done(config: Config) -> bool:
    """Tell whether a training with these settings has written the weights file."""
    try:
        return CNN.load(config.out).figures.get("settings") == bound_settings(config)
    except (OSError, ValueError):
        return False


def finish(run: Run, validation: Split, test: Split, out: Path) -> dict:
    """Calibrate the best weights on validation, read test, write the weights file."""
    net = run.average
    net.load_state_dict(run.best)
    logits = predict(net, validation.images, run.precision)
    net.temperature = calibrate(logits, validation.labels)
    net.lookalikes = find_lookalikes(confuse(logits, validation.labels))
    figures = {"validation": measure(logits / net.temperature, validation.labels)}
    logits = predict(net, test.images, run.precision)
    figures["test"] = measure(logits / net.temperature, test.labels)
    net.figures = dict(figures)
    if len(run.history) == run.config.epochs:
        net.figures["settings"] = bound_settings(run.config)  # by them is_done knows a whole run
    try:
        CNN.save(net, out)
    except OSError as error:
        reason = f"--out {out}: {error.strerror}"
        raise TrainingError(f"{reason}: make room, then --resume writes it") from error
    confusion = confuse(logits, test.labels)
    return {**figures, "history": run.history, "confusion": confusion.tolist()}


def rescue(run: Run, validation: Split, test: Split, checkpoints: Checkpoints) -> str:
    """Write the best weights of a training that diverged; say where, and what to do now."""
    found = "no epoch was finished"
    if run.best:
        finish(run, validation, test, checkpoints.rescued)
        best = min(run.history, key=lambda entry: entry["nll"])
        found = f"{checkpoints.rescued} has the weights of epoch {best['epoch']}"
    delete = f"delete {checkpoints.both} and " if checkpoints.kept else ""
    return f"{found}: {delete}train anew with a lower --lr"


FIGURES = {  # of `measure`, in words
    "accuracy": "all, % right",
    "digits": "digits, % right",
    "letters": "letters, % right",
    "classes": "mean over classes, % right",
    "digits_known": "digits, when only digits can be answered",
    "letters_known": "letters, when only letters can be answered",
    "nll": "negative log-likelihood, nats",
    "ece": "expected calibration error",
}


def format_results(results: dict) -> str:
    """Return the closing table and the ten most frequent confusions, as lines of text."""
    lines = [f"{'':<44}{'validation':>10}{'test':>10}"]
    for name, text in FIGURES.items():
        digits = 4 if name in ("nll", "ece") else 2
        values = (results[split][name] for split in ("validation", "test"))
        lines.append(f"{text:<44}" + "".join(f"{value:>10.{digits}f}" for value in values))
    worst = worst_confusions(torch.tensor(results["confusion"]))
    pairs = ", ".join(f"{truth}>{answer} {count}" for truth, answer, count in worst)
    lines.append(f"most frequent confusions on test, truth>answer: {pairs}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; return the exit status."""
    if sys.stderr is None:  # closed by whoever started this
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the end
    config, stop = parse(argv), Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        results = train(config, stop)
        if results:
            print(format_results(results), flush=True)
            say(f"wrote {config.out}")
    except InterruptedTraining as interrupted:
        say("stopped at your request; go on with the same command and --resume")
        return 128 + interrupted.args[0]
    except KeyboardInterrupt:
        return 128 + stop.signal
    except (TrainingError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = f"out of GPU memory: try a --batch-size below {config.batch_size}"
        say(f"train.py: error: {error}")
        if _rank() > 0 and not isinstance(error, SharedError):
            print(f"train.py: rank {_rank()}: error: {error}", file=sys.stderr)
        return 1
    except torch._dynamo.exc.TorchDynamoException as error:  # such as no C++ compiler there
        say(f"train.py: error: the step can't be compiled: {_first_line(error)}: try --no-compile")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
