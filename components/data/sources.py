"""Where images come from: folders, S3 prefixes, tar shards and Parquet files, listed and read without trust.

Listing is cheap and gives batches; a batch is read by whichever process examines it. Nothing is ever unpacked to a name
that a source chose: a member's name is only recorded.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from components.core.progress import track
from components.core.storage import MissingInStorageError, s3_client, s3_errors, split_s3_uri
from components.data.ingest_config import IngestError
from components.data.parquet_source import (
    MAX_LABEL_BYTES,
    NoImageColumnError,
    find_columns,
    partition_label,
    read_rows,
)

MIB = 1024**2
MAX_IMAGE_BYTES = 256 * MIB  # of one encoded image
MAX_ROW_GROUP_BYTES = 4096 * MIB  # of one Parquet row group, uncompressed
BATCH_ENTRIES, BATCH_BYTES = 256, 64 * MIB  # what one process holds at once
CONNECTIONS = 8  # to S3, by one process

CONTAINERS = (".tar", ".parquet")
IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|bmp|tiff?|gif|p[pgbn]m|hei[cf]|avif|ico|jp2|jxl|psd|svg)$", re.IGNORECASE)
SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})
SPLITS = frozenset({"train", "test"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What may be one image, and where its bytes are."""

    uri: str
    label: str | None
    split: str | None
    path: str  # a local file, or the key of an S3 object
    offset: int
    length: int
    note: str = ""  # told with the number of entries that have it


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is not taken, and why."""

    uri: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """Entries that one process reads; what cannot be read again cheaply is copied to the file `spool`."""

    entries: list[Entry]
    bucket: str | None = None  # the entries are objects of this bucket
    row_group: int | None = None  # the one entry is a Parquet file, of which this row group is read
    spool: Path | None = None


@dataclass
class Listing:
    """A source, before any image of it was decoded."""

    batches: list[Batch] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    num_ignored: int = 0  # hidden files, and members of archives that are not images
    num_bytes: int = 0
    notes: list[tuple[str, str]] = field(default_factory=list)  # what was guessed or left out, and a URI of it


@dataclass(frozen=True)
class _File:
    relative: PurePosixPath
    uri: str
    path: str  # local, or an S3 key
    size: int


def list_source(source: str, spool: Path, as_evaluation: bool) -> Listing:
    """Find all that may be an image.

    Args:
        source: as in `IngestRequest`.
        spool: an empty folder on disk for archives and objects that come from S3.
        as_evaluation: take top folders named `train` and `test` as splits.

    Raises:
        IngestError: nothing there, or nothing that we can read.
        StorageError: S3 does not answer.
    """
    listing = Listing()
    bucket, files = _list_s3(source) if "://" in source else (None, _list_local(source))
    hidden = [file for file in files if _is_hidden(file.relative)]
    listing.num_ignored = len(hidden)
    files = sorted(set(files).difference(hidden), key=lambda file: file.relative)
    if not files:
        raise IngestError(f"{source}: holds no files" + (f" but {len(hidden)} hidden ones" if hidden else ""))
    files = _without_metadata(listing, files, bucket, spool)
    listing.num_bytes = sum(file.size for file in files)
    if _are_containers(source, files):
        _list_containers(listing, files, bucket, spool, as_evaluation)
    else:
        entries = []
        for file, label, split in _labelled(files, as_evaluation):
            if file.size > MAX_IMAGE_BYTES:
                listing.refusals.append(Refusal(file.uri, "too_large", _too_large(file.size)))
            else:
                entries.append(Entry(file.uri, label, split, file.path, 0, file.size))
        listing.batches = [Batch(part, bucket) for part in _batches(entries)]
    spooled = (batch.bucket is not None or batch.row_group is not None for batch in listing.batches)
    listing.batches = [
        replace(batch, spool=spool / f"batch-{number:08d}") if needed else batch
        for number, (batch, needed) in enumerate(zip(listing.batches, spooled, strict=True))
    ]
    return listing


def read_batch(batch: Batch) -> Iterator[tuple[Entry, bytes | Refusal]]:
    """The bytes of each entry of a batch (each row, for Parquet), or why there are none."""
    if batch.row_group is not None:
        yield from _read_rows(batch.entries[0], batch.row_group)
    elif batch.bucket is not None:
        yield from _read_objects(batch.bucket, batch.entries)
    else:
        for entry in batch.entries:
            yield entry, _read_file(entry)


def _list_local(source: str) -> list[_File]:
    root = Path(source)
    if not root.exists():
        raise IngestError(f"{source}: no such file or folder")
    if not root.is_dir():
        if root.suffix.lower() not in CONTAINERS:
            allowed = "a folder, s3://BUCKET/PREFIX, a .tar or a .parquet file"
            raise IngestError(f"{source}: a file of another kind; give {allowed}")
        return [_File(PurePosixPath(root.name), source, source, root.stat().st_size)]
    files, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):  # linked class folders are common in data sets
        folders[:] = sorted(name for name in folders if _is_new(Path(folder, name), visited))
        for name in names:
            path = Path(folder, name)
            try:
                status = path.stat()
            except OSError:
                continue  # a dangling link
            if stat.S_ISREG(status.st_mode):
                relative = PurePosixPath(_text(path.relative_to(root)))
                files.append(_File(relative, _text(path), str(path), status.st_size))
    return files


def _text(path: Path) -> str:
    """A path to be written down: file systems take names that are no text, Parquet does not."""
    return os.fsencode(path).decode(errors="replace")


def _is_new(folder: Path, visited: set[tuple[int, int]]) -> bool:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    new = identity not in visited
    visited.add(identity)
    return new


def _list_s3(source: str) -> tuple[str, list[_File]]:
    try:
        bucket, prefix = split_s3_uri(source)
    except ValueError as error:
        raise IngestError(str(error)) from None
    is_file = prefix.lower().endswith(CONTAINERS)
    root = prefix if is_file or not prefix else prefix.rstrip("/") + "/"
    files = []
    try:
        with s3_errors(source):
            for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root):
                for item in page.get("Contents", []):
                    relative = PurePosixPath(item["Key"]).name if is_file else item["Key"][len(root) :]
                    if relative and not relative.endswith("/") and (not is_file or item["Key"] == prefix):
                        uri = f"s3://{bucket}/{item['Key']}"
                        files.append(_File(PurePosixPath(relative), uri, item["Key"], item["Size"]))
    except MissingInStorageError as error:
        raise IngestError(str(error)) from None
    if not files:
        raise IngestError(f"{source}: no objects there; check the prefix")
    return bucket, files


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FILES for part in path.parts)


def _without_metadata(listing: Listing, files: list[_File], bucket: str | None, spool: Path) -> list[_File]:
    """The files but for tables without images that lie beside images."""
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
    listing.num_ignored += len(uris)
    listing.notes += [("a table without images is not read", uri) for uri in uris]


def _are_containers(source: str, files: list[_File]) -> bool:
    containers = sum(file.relative.suffix.lower() in CONTAINERS for file in files)
    images = sum(IMAGE_NAME.search(file.relative.name) is not None for file in files)
    if containers and images:
        found = f"{images} images and {containers} archives (.tar, .parquet)"
        raise IngestError(f"{source}: holds {found}; ingest them as two sources")
    return containers > 0


def _labelled(files: list[_File], as_evaluation: bool) -> Iterator[tuple[_File, str | None, str | None]]:
    """Each file with its label (the top folder, where there are two or more of them) and split."""
    split_level = as_evaluation and {file.relative.parts[0] for file in files} <= SPLITS
    paths = [file.relative.parts[1:] if split_level else file.relative.parts for file in files]
    folders = {parts[0] for parts in paths if len(parts) > 1}
    for file, parts in zip(files, paths, strict=True):
        label = parts[0] if len(folders) > 1 and len(parts) > 1 else None
        yield file, label, file.relative.parts[0] if split_level else None


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


def _list_containers(
    listing: Listing, files: list[_File], bucket: str | None, spool: Path, as_evaluation: bool
) -> None:
    containers = [file for file in files if file.relative.suffix.lower() in CONTAINERS]
    listing.num_ignored += len(files) - len(containers)
    if bucket is not None:
        containers = [_download(bucket, file, spool, number) for number, file in _numbered(containers)]
    without: list[NoImageColumnError] = []
    for file, _, split in _labelled(containers, as_evaluation):
        add: Callable[[Listing, _File, str | None], None]
        add = _list_tar if file.relative.suffix.lower() == ".tar" else _list_parquet
        try:
            add(listing, file, split)
        except NoImageColumnError as error:
            without.append(error)
        except IngestError:
            raise
        except Exception as error:  # readers of archives raise many types on hostile bytes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            listing.refusals.append(Refusal(file.uri, "damaged_archive", reason))
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


def _list_tar(listing: Listing, file: _File, split: str | None) -> None:
    """Images of an uncompressed tar, by their place in the file; `KEY.cls` holds the label of the images `KEY.*`."""
    entries: list[Entry] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file.path, "r:", encoding="utf-8", errors="replace") as archive:
            for member in _members(archive, file.size):
                uri = f"{file.uri}#{member.name}"
                refusal = _refuse_member(uri, member, file.size)
                if refusal is not None:
                    listing.refusals.append(refusal)
                elif uri.endswith(".cls") and member.size <= MAX_LABEL_BYTES:
                    labels[_key(uri)] = (
                        _read_at(file.path, member.offset_data, member.size).decode(errors="replace").strip()
                    )
                elif IMAGE_NAME.search(member.name):
                    entries.append(Entry(uri, None, split, file.path, member.offset_data, member.size))
                else:
                    listing.num_ignored += not member.isdir()
    finally:  # what stands before the damage is taken
        entries = [replace(entry, label=labels.get(_key(entry.uri)) or None) for entry in entries]
        listing.batches += [Batch(part) for part in _batches(entries)]


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    last = -1
    while (member := archive.next()) is not None:
        if not last < member.offset < size:  # a hostile size can send the reader back to where it was
            raise tarfile.ReadError(f"member {member.name!r} does not follow the one before it")
        last = member.offset
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - tarfile would keep them all in memory
        yield member
    # At a damaged header tarfile stops as it does at the end, and all behind it would be lost in silence.
    if any(_read_at(str(archive.name), archive.offset, tarfile.BLOCKSIZE)):  # pyright: ignore[reportAttributeAccessIssue]
        raise tarfile.ReadError(f"damaged header at byte {archive.offset}")  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_member(uri: str, member: tarfile.TarInfo, size: int) -> Refusal | None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or member.size < 0:
        return Refusal(uri, "unsafe_member", "its name leads out of the archive, or its size is negative")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}
        return Refusal(
            uri, "unsafe_member", f"{kinds.get(member.type, 'a device, a pipe or a sparse file')}; not a plain file"
        )
    if member.size > MAX_IMAGE_BYTES:
        return Refusal(uri, "too_large", _too_large(member.size))
    if member.offset_data + member.size > size:
        return Refusal(uri, "truncated", f"the archive ends before its {member.size} bytes")
    return None


def _key(uri: str) -> str:
    """WebDataset's key: the name up to the first dot after its last slash."""
    archive, _, member = uri.rpartition("#")
    folder, _, name = member.rpartition("/")
    return f"{archive}#{folder}/{name.partition('.')[0]}"


def _list_parquet(listing: Listing, file: _File, split: str | None) -> None:
    with pq.ParquetFile(file.path) as parquet:
        columns = find_columns(parquet.schema_arrow, file.uri)
        label, told = (None, []) if columns.label is not None else partition_label(file.relative)
        listing.notes += [(note, file.uri) for note in (*columns.told, *told)]
        if parquet.metadata.num_rows == 0:
            detail = f"column `{columns.image}` is there, but the table has no rows; write it again with its rows"
            listing.refusals.append(Refusal(file.uri, "no_rows", detail))
        for number in range(parquet.num_row_groups):
            uri, size = f"{file.uri}#row_group={number}", parquet.metadata.row_group(number).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                detail = f"{size} bytes; at most {MAX_ROW_GROUP_BYTES} are read"
                listing.refusals.append(Refusal(uri, "too_large", detail))
            else:
                listing.batches.append(Batch([Entry(file.uri, label, split, file.path, 0, size)], row_group=number))


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
