"""Write the README's tables from the JSON files: python3 images_for_readme/tables.py

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; what is there is replaced.
So no figure of a table is typed by hand, and a test can say whether README and runs agree.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path.insert(0, str(HERE.parent))

import inference  # noqa: E402
import train  # noqa: E402

CLAIMED = dict(
    zip((f"run{i}" for i in range(1, 10)), (91, 92, 87, 71, 90, 91, 93, 94, 96), strict=True)
)
CHANGES = {
    "run1": "run1 net, batch 64, AdamW 1e-4, decay 0.1, torch's own initialisation",
    "run2": "the same with Xavier and a warm-up stage",
    "run3": "SGD 1e-4, batch 128, decay 1e-4",
    "run4": "Adagrad 1e-4",
    "run5": "Adam 1e-5",
    "run6": "AdamW 1e-5",
    "run7": "run7 net, AdamW 1e-4",
    "run8": "run8 net, batch 64",
    "run9": "run8 net, 30 epochs",
}
STEPS = {
    "0-origin": "the recipe of Runs 8 and 9",
    "1-schedule": "cosine to zero, from 1e-3 instead of 1e-4",
    "2-batch": "batch 512 instead of 64, at 3e-3",
    "3-decay": "weight decay 0.05 instead of 1e-4",
    "4-average": "the moving average of the weights",
    "5-net": "our net instead of run8's",
    "6-augment": "augmentation",
}
OPTIMIZERS = {"sgd": "SGD, momentum 0.9", "adagrad": "Adagrad", "adam": "Adam", "adamw": "AdamW"}
SEEDS = 3


def run(name: str) -> dict:
    return json.loads((HERE / "runs" / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[object]], words: int = 1) -> str:
    """Write a Markdown table; its first columns hold words, the others figures."""
    head = list(head)
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def headline() -> str:
    test, field = run("shipped")["test"], run("field")["rows"]["model.pt"]["mean of sets"]
    speed, gpu = run("bench-inference"), run("bench-gpu")
    rows = [
        ("all 36 classes, EMNIST sample", f"{test['accuracy']:.2f} % right, NLL {test['nll']:.3f}"),
        ("its digits, its letters", f"{test['digits']:.2f} %, {test['letters']:.2f} %"),
        (
            "when only digits, only letters can be answered",
            f"{test['digits_known']:.2f} %, {test['letters_known']:.2f} %",
        ),
        (
            "real pictures, mean of 8 sets; 0/O, 1/I/L merged; alphabet known",
            ", ".join(f"{value:.1f} %" for value in field),
        ),
        (
            "small PNGs, photos of 800x600",
            f"{speed['small']['ours']:,.0f} and {speed['photos']['ours']:,.0f} a second, 2 cores",
        ),
        (
            "a full training, start to weights",
            f"{gpu['full_run_seconds']:.0f} s on an H100 ({gpu['full_run_epochs']} epochs)",
        ),
    ]
    return table(("measured", "on a 215k-image sample of EMNIST, and on field sets"), rows, words=2)


def accuracy() -> str:
    shipped, rows = run("shipped"), []
    for key, text in train.FIGURES.items():
        digits = 4 if key in ("nll", "ece") else 2
        rows.append(
            (text, *(f"{shipped[split][key]:.{digits}f}" for split in ("validation", "test")))
        )
    seeds = [run(f"default-{seed}")["test"] for seed in range(5)]
    spread = [f"{min(s[k] for s in seeds):.{d}f} to {max(s[k] for s in seeds):.{d}f}"
              for k, d in (("accuracy", 2), ("nll", 4))]  # fmt: skip
    quick = shipped["test_int8"]
    return (
        table(("shipped weights", "validation", "test"), rows)
        + "\n\nIn float32. In the 8-bit integers that `inference.py` uses on a CPU with VNNI: "
        f"{quick['accuracy']:.2f} %, NLL {quick['nll']:.4f}, on test."
        + f"\n\nFive seeds of the same recipe: {spread[0]} % on test, NLL {spread[1]}; the one "
        "with the highest accuracy on validation, and on the field sets, is shipped."
    )


def field() -> str:
    scores, counts = run("field")["rows"]["model.pt"], run("field")["pictures"]
    rows = [
        (name, counts.get(name, ""), *(f"{value:.1f}" for value in values))
        for name, values in scores.items()
    ]
    return table(("set", "pictures", "accuracy, %", "alike, %", "alphabet, %"), rows)


def levers() -> str:
    scores = run("field")["rows"]
    names = {
        "lever-with-all": "all augmentations",
        "lever-without-warp": "without warping",
        "lever-without-stroke": "without thinner and thicker strokes",
        "lever-without-resolution": "without loss of resolution",
        "lever-without-tone": "without contrast, blur and grain",
        "lever-without-any": "none",
        "model.pt, unfitted": "shipped weights, picture only resized, not fitted",
        "origin-short, unfitted": "the origin's net and recipe (2 epochs), its way of reading",
        "origin-short": "the same net, pictures fitted by ours",
    }
    rows = []
    for name, text in names.items():
        if name in scores:
            path = HERE / "runs" / f"{name}.json"
            own = f"{json.loads(path.read_text())['test']['accuracy']:.2f}" if path.exists() else ""
            rows.append((text, *(f"{v:.1f}" for v in scores[name]["mean of sets"]), own))
    return table(("", "accuracy, %", "alike, %", "alphabet, %", "EMNIST test, %"), rows)


def sizes() -> str:
    rows = [
        (f"{row['px']} px", f"{row['ours']:.2f}", f"{row['origin']:.2f}",
         f"{row['origin_net_our_fit']:.2f}")
        for row in run("sizes")["rows"]
    ]  # fmt: skip
    epochs = run("origin-short")["settings"]["epochs"]
    head = ("side", "ours, %", f"origin's net and way ({epochs} epochs), %", "its net, our fit, %")
    return table(head, rows)


def framing() -> str:
    kept = run("framing")
    rows = [(f"{100 * row['share']:.0f} %", f"{row['first look']:.1f}", f"{row['second look']:.1f}")
            for row in kept["rows"]]  # fmt: skip
    head = ("character's share of the height", "first look, %", "and second, %")
    return table(head, rows) + f"\n\nn = {kept['n']} a row."


def coverage() -> str:
    kept, rows = run("coverage"), []
    for threshold in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        at = kept["thresholds"].index(threshold)
        cells = [f"{kept[s][c][at]:.1f}" for s in ("test", "field") for c in ("answered", "right")]
        rows.append((f"{threshold:g}", *cells))
    head = ("`--min-confidence`", "answered, test %", "right of them, %", "answered, field %",
            "right of them, %")  # fmt: skip
    errors = run("reliability")
    field = ", ".join(f"{name} {figures['ece']:.3f}" for name, figures in errors.items()
                      if isinstance(figures, dict) and "ece" in figures)  # fmt: skip
    return table(head, rows) + f"\n\nExpected calibration error, 15 bins: {field}."


def story() -> str:
    rows, right = [], {}
    cut = run("run9-cut-short")["history"]
    best = min(cut, key=lambda epoch: epoch["nll"])
    for name, claimed in CLAIMED.items():
        if name == "run9":
            right[name] = (
                f"{best['accuracy']:.2f} on validation, broken off after {len(cut)} epochs"
            )
        else:
            right[name] = f"{run(name)['test']['accuracy']:.2f}"
        rows.append((f"Run {name[3:]}", CHANGES[name], f"{claimed}", right[name]))
    head = ("run", "what", "claimed, %", "ours, test %")
    fair = {name: tested(f"fair-{name}") for name in OPTIMIZERS}
    lead = max(fair, key=lambda name: fair[name][0])
    near = [name for name, (_, _, high) in fair.items() if high >= fair[lead][1]]
    words = {name: text.split(",")[0] for name, text in OPTIMIZERS.items()}
    half, every, none = (run(f"explore-{n}")["test"]["accuracy"] for n in ("half", "all", "none"))
    return f"""The origin is told as nine runs. We repeated them with its settings to the letter (one
seed each, on an H100), its validation cut from train instead of test:

