"""Train the net on EMNIST's digits and letters, merged into 36 classes, and write model.pt.

    python3 train.py                                 # a GPU box, a laptop: what is there is used
    python3 train.py --resume                        # go on after a crash or preemption, or start
    torchrun --nproc-per-node 4 train.py             # several GPUs, the same global batch

Expect 94.1 % right on test (a 215k-image sample of EMNIST) after 53 s on an H100, or two to three
hours on two CPU cores. Progress goes to stderr, the table of results to stdout. Validation, cut
from train, chooses the epoch; test is read once, at the end.
"""

import argparse
import csv
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.datasets import EMNIST
from tqdm import tqdm

import CNN
import picture
from CNN import ALPHABET, SIZE, Net

FLAG = argparse.BooleanOptionalAction
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
}
VALIDATION_ONE_IN = 20  # about 5 % of train
CHECKPOINT_SECONDS = 120
TEACHING = 0.9  # share of the loss that is towards the teachers, if any
REPORT_STEPS = 20  # between two looks at the loss, which wait for the device
CHUNK_STEPS = 16  # batches that a GPU augments at once, to launch fewer kernels

# How far the augmentations go, chosen on validation and on the field sets together
WARP_ANGLE, WARP_SHEAR = math.radians(15), 0.25
WARP_SCALE = 0.15  # of the logarithm: size and aspect, each
WARP_SHIFT, WARP_BEND = 2.0, 0.8  # px; of the bend, the standard deviation at its knots
LOW_SIZES = [(7, 7), (8, 8), (10, 10), (12, 12), (14, 14), (16, 8), (9, 14)]  # px, height, width


def setting(default: object, text: str, **more: object) -> object:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Every setting of a run: its default, type and help stand here and nowhere else."""

    arch: str = setting("default", "net", choices=list(CNN.ARCHITECTURES))
    epochs: int = setting(20, "passes over the training data")
    batch_size: int = setting(512, "pictures per step, over all processes of torchrun")
    optimizer: str = setting("adamw", "optimizer", choices=list(OPTIMIZERS))
    lr: float = setting(3e-3, "highest learning rate")
    weight_decay: float = setting(0.05, "weight decay")
    warmup: int = setting(500, "steps of the warm-up stage")
    schedule: str = setting("cosine", "learning rate after it", choices=["cosine", "constant"])
    dropout: float = setting(CNN.DROPOUT, "dropout probability")
    augment: str = setting("warp,stroke,resolution,tone", "augmentations, by comma, or none")
    ema: float = setting(0.999, "decay of the moving average of the weights; 0: none")
    xavier: bool = setting(True, "Xavier initialisation rather than torch's own", action=FLAG)
    precision: str = setting("auto", "arithmetic", choices=["auto", "float32", "bfloat16"])
    seed: int = setting(0, "repeats a run, on the CPU bit for bit")
    init: Path = setting(None, "weights file to start from, with its net")
    extra: Path = setting(None, "more pictures: folders named by character, or path,character csv")
    extra_share: float = setting(0.125, "share of each batch that is taken from --extra")
    teacher: Path = setting((), "weights files whose answers are learned too", nargs="+")
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
    def bound(self) -> dict[str, object]:
        """Return what makes a run what it is, and --resume must find unchanged."""
        free = ("data", "out", "device", "compile", "wandb", "resume")
        items = ((name, value) for name, value in asdict(self).items() if name not in free)
        return {k: v if isinstance(v, (str, int, float)) else str(v) for k, v in items}


def parse(argv: list[str] | None = None) -> Config:
    """Turn a command line into a Config, exiting with 2 and a usage line when it is wrong."""
    form, about = argparse.ArgumentDefaultsHelpFormatter, __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    for entry in fields(Config):
        kind = {} if "action" in entry.metadata else {"type": entry.type}
        name = "--" + entry.name.replace("_", "-")
        parser.add_argument(name, default=entry.default, **kind, **entry.metadata)
    config = Config(**vars(parser.parse_args(argv)))
    if config.augment != "none" and not set(config.augment.split(",")) <= set(AUGMENTATIONS):
        parser.error(f"--augment {config.augment}: expected none or some of {[*AUGMENTATIONS]}")
    if config.epochs < 1 or config.batch_size < 2 or not config.lr > 0 <= config.weight_decay:
        parser.error("expected --epochs >= 1, --batch-size >= 2, --lr > 0, --weight-decay >= 0")
    if not 0 <= config.extra_share <= 0.5:
        parser.error("--extra-share: expected 0 to 0.5")
    return config


class Machine(NamedTuple):
    """What this process computes with, and its place among those that torchrun started."""

    device: torch.device
    precision: torch.dtype
    rank: int = 0
    world: int = 1


def set_up(config: Config) -> Machine:
    """Choose device and arithmetic and, under torchrun, join the others."""
    try:
        device = CNN.choose_device(config.device)
    except ValueError as error:
        fail(f"--device {config.device}", error, "try --device cpu")
    auto = config.precision == "auto"
    precision = CNN.mixed_precision(device) if auto else getattr(torch, config.precision)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Machine(device, precision)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Machine(device, precision, dist.get_rank(), dist.get_world_size())


def say(line: str) -> None:
    """Write a line for people, above the progress bar; of all ranks, the first."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)


