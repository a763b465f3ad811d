"""Tokens of all images of an evaluation set, computed once for each model and shared by all protocols and later calls.

They are kept as memory-mapped arrays below the cache, by the hash of the weights, the version of the set and how the
images are scaled, so that the champion's are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from components.core.distributed import barrier, rank, world_size
from components.core.locks import exclusive
from components.core.progress import progress
from components.core.storage import atomic_dir
from components.data.shared_memory import check_shared_memory
from components.model.config import Preprocessing
from components.model.preprocessing import to_input
from components.model.vit import VisionTransformer, ViTOutput

VERSION = 2  # raise it whenever a change here changes the arrays
LAYERS = 4  # last ones, which linear probes and dense protocols read (METHOD.md 6.1); of shallower networks all
BATCH_PATCHES = 2**14  # computed at once
CLS, MEAN, PATCHES, PASS = "cls.npy", "mean_patch.npy", "patches.npy", "pass.json"


class Images(Protocol):
    """Images of one size, [S, S, 3] uint8 each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Tokens:
    """Memory-mapped tokens of N images after the last norm.

    Attributes:
        cls: [N, L, D] float32, class tokens of the last L layers, deepest last.
        mean_patch: [N, D] float32, mean patch tokens of the last layer.
        patches: [N, P, L * D] float16, patch tokens of the last L layers side by side, row by row of the grid; None
            unless asked for.
        rows: of the patch grid.
        device_seconds: wall-clock time of the pass that computed them, whenever it was, summed over its devices.
    """

    cls: NDArray[np.float32]
    mean_patch: NDArray[np.float32]
    patches: NDArray[np.float16] | None
    rows: int
    device_seconds: float = 0.0

    @property
    def features(self) -> NDArray[np.float32]:
        """Class tokens of the last layer, [N, D]."""
        return self.cls[:, -1]


def joined(first: Tokens, rows: NDArray[np.int64], second: Tokens) -> Tokens:
    """Return the tokens of some rows, then those of another set, in memory and without patch tokens."""
    cls, mean = (
        np.concatenate([one[rows], two])
        for one, two in ((first.cls, second.cls), (first.mean_patch, second.mean_patch))
    )
    return Tokens(cls, mean, None, second.rows, first.device_seconds + second.device_seconds)


def of_clips(frames: Tokens, rows: NDArray[np.int64], *, joint: bool) -> Tokens:
    """Return the tokens of clips, in memory and without patch tokens.

    Args:
        frames: of all frames.
        rows: [C, F] frames of each clip.
        joint: concatenate the frames' tokens, [C, L, F * D]; else their mean, [C, L, D].
    """

    def combined(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        columns = (tokens[row] for row in rows.T)  # frame by frame: all at once would be F times the result
        return np.concatenate(list(columns), axis=-1) if joint else sum(columns, np.float32(0)) / rows.shape[1]

    return Tokens(combined(frames.cls), combined(frames.mean_patch), None, frames.rows, frames.device_seconds)


@dataclass(frozen=True)
class Loading:
    """How images are read, as the stage `evaluate` reads them.

    Attributes:
        batch_size: at most; fewer where images are large.
        num_workers: processes that decode images; 0 decodes in this one.
    """

    batch_size: int
    num_workers: int


@dataclass(frozen=True)
class TokenRequest:
    """What is computed.

    Attributes:
        images: of the set, in its order.
        version: of the set.
        preprocessing: of the images.
        loading: of the images.
        dense: also keep patch tokens.
    """

    images: Images
    version: str
    preprocessing: Preprocessing
    loading: Loading
    dense: bool = False


def find_tokens(backbone: VisionTransformer, digest: str, request: TokenRequest, cache: Path) -> Tokens:
    """Return the tokens of a set by one backbone, from the cache or computed; ranks share the images.

    bfloat16 on a GPU that has it, else float32.

    Args:
        backbone: in evaluation mode, on its device.
        digest: of its weights.
        request: images and what is kept of them.
        cache: folder of the arrays.
    """
    shape = backbone.config
    parts = {"version": VERSION, "weights": digest, "set": request.version, "dense": request.dense}
    parts |= {"preprocessing": request.preprocessing.model_dump(), "precision": str(_precision(backbone))}
    folder = cache / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    rows = request.preprocessing.crop_size // shape.patch_size
    held = exclusive(cache / f"{folder.name}.lock") if rank() == 0 else nullcontext()
    with held:
        barrier()  # now no other call computes the same
        if not folder.is_dir():
            _compute(backbone, request, folder, rows)
        barrier()
    names = (CLS, MEAN, PATCHES) if request.dense else (CLS, MEAN)
    cls, mean, *patches = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names)
    seconds = json.loads((folder / PASS).read_text())["device_seconds"]
    return Tokens(cls, mean, patches[0] if patches else None, rows, seconds)


