"""What `pedigree plan` says is what a run then does; an accepted change of code is on record and runs nothing.

The repository is this project with short stages; a run is a run's own worktree, ledger and commands, without Prefect.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.lineage.audit_log import AuditLog
from components.lineage.code import list_of
from components.lineage.ledger import Ledger, Outcome
from components.lineage.lock_file import file_md5
from components.recipe import load_recipe
from flows.accept import Acceptance
from flows.cli import app
from flows.sources import choose
from flows.stages import stream
from flows.workspace import open_workspace
from tests.flows.repository import DVC, copy_of_project, git_lines

STAGES = """
  curate:
    cmd: sh -c 'mkdir -p data/curated && cat data/pool/*/*/image > data/curated/x'
    deps: [data/pool, reports/code/curate.txt]
    params: [seed, curate]
    outs: [data/curated]
  pretrain:
    cmd: sh -c 'mkdir -p models/pretrained && date +%s%N > models/pretrained/x'
    deps: [data/curated, reports/code/pretrain.txt]
    params: [pretrain.steps]
    outs: [models/pretrained]
  adapt:
    cmd: sh -c 'mkdir -p reports/adapt && cat models/pretrained/x > reports/adapt/result.json'
    deps: [models/pretrained, reports/code/adapt.txt]
    params: [adapt]
    outs: [reports/adapt/result.json: {cache: false}]
"""
KOLEO = "components/objective/koleo.py"


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A checkout after its first run."""
    root = copy_of_project(tmp_path_factory.mktemp("plan") / "checkout")
    code = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["code"]
    (root / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"code": code, **yaml.safe_load(STAGES)}}, sort_keys=False)
    )
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    add_source(root, "photos")
    told = planned(root)
    assert told["last_run"] is None
    assert [(s["stage"], s["outcome"], s["changes"][0]["what"]) for s in told["stages"]] == [
        (stage, "run", "no run yet") for stage in ("curate", "pretrain", "adapt")
    ]
    assert set(run(root).values()) == {Outcome.CHANGED}
    return root


@pytest.fixture
def root(finished) -> Any:
    """The same checkout; what a test edits is put back."""
    yield finished
    git_lines(finished, "checkout", "--", "components", "params.yaml")


def add_source(root: Path, name: str) -> None:
    image = root / f"data/pool/{name}/ab12/image"
    image.parent.mkdir(parents=True)
    image.write_text(name)
    subprocess.run([DVC, "add", "-q", image.parent], cwd=root, check=True, capture_output=True)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def run(root: Path) -> dict[str, Outcome]:
    """A run's worktree, record and branch; what became of each stage but `code`."""
    outcomes = {}
    recipe = load_recipe(root, None)
    with open_workspace(root, recipe, choose(root, None)) as work:
        work.ledger.bring_data()
        for stage in work.ledger.stages():
            outcomes[stage.name] = work.ledger.take_up(stage.name)
            if outcomes[stage.name] is Outcome.CHANGED:
                stream(stage.command, work.root, lambda _: None)
                work.ledger.record(stage.name)
            work.commit(stage.name)
    del outcomes["code"]
    return outcomes


