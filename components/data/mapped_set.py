"""Sets without train images of their own: ImageNet-A, -R, -Sketch or V2 style (arXiv:2304.07193, App. B.3).

Heads are trained on the train images of another set, which `train_set` names. Scored are the classes that both sets
have, by the names of their labels or by `mapping`; only these can be predicted, which is common practice for the 200
classes of ImageNet-A and -R.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from components.core.config import load_yaml
from components.core.errors import DatasetError
from components.core.text import one_line
from components.data.evalset_config import EVALSET, EvalsetConfig
from components.data.evaluation_set import EvaluationSet, Labels, read_evaluation_set
from components.data.manifest import below, read_collection, snapshot_manifests


def train_set_folder(name: str, evaluation: Path) -> Path:
    """Return the snapshot of the set whose train images heads are trained on.

    Args:
        name: of the set.
        evaluation: folder of all sets.

    Raises:
        DatasetError: not exactly one set of this name, or none that has train images.
    """
    folders = [path.parent for path in snapshot_manifests(evaluation)]
    found = [folder for folder in folders if folder.parent.name == name]
    if len(found) != 1:
        known = ", ".join(sorted({folder.parent.name for folder in folders})) or "none"
        raise DatasetError(f"train_set {name}: {len(found)} sets of this name in {evaluation}; there are {known}")
    config = load_yaml(found[0] / EVALSET) if (found[0] / EVALSET).is_file() else {}
    if config.get("task", "classification") != "classification" or config.get("train_set"):
        raise DatasetError(f"train_set {name}: not a classification set with train images")
    return found[0]


def train_labels(name: str, evaluation: Path) -> tuple[EvaluationSet, Labels]:
    """Read the set whose train images heads are trained on.

    Raises:
        DatasetError: as `train_set_folder`, or it has no classes to measure.
    """
    images = read_evaluation_set(train_set_folder(name, evaluation))
    if images.labels is None:
        raise DatasetError(f"train_set {name}: no classes to measure; see `pedigree evalset check {name}`")
    return images, images.labels


def read_mapped(folder: Path, config: EvalsetConfig) -> EvaluationSet:
    """Return the train images of the other set, then the images of this one, with the other's classes.

    Args:
        folder: of this set, below the folder of all sets.
        config: of this set.

    Raises:
        DatasetError: as `train_labels`, or labels that are no class of the other set.
    """
    evaluation = folder.parents[1]
    assert config.train_set is not None
    learned, labels = train_labels(config.train_set, evaluation)
    own = read_collection(folder).sort_by("image_id")
    numbers = {name: number for number, name in enumerate(labels.classes)}
    found = np.array([numbers.get(config.mapped(label or ""), -1) for label in own["label"].to_pylist()])
    for row in np.flatnonzero(found < 0)[:1]:
        label = one_line(str(own["label"][int(row)].as_py()))
        raise DatasetError(f"{folder}: label {label} is no class of {config.train_set}; see `pedigree evalset check`")
    count = len(labels.train)
    parts = [
        below(evaluation, learned.root, learned.images.take(pa.array(labels.train))),
        below(evaluation, folder, own),
    ]
    train, test = np.arange(count), np.arange(count, count + len(found))
    targets = np.concatenate([labels.targets[labels.train], found])
    joined = Labels(labels.classes, targets, train, test, predictable=np.unique(found))
    return EvaluationSet(evaluation, pa.concat_tables(parts), joined)
