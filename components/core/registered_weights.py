"""Download the weights of a registered model version, verified before use. MLflow is imported on first use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from components.core.layout import Layout
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri
from components.core.model_files import ModelFilesError, differing_files
from components.core.references import ModelReference
from components.core.signing import SignatureError, public_key, verify_folder
from components.core.storage import sha256_file
from components.core.text import some_of
from components.core.weights_cache import keep_weights

WEIGHTS_SHA256_TAG = "pedigree.weights_sha256"  # on a model version: SHA-256 of its model.safetensors


def download_weights(uri: str, root: Path = Path()) -> Path:
    """Fetch a registered model's weights: a folder with model.safetensors and config.json, verified.

    The whole model is verified when it is fetched: a released one by its signature, a candidate by the digests of its
    files that its version states. A version is fetched once and kept under `root/.pedigree/cache/models`; the kept
    files are hashed again at each use.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@alias`.
        root: the workspace.

    Raises:
        TrackingError: no server is set, it does not answer, the version does not exist, or its weights are not those
            that were registered.
        SignatureError: a released model is not signed, is not what was signed, or no public key is known.
        ModelFilesError: a candidate's files are not those that were registered.
    """
    asked = ModelReference.of_uri(uri)
    if asked is None:
        raise TrackingError(f"{uri}: not a registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if not server_uri():
        raise TrackingError(f"{uri}: MLFLOW_TRACKING_URI is not set; run 'pedigree up', or set it")
    with reported():
        client = checked_client()
        found = asked.find(client)
        model = ModelReference(asked.name, version=str(found.version)).uri

        def fetch(target: Path) -> Path:
            from mlflow.artifacts import download_artifacts

            fetched = Path(download_artifacts(artifact_uri=model, dst_path=str(target), tracking_uri=server_uri()))
            verify_model(asked, found.tags, fetched)
            return fetched

        try:
            folder = Layout(root).cache("models") / f"{asked.name}-{found.version}-{_origin(asked, found)}"
            keep_weights(folder, fetch, found.tags.get(WEIGHTS_SHA256_TAG))
        except (TrackingError, SignatureError, ModelFilesError) as error:
            raise type(error)(f"{model}: {error}") from None
    return folder


def verify_model(asked: ModelReference, tags: dict[str, str], folder: Path) -> None:
    """Check the downloaded files of a version: by the signature of a released one, by the tags of a candidate.

    Raises:
        SignatureError: as of `verify_folder`.
        ModelFilesError: a candidate's files are not those that were registered, or were not registered at all.
    """
    if not asked.is_candidate:
        verify_folder(folder)
    elif differing := differing_files(folder, tags):
        raise ModelFilesError(f"not the files that were registered, do not use it: {some_of(differing, 5)}")


def _origin(asked: ModelReference, found: Any) -> str:
    """Tells kept copies apart: two servers may have a version 1 of one name; a copy verified by another key is none."""
    key = sha256_file(public_key()) if not asked.is_candidate else ""
    return hashlib.sha256(f"{found.source} {found.creation_timestamp} {key}".encode()).hexdigest()[:12]
