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
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from picture import BLANK, SUFFIXES, Reading, propose, read, read_first, to_grey

PAGE = Path(__file__).with_name("report.html")
UNPRINTABLE = re.compile(  # backslash, control characters and bytes that are not UTF-8
    "[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UsageError(Exception):
    """What was asked for can't be done; one line for the user."""


class Result(NamedTuple):
    """What is said of a picture: an answer, or an error."""

    path: str
    character: str = ""  # none where there is an error
    confidence: float = 0.0
    alternatives: tuple[tuple[str, float], ...] = ()  # the next likely; all, without an answer
    lookalike: str = ""  # the group, such as "1IL", that holds the two likeliest characters
    error: str = ""
    image: bytes = b""  # as the net saw it, SIZE * SIZE bytes
    thumbnail: str = ""  # data URI, where a report is asked for


FIELDS = Result._fields[:6]  # of csv and json


def list_pictures(inputs: Iterable[str]) -> tuple[list[str], list[OSError], int]:
    """Return the paths of all pictures, errors of folders, and how many files are passed over.

    A file in `inputs` is always taken, in a folder what has a picture's suffix; a path counts once.
    A folder's pictures come by name, then its folders, but for links to folders.
    What is hidden in a folder (.git, macOS's ._scan.png) is passed over and not counted.
    """
    paths = []
    errors = []
    passed_over = 0
    for name in dict.fromkeys(PurePath(name).as_posix() for name in inputs):
        if not os.path.isdir(name):
            paths.append(name)
            continue
        for folder, folders, files in os.walk(name, onerror=errors.append):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            files = [file for file in files if not file.startswith(".")]
            pictures = sorted(file for file in files if file.lower().endswith(SUFFIXES))
            paths += [os.path.join(folder, file).removeprefix("./") for file in pictures]
            passed_over += len(files) - len(pictures)
    return list(dict.fromkeys(paths)), errors, passed_over


# Reading, in worker processes

CHUNK = 64  # pictures that a worker is given at a time
CHUNKS_AHEAD = 8  # under way for each worker, so that none waits
WORKER_BYTES = 3 * 2**30  # of address space; a picture just under Pillow's bomb limit takes a third
THUMBNAIL_SIDE = 96  # px


class Look(NamedTuple):
    """The first reading of a picture."""

    path: str
    image: bytes = b""  # SIZE * SIZE of them, ink 255 on 0; none where there is an error
    in_doubt: bool | None = None  # whether other readings are asked for; None: there are none
    error: str = ""
    thumbnail: str = ""


def look_at(path: str, side: int, thumbnails: bool) -> Look:
    """Take the first reading of a picture."""
    look = Look(path)
    try:
        image, in_doubt = read_first(path, side)
        look = look._replace(image=image.tobytes(), in_doubt=in_doubt)
    except ValueError as error:
        look = look._replace(error=str(error))
    if thumbnails and look.error in ("", BLANK):
        look = look._replace(thumbnail=make_thumbnail(path))
    return look


def look_again(path: str, side: int) -> list[Reading]:
    """Take the other readings of a picture; an image comes once, where it has least penalty."""
    readings: dict[bytes | None, Reading] = {}
    with suppress(ValueError):  # such as too little memory to read it larger: the first has to do
        for image, penalty in propose(path, side):
            pixels = None if image is None else image.tobytes()
            readings.setdefault(pixels, Reading(pixels, penalty))
    return list(readings.values())


def make_thumbnail(path: str) -> str:
    """Return a picture as a data URI, small enough for a page of thousands."""
    image = read(path)
    if image.mode in ("I", "F"):
        image = Image.fromarray(to_grey(image))
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others print what files tell them to
    warnings.simplefilter("ignore")  # nobody would see them
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not this one
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, hard))


