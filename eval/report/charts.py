"""Small charts as SVG text, drawn by hand: they are crisp, light and need no script.

All take plain numbers and return one `<svg>` element with a title for screen readers.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

INK, MUTED, GRID = "#1c2430", "#5b6675", "#dde3ea"
BLUE, ORANGE, GREEN, PURPLE = "#2563a8", "#c2570c", "#1a7f4b", "#7a3fa0"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)
MAX_POINTS = 240


def funnel_chart(funnel: Mapping[str, Any]) -> str:
    """Records left after each step as centred bars, what was lost named beside each."""
    steps = [("crawled", funnel["records"], "")]
    for step in funnel["steps"]:
        lost = step["before"] - step["kept"]
        steps.append((step["step"], step["kept"], f"\N{MINUS SIGN}{lost:,}"))
    steps += [(f"{name} shards", count, "") for name, count in funnel["shards"].items()]
    row, bar, width, left, middle = 46, 30, 720, 130, 380
    largest = max(count for _, count, _ in steps) or 1
    parts = []
    for index, (name, count, lost) in enumerate(steps):
        y, length = index * row + 4, 440 * count / largest
        colour = GREEN if "shards" in name else BLUE
        parts.append(
            f'<text x="{left - 10}" y="{y + 20}" text-anchor="end" fill="{INK}">'
            f"{escape(name)}</text>"
            f'<rect x="{middle - length / 2:.1f}" y="{y}" width="{max(length, 1):.1f}" '
            f'height="{bar}" rx="3" fill="{colour}"/>'
        )
        is_wide = length > 110
        x, fill = (middle, "#ffffff") if is_wide else (middle + length / 2 + 34, INK)
        parts.append(
            f'<text x="{x:.1f}" y="{y + 20}" text-anchor="middle" fill="{fill}">{count:,}</text>'
        )
        if lost:
            parts.append(
                f'<text x="{width - 4}" y="{y + 20}" text-anchor="end" fill="{MUTED}">{lost}</text>'
            )
    return _svg(width, len(steps) * row, "Records left after each step", parts)


def loss_chart(
    stage: str,
    curve: Mapping[str, Sequence[tuple[float, float]]],
    guesses: Mapping[str, float] | None = None,
    changes: Sequence[tuple[float, str]] = (),
) -> str:
    """Loss terms over steps.

    Args:
        stage: for the title.
        curve: term -> (step, value).
        guesses: what guessing costs, in words -> its loss, each a dashed line.
        changes: steps from which something else is trained on, with what; each an upright line.
    """
    guesses = guesses or {}
    width, height, left, bottom, top, right = 420, 240, 48, 34, 14, 12
    smooth = {name: smoothed(points) for name, points in curve.items()}
    values = [v for points in smooth.values() for _, v in points] + list(guesses.values())
    last = max(step for points in smooth.values() for step, _ in points) or 1
    low, high, ticks = axis(min(0.0, *values), max(values))

    def place(step: float, value: float) -> str:
        x = left + (width - left - right) * step / last
        y = top + (height - top - bottom) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks:
        y = place(0, tick).split(",")[1]
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="{GRID}"/>'
            f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end" '
            f'fill="{MUTED}">{tick:g}</text>'
        )
    for step in (0, last / 2, last):
        anchor = {0: "start", last: "end"}.get(step, "middle")
        x = place(step, low).split(",")[0]
        parts.append(
            f'<text x="{x}" y="{height - bottom + 16}" text-anchor="{anchor}" '
            f'fill="{MUTED}">{step:,.0f}</text>'
        )
    for step, what in changes:
        x = place(min(step, last), low).split(",")[0]
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}" stroke="{ORANGE}" '
            'stroke-dasharray="2 3"/>'
            f'<text x="{float(x) - 5:.1f}" y="{top + 10}" text-anchor="end" fill="{ORANGE}">'
            f"{escape(what)}</text>"
        )
    for colour, (name, points) in zip(SERIES * 3, smooth.items(), strict=False):
        path = " ".join(place(step, value) for step, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8">'
            f"<title>{escape(name)}</title></polyline>"
        )
    for words, loss in guesses.items():
        start, end = place(0, loss).split(","), place(last, loss).split(",")
        parts.append(
            f'<line x1="{start[0]}" x2="{end[0]}" y1="{start[1]}" y2="{end[1]}" '
            f'stroke="{MUTED}" stroke-dasharray="4 4"/>'
            f'<text x="{end[0]}" y="{float(end[1]) - 5:.1f}" text-anchor="end" fill="{MUTED}" '
            'stroke="#fff" stroke-width="3" paint-order="stroke">'
            f"guessing, {escape(words)} = {loss:.2f}</text>"
        )
    if len(smooth) > 1:
        for index, (colour, name) in enumerate(zip(SERIES * 3, smooth, strict=False)):
            y = top + (34 if guesses or changes else 14) + 16 * index
            parts.append(
                f'<rect x="{width - 110}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
                f'<text x="{width - 95}" y="{y}" fill="{INK}">{escape(name)}</text>'
            )
    return _svg(width, height, f"Training loss of {stage} by step", parts)


def interval_chart(score: Mapping[str, Any], full: float) -> str:
    """One score on a line from 0 to `full`: interval, chance, untrained control, reference,
    baseline."""
    width, height, pad = 260, 22, 6

    def x(value: float) -> float:
        return pad + (width - 2 * pad) * min(value, full) / full

    low, high = score["interval"]
    marks = [
        f'<line x1="{pad}" x2="{width - pad}" y1="11" y2="11" stroke="{GRID}" stroke-width="6" '
        'stroke-linecap="round"/>',
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11" stroke="{BLUE}" '
        'stroke-width="6" stroke-opacity=".35"/>',
    ]
    if score["chance"] is not None:
        marks.append(_tick(x(score["chance"]), MUTED, "4 3"))
    if score["untrained"] is not None:
        at = x(score["untrained"])
        marks.append(f'<circle cx="{at:.1f}" cy="11" r="3.6" fill="#fff" stroke="{INK}"/>')
    if score["reference"] is not None:
        at = x(score["reference"])
        marks.append(f'<path d="M{at:.1f} 4l5 7-5 7-5-7z" fill="{ORANGE}" fill-opacity=".9"/>')
    if score.get("baseline") is not None:
        marks.append(_tick(x(score["baseline"]), GREEN, "none"))
    marks.append(f'<circle cx="{x(score["value"]):.1f}" cy="11" r="5" fill="{BLUE}"/>')
    label = f"{score['value']:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    return _svg(width, height, label, marks)


def picture_with_boxes(data_uri: str, truth: Sequence[float], box: Sequence[float]) -> str:
    """A scene with the true box (green, dashed) and the predicted one (orange)."""
    parts = [f'<image href="{data_uri}" width="100" height="100" class="crisp"/>']
    for corners, colour, dash in ((truth, "#0a7d40", "5 3"), (box, "#ff7a00", "")):
        if len(corners) == 4:
            x1, y1, x2, y2 = (value / 10 for value in corners)
            parts.append(
                f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
                f'fill="none" stroke="#fff" stroke-width="3.6" stroke-opacity=".7"/>'
                f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
                f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            )
    return _svg(100, 100, "A scene with its true box and the predicted box", parts)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its stretch; the first point stays as it is."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / MAX_POINTS)
    stretches = [points[i : i + size] for i in range(1, len(points), size)]
    means = [
        (sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part))
        for part in stretches
    ]
    return [points[0], *means]


def axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ends of an axis and its ticks."""
    span = max(high - low, 1e-9)
    unit = 10 ** math.floor(math.log10(span))
    step = next(unit * f for f in (0.2, 0.5, 1.0, 2.0) if span / (unit * f) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _tick(x: float, colour: str, dash: str) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="20" stroke="{colour}" stroke-width="1.6" '
        f'stroke-dasharray="{dash}"/>'
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    label = escape(title, quote=True)
    body = "".join(parts)
    return f'<svg {size} role="img" aria-label="{label}"><title>{label}</title>{body}</svg>'
