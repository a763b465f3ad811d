"""Pictures of a training run: its actual training crops, and PCA colors of patch features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from components.core.distributed import rank
from components.core.pictures import TILE, Tile, draw_pca, draw_sheet, fit, jpeg, pca_colors
from components.core.storage import write_bytes
from components.core.tracking import log_file
from components.data.batch import Batch
from components.data.crops import NUM_GLOBAL
from components.data.stream import ImageStream
from components.model.config import Preprocessing
from components.model.preprocessing import center_crops, to_input
from components.training.networks import Network

PROGRESS = "pca_step_*.jpg"  # in a run's folder
NUM_IMAGES = 8
GRAY = 96  # color of masked patches


def draw_crops(batch: Batch, patch_size: int) -> Image.Image:
    """Draw one row per image: global crops, gray where masked, then local crops at the same scale."""
    images = len(batch.global_crops) // NUM_GLOBAL
    side = batch.global_crops.shape[-1]
    shown = batch.global_crops.clone()
    if batch.masks is not None:
        grid = side // patch_size
        hidden = batch.masks.view(-1, 1, grid, grid)
        hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        shown = torch.where(hidden, GRAY, shown)
    local_side = max(TILE * batch.local_crops.shape[-1] // side, 1)
    rows = [
        [
            *(_tile(crop, TILE) for crop in shown[i::images]),
            *(_tile(c, local_side) for c in batch.local_crops[i::images]),
        ]
        for i in range(min(images, NUM_IMAGES))
    ]
    return draw_sheet(rows, "An image a row: global crops (gray: hidden from the student), then local crops")


def sample_images(stream: ImageStream, size: int) -> NDArray[np.uint8]:
    """Return center crops of the stream's first images: [N, size, size, 3], N at most `NUM_IMAGES`."""
    positions = range(min(NUM_IMAGES, len(stream)))
    return center_crops((stream.image(position).image for position in positions), Preprocessing().at(size))


@torch.no_grad()
def patch_colors(network: Network, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the first three principal components of all images' patch features as colors.

    Args:
        network: in evaluation mode; every rank must call if it is sharded.
        images: [N, S, S, 3].

    Returns:
        [N, grid, grid, 3].
    """
    device = next(network.parameters()).device
    crops = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # [N, 3, S, S]
    return pca_colors(network.patch_tokens(to_input(crops)).float().cpu().numpy())


def show_progress(network: Network, images: NDArray[np.uint8], folder: Path, steps_done: int) -> None:
    """Write the PCA colors after `steps_done` steps to `folder` and the tracker; every rank must call."""
    colors = patch_colors(network, images)
    if rank() == 0:
        path = folder / PROGRESS.replace("*", str(steps_done))
        save_picture(draw_pca(images, {f"after {steps_done:,} steps": colors}), path)
        log_file(path, "progress")


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a JPEG; create its folder."""
    write_bytes(path, jpeg(image))


def _tile(crop: Tensor, side: int) -> Tile:
    """Return the tile of a crop [3, H, W] uint8, H = W."""
    return Tile(fit(Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()), side))
