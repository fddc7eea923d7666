"""Charts as SVG inside a page: no script, no network, colors from the page's style sheet. Standard library only.

Every chart is one `<svg role="img">` with a text alternative, 360 pixels wide (a phone): wider pages set several side
by side, and text keeps its size. A `kind` (teacher, control, student, a ...) is a class of the style sheet, which sets
color and dash, so both themes and color-blind readers are served.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from kdistill.report.svg_parts import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axes,
    frame,
    mark,
    number,
    point_label,
)

KINDS = "abcdef"  # of things without an order, such as runs
RAMP = 12  # kinds r0 to r11: colors of things with an order, such as values of a setting


@dataclass(frozen=True)
class Series:
    """A curve: points `(x, y)`, a name and a kind.

    A `thin` curve is drawn behind the others (the seeds after the first). `spread` is the band around it: the lowest
    and the highest value at each point.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    thin: bool = False
    spread: Sequence[tuple[float, float]] = ()


Level = tuple[str, str, float]  # name, kind and y of a horizontal line


def ramp(count: int) -> list[str]:
    """The kinds of `count` series that have an order, from the first color of the ramp to the last."""
    return [f"r{round(i * (RAMP - 1) / max(1, count - 1))}" for i in range(count)]


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    levels: Sequence[Level] = (),
    log: bool = False,
    log_x: bool = False,
    names: Sequence[str] = (),
    show: Callable = number,
    marks: bool = True,
) -> str:
    """Curves over epochs, steps or the values of a setting.

    Args:
        levels: horizontal lines.
        log, log_x: logarithmic axes; on a logarithmic y axis zeros are drawn at its foot.
        names: labels of the x values 0, 1, 2 ... if these are categories.
        show: the text of a y value.
        marks: draw and label every point; without it a curve has only its name.
    """
    series = [_finite(s) for s in series]
    values = [y for s in series for _, y in s.points if y > 0 or not log]
    if not values:
        return ""
    values += [value for s in series for pair in s.spread for value in pair] + [value for _, _, value in levels]
    xs = [x for s in series for x, _ in s.points]
    low, high = min(values), max(values)
    if low != high:
        edge = (high / low) ** 0.05 if log else (high - low) / 20
        low, high = (low / edge, high * edge) if log else (low - edge, high + edge)
    x_range = (0, len(names) - 1) if names else (min(xs), max(xs))
    x, y = Scale(*x_range, LEFT + 6, RIGHT - 6, log_x), Scale(low, high, BOTTOM, TOP, log)
    whole = all(value == int(value) for value in xs)
    ticks = list(range(len(names))) if names else [t for t in x.ticks(7) if t == int(t) or not whole]
    show_x = (lambda tick: names[tick]) if names else number
    parts = [axes(x, y, x_label, y_label, show, ticks, show_x), *(_level(level, y, show) for level in levels)]
    parts += [_band(s, x, y) for s in series if s.spread]
    for s in sorted(series, key=lambda s: not s.thin):
        parts.append(_curve(s, x, y, low if log else -math.inf, show, show_x if names else number, marks))
    ends = ", ".join(f"{s.name} {show(s.points[-1][1])}" for s in series if s.points and not s.thin)
    ends += "".join(f"; {name} {show(value)}" for name, _, value in levels)
    return frame(f"{title}. Last values: {ends}.", parts)


def _finite(series: Series) -> Series:
    """The series without points that are NaN or infinite."""
    keep = [i for i, (_, y) in enumerate(series.points) if math.isfinite(y)]
    spread = [series.spread[i] for i in keep] if series.spread else ()
    return Series(series.name, series.kind, [series.points[i] for i in keep], series.thin, spread)


def _curve(s: Series, x: Scale, y: Scale, foot: float, show: Callable, show_x: Callable, marks: bool) -> str:
    pixels = [(x(a), y(max(b, foot))) for a, b in s.points]
    path = " ".join(f"{a},{b}" for a, b in pixels)
    style = f"line {s.kind}" + (" thin" if s.thin else "" if marks else " fine")
    if not marks:
        return f'<polyline class="{style}" points="{path}"><title>{escape(s.name)}</title></polyline>'
    line = f'<polyline class="{style}" points="{path}"/>'
    if s.thin:
        return line
    texts = [f"{s.name}, {show_x(a)}: {show(b)}" for a, b in s.points]
    return line + "".join(mark(s.kind, a, b, text) for (a, b), text in zip(pixels, texts, strict=True))


