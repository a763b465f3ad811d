"""Load the models that embed images for curation, identified by digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.core.references import is_registered
from components.core.storage import sha256_file
from components.core.weights_cache import FILES as WEIGHTS_FILES
from components.curation import descriptor
from components.curation.config import (
    CurationError,
    DescriptorConfig,
    EmbedderConfig,
    ModelConfig,
    OnnxConfig,
    TorchScriptConfig,
)
from components.model.preprocessing import center_crops, normalize, resize_short_side, squeeze, to_input

VERSION = 2  # increment if a change here changes an embedding

Embed = Callable[[list[Image.Image]], NDArray[np.float32]]


@dataclass(frozen=True)
class Embedder:
    """Definition of an embedder, sufficient to load it in any worker."""

    config: EmbedderConfig
    location: Path | None  # the weights folder or the file; None for the descriptor
    digest: str  # SHA-256 over the parameters, the weights' bytes and the code version

    @property
    def batch_size(self) -> int:
        """Images per batch; 1 if their shapes differ."""
        if isinstance(self.config, DescriptorConfig):
            return 64
        if isinstance(self.config, ModelConfig) or self.config.resize == "square":
            return self.config.batch_size
        return 1


def resolve(config: EmbedderConfig, root: Path, key: str = "embed.embedder") -> Embedder:
    """Find the embedder's file or weights and compute its digest.

    Args:
        config: of the embedder.
        root: the workspace, to which paths are relative.
        key: parameter name of `config`, for messages.

    Raises:
        CurationError: the file or folder does not exist.
    """
    location = _locate(config, root, key)
    definition: dict[str, Any] = config.model_dump(exclude={"path", "weights"})  # the bytes count, not their path
    if isinstance(config, ModelConfig) and config.preprocessing.pooling == "cls":
        del definition["preprocessing"]["pooling"]  # digests stay those of before this option
    definition |= {"version": VERSION, "descriptor_version": descriptor.VERSION if location is None else None}
    if location is not None:
        files = [location / name for name in WEIGHTS_FILES] if location.is_dir() else [location]
        definition["sha256"] = [sha256_file(path) for path in files]
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
    return Embedder(config, location, digest)


@lru_cache(maxsize=2)  # one for copies, one semantic
def load(embedder: Embedder) -> Embed:
    """Load an embedder once per process; it maps B RGB images to [B, D] float32, unnormalized."""
    config, location = embedder.config, embedder.location
    if isinstance(config, DescriptorConfig):
        return descriptor.describe
    assert location is not None
    if isinstance(config, ModelConfig):
        return _load_model(config, location)
    return _load_onnx(config, location) if isinstance(config, OnnxConfig) else _load_torchscript(config, location)


def normalized_pixels(image: Image.Image, resize: str, size: int) -> NDArray[np.float32]:
    """Resize and normalize one RGB image as SSCD does (facebookresearch/sscd-copy-detection, README).

    Returns:
        [3, H, W] float32: H = W = size for "square", else the shorter side = size with the aspect ratio preserved.
    """
    keep_ratio = resize == "short_side"
    resized = resize_short_side(image, size, Image.Resampling.BILINEAR) if keep_ratio else squeeze(image, size)
    normalized = normalize(np.asarray(resized, np.float32))  # [H, W, 3]
    return np.ascontiguousarray(normalized.transpose(2, 0, 1), np.float32)


def _locate(config: EmbedderConfig, root: Path, key: str) -> Path | None:
    if isinstance(config, DescriptorConfig):
        return None
    if isinstance(config, ModelConfig):
        return _locate_weights(config.weights, root, key)
    path = root / config.path
    if not path.is_file():
        raise CurationError(f"{key}.path: {path}: no such file; a {config.kind} embedder needs one")
    return path


def _locate_weights(weights: str, root: Path, key: str) -> Path:
    if is_registered(weights):
        from components.core.registered_weights import download_weights

        return download_weights(weights, root)
    folder = root / weights
    for name in WEIGHTS_FILES:
        if not (folder / name).is_file():
            advice = "give a weights folder or models:/NAME@alias"
            raise CurationError(f"{key}.weights: {folder}: no {name} in there; {advice}")
    return folder


def _load_model(config: ModelConfig, folder: Path) -> Embed:
    import torch

    from components.model.export import load_backbone
    from components.model.pooling import features

    backbone = load_backbone(folder)
    patch, size = backbone.config.patch_size, config.preprocessing.crop_size
    if size % patch:
        raise CurationError(f"preprocessing.crop_size {size} is not a multiple of {patch}, the patch size of {folder}")

    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        crops = center_crops(images, config.preprocessing)  # [B, S, S, 3]
        with _one_torch_thread(), torch.inference_mode():
            pixels = to_input(torch.from_numpy(crops).permute(0, 3, 1, 2))
            return features(backbone, pixels, config.preprocessing).numpy()  # [B, F]

    return embed


def _load_torchscript(config: TorchScriptConfig, path: Path) -> Embed:
    import torch

    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise CurationError(f"{path}: not a TorchScript file: {str(error).splitlines()[0]}") from None

    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        batch = np.stack([normalized_pixels(image, config.resize, config.size) for image in images])
        with _one_torch_thread(), torch.inference_mode():
            try:
                vectors = module(torch.from_numpy(batch))
            except RuntimeError as error:
                raise _refused(path, batch, error) from None
        return _checked(vectors, len(images), path)

    return embed


def _load_onnx(config: OnnxConfig, path: Path) -> Embed:
    try:
        import onnxruntime
    except ImportError:
        raise CurationError("an onnx embedder needs onnxruntime: pip install 'pedigree[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        raise CurationError(f"{path}: not a usable ONNX file: {str(error).splitlines()[0]}") from None
    name = session.get_inputs()[0].name

    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        batch = np.stack([normalized_pixels(image, config.resize, config.size) for image in images])
        try:
            vectors = session.run(None, {name: batch})[0]
        except Exception as error:  # of any type, as above
            raise _refused(path, batch, error) from None
        return _checked(vectors, len(images), path)

    return embed


def _checked(vectors: Any, num_images: int, path: Path) -> NDArray[np.float32]:
    """Return the output of an external model, validated as an array or tensor [B, D]."""
    shape = list(getattr(vectors, "shape", ()))
    if len(shape) != 2 or shape[0] != num_images:
        given = f"shape {shape}" if shape else type(vectors).__name__
        raise CurationError(f"{path}: gave {given} for {num_images} images; expected [{num_images}, D]")
    return np.asarray(vectors, np.float32)


def _refused(path: Path, batch: NDArray[np.float32], error: Exception) -> CurationError:
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return CurationError(f"{path}: cannot take images of shape {list(batch.shape)}: {last}; see `size`")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Use one torch thread: parallelism is over shards, and sums must not depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
