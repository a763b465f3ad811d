"""Tests of one group go to one process; a pytest that xdist does not know splits the groups without a word."""

from __future__ import annotations

import os

import pytest


def test_tests_are_kept_together(request: pytest.FixtureRequest):
    if "PYTEST_XDIST_WORKER" in os.environ and request.config.getoption("loadgroup"):
        assert request.node.nodeid.endswith("@test_groups.py")
