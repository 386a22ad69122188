"""The share of digits that a folder's own pictures tell, and what it does to the answers."""

import re
from pathlib import Path

import numpy as np
import pytest
import strokes
from PIL import Image

import inference

USUAL = 240_000 / 364_800  # in training


def likely_digits(count: int, digits: int, sure: float, seed: int = 0) -> np.ndarray:
    """Return what a calibrated net says of `count` pictures, of which `digits` are digits.

    Log odds are normal in each group, as far apart as `sure` says, and right for the usual share.
    """
    noise = np.random.default_rng(seed).normal(0, np.sqrt(2 * sure), count)
    odds = np.where(np.arange(count) < digits, sure, -sure) + noise + np.log(USUAL / (1 - USUAL))
    return 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_a_large_folder_is_found(share: float) -> None:
    found = inference.share_of_digits(likely_digits(5000, round(5000 * share), 4), USUAL)
    assert found == pytest.approx(share, abs=0.02)


def test_one_picture_changes_little_and_twenty_tell() -> None:
    usual_odds, sure_letter = USUAL / (1 - USUAL), np.array([0.01])
    one = inference.share_of_digits(sure_letter, USUAL)
    assert abs(np.log(one / (1 - one) / usual_odds)) < 1.2  # nats, on every answer
    assert inference.share_of_digits(np.array([]), USUAL) == pytest.approx(USUAL)
    assert inference.share_of_digits(likely_digits(20, 0, 4), USUAL) < 0.25
    assert inference.share_of_digits(likely_digits(20, 20, 4), USUAL) > 0.9


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


def answers(capfd: pytest.CaptureFixture, *arguments: str) -> tuple[dict[str, str], str]:
    assert inference.main(["--workers", "1", "--input", *arguments]) == 0
    out, err = capfd.readouterr()
    rows = (line.split(", ", 1) for line in out.splitlines())
    return {Path(path).name: chr(int(code)) for code, path in rows}, err.splitlines()[-1]


def test_the_share_is_said_and_answers_follow_it(drawn: Path, capfd) -> None:
    _, said = answers(capfd, str(drawn / "letters"))
    assert int(re.search(r", about (\d+) % digits", said)[1]) < 12
    _, said = answers(capfd, str(drawn / "digits"))
    assert int(re.search(r", about (\d+) % digits", said)[1]) > 88
    alone, said = answers(capfd, str(drawn / "letters"), "--digits", "none")
    assert "% digits" not in said
    fixed, said = answers(capfd, str(drawn / "letters"), "--digits", "0")
    assert "% digits" not in said
    assert not any(answer.isdigit() for answer in fixed.values())
    assert any(answer.isdigit() for answer in alone.values())
    fixed, _ = answers(capfd, str(drawn / "letters"), "--digits", "1")
    assert all(answer.isdigit() for answer in fixed.values())


def test_a_known_kind_leaves_nothing_to_estimate(drawn: Path, capfd) -> None:
    auto, said = answers(capfd, str(drawn / "letters"), "--alphabet", "A-Z")
    none, _ = answers(capfd, str(drawn / "letters"), "--alphabet", "A-Z", "--digits", "none")
    assert auto == none
    assert "% digits" not in said


def test_sorted_and_shuffled_folders_come_out_the_same(
    drawn: Path, capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "SAMPLE", 36)  # every other picture
    ordered, said = answers(capfd, str(drawn / "digits"), str(drawn / "letters"))
    assert len(ordered) == 72
    files = [*drawn.glob("*/*.png")]
    shuffled = np.random.default_rng(0).permutation(len(files))
    for place, i in enumerate(shuffled):
        (tmp_path / f"{place:02d}-{files[i].name}").symlink_to(files[i])
    mixed, other = answers(capfd, str(tmp_path))
    mixed = {name[3:]: answer for name, answer in mixed.items()}
    same = sum(mixed[name] == answer for name, answer in ordered.items())
    assert same >= 70
    shares = [int(re.search(r"about (\d+) %", line)[1]) for line in (said, other)]
    assert abs(shares[0] - shares[1]) <= 12


@pytest.mark.parametrize("wrong", ["2", "-1", "nan", "some"])
def test_other_shares_are_refused(wrong: str, capfd) -> None:
    with pytest.raises(SystemExit) as stopped:
        inference.parse(["--input", "x", f"--digits={wrong}"])
    assert stopped.value.code == 2
