"""Write the README's tables from the JSON files: python3 images_for_readme/tables.py

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; what is there is replaced.
So no figure of a table is typed by hand, and a test can say whether README and runs agree.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from study import SEEDS, record  # noqa: E402

import CNN  # noqa: E402
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


def table(head: Iterable[str], rows: Iterable[Iterable[object]], words: int = 1) -> str:
    """Write a Markdown table; its first columns hold words, the others figures."""
    head = list(head)
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def headline() -> str:
    test, field = record("shipped")["test"], record("field")["rows"]["model.pt"]["mean of sets"]
    speed, gpu = record("bench-inference"), record("bench-gpu")
    cpu = record("bench-cpu")["default"]
    rows = [
        ("all 36 classes, EMNIST sample", f"{test['accuracy']:.2f} % right, NLL {test['nll']:.3f}"),
        ("its digits, its letters", f"{test['digits']:.2f} %, {test['letters']:.2f} %"),
        (
            "when only digits, only letters can be answered",
            f"{test['digits_known']:.2f} %, {test['letters_known']:.2f} %",
        ),
        (
            "real pictures, mean of 8 sets (tuned on, not trained on); 0/O, 1/I/L merged; "
            "alphabet known",
            ", ".join(f"{value:.1f} %" for value in field),
        ),
        (
            "small PNGs, photos of 800x600",
            f"{speed['small']['ours']:,.0f} and {speed['photos']['ours']:,.0f} a second, 2 cores",
        ),
        (
            "a full training, start to weights",
            f"{gpu['full_run_seconds']:.0f} s on an H100 ({gpu['full_run_epochs']} epochs); at the "
            f"speed of 2 CPU cores {cpu['epoch'] * gpu['full_run_epochs'] / 60:.0f} minutes",
        ),
    ]
    return table(("measured", "on a 215k-image sample of EMNIST, and on field sets"), rows, words=2)


def accuracy() -> str:
    shipped, rows = record("shipped"), []
    for key, text in train.FIGURES.items():
        digits = 4 if key in ("nll", "ece") else 2
        rows.append(
            (text, *(f"{shipped[split][key]:.{digits}f}" for split in ("validation", "test")))
        )
    seeds = [record(f"default-{seed}")["test"] for seed in range(5)]
    spread = [f"{min(s[k] for s in seeds):.{d}f} to {max(s[k] for s in seeds):.{d}f}"
              for k, d in (("accuracy", 2), ("nll", 4))]  # fmt: skip
    scores, quick = record("field")["rows"], shipped["test_int8"]
    field = [scores[f"default-{seed}"]["mean of sets"][0] for seed in range(5)]
    return f"""{table(("shipped weights", "validation", "test"), rows)}

In float32. In the 8-bit integers that `inference.py` uses on a CPU with VNNI: {quick["accuracy"]:.2f} %,
NLL {quick["nll"]:.4f}, on test.

Five seeds of the same recipe: {spread[0]} % on test, NLL {spread[1]}, {min(field):.1f} to {max(field):.1f} % on the
field sets. The one with the highest accuracy on validation, and on the field sets, is shipped."""


def field() -> str:
    scores, counts = record("field")["rows"]["model.pt"], record("field")["pictures"]
    rows = [
        (name, counts.get(name, ""), *(f"{value:.1f}" for value in values))
        for name, values in scores.items()
    ]
    return f"""{len(counts)} sets by other hands, pens and devices, {sum(counts.values()):,} pictures that were never trained on but
were tuned on: photographed pen, tablet strokes, canvas drawings, scans of 16x8, 32x32 and 8x8 px.

{table(("set", "pictures", "accuracy, %", "alike, %", "alphabet, %"), rows)}"""


def levers() -> str:
    scores = record("field")["rows"]
    names = {
        "lever-with-all": "all augmentations",
        "lever-without-warp": "without warping",
        "lever-without-stroke": "without thinner and thicker strokes",
        "lever-without-resolution": "without loss of resolution",
        "lever-without-tone": "without contrast, blur and grain",
        "lever-without-any": "none",
        "model.pt, unfitted": "shipped weights, picture only resized, not fitted",
        "origin-short, transposed": "the origin's net and recipe (2 epochs), its way of reading",
        "origin-short, unfitted": "the same net, pictures left upright, only resized",
        "origin-short": "the same net, pictures fitted by ours",
    }
    rows = []
    for name, text in names.items():
        own = "" if ", " in name else f"{record(name)['test']['accuracy']:.2f}"
        rows.append((text, *(f"{v:.1f}" for v in scores[name]["mean of sets"]), own))
    return table(("", "accuracy, %", "alike, %", "alphabet, %", "EMNIST test, %"), rows)


def sizes() -> str:
    rows = [
        (f"{row['px']} px", f"{row['ours']:.2f}", f"{row['origin']:.2f}",
         f"{row['origin_net_our_fit']:.2f}")
        for row in record("sizes")["rows"]
    ]  # fmt: skip
    epochs = record("origin-short")["settings"]["epochs"]
    head = ("side", "ours, %", f"origin's net and way ({epochs} epochs), %", "its net, our fit, %")
    return table(head, rows)


def framing() -> str:
    kept = record("framing")
    rows = [(f"{100 * row['share']:.0f} %", f"{row['first look']:.1f}", f"{row['second look']:.1f}")
            for row in kept["rows"]]  # fmt: skip
    head = ("character's share of the height", "first look, %", "and second, %")
    return table(head, rows) + f"\n\nn = {kept['n']} a row."


def coverage() -> str:
    kept, rows = record("coverage"), []
    for threshold in (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        at = kept["thresholds"].index(threshold)
        cells = [f"{kept[s][c][at]:.1f}" for s in ("test", "field") for c in ("answered", "right")]
        rows.append((f"{threshold:g}", *cells))
    head = ("`--min-confidence`", "answered, test %", "right of them, %", "answered, field %",
            "right of them, %")  # fmt: skip
    kept, sets = record("reliability"), record("field")["pictures"]
    errors = {name: kept[name]["ece"] for name in sets}
    each = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    return f"""{table(head, rows)}