def start_pool(workers: int) -> ProcessPool:
    """Start worker processes, so that what a file does to its decoder ends with it."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers are enough
    pool = ProcessPool(workers, initializer=confine, context=multiprocessing.get_context("spawn"))
    pool.schedule(int)  # a first task starts them, while torch is imported
    return pool


class Readers:
    """Has pictures read by the workers of a pool; a picture that breaks them is lost alone."""

    def __init__(
        self, pool: ProcessPool, workers: int, side: int, args: argparse.Namespace
    ) -> None:
        self.pool = pool
        self.workers = workers
        self.timeout = args.timeout  # seconds per picture
        self.first_look = partial(look_at, side=side, thumbnails=bool(args.report))
        self.second_look = partial(look_again, side=side)

    def schedule(self, task: Callable, paths: list[str]) -> Future:
        """Have a worker call `task` with each path; the future holds the list of results."""
        each = 0 if len(paths) == 1 else self.timeout  # for one, the pool's own limit does
        work = (task, paths, each)
        return self.pool.schedule(do_all, work, timeout=self.timeout * len(paths))

    def look(self, paths: list[str]) -> Iterator[Look]:
        """Yield the first look at each path, in order."""
        yield from self._look([paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)])

    def _look(self, chunks: list[list[str]]) -> Iterator[Look]:
        """Look at chunks of paths.

        One file that kills or outlasts its worker fails its whole chunk: its pictures are then
        tried again one by one, which tells the guilty from the others.
        """
        submit = partial(self.schedule, self.first_look)
        for chunk, future in in_order(submit, chunks, CHUNKS_AHEAD * self.workers):
            error = future.exception()
            if not error:
                yield from future.result()
            elif len(chunk) > 1:
                yield from self._look([[path] for path in chunk])
            elif isinstance(error, TimeoutError):
                yield Look(chunk[0], error=f"takes more than {self.timeout:g} s to decode")
            elif isinstance(error, ProcessExpired):
                yield Look(chunk[0], error=f"its decoder died (exit code {error.exitcode})")
            else:
                yield Look(chunk[0], error=f"can't be read: {error!r}")

    def look_again(self, paths: list[str]) -> Future:
        """Have the other readings of each path taken, for `readings_of`."""
        if paths:
            return self.schedule(self.second_look, paths)
        nothing: Future = Future()
        nothing.set_result([])
        return nothing

    def readings_of(self, paths: list[str], future: Future) -> list[list[Reading]]:
        """Return what came of `look_again`, per path; where a worker fails, no other readings."""
        if not future.exception():
            return future.result()
        if len(paths) == 1:
            return [[]]
        return [self.readings_of([path], self.look_again([path]))[0] for path in paths]


def in_order(submit: Callable, items: Iterable, ahead: int) -> Iterator[tuple[Any, Future]]:
    """Yield items with their futures, in order, while up to `ahead` of them are under way."""
    under_way: deque[tuple[Any, Future]] = deque()
    for item in items:
        under_way.append((item, submit(item)))
        while under_way and (under_way[0][1].done() or len(under_way) > ahead):
            yield under_way.popleft()
    yield from under_way


# The net, and how it adapts to the folder

BLOCK = 64  # images: a batch is filled up to whole blocks, as kernels differ by batch size
TYPICALITY = 5.0  # nats that the median distance of validation weighs beside log probabilities
DOUBTFUL = 0.88  # of the 95 % quantile of distances: beyond it other readings are asked for
BLANK_SCORE = -14.0  # nats: where a reading is blank, an image must score more to be answered
DIGIT_PRIOR_WEIGHT = 3.6  # pictures that the digit prior in training counts for in the estimate
MEAN_WEIGHT = 40.0  # pictures that the mean of a class in training counts for
CLASS_PRIOR_WEIGHT = 150.0  # pictures that the prior of a class in training counts for
ADAPTING_ROUNDS = 3


class Seen(NamedTuple):
    """What the net sees in images; distances are squared, in medians of validation."""

    log_p: np.ndarray  # (N, allowed), nats: how likely each allowed character is, among all
    features: np.ndarray  # (N, D), whitened
    distances: np.ndarray  # (N, allowed), to the class means in training
    hand_distances: np.ndarray  # (N, allowed), to those of the folder's hands


@dataclass
class Candidate:
    """A reading, and what the net says of it."""

    image: bytes
    log_p: np.ndarray  # (allowed,) nats, adapted to the folder
    distance: float  # of the best class, in medians of validation
    penalty: float = 0.0  # nats

    @property
    def score(self) -> float:
        """Return how much the image looks like a character, in nats."""
        return self.log_p.max() - TYPICALITY * self.distance - self.penalty


@dataclass
class Picture:
    """A picture on its way to an answer."""

    look: Look
    chosen: Candidate | None  # None: no character is there
    is_in_doubt: bool  # whether other readings are to be taken: it is blank, untypical of its
    # class, or in doubt to picture.py; never so without class statistics


@dataclass
class Adaptation:
    """What a sample of the folder says of its writers' hands, without labels."""

    means: np.ndarray  # (allowed, D): of the classes, whitened
    counts: np.ndarray  # (allowed,): how many pictures they rest on, MEAN_WEIGHT included
    log_prior: np.ndarray  # (allowed,) nats: of a class, among digits or among letters
    memberships: dict[str, np.ndarray]  # (allowed,) by path: how far a picture took part in each


