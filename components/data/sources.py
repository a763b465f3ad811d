"""List and read untrusted sources of images: folders, S3 prefixes, tar shards and Parquet files.

Listing is cheap and yields batches, which the examining processes read. Nothing is unpacked to a name from a source;
member names are only recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from components.core.progress import track
from components.core.storage import MissingInStorageError, s3_client, s3_errors, split_s3_uri
from components.data.ignored import Ignored, ignored_kind
from components.data.ingest_config import IngestError
from components.data.labels import split_of
from components.data.parquet_source import NoImageColumnError, find_columns, partition_label, read_rows
from components.data.signatures import ARCHIVE, ARCHIVE_NAME, IMAGE_NAME, UNCOMPRESS, damage
from components.data.tars import list_tar
from components.data.walk import as_text, walk

MIB = 1024**2
MAX_IMAGE_BYTES = 256 * MIB  # of one encoded image
MAX_ROW_GROUP_BYTES = 4096 * MIB  # of one Parquet row group, uncompressed
BATCH_ENTRIES, BATCH_BYTES = 256, 64 * MIB  # limits of one batch
CONNECTIONS = 8  # to S3, by one process

CONTAINERS = (".tar", ".parquet")


@dataclass(frozen=True, slots=True)
class Entry:
    """A possible image, and where its bytes are."""

    uri: str
    label: str | None  # from its archive
    folder: str  # relative path, whose parts may name label and split
    path: str  # a local file, or the key of an S3 object
    offset: int
    length: int
    note: str = ""  # reported with the number of entries that share it


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rejected file, and why."""

    uri: str
    reason: str
    detail: str


@dataclass(frozen=True)
class EntryBatch:
    """Entries for one process; data that is expensive to read again is copied to the file `spool`."""

    entries: list[Entry]
    bucket: str | None = None  # of the entries, if they are S3 objects
    row_group: int | None = None  # of the single entry, a Parquet file
    spool: Path | None = None


@dataclass
class Listing:
    """A listed source, before decoding."""

    root: str = ""  # prefix of the URIs; the rest is relative to the source
    batches: list[EntryBatch] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    ignored: Ignored = field(default_factory=Ignored)  # hidden files, and members of archives that are not images
    links: set[str] = field(default_factory=set)  # folders, relative, that are links
    notes: list[tuple[str, str]] = field(default_factory=list)  # (note on what was guessed or skipped, name)
    num_bytes: int = 0


@dataclass(frozen=True)
class _File:
    relative: PurePosixPath
    uri: str
    path: str  # local, or an S3 key
    size: int


def list_source(source: str, spool: Path) -> Listing:
    """List all possible images of a source.

    Args:
        source: as in `IngestRequest`.
        spool: an empty folder on disk for archives and objects that come from S3.

    Raises:
        IngestError: the source does not exist, is empty or unreadable.
        StorageError: S3 does not answer.
    """
    listing = Listing(root=_root_of(source))
    bucket, files = _list_s3(source, listing) if "://" in source else (None, _list_local(source, listing))
    files.sort(key=lambda file: (file.relative, file.path))
    if not files:
        raise IngestError(_no_files(source, listing))
    files = _without_metadata(listing, files, bucket, spool)
    listing.num_bytes = sum(file.size for file in files)
    if _are_containers(source, files):
        _list_containers(listing, files, bucket, spool)
    else:
        entries = []
        for file in files:
            if file.size > MAX_IMAGE_BYTES:
                listing.refusals.append(_large_file(file))
            else:
                entries.append(Entry(file.uri, None, _folder(file.relative), file.path, 0, file.size))
        listing.batches = [EntryBatch(part, bucket) for part in _batches(entries)]
    spooled = (batch.bucket is not None or batch.row_group is not None for batch in listing.batches)
    listing.batches = [
        replace(batch, spool=spool / f"batch-{number:08d}") if needed else batch
        for number, (batch, needed) in enumerate(zip(listing.batches, spooled, strict=True))
    ]
    return listing


def _root_of(source: str) -> str:
    """Return the URI prefix of a source: its folder, or the folder of its single file."""
    if "://" in source:
        return source.rpartition("/")[0] + "/" if source.lower().endswith(CONTAINERS) else source.rstrip("/") + "/"
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    return os.path.join(as_text(str(Path(folder))), "") if folder else ""


def read_batch(batch: EntryBatch) -> Iterator[tuple[Entry, bytes | Refusal]]:
    """Yield the bytes of each entry of a batch (of each row, for Parquet), or a refusal."""
    if batch.row_group is not None:
        yield from _read_rows(batch.entries[0], batch.row_group)
    elif batch.bucket is not None:
        yield from _read_objects(batch.bucket, batch.entries)
    else:
        for entry in batch.entries:
            yield entry, _read_file(entry)


