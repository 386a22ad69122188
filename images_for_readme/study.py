"""The study: its records, and the tables of both READMEs.

    python3 -m images_for_readme.study train run9 --data data     # repeat a run of the study
    python3 -m images_for_readme.study train mine --arch large    # a new one, with train.py's flags
    python3 -m images_for_readme.study card --extra unipen_pictures/pictures.csv  # no training
    python3 -m images_for_readme.study measure                    # model.pt, every part
    python3 -m images_for_readme.study measure field --model mine.pt --name field-mine
    python3 -m images_for_readme.study draw                       # the pictures, from the records
    python3 -m images_for_readme.study tables                     # the tables, from the records

Every run and measurement is a line of runs.jsonl; one made again replaces its line.
"""

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import CNN
import train
from images_for_readme import drawings, original, tables
from images_for_readme.measure import PARTS, ROOT

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "runs.jsonl"
PAGES = (ROOT / "README.md", HERE / "README.md")
original.register()

# Records


def read_records() -> dict[str, dict]:
    """Return all records by name, in the order of the file."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return {record["name"]: record for record in records}


def keep(name: str, data: str, content: dict, device: str | torch.device = "cpu") -> None:
    """Write the record of what this command has found; it replaces the one of that name.

    content: metrics and the like, what is None left out. Floats keep six digits. A benchmark has
    the digest of model.pt in its settings, as what `measure` writes has that of its weights.
    """
    records = read_records()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    record = {
        "name": name,
        "kind": "benchmark",
        "what": name,
        "command": shlex.join(["python3", *sys.orig_argv[1:]]),
        "machine": name_machine(device),
        "data": data,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "settings": {"weights": "model.pt", "sha256": digest(ROOT / "model.pt")},
    }
    for key in ("kind", "what", "claimed"):
        if key in records.get(name, {}):
            record[key] = records[name][key]
    record |= {key: value for key, value in content.items() if value is not None}
    text = json.dumps(record)
    records[name] = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records.values()))


def name_machine(device: str | torch.device) -> str:
    """Name what a run was made on."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{cpu[1] if cpu else 'CPU'}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def measure(part: str, args: argparse.Namespace) -> None:
    """Measure a part and keep its record, with the digest of the weights."""
    sha256 = digest(args.model)
    settings = {"weights": args.model.name, "flags": args.flags, "sha256": sha256}
    about = {"kind": "measured", "what": args.what, "settings": settings}
    flags = ["--model", str(args.model.resolve()), *args.flags]
    args = argparse.Namespace(**vars(args) | {"flags": flags})
    with tempfile.TemporaryDirectory() as scratch:
        data, content = PARTS[part](args, Path(scratch))
    keep(args.name or part, data, about | content)


# Trainings


def find_config(record: dict) -> train.Config:
    """Return the settings of a run as train.py understands them."""
    flags = []
    for name, value in record["settings"].items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "one_in":  # it is the study's own
            flags += [f"--{flag}", str(value)]
    return train.parse(flags)


def list_settings(config: train.Config) -> dict[str, object]:
    """Return all that makes a run what it is, defaults too, as they may change."""
    settings = {name: value for name, value in config.recipe.items() if value != "None"}
    if config.extra is None:
        del settings["extra_fraction"]
    return settings


def train_run(name: str, args: argparse.Namespace) -> None:
    """Train a run: with the flags of train.py, or without any as its record says."""
    if args.flags:
        config = train.parse(args.flags)
        one_in = args.one_in
    else:
        record = read_records()[name]
        config = find_config(record)
        one_in = record["settings"].get("one_in", 1)
    args.weights.mkdir(parents=True, exist_ok=True)
    out = args.weights / f"{name}.pt"
    config = replace(config, data=args.data, out=out, wandb=False, resume=True)
    load_splits = train.load_splits

    def load_some(*arguments: object) -> tuple[CNN.Split, ...]:
        training, *others = load_splits(*arguments)
        images = training.images[::one_in]
        labels = training.labels[::one_in]
        return training._replace(images=images, labels=labels), *others

    start = time.monotonic()
    with patch.object(train, "load_splits", load_some):
        results = train.train(config)
    every = -(-len(results["history"]) // 50)  # a curve has 50 points at most
    history = results["history"][::every]
    content = {
        "kind": "run",
        "what": args.what,
        "settings": list_settings(config) | {"one_in": one_in},
        "seconds": time.monotonic() - start,
        "validation": results["validation"],
        "test": results["test"],
        "curve": {key: [epoch[key] for epoch in history] for key in ("loss", "accuracy", "nll")},
    }
    data = "EMNIST sample" if one_in == 1 else f"EMNIST sample, one in {one_in} of train"
    keep(name, data, content, CNN.choose_device(config.device))


def write_card(args: argparse.Namespace) -> None:
    """Write a weights file with its class statistics and digit prior found anew, without training.

    Its flags are those of train.py that say what it was trained on. Its calibration stays: a second
    one would let the bias of the last layer drift.
    """
    config = train.parse(["--data", str(args.data), *args.flags])
    machine = train.set_up(config)
    training, validation, _ = train.load_splits(config, machine)
    content = CNN.read_saved(args.model)  # CNN.load would refuse statistics of another version
    net = CNN.Net(content["arch"]).to(machine.device)
    net.load_state_dict(content["state_dict"])
    CNN.fill_card(net, training, validation, machine.precision)
    net.load_state_dict(content["state_dict"])
    for name in ("temperature", "lookalikes", "metrics", "credit"):
        setattr(net.card, name, content[name])
    CNN.save(net, args.model)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what it doesn't know is meant for train.py or inference.py."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("do", choices=("train", "card", "measure", "draw", "tables"))
    add("names", nargs="*", help="of a run, of parts to measure, of pictures [all but report]")
    add("--data", type=Path, default=Path("data"), help="folder of EMNIST")
    add("--weights", type=Path, default=Path("data/study"), help="folder for what train writes")
    add("--one-in", type=int, default=1, help="learn from every N-th picture only")
    add("--model", type=Path, default=ROOT / "model.pt", help="what is measured")
    shared = ROOT.parent / "shared"
    add("--field", type=Path, default=shared / "field", help="labelled: SET/CHARACTER/PICTURE")
    add("--scenes", type=Path, default=shared / "scenes" / "draw.py", help="draws and scores them")
    add("--forms", type=Path, default=shared / "forms" / "draw.py", help="draws and scores them")
    add("--name", help="of the record, where it isn't the part's")
    add("--what", help="one line for the tables")
    args, flags = parser.parse_known_args(argv)
    args.flags = flags
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.do == "train":
        train_run(args.names[0], args)
    elif args.do == "card":
        write_card(args)
    elif args.do == "measure":
        for part in args.names or PARTS:
            measure(part, args)
    elif args.do == "draw":
        for name in args.names or drawings.DRAWINGS:
            drawings.draw(name, read_records(), HERE)
    else:
        for page in PAGES:
            page.write_text(tables.fill(page.read_text(), read_records()))


if __name__ == "__main__":
    main()
