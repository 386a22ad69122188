"""Name the handwritten character in every picture of a folder.

    python3 inference.py --input tests/samples

prints a line per answer, the ASCII code of the character and the path, by folder and name:

    048, tests/samples/0_scan.png
    049, tests/samples/1_pencil.jpg

Digits and letters, 36 classes; pictures of one character, of any size, dark on light or light on
dark. `--format csv` or `json` adds confidences, alternatives and errors, `--report FILE.html` makes
a page to look through. Results go to stdout or `--output`, all else to stderr. Exit code: 0 all
answered, 1 some could not be or none was found (but under torchrun, which would end the other
processes) or stdout's reader left, 2 wrong usage, a full disk or GPU, 130 or 143 stopped by Ctrl-C
or SIGTERM.
"""

from __future__ import annotations

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
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import cv2
import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from picture import BLANK, SUFFIXES, Features, Reading, escaped, propose, read_first, to_grey

if TYPE_CHECKING:  # torch is imported late: the workers do without
    from torch import Tensor

    import CNN

PAGE = Path(__file__).with_name("report.html")


class UsageError(Exception):
    """What was asked for can't be done; one line for the user."""


class ReaderLeftError(Exception):
    """Whoever read stdout has seen enough."""


NOTHING = Reading(None, Features())  # of a picture that can't be read


class Picture(NamedTuple):
    """A picture, as a worker reads it first; later with an answer."""

    path: str
    character: str = ""  # the answer; none where there is an error
    confidence: float = 0.0  # that the answer is right or, where it is blank, that it is
    alternatives: tuple[tuple[str, float], ...] = ()  # the next likely; all, without an answer
    lookalike: str = ""  # the group, such as "1IL", that holds the two likeliest characters
    error: str = ""
    image: np.ndarray | None = None  # (SIZE, SIZE) uint8, ink 255 on 0: as the net read it
    thumbnail: str = ""  # data URI, where a report is asked for
    reading: Reading = NOTHING  # the first one, until the picture is seen
    grey: np.ndarray | None = None  # (H, W) uint8, until then: what other readings are made of

    @property
    def outcome(self) -> str:
        """Return the word by which it is counted."""
        if self.character:
            return "answered"
        if self.error == BLANK:
            return "blank"
        return "doubtful" if self.confidence else "unreadable"


FIELDS = Picture._fields[: Picture._fields.index("image")]  # of csv and json
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of a cell, in spreadsheets


def list_pictures(inputs: Iterable[str]) -> tuple[list[str], list[OSError], int]:
    """Return the paths of all pictures, errors of folders, and how many files are passed over.

    Files named in `inputs` are taken whatever their suffix; of those in a folder, only files with a
    picture's suffix. A path counts once. A folder's pictures come by name, then its folders, but
    for links to folders. What is hidden in a folder (.git, macOS's ._scan.png) is passed over and
    not counted. No path begins as a spreadsheet's formula: ./ is kept or put in front.
    """
    paths: dict[str, str] = {}  # by path without ./
    errors = []
    passed_over = 0
    for name in inputs:
        name = PurePath(name).as_posix()
        if name.startswith(FORMULA_STARTS):
            name = f"./{name}"
        if not os.path.isdir(name):
            paths.setdefault(name.removeprefix("./"), name)
            continue
        for folder, folders, files in os.walk(name, onerror=errors.append):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            files = [file for file in files if not file.startswith(".")]
            pictures = sorted(file for file in files if file.lower().endswith(SUFFIXES))
            for file in pictures:
                path = os.path.join(folder, file)
                paths.setdefault(path.removeprefix("./"), path)
            passed_over += len(files) - len(pictures)
    return list(paths.values()), errors, passed_over


# Reading, in worker processes

CHUNK = 64  # pictures that a worker is given at a time
CHUNK_PATIENCE = 4  # times the limit of a picture: a chunk that takes longer is tried one by one
CHUNKS_AHEAD = 8  # under way for each worker, so that none waits
WORKER_BYTES = 3 * 2**30  # of address space; a picture just under Pillow's bomb limit takes a third
WORKERS_DIED = "processes that read pictures died as they started: is memory short? try --workers 1"
THUMBNAIL_SIDE = 96  # px