def fail(what: str, error: BaseException | str, remedy: str) -> NoReturn:
    """End the run with one line for the user: what, why, what to do."""
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    raise SystemExit(f"train.py: error: {what}: {reason}: {remedy}")


def ensure_emnist(root: Path) -> None:
    """Put EMNIST's digits and letters under root, unless they are there: torchvision's download."""
    raw, wanted = root / "EMNIST" / "raw", "emnist-[dl]*-ubyte"
    if len(list(raw.glob(wanted))) == 8:  # digits and letters, train and test, images and labels
        return
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        side = Path(scratch, "EMNIST", "raw")
        side.mkdir(parents=True)
        if (root / "gzip.zip").exists():
            (side / "gzip.zip").symlink_to((root / "gzip.zip").resolve())  # its MD5 is checked
        say(f"{root}: EMNIST is not there yet: {EMNIST.url}, 562 MB")
        socket.setdefaulttimeout(30)  # seconds without a byte; torchvision would wait for ever
        EMNIST(scratch, split="digits", download=True)
        for path in side.glob(wanted):
            path.replace(raw / path.name)


class Split(NamedTuple):
    """Resident pictures: images (N, 28, 28) uint8, upright, ink 255 on 0; labels (N,) int64."""

    images: Tensor
    labels: Tensor
    extra: int = 0  # how many of them, the last ones, are from --extra


def read_emnist(root: Path, train: bool) -> Split:
    """Merge EMNIST's digits and letters: its pictures turned upright, its letters after 9."""
    digits, letters = (EMNIST(str(root), split=name, train=train) for name in ("digits", "letters"))
    images = torch.cat([digits.data, letters.data]).transpose(1, 2).contiguous()
    labels = torch.cat([digits.targets, letters.targets + 9])  # EMNIST's letters are 1 to 26
    return Split(images, labels)


def held_out(images: Tensor) -> Tensor:
    """Say which pictures (N, 28, 28) uint8 are for validation: (N,) bool, some 5 %.

    A hash of the pixels decides, so that copies of a picture (the sample of EMNIST repeats some)
    end on the same side, whatever their order. It is the sum of the picture's 98 words of 8 bytes
    times fixed random odd numbers, modulo 2^64.
    """
    words = images.flatten(1).view(torch.int64)  # (N, 98)
    generator = torch.Generator().manual_seed(20170217)  # any constant: the cut must never change
    factors = torch.randint(2**62, (words.shape[1],), generator=generator) * 2 + 1
    return ((words * factors).sum(1) >> 32) % VALIDATION_ONE_IN == 0


