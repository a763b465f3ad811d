from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from components.curation.config import CascadeConfig, FilterConfig, OpenNsfwConfig, ScoresConfig
from components.curation.filters import filter_images
from components.curation.scores import SCORES_SCHEMA, entropy, gray_share, load_scorer, sample_pixels


def reference_scores(image: Image.Image) -> tuple[float, float]:
    """Gray share and entropy by whole arrays, with luma as ITU-R 601 rounds it in Pillow."""
    pixels = np.asarray(image).astype(int)
    gray = (pixels.max(axis=2) - pixels.min(axis=2) <= 8).mean()
    luma = (pixels @ [19595, 38470, 7471] + 0x8000) >> 16
    shares = np.bincount(luma.ravel()) / luma.size
    return gray, -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()


def test_gray_share_and_entropy_of_photographs_are_those_of_whole_arrays(photos):
    for photo in photos:
        gray, bits = reference_scores(photo)
        assert gray_share(photo) == pytest.approx(gray, abs=1e-9)
        assert entropy(photo) == pytest.approx(bits, abs=1e-9)


def test_values_known_by_hand():
    half = Image.new("RGB", (20, 10), (100, 108, 104))  # 8 apart: gray
    half.paste((100, 109, 104), (0, 0, 10, 10))  # 9 apart: not
    assert gray_share(half) == 0.5
    flat = Image.new("RGB", (7, 7), (255, 0, 0))
    assert (gray_share(flat), entropy(flat)) == (0, 0)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert (gray_share(ramp), entropy(ramp)) == (1, pytest.approx(8))


def test_a_large_photograph_is_sampled_and_scores_nearly_the_same():
    from skimage import data

    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        photo = Image.fromarray(getattr(data, name)())
        sample = sample_pixels(photo)
        assert max(sample.size) == 256
        assert set(map(tuple, np.asarray(sample).reshape(-1, 3))) <= set(map(tuple, np.asarray(photo).reshape(-1, 3)))
        gray, bits = reference_scores(photo)
        assert gray_share(sample) == pytest.approx(gray, abs=0.01)
        assert entropy(sample) == pytest.approx(bits, abs=0.03)
    assert sample_pixels(Image.new("RGB", (5000, 1))).size == (256, 1)


def test_scores_do_not_depend_on_the_images_beside_and_survive_the_way_to_a_worker(tmp_path, photos):
    scorer = load_scorer(ScoresConfig(nsfw=OpenNsfwConfig(), faces=CascadeConfig(working_side=96)), tmp_path)
    together = scorer.score(photos[:4])
    again = pickle.loads(pickle.dumps(scorer))
    for number, photo in enumerate(photos[:4]):
        alone = again.score([photo])
        assert all(alone[name][0] == together[name][number] for name in together)
    table = pa.table({"image_id": list("abcd"), **together}, schema=SCORES_SCHEMA)
    assert table.select(["gray_share", "entropy", "nsfw", "faces"]).column("faces").null_count == 0
    assert 0 <= min(table["nsfw"].to_pylist()) <= max(table["nsfw"].to_pylist()) < 0.5


def test_what_is_not_configured_is_null(tmp_path, photos):
    scores = load_scorer(ScoresConfig(), tmp_path).score(photos[:2])
    assert scores["nsfw"].null_count == scores["faces"].null_count == 2
    assert scores["faces"].type == SCORES_SCHEMA.field("faces").type


def test_the_digest_names_parameters_and_bytes_and_not_places(tmp_path):
    for name, data in (("a.onnx", b"one"), ("b.onnx", b"one"), ("c.onnx", b"two")):
        (tmp_path / name).write_bytes(data)

    def digest(**values) -> str:
        return load_scorer(ScoresConfig.model_validate(values), tmp_path).digest

    def nsfw(path: str, **values) -> dict:
        return {"kind": "onnx", "path": path} | values

    assert digest(nsfw=nsfw("a.onnx")) == digest(nsfw=nsfw("b.onnx"))
    others = [{}, {"nsfw": nsfw("a.onnx")}, {"nsfw": nsfw("c.onnx")}, {"nsfw": nsfw("a.onnx", logits=True)}]
    others += [{"faces": {"kind": "cascade"}}, {"faces": {"kind": "cascade", "min_neighbors": 9}}]
    others += [{"faces": {"kind": "onnx", "path": "a.onnx"}}]
    assert len({digest(**values) for values in others}) == len(others)


def test_thresholds_change_without_new_scores(images):
    table = images([(50, 50)] * 3)
    columns = {"gray_share": [1.0, 0.2, 0.5], "entropy": [7.0, 0.3, 6.0], "nsfw": [0.1, 0.2, 0.9], "faces": [None] * 3}
    scores = pa.table({"image_id": table["image_id"], **columns}, schema=SCORES_SCHEMA)

    def reasons(**values) -> dict[int, str]:
        rejected = filter_images(table, FilterConfig.model_validate(values), scores).to_pylist()
        return {row["row"]: f"{row['reason']}: {row['detail']}" for row in rejected}

    assert reasons() == {}
    assert reasons(max_gray_share=0.99) == {0: "grayscale: gray share 1.000 > 0.99"}
    assert reasons(max_gray_share=0.4, min_entropy=6.5, max_nsfw=0.5) == {
        0: "grayscale: gray share 1.000 > 0.4",
        1: "blank: entropy 0.30 bits < 6.5",
        2: "grayscale: gray share 0.500 > 0.4",
    }
    assert reasons(max_nsfw=0.15) == {1: "nsfw: score 0.200 > 0.15", 2: "nsfw: score 0.900 > 0.15"}


@pytest.mark.parametrize(
    "values",
    [
        {"nsfw": {"kind": "other"}},
        {"nsfw": {"kind": "onnx"}},
        {"nsfw": {"kind": "onnx", "path": "x", "std": [1, 1]}},
        {"faces": {"kind": "onnx", "path": "x", "min_score": 2}},
    ],
)
def test_parameters_out_of_range(values):
    with pytest.raises(ValidationError):
        ScoresConfig.model_validate(values)
