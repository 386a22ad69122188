"""Name the handwritten character in every picture of a folder.

    python3 inference.py --input tests/samples

prints one line per picture, the ASCII code of the character and the path, by folder and name:

    048, tests/samples/0_scan.png
    049, tests/samples/1_pencil.jpg

Digits and letters, 36 classes; pictures of one character, of any size, dark on light or light on
dark. `--format csv` or `json` adds confidences, alternatives and errors, `--report FILE.html` makes
a page to look through. Results go to stdout or `--output`, all else to stderr. Exit code: 0 all
answered, 1 some could not be or none was found (but under torchrun, which would end the other
processes), 2 wrong usage, a full disk or GPU, 130 interrupted.
"""

import argparse
import base64
import csv
import gc
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from picture import BLANK, SUFFIXES, prepare, read, to_grey

PAGE = Path(__file__).with_name("report.html")
CHUNK = 64  # pictures that a process is given at a time
AHEAD = 8  # chunks under way for each process, so that none waits
WORKER_BYTES = 3 * 2**30  # of address space; a picture just under Pillow's bomb limit takes a third
BLOCK = 64  # images: a batch is filled up to whole blocks, as kernels differ by batch size
SAMPLE = 1000  # pictures by which the share of digits is estimated, at most
PRIOR = 3.6  # pictures that the share of digits in training weighs in the estimate
LEAN = 0.2  # nats by which the less likely polarity of ink must be surer of its answer
UNPRINTABLE = re.compile(  # backslash, control characters and bytes that are not UTF-8
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UsageError(Exception):
    """What was asked for can't be done; one line for the user."""


class Result(NamedTuple):
    """What becomes of a picture: at first its images, then the answer; or an error."""

    path: str
    character: str = ""  # none where there is an error
    confidence: float = 0.0
    alternatives: tuple[tuple[str, float], ...] = ()  # the next likely; all, without an answer
    lookalike: str = ""  # the group, such as "1IL", that holds the two likeliest characters
    error: str = ""
    images: tuple[bytes, ...] = ()  # SIZE * SIZE bytes each; two where ink may be dark or light
    thumbnail: str = ""  # data URI, where a report is asked for


def list_pictures(inputs: Iterable[str]) -> tuple[list[str], list[OSError], int]:
    """Return the paths of all pictures, errors of folders, and how many files are passed over.

    A file in `inputs` is always taken, in a folder what has a picture's suffix; an input given
    twice counts once. A folder's pictures come by name, then its folders, but for links to folders.
    What is hidden in a folder (.git, macOS's ._scan.png) is passed over and not counted.
    """
    paths, errors, others = [], [], 0
    for name in dict.fromkeys(PurePath(name).as_posix() for name in inputs):
        if not os.path.isdir(name):
            paths.append(name)
            continue
        for folder, folders, files in os.walk(name, onerror=errors.append):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            files = [file for file in files if not file.startswith(".")]
            found = sorted(file for file in files if file.lower().endswith(SUFFIXES))
            paths += [os.path.join(folder, file).removeprefix("./") for file in found]
            others += len(files) - len(found)
    return paths, errors, others


def start_pool(workers: int) -> ProcessPool:
    """Start processes that read pictures, so that what a file does to its decoder ends with it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the processes are enough
    pool = ProcessPool(workers, initializer=confine, context=multiprocessing.get_context("spawn"))
    pool.schedule(int)  # a first task starts them, while torch is imported
    return pool


def confine() -> None:
    """Keep the harm small that a hostile file can do in this process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others print what files tell them to
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not this one
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, hard))


def limit_time(seconds: float) -> None:
    """Let SIGALRM end this process unless it is called again in time; 0: take the limit off."""
    if hasattr(signal, "setitimer"):  # Windows has none: there the limit of the whole chunk counts
        signal.setitimer(signal.ITIMER_REAL, seconds)


def prepare_all(paths: list[str], side: int, thumbnails: bool, timeout: float) -> list[Result]:
    """Read and fit pictures, each in `timeout` seconds: the work of a process."""
    results = []
    try:
        for path in paths:
            limit_time(timeout)
            results.append(prepare_one(path, side, thumbnails))
    finally:
        limit_time(0)
    return results


def prepare_one(path: str, side: int, thumbnails: bool) -> Result:
    """Read and fit a picture."""
    images, error, view = (), "", ""
    try:
        images = tuple(image.tobytes() for image in prepare(path, side))
    except ValueError as problem:
        error = str(problem)
    if thumbnails and error in ("", BLANK):
        view = thumbnail(path)
    return Result(path, error=error, images=images, thumbnail=view)


