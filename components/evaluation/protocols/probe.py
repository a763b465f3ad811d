"""Linear probe: a grid of linear heads trained at once on frozen features (dinov2/eval/linear.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from components.core.errors import DatasetError
from components.core.progress import track
from components.data.evaluation_set import Labels
from components.evaluation.config import ProbeConfig
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.scores import Scores

log = logging.getLogger(__name__)

MOMENTUM = 0.9  # dinov2/eval/linear.py; weight decay 0
INITIAL_STD = 0.01  # of the weights; biases begin at 0
_CHUNK = 4096  # images predicted at once


@dataclass(frozen=True)
class ProbeFeatures:
    """Frozen features of N images, after the last norm; arrays or memory maps, float16 or wider.

    Attributes:
        cls_tokens: [N, L, D] class tokens of the last L layers, the last layer last.
        mean_patch_tokens: [N, D] mean patch token of the last layer.
    """

    cls_tokens: NDArray[np.floating]
    mean_patch_tokens: NDArray[np.floating]

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Return [B, (L + 1) D] float32: class tokens, layer by layer, then the mean patch token."""
        # Widened by torch, in a tenth of NumPy's time for float16.
        cls_tokens = torch.from_numpy(self.cls_tokens[rows]).flatten(1)
        return torch.cat([cls_tokens, torch.from_numpy(self.mean_patch_tokens[rows])], dim=1).float()


