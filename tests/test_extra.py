"""Extra pictures and a file to start from: what each changes in a training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from strokes import drawn

import CNN
import train

BATCH = 24


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Labelled pictures: A/…, q/… (which is Q) and 7/…; one of them is damaged."""
    folder = tmp_path / "extra"
    for i, character in enumerate("AAqq777"):
        (folder / character).mkdir(parents=True, exist_ok=True)
        drawn(character.upper(), seed=i).save(folder / character / f"{i}.png")
    (folder / "A" / "\x1b[2J.png").write_bytes(b"no picture")
    (folder / "CREDIT.txt").write_text("Somebody's hands\n")
    return folder


@pytest.fixture
def config(config) -> train.Config:
    return replace(config, epochs=1, batch_size=BATCH, extra_fraction=0.25)


def split_of(count: int) -> CNN.Split:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
    return CNN.Split(images, torch.arange(count) % 36)


def test_folders_are_read_and_fitted(pictures, capsys):
    extra = train.read_extra(pictures)
    assert extra.writers == ("",) * 7
    assert [CNN.ALPHABET[i] for i in extra.labels.tolist()] == list("777AAQQ")
    assert extra.images.amax((1, 2)).tolist() == [255] * 7  # fitted: ink 255 on 0
    assert extra.images[:, 0].max() == 0
    said = capsys.readouterr().err
    assert r"\x1b[2J.png: not a picture in a format that is read here" in said
    assert said.removesuffix("\n").isprintable()  # a line, and nothing that a terminal obeys


def test_a_csv_of_no_corrections_is_told_by_what_is_wrong_and_none_is_replaced(run_train, tmp_path):
    table = tmp_path / "corrections.csv"
    table.write_text("path;character\na.png;A\n")
    error = run_train("--extra", table).error
    expected = "no column 'path': give a csv, by comma, in UTF-8, "
    assert error.startswith(f"--extra {table}: {expected}")
    error = run_train("--extra", table, "--out", table).error
    assert error == f"--out {table}: would replace --extra: choose another file"


def test_what_is_hidden_or_no_class_is_passed_over_and_the_latter_named_once(tmp_path, capsys):
    for name in (".git/HEAD", "__MACOSX/A", "Ä\x1b[2J/1.png", "Ä\x1b[2J/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit, match="no pictures of a class that can be read: put them into"):
        train.read_extra(tmp_path)
    capsys.readouterr()
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / ".DS_Store").write_bytes(b"")
    drawn("A").save(tmp_path / "A" / "x.png")
    assert train.read_extra(tmp_path).labels.tolist() == [10]
    said = capsys.readouterr().err
    listed = r"'__MACOSX' (1), 'Ä\x1b[2J' (2)"
    assert said == f"--extra {tmp_path}: passed over, as no class of 0-9 and A-Z: {listed}\n"


def test_corrections_of_the_report_also_from_windows_or_of_empty_cells(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    drawn("A").save(tmp_path / "scans" / "a.png")
    drawn("C").save(tmp_path / r"b\c.png")  # so named on this computer
    Path("table.csv").write_text("path,character\nscans\\a.png,A\nb\\c.png,c\nd.png,\ne.png\n")
    assert train.read_extra(Path("table.csv")).labels.tolist() == [10, 12]
    assert capsys.readouterr().err.endswith("no class of 0-9 and A-Z: '' (2)\n")


def test_each_batch_begins_with_its_fraction_of_extra_pictures(config):
    split = split_of(110)._replace(writers=("",) * 10)
    rows = train.draw_epoch(split, 0, config)
    assert rows.shape == (100 // (BATCH - 6), BATCH)
    assert (rows[:, :6] >= 100).all()
    assert (rows[:, 6:] < 100).all()
    assert len(rows[:, 6:].unique()) == rows[:, 6:].numel()  # once each


def test_init_starts_from_a_file_and_learns_the_extra(config, pictures):
    start = CNN.load(ROOT / "model.pt")
    config = replace(config, init=ROOT / "model.pt", extra=pictures, lr=1e-4, outliers=0.05)
    state = train.create_state(config, train.set_up(config))
    for key, value in start.state_dict().items():
        torch.testing.assert_close(state.net.state_dict()[key], value)
    results = train.train(config)
    net = CNN.load(config.out)
    assert net.card.arch == start.card.arch
    assert results["test"]["accuracy"] > 60  # hardly moved by one epoch at this rate
    both = train.read_emnist(config.data, train=True)
    validation = both.labels[train.held_out(both.images)]  # where probabilities are calibrated
    prior = ((validation < 10).sum().item() + 1) / (len(validation) + 2)
    assert net.card.digit_prior == pytest.approx(prior)
    assert net.card.credit == f"{start.card.credit}; Somebody's hands"