def thumbnail(path: str) -> str:
    """Return a picture as a data URI, small enough for a page of thousands."""
    image, file = read(path), io.BytesIO()
    if image.mode in ("I", "F"):
        image = Image.fromarray(to_grey(image))
    image.thumbnail((96, 96))
    image.save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def in_order(submit: Callable, items: Iterable, ahead: int) -> Iterator[tuple[Any, Future]]:
    """Yield items with their futures, in order, while up to `ahead` of them are under way."""
    under_way: deque[tuple[Any, Future]] = deque()
    for item in items:
        under_way.append((item, submit(item)))
        while under_way and (under_way[0][1].done() or len(under_way) > ahead):
            yield under_way.popleft()
    yield from under_way


def read_all(submit: Callable, chunks: list, ahead: int, timeout: float) -> Iterator[Result]:
    """Yield the pictures of chunks of paths, in order.

    Where the process of a chunk dies or takes too long, its pictures are tried again one by one, so
    that only the guilty one is lost.
    """
    for chunk, future in in_order(submit, chunks, ahead):
        error = future.exception()
        if not error:
            yield from future.result()
        elif len(chunk) > 1:
            yield from read_all(submit, [[path] for path in chunk], ahead, timeout)
        elif isinstance(error, TimeoutError):
            yield Result(chunk[0], error=f"takes more than {timeout:g} s to decode")
        elif isinstance(error, ProcessExpired):
            yield Result(chunk[0], error=f"its decoder died (exit code {error.exitcode})")
        else:
            yield Result(chunk[0], error=f"can't be read: {error!r}")


def batches(pictures: Iterator[Result], size: int) -> Iterator[list[Result]]:
    """Gather pictures, `size` at a time."""
    return iter(lambda: list(islice(pictures, size)), [])


