"""Means, errors, tests and thresholds, against values computed by hand or by another function."""

import dataclasses

import numpy as np
import pytest
from made_runs import changed, make_rows, make_run, make_sweep
from scipy import stats

from dslt.config import MAY_CHANGE, Configs
from dslt.errors import InputError
from dslt.report import compare
from dslt.report.compare import PairedTest
from dslt.report.runs import find_runs, read_run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = make_sweep(tmp_path_factory.mktemp("runs") / "sweep")
    found, left_out = compare.results_of(find_runs([path])[0])
    assert len(found) == 18 and left_out == {}
    return found


def test_a_group_is_the_mean_and_standard_error_of_its_seeds(results):
    groups = compare.groups_of(results, "fine-tuning")
    assert [g.line for g in groups] == ["fine-tuning"] * 3 + ["step-by-step"] * 3
    assert [g.fraction for g in groups] == [0.25, 0.5, 1.0] * 2
    group = groups[-1]
    hits = [
        sum(p.is_correct for p in r.run.predictions if p.split == "test") for r in group.results
    ]
    accuracies = np.array(hits) / 300
    assert group.mean == pytest.approx(accuracies.mean())
    assert group.standard_error == pytest.approx(stats.sem(accuracies))
    one = dataclasses.replace(group, results=group.results[:1])
    assert one.standard_error is None and one.mean == accuracies[0]


def test_the_checkpoint_that_is_best_on_validation_is_tested_whatever_the_test_split_says(tmp_path):
    path = make_run(tmp_path / "run", make_rows(0, 0.3))
    best_on_test = make_rows(0, 1.0)
    worse = [p for p in best_on_test if p.split == "test"]
    worse += changed([p for p in best_on_test if p.split == "validation"], prediction="none")
    make_run(tmp_path / "other", worse)
    (path / "evaluations" / "100").rename(tmp_path / "old")
    (tmp_path / "other" / "evaluations" / "100").rename(path / "evaluations" / "100")
    rows = (path / "evaluations.jsonl").read_text().splitlines()
    rows[1] = (tmp_path / "other" / "evaluations.jsonl").read_text().splitlines()[1]
    (path / "evaluations.jsonl").write_text("\n".join(rows) + "\n")
    [result], _ = compare.results_of([read_run(path, "run")])
    assert result.run.best_step == 50 and result.test.value < 0.5


def test_answers_are_judged_anew(tmp_path):
    rows = changed(make_rows(0, 1.0), is_correct=False)
    [result], _ = compare.results_of([read_run(make_run(tmp_path / "run", rows), "run")])
    assert result.test.value == 1.0


def test_the_teacher_is_judged_on_the_same_problems_and_silence_is_wrong(tmp_path):
    rows = make_rows(0, 0.5)
    rows[0] = dataclasses.replace(rows[0], teacher_label=None)  # it was right
    [result], _ = compare.results_of([read_run(make_run(tmp_path / "run", rows), "run")])
    assert (result.teacher.correct, result.teacher.total) == (41, 60)
    silent = make_run(tmp_path / "silent", changed(rows, teacher_label=None))
    [result], _ = compare.results_of([read_run(silent, "silent")])
    assert result.teacher is None


def run_with(tmp_path, name, **experiment):
    given = {"method": "step_by_step", "fraction": 1.0, "model": "m", "seed": 0} | experiment
    return read_run(make_run(tmp_path / name, experiment=given), name)


def test_lines_are_told_apart_by_what_differs_within_a_method(tmp_path):
    runs = [
        run_with(tmp_path, "a", rationale_weight=1.0, variant=""),
        run_with(tmp_path, "b", rationale_weight=0.5, variant=""),
        run_with(tmp_path, "c", rationale_weight=1.0, variant="shuffled", budget="compute"),
        run_with(tmp_path, "d", method="fine_tuning", seed=1),
        run_with(tmp_path, "e", method="fine_tuning", seed=2),
    ]
    assert list(compare.line_names(runs).values()) == [
        "step-by-step, λ 1, budget steps", "step-by-step, λ 0.5, budget steps",
        "step-by-step, λ 1, shuffled, budget compute", "fine-tuning", "fine-tuning",
    ]  # fmt: skip


def test_a_run_by_hand_is_on_the_line_of_a_sweeps_runs_of_its_method(tmp_path):
    facts = {
        "method": "step_by_step", "dataset": "facts", "variant": "", "fraction": 1.0, "model": "",
        "seed": 1, "rationale_weight": 1.0, "label_source": "gold", "budget": "steps",
        "is_augmented": False,
    }  # fmt: skip
    of_a_sweep = make_run(tmp_path / "sweep", experiment=facts)
    runs = [read_run(make_run(tmp_path / "hand"), "hand"), read_run(of_a_sweep, "sweep")]
    (group,) = compare.groups_of(compare.results_of(runs)[0], None)
    assert group.line == "step-by-step" and len(group.results) == 2


RATE, WEIGHT = "optimizer.OptimizerConfig.learning_rate", "train.TrainConfig.consistency_weight"