@dataclass(frozen=True)
class Head:
    """One choice of the grid; `learning_rate` is for a batch of 256."""

    num_layers: int
    mean_patch: bool
    learning_rate: float

    def __str__(self) -> str:
        layers = "last layer" if self.num_layers == 1 else f"last {self.num_layers} layers"
        patches = "with" if self.mean_patch else "without"
        return f"{layers}, {patches} mean patch token, learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Probe:
    """A trained head, to apply to other images too, such as corrupted ones."""

    head: Head
    columns: slice  # of `ProbeFeatures.take`
    weight: Tensor  # [C, D']
    bias: Tensor  # [C]
    validation_top1: float

    def logits(self, features: ProbeFeatures, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of some images, [B, C].

        Raises:
            DatasetError: a logit is not finite.
        """
        parts = [
            linear(features.take(some).to(self.weight.device)[:, self.columns], self.weight, self.bias)
            for some in _chunks(rows)
        ]
        return _finite(torch.cat(parts)).cpu().numpy()


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a classification set; see `evaluate`. A descriptor's one vector is all its kinds of input."""
    features = ProbeFeatures(given.tokens.cls, given.tokens.mean_patch)
    layers = given.tokens.cls.shape[1]
    fitting = tuple(count for count in given.settings.probe.num_layers if count <= layers) or (1,)
    config = given.settings.probe.model_copy(update={"num_layers": fitting})
    if fitting != given.settings.probe.num_layers:
        log.info("%s: %d layers have features, so heads read the last %s", given.name, layers, fitting[-1])
    return evaluate(features, given.labels, config, np.random.default_rng(given.seed), given.name)


def evaluate(
    features: ProbeFeatures, labels: Labels, config: ProbeConfig, generator: np.random.Generator, name: str
) -> Scores:
    """Train the grid on a part of train, choose the head on the rest of train, and score that head on test.

    Args:
        features: of all images of the set.
        labels: of these images.
        config: grid, steps and batch.
        generator: draws the validation part, the initial weights and the batches.
        name: of the features, for the progress display.

    Returns:
        `probe_top1`, its validation accuracy `probe_validation_top1`, and the head in `notes`.

    Raises:
        DatasetError: fewer layers than the grid needs, features that are not finite, or too few train images.
    """
    probe = fit(features, labels, config, generator, name)
    logits = probe.logits(features, labels.test)
    if labels.predictable is None:
        predictions = logits.argmax(axis=1)
    else:
        predictions = labels.predictable[logits[:, labels.predictable].argmax(axis=1)]
    scores = Scores()
    scores.add("probe_top1", (predictions == labels.targets[labels.test]).astype(np.float64))
    scores.metrics["probe_validation_top1"] = probe.validation_top1
    scores.notes["probe_head"] = str(probe.head)
    return scores


def fit(
    features: ProbeFeatures, labels: Labels, config: ProbeConfig, generator: np.random.Generator, name: str
) -> Probe:
    """Train all heads on the same batches and return the one of the best validation accuracy, the first among equals.

    dinov2/eval/linear.py (arXiv:2304.07193, App. B.3): cross-entropy, SGD with momentum 0.9, cosine to 0. Unlike there,
    features are computed once, so train images are not augmented, and the head is chosen on a part of train instead of
    the images that are reported. Heads do not share gradients, so training them together changes none of them.

    Args:
        features: of all images of the set.
        labels: of these images; only train images are read.
        config: grid, steps and batch.
        generator: draws the validation part, the initial weights and the batches.
        name: of the features, for the progress display.

    Raises:
        DatasetError: as for `evaluate`.
    """
    num_layers, dim = features.cls_tokens.shape[1:]
    if max(config.num_layers) > num_layers:
        raise DatasetError(
            f"probe.num_layers {max(config.num_layers)}: the features have class tokens of {num_layers} layers"
        )
    order = generator.permutation(labels.train)
    validation, fitted = np.split(order, [max(1, round(len(order) * config.validation_fraction))])
    if len(np.unique(labels.targets[fitted])) < 2:
        raise DatasetError(
            f"{len(labels.train)} train images are too few for a linear probe: two classes or more must remain after "
            f"{len(validation)} of them are held out to choose the head; add train images or lower "
            "probe.validation_fraction"
        )
    groups = [
        _HeadGroup(num, patch, slice((num_layers - num) * dim, (num_layers + patch) * dim), config, generator, labels)
        for num, patch in product(config.num_layers, (False, True))
    ]
    if len(fitted) < config.batch_size:
        log.warning(
            "linear probe of %s: batches of %d, all train images, instead of probe.batch_size %d",
            *(name, len(fitted), config.batch_size),
        )
    batches = track(_batches(fitted, config, generator), f"linear probe of {name}", config.num_steps, "steps")
    _train(groups, features, labels.targets, batches, config)
    accuracies = [group.accuracies(features, labels.targets, validation) for group in groups]  # [L] each
    best = int(np.argmax(np.concatenate(accuracies)))
    group, number = groups[best // len(config.learning_rates)], best % len(config.learning_rates)
    probe = group.probe(number, float(np.concatenate(accuracies)[best]))
    log.info("linear probe of %s: %s (%.4g on validation)", name, probe.head, probe.validation_top1)
    return probe


class _HeadGroup:
    """Heads of one input and all learning rates, stacked in one weight matrix [L C, D']."""

    def __init__(
        self,
        num_layers: int,
        mean_patch: bool,
        columns: slice,
        config: ProbeConfig,
        generator: np.random.Generator,
        labels: Labels,
    ) -> None:
        self.heads = [Head(num_layers, mean_patch, rate) for rate in config.learning_rates]
        self.columns, self.num_classes = columns, len(labels.classes)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = len(self.heads) * self.num_classes, columns.stop - columns.start
        self.weight = torch.from_numpy(INITIAL_STD * generator.standard_normal(shape, np.float32)).to(device)
        self.bias = torch.zeros(shape[0], device=device)
        self._weight_momentum, self._bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        rates = torch.tensor(config.learning_rates, device=device)
        self._rates = rates.repeat_interleave(self.num_classes)  # [L C]

    def step(self, inputs: Tensor, one_hot: Tensor, scale: float) -> None:
        """Take one step of SGD with momentum, as torch.optim.SGD does, for all heads.

        Args:
            inputs: [B, all columns].
            one_hot: [B, 1, C].
            scale: of all learning rates.
        """
        inputs = inputs[:, self.columns]  # [B, D']
        logits = linear(inputs, self.weight, self.bias).unflatten(1, (-1, self.num_classes))  # [B, L, C]
        gradient = torch.softmax(logits, dim=2).sub_(one_hot).div_(len(inputs)).flatten(1)  # [B, L C]
        self._weight_momentum.addmm_(gradient.T, inputs, beta=MOMENTUM)
        self._bias_momentum.mul_(MOMENTUM).add_(gradient.sum(dim=0))
        self.weight.addcmul_(self._weight_momentum, self._rates[:, None], value=-scale)
        self.bias.addcmul_(self._bias_momentum, self._rates, value=-scale)

    def accuracies(
        self, features: ProbeFeatures, targets: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the accuracy of each head, [L]."""
        correct = torch.zeros(len(self.heads), dtype=torch.int64, device=self.weight.device)
        for some in _chunks(rows):
            inputs = features.take(some).to(self.weight.device)[:, self.columns]
            logits = _finite(linear(inputs, self.weight, self.bias)).unflatten(1, (-1, self.num_classes))
            truth = torch.from_numpy(targets[some]).to(self.weight.device)
            correct += (logits.argmax(dim=2) == truth[:, None]).sum(dim=0)
        return correct.cpu().numpy() / len(rows)

    def probe(self, number: int, validation_top1: float) -> Probe:
        """Return one head."""
        own = slice(number * self.num_classes, (number + 1) * self.num_classes)
        return Probe(
            self.heads[number], self.columns, self.weight[own].clone(), self.bias[own].clone(), validation_top1
        )


def _batches(
    rows: NDArray[np.int64], config: ProbeConfig, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each step: batches of a new order in each pass, whose incomplete last one is left out."""
    size = min(config.batch_size, len(rows))
    per_pass = len(rows) // size
    order = rows
    for number in range(config.num_steps):
        if number % per_pass == 0:
            order = generator.permutation(rows)
        yield order[number % per_pass * size :][:size]


def _train(
    groups: list[_HeadGroup],
    features: ProbeFeatures,
    targets: NDArray[np.int64],
    batches: Iterable[NDArray[np.int64]],
    config: ProbeConfig,
) -> None:
    device = groups[0].weight.device
    identity = torch.eye(groups[0].num_classes, device=device)
    for number, rows in enumerate(batches):
        inputs = features.take(rows).to(device)
        one_hot = identity[torch.from_numpy(targets[rows]).to(device)][:, None]  # [B, 1, C]
        scale = len(rows) / 256 * (1 + math.cos(math.pi * number / config.num_steps)) / 2
        for group in groups:
            group.step(inputs, one_hot, scale)


def _chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise DatasetError("linear probe: logits that are not finite; check the features for NaN and infinity")
    return logits
