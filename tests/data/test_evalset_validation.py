"""Great Expectations judges an evaluation set: the facts of all rows, with Data Docs of what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.data import expectations
from components.data.evalset_config import EvalsetError
from tests.data import evalset_folders as folders
from tests.data.evalset_folders import FactsOnly, add, halves, mask, write


def test_great_expectations_judges_the_facts_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectations, "DataDocs", FactsOnly)  # of the ingest of its images, which has its own tests
    folder = write(folders.segmentation(tmp_path / "in"), {"targets/test/1.png": mask(halves(7))})
    with pytest.raises(EvalsetError, match="mask_values") as caught:
        add(folder)
    docs = tmp_path / "docs" / "evalset-set"
    assert str(caught.value).splitlines()[-1] == f"all checks: {docs / 'index.html'}"
    pages = [page for page in docs.rglob("*.html") if "mask_values" in page.read_text()]
    assert any("Failed" in page.read_text() for page in pages)
    write(folder, {"targets/test/1.png": mask(halves())})
    checks = json.loads((add(folder).snapshot / "validation.json").read_text())
    assert {"mask_values", "ids_unique"} <= {check["name"] for check in checks}
    assert not any(check["failing"] for check in checks)
