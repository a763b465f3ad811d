"""Infinite shuffled order of images, addressed by integer positions.

Shards are shuffled, then images within windows of shards, so that a reader needs few shards at a time. The order is a
pure function of (seed, epoch, dataset), independent of the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

# Third numbers of the generators, out of the way of those of crops and masks; a part of a mix adds its own number x 10.
_SHARDS, _IMAGES, _SLOTS = 1_000_001, 1_000_002, 1_000_003


@dataclass(frozen=True)
class Window:
    """Images of one window of shards in one epoch of a part."""

    key: tuple[int, int, int]  # part, epoch, number
    start: int  # index of the first image in the epoch
    rows: Rows  # in the order of the stream
    stored: Rows  # the same rows, sorted by shard and offset


class Shuffle:
    """Epochs of the same images in different orders; index i is image i % len of epoch i // len.

    Args:
        rows: [n] rows of the manifest, sorted by shard and offset.
        shard: [N] number of each manifest row's shard.
        window_shards: shards whose images are shuffled together.
        seed: of the run.
        part: number of the part of a mix; 0 for the whole set.
    """

    def __init__(self, rows: Rows, shard: Rows, window_shards: int, seed: int, part: int = 0) -> None:
        self._rows, self._shard = rows, shard
        self._size, self._seed, self._part = window_shards, seed, part
        self._numbers, starts = np.unique(shard[rows], return_index=True)
        self._starts = np.append(starts, len(rows))  # of each shard's images in `rows`
        self._epochs: dict[int, tuple[Rows, Rows]] = {}
        self._windows: dict[tuple[int, int], Window] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def holds(self, row: int) -> bool:
        """Return whether a manifest row belongs to this part."""
        return bool((self._rows == row).any())

    def row(self, index: int) -> int:
        """Return the manifest row at an index."""
        window = self.window(index)
        return int(window.rows[index % len(self) - window.start])

    def indices(self, row: int, first: int, stop: int) -> list[int]:
        """Return all indices of a row of this part in [first, stop)."""
        found = []
        for epoch in range(first // len(self), -(-stop // len(self))):
            order, starts = self._epoch(epoch)
            shard = np.searchsorted(self._numbers, self._shard[row])
            window = self._window(epoch, int(np.flatnonzero(order == shard)[0]) // self._size, order, starts)
            found.append(epoch * len(self) + window.start + int(np.flatnonzero(window.rows == row)[0]))
        return [index for index in found if first <= index < stop]

    def count(self, stop: int, draws: Rows) -> None:
        """Add to `draws` [N] the number of occurrences of each manifest row before index `stop`."""
        epochs, rest = divmod(stop, len(self))
        draws[self._rows] += epochs
        index = epochs * len(self)
        while rest > 0:
            rows = self.window(index).rows[:rest]
            draws[rows] += 1
            index, rest = index + len(rows), rest - len(rows)

    def window(self, index: int) -> Window:
        """Return the window that contains an index."""
        epoch, offset = divmod(index, len(self))
        order, starts = self._epoch(epoch)
        return self._window(epoch, int(np.searchsorted(starts, offset, side="right")) - 1, order, starts)

    def after(self, window: Window) -> Window:
        """Return the next window, possibly the first one of the next epoch."""
        return self.window(window.key[1] * len(self) + window.start + len(window.rows))

    def _window(self, epoch: int, number: int, order: Rows, starts: Rows) -> Window:
        if (epoch, number) not in self._windows:
            if len(self._windows) > 2:  # windows overlap in time
                self._windows.pop(next(iter(self._windows)))
            shards = order[number * self._size : (number + 1) * self._size]
            stored = np.concatenate([self._rows[self._starts[s] : self._starts[s + 1]] for s in shards])
            rows = np.random.default_rng([self._seed, epoch, _IMAGES + 10 * self._part, number]).permutation(stored)
            key = (self._part, epoch, number)
            self._windows[epoch, number] = Window(key, int(starts[number]), rows, stored)
        return self._windows[epoch, number]

    def _epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """Return the shuffled shards of an epoch, and the offset of each window."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # the next epoch is prefetched before this one ends
                self._epochs.pop(next(iter(self._epochs)))
            generator = np.random.default_rng([self._seed, epoch, _SHARDS + 10 * self._part])
            order = generator.permutation(len(self._numbers))
            ends = np.cumsum(np.diff(self._starts)[order])
            self._epochs[epoch] = (order, np.concatenate([[0], ends])[:-1][:: self._size])
        return self._epochs[epoch]


class Order:
    """Positions of the stream: a mix of several parts, each with its own epochs.

    Of every `period` positions exactly share x period belong to each part, in a random order per period.

    Args:
        parts: at least one.
        shares: of each part, adding up to 1; such as {"seed": 0.1, "balanced": 0.9}.
        seed: of the run.
    """

    def __init__(self, parts: Mapping[str, Shuffle], shares: Mapping[str, float], seed: int) -> None:
        self._parts, self._seed = [parts[name] for name in shares], seed
        exact = [Fraction(str(share)) for share in shares.values()]
        self.period = lcm(*(share.denominator for share in exact))
        self._counts = [int(share * self.period) for share in exact]
        self._slots = np.repeat(np.arange(len(exact)), self._counts)  # [period]: the part of each
        self._drawn: dict[int, tuple[Rows, Rows]] = {}

    def __len__(self) -> int:
        """Return the number of images in all parts."""
        return sum(len(part) for part in self._parts)

    def locate(self, position: int) -> tuple[Shuffle, int]:
        """Return the part of a position, and its index in the part."""
        number, slot = divmod(position, self.period)
        slots, ranks = self._period(number)
        part = int(slots[slot])
        return self._parts[part], number * self._counts[part] + int(ranks[slot])

    def row(self, position: int) -> int:
        """Return the manifest row at `position`."""
        part, index = self.locate(position)
        return part.row(index)

    def positions(self, row: int, part: Shuffle, first: int, stop: int) -> list[int]:
        """Return all positions of a row of a part in [first, stop)."""
        number = self._parts.index(part)
        begin, end = self._before(number, first), self._before(number, stop)
        return [self._position(number, index) for index in part.indices(row, begin, end)]

    def draws(self, stop: int, num_rows: int) -> Rows:
        """Return [num_rows] the number of positions below `stop` of each manifest row."""
        draws = np.zeros(num_rows, np.int64)
        for number, part in enumerate(self._parts):
            part.count(self._before(number, stop), draws)
        return draws

    def _before(self, part: int, position: int) -> int:
        """Return the number of positions below this one that belong to a part."""
        number, slot = divmod(position, self.period)
        return number * self._counts[part] + int((self._period(number)[0][:slot] == part).sum())

    def _position(self, part: int, index: int) -> int:
        number, rank = divmod(index, self._counts[part])
        return number * self.period + int(np.flatnonzero(self._period(number)[0] == part)[rank])

    def _period(self, number: int) -> tuple[Rows, Rows]:
        """Return for each slot of a period its part, and the number of earlier slots of that part."""
        number = number if len(self._counts) > 1 else 0  # with one part all periods are equal
        if number not in self._drawn:
            if len(self._drawn) > 2:
                self._drawn.pop(next(iter(self._drawn)))
            slots = np.random.default_rng([self._seed, number, _SLOTS]).permutation(self._slots)
            ranks = np.empty_like(slots)
            for part, count in enumerate(self._counts):
                ranks[slots == part] = np.arange(count)
            self._drawn[number] = (slots, ranks)
        return self._drawn[number]
