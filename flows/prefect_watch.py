"""Report an unreachable Prefect server in one line, and hide the messages of its client's retries."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from flows.console import screen

EVERY_SECONDS = 10.0
MISSES = 3  # consecutive
CLIENT_LOGGERS = ("prefect._internal", "prefect.events")
WITH_ITS_OWN_HANDLER = "prefect._internal.concurrency"
logger = logging.getLogger(__name__)


class _Watch:
    """Poll the server; while it is unreachable, hide its client's messages."""

    def __init__(self, address: str) -> None:
        self.address = address.removesuffix("/api")
        self.done = threading.Event()
        self.away = False
        self._misses = 0

    def run(self) -> None:
        while not self.done.wait(EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            httpx.get(f"{self.address}/api/health", timeout=5.0)
        except httpx.HTTPError as error:
            self._misses += 1
            if self._misses == MISSES:
                self._say(True, f"does not answer ({error}); `pedigree up` starts it. The run goes on without its page")
        else:
            self._misses = 0
            if self.away:
                self._say(False, "answers again")

    def _say(self, away: bool, what: str) -> None:
        self.away = away
        logging.raiseExceptions = not away  # else Prefect's log handler writes each failed attempt to stderr
        logger.warning("Prefect at %s %s", self.address, what)

    def shows(self, record: logging.LogRecord) -> bool:
        """Return whether to show a record."""
        error = record.exc_info[1] if record.exc_info else None
        return not self.away or not (record.name.startswith(CLIENT_LOGGERS) or isinstance(error, httpx.HTTPError))


@contextmanager
def watched(address: str) -> Iterator[None]:
    """Watch the server inside the block.

    Args:
        address: of its API.
    """
    watch = _Watch(address)
    thread = threading.Thread(target=watch.run, daemon=True)
    talking = (screen, logging.getLogger(WITH_ITS_OWN_HANDLER))
    for filterer in talking:
        filterer.addFilter(watch.shows)
    thread.start()
    try:
        yield
    finally:
        watch.done.set()
        thread.join()
        for filterer in talking:
            filterer.removeFilter(watch.shows)
        logging.raiseExceptions = True
