"""Provenance of a snapshot: a JSON file beside its folder, in git, but no input of a stage.

The same images are the same data whoever ingests them, so the folder itself contains no provenance.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from components.core.config import Config, validate
from components.core.storage import write_json

SUFFIX = ".provenance.json"


class Provenance(Config):
    """Where a snapshot comes from."""

    source: str  # given folder or address; local paths are absolute
    source_version: str  # as given, or a digest of all names and bytes
    ingested_at: datetime
    ingested_by: str  # user of the machine
    one_run: bool = False  # ingested for one run: other runs use it only if they name it

    def write(self, snapshot: Path) -> None:
        """Write the file beside the snapshot's folder."""
        write_json(provenance_file(snapshot), self.model_dump(mode="json"))


def provenance_file(snapshot: Path) -> Path:
    """Return the path of the file beside a snapshot's folder."""
    return snapshot.with_name(snapshot.name + SUFFIX)


def read_provenance(snapshot: Path) -> Provenance | None:
    """Read the provenance of a snapshot; None if there is none, as for earlier versions.

    Raises:
        ConfigError: the file is malformed.
    """
    path = provenance_file(snapshot)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    return validate(Provenance, values if isinstance(values, dict) else {}, str(path))
