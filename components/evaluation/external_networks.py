"""Networks of other programs, read from their files.

Nothing is downloaded, and no pickle is read. A TorchScript file is a program: loading and running it can write files
with the rights of the caller, so it is to be trusted as a program is.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from components.core.config import ConfigError
from components.core.errors import known
from components.core.storage import sha256_file
from components.core.text import one_line, some_of
from components.evaluation.external_scaling import Scaling, beside, of_own_export, of_timm, read_json

Kind = Literal["transformers", "timm", "onnx", "torchscript"]
Run = Callable[[Tensor], Sequence[Tensor]]

CONFIG_FILE = "config.json"
MODELS = "a folder that transformers or timm has saved as .safetensors, an .onnx file, or TorchScript (.pt, .ts)"
LAYER_SCALES = (".gamma", ".lambda1")  # of timm and of transformers; 1 in random weights, as in ours
NO_DOWNLOADS = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


@dataclass(frozen=True)
class Network:
    """What was read of a path.

    Attributes:
        run: the network: normalized images [B, 3, S, S] to a feature [B, D], maybe followed by patch tokens [B, P, D],
            or to all tokens [B, 1 + R + P, D].
        digest: of all files that decide on its tokens.
        scaling: of its images.
        patch: pixels a side, which sides are multiples of.
        side: the only one that it takes; None: any.
        shape: its architecture as text.
        device: of the network.
        fresh: returns the same network with random weights, given a seed; None if there is no such way.
        facts: on its weights.
    """

    run: Run
    digest: str
    scaling: Scaling
    patch: int = 1
    side: int | None = None
    shape: str = ""
    device: str = "cpu"
    fresh: Callable[[int], Run] | None = None
    facts: tuple[str, ...] = ()


def _load_transformers(path: Path) -> Network:
    transformers, digest = _library("transformers", path), _digest(path)
    transformers.logging.set_verbosity_error()  # what it warns of is refused or told here
    transformers.logging.disable_progress_bar()
    try:
        model, told = transformers.AutoModel.from_pretrained(
            str(path.resolve()), output_loading_info=True, **NO_DOWNLOADS
        )
    except Exception as error:  # of any type on damaged files
        raise _unusable(path, error) from error
    missing = sorted(told["missing_keys"])
    _refuse_missing([name for name in missing if not name.startswith("pooler.")], path)
    patch, device = getattr(model.config, "patch_size", None), _device()
    patch = patch if isinstance(patch, int) else None

    def fresh(seed: int) -> Run:
        del seed  # of the global generator, which it draws from
        return _transformers_run(_randomized(transformers.AutoModel.from_config(model.config)), patch, pooled=True)

    return Network(
        _transformers_run(model, patch, pooled=not missing),
        digest,
        beside(path, str(path)),
        patch or 1,
        shape=model.config.to_json_string(),
        device=device,
        fresh=fresh,
        facts=_left_out(told["unexpected_keys"], path),
    )


def _transformers_run(model: nn.Module, patch: int | None, pooled: bool) -> Run:
    """Return the class token and the patch tokens after the last norm; without a class token, the library's pooling.

    Args:
        model: of transformers.
        patch: pixels a side.
        pooled: it has trained weights for its pooling.
    """
    model = model.float().eval().to(_device())
    resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    native: Any = getattr(model.config, "image_size", None)

    def run(images: Tensor) -> Sequence[Tensor]:
        side = images.shape[-1]
        found = model(pixel_values=images, **({"interpolate_pos_encoding": True} if resizes and side != native else {}))
        tokens, pooling = found.last_hidden_state, getattr(found, "pooler_output", None)
        if tokens.ndim != 3 or patch is None:
            return [tokens if pooling is None else pooling.flatten(1)]
        others = tokens.shape[1] - (side // patch) ** 2
        if others < 0:
            return [tokens]
        feature = tokens[:, 0] if others else pooling if pooling is not None and pooled else tokens.mean(dim=1)
        return [feature, tokens[:, others:]]

    return run


def _load_timm(path: Path) -> Network:
    timm, digest = _library("timm", path), _digest(path)
    config = read_json(path / CONFIG_FILE)
    name, arguments = config["architecture"], config.get("model_args") or {}
    stated = config.get("pretrained_cfg")
    reserved = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}
    if not isinstance(arguments, dict) or any(key in reserved or "pretrained" in key for key in arguments):
        raise ConfigError(f"{path / CONFIG_FILE}: model_args must shape the network only, not say what is loaded")
    if not timm.is_model(name):
        raise ConfigError(f"{path / CONFIG_FILE}: timm {timm.__version__} has no architecture {one_line(name)!r}")

    def create() -> nn.Module:
        return timm.create_model(name, **{**arguments, "num_classes": 0})

    try:
        model, tensors = create(), load_file(path / "model.safetensors")
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no model.safetensors in there; save it by timm's save_for_hf") from None
    except Exception as error:  # of any type on damaged files
        raise _unusable(path, error) from error
    _refuse_missing(missing, path)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    return Network(
        _timm_run(model),
        digest,
        of_timm(stated if isinstance(stated, dict) else {}, str(path / CONFIG_FILE)),
        patch if isinstance(patch, int) else 1,
        shape=json.dumps([name, arguments], sort_keys=True),
        device=_device(),
        fresh=lambda _: _timm_run(_randomized(create())),
        facts=_left_out(unexpected, path),
    )


def _timm_run(model: Any) -> Run:
    """Return the feature that timm pools, and the patch tokens of transformers with a known number of others."""
    model = model.eval().to(_device())
    others, embed = getattr(model, "num_prefix_tokens", None), getattr(model, "patch_embed", None)

    def run(images: Tensor) -> Sequence[Tensor]:
        size = (*images.shape[2:],)
        if getattr(embed, "img_size", None) not in (None, size) and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)  # resamples the position embedding
        tokens = model.forward_features(images)
        feature = model.forward_head(tokens, pre_logits=True)
        return [feature] if tokens.ndim != 3 or others is None else [feature, tokens[:, others:]]

    return run


def _load_onnx(path: Path) -> Network:
    onnxruntime, data = _library("onnxruntime", path, "'pedigree[onnx]'"), path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:  # of the bytes, so that the digest covers all: weights in other files are refused
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own for each way a file can be wrong
        raise _unusable(path, error) from error
    inputs = session.get_inputs()
    batch, channels, height, width = inputs[0].shape if inputs and len(inputs[0].shape) == 4 else (0, 0, 0, 0)
    sides = {side for side in (height, width) if isinstance(side, int)}
    fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and channels in (3, None, str(channels))
    if not fits or len(sides) > 1 or (isinstance(batch, int) and batch != 1):
        given = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs) or "none"
        raise ConfigError(
            f"{path}: its inputs are {one_line(given)}; allowed is one, float32 [B, 3, S, S] with any number of images "
            "or 1 at once; export it so"
        )
    metadata, name = session.get_modelmeta().custom_metadata_map, inputs[0].name
    own = metadata.get("pedigree.preprocessing")

    def run(images: Tensor) -> Sequence[Tensor]:
        parts = images.split(1 if batch == 1 else len(images))
        found = [session.run(None, {name: part.numpy()}) for part in parts]
        return [torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True)]

    scaling = beside(path.parent, str(path)) if own is None else of_own_export(own, str(path))
    return Network(run, hashlib.sha256(data).hexdigest(), scaling, side=next(iter(sides), None))


def _load_torchscript(path: Path) -> Network:
    try:
        with ZipFile(path) as archive:
            program = any("/code/" in name for name in archive.namelist())
    except (BadZipFile, OSError):
        program = False
    if not program:
        raise ConfigError(f"{path}: no TorchScript program; pickled weights are not read: give {MODELS}")
    try:
        model = torch.jit.load(str(path), map_location=_device()).eval()
    except Exception as error:  # of any type on damaged files
        raise _unusable(path, error) from error

    def run(images: Tensor) -> Sequence[Tensor]:
        found = model(images)
        found = [found] if isinstance(found, Tensor) else found
        if not isinstance(found, list | tuple):
            raise TypeError(f"gives {type(found).__name__}, not a tensor or several")
        return [one for one in found if isinstance(one, Tensor)]

    told = (f"{path}: a TorchScript file is a program, and ran with your rights",)
    return Network(run, sha256_file(path), beside(path.parent, str(path)), device=_device(), facts=told)


LOADERS: dict[Kind, Callable[[Path], Network]] = {
    "transformers": _load_transformers,
    "timm": _load_timm,
    "onnx": _load_onnx,
    "torchscript": _load_torchscript,
}


def _library(name: str, path: Path, package: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # the second where its own dependencies do not fit together
        advice = f"pip install {package or name}"
        raise ConfigError(f"{path}: needs {name}, which cannot be imported ({first_line(error)}): {advice}") from None


def _digest(folder: Path) -> str:
    """Return the SHA-256 over config.json and all weights of a folder.

    Raises:
        ConfigError: no weights that are not pickled.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{folder}: no .safetensors in there, and pickled weights are not read: save it in that form")
    files = [folder / CONFIG_FILE, *weights, *folder.glob("*.safetensors.index.json")]
    return hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _randomized(model: nn.Module) -> nn.Module:
    """Set layer scales to 1, as `random_network` does."""
    for name, parameter in model.named_parameters():
        if name.endswith(LAYER_SCALES):
            nn.init.ones_(parameter)
    return model


def _refuse_missing(names: Sequence[str], path: Path) -> None:
    if names:
        raise ConfigError(f"{path}: its weights lack {len(names)} tensors: {some_of(names)}; save the whole model")


def _left_out(names: Iterable[str], path: Path) -> tuple[str, ...]:
    left = sorted(names)
    return (f"{path}: {len(left)} tensors are not used: {some_of(left)}",) if left else ()


def _unusable(path: Path, error: Exception) -> ConfigError:
    if known(error) is not None:
        raise error
    return ConfigError(f"{path}: not a model that can be loaded: {first_line(error)}; give {MODELS}")


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, safe to print."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])