def read_picture(path: str, side: int, thumbnails: bool) -> Picture:
    """Read a picture and take its first reading."""
    try:
        picture, grey, reading = read_first(path, side)
    except ValueError as error:
        return Picture(path, error=str(error))
    thumbnail = make_thumbnail(picture) if thumbnails else ""
    return Picture(path, thumbnail=thumbnail, reading=reading, grey=grey)


def make_thumbnail(picture: Image.Image) -> str:
    """Return a picture as a data URI, small enough for a page of thousands.

    "" where that fails, which is no reason to lose the answer.
    """
    with suppress(Exception):
        if picture.mode in ("I", "F"):
            picture = Image.fromarray(to_grey(picture))
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=90)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return ""


def do_all(task: Callable, items: list) -> list:
    """Call `task` with each item: a worker's work."""
    return [task(item) for item in items]


def confine() -> None:
    """Keep the harm small that a hostile file can do in this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for those started later, in another's place
    cv2.setNumThreads(1)  # there are workers enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others print what files tell them to
    warnings.simplefilter("ignore")  # nobody would see them
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not this one
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, hard))


class Readers:
    """Worker processes that read pictures, so that a picture that breaks one is lost alone."""

    def __init__(self, workers: int, args: argparse.Namespace) -> None:
        """Start the workers. Raises UsageError where that can't be done."""
        self.chunks_ahead = CHUNKS_AHEAD * workers
        self.timeout = args.timeout  # seconds per picture
        self.thumbnails = bool(args.report)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are enough
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(workers, initializer=confine, context=spawn)
        # What starts now ignores Ctrl-C, which a terminal sends to all processes
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.pool.schedule(int)  # a first task starts them, while torch is imported
        except (OSError, RuntimeError) as error:
            cause = error.__cause__ or error
            raise UsageError(f"processes that read pictures can't be started: {cause}") from None
        finally:
            signal.signal(signal.SIGINT, handler)

    def stop(self) -> None:
        """End the workers."""
        self.pool.stop()
        self.pool.join()

    def read(self, paths: Iterable[str], side: int) -> Iterator[Picture]:
        """Yield the pictures at these paths, in order, with their first readings."""
        task = partial(read_picture, side=side, thumbnails=self.thumbnails)
        for path, picture, error in self.call(task, batched(paths, CHUNK)):
            yield picture or Picture(path, error=error)

    def propose(self, greys: list[np.ndarray], side: int) -> Iterator[list[Reading]]:
        """Yield all readings of each grey picture; none where that fails."""
        task = partial(propose, size=side)
        for _, readings, _ in self.call(task, batched(greys, CHUNK)):
            yield readings or []

    def call(self, task: Callable, chunks: Iterable[list]) -> Iterator[tuple[Any, Any, str]]:
        """Have workers call `task` with paths, or the like; yield each with result and error.

        One file that kills or outlasts its worker fails its whole chunk: its pictures are then
        tried again one by one, which tells the guilty from the others.
        """
        submit = partial(self.schedule, task)
        for chunk, future in in_order(submit, chunks, self.chunks_ahead):
            error = self.wait_for(future)
            if error is None:
                for item, result in zip(chunk, future.result(), strict=True):
                    yield item, result, ""
            elif len(chunk) > 1:
                yield from self.call(task, [[item] for item in chunk])
            elif isinstance(error, TimeoutError):
                yield chunk[0], None, f"takes more than {self.timeout:g} s to decode"
            elif isinstance(error, ProcessExpired):
                yield chunk[0], None, f"its decoder died (exit code {error.exitcode})"
            else:
                yield chunk[0], None, f"can't be read: {error!r}"

    def schedule(self, task: Callable, items: list) -> Future:
        """Have a worker call `task` with each item; the future holds the list of results."""
        timeout = self.timeout * min(len(items), CHUNK_PATIENCE)
        try:
            return self.pool.schedule(do_all, (task, items), timeout=timeout)
        except RuntimeError:  # the pool is broken
            raise UsageError(WORKERS_DIED) from None

    def wait_for(self, future: Future) -> BaseException | None:
        """Return the error of a task when it is done.

        Raises UsageError where the pool is broken, as it may forget its tasks: a worker died
        outside of one, as while it started.
        """
        while not future.done() and self.pool.active:
            wait([future], timeout=1)
        if future.done() and not future.cancelled():
            error = future.exception()
            if not isinstance(error, BrokenProcessPool):
                return error
        raise UsageError(WORKERS_DIED)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items, the last of what is left, as Python 3.12's itertools.batched."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def in_order(submit: Callable, items: Iterable, ahead: int) -> Iterator[tuple[Any, Future]]:
    """Yield items with their futures, in order, while up to `ahead` of them are under way."""
    under_way: deque[tuple[Any, Future]] = deque()
    for item in items:
        under_way.append((item, submit(item)))
        while under_way and (under_way[0][1].done() or len(under_way) > ahead):
            yield under_way.popleft()
    yield from under_way


