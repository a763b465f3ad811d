"""The local stack with its real servers: start, restart, stop, and what it promises about storage and secrets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from flows.cli import app
from infra.local import processes, services, supervisor
from infra.local.processes import find, spawn
from infra.local.site import AUDIT_BUCKET, DATA_BUCKET, MODELS_BUCKET, Site, StackError

UP = "import sys; from pathlib import Path; from infra.local.supervisor import up; up(Path(sys.argv[1]), tuple(sys.argv[2:]), print)"  # noqa: E501
PLANTED = """
import importlib.abc, importlib.util, sys

class Plant(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "prefect.server.services.scheduler":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_break(module):
            load(module)
            async def broken(*_, **__):
                raise RuntimeError("planted in the scheduler")
            module._collect_flow_runs = broken
        spec.loader.exec_module = load_and_break
        return spec

sys.meta_path.insert(0, Plant())
"""
pytestmark = pytest.mark.stack


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A checkout with a stack of its own, which leaves no process whatever the test does."""
    yield tmp_path
    if (tmp_path / ".pedigree").is_dir():
        supervisor.down(tmp_path)
    assert supervisor.processes(tmp_path) == []


def pids(root: Path) -> dict[str, int | None]:
    return {service.service: service.pid for service in supervisor.status(root)}


def s3(env: dict[str, str]):
    return boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"])


def test_second_up_keeps_every_process(stack):
    before = pids(stack.root)
    begun = time.monotonic()
    assert supervisor.up(stack.root) == stack.env
    assert time.monotonic() - begun < 5
    assert pids(stack.root) == before
    assert [service.state for service in supervisor.status(stack.root)] == ["healthy"] * 5
    assert Path(psutil.Process(before["worker"]).cwd()) == stack.root


def test_everything_listens_on_the_loopback_interface_only(stack):
    listening = []
    for process in supervisor.processes(stack.root):
        with suppress(psutil.NoSuchProcess):  # one of the keeper's or the worker's that ends just now
            found = process.net_connections("tcp")
            listening += [connection.laddr for connection in found if connection.status == psutil.CONN_LISTEN]
    assert len(listening) >= 7
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_secrets_are_private_and_shown_only_where_asked(stack, monkeypatch):
    folder = stack.root / ".pedigree"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in (
        "credentials.env",
        "s3-credentials",
        "s3-identities.json",
        "basic_auth.ini",
        "signing-key.pem",
        "audit-trainer.pem",
    ):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    monkeypatch.chdir(stack.root)
    (stack.root / "dvc.yaml").touch()  # by which the commands know their own folder
    secrets = [
        stack.env[name] for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING")
    ]
    run = CliRunner().invoke
    for arguments in (["up"], ["status"], ["status", "--json"]):
        result = run(app, arguments)
        assert result.exit_code == 0, result.output
        assert not any(secret in result.output for secret in secrets)
    shown = run(app, ["status", "--credentials"]).output
    assert all(secret in shown for secret in secrets)
    sourced = subprocess.run(["sh", "-c", run(app, ["env"]).output + "env"], capture_output=True, text=True, check=True)
    assert {f"{name}={value}" for name, value in stack.env.items()} <= set(sourced.stdout.splitlines())


def test_temporary_files_are_in_a_folder_of_this_user(stack, tmp_path, monkeypatch):
    """Two users of a machine: Prefect's runner_storage in a shared folder belonged to the first one."""
    folder = Path(psutil.Process(pids(stack.root)["worker"]).environ()["TMPDIR"])
    assert folder.name == f"pedigree-{os.getuid()}"
    assert (stat.S_IMODE(folder.stat().st_mode), folder.stat().st_uid) == (0o700, os.getuid())
    assert list((folder / "runner_storage").iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # to whom the folder that is made does not belong
    with pytest.raises(StackError, match=r"pedigree-12345 is another user's: set TMPDIR to a folder of your own"):
        processes.spawn(Site.load(stack.root), services.services(Site.load(stack.root))[0])


def test_doors_are_closed_without_credentials(stack):
    ports = Site.load(stack.root).ports
    client = s3(stack.env)
    client.put_object(Bucket=DATA_BUCKET, Key="door", Body=b"x")
    closed = {
        f"{stack.env['AWS_ENDPOINT_URL']}/{DATA_BUCKET}/door": 403,
        f"http://127.0.0.1:{ports['filer']}/buckets/{DATA_BUCKET}/door": 401,
        f"{stack.env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get?experiment_id=0": 401,
        f"{stack.env['PREFECT_API_URL']}/admin/version": 401,
    }
    for url, code in closed.items():
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=10)
        assert refused.value.code == code, url


def test_data_is_versioned_and_a_conditional_put_never_overwrites(storage):
    client = s3(storage.env)
    for bucket in (DATA_BUCKET, MODELS_BUCKET):
        assert client.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    first = client.put_object(Bucket=DATA_BUCKET, Key="a", Body=b"one", IfNoneMatch="*")["VersionId"]
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=DATA_BUCKET, Key="a", Body=b"two", IfNoneMatch="*")
    client.put_object(Bucket=DATA_BUCKET, Key="a", Body=b"three")
    client.delete_object(Bucket=DATA_BUCKET, Key="a")
    assert client.get_object(Bucket=DATA_BUCKET, Key="a", VersionId=first)["Body"].read() == b"one"


