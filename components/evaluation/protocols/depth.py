"""Linear depth from frozen tokens (arXiv:2304.07193, sec. 7.4; dinov2/eval/depth): `lin. 1` and `lin. 4`.

The class token is concatenated to every patch token; a linear layer gives weights of depth bins, and their mean is the
depth. `lin. 1` takes the last layer, `lin. 4` four layers. Without the optional gradient loss and without augmentation:
features are computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.core.errors import DatasetError
from components.evaluation.config import DepthConfig
from components.evaluation.dense import (
    DenseFeatures,
    DenseProblem,
    evaluation_device,
    fit_head,
    in_batches,
    linear_layer,
    to_device,
    upsample,
)
from components.evaluation.protocol_input import ProtocolInput, crop_target, keep_targets
from components.evaluation.scores import Scores
from components.model.config import LAST_LAYERS

log = logging.getLogger(__name__)

UPSAMPLING = 4  # of the tokens; `upsample` of the paper's heads (dinov2/hub/depthers.py)
BIN_WEIGHT = 0.1  # added to every bin's weight: `eps` of dinov2/eval/depth/models/decode_heads/decode_head.py
LOG_OFFSET = 1e-3  # `eps` of dinov2/eval/depth/models/losses/sigloss.py
METRICS = ("rmse", "abs_rel", "delta1")


@dataclass(frozen=True)
class DepthTask:
    """Images with a depth map each; `depth_task` makes it, and checks every map.

    Attributes:
        read_depth: returns the depth [H, W] of an image, floating; pixels that are not finite or out of range, such
            as 0 where nothing was measured, do not count.
        train: [n] images.
        test: [T] images.
        min_depth: nearest depth that counts, more than 0; 0.001 m for NYU and KITTI.
        max_depth: farthest depth that counts; 10 m for NYU, 80 m for KITTI.
        size: height and width of every map.
    """

    read_depth: Callable[[int], NDArray[np.floating]]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    min_depth: float
    max_depth: float
    size: tuple[int, int]

    def depths(self, images: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the depth maps of some images as [B, H, W] float32, NaN where a pixel does not count."""
        depths = np.stack([self.read_depth(int(image)) for image in images])
        depths = np.where(_counts(depths, self.min_depth, self.max_depth), depths, np.nan)
        return torch.from_numpy(depths.astype(np.float32)).to(device)


def depth_task(
    read_depth: Callable[[int], NDArray[np.floating]],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    min_depth: float,
    max_depth: float,
) -> DepthTask:
    """Check all depth maps, and warn of pixels and images that are left out.

    Args:
        read_depth: as in `DepthTask`.
        train: images of train; those with fewer than two pixels that count are left out.
        test: images of test.
        min_depth: nearest depth that counts, more than 0.
        max_depth: farthest depth that counts.

    Raises:
        DatasetError: an empty split, a range without length, maps of several sizes, or a test map without any pixel
            that counts.
    """
    if len(train) == 0 or len(test) == 0:
        raise DatasetError(f"depth: {len(train)} train and {len(test)} test images; give at least one of each")
    if not 0 < min_depth < max_depth < np.inf:
        raise DatasetError(f"depth: range {min_depth:g} to {max_depth:g}; give 0 < min < max")
    size = np.asarray(read_depth(int(train[0]))).shape

    def counted(images: NDArray[np.int64]) -> NDArray[np.int64]:
        maps = ((_checked(read_depth(int(image)), int(image), size)) for image in images)
        return np.array([np.count_nonzero(_counts(depth, min_depth, max_depth)) for depth in maps])

    of_train, of_test = counted(train), counted(test)
    for image in test[of_test == 0][:1]:
        raise DatasetError(
            f"depth of test image {image}: no pixel within {min_depth:g} to {max_depth:g}; leave the image out, or "
            "change the range"
        )
    usable = of_train >= 2  # the loss has a variance
    if not usable.any():
        raise DatasetError(f"depth of all {len(train)} train images: no pixels within {min_depth:g} to {max_depth:g}")
    if not usable.all():
        log.warning("%d train images (such as %d) left out: no depth in range", (~usable).sum(), train[~usable][0])
    pixels, total = int(of_train.sum() + of_test.sum()), (len(train) + len(test)) * size[0] * size[1]
    if pixels < total:
        text = "%d of %d pixels of depth left out: not finite or not within %g to %g"
        log.warning(text, total - pixels, total, min_depth, max_depth)
    return DepthTask(read_depth, train[usable], test, min_depth, max_depth, (size[0], size[1]))


