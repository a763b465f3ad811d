"""Read objects on S3 for a check: streamed, in threads, and remembered, so that an interrupted check goes on."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from components.core.progress import progress
from components.core.storage import MissingInStorageError, s3_client, s3_errors, split_s3_uri
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import Record

THREADS = 8
CHUNK = 1 << 20
NOT_THERE = "no such object"


@dataclass(frozen=True)
class Job:
    """One object to check.

    Attributes:
        address: on S3.
        check: reads it and returns what is wrong.
        path: in the workspace, of data and reports.
        shard: whether it may be left out of a sample.
        size: bytes, of a shard.
    """

    address: str
    check: Callable[[], list[str]]
    path: str = ""
    shard: bool = False
    size: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from other jobs."""
        return self.address, self.path


class Memory:
    """What was read from objects, by what was read, address and S3 version; a line of JSON each.

    Args:
        path: the file; it is there only while a check is interrupted.
        fresh: forget what it holds.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, tuple[str, Any]] = {}
        if path.exists() and not fresh:
            for line in path.read_text().splitlines():
                try:
                    key, version, value = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                self._known[key] = (version, value)
        self._file = path.open("w" if fresh else "a")
        self._file.write("\n")  # ends a line that was cut off

    def get(self, key: str) -> tuple[str, Any] | None:
        """Return version and value of an earlier reading."""
        return self._known.get(key)

    def put(self, key: str, version: str, value: Any) -> None:
        """Remember a reading."""
        with self._lock:
            self._known[key] = (version, value)
            self._file.write(json.dumps([key, version, value]) + "\n")
            self._file.flush()

    def close(self, ended: bool) -> None:
        """Close the file; once the check has ended, delete it, so that the next one reads everything again."""
        self._file.close()
        if ended:
            self._path.unlink(missing_ok=True)


class Objects:
    """Objects on S3; safe to use from several threads."""

    def __init__(self, memory: Memory) -> None:
        self._client = s3_client()
        self._memory = memory
        self._lock = threading.Lock()
        self._remotes: dict[str | None, Remote] = {}
        self._reading: dict[str, threading.Lock] = {}
        self._read: set[str] = set()  # by this check
        self.remembered = self.objects = self.bytes = 0

    def remote(self, record: Record) -> Remote:
        """Return the DVC remote of a record."""
        url = record.remote_url()
        if url not in self._remotes:
            self._remotes[url] = Remote(url)
        return self._remotes[url]

    def listing(self, prefix: str) -> dict[str, str]:
        """Return the addresses of all objects below a prefix, by their path in it."""
        bucket, key = split_s3_uri(prefix.rstrip("/") + "/")
        with s3_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
            names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {name.removeprefix(key): f"s3://{bucket}/{name}" for name in names}

    def read(self, address: str) -> bytes:
        """Return the bytes of a small object."""
        return self._stream(address, lambda body: body.read())[1]

    def size(self, address: str) -> int:
        """Return the size of an object, without reading it."""
        return self._head(address)["ContentLength"]

    def sha256(self, address: str) -> str:
        """Return the SHA-256 of an object."""
        return self.scan(address, "hashes", hashes)["sha256"]

    def version(self, address: str) -> str:
        """Return what tells this version of an object from others."""
        return _version(self._head(address))

    def scan(self, address: str, what: str, read: Callable[[BinaryIO], Any]) -> Any:
        """Return what `read` finds in an object, a value of JSON; remembered under the name `what`."""
        key = f"{what} {address}"
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # so that two jobs do not read one object twice
            known = self._memory.get(key)
            if known and key in self._read:
                return known[1]
            if known and known[0] == self.version(address):
                self.remembered += 1
                value = known[1]
            else:
                version, value = self._stream(address, read)
                self._memory.put(key, version, value)
            self._read.add(key)
        return value

    def once(self, key: str, version: str, find: Callable[[], Any]) -> Any:
        """Return a value of JSON that depends on several objects, whose versions are named; remembered."""
        if (known := self._memory.get(key)) and known[0] == version:
            return known[1]
        value = find()
        self._memory.put(key, version, value)
        return value

    def _head(self, address: str) -> dict[str, Any]:
        bucket, key = split_s3_uri(address)
        with s3_errors(address):
            return self._client.head_object(Bucket=bucket, Key=key)

    def _stream(self, address: str, read: Callable[[BinaryIO], Any]) -> tuple[str, Any]:
        bucket, key = split_s3_uri(address)
        with s3_errors(address):
            answer = self._client.get_object(Bucket=bucket, Key=key)
            value = read(answer["Body"])
        with self._lock:
            self.objects += 1
            self.bytes += answer["ContentLength"]
        return _version(answer), value


def hashes(body: BinaryIO) -> dict[str, str]:
    """Return MD5, which is DVC's address, and SHA-256 of a stream."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    while chunk := body.read(CHUNK):
        md5.update(chunk)
        sha256.update(chunk)
    return {"md5": md5.hexdigest(), "sha256": sha256.hexdigest()}


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return what a function returns for each item, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def run_jobs(jobs: Iterable[Job]) -> list[str]:
    """Carry out jobs side by side, showing progress, and return what is wrong, in their order."""
    listed = list(jobs)
    with progress("verifying", len(listed), "objects") as advance:

        def carry_out(job: Job) -> list[str]:
            try:
                return job.check()
            except MissingInStorageError:
                return [f"{job.address}: {NOT_THERE}"]
            finally:
                with _ADVANCING:
                    advance()

        return [line for lines in in_parallel(carry_out, listed) for line in lines]


def choose(shards: list[Job], share: float, always: int, seed: int) -> list[Job]:
    """Return a random choice of shards that hold a share of all their bytes, at least `always` bytes where they do."""
    wanted = max(share * sum(job.size for job in shards), min(always, sum(job.size for job in shards)))
    chosen, size = [], 0
    for job in random.Random(seed).sample(shards, len(shards)):
        if size >= wanted:
            break
        chosen.append(job)
        size += job.size
    return chosen


_ADVANCING = threading.Lock()


def _version(answer: dict[str, Any]) -> str:
    return f"{answer.get('VersionId')} {answer.get('ETag')} {answer.get('LastModified')}"
