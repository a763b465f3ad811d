"""List and delete objects and run-cache entries in the DVC cache and on the DVC remote, which share one layout.

On S3 all versions are considered, because a deleted key of a versioned bucket keeps its bytes until its versions are
deleted too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.core.layout import Layout
from components.core.storage import MissingInStorageError, StorageError, s3_client, s3_errors, split_s3_uri
from components.lineage.lock_file import Record, RecordError

OBJECT = re.compile(r"files/md5/([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)")
ENTRY = re.compile(r"runs/[0-9a-f]{2}/[0-9a-f]{64}/[0-9a-f]{64}")
PARTS = ("files/md5/", "runs/")
UNFINISHED = ".tmp"  # suffix of files that DVC is writing
BATCH = 1000  # S3's limit of one request that deletes


@dataclass(frozen=True)
class Stored:
    """One file or key.

    Attributes:
        size: bytes, of all versions together.
        modified: when the newest version was written, in seconds since 1970.
        there: whether it is readable; False if only old versions of a deleted key are left.
        versions: ids of its versions and delete markers on S3.
    """

    size: int
    modified: float
    there: bool = True
    versions: tuple[str, ...] = ()


class Store(Protocol):
    """The cache or the remote; paths are relative to it, such as `files/md5/ab/cdef...`."""

    def listing(self) -> dict[str, Stored]:
        """Return all files by path."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None if it does not exist."""
        ...

    def remove(self, found: Mapping[str, Stored]) -> None:
        """Delete files of the listing, in order; ignore files already deleted."""
        ...


class DiskStore:
    """The DVC cache of the checkout.

    Args:
        folder: `.dvc/cache`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def listing(self) -> dict[str, Stored]:
        """Return all files below `files/md5` and `runs`."""
        found = {}
        for part in PARTS:
            for folder, _, names in os.walk(self._folder / part):
                for name in names:
                    path = Path(folder, name)
                    facts = path.lstat()
                    found[path.relative_to(self._folder).as_posix()] = Stored(facts.st_size, facts.st_mtime)
        return found

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None if it does not exist."""
        try:
            return (self._folder / path).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, found: Mapping[str, Stored]) -> None:
        """Delete files, and folders that become empty.

        Raises:
            StorageError: the system refuses.
        """
        for path in found:
            file = self._folder / path
            try:
                file.unlink(missing_ok=True)
                if not os.listdir(file.parent):
                    file.parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"{file}: not deleted ({error.strerror}); run `pedigree gc` again") from error


class S3Store:
    """The DVC remote.

    Args:
        url: `s3://bucket/prefix`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._bucket, prefix = split_s3_uri(self.url)
        except ValueError:
            raise StorageError(f"DVC remote {url}: not on S3; `pedigree gc` clears remotes on S3 only") from None
        self._prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        self._client = s3_client()

    def listing(self, parts: Sequence[str] = PARTS) -> dict[str, Stored]:
        """Return all keys below these parts of the prefix with any version."""
        versions: dict[str, list[dict[str, Any]]] = {}
        with s3_errors(self.url):
            pages = self._client.get_paginator("list_object_versions")
            for part in parts:
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + part):
                    for item in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())):
                        versions.setdefault(item["Key"].removeprefix(self._prefix), []).append(item)
        return {path: _stored(items) for path, items in versions.items()}

    def read(self, path: str) -> bytes | None:
        """Return an object's bytes; None if it does not exist."""
        try:
            with s3_errors(f"{self.url}/{path}"):
                return self._client.get_object(Bucket=self._bucket, Key=self._prefix + path)["Body"].read()
        except MissingInStorageError:
            return None

    def remove(self, found: Mapping[str, Stored]) -> None:
        """Delete keys with all their versions, a thousand per request.

        Raises:
            StorageError: S3 refused the request or a deletion.
        """
        doomed = [{"Key": self._prefix + path, "VersionId": v} for path, item in found.items() for v in item.versions]
        for start in range(0, len(doomed), BATCH):
            request = {"Objects": doomed[start : start + BATCH], "Quiet": True}
            with s3_errors(self.url):
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=request)
            if errors := answer.get("Errors"):
                first = errors[0]
                details = f"{first.get('Code')}: {first.get('Message')}; {len(errors)} refused"
                raise StorageError(f"s3://{self._bucket}/{first.get('Key')}: not deleted ({details})")


def object_path(id_: str) -> str:
    """Return the path of a DVC object."""
    return f"files/md5/{id_[:2]}/{id_[2:]}"


def cached_files(checkout: Path, revision: str, path: str) -> dict[str, Path]:
    """Return the cached files of a stage's output folder, by their path in it.

    Empty if the revision's `dvc.lock` lacks the folder, or the cache lacks its listing.
    """
    folder = Layout(checkout).dvc_cache
    cache = DiskStore(folder)
    try:
        found = Record(checkout, revision).output(path)
        listing = json.loads(cache.read(object_path(found)) or b"[]") if found else []
    except (RecordError, OSError, ValueError):
        return {}
    return {entry["relpath"]: folder / object_path(entry["md5"]) for entry in listing}


def objects(listing: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the objects of a listing by DVC id, folders first, so that none is deleted after its files."""
    found = {f"{match[1]}{match[2]}": item for path, item in listing.items() if (match := OBJECT.fullmatch(path))}
    return dict(sorted(found.items(), key=lambda pair: not pair[0].endswith(".dir")))


def entries(listing: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the run-cache entries of a listing by path."""
    return {path: item for path, item in listing.items() if ENTRY.fullmatch(path)}


def _stored(items: list[dict[str, Any]]) -> Stored:
    newest = next((item for item in items if item["IsLatest"]), items[0])
    return Stored(
        size=sum(item.get("Size", 0) for item in items),
        modified=max(item["LastModified"].timestamp() for item in items),
        there="Size" in newest,
        versions=tuple(item["VersionId"] for item in items),
    )
