"""Search for the bytes of images: on this machine's disk, and in all versions of all objects of an S3 prefix.

What is searched for is a run of bytes from the middle of each image, and the same run as base64, in which pages and
databases keep pictures.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from components.core.storage import s3_client, s3_errors, split_s3_uri

RUN = 48  # bytes that are searched for of an image; a multiple of 3, for base64
TRIES = 33  # places in the second half of an image, of which the one with the most distinct bytes is taken
SCAN = b"\xff\xda"  # the pixels of a JPEG come after this; before it are tables, profiles and previews
MIN_DISTINCT = 24  # byte values of a run that no other file has by chance; else the whole image is searched for
WORD = 8  # bytes that are compared first
CHUNK = 16 * 2**20
READERS = 8  # threads that read S3
SKIPPED = {".git", ".venv"}  # folders of a checkout; git's objects are compressed, and history is never rewritten


@dataclass(frozen=True)
class S3Version:
    """One version of an object that has searched bytes."""

    bucket: str
    key: str
    version: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key} (version {self.version})"


@dataclass
class Searched:
    """How much was searched; `unread` are files that this user may not read."""

    files: int = 0
    versions: int = 0
    bytes: int = 0
    unread: int = 0


def needle(data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return the run of bytes that is searched for of an image; all of it if it is tiny or has no run of its own.

    Args:
        data: the encoded image.
        others: bytes with other images, which share tables and profiles with it.
    """
    first = max(len(data) // 2, data.rfind(SCAN) + len(SCAN) if data.startswith(b"\xff\xd8") else 0)
    if len(data) - first < 2 * RUN:
        return data
    starts = np.linspace(first, len(data) - RUN, TRIES).astype(int)
    runs = sorted((data[start : start + RUN] for start in starts), key=lambda run: -len(set(run)))
    own = (run for run in runs if len(set(run)) >= MIN_DISTINCT and not any(run in other for other in others))
    return next(own, data)


def with_base64(needles: Iterable[bytes]) -> list[bytes]:
    """Return needles, and the base64 texts that contain them, for each of the three alignments."""
    found = []
    for run in needles:
        found.append(run)
        for shift, skipped in ((0, 0), (1, 2), (2, 3)):  # characters that depend on the bytes before the run
            text = base64.b64encode(bytes(shift) + run)
            found.append(text[skipped : (shift + len(run)) // 3 * 4])
    return found


class Needles:
    """Byte strings to find, of at least `WORD` bytes."""

    def __init__(self, wanted: Sequence[bytes]) -> None:
        self.longest = max((len(each) for each in wanted), default=0)
        self._of: dict[int, list[bytes]] = {}
        for each in wanted:
            self._of.setdefault(int.from_bytes(each[:WORD], "little"), []).append(each)
        self._first = np.array(sorted(self._of), np.uint64)

    def is_in(self, stream: BinaryIO, told: Callable[[int], object]) -> bool:
        """Return whether a stream contains any; call `told` with the number of bytes of each part that was read."""
        kept = b""
        while part := stream.read(CHUNK):
            told(len(part))
            data = kept + part
            if self._any(data):
                return True
            kept = data[len(data) - min(self.longest - 1, len(data)) :]
        return False

    def _any(self, data: bytes) -> bool:
        """Compare the first words at every offset, then whole needles where one fits."""
        for shift in range(min(WORD, len(data) - WORD + 1)):
            words: NDArray[np.uint64] = np.frombuffer(data, "<u8", (len(data) - shift) // WORD, shift)
            for place in np.flatnonzero(np.isin(words, self._first)):
                start = shift + int(place) * WORD
                if any(data.startswith(each, start) for each in self._of[int(words[place])]):
                    return True
        return False


def search_disk(roots: Iterable[Path], needles: Needles, searched: Searched) -> list[Path]:
    """Return all files below the folders that contain a needle; links are not followed, hard links are read once."""
    seen: dict[tuple[int, int], bool] = {}
    found = []
    for path in _files(roots):
        try:
            facts = path.lstat()
            inode = (facts.st_dev, facts.st_ino)
            if inode not in seen:
                with path.open("rb") as file:
                    seen[inode] = needles.is_in(file, lambda size: _count(searched, size))
                searched.files += 1
        except FileNotFoundError:  # deleted meanwhile
            continue
        except PermissionError:
            searched.unread += 1
            continue
        if seen[inode]:
            found.append(path)
    return found


def search_s3(address: str, needles: Needles, searched: Searched) -> list[S3Version]:
    """Return all versions of all objects below `s3://bucket/prefix` that contain a needle.

    Raises:
        StorageError: S3 does not answer.
    """
    bucket, prefix = split_s3_uri(address)
    client = s3_client()

    def has(version: S3Version) -> bool:
        with s3_errors(str(version)):
            answer = client.get_object(Bucket=version.bucket, Key=version.key, VersionId=version.version)
            return needles.is_in(answer["Body"], lambda size: _count(searched, size))

    versions = list(_versions(client, bucket, prefix))
    searched.versions += len(versions)
    with ThreadPoolExecutor(READERS) as pool:
        return [version for version, hit in zip(versions, pool.map(has, versions), strict=True) if hit]


def _versions(client: Any, bucket: str, prefix: str) -> Iterator[S3Version]:
    with s3_errors(f"s3://{bucket}/{prefix}"):
        for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Versions", ()):
                yield S3Version(bucket, item["Key"], item["VersionId"])


def _files(roots: Iterable[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in SKIPPED)
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def _count(searched: Searched, size: int) -> None:
    searched.bytes += size