# The net's answers; constants were tuned on ../shared/field and ../shared/scenes
#
# How a picture becomes an answer:
# 1. `see_batch`: the net sees its first reading and, where that leaves it in doubt, the others.
# 2. `adapt`: a sample tells the fraction of digits in the folder, and how its writers write.
# 3. `score_readings`: with that, a reading gets a score, and in it each character a probability.
# 4. `answer`: scores become probabilities of readings, one of which may be that the picture is
#    blank; the answer is the likeliest character over all of them.

# Images that the net sees at once, or a multiple: what a kernel computes differs by batch size
BLOCK = 64
OTHERS_BLOCK = 16  # of the other readings, as they are few
# A reading's score is Reading.score and these times its likeliest character's log probability and
# distance; they are fitted with WEIGHTS in picture.py
LOG_P_WEIGHT = 2.14
DISTANCE_WEIGHT = -0.39
DOUBT_SCORE = -2.5  # nats: where a first reading scores less, the others are asked for
LEAST_EXTENT = 0.25  # of the side: with a longer stroke, a blank picture holds NO_CHARACTER
NO_CHARACTER = "no single character: what is written looks like none"
TYPICAL_DISTANCE = 3.0  # medians of validation: what lies farther tells nothing about the folder


class SeenBatch(NamedTuple):
    """B pictures, their R readings, and what the net sees in these."""

    pictures: list[Picture]
    readings: list[Reading]
    owners: Tensor  # (R,) int64: index of the reading's picture; -1: others stand for it
    seen: CNN.Seen