class Classifier:
    """A net made ready to answer, out of the characters of --alphabet."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch  # late: the workers do without

        import CNN

        torch.set_num_threads(1)  # `run` has passes of the net side by side instead
        try:
            self.device = CNN.choose_device(args.device)
            net = CNN.load(args.model, self.device)
            self.characters = parse_alphabet(args.alphabet, net.card.alphabet)
        except ValueError as error:
            raise UsageError(error) from None
        self.card = net.card
        self.side = CNN.SIZE
        self.classes = [net.card.alphabet.index(character) for character in self.characters]
        self.is_digit = np.array([character.isdigit() for character in net.card.alphabet])
        self.allowed_digits = self.is_digit[self.classes]
        self.are_mixed = len({*self.allowed_digits}) == 2  # both digits and letters are allowed
        self.log_prior = torch.zeros(len(net.card.alphabet), device=self.device)  # added to logits
        self.adaptation: Adaptation | None = None
        self.topk = args.topk
        self.least_confidence = args.min_confidence
        on_cpu = self.device.type == "cpu"
        self.dtype = CNN.mixed_precision(self.device) if on_cpu else torch.float32
        self.net = net.fused().to(self.dtype, memory_format=torch.channels_last)
        self.net.fc2.float()  # the full resolution for probabilities
        self.statistics = net.card.statistics
        self.means = np.zeros((len(self.classes), 0))
        self.doubtful_distance = math.inf
        if self.statistics is not None:
            self.whitening = self.statistics.whitening.to(self.device)
            self.means = self.statistics.means[self.classes].numpy()
            self.doubtful_distance = DOUBTFUL * self.statistics.quantile95 / self.statistics.median

    def see(self, images: list[bytes]) -> Seen:
        """Show images to the net, of SIZE * SIZE bytes each, ink 255 on 0."""
        import torch

        import CNN

        missing = -len(images) % BLOCK  # to fill up the last block
        pixels = bytearray().join([*images, bytes(missing * self.side**2)])
        with torch.inference_mode():
            batch = torch.from_numpy(np.frombuffer(pixels, np.uint8))
            batch = batch.view(-1, 1, self.side, self.side).to(self.device, self.dtype) / 255
            features = self.net.features(batch).float()  # (N + missing, D)
            logits = self.net.fc2(features) / self.card.temperature + self.log_prior
            log_p = logits.log_softmax(1)[:, self.classes].cpu().numpy()
            if self.statistics is not None:
                features = CNN.whiten(features, self.whitening)
            features = features.cpu().numpy()
        distances = self.measure(features, self.means)
        hand_distances = distances
        if self.adaptation is not None:
            hand_distances = self.measure(features, self.adaptation.means)
        return Seen(*(part[: len(images)] for part in (log_p, features, distances, hand_distances)))

    def measure(self, features: np.ndarray, means: np.ndarray) -> np.ndarray:
        """Return the squared distances (N, allowed) to means, in medians of validation."""
        import torch

        import CNN

        if self.statistics is None:
            return np.zeros((len(features), len(means)))
        pair = (torch.from_numpy(features), torch.from_numpy(means))  # numpy would use all cores
        return CNN.square_distances(*pair).numpy() / self.statistics.median

    def adapt(self, looks: list[Look], digits: float | None, threads: Executor) -> float | None:
        """Adapt to the folder by a sample of it; return the fraction of digits, if estimated.

        digits: their fraction, where it is told. It is estimated otherwise, if both digits and
        letters are allowed.
        """
        looks = [look for look in looks if look.image]
        images = [look.image for look in looks]
        blocks = [images[i : i + BLOCK] for i in range(0, len(images), BLOCK)]
        parts = list(threads.map(self.see, blocks))
        estimate = None
        if looks and digits is None and self.are_mixed:
            p = np.exp(normalise(np.concatenate([part.log_p for part in parts])))
            estimate = estimate_digits(p[:, self.allowed_digits].sum(1), self.usual_digits())
            digits = estimate
        change = np.zeros(len(self.classes))
        if digits is not None and self.are_mixed:
            change = self.expect_digits(digits)
        if looks and self.statistics is not None:
            seen = Seen(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            seen = seen._replace(log_p=normalise(seen.log_p + change))
            self.adapt_to_hands([look.path for look in looks], seen)
        return estimate

    def usual_digits(self) -> float:
        """Return the fraction of digits in training among the allowed characters."""
        prior = self.card.digit_prior
        digits = prior * self.allowed_digits.sum() / self.is_digit.sum()
        letters = (1 - prior) * (~self.allowed_digits).sum() / (~self.is_digit).sum()
        return float(digits / (digits + letters))

    def expect_digits(self, digits: float) -> np.ndarray:
        """Take `digits` for their fraction among the pictures, in place of that in training.

        Returns what it changes, (allowed,) nats.
        """
        usual = self.usual_digits()
        change = np.where(self.is_digit, digits / usual, (1 - digits) / (1 - usual))
        change = np.log(change.clip(1e-300))  # none is impossible, so that there is a best
        self.log_prior += self.log_prior.new_tensor(change)
        return change[self.classes]

    def adapt_to_hands(self, paths: list[str], seen: Seen) -> None:
        """Move the means of the classes towards the sample's, by expectation maximisation.

        A mean moves as far as the pictures taken for its class carry it. Only typical ones do.
        """
        answers = seen.log_p.argmax(1)[:, None]
        limit = self.statistics.quantile95 / self.statistics.median
        takes_part = np.take_along_axis(seen.distances, answers, 1) <= limit  # (N, 1)
        log_p = seen.log_p
        for _ in range(ADAPTING_ROUNDS):
            memberships = np.exp(normalise(log_p)) * takes_part
            counts = memberships.sum(0) + MEAN_WEIGHT
            totals = memberships.T @ seen.features + MEAN_WEIGHT * self.means
            means = (totals / counts[:, None]).astype(np.float32)
            prior = memberships.sum(0) + CLASS_PRIOR_WEIGHT
            for group in (self.allowed_digits, ~self.allowed_digits):
                prior[group] /= prior[group].mean() if group.any() else 1
            by_path = dict(zip(paths, memberships, strict=True))
            self.adaptation = Adaptation(means, counts, np.log(prior), by_path)
            seen = seen._replace(hand_distances=self.measure(seen.features, means))
            log_p = self.adapted(seen, memberships)

    def adapted(self, seen: Seen, memberships: np.ndarray) -> np.ndarray:
        """Return log probabilities (N, allowed) adapted to the hands of the folder.

        memberships: (N, allowed), how far an image took part in each class. It has no part in the
        mean that it is judged by: its distance to that is n / (n - membership) times as large, for
        n pictures.
        """
        if self.adaptation is None:
            return seen.log_p
        farther = self.adaptation.counts / (self.adaptation.counts - memberships)
        gain = seen.distances - seen.hand_distances * farther**2
        return seen.log_p + self.adaptation.log_prior + TYPICALITY * gain

    def judge(self, images: list[bytes], paths: list[str]) -> list[Candidate]:
        """Return what the net says of images, readings of the pictures at these paths."""
        if not images:
            return []
        seen = self.see(images)
        memberships = np.zeros_like(seen.log_p)
        if self.adaptation is not None:
            for i, path in enumerate(paths):  # which may have taken part in the adaptation
                memberships[i] = self.adaptation.memberships.get(path, 0)
        log_p = self.adapted(seen, memberships)
        distances = np.take_along_axis(seen.distances, log_p.argmax(1)[:, None], 1)[:, 0]
        return [Candidate(*one) for one in zip(images, log_p, distances.tolist(), strict=True)]

    def judge_first(self, looks: list[Look]) -> list[Picture]:
        """Return pictures judged by their first readings, and whether these are in doubt."""
        readable = [look for look in looks if look.image]
        candidates = deque(
            self.judge([look.image for look in readable], [look.path for look in readable])
        )
        pictures = []
        for look in looks:
            first = candidates.popleft() if look.image else None
            if self.statistics is None:
                is_in_doubt = False
            elif first is None:
                is_in_doubt = look.error == BLANK
            elif look.in_doubt is None:
                is_in_doubt = False
            else:
                is_in_doubt = look.in_doubt or first.distance > self.doubtful_distance
            pictures.append(Picture(look, first, is_in_doubt))
        return pictures

    def choose(self, pictures: list[Picture], readings: list[list[Reading]]) -> None:
        """Choose among the first and the other readings of each picture.

        The picture is blank if all others are; if only some are, or the first, it is blank unless
        an image scores BLANK_SCORE.
        """
        images = []
        paths = []
        for picture, others in zip(pictures, readings, strict=True):
            images += [one.image for one in others if one.image]
            paths += [picture.look.path for one in others if one.image]
        judged = deque(self.judge(images, paths))
        for picture, others in zip(pictures, readings, strict=True):
            candidates = [picture.chosen] if picture.chosen else []
            for one in others:
                if one.image:
                    candidate = judged.popleft()
                    candidate.penalty = one.penalty
                    candidates.append(candidate)
            blank = [one for one in others if not one.image]
            may_be_blank = bool(blank) or picture.chosen is None
            if not others or not candidates:
                continue
            picture.chosen = max(candidates, key=lambda candidate: candidate.score)
            if len(blank) == len(others) or (may_be_blank and picture.chosen.score < BLANK_SCORE):
                picture.chosen = None

    def answer(self, pictures: list[Picture]) -> list[Result]:
        """Answer with the likeliest character of each picture, unless it is too doubtful."""
        log_p = [picture.chosen.log_p for picture in pictures if picture.chosen]
        p = np.exp(normalise(np.stack(log_p))) if log_p else np.zeros((0, len(self.classes)))
        order = np.argsort(-p, axis=1, kind="stable")[:, : max(2, self.topk)]
        rows = zip(order.tolist(), np.take_along_axis(p, order, 1).tolist(), strict=True)
        results = []
        for picture in pictures:
            look = picture.look
            if picture.chosen is None:
                result = Result(look.path, error=look.error or BLANK, image=look.image)
            else:
                classes, probabilities = next(rows)
                characters = [self.characters[i] for i in classes]
                ranked = tuple(zip(characters, probabilities, strict=True))
                result = self.decide(look.path, ranked)._replace(image=picture.chosen.image)
            results.append(result._replace(thumbnail=look.thumbnail))
        return results

    def decide(self, path: str, ranked: tuple[tuple[str, float], ...]) -> Result:
        """Return the result for characters and their probabilities, the likeliest first."""
        best, confidence = ranked[0]
        pair = {character for character, _ in ranked[:2]}
        groups = (group for group in self.card.lookalikes if len(pair) > 1 and pair <= set(group))
        lookalike = next(groups, "")
        if confidence >= self.least_confidence:
            return Result(path, best, confidence, ranked[1 : self.topk], lookalike)
        error = f"no answer: {confidence:.4f} is below --min-confidence {self.least_confidence:g}"
        return Result(path, "", confidence, ranked[: self.topk], lookalike, error)


def normalise(log_p: np.ndarray) -> np.ndarray:
    """Return log probabilities (N, C) that sum up to a probability of 1 in each row."""
    best = log_p.max(1, keepdims=True)
    return log_p - best - np.log(np.exp(log_p - best).sum(1, keepdims=True))


def estimate_digits(p_digit: np.ndarray, usual: float) -> float:
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
    parts = [match[0].upper() for match in re.finditer(".-.|.", text, re.DOTALL)]
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


def ascii_line(result: Result) -> str:
    """Write as the original project did: ASCII code and path; `---` for what is too doubtful."""
    code = f"{ord(result.character):03d}" if result.character else "---"
    return f"{code}, {escaped(result.path)}\n" if result.confidence else ""


def csv_line(result: Result) -> str:
    """Write as a row of RFC 4180, with the bytes of the path as they are."""
    confidence = f"{result.confidence:.4f}" if result.confidence else ""
    alternatives = " ".join(f"{character}:{p:.4f}" for character, p in result.alternatives)
    shown = result._replace(confidence=confidence, alternatives=alternatives)
    row = io.StringIO()
    csv.writer(row).writerow(shown[: len(FIELDS)])
    return row.getvalue().removesuffix("\r\n") + "\n"


def json_line(result: Result) -> str:
    r"""Write as a JSON object; bytes of the path that are not UTF-8 as \udc80 to \udcff."""
    content = {name: getattr(result, name) or None for name in FIELDS}
    content["confidence"] = round(result.confidence, 4) or None
    content["alternatives"] = {character: round(p, 4) for character, p in result.alternatives}
    return json.dumps(content) + "\n"


def report_row(result: Result) -> str:
    """Write as an object of the list in report.html; it can't end the script that it stands in."""
    row = {name: getattr(result, name) for name in FIELDS}
    row["shown"] = escaped(result.path)
    row["truth"] = find_truth(result.path)
    row["image"] = base64.b64encode(result.image).decode()
    row["thumbnail"] = result.thumbnail
    return json.dumps(row).replace("<", "\\u003c") + ",\n"


