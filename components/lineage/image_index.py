"""Index the images of data versions, for searches by id, source, license or URI without reading their manifests.

Each data version has one Parquet file in a cache folder, named by the version's DVC id, so that it never changes: rows
sorted by image id in small row groups, and counts by source, license and reason in the footer. A missing or damaged
file is made again from the manifests, which are read from DVC's cache or remote and checked by their md5.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from components.core.layout import Layout
from components.core.storage import write_bytes
from components.data.manifest import MANIFEST, REJECTED
from components.lineage.dvc_remote import Remote
from components.lineage.holdings import Data
from components.lineage.lock_file import Record, RecordError
from components.lineage.stored import DiskStore, object_path

FOLDER = "images-1"  # among the caches; a new number where the columns change
GROUP_ROWS = 16_384
REQUIRED = {"image_id", "source", "source_uri"}  # columns of every table of images
STORED = "stored"  # reason of the images of a pool snapshot or an evaluation set
COUNTS = b"counts"  # key in the footer
BY = ("kept", "reason", "source", "license")  # what is counted

# A row for each image of the manifest and of rejected.parquet; two where curation blurred faces, one for either id.
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # empty: ingest could not read the file
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # `stored`, an origin, or a reason of rejection
        pa.field("detail", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("license", pa.string()),  # not recorded of rejected images
        pa.field("label", pa.string()),
        pa.field("other", pa.string()),  # image that it duplicates, or that retrieved it
        pa.field("similarity", pa.float32()),  # to `other`
        pa.field("pool_id", pa.string()),  # of an image with blurred faces: its id in the pool
    ]
)

log = logging.getLogger(__name__)
pc: Any = pyarrow.compute  # its functions are made when it is imported, where pyright does not see them


@dataclass(frozen=True)
class Query:
    """What is searched, by exactly one of these.

    Attributes:
        images: ids, or the beginning of one id.
        source: name of a source.
        license: of images; finds none that curation left out, whose table has no licenses.
        uri: of an image in its source, or the last part of it.
    """

    images: frozenset[str] = frozenset()
    source: str | None = None
    license: str | None = None
    uri: str | None = None

    def __str__(self) -> str:
        if self.images:
            return f"image {next(iter(self.images))}" if len(self.images) == 1 else f"{len(self.images):,} images"
        name, value = next((k, v) for k, v in vars(self).items() if k != "images" and v is not None)
        return f"{name} {value}"


class ImageIndex:
    """Images of all data versions of a repository.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.objects = Objects(root)
        self._folder = Layout(root).cache(FOLDER)

    def counts(self, data: Data) -> list[dict[str, Any]]:
        """Return the numbers of rows by `BY`, each with `count`.

        Raises:
            RecordError: the version's manifest is gone or damaged, as in all methods.
            StorageError: the remote does not answer.
        """
        return json.loads(self._open(data).schema_arrow.metadata[COUNTS])

    def search(self, data: Data, query: Query) -> pa.Table:
        """Return the rows of `SCHEMA` that match a query."""
        file = self._open(data)
        if query.images:
            return _by_id(file, sorted(query.images))
        if query.uri is not None:
            return _by_uri(file, query.uri)
        name = "source" if query.source is not None else "license"
        value = query.source if query.source is not None else query.license
        if not any(row[name] == value for row in self.counts(data)):
            return SCHEMA.empty_table()
        return file.read().filter(pc.field(name) == value)

    def rows(self, data: Data) -> pa.Table:
        """Return all rows of a version."""
        return self._open(data).read()

    def _open(self, data: Data) -> pq.ParquetFile:
        path = self._folder / f"{data.dvc.removesuffix('.dir')}.parquet"
        try:
            found = pq.ParquetFile(path)
            if found.schema_arrow.remove_metadata() == SCHEMA:
                return found
        except (FileNotFoundError, pa.ArrowInvalid, OSError):
            pass
        log.info("indexing %s (%s)", data.path, data.dvc[:12])
        write_bytes(path, _index_file(self.objects, data))
        return pq.ParquetFile(path)