def planned(root: Path, *options: str) -> dict[str, Any]:
    before = (git_lines(root, "status", "--porcelain"), git_lines(root, "branch", "--list"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        done = CliRunner().invoke(app, ["plan", "--json", *options])
    assert done.exit_code == 0, done.output
    assert (git_lines(root, "status", "--porcelain"), git_lines(root, "branch", "--list")) == before
    assert not (root / ".pedigree/preview").exists()
    return json.loads(done.stdout)


def outcomes(told: dict[str, Any]) -> dict[str, str]:
    return {step["stage"]: step["outcome"] for step in told["stages"]}


def why(told: dict[str, Any], stage: str) -> list[str]:
    (step,) = (step for step in told["stages"] if step["stage"] == stage)
    return [f"{change['kind']}: {change['what']}" for change in step["changes"]]


def test_a_comment_changes_nothing(root):
    append(root / "components/core/storage.py", "\n# A remark.\n")
    assert outcomes(planned(root)) == dict.fromkeys(("curate", "pretrain", "adapt"), "unchanged")
    assert set(run(root).values()) == {Outcome.RESTORED}


def test_a_parameter_and_back(root):
    steps = load_recipe(root, None).pretrain.steps
    told = planned(root, "--set", f"pretrain.steps={steps + 1}")
    assert outcomes(told) == {"curate": "unchanged", "pretrain": "run", "adapt": "after"}
    assert why(told, "pretrain") == [f"parameter: pretrain.steps {steps} -> {steps + 1}"]
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["pretrain"]["steps"] = steps + 1
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    ran = {"curate": Outcome.RESTORED, "pretrain": Outcome.CHANGED, "adapt": Outcome.CHANGED}
    assert run(root) == ran
    told = planned(root, "--set", f"pretrain.steps={steps}")  # as the run before the last
    assert outcomes(told) == {"curate": "unchanged", "pretrain": "restored", "adapt": "restored"}
    assert why(told, "adapt") == ["data: models/pretrained has other bytes"]
    git_lines(root, "checkout", "--", "params.yaml")
    assert set(run(root).values()) == {Outcome.RESTORED}


def test_a_line_of_code_and_a_source_are_named(root, monkeypatch):
    append(root / KOLEO, "\nEPSILON = 1e-7\n")
    told = planned(root)
    assert outcomes(told) == {"curate": "unchanged", "pretrain": "run", "adapt": "run"}
    assert why(told, "pretrain") == why(told, "adapt") == [f"code: {KOLEO} changed"]
    add_source(root, "birds")
    told = planned(root)
    assert outcomes(told) == {"curate": "run", "pretrain": "run", "adapt": "run"}
    assert why(told, "curate") == ["data: data/pool/birds/ab12 new"]
    monkeypatch.chdir(root)
    table = CliRunner().invoke(app, ["plan"]).output
    assert f"pretrain  run  code: {KOLEO} changed; after curate" in " ".join(table.split(" ")).replace("   ", "  ")
    assert table.splitlines()[-1] == "3 run"
    (root / "data/pool/birds/ab12.dvc").unlink()


def test_what_a_killed_plan_left_is_cleared_and_data_that_is_elsewhere_is_named(root, monkeypatch):
    left = root / ".pedigree/preview"
    git_lines(root, "worktree", "add", "-q", "--detach", str(left), "HEAD")
    assert set(outcomes(planned(root)).values()) == {"unchanged"}
    (root / "data/pool/photos/lost.dvc").write_text(
        "outs:\n- md5: 00000000000000000000000000000000.dir\n  hash: md5\n  path: lost\n"
    )
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["plan"])
    (root / "data/pool/photos/lost.dvc").unlink()
    assert done.exit_code == 1
    assert "data/pool/photos/lost: its bytes are not in this machine's DVC cache; `dvc pull " in done.output


def test_an_acceptance_needs_a_stage_and_a_reason(root, monkeypatch):
    monkeypatch.chdir(root)
    for options, told in ((["--accept", "pretrain"], "needs a reason"), (["--reason", "x"], "name the stage too")):
        done = CliRunner().invoke(app, ["run", *options])
        assert (done.exit_code, told in done.output) == (2, True)


@pytest.mark.parametrize(
    ("stage", "setting", "told"),
    [
        ("adapt", {}, "--accept adapt: pretrain would make its inputs again; accept that too, or leave both"),
        (
            "pretrain",
            {"steps": 777},
            "--accept pretrain: more than its code differs from .*parameter: pretrain.steps",
        ),
        ("train", {}, "--accept train: no such stage; known: curate, pretrain, adapt"),
    ],
)
def test_what_cannot_be_accepted_is_refused_and_writes_nothing(root, storage, stage, setting, told):
    append(root / KOLEO, "\nEPSILON = 1e-6\n")
    recipe = load_recipe(root, None, [f"pretrain.{key}={value}" for key, value in setting.items()])
    events = AuditLog.from_environment().read(recipe.name)
    with pytest.raises(ConfigError, match=told):
        Acceptance([stage], "why").record(root, recipe, None)
    assert AuditLog.from_environment().read(recipe.name) == events


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_accepted_code_runs_nothing_and_is_on_record(root, storage, monkeypatch):
    name = "accepted"
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace("name: pedigree", f"name: {name}"))
    assert set(run(root).values()) == {Outcome.RESTORED}
    recipe = load_recipe(root, None)
    append(root / KOLEO, "\nEPSILON = 1e-5\n")
    acceptance = Acceptance.parse(["adapt", "pretrain"], "only a constant that nothing reads")
    with monkeypatch.context() as patch:  # killed between the event and the rest
        patch.setattr(Ledger, "adopt", killed)
        with pytest.raises(KeyboardInterrupt):
            acceptance.record(root, recipe, None)
    assert acceptance.record(root, recipe, None) == ["pretrain", "adapt"]
    entries = AuditLog.from_environment().read(name)
    assert [(e.action, e.details["stage"], e.details["reason"]) for e in entries] == [
        ("accept-code", stage, acceptance.reason) for stage in ("pretrain", "adapt")
    ]
    old, new = entries[0].details["files"][KOLEO]
    assert old != new
    assert set(run(root).values()) == {Outcome.RESTORED}
    newest = max((root / ".pedigree/runs").glob("*.lock")).with_suffix("")
    assert entries[0].details["code"] == file_md5(newest / list_of("pretrain"))
    assert acceptance.record(root, recipe, None) == []  # nothing is left to accept, and no event is written
    assert AuditLog.from_environment().read(name) == entries
