"""Curves and heat maps as inline SVG, and tables, for a page without scripts.

A point tells its value under the mouse, and each drawing has its numbers in a table below it. Colours are classes
that the page's style sheet fills.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from .report import RankReport, short_labels

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 240

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 40

# Pale to dark, and the text that is readable on each; equal in light and dark mode.
_SHADES = ("#eef6ec", "#d5ecd0", "#aedcab", "#7fc585", "#4ba765", "#23874a", "#096835", "#00441b")

_CELL = 26


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(count - 1, 1) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    zero: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:
    """A figure of curves over optimizer steps.

    `zero` begins the axis at 0, `marks` are upright lines with a name.
    """
    marks = marks or {}
    values = [y for points in series.values() for _, y in points]
    across = [x for points in series.values() for x, _ in points] + list(marks.values())
    ys = ticks(min(0.0, *values) if zero else min(values), max(values))
    xs = ticks(0, max([*across, 1]))
    right = max([*across, 1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (ys[-1] - y) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM),
        )

    low, high = min(values), max(values)
    text = f"{', '.join(series)} by optimizer step; between {number(low)} and {number(high)}."
    body = [*_axes(xs, ys, right, place), *_marks(marks, place, ys)]
    for index, (name, points) in enumerate(series.items()):
        body += _curve(_look(index), name, points, place)
    key = "".join(
        f'<li><svg viewBox="0 0 14 6" aria-hidden="true"><path class="{_look(i)}" d="M0 3h14" stroke-width="3"/></svg>'
        f"{html.escape(name)}</li>"
        for i, name in enumerate(series)
    )
    legend = f'<ul class="key">{key}</ul>' if len(series) > 1 else ""
    return (
        f"<figure><h3>{html.escape(title)}</h3>{_svg(title, text, _WIDTH, _HEIGHT, body)}{legend}"
        f"{_numbers(title, series)}</figure>"
    )


def heat_map(report: RankReport, title: str, top: int, numbers: bool) -> str:
    """Kinds of matrix down, layers across, darker for a higher rank; `top` is the darkest."""
    kinds, layers, ranks = report.grid()
    labels = short_labels(kinds)
    left = 7 * max([len(label) for label in labels] + [5]) + 10
    width, height = left + _CELL * len(layers) + 4, _CELL * (len(kinds) + 1) + 4
    body = []
    for x, layer in enumerate(layers):
        centre = left + _CELL * (x + 0.5)
        body.append(_text(centre, 14, "–" if layer is None else str(layer), "middle", "soft"))
    for y, label in enumerate(labels):
        body.append(_text(left - 8, _CELL * (y + 1) + 17, label, "end"))
        for x, rank in enumerate(ranks[y]):
            if rank is not None:
                layer_name = "" if layers[x] is None else f" of layer {layers[x]}"
                body += _cell(left + _CELL * x, _CELL * (y + 1), rank, top, f"{label}{layer_name}", numbers)
    largest = max(report.ranks.values())
    text = f"{report.total_rank} triplets in {len(report.rows)} matrices; the largest rank is {largest}."
    drawn = _svg(title, text, width, height, body, scale=True)
    return f"<figure>{drawn}<figcaption>{html.escape(title)}</figcaption></figure>"


def _axes(
    xs: list[float], ys: list[float], right: float, place: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    body = []
    for y in ys:
        _, down = place(0, y)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        body.append(_text(_LEFT - 8, down + 4, number(y), "end", "soft"))
    for x in xs:
        if x <= right:
            body.append(_text(place(x, 0)[0], _HEIGHT - _BOTTOM + 18, number(x), "middle", "soft"))
    return [*body, _text((_LEFT + _WIDTH) / 2, _HEIGHT - 4, "optimizer step", "middle", "soft")]


def _marks(
    marks: Mapping[str, float], place: Callable[[float, float], tuple[float, float]], ys: list[float]
) -> list[str]:
    body = []
    for name, x in marks.items():
        across = place(x, ys[0])[0]
        body.append(f'<line class="mark" x1="{across:.1f}" x2="{across:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        body.append(_text(across + 4, _TOP + 10, name, "start", "soft"))
    return body


def _curve(style: str, name: str, points: Points, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    drawn = " ".join(f"{across:.1f},{down:.1f}" for across, down in (place(x, y) for x, y in points))
    body = [f'<polyline class="{style}" points="{drawn}"/>']
    for x, y in points:
        across, down = place(x, y)
        if len(points) == 1:  # a line of one point cannot be seen
            body.append(f'<circle class="{style}" cx="{across:.1f}" cy="{down:.1f}" r="3"/>')
        tip = html.escape(f"{name}, step {number(x)}: {number(y)}")
        body.append(f'<circle class="hit" cx="{across:.1f}" cy="{down:.1f}" r="6"><title>{tip}</title></circle>')
    return body


def _look(index: int) -> str:
    """Four colours, then the same with dashes."""
    return f"s{index % 4}{' dashed' if index >= 4 else ''}"


def _cell(x: float, y: float, rank: int, top: int, what: str, numbers: bool) -> list[str]:
    shade = round(rank / top * (len(_SHADES) - 1))
    body = [
        f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="2" class="grid" fill="{_SHADES[shade]}">'
        f"<title>{html.escape(what)}: rank {rank}</title></rect>"
    ]
    if numbers:
        ink = "#ffffff" if shade > 4 else "#1d1d1b"
        middle = x + _CELL / 2 - 1
        body.append(f'<text x="{middle}" y="{y + 16}" text-anchor="middle" style="fill: {ink}">{rank}</text>')
    return body


def _svg(title: str, text: str, width: float, height: float, body: list[str], scale: bool = False) -> str:
    size = f' style="max-width: {width / 16:.1f}rem"' if scale else ""
    label = html.escape(f"{title}. {text}", quote=True)
    return f'<svg role="img" viewBox="0 0 {width} {height}" aria-label="{label}"{size}>{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain cells, escaped; all columns but the first to the right."""
    head = "".join(f'<th scope="col"{_right(column, i)}>{html.escape(column)}</th>' for i, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(cell, i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _right(text: str, column: int) -> str:
    return ' class="n"' if column and len(text) < 30 else ""


def _numbers(title: str, series: Mapping[str, Points]) -> str:
    """The drawn numbers as a table, folded away."""
    steps = sorted({x for points in series.values() for x, _ in points})
    values = [dict(points) for points in series.values()]
    rows = [(number(x), *(number(column[x]) if x in column else "" for column in values)) for x in steps]
    return f"<details><summary>Numbers: {html.escape(title)}</summary>{table(('step', *series), rows)}</details>"


def number(value: float) -> str:
    """Whole, with four digits, or as a power of ten."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3e}" if abs(value) < 1e-3 else f"{value:.4g}"
