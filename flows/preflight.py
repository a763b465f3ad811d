"""Check a run before its first stage: files in its recipe, number of images, disk space.

Only footers of manifests and `.dvc` files are read, which is fast for a pool of any size.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.core.config import ConfigError
from components.core.git import git
from components.core.layout import RELATIVE, Layout
from components.core.references import is_registered
from flows.snapshot import CODE_FOLDERS
from flows.sources import EVALUATION, POOL, Snapshot, num_images, snapshots, source_names
from infra.local.site import HOST

if TYPE_CHECKING:
    from components.model.config import HeadConfig, ViTConfig
    from components.recipe import Recipe

logger = logging.getLogger(__name__)

GIB = 2**30
FILES = ("weights", "path", "teacher_weights", "previous")  # last parts of keys whose values are paths
VERSIONED = ("embed.embedder.weights", "embed.semantic.weights", "distill.teacher_weights")  # may be `models:/` URIs
LEAST_BYTES = 100 * 2**20  # for the run's folder, logs and databases, even if no stage runs
TRAINING_BYTES = 16  # per parameter in a checkpoint: student, EMA and two moments, float32
CHECKPOINTS = 3  # two, and the one being written
EMBEDDING_BYTES = 4096  # per image: 1,024 float32 numbers


def check(checkout: Path, recipe: Recipe, entries: Sequence[str]) -> None:
    """Refuse a run that cannot succeed, and warn of one that may fill a disk.

    Args:
        checkout: Pedigree's folder.
        recipe: all parameters of the run.
        entries: snapshots of the run, as SOURCE/SNAPSHOT.

    Raises:
        ConfigError: one line for each fault, with the key to change and a value that fits.
    """
    taken = snapshots(checkout, entries)
    pool = [one for one in taken if one.collection == POOL]
    faults = [*_missing_files(checkout, recipe), *_unknown_seeds(recipe, pool), *_few_images(recipe, pool)]
    faults += [*_no_evaluation(taken), *_no_shared_memory(recipe)]
    faults += [*_no_room(checkout, _needs(checkout, recipe, pool))]
    if faults:
        raise ConfigError("\n".join(faults))


def _missing_files(checkout: Path, recipe: Recipe) -> Iterator[str]:
    """Yield faults of paths in the recipe that would not exist in the run's folder."""
    made = {str(RELATIVE.weights("pretrained")), *recipe.evaluate.models.values()}
    for key, value in named_files(recipe.model_dump(mode="json", by_alias=True)):
        is_made = key == "distill.teacher_weights" and value.rstrip("/") in made
        if is_made or (key in VERSIONED and is_registered(value)):
            continue
        if not (checkout / value).exists():
            yield f"{key}: {checkout / value} does not exist; give the path of a file or folder that does"
        elif not Path(value).is_absolute() and not _in_the_run(checkout, value):
            yield (
                f"{key}: {value} is in this checkout but not in git, so the run's folder does not have it; "
                f"set {key}={(checkout / value).resolve()}"
            )


