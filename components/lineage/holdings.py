"""Find all data versions of a repository, and what holds them: commits, branches and registered versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from components.core.git import call_git, git
from components.core.mlflow_client import checked_client, reported
from components.core.references import DATA_ID, ModelReference
from components.lineage.claims import DATA_TAGS, versions
from components.lineage.lock_file import LOCK, RecordError, stages_sha256
from components.lineage.needs import read_yaml
from components.lineage.provenance import CURATED, EVALUATION, POOL, Tag, data_versions

KINDS = {POOL: "pool", EVALUATION: "evaluation", CURATED: "curated"}  # of data, by folder


class Data(NamedTuple):
    """A version of a data folder: its path in a workspace, and its DVC id (`<md5>.dir`)."""

    path: str
    dvc: str

    @property
    def kind(self) -> str:
        """`pool`, `evaluation` or `curated`."""
        return KINDS[_folder(self.path)]


@dataclass
class Holders:
    """What holds a data version in git.

    Attributes:
        commits: those that recorded it, oldest first; later ones hold it too until another one replaces it.
        branches: branches and tags whose last commit holds it, such as `runs/<run-id>` or `origin/runs/<run-id>`.
    """

    commits: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Registered:
    """A registered version.

    Attributes:
        reference: `NAME/3`.
        aliases: of it.
        data: data versions in its tags and in the `dvc.lock` that it was registered with.
        parent: registered version that taught it or that it started from, or a path in its run.
        parent_sha256: of that one's weights.
        weights_sha256: of its own weights.
        unknown: why its data is not known, if so.
    """

    reference: str
    aliases: tuple[str, ...]
    data: frozenset[Data]
    parent: str | None
    parent_sha256: str | None
    weights_sha256: str | None
    unknown: str | None = None


@dataclass
class Holdings:
    """Data versions of all commits of all branches, with what holds them.

    Attributes:
        locks: data versions of each `dvc.lock`, by the SHA-256 of its stages.
        unknown: lines about records that cannot be read.
    """

    data: dict[Data, Holders] = field(default_factory=dict)
    locks: dict[str, frozenset[Data]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def find_holdings(root: Path) -> Holdings:
    """Read `dvc.lock` and all `*.dvc` of every commit of every branch, tag and remote branch.

    Raises:
        GitError: not a git repository.
    """
    found = Holdings()
    changes = list(_changes(root))
    named = _named(root, {(blob, path) for _, path, blob in changes}, found)
    for commit, path, blob in changes:
        for data in named[blob, path]:
            commits = found.data.setdefault(data, Holders()).commits
            if commit not in commits:
                commits.append(commit)
    for ref, path, blob in _tips(root, {path for _, path, _ in changes}):
        for data in named.get((blob, path), ()):
            if ref not in found.data[data].branches:
                found.data[data].branches.append(ref)
    return found


def read_registry(locks: Mapping[str, frozenset[Data]]) -> list[Registered]:
    """Return all registered versions of Pedigree with the data that they hold.

    Args:
        locks: of `Holdings`.

    Raises:
        TrackingError: MLflow does not answer.
    """
    client = checked_client()
    found = [version for version in versions(client) if version.tags.get(Tag.COMMIT)]
    with reported():
        models = {name: client.get_registered_model(name) for name in sorted({version.name for version in found})}
    found.sort(key=lambda version: (version.name, int(version.version)))
    return [_registered(version, models[version.name].aliases, locks) for version in found]


def _registered(version: Any, aliases: Mapping[str, Any], locks: Mapping[str, frozenset[Data]]) -> Registered:
    tags, unknown, data = version.tags, None, set[Data]()
    try:
        data = {Data(item.path, item.dvc) for tag in DATA_TAGS for item in data_versions(tags, tag)}
    except (ValueError, TypeError):
        unknown = f"its tags do not say which data it was made from ({', '.join(DATA_TAGS)})"
    lock = tags.get(Tag.LOCK_SHA256)
    if lock in locks:
        data |= locks[lock]
    elif not data:
        unknown = unknown or "neither its tags nor a dvc.lock in this clone names its data"
    return Registered(
        reference=str(ModelReference.of_version(version)),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))),
        data=frozenset(item for item in data if _folder(item.path) in KINDS),
        parent=tags.get(Tag.PARENT),
        parent_sha256=tags.get(Tag.PARENT_SHA256),
        weights_sha256=tags.get(Tag.WEIGHTS_SHA256),
        unknown=unknown,
    )


def _changes(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield commit, path and blob of each change of `dvc.lock` and `*.dvc` in any history, oldest first."""
    settings = ("-c", "core.quotePath=false", "-c", "log.showRoot=true")
    log = ("log", "--all", "--reverse", "--raw", "--no-abbrev", "--no-renames", "--full-history", "-m", "--relative")
    commit = ""
    for line in git(root, *settings, *log, "--format=%H", "--", LOCK, "*.dvc").splitlines():
        if not line.startswith(":"):
            commit = line or commit
            continue
        facts, _, path = line.partition("\t")
        blob = facts.split()[3]
        if set(blob) != {"0"}:  # else deleted
            yield commit, path, blob


