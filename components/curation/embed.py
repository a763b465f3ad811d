"""Embeddings of a collection, shard by shard: what the cache holds is not computed again."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.core.engine import map_shards
from components.core.storage import sha256_file, write_bytes
from components.curation.embedders import Embedder, EmbedderError, load
from components.data.shards import ImageError, ShardReader, decode_image

log = logging.getLogger(__name__)


class EmbeddingsError(ValueError):
    """Embeddings that are missing, or do not belong to the images they are read for."""


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard, and where their embeddings are kept."""

    collection: Path
    shard: str
    image_ids: list[str]
    offsets: list[int]  # bytes
    lengths: list[int]
    cache: Path
    embedder: Embedder


@dataclass(frozen=True)
class EmbeddedShard:
    """One shard's embeddings in the cache."""

    shard: str
    path: Path
    fresh: bool  # computed now, not found


def embed_collection(
    collection: Path, images: pa.Table, embedder: Embedder, cache: Path, workers: int | None
) -> list[EmbeddedShard]:
    """Embed every shard of a collection into `cache`, whose entries are named by the shard's SHA-256.

    Args:
        collection: folder below which the shards lie.
        images: its manifest, as `read_collection` gives it.
        embedder: resolved; loaded once in each worker.
        cache: folder for this embedder only.
        workers: processes, see `map_shards`.
    """
    tasks = [
        ShardTask(
            collection,
            shard,
            rows["image_id"].to_pylist(),
            rows["offset"].to_pylist(),
            rows["length"].to_pylist(),
            cache,
            embedder,
        )
        for shard, rows in split_by_shard(images)
    ]
    done = map_shards(embed_shard, tasks, workers=workers, what=f"embedding {collection.name}")
    fresh = sum(item.fresh for item in done)
    log.info("%s: %d shards embedded, %d taken from the cache", collection.name, fresh, len(done) - fresh)
    return done


def embed_shard(task: ShardTask) -> EmbeddedShard:
    """Embed one shard, or find that it has been; the file appears whole, so a killed run loses this shard at most."""
    path = task.cache / f"{sha256_file(task.collection / task.shard)}.npy"
    if _num_rows(path) == len(task.image_ids):
        return EmbeddedShard(task.shard, path, fresh=False)
    buffer = io.BytesIO()
    np.save(buffer, _embeddings(task))
    write_bytes(path, buffer.getvalue())
    return EmbeddedShard(task.shard, path, fresh=True)


def write_embeddings(shards: list[EmbeddedShard], folder: Path) -> None:
    """Copy embeddings out of the cache to `<folder>/<shard>.npy`."""
    for item in shards:
        target = folder / f"{item.shard}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item.path, target)


def read_embeddings(folder: Path, images: pa.Table) -> NDArray[np.float32]:
    """Embeddings of all images of a manifest, in its order.

    Returns:
        [N, D] float32 of unit norm; [0, 0] for an empty manifest.

    Raises:
        EmbeddingsError: a shard without embeddings, or with another number of them than it has images.
    """
    parts = []
    for shard, rows in split_by_shard(images):
        path = folder / f"{shard}.npy"
        if not path.is_file():
            raise EmbeddingsError(f"{path}: no such file: the images changed after they were embedded; run embed again")
        part = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(part) != len(rows):
            raise EmbeddingsError(f"{path}: {len(part)} embeddings for {len(rows)} images; run embed again")
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def images_digest(images: pa.Table) -> str:
    """SHA-256 over the image ids in order: which images, in which order, a set of embeddings belongs to."""
    digest = hashlib.sha256()
    for image_id in images["image_id"].to_pylist():
        digest.update(image_id.encode())
    return digest.hexdigest()


def split_by_shard(images: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each shard, in manifest order.

    Raises:
        EmbeddingsError: the rows of a shard do not stand together.
    """
    shards = images["shard"].combine_chunks().dictionary_encode()
    codes = np.asarray(shards.indices)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    if len(starts) > len(shards.dictionary):
        raise EmbeddingsError("the manifest is not in the order of its shards; it was not written by ingest")
    for start, end in zip(starts, [*starts[1:], len(codes)][: len(starts)], strict=True):
        yield shards.dictionary[int(codes[start])].as_py(), images.slice(start, end - start)


def _embeddings(task: ShardTask) -> NDArray[np.float32]:
    """[n, D] float32 of unit norm."""
    embed = load(task.embedder)
    reader = ShardReader(task.collection)
    step = task.embedder.batch_size
    parts = []
    for start in range(0, len(task.image_ids), step):
        batch = [_decode(reader, task, i) for i in range(start, min(start + step, len(task.image_ids)))]
        parts.append(embed(batch))
    vectors = np.concatenate(parts)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise EmbedderError(
            f"the embedder gave zero or non-finite values for {len(bad)} images, first {task.image_ids[bad[0]]}"
        )
    return (vectors / norms).astype(np.float32)


def _decode(reader: ShardReader, task: ShardTask, i: int):
    try:
        return decode_image(reader.read(task.shard, task.offsets[i], task.lengths[i]))
    except ImageError as error:
        where = f"{task.collection / task.shard}: image {task.image_ids[i]}"
        raise EmbeddingsError(f"{where}: {error}; the shard is not what ingest wrote") from None


def _num_rows(path: Path) -> int | None:
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
