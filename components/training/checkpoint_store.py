"""Stores for checkpoints, a folder or an S3 prefix; a checkpoint is visible with all its files or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from components.core.distributed import rank
from components.core.errors import PedigreeError
from components.core.progress import CHECKPOINT_LINE
from components.core.storage import s3_client, s3_errors, sha256_file, split_s3_uri, write_json
from components.training.run_folder import step_folder, step_folders

logger = logging.getLogger(__name__)

KEEP = 2  # the newest, and the previous one in case a failing machine wrote the newest
INDEX = "index.json"  # written last, when all files that it names exist


class CheckpointError(PedigreeError):
    """A checkpoint cannot be written or read; the message names the folder to remove."""


@dataclass(frozen=True)
class FileFacts:
    """Entry of the index for one file."""

    name: str
    sha256: str
    size: int


class Store(Protocol):
    """Storage for the checkpoints of one run."""

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        ...

    def describe(self, step: int) -> str:
        """Return the location of a checkpoint for messages."""
        ...

    def staging(self, step: int) -> Path:
        """Return the staging directory of a checkpoint."""
        ...

    def put(self, step: int, file: Path) -> None:
        """Store one staged file."""
        ...

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Publish the checkpoint, once the files of all ranks are stored; delete the oldest."""
        ...

    def fetch(self, step: int) -> Path | None:
        """Return a local folder with the verified files; None if another rank of this machine fetches them."""
        ...

    def release(self, path: Path) -> None:
        """Release a folder that `fetch` returned."""
        ...

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        ...


class LocalStore:
    """Checkpoints in `folder`/step_<n>, on a disk that all ranks share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(step_folders(self._folder))

    def describe(self, step: int) -> str:
        """Return the checkpoint's folder."""
        return str(self._path(step))

    def staging(self, step: int) -> Path:
        """Return a hidden folder beside the checkpoint's."""
        return self._folder / f".step_{step}"

    def put(self, step: int, file: Path) -> None:
        """Do nothing; the file is in place."""

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Rename the folder into place; delete the oldest."""
        write_json(self.staging(step) / INDEX, index)
        shutil.rmtree(self._path(step), ignore_errors=True)
        self.staging(step).rename(self._path(step))
        for old in self.steps()[:-KEEP]:
            shutil.rmtree(self._path(old))

    def fetch(self, step: int) -> Path | None:
        """Verify the files on rank 0 and return the folder."""
        if rank() == 0:
            check_files(self._path(step))
        return self._path(step)

    def release(self, path: Path) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / step_folder(step)


class S3Store:
    """Checkpoints in `uri`/step_<n>/; the index is put last and deleted first. Each checkpoint reloads credentials."""

    def __init__(self, uri: str, scratch: Path) -> None:
        self._uri, self._scratch = uri.rstrip("/"), scratch
        self._bucket, self._prefix = split_s3_uri(self._uri)
        self._client: Any = None
        self._client_of: int | None = None  # the step that the client was made for

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that have an index, ascending."""
        names = [key.removeprefix(f"{self._prefix}/") for key in self._keys("")]
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"step_(\d+)/{INDEX}", name)))

    def describe(self, step: int) -> str:
        """Return the checkpoint's address."""
        return f"{self._uri}/step_{step}"

    def staging(self, step: int) -> Path:
        """Return a hidden folder in the scratch folder."""
        return self._scratch / f".step_{step}"

    def put(self, step: int, file: Path) -> None:
        """Upload a file and delete the local one."""
        with s3_errors(f"{self.describe(step)}/{file.name}"), file.open("rb") as data:
            self._connect(step).upload_fileobj(data, self._bucket, self._key(step, file.name))
        file.unlink()

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Upload the index; delete the oldest."""
        with s3_errors(f"{self.describe(step)}/{INDEX}"):
            body = json.dumps(index, indent=2, sort_keys=True).encode()
            self._connect(step).put_object(Bucket=self._bucket, Key=self._key(step, INDEX), Body=body)
        shutil.rmtree(self.staging(step), ignore_errors=True)
        for old in self.steps()[:-KEEP]:
            self._delete(f"step_{old}/")

    def fetch(self, step: int) -> Path | None:
        """Download the files, once per machine, and verify them."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        self._scratch.mkdir(parents=True, exist_ok=True)
        own = f".fetched.{socket.gethostname()}."  # other machines may share this disk
        for left in self._scratch.glob(f"{own}*"):  # from a killed process
            shutil.rmtree(left, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=own, dir=self._scratch))
        with s3_errors(self.describe(step)):
            client = self._connect(step)
            client.download_file(self._bucket, self._key(step, INDEX), str(path / INDEX))
            for facts in read_index(path)[1]:
                client.download_file(self._bucket, self._key(step, facts.name), str(path / facts.name))
        check_files(path)
        return path

    def release(self, path: Path) -> None:
        """Delete what was downloaded."""
        shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        self._delete("")

    def _delete(self, below: str) -> None:
        keys = sorted(self._keys(below), key=lambda key: not key.endswith(f"/{INDEX}"))
        with s3_errors(self._uri):
            for key in keys:
                self._connect().delete_object(Bucket=self._bucket, Key=key)

    def _keys(self, below: str) -> list[str]:
        with s3_errors(self._uri):
            pages = self._connect().get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/{below}")
            return [item["Key"] for page in found for item in page.get("Contents", [])]

    def _connect(self, step: int | None = None) -> Any:
        """Return a client; create a new one for each step."""
        if self._client is None or step not in (None, self._client_of):
            self._client, self._client_of = s3_client(), step
        return self._client

    def _key(self, step: int, name: str) -> str:
        return f"{self._prefix}/step_{step}/{name}"