def run_by_hand(tmp_path, name, config=(), rows=None, **info):
    return read_run(make_run(tmp_path / name, rows, config=config, **info), name)


def lines_of(runs):
    return list(compare.line_names(runs).values())


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_different_configs_are_no_seeds_of_one_method(tmp_path, seed):
    fresh = {RATE: 0.0015, "train.TrainConfig.init_from": "", "train.TrainConfig.seed": 0}
    warm = {RATE: 0.1, "train.TrainConfig.init_from": "base", "train.TrainConfig.seed": seed}
    runs = [run_by_hand(tmp_path, "a", fresh), run_by_hand(tmp_path, "b", warm, seed=seed)]
    results, left_out = compare.results_of(runs)
    assert left_out == {}
    groups = compare.groups_of(results, None)
    assert [(g.line, len(g.results)) for g in groups] == [
        ("step-by-step, learning_rate 0.0015", 1),
        ("step-by-step, learning_rate 0.1, init_from base", 1),
    ]


def test_the_weight_of_the_consistency_term_tells_lines_apart(tmp_path):
    runs = [run_by_hand(tmp_path, f"{weight}", {WEIGHT: weight}) for weight in (0.1, 0.5)]
    title = "step-by-step, consistency term"
    assert lines_of(runs) == [f"{title}, consistency_weight {weight}" for weight in (0.1, 0.5)]


def test_what_a_run_may_be_resumed_with_makes_no_line():
    """But how its answers are chosen does; nor do seeds, paths, and what has a place of its own."""
    answers = {
        "answers", "labels", "max_label_length", "strategy", "temperature", "top_k", "top_p",
        "num_beams", "length_penalty", "early_stopping",
    }  # fmt: skip
    also = {
        "train": {"seed", "rationale_weight"},
        "data": {"records", "augmentation", "train_fraction", "label_source"},
    }
    for stage in dataclasses.fields(Configs)[:-1]:
        names = {field.name for field in dataclasses.fields(stage.type)}
        prefix = f"{stage.type.__module__.rpartition('.')[2]}.{stage.type.__name__}."
        without_line = {name for name in names if (prefix + name).startswith(compare.NO_LINE)}
        may_change = MAY_CHANGE.get(stage.name, ())
        expected = {*(names if may_change == "*" else may_change)} | also.get(stage.name, set())
        assert without_line == expected - answers


def test_records_and_vocabularies_are_told_apart_by_their_digests(tmp_path):
    def run(name, records, vocabulary, seed, path):
        config = {"pipeline.DataConfig.records": (path,), "pipeline.DataConfig.vocabulary": path}
        info = {"records": {path: records * 64}, "vocabulary_digest": vocabulary * 64}
        return run_by_hand(tmp_path, name, config, seed=seed, **info)

    same = [run("a", "a", "c", 0, "here"), run("b", "a", "c", 1, "there")]
    assert lines_of(same) == ["step-by-step"] * 2
    others = [*same, run("c", "b", "c", 2, "here"), run("d", "a", "d", 3, "here")]
    assert lines_of(others) == [
        *["step-by-step, vocabulary cccccccc, records aaaaaaaa"] * 2,
        "step-by-step, vocabulary cccccccc, records bbbbbbbb",
        "step-by-step, vocabulary dddddddd, records aaaaaaaa",
    ]


def test_what_differs_from_place_to_place_alone_makes_no_line(tmp_path):
    """Another dataset or model has settings of its own, and an older version fewer fields; a budget
    of compute has the steps that each seed's examples cost."""
    sums = changed(make_rows(0, 0.5), dataset="sums")
    runs = [
        run_by_hand(tmp_path, "facts", {RATE: 0.1}),
        run_by_hand(tmp_path, "older", seed=1),
        run_by_hand(tmp_path, "sums", {RATE: 0.2}, sums),
        run_by_hand(tmp_path, "large", {RATE: 0.3}, num_params=9_000_000),
    ]
    assert lines_of(runs) == ["step-by-step"] * 4
    both = run_by_hand(tmp_path, "both", {RATE: 0.2}, [*make_rows(0, 0.5), *sums])
    assert lines_of([*runs, both])[-1] == "step-by-step, learning_rate 0.2"
    steps = [
        read_run(
            make_run(
                tmp_path / f"{seed}", steps=(number,),
                experiment={"method": "distillation", "seed": seed, "budget": "compute"},
            ),
            f"{seed}",
        )
        for seed, number in enumerate((50, 51))
    ]  # fmt: skip
    assert lines_of(steps) == ["distillation"] * 2


def test_what_is_not_compared_is_named(tmp_path):
    runs = [
        run_with(tmp_path, "a"),
        run_with(tmp_path, "again"),
        run_with(tmp_path, "other seed", seed=1),
    ]
    no_test = [p for p in make_rows(0, 0.5) if p.split == "validation"]
    runs.append(read_run(make_run(tmp_path / "no test", no_test), "no test"))
    results, left_out = compare.results_of(runs)
    assert [r.run.name for r in results] == ["a", "other seed"]
    assert left_out == {
        "again": "has the same settings and seed as a",
        "no test": "no test example with a gold label was judged",
    }


