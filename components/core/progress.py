"""Progress of long work: a bar where a person looks, a plain line now and then where a log is kept."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_EVERY_SECONDS = 5.0
PROGRESS_LINE = re.compile(r"^progress: (?P<what>.+?) (?P<done>\d+)/(?P<total>\d+) ")


@contextmanager
def progress(what: str, total: int, unit: str = "images", start: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`; shows a bar on a terminal, else a line that `PROGRESS_LINE` can read."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=start)
            yield lambda count=1: bar.advance(task, count)
        return
    begun, done, last = time.monotonic(), start, 0.0

    def advance(count: int = 1) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS or done >= total:
            last = now
            rate = (done - start) / max(now - begun, 1e-9)
            left = (total - done) / rate if rate > 0 else float("inf")
            line = f"progress: {what} {done}/{total} {unit} ({rate:.1f} {unit}/s, {left:.0f} s left)"
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this file is the one that shows progress

    yield advance


def track(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yield `items` one by one while showing how many of `total` are done."""
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
