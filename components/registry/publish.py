"""Put weights into the MLflow registry as a version that anyone can load: weights, code, passport, tags, digests."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType

from components.core.errors import PedigreeError
from components.core.mlflow_client import TrackingError, checked_client, server_uri, shown_server
from components.core.model_files import digest_of, file_digests
from components.core.references import CANDIDATES
from components.core.storage import write_bytes, write_json
from components.core.tracking import flatten_numbers, valid_key
from components.lineage.provenance import Origin, Tag
from components.model.config import Preprocessing, ViTConfig
from components.registry.documents.write import DOCUMENTS
from components.registry.facts import BY_IMAGE, FACTS, FOLDER, Facts
from components.registry.making import MAKING, Making

SOURCE = Path(__file__).parents[2]
# What `pyfunc_model.py` imports of ours; a test loads the model with nothing else of this repository in reach.
CODE = (
    "components/__init__.py",
    "components/core/__init__.py",
    "components/core/config.py",
    "components/core/errors.py",
    "components/core/locks.py",
    "components/core/storage.py",
    "components/data/__init__.py",
    "components/data/pixels.py",
    "components/data/shards.py",
    "components/data/signatures.py",
    "components/model/__init__.py",
    "components/model/attention.py",
    "components/model/config.py",
    "components/model/export.py",
    "components/model/head.py",
    "components/model/layers.py",
    "components/model/pooling.py",
    "components/model/preprocessing.py",
    "components/model/vit.py",
)
REQUIREMENTS = ("torch", "safetensors", "pillow", "numpy", "pandas", "pydantic", "pyyaml", "mlflow")
WEIGHTS = ("model.safetensors", "config.json")
PASSPORT = "passport.html"
HEADS = "heads.safetensors"
SILENT = re.compile("Max retries exceeded|API request to .* failed")
FORBIDDEN = "failed with error code 403"


class RegistryError(PedigreeError):
    """The registry cannot do what was asked; the message says what was given and what to do."""


@dataclass(frozen=True)
class Candidate:
    """What is to be registered.

    Attributes:
        name: registered model, for example `demo-candidates`.
        weights: folder with model.safetensors and config.json.
        origin: where the weights come from.
        tags: what else the version states.
        card: what MLflow shows of it, as markdown.
        passport: the page that the card links to.
        documents: in standard formats, by file name.
        making: how it was made.
        facts: what the gates judge; the numbers of its evaluation become metrics of the model.
        by_image: Parquet of what it scored on each test image.
        example: one encoded image.
        preprocessing: of the images, as evaluated.
        with_heads: its projection heads go along, which others need to learn from it.
    """

    name: str
    weights: Path
    origin: Origin
    tags: Mapping[str, str]
    card: str
    passport: bytes
    documents: Mapping[str, bytes]
    making: Making
    facts: Facts
    by_image: Path
    example: bytes
    preprocessing: Preprocessing
    with_heads: bool


def registry_client() -> MlflowClient:
    """MLflow's client at MLFLOW_TRACKING_URI.

    Raises:
        RegistryError: the variable is not set.
        TrackingError: MLflow does not answer.
    """
    if server_uri() is None:
        raise RegistryError("MLFLOW_TRACKING_URI is not set: a model is registered on a server; run `pedigree up`")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return checked_client()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what MLflow raises into one line: TrackingError when it does not answer, else RegistryError."""
    import requests

    try:
        yield
    except (MlflowException, requests.exceptions.RequestException) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if FORBIDDEN in first:
            user = os.environ.get("MLFLOW_TRACKING_USERNAME", "(none)")
            who = "a reviewer writes released models, a trainer candidates"
            raise RegistryError(f"{shown_server()} does not permit this to its user {user}: {who}") from error
        if isinstance(error, requests.exceptions.RequestException) or SILENT.search(first):
            raise TrackingError(f"{shown_server()} does not answer; `pedigree status`") from error
        raise RegistryError(f"{shown_server()}: {first}") from error


def publish(client: MlflowClient, candidate: Candidate, run_id: str) -> ModelVersion:
    """Register a candidate; `registered` finds one that is there already.

    The version appears with all its tags in one request, so a version without its origin cannot exist. MLflow itself
    keeps the alias `latest`: it is the newest version, and nobody can move it.
    """
    model = candidate.name.removesuffix(CANDIDATES)
    released = f"What each run made; `pedigree promote {model}@latest --reason TEXT` releases the newest."
    ensure_registered_model(client, candidate.name, released)
    with tempfile.TemporaryDirectory() as temporary:
        return _register(client, candidate, run_id, Path(temporary) / "model")


