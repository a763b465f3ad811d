"""The files of a registered model: their digests, what differs from those that were registered, and programs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from components.core.errors import PedigreeError
from components.core.storage import sha256_file

FILES_TAG = "pedigree.files"  # on a model version: path -> SHA-256 of every file, as JSON
SIGNATURE = "model.sig"  # beside the files that it signs
META_FILE = "registered_model_meta"  # MLflow writes it into a downloaded copy
NOT_OF_THE_MODEL = (SIGNATURE, META_FILE)
MAX_FILES, MAX_GIB = 1000, 64.0  # of a model; ours have some 50 files
MAX_RECORD_GIB = 1.0  # of a folder of it that is read into memory
# How files begin that run code when they are read, or hold more than they seem to. A safetensors file may begin as a
# pickle does; its own reader takes nothing but tensors.
HOSTILE = {
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
    "a zip archive, as torch.save writes them": re.compile(rb"PK\x03\x04"),
    "a compressed file": re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"),
}


class ModelFilesError(PedigreeError):
    """The files of a model are not those that were registered, or must not be released; the message names them."""


def check_list(files: Iterable[tuple[str, int]], max_gib: float) -> None:
    """Refuse a list of more or larger files than a model has, or with a path out of it; reads no further than it must.

    Args:
        files: names with bytes.
        max_gib: of all of them together.

    Raises:
        ModelFilesError: names the file at which the limit is passed, or that would lie elsewhere.
    """
    size = 0
    for number, (name, num_bytes) in enumerate(files, start=1):
        size += num_bytes
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ModelFilesError(f"the path {name!r} leads out of the model; do not use it")
        if number > MAX_FILES:
            raise ModelFilesError(f"more than {MAX_FILES} files, first too many: {name}; not a model, do not use it")
        if size > max_gib * 2**30:
            raise ModelFilesError(f"more than {max_gib:g} GiB, with {name} ({num_bytes} bytes); do not use it")


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder, by path; neither the signature nor what MLflow adds is among them."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256_file(path) for name, path in files.items() if name not in NOT_OF_THE_MODEL}


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a model: SHA-256 over the lines `path sha256`, sorted by path."""
    return hashlib.sha256("".join(f"{path} {files[path]}\n" for path in sorted(files)).encode()).hexdigest()


def differing_files(folder: Path, tags: Mapping[str, str]) -> list[str]:
    """Paths of the files that were changed, added or removed since the version with these tags was registered.

    Raises:
        ModelFilesError: the tags name no files.
    """
    try:
        stated = dict(json.loads(tags[FILES_TAG]))
    except (KeyError, ValueError, TypeError):
        raise ModelFilesError(f"has no tag {FILES_TAG} that names its files, so they cannot be checked") from None
    return differing(stated, file_digests(folder))


def differing(stated: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Paths that have another digest in the one than in the other, or are in one only; sorted."""
    return sorted(path for path in stated.keys() | found.keys() if stated.get(path) != found.get(path))


def check_harmless(folder: Path) -> None:
    """Refuse a model with a file that could run code when it is read, that unpacks to more than it seems, or too many.

    Raises:
        ModelFilesError: names the file and what it is.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    check_list(((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files), MAX_GIB)
    for path in files:
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            begin = file.read(8)
        for what, pattern in HOSTILE.items():
            if pattern.match(begin) and not name.endswith(".safetensors"):
                raise ModelFilesError(f"{name} is {what}; a model holds safetensors and text only, register it again")
