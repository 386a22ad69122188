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
from conftest import ROOT
from PIL import Image

import CNN
import inference
from picture import Features, Reading


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
    found = [letters]
    for told in (["--no-adapt"], ["--digits", "0"], ["--alphabet", "A-Z"]):
        its_answers, fraction = answers(capfd, drawn / "letters", *told)
        assert fraction is None
        found.append(its_answers)
    adapted, alone, no_digits, letters_only = (sum(map(str.isdigit, f.values())) for f in found)
    assert alone > adapted >= no_digits == letters_only == 0
    assert all(answer.isdigit() for answer in answers(capfd, drawn, "--digits", "1")[0].values())


def zero_over_o(capfd: pytest.CaptureFixture, *arguments: object) -> list[float]:
    """Return by how many nats a 0 is likelier than an O in each picture, where both are listed."""
    inference.main(["--format", "json", "--topk", "36", "--input", *map(str, arguments)])
    odds = []
    for row in map(json.loads, capfd.readouterr().out.splitlines()):
        p = {row["character"]: row["confidence"], **row["alternatives"]}
        if min(p["0"], p["O"]) > 0.001:
            odds.append(math.log(p["0"] / p["O"]))
    return odds


def test_few_pictures_change_little(drawn, capfd):
    in_doubt = ROOT / "tests" / "samples" / "0_scan.png"
    letters = [next(drawn.glob(f"letters/*{letter}.png")) for letter in "ERK"]
    (alone,) = zero_over_o(capfd, in_doubt, "--no-adapt")
    assert zero_over_o(capfd, in_doubt) == pytest.approx([alone], abs=1)
    (among_letters,) = zero_over_o(capfd, in_doubt, *letters)
    assert 0.2 < alone - among_letters < 2.2


def test_told_the_fraction_of_training_it_answers_the_same(drawn, capfd):
    """Among the characters allowed: all ten digits, and one letter of 26."""
    prior = CNN.load(ROOT / "model.pt").card.digit_prior
    digits = prior / (prior + (1 - prior) / 26)
    plain = [drawn, "--no-adapt", "--alphabet", "0-9O"]
    odds = zero_over_o(capfd, *plain)
    assert zero_over_o(capfd, *plain, "--digits", digits) == pytest.approx(odds, abs=0.1)
    assert len(odds) >= 2


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


def write_folder(
    card: CNN.Card, count: int, fraction: float, z: torch.Tensor
) -> inference.SeenBatch:
    """Return what a net that knows training's classes sees in pictures of one writer."""
    random = torch.Generator().manual_seed(4)
    prior = torch.tensor([fraction / 10] * 10 + [(1 - fraction) / 26] * 26)
    labels = prior.multinomial(count, replacement=True, generator=random)
    means = card.statistics.means + torch.einsum("k,ckd->cd", z, card.statistics.basis)
    features = means[labels] + torch.randn(count, WIDTH, generator=random)
    distances = CNN.square_distances(features, card.statistics.means)
    log_p = (-distances / 2).log_softmax(1)
    pictures = [inference.Picture(f"{i}.png") for i in range(count)]
    readings = [Reading(np.zeros((28, 28), np.uint8), Features())] * count
    seen = CNN.Seen(log_p, distances / card.statistics.median, features)
    return inference.SeenBatch(pictures, readings, torch.arange(count), seen)


def beforehand(card: CNN.Card, *flags: str) -> CNN.Folder:
    return inference.known_beforehand(card, inference.parse(["--input", "x", *flags]))


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_the_writer_and_the_fraction_of_digits_are_found_together(card, fraction):
    """All classes move as the writer has them, also those that do not come."""
    batch = write_folder(card, 1000, fraction, WRITER)
    folder = inference.adapt([batch], beforehand(card), card)
    moved = folder.means - card.statistics.means
    planted = torch.einsum("k,ckd->cd", WRITER, card.statistics.basis)
    assert (moved - planted).norm() < 0.2 * planted.norm()
    assert folder.digits == pytest.approx(fraction, abs=0.04)
    alone = inference.adapt([write_folder(card, 1, fraction, WRITER)], beforehand(card), card)
    assert (alone.means - card.statistics.means).norm() < 0.2 * planted.norm()


def test_blank_and_untypical_readings_take_no_part(card):
    batch = write_folder(card, 200, 1.0, WRITER)
    far = batch.seen._replace(features=batch.seen.features + 100)
    blank = [Reading(None, Features(blank=1.0))] * 200
    before = beforehand(card)
    for empty in (batch._replace(seen=far), batch._replace(readings=blank)):
        assert inference.adapt([empty], before, card) is before


def test_answers_are_summed_over_readings_and_blank_is_one_of_them(card):
    """By the other route: the sums of one picture at a time, in plain numbers."""
    batch = write_folder(card, 6, 0.5, torch.zeros(3))
    readings = []
    for i in range(5):
        image = np.full((28, 28), i, np.uint8)
        readings.append(Reading(image, Features(parts_kept=0.5 * i)))
    blank = Features(blank=0.6)  # likelier than each character, less likely than all of them
    readings.append(Reading(None, blank))
    owners = [0, 1, 0, 0, 1, 1]
    batch = batch._replace(
        pictures=batch.pictures[:2], readings=readings, owners=torch.tensor(owners)
    )
    folder = beforehand(card)
    args = inference.parse(["--input", "x", "--topk", "36"])
    scores, p = inference.score_readings(readings, batch.seen, folder, card)
    for i, picture in enumerate(inference.answer(batch, folder, card, args)):
        own = [row for row in range(6) if owners[row] == i]
        weights = {row: math.exp(scores[row]) for row in own}
        sums = sum(weights[row] * p[row] for row in own) / sum(weights.values())
        found = {picture.character: picture.confidence, **dict(picture.alternatives)}
        assert found == pytest.approx(dict(zip(CNN.ALPHABET, sums.tolist(), strict=False)))
        label = CNN.ALPHABET.index(picture.character)
        source = max(own, key=lambda row: weights[row] * p[row, label])
        assert picture.image is readings[source].image


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
