"""Show the progress of stages on Prefect's pages."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact

EVERY_SECONDS = 2.0
PATIENCE_SECONDS = 5.0


@contextmanager
def progress_artifact(name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that sets a stage's percentage.

    A thread sends the latest value, so that a slow or unreachable server does not delay the stage.
    """
    newest, done = [0.0], threading.Event()
    context = contextvars.copy_context()  # by which Prefect identifies the task run
    sender = threading.Thread(target=context.run, args=(_send, name, newest, done), daemon=True)
    sender.start()

    def show(percent: float) -> None:
        newest[0] = percent

    try:
        yield show
        newest[0] = 100.0
    finally:
        done.set()
        sender.join(PATIENCE_SECONDS)


def _send(name: str, newest: list[float], done: threading.Event) -> None:
    """Send the latest value until `done`, and once more afterwards."""
    artifact: Any = None
    sent: float | None = None
    last = False
    while not last:
        last = done.is_set()
        if newest[0] == sent:
            done.wait(EVERY_SECONDS)
            continue
        try:
            percent = newest[0]
            if artifact is None:
                artifact = create_progress_artifact(percent, description=f"Progress of {name}")
            else:
                update_progress_artifact(artifact, progress=percent)
            sent = percent
        except HTTPError:  # the server is unreachable, which `prefect_watch` reports
            done.wait(60.0)
        done.wait(EVERY_SECONDS)
