"""Removable local state in `.pedigree`: checkpoints of stopped trainings, and caches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from components.core.layout import TRAINING_CONFIG, TRAINING_LOCK, Layout
from components.core.locks import record_holder, try_record_lock
from components.lineage.removal import Removal, delete, last_use, last_write, own_bytes

LOCKS = "locks"  # in a cache: not an entry


def checkpoints_removal(root: Path, kept_commits: set[str], before: float) -> tuple[Removal, list[str]]:
    """Plan the removal of checkpoints of stopped trainings that are older than `before` and belong to no kept run.

    Returns:
        The removal, and a note on trainings with checkpoints on S3, whose folders are kept for the address.
    """
    going, left, on_s3 = {}, 0, []
    for folder in sorted(Layout(root).checkpoints().glob("[!.]*")):
        begun = _begun(folder)
        size = own_bytes(folder)
        if uri := begun.get("config", {}).get("checkpoint_uri"):
            on_s3.append(f"{uri.rstrip('/')}/{folder.name}")
        if uri or begun.get("git_commit") in kept_commits or last_write(folder) > before or _is_held(folder):
            left += size
        else:
            going[str(folder.relative_to(root))] = size
    note = f"{len(on_s3)} stopped trainings keep checkpoints on S3, e.g. {on_s3[0]}" if on_s3 else ""

    def carry_out() -> None:
        for name in going:
            _delete_unheld(root / name)

    return Removal("checkpoints", going, left, carry_out), [note] if note else []


def caches_removal(root: Path, before: float) -> Removal:
    """Plan the removal of cache entries not used since `before`; files that are being written have hidden names."""
    going, left = {}, 0
    for entry in sorted(Layout(root).cache().glob("*/[!.]*")):
        training = Layout(root).checkpoints(entry.name)
        held = entry.parent == Layout(root).trained and _is_held(training)
        size = own_bytes(entry) if entry.is_dir() else entry.lstat().st_size
        if entry.name == LOCKS or held or last_use(entry) > before:
            left += size
        else:
            going[str(entry.relative_to(root))] = size
    return Removal("caches", going, left, partial(_delete_all, root, going))


def _begun(folder: Path) -> Mapping[str, dict]:
    """Read the initial configuration of a training; empty if it was not written yet."""
    try:
        return json.loads((folder / TRAINING_CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _is_held(folder: Path) -> bool:
    return record_holder(folder / TRAINING_LOCK) is not None


def _delete_unheld(folder: Path) -> None:
    """Delete a training's folder while holding its lock; a waiting trainer then creates a new folder."""
    try:
        with (folder / TRAINING_LOCK).open("a") as file:
            if try_record_lock(file):  # else a trainer started after the plan was made
                delete(folder)
    except FileNotFoundError:  # deleted meanwhile
        return


def _delete_all(root: Path, names: Mapping[str, int]) -> None:
    for name in names:
        delete(root / name)