{table(head, rows, words=2)}

What holds, and what doesn't:

- *Xavier and a warm-up help*: not here. Run 2 ends at {right["run2"]} %, Run 1 without them at
  {right["run1"]} %. At a rate of 1e-4 for five epochs both are far from done.
- *AdamW is the best optimizer*: Runs 3-6 don't say so. Adam and AdamW had a tenth of the learning
  rate of SGD and Adagrad; at those rates SGD leads ({right["run3"]} %), and Adam and AdamW can't be
  told apart ({right["run5"]} and {right["run6"]} %). Each at its own best rate, below, {words[lead]} has the
  highest mean, but the seeds of {", ".join(words[name] for name in near)} overlap: no order follows.
- *More layers help*: yes, {right["run7"]} and {right["run8"]} % against {right["run6"]} to {right["run1"]} %.
- *96 % after 30 epochs*: our GPU time ended Run 9 after {len(cut)} of them. Its validation NLL was
  best at epoch {best["epoch"]} ({best["nll"]:.3f}, {best["accuracy"]:.2f} % right) and the loss on train kept
  falling: nothing points to 96 %.

The optimizers again, each at the best of four or five learning rates, chosen by NLL on validation
in runs of {length("grid-sgd-0.1")}; then {SEEDS} seeds of {length("fair-sgd-0")}, net run1:

