"""Checkpoints on a real S3 server: whole or not there, newest two, on another machine, and without credentials."""

import socket
import time
import uuid

import pytest
import torch
from safetensors.torch import load

from components.core.storage import StorageError, s3_client
from components.training import checkpoint_store
from components.training.checkpoint import Checkpoints
from components.training.checkpoint_store import INDEX, CheckpointError
from tests.training.jobs import at_call, make_job, train_job

BUCKET = "checkpoints"


@pytest.fixture
def uri(storage) -> str:
    if BUCKET not in [bucket["Name"] for bucket in s3_client().list_buckets()["Buckets"]]:
        s3_client().create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def names(uri: str, client=None) -> list[str]:
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    found = (client or s3_client()).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return sorted(item["Key"].removeprefix(f"{prefix}/") for item in found)


def test_credentials_that_expire_in_the_middle_and_a_new_machine(uri, curated, pretrain_values, tmp_path, monkeypatch):
    """The second checkpoint is refused: one line, the first stands; elsewhere it goes on to the same bits."""
    values = pretrain_values(monitor={"alerts": {"after_steps": 6, "max_wait_share": 1.0}})  # none are raised
    straight = make_job(values, curated)
    train_job(straight, Checkpoints(tmp_path / "straight"))

    client = s3_client()

    def expire():
        while f"step_2/{INDEX}" not in names(uri, client):
            time.sleep(0.01)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")

    job = make_job(values, curated)
    at_call(job, 3, expire)
    with pytest.raises(StorageError) as error:
        train_job(job, Checkpoints(tmp_path / "here", uri))
    line = f"checkpoint not written, earlier ones remain: {uri}/step_4/"
    assert str(error.value).startswith(line)
    assert "access denied (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID and AWS_SECRET" in str(error.value)
    monkeypatch.undo()
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert names(uri) == [f"step_2/{name}" for name in (INDEX, "loss.csv", shard)]

    elsewhere = make_job(values, curated)
    rows = train_job(elsewhere, Checkpoints(tmp_path / "there", uri))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected, found = (job.networks.ema.state_dict() for job in (straight, elsewhere))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert names(uri) == [f"step_{step}/{name}" for step in (4, 6) for name in (INDEX, "loss.csv", shard)]
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    tensors = load(s3_client().get_object(Bucket=BUCKET, Key=f"{prefix}/step_6/{shard}")["Body"].read())
    assert torch.equal(tensors["ema/backbone.pos_embed"], expected["backbone.pos_embed"])

    # A shard that was exchanged is seen before anything is loaded; one without an index is not there.
    s3_client().put_object(Bucket=BUCKET, Key=f"{prefix}/step_6/{shard}", Body=b"other")
    with pytest.raises(CheckpointError, match=rf"{uri}/step_6: cannot be read \({shard} is not what was written\)"):
        train_job(make_job(values, curated), Checkpoints(tmp_path / "there", uri))
    s3_client().delete_object(Bucket=BUCKET, Key=f"{prefix}/step_6/{INDEX}")
    left = tmp_path / "again" / f".fetched.{socket.gethostname()}.1"  # by a try that was killed meanwhile
    left.mkdir(parents=True)
    again = make_job(values, curated)
    assert len(train_job(again, Checkpoints(tmp_path / "again", uri))) == 6
    assert torch.equal(again.networks.ema.state_dict()["backbone.pos_embed"], expected["backbone.pos_embed"])
    assert not left.exists()
    client, deleted = s3_client(), []
    client.meta.events.register("before-parameter-build.s3.DeleteObject", lambda params, **_: deleted.append(params))
    monkeypatch.setattr(checkpoint_store, "s3_client", lambda: client)
    Checkpoints(tmp_path / "again", uri).remove()
    assert names(uri) == []
    first = [item["Key"].endswith(f"/{INDEX}") for item in deleted]
    assert first == sorted(first, reverse=True)  # half deleted, a checkpoint is not there


def test_no_bucket(storage, curated, pretrain_values, tmp_path):
    with pytest.raises(StorageError, match="s3://no-such-bucket/run: no such bucket; check its name"):
        train_job(make_job(pretrain_values(), curated), Checkpoints(tmp_path, "s3://no-such-bucket/run"))