def find_truth(path: str) -> str:
    """Return the character by which a picture's folder is named, as for train.py --extra, or ""."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return folder.upper() if re.fullmatch("[0-9A-Za-z]", folder) else ""


LINES = {"ascii": ascii_line, "csv": csv_line, "json": json_line}


@contextmanager
def writing(file: Path | None, head: str, foot: str = "") -> Iterator[TextIO]:
    """Give a stream to what becomes FILE when all went well, FILE.partial; without FILE, stdout."""
    where = f"{os.path.realpath(file)}.partial" if file else 1
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "", "closefd": bool(file)}
    with open(where, "w", **how) as stream:
        stream.write(head)
        yield stream
        stream.write(foot)
    if file:
        os.replace(where, os.path.realpath(file))  # of a link, what it points to


def kind_of(result: Result) -> str:
    """Return the word by which a result is counted."""
    if result.character:
        return "answered"
    if result.confidence:
        return "doubtful"
    return "blank" if result.error == BLANK else "unreadable"


def write(results: Iterable[list[Result]], args: argparse.Namespace, total: int) -> Counter[str]:
    """Write results as they come, with --format ascii errors to stderr; count their kinds."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        head = ",".join(FIELDS) + "\n" if args.format == "csv" and args.rank == 0 else ""
        writers = [(stack.enter_context(writing(args.output, head)), LINES[args.format])]
        if args.report:
            top, end, rest = PAGE.read_text("utf-8").partition("null]")
            page = stack.enter_context(writing(args.report, top, end + rest))
            writers.append((page, report_row))
        bar = tqdm(total=total, unit=" pictures", leave=False, dynamic_ncols=True, disable=None)
        stack.enter_context(bar)
        for answered in results:
            for stream, line in writers:
                stream.write("".join(map(line, answered)))
                stream.flush()
            for result in answered:
                counts[kind_of(result)] += 1
                if args.format == "ascii" and not result.confidence:
                    tqdm.write(f"{escaped(result.path)}: {result.error}", file=sys.stderr)
            bar.update(len(answered))
    return counts


