"""What `dslt evaluate` says of labels that nothing can match."""

import pytest

from dslt.commands.evaluate import warn_of_labels
from dslt.data.vocabulary import ByteVocabulary
from dslt.evaluate import EvalConfig
from dslt.records import EvalInput, Example


def examples(labels: list[str | None], form: str = "text") -> list[EvalInput]:
    return [
        EvalInput(Example(str(i), "d", "test", "?", label, answer_form=form), (), (), False)
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("labels", "form", "says"),
    [
        (["yes", "Yes.", None, "é" * 4 + "a"], "text", []),
        (["yes", "é" * 5, None], "text", ["1 of 2 gold labels have more tokens than max_label_le"]),
        (["1 + 2", "50%"], "equation", ["1 of 2 gold labels, such as '50%', are not what their"]),
        (["50%", "1" * 10], "equation", ["1 of 2 gold labels have", "1 of 2 gold labels, such"]),
    ],
)
def test_labels_that_no_answer_can_match_are_counted(labels, form, says):
    config = EvalConfig(max_label_length=9)  # at its end without EOS
    found = warn_of_labels(examples(labels, form), config, ByteVocabulary())
    assert len(found) == len(says)
    for line, part in zip(found, says, strict=True):
        assert line.startswith("warning: ") and part in line


def test_of_a_set_every_answer_can_be_given():
    config = EvalConfig(answers="likelihood", max_label_length=2)
    assert warn_of_labels(examples(["long"]), config, ByteVocabulary()) == []