def _band(s: Series, x: Scale, y: Scale) -> str:
    """The area between the lowest and the highest value at each point."""
    below = [f"{x(a)},{y(low)}" for (a, _), (low, _) in zip(s.points, s.spread, strict=True)]
    above = [f"{x(a)},{y(high)}" for (a, _), (_, high) in zip(s.points, s.spread, strict=True)]
    return f'<polygon class="band {s.kind}" points="{" ".join(below + above[::-1])}"/>'


def _level(level: Level, y: Scale, show: Callable) -> str:
    name, kind, value = level
    tip = f"<title>{escape(name)}: {escape(show(value))}</title>"
    return f'<path class="line {kind} level" d="M{LEFT} {y(value)}H{RIGHT}">{tip}</path>'


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: indices, from left to right, of the points that beat every point of lower or equal cost (x)."""
    best, indices = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            indices.append(i)
    return indices


def scatter(
    title: str,
    points: Sequence[Series],
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    *,
    show_x: Callable = number,
    show_y: Callable = number,
) -> str:
    """Accuracy over cost on a logarithmic axis, with the Pareto front as stairs.

    `points` are series of one point each; `levels` are models without that cost.
    """
    places = [s.points[0] for s in points]
    if not places:
        return ""
    ys = [y for _, y in places] + [level for _, _, level in levels]
    reach = (max(ys) - min(ys)) * 0.14 or 0.01
    costs = [cost for cost, _ in places]
    x = Scale(min(costs) / 1.25, max(costs) * 1.25, LEFT, RIGHT, log=True)
    y = Scale(min(ys) - reach, max(ys) + reach, BOTTOM, TOP)
    parts = [axes(x, y, x_label, y_label, show_y, x.ticks(6), show_x)]
    parts += [_level(level, y, show_y) for level in levels]
    best = front(places)
    stairs = f"M{x(places[best[0]][0])} {y(places[best[0]][1])}"
    for i in best[1:]:
        stairs += f"H{x(places[i][0])}V{y(places[i][1])}"
    parts.append(f'<path class="front" d="{stairs}H{RIGHT}"/>')
    pixels = [(x(a), y(b)) for a, b in places]
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in pixels]
    for s, (a, b) in zip(points, pixels, strict=True):
        parts.append(mark(s.kind, a, b, f"{s.name}: {show_x(s.points[0][0])}, {show_y(s.points[0][1])}", 5))
        parts.append(point_label(s.name, a, b, taken))
    text = "; ".join(f"{s.name} {show_x(s.points[0][0])}, {show_y(s.points[0][1])}" for s in points)
    text += "".join(f"; {name} {show_y(level)}" for name, _, level in levels)
    names = ", ".join(points[i].name for i in best)
    return frame(f"{title}. {text}. Pareto front: {names}.", parts)


def reliability(title: str, kind: str, bins: dict, ece: float | None) -> str:
    """Accuracy over confidence by bin, with 95 % Wilson intervals, the diagonal, and the number of images in each bin.

    `bins`: lists `confidence`, `accuracy` and `count`, as in a report's `reliability`.
    """
    x, y, foot = Scale(0, 1, LEFT, RIGHT), Scale(0, 1, BOTTOM - 44, TOP), BOTTOM
    most, number_of_bins = max(bins["count"]), len(bins["count"])
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = [
        axes(x, y, "confidence", "accuracy", "{:.0%}".format, ticks, "{:.0%}".format, foot),
        f'<path class="diagonal" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>',
    ]
    for i, images in enumerate(bins["count"]):
        if not images:
            continue
        accuracy, confidence = bins["accuracy"][i], bins["confidence"][i]
        tall = round(3 + 33 * math.log1p(images) / math.log1p(most), 1)
        left, wide = x(i / number_of_bins), round(x(1 / number_of_bins) - x(0) - 1, 1)
        parts.append(
            f'<rect class="bar {kind}" x="{left}" y="{foot - tall:.1f}" width="{wide}" height="{tall}">'
            f"<title>{images:,} images</title></rect>"
        )
        low, high = wilson(accuracy, images)
        parts.append(f'<path class="whisker {kind}" d="M{x(confidence)} {y(low)}V{y(high)}"/>')
        text = f"confidence {confidence:.1%}, accuracy {accuracy:.1%}, {images:,} images"
        parts.append(mark(kind, x(confidence), y(accuracy), text))
    last = bins["count"][-1] / sum(bins["count"])
    error = "unknown" if ece is None else f"{ece:.2%}"
    text = f"Expected calibration error {error}; {last:.0%} of the images are in the bin of the highest confidence"
    return frame(f"{title}. {text}.", parts)


def predictions(title: str, series: Series) -> str:
    """What a model gives over the label, a dot for each example, and the diagonal."""
    if not series.points:
        return ""
    numbers = [number for point in series.points for number in point]
    low, high = min(numbers), max(numbers)
    x, y = Scale(low, high, LEFT, RIGHT), Scale(low, high, BOTTOM, TOP)
    parts = [
        axes(x, y, "label", series.name, number, x.ticks(5)),
        f'<path class="diagonal" d="M{x(x.low)} {y(y.low)}L{x(x.high)} {y(y.high)}"/>',
    ]
    parts += [mark(series.kind, x(label), y(value), "", 2) for label, value in series.points]
    return frame(f"{title}: {len(series.points)} examples from {number(low)} to {number(high)}.", parts)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def heatmap(title: str, kind: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Confusion: rows the true class, columns the predicted class. Only mistakes are shaded."""
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
            tip = f"<title>{escape(names[i])} predicted as {escape(names[j])}: {value:,}</title>"
            parts.append(f'<rect class="cell {kind}{same}" style="fill-opacity:{shade:.2f}" {cell}>{tip}</rect>')
            if value and classes <= 12:
                at = f'x="{left + side * (j + 0.5) - 0.5:.1f}" y="{middle + 3.5:.1f}"'
                parts.append(f'<text class="middle count{same}" {at}>{value}</text>')
    below = foot + (LETTER * max(map(len, short)) + 8 if upright else 18)
    parts.append(f'<text class="middle axis" x="{(left + RIGHT) / 2:.1f}" y="{below + 13:.1f}">predicted class</text>')
    parts.append(
        f'<text class="middle axis" transform="translate(11 {(top + foot) / 2:.1f}) rotate(-90)">true class</text>'
    )
    wrong = sum(map(sum, counts)) - sum(counts[i][i] for i in range(classes))
    pairs = "; ".join(f"{names[i]} predicted as {names[j]} {n} times" for n, i, j in mistakes(counts)[:3])
    return frame(f"{title}: {wrong:,} mistakes. {pairs or 'None'}.", parts, height=math.ceil(below + 20))


