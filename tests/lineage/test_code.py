"""What a stage depends on is its code as parsed, over all that it can load; DVC keeps the lists fresh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from components.core.errors import InputError
from components.lineage.code import Code, list_of, read_list, write_lists
from components.lineage.ledger import Ledger, Outcome
from components.stages import STAGES
from tests.flows.repository import DVC, PROJECT, copy_of_project

MODULE = '''"""What it is."""
import os


def area(width: float, height: float = 2.0) -> float:
    """Of a rectangle."""
    return width * height  # in m2
'''


def package(root: Path, **files: str) -> Code:
    """A package `components` whose files are named with `__` for `/`, such as `core__a`."""
    for name, text in {"__init__": "", **files}.items():
        path = root / "components" / (name if name.startswith("__") else name.replace("__", "/", 1))
        path = path if "." in path.name else path.with_name(f"{path.name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Code(root)


def fingerprint(root: Path, text: str) -> str:
    return package(root, area=text).fingerprints(["components.area"])["components/area.py"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # in m2", ""),
        ('"""Of a rectangle."""', '"""Of any rectangle."""\n    # which has four corners'),
        ('    """Of a rectangle."""\n', ""),
        ('"""What it is."""', ""),
        ("width * height", "(width\n            * height)"),
        ("2.0", "2.00"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path, old, new):
    assert old in MODULE
    assert fingerprint(tmp_path, MODULE.replace(old, new)) == fingerprint(tmp_path, MODULE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width * height", "width + height"),
        ("2.0", "2"),
        ("2.0", "'2.0'"),
        ("2.0", "b'2.0'"),
        ("= 2.0", ""),
        ("return width", "width"),
        ("import os", "import os as o"),
        ("height: float", "*, height: float"),
        ("width * height", "f'{width}'"),
        ("width * height", "{**width}"),
    ],
)
def test_all_else_counts(tmp_path, old, new):
    assert old in MODULE
    assert fingerprint(tmp_path, MODULE.replace(old, new)) != fingerprint(tmp_path, MODULE)


def test_the_fingerprint_is_the_same_in_any_process_and_python(tmp_path):
    """Written down: a fingerprint that changes with Python or Pedigree makes every stage run again."""
    assert fingerprint(tmp_path, MODULE) == ("9eef218fddb1b85e508ddca5f87ae7b328e72dd070fd71730aa9bd030cef64a3")


def test_all_that_can_be_loaded_is_listed(tmp_path):
    code = package(
        tmp_path,
        a__stage="from ..b import one\nfrom . import near\nimport json\n",
        a__near="def f():\n    from components.b import two, CONSTANT\n",
        a__unused="",
        b____init__="from components.c.deep import x\n",
        b__one="import components.d\n",
        b__two="import importlib\n\nm = importlib.import_module('components.e.late')\n",
        c__deep="def g():\n    return open('words.txt'), 'components/f/path.py', 'components.g.named'\n",
        d="",
        e__late="",
        f__path="",
        g__named="from components.a.stage import *\n",
        **{"c__words.txt": "some words\n", "c__other.txt": ""},
    )
    found = Code(tmp_path).fingerprints(["components.a.stage"])
    listed = (
        "__init__",
        "a/near",
        "a/stage",
        "b/__init__",
        "b/one",
        "b/two",
        "c/deep",
        "d",
        "e/late",
        "f/path",
        "g/named",
    )
    assert list(found) == sorted([*(f"components/{name}.py" for name in listed), "components/c/words.txt"])
    (tmp_path / "components/c/words.txt").write_text("other words\n")
    after = Code(tmp_path).fingerprints(["components.a.stage"])
    assert [path for path in found if found[path] != after[path]] == ["components/c/words.txt"]
    assert set(code.fingerprints(["components.d"])) == {"components/__init__.py", "components/d.py"}


def test_a_name_that_only_a_running_program_knows_is_refused(tmp_path):
    code = package(tmp_path, a="from importlib import import_module\n\nimport_module('components.' + 'b')\n")
    with pytest.raises(InputError, match=r"components/a\.py, line 3: import_module takes a name .* as a literal"):
        code.fingerprints(["components.a"])


def test_what_is_no_python_is_named_in_one_line(tmp_path):
    own = {
        name.replace("/", "__"): PROJECT / f"components/{name}.py"
        for name in ("core/errors", "core/layout", "core/locks", "core/storage", "lineage/code", "stages")
    }
    package(tmp_path, __main__="x = 1\ndef f(:\n", **{name: path.read_text() for name, path in own.items()})
    done = subprocess.run(
        [sys.executable, "-m", "components.lineage.code"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: components/__main__.py, line 2: no valid Python: invalid syntax\n"
    assert not (tmp_path / "reports").exists()


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The lists of this project as it is now."""
    root = tmp_path_factory.mktemp("lists")
    (root / "components").symlink_to(PROJECT / "components")
    write_lists(root)
    return {stage: read_list((root / list_of(stage)).read_text()) for stage in STAGES}


