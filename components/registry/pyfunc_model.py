"""The registered model, as code that MLflow stores beside the weights: encoded images in, embeddings out.

MLflow runs this file when it loads the model. It needs the `components` files that are stored with it (`code/`), torch,
safetensors, Pillow and numpy; no pickle is written or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from components.data.shards import ImageError, decode_image
from components.model.export import load_backbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH = 32


class EmbeddingModel(PythonModel):
    """Class token of the backbone after its last norm, not normalised to unit length."""

    def load_context(self, context: Any) -> None:
        """Read the weights; called once by MLflow."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = load_backbone(Path(context.artifacts["weights"])).to(self._device)
        self._resolution = int(context.model_config["resolution"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Embed images.

        Args:
            context: unused; the weights are loaded once, in `load_context`.
            model_input: a DataFrame whose column `image` holds encoded images (JPEG, PNG, ...) as bytes.
            params: `resolution`, pixels: the shorter side is scaled to it, and the square in the middle is taken.

        Returns:
            float32 [n, D].

        Raises:
            ValueError: a row is not an image, or the resolution is no multiple of the patch size.
        """
        resolution = int((params or {}).get("resolution") or self._resolution)
        patch = self._backbone.config.patch_size
        if resolution < patch or resolution % patch:
            raise ValueError(f"resolution {resolution}: must be a multiple of the patch size, {patch}")
        rows = list(model_input["image"])
        parts = [np.empty((0, self._backbone.config.dim), np.float32)]
        for start in range(0, len(rows), BATCH):
            batch = [_pixels(row, start + i, resolution) for i, row in enumerate(rows[start : start + BATCH])]
            with torch.inference_mode():
                images = torch.from_numpy(np.stack(batch)).to(self._device)  # [B, 3, H, W]
                parts.append(self._backbone(images).cls_token.float().cpu().numpy())
        return np.concatenate(parts)


def _pixels(data: bytes, row: int, resolution: int) -> np.ndarray:
    """Normalised float32 [3, resolution, resolution] of one encoded image."""
    try:
        image = decode_image(data)
    except ImageError as error:
        raise ValueError(f"row {row}: not a usable image: {error}") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    pixels = (np.asarray(image, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return pixels.transpose(2, 0, 1).astype(np.float32)


set_model(EmbeddingModel())
