"""Linear segmentation of frozen patch tokens (arXiv:2304.07193, sec. 7.4): `lin.`, and `+ms` over several scales.

BatchNorm and a linear layer on the patch tokens; its low-resolution logits are upsampled to the mask. For `lin.` the
tokens are the last layer's; for `+ms` those of the last four layers together, and class probabilities are averaged over
images of several sizes. The recipe of the training is dinov3's, without its augmentation: features are computed once.
Sizes of `+ms` are the smaller three of DINOv2's five, each of whole images: it slides a window over those of 2.28 and 3
times the size, and adds mirrored images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from components.core.errors import DatasetError
from components.data.evalset import IGNORED
from components.evaluation.config import SegmentationConfig
from components.evaluation.dense import (
    DenseFeatures,
    DenseProblem,
    evaluation_device,
    fit_head,
    in_batches,
    linear_layer,
    upsample,
)
from components.evaluation.protocol_input import ProtocolInput, crop_target, keep_targets
from components.evaluation.scores import Ratios, Scores
from components.model.config import LAST_LAYERS

log = logging.getLogger(__name__)

SCALES = (1.0, 1.32, 1.73)  # `img_ratios` of DINOv2's released configurations of +ms, also 2.28 and 3


@dataclass(frozen=True)
class SegmentationTask:
    """Images with a mask each; `segmentation_task` makes it, and checks every mask.

    Attributes:
        read_mask: returns the mask [H, W] uint8 of an image: class indices. It is called at every step of the training,
            so that masks need not be in memory together; the array is not changed.
        train: [n] images.
        test: [T] images.
        classes: names, in the order of the indices.
        ignored: value, 0 to 255, of pixels that do not count; None if all count.
        size: height and width of every mask.
    """

    read_mask: Callable[[int], NDArray[np.uint8]]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    classes: Sequence[str]
    ignored: int | None
    size: tuple[int, int]

    def masks(self, images: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the masks of some images as [B, H, W] int64, -1 where a pixel does not count."""
        masks = torch.from_numpy(np.stack([self.read_mask(int(image)) for image in images])).to(device).long()
        return masks if self.ignored is None else masks.masked_fill_(masks == self.ignored, -1)


def segmentation_task(
    read_mask: Callable[[int], NDArray[np.uint8]],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    classes: Sequence[str],
    ignored: int | None,
) -> SegmentationTask:
    """Check all masks, and warn of images that are left out and of classes that cannot be learned.

    Args:
        read_mask: as in `SegmentationTask`.
        train: images of train; those with ignored pixels only are left out.
        test: images of test.
        classes: names, in the order of the indices.
        ignored: value, 0 to 255, of pixels that do not count; None if all count.

    Raises:
        DatasetError: an empty split, masks of several sizes, a value that is no class, or a test mask without any
            pixel that counts.
    """
    if len(train) == 0 or len(test) == 0:
        raise DatasetError(f"segmentation: {len(train)} train and {len(test)} test images; give at least one of each")
    size = np.asarray(read_mask(int(train[0]))).shape
    counts = {
        split: np.stack([_pixels_by_class(read_mask(int(image)), int(image), size, classes, ignored) for image in rows])
        for split, rows in (("train", train), ("test", test))
    }  # [images, C] each
    usable = counts["train"].any(axis=1)
    for image in test[~counts["test"].any(axis=1)][:1]:
        raise DatasetError(f"mask of test image {image}: all pixels are {ignored}, ignored; leave the image out")
    if not usable.any():
        raise DatasetError(f"masks of all {len(train)} train images: all pixels are {ignored}, ignored; label some")
    if not usable.all():
        log.warning("%d train images (such as %d) left out: ignored pixels only", (~usable).sum(), train[~usable][0])
    unseen = np.flatnonzero(counts["test"].any(axis=0) & ~counts["train"].any(axis=0))
    if len(unseen):
        log.warning("%d classes of test masks (such as %s) are in no train mask", len(unseen), classes[unseen[0]])
    return SegmentationTask(read_mask, train[usable], test, classes, ignored, (size[0], size[1]))


