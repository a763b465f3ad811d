"""Weights in the forms that other programs read: written aside, read back, compared with ours, then put in place.

But for the forms that our own and DINOv2's code read, a file is for one resolution: its position embedding is resampled
to it here, since antialiased resampling comes out wrong or not at all in exported graphs (dinov2 issue 288).
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.config import ConfigError
from components.core.errors import PedigreeError
from components.core.storage import disk_errors, write_json
from components.model.config import Preprocessing, ViTConfig
from components.model.export import find_problems, load_backbone, to_dinov2
from components.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD, center_crops, to_input
from components.model.published import from_dinov2
from components.model.vit import VisionTransformer, resample_positions
from components.registry import export_names as names
from components.registry.named_weights import NamedWeights, is_reference

Format = Literal["safetensors", "dinov2", "timm", "transformers", "onnx", "torch-export"]
Tokens = tuple[Tensor, Tensor]  # class tokens [B, D] and patch tokens [B, P, D]
Model = Callable[[Tensor], Tokens]

LEAST_COSINE = 0.9999  # of every token with ours; what is below is refused
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")  # of scikit-image, in its wheel
BACKBONE, CONFIG, STATED = "model.safetensors", "config.json", "pedigree.json"
ONNX_LIMIT = 2**31  # bytes of one file


class ExportError(PedigreeError):
    """Weights cannot be exported in this form, or come out differently; nothing was written."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the file or folder.
        resolution: pixels a side of the images that it is for; the position grid's for forms of any resolution.
        num_tensors: in it.
        left_out: tensors of ours that are not in it.
        least_cosine: of a class or patch token with ours, over the photographs.
        largest_difference: of any value of these tokens from ours.
        num_images: photographs that were compared.
        facts: what it states of its origin.
        usage: a line of Python that loads it.
    """

    path: Path
    resolution: int
    num_tensors: int
    left_out: tuple[str, ...]
    least_cosine: float
    largest_difference: float
    num_images: int
    facts: Mapping[str, str]
    usage: str


@dataclass(frozen=True)
class _Source:
    """A backbone whose positions are those of the exported resolution, and what a file says beside its tensors."""

    backbone: VisionTransformer
    preprocessing: Preprocessing
    facts: Mapping[str, str]

    @property
    def config(self) -> ViTConfig:
        return self.backbone.config


@dataclass(frozen=True)
class _Form:
    """One form: what is added to the name (nothing: a folder), and how it is written, read back and loaded."""

    suffix: str
    write: Callable[[_Source, Path], int]  # the number of tensors
    read: Callable[[Path, ViTConfig], Model]
    usage: str
    any_resolution: bool = False
    left_out: tuple[str, ...] = ()


def export(weights: NamedWeights, form: Format, out: Path | None, resolution: int | None) -> Export:
    """Write weights in a form, whole or not at all.

    Args:
        weights: what to export.
        form: which.
        out: file or folder; None names it after the weights and the form, in the working folder.
        resolution: pixels a side; None takes that of the evaluation, or for forms of any resolution the trained grid.

    Raises:
        ConfigError: `out` exists, or a resolution that patches do not tile.
        ExportError: a library is missing, the form cannot hold the weights, or gives other tokens than ours.
    """
    kind = FORMS[form]
    path = out or Path(f"{_stem(weights)}{kind.suffix or f'-{form}'}")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: is there already; remove it, or name another by --out")
    source = _prepare(weights, resolution, kind.any_resolution)
    with _aside(path) as staging:
        num_tensors = kind.write(source, staging)
        least, largest, count = _compare(source, kind.read(staging, source.config))
        if not least >= LEAST_COSINE:  # NaN too
            raise ExportError(f"{path}: not written: cosine {least:.6f} with ours on photographs, below {LEAST_COSINE}")
    return Export(
        path=path,
        resolution=source.backbone.grid_size * source.config.patch_size,
        num_tensors=num_tensors,
        left_out=kind.left_out,
        least_cosine=least,
        largest_difference=largest,
        num_images=count,
        facts=source.facts,
        usage=kind.usage.format(path=str(path)),
    )


def _stem(weights: NamedWeights) -> str:
    return weights.name.replace("/", "-") if is_reference(weights.name) else Path(weights.name).resolve().name


def _prepare(weights: NamedWeights, resolution: int | None, any_resolution: bool) -> _Source:
    backbone = load_backbone(weights.folder)
    preprocessing = weights.preprocessing_at(resolution, backbone.config)
    trained = backbone.grid_size * backbone.config.patch_size
    size = trained if any_resolution and resolution is None else preprocessing.crop_size
    how = {**preprocessing.model_dump(), "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}
    folded = fold_positions(backbone, size)
    stated = {"backbone": folded.config.model_dump(), "preprocessing": how}
    facts = {**weights.facts, **{f"pedigree.{key}": json.dumps(value) for key, value in stated.items()}}
    return _Source(folded, preprocessing.at(size), facts)


def fold_positions(backbone: VisionTransformer, resolution: int) -> VisionTransformer:
    """The same network with the position grid of a resolution, at which it then resamples nothing."""
    grid = resolution // backbone.config.patch_size
    state = to_dinov2(backbone)
    if grid != backbone.grid_size:
        state["pos_embed"] = resample_positions(state["pos_embed"], backbone.config, grid, grid)
    return _strictly_loaded(state, backbone.config.model_copy(update={"image_size": resolution}), "folded")


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` that takes its place when the block ends well; remove what a killed call left."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with disk_errors(path):
            yield folder / path.name
            (folder / path.name).rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.inference_mode()
def _compare(source: _Source, exported: Model) -> tuple[float, float, int]:
    """Least cosine and largest difference of the tokens of photographs, and the number of these."""
    from skimage import data

    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    crops = torch.from_numpy(center_crops(photographs, source.preprocessing)).permute(0, 3, 1, 2)  # [B, 3, S, S]
    images = to_input(crops)
    own = source.backbone(images)
    first, rest = exported(images[:-1]), exported(images[-1:])  # batches of different sizes
    least, largest = 1.0, 0.0
    for ours, *theirs in zip((own.cls_token, own.patch_tokens), first, rest, strict=True):
        found = torch.cat(theirs).double()
        if found.shape != ours.shape:
            raise ExportError(f"gives tokens of shape {list(found.shape)}, expected {list(ours.shape)}")
        # `min` and `max` of torch pass NaN on, those of Python do not.
        cosines = nn.functional.cosine_similarity(found, ours.double(), dim=-1)
        least = float(torch.minimum(cosines.min(), cosines.new_tensor(least)))
        largest = float(torch.maximum((found - ours).abs().max(), cosines.new_tensor(largest)))
    return least, largest, len(photographs)


def _strictly_loaded(state: Mapping[str, Tensor], config: ViTConfig, what: str) -> VisionTransformer:
    with torch.device("meta"):
        backbone = VisionTransformer(config)
    if problems := find_problems(backbone, state):
        raise ExportError(f"{what}: {len(problems)} tensors do not fit, first {problems[0]}")
    backbone.to_empty(device="cpu").load_state_dict(dict(state))
    return backbone.eval()


def _model(backbone: VisionTransformer) -> Model:
    def run(images: Tensor) -> Tokens:
        output = backbone(images)
        return output.cls_token, output.patch_tokens

    return run


def _write_safetensors(source: _Source, path: Path) -> int:
    return _save(to_dinov2(source.backbone), path, source.facts)


def _save(state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]) -> int:
    save_file(dict(state), path, metadata={"format": "pt", **facts})
    path.chmod(0o644)  # save_file lets only the owner read
    return len(state)


def _read_safetensors(path: Path, config: ViTConfig) -> Model:
    return _model(_strictly_loaded(load_file(path), config, path.name))


def _write_dinov2(source: _Source, path: Path) -> int:
    state = OrderedDict(sorted(to_dinov2(source.backbone).items()))
    # torch keeps such an attribute in a state, and `load_state_dict` takes only what it knows of it.
    state._metadata = OrderedDict(pedigree=dict(source.facts))  # pyright: ignore[reportAttributeAccessIssue]
    torch.save(state, path)
    return len(state)


def _read_dinov2(path: Path, config: ViTConfig) -> Model:
    return _model(_strictly_loaded(torch.load(path, weights_only=True), config, path.name))


def _write_timm(source: _Source, folder: Path) -> int:
    folder.mkdir()
    write_json(folder / CONFIG, names.timm_config(source.config, source.preprocessing))
    return _save(names.to_timm(to_dinov2(source.backbone)), folder / BACKBONE, source.facts)


def _read_timm(folder: Path, config: ViTConfig) -> Model:
    state = names.from_timm(load_file(folder / BACKBONE), config)
    return _model(_strictly_loaded(state, config, folder.name))


def _write_transformers(source: _Source, folder: Path) -> int:
    if not (ratio := source.config.ffn_ratio).is_integer():
        raise ExportError(f"transformers: takes a whole `ffn_ratio` only, but these weights have {ratio}; use timm")
    folder.mkdir()
    write_json(folder / CONFIG, names.transformers_config(source.config))
    write_json(folder / "preprocessor_config.json", names.transformers_preprocessor(source.preprocessing))
    return _save(names.to_transformers(to_dinov2(source.backbone)), folder / BACKBONE, source.facts)


def _read_transformers(folder: Path, config: ViTConfig) -> Model:
    return _model(_strictly_loaded(from_dinov2(load_file(folder / BACKBONE)), config, folder.name))


class _TwoOutputs(nn.Module):
    """The backbone as a graph takes it: tensors in, tensors out."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tokens:
        output = self.backbone(images)
        return output.cls_token, output.patch_tokens


