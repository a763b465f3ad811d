"""Find the DVC objects that a commit or a folder needs: those in `dvc.lock` and `*.dvc`, with the files of folders.

Outputs in git (`cache: false`) are included, because DVC's run cache stores them and needs them to restore a stage.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from components.core.config import parse_yaml
from components.core.git import git
from components.core.references import DATA_ID
from components.lineage.lock_file import LOCK, RecordError

FOLDER = ".dir"  # suffix of the id of a folder's listing


class Needs:
    """Needed objects of one repository.

    Args:
        root: the checkout; all worktrees share its commits.
        read: returns the bytes of a listing by its id; None if it is missing.
    """

    def __init__(self, root: Path, read: Callable[[str], bytes | None]) -> None:
        self.root = root
        self.unlisted: set[str] = set()  # needed folders with missing listings
        self._read = read
        self._blob = functools.cache(self._named_by)
        self._files = functools.cache(self._listed)

    def of_commit(self, revision: str) -> set[str]:
        """Return the ids of the objects that a commit needs."""
        lines = git(self.root, "ls-tree", "-r", revision).splitlines()
        entries = [line.partition("\t") for line in lines]
        blobs = [facts.split()[2] for facts, _, path in entries if _names_data(path)]
        return self.whole(id_ for blob in blobs for id_ in self._blob(blob))

    def of_folder(self, folder: Path) -> set[str]:
        """Return the ids of the objects that a worktree's present files need, committed or not."""
        arguments = ("ls-files", "--cached", "--others", "--exclude-standard", "-z")
        paths = {folder / name for name in git(folder, *arguments).split("\0") if _names_data(name)} | {folder / LOCK}
        texts = {path: path.read_bytes() for path in paths if path.is_file()}
        return self.whole(id_ for path, text in texts.items() for id_ in _ids(text, str(path)))

    def of_history(self, revisions: Iterable[str]) -> set[str]:
        """Return the ids of ingested data in any ancestor of `revisions`, because it cannot be recomputed."""
        arguments = ("-c", "log.showRoot=true", "log", "--raw", "--no-abbrev", "--no-renames", "--full-history", "-m")
        lines = git(self.root, *arguments, "--format=", *revisions, "--", "*.dvc").splitlines()
        changed = {sha for line in lines for sha in line.split()[2:4]}  # the file before and after each change
        blobs = [sha for sha in changed if set(sha) != {"0"}]
        return self.whole(id_ for blob in blobs for id_ in self._blob(blob))

    def whole(self, ids: Iterable[str]) -> set[str]:
        """Return the ids, and those of the files in folders among them."""
        found = set(ids)
        return found.union(*(self._files(id_) for id_ in found if id_.endswith(FOLDER)))

    def _named_by(self, blob: str) -> tuple[str, ...]:
        return tuple(_ids(git(self.root, "cat-file", "blob", blob).encode(), f"git object {blob[:12]}"))

    def _listed(self, folder: str) -> tuple[str, ...]:
        data = self._read(folder)
        if data is None:
            self.unlisted.add(folder)
            return ()
        try:
            return tuple(str(item["md5"]) for item in json.loads(data))
        except (ValueError, TypeError, KeyError):
            raise RecordError(f"DVC object {folder}: not a folder's listing; `dvc fetch` it again") from None


def ids_of(outputs: Iterable[Any]) -> list[str]:
    """Return the DVC ids of the outputs of a stage, a `.dvc` file or a run-cache entry."""
    return [out["md5"] for out in outputs if DATA_ID.fullmatch(str(out.get("md5")))]


def read_yaml(text: bytes, where: str) -> Any:
    """Parse YAML.

    Raises:
        RecordError: it is invalid, so the objects that it names are unknown.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise RecordError(
            f"{where}: not readable as YAML, so the data that it names is not known; mend it first"
        ) from None


def _ids(text: bytes, where: str) -> list[str]:
    """Return the ids in a `dvc.lock` or a `.dvc` file."""
    try:
        found = read_yaml(text, where) or {}
        stages = found["stages"].values() if "stages" in found else [found]
        return [id_ for stage in stages for id_ in ids_of(stage.get("outs") or [])]
    except (AttributeError, TypeError):
        raise RecordError(
            f"{where}: not as DVC writes it, so the data that it names is not known; mend it first"
        ) from None


def _names_data(path: str) -> bool:
    return PurePosixPath(path).suffix == ".dvc" or PurePosixPath(path).name == LOCK
