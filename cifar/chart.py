"""Line charts as SVG, whose colours are those of the page around them."""

import math
from dataclasses import dataclass

from cifar.metrics import Series

_WIDTH, _HEIGHT = 540, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 40


@dataclass(frozen=True)
class Line:
    """A curve: the page's class for its colour, its points, and whether each is marked."""

    color: str
    points: Series
    dots: bool = False


def chart(
    lines: list[Line], low: float | None = None, high: float | None = None, x_label: str = "optimizer step"
) -> str:
    """An SVG element with `lines`, from x = 0, between `low` and `high` or what the values need."""
    values = [y for line in lines for _, y in line.points]
    if not values:
        return "<p>no records</p>"
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    right = max(x for line in lines for x, _ in line.points) or 1.0
    ticks = nice_ticks(low, high if high > low else low + 1)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in nice_ticks(0, right, 5):
        if tick <= right:
            x, y = place(tick, low)
            parts.append(f'<text x="{x:.1f}" y="{y + 17:.1f}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
    for line in lines:
        spots = [place(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="{line.color}" points="{path}" fill="none" stroke-width="2"/>')
        if line.dots or len(spots) == 1:  # a line needs two points to be seen
            parts += (
                f'<circle class="{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.5" stroke-width="2"/>' for x, y in spots
            )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that take in `low` to `high`; about so many."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _short(number: float) -> str:
    return f"{number / 1000:g}k" if number >= 10_000 else f"{number:,g}"
