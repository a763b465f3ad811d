"""Collect the provenance of a model's weights, for the tags of a registered version."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from components.core.git import try_git
from components.core.layout import RELATIVE, Layout
from components.core.model_files import FILES_TAG
from components.core.registered_weights import WEIGHTS_SHA256_TAG
from components.core.storage import sha256_file
from components.data.manifest import MANIFEST
from components.lineage.lock_file import Record, RecordError, folder_id

CURATED, POOL, EVALUATION = str(RELATIVE.curated), str(RELATIVE.pool), str(RELATIVE.evaluation)
# What a run writes into files that git tracks.
OUTPUTS = tuple(str(path) for path in (RELATIVE.dvc_lock, RELATIVE.params, RELATIVE.reports))
WEIGHTS_FILE = "model.safetensors"


class Tag(StrEnum):
    """Tags of a registered version. On candidates the training side sets them; the audit log copies them."""

    COMMIT = "pedigree.git_commit"
    BRANCH = "pedigree.run_branch"
    DIRTY = "pedigree.git_dirty"
    LOCK_SHA256 = "pedigree.dvc_lock_sha256"
    WEIGHTS_PATH = "pedigree.weights_path"
    WEIGHTS_DVC = "pedigree.weights_dvc"
    WEIGHTS_SHA256 = WEIGHTS_SHA256_TAG
    POOL = "pedigree.pool"
    EVALUATION = "pedigree.evaluation"
    CURATED = "pedigree.curated"
    VALIDATION = "pedigree.validation"
    PARENT = "pedigree.parent"
    PARENT_SHA256 = "pedigree.parent_sha256"
    ANCHOR = "pedigree.anchor"  # id of the git tag that holds the commit
    DIGEST = "pedigree.digest"
    FILES = FILES_TAG
    CANDIDATE = "pedigree.candidate"
    AUDIT = "pedigree.audit"
    EVIDENCE = "pedigree.evidence"  # digest of the facts that the gates judge
    VERDICT = "pedigree.verdict"  # of the gates at registration
    SCORE = "pedigree.score"  # the main measure
    RELEASED = "pedigree.released"  # on a candidate: the version that it became
    REJECTED = "pedigree.rejected"  # on a candidate: who and why
    TAKEDOWN = "pedigree.takedown"  # the last takedown of images that it may have learned, and why


DECISION_TAGS = (
    Tag.CANDIDATE,
    Tag.AUDIT,
    Tag.RELEASED,
    Tag.REJECTED,
    Tag.TAKEDOWN,
)  # set later, each by an audit event


@dataclass(frozen=True)
class DataVersion:
    """One version of a data folder: path in the workspace, DVC id (`<md5>.dir`) and its manifest's SHA-256."""

    path: str
    dvc: str
    manifest_sha256: str | None


@dataclass(frozen=True)
class Origin:
    """Origin of a set of weights.

    Attributes:
        weights_path: folder of the weights in the workspace.
        weights_dvc: its DVC id in `dvc.lock`, verified against the bytes.
        weights_sha256: of model.safetensors.
        dirty: whether tracked files other than `OUTPUTS` differed from the commit.
    """

    commit: str
    branch: str
    dirty: bool
    lock_sha256: str
    weights_path: str
    weights_dvc: str
    weights_sha256: str
    pool: tuple[DataVersion, ...]
    evaluation: tuple[DataVersion, ...]
    curated: DataVersion

    def tags(self) -> dict[str, str]:
        """Return the origin as tags of a model version."""
        return {
            Tag.COMMIT: self.commit,
            Tag.BRANCH: self.branch,
            Tag.DIRTY: str(self.dirty).lower(),
            Tag.LOCK_SHA256: self.lock_sha256,
            Tag.WEIGHTS_PATH: self.weights_path,
            Tag.WEIGHTS_DVC: self.weights_dvc,
            Tag.WEIGHTS_SHA256: self.weights_sha256,
            Tag.POOL: _dump(self.pool),
            Tag.EVALUATION: _dump(self.evaluation),
            Tag.CURATED: _dump((self.curated,)),
        }


def collect_origin(root: Path, weights_path: str) -> Origin:
    """Read the origin of the weights in `root/weights_path`, and verify them against `dvc.lock`.

    Raises:
        RecordError: there is no git commit or `dvc.lock`, it lacks an output, or the weights differ from it.
    """
    record = Record(root)
    commit = try_git(root, "rev-parse", "HEAD")
    if commit is None:
        raise RecordError(f"{root}: not in a git repository with a commit, so no commit can be named as the origin")
    weights_dvc = _recorded(record, weights_path)
    if folder_id(root / weights_path) != weights_dvc:
        raise RecordError(
            f"{root / weights_path}: not the bytes that dvc.lock records ({weights_dvc[:12]}); "
            "run the stage that makes it again, or `dvc checkout`"
        )
    return Origin(
        commit=commit,
        branch=try_git(root, "branch", "--show-current") or "(none)",
        dirty=bool(try_git(root, "status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in OUTPUTS))),
        lock_sha256=record.lock_sha256(),
        weights_path=weights_path,
        weights_dvc=weights_dvc,
        weights_sha256=sha256_file(root / weights_path / WEIGHTS_FILE),
        pool=_data(root, record.tracked(POOL)),
        evaluation=_data(root, record.tracked(EVALUATION)),
        curated=_data(root, {CURATED: _recorded(record, CURATED)})[0],
    )


def data_versions(tags: Mapping[str, str], tag: Tag) -> tuple[DataVersion, ...]:
    """Parse the data versions in a version's tag."""
    return tuple(DataVersion(**item) for item in json.loads(tags.get(tag, "[]")))


def _recorded(record: Record, path: str) -> str:
    dvc_id = record.output(path)
    if dvc_id is None:
        raise RecordError(
            f"{Layout(record.root).dvc_lock}: no stage has the output {path}; run the stage that makes it"
        )
    return dvc_id


def _data(root: Path, found: Mapping[str, str]) -> tuple[DataVersion, ...]:
    versions = []
    for path, dvc_id in found.items():
        manifest = root / path / MANIFEST
        versions.append(DataVersion(path, dvc_id, sha256_file(manifest) if manifest.is_file() else None))
    return tuple(versions)


def _dump(versions: tuple[DataVersion, ...]) -> str:
    return json.dumps([dataclasses.asdict(v) for v in versions], sort_keys=True, separators=(",", ":"))