class Classifier:
    """A net made ready to answer, out of the characters of --alphabet."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch  # late: the processes that read pictures do without

        import CNN

        torch.set_num_threads(1)  # `run` has passes of the net side by side instead
        try:
            self.device = CNN.choose_device(args.device)
            net = CNN.load(args.model, self.device)
            self.characters = parse_alphabet(args.alphabet, net.card.alphabet)
        except ValueError as error:
            raise UsageError(error) from None
        self.classes = [net.card.alphabet.index(character) for character in self.characters]
        self.temperature, self.lookalikes, self.side = (
            net.card.temperature,
            net.card.lookalikes,
            CNN.SIZE,
        )
        self.is_digit = np.array([character.isdigit() for character in net.card.alphabet])
        self.digits, self.prior = (
            net.card.digit_prior,
            torch.zeros(len(net.card.alphabet), device=self.device),
        )
        self.mixed = len({*self.is_digit[self.classes]}) == 2  # digits and letters
        self.topk, self.minimum = args.topk, args.min_confidence
        on_cpu = self.device.type == "cpu"
        self.dtype = CNN.mixed_precision(self.device) if on_cpu else torch.float32
        self.net = net.fused().to(self.dtype, memory_format=torch.channels_last)
        self.net.fc2.float()  # the full resolution for probabilities
        self.net.fc2.register_forward_pre_hook(lambda layer, inputs: inputs[0].float())

    def log_probabilities(self, images: list[bytes]) -> np.ndarray:
        """Return how likely each allowed character is, among all: (N, allowed), nats."""
        import torch

        padding = bytes(-len(images) % BLOCK * self.side**2)
        pixels = np.frombuffer(bytearray().join([*images, padding]), np.uint8)
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).view(-1, 1, self.side, self.side)
            logits = self.net(batch.to(self.device, self.dtype) / 255)[: len(images)]
            scaled = logits / self.temperature + self.prior
            return scaled.log_softmax(1)[:, self.classes].cpu().numpy()

    def weigh_digits(self, pictures: list[Result]) -> np.ndarray:
        """Return how likely each picture that could be read is a digit, (N,)."""
        p = np.exp(self.log_probabilities([one.images[0] for one in pictures if one.images]))
        return p[:, self.is_digit[self.classes]].sum(1) / p.sum(1)

    def expect_digits(self, share: float) -> None:
        """Take `share` for that of digits among the pictures, in place of the one in training."""
        change = np.where(self.is_digit, share / self.digits, (1 - share) / (1 - self.digits))
        self.prior += self.prior.new_tensor(np.log(change.clip(1e-9)))

    def answer(self, pictures: list[Result]) -> list[Result]:
        """Classify pictures; of one with two images, the image that says more."""
        images = [image for picture in pictures for image in picture.images]
        log_p = self.log_probabilities(images)
        best = log_p.max(1, keepdims=True)
        p = np.exp(log_p - best)  # of the allowed characters alone, when divided by its sum
        order = np.argsort(-p, axis=1, kind="stable")[:, : max(2, self.topk)]
        p = np.take_along_axis(p / p.sum(1, keepdims=True), order, 1)
        rows = zip(images, best[:, 0].tolist(), order.tolist(), p.tolist(), strict=True)
        results = []
        for picture in pictures:
            if seen := list(islice(rows, len(picture.images))):
                first, last = seen[0], seen[-1]
                image, _, indices, values = last if last[1] > first[1] + LEAN else first
                ranked = tuple(zip([self.characters[i] for i in indices], values, strict=True))
                picture = self.decide(picture._replace(images=(image,)), ranked)
            results.append(picture)
        return results

    def decide(self, picture: Result, ranked: tuple[tuple[str, float], ...]) -> Result:
        """Answer with the likeliest character, unless it is too doubtful."""
        (best, confidence), others = ranked[0], ranked[1 : self.topk]
        pair, error = {character for character, _ in ranked[:2]}, ""
        group = next((g for g in self.lookalikes if len(pair) > 1 and pair <= set(g)), "")
        if confidence < self.minimum:
            error = f"no answer: {confidence:.4f} is below --min-confidence {self.minimum:g}"
            best, others = "", ranked[: self.topk]
        return Result(picture.path, best, confidence, others, group, error, *picture[6:])


def share_of_digits(digit: np.ndarray, usual: float) -> float:
    """Return the share of digits among pictures, by expectation maximisation.

    digit: (N,) how likely each is a digit where `usual` is their share, as it was in training.
    Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14; two groups, not 36.
    """
    share = usual
    for _ in range(200):
        yes, no = digit * share / usual, (1 - digit) * (1 - share) / (1 - usual)
        share = ((yes / (yes + no)).sum() + PRIOR * usual) / (len(digit) + PRIOR)
    return float(share)


def parse_alphabet(text: str, known: str) -> str:
    """Return the characters that --alphabet allows, in the order of `known`; case folds.

    text: characters and ranges such as A-F, in any mixture. Raises ValueError for any not known.
    """
    parts = [match[0].upper() for match in re.finditer(".-.|.", text, re.DOTALL)]
    allowed = {c for part in parts for c in known if part[0] <= c <= part[-1]}
    if not parts or not {end for part in parts for end in (part[0], part[-1])} <= allowed:
        expected = f"characters of {known}, or ranges such as A-F"
        raise ValueError(f"--alphabet {text!r}: expected {expected}")
    return "".join(character for character in known if character in allowed)


def escaped(text: str) -> str:
    r"""Return text as one line that can't steer a terminal: \n, \x1b, a byte 0xff as \udcff."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def ascii_line(result: Result) -> str:
    """Write as the origin did: ASCII code and path; `---` for an answer that is too doubtful."""
    code = f"{ord(result.character):03d}" if result.character else "---"
    return f"{code}, {escaped(result.path)}\n" if result.confidence else ""


def csv_line(result: Result) -> str:
    """Write as a row of RFC 4180, with the bytes of the path as they are."""
    confidence = f"{result.confidence:.4f}" if result.confidence else ""
    alternatives = " ".join(f"{character}:{p:.4f}" for character, p in result.alternatives)
    row = io.StringIO()
    csv.writer(row).writerow(result._replace(confidence=confidence, alternatives=alternatives)[:6])
    return row.getvalue().removesuffix("\r\n") + "\n"


def json_line(result: Result) -> str:
    r"""Write as a JSON object; bytes of the path that are not UTF-8 as \udc80 to \udcff."""
    content = {field: getattr(result, field) or None for field in FIELDS}
    content["confidence"] = round(result.confidence, 4) or None
    content["alternatives"] = {character: round(p, 4) for character, p in result.alternatives}
    return json.dumps(content) + "\n"


