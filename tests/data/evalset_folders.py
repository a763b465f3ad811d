"""Small folders of evaluation sets, right in all but what a test changes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from components.core.errors import DatasetError
from components.data import evalset_check, expectations
from components.data.evalset_add import Added, add_evalset
from components.data.evalset_config import EvalsetRequest
from components.data.expectations import Examination, ValidationReport

SIZE = (12, 8)  # width, height


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mask(values: np.ndarray) -> bytes:
    return png(Image.fromarray(values.astype(np.uint8)))


def npy(values: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def halves(value: int = 0) -> np.ndarray:
    """Class 0 on the left, 1 on the right, and `value` at the top left."""
    values = np.zeros(SIZE[::-1])
    values[:, SIZE[0] // 2 :] = 1
    values[0, 0] = value
    return values


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def config(task: str, **values: object) -> str:
    return yaml.safe_dump({"task": task, "license": "CC0-1.0", **values})


def classification(folder: Path) -> Path:
    names = [f"{split}/{label}/{n}.png" for split in ("train", "test") for label in ("cat", "dog") for n in range(2)]
    rows = "".join(f"{name},{'day' if n % 2 else 'night'},x\n" for n, name in enumerate(names))
    files = {f"images/{name}": photo(n) for n, name in enumerate(names)}
    return write(folder, {**files, "evalset.yaml": config("classification", groups=["light"]),
                          "groups.csv": "image,light,other\n" + rows})  # fmt: skip


def segmentation(folder: Path) -> Path:
    names = [f"{split}/{n}" for split in ("train", "test") for n in range(2)]
    files: dict[str, bytes | str] = {f"images/{name}.png": photo(n) for n, name in enumerate(names)}
    files |= {f"targets/{name}.png": mask(halves(255)) for name in names}
    classes = {0: "grass", 1: "brick"}
    return write(folder, {**files, "evalset.yaml": config("segmentation", classes=classes, ignore=255, resolution=48)})


def depth(folder: Path) -> Path:
    """A PNG of 1,500 mm in train, and an npy of 0 (none), 0.5 and 9 m in test; 9 m lies outside of the range."""
    meters = np.full(SIZE[::-1], 0.5, np.float32)
    meters[0, 0], meters[0, 1] = 0, 9
    millimeters = Image.fromarray(np.full(SIZE[::-1], 1500, np.uint16))
    files = {"images/train/a.png": photo(0), "images/test/b.png": photo(1)}
    files |= {"targets/train/a.png": png(millimeters), "targets/test/b.npy": npy(meters)}
    return write(folder, {**files, "evalset.yaml": config("depth", depth_range=[0.1, 8])})


def retrieval(folder: Path) -> Path:
    names = ["q/one.png", "q/two.png", "a.png", "b.png", "c.png"]
    rows = (
        "query,image,relation\nq/one.png,a.png,easy\nq/one.png,b.png,hard\nq/one.png,c.png,junk\nq/two.png,c.png,hard\n"
    )
    files: dict[str, bytes | str] = {f"images/{name}": photo(n) for n, name in enumerate(names)}
    return write(folder, {**files, "queries.csv": rows, "evalset.yaml": config("retrieval")})


def mapped(folder: Path) -> Path:
    """Test images of two classes of the set `classification`, one of them under another name."""
    files: dict[str, bytes | str] = {f"images/{name}/{n}.png": photo(50 + n + len(name))
                                     for name in ("kitty", "dog") for n in range(2)}  # fmt: skip
    options = {"train_set": "classification", "mapping": {"kitty": "cat"}}
    return write(folder, {**files, "evalset.yaml": config("classification", **options)})


def video(folder: Path) -> Path:
    """Clips of 10, 3, 2 and 1 frames; those of ten are named so that only their numbers have the right order."""
    clips = {"train/jump/a": 10, "train/walk/b": 3, "test/jump/c": 1, "test/walk/d": 2}
    names = [f"{clip}/{number + 1}.png" for clip, count in clips.items() for number in range(count)]
    files = {f"images/{name}": photo(100 + n) for n, name in enumerate(names)}
    return write(folder, {**files, "evalset.yaml": config("video")})


def request(folder: Path, name: str = "set", **values: object) -> EvalsetRequest:
    root = folder.parent
    places = {"evaluation": root / "evaluation", "docs_folder": root / "docs"}
    return EvalsetRequest.parse(source=folder, name=name, **places, **values)


def add(folder: Path, name: str = "set", **values: object) -> Added:
    return add_evalset(request(folder, name, **values))


class FactsOnly:
    """Stands in for `DataDocs`: refuses an examination with a failed check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> FactsOnly:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def judge(self, examination: Examination, what: str, schema: Any = None) -> ValidationReport:
        if failed := [check.name for check in examination.checks if not check.passed]:
            raise DatasetError(f"{what}: {failed}")
        return ValidationReport(examination.table.num_rows, examination.checks, self.folder)


def judge_by_facts_only(patch: pytest.MonkeyPatch) -> None:
    """Judge sets without Great Expectations."""
    for module in (expectations, evalset_check):
        patch.setattr(module, "DataDocs", FactsOnly)
