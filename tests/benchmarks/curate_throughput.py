"""Images a second of the stage `embed` against the plain loop that one would write with Pillow and torch; one core.

Ours reads shards by offset, checks every image's hash, refuses bombs, scores each image (gray share, entropy) and keeps
its results whole or not at all; the plain loop opens files, decodes, resizes, normalizes and runs the same network.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from components.curation.config import DescriptorConfig, EmbedderConfig, ModelConfig, ScoresConfig
from components.curation.descriptor import describe
from components.curation.embed import COPIES, SCORES, embed_collection
from components.curation.embedders import resolve
from components.curation.scores import load_scorer
from components.data.manifest import POOL_SCHEMA
from components.data.shards import ShardWriter
from components.model.config import ViTConfig
from components.model.export import load_backbone, save_weights
from components.model.vit import VisionTransformer

SIZE, BATCH = 224, 32
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
REPEATS = 4  # of each file, with another comment, so that each is an image of its own

Embeddings = NDArray[np.float32]


def sides(folder: Path, files: list[bytes], network: bool) -> tuple[Callable[[], Embeddings], Callable[[], Embeddings]]:
    """Ours and the plain loop, over REPEATS × files, each [N, D] of unit norm in the order of the image ids.

    Args:
        folder: to work in.
        files: JPEGs.
        network: True: embed with a ViT-Ti/16 at 224 pixels; False: with the built-in descriptor.
    """
    images = _write_pool(folder, [file + bytes([turn]) for file in files for turn in range(REPEATS)])
    torch.manual_seed(0)
    vit = VisionTransformer(ViTConfig(patch_size=16, dim=192, depth=12, num_heads=3, image_size=SIZE))
    save_weights(folder / "weights", vit, None, {})
    config: EmbedderConfig = ModelConfig(weights="weights", batch_size=BATCH) if network else DescriptorConfig()
    parts = {COPIES: resolve(config, folder), SCORES: load_scorer(ScoresConfig(), folder)}
    backbone = load_backbone(folder / "weights")

    def ours() -> Embeddings:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress
            done = embed_collection(folder / "pool", images, parts, folder / "cache", 1)
        return np.concatenate([np.load(item.paths[COPIES]) for item in done])

    def plain() -> Embeddings:
        paths, made = sorted((folder / "files").iterdir()), []
        for start in range(0, len(paths), BATCH):
            batch = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
            if network:
                made.append(_class_tokens(backbone, batch))
            else:
                made.append(describe(batch))
        vectors = np.concatenate(made)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return ours, plain


def _class_tokens(backbone: VisionTransformer, images: list[Image.Image]) -> Embeddings:
    shape = (SIZE, SIZE)
    resized = [np.array(image.resize(shape, Image.Resampling.BILINEAR)) for image in images]
    pixels = [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in resized]
    with torch.inference_mode():
        return backbone((torch.stack(pixels) - MEAN) / STD).cls_token.numpy()


def _write_pool(folder: Path, files: list[bytes]) -> pa.Table:
    """The files one by one below `files`, and as one shard below `pool`; returns its manifest."""
    (folder / "files").mkdir()
    by_id = sorted((hashlib.sha256(file).hexdigest(), file) for file in files)
    fixed = {"format": "JPEG", "source": "photos", "license": "CC0-1.0"}
    fixed |= {"label": None, "split": None}
    rows = []
    with ShardWriter(folder / "pool", 2**30) as writer:
        for image_id, file in by_id:
            (folder / "files" / f"{image_id}.jpg").write_bytes(file)
            width, height = Image.open(io.BytesIO(file)).size
            place = dict(zip(("shard", "offset", "length"), writer.add(image_id, "jpg", file), strict=True))
            rows.append(
                {"image_id": image_id, "width": width, "height": height, "source_uri": image_id} | place | fixed
            )
    return pa.Table.from_pylist(rows, schema=POOL_SCHEMA)
