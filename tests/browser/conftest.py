"""A headless Chromium, and what a reader of a page must be able to do with it."""

import json
import shutil

import pytest

WIDTHS = (1280, 390)
MEASURE = """() => {
  const small = [], wide = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(part => part.nodeType === 3 && part.textContent.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || getComputedStyle(node).visibility === "hidden") continue;
    let size = parseFloat(getComputedStyle(node).fontSize);
    const svg = node.closest("svg");
    if (svg && svg.viewBox.baseVal.width) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (size < 10.99) small.push([node.textContent.trim().slice(0, 40), size]);
    const scrolls = node.closest(".t, pre, .scrolls");
    const said = node.textContent.trim().slice(0, 40);
    if (!scrolls && (box.right > innerWidth + 1 || box.left < -1)) wide.push([said, box.right]);
  }
  const clipped = [...document.querySelectorAll(".t")].filter(part => part.scrollWidth > part.clientWidth + 1);
  return {small, wide, page: document.documentElement.scrollWidth, window: innerWidth, clipped: clipped.length};
}"""


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on the path")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")], ids=str)
def show(request, browser, tmp_path):
    """Return a function that shows a file, takes a picture, and returns the page and what is wrong with it."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors = []

    def show(path):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda asked: errors.append(asked.url) if not asked.url.startswith(("file:", "data:")) else 0
        )
        page.goto(path.as_uri())
        page.screenshot(path=str(tmp_path.parent / f"{path.stem}-{width}-{scheme}.png"), full_page=True)
        found = page.evaluate(MEASURE)
        assert found["small"] == [], json.dumps(found["small"])
        assert found["wide"] == [], json.dumps(found["wide"])
        assert found["page"] <= found["window"]
        if width == max(WIDTHS):
            assert found["clipped"] == 0
        assert errors == []
        return page

    yield show
    context.close()
