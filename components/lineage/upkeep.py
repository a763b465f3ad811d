"""Plan and carry out `pedigree gc`: remove what no kept run, other branch, registered version or audit event needs.

A complete plan is made first, then carried out so that references are removed before the bytes. After a kill at any
point, the next call plans from what is left and completes; there is no state between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.core.git import git
from components.core.layout import Layout
from components.core.locks import is_locked
from components.core.references import RUN_ID
from components.core.stage_runs import PARENT_STAGE
from components.lineage.anchors import read_anchors
from components.lineage.audit_log import AuditLog
from components.lineage.claims import REMOVED_TAG, Claim, audit_claims, mlflow_runs, version_claims, versions
from components.lineage.keeping import Rule, kept_runs, model_names, needed_objects
from components.lineage.local_state import caches_removal, checkpoints_removal
from components.lineage.lock_file import Record
from components.lineage.mlflow_files import failed_files_removal
from components.lineage.needs import Needs, ids_of, read_yaml
from components.lineage.removal import Removal, delete, own_bytes
from components.lineage.runs import BRANCHES, Run, find_runs, refs
from components.lineage.stored import UNFINISHED, DiskStore, S3Store, Store, Stored, entries, object_path, objects

READERS = 10  # threads that read run-cache entries from S3


@dataclass(frozen=True)
class Plan:
    """Removals in their required order.

    Attributes:
        kept_runs: run id -> why it is kept.
        notes: lines on what is skipped or unknown.
    """

    removals: list[Removal]
    kept_runs: dict[str, str]
    notes: list[str]

    def carry_out(self) -> None:
        """Carry out all removals.

        Raises:
            StorageError, TrackingError, RecordError: a removal failed; earlier ones are done, and a new call continues.
        """
        for removal in self.removals:
            removal.carry_out()


@dataclass(frozen=True)
class Place:
    """The DVC cache or the DVC remote, listed once."""

    name: str
    store: Store
    listing: Mapping[str, Stored]
    objects: Mapping[str, Stored]


def make_plan(root: Path, cache: Path, rule: Rule, client: Any, log: AuditLog) -> Plan:
    """Plan the removals without changing anything. Hold the locks of runs and of DVC until they are carried out.

    Args:
        root: the checkout.
        cache: its DVC cache.
        rule: which runs may be removed.
        client: MLflow's.
        log: the audit log.

    Raises:
        TrackingError, StorageError: the registry, the audit log or the remote does not answer.
        RecordError: the audit log is broken, or needed objects cannot be determined.
    """
    found = versions(client)
    of_events, notes = audit_claims(log, client)
    claims, runs = [*version_claims(found), *of_events], find_runs(root)
    why = kept_runs(root, runs, rule, claims)
    gone, models = [run for run in runs if run.id not in why], model_names(root, runs)
    disk, s3 = places(root, cache)
    files = failed_files_removal(client, models, [run.id for run in gone], {version.run_id for version in found})
    removals = [files, *_runs_removals(root, gone)]
    dvc, more = _dvc_removals(root, gone, claims, (disk, s3), rule, _unknown_runs(root, client, models))
    kept_commits = {commit.sha for run in runs if run.id in why for commit in run.commits}
    checkpoints, checkpoint_notes = checkpoints_removal(root, kept_commits, rule.before)
    removals += [*dvc, checkpoints, caches_removal(root, rule.before)]
    return Plan(removals, why, [*notes, *more, *checkpoint_notes])


def places(root: Path, cache: Path) -> tuple[Place, Place | None]:
    """List the DVC cache and the remote, if there is one."""

    def listed(name: str, store: Store) -> Place:
        listing = store.listing()
        return Place(name, store, listing, objects(listing))

    url = Record(root).remote_url()
    return listed("disk", DiskStore(cache)), listed("S3", S3Store(url)) if url else None


def _unknown_runs(root: Path, client: Any, models: Iterable[str]) -> list[str]:
    """Return runs of these models in MLflow that are neither in this git repository nor removed: of other clones."""
    known = {ref.rpartition("/")[2] for ref in refs(root)}
    found = mlflow_runs(client, models, f"tags.`pedigree.stage` = '{PARENT_STAGE}'")
    tags = [run.data.tags for run in found if REMOVED_TAG not in run.data.tags]
    return sorted({of.get("pedigree.run", "(unnamed)") for of in tags} - known)


def _runs_removals(root: Path, gone: Sequence[Run]) -> list[Removal]:
    """Plan the removal of run folders, then of branches and lock files, including leftovers of a killed gc."""
    branches = {ref.removeprefix(BRANCHES) for ref in refs(root, BRANCHES)}
    runs = Layout(root).runs
    names = {path.name.removesuffix(".lock") for path in runs.glob("*") if RUN_ID.match(path.name)}
    stale = sorted(name for name in names - branches if not is_locked(runs / f"{name}.lock"))
    folders = {run.folder for run in gone if run.folder} | {runs / name for name in stale}
    sizes = {str(folder): own_bytes(folder) for folder in sorted(folders) if folder.is_dir()}

    def remove_folders() -> None:
        git(root, "worktree", "prune")
        for name in sizes:
            if name in {str(run.folder) for run in gone}:
                git(root, "worktree", "remove", "--force", "--force", name)
            delete(Path(name))

    def remove_branches() -> None:
        git(root, "worktree", "prune")
        for run in gone:
            for anchor in read_anchors(root, run.id):
                git(root, "update-ref", "-d", f"refs/tags/{anchor.name}", anchor.id)
            git(root, "update-ref", "-d", f"{BRANCHES}{run.id}", run.tip)
        for name in [*(run.id for run in gone), *stale]:
            delete(runs / f"{name}.lock")

    return [
        Removal("run folders", sizes, 0, remove_folders),
        Removal("runs (branches)", dict.fromkeys((run.branch for run in gone), 0), 0, remove_branches),
    ]


def _dvc_removals(
    root: Path, gone: Sequence[Run], claims: Sequence[Claim], places: Sequence[Place | None], rule: Rule,
    unknown: Sequence[str],
) -> tuple[list[Removal], list[str]]:  # fmt: skip
    """Plan the removal of run-cache entries with removed outputs, then of unneeded objects; on S3 first."""
    there = [place for place in places if place]
    needs = Needs(root, partial(_first, [place.store for place in there]))
    here = {id_ for place in there for id_ in place.objects}
    required = needed_objects(root, gone, claims, needs, here)
    young = {
        id_ for place in there for id_, item in place.objects.items() if item.there and item.modified > rule.before
    }
    needed, notes = required.ids | needs.whole(young), _notes(required.elsewhere, needs, unknown)
    doomed = {p.name: {} if p.name == "S3" and unknown else _without(p.objects, needed) for p in there}
    alive = {p.name: {id_ for id_, item in p.objects.items() if item.there} - doomed[p.name].keys() for p in there}
    of_entries = entry_outputs(there)
    removals: list[Removal] = []
    for place in reversed(there):
        bytes_at = alive[place.name] if place.name == "S3" else set().union(*alive.values())
        broken = [path for path in entries(place.listing) if not set(of_entries.get(path, ())) <= bytes_at]
        found = {} if place.name == "S3" and unknown else {path: place.listing[path] for path in broken}
        removals.append(_removal(f"run-cache entries on {place.name}", place, found, entries(place.listing)))
    for place in reversed(there):
        found = {object_path(id_): item for id_, item in doomed[place.name].items()}
        removals.append(_removal(f"objects on {place.name}", place, found, place.objects))
    unfinished = {
        path: item
        for path, item in there[0].listing.items()
        if path.endswith(UNFINISHED) and item.modified <= rule.before
    }
    return [*removals, _removal("unfinished files of DVC", there[0], unfinished, {})], notes


def _removal(kind: str, place: Place, found: Mapping[str, Stored], every: Mapping[str, Stored]) -> Removal:
    going = {path: item.size for path, item in found.items()}
    left = sum(item.size for item in every.values()) - sum(going.values())
    return Removal(kind, going, max(left, 0), partial(place.store.remove, found))


def _without(found: Mapping[str, Stored], needed: set[str]) -> dict[str, Stored]:
    return {id_: item for id_, item in found.items() if id_ not in needed}


def _first(stores: Sequence[Store], id_: str) -> bytes | None:
    """Return a listing's bytes, from the first store that has it."""
    return next((data for store in stores if (data := store.read(object_path(id_))) is not None), None)


