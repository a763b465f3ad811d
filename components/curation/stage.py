"""The stages `embed` and `curate`: from a pool of images to a curated set, and why each image is in or out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.core.storage import atomic_dir, write_json
from components.curation.cluster import cluster
from components.curation.config import CurateConfig, EmbedConfig
from components.curation.decontaminate import References, find_contamination
from components.curation.deduplicate import Groups, group_duplicates, near_duplicates
from components.curation.embed import (
    COPIES,
    SCORES,
    SEMANTIC,
    EmbeddingsError,
    Part,
    embed_collection,
    images_digest,
    read_embeddings,
    write_parts,
)
from components.curation.embedders import resolve
from components.curation.filters import filter_images
from components.curation.pack import CHOSEN_SCHEMA, Pool, pack
from components.curation.rejections import CurationError, reason_counts, rejections, remaining
from components.curation.report import Curation, write_report
from components.curation.sample import balanced_sample
from components.curation.scores import load_scorer
from components.data.curation_gates import all_accounted, validate_curated
from components.data.expectations import DataDocs
from components.data.manifest import FINDINGS, read_collection

log = logging.getLogger(__name__)

POOL, EVALUATION = Path("data/pool"), Path("data/evaluation")
EMBEDDINGS, CURATED = Path("data/embeddings"), Path("data/curated")
EMBEDDER = "embedder.json"
CACHE = Path(".pedigree/cache/embeddings")
REPORTS, DATA_DOCS = Path("reports/curate"), Path(".pedigree/data-docs/curated")


def embed(config: EmbedConfig, root: Path, seed: int) -> dict[str, Any]:
    """Embed and score the pool, embed the evaluation sets; shards that were seen before come from the cache.

    Args:
        config: section `embed`.
        root: the workspace.
        seed: unused, embeddings have no randomness; every stage takes one.
    """
    del seed
    pool, evaluation = _collections(root)
    parts: dict[str, Part] = {COPIES: resolve(config.embedder, root), SCORES: load_scorer(config.scores, root)}
    if config.semantic is not None:
        parts[SEMANTIC] = resolve(config.semantic, root, "embed.semantic")
    asked = ((POOL, pool, parts), (EVALUATION, evaluation, {COPIES: parts[COPIES]}))
    done = {
        folder.name: embed_collection(root / folder, images, its_parts, root / CACHE, config.workers)
        for folder, images, its_parts in asked
    }
    with atomic_dir(root / EMBEDDINGS) as folder:
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
    """Filter, find duplicates and evaluation copies, cluster, sample in balance, pack and report.

    Components that touch an evaluation image go before one image is kept of each other component: what stays is
    the same as in the paper's order, and every copy of an evaluation image is reported as one.

    Args:
        config: section `curate`.
        root: the workspace.
        seed: of k-means and of sampling.
    """
    pool, evaluation = _collections(root)
    embeddings, references = _embeddings(root, pool, evaluation)
    funnel = [("pool", len(pool))]

    filtered = filter_images(pool, config.filters)
    rows = remaining(np.arange(len(pool)), filtered, "loosen curate.filters")
    funnel.append(("filtered", len(rows)))

    images, vectors = pool.take(pa.array(rows)), embeddings[rows]
    groups = group_duplicates(vectors, images, config.num_neighbors, config.dedup_similarity)
    contamination = find_contamination(groups, rows, vectors, references, config.decontamination_similarity)
    clean = remaining(rows, contamination.rejected, "raise curate.decontamination_similarity, or add other images")
    funnel.append(("decontaminated", len(clean)))

    duplicates = near_duplicates(groups, rows, vectors, images, config.dedup_similarity)
    duplicates = duplicates.filter(pa.array(np.isin(duplicates["row"].to_numpy(), clean)))
    unique = remaining(clean, duplicates, "raise curate.dedup_similarity")
    funnel.append(("deduplicated", len(unique)))

    labels = cluster(embeddings[unique], config.num_clusters, config.kmeans_iterations, seed)
    sampled = np.arange(len(unique))
    if config.target_images is not None:
        sampled = balanced_sample(labels, config.target_images, np.random.default_rng(seed))
    left_out = np.setdiff1d(np.arange(len(unique)), sampled)
    detail = [f"cluster {label}" for label in labels[left_out]]
    rejected = pa.concat_tables(
        [filtered, contamination.rejected, duplicates, rejections(unique[left_out], "not_sampled", detail)]
    )
    kept = unique[sampled]
    funnel.append(("sampled", len(kept)))

    chosen = pa.Table.from_pylist([{"row": row, "origin": "balanced"} for row in kept.tolist()], CHOSEN_SCHEMA)
    whole = Pool(root / POOL, pool, _group_ids(pool, rows, groups), _findings(len(pool), unique, labels))
    with DataDocs(root / DATA_DOCS) as docs, atomic_dir(root / CURATED) as folder:
        pack(whole, chosen, rejected, folder, config.max_shard_mib * 2**20)
        all_accounted(docs, folder, pool)
        validate_curated(docs, folder, None, None)
    write_report(
        Curation(config, funnel, pool, evaluation, kept, rejected, groups.nearest, contamination, labels, sampled),
        root / POOL,
        root / EVALUATION,
        root / REPORTS,
    )
    return {
        "images": dict(funnel),
        "rejected": reason_counts(rejected),
        "evaluation_copies": contamination.per_set,
        "clusters": int(labels.max()) + 1,
    }


def _group_ids(pool: pa.Table, rows: np.ndarray, groups: Groups) -> pa.Array:
    """[N] the id of the image that is kept for each one's group of duplicates; null for what was not grouped."""
    keeper = np.full(len(pool), -1, np.int64)
    keeper[rows] = rows[groups.keeper]
    return pool["image_id"].combine_chunks().take(pa.array(keeper, mask=keeper < 0))