def report_row(result: Result) -> str:
    """Write as an object of the list in report.html; it can't end the script that it stands in."""
    row = {field: getattr(result, field) for field in FIELDS}
    row["shown"] = escaped(result.path)
    row["truth"] = truth(result.path)
    row["image"] = base64.b64encode(b"".join(result.images[:1])).decode()
    row["thumbnail"] = result.thumbnail
    return json.dumps(row).replace("<", "\\u003c") + ",\n"


def truth(path: str) -> str:
    """Return the character by which a picture's folder is named, as for train.py --extra, or ""."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return folder.upper() if re.fullmatch("[0-9A-Za-z]", folder) else ""


FIELDS = Result._fields[:6]
LINES = {"ascii": ascii_line, "csv": csv_line, "json": json_line}


@contextmanager
def written(file: Path | None, head: str, foot: str = "") -> Iterator[TextIO]:
    """Give a stream to what becomes FILE when all went well, FILE.partial; without FILE, stdout."""
    where = f"{os.path.realpath(file)}.partial" if file else 1
    form = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "", "closefd": bool(file)}
    with open(where, "w", **form) as stream:
        stream.write(head)
        yield stream
        stream.write(foot)
    if file:
        os.replace(where, os.path.realpath(file))  # of a link, what it points to


def write(results: Iterable[list[Result]], args: argparse.Namespace, total: int) -> Counter[str]:
    """Write results as they come, with --format ascii errors to stderr; count their kinds."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        head = ",".join(FIELDS) + "\n" if args.format == "csv" and args.rank == 0 else ""
        writers = [(stack.enter_context(written(args.output, head)), LINES[args.format])]
        if args.report:
            top, end, rest = PAGE.read_text("utf-8").partition("null]")
            page = stack.enter_context(written(args.report, top, end + rest))
            writers.append((page, report_row))
        form = {"unit": " pictures", "leave": False, "dynamic_ncols": True, "disable": None}
        bar = stack.enter_context(tqdm(total=total, **form))
        for answered in results:
            for stream, line in writers:
                stream.write("".join(map(line, answered)))
                stream.flush()
            for result in answered:
                lost = "blank" if result.error == BLANK else "unreadable"
                doubtful = "doubtful" if result.confidence else lost
                counts["answered" if result.character else doubtful] += 1
                if args.format == "ascii" and not result.confidence:
                    tqdm.write(f"{escaped(result.path)}: {result.error}", file=sys.stderr)
            bar.update(len(answered))
    return counts


def parse_digits(text: str) -> str | float:
    """Read --digits. Raises ValueError."""
    share = text if text in ("auto", "none") else float(text)
    if isinstance(share, float) and not 0 <= share <= 1:
        raise ValueError
    return share


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and a message where it is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    digits = "share of digits, 0 to 1; auto: estimated from all pictures, on which an answer then "
    digits += "depends; none: as in training, each judged alone [%(default)s]"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, model = parser.add_argument, Path(__file__).with_name("model.pt")
    add("--input", nargs="+", required=True, metavar="PATH", help="folders, pictures, or both")
    add("--model", type=Path, default=model, metavar="FILE", help="weights [model.pt beside this]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, or cpu]")
    add("--alphabet", default="0-9A-Z", metavar="CHARS", help="what can be answered [%(default)s]")
    add("--digits", type=parse_digits, default="auto", metavar="SHARE", help=digits)
    add("--min-confidence", type=float, default=0, metavar="P", help="below: no answer")
    add("--topk", type=int, default=3, metavar="K", help="characters in csv, json [%(default)s]")
    add("--format", choices=LINES, default="ascii", help="of the results [%(default)s]")
    add("--output", type=Path, metavar="FILE", help="where results go instead of stdout")
    add("--report", type=Path, metavar="FILE", help="a page for going through the pictures by eye")
    add("--batch-size", type=int, default=64, metavar="N", help="of the net [%(default)s]")
    add("--workers", type=int, default=share, metavar="N", help="to read [one per core]")
    add("--timeout", type=float, default=30, metavar="S", help="per picture [%(default)s s]")
    args = parser.parse_args(arguments)
    if not 0 <= args.min_confidence <= 1:
        parser.error("--min-confidence: expected 0 to 1")
    if not (min(args.topk, args.batch_size, args.workers) > 0 and 0 < args.timeout < math.inf):
        parser.error("--topk, --batch-size, --workers, --timeout: expected more than 0")
    args.rank, args.ranks = 0, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:  # schedulers set RANK for their own ends
        args.rank, args.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not args.output:
            parser.error("under torchrun each process writes a file: name it with --output")
        for name in ("output", "report"):
            if file := getattr(args, name):
                setattr(args, name, file.with_name(f"{file.stem}.{args.rank}{file.suffix}"))
    return args


