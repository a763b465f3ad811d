"""The vision transformer of DINOv2 with register tokens, for images of any size that patches tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.attention import Layout
from components.model.config import ViTConfig
from components.model.layers import NORM_EPS, Block, Checkpointing, Draws, linear_draws


@dataclass(frozen=True)
class ViTOutput:
    """Tokens after the last norm.

    Attributes:
        cls_token: [B, D].
        register_tokens: [B, R, D].
        patch_tokens: [B, P, D], row by row of the patch grid.
    """

    cls_token: Tensor
    register_tokens: Tensor
    patch_tokens: Tensor


# Wrappers that look for tensors in a module's output (sharding, checkpointing, export) walk it as a pytree.
torch.export.register_dataclass(ViTOutput)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each (`dinov2/layers/patch_embed.py`)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed patches: [B, 3, H, W] to [B, P, D].

        Raises:
            ValueError: not an RGB batch, or a side that patches do not tile.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [batch, 3, height, width], got {list(images.shape)}")
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"image is {height}x{width} (height x width), but both sides must be multiples of the patch size "
                f"{self.patch_size}; resize or crop it first"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


def resample_positions(pos_embed: Tensor, config: ViTConfig, rows: int, columns: int) -> Tensor:
    """Resample the position embedding to another patch grid, in float32 (`interpolate_pos_encoding` of DINOv2).

    Args:
        pos_embed: [1, 1 + P, D], the class token's and those of a square grid.
        config: interpolation settings; its image size is not read.
        rows: of the new grid.
        columns: of the new grid.

    Returns:
        [1, 1 + rows * columns, D] float32.
    """
    embedding, stored = pos_embed.float(), math.isqrt(pos_embed.shape[1] - 1)
    patches = embedding[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)  # [1, D, stored, stored]
    # Weights trained with an offset were resampled by a scale factor, which samples at slightly different points than
    # the output size; inference must match (METHOD: "historic rounding work-around").
    offset = config.interpolate_offset
    patches = F.interpolate(
        patches,
        size=None if offset else (rows, columns),
        scale_factor=[(rows + offset) / stored, (columns + offset) / stored] if offset else None,
        mode="bicubic",
        antialias=config.interpolate_antialias,
    )
    assert patches.shape[2:] == (rows, columns), f"resampled to {list(patches.shape[2:])}, not {[rows, columns]}"
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class VisionTransformer(nn.Module):
    """ViT backbone (`dinov2/models/vision_transformer.py`) with the published parameter names."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if config.image_size is None:
            raise ValueError("image_size: required, the position grid is made for it")
        self.config = config
        self.grid_size = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, config.dim))
        # Published models without registers lack this parameter.
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_registers, config.dim)) if config.num_registers else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        if not self.cls_token.is_meta:  # on meta, initializers change nothing but import torch.compile (4 s)
            for name, draw in self.draws():
                draw(self.get_parameter(name))

    def forward(self, images: Tensor, masks: Tensor | None = None) -> ViTOutput:
        """Encode images into class, register and patch tokens after the last norm.

        Args:
            images: [B, 3, H, W], normalized; H and W multiples of the patch size.
            masks: [B, P] bool; true patches are replaced by the mask token before the first block.

        Raises:
            ValueError: an image or mask shape that does not fit.
        """
        return self.forward_packed([(images, masks)])[0]

    def forward_packed(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[ViTOutput]:
        """Encode batches of images of different sizes in one pass; the results equal one `forward` for each.

        All tokens are rows of one matrix, so that everything but attention runs once over all of them, and attention
        within each image (arXiv 2304.07193, sec. 5, "sequence packing"; here without padding or masks).

        Args:
            batches: images and masks of each, as for `forward`.
        """
        tokens, layout = self._pack([self._embed(*batch) for batch in batches])
        for block in self.blocks:
            tokens = block(tokens, layout)
        return self._outputs(tokens, layout)

    def last_layers(self, images: Tensor, count: int) -> list[ViTOutput]:
        """Encode images; return the tokens of the last `count` blocks, each after the last norm, deepest last.

        `get_intermediate_layers(norm=True)` of DINOv2, as its linear and dense evaluations read it.

        Args:
            images: as for `forward`.
            count: of blocks, at most the depth.

        Raises:
            ValueError: more layers than there are, or an image shape that does not fit.
        """
        if not 1 <= count <= len(self.blocks):
            raise ValueError(f"count must be from 1 to the depth, {len(self.blocks)}, got {count}")
        tokens, layout = self._pack([self._embed(images, None)])
        found: list[ViTOutput] = []
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, layout)
            if number > len(self.blocks) - count:
                found += self._outputs(tokens, layout)
        return found

    def draws(self) -> Draws:
        """Yield the initializers of `init_weights` in DINOv2, in order; patch convolution and norms keep torch's."""
        yield "pos_embed", partial(nn.init.trunc_normal_, std=0.02)
        yield "cls_token", partial(nn.init.normal_, std=1e-6)
        if self.register_tokens is not None:
            yield "register_tokens", partial(nn.init.normal_, std=1e-6)
        yield "mask_token", nn.init.zeros_
        yield from linear_draws(self.blocks, "blocks")

    def checkpoint_activations(self, mode: Checkpointing) -> None:
        """Set `Block.checkpointing` of every block."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.checkpointing = mode

    @staticmethod
    def _pack(batches: list[Tensor]) -> tuple[Tensor, Layout]:
        """Concatenate the tokens [B, N, D] of each batch as rows of one [T, D]."""
        rows = [tokens.flatten(0, 1) for tokens in batches]
        return torch.cat(rows) if len(rows) > 1 else rows[0], tuple((t.shape[0], t.shape[1]) for t in batches)

    def _embed(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """Map [B, 3, H, W] to [B, 1 + R + P, D], with the steps of `prepare_tokens_with_masks` in order."""
        patches = self.patch_embed(images)  # [B, P, D]
        if masks is not None:
            if masks.shape != patches.shape[:2]:
                raise ValueError(f"masks must be {list(patches.shape[:2])} (images, patches), got {list(masks.shape)}")
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        batch, _, height, width = images.shape
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1)  # [B, 1 + P, D]
        grid = height // self.config.patch_size, width // self.config.patch_size
        tokens = tokens + self._position_embedding(*grid).to(tokens.dtype)
        if self.register_tokens is None:
            return tokens
        registers = self.register_tokens.expand(batch, -1, -1).to(tokens.dtype)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)  # registers have no position embedding

    def _position_embedding(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding for a patch grid, [1, 1 + rows * columns, D]."""
        if (rows, columns) == (self.grid_size, self.grid_size):
            return self.pos_embed
        return resample_positions(self.pos_embed, self.config, rows, columns)

    def _outputs(self, tokens: Tensor, layout: Layout) -> list[ViTOutput]:
        first_patch = 1 + self.config.num_registers
        outputs = []
        for part, shape in zip(self.norm(tokens).split([c * n for c, n in layout]), layout, strict=True):
            normed = part.unflatten(0, shape)  # [B, N, D]
            outputs.append(ViTOutput(normed[:, 0], normed[:, 1:first_patch], normed[:, first_patch:]))
        return outputs
