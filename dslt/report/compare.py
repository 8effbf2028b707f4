"""Runs → results, groups of seeds, the teacher's accuracy, what passes it, and paired tests.

May import dslt.metrics and scipy. Every answer is judged anew from its text, at the checkpoint that
is best on validation; the test split chooses nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from dslt.errors import InputError
from dslt.metrics import Accuracy, accuracy, is_correct
from dslt.report.runs import Run, printable

# What has a place of its own in figures and tables; the other settings tell lines apart.
_PLACED = ("method", "dataset", "fraction", "model", "seed")
# Of config.gin what tells no lines apart: what is placed or a setting already, paths, and what
# changes how a run is computed and what is kept of it (`MAY_CHANGE` of config.py), not its answers.
NO_LINE = (
    "train.TrainConfig.seed",
    "train.TrainConfig.rationale_weight",
    "train.TrainConfig.save_every_steps",
    "train.TrainConfig.keep_checkpoints",
    "train.TrainConfig.log_every_steps",
    "train.TrainConfig.on_nonfinite",
    "t5.T5Config.remat",
    "t5.T5Config.scan_unroll",
    "sharding.MeshConfig.",
    "pipeline.DataConfig.train_fraction",
    "pipeline.DataConfig.label_source",
    "pipeline.DataConfig.records",
    "pipeline.DataConfig.augmentation",
    "pipeline.DataConfig.cache_dir",
    "evaluate.EvalConfig.seed",
    "evaluate.EvalConfig.splits",
    "evaluate.EvalConfig.rows",
    "evaluate.EvalConfig.max_rationale_length",
    "evaluate.EvalConfig.with_rationales",
    "evaluate.EvalConfig.poll_secs",
    "evaluate.EvalConfig.silence_secs",
    "evaluate.EvalConfig.give_up_secs",
)
_TITLES = {
    "fine_tuning": "fine-tuning",
    "step_by_step": "step-by-step",
    "step_by_step_teacher": "step-by-step, teacher's labels",
    "step_by_step_shared": "step-by-step, one encoder pass",
    "step_by_step_consistent": "step-by-step, consistency term",
    "step_by_step_shuffled": "step-by-step, shuffled rationales",
    "rationale_label": "one target: rationale, label",
    "label_rationale": "one target: label, rationale",
}
REFERENCES = ("fine-tuning", "distillation")  # the first that is there


@dataclasses.dataclass(frozen=True)
class Result:
    """One run's answers to the test split of one dataset.

    Attributes:
      line: the method, with what else tells its runs apart.
      hits: by test example, whether the student is right; examples without a gold label are none.
      test, validation, teacher: accuracies; the teacher's on the same test examples, where it
        answered at all, an example without a legal answer counting as wrong.
    """

    run: Run
    dataset: str
    line: str
    model: str
    fraction: float
    seed: str
    hits: Mapping[tuple, bool]
    test: Accuracy
    validation: Accuracy
    teacher: Accuracy | None

    @property
    def place(self) -> tuple:
        return (self.dataset, self.line, self.model, self.fraction)


@dataclasses.dataclass(frozen=True)
class Group:
    """The seeds of one method on one dataset, fraction and model."""

    dataset: str
    line: str
    model: str
    fraction: float
    results: tuple[Result, ...]

    @property
    def num_params(self) -> int | None:
        return self.results[0].run.num_params

    @property
    def accuracies(self) -> list[float]:
        return [result.test.value for result in self.results]

    @property
    def mean(self) -> float:
        """Of the seeds' test accuracies, in [0, 1]."""
        return float(np.mean(self.accuracies))

    @property
    def standard_error(self) -> float | None:
        """sd / sqrt(n) over seeds, sd with n - 1; None of one seed."""
        n = len(self.results)
        return float(np.std(self.accuracies, ddof=1) / math.sqrt(n)) if n > 1 else None

    @property
    def teacher(self) -> float | None:
        """The teacher's accuracy on these test examples."""
        teacher = self.results[0].teacher
        return teacher and teacher.value

    @property
    def passes_teacher(self) -> bool:
        return self.teacher is not None and self.mean > self.teacher


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Whether a method differs from the reference at the same dataset, model and fraction.

    Attributes:
      test: `paired t` over seeds, or `McNemar` over the examples where there is one seed alone.
      pairs: seeds, or examples.
      difference: of mean test accuracies, method minus reference.
      interval: its 95 % confidence interval; None where there is none.
      p: two-sided; None where the differences do not vary.
      p_holm: p times the tests that Holm's procedure still has open, over all tests of the report.
    """

    dataset: str
    model: str
    fraction: float
    line: str
    reference: str
    test: str
    pairs: int
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None = None


def line_names(runs: Sequence[Run]) -> dict[str, str]:
    """By run's name its line: the method, each other setting in which its runs differ, and each
    field of their configs that differs where dataset, fraction and model are the same."""
    names = {}
    for method, group in grouped(runs, lambda run: str(run.settings["method"])).items():
        keys = dict.fromkeys(key for run in group for key in run.settings if key not in _PLACED)
        differing = [k for k in keys if len({str(run.settings.get(k, "")) for run in group}) > 1]
        for run in group:
            told = [(key, run.settings.get(key, "")) for key in differing]
            extras = [_setting_text(key, value) for key, value in told if value != ""]
            title = _TITLES.get(method, method.replace("_", " "))
            names[run.name] = ", ".join([title, *extras])
    for line, group in grouped(runs, lambda run: names[run.name]).items():
        configs = {run.name: _told_config(run) for run in group}
        differing = _differing_fields(group, configs)
        for run in group:
            told = [(key, configs[run.name].get(key, "")) for key in differing]
            extras = [f"{key.rpartition('.')[2]} {value}" for key, value in told if value]
            names[run.name] = ", ".join([line, *extras])
    return names


def _told_config(run: Run) -> dict[str, str]:
    """The fields of the run's config that may tell lines apart; what it read by its digests, not by
    its paths, where run.json has them."""
    config = {
        name: printable(str(value))
        for name, value in run.config.items()
        if not name.startswith(NO_LINE)
    }
    if isinstance(records := run.info.get("records"), dict):
        config["records"] = " ".join(sorted(printable(str(x))[:8] for x in records.values()))
    if isinstance(vocabulary := run.info.get("vocabulary_digest"), str):
        config["pipeline.DataConfig.vocabulary"] = printable(vocabulary)[:8]
    if run.settings.get("budget") == "compute":  # steps are then by what each seed's examples cost
        config.pop("train.TrainConfig.num_steps", None)
    return config


def _differing_fields(runs: Sequence[Run], configs: Mapping[str, Mapping]) -> list[str]:
    """Those that differ between two runs on one dataset, fraction and model; a field that a config
    lacks, as one of an older version may, differs from nothing."""
    pairs = [(run, dataset) for run in runs for dataset in {p.dataset for p in run.predictions}]
    places = grouped(
        pairs, lambda pair: (pair[1], pair[0].settings["model"], pair[0].settings["fraction"])
    )
    differing = {}
    for members in places.values():
        values: dict[str, set[str]] = {}
        for run, _ in members:
            for key, value in configs[run.name].items():
                values.setdefault(key, set()).add(value)
        differing |= {key: None for key, found in values.items() if len(found) > 1}
    return list(differing)


def _setting_text(name: str, value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    named = {"rationale_weight": f"λ {text}", "variant": text.replace("_", " ")}
    return named.get(name, f"{name} {text}")


def results_of(runs: Sequence[Run]) -> tuple[list[Result], dict[str, str]]:
    """The comparable runs' results, a dataset each, and why other runs were left out, by name."""
    left_out = {run.name: "; ".join(run.problems) for run in runs if run.problems}
    comparable = [run for run in runs if not run.problems]
    lines = line_names(comparable)
    results: dict[tuple, Result] = {}
    for run in comparable:
        judged = [p for p in run.predictions if p.label is not None]
        if not any(p.split == "test" for p in judged):
            left_out[run.name] = "no test example with a gold label was judged"
        for dataset, rows in grouped(judged, lambda p: p.dataset).items():
            result = _result(run, dataset, lines[run.name], rows)
            if not result.test.total:
                continue
            first = results.setdefault((*result.place, result.seed), result)
            if first is not result:
                left_out[run.name] = f"has the same settings and seed as {first.run.name}"
    return list(results.values()), left_out