def test_a_locked_version_cannot_be_deleted(storage):
    client = s3(storage.env)
    locked = client.put_object(
        Bucket=AUDIT_BUCKET,
        Key="event",
        Body=b"approved",
        ObjectLockMode="COMPLIANCE",
        ObjectLockRetainUntilDate=datetime.now(UTC) + timedelta(minutes=5),
    )["VersionId"]
    for bypass in ({}, {"BypassGovernanceRetention": True}):
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket=AUDIT_BUCKET, Key="event", VersionId=locked, **bypass)
    assert client.get_object(Bucket=AUDIT_BUCKET, Key="event", VersionId=locked)["Body"].read() == b"approved"


def test_health_checks_leave_nothing_behind(storage):
    supervisor.status(storage.root)
    assert "Versions" not in s3(storage.env).list_object_versions(Bucket=MODELS_BUCKET, Prefix=".health")


def test_mlflow_keeps_artifacts_in_the_models_bucket(stack):
    import mlflow

    client = mlflow.MlflowClient(stack.env["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("artifacts"))
    client.log_text(run.info.run_id, "hello", "note.txt")
    found = s3(stack.env).list_objects_v2(Bucket=MODELS_BUCKET, Prefix="mlflow/")["Contents"]
    assert any(entry["Key"].endswith(f"{run.info.run_id}/artifacts/note.txt") for entry in found)


def test_dvc_and_s3fs_find_the_storage_by_files_or_by_variables(storage, tmp_path):
    import s3fs

    def dvc(folder: Path, *arguments: str, drop: str = "AWS_") -> None:
        bare = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        subprocess.run([services.program("dvc"), *arguments, "-q"], cwd=folder, env=bare, check=True)

    project, worktree = storage.root, tmp_path / "worktree"
    dvc(project, "init", "--no-scm")
    dvc(project, "remote", "add", "-d", "storage", f"s3://{DATA_BUCKET}/dvc")
    shutil.copytree(project / ".dvc", worktree / ".dvc")
    local = project / ".dvc" / "config.local"
    local.write_text("[core]\nautostage = true\n")
    supervisor.up(project, only=("s3",))
    assert stat.S_IMODE(local.stat().st_mode) == 0o600
    assert "autostage" in local.read_text()
    (project / "file").write_text("content")
    dvc(project, "add", "file")
    dvc(project, "push")
    digest = hashlib.md5(b"content").hexdigest()  # DVC's address of these bytes
    assert s3fs.S3FileSystem().exists(f"{DATA_BUCKET}/dvc/files/md5/{digest[:2]}/{digest[2:]}")
    shutil.copy(project / "file.dvc", worktree)
    dvc(worktree, "pull", drop="nothing")
    assert (worktree / "file").read_text() == "content"


def test_all_state_is_inside_a_folder_of_any_name(stack):
    assert {"ü", "%", "?", "#", " "} <= set(stack.root.name)
    beside = {path.resolve() for path in stack.root.parent.iterdir() if path.name.startswith("stack")}
    assert beside == {stack.root}
    databases = {path.name for path in (stack.root / ".pedigree").rglob("*.db")}
    assert {"mlflow.db", "mlflow-auth.db", "prefect.db"} <= databases


def test_a_worktree_shares_the_stack_of_its_checkout(stack, tmp_path, monkeypatch):
    before = pids(stack.root)
    (tmp_path / ".pedigree").symlink_to(stack.root / ".pedigree")
    assert supervisor.connect(tmp_path) == stack.env  # the variables are set, and are the local stack's own
    assert pids(stack.root) == before
    monkeypatch.setenv(supervisor.MARK, f"{(stack.root / '.pedigree').resolve()}:worker")
    monkeypatch.setattr(supervisor, "up", lambda root: pytest.fail("a flow run must not start services"))
    assert supervisor.connect(tmp_path) == stack.env


def test_the_keeper_starts_killed_services_again_leaves_no_orphan_and_does_not_own_them(stack):
    before = pids(stack.root)
    orphan = psutil.Process(before["mlflow"]).children()[0]  # uvicorn, which goes on and holds the port
    for name in ("mlflow", "worker"):
        os.kill(before[name], signal.SIGKILL)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = {service.service: service for service in supervisor.status(stack.root)}
        if all(
            found[name].state == "healthy" and "by the keeper" in found[name].detail for name in ("mlflow", "worker")
        ):
            break
        time.sleep(0.5)
    assert {name: service.state for name, service in found.items()} == dict.fromkeys(found, "healthy")
    assert {name for name in found if found[name].pid != before[name]} == {"mlflow", "worker"}
    for name in ("mlflow", "worker"):
        assert "started again once by the keeper, last at 20" in found[name].detail
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert supervisor.up(stack.root) == stack.env  # a command that comes later finds all of it
    # `down` ends the keeper first, and the services only after the runs have saved their state.
    mlflow = psutil.Process(found["mlflow"].pid)
    assert mlflow.ppid() == before["keeper"]
    of_the_keeper = {process.pid for process in find(Site.load(stack.root), ("keeper",))}
    assert before["keeper"] in of_the_keeper
    assert mlflow.pid not in of_the_keeper


def test_a_dead_keeper_is_seen_and_started_by_up(stack):
    before = pids(stack.root)
    os.kill(before["keeper"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before["keeper"])], timeout=5)
    states = {service.service: service.state for service in supervisor.status(stack.root)}
    assert states == {**dict.fromkeys(states, "healthy"), "keeper": "dead"}
    supervisor.up(stack.root)
    assert {name for name, pid in pids(stack.root).items() if pid != before[name]} == {"keeper"}


def test_a_scheduler_that_fails_is_seen(root, tmp_path, monkeypatch):
    """The server answers, and its scheduler raises each time: as Prefect 3.8 does with SQLAlchemy 2.1."""
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.fspath(planted))
    supervisor.up(root, only=("prefect",))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        (found,) = (service for service in supervisor.status(root) if service.service == "prefect")
        if found.state == "unhealthy":
            break
        time.sleep(0.5)
    assert found.state == "unhealthy"
    assert re.match(r"its background service schedule_\w+ fails: RuntimeError: planted in the scheduler", found.detail)