def load_splits(config: Config, machine: Machine) -> tuple[Split, ...]:
    """Return train, validation and test, resident on the device."""
    try:
        if machine.rank == 0:
            ensure_emnist(config.data)
        if machine.world > 1:
            dist.barrier()
        both, test = (read_emnist(config.data, train=part) for part in (True, False))
    except Exception as error:  # whatever the network, the disk and damaged files may bring
        remedy = f"delete {config.data / 'EMNIST'}, put {EMNIST.url} (562 MB) into {config.data}"
        fail(f"no EMNIST in {config.data}", error, f"{remedy} by other means and start again")
    held = held_out(both.images)
    train, validation = (Split(both.images[part], both.labels[part]) for part in (~held, held))
    if config.batch_size % machine.world or config.batch_size > len(train.labels):
        found = f"{machine.world} processes and {len(train.labels)} pictures"
        fail(f"--batch-size {config.batch_size}", found, "choose one that they can share")
    train = add_extra(train, config.extra) if config.extra else train
    device = machine.device
    return tuple(Split(x.to(device), y.to(device), n) for x, y, n in (train, validation, test))


def add_extra(split: Split, source: Path) -> Split:
    """Append labelled pictures of any kind, fitted; one that can't be read costs a line.

    source: a folder of folders named by character, as torchvision's ImageFolder has them, or a csv
    of path,character, as the page of inference.py --report saves corrections.
    """
    if source.is_dir():
        labelled = [(str(path), path.parent.name) for path in sorted(source.glob("*/*"))]
    else:
        try:
            with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                labelled = [(row["path"], row["character"]) for row in csv.DictReader(file)]
        except (OSError, KeyError) as error:
            fail(f"--extra {source}", error, "give a folder of folders, or a csv of path,character")
    images, labels = [], []
    for path, character in labelled:
        if character.upper() not in list(ALPHABET):
            fail(f"--extra {path}", f"{character!r} is no class", "name folders 0-9 and A-Z")
        try:
            images.append(torch.from_numpy(picture.prepare(path, SIZE)[0]))
            labels.append(ALPHABET.index(character.upper()))
        except ValueError as error:
            say(f"--extra: left out: {path}: {error}")
    if not labels:
        fail(f"--extra {source}", "no pictures", "put them into folders, as in A/any_name.png")
    extra = (split.images, torch.stack(images)), (split.labels, torch.tensor(labels))
    return Split(*map(torch.cat, extra), len(labels))


