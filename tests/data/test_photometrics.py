import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from skimage import data

from components.data.photometrics import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Jitter,
    Photometrics,
    blur,
    change_colors,
    shift_hue,
)

PHOTO = Image.fromarray(data.coffee()).resize((64, 64))


def planar(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def changed(image: Image.Image, draw: Photometrics) -> np.ndarray:
    return change_colors(planar(image)[None], [draw])[0].transpose(1, 2, 0).astype(int)


def jitter(order: tuple[int, ...], factors: tuple[float, ...], turns: float = 0.0) -> Photometrics:
    brightness, contrast, saturation = factors
    return Photometrics(Jitter(order, (brightness, contrast, saturation), turns))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("kind", [BRIGHTNESS, CONTRAST, SATURATION])
def test_each_change_is_pils(kind, factor):
    """torchvision's ColorJitter calls these enhancements on PIL images."""
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
    factors = tuple(factor if k == kind else 1.0 for k in range(3))
    found = changed(PHOTO, jitter((0, 1, 2, 3), factors))
    assert np.abs(found - np.asarray(enhance(PHOTO).enhance(factor)).astype(int)).max() <= 1


def test_changes_come_in_the_drawn_order():
    """All 24 orders in one stack, against the plain formulas in double precision, one crop and change at a time."""
    factors, weights = (1.4, 0.6, 0.7), np.array([0.299, 0.587, 0.114])
    orders = list(itertools.permutations(range(4)))
    stack = np.stack([planar(PHOTO)] * len(orders))
    found = change_colors(stack, [jitter(order, factors) for order in orders]).transpose(0, 2, 3, 1).astype(int)
    for order, made in zip(orders, found, strict=True):
        expected = np.asarray(PHOTO).astype(float)
        for kind in order:
            if kind != HUE:
                gray = (expected @ weights)[..., None]
                other = {BRIGHTNESS: 0, CONTRAST: gray.mean(), SATURATION: gray}[kind]
                expected = np.clip(factors[kind] * expected + (1 - factors[kind]) * other, 0, 255)
        assert np.abs(made - expected).max() <= 0.51, order
    assert len({made.tobytes() for made in found}) == 4  # without clipping, brightness and saturation commute


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_turns_as_colorsys_does(turns):
    colors = np.random.default_rng(0).integers(0, 256, (500, 3))
    colors[:8] = list(itertools.product((0, 255), repeat=3))
    colors[8:20] = [[a, b, c] for a, b, c in itertools.product((10, 200), repeat=3) if a + b + c][:8] + [[9, 9, 9]] * 4
    planes = colors.T.reshape(3, 1, -1).astype(np.float32)
    shift_hue(planes, np.array([turns], np.float32), np.empty((6, 1, planes.shape[2]), np.float32))
    for rgb, found in zip(colors / 255, planes[:, 0].T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        np.testing.assert_allclose(found, 255 * np.array(colorsys.hsv_to_rgb((h + turns) % 1, s, v)), atol=0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.0])
def test_blur_is_torchvisions_kernel_of_nine(sigma):
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    noise = np.random.default_rng(0).integers(0, 2, (3, 40, 64), dtype=np.uint8) * 255  # as hard as can be
    for image in (planar(PHOTO)[:, :40], noise):  # not square
        expected = image.astype(float)
        for axis in (1, 2):
            expected = ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
        found = image.copy()
        blur(found, sigma)
        assert np.abs(found - expected).max() <= 2
        assert np.abs((found - expected).mean()) < 0.05
    for size in ((1, 1), (3, 2), (1, 9)):
        flat = np.full((3, *size), 255, np.uint8)
        blur(flat, sigma)
        assert (flat == 255).all()


def test_gray_and_solarize_are_pils():
    gray = changed(PHOTO, Photometrics(gray=True))
    assert np.abs(gray - np.asarray(PHOTO.convert("L").convert("RGB")).astype(int)).max() <= 1
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    expected = np.asarray(ImageOps.solarize(every, 128))
    np.testing.assert_array_equal(changed(every, Photometrics(solarize=True)), expected)


def test_a_crop_does_not_depend_on_its_stack():
    generator = np.random.default_rng(0)
    stack = generator.integers(0, 256, (9, 3, 21, 21), dtype=np.uint8)
    draws = [Photometrics(gray=n % 3 == 0, blur_sigma=1.3 if n % 2 else None, solarize=n > 6) for n in range(3)]
    for _ in range(6):
        factors = tuple(generator.uniform(0.5, 1.5, 3).tolist())
        draws.append(jitter(tuple(generator.permutation(4).tolist()), factors, generator.uniform(-0.1, 0.1)))
    together = change_colors(stack, draws)
    for number in range(9):
        np.testing.assert_array_equal(together[number], change_colors(stack[number][None], [draws[number]])[0])
    np.testing.assert_array_equal(change_colors(stack, [jitter((3, 2, 1, 0), (1, 1, 1))] * 9), stack)
