"""A released model on the real services: signed, verified before use, and what happens when its bytes change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import mlflow
import numpy as np
import pytest
import typer
from mlflow import MlflowClient
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from components.core.errors import PedigreeError
from components.core.model_files import SIGNATURE, digest_of, file_digests
from components.core.registered_weights import download_weights
from components.core.signing import PRIVATE_KEY, PUBLIC_KEY, SignatureError
from components.lineage.verify import verify
from components.registry.release import Released
from flows.commands.decorators import command
from flows.commands.verify import verify as verify_command
from tests.registry.conftest import decide

pytestmark = pytest.mark.stack
WEIGHTS = "artifacts/weights/model.safetensors"


@pytest.fixture
def released(finished, name: str) -> str:
    """A model with one released version."""
    client = MlflowClient()
    version = client.get_model_version(f"{finished['name']}-candidates", "1")
    client.create_registered_model(f"{name}-candidates")
    model_id = version.source.removeprefix("models:/")
    client.create_model_version(
        f"{name}-candidates", version.source, version.run_id, tags=version.tags, model_id=model_id
    )
    decide(finished, f"{name}-candidates/1", "good")
    return name


def place(name: str) -> tuple[str, str]:
    """Bucket and prefix of a model's only released version."""
    source = MlflowClient().get_model_version(name, "1").source
    return os.environ["PEDIGREE_MODELS_BUCKET"], source.split("/", 3)[3]


def by_command(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(command(checkout=False)(verify_command.__wrapped__))
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_it_is_signed_and_verified_with_and_without_us(released: str, tmp_path):
    found = verify(f"{released}@champion", tmp_path)
    assert found.holds
    assert set(found.checks) == {"signature", "audit event", "tags"}
    assert set(verify(f"{released}-candidates/1", tmp_path).checks) == {"tags"}
    code, said, _ = by_command(f"{released}@champion")
    assert (code, said.count("agrees")) == (0, 3)
    # As a person without Pedigree does it, before MLflow loads the model.
    mlflow.artifacts.download_artifacts(f"models:/{released}@champion", dst_path=str(tmp_path / "champion"))
    program = [sys.executable, "-m", "model_signing", "verify", "key", "champion", "--signature", "champion/model.sig"]
    by_library = [*program, "--public_key", os.environ[PUBLIC_KEY]]
    assert subprocess.run(by_library, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    assert download_weights(f"models:/{released}@champion", tmp_path)


def test_whatever_is_changed_in_the_bucket_is_noticed_and_named(finished, released: str, tmp_path):
    bucket, prefix = place(released)
    client, before = boto3.client("s3"), {}
    worse = (finished["root"] / "models/pretrained/model.safetensors").read_bytes()
    document = ("artifacts/documents/croissant.json", b"{}")
    for path, data in (
        (WEIGHTS, worse),
        ("pyfunc_model.py", b"import os"),
        document,
        ("code/components/foreign.py", b""),
    ):
        if path != "code/components/foreign.py":
            before[path] = client.get_object(Bucket=bucket, Key=f"{prefix}/{path}")["Body"].read()
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)
        with pytest.raises(SignatureError, match=rf"^models:/{released}/1: .*do not use it.*{path}") as caught:
            download_weights(f"models:/{released}@champion", tmp_path)
        assert "\n" not in str(caught.value)
        code, _, said = by_command(f"{released}@champion")
        assert code == 1
        assert f"differs: {path}\n" in said
        if path in before:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=before[path])
        else:
            client.delete_object(Bucket=bucket, Key=f"{prefix}/{path}")
    assert json.loads(by_command(f"{released}@champion", "--json")[1])["holds"]
    client.delete_object(Bucket=bucket, Key=f"{prefix}/{SIGNATURE}")
    code, shown, _ = by_command(f"{released}@champion", "--json")
    assert (code, json.loads(shown)["differing"]) == (1, [])
    assert json.loads(shown)["checks"]["signature"].startswith("not signed")
    again = decide(finished, f"{released}-candidates/1", "as a champion of the time before signatures")
    assert (again.version, verify(f"{released}/1", tmp_path).holds) == (f"{released}/1", True)


def test_tags_that_a_person_without_the_key_changed_are_noticed(released: str, tmp_path):
    MlflowClient().set_model_version_tag(released, "1", "pedigree.digest", "0" * 64)
    assert verify(f"{released}/1", tmp_path).checks["tags"] == "pedigree.digest is not the digest of the files"


def pickled(folder: Path) -> None:
    (folder / "python_model.pkl").write_bytes(b"\x80\x04\x95\x10")


def wrong_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickled, r"^python_model\.pkl is a pickle"),
        (wrong_header, r"model\.safetensors: not a readable safetensors file"),
        (not_finite, r"NaN or infinite values in 1 tensors, first norm\.weight"),
    ],
)
def test_hostile_files_are_not_released(finished, name: str, tmp_path, spoil: Callable[[Path], None], said: str):
    candidate = mlflow.artifacts.download_artifacts(finished["first"]["teacher"]["uri"], dst_path=str(tmp_path / "a"))
    folder = Path(shutil.copytree(candidate, tmp_path / "model"))
    spoil(folder)
    files = file_digests(folder)
    with pytest.raises(PedigreeError, match=said) as caught:
        Released().copy_in(folder, files, name, digest_of(files))
    assert "\n" not in str(caught.value)
    found = boto3.client("s3").list_objects_v2(Bucket=os.environ["PEDIGREE_MODELS_BUCKET"], Prefix=f"released/{name}/")
    assert found["KeyCount"] == 0


def test_without_a_key_nothing_is_released(finished, released: str, monkeypatch):
    bucket, prefix = place(released)
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{prefix}/{SIGNATURE}")
    monkeypatch.delenv(PRIVATE_KEY)
    with pytest.raises(SignatureError, match=f"{PRIVATE_KEY} is not set"):
        decide(finished, f"{released}-candidates/1", "again")
