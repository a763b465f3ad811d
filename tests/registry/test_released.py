"""A released model on the real services: signed, verified before use, and what happens when its bytes change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
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

from components.core import model_files, registered_weights
from components.core.errors import PedigreeError
from components.core.model_files import SIGNATURE, ModelFilesError, check_list, digest_of, file_digests
from components.core.registered_weights import download_weights
from components.core.signing import PRIVATE_KEY, PUBLIC_KEY, SignatureError
from components.lineage.verify import verify
from components.model.export import load_backbone
from components.registry import facts
from components.registry.named_weights import find_weights
from components.registry.release import Released
from components.registry.review import review_reference
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


def file_faults(reference: str, root: Path) -> list[str]:
    """What differs of its files; the versions of these tests are copies, of which git and their card know nothing."""
    own = ("no run in the git repository", "description of ", "no commit")
    return [line for line in verify(reference, root).faults if not any(words in line for words in own)]


def test_it_is_signed_and_verified_with_and_without_us(released: str, tmp_path):
    assert file_faults(f"{released}@champion", tmp_path) == []
    assert file_faults(f"{released}-candidates/1", tmp_path) == []
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
        assert f"s3://{bucket}/{prefix}/{path}: not " in said
        if path in before:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=before[path])
        else:
            client.delete_object(Bucket=bucket, Key=f"{prefix}/{path}")
    assert file_faults(f"{released}@champion", tmp_path) == []
    client.delete_object(Bucket=bucket, Key=f"{prefix}/{SIGNATURE}")
    code, shown, _ = by_command(f"{released}@champion", "--json")
    assert code == 1
    assert any(f"{prefix}/{SIGNATURE}: not signed" in line for line in json.loads(shown)["faults"])
    again = decide(finished, f"{released}-candidates/1", "as a champion of the time before signatures")
    assert (again.version, file_faults(f"{released}/1", tmp_path)) == (f"{released}/1", [])


def test_tags_that_a_person_without_the_key_changed_are_noticed(released: str, tmp_path):
    MlflowClient().set_model_version_tag(released, "1", "pedigree.digest", "0" * 64)
    faults = file_faults(f"{released}/1", tmp_path)
    assert any(line.endswith(f"registered was {'0' * 64}") for line in faults)
    assert any("its digest is not what event 1 approved" in line for line in faults)


def pickled(folder: Path) -> None:
    (folder / "python_model.pkl").write_bytes(b"\x80\x04\x95\x10")


def wrong_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)
    save_file(tensors, folder / WEIGHTS)


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "code" / "data.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(10_000_000))


def one_file_too_many(folder: Path) -> None:
    for number in range(20):
        (folder / f"z{number:02}.txt").write_text("x")


def too_large(folder: Path) -> None:
    (folder / "z.txt").write_bytes(bytes(2**20))


def register_as_it_is(finished, name: str, folder: Path) -> None:
    """A candidate whose tags state just these files, as somebody registers it who may write candidates."""
    client, files = boto3.client("s3"), file_digests(folder)
    bucket, prefix = os.environ["PEDIGREE_MODELS_BUCKET"], f"mlflow/hostile/{name}"
    for path in files:
        client.upload_file(str(folder / path), bucket, f"{prefix}/{path}")
    version = MlflowClient().get_model_version(f"{finished['name']}-candidates", "1")
    weights = {"pedigree.weights_sha256": files[WEIGHTS], "pedigree.digest": digest_of(files)}
    tags = {**version.tags, **weights, "pedigree.files": json.dumps(files)}
    MlflowClient().create_registered_model(f"{name}-candidates")
    MlflowClient().create_model_version(f"{name}-candidates", f"s3://{bucket}/{prefix}", version.run_id, tags=tags)


@pytest.fixture
def model(finished, tmp_path, monkeypatch) -> Path:
    """Files of a candidate; with some more, or a few bytes more, it is over the limits."""
    candidate = mlflow.artifacts.download_artifacts(finished["first"]["teacher"]["uri"], dst_path=str(tmp_path / "a"))
    folder = Path(shutil.copytree(candidate, tmp_path / "model"))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(model_files, "MAX_FILES", len(sizes) + 19)
    for module in (model_files, registered_weights):
        monkeypatch.setattr(module, "MAX_GIB", (sum(sizes) + 2**19) / 2**30)
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickled, r"python_model\.pkl is a pickle"),
        (zip_bomb, r"code/data\.bin is a zip archive"),
        (one_file_too_many, r"more than \d+ files, first too many: .+; not a model, do not use it"),
        (too_large, r"more than 0\.0\d+ GiB, with z\.txt \(1048576 bytes\); do not use it"),
        (wrong_header, r"model\.safetensors: not a readable safetensors file"),
        (not_finite, r"NaN or infinite values in 1 tensors, first norm\.weight"),
    ],
)
def test_hostile_files_are_neither_used_nor_released(
    finished, name: str, tmp_path, model: Path, spoil: Callable[[Path], None], said: str
):
    spoil(model)
    register_as_it_is(finished, name, model)
    with pytest.raises(PedigreeError, match=said) as caught:
        load_backbone(find_weights(f"{name}-candidates/1", tmp_path).folder)
    assert "\n" not in str(caught.value)
    files = file_digests(model)
    with pytest.raises(PedigreeError, match=said) as caught:
        Released().copy_in(model, files, name, digest_of(files))
    assert "\n" not in str(caught.value)
    found = boto3.client("s3").list_objects_v2(Bucket=os.environ["PEDIGREE_MODELS_BUCKET"], Prefix=f"released/{name}/")
    assert found["KeyCount"] == 0


@pytest.mark.parametrize("path", ["../evil.py", "code/../../evil.py", "/etc/evil.py"])
def test_a_path_out_of_the_model_is_refused_before_the_download(path: str):
    with pytest.raises(ModelFilesError, match="leads out of the model"):
        check_list([("MLmodel", 10), (path, 10)], 1.0)


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (("facts.json", b"[" * 100_000), "recursion"),
        (("facts.json", b"\xff"), "'utf-8' codec"),
        (("by_image.parquet", b"PAR1 no"), "Parquet"),
        (None, "by_image.parquet has 200 rows, more than 100"),
    ],
)
def test_a_hostile_record_is_one_line(finished, name: str, model: Path, monkeypatch, spoilt, said):
    if spoilt is None:
        monkeypatch.setattr(facts, "MAX_ROWS", 100)  # a file of a few bytes can have any number of rows
    else:
        file, data = spoilt
        (model / "artifacts/evaluation" / file).write_bytes(data)
    register_as_it_is(finished, name, model)
    with pytest.raises(PedigreeError, match=f"^{name}-candidates/1: evaluation is not what a run registers") as caught:
        review_reference(MlflowClient(), f"{name}-candidates/1", finished["latest"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_key_nothing_is_released(finished, released: str, monkeypatch):
    bucket, prefix = place(released)
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{prefix}/{SIGNATURE}")
    monkeypatch.delenv(PRIVATE_KEY)
    with pytest.raises(SignatureError, match=f"{PRIVATE_KEY} is not set"):
        decide(finished, f"{released}-candidates/1", "again")
