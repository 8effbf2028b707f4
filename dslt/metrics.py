"""Whether an answer is right: normalised text, arithmetic by value, accuracy with its error.

May import the standard library, numpy and dslt.errors; never JAX or TensorFlow, so that saved
predictions are scored again on any machine. Text that a model wrote is read by the parser below
and never evaluated as code.

    is_correct("(84 / 2)", "( 84.0 / 2.0 )", "equation")  # True
"""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Iterable

# Equal values differ by rounding alone (order of the operations), far below these. A quotient that
# was rounded when it was written down (`1.33` for 4 / 3) is another answer, and stays one; so are
# 1000000 and 1000001.
RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-6

# The longest label of SVAMP has 31 characters and four levels; a model that loops is cut off here.
MAX_EQUATION_CHARACTERS = 512
MAX_EQUATION_DEPTH = 32

_OPERATORS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_TOKEN = re.compile(
    r"\s*(?:\$\s*)?(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
    r"|\s*(?P<mark>[-+*/()])"
)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many answers of those with a known truth are right; counts, so that they can be added.

    Attributes:
      correct: answers that are right.
      total: answers that could be judged.
    """

    correct: int
    total: int

    @property
    def value(self) -> float | None:
        """The share that is right, in [0, 1]; None where nothing could be judged."""
        return self.correct / self.total if self.total else None

    @property
    def standard_error(self) -> float | None:
        """The binomial standard error of `value`: sqrt(p (1 - p) / n), over examples, not seeds."""
        if not self.total:
            return None
        return math.sqrt(self.value * (1 - self.value) / self.total)


def accuracy(is_correct_by_row: Iterable[bool | None]) -> Accuracy:
    """Counts the right answers; None, an answer without a known truth, is left out."""
    judged = [bool(is_right) for is_right in is_correct_by_row if is_right is not None]
    return Accuracy(correct=sum(judged), total=len(judged))


def is_correct(prediction: str, label: str, answer_form: str) -> bool:
    """Whether `prediction` answers what `label` does.

    Args:
      prediction: what was answered.
      label: the truth.
      answer_form: `text` compares with `normalize_text`; `equation` compares by value, within
        RELATIVE_TOLERANCE or ABSOLUTE_TOLERANCE, and two equations without a value never match.

    Raises:
      ValueError: for another answer form.
    """
    if answer_form == "text":
        return normalize_text(prediction) == normalize_text(label)
    if answer_form == "equation":
        predicted, true = evaluate_equation(prediction), evaluate_equation(label)
        if predicted is None or true is None:
            return False
        return math.isclose(predicted, true, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    raise ValueError(f"answer form is {answer_form!r}; expected 'text' or 'equation'")


def normalize_text(text: str) -> str:
    """Unicode's NFKC, as vocabularies have it, lower case, white space collapsed, one trailing
    period taken off."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(text.split()).removesuffix(".").rstrip()


def evaluate_equation(text: str) -> float | None:
    """The value of an arithmetic expression, or None where it has none.

    Legal are decimal numbers, `+ - * /`, parentheses and unary minus, by the usual precedence.
    Leniently read: white space, a final period, a dollar sign before a number, commas between
    groups of three digits (`1,000`), and `× · ÷ − –` for the operators. Anything else gives None:
    letters (`x` too: it is a variable as often as a sign), `=`, `%`, exponents, adjoining terms
    without an operator, unbalanced parentheses, a division by zero, a value that is no finite
    float, more than MAX_EQUATION_CHARACTERS or MAX_EQUATION_DEPTH.
    """
    tokens = _tokenize(text)
    if tokens is None:
        return None
    try:
        value, end = _parse_sum(tokens, 0, 0)
    except (_NotArithmetic, ZeroDivisionError, OverflowError):
        return None
    return value if end == len(tokens) and math.isfinite(value) else None


def normalize_equation(text: str) -> str | None:
    """The expression in SVAMP's spelling, `( 84 / 2 )`: or None where `evaluate_equation` has none.

    Tokens stand apart by one space, numbers lose `$` and commas, and an expression with an
    operator stands in parentheses. Nothing is computed, and no inner parenthesis is added.
    """
    tokens = _tokenize(text)
    if tokens is None or evaluate_equation(text) is None:
        return None
    if len(tokens) > 1 and not _is_wrapped(tokens):
        tokens = ["(", *tokens, ")"]
    return " ".join(tokens)


class _NotArithmetic(Exception):
    """The tokens form no expression."""


def _tokenize(text: str) -> list[str] | None:
    """Splits into numbers (without `$` and commas) and marks; None where something else stands."""
    text = text.strip().removesuffix(".").rstrip().translate(_OPERATORS)
    if not text or len(text) > MAX_EQUATION_CHARACTERS:
        return None
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        number = match["number"]
        tokens.append(number.replace(",", "").removesuffix(".") if number else match["mark"])
        position = match.end()
    return tokens


def _parse_sum(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    """sum = product (('+' | '-') product)*; returns its value and the position behind it."""
    value, position = _parse_product(tokens, position, depth)
    while position < len(tokens) and tokens[position] in "+-":
        right, end = _parse_product(tokens, position + 1, depth)
        value = value + right if tokens[position] == "+" else value - right
        position = end
    return value, position


def _parse_product(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    """product = factor (('*' | '/') factor)*"""
    value, position = _parse_factor(tokens, position, depth)
    while position < len(tokens) and tokens[position] in "*/":
        right, end = _parse_factor(tokens, position + 1, depth)
        value = value * right if tokens[position] == "*" else value / right
        position = end
    return value, position


def _parse_factor(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    """factor = number | '-' factor | '(' sum ')'"""
    if position >= len(tokens) or depth > MAX_EQUATION_DEPTH:
        raise _NotArithmetic
    token = tokens[position]
    if token == "-":
        value, position = _parse_factor(tokens, position + 1, depth + 1)
        return -value, position
    if token == "(":
        value, position = _parse_sum(tokens, position + 1, depth + 1)
        if position >= len(tokens) or tokens[position] != ")":
            raise _NotArithmetic
        return value, position + 1
    if token in "+*/)":
        raise _NotArithmetic
    return float(token), position + 1


def _is_wrapped(tokens: list[str]) -> bool:
    """Whether the first token's parenthesis is closed by the last token alone."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if depth == 0:
            return index == len(tokens) - 1
    return False
