"""A random DINOv2 model measured by our evaluator and by its library alone, where timm and transformers are.

`python -m tests.evaluation.in_library KIND FOLDER`, in an environment that sees our packages; prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from components.core.config import ConfigError
from components.data.evalset import Evalset, read_evalset
from components.data.shards import ShardReader, decode_image
from components.evaluation.compare import baselines, compare
from components.evaluation.config import (
    DepthConfig,
    KnnConfig,
    LinearConfig,
    ProbeConfig,
    SegmentationConfig,
    SlicesConfig,
)
from components.evaluation.external import external_kind, load_external
from components.evaluation.protocols import knn, linear
from components.evaluation.settings import Settings
from components.evaluation.tokens import Loading
from tests.evaluation.test_evaluation_stage import tiles, write_set

SIDE, PATCH = 42, 14
KNN, LINEAR = KnnConfig(num_neighbors=(5,), reported=5), LinearConfig(c_grid=(0.1, 10.0), max_iterations=200)
OTHERS = (ProbeConfig(), SlicesConfig(), SegmentationConfig(), DepthConfig())
SETTINGS = Settings(Loading(8, 0), KNN, LINEAR, *OTHERS)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
Tokens = tuple[torch.Tensor, torch.Tensor]  # features [B, D] and patch tokens [B, P, D]


def mend_torchvision() -> None:
    """PyPI's torchvision for CUDA beside torch for CPU: compiled operators that nothing here calls."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


def save_timm(folder: Path) -> None:
    import timm

    shape = {"img_size": SIDE, "embed_dim": 48, "depth": 3, "num_heads": 3, "init_values": 1.0}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=7, **shape)  # with a head that is left out
    timm.models.save_for_hf(model, folder, model_args=shape, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, SIDE, SIDE], "crop_pct": SIDE / 50, "mean": MEAN, "std": STD}
    (folder / "config.json").write_text(json.dumps(config))


def save_transformers(folder: Path) -> None:
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = Dinov2WithRegistersConfig(image_size=70, patch_size=PATCH, **shape)  # whose positions are resampled
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 50}, "crop_size": {"height": SIDE, "width": SIDE}}
    BitImageProcessor(image_mean=MEAN, image_std=STD, **sizes).save_pretrained(folder)


def by_timm(folder: Path, images: list[Image.Image]) -> Tokens:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = torch.stack([transform(image) for image in images])
    return model(pixels), model.forward_features(pixels)[:, model.num_prefix_tokens :]


def by_transformers(folder: Path, images: list[Image.Image]) -> Tokens:
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
    tokens = model(pixels).last_hidden_state
    return tokens[:, 0], tokens[:, 1 + model.config.num_register_tokens :]


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "norm" in name)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


BROKEN = {
    "timm": (
        without_a_tensor,
        lambda folder: configured(folder, architecture="hf-hub:timm/vit_tiny_patch16_224"),
        lambda folder: configured(folder, architecture="vit_tiny_patch16_224", model_args={"checkpoint_path": "x"}),
    ),
    "transformers": (
        without_a_tensor,
        lambda folder: configured(folder, model_type="its-own", auto_map={"AutoConfig": "code.Config"}),
        lambda folder: configured(folder, model_type="dinov2", hidden_size="many"),
    ),
}


def refusal(folder: Path, kind: Any, evalset: Evalset) -> str:
    try:
        load_external(str(folder), kind, evalset)
    except ConfigError as error:
        return str(error)
    return ""


def originals(evalset: Evalset) -> list[Image.Image]:
    reader, rows = ShardReader(evalset.images.root), evalset.images.images.to_pylist()
    return [decode_image(reader.read(row["shard"], row["offset"], row["length"])) for row in rows]


def measured(kind: Any, root: Path) -> dict[str, Any]:
    folder, name = root / kind, str(root / kind)
    torch.manual_seed(0)
    {"timm": save_timm, "transformers": save_transformers}[kind](folder)
    write_set(root, ((label, split, tile.crop((0, 0, 48, 48))) for label, split, tile in tiles()))
    evalset = read_evalset(root / "data/evaluation/sample/0123456789ab")
    assert external_kind(name) == kind
    external = load_external(name, kind, evalset)
    models = [external.model, *baselines(external.model, 0)]
    compared = compare(evalset, models, ("knn", "linear"), SETTINGS, root / "cache", 0)
    with torch.inference_mode():
        library = {"timm": by_timm, "transformers": by_transformers}[kind]
        feature, patches = (tokens.numpy() for tokens in library(folder, originals(evalset)))
    labels, tokens = evalset.images.labels, compared.tokens[name]
    theirs = knn.evaluate(feature, labels, KNN)
    theirs.update(linear.evaluate(feature, labels, LINEAR, "theirs"))
    ours, refused = compared.scores[name].metrics, []
    for breaks in BROKEN[kind]:
        breaks(folder)
        refused.append(refusal(folder, kind, evalset))
    return {
        "feature": float(np.abs(tokens.features - feature).max()),
        "mean_patch": float(np.abs(tokens.mean_patch - patches.mean(axis=1)).max()),
        "ours": {metric: ours[metric] for metric in theirs.metrics},
        "theirs": theirs.metrics,
        "models": [*compared.scores],
        "facts": external.facts,
        "refused": refused,
    }


if __name__ == "__main__":
    mend_torchvision()
    sys.stdout.write(json.dumps(measured(sys.argv[1], Path(sys.argv[2]))))
