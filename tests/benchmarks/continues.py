"""`python -m tests.benchmarks.continues [SEEDS]`: does training on from trained weights keep what they know?

Weights that recipe tiny-cpu makes of every other photograph of the sample, in few steps, stand in for released ones:
their heads are left behind. Recipe continue-dinov2, with sizes and steps scaled down, goes on from them with the
photographs that they have not seen. Prints kNN accuracy on the sample's test images before and after, of all classes
and of the new ones alone: mean and range over seeds. Some minutes a seed.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from components.core.storage import sha256_file
from components.curation import stage as curation
from components.data.evaluation_set import EvaluationSet, read_evaluation_set
from components.data.ingest import ingest
from components.data.ingest_config import IngestRequest
from components.data.sample_pool import PHOTOGRAPHS, SAMPLE_LICENSE, build_sample_pool
from components.evaluation.features import EvaluationImages
from components.evaluation.protocols import knn
from components.model.export import BACKBONE_FILE, load_backbone
from components.pretraining import stage as pretraining
from components.recipe import Recipe, load_recipe
from tests.evaluation.class_tokens import class_tokens

NEW = list(PHOTOGRAPHS)[1::2]
PARTS = {"known": list(PHOTOGRAPHS)[::2], "new": NEW}
CROPS = (
    "{global_size: 48, local_size: 24, num_local: 2, color_jitter_probability: 0.5, brightness: 0.2, contrast: 0.2, "
    "saturation: 0.1, hue: 0.05, grayscale_probability: 0.0, solarize_probability: 0.0, blur_sigma: [0.1, 0.5]}"
)
SHAPE = (
    "{patch_size: 8, dim: 64, depth: 4, num_heads: 1, num_registers: 2, layer_scale_init: 1.0, drop_path: 0.0, "
    "ffn: mlp}"
)
HEAD = "{num_prototypes: 256, hidden_dim: 256, bottleneck_dim: 64}"
COMMON = (
    f"pretrain.crops={CROPS}",
    f"pretrain.backbone={SHAPE}",
    f"pretrain.dino_head={HEAD}",
    f"pretrain.ibot_head={HEAD}",
    "pretrain.stream.num_workers=0",
    "pretrain.batch_size=32",
    "pretrain.activation_checkpointing=none",
    "evaluate.preprocessing={resize_size: 54, crop_size: 48}",
    "evaluate.num_workers=0",
    "adapt.crops={global_size: 64, local_size: 32}",  # what is not run must fit all the same
    "distill.crops={global_size: 48, local_size: 24}",
)
FIRST = ("pretrain.steps=240", "curate.target_images=null", "distill.students.small.backbone.patch_size=8", *COMMON)
CONTINUED = (
    "pretrain.steps=100",
    "pretrain.optimizer.warmup_steps=10",
    "pretrain.optimizer.freeze_backbone_steps=20",
    "pretrain.optimizer.weight_decay_end=0.04",
    "pretrain.teacher={temp_end: 0.04, temp_warmup_steps: 0}",
    "pretrain.ema.momentum_start=0.99",
    "pretrain.monitor={}",
    "distill.students.tiny.backbone.patch_size=8",
    *COMMON,
)
UNFROZEN, LARGE = "pretrain.optimizer.freeze_backbone_steps=1", "pretrain.optimizer.base_lr=4e-3"
VARIANTS = {
    "continue-dinov2": (),
    "continue-dinov2, no frozen start": (UNFROZEN,),
    "continue-dinov2, rate of a first training": (LARGE,),
}


def make_roots(folder: Path) -> None:
    """Ingest the known and the new photographs, each below a root of its own beside the same evaluation set."""
    build_sample_pool(folder / "sample")
    for part, names in PARTS.items():
        images = folder / f"images-{part}"
        images.mkdir()
        for name in names:
            (folder / "sample" / "pool" / name).rename(images / name)
        places = {name: folder / part / "data" / name for name in ("pool", "evaluation")}
        for source in (images, folder / "sample" / "evaluation"):
            request = {"source": str(source), "name": "sample", "license": SAMPLE_LICENSE, **places}
            as_evaluation = source != images
            ingest(IngestRequest.parse(**request, as_evaluation=as_evaluation, docs_folder=folder / "docs"))


def accuracy(weights: Path, images: EvaluationSet, recipe: Recipe) -> tuple[float, float]:
    """KNN accuracy on test images: of all classes, and of the new ones."""
    crops = EvaluationImages(images, recipe.evaluate.preprocessing)
    assert images.labels is not None
    features = class_tokens(load_backbone(weights), torch.stack([crops[index] for index in range(len(crops))]))
    hits = knn.evaluate(features, images.labels, recipe.evaluate.knn).by_image["knn_top1"]
    new = [images.labels.classes[target] in NEW for target in images.labels.targets[images.labels.test]]
    return float(hits.mean()), float(hits[new].mean())


def main(num_seeds: int) -> None:
    """Train, go on and evaluate with seeds 0, 1, ...; print a line a variant and seed, then means."""
    logging.disable(logging.INFO)
    first = load_recipe(Path(), "tiny-cpu", FIRST)
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_roots(folder)
        images = read_evaluation_set(folder / "known" / "data" / "evaluation")
        for part in PARTS:
            curation.embed(first.embed, folder / part, 0)
            curation.curate(first.curate, folder / part, 0)
        for seed in range(num_seeds):
            pretraining.run(first.pretrain, folder / "known", seed)
            given = (folder / "known" / "models" / "pretrained").rename(folder / f"given-{seed}")
            _note(found, "given weights", accuracy(given, images, first))
            init = {"weights": str(given), "sha256": sha256_file(given / BACKBONE_FILE)}
            for variant, settings in VARIANTS.items():
                overrides = [*CONTINUED, *settings, *(f"pretrain.init.{key}={value}" for key, value in init.items())]
                recipe = load_recipe(Path(), "continue-dinov2", overrides)
                pretraining.run(recipe.pretrain, folder / "new", seed)
                _note(found, variant, accuracy(folder / "new" / "models" / "pretrained", images, first))
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sys.stdout.write(f"mean (range) over {num_seeds} seeds; {spent:.0f} s of CPU time\n")
    for variant, values in found.items():
        both = (f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in zip(*values, strict=True))
        sys.stdout.write(f"{variant:45} all {' new '.join(both)}\n")


def _note(found: defaultdict[str, list[tuple[float, float]]], what: str, values: tuple[float, float]) -> None:
    found[what].append(values)
    sys.stdout.write(f"seed {len(found[what]) - 1}, {what}: all {values[0]:.3f}, new {values[1]:.3f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
