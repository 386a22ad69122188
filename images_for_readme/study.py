"""Make the runs of the study: the origin's nine, and the fair ones that came after.

    python3 images_for_readme/study.py --data data                 # what is missing, one by one
    python3 images_for_readme/study.py --data data --workers 6     # several at a time on one GPU

Each finished run leaves images_for_readme/runs/NAME.json, committed: its settings, figures of every
epoch on validation, figures on test, machine. A run whose file is there is not made again, so the
command can be broken off and repeated. Weights go to --weights, where measure.py finds them.
"""

import argparse
import json
import platform
import re
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import train  # noqa: E402

RUNS = HERE / "runs"
SEEDS = (0, 1, 2)

# The origin's settings. Its warm-up was 200 or 500 extra steps of another optimizer at a tenth of
# the rate; ours are the first steps of the same one. Run 9 was made on a CPU, so in bfloat16.
ORIGIN = {
    "arch": "run1", "epochs": 5, "batch_size": 128, "lr": 1e-4, "weight_decay": 1e-4,
    "warmup": 500, "schedule": "constant", "augment": "none", "ema": 0.0, "precision": "float32",
}  # fmt: skip
NINE = {
    "run1": {"batch_size": 64, "weight_decay": 0.1, "xavier": False, "warmup": 0},
    "run2": {"batch_size": 64, "weight_decay": 0.1, "warmup": 200},
    "run3": {"optimizer": "sgd"},
    "run4": {"optimizer": "adagrad"},
    "run5": {"optimizer": "adam", "lr": 1e-5},
    "run6": {"optimizer": "adamw", "lr": 1e-5},
    "run7": {"arch": "run7"},
    "run8": {"arch": "run8", "batch_size": 64},
    "run9": {"arch": "run8", "batch_size": 64, "epochs": 30, "precision": "auto"},
}
# What fits two cores: fewer pictures and epochs, so a shorter warm-up, and bfloat16.
SMALL = {"one_in": 6, "epochs": 2, "warmup": 100, "precision": "auto"}
SHORT = {"one_in": 4, "epochs": 4, "warmup": 100, "precision": "auto"}
GRID = {  # learning rates tried for each optimizer, SMALL runs, judged on validation
    "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "adagrad": (3e-3, 1e-2, 3e-2, 1e-1),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
# From the recipe of Runs 8 and 9 to the default, one change after another, each kept.
STEPS = {
    "0-origin": {},
    "1-schedule": {"schedule": "cosine", "lr": 1e-3},
    "2-batch": {"batch_size": 512, "lr": 3e-3},
    "3-decay": {"weight_decay": 0.05},
    "4-average": {"ema": 0.999},
    "5-net": {"arch": "default"},
    "6-augment": {"augment": train.Config.augment},
}
# The default without one augmentation each, for what it does on real pictures.
LEVERS = {
    f"without-{name}": {"augment": ",".join(n for n in train.AUGMENTATIONS if n != name)}
    for name in train.AUGMENTATIONS
} | {"with-all": {}, "without-any": {"augment": "none"}}


def plan() -> dict[str, dict]:
    """Return the settings of every run by its name, those that depend on others' results last."""
    runs = {name: ORIGIN | changes for name, changes in NINE.items()}
    runs |= {f"default-{seed}": {"seed": seed} for seed in range(5)}
    # What a net of five times the weights adds, at a quarter of the epochs: two cores again.
    runs |= {f"size-{arch}": {"arch": arch, "epochs": 5} for arch in ("large", "default")}
    runs |= {f"lever-{name}": {"epochs": 10} | changes for name, changes in LEVERS.items()}
    # The origin's recipe for comparisons on other pictures, short, for two cores.
    runs["origin-short"] = runs["run8"] | {"epochs": 2, "precision": "auto"}
    for seed in SEEDS:
        settings = runs["run8"] | SHORT | {"one_in": 6, "epochs": 3}
        for name, changes in STEPS.items():
            settings = settings | changes
            runs[f"step-{name}-{seed}"] = settings | {"seed": seed}
    for optimizer, rates in GRID.items():
        for rate in rates:
            settings = {"optimizer": optimizer, "lr": rate}
            runs[f"grid-{optimizer}-{rate:g}"] = ORIGIN | SMALL | settings
    return runs


def fair_plan() -> dict[str, dict]:
    """Return the SHORT runs of each optimizer at its best rate of the grid, where that is made."""
    runs = {}
    for optimizer, rates in GRID.items():
        grid = {f"grid-{optimizer}-{rate:g}": rate for rate in rates}
        if all((RUNS / f"{name}.json").exists() for name in grid):
            best = {"optimizer": optimizer, "lr": grid[min(grid, key=validation_nll)]}
            runs |= {f"fair-{optimizer}-{s}": ORIGIN | SHORT | best | {"seed": s} for s in SEEDS}
    return runs


def validation_nll(name: str) -> float:
    """Return by what a run is judged: its least NLL on validation, that of the weights kept."""
    return min(epoch["nll"] for epoch in record(name)["history"])


def record(name: str) -> dict:
    """Read the JSON of a run."""
    return json.loads((RUNS / f"{name}.json").read_text())


def machine(device: torch.device) -> str:
    """Name what a run was made on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        system = Path("/proc/cpuinfo")
        model = re.search("model name.*: (.*)", system.read_text()) if system.exists() else None
        name = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


_SPLITS = None  # read once per process, not once per run


def make(name: str, settings: dict, data: Path, weights: Path) -> str:
    """Train one run and write its JSON."""
    global _SPLITS
    if _SPLITS is None:
        first = train.Config(data=data)
        _SPLITS = train.load_splits(first, train.join_ranks(first.device))
    settings = dict(settings)
    one_in = settings.pop("one_in", 1)
    learnt = train.Split(*(part[::one_in] for part in _SPLITS[0]))
    train.load_splits = lambda *_: (learnt, *_SPLITS[1:])
    train.say = lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)
    config = train.Config(
        data=data, out=weights / f"{name}.pt", wandb=False, resume=True,
        compile=None if settings.get("arch", "default") in ("default", "large") else False,
        **settings,
    )  # fmt: skip
    config.out.unlink(missing_ok=True)  # or a run whose record is gone would count as done
    start = time.monotonic()
    results = train.train(config)
    made = {
        "settings": train.bound_settings(config) | {"one_in": one_in},
        "seconds": round(time.monotonic() - start, 1),
        "machine": machine(_SPLITS[0].images.device),
        "data": f"EMNIST sample: {len(learnt.labels):,} pictures to learn from, "
        f"{len(_SPLITS[1].labels):,} validation, {len(_SPLITS[2].labels):,} test",
        **{key: results[key] for key in ("validation", "test", "history", "confusion")},
    }
    write(name, made)
    return f"{name}: {results['test']['accuracy']:.2f} % on test"


def write(name: str, made: dict) -> None:
    """Keep the record of a run as RUNS/NAME.json, whole or not at all."""
    RUNS.mkdir(exist_ok=True)
    part = RUNS / f".{name}.part"
    part.write_text(json.dumps(_rounded(made)) + "\n")
    part.replace(RUNS / f"{name}.json")


def keep(name: str, data: str, figures: dict, device: str = "cpu") -> None:
    """Keep what the command that runs measured, with how and where."""
    settings, where = {"command": shlex.join(["python3", *sys.argv])}, machine(torch.device(device))
    write(name, {"settings": settings, "machine": where, "data": data} | figures)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("data/study"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default="", help="make only runs whose name starts so, by comma")
    args = parser.parse_args()
    args.weights.mkdir(parents=True, exist_ok=True)
    wanted = tuple(args.only.split(","))
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for runs in (plan, fair_plan):  # the second reads what the first has written
            missing = {
                name: settings
                for name, settings in runs().items()
                if name.startswith(wanted) and not (RUNS / f"{name}.json").exists()
            }
            jobs = [pool.submit(make, n, s, args.data, args.weights) for n, s in missing.items()]
            for job in as_completed(jobs):
                print(job.result(), flush=True)


if __name__ == "__main__":
    main()
