"""Measurements as one page of plots: speed and memory over the sequence length."""

import html
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

Row = Dict[str, Any]
Curve = List[Tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 260, 56, 30, 24
COLOURS = ("#c2410c", "#2563eb", "#15803d", "#7c3aed", "#64748b", "#0891b2", "#be185d", "#a16207")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 980px; color: #1e293b }
svg { font: 12px system-ui, sans-serif; fill: #475569 } figure { display: inline-block; margin: 0 8px 24px 0 }
figcaption { font-weight: 600 } span { margin-right: 1.2em; white-space: nowrap } b { font-size: 1.4em }"""


def write(path: str, rows: Sequence[Row], about: str) -> None:
    """Writes the page."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    groups = dict.fromkeys((row["direction"], row["headdim"], row["causal"]) for row in rows)
    figures = []
    for direction, headdim, causal in groups:
        group = [
            row for row in rows if (row["direction"], row["headdim"], row["causal"]) == (direction, headdim, causal)
        ]
        title = f"{direction}, headdim {headdim}{', causal' if causal else ''}"
        for what, unit in (("tflops", "TFLOP/s"), ("megabytes", "MB beyond the inputs")):
            curves = {name: _curve(group, name, what) for name in names}
            if any(curves.values()):
                figures.append(_figure(f"{title}: {unit}", curves, colours))
    legend = "".join(f'<span><b style="color:{colours[name]}">●</b> {html.escape(name)}</span>' for name in names)
    with open(path, "w", encoding="utf-8") as page:
        page.write(
            f'<!doctype html><meta charset="utf-8"><title>ferroflash bench</title><style>{STYLE}</style>'
            f"<h1>Attention, measured</h1><p>{html.escape(about)}</p><p>{legend}</p>{''.join(figures)}"
        )


def _curve(rows: Sequence[Row], name: str, what: str) -> Curve:
    return [(row["seqlen"], row[what]) for row in rows if row["name"] == name and row[what] is not None]


def _figure(title: str, curves: Dict[str, Curve], colours: Dict[str, str]) -> str:
    points = [point for curve in curves.values() for point in curve]
    seqlens = sorted({x for x, _ in points})
    top = _round_up(max(y for _, y in points))
    low, high = math.log2(seqlens[0]), math.log2(seqlens[-1])

    def place(x: float, y: float) -> Tuple[float, float]:
        part = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + part * (WIDTH - LEFT - 16), HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)

    parts = []
    for i in range(5):
        y = place(seqlens[0], top * i / 4)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 4:g}</text>')
    for x in seqlens:
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_length(x)}</text>')
    for name, curve in curves.items():
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        width = 3 if name == "ferroflash" else 1.5
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="{width}"/>')
        for x, y in (place(*point) for point in curve):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width}" fill="{colours[name]}"/>')
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure>{caption}<svg width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg></figure>'


def _round_up(x: float) -> float:
    """The next of 1, 2, 4, 8, 10 times a power of ten."""
    power: float = 10 ** math.floor(math.log10(x)) if x > 0 else 1
    return power * next((step for step in (1, 2, 4, 8, 10) if step * power >= x), 10)


def _length(x: Optional[float]) -> str:
    return f"{x / 1024:g}k" if x and x >= 1024 else f"{x:g}"
