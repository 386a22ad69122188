"""The original project's nets, named after the runs that its README tells of; its weights file.

    original.register()                                      # from here on --arch run1 is known
    python3 -m images_for_readme.original theirs.pt ours.pt --data data

The command reads a file of the original project's train.py, calibrates its net as ours are, and
writes a weights file of ours, for the study to measure.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import CNN
import train
from CNN import ALPHABET, ARCHITECTURES, Net


@dataclass(frozen=True)
class Layers:
    """Layers by their names in torch.nn: those of each of two blocks, and those of a head."""

    block: str
    head: str = ""


LAYERS = {
    "run1": Layers("Conv2d ReLU BatchNorm2d Dropout MaxPool2d"),
    "run7": Layers(
        "Conv2d ReLU Conv2d ReLU BatchNorm2d MaxPool2d Dropout", "Linear BatchNorm1d ReLU Dropout"
    ),
    "run8": Layers(
        "Conv2d ReLU Conv2d ReLU BatchNorm2d MaxPool2d BatchNorm2d Dropout",
        "Linear ReLU BatchNorm1d Linear ReLU BatchNorm1d Dropout",
    ),
}


def build_layers(names: str, inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """Build the named layers; the first one with weights takes `inputs`, all give `outputs`."""
    layers = []
    for name in names.split():
        arguments = {
            "Conv2d": (inputs, outputs, 5),
            "Linear": (inputs, outputs),
            "BatchNorm2d": (outputs,),
            "BatchNorm1d": (outputs,),
            "MaxPool2d": (2,),
            "ReLU": (),
            "Dropout": (dropout,),
        }
        layers.append(getattr(nn, name)(*arguments[name]))
        if name in ("Conv2d", "Linear"):
            inputs = outputs
    return nn.Sequential(*layers)


def build(layers: Layers, dropout: float) -> tuple[nn.Module, ...]:
    """Build what `Net` asks an architecture for; the sides are 28, 12 or 10, and 4 or 1 px."""
    layer1 = build_layers(layers.block, 1, 32, dropout)
    layer2 = build_layers(layers.block, 32, 64, dropout)
    flat = 64 if layers.head else 64 * 4 * 4
    fc1 = build_layers(layers.head, flat, 1024, dropout)
    return layer1, layer2, fc1, nn.Linear(1024, len(ALPHABET))


def register() -> None:
    """Let train.py and CNN.py know these nets, in this process."""
    ARCHITECTURES.update({name: partial(build, layers) for name, layers in LAYERS.items()})


def load(path: Path) -> Net:
    """Read the original project's run8, of which the last of 37 outputs was never trained."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    net = Net("run8")
    net.card.mean = 0.1307  # of MNIST, as the original project took them
    net.card.std = 0.3081
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in content.items()}
    for name in ("fc2.weight", "fc2.bias"):
        state[name] = state[name][: len(ALPHABET)]
    net.load_state_dict(state)
    return net.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("theirs", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of EMNIST")
    args = parser.parse_args(argv)
    register()
    net = load(args.theirs)
    config = train.Config(data=args.data, device="cpu")
    machine = train.set_up(config)
    training, validation, _ = train.load_splits(config, machine)
    print(CNN.fill_card(net, training, validation, machine.precision))
    CNN.save(net, args.ours)


if __name__ == "__main__":
    main()