def asked(url: str, path: str, auth: str, method: str, body: Any = None) -> Any:
    """As `services.request`; a server whose SQLite is locked is asked again."""
    until = time.monotonic() + 60
    while True:
        try:
            return services.request(url, path, auth, method, body)
        except services.UnhealthyError as error:
            if "HTTP 503" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1)


def test_a_deployment_without_scheduled_runs_is_seen(stack, monkeypatch):
    """Scheduled runs that are deleted, and a scheduler that makes no new ones."""
    url, auth = stack.env["PREFECT_API_URL"].removesuffix("/api"), stack.env["PREFECT_API_AUTH_STRING"]
    flow = asked(url, "/api/flows/", auth, "POST", {"name": "scheduled"})["id"]
    body = {"name": "monthly", "flow_id": flow, "schedules": [{"schedule": {"cron": "0 3 1 * *"}, "active": True}]}
    made = asked(url, "/api/deployments/", auth, "POST", body)["id"]
    monkeypatch.setattr(services, "SCHEDULER_GRACE", timedelta(0))
    try:
        with pytest.raises(services.UnhealthyError, match="the scheduler has made no run of deployment 'monthly'"):
            services.check_schedules(url, auth)
        until = time.monotonic() + 60
        while time.monotonic() < until:  # the scheduler looks at new deployments every five seconds
            try:
                services.check_schedules(url, auth)
                return
            except services.UnhealthyError:
                time.sleep(0.5)
        pytest.fail("no run was scheduled in 60 s")
    finally:
        asked(url, f"/api/deployments/{made}", auth, "DELETE")


