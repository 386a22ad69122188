"""What the net is shown in training: EMNIST's images augmented, and outliers beside them.

    images = make_batches(pixels, labels, "warp,tone", 0.05)    # uint8 -> [0, 1], on any device

All are pure functions of images (N, 1, 28, 28) in [0, 1], ink 1 on 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from CNN import ALPHABET, SIZE


def make_batches(images: Tensor, labels: Tensor, names: str, outlier_fraction: float) -> Tensor:
    """Augment the first half of some batches and append outliers to them.

    images: (S, B, 28, 28) uint8 of S batches; labels: (S, B); names: of the augmentations. Returns
    (S, B + outliers, 1, 28, 28) in [0, 1]. The second half stays as it is: there the net may use
    what the augmentations destroy, the small differences between the 0 and the O of EMNIST's
    writers.
    """
    steps, size = labels.shape
    images = images.unsqueeze(2).float() / 255  # (S, B, 1, 28, 28)
    augmented = augment(images[:, : size // 2].flatten(0, 1), names)
    parts = [augmented.unflatten(0, (steps, -1)), images[:, size // 2 :]]
    count = round(size * outlier_fraction)
    if count:
        outliers = make_outliers(images.flatten(0, 1), labels.flatten(), steps * count)
        # The outliers come kind by kind: the i-th goes to batch i % steps, so each has every kind
        parts.append(outliers.unflatten(0, (count, steps)).transpose(0, 1))
    return torch.cat(parts, dim=1)


# Augmentations: each returns as many images as it is given, of the same form. To add one, write it
# here and name it in AUGMENTATIONS and, for the default, in Config.augment of train.py

# How far they go, chosen on validation and on the field sets together
WARP_ANGLE = math.radians(15)
WARP_SHEAR = 0.25
WARP_SCALE = 0.15  # of the logarithm: size and aspect, each
WARP_SHIFT = 2.0  # px
WARP_BEND = 0.8  # px, standard deviation at the knots of the bend
COARSE_SIZES = [(7, 7), (8, 8), (10, 10), (12, 12), (14, 14), (16, 8), (9, 14)]  # px, height, width


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw one number per image, shaped (N, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def pick(images: Tensor, *fractions: float) -> tuple[Tensor, ...]:
    """Draw the rows of disjoint random parts of the images, one as large as each fraction."""
    sizes = [round(fraction * len(images)) for fraction in fractions]
    return torch.randperm(len(images), device=images.device)[: sum(sizes)].split(sizes)


def warp(images: Tensor) -> Tensor:
    """Rotate, scale, stretch, shear and shift, with a smooth elastic displacement on top."""
    n = len(images)
    device = images.device
    pixel = 2 / SIZE  # the unit is half a side
    angle, shear, scale, stretch, right, down = torch.rand(6, n, device=device) * 2 - 1  # (N,) each
    cos = torch.cos(angle * WARP_ANGLE)
    sin = torch.sin(angle * WARP_ANGLE)
    shear = shear * WARP_SHEAR
    shift = WARP_SHIFT * pixel
    across = torch.exp((scale + stretch) * WARP_SCALE)
    along = torch.exp((scale - stretch) * WARP_SCALE)
    row_x = torch.stack([across * cos, across * (shear * cos - sin), right * shift], 1)
    row_y = torch.stack([along * sin, along * (shear * sin + cos), down * shift], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), images.shape, align_corners=False)
    knots = torch.randn(n, 2, 5, 5, device=device) * (WARP_BEND * pixel)
    bend = F.interpolate(knots, (SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1)
    return F.grid_sample(images, grid + bend, align_corners=False)  # (N, 28, 28, 2) the grid


def stroke(images: Tensor) -> Tensor:
    """Thin a third of the images, thicken another, by grey morphology, each by its own amount."""
    images = images.clone()
    thinned, thickened = pick(images, 1 / 3, 1 / 3)
    paper = 1 - images[thinned]
    spread = F.max_pool2d(paper, 3, stride=1, padding=1)
    images[thinned] = 1 - torch.lerp(paper, spread, uniform(paper, 0, 0.9))
    ink = images[thickened]
    spread = F.max_pool2d(ink, 3, stride=1, padding=1)
    images[thickened] = torch.lerp(ink, spread, uniform(ink, 0, 1))
    return images


def resolution(images: Tensor) -> Tensor:
    """Take a quarter of the images down to a few pixels and back: thumbnails, coarse scans."""
    images = images.clone()
    fractions = [1 / 4 / len(COARSE_SIZES)] * len(COARSE_SIZES)
    for size, chosen in zip(COARSE_SIZES, pick(images, *fractions), strict=True):
        coarse = F.interpolate(images[chosen], size, mode="bilinear", antialias=True)
        images[chosen] = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return images


def tone(images: Tensor) -> Tensor:
    """Blur, bend the contrast, add grain, each to its own random part of the images."""
    images = images.clone()
    (chosen,) = pick(images, 1 / 4)
    sharp = images[chosen]
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1)
    images[chosen] = torch.lerp(sharp, blurred, uniform(sharp, 0, 1))
    (chosen,) = pick(images, 1 / 3)
    plain = images[chosen]
    images[chosen] = plain.clamp(1e-6) ** torch.exp(uniform(plain, -0.7, 0.7))
    (chosen,) = pick(images, 1 / 5)
    images[chosen] += torch.randn_like(images[chosen]) * uniform(images[chosen], 0, 0.12)
    return images.clamp(0, 1)


AUGMENTATIONS = {function.__name__: function for function in (warp, stroke, resolution, tone)}


def augment(images: Tensor, names: str) -> Tensor:
    """Apply augmentations, given by their names and commas, or none.

    The ink of each is brought back to a maximum of 1, as EMNIST's images and fitted ones have it.
    """
    if names == "none":
        return images
    for name in names.split(","):
        images = AUGMENTATIONS[name](images)
    return images / images.amax((1, 2, 3), keepdim=True).clamp(min=0.1)


# Outliers: images of what is no character

PEN_WIDTH = 2.3  # px, of EMNIST's strokes, the median
# They are made of two characters of different shapes: an E over an F is an E. The first shape,
# lines, is left out: beside or over another character they make a third.
SHAPES = ["1IL", "0OQDCG6", "2Z79AJTY4X", "5S8B3", "EFPRKH", "UVWMN"]


def make_outliers(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """Make outliers (count, 1, 28, 28) of random images (N, 1, 28, 28), as large as fitted ones.

    Source: outlier exposure, Hendrycks et al. 2019, arXiv 1812.04606.
    """
    # A fifth of the pairs goes into each kind of outlier
    rows, other_rows = draw_pairs(labels, count)
    left, under, before, whole, _ = images[rows].tensor_split(5)
    right, over, after, _, empty = images[other_rows].tensor_split(5)
    device = images.device

    # Two side by side: bold ones, narrowed
    height = 0.45 + 0.3 * torch.rand(len(left), 1, 1, device=device)
    shift = 0.4 + 0.1 * torch.rand(len(left), 1, 1, device=device)
    left = squeeze(F.max_pool2d(left, 3, stride=1, padding=1), 0.45, height, -shift)
    right = squeeze(F.max_pool2d(right, 3, stride=1, padding=1), 0.45, height, shift)
    beside = torch.maximum(left, right)
    # One over the other
    overwritten = torch.maximum(under, over)
    # The right half of one and the left half of the next, as a bad crop has them
    halves = torch.cat([before[..., SIZE // 2 :], after[..., : SIZE // 2]], dim=3)
    cropped = squeeze(halves, 0.85, 0.85, 0)
    # One struck out by four lines from side to side
    corners = torch.rand(len(whole), 5, 2, device=device) * 1.5 - 0.75
    corners[:, :, 0] = 0.4 + corners[:, :, 0].abs() / 2
    corners[:, 1::2, 0] *= -1
    struck_out = torch.maximum(whole, draw_strokes(corners))
    # A scribble: a curve through twelve points
    points = torch.rand(len(empty), 2, 1, 12, device=device) * 1.7 - 0.85
    curve = F.interpolate(points, (1, 48), mode="bicubic").squeeze(2)  # (N, 2, 48)
    scribble = draw_strokes(curve.transpose(1, 2))
    return torch.cat([beside, overwritten, cropped, struck_out, scribble])


def draw_pairs(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of characters of different shapes, no lines: two tensors of rows, (count,) each.

    Sorted by shape, the characters that are no lines make a ring. From where the stretch of one's
    own shape ends, round to where it begins, are those that it may be paired with. Where there are
    none, as in a small batch of one shape, any is taken.
    """
    device = labels.device
    shape_of = torch.empty(len(ALPHABET), dtype=torch.int64)
    for shape, characters in enumerate(SHAPES):
        shape_of[[ALPHABET.index(character) for character in characters]] = shape
    shapes = shape_of.to(device)[labels]  # (N,)
    order = shapes.argsort(stable=True)  # lines first
    counts = (shapes[:, None] == torch.arange(len(SHAPES), device=device)).sum(0)
    lines = counts[0]
    ring = (len(labels) - lines).clamp(min=1)
    ends = counts.cumsum(0) - lines  # places on the ring
    place = (torch.rand(count, device=device) * ring).long()
    rows = order[(lines + place) % len(labels)]
    own = shapes[rows]
    onward = (torch.rand(count, device=device) * (ring - counts[own])).long()
    other_place = (ends[own] + onward) % ring
    return rows, order[(lines + other_place) % len(labels)]


