"""The documents of a registered version, made anew from its trace and compared with those that lie in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.config import ConfigError
from components.core.references import ModelReference
from components.core.storage import atomic_dir, write_bytes
from components.lineage.trace import find_version, trace
from components.registry.documents.graph import read_graph
from components.registry.documents.write import DOCUMENTS, KINDS, make_documents
from components.registry.facts import FOLDER, read_facts
from components.registry.making import read_making
from components.registry.publish import RegistryError


@dataclass(frozen=True)
class Written:
    """Documents that were written.

    Attributes:
        version: `NAME/NUMBER`.
        folder: where they are.
        sha256: of each, by file name.
        differing: names of those whose bytes are not those in the model's folder; None: it has none.
        missing: what the trace does not know, so that they may lack it.
    """

    version: str
    folder: str
    sha256: dict[str, str]
    differing: list[str] | None
    missing: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def write_documents(reference: str, root: Path, out: Path) -> Written:
    """Make the documents of a registered version and write them to a folder, which appears whole.

    Args:
        reference: `NAME@alias` or `NAME/number`.
        root: as of `trace`.
        out: a new or empty folder, or one that holds such documents.

    Raises:
        ConfigError: what is no reference; the folder holds something else.
        RegistryError: the version was registered without the records that documents need.
        RecordError: as of `trace`, or too little of its origin is known.
        TrackingError: MLflow does not answer.
    """
    _check_folder(out)
    version = ModelReference.of_version(find_version(reference, root))
    traced = trace(str(version), root)
    with tempfile.TemporaryDirectory() as temporary:
        record = _download(version, FOLDER, Path(temporary))
        facts, making = (read_facts(record), read_making(record)) if record else (None, None)
        if facts is None or making is None:
            raise RegistryError(f"{version}: was registered without the records that documents need; run again")
        made = make_documents(read_graph(version.name, traced.root, making, facts, root))
        registered = _download(version, DOCUMENTS, Path(temporary))
        differing = None if registered is None else [n for n in made if _read(registered / n) != made[n]]
    with atomic_dir(out) as staging:
        for name, document in made.items():
            write_bytes(staging / name, document)
    digests = {name: hashlib.sha256(document).hexdigest() for name, document in made.items()}
    return Written(str(version), str(out), digests, differing, traced.missing)


def _check_folder(out: Path) -> None:
    if out.is_file():
        raise ConfigError(f"--out {out}: a file; name a folder")
    if out.is_dir() and (other := sorted({path.name for path in out.iterdir()} - KINDS.keys())):
        raise ConfigError(
            f"--out {out}: holds {other[0]}, which is no document of these; name a new or an empty folder"
        )


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _download(version: ModelReference, folder: str, target: Path) -> Path | None:
    """A folder among the version's artifacts; None if there is none."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=f"{version.uri}/artifacts/{folder}", dst_path=str(target)))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
