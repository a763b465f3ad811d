"""Features of a folder: those of the evaluation, every image once, and what a killed call leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image
from typer.testing import CliRunner

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.core.locks import try_lock
from components.core.storage import sha256_file
from components.data import sources
from components.data.shards import decode_image
from components.evaluation.encoders import BackboneEncoder
from components.evaluation.folder_features import FeatureRequest, embed_folder
from components.model.config import Preprocessing, ViTConfig
from components.model.export import load_backbone, save_weights
from components.model.pooling import features
from components.model.preprocessing import center_crops, to_input
from components.model.vit import VisionTransformer
from flows.cli import app
from tests.evaluation.class_tokens import class_tokens

SIZES = Preprocessing(resize_size=32, crop_size=28)
NUM_FILES = 20
KILLED = """
import os, signal, sys
from pathlib import Path
from components.data import sources
from components.evaluation import folder_features
from tests.evaluation.test_folder_features import request

sources.BATCH_ENTRIES = 4
embed, calls = folder_features._embed_batch, []

def dying(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(*arguments)

folder_features._embed_batch = dying
folder_features.embed_folder(sys.argv[1], Path(sys.argv[2]), request(sys.argv[3]))
"""


def request(weights: Path | str, patch_tokens: bool = False) -> FeatureRequest:
    return FeatureRequest(Path(weights), lambda _: SIZES, patch_tokens, {"pedigree.passport": "models:/m/1"})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = ViTConfig(patch_size=7, dim=16, depth=2, num_heads=2, num_registers=2, image_size=28)
    save_weights(tmp_path / "weights", VisionTransformer(shape), None, {})
    return tmp_path / "weights"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Parts of a photograph, some of them with transparency or samples of 16 bits."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    whole = Image.fromarray(skimage.data.astronaut())
    for number in range(NUM_FILES):
        part = whole.crop((number * 20, 50, number * 20 + 90, 120))
        if number % 5 == 0:
            part.putalpha(part.convert("L"))
        part.save(folder / ("more" if number % 2 else "") / f"{number:02d}.png")
    return folder


def expected(weights: Path, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """As the evaluation extracts them."""
    crops = torch.from_numpy(center_crops((decode_image(file.read_bytes()) for file in files), SIZES))
    backbone = load_backbone(weights)
    return class_tokens(backbone, crops), BackboneEncoder(backbone).last_patches(crops)


def test_features_are_those_of_the_evaluation(weights, photos, tmp_path):
    done = embed_folder(str(photos), tmp_path / "out/features.parquet", request(weights, patch_tokens=True))
    table = pq.read_table(done.out)
    assert (done.images, done.left_out, done.resumed) == (NUM_FILES, {}, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["features.parquet"]
    files = [photos / uri for uri in table["uri"].to_pylist()]
    assert len(set(files)) == NUM_FILES
    assert table["image_id"].to_pylist() == [sha256_file(file) for file in files]
    assert set(table["width"].to_pylist()) == {90}
    assert set(table["height"].to_pylist()) == {70}
    cls_tokens, patches = expected(weights, files)
    np.testing.assert_allclose(np.stack(table["cls_token"].to_numpy()), cls_tokens, rtol=1e-5, atol=1e-6)
    found = np.stack(table["patch_tokens"].to_numpy()).reshape(NUM_FILES, 16, 16)
    np.testing.assert_allclose(found, patches, rtol=1e-5, atol=1e-6)
    stated = table.schema.metadata
    assert (stated[b"pedigree.passport"], stated[b"pedigree.grid"]) == (b"models:/m/1", b"4")
    assert Preprocessing.model_validate_json(stated[b"pedigree.preprocessing"]) == SIZES


def test_a_model_that_was_evaluated_by_texture_too_gives_that_feature_beside_the_class_token(weights, photos, tmp_path):
    textured = SIZES.model_copy(update={"pooling": "cls_texture"})
    asked = dataclasses.replace(request(weights, patch_tokens=True), preprocessing=lambda _: textured)
    table = pq.read_table(embed_folder(str(photos), tmp_path / "features.parquet", asked).out)
    assert table.column_names[4:] == ["cls_token", "feature", "patch_tokens"]
    files = [photos / uri for uri in table["uri"].to_pylist()]
    crops = torch.from_numpy(center_crops((decode_image(file.read_bytes()) for file in files), SIZES))
    with torch.inference_mode():
        expected = features(load_backbone(weights), to_input(crops.permute(0, 3, 1, 2)), textured)
    np.testing.assert_allclose(np.stack(table["feature"].to_numpy()), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(table.schema.metadata[b"pedigree.preprocessing"])["pooling"] == "cls_texture"


def test_what_is_no_image_is_left_out_and_told(weights, photos, tmp_path):
    (photos / "notes.txt").write_text("not an image")
    (photos / "cut.png").write_bytes((photos / "00.png").read_bytes()[:300])
    Image.new("1", (8000, 8000)).save(photos / "large.png")
    (photos / ".hidden.png").write_bytes(b"x")
    Image.fromarray(np.full((70, 90), 4000, np.uint16)).save(photos / "wide.png")
    done = embed_folder(str(photos), tmp_path / "features.parquet", request(weights))
    assert (done.images, done.ignored) == (NUM_FILES + 1, 1)
    assert done.left_out == {"not_an_image": 1, "too_many_pixels": 1, "truncated": 1}
    notes = "\n".join(done.notes)
    assert "rejected, truncated 1, such as cut.png: " in notes
    assert "rejected, too_many_pixels 1, such as large.png: " in notes
    assert "samples of 16 bits of which 12 are used: scaled from these to 8 bits: 1, such as wide.png" in notes


def test_a_tar_gives_the_same_features(weights, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, ".")
    tables = []
    for source in (photos, tmp_path / "photos.tar"):
        embed_folder(str(source), tmp_path / "features.parquet", request(weights))
        tables.append(pq.read_table(tmp_path / "features.parquet").sort_by("image_id"))
        (tmp_path / "features.parquet").unlink()
    assert tables[0]["image_id"].equals(tables[1]["image_id"])
    first, second = (np.stack(table["cls_token"].to_numpy()) for table in tables)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    assert tables[1]["uri"].to_pylist()[0].startswith("photos.tar#")


def test_a_killed_call_is_taken_up(weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_ENTRIES", 4)
    out, whole = tmp_path / "features.parquet", tmp_path / "whole.parquet"
    command = [sys.executable, "-c", KILLED, str(photos), str(out), str(weights)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".features.parquet.parts").glob("*.parquet")}
    assert len(kept) == 2
    changed = photos / "00.png"  # of the first part: it is computed again, the second is not
    Image.new("RGB", (90, 70)).save(changed)
    assert embed_folder(str(photos), out, request(weights)).resumed == 4
    embed_folder(str(photos), whole, request(weights))
    assert pq.read_table(out).equals(pq.read_table(whole), check_metadata=True)
    assert not (tmp_path / ".features.parquet.parts").exists()


def test_parts_of_other_weights_are_not_taken(weights, photos, tmp_path, monkeypatch):
    (photos / "late.png").symlink_to("nowhere")  # so that nothing but the weights differs below
    parts = tmp_path / ".features.parquet.parts"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("components.evaluation.folder_features._join", stop)
        with pytest.raises(KeyboardInterrupt):
            embed_folder(str(photos), tmp_path / "features.parquet", request(weights))
    assert len(list(parts.glob("*.parquet"))) == 1
    save_weights(weights, VisionTransformer(load_backbone(weights).config), None, {})
    done = embed_folder(str(photos), tmp_path / "features.parquet", request(weights))
    assert (done.resumed, done.left_out) == (0, {"dangling_link": 1})


def test_one_call_at_a_time_and_no_file_is_overwritten(weights, photos, tmp_path):
    out, parts = tmp_path / "features.parquet", tmp_path / ".features.parquet.parts"
    parts.mkdir()
    handle = os.open(parts, os.O_RDONLY)
    assert try_lock(handle)
    with pytest.raises(DatasetError, match="another `pedigree embed` is writing it"):
        embed_folder(str(photos), out, request(weights))
    os.close(handle)
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is there already; remove it"):
        embed_folder(str(photos), out, request(weights))
    assert out.read_bytes() == b"mine"


def test_command(weights, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["embed", "weights", "photos", "--out", "features.parquet"]
    done = CliRunner().invoke(app, [*arguments, "--resolution", "49", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["images"], told["out"], told["weights"]) == (NUM_FILES, "features.parquet", "weights")
    assert "nothing states how its images were scaled" in told["notes"][0]
    stated = json.loads(pq.read_schema("features.parquet").metadata[b"pedigree.preprocessing"])
    assert stated == {"resize_size": 56, "crop_size": 49, "pooling": "cls"}
    Path("features.parquet").unlink()
    for more, said in (
        (["--resolution", "30"], "--resolution 30: must be a multiple of the patch size, 7"),
        (["--resolution", "0"], "--resolution 0: must be"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *more])
        assert refused.exit_code == 2
        assert said in refused.stderr
    Path("empty").mkdir()
    refused = CliRunner().invoke(app, ["embed", "weights", "empty", "--out", "features.parquet"])
    assert (refused.exit_code, "empty: holds no files" in refused.stderr) == (1, True)
    Path("empty/notes.txt").write_text("text")
    refused = CliRunner().invoke(app, ["embed", "weights", "empty", "--out", "features.parquet"])
    assert (refused.exit_code, "holds no image that can be decoded" in refused.stderr) == (1, True)
    assert not Path("features.parquet").exists()
