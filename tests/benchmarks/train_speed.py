"""Time train.py's loop against the bare step, and the way to an accuracy.

    python3 tests/benchmarks/train_speed.py --data data                  # CPU or GPU
    python3 tests/benchmarks/train_speed.py --data data --target 93.5    # and the time to 93.5 %

Bare step: forward and backward on one resident batch, compiled as the training is, and nothing
else. Ours: `train.learn`, with batches drawn and augmented, optimizer and average stepped. Both in
one process, in turn, `--rounds` times; a ratio is the median of the rounds'.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "images_for_readme")]

import study  # noqa: E402

import train  # noqa: E402
from train import Config, Machine, Split  # noqa: E402


def bare_rate(net: train.Net, loss: object, batch: tuple, steps: int) -> float:
    """Return the pictures a second of forward and backward alone."""
    start = time.perf_counter()
    for _ in range(steps):
        net.zero_grad(set_to_none=True)
        mean = loss(*batch)
        mean.backward()
    mean.item()  # waits for the device
    return steps * len(batch[1]) / (time.perf_counter() - start)


def compare(config: Config, machine: Machine, training: Split, steps: int, rounds: int) -> dict:
    """Return pictures/s of bare step and loop, their ratio, and what an epoch of the loop costs."""
    count, cuda = steps * config.batch_size, machine.device.type == "cuda"
    few = Split(training.images[:count], training.labels[:count])
    config = replace(config, epochs=rounds + 1)  # the first is for compiling
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    net = train.start(config, machine, count).net
    loss = train.make_loss(net, config, machine)
    images = train.augment(few.images[: config.batch_size], "none")
    batch = images.to(memory_format=torch.channels_last), few.labels[: config.batch_size]
    bare, ours, start = [], [], time.perf_counter()
    bare_rate(net, loss, batch, 3)
    build = time.perf_counter() - start

    def ended(state: train.State, validation: Split, speed: float, *rest: object) -> None:
        ours.append(speed)
        bare.append(bare_rate(net, loss, batch, steps))

    with patch.multiple(train, finish_epoch=ended, save_checkpoint=lambda *_: None):
        log = train.Log(config, enabled=False, run_id=None)
        train.learn(train.start(config, machine, count), few, few, config, machine, log)
    rate = statistics.median(ours[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    ratio = statistics.median(o / b for o, b in zip(ours[1:], bare[1:], strict=True))
    found = {"build": build, "limit": statistics.median(bare[1:]), "ours": rate, "ratio": ratio}
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak
    return found | {"epoch": len(training.labels) / rate, "peak": peak}


def time_to(target: float, config: Config, pictures: int) -> None:
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
    add("--batch-size", type=int, nargs="+", default=[Config.batch_size])
    add("--steps", type=int, default=40, help="per round")
    add("--rounds", type=int, default=5)
    add("--target", type=float, help="accuracy on validation to time, per cent")
    add("--epochs", type=int, default=6, help="of the training to the target")
    add("--keep", action="store_true", help="as the record bench-cpu (or bench-cuda)")
    args, kept = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"data": args.data, "out": Path(folder) / "model.pt"}
        first = {"arch": args.arch[0], "batch_size": args.batch_size[0], "epochs": args.epochs}
        config = Config(device=args.device, wandb=False, **first, **files)
        machine = train.set_up(config)
        training, *_ = train.load_splits(config, machine)
        print(study.machine(machine.device))
        for arch in args.arch:
            for size in args.batch_size:
                run, name = replace(config, arch=arch, batch_size=size), f"{arch}-{size}"
                name = arch if len(args.batch_size) == 1 else name
                kept[name] = compare(run, machine, training, args.steps, args.rounds)
                figures = ", ".join(f"{key} {value:,.3f}" for key, value in kept[name].items())
                print(f"{name}: {figures}", flush=True)
        if args.target:
            time_to(args.target, config, len(training.labels))
    if args.keep:
        kind = machine.device.type
        study.keep(f"bench-{kind}", "EMNIST sample", kept, kind)


if __name__ == "__main__":
    main()
