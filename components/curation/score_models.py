"""Find and open the ONNX files of scores, single-threaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.curation.config import CurationError


def find_file(path: str, root: Path, key: str) -> Path:
    """Return the file that the config key `key` names, relative to the workspace `root`.

    Raises:
        CurationError: the file does not exist.
    """
    found = root / path
    if not found.is_file():
        raise CurationError(f"{key}: {found}: no such file; an ONNX file is needed")
    return found


def open_onnx(path: Path) -> Any:
    """Open a single-threaded CPU session, so that scores do not depend on the number of cores.

    Raises:
        CurationError: onnxruntime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise CurationError(f"{path} needs onnxruntime: pip install 'pedigree[safety]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        raise CurationError(f"{path}: not a usable ONNX file: {str(error).splitlines()[0]}") from None


def run_onnx(session: Any, path: Path, pixels: Any) -> Any:
    """Return the first output for one input.

    Raises:
        CurationError: the file does not take arrays of this shape.
    """
    try:
        return session.run(None, {session.get_inputs()[0].name: pixels})[0]
    except Exception as error:  # as above
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CurationError(f"{path}: cannot take an input of shape {list(pixels.shape)}: {last}") from None
