"""Whether a version may have learned images that were withdrawn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from mlflow.entities.model_registry import ModelVersion

from components.core.errors import PedigreeError
from components.core.layout import RELATIVE
from components.data.tombstones import read_withdrawn, tombstone_folder
from components.lineage.audit_chain import TAKEDOWN
from components.lineage.audit_log import Entry
from components.registry.differences import Side

pc: Any = pyarrow.compute  # created at import, invisible to pyright


def open_takedown(version: ModelVersion, entries: Iterable[Entry], subjects: set[str], root: Path) -> str:
    """Say which takedown concerns a version; empty: none.

    Args:
        version: a candidate, or a released version.
        entries: audit log of its model.
        subjects: addresses under which events name it.
        root: the checkout, whose tombstones count too: a run may have begun before a takedown and registered after it.
    """
    for entry in entries:
        if entry.action == TAKEDOWN and entry.subject in subjects:
            details = entry.details
            return f"{details['takedown']} on {entry.time[:10]} ({details['relation']}): {details['reason']}"
    withdrawn = read_withdrawn(root / tombstone_folder(RELATIVE.pool)).images
    if not withdrawn:
        return ""
    try:
        images = Side.registered(version.tags, root).images(root)["image_id"]
    except (PedigreeError, ValueError, KeyError) as error:
        return f"it is unknown whether it learned withdrawn images: {' '.join(str(error).split())}"
    found = images.filter(pc.is_in(images, value_set=pa.array(sorted(withdrawn)))).to_pylist()
    return f"{len(found)} images of its training set were withdrawn, the first {withdrawn[found[0]]}" if found else ""
