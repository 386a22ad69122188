"""The contract between training and inference: classes, picture form, net, weights file.

    net = CNN.load("model.pt")        # a Net in eval mode, with its alphabet, temperature, figures
    logits = net(images)              # (N, 1, 28, 28) ink in [0, 1] -> (N, 36)

`train.py` and `inference.py` both import it and never each other: what they must agree on is here.
"""

import copy
import io
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import fusion

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a class is the index of its character here
SIZE = 28  # px, side of the square pictures the net reads
MEAN, STD = 0.1736, 0.3317  # of EMNIST's pixels in [0, 1], digits and letters together
DROPOUT = 0.28  # the origin's
DIGITS = 10  # the first classes
EMNIST_DIGITS = 240_000 / 364_800  # their share of its pictures
EVALUATION_BATCH = 2048
ECE_BINS = 15  # the customary number, Guo et al. 2017, arXiv 1706.04599
LOOKALIKE_RATE = 0.15  # on validation the worst pairs are at 20 % and more, the next at 12 %


@dataclass(frozen=True)
class Architecture:
    """Two convolutional blocks and a head, each written as the sequence of its layers."""

    block: str
    head: str
    channels: tuple[int, int] = (32, 64)
    kernel: int = 5
    padding: int = 0
    hidden: int = 1024


_BLOCK = "conv norm pool relu conv norm relu drop"  # pool before relu: same values, cheaper
_HEAD = "linear norm relu drop"
ARCHITECTURES = {
    "default": Architecture(_BLOCK, _HEAD, (48, 96), kernel=3, padding=1, hidden=384),
    "large": Architecture(_BLOCK, _HEAD, (64, 128), kernel=3, padding=1, hidden=1536),
    "run1": Architecture("conv relu norm drop pool", ""),
    "run7": Architecture("conv relu conv relu norm pool drop", "linear norm relu drop"),
    "run8": Architecture(
        "conv relu conv relu norm pool norm drop", "linear relu norm linear relu norm drop"
    ),
}