# The command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and a message where it is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    no_adapt = (
        "judge each picture alone, by the digits and hands of training; by default an answer "
    )
    no_adapt += "depends on the pictures beside it, up to 1000 of which tell how many are digits "
    no_adapt += "and how their hands write"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    model = Path(__file__).with_name("model.pt")
    add("--input", nargs="+", required=True, metavar="PATH", help="folders, pictures, or both")
    add("--model", type=Path, default=model, metavar="FILE", help="weights [model.pt beside this]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda where there is one, or cpu]")
    add("--alphabet", default="0-9A-Z", metavar="CHARS", help="what can be answered [%(default)s]")
    add("--digits", type=float, metavar="P", help="fraction of digits, 0 to 1 [estimated]")
    add("--no-adapt", action="store_true", help=no_adapt)
    add("--min-confidence", type=float, default=0, metavar="P", help="below: no answer")
    add("--topk", type=int, default=3, metavar="K", help="characters in csv, json [%(default)s]")
    add("--format", choices=LINES, default="ascii", help="of the results [%(default)s]")
    add("--output", type=Path, metavar="FILE", help="where results go instead of stdout")
    add("--report", type=Path, metavar="FILE", help="a page for going through the pictures by eye")
    add("--batch-size", type=int, default=64, metavar="N", help="of the net [%(default)s]")
    add("--workers", type=int, default=cores, metavar="N", help="to read [one per core]")
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
    if "TORCHELASTIC_RUN_ID" in os.environ:  # schedulers set RANK for their own ends
        args.rank = int(os.environ["RANK"])
        args.world_size = int(os.environ["WORLD_SIZE"])
        if not args.output:
            parser.error("under torchrun each process writes a file: name it with --output")
        for name in ("output", "report"):
            file = getattr(args, name)
            if file:
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


