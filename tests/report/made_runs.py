"""Run directories as `dslt train` and `dslt evaluate` leave them, made up in milliseconds."""

import dataclasses
import json
import random
from pathlib import Path

from dslt.metrics import is_correct
from dslt.records import Prediction, write_rows

LABELS = ("entailment", "contradiction", "neutral")


def make_rows(seed: int, accuracy: float, *, test: int = 60, with_rationales: bool = True):
    """Answers of a student that is right with the given probability; the problems are the same for
    all seeds, and their teacher is right on 7 of 10."""
    problems, student = random.Random("problems"), random.Random(f"{seed} {accuracy}")
    rows = []
    for number in range(test + 30):
        label, thing = problems.choice(LABELS), problems.choice(("ball", "hat", "cup"))
        wrong = LABELS[LABELS.index(label) - 1]
        answer = label if student.random() < accuracy else wrong
        rows.append(
            Prediction(
                id=f"p{number}",
                dataset="facts",
                split="test" if number < test else "validation",
                input=f"premise: ann has a red {thing} . hypothesis: number {number} .",
                prediction=answer,
                label=label,
                teacher_label=label if number % 10 < 7 else wrong,
                rationale=f"ann has a {thing} . so it is {answer} ." if with_rationales else None,
                is_correct=answer == label,
                teacher_rationale=f"ann has a red {thing} . it is {label} .",
            )
        )
    return rows


def make_run(
    path: Path, rows=None, *, steps=(50, 100), state="finished", experiment=None, config=(), **info
):
    """Writes a run; `experiment` is experiment.json, or None for a run started by hand; `config`
    has further bindings by name."""
    path.mkdir(parents=True)
    rows = make_rows(0, 0.5) if rows is None else rows
    info = {"state": state, "seed": 0, "rationale_weight": 1.0, "num_params": 263168} | info
    (path / "run.json").write_text(json.dumps(info))
    (path / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n\n"
        "# Parameters for train.TrainConfig:\n"
        "# ====\n"
        f"train.TrainConfig.num_steps = {steps[-1] if steps else 100}\n"
        "pipeline.DataConfig.records = \\\n    ('runs/records.jsonl',)\n"
        "pipeline.DataConfig.label_source = 'gold'\n"
        + "".join(f"{name} = {value!r}\n" for name, value in dict(config).items())
    )
    if experiment is not None:
        (path / "experiment.json").write_text(json.dumps(experiment))
    metrics = [
        {
            "step": step,
            "loss": 9 / step,
            "label_loss": 3 / step,
            "rationale_loss": 6 / step,
            "label_accuracy": 1 - 1 / step,
            "examples_per_sec": 800.0 + step,
        }
        for step in range(5, 105, 5)
    ]
    write_lines(path / "metrics.jsonl", metrics)
    evaluations = []
    for step in steps:
        values = {"step": step}
        for split in ("validation", "test"):
            hits = [
                is_correct(p.prediction, p.label, p.answer_form)
                for p in rows
                if p.split == split and p.label is not None
            ]
            if hits:
                values |= {
                    f"{split}/accuracy": sum(hits) / len(hits),
                    f"{split}/examples": len(hits),
                }
        evaluations.append(values)
        write_rows(path / "evaluations" / str(step) / "predictions.jsonl", rows)
    write_lines(path / "evaluations.jsonl", evaluations)
    return path


def make_sweep(path: Path, *, seeds=3, fractions=(0.25, 0.5, 1.0), models=(("tiny_32", 263168),)):
    """Fine-tuning and step-by-step; the latter is better, and passes the teacher on all data."""
    for method, base, weight in (("fine_tuning", 0.4, 0.0), ("step_by_step", 0.6, 1.0)):
        for model, params in models:
            for fraction in fractions:
                for seed in range(seeds):
                    accuracy = base + 0.25 * fraction + 0.01 * seed
                    rows = make_rows(seed, accuracy, test=300, with_rationales=weight > 0)
                    experiment = {
                        "method": method, "dataset": "facts", "fraction": fraction, "model": model,
                        "seed": seed, "rationale_weight": weight, "variant": "",
                    }  # fmt: skip
                    make_run(
                        path / f"{method}-{fraction:g}-{model}-s{seed}", rows,
                        experiment=experiment, num_params=params, seed=seed,
                    )  # fmt: skip
    return path


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(rows, **fields):
    """The rows with some fields of all of them replaced."""
    return [dataclasses.replace(row, **fields) for row in rows]
