"""Which tables a report has. How a table is written is in formats.py."""

import collections
from collections.abc import Iterable, Iterator, Sequence

from dslt.report import compare, rationales
from dslt.report.compare import Group, PairedTest, Result, grouped
from dslt.report.formats import Table
from dslt.report.runs import Run

# Columns of the runs' table that stand there even where all runs agree.
_ALWAYS = ("method", "fraction", "model", "seed")
# What run.json and config.gin say again, or what is another for each run anyway.
_SAID_ALREADY = ("train.TrainConfig.seed", "train.TrainConfig.rationale_weight")
_INFO = ("state", "devices", "commit", "dslt")


def percent(share: float | None, sign: str = "") -> str | None:
    """`71.8`, or `+1.2` with the sign `+`; None stays None."""
    return None if share is None else f"{100 * share:{sign}.1f}".replace("-", "−")


def share_text(fraction: float) -> str:
    """`12.5 %`"""
    return f"{100 * fraction:.4g} %"


def mean_text(group: Group) -> str:
    """`71.8 ± 4.1`, the error only of several seeds."""
    error = group.standard_error
    return percent(group.mean) + ("" if error is None else f" ± {percent(error)}")


def accuracy_table(groups: Sequence[Group]) -> Table:
    """A row a method, a column a fraction of the data."""
    fractions = sorted({group.fraction for group in groups})
    rows = []
    for (dataset, model), block in grouped(groups, lambda g: (g.dataset, g.model)).items():
        for line, members in grouped(block, lambda g: g.line).items():
            cells = {group.fraction: mean_text(group) for group in members}
            seeds = sorted({len(group.results) for group in members})
            seeds_text = "–".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
            rows.append((dataset, model, line, seeds_text, *(cells.get(f) for f in fractions)))
        for name, teacher, taught in _teachers(block):
            cells = (percent(teacher) if f in taught else None for f in fractions)
            rows.append((dataset, model, name, None, *cells))
    return Table(
        "accuracy",
        "Test accuracy in %, mean ± standard error over seeds, by share of the training data",
        ("dataset", "model", "method", "seeds", *map(share_text, fractions)),
        tuple(rows),
    )


def _teachers(block: Sequence[Group]) -> Iterator[tuple[str, float, set[float]]]:
    """What to call each teacher of these groups, its accuracy, and the fractions it is beside.

    Where there are several, the one of most groups is that of the others.
    """
    counts = collections.Counter(g.teacher for g in block if g.teacher is not None)
    for rank, (teacher, _) in enumerate(counts.most_common()):
        taught = [group for group in block if group.teacher == teacher]
        name = "the teacher"
        if rank > 0:
            name += f" of {'; '.join(dict.fromkeys(group.line for group in taught))}"
        elif len(counts) > 1:
            name += " of the others"
        yield name, teacher, {group.fraction for group in taught}


def groups_table(groups: Sequence[Group]) -> Table:
    """The figures' numbers: a row a group of seeds, unrounded in CSV."""
    return Table(
        "groups",
        "What the figures show: accuracies in [0, 1], standard error over seeds",
        (
            "dataset", "model", "parameters", "method", "fraction", "seeds", "test_accuracy",
            "standard_error", "teacher_accuracy", "passes_teacher",
        ),
        tuple(
            (
                g.dataset, g.model, g.num_params, g.line, g.fraction, len(g.results), g.mean,
                g.standard_error, g.teacher, None if g.teacher is None else
                "yes" if g.passes_teacher else "no",
            )
            for g in groups
        ),
    )  # fmt: skip


def smallest_table(groups: Sequence[Group], reference: str | None) -> Table:
    """With how little data a line passes the teacher, and reaches the reference on all data."""
    rows = []
    for (dataset, model), block in grouped(groups, lambda g: (g.dataset, g.model)).items():
        full = next((g for g in block if g.line == reference and g.fraction == 1), None)
        for line, members in grouped(block, lambda g: g.line).items():
            passing = min(
                (g for g in members if g.passes_teacher), key=lambda g: g.fraction, default=None
            )
            teacher = None
            if members[0].teacher is not None:
                teacher = _with_data(passing) or f"never, best {_best(members)}"
            reached = None
            if full:
                found = compare.reaches(members, full.mean)
                reached = _with_data(found) or f"never, best {_best(members)}"
            rows.append((dataset, model, line, teacher, reached))
    return Table(
        "smallest_data",
        "The smallest share of the training data with which the mean over seeds is above the "
        f"teacher's accuracy, and at least that of {reference} on all data",
        ("dataset", "model", "method", "passes the teacher", f"reaches {reference} on all data"),
        tuple(rows) if any(row[3] or row[4] for row in rows) else (),
    )


