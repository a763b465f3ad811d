"""The evaluation set: images, with classes and splits if it has labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from components.core.config import load_yaml
from components.core.errors import DatasetError
from components.core.text import one_line
from components.data.evalset_config import EVALSET
from components.data.manifest import read_collection

log = logging.getLogger(__name__)
pc: Any = pyarrow.compute  # created at import, invisible to pyright

TEST_SHARE = 5  # without given splits, one in five labeled images is a test image


@dataclass(frozen=True)
class Labels:
    """Classes of the labeled images, as indices into the evaluation set's images."""

    classes: tuple[str, ...]
    targets: NDArray[np.int64]  # [N] class of each image; -1 for none
    train: NDArray[np.int64]  # indices of train images
    test: NDArray[np.int64]  # indices of test images whose class is in train
    predictable: NDArray[np.int64] | None = None  # classes that test images can be taken for; None: all

    @property
    def gallery(self) -> NDArray[np.int64]:
        """Indices of the train images that can be neighbors: those of predictable classes."""
        if self.predictable is None:
            return self.train
        return self.train[np.isin(self.targets[self.train], self.predictable)]


@dataclass(frozen=True)
class EvaluationSet:
    """Distinct images sorted by id; `labels` is None if classification cannot be measured."""

    root: Path  # base folder of the shard paths
    images: pa.Table
    labels: Labels | None

    def take(self, indices: NDArray[np.int64]) -> EvaluationSet:
        """Return a subset of the images, without labels."""
        return EvaluationSet(self.root, self.images.take(pa.array(indices)), None)


def read_evaluation_set(root: Path) -> EvaluationSet:
    """Read all of `root` as one set: a snapshot, or the classes of all sets in data/evaluation.

    Raises:
        DatasetError: no images, or labels with a train split and no test image.
    """
    return labeled_set(root, _of_classes(root, read_collection(root)))


def labeled_set(root: Path, table: pa.Table) -> EvaluationSet:
    """Make an evaluation set of classes of the rows of manifests.

    Args:
        root: base folder of the shard paths.
        table: rows, of which those of an equal `image_id` are one image.

    Raises:
        DatasetError: as for `read_evaluation_set`.
    """
    if table.num_rows == 0:
        raise DatasetError(f"{root}: no evaluation images; ingest an evaluation set, or `dvc pull` it")
    _, first = np.unique(table["image_id"].to_numpy(zero_copy_only=False), return_index=True)
    table = table.take(pa.array(first))
    names = _labels(table)
    if not (names != "").any():
        log.warning("%s has no labels: measuring retrieval of augmented views and effective rank instead", root)
        return EvaluationSet(root, table, None)
    _warn_of_mixture(root, table, names != "")
    return EvaluationSet(root, table, labels_of(root, table))


def _of_classes(root: Path, table: pa.Table) -> pa.Table:
    """Leave out sets of other tasks or without train images."""
    for path in sorted(root.glob(f"*/*/{EVALSET}")):
        config, shards = load_yaml(path), f"{path.parent.relative_to(root).as_posix()}/"
        task, train_set = config.get("task"), config.get("train_set")
        if task != "classification" or train_set:
            others = pc.starts_with(table["shard"], shards)
            count, name = pc.sum(others).as_py() or 0, path.parent.parent.name
            what = f"heads of {train_set}" if train_set else task
            log.info("%s: %d images for %s are not in the measures of classes", name, count, what)
            table = table.filter(pc.invert(others))
    return table


def _warn_of_mixture(root: Path, table: pa.Table, labeled: NDArray[np.bool_]) -> None:
    """Warn that several sets in `root` are evaluated as one, and that unlabeled images are not classified."""
    sources = table["source"].to_numpy(zero_copy_only=False)
    sets, bare = np.unique(sources[labeled]), np.unique(sources[~labeled])
    if len(sets) > 1:
        log.warning("%s: %s are measured as one set; classes of the same name are one class", root, ", ".join(sets))
    if len(bare):
        count = (~labeled).sum()
        log.warning("%s: %d images without label (%s) are not in the measures of classes", root, count, ", ".join(bare))


def _labels(table: pa.Table) -> NDArray[np.str_]:
    return np.array([name or "" for name in table["label"].to_pylist()])


def labels_of(root: Path, table: pa.Table) -> Labels | None:
    """Return the classes and splits of labeled images; None, with a warning, if they cannot measure classes.

    Args:
        root: of the set, for messages.
        table: of the images, with their label and split.

    Raises:
        DatasetError: a train split and no test image.
    """
    names = _labels(table)
    classes, inverse = np.unique(names[names != ""], return_inverse=True)
    targets = np.full(len(names), -1)
    targets[names != ""] = inverse
    splits = _splits(root, table, targets >= 0)
    train = np.flatnonzero((splits == "train") & (targets >= 0))
    test = np.flatnonzero((splits == "test") & (targets >= 0))
    known = np.isin(targets[test], targets[train])
    if not known.all():
        unseen = [one_line(str(name)) for name in classes[np.unique(targets[test][~known])]]
        log.warning("%d test images left out: no train image of %s", (~known).sum(), ", ".join(unseen))
        test = test[known]
    if len(np.unique(targets[train])) < 2 or len(test) == 0:
        log.warning(
            "%s: %d train images of %d classes and %d test images of these classes do not measure classes (at least "
            "two classes, each with two images or more): measuring retrieval of augmented views instead",
            *(root, len(train), len(np.unique(targets[train])), len(test)),
        )
        return None
    return Labels(tuple(str(name) for name in classes), targets, train, test)


def _splits(root: Path, table: pa.Table, labeled: NDArray[np.bool_]) -> NDArray[np.str_]:
    given = np.array([split or "" for split in table["split"].to_pylist()])
    present = set(given[labeled]) - {""}
    if not present:
        log.info("%s has labels and no splits: one image in %d is a test image, by its hash", root, TEST_SHARE)
        digits = [int(image_id[:8], 16) for image_id in table["image_id"].to_pylist()]
        return np.where(np.array(digits) % TEST_SHARE == 0, "test", "train")
    missing = {"train", "test"} - present
    if missing:
        raise DatasetError(
            f"{root}: labeled images with split {sorted(present)}, none with {sorted(missing)}; "
            "ingest both splits, or leave the split empty to have one made"
        )
    return given
