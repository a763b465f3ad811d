"""Advise which recipe fits a run's images and this machine.

Only two columns of the manifests are read, which is fast for a pool of any size.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from components.data.config import NUM_GLOBAL
from components.recipe import Recipe, load_recipe
from flows.preflight import num_parameters
from flows.sources import POOL, SAMPLE, snapshots

logger = logging.getLogger(__name__)

ON_GPU, ON_CPU, CONTINUED = "own-images-gpu", "own-images-cpu", "continue-dinov2"
ENOUGH_IMAGES = 1_000_000  # for training from random weights, by lightly-train's documentation of its method dinov2
HEAVY = 10  # times the operations of the fitting recipe


@dataclass(frozen=True)
class Facts:
    """Criteria for choosing a recipe.

    Args:
        num_images: of the run's sources, including duplicates.
        median_side: pixels of the shorter side.
        gpu: whether training would use one.
    """

    num_images: int
    median_side: int
    gpu: bool

    def __str__(self) -> str:
        hardware = "a GPU" if self.gpu else "no GPU"
        return f"{self.num_images:,} images, shorter side {self.median_side:,} pixels in the median, {hardware}"


def advise(
    checkout: Path, recipe: Recipe, entries: Sequence[str], command: Sequence[str], chosen: str | None = None
) -> None:
    """Log what does not fit, and the command for a fitting recipe; log nothing if the recipe fits.

    Args:
        checkout: Pedigree's folder.
        recipe: all parameters of the run.
        entries: snapshots of the run, as SOURCE/SNAPSHOT.
        command: words of the command, without recipe and settings.
        chosen: name of the recipe, if the command has one.
    """
    folders = {one.folder: one.source for one in snapshots(checkout, entries) if one.collection == POOL}
    facts = None if set(folders.values()) == {SAMPLE} else _facts(folders)
    if facts is None:
        return
    name = ON_GPU if facts.gpu else ON_CPU
    missed = [] if chosen == name else list(misfits(recipe, load_recipe(checkout, name), facts))
    if not missed:
        return
    logger.warning("this recipe does not fit the run (%s): %s", facts, "; ".join(missed))
    logger.warning("the run goes on as asked. Recipe %s fits better: %s --recipe %s", name, shlex.join(command), name)
    if facts.gpu and facts.num_images < ENOUGH_IMAGES:
        logger.warning(
            "fewer than %s images: recipe %s starts from released weights; the head of its file says how",
            *(f"{ENOUGH_IMAGES:,}", CONTINUED),
        )


def misfits(recipe: Recipe, fitting: Recipe, facts: Facts) -> Iterator[str]:
    """Yield how the recipe wastes images or exceeds the machine, compared with the fitting one."""
    size, better = recipe.pretrain.crops.global_size, fitting.pretrain.crops.global_size
    if size < better <= facts.median_side:
        yield f"it trains on crops of {size} pixels, not {better}"
    target = recipe.curate.target_images
    if target is not None and not recipe.curate.seed_sets and target < facts.num_images:
        yield f"it keeps at most {target:,} images (curate.target_images)"
    drawn, more = (one.pretrain.steps * one.pretrain.batch_size for one in (recipe, fitting))
    if drawn < min(facts.num_images, more):
        yield f"its pretraining draws {drawn:,} images, not {more:,}"
    heavier = _operations(recipe) / _operations(fitting)
    if not facts.gpu and heavier > HEAVY:
        yield f"its pretraining takes about {heavier:,.0f} times the operations, without a GPU"


def _operations(recipe: Recipe) -> float:
    """Return a number proportional to the operations of pretraining: weights x patches x images."""
    config = recipe.pretrain
    crops, patch = config.crops, config.backbone.patch_size
    patches = NUM_GLOBAL * (crops.global_size // patch) ** 2 + crops.num_local * (crops.local_size // patch) ** 2
    return num_parameters(config.backbone, ()) * patches * config.steps * config.batch_size


def _facts(folders: Iterable[Path]) -> Facts | None:
    """Collect the criteria from snapshots; None if one is not in this checkout."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.data.manifest import MANIFEST

    try:
        tables = [pq.read_table(folder / MANIFEST, columns=["width", "height"]) for folder in folders]
    except (OSError, pa.ArrowInvalid):  # the stages report problems after fetching it
        return None
    sides = [np.minimum(one["width"].to_numpy(), one["height"].to_numpy()) for one in tables]
    count = sum(map(len, sides))
    return Facts(count, int(np.median(np.concatenate(sides))), has_gpu()) if count else None


def has_gpu() -> bool:
    """Return whether there is an NVIDIA or AMD device and a torch build for it, without importing torch."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    return bool(devices) and not metadata.version("torch").endswith("+cpu")
