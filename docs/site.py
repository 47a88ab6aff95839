"""Builds the documentation: `python docs/site.py`, offline, any warning an error; `make docs` calls it.

The pages link to files of the repository (`../benchmarks/…`), as they should where the repository is read. For the site
those files are laid beside the pages. Afterwards every link of the built site is followed, anchors included.
"""

import html.parser
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"


def lay_out() -> None:
    """Lay pages, and the files that they link to, into one folder."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    waiting = [(page, ROOT / "docs" / page.relative_to(PAGES)) for page in sorted(PAGES.rglob("*.md"))]
    for page, source in waiting:  # which grows
        text = page.read_text(encoding="utf-8")
        for link in set(re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)):
            linked = (source.parent / link).resolve()
            if not linked.is_file():
                continue  # of the site itself, or broken, which shows later
            target = PAGES / linked.relative_to(ROOT / "docs" if linked.is_relative_to(ROOT / "docs") else ROOT)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(linked, target)
                if target.suffix == ".md":
                    waiting.append((target, linked))
            text = text.replace(f"]({link}", f"]({os.path.relpath(target, page.parent)}")
        page.write_text(text, encoding="utf-8")
    hidden = [page for page in PAGES.rglob("*.html") if page.with_suffix(".md").exists()]
    if hidden:
        sys.exit(f"a page of the same name would be built over {', '.join(map(str, hidden))}")


class _Page(html.parser.HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag's links and names."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name in ("href", "src") and value:
                self.links.append((tag, value))


def broken_links() -> list[str]:
    """Return what is wrong with the site's links: no such file, no such place, or a part that lies elsewhere."""
    pages = {path: _Page(path) for path in SITE.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for tag, link in page.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                if tag in ("script", "img", "link") and address.scheme != "data":
                    wrong.append(f"{path.relative_to(SITE)}: {tag} is fetched from {link}")
                continue
            target = path if not address.path else (path.parent / urllib.parse.unquote(address.path)).resolve()
            if path.name == "404.html" and address.path.startswith("/"):
                target = SITE / address.path.lstrip("/")
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                wrong.append(f"{path.relative_to(SITE)}: there is no {link}")
            elif address.fragment and target in pages and address.fragment not in pages[target].places:
                wrong.append(f"{path.relative_to(SITE)}: {link} leads to no such place")
    return wrong


def main() -> None:
    """Build the site and check it."""
    lay_out()
    build = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    sys.stdout.write(build.stdout)
    if build.returncode or re.search(r"\bwarning\b|^griffe:", build.stdout, re.IGNORECASE | re.MULTILINE):
        sys.exit("the documentation does not build without warnings")
    wrong = broken_links()
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    count = len(list(SITE.rglob("*.html")))
    if wrong:
        sys.exit(f"{len(wrong)} links are broken")
    sys.stdout.write(f"{count} pages, every link followed: {SITE.relative_to(ROOT)}/index.html\n")


if __name__ == "__main__":
    main()
