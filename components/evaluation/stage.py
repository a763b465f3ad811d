"""Evaluate the frozen features of one model beside champion, parents and baselines, on each evaluation set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from components.core.errors import DatasetError
from components.core.layout import Layout
from components.core.pictures import draw_pca, jpeg, pca_colors
from components.core.registered_weights import download_weights
from components.core.storage import atomic_dir, sha256_dir, write_bytes
from components.data.evalsets import read_sets
from components.evaluation.compare import ComparedModel, load_model
from components.evaluation.comparison_pictures import SHOWN
from components.evaluation.config import EvaluateConfig
from components.evaluation.features import EvaluationImages
from components.evaluation.measure import MeasuredSet, measure, merged
from components.evaluation.pictures import choose_queries, draw_neighbors, neighbor_rows
from components.evaluation.tables import write_by_image, write_comparison, write_deciding
from components.model.export import read_provenance

log = logging.getLogger(__name__)

CHAMPION = "champion"
VERDICTS = "verdicts.txt"


def run(config: EvaluateConfig, root: Path, seed: int, model: str) -> dict[str, Any]:
    """Measure a model on every set of data/evaluation and write reports/evaluate/<model>.

    Args:
        config: the section `evaluate`.
        root: the workspace.
        seed: of the random-weights model, the augmented views, trained heads, resamples and the choice of pictures.
        model: a name among `config.models`.

    Returns:
        The model's metrics and counts, by set as `components.core.metric_names` says; those of `champion`, parents by
        their names, `random` and `descriptor` under these names; differences with intervals under `minus_<name>`.

    Raises:
        DatasetError: no evaluation images, no test images, or a crop size that does not fit a model.
    """
    layout = Layout(root)
    networks = _networks(config, root, model)
    main, *others = measure(config, read_sets(layout.evaluation), networks, layout.cache("tokens"), seed)
    named = [f"{CHAMPION}: {config.champions[model]}"] if model in config.champions else []
    further = [line for one in others for line in one.verdict()]
    verdicts = [*main.verdict(), *further]
    with atomic_dir(layout.report("evaluate", model)) as folder:
        # An output of `dvc.yaml`, also if there is one set only: DVC warns of an empty folder.
        write_bytes(folder / "sets" / VERDICTS, "".join(f"{line}\n" for line in verdicts).encode())
        for one in others:
            write_bytes(folder / "sets" / f"{one.evalset.name}.html", one.page(named))
        write_bytes(folder / "report.html", main.page([*named, *further]))
        _write_pictures(folder, main)
        write_comparison(folder / "comparison.csv", [main, *others])
        write_deciding(folder / "deciding.csv", [main, *others])
        write_by_image(folder / layout.by_image(model).name, [main, *others])
    for line in verdicts:
        log.info(line)
    return merged([main, *others])


def _networks(config: EvaluateConfig, root: Path, model: str) -> list[ComparedModel]:
    """Load the candidate (first), the champion if configured, and parents that this run evaluates."""
    folders = {model: root / config.models[model]}
    if model in config.champions:
        folders[CHAMPION] = download_weights(config.champions[model], root)
    folders |= _parents(config, root, model)
    found = [load_model(name, folder, lambda _: config.preprocessing) for name, folder in folders.items()]
    for one in found:
        size, patch = config.preprocessing.crop_size, one.encoder.patch_size
        if size % (patch or 1):
            raise DatasetError(
                f"evaluate.preprocessing.crop_size {size} is not a multiple of {patch}, the patch size of {one.name}"
            )
    return found


def _parents(config: EvaluateConfig, root: Path, model: str) -> dict[str, Path]:
    """Return the other models of this run from which one was trained, by the digests that its weights record."""
    provenance = read_provenance(root / config.models[model])
    digests = {value for name, value in provenance.items() if name.endswith("_sha256")}
    others = {name: root / folder for name, folder in config.models.items() if name != model}
    return {name: folder for name, folder in others.items() if folder.is_dir() and sha256_dir(folder) in digests}


def _write_pictures(folder: Path, main: MeasuredSet) -> None:
    """Write pca.jpg and neighbors.jpg of a few images, which DVC and Prefect show; the page has them too."""
    first, images = main.models[0], main.evalset.images
    pixels = EvaluationImages(images, first.preprocessing)
    queries = choose_queries(images, SHOWN, main.seed)
    shown = torch.stack([pixels[index] for index in queries])
    alike = [model for model in main.models if model.preprocessing.sizes == first.preprocessing.sizes]
    patches = {model.name: model.encoder.last_patches(shown) for model in alike}
    colors = {name: pca_colors(tokens) for name, tokens in patches.items() if tokens is not None}
    write_bytes(folder / "pca.jpg", jpeg(draw_pca(shown.numpy(), colors)))
    rows = neighbor_rows(images, pixels, main.found.tokens[first.name].features, queries)
    write_bytes(folder / "neighbors.jpg", jpeg(draw_neighbors(rows)))