def _program(source: _Source) -> torch.export.ExportedProgram:
    """The graph of a forward pass: any number of images, of one size."""
    size = source.config.image_size
    assert size is not None
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(_TwoOutputs(source.backbone), (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes)


def _write_torch_export(source: _Source, path: Path) -> int:
    program = _program(source)
    torch.export.save(program, path, extra_files={STATED: json.dumps(source.facts)})
    return len(program.state_dict)


def _read_torch_export(path: Path, config: ViTConfig) -> Model:
    return torch.export.load(path).module()


def _write_onnx(source: _Source, path: Path) -> int:
    try:
        import onnxruntime  # noqa: F401 - reads it back
        import onnxscript  # noqa: F401 - torch writes by it
    except ImportError as error:
        raise ExportError(f"onnx needs {error.name}: pip install 'pedigree[onnx]'") from None
    num_bytes = sum(tensor.nbytes for tensor in source.backbone.state_dict().values())
    if num_bytes > ONNX_LIMIT:
        raise ExportError(f"onnx: {num_bytes / 2**30:.1f} GiB of weights, but one file holds 2 GiB; use torch-export")
    outputs = ["cls_token", "patch_tokens"]
    program = torch.onnx.export(_program(source), input_names=["images"], output_names=outputs, verbose=False)
    assert program is not None
    program.model.metadata_props.update(source.facts)
    program.save(path, external_data=False)
    return len(program.model.graph.initializers)


def _read_onnx(path: Path, config: ViTConfig) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tokens:
        found: Any = session.run(["cls_token", "patch_tokens"], {"images": images.numpy()})
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return run


FORMS: dict[Format, _Form] = {
    "safetensors": _Form(
        ".safetensors",
        _write_safetensors,
        _read_safetensors,
        "safetensors.torch.load_file({path!r})",
        any_resolution=True,
    ),
    "dinov2": _Form(
        ".pth", _write_dinov2, _read_dinov2, "torch.load({path!r}, weights_only=True)", any_resolution=True
    ),
    "timm": _Form(
        "",
        _write_timm,
        _read_timm,
        'timm.create_model("local-dir:{path}", pretrained=True)',
        left_out=("mask_token",),
    ),
    "transformers": _Form(
        "", _write_transformers, _read_transformers, "transformers.AutoModel.from_pretrained({path!r})"
    ),
    "onnx": _Form(".onnx", _write_onnx, _read_onnx, "onnxruntime.InferenceSession({path!r})"),
    "torch-export": _Form(".pt2", _write_torch_export, _read_torch_export, "torch.export.load({path!r}).module()"),
}
