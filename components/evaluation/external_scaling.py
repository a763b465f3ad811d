"""How a model of another program wants its images, read from the files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from components.core.config import Config, ConfigError, ConfigT, validate
from components.model.config import Preprocessing
from components.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD

BICUBIC = 3  # of Pillow, as transformers writes it
TIMM_CROP = 0.875  # timm's DEFAULT_CROP_PCT
MAX_JSON = 2**20  # bytes
PREPROCESSOR_FILE = "preprocessor_config.json"

Side = Annotated[int, Field(ge=1, le=8192)]
Mean = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Std = tuple[Positive, Positive, Positive]


@dataclass(frozen=True)
class Scaling:
    """How images are scaled, cut and normalized.

    Attributes:
        preprocessing: None where nothing states it.
        mean: of the channels of pixels from 0 to 1.
        std: of the same.
        facts: lines on what is assumed, and on what a model asks for and does not get.
    """

    preprocessing: Preprocessing | None = None
    mean: Mean = IMAGENET_MEAN
    std: Std = IMAGENET_STD
    facts: tuple[str, ...] = ()


class _Stated(Config):
    """A part of a file of another program, whose other keys do not matter here."""

    model_config = ConfigDict(extra="ignore")


class _Sides(_Stated):
    shortest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None


class _Preprocessor(_Stated):
    """`preprocessor_config.json` of transformers."""

    size: Side | _Sides | None = None
    crop_size: Side | _Sides | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    resample: int | None = None
    image_mean: Mean | None = None
    image_std: Std | None = None


class _PretrainedCfg(_Stated):
    """`pretrained_cfg` of timm."""

    input_size: tuple[int, Side, Side] = (3, 224, 224)
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: str | None = None
    mean: Mean = IMAGENET_MEAN
    std: Std = IMAGENET_STD


class _Own(_Stated):
    """What an export of ours states."""

    resize_size: int
    crop_size: int
    mean: Mean = IMAGENET_MEAN
    std: Std = IMAGENET_STD


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB.

    Raises:
        ConfigError: it is something else.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise ConfigError(f"{path}: larger than {MAX_JSON:,} bytes; give the file that the library has written")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({type(error).__name__}); save the model again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds {type(found).__name__}, expected a JSON object; save the model again")
    return found


def of_own_export(text: str, origin: str) -> Scaling:
    """Return the scaling that an export of Pedigree states as JSON."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: pedigree.preprocessing is no JSON object; export the model again")
    stated = _valid(_Own, values, f"{origin}, pedigree.preprocessing")
    sizes = {"resize_size": stated.resize_size, "crop_size": stated.crop_size}
    return Scaling(_valid(Preprocessing, sizes, f"{origin}, pedigree.preprocessing"), stated.mean, stated.std)


def of_timm(values: dict[str, Any], origin: str) -> Scaling:
    """Return the scaling of timm's `pretrained_cfg`."""
    stated = _valid(_PretrainedCfg, values, f"{origin}, pretrained_cfg")
    height, width = stated.input_size[1:]
    if height != width:
        raise ConfigError(f"{origin}: input_size {height}x{width}; only square images are evaluated: set one side")
    sizes = {"resize_size": int(height / (stated.crop_pct or TIMM_CROP)), "crop_size": height}
    preprocessing = _valid(Preprocessing, sizes, origin)
    other = stated.interpolation not in (None, "bicubic")
    facts = (f"{origin} asks for {stated.interpolation} interpolation, here it is bicubic",) if other else ()
    return Scaling(preprocessing, stated.mean, stated.std, facts)


def beside(folder: Path, name: str) -> Scaling:
    """Return the scaling of `preprocessor_config.json` in a folder, or that of DINOv2 with a fact on it."""
    path = folder / PREPROCESSOR_FILE
    if not path.is_file():
        return Scaling(
            facts=(
                f"{name}: nothing states how its images are scaled (no {PREPROCESSOR_FILE} beside it); as in DINOv2, "
                "colors have ImageNet's mean and standard deviation",
            )
        )
    stated = _valid(_Preprocessor, read_json(path), str(path))
    resized, cut = _side(stated.size, path), _side(stated.crop_size, path)
    squeezed = isinstance(stated.size, _Sides) and stated.size.shortest_edge is None and not stated.do_center_crop
    crop = cut if cut is not None and stated.do_center_crop is not False else resized
    if crop is None:
        raise ConfigError(f"{path}: neither size nor crop_size; give one in pixels")
    resize = max(crop, resized or crop) if stated.crop_pct is None else round(crop / stated.crop_pct)
    facts = [f"{path}: squeezes images to a square, here the middle square is cut"] if squeezed else []
    if stated.resample not in (None, BICUBIC):
        facts.append(f"{path}: resample {stated.resample} of Pillow, here it is {BICUBIC}, bicubic")
    mean, std = stated.image_mean or IMAGENET_MEAN, stated.image_std or IMAGENET_STD
    if stated.do_normalize is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif stated.image_mean is None or stated.image_std is None:
        facts.append(f"{path}: no image_mean or image_std, so ImageNet's")
    sizes = {"resize_size": resize, "crop_size": crop}
    return Scaling(_valid(Preprocessing, sizes, str(path)), mean, std, tuple(facts))


def _side(size: int | _Sides | None, path: Path) -> int | None:
    """Return the pixels of a side, in each of the ways that transformers writes it."""
    if not isinstance(size, _Sides):
        return size
    if size.height != size.width:
        raise ConfigError(f"{path}: {size.height}x{size.width} pixels; only square images are evaluated: set one side")
    return size.shortest_edge or size.height


def _valid(model: type[ConfigT], values: dict[str, Any], origin: str) -> ConfigT:
    """Validate, with one line for all that is wrong."""
    try:
        return validate(model, values, origin)
    except ConfigError as error:
        raise ConfigError(str(error).splitlines()[0]) from None
