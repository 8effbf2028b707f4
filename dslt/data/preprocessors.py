"""What a Task does to a record: which text it learns, and the SeqIO steps to tokens.

May import SeqIO and TensorFlow, `dslt.records` and `dslt.data.token_cache`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import seqio
import tensorflow as tf

from dslt.data.token_cache import TaskSettings, target_texts
from dslt.records import Example

CHUNK_EXAMPLES = 1024  # texts handed to TensorFlow at a time: one by one is ten times slower

TEXT_FEATURES = {
    "inputs": tf.TensorSpec([None], tf.string),
    "targets": tf.TensorSpec([None], tf.string),
    "id": tf.TensorSpec([None], tf.string),
    "row": tf.TensorSpec([None], tf.int64),
    "answer_form": tf.TensorSpec([None], tf.string),
    "weight": tf.TensorSpec([None], tf.float32),
}


def text_dataset(
    read: Callable[[], Iterable[Example]],
    dataset: str,
    split: str,
    task: str,
    settings: TaskSettings,
) -> tf.data.Dataset:
    """The texts of one Task and split in the order of the records; `row` counts all records.

    An example with several rationales comes once for each, with the `weight` of its tokens.
    """

    def chunks() -> Iterator[dict]:
        rows = []
        for row, example in enumerate(read()):
            if (example.dataset, example.split) != (dataset, split):
                continue
            for text, weight in target_texts(example, task, settings):
                rows.append((example.input, text, example.id, row, example.answer_form, weight))
            if len(rows) >= CHUNK_EXAMPLES:
                yield _columns(rows)
                rows = []
        if rows:
            yield _columns(rows)

    return tf.data.Dataset.from_generator(chunks, output_signature=TEXT_FEATURES).unbatch()


def task_preprocessors(task: str, settings: TaskSettings) -> list[Callable]:
    """Prefix, tokens, and an EOS that outlives truncation; SeqIO can cache the tokens."""
    return [
        functools.partial(add_prefix, prefix=settings.prefix(task)),
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),  # SeqIO's own caching job writes what comes to here
        seqio.preprocessors.append_eos_after_trim,
    ]


@seqio.map_over_dataset
def add_prefix(example: dict, prefix: str) -> dict:
    """Puts the task's prefix before `inputs`."""
    return {**example, "inputs": tf.strings.join([prefix, example["inputs"]])}


def _columns(rows: list[tuple]) -> dict:
    columns = zip(*rows, strict=True)
    return {
        name: list(column)
        if spec.dtype == tf.string
        else np.array(column, spec.dtype.as_numpy_dtype)
        for (name, spec), column in zip(TEXT_FEATURES.items(), columns, strict=True)
    }