def _pixels_by_class(
    mask: NDArray[Any], image: int, size: tuple[int, ...], classes: Sequence[str], ignored: int | None
) -> NDArray[np.int64]:
    """Return the pixels of each class in a mask, [C].

    Raises:
        DatasetError: the mask is not a uint8 array of this size, or a value is no class.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.shape != size:
        raise DatasetError(
            f"mask of image {image} is {mask.dtype} {mask.shape}; masks are uint8 [H, W] of one size, here {size}"
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    if ignored is not None:
        counts[ignored] = 0
    for value in np.flatnonzero(counts[len(classes) :])[:1] + len(classes):
        raise DatasetError(
            f"mask of image {image} has value {value}; classes are 0 to {len(classes) - 1}, and "
            + ("no value is ignored" if ignored is None else f"{ignored} is ignored")
        )
    return counts[: len(classes)]


class SegmentationHead(nn.Module):
    """BatchNorm and a linear layer on each patch token."""

    def __init__(self, dim: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = linear_layer(dim, num_classes, generator)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Return logits [B, C, H, W] of tokens [B, rows, columns, D], upsampled bilinearly to `size`."""
        return upsample(self.coarse(tokens), size)

    def coarse(self, tokens: Tensor) -> Tensor:
        """Return logits [B, C, rows, columns] of tokens [B, rows, columns, D]."""
        normalized = self.norm(tokens.flatten(0, 2)).view_as(tokens)
        return self.linear(normalized).permute(0, 3, 1, 2)


class _Problem(DenseProblem[SegmentationHead]):
    def __init__(self, scales: Sequence[DenseFeatures], task: SegmentationTask, batch_size: int) -> None:
        self.scales, self.task, self.batch_size, self.device = scales, task, batch_size, evaluation_device()

    def head(self, generator: torch.Generator) -> SegmentationHead:
        return SegmentationHead(self.scales[0].dim, len(self.task.classes), generator)

    def loss(self, head: SegmentationHead, images: NDArray[np.int64]) -> Tensor:
        coarse = head.coarse(self.scales[0].batch(images, self.device))  # [B, C, rows, columns]
        masks = self.task.masks(images, self.device)
        losses = [
            F.cross_entropy(upsample(logits, self.task.size), mask, ignore_index=-1, reduction="sum")
            for logits, mask in zip(coarse.split(1), masks.split(1), strict=True)
        ]
        return torch.stack(losses).sum() / (masks >= 0).sum()

    def validation_score(self, head: SegmentationHead, images: NDArray[np.int64]) -> float:
        matrices = confusion_matrices(head, self.scales[:1], self.task, images, self.batch_size)
        return float(np.nanmean(class_iou(reduce(np.add, matrices))))


def run(given: ProtocolInput) -> Scores:
    """Measure a model on a segmentation set by the last layer (`lin.`), at one size."""
    return evaluate([given.dense(1)], _task(given), given.settings.segmentation, given.seed, "segmentation")


def run_four_layers(given: ProtocolInput) -> Scores:
    """Measure a model on a segmentation set by the last four layers, at one size: `+ms` without its other sizes."""
    features, prefix = [given.dense(LAST_LAYERS)], "segmentation_lin4"
    return evaluate(features, _task(given), given.settings.segmentation, given.seed, prefix)


def run_multi_scale(given: ProtocolInput) -> Scores:
    """Measure a model on a segmentation set by the last four layers, at several sizes of the test images (`+ms`)."""
    features, prefix = [given.dense(LAST_LAYERS, scale) for scale in SCALES], "segmentation_ms"
    scores = evaluate(features, _task(given), given.settings.segmentation, given.seed, prefix)
    sizes = ", ".join(str(given.scaled(scale).crop_size) for scale in SCALES)
    scores.notes["segmentation_ms_sizes"] = f"{sizes} pixels"
    return scores


def _task(given: ProtocolInput) -> SegmentationTask:
    """Return the masks of a set as class indices, in the place of the images' crops."""
    evalset = given.evalset

    def read_mask(image: int) -> NDArray[np.uint8]:
        return crop_target(evalset.mask(image), given.preprocessing)

    ignored = None if evalset.config.ignore is None else IGNORED
    read = keep_targets(read_mask, given.preprocessing.crop_size)
    return segmentation_task(read, evalset.train, evalset.test, evalset.class_names, ignored)


def evaluate(
    scales: Sequence[DenseFeatures], task: SegmentationTask, config: SegmentationConfig, seed: int, prefix: str
) -> Scores:
    """Train a head on train and measure it on test.

    Args:
        scales: features of all images, of one layer and size for `lin.`; for `+ms` of four layers, at each test scale.
            The head is trained on the first scale, and its learning rate chosen on it.
        task: masks, splits and classes.
        config: of the training.
        seed: of the training.
        prefix: of the metrics' names: "segmentation" for `lin.`, "segmentation_ms" for `+ms`.

    Returns:
        What `measure` returns, and the head's masks in `predict`.

    Raises:
        DatasetError: tokens that lead to weights that are not finite.
    """
    head = fit(scales, task, config, seed, prefix)
    scores = measure(head, scales, task, config.batch_size, prefix)
    scores.predict[prefix] = partial(predict, head, scales, size=task.size)
    return scores