def _list_local(source: str, listing: Listing) -> list[_File]:
    root = Path(source)
    try:
        status = root.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "no such file or folder" if missing else f"cannot be read: {error.strerror or error}"
        raise IngestError(f"{source}: {reason}") from None
    if not root.is_dir():
        if root.suffix.lower() not in CONTAINERS:
            allowed = "a folder, s3://BUCKET/PREFIX, a .tar or a .parquet file"
            packed = UNCOMPRESS if ARCHIVE_NAME.search(root.name) else f"a file of another kind; give {allowed}"
            raise IngestError(f"{source}: {packed}")
        return [_File(PurePosixPath(as_text(root.name)), as_text(str(root)), source, status.st_size)]
    try:
        found = walk(str(root))
    except OSError as error:
        raise IngestError(f"{source}: cannot be read: {error.strerror or error}") from None
    listing.ignored, listing.links = found.ignored, found.links
    out = f"a link that leads out of the folder, followed (to {found.num_outside} files in all)"
    listing.notes += [(out, link) for link in found.outside]
    listing.notes += [("a link to what is taken under another name, left out", link) for link in found.repeated]
    listing.refusals = [Refusal(*refused) for refused in found.refused]
    return [_File(PurePosixPath(file.relative), file.uri, file.path, file.size) for file in found.files]


def _no_files(source: str, listing: Listing) -> str:
    message = f"{source}: holds no files"
    if hidden := listing.ignored.counts.total():
        message += f" but {hidden} hidden ones"
    if listing.refusals:
        first, count = listing.refusals[0], len(listing.refusals)
        message += f" that can be read; {count} cannot be, for example {first.uri}: {first.reason}: {first.detail}"
    return message


def _list_s3(source: str, listing: Listing) -> tuple[str, list[_File]]:
    try:
        bucket, prefix = split_s3_uri(source)
    except ValueError as error:
        raise IngestError(str(error)) from None
    is_file = prefix.lower().endswith(CONTAINERS)
    root = prefix if is_file or not prefix else prefix.rstrip("/") + "/"
    found: list[_File] = []
    try:
        with s3_errors(source):
            for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root):
                for item in page.get("Contents", []):
                    relative = PurePosixPath(item["Key"]).name if is_file else item["Key"][len(root) :]
                    if relative and not relative.endswith("/") and (not is_file or item["Key"] == prefix):
                        found.append(
                            _File(PurePosixPath(relative), f"s3://{bucket}/{item['Key']}", item["Key"], item["Size"])
                        )
    except MissingInStorageError as error:
        raise IngestError(str(error)) from None
    if not found:
        raise IngestError(f"{source}: no objects there; check the prefix")
    files = []
    for file in found:
        if (kind := ignored_kind(file.relative)) is None:
            files.append(file)
        else:
            listing.ignored.add(kind, str(file.relative))
    return bucket, files


def _folder(path: PurePosixPath) -> str:
    folder = str(path.parent)
    return "" if folder == "." else folder


def _without_metadata(listing: Listing, files: list[_File], bucket: str | None, spool: Path) -> list[_File]:
    """Return the files without Parquet tables that contain no images but lie beside images."""
    tables = [file for file in files if file.relative.suffix.lower() == ".parquet"]
    if not any(IMAGE_NAME.search(file.relative.name) for file in files):
        return files
    local = tables if bucket is None else [_download(bucket, file, spool, n) for n, file in _numbered(tables)]
    metadata = {table for table, file in zip(tables, local, strict=True) if _is_metadata(file.path)}
    _tell_metadata(listing, [table.uri for table in metadata])
    return [file for file in files if file not in metadata]


def _is_metadata(path: str) -> bool:
    try:
        find_columns(pq.read_schema(path), path)
    except NoImageColumnError:
        return True
    except (IngestError, pa.ArrowException, OSError):
        return False
    return False


def _tell_metadata(listing: Listing, uris: list[str]) -> None:
    for uri in uris:
        listing.ignored.add(".parquet", uri)
    listing.notes += [("a table without images is not read", uri) for uri in uris]


def _are_containers(source: str, files: list[_File]) -> bool:
    containers = sum(file.relative.suffix.lower() in CONTAINERS for file in files)
    images = sum(IMAGE_NAME.search(file.relative.name) is not None for file in files)
    if containers and images:
        found = f"{images} images and {containers} archives (.tar, .parquet)"
        raise IngestError(f"{source}: holds {found}; ingest them as two sources")
    return containers > 0


def _large_file(file: _File) -> Refusal:
    if ARCHIVE_NAME.search(file.relative.name):
        return Refusal(file.uri, ARCHIVE, UNCOMPRESS)
    return Refusal(file.uri, "too_large", _too_large(file.size))


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) == BATCH_ENTRIES or size + entry.length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.length
    if batch:
        yield batch


def _too_large(size: int) -> str:
    return f"{size} bytes; at most {MAX_IMAGE_BYTES} are read"


