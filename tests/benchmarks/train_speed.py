"""Time train.py against the limit of the machine, and its cost against data, batch and net.

    python3 tests/benchmarks/train_speed.py --data data                  # CPU or GPU
    python3 tests/benchmarks/train_speed.py --data data --target 93.5    # and the time to 93.5 %

Limit: forward and backward on random resident tensors, compiled and graphed as the training is, and
nothing else. Ours: the loop of train.py, batches drawn and augmented, optimizer and average
stepped. Both in one process, in turn, `--rounds` times; a ratio is the median of the rounds'.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "images_for_readme")]

import study  # noqa: E402

import train  # noqa: E402
from train import Config, Ranks, Run, Split, Stop  # noqa: E402


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the wall time of `work`, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def epoch(run: Run, split: Split, steps: int) -> None:
    """Take `steps` steps of the training as train_epoch does, without its talk."""
    taken = 0
    run.net.train()
    while taken < steps:
        for images, labels in train.batches(run, split):
            train.take_step(run, images, labels)
            taken += 1
            if taken == steps:
                break


def limit(run: Run, steps: int) -> None:
    """Take the forwards and backwards alone, on one resident random batch."""
    images = torch.rand(run.config.batch_size, 1, train.SIZE, train.SIZE, device=run.ranks.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, len(train.ALPHABET), (len(images),), device=run.ranks.device)
    run.net.train()
    for _ in range(steps):
        run.backward(images, labels)


def compare(config: Config, split: Split, ranks: Ranks, steps: int, rounds: int) -> dict:
    """Time limit and loop in turn; return images/s of both, their ratio and the build's seconds."""
    run = Run(config, len(split.labels) // config.batch_size, ranks)
    build = seconds(run.build, ranks.device)
    limit(run, 3), epoch(run, split, 3)
    bare, ours = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: limit(run, steps), ranks.device))
        ours.append(seconds(lambda: epoch(run, split, steps), ranks.device))
    images = steps * config.batch_size
    ratios = [b / o for b, o in zip(bare, ours, strict=True)]
    return {
        "build": build,
        "limit": images / statistics.median(bare),
        "ours": images / statistics.median(ours),
        "ratio": statistics.median(ratios),
        "epoch": statistics.median(ours) * run.steps_per_epoch / steps,
    }


def repeat(split: Split, count: int) -> Split:
    """Return `count` pictures: a part of the split, or all of them several times."""
    times = -(-count // len(split.labels))
    images = split.images.repeat(times, 1, 1)[:count].contiguous()
    return Split(images, split.labels.repeat(times)[:count])


def cost_curve(config: Config, split: Split, ranks: Ranks, steps: int) -> None:
    """Print time per epoch and memory against the number of images, the batch and the net."""
    rows = [("images", f"{n:,}", config, n) for n in (36_480, 364_800, 3_648_000)]
    rows += [
        ("batch", size, replace(config, batch_size=size), 364_800) for size in (128, 512, 2048)
    ]
    nets = ("run1", "run8", "default", "large")
    rows += [("net", name, replace(config, arch=name), 364_800) for name in nets]
    print(f"\n{'varied':<8}{'':>11}{'s/epoch':>9}{'images/s':>10}{'peak MB':>9}")
    for what, value, changed, count in rows:
        data = repeat(split, count)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        figures = compare(changed, data, ranks, min(steps, count // changed.batch_size), 1)
        print(
            f"{what:<8}{value:>11}{figures['epoch']:>9.2f}{figures['ours']:>10,.0f}"
            f"{peak_megabytes(ranks.device):>9,.0f}",
            flush=True,
        )


def peak_megabytes(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU since its reset, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def time_to(target: float, config: Config, splits: tuple[Split, ...]) -> None:
    """Train with a short schedule; print when validation first reached the target."""
    train.load_splits = lambda *_: splits
    total = 0.0
    for entry in train.train(config, Stop())["history"]:
        total += entry["seconds"]
        if entry["accuracy"] >= target:
            print(f"{target} % on validation: {total:.1f} s, {entry['epoch']} of {config.epochs}")
            return
    print(f"{target} % on validation: not reached in {total:.1f} s, {config.epochs} epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arch", nargs="+", default=[Config.arch])
    parser.add_argument("--steps", type=int, default=40, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", type=float, help="accuracy on validation to time, per cent")
    parser.add_argument("--epochs", type=int, default=6, help="of the training to the target")
    parser.add_argument("--keep", action="store_true", help="write bench-cpu.json (or -cuda)")
    parser.add_argument("--curve", action="store_true", help="print the cost curve as well")
    args = parser.parse_args()

    out = Path("/tmp/train_speed.pt")
    config = Config(data=args.data, device=args.device, out=out, wandb=False)
    ranks = train.join_ranks(args.device)
    splits = train.load_splits(config, ranks)
    print(study.machine(ranks.device))
    kept = {}
    for arch in args.arch:
        run = replace(config, arch=arch)
        figures = compare(run, splits[0], ranks, args.steps, args.rounds)
        kept[arch] = figures | {"peak": peak_megabytes(ranks.device)}
        print(
            f"{arch}, batch {run.batch_size}: limit {figures['limit']:,.0f} images/s, "
            f"ours {figures['ours']:,.0f}, {100 * figures['ratio']:.1f} % of the limit; "
            f"{figures['epoch']:.2f} s per epoch; built in {figures['build']:.1f} s; "
            f"peak {kept[arch]['peak']:,.0f} MB",
            flush=True,
        )
    if args.keep:
        kind = ranks.device.type
        study.keep(f"bench-{kind}", "EMNIST sample", kept, kind)
    if args.target:
        time_to(args.target, replace(config, epochs=args.epochs), splits)
    if args.curve:
        cost_curve(replace(config, compile=False), splits[0], ranks, args.steps)


if __name__ == "__main__":
    main()
