"""A report's text, tables and pictures, written as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longnet.plots.charts import css_variables, inline_svg


@dataclass(frozen=True)
class Heading:
    """A heading below the title."""

    text: str


@dataclass(frozen=True)
class Headline:
    """What the report comes to, in a sentence, below the title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Text as it is, a model's sample for one."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns whose cells are numbers stand to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG file beside the report. The colours of an SVG follow the page's."""

    path: Path
    caption: str


Block = Heading | Headline | Text | Points | Code | Table | Picture


@dataclass
class Document:
    """A title and what follows it."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks += blocks

    def to_markdown(self, folder: Path) -> str:
        """Return Markdown for a file in `folder`, to which the pictures' paths are relative."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            match block:
                case Heading(text):
                    parts.append(f"## {text}")
                case Headline(text):
                    parts.append(f"**{text}**")
                case Text(text):
                    parts.append(text)
                case Points(items):
                    parts.append("\n".join(f"- {item}" for item in items))
                case Code(text):
                    parts.append("\n".join(f"    {line}" for line in text.splitlines()))
                case Picture(path, caption):
                    parts.append(f"![{caption}]({path.relative_to(folder).as_posix()})\n\n*{caption}*")
                case Table(head, rows, caption):
                    rule = ["---:" if right else "---" for right in _to_the_right(head, rows)]
                    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, rule, *rows)]
                    table = "\n".join(f"| {line} |" for line in lines)
                    parts.append(f"{caption}\n\n{table}" if caption else table)
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """Return one HTML page, its pictures inside; no script, nothing from elsewhere."""
        parts = [f"<h1>{html.escape(self.title)}</h1>"]
        for block in self.blocks:
            match block:
                case Heading(text):
                    parts.append(f"<h2>{html.escape(text)}</h2>")
                case Headline(text):
                    parts.append(f'<p class="headline">{html.escape(text)}</p>')
                case Text(text):
                    parts.append(f"<p>{html.escape(text)}</p>")
                case Points(items):
                    parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
                case Code(text):
                    parts.append(f"<pre>{html.escape(text)}</pre>")
                case Picture(path, caption):
                    said = html.escape(caption)
                    parts.append(f"<figure>{_picture(path, caption)}<figcaption>{said}</figcaption></figure>")
                case Table(head, rows, caption):
                    parts.append(_html_table(head, rows, caption))
        colours = {scheme: css_variables(scheme) for scheme in ("light", "dark")}
        return _PAGE.format(title=html.escape(self.title), body="\n".join(parts), **colours)


def write_text(text: str, path: Path) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _picture(path: Path, caption: str) -> str:
    if path.suffix == ".svg":
        return inline_svg(path, caption)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    right = _to_the_right(head, rows)

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [
            ' class="n"' if number else ' class="l"' if len(cell) > 24 else ""
            for number, cell in zip(right, cells, strict=True)
        ]
        return "<tr>" + "".join(
            f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True)
        ) + "</tr>"  # fmt: skip

    said = f"<caption><span>{html.escape(caption)}</span></caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return f'<div class="t"><table>{said}<thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _to_the_right(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    return [
        any(row[column][:1].isdigit() or row[column][:1] in "−-+" for row in rows if row[column])
        and not any(row[column][:1].isalpha() for row in rows)
        for column in range(len(head))
    ]


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #f4f6f7; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #1d2428; {dark} }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
p, li, figcaption {{ max-width: 60rem; }}
.headline {{ font-size: 1.15rem; font-weight: 600; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }}
.t {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .92rem; }}
caption {{ text-align: left; color: var(--faint); padding-bottom: .4rem; }}
caption span {{ position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }}
th, td {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ border-bottom-width: 2px; white-space: normal; vertical-align: bottom; }}
td.l {{ white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.2rem 0; }}
figure svg {{ display: block; width: 100%; max-width: 640px; stroke-linejoin: round; overflow: visible; }}
img {{ max-width: 100%; background: #fff; border-radius: 6px; }}
figcaption {{ color: var(--faint); font-size: .9rem; }}
pre {{ background: var(--back); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: .85rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