def test_several_seeds_are_compared_by_a_paired_t_test(results):
    tests = compare.paired_tests(compare.groups_of(results, "fine-tuning"), "fine-tuning")
    assert [(t.line, t.fraction, t.test, t.pairs) for t in tests] == [
        ("step-by-step", f, "paired t", 3) for f in (0.25, 0.5, 1.0)
    ]
    groups = {(g.line, g.fraction): g.accuracies for g in compare.groups_of(results, "x")}
    ours, base = groups["step-by-step", 0.5], groups["fine-tuning", 0.5]
    expected = stats.ttest_rel(ours, base)
    assert tests[1].p == pytest.approx(expected.pvalue)
    assert tests[1].difference == pytest.approx(np.mean(ours) - np.mean(base))
    assert tests[1].interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_differences_that_do_not_vary_have_no_p():
    assert compare.paired_t([0.6 - 0.5, 0.5 - 0.4, 0.4 - 0.3]) == {"p": None, "interval": None}


def test_one_seed_is_compared_by_mcnemars_test(results):
    of_one = [r for r in results if r.seed == "1" and r.fraction == 1.0]
    [test] = compare.paired_tests(compare.groups_of(of_one, "fine-tuning"), "fine-tuning")
    base, ours = sorted(of_one, key=lambda r: r.line)
    gained = sum(ours.hits[k] and not base.hits[k] for k in ours.hits)
    lost = sum(base.hits[k] and not ours.hits[k] for k in ours.hits)
    assert (test.test, test.pairs) == ("McNemar", 300)
    assert test.difference == pytest.approx((gained - lost) / 300)
    assert test.p == compare.mcnemar(gained, lost) < 0.05


def test_mcnemars_p_is_binomial():
    assert compare.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert compare.mcnemar(0, 0) == 1.0
    assert compare.mcnemar(3, 3) == pytest.approx(1.0)


def test_seeds_pair_only_on_the_same_problems(results, tmp_path):
    moved = [
        dataclasses.replace(r, hits={("x", *k): v for k, v in r.hits.items()})
        if r.line == "fine-tuning"
        else r
        for r in results
    ]
    assert compare.paired_tests(compare.groups_of(moved, "fine-tuning"), "fine-tuning") == []
    assert compare.several_test_sets(moved) == ["facts"]
    assert compare.several_test_sets(results) == []


def test_holms_correction():
    """Ordered p of 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, never falling."""
    tests = [
        PairedTest("d", "m", 1.0, "a", "b", "paired t", 3, 0.1, None, p)
        for p in (0.03, 0.01, None, 0.5, 0.02)
    ]
    assert [t.p_holm for t in compare.holm(tests)] == [
        pytest.approx(0.06), pytest.approx(0.04), None, pytest.approx(0.5), pytest.approx(0.06),
    ]  # fmt: skip


def test_the_reference_is_fine_tuning_unless_another_is_asked_for(results):
    assert compare.find_reference(results) == "fine-tuning"
    assert compare.find_reference(results, "step-by-step") == "step-by-step"
    told = [dataclasses.replace(r, line=f"{r.line}, learning_rate 0.1") for r in results]
    told.append(dataclasses.replace(told[0], line="distillation"))
    assert compare.find_reference(told) == "fine-tuning, learning_rate 0.1"
    assert compare.find_reference([]) is None
    with pytest.raises(InputError, match="is 'x'; expected one of 'fine-tuning', 'step-by-step'"):
        compare.find_reference(results, "x")


def test_the_smallest_data_and_models_that_pass_the_teacher(tmp_path):
    """The teacher is right on 70 %; a student's accuracy is exact here."""

    def group(model, params, fraction, correct):
        rows = [p for p in make_rows(0, 1.0, test=100)]
        wrong = [
            dataclasses.replace(p, prediction="none") if i >= correct and p.split == "test" else p
            for i, p in enumerate(rows)
        ]
        experiment = {"method": "m", "model": model, "fraction": fraction, "seed": 0}
        path = make_run(
            tmp_path / f"{model}{fraction}", wrong, experiment=experiment, num_params=params
        )
        results, _ = compare.results_of([read_run(path, path.name)])
        return compare.groups_of(results, None)[0]

    small = [group("s", 10, f, correct) for f, correct in ((0.25, 60), (0.5, 70), (1.0, 71))]
    large = [group("l", 90, f, correct) for f, correct in ((0.25, 69), (0.5, 80), (1.0, 90))]
    assert [g.passes_teacher for g in small] == [False, False, True]  # 70 of 100 is not above 70 %
    found = compare.frontier(small + large)
    assert [(g.model, g.fraction) for g in found] == [("s", 1.0), ("l", 0.5)]
    assert compare.reaches(large, 0.71).fraction == 0.5
    assert compare.reaches(large, 0.8).fraction == 0.5
    assert compare.reaches(large, 0.91) is None and compare.reaches(large, None) is None
