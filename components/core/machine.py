"""What of a machine can change the bits of a result: processor, threads, accelerator, libraries."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

MACHINE = "machine"  # key of a stage's result
LIBRARIES = ("torch", "numpy", "faiss-cpu", "pillow")


def describe_machine() -> dict[str, Any]:
    """Return what this process runs on; `threads` are those of torch, if the process has loaded it."""
    torch: Any = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads() if torch else len(os.sched_getaffinity(0)),
        "accelerator": gpu,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    """Return the model of the processor, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
