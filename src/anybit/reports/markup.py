"""The pieces of a page: sections, tables, plots with their data, one document around them.

Every text is escaped here, and the document's policy forbids requests, whatever its data hold.
"""

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def document(title: str, body: Sequence[str]) -> str:
    from plotly.offline import get_plotlyjs

    own = files("anybit.reports")
    style, script = ((own / name).read_text(encoding="utf8") for name in ("page.css", "page.js"))
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    scripts = f"<script>{get_plotlyjs()}</script><script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{"".join(body)}</main>\n{scripts}</body></html>\n'


def text(words: str) -> str:
    return html.escape(words.encode("utf8", "backslashreplace").decode())  # a name in a JSON file may hold half a character


def header(above: str, headline: str, lead: str, more: str = "") -> str:
    return f'<header><p class="road">{text(above)}</p><h1>{text(headline)}</h1><p class="lead">{text(lead)}</p>{more}</header>'


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>\n"


def subheading(words: str) -> str:
    return f"<h3>{text(words)}</h3>"


def details(summary: str, *parts: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def pairs(items: Sequence[tuple[str, str]], shown: Sequence[str] = ()) -> str:
    """Figures with what they are; those named in `shown` are filled in by the script."""
    marks = [f' data-show="{name}"' for name in shown] or [""] * len(items)
    parts = [f"<div><dt>{text(what)}</dt><dd{mark}>{text(value)}</dd></div>" for mark, (what, value) in zip(marks, items, strict=True)]
    return f'<dl class="amounts">{"".join(parts)}</dl>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{text(first)}</th>{"".join(map(_cell, others))}</tr>' for first, *others in rows)
    inside = f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">{inside}</div>'


def _cell(words: str) -> str:
    """Numbers stay on one line."""
    return f"<td{' class=long' if len(words) > 40 else ''}>{text(words)}</td>"


def plot(key: str, figure: Any, label: str) -> str:
    return f'<div class="plot" data-figure="{key}" role="img" aria-label="{text(label)}"></div>{embedded(key, figure)}'


def embedded(key: str, data: Any) -> str:
    """Data for the script. No `<` is left in it, so that nothing in it can end the element."""
    written = json.dumps(data, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        written = written.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="{key}">{written}</script>'
