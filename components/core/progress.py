"""Progress as log lines in one format that both people and programs read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
CHECKPOINT_LINE = "checkpoint after %d steps"
SECONDS_BETWEEN = (1.0, 10.0)  # between log lines: at the start, and after minutes of work
_LINE = re.compile(
    r"progress: (?P<what>.+?) (?P<done>\d+)/(?P<total>\d+) (?P<unit>[^(]+) "
    r"\((?P<rate>[\d.e-]+) [^,]+/s, [^,]+ left(?:, (?P<note>.+))?\)"
)


@dataclass(frozen=True)
class ProgressLine:
    """Progress of a piece of work.

    Attributes:
        what: name of the work, such as "embedding pool".
        unit: of `done` and `total`, in the plural.
        rate: units per second since the work began in this process.
        note: further figures, such as the last loss.
    """

    what: str
    done: int
    total: int
    unit: str
    rate: float
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> ProgressLine | None:
        """Parse a line that `str` wrote; return None for any other text."""
        if (found := _LINE.fullmatch(text)) is None:
            return None
        what, unit, note = found["what"], found["unit"], found["note"] or ""
        return cls(what, int(found["done"]), int(found["total"]), unit, float(found["rate"]), note)

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at this rate; None before the first unit."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    @property
    def figures(self) -> str:
        """The line without the name of the work."""
        rate = f"{self.rate:.1f}" if self.rate >= 10 else f"{self.rate:.3g}"
        left = "unknown time" if self.seconds_left is None else clock(self.seconds_left)
        note = f", {self.note}" if self.note else ""
        return f"{self.done}/{self.total} {self.unit} ({rate} {self.unit}/s, {left} left{note})"

    def __str__(self) -> str:
        return f"progress: {self.what} {self.figures}"


def clock(seconds: float) -> str:
    """Return a time span as `0:02:31` or `1 day 2:03:04`."""
    return str(timedelta(seconds=round(seconds))).replace(",", "")


class Advance(Protocol):
    """Callback that counts finished units; `note` is added to the line."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...  # noqa: D102


@contextmanager
def progress(what: str, total: int, unit: str = "images", start: int = 0) -> Generator[Advance]:
    """Yield `advance(count, note)`, which logs a line at growing intervals, always including the first and the last."""
    begun, done, last = time.monotonic(), start, float("-inf")

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        shortest, longest = SECONDS_BETWEEN
        if now - last >= min(longest, max(shortest, (now - begun) / 10)) or done >= total:
            last = now
            logger.info("%s", ProgressLine(what, done, total, unit, (done - start) / max(now - begun, 1e-9), note))

    yield advance


def track(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yield `items` one by one while showing how many of `total` are done."""
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
