"""The front door: every mistake is one clear line and an exit code, and nothing is started or written for it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.storage import StorageError
from components.recipe import recipe_names
from flows.cli import _Plain, app
from flows.commands.closing import closing
from flows.commands.run import _check_folder
from flows.retrain import RunResult
from tests.flows.repository import IDENTITY, PROJECT, git_lines, pedigree, pedigree_command

DECISIONS = ("review", "promote", "reject", "rollback", "history")
WITH_EXAMPLES = ("run", "plan", "ingest", *DECISIONS, "trace", "verify", "curate", "train-status")
COMMANDS = (*WITH_EXAMPLES, "up", "status", "down", "env")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that `pedigree` takes for a checkout; the installed code runs in it."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(PROJECT / name, root / name)
    git_lines(root, "init", "-q")
    git_lines(root, *IDENTITY, "commit", "-q", "--allow-empty", "-m", "start")
    return root


@pytest.fixture
def images(tmp_path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(path / "red.png")
    return path


@pytest.fixture(autouse=True)
def _no_services(monkeypatch):
    """Whatever stack the test run has started does not exist for these tests."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "PREFECT_", "PEDIGREE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "dumb")


def refused(folder: Path, *arguments: str, code: int = 2, env: dict[str, str] | None = None) -> str:
    """The one line on stderr of a command that must fail at once and leave the folder as it was."""
    before = sorted(folder.rglob("*"))
    done = pedigree(folder, *arguments, env=env, seconds=60)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.stderr


def refused_here(folder: Path, *arguments: str, code: int = 2, env: dict[str, str] | None = None) -> str:
    """As `refused`, but in this process: seconds less for each variant of what `refused` has shown once."""
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, env or {}):
        patch.chdir(folder)
        done = CliRunner().invoke(app, list(arguments))
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.stderr


def test_images_that_are_no_folder_of_images(folder, images, tmp_path):
    empty = tmp_path / "empty"
    (empty / "deeper").mkdir(parents=True)
    assert "holds no files; give a folder of images" in refused(folder, "run", "--images", str(empty))
    assert "does not exist" in refused_here(folder, "run", "--images", str(tmp_path / "nowhere"))
    assert "is a file; give the folder" in refused_here(folder, "run", "--images", str(images / "red.png"))


def test_images_behind_links_are_images_and_folders_that_cannot_be_read_are_named(images, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "red").symlink_to(images)
    _check_folder(tmp_path / "links")
    (tmp_path / "links" / "red").unlink()
    deep = tmp_path / "links"
    while len(str(deep)) < 4096:  # longer than a path may be, so that even root cannot list it
        deep /= "d" * 200
    made = os.open(tmp_path / "links", os.O_RDONLY)
    for name in deep.relative_to(tmp_path / "links").parts:
        os.mkdir(name, dir_fd=made)
        inner = os.open(name, os.O_RDONLY, dir_fd=made)
        os.close(made)
        made = inner
    os.close(made)
    with pytest.raises(ConfigError, match=r"IMAGES: 1 folders cannot be read, such as .*: File name too long; make"):
        _check_folder(tmp_path / "links")


def test_an_unknown_recipe_names_the_known_ones(folder):
    said = refused(folder, "run", "--recipe", "huge")
    assert said == f"error: unknown recipe 'huge'; known recipes: {', '.join(recipe_names())}\n"
    assert "tiny-cpu" in said


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("distill.stepps=5", "distill.stepps: unknown key; did you mean 'steps'?"),
        ("pretrain.optimizer.base_lr=-0.1", "base_lr: Input should be greater than 0 (given: -0.1)"),
        ("pretrain.steps", "expected KEY=VALUE, for example pretrain.steps=100"),
        ("evalate.batch_size=6", "evalate: unknown key; did you mean 'evaluate'?"),
        ("evaluate.batchsize=6", "evaluate.batchsize: unknown key; did you mean 'batch_size'?"),
        ("embed.embedder.size=1", "unknown key; known keys: kind"),
        ("curate.levels=[{num_clusters: 3, resamplin: 2}]", "unknown key; did you mean 'resampling_steps'?"),
    ],
)
def test_a_parameter_that_cannot_be(folder, setting, told):
    assert told in refused_here(folder, "run", "--set", setting)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "ray"], "--engine ray needs the cluster's --address HOST:PORT, or RAY_ADDRESS"),
        (["--address", "10.0.0.7:6379"], "--address 10.0.0.7:6379 is for --engine ray, but the engine is not given"),
    ],
)
def test_an_engine_that_cannot_be(folder, options, told):
    assert told in refused_here(folder, "run", *options, env={"RAY_ADDRESS": ""})