def draw_epoch(split: Split, epoch: int, config: Config) -> Tensor:
    """Return the rows of a split in each batch of an epoch, (steps, B).

    EMNIST's pictures come once each, in random order. The share of --extra is drawn anew for each
    batch and stands at even places, where `augment` changes pictures.
    """
    generator = torch.Generator().manual_seed(hash((config.seed, epoch)))
    share = int(config.batch_size * config.extra_share) if split.extra else 0
    count, own = len(split.labels) - split.extra, config.batch_size - share
    order = torch.randperm(count, generator=generator)[: count // own * own].view(-1, own)
    drawn = torch.randint(2**60, (len(order), share), generator=generator) % max(1, split.extra)
    mixed = torch.stack([count + drawn, order[:, :share]], dim=2).flatten(1)
    return torch.cat([mixed, order[:, share:]], dim=1)


def batches(split: Split, step: int, config: Config, machine: Machine) -> Iterator[tuple]:
    """Yield what is left of the training at `step`: pictures (B, 1, 28, 28), labels (B,).

    Every rank takes its share of each global batch. Random numbers are seeded anew for each chunk
    of batches: a resumed run goes on with the same ones and, on the CPU, with the same dropout.
    """
    chunk_steps = CHUNK_STEPS if machine.device.type == "cuda" else 1
    per_epoch = len(draw_epoch(split, 0, config))
    for epoch in range(step // per_epoch, config.epochs):
        order = draw_epoch(split, epoch, config).to(machine.device)
        order = order.view(per_epoch, machine.world, -1)
        done = max(0, step - epoch * per_epoch)
        for first in range(done - done % chunk_steps, per_epoch, chunk_steps):
            torch.manual_seed(hash((config.seed, machine.rank, epoch, first)))
            rows = order[first : first + chunk_steps, machine.rank]  # (steps, B)
            images = augment(split.images[rows.flatten()], config.augment)
            images = images.to(memory_format=torch.channels_last).split(rows.shape[1])
            yield from list(zip(images, split.labels[rows], strict=True))[max(0, done - first) :]


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw one number per picture, shaped (N, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def pick(images: Tensor, *shares: float) -> tuple[Tensor, ...]:
    """Draw the indices of disjoint random parts of the pictures, as large as the shares say."""
    sizes = [round(share * len(images)) for share in shares]
    return torch.randperm(len(images), device=images.device)[: sum(sizes)].split(sizes)


def warp(images: Tensor) -> Tensor:
    """Rotate, scale, stretch, shear and shift, with a smooth elastic displacement on top."""
    n, device, pixel = len(images), images.device, 2 / SIZE  # the unit is half a side
    angle, shear, scale, stretch, right, down = torch.rand(6, n, device=device) * 2 - 1  # (N,) each
    cos, sin = torch.cos(angle * WARP_ANGLE), torch.sin(angle * WARP_ANGLE)
    shear, shift = shear * WARP_SHEAR, WARP_SHIFT * pixel
    across = torch.exp((scale + stretch) * WARP_SCALE)
    along = torch.exp((scale - stretch) * WARP_SCALE)
    row_x = torch.stack([across * cos, across * (shear * cos - sin), right * shift], 1)
    row_y = torch.stack([along * sin, along * (shear * sin + cos), down * shift], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), images.shape, align_corners=False)
    knots = torch.randn(n, 2, 5, 5, device=device) * (WARP_BEND * pixel)
    bend = F.interpolate(knots, (SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1)
    return F.grid_sample(images, grid + bend, align_corners=False)  # (N, 28, 28, 2) the grid


def stroke(images: Tensor) -> Tensor:
    """Thin a third of the pictures, thicken another, by grey morphology, each by its own amount."""
    images = images.clone()
    for sign, most, part in zip((-1, 1), (0.9, 1.0), pick(images, 1 / 3, 1 / 3), strict=True):
        ink = sign * images[part]
        grown = F.max_pool2d(ink, 3, stride=1, padding=1)
        images[part] = sign * torch.lerp(ink, grown, uniform(ink, 0, most))
    return images


def resolution(images: Tensor) -> Tensor:
    """Take a quarter of the pictures down to a few pixels and back: thumbnails, coarse scans."""
    images, share = images.clone(), 1 / 4 / len(LOW_SIZES)
    for size, part in zip(LOW_SIZES, pick(images, *[share] * len(LOW_SIZES)), strict=True):
        coarse = F.interpolate(images[part], size, mode="bilinear", antialias=True)
        images[part] = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return images


def tone(images: Tensor) -> Tensor:
    """Blur, bend the contrast, add grain, each to its own random part of the pictures."""
    images = images.clone()
    (chosen,) = pick(images, 1 / 4)
    soft = images[chosen]
    blurred = F.avg_pool2d(soft, 3, stride=1, padding=1)
    images[chosen] = torch.lerp(soft, blurred, uniform(soft, 0, 1))
    (chosen,) = pick(images, 1 / 3)
    bent = images[chosen]
    images[chosen] = bent.clamp(1e-6) ** torch.exp(uniform(bent, -0.7, 0.7))
    (chosen,) = pick(images, 1 / 5)
    images[chosen] += torch.randn_like(images[chosen]) * uniform(images[chosen], 0, 0.12)
    return images.clamp(0, 1)


AUGMENTATIONS = {function.__name__: function for function in (warp, stroke, resolution, tone)}


def augment(images: Tensor, names: str) -> Tensor:
    """Turn resident pictures (N, 28, 28) uint8 into a batch (N, 1, 28, 28) in [0, 1].

    Every other one stays as it is: there the net may use what the augmentations destroy, the small
    differences between the 0 and the O of EMNIST's writers. The ink of the others is brought back
    to a maximum of 1, which EMNIST's pictures and fitted ones have.
    """
    batch = images.unsqueeze(1).float() / 255
    if names == "none":
        return batch
    changed = batch[::2]
    for name in names.split(","):
        changed = AUGMENTATIONS[name](changed)
    batch[::2] = changed / changed.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return batch


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


def load_net(name: str, path: Path) -> Net:
    try:
        return CNN.load(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: error: {name}: {error}") from None


def start(config: Config, machine: Machine, pictures: int) -> State:
    torch.manual_seed(config.seed)
    net = Net(config.arch, dropout=config.dropout, xavier=config.xavier)
    if config.init:
        net = load_net("--init", config.init).train()
        for layer in net.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = config.dropout
    net = net.to(machine.device, memory_format=torch.channels_last)
    average = deepcopy(net).requires_grad_(False)
    if machine.world > 1 and machine.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    make = OPTIMIZERS[config.optimizer]
    optimizer = make(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    settings = {**config.bound, "arch": net.card.arch, "pictures": pictures}
    return State(net, average, optimizer, torch.zeros((), device=machine.device), settings)


def save_checkpoint(state: State, path: Path) -> None:
    """Write the state; a disk that is full costs a warning, not the training."""
    modules = {name: vars(state)[name].state_dict() for name in ("net", "average", "optimizer")}
    try:
        CNN.write_atomically(vars(state) | modules, path)
    except OSError as error:
        say(f"warning: no checkpoint at step {state.step}: {path}: {error.strerror}")


def load_checkpoint(state: State, path: Path, device: torch.device) -> None:
    """Set the state to the checkpoint's, where there is one."""
    if not path.exists():
        return say(f"--resume: no checkpoint at {path}: training from step 0")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        theirs, ours = content["settings"], state.settings
        changed = [f"{k} {theirs.get(k)}, not {ours[k]}" for k in ours if theirs.get(k) != ours[k]]
        if changed:
            fail(f"--resume: {path} was made with", ", ".join(changed), "pass the same settings")
        for name in ("net", "average", "optimizer"):
            vars(state)[name].load_state_dict(content.pop(name))
    except Exception as error:  # whatever reading damaged bytes may raise
        fail(f"--resume: {path} is damaged", error, "delete it to train anew")
    vars(state).update(content)
    say(f"going on from {path}, step {state.step:,}")


class Log:
    """A run at Weights & Biases; where it is off, or has failed, nothing is done."""

    def __init__(self, config: Config, enabled: bool, run_id: str | None) -> None:
        self.run, self.enabled = None, enabled
        self.do(lambda _: self._open(config, run_id))

    def do(self, action: Callable) -> None:
        """Call `action` with the run, where there is one; warn if it fails, and be off."""
        try:
            if self.enabled:
                action(self.run)
        except (Exception, SystemExit) as error:  # wandb raises that, too
            reason = str(error).partition("\n")[0]
            say(f"warning: wandb: {reason}: training goes on without its log")
            self.enabled = False

    def _open(self, config: Config, run_id: str | None) -> None:
        """Start a run as WANDB_MODE says, otherwise online if a key is known, or offline."""
        import wandb  # takes a second, and not everyone has it

        chosen = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "emnist"),
            id=run_id,
            resume="allow",
            config={name: str(value) for name, value in asdict(config).items()},
            mode=None if chosen else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        sync = f"offline; send it with: wandb sync {Path(self.run.dir).parent}"
        say(f"wandb: logging {sync if self.run.offline else self.run.url or 'nothing'}")


def log_results(run: object, figures: dict, labels: Tensor, answers: Tensor, out: Path) -> None:
    """Log the figures of test, the confusion chart and the weights; wait until all is sent."""
    import wandb

    run.summary.update({f"test/{name}": value for name, value in figures.items()})
    plot, names = wandb.plot.confusion_matrix, list(ALPHABET)
    run.log({"test/confusion": plot(None, labels.tolist(), answers.tolist(), names)})
    artifact = wandb.Artifact("emnist-cnn", type="model")
    artifact.add_file(str(out), name="model.pt")
    run.log_artifact(artifact)
    run.finish()


def note_signals() -> list[int]:
    """Note SIGTERM and Ctrl-C, that a checkpoint may be written first; a second one is obeyed."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    return noted


def make_loss(net: Net, config: Config, machine: Machine) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss as a function of images and labels, compiled on a GPU.

    There, by itself, it runs as CUDA graphs: Python launches a few things, not hundreds. Under
    torchrun its gradients are averaged over the ranks. Most of it is towards the mean answer of the
    teachers, if any, to the same pictures (distillation, Hinton et al. 2015, arXiv 1503.02531).
    """
    precision, device, alone = machine.precision, machine.device.type, machine.world == 1
    teachers = [load_net("--teacher", path).fused().to(machine.device) for path in config.teacher]
    forward = net if alone else nn.parallel.DistributedDataParallel(net)

    def mean_loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
            if not teachers:
                return loss
            with torch.no_grad():
                answers = [(t(images) / t.card.temperature).softmax(1) for t in teachers]
            return torch.lerp(loss, F.cross_entropy(logits, sum(answers) / len(answers)), TEACHING)

    if config.compile or (config.compile is None and device == "cuda"):
        return torch.compile(mean_loss, mode="reduce-overhead" if alone else "default")
    return mean_loss


def learn(
    state: State, training: Split, validation: Split, config: Config, machine: Machine, log: Log
) -> None:
    """Train to the end, or to a signal: KeyboardInterrupt with its number, a checkpoint saved."""
    per_epoch = len(draw_epoch(training, 0, config))
    steps = per_epoch * config.epochs
    mean_loss = make_loss(state.net, config, machine)
    weights = zip(state.average.state_dict().values(), state.net.state_dict().values(), strict=True)
    averaged, current = zip(*(pair for pair in weights if pair[0].is_floating_point()), strict=True)
    first, began, saved, noted = state.step, time.monotonic(), time.monotonic(), note_signals()
    bar = tqdm(total=steps, initial=state.step, disable=machine.rank > 0 or not sys.stderr.isatty())
    for images, labels in batches(training, state.step, config, machine):
        rate = learning_rate(state.step, steps, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = mean_loss(images, labels)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        state.loss += loss.detach()
        state.step += 1
        # less than --ema in the first steps, so that the average forgets the start
        decay = min(config.ema, state.step / (state.step + 10)) if config.ema else 0.0
        torch._foreach_lerp_(averaged, current, 1 - decay)

        bar.update()
        ended = state.step % per_epoch == 0
        if ended or state.step % REPORT_STEPS == 0:
            values = {"train/loss": loss.item(), "lr": rate}  # waits for the device
            log.do(lambda run, values=values: run.log(values, step=state.step))
            if not math.isfinite(values["train/loss"]):
                fail("the loss is not finite", f"step {state.step}", "try a lower --lr")
        if ended:
            speed = (state.step - first) * config.batch_size / (time.monotonic() - began)
            if machine.rank == 0:
                finish_epoch(state, validation, speed, machine, log)
            state.loss.zero_()
            first, began = state.step, time.monotonic()
        if machine.rank == 0 and (ended or noted or time.monotonic() > saved + CHECKPOINT_SECONDS):
            save_checkpoint(state, config.checkpoint)
            saved = time.monotonic()
            if noted:  # the other ranks end with this one
                raise KeyboardInterrupt(noted[0])


def finish_epoch(state: State, validation: Split, speed: float, machine: Machine, log: Log) -> None:
    """Measure the averaged weights on validation and keep the best; say and log how it went."""
    logits, _ = CNN.predict(state.average, validation.images, machine.precision)
    figures = CNN.compute_metrics(logits, validation.labels)
    epoch = len(state.history) + 1
    loss = state.loss.item() * epoch / state.step
    if all(figures["nll"] < earlier["nll"] for earlier in state.history):
        state.best = {key: value.clone() for key, value in state.average.state_dict().items()}
    state.history.append({"epoch": epoch, "loss": loss, "images/s": speed, **figures})
    say(
        f"epoch {epoch}/{state.settings['epochs']}: loss {loss:.4f}, validation nll "
        f"{figures['nll']:.4f}, {figures['accuracy']:.2f} % right, {speed:,.0f} images/s"
    )
    log.do(lambda run: run.log({f"val/{k}": v for k, v in figures.items()}, step=state.step))


def train(config: Config) -> dict:
    """Train as the settings say, write the weights, return the figures of every epoch and of test.

    Returns {"history": per epoch, "validation", "test": figures, "confusion": 36 rows}; {} on other
    ranks. Raises SystemExit, one line for the user; KeyboardInterrupt with a signal's number.
    """
    if config.out.is_dir() or not os.access(config.out.resolve().parent, os.W_OK):
        fail(f"--out {config.out}", "can't be written there", "choose another file")
    if config.checkpoint.exists() and not config.resume:
        fail(f"{config.checkpoint}", "a training was cut short", "use --resume, or delete it")
    machine = set_up(config)
    training, validation, test = load_splits(config, machine)
    state = start(config, machine, len(training.labels))
    if config.resume:
        load_checkpoint(state, config.checkpoint, machine.device)
    log = Log(config, config.wandb and machine.rank == 0, state.log_id)
    state.log_id = log.run.id if log.run else state.log_id
    learn(state, training, validation, config, machine, log)
    if machine.rank > 0:
        return {}

    net = state.average
    net.load_state_dict(state.best)
    drawn = training.labels[draw_epoch(training, 0, config)]
    net.card.digit_prior = (drawn < CNN.DIGITS).float().mean().item()
    logits, features = CNN.predict(net, validation.images, machine.precision)
    net.card.temperature = CNN.calibrate(logits, validation.labels)
    net.card.lookalikes = CNN.find_lookalikes(CNN.count_confusions(logits, validation.labels))
    net.card.statistics = measure_statistics(net, training, features, logits.argmax(1), machine)
    metrics = {"validation": CNN.compute_metrics(logits / net.card.temperature, validation.labels)}
    logits, _ = CNN.predict(net, test.images, machine.precision)
    metrics["test"] = CNN.compute_metrics(logits / net.card.temperature, test.labels)
    net.card.metrics = {**metrics, "settings": state.settings}
    try:
        CNN.save(net, config.out)
    except OSError as error:
        fail(f"--out {config.out}", error, "make room, then --resume writes it")
    config.checkpoint.unlink(missing_ok=True)
    log.do(lambda run: log_results(run, metrics["test"], test.labels, logits.argmax(1), config.out))
    confusion = CNN.count_confusions(logits, test.labels).tolist()
    return {**metrics, "history": state.history, "confusion": confusion}


STATISTICS_IMAGES = 1000  # of each class, un-augmented, EMNIST's; more change nothing


def measure_statistics(
    net: Net, training: Split, features: Tensor, answers: Tensor, machine: Machine
) -> CNN.ClassStatistics:
    """Return the class statistics of training; features and answers are those of validation."""
    labels = training.labels[: len(training.labels) - training.extra]  # without extra images
    rows = [(labels == i).nonzero()[:STATISTICS_IMAGES, 0] for i in range(len(ALPHABET))]
    rows = torch.cat(rows)
    _, known = CNN.predict(net, training.images[rows], machine.precision)
    return CNN.compute_statistics(known, labels[rows], features, answers)


def format_results(results: dict) -> str:
    """Return the closing table and the ten most frequent confusions, as lines of text."""
    validation, test = results["validation"], results["test"]
    lines = [f"{'':<14}{'validation':>10}{'test':>10}"]
    lines += [f"{name:<14}{validation[name]:>10.4f}{test[name]:>10.4f}" for name in test]
    errors = torch.tensor(results["confusion"]).fill_diagonal_(0).flatten()
    worst = [divmod(i, len(ALPHABET)) for i in errors.topk(10).indices.tolist()]
    pairs = [f"{ALPHABET[i]}>{ALPHABET[j]} {results['confusion'][i][j]}" for i, j in worst]
    return "\n".join([*lines, f"most confused on test, truth>answer: {', '.join(pairs)}"])


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; return the exit status."""
    config = parse(argv)
    try:
        results = train(config)
    except KeyboardInterrupt as stop:
        if config.checkpoint.exists():
            say("stopped at your request; go on with the same command and --resume")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except torch.OutOfMemoryError as error:
        fail("out of memory", error, "try a smaller --batch-size")
    except torch._dynamo.exc.TorchDynamoException as error:  # such as no C++ compiler there
        fail("the step can't be compiled", error, "try --no-compile")
    if results:
        print(format_results(results), flush=True)
        say(f"wrote {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
