"""Augmentations and outliers against Pillow, hand-made cases and the formula written out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch.testing import assert_close

import train
from CNN import ALPHABET


@pytest.fixture
def pixels(tiny_emnist) -> torch.Tensor:
    """(144, 28, 28) uint8."""
    return train.read_emnist(tiny_emnist, train=True).images


@pytest.fixture
def batch(pixels) -> torch.Tensor:
    """Pictures as the augmentations take them: (144, 1, 28, 28) in [0, 1]."""
    return pixels.unsqueeze(1) / 255


@pytest.fixture
def labels(tiny_emnist) -> torch.Tensor:
    return train.read_emnist(tiny_emnist, train=True).labels


def draw_repeatedly(make: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    """Return what is drawn with a seed, the same each time, another with another seed."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(make(*arguments))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    return results[0]


@pytest.mark.parametrize("names", [*train.AUGMENTATIONS, train.Config.augment])
def test_augment_changes_images_and_keeps_their_ink_full(batch, names):
    before = batch.clone()
    changed = draw_repeatedly(train.augment, batch, names)
    assert torch.equal(batch, before)
    assert changed.shape == batch.shape
    assert (changed - batch).abs().amax((1, 2, 3)).gt(0.02).float().mean() > 0.2
    assert changed.amax((1, 2, 3)).gt(0.9999).float().mean() > 0.98  # all but the faintest
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(train.augment(batch, "none"), batch)
    blank = train.augment(torch.zeros(3, 1, 28, 28), names)
    assert 0 <= blank.min() <= blank.max() <= 1


def test_half_of_a_batch_is_augmented_and_outliers_of_every_kind_are_added(
    pixels, labels, monkeypatch
):
    def numbered(images, labels, count):  # the kinds come one after the other, a fifth each
        return torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    monkeypatch.setattr(train, "make_outliers", numbered)
    images = pixels[:120].view(3, 40, 28, 28)
    labels = labels[:120].view(3, 40)
    batches = train.make_batches(images, labels, "warp,tone", 0.25)
    assert batches.shape == (3, 50, 1, 28, 28)
    changed = (batches[:, :40, 0] - images / 255).abs().amax((2, 3)) > 0
    assert changed[:, :20].all()
    assert not changed[:, 20:].any()
    kinds = batches[:, 40:, 0, 0, 0] // 6  # 30 outliers, so 6 of each kind
    assert kinds.sort(dim=1).values.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 3
    plain = train.make_batches(images, labels, "none", 0)
    assert torch.equal(plain[:, :, 0], images / 255)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("only", ["", "1", "A"])
def test_outliers_are_full_of_ink_and_repeat_with_a_seed(batch, labels, count, only):
    if only:  # a batch of one character
        labels = torch.full((len(batch),), ALPHABET.index(only))
    outliers = draw_repeatedly(train.make_outliers, batch, labels, count)
    assert outliers.shape == (count, 1, 28, 28)
    assert 0 <= outliers.min() <= outliers.max() <= 1
    assert (outliers.amax((1, 2, 3)) > 0.5).all()


def test_two_characters_of_an_outlier_are_no_lines_and_any_of_other_shapes_is_as_likely():
    """Marked by one pixel each, the images of the overwritten fifth are known.

    The first is any that is no line, the second any of another shape: Pearson's chi-square.
    """
    labels = torch.tensor([ALPHABET.index(character) for character in "1IL00O2Z75SEEV"])
    shape = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5])
    marked = torch.eye(14, 28 * 28).view(14, 1, 28, 28)
    torch.manual_seed(0)
    overwritten = [train.make_outliers(marked, labels, 1000)[200:400] for _ in range(2)]
    pairs = torch.cat(overwritten).flatten(1).nonzero()[:, 1].view(400, 2)
    counts = torch.zeros(14, 14).index_put_(tuple(pairs.T), torch.ones(()), accumulate=True)
    possible = (shape[:, None] != shape) & (shape[:, None] > 0) & (shape > 0)
    second = possible / possible.sum(1, keepdim=True).clamp(min=1)
    expected = 400 / 11 * (second + second.T).triu()  # 11 are no lines; which is first is not seen
    assert counts[expected == 0].sum() == 0
    counts = counts[expected > 0]
    expected = expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_outliers_of_a_large_batch_take_memory_for_their_images_only():
    """A matrix of all pairs that may be drawn, 100 by 100,000, would take 40 MB."""
    images = torch.rand(1, 1, 28, 28).expand(100_000, 1, 28, 28)
    with torch.profiler.profile(profile_memory=True) as profile:
        train.make_outliers(images, torch.arange(100_000) % 36, 100)
    assert max(event.cpu_memory_usage for event in profile.events()) < 10e6


def test_a_zigzag_is_drawn_as_pillow_draws_it():
    points = torch.tensor([[[-0.6, -0.5], [0.5, -0.4], [-0.5, 0.45], [0.6, 0.5]]])
    ours = train.draw_strokes(points)[0, 0].numpy()
    picture = Image.new("L", (280, 280))
    corners = [tuple(place) for place in ((points[0] + 1) * 140).tolist()]
    ImageDraw.Draw(picture).line(corners, 255, width=23, joint="curve")
    expected = np.asarray(picture.resize((28, 28), Image.BOX), np.float32) / 255
    assert np.abs(ours - expected).mean() < 0.02
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.97


