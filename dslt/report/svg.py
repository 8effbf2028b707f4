"""Panels as SVG that takes its colours and its font from the page around it, or from its file.

May import matplotlib and numpy. A panel is drawn in placeholder colours; then each becomes a CSS
variable, so that light and dark need one picture.

    svg = line_panel([Line(0, [0.1, 1.0], [0.5, 0.7])], x_label="share of the data")
    text = sheet("Accuracy", legend=[("fine-tuning", swatch)], panels=[("facts", svg)])
"""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from xml.sax.saxutils import escape

import numpy as np

NUM_STYLES = 8  # colours of the style sheet: --line-0 to --line-7
_MARKERS = "os^DvPX*"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
# Placeholders, which nothing else in a picture uses.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_LINES = tuple(f"#0501{i:02x}" for i in range(NUM_STYLES))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule", _PAPER: "--paper"} | {
    colour: f"--line-{i}" for i, colour in enumerate(_LINES)
}
_PANEL_INCHES = (4.6, 3.1)
_POINTS = 72  # an inch
# Of a sheet, in points: a swatch, a line of text, a margin, and about what a letter takes.
_SWATCH, _LINE, _MARGIN, _LETTER = (30, 12), 18, 14, 6.2


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
      style: its number among the report's lines, which is its colour, marker and dash everywhere.
      x, y: its points.
      errors: half the error bars' length, 0 where there is none.
      points: single values (x, y) beside the means.
    """

    style: int
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    points: Sequence[tuple[float, float]] = ()


def line_panel(
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    x_ticks: Mapping[float, str] | None = None,
    log_x: bool = False,
    levels: Mapping[str, float] | None = None,
    thin: bool = False,
) -> str:
    """One panel as an `<svg>` element without size of its own.

    Args:
      name: of the panel, unique on its page: the ids inside begin with it.
      x_ticks: where ticks stand and how they read; otherwise as matplotlib likes.
      levels: horizontal lines by what is written on them.
      thin: many runs in one panel: thin lines without markers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text: the page's font, found by search
        "svg.hashsalt": name,  # the same runs give the same bytes
        "text.parse_math": False,  # a model's name may hold dollar signs
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_PANEL_INCHES)
        # Fixed margins: neighbours align, and a layout engine would take a third of the time.
        bottom = 0.26 if any("\n" in text for text in (x_ticks or {}).values()) else 0.18
        axes = figure.add_axes((0.12, bottom, 0.86, 0.98 - bottom))
        _draw(axes, lines, levels or {}, log_x, thin)
        axes.set_xlabel(x_label)
        if x_ticks:
            axes.set_xticks(list(x_ticks), list(x_ticks.values()))
            axes.minorticks_off()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _to_inline(file.getvalue(), name)