class TrainedNet:
    """A net from its weights file, ready to see images."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        import CNN

        torch.set_num_threads(1)  # `run` has passes of the net side by side instead
        try:
            self.device = CNN.choose_device(args.device)
        except ValueError as error:
            raise UsageError(f"--device {args.device}: {error}: try --device cpu") from None
        try:
            net = CNN.load(args.model, self.device)
        except ValueError as error:
            raise UsageError(error) from None
        self.card = net.card
        self.side = CNN.SIZE
        on_cpu = self.device.type == "cpu"  # a GPU waits for pictures even in float32
        self.dtype = CNN.mixed_precision(self.device) if on_cpu else torch.float32
        self.net = net.fused().to(self.dtype, memory_format=torch.channels_last)
        self.net.fc2.float()  # the full resolution for probabilities

    def see(self, readings: list[Reading], block: int) -> CNN.Seen:
        """Show the images of readings to the net; empty ones for blank, and to fill up a block."""
        import torch

        import CNN

        count = len(readings)
        filled = math.ceil(count / block) * block
        pixels = np.zeros((filled, 1, self.side, self.side), np.uint8)
        for i, reading in enumerate(readings):
            pixels[i] = 0 if reading.image is None else reading.image
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(self.device, self.dtype) / 255
            features = self.net.features(batch).float()  # (filled, D)
            return CNN.see(features[:count], self.net.fc2(features)[:count], self.card)


def see_batch(
    pictures: list[Picture], net: TrainedNet, known: CNN.Folder, readers: Readers
) -> SeenBatch:
    """Show the net the first reading of each picture; where that leaves doubt, the others, too.

    known: what is known of the folder before it is seen.
    """
    import torch

    import CNN

    readings = [picture.reading for picture in pictures]
    owners = list(range(len(pictures)))
    seen = net.see(readings, BLOCK)
    scores, _ = score_readings(readings, seen, known, net.card)
    are_doubtful = (scores < DOUBT_SCORE).tolist()
    in_doubt = [i for i in owners if are_doubtful[i] and pictures[i].grey is not None]
    greys = [pictures[i].grey for i in in_doubt]
    others = []
    for i, proposed in zip(in_doubt, readers.propose(greys, net.side), strict=True):
        if proposed:
            others += proposed
            owners += [i] * len(proposed)
            owners[i] = -1  # those proposed stand for the first one
    all_seen = [seen, *(net.see(part, OTHERS_BLOCK) for part in batched(others, OTHERS_BLOCK))]
    seen = CNN.Seen(*map(torch.cat, zip(*all_seen, strict=True)))
    pictures = [picture._replace(reading=NOTHING, grey=None) for picture in pictures]
    return SeenBatch(pictures, readings + others, torch.tensor(owners), seen)


def score_readings(
    readings: list[Reading], seen: CNN.Seen, folder: CNN.Folder, card: CNN.Card
) -> tuple[Tensor, Tensor]:
    """Return the scores (R,) of readings, nats, and the probabilities (R, classes + 1) in them.

    The last column is that nothing is written, which is certain in a blank reading.
    """
    import torch

    import CNN

    log_p, distances = CNN.compare(seen, folder, card)
    best, answers = log_p.max(1, keepdim=True)
    scores = (LOG_P_WEIGHT * best + DISTANCE_WEIGHT * distances.gather(1, answers))[:, 0]
    are_blank = torch.tensor([reading.image is None for reading in readings], dtype=torch.bool)
    scores = scores.masked_fill(are_blank, 0)
    scores += torch.tensor([reading.score for reading in readings])
    p = log_p.exp().masked_fill(are_blank[:, None], 0)
    return scores, torch.cat([p, are_blank[:, None]], dim=1)


def compare_readings(batch: SeenBatch, folder: CNN.Folder, card: CNN.Card) -> tuple[Tensor, Tensor]:
    """Return the probability of each reading of each picture, and those of the characters in it.

    Shapes: (B, R), 0 for readings of other pictures, and (R, classes + 1).
    """
    import torch

    scores, p = score_readings(batch.readings, batch.seen, folder, card)
    are_its_own = batch.owners == torch.arange(len(batch.pictures))[:, None]  # (B, R)
    weights = scores.where(are_its_own, -math.inf).softmax(1)
    return weights, p


def answer(
    batch: SeenBatch, folder: CNN.Folder, card: CNN.Card, args: argparse.Namespace
) -> list[Picture]:
    """Answer with the likeliest character of each picture, over all of its readings.

    It is blank where that nothing is written is likelier than that anything is.
    """
    weights, p_in_readings = compare_readings(batch, folder, card)
    p = weights @ p_in_readings  # (B, classes + 1)
    p_blank = p[:, -1].tolist()
    p[:, -1] *= p[:, -1] >= 0.5  # below, blank can't be the answer
    # The source of an answer is the reading that adds most to its probability
    sources = (weights * p_in_readings.T[p.argmax(1)]).argmax(1).tolist()
    allowed = folder.allowed.nonzero()[:, 0]
    p, order = p[:, allowed].sort(dim=1, descending=True, stable=True)
    shown = max(2, args.topk)
    labels = allowed[order[:, :shown]].tolist()
    rows = zip(batch.pictures, sources, p_blank, labels, p[:, :shown].tolist(), strict=True)
    pictures = []
    for picture, source, its_p_blank, its_labels, its_p in rows:
        if not picture.error:  # it could be read
            image, features = batch.readings[source]
            ranked = [(card.alphabet[label], p) for label, p in zip(its_labels, its_p, strict=True)]
            picture = picture._replace(image=image, alternatives=tuple(ranked[: args.topk]))
            if its_p_blank >= 0.5:
                error = NO_CHARACTER if features.stroke_extent > LEAST_EXTENT else BLANK
                picture = picture._replace(confidence=its_p_blank, error=error)
            else:
                picture = with_answer(picture, ranked, card, args)
        pictures.append(picture)
    return pictures


def with_answer(
    picture: Picture, ranked: list[tuple[str, float]], card: CNN.Card, args: argparse.Namespace
) -> Picture:
    """Return a picture with its answer, unless that is too doubtful.

    ranked: characters and their probabilities, the likeliest first.
    """
    character, confidence = ranked[0]
    pair = {character for character, _ in ranked[:2]}
    groups = [group for group in card.lookalikes if len(pair) == 2 and pair <= {*group}]
    picture = picture._replace(confidence=confidence, lookalike="".join(groups[:1]))
    if confidence >= args.min_confidence:
        return picture._replace(character=character, alternatives=picture.alternatives[1:])
    error = f"no answer: {confidence:.4f} is below --min-confidence {args.min_confidence:g}"
    return picture._replace(error=error)


def adapt(sample: list[SeenBatch], beforehand: CNN.Folder, card: CNN.Card) -> CNN.Folder:
    """Return what is known of a folder once a sample of it, unlabelled, is seen.

    Of each picture its best reading takes part, if that is neither blank nor untypical.
    """
    import torch

    import CNN

    parts = []
    for batch in sample:
        weights, p = compare_readings(batch, beforehand, card)
        best = weights.argmax(1)  # (B,)
        best = best[p[best, -1] == 0]
        seen = CNN.Seen(*(values[best] for values in batch.seen))
        log_p, distances = CNN.compare(seen, beforehand, card)
        nearest = distances.gather(1, log_p.argmax(1, keepdim=True))[:, 0]
        parts.append([values[nearest <= TYPICAL_DISTANCE] for values in seen])
    return CNN.adapt(CNN.Seen(*map(torch.cat, zip(*parts, strict=True))), beforehand, card)


def known_beforehand(card: CNN.Card, args: argparse.Namespace) -> CNN.Folder:
    """Return what --alphabet and --digits tell; all else is as in training. Raises UsageError."""
    import torch

    import CNN

    alphabet = parse_alphabet(args.alphabet, card.alphabet)
    allowed = torch.tensor([character in alphabet for character in card.alphabet])
    return CNN.Folder(allowed, card.statistics.means, args.digits)


def parse_alphabet(text: str, known: str) -> str:
    """Return the characters that --alphabet allows, in the order of `known`; case folds.

    text: characters and ranges such as A-F, in any mixture. Raises UsageError for any not known.
    """
    parts = re.findall(".-.|.", text, re.DOTALL)
    parts = [part.upper() if part.isascii() else part for part in parts]  # not ß to SS
    allowed = set()
    for part in parts:
        allowed |= {character for character in known if part[0] <= character <= part[-1]}
    ends = {end for part in parts for end in (part[0], part[-1])}
    if not parts or not ends <= allowed:
        expected = f"characters of {known}, or ranges such as A-F"
        raise UsageError(f"--alphabet {text!r}: expected {expected}")
    return "".join(character for character in known if character in allowed)


# Writing the results


def ascii_line(picture: Picture) -> str:
    """Write as the original project did: ASCII code and path; `---` for what is too doubtful."""
    code = f"{ord(picture.character):03d}" if picture.character else "---"
    line = f"{code}, {escaped(picture.path)}\n"
    return line if picture.outcome in ("answered", "doubtful") else ""


def csv_line(picture: Picture) -> str:
    """Write as a row of RFC 4180, with the bytes of the path as they are."""
    confidence = f"{picture.confidence:.4f}" if picture.confidence else ""
    alternatives = " ".join(f"{character}:{p:.4f}" for character, p in picture.alternatives)
    shown = picture._replace(confidence=confidence, alternatives=alternatives)
    row = io.StringIO()
    csv.writer(row).writerow(shown[: len(FIELDS)])
    return row.getvalue().removesuffix("\r\n") + "\n"


def json_line(picture: Picture) -> str:
    r"""Write as a JSON object; bytes of the path that are not UTF-8 as \udc80 to \udcff."""
    content = {name: getattr(picture, name) or None for name in FIELDS}
    content["confidence"] = round(picture.confidence, 4) or None
    content["alternatives"] = {character: round(p, 4) for character, p in picture.alternatives}
    return json.dumps(content) + "\n"


def report_row(picture: Picture) -> str:
    """Write as an object of the list in report.html; it can't end the script that it stands in."""
    row = {name: getattr(picture, name) for name in FIELDS}
    row["shown"] = escaped(picture.path)
    row["truth"] = find_truth(picture.path)
    row["image"] = "" if picture.image is None else base64.b64encode(picture.image).decode()
    row["thumbnail"] = picture.thumbnail
    return json.dumps(row).replace("<", "\\u003c") + ",\n"