def test_who_depends_on_what_in_this_project(lists):
    def users(path: str) -> set[str]:
        assert (PROJECT / path).is_file()
        return {stage for stage in STAGES if path in lists[stage]}

    trainings = {"pretrain", "adapt", "distill"}
    assert users("components/objective/koleo.py") == trainings
    assert users("components/training/loop.py") == users("components/lineage/streaming.py") == trainings
    assert users("components/curation/select.py") == {"embed", "curate"}
    assert users("components/evaluation/scores.py") == {"evaluate"}
    assert users("components/evaluation/comparison.html") == {"evaluate"}  # a template is given by its path too
    pages = {"embed", "curate", "evaluate", "register"}
    assert users("components/core/page.html") == users("components/core/macros.html") == pages
    assert users("components/registry/passport.html") == {"register"}
    assert users("components/registry/pyfunc_model.py") == {"register"}  # which MLflow is given by its path
    assert users("components/cli.py") == users("components/core/storage.py") == set(STAGES)
    assert users("components/lineage/ledger.py") == users("components/data/sample_pool.py") == set()
    for stage in STAGES:
        package_of = STAGES[stage][0].split(".")[1]
        defaults = "model" if stage == "register" else package_of  # `recipe` has them from there
        assert f"components/{defaults}/config.py" in lists[stage]


def unlisted(loaded: Iterable[str], listed: Iterable[str], root: Path) -> set[str]:
    """The loaded modules whose files are not listed, save what `recipe` loads: every stage's parameters."""
    files = {_file(name, root) for name in loaded}
    return files - set(listed) - {_file(name, root) for name in loaded_by("components.recipe")}


def _file(name: str, root: Path) -> str:
    path = name.replace(".", "/")
    return f"{path}/__init__.py" if (root / path).is_dir() else f"{path}.py"


@cache
def loaded_by(*modules: str) -> frozenset[str]:
    code = f"import sys, {', '.join(modules)}; print(*[n for n in sys.modules if n.partition('.')[0] == 'components'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def work_through(ledger: Ledger) -> list[str]:
    """Take up every stage of this project; which had to run: `code` does, of the others outputs are made up."""
    ran = []
    for stage in ledger.stages():
        if ledger.take_up(stage.name) is Outcome.UNCHANGED:
            continue
        ran.append(stage.name)
        if stage.name == "code":
            subprocess.run([sys.executable, *stage.command.split()[1:]], cwd=ledger.root, check=True)
        for number, name in enumerate(stage.outputs if stage.name != "code" else ()):
            path = ledger.root / name
            inside = "small/model.safetensors" if name == "models/students" else "model.safetensors"
            path = path if path.suffix else path / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{stage.name} {number} after {(ledger.root / list_of(stage.name)).read_text()}")
        ledger.record(stage.name)
    return ran


def test_a_comment_runs_nothing_and_a_line_what_follows_it(tmp_path):
    """The real `dvc.yaml` and code, at the level of the ledger, and `dvc repro` as an auditor types it."""
    root = copy_of_project(tmp_path / "project")
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    for name in ("pool", "evaluation"):
        (root / "data" / name / "photos").mkdir(parents=True)
        (root / "data" / name / "photos/shard").write_text(name)
    ledger = Ledger(root)
    assert len(work_through(ledger)) == len(STAGES) + 2  # `code`, and two models to evaluate
    append(root / "components/core/storage.py", "\n\n# A remark.\n")
    repro = subprocess.run([DVC, "repro"], cwd=root, capture_output=True, text=True, check=False)
    assert repro.returncode == 0, repro.stderr
    assert "Running stage 'code'" in repro.stdout
    assert repro.stdout.count("Running") == 1
    assert repro.stdout.count("didn't change, skipping") == len(STAGES) + 1
    append(root / "components/objective/koleo.py", "\nEPSILON = 1e-7\n")
    followers = ["adapt", "code", "distill", "evaluate@small", "evaluate@teacher", "pretrain", "register"]
    assert sorted(work_through(ledger)) == followers
    listed = (root / list_of("pretrain")).read_text()
    (root / list_of("pretrain")).write_text("by hand\n")  # DVC sees that it is not what `code` wrote
    assert ledger.take_up("code") is Outcome.RESTORED
    assert (root / list_of("pretrain")).read_text() == listed
