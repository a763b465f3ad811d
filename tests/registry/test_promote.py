"""Decisions on the real services: gates, bytes, aliases, audit, and what happens when one dies half way."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import traceback
from pathlib import Path

import boto3
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.signing import signing_key_id
from components.lineage.audit_anchors import TAG
from components.lineage.audit_log import AuditLog, Event, OvertakenError
from components.lineage.provenance import Tag
from components.registry import promote as promotion
from components.registry import review as reviews
from components.registry.config import GatesConfig
from components.registry.promote import promote, reject, rollback
from components.registry.publish import RegistryError
from components.registry.release import Released
from components.registry.review import decided, review_reference, undecided
from components.registry.standing import Standing
from flows.commands.decorators import command
from flows.commands.history import history as history_command
from flows.commands.promote import promote as promote_command
from flows.commands.promote import reject as reject_command
from flows.commands.promote import rollback as rollback_command
from flows.commands.review import review as review_command
from tests.registry.conftest import TRACE, decide

pytestmark = pytest.mark.stack


@pytest.fixture
def name(finished, name: str) -> str:
    """A model of its own with the finished candidates, the third of them worse: the same bytes under another name."""
    client, candidates = MlflowClient(), f"{finished['name']}-candidates"
    client.create_registered_model(f"{name}-candidates")
    for number in ("1", "2", "3"):
        version = client.get_model_version(candidates, number)
        model_id = version.source.removeprefix("models:/")
        client.create_model_version(
            f"{name}-candidates", version.source, version.run_id, tags=version.tags, model_id=model_id
        )
    return name


def state(name: str) -> dict[str, object]:
    """Everything a promotion changes: aliases, versions, events."""
    client = MlflowClient()
    return {
        "aliases": {k: str(v) for k, v in client.get_registered_model(name).aliases.items()},
        "versions": len(client.search_model_versions(f"name='{name}'")),
        "events": [(e.sequence, e.subject) for e in AuditLog.from_environment().read(name)],
    }


def test_champion_loads_from_released_bytes(finished, name: str, photographs, monkeypatch):
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Rita")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "rita@example.org")
    candidate = finished["first"]["teacher"]
    done = decide(finished, f"{name}-candidates/1", "better on every test")
    assert (done.changed, done.version, done.previous) == (True, f"{name}/1", None)
    assert done.candidate == f"{name}-candidates/1"
    assert done.digest == candidate["digest"]
    assert done.source == f"s3://{os.environ['PEDIGREE_MODELS_BUCKET']}/released/{name}/{candidate['digest']}"
    frame = pd.DataFrame({"image": photographs})
    champion = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    trained = mlflow.pyfunc.load_model(candidate["uri"])
    np.testing.assert_array_equal(champion.predict(frame), trained.predict(frame))
    (entry,) = AuditLog.from_environment().read(name)
    assert (entry.action, entry.subject) == ("promote", f"{name}/1")
    assert entry.actor == "Rita <rita@example.org>"
    assert entry.details["actor_from"] == "git's user.name and user.email; MLflow's login admin is shared"
    assert entry.details["reason"] == "better on every test"
    assert entry.details["digest"] == candidate["digest"]
    assert entry.details["waived"] == TRACE
    assert entry.details["gates"]["random"] == [
        "passed",
        "knn_top1 minus that of random weights: +0.650 (+0.550 to +0.750)",
    ]
    assert entry.details["gates"]["lineage"][0] == "failed"
    bucket, key = os.environ["PEDIGREE_MODELS_BUCKET"], f"released/{name}/{candidate['digest']}/model.sig"
    signature = boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    assert entry.details["signature"] == {"sha256": hashlib.sha256(signature).hexdigest(), "key": signing_key_id()}
    assert MlflowClient().get_registered_model(name).tags[TAG] == f"{name} 1 {entry.hash}"
    version = MlflowClient().get_model_version(name, "1")
    assert version.tags[Tag.AUDIT] == f"1:{entry.hash}"
    assert version.tags[Tag.CANDIDATE] == f"{name}-candidates/1"
    assert version.tags[Tag.COMMIT]
    assert MlflowClient().get_model_version(f"{name}-candidates", "1").tags[Tag.RELEASED] == f"{name}/1"


def test_a_worse_candidate_is_stopped_by_the_gate_that_says_so(finished, name: str):
    decide(finished, f"{name}-candidates/2")
    found = review_reference(MlflowClient(), f"{name}@latest", finished["latest"])
    assert [gate.name for gate in found.failed] == ["champion", "lineage"]
    assert found.failed[0].text == f"worse than {name}/1: knn_top1 -0.250 (-0.309 to -0.186)"
    before = state(name)
    with pytest.raises(
        RegistryError, match=r"does not pass 1 of 12 gates: champion: worse than .*--waive champion=REASON"
    ):
        decide(finished, f"{name}@latest")
    with pytest.raises(ConfigError, match="the gate random does not fail"):
        decide(finished, f"{name}@latest", random="why not")
    with pytest.raises(ConfigError, match="no gate is called 'knn'; the gates are champion, random"):
        decide(finished, f"{name}@latest", knn="why not")
    assert state(name) == before
    done = decide(finished, f"{name}@latest", champion="half the size")
    assert done.version == f"{name}/2"
    assert AuditLog.from_environment().read(name)[-1].details["waived"]["champion"] == "half the size"


def test_a_rejected_candidate_stays_out_until_that_is_waived(finished, name: str):
    decide(finished, f"{name}-candidates/1")
    assert [c.version for c in undecided(MlflowClient()) if c.version.startswith(name)] == [f"{name}-candidates/3"]
    MlflowClient().set_model_version_tag(f"{name}-candidates", "3", Tag.RELEASED, f"{name}/1")  # as a trainer can
    assert [c.version for c in undecided(MlflowClient()) if c.version.startswith(name)] == [f"{name}-candidates/3"]
    done = reject(f"{name}-candidates/3", "fails at night", "Ann")
    assert (done.action, done.version, done.unexplained) == ("reject", f"{name}-candidates/3", [])
    tag = MlflowClient().get_model_version(f"{name}-candidates", "3").tags[Tag.REJECTED]
    assert tag == "Ann, event 2: fails at night"
    assert not [c.version for c in undecided(MlflowClient()) if c.version.startswith(name)]
    assert decided(f"{name}-candidates/3") == "rejected by Ann, event 2: fails at night"
    with pytest.raises(RegistryError, match=r"rejection: Ann rejected it on .* \(event 2\): fails at night"):
        decide(finished, f"{name}-candidates/3", champion="known")
    assert decide(finished, f"{name}-candidates/3", champion="known", rejection="mended").version == f"{name}/2"
    MlflowClient().delete_model_version_tag(f"{name}-candidates", "3", Tag.RELEASED)  # as if killed before it
    assert decided(f"{name}-candidates/3") == f"released as {name}/2"
    with pytest.raises(ConfigError, match="is released"):
        reject(f"{name}/2", "r")


def test_rollback_brings_the_bytes_of_before_without_candidate_or_run(finished, name: str, photographs):
    first = decide(finished, f"{name}-candidates/1")
    frame = pd.DataFrame({"image": photographs})
    before = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(frame)
    decide(finished, f"{name}-candidates/2")
    client = MlflowClient()
    client.delete_model_version(f"{name}-candidates", "1")
    done = rollback(name, "fails at night")
    assert (done.version, done.digest, done.previous) == (f"{name}/1", first.digest, None)
    assert state(name)["aliases"] == {"champion": "1"}
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(frame), before)
    with pytest.raises(RegistryError, match=f"{name}: no earlier champion to return to; {name}/1 is the first"):
        rollback(name, "again")
    again = rollback(name, "fails at night")  # run again, as after a crash
    assert (again.changed, again.event) == (False, done.event)
    again = decide(finished, f"{name}/2", "mended")  # a released version, by its released bytes
    assert (again.version, again.previous) == (f"{name}/2", f"{name}/1")
    bucket, key = os.environ["PEDIGREE_MODELS_BUCKET"], first.source.split("/", 3)[3]
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{key}/python_env.yaml", Body=b"other")
    with pytest.raises(RegistryError, match=r"not the bytes that were registered: python_env\.yaml"):
        rollback(name, "r")


def test_previous_keeps_the_champion_before(finished, name: str):
    decide(finished, f"{name}-candidates/1", "the first")
    done = decide(finished, f"{name}-candidates/2", "the second")
    assert (done.version, done.previous) == (f"{name}/2", f"{name}/1")
    assert state(name)["aliases"] == {"champion": "2", "previous": "1"}
    back = decide(finished, f"{name}-candidates/1", "the second was worse")
    assert (back.version, back.previous) == (f"{name}/1", f"{name}/2")
    events = [(1, f"{name}/1"), (2, f"{name}/2"), (3, f"{name}/1")]
    assert state(name) == {"aliases": {"champion": "1", "previous": "2"}, "versions": 2, "events": events}


def test_champion_already(finished, name: str):
    first = decide(finished, f"{name}-candidates/1", "first")
    before = state(name)
    again = decide(finished, f"{name}-candidates/1", "again")
    assert (again.changed, again.event, again.version) == (False, first.event, f"{name}/1")
    assert state(name) == before


def test_what_was_changed_behind_our_back_is_shown_and_mended_by_the_next_decision(finished, name: str):
    """An alias that was moved, and a version as MLflow's button "Promote model" makes it."""
    decide(finished, f"{name}-candidates/1", "the first")
    decide(finished, f"{name}-candidates/2", "the second")
    client = MlflowClient()
    client.copy_model_version(f"models:/{name}-candidates/3", name)
    client.set_registered_model_alias(name, "champion", "3")
    told = [
        f"the alias champion is on {name}/3, by the audit log it is on {name}/2",
        f"{name}/3: no event lets it in",
    ]
    standing = Standing.read(name)
    assert not standing.settle()
    assert standing.unexplained() == told
    done = decide(finished, f"{name}-candidates/2", "as it was")
    assert done.unexplained == told
    assert done.event.details["reason"] == "as it was"
    assert (done.version, done.previous) == (f"{name}/2", f"{name}/1")
    assert state(name)["aliases"] == {"champion": "2", "previous": "1"}
    assert Standing.read(name).unexplained() == told[1:]


