"""MLflow's server on a real PostgreSQL, as a team runs it, with the driver of the extra `postgres`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.local.services import program

FOUND = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]
pytestmark = pytest.mark.skipif(not FOUND, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """`user:password@host:port/name` of an empty database, on a server of its own."""
    folder = Path(tempfile.mkdtemp(prefix="pedigree-pg-", dir="/tmp"))  # which the user of PostgreSQL can enter
    port, binaries = free_port(), Path(FOUND[-1]).parent
    as_user: list[str] = []
    if os.geteuid() == 0:  # which PostgreSQL refuses
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def run(name: str, *arguments: str) -> None:
        command = [*as_user, str(binaries / name), *arguments]
        with (folder.parent / f"{folder.name}.log").open("a") as log:  # the server keeps it open, so no pipe
            done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        assert done.returncode == 0, Path(log.name).read_text()[-2000:]

    data = str(folder / "data")
    try:
        run("initdb", "--pgdata", data, "--username", "team", "--auth", "trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "--pgdata", data, "--wait", "--options", options, "start")
        yield f"team:any@127.0.0.1:{port}/postgres"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            run("pg_ctl", "--pgdata", data, "--wait", "--mode", "immediate", "stop")
        shutil.rmtree(folder)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


@pytest.mark.parametrize("scheme", ["postgresql+psycopg2", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_mlflow_serves_from_postgresql_and_takes_a_run(database, scheme, tmp_path):
    port = free_port()
    command = [program("mlflow"), "server", "--port", str(port), "--workers", "1", "--host", "127.0.0.1"]
    command += ["--backend-store-uri", f"{scheme}://{database}", "--artifacts-destination", str(tmp_path / "artifacts")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        run = client.create_run("0").info.run_id
        client.log_metric(run, "loss", 0.5)
        assert client.get_run(run).data.metrics == {"loss": 0.5}
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