def find_truth(path: str) -> str:
    """Return the character by which a picture's folder is named, as for train.py --extra, or ""."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return folder.upper() if re.fullmatch("[0-9A-Za-z]", folder) else ""


LINES = {"ascii": ascii_line, "csv": csv_line, "json": json_line}


def partial_of(file: Path) -> str:
    """Return the name under which FILE is written until it is complete; of a link, its target's."""
    return f"{os.path.realpath(file)}.partial"


class Output:
    """What becomes FILE when all went well, FILE.partial until then; without FILE, stdout.

    It is written without a buffer, so that what is answered is there; `error` says what failed.
    """

    def __init__(self, file: Path | None, line: Callable[[Picture], str], head: str) -> None:
        self.file = file
        self.line = line
        self.error = ""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(partial_of(file), flags, 0o666) if file else 1
        self.write(head)

    def write(self, text: str) -> None:
        """Write a text, unless a write has failed. Raises ReaderLeftError."""
        rest = memoryview(text.encode("utf-8", "surrogateescape"))
        try:
            while rest and not self.error:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:  # such as a full disk
            if isinstance(error, BrokenPipeError) and not self.file:
                raise ReaderLeftError from None
            shown = escaped(str(self.file)) if self.file else "stdout"
            self.error = f"{shown}: {error.strerror}"

    def complete(self, foot: str) -> None:
        """Write the end, and give the file its name."""
        self.write(foot)
        if self.file:
            os.close(self.descriptor)
        if self.file and not self.error:
            os.replace(partial_of(self.file), os.path.realpath(self.file))


