"""Check the free space of /dev/shm, by which loader processes pass batches; torch hangs if it is full."""

from __future__ import annotations

import shutil
from pathlib import Path

from components.core.errors import EngineError
from components.data.config import NUM_GLOBAL, CropConfig

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each process prepares ahead
MIB = 2**20


def crop_bytes(crops: CropConfig, num_images: int, gram_scale: int = 1) -> int:
    """Return the bytes of one batch's crops, as uint8 RGB."""
    global_area = crops.global_size**2 * NUM_GLOBAL * (1 if gram_scale == 1 else 1 + gram_scale**2)
    return 3 * num_images * (global_area + crops.num_local * crops.local_size**2)


def check_shared_memory(key: str, num_workers: int, batch_bytes: int) -> None:
    """Check that the batches of `num_workers` processes fit into the free space of /dev/shm.

    Args:
        key: config key of the number of processes.
        num_workers: processes; 0 uses no shared memory.
        batch_bytes: of one batch of every rank on this machine.

    Raises:
        EngineError: they do not fit; the message names a number that does.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    free, held = shutil.disk_usage(SHARED_MEMORY).free, PREFETCH * num_workers + 1  # and the one in use
    if held * batch_bytes > free:
        fits = max(0, (free // batch_bytes - 1) // PREFETCH)
        raise EngineError(
            f"{SHARED_MEMORY} has {free / MIB:,.0f} MiB free, and {key}={num_workers} keeps up to {held} batches of "
            f"{batch_bytes / MIB:,.1f} MiB there: set {key}={fits}, or enlarge it (docker run --shm-size=2g; "
            f"mount -o remount,size=2g {SHARED_MEMORY})"
        )