class WholeWriter(HuggingFaceStorageWriter):
    """Write each rank's shards as safetensors into a store, which publishes them once all are complete."""

    def __init__(self, store: Store, step: int, progress: Mapping[str, int]) -> None:
        super().__init__(str(store.staging(step)), save_distributed=True)
        self._store, self._step, self._progress = store, step, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; return its name and SHA-256 to the rank that writes the index."""
        results = super().write_data(plan, planner).wait()
        facts = {}
        for name in {str(result.storage_data.relative_path) for result in results}:
            facts[name] = self._hand_over(Path(self.path) / name)
        done: Future[list[WriteResult]] = Future()
        done.set_result([replace(r, storage_data=facts[str(r.storage_data.relative_path)]) for r in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; called on rank 0 after all ranks have written."""
        files = {result.storage_data for of_rank in results for result in of_rank}
        others = [path for path in Path(self.path).iterdir() if path.suffix != ".safetensors"]
        files |= {self._hand_over(path) for path in others}
        described = {file.name: {"sha256": file.sha256, "size": file.size} for file in files}
        self._store.commit(self._step, {"format_version": 1, "progress": dict(self._progress), "files": described})
        logger.info(CHECKPOINT_LINE, self._step)

    def _hand_over(self, path: Path) -> FileFacts:
        facts = FileFacts(path.name, sha256_file(path), path.stat().st_size)
        self._store.put(self._step, path)
        return facts


def read_index(path: Path) -> tuple[dict[str, int], list[FileFacts]]:
    """Read progress and files of the checkpoint in `path`.

    Raises:
        CheckpointError: the index is missing or malformed.
    """
    try:
        index = json.loads((path / INDEX).read_text())
        files = [FileFacts(name, str(f["sha256"]), int(f["size"])) for name, f in index["files"].items()]
        progress = {str(name): int(count) for name, count in index["progress"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX}: {str(error) or type(error).__name__}") from None
    if bad := [file.name for file in files if Path(file.name).name != file.name]:
        raise CheckpointError(f"{INDEX} names {bad[0]!r}, which is no file of a checkpoint")
    return progress, files


def check_files(path: Path) -> None:
    """Compare all files of the checkpoint in `path` with its index.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    for file in read_index(path)[1]:
        found = path / file.name
        if not found.is_file() or found.stat().st_size != file.size or sha256_file(found) != file.sha256:
            raise CheckpointError(f"{file.name} is not what was written")
