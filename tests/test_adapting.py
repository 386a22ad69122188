"""What a folder's own pictures tell of it: the fraction of digits, and how its writers write."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import strokes
import torch
from PIL import Image

import CNN
import inference
from picture import Features, Reading

USUAL = 240_000 / 364_800  # in training


def likely_digits(count: int, digits: int, sure: float, seed: int = 0) -> np.ndarray:
    """Return what a calibrated net says of `count` pictures, of which `digits` are digits.

    Log odds are normal in each group, as far apart as `sure` says, and right for the usual one.
    """
    noise = np.random.default_rng(seed).normal(0, np.sqrt(2 * sure), count)
    odds = np.where(np.arange(count) < digits, sure, -sure) + noise + np.log(USUAL / (1 - USUAL))
    return 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_fraction_of_a_large_folder_is_found(fraction):
    found = inference.estimate_digits(likely_digits(5000, round(5000 * fraction), 4), USUAL)
    assert found == pytest.approx(fraction, abs=0.02)


def test_few_pictures_change_little_and_twenty_tell():
    assert inference.estimate_digits(np.array([]), USUAL) == pytest.approx(USUAL)
    for count, most in ((1, 1.2), (3, 2.2)):  # nats, on every answer
        fraction = inference.estimate_digits(np.full(count, 0.01), USUAL)  # sure letters
        assert 0 < np.log(USUAL / (1 - USUAL)) - np.log(fraction / (1 - fraction)) < most
    assert inference.estimate_digits(likely_digits(20, 0, 4), USUAL) < 0.25
    assert inference.estimate_digits(likely_digits(20, 20, 4), USUAL) > 0.9


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of drawn digits and letters, in EMNIST's form."""
    folder = tmp_path_factory.mktemp("drawn")
    for i, character in enumerate(strokes.ALPHABET * 2):
        kind = folder / ("digits" if character.isdigit() else "letters")
        kind.mkdir(exist_ok=True)
        image = strokes.emnist_picture(character, strokes.hand(i), form=i // 36)
        Image.fromarray(image).save(kind / f"{i:03d}{character}.png")
    return folder


def answers(capfd: pytest.CaptureFixture, *arguments: object) -> tuple[dict[str, str], int | None]:
    """Return the answers by the picture's name, and the fraction of digits said, %."""
    assert inference.main(["--workers", "1", "--input", *map(str, arguments)]) == 0
    out, err = capfd.readouterr()
    rows = (line.split(", ", 1) for line in out.splitlines())
    said = re.search(r", about (\d+) % digits", err)
    return {Path(path).name: chr(int(code)) for code, path in rows}, said and int(said[1])


def test_the_fraction_is_said_and_answers_follow_it(drawn, capfd):
    letters, fraction = answers(capfd, drawn / "letters")
    assert fraction < 12
    assert answers(capfd, drawn / "digits")[1] > 88
    alone, fraction = answers(capfd, drawn / "letters", "--no-adapt")
    assert fraction is None
    given, fraction = answers(capfd, drawn / "letters", "--digits", "0")
    assert fraction is None
    number = [sum(map(str.isdigit, found.values())) for found in (alone, letters, given)]
    assert number[0] > number[1] >= number[2] == 0
    assert all(answer.isdigit() for answer in answers(capfd, drawn, "--digits", "1")[0].values())


def test_a_known_kind_leaves_nothing_to_estimate(drawn, capfd):
    auto, fraction = answers(capfd, drawn / "letters", "--alphabet", "A-Z")
    assert fraction is None
    assert auto == answers(capfd, drawn / "letters", "--alphabet", "A-Z", "--no-adapt")[0]


def test_sorted_and_shuffled_folders_come_out_the_same(drawn, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "SAMPLE", 36)  # every other picture
    ordered, fraction = answers(capfd, drawn / "digits", drawn / "letters")
    files = [*drawn.glob("*/*.png")]
    for place, i in enumerate(np.random.default_rng(0).permutation(len(files))):
        (tmp_path / f"{place:02d}-{files[i].name}").symlink_to(files[i])
    mixed, other = answers(capfd, tmp_path)
    mixed = {name[3:]: answer for name, answer in mixed.items()}
    assert len(ordered) == len(mixed) == 72
    assert sum(mixed[name] == answer for name, answer in ordered.items()) >= 70
    assert abs(fraction - other) <= 12


WRITER = torch.tensor([0.5, -1.0, 0.25])  # z of the one who wrote the folder
WIDTH = 48


@pytest.fixture
def card() -> CNN.Card:
    """A card of classes that can be told apart, and of writers who differ in three ways."""
    random = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(36, WIDTH, generator=random)
    basis = torch.randn(36, 3, WIDTH, generator=random)
    return CNN.Card(statistics=CNN.ClassStatistics(torch.eye(WIDTH), means, WIDTH, basis))


def write_folder(card: CNN.Card, count: int, fraction: float, z: torch.Tensor) -> inference.Looked:
    """Return what a net that knows training's classes sees in pictures of one writer."""
    random = torch.Generator().manual_seed(4)
    prior = torch.tensor([fraction / 10] * 10 + [(1 - fraction) / 26] * 26)
    labels = prior.multinomial(count, replacement=True, generator=random)
    means = card.statistics.means + torch.einsum("k,ckd->cd", z, card.statistics.basis)
    features = means[labels] + torch.randn(count, WIDTH, generator=random)
    log_p = (-torch.cdist(features, card.statistics.means).square() / 2).log_softmax(1)
    pictures = [inference.Picture(f"{i}.png") for i in range(count)]
    readings = [Reading(np.zeros((28, 28), np.uint8), Features())] * count
    seen = inference.Seen(log_p, features)
    return inference.Looked(pictures, readings, torch.arange(count), seen)


def beforehand(card: CNN.Card, *flags: str) -> inference.Folder:
    return inference.known_beforehand(card, inference.parse(["--input", "x", *flags]))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_the_writer_and_the_fraction_of_digits_are_found_together(card, fraction):
    looked = write_folder(card, 1000, fraction, WRITER)
    folder = inference.adapt([looked], beforehand(card), card)
    z = torch.linalg.lstsq(
        card.statistics.basis.transpose(1, 2).flatten(0, 1),
        (folder.means - card.statistics.means).flatten(),
    ).solution
    torch.testing.assert_close(z, WRITER, atol=0.15, rtol=0.05)
    assert folder.digits == pytest.approx(fraction, abs=0.04)


def test_a_class_that_does_not_come_moves_as_the_writer_has_it_and_one_picture_moves_little(card):
    looked = write_folder(card, 1000, 1.0, WRITER)  # digits alone
    moved = inference.adapt([looked], beforehand(card), card).means - card.statistics.means
    letters = torch.einsum("k,ckd->cd", WRITER, card.statistics.basis)[10:]
    assert (moved[10:] - letters).norm() < 0.2 * letters.norm()
    alone = inference.adapt([write_folder(card, 1, 1.0, WRITER)], beforehand(card), card)
    assert (alone.means - card.statistics.means).norm() < 0.2 * moved.norm()


def test_blank_and_untypical_readings_take_no_part(card):
    looked = write_folder(card, 200, 1.0, WRITER)
    far = looked.seen._replace(features=looked.seen.features + 100)
    blank = [Reading(None, Features(blank=1.0))] * 200
    before = beforehand(card)
    for empty in (looked._replace(seen=far), looked._replace(readings=blank)):
        assert inference.adapt([empty], before, card) is before


def test_what_is_told_is_not_estimated(card):
    looked = write_folder(card, 500, 0.9, WRITER)
    told = inference.adapt([looked], beforehand(card, "--digits", "0.3"), card)
    assert told.digits == 0.3
    only = inference.adapt([looked], beforehand(card, "--alphabet", "0-4"), card)
    assert only.digits is None
    assert only.log_prior.isfinite().sum() == 5


@pytest.mark.parametrize(
    ("allowed", "fraction"), [("0-9A-Z", 2 / 3), ("0-4A-M", 2 / 3), ("0-9A", 52 / 53), ("A-Z", 0)]
)
def test_the_fraction_in_training_is_that_among_allowed_characters(card, allowed, fraction):
    card.digit_prior = 2 / 3
    folder = beforehand(card, "--alphabet", allowed)
    assert inference.training_digit_prior(folder, card) == pytest.approx(fraction)


def test_answers_are_summed_over_readings_and_blank_is_one_of_them(card):
    """By the other route: the sums of one picture at a time, in plain numbers."""
    looked = write_folder(card, 6, 0.5, torch.zeros(3))
    image = looked.readings[0].image
    readings = [Reading(image, Features(parts_kept=0.5 * i)) for i in range(6)]
    readings[5] = Reading(None, Features(blank=1.0))
    looked = looked._replace(
        pictures=looked.pictures[:2], readings=readings, owners=torch.tensor([0, 1, 0, 0, 1, 1])
    )
    folder = beforehand(card)
    args = inference.parse(["--input", "x", "--topk", "36"])
    scores, p = inference.judge(readings, looked.seen, folder, card)
    for i, picture in enumerate(inference.answer(looked, folder, card, args)):
        own = [row for row in range(6) if looked.owners[row] == i]
        weights = [math.exp(scores[row]) for row in own]
        sums = sum(weight * p[row] for weight, row in zip(weights, own, strict=True)) / sum(weights)
        if sums[36] >= 0.5:
            assert picture.error == inference.BLANK
            assert picture.confidence == pytest.approx(sums[36].item())
            continue
        found = {picture.character: picture.confidence, **dict(picture.alternatives)}
        expected = dict(zip(CNN.ALPHABET, sums.tolist(), strict=False))
        assert found == pytest.approx(expected)


def test_the_image_shown_is_the_answers_though_blank_is_likelier_than_each_character(card):
    looked = write_folder(card, 3, 0.5, torch.zeros(3))
    readings = [Reading(np.full((28, 28), 7, np.uint8), Features()), looked.readings[1]]
    readings.append(Reading(None, Features(blank=1.0)))
    owners = torch.zeros(3, dtype=torch.int64)
    looked = looked._replace(pictures=looked.pictures[:1], readings=readings, owners=owners)
    weights = torch.tensor([[0.3, 0.25, 0.45]])
    p = torch.eye(37)[[10, 11, 36]]
    args = inference.parse(["--input", "x"])
    with patch.object(inference, "weigh", return_value=(weights, p)):
        (picture,) = inference.answer(looked, beforehand(card), card, args)
    assert picture.character == "A"
    assert picture.image is readings[0].image


def test_a_basis_is_learnt_that_explains_the_writers(card):
    """60 writers who differ in three ways, no two classes alike: nothing else is to be found."""
    random = torch.Generator().manual_seed(5)
    z = torch.randn(60, 3, generator=random)
    writers = torch.arange(60).repeat_interleave(36 * 5)
    labels = torch.arange(36).repeat(60 * 5)
    means = card.statistics.means + torch.einsum("wk,ckd->wcd", z, card.statistics.basis)
    features = means[writers, labels]
    statistics = replace(card.statistics, median=100.0)
    with patch.object(CNN, "whiten", lambda features, _: features):
        basis = CNN.learn_basis(features, labels, writers, statistics)
    planted = card.statistics.basis.transpose(1, 2).flatten(0, 1)  # (classes * D, 3)
    found = torch.linalg.lstsq(basis.transpose(1, 2).flatten(0, 1), planted)
    explained = basis.transpose(1, 2).flatten(0, 1) @ found.solution
    assert (explained - planted).norm() < 0.1 * planted.norm()


def test_a_picture_on_its_own_is_answered_nearly_as_without_adapting(drawn, capfd):
    picture = next(drawn.glob("letters/*R.png"))
    outputs = []
    for flags in ((), ("--no-adapt",)):
        words = ["--input", str(picture), "--digits", str(USUAL), "--format", "json", *flags]
        inference.main(words)
        outputs.append(json.loads(capfd.readouterr().out))
    with_adapting, without = outputs
    assert with_adapting["character"] == without["character"] == "R"
    assert with_adapting["confidence"] == pytest.approx(without["confidence"], abs=0.01)
