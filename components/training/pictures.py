"""Pictures of a training run: the crops that it really trains on, and the colours of its patch features."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from components.core.distributed import rank
from components.core.tracking import log_file
from components.data.batch import Batch
from components.data.crops import NUM_GLOBAL
from components.data.stream import ImageStream
from components.model.preprocessing import to_input
from components.training.networks import Network

PROGRESS = "pca_step_*.jpg"  # in a run's folder
NUM_IMAGES = 8
TILE = 96  # pixels on the page
GAP = 4
LINE = 16  # of the caption below
GRAY = 96  # colour of what is hidden from the student


def draw_crops(batch: Batch, patch_size: int) -> Image.Image:
    """One row an image of the batch: its global crops, grey where masked, then its local crops in true proportion."""
    images = len(batch.global_crops) // NUM_GLOBAL
    side = batch.global_crops.shape[-1]
    shown = batch.global_crops.clone()
    if batch.masks is not None:
        grid = side // patch_size
        hidden = batch.masks.view(-1, 1, grid, grid)
        hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        shown = torch.where(hidden, GRAY, shown)
    rows = []
    for i in range(min(images, NUM_IMAGES)):
        global_tiles = [_tile(crop, TILE) for crop in shown[i::images]]
        local_side = max(TILE * batch.local_crops.shape[-1] // side, 1)
        rows.append([*global_tiles, *(_tile(crop, local_side) for crop in batch.local_crops[i::images])])
    return _page(rows, "An image a row: global crops (grey: hidden from the student), then local crops")


def sample_images(stream: ImageStream, size: int) -> Tensor:
    """The first images of the stream, squeezed to squares: [N, 3, size, size] normalised, N at most `NUM_IMAGES`."""
    positions = range(min(NUM_IMAGES, len(stream)))
    squares = [stream.image(p).image.resize((size, size), Image.Resampling.BICUBIC) for p in positions]
    return to_input(torch.from_numpy(np.stack([np.asarray(s) for s in squares]).transpose(0, 3, 1, 2).copy()))


@torch.no_grad()
def pca_colors(network: Network, images: Tensor) -> np.ndarray:
    """First three principal components of all images' patch features as colours.

    Args:
        network: in evaluation mode; every rank must call where they share it.
        images: [N, 3, H, W] normalised, H = W.

    Returns:
        [N, grid, grid, 3] uint8.
    """
    device = next(network.parameters()).device
    tokens = network.patch_tokens(images.to(device)).float().cpu()  # [N, P, D]
    flat = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(dim=0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    # A direction's sign is free; fixed, the same weights always have the same colours.
    directions = directions * torch.sign(directions.sum(dim=1, keepdim=True))
    scores = flat @ directions.T  # [N * P, 3]
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    colors = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    grid = round(tokens.shape[1] ** 0.5)
    return colors.round().byte().numpy().reshape(len(tokens), grid, grid, 3)


def show_progress(network: Network, images: Tensor, folder: Path, steps_done: int) -> None:
    """Write the colours after so many steps to `folder`, and hand them to the tracker; every rank must call."""
    colors = pca_colors(network, images)
    if rank() == 0:
        path = folder / PROGRESS.replace("*", str(steps_done))
        save_picture(draw_pca(images, {f"after {steps_done:,} steps": colors}), path)
        log_file(path, "progress")


def draw_pca(images: Tensor, colors: Mapping[str, np.ndarray]) -> Image.Image:
    """One column an image; top row the image, then one row for each set of colours, by name (such as before)."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    pixels = ((images - low) / (high - low).clamp(min=1e-12) * 255).byte()
    rows = [[_tile(image, TILE) for image in pixels]]
    for each in colors.values():
        rows.append([Image.fromarray(c).resize((TILE, TILE), Image.Resampling.NEAREST) for c in each])
    return _page(rows, f"Images; PCA of their patch features {', '.join(colors)}")


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a JPEG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def _tile(crop: Tensor, size: int) -> Image.Image:
    """[3, H, W] uint8 as an image of `size` pixels."""
    image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
    return image.resize((size, size), Image.Resampling.NEAREST)


def _page(rows: list[list[Image.Image]], caption: str) -> Image.Image:
    font = ImageFont.load_default(LINE - GAP)
    width = max(*(sum(tile.width + GAP for tile in row) for row in rows), ceil(font.getlength(caption)) + GAP) + GAP
    height = sum(max(tile.height for tile in row) + GAP for row in rows) + GAP + LINE
    page = Image.new("RGB", (width, height), "white")
    top = GAP
    for row in rows:
        left = GAP
        for tile in row:
            page.paste(tile, (left, top))
            left += tile.width + GAP
        top += max(tile.height for tile in row) + GAP
    ImageDraw.Draw(page).text((GAP, top), caption, "black", font)
    return page