def squeeze(images: Tensor, width: float, height: Tensor | float, shift: Tensor | float) -> Tensor:
    """Scale images by width and height, then move them right by `shift` half sides.

    height and shift are numbers, or of each image its own (N, 1, 1).
    """
    centres = pixel_centres(images.device)
    x = (centres - shift) / width  # where a pixel comes from
    y = centres[:, None] / height
    shape = (len(images), SIZE, SIZE)
    grid = torch.stack([x.expand(shape), y.expand(shape)], dim=3)
    return F.grid_sample(images, grid, align_corners=False)


def draw_strokes(points: Tensor) -> Tensor:
    """Draw lines through points (N, P, 2), x and y from -1 to 1, with a pen: (N, 1, 28, 28)."""
    centres = pixel_centres(points.device)
    pixels = torch.cartesian_prod(centres, centres).flip(1)  # (784, x and y)
    along = points.diff(dim=1)[:, None]  # (N, 1, P - 1, 2)
    offset = pixels[:, None] - points[:, None, :-1]  # (N, 784, P - 1, 2)
    part = (offset * along).sum(3) / along.square().sum(3).clamp(min=1e-6)  # of the way along
    offset = offset - part.clamp(0, 1)[..., None] * along  # from the nearest point of a line
    distance = offset.square().sum(3).amin(2).sqrt()  # (N, 784)
    return (PEN_WIDTH / 2 + 0.5 - distance * SIZE / 2).clamp(0, 1).view(-1, 1, SIZE, SIZE)


def pixel_centres(device: torch.device) -> Tensor:
    """Return where the pixels' centres are, (28,): the unit is half a side, 0 the middle."""
    return (torch.arange(SIZE, device=device) + 0.5) * 2 / SIZE - 1
