"""The stages `embed` and `curate`: from a pool of images to a curated set with a reason for each image."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from components.core.layout import Layout
from components.core.storage import atomic_dir, write_json
from components.curation import gates
from components.curation.config import CurateConfig, EmbedConfig
from components.curation.embed import (
    COPIES,
    SCORES,
    SEMANTIC,
    Part,
    embed_collection,
    images_digest,
    write_parts,
)
from components.curation.embedders import resolve
from components.curation.filters import filter_images
from components.curation.inputs import (
    EMBEDDER,
    EVALUATION,
    POOL,
    Inputs,
    read_collections,
    read_inputs,
)
from components.curation.left_out import left_out_lines
from components.curation.pack import Pool, pack
from components.curation.previous import find_previous, remember
from components.curation.rejections import remaining, value_counts
from components.curation.report import Curation, evenness, write_report
from components.curation.scores import load_scorer
from components.curation.select import Selection, find_seeds, rows_of, select
from components.curation.unique import Unique, check_copies, drop_copies
from components.data.expectations import VALIDATION, DataDocs, write_checks
from components.data.manifest import FINDINGS

log = logging.getLogger(__name__)

pc: Any = pyarrow.compute  # created at import, invisible to pyright


def embed(config: EmbedConfig, root: Path, seed: int) -> dict[str, Any]:
    """Embed and score the pool, and embed the evaluation sets; cached shards are not computed again.

    Args:
        config: section `embed`.
        root: the workspace.
        seed: unused, because embeddings are deterministic; every stage takes one.
    """
    del seed
    pool, evaluation = read_collections(root)
    parts: dict[str, Part] = {COPIES: resolve(config.embedder, root), SCORES: load_scorer(config.scores, root)}
    if config.semantic is not None:
        parts[SEMANTIC] = resolve(config.semantic, root, "embed.semantic")
    collections = ((POOL, pool, parts), (EVALUATION, evaluation, {COPIES: parts[COPIES]}))
    cache = Layout(root).cache("embeddings")
    done = {
        folder.name: embed_collection(root / folder, images, its_parts, cache, config.workers)
        for folder, images, its_parts in collections
    }
    with atomic_dir(Layout(root).embeddings) as folder:
        shapes = {name: write_parts(shards, folder, name) for name, shards in done.items()}
        dims = {part: shape[1] for part, shape in shapes[POOL.name].items() if part != SCORES}
        definition = {
            "digests": {name: part.digest for name, part in parts.items()},
            "dims": dims,
            "config": config.model_dump(exclude={"workers"}),
            "pool": images_digest(pool),
            "evaluation": images_digest(evaluation),
        }
        write_json(folder / EMBEDDER, definition)
    return {"images": {"pool": len(pool), "evaluation": len(evaluation)}, "dims": dims}


def curate(config: CurateConfig, root: Path, seed: int) -> dict[str, Any]:
    """Filter, drop copies, retrieve, cluster, sample in balance, and pack, with a gate after each step and a report.

    Args:
        config: section `curate`.
        root: the workspace.
        seed: of k-means and sampling.
    """
    inputs, licenses = read_inputs(root), config.filters.allowed_licenses
    previous = find_previous(config, inputs.pool, root)
    with DataDocs(Layout(root).data_docs / "curated") as docs:
        filtered = filter_images(inputs.pool, config.filters, inputs.scores)
        rows = remaining(np.arange(len(inputs.pool)), filtered, "loosen curate.filters")
        gates.after_filter(docs, _images(inputs, rows), config.filters.min_side, licenses)

        seeds = find_seeds(inputs.pool, rows, config.seed_sets)
        candidates = np.setdiff1d(rows, rows_of(seeds, as_is=False))
        unique = drop_copies(inputs, candidates, rows_of(seeds, as_is=True), config)
        check_copies(docs, inputs, unique, config)

        selection = select(inputs, unique.rows, seeds, config, seed)
        if (sample := selection.sample) is not None:
            balance = gates.Balance(sample.top_labels, sample.levels[-1].before, config.gates.max_cluster_share)
            gates.after_sampling(docs, _images(inputs, sample.drawn), balance)

        rejected = pa.concat_tables([filtered, unique.rejected, selection.rejected])
        pool = _with_findings(root, inputs, unique, selection)
        with atomic_dir(Layout(root).curated) as folder:
            pack(pool, selection.chosen, rejected, folder, config.max_shard_mib * 2**20, config.workers)
            gates.all_accounted(docs, folder, inputs.pool)
            gates.validate_curated(docs, folder, licenses, previous.drift)
    kept = _images(inputs, selection.chosen["row"].to_numpy())
    remember(previous, kept)
    candidate_step = [("candidates", len(candidates))] if len(candidates) < len(rows) else []  # without queries
    first = [("pool", len(inputs.pool)), ("filtered", len(rows)), *candidate_step]
    funnel = [*first, *unique.funnel, ("curated", len(kept))]
    result = Curation(config, inputs, funnel, pool, unique, selection, rejected, docs.passed, previous.note)
    write_report(result, root, Layout(root).report("curate"))
    write_checks(Layout(root).report("curate") / VALIDATION, docs.passed)
    for line in left_out_lines(config, inputs, rejected):
        log.info(line)
    return _figures(result)


def _images(inputs: Inputs, rows: np.ndarray) -> pa.Table:
    return inputs.pool.take(pa.array(rows))


def _with_findings(root: Path, inputs: Inputs, unique: Unique, selection: Selection) -> Pool:
    """Return the pool with the findings of each image: duplicate group, clusters, scores."""
    count = len(inputs.pool)
    keeper, paths = np.full(count, -1, np.int64), np.full(count, None, object)
    keeper[unique.compared] = unique.compared[unique.groups.keeper]
    paths[selection.clustered] = selection.paths
    group_id = inputs.pool["image_id"].combine_chunks().take(pa.array(keeper, mask=keeper < 0))
    faces = inputs.scores["faces"]
    columns = {name: inputs.scores[name] for name in ("gray_share", "entropy", "nsfw")}
    columns |= {"cluster_path": pa.array(paths, pa.string()), "num_faces": pc.list_value_length(faces)}
    findings = pa.table({field.name: columns[field.name] for field in FINDINGS})
    return Pool(root / POOL, inputs.pool, group_id, findings, faces)


def _figures(result: Curation) -> dict[str, Any]:
    """Return the stage's metrics."""
    sample = result.selection.sample
    levels = {f"level_{number}": level for number, level in enumerate(sample.levels if sample else (), 1)}
    return {
        "images": dict(result.funnel),
        "origins": value_counts(result.selection.chosen["origin"]),
        "rejected": value_counts(result.rejected["reason"]),
        "evaluation_copies": result.unique.contamination.per_set,
        "index_recall": result.recalls,
        "clusters": {name: len(level.before) for name, level in levels.items()},
        "evenness": {
            name: {"before": evenness(level.before), "after": evenness(level.after)} for name, level in levels.items()
        },
    }
