from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from skimage import data

from components.curation import faces
from components.curation.config import CascadeConfig, CurationError, FaceOnnxConfig

ASTRONAUT_EYES_TO_MOUTH = (190, 90, 250, 150)  # pixels, seen by eye: left, top, right, bottom


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    config = CascadeConfig()
    return faces.load(config, faces.locate(config, tmp_path_factory.mktemp("root")))


def covers(box: faces.Box, region: tuple[int, int, int, int]) -> bool:
    left, top, right, bottom = region
    return box["x"] <= left and box["y"] <= top and box["x"] + box["w"] >= right and box["y"] + box["h"] >= bottom


def constant_detector(path, found: list[list[float]]) -> None:
    """A "detector" that always finds the same faces, and adds the mean of the image's pixels to the first's x1."""
    values = np.array(found, np.float32)
    count, width = values.shape
    first = np.zeros_like(values)
    first[0, 0] = 1
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["first", "mean"], ["shift"]),
            helper.make_node("Add", ["found", "shift"], ["faces"]),
        ],
        "constant",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("faces", TensorProto.FLOAT, [count, width])],
        [
            helper.make_tensor("found", TensorProto.FLOAT, values.shape, values.ravel()),
            helper.make_tensor("first", TensorProto.FLOAT, values.shape, first.ravel()),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_a_face_is_found_at_any_size_of_the_image(find, astronaut, scale):
    image = astronaut.resize((round(512 * scale), round(512 * scale)))
    region = tuple(round(side * scale) for side in ASTRONAUT_EYES_TO_MOUTH)
    assert any(covers(box, region) for box in find(image))


def test_recall_on_faces_in_the_wild(find):
    """The README's figures, on every fourth of the 100 faces and 100 other crops of LFW, at 50 pixels."""
    crops = [Image.fromarray(np.uint8(255 * crop)).convert("RGB").resize((50, 50)) for crop in data.lfw_subset()[::4]]
    canvases = [Image.new("RGB", (114, 114), (128, 128, 128)) for _ in crops]
    for canvas, crop in zip(canvases, crops, strict=True):
        canvas.paste(crop, (32, 32))
    found = np.array([bool(find(canvas)) for canvas in canvases])
    assert found[:25].mean() >= 0.9
    assert found[25:].mean() <= 0.1


def test_images_without_room_for_a_face(find):
    assert find(Image.new("RGB", (1, 1))) == find(Image.new("RGB", (23, 500))) == find(Image.new("RGB", (500, 3))) == []


def test_nothing_is_found_after_blurring_and_the_rest_is_untouched(find, astronaut):
    boxes = [box for box in find(astronaut) if covers(box, ASTRONAUT_EYES_TO_MOUTH)]
    blurred = faces.blur(astronaut, boxes)
    assert not any(covers(box, ASTRONAUT_EYES_TO_MOUTH) for box in find(blurred))
    changed = np.argwhere((np.asarray(blurred) != np.asarray(astronaut)).any(axis=2))
    box = boxes[0]
    margin = round(faces.MARGIN * box["w"])
    assert (changed.min(axis=0) >= [box["y"] - margin, box["x"] - margin]).all()
    assert (changed.max(axis=0) < [box["y"] + box["h"] + margin, box["x"] + box["w"] + margin]).all()


def test_only_sixteen_averages_are_left_of_a_face():
    """Two faces that have the same averages give the same pixels, so nothing else can be read from these."""
    generator = np.random.default_rng(0)
    face = generator.integers(0, 256, (64, 64, 3), np.uint8)
    cells = face.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(4, 4, 256, 3)
    shuffled = generator.permuted(cells, axis=2).reshape(4, 4, 16, 16, 3).swapaxes(1, 2).reshape(64, 64, 3)
    box = {"x": 12, "y": 12, "w": 40, "h": 40}  # with its margin of 12 the whole picture
    one, other = (np.asarray(faces.blur(Image.fromarray(pixels), [box])) for pixels in (face, shuffled))
    assert (face != shuffled).any()
    np.testing.assert_array_equal(one, other)


def test_blur_at_the_edge_and_no_metadata(astronaut):
    image = astronaut.copy()
    image.info["exif"] = b"Exif\x00\x00 a preview of the face"
    boxes = [
        {"x": 480, "y": -10, "w": 100, "h": 60},
        {"x": 900, "y": 900, "w": 9, "h": 9},
        {"x": 0, "y": 0, "w": 1, "h": 1},
    ]
    blurred = faces.blur(image, boxes)
    assert (blurred.size, blurred.mode, blurred.info) == (image.size, "RGB", {})
    assert (np.asarray(blurred) != np.asarray(image)).any()
    assert np.array_equal(np.asarray(image), data.astronaut())  # the image that was given stays as it is


def test_a_detector_by_path(tmp_path):
    constant_detector(
        tmp_path / "f.onnx", [[0, 8, 16, 24, 0.9], [10, 2, 99, 30, 0.5], [1, 1, 2, 2, 0.4], [5, 5, 5, 9, 1]]
    )
    config = FaceOnnxConfig(path="f.onnx", size=64)
    found = faces.load(config, faces.locate(config, tmp_path))
    white = Image.new("RGB", (128, 64), "white")  # fills half of the square: its mean is 0.5, a pixel of 128
    assert found(white) == [{"x": 20, "y": 4, "w": 108, "h": 56}, {"x": 1, "y": 16, "w": 31, "h": 32}]
    assert found(Image.new("RGB", (16, 32)))[1] == {"x": 0, "y": 4, "w": 8, "h": 8}  # enlarged to 32 x 64


def test_files_that_are_no_detector_are_refused(tmp_path, astronaut):
    config = FaceOnnxConfig(path="f.onnx", size=64)
    with pytest.raises(CurationError, match=r"embed\.scores\.faces\.path: .*f\.onnx: no such file"):
        faces.locate(config, tmp_path)
    constant_detector(tmp_path / "f.onnx", [[1, 2, 3, 4]])
    with pytest.raises(CurationError, match=r"gave shape \[1, 4\]; expected \[M, 5\]: x1, y1, x2, y2, score"):
        faces.load(config, tmp_path / "f.onnx")(astronaut)
    with pytest.raises(CurationError, match=r"f\.onnx: cannot take an input of shape \[1, 3, 32, 32\]"):
        faces.load(FaceOnnxConfig(path="f.onnx", size=32), tmp_path / "f.onnx")(astronaut)