def write(batches: Iterable[list[Picture]], args: argparse.Namespace, total: int) -> Counter[str]:
    """Write answers as they come, with --format ascii errors to stderr; count their outcomes.

    Where one of two outputs fails, the other is completed. Raises UsageError then.
    """
    counts: Counter[str] = Counter()
    head = ",".join(FIELDS) + "\n" if args.format == "csv" and args.rank == 0 else ""
    outputs = {Output(args.output, LINES[args.format], head): ""}  # what stands at their end
    if args.report:
        top, end, rest = PAGE.read_text("utf-8").partition("null]")
        outputs[Output(args.report, report_row, top)] = end + rest
    with tqdm(total=total, unit=" pictures", leave=False, dynamic_ncols=True, disable=None) as bar:
        for batch in batches:
            for output in outputs:
                output.write("".join(map(output.line, batch)))
            if all(output.error for output in outputs):
                break
            for picture in batch:
                counts[picture.outcome] += 1
                if args.format == "ascii" and picture.outcome in ("blank", "unreadable"):
                    say(f"{escaped(picture.path)}: {picture.error}")
            bar.update(len(batch))
    for output, foot in outputs.items():
        output.complete(foot)
    errors = [output.error for output in outputs if output.error]
    if errors:
        raise UsageError("; ".join(errors))
    return counts


