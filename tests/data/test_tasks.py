"""The Tasks and Mixtures as plain SeqIO uses them."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from dslt.data.tasks import (
    label_accuracy,
    rationale_overlap,
    register_mixtures,
    register_tasks,
    seqio_vocabulary,
)
from dslt.data.token_cache import TaskSettings, scan_records
from dslt.data.vocabulary import load_vocabulary
from dslt.errors import InputError
from dslt.records import Example, write_rows

LENGTHS = {"inputs": 128, "targets": 128}


@pytest.fixture
def registered(records_path, vocabulary):
    return register_tasks(scan_records(records_path), vocabulary, TaskSettings())


def dataset_of(name, split="train", lengths=LENGTHS):
    task = seqio.get_mixture_or_task(name)
    return list(task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator())


def test_label_task_gives_the_prefixed_input_and_the_gold_label(registered, examples, vocabulary):
    assert registered == ["sums_label", "sums_rationale"]
    rows = dataset_of("sums_label")
    expected = [e for e in examples if e.split == "train" and e.label is not None]
    assert [row["id"].decode() for row in rows] == [example.id for example in expected]
    for row, example in zip(rows, expected, strict=True):
        assert row["inputs_pretokenized"].decode() == "predict: " + example.input
        assert row["inputs"].tolist() == [*vocabulary.encode("predict: " + example.input), 1]
        assert row["targets"].tolist() == [*vocabulary.encode(example.label), 1]


def test_rationale_task_has_the_examples_that_have_one(registered, examples, vocabulary):
    rows = dataset_of("sums_rationale", "validation")
    expected = [e for e in examples if e.split == "validation" and e.rationale]
    assert [row["id"].decode() for row in rows] == [example.id for example in expected]
    assert rows[0]["inputs"].tolist() == [*vocabulary.encode("explain: " + expected[0].input), 1]
    assert rows[0]["targets"].tolist() == [*vocabulary.encode(expected[0].rationale), 1]


def test_truncation_keeps_eos_last(registered):
    rows = dataset_of("sums_label", lengths={"inputs": 9, "targets": 4})
    assert {len(row["inputs"]) for row in rows} == {9}
    assert all(row["inputs"][-1] == 1 and row["targets"][-1] == 1 for row in rows)


def test_teacher_labels_are_learnt_but_never_judged_by(records_path, vocabulary, examples):
    settings = TaskSettings(label_source="teacher", input_prefix_label="[label] ")
    register_tasks(scan_records(records_path), vocabulary, settings)
    rows = dataset_of("sums_label")
    expected = [e for e in examples if e.split == "train" and e.teacher_label is not None]
    assert [r["targets_pretokenized"].decode() for r in rows] == [e.teacher_label for e in expected]
    assert rows[0]["inputs_pretokenized"].decode().startswith("[label] Ann")
    held_out = dataset_of("sums_label", "test")
    gold = [e.label for e in examples if e.split == "test" and e.label is not None]
    assert [r["targets_pretokenized"].decode() for r in held_out] == gold


def test_registering_again_replaces_and_takes_away(records_path, vocabulary, tmp_path):
    index = scan_records(records_path)
    register_tasks(index, vocabulary, TaskSettings())
    write_rows(tmp_path / "r.jsonl", [Example("1", "sums", "train", "what ?", label="4")])
    register_tasks(scan_records(tmp_path / "r.jsonl"), vocabulary, TaskSettings())
    assert len(dataset_of("sums_label")) == 1
    assert "sums_rationale" not in seqio.TaskRegistry.names()


def test_somebody_elses_task_is_not_replaced(records_path, vocabulary, tmp_path):
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"])
    seqio.TaskRegistry.add("theirs_label", source, output_features={})
    write_rows(tmp_path / "r.jsonl", [Example("1", "theirs", "train", "what ?", label="4")])
    with pytest.raises(InputError, match="theirs_label"):
        register_tasks(scan_records(tmp_path / "r.jsonl"), vocabulary, TaskSettings())
    assert seqio.TaskRegistry.get("theirs_label").source is source


def test_a_mixture_may_not_be_called_as_a_dataset(registered):
    with pytest.raises(InputError, match="sums_label"):
        register_mixtures("sums", {"sums": 1.0})
    with pytest.raises(InputError, match="nowhere"):
        register_mixtures("all", {"nowhere": 1.0})


def test_a_vocabulary_that_changed_under_seqio_is_told(vocabulary, tmp_path):
    from dslt.data.vocabulary import train_sentencepiece

    path = tmp_path / "spiece.model"
    seqio_vocabulary(train_sentencepiece(["ann has two hats"], 40, path)).encode("ann")
    changed = train_sentencepiece(["bob wants three more"], 40, path)
    with pytest.raises(InputError, match="changed since"):
        seqio_vocabulary(changed)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer", "bytes"])
def test_seqios_vocabulary_gives_the_same_ids(kind, vocabulary, tmp_path):
    if kind == "bytes":
        vocabulary = load_vocabulary("bytes")
    if kind == "tokenizer":
        import tokenizers

        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁Ann", -1.0)]
        pieces += [(letter, -3.0) for letter in "▁ahst</>"]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        vocabulary = load_vocabulary(tmp_path)
    theirs = seqio_vocabulary(vocabulary)
    for text in ("Ann has hats", "", "a\nb  c", "日本 ½ é", "</s> <extra_id_3> <pad>", "%s {0}"):
        ids = vocabulary.encode(text)
        assert list(theirs.encode(text)) == ids
        assert theirs.encode_tf(tf.constant(text)).numpy().tolist() == ids
        if 2 not in ids:
            assert theirs.decode([*ids, 1, 5]) == vocabulary.decode([*ids, 1, 5])
    assert theirs == seqio_vocabulary(vocabulary)


def test_mixtures_follow_their_rates(registered, second_records_path, vocabulary):
    register_tasks(scan_records(second_records_path), vocabulary, TaskSettings())
    names = register_mixtures("all", {"sums": 3.0, "more": 1.0})
    assert names == ["all_label", "all_rationale"]
    mixture = seqio.get_mixture_or_task("all_label")
    assert mixture.get_rate(seqio.get_mixture_or_task("sums_label")) == 3.0
    rows = mixture.get_dataset(LENGTHS, "train", shuffle=False).take(8).as_numpy_iterator()
    assert all(set(row) == {"inputs", "targets"} for row in rows)
    register_mixtures("all", {"sums": None, "more": None})
    rates = seqio.get_mixture_or_task("all_rationale").rate_per_task_name
    assert rates == {"sums_rationale": 52.0, "more_rationale": 18.0}


def test_seqios_evaluator_judges_labels_by_value(registered, vocabulary):
    evaluator = seqio.Evaluator(
        "sums_label",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        use_memory_cache=False,
    )

    def predict(dataset):
        """The terms swapped, which is right by value; the first answer wrong, the second empty."""
        answers = []
        for index, row in dataset.as_numpy_iterator():
            _, a, _, b, _ = vocabulary.decode(row["decoder_target_tokens"]).split()
            text = ["( 1 + 1 )", "", f"( {b} + {a} )"][min(index, 2)]
            tokens = [*vocabulary.encode(text), 1]
            answers.append((index, tokens + [0] * (40 - len(tokens))))
        return answers

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    assert metrics.result()["sums_label"]["accuracy"] == pytest.approx(6 / 8)


def test_metrics_by_hand():
    targets = [("yes", "text"), ("( 4 / 2 )", "equation"), ("no", "text")]
    assert label_accuracy(targets, ["Yes", "2", "yes"]) == {"accuracy": pytest.approx(2 / 3)}
    overlap = rationale_overlap(["bob has two hats", "a"], ["bob has three", ""])
    assert overlap == {"word_f1": pytest.approx((2 * 2 / 7 + 0) / 2)}
    assert np.isclose(rationale_overlap(["same words"], ["same words"])["word_f1"], 1)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="label_source is 'golden'; expected one of gold, teacher"):
        TaskSettings(label_source="golden")
    with pytest.raises(InputError, match="max_target_length is 1"):
        dataclasses.replace(TaskSettings(), max_target_length=1)
