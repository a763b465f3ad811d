"""Two writers that append to one chain of the audit log at once, on a real S3 server of their own."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.lineage.audit_heads import Heads
from components.lineage.audit_log import AuditLog, Event
from infra.local import supervisor

EVENTS, COMPARED = 1000, 10  # of each writer
CHAIN = "benchmark"


def append_at_once() -> tuple[float, float]:
    """Append 1,000 events each; return the seconds of one of the last ten and of the first ten, medians of both."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.environ.update(supervisor.up(Path(folder), only=("s3",)))
            return _append(Path(folder) / "heads")
        finally:
            supervisor.down(Path(folder))
            os.environ.clear()
            os.environ.update(before)


def _append(heads: Path) -> tuple[float, float]:
    bucket = os.environ["PEDIGREE_AUDIT_BUCKET"]

    def write(number: int) -> list[float]:
        log, seconds = AuditLog(bucket, Heads(bucket, heads / str(number))), []
        for _ in range(EVENTS):
            begun = time.perf_counter()
            log.append(Event(CHAIN, "benchmark", "event", f"writer {number}"))
            seconds.append(time.perf_counter() - begun)
        return seconds

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(write, range(2)))
    entries = AuditLog(bucket, Heads(bucket, None)).read(CHAIN)
    assert [entry.sequence for entry in entries] == list(range(1, 2 * EVENTS + 1)), "an event was lost"
    last = statistics.median(second for seconds in taken for second in seconds[-COMPARED:])
    return last, statistics.median(second for seconds in taken for second in seconds[:COMPARED])
