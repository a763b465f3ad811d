"""`python -m tests.benchmarks.learns [SEEDS [FOLDER]]`: does the recipe of params.yaml learn? Real stages.

Prints kNN accuracy (`evaluate.knn.reported`) on test images of teacher and student beside random weights of the same
shape, the histograms that evaluation knows and the embeddings by which curation finds copies: mean and range over
seeds, and the differences within a seed. Some minutes a seed. FOLDER holds a folder of images for each class, and a
part of them is held out for the evaluation; without it, the sample pool.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from components.adaptation import stage as adaptation
from components.core.layout import Layout
from components.curation import stage as curation
from components.curation.embed import COPIES, read_embeddings
from components.curation.inputs import EVALUATION
from components.data.evaluation_set import read_evaluation_set
from components.data.ingest import ingest
from components.data.ingest_config import IngestRequest
from components.data.manifest import read_collection
from components.data.sample_pool import SAMPLE_LICENSE, build_sample_pool
from components.distillation import stage as distillation
from components.evaluation import stage as evaluation
from components.evaluation.protocols import knn
from components.pretraining import stage as pretraining
from components.recipe import Recipe, load_recipe

STUDENT = "small"
METRIC = "knn_top1"
HOLDOUT = 0.2  # of given images


def make_collections(folder: Path, images: Path | None) -> None:
    """The sample pool (seed 0, as a first run builds it), or given images, ingested below `folder`/data."""
    places = {name: folder / "data" / name for name in ("pool", "evaluation")}
    if images is not None:
        given = {"source": str(images), "name": "given", "license": "unstated", "holdout": HOLDOUT}
        ingest(IngestRequest.parse(**given, **places, docs_folder=folder / "docs"))
        return
    build_sample_pool(folder / "sample")
    for part, place in places.items():
        source = {"source": str(folder / "sample" / part), "name": "sample", "license": SAMPLE_LICENSE, **places}
        ingest(IngestRequest.parse(**source, as_evaluation=part == "evaluation", docs_folder=place.parent / "docs"))


def run_seed(recipe: Recipe, collections: Path, root: Path, seed: int) -> tuple[dict[str, float], float]:
    """All stages in an empty `root`; accuracy by model, and CPU seconds of the three trainings."""
    root.mkdir()
    (root / "data").mkdir()
    for name in ("pool", "evaluation"):
        (root / "data" / name).symlink_to(collections / "data" / name)
    curation.embed(recipe.embed, root, seed)
    curation.curate(recipe.curate, root, seed)
    begun = _cpu_seconds()
    pretraining.run(recipe.pretrain, root, seed)
    adaptation.run(recipe.adapt, root, seed)
    distillation.run(recipe.distill, root, seed, recipe.name)
    spent = _cpu_seconds() - begun
    teacher, student = (evaluation.run(recipe.evaluate, root, seed, name) for name in ("teacher", STUDENT))
    return _accuracies(teacher, student) | {"embedding of copy detection": _of_copy_detection(recipe, root)}, spent


def _of_copy_detection(recipe: Recipe, root: Path) -> float:
    images = read_evaluation_set(root / EVALUATION)
    assert images.labels is not None
    embedded = read_collection(images.root)
    _, rows = np.unique(embedded["image_id"].to_numpy(zero_copy_only=False), return_index=True)  # as in `images`
    embeddings = read_embeddings(Layout(root).embeddings / COPIES / f"{EVALUATION.name}.npy", embedded)
    return knn.evaluate(embeddings[rows], images.labels, recipe.evaluate.knn).metrics[METRIC]


def _accuracies(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, float]:
    return {
        "teacher": teacher[METRIC],
        "its random weights": teacher["random"][METRIC],
        "student": student[METRIC],
        "its random weights, of the student": student["random"][METRIC],
        "descriptor": teacher["descriptor"][METRIC],
    }


def _cpu_seconds() -> float:
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )  # user and system, of this process and of its loaders


def main(num_seeds: int, images: Path | None) -> None:
    """Train and evaluate with seeds 0, 1, ...; print a line a model and a line a difference."""
    logging.disable(logging.INFO)
    recipe = load_recipe(Path(), None)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        make_collections(Path(name), images)
        for seed in range(num_seeds):
            accuracies, spent = run_seed(recipe, Path(name), Path(name) / f"seed-{seed}", seed)
            rows.append(accuracies)
            sys.stdout.write(f"seed {seed}: {accuracies}, training {spent:.0f} s of CPU time\n")
            sys.stdout.flush()
    for model in rows[0]:
        _write_line(model, [row[model] for row in rows])
    for ours, other in (
        ("teacher", "its random weights"),
        ("teacher", "descriptor"),
        ("teacher", "embedding of copy detection"),
        ("student", "its random weights, of the student"),
    ):
        _write_line(f"{ours} minus {other}", [row[ours] - row[other] for row in rows])


def _write_line(what: str, values: list[float]) -> None:
    mean = sum(values) / len(values)
    sys.stdout.write(f"{what:55} {mean:6.3f} ({min(values):.3f} to {max(values):.3f})\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
