"""The contract between training and inference: classes, image form, net, weights file.

    net = CNN.load("model.pt")        # a Net in eval mode, with its card
    logits = net(images)              # (N, 1, 28, 28) ink in [0, 1] -> (N, 36)

`train.py` and `inference.py` both import it and never each other: what they must agree on is here.
"""

import copy
import io
import math
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion

# Classes and images

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a label is the index of its character here
DIGITS = 10  # the first classes
SIZE = 28  # px, side of the square images that the net reads
MEAN = 0.1736  # of EMNIST's pixels in [0, 1], digits and letters together
STD = 0.3317  # their standard deviation
EMNIST_DIGIT_PRIOR = 240_000 / 364_800  # digits among EMNIST's training images

# Architectures

DROPOUT = 0.28  # the original project's, Hladkyi's


def conv_block(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """Build two convolutions of `outputs` channels; what comes out has half the side."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.MaxPool2d(2),  # early: what follows costs a quarter
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


def two_blocks(middle: int, last: int, hidden: int, dropout: float) -> tuple[nn.Module, ...]:
    """Build layer1, layer2, fc1 and fc2 of a net of `middle` and `last` channels."""
    flat = last * (SIZE // 4) ** 2
    layer1 = conv_block(1, middle, dropout)
    layer2 = conv_block(middle, last, dropout)
    fc1 = nn.Sequential(
        nn.Linear(flat, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
    )
    return layer1, layer2, fc1, nn.Linear(hidden, len(ALPHABET))


ARCHITECTURES: dict[str, Callable[..., tuple[nn.Module, ...]]] = {  # called with dropout=
    "default": partial(two_blocks, 48, 96, 384),
    "large": partial(two_blocks, 64, 128, 1536),
}


# What the weights file knows beside the weights


@dataclass(frozen=True)
class ClassStatistics:
    """How the features of training images lie around the mean of their class.

    Features are taken at unit length and whitened by the pooled covariance within classes, so that
    the squared Mahalanobis distance is the squared Euclidean one (Lee et al. 2018, arXiv
    1807.03888). An image far from the mean of its class is not typical of it.
    """

    whitening: Tensor  # (D, D): whitened = features of unit length @ whitening
    means: Tensor  # (classes, D), whitened
    median: float  # of the squared distances of validation images to the mean of their answer
    basis: Tensor  # (classes, K, D): a writer's means are means + z @ basis, his z (K,)


@dataclass
class Card:
    """What the weights file knows beside the weights."""

    arch: str = "default"  # a name in ARCHITECTURES
    alphabet: str = ALPHABET
    mean: float = MEAN
    std: float = STD
    temperature: float = 1.0  # logits are divided by it to get calibrated probabilities
    digit_prior: float = EMNIST_DIGIT_PRIOR  # digits among the images that it was calibrated on
    lookalikes: list = field(default_factory=list)  # groups, str, that nobody can tell apart alone
    metrics: dict = field(default_factory=dict)  # of validation and test, and the settings
    credit: str = ""  # whose data the weights were trained on
    statistics: ClassStatistics | None = None  # None until training ends: not in a weights file


# The net


class Net(nn.Module):
    """The conv net: two convolutional blocks, a hidden layer, and a last one that gives logits.

    arch: a name in ARCHITECTURES. xavier: Glorot & Bengio's uniform initialisation (2010) of every
    convolution and linear layer; otherwise torch's own. `card` is what the weights file knows
    beside the weights.
    """

    def __init__(self, arch: str = "default", *, dropout: float = DROPOUT, xavier: bool = True):
        super().__init__()
        self.card = Card(arch)
        self.layer1, self.layer2, self.fc1, self.fc2 = ARCHITECTURES[arch](dropout=dropout)
        if xavier:
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(layer.weight)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees, (N, D), of images (N, 1, 28, 28): ink in [0, 1]."""
        x = (images - self.card.mean) / self.card.std
        x = self.layer1(x)  # (N, 48, 14, 14) with the default net
        x = self.layer2(x)  # (N, 96, 7, 7)
        return self.fc1(x.flatten(1))  # (N, 384)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 1, 28, 28): ink in [0, 1], paper 0."""
        return self.fc2(self.features(images))

    def fused(self) -> "Net":
        """Return a copy for inference: in eval mode, batch norms folded into what precedes them."""
        net = copy.deepcopy(self).eval().requires_grad_(False)
        for sequence in (net.layer1, net.layer2, net.fc1):
            for i in range(len(sequence) - 1):
                layer = sequence[i]
                norm = sequence[i + 1]
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    sequence[i] = fusion.fuse_conv_bn_eval(layer, norm)
                elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                    sequence[i] = fusion.fuse_linear_bn_eval(layer, norm)
                else:
                    continue
                sequence[i + 1] = nn.Identity()
        return net


# Running it

EVALUATION_BATCH = 2048  # images


def local_rank() -> int:
    """Return which of this computer's ranks this process is; 0 where torchrun did not start it."""
    return int(os.environ.get("LOCAL_RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def choose_device(name: str) -> torch.device:
    """Return a device by torch's name for it; auto: the GPU, or the CPU where no GPU computes.

    Under torchrun each rank takes its own GPU. Raises ValueError where the device does not compute.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device(f"cuda:{local_rank()}" if name in ("auto", "cuda") else name)
        torch.ones(1, device=device).item()  # runs a kernel: a build of torch lacks old GPUs'
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if name != "auto":
            raise ValueError(reason) from None
        print(f"the GPU can't be used, so the CPU is: {reason}", file=sys.stderr)
        return torch.device("cpu")
    return device


def mixed_precision(device: torch.device) -> torch.dtype:
    """Return the dtype for autocast: bfloat16 where the device computes it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def predict(
    net: Net, images: Tensor, precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes) and features (N, D), both float32, in eval mode.

    images: (N, 28, 28) uint8, ink 255 on 0.
    """
    net.eval()
    logits = []
    features = []
    for part in images.split(EVALUATION_BATCH):
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            seen = net.features(part.unsqueeze(1) / 255)  # (n, D)
            logits.append(net.fc2(seen).float())
        features.append(seen.float())
    return torch.cat(logits), torch.cat(features)


# How answers are measured

ECE_BINS = 15  # the customary number, Guo et al. 2017, arXiv 1706.04599


def compute_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of a split: accuracies in per cent, NLL in nats, ECE as a fraction.

    digits, letters: of the images that are; *_known: the same when only digits, or only letters,
    can be answered. classes: mean over the classes.
    """
    confidence, answer = logits.softmax(1).max(1)
    right = (answer == labels).float()
    is_digit = labels < DIGITS
    possible = (torch.arange(len(ALPHABET), device=labels.device) < DIGITS) == is_digit[:, None]
    right_known = (logits.where(possible, -math.inf).argmax(1) == labels).float()
    accuracies = {
        "accuracy": right.mean(),
        "digits": right[is_digit].mean(),
        "letters": right[~is_digit].mean(),
        "classes": torch.stack([right[labels == label].mean() for label in labels.unique()]).mean(),
        "digits_known": right_known[is_digit].mean(),
        "letters_known": right_known[~is_digit].mean(),
    }
    metrics = {name: 100 * accuracy.item() for name, accuracy in accuracies.items()}
    metrics["nll"] = F.cross_entropy(logits, labels).item()
    metrics["ece"] = calibration_error(confidence, right)
    return metrics


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the expected calibration error in ECE_BINS equal bins, a fraction.

    confidence: (N,) of the best class. right: (N,) 1 where the answer is right, 0 elsewhere.
    """
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, device=confidence.device)
    gaps.index_add_(0, bins, confidence - right)
    return (gaps.abs().sum() / len(confidence)).item()


BIAS_PENALTY = 2.0  # nats over the whole split, of a shift of 1; cross-validated on validation


def calibrate(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Return the temperature and the bias (classes,) that calibrate the logits of a split.

    With them the NLL of (logits + bias) / temperature is least. The fit is of scale * logits +
    shift, the same in another form; BIAS_PENALTY holds back large shifts, as some confusions are
    rare. Source: bias-corrected temperature scaling, Alexandari et al. 2020, arXiv 1901.06852.
    """
    log_scale = torch.zeros((), device=logits.device, requires_grad=True)
    shift = torch.zeros(logits.shape[1], device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=200, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        penalty = BIAS_PENALTY * shift.square().sum() / len(labels)
        loss = F.cross_entropy(log_scale.exp() * logits + shift, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    temperature = math.exp(-log_scale.item())
    return temperature, shift.detach() * temperature


def count_confusions(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the confusion table (36, 36), int64: row the truth, column the answer."""
    classes = len(ALPHABET)
    pairs = labels * classes + logits.argmax(1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).cpu()


LOOKALIKE_FRACTION = 0.15  # on validation the worst pairs are at 20 % and more, the next at 12 %


def find_lookalikes(confusion: Tensor) -> list[str]:
    """Return the groups of characters that nobody can tell apart alone, such as "1IL".

    Two characters are alike if their confusions, both ways, reach LOOKALIKE_FRACTION of the images
    of the rarer one; a group is what such pairs connect.
    """
    counts = confusion.sum(1)
    fractions = (confusion + confusion.T) / torch.minimum(counts[:, None], counts).clamp(1)
    groups = list(ALPHABET)  # of each character, those in its group
    for i, j in (fractions.triu(1) >= LOOKALIKE_FRACTION).nonzero().tolist():
        joined = "".join(sorted({*groups[i], *groups[j]}))
        for member in joined:
            groups[ALPHABET.index(member)] = joined
    return sorted({group for group in groups if len(group) > 1})


# What is typical of a class

SHRINKAGE = 0.2  # of the covariance towards the mean of its diagonal; 0.2 to 0.5 do the same


def whiten(features: Tensor, whitening: Tensor) -> Tensor:
    """Bring features (N, D) to unit length and whiten them; those without any stay zero."""
    return F.normalize(features.float(), eps=1e-6) @ whitening


def square_distances(whitened: Tensor, means: Tensor) -> Tensor:
    """Return the squared distances (N, classes), float64, of whitened features to whitened means.

    In single precision the fourth digit of a probability would depend on how many others there are.
    """
    whitened = whitened.double()
    return torch.cdist(whitened, means.double(), compute_mode="use_mm_for_euclid_dist").square()


def compute_statistics(
    features: Tensor, labels: Tensor, validation_features: Tensor, validation_answers: Tensor
) -> ClassStatistics:
    """Return the class statistics of training images, (N, D) features and (N,) labels.

    The covariance within classes is pooled and shrunk (after Ledoit and Wolf 2004), so that it can
    be inverted. The median of the distance is that of validation, to the class answered. The basis
    is empty: `learn_basis` finds one.
    """
    features = features.cpu()  # where doubles are, which Apple's GPUs lack
    labels = labels.cpu()
    units = F.normalize(features.double(), eps=1e-6)
    means = torch.stack([units[labels == i].mean(0) for i in range(len(ALPHABET))])
    spread = units - means[labels]
    covariance = spread.T @ spread / len(spread)  # (D, D)
    even = torch.eye(len(covariance)) * covariance.diagonal().mean()
    covariance = torch.lerp(covariance, even.double(), SHRINKAGE)
    # W of W W' = covariance^-1, so that |xW - mW|^2 = (x - m) covariance^-1 (x - m)'
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    whitened_means = (means @ whitening).float()
    whitening = whitening.float()
    distances = square_distances(whiten(validation_features.cpu(), whitening), whitened_means)
    distances = distances.gather(1, validation_answers.cpu()[:, None]).flatten()
    basis = torch.zeros(len(ALPHABET), 0, len(whitening))
    return ClassStatistics(whitening, whitened_means, distances.median().item(), basis)


# Chosen on ../shared/field, as are the weights of adapting below
BASIS_SIZE = 8  # K; up to 32 do the same, 4 does less
BASIS_DISTANCE = 2.5  # medians of validation: images farther from their class are left out
BASIS_IMAGES = 15  # that those of one writer and class count for, at most
BASIS_RIDGE = 5.0  # of the least squares, images
BASIS_ROUNDS = 15


def learn_basis(
    features: Tensor, labels: Tensor, writers: Tensor, statistics: ClassStatistics
) -> Tensor:
    """Return the basis (classes, K, D) of how class means differ between writers.

    features: (N, D) of images, labels: (N,), writers: (N,) int64, their numbers. Writers differ in
    all classes alike: who slants the 4 slants the 7. Least squares, of the basis and of each
    writer's z in turns, start from the principal components of the writers' means.
    Source: eigenvoices, Kuhn et al. 2000, IEEE Transactions on Speech and Audio Processing 8(6).
    """
    labels = labels.cpu()
    offsets = whiten(features.cpu(), statistics.whitening) - statistics.means[labels]
    typical = offsets.square().sum(1) <= BASIS_DISTANCE * statistics.median
    cells = (writers * len(ALPHABET) + labels)[typical]  # of one writer and class
    counts = cells.bincount(minlength=(writers.max() + 1) * len(ALPHABET)).double()
    sums = torch.zeros(len(counts), offsets.shape[1], dtype=torch.float64)
    sums.index_add_(0, cells, offsets[typical].double())
    limited = counts.clamp(max=BASIS_IMAGES)
    sums *= (limited / counts.clamp(min=1))[:, None]
    counts = limited.view(-1, len(ALPHABET))  # (writers, classes)
    sums = sums.view(*counts.shape, -1)  # (writers, classes, D)

    means = (sums / counts.clamp(min=1)[..., None]).flatten(1)
    z = torch.linalg.eigh(means @ means.T)[1][:, -BASIS_SIZE:] * len(means) ** 0.5
    ridge = BASIS_RIDGE * torch.eye(z.shape[1])
    for _ in range(BASIS_ROUNDS):
        normal_matrix = torch.einsum("wc,wk,wl->ckl", counts, z, z) + ridge  # (classes, K, K)
        basis = torch.linalg.solve(normal_matrix, torch.einsum("wk,wcd->ckd", z, sums))
        normal_matrix = torch.einsum("wc,ckl->wkl", counts, basis @ basis.mT) + ridge
        z = torch.linalg.solve(normal_matrix, torch.einsum("ckd,wcd->wk", basis, sums))
    return (basis * z.std(0, correction=0)[:, None]).float()  # z then has the deviation 1


# The card, filled when training ends

STATISTICS_IMAGES = 1000  # of each class, un-augmented, EMNIST's; more change nothing


class Split(NamedTuple):
    """Resident images (N, 28, 28) uint8, upright, ink 255 on 0; labels (N,) int64."""

    images: Tensor
    labels: Tensor
    writers: tuple[str, ...] = ()  # of the extra images, the last rows; "": not known

    @property
    def emnist_count(self) -> int:
        return len(self.labels) - len(self.writers)


def fill_card(
    net: Net, training: Split, validation: Split, precision: torch.dtype
) -> dict[str, float]:
    """Calibrate the net and describe it on its card; return its metrics on validation.

    From validation: the temperature, the bias, which is added to the last layer's, the digit prior,
    the lookalikes, the median distance. From EMNIST's training images: whitening and class means.
    From extra images with writers: the basis.
    """
    card = net.card
    logits, features = predict(net, validation.images, precision)
    card.temperature, bias = calibrate(logits, validation.labels)
    net.fc2.bias.data += bias
    logits += bias
    digits = (validation.labels < DIGITS).sum().item()
    card.digit_prior = (digits + 1) / (len(logits) + 2)  # above 0 in any validation, below 1
    card.lookalikes = find_lookalikes(count_confusions(logits, validation.labels))

    labels = training.labels[: training.emnist_count]
    per_class = [(labels == i).nonzero()[:STATISTICS_IMAGES, 0] for i in range(len(ALPHABET))]
    rows = torch.cat(per_class)
    _, training_features = predict(net, training.images[rows], precision)
    answers = logits.argmax(1)
    card.statistics = compute_statistics(training_features, labels[rows], features, answers)
    names = [writer for writer in training.writers if writer]
    if names:
        rows = [len(labels) + i for i, writer in enumerate(training.writers) if writer]
        _, writer_features = predict(net, training.images[rows], precision)
        number = {name: i for i, name in enumerate(sorted(set(names)))}
        writers = torch.tensor([number[name] for name in names])
        basis = learn_basis(writer_features, training.labels[rows], writers, card.statistics)
        card.statistics = replace(card.statistics, basis=basis)
    return compute_metrics(logits / card.temperature, validation.labels)


# Adapting to a folder: the fraction of digits in it, and how its writers write

TYPICALITY = 5.0  # nats that the median distance of validation weighs beside log probabilities
DIGIT_PRIOR_WEIGHT = 3.6  # pictures that the digit prior in training counts for in the estimate
WRITER_WEIGHT = 400.0  # precision of z beside that of a picture's features, 1; 100 to 1,000 do
ADAPTING_ROUNDS = 3  # two do nearly as well


class Seen(NamedTuple):
    """What the net sees in N images, whatever folder they come from."""

    log_p: Tensor  # (N, classes), nats, with the prior of training
    distances: Tensor  # (N, classes), squared, in medians of validation, to training's means
    features: Tensor  # (N, D), whitened


@dataclass(frozen=True)
class Folder:
    """What is known of a folder's pictures."""

    allowed: Tensor  # (classes,) bool: what can be answered
    means: Tensor  # (classes, D), of whitened features, as the folder's writers write
    digits: float | None = None  # their fraction; None: as in training


def see(features: Tensor, logits: Tensor, card: Card) -> Seen:
    """Return what the net sees, from the features (N, D) and logits (N, classes) of images."""
    statistics = card.statistics
    whitened = whiten(features.cpu(), statistics.whitening)
    log_p = (logits / card.temperature).log_softmax(1).cpu()
    return Seen(log_p, square_distances(whitened, statistics.means) / statistics.median, whitened)


def compare(seen: Seen, folder: Folder, card: Card) -> tuple[Tensor, Tensor]:
    """Return log probabilities of the characters in a folder, and distances, (N, classes) each.

    Distances are squared, in medians of validation, to the means of the folder's writers. A
    character is the likelier, the nearer its mean is than the one of training.
    """
    distances = square_distances(seen.features, folder.means) / card.statistics.median
    nearer = seen.distances - distances
    log_p = seen.log_p + log_prior(folder, card) + TYPICALITY * nearer
    return log_p.log_softmax(1), distances


def log_prior(folder: Folder, card: Card) -> Tensor:
    """Return how much likelier than in training each class is, (classes,) nats."""
    shift = torch.zeros(len(ALPHABET), dtype=torch.float64)
    training = training_digits(folder, card)
    if folder.digits is not None and 0 < training < 1:
        least = 1e-300  # no -inf: one is best
        shift[:DIGITS] = math.log(max(least, folder.digits / training))
        shift[DIGITS:] = math.log(max(least, (1 - folder.digits) / (1 - training)))
    return shift.masked_fill(~folder.allowed, -math.inf)


def training_digits(folder: Folder, card: Card) -> float:
    """Return the fraction of digits in training, among images of the characters allowed.

    There every digit was as frequent as any other, and every letter as any other.
    """
    allowed = folder.allowed.double()
    digits = allowed[:DIGITS].mean() * card.digit_prior
    letters = allowed[DIGITS:].mean() * (1 - card.digit_prior)
    return float(digits / (digits + letters))


def adapt(seen: Seen, beforehand: Folder, card: Card) -> Folder:
    """Return what is known of a folder once typical images of it, unlabelled, are seen.

    In turns, expectation maximisation: how likely each image is each character; how the writers
    write, from that; the fraction of digits, unless it is known, from what is likely with such
    writers.
    """
    training = training_digits(beforehand, card)
    is_estimated = beforehand.digits is None and 0 < training < 1
    folder = beforehand
    for _ in range(ADAPTING_ROUNDS if len(seen.features) else 0):
        log_p, _ = compare(seen, folder, card)
        means = estimate_means(seen.features, log_p.exp(), card.statistics)
        folder = replace(beforehand, means=means)
        if is_estimated:
            log_p, _ = compare(seen, folder, card)
            p_digit = log_p[:, :DIGITS].exp().sum(1)
            folder = replace(folder, digits=estimate_digits(p_digit, training))
    return folder


def estimate_means(features: Tensor, members: Tensor, statistics: ClassStatistics) -> Tensor:
    """Return the class means (classes, D) of a folder's writers.

    features: (N, D), whitened; members: (N, classes), how far each is a member of each class. The
    means are those of training + z @ basis, z (K,) the likeliest for the whole folder, by the prior
    N(0, I / WRITER_WEIGHT). With V (K, D) the basis of a class, n its members, and s the sum of
    their offsets from the mean in training, that is where
    (WRITER_WEIGHT I + sum over classes of n V V') z = sum over classes of V s.
    """
    basis = statistics.basis.double()  # (classes, K, D)
    counts = members.sum(0)  # (classes,)
    offsets = members.T @ features.double() - counts[:, None] * statistics.means
    precision = torch.einsum("c,ckd,cld->kl", counts, basis, basis)  # (K, K)
    precision += WRITER_WEIGHT * torch.eye(len(precision))
    z = torch.linalg.solve(precision, torch.einsum("ckd,cd->k", basis, offsets))
    return statistics.means + torch.einsum("k,ckd->cd", z, basis).float()


def estimate_digits(p_digit: Tensor, training: float) -> float:
    """Return the fraction of digits among images, by expectation maximisation.

    p_digit: (N,) how likely each is a digit where `training` is their fraction, as it was there.
    Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14; two groups, not 36.
    """
    fraction = training
    for _ in range(200):
        digit = p_digit * fraction / training
        letter = (1 - p_digit) * (1 - fraction) / (1 - training)
        counted = (digit / (digit + letter)).sum() + DIGIT_PRIOR_WEIGHT * training
        fraction = counted / (len(p_digit) + DIGIT_PRIOR_WEIGHT)
    return float(fraction)


# The weights file


def write_atomically(payload: object, path: Path) -> None:
    """Save `payload` with torch.save so that `path` holds the old file or the new one, whole.

    Both are on the disk before the name changes, should the machine lose its power. Raises OSError.
    """
    path = Path(path).resolve()  # a link stays, its target changes
    partial_path = path.with_name(path.name + ".partial")
    buffer = io.BytesIO()
    torch.save(payload, buffer)  # not to the file: torch reports a full disk as it happens
    try:
        with open(partial_path, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
    except OSError:
        partial_path.unlink(missing_ok=True)
        raise
    with suppress(AttributeError, OSError):  # Windows can't, nor can some network file systems
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def save(net: Net, path: Path) -> None:
    """Write the weights and their card, atomically. Raises OSError."""
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    write_atomically(asdict(net.card) | {"state_dict": weights}, path)


def read_saved(path: Path, device: torch.device | str = "cpu") -> dict:
    """Return what torch.save wrote; nothing in the file is executed (weights_only).

    torch checks no checksums, so a flipped byte would be a wrong weight. Raises ValueError for it,
    OSError where the file can't be read, and whatever else unpickling foreign bytes may raise.
    """
    data = io.BytesIO(Path(path).read_bytes())  # of a file cut short, torch says "invalid argument"
    if zipfile.is_zipfile(data) and zipfile.ZipFile(data).testzip():
        raise ValueError("a checksum in it is wrong")
    data.seek(0)
    return torch.load(data, map_location=device, weights_only=True)


def load(path: Path, device: torch.device | str = "cpu") -> Net:
    """Read a weights file into a Net in eval mode.

    Raises ValueError, one line, for any file that is not whole and ours; OSError where it can't be
    read.
    """
    try:
        net = _build(read_saved(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever unpickling foreign bytes and filling a net may raise
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:100]
        what = f"no weights of ours, or damaged ({type(error).__name__}: {reason!a})"
        raise ValueError(f"{path}: {what}: give a file that train.py wrote") from None
    return net.eval().to(device)


def _build(content: dict) -> Net:
    """Build the net of a file that `save` wrote; what only other versions know is passed over."""
    known = [entry.name for entry in fields(Card) if entry.name in content]
    card = Card(**{name: content[name] for name in known})
    card.statistics = ClassStatistics(**card.statistics)
    net = Net(card.arch)
    net.card = card
    net.load_state_dict(content["state_dict"])
    _check(net)
    return net


def _check(net: Net) -> None:
    """Raise ValueError, or another error, if the net or its card holds what no training gives."""
    card = net.card
    statistics = card.statistics
    types = {entry.name: entry.type for entry in (*fields(Card), *fields(ClassStatistics))}
    for name, value in {**vars(card), **vars(statistics), **net.state_dict()}.items():
        right = isinstance(value, types.get(name, Tensor))
        if isinstance(value, float):
            right = right and 0 < value < math.inf
        if isinstance(value, Tensor):
            right = right and value.isfinite().all()
        if not right:
            raise ValueError(f"{name} is {value}")
    if card.alphabet != ALPHABET:
        raise ValueError(f"alphabet {card.alphabet}: expected {ALPHABET}")
    if card.digit_prior >= 1 or not set("".join(card.lookalikes)) <= set(ALPHABET):
        raise ValueError(f"digit_prior {card.digit_prior}, lookalikes {card.lookalikes}")
    width = net.fc2.in_features
    shapes = {
        "whitening": (width, width),
        "means": (len(ALPHABET), width),
        "basis": (len(ALPHABET), statistics.basis.shape[1], width),
    }
    for name, shape in shapes.items():
        tensor = getattr(statistics, name)
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} {tensor.dtype} {[*tensor.shape]}: expected float32 {shape}")
