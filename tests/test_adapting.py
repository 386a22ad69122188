"""The fraction of digits that a folder's own pictures tell, and what it does to the answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch
from PIL import Image

import CNN
import inference

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


@pytest.fixture
def classifier(tmp_path: Path) -> inference.Classifier:
    """One of all classes, with statistics of six features, of no merit."""
    net = CNN.Net("run1")
    path = tmp_path / "model.pt"
    random = torch.Generator().manual_seed(3)
    means = torch.rand(36, 6, generator=random)
    CNN.save(net, path)
    made = inference.Classifier(inference.parse(["--input", "x", "--model", str(path)]))
    made.statistics = CNN.ClassStatistics(torch.eye(6), means, median=1.0, quantile95=100.0)
    made.means = means
    return made


def seen_by(classifier: inference.Classifier, count: int, likely: int | None = None):
    """Return what a net might see in images, all taken for `likely` if that is given."""
    random = torch.Generator().manual_seed(4)
    log_p = 2 * torch.randn(count, 36, generator=random)
    if likely is not None:
        log_p[:, likely] += 20
    features = torch.rand(count, 6, generator=random)
    distances = classifier.find_distances(features, classifier.means)
    return inference.Seen(log_p.log_softmax(1), features, distances, distances)


def test_an_image_takes_no_part_in_the_mean_that_it_is_judged_by(classifier):
    """By the other route: every mean counted again without the image."""
    seen = seen_by(classifier, 8)
    classifier.adapt_means([str(i) for i in range(8)], seen)
    memberships = torch.stack([classifier.memberships[str(i)] for i in range(8)])
    distances = classifier.find_distances(seen.features, classifier.adapted_means)
    found = classifier.adapted(seen._replace(adapted_distances=distances), memberships)
    counts = classifier.counts[:, None]
    for i in range(8):
        membership = memberships[i][:, None]
        totals = counts * classifier.adapted_means - membership * seen.features[i]
        without = (totals / (counts - membership)).float()
        distances = classifier.find_distances(seen.features[i : i + 1], without)
        nearer = inference.TYPICALITY * (seen.distances[i] - distances[0])
        expected = seen.log_p[i] + classifier.class_log_prior + nearer
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_a_mean_moves_towards_its_pictures_and_no_other_does(classifier):
    seen = seen_by(classifier, 200, likely=12)
    classifier.adapt_means([str(i) for i in range(200)], seen)
    moved = (classifier.adapted_means - classifier.means).norm(dim=1)
    assert moved.argmax() == 12
    assert moved[torch.arange(36) != 12].max() < 1e-3
    target = seen.features.mean(0)
    before = (classifier.means[12] - target).norm().item()
    after = (classifier.adapted_means[12] - target).norm().item()
    assert after == pytest.approx(before * 40 / 240, rel=0.01), "40 pictures stand for training's"


def test_untypical_pictures_take_no_part(classifier):
    seen = seen_by(classifier, 50, likely=12)
    far = seen._replace(distances=seen.distances + 1000)
    classifier.adapt_means([str(i) for i in range(50)], far)
    torch.testing.assert_close(classifier.adapted_means, classifier.means)
    assert classifier.class_log_prior.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("allowed", "fraction"), [("0-9A-Z", 2 / 3), ("0-4A-M", 2 / 3), ("0-9A", 52 / 53), ("A-Z", 0)]
)
def test_the_usual_digits_are_those_among_allowed_characters(classifier, allowed, fraction):
    classifier.card.digit_prior = 2 / 3
    classifier.characters = inference.parse_alphabet(allowed, CNN.ALPHABET)
    assert classifier.find_usual_digits() == pytest.approx(fraction)


def test_a_picture_on_its_own_is_answered_as_without_adapting(drawn, capfd):
    picture = next(drawn.glob("letters/*R.png"))
    outputs = []
    for flags in ((), ("--no-adapt",)):
        words = ["--input", str(picture), "--digits", str(USUAL), "--format", "json", *flags]
        inference.main(words)
        outputs.append(json.loads(capfd.readouterr().out))
    with_adapting, without = outputs
    assert with_adapting["character"] == without["character"] == "R"
    assert with_adapting["confidence"] == pytest.approx(without["confidence"], abs=1e-3)


def test_weights_without_statistics_are_used_as_they_are_and_one_line_says_so(
    drawn, capfd, tmp_path
):
    net = CNN.load(inference.PAGE.with_name("model.pt"))
    net.card.statistics = None
    CNN.save(net, tmp_path / "old.pt")
    inference.main(["--input", str(drawn / "letters"), "--model", str(tmp_path / "old.pt")])
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 52
    assert err.count("no class statistics in it") == 1
