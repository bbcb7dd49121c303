"""Pieces of a page of results as HTML, and the page itself with its style and script inside: one file that needs no other.

Every text that is handed over is escaped here.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


def document(title: str, body: str) -> str:
    """A page of a body that is HTML already."""
    style, script = (Path(__file__).with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{style}</style></head>"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def prose(text: str) -> str:
    """Text in which no line ends inside a flag."""
    return re.sub(r"--\w+", r"<span class=flag>\g<0></span>", escape(text))


def _decimals(column: pd.Series) -> int:
    """So many that the largest number of a column has four significant digits, and all line up."""
    largest = max((abs(value) for value in column if math.isfinite(value)), default=0.0) or 1.0
    return min(max(3 - math.floor(math.log10(largest)), 0), 9)


def table(frame: pd.DataFrame, sortable: bool = False, marked: Sequence[bool] = ()) -> str:
    """A frame as an HTML table, the numbers of a column with as many decimals; some rows may be marked."""
    floats = [name for name in frame.columns if pd.api.types.is_float_dtype(frame[name])]
    decimals = {place: _decimals(frame[name]) for place, name in enumerate(frame.columns) if name in floats}

    def cell(value: Any, tag: str, numeric: bool, places: int = 4) -> str:
        layout = f".{places}f" if isinstance(value, float) else "," if isinstance(value, int) else ""
        text = format(value, layout) if layout else str(value)
        plain = f' class=number data-value="{value if value == value else 1e300}"' if numeric and tag == "td" else ""
        return f"<{tag}{plain or (' class=number' if numeric else '')}>{escape('-' if text == 'nan' else text)}</{tag}>"

    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    head = "".join(cell(name, "th", is_number) for name, is_number in zip(frame.columns, numeric, strict=True))
    lines = "".join(
        f"<tr{' class=in' if place < len(marked) and marked[place] else ''}>"
        f"{''.join(cell(value, 'td', numeric[at], decimals.get(at, 4)) for at, value in enumerate(row))}</tr>"
        for place, row in enumerate(frame.itertuples(index=False))
    )
    kind = " class=sortable" if sortable else ""
    return (
        f"<div class=scroll tabindex=0><table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """Content that a click opens."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def figure(path: Path, caption: str, made_by: str) -> str:
    """A figure inside the page, or what would make it."""
    if not path.is_file():
        return f"<p class=muted>{escape(caption)}: not made yet. <code>{prose(made_by)}</code></p>"
    data, text = path.read_bytes(), escape(caption)
    wide = " class=wide" if int.from_bytes(data[16:20]) > 1200 else ""  # the width in a PNG's head
    return f'<figure{wide}><img alt="{text}" src="data:image/png;base64,{base64.b64encode(data).decode()}"><figcaption>{text}</figcaption></figure>'


class Bar(NamedTuple):
    """A bar of the chart: a loss, measured or estimated, and an interval, nan where it is not known."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    measured: bool = True


def bar_chart(bars: Sequence[Bar], caption: str) -> str:
    """Bars from zero, the first marked; widths are shares of the page's, so that it may have any."""
    longest = max(float(np.nanmax([bar.value, bar.high])) for bar in bars)
    drawn, said = [], []
    for place, bar in enumerate(bars):
        top, share, kind = 42 * place, 100 / longest, "best" if place == 0 else "bar"
        value = f"{bar.value:.3f}{'' if bar.measured else ' estimated'}"
        said.append(f"{bar.label}: {value}" + (f" ({bar.low:.3f} to {bar.high:.3f})" if bar.low == bar.low else ""))
        drawn.append(
            f'<text x="0" y="{top + 15}">{escape(bar.label)}</text>'
            f'<text x="100%" y="{top + 15}" text-anchor="end">{value}</text>'
            f'<rect class="{kind}{"" if bar.measured else " estimated"}" x="0" y="{top + 20}" height="14" '
            f'width="{bar.value * share:.2f}%"/>'
        )
        if bar.low == bar.low:
            ends = f'x1="{max(bar.low, 0) * share:.2f}%" x2="{bar.high * share:.2f}%"'
            drawn.append(f'<line {ends} y1="{top + 27}" y2="{top + 27}"/>')
    label = escape(f"Bar chart. {'; '.join(said)}.")
    svg = f'<svg role="img" aria-label="{label}" width="100%" height="{42 * len(bars)}">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