class Killed(BaseException):
    """As SIGKILL: no handler of the code under test sees it."""


STEPS = [
    (Released, "_put", 5),
    (Released, "copy_in", 1),
    (promotion, "_released_version", 1),
    (AuditLog, "append", 1),
    (MlflowClient, "set_model_version_tag", 1),
    (MlflowClient, "set_registered_model_alias", 1),
    (MlflowClient, "set_registered_model_alias", 2),
]


def test_killed_at_any_step_and_run_again(finished, name: str):
    """A call dies before each step in turn, so after each step but the last; the last call is left alone."""
    decide(finished, f"{name}-candidates/1", "the first")
    for owner, function, count in STEPS:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, function, count)
            with pytest.raises(Killed):
                decide(finished, f"{name}-candidates/2", "the second")
    decide(finished, f"{name}-candidates/2", "the second")
    events = [(1, f"{name}/1"), (2, f"{name}/2")]
    whole = {"aliases": {"champion": "2", "previous": "1"}, "versions": 2, "events": events}
    assert state(name) == whole
    for count in (1, 2):  # any next command finishes what was cut short
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, MlflowClient, "set_registered_model_alias", count)
            with pytest.raises(Killed):
                decide(finished, f"{name}-candidates/{count}", "once more")
        assert Standing.read(name).settle()
        assert Standing.read(name).unexplained() == []
    assert state(name)["aliases"] == {"champion": "2", "previous": "1"}


