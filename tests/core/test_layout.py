"""The layout names what `dvc.yaml` names, and nothing else spells its places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from components.core.layout import RELATIVE

PROJECT = Path(__file__).parents[2]
OWNER = PROJECT / "components/core/layout.py"
SPELLED = re.compile(r"(\.pedigree|\.dvc|data|models|reports)(/\S*)?|dvc\.(yaml|lock)|params\.yaml")
SUFFIX = ".dvc"  # of the files by which DVC tracks data, too


def named(part: dict) -> Iterator[str]:
    """Paths of a stage of `dvc.yaml`, with KEY for the item of a `foreach`."""
    for kind in ("deps", "outs", "metrics", "plots"):
        for entry in part.get(kind, ()):
            yield (entry if isinstance(entry, str) else next(iter(entry))).replace("${key}", "KEY")


def test_dvc_yaml_names_the_data_and_models_of_the_layout_and_no_others():
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    found = {path for stage in stages.values() for path in named(stage.get("do", stage))}
    found.discard(str(RELATIVE.students / "KEY"))  # where each student is a stage of its own
    weights = RELATIVE.weights("pretrained"), RELATIVE.weights("adapted"), RELATIVE.students
    data = RELATIVE.pool, RELATIVE.evaluation, RELATIVE.embeddings, RELATIVE.curated
    tops = tuple(f"{top}/" for top in (RELATIVE.data, RELATIVE.models))
    assert {path for path in found if path.startswith(tops)} == {str(path) for path in (*data, *weights)}


def test_each_stage_of_dvc_yaml_writes_its_report_and_figures_where_the_layout_says():
    for stage, entry in yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"].items():
        item, part = ("KEY", entry["do"]) if "do" in entry else (None, entry)
        own = {path for path in named({**part, "deps": []}) if path.startswith(f"{RELATIVE.reports}/")}
        if stage == "code":
            assert {str(Path(path).parent) for path in own} == {str(RELATIVE.code_lists)}
            continue
        assert str(RELATIVE.result(stage, item)) in own
        assert {str(Path(path).parent) for path in own} == {str(RELATIVE.report(stage, item))}
        assert str(RELATIVE.code_lists / f"{stage}.txt") in part["deps"]


def test_git_and_dvc_leave_the_state_alone():
    for name in (".gitignore", ".dvcignore"):
        assert {str(RELATIVE.state), f"{RELATIVE.state}/", f"/{RELATIVE.state}"} & {
            *(PROJECT / name).read_text().split()
        }


def spelled(path: Path) -> Iterator[str]:
    """String constants of a module that name a place of the layout; docstrings and sentences do not count."""
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str) and SPELLED.fullmatch(node.value)):
            continue
        joined = (
            isinstance(parents[node], ast.BinOp) or getattr(getattr(parents[node], "func", None), "id", "") == "Path"
        )
        if node.value != SUFFIX and (joined or re.search(r"[/.]", node.value)):
            yield f"{path.relative_to(PROJECT)}:{node.lineno}: {node.value}"


def test_no_other_module_spells_a_place_of_the_layout():
    files = [
        path for top in ("flows", "components", "infra") for path in (PROJECT / top).rglob("*.py") if path != OWNER
    ]
    assert [line for path in files for line in spelled(path)] == []
    assert len(list(spelled(OWNER))) >= 4  # it does find them
