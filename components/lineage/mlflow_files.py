"""Remove MLflow's files of unsuccessful runs of removed pipeline runs; the run records are kept."""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Iterable
from typing import Any

from components.core.mlflow_client import reported, server_uri
from components.core.stage_runs import PARENT_STAGE
from components.lineage.claims import REMOVED_TAG, mlflow_runs
from components.lineage.removal import Removal
from components.lineage.stored import S3Store

PROXIED = "mlflow-artifacts"  # scheme of artifacts that MLflow's server stores on S3
BUCKET_VARIABLE, FOLDER = "PEDIGREE_MODELS_BUCKET", "mlflow"  # where the local stack's server stores them
UNSUCCESSFUL = ("FAILED", "KILLED")


def failed_files_removal(
    client: Any, models: Iterable[str], gone: Collection[str], claimed: Collection[str]
) -> Removal:
    """Plan the removal of files of unsuccessful MLflow runs, and of tagging removed pipeline runs in MLflow.

    Args:
        client: MLflow's.
        models: names of the trained models.
        gone: ids of removed pipeline runs.
        claimed: MLflow runs of registered versions.
    """
    names = [name for name in gone if "'" not in name]  # run ids never contain quotes
    found = [run for name in names for run in mlflow_runs(client, models, f"tags.`pedigree.run` = '{name}'")]
    failed = [run.info for run in found if run.info.status in UNSUCCESSFUL and run.info.run_id not in claimed]
    sizes = {info.run_id: _size(client, info.run_id) for info in failed}
    going = {f"{info.run_name} ({info.run_id})": sizes[info.run_id] for info in failed if sizes[info.run_id]}

    def carry_out() -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with reported():
            for run in found:
                if run.data.tags.get("pedigree.stage") == PARENT_STAGE:
                    client.set_tag(run.info.run_id, REMOVED_TAG, now)
            for info in failed:
                _delete_files(info)

    return Removal("MLflow files of failed runs", going, 0, carry_out)


def place_on_s3(uri: str) -> str | None:
    """Return where artifacts lie on S3; None if they do not, or the server's bucket is not known."""
    scheme, _, path = uri.partition(":/")
    if scheme == PROXIED and (bucket := os.environ.get(BUCKET_VARIABLE)):
        return f"s3://{bucket}/{FOLDER}/{path.strip('/')}"
    return uri.rstrip("/") if scheme == "s3" else None


def _size(client: Any, run_id: str, path: str | None = None) -> int:
    with reported():
        files = client.list_artifacts(run_id, path)
    return sum(_size(client, run_id, file.path) if file.is_dir else file.file_size or 0 for file in files)


def _delete_files(info: Any) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(info.artifact_uri, tracking_uri=server_uri()).delete_artifacts()
    if info.artifact_uri.startswith(PROXIED) and (place := place_on_s3(info.artifact_uri)):
        store = S3Store(f"{place}/")
        # The bucket is versioned, and MLflow deletes only the latest versions.
        store.remove({name: item for name, item in store.listing(("",)).items() if not item.there})
