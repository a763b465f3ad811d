"""Reports: complete in themselves, escaped, and found by an installed package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from components.core.metrics import Interval
from components.core.page import Cell, render
from components.evaluation.report import difference_rows, key_figures, score_rows

PROJECT = Path(__file__).parents[2]
TEMPLATES = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "components").rglob("*.html"))
FACTS = {
    "key": [("images here", 1234567, "of <them> all")],
    "about": [("source", "<script>alert(1)</script>"), ("license", "A & B")],
    "counts": [("files seen", 1200)],
    "reasons": [],
    "checks": [
        ("ids_unique", "each id once", 12, Cell("passed", mark="good")),
        ("b", "c", 1, Cell("failed", "why", "bad")),
    ],
    "sides": [("1 to 15", 0, ""), ("16 to 31", 20, ""), ("32 to 63", 5, "")],
    "labels": [],
}


@pytest.fixture(scope="module")
def page() -> str:
    return render("components/data/summary.html", title="a <b>", **FACTS).decode()


def test_every_fact_is_escaped(page):
    assert "<script" not in page
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in page
    assert "<title>a &lt;b&gt;</title>" in page
    assert "<td>A &amp; B</td>" in page
    assert "<small>of &lt;them&gt; all</small>" in page


def test_what_a_table_shows(page):
    assert "<dd>1,234,567<small>" in page
    assert '<tr><td>files seen</td><td class="n">1,200</td></tr>' in page
    assert '<td class="n">12</td><td class="n good">passed</td>' in page
    assert '<td class="n bad">failed<small>why</small></td>' in page
    assert "<p>Nothing was rejected.</p>" in page
    assert page.count("<p>None.</p>") == 1  # labels
    assert [float(width) for width in re.findall(r"width:([\d.]+)%\"", page)] == [100, 25]


def test_a_page_needs_no_network_and_is_the_same_again(page):
    assert not re.search(r"https?:|@import|<link|<script|url\(", page)
    assert render("components/data/summary.html", title="a <b>", **FACTS).decode() == page


def test_a_fact_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'labels' is undefined"):
        render("components/data/summary.html", title="a", **{k: v for k, v in FACTS.items() if k != "labels"})


def test_the_evaluation_marks_the_best_and_what_is_surely_better():
    scores = {"small": {"knn_top1": 0.75, "linear_c": 1.0}, "champion": {"knn_top1": 0.5, "linear_c": 10.0}}
    differences = {"knn_top1": Interval(0.25, 0.1, 0.4), "linear_top1": Interval(-0.2, -0.3, -0.1)}
    intervals = {"small": {"knn_top1": Interval(0.75, 0.7, 0.8)}, "champion": {}}
    assert key_figures(scores, ["knn_top1"]) == [("knn_top1", "0.75", "champion 0.5")]
    (_, *accuracies), (_, *chosen) = score_rows(scores, intervals)
    assert accuracies == [Cell("0.75", "(0.700 to 0.800)", "best"), Cell("0.5")]
    assert chosen == [Cell("1"), Cell("10")]  # no C is the best
    (_, better, bounds), (_, worse, _) = difference_rows(differences)
    assert (better, bounds) == (Cell("+0.250", mark="good"), "+0.100 to +0.400")
    assert worse == Cell("-0.200", mark="bad")


def test_an_installed_package_finds_its_templates(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(PROJECT / "components", source / "components", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py", "--build-lib"]
    subprocess.run([*build, str(installed)], cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    assert len(TEMPLATES) >= 5
    assert [name for name in TEMPLATES if not (installed / name).is_file()] == []
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', str(f))]\n"
        "from components.core.page import ROOT, _environment\n"
        "assert str(ROOT) == sys.argv[1], ROOT\n"
        "for name in sys.argv[2:]: _environment().get_template(name)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(installed), *TEMPLATES], cwd=tmp_path, check=True)
