"""Name the handwritten character in every picture of a folder.

    python3 inference.py --input tests/samples

prints one line per picture, the ASCII code of the character and the path, by folder and name:

    048, tests/samples/0_scan.png
    049, tests/samples/1_pencil.jpg

Digits and letters, 36 classes; pictures of one character, of any size, dark on light or light on
dark. `--format csv` or `json` adds confidences, alternatives and errors, `--report FILE.html` makes
a page to look through. Results go to stdout or `--output`, all else to stderr. Exit code: 0 all
answered, 1 some could not be or none was found (but under torchrun, which would end the other
processes), 2 wrong usage, a full disk or GPU, 130 or 143 stopped by Ctrl-C or SIGTERM.
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
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO
from weakref import WeakSet

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from picture import BLANK, SUFFIXES, Reading, explained, fit_first, propose, read, to_grey

if TYPE_CHECKING:  # torch is imported late: the workers do without
    from torch import Tensor

PAGE = Path(__file__).with_name("report.html")
UNPRINTABLE = re.compile(  # backslash, control characters and bytes that are not UTF-8
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UsageError(Exception):
    """What was asked for can't be done; one line for the user."""


class ReaderLeftError(Exception):
    """Whoever read stdout has seen enough."""


class Picture(NamedTuple):
    """A picture, as a worker reads it first; later with an answer."""

    path: str
    character: str = ""  # the answer; none where there is an error
    confidence: float = 0.0  # 0 where no character is found
    alternatives: tuple[tuple[str, float], ...] = ()  # the next likely; all, without an answer
    lookalike: str = ""  # the group, such as "1IL", that holds the two likeliest characters
    error: str = ""
    image: np.ndarray | None = None  # (SIZE, SIZE) uint8, ink 255 on 0: a reading of it
    grey: np.ndarray | None = None  # (H, W) uint8, as decoded, for other readings
    in_doubt: bool | None = None  # whether other readings are needed; None: there can be none
    thumbnail: str = ""  # data URI, where a report is asked for

    @property
    def outcome(self) -> str:
        """Return the word by which it is counted."""
        if self.character:
            return "answered"
        if self.confidence:
            return "doubtful"
        return "blank" if self.error == BLANK else "unreadable"


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
CHUNKS_AHEAD = 8  # under way for each worker, so that none waits
WORKER_BYTES = 3 * 2**30  # of address space; a picture just under Pillow's bomb limit takes a third
RESTARTS = 3  # of the workers, one after another, before it is given up
THUMBNAIL_SIDE = 96  # px


def read_picture(path: str, side: int, thumbnails: bool) -> Picture:
    """Take the first reading of a picture; where it is blank, others are needed."""
    try:
        with explained(path):
            decoded = read(path)
    except ValueError as error:
        return Picture(path, error=str(error))
    picture = Picture(path, thumbnail=make_thumbnail(decoded) if thumbnails else "")
    grey = to_grey(decoded)
    try:
        image, in_doubt = fit_first(grey, side)
    except ValueError as error:
        return picture._replace(error=str(error), grey=grey, in_doubt=True)
    return picture._replace(image=image, grey=grey, in_doubt=in_doubt)


def read_again(path: str, side: int) -> list[Reading]:
    """Take the other readings of a picture; an image comes once, where it has least penalty."""
    readings: dict[bytes | None, Reading] = {}
    with suppress(ValueError):  # such as too little memory to read it larger: the first has to do
        for reading in propose(path, side):
            pixels = None if reading.image is None else reading.image.tobytes()
            readings.setdefault(pixels, reading)
    return list(readings.values())


def make_thumbnail(picture: Image.Image) -> str:
    """Return a decoded picture as a data URI, small enough for a page of thousands.

    "" where that fails, which is no reason to lose the answer.
    """
    with suppress(Exception):
        if picture.mode in ("I", "F"):
            picture = Image.fromarray(to_grey(picture))
        small = picture.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=90)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return ""


def do_all(task: Callable, paths: list[str], timeout: float) -> list:
    """Call `task` with each path, each in `timeout` seconds (0: without limit): a worker's work."""
    results = []
    try:
        for path in paths:
            limit_time(timeout)
            results.append(task(path))
    finally:
        limit_time(0)
    return results


