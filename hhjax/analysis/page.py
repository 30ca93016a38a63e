"""A report as one HTML file that opens from disk: figures inline, the paper's claim and what was found in words. No jax."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hhjax.analysis.figures import beside

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{width:100%}h2{margin-top:2.5rem}.claim{color:#555}.found{background:#f3f6f9;padding:.6rem .8rem;border-left:3px solid #1f5a8c}
table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.3rem .5rem;vertical-align:top;text-align:left}
pre{font-size:12px;overflow-x:auto}"""


class Section(NamedTuple):
    """figure: the path of a figure without its ending, as `figures.finish` writes it; body: HTML below it."""

    title: str
    figure: Path | None = None
    body: str = ""


def write_page(path: Path, title: str, intro: str, sections: Sequence[Section]) -> None:
    """The whole page, with every figure inside the file."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
             f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"]  # fmt: skip
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.figure:
            claim, found = beside(section.figure, ".txt").read_text().split("\n", 1)
            image = base64.b64encode(beside(section.figure, ".svg").read_bytes()).decode()
            parts.append(f'<p class=claim>{html.escape(claim)}</p><img alt="{html.escape(section.title)}" src="data:image/svg+xml;base64,{image}">'
                         f"<p class=found>{html.escape(found.strip())}</p>")  # fmt: skip
        parts.append(section.body)
    path.write_text("\n".join(parts) + "\n")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)  # noqa: E731
    return f"<table><tr>{cells(header, 'th')}</tr>" + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table>"
