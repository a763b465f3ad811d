"""Where checkpoints lie: a folder, or a prefix on S3; a step is there with all its files, or not at all."""

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

KEEP = 2  # the newest, and the one before in case the newest was written by a machine that was failing
INDEX = "index.json"  # written last: what it names is all there


class CheckpointError(PedigreeError):
    """A checkpoint that cannot be written or read; the message names the folder to remove."""


@dataclass(frozen=True)
class FileFacts:
    """What the index says of one file."""

    name: str
    sha256: str
    size: int


class Store(Protocol):
    """A place for the checkpoints of one run."""

    def steps(self) -> list[int]:
        """Numbers of the whole checkpoints, ascending."""
        ...

    def describe(self, step: int) -> str:
        """Where a checkpoint lies, for a person."""
        ...

    def staging(self, step: int) -> Path:
        """The folder in which its files are written first."""
        ...

    def put(self, step: int, file: Path) -> None:
        """Hand over one file that is written."""
        ...

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Make the checkpoint whole, once the files of all ranks are handed over; drop the oldest."""
        ...

    def fetch(self, step: int) -> Path | None:
        """A folder on this machine with its files, checked; None where another rank of the machine has it."""
        ...

    def release(self, path: Path) -> None:
        """Give back what `fetch` gave."""
        ...

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        ...


class LocalStore:
    """`folder`/step_<n>, on a disk that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        """Numbers of the whole checkpoints, ascending."""
        return sorted(step_folders(self._folder))

    def describe(self, step: int) -> str:
        """Its folder."""
        return str(self._path(step))

    def staging(self, step: int) -> Path:
        """A hidden folder beside it."""
        return self._folder / f".step_{step}"

    def put(self, step: int, file: Path) -> None:
        """Nothing: it is on the disk."""

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Rename the folder into place; drop the oldest."""
        write_json(self.staging(step) / INDEX, index)
        shutil.rmtree(self._path(step), ignore_errors=True)
        self.staging(step).rename(self._path(step))
        for old in self.steps()[:-KEEP]:
            shutil.rmtree(self._path(old))

    def fetch(self, step: int) -> Path | None:
        """Its folder itself."""
        if rank() == 0:
            check_files(self._path(step))
        return self._path(step)

    def release(self, path: Path) -> None:
        """Nothing."""

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / step_folder(step)


class S3Store:
    """`uri`/step_<n>/, whose index is put last and deleted first. Credentials are read anew for every checkpoint."""

    def __init__(self, uri: str, scratch: Path) -> None:
        self._uri, self._scratch = uri.rstrip("/"), scratch
        self._bucket, self._prefix = split_s3_uri(self._uri)
        self._client: Any = None
        self._client_of: int | None = None  # the step that the client was made for

    def steps(self) -> list[int]:
        """Numbers of the checkpoints that have an index, ascending."""
        names = [key.removeprefix(f"{self._prefix}/") for key in self._keys("")]
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"step_(\d+)/{INDEX}", name)))

    def describe(self, step: int) -> str:
        """Its address."""
        return f"{self._uri}/step_{step}"

    def staging(self, step: int) -> Path:
        """A hidden folder in the scratch folder."""
        return self._scratch / f".step_{step}"

    def put(self, step: int, file: Path) -> None:
        """Upload a file, and delete it here."""
        with s3_errors(f"{self.describe(step)}/{file.name}"), file.open("rb") as data:
            self._connect(step).upload_fileobj(data, self._bucket, self._key(step, file.name))
        file.unlink()

    def commit(self, step: int, index: Mapping[str, Any]) -> None:
        """Put the index; drop the oldest."""
        with s3_errors(f"{self.describe(step)}/{INDEX}"):
            body = json.dumps(index, indent=2, sort_keys=True).encode()
            self._connect(step).put_object(Bucket=self._bucket, Key=self._key(step, INDEX), Body=body)
        shutil.rmtree(self.staging(step), ignore_errors=True)
        for old in self.steps()[:-KEEP]:
            self._delete(f"step_{old}/")

    def fetch(self, step: int) -> Path | None:
        """Download its files, once for each machine."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        self._scratch.mkdir(parents=True, exist_ok=True)
        own = f".fetched.{socket.gethostname()}."  # other machines may see this disk, too
        for left in self._scratch.glob(f"{own}*"):  # by a try that was killed
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
        """A client; a new one for a new step."""
        if self._client is None or step not in (None, self._client_of):
            self._client, self._client_of = s3_client(), step
        return self._client

    def _key(self, step: int, name: str) -> str:
        return f"{self._prefix}/step_{step}/{name}"


class WholeWriter(HuggingFaceStorageWriter):
    """Writes each rank's shards as safetensors, and hands them to a store, which shows them once all are there."""

    def __init__(self, store: Store, step: int, progress: Mapping[str, int]) -> None:
        super().__init__(str(store.staging(step)), save_distributed=True)
        self._store, self._step, self._progress = store, step, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; the results carry its name and SHA-256 to the rank that writes the index."""
        results = super().write_data(plan, planner).wait()
        facts = {}
        for name in {str(result.storage_data.relative_path) for result in results}:
            facts[name] = self._hand_over(Path(self.path) / name)
        done: Future[list[WriteResult]] = Future()
        done.set_result([replace(r, storage_data=facts[str(r.storage_data.relative_path)]) for r in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; called on the first rank after all ranks have written."""
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
    """Progress and files of the checkpoint in `path`.

    Raises:
        CheckpointError: the index is missing or not one of ours.
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
        CheckpointError: a file is missing or other than it was written.
    """
    for file in read_index(path)[1]:
        found = path / file.name
        if not found.is_file() or found.stat().st_size != file.size or sha256_file(found) != file.sha256:
            raise CheckpointError(f"{file.name} is not what was written")
