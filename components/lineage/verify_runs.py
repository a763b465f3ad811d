"""Verify MLflow's runs against the reports in the commits of their pipeline runs: metrics, and artifacts by bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from components.core.layout import RELATIVE
from components.core.storage import MissingInStorageError
from components.core.tracking import flatten_numbers, valid_key
from components.lineage.lock_file import REGISTER_STAGE, Record
from components.lineage.mlflow_files import place_on_s3
from components.lineage.verify_objects import Job, Objects, hashes

EVALUATE, CURATE = "evaluate", "curate"
REPORT = "report.html"  # of both, among the artifacts of the run of a registration
PASSPORT = "passport.html"
SKEW_MILLISECONDS = 1000  # between the clocks of the machines of a training


def metric_faults(run: Any, record: Record) -> list[str]:
    """Return which metrics of a stage's finished run are not those of its result in the commit.

    Args:
        run: of MLflow.
        record: of its pipeline run.
    """
    stage, item = _stage(run)
    name, info, there = f"MLflow run {run.info.run_name} ({run.info.run_id})", run.info, run.data.metrics
    faults = [] if info.lifecycle_stage == "active" else [f"{name} was deleted in MLflow"]
    registration = is_registration(run)
    stated = _numbers(record, EVALUATE if registration else stage, item)
    for key, value in stated.items():
        if there.get(key) != value:
            faults.append(f"{name}: metric {key} is {there.get(key, 'missing')}, in its commit {value}")
    # Trainings also have metrics of each step, whose times tell whether they came later.
    ended = (info.end_time or 0) + SKEW_MILLISECONDS
    late = {metric.key for metric in run.data._metric_objs if metric.timestamp > ended}
    added = (there.keys() if registration else late) - stated.keys()
    faults += [f"{name}: metric {key} ({there[key]}) was logged after it had ended" for key in sorted(added)]
    return faults


def artifact_jobs(objects: Objects, run: Any, record: Record, passport: str | None) -> tuple[list[Job], int]:
    """Return a job for each artifact of a run that its record knows or that is missing, and how many are unknown.

    Args:
        objects: on S3.
        run: of MLflow.
        record: of its pipeline run.
        passport: SHA-256 of the passport, of the run of a registration.
    """
    place = place_on_s3(run.info.artifact_uri)
    if place is None:
        return [], 0
    expected = dict(_expected(objects, run, record))
    if passport:
        expected[PASSPORT] = passport
    there = objects.listing(place)
    name = run.info.run_name
    jobs = [Job(f"{place}/{n}", partial(_check, objects, f"{place}/{n}", expected[n], name)) for n in expected]
    return jobs, len(there.keys() - expected.keys())


def _check(objects: Objects, address: str, stated: str, run: str) -> list[str]:
    found = objects.scan(address, "hashes", hashes)
    return [] if stated in found.values() else [f"{address}: not the report in the commit of {run}"]


def _expected(objects: Objects, run: Any, record: Record) -> Iterator[tuple[str, str]]:
    """Yield path and MD5 of each artifact that the record knows."""
    stage, item = _stage(run)
    if is_registration(run):
        for name, folder in (("evaluation", RELATIVE.report(EVALUATE, item)), ("curation", RELATIVE.report(CURATE))):
            reports = dict(_reports(objects, record, f"{folder}/"))
            if REPORT in reports:
                yield f"{name}/{REPORT}", reports[REPORT]
    else:
        yield from _reports(objects, record, f"{RELATIVE.report(stage, item)}/")


def _reports(objects: Objects, record: Record, folder: str) -> Iterator[tuple[str, str]]:
    """Yield path below a folder of reports and MD5 of each file: of outputs, of folders of DVC, of files in git."""
    outs = [out for stage in record.stages().values() for out in stage.get("outs", [])]
    for out in outs:
        path, md5 = out["path"], out["md5"]
        if md5.endswith(".dir") and (folder.startswith(f"{path}/") or path.startswith(folder)):
            try:
                listing = json.loads(objects.read(objects.remote(record).address(md5)))
            except (MissingInStorageError, ValueError):
                continue  # the check of the data says so
            files = {f"{path}/{file['relpath']}": file["md5"] for file in listing}
            yield from ((name.removeprefix(folder), id_) for name, id_ in files.items() if name.startswith(folder))
        elif path.startswith(folder):
            data = record.read(path)
            yield path.removeprefix(folder), _md5(data) if data is not None else md5


def is_registration(run: Any) -> bool:
    """Return whether a run is of one registered version, rather than of a stage."""
    stage, item = _stage(run)
    return stage == REGISTER_STAGE and item is not None


def same_stage(run: Any, one: Record, other: Record) -> bool:
    """Return whether two records have the same entry of a run's stage, so that the run made the outputs of both."""
    stage, item = _stage(run)
    key = f"{stage}@{item}" if stage == EVALUATE else stage
    entry = one.stages().get(key)
    return entry is not None and entry == other.stages().get(key)


def _numbers(record: Record, stage: str, item: str | None) -> dict[str, float]:
    student = item if stage == "distill" else None
    data = record.read(str(RELATIVE.result(stage, None if student else item)))
    try:
        found: Mapping[str, Any] = json.loads(data or b"{}")
        found = found.get(student, {}) if student else found
    except (ValueError, AttributeError):
        return {}  # the check of the commit says so
    numbers = flatten_numbers(found).items()
    # MLflow has the last row of a training as the end of each curve.
    return {valid_key(key): value for key, value in numbers if "last" not in key.split(".")}


def _stage(run: Any) -> tuple[str, str | None]:
    return run.data.tags.get("pedigree.stage", ""), run.data.tags.get("pedigree.item")


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
