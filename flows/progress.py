"""A stage's percent in Prefect's page."""

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
    """Yield a function that shows a stage's percent.

    It only notes the number; a thread sends the newest one, so that a server that is slow or away holds no stage up.
    """
    newest, done = [0.0], threading.Event()
    context = contextvars.copy_context()  # in which Prefect finds the task run
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
    """Send the newest number until `done`, and once more then."""
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
        except HTTPError:  # the server is away, which `prefect_watch` says
            done.wait(60.0)
        done.wait(EVERY_SECONDS)
