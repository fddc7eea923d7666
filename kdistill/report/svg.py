"""Charts as SVG inside of a page: no script, no network, colors from the page's style sheet. Standard library only.

Every chart is one `<svg role="img">` with a text alternative, drawn for a width of 360 pixels, a phone's: wider pages
set several side by side, and text keeps its size. A `kind` (teacher, control, student, a ...) is a class of the style
sheet, which gives it color and dash, so that both themes and readers who do not see colors are served.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 212  # of the plot's area
LETTER, LINE = 6.3, 13  # width of a letter and height of a line of 11 pixels, for labels that keep clear of others


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` of one name, drawn as its kind; a thin one stands behind, for the seeds after the first."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    thin: bool = False


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
                found = [
                    digit * 10.0**power
                    for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                    for digit in digits
                    if self.low <= digit * 10.0**power <= self.high
                ]
                if len(found) <= most:
                    break
            if len(found) >= 2:
                return found[:: -(-len(found) // most)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(factor for factor in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * factor) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1) if not self.log or i]


def number(value: float) -> str:
    """A number as an axis shows it: short, without noise of the last bit."""
    if abs(value) >= 1000:
        return f"{value / 1000:.6g}k" if abs(value) < 1e6 else f"{value / 1e6:.6g}M"
    return f"{value:.6g}"


def lines(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, show: Callable = number
) -> str:
    """Curves over whole numbers such as epochs; with `log` the y axis is logarithmic, and zeros stand at its foot."""
    series = [Series(s.name, s.kind, [p for p in s.points if math.isfinite(p[1])], s.thin) for s in series]
    values = [y for s in series for _, y in s.points if y > 0 or not log]
    if not values:
        return ""
    xs = [x for s in series for x, _ in s.points]
    low, high = min(values), max(values)
    if low != high:
        edge = (high / low) ** 0.05 if log else (high - low) / 20
        low, high = (low / edge, high * edge) if log else (low - edge, high + edge)
    x, y = Scale(min(xs), max(xs), LEFT + 6, RIGHT - 6), Scale(low, high, BOTTOM, TOP, log)
    parts = [_axes(x, y, x_label, y_label, show, [t for t in x.ticks(7) if t == int(t)])]
    for s in sorted(series, key=lambda s: not s.thin):
        points = [(x(a), y(max(b, low) if log else b)) for a, b in s.points]
        path = " ".join(f"{a},{b}" for a, b in points)
        thin = " thin" if s.thin else ""
        parts.append(f'<polyline class="line {s.kind}{thin}" points="{path}"/>')
        if not s.thin:
            parts += [
                _mark(s.kind, a, b, f"{s.name}, {v[0]}: {show(v[1])}")
                for (a, b), v in zip(points, s.points, strict=True)
            ]
    ends = ", ".join(f"{s.name} {show(s.points[-1][1])}" for s in series if s.points and not s.thin)
    return _svg(f"{title}. Last values: {ends}.", parts)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points, from left to right, that no other beats with as little cost (x) and as much accuracy."""
    best, found = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def scatter(
    title: str,
    points: Sequence[Series],
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[str, str, float]] = (),
    *,
    show_x: Callable = number,
    show_y: Callable = number,
) -> str:
    """Accuracy over cost, the cost's axis logarithmic, with the Pareto front as stairs.

    `points` are Series of one point each; `levels` are horizontal lines: (name, kind, y) of models without that cost.
    """
    places = [s.points[0] for s in points]
    if not places:
        return ""
    ys = [y for _, y in places] + [level for _, _, level in levels]
    reach = (max(ys) - min(ys)) * 0.14 or 0.01
    costs = [cost for cost, _ in places]
    x = Scale(min(costs) / 1.25, max(costs) * 1.25, LEFT, RIGHT, log=True)
    y = Scale(min(ys) - reach, max(ys) + reach, BOTTOM, TOP)
    parts = [_axes(x, y, x_label, y_label, show_y, x.ticks(6), show_x)]
    for name, kind, level in levels:
        parts.append(
            f'<path class="line {kind} level" d="M{LEFT} {y(level)}H{RIGHT}"><title>{escape(name)}: '
            f"{escape(show_y(level))}</title></path>"
        )
    best = front(places)
    stairs = f"M{x(places[best[0]][0])} {y(places[best[0]][1])}"
    for i in best[1:]:
        stairs += f"H{x(places[i][0])}V{y(places[i][1])}"
    parts.append(f'<path class="front" d="{stairs}H{RIGHT}"/>')
    pixels = [(x(a), y(b)) for a, b in places]
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in pixels]
    for s, (a, b) in zip(points, pixels, strict=True):
        parts.append(_mark(s.kind, a, b, f"{s.name}: {show_x(s.points[0][0])}, {show_y(s.points[0][1])}", 5))
        parts.append(_label(s.name, a, b, taken))
    told = "; ".join(f"{s.name} {show_x(s.points[0][0])}, {show_y(s.points[0][1])}" for s in points)
    names = ", ".join(points[i].name for i in best)
    told += "".join(f"; {name} {show_y(level)}" for name, _, level in levels)
    return _svg(f"{title}. {told}. Pareto front: {names}.", parts)


