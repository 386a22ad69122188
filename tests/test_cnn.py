"""The net against its description, and the weights file against damage and malice."""

import math
import multiprocessing
import os
import pickle
import re
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch
from torch import nn

import CNN
from CNN import ALPHABET, ARCHITECTURES, Net

RUN8_PARAMETERS = 1_337_732  # the origin's own count, with 36 classes
FORK = multiprocessing.get_context("fork")  # a child has torch already
SEED = 20170217  # the day EMNIST was published on arXiv


@pytest.fixture(scope="module")
def net() -> Net:
    """A small net (run1) whose weights and running statistics are not the initial ones."""
    torch.manual_seed(SEED)
    made = Net("run1")
    with torch.no_grad():
        for norm in (made.layer1[2], made.layer2[2]):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    made.temperature, made.lookalikes = 1.25, ["0O", "1I"]
    made.figures = {"test": {"accuracy": 0.937, "nll": 0.183}, "confusions": [["0", "O", 17]]}
    return made.eval()


@pytest.fixture
def content(net: Net, tmp_path: Path) -> dict:
    """What a good file holds, for tests to spoil."""
    CNN.save(net, tmp_path / "good.pt")
    return torch.load(tmp_path / "good.pt", weights_only=True)


def refusal(path: Path) -> str:
    """Return the line with which `load` refuses a file."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        CNN.load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable()  # one line, nothing that a terminal would obey
    assert len(line) < 400
    assert "weights_only" not in line  # torch's advice how to load it all the same
    return line.removeprefix(f"{path}: ")


def spoil(folder: Path, content: object) -> str:
    """Return the refusal of a file that holds `content`."""
    torch.save(content, folder / "spoilt.pt")
    return refusal(folder / "spoilt.pt")


def archive(folder: Path, data_pkl: bytes, **more: bytes) -> Path:
    """Write an archive as torch.save does, around a pickle of one's own."""
    path = folder / "archive.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data_pkl)
        for name, data in {"byteorder": b"little", "version": b"3\n", **more}.items():
            file.writestr(f"archive/{name}", data)
    return path


# The net


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shapes(arch: str) -> None:
    net = Net(arch).eval()
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 36)
    assert net(torch.rand(0, 1, 28, 28)).shape == (0, 36)
    assert Net(arch, alphabet="XY").eval()(torch.rand(2, 1, 28, 28)).shape == (2, 2)


@pytest.mark.parametrize(
    "shape", [(28, 28), (1, 28, 28), (2, 28, 28), (2, 3, 28, 28), (2, 1, 28, 27), (2, 1, 32, 32)]
)
def test_wrong_shapes_are_refused(net: Net, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 1, 28, 28\)"):
        net(torch.rand(shape))


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no architecture 'run9': expected one of.*'run8'"):
        Net("run9")


def layers(net: Net) -> list[str]:
    """Name the leaves of a net in the order in which a picture passes them."""
    names = []
    for layer in (*net.layer1, *net.layer2, *net.fc1, net.fc2):
        if isinstance(layer, nn.Conv2d):
            sides = "x".join(map(str, layer.kernel_size))
            names.append(f"conv {sides} {layer.in_channels}-{layer.out_channels}")
            assert (layer.stride, layer.padding) == ((1, 1), (0, 0))
        elif isinstance(layer, nn.Linear):
            names.append(f"linear {layer.in_features}-{layer.out_features}")
        elif isinstance(layer, nn.MaxPool2d):
            assert (layer.kernel_size, layer.stride) == (2, 2)
            names.append("pool")
        elif isinstance(layer, nn.Dropout):
            assert layer.p == 0.28
            names.append("dropout")
        else:
            kind = {nn.ReLU: "relu", nn.BatchNorm2d: "norm2d", nn.BatchNorm1d: "norm1d"}[
                type(layer)
            ]
            names.append(kind)
    return names


