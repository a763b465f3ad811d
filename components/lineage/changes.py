"""Compare a stage's command, parameters, code and data with those in a `dvc.lock`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.core.layout import RELATIVE
from components.lineage.code import read_list
from components.lineage.lock_file import Record

Kind = Literal["command", "parameter", "code", "data", "record"]


@dataclass(frozen=True)
class Change:
    """One difference; kind `record` means that there is nothing to compare with."""

    kind: Kind
    what: str


def changes(entry: Mapping[str, Any], inputs: Mapping[str, Any], before: Record, now: Record) -> list[Change]:
    """List the differences between a stage's entry in a `dvc.lock` and its present inputs.

    Args:
        entry: of the stage, in the `dvc.lock` of `before`.
        inputs: `cmd`, `params` and `deps` (path -> DVC id) from `Ledger.foresee`; an id of None is not compared.
        before: the commit of `entry`.
        now: the workspace of `inputs`.
    """
    found = []
    if entry["cmd"] != inputs["cmd"]:
        found.append(Change("command", f"{entry['cmd']} -> {inputs['cmd']}"))
    old_params = {key: value for values in entry.get("params", {}).values() for key, value in values.items()}
    found += [Change("parameter", line) for line in _parameters(old_params, inputs["params"])]
    old, new = {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])}, inputs["deps"]
    for path in sorted(old.keys() | new.keys()):
        if path not in new or (path not in old and not path.startswith(f"{RELATIVE.code_lists}/")):
            found.append(Change("command", f"dvc.yaml: {path} is {'a new' if path in new else 'no'} input"))
        elif new[path] is not None and old.get(path) != new[path]:
            code = path.startswith(f"{RELATIVE.code_lists}/")
            lines = [f"{file} {how}" for file, how in changed_files(path, before, now).items()] if code else []
            lines = lines or _sources(path, before, now) or [f"{path} has other bytes"]
            found += [Change("code" if code else "data", line) for line in lines]
    return found


def changed_files(path: str, before: Record, now: Record) -> dict[str, str]:
    """Return the files in which two versions of a code list differ, each with `changed`, `new` or `gone`."""
    return _differing(*(read_list((record.read(path) or b"").decode()) for record in (before, now)))


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: "new" if key not in old else "gone" if key not in new else "changed" for key in differing}


def _sources(path: str, before: Record, now: Record) -> list[str]:
    """Return the differing tracked snapshots below a data folder; none for outputs of stages."""
    return [f"{name} {how}" for name, how in _differing(before.tracked(path), now.tracked(path)).items()]


def _parameters(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, now = dict(_leaves(old)), dict(_leaves(new))
    for key in sorted(before.keys() | now.keys()):
        if key not in before:
            yield f"{key} = {now[key]}"
        elif key not in now:
            yield f"{key} is gone (it was {before[key]})"
        elif before[key] != now[key]:
            yield f"{key} {before[key]} -> {now[key]}"


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
