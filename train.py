"""Train the net on EMNIST's digits and letters, merged into 36 classes, and write model.pt.

    python3 train.py                                 # a GPU box, a laptop: what is there is used
    python3 train.py --resume                        # go on after a crash or preemption, or start
    torchrun --nproc-per-node 4 train.py             # several GPUs, the same global batch

Expect about 94 % right on test after a minute on a GPU of a data centre, or an hour or two on two
CPU cores. Progress goes to stderr, the table of results to stdout. Validation, cut from train,
chooses the epoch, by NLL; test is read once, at the end.
"""

import argparse
import csv
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import EMNIST
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

import CNN
import picture
from CNN import ALPHABET, SIZE, Net, Split
from picture import escaped

# Settings

FLAG = argparse.BooleanOptionalAction
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
}


def setting(default: object, text: str, between: tuple | None = None, **argument: object) -> object:
    """Make a field of Config: default, help, range (ends included), argparse's arguments."""
    return field(default=default, metadata={"between": between, "help": text, **argument})


@dataclass(frozen=True)
class Config:
    """Every setting of a run: its default, type, range and help stand here and nowhere else."""

    arch: str = setting("default", "net", choices=CNN.ARCHITECTURES)
    epochs: int = setting(20, "passes over the training images", (1, 1e6))
    batch_size: int = setting(512, "images per step, over all ranks of torchrun", (2, 1e6))
    optimizer: str = setting("adamw", "optimizer", choices=list(OPTIMIZERS))
    lr: float = setting(3e-3, "highest learning rate", (1e-12, 1e36))
    weight_decay: float = setting(0.05, "weight decay", (0, 1e6))
    warmup: int = setting(500, "steps of the warm-up stage", (0, 1e9))
    schedule: str = setting("cosine", "course of the learning rate", choices=["cosine", "constant"])
    dropout: float = setting(CNN.DROPOUT, "dropout probability", (0, 0.9))
    augment: str = setting("warp,stroke,resolution,tone", "augmentations, by comma, or none")
    outliers: float = setting(0.05, "fraction of images of no character, added", (0, 0.5))
    ema: float = setting(0.999, "decay of the moving average of weights; 0: none", (0, 0.999999))
    xavier: bool = setting(True, "Xavier initialisation rather than torch's own", action=FLAG)
    precision: str = setting("auto", "arithmetic", choices=["auto", "float32", "bfloat16"])
    seed: int = setting(0, "of all random numbers: the CPU repeats a run with it", (0, 2**62))
    init: Path = setting(None, "weights file to start from, with its net")
    extra: Path = setting(None, "extra images: folders named by character, or a csv of paths")
    extra_fraction: float = setting(0.125, "fraction of extra images in a batch", (0, 0.5))
    data: Path = setting(Path("data"), "folder of EMNIST, downloaded there when absent")
    out: Path = setting(Path("model.pt"), "weights file to write")
    device: str = setting("auto", "cpu, cuda, cuda:1, …; auto: cuda where there is one")
    compile: bool | None = setting(None, "compile the step; by default on a GPU only", action=FLAG)
    wandb: bool = setting(True, "log to Weights & Biases", action=FLAG)
    resume: bool = setting(False, "go on from the checkpoint beside --out, or start", action=FLAG)

    @property
    def checkpoint(self) -> Path:
        return self.out.with_name(self.out.name.removesuffix(".pt") + ".checkpoint.pt")

    @property
    def recipe(self) -> dict[str, object]:
        """Return the settings that decide the result; --resume must find them unchanged."""
        values = asdict(self)
        for name in ("data", "out", "device", "compile", "wandb", "resume"):
            del values[name]
        return values | {"init": str(self.init), "extra": str(self.extra)}


def parse(argv: list[str] | None = None) -> Config:
    """Turn a command line into a Config, exiting with 2 and a usage line when it is wrong."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    for entry in fields(Config):
        argument = {"default": entry.default, **entry.metadata}
        del argument["between"]
        if "action" not in argument:
            argument["type"] = entry.type
        parser.add_argument("--" + entry.name.replace("_", "-"), **argument)
    config = Config(**vars(parser.parse_args(argv)))
    for entry in fields(Config):
        value = getattr(config, entry.name)
        between = entry.metadata["between"]
        if between and not between[0] <= value <= between[1]:
            flag = entry.name.replace("_", "-")
            parser.error(f"--{flag} {value}: expected {between[0]:g} to {between[1]:g}")
    if config.augment != "none" and not set(config.augment.split(",")) <= set(AUGMENTATIONS):
        parser.error(f"--augment {config.augment}: expected none or some of {[*AUGMENTATIONS]}")
    return config


# The machine, and messages

DOWNLOAD_LIMIT = timedelta(hours=2)  # that the other ranks wait for the first
RANK_PATIENCE = 10  # seconds that other ranks leave it to the first to say what ends them all


class Machine(NamedTuple):
    """What this process computes with, and its place among those that torchrun started."""

    device: torch.device
    precision: torch.dtype
    rank: int = 0
    world: int = 1  # world size: the number of ranks


def set_up(config: Config) -> Machine:
    """Choose device and arithmetic and, under torchrun, join the other ranks."""
    try:
        device = CNN.choose_device(config.device)
    except ValueError as error:
        fail(f"--device {config.device}", error, "try --device cpu")
    is_auto = config.precision == "auto"
    precision = CNN.mixed_precision(device) if is_auto else getattr(torch, config.precision)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Machine(device, precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # NCCL wants a GPU for each rank; one that is named by its number is shared by all
    own_gpu = device.type == "cuda" and ":" not in config.device
    dist.init_process_group("nccl" if own_gpu else "gloo", timeout=DOWNLOAD_LIMIT)
    return Machine(device, precision, dist.get_rank(), dist.get_world_size())


def say(line: str) -> None:
    """Write a line for people, above the progress bar; of all ranks, the first."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(escaped(line), file=sys.stderr)