class Objects:
    """DVC objects by id, from this machine's cache or else from the remote, checked by their md5.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache_folder = Layout(root).dvc_cache
        self._cache = DiskStore(self._cache_folder)

    def read(self, dvc_id: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            RecordError: they are not those of its id, or the remote is not on S3.
            StorageError: the remote does not answer, or lacks it.
        """
        data = self._cache.read(object_path(dvc_id))
        if data is None or not _is(data, dvc_id):
            data = self.remote.read(dvc_id)
            if not _is(data, dvc_id):
                raise RecordError(f"{self.remote.address(dvc_id)}: its bytes have another md5; restore that object")
        return data

    def listing(self, dvc_id: str) -> dict[str, str]:
        """Return the files of a tracked folder: path -> md5."""
        try:
            return {item["relpath"]: item["md5"] for item in json.loads(self.read(dvc_id))}
        except (ValueError, TypeError, KeyError):
            raise RecordError(f"DVC object {dvc_id}: not the listing of a folder") from None

    def table(self, dvc_id: str) -> pa.Table:
        """Return a Parquet object."""
        try:
            return pq.read_table(pa.BufferReader(self.read(dvc_id)))
        except (pa.ArrowInvalid, OSError) as error:
            raise RecordError(f"DVC object {dvc_id}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def read_range(self, dvc_id: str, offset: int, length: int) -> bytes:
        """Return a part of an object, unchecked."""
        cached = self._cache_folder / object_path(dvc_id)
        if not cached.is_file():
            return self.remote.read_range(dvc_id, offset, length)
        with cached.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    @cached_property
    def remote(self) -> Remote:
        """The DVC remote."""
        return Remote(Record(self._root).remote_url())


def _is(data: bytes, dvc_id: str) -> bool:
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == dvc_id.removesuffix(".dir")


def _index_file(objects: Objects, data: Data) -> bytes:
    files = objects.listing(data.dvc)
    if MANIFEST not in files:
        raise RecordError(f"{data.path} ({data.dvc}): has no {MANIFEST}")
    tables = [_kept(objects.table(files[MANIFEST]))]
    if REJECTED in files:
        tables.append(_left_out(objects.table(files[REJECTED])))
    rows = pa.concat_tables(tables).sort_by([("image_id", "ascending"), ("kept", "descending")])
    counted = rows.group_by(list(BY)).aggregate([([], "count_all")]).rename_columns([*BY, "count"]).to_pylist()
    counted.sort(key=lambda row: [str(row[key]) for key in BY])
    buffer = io.BytesIO()
    rows = rows.replace_schema_metadata({COUNTS: json.dumps(counted)})
    pq.write_table(rows, buffer, compression="zstd", row_group_size=GROUP_ROWS)
    return buffer.getvalue()


def _kept(manifest: pa.Table) -> pa.Table:
    """Return the rows of a manifest; an image with blurred faces has a second row, with its id in the pool."""
    curated = "origin" in manifest.column_names
    columns = {
        "kept": pa.repeat(True, len(manifest)),
        "reason": manifest["origin"] if curated else None,
        "other": manifest["query_id"] if curated else None,
        "pool_id": manifest["derived_from"] if "derived_from" in manifest.column_names else None,
    }
    rows = _rows(manifest, columns, STORED)
    blurred = rows.filter(pc.is_valid(rows["pool_id"]))
    again = blurred.set_column(0, SCHEMA.field("image_id"), blurred["pool_id"])
    return pa.concat_tables([rows, again])


def _left_out(rejected: pa.Table) -> pa.Table:
    columns = {"other": rejected["duplicate_of"] if "duplicate_of" in rejected.column_names else None}
    return _rows(rejected, columns, "")


def _rows(table: pa.Table, columns: Mapping[str, Any], reason: str) -> pa.Table:
    """Return rows of `SCHEMA`: of the given columns, else of the table's own, else empty."""
    if lacking := sorted(REQUIRED - set(table.column_names)):
        raise RecordError(f"not a table of images: it has no {', '.join(lacking)}")
    made = []
    for field in SCHEMA:
        column = columns.get(field.name)
        if column is None and field.name in table.column_names:
            column = table[field.name]
        if column is None:
            default = {"kept": False, "reason": reason}.get(field.name)
            column = pa.nulls(len(table), field.type) if default is None else pa.repeat(default, len(table))
        column = column.cast(field.type)
        made.append(column if field.nullable or not column.null_count else pc.fill_null(column, ""))
    return pa.Table.from_arrays(made, schema=SCHEMA)


def _by_id(file: pq.ParquetFile, ids: list[str]) -> pa.Table:
    """Return the rows of these full ids, or of all ids with one beginning, from the row groups that can hold them."""
    length = len(ids[0])
    groups = []
    for number in range(file.metadata.num_row_groups):
        limits = file.metadata.row_group(number).column(0).statistics
        at = bisect_left(ids, limits.min[:length])
        if at < len(ids) and ids[at] <= limits.max[:length]:
            groups.append(number)
    rows = file.read_row_groups(groups)
    begins = pc.utf8_slice_codeunits(rows["image_id"], 0, length)
    return rows.filter(pc.is_in(begins, pa.array(ids)))


def _by_uri(file: pq.ParquetFile, uri: str) -> pa.Table:
    """Return the rows of a source URI; without any, those whose URI ends with it."""

    def matching(ends: Iterable[str]) -> pa.Table:
        found = []
        for number in range(file.metadata.num_row_groups):
            uris = file.read_row_group(number, columns=["source_uri"])["source_uri"]
            mask = pc.equal(uris, uri)
            for end in ends:
                mask = pc.or_(mask, pc.ends_with(uris, end))
            if pc.any(mask).as_py():
                found.append(file.read_row_group(number).filter(mask))
        return pa.concat_tables(found) if found else SCHEMA.empty_table()

    exact = matching(())
    return exact if len(exact) else matching((f"/{uri}", f"#{uri}"))
