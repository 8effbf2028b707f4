import math
import unicodedata

import pytest

from dslt.data.vocabulary import train_sentencepiece
from dslt.metrics import (
    MAX_EQUATION_CHARACTERS,
    MAX_EQUATION_DEPTH,
    Accuracy,
    accuracy,
    evaluate_equation,
    is_correct,
    normalize_equation,
    normalize_text,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 84.0 / 2.0 )", 42.0),
        ("(84 / 2)", 42.0),
        ("84/2", 42.0),
        ("(17 + 15 + 2)", 34.0),
        ("( ( 17.0 + 15.0 ) + 2.0 )", 34.0),
        ("2 + 3 * 4", 14.0),
        ("20 - 8 - 4", 8.0),  # from the left
        ("16 / 4 / 2", 2.0),
        ("(12 - 2) - 7.", 3.0),
        ("-(3 - 5) * 2", 4.0),
        ("3 - -2", 5.0),
        ("$5", 5.0),
        ("$ 5 + $1,000", 1005.0),
        ("1,234,567", 1234567.0),
        (".5 × 4 ÷ 2 − 1", 0.0),
        ("5.", 5.0),
    ],
)
def test_equation_has_the_value_that_a_hand_gives_it(text, value):
    assert evaluate_equation(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "()", "(", ")", "(1", "1)", "1 +", "* 2", "+5", "3 4", "(1)(2)", "1 / 0",
        "1 / (2 - 2)", "(175, 5)", "(14, 21)", "11,21", "1.2.3", "1e5", "5%", "2 ** 3", "7 // 2",
        "(23 + x)", "(some - 8)", "7x = 14", "84 / 2 = 42", "None", "__import__('os')", "٣ + ١",
        "9" * 400,
    ],
)  # fmt: skip
def test_nonsense_has_no_value(text):
    assert evaluate_equation(text) is None
    assert normalize_equation(text) is None


def test_length_and_depth_are_bounded():
    just_fits = "(" * MAX_EQUATION_DEPTH + "1" + ")" * MAX_EQUATION_DEPTH
    assert evaluate_equation(just_fits) == 1.0
    assert evaluate_equation(f"({just_fits})") is None
    assert evaluate_equation("-" * (MAX_EQUATION_DEPTH + 1) + "1") is None
    assert evaluate_equation("1" + "+1" * ((MAX_EQUATION_CHARACTERS - 1) // 2)) == 256.0
    assert evaluate_equation("1" + "+1" * (MAX_EQUATION_CHARACTERS // 2)) is None
    assert evaluate_equation("(" * 100_000) is None


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("(84/2)", "( 84 / 2 )"),
        ("84 / 2.", "( 84 / 2 )"),
        ("(12 - 2) - 7", "( ( 12 - 2 ) - 7 )"),
        ("(1 + 2) * (3 + 4)", "( ( 1 + 2 ) * ( 3 + 4 ) )"),
        ("$1,000 × 2", "( 1000 * 2 )"),
        ("42", "42"),
    ],
)
def test_normal_equation_is_spelt_as_the_gold_labels_are(text, normal):
    assert normalize_equation(text) == normal
    assert normalize_equation(normal) == normal
    assert evaluate_equation(normal) == evaluate_equation(text)


def test_text_is_compared_without_case_space_and_final_period():
    assert normalize_text("  Math \n problem. ") == "math problem"
    assert is_correct("Entailment.", "entailment", "text")
    assert not is_correct("not entailment", "entailment", "text")
    assert not is_correct("42", "( 84 / 2 )", "text")


@pytest.mark.parametrize("label", ["cafe\u0301", "½", "１２", "ﬁne", "x²", "é…"])
def test_a_label_is_what_a_vocabulary_makes_of_it(label, tmp_path):
    """SentencePiece reads and writes NFKC, whatever a table has."""
    texts = [unicodedata.normalize("NFKC", label)] * 20 + ["some words to fill a vocabulary"] * 20
    vocabulary = train_sentencepiece(texts, 160, tmp_path / "spiece.model")
    assert is_correct(vocabulary.decode(vocabulary.encode(label)), label, "text")


def test_equations_are_compared_by_value():
    assert is_correct("2 * 21", "( 84.0 / 2.0 )", "equation")
    assert is_correct("0.1 + 0.2", "0.3", "equation")  # differ in the 17th digit
    assert is_correct("(1 / 3) * 3000000", "1000000", "equation")
    assert not is_correct("1.33", "( 4 / 3 )", "equation")
    assert not is_correct("41", "( 84 / 2 )", "equation")
    assert not is_correct("1000001", "1000000", "equation")


def test_two_equations_without_a_value_do_not_match():
    assert not is_correct("x", "x", "equation")
    assert not is_correct("1 / 0", "1 / 0", "equation")


def test_unknown_answer_form_is_refused():
    with pytest.raises(ValueError, match="equations"):
        is_correct("1", "1", "equations")


def test_accuracy_counts_what_can_be_judged_and_gives_its_binomial_error():
    counted = accuracy([True, False, None, True, True])
    assert counted == Accuracy(correct=3, total=4)
    assert counted.value == 0.75
    assert counted.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_accuracy_of_nothing_is_unknown_not_zero():
    assert accuracy([None]).value is None
    assert accuracy([]).standard_error is None
