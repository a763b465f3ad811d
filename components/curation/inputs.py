"""Inputs of curation: the collections and their embeddings."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.layout import RELATIVE, Layout
from components.curation.config import CurationError
from components.curation.decontaminate import References
from components.curation.embed import COPIES, SCORES, SEMANTIC, images_digest, read_embeddings, read_scores
from components.data.manifest import read_collection

log = logging.getLogger(__name__)

POOL, EVALUATION = RELATIVE.pool, RELATIVE.evaluation
EMBEDDER = "embedder.json"  # among the embeddings


@dataclass(frozen=True)
class Inputs:
    """The pool and the evaluation sets with their embeddings, in manifest order."""

    pool: pa.Table  # [N]
    evaluation: pa.Table  # [R]
    copies: NDArray[np.float32]  # [N, D] for copy detection
    references: References
    semantic: NDArray[np.float32]  # [N, D'] for clustering and retrieval
    scores: pa.Table  # [N]


def read_collections(root: Path) -> tuple[pa.Table, pa.Table]:
    """Read the manifests of the pool and of the evaluation sets.

    Raises:
        CurationError: there is no pool, or it is empty.
    """
    if not (root / POOL).is_dir():
        raise CurationError(f"{root / POOL}: no pool yet; add images first: pedigree ingest SOURCE --name NAME")
    pool = read_collection(root / POOL)
    if not len(pool):
        raise CurationError(f"{root / POOL}: the pool has no images; take some in: pedigree ingest SOURCE --name NAME")
    evaluation = read_collection(root / EVALUATION)
    if not len(evaluation):
        log.warning("%s: no evaluation images, so nothing is decontaminated", root / EVALUATION)
    return pool, evaluation


def read_inputs(root: Path) -> Inputs:
    """Read all inputs of the stage `curate`.

    Raises:
        CurationError: the pool is missing or empty, or there are no embeddings of exactly its images.
    """
    pool, evaluation = read_collections(root)
    path = Layout(root).embeddings / EMBEDDER
    if not path.is_file():
        raise CurationError(f"{path}: no embeddings yet; run the stage embed first")
    made_for = json.loads(path.read_text())
    for folder, images in ((POOL, pool), (EVALUATION, evaluation)):
        if made_for.get(folder.name) != images_digest(images):
            raise CurationError(f"{path}: {folder} changed after it was embedded; run the stage embed again")
    folder = Layout(root).embeddings
    copies = read_embeddings(folder / COPIES / f"{POOL.name}.npy", pool)
    references = References(evaluation, read_embeddings(folder / COPIES / f"{EVALUATION.name}.npy", evaluation))
    semantic = copies
    if made_for["config"]["semantic"] is not None:
        semantic = read_embeddings(folder / SEMANTIC / f"{POOL.name}.npy", pool)
    return Inputs(
        pool, evaluation, copies, references, semantic, read_scores(folder / SCORES / f"{POOL.name}.parquet", pool)
    )