def entry_outputs(places: Sequence[Place]) -> dict[str, list[str]]:
    """Return the DVC ids of each run-cache entry's outputs; entries of equal names are equal and read once."""
    where = {path: place.store for place in reversed(places) for path in entries(place.listing)}
    with ThreadPoolExecutor(READERS) as pool:
        texts = pool.map(lambda path: where[path].read(path), where)
        return {path: ids_of(read_yaml(t, path)["outs"]) for path, t in zip(where, texts, strict=True) if t is not None}


def _notes(elsewhere: Sequence[str], needs: Needs, unknown: Sequence[str]) -> list[str]:
    notes = []
    if unknown:
        notes.append(
            f"nothing on S3 is removed: MLflow knows {len(unknown)} runs without a branch here, e.g. {unknown[-1]}; "
            "fetch the branches of the clones that made them, or delete those runs in MLflow, then run this again"
        )
    if elsewhere:
        notes.append(f"{len(elsewhere)} versions and events are of other repositories, e.g. {elsewhere[-1]}; none of "
                     "their data is here")  # fmt: skip
    if needs.unlisted:
        lost = f"{len(needs.unlisted)} folders that something needs are neither in the cache nor on S3"
        notes.append(f"{lost}, e.g. {min(needs.unlisted)}")
    return notes