{optimizers(fair)}

![The optimizers](images_for_readme/optimizers.png)

From the origin's recipe to ours, one change after another, each kept; {SEEDS} seeds of
{length("step-0-origin-0")} on two cores, so all are far from done and what needs time, the
augmentation above all, shows its cost and not its gain:

{steps()}

What it gains with time, 20 epochs of all pictures on an H100, one seed: augmenting every picture
{every:.2f} %, none {none:.2f} %, every other picture {half:.2f} %. On real pictures its gain is larger, see
the levers above; so is that of fitting, without which nothing of this matters there."""


def tested(name: str) -> tuple[float, float, float]:
    """Return mean, least and greatest test accuracy of a run's seeds, per cent."""
    figures = [run(f"{name}-{seed}")["test"]["accuracy"] for seed in range(SEEDS)]
    return sum(figures) / SEEDS, min(figures), max(figures)


def length(name: str) -> str:
    kept = run(name)
    pictures = kept["data"].removeprefix("EMNIST sample: ").split(" to learn")[0]
    return f"{kept['settings']['epochs']} epochs of {pictures}"


def optimizers(fair: dict[str, tuple[float, float, float]]) -> str:
    rows = [
        (OPTIMIZERS[name], f"{run(f'fair-{name}-0')['settings']['lr']:g}", f"{mean:.2f}",
         f"{low:.2f} to {high:.2f}")
        for name, (mean, low, high) in fair.items()
    ]  # fmt: skip
    return table(("optimizer", "its best rate", "test, mean %", "of the seeds, %"), rows)


def steps() -> str:
    rows, before = [], None
    for name, text in STEPS.items():
        mean, low, high = tested(f"step-{name}")
        gain = "" if before is None else f"{mean - before:+.2f}"
        rows.append((text, f"{mean:.2f}", f"{low:.2f} to {high:.2f}", gain))
        before = mean
    return table(("change", "test, mean %", "of the seeds, %", "gained, points"), rows)


def known() -> str:
    k = run("known")
    seeds = k["seeds"]
    return f"""How much of what is left is the task, not the net? {k["errors_within_groups"]:.0f} % of
the shipped net's errors on test are within a group of look-alikes ({", ".join(k["groups"])}). With
0/O and 1/I/L counted as one it is right in {k["accuracy_0O_1IL_merged"]:.2f} %, with all groups in
{k["accuracy_groups_merged"]:.2f} %, and when it is known whether a digit or a letter is shown in
{k["accuracy_alphabet_known"]:.2f} %. Two nets of different seeds give the same answer in
{seeds["agree"]:.1f} % of the pictures, and in {seeds["agree_where_wrong"]:.0f} % of those that the first
gets wrong; {seeds["all_wrong"]:.1f} % are wrong for all {seeds["nets"]}. Their ensemble reaches
{seeds["ensemble"]["accuracy"]:.2f} % (NLL {seeds["ensemble"]["nll"]:.4f}), one net {k["accuracy"]:.2f} %
({k["nll"]:.4f}). So the ceiling of the merged task seems to lie near {100 - seeds["all_wrong"]:.0f} %, and
the shipped net {100 - seeds["all_wrong"] - k["accuracy"]:.1f} points below it. A fivefold larger net was not
trained to the end: the time on a GPU was used up."""