def _named(root: Path, files: set[tuple[str, str]], found: Holdings) -> dict[tuple[str, str], frozenset[Data]]:
    """Return the data that each file names by blob and path; keep what is found of `dvc.lock` files in `found`."""
    named: dict[tuple[str, str], frozenset[Data]] = {}
    texts = _texts(root, {blob for blob, _ in files})
    for blob, path in sorted(files):
        named[blob, path] = frozenset()
        if blob not in texts:
            found.unknown.append(f"{path}: its version {blob[:12]} is not in this clone; fetch the whole history")
            continue
        try:
            named[blob, path] = _data_of(texts[blob], path, found.locks)
        except (RecordError, AttributeError, KeyError, TypeError):
            found.unknown.append(f"{path}: its version {blob[:12]} is not as DVC writes it, so its data is not known")
    return named


def _data_of(text: bytes, path: str, locks: dict[str, frozenset[Data]]) -> frozenset[Data]:
    values = read_yaml(text, path) or {}
    if path == LOCK:
        outs = [(out["path"], out) for stage in values["stages"].values() for out in stage.get("outs") or []]
        data = _versions((name, out) for name, out in outs if name == CURATED)
        locks[stages_sha256(values["stages"])] = data
        return data
    return _versions(((PurePosixPath(path).parent / out["path"]).as_posix(), out) for out in values["outs"])


def _versions(outs: Iterable[tuple[str, Mapping[str, Any]]]) -> frozenset[Data]:
    return frozenset(
        Data(path, str(out["md5"]))
        for path, out in outs
        if _folder(path) in KINDS and DATA_ID.fullmatch(str(out.get("md5")))
    )


def _folder(path: str) -> str:
    """Return the folder of `KINDS` that a path is in, else an empty text."""
    parts = PurePosixPath(path).parts
    folder = "/".join(parts[:2])
    return folder if folder == CURATED or len(parts) == 4 else ""


def _texts(root: Path, blobs: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of blobs, without those that this clone lacks."""
    said = call_git(root, "cat-file", "--batch", given="".join(f"{blob}\n" for blob in blobs)).stdout
    found, at = {}, 0
    while at < len(said):
        end = said.index(b"\n", at)
        blob, *facts = said[at:end].decode().split()
        at = end + 1
        if facts[0] == "blob":
            size = int(facts[1])
            found[blob] = said[at : at + size]
            at += size + 1
    return found


def _tips(root: Path, paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each branch or tag, with path and blob of each of these files in its last commit."""
    refs = git(root, "for-each-ref", "--format=%(refname:lstrip=2)%09%(refname)", "refs/heads", "refs/remotes",
               "refs/tags").splitlines()  # fmt: skip
    prefix = git(root, "rev-parse", "--show-prefix")
    asked = [(*ref.split("\t"), path) for ref in refs for path in sorted(paths)]
    given = "".join(f"{full}:{prefix}{path}\n" for _, full, path in asked)
    said = call_git(root, "cat-file", "--batch-check=%(objectname) %(objecttype)", given=given).stdout.decode()
    for (ref, _, path), line in zip(asked, said.splitlines(), strict=True):
        blob, _, kind = line.partition(" ")
        if kind == "blob":
            yield ref, path, blob