SAMPLE = 1000  # pictures by which the net adapts to the folder, at most


def classify(
    looks: Iterator[Look],
    readers: Readers,
    classifier: Classifier,
    threads: Executor,
    batch_size: int,
) -> Iterator[list[Result]]:
    """Return the results of first looks, in order and in batches.

    A batch is judged by its first readings, workers take other readings of what is in doubt, and
    the net chooses: three stages, side by side.
    """

    def look_again(pictures: list[Picture]) -> Future:
        return readers.look_again([one.look.path for one in pictures if one.is_in_doubt])

    def choose(asked: tuple[list[Picture], Future]) -> list[Result]:
        pictures, future = asked
        doubtful = [picture for picture in pictures if picture.is_in_doubt]
        paths = [picture.look.path for picture in doubtful]
        classifier.choose(doubtful, readers.readings_of(paths, future))
        return classifier.answer(pictures)

    ahead = 2 * readers.workers
    batches = iter(lambda: list(islice(looks, batch_size)), [])
    judged = in_order(partial(threads.submit, classifier.judge_first), batches, ahead)
    asked = in_order(look_again, (future.result() for _, future in judged), ahead)
    chosen = in_order(partial(threads.submit, choose), asked, ahead)
    return (future.result() for _, future in chosen)


def run(args: argparse.Namespace) -> int:
    """Classify everything in args.input; return the exit code, 0 or 1. Raises UsageError."""
    check_files(args)
    paths, errors, passed_over = list_pictures(args.input)
    our_paths = paths[args.rank :: args.world_size]
    unlisted = [
        Result(error.filename, error=f"folder can't be listed: {error.strerror}")
        for error in errors[args.rank :: args.world_size]
    ]
    with ExitStack() as stack:
        workers = max(1, min(args.workers, math.ceil(len(our_paths) / CHUNK)))
        pool = start_pool(workers)
        stack.callback(pool.join)
        stack.callback(pool.stop)  # called first
        classifier = Classifier(args)
        if classifier.statistics is None and args.rank == 0:
            note = "no class statistics in it: first readings are taken, hands are not adapted to"
            print(f"inference.py: {args.model}: {note}", file=sys.stderr)
        gc.freeze()  # nothing of torch is looked through again, which saves 0.4 s at the end
        started = time.monotonic()

        readers = Readers(pool, workers, classifier.side, args)
        step = max(1, math.ceil(len(paths) / SAMPLE))
        sample = {} if args.no_adapt else {look.path: look for look in readers.look(paths[::step])}
        threads = stack.enter_context(ThreadPoolExecutor(workers))  # passes of the net
        digits = classifier.adapt(list(sample.values()), args.digits, threads)

        others = readers.look([path for path in our_paths if path not in sample])
        looks = (sample.pop(path) if path in sample else next(others) for path in our_paths)
        answers = classify(looks, readers, classifier, threads, args.batch_size)
        counts = write(chain([unlisted], answers), args, len(our_paths) + len(unlisted))
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
    print(f"{total:,} pictures: {', '.join(words)} ({rate})", file=sys.stderr)


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
        code = 128 + number
        message = f"stopped by {signal.Signals(number).name}"
        if args.output:
            message += f"; what was answered is in {escaped(os.path.realpath(args.output))}.partial"
    except (OSError, UsageError) as error:  # such as a full disk
        code = 2
        message = str(error).partition("\n")[0]
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        code = 2
        message = f"{str(error).partition('. ')[0]}: try a smaller --batch-size"
    print(f"inference.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ["PYTHONSAFEPATH"] = "1"  # our workers take no code from the folder we are run in
    sys.exit(main())