def _counts(depth: NDArray[np.floating], low: float, high: float) -> NDArray[np.bool_]:
    return (depth >= low) & (depth <= high)  # false for NaN


def _checked(depth: NDArray[Any], image: int, size: tuple[int, ...]) -> NDArray[np.floating]:
    if depth.dtype.kind != "f" or depth.ndim != 2 or depth.shape != size:
        raise DatasetError(
            f"depth of image {image} is {depth.dtype} {depth.shape}; maps are floating [H, W] of one size, here {size}"
        )
    return depth


@dataclass(frozen=True)
class DepthFeatures:
    """Patch tokens and class tokens of N images.

    Attributes:
        patches: of D dimensions; of several layers, their tokens one after another.
        cls_tokens: [N, E] of the same layers in the same order; E = D in transformers.

    Raises:
        ValueError: class tokens and patch tokens are of different images.
    """

    patches: DenseFeatures
    cls_tokens: NDArray[Any]

    def __post_init__(self) -> None:
        if self.cls_tokens.ndim != 2 or len(self.cls_tokens) != len(self.patches.tokens):
            raise ValueError(f"class tokens {self.cls_tokens.shape}, patch tokens {self.patches.tokens.shape}")

    @property
    def dim(self) -> int:
        """Width D + E of what the head reads."""
        return self.patches.dim + self.cls_tokens.shape[1]

    def batch(self, images: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return [B, rows, columns, D + E]: each patch token, followed by its image's class token."""
        patches = self.patches.batch(images, device)
        cls_tokens = to_device(self.cls_tokens, images, device)[:, None, None]
        return torch.cat([patches, cls_tokens.expand(*patches.shape[:-1], -1)], dim=-1)


class DepthHead(nn.Module):
    """A linear layer that gives the weights of uniform depth bins."""

    bins: Tensor  # [bins]

    def __init__(self, dim: int, bins: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear_layer(dim, len(bins), generator)
        self.register_buffer("bins", bins)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Return depths [B, H, W] of tokens [B, rows, columns, D]."""
        # The paper's head upsamples the tokens. The order does not matter, for both are linear and bilinear weights
        # sum to 1, and the layer is 16 times cheaper on the tokens themselves.
        logits = self.linear(tokens).permute(0, 3, 1, 2)  # [B, bins, rows, columns]
        between = (UPSAMPLING * tokens.shape[1], UPSAMPLING * tokens.shape[2])
        depths = torch.cat([expected_depth(upsample(one, between), self.bins) for one in logits.split(1)])
        return upsample(depths, size)[:, 0]


def expected_depth(logits: Tensor, bins: Tensor) -> Tensor:
    """Return the mean of the bins, each with the weight relu(logit) + 0.1 (the "linear" normalization of AdaBins).

    Args:
        logits: [B, bins, h, w]; overwritten, for it is the largest tensor of the training.
        bins: [bins] their depths.

    Returns:
        [B, 1, h, w], in the range of the bins.
    """
    # Sums of depths and of weights in one product, which reads that tensor once.
    sums = torch.stack([bins, torch.ones_like(bins)]) @ logits.relu_().flatten(2)  # [B, 2, h * w]
    depths = (sums[:, :1] + BIN_WEIGHT * bins.sum()) / (sums[:, 1:] + BIN_WEIGHT * len(bins))
    return depths.unflatten(2, logits.shape[2:])


def sig_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant loss of depths: sqrt(Var(g) + 0.15 * mean(g)^2), g = log(predicted + 1e-3) - log(truth + 1e-3).

    dinov2/eval/depth/models/losses/sigloss.py, after Eigen et al. (2014) and AdaBins; with the unbiased variance.

    Args:
        predicted: [n] depths, n >= 2.
        truth: [n] depths.

    Returns:
        [].
    """
    difference = (predicted + LOG_OFFSET).log() - (truth + LOG_OFFSET).log()
    return (difference.var() + 0.15 * difference.mean() ** 2).sqrt()


class _Problem(DenseProblem[DepthHead]):
    def __init__(self, features: DepthFeatures, task: DepthTask, config: DepthConfig) -> None:
        self.features, self.task, self.config, self.device = features, task, config, evaluation_device()

    def head(self, generator: torch.Generator) -> DepthHead:
        bins = torch.linspace(self.task.min_depth, self.task.max_depth, self.config.num_bins)
        return DepthHead(self.features.dim, bins, generator)

    def loss(self, head: DepthHead, images: NDArray[np.int64]) -> Tensor:
        truth = self.task.depths(images, self.device)
        predicted = head(self.features.batch(images, self.device), self.task.size)
        known = ~truth.isnan()
        return sig_loss(predicted[known], truth[known])

    def validation_score(self, head: DepthHead, images: NDArray[np.int64]) -> float:
        errors = [found["rmse"] for found in image_errors(head, self.features, self.task, images, self.config)]
        return -float(np.mean(errors))


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a depth set by the last layer (`lin. 1`)."""
    return _run(given, 1, "depth")


def run_four_layers(given: ProtocolInput) -> Scores:
    """Measure a model on a depth set by the last four layers (`lin. 4`, whose layers are spread over the network)."""
    return _run(given, LAST_LAYERS, "depth_lin4")


def _run(given: ProtocolInput, layers: int, prefix: str) -> Scores:
    evalset = given.evalset
    assert evalset.config.depth_range is not None

    def read_depth(image: int) -> NDArray[np.float32]:
        return crop_target(evalset.depth(image), given.preprocessing)

    patches = given.dense(layers)
    cls_tokens = given.tokens.cls[:, -layers:].reshape(len(patches.tokens), -1)  # [N, L * D]
    read = keep_targets(read_depth, given.preprocessing.crop_size)
    task = depth_task(read, evalset.train, evalset.test, *evalset.config.depth_range)
    return evaluate(DepthFeatures(patches, cls_tokens), task, given.settings.depth, given.seed, prefix)


def evaluate(features: DepthFeatures, task: DepthTask, config: DepthConfig, seed: int, prefix: str) -> Scores:
    """Train a head on train and measure it on test.

    Args:
        features: of all images: of the last layer for `lin. 1`, of four layers for `lin. 4`.
        task: depth maps, splits and range.
        config: of the training.
        seed: of the training.
        prefix: of the metrics' names: "depth" for `lin. 1`, "depth_lin4" for `lin. 4`.

    Returns:
        What `measure` returns, and the head's depths in `predict`.

    Raises:
        DatasetError: tokens that lead to weights that are not finite.
    """
    head = fit(features, task, config, seed, prefix)
    scores = measure(head, features, task, config, prefix)
    scores.predict[prefix] = partial(predict, head, features, size=task.size)
    return scores


def fit(features: DepthFeatures, task: DepthTask, config: DepthConfig, seed: int, what: str) -> DepthHead:
    """Train a head as `evaluate` does; `what` is the name of the work in progress and messages."""
    return fit_head(_Problem(features, task, config), task.train, config, seed, what)


def measure(head: DepthHead, features: DepthFeatures, task: DepthTask, config: DepthConfig, prefix: str) -> Scores:
    """Measure a head on test.

    Returns:
        With `prefix` before each name: `_rmse`, root mean squared error in the unit of the maps, and `_abs_rel`, mean
        of |predicted - truth| / truth, lower is better; `_delta1`, share of pixels with a ratio below 1.25 either way.
        Each is computed over the pixels of an image that count, and the metric is the mean over images, as in dinov2
        and dinov3, so that it is not the RMSE of all pixels together.
    """
    found = list(image_errors(head, features, task, task.test, config))
    scores = Scores()
    for metric in METRICS:
        scores.add(f"{prefix}_{metric}", np.array([errors[metric] for errors in found]))
    return scores


@torch.inference_mode()
def predict(
    head: DepthHead, features: DepthFeatures, images: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the predicted depths of some images, [B, H, W], for pictures."""
    return head.eval()(features.batch(images, head.linear.weight.device), size).cpu().numpy()


def image_errors(
    head: DepthHead, features: DepthFeatures, task: DepthTask, images: NDArray[np.int64], config: DepthConfig
) -> Iterator[dict[str, float]]:
    """Yield the metrics of one image after another."""
    for batch in in_batches(images, config.batch_size):
        truths = task.depths(batch, torch.device("cpu")).numpy()
        for truth, predicted in zip(truths, predict(head, features, batch, task.size), strict=True):
            known = ~np.isnan(truth)
            yield depth_errors(predicted[known], truth[known])


def depth_errors(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> dict[str, float]:
    """Return `rmse`, `abs_rel` and `delta1` of some pixels (Eigen et al. 2014), in float64.

    Args:
        predicted: [n] depths, more than 0.
        truth: [n] depths, more than 0.
    """
    ours, true = predicted.astype(np.float64), truth.astype(np.float64)
    return {
        "rmse": float(np.sqrt(((ours - true) ** 2).mean())),
        "abs_rel": float((np.abs(ours - true) / true).mean()),
        "delta1": float((np.maximum(ours / true, true / ours) < 1.25).mean()),
    }
