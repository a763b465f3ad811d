"""Models of other programs beside ours, by their path: folders of transformers or timm, ONNX or TorchScript files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from components.core.config import ConfigError
from components.core.errors import known
from components.data.evalset import Evalset
from components.evaluation.compare import ComparedModel
from components.evaluation.encoders import Encoded, Encoder
from components.evaluation.external_networks import CONFIG_FILE, LOADERS, MODELS, Kind, Network, first_line
from components.evaluation.external_scaling import read_json
from components.evaluation.settings import scaled
from components.model.config import Preprocessing
from components.model.preprocessing import to_input

SUFFIXES: dict[str, Kind] = {".onnx": "onnx", ".pt": "torchscript", ".ts": "torchscript"}
USUAL_SIDE = 224  # pixels, where nothing states a size
MOST_OTHER_TOKENS = 16  # before the patch tokens: class and register tokens


@dataclass(frozen=True)
class External:
    """A model, and lines on what is assumed of it and what it does not give."""

    model: ComparedModel
    facts: tuple[str, ...]


class ExternalEncoder(Encoder):
    """A network of another program, of which the last layer is read."""

    def __init__(self, name: str, network: Network) -> None:
        shape = f"{network.shape} {network.scaling.mean} {network.scaling.std}"
        super().__init__(torch.device(network.device), shape, None if network.side else network.patch)
        self._name, self._network = name, network

    def outputs(self, images: Tensor) -> Sequence[Tensor]:
        """Return what the network gives for images [B, S, S, 3] uint8, on its device.

        Raises:
            ConfigError: it takes no such images.
        """
        pixels = to_input(images.permute(0, 3, 1, 2), self._network.scaling.mean, self._network.scaling.std)
        try:
            return self._network.run(pixels)
        except Exception as error:  # of any type: what runs here is not ours
            if known(error) is not None:
                raise
            raise ConfigError(
                f"{self._name}: takes no images {list(pixels.shape)}: {first_line(error)}; state the size that it "
                "wants in preprocessor_config.json beside it, or measure it on a set of another resolution"
            ) from error

    def _encode(self, images: Tensor) -> Encoded:
        found = self.outputs(images)
        feature, patches = _feature_and_patches(found, images.shape[1], self._name)
        for part in (feature, *patches):
            if len(part) != len(images):
                raise ConfigError(f"{self._name}: gives {list(part.shape)} for {len(images)} images; export it again")
            if not torch.isfinite(part).all():
                raise ConfigError(f"{self._name}: gives NaN or infinite values; give other weights")
        return Encoded(feature[:, None], patches)

    def untrained(self, seed: int) -> Encoder | None:
        """Return it with random weights, drawn as its library does, but for layer scales of 1."""
        fresh = self._network.fresh
        if fresh is None:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ExternalEncoder(f"random weights of {self._name}", replace(self._network, run=fresh(seed)))


def external_kind(given: str) -> Kind | None:
    """Return what a path holds; None: a weights folder of Pedigree, or nothing that can be told here.

    Raises:
        ConfigError: a file of another kind.
    """
    path = Path(given)
    if path.is_file():
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(f"{given}: no model that can be evaluated; give a weights folder, {MODELS}")
        return kind
    if not (path / CONFIG_FILE).is_file():
        return None
    try:
        values = read_json(path / CONFIG_FILE)
    except ConfigError:
        return None  # the reader of weights folders says more
    if isinstance(values.get("architecture"), str):
        return "timm"
    return "transformers" if isinstance(values.get("model_type"), str) else None


def load_external(given: str, kind: Kind, evalset: Evalset) -> External:
    """Load a model of another program for one evaluation set, and look at what it gives for one image.

    Args:
        given: its path, which is its name too.
        kind: from `external_kind`.
        evalset: decides on the size of images, where the model takes several.

    Raises:
        ConfigError: a library is missing, or the file is not such a model; one line.
    """
    network = LOADERS[kind](Path(given))
    stated, side = network.scaling.preprocessing, network.side
    own = stated or Preprocessing().at(side or USUAL_SIDE)
    own = own if side in (None, own.crop_size) else own.at(side)
    preprocessing = scaled(own, evalset, None if side else network.patch)
    encoder = ExternalEncoder(given, network)
    facts = [*network.facts, *network.scaling.facts, *_looked_at(encoder, given, preprocessing.crop_size)]
    if side and evalset.config.resolution not in (None, side):
        facts.append(f"{given}: takes images of {side} pixels only")
    digest = f"{network.digest} {network.scaling.mean} {network.scaling.std}"
    return External(ComparedModel(given, digest, encoder, preprocessing), tuple(facts))


def _looked_at(encoder: ExternalEncoder, name: str, side: int) -> list[str]:
    """Return lines on what the network gives for a black image."""
    found = encoder.encode_black(side)
    facts = [f"{name}: its last layer is all that is read, and its features are class tokens"]
    if not found.patches:
        facts[0] += "; it gives no patch tokens: segmentation and depth are not measured"
    with torch.inference_mode():
        first = encoder.outputs(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=encoder.device))[0]
    if first.ndim == 3 and found.patches:
        rows, tokens = isqrt(found.patches[0].shape[1]), first.shape[1]
        facts.append(f"{name}: {tokens} tokens, taken as {tokens - rows**2} others and {rows} x {rows} patch tokens")
    return facts


def _feature_and_patches(outputs: Sequence[Tensor], side: int, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the feature [B, D] and the patch tokens [B, P, D], or an empty tuple, of what a network gives.

    Args:
        outputs: a feature [B, D], maybe followed by patch tokens [B, P, D]; or all tokens [B, 1 + R + P, D], of which
            the last P are those of the largest square grid that tiles the image. Others are not read.
        side: of the images, in pixels.
        name: of the model.
    """
    first, *rest = outputs or [torch.empty(0)]
    if first.ndim == 2:
        square = rest and rest[0].ndim == 3 and isqrt(rest[0].shape[1]) ** 2 == rest[0].shape[1]
        return first, (rest[0],) if square else ()
    if first.ndim != 3 or 0 in first.shape:
        shapes = ", ".join(str(list(one.shape)) for one in outputs) or "nothing"
        raise ConfigError(f"{name}: gives {shapes}; a feature [B, D] or tokens [B, 1 + R + P, D] must come first")
    rows = max(rows for rows in range(1, isqrt(first.shape[1]) + 1) if side % rows == 0)
    others = first.shape[1] - rows**2
    if rows == 1 or others > MOST_OTHER_TOKENS:
        return first[:, 0], ()
    return first[:, 0] if others else first.mean(dim=1), (first[:, others:],)
