"""Features of an evaluation set, as the evaluation computes and keeps them, and by a plain torch loop."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from components.data.evaluation_set import EvaluationSet
from components.data.shards import ShardWriter
from components.evaluation.encoders import BackboneEncoder
from components.evaluation.features import EvaluationImages
from components.evaluation.tokens import Loading, TokenRequest, find_tokens
from components.model.config import Preprocessing, ViTConfig
from components.model.vit import VisionTransformer

IMAGES, BATCH = 8000, 64
SIDES = (112, 224)  # pixels of the squares that are cut from photographs, at least and below
SCALING = Preprocessing(resize_size=112, crop_size=98)
SHAPE = ViTConfig(patch_size=14, dim=192, depth=6, num_heads=3, image_size=98, layer_scale_init=1.0)

Side = Callable[[], NDArray[np.float32]]


class Plain(Dataset[torch.Tensor]):
    """The same images as files, as a loop of one's own would read them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.paths[index].read_bytes())).convert("RGB")
        image = image.resize((112, 112), Image.Resampling.BICUBIC).crop((7, 7, 105, 105))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (pixels - mean[:, None, None]) / std[:, None, None]


def squares(photographs: list[Image.Image]) -> Iterator[bytes]:
    """Cut `IMAGES` different squares at random places of photographs, as JPEGs."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        photo, side = photographs[number % len(photographs)], int(generator.integers(*SIDES))
        left, top = (int(generator.integers(length - side)) for length in photo.size)
        buffer = io.BytesIO()
        photo.crop((left, top, left + side, top + side)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def sides(folder: Path, photographs: list[Image.Image]) -> tuple[Side, Side]:
    """Return both sides for `IMAGES` different images; each call of ours begins with an empty cache."""
    torch.manual_seed(0)
    backbone = VisionTransformer(SHAPE).eval()
    rows, paths = [], []
    with ShardWriter(folder / "set", 2**30) as writer:
        for number, content in enumerate(squares(photographs)):
            name = f"{number:064x}"
            rows.append(dict(zip(("shard", "offset", "length"), writer.add(name, "jpg", content), strict=True)))
            paths.append(folder / f"{name}.jpg")
            paths[-1].write_bytes(content)
    images = EvaluationImages(EvaluationSet(folder / "set", pa.Table.from_pylist(rows), None), SCALING)
    encoder, calls = BackboneEncoder(backbone), itertools.count()

    def ours() -> NDArray[np.float32]:
        request = TokenRequest(images, "v1", SCALING, Loading(256, 0))
        return np.array(find_tokens(encoder, str(next(calls)), request, folder / "cache").features)

    @torch.inference_mode()
    def plain() -> NDArray[np.float32]:
        found = [backbone(batch).cls_token.numpy() for batch in DataLoader(Plain(paths), BATCH)]
        return np.concatenate(found)

    return ours, plain
