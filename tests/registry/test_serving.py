"""The registered model as others call it: over HTTP by `mlflow models serve`, and loaded, with what it refuses."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import Model
from PIL import Image

from components.model.config import ViTConfig
from components.registry.card import ASK, SERVE
from components.registry.publish import save_model
from tests.registry.conftest import CONFIG, PHOTOGRAPHS, telling_weights
from tests.registry.made_up import candidate

MAX_ROWS = 2**18 // 4**2  # at 28 pixels in patches of 7
TEXTS = [base64.b64encode(data).decode() for data in PHOTOGRAPHS]
FORMS = {
    "instances": TEXTS,
    "inputs": {"image": TEXTS},
    "dataframe_records": [{"image": text} for text in TEXTS],
    "dataframe_split": {"columns": ["image"], "data": [[text] for text in TEXTS]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    shape = ViTConfig(patch_size=7, dim=32, depth=2, num_heads=2, num_registers=1, image_size=28)
    telling_weights(root / "weights", shape)
    save_model(candidate(root / "weights", PHOTOGRAPHS[0], CONFIG.preprocessing), root / "model", Model())
    return root / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    before = sys.path.copy()
    yield mlflow.pyfunc.load_model(str(folder))
    sys.path[:] = before


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a server that README's command has started."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = shlex.split(SERVE.replace("models:/{name}@latest", str(folder)).replace("5050", str(port)))
    command[0] = str(Path(sys.executable).with_name("mlflow"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = folder.with_name("log")
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/ping", process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=60).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def ask(server: str, request: dict[str, Any]) -> tuple[int, Any]:
    body = json.dumps(request).encode()
    asked = urllib.request.Request(f"{server}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_readme_has_the_cards_lines():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert ASK in text
    assert SERVE.replace("{name}@latest", "pedigree@champion") in text


def frame(*rows: Any) -> pd.DataFrame:
    return pd.DataFrame({"image": list(rows)})


def picture(mode: str, color: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (40, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_cards_line_asks_the_server_that_its_command_starts(server, model, tmp_path: Path):
    """With a photograph larger than an argument of a program may be."""
    pixels = np.random.default_rng(0).integers(0, 255, (400, 500, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    assert (tmp_path / "photo.jpg").stat().st_size > 128 * 1024
    line = ASK.replace("http://127.0.0.1:5050", server).replace("curl", "curl --silent --show-error")
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = np.array(json.loads(done.stdout)["predictions"], np.float32)
    expected = model.predict(frame((tmp_path / "photo.jpg").read_bytes()))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_each_json_form_takes_base64_and_params(server, model, form):
    for params in ({}, {"resolution": 49}):
        status, answer = ask(server, {form: FORMS[form], "params": params})
        assert status == 200, answer
        expected = model.predict(frame(*PHOTOGRAPHS), params=params)
        np.testing.assert_allclose(np.array(answer["predictions"], np.float32), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [None, "not base64!", "photos/cat.jpg", "", base64.b64encode(b"text").decode()])
def test_a_bad_row_is_answered_with_400_and_its_number_first(server, form, bad):
    request = json.loads(json.dumps({form: FORMS[form]}).replace(TEXTS[1], "BAD"))
    request = json.loads(json.dumps(request).replace('"BAD"', json.dumps(bad)))
    status, answer = ask(server, request)
    assert status == 400
    assert answer["message"].startswith("row 1: not a usable image: ")
    assert "stack_trace" not in answer
    assert len(json.dumps(answer)) < 600
    assert ".py" not in json.dumps(answer)


def test_what_the_server_refuses_besides(server):
    for params, said in (({"resolution": 0}, "resolution 0: must be"), ({"resolution": 2401}, "and at most 448")):
        status, answer = ask(server, {"instances": TEXTS, "params": params})
        assert (status, said in answer["message"]) == (400, True), answer
        assert answer["message"].startswith("resolution")
    status, answer = ask(server, {"dataframe_records": [{"photo": TEXTS[0]}]})
    assert (status, "missing inputs ['image']" in answer["message"]) == (400, True)


@pytest.mark.parametrize("form", ["instances", "inputs", "dataframe_split"])
def test_an_empty_batch_is_answered_with_an_empty_result(server, form):
    empty = {"columns": ["image"], "data": []} if form == "dataframe_split" else []
    assert ask(server, {form: empty}) == (200, {"predictions": []})


def test_an_empty_frame_gives_an_empty_array(model):
    found = model.predict(frame())
    assert (found.shape, found.dtype) == ((0, 32), np.float32)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (None, "NoneType; give an encoded image as bytes or as base64 text"),
        (Path("cat.jpg"), "PosixPath; give an encoded image"),
        ("/photos/cat.jpg", "no base64"),
        (Image.new("RGB", (9, 9)), "Image; give an encoded image"),
        (float("nan"), "float; give an encoded image"),
    ],
)
def test_a_row_that_is_not_encoded_is_named(model, row, said):
    with pytest.raises(ValueError, match=r"^row 1: not a usable image: not_an_image: ") as error:
        model.predict(frame(PHOTOGRAPHS[0], row))
    assert said in str(error.value)


def test_limits(model):
    for resolution, said in (
        (0, "multiple of the patch size, 7"),
        (-7, "multiple"),
        (30, "multiple"),
        (455, "most 448"),
    ):
        with pytest.raises(ValueError, match=rf"^resolution {resolution}: .*{said}"):
            model.predict(frame(PHOTOGRAPHS[0]), params={"resolution": resolution})
    with pytest.raises(ValueError, match=rf"^{MAX_ROWS + 1} rows: at most {MAX_ROWS} in one call at resolution 28"):
        model.predict(frame(*[b""] * (MAX_ROWS + 1)))
    with pytest.raises(ValueError, match=r"^1025 rows: at most 1024 in one call at resolution 112"):
        model.predict(frame(*[b""] * 1025), params={"resolution": 112})
    big = io.BytesIO()
    Image.new("1", (8000, 8000)).save(big, "PNG")
    with pytest.raises(ValueError, match=r"^row 0: .*64000000.* pixels; at most 50000000"):
        model.predict(frame(big.getvalue()))


def test_transparency_is_laid_over_white(model):
    white, clear, red = model.predict(
        frame(picture("RGB", (255, 255, 255)), picture("RGBA", (255, 0, 0, 0)), picture("RGBA", (255, 0, 0, 255)))
    )
    np.testing.assert_array_equal(clear, white)
    assert np.abs(red - white).max() > 1e-3


def test_rows_beyond_one_batch_keep_their_order(model):
    many = model.predict(frame(*PHOTOGRAPHS), params={"resolution": 448})  # a batch of two, and the third
    few = np.concatenate([model.predict(frame(data), params={"resolution": 448}) for data in PHOTOGRAPHS])
    np.testing.assert_allclose(many, few, rtol=1e-4, atol=1e-4)
    assert np.abs(many[0] - many[2]).max() > 1e-2
