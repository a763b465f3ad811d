"""Check the requirements of a run: this machine, the checkout, S3, MLflow and Prefect.

A check yields findings and changes nothing; probes that it writes are removed. A check that raises yields one red
finding, and later checks of its group, which depend on it, are skipped.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.core.errors import PedigreeError, ServiceError, error_message
from components.core.layout import RELATIVE, Layout
from components.core.signing import check_keys
from components.core.storage import StorageError, s3_client, s3_errors
from infra.local.services import SCHEDULER_GRACE, WORK_POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

GREEN, YELLOW, RED = "green", "yellow", "red"
GIB = 1024**3
FREE_RED_GIB, FREE_YELLOW_GIB = 2, 10
SKEW_SECONDS = 60  # S3 refuses from 15 minutes on; logs of machines are hard to compare long before
BUCKETS = {"PEDIGREE_DATA_BUCKET": "data", "PEDIGREE_MODELS_BUCKET": "models", "PEDIGREE_AUDIT_BUCKET": "audit"}
DRIVERS = {  # variable of a server's database -> allowed schemes
    "MLFLOW_BACKEND_STORE_URI": ("sqlite:", "postgresql+psycopg2:", "postgresql:"),
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": ("sqlite+aiosqlite:", "postgresql+asyncpg:"),
}


@dataclass(frozen=True)
class Finding:
    """Result of a check: `state` is green, yellow (works, but needs attention) or red; `advice` says what to do."""

    check: str
    state: str
    detail: str
    advice: str = ""


Check = Callable[[Path], Iterator[Finding]]


def diagnose(checkout: Path, services: bool) -> Iterator[Finding]:
    """Run every check.

    Args:
        checkout: the folder that holds `dvc.yaml`.
        services: whether services are configured; if not, only the machine and the checkout are checked.
    """
    local: list[Check] = [python, packages, pinned, disk, databases]
    groups: list[tuple[str, list[Check], str]] = [("this machine", local, ""), ("checkout", [commit, takedowns], "")]
    if services:
        login = "PREFECT_API_URL and PREFECT_API_AUTH_STRING lead to it; `pedigree up` starts the local one"
        groups += [
            ("S3", [s3_answers, buckets], ""),
            (
                "DVC remote",
                [dvc_remote],
                ".dvc/config, .dvc/config.local and AWS_* lead to it; `dvc remote list` shows it",
            ),
            ("signing keys", [signing_keys], "components/registry/README.md, 'Keys', makes a pair"),
            ("MLflow", [mlflow], "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD log in"),
            ("Prefect", [prefect], login),
        ]
    for name, checks, advice in groups:
        try:
            for check in checks:
                yield from check(checkout)
        except (PedigreeError, OSError) as error:
            yield Finding(name, RED, error_message(error).splitlines()[0], advice)


def python(checkout: Path) -> Iterator[Finding]:
    """Compare this Python with the requirement in pyproject.toml."""
    from packaging.specifiers import SpecifierSet

    expected, found = _project(checkout)["requires-python"], ".".join(map(str, sys.version_info[:3]))
    if found in SpecifierSet(expected):
        yield Finding("Python", GREEN, found)
    else:
        yield Finding(
            "Python", RED, f"{found}, allowed: {expected}", "make a new .venv with an allowed Python: `make run`"
        )


def packages(checkout: Path) -> Iterator[Finding]:
    """Compare the installed packages with pyproject.toml, including extras."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in _project(checkout)["dependencies"]]
    for requirement in list(needed):
        needed += _of_extras(requirement)
    wrong = [said for requirement in needed if (said := _unmet(requirement))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        advice = "`pip install --constraint requirements.lock --editable .` in this Python"
        yield Finding("packages", RED, wrong[0] + more, advice)
    else:
        yield Finding("packages", GREEN, f"{len(needed)} requirements are met")


def pinned(checkout: Path) -> Iterator[Finding]:
    """Count the packages that differ from requirements.lock, the tested versions."""
    lock = checkout / "requirements.lock"
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", lock.read_text(), re.MULTILINE) if lock.exists() else []
    installed = [(name, pin, (_version(name) or pin).partition("+")[0]) for name, pin in pins]  # 2.13.0+cpu is 2.13.0
    other = [f"{name} {found} (lock: {pin})" for name, pin, found in installed if found != pin]
    if other:
        yield Finding(
            "versions", YELLOW, f"{len(other)} of {len(pins)} differ from requirements.lock, such as {other[0]}"
        )


def disk(checkout: Path) -> Iterator[Finding]:
    """Check the free disk space for checkpoints and caches."""
    free = shutil.disk_usage(checkout).free / GIB
    state = RED if free < FREE_RED_GIB else YELLOW if free < FREE_YELLOW_GIB else GREEN
    advice = "" if state == GREEN else "free some space: `pedigree gc --keep 10 --older 30d --dry-run`"
    yield Finding("disk", state, f"{free:.1f} GiB free at {checkout}", advice)


def databases(_: Path) -> Iterator[Finding]:
    """Check the scheme and driver of the servers' database addresses, if set on this machine."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    for variable, schemes in DRIVERS.items():
        if not (uri := os.environ.get(variable)):
            continue
        scheme = uri.partition(":")[0]
        try:
            make_url(uri).get_dialect().import_dbapi()
            fits = f"{scheme}:" in schemes
        except (ArgumentError, NoSuchModuleError, ImportError):
            fits = False
        allowed = " or ".join(scheme.rstrip(":") for scheme in schemes)
        advice = "" if fits else f"use {allowed}; the drivers of PostgreSQL: `pip install 'pedigree[postgres]'`"
        yield Finding(f"database of {variable.partition('_')[0]}", GREEN if fits else RED, f"{scheme}://", advice)


def commit(checkout: Path) -> Iterator[Finding]:
    """Check that the checkout has a commit, on which a run is based."""
    from flows.git import head_commit

    yield Finding("git", GREEN, f"commit {head_commit(checkout)[:10]}")


def takedowns(checkout: Path) -> Iterator[Finding]:
    """Name the takedowns that were begun and not finished."""
    for path in sorted((checkout / RELATIVE.state / "takedowns").glob("*.json")):
        yield Finding("takedown", RED, f"{path.stem} was cut short", "`pedigree takedown` finishes it")


def s3_answers(_: Path) -> Iterator[Finding]:
    """Send S3 a request, and compare its clock with the local one."""
    bucket = _named("PEDIGREE_DATA_BUCKET")
    with s3_errors(f"s3://{bucket}"):
        answer = s3_client().list_objects_v2(Bucket=bucket, MaxKeys=1)
    yield Finding("S3", GREEN, f"{os.environ.get('AWS_ENDPOINT_URL', 'AWS')} answers")
    if theirs := answer["ResponseMetadata"]["HTTPHeaders"].get("date"):
        skew = abs((datetime.now(UTC) - parsedate_to_datetime(theirs)).total_seconds())
        state, advice = (GREEN, "") if skew < SKEW_SECONDS else (YELLOW, "set the clock by NTP on both machines")
        yield Finding("clock", state, f"{skew:.0f} s from that of S3", advice)


def buckets(_: Path) -> Iterator[Finding]:
    """Check each bucket: versioning or object lock, and a probe object that is written, read and removed."""
    client = s3_client()
    for variable, role in BUCKETS.items():
        bucket = _named(variable)
        try:
            with s3_errors(f"s3://{bucket}"):
                yield _audit_bucket(client, bucket) if role == "audit" else _versioned_bucket(client, bucket, role)
        except PedigreeError as error:
            advice = f"README, 'A team's services', makes it; {variable} names it"
            yield Finding(f"{role} bucket", RED, str(error), advice)


def _versioned_bucket(client: Any, bucket: str, role: str) -> Finding:
    if client.get_bucket_versioning(Bucket=bucket).get("Status") != "Enabled":
        advice = f"`aws s3api put-bucket-versioning --bucket {bucket} --versioning-configuration Status=Enabled`"
        return Finding(f"{role} bucket", RED, f"s3://{bucket} has no versioning", advice)
    _put_read_remove(client, bucket)
    return Finding(f"{role} bucket", GREEN, f"s3://{bucket}: versioned, written and read")


def _audit_bucket(client: Any, bucket: str) -> Finding:
    from botocore.exceptions import ClientError

    try:
        lock = client.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "ObjectLockConfigurationNotFoundError":
            raise
        advice = "make another bucket with object lock; an existing bucket cannot get it everywhere"
        return Finding("audit bucket", RED, f"s3://{bucket} has no object lock", advice)
    if "Rule" in lock:  # a probe would stay for years
        return Finding("audit bucket", GREEN, f"s3://{bucket}: object lock with a default retention; not written to")
    _put_read_remove(client, bucket)
    return Finding("audit bucket", GREEN, f"s3://{bucket}: object lock, written and read")


def _put_read_remove(client: Any, bucket: str) -> None:
    where = {"Bucket": bucket, "Key": f".doctor-{secrets.token_hex(8)}"}
    version = client.put_object(**where, Body=b"pedigree").get("VersionId")
    exact = {**where, "VersionId": version} if version else where
    try:
        read = client.get_object(**exact)["Body"].read()
    finally:
        client.delete_object(**exact)
    if read != b"pedigree":
        raise StorageError(f"s3://{bucket}: an object came back changed")


def dvc_remote(checkout: Path) -> Iterator[Finding]:
    """Check that DVC's remote answers and is in the data bucket, where `trace` looks for data."""
    from components.lineage.ledger import Ledger

    address, bucket = Ledger(checkout).remote_address(), _named("PEDIGREE_DATA_BUCKET")
    if address.startswith(f"s3://{bucket}/"):
        yield Finding("DVC remote", GREEN, f"{address} answers")
    else:
        advice = f"`dvc remote modify storage url s3://{bucket}/dvc`, or correct PEDIGREE_DATA_BUCKET"
        yield Finding("DVC remote", RED, f"{address} is not in the data bucket {bucket}", advice)


def signing_keys(_: Path) -> Iterator[Finding]:
    """Check the keys that sign released models and verify them before use."""
    yield Finding("signing keys", GREEN, check_keys())


def mlflow(checkout: Path) -> Iterator[Finding]:
    """Write and remove an artifact with the configured credentials."""
    from components.core.mlflow_client import probe_artifacts, shown_server

    name = (yaml.safe_load(Layout(checkout).params.read_text()) or {}).get("name", "pedigree")
    probe_artifacts(str(name))
    yield Finding("MLflow", GREEN, f"{shown_server()} takes these credentials and stores artifacts")


def prefect(checkout: Path) -> Iterator[Finding]:
    """Check Prefect's server, work pool, worker, and the deployments of prefect.yaml."""
    import httpx
    from prefect import __version__
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            theirs = client.api_version()
            client.read_work_pools(limit=1)  # reading the version takes no login
            state, advice = (GREEN, "") if theirs == __version__ else (YELLOW, "install the same version on both sides")
            yield Finding("Prefect", state, f"{client.api_url} answers, version {theirs} (here {__version__})", advice)
            yield _work_pool(client)
            yield _worker(client)
            expected = yaml.safe_load((checkout / "prefect.yaml").read_text())
            for deployment in expected["deployments"]:
                yield from _deployment(client, deployment)
            yield from _automations(client, [automation["name"] for automation in expected.get("automations", ())])
            yield _late_runs(client)
    except httpx.HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" for url ")[0]
        raise ServiceError(f"{os.environ.get('PREFECT_API_URL')}: {reason}") from error


