"""One home of resize, crop, mean and standard deviation: every network sees what the evaluation has measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.model.config import Preprocessing
from components.model.preprocessing import center_crop, center_crops, normalize, to_input

COMPONENTS = Path(__file__).parents[2] / "components"


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def test_no_other_file_spells_mean_and_deviation():
    values = re.compile(r"\.485|\.456|\.406|\.229|\.224\b|\.225")
    found = [
        path.relative_to(COMPONENTS).as_posix() for path in COMPONENTS.rglob("*.py") if values.search(path.read_text())
    ]
    assert found == ["model/preprocessing.py"]


def test_torch_and_numpy_give_the_same_bits(image):
    pixels = np.asarray(image)
    tensor = to_input(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_array_equal(normalize(pixels.astype(np.float32)), tensor.numpy())
    red = (pixels[5, 7, 0] / 255 - 0.485) / 0.229
    assert tensor[5, 7, 0].item() == pytest.approx(red, abs=1e-6)
    assert normalize(pixels.astype(np.float64)).dtype == np.float64


def test_crops_of_a_batch_are_those_of_each(image):
    size = Preprocessing(resize_size=32, crop_size=28)
    batch = center_crops(iter([image, image.rotate(90, expand=True)]), size)
    assert batch.shape == (2, 28, 28, 3)
    np.testing.assert_array_equal(batch[0], np.asarray(center_crop(image, size)))


def test_embedders_of_other_frameworks_load_no_torch():
    code = "import sys, components.curation.embedders, components.curation.nsfw; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=COMPONENTS.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