def say(line: str) -> None:
    """Write a line to stderr; where that fails, as on a full disk, no answer is lost for it."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError:
        sys.stderr = nowhere()


def nowhere() -> TextIO:
    """Return a stream whose text nobody reads."""
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


# The command

SAMPLE = 1000  # pictures by which the net adapts to the folder, at most


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and a message where it is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    is_ranked = "TORCHELASTIC_RUN_ID" in os.environ  # schedulers set RANK for their own ends
    if is_ranked:
        cores = max(1, (cores or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    model = Path(__file__).with_name("model.pt")
    add("--input", nargs="+", required=True, metavar="PATH", help="folders, pictures, or both")
    add("--model", type=Path, default=model, metavar="FILE", help="weights [model.pt beside this]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, or cpu]")
    add("--alphabet", default="0-9A-Z", metavar="CHARS", help="what can be answered [%(default)s]")
    add("--digits", type=float, metavar="P", help="fraction of digits, 0 to 1 [estimated]")
    add(
        "--no-adapt",
        action="store_true",
        help="judge each picture alone; by default an answer depends on the pictures beside it, up "
        f"to {SAMPLE} of which tell how often each character comes and how it is written",
    )
    add("--min-confidence", type=float, default=0, metavar="P", help="below: no answer")
    add("--topk", type=int, default=3, metavar="K", help="characters in csv, json [%(default)s]")
    add("--format", choices=LINES, default="ascii", help="of the results [%(default)s]")
    add("--output", type=Path, metavar="FILE", help="where results go instead of stdout")
    add("--report", type=Path, metavar="FILE", help="a page for going through the pictures by eye")
    add("--batch-size", type=int, default=64, metavar="N", help="of the net [%(default)s]")
    add("--workers", type=int, default=cores or 1, metavar="N", help="to read [one per core]")
    add("--timeout", type=float, default=30, metavar="S", help="per picture [%(default)s s]")
    args = parser.parse_args(arguments)
    if not 0 <= args.min_confidence <= 1:
        parser.error("--min-confidence: expected 0 to 1")
    if args.digits is not None and not 0 <= args.digits <= 1:
        parser.error("--digits: expected 0 to 1")
    if not (min(args.topk, args.batch_size, args.workers) > 0 and 0 < args.timeout < math.inf):
        parser.error("--topk, --batch-size, --workers, --timeout: expected more than 0")
    args.rank = 0
    args.world_size = 1
    if is_ranked:
        args.rank = int(os.environ["RANK"])
        args.world_size = int(os.environ["WORLD_SIZE"])
        if not args.output:
            parser.error("under torchrun each process writes a file: name it with --output")
        args.output = with_rank(args.output, args.rank)
        args.report = args.report and with_rank(args.report, args.rank)
    return args


def with_rank(file: Path, rank: int) -> Path:
    """Return the name of a rank's own file: answers.0.csv."""
    return file.with_name(f"{file.stem}.{rank}{file.suffix}")


def check_files(args: argparse.Namespace) -> None:
    """Raise UsageError where an input is missing or an output would replace what is read."""
    for name in args.input:
        if not os.path.lexists(name):
            raise UsageError(f"--input {escaped(name)}: no such file or folder")
    taken = {os.path.realpath(file) for file in (PAGE, args.model, *args.input)}
    for flag, file in (("--output", args.output), ("--report", args.report)):
        if not file:
            continue
        target = os.path.realpath(file)
        shown = escaped(str(file))
        is_file = os.path.isfile(target)
        if os.path.exists(target) and not is_file:
            raise UsageError(f"{flag} {shown}: not a regular file: choose another")
        if not os.path.isdir(os.path.dirname(target)):
            raise UsageError(f"{flag} {shown}: its folder is not there: make it first")
        is_picture = is_file and target.lower().endswith(SUFFIXES)
        replaced = {target, partial_of(file)}
        if is_picture or replaced & taken:
            raise UsageError(f"{flag} {shown}: would replace what is read: choose another")
        taken |= replaced


