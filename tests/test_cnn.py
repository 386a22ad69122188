"""The net against its description, and the weights file against damage and malice."""

import math
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import CNN
from CNN import Net
from images_for_readme import original

SEED = 20170217  # the day EMNIST was published on arXiv
original.register()


@pytest.fixture(scope="module")
def net() -> Net:
    """A small net whose weights and running statistics are not the initial ones."""
    torch.manual_seed(SEED)
    made = Net("tiny")
    made.train()(torch.rand(64, 1, 28, 28))
    made.card.temperature = 1.25
    made.card.lookalikes = ["0O", "1I"]
    made.card.digit_prior = 0.5
    made.card.metrics = {"test": {"accuracy": 93.7, "nll": 0.183}, "settings": {"epochs": 20}}
    parts = torch.eye(64), torch.rand(36, 64), 10.0, torch.rand(36, 2, 64)
    made.card.statistics = CNN.ClassStatistics(*parts)
    return made.eval()


def test_run8_is_as_large_as_the_original_project_says_and_drops_out_as_much():
    net = Net("run8")
    assert sum(weights.numel() for weights in net.parameters()) == 1_337_732
    dropouts = [layer for layer in net.modules() if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in dropouts] == [0.28, 0.28, 0.28]


def test_xavier_initialisation():
    """Glorot & Bengio 2010, equation 16: uniform within sqrt(6 / (inputs + outputs))."""
    torch.manual_seed(SEED)
    for module in Net().modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            bound = math.sqrt(6 / (sum(weight.shape[:2]) * math.prod(weight.shape[2:])))
            assert 0.95 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    without = Net("run1", xavier=False).layer1[0].weight
    assert without.abs().max() <= 1 / math.sqrt(25)  # torch's own bound, 1 / sqrt(inputs)


@pytest.mark.parametrize(("arch", "norms"), [("default", 0), ("run8", 6)])
def test_fused_net_is_the_same_net_with_fewer_norms(arch, norms):
    torch.manual_seed(SEED)
    net, images = Net(arch), torch.rand(32, 1, 28, 28)
    net.train()(images)  # statistics away from 0 and 1
    before, fused = str(net), net.fused()
    torch.testing.assert_close(fused(images[:4]), net.eval()(images[:4]), rtol=1e-4, atol=1e-4)
    assert str(fused).count("BatchNorm") == norms
    assert str(net) == before


