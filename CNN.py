"""The contract between training and inference: classes, picture form, net, weights file.

    net = CNN.load("model.pt")        # a Net in eval mode, with its alphabet, temperature, figures
    logits = net(images)              # (N, 1, 28, 28) ink in [0, 1] -> (N, 36)

Importing this file does nothing but define. `train.py` and `inference.py` both import it and never
each other; whatever they have to agree on stands here once.
"""

import copy
import io
import os
import pickletools
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a class is the index of its character here
SIZE = 28  # px, side of the square pictures the net reads
MEAN, STD = 0.1736, 0.3317  # of EMNIST's pixels in [0, 1], digits and letters together
DROPOUT = 0.28  # the origin's
ORIGIN = {"mean": 0.1307, "std": 0.3081}  # the origin normalised as for MNIST
INT8_DEVIATIONS = 6  # above its mean, where a channel is taken to end; Nagel et al. 2019
MAX_FILE_BYTES = 256 * 2**20  # far above any weights of ours; a larger file is not read
MAX_PICKLE_BYTES = 32 * 2**10  # of what lists the tensors; ours has 4 KiB
MAX_ENTRIES = 1000  # of an archive; ours has 43
MAX_DEPTH = 4  # of dicts and lists in the figures
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMED_IN_PICKLES = {  # all that a file of weights asks Python for
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long")),
}


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
    `lookalikes` (groups of characters that nobody can tell apart alone), `figures` (what it
    reached). The names layer1, layer2, fc1, fc2 are the origin's, so that its weights fit.
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
        net = copy.deepcopy(self).eval().requires_grad_(False)
        for sequence in (net.layer1, net.layer2, net.fc1):
            for i, (layer, norm) in enumerate(pairwise(list(sequence))):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    sequence[i] = fusion.fuse_conv_bn_eval(layer, norm)
                    sequence[i + 1] = nn.Identity()
                elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                    sequence[i] = fusion.fuse_linear_bn_eval(layer, norm)
                    sequence[i + 1] = nn.Identity()
        return net


def _sequence(
    words: str, form: Architecture, inputs: int, width: int, dropout: float
) -> nn.Sequential:
    """Build the layers that `words` name; the first with weights takes `inputs` channels."""
    layers: list[nn.Module] = []
    for word in words.split():
        if word == "conv":
            layers.append(nn.Conv2d(inputs, width, form.kernel, padding=form.padding))
            inputs, norm = width, nn.BatchNorm2d
        elif word == "linear":
            layers.append(nn.Linear(inputs, width))
            inputs, norm = width, nn.BatchNorm1d
        elif word == "norm":
            layers.append(norm(width))
        elif word == "pool":
            layers.append(nn.MaxPool2d(2))
        elif word == "drop":
            layers.append(nn.Dropout(dropout))
        else:
            assert word == "relu", word
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Int8Net(nn.Module):
    """A net in 8-bit integers, for CPUs with instructions for them (VNNI).

    A picture takes 106 us on a core of a Zen 4, and 205 us in bfloat16. Takes pictures as they are
    stored, (N, 1, 28, 28) uint8, returns logits (N, classes) float32. Weights are rounded to 255
    levels per channel, activations to 256 from 0 to where batch norm lets expect their end, so that
    no pictures are needed to find it. Sources: Jacob et al. 2018, arXiv 1712.05877; Nagel et al.
    2019, arXiv 1906.04721. Raises ValueError for other nets.
    """

    def __init__(self, net: Net) -> None:
        super().__init__()
        if not runs_in_int8(net):
            raise ValueError(f"net {net.arch} doesn't run in 8-bit integers here")
        self.layers: list[Callable[[Tensor], Tensor]] = []
        fused = net.fused()
        example = torch.zeros(64, 1, SIZE, SIZE, dtype=torch.uint8)
        step, zero = 1 / 255 / net.std, round(255 * net.mean)  # of 1, and the level of 0
        for part in ("layer1", "layer2", "fc1"):
            for i, layer in enumerate(getattr(fused, part)):
                if isinstance(layer, nn.MaxPool2d):
                    self.layers.append(_pool_int8)
                elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                    norm = getattr(net, part)[i + 1]
                    end = (norm.bias + INT8_DEVIATIONS * norm.weight.abs()).max().item()
                    result = max(end, 1e-6) / 255
                    self.layers.append(_int8(layer, step, zero, result, example.shape))
                    step, zero = result, 0
                else:
                    continue  # ReLU is part of the layers, the others do nothing
                example = self.layers[-1](example)
        self.step, self.fc2 = step, fused.fc2

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.fc2(images.float() * self.step)


