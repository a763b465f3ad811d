"""Send metrics from a background thread, so that a training step never waits for the tracker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

log = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class MetricPoint:
    """One value of a metric at a step, with its time in milliseconds since 1970."""

    name: str
    value: float
    milliseconds: int
    step: int


class MetricQueue:
    """Collect metric points and pass them to `send` in batches.

    If `send` raises `failure`, the batch is sent again with the next one: an unreachable tracker must not stop a
    training that takes days. Only `flush` raises.
    """

    def __init__(self, send: Callable[[Sequence[MetricPoint]], None], failure: type[Exception]) -> None:
        self._send, self._failure = send, failure
        self._pending: list[MetricPoint] = []
        self._sender: ThreadPoolExecutor | None = None
        self._sending: Future[list[MetricPoint]] | None = None
        self._sent = 0.0

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the metrics of a step; costs microseconds."""
        now = int(time.time() * 1000)
        self._pending += [MetricPoint(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent < SEND_EVERY_SECONDS or (self._sending and not self._sending.done()):
            return
        self._take_back()
        self._sender = self._sender or ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        batch, self._pending, self._sent = self._pending, [], time.monotonic()
        self._sending = self._sender.submit(self._deliver, batch)

    def flush(self) -> None:
        """Send all queued points now; if `send` raises, the points stay queued and the error propagates."""
        self._take_back()
        if self._sender:
            self._sender.shutdown()
            self._sender = None
        if self._pending:
            self._send(self._pending)
        self._pending = []

    def _deliver(self, batch: list[MetricPoint]) -> list[MetricPoint]:
        """Send a batch; return the unsent points."""
        try:
            self._send(batch)
        except self._failure as error:
            log.warning("metrics wait: %s", error)
            return batch
        return []

    def _take_back(self) -> None:
        if self._sending is not None:
            self._pending = self._sending.result() + self._pending
            self._sending = None
