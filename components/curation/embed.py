"""Decode, embed and score each image of a collection once, with a cache of results per shard."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from components.core.engine import map_shards
from components.core.storage import sha256_file, write_bytes
from components.curation.config import CurationError
from components.curation.embedders import Embedder, load
from components.curation.scores import SCORES_SCHEMA, Scorer
from components.data.manifest import read_table
from components.data.shards import ImageError, ShardReader, decode_image

log = logging.getLogger(__name__)

COPIES, SEMANTIC, SCORES = "copies", "semantic", "scores"  # folders of data/embeddings
PENDING_PIXELS = 50_000_000  # limit of decoded images that wait for a full batch, before the last one

Part = Embedder | Scorer  # something computed from each image
Made = TypeVar("Made")


@dataclass(frozen=True)
class ShardTask:
    """Images of one shard, what to compute from them, and the cache."""

    collection: Path
    shard: str
    rows: pa.Table  # [n] image_id, offset, length; a copy, because pickling a slice sends the whole table
    parts: Mapping[str, Part]
    cache: Path


@dataclass(frozen=True)
class EmbeddedShard:
    """Cached results of one shard, by part name."""

    num_images: int
    paths: Mapping[str, Path]
    fresh: bool  # whether something was computed now


def embed_collection(
    collection: Path, images: pa.Table, parts: Mapping[str, Part], cache: Path, workers: int | None
) -> list[EmbeddedShard]:
    """Embed and score every shard of a collection into `cache`.

    Args:
        collection: base folder of the shards.
        images: its manifest, from `read_collection`.
        parts: by name; models are loaded once per worker.
        cache: parent folder of the caches of all embedders and scorers, which are named by digest.
        workers: processes, see `map_shards`.
    """
    tasks = [
        ShardTask(collection, shard, rows.take(pa.array(range(len(rows)))), parts, cache)
        for shard, rows in split_by_shard(images.select(["image_id", "shard", "offset", "length"]))
    ]
    done = map_shards(embed_shard, tasks, workers=workers, what=f"embedding {collection.name}")
    fresh = sum(item.fresh for item in done)
    log.info("%s: %d shards embedded, %d taken from the cache", collection.name, fresh, len(done) - fresh)
    return done


def embed_shard(task: ShardTask) -> EmbeddedShard:
    """Compute the missing results of one shard; files are written atomically, so a killed run loses one shard."""
    reader = ShardReader(task.collection)
    reader.read(task.shard, 0, 0)  # raises if the shard is missing or outside of the collection
    key = _key(task)
    paths = {name: _kept(task.cache, part, key) for name, part in task.parts.items()}
    missing = {name: task.parts[name] for name, path in paths.items() if _num_rows(path) != len(task.rows)}
    if missing:
        for name, data in _compute(task, reader, missing).items():
            write_bytes(paths[name], data)
    return EmbeddedShard(len(task.rows), paths, fresh=bool(missing))


def write_parts(shards: Sequence[EmbeddedShard], folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Concatenate a collection's shards from the cache, one file per part, one shard in memory at a time.

    Args:
        shards: of the collection, in manifest order.
        folder: receives `copies/<name>.npy`, `semantic/<name>.npy` and `scores/<name>.parquet`, if present.
        name: of the collection.

    Returns:
        The shape of each part: (N, D), or (N,) for scores.
    """
    shapes = {}
    for part in shards[0].paths if shards else ():
        (folder / part).mkdir(exist_ok=True)
        paths = [item.paths[part] for item in shards]
        if part == SCORES:
            shapes[part] = _write_tables(paths, folder / part / f"{name}.parquet")
        else:
            shapes[part] = _write_vectors(paths, folder / part / f"{name}.npy")
    return shapes


def read_embeddings(path: Path, images: pa.Table) -> NDArray[np.float32]:
    """Open the embeddings of all images of a manifest, in its order, memory-mapped.

    Returns:
        [N, D] float32 of unit norm; [0, 0] for an empty manifest.

    Raises:
        CurationError: the file is missing or damaged, or its length differs from the manifest's.
    """
    if not len(images):
        return np.zeros((0, 0), np.float32)
    if not path.is_file():
        raise CurationError(f"{path}: no such file; run the stage embed again")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CurationError(f"{path}: damaged ({str(error).splitlines()[0]}); run the stage embed again") from None
    if vectors.ndim != 2 or len(vectors) != len(images):
        raise CurationError(f"{path}: holds {vectors.shape} for {len(images)} images; run the stage embed again")
    return vectors


def read_scores(path: Path, images: pa.Table) -> pa.Table:
    """Read the scores of all images of a manifest, in its order: [N] rows of `SCORES_SCHEMA`.

    Raises:
        DatasetError: the file is missing or damaged.
        CurationError: the scores belong to other images.
    """
    scores = read_table(path, SCORES_SCHEMA)
    if not scores["image_id"].equals(images["image_id"]):
        raise CurationError(f"{path}: these are the scores of other images; run the stage embed again")
    return scores


def images_digest(images: pa.Table) -> str:
    """Return the SHA-256 over the ordered image ids, which identifies the images of a set of embeddings."""
    digest = hashlib.sha256()
    for batch in images.select(["image_id"]).to_batches(max_chunksize=65_536):
        digest.update("".join(batch["image_id"].to_pylist()).encode())
    return digest.hexdigest()


