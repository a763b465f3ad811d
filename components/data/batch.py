"""Prepare batches of crops and masks in worker processes, ahead of the training step.

A batch is a pure function of (seed, step, rank, number of ranks), and all ranks' batches of a step together of
(seed, step) alone: neither the number of workers nor a restart changes what is trained on.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from components.core.errors import DatasetError
from components.core.storage import StorageError
from components.data.config import CropConfig, MaskingConfig, StreamConfig
from components.data.crops import NUM_GLOBAL, sample_crops
from components.data.masking import sample_masks
from components.data.shared_memory import PREFETCH, check_shared_memory, crop_bytes
from components.data.stream import BadImage, ImageStream, too_many_bad
from components.model.preprocessing import to_input

logger = logging.getLogger(__name__)

_MASKS = 1_000_000  # third seed of the mask generators, disjoint from those of crops


@dataclass(frozen=True)
class Batch:
    """Batch of one rank in one step: B images, crop-major, so that row g * B + i is crop g of image i."""

    global_crops: Tensor  # [G*B, 3, H, W] uint8, or float32 once normalized
    local_crops: Tensor  # [L*B, 3, h, w] likewise
    masks: Tensor | None  # [G*B, P] bool, true patches are replaced by the mask token; None: no masking
    skipped: list[BadImage]
    gram_crops: Tensor | None = None  # [G*B, 3, sH, sW] likewise; None: the Gram teacher uses the global crops

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, for asynchronous copies to the GPU; called by torch's loader."""
        return replace(self, **{name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)})

    def normalize(self, device: torch.device) -> Batch:
        """Return the batch on `device`, normalized by ImageNet's mean and standard deviation."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        crops = [to_input(c.to(device, non_blocking=True)) for c in (self.global_crops, self.local_crops)]
        gram = None if self.gram_crops is None else to_input(self.gram_crops.to(device, non_blocking=True))
        return replace(self, global_crops=crops[0], local_crops=crops[1], masks=masks, gram_crops=gram)


@dataclass(frozen=True)
class BatchPlan:
    """Everything that determines the batches of one rank."""

    seed: int
    batch_size: int  # images over all ranks
    patch_size: int
    crops: CropConfig
    masking: MaskingConfig | None
    rank: int = 0
    num_ranks: int = 1
    gram_scale: int = 1  # of the Gram teacher's crops; 1: it uses the global crops
    gram_after_steps: int = 0  # no Gram crops before this step


class TrainingBatches(Dataset[Batch | Exception]):
    """This rank's batch by step. Rank r takes the r-th equal part of the step's positions."""

    def __init__(self, stream: ImageStream, plan: BatchPlan) -> None:
        if len(stream) < plan.batch_size:
            raise DatasetError(
                f"the curated set has {len(stream)} images, fewer than one batch of {plan.batch_size}: "
                "lower batch_size, or ingest more images"
            )
        self._stream, self._plan = stream, plan

    def __getitem__(self, step: int) -> Batch | Exception:
        """Return the batch of `step`, or the expected error, because torch wraps exceptions that a worker raises."""
        try:
            return self._batch(step)
        except (DatasetError, StorageError) as error:
            return error

    def check_shared_memory(self, num_workers: int) -> None:
        """Raise EngineError unless the batches of this machine's ranks fit into the free space of /dev/shm."""
        plan = self._plan
        on_this_machine = plan.batch_size // plan.num_ranks * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = crop_bytes(plan.crops, on_this_machine, plan.gram_scale)
        check_shared_memory("stream.num_workers", num_workers, size)

    def _batch(self, step: int) -> Batch:
        plan = self._plan
        share = plan.batch_size // plan.num_ranks
        first = step * plan.batch_size + plan.rank * share
        if get_worker_info() is not None:  # not in the trainer, whose threads would not survive its forks
            for position in range(first, first + share):
                self._stream.fetch_ahead(position)
        gram_scale = plan.gram_scale if step >= plan.gram_after_steps else 1
        crop = partial(sample_crops, config=plan.crops, seed=plan.seed, gram_scale=gram_scale)
        found = [
            self._stream.find(position, partial(crop, position=position)) for position in range(first, first + share)
        ]
        gram = [item.image.gram_crops for item in found if item.image.gram_crops is not None]
        return Batch(
            global_crops=_stack([item.image.global_crops for item in found]),
            local_crops=_stack([item.image.local_crops for item in found]),
            masks=self._masks(step, share),
            skipped=[bad for item in found for bad in item.skipped],
            gram_crops=_stack(gram) if gram else None,
        )

    def _masks(self, step: int, share: int) -> Tensor | None:
        """Return this rank's part of the step's masks, which are sampled jointly for all ranks."""
        plan = self._plan
        if plan.masking is None:
            return None
        side = plan.crops.global_size // plan.patch_size
        generator = np.random.default_rng([plan.seed, step, _MASKS])
        drawn = sample_masks(NUM_GLOBAL * plan.batch_size, (side, side), plan.masking, generator)
        mine = drawn.reshape(NUM_GLOBAL, plan.num_ranks, share, side * side)[:, plan.rank]  # [G, B, P]
        return torch.from_numpy(np.ascontiguousarray(mine).reshape(NUM_GLOBAL * share, side * side))


def iterate_batches(batches: TrainingBatches, config: StreamConfig, steps: range) -> Generator[Batch, None, None]:
    """Yield the batches of `steps` in order, prepared ahead by `config.num_workers` processes.

    Raises:
        DatasetError: the curated set is unusable, or has more than `max_bad_images` bad images.
        StorageError: the set is streamed, and S3 does not answer or refuses.
        EngineError: /dev/shm is too small for the prefetched batches.
    """
    options: dict[str, Any] = {}
    if config.num_workers:
        # Fork starts workers at once, without importing torch again; workers use neither threads nor the device.
        batches.check_shared_memory(config.num_workers)
        options = {"num_workers": config.num_workers, "prefetch_factor": PREFETCH, "multiprocessing_context": "fork"}
        options["worker_init_fn"] = _leave_stopping_to_the_trainer
    loader = DataLoader(batches, batch_size=None, sampler=steps, pin_memory=torch.cuda.is_available(), **options)
    bad: dict[str, BadImage] = {}
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        for item in batch.skipped:
            if item.image_id not in bad:
                bad[item.image_id] = item
                details = (item.image_id, item.reason, len(bad), config.max_bad_images)
                logger.warning("image %s is skipped: %s (%d of at most %d)", *details)
        if len(bad) > config.max_bad_images:
            raise too_many_bad(list(bad.values()), config)
        yield batch


def _leave_stopping_to_the_trainer(_worker: int) -> None:
    """Ignore SIGTERM, which may be sent to the whole process group: the trainer must finish and save its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack(crops: list[np.ndarray]) -> Tensor:
    """[n, 3, H, W] arrays of B images as one crop-major [n*B, 3, H, W] tensor."""
    return torch.from_numpy(np.stack(crops, axis=1).reshape(-1, *crops[0].shape[1:]))
