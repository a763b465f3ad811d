"""Released models on S3: the bytes of an approved model under a prefix that training does not write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from botocore.exceptions import ClientError

from components.core.model_files import SIGNATURE, check_harmless
from components.core.signing import sign_folder, signing_key_id
from components.core.storage import s3_client, s3_errors
from components.lineage.provenance import WEIGHTS_FILE
from components.registry.publish import RegistryError

BUCKET_VARIABLE = "PEDIGREE_MODELS_BUCKET"
MAX_PUT_BYTES = 5 * 1024**3  # S3's limit of one conditional put


class Released:
    """The released models of the bucket that PEDIGREE_MODELS_BUCKET names.

    Raises:
        RegistryError: the variable is not set.
    """

    def __init__(self) -> None:
        bucket = os.environ.get(BUCKET_VARIABLE)
        if not bucket:
            raise RegistryError(
                f"{BUCKET_VARIABLE} is not set: name the bucket of released models, or run `pedigree up`"
            )
        self.bucket = bucket
        self._client = s3_client()

    def copy_in(self, folder: Path, files: Mapping[str, str], name: str, digest: str) -> str:
        """Write the files and their signature under `released/<name>/<digest>/` and return that URI.

        Files that are there already are compared; the signature is always new.

        Args:
            folder: the verified model.
            files: its files by path, with their SHA-256.
            name: registered model.
            digest: of the whole model.

        Raises:
            RegistryError: S3 holds other bytes there.
            ModelFilesError: a file could run code when it is read.
            WeightsError: the weights are damaged, or not finite.
            SignatureError: there is no key to sign with, or no public key of it.
            StorageError: S3 refuses or does not answer.
        """
        from components.model.export import open_backbone  # torch: seconds, which a rollback or a rejection lacks

        prefix = f"released/{name}/{digest}"
        check_harmless(folder)
        for weights in folder.rglob(WEIGHTS_FILE):
            open_backbone(weights.parent)
        sign_folder(folder)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: self._put(folder / path, f"{prefix}/{path}", files[path]), files))
        with s3_errors(f"s3://{self.bucket}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{prefix}/")
            found = (item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", []))
            foreign = next((path for path in found if path not in {*files, SIGNATURE}), None)
            if foreign is not None:
                raise RegistryError(f"s3://{self.bucket}/{prefix}: files that are not of this model, first {foreign}")
            self._client.upload_file(str(folder / SIGNATURE), self.bucket, f"{prefix}/{SIGNATURE}")
        return f"s3://{self.bucket}/{prefix}"

    def is_signed(self, name: str, digest: str) -> bool:
        """Whether a signature lies beside the released files; versions of before lack one, and it is not verified."""
        key = f"released/{name}/{digest}/{SIGNATURE}"
        with s3_errors(f"s3://{self.bucket}/{key}"):
            return bool(self._client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1).get("Contents"))

    def signature(self, name: str, digest: str) -> dict[str, str]:
        """Return the SHA-256 of the signature beside released files, and the id of the key that verifies it.

        Raises:
            SignatureError: there is no public key.
            StorageError: there is no signature, or S3 does not answer.
        """
        key = f"released/{name}/{digest}/{SIGNATURE}"
        with s3_errors(f"s3://{self.bucket}/{key}"):
            return {"sha256": self._sha256(key), "key": signing_key_id()}

    def _put(self, file: Path, key: str, sha256: str) -> None:
        if file.stat().st_size > MAX_PUT_BYTES:
            raise RegistryError(f"{file.name}: more than 5 GiB in one file; export the weights in parts")
        with s3_errors(f"s3://{self.bucket}/{key}"):
            try:
                with file.open("rb") as body:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=body, IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in {409, 412}:
                    raise
            if self._sha256(key) != sha256:  # read back: also what an earlier, interrupted promotion wrote
                raise RegistryError(
                    f"s3://{self.bucket}/{key}: holds other bytes than the candidate; nothing was promoted"
                )

    def _sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._client.get_object(Bucket=self.bucket, Key=key)["Body"].iter_chunks(1024**2):
            digest.update(chunk)
        return digest.hexdigest()