def _draw(
    axes, lines: Sequence[Line], levels: Mapping[str, float], log_x: bool, thin: bool
) -> None:
    if log_x:
        axes.set_xscale("log")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, axis="y")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for line in lines:
        look = {"color": _LINES[line.style % NUM_STYLES], "linestyle": _dash(line.style)}
        if thin:
            axes.plot(line.x, line.y, linewidth=1.2, **look)
            continue
        if line.points:
            x, y = zip(*line.points, strict=True)
            axes.scatter(x, y, s=9, color=look["color"], alpha=0.45, linewidths=0)
        axes.errorbar(
            line.x, line.y, yerr=line.errors if any(line.errors) else None,
            linewidth=1.8, elinewidth=1.4, capsize=0, marker=_MARKERS[line.style % len(_MARKERS)],
            markersize=6, markeredgecolor=_PAPER, markeredgewidth=0.8, **look,
        )  # fmt: skip
    for text, level in levels.items():
        axes.axhline(level, color=_INK, linewidth=1.1, linestyle=(0, (2, 2)))
        axes.annotate(
            text, (0, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="left", va="bottom", fontsize=9,
        )  # fmt: skip
    axes.margins(x=0.04, y=0.08)


def _dash(style: int):
    return _DASHES[style // NUM_STYLES % len(_DASHES)]


def marked_swatch(style: int, name: str) -> str:
    """An `<svg>` of a line's colour, dash and marker, for a legend; `name` as in `line_panel`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(0.42, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.plot(
            [0, 1, 2], [0, 0, 0], color=_LINES[style % NUM_STYLES], linestyle=_dash(style),
            linewidth=1.8, marker=_MARKERS[style % len(_MARKERS)], markevery=[1], markersize=6,
            markeredgecolor=_PAPER, markeredgewidth=0.8,
        )  # fmt: skip
        figure.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _to_inline(file.getvalue(), name)


def plain_swatch(style: int) -> str:
    """Likewise without a marker, for thin lines."""
    dash = _dash(style)
    lengths = "" if dash == "-" else " ".join(f"{1.8 * part:g}" for part in dash[1])
    return (
        '<svg aria-hidden="true" viewBox="0 0 30 12"><path d="M0 6H30" fill="none" '
        f'style="stroke: var(--line-{style % NUM_STYLES}); stroke-width: 1.8; '
        f'stroke-dasharray: {lengths or "none"}"/></svg>'
    )


def _to_inline(svg: str, name: str) -> str:
    """From a file of its own to an element among others: no header, no size, ids with a prefix."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # it would hold for the whole page
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def thin_out(
    x: Sequence[float], y: Sequence[float], most: int = 120
) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over neighbours."""
    parts = min(most, len(x))
    mean = [
        [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), parts)]
        for values in (x, y)
    ]
    return np.array(mean[0]), np.array(mean[1])


def sheet(title: str, legend: Sequence[tuple[str, str]], panels: Sequence[tuple[str, str]]) -> str:
    """An SVG file of its own, two panels a row, light or dark as its reader has it.

    Args:
      legend: what a line is called, and its swatch.
      panels: titles and panels.
    """
    width, height = (_POINTS * inches for inches in _PANEL_INCHES)
    columns = min(2, len(panels))
    full_width = columns * (width + _MARGIN) + _MARGIN
    parts, x, y = [_text(title, _MARGIN, _LINE, weight=600)], _MARGIN, 2.0 * _LINE
    for name, swatch in legend:
        taken = _SWATCH[0] + 6 + _LETTER * len(name)
        if x > _MARGIN and x + taken > full_width:
            x, y = _MARGIN, y + _LINE
        parts += [_placed(swatch, x, y - 10, *_SWATCH), _text(name, x + _SWATCH[0] + 6, y)]
        x += taken + _MARGIN
    for number, (name, panel) in enumerate(panels):
        x = _MARGIN + number % columns * (width + _MARGIN)
        if number % columns == 0:
            top, y = y + _MARGIN, y + _MARGIN + _LINE + height + _MARGIN
        parts += [_text(name, x, top + _LINE - 4, weight=600)]
        parts += [_placed(panel, x, top + _LINE, width, height)]
    font = "svg { background: var(--paper) } text { font-family: system-ui, sans-serif }"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {full_width:g} {y:g}" width="{full_width:g}" height="{y:g}">'
        f"<title>{escape(title)}</title><style>{palette()}{font}</style>{''.join(parts)}</svg>\n"
    )


def palette() -> str:
    """The CSS variables that pictures are drawn in, light and dark."""
    return (files("dslt.report") / "templates" / "palette.css").read_text(encoding="utf-8")


def _text(text: str, x: float, y: float, weight: int = 400) -> str:
    style = f"fill: var(--ink); font-size: 12px; font-weight: {weight}"
    return f'<text x="{x:g}" y="{y:g}" style="{style}">{escape(text)}</text>'


def _placed(svg: str, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return svg.replace("<svg ", f"<svg {place} ", 1)
