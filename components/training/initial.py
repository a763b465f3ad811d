"""Initial weights: networks are created on the meta device and filled tensor by tensor after sharding.

No rank ever holds all weights of a sharded network, and the values equal those of a single process.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.distributed import local_shard, shard_like
from components.model.config import HeadConfig, ViTConfig
from components.model.export import WeightsError, open_backbone, open_heads
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer, resample_positions
from components.training.networks import Network

logger = logging.getLogger(__name__)


def draw_network(backbone: ViTConfig, heads: Mapping[str, HeadConfig], seed: int) -> Network:
    """Return a network on the meta device with random initial values, equal on every rank.

    Args:
        backbone: shape.
        heads: by name, `dino` and `ibot`.
        seed: of the values; torch's global generator is not changed.
    """
    with torch.device("meta"):
        network, shapes = (
            Network(VisionTransformer(backbone), {n: ProjectionHead(backbone.dim, h) for n, h in heads.items()})
            for _ in range(2)
        )
    parts = {"backbone": shapes.backbone, **{f"{name}_head": head for name, head in shapes.heads.items()}}

    def values() -> Iterator[tuple[str, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for prefix, part in parts.items():
                yield from ((f"{prefix}.{name}", value) for name, value in _drawn(part))

    network.initial = values
    return network


def load_network(folder: Path, image_size: int | None = None) -> Network:
    """Return backbone and heads of a weights folder on the meta device; `fill` reads the values from its files.

    Args:
        folder: as written by training.
        image_size: resample the position table to the grid of this image size in pixels; None keeps it.

    Raises:
        WeightsError: the folder is missing, damaged, without heads or with heads of another backbone.
    """
    (backbone, tensors), (heads, head_tensors) = open_backbone(folder), open_heads(folder)
    found = {name: head.in_dim for name, head in heads.items()}
    needed = dict.fromkeys(("dino", "ibot"), backbone.config.dim)
    if found != needed:
        raise WeightsError(
            f"{folder}: its heads take features of widths {found}, but its backbone needs {needed}; give a folder as "
            "training wrote it"
        )
    if image_size not in (None, backbone.config.image_size):
        backbone, tensors = _resampled(backbone, tensors, image_size)
    network = Network(backbone, heads)

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from ((f"backbone.{name}", tensor) for name, tensor in tensors.items())
        for name, tensor in head_tensors.items():
            head, _, rest = name.partition(".")
            yield f"{head}_head.{rest}", tensor

    network.initial = values
    return network


def _resampled(
    backbone: VisionTransformer, tensors: dict[str, Tensor], image_size: int
) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """Return the backbone with another position grid, and its tensors; on images of that size it computes the same."""
    config, side = backbone.config, image_size // backbone.config.patch_size
    with torch.device("meta"):
        resampled = VisionTransformer(config.model_copy(update={"image_size": image_size}))
    logger.info("position table of %s x %s resampled to %s x %s", *[backbone.grid_size] * 2, side, side)
    table = resample_positions(tensors["pos_embed"], config, side, side)
    return resampled.eval(), {**tensors, "pos_embed": table}


def start_backbone_from(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Replace the initial values of the backbone."""
    before = network.initial
    assert before is not None, "the network has its values already"

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from before()  # including the backbone, so that the heads draw the same values
        yield from ((f"backbone.{name}", tensor) for name, tensor in tensors.items())

    network.initial = values


@torch.no_grad()
def fill(networks: Sequence[Network]) -> None:
    """Set the initial values of networks with allocated memory; networks with equal values are filled together."""
    for values in dict.fromkeys(network.initial for network in networks):
        assert values is not None, "the network has its values already"
        alike = [network for network in networks if network.initial is values]
        parameters = [dict(network.named_parameters()) for network in alike]
        missing = set(parameters[0])
        for name, value in values():
            for own in parameters:
                local_shard(own[name]).copy_(shard_like(value, own[name]))
            missing.discard(name)
        assert not missing, f"no initial values for {sorted(missing)}"
        for network in alike:
            network.initial = None


def _drawn(part: VisionTransformer | ProjectionHead) -> Iterator[tuple[str, Tensor]]:
    """Yield the values that constructing a backbone or head draws, in order, with one layer in memory at a time.

    Some names come twice, because torch's layers draw values before ours; the later ones count.
    """
    for name, layer in part.named_modules():
        if hasattr(layer, "reset_parameters"):
            whole: Any = copy.deepcopy(layer).to_empty(device="cpu")
            whole.reset_parameters()
            yield from ((f"{name}.{key}", value) for key, value in whole.named_parameters())
    for name, draw in part.draws():
        value = torch.empty(part.get_parameter(name).shape)
        draw(value)
        yield name, value