def split_by_shard(images: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield each shard with its rows, in manifest order.

    Raises:
        CurationError: the rows of a shard are not contiguous.
    """
    shards = images["shard"].combine_chunks().dictionary_encode()
    codes = np.asarray(shards.indices)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    if len(starts) > len(shards.dictionary):
        raise CurationError("the manifest is not in the order of its shards; it was not written by ingest")
    for start, end in zip(starts, [*starts[1:], len(codes)][: len(starts)], strict=True):
        yield shards.dictionary[int(codes[start])].as_py(), images.slice(start, end - start)


def _key(task: ShardTask) -> str:
    """Return the SHA-256 over the shard's bytes and the places of its images, on which the results depend."""
    digest = hashlib.sha256(sha256_file(task.collection / task.shard).encode())
    for row in task.rows.to_pylist():
        digest.update(f"{row['image_id']} {row['offset']} {row['length']}\n".encode())
    return digest.hexdigest()


def _kept(cache: Path, part: Part, key: str) -> Path:
    if isinstance(part, Scorer):
        return cache / SCORES / part.digest / f"{key}.parquet"
    return cache / part.digest / f"{key}.npy"


class _Batches(Generic[Made]):
    """Collect images into batches, and the result of each batch."""

    def __init__(self, make: Callable[[list[Image.Image]], Made], size: int):
        self._make, self._size = make, size
        self._images: list[Image.Image] = []
        self._pixels = 0
        self.made: list[Made] = []

    def add(self, image: Image.Image) -> None:
        self._images.append(image)
        self._pixels += image.width * image.height
        if len(self._images) == self._size or self._pixels > PENDING_PIXELS:
            self.flush()

    def flush(self) -> None:
        if self._images:
            self.made.append(self._make(self._images))
        self._images, self._pixels = [], 0


def _compute(task: ShardTask, reader: ShardReader, parts: Mapping[str, Part]) -> dict[str, bytes]:
    """Compute the file content of each part."""
    batches: dict[str, _Batches[Any]] = {
        name: _Batches(part.score, 1) if isinstance(part, Scorer) else _Batches(load(part), part.batch_size)
        for name, part in parts.items()
    }
    for row in task.rows.to_pylist():
        image = _decode(reader, task, row)
        for collected in batches.values():
            collected.add(image)
    files = {}
    for name, collected in batches.items():
        collected.flush()
        part = parts[name]
        files[name] = (_scores_file if isinstance(part, Scorer) else _vectors_file)(
            collected.made, task.rows["image_id"]
        )
    return files


def _vectors_file(made: list[NDArray[np.float32]], image_ids: pa.ChunkedArray) -> bytes:
    """Encode vectors as .npy, [n, D] float32 of unit norm."""
    vectors = np.concatenate(made)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise CurationError(
            f"the embedder gave zero or non-finite values for {len(bad)} images, first {image_ids[int(bad[0])]}"
        )
    buffer = io.BytesIO()
    np.save(buffer, (vectors / norms).astype(np.float32))
    return buffer.getvalue()


def _scores_file(made: list[dict[str, pa.Array]], image_ids: pa.ChunkedArray) -> bytes:
    columns = {name: pa.concat_arrays([scores[name] for scores in made]) for name in made[0]}
    buffer = io.BytesIO()
    table = pa.table({"image_id": image_ids} | columns, schema=SCORES_SCHEMA)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _decode(reader: ShardReader, task: ShardTask, row: Mapping[str, Any]) -> Image.Image:
    data = reader.read(task.shard, row["offset"], row["length"])
    where = f"{task.collection / task.shard}: image {row['image_id']}"
    if hashlib.sha256(data).hexdigest() != row["image_id"]:
        place = f"bytes {row['offset']} to {row['offset'] + row['length']}"
        raise CurationError(f"{where}: {place} are not this image; the shard or its manifest is damaged")
    try:
        return decode_image(data)
    except ImageError as error:
        raise CurationError(f"{where}: {error}; the shard is not what ingest wrote") from None


def _num_rows(path: Path) -> int | None:
    try:
        if path.suffix == ".parquet":
            return pq.read_metadata(path).num_rows
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None


def _write_vectors(paths: Sequence[Path], target: Path) -> tuple[int, ...]:
    shapes = [np.load(path, mmap_mode="r", allow_pickle=False).shape for path in paths]
    other = next((i for i, shape in enumerate(shapes) if shape[1] != shapes[0][1]), None)
    if other is not None:
        raise CurationError(f"{paths[other]}: {shapes[other][1]} values an image, but others have {shapes[0][1]}")
    whole = (sum(shape[0] for shape in shapes), shapes[0][1])
    with target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": whole})
        for path in paths:
            file.write(np.load(path, allow_pickle=False).tobytes())
    return whole


def _write_tables(paths: Sequence[Path], target: Path) -> tuple[int, ...]:
    count = 0
    with pq.ParquetWriter(target, SCORES_SCHEMA, compression="zstd") as writer:
        for path in paths:
            table = read_table(path, SCORES_SCHEMA)
            writer.write_table(table)
            count += len(table)
    return (count,)
