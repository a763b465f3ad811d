"""Linear heads on frozen patch tokens: the tokens, the training and the choice of the learning rate."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from components.core.errors import DatasetError
from components.core.progress import track
from components.evaluation.config import DenseHeadConfig
from components.training.schedules import CosineSchedule

log = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 35.0  # dinov3/eval/{segmentation,depth}/config.py

HeadT = TypeVar("HeadT", bound=nn.Module)


@dataclass(frozen=True)
class DenseFeatures:
    """Frozen patch tokens of N images.

    Attributes:
        tokens: [N, P, D] array or memory map of float32, float16 or (ml_dtypes) bfloat16; P = rows * columns, row by
            row. Of several layers, their tokens one after another on the last axis.
        rows: of the grid of patches.
        columns: of the grid of patches.
        images: [N] which images of a set they are of, ascending; None: all, in order.

    Raises:
        ValueError: the tokens do not fill the grid.
    """

    tokens: NDArray[Any]
    rows: int
    columns: int
    images: NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.tokens.shape[1] != self.rows * self.columns:
            raise ValueError(f"tokens {self.tokens.shape} are not [N, {self.rows} * {self.columns}, D]")

    @property
    def dim(self) -> int:
        """Width D of the tokens, of all layers together."""
        return self.tokens.shape[2]

    def batch(self, images: NDArray[np.integer], device: torch.device) -> Tensor:
        """Return the tokens of some images as [B, rows, columns, D] float32."""
        places = images if self.images is None else np.searchsorted(self.images, images)
        return to_device(self.tokens, places, device).unflatten(1, (self.rows, self.columns))


def to_device(values: NDArray[Any], rows: NDArray[np.integer], device: torch.device) -> Tensor:
    """Read some rows of an array or memory map, and return them as float32 on the device."""
    chosen = np.ascontiguousarray(values[rows])
    if chosen.dtype.name == "bfloat16":  # torch.from_numpy does not know the type of ml_dtypes
        return torch.from_numpy(chosen.view(np.int16)).view(torch.bfloat16).to(device).float()
    return torch.from_numpy(chosen).to(device).float()


def evaluation_device() -> torch.device:
    """Return the device of the heads: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DenseProblem(ABC, Generic[HeadT]):
    """What a head learns: its shape, its loss on a batch of images, and its score on images it has not seen."""

    device: torch.device

    @abstractmethod
    def head(self, generator: torch.Generator) -> HeadT:
        """Return an untrained head."""

    @abstractmethod
    def loss(self, head: HeadT, images: NDArray[np.int64]) -> Tensor:
        """Return the mean loss [] over the pixels that count of a batch of images."""

    @abstractmethod
    def validation_score(self, head: HeadT, images: NDArray[np.int64]) -> float:
        """Return a score of the images, higher is better."""


def fit_head(
    problem: DenseProblem[HeadT], train: NDArray[np.int64], config: DenseHeadConfig, seed: int, what: str
) -> HeadT:
    """Train a head on all train images, with the learning rate that is best on a random part of them.

    Equal seeds give bit-equal heads on the same CPU with the same number of threads.

    Args:
        problem: what is learned.
        train: [n] images.
        config: of the training.
        seed: of the initial weights, the batches and the validation part.
        what: is trained, for the progress display and messages.

    Raises:
        DatasetError: weights are not finite after the training.
    """
    learning_rate = _choose_learning_rate(problem, train, config, seed, what)
    log.info("%s: learning rate %g", what, learning_rate)
    return _train(problem, train, config, learning_rate, seed, what)


def _choose_learning_rate(
    problem: DenseProblem[HeadT], train: NDArray[np.int64], config: DenseHeadConfig, seed: int, what: str
) -> float:
    grid = sorted(config.learning_rates)
    if len(grid) == 1:
        return grid[0]
    if len(train) < 2:
        log.warning("%s: one train image, so none to hold out: the learning rate is the middle of its grid", what)
        return grid[len(grid) // 2]
    order = np.random.default_rng(seed).permutation(train)
    validation, fitted = np.split(order, [max(1, round(len(train) * config.validation_fraction))])
    scores = []
    for learning_rate in grid:
        head = _train(problem, fitted, config, learning_rate, seed, f"{what}, learning rate {learning_rate:g}")
        scores.append(problem.validation_score(head, np.sort(validation)))
    return grid[int(np.argmax(scores))]  # the lowest among equals


def _train(
    problem: DenseProblem[HeadT],
    train: NDArray[np.int64],
    config: DenseHeadConfig,
    learning_rate: float,
    seed: int,
    what: str,
) -> HeadT:
    head = problem.head(torch.Generator().manual_seed(seed)).to(problem.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay)
    schedule = CosineSchedule(learning_rate, 0.0, config.steps, config.warmup_steps)
    batches = _batches(train, config.batch_size, np.random.default_rng(seed))
    for step in track(range(config.steps), what, config.steps, "steps"):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        loss = problem.loss(head.train(), next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
    if not all(torch.isfinite(value).all() for value in head.state_dict().values()):  # they stay so once they are
        raise DatasetError(
            f"{what}: weights are not finite at learning rate {learning_rate:g}; give lower learning_rates, or see "
            "whether the tokens are finite"
        )
    return head.eval()


def _batches(train: NDArray[np.int64], size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield batches of equal size without end; each pass over the images is in a new order, less a last part batch."""
    size = min(size, len(train))
    while True:
        order = generator.permutation(train)
        for start in range(0, len(order) - size + 1, size):
            yield np.sort(order[start : start + size])  # sorted, for memory maps


def in_batches(images: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the images in order, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def linear_layer(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with the initial weights of mmseg's heads: standard deviation 0.01, bias zero."""
    # Its own initialization would draw from the global generator.
    layer = cast("nn.Linear", nn.utils.skip_init(nn.Linear, inputs, outputs))
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def upsample(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, as `F.interpolate` does.

    By two matrix products, whose gradient is the same at each run on a GPU too, unlike that of `F.interpolate`. Give it
    one image at a time in a training on a CPU: what its caches hold takes half the time of a step.

    Args:
        values: [B, C, h, w].
        size: H and W.

    Returns:
        [B, C, H, W].
    """
    down, across = (
        F.interpolate(torch.eye(length, device=values.device)[None], wanted, mode="linear")[0]
        for length, wanted in zip(values.shape[2:], size, strict=True)
    )  # [h, H] and [w, W]
    return down.T @ (values @ across)
