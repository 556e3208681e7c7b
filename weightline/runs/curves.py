"""Curves of metrics as small SVGs, inlined as images that Prefect's pages show. Pure.

docs/design-notes/006 says why no plotting library draws them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 640, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 26, 24
_MAX_POINTS = 400
#: These colors are legible on a light page and on a dark one.
_INK, _LINE = "#7d8590", "#3b82f6"

Point = tuple[float, float]


def points_of(history: Iterable[Mapping[str, float]], name: str) -> list[Point]:
    """Returns (step, value) for each step at which the metric was logged as a finite number; its newest value."""
    found = {
        float(logged["step"]): float(logged[name])
        for logged in history
        if name in logged and "step" in logged and math.isfinite(logged[name])
    }
    return sorted(found.items())


def curve_image(title: str, points: Sequence[Point]) -> str:
    """Returns the curve as a Markdown image, or "" for fewer than two points."""
    if len(points) < 2:
        return ""
    encoded = base64.b64encode(curve_svg(title, points).encode()).decode()
    return f"![{title}](data:image/svg+xml;base64,{encoded})"


def curve_svg(title: str, points: Sequence[Point]) -> str:
    """Returns a line over steps. The axes show the first and last step and the range of values."""
    shown = thinned(points, _MAX_POINTS)
    (first, last), (low, high) = _range(x for x, _ in shown), _range(y for _, y in shown)
    path = " ".join(f"{_x(x, first, last):.1f},{_y(y, low, high):.1f}" for x, y in shown)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    texts = [
        (_LEFT, 16, "start", f"{title}: {shown[-1][1]:.4g} at step {shown[-1][0]:.0f}"),
        (_LEFT - 6, _TOP + 8, "end", f"{high:.4g}"), (_LEFT - 6, bottom, "end", f"{low:.4g}"),
        (_LEFT, _HEIGHT - 6, "start", f"{first:.0f}"), (right, _HEIGHT - 6, "end", f"{last:.0f}"),
    ]  # fmt: skip
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="{at}">{escape(text)}</text>' for x, y, at, text in texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">{labels}'
        f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="{_INK}" stroke-width="1"/>'
        f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="2" stroke-linejoin="round"/></svg>'
    )


def thinned(points: Sequence[Point], max_points: int) -> list[Point]:
    """Returns at most `max_points` points: means of neighbors, and the last point as it is."""
    size = -(-len(points) // max_points)
    if size <= 1:
        return list(points)
    groups = (points[at : at + size] for at in range(0, len(points) - 1, size))
    means = [(_mean(x for x, _ in group), _mean(y for _, y in group)) for group in groups]
    return [*means[: max_points - 1], points[-1]]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low, low + 1.0)


def _x(x: float, first: float, last: float) -> float:
    return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)


def _y(y: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
