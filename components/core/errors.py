"""The root of all errors that are not defects of Pedigree, and how a front door tells the two apart.

A front door (`components.cli`, `flows.cli`, the flows) shows an error of this root in one clear line and ends with its
exit code. Whatever else is raised is a defect: its traceback is shown and kept, and the last line says where.
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
TRACEBACK = "PEDIGREE_TRACEBACK"  # set by --traceback, so that the processes of stages show theirs too
REMOTE = re.compile(r"^Caught \w+ in DataLoader worker .*^[\w.]+: (?P<said>.*)", re.DOTALL | re.MULTILINE)


class PedigreeError(Exception):
    """What a user, the data, a service or the machine causes; the message says what was given and what to do."""

    exit_code = 1


class InputError(PedigreeError):
    """A command, parameter or file that a user gave cannot be used."""

    exit_code = 2


class ServiceError(PedigreeError):
    """A service or the storage does not do what was asked: worth another try."""

    exit_code = TRY_AGAIN


class DatasetError(PedigreeError):
    """A dataset cannot be used: its manifest, a shard, its splits, too many of its images, or a gate's expectation."""


class EngineError(PedigreeError):
    """What the work runs on failed: a worker process, a rank, a Ray cluster, memory."""


class OutOfMemoryError(EngineError):
    """Memory of the machine or the GPU ran out; a front door adds what to lower."""


def known(error: BaseException | None) -> PedigreeError | None:
    """The error as one of this root; None: it is a defect.

    Errors of libraries are turned into ours where they arise. Only two kinds can arise everywhere: memory that runs
    out, and files that the machine refuses to read or write.
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
    """What an error says, without the traceback that torch's loader puts before the words of its workers."""
    found = REMOTE.search(str(error))
    return (found["said"] if found else str(error)).strip() or type(error).__name__


def defect(error: BaseException, where: str) -> PedigreeError:
    """The last line about a defect: its type and message, and where its traceback is, with the exit code 70."""
    said = " ".join(error_message(error).split())
    name = type(error).__name__
    line = PedigreeError(f"a defect of Pedigree: {name}{'' if said == name else f': {said}'}; traceback: {where}")
    line.exit_code = DEFECT
    return line


def show_tracebacks(asked: bool) -> None:
    """Show tracebacks of known errors too, in this process and those that it starts: what `--traceback` does."""
    if asked:
        os.environ[TRACEBACK] = "1"


def tracebacks_shown() -> bool:
    """Whether this process, or one that started it, was asked for the tracebacks of known errors."""
    return TRACEBACK in os.environ


def print_traceback(error: BaseException) -> None:
    """Write an error's traceback, and those of its causes, to stderr."""
    traceback.print_exception(error, file=sys.stderr)