def named_files(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every parameter that names a file, folder or registered version."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from named_files(value, f"{before}{name}.")
        elif name in FILES and isinstance(value, str):
            yield before + name, value


def _in_the_run(checkout: Path, path: str) -> bool:
    """Return whether a relative path of the checkout also exists in a run's folder."""
    top = Path(path).parts[0]
    if top in {str(RELATIVE.state), *CODE_FOLDERS}:  # the state folder is linked
        return True
    return bool(git(checkout, "--literal-pathspecs", "ls-files", "--", path))


def _unknown_seeds(recipe: Recipe, pool: Sequence[Snapshot]) -> Iterator[str]:
    sources = source_names(one.entry for one in pool)
    for name in sorted(set(recipe.curate.seed_sets) - set(sources)):
        yield f"curate.seed_sets.{name}: the run has no such source; its sources: {', '.join(sources)}"


def _few_images(recipe: Recipe, pool: Sequence[Snapshot]) -> Iterator[str]:
    """Yield faults of batch sizes above the largest possible curated set."""
    counts: Counter[str] = Counter()
    for one in pool:
        if (count := num_images(one)) is None:
            logger.info("batch sizes not checked: %s is not in this checkout", one.entry)
            return
        counts[one.source] += count
    most, target = counts.total(), recipe.curate.target_images
    where = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    said = f"the sources hold {most:,} images ({where})"
    if target is not None and not recipe.curate.seed_sets and target < most:
        most, said = target, f"curate.target_images is {target:,}"
    for name, section in recipe.trainings().items():
        if section.batch_size > most:
            part = section.num_processes * section.accumulation_steps
            fits = most // part * part
            fits = fits if fits >= 2 * part or section.objective.koleo_weight is None else 0  # KoLeo needs 2 per rank
            advice = f"set {name}.batch_size={fits} or less, or add more images" if fits else "add more images"
            yield f"{name}.batch_size is {section.batch_size:,}, but {said}: {advice}"


def _no_shared_memory(recipe: Recipe) -> Iterator[str]:
    """Yield faults of loaders whose batches do not fit into /dev/shm, with all ranks on this machine."""
    from components.core.errors import EngineError
    from components.data.shared_memory import check_shared_memory, crop_bytes

    evaluate = recipe.evaluate
    loaders = [("evaluate.num_workers", evaluate.num_workers, evaluate.batch_bytes)]
    for name, section in recipe.trainings().items():
        size = crop_bytes(section.crops, section.batch_size)
        loaders.append((f"{name}.stream.num_workers", section.stream.num_workers, size))
    for loader in loaders:
        try:
            check_shared_memory(*loader)
        except EngineError as error:
            yield str(error)


def _no_evaluation(taken: Sequence[Snapshot]) -> Iterator[str]:
    """Yield a fault if no source of the run has evaluation images."""
    counts = [num_images(one) for one in taken if one.collection == EVALUATION]
    if None not in counts and not sum(filter(None, counts)):
        names = ", ".join(source_names(one.entry for one in taken))
        yield (
            f"{EVALUATION}: no evaluation images of {names}, and the stage evaluate needs some: "
            "pedigree ingest FOLDER --name NAME --license LICENSE --evaluation"
        )


def _needs(checkout: Path, recipe: Recipe, pool: Sequence[Snapshot]) -> dict[Path, dict[str, int]]:
    """Estimate the maximum bytes that a run writes, by folder and kind; unchanged stages write nothing."""
    images, count = 0, 0
    for one in pool:
        images += one.num_bytes
        count += num_images(one) or 0
    target = recipe.curate.target_images
    kept_share = 1.0 if target is None or recipe.curate.seed_sets or not count else min(1.0, target / count)
    heads = (recipe.pretrain.dino_head, recipe.pretrain.ibot_head)
    large = num_parameters(recipe.pretrain.backbone, heads)
    models = [large, large, *(num_parameters(student.backbone, heads) for student in recipe.distill.students.values())]
    local = any(one.checkpoint_uri is None for one in recipe.trainings().values())
    embedded = count * EMBEDDING_BYTES * (1 if recipe.embed.semantic is None else 2)
    made = {"curated images": int(images * kept_share), "embeddings": embedded, "weights": 4 * sum(models)}
    return {
        Layout(checkout).dvc: made,
        Layout(checkout).state: {
            **{f"{name} in S3": size for name, size in made.items() if _local_storage()},
            "checkpoints": CHECKPOINTS * TRAINING_BYTES * max(models) if local else 0,
        },
    }


def _local_storage() -> bool:
    """Return whether S3 is the local stack's server, which stores its data in `.pedigree`."""
    return HOST in os.environ.get("AWS_ENDPOINT_URL", HOST)


def num_parameters(backbone: ViTConfig, heads: Sequence[HeadConfig]) -> int:
    """Count the parameters of a vision transformer and its heads, without biases, norms and positions (3 % at most)."""
    dim = backbone.dim
    total = backbone.depth * dim * dim * (4 + 2 * backbone.ffn_ratio)  # swiglu: three matrices of 2/3 the width
    total += dim * 3 * backbone.patch_size**2
    for head in heads:
        total += head.hidden_dim * (dim + max(0, head.num_layers - 2) * head.hidden_dim + head.bottleneck_dim)
        total += head.bottleneck_dim * head.num_prototypes
    return int(total)


def _no_room(checkout: Path, needs: Mapping[Path, Mapping[str, int]]) -> Iterator[str]:
    """Yield a fault for each full disk; log a warning for disks with less space than a run may need."""
    by_disk: dict[int, list[Path]] = defaultdict(list)
    for folder in needs:
        by_disk[os.stat(folder if folder.exists() else checkout).st_dev].append(folder)
    for folders in by_disk.values():
        free = shutil.disk_usage(folders[0] if folders[0].exists() else checkout).free
        parts = {name: size for folder in folders for name, size in needs[folder].items() if size}
        where = " and ".join(map(str, folders))
        if free < LEAST_BYTES:
            yield f"{where}: {free / 2**20:.0f} MiB are free, and a run needs {LEAST_BYTES / 2**20:.0f} MiB at least"
        elif free < sum(parts.values()):
            figures = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            logger.warning(
                "%s: %.2f GiB are free, a run that computes all stages needs about %.2f (%s); free some first",
                *(where, free / GIB, sum(parts.values()) / GIB, figures),
            )