def runs_in_int8(net: Net) -> bool:
    """Tell whether `Int8Net` can run a net: on a CPU with VNNI, every layer with its norm."""
    form = ARCHITECTURES[net.arch]
    native = torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
    if not native or net.fc2.weight.device.type != "cpu" or not 0 <= net.mean <= 1:
        return False
    normed = (form.block, form.head) == (_BLOCK, _HEAD)
    return normed and all(tensor.isfinite().all() for tensor in net.fused().parameters())


def _int8(
    layer: nn.Conv2d | nn.Linear, step: float, zero: int, result: float, shape: torch.Size
) -> Callable[[Tensor], Tensor]:
    """Return a layer with ReLU as a function from uint8 to uint8.

    step, zero: of the input, what one level is and which level is 0; result: the step of the
    output. shape: of the input, so that the weights are laid out for it.
    """
    ops, weight = torch.ops.onednn, layer.weight
    steps = weight.abs().flatten(1).amax(1).clamp(min=1e-9) / 127  # (outputs,)
    levels = (weight / steps.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    scales = (steps, torch.zeros_like(steps, dtype=torch.int32), layer.bias)
    after = (result, 0, torch.uint8, "relu", [], "")
    if isinstance(layer, nn.Linear):
        packed = ops.qlinear_prepack(levels, [shape[0], layer.in_features])
        return lambda x: ops.qlinear_pointwise(x.flatten(1), step, zero, packed, *scales, *after)
    form = (layer.stride, layer.padding, layer.dilation, layer.groups)
    packed = ops.qconv_prepack(levels, steps, step, zero, *form, shape)
    return lambda x: ops.qconv_pointwise(x, step, zero, packed, *scales, *form, *after)


def _pool_int8(x: Tensor) -> Tensor:
    """Take the maximum of each 2x2 pixels, (N, C, H, W); torch's pooling knows no uint8."""
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def mixed_precision(device: torch.device) -> torch.dtype:
    """Return the dtype for autocast: bfloat16 where the device computes it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def write_atomically(payload: object, path: Path) -> None:
    """Save `payload` with torch.save so that `path` holds the old file or the new one, whole."""
    path, buffer = Path(os.path.realpath(path)), io.BytesIO()  # a link stays, its target changes
    torch.save(payload, buffer)  # torch reports a full disk as OSError or not, as it happens
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp's 0600 is not what a user expects of a file
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(net: Net, path: Path) -> None:
    """Write weights and all that a reader of them needs, atomically. Raises OSError."""
    payload = {
        "arch": net.arch,
        "alphabet": net.alphabet,
        "mean": float(net.mean),
        "std": float(net.std),
        "temperature": float(net.temperature),
        "lookalikes": net.lookalikes,
        "figures": net.figures,
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()},
    }
    write_atomically(payload, path)


def load(path: Path, device: torch.device | str = "cpu") -> Net:
    """Read our weights file, a bare state_dict, or the origin's, into a Net in eval mode.

    A bare state_dict names no net: the one architecture that its keys and shapes fit is taken. The
    origin's file (keys under `_orig_mod.`, 37 outputs of which the last was never trained) is run8.
    Nothing in the file is executed (weights_only). Raises ValueError, one line, for any file that
    is not whole and ours; OSError where it can't be read.
    """
    try:
        content = _read(Path(path))
        state = content.get("state_dict", content)
        _check_tensors(state)
        if state is not content:
            net = _described_net(content)
        elif any(key.startswith("_orig_mod.") for key in state):
            state = _origin_state(state)
            net = Net("run8", **ORIGIN)
        else:
            net = _fitting_net(state)
        _check_state(state, net)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    net.load_state_dict(OrderedDict(state))
    return net.eval().to(device)


def _read(path: Path) -> dict:
    """Return the dict in a torch.save archive, having refused whatever could hurt."""
    status = path.stat()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"is {kind}, expected a weights file such as model.pt")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"has {status.st_size:,} bytes, weights have under {MAX_FILE_BYTES:,}")
    data = path.read_bytes()
    if not data.startswith(b"PK\3\4"):
        raise ValueError("not a weights file: no archive as torch.save writes it")
    try:
        _check_archive(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unzipping and unpickling foreign bytes may raise
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        reason = text.splitlines()[0][:200].encode("unicode_escape").decode()
        raise ValueError(f"damaged or not weights ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a dict of weights")
    return content


def _check_archive(data: bytes) -> None:
    """Raise unless unpacking and unpickling an archive must stay small and run nothing.

    torch.load(weights_only=True) by itself lets a small file build nested tuples whose hash
    overflows the stack, or fill the memory: it is given only what a state_dict needs.
    """
    if data.count(b"PK\1\2") > MAX_ENTRIES:  # before zipfile makes an object of each
        raise ValueError(f"expected an archive of at most {MAX_ENTRIES:,} entries")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("unpacks to more than its own size")
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"expected one data.pkl of at most {MAX_PICKLE_BYTES:,} bytes")
        if damaged := archive.testzip():  # torch.load compares no checksums
            raise ValueError(f"{damaged} is damaged")
        pickle = archive.read(pickles[0])
    named = {str(value) for code, value, _ in pickletools.genops(pickle) if code.name == "GLOBAL"}
    if foreign := sorted(named - NAMED_IN_PICKLES):
        raise ValueError(f"asks for {foreign[0].replace(' ', '.')}, which no weights need")


def _check_tensors(state: object) -> None:
    """Raise ValueError unless `state` is a dict of names and plain tensors."""
    if not isinstance(state, dict):
        raise ValueError(f"state_dict is a {type(state).__name__}, expected a dict of weights")
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"has a {type(key).__name__} among its keys, expected names")
        if not isinstance(tensor, Tensor) or tensor.dtype not in (*FLOATS, torch.int64):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{key!r:.60}: {found}, expected a tensor of floats")


def _described_net(content: dict) -> Net:
    """Build the net that our own file describes, its description checked."""
    kinds = {"arch": str, "alphabet": str, "lookalikes": list, "figures": dict}
    kinds |= {"mean": float, "std": float, "temperature": float}
    for key, kind in kinds.items():
        value = content.get(key)
        if not isinstance(value, kind):
            raise ValueError(f"{key}: {type(value).__name__}, expected a {kind.__name__}")
    alphabet, groups = content["alphabet"], content["lookalikes"]
    if not alphabet or not set(alphabet) <= set(ALPHABET) or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet {alphabet!r:.60}: expected distinct characters of {ALPHABET}")
    if not all(isinstance(g, str) and len(g) > 1 and set(g) <= set(alphabet) for g in groups):
        raise ValueError("lookalikes: expected a list of groups of the alphabet's characters")
    for key in ("mean", "std", "temperature"):
        low = -100 if key == "mean" else 0.001
        if not low <= content[key] <= 100:
            raise ValueError(f"{key} is {content[key]}, expected {low} to 100")
    if not _is_plain(content["figures"], MAX_DEPTH):
        raise ValueError("figures: expected numbers and words in dicts and lists")
    keys = ("arch", "alphabet", "mean", "std")
    net = Net(**{key: content[key] for key in keys})
    net.temperature, net.lookalikes = content["temperature"], groups
    net.figures = content["figures"]
    return net


def _is_plain(value: object, depth: int) -> bool:
    """Tell whether a value can be shown and copied: no deeper than `depth`, and nothing odd."""
    if isinstance(value, (dict, list)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    return value is None or isinstance(value, (str, int, float))


def _fitting_net(state: dict) -> Net:
    """Return the net whose parameters have the names and shapes of a bare state_dict."""
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    for arch in ARCHITECTURES:
        net = Net(arch)
        if {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes:
            return net
    raise ValueError("keys and shapes fit none of our architectures: " + ", ".join(ARCHITECTURES))


def _origin_state(state: dict) -> dict:
    """Drop the compiler's prefix, and the origin's 37th output: its letters end at 35."""
    classes = len(ALPHABET)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}
    last = {k: v[:classes] for k, v in state.items() if k.startswith("fc2.") and v.ndim}
    return state | last


def _check_state(state: dict, net: Net) -> None:
    """Raise ValueError unless `state` holds the net's tensors: all, no other, right, finite."""
    expected = net.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"lacks {len(missing)} tensors of net {net.arch}: {missing[0]!r}, …")
    if extra := sorted(state.keys() - expected.keys()):
        raise ValueError(f"has {len(extra)} tensors that net {net.arch} lacks: {extra[0]!r:.60}, …")
    for key, wanted in expected.items():
        tensor = state[key]
        if (tensor.shape, tensor.is_floating_point()) != (wanted.shape, wanted.is_floating_point()):
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{key}: {found}, expected {tuple(wanted.shape)} {wanted.dtype}")
        if not torch.isfinite(tensor.to(wanted.dtype)).all():  # a double may be too large for ours
            raise ValueError(f"{key}: holds NaN or infinity")
        if key.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{key}: holds a negative variance")
