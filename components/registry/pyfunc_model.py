"""The registered model, as code that MLflow stores beside the weights: encoded images in, embeddings out.

MLflow runs this file when it loads the model. It needs the `components` files that are stored with it (`code/`), torch,
safetensors, Pillow and numpy; no pickle is written or read.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from components.data.shards import MAX_PIXELS, ImageError, decode_image
from components.model.config import Preprocessing
from components.model.export import load_backbone
from components.model.pooling import features
from components.model.preprocessing import center_crops, to_input

MAX_GRID = 64  # patches a side of an image: 896 pixels of patches of 14
MAX_PATCHES = 2**18  # of one call: 1,024 images of 16 x 16 patches
BATCH_PATCHES = 2**13  # computed at once


class RequestError(MlflowException, ValueError):
    """An input that cannot be used; over HTTP the status is 400 and the message comes first."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Drop what MLflow's scoring server has put before the message: all data of the request."""
        self.message = str(self)
        return super().serialize_as_json()


class EmbeddingModel(PythonModel):
    """Features of images as they were evaluated, not normalized to unit length."""

    def load_context(self, context: Any) -> None:
        """Read the weights; called once by MLflow."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = load_backbone(Path(context.artifacts["weights"])).to(self._device)
        self._preprocessing = Preprocessing.model_validate(context.model_config["preprocessing"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Embed images. Transparent pixels are laid over white, as in training.

        Args:
            context: unused; the weights are loaded once, in `load_context`.
            model_input: a DataFrame whose column `image` holds encoded images (JPEG, PNG, ...) as bytes or, as JSON
                carries them, as base64 text.
            params: `resolution`, pixels a side of the square that is cut from the middle; as evaluated if not given.

        Returns:
            float32 [n, F]: class tokens after the last norm, or what `pooling` of the preprocessing makes of them.

        Raises:
            RequestError: a row is not an image, the resolution is no multiple of the patch size or too large, or
                there are too many rows.
        """
        preprocessing = self._preprocessing.at(self._resolution(params or {}))
        rows = _rows(model_input)
        patches = (preprocessing.crop_size // self._backbone.config.patch_size) ** 2
        if len(rows) > (most := max(MAX_PATCHES // patches, 1)):
            at = f"in one call at resolution {preprocessing.crop_size}"
            raise RequestError(f"{len(rows)} rows: at most {most} {at}; send fewer at once")
        batch = max(BATCH_PATCHES // patches, 1)
        parts = [np.empty((0, preprocessing.feature_dim(self._backbone.config)), np.float32)]
        for start in range(0, len(rows), batch):
            decoded = (_decode(row, start + i) for i, row in enumerate(rows[start : start + batch]))
            crops = torch.from_numpy(center_crops(decoded, preprocessing)).to(self._device)  # [B, S, S, 3]
            with torch.inference_mode():
                images = crops.permute(0, 3, 1, 2)  # [B, 3, S, S]
                parts.append(features(self._backbone, to_input(images), preprocessing).cpu().numpy())
        return np.concatenate(parts)

    def _resolution(self, params: dict[str, Any]) -> int:
        usual, patch = self._preprocessing.crop_size, self._backbone.config.patch_size
        resolution = usual if params.get("resolution") is None else int(params["resolution"])
        most = max(MAX_GRID * patch, usual)
        if not patch <= resolution <= most or resolution % patch:
            raise RequestError(
                f"resolution {resolution}: must be a multiple of the patch size, {patch}, and at most {most}"
            )
        return resolution


def _rows(model_input: pd.DataFrame) -> list[Any]:
    """The images; of the JSON form `inputs`, MLflow makes one row that is a list."""
    cells = list(model_input["image"])
    return cells[0] if len(cells) == 1 and isinstance(cells[0], list) else cells


def _decode(row: Any, number: int) -> Image.Image:
    try:
        return decode_image(_encoded(row), max_pixels=MAX_PIXELS)
    except ImageError as error:
        as_text = f"; the text {row[:40]!r} was read as base64" if isinstance(row, str) else ""
        raise RequestError(f"row {number}: not a usable image: {error}{as_text}") from None


def _encoded(row: Any) -> bytes:
    if isinstance(row, bytes | bytearray | memoryview):
        return bytes(row)
    if not isinstance(row, str):
        raise ImageError("not_an_image", f"{type(row).__name__}; give an encoded image as bytes or as base64 text")
    try:
        return base64.b64decode("".join(row.split()), validate=True)
    except ValueError as error:
        raise ImageError("not_an_image", f"no base64 ({error}); give the image's bytes, not a path") from None


set_model(EmbeddingModel())
