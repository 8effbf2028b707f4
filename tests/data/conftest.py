"""Small records, a vocabulary trained on them, and one token cache for all tests of a session."""

import dataclasses

import pytest

from dslt.data.pipeline import DataConfig
from dslt.data.vocabulary import train_sentencepiece
from dslt.records import Example, write_rows


def make_examples(
    dataset: str, name: str, train: int, validation: int = 0, test: int = 0
) -> list[Example]:
    """Sums of two numbers; every fifth has no rationale, every seventh no gold label."""
    examples = []
    for split, number in (("train", train), ("validation", validation), ("test", test)):
        for i in range(number):
            a, b = i % 13 + 2, i % 7 + 3
            examples.append(
                Example(
                    id=f"{split}-{i}",
                    dataset=dataset,
                    split=split,
                    input=f"{name} has {a} hats.\nBob has {b} more. "
                    + "How many now? " * (i % 4 + 1),
                    label=None if i % 7 == 6 else f"( {a} + {b} )",
                    teacher_label=None if i % 11 == 10 else f"( {b} + {a} )",
                    rationale=None if i % 5 == 4 else f"Bob adds {b} to {a}. " * (i % 3 + 1),
                    answer_form="equation",
                )
            )
    return examples


@pytest.fixture(scope="session")
def examples():
    return make_examples("sums", "Ann", train=60, validation=9, test=8)


@pytest.fixture(scope="session")
def records_path(examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "sums.jsonl"
    write_rows(path, examples)
    return path


@pytest.fixture(scope="session")
def second_records_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "more.jsonl"
    write_rows(path, make_examples("more", "Bob", train=20))
    return path


@pytest.fixture(scope="session")
def vocabulary(examples, tmp_path_factory):
    texts = [
        text
        for example in examples
        for text in (f"predict: {example.input}", f"explain: {example.rationale}", "( 1 + 0 )")
    ]
    return train_sentencepiece(texts, 120, tmp_path_factory.mktemp("vocabulary") / "spiece.model")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def config(records_path, vocabulary):
    return DataConfig(
        records=(str(records_path),), vocabulary=str(vocabulary.path), batch_examples=4
    )


@pytest.fixture(scope="session")
def mixed_config(config, second_records_path):
    return dataclasses.replace(config, records=(*config.records, str(second_records_path)))