@pytest.mark.parametrize(
    ("address", "told"),
    [("head", "expected HOST:PORT of a Ray cluster"), ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9")],
)
def test_a_cluster_that_cannot_be_is_told_before_anything_starts(folder, address, told):
    assert told in refused_here(folder, "run", "--engine", "ray", "--address", address, code=1)


def test_two_wrong_parameters_are_a_line_each(folder):
    done = pedigree(folder, "run", "--set", "seed=-1", "--set", "distill.steps=0")
    assert done.returncode == 2
    assert [line.startswith("error: params.yaml: ") for line in done.stderr.splitlines()] == [True, True]


@pytest.mark.parametrize(
    "command", ["run", "ingest photos --name photos --license CC0-1.0", "up", "status", "down", "env", "trace a@b"]
)
def test_a_folder_that_is_no_checkout(tmp_path, command):
    assert "no dvc.yaml in" in refused_here(tmp_path, *command.split())


def test_a_checkout_without_git_or_commit(folder, images):
    shutil.rmtree(folder / ".git")
    for command in (["run"], ["ingest", str(images), "--name", "photos", "--license", "CC0-1.0"]):
        assert "is not a git repository, and a run is a commit" in refused_here(folder, *command, code=1)
    git_lines(folder, "init", "-q")
    assert "has no commit yet" in refused_here(folder, "run", code=1)


def test_a_source_that_is_not_there(folder, tmp_path):
    where = str(tmp_path / "nowhere")
    assert f"{where}: no such file or folder" in refused(
        folder, "ingest", where, "--name", "photos", "--license", "CC0-1.0"
    )


@pytest.mark.parametrize("missing", ["--license", "--name"])
def test_ingest_needs_a_name_and_a_license(folder, images, missing, monkeypatch):
    monkeypatch.chdir(folder)
    given = {"--license": "CC0-1.0", "--name": "photos"}
    del given[missing]
    done = CliRunner().invoke(app, ["ingest", str(images), *(part for pair in given.items() for part in pair)])
    assert done.exit_code == 2
    assert f"Missing option '{missing}'" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not (folder / ".pedigree").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--license", " "], "license: must not be blank"),
        (["--license", "CC0-1.0", "--holdout", "1.5"], "holdout: "),
        (["--license", "CC0-1.0", "--holdout", "0.2", "--evaluation"], "holdout is for a pool"),
    ],
)
def test_ingest_options_that_cannot_be(folder, images, options, told):
    assert told in refused_here(folder, "ingest", str(images), "--name", "photos", *options)


def test_a_part_of_a_teams_services_is_refused(folder):
    env = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    said = refused(folder, "run", code=1, env=env)
    assert "MLFLOW_TRACKING_URI set, but not PREFECT_API_URL" in said
    for command in (["promote", "demo@latest", "--reason", "x"], ["trace", "demo@champion"]):
        assert "set, but not PREFECT_API_URL" in refused_here(folder, *command, code=1, env=env)


def test_registry_commands_do_not_start_a_stack(folder):
    assert "pedigree up" in refused(folder, "trace", "demo@champion", code=1)
    assert "pedigree up" in refused_here(folder, "promote", "demo@latest", "--reason", "x", code=1)


