"""Write local outputs atomically, and access S3 by the standard AWS variables."""

# pyright: reportMissingTypeStubs=false
# (boto3 and botocore have none)

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from components.core.errors import DISK_FULL, PedigreeError, ServiceError
from components.core.locks import try_lock, wait_for_lock

CONNECT_SECONDS = 5
READ_SECONDS = 60
ATTEMPTS = 4  # of one request, with exponential backoff
MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchBucket")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")

# What `atomic_dir` keeps in the directory `.NAME.RANDOM` beside NAME while it writes.
SCRATCH = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}")
LOCK, OLD = "lock", "old"


class StorageError(ServiceError):
    """The object store did not answer, or refused."""


class MissingInStorageError(StorageError):
    """A bucket or object does not exist; a retry does not help."""

    exit_code = PedigreeError.exit_code


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Add `path` and advice to disk-full errors inside the block; few libraries name the path."""
    try:
        yield
    except Exception as error:
        rust = f"(os error {errno.ENOSPC})" in str(error)  # safetensors
        number = errno.ENOSPC if rust else getattr(error, "errno", None)
        if number in DISK_FULL and not getattr(error, "filename", None):
            raise OSError(number, f"{os.strerror(number)}; free some, then run again", os.fspath(path)) from error
        raise


@contextmanager
def atomic_dir(path: Path) -> Generator[Path]:
    """Yield an empty directory that replaces `path` if the block succeeds, and is deleted otherwise.

    Leftovers of killed writers in `path`'s parent are cleaned up first, by `recover_dirs`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_dirs(path.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with disk_errors(path), (scratch / f"{LOCK}.new").open("w") as lock:
            wait_for_lock(lock)
            (scratch / f"{LOCK}.new").rename(scratch / LOCK)  # never visible without being locked
            staging = scratch / "new"
            staging.mkdir()
            staging.chmod(0o755)
            yield staging
            # Renamed rather than deleted first: deleting a large folder is slow, and a kill would leave neither.
            if path.exists():
                path.rename(scratch / OLD)
            staging.rename(path)
    finally:
        _settle(scratch, path)


def recover_dirs(parent: Path) -> None:
    """Clean up after killed writers of `atomic_dir` in `parent`: restore what they renamed, delete the rest.

    A living writer holds its lock and is skipped.
    """
    for lock in parent.glob(f".*/{LOCK}"):
        scratch = SCRATCH.fullmatch(lock.parent.name)
        with suppress(OSError):  # deleted meanwhile, or owned by another user
            if scratch:
                with lock.open("r+") as file:
                    if try_lock(file):
                        _settle(lock.parent, parent / scratch["name"])


def _settle(scratch: Path, path: Path) -> None:
    """Finish a write to `path`: restore the old folder if there is no new one, and delete the scratch folder."""
    deleted = scratch / "deleted"  # renamed first, so that a half-deleted folder is never restored
    with suppress(FileNotFoundError):
        (scratch / OLD).rename(deleted if path.exists() else path)
    for folder in (deleted, scratch / "new", scratch):  # the lock last: `recover_dirs` finds leftovers by it
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically: readers see the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with disk_errors(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes; refuse NaN."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_dir(path: Path) -> str:
    """SHA-256 over the sorted (relative path, SHA-256) pairs of all files below `path`, in hex."""
    lines = (f"{p.relative_to(path).as_posix()} {sha256_file(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def s3_client() -> Any:
    """Return a boto3 S3 client configured by the standard AWS variables (endpoint, keys, region).

    It uses path addressing and plain checksums, which every S3 server understands.
    """
    import boto3
    from botocore.config import Config as ClientConfig

    settings = ClientConfig(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with s3_errors("S3"):
        # A new session: boto3's default session is not thread-safe and caches credentials.
        own = _botocore_session()
        session: Any = boto3.Session(botocore_session=own)
        own.register_component("data_loader", _data_loader())
        return session.client("s3", config=settings)


@cache
def _data_loader() -> Any:
    """Return the loader of service descriptions that all clients share: to read that of S3 takes most of their time."""
    return _botocore_session().get_component("data_loader")


def _botocore_session() -> Any:
    import botocore.session

    sessions: Any = botocore.session  # untyped
    return sessions.get_session()


@contextmanager
def s3_errors(what: str) -> Generator[None]:
    """Convert errors of botocore inside the block into one line about `what`, such as `s3://bucket/key`.

    Raises:
        StorageError: in place of the botocore error; `MissingInStorageError` for a missing bucket or object.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    try:
        yield
    except ParamValidationError as error:  # an invalid bucket name
        raise MissingInStorageError(f"{what}: {' '.join(str(error).split())}") from error
    except ClientError as error:
        refused: Any = error  # its response is untyped
        answer: dict[str, Any] = refused.response.get("Error", {})
        missing = answer.get("Code") in MISSING
        raise (MissingInStorageError if missing else StorageError)(f"{what}: {_explain_refusal(answer)}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(_explain_silence(error)) from error


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be a prefix or empty.

    Raises:
        ValueError: not of that form.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ValueError(f"{uri}: expected s3://BUCKET/PREFIX")
    return bucket, key


def _explain_refusal(answer: Mapping[str, Any]) -> str:
    code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
    if code == "NoSuchBucket":
        return "no such bucket; check its name and AWS_ENDPOINT_URL"
    if code in MISSING:
        return "no such object"
    if code in {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
        return f"access denied ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in {*EXPIRED, "400"}:  # 400: the answer to a HEAD request has no body with the reason
        said = "refused without a reason (400), as where credentials have expired"
        said = said if code == "400" else f"credentials expired ({code})"
        names = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        return f"{said}; set new {names}, and start again"
    return f"{message or 'refused'} ({code})"


def _explain_silence(error: Exception) -> str:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or start `pedigree up`"
    reason = str(error).splitlines()[0]
    advice = "start it with `pedigree up` or set AWS_ENDPOINT_URL"
    return f"S3 at {endpoint or 'AWS (AWS_ENDPOINT_URL is not set)'} does not answer: {reason}; {advice}"
