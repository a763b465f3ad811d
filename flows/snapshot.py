"""Commit a checkout's present code and configuration for a run.

Tracked files are included with their edits. Of untracked files, only code, Pedigree's top-level files and the files
beside snapshots of the pool and the evaluation sets (`.dvc` file, provenance) are included; others are skipped, and
named in the log.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from components.core.git import git
from components.core.layout import RELATIVE
from components.data.provenance import SUFFIX
from components.recipe import PARAMS_FILE
from flows.git import WorkspaceError, head
from flows.sources import COLLECTIONS

logger = logging.getLogger(__name__)

_COLLECTED = tuple(f"{collection}/" for collection in COLLECTIONS)
_OF_SNAPSHOTS = (".dvc", SUFFIX)
CODE_FOLDERS = ("flows", "components", "infra", "tests")
TOP_FILES = (
    *map(str, (RELATIVE.params, RELATIVE.pipeline, RELATIVE.dvc_lock)),
    *map(str, (RELATIVE.dvc_settings, RELATIVE.dvc / ".gitignore")),
    "prefect.yaml", "pyproject.toml", "requirements.lock", "Makefile", "LICENSE", "README.md", ".gitignore",
    ".gitattributes", ".dvcignore",
)  # fmt: skip
MIB = 2**20
MAX_FILE_MIB, MAX_SUM_MIB = 5, 20  # of untracked files; this project's code is 3 MiB
_SECRET = re.compile(
    r"\.env(\..+)?|\.(netrc|pgpass|htpasswd|pypirc|npmrc|git-credentials)|.+\.(pem|key|p12|pfx|jks|keystore|kdbx)"
    r"|(id_(rsa|dsa|ecdsa|ed25519)|credentials?|secrets?)([._-].*)?",
    re.IGNORECASE,
)
_NO_SECRET = (".py", ".pyi", ".md", ".pub", ".example", ".sample", ".template")  # code, and files made to be shared


def snapshot(checkout: Path, params: str, sources: Sequence[str], message: str) -> str:
    """Commit the checkout's present code and configuration without changing it or its index; return the commit.

    Args:
        checkout: Pedigree's folder.
        params: text of the run's `params.yaml`.
        sources: the included snapshots, as SOURCE/SNAPSHOT.
        message: of the commit.

    Raises:
        WorkspaceError: not a repository with a commit, or an untracked file is too large.
        GitError: git failed.
    """
    at = head(checkout)
    with tempfile.TemporaryDirectory(prefix="pedigree-", dir=at.index.parent) as scratch:
        index = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        if at.index.exists():  # with mtime, by which git detects unchanged files
            shutil.copy2(at.index, index["GIT_INDEX_FILE"])
        else:
            git(checkout, "read-tree", "HEAD", extra=index)
        tracked, untracked = _listed(checkout, index)
        held_back = _reset_secrets(checkout, [path for path in tracked if looks_secret(path)], index)
        git(checkout, "add", "--update", "--", ".", *(f":(exclude,literal){p}" for p in held_back), extra=index)
        if taken := _taken(checkout, untracked):
            git(checkout, "update-index", "--add", "--remove", "-z", "--stdin", extra=index, given=_z(taken))
        blob = git(checkout, "hash-object", "-w", "--no-filters", "--stdin", given=params)
        entries = [f"0 {'0' * len(blob)}\t{path}" for path in [*tracked, *taken] if _is_unused(path, sources)]
        entries.append(f"100644 {blob}\t{PARAMS_FILE}")
        git(checkout, "update-index", "-z", "--index-info", extra=index, given=_z(entries))
        tree = git(checkout, "write-tree", extra=index)
    return git(checkout, "commit-tree", tree, "-p", at.commit, "-m", message)


def looks_secret(path: str) -> bool:
    """Return whether a file's name suggests keys or passwords."""
    name = path.rpartition("/")[2]
    return bool(_SECRET.fullmatch(name)) and not name.lower().endswith(_NO_SECRET)