The field's pictures are pooled here. Expected calibration error, {train.ECE_BINS} bins: {kept["test"]["ece"]:.3f} on test;
{each};
their mean is {sum(errors.values()) / len(errors):.3f}."""


def story() -> str:
    right = {name: f"{record(name)['test']['accuracy']:.2f}" for name in CLAIMED}
    rows = [
        (f"Run {name[3:]}", CHANGES[name], claimed, right[name])
        for name, claimed in CLAIMED.items()
    ]
    head = ("run", "what", "claimed, %", "ours, test %")
    longest, earlier = (record(name)["history"] for name in ("run9", "run9-cut-short"))
    best = min(longest, key=lambda epoch: epoch["nll"])
    apart = [abs(a["accuracy"] - b["accuracy"]) for a, b in zip(longest, earlier, strict=False)]
    _, least, most = on_test("default", range(5))
    changed, clean = (record(f"lever-{name}") for name in ("with-all", "without-any"))
    fair = {name: on_test(f"fair-{name}") for name in OPTIMIZERS}
    lead = max(fair, key=lambda name: fair[name][0])
    near = [name for name, (_, _, high) in fair.items() if high >= fair[lead][1]]
    words = {name: text.split(",")[0] for name, text in OPTIMIZERS.items()}
    scores = record("field")["rows"]
    fitted, unfitted = (scores[f"model.pt{how}"]["mean of sets"][0] for how in ("", ", unfitted"))
    half, every, none = (
        record(f"explore-{n}")["test"]["accuracy"] for n in ("half", "all", "none")
    )
    return f"""The origin is told as nine runs. We repeated them with its settings, but with 36 outputs, EMNIST's
mean and deviation, validation cut from train instead of test, and a warm-up of the same optimizer
instead of another. One seed each, in float32 on an H100; Run 9 in bfloat16 on one CPU core:

{table(head, rows, words=2)}

What holds, and what doesn't:

- *Xavier and a warm-up help*: not here. Run 2 ends at {right["run2"]} %, Run 1 without them at
  {right["run1"]} %. At a rate of 1e-4 for five epochs both are far from done.
- *AdamW is the best optimizer*: Runs 3-6 don't say so. Adam and AdamW had a tenth of the learning
  rate of SGD and Adagrad; at those rates SGD leads ({right["run3"]} %), and Adam and AdamW can't be
  told apart ({right["run5"]} and {right["run6"]} %). Each at its own best rate, below, {words[lead]} has the
  highest mean, but the seeds of {", ".join(words[name] for name in near)} overlap: no order follows.
- *More layers help*: yes. AdamW at 1e-4 takes run1's net to {right["run1"]} and {right["run2"]} % (Runs 1 and 2), run7's
  to {right["run7"]} % and run8's to {right["run8"]} %, though batch and weight decay changed with them.
- *96 % after 30 epochs*: no. Run 9 ends at {right["run9"]} %. Its NLL on validation was least after epoch
  {best["epoch"]} ({best["nll"]:.3f}), those weights are the ones kept; by epoch {len(longest)} it is {longest[-1]["nll"]:.3f}, while the loss on
  train falls on, from {best["loss"]:.3f} to {longest[-1]["loss"]:.3f}. (In float32 on an H100 it was broken off after {len(earlier)}
  epochs; until there the two differ by {sum(apart) / len(apart):.2f} points on validation in the mean.)

The optimizers again, each at the best of four or five learning rates, chosen by NLL on validation
in runs of {length("grid-sgd-0.1")}; then {len(SEEDS)} seeds of {length("fair-sgd-0")}, net run1:

{optimizers(fair)}

![The optimizers](images_for_readme/optimizers.png)

