"""Great Expectations takes a second for each validation: tests of many sets judge by the same facts without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.data.evalset_folders import judge_by_facts_only


@pytest.fixture(scope="module")
def quick_judge() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        judge_by_facts_only(patch)
        yield
