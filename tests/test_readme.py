"""README is true: its commands exist, parse and run here or in the test that is named; its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:sh|console)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines() if line.strip()]
# Long commands: how they begin, the file (or folder of tests) that runs them, and what stands there.
RUN_ELSEWHERE = (
    ("make run", "tests/flows", r'"run"'),
    ("make test", ".ci/run", r"make test"),
    ("pedigree runs", "tests/flows/test_runs_command.py", r'"runs"'),
    ("pedigree gc", "tests/flows/test_gc_command.py", r'"--dry-run"'),
    ("pedigree run", "tests/flows", r'"run"'),
    ("pedigree plan", "tests/flows/test_plan.py", r'\["plan"'),
    ("pedigree promote", "tests/registry/test_promote.py", r'\["promote".*"--reason"'),
    ("pedigree review", "tests/registry/test_promote.py", r'\["review"'),
    ("pedigree reject", "tests/registry/test_promote.py", r'\["reject"'),
    ("pedigree rollback", "tests/registry/test_promote.py", r'\["rollback"'),
    ("pedigree history", "tests/registry/test_promote.py", r'\["history".*"--at"'),
    ("pedigree trace", "tests/lineage/test_trace.py", r"invoke\(.*--json"),
    ("pedigree verify", "tests/registry/test_released.py", r'by_command\(.*"--json"'),
    ("pedigree documents", "tests/registry/test_documents.py", r'command\("documents"\)'),
    ("pedigree reproduce", "tests/flows/test_reproduce.py", r'RUN, "--stage"'),
    ("pedigree audit log", "tests/flows/test_audit_command.py", r'audit\("log".*"--since"'),
    ("pedigree audit verify", "tests/flows/test_audit_command.py", r'audit\("verify"'),
    ("pedigree audit export", "tests/flows/test_audit_command.py", r'audit\("export", "--out"'),
    ("pedigree seen", "tests/lineage/test_seen.py", r'"--image"'),
    ("pedigree diff", "tests/lineage/test_where_used.py", r'"diff", ONE, TWO, "--html"'),
    ("pedigree where-used", "tests/lineage/test_where_used.py", r'"where-used"'),
    ("pedigree takedown", "tests/flows/test_takedown.py", r'takedown\("--image"'),
    ("pedigree sources list", "tests/flows/test_sources.py", r'"sources", "list"'),
    ("pedigree sources remove", "tests/flows/test_sources.py", r'"sources", "remove"'),
    ("pedigree ingest", "tests/flows/test_ingest_command.py", r'"ingest"'),
    ("pedigree train-status", "tests/flows/test_train_status.py", r"train.status"),
    ("pedigree doctor", "tests/flows/test_doctor.py", r'"doctor"'),
    ("pedigree curate", "tests/flows/test_curate_command.py", r'"--explain"'),
    ("pedigree evaluate", "tests/flows/test_evaluate_command.py", r'\["evaluate"'),
    ("pedigree evalset", "tests/flows/test_evalset_command.py", r'"evalset"'),
    ("pedigree embed", "tests/evaluation/test_folder_features.py", r'"embed", "weights"'),
    ("pedigree export", "tests/registry/test_exports.py", r'"export", "weights"'),
    ("mlflow models serve --model-uri", "tests/registry/test_serving.py", r"SERVE\.replace"),
    ('echo "{', "tests/registry/test_serving.py", r"ASK\.replace"),
    ("pedigree up", "tests/infra/test_local_stack.py", r'"up"'),
    ("pedigree status", "tests/infra/test_local_stack.py", r'"status"'),
    ("pedigree down", "tests/infra/test_local_stack.py", r'"down"'),
    ('eval "$(pedigree env)"', "tests/infra/test_local_stack.py", r'"env"'),
    ("prefect deploy --all", "tests/infra/test_local_stack.py", r"deploying the flows"),
    ("python -m infra.automations", "tests/infra/test_duties.py", r"automations"),  # `up` runs it with prefect.yaml
    ("prefect work-pool create", "tests/infra/test_duties.py", r'"work-pool", "create"'),
    ("prefect worker start", "infra/local/services.py", r'"worker", "start"'),
    ("dvc pull", "tests/flows", r'"pull"'),
    ("dvc repro", "tests/lineage/test_trace.py", r'"repro"'),
)
QUICK = ("dvc dag", "dvc status", "dvc metrics show", "dvc params diff", "git ")
SHELL = ("cd ", ". .venv/bin/activate", "export PIP_EXTRA_INDEX_URL=")


def starting(word: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(word)]


def execute(arguments: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def test_the_blocks_are_found():
    assert len(BLOCKS) >= 8
    assert len(COMMANDS) >= 25


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_by_a_test(command):
    if command.startswith((*QUICK, *SHELL)):
        return  # below
    covering = [(file, what) for start, file, what in RUN_ELSEWHERE if command.startswith(start)]
    assert covering, f"no test runs {command!r}"
    for file, what in covering:
        path = ROOT / file
        texts = [p.read_text() for p in (path.glob("test_*.py") if path.is_dir() else [path])]
        assert any(re.search(what, text) for text in texts), f"{file} does not run {command!r}"


@pytest.mark.parametrize("name", [None, *typer.main.get_command(app).commands])
def test_help_of_every_command(name):
    result = CliRunner().invoke(app, [*([name] if name else []), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [c for c in starting("pedigree ") if c != "pedigree env"])
def test_arguments_of_pedigree_are_understood(command):
    name, *arguments = shlex.split(command)[1:]
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_every_pedigree_command_and_option_in_the_text_exists():
    commands = typer.main.get_command(app).commands
    named = set(re.findall(r"\bpedigree ([a-z][a-z-]*)", "\n".join(re.findall(r"`([^`\n]+)`", TEXT)) + "".join(BLOCKS)))
    assert named >= {"run", "ingest", "promote", "trace", "up", "status", "down", "env"}
    assert named <= set(commands)
    options = {
        option for command in commands.values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    spoken = set(re.findall(r"`(--[a-z-]+)[^`]*`", TEXT))
    assert "--set" in spoken
    assert spoken <= options


@pytest.mark.parametrize("command", starting("make "))
def test_make_knows_what_to_do(command):
    done = execute(["make", "-n", *shlex.split(command)[1:]])
    assert done.returncode == 0, done.stderr
    target = {"run": "pedigree run", "test": "pytest"}[shlex.split(command)[1]]
    assert f".venv/bin/{target}" in done.stdout
    for variable in re.findall(r"(IMAGES|RECIPE)=\S+", command):
        assert f'--{variable.lower()} "${variable}"' in done.stdout


@pytest.mark.parametrize("given_by", ["argument", "environment"])
def test_make_run_passes_a_folder_on_as_it_is_named(tmp_path, monkeypatch, given_by):
    folder = 'it\'s `touch ran` $x $(shell touch ran) "q" #1'
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / ".venv/bin/pedigree"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    for name in ("requirements.lock", "pyproject.toml", ".venv/.ready"):  # the newest last: it is installed
        (tmp_path / name).touch()
    given = {"IMAGES": folder, "RECIPE": "tiny-cpu"}
    if given_by == "environment":
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        given = {}
    done = execute(["make", "--silent", "run", *(f"{name}={value}" for name, value in given.items())], tmp_path)
    assert done.stdout.splitlines() == ["run", "--images", folder, "--recipe", "tiny-cpu"], done.stderr
    assert not (tmp_path / "ran").exists()
    for name in ("IMAGES", "RECIPE"):
        monkeypatch.delenv(name, raising=False)
    assert execute(["make", "--silent", "run"], tmp_path).stdout == "run\n"


def test_the_auditors_commands_work_in_a_clone(tmp_path):
    clone, placeholders = tmp_path / "clone", {"<run-id>": "1", "<other-id>": "2"}
    assert execute(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)]).returncode == 0
    for number in placeholders.values():
        kept = [
            "git",
            "worktree",
            "add",
            "-b",
            f"runs/{number}",
            str(tmp_path / number),
        ]  # as where it ran
        assert execute(kept, clone).returncode == 0
    folder = clone
    for command in next(block for block in BLOCKS if "git worktree add" in block).splitlines():
        for placeholder, value in placeholders.items():
            command = command.replace(placeholder, value)  # noqa: PLW2901
        program, *arguments = shlex.split(command)
        if program == "cd":
            folder = (folder / arguments[0]).resolve()
        elif command.startswith(QUICK):
            done = execute([str(BIN / "dvc") if program == "dvc" else program, *arguments], folder)
            assert done.returncode == 0, f"{command}: {done.stderr}"
    assert folder == tmp_path / "audit"


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_what_the_text_names_is_there():
    for name in re.findall(r"`(retrain|ingest)/([a-z-]+)`", TEXT):
        assert f"- name: {name[1]}\n    entrypoint: flows/{name[0]}.py:" in (ROOT / "prefect.yaml").read_text()
    for variable in set(re.findall(r"`(PEDIGREE_[A-Z_]+|MLFLOW_TRACKING_URI|PREFECT_API_URL)`", TEXT)):
        assert any(variable in path.read_text() for path in (ROOT / "infra").rglob("*.py"))
