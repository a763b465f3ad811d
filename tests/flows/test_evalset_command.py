"""`pedigree evalset`: a folder becomes a tracked set, wrong ones are refused with all their faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from components.core.layout import RELATIVE
from flows.cli import app
from tests.data import evalset_folders as folders
from tests.data.evalset_folders import halves, judge_by_facts_only, mask, write
from tests.flows.repository import git_lines, make_repository


def evalset(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evalset", *map(str, arguments)])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    write(root, {"dvc.yaml": "stages: {}\n"})
    monkeypatch.chdir(root)
    judge_by_facts_only(monkeypatch)
    return root


def test_a_folder_is_checked_without_services(checkout: Path, tmp_path: Path) -> None:
    folder = folders.segmentation(tmp_path / "in")
    done = evalset("check", folder)
    assert done.exit_code == 0, done.output
    assert "right; segmentation: 2 train, 2 test images, 2 classes, 4 targets" in done.stdout
    found = json.loads(evalset("check", folder, "--json").stdout)
    assert (found["task"], found["images"], found["rows"]) == ("segmentation", {"train": 2, "test": 2}, {"targets": 4})
    assert not list(checkout.rglob("*.parquet"))


def test_a_wrong_folder_ends_with_2_and_a_line_for_each_fault(checkout: Path, tmp_path: Path) -> None:
    folder = write(folders.segmentation(tmp_path / "in"), {"targets/test/1.png": mask(halves(7))})
    (folder / "targets/test/0.png").unlink()
    done = evalset("check", folder)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1] for line in lines] == [" targets_there", " mask_values", " all checks"]
    done = evalset("check", "leaves")
    assert done.exit_code == 2
    assert done.stderr == "error: leaves: no such folder, and no evaluation set; known: none\n"


def test_the_list_has_sets_of_all_tasks_and_those_whose_data_is_elsewhere(checkout: Path) -> None:
    assert "no evaluation sets" in evalset("list").stdout
    for make in (folders.classification, folders.depth):
        folder = make(checkout / "in" / make.__name__)
        request = folders.request(folder, make.__name__).model_copy(update={"evaluation": RELATIVE.evaluation})
        folders.add_evalset(request)
    write(checkout, {"data/evaluation/gone/0123456789ab.dvc": "outs: [{md5: a.dir, path: 0123456789ab}]\n"})
    rows = {row["name"]: row for row in json.loads(evalset("list", "--json").stdout)["evalsets"]}
    row = rows["classification"]
    assert (row["images"], row["classes"], row["groups"]) == ({"train": 4, "test": 4}, 2, ["light"])
    assert (row["metric"], row["license"]) == ("knn_top1", "CC0-1.0")
    assert row["snapshot"] == f"data/evaluation/classification/{row['version']}"
    assert (rows["depth"]["task"], rows["gone"]["task"]) == ("depth", None)
    assert "dvc pull data/evaluation/gone/0123456789ab.dvc" in evalset("list").stdout
    assert evalset("check", "depth").exit_code == 0
    assert "`dvc pull data/evaluation/gone/*.dvc`" in evalset("check", "gone").stderr


@pytest.mark.stack
def test_a_set_is_tracked_and_replaced_by_its_next_version(stack, tmp_path, monkeypatch):
    root = make_repository(tmp_path)
    monkeypatch.chdir(root)
    judge_by_facts_only(monkeypatch)
    folder = folders.segmentation(tmp_path / "in")
    first = evalset("add", folder, "--name", "leaves", "--json")
    assert first.exit_code == 0, first.output
    made = json.loads(first.stdout)
    assert (made["new"], made["images"], made["snapshot"]) == (
        True, {"train": 2, "test": 2}, f"data/evaluation/leaves/{made['version']}",
    )  # fmt: skip
    assert Path(f"{made['snapshot']}.dvc").exists()

    write(folder, {"targets/test/1.png": mask(halves(1))})
    refused = evalset("add", folder, "--name", "leaves")
    assert refused.exit_code == 2
    assert f"version {made['version']} is there" in refused.stderr
    done = evalset("add", folder, "--name", "leaves", "--replace")
    assert done.exit_code == 0, done.output
    rows = json.loads(evalset("list", "--json").stdout)["evalsets"]
    assert [row["name"] for row in rows] == ["leaves"]
    assert rows[0]["version"] != made["version"]
    names = {path.name.partition(".")[0] for path in Path("data/evaluation/leaves").glob("[!.]*")}
    assert names == {rows[0]["version"]}
    assert git_lines(root, "status", "--porcelain", "--untracked-files=all", "data/evaluation")
    assert "a source of the pool has this name" in evalset("add", folder, "--name", "photos").stderr


def test_the_samples_sets_are_folders_that_add_takes(tmp_path: Path):
    done = evalset("sample", "--out", tmp_path / "sets", "--json")
    assert done.exit_code == 0, done.output
    names = [Path(folder).name for folder in json.loads(done.stdout)["folders"]]
    assert names == ["classification", "depth", "retrieval", "segmentation"]
    assert all((tmp_path / "sets" / name / "evalset.yaml").is_file() for name in names)
    again = evalset("sample", "--out", tmp_path / "sets")
    assert again.exit_code == 2
    assert "sets: is there already" in again.output.replace("\n", "")