def test_what_is_saved_is_loaded(net, tmp_path):
    (tmp_path / "model.pt").symlink_to(tmp_path / "real.pt")  # a link stays one
    images = torch.rand(5, 1, 28, 28)
    CNN.save(net, tmp_path / "model.pt")
    again = CNN.load(tmp_path / "real.pt")
    assert torch.equal(again(images), net(images))
    assert not again.training
    saved = asdict(net.card)
    loaded = asdict(again.card)
    torch.testing.assert_close(loaded.pop("statistics"), saved.pop("statistics"))
    assert loaded == saved


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Also the folder's entry: either may be lost with the machine's power."""
    steps = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, c=call, n=name: (steps.append(n), c(*args)))
    CNN.write_atomically({"step": 1}, tmp_path / "any.pt")
    assert steps == ["fsync", "replace", "fsync"]
    assert torch.load(tmp_path / "any.pt", weights_only=True) == {"step": 1}


def test_a_file_of_another_version_is_loaded(net, tmp_path):
    CNN.save(net, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["figures"] = content.pop("metrics")
    torch.save(content, tmp_path / "old.pt")
    card = CNN.load(tmp_path / "old.pt").card
    assert card.metrics == {}
    assert card.digit_prior == net.card.digit_prior


def test_distances_are_those_of_mahalanobis():
    """The formula with the inverse of the covariance, written out for each picture."""
    random = torch.Generator().manual_seed(SEED)
    centres = torch.rand(36, 6, generator=random)
    labels = torch.arange(36).repeat(50)
    features = (centres[labels] + 0.1 * torch.rand(1800, 6, generator=random)).clamp(0)
    found = CNN.compute_statistics(features, labels, features, labels)
    units = features.numpy() / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([units[labels == i].mean(0) for i in range(36)])
    within = units - means[labels]
    covariance = within.T @ within / 1800
    covariance = 0.8 * covariance + 0.2 * np.eye(6) * np.diag(covariance).mean()
    away = units[:, None] - means
    expected = np.einsum("ncd,de,nce->nc", away, np.linalg.inv(covariance), away)
    whitened = CNN.whiten(features, found.whitening)
    distances = CNN.square_distances(whitened, found.means)
    np.testing.assert_allclose(distances, expected, rtol=1e-2, atol=1e-2)
    one_by_one = [CNN.square_distances(one, found.means) for one in whitened.split(1)]
    np.testing.assert_allclose(torch.cat(one_by_one), distances, rtol=1e-9)
    assert found.median == pytest.approx(np.median(expected[range(1800), labels]), rel=1e-2)
    blank = CNN.whiten(torch.zeros(1, 6), found.whitening)  # an image without a feature
    assert CNN.square_distances(blank, found.means).isfinite().all()


def test_auto_takes_a_gpu_only_if_it_computes(monkeypatch, capsys):
    """As CUDA's wheels say it of a card that they have no kernels for."""
    lacking = RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might")
    ones = torch.ones

    def compute(*size: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            raise lacking
        return ones(*size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: ones(1))  # memory it has
    monkeypatch.setattr(torch, "ones", compute)
    assert CNN.choose_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no kernel image is available" in said
    with pytest.raises(ValueError, match=r"no kernel image is available$"):
        CNN.choose_device("cuda")


def refusal(path: Path) -> str:
    """Return the line with which `load` refuses a file."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        CNN.load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: no weights of ours, or damaged")
    assert line.endswith(": give a file that train.py wrote")
    assert line.isprintable()  # one line, nothing that a terminal would obey
    assert len(line) < len(str(path)) + 300
    assert "weights_only=False" not in line  # torch's advice how to load it all the same
    return line


def test_files_of_another_kind_or_cut_short_or_of_a_flipped_bit_are_refused(net, tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        CNN.load(path)
    CNN.save(net, path)
    data = path.read_bytes()
    lengths = (*range(0, len(data), len(data) // 20), len(data) - 1)
    others = (b"PK", b"96 %\n\x1b[31m", bytes(5000), pickle.dumps({"fc2": 1}, 2))
    for spoilt in (*others, *(data[:length] for length in lengths)):
        path.write_bytes(spoilt)
        refusal(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1  # in the middle of the largest tensor
    path.write_bytes(flipped)
    assert "a checksum in it is wrong" in refusal(path)


def test_a_net_that_is_worse_than_none_has_a_temperature_above_zero():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(36, (200,), generator=random)
    logits = torch.randn(200, 36, generator=random)
    logits[torch.arange(200), labels] -= 3
    temperature, bias = CNN.calibrate(logits, labels)
    assert 0 < temperature < math.inf
    assert bias.isfinite().all()


def test_other_content_is_refused(net, tmp_path):
    path, ones = tmp_path / "model.pt", torch.ones(36)
    CNN.save(net, path)
    good = torch.load(path, weights_only=True)
    weights = good["state_dict"]
    others = [[1, 2], weights, {key: good[key] for key in good if key != "arch"}]
    for change in (
        {"arch": "run9"},
        {"alphabet": CNN.ALPHABET[:35] + "é"},
        {"state_dict": weights | {"fc2.weight": ones}},
        {"state_dict": weights | {"fc2.bias": math.nan * ones}},
        *({"temperature": wrong} for wrong in (None, 0.0, math.nan)),
        *({"std": 0.0}, {"digit_prior": 1.5}, {"lookalikes": [0, 1]}, {"lookalikes": ["?!"]}),
        {"statistics": None},
    ):
        others.append(good | change)
    for change in (
        {"median": 0.0},
        *({"means": wrong} for wrong in (torch.rand(35, 64), math.nan * torch.ones(36, 64), 1.0)),
        {"whitening": torch.eye(64, dtype=torch.float64)},
        {"unheard-of": 1.0},
    ):
        others.append(good | {"statistics": good["statistics"] | change})
    for other in others:
        torch.save(other, path)
        refusal(path)


class Code:
    """Pickled, a call of shutil.copy: loading it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return shutil.copy, (__file__, str(self.path))


def test_code_in_a_file_is_not_executed(net, tmp_path):
    path = tmp_path / "model.pt"
    trap = tmp_path / "trap"
    CNN.save(net, path)
    good = torch.load(path, weights_only=True)
    for content in (Code(trap), good | {"metrics": Code(trap)}):
        torch.save(content, path)
        assert "shutil.copy" in refusal(path)
        assert not trap.exists()
        torch.load(path, weights_only=False)  # the trap does work
        trap.unlink()
