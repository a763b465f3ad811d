"""Lock of the pool: its folders and their DVC files allow one writer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from components.core.layout import RELATIVE
from components.core.locks import exclusive

LOCK = RELATIVE.state / "pool.lock"


@contextmanager
def pool_held(
    what: str, logger: logging.Logger | logging.LoggerAdapter[Any], doing: str = "the ingest of"
) -> Iterator[None]:
    """Lock the pool of the current checkout; wait while another process holds it, and log its holder.

    The lock is reentrant, and released when the process ends. Its file names the last holder, by `doing` and `what`,
    such as the name of a source.
    """
    path = LOCK.absolute()
    with exclusive(path, lambda holder: logger.info("waiting for %s", holder or "another ingest"), reentrant=True):
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        path.write_text(f"{doing} {what} (process {os.getpid()}, since {since})")
        yield