@pytest.mark.parametrize("command", [["run"], ["ingest", ".", "--name", "photos", "--license", "CC0-1.0"]])
def test_s3_that_is_down_at_the_start(folder, command):
    with socket.socket() as server:  # a port that nothing listens on
        server.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{server.getsockname()[1]}"
        buckets = ("PEDIGREE_DATA_BUCKET", "PEDIGREE_MODELS_BUCKET", "PEDIGREE_AUDIT_BUCKET")
        env = {"MLFLOW_TRACKING_URI": dead, "PREFECT_API_URL": f"{dead}/api", "AWS_ENDPOINT_URL": dead}
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        said = refused(folder, *command, code=1, env=env | keys | {name: name.lower() for name in buckets})
    assert f"S3 at {dead} does not answer" in said


def test_a_registry_that_is_down(folder):
    dead = "http://127.0.0.1:9"
    buckets = {f"PEDIGREE_{name}_BUCKET": name.lower() for name in ("DATA", "MODELS", "AUDIT")}
    env = {"MLFLOW_TRACKING_URI": dead, "PREFECT_API_URL": f"{dead}/api", "AWS_ENDPOINT_URL": dead} | buckets
    for command in ("trace a@b", "seen a@b", "promote a@latest --reason x"):
        said = refused_here(folder, *command.split(), code=1, env=env)
        assert f"MLflow at {dead} or the storage behind it does not answer" in said


@pytest.mark.stack
def test_a_bucket_that_is_not_there(folder, stack):
    env = stack.env | {"PEDIGREE_DATA_BUCKET": "nobodys-bucket"}
    assert "s3://nobodys-bucket: no such bucket; check its name" in refused(folder, "run", code=1, env=env)


@pytest.mark.stack
def test_a_folder_without_any_image(folder, stack, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "notes.txt").write_text("no image")
    (texts / "page.jpg").write_text("<!doctype html>")
    done = pedigree(folder, "run", "--images", str(texts), env=stack.env)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert str(texts) in errors[0]
    assert "Traceback" not in done.stderr
    assert "Finished in state" not in done.stderr
    assert not list((folder / "data").rglob("*.tar"))


def test_the_log_shows_the_traceback_of_a_defect_only():
    def shown(error: Exception) -> str:
        try:
            raise error
        except Exception:
            return _Plain().format(logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", None, sys.exc_info()))

    assert shown(StorageError("S3 does not answer")) == "failed"
    assert "Traceback" in shown(KeyError("a defect"))


def test_the_last_words_can_be_copied(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = f"http://127.0.0.1:17916/#/experiments/1/runs/{'0' * 32}?workflowType=machine_learning"
    result = RunResult("20261127-063802-4ccb", "runs/20261127-063802-4ccb", "0" * 40, tmp_path, {}, page)
    closing(result, "pedigree").show()
    said = capsys.readouterr().out
    for whole in (page, "pedigree trace pedigree@latest", "pedigree review pedigree@latest", "pedigree down"):
        assert whole in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert found.help
    assert ("Examples:" in found.help) == (command in WITH_EXAMPLES)
    if command in WITH_EXAMPLES:
        assert f"pedigree {command} " in found.help
    for option in found.params:
        assert getattr(option, "help", None), f"{command} {option.name} says nothing"


def test_a_reader_that_has_seen_enough(folder):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        pedigree_command("status", "--json"), cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_version(folder):
    done = pedigree(folder, "--version")
    assert (done.returncode, done.stdout) == (0, f"pedigree {metadata.version('pedigree')}\n"), done.stderr


def test_no_command_shows_the_commands(folder):
    done = pedigree(folder)
    assert all(command in done.stdout + done.stderr for command in COMMANDS)
    done = pedigree(folder, "run", "-h")
    assert done.returncode == 0
    assert "pedigree run --images ~/photos --license CC-BY-4.0" in done.stdout


def test_a_command_that_does_not_exist(folder):
    done = pedigree(folder, "rnu")
    assert done.returncode == 2
    assert "No such command 'rnu'" in done.stderr