def test_squeezing_scales_about_the_middle_and_shifts():
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 4:24, 8:20] = 1
    half = torch.tensor([[0.5]])
    squeezed = train.squeeze(image, half, half, half)[0, 0]
    rows, columns = (squeezed > 0.5).nonzero().T
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [9, 18, 18, 23]


def test_warp_is_affine_grid_of_its_matrices_and_a_bent_one(batch, monkeypatch):
    draws, knots = torch.rand(6, 144, 1, 1), torch.randn(144, 2, 5, 5)
    monkeypatch.setattr(torch, "rand", lambda *size, device: draws.view(size))
    monkeypatch.setattr(torch, "randn", lambda *size, device: knots.view(size))
    matrices = []
    for angle, shear, scale, stretch, right, down in (draws * 2 - 1).view(6, 144).T.tolist():
        cos, sin = np.cos(np.radians(15) * angle), np.sin(np.radians(15) * angle)
        turned, sheared = np.array([[cos, -sin], [sin, cos]]), np.array([[1, 0.25 * shear], [0, 1]])
        larger = np.diag(np.exp([0.15 * (scale + stretch), 0.15 * (scale - stretch)]))
        shift = np.array([[right], [down]]) * 2 / 14  # 2 px; affine_grid's unit is 14 px
        matrices.append(np.hstack([larger @ turned @ sheared, shift]))
    theta = torch.from_numpy(np.stack(matrices)).float()
    grid = F.affine_grid(theta, batch.shape, align_corners=False)
    bend = F.interpolate(knots * 0.8 / 14, (28, 28), mode="bilinear")
    expected = F.grid_sample(batch, grid + bend.movedim(1, 3), align_corners=False)
    assert_close(train.warp(batch), expected, atol=2e-5, rtol=0)


@pytest.fixture
def draw_most(monkeypatch):
    """Let an augmentation take the pictures named, part after part, and its largest amounts."""

    def draw(*parts: list[int]) -> None:
        left = iter(torch.tensor(part, dtype=torch.int64) for part in parts)
        monkeypatch.setattr(train, "pick", lambda _, *shares: [next(left) for _ in shares])
        monkeypatch.setattr(train, "uniform", lambda _, low, high: torch.tensor(float(high)))

    return draw


def filtered(picture: torch.Tensor, kernel: ImageFilter.Filter) -> torch.Tensor:
    """Filter a picture (1, 28, 28) in [0, 1] with Pillow, which leaves its border: cut it off."""
    whole = Image.fromarray(np.uint8(picture[0].mul(255).round())).filter(kernel)
    return torch.from_numpy(np.asarray(whole, np.float32)[None, 1:-1, 1:-1]) / 255


def test_stroke_thins_a_third_and_thickens_a_third_as_pillow_does(batch, draw_most):
    change = train.stroke(batch) - batch
    low, high = change.amin((1, 2, 3)), change.amax((1, 2, 3))
    thinner, thicker = (low < 0) & (high <= 0), (high > 0) & (low >= 0)
    assert (thinner.sum(), thicker.sum(), (low == high).sum()) == (48, 48, 48)
    draw_most([3], [99])
    changed, inside = train.stroke(batch)[..., 1:-1, 1:-1], batch[..., 1:-1, 1:-1]
    thin = torch.lerp(inside[3], filtered(batch[3], ImageFilter.MinFilter(3)), 0.9)
    assert_close(changed[3], thin, atol=1e-5, rtol=0)
    assert_close(changed[99], filtered(batch[99], ImageFilter.MaxFilter(3)), atol=1e-5, rtol=0)


def test_resolution_is_pillows_shrinking_then_bicubic_in_a_quarter(batch, draw_most):
    assert (train.resolution(batch) != batch).flatten(1).any(1).sum() in range(33, 38)
    draw_most(*([i] for i in range(len(train.COARSE_SIZES))))
    ours = train.resolution(batch)
    assert min(train.COARSE_SIZES) == (7, 7)
    for i, (height, width) in enumerate(train.COARSE_SIZES):
        small = Image.fromarray(batch[i, 0].numpy()).resize((width, height), Image.BILINEAR)
        small = torch.from_numpy(np.array(small))[None, None]
        expected = F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1)
        assert_close(ours[i : i + 1], expected, atol=1e-5, rtol=0)


def test_tone_blurs_bends_the_contrast_and_adds_grain(batch, draw_most):
    draw_most([3], [4], [])
    changed = train.tone(batch)
    blurred = filtered(batch[3], ImageFilter.BoxBlur(1))
    assert_close(changed[3, :, 1:-1, 1:-1], blurred, atol=0.01, rtol=0)
    assert_close(changed[4], batch[4] ** math.exp(0.7), atol=1e-5, rtol=0)
    draw_most([], [], list(range(144)))
    grey = torch.full_like(batch, 0.5)
    assert (train.tone(grey) - grey).std().item() == pytest.approx(0.12, rel=0.02)