def test_flows_are_deployed_when_they_change_and_a_wrong_file_is_one_line(stack):
    def deployed() -> set[str]:
        path = "/api/deployments/filter"
        url = stack.env["PREFECT_API_URL"].removesuffix("/api")
        return {each["name"] for each in services.request(url, path, stack.env["PREFECT_API_AUTH_STRING"], "POST", {})}

    def left_beside() -> str:
        until = time.monotonic() + 120
        while "still being deployed" in (told := supervisor.unfinished(stack.root)) and time.monotonic() < until:
            time.sleep(0.2)
        return told

    file = stack.root / "prefect.yaml"
    (stack.root / "flows").mkdir(exist_ok=True)
    (stack.root / "flows" / "hello.py").write_text("from prefect import flow\n\n@flow\ndef hello(n: int = 1): ...\n")
    text = """deployments:
- {name: one, entrypoint: "flows/hello.py:hello", work_pool: {name: pedigree}, schedules: [{cron: "0 3 * * 1"}]}
- {name: two, entrypoint: "flows/hello.py:hello", work_pool: {name: pedigree}}
"""
    lines: list[str] = []
    try:
        file.write_text(text)
        supervisor.up(stack.root, report=lines.append, beside=True)
        assert left_beside() == ""
        assert deployed() >= {"one", "two"}
        supervisor.up(stack.root, report=lines.append)
        assert lines == ["deploying the flows of prefect.yaml"]
        file.write_text(text.replace("hello.py:hello", "absent.py:hello"))
        supervisor.up(stack.root, beside=True)
        assert re.match(r"deploy of prefect.yaml failed.*absent.py.*`pedigree up` tries it again$", left_beside())
        with pytest.raises(StackError, match=r"^deploy of prefect.yaml failed.*absent.py.*deploy.log\)$"):
            supervisor.up(stack.root)
        assert [service.state for service in supervisor.status(stack.root)] == ["healthy"] * 5
    finally:
        file.unlink()


def test_a_taken_port_is_left_to_its_owner_and_the_data_stay(root):
    env = supervisor.up(root, only=("s3",))
    keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
    boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], **keys).put_object(Bucket=DATA_BUCKET, Key="k", Body=b"v")
    assert supervisor.down(root) == ["s3"]
    port, lines = Site.load(root).ports["s3"], []
    with socket.create_server(("127.0.0.1", port)):
        moved = supervisor.up(root, ("s3",), lines.append)
    assert f"port {port} of s3 was taken by another program" in lines[0]
    assert moved["AWS_ENDPOINT_URL"] != env["AWS_ENDPOINT_URL"]
    client = boto3.client("s3", endpoint_url=moved["AWS_ENDPOINT_URL"], **keys)
    assert client.get_object(Bucket=DATA_BUCKET, Key="k")["Body"].read() == b"v"


