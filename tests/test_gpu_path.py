"""What a GPU computes, without one: fake_gpu.py's rules about devices; the step as one graph."""

import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import strokes
import torch
from conftest import ROOT, signal_at
from fake_gpu import Operations, WrongDeviceError, fake_gpu
from PIL import Image

import CNN
import inference
import train

__all__ = ["fake_gpu"]


@pytest.fixture
def config(config) -> train.Config:
    """An epoch of 8 steps, on the GPU where there is one."""
    return replace(config, epochs=1, outliers=0.25, device="auto", precision="auto")


def waits_in_steps(fake_gpu: Operations) -> dict[str, int]:
    """Say what waited for the GPU in the steps themselves, and how often."""
    rare = ("finish_epoch", "save_checkpoint")
    in_loop = {what: count for what, count in fake_gpu.waits.items() if "> learn" in what}
    return {what: in_loop[what] for what in in_loop if not any(name in what for name in rare)}


def test_a_training_that_goes_on_keeps_devices_apart_and_waits_only_to_report(
    config, fake_gpu, monkeypatch, capsys
):
    monkeypatch.setattr(train, "REPORT_STEPS", 3)
    with signal_at(3, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        train.train(config)
    assert len(train.train(replace(config, resume=True))["history"]) == 1
    with capsys.disabled():
        print("\nwaits in 8 steps:", waits_in_steps(fake_gpu))
    # The loss is looked at every third step, and at the end of the epoch
    expected = {"train > learn: aten._local_scalar_dense.default": 3}
    assert waits_in_steps(fake_gpu) == expected


def test_what_else_waits_for_the_gpu_is_seen(config, fake_gpu, monkeypatch):
    monkeypatch.setattr(train, "augment", lambda images, names: images / images.max().item())
    with signal_at(3, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        train.train(config)
    found = waits_in_steps(fake_gpu)
    assert "train > learn > batches > make_batches: aten._local_scalar_dense.default" in found


def test_a_resumed_training_goes_on_within_a_chunk_of_batches(config, fake_gpu, monkeypatch):
    monkeypatch.setattr(train, "CHUNK_STEPS", 3)
    machine = train.Machine(torch.device("cuda:0"), torch.float32)
    split, *_ = train.load_splits(config, machine)
    config = replace(config, epochs=2)
    whole = list(train.batches(split, 0, config, machine))
    assert len(whole) == 16
    for step in (3, 7, 12):
        rest = train.batches(split, step, config, machine)
        for (images, labels), (again, labels_again) in zip(whole[step:], rest, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(labels, labels_again)


def test_a_tensor_on_the_wrong_device_is_caught(config, fake_gpu, monkeypatch):
    monkeypatch.setattr(train, "OUTLIER_WEIGHT", torch.full((1,), 0.5))
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


class Serial(ThreadPoolExecutor):
    """A pool without threads, in which a dispatch mode would not hold."""

    def submit(self, function: Callable, *arguments: object) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_inference_adapts_and_answers_on_a_gpu(fake_gpu, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(inference, "ThreadPoolExecutor", Serial)
    for i, character in enumerate(CNN.ALPHABET):
        image = strokes.emnist_picture(character, strokes.hand(i))
        Image.fromarray(image).save(tmp_path / f"{character}.png")
    assert inference.main(["--input", str(tmp_path), "--model", str(ROOT / "model.pt")]) == 0
    lines = capfd.readouterr().out.splitlines()
    right = [chr(int(line[:3])) == line[-5] for line in lines]
    assert sum(right) > 30
    assert any(what.endswith("see: to the CPU") for what in fake_gpu.waits), fake_gpu.waits
