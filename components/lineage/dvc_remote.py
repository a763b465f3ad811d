"""Read the DVC remote on S3 without DVC: objects are addressed by md5."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.core.storage import MissingInStorageError, s3_client, s3_errors, split_s3_uri
from components.lineage.lock_file import RecordError, file_md5

BUCKET_VARIABLE = "PEDIGREE_DATA_BUCKET"


class Remote:
    """Objects of a DVC remote.

    Args:
        url: `s3://bucket/prefix`; None takes the bucket that PEDIGREE_DATA_BUCKET names.

    Raises:
        RecordError: no address, or one that is not on S3.
    """

    def __init__(self, url: str | None) -> None:
        bucket = os.environ.get(BUCKET_VARIABLE)
        self.url = url or (f"s3://{bucket}" if bucket else "")
        try:
            self._bucket, self._prefix = split_s3_uri(self.url)
        except ValueError:
            where = f"set it in .dvc/config or {BUCKET_VARIABLE}"
            raise RecordError(f"DVC remote {self.url or '(none)'}: not on S3; {where}") from None
        self._client = s3_client()

    def address(self, dvc_id: str) -> str:
        """Return the S3 address of an object by its id (`<md5>` or `<md5>.dir`)."""
        return f"s3://{self._bucket}/{self._key(dvc_id)}"

    def listing(self, dvc_id: str) -> dict[str, str]:
        """Return the files of a tracked folder: path -> md5."""
        return {item["relpath"]: item["md5"] for item in json.loads(self.read(dvc_id))}

    def read(self, dvc_id: str) -> bytes:
        """Return the bytes of an object."""
        with s3_errors(self.address(dvc_id)):
            return self._client.get_object(Bucket=self._bucket, Key=self._key(dvc_id))["Body"].read()

    def read_range(self, dvc_id: str, offset: int, length: int) -> bytes:
        """Return a part of an object."""
        part = f"bytes={offset}-{offset + length - 1}"
        with s3_errors(self.address(dvc_id)):
            return self._client.get_object(Bucket=self._bucket, Key=self._key(dvc_id), Range=part)["Body"].read()

    def versions(self, dvc_ids: Iterable[str]) -> dict[str, str]:
        """Return the S3 version of each object, `null` in a bucket without versions; missing objects are left out."""
        ids = sorted(set(dvc_ids))
        with ThreadPoolExecutor(10) as pool:
            found = zip(ids, pool.map(self._version, ids), strict=True)
            return {dvc_id: version for dvc_id, version in found if version is not None}

    def file(self, folder: Path, path: str, md5: str) -> bytes:
        """Return a file of a tracked folder, from disk if it has this md5 there, else from the remote."""
        local = folder / path
        return local.read_bytes() if local.is_file() and file_md5(local) == md5 else self.read(md5)

    def _version(self, dvc_id: str) -> str | None:
        try:
            with s3_errors(self.address(dvc_id)):
                head = self._client.head_object(Bucket=self._bucket, Key=self._key(dvc_id))
        except MissingInStorageError:
            return None
        return head.get("VersionId", "null")

    def _key(self, dvc_id: str) -> str:
        return "/".join(part for part in (self._prefix, "files/md5", dvc_id[:2], dvc_id[2:]) if part)