def _work_pool(client: SyncPrefectClient) -> Finding:
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        return Finding("work pool", RED, f"no {WORK_POOL}", f"`prefect work-pool create {WORK_POOL} --type process`")
    if pool.type != "process":
        return Finding(
            "work pool", RED, f"{WORK_POOL} is of type {pool.type}", "delete it and make one of type process"
        )
    if pool.is_paused:
        return Finding("work pool", RED, f"{WORK_POOL} is paused", f"`prefect work-pool resume {WORK_POOL}`")
    return Finding("work pool", GREEN, f"{WORK_POOL}, type process")


def _worker(client: SyncPrefectClient) -> Finding:
    if online := online_workers(client, WORK_POOL):
        return Finding("worker", GREEN, f"{len(online)} online: {', '.join(online[:3])}")
    return Finding("worker", RED, f"none online in {WORK_POOL}", f"{start_worker(WORK_POOL)} in the checkout")


def online_workers(client: SyncPrefectClient, pool: str) -> list[str]:
    """Return the names of online workers of a work pool; empty if the pool does not exist."""
    import httpx
    from prefect.client.schemas.objects import WorkerStatus

    try:
        workers = client.read_workers_for_work_pool(pool)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return []
    return [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]


def start_worker(pool: str) -> str:
    """Return the command that starts a worker."""
    return f"`prefect worker start --pool {pool}` (`pedigree up` for the local stack)"


