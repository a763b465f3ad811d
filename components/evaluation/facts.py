"""Lines on an evaluation set and on how models see it."""

from __future__ import annotations

from components.data.evalset import Evalset
from components.evaluation.compare import ComparedModel, task_of


def about(evalset: Evalset) -> str:
    """Return name, version, task, license and numbers of images of a set."""
    asked, images = evalset.config.resolution, evalset.images.images.num_rows
    at = f", made for {asked} pixels" if asked else ""
    learned, labels = evalset.learned, evalset.images.labels
    if learned is not None and labels is not None and labels.predictable is not None:
        at += (
            f"; trained on {learned.name} {learned.version}, and only the {len(labels.predictable)} of its "
            f"{len(labels.classes)} classes that the set has can be predicted"
        )
    what = "images" if evalset.clips is None else "clips"
    splits = f"{len(evalset.train):,} train and {len(evalset.test):,} test {what}"
    counts = splits if len(evalset.train) else f"{images:,} images"
    return f"{evalset.name} {evalset.version}, {task_of(evalset)}, {evalset.config.license}: {counts}{at}"


def how_scaled(model: ComparedModel) -> str:
    """Return the size of a model's images; its patches may not tile what the set asks for."""
    scaling = model.preprocessing
    said = f"{model.name}: shorter side {scaling.resize_size} pixels, crop {scaling.crop_size}"
    return said if scaling.pooling == "cls" else f"{said}; features are {scaling.pooled} (pooling {scaling.pooling})"
