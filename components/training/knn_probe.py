"""kNN accuracy of the EMA on a small labeled set during training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.core.knn import knn_predictions, nearest
from components.core.metrics import top1_accuracy
from components.data.evaluation_set import EvaluationSet, Labels, read_evaluation_set
from components.data.manifest import snapshot_manifests
from components.data.shards import ShardReader, decode_image
from components.model.config import Preprocessing
from components.model.preprocessing import center_crops, to_input
from components.training.config import KnnProbeConfig
from components.training.networks import Network

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07  # of the votes (dinov2/eval/knn.py)
TEST_SHARE = 5  # one image of the probe in five is a test image
CHUNK = 64  # images at once


class KnnProbe:
    """Labeled images in memory, cropped as in the evaluation; they are not trained on."""

    def __init__(self, images: Tensor, labels: Labels, num_neighbors: int, bfloat16: bool) -> None:
        """Take images [N, 3, S, S] uint8; train and test of `labels` are indices into them."""
        self._images, self._labels, self._bfloat16 = images, labels, bfloat16
        self._neighbors = min(num_neighbors, len(labels.train))

    def top1(self, network: Network) -> float:
        """Return the accuracy in [0, 1]; every rank must call, since weights may be sharded."""
        device = next(network.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            parts = [network.class_tokens(to_input(part.to(device))) for part in self._images.split(CHUNK)]
        features = torch.cat([part.float().cpu() for part in parts]).numpy()  # [N, D]
        labels = self._labels
        found = nearest(features[labels.test], features[labels.train], self._neighbors)
        votes = labels.targets[labels.train][found.indices]
        predictions = knn_predictions(found.similarities, votes, [self._neighbors], TEMPERATURE)
        return top1_accuracy(predictions[self._neighbors], labels.targets[labels.test])


def load_probe(folder: Path, config: KnnProbeConfig, crop_size: int, *, bfloat16: bool) -> KnnProbe | None:
    """Return a probe of at most `num_images` labeled images of `folder`; warn and return None if it has none.

    Args:
        folder: data/evaluation.
        config: numbers of images and neighbors.
        crop_size: pixels.
        bfloat16: whether the network runs in bfloat16.
    """
    found = read_evaluation_set(folder) if snapshot_manifests(folder) else None
    if found is None or found.labels is None:
        logger.warning("%s holds no labeled images: no kNN while training (monitor.knn)", folder)
        return None
    # Images are sorted by SHA-256, so the first ones are a random but fixed sample.
    test = found.labels.test[: max(config.num_images // TEST_SHARE, 1)]
    train = found.labels.train[: config.num_images - len(test)]
    rows = np.concatenate([train, test])
    places = np.arange(len(rows))
    labels = Labels(found.labels.classes, found.labels.targets[rows], places[: len(train)], places[len(train) :])
    return KnnProbe(_read(found, rows, crop_size), labels, config.num_neighbors, bfloat16)


def _read(images: EvaluationSet, rows: NDArray[np.int64], crop_size: int) -> Tensor:
    reader = ShardReader(images.root)
    columns = (images.images[name].take(rows).to_pylist() for name in ("shard", "offset", "length"))
    decoded = (decode_image(reader.read(*place)) for place in zip(*columns, strict=True))
    crops = center_crops(decoded, Preprocessing().at(crop_size))  # [N, S, S, 3]
    return torch.from_numpy(crops.transpose(0, 3, 1, 2).copy())