def _compute(backbone: VisionTransformer, request: TokenRequest, folder: Path, rows: int) -> None:
    """Write the arrays whole or not at all: rank 0 makes the files, each rank fills its rows."""
    shape, count, layers = backbone.config, len(request.images), min(LAYERS, backbone.config.depth)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        CLS: ((count, layers, shape.dim), np.float32),
        MEAN: ((count, shape.dim), np.float32),
    }
    if request.dense:
        shapes[PATCHES] = ((count, rows * rows, layers * shape.dim), np.float16)
    shared = folder.with_name(f"{folder.name}.part")
    if rank() == 0:
        shared.mkdir(parents=True, exist_ok=True)
        for name, (size, dtype) in shapes.items():
            np.lib.format.open_memmap(shared / name, "w+", dtype, size).flush()
    try:
        barrier()
        arrays = {name: np.lib.format.open_memmap(shared / name, "r+") for name in shapes}
        began = time.monotonic()
        _fill(backbone, request, arrays, layers)
        for array in arrays.values():
            array.flush()
        barrier()
        device_seconds = (time.monotonic() - began) * world_size()
        if rank() == 0:
            with atomic_dir(folder) as staging:
                for name in shapes:
                    (shared / name).rename(staging / name)
                (staging / PASS).write_text(json.dumps({"device_seconds": device_seconds}))
    finally:
        if rank() == 0:  # a killed call's part is written over by the next
            shutil.rmtree(shared, ignore_errors=True)


def _fill(backbone: VisionTransformer, request: TokenRequest, arrays: dict[str, Any], layers: int) -> None:
    mine = range(rank(), len(request.images), world_size())
    patches = (request.preprocessing.crop_size // backbone.config.patch_size) ** 2
    workers, batch_size = request.loading.num_workers, max(1, min(request.loading.batch_size, BATCH_PATCHES // patches))
    batch_bytes = 3 * batch_size * request.preprocessing.crop_size**2
    check_shared_memory("evaluate.num_workers", workers, batch_bytes)
    # With its own generator the loader does not use the global one.
    loader = DataLoader(
        Subset(cast("Dataset[Tensor]", request.images), mine),
        batch_size,
        num_workers=workers,
        generator=torch.Generator(),
    )
    device, done = next(backbone.parameters()).device, 0
    with progress("features", len(mine)) as advance:
        for batch in loader:  # [B, S, S, 3]
            places = np.asarray(mine[done : done + len(batch)])
            outputs = _encode(backbone, batch.to(device), layers)
            last = outputs[-1].patch_tokens.float()
            arrays[CLS][places] = torch.stack([one.cls_token.float() for one in outputs], 1).cpu().numpy()
            arrays[MEAN][places] = last.mean(dim=1).cpu().numpy()
            if PATCHES in arrays:
                arrays[PATCHES][places] = torch.cat([o.patch_tokens for o in outputs], 2).half().cpu().numpy()
            done += len(batch)
            advance(len(batch))


@torch.inference_mode()
def _encode(backbone: VisionTransformer, images: torch.Tensor, layers: int) -> list[ViTOutput]:
    dtype = _precision(backbone)
    context = nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype)
    with context:
        return backbone.last_layers(to_input(images.permute(0, 3, 1, 2)), layers)


def _precision(backbone: VisionTransformer) -> torch.dtype:
    on_gpu = next(backbone.parameters()).device.type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