def limit_time(seconds: float) -> None:
    """Let SIGALRM end this process unless it is called again in time; 0: take the limit off."""
    if hasattr(signal, "setitimer"):  # Windows has none: there the limit of the whole chunk counts
        signal.setitimer(signal.ITIMER_REAL, seconds)


def confine() -> None:
    """Keep the harm small that a hostile file can do in this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for those started later, in another's place
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others print what files tell them to
    warnings.simplefilter("ignore")  # nobody would see them
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not this one
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, hard))


class Readers:
    """Worker processes that read pictures, so that a picture that breaks one is lost alone."""

    def __init__(self, workers: int, args: argparse.Namespace) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are enough
        self.workers = workers
        self.chunks_ahead = CHUNKS_AHEAD * workers
        self.timeout = args.timeout  # seconds per picture
        self.thumbnails = bool(args.report)
        self.futures: WeakSet[Future] = WeakSet()
        self.lock = threading.RLock()  # of the pool
        self.is_stopped = False
        self.restarts = 0  # since a worker last did its work
        self.start()

    def start(self) -> None:
        """Start the workers in a new pool. Raises UsageError where that can't be done."""
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(self.workers, initializer=confine, context=spawn)
        try:
            with interrupts_ignored():
                self.pool.schedule(int)  # a first task starts them, while torch is imported
        except (OSError, RuntimeError) as error:
            cause = error.__cause__ or error
            raise UsageError(f"processes that read pictures can't be started: {cause}") from None

    def restart(self) -> None:
        """Replace the pool, which breaks where a worker dies that has nothing to do."""
        if self.is_stopped:
            raise CancelledError
        self.restarts += 1
        if self.restarts > RESTARTS:
            raise UsageError("processes that read pictures die as they start: is memory short?")
        self.end_pool()
        self.start()

    def end_pool(self) -> None:
        """End the workers, and the waiting for what they were to do."""
        self.pool.stop()
        self.pool.join()
        for future in list(self.futures):
            future.cancel()

    def stop(self) -> None:
        """End the workers for good."""
        with self.lock:
            self.is_stopped = True
            self.end_pool()

    def first_readings(
        self, paths: list[str], side: int, known: dict[str, Picture]
    ) -> Iterator[Picture]:
        """Yield the pictures at these paths, in order; those that are known are not read again."""
        task = partial(read_picture, side=side, thumbnails=self.thumbnails)
        unknown = [path for path in paths if path not in known]
        others = self.call(task, batched(unknown, CHUNK))
        for path in paths:
            if path in known:
                yield known[path]
            else:
                _, picture, error = next(others)
                yield picture or Picture(path, error=error)

    def other_readings(self, paths: list[str], side: int) -> tuple[list[str], list[Reading]]:
        """Return the other readings of the pictures at these paths, and the path of each."""
        owners = []
        readings = []
        for path, found, error in self.call(partial(read_again, side=side), batched(paths, CHUNK)):
            if not error:
                owners += [path] * len(found)
                readings += found
        return owners, readings

    def call(self, task: Callable, chunks: Iterable[list[str]]) -> Iterator[tuple[str, Any, str]]:
        """Have workers call `task` with paths; yield each path with the result and the error.

        One file that kills or outlasts its worker fails its whole chunk: its pictures are then
        tried again one by one, which tells the guilty from the others.
        """
        submit = partial(self.schedule, task)
        for chunk, future in in_order(submit, chunks, self.chunks_ahead):
            error = self.wait_for(future)
            if error is None:
                self.restarts = 0
                for path, result in zip(chunk, future.result(), strict=True):
                    yield path, result, ""
            elif isinstance(error, (BrokenProcessPool, CancelledError)):  # not by a picture
                yield from self.call(task, [chunk])
            elif len(chunk) > 1:
                yield from self.call(task, [[path] for path in chunk])
            elif isinstance(error, TimeoutError):
                yield chunk[0], None, f"takes more than {self.timeout:g} s to decode"
            elif isinstance(error, ProcessExpired):
                yield chunk[0], None, f"its decoder died (exit code {error.exitcode})"
            else:
                yield chunk[0], None, f"can't be read: {error!r}"

    def schedule(self, task: Callable, paths: list[str]) -> Future:
        """Have a worker call `task` with each path; the future holds the list of results."""
        each = 0 if len(paths) == 1 else self.timeout  # a lone path is ended by the pool's limit
        work = (task, paths, each)
        timeout = self.timeout * len(paths)
        with self.lock:
            try:
                future = self.pool.schedule(do_all, work, timeout=timeout)
            except RuntimeError:  # it is broken, or stopped
                self.restart()
                future = self.pool.schedule(do_all, work, timeout=timeout)
            self.futures.add(future)
        return future

    def wait_for(self, future: Future) -> BaseException | None:
        """Return the error of a task when it is done; a pool may break and forget the task."""
        while True:
            try:
                return future.exception(timeout=1)
            except CancelledError as error:
                return error
            except TimeoutError:
                if not self.pool.active and not future.done():
                    return BrokenProcessPool()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let processes that start meanwhile ignore Ctrl-C, which a terminal sends to all of them."""
    if threading.current_thread() is not threading.main_thread():  # where it can't be set
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


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


# The net, and how it adapts to the folder; constants were tuned on ../shared/field and scenes

BLOCK = 64  # images: a batch is filled up to whole blocks, as kernels differ by batch size
TYPICALITY = 5.0  # nats that the median distance of validation weighs beside log probabilities
DOUBT_DISTANCE = 0.88  # of the 95 % quantile: of a first reading farther from its class, others
# are asked for
BLANK_SCORE = -14.0  # nats: where a reading is blank, an image must score more to be answered
DIGIT_PRIOR_WEIGHT = 3.6  # pictures that the digit prior in training counts for in the estimate
MEAN_WEIGHT = 40.0  # pictures that the mean of a class in training counts for
CLASS_PRIOR_WEIGHT = 150.0  # pictures that the prior of a class in training counts for
ADAPTING_ROUNDS = 3


class Seen(NamedTuple):
    """What the net sees in images; distances are squared, in medians of validation."""

    log_p: Tensor  # (N, allowed), nats: how likely each allowed character is, among all
    features: Tensor  # (N, D), whitened
    distances: Tensor  # (N, allowed), to the class means in training
    adapted_distances: Tensor  # (N, allowed), to the class means adapted to the folder


class Candidate(NamedTuple):
    """What the net says of a reading that holds a character."""

    image: np.ndarray  # (SIZE, SIZE) uint8
    ranked: tuple[tuple[str, float], ...]  # the likeliest characters and their probabilities
    distance: float  # of the likeliest class, in medians of validation
    score: float  # nats: how much the image looks like a character


class Classifier:
    """A net made ready to answer, out of the characters of --alphabet.

    How a picture becomes an answer:

    1. The net judges the first reading. It is in doubt where picture.py says so, where it is blank,
       or where it is far from the mean of its class: DOUBT_DISTANCE.
    2. Of a picture in doubt, workers take other readings, which the net judges, too.
    3. The reading with the best score is chosen: the log probability of the likeliest character,
       less TYPICALITY times its distance to the class's mean, adapted to the folder, less the
       penalty that picture.py gave the reading.
    4. The picture is blank where all other readings are, or where one is, be it the first, and the
       best score is below BLANK_SCORE.
    5. The answer is the likeliest character of the reading chosen, the confidence its probability
       among those allowed. Below --min-confidence there is no answer.

    Probabilities are calibrated by the temperature in the weights file, and adapted to the folder.
    """

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
            self.characters = parse_alphabet(args.alphabet, net.card.alphabet)
        except ValueError as error:
            raise UsageError(error) from None
        self.args = args
        self.card = net.card
        self.side = CNN.SIZE
        self.classes = [net.card.alphabet.index(character) for character in self.characters]
        on_cpu = self.device.type == "cpu"
        self.dtype = CNN.mixed_precision(self.device) if on_cpu else torch.float32
        self.net = net.fused().to(self.dtype, memory_format=torch.channels_last)
        self.net.fc2.float()  # the full resolution for probabilities

        width = net.fc2.in_features
        everything_is_typical = CNN.ClassStatistics(
            torch.zeros(width, width), torch.zeros(len(net.card.alphabet), width), 1.0, math.inf
        )
        self.statistics = net.card.statistics or everything_is_typical
        self.whitening = self.statistics.whitening.to(self.device)
        self.means = self.statistics.means[self.classes]  # (allowed, D), whitened
        self.adapted_means = self.means
        # How many pictures each of the adapted means rests on, those of training included
        self.counts = torch.full([len(self.classes)], MEAN_WEIGHT, dtype=torch.float64)
        self.class_log_prior = torch.zeros_like(self.counts)  # among digits or among letters
        self.memberships: dict[str, Tensor] = {}  # (allowed,) by path: how far a picture took part

        self.are_digits = torch.tensor([character.isdigit() for character in self.characters])
        self.usual_digits = self.find_usual_digits()
        self.are_mixed = 0 < self.usual_digits < 1  # both digits and letters are allowed
        self.log_prior = torch.zeros(len(net.card.alphabet), dtype=torch.float64)  # added to logits
        if args.digits is not None:
            self.expect_digits(args.digits)

    def find_usual_digits(self) -> float:
        """Return the fraction of digits among images of allowed characters, as in training.

        There every digit was as frequent as any other, and every letter as any other.
        """
        digits = sum(map(str.isdigit, self.characters)) / sum(map(str.isdigit, self.card.alphabet))
        letters = sum(map(str.isalpha, self.characters)) / sum(map(str.isalpha, self.card.alphabet))
        digits *= self.card.digit_prior
        letters *= 1 - self.card.digit_prior
        return digits / (digits + letters)

    def expect_digits(self, digits: float) -> None:
        """Take `digits` for their fraction among the pictures, in place of that in training.

        Where only digits, or only letters, are allowed, that says nothing.
        """
        if self.are_mixed:
            digit = math.log(max(1e-300, digits / self.usual_digits))  # no -inf: one is best
            letter = math.log(max(1e-300, (1 - digits) / (1 - self.usual_digits)))
            log_prior = [digit if one.isdigit() else letter for one in self.card.alphabet]
            self.log_prior = self.log_prior.new_tensor(log_prior)

    def adapt(self, pictures: Iterable[Picture], threads: Executor) -> float | None:
        """Adapt to the folder by a sample of it; return the fraction of digits, if estimated.

        First the fraction of digits is estimated, unless --digits tells it or --alphabet has only
        digits or only letters; then how the folder's writers write each character.
        """
        import torch

        readable = [picture for picture in pictures if picture.image is not None]
        if not readable:
            return None
        images = [picture.image for picture in readable]
        blocks = list(threads.map(self.see, batched(images, BLOCK)))
        seen = Seen(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        estimate = None
        if self.are_mixed and self.args.digits is None:
            p_digit = seen.log_p.softmax(1)[:, self.are_digits].sum(1)
            estimate = estimate_digits(p_digit, self.usual_digits)
            self.expect_digits(estimate)
            seen = seen._replace(log_p=seen.log_p + self.log_prior[self.classes])
        if self.card.statistics is not None:
            self.adapt_means([picture.path for picture in readable], seen)
        return estimate

    def adapt_means(self, paths: list[str], seen: Seen) -> None:
        """Move the means of the classes towards the sample's, by expectation maximisation.

        A mean moves as far as the pictures taken for its class carry it. Only typical ones do. The
        priors of the classes, among digits and among letters, follow in the same way.
        """
        answers = seen.log_p.argmax(1, keepdim=True)
        limit = self.statistics.quantile95 / self.statistics.median
        takes_part = seen.distances.gather(1, answers) <= limit  # (N, 1)
        log_p = seen.log_p.double()
        for _ in range(ADAPTING_ROUNDS):
            memberships = log_p.softmax(1) * takes_part  # (N, allowed)
            pictures = memberships.sum(0)  # (allowed,): how many each class has
            self.counts = pictures + MEAN_WEIGHT
            totals = memberships.T @ seen.features.double() + MEAN_WEIGHT * self.means
            self.adapted_means = (totals / self.counts[:, None]).float()
            prior = pictures + CLASS_PRIOR_WEIGHT
            for group in (self.are_digits, ~self.are_digits):
                prior[group] /= prior[group].mean()
            self.class_log_prior = prior.log()
            distances = self.find_distances(seen.features, self.adapted_means)
            log_p = self.adapted(seen._replace(adapted_distances=distances), memberships)
        self.memberships = dict(zip(paths, memberships, strict=True))

    def adapted(self, seen: Seen, memberships: Tensor) -> Tensor:
        """Return log probabilities (N, allowed) adapted to the folder.

        memberships: (N, allowed), how far an image took part in each class. It has no part in the
        mean that it is judged by: an image that took part with weight w has pulled the mean of n
        pictures towards itself, and from the mean without it, it is farther by n / (n - w).
        """
        farther = self.counts / (self.counts - memberships)
        gain = seen.distances - seen.adapted_distances * farther**2
        return seen.log_p + self.class_log_prior + TYPICALITY * gain

    def see(self, images: list[np.ndarray]) -> Seen:
        """Show images to the net, (SIZE, SIZE) uint8, ink 255 on 0."""
        import torch

        import CNN

        missing = -len(images) % BLOCK  # to fill up the last block
        pixels = np.stack(images + missing * [np.zeros_like(images[0])])
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).unsqueeze(1).to(self.device, self.dtype) / 255
            features = self.net.features(batch).float()  # (N + missing, D)
            logits = self.net.fc2(features) / self.card.temperature + self.log_prior.to(features)
            log_p = logits.log_softmax(1)[:, self.classes].cpu()
            features = CNN.whiten(features, self.whitening).cpu()
            distances = self.find_distances(features, self.means)
            adapted_distances = self.find_distances(features, self.adapted_means)
        seen = (log_p, features, distances, adapted_distances)
        return Seen(*(values[: len(images)] for values in seen))

    def find_distances(self, features: Tensor, means: Tensor) -> Tensor:
        """Return the squared distances (N, allowed) to means, in medians of validation."""
        import CNN

        return CNN.square_distances(features, means) / self.statistics.median

    def classify(self, pictures: list[Picture], readers: Readers) -> list[Picture]:
        """Return pictures with answers; `readers` take other readings of those in doubt."""
        paths = [picture.path for picture in pictures]
        firsts = self.judge(paths, [Reading(picture.image) for picture in pictures])
        pairs = list(zip(pictures, firsts, strict=True))
        in_doubt = [picture.path for picture, first in pairs if self.is_in_doubt(picture, first)]
        paths, readings = readers.other_readings(in_doubt, self.side)
        others = defaultdict(list)  # by path
        for path, candidate in zip(paths, self.judge(paths, readings), strict=True):
            others[path].append(candidate)
        return [
            self.answer(picture, choose(first, others[picture.path])) for picture, first in pairs
        ]

    def judge(self, paths: list[str], readings: list[Reading]) -> list[Candidate | None]:
        """Return what the net says of readings of the pictures at `paths`; None of a blank one."""
        import torch

        candidates: list[Candidate | None] = [None] * len(readings)
        shown = [i for i, reading in enumerate(readings) if reading.image is not None]
        if not shown:
            return candidates
        seen = self.see([readings[i].image for i in shown])
        no_part = torch.zeros(len(self.classes))
        memberships = [self.memberships.get(paths[i], no_part) for i in shown]
        log_p = self.adapted(seen, torch.stack(memberships))
        best, answers = log_p.max(1, keepdim=True)
        distances = seen.distances.gather(1, answers)  # (N, 1)
        scores = best - TYPICALITY * distances  # the adapted ones: `adapted` has added these
        p, order = log_p.softmax(1).sort(dim=1, descending=True, stable=True)
        count = max(2, self.args.topk)
        columns = (order[:, :count], p[:, :count], distances[:, 0], scores[:, 0])
        rows = zip(shown, *(column.tolist() for column in columns), strict=True)
        for i, classes, probabilities, distance, score in rows:
            characters = [self.characters[label] for label in classes]
            ranked = tuple(zip(characters, probabilities, strict=True))
            score -= readings[i].penalty
            candidates[i] = Candidate(readings[i].image, ranked, distance, score)
        return candidates

    def is_in_doubt(self, picture: Picture, first: Candidate | None) -> bool:
        """Say whether other readings are to be taken; never without class statistics."""
        if self.card.statistics is None or picture.in_doubt is None:
            return False
        limit = DOUBT_DISTANCE * self.statistics.quantile95 / self.statistics.median
        return picture.in_doubt or first.distance > limit

    def answer(self, picture: Picture, chosen: Candidate | None) -> Picture:
        """Answer with the likeliest character, unless the picture is blank or too doubtful."""
        if chosen is None:
            return picture._replace(error=picture.error or BLANK)
        character, confidence = chosen.ranked[0]
        pair = {character for character, _ in chosen.ranked[:2]}
        groups = [group for group in self.card.lookalikes if len(pair) == 2 and pair <= {*group}]
        picture = picture._replace(
            confidence=confidence, lookalike="".join(groups[:1]), error="", image=chosen.image
        )
        topk = self.args.topk
        limit = self.args.min_confidence
        if confidence >= limit:
            return picture._replace(character=character, alternatives=chosen.ranked[1:topk])
        error = f"no answer: {confidence:.4f} is below --min-confidence {limit:g}"
        return picture._replace(alternatives=chosen.ranked[:topk], error=error)


def choose(first: Candidate | None, others: list[Candidate | None]) -> Candidate | None:
    """Choose among the first and the other readings of a picture; None stands for a blank one."""
    if not others:
        return first
    if all(candidate is None for candidate in others):
        return None
    candidates = [candidate for candidate in (first, *others) if candidate is not None]
    best = max(candidates, key=lambda candidate: candidate.score)
    some_are_blank = None in (first, *others)
    return None if some_are_blank and best.score < BLANK_SCORE else best


def estimate_digits(p_digit: Tensor, usual: float) -> float:
    """Return the fraction of digits among pictures, by expectation maximisation.

    p_digit: (N,) how likely each is a digit where `usual` is their fraction, as it was in training.
    Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14; two groups, not 36.
    """
    fraction = usual
    for _ in range(200):
        digit = p_digit * fraction / usual
        letter = (1 - p_digit) * (1 - fraction) / (1 - usual)
        counted = (digit / (digit + letter)).sum() + DIGIT_PRIOR_WEIGHT * usual
        fraction = counted / (len(p_digit) + DIGIT_PRIOR_WEIGHT)
    return float(fraction)


def parse_alphabet(text: str, known: str) -> str:
    """Return the characters that --alphabet allows, in the order of `known`; case folds.

    text: characters and ranges such as A-F, in any mixture. Raises ValueError for any not known.
    """
    parts = re.findall(".-.|.", text, re.DOTALL)
    parts = [part.upper() if part.isascii() else part for part in parts]  # not ß to SS
    allowed = set()
    for part in parts:
        allowed |= {character for character in known if part[0] <= character <= part[-1]}
    ends = {end for part in parts for end in (part[0], part[-1])}
    if not parts or not ends <= allowed:
        expected = f"characters of {known}, or ranges such as A-F"
        raise ValueError(f"--alphabet {text!r}: expected {expected}")
    return "".join(character for character in known if character in allowed)


# Writing the results


def escaped(text: str) -> str:
    r"""Return text as one line that can't steer a terminal: \n, \x1b, a byte 0xff as \udcff."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


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
        classifier = Classifier(args)
        if classifier.card.statistics is None and args.rank == 0:
            note = "no class statistics in it: first readings are taken, means are not adapted"
            print(f"inference.py: {args.model}: {note}", file=sys.stderr)
        gc.freeze()  # nothing of torch is looked through again, which saves 0.4 s at the end
        started = time.monotonic()

        sample: dict[str, Picture] = {}  # by path
        if not args.no_adapt:
            step = max(1, math.ceil(len(paths) / SAMPLE))
            for picture in readers.first_readings(paths[::step], classifier.side, known={}):
                sample[picture.path] = picture
        digits = classifier.adapt(sample.values(), threads)

        pictures = readers.first_readings(our_paths, classifier.side, known=sample)
        submit = partial(threads.submit, classifier.classify, readers=readers)
        batches = in_order(submit, batched(pictures, args.batch_size), 2 * workers)
        answered = (future.result() for _, future in batches)
        counts = write(chain([unlisted], answered), args, len(our_paths) + len(unlisted))
        seconds = time.monotonic() - started
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
    rate = f"{total / seconds:,.0f} pictures/s"
    say(f"{total:,} pictures: {', '.join(words)} ({rate})")


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
