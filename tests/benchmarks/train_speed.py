"""Time train.py's loop against the bare step, and the way to an accuracy.

    python3 -m tests.benchmarks.train_speed --data data                  # CPU or GPU
    python3 -m tests.benchmarks.train_speed --data data --target 93.5    # and the time to 93.5 %

Bare step: forward and backward on one resident batch, compiled as the training is, and nothing
else. Ours: `train.learn`, with batches drawn and augmented, optimizer and average stepped. Both in
one process, in turn, `--rounds` times; what is printed are medians.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import train
from images_for_readme import study
from train import Config, Machine, Split


def make_bare_step(config: Config, machine: Machine) -> Callable:
    """Return forward and backward alone, in the arithmetic of the training."""
    net = train.create_state(config, machine).net
    compute_loss = train.make_loss(net, config, machine)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        net.zero_grad(set_to_none=True)
        compute_loss(images, labels).backward()

    return step


def time_bare_step(step: Callable, batch: tuple[torch.Tensor, ...], steps: int) -> float:
    """Return the pictures a second of the bare step."""
    start = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return steps * len(batch[1]) / (time.perf_counter() - start)


def compare(config: Config, machine: Machine, training: Split, steps: int, rounds: int) -> dict:
    """Return pictures a second of bare step and loop, and what an epoch costs, as a table's row."""
    is_cuda = machine.device.type == "cuda"
    count = steps * config.batch_size
    few = Split(training.images[:count], training.labels[:count])
    validation = Split(training.images[: config.batch_size], training.labels[: config.batch_size])
    config = replace(config, epochs=rounds + 1)  # the first is for compiling
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    images = validation.images.unsqueeze(1).float() / 255
    batch = (images.to(memory_format=torch.channels_last), validation.labels)
    step = make_bare_step(config, machine)
    time_bare_step(step, batch, 3)  # to warm up
    state = train.create_state(config, machine)
    bare_rates = []
    finish_epoch = train.finish_epoch

    def finish_and_time(*arguments: object) -> None:
        finish_epoch(*arguments)
        bare_rates.append(time_bare_step(step, batch, steps))

    with patch.multiple(train, finish_epoch=finish_and_time, save_checkpoint=lambda *_: None):
        log = train.Log(config, enabled=False, run_id=None)
        train.learn(state, few, validation, config, machine, log)
    our_rates = [epoch["images/s"] for epoch in state.history[1:]]
    pairs = zip(our_rates, bare_rates[1:], strict=True)
    rate = statistics.median(our_rates)
    peak = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else 0
    return {
        "pictures/s": rate,
        "bare step": statistics.median(bare_rates[1:]),
        "ratio": statistics.median(ours / bare for ours, bare in pairs),
        "s/epoch": len(training.labels) / rate,
        "peak MB": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def time_to_target(target: float, config: Config, pictures: int) -> None:
    """Train with a short schedule; print when validation first reached the target."""
    seconds = 0.0
    for entry in train.train(config)["history"]:
        seconds += pictures / entry["images/s"]  # compiling counts, validation doesn't
        if entry["accuracy"] >= target:
            return print(f"{target} % on validation: {seconds:.1f} s, epoch {entry['epoch']}")
    print(f"{target} % on validation: not in {config.epochs} epochs, {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"))
    add("--device", default="auto")
    add("--arch", nargs="+", default=[Config.arch])
    add("--steps", type=int, default=40, help="per round")
    add("--rounds", type=int, default=5)
    add("--target", type=float, help="accuracy on validation to time, per cent")
    add("--keep", action="store_true", help="as the record bench-cpu (or bench-cuda)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            arch=args.arch[0],
            epochs=6,
            data=args.data,
            out=Path(folder) / "model.pt",
            device=args.device,
            wandb=False,
        )
        machine = train.set_up(config)
        training, *_ = train.load_splits(config, machine)
        print(study.name_machine(machine.device))
        is_cuda = machine.device.type == "cuda"
        where = "GPU" if is_cuda else f"{torch.get_num_threads()} CPU threads"
        rows = []
        for arch in args.arch:
            run = replace(config, arch=arch)
            row = compare(run, machine, training, args.steps, args.rounds)
            rows.append({"": f"{where}, {arch} net", **row})
            print(rows[-1], flush=True)
        if args.target:
            time_to_target(args.target, config, len(training.labels))
    if args.keep:
        kind = machine.device.type
        study.keep(f"bench-{kind}", "EMNIST sample", {"rows": rows}, kind)


if __name__ == "__main__":
    main()