def first_line(error: BaseException | str) -> str:
    return str(error).strip().partition("\n")[0]


def fail(what: str, error: BaseException | str, remedy: str) -> NoReturn:
    """End the run with one line for the user: what, why, what to do.

    What ends one rank mostly ends all: the others leave it to the first of their computer to say
    it, and torchrun ends them when that one has ended.
    """
    if CNN.local_rank() > 0:
        time.sleep(RANK_PATIENCE)
    reason = first_line(error)[:200] or type(error).__name__
    raise SystemExit(escaped(f"train.py: error: {what}: {reason}: {remedy}"))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, the device's or the host's: torch has no type for the latter."""
    has_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return has_type or "can't allocate memory" in str(error)


# Data

VALIDATION_ONE_IN = 20  # about 5 % of train
DOWNLOAD_PATIENCE = 30  # seconds without a byte; torchvision would wait for ever


def ensure_emnist(root: Path) -> None:
    """Let torchvision download and unpack EMNIST, unless its digits and letters are there.

    All lies in root/EMNIST/raw. A whole gzip.zip that somebody put there is not downloaded again.
    """
    raw = root / "EMNIST" / "raw"
    if len(list(raw.glob("emnist-[dl]*-ubyte"))) == 8:
        return
    archive = raw / "gzip.zip"
    if archive.exists() and not check_integrity(archive, EMNIST.md5):
        say(f"{archive} is damaged or incomplete: it is downloaded again")
    say(f"EMNIST is not in {raw} yet: {EMNIST.url}, 562 MB")
    socket.setdefaulttimeout(DOWNLOAD_PATIENCE)
    for split in ("digits", "letters"):
        EMNIST(root, split=split, train=True, download=True)
        EMNIST(root, split=split, train=False, download=True)
    for path in raw.glob("emnist-[bm]*-ubyte"):  # the other splits, 1.4 GB
        path.unlink()


def read_emnist(root: Path, train: bool) -> Split:
    """Merge EMNIST's digits and letters: its images turned upright, its letters after 9."""
    digits = EMNIST(root, split="digits", train=train)
    letters = EMNIST(root, split="letters", train=train)
    images = torch.cat([digits.data, letters.data]).transpose(1, 2).contiguous()
    labels = torch.cat([digits.targets, letters.targets + 9])  # EMNIST's letters are 1 to 26
    return Split(images, labels)


def held_out(images: Tensor) -> Tensor:
    """Say which images (N, 28, 28) uint8 are for validation: (N,) bool, some 5 %.

    A hash of the pixels decides, so that copies of an image (the sample of EMNIST repeats some)
    end on the same side, whatever their order. It is the sum of the image's 98 words of 8 bytes
    times fixed random odd numbers, modulo 2^64. Extra images are not cut: all are for training.
    """
    words = images.flatten(1).view(torch.int64)  # (N, 98)
    generator = torch.Generator().manual_seed(20170217)  # any constant: the cut must never change
    factors = torch.randint(2**62, (words.shape[1],), generator=generator) * 2 + 1
    return ((words * factors).sum(1) >> 32) % VALIDATION_ONE_IN == 0


def load_splits(config: Config, machine: Machine) -> tuple[Split, ...]:
    """Return train, validation and test, resident on the device."""
    size = f"--batch-size {config.batch_size}"
    if config.batch_size % machine.world or config.batch_size < 2 * machine.world:
        fail(size, f"{machine.world} ranks", "choose one that they can share, two each at least")
    extra = read_extra(config.extra) if config.extra else None
    try:
        if machine.rank == 0:
            ensure_emnist(config.data)
        if machine.world > 1:
            dist.barrier()
        both = read_emnist(config.data, train=True)
        test = read_emnist(config.data, train=False)
    except Exception as error:  # whatever network, disk and damaged files may bring
        if is_out_of_memory(error):
            raise
        raw = config.data / "EMNIST" / "raw"
        remedy = f"delete all but gzip.zip in {raw} and start again; "
        remedy += f"without a network, put {EMNIST.url} (562 MB) there first"
        fail(f"no EMNIST in {config.data}", error, remedy)

    held = held_out(both.images)
    training = Split(both.images[~held], both.labels[~held])
    validation = Split(both.images[held], both.labels[held])
    if config.batch_size > len(training.labels):
        fail(size, f"{len(training.labels)} images", "choose a smaller one")
    if extra:
        images = torch.cat([training.images, extra.images])
        training = Split(images, torch.cat([training.labels, extra.labels]), extra.writers)
    splits = (training, validation, test)
    return tuple(Split(x.to(machine.device), y.to(machine.device), n) for x, y, n in splits)


