"""The predictions of many runs as one small object for the page's browser of predictions.

May import dslt.metrics. Each distinct string is held once, and everything else points at it: runs
of a sweep share their problems, their labels and their teacher.
"""

import base64
import json
import zlib
from collections.abc import Sequence

from dslt.metrics import evaluate_equation, is_correct, normalize_text
from dslt.records import Prediction
from dslt.report.runs import Run


def browser_data(runs: Sequence[Run], titles: Sequence[str]) -> dict:
    """Columns of numbers that point into `strings`; -1 stands for None.

    `problems` has a column each for id, dataset, split, input and gold label. Each of `runs` has a
    `title` and columns of equal length: `problem`, the student's `answer` and `rationale`, the
    teacher's `teacher_answer` and `teacher_rationale`, `right` and `teacher_right` (1, 0; -1: not
    known), and `key` and `teacher_key`, equal where two answers are one.
    """
    strings: dict[str, int] = {}
    problems: dict[tuple, int] = {}
    columns: dict[str, list[int]] = {
        name: [] for name in ("id", "dataset", "split", "input", "gold")
    }

    def place(text: str | None) -> int:
        return -1 if text is None else strings.setdefault(text, len(strings))

    def problem(row: Prediction) -> int:
        values = (row.id, row.dataset, row.split, row.input, row.label)
        if values not in problems:
            problems[values] = len(problems)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(place(value))
        return problems[values]

    found = []
    for run, title in zip(runs, titles, strict=True):
        rows = run.predictions
        found.append({
            "title": title,
            "problem": [problem(p) for p in rows],
            "answer": [place(p.prediction) for p in rows],
            "rationale": [place(p.rationale) for p in rows],
            "teacher_answer": [place(p.teacher_label) for p in rows],
            "teacher_rationale": [place(p.teacher_rationale) for p in rows],
            "right": [judge(p.prediction, p) for p in rows],
            "teacher_right": [judge(p.teacher_label, p) for p in rows],
            "key": [place(answer_key(p.prediction, p.answer_form)) for p in rows],
            "teacher_key": [
                place(p.teacher_label and answer_key(p.teacher_label, p.answer_form)) for p in rows
            ],
        })  # fmt: skip
    return {"strings": list(strings), "problems": columns, "runs": found}


def judge(answer: str | None, row: Prediction) -> int:
    """1 where an answer to a row is right, 0 where it is wrong, -1 where nobody knows."""
    if answer is None or row.label is None:
        return -1
    return int(is_correct(answer, row.label, row.answer_form))


def answer_key(answer: str, answer_form: str) -> str:
    """Equal for answers that are one: equations by ten digits of their value, text normalised."""
    value = evaluate_equation(answer) if answer_form == "equation" else None
    return f"{value:.10g}" if value is not None else normalize_text(answer)


def packed(data: dict) -> str:
    """JSON, deflated, in base64: small, and without a character that HTML could misread."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")
