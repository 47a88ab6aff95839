"""The documentation as `make docs` builds it: what its pages lead to, and what they show in the dark."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"


@pytest.fixture(scope="module", autouse=True)
def site():
    subprocess.run([sys.executable, "docs/site.py"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(params=["light", "dark"])
def page(request, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=request.param)
    yield context.new_page()
    context.close()


def test_the_explorer_opens_from_its_page(page):
    page.goto((SITE / "explorer.html").as_uri())
    page.get_by_text("Open the explorer").click()
    assert page.evaluate("window.explorer.stateRows(window.explorer.parse('16:1,32:2'), 64)") == 32
    assert page.locator("#matrix").is_visible()


@pytest.mark.parametrize("name", ["compatibility", "evidence", "patterns", "benchmarks", "alternatives", "distributed"])
def test_no_table_is_clipped(name, page):
    page.goto((SITE / f"{name}.html").as_uri())
    tables = page.locator("article table")
    assert tables.count()
    for place in range(tables.count()):
        wide = tables.nth(place).evaluate("table => [table.scrollWidth, table.closest('article').clientWidth]")
        assert wide[0] <= wide[1], (name, place)


def test_a_chart_can_be_read_where_it_stands_alone(page):
    page.goto((ROOT / "benchmarks/results/runtime.svg").as_uri())
    paper, ink = page.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.querySelector('text'))"
        ".fill].map(colour => colour.match(/\\d+/g).map(Number).reduce((sum, part) => sum + part) / 3)"
    )
    assert abs(paper - ink) > 150
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (paper < ink) == dark
