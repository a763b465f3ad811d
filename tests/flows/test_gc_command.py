"""`pedigree gc` over real runs: what goes, what must stay, and what happens when it is killed or a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from typer.testing import CliRunner

from components.core.git import git
from components.lineage.audit_log import PLATFORM, AuditLog, Event
from components.lineage.ledger import Outcome
from components.lineage.lock_file import Record
from components.lineage.provenance import Tag
from components.lineage.removal import disk_bytes
from components.lineage.stored import DiskStore, S3Store, entries, objects
from components.lineage.trace import trace
from flows import workspace
from flows.cli import app
from flows.gc_lock import no_gc_beside, no_run_beside
from flows.git import WorkspaceError
from infra.local.compaction import compact_storage
from tests.flows.repository import DVC, git_lines
from tests.lineage.short_runs import STAGES, ShortRuns, do_stage, make_short_runs, open_mlflow_run, sh

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def runs(stack, tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> ShortRuns:
    """A registered run, a failed one, and the newest, with an audit bucket of their own."""
    made = make_short_runs(tmp_path_factory.mktemp("gc"))
    boto3.client("s3").create_bucket(Bucket=f"{made.name}-audit", ObjectLockEnabledForBucket=True)
    patch.setenv("PEDIGREE_AUDIT_BUCKET", f"{made.name}-audit")
    numbers = iter(range(1000))
    patch.setattr(workspace.secrets, "token_hex", lambda _: f"{next(numbers):04x}")
    patch.chdir(made.root)
    made.works = [made.run(1, register=True), made.run(2, ending="Run failed: x"), made.run(3)]
    return made


def gc(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["gc", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["gc", *arguments])
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.stderr
    return done.stderr.replace("\n", " ")


def stores(runs: ShortRuns) -> tuple[DiskStore, S3Store]:
    return DiskStore(runs.cache), S3Store(str(Record(runs.root).remote_url()))


def state(runs: ShortRuns) -> tuple:
    return (
        *(store.listing() for store in stores(runs)),
        git_lines(runs.root, "for-each-ref"),
        sorted(runs.root.rglob("*")),
    )


def broken_entries(runs: ShortRuns) -> list[str]:
    """Run-cache entries of either place whose outputs are in neither."""
    listings = [store.listing() for store in stores(runs)]
    there = {id_ for listing in listings for id_ in objects(listing)}
    found = [
        (path, yaml.safe_load(store.read(path) or b"")["outs"])
        for store, listing in zip(stores(runs), listings, strict=True)
        for path in entries(listing)
    ]
    return [path for path, outs in found if not {out["md5"] for out in outs} <= there]


def test_a_dry_run_says_what_goes_and_changes_nothing(runs: ShortRuns):
    registered, failed, newest = runs.works
    before = state(runs)
    found = gc("--keep", "1", "--older", "0d", "--dry-run")
    assert state(runs) == before
    assert found["removed"]["runs (branches)"]["names"] == [failed.branch]
    candidate = f"version {runs.name}-candidates/1"
    assert found["kept_runs"] == {
        newest.run_id: "newest: among the newest 1",
        registered.run_id: f"registered: {candidate}",
    }
    # Of the failed run alone: a curated set and weights of 130 kB each, their listings, a report.
    for place in ("disk", "S3"):
        assert found["removed"][f"objects on {place}"]["count"] == 5
        assert 250_000 < found["removed"][f"objects on {place}"]["bytes"] < 350_000
        assert found["removed"][f"run-cache entries on {place}"]["count"] == 2
    assert gc("--keep", "0", "--older", "1h", "--dry-run")["kept_runs"][failed.run_id].startswith("young: ")
    text = CliRunner().invoke(app, ["gc", "--keep", "1", "--older", "0d", "--dry-run"]).output
    assert f"kept as registered: 1 runs, e.g. {registered.run_id} ({candidate})" in text
    assert "would free" in text
    done = CliRunner().invoke(app, ["gc", "--keep", "1", "--older", "soon"])
    assert done.exit_code == 2
    assert "--older soon: not an age; write days or hours, such as 30d" in done.stderr


def test_what_it_must_know_and_cannot(runs: ShortRuns, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    newest = runs.works[-1]
    before = state(runs)
    with going_on(runs.root) as running:
        assert f"run {running} is in progress; nothing was removed" in refused("--keep", "0", "--older", "0d")
    assert state(runs)[:3] == before[:3]
    # An audit event that names a run keeps it.
    log = AuditLog.from_environment()
    log.append(Event(PLATFORM, "run-ended", newest.run_id, "rita", {"commit": git(newest.root, "rev-parse", "HEAD")}))
    registered = f"{runs.name}-candidates"
    log.append(Event(registered, "register", f"{registered}/9", "rita", {"branch": newest.branch}))
    assert newest.run_id not in gc("--keep", "0", "--older", "0d", "--dry-run")["kept_runs"]
    log.append(Event(runs.name, "promote", f"{runs.name}/1", "rita", {"run": open_mlflow_run(newest, "x", "FINISHED")}))
    asked = ("--keep", "0", "--older", "0d", "--dry-run")
    assert gc(*asked)["kept_runs"][newest.run_id] == f"audited: audit event {runs.name}/1"
    # A run of another clone: nobody here knows what it needs of the shared remote.
    client, elsewhere = MlflowClient(), "20990101-000000-ffff"
    experiment = client.get_experiment_by_name(runs.name)
    assert experiment is not None
    tags = {"pedigree.stage": "flow", "pedigree.run": elsewhere}
    other = client.create_run(experiment.experiment_id, tags=tags).info.run_id
    found = gc(*asked)
    assert found["removed"]["objects on S3"]["count"] == found["removed"]["run-cache entries on S3"]["count"] == 0
    assert found["removed"]["objects on disk"]["count"] == 5
    assert f"MLflow knows 1 runs without a branch here, e.g. {elsewhere}" in found["notes"][0]
    client.delete_run(other)
    # A version of another clone, of data that lies here.
    version = client.get_model_version(f"{runs.name}-candidates", "1")
    tags = version.tags | {Tag.COMMIT: "f" * 40, Tag.BRANCH: "runs/elsewhere"}
    foreign = client.create_model_version(version.name, "s3://elsewhere/m-2", tags=tags, await_creation_for=0)
    said = refused(*asked)
    assert f"version {version.name}/2: commit ffffffffffff is not in this repository, but its data is here" in said
    assert "fetch its branch runs/elsewhere first" in said
    client.delete_model_version(version.name, str(foreign.version))
    # Services that do not answer.
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert "does not answer" in refused(*asked)
    with monkeypatch.context() as patched:
        patched.setenv("PEDIGREE_AUDIT_BUCKET", "no-such-bucket")
        assert "no such bucket" in refused(*asked)
    assert state(runs)[:3] == before[:3]


@contextmanager
def going_on(root: Path) -> Iterator[str]:
    """A run that has begun: it holds its locks, and has no branch yet."""
    name = "20980101-000000-aaaa"
    path = root / ".pedigree/runs" / f"{name}.lock"
    with no_gc_beside(root), path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield name
    path.unlink()


def test_killed_in_the_middle_and_run_again(runs: ShortRuns, monkeypatch: pytest.MonkeyPatch):
    registered, failed, newest = runs.works
    open_mlflow_run(failed, "pretrain", "FAILED")
    plan = gc("--keep", "1", "--older", "0d", "--dry-run")["removed"]
    assert plan["MLflow files of failed runs"]["bytes"] == 10_000
    before = {store: store.listing() for store in stores(runs)}
    once, removed = S3Store.remove, []

    def dies(self: S3Store, found: Any) -> None:
        if len(found) <= 2:  # entries
            return once(self, found)
        removed.extend(list(found)[:2])
        once(self, {path: found[path] for path in removed})
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(S3Store, "remove", dies)
        assert CliRunner().invoke(app, ["gc", "--keep", "1", "--older", "0d"]).exit_code == 130
    assert all(path.endswith(".dir") for path in removed)  # none of them may outlive its files
    assert broken_entries(runs) == []
    gc("--keep", "1", "--older", "0d")
    assert broken_entries(runs) == []
    branches = git_lines(runs.root, "for-each-ref", "--format=%(refname:short)")
    assert branches == sorted(["main", registered.branch, newest.branch])
    assert not failed.root.exists()
    assert not (runs.root / ".pedigree/runs" / f"{failed.run_id}.lock").exists()
    for store, listing in before.items():
        place = "S3" if isinstance(store, S3Store) else "disk"
        gone = {*plan[f"objects on {place}"]["names"], *plan[f"run-cache entries on {place}"]["names"]}
        assert store_versions(store, listing) - store_versions(store, store.listing()) == {
            (path, version) for path in gone for version in (listing[path].versions or ("",))
        }
    again = gc("--keep", "1", "--older", "0d")
    assert again["freed"] == 0
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(runs.name).experiment_id], "status = 'FAILED'")
    assert client.list_artifacts(run.info.run_id, "pictures") == []  # its record stays
    asked = {
        "Bucket": os.environ["PEDIGREE_MODELS_BUCKET"],
        "Prefix": f"mlflow/{run.info.experiment_id}/{run.info.run_id}",
    }
    assert "Versions" not in boto3.client("s3").list_object_versions(**asked)


def store_versions(store: Any, listing: Any) -> set[tuple[str, str]]:
    return {(path, version) for path, item in listing.items() for version in (item.versions or ("",))}


def test_what_stayed_is_whole_and_what_went_is_computed_again(runs: ShortRuns):
    registered, _, newest = runs.works
    assert trace(f"{runs.name}-candidates/1", runs.root).missing == []
    shutil.rmtree(runs.cache)
    for work in (registered, newest):
        curated = (work.root / "data/curated/00000.tar").read_bytes()
        shutil.rmtree(work.root / "data/curated")
        shutil.rmtree(work.root / "models")
        sh(work.root, DVC, "pull", "-q")
        assert (work.root / "data/curated/00000.tar").read_bytes() == curated
        assert (work.root / "models/adapted/model.safetensors").exists()
    with runs.going(2) as again:
        assert do_stage(again, "curate", STAGES["curate"]["cmd"]) == "ran"
    with runs.going(3) as again:
        assert again.ledger.take_up("curate") is Outcome.RESTORED


def test_the_local_s3_server_gives_its_disk_back(stack, monkeypatch: pytest.MonkeyPatch):
    client, place = boto3.client("s3"), {"Bucket": os.environ["PEDIGREE_DATA_BUCKET"], "Key": "large"}
    version = client.put_object(**place, Body=os.urandom(20_000_000))["VersionId"]
    full = disk_bytes(stack.root / ".pedigree/s3")
    client.delete_object(**place, VersionId=version)
    until = time.monotonic() + 120
    while disk_bytes(stack.root / ".pedigree/s3") > full - 15_000_000:  # SeaweedFS deletes in the background
        assert compact_storage(stack.root)
        assert time.monotonic() < until
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.of-a-team.example.org")
    assert not compact_storage(stack.root)


def test_a_run_waits_for_gc_and_gc_does_not_wait_for_a_run(tmp_path: Path, caplog, monkeypatch):
    git(tmp_path, "init", "--quiet")
    order, waiting = [], threading.Event()
    tell = lambda record: waiting.set() if "gc` is working" in record.getMessage() else None  # noqa: E731
    monkeypatch.setattr(caplog.handler, "emit", tell)  # the handler is that of all tests after this one

    def run() -> None:
        with no_gc_beside(tmp_path):
            order.append("run")

    with no_run_beside(tmp_path):
        thread = threading.Thread(target=run)
        thread.start()
        assert waiting.wait(60)
        order.append("gc")
    thread.join()
    assert order == ["gc", "run"]
    message = "or a run that just starts, is in progress; nothing was removed"
    with (
        no_gc_beside(tmp_path),
        no_gc_beside(tmp_path),  # runs go on side by side
        pytest.raises(WorkspaceError, match=message),
        no_run_beside(tmp_path),
    ):
        pass