def check_files(args: argparse.Namespace) -> None:
    """Raise UsageError where an input is missing or an output would replace what is read."""
    for name in args.input:
        if not os.path.lexists(name):
            raise UsageError(f"--input {escaped(name)}: no such file or folder")
    taken = {os.path.realpath(file) for file in (PAGE, args.model, *args.input)}
    for flag, file in (("--output", args.output), ("--report", args.report)):
        whole = os.path.realpath(file) if file else ""
        special = os.path.exists(whole) and not os.path.isfile(whole)
        is_picture = os.path.exists(whole) and whole.lower().endswith(SUFFIXES)
        if special or is_picture or {whole, f"{whole}.partial"} & taken:
            reason = "not a regular file" if special else "would replace what is read"
            raise UsageError(f"{flag} {escaped(str(file))}: {reason}: choose another")
        taken |= {whole} - {""}


def run(args: argparse.Namespace) -> int:
    """Classify everything in args.input; return the exit code, 0 or 1. Raises UsageError."""
    check_files(args)
    paths, errors, passed_over = list_pictures(args.input)
    own, errors = range(args.rank, len(paths), args.ranks), errors[args.rank :: args.ranks]
    failed = [Result(e.filename, error=f"folder can't be listed: {e.strerror}") for e in errors]
    workers = max(1, min(args.workers, -(-len(own) // CHUNK)))
    pool = start_pool(workers)
    try:
        classifier = Classifier(args)
        gc.freeze()  # nothing of torch is looked through again, which saves 0.4 s at the end
        started = time.monotonic()

        def submit(chunk: list[str]) -> Future:
            alone = len(chunk) == 1  # then the pool's limit is the picture's
            each = 0 if alone else args.timeout
            work = (chunk, classifier.side, bool(args.report), each)
            return pool.schedule(prepare_all, work, timeout=args.timeout * len(chunk))

        def read_those(numbers: list[int]) -> Iterator[Result]:
            chunks = [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]
            named = [[paths[number] for number in chunk] for chunk in chunks]
            return read_all(submit, named, AHEAD * workers, args.timeout)

        step = -(-len(paths) // SAMPLE) or 1
        sample = range(0, len(paths), step) if args.digits == "auto" and classifier.mixed else ()
        kept, share = dict(zip(sample, read_those(sample), strict=True)), args.digits
        with ThreadPoolExecutor(workers) as executor:  # passes of the net, side by side
            if kept:
                parts = executor.map(classifier.weigh_digits, batches(iter(kept.values()), BLOCK))
                share = share_of_digits(np.concatenate(list(parts)), classifier.digits)
            if isinstance(share, float):
                classifier.expect_digits(share)
            others = read_those([number for number in own if number not in kept])
            pictures = (kept.pop(number) if number in kept else next(others) for number in own)
            answer = partial(executor.submit, classifier.answer)
            passes = in_order(answer, batches(pictures, args.batch_size), 2 * workers)
            results = chain([failed], (answered.result() for _, answered in passes))
            counts = write(results, args, len(own) + len(failed))
    finally:
        pool.stop()
        pool.join()
    seconds, total = time.monotonic() - started, counts.total()
    kinds = [*sorted(counts.items()), ("other files passed over", passed_over)]
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds if count) or "none found"
    if sample:
        said += f", about {100 * share:.0f} % digits"
    print(f"{total:,} pictures: {said} ({total / seconds:,.0f} pictures/s)", file=sys.stderr)
    return int((total > counts["answered"] or not paths) and args.ranks == 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    args = parse(arguments)
    signal.signal(signal.SIGTERM, stop)
    try:
        return run(args)
    except BrokenPipeError:  # whoever read stdout has seen enough
        return 1
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        message, code = f"stopped by {signal.Signals(number).name}", 128 + number
        if args.output:
            message += f"; what was answered is in {escaped(os.path.realpath(args.output))}.partial"
    except (OSError, UsageError) as error:  # such as a full disk
        message, code = str(error).partition("\n")[0], 2
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        message, code = f"{str(error).partition('. ')[0]}: try a smaller --batch-size", 2
    print(f"inference.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ["PYTHONSAFEPATH"] = "1"  # our processes take no code from the folder we are run in
    sys.exit(main())
