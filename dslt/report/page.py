"""Joins the parts of a report and writes it: index.html, report.md, a CSV file a table, and the
figures of accuracy as SVG files.

May import jinja2. The page loads nothing: styles and script stand in it, and its content security
policy allows no other script and no connection.

    write_report([Path("runs/sweep")], Path("report"))
"""

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from dslt.errors import InputError
from dslt.files import write_text
from dslt.report import browser, compare, tables
from dslt.report.compare import Group
from dslt.report.figures import Figure, curve_figures, data_figure, model_figure, to_svg
from dslt.report.formats import Table, markdown_text, to_csv, to_markdown
from dslt.report.runs import Run, find_runs, is_run
from dslt.report.svg import palette


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page and its companions say.

    Attributes:
      findings: sentences about the comparison.
      warnings: sentences about what to be careful with.
      tables: by name; those without rows are not shown.
      data, models: the figures of accuracy, where there is something to draw.
      curves: learning curves, a figure a setting.
      left_out: (run or directory, why it is not compared).
      runs: all of them.
      reference: the line that the others are compared with.
    """

    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    tables: dict[str, Table]
    data: Figure | None
    models: Figure | None
    curves: tuple[Figure, ...]
    left_out: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    reference: str | None

    @property
    def accuracy_figures(self) -> dict[str, Figure]:
        """By the names of their files; those that there are."""
        figures = {"accuracy_by_data.svg": self.data, "accuracy_by_model.svg": self.models}
        return {name: figure for name, figure in figures.items() if figure}


def write_report(paths: Sequence[Path], output_dir: Path, reference: str | None = None) -> Report:
    """Reads the runs at or below `paths` and writes the report's files into `output_dir`.

    Args:
      reference: the line that others are compared with; without it fine-tuning.

    Raises:
      InputError: there is no run, no comparable run is of the line `reference`, or `output_dir` is
        a run's directory.
    """
    if is_run(output_dir):
        raise InputError(
            f"{output_dir}: is a run's directory; expected another --output_dir: the report is not "
            "a part of the run"
        )
    runs, passed_over = find_runs(paths, skip=output_dir)
    report = make_report(runs, passed_over, reference)
    for table in report.tables.values():
        write_text(output_dir / f"{table.name}.csv", to_csv(table))
    for name, figure in report.accuracy_figures.items():
        write_text(output_dir / name, to_svg(figure))
    write_text(output_dir / "report.md", to_page_markdown(report))
    write_text(output_dir / "index.html", to_html(report))
    return report


def make_report(
    runs: Sequence[Run], passed_over: Sequence[tuple[str, str]], reference: str | None = None
) -> Report:
    """Compares the runs, and draws what there is to draw."""
    results, reasons = compare.results_of(runs)
    reference = compare.find_reference(results, reference)
    groups = compare.groups_of(results, reference)
    lines = compare.line_names(runs) | {r.run.name: r.line for r in results}
    in_order = [*(group.line for group in groups), *lines.values()]
    styles = {line: number for number, line in enumerate(dict.fromkeys(in_order))}
    warnings = [
        f"The runs on {name} were not all judged on the same test problems: compare with care."
        for name in compare.several_test_sets(results)
    ]
    if reasons:
        warnings.append(f"{len(reasons)} of {len(runs)} runs are not compared: see “Left out”.")
    made = (
        tables.accuracy_table(groups),
        tables.groups_table(groups),
        tables.smallest_table(groups, reference),
        tables.frontier_table(groups),
        tables.tests_table(compare.paired_tests(groups, reference)),
        tables.rationale_table(groups),
        tables.runs_table(runs, results),
    )
    left_out = [(run.name, reasons[run.name]) for run in runs if run.name in reasons]
    return Report(
        findings=tuple(findings(groups, reference)),
        warnings=tuple(warnings),
        tables={table.name: table for table in made},
        data=data_figure(groups, styles),
        models=model_figure(groups, styles),
        curves=tuple(curve_figures(runs, lines, styles)),
        left_out=(*left_out, *passed_over),
        runs=tuple(runs),
        reference=reference,
    )


def findings(groups: Sequence[Group], reference: str | None) -> list[str]:
    """For each dataset the best group beside the teacher, and with how little data another line is
    as good as the reference's largest model on all data, unless the reference is so itself."""
    sentences = []
    for dataset, block in compare.grouped(groups, lambda g: g.dataset).items():
        best = max(block, key=lambda g: g.mean)
        beside = "" if best.teacher is None else f"; the teacher {tables.percent(best.teacher)} %"
        sentences.append(
            f"{dataset}: best is {best.line} on {tables.share_text(best.fraction)} of the data "
            f"({best.model}), right on {tables.mean_text(best)} % of the test problems{beside}."
        )
        full = [g for g in block if g.line == reference and g.fraction == 1]
        if not full:
            continue
        goal = full[-1]  # sorted by model size
        same_model = [g for g in block if g.model == goal.model]
        others = [g for g in same_model if g.line != reference and g.fraction < 1]
        found = compare.reaches(others, goal.mean)
        own = compare.reaches([g for g in same_model if g.line == reference], goal.mean)
        if found and found.fraction < own.fraction:
            sentences.append(
                f"{dataset}: {tables.share_text(found.fraction)} of the data is enough for "
                f"{found.line} ({tables.mean_text(found)} %) to reach {reference} on all of it "
                f"({tables.mean_text(goal)} %; {goal.model})."
            )
        elif others and not found and own is goal:
            sentences.append(
                f"{dataset}: with less than all of the data no other method reaches {reference} on "
                f"all of it ({tables.mean_text(goal)} %; {goal.model})."
            )
    return sentences


def to_html(report: Report) -> str:
    """The page: everything from a run is escaped, or packed where no HTML is read."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from dslt.report.formats import cell_text

    environment = Environment(
        loader=PackageLoader("dslt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell_text
    browsed = [run for run in report.runs if run.predictions]
    script, style = (
        environment.loader.get_source(environment, name)[0] for name in ("page.js", "style.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        report=report,
        tables=report.tables,
        style=Markup(palette() + style),
        script=Markup(script),
        script_digest=digest,
        data=browser.packed(browser.browser_data(browsed, [run.name for run in browsed])),
        num_browsed=len(browsed),
    )


def to_page_markdown(report: Report) -> str:
    """The page's words, tables and figures of accuracy, without its predictions."""
    parts = ["# Report", *map(markdown_text, (*report.findings, *report.warnings))]
    parts += [f"![{figure.title}]({name})" for name, figure in report.accuracy_figures.items()]
    for table in report.tables.values():
        if table.rows:
            parts.append(to_markdown(table))
    if report.left_out:
        parts.append(to_markdown(Table("left_out", "Left out", ("run", "reason"), report.left_out)))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
