"""Download the weights of a registered model version, checked by SHA-256. MLflow is imported on first use."""

from __future__ import annotations

import hashlib
from pathlib import Path

from components.core.layout import Layout
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri
from components.core.references import ModelReference
from components.core.weights_cache import keep_weights

WEIGHTS_SHA256_TAG = "pedigree.weights_sha256"  # on a model version: SHA-256 of its model.safetensors


def download_weights(uri: str, root: Path = Path()) -> Path:
    """Fetch a registered model's weights: a folder with model.safetensors and config.json, checked by SHA-256.

    A version is fetched once and kept under `root/.pedigree/cache/models`; the kept files are hashed again at each use.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@alias`.
        root: the workspace.

    Raises:
        TrackingError: no server is set, it does not answer, the version does not exist, or its bytes are not what
            was registered.
    """
    asked = ModelReference.of_uri(uri)
    if asked is None:
        raise TrackingError(f"{uri}: not a registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if not server_uri():
        raise TrackingError(f"{uri}: MLFLOW_TRACKING_URI is not set; run 'pedigree up', or set it")
    with reported():
        client = checked_client()
        found = asked.find(client)
        # Two servers may both have a version 1 of the same name.
        origin = hashlib.sha256(f"{found.source} {found.creation_timestamp}".encode()).hexdigest()[:12]
        folder = Layout(root).cache("models") / f"{asked.name}-{found.version}-{origin}"
        model = ModelReference(asked.name, version=str(found.version)).uri

        def fetch(target: Path) -> Path:
            from mlflow.artifacts import download_artifacts

            return Path(download_artifacts(artifact_uri=model, dst_path=str(target), tracking_uri=server_uri()))

        try:
            keep_weights(folder, fetch, found.tags.get(WEIGHTS_SHA256_TAG))
        except TrackingError as error:
            raise TrackingError(f"{model}: {error}") from None
    return folder