def _list_containers(listing: Listing, files: list[_File], bucket: str | None, spool: Path) -> None:
    containers = [file for file in files if file.relative.suffix.lower() in CONTAINERS]
    for file in sorted(set(files).difference(containers), key=lambda file: file.relative):
        if ARCHIVE_NAME.search(file.relative.name):
            listing.refusals.append(Refusal(file.uri, ARCHIVE, UNCOMPRESS))
        else:
            listing.ignored.add(file.relative.suffix or "no extension", file.uri)
    if bucket is not None:
        containers = [_download(bucket, file, spool, number) for number, file in _numbered(containers)]
    without: list[NoImageColumnError] = []
    for file in containers:
        # Folders of archives are shards, collections or crawls rather than classes, but they may be splits.
        folder = "/".join(part for part in file.relative.parent.parts if split_of(part))
        add: Callable[[Listing, _File, str], None]
        add = _list_tar if file.relative.suffix.lower() == ".tar" else _list_parquet
        try:
            add(listing, file, folder)
        except NoImageColumnError as error:
            without.append(error)
        except IngestError:
            raise
        except Exception as error:  # readers of archives raise many types on hostile bytes
            listing.refusals.append(Refusal(file.uri, *damage(file.path, error)))
    if without and not listing.batches:
        raise without[0]
    _tell_metadata(listing, [error.uri for error in without])


def _numbered(files: list[_File]) -> Iterable[tuple[int, _File]]:
    return track(enumerate(files), "download", len(files), "archives")


def _download(bucket: str, file: _File, spool: Path, number: int) -> _File:
    path = spool / f"archive-{number:06d}"
    with s3_errors(file.uri):
        s3_client().download_file(bucket, file.path, str(path))
    return replace(file, path=str(path))


def _list_tar(listing: Listing, file: _File, folder: str) -> None:
    found = list_tar(file.path, file.uri, MAX_IMAGE_BYTES)
    listing.ignored.update(found.ignored)
    for name, reason, detail in found.refused:
        listing.refusals.append(Refusal(f"{file.uri}#{name}" if name else file.uri, reason, detail))
    listing.notes += [("a label of no image", f"{file.uri}#{name}") for name in found.unused_labels]
    entries = [
        Entry(
            f"{file.uri}#{image.name}", image.label, _folder(PurePosixPath(folder, image.name)),
            file.path, image.offset, image.length,
        )
        for image in found.images
    ]  # fmt: skip
    listing.batches += [EntryBatch(part) for part in _batches(entries)]


def _list_parquet(listing: Listing, file: _File, folder: str) -> None:
    with pq.ParquetFile(file.path) as parquet:
        columns = find_columns(parquet.schema_arrow, file.uri)
        label, partition_notes = (None, []) if columns.label is not None else partition_label(file.relative)
        listing.notes += [(note, file.uri) for note in (*columns.notes, *partition_notes)]
        if parquet.metadata.num_rows == 0:
            detail = f"column `{columns.image}` is there, but the table has no rows; write it again with its rows"
            listing.refusals.append(Refusal(file.uri, "no_rows", detail))
        for number in range(parquet.num_row_groups):
            uri, size = f"{file.uri}#row_group={number}", parquet.metadata.row_group(number).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                detail = f"{size} bytes; at most {MAX_ROW_GROUP_BYTES} are read"
                listing.refusals.append(Refusal(uri, "too_large", detail))
            else:
                entry = Entry(file.uri, label, folder, file.path, 0, size)
                listing.batches.append(EntryBatch([entry], row_group=number))


def _read_at(path: str, offset: int, length: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _read_file(entry: Entry) -> bytes | Refusal:
    try:
        data = _read_at(entry.path, entry.offset, entry.length + 1 if entry.offset == 0 else entry.length)
    except OSError as error:
        return Refusal(entry.uri, "unreadable", error.strerror or str(error))
    return _whole(entry, data)


def _whole(entry: Entry, data: bytes) -> bytes:
    if len(data) != entry.length:
        raise IngestError(f"{entry.uri}: changed while it was read; ingest again when nothing writes to it")
    return data


def _read_objects(bucket: str, entries: list[Entry]) -> Iterator[tuple[Entry, bytes | Refusal]]:
    client = s3_client()

    def fetch(entry: Entry) -> bytes:
        with s3_errors(entry.uri):
            data = client.get_object(Bucket=bucket, Key=entry.path)["Body"].read(MAX_IMAGE_BYTES)
        return _whole(entry, data)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        yield from zip(entries, pool.map(fetch, entries), strict=True)


def _read_rows(entry: Entry, row_group: int) -> Iterator[tuple[Entry, bytes | Refusal]]:
    try:
        columns = find_columns(pq.read_schema(entry.path), entry.uri)
        for row in read_rows(entry.path, row_group, columns):
            uri = f"{entry.uri}#row={row.number}"
            label = entry.label if columns.label is None else row.label
            found = replace(entry, uri=uri, label=label, note=row.note)
            if row.data is None:
                yield found, Refusal(uri, "not_an_image", row.problem)
            else:
                large = len(row.data) > MAX_IMAGE_BYTES
                yield found, Refusal(uri, "too_large", _too_large(len(row.data))) if large else row.data
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        uri = f"{entry.uri}#row_group={row_group}"
        yield replace(entry, uri=uri), Refusal(uri, "damaged_archive", str(error).splitlines()[0])
