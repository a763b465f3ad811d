"""Who brought a snapshot, when and from where: a JSON file beside its folder, tracked with it and no stage's input.

The same images are the same data, whoever brings them: what is in the folder says nothing of that.
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

    source: str  # the folder or address as it was given; a local one absolute
    source_version: str  # given by the source, or a digest of all its names and bytes
    ingested_at: datetime
    ingested_by: str  # user of the machine
    one_run: bool = False  # brought for one run: only a run that names the snapshot takes it

    def write(self, snapshot: Path) -> None:
        """Write the file beside the snapshot's folder."""
        write_json(provenance_file(snapshot), self.model_dump(mode="json"))


def provenance_file(snapshot: Path) -> Path:
    """The file beside a snapshot's folder."""
    return snapshot.with_name(snapshot.name + SUFFIX)


def read_provenance(snapshot: Path) -> Provenance | None:
    """The provenance of a snapshot; None where nothing was written, as by earlier versions.

    Raises:
        ConfigError: the file was changed by hand to something else.
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
