"""Features of all images of a folder as one Parquet file, in parts that a killed call leaves to the next.

What counts as an image is decided as by ingest, and the features are those of the evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.core.locks import try_lock
from components.core.progress import progress
from components.core.storage import disk_errors, sha256_file
from components.data.ingest_lines import source_lines
from components.data.shards import MAX_PIXELS, ImageError, decode_noted
from components.data.sources import Entry, EntryBatch, Listing, Refusal, list_source, read_batch
from components.model.config import Preprocessing, ViTConfig
from components.model.export import BACKBONE_FILE, load_backbone
from components.model.pooling import pooled
from components.model.preprocessing import center_crop, to_input

VERSION = 1  # raise it whenever a change here changes a part
BATCH_PATCHES = 2**13  # computed at once
LEFT_OUT = b"pedigree.left_out"  # of a part's metadata


@dataclass(frozen=True)
class FeatureRequest:
    """What is computed of each image.

    Attributes:
        weights: folder with model.safetensors and config.json.
        preprocessing: of the images, given the backbone's shape.
        patch_tokens: beside the class token.
        facts: of the weights' origin, for the file's metadata.
    """

    weights: Path
    preprocessing: Callable[[ViTConfig], Preprocessing]
    patch_tokens: bool
    facts: Mapping[str, str]


@dataclass(frozen=True)
class FolderFeatures:
    """What was written.

    Attributes:
        out: the file.
        images: rows in it.
        left_out: files that are not in it, by reason.
        ignored: hidden files and the like.
        resumed: files whose part an earlier call had made.
        notes: lines on what was left out, scaled or followed.
    """

    out: Path
    images: int
    left_out: dict[str, int]
    ignored: int
    resumed: int
    notes: tuple[str, ...]


def embed_folder(folder: str, out: Path, request: FeatureRequest) -> FolderFeatures:
    """Write the features of all images of a folder (or tar shards, or Parquet with images) to a Parquet file.

    Columns: `uri` relative to the folder, `image_id`, `width`, `height`, `cls_token` [D], `feature` [F] where the
    evaluation's is not the class token, and, if asked for, `patch_tokens` [P * D], rows of the patch grid one after
    another; float32, not normalized.

    Raises:
        ConfigError: `out` exists, or `folder` is not here.
        IngestError: a folder that is not there or that holds nothing to read.
        DatasetError: no image in it, or another call writes the same file.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; remove it, or name another by --out")
    if "://" in folder:
        raise ConfigError(f"{folder}: not a local folder; copy it here first, or `pedigree ingest` it")
    with _parts_folder(out) as parts, disk_errors(out):
        listing = list_source(folder, parts)
        model = _Model(request)
        paths, resumed = _compute_parts(listing, parts, model)
        left_out = _notes_of(paths, listing)
        images = _join(paths, parts / "whole", model.schema)
        counts = dict(sorted(Counter(refusal.reason for refusal in left_out).items()))
        notes = tuple(source_lines(listing, [], left_out))
        if not images:
            raise DatasetError("\n".join((f"{folder}: holds no image that can be decoded", *notes)))
        (parts / "whole").rename(out)
    return FolderFeatures(out, images, counts, listing.ignored.counts.total(), resumed, notes)