def _findings(count: int, rows: np.ndarray, labels: np.ndarray) -> pa.Table:
    """[N] the columns FINDINGS."""
    paths = np.full(count, None, object)
    paths[rows] = [str(label) for label in labels]
    columns = {field.name: pa.nulls(count, field.type) for field in FINDINGS}
    return pa.table(columns | {"cluster_path": pa.array(paths, pa.string())})


def _collections(root: Path) -> tuple[pa.Table, pa.Table]:
    """The manifests of the pool and of the evaluation sets.

    Raises:
        CurationError: there is no pool, or no image in it.
    """
    if not (root / POOL).is_dir():
        raise CurationError(f"{root / POOL}: no pool yet; take images in first: pedigree ingest SOURCE --name NAME")
    pool = read_collection(root / POOL)
    if not len(pool):
        raise CurationError(f"{root / POOL}: the pool has no images; take some in: pedigree ingest SOURCE --name NAME")
    evaluation = read_collection(root / EVALUATION)
    if not len(evaluation):
        log.warning("%s: no evaluation images, so nothing is decontaminated", root / EVALUATION)
    return pool, evaluation


def _embeddings(root: Path, pool: pa.Table, evaluation: pa.Table) -> tuple[np.ndarray, References]:
    """[N, D] of the pool, and the evaluation images with theirs.

    Raises:
        EmbeddingsError: there are none, or they belong to other images.
    """
    path = root / EMBEDDINGS / EMBEDDER
    if not path.is_file():
        raise EmbeddingsError(f"{path}: no embeddings yet; run the stage embed first")
    made_for = json.loads(path.read_text())
    for folder, images in ((POOL, pool), (EVALUATION, evaluation)):
        if made_for.get(folder.name) != images_digest(images):
            raise EmbeddingsError(f"{path}: {folder} changed after it was embedded; run the stage embed again")
    folder = root / EMBEDDINGS / COPIES
    references = References(evaluation, read_embeddings(folder / f"{EVALUATION.name}.npy", evaluation))
    return read_embeddings(folder / f"{POOL.name}.npy", pool), references
