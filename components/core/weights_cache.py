"""Cache of downloaded weights on disk, verified by hash at each use."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from components.core.mlflow_client import TrackingError
from components.core.storage import atomic_dir, sha256_file, write_json

FILES = ("model.safetensors", "config.json")
HEADS = "heads.safetensors"  # only teachers are registered with them


def keep_weights(folder: Path, fetch: Callable[[Path], Path], expected_sha256: str | None) -> None:
    """Fetch model.safetensors, config.json and any heads into `folder`, unless it holds them unchanged.

    Args:
        folder: of the cached weights.
        fetch: downloads into a given empty folder and returns a folder that contains the two files side by side at any
            depth.
        expected_sha256: of model.safetensors, if known.

    Raises:
        TrackingError: no such pair of files, more than one, or an unexpected SHA-256.
    """
    digest = _kept_sha256(folder)
    if digest is None:
        with tempfile.TemporaryDirectory() as temporary:
            fetched = fetch(Path(temporary))
            found = [path.parent for path in fetched.rglob(FILES[0]) if (path.parent / FILES[1]).is_file()]
            if len(found) != 1:
                raise TrackingError(f"holds {len(found)} folders with {' and '.join(FILES)}; expected one")
            digest = sha256_file(found[0] / FILES[0])
            _check(digest, expected_sha256)
            with atomic_dir(folder) as staging:
                names = [*FILES, HEADS] if (found[0] / HEADS).is_file() else FILES
                for name in names:
                    shutil.copyfile(found[0] / name, staging / name)
                write_json(staging / "sha256.json", {name: sha256_file(staging / name) for name in names})
    _check(digest, expected_sha256)


def _check(digest: str, expected: str | None) -> None:
    if expected and digest != expected:
        raise TrackingError(f"its weights have SHA-256 {digest}, but {expected} was registered; do not use them")


def _kept_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the cached weights, if they are unchanged."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads((folder / "sha256.json").read_text())
        if all(sha256_file(folder / name) == known[name] for name in {*FILES, *known}):
            return known[FILES[0]]
    return None
