"""Batches of crops and masks, made ahead of the training step in worker processes.

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

_MASKS = 1_000_000  # third number of the masks' generators, out of the way of the crops' numbers


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: B images; crop-major, so that row g * B + i is crop g of image i."""

    global_crops: Tensor  # [G*B, 3, H, W] uint8, or float32 once normalized
    local_crops: Tensor  # [L*B, 3, h, w] likewise
    masks: Tensor | None  # [G*B, P] bool, True where the student sees the mask token; None: nothing is masked
    skipped: list[BadImage]
    gram_crops: Tensor | None = None  # [G*B, 3, sH, sW] likewise; None: the anchor sees the global crops

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies that the GPU makes beside its work; torch's loader calls this."""
        return replace(self, **{name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)})

    def normalize(self, device: torch.device) -> Batch:
        """The batch on `device`, with ImageNet's mean and standard deviation."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        crops = [to_input(c.to(device, non_blocking=True)) for c in (self.global_crops, self.local_crops)]
        gram = None if self.gram_crops is None else to_input(self.gram_crops.to(device, non_blocking=True))
        return replace(self, global_crops=crops[0], local_crops=crops[1], masks=masks, gram_crops=gram)


@dataclass(frozen=True)
class BatchPlan:
    """What determines the batches of one rank."""

    seed: int
    batch_size: int  # images over all ranks
    patch_size: int
    crops: CropConfig
    masking: MaskingConfig | None
    rank: int = 0
    num_ranks: int = 1
    gram_scale: int = 1  # of the anchor's crops; 1: it sees the global ones
    gram_after_steps: int = 0  # the step before which there is no anchor, and no crops for it


class TrainingBatches(Dataset[Batch | Exception]):
    """This rank's batch of each step. Rank r takes the r-th equal part of the step's positions."""

    def __init__(self, stream: ImageStream, plan: BatchPlan) -> None:
        if len(stream) < plan.batch_size:
            raise DatasetError(
                f"the curated set has {len(stream)} images, fewer than one batch of {plan.batch_size}: "
                "lower batch_size, or ingest more images"
            )
        self._stream, self._plan = stream, plan

    def __getitem__(self, step: int) -> Batch | Exception:
        """The batch of `step`; what makes it impossible is returned, because a worker would wrap what it raises."""
        try:
            return self._batch(step)
        except (DatasetError, StorageError) as error:
            return error

    def check_shared_memory(self, num_workers: int) -> None:
        """Raise EngineError unless batches of the ranks on this machine fit into what is free of /dev/shm."""
        plan = self._plan
        on_this_machine = plan.batch_size // plan.num_ranks * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = crop_bytes(plan.crops, on_this_machine, plan.gram_scale)
        check_shared_memory("stream.num_workers", num_workers, size)

    def _batch(self, step: int) -> Batch:
        plan = self._plan
        share = plan.batch_size // plan.num_ranks
        first = step * plan.batch_size + plan.rank * share
        if get_worker_info() is not None:  # not in the trainer itself, which will fork: threads do not survive that
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
        """This rank's part of the step's masks: drawn for all ranks together, so that their number is immaterial."""
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
        DatasetError: the curated set is unusable, or more than `max_bad_images` of it.
        StorageError: it is streamed, and S3 does not answer or refuses.
        EngineError: /dev/shm is too small for what the processes prepare.
    """
    options: dict[str, Any] = {}
    if config.num_workers:
        # Forked: a worker starts at once, without a second import of torch; it uses neither threads nor the device.
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
    """Ignore SIGTERM, which may go to the whole process group: the trainer still has a step to finish and save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack(crops: list[np.ndarray]) -> Tensor:
    """[n, 3, H, W] arrays of B images as one crop-major [n*B, 3, H, W] tensor."""
    return torch.from_numpy(np.stack(crops, axis=1).reshape(-1, *crops[0].shape[1:]))
