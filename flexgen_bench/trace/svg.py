"""As much of SVG as a chart needs: rectangles, paths, lines and text in a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

Box = tuple[float, float, float, float]  # x, y, width, height


class Svg:
    """A picture that is built up from the back to the front. Lengths are in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def rect(self, box: Box, fill: str, tooltip: str = "") -> None:
        x, y, width, height = map(_short, box)
        inside = f"<title>{escape(tooltip)}</title>" if tooltip else ""
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}">{inside}</rect>')

    def boxes(self, boxes: Sequence[Box], fill: str) -> None:
        """Many rectangles of one colour as one path: a fraction of the bytes."""
        if boxes:
            moves = "".join(f"M{_short(x)} {_short(y)}h{_short(w)}v{_short(h)}h-{_short(w)}z" for x, y, w, h in boxes)
            self._parts.append(f'<path d="{moves}" fill="{fill}"/>')

    def line(self, start: tuple[float, float], end: tuple[float, float], stroke: str) -> None:
        (x1, y1), (x2, y2) = start, end
        self._parts.append(
            f'<line x1="{_short(x1)}" y1="{_short(y1)}" x2="{_short(x2)}" y2="{_short(y2)}" stroke="{stroke}"/>'
        )

    def text(
        self,
        at: tuple[float, float],
        text: str,
        anchor: str = "start",
        size: int = 12,
        fill: str = "#222222",
        weight: str = "normal",
    ) -> None:
        """anchor: which end of the text stands at the point: start, middle or end."""
        self._parts.append(
            f'<text x="{_short(at[0])}" y="{_short(at[1])}" text-anchor={quoteattr(anchor)} font-size="{size}" '
            f'font-weight="{weight}" fill="{fill}">{escape(text)}</text>'
        )

    def to_text(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def _short(length: float) -> str:
    return f"{length:.2f}".rstrip("0").rstrip(".")