def reliability(title: str, kind: str, found: dict, ece: float | None) -> str:
    """Accuracy over confidence by bin with 95 % Wilson intervals, the diagonal, and how many images each bin holds."""
    x, y, foot = Scale(0, 1, LEFT, RIGHT), Scale(0, 1, BOTTOM - 44, TOP), BOTTOM
    most, count = max(found["count"]), len(found["count"])
    parts = [
        _axes(
            x, y, "confidence", "accuracy", lambda v: f"{v:.0%}", [0, 0.2, 0.4, 0.6, 0.8, 1], lambda v: f"{v:.0%}", foot
        ),
        f'<path class="diagonal" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>',
    ]
    for i, images in enumerate(found["count"]):
        if not images:
            continue
        share, sure = found["accuracy"][i], found["confidence"][i]
        tall = round(3 + 33 * math.log1p(images) / math.log1p(most), 1)
        left, wide = x(i / count), round(x(1 / count) - x(0) - 1, 1)
        parts.append(
            f'<rect class="bar {kind}" x="{left}" y="{foot - tall:.1f}" width="{wide}" height="{tall}">'
            f"<title>{images:,} images</title></rect>"
        )
        low, high = wilson(share, images)
        parts.append(f'<path class="whisker {kind}" d="M{x(sure)} {y(low)}V{y(high)}"/>')
        parts.append(_mark(kind, x(sure), y(share), f"confidence {sure:.1%}, accuracy {share:.1%}, {images:,} images"))
    total = sum(found["count"])
    told = f"{found['count'][-1] / total:.0%} of the images are in the bin of the highest confidence"
    return _svg(f"{title}. Expected calibration error {'not known' if ece is None else f'{ece:.2%}'}; {told}.", parts)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of so many (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def heatmap(title: str, kind: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Confusion: rows the true class, columns the named one. Shades are of mistakes; the diagonal is only counted."""
    classes, short = len(names), [name if len(name) <= 9 else f"{name[:8]}…" for name in names]
    left = 24 + max(8, LETTER * max(map(len, short)))
    side = (RIGHT + 4 - left) / classes
    top, upright = 6, LETTER * max(map(len, short)) > side
    foot = top + side * classes
    most = max((counts[i][j] for i in range(classes) for j in range(classes) if i != j), default=0) or 1
    parts = []
    for i in range(classes):
        middle = top + side * (i + 0.5)
        parts.append(f'<text class="end" x="{left - 5:.1f}" y="{middle + 4:.1f}">{escape(short[i])}</text>')
        across = left + side * (i + 0.5)
        turn = f' class="end" transform="rotate(-90 {across:.1f} {foot + 6:.1f})"' if upright else ' class="middle"'
        parts.append(f'<text x="{across:.1f}" y="{foot + (10 if upright else 14):.1f}"{turn}>{escape(short[i])}</text>')
        for j, value in enumerate(counts[i]):
            shade = 0 if i == j or not value else 0.12 + 0.5 * value / most
            cell = f'x="{left + side * j:.1f}" y="{top + side * i:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}"'
            same = " same" if i == j else ""
            told = f"<title>{escape(names[i])} named {escape(names[j])}: {value:,}</title>"
            parts.append(f'<rect class="cell {kind}{same}" style="fill-opacity:{shade:.2f}" {cell}>{told}</rect>')
            if value and classes <= 12:
                at = f'x="{left + side * (j + 0.5) - 0.5:.1f}" y="{middle + 3.5:.1f}"'
                parts.append(f'<text class="middle count{same}" {at}>{value}</text>')
    below = foot + (LETTER * max(map(len, short)) + 8 if upright else 18)
    parts.append(f'<text class="middle axis" x="{(left + RIGHT) / 2:.1f}" y="{below + 13:.1f}">named class</text>')
    parts.append(
        f'<text class="middle axis" transform="translate(11 {(top + foot) / 2:.1f}) rotate(-90)">true class</text>'
    )
    wrong = sum(map(sum, counts)) - sum(counts[i][i] for i in range(classes))
    pairs = "; ".join(f"{names[i]} named {names[j]} {n} times" for n, i, j in mistakes(counts)[:3])
    return _svg(f"{title}: {wrong:,} mistakes. {pairs or 'None'}.", parts, height=math.ceil(below + 20))


def mistakes(counts: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(count, true class, named class) of every mistake that was made, the most frequent first."""
    found = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    return sorted(found, key=lambda each: (-each[0], each[1:]))


def interval(title: str, verdict: dict) -> str:
    """The difference student minus control in points with its interval, a dot for every seed, and zero as a line."""
    differences = [100 * (s - c) for s, c in zip(verdict["student"], verdict["control"], strict=True)]
    low, high, mean = (100 * verdict[name] for name in ("low", "high", "difference"))
    reach = max(map(abs, [low, high, *differences])) * 1.15 or 1
    x, foot = Scale(-reach, reach, 16, WIDTH - 16), 62
    parts = [f'<path class="zero" d="M{x(0)} 8V{foot}"/><path class="tick" d="M16 {foot}H{WIDTH - 16}"/>']
    for tick in x.ticks(5):
        text = f"{tick:+.6g}".replace("-", "−") if abs(tick) > 1e-9 else "0"
        parts.append(
            f'<path class="tick" d="M{x(tick)} {foot}v4"/>'
            f'<text class="middle" x="{x(tick)}" y="{foot + 16}">{text}</text>'
        )
    parts.append(f'<path class="interval" d="M{x(low)} 26H{x(high)}M{x(low)} 20v12M{x(high)} 20v12"/>')
    parts.append(f'<circle class="mean" cx="{x(mean)}" cy="26" r="5.5"><title>mean {mean:+.2f}</title></circle>')
    if len(differences) > 1:
        parts += [
            f'<circle class="seed" cx="{x(d)}" cy="48" r="4"><title>{d:+.2f} points</title></circle>'
            for d in differences
        ]
    parts.append(f'<text class="axis" x="16" y="{foot + 34}">← control ahead</text>')
    parts.append(f'<text class="axis end" x="{WIDTH - 16}" y="{foot + 34}">student ahead →</text>')
    told = f"{title}: {mean:+.2f} points, {verdict['level']:.0%} interval {low:+.2f} to {high:+.2f}"
    return _svg(f"{told}, over {verdict['seeds']} seed(s).", parts, height=foot + 40)


def swatch(kind: str) -> str:
    """The mark and line of a kind, for a legend."""
    line = f'<path class="line {kind}" d="M1 7H27"/>{_mark(kind, 14, 7, "")}'
    return f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">{line}</svg>'


def _svg(label: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _axes(
    x: Scale, y: Scale, x_label: str, y_label: str, show_y: Callable, x_ticks, show_x: Callable = number, foot=BOTTOM
) -> str:
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


def _mark(kind: str, x: float, y: float, told: str, size: float = 3.2) -> str:
    """A kind's own shape: the teacher a square, the control a diamond, all others a circle."""
    tip = f"<title>{escape(told)}</title>" if told else ""
    if kind == "teacher":
        side = 1.8 * size
        where = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"'
        return f'<rect class="mark {kind}" {where}>{tip}</rect>'
    if kind == "control":
        r = 1.35 * size
        path = f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l-{r:.1f} {r:.1f}l-{r:.1f} -{r:.1f}z"
        return f'<path class="mark {kind}" d="{path}">{tip}</path>'
    return f'<circle class="mark {kind}" cx="{x}" cy="{y}" r="{size}">{tip}</circle>'


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The name of a point, where it covers no point and no other name; if that is nowhere, its tip has to do."""
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
