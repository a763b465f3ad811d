"""Great Expectations takes a second for each validation: tests of many sets judge by the same facts without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.core.errors import DatasetError
from components.data import evalset_check, expectations
from components.data.expectations import Examination, ValidationReport


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


@pytest.fixture(scope="module")
def quick_judge() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expectations, "DataDocs", FactsOnly)
        patch.setattr(evalset_check, "DataDocs", FactsOnly)
        yield
