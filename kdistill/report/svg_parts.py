"""What charts are made of: scale, axes, marks, labels, and the frame, on a page or as a file. Standard library only."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 212  # of the plot's area
LETTER, LINE = 6.3, 13  # width of a letter and height of a line of 11 pixels, to keep labels apart


class Scale:
    """Values from `low` to `high` on pixels from `first` to `last`, by their logarithm if `log`."""

    def __init__(self, low: float, high: float, first: float, last: float, log: bool = False):
        self.log, self.low, self.high, self.first, self.last = log, low, high, first, last
        if low == high:
            self.low, self.high = (
                (low / 2, high * 2) if log else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
            )

    def __call__(self, value: float) -> float:
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        return round(self.first + (value - low) / (high - low) * (self.last - self.first), 1)

    def ticks(self, most: int) -> list[float]:
        """Round values within the scale: 1, 2, 5 times a power of ten."""
        if self.log:
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [
                    digit * 10.0**power
                    for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                    for digit in digits
                    if self.low <= digit * 10.0**power <= self.high
                ]
                if len(ticks) <= most:
                    break
            if len(ticks) >= 2:
                return ticks[:: -(-len(ticks) // most)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(factor for factor in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * factor) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1) if not self.log or i]


def number(value: float) -> str:
    """A number for an axis: short, without rounding noise."""
    if abs(value) >= 1000:
        return f"{value / 1000:.6g}k" if abs(value) < 1e6 else f"{value / 1e6:.6g}M"
    return f"{value:.6g}"


def percent(value: float) -> str:
    """A share for an axis in %."""
    return f"{100 * value:.4g}"


def swatch(kind: str) -> str:
    """The mark and line of a kind, for a legend."""
    line = f'<path class="line {kind}" d="M1 7H27"/>{mark(kind, 14, 7, "")}'
    return f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{line}</svg>'


def standalone(chart: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A chart with its legend, (name, kind), as the text of an .svg file with the style sheet inside."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    rows = -(-len(legend) // 2)
    height = HEIGHT + 18 * rows + 8
    parts = [chart.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)]
    for i, (name, kind) in enumerate(legend):
        left, top = 12 + i % 2 * WIDTH // 2, HEIGHT + 18 * (i // 2)
        parts.append(swatch(kind).replace("<svg ", f'<svg x="{left}" y="{top}" ', 1))
        parts.append(f'<text x="{left + 34}" y="{top + 11}">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}" '
        f'height="{2 * height}"><style>{style}</style><rect class="paper" width="100%" height="100%"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def frame(label: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """A chart of these parts with `label`, the text alternative."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def axes(
    x: Scale, y: Scale, x_label: str, y_label: str, show_y: Callable, x_ticks, show_x: Callable = number, foot=BOTTOM
) -> str:
    """Grid, ticks and labels of both axes; the x axis is drawn at `foot`."""
    parts = []
    for tick in y.ticks(5):
        at = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(show_y(tick))}</text>')
    for tick in x_ticks:
        parts.append(f'<path class="tick" d="M{x(tick)} {foot}v4"/>')
        parts.append(f'<text class="middle" x="{x(tick)}" y="{foot + 16}">{escape(show_x(tick))}</text>')
    parts.append(f'<path class="tick" d="M{LEFT} {foot}H{RIGHT}"/>')
    parts.append(f'<text class="middle axis" x="{(LEFT + RIGHT) / 2}" y="{foot + 33}">{escape(x_label)}</text>')
    middle = (y.first + y.last) / 2
    parts.append(f'<text class="middle axis" transform="translate(11 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return "".join(parts)


def mark(kind: str, x: float, y: float, text: str, size: float = 3.2) -> str:
    """The shape of a kind: a square for the teacher, a diamond for the control, else a circle."""
    tip = f"<title>{escape(text)}</title>" if text else ""
    if kind == "teacher":
        side = 1.8 * size
        where = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"'
        return f'<rect class="mark {kind}" {where}>{tip}</rect>'
    if kind == "control":
        r = 1.35 * size
        path = f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l-{r:.1f} {r:.1f}l-{r:.1f} -{r:.1f}z"
        return f'<path class="mark {kind}" d="{path}">{tip}</path>'
    return f'<circle class="mark {kind}" cx="{x}" cy="{y}" r="{size}">{tip}</circle>'


def point_label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The name of a point where it covers no point and no other name; none if there is no such place."""
    wide = LETTER * len(text)
    beside = [("start", 9, 4), ("end", -9, 4)]
    over = [(anchor, dx, dy) for dy in (-10, 18, -23, 31) for anchor, dx in (("middle", 0), ("start", -4), ("end", 4))]
    for anchor, dx, dy in over[:6] + beside + over[6:]:
        left = x + dx - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        box = (left, y + dy - LINE + 3, left + wide, y + dy + 3)
        inside = box[0] >= LEFT and box[2] <= RIGHT + 8 and box[1] >= 0 and box[3] <= BOTTOM
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            taken.append(box)
            return f'<text class="{anchor} name" x="{x + dx:.1f}" y="{y + dy:.1f}">{escape(text)}</text>'
    return ""
