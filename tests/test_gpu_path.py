"""What a GPU computes, without one: fake_gpu.py's rules about devices; the step as one graph."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import strokes
import torch
from conftest import SHORT
from fake_gpu import WrongDeviceError, fake_gpu

import CNN
import inference
import picture
import train

__all__ = ["fake_gpu"]


@pytest.fixture
def config(tiny_emnist, tmp_path) -> train.Config:
    """24 steps, on the GPU where there is one."""
    files = ["--data", str(tiny_emnist), "--out", str(tmp_path / "model.pt")]
    return train.parse([*SHORT, *files, "--device", "auto", "--outliers", "0.25"])


@pytest.mark.parametrize("planted", [False, True])
def test_training_keeps_devices_apart_and_waits_for_the_gpu_only_to_report(
    config, fake_gpu, monkeypatch, capsys, planted
):
    if planted:
        monkeypatch.setattr(train, "augment", lambda x, names: x / x.max().item())
    train.train(config)
    in_steps = {
        what: count
        for what, count in fake_gpu.waits.items()
        if "> learn" in what and "finish_epoch" not in what and "save_checkpoint" not in what
    }
    with capsys.disabled():
        print("\nwaits in 24 steps:", in_steps)
    # The loss is looked at every 20 steps, and at the end of each of 3 epochs of 8 steps
    expected = {"train > learn: aten._local_scalar_dense.default": 4}
    assert (in_steps == expected) == (not planted)


def test_a_stopped_training_goes_on_on_the_gpu(config, fake_gpu, monkeypatch):
    learning_rate = train.learning_rate

    def strike(step: int, *rest: object) -> float:
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train, "learning_rate", strike)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    assert len(train.train(replace(config, resume=True))["history"]) == 3


def test_a_resumed_training_goes_on_within_a_chunk_of_batches(config, fake_gpu, monkeypatch):
    monkeypatch.setattr(train, "CHUNK_STEPS", 4)
    machine = train.Machine(torch.device("cuda:0"), torch.float32)
    split, *_ = train.load_splits(config, machine)
    whole = list(train.batches(split, 0, config, machine))
    assert len(whole) == 24
    for step in (0, 3, 4, 10, 23):
        rest = train.batches(split, step, config, machine)
        for (images, labels), (again, labels_again) in zip(whole[step:], rest, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(labels, labels_again)


def on_the_cpu(images: torch.Tensor, *_: float) -> torch.Tensor:
    return torch.full((len(images), 1, 1, 1), 0.5)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [(train, "uniform", on_the_cpu), (train, "OUTLIER_WEIGHT", torch.full((1,), 0.5))],
)
def test_a_tensor_on_the_wrong_device_is_caught(config, fake_gpu, monkeypatch, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(WrongDeviceError):
        train.train(config)


def test_the_step_is_one_graph_and_is_compiled_once(config):
    """So says Dynamo, which needs no compiler; fullgraph raises where a graph breaks."""
    machine = train.Machine(torch.device("cpu"), torch.float32)
    state = train.create_state(config, machine)
    compute_loss = train.make_loss(state.net, config, machine)
    compiled = torch.compile(compute_loss, backend="aot_eager", fullgraph=True)
    for number in range(3):
        images = torch.rand(20, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(36, (16,))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            state.optimizer.zero_grad(set_to_none=True)
            loss = compiled(images, labels)
            loss.backward()
        state.optimizer.step()
    assert loss.isfinite()


def test_inference_adapts_and_judges_on_a_gpu_as_on_the_cpu(weights, request):
    drawn = [strokes.emnist_picture(c, strokes.hand(1)) for c in CNN.ALPHABET * 2]
    readings = [picture.Reading(image, picture.Features()) for image in drawn]
    pictures = [inference.Picture(str(i)) for i in range(len(drawn))]
    args = inference.parse(["--input", "x", "--model", str(weights)])
    found = []
    for where in ("cpu", "gpu"):
        if where == "gpu":
            request.getfixturevalue("fake_gpu")
        net = inference.TrainedNet(args)
        assert (where, net.device.type) in (("cpu", "cpu"), ("gpu", "cuda"))
        beforehand = inference.known_beforehand(net.card, args)
        owners = torch.arange(len(drawn))
        looked = inference.Looked(pictures, readings, owners, net.see(readings))
        folder = inference.adapt([looked], beforehand, net.card)
        answers = inference.answer(looked, folder, net.card, args)
        found.append((folder.digits, [one.character for one in answers]))
    (cpu_fraction, on_cpu), (gpu_fraction, on_gpu) = found
    assert gpu_fraction == pytest.approx(cpu_fraction, abs=0.02)
    assert np.mean([one == other for one, other in zip(on_cpu, on_gpu, strict=True)]) > 0.95
