import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.core import stage_runs, tracking
from components.core.metric_queue import MetricQueue
from components.core.mlflow_client import TrackingError
from components.core.model_files import FILES_TAG, ModelFilesError, file_digests
from components.core.registered_weights import WEIGHTS_SHA256_TAG, download_weights
from components.core.signing import PUBLIC_KEY, SignatureError, sign_folder
from components.core.storage import StorageError, sha256_file
from components.core.user import user_name
from tests.keys import key_variables

PARAMS = {
    "name": "tiny",
    "seed": 3,
    "knn": {"num_neighbors": [10, 20]},
    "long": "x" * 7000,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An empty MLflow database; making its tables takes two seconds, so all tests share it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("tiny", artifact_location=f"{folder}/artifacts")
    return uri, client


@pytest.fixture
def client(store, monkeypatch, workspace):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    return store[1]


@pytest.fixture
def workspace(tmp_path, monkeypatch, request):
    """A git repository on the branch of a run that is named after the test."""
    root = tmp_path / "workspace"
    root.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    (root / "params.yaml").write_text("name: tiny\n")
    for arguments in (
        ["init", "-q", "-b", f"runs/{request.node.originalname}"],
        ["add", "."],
        ["commit", "-q", "-m", "start"],
    ):
        subprocess.run([*git, *arguments], check=True)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return root


def runs_of(client, run_id):
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return {run.info.run_name: run for run in client.search_runs([experiment], f"tags.`pedigree.run` = '{run_id}'")}


def test_a_stage_is_a_run_nested_in_its_pipeline_run(client, workspace, request):
    run_id = request.node.name
    parent = stage_runs.open_parent(run_id, "tiny", PARAMS)
    with stage_runs.stage_run("evaluate", "small", PARAMS, workspace) as run:
        tracking.log_metrics({"loss": 2.0}, step=10)
        tracking.log_metrics({"loss": 1.0}, step=20)
        tracking.tag_run({"pedigree.alert.collapse": "step 20: collapse"})
        (workspace / "pca.jpg").write_bytes(b"picture")
        tracking.log_file(workspace / "pca.jpg", "progress")
        assert [f.path for f in client.list_artifacts(run.run_id, "progress")] == ["progress/pca.jpg"]  # at once
        tracking.log_input("data/evaluation", "a" * 32 + ".dir", "s3://b/e", {"sha256": "c" * 64}, "evaluation")
        reports = workspace / "reports" / "evaluate" / "small"
        reports.mkdir(parents=True)
        (reports / "result.json").write_text("{}")
        run.log_result({"knn_top1": 0.5, "random": {"knn_top1": 0.25, "note": "text"}, "broken": float("nan")})
    stage_runs.close_parent(parent, "FINISHED")

    found = runs_of(client, run_id)
    assert set(found) == {run_id, f"{run_id}/evaluate@small"}
    child = found[f"{run_id}/evaluate@small"]
    assert child.info.status == found[run_id].info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.data.tags["pedigree.stage"] == "evaluate"
    assert child.data.tags["pedigree.alert.collapse"] == "step 20: collapse"
    head = subprocess.run(["git", "-C", workspace, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert child.data.tags["pedigree.commit"] == head.stdout.strip()
    assert child.data.tags["pedigree.dirty"] == "false"
    assert child.data.params["knn.num_neighbors"] == "[10, 20]"
    assert len(child.data.params["long"]) == 6000
    assert child.data.params["seed"] == "3"
    assert child.data.metrics == {"loss": 1.0, "knn_top1": 0.5, "random.knn_top1": 0.25}
    history = client.get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["progress", "result.json"]
    (dataset,) = child.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("data/evaluation", "a" * 32 + ".dir")
    assert {tag.key: tag.value for tag in dataset.tags}["sha256"] == "c" * 64


def test_a_run_taken_up_again_has_one_parent(client, request):
    first = stage_runs.open_parent(request.node.name, "tiny", PARAMS)
    stage_runs.close_parent(first, "FAILED")
    assert stage_runs.open_parent(request.node.name, "tiny", PARAMS) == first
    assert client.get_run(first).info.status == "RUNNING"


def test_the_traceback_of_a_defect_is_kept_and_found(client, workspace, tmp_path, monkeypatch):
    def fail(error: Exception) -> str | None:
        with stage_runs.stage_run("embed", None, PARAMS, workspace) as run:
            ids.append(run.run_id)
            raise error

    ids: list[str | None] = []
    defect, known = KeyError("planted"), StorageError("S3 does not answer")
    for error in (defect, known):
        with pytest.raises(type(error)):
            fail(error)
    kept, none = ids
    assert "KeyError: 'planted'" in Path(client.download_artifacts(kept, "traceback.txt", str(tmp_path))).read_text()
    assert stage_runs.where_logged(defect) == f"in the log and traceback.txt of MLflow's run {kept}"
    assert client.list_artifacts(none) == []
    assert stage_runs.where_logged(known) == "in the log"
    monkeypatch.setattr(type(client), "log_text", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
    with pytest.raises(KeyError, match="lost"):
        fail(KeyError("lost"))


def test_a_failed_stage_is_failed_and_a_lost_one_is_killed(client, workspace, request):
    name = f"{request.node.name}/pretrain"
    experiment = client.get_experiment_by_name("tiny").experiment_id
    lost = client.create_run(experiment, run_name=name).info.run_id
    (workspace / "params.yaml").write_text("name: changed\n")

    def diverge():
        with stage_runs.stage_run("pretrain", None, PARAMS, workspace):
            tracking.log_metrics({"loss": 2.0}, step=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()
    run = runs_of(client, request.node.name)[name]
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss": 2.0}
    assert run.data.tags["pedigree.dirty"] == "true"
    assert client.get_run(lost).info.status == "KILLED"


def test_a_rank_that_a_stage_starts_logs_to_its_run(client, workspace, request):
    code = "from components.core import tracking; tracking.log_metrics({'loss': 4.0}, step=7)"
    with stage_runs.stage_run("pretrain", None, PARAMS, workspace):
        subprocess.run([sys.executable, "-c", code], check=True)
    run = runs_of(client, request.node.name)[f"{request.node.name}/pretrain"]
    assert run.data.metrics == {"loss": 4.0}


def test_without_a_server_nothing_happens(workspace):
    code = (
        "import sys; from pathlib import Path; from components.core import stage_runs, tracking\n"
        f"with stage_runs.stage_run('pretrain', None, {PARAMS!r}, Path('.')) as run:\n"
        "    tracking.log_metrics({'loss': 1.0}, 1); tracking.log_input('a', 'b', 'c', {}, 'training')\n"
        "    run.log_result({'loss': 1.0})\n"
        "assert stage_runs.open_parent('r', 'n', {}) is None and stage_runs.run_url('x') is None\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_URI is not set"):
        download_weights("models:/tiny/1", workspace)


def test_a_server_that_is_down_is_one_line_at_once(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begun = time.monotonic()
    with (
        pytest.raises(TrackingError, match=r"http://127.0.0.1:9 or .*does not answer.*pedigree up") as caught,
        stage_runs.stage_run("pretrain", None, PARAMS, workspace),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 2


def test_a_tracker_that_is_away_at_a_ranks_first_word_stops_nothing(workspace, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    tracking.log_metrics({"loss": 1.0}, step=7)
    assert caplog.messages[-1].startswith("metrics of step 7 not logged: MLflow at http://127.0.0.1:9 or ")


def test_the_login_in_an_address_is_never_shown(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9 or .*refused"):
        stage_runs.open_parent("run", "tiny", PARAMS)


def test_a_user_without_a_name_is_a_number(monkeypatch):
    """In a container that runs as a number, as infra/kubernetes has it."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_000_000_001)
    assert user_name() == "3000000001"


def test_long_digests_are_refused():
    with pytest.raises(ValueError, match="36 characters"):
        tracking.log_input("a", "f" * 64, "s3://x", {}, "training")


@pytest.fixture
def version(client, tmp_path, monkeypatch):
    """Version 1 of a released model whose weights lie some folders deep, and those weights."""
    for variable, value in key_variables(tmp_path / "keys").items():
        monkeypatch.setenv(variable, value)
    weights = tmp_path / "registered" / "artifacts" / "weights"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")
    (weights / "config.json").write_text("{}")
    sign_folder(tmp_path / "registered")
    with_name = tmp_path.name.replace("_", "-")
    client.create_registered_model(with_name)
    tags = {WEIGHTS_SHA256_TAG: sha256_file(weights / "model.safetensors")}
    client.create_model_version(with_name, str(tmp_path / "registered"), tags=tags)
    client.set_registered_model_alias(with_name, "champion", "1")
    return with_name, weights


def test_weights_are_fetched_once_and_checked_each_time(version, workspace):
    name, weights = version
    folder = download_weights(f"models:/{name}@champion", workspace)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "config.json").read_text()) == {}
    (weights / "model.safetensors").write_bytes(b"altered")
    assert download_weights(f"models:/{name}/1", workspace) == folder
    (folder / "model.safetensors").write_bytes(b"altered")  # no longer what was fetched: fetch again, and see why
    with pytest.raises(SignatureError, match=rf"^models:/{name}/1: .*do not use it.*weights/model\.safetensors"):
        download_weights(f"models:/{name}/1", workspace)


def test_a_released_model_is_verified_whole_or_not_used(version, workspace, monkeypatch, tmp_path):
    name, weights = version
    download_weights(f"models:/{name}/1", workspace)
    code = weights.parents[1] / "pyfunc_model.py"
    code.write_text("import os")  # beside weights that are as they were
    for variable, value in key_variables(tmp_path / "others").items():  # what the key before has verified is not used
        monkeypatch.setenv(variable, value)
    with pytest.raises(SignatureError, match="do not use it"):
        download_weights(f"models:/{name}/1", workspace)
    sign_folder(code.parent)
    download_weights(f"models:/{name}/1", workspace)
    monkeypatch.delenv(PUBLIC_KEY)
    with pytest.raises(SignatureError, match=rf"^models:/{name}/1: {PUBLIC_KEY} is not set"):
        download_weights(f"models:/{name}/1", workspace)


def test_a_candidate_is_verified_by_the_digests_of_its_files(version, client, workspace, tmp_path):
    name, registered = f"{version[0]}-candidates", tmp_path / "registered"
    (registered / "model.sig").unlink()
    files = file_digests(registered)
    client.create_registered_model(name)
    for tags in ({}, {FILES_TAG: json.dumps(files)}):
        client.create_model_version(name, str(registered), tags=tags)
    with pytest.raises(ModelFilesError, match=rf"^models:/{name}/1: has no tag {FILES_TAG}"):
        download_weights(f"models:/{name}/1", workspace)
    (registered / "code.py").write_text("import os")
    with pytest.raises(ModelFilesError, match=r"do not use it: code\.py$"):
        download_weights(f"models:/{name}/2", workspace)
    (registered / "code.py").unlink()
    assert (download_weights(f"models:/{name}/2", workspace) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("uri", "message"),
    [("runs:/1", "models:/NAME/VERSION"), ("models:/none/1", "refuses"), ("models:/none@champion", "refuses")],
)
def test_weights_that_do_not_exist(client, workspace, uri, message):
    with pytest.raises(TrackingError, match=message):
        download_weights(uri, workspace)


def test_metrics_wait_while_the_tracker_is_away(monkeypatch):
    monkeypatch.setattr("components.core.metric_queue.SEND_EVERY_SECONDS", 0.0)
    away, delivered = [True], []

    def send(points):
        if away[0]:
            raise TrackingError("away")
        delivered.extend(points)

    queue = MetricQueue(send, TrackingError)
    for step in range(3):
        queue.add({"loss": float(step)}, step)
    with pytest.raises(TrackingError, match="away"):
        queue.flush()
    away[0] = False
    queue.flush()
    queue.flush()
    assert [point.step for point in delivered] == [0, 1, 2]


def test_queueing_costs_a_step_almost_nothing():
    queue = MetricQueue(lambda points: time.sleep(0.5), TrackingError)
    begun = time.monotonic()
    for step in range(1000):
        queue.add({"loss": 1.0, "lr": 0.1}, step)
    assert time.monotonic() - begun < 0.2
    queue.flush()


@pytest.mark.stack
def test_the_server_holds_run_and_files(stack, workspace, request, monkeypatch):
    for key, value in stack.env.items():
        monkeypatch.setenv(key, value)
    with stage_runs.stage_run("evaluate", None, PARAMS, workspace) as run:
        (workspace / "reports" / "evaluate").mkdir(parents=True)
        (workspace / "reports" / "evaluate" / "a.csv").write_text("x\n1\n")
    client = MlflowClient(tracking_uri=stack.env["MLFLOW_TRACKING_URI"])
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["a.csv"]
    stage_runs.describe_run(run.run_id, "kNN **0.8**")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "kNN **0.8**"
    assert stage_runs.run_url(run.run_id).endswith(f"/runs/{run.run_id}?workflowType=machine_learning")
