"""Compose the curated set of seed sets, retrieved images, and a balanced sample of the rest.

DINOv2 (arXiv 2304.07193), appendix A.4 for the first two; DINOv3 (arXiv 2508.10104), section 3.1, found the mix with a
sample balanced by hierarchical k-means better than each part alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.curation.cluster import Hierarchy, hierarchical_kmeans
from components.curation.config import CurateConfig, CurationError, SeedSetConfig
from components.curation.inputs import Inputs
from components.curation.pack import CHOSEN_SCHEMA
from components.curation.rejections import rejections
from components.curation.retrieve import CompositionRow, Retrieval, SeedSet, retrieve
from components.curation.sample import balanced_sample

Rows = NDArray[np.int64]  # of the pool, ascending


@dataclass(frozen=True)
class Clusters:
    """One level of the hierarchy."""

    before: NDArray[np.int64]  # [C] candidates of each cluster
    after: NDArray[np.int64]  # [C] sampled images


@dataclass(frozen=True)
class Sample:
    """The balanced part."""

    drawn: Rows  # including images that another part also has
    top_labels: NDArray[np.int64]  # top-level cluster of each drawn image
    levels: list[Clusters]  # from the images up


@dataclass(frozen=True)
class Selection:
    """Chosen and rejected images of the composition."""

    chosen: pa.Table  # rows of CHOSEN_SCHEMA, by row
    rejected: pa.Table  # of the others
    clustered: Rows  # empty if nothing needs clusters
    paths: list[str]  # clusters of each clustered image, from the top down
    sample: Sample | None  # None: no balanced part
    parts: list[CompositionRow]  # Table 15, and the balanced sample
    recall: float  # of the retrieval index, see `Neighbors`


def find_seeds(pool: pa.Table, rows: Rows, configs: dict[str, SeedSetConfig]) -> dict[str, SeedSet]:
    """Find the rows of each seed set, which is a source of the pool.

    Args:
        pool: manifest.
        rows: that passed the filters.
        configs: by source.

    Raises:
        CurationError: a seed set has no images, or all images are queries only.
    """
    sources = pool["source"].to_numpy()[rows]
    found = {name: SeedSet(rows[sources == name], config) for name, config in configs.items()}
    for name, seeds in found.items():
        if not len(seeds.rows):
            known = ", ".join(sorted(set(pool["source"].to_pylist())))
            raise CurationError(f"curate.seed_sets.{name}: no image of such a source; sources of the pool: {known}")
    if len(rows_of(found, as_is=False)) == len(rows):
        raise CurationError("curate.seed_sets: all images only ask for images like theirs; set as_is: true for one set")
    return found


def rows_of(seeds: dict[str, SeedSet], as_is: bool) -> Rows:
    """Return the rows of seed sets that are included as they are, or of those used as queries only."""
    parts = [one.rows for one in seeds.values() if one.config.as_is == as_is]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))


def select(inputs: Inputs, unique: Rows, seeds: dict[str, SeedSet], config: CurateConfig, seed: int) -> Selection:
    """Cluster the candidates, retrieve and sample from them, and combine the parts.

    An image in several parts is attributed to the first: seeds, then retrieved images, then the sample.

    Args:
        inputs: the pool and its embeddings.
        unique: candidate rows of the pool.
        seeds: the seed sets.
        config: section `curate`.
        seed: of k-means and sampling.

    Raises:
        CurationError: the result is empty, or the index finds too few of the exact neighbors.
    """
    taken, asking = np.intersect1d(unique, rows_of(seeds, as_is=True)), rows_of(seeds, as_is=False)
    vectors, hierarchy, sample = inputs.semantic, None, None
    candidates, labels = np.zeros(len(vectors), bool), np.full(len(vectors), -1, np.int64)
    candidates[np.setdiff1d(unique, taken)] = True
    clustered = np.union1d(unique, asking) if config.needs_clusters else unique[:0]
    if config.needs_clusters:
        hierarchy = hierarchical_kmeans(vectors, config.levels, config.kmeans_iterations, seed, clustered)
        labels[clustered] = hierarchy.labels[0]
    retrieval = retrieve(vectors, candidates, labels, seeds, config.index, np.random.default_rng([seed, 1]))
    if hierarchy is not None and config.target_images != 0:
        places = np.flatnonzero(candidates[clustered])
        rest = replace(hierarchy, labels=[hierarchy.labels[0][places], *hierarchy.labels[1:]])
        sample = _draw(rest, clustered[places], config.target_images, np.random.default_rng([seed, 2]))

    chosen = _put_together(inputs.pool, _by_set(taken, seeds), retrieval, sample.drawn if sample else unique[:0])
    if not len(chosen):
        advice = "lower curate.seed_sets.NAME.min_seeds, or raise curate.target_images from 0"
        raise CurationError(f"no image is left of {len(unique)}: the seed sets bring none in; {advice}")
    paths = hierarchy.paths() if hierarchy else []
    out = np.setdiff1d(unique, chosen["row"].to_numpy())
    where = [f"cluster {paths[place]}" for place in np.searchsorted(clustered, out)] if paths else "no clusters made"
    rejected = [rejections(out, "not_sampled" if sample else "not_retrieved", where)]
    for name, rows in _by_set(asking, seeds).items():
        rejected.append(rejections(rows, "only_a_query", f"seed set {name}"))
    parts = _composition(chosen, retrieval, sample)
    return Selection(chosen, pa.concat_tables(rejected), clustered, paths, sample, parts, retrieval.recall)


def _draw(hierarchy: Hierarchy, rows: Rows, target: int | None, generator: np.random.Generator) -> Sample:
    """Sample `target` of the clustered rows in balance; None: all."""
    target = len(rows) if target is None else target
    drawn = balanced_sample(hierarchy, target, generator) if len(rows) else rows
    ancestors = _ancestors(hierarchy)
    return Sample(rows[drawn], ancestors[-1][drawn], _levels(hierarchy, ancestors, drawn))


def _by_set(rows: Rows, seeds: dict[str, SeedSet]) -> dict[str, Rows]:
    """Split rows by seed set."""
    return {name: rows[np.isin(rows, one.rows)] for name, one in seeds.items()}


def _put_together(pool: pa.Table, taken: dict[str, Rows], retrieval: Retrieval, sample: Rows) -> pa.Table:
    """Concatenate the parts in order of precedence, each image once: rows of CHOSEN_SCHEMA."""
    parts = [_part(rows, "seed", pa.array([name] * len(rows), pa.string())) for name, rows in taken.items()]
    retrieved = _part(retrieval.row, "retrieved", pa.array(retrieval.seed_set, pa.string()))
    query_ids = pool["image_id"].take(pa.array(retrieval.query_row))
    retrieved = retrieved.set_column(3, CHOSEN_SCHEMA.field(3), query_ids)
    retrieved = retrieved.set_column(4, CHOSEN_SCHEMA.field(4), pa.array(retrieval.similarity))
    rest = _part(sample, "balanced", pa.nulls(len(sample), pa.string()))
    together = pa.concat_tables([*parts, retrieved, rest])
    return together.take(pa.array(np.unique(together["row"].to_numpy(), return_index=True)[1]))


def _part(rows: Rows, origin: str, seed_set: pa.Array) -> pa.Table:
    count = len(rows)
    origins = pa.array([origin] * count, pa.string())
    none = pa.nulls(count, pa.string()), pa.nulls(count, pa.float32())
    return pa.Table.from_arrays([pa.array(rows), origins, seed_set, *none], schema=CHOSEN_SCHEMA)


def _composition(chosen: pa.Table, retrieval: Retrieval, sample: Sample | None) -> list[CompositionRow]:
    """Return the rows of Table 15 with final counts, and one for the sample, if there is one."""
    origins, names = chosen["origin"].to_numpy(), chosen["seed_set"].to_numpy()
    rows = []
    for row in retrieval.composition:
        origin = "seed" if row.mode == "as is" else "retrieved"
        rows.append(replace(row, final=int(((origins == origin) & (names == row.seed_set)).sum())))
    if sample is not None:
        drawn, final = len(sample.drawn), int((origins == "balanced").sum())
        rows.append(CompositionRow("the rest of the pool", 0, "balanced", drawn, drawn - final, final))
    return rows


def _ancestors(hierarchy: Hierarchy) -> list[NDArray[np.int64]]:
    """Return [N] the cluster of each point, for each level from the finest up."""
    labels = [hierarchy.labels[0]]
    for parents in hierarchy.labels[1:]:
        labels.append(parents[labels[-1]])
    return labels


def _levels(hierarchy: Hierarchy, labels: list[NDArray[np.int64]], drawn: NDArray[np.int64]) -> list[Clusters]:
    sizes = [len(centroids) for centroids in hierarchy.centroids]
    return [
        Clusters(np.bincount(all_, minlength=size), np.bincount(all_[drawn], minlength=size))
        for all_, size in zip(labels, sizes, strict=True)
    ]
