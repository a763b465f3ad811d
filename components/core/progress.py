"""Progress of long work, as log lines that a person and a program can read: the one format of them."""

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
SECONDS_BETWEEN = (1.0, 10.0)  # lines: at first, and of work that has taken minutes
_LINE = re.compile(
    r"progress: (?P<what>.+?) (?P<done>\d+)/(?P<total>\d+) (?P<unit>[^(]+) "
    r"\((?P<rate>[\d.e-]+) [^,]+/s, [^,]+ left(?:, (?P<note>.+))?\)"
)


@dataclass(frozen=True)
class ProgressLine:
    """How far some work is.

    Attributes:
        what: the work, such as "embedding pool".
        unit: of `done` and `total`, in the plural.
        rate: units in a second, since the work began in this process.
        note: figures of its own, such as the last loss.
    """

    what: str
    done: int
    total: int
    unit: str
    rate: float
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> ProgressLine | None:
        """Read a line that `str` has written; None of any other text."""
        if (found := _LINE.fullmatch(text)) is None:
            return None
        what, unit, note = found["what"], found["unit"], found["note"] or ""
        return cls(what, int(found["done"]), int(found["total"]), unit, float(found["rate"]), note)

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where there is none yet."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    @property
    def figures(self) -> str:
        """All but the work's name."""
        rate = f"{self.rate:.1f}" if self.rate >= 10 else f"{self.rate:.3g}"
        left = "unknown time" if self.seconds_left is None else clock(self.seconds_left)
        note = f", {self.note}" if self.note else ""
        return f"{self.done}/{self.total} {self.unit} ({rate} {self.unit}/s, {left} left{note})"

    def __str__(self) -> str:
        return f"progress: {self.what} {self.figures}"


def clock(seconds: float) -> str:
    """A time span as `0:02:31` or `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds))).replace(",", "")


class Advance(Protocol):
    """Says that so many more units are done; `note` goes into the line."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...  # noqa: D102


@contextmanager
def progress(what: str, total: int, unit: str = "images", start: int = 0) -> Generator[Advance]:
    """Yield `advance(count, note)`; logs a line now and then, the first one and the last one always."""
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