def _deployment(client: SyncPrefectClient, expected: dict[str, Any]) -> Iterator[Finding]:
    """Check that a deployment of prefect.yaml exists, its schedules create runs, and its triggers are on."""
    from prefect.exceptions import ObjectNotFound

    name = f"{expected['entrypoint'].partition(':')[2]}/{expected['name']}"
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        yield Finding(name, RED, "not deployed", "`prefect deploy --all` (`pedigree up` for the local stack)")
        return
    if found.paused:
        yield Finding(name, RED, "deployed, but paused", f"`prefect deployment resume {name}`, or in Prefect's page")
        return
    yield Finding(name, GREEN, f"deployed to work pool {found.work_pool_name}")
    if expected.get("schedules"):
        yield _schedule(client, name, found)
    if any(trigger.get("enabled", True) for trigger in expected.get("triggers", ())):
        automations = client.read_resource_related_automations(f"prefect.deployment.{found.id}")
        on = any(automation.enabled for automation in automations)
        advice = "" if on else "switch it on in Prefect's page, under Automations, or `prefect deploy --all`"
        yield Finding(f"{name}: trigger", GREEN if on else RED, "on" if on else "off or gone", advice)


def _automations(client: SyncPrefectClient, expected: list[str]) -> Iterator[Finding]:
    """Check the automations of prefect.yaml, without which a run that loses its machine stays Running for ever."""
    on = [name for name in expected if any(found.enabled for found in client.read_automations_by_name(name))]
    if missing := [name for name in expected if name not in on]:
        advice = "`python -m infra.automations` (`pedigree up` for the local stack), or switch it on in Prefect's page"
        yield Finding("automations", RED, f"{missing[0]!r} is off or gone", advice)
    elif on:
        yield Finding("automations", GREEN, ", ".join(on))


