"""Read the record of a workspace or a commit as plain YAML: `dvc.lock`, `*.dvc` and the remote's address.

For audits this works for any old commit without a checkout or DVC: everything is read from git objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from components.core.config import parse_yaml
from components.core.errors import PedigreeError
from components.core.git import file_at, try_git
from components.core.layout import RELATIVE

LOCK = str(RELATIVE.dvc_lock)
REGISTER_STAGE = "register"


class RecordError(PedigreeError):
    """The record is incomplete or contradicts the disk; the message says which file and what to do."""


@dataclass(frozen=True)
class Record:
    """The record of stages and data in a commit, or in the workspace on disk if `revision` is None."""

    root: Path
    revision: str | None = None

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes at the revision; None if it does not exist."""
        if self.revision is None:
            file = self.root / path
            return file.read_bytes() if file.is_file() else None
        return file_at(self.root, self.revision, path)

    def stages(self) -> dict[str, Any]:
        """Return the stages of `dvc.lock`: name -> {cmd, deps, params, outs}.

        Raises:
            RecordError: there is no readable `dvc.lock`.
        """
        data = self.read(LOCK)
        where = f"{LOCK} at {self.revision[:12]}" if self.revision else str(self.root / LOCK)
        if data is None:
            raise RecordError(f"{where}: no such file, so it is unknown what made this model; run `dvc repro`")
        try:
            return dict(parse_yaml(data)["stages"])
        except (yaml.YAMLError, TypeError, KeyError):
            raise RecordError(f"{where}: not a DVC lock file") from None

    def lock_sha256(self) -> str:
        """Return the SHA-256 of the stages of `dvc.lock` as canonical JSON.

        Register stages are excluded, because they are recorded after the registration that contains this hash.
        """
        return stages_sha256(self.stages())

    def output(self, path: str) -> str | None:
        """Return the DVC id of a stage's output by its path; of a student, from the stage that evaluates it."""
        holder, inner = self.holder(path)
        if holder is None or not inner:
            return holder
        read = (dep for stage in self.stages().values() for dep in stage.get("deps", []))
        return next((dep["md5"] for dep in read if dep["path"] == path), None)

    def holder(self, path: str) -> tuple[str | None, str]:
        """Return the DVC id of the output that contains a path, and the path in it, empty or ending with a slash."""
        for out in (out for stage in self.stages().values() for out in stage.get("outs", [])):
            if out["path"] == path:
                return out["md5"], ""
            if PurePosixPath(out["path"]) in PurePosixPath(path).parents:
                return out["md5"], f"{PurePosixPath(path).relative_to(out['path'])}/"
        return None, ""

    def tracked(self, folder: str) -> dict[str, str]:
        """Return the snapshots below `folder` that `dvc add` tracks: path -> DVC id, sorted by path."""
        found = {}
        for file in self._dvc_files(folder):
            for out in parse_yaml(self.read(file) or b"").get("outs", []):
                found[(PurePosixPath(file).parent / out["path"]).as_posix()] = out["md5"]
        return found

    def remote_url(self) -> str | None:
        """Return the address of the default DVC remote: `.dvc/config` at the revision, overridden by local settings."""
        parser = ConfigParser(interpolation=None)
        try:
            own = Record(self.root).read(str(RELATIVE.dvc_local_settings))
            for text in (self.read(str(RELATIVE.dvc_settings)), own):
                parser.read_string((text or b"").decode())
            section = f'remote "{parser["core"]["remote"]}"'
            found = next(name for name in parser.sections() if name.strip("'") == section)
            return parser[found]["url"].rstrip("/")
        except (ConfigParserError, KeyError, StopIteration):
            return None

    def _dvc_files(self, folder: str) -> list[str]:
        if self.revision is None:
            found = (p.relative_to(self.root).as_posix() for p in (self.root / folder).rglob("*.dvc") if p.is_file())
        else:
            # Relative to `root`, which may be a subfolder of its git repository.
            listing = try_git(self.root, "ls-tree", "-r", "--name-only", self.revision, "--", folder) or ""
            found = (line for line in listing.splitlines() if line.endswith(".dvc"))
        return sorted(found)


def stages_sha256(stages: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the stages of a `dvc.lock`, as of `Record.lock_sha256`."""
    counted = {name: stage for name, stage in stages.items() if name.split("@")[0] != REGISTER_STAGE}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def find_record(root: Path, commit: str, lock_sha256: str | None) -> Record | None:
    """Find the record whose `dvc.lock` has this SHA-256, at the commit or a later one; None if there is none."""
    later = try_git(root, "rev-list", "--reverse", "--all", "--ancestry-path", f"^{commit}") or ""
    for revision in (commit, *later.split()):
        record = Record(root, revision)
        try:
            if record.lock_sha256() == lock_sha256:
                return record
        except RecordError:
            continue
    return None


def folder_id(folder: Path) -> str:
    """Compute the DVC id of a folder's present content: md5 over the JSON list of its files' md5s, by path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = [{"md5": file_md5(p), "relpath": p.relative_to(folder).as_posix()} for p in files]
    listing = json.dumps(sorted(entries, key=lambda e: e["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def content_id(path: Path) -> str:
    """Compute the DVC id of a file's or folder's present content."""
    return folder_id(path) if path.is_dir() else file_md5(path)


def upstream(stages: Mapping[str, Any], path: str) -> list[str]:
    """Return the names of the stages that produced `path`, directly or transitively, last one first."""
    pending, found = [path], []
    while pending:
        target = pending.pop(0)
        for name, stage in stages.items():
            makes = any(overlap(out["path"], target) for out in stage.get("outs", []))
            if makes and name not in found:
                found.append(name)
                pending += [dep["path"] for dep in stage.get("deps", [])]
    return found


def overlap(one: str, other: str) -> bool:
    """Return whether two paths are equal or one contains the other."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a == b or a in b.parents or b in a.parents


def file_md5(path: Path) -> str:
    """Return the MD5 of a file, which is its address in DVC and no proof of integrity."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
