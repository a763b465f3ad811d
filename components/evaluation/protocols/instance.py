"""Label-free retrieval of images by their augmented views."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from components.evaluation.features import Augmentation, EvaluationImages
from components.evaluation.protocol_input import ProtocolInput
from components.evaluation.scores import Scores

_CHUNK = 1024  # queries compared at once


def run(given: ProtocolInput) -> Scores:
    """Measure a model on images without classes: how well it finds an image by an augmented view of it."""
    images, config = given.evalset.images, given.settings.instance
    order = np.random.default_rng(given.seed).permutation(images.images.num_rows)
    rows = np.sort(order[: config.num_queries])
    views = EvaluationImages(images.take(rows), given.preprocessing, Augmentation(config, given.seed))
    queries = given.features_of(views, f"views {given.seed} {config.model_dump_json()}")
    ranks = retrieval_ranks(queries, given.tokens.features, rows)
    scores = Scores()
    scores.add("instance_map", 1 / ranks, rows)
    scores.add("instance_recall_at_1", (ranks == 1).astype(np.float64), rows)
    return scores


def retrieval_ranks(
    queries: NDArray[np.floating], gallery: NDArray[np.floating], targets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rank of each query's own image in the gallery by cosine similarity, 1 is first.

    Ties with the correct image rank before it, so that identical features score worst. With one correct image per
    query, average precision is 1 / rank.

    Args:
        queries: [Q, D] features of the views.
        gallery: [N, D] features of the images.
        targets: [Q] the row of each view's image in the gallery.

    Returns:
        [Q], between 1 and N.
    """
    views, images = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (queries, gallery))
    images = torch.nn.functional.normalize(images, dim=1)
    ranks = []
    for start in range(0, len(views), _CHUNK):
        part = torch.nn.functional.normalize(views[start : start + _CHUNK], dim=1)
        similarities = part @ images.T  # [q, N]
        own = similarities.gather(1, torch.from_numpy(targets[start : start + _CHUNK])[:, None])
        ranks.append((similarities >= own).sum(dim=1))
    return torch.cat(ranks).numpy()
