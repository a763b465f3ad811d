"""The endless, shuffled stream of curated images, in which one integer is a position.

The order is a pure function of (seed, epoch, dataset): shards are shuffled, then images inside windows of shards, so
that a reader touches few shards at a time. Which process asks, and how many there are, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from components.core.storage import sha256_file
from components.data.config import StreamConfig
from components.data.manifest import MANIFEST, read_manifest
from components.data.shards import ImageError, ShardReader, decode_image

_SHARDS, _IMAGES = 1_000_001, 1_000_002  # third number of their generators, out of the way of the crops' numbers

T = TypeVar("T")


class StreamError(RuntimeError):
    """The curated set cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class BadImage:
    """An image that was skipped, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True)
class StreamImage(Generic[T]):
    """The image at a position: the one that belongs there, or the next that can be decoded."""

    image: T
    image_id: str
    skipped: list[BadImage] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    """One window of an epoch: `rows` are the manifest's rows of its images, in stream order."""

    start: int
    rows: np.ndarray  # [images of the window]


class ImageStream:
    """Images of `root` (a curated set) by position; position p is image p % len(self) of epoch p // len(self)."""

    def __init__(self, root: Path, config: StreamConfig, seed: int) -> None:
        table = read_manifest(root / MANIFEST)
        if table.num_rows == 0:
            raise StreamError(f"{root}: no images to train on; loosen the curation or ingest more images")
        self.digest = sha256_file(root / MANIFEST)  # the manifest holds every image's own SHA-256
        self._reader = ShardReader(root)
        self._config, self._seed = config, seed
        self._ids = table["image_id"].to_numpy(zero_copy_only=False)
        self._offsets = table["offset"].to_numpy()
        self._lengths = table["length"].to_numpy()
        names, self._shard_of_row = np.unique(table["shard"].to_numpy(zero_copy_only=False), return_inverse=True)
        self._shard_names = [str(name) for name in names]
        # Rows of each shard, sorted by offset: a function of the set, not of the manifest's order.
        self._rows_by_shard = np.lexsort((self._offsets, self._shard_of_row))
        self._shard_starts = np.searchsorted(self._shard_of_row[self._rows_by_shard], np.arange(len(names) + 1))
        self._epoch_cache: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window_cache: dict[tuple[int, int], _Window] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def row(self, position: int) -> int:
        """Row of the manifest that belongs at `position`."""
        epoch, offset = divmod(position, len(self))
        window = self._window(epoch, offset)
        return int(window.rows[offset - window.start])

    def shard(self, position: int) -> str:
        """Name of the shard that holds the image at `position`."""
        return self._shard_names[self._shard_of_row[self.row(position)]]

    def image_ids(self, first: int, count: int) -> list[str]:
        """Ids of the images that belong at `count` positions from `first` on."""
        return [str(self._ids[self.row(position)]) for position in range(first, first + count)]

    def image(self, position: int) -> StreamImage[Image.Image]:
        """Decode the image at `position`, as `find` does."""
        return self.find(position, decode_image)

    def find(self, position: int, decode: Callable[[bytes], T]) -> StreamImage[T]:
        """Decode the image at `position`; a bad one is replaced by the next position's, and reported.

        Args:
            position: 0 or more.
            decode: makes what is wanted of the image's bytes; raises ImageError if they are bad.

        Raises:
            StreamError: more than `max_bad_images` in a row cannot be decoded.
            ShardError: a shard is missing or too short.
        """
        skipped: list[BadImage] = []
        for candidate in range(position, position + min(self._config.max_bad_images + 1, len(self))):
            row = self.row(candidate)
            image_id = str(self._ids[row])
            data = self._reader.read(self.shard(candidate), int(self._offsets[row]), int(self._lengths[row]))
            try:
                return StreamImage(decode(data), image_id, skipped)
            except ImageError as error:
                skipped.append(BadImage(image_id, str(error)))
        raise too_many_bad(skipped, self._config)

    def _window(self, epoch: int, offset: int) -> _Window:
        shard_order, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        if (epoch, number) not in self._window_cache:
            if len(self._window_cache) > 2:  # the next window begins before all images of the last one are read
                self._window_cache.pop(next(iter(self._window_cache)))
            size = self._config.window_shards
            shards = shard_order[number * size : (number + 1) * size]
            parts = [self._rows_by_shard[self._shard_starts[s] : self._shard_starts[s + 1]] for s in shards]
            generator = np.random.default_rng([self._seed, epoch, _IMAGES, number])
            rows = generator.permutation(np.concatenate(parts))
            self._window_cache[epoch, number] = _Window(int(starts[number]), rows)
        return self._window_cache[epoch, number]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled shards of an epoch, and the offset at which each window begins."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            order = np.random.default_rng([self._seed, epoch, _SHARDS]).permutation(len(self._shard_names))
            ends = np.cumsum(np.diff(self._shard_starts)[order])
            starts = np.concatenate([[0], ends])[:-1][:: self._config.window_shards]
            self._epoch_cache = (epoch, order, starts)
        return self._epoch_cache[1], self._epoch_cache[2]


def too_many_bad(bad: list[BadImage], config: StreamConfig) -> StreamError:
    """The error that ends a run over too many bad images, naming the last ones."""
    named = "; ".join(f"{item.image_id[:12]} ({item.reason})" for item in bad[-3:])
    return StreamError(
        f"{len(bad)} images cannot be decoded, at most {config.max_bad_images} are allowed (stream.max_bad_images). "
        f"The last: {named}. Verify the curated set: its bytes are not what was ingested"
    )
