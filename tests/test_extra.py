"""A user's own pictures, a file to start from, teachers: what each changes in a training."""

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
    (folder / "A" / "damaged.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def config(tiny_emnist: Path, tmp_path: Path) -> train.Config:
    options = {"epochs": 1, "batch_size": BATCH, "warmup": 2, "device": "cpu", "wandb": False}
    return train.Config(data=tiny_emnist, out=tmp_path / "out.pt", **options)


def split_of(count: int) -> train.Split:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
    return train.Split(images, torch.arange(count) % 36)


def test_folders_are_read_fitted_and_appended(pictures, capsys):
    both = train.add_extra(split_of(50), pictures)
    assert both.extra == 7
    assert [CNN.ALPHABET[i] for i in both.labels[50:].tolist()] == list("777AAQQ")
    assert both.images[50:].amax((1, 2)).tolist() == [255] * 7  # fitted: ink 255 on 0
    assert both.images[50:, 0].max() == 0
    said = capsys.readouterr().err
    assert "damaged.png: not a picture in a format that is read here" in said
    assert len(said.splitlines()) == 1


def test_corrections_of_the_report_are_taken_as_well(pictures, tmp_path):
    table = tmp_path / "corrections.csv"
    table.write_text(f"path,character\n{pictures}/A/0.png,b\n{pictures}/7/4.png,1\n")
    both = train.add_extra(split_of(2), table)
    assert [CNN.ALPHABET[i] for i in both.labels[2:].tolist()] == ["B", "1"]


@pytest.mark.parametrize("name", ["AB", "Ä", ""])
def test_folders_that_are_no_class_or_hold_nothing_end_it_with_the_layout(tmp_path, name):
    if name:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    message = "is no class: name folders 0-9 and A-Z" if name else "no pictures: put them into"
    with pytest.raises(SystemExit, match=message):
        train.add_extra(split_of(2), tmp_path)


def test_each_batch_holds_the_share_where_augmentation_changes(config):
    split = split_of(110)._replace(extra=10)
    config = replace(config, extra_share=0.25)
    rows = train.draw_epoch(split, 0, config)
    assert rows.shape == (100 // (BATCH - 6), BATCH)
    is_extra = rows >= 100
    assert (is_extra.sum(1) == 6).all()
    assert is_extra[:, 0:12:2].all()  # at the even places, which `augment` changes
    own = rows[~is_extra]
    assert len(own.unique()) == len(own)  # EMNIST's come once each
    assert (train.draw_epoch(split, 0, config) == rows).all()
    assert (train.draw_epoch(split, 1, config) != rows).any()


def test_init_starts_from_a_file_and_learns_the_extra(config, pictures, tmp_path):
    start = CNN.load(ROOT / "model.pt")
    config = replace(config, init=ROOT / "model.pt", extra=pictures, extra_share=0.25, lr=1e-4)
    state = train.start(config, train.set_up(config), 1)
    for key, value in start.state_dict().items():
        torch.testing.assert_close(state.net.state_dict()[key], value)
    results = train.train(config)
    net = CNN.load(config.out)
    assert net.card.arch == start.card.arch
    assert results["test"]["accuracy"] > 60  # hardly moved by one epoch at this rate
    labels = train.add_extra(train.read_emnist(config.data, train=True), pictures).labels
    share = (labels[:-7] < 10).float().mean() * 0.75 + 3 / 7 * 0.25
    assert net.card.digit_prior == pytest.approx(share.item(), abs=0.08)


def test_teachers_answers_are_learned(config, tmp_path):
    teacher = CNN.Net("run1")
    with torch.no_grad():
        teacher.fc2.bias.zero_()[5] = 40  # it says 5, whatever it sees
    CNN.save(teacher, tmp_path / "teacher.pt")
    config = replace(config, teacher=(tmp_path / "teacher.pt",))
    machine = train.set_up(config)
    net = train.start(config, machine, 1).net.eval()
    images, labels = torch.rand(8, 1, 28, 28), torch.full((8,), 7)
    with torch.autocast("cpu", machine.precision, enabled=machine.precision != torch.float32):
        log_p = net(images).log_softmax(1)
    expected = -(0.1 * log_p[:, 7].mean() + 0.9 * log_p[:, 5].mean())
    loss = train.make_loss(net, config, machine)(images, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_a_file_that_is_no_net_is_one_line(run_train, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    for flag in ("--init", "--teacher"):
        error = run_train(flag, tmp_path / "bad.pt").error
        assert error.startswith(f"{flag}: {tmp_path}/bad.pt: no weights of ours")
