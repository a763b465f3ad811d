"""Verify a registered version from its bytes: its signature, the digests of its tags, and its audit event."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.errors import PedigreeError
from components.core.mlflow_client import reported, server_uri
from components.core.model_files import ModelFilesError, differing_files, digest_of, file_digests
from components.core.references import ModelReference
from components.core.signing import SignatureError, verify_folder
from components.lineage.audit_log import AuditLog
from components.lineage.provenance import Tag
from components.lineage.trace import find_version


@dataclass(frozen=True)
class Verification:
    """What was found out about a version.

    Attributes:
        version: `NAME/NUMBER`.
        digest: of the files that lie at its source now.
        files: how many these are.
        checks: what was checked; the value says what is wrong, None that nothing is.
        differing: paths of the files that are not those of its tags.
    """

    version: str
    digest: str
    files: int
    checks: dict[str, str | None]
    differing: list[str]

    @property
    def holds(self) -> bool:
        """Whether all that was checked agrees."""
        return not any(self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"holds": self.holds, **dataclasses.asdict(self)}


def verify(reference: str, root: Path) -> Verification:
    """Download a version's files and compare them with their signature, the version's tags and its audit event.

    A candidate has neither signature nor event: only its tags are compared.

    Args:
        reference: `NAME@alias` or `NAME/number`.
        root: as of `trace`.

    Raises:
        PedigreeError: as of `trace`; or its files cannot be downloaded.
    """
    version = find_version(reference, root)
    checks: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = _download(version, Path(temporary))
        files = file_digests(folder)
        if not ModelReference(version.name).is_candidate:
            checks["signature"] = _said(SignatureError, verify_folder, folder)
            checks["audit event"] = _said(ModelFilesError, _check_event, version, digest_of(files))
        differing: list[str] = []
        checks["tags"] = _said(ModelFilesError, lambda: differing.extend(differing_files(folder, version.tags)))
    if differing:
        checks["tags"] = f"{len(differing)} files are not those that were registered"
    elif version.tags.get(Tag.DIGEST) != digest_of(files):
        checks["tags"] = f"{Tag.DIGEST} is not the digest of the files"
    return Verification(f"{version.name}/{version.version}", digest_of(files), len(files), checks, differing)


def _download(version: Any, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    with reported():
        return Path(
            download_artifacts(artifact_uri=str(version.source), dst_path=str(target), tracking_uri=server_uri())
        )


def _check_event(version: Any, digest: str) -> None:
    subject = f"{version.name}/{version.version}"
    about = [entry for entry in AuditLog.from_environment().read(version.name) if entry.subject == subject]
    if not any(entry.action == "promote" for entry in about):
        raise ModelFilesError("no promotion in the audit log lets it in")
    if stated := next((e.details["digest"] for e in about if e.details.get("digest", digest) != digest), None):
        raise ModelFilesError(f"the audit log lets in the digest {stated}, but its files have {digest}")


def _said(kind: type[PedigreeError], check: Any, *arguments: Any) -> str | None:
    """What a check says is wrong; None: nothing."""
    try:
        check(*arguments)
    except kind as error:
        return str(error)
    return None
