"""Base classes of all expected errors; any other exception is a defect of Pedigree.

Entry points (`components.cli`, `flows.cli`, the flows) print an expected error as one line and exit with its code. For
a defect they also print and store the traceback, and the last line says where.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback

TRY_AGAIN, DEFECT = os.EX_TEMPFAIL, os.EX_SOFTWARE  # 75 and 70
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a user or the machine does to a file. A missing file is not among them: where a user names a path its reader says
# so, and elsewhere Pedigree has forgotten to write it, which only a traceback explains.
FILE_TROUBLE = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
# As torch, CUDA, cuBLAS, faiss and torch's loader say it; most have no type of their own for it.
OUT_OF_MEMORY = re.compile(
    r"out of memory|allocate memory|not enough memory|ALLOC_FAILED|bad_alloc"
    r"|^DataLoader worker \(pid.*(Killed|Bus error|exited unexpectedly)"
)
TRACEBACK = "PEDIGREE_TRACEBACK"  # set by --traceback, and inherited by the processes of stages
REMOTE = re.compile(r"^Caught \w+ in DataLoader worker .*^[\w.]+: (?P<said>.*)", re.DOTALL | re.MULTILINE)


class PedigreeError(Exception):
    """An error that a user, the data, a service or the machine causes; the message says what to do."""

    exit_code = 1


class InputError(PedigreeError):
    """A command, parameter or file that a user gave cannot be used."""

    exit_code = 2


class ServiceError(PedigreeError):
    """A service or the storage failed or refused; a retry may succeed."""

    exit_code = TRY_AGAIN


class DatasetError(PedigreeError):
    """A dataset cannot be used: bad manifest, shard or splits, too many bad images, or a failed gate."""


class EngineError(PedigreeError):
    """A worker process, a rank, a Ray cluster or the memory failed."""


class OutOfMemoryError(EngineError):
    """The machine or the GPU ran out of memory; the entry point adds which setting to lower."""


def known(error: BaseException | None) -> PedigreeError | None:
    """Return the error as a `PedigreeError`; None means that it is a defect.

    Errors of libraries are converted where they arise. Only two kinds can arise anywhere: out of memory, and files that
    the system refuses to read or write.
    """
    if error is None or isinstance(error, PedigreeError):
        return error
    first = error_message(error).splitlines()[0]
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if memory or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(first)):
        return OutOfMemoryError(first if "memory" in first else f"out of memory: {first}")
    if isinstance(error, OSError) and error.errno in FILE_TROUBLE and (error.filename or error.errno in DISK_FULL):
        return PedigreeError(str(error))
    return None


def error_message(error: BaseException) -> str:
    """Return an error's message, without the worker traceback that torch's loader prepends."""
    found = REMOTE.search(str(error))
    return (found["said"] if found else str(error)).strip() or type(error).__name__


def defect(error: BaseException, where: str) -> PedigreeError:
    """Return the error to print for a defect: type, message and where its traceback is, with exit code 70."""
    said = " ".join(error_message(error).split())
    name = type(error).__name__
    line = PedigreeError(f"a defect of Pedigree: {name}{'' if said == name else f': {said}'}; traceback: {where}")
    line.exit_code = DEFECT
    return line


def show_tracebacks(enabled: bool) -> None:
    """Implement `--traceback`: show tracebacks of expected errors too, in this process and its children."""
    if enabled:
        os.environ[TRACEBACK] = "1"


def tracebacks_shown() -> bool:
    """Return whether `--traceback` was given to this process or to a parent."""
    return TRACEBACK in os.environ


def print_traceback(error: BaseException) -> None:
    """Write an error's traceback, and those of its causes, to stderr."""
    traceback.print_exception(error, file=sys.stderr)
