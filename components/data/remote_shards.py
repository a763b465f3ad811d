"""Read shards from S3 by object ranges, with prefetching and a local cache of bounded size.

Objects are immutable (DVC names them by content), so cached blocks stay valid. All processes of the machine share the
cache; the least recently used block is evicted first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

from components.core.errors import DatasetError
from components.core.locks import try_lock, wait_for_lock
from components.core.storage import ATTEMPTS, StorageError, s3_client, s3_errors, split_s3_uri

BLOCK = 8 * 2**20  # bytes per request
FETCHERS = 4  # prefetching threads per process
LOCKED_SECONDS = 0.05  # until a thread takes up the next block after one that is locked
# The client itself repeats requests that fail, but not those whose answer breaks off half-way.
BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_LOCKS = 1024  # lock files, so that two processes do not fetch the same block

logger = logging.getLogger(__name__)


class RemoteShards:
    """Reader of images in shards on S3 by offset; thread-safe, fork-safe and picklable.

    Args:
        objects: address (`s3://bucket/key`) of each shard.
        cache: folder for fetched blocks.
        limit: maximum bytes of the cache, at least one block.
    """

    def __init__(self, objects: Mapping[str, str], cache: Path, limit: int) -> None:
        if limit < BLOCK:
            raise DatasetError(f"a cache of {limit} bytes cannot hold one block of {BLOCK}; raise stream.cache_gib")
        self._objects, self._cache, self._limit = dict(objects), cache, limit
        self._start()

    def __getstate__(self) -> tuple[dict[str, str], Path, int]:
        return self._objects, self._cache, self._limit

    def __setstate__(self, state: tuple[dict[str, str], Path, int]) -> None:
        self.__init__(*state)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset` of a shard.

        Raises:
            DatasetError: the shard has no known address or is too short, or the cache is unusable.
            StorageError: S3 does not answer or refuses.
        """
        if offset < 0 or length < 0:
            raise DatasetError(f"{shard}: bytes {offset} to {offset + length} cannot be read")
        parts = []
        for block in _blocks(offset, length):
            start = block * BLOCK
            begin, end = max(offset - start, 0), min(offset + length - start, BLOCK)
            try:
                part = _read_cached(self._path(shard, block), begin, end)
                if len(part) < end - begin:  # missing, or truncated by a power loss
                    part = self._fetch_once(shard, block, end)[begin:end]
            except OSError as error:
                advice = "it must be writable and have space; lower stream.cache_gib if it has too little"
                raise DatasetError(f"{self._cache}: {error.strerror or error}; {advice}") from None
            if len(part) < end - begin:
                place = f"bytes {offset} to {offset + length}"
                raise DatasetError(f"{self._address(shard)}: {place} are not all inside this object")
            parts.append(part)
        return b"".join(parts)

    def fetch_ahead(self, shard: str, offset: int, length: int) -> None:
        """Start prefetching for a later `read`, which reports any error."""
        self._same_process()
        for block in _blocks(offset, length):
            if (shard, block) != self._last_asked and not self._path(shard, block).exists():
                self._wanted.put((shard, block))
                if len(self._fetchers) < FETCHERS:  # daemons, so that an exiting worker does not wait
                    self._fetchers.append(threading.Thread(target=self._fetch_wanted, daemon=True))
                    self._fetchers[-1].start()
            self._last_asked = (shard, block)

    def forget(self, shard: str, offset: int, length: int) -> None:
        """Drop corrupt blocks from the cache."""
        with self._locked("write"):  # excludes a concurrent `_make_room`
            for block in _blocks(offset, length):
                self._path(shard, block).unlink(missing_ok=True)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._client: Any = None
        self._wanted: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._fetchers: list[threading.Thread] = []
        self._last_asked: tuple[str, int] | None = None

    def _same_process(self) -> None:
        if self._pid != os.getpid():  # forked: the parent's connections and threads are unusable
            self._start()

    def _fetch_wanted(self) -> None:
        while True:
            shard, block = self._wanted.get()
            try:
                self._fetch_once(shard, block, 1, wait=False)
            except BlockingIOError:  # this block, or another one whose lock has the same number, is being fetched
                time.sleep(LOCKED_SECONDS)
                self._wanted.put((shard, block))
            except (DatasetError, StorageError, OSError) as error:
                logger.debug("fetching ahead: %s", error)  # the reader of the block gets the error again

    def _fetch_once(self, shard: str, block: int, end: int, *, wait: bool = True) -> bytes:
        """Fetch a block into the cache, unless another process has just cached it with at least `end` bytes."""
        self._same_process()
        path = self._path(shard, block)
        number = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % _LOCKS
        with self._locked(f"fetch-{number}", wait=wait):
            if len(data := _read_cached(path, 0, BLOCK)) >= end:
                return data
            data = self._fetch(shard, block)
            with self._locked("write"):
                self._make_room(len(data))
                staging = path.with_suffix(".partial")
                staging.write_bytes(data)
                staging.replace(path)
        return data

    def _fetch(self, shard: str, block: int) -> bytes:
        address = self._address(shard)
        bucket, key = split_s3_uri(address)
        with s3_errors(address):
            return self._get(bucket, key, f"bytes={block * BLOCK}-{(block + 1) * BLOCK - 1}")

    def _get(self, bucket: str, key: str, span: str) -> bytes:
        """Return a range of an object; empty past its end."""
        self._client = self._client or s3_client()
        attempt = 1
        while True:
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, Range=span)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in {"InvalidRange", "416"}:
                    return b""
                raise
            try:
                return answer["Body"].read()
            except BROKEN_OFF:
                if attempt == ATTEMPTS:
                    raise
                time.sleep(2 ** (attempt - 1))
                attempt += 1

    def _make_room(self, size: int) -> None:
        """Evict the least recently used files, including leftovers of killed processes, until `size` bytes fit."""
        with os.scandir(self._cache) as entries:
            blocks = [(e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in entries if e.is_file()]
        taken = sum(length for _, length, _ in blocks)
        for _, length, path in sorted(blocks):
            if taken + size <= self._limit:
                return
            Path(path).unlink(missing_ok=True)
            taken -= length

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        folder = self._cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file:
            if wait:
                wait_for_lock(file)
            elif not try_lock(file):
                raise BlockingIOError(f"{folder / name} is held")
            yield

    def _address(self, shard: str) -> str:
        try:
            return self._objects[shard]
        except KeyError:
            raise DatasetError(f"{shard}: no address on S3 is known for this shard") from None

    def _path(self, shard: str, block: int) -> Path:
        return self._cache / f"{hashlib.sha256(self._address(shard).encode()).hexdigest()[:32]}-{block}"


def _blocks(offset: int, length: int) -> range:
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))


def _read_cached(path: Path, begin: int, end: int) -> bytes:
    """Return a part of a cached block and mark it as recently used; empty if it is not cached."""
    try:
        os.utime(path)
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), end - begin, begin)
    except FileNotFoundError:
        return b""