def test_a_failed_start_says_why_and_leaves_no_process(root):
    (root / ".pedigree" / "prefect" / "ui").mkdir(parents=True)
    (root / ".pedigree" / "prefect" / "prefect.db").mkdir()
    with pytest.raises(StackError, match=r"^prefect stopped while starting; it said: .*prefect\.log\)$") as failed:
        supervisor.up(root, ("s3", "prefect"))
    assert "\n" not in str(failed.value)
    assert supervisor.processes(root) == []
    assert Site.load(root).services == {}


def test_two_ups_at_once_start_one_server(root):
    ups = [subprocess.Popen([sys.executable, "-c", UP, str(root), "s3"], stdout=subprocess.PIPE) for _ in range(2)]
    said = [up.communicate(timeout=60)[0].decode() for up in ups]
    assert [up.returncode for up in ups] == [0, 0]
    assert "".join(said).count("s3 is ready") == 1
    assert len(supervisor.processes(root)) == 1


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_start_cleans_up(root, how):
    # A shell's background job, such as these tests under nohup, ignores Ctrl-C.
    heard = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {UP}"
    start = subprocess.Popen(
        [sys.executable, "-c", heard, str(root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert start.stdout is not None
    assert b"s3 is ready" in start.stdout.readline()
    until = time.monotonic() + 30
    while len(supervisor.processes(root)) < 3:  # the line may come before the others are there
        assert time.monotonic() < until
        time.sleep(0.1)
    start.send_signal(how)
    start.communicate(timeout=60)
    assert start.returncode != 0
    assert supervisor.processes(root) == []


def test_what_a_background_job_starts_hears_interrupts(root):
    site = Site.load(root)
    site.log("worker").parent.mkdir(parents=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker = spawn(site, services.Service("worker", ["sleep", "60"], {}, root, "", lambda: None))
    finally:
        signal.signal(signal.SIGINT, before)
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text())
    assert ignored is not None
    assert not int(ignored[1], 16) & 1 << (signal.SIGINT - 1)


def test_down_never_touches_a_process_that_took_over_a_pid(root):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        record = {"pid": stranger.pid, "created": psutil.Process(stranger.pid).create_time(), "fingerprint": ""}
        (root / ".pedigree").mkdir()
        (root / ".pedigree" / "stack.json").write_text(json.dumps({"ports": {}, "services": {"s3": record}}))
        assert supervisor.down(root) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_a_user_can_mend_is_one_line(root, monkeypatch):
    with pytest.raises(StackError, match="start it with `pedigree up`"):
        supervisor.environment(root)
    monkeypatch.chdir(root)
    (root / "dvc.yaml").touch()
    for arguments, said in (
        (["env"], "error: there is no local stack"),
        (["status"], "stopped"),
        (["down"], "nothing"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == (0 if arguments == ["down"] else 1)
        assert said in result.output
        assert "Traceback" not in result.output
    with pytest.raises(StackError, match="program `no-such-program` is missing"):
        services.program("no-such-program")
    (root / ".pedigree").write_text("a file where the folder should be")
    with pytest.raises(StackError, match="cannot write the state of the stack"):
        supervisor.up(root)


def test_connect_takes_the_teams_services_or_names_what_is_missing(root, monkeypatch):
    team = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
        "PREFECT_API_URL": "https://prefect.example.org/api",
        "PEDIGREE_DATA_BUCKET": "data",
        "PEDIGREE_MODELS_BUCKET": "models",
        "PEDIGREE_AUDIT_BUCKET": "audit",
    }
    for name, value in team.items():
        monkeypatch.setenv(name, value)
    assert "MLFLOW_TRACKING_URI" not in supervisor.connect(root)
    assert not (root / ".pedigree").exists()
    monkeypatch.delenv("PREFECT_API_URL")
    with pytest.raises(StackError, match=r"MLFLOW_TRACKING_URI set, but not PREFECT_API_URL: set all"):
        supervisor.connect(root)
    for name in team:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StackError, match="no local stack"):
        supervisor.connect(root, start=False)