def _result(run: Run, dataset: str, line: str, rows) -> Result:
    test = [p for p in rows if p.split == "test"]
    teacher = None
    if any(p.teacher_label is not None for p in test):
        teacher = accuracy(
            p.teacher_label is not None and is_correct(p.teacher_label, p.label, p.answer_form)
            for p in test
        )
    hits = {
        (p.id, p.input, p.label): is_correct(p.prediction, p.label, p.answer_form) for p in test
    }
    return Result(
        run=run,
        dataset=dataset,
        line=line,
        model=str(run.settings["model"]),
        fraction=float(run.settings["fraction"]),
        seed=str(run.settings["seed"]),
        hits=hits,
        test=accuracy(hits.values()),
        validation=accuracy(
            is_correct(p.prediction, p.label, p.answer_form)
            for p in rows
            if p.split == "validation"
        ),
        teacher=teacher,
    )


def groups_of(results: Sequence[Result], reference: str | None) -> list[Group]:
    """Seeds together; sorted by dataset, model's size, line (reference first) and fraction."""
    groups = [
        Group(*place, tuple(members))
        for place, members in grouped(results, lambda result: result.place).items()
    ]
    return sorted(
        groups,
        key=lambda g: (
            g.dataset, g.num_params or 0, g.model, g.line != reference, g.line, g.fraction
        ),
    )  # fmt: skip