def mistakes(counts: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(count, true class, predicted class) of every kind of mistake, the most frequent first."""
    cells = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    return sorted(cells, key=lambda cell: (-cell[0], cell[1:]))


def interval(title: str, verdict: dict) -> str:
    """The difference student minus control with its interval, a dot for every seed, and zero as a line.

    In points, of another metric than accuracy in its own unit; of errors, less is to the right.
    """
    metric = verdict.get("metric")
    unit, factor, show = (metric, 1, "{:+.3g}") if metric else ("points", 100, "{:+.2f}")
    differences = [factor * (s - c) for s, c in zip(verdict["student"], verdict["control"], strict=True)]
    low, high, mean = (factor * verdict[name] for name in ("low", "high", "difference"))
    reach = max(map(abs, [low, high, *differences])) * 1.15 or 1
    x, foot = Scale(-reach, reach, 16, WIDTH - 16), 62
    if metric:
        x = Scale(-reach, reach, WIDTH - 16, 16)
    parts = [f'<path class="zero" d="M{x(0)} 8V{foot}"/><path class="tick" d="M16 {foot}H{WIDTH - 16}"/>']
    for tick in x.ticks(5):
        text = f"{tick:+.6g}".replace("-", "−") if abs(tick) > 1e-9 else "0"
        parts.append(
            f'<path class="tick" d="M{x(tick)} {foot}v4"/>'
            f'<text class="middle" x="{x(tick)}" y="{foot + 16}">{text}</text>'
        )
    parts.append(f'<path class="interval" d="M{x(low)} 26H{x(high)}M{x(low)} 20v12M{x(high)} 20v12"/>')
    tip = f"<title>mean {show.format(mean)}</title>"
    parts.append(f'<circle class="mean" cx="{x(mean)}" cy="26" r="5.5">{tip}</circle>')
    if len(differences) > 1:
        parts += [
            f'<circle class="seed" cx="{x(d)}" cy="48" r="4"><title>{show.format(d)} {unit}</title></circle>'
            for d in differences
        ]
    parts.append(f'<text class="axis" x="16" y="{foot + 34}">← control ahead</text>')
    parts.append(f'<text class="axis end" x="{WIDTH - 16}" y="{foot + 34}">student ahead →</text>')
    mean, low, high = (show.format(value) for value in (mean, low, high))
    text = f"{title}: {mean} {unit}, {verdict['level']:.0%} interval {low} to {high}"
    return frame(f"{text}, over {verdict['seeds']} seed(s).", parts, height=foot + 40)
