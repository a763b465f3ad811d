"""Checkpoints of the audit log: the last entry of each chain that this checkout has verified.

An append verifies a chain from its checkpoint on. A lost checkpoint costs one reading of the whole chain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path

from components.core.layout import Layout
from components.core.storage import write_json
from components.lineage.audit_chain import Head

logger = logging.getLogger(__name__)


def heads_folder() -> Path | None:
    """The folder of checkpoints in the checkout or run's folder that this process works in; None outside of one."""
    layout = Layout()
    return layout.audit_heads.absolute() if layout.state.is_dir() else None


class Heads:
    """The checkpoints of one bucket; without a folder they last as long as this object."""

    def __init__(self, bucket: str, folder: Path | None) -> None:
        place = hashlib.sha256(f"{os.environ.get('AWS_ENDPOINT_URL', '')} {bucket}".encode()).hexdigest()[:16]
        self._folder = folder / place if folder else None
        self._known: dict[str, Head] = {}

    def get(self, name: str) -> Head:
        """Return the checkpoint of a chain; that of an empty chain if there is none."""
        return max(self._known.get(name, Head()), self._stored(name), key=lambda head: head.sequence)

    def put(self, name: str, head: Head) -> None:
        """Remember a verified head."""
        self._known[name] = head
        if self._folder:
            try:
                write_json(self._file(self._folder, name), dataclasses.asdict(head))
            except OSError as error:  # the event is written: it must not look as if it were not
                logger.warning("no checkpoint of the audit log (%s): the next command reads all of %s", error, name)

    def known(self) -> dict[str, Head]:
        """Return all checkpoints, by chain."""
        stored = self._folder.glob("*.json") if self._folder else ()
        return {name: self.get(name) for name in {*self._known, *(path.name.removesuffix(".json") for path in stored)}}

    def where(self, name: str) -> str:
        """Say who has seen the head, and what to do if it was right that it went."""
        if not self._folder:
            return "this process has seen it"
        return f"it was verified here; if the log was made anew on purpose, delete {self._file(self._folder, name)}"

    def _stored(self, name: str) -> Head:
        if not self._folder:
            return Head()
        try:
            return Head(**json.loads(self._file(self._folder, name).read_text()))
        except (OSError, ValueError, TypeError):
            return Head()

    @staticmethod
    def _file(folder: Path, name: str) -> Path:
        return folder / f"{name}.json"
