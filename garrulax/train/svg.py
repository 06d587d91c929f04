"""Line charts as SVG texts: pure functions, no library, no fonts to load."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 42  # margins around the plot
_FEW = 25  # points of a line that are shown as dots too
MOST_POINTS = 600  # of a line; more cannot be seen


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: For the legend; "" shows none.
        x: [N], ascending.
        y: [N]; values that are not finite leave a gap.
        color: As in CSS.
        faint: Whether it is drawn thin and pale, behind the others.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: str
    faint: bool = False


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str = "step", skip: float = 0.0, log: bool = False
) -> str:
    """Draws lines over common axes.

    Args:
        title: Above the plot.
        lines: At least one; those without a finite value are left out.
        x_label: Below the plot.
        skip: Share of the x range at the start that the y range does not have to show, such as the steep start of a
            loss. What is outside is cut off.
        log: Whether the y axis is logarithmic; values that are not positive leave a gap.

    Returns:
        An `<svg>` element; "" if there is nothing to draw.

    Example:
        >>> import numpy as np
        >>> chart = line_chart("loss", [Line("run", np.arange(3), np.array([3.0, 2.0, 1.5]), "#0072b2")])
        >>> chart.startswith("<svg") and chart.count("<polyline")
        1
    """
    if log:
        lines = [dataclasses.replace(line, y=np.log10(np.where(line.y > 0, line.y, np.nan))) for line in lines]
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    x_range = (min(float(line.x.min()) for line in lines), max(float(line.x.max()) for line in lines))
    start = x_range[0] + skip * (x_range[1] - x_range[0])
    shown = np.concatenate([line.y[(line.x >= start) & np.isfinite(line.y)] for line in lines])
    y_range = _padded(float(shown.min()), float(shown.max()))
    x_range = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[1] + 1)
    name = f"clip{zlib.crc32(repr((title, x_range, y_range)).encode())}"
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" font-family="sans-serif" font-size="11" role="img">',
            f"<title>{escape(title)}</title>",
            f'<clipPath id="{name}"><rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
            f'<text x="{_LEFT}" y="16" font-size="13" font-weight="bold" fill="#222">{escape(title)}</text>',
            *_axes(x_range, y_range, x_label, log),
            f'<g clip-path="url(#{name})">',
            *(_polylines(line, x_range, y_range) for line in sorted(lines, key=lambda line: not line.faint)),
            "</g>",
            *_legend([line for line in lines if line.name]),
            "</svg>",
        ]
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most `most` steps apart: 1, 2 or 5 times a power of ten."""
    span = (high - low) / most
    power = 10.0 ** math.floor(math.log10(span))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, step: float) -> str:
    """A tick as text: as many digits as the distance of the ticks needs, with k, M or G for thousands."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor or (value == 0 and step >= factor):
            value, step = value / factor, step / factor
            return f"{value:.{_digits(step)}f}{prefix}" if value else "0"
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:.{_digits(step)}f}"


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if low == 0 else low - margin), high + margin


def _place(x: np.ndarray, y: np.ndarray, x_range: tuple, y_range: tuple) -> tuple[np.ndarray, np.ndarray]:
    across = _LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)
    down = _HEIGHT - _BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - _TOP - _BOTTOM)
    return across, np.clip(down, -1e4, 1e4)


def _polylines(line: Line, x_range: tuple, y_range: tuple) -> str:
    """The line, one polyline for each stretch of finite values; a lone value is a dot."""
    keep = _shown(line.y)
    across, down = _place(line.x[keep].astype(float), line.y[keep].astype(float), x_range, y_range)
    finite = np.isfinite(line.y[keep])
    stretches = np.split(np.arange(len(keep)), np.flatnonzero(np.diff(finite)) + 1)
    style = f'stroke="{line.color}" ' + (
        'stroke-width="0.8" opacity="0.35"' if line.faint else 'stroke-width="1.7" stroke-linejoin="round"'
    )
    found = []
    for stretch in stretches:
        if not finite[stretch[0]]:
            continue
        if len(stretch) == 1:
            x, y = across[stretch[0]], down[stretch[0]]
            found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.color}"/>')
        else:
            points = " ".join(f"{across[i]:.1f},{down[i]:.1f}" for i in stretch)
            found.append(f'<polyline fill="none" {style} points="{points}"/>')
            few = stretch[: 0 if line.faint or len(keep) > _FEW else None]
            found += [f'<circle cx="{across[i]:.1f}" cy="{down[i]:.1f}" r="2.5" fill="{line.color}"/>' for i in few]
    return "".join(found)


def _shown(y: np.ndarray) -> np.ndarray:
    """The indices of the points to draw: all, or of many the least and greatest of each stretch, so that peaks stay."""
    if len(y) <= MOST_POINTS:
        return np.arange(len(y))
    finite = np.isfinite(y)
    least, greatest = np.where(finite, y, np.inf), np.where(finite, y, -np.inf)
    stretches = np.array_split(np.arange(len(y)), MOST_POINTS // 2 - 1)
    peaks = [part[values[part].argmin()] for part in stretches for values in (least, -greatest)]
    return np.unique([0, *peaks, len(y) - 1])


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, log: bool) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    found = []
    columns = ticks(*x_range, most=7)
    for value, text in _rows(y_range, log):
        _, y = _place(np.array(0.0), np.array(value), x_range, y_range)
        found.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e3e3"/>')
        found.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{text}</text>')
    for value in columns:
        x, _ = _place(np.array(value), np.array(0.0), x_range, y_range)
        text = label(value, columns[1] - columns[0] if len(columns) > 1 else abs(value) or 1.0)
        found.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#888"/>')
        found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{text}</text>')
    found.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#888"/>')
    middle = (_LEFT + right) / 2
    found.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle" fill="#555">{escape(x_label)}</text>')
    return found


def _rows(y_range: tuple[float, float], log: bool) -> list[tuple[float, str]]:
    """Places and texts of the ticks of the y axis."""
    if not log:
        values = ticks(*y_range, most=5)
        return [(v, label(v, values[1] - values[0] if len(values) > 1 else abs(v) or 1.0)) for v in values]
    powers = range(math.floor(y_range[0]), math.ceil(y_range[1]) + 1)
    factors = (1, 2, 5) if y_range[1] - y_range[0] < 2.5 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    found = [v for v in found if y_range[0] <= math.log10(v) <= y_range[1]]
    return [(math.log10(v), label(v, v)) for v in found[:: -(-len(found) // 8) or 1]]


def _legend(lines: Sequence[Line]) -> list[str]:
    """Names of the lines, from the right, above the plot."""
    found, x = [], float(_WIDTH - _RIGHT)
    for line in reversed(lines):
        name = line.name if len(line.name) <= 28 else f"{line.name[:27]}…"
        x -= 6.2 * len(name) + 8
        found.append(f'<text x="{x:.0f}" y="28" fill="#333">{escape(name)}</text>')
        found.append(f'<path d="M{x - 18:.0f} 24h14" stroke="{line.color}" stroke-width="3"/>')
        x -= 24
    return found
