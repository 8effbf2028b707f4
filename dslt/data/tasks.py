"""The SeqIO Tasks and Mixtures of the records at hand, usable by any SeqIO tool.

May import SeqIO and TensorFlow; nothing outside the data wing imports this module, and in it only
the token cache's builder does.

    index = scan_records("records.jsonl")
    register_tasks(index, load_vocabulary("spiece.model"), TaskSettings())
    seqio.get_mixture_or_task("svamp_label").get_dataset({"inputs": 1024, "targets": 256}, "train")
"""

import collections
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from dslt import metrics
from dslt.data.preprocessors import task_preprocessors, text_dataset
from dslt.data.target_layout import label_of
from dslt.data.token_cache import LABEL_TASK, TASKS, RecordsIndex, TaskSettings, task_name
from dslt.data.vocabulary import (
    BYTE_OFFSET,
    NUM_BYTE_IDS,
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from dslt.errors import InputError
from dslt.records import read_examples

_ours: set[str] = set()  # SeqIO's registries are global: what in them may be replaced


def register_tasks(
    index: RecordsIndex, vocabulary: Vocabulary, settings: TaskSettings
) -> list[str]:
    """Registers `<dataset>_label` and `<dataset>_rationale` for each dataset of a records file.

    A Task has the splits in which at least one example has its target; one without any is not
    registered. Registering again replaces the Tasks that were registered here, so that other
    settings take effect.

    Returns:
      the names of the Tasks.

    Raises:
      InputError: a name is taken by somebody else's Task or Mixture.
    """
    answer = functools.partial(_to_answer, layout=settings.target_layout)
    feature = seqio.Feature(vocabulary=seqio_vocabulary(vocabulary), add_eos=True)
    names = []
    for dataset in index.datasets:
        for task in TASKS:
            name = task_name(dataset, task)
            _make_way(name, seqio.TaskRegistry, seqio.MixtureRegistry)
            examples = index.task_examples(dataset, task, settings)
            if not examples:
                continue
            seqio.TaskRegistry.add(
                name,
                source=_source(index, dataset, task, settings, examples),
                preprocessors=task_preprocessors(task, settings),
                output_features={"inputs": feature, "targets": feature},
                postprocess_fn=answer if task == LABEL_TASK else None,
                metric_fns=[label_accuracy if task == LABEL_TASK else rationale_overlap],
            )
            names.append(name)
    return names


def register_mixtures(name: str, rates: Mapping[str, float | None]) -> list[str]:
    """Registers the Mixtures `<name>_label` and `<name>_rationale` over registered datasets.

    Args:
      name: what the Mixtures are called.
      rates: dataset to rate; None stands for the number of examples its label Task trains on.
        Both Mixtures get the same rates; a dataset without rationales is in the first alone.
    """
    registered = seqio.TaskRegistry.names()
    missing = [dataset for dataset in rates if task_name(dataset, LABEL_TASK) not in registered]
    if missing:
        raise InputError(f"no Tasks are registered for {', '.join(missing)}; register them first")
    filled = {
        dataset: seqio.TaskRegistry.get(task_name(dataset, LABEL_TASK)).num_input_examples("train")
        if rate is None
        else rate
        for dataset, rate in rates.items()
    }
    names = []
    for task in TASKS:
        members = [(task_name(dataset, task), float(rate)) for dataset, rate in filled.items()]
        members = [member for member in members if member[0] in registered]
        if members:
            names.append(task_name(name, task))
            _make_way(names[-1], seqio.MixtureRegistry, seqio.TaskRegistry)
            seqio.MixtureRegistry.add(names[-1], members)
    return names


def seqio_vocabulary(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """SeqIO's counterpart, which gives the same ids for the same text."""
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=NUM_BYTE_IDS - BYTE_OFFSET - 256)
    if isinstance(vocabulary, TokenizerVocabulary):
        return _SeqioTokenizerVocabulary(vocabulary)
    if isinstance(vocabulary, SentencePieceVocabulary):
        return _seqio_sentencepiece(vocabulary)
    raise TypeError(f"{type(vocabulary).__name__} has no counterpart in SeqIO")


def label_accuracy(targets: Sequence[tuple[str, str]], predictions: Sequence[str]) -> dict:
    """The share of answers that are right, in [0, 1]; targets are (answer, answer form)."""
    is_correct = [
        metrics.is_correct(prediction, label, answer_form)
        for (label, answer_form), prediction in zip(targets, predictions, strict=True)
    ]
    return {"accuracy": float(np.mean(is_correct))}


def rationale_overlap(targets: Sequence[str], predictions: Sequence[str]) -> dict:
    """The mean F1 of the words that explanations share, in [0, 1]: nearness, not truth.

    Source: the word overlap of SQuAD (Rajpurkar et al. 2016), with dslt's own normalisation.
    """
    pairs = zip(targets, predictions, strict=True)
    return {"word_f1": float(np.mean([_word_f1(*pair) for pair in pairs]))}


def _word_f1(target: str, prediction: str) -> float:
    target, prediction = (
        collections.Counter(metrics.normalize_text(text).split()) for text in (target, prediction)
    )
    total = target.total() + prediction.total()
    return 2 * (target & prediction).total() / total if total else 1.0


def _to_answer(decoded: str, example: dict, is_target: bool, layout: str) -> str | tuple[str, str]:
    """What `label_accuracy` compares; held-out targets are labels alone whatever the layout."""
    if is_target:
        return decoded, example["answer_form"].decode()
    return label_of(decoded, layout)


def _source(
    index: RecordsIndex, dataset: str, task: str, settings: TaskSettings, examples: dict[str, int]
) -> seqio.FunctionDataSource:
    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one file in its own order
        read = functools.partial(read_examples, index.path)
        return text_dataset(read, dataset, split, task, settings)

    return seqio.FunctionDataSource(dataset_fn, tuple(examples), num_input_examples=examples)


def _make_way(name: str, registry: type, other_registry: type) -> None:
    """Takes our own earlier registration of a name out of one of SeqIO's two registries."""
    is_taken = name in registry.names()
    if name in other_registry.names() or (is_taken and name not in _ours):
        raise InputError(
            f"SeqIO already has a Task or Mixture {name!r} that is not to be replaced; rename the "
            "dataset or the mixture"
        )
    if is_taken:
        registry.remove(name)
    _ours.add(name)


def _seqio_sentencepiece(vocabulary: SentencePieceVocabulary) -> seqio.SentencePieceVocabulary:
    # extra_ids=0: SeqIO would read "<extra_id_0>" in a text as the sentinel.
    wrapped = seqio.SentencePieceVocabulary(str(vocabulary.path), extra_ids=0)
    if wrapped.tokenizer.serialized_model_proto() != vocabulary.model_proto:
        raise InputError(
            f"{vocabulary.path}: was read by SeqIO earlier in this process and has changed since, "
            "and SeqIO keeps what it read; give the new vocabulary another path"
        )
    return wrapped


class _SeqioTokenizerVocabulary(seqio.Vocabulary):
    """A Hugging Face tokenizer as SeqIO wants it; in TensorFlow it calls back into Python."""

    def __init__(self, vocabulary: TokenizerVocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int | None:
        return self._vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array when run eagerly
            text = np.asarray(text, object).item().decode("utf-8")
            return np.array(self._vocabulary.encode(text), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(row: np.ndarray) -> str:
            return self._vocabulary.decode(row.tolist())

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), [])

    def __eq__(self, other: object) -> bool:
        is_same_kind = isinstance(other, _SeqioTokenizerVocabulary)
        return is_same_kind and self._vocabulary.digest == other._vocabulary.digest