From the origin's recipe to ours, one change after another, each kept; {len(SEEDS)} seeds of
{length("step-0-origin-0")} on two cores, so all are far from done:

{steps()}

The schedule and the net gain. A larger batch buys speed on a GPU, not accuracy; weight decay and
the average show nothing at this length. The augmentation costs here, and after 10 epochs of all
pictures on an H100 (one seed) gives {changed["test"]["accuracy"]:.2f} % on test against {clean["test"]["accuracy"]:.2f} % without it, {changed["validation"]["accuracy"]:.2f} against
{clean["validation"]["accuracy"]:.2f} % on validation: nothing to speak of on EMNIST; it is there for real pictures, see the
levers above. Augmenting only every other picture is what keeps it from costing: with an early
version of it, 20 epochs, all pictures augmented gave {every:.2f} %, none {none:.2f} %, every other one
{half:.2f} %. Fitting is not in the table, for EMNIST's pictures need none; without it {unfitted:.0f} % of
the real pictures are read rightly instead of {fitted:.0f} %.

At full length, 20 epochs instead of 30, all of it together gives {least:.2f} to {most:.2f} % (five seeds)
where Run 9 has {right["run9"]} %."""


def on_test(name: str, seeds: Iterable[int] = SEEDS) -> tuple[float, float, float]:
    """Return mean, least and greatest test accuracy of a run's seeds, per cent."""
    figures = [record(f"{name}-{seed}")["test"]["accuracy"] for seed in seeds]
    return sum(figures) / len(figures), min(figures), max(figures)


def length(name: str) -> str:
    """Say how long a run was: epochs and pictures."""
    kept = record(name)
    pictures = kept["data"].removeprefix("EMNIST sample: ").split(" to learn")[0]
    return f"{kept['settings']['epochs']} epochs of {pictures}"


def optimizers(fair: dict[str, tuple[float, float, float]]) -> str:
    rows = [
        (OPTIMIZERS[name], f"{record(f'fair-{name}-0')['settings']['lr']:g}", f"{mean:.2f}",
         f"{low:.2f} to {high:.2f}")
        for name, (mean, low, high) in fair.items()
    ]  # fmt: skip
    return table(("optimizer", "its best rate", "test, mean %", "of the seeds, %"), rows)


def steps() -> str:
    rows, before = [], None
    for name, text in STEPS.items():
        mean, low, high = on_test(f"step-{name}")
        gain = "" if before is None else f"{mean - before:+.2f}"
        rows.append((text, f"{mean:.2f}", f"{low:.2f} to {high:.2f}", gain))
        before = mean
    return table(("change", "test, mean %", "of the seeds, %", "gained, points"), rows)


def known() -> str:
    k, big, small = (record(name) for name in ("known", "size-large", "size-default"))
    seeds, gain = k["seeds"], big["test"]["accuracy"] - small["test"]["accuracy"]
    large, ours = (
        sum(p.numel() for p in CNN.Net(arch).parameters()) for arch in ("large", "default")
    )
    return f"""How much of what is left is the task, not the net? {k["errors_within_groups"]:.0f} % of
the shipped net's errors on test are within a group of look-alikes ({", ".join(k["groups"])}). With
0/O and 1/I/L counted as one it is right in {k["accuracy_0O_1IL_merged"]:.2f} %, with all groups in
{k["accuracy_groups_merged"]:.2f} %, and when it is known whether a digit or a letter is shown in
{k["accuracy_alphabet_known"]:.2f} %. Two nets of different seeds give the same answer in
{seeds["agree"]:.1f} % of the pictures, and in {seeds["agree_where_wrong"]:.0f} % of those that the first
gets wrong; {seeds["all_wrong"]:.1f} % are wrong for all {seeds["nets"]}. Their ensemble reaches
{seeds["ensemble"]["accuracy"]:.2f} % (NLL {seeds["ensemble"]["nll"]:.4f}), one net {k["accuracy"]:.2f} %
({k["nll"]:.4f}). A net of {large / ours:.1f} times the weights (64 and 128 channels, 1,536 hidden) is {gain:.2f} points
ahead of ours after {big["settings"]["epochs"]} epochs of its recipe, {big["test"]["accuracy"]:.2f} % against {small["test"]["accuracy"]:.2f} % (NLL {big["test"]["nll"]:.4f} against
{small["test"]["nll"]:.4f}; one seed each, on one CPU core; whether that lasts to the 20th was not tried). So the
ceiling of the 36-class task for nets of this kind seems to lie near {100 - seeds["all_wrong"]:.0f} %, a bias that all share not
told from the task, and the shipped net {100 - seeds["all_wrong"] - k["accuracy"]:.1f} points below it."""


def benchmarks() -> str:
    speed, gpu = record("bench-inference"), record("bench-gpu")
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
    cpu, baseline = record("bench-cpu"), record("bench-baseline")
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
    kept = record("tests")
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
