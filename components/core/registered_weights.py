"""Download the weights of a registered model version, verified before use. MLflow is imported on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.core.layout import Layout
from components.core.mlflow_client import TrackingError, checked_client, reported, server_uri
from components.core.model_files import (
    MAX_GIB,
    MAX_RECORD_GIB,
    ModelFilesError,
    check_harmless,
    check_list,
    differing_files,
)
from components.core.references import ModelReference
from components.core.signing import SignatureError, public_key, verify_folder
from components.core.storage import s3_client, s3_errors, sha256_file, split_s3_uri
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
        ModelFilesError: a candidate's files are not those that were registered or could run code, or a model's are
            too many or too large.
    """
    asked = ModelReference.of_uri(uri)
    if asked is None:
        raise TrackingError(f"{uri}: not a registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if not server_uri():
        raise TrackingError(f"{uri}: MLFLOW_TRACKING_URI is not set; run 'pedigree up', or set it")
    with reported():
        client = checked_client()
        found = asked.find(client)
        model = ModelReference.of_version(found).uri

        def fetch(target: Path) -> Path:
            fetched = download_model(model, target)
            verify_model(asked, found.tags, fetched)
            return fetched

        try:
            folder = Layout(root).cache("models") / f"{asked.name}-{found.version}-{_origin(asked, found)}"
            keep_weights(folder, fetch, found.tags.get(WEIGHTS_SHA256_TAG))
        except (TrackingError, SignatureError, ModelFilesError) as error:
            raise type(error)(f"{model}: {error}") from None
    return folder


def download_model(uri: str, target: Path, folder: str = "") -> Path:
    """Download a model's files, or one folder of them, if they are not more or larger than a model's.

    Args:
        uri: `models:/NAME/3`, `models:/m-ID` or `s3://BUCKET/PREFIX`.
        target: folder that is there.
        folder: what is wanted of it; all if empty.

    Raises:
        ModelFilesError: there are too many files, or too large ones; none is downloaded then.
        MlflowException: there is no such model.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository: Any = get_artifact_repository(uri, tracking_uri=server_uri())
    check_list(_listed(repository, folder), MAX_RECORD_GIB if folder else MAX_GIB)
    return Path(repository.download_artifacts(folder, str(target)))


def _listed(repository: Any, folder: str) -> Iterator[tuple[str, int]]:
    """Names and bytes of the files of a model, page by page on S3, else folder by folder."""
    place = getattr(repository, "repo", repository).artifact_uri
    if place.startswith("s3://"):
        bucket, prefix = split_s3_uri(f"{place}/{folder}".rstrip("/") + "/")
        with s3_errors(place):
            for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                yield from ((item["Key"].removeprefix(prefix), item["Size"]) for item in page.get("Contents", []))
        return
    folders = [folder]
    while folders:
        for item in repository.list_artifacts(folders.pop() or None):
            if item.is_dir:
                folders.append(item.path)
            yield item.path, item.file_size or 0


def verify_model(asked: ModelReference, tags: dict[str, str], folder: Path) -> None:
    """Check the downloaded files of a version: by the signature of a released one, by the tags of a candidate.

    Raises:
        SignatureError: as of `verify_folder`.
        ModelFilesError: a candidate's files are not those that were registered, were not registered at all, or could
            run code.
    """
    if not asked.is_candidate:
        verify_folder(folder)
    else:
        if differing := differing_files(folder, tags):
            raise ModelFilesError(f"not the files that were registered, do not use it: {some_of(differing, 5)}")
        check_harmless(folder)


def _origin(asked: ModelReference, found: Any) -> str:
    """Tells kept copies apart: two servers may have a version 1 of one name; a copy verified by another key is none."""
    key = sha256_file(public_key()) if not asked.is_candidate else ""
    return hashlib.sha256(f"{found.source} {found.creation_timestamp} {key}".encode()).hexdigest()[:12]