def registered(client: MlflowClient, name: str, weights_sha256: str, facts: Facts) -> ModelVersion | None:
    """The version that has the same weights, the same scores and the same gates; None: there is none."""
    same = versions(client, name, WEIGHTS_SHA256=weights_sha256, EVIDENCE=facts.digest())
    return max((v for v in same if v.status == "READY"), key=lambda v: int(v.version), default=None)


def ensure_registered_model(client: MlflowClient, name: str, description: str) -> None:
    """Create the registered model unless it is there, or another process makes it at the same time."""
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, description=description)
        except MlflowException as late:
            if late.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def versions(client: MlflowClient, name: str, **tags: str) -> list[ModelVersion]:
    """All versions of a registered model whose tags have these values (keys are names of `Tag`)."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name='{name}'", max_results=200, page_token=token)
        found += [v for v in page if all(v.tags.get(Tag[key]) == value for key, value in tags.items())]
        token = page.token
        if not token:
            return found


def _register(client: MlflowClient, candidate: Candidate, run_id: str, folder: Path) -> ModelVersion:
    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id, name=candidate.name, source_run_id=run_id, model_type="embedding"
    )
    save_model(candidate, folder, Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id))
    files = file_digests(folder)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    _log_metrics(client, run_id, model.model_id, candidate.facts.evaluation)
    stated = {
        Tag.DIGEST: digest_of(files),
        Tag.FILES: json.dumps(files, separators=(",", ":")),
        Tag.EVIDENCE: candidate.facts.digest(),
    }
    return client.create_model_version(
        candidate.name,
        source=f"models:/{model.model_id}",
        run_id=run_id,
        model_id=model.model_id,
        tags={**candidate.origin.tags(), **candidate.tags, **stated},
        description=candidate.card,
    )


def save_model(candidate: Candidate, folder: Path, model: Model) -> None:
    """Write the MLflow model: weights, the code that reads them, passport, documents, signature, requirements."""
    with tempfile.TemporaryDirectory() as temporary:
        parts = Path(temporary)
        for name in CODE:
            _copy(SOURCE / name, parts / name)
        heads = [HEADS] if candidate.with_heads and (candidate.weights / HEADS).is_file() else []
        for name in (*WEIGHTS, *heads):
            _copy(candidate.weights / name, parts / "weights" / name)
        (parts / "card.md").write_text(candidate.card)
        (parts / PASSPORT).write_bytes(candidate.passport)
        for name, document in candidate.documents.items():
            write_bytes(parts / DOCUMENTS / name, document)
        write_json(parts / FOLDER / FACTS, candidate.facts.model_dump(mode="json"))
        write_json(parts / FOLDER / MAKING, candidate.making.model_dump(mode="json"))
        _copy(candidate.by_image, parts / FOLDER / BY_IMAGE)
        shape = ViTConfig.model_validate(json.loads((candidate.weights / "config.json").read_text())["backbone"])
        resolution = candidate.preprocessing.crop_size
        example = (pd.DataFrame({"image": [candidate.example]}), {"resolution": resolution})
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            model_config={"preprocessing": candidate.preprocessing.model_dump()},
            artifacts={name: str(parts / name) for name in ("weights", "card.md", PASSPORT, DOCUMENTS, FOLDER)},
            code_paths=[str(parts / "components")],
            signature=_signature(candidate.preprocessing.feature_dim(shape), resolution),
            input_example=example,
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
            mlflow_model=model,
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def _signature(dim: int, resolution: int) -> ModelSignature:
    return ModelSignature(
        # Bytes, or base64 text. Not `binary`: MLflow's server decodes such a column in two of its four JSON forms only,
        # names neither row nor reason where it cannot, and refuses an empty frame.
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, dim))]),
        params=ParamSchema([ParamSpec("resolution", "integer", resolution)]),
    )


def _log_metrics(client: MlflowClient, run_id: str, model_id: str, evaluation: Mapping[str, Any]) -> None:
    timestamp = client.get_run(run_id).info.start_time
    metrics = [
        Metric(valid_key(key), value, timestamp, 0, model_id) for key, value in flatten_numbers(evaluation).items()
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]  # the index has no torch 2.13.0+cpu


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