@contextmanager
def _parts_folder(out: Path) -> Iterator[Path]:
    """The folder of the parts beside the file, held by this call; it goes when the file is written."""
    folder = out.with_name(f".{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not try_lock(handle):
            raise DatasetError(f"{out}: another `pedigree embed` is writing it; wait until it has ended")
        yield folder
        shutil.rmtree(folder)
    finally:
        os.close(handle)


class _Model:
    """The backbone, and tables of what it makes of images."""

    def __init__(self, request: FeatureRequest) -> None:
        self.request, self.device = request, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = load_backbone(request.weights).to(self.device)
        shape = self.backbone.config
        self.preprocessing = request.preprocessing(shape)
        self.pooled = self.preprocessing.pooling != "cls"
        size = self.preprocessing.crop_size
        patches = (size // shape.patch_size) ** 2
        self.batch_size = max(BATCH_PATCHES // patches, 1)
        columns = [("uri", pa.string()), ("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        columns += [("cls_token", pa.list_(pa.float32(), shape.dim))]
        columns += [("feature", pa.list_(pa.float32(), self.preprocessing.feature_dim(shape)))] if self.pooled else []
        columns += [("patch_tokens", pa.list_(pa.float32(), patches * shape.dim))] if request.patch_tokens else []
        how = {
            "pedigree.preprocessing": self.preprocessing.model_dump_json(),
            "pedigree.grid": f"{size // shape.patch_size}",
        }
        self.schema = pa.schema(columns, metadata={**request.facts, **how})
        made_by = [VERSION, sha256_file(request.weights / BACKBONE_FILE), shape.model_dump(), how, request.patch_tokens]
        self.key = json.dumps(made_by, sort_keys=True)

    @torch.inference_mode()
    def tokens(self, crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Class tokens [B, D], features [B, F] if they are others, and patch tokens [B, P * D] if asked for."""
        images = to_input(torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2))
        layers = self.backbone.last_layers(images, self.preprocessing.num_layers(self.backbone.config))
        wanted, patches = [layers[-1].cls_token], [layer.patch_tokens for layer in layers]
        wanted += [pooled(wanted[0], patches, self.preprocessing.pooling)] if self.pooled else []
        wanted += [patches[-1].flatten(1)] if self.request.patch_tokens else []
        return [tokens.float().cpu().numpy() for tokens in wanted]


@dataclass(frozen=True)
class _Crop:
    """An image, ready for the network."""

    row: tuple[str, str, int, int]  # uri, image_id, width, height
    pixels: NDArray[np.uint8]  # [S, S, 3]
    notes: tuple[str, ...]


def _compute_parts(listing: Listing, parts: Path, model: _Model) -> tuple[list[Path], int]:
    """Make the parts that are missing; the paths of all, and the number of files whose parts were there."""
    paths = [parts / f"{_digest(batch, model.key)}.parquet" for batch in listing.batches]
    there = [_is_whole(path) for path in paths]
    sizes = [len(batch.entries) for batch in listing.batches]
    resumed = sum(size for size, found in zip(sizes, there, strict=True) if found)
    with progress("embedding", sum(sizes), "files", resumed) as advance:
        for batch, path, found in zip(listing.batches, paths, there, strict=True):
            if not found:
                table = _embed_batch(batch, listing.root, model)
                pq.write_table(table, parts / "part", compression="zstd", use_dictionary=False)
                (parts / "part").rename(path)
                advance(len(batch.entries))
    return paths, resumed


def _digest(batch: EntryBatch, key: str) -> str:
    """Names a part: by the model, and by its files' names, places, lengths and times."""
    entries = [(e.uri, e.offset, e.length, _time_of(e.path)) for e in batch.entries]
    return hashlib.sha256(json.dumps([key, batch.row_group, entries]).encode()).hexdigest()


def _time_of(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # gone since the folder was listed: its reader says so
        return 0


def _is_whole(path: Path) -> bool:
    with suppress(OSError, pa.ArrowException):
        pq.read_metadata(path)
        return True
    return False


def _embed_batch(batch: EntryBatch, root: str, model: _Model) -> pa.Table:
    rows: list[tuple[str, str, int, int]] = []
    made: list[list[NDArray[np.float32]]] = []
    refused, noted = list[Refusal](), list[tuple[str, str]]()
    for chunk in _ahead(_prepared(batch, root, model)):
        crops = [item for item in chunk if isinstance(item, _Crop)]
        refused += [item for item in chunk if isinstance(item, Refusal)]
        noted += [(note, crop.row[0]) for crop in crops for note in crop.notes]
        rows += [crop.row for crop in crops]
        if crops:
            made.append(model.tokens(np.stack([crop.pixels for crop in crops])))
    schema = model.schema
    columns: list[Any] = [pa.array(list(column), schema.types[i]) for i, column in enumerate(zip(*rows, strict=True))]
    for number, type_ in enumerate(schema.types[4:]):
        flat = np.concatenate([part[number].ravel() for part in made]) if made else np.empty(0, np.float32)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), type_.list_size))
    table = pa.table(columns, schema=schema) if rows else schema.empty_table()
    told = {"refused": [[r.uri, r.reason, r.detail] for r in refused], "noted": noted}
    return table.replace_schema_metadata({**(schema.metadata or {}), LEFT_OUT: json.dumps(told)})


def _prepared(batch: EntryBatch, root: str, model: _Model) -> Iterator[list[_Crop | Refusal]]:
    """The images of a batch, decoded and cropped by threads, as many at a time as the network takes."""
    entries = iter(read_batch(batch))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        while chunk := list(islice(entries, model.batch_size)):
            yield list(pool.map(lambda item: _prepare(item[0], item[1], root, model.preprocessing), chunk))


def _prepare(entry: Entry, data: bytes | Refusal, root: str, preprocessing: Preprocessing) -> _Crop | Refusal:
    uri = entry.uri.removeprefix(root)
    if isinstance(data, Refusal):
        return Refusal(uri, data.reason, data.detail)
    try:
        loaded = decode_noted(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return Refusal(uri, error.reason, error.detail)
    row = (uri, hashlib.sha256(data).hexdigest(), loaded.image.width, loaded.image.height)
    return _Crop(
        row, np.asarray(center_crop(loaded.image, preprocessing)), (*loaded.notes, *filter(None, [entry.note]))
    )


def _ahead(items: Iterator[list[_Crop | Refusal]]) -> Iterator[list[_Crop | Refusal]]:
    """Yield the items while a thread makes the next one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _notes_of(paths: list[Path], listing: Listing) -> list[Refusal]:
    """All that was left out; what was scaled or ignored in an image goes to the listing's own notes."""
    refused = [Refusal(r.uri.removeprefix(listing.root), r.reason, r.detail) for r in listing.refusals]
    for path in paths:
        told = json.loads((pq.read_schema(path).metadata or {})[LEFT_OUT])
        refused += [Refusal(*item) for item in told["refused"]]
        listing.notes += [(note, uri) for note, uri in told["noted"]]
    return refused


def _join(paths: list[Path], whole: Path, schema: pa.Schema) -> int:
    """Write the parts one after another; the number of rows."""
    count = 0
    with pq.ParquetWriter(whole, schema, compression="zstd", use_dictionary=False) as writer:
        for path in paths:
            table = pq.read_table(path).replace_schema_metadata(schema.metadata)
            writer.write_table(table)
            count += len(table)
    return count
