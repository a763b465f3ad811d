"""The stream of curated images by position, from local shards or from S3.

`order.py` maps positions to images; this module reads and decodes them, and replaces undecodable ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from components.core.errors import DatasetError
from components.core.layout import Layout
from components.core.storage import sha256_file
from components.data.config import ORIGINS, StreamConfig
from components.data.manifest import MANIFEST, read_manifest
from components.data.order import Order, Shuffle, Window
from components.data.remote_shards import RemoteShards
from components.data.shards import ImageError, ShardReader, decode_image

# Of a curated set that is not on disk: the S3 address of each shard, beside its manifest.
ADDRESSES = "shards.json"
WHOLE = "all"  # the single part of a set without mix

T = TypeVar("T")


@dataclass(frozen=True)
class BadImage:
    """A skipped image, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True)
class StreamImage(Generic[T]):
    """The image at a position: the scheduled one, or the next decodable one."""

    image: T
    image_id: str
    skipped: list[BadImage] = field(default_factory=list)


class ImageStream:
    """Images of `root` (the curated set of a workspace, `data/curated`) by position.

    Without a mix, position p is image p % len(self) of epoch p // len(self). A set that is not on disk is streamed from
    the addresses in the workspace (written by `components.lineage.streaming`).
    """

    def __init__(self, root: Path, config: StreamConfig, seed: int) -> None:
        self._workspace = root.parents[1]
        streamed = Layout(self._workspace).streamed
        root = root if (root / MANIFEST).is_file() or not streamed.is_dir() else streamed
        table = read_manifest(root / MANIFEST)
        if table.num_rows == 0:
            raise DatasetError(f"{root}: no images to train on; loosen the curation or ingest more images")
        self.digest = sha256_file(root / MANIFEST)  # the manifest contains every image's SHA-256
        self._root, self._config = root, config
        self._ids = table["image_id"]  # chunked, because 34 million ids exceed one array's size limit
        self._derived_from = table["derived_from"]
        self._offsets = table["offset"].to_numpy()
        self._lengths = table["length"].to_numpy()
        names = sorted(pc.unique(table["shard"]).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]
        self._shard_names = names
        self._shard = pc.index_in(table["shard"], pa.array(names)).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
        self._parts = self._shuffles(table["origin"], seed)
        # In a fixed order: `config.json`, from which `lineage.seen` recomputes the order, sorts its keys.
        mix = config.mix or {}
        shares = {str(name): mix[name] for name in ORIGINS if name in mix} or {WHOLE: 1.0}
        self._order = Order(self._parts, shares, seed)
        self._remote = self._remote_shards()
        self._reader = self._remote or ShardReader(root)
        self._ahead: dict[tuple[int, int, int], int] = {}  # window -> number of prefetched images

    def __len__(self) -> int:
        """Return the number of distinct images."""
        return len(self._order)

    def row(self, position: int) -> int:
        """Return the manifest row scheduled at `position`."""
        return self._order.row(position)

    def shard(self, position: int) -> str:
        """Return the name of the shard with the image at `position`."""
        return self._shard_names[self._shard[self.row(position)]]

    def image_ids(self, first: int, count: int) -> list[str]:
        """Return the ids scheduled at `count` positions from `first`, ignoring undecodable images, unlike `seen`."""
        return [self._ids[self.row(position)].as_py() for position in range(first, first + count)]

    def draws(self, stop: int) -> dict[str, int]:
        """Count how often each image is scheduled below `stop`, by id in manifest order, without zeros."""
        draws = self._order.draws(stop, len(self._ids))
        rows = np.flatnonzero(draws)
        return dict(zip(self._ids.take(pa.array(rows)).to_pylist(), draws[rows].tolist(), strict=True))

    def seen(self, image_id: str, first: int, count: int) -> list[int]:
        """Return the positions, of `count` from `first`, at which this image is read, considering undecodable images.

        A decodable image is read at its scheduled positions and in place of undecodable ones directly before them. An
        image with blurred faces may also be given by its original id.
        """
        found = (pc.index(column, image_id).as_py() for column in (self._ids, self._derived_from))  # pyright: ignore[reportAttributeAccessIssue]
        row = next((row for row in found if row >= 0), -1)
        if row < 0:
            return []
        image_id = self._ids[row].as_py()
        parts = [part for part in self._parts.values() if part.holds(row)]
        stop = first + count
        at: list[int] = []
        for own in (p for part in parts for p in self._order.positions(row, part, first, stop + self._reach())):
            if self.image(own).image_id != image_id:
                return []
            position = own
            while position >= first and self.image(position).image_id == image_id:
                at.append(position)
                position -= 1
        return sorted({position for position in at if position < stop})

    def image(self, position: int) -> StreamImage[Image.Image]:
        """Decode the image at `position` as `find` does."""
        return self.find(position, decode_image)

    def find(self, position: int, decode: Callable[[bytes], T]) -> StreamImage[T]:
        """Decode the image at `position`; replace an undecodable one by the next position's, and report it.

        Args:
            position: 0 or more.
            decode: converts the image's bytes; raises ImageError if they are bad.

        Raises:
            DatasetError: more than `max_bad_images` distinct images in a row are undecodable, or a shard is missing or
                too short.
        """
        skipped: dict[str, BadImage] = {}
        for candidate in range(position, position + self._reach() + 1):
            row = self.row(candidate)
            image_id = self._ids[row].as_py()
            try:
                return StreamImage(decode(self._read(row, image_id)), image_id, list(skipped.values()))
            except ImageError as error:
                skipped[image_id] = BadImage(image_id, str(error))
            if len(skipped) > self._config.max_bad_images:
                break
        raise too_many_bad(list(skipped.values()), self._config)

    def fetch_ahead(self, position: int) -> None:
        """Prefetch bytes for positions after `position`; no-op for local shards.

        Each window is prefetched in stored order, because all its images are needed: while a window is read, the same
        share of the next one is fetched.
        """
        if self._remote is None:
            return
        part, index = self._order.locate(position)
        window = part.window(index)
        self._fetch(window, len(window.stored))
        following = part.after(window)
        done = (index % len(part) - window.start + 1) / len(window.rows)
        self._fetch(following, round(done * len(following.stored)))

    def _fetch(self, window: Window, upto: int) -> None:
        assert self._remote is not None
        for row in window.stored[self._ahead.get(window.key, 0) : upto]:
            self._remote.fetch_ahead(*self._place(row))
        self._ahead[window.key] = max(upto, self._ahead.get(window.key, 0))

    def _read(self, row: int, image_id: str) -> bytes:
        data = self._reader.read(*self._place(row))
        if self._remote is None or _sha256(data) == image_id:
            return data
        self._remote.forget(*self._place(row))  # the cache may be damaged rather than its source
        data = self._remote.read(*self._place(row))
        if _sha256(data) != image_id:
            shard = self._place(row)[0]
            raise DatasetError(
                f"{image_id}: its bytes in shard {shard} on S3 have another SHA-256; restore that object"
            )
        return data

    def _place(self, row: int) -> tuple[str, int, int]:
        """Return shard, offset and length of an image."""
        return self._shard_names[self._shard[row]], int(self._offsets[row]), int(self._lengths[row])

    def _reach(self) -> int:
        """Return the maximum distance of a replacement; twice the limit, since adjacent epochs may repeat an image."""
        return 2 * self._config.max_bad_images

    def _shuffles(self, origins: pa.ChunkedArray, seed: int) -> dict[str, Shuffle]:
        """Return the whole set, or the parts of the mix, with rows sorted by shard and offset."""
        stored, size = np.lexsort((self._offsets, self._shard)), self._config.window_shards
        if self._config.mix is None:
            return {WHOLE: Shuffle(stored, self._shard, size, seed)}
        counts = {item["values"]: item["counts"] for item in origins.value_counts().to_pylist()}
        if missing := [name for name in self._config.mix if name not in counts]:
            held = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
            raise DatasetError(
                f"stream.mix asks for the part {missing[0]!r}, but {self._root} has only: {held}. "
                f"Leave {missing[0]} out of stream.mix, or curate with that part"
            )
        parts = {name: stored[pc.equal(origins, name).to_numpy()[stored]] for name in self._config.mix}  # pyright: ignore[reportAttributeAccessIssue]
        return {n: Shuffle(parts[n], self._shard, size, seed, 1 + ORIGINS.index(n)) for n in parts}

    def _remote_shards(self) -> RemoteShards | None:
        """Return the reader of shards on S3, if the set is not on disk."""
        addresses = self._root / ADDRESSES
        if not addresses.is_file():
            return None
        ends = np.zeros(len(self._shard_names), np.int64)
        np.maximum.at(ends, self._shard, self._offsets + self._lengths)
        held = 2 * self._config.window_shards * len(self._parts)  # the current and the next window of each part
        needed, limit = int(np.sort(ends)[-held:].sum()), int(self._config.cache_gib * 2**30)
        if needed > limit:
            raise DatasetError(
                f"streaming needs {needed / 2**30:.3g} GiB of cache for windows of {self._config.window_shards} shards "
                f"(a window and the next one), but stream.cache_gib is {self._config.cache_gib:g}: "
                "raise it, or lower stream.window_shards"
            )
        return RemoteShards(json.loads(addresses.read_bytes()), Layout(self._workspace).cache("shards"), limit)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def too_many_bad(bad: list[BadImage], config: StreamConfig) -> DatasetError:
    """Return the error for too many undecodable images, naming the last ones."""
    named = "; ".join(f"{item.image_id[:12]} ({item.reason})" for item in bad[-3:])
    return DatasetError(
        f"{len(bad)} images cannot be decoded, at most {config.max_bad_images} are allowed (stream.max_bad_images). "
        f"The last: {named}. Verify the curated set: its bytes are not what was ingested"
    )
