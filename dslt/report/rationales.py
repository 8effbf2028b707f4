"""How good a student's rationales are: length, overlap with the teacher's, and their own answer.

May import dslt.metrics and dslt.teacher.parse; sacreBLEU and rouge-score. Overlap is none of
correctness: a rationale may say the same in other words.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from dslt.metrics import evaluate_equation
from dslt.records import Prediction
from dslt.teacher.parse import (
    EQUATION,
    FORM_BY_DATASET,
    TEXT,
    AnswerForm,
    choices_in,
    parse_completion,
    same_answer,
)

_ARITHMETIC = re.compile(r"[-+*/×÷−().\d$,\s]+")
_OPERATION = re.compile(r"\d[\s)]*[-+*/×÷−]")
_SPOKEN = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
_SPOKEN_OPERATOR = re.compile(rf"\b({'|'.join(_SPOKEN)})\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RationaleQuality:
    """Over the test rows of one run and one dataset that have a rationale of the student's.

    Attributes:
      rows: so many; `empty` of them say nothing.
      words: mean number of the student's; `teacher_words` of the teacher's on the same rows.
      chrf: corpus chrF2 against the teacher's, in [0, 100]; None where the teacher has none.
      rouge_l: mean F of ROUGE-L against the teacher's, in [0, 1], on English letters and digits.
      stated: rows whose rationale names an answer of its own.
      agreeing: of those, rows whose named answer is the label that the student gives.
    """

    rows: int
    empty: int
    words: float
    teacher_words: float | None
    chrf: float | None
    rouge_l: float | None
    stated: int
    agreeing: int


def quality(rows: Sequence[Prediction]) -> RationaleQuality | None:
    """None where no row has a rationale."""
    rows = [p for p in rows if p.rationale is not None]
    if not rows:
        return None
    compared = [(p.rationale, p.teacher_rationale) for p in rows if p.teacher_rationale]
    chrf, rouge_l = overlap(compared) if compared else (None, None)
    labels = tuple(sorted({p.label for p in rows if p.label}))
    named = [(own_answer(p.rationale, p, labels), p) for p in rows]
    stated = [(answer, form, p) for (answer, form), p in named if answer is not None]
    return RationaleQuality(
        rows=len(rows),
        empty=sum(not p.rationale.strip() for p in rows),
        words=float(np.mean([len(p.rationale.split()) for p in rows])),
        teacher_words=float(np.mean([len(t.split()) for _, t in compared])) if compared else None,
        chrf=chrf,
        rouge_l=rouge_l,
        stated=len(stated),
        agreeing=sum(same_answer(answer, p.prediction, form) for answer, form, p in stated),
    )


def overlap(pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """(chrF2 of the corpus, mean ROUGE-L F) of (student, teacher) texts."""
    from sacrebleu.metrics import CHRF

    students, teachers = [student for student, _ in pairs], [teacher for _, teacher in pairs]
    scores = [_rouge_l(student, teacher) for student, teacher in pairs]
    return CHRF().corpus_score(students, [teachers]).score, float(np.mean(scores))


@functools.cache  # runs of one sweep repeat each other's texts
def _rouge_l(student: str, teacher: str) -> float:
    return _rouge_scorer().score(teacher, student)["rougeL"].fmeasure


@functools.cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # 2 s, for NLTK

    return RougeScorer(["rougeL"], use_stemmer=False)


def own_answer(
    rationale: str, row: Prediction, labels: Sequence[str] = ()
) -> tuple[str | None, AnswerForm]:
    """The answer that a rationale itself gives, or None; and the form in which it compares.

    Behind a mark (`So the answer is`) it is what the teacher's parser finds there. Otherwise it is
    the last that the text names: of the choices that the input lists, of `labels` where these are
    few, or of the arithmetic with an operator in it, a spoken one too (`3 times 4`). A text that
    names nothing answers nothing.

    Args:
      labels: all gold labels of the dataset.
    """
    choices = choices_in(row.input)
    form = FORM_BY_DATASET.get(row.dataset)
    if form is None:
        form = EQUATION if row.answer_form == "equation" else TEXT
        if choices:
            form = AnswerForm("choice")
        elif form is TEXT and 1 < len(labels) <= 10:
            form = AnswerForm("label", tuple(labels))
    marked = parse_completion(f"{rationale}\n", form, choices, finish_reason="stop")
    if marked.answer is not None:
        return marked.answer, form
    if form.kind == "equation":
        written = _SPOKEN_OPERATOR.sub(lambda word: _SPOKEN[word[1].lower()], rationale)
        found = [text.strip(" ,.$") for text in _ARITHMETIC.findall(written)]
        sums = [text for text in found if _OPERATION.search(text)]
        sums = [text for text in sums if evaluate_equation(text) is not None]
        return (sums[-1] if sums else None), form
    named = [*choices] if form.kind == "choice" else [*form.labels]
    last = {name: _last_place(name, rationale) for name in named}
    best = max(last, key=lambda name: (last[name], len(name)), default=None)
    return (best if best is not None and last[best] >= 0 else None), form


def _last_place(name: str, text: str) -> int:
    """Where `name` ends in `text`, as whole words and in any case, for the last time; -1: never."""
    return max((found.end() for found in _whole_words(name).finditer(text)), default=-1)


@functools.cache
def _whole_words(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name.strip())}(?!\w)", re.IGNORECASE)
