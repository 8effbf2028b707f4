"""Which figures a report has. How a panel is drawn is in svg.py."""

import dataclasses
from collections.abc import Mapping, Sequence

from dslt.report.compare import Group, grouped
from dslt.report.runs import Run
from dslt.report.svg import Line, line_panel, marked_swatch, plain_swatch, sheet, thin_out
from dslt.report.tables import mean_text, percent, share_text

# Of metrics.jsonl or evaluations.jsonl: the key, what stands at the axis, and its factor.
_CURVES = (
    ("metrics", "label_loss", "label loss, nats a token", 1),
    ("metrics", "rationale_loss", "rationale loss, nats a token", 1),
    ("metrics", "label_accuracy", "label tokens right in training, %", 100),
    ("evaluations", "validation/accuracy", "validation accuracy, %", 100),
    ("metrics", "examples_per_sec", "examples a second", 1),
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture: its title, what it shows in words, and its SVG."""

    title: str
    description: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels that share a legend of (line, swatch)."""

    title: str
    legend: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]


def to_svg(figure: Figure) -> str:
    """A file of its own, for a paper or a README."""
    panels = [(panel.title, panel.svg) for panel in figure.panels]
    return sheet(figure.title, figure.legend, panels)


def data_figure(groups: Sequence[Group], styles: Mapping[str, int]) -> Figure | None:
    """Accuracy against the share of the data: a panel a dataset and model."""
    panels = []
    for (dataset, model), block in grouped(groups, lambda g: (g.dataset, g.model)).items():
        ticks = {g.fraction: share_text(g.fraction) for g in block}
        if len(ticks) > 1:
            lines = grouped(block, lambda g: g.line)
            panels.append(_accuracy_panel(
                f"{dataset}, {model}", f"data-{len(panels)}", lines, styles,
                x=lambda g: g.fraction, ticks=ticks, x_label="share of the training data",
            ))  # fmt: skip
    return _figure("data", "Test accuracy in %, by share of the data", panels, groups, styles)


def model_figure(groups: Sequence[Group], styles: Mapping[str, int]) -> Figure | None:
    """Accuracy against the model's size: a panel a dataset and fraction."""
    panels = []
    sized = [g for g in groups if g.num_params]
    by_setting = grouped(sized, lambda g: (g.dataset, g.fraction))
    for (dataset, fraction), block in sorted(by_setting.items()):
        ticks = {g.num_params: f"{g.model}\n{count_text(g.num_params)}" for g in block}
        if len(ticks) > 1:
            lines = grouped(sorted(block, key=lambda g: g.num_params), lambda g: g.line)
            panels.append(_accuracy_panel(
                f"{dataset}, {share_text(fraction)} of the data", f"model-{len(panels)}", lines,
                styles, x=lambda g: g.num_params, ticks=ticks, x_label="parameters",
            ))  # fmt: skip
    return _figure("model", "Test accuracy in %, by size of the model", panels, groups, styles)


def curve_figures(
    runs: Sequence[Run], lines: Mapping[str, str], styles: Mapping[str, int]
) -> list[Figure]:
    """Learning curves, a thin line a run: a figure a dataset, model and fraction."""
    figures = []
    in_order = sorted(
        runs, key=lambda run: (run.datasets, run.num_params or 0, run.settings["fraction"])
    )
    by_setting = grouped(
        in_order, lambda run: (run.datasets, run.settings["model"], run.settings["fraction"])
    )
    for number, ((dataset, model, fraction), members) in enumerate(by_setting.items()):
        panels = [
            _curve_panel(members, lines, styles, curve, f"curve-{number}-{i}")
            for i, curve in enumerate(_CURVES)
        ]
        names = dict.fromkeys(lines[run.name] for run in members)
        legend = tuple((name, plain_swatch(styles[name])) for name in names)
        title = f"{dataset}, {model}, {share_text(fraction)} of the data"
        if any(panels):
            figures.append(Figure(title, legend, tuple(filter(None, panels))))
    return figures


def _curve_panel(runs: Sequence[Run], lines, styles, curve: tuple, name: str) -> Panel | None:
    """One of _CURVES for all runs that have it."""
    source, key, label, factor = curve
    drawn = []
    for run in runs:
        rows = [row for row in getattr(run, source) if key in row]
        if rows:
            x, y = thin_out([row["step"] for row in rows], [row[key] for row in rows])
            drawn.append((lines[run.name], Line(styles[lines[run.name]], x, factor * y)))
    if not drawn:
        return None
    ends = [
        f"{line} ends at {', '.join(f'{run.y[-1]:.3g}' for _, run in pairs)}"
        for line, pairs in grouped(drawn, lambda pair: pair[0]).items()
    ]
    svg = line_panel([line for _, line in drawn], name=name, x_label="step", thin=True)
    return Panel(label, f"{label}, by step. {'; '.join(ends)}.", svg)


def count_text(number: float) -> str:
    """`263 k`, `1.2 M`"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _accuracy_panel(title, name, lines, styles, *, x, ticks, x_label) -> Panel:
    drawn, said = [], []
    for line, members in lines.items():
        drawn.append(Line(
            styles[line],
            [x(g) for g in members],
            [100 * g.mean for g in members],
            [100 * (g.standard_error or 0.0) for g in members],
            [(x(g), 100 * a) for g in members for a in g.accuracies if len(g.results) > 1],
        ))  # fmt: skip
        values = ", ".join(f"{mean_text(g)} at {ticks[x(g)]}" for g in members)
        said.append(f"{line}: {values}".replace("\n", " "))
    teachers = sorted({g.teacher for members in lines.values() for g in members} - {None})
    levels = {f"teacher {percent(teacher)}": 100 * teacher for teacher in teachers}
    said += [f"{name} %" for name in levels]
    svg = line_panel(
        drawn, name=name, x_label=x_label, x_ticks=ticks, log_x=True,
        levels=levels,
    )  # fmt: skip
    return Panel(title, "Test accuracy in %. " + "; ".join(said) + ".", svg)


def _figure(name: str, title: str, panels, groups: Sequence[Group], styles) -> Figure | None:
    lines = dict.fromkeys(group.line for group in groups)
    legend = tuple(
        (line, marked_swatch(styles[line], f"{name}-key-{styles[line]}")) for line in lines
    )
    return Figure(title, legend, tuple(panels)) if panels else None
