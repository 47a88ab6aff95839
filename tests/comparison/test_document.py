import base64
import html.parser
import re

import pytest

from longnet.comparison.document import Code, Document, Heading, Headline, Picture, Points, Table, Text, write_text
from longnet.plots.charts import Curve, draw_curves

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def document(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(PNG)
    document = Document("A <title> & more")
    document.add(
        Heading("What holds"), Text("2 < 3 & so on"), Points(["first", "second"]), Code("x = 1\n\nif x < 2:\n  pass"),
        Table(["name", "loss"], [["a|b", "1.50"], ["c", "−0.25"]], "caption"),
        Picture(tmp_path / "figures" / "one.png", "a picture"),
    )  # fmt: skip
    return document


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text; checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_from_elsewhere_and_is_whole(document):
    page = document.to_html()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"https?:|url\(|@import", page)
    (source,) = (value for tag, name, value in reader.attributes if (tag, name) == ("img", "src"))
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG
    assert {"2 < 3 & so on", "A <title> & more", "a|b", "x = 1\n\nif x < 2:\n  pass"} <= set(reader.text)
    assert "prefers-color-scheme: dark" in page


def test_an_svg_is_part_of_the_page_and_takes_its_colours(tmp_path):
    path = tmp_path / "chart.svg"
    draw_curves([Curve("one", [1, 2], [3.0, 2.0])], path, x="tokens", y="loss")
    document = Document("title")
    document.add(Headline("All is well."), Picture(path, 'a "chart"'))
    page = document.to_html()
    assert '<svg role="img" aria-label="a &quot;chart&quot;"' in page
    assert "var(--dilated, #0f4c75)" in page
    assert "--dilated: #5aa9e6" in page  # in the dark
    assert not re.search(r"https?:|url\((?!#)|@import", page)
    assert '<p class="headline">All is well.</p>' in page
    assert document.to_markdown(tmp_path).startswith("# title\n\n**All is well.**\n")


def test_columns_of_numbers_stand_to_the_right(document):
    page = document.to_html()
    assert '<th>name</th><th class="n">loss</th>' in page
    assert '<td class="n">−0.25</td>' in page
    assert "| --- | ---: |" in document.to_markdown(document.blocks[-1].path.parent.parent)


def test_markdown_keeps_tables_and_paths(document, tmp_path):
    text = document.to_markdown(tmp_path)
    assert "| a\\|b | 1.50 |" in text
    assert "![a picture](figures/one.png)" in text
    assert "    if x < 2:" in text
    assert text.startswith("# A <title> & more\n")


def test_a_file_appears_whole(tmp_path):
    write_text("new", tmp_path / "deep" / "file")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
