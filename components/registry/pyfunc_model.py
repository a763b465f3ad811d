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

from components.data.shards import MAX_PIXELS, ImageError, decode_image
from components.model.config import Preprocessing
from components.model.export import load_backbone
from components.model.preprocessing import center_crops, to_input

BATCH = 32


class EmbeddingModel(PythonModel):
    """Class token of the backbone after its last norm, not normalized to unit length."""

    def load_context(self, context: Any) -> None:
        """Read the weights; called once by MLflow."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = load_backbone(Path(context.artifacts["weights"])).to(self._device)
        self._preprocessing = Preprocessing.model_validate(context.model_config["preprocessing"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Embed images.

        Args:
            context: unused; the weights are loaded once, in `load_context`.
            model_input: a DataFrame whose column `image` holds encoded images (JPEG, PNG, ...) as bytes.
            params: `resolution`, pixels a side of the square that is cut from the middle; as evaluated if not given.

        Returns:
            float32 [n, D].

        Raises:
            ValueError: a row is not an image, or the resolution is no multiple of the patch size.
        """
        resolution = int((params or {}).get("resolution") or self._preprocessing.crop_size)
        patch = self._backbone.config.patch_size
        if resolution < patch or resolution % patch:
            raise ValueError(f"resolution {resolution}: must be a multiple of the patch size, {patch}")
        preprocessing = self._preprocessing.at(resolution)
        rows = list(model_input["image"])
        parts = [np.empty((0, self._backbone.config.dim), np.float32)]
        for start in range(0, len(rows), BATCH):
            decoded = (_decode(row, start + i) for i, row in enumerate(rows[start : start + BATCH]))
            crops = torch.from_numpy(center_crops(decoded, preprocessing)).to(self._device)  # [B, S, S, 3]
            with torch.inference_mode():
                images = crops.permute(0, 3, 1, 2)  # [B, 3, S, S]
                parts.append(self._backbone(to_input(images)).cls_token.float().cpu().numpy())
        return np.concatenate(parts)


def _decode(data: bytes, row: int) -> Image.Image:
    try:
        return decode_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        raise ValueError(f"row {row}: not a usable image: {error}") from None


set_model(EmbeddingModel())