def find_reference(results: Sequence[Result], asked: str | None = None) -> str | None:
    """The line that others are compared with: that asked for, else fine-tuning, else distillation,
    else the first; None where there are no results.

    Raises:
      InputError: there is no line of the name asked for.
    """
    lines = sorted({result.line for result in results})
    if asked is None:
        firsts = [line for name in REFERENCES for line in lines if line.split(", ")[0] == name]
        return next(iter([*firsts, *lines]), None)
    if asked not in lines:
        raise InputError(
            f"--reference is {asked!r}; expected one of {', '.join(map(repr, lines)) or 'none'}"
        )
    return asked


def several_test_sets(results: Sequence[Result]) -> list[str]:
    """Datasets whose runs were not all judged on the same test examples."""
    by_dataset = grouped(results, lambda result: result.dataset)
    test_sets = {name: {frozenset(r.hits) for r in found} for name, found in by_dataset.items()}
    return [name for name, found in test_sets.items() if len(found) > 1]


def frontier(groups: Sequence[Group]) -> list[Group]:
    """Of one line's groups those that pass the teacher with no smaller model and data doing so."""
    passing = [g for g in groups if g.passes_teacher]

    def size(group: Group) -> tuple:
        return (group.num_params or 0, group.fraction)

    def is_beaten(group: Group) -> bool:
        return any(
            size(other) != size(group)
            and all(a <= b for a, b in zip(size(other), size(group), strict=True))
            for other in passing
        )

    return sorted((g for g in passing if not is_beaten(g)), key=size)


def reaches(groups: Sequence[Group], goal: float | None) -> Group | None:
    """Of one line's groups on one model that with the smallest fraction whose mean is the goal's
    or above."""
    if goal is None:
        return None
    return min((g for g in groups if g.mean >= goal), key=lambda g: g.fraction, default=None)


def paired_tests(groups: Sequence[Group], reference: str | None) -> list[PairedTest]:
    """Each line against the reference, wherever both have a seed in common."""
    tests = []
    by_setting = grouped(groups, lambda g: (g.dataset, g.model, g.fraction))
    for setting in by_setting.values():
        base = next((g for g in setting if g.line == reference), None)
        tests += [_paired_test(g, base) for g in setting if base and g is not base]
    return holm([test for test in tests if test])


def _paired_test(group: Group, base: Group) -> PairedTest | None:
    """By seed where two or more pair; by example where one does; None where none does."""
    base_of = {result.seed: result for result in base.results}
    pairs = [(r, base_of[r.seed]) for r in group.results if r.seed in base_of]
    pairs = [(a, b) for a, b in pairs if a.hits.keys() == b.hits.keys()]
    if not pairs:
        return None
    differences = [a.test.value - b.test.value for a, b in pairs]
    make = functools.partial(
        PairedTest, group.dataset, group.model, group.fraction, group.line, base.line,
        difference=float(np.mean(differences)),
    )  # fmt: skip
    if len(pairs) > 1:
        return make(test="paired t", pairs=len(pairs), **paired_t(differences))
    [(a, b)] = pairs
    gained = sum(a.hits[key] and not b.hits[key] for key in a.hits)
    lost = sum(b.hits[key] and not a.hits[key] for key in a.hits)
    return make(test="McNemar", pairs=len(a.hits), interval=None, p=mcnemar(gained, lost))


def paired_t(differences: Sequence[float]) -> dict:
    """`p` and the 95 % `interval` of the mean difference, by Student's t with n - 1 degrees.

    Differences that do not vary have neither: the test knows no spread to measure them by.
    """
    if np.ptp(differences) < 1e-9:
        return {"p": None, "interval": None}
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return {"p": float(found.pvalue), "interval": (float(interval.low), float(interval.high))}


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test: binomial over the answers that changed sides."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """Adds `p_holm`: the largest (m - rank) p among the ranks 0 to its own, at most 1.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    ranked = sorted((t.p, i) for i, t in enumerate(tests) if t.p is not None)
    adjusted, floor = {}, 0.0
    for rank, (p, i) in enumerate(ranked):
        floor = max(floor, min(1.0, (len(ranked) - rank) * p))
        adjusted[i] = floor
    return [dataclasses.replace(test, p_holm=adjusted.get(i)) for i, test in enumerate(tests)]


def grouped(items, key) -> dict:
    """Items by key, in the order in which the keys first come."""
    order: dict = {}
    for item in items:
        order.setdefault(key(item), []).append(item)
    return order
