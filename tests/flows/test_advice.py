"""Which recipe is proposed for which images and hardware, and that the sample's own is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from components.data.manifest import POOL_SCHEMA, write_manifest
from components.recipe import Recipe, load_recipe
from flows import advice
from flows.advice import Facts, advise, misfits
from flows.sources import choose
from tests.flows.repository import PROJECT

COMMAND = ["pedigree", "run", "--images", "/my photos"]


def recipe(name: str, *settings: str) -> Recipe:
    return load_recipe(PROJECT, name, settings)


def missed(name: str, num_images: int, median_side: int, *settings: str, gpu: bool = False) -> list[str]:
    fitting = recipe(advice.ON_GPU if gpu else advice.ON_CPU)
    return list(misfits(recipe(name, *settings), fitting, Facts(num_images, median_side, gpu)))


def test_what_the_default_recipe_would_miss_of_a_hundred_thousand_photographs():
    assert missed("tiny-cpu", 100_000, 1_080) == [
        "it trains on crops of 24 pixels, not 96",
        "it keeps at most 2,000 images (curate.target_images)",
        "its pretraining draws 11,200 images, not 640,000",
    ]
    assert missed("tiny-cpu", 100_000, 1_080, gpu=True)[0] == "it trains on crops of 24 pixels, not 224"


def test_what_fits_is_not_spoken_of():
    assert missed("tiny-cpu", 1_500, 64) == []  # no larger crop fits these, and each is drawn
    assert missed("tiny-cpu", 1_500, 95) == []
    assert len(missed("tiny-cpu", 1_500, 96)) == 1
    for name, gpu in ((advice.ON_CPU, False), (advice.ON_GPU, True)):
        assert missed(name, 10_000_000, 4_000, gpu=gpu) == []


def test_a_recipe_for_gpus_is_heavy_without_one():
    (told,) = missed("own-images-gpu", 50_000, 500)
    assert told == "its pretraining takes about 791 times the operations, without a GPU"
    assert missed("own-images-gpu", 50_000, 500, gpu=True) == []


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Sources `cats` of 30 images 200 x 300, and `dogs` of 70, 900 x 640."""
    for name, count, width, height in (("cats/ab", 30, 200, 300), ("dogs/cd", 70, 900, 640)):
        row = dict.fromkeys(POOL_SCHEMA.names, "x") | {"offset": 1, "length": 1, "width": width, "height": height}
        rows = [row | {"image_id": str(k)} for k in range(count)]
        folder = tmp_path / "data/pool" / name
        write_manifest(pa.Table.from_pylist(rows, POOL_SCHEMA), folder / "manifest.parquet")
        folder.with_suffix(".dvc").write_text("outs: []\n")
    return tmp_path


@pytest.mark.parametrize(
    ("gpu", "hardware", "name"), [(True, "a GPU", "own-images-gpu"), (False, "no GPU", "own-images-cpu")]
)
def test_the_proposal_and_its_command(checkout, monkeypatch, caplog, gpu, hardware, name):
    monkeypatch.setattr(advice, "has_gpu", lambda: gpu)
    advise(checkout, recipe("tiny-cpu"), choose(checkout, ["cats", "dogs"]), COMMAND)
    told = caplog.messages
    facts = f"100 images, shorter side 640 pixels in the median, {hardware}"
    assert told[0].startswith(f"this recipe does not fit the run ({facts}): it trains on crops of 24 pixels")
    assert told[1].endswith(f"fits better: pedigree run --images '/my photos' --recipe {name}")
    assert ["continue-dinov2" in line for line in told] == [False, False, *([True] if gpu else [])]


def test_no_proposal_where_there_is_nothing_to_say(checkout, monkeypatch, caplog):
    monkeypatch.setattr(advice, "has_gpu", lambda: False)
    advise(checkout, recipe("own-images-cpu"), choose(checkout, ["cats", "dogs"]), COMMAND)
    advise(
        checkout,
        recipe("own-images-cpu", "curate.target_images=9"),
        choose(checkout, ["cats"]),
        COMMAND,
        "own-images-cpu",
    )
    (checkout / "data/pool/dogs").rename(checkout / "data/pool/sample")
    advise(checkout, recipe("tiny-cpu"), choose(checkout, ["sample"]), COMMAND)  # it is made for the sample
    shutil.rmtree(checkout / "data/pool/cats/ab")
    advise(checkout, recipe("tiny-cpu"), choose(checkout, ["cats"]), COMMAND)  # not in this checkout: nothing is known
    assert caplog.messages == []