def benchmarks() -> str:
    speed, gpu = run("bench-inference"), run("bench-gpu")
    parts = []
    rows = [
        (text, f"{f['pictures']:,}", f"{f['baseline']:,.0f}", f"{f['limit']:,.0f}",
         f"{f['ours']:,.0f}", f"{f['ratio']:.1f}x")
        for text, f in (("PNG 28x28", speed["small"]), ("JPEG 800x600", speed["photos"]))
    ]  # fmt: skip
    head = ("inference, 2 CPU cores", "pictures", "naive loop /s", "decoding alone /s", "ours /s",
            "ours : naive")  # fmt: skip
    parts.append(table(head, rows))
    parts.append(
        f"One picture, start to exit: {speed['startup']['ratio']:.2f} times `import torch`."
    )
    many = [(f"{r['done']:,}", f"{r['seconds']:.1f}", f"{r['rate']:,.0f}", f"{r['MB']:,.0f}")
            for r in speed["many"]]  # fmt: skip
    parts.append(table(("200,000 files: done", "seconds", "pictures/s since", "memory, MB"), many))
    cpu, baseline = run("bench-cpu"), run("bench-baseline")
    sooner = baseline["baseline_seconds"] / baseline["seconds"]
    rows = [
        ("2 CPU cores, default net: images/s, of the limit",
         f"{cpu['default']['ours']:,.0f}, {100 * cpu['default']['ratio']:.1f} %"),
        ("2 CPU cores, run8 net: images/s, of the limit",
         f"{cpu['run8']['ours']:,.0f}, {100 * cpu['run8']['ratio']:.1f} %"),
        (f"2 CPU cores, to the {baseline['baseline_accuracy']:.2f} % of 3 naive epochs over a quarter of the pictures",
         f"{baseline['seconds']:.0f} s against {baseline['baseline_seconds']:.0f} s, "
         f"{sooner:.1f} times sooner (at {baseline['accuracy']:.2f} %)"),
        ("H100, default net: images/s, of the limit",
         f"{gpu['images_per_second']:,}, {gpu['percent_of_limit']} %"),
        (f"H100, to {gpu['target_accuracy']} % on validation",
         f"{gpu['seconds_to_target']} s of training, {gpu['build_seconds']} s to compile"),
        ("H100, whole default command", f"{gpu['full_run_seconds']} s"),
        ("H100, peak memory", f"{gpu['peak_megabytes']} MB"),
    ]  # fmt: skip
    parts.append(table(("training", ""), rows, words=2))
    curve = [(*row[:2], f"{row[2]:.2f}", f"{row[3]:,}", f"{row[4]:,}") for row in gpu["cost"]]
    head = ("H100, not compiled", "", "s/epoch", "images/s", "peak MB")
    parts.append(table(head, curve, words=2))
    return "\n\n".join(parts)


def tests() -> str:
    kept = run("tests")
    rows = [
        (f"`{name}`", kept["why"][name], f"{lines:,}", f"{percent:.1f}")
        for name, (lines, percent) in kept["files"].items()
    ]
    return table(("script", "not covered", "statements", "covered, %"), rows, words=2)


def flags(parse: Callable) -> str:
    """Turn the help of a script, made by argparse, into a table."""
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        parse(["--help"])
    found = re.findall(r"^  (-.*?)(?:  +|\n +)(\S.*(?:\n {8,}.*)*)", text.getvalue(), re.MULTILINE)
    rows = [
        (
            f"`{flag}`",
            " ".join(words.split()).replace("|", "\\|").replace(str(HERE.parent) + "/", ""),
        )
        for flag, words in found
        if "--help" not in flag
    ]
    return table(("flag", "meaning"), rows, words=2)


BLOCKS = {
    "headline": headline,
    "accuracy": accuracy,
    "field": field,
    "levers": levers,
    "sizes": sizes,
    "framing": framing,
    "coverage": coverage,
    "story": story,
    "known": known,
    "benchmarks": benchmarks,
    "tests": tests,
    "inference flags": lambda: flags(inference.parse),
    "train flags": lambda: flags(train.parse),
}


def fill(text: str) -> str:
    """Return the README with every block written anew."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        text = before + begin + block() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    README.write_text(fill(README.read_text()))


if __name__ == "__main__":
    main()
