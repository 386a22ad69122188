"""Time train.py against the usual loop, to the accuracy that the usual loop reaches in 3 epochs.

    python3 tests/benchmarks/train_baseline.py --data data            # about 20 minutes on 2 cores

Baseline: our own short rewrite of what most scripts do: a DataLoader over torchvision's dataset,
per-image PIL transforms, batch 64, float32, AdamW at 1e-4, `.item()` every step, the run8 net. Both
are timed in one process, first the one, then the other, and judged on the same validation pictures.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import ConcatDataset, DataLoader, Subset

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "images_for_readme")]

import study  # noqa: E402

import train  # noqa: E402
from CNN import ORIGIN, Net  # noqa: E402

# train.py's settings for a short run of the same net, each picture seen once at most
SHORT = {
    "arch": "run8", "batch_size": 128, "lr": 4e-3, "warmup": 100, "augment": "none", "ema": 0.98,
}  # fmt: skip


def loader(data: Path, fraction: float) -> DataLoader:
    """Return what the usual script iterates over, validation pictures left out."""
    from PIL import Image
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.Lambda(lambda picture: Image.fromarray(np.array(picture).T)),
            transforms.ToTensor(),
            transforms.Normalize((ORIGIN["mean"],), (ORIGIN["std"],)),
        ]
    )
    digits = datasets.EMNIST(str(data), split="digits", train=True, transform=transform)
    letters = datasets.EMNIST(
        str(data), split="letters", train=True, transform=transform,
        target_transform=lambda label: label + train.LETTER_OFFSET,
    )  # fmt: skip
    kept = (~train.held_out(train.read_emnist(data, train=True).images)).nonzero().flatten()
    kept = kept[torch.randperm(len(kept))[: int(fraction * len(kept))]]
    return DataLoader(Subset(ConcatDataset([digits, letters]), kept), batch_size=64, shuffle=True)


class Naive(Net):
    """The origin's net, fed with pictures that its loader has normalised already."""

    def __init__(self) -> None:
        super().__init__("run8", mean=0.0, std=1.0)


def baseline(data: Path, epochs: int, fraction: float, validation: train.Split) -> tuple:
    """Train the usual way; return seconds, images/s and accuracy on validation."""
    net, batches = Naive(), loader(data, fraction)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=1e-4)
    start = time.perf_counter()
    total = 0.0
    for _ in range(epochs):
        net.train()
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    seconds = time.perf_counter() - start
    net.mean, net.std = ORIGIN["mean"], ORIGIN["std"]
    accuracy = train.measure(
        train.predict(net, validation.images, torch.float32), validation.labels
    )
    return seconds, epochs * len(batches) * 64 / seconds, accuracy["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=3, help="of the baseline")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training pictures")
    parser.add_argument(
        "--ours", type=float, default=0.8, help="part of the pictures that ours sees, once"
    )
    parser.add_argument("--keep", action="store_true", help="write bench-baseline.json")
    args = parser.parse_args()
    torch.manual_seed(0)

    config = train.Config(data=args.data, device="cpu", wandb=False, epochs=1, **SHORT)
    ranks = train.join_ranks("cpu")
    training, validation, test = train.load_splits(config, ranks)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    seconds, rate, accuracy = baseline(args.data, args.epochs, args.fraction, validation)
    print(
        f"baseline: {accuracy:.2f} % on validation after {seconds:.0f} s, {rate:,.0f} images/s",
        flush=True,
    )
    part = train.Split(*(t[torch.randperm(len(t), generator=torch.Generator().manual_seed(1))][
        : int(args.ours * len(t))] for t in training))  # fmt: skip
    train.load_splits = lambda *_: (part, validation, test)
    out = Path("/tmp/train_baseline.pt")
    start = time.perf_counter()
    entry = train.train(replace(config, out=out))["history"][-1]
    whole = time.perf_counter() - start
    print(
        f"ours: {entry['accuracy']:.2f} % on validation after {entry['seconds']:.0f} s, "
        f"{whole:.0f} s with evaluation; {seconds / entry['seconds']:.1f} times sooner"
        + ("" if entry["accuracy"] >= accuracy else " BUT LESS ACCURATE: raise --ours"),
        flush=True,
    )
    if args.keep:
        kept = {"baseline_accuracy": accuracy, "baseline_seconds": seconds, "baseline_rate": rate}
        kept |= {"accuracy": entry["accuracy"], "seconds": entry["seconds"], "whole": whole}
        study.keep("bench-baseline", "EMNIST sample", kept)


if __name__ == "__main__":
    main()