def describe(root: Path, paths: Sequence[str]) -> str:
    """Describe files: their number, their size if large, and an example."""
    size = sum((root / path).lstat().st_size for path in paths if os.path.lexists(root / path))
    large = f", {size / MIB:,.0f} MiB" if size >= MIB else ""
    return paths[0] if len(paths) == 1 and not large else f"{len(paths):,} file(s){large}, such as {paths[0]}"


def by_top_level(paths: Iterable[str]) -> list[list[str]]:
    """Group paths by top-level folder; top-level files are one group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[path.partition("/")[0] if "/" in path else ""].append(path)
    return list(groups.values())


def _listed(checkout: Path, index: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return tracked paths, and paths neither tracked nor ignored (nested repositories end with a slash)."""
    said = git(checkout, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard", extra=index)
    entries = [entry for entry in said.split("\0") if entry]
    return [e[2:] for e in entries if e[0] != "?"], [e[2:] for e in entries if e[0] == "?"]


def _reset_secrets(checkout: Path, paths: list[str], index: dict[str, str]) -> list[str]:
    """Reset tracked files that look like secrets to their committed version; return `paths`."""
    if not paths:
        return paths
    edited = git(checkout, "--literal-pathspecs", "diff-index", "--name-only", "-z", "HEAD", "--", *paths, extra=index)
    git(checkout, "--literal-pathspecs", "reset", "--quiet", "HEAD", "--", *paths, extra=index)
    for path in filter(None, edited.split("\0")):
        logger.warning("%s looks like a secret: the run has its committed version, if any, and no edits of it", path)
    return paths


def _taken(checkout: Path, untracked: list[str]) -> list[str]:
    """Return the untracked files to include; log the others."""
    ours = [path for path in untracked if _belongs(path)]
    secrets = [path for path in ours if looks_secret(path)]
    repositories = [path for path in untracked if path.endswith("/")]
    rest = set(untracked) - set(ours) - set(repositories)
    for path in repositories:
        logger.warning("left out of the run: %s is a git repository of its own", path)
    if secrets:
        logger.warning("left out of the run, by names like those of secrets: %s", describe(checkout, secrets))
    for group in by_top_level(path for path in untracked if path in rest):
        logger.warning("left out of the run, not in git and no code: %s", describe(checkout, group))
    taken = sorted(set(ours) - set(secrets))
    _check_sizes(checkout, taken)
    return taken


def _belongs(path: str) -> bool:
    if path.endswith("/"):
        return False
    if path.startswith(_COLLECTED):
        return path.endswith((*_OF_SNAPSHOTS, "/.gitignore"))
    return path in TOP_FILES or ("/" in path and path.partition("/")[0] in CODE_FOLDERS)


def _check_sizes(checkout: Path, paths: list[str]) -> None:
    """Refuse untracked files that would make each run's commit and folder large.

    Raises:
        WorkspaceError: a file or the sum is too large.
    """
    sizes = {path: (checkout / path).lstat().st_size for path in paths if os.path.lexists(checkout / path)}
    if not sizes:
        return
    largest = max(sizes, key=sizes.__getitem__)
    limits = f"a run takes files that git does not track up to {MAX_FILE_MIB} MiB each, {MAX_SUM_MIB} MiB together"
    if sizes[largest] > MAX_FILE_MIB * MIB or sum(sizes.values()) > MAX_SUM_MIB * MIB:
        raise WorkspaceError(
            f"{largest} ({sizes[largest] / MIB:,.1f} MiB; all {len(sizes)} untracked: {sum(sizes.values()) / MIB:,.1f} "
            f"MiB): {limits}; commit it to git yourself, name it in .gitignore, or track it with `dvc add`"
        )


def _is_unused(path: str, sources: Sequence[str]) -> bool:
    """Return whether a file belongs to a snapshot outside of the run."""
    ending = next((each for each in _OF_SNAPSHOTS if path.endswith(each)), None)
    if ending is None or not path.startswith(_COLLECTED):
        return False
    return "/".join(path.removesuffix(ending).split("/")[2:]) not in sources


def _z(entries: Iterable[str]) -> str:
    return "".join(f"{entry}\0" for entry in entries)