# Written out from the origin's description, not from ARCHITECTURES
ORIGIN_LAYERS = {
    "run1": """
        conv 5x5 1-32, relu, norm2d, dropout, pool,
        conv 5x5 32-64, relu, norm2d, dropout, pool,
        linear 1024-36
    """,
    "run7": """
        conv 5x5 1-32, relu, conv 5x5 32-32, relu, norm2d, pool, dropout,
        conv 5x5 32-64, relu, conv 5x5 64-64, relu, norm2d, pool, dropout,
        linear 64-1024, norm1d, relu, dropout, linear 1024-36
    """,
    "run8": """
        conv 5x5 1-32, relu, conv 5x5 32-32, relu, norm2d, pool, norm2d, dropout,
        conv 5x5 32-64, relu, conv 5x5 64-64, relu, norm2d, pool, norm2d, dropout,
        linear 64-1024, relu, norm1d, linear 1024-1024, relu, norm1d, dropout, linear 1024-36
    """,
}


@pytest.mark.parametrize("arch", ORIGIN_LAYERS)
def test_origins_nets_layer_for_layer(arch: str) -> None:
    assert layers(Net(arch)) == [name.strip() for name in ORIGIN_LAYERS[arch].split(",")]


def test_origins_parameter_count() -> None:
    assert sum(p.numel() for p in Net("run8").parameters()) == RUN8_PARAMETERS


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_xavier_initialisation(arch: str) -> None:
    """Glorot & Bengio 2010, equation 16: uniform within sqrt(6 / (inputs + outputs))."""
    torch.manual_seed(SEED)
    weights = [m.weight for m in Net(arch).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) >= 3
    for weight in weights:
        field = math.prod(weight.shape[2:])
        bound = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * field))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_xavier_can_be_left_out() -> None:
    torch.manual_seed(SEED)
    first = Net("run1", xavier=False).layer1[0].weight
    assert first.abs().max() <= 1 / math.sqrt(25)  # torch's own bound, 1 / sqrt(inputs)


