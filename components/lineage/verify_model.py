"""Verify the files of a registered version where they lie now: in MLflow, or below the prefix of released models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.core.mlflow_client import reported
from components.core.model_files import NOT_OF_THE_MODEL, SIGNATURE, ModelFilesError, differing, digest_of
from components.core.references import URI, ModelReference
from components.core.registered_weights import download_model
from components.core.signing import SignatureError, verify_folder
from components.core.storage import MissingInStorageError
from components.lineage.lock_file import RecordError
from components.lineage.mlflow_files import place_on_s3
from components.lineage.verify_objects import NOT_THERE, Objects, in_parallel

CARD = "artifacts/card.md"
NOT_IN_MLFLOW = ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED")  # the latter to all but MLflow's admins


def source_of(client: Any, version: Any) -> str:
    """Return where the files of a version lie on S3; those of a copy, as MLflow's "Promote model" makes, lie elsewhere.

    Raises:
        RecordError: not on S3, or what the version is made of is not in MLflow.
    """
    from mlflow.exceptions import MlflowException

    source = str(version.source)
    with reported():
        try:
            if copied := ModelReference.of_uri(source):
                return source_of(client, copied.find(client))
            if source.startswith(URI):
                source = str(client.get_logged_model(source.removeprefix(URI)).artifact_location)
        except MlflowException as error:
            if error.error_code not in NOT_IN_MLFLOW:
                raise
            told = f"the files of {ModelReference.of_version(version)} cannot be found"
            raise RecordError(f"{source}: not in MLflow, so {told}") from None
    place = place_on_s3(source)
    if place is None:
        raise RecordError(f"{source}: the files of {ModelReference.of_version(version)} are not on S3")
    return place


def model_faults(
    objects: Objects, version: Any, place: str, digest: str | None, files: Mapping[str, str] | None
) -> list[str]:
    """Return which files of a version are not those that were registered, and whether its card and signature hold.

    Args:
        objects: on S3.
        version: as MLflow has it.
        place: where its files lie.
        digest: that they must have together.
        files: that have this digest, with their SHA-256; None if it is unknown which these are.
    """
    there = objects.listing(place)
    found = _digests(objects, {path: a for path, a in there.items() if path not in NOT_OF_THE_MODEL})
    faults = [_difference(f"{place}/{path}", path, files, found) for path in differing(files or found, found)]
    if not faults and digest_of(found) != digest:
        faults.append(f"{place}: its {len(found)} files have the digest {digest_of(found)}, registered was {digest}")
    if CARD in found and objects.read(there[CARD]).decode(errors="replace") != (version.description or ""):
        faults.append(f"description of {ModelReference.of_version(version)} in MLflow is not its card {there[CARD]}")
    if not ModelReference(str(version.name)).is_candidate:
        faults += _signature_faults(objects, place, there)
    return faults


def _difference(address: str, path: str, stated: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
    if path not in found:
        return f"{address}: {NOT_THERE}"
    return f"{address}: {'not the bytes that were registered' if path in (stated or ()) else 'not of the model'}"


def _digests(objects: Objects, there: Mapping[str, str]) -> dict[str, str]:
    def digest(item: tuple[str, str]) -> tuple[str, str]:
        try:
            return item[0], objects.sha256(item[1])
        except MissingInStorageError:  # deleted since it was listed
            return item[0], ""

    return {path: sha256 for path, sha256 in in_parallel(digest, there.items()) if sha256}


def _signature_faults(objects: Objects, place: str, there: Mapping[str, str]) -> list[str]:
    """Verify the signature over a copy of the files, unless this was done for the same versions of the objects."""
    versions = sorted(in_parallel(lambda item: f"{item[0]} {objects.version(item[1])}", there.items()))

    def find() -> list[str]:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                verify_folder(download_model(place, Path(temporary)))
            except SignatureError as error:
                return [f"{place}/{SIGNATURE}: {error}"]
            except ModelFilesError as error:  # too many or too large, so that none was downloaded
                return [f"{place}: {error}"]
        return []

    return objects.once(f"signature {place}", "\n".join(versions), find)
