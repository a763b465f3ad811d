from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from components.curation.descriptor import describe


def cosine(left: Image.Image, right: Image.Image) -> float:
    a, b = describe([left, right])
    return float(a @ b)


def test_unit_norm_and_independent_of_the_batch(photos):
    together = describe(photos)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(together[3], describe([photos[3]])[0])


@pytest.mark.parametrize("kind", ["jpeg", "half", "double", "gray"])
def test_copies_are_near_one(photos, kind):
    def copy(photo: Image.Image) -> Image.Image:
        if kind == "jpeg":
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=50)
            return Image.open(buffer).convert("RGB")
        if kind == "gray":
            return photo.convert("L").convert("RGB")
        side = {"half": 80, "double": 320}[kind]
        return photo.resize((side, side), Image.Resampling.BICUBIC)

    assert min(cosine(photo, copy(photo)) for photo in photos) > 0.8


def test_other_pictures_are_near_zero(photos):
    vectors = describe(photos)
    between = (vectors @ vectors.T)[np.triu_indices(len(photos), 1)]
    assert abs(between.mean()) < 0.05
    assert between.max() < 0.3


def test_neighboring_and_overlapping_views_of_one_photograph_are_not_copies(photos):
    for photo in photos:
        left, right = photo.crop((0, 0, 80, 160)), photo.crop((80, 0, 160, 160))
        shifted, whole = photo.crop((0, 0, 112, 112)), photo.crop((48, 48, 160, 160))
        assert cosine(left, right) < 0.45
        assert cosine(shifted, whole) < 0.45


def test_plain_pictures_are_told_apart_by_color():
    def plain(*color: int) -> Image.Image:
        return Image.new("RGB", (50, 40), color)

    assert cosine(plain(120, 130, 200), plain(120, 131, 200)) > 0.9
    assert cosine(plain(120, 130, 200), plain(140, 130, 200)) < 0.3
    assert cosine(plain(0, 0, 0), plain(255, 255, 255)) < 0.3


def test_a_plain_picture_is_no_copy_of_a_structured_one_of_its_color(photos):
    color = tuple(int(x) for x in np.asarray(photos[0]).mean(axis=(0, 1)))
    assert cosine(photos[0], Image.new("RGB", (160, 160), color)) < 0.1
