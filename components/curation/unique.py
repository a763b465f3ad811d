"""Keep one image of each group of duplicates, and none that matches an evaluation image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.curation import gates
from components.curation.config import CurateConfig
from components.curation.decontaminate import Contamination, find_contamination
from components.curation.deduplicate import Groups, group_duplicates, near_duplicates
from components.curation.inputs import Inputs
from components.curation.neighbors import VectorRows
from components.curation.rejections import remaining
from components.data.expectations import DataDocs


@dataclass(frozen=True)
class Unique:
    """Images left after deduplication and decontamination; rows refer to the pool."""

    rows: NDArray[np.int64]  # [U] left
    compared: NDArray[np.int64]  # [F] images of `groups` and `contamination`
    groups: Groups
    contamination: Contamination
    rejected: pa.Table
    funnel: list[tuple[str, int]]  # step, images left after it

    @property
    def recalls(self) -> dict[str, float]:
        """Recall of each searched index, see `Neighbors`."""
        sets = {f"evaluation set {name}": recall for name, recall in self.contamination.recall.items()}
        return {"duplicates in the pool": self.groups.recall} | sets


def drop_copies(inputs: Inputs, rows: NDArray[np.int64], first: NDArray[np.int64], config: CurateConfig) -> Unique:
    """Group duplicates, drop groups that match an evaluation image, and keep one image of each other group.

    Matching groups are dropped before keepers are chosen: the result equals that of the paper's order, and every copy
    of an evaluation image is reported as such.

    Args:
        inputs: the pool and its embeddings.
        rows: of the pool, ascending, to compare.
        first: preferred keepers.
        config: section `curate`.

    Raises:
        CurationError: nothing is left, or an index misses too many pairs.
    """
    images = inputs.pool.take(pa.array(rows))
    vectors = VectorRows(inputs.copies, rows)
    groups = group_duplicates(
        vectors, images, config.num_neighbors, config.dedup_similarity, config.index, np.isin(rows, first)
    )
    contamination = find_contamination(
        groups, rows, vectors, inputs.references, config.decontamination_similarity, config.index
    )
    clean = remaining(rows, contamination.rejected, "raise curate.decontamination_similarity, or add other images")
    duplicates = near_duplicates(groups, rows, vectors, images, config.dedup_similarity)
    duplicates = duplicates.filter(pa.array(np.isin(duplicates["row"].to_numpy(), clean)))
    unique = remaining(clean, duplicates, "raise curate.dedup_similarity")
    funnel = [("decontaminated", len(clean)), ("deduplicated", len(unique))]
    rejected = pa.concat_tables([contamination.rejected, duplicates])
    return Unique(unique, rows, groups, contamination, rejected, funnel)


def check_copies(docs: DataDocs, inputs: Inputs, unique: Unique, config: CurateConfig) -> None:
    """Check the remaining images; allow as many violations as the measured recall of the index explains.

    Raises:
        DatasetError: with the rows that are too similar.
    """
    left = gates.Embedded(inputs.pool.take(pa.array(unique.rows)), inputs.copies, unique.rows)
    gates.after_dedup(docs, left, gates.Limit(config.dedup_similarity, 1 - unique.groups.recall))
    references = inputs.references
    evaluation = gates.Embedded(references.images, references.embeddings, np.arange(len(references.images)))
    missed = 1 - min(unique.contamination.recall.values(), default=1.0)
    gates.after_decontamination(docs, left, evaluation, gates.Limit(config.decontamination_similarity, missed))