@pytest.mark.parametrize("native", [True, False])
def test_mixed_precision_is_for_devices_that_have_it(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    for device in ("cpu", "cuda"):
        expected = torch.bfloat16 if native else torch.float32
        assert CNN.mixed_precision(torch.device(device)) == expected
    assert CNN.mixed_precision(torch.device("mps")) == torch.float32


def test_pictures_are_normalised_by_the_nets_own_figures(net: Net) -> None:
    seen = []
    hook = net.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 28, 28))
    hook.remove()
    assert seen[0][0].unique().item() == pytest.approx(-0.1736 / 0.3317)
    assert seen[0][1].unique().item() == pytest.approx((1 - 0.1736) / 0.3317)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_net_is_the_same_net(arch: str) -> None:
    torch.manual_seed(SEED)
    net = Net(arch)
    net.train()(torch.rand(64, 1, 28, 28))  # statistics away from 0 and 1
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fused = net.fused()
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    images = torch.rand(16, 1, 28, 28)
    torch.testing.assert_close(fused(images), net.eval()(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    follows = ("conv norm", "linear norm")
    words = " ".join((ARCHITECTURES[arch].block + " ", ARCHITECTURES[arch].head))
    if any(pair in words for pair in follows):
        count = [sum("Norm" in type(m).__name__ for m in n.modules()) for n in (fused, net)]
        assert count[0] < count[1]


# In 8-bit integers

VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")


@VNNI
@pytest.mark.parametrize("zero", [0, 44])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_int8_layers_do_the_arithmetic_of_float(kind: str, zero: int) -> None:
    torch.manual_seed(SEED)
    layer = nn.Conv2d(3, 8, 3, padding=1) if kind == "conv" else nn.Linear(75, 8)
    layer.requires_grad_(False)
    steps = layer.weight.abs().flatten(1).amax(1).view(-1, *[1] * (layer.weight.dim() - 1)) / 127
    layer.weight.div_(steps).round_().mul_(steps)  # so that rounding them changes nothing
    levels = torch.randint(0, 256, (16, 3, 5, 5), dtype=torch.uint8)
    inputs = (levels.float() - zero) * 0.01
    expected = layer(inputs if kind == "conv" else inputs.flatten(1)).relu()
    found = CNN._int8(layer, 0.01, zero, 0.02, levels.shape)(levels)
    torch.testing.assert_close(found.float() * 0.02, expected.clamp(max=5.1), rtol=0, atol=0.0101)


def test_int8_pooling_is_max_pooling() -> None:
    levels = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    pooled = nn.functional.max_pool2d(levels.float(), 2)
    assert torch.equal(CNN._pool_int8(levels).float(), pooled)


@VNNI
def test_int8_answers_are_those_of_float(root: Path) -> None:
    net = CNN.load(root / "model.pt")
    drawn = [strokes.emnist_picture(c, strokes.hand(i), form=i) for i in range(9) for c in ALPHABET]
    images = torch.from_numpy(np.stack(drawn)).unsqueeze(1)  # (324, 1, 28, 28)
    with torch.inference_mode():
        logits, expected = CNN.Int8Net(net)(images), net(images / 255)
    probabilities, sure = logits.softmax(1), expected.softmax(1)
    assert (probabilities - sure).abs().max() < 0.1
    assert (probabilities - sure).abs().amax(1).mean() < 0.01
    doubtful = sure.topk(2).values.diff().abs().squeeze(1) < 0.1
    assert ((logits.argmax(1) == expected.argmax(1)) | doubtful).all()
    assert doubtful.float().mean() < 0.1


@VNNI
def test_int8_is_left_alone_where_it_would_be_wrong() -> None:
    good, overflowing, dark = Net(), Net(), Net(mean=-1.0)
    overflowing.layer1[0].weight.data.fill_(1e38)
    overflowing.layer1[1].running_var.zero_()
    assert CNN.runs_in_int8(good)
    for net in (Net("run1"), Net("run8"), overflowing, dark):
        assert not CNN.runs_in_int8(net)
        with pytest.raises(ValueError, match="8-bit"):
            CNN.Int8Net(net)


# The weights file


def test_round_trip(net: Net, tmp_path: Path) -> None:
    CNN.save(net, tmp_path / "model.pt")
    again = CNN.load(tmp_path / "model.pt")
    images = torch.rand(5, 1, 28, 28)
    assert torch.equal(again(images), net(images))
    assert not again.training
    for name in ("arch", "alphabet", "mean", "std", "temperature", "lookalikes", "figures"):
        assert getattr(again, name) == getattr(net, name), name


def test_round_trip_of_another_alphabet(tmp_path: Path) -> None:
    made = Net("run1", alphabet="ABC", mean=0.5, std=0.25)
    made.temperature = torch.tensor(2.0)  # as an optimiser leaves it
    CNN.save(made, tmp_path / "model.pt")
    again = CNN.load(tmp_path / "model.pt")
    assert (again.alphabet, again.mean, again.std, again.temperature) == ("ABC", 0.5, 0.25, 2.0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bare_state_dict_finds_its_net(arch: str, tmp_path: Path) -> None:
    net = Net(arch).eval()
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    again = CNN.load(tmp_path / "bare.pt")
    images = torch.rand(2, 1, 28, 28)
    assert again.arch == arch
    assert torch.equal(again(images), net(images))


def test_state_dict_of_parameters_and_halves(net: Net, tmp_path: Path) -> None:
    state = {name: nn.Parameter(t) if t.is_floating_point() else t
             for name, t in net.state_dict().items()}  # fmt: skip
    torch.save(state, tmp_path / "parameters.pt")
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(CNN.load(tmp_path / "parameters.pt")(images), net(images))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({n: t.to(dtype) if t.is_floating_point() else t
                    for n, t in net.state_dict().items()}, tmp_path / "other.pt")  # fmt: skip
        again = CNN.load(tmp_path / "other.pt")
        assert again.fc2.weight.dtype == torch.float32
        torch.testing.assert_close(again(images), net(images), rtol=0.05, atol=0.1)


def origins_file(path: Path) -> Net:
    """Write what the origin's train.py leaves: a compiled net's state_dict, 37 outputs."""
    torch.manual_seed(SEED)
    net = Net("run8", mean=0.1307, std=0.3081).eval()
    state = {f"_orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    for name in ("_orig_mod.fc2.weight", "_orig_mod.fc2.bias"):
        state[name] = torch.cat([state[name], torch.full_like(state[name][:1], 1e3)])
    torch.save(OrderedDict(state), path)
    return net


def test_origins_file(tmp_path: Path) -> None:
    net = origins_file(tmp_path / "origin.pt")
    again = CNN.load(tmp_path / "origin.pt")
    images = torch.rand(3, 1, 28, 28)
    assert (again.arch, again.mean, again.std) == ("run8", 0.1307, 0.3081)
    assert torch.equal(again(images), net(images))


def test_saved_file_is_readable_by_others(net: Net, tmp_path: Path) -> None:
    """The group and others get what the umask leaves them, as of any file."""
    old = os.umask(0o027)
    try:
        CNN.save(net, tmp_path / "model.pt")
    finally:
        os.umask(old)
    assert (tmp_path / "model.pt").stat().st_mode & 0o777 == 0o640


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 1000, 100_000])
def test_save_that_fails_leaves_the_old_file(room: int, net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with no_file_over(room), pytest.raises(OSError, match="too large"):
        CNN.save(net, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_that_is_interrupted_leaves_the_old_file(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CNN.save(net, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_is_whole_when_killed(net: Net, tmp_path: Path) -> None:
    """A writer that is killed again and again leaves a file that can be loaded."""
    path = tmp_path / "model.pt"
    CNN.save(net, path)
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        writer = FORK.Process(target=_save_for_ever, args=(net, path))
        writer.start()
        writer.join(rng.uniform(0.02, 0.1))
        assert writer.is_alive()
        writer.kill()
        writer.join()
        assert torch.equal(CNN.load(path).fc2.weight, net.fc2.weight)


def _save_for_ever(net: Net, path: Path) -> None:
    while True:
        CNN.save(net, path)


# Files that are no weights, or not whole


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        CNN.load(tmp_path / "missing.pt")


def test_not_a_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")


def test_not_an_archive(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for data in (b"", b"PK", b"accuracy: 96 %\n", b"\0" * 5000, pickle.dumps({"fc2": 1})):
        path.write_bytes(data)
        assert "not a weights file" in refusal(path)
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    assert "not a weights file" in refusal(path)  # of torch before 1.6


def test_archive_of_something_else(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<xml/>")
    assert "expected one data.pkl" in refusal(path)
    for thing in ([1, 2], torch.ones(3), 7, "weights", None):
        assert "expected a dict" in spoil(tmp_path, thing)
    assert refusal(archive(tmp_path, b"")).startswith("damaged or not weights")
    assert refusal(archive(tmp_path, b"not a pickle")).startswith("damaged or not weights")


def test_cut_short_anywhere(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    CNN.save(net, path)
    data = path.read_bytes()
    lengths = {*range(0, 200, 7), *range(0, len(data), len(data) // 60)}
    lengths |= {len(data) - cut for cut in range(1, 60)}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        refusal(path)


def test_flipped_bits(net: Net, tmp_path: Path) -> None:
    """A file with one wrong bit is refused, or is in all that counts the file that it was."""
    path = tmp_path / "model.pt"
    CNN.save(net, path)
    data, images = path.read_bytes(), torch.rand(2, 1, 28, 28)
    expected, refused = net(images), 0
    rng = np.random.default_rng(SEED)
    for place in rng.choice(len(data), 300, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            again = CNN.load(path)
        except ValueError:
            refusal(path)
            refused += 1
        else:
            assert torch.equal(again(images), expected)
    assert refused > 200  # most bits are weights


# Files made by an enemy


class Code:
    """Pickled, a call of open(path, 'w'): loading it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["top", "state", "key", "figures"])
def test_code_is_not_executed(where: str, content: dict, tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    code = Code(trap)
    if where == "state":
        content["state_dict"]["fc2.weight"] = code
    else:
        content = {"top": code, "key": {code: 1}, "figures": content | {"figures": {"x": code}}}[
            where
        ]
    torch.save(content, tmp_path / "trap.pt")
    assert re.search(r"asks for _?io\.open", refusal(tmp_path / "trap.pt"))
    assert not trap.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)  # the trap does work
    assert trap.exists()


def test_messages_are_harmless(tmp_path: Path) -> None:
    """Neither escape codes of a terminal nor torch's advice to load it unsafely get through."""
    line = refusal(archive(tmp_path, b"\x80\x02c\x1b[31mos\nsystem\n."))
    assert r"\x1b[31mos.system" in line


def test_deep_nesting(tmp_path: Path) -> None:
    """In a process of its own: the hash of 200,000 nested tuples overflows the C stack."""
    for depth in (1_000, 30_000, 200_000):
        key = b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."
        value = b"\x80\x02}(X\x01\x00\x00\x00a" + b"]" * depth + b"a" * (depth - 1) + b"u."
        for data_pkl in (key, value):
            reader = FORK.Process(target=refusal, args=(archive(tmp_path, data_pkl),))
            reader.start()
            reader.join()
            assert reader.exitcode == 0


def test_zip_bombs(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            with file.open(name, "w") as entry:
                entry.write(data)
                for _ in range(64 if name.endswith("/data/0") else 0):
                    entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    assert "unpacks to more than its own size" in refusal(path)

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 2**24 + b"}.")
        file.writestr("archive/data/0", os.urandom(2**19))
    assert "unpacks to more than its own size" in refusal(path)


def test_large_pickles_and_files(tmp_path: Path) -> None:
    assert "expected one data.pkl" in refusal(archive(tmp_path, b"\x80\x02" + b"]" * 2**20 + b"."))
    many = {str(i): b"" for i in range(CNN.MAX_ENTRIES)}
    assert "entries" in refusal(archive(tmp_path, b"\x80\x02}.", **many))
    path = tmp_path / "large.pt"
    with open(path, "wb") as file:
        file.truncate(CNN.MAX_FILE_BYTES + 1)  # sparse: takes no room
    assert "bytes" in refusal(path)


def test_two_pickles(content: dict, tmp_path: Path) -> None:
    """Which one is checked and which one is loaded must not differ."""
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model/DATA.PKL", pickle.dumps(Code(tmp_path / "trapped"), 2))
    assert "expected one data.pkl" in refusal(path)


def test_memory_by_allowed_globals(tmp_path: Path) -> None:
    """torch's unpickler would call bytearray(2**36); no weights need it."""
    call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."
    assert "asks for builtins.bytearray" in refusal(archive(tmp_path, call))


@pytest.mark.parametrize(
    "key", ["fc2.weight", "layer2.2.running_mean", "layer1.2.num_batches_tracked"]
)
def test_missing_and_extra_keys(key: str, content: dict, tmp_path: Path) -> None:
    state = content["state_dict"]
    tensor = state.pop(key)
    assert f"lacks 1 tensors of net run1: '{key}'" in spoil(tmp_path, content)
    state |= {key: tensor, "fc3.weight": tensor}
    assert "has 1 tensors that net run1 lacks: 'fc3.weight'" in spoil(tmp_path, content)
    assert "fit none of our architectures" in spoil(tmp_path, state)


@pytest.mark.parametrize("shape", [(), (0,), (36,), (1024, 36), (36, 1024, 1)])
def test_wrong_shapes(shape: tuple[int, ...], content: dict, tmp_path: Path) -> None:
    content["state_dict"]["fc2.weight"] = torch.zeros(shape)
    assert f"fc2.weight: {shape}" in spoil(tmp_path, content)
    assert "fit none" in spoil(tmp_path, content["state_dict"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(value: float, content: dict, tmp_path: Path) -> None:
    for key in ("fc2.weight", "layer1.0.bias", "layer2.2.running_var"):
        tensor = content["state_dict"][key]
        kept = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = value
        assert f"{key}: holds NaN or infinity" in spoil(tmp_path, content)
        assert f"{key}: holds NaN or infinity" in spoil(tmp_path, dict(content["state_dict"]))
        tensor.view(-1)[-1] = kept


def test_numbers_that_become_infinite_or_nan(content: dict, tmp_path: Path) -> None:
    state = content["state_dict"]
    bias = state["fc2.bias"]
    state["fc2.bias"] = torch.full((36,), 1e300, dtype=torch.float64)
    assert "fc2.bias: holds NaN or infinity" in spoil(tmp_path, content)
    state["fc2.bias"] = bias
    state["layer1.2.running_var"][3] = -1
    assert "layer1.2.running_var: holds a negative variance" in spoil(tmp_path, content)


ODD_TENSORS: dict[str, Callable[[torch.Tensor], object]] = {
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64),
    "bytes": lambda t: t.to(torch.uint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "giant": lambda t: torch.zeros(1).expand(10**12),
    "giant of the right rank": lambda t: torch.zeros(1, 1).expand(10**6, 10**6),
    "number": lambda t: 1.0,
    "list": lambda t: t[0].tolist()[:5],
    "nothing": lambda t: None,
    "array": lambda t: t.numpy(),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_odd_tensors(kind: str, content: dict, tmp_path: Path) -> None:
    odd = ODD_TENSORS[kind](content["state_dict"]["fc2.weight"])
    content["state_dict"]["fc2.weight"] = odd
    origin = {f"_orig_mod.{name}": tensor for name, tensor in content["state_dict"].items()}
    for spoilt in (content, content["state_dict"], origin):
        spoil(tmp_path, spoilt)


def test_storage_that_is_not_there(content: dict, tmp_path: Path) -> None:
    """A tensor whose data lies outside its storage, or in none."""
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    for spoilt in ({"model/data/0": b""}, {"model/data/0": b"\0" * 8}, {"model/data/0": None}):
        with zipfile.ZipFile(path, "w") as file:
            for name, data in (entries | spoilt).items():
                if data is not None:
                    file.writestr(name, data)
        refusal(path)


@pytest.mark.parametrize("key", ["arch", "alphabet", "mean", "std", "temperature", "lookalikes",
                                 "figures", "state_dict"])  # fmt: skip
def test_wrong_types_in_every_field(key: str, content: dict, tmp_path: Path) -> None:
    kind = type(content[key])
    wrong = [None, 1, (), ["a"] * 3, {"a": 1}, "x" * 50, torch.ones(3, 3), {1: {2: {3: 4}}}]
    wrong.append(math.nan)
    for value in wrong:
        if isinstance(value, kind) and kind is dict:
            continue  # not the type is wrong, if anything
        assert key in spoil(tmp_path, content | {key: value}), value
    del content[key]
    if key != "state_dict":
        assert key in spoil(tmp_path, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch", "run9"),
        ("arch", "run7"),
        ("alphabet", ""),
        ("alphabet", "AA"),
        ("alphabet", ALPHABET[:-1]),
        ("alphabet", ALPHABET[:-1] + "é"),
        ("mean", math.inf),
        ("std", 0.0),
        ("std", -1.0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("lookalikes", ["0"]),
        ("lookalikes", ["0é"]),
        ("lookalikes", [["0", "O"]]),
        ("figures", {"a": {"b": {"c": {"d": {"e": 1}}}}}),
        ("figures", {"accuracy": torch.ones(())}),
        ("figures", {"a": [(1, 2)]}),
    ],
)
def test_values_out_of_range(key: str, value: object, content: dict, tmp_path: Path) -> None:
    spoil(tmp_path, content | {key: value})


def test_other_checkpoints_are_named(content: dict, tmp_path: Path) -> None:
    state = content["state_dict"]
    assert "optimizer" in spoil(tmp_path, {"optimizer": {}, "model": state})
    assert "arch" in spoil(tmp_path, {"state_dict": state, "epoch": 3})
    assert "keys" in spoil(tmp_path, {1: state["fc2.bias"]})