def test_reject_killed_at_any_step_and_run_again(finished, name: str):
    candidate = f"{name}-candidates/3"
    for owner, function in ((AuditLog, "append"), (MlflowClient, "set_model_version_tag")):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, function, 1)
            with pytest.raises(Killed):
                reject(candidate, "fails at night", "Ann")
    done = reject(candidate, "fails at night", "Ann")
    assert (done.action, done.changed, done.event.sequence) == ("reject", False, 1)
    assert [(e.sequence, e.subject) for e in AuditLog.from_environment().read(name)] == [(1, candidate)]
    tag = MlflowClient().get_model_version(f"{name}-candidates", "3").tags[Tag.REJECTED]
    assert tag == "Ann, event 1: fails at night"
    assert reject(candidate, "and by day", "Ann").changed


def kill_at(patch: pytest.MonkeyPatch, owner: object, function: str, count: int) -> None:
    original, calls = getattr(owner, function), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, function, dying)


def test_alias_moves_only_after_the_event(finished, name: str, monkeypatch):
    monkeypatch.setattr(AuditLog, "append", lambda *_, **__: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        decide(finished, f"{name}-candidates/1", "reason")
    assert MlflowClient().get_registered_model(name).aliases == {}


def test_of_two_reviewers_at_once_one_wins_and_the_other_is_told(finished, name: str, monkeypatch):
    original = AuditLog.append

    def overtaken(log: AuditLog, event: Event, after: int | None = None):
        for number in (2, 1):
            if after == 0:
                original(log, Event(name, "reject", f"{name}-candidates/{number}", "Bob", {"reason": "at night"}))
        return original(log, event, after)

    monkeypatch.setattr(AuditLog, "append", overtaken)
    with pytest.raises(OvertakenError, match=r"event 2 came first: reject of .*/1 by Bob, 'at night'; look again"):
        decide(finished, f"{name}-candidates/1", "reason")
    assert MlflowClient().get_registered_model(name).aliases == {}


def test_of_two_processes_that_promote_at_once_one_wins(finished, name: str):
    """The first versions of a model, each by a process of its own; both have judged when the first event is written."""
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(2), context.SimpleQueue()

    def promote_one(number: int) -> None:
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch:
            original = AuditLog.append

            def together(log: AuditLog, event: Event, after: int | None = None):
                barrier.wait(120)
                return original(log, event, after)

            patch.setattr(AuditLog, "append", together)
            try:
                told.put((number, decide(finished, f"{name}-candidates/{number}", f"it is {number}").version))
            except OvertakenError as error:
                told.put((number, error.entry.details["reason"]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os._exit(0)  # at a fork, conftest.py takes away what would end MLflow's threads

    both = [context.Process(target=promote_one, args=(number,)) for number in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    found = dict(told.get() for _ in both)
    (winner,) = (number for number, said in found.items() if said.startswith(f"{name}/"))
    assert found[3 - winner] == f"it is {winner}"
    (event,) = AuditLog.from_environment().read(name)
    champion = event.subject.rpartition("/")[2]
    assert (event.subject, state(name)["aliases"]) == (found[winner], {"champion": champion})
    assert Standing.read(name).unexplained() == [f"{name}/{3 - int(champion)}: no event lets it in"]
    assert decide(finished, f"{name}-candidates/{3 - winner}", "after all").previous == event.subject
    assert Standing.read(name).unexplained() == []


def test_a_typed_name_is_no_second_person(finished, name: str, monkeypatch):
    original, asked = reviews._read, {"gates": GatesConfig(second_person=True)}

    def strict(version: str):
        record = original(version)
        assert record is not None
        return dataclasses.replace(record, facts=record.facts.model_copy(update=asked))

    monkeypatch.setattr(reviews, "_read", strict)
    candidate = f"{name}-candidates/1"
    with pytest.raises(RegistryError, match="second-person: Bob is a name that was not authenticated; another person"):
        promote(candidate, "r", finished["latest"], TRACE, "Bob")
    monkeypatch.setattr(promotion, "authenticated_user", lambda: "rita")  # over HTTP in tests/infra/test_roles.py
    done = promote(candidate, "r", finished["latest"], TRACE)
    gate = done.event.details["gates"]["second-person"]
    assert (done.event.actor, gate[0], gate[1].startswith("rita decides")) == ("rita", "passed", True)


def test_tampered_candidate_is_refused_and_the_file_named(finished, name: str):
    client, root = MlflowClient(), finished["root"]
    model_id = client.get_model_version(f"{name}-candidates", "1").source.removeprefix("models:/")
    client.log_model_artifacts(model_id, str(root / "models/pretrained"), "artifacts/weights")
    try:
        with pytest.raises(PedigreeError, match=r"weights: .*do not use it: .*model\.safetensors") as error:
            decide(finished, f"{name}-candidates/1", "reason")
    finally:
        client.log_model_artifacts(model_id, str(root / "models/adapted"), "artifacts/weights")
    assert len(str(error.value).splitlines()) == 1
    assert AuditLog.from_environment().read(name) == []
    assert not client.search_registered_models(f"name='{name}'")


def test_other_bytes_at_the_released_place_are_refused(finished, name: str):
    digest = finished["first"]["teacher"]["digest"]
    bucket, key = os.environ["PEDIGREE_MODELS_BUCKET"], f"released/{name}/{digest}/MLmodel"
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"other")
    with pytest.raises(RegistryError, match=r"MLmodel: holds other bytes than the candidate"):
        decide(finished, f"{name}-candidates/1", "reason")


def test_bad_requests_have_one_clear_line(finished, name: str, monkeypatch):
    for reference, reason, message in [
        (f"{name}@latest", " ", "needs a reason"),
        (name, "r", "write NAME@latest for the newest candidate"),
        (
            f"{name}-candidates/9",
            "r",
            f"no such version; {name} has no versions, {name}-candidates has versions 1, 2, 3",
        ),
        (f"{name}/1", "r", f"{name}/1: no such version"),
        (f"{name}@best", "r", "no such version"),
        ("no-such-model@latest", "r", "no-such-model-candidates has no versions"),
    ]:
        with pytest.raises((ConfigError, RegistryError), match=message):
            promote(reference, reason)
    with pytest.raises(RegistryError, match="no earlier champion to return to; it has no champion"):
        rollback(name, "r")
    monkeypatch.delenv("PEDIGREE_MODELS_BUCKET")
    with pytest.raises(RegistryError, match="PEDIGREE_MODELS_BUCKET is not set"):
        decide(finished, f"{name}-candidates/1", "r")


def test_commands(finished, name: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(finished["latest"])
    app = typer.Typer()
    for function in (promote_command, reject_command, rollback_command, review_command, history_command):
        app.command(function.__name__)(command(checkout=False)(function.__wrapped__))
    invoke = CliRunner().invoke
    chosen = ["promote", f"{name}-candidates/1", "--reason", "good", "--waive", "lineage=made up"]
    done = invoke(app, [*chosen, "--json"])
    assert json.loads(done.stdout)["version"] == f"{name}/1"
    again = invoke(app, chosen)
    assert again.exit_code == 0
    assert f"{name}-candidates/1 is the champion of {name} already ({name}/1)" in again.stdout
    refused = invoke(app, ["promote", f"{name}@latest", "--reason", "good", "--waive", "lineage=x"])
    assert refused.exit_code == 1
    assert f"error: {name}-candidates/3 does not pass 1 of 12 gates: champion: worse than {name}/1" in refused.stderr
    assert invoke(app, ["promote", f"{name}/1"]).exit_code == 2
    assert "expected GATE=REASON" in invoke(app, [*chosen[:-1], "lineage"]).stderr

    shown = invoke(app, ["review", f"{name}@latest"])
    assert shown.exit_code == 1
    assert "fails 2 of 12 gates: champion, lineage" in shown.stdout
    found = json.loads(invoke(app, ["review", f"{name}@latest", "--json"]).stdout)
    assert (found["version"], found["champion"]) == (f"{name}-candidates/3", f"{name}/1")
    assert f"{name}-candidates/3" in invoke(app, ["review"]).stdout
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), monkeypatch.context() as patch:
        patch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
        waiting = invoke(app, ["review", "--json"])
    (row,) = (row for row in json.loads(waiting.stdout) if row["version"] == f"{name}-candidates/3")
    assert row["request"] is None
    assert row["request_unknown"].startswith("Prefect at http://127.0.0.1:9/api does not answer (")
    assert waiting.stderr.endswith(f"{row['request_unknown']}\n")

    opened: list[str] = []
    monkeypatch.setattr(typer, "launch", opened.append)
    monkeypatch.chdir(tmp_path)
    made = invoke(app, ["review", f"{name}/1", "--open", "--json"])
    (path,) = opened
    assert (json.loads(made.stdout)["passport"], Path(path).name) == (path, f"{name}-1.html")
    page = Path(path).read_text()
    assert f"<title>Passport of {name}/1</title>" in page
    assert f"<td>promote {name}/1</td><td>good; waived lineage: made up</td>" in page
    monkeypatch.chdir(finished["latest"])

    assert "is rejected" in invoke(app, ["reject", f"{name}@latest", "--reason", "blind at night"]).stdout
    assert "no earlier champion" in invoke(app, ["rollback", name, "--reason", "x"]).stderr

    told = invoke(app, ["history", name])
    assert told.exit_code == 0
    assert "1 candidates were rejected" in told.stdout
    assert "promote, event 1: good" in told.stdout
    assert "waived lineage: made up" in told.stdout
    assert "had no champion at 2020-01-01" in invoke(app, ["history", name, "--at", "2020-01-01"]).stdout
    assert invoke(app, ["history", name, "--at", "yesterday"]).exit_code == 2
    MlflowClient().delete_registered_model_alias(name, "champion")
    MlflowClient().set_registered_model_alias(name, "previous", "1")
    moved = invoke(app, ["history", name])
    assert moved.exit_code == 1
    assert f"by the audit log it is on {name}/1" in moved.stderr