def fit(
    scales: Sequence[DenseFeatures], task: SegmentationTask, config: SegmentationConfig, seed: int, what: str
) -> SegmentationHead:
    """Train a head as `evaluate` does; `what` is the name of the work in progress and messages."""
    return fit_head(_Problem(scales, task, config.batch_size), task.train, config, seed, what)


def measure(
    head: SegmentationHead, scales: Sequence[DenseFeatures], task: SegmentationTask, batch_size: int, prefix: str
) -> Scores:
    """Measure a head on test.

    Returns:
        With `prefix` before each name: `_miou`, the mean over classes of the intersection over union of all test pixels
        (classes in no test mask and no prediction are left out); `_iou.<class>`; `_accuracy`, the share of correct
        pixels of all; and with values per image, so that models can be compared: `_image_miou`, over the classes in the
        image's mask, and `_image_accuracy`. `ratios` has the pixels of each image that `_iou` is made of.
    """
    total = np.zeros((len(task.classes), len(task.classes)), np.int64)
    mious, accuracies, counts = [], [], []
    for matrix in confusion_matrices(head, scales, task, task.test, batch_size):
        total += matrix
        mious.append(class_iou(matrix)[matrix.any(axis=1)].mean())
        accuracies.append(matrix.trace() / matrix.sum())
        counts.append((matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)))
    iou = class_iou(total)
    absent = [name for name, value in zip(task.classes, iou, strict=True) if np.isnan(value)]
    if absent:
        log.warning("%s: %d classes (such as %s) are in no test mask and no prediction", prefix, len(absent), absent[0])
    accuracy = float(total.trace() / total.sum())
    scores = Scores({f"{prefix}_miou": float(np.nanmean(iou)), f"{prefix}_accuracy": accuracy})
    scores.add(f"{prefix}_image_miou", np.array(mious))
    scores.add(f"{prefix}_image_accuracy", np.array(accuracies))
    scores.metrics |= {
        f"{prefix}_iou.{name}": float(value)
        for name, value in zip(task.classes, iou, strict=True)
        if not np.isnan(value)
    }
    scores.ratios[f"{prefix}_iou of each class"] = _iou_ratios(np.array(counts), task.classes)
    return scores


def _iou_ratios(counts: NDArray[np.int64], classes: Sequence[str]) -> Ratios:
    """Return intersections and unions of each image, of the classes that are in a mask or a prediction.

    Args:
        counts: [T, 3, C] correct pixels, pixels of the mask, and pixels of the prediction.
        classes: [C] names.
    """
    hits, true, predicted = counts.swapaxes(0, 1)  # [T, C] each
    unions = true + predicted - hits
    there = np.flatnonzero(unions.any(axis=0)).tolist()
    names = [classes[number] for number in there]
    return Ratios(names, (true[:, there] > 0).sum(axis=0), hits[:, there], unions[:, there])


def predict(
    head: SegmentationHead, scales: Sequence[DenseFeatures], images: NDArray[np.int64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return the predicted masks of some images, [B, H, W], for pictures."""
    return _classes(head, scales, images, size).cpu().numpy().astype(np.uint8)


@torch.inference_mode()
def _classes(
    head: SegmentationHead, scales: Sequence[DenseFeatures], images: NDArray[np.int64], size: tuple[int, int]
) -> Tensor:
    """Return the most probable class of each pixel, [B, H, W], by the mean probability over the scales."""
    device = head.linear.weight.device
    logits = (head.eval()(features.batch(images, device), size) for features in scales)  # [B, C, H, W] each
    return reduce(torch.add, (each.softmax(dim=1) for each in logits)).max(dim=1).indices  # a sixth of argmax's time


def confusion_matrices(
    head: SegmentationHead,
    scales: Sequence[DenseFeatures],
    task: SegmentationTask,
    images: NDArray[np.int64],
    batch_size: int,
) -> Iterator[NDArray[np.int64]]:
    """Yield the pixels of each class that are predicted as each class, [C, C], of one image after another."""
    count = len(task.classes)
    for batch in in_batches(images, batch_size):
        predicted = _classes(head, scales, batch, task.size)  # [B, H, W]
        for truth, found in zip(task.masks(batch, predicted.device), predicted, strict=True):
            pairs = (truth * count + found)[truth >= 0]
            yield torch.bincount(pairs, minlength=count**2).reshape(count, count).cpu().numpy()


def class_iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the intersection over union of each class, [C]; NaN for classes in no mask and no prediction.

    Args:
        confusion: [C, C] pixels by true class and predicted class.
    """
    hits = confusion.diagonal()
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
