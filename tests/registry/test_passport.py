"""The passport: one page, complete in itself; and what a version differs from another in, over real git commits."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from components.lineage.audit_log import Entry
from components.lineage.lock_file import Record
from components.lineage.provenance import Tag
from components.registry.differences import Differences, Images, Side, differences
from components.registry.making import parameters, read_trainings
from components.registry.passport import render_passport
from tests.flows.repository import IDENTITY, git_lines
from tests.registry.made_up import review

STAGES = {
    "curate": {"cmd": "c", "outs": [{"path": "data/curated", "md5": "1.dir"}]},
    "pretrain": {
        "cmd": "p",
        "deps": [{"path": "data/curated", "md5": "1.dir"}, {"path": "reports/code/pretrain.txt", "md5": "2"}],
        "outs": [{"path": "models/pretrained", "md5": "3.dir"}],
    },
    "adapt": {
        "cmd": "a",
        "deps": [{"path": "models/pretrained", "md5": "3.dir"}],
        "outs": [{"path": "models/adapted", "md5": "4.dir"}],
    },
    "distill": {
        "cmd": "d",
        "deps": [{"path": "data/curated", "md5": "1.dir"}, {"path": "models/adapted", "md5": "4.dir"}],
        "outs": [{"path": "models/students", "md5": "5.dir"}],
    },
}
SMALL = {Tag.WEIGHTS_PATH: "models/students/small"}


def write_run(root: Path, pretrain_steps: int, code: str, **distill: object) -> str:
    """Commit a run's parameters, record and lists of code; returns the commit."""
    students = {"small": {"dim": 64}, "other": {"dim": 8}}
    params = {
        "seed": 0,
        "pretrain": {"batch_size": 32, "steps": pretrain_steps},
        "distill": {"students": students, **distill},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": STAGES}))
    for stage in STAGES:
        path = root / "reports/code" / f"{stage}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"components/a.py 1\ncomponents/{stage}.py {code}\n")
    git_lines(root, "add", "-A")
    git_lines(root, *IDENTITY, "commit", "-q", "-m", "A run")
    return git_lines(root, "rev-parse", "HEAD")[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    git_lines(tmp_path, "init", "-q", "-b", "main")
    return tmp_path


def manifest(*images: tuple[str, str]) -> pa.Table:
    return pa.table(
        {"image_id": [i for i, _ in images], "source": [s for _, s in images], "license": ["CC0-1.0"] * len(images)}
    )


def test_parameters_are_those_of_the_stages_that_made_the_weights_steps_first(root: Path):
    write_run(root, 800, "1", steps=300)
    found = parameters(Record(root), "models/students/small")
    assert list(found)[:2] == ["distill.steps", "pretrain.steps"]
    assert (found["distill.students.small.dim"], found["seed"]) == (64, 0)
    assert not [name for name in found if "other" in name]
    assert parameters(Record(root), "models/adapted") == {"pretrain.steps": 800, "pretrain.batch_size": 32, "seed": 0}
    write_run(root, 800, "1", teacher_weights="models:/big/3")  # this run's teacher has not taught it
    assert "pretrain.steps" not in parameters(Record(root), "models/students/small")


def test_differences_of_two_runs(root: Path):
    first = write_run(root, 800, "1")
    second = write_run(root, 20, "2", steps=300)
    before = Side(SMALL, Record(root, first), manifest(("a", "photos"), ("b", "photos"), ("c", "web")))
    now = Side(SMALL, Record(root, second), manifest(("a", "photos"), ("d", "photos"), ("e", "photos")))
    assert differences(now, before, root) == Differences(
        parameters=[("distill.steps", "not given", "300"), ("pretrain.steps", "800", "20")],
        code=[(f"components/{stage}.py", "changed", stage) for stage in sorted(STAGES)],
        images=[Images("photos", "CC0-1.0", 2, 2, 1, 3), Images("web", "CC0-1.0", 1, 0, 1, 0)],
    )
    same = differences(now, now, root)
    assert (same.parameters, same.code) == ([], [])
    assert same.images == [Images("photos", "CC0-1.0", 3, 0, 0, 3)]


def test_what_is_out_of_reach_is_told_in_its_place(root: Path):
    now = Side(SMALL, Record(root, write_run(root, 800, "1")), manifest(("a", "photos")))
    elsewhere = {**SMALL, Tag.COMMIT: "d" * 40, Tag.BRANCH: "runs/x", Tag.LOCK_SHA256: "1"}
    found = differences(now, Side.registered(elsewhere, root), root)
    assert found.parameters == found.code
    assert (
        found.code
        == f"Not compared: commit {'d' * 12} with its dvc.lock is not in this clone; fetch the branch runs/x."
    )
    assert found.images == "Not compared: the version names no training set."
    page = render_passport(review(beside="tiny-candidates/1"), found, []).decode()
    assert page.count("is not in this clone; fetch the branch runs/x.</p>") == 2
    (root / "reports/code/adapt.txt").unlink()
    found = differences(Side(SMALL, Record(root)), now, root)
    assert found.code == "Not compared: the workspace has no reports/code/adapt.txt, which names the code of a stage."


def test_trainings_have_their_length_costs_and_curve(root: Path):
    write_run(root, 800, "1")
    assert read_trainings(root, "models/adapted") == ()
    folder = root / "reports/distill"
    (folder / "students/small").mkdir(parents=True)
    (folder / "result.json").write_text('{"small": {"steps": 900, "images_seen": 28800}}')
    rows = "".join(f"{step},{1000 - step},0.5,\n" for step in range(1, 901))
    (folder / "students/small/loss.csv").write_text(f"step,loss_total,hours,energy_kwh\n{rows}")
    (found,) = read_trainings(root, "models/students/small")
    assert (found.stage, found.steps, found.images_seen, found.loss) == ("distill", 900, 28800, 100)
    assert (found.hours, found.energy_kwh, found.gpu_hours) == (0.5, None, None)
    assert (len(found.curve), found.curve[0], found.curve[-1]) == (200, (1, 999), (900, 100))


def test_the_page_says_it_all_and_needs_no_network():
    entry = Entry(
        name="tiny", sequence=2, previous="0", time="2026-01-02T03:04:05.678+00:00", actor="Bob", action="reject",
        subject="tiny-candidates/4", details={"reason": "fails at night"}, hash="1",
    )  # fmt: skip
    differing = Differences([("pretrain.steps", "800", "20")], [], [Images("photos", "CC0-1.0", 2, 1, 0, 3)])
    page = render_passport(review("tiny/3", "tiny/3", version="tiny-candidates/4"), differing, [entry]).decode()
    assert not re.search(r"https?:|@import|<link|<script|url\(", page)
    verdict = '<b class="good">Passes 10 of 11 gates, 1 at the decision.</b> It is shown beside the champion, tiny/3.'
    assert verdict in page
    assert page.index(verdict) < page.index("What it is for, and its limits") < page.index("<h2>Gates</h2>")
    assert "0.794<small>difference +0.010 (-0.030 to +0.050)</small>" in page
    assert "linear_c" not in page
    assert "<td>pretrain.steps</td><td>800</td><td>20</td>" in page
    assert "The same code." in page
    assert '<td class="n">2</td><td class="n">1</td><td class="n">0</td><td class="n">3</td>' in page
    assert "<td>2026-01-02 03:04 UTC</td><td>Bob</td><td>reject tiny-candidates/4</td><td>fails at night</td>" in page
    assert "&lt;photos&gt;" in page
    assert "load_model(&#34;models:/tiny-candidates/4&#34;)" in page
    assert "3" * 64 in page


def test_a_page_without_reports_says_that_there_were_none():
    made = review().making.model_copy(update={"trainings": (), "curation": type(review().making.curation)()})
    page = render_passport(review(making=made), None, []).decode()
    assert "No report of a training was in the workspace." in page
    assert "No report of curation was in the workspace." in page
    assert "Nobody has decided on it yet." in page
    assert "What differs from" not in page