def frontier_table(groups: Sequence[Group]) -> Table:
    """The smallest models and data that pass the teacher, where there are several models."""
    rows = []
    for (dataset, line), members in grouped(groups, lambda g: (g.dataset, g.line)).items():
        if len({g.model for g in members}) > 1 and members[0].teacher is not None:
            found = compare.frontier(members)
            text = "; ".join(f"{g.model} with {_with_data(g)}" for g in found)
            rows.append((dataset, line, text or f"none, best {_best(members)}"))
    return Table(
        "smallest_model",
        "The smallest models and data that pass the teacher: no smaller model does so with as "
        "little data, and none with less data is as small",
        ("dataset", "method", "model and share of the data"),
        tuple(rows),
    )


def _with_data(group: Group | None) -> str | None:
    return group and f"{share_text(group.fraction)} ({mean_text(group)})"


def _best(groups: Sequence[Group]) -> str:
    return mean_text(max(groups, key=lambda g: g.mean))


def tests_table(tests: Sequence[PairedTest]) -> Table:
    """A row a paired test."""
    rows = []
    for t in tests:
        interval = t.interval and " to ".join(map(percent, t.interval))
        unit = "seeds" if t.test == "paired t" else "examples"
        rows.append((
            t.dataset, t.model, share_text(t.fraction), t.line, t.reference,
            percent(t.difference, "+"), interval, f"{t.test}, {t.pairs} {unit}",
            p_text(t.p), p_text(t.p_holm),
        ))  # fmt: skip
    return Table(
        "paired_tests",
        "Differences of test accuracy, in percentage points, with 95 % confidence intervals",
        (
            "dataset", "model", "data", "method", "against", "difference", "interval", "test", "p",
            "p, Holm",
        ),
        tuple(rows),
    )  # fmt: skip


def p_text(p: float | None) -> str | None:
    """`0.031`, `< 0.001`"""
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def rationale_table(groups: Sequence[Group]) -> Table:
    """A row a group of seeds that explain their answers."""
    rows = []
    for g in groups:
        found = [q for q in map(_rationale_quality, g.results) if q]
        if not found:
            continue
        total, stated = sum(q.rows for q in found), sum(q.stated for q in found)
        agreeing = sum(q.agreeing for q in found)
        rows.append((
            g.dataset, g.model, g.line, share_text(g.fraction), len(found), total,
            sum(q.empty for q in found), _mean_text(q.words for q in found),
            _mean_text(q.teacher_words for q in found), _mean_text(q.chrf for q in found),
            _mean_text(q.rouge_l and 100 * q.rouge_l for q in found), percent(stated / total),
            percent(agreeing / stated) if stated else None,
        ))  # fmt: skip
    return Table(
        "rationales",
        "The students' rationales on the test split: of all seeds, means over seeds",
        (
            "dataset", "model", "method", "data", "seeds", "rationales", "empty", "words",
            "teacher's words", "chrF", "ROUGE-L", "own answer, %", "is the label, %",
        ),
        tuple(rows),
    )  # fmt: skip


def _rationale_quality(result: Result) -> rationales.RationaleQuality | None:
    rows = result.run.predictions
    return rationales.quality(
        [p for p in rows if p.split == "test" and p.dataset == result.dataset]
    )


def _mean_text(values: Iterable[float | None]) -> str | None:
    """The mean of those that are there, with one decimal."""
    there = [value for value in values if value is not None]
    return f"{sum(there) / len(there):.1f}" if there else None


def runs_table(runs: Sequence[Run], results: Sequence[Result]) -> Table:
    """A row a run; of its settings and its config those in which the runs differ."""
    said = [_said(run) for run in runs]
    keys = dict.fromkeys([*_ALWAYS, *(key for facts in said for key in facts)])
    shown = [k for k in keys if k in _ALWAYS or len({str(s.get(k, "")) for s in said}) > 1]
    by_run = grouped(results, lambda r: r.run.name)
    rows = []
    for run, facts in zip(runs, said, strict=True):
        found = by_run.get(run.name, [])
        correct = sum(r.test.correct for r in found)
        total = sum(r.test.total for r in found)
        best = next((row for row in run.evaluations if row["step"] == run.best_step), {})
        rows.append((
            run.name, percent(best.get("validation/accuracy")),
            percent(correct / total) if total else None, run.best_step,
            *(facts.get(key) for key in shown),
        ))  # fmt: skip
    return Table(
        "runs",
        "All runs, with the settings in which they differ; the best step is that on validation",
        ("run", "validation, %", "test, %", "best step", *(_short(key) for key in shown)),
        tuple(rows),
    )


def _said(run: Run) -> dict:
    """What a run says of itself in experiment.json, run.json and config.gin, as text or numbers."""
    info = {key: run.info[key] for key in _INFO if run.info.get(key) is not None}
    config = {key: value for key, value in run.config.items() if key not in _SAID_ALREADY}
    facts = {"dataset": run.datasets} | dict(run.settings) | {"parameters": run.num_params} | info
    facts |= {key: value for key, value in config.items() if key not in facts}
    return {key: _plain(value) for key, value in facts.items() if value is not None}


def _plain(value):
    """A number as it is, anything else as text; the entries of a list without its brackets."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _short(key: str) -> str:
    """`train.TrainConfig.num_steps` → `num_steps`"""
    return key.rpartition(".")[2]
