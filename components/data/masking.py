"""Block masks over the patch grid, for masked patch prediction (iBOT)."""

from __future__ import annotations

import math

import numpy as np

from components.data.config import MaskingConfig

# `dinov2/data/masking.py`, after BEiT (arXiv 2106.08254).
MIN_BLOCK_PATCHES = 4
MAX_BLOCK_FRACTION = 0.5
MIN_BLOCK_ASPECT = 0.3
TRIES_PER_BLOCK = 10


def sample_masks(
    num_images: int, grid: tuple[int, int], config: MaskingConfig, generator: np.random.Generator
) -> np.ndarray:
    """Sample masks for a batch of global crops; true patches are hidden from the student.

    `dinov2/data/collate.py`: floor(mask_probability * num_images) crops are masked. The interval of ratios is cut into
    as many equal slices, and each masked crop draws its ratio from its own slice, so that every batch spans the
    interval; then the masks are shuffled. Each mask has exactly floor(ratio * patches) patches: blocks are completed by
    random single patches, as in DINOv3 (DINOv2 leaves such masks smaller).

    Args:
        num_images: global crops in the batch.
        grid: rows and columns of patches.
        config: probability and ratios.
        generator: source of all randomness.

    Returns:
        [num_images, rows * columns] bool.
    """
    num_patches = grid[0] * grid[1]
    num_masked = int(num_images * config.mask_probability)
    edges = np.linspace(config.mask_ratio_min, config.mask_ratio_max, num_masked + 1)
    masks = np.zeros((num_images, num_patches), dtype=bool)
    for index in range(num_masked):
        ratio = generator.uniform(edges[index], edges[index + 1])
        masks[index] = _sample_mask(grid, int(num_patches * ratio), generator).ravel()
    generator.shuffle(masks, axis=0)
    return masks


def _sample_mask(grid: tuple[int, int], target: int, generator: np.random.Generator) -> np.ndarray:
    """Sample a [rows, columns] mask of exactly `target` patches: blocks while they fit, then single patches."""
    mask = np.zeros(grid, dtype=bool)
    remaining = target
    while remaining > 0:
        added = _add_block(mask, min(remaining, int(mask.size * MAX_BLOCK_FRACTION)), generator)
        if not added:
            break
        remaining -= added
    free = np.flatnonzero(~mask)
    mask.ravel()[generator.choice(free, size=remaining, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, limit: int, generator: np.random.Generator) -> int:
    """Mask a random block that adds 1 to `limit` new patches; return the number added, 0 if no try fits."""
    rows, columns = mask.shape
    log_aspect = math.log(1 / MIN_BLOCK_ASPECT)
    for _ in range(TRIES_PER_BLOCK):
        # If `limit` is below the minimum, the bounds are swapped, as in the released code.
        area = generator.uniform(min(MIN_BLOCK_PATCHES, limit), max(MIN_BLOCK_PATCHES, limit))
        aspect = math.exp(generator.uniform(-log_aspect, log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = generator.integers(rows - height + 1), generator.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= limit:
            block[:] = True
            return added
    return 0