def read_extra(source: Path) -> Split:
    """Return the extra images: pictures of any kind, fitted, with labels and writers.

    One that can't be read costs a line; what is no class is passed over.
    """
    images = []
    labels = []
    writers = []
    others: Counter[str] = Counter()
    for path, character, writer in list_extra(source):
        if character.upper() not in list(ALPHABET):
            others[character] += 1
            continue
        try:
            images.append(torch.from_numpy(picture.prepare(path, SIZE)))
        except ValueError as error:
            say(f"--extra: left out: {path}: {error}")
            continue
        labels.append(ALPHABET.index(character.upper()))
        writers.append(writer)
    if others:
        listed = ", ".join(f"'{name}' ({count})" for name, count in others.items())
        say(f"--extra {source}: passed over, as no class of 0-9 and A-Z: {listed}")
    if not images:
        remedy = "put them into folders, as in A/any_name.png, or a row of the csv for each"
        fail(f"--extra {source}", "no pictures of a class that can be read", remedy)
    return Split(torch.stack(images), torch.tensor(labels), tuple(writers))


def list_extra(source: Path) -> Iterator[tuple[str, str, str]]:
    """Yield path, character and writer, "" where not known, of each extra picture.

    source: a folder of folders named by character, as torchvision's ImageFolder has them, or a csv
    of path,character, as the page of inference.py --report saves corrections, or with a column
    writer: from those it is learnt how writers differ. Paths in it may be any bytes.
    """
    if source.is_dir():
        for path in sorted(source.glob("[!.]*/[!.]*")):
            yield str(path), path.parent.name, ""
        return
    try:
        with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            for row in csv.DictReader(file, restval=""):
                path = row["path"]
                if not os.path.exists(path):
                    path = path.replace("\\", "/")  # as Windows has it
                yield path, row["character"], row.get("writer", "")
    except (OSError, KeyError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        fail(f"--extra {source}", reason, "give a csv, by comma, in UTF-8, headed path,character")


# Batches

CHUNK_STEPS = 16  # batches that a GPU augments at once: to launch 270 kernels for each would take
# Python longer than an H100 takes for the step, 1.3 ms


def extra_per_batch(split: Split, config: Config) -> int:
    """Return how many images of each batch are extra ones."""
    return math.ceil(config.batch_size * config.extra_fraction) if split.writers else 0


def steps_per_epoch(split: Split, config: Config) -> int:
    """Return how many whole batches EMNIST's images make, with the extra ones beside them."""
    return split.emnist_count // (config.batch_size - extra_per_batch(split, config))


def draw_epoch(split: Split, epoch: int, config: Config) -> Tensor:
    """Return the rows of a split in each batch of an epoch, (steps, B).

    EMNIST's images come once each, in random order. The extra images are drawn anew for each batch
    and stand first: the first half of a batch is what gets augmented.
    """
    generator = torch.Generator().manual_seed(hash((config.seed, epoch)))
    steps = steps_per_epoch(split, config)
    extra_size = extra_per_batch(split, config)
    emnist_size = config.batch_size - extra_size
    order = torch.randperm(split.emnist_count, generator=generator)[: steps * emnist_size]
    rows = order.view(steps, emnist_size)
    if extra_size:
        size = (steps, extra_size)
        extra_rows = torch.randint(split.emnist_count, len(split.labels), size, generator=generator)
        rows = torch.cat([extra_rows, rows], dim=1)
    return rows


def batches(split: Split, step: int, config: Config, machine: Machine) -> Iterator[tuple]:
    """Yield the batches from `step` on: images (B + outliers, 1, 28, 28) and labels (B,).

    The rows of a batch are extra images, EMNIST's, and outliers, which have no labels. The first
    half of the labelled ones is augmented, so that all extra images are, the second half is not.
    Each rank takes every n-th row of a global batch, so that it has its part of every kind. Random
    numbers are seeded anew for each chunk of batches: a resumed run makes its first chunk from the
    start, goes on with the same ones and, on the CPU, with the same dropout.
    """
    chunk_steps = CHUNK_STEPS if machine.device.type == "cuda" else 1
    per_epoch = steps_per_epoch(split, config)
    for epoch in range(step // per_epoch, config.epochs):
        order = draw_epoch(split, epoch, config)[:, machine.rank :: machine.world]
        order = order.to(machine.device)
        start = max(0, step - epoch * per_epoch)
        for first in range(start - start % chunk_steps, per_epoch, chunk_steps):
            rows = order[first : first + chunk_steps]  # (steps, B)
            torch.manual_seed(hash((config.seed, machine.rank, epoch, first)))
            labels = split.labels[rows]
            images = make_batches(split.images[rows], labels, config.augment, config.outliers)
            for i in range(max(0, start - first), len(rows)):
                yield images[i].contiguous(memory_format=torch.channels_last), labels[i]


def make_batches(images: Tensor, labels: Tensor, names: str, outlier_fraction: float) -> Tensor:
    """Augment the first half of some batches and append outliers to them.

    images: (S, B, 28, 28) uint8 of S batches; labels: (S, B); names: of the augmentations. Returns
    (S, B + outliers, 1, 28, 28) in [0, 1]. The second half stays as it is: there the net may use
    what the augmentations destroy, the small differences between the 0 and the O of EMNIST's
    writers.
    """
    steps, size = labels.shape
    images = images.unsqueeze(2).float() / 255  # (S, B, 1, 28, 28)
    augmented = augment(images[:, : size // 2].flatten(0, 1), names)
    parts = [augmented.unflatten(0, (steps, -1)), images[:, size // 2 :]]
    count = round(size * outlier_fraction)
    if count:
        outliers = make_outliers(images.flatten(0, 1), labels.flatten(), steps * count)
        # The outliers come kind by kind: the i-th goes to batch i % steps, so each has every kind
        parts.append(outliers.unflatten(0, (count, steps)).transpose(0, 1))
    return torch.cat(parts, dim=1)


# Augmentations: pure functions of images (N, 1, 28, 28) in [0, 1] to as many of the same form. To
# add one, write it here and name it in AUGMENTATIONS and, for the default, in Config.augment

# How far they go, chosen on validation and on the field sets together
WARP_ANGLE = math.radians(15)
WARP_SHEAR = 0.25
WARP_SCALE = 0.15  # of the logarithm: size and aspect, each
WARP_SHIFT = 2.0  # px
WARP_BEND = 0.8  # px, standard deviation at the knots of the bend
COARSE_SIZES = [(7, 7), (8, 8), (10, 10), (12, 12), (14, 14), (16, 8), (9, 14)]  # px, height, width


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw one number per image, shaped (N, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def pick(images: Tensor, *fractions: float) -> tuple[Tensor, ...]:
    """Draw the rows of disjoint random parts of the images, one as large as each fraction."""
    sizes = [round(fraction * len(images)) for fraction in fractions]
    return torch.randperm(len(images), device=images.device)[: sum(sizes)].split(sizes)


def warp(images: Tensor) -> Tensor:
    """Rotate, scale, stretch, shear and shift, with a smooth elastic displacement on top."""
    n = len(images)
    device = images.device
    pixel = 2 / SIZE  # the unit is half a side
    angle, shear, scale, stretch, right, down = torch.rand(6, n, device=device) * 2 - 1  # (N,) each
    cos = torch.cos(angle * WARP_ANGLE)
    sin = torch.sin(angle * WARP_ANGLE)
    shear = shear * WARP_SHEAR
    shift = WARP_SHIFT * pixel
    across = torch.exp((scale + stretch) * WARP_SCALE)
    along = torch.exp((scale - stretch) * WARP_SCALE)
    row_x = torch.stack([across * cos, across * (shear * cos - sin), right * shift], 1)
    row_y = torch.stack([along * sin, along * (shear * sin + cos), down * shift], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), images.shape, align_corners=False)
    knots = torch.randn(n, 2, 5, 5, device=device) * (WARP_BEND * pixel)
    bend = F.interpolate(knots, (SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1)
    return F.grid_sample(images, grid + bend, align_corners=False)  # (N, 28, 28, 2) the grid


def stroke(images: Tensor) -> Tensor:
    """Thin a third of the images, thicken another, by grey morphology, each by its own amount."""
    images = images.clone()
    thinned, thickened = pick(images, 1 / 3, 1 / 3)
    paper = 1 - images[thinned]
    spread = F.max_pool2d(paper, 3, stride=1, padding=1)
    images[thinned] = 1 - torch.lerp(paper, spread, uniform(paper, 0, 0.9))
    ink = images[thickened]
    spread = F.max_pool2d(ink, 3, stride=1, padding=1)
    images[thickened] = torch.lerp(ink, spread, uniform(ink, 0, 1))
    return images


def resolution(images: Tensor) -> Tensor:
    """Take a quarter of the images down to a few pixels and back: thumbnails, coarse scans."""
    images = images.clone()
    fractions = [1 / 4 / len(COARSE_SIZES)] * len(COARSE_SIZES)
    for size, chosen in zip(COARSE_SIZES, pick(images, *fractions), strict=True):
        coarse = F.interpolate(images[chosen], size, mode="bilinear", antialias=True)
        images[chosen] = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return images


def tone(images: Tensor) -> Tensor:
    """Blur, bend the contrast, add grain, each to its own random part of the images."""
    images = images.clone()
    (chosen,) = pick(images, 1 / 4)
    sharp = images[chosen]
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1)
    images[chosen] = torch.lerp(sharp, blurred, uniform(sharp, 0, 1))
    (chosen,) = pick(images, 1 / 3)
    plain = images[chosen]
    images[chosen] = plain.clamp(1e-6) ** torch.exp(uniform(plain, -0.7, 0.7))
    (chosen,) = pick(images, 1 / 5)
    images[chosen] += torch.randn_like(images[chosen]) * uniform(images[chosen], 0, 0.12)
    return images.clamp(0, 1)


AUGMENTATIONS = {function.__name__: function for function in (warp, stroke, resolution, tone)}


def augment(images: Tensor, names: str) -> Tensor:
    """Apply augmentations, given by their names and commas, or none.

    The ink of each is brought back to a maximum of 1, as EMNIST's images and fitted ones have it.
    """
    if names == "none":
        return images
    for name in names.split(","):
        images = AUGMENTATIONS[name](images)
    return images / images.amax((1, 2, 3), keepdim=True).clamp(min=0.1)


# Outliers: images of what is no character

PEN_WIDTH = 2.3  # px, of EMNIST's strokes, the median
# Outliers of two characters take different shapes, as an E over an F looks like an E, and none of
# the first, lines, as an I beside another character looks like a third.
TRIES = 16  # nearly always enough: some 7 in 10 will do
SHAPES = ["1IL", "0OQDCG6", "2Z79AJTY4X", "5S8B3", "EFPRKH", "UVWMN"]


def make_outliers(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """Make outliers (count, 1, 28, 28) of random images (N, 1, 28, 28), as large as fitted ones.

    Source: outlier exposure, Hendrycks et al. 2019, arXiv 1812.04606.
    """
    # A fifth of the pairs goes into each kind of outlier
    rows, other_rows = draw_pairs(labels, count)
    left, under, before, whole, _ = images[rows].tensor_split(5)
    right, over, after, _, empty = images[other_rows].tensor_split(5)
    device = images.device

    # Two side by side: bold ones, narrowed
    height = 0.45 + 0.3 * torch.rand(len(left), 1, 1, device=device)
    shift = 0.4 + 0.1 * torch.rand(len(left), 1, 1, device=device)
    left = squeeze(F.max_pool2d(left, 3, stride=1, padding=1), 0.45, height, -shift)
    right = squeeze(F.max_pool2d(right, 3, stride=1, padding=1), 0.45, height, shift)
    beside = torch.maximum(left, right)
    # One over the other
    overwritten = torch.maximum(under, over)
    # The right half of one and the left half of the next, as a bad crop has them
    halves = torch.cat([before[..., SIZE // 2 :], after[..., : SIZE // 2]], dim=3)
    cropped = squeeze(halves, 0.85, 0.85, 0)
    # One struck out by four lines from side to side
    corners = torch.rand(len(whole), 5, 2, device=device) * 1.5 - 0.75
    corners[:, :, 0] = 0.4 + corners[:, :, 0].abs() / 2
    corners[:, 1::2, 0] *= -1
    struck_out = torch.maximum(whole, draw_strokes(corners))
    # A scribble: a curve through twelve points
    points = torch.rand(len(empty), 2, 1, 12, device=device) * 1.7 - 0.85
    curve = F.interpolate(points, (1, 48), mode="bicubic").squeeze(2)  # (N, 2, 48)
    scribble = draw_strokes(curve.transpose(1, 2))
    return torch.cat([beside, overwritten, cropped, struck_out, scribble])


def draw_pairs(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of characters of different shapes, no lines: two tensors of rows, (count,) each.

    The first of TRIES that will do is taken; where none will, as in a small batch of one shape,
    any.
    """
    shape_of = torch.empty(len(ALPHABET), dtype=torch.int64)
    for shape, characters in enumerate(SHAPES):
        shape_of[[ALPHABET.index(character) for character in characters]] = shape
    shapes = shape_of.to(labels.device)[labels]  # (N,), 0: a line
    tries, other_tries = torch.randint(len(labels), (2, count, TRIES), device=labels.device)
    will_do = (shapes[tries] > 0).int()
    rows = tries.gather(1, will_do.argmax(1, keepdim=True))  # (count, 1): the first 1, or the first
    other_shapes = shapes[other_tries]
    will_do = ((other_shapes > 0) & (other_shapes != shapes[rows])).int()
    other_rows = other_tries.gather(1, will_do.argmax(1, keepdim=True))
    return rows[:, 0], other_rows[:, 0]


def squeeze(images: Tensor, width: float, height: Tensor | float, shift: Tensor | float) -> Tensor:
    """Scale images by width and height, then move them right by `shift` half sides.

    height and shift are numbers, or of each image its own (N, 1, 1).
    """
    centres = pixel_centres(images.device)
    x = (centres - shift) / width  # where a pixel comes from
    y = centres[:, None] / height
    shape = (len(images), SIZE, SIZE)
    grid = torch.stack([x.expand(shape), y.expand(shape)], dim=3)
    return F.grid_sample(images, grid, align_corners=False)


def draw_strokes(points: Tensor) -> Tensor:
    """Draw lines through points (N, P, 2), x and y from -1 to 1, with a pen: (N, 1, 28, 28)."""
    centres = pixel_centres(points.device)
    pixels = torch.cartesian_prod(centres, centres).flip(1)  # (784, x and y)
    along = points.diff(dim=1)[:, None]  # (N, 1, P - 1, 2)
    offset = pixels[:, None] - points[:, None, :-1]  # (N, 784, P - 1, 2)
    part = (offset * along).sum(3) / along.square().sum(3).clamp(min=1e-6)  # of the way along
    offset = offset - part.clamp(0, 1)[..., None] * along  # from the nearest point of a line
    distance = offset.square().sum(3).amin(2).sqrt()  # (N, 784)
    return (PEN_WIDTH / 2 + 0.5 - distance * SIZE / 2).clamp(0, 1).view(-1, 1, SIZE, SIZE)


def pixel_centres(device: torch.device) -> Tensor:
    """Return where the pixels' centres are, (28,): the unit is half a side, 0 the middle."""
    return (torch.arange(SIZE, device=device) + 0.5) * 2 / SIZE - 1


# Learning rate and loss

OUTLIER_WEIGHT = 0.5  # of their loss; Hendrycks et al. 2019, arXiv 1812.04606, section 4


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Return the learning rate of step `step`, from 0, of `steps`.

    cosine rises in a line to lr and falls along a half cosine to zero. constant is that of the
    original project, Hladkyi's: a tenth of lr during the warm-up stage, lr after it.
    """
    if config.schedule == "constant":
        return config.lr / 10 if step < config.warmup else config.lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


def make_loss(net: Net, config: Config, machine: Machine) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss as a function of images and labels, compiled on a GPU.

    The images after the labelled ones are outliers: OUTLIER_WEIGHT times their mean divergence
    KL(uniform || probabilities) is added. On a GPU, by itself, the step runs as CUDA graphs:
    Python launches a few things, not hundreds. Under torchrun gradients are averaged.
    """
    precision = machine.precision
    device = machine.device.type
    alone = machine.world == 1
    forward = net if alone else nn.parallel.DistributedDataParallel(net)

    def compute_loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            logits = forward(images)
            loss = F.cross_entropy(logits[: len(labels)], labels)
            if len(images) > len(labels):
                log_probabilities = logits[len(labels) :].log_softmax(1)
                divergence = -log_probabilities.mean() - math.log(len(ALPHABET))
                loss = loss + OUTLIER_WEIGHT * divergence
            return loss

    if config.compile or (config.compile is None and device == "cuda"):
        return torch.compile(compute_loss, mode="reduce-overhead" if alone else "default")
    return compute_loss


# State and checkpoint

EMNIST_CREDIT = "EMNIST, Cohen et al. 2017, arXiv 1702.05373"


@dataclass
class State:
    """All that changes while training; saved whole, it is enough to go on bit for bit."""

    net: Net
    average: Net  # of the net's weights and batch statistics: what is measured and kept
    optimizer: torch.optim.Optimizer
    loss: Tensor  # sum over the steps of this epoch
    settings: dict[str, object]  # that make the run what it is
    step: int = 0  # steps taken since the start of the training
    best: dict[str, Tensor] = field(default_factory=dict)  # averaged weights of the best epoch
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per finished epoch
    log_id: str | None = None  # of the run at Weights & Biases


def create_state(config: Config, machine: Machine) -> State:
    """Return the state at step 0."""
    torch.manual_seed(config.seed)
    settings = config.recipe
    if config.init:
        try:
            net = CNN.load(config.init).train()
        except (OSError, ValueError) as error:
            fail("--init", error, "choose another file")
        for layer in net.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = config.dropout
    else:
        net = Net(config.arch, dropout=config.dropout, xavier=config.xavier)
    settings["arch"] = net.card.arch
    net.card.credit = add_credits(net.card.credit, config.extra)

    net = net.to(machine.device, memory_format=torch.channels_last)
    average = deepcopy(net).requires_grad_(False)
    if machine.world > 1 and machine.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    make_optimizer = OPTIMIZERS[config.optimizer]
    optimizer = make_optimizer(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return State(net, average, optimizer, torch.zeros((), device=machine.device), settings)


def add_credits(credit: str, extra: Path | None) -> str:
    """Add EMNIST's credit, and CREDIT.txt's of the extra images, to that of the weights so far."""
    credits = [EMNIST_CREDIT]
    if extra:
        file = (extra if extra.is_dir() else extra.parent) / "CREDIT.txt"
        if file.is_file():
            credits.append(file.read_text("utf-8", errors="replace").strip())
    for added in credits:
        if added not in credit:
            credit = f"{credit}; {added}" if credit else added
    return credit


def save_checkpoint(state: State, path: Path) -> None:
    """Write the state; a disk that is full costs a warning, not the training."""
    content = dict(vars(state))
    for name in ("net", "average", "optimizer"):
        content[name] = content[name].state_dict()
    try:
        CNN.write_atomically(content, path)
    except OSError as error:
        say(f"warning: no checkpoint at step {state.step}: {path}: {error.strerror}")


def load_checkpoint(state: State, path: Path, device: torch.device) -> None:
    """Set the state to the checkpoint's, where there is one."""
    if not path.exists():
        say(f"--resume: no checkpoint at {path}: training from step 0")
        return
    try:
        content = CNN.read_saved(path, device)
        settings = content.pop("settings")
        changed = [
            f"{name} {settings.get(name)}, not {value}"
            for name, value in state.settings.items()
            if settings.get(name) != value
        ]
        if changed:
            remedy = "pass the same settings and files"
            fail(f"--resume: {path} was made with", ", ".join(changed), remedy)
        for name in ("net", "average", "optimizer"):
            getattr(state, name).load_state_dict(content.pop(name))
    except Exception as error:  # whatever reading damaged bytes may raise
        if is_out_of_memory(error):
            raise
        fail(f"--resume: {path} is damaged", error, "delete it to train anew")
    vars(state).update(content)
    say(f"going on from {path}, step {state.step:,}")


# The log at Weights & Biases

LOG_PATIENCE = 20  # seconds until a server that doesn't answer is given up; wandb's own are 90


class Log:
    """A run at Weights & Biases; where it is off, or has failed, nothing is done."""

    def __init__(self, config: Config, enabled: bool, run_id: str | None) -> None:
        self.run = None
        if enabled:
            self.attempt(self.start, config, run_id)

    def start(self, config: Config, run_id: str | None) -> None:
        """Start a run as WANDB_MODE says, otherwise online if a key is known, or offline."""
        import wandb  # takes a second, and not everyone has it

        init = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", "emnist"),
            id=run_id,
            resume="allow",
            config={name: str(value) for name, value in asdict(config).items()},
            settings=wandb.Settings(silent=True, console="off", init_timeout=LOG_PATIENCE),
        )
        mode = os.environ.get("WANDB_MODE")
        try:
            if mode or wandb.login(prompt=False, verify=False):
                self.run = init()
        except (Exception, SystemExit) as error:  # of the network, the server, the key, the mode
            where = f"WANDB_MODE {mode}: " if mode else ""
            say(f"warning: wandb: {where}{first_line(error)}: logging offline")
        self.run = self.run or init(mode="offline")
        sync = f"offline; send it with: wandb sync {Path(self.run.dir).parent}"
        say(f"wandb: logging {sync if self.run.offline else self.run.url or 'nothing'}")

    def write(self, values: dict[str, float], step: int) -> None:
        if self.run:
            self.attempt(self.run.log, values, step)

    def finish(self, metrics: dict[str, float]) -> None:
        """Log the metrics of test and wait until all is sent."""
        if self.run:
            of_test = {f"test/{name}": value for name, value in metrics.items()}
            self.attempt(self.run.summary.update, of_test)
        if self.run:
            self.attempt(self.run.finish)

    def attempt(self, function: Callable, *arguments: object) -> None:
        """Call a function of wandb's; where it fails, warn, and be off from then on."""
        try:
            function(*arguments)
        except (Exception, SystemExit) as error:  # wandb raises that, too
            self.run = None
            say(f"warning: wandb: {first_line(error)}: training goes on without its log")


# The loop

CHECKPOINT_SECONDS = 120
REPORT_STEPS = 20  # between two looks at the loss, which wait for the device


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Give a list that notes SIGTERM and Ctrl-C, so that a checkpoint may be written first.

    A second signal is obeyed at once, and so is any after the end of the context.
    """
    noted: list[int] = []
    before = {}

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGINT in a background job
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_bar(steps: int, done: int, config: Config, machine: Machine) -> tqdm:
    """Return a bar that counts images, on the first rank's stderr where that is a terminal."""
    size = config.batch_size
    columns, lines = shutil.get_terminal_size()  # 80 and 24 in a terminal that says 0 and 0
    hidden = True if machine.rank > 0 else None
    counted = {"total": steps * size, "initial": done * size, "unit": " images"}
    return tqdm(**counted, unit_scale=True, ncols=columns, nrows=lines, disable=hidden)


def learn(
    state: State, training: Split, validation: Split, config: Config, machine: Machine, log: Log
) -> None:
    """Train to the end, or to a signal: KeyboardInterrupt with its number, a checkpoint saved.

    Raises FloatingPointError when the loss is no number any more.
    """
    per_epoch = steps_per_epoch(training, config)
    steps = per_epoch * config.epochs
    compute_loss = make_loss(state.net, config, machine)
    averaged = [x for x in state.average.state_dict().values() if x.is_floating_point()]
    current = [x for x in state.net.state_dict().values() if x.is_floating_point()]
    bar = make_bar(steps, state.step, config, machine)
    saved = time.monotonic()
    epoch_began = time.monotonic()
    epoch_first_step = state.step
    with noted_signals() as noted:
        for images, labels in batches(training, state.step, config, machine):
            # Take a step
            lr = learning_rate(state.step, steps, config)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.zero_grad(set_to_none=True)
            loss = compute_loss(images, labels)
            loss.backward()
            state.optimizer.step()
            state.loss += loss.detach()
            state.step += 1

            # Let the average follow: faster in the first steps, so that it forgets the start
            decay = min(config.ema, state.step / (state.step + 10))
            get_ema_multi_avg_fn(decay)(averaged, current, state.step)

            # Report
            bar.update(config.batch_size)
            ended = state.step % per_epoch == 0
            if ended or state.step % REPORT_STEPS == 0:
                value = loss.item()  # waits for the device
                epoch = math.ceil(state.step / per_epoch)
                bar.set_description(f"epoch {epoch}/{config.epochs}, loss {value:.3f}", False)
                log.write({"train/loss": value, "lr": lr}, state.step)
                if not math.isfinite(value):
                    raise FloatingPointError(f"step {state.step}")

            # End an epoch
            if ended:
                images_seen = (state.step - epoch_first_step) * config.batch_size
                speed = images_seen / (time.monotonic() - epoch_began)
                if machine.rank == 0:
                    finish_epoch(state, validation, speed, machine, log)
                state.loss.zero_()
                epoch_first_step = state.step
                epoch_began = time.monotonic()

            # Save a checkpoint, and stop if asked to
            due = ended or noted or time.monotonic() > saved + CHECKPOINT_SECONDS
            if machine.rank == 0 and due:
                save_checkpoint(state, config.checkpoint)
                saved = time.monotonic()
                if noted:  # the other ranks end with this one
                    raise KeyboardInterrupt(noted[0])


def finish_epoch(state: State, validation: Split, speed: float, machine: Machine, log: Log) -> None:
    """Measure the averaged weights on validation and keep the best; say and log how it went."""
    logits, _ = CNN.predict(state.average, validation.images, machine.precision)
    metrics = CNN.compute_metrics(logits, validation.labels)
    epoch = len(state.history) + 1
    steps = state.step // epoch  # of one epoch
    loss = state.loss.item() / steps
    if all(metrics["nll"] < earlier["nll"] for earlier in state.history):
        state.best = {key: value.clone() for key, value in state.average.state_dict().items()}
    state.history.append({"epoch": epoch, "loss": loss, "images/s": speed, **metrics})
    say(
        f"epoch {epoch}/{state.settings['epochs']}: loss {loss:.4f}, validation nll "
        f"{metrics['nll']:.4f}, {metrics['accuracy']:.2f} % right, {speed:,.0f} images/s"
    )
    log.write({f"val/{name}": value for name, value in metrics.items()}, state.step)


# The run

SAVE_PATIENCE = 60  # seconds between tries to write the weights


def train(config: Config) -> dict:
    """Train as the settings say, write the weights, return the metrics of every epoch and of test.

    Returns {"history": per epoch, "validation", "test": metrics, "confusion": 36 rows}; {} on other
    ranks. Raises SystemExit, one line for the user; KeyboardInterrupt with a signal's number.
    """
    # What is wrong is said before anything is downloaded
    is_special = config.out.exists() and not config.out.is_file()
    if is_special or not os.access(config.out.resolve().parent, os.W_OK):
        fail(f"--out {config.out}", "can't be written there", "choose another file")
    if config.extra and config.out.resolve() == config.extra.resolve():
        fail(f"--out {config.out}", "would replace --extra", "choose another file")
    if config.checkpoint.exists() and not config.resume:
        fail(f"{config.checkpoint}", "a training was cut short", "use --resume, or delete it")
    machine = set_up(config)
    state = create_state(config, machine)

    # Learn
    training, validation, test = load_splits(config, machine)
    state.settings["pictures"] = len(training.labels)
    if config.resume:
        load_checkpoint(state, config.checkpoint, machine.device)
    log = Log(config, config.wandb and machine.rank == 0, state.log_id)
    if log.run:
        state.log_id = log.run.id
    learn(state, training, validation, config, machine, log)
    if dist.is_initialized():
        dist.destroy_process_group()
    if machine.rank > 0:
        return {}

    # Measure the best epoch, on test once, and write it
    net = state.average
    net.load_state_dict(state.best)
    metrics = {"validation": CNN.fill_card(net, training, validation, machine.precision)}
    logits, _ = CNN.predict(net, test.images, machine.precision)
    metrics["test"] = CNN.compute_metrics(logits / net.card.temperature, test.labels)
    net.card.metrics = {**metrics, "settings": state.settings}
    save_weights(net, config)
    config.checkpoint.unlink(missing_ok=True)
    log.finish(metrics["test"])
    confusion = CNN.count_confusions(logits, test.labels).tolist()
    return {**metrics, "history": state.history, "confusion": confusion}


def save_weights(net: Net, config: Config) -> None:
    """Write the weights; where that fails, try again until it succeeds or a signal comes."""
    while True:
        try:
            return CNN.save(net, config.out)
        except OSError as error:
            say(f"warning: --out {config.out}: {error.strerror}: make room; it is tried again")
            time.sleep(SAVE_PATIENCE)


def format_results(results: dict) -> str:
    """Return the closing table and the ten most frequent confusions, as lines of text."""
    validation = results["validation"]
    test = results["test"]
    lines = [f"{'':<14}{'validation':>10}{'test':>10}"]
    for name in test:
        lines.append(f"{name:<14}{validation[name]:>10.4f}{test[name]:>10.4f}")
    errors = torch.tensor(results["confusion"]).fill_diagonal_(0)
    pairs = []
    for place in errors.flatten().topk(10).indices.tolist():
        truth, answer = divmod(place, len(ALPHABET))
        pairs.append(f"{ALPHABET[truth]}>{ALPHABET[answer]} {errors[truth, answer]}")
    lines.append(f"most confused on test, truth>answer: {', '.join(pairs)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; return the exit status."""
    config = parse(argv)
    try:
        results = train(config)
    except KeyboardInterrupt as stop:
        if config.checkpoint.exists():
            say("stopped at your request; go on with the same command and --resume")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except FloatingPointError as error:
        fail("the loss is not finite", error, f"try a lower --lr, without {config.checkpoint}")
    except torch._dynamo.exc.TorchDynamoException as error:  # such as no C++ compiler there
        fail("the step can't be compiled", error, "try --no-compile")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory", error, "free some, or try a smaller --batch-size")
    if results:
        say(f"wrote {config.out}")
        try:
            print(format_results(results), flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python will flush stdout once more
            fail("stdout", error, f"the metrics are in {config.out}, too")
    return 0


if __name__ == "__main__":
    sys.exit(main())
