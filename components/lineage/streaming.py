"""Prepare training on a machine without the images: fetch the manifest only, and stream the shards.

`dvc.lock` names the version of `data/curated`, and its listing on the remote the object of each shard; `data.stream`
reads ranges of these objects. This requires a clone of the repository and the S3 variables, but not DVC.
"""

from __future__ import annotations

import logging
from pathlib import Path

from components.core.layout import RELATIVE, Layout
from components.core.storage import write_bytes, write_json
from components.data.manifest import MANIFEST
from components.data.stream import ADDRESSES
from components.lineage.dvc_remote import Remote
from components.lineage.lock_file import LOCK, Record, RecordError

CURATED = str(RELATIVE.curated)

log = logging.getLogger(__name__)


def prepare_stream(root: Path) -> bool:
    """Fetch the manifest and write the address of each shard, unless the curated set is on disk.

    Returns:
        Whether the curated set will be streamed.

    Raises:
        RecordError: `dvc.lock` has no curated set with a manifest, or the DVC remote is not on S3.
        StorageError: S3 does not answer or refuses.
    """
    if (root / CURATED / MANIFEST).is_file() or not (root / LOCK).is_file():
        return False
    record = Record(root)
    version = record.output(CURATED)
    if version is None:
        raise RecordError(f"dvc.lock knows no {CURATED}, and it is not on disk; curate first, or pull a later commit")
    remote = Remote(record.remote_url())
    stream_from(remote, version, root)
    log.info("%s is not on disk: its shards are streamed from %s", CURATED, remote.url)
    return True


def stream_from(remote: Remote, version: str, root: Path) -> None:
    """Write manifest and shard addresses of a version of the curated set into the workspace at `root`.

    Raises:
        RecordError: the version has no manifest.
        StorageError: S3 does not answer or refuses, or the version does not exist.
    """
    files = remote.listing(version)
    if MANIFEST not in files:
        raise RecordError(f"{CURATED} of dvc.lock ({version}) has no {MANIFEST}; curate again")
    streamed = Layout(root).streamed
    write_json(streamed / ADDRESSES, {n: remote.address(m) for n, m in files.items() if n.endswith(".tar")})
    write_bytes(streamed / MANIFEST, remote.read(files[MANIFEST]))