def run(args: argparse.Namespace) -> int:
    """Classify everything in args.input; return the exit code, 0 or 1. Raises UsageError."""
    check_files(args)
    paths, errors, passed_over = list_pictures(args.input)
    our_paths = paths[args.rank :: args.world_size]
    unlisted = [
        Picture(error.filename, error=f"folder can't be listed: {error.strerror}")
        for error in errors[args.rank :: args.world_size]
    ]
    with ExitStack() as stack:
        workers = max(1, min(args.workers, math.ceil(len(our_paths) / CHUNK)))
        threads = stack.enter_context(ThreadPoolExecutor(2 * workers))  # half of them may wait
        readers = Readers(workers, args)
        stack.callback(readers.stop)  # before the threads are waited for
        net = TrainedNet(args)
        beforehand = known_beforehand(net.card, args)
        gc.freeze()  # no object of torch is looked through again, which saves 0.4 s at the end
        started = time.monotonic()

        def in_threads(task: Callable, paths: list[str]) -> Iterator:
            pictures = readers.read(paths, net.side)
            submit = partial(threads.submit, task)
            batches = in_order(submit, batched(pictures, args.batch_size), 2 * workers)
            return (future.result() for _, future in batches)

        seeing = partial(see_batch, net=net, known=beforehand, readers=readers)
        step = max(1, math.ceil(len(paths) / SAMPLE))  # through all paths: all ranks adapt alike
        sample = [] if args.no_adapt else list(in_threads(seeing, paths[::step]))
        folder = adapt(sample, beforehand, net.card) if sample else beforehand

        answering = partial(answer, folder=folder, card=net.card, args=args)
        of_sample = {
            picture.path: picture for picture in chain.from_iterable(map(answering, sample))
        }
        others = [path for path in our_paths if path not in of_sample]
        answered = chain.from_iterable(in_threads(lambda batch: answering(seeing(batch)), others))
        pictures = (of_sample.get(path) or next(answered) for path in our_paths)
        batches = batched(pictures, args.batch_size)
        counts = write(chain([unlisted], batches), args, len(our_paths) + len(unlisted))
        seconds = time.monotonic() - started
    digits = folder.digits if args.digits is None else None
    summarise(counts, passed_over, digits, seconds)
    is_complete = counts.total() == counts["answered"] and paths
    return 0 if is_complete or args.world_size > 1 else 1


def summarise(counts: Counter[str], passed_over: int, digits: float | None, seconds: float) -> None:
    """Say on stderr what became of the pictures, and how fast."""
    kinds = [*sorted(counts.items()), ("other files passed over", passed_over)]
    words = [f"{count:,} {kind}" for kind, count in kinds if count] or ["none found"]
    if digits is not None:
        words.append(f"about {100 * digits:.0f} % digits")
    total = counts.total()
    say(f"{total:,} pictures: {', '.join(words)} ({total / seconds:,.0f} pictures/s)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""

    def stop(number: int, frame: object) -> None:
        for each in stopping:
            signal.signal(each, signal.SIG_IGN)  # once is enough: the end is not stopped
        raise KeyboardInterrupt(number)

    if sys.stderr is None:  # closed: 2>&-
        sys.stderr = nowhere()
    args = parse(arguments)
    signals = (signal.SIGINT, signal.SIGTERM)
    stopping = [each for each in signals if signal.getsignal(each) != signal.SIG_IGN]
    for each in stopping:
        signal.signal(each, stop)
    try:
        return run(args)
    except ReaderLeftError:
        return 1
    except KeyboardInterrupt as stopped:
        number = stopped.args[0]
        code = 128 + number
        message = f"stopped by {signal.Signals(number).name}"
        if args.output and os.path.exists(partial_of(args.output)):
            message += f"; what was answered is in {escaped(partial_of(args.output))}"
    except (OSError, UsageError) as error:  # such as a full disk
        code = 2
        message = str(error).partition("\n")[0]
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        code = 2
        message = f"{str(error).partition('. ')[0]}: try a smaller --batch-size"
    say(f"inference.py: {message}")
    return code


if __name__ == "__main__":
    os.environ["PYTHONSAFEPATH"] = "1"  # our workers take no code from the folder we are run in
    sys.exit(main())