def _schedule(client: SyncPrefectClient, name: str, found: DeploymentResponse) -> Finding:
    """Check that the scheduler works: an active schedule must have a future run."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    check = f"{name}: schedule"
    if not any(schedule.active for schedule in found.schedules):
        return Finding(check, RED, "no schedule is active", f"switch it on in Prefect's page, or deploy {name} again")
    coming = {"expected_start_time": {"after_": datetime.now(UTC)}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])),
        flow_run_filter=FlowRunFilter.model_validate(coming),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=1,
    )
    if runs:
        return Finding(check, GREEN, f"next run {runs[0].expected_start_time:%Y-%m-%d %H:%M} UTC")
    if found.created and datetime.now(UTC) - found.created < SCHEDULER_GRACE:
        return Finding(check, YELLOW, "no run is scheduled yet; just deployed", "look again in three minutes")
    advice = "look for errors of Prefect's scheduler in the server's log (SQLAlchemy 2.1 stops it: see packages)"
    return Finding(check, RED, "active, but no run is scheduled", advice)


def _late_runs(client: SyncPrefectClient) -> Finding:
    from prefect.client.schemas.filters import FlowRunFilter

    is_late = FlowRunFilter.model_validate({"state": {"name": {"any_": ["Late"]}}})
    late = client.read_flow_runs(flow_run_filter=is_late, limit=50)
    if not late:
        return Finding("late runs", GREEN, "none")
    detail = f"{len(late)}{'+' if len(late) == 50 else ''}, such as {late[0].name}"
    return Finding("late runs", RED, detail, f"start a worker of {WORK_POOL}, or cancel them in Prefect's page")


def _project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text())["project"]


def _of_extras(requirement: Any) -> list[Any]:
    """Return the requirements of an installed package's extras, such as `flask-wtf` of `mlflow[auth]`."""
    from packaging.requirements import Requirement

    if not requirement.extras or _version(requirement.name) is None:
        return []
    lines = [Requirement(line) for line in metadata.requires(requirement.name) or []]
    return [
        line for line in lines if line.marker and not line.marker.evaluate({"extra": ""})
        and any(line.marker.evaluate({"extra": extra}) for extra in requirement.extras)
    ]  # fmt: skip


def _unmet(requirement: Any) -> str | None:
    """Describe how a requirement is unmet; None if it is met."""
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is installed, allowed: {requirement.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _named(variable: str) -> str:
    if not (value := os.environ.get(variable)):
        raise StorageError(f"{variable} is not set: name the bucket, or unset all for the local stack")
    return value
