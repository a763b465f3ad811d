"""A ViT-S/14 as it is served, beside plain torch; and exported: its features in timm, transformers, onnxruntime."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESOLUTION, BATCH = 224, 8
CLOSE = 1e-4  # largest difference of a feature
LIBRARIES = ("timm==1.0.31", "transformers==5.23.0")
PLACE = Path(".pedigree/cache/exports-venv")
Tokens = tuple[Any, ...]  # class tokens [B, D] and patch tokens [B, P, D]
Run = Callable[[], Tokens]

# Run where the libraries are: reads images [B, 3, S, S] and an export; a forward pass for each line; writes its tokens.
THEIRS = """
import sys
import numpy as np, torch
try:
    import torchvision
except RuntimeError:  # PyPI's build for CUDA beside torch for CPU: compiled operators that nothing here calls
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
kind, path, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
images = torch.from_numpy(np.load(folder + "/images.npy"))
if kind == "timm":
    import timm
    model = timm.create_model("local-dir:" + path, pretrained=True).eval()
    from safetensors.torch import load_file
    assert model.load_state_dict(load_file(path + "/model.safetensors"), strict=True)
    def run():
        tokens = model.forward_features(images)
        return tokens[:, 0], tokens[:, model.num_prefix_tokens:]
else:
    from transformers import AutoModel
    model, told = AutoModel.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    model.eval()
    registers = getattr(model.config, "num_register_tokens", 0)
    def run():
        tokens = model(images).last_hidden_state
        return tokens[:, 0], tokens[:, 1 + registers:]
with torch.inference_mode():
    for number, _ in enumerate(sys.stdin):
        cls_token, patch_tokens = run()
        if number == 0:
            np.savez(folder + "/tokens.npz", cls_token=cls_token.numpy(), patch_tokens=patch_tokens.numpy())
        print(number, flush=True)
"""


SMALL = {"dim": 384, "depth": 12, "num_heads": 6, "image_size": 518, "layer_scale_init": 1.0}
# As the published models without registers: another rule for positions; and a gated feed-forward, as the giant has.
GATED = {
    **SMALL, "depth": 2, "ffn": "swiglu", "num_registers": 0, "interpolate_antialias": False, "interpolate_offset": 0.1
}  # fmt: skip


@contextmanager
def named_vit(shape: dict[str, Any]) -> Iterator[Any]:
    """Weights whose tensors all matter, as a person names them."""
    import torch

    from components.model.config import Preprocessing, ViTConfig
    from components.model.export import save_weights
    from components.model.vit import VisionTransformer
    from components.registry.named_weights import NamedWeights

    torch.manual_seed(0)
    backbone = VisionTransformer(ViTConfig(**shape))
    for parameter in backbone.parameters():
        if parameter.ndim == 1:  # biases are zero and norms one at first
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    with tempfile.TemporaryDirectory() as name:
        save_weights(Path(name, "weights"), backbone, None, {})
        yield NamedWeights("bench", Path(name, "weights"), Preprocessing())


@contextmanager
def served(files: list[bytes]) -> Iterator[tuple[Callable[[list[bytes]], Any], Callable[[list[bytes]], Any], Path]]:
    """The registered model as MLflow loads it, a plain torch loop that gives the same, and the model's folder."""
    import mlflow
    import pandas as pd
    import torch
    from mlflow.models import Model

    from components.model.config import Preprocessing
    from components.model.export import load_backbone
    from components.registry.publish import save_model
    from tests.registry.made_up import candidate

    before = sys.path.copy()
    with named_vit(SMALL) as weights:
        folder = weights.folder.with_name("model")
        save_model(candidate(weights.folder, files[0], weights.preprocessing or Preprocessing()), folder, Model())
        model, backbone = mlflow.pyfunc.load_model(str(folder)), load_backbone(weights.folder)

        def plain(images: list[bytes]) -> NDArray[np.float32]:
            with torch.inference_mode():
                return backbone(torch.from_numpy(np.stack([_plainly(data) for data in images]))).cls_token.numpy()

        yield lambda images: model.predict(pd.DataFrame({"image": images})), plain, folder
    sys.path[:] = before


def _plainly(data: bytes) -> NDArray[np.float32]:
    """One image as the network takes it, by Pillow and NumPy alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((16, 16, 240, 240)), np.float32) / 255
    return ((pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])).transpose(2, 0, 1)


@contextmanager
def exported(kind: str, shape: dict[str, Any], threads: int) -> Iterator[tuple[Run, Run]]:
    """A forward pass of a batch by ours and by the library that reads the export, whose features are close to ours."""
    import torch

    from components.model.export import load_backbone
    from components.registry.exports import export

    with named_vit(shape) as weights:
        form: Any = kind
        done = export(weights, form, weights.folder.with_name(f"out{'.onnx' if kind == 'onnx' else ''}"), RESOLUTION)
        images = np.random.default_rng(0).standard_normal((BATCH, 3, RESOLUTION, RESOLUTION), np.float32)
        backbone = load_backbone(weights.folder)

        def ours() -> Tokens:
            with torch.inference_mode():
                output = backbone(torch.from_numpy(images))
            return output.cls_token.numpy(), output.patch_tokens.numpy()

        read = _in_onnxruntime if kind == "onnx" else functools.partial(_in_library, kind)
        with read(done.path, images, threads) as theirs:
            for own, found in zip(ours(), theirs(), strict=True):
                difference = np.abs(own - found).max()
                assert difference < CLOSE, f"{kind}: features differ by {difference:.1e}"
            yield ours, theirs


@contextmanager
def _in_onnxruntime(path: Path, images: NDArray[np.float32], threads: int) -> Iterator[Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options)
    yield lambda: tuple(session.run(["cls_token", "patch_tokens"], {"images": images}))


@contextmanager
def _in_library(kind: str, path: Path, images: NDArray[np.float32], threads: int) -> Iterator[Run]:
    """A process where the library is, that runs once for each line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images)
        command = [str(libraries()), "-c", THEIRS, kind, str(path), name, str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (folder / "errors").open("w") as errors, subprocess.Popen(command, **pipes, stderr=errors) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            asked, answered = process.stdin, process.stdout

            def run() -> Tokens:
                asked.write("run\n")
                asked.flush()
                if not answered.readline():
                    raise RuntimeError(f"{kind}: {(folder / 'errors').read_text()[-3000:]}")
                tokens = np.load(folder / "tokens.npz")
                return tokens["cls_token"], tokens["patch_tokens"]

            yield run


def libraries() -> Path:
    """Python of an environment with timm and transformers, which sees our packages, torch among them."""
    python, ready = PLACE / "bin/python", PLACE / "ready"
    wanted = "\n".join(LIBRARIES)
    if not ready.is_file() or ready.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PLACE)], check=True)
        inside = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.check_output(inside, text=True).strip())
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        torch = importlib.metadata.version("torch").split("+")[0]
        install = [str(python), "-m", "pip", "install", "-q", *LIBRARIES, f"torch=={torch}"]
        subprocess.run(install, check=True)
        ready.write_text(wanted)
    return python
