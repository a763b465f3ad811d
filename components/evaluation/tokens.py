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
from math import isqrt
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
from components.evaluation.encoders import Encoded, Encoder
from components.model.config import Pooling, Preprocessing

VERSION = 3  # raise it whenever a change here changes the arrays
BATCH_PATCHES = {"cpu": 2**12, "cuda": 2**14}  # computed at once; on a CPU the tokens of a layer fit its caches
CLS, MEAN, FEATURE, PATCHES = "cls.npy", "mean_patch.npy", "feature.npy", "patches.npy"
PASS = "pass.json"


class Images(Protocol):
    """Images of one size, [S, S, 3] uint8 each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Tokens:
    """Memory-mapped tokens of N images after the last norm.

    Attributes:
        cls: [N, L, D] float32, class tokens of the last L layers, deepest last.
        mean_patch: [N, D] float32, mean patch tokens of the last layer; the class token without such of its width.
        features: [N, F] float32, what an image is found and classified by, pooled as the preprocessing says.
        patches: [N, P, L * D] float16, patch tokens of the last L layers side by side, row by row of the grid; None
            unless asked for, and of models that give none.
        device_seconds: wall-clock time of the pass that computed them, whenever it was, summed over its devices.
    """

    cls: NDArray[np.float32]
    mean_patch: NDArray[np.float32]
    features: NDArray[np.float32]
    patches: NDArray[np.float16] | None
    device_seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of the patch grid, which is square."""
        assert self.patches is not None, "patch tokens were not kept"
        return isqrt(self.patches.shape[1])

    @property
    def of_images(self) -> tuple[NDArray[np.float32], ...]:
        """All but the patch tokens, in the order above."""
        return self.cls, self.mean_patch, self.features


def joined(first: Tokens, rows: NDArray[np.int64], second: Tokens) -> Tokens:
    """Return the tokens of some rows, then those of another set, in memory and without patch tokens."""
    both = (np.concatenate([a[rows], b]) for a, b in zip(first.of_images, second.of_images, strict=True))
    return Tokens(*both, patches=None, device_seconds=first.device_seconds + second.device_seconds)


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

    return Tokens(*map(combined, frames.of_images), patches=None, device_seconds=frames.device_seconds)


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


def find_tokens(encoder: Encoder, digest: str, request: TokenRequest, cache: Path) -> Tokens:
    """Return the tokens of a set by one network, from the cache or computed; ranks share the images.

    Args:
        encoder: of the images.
        digest: of its weights, and of what else decides on its tokens.
        request: images and what is kept of them.
        cache: folder of the arrays.
    """
    parts = {"version": VERSION, "weights": digest, "set": request.version, "dense": request.dense}
    parts |= {"preprocessing": request.preprocessing.model_dump(), "precision": str(encoder.precision)}
    folder = cache / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    held = exclusive(cache / f"{folder.name}.lock") if rank() == 0 else nullcontext()
    with held:
        barrier()  # now no other call computes the same
        if not folder.is_dir():
            _compute(encoder, request, folder)
        barrier()
    names = [name for name in (CLS, MEAN, FEATURE, PATCHES) if (folder / name).is_file()]
    kept = {name: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names}
    device_seconds = json.loads((folder / PASS).read_text())["device_seconds"]
    return Tokens(kept[CLS], kept[MEAN], kept.get(FEATURE, kept[CLS][:, -1]), kept.get(PATCHES), device_seconds)


def _compute(encoder: Encoder, request: TokenRequest, folder: Path) -> None:
    """Write the arrays whole or not at all: rank 0 makes the files, each rank fills its rows."""
    side = request.preprocessing.crop_size
    pooling = request.preprocessing.pooling
    encoder = encoder if request.dense or pooling != "cls" else encoder.without_patches()
    one = encoder.encode_black(side)
    shapes = _shapes(one, len(request.images), request.dense, pooling)
    patches = one.rows(side) ** 2
    shared = folder.with_name(f"{folder.name}.part")
    if rank() == 0:
        shared.mkdir(parents=True, exist_ok=True)
        for name, (size, dtype) in shapes.items():
            np.lib.format.open_memmap(shared / name, "w+", dtype, size).flush()
    try:
        barrier()
        arrays = {name: np.lib.format.open_memmap(shared / name, "r+") for name in shapes}
        began = time.monotonic()
        _fill(encoder, request, arrays, max(1, BATCH_PATCHES[encoder.device.type] // patches))
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


def _shapes(one: Encoded, count: int, dense: bool, pooling: Pooling) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return shape and type of each array for `count` images, given what one image gives."""
    _, layers, dim = one.cls.shape
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        CLS: ((count, layers, dim), np.float32),
        MEAN: ((count, one.mean_patch.shape[1]), np.float32),
    }
    if pooling != "cls":
        shapes[FEATURE] = ((count, one.feature(pooling).shape[1]), np.float32)
    if dense and one.patches:
        width = sum(layer.shape[2] for layer in one.patches)
        shapes[PATCHES] = ((count, one.patches[-1].shape[1], width), np.float16)
    return shapes


def _fill(encoder: Encoder, request: TokenRequest, arrays: dict[str, Any], most: int) -> None:
    """Compute this rank's rows, at most `most` images at once."""
    mine = range(rank(), len(request.images), world_size())
    workers, batch_size = request.loading.num_workers, min(request.loading.batch_size, most)
    check_shared_memory("evaluate.num_workers", workers, 3 * batch_size * request.preprocessing.crop_size**2)
    # With its own generator the loader does not use the global one.
    loader = DataLoader(
        Subset(cast("Dataset[Tensor]", request.images), mine),
        batch_size,
        num_workers=workers,
        generator=torch.Generator(),
    )
    done = 0
    with progress("features", len(mine)) as advance:
        for batch in loader:  # [B, S, S, 3]
            places = np.asarray(mine[done : done + len(batch)])
            found = encoder.encode(batch)
            arrays[CLS][places] = found.cls.float().cpu().numpy()
            arrays[MEAN][places] = found.mean_patch.cpu().numpy()
            if FEATURE in arrays:
                arrays[FEATURE][places] = found.feature(request.preprocessing.pooling).cpu().numpy()
            if PATCHES in arrays:
                arrays[PATCHES][places] = torch.cat(found.patches, 2).half().cpu().numpy()
            done += len(batch)
            advance(len(batch))