class Net(nn.Module):
    """The two-block conv net, built from its description in `ARCHITECTURES`.

    arch: a name in ARCHITECTURES. xavier: Glorot & Bengio's uniform initialisation (2010) of every
    convolution and linear layer; otherwise torch's own. What the weights file knows beside weights
    hangs on the net: `temperature` (logits are divided by it to get calibrated probabilities),
    `digits` (their share of the pictures it was trained on), `lookalikes` (groups of characters
    that nobody can tell apart alone), `figures` (what it reached). The names layer1, layer2, fc1,
    fc2 are the origin's, so that its weights fit.
    """

    def __init__(
        self,
        arch: str = "default",
        *,
        alphabet: str = ALPHABET,
        mean: float = MEAN,
        std: float = STD,
        dropout: float = DROPOUT,
        xavier: bool = True,
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"no architecture {arch!r}: expected one of {list(ARCHITECTURES)}")
        self.arch, self.alphabet, self.mean, self.std = arch, alphabet, mean, std
        self.temperature, self.lookalikes, self.figures = 1.0, [], {}
        self.digits = EMNIST_DIGITS

        form = ARCHITECTURES[arch]
        first, second = form.channels
        self.layer1 = _sequence(form.block, form, 1, first, dropout)
        self.layer2 = _sequence(form.block, form, first, second, dropout)
        side = SIZE
        for _ in form.channels:
            side -= form.block.split().count("conv") * (form.kernel - 1 - 2 * form.padding)
            side //= 2
        flat = second * side * side
        self.fc1 = _sequence(form.head, form, flat, form.hidden, dropout)
        self.fc2 = nn.Linear(form.hidden if form.head else flat, len(alphabet))
        if xavier:
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 1, 28, 28): ink in [0, 1], paper 0."""
        if images.shape[1:] != (1, SIZE, SIZE):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (N, 1, 28, 28)")
        x = (images - self.mean) / self.std
        x = self.layer2(self.layer1(x))  # (N, 96, 7, 7) with the default net
        return self.fc2(self.fc1(x.flatten(1)))

    def fused(self) -> "Net":
        """Return a copy for inference: in eval mode, batch norms folded into what precedes them."""
        fuse = {nn.Conv2d: fusion.fuse_conv_bn_eval, nn.Linear: fusion.fuse_linear_bn_eval}
        net = copy.deepcopy(self).eval().requires_grad_(False)
        for sequence in (net.layer1, net.layer2, net.fc1):
            for i, (layer, norm) in enumerate(pairwise(list(sequence))):
                if type(layer) in fuse and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    sequence[i], sequence[i + 1] = fuse[type(layer)](layer, norm), nn.Identity()
        return net


def _sequence(
    words: str, form: Architecture, inputs: int, width: int, dropout: float
) -> nn.Sequential:
    """Build the layers that `words` name; the first with weights takes `inputs` channels."""
    make = {
        "conv": lambda: nn.Conv2d(inputs, width, form.kernel, padding=form.padding),
        "linear": lambda: nn.Linear(inputs, width),
        "norm": lambda: (nn.BatchNorm2d if "conv" in words else nn.BatchNorm1d)(width),
        "pool": lambda: nn.MaxPool2d(2),
        "relu": nn.ReLU,
        "drop": lambda: nn.Dropout(dropout),
    }
    layers: list[nn.Module] = []
    for word in words.split():
        layers.append(make[word]())
        inputs = width if word in ("conv", "linear") else inputs
    return nn.Sequential(*layers)


def choose_device(name: str) -> torch.device:
    """Return a device by torch's name for it, or for auto the GPU where there is one, or the CPU.

    Under torchrun each process takes its own GPU. Raises ValueError where there is no such device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name.replace("auto", "cpu"))
        torch.empty(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    return device


def mixed_precision(device: torch.device) -> torch.dtype:
    """Return the dtype for autocast: bfloat16 where the device computes it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def predict(net: Net, images: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the logits (N, classes), float32, of pictures (N, 28, 28) uint8, ink 255 on 0."""
    net.eval()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        parts = [net(part.unsqueeze(1) / 255).float() for part in images.split(EVALUATION_BATCH)]
    return torch.cat(parts)


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the figures of a split: rates in per cent, NLL in nats.

    digits, letters: of the pictures that are; *_known: the same when only digits, or only letters,
    can be answered. classes: mean over the classes. ece: expected calibration error of the best
    answers, in ECE_BINS equal bins, a fraction.
    """
    confidence, answer = logits.softmax(1).max(1)
    right, digit = (answer == labels).float(), labels < DIGITS
    possible = (torch.arange(len(ALPHABET), device=labels.device) < DIGITS) == digit[:, None]
    known = (logits.where(possible, -math.inf).argmax(1) == labels).float()
    rates = {
        "accuracy": right.mean(),
        "digits": right[digit].mean(),
        "letters": right[~digit].mean(),
        "classes": torch.stack([right[labels == i].mean() for i in labels.unique()]).mean(),
        "digits_known": known[digit].mean(),
        "letters_known": known[~digit].mean(),
    }
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, device=labels.device).index_add_(0, bins, confidence - right)
    figures = {name: 100 * rate.item() for name, rate in rates.items()}
    figures["nll"] = F.cross_entropy(logits, labels).item()
    return {**figures, "ece": (gaps.abs().sum() / len(labels)).item()}


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that gives the least NLL: the best of a fine grid, 0.25 to 4."""
    temperatures = torch.logspace(-2, 2, 1001, base=2).tolist()
    return min(temperatures, key=lambda t: F.cross_entropy(logits / t, labels).item())


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
    return sorted({"".join(ALPHABET[i] for i in sorted(one)) for one in groups if len(one) > 1})


def write_atomically(payload: object, path: Path) -> None:
    """Save `payload` with torch.save so that `path` holds the old file or the new one, whole."""
    path, buffer = Path(path).resolve(), io.BytesIO()  # a link stays, its target changes
    part = path.with_name(path.name + ".part")
    torch.save(payload, buffer)  # not to the file: torch reports a full disk as it happens
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


DESCRIPTION = ["arch", "alphabet", "mean", "std", "temperature", "digits", "lookalikes", "figures"]


def save(net: Net, path: Path) -> None:
    """Write weights and all that a reader of them needs, atomically. Raises OSError."""
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    payload = {name: getattr(net, name) for name in DESCRIPTION}
    write_atomically({**payload, "state_dict": weights}, path)


def load(path: Path, device: torch.device | str = "cpu") -> Net:
    """Read our weights file, or the origin's, into a Net in eval mode.

    Nothing in the file is executed (weights_only). Raises ValueError, one line, for any file that
    is not whole and ours; OSError where it can't be read.
    """
    data = io.BytesIO(Path(path).read_bytes())  # of a file cut short, torch says "invalid argument"
    try:
        net = _described(torch.load(data, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever unpickling foreign bytes and filling a net may raise
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:100]
        what = f"no weights of ours, or damaged ({type(error).__name__}: {reason!a})"
        raise ValueError(f"{path}: {what}: give a file that train.py wrote") from None
    return net.eval().to(device)


def _described(content: dict) -> Net:
    """Build the net that the content of a weights file describes.

    The origin's (keys under `_orig_mod.`, 37 outputs of which the last was never trained) is run8.
    """
    if any(key.startswith("_orig_mod.") for key in content):
        net = Net("run8", mean=0.1307, std=0.3081)  # of MNIST, as the origin took them
        state = {key.removeprefix("_orig_mod."): tensor for key, tensor in content.items()}
        state |= {key: state[key][: len(ALPHABET)] for key in ("fc2.weight", "fc2.bias")}
    else:
        net = Net(content["arch"], **{key: content[key] for key in ("alphabet", "mean", "std")})
        state = content["state_dict"]
        if not 0 < len(net.alphabet) == len(set(net.alphabet) & set(ALPHABET)):
            raise ValueError(f"alphabet {net.alphabet}: expected distinct ones of {ALPHABET}")
        for name in ("temperature", "lookalikes", "figures"):
            setattr(net, name, content[name])
        net.digits = content.get("digits", EMNIST_DIGITS)  # files before 2026-11-24 have none
    net.load_state_dict(state)
    return net
