"""Reports: complete in themselves, escaped, and found by an installed package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from components.core.metrics import Interval
from components.core.page import Cell, render
from components.core.pictures import jpeg
from components.evaluation.report import write_report

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


def test_the_evaluation_marks_the_best_and_what_is_surely_better(tmp_path):
    for name in ("pca", "neighbors"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(Image.new("RGB", (8, 8))))
    scores = {"small": {"knn_top1": 0.75, "linear_c": 1.0}, "champion": {"knn_top1": 0.5, "linear_c": 10.0}}
    differences = {"champion": {"knn_top1": Interval(0.25, 0.1, 0.4), "linear_top1": Interval(-0.2, -0.3, -0.1)}}
    intervals = {"small": {"knn_top1": Interval(0.75, 0.7, 0.8)}, "champion": {}}
    write_report(tmp_path / "report.html", "Evaluation", ["a fact"], scores, differences, intervals)
    page = (tmp_path / "report.html").read_text()
    assert "<dt>knn_top1</dt><dd>0.75<small>champion 0.5</small></dd>" in page
    assert '<td class="n best">0.75<small>(0.700 to 0.800)</small></td><td class="n">0.5</td>' in page
    assert '<td class="n">1</td><td class="n">10</td>' in page  # no C is the best
    assert '<td class="n good">+0.250</td><td class="n">+0.100 to +0.400</td>' in page
    assert '<td class="n bad">-0.200</td>' in page


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
