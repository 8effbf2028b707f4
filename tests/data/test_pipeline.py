"""From records to batches: which examples, in which order, with which tokens."""

import dataclasses
import itertools

import numpy as np
import pytest

from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE, BatchCounts, count_targets
from dslt.data.pipeline import (
    TrainStream,
    eval_inputs,
    make_vocabulary,
    read_eval_inputs,
    records_digests,
)
from dslt.data.vocabulary import load_vocabulary
from dslt.errors import InputError
from dslt.records import Example, Rationale, write_rows


def open_stream(config, cache_dir, *, seed=0, use_rationales=True):
    config = dataclasses.replace(config, cache_dir=str(cache_dir))
    vocabulary = load_vocabulary(config.vocabulary)
    return TrainStream(config, vocabulary, seed=seed, use_rationales=use_rationales)


@pytest.fixture(scope="module")
def stream(config, cache_dir):
    return open_stream(config, cache_dir)


def segments_of(batch):
    """(source tokens, target tokens, role) of every segment."""
    for row, ids in enumerate(batch.encoder_segment_ids):
        for segment in range(1, ids.max() + 1):
            is_target = batch.decoder_segment_ids[row] == segment
            yield (
                tuple(batch.encoder_input_tokens[row][ids == segment].tolist()),
                tuple(batch.decoder_target_tokens[row][is_target].tolist()),
                int(batch.decoder_loss_roles[row][is_target][0]),
            )


def expected_segments(examples, vocabulary, use_rationales=True, label="label"):
    def tokens(text):
        return (*vocabulary.encode(text), 1)

    for example in examples:
        yield tokens("predict: " + example.input), tokens(getattr(example, label)), ROLE_LABEL
        if use_rationales and example.rationale:
            yield tokens("explain: " + example.input), tokens(example.rationale), ROLE_RATIONALE


def test_with_a_shared_encoder_each_source_comes_once(config, cache_dir, examples, vocabulary):
    """A segment holds the bare input and both targets; the start token tells them apart."""
    prefixes = {"input_prefix_label": "", "input_prefix_rationale": ""}
    config = dataclasses.replace(config, shared_encoder=True, **prefixes)
    stream = open_stream(config, cache_dir)
    by_id = {f"{example.dataset}/{example.id}": example for example in examples}

    def tokens(text):
        return [*vocabulary.encode(text), 1]

    for step in range(4):
        batch = stream.batch(step)
        found = []
        for row, ids in enumerate(batch.encoder_segment_ids):
            for segment in range(1, ids.max() + 1):
                segment_targets = []
                for role, start in ((ROLE_LABEL, 0), (ROLE_RATIONALE, 1)):
                    mine = (batch.decoder_segment_ids[row] == segment) & (
                        batch.decoder_loss_roles[row] == role
                    )
                    target = batch.decoder_target_tokens[row][mine].tolist()
                    inputs = batch.decoder_input_tokens[row][mine].tolist()
                    assert inputs == ([start, *target[:-1]] if target else [])
                    segment_targets.append(target)
                found.append(
                    (batch.encoder_input_tokens[row][ids == segment].tolist(), *segment_targets)
                )
        chosen = [by_id[name] for name in stream.examples(step)]
        expected = [
            (tokens(e.input), tokens(e.label), tokens(e.rationale) if e.rationale else [])
            for e in chosen
        ]
        assert sorted(found) == sorted(expected)
        assert stream.counts(step) == counts_of(batch)


@pytest.fixture(scope="module")
def several_config(config, examples, tmp_path_factory):
    """Records of which example i has up to i % 4 further rationales, of weight 1/2, 1/3, 1/4."""
    rows = [
        dataclasses.replace(
            example,
            rationale_weight=0.5,
            more_rationales=tuple(
                Rationale(f"{example.rationale} Again, {i}. " * i, weight=1 / (i + 2))
                for i in range(1, 1 + number % 4)
            ),
        )
        if example.rationale
        else example
        for number, example in enumerate(examples)
    ]
    path = tmp_path_factory.mktemp("several") / "records.jsonl"
    write_rows(path, rows)
    return dataclasses.replace(config, records=(str(path),)), rows


@pytest.mark.parametrize("is_shared", [False, True])
def test_all_rationales_of_an_example_come_with_it_and_with_their_weights(
    several_config, cache_dir, vocabulary, is_shared
):
    config, rows = several_config
    prefixes = {"input_prefix_label": "", "input_prefix_rationale": ""}
    config = dataclasses.replace(config, **(prefixes if is_shared else {}))
    stream = open_stream(dataclasses.replace(config, shared_encoder=is_shared), cache_dir)
    by_id = {f"{row.dataset}/{row.id}": row for row in rows}

    def tokens(text):
        return (*vocabulary.encode(text), 1)

    for step in range(stream.order.window_batches):
        batch = stream.batch(step)
        found = []
        for row, ids in enumerate(batch.encoder_segment_ids):
            for segment in range(1, ids.max() + 1):
                source = tuple(batch.encoder_input_tokens[row][ids == segment].tolist())
                for role in (ROLE_LABEL, ROLE_RATIONALE):
                    mine = (batch.decoder_segment_ids[row] == segment) & (
                        batch.decoder_loss_roles[row] == role
                    )
                    if mine.any():
                        target = tuple(batch.decoder_target_tokens[row][mine].tolist())
                        (weight,) = set(batch.decoder_loss_weights[row][mine].tolist())
                        found.append((role, source, target, weight))
        expected = []
        for name in stream.examples(step):
            row = by_id[name]
            source = tokens(config.input_prefix_label + row.input)
            expected.append((ROLE_LABEL, source, tokens(row.label), 1.0))
            source = tokens(config.input_prefix_rationale + row.input)
            expected += [
                (ROLE_RATIONALE, source, tokens(each.text), float(np.float32(each.weight)))
                for each in row.rationales()
            ]
        assert sorted(found) == sorted(expected)


def test_a_shared_encoder_wants_equal_prefixes(config):
    with pytest.raises(InputError, match="'predict: ' and input_prefix_rationale 'explain: '"):
        dataclasses.replace(config, shared_encoder=True)


def same(left, right):
    return all((a == b).all() and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def labelled(examples, label="label"):
    return [e for e in examples if e.split == "train" and getattr(e, label) is not None]


def test_a_step_holds_the_tokens_of_its_examples_label_and_rationale(stream, examples, vocabulary):
    by_id = {f"{example.dataset}/{example.id}": example for example in examples}
    for step in range(stream.order.window_batches):
        chosen = [by_id[name] for name in stream.examples(step)]
        expected = sorted(expected_segments(chosen, vocabulary))
        assert sorted(segments_of(stream.batch(step))) == expected


def test_an_epoch_has_every_labelled_example_once(stream, examples):
    windows = 5  # 5 windows of 48 or so positions: four epochs and more
    steps = range(windows * stream.order.window_batches)
    seen = [name for step in steps for name in stream.examples(step)]
    assert len(seen) == windows * stream.order.window_pairs and not stream.left_out
    assert stream.num_examples == len(labelled(examples)) == 52
    assert stream.num_rationales == sum(e.rationale is not None for e in labelled(examples))
    times = [seen.count(f"sums/{example.id}") for example in labelled(examples)]
    assert sum(times) == len(seen) and max(times) - min(times) <= 1


def test_a_batch_is_a_function_of_seed_and_step(stream, config, cache_dir):
    again = open_stream(config, cache_dir)
    other = open_stream(config, cache_dir, seed=1)
    assert again.row_shape == other.row_shape == stream.row_shape
    for step in (40, 3, 17, 0):  # in any order, without those between
        assert same(again.batch(step), stream.batch(step))
        assert not same(other.batch(step), stream.batch(step))


@pytest.mark.parametrize("prefetch_batches", [0, 1, 3])
def test_resuming_at_a_step_equals_running_to_it(stream, prefetch_batches):
    whole = itertools.islice(stream.batches(0, prefetch_batches=prefetch_batches), 30)
    resumed = stream.batches(19, prefetch_batches=prefetch_batches)
    for batch, same_step in zip(itertools.islice(whole, 19, 30), resumed, strict=False):
        assert same(batch, same_step)


def test_hosts_share_the_rows_of_one_batch(stream):
    rows = stream.row_shape.rows
    assert rows > 0
    for step in range(4):
        whole = stream.batch(step)
        parts = [stream.batch(step, np.array([row])) for row in range(rows)]
        assert same([np.concatenate(arrays) for arrays in zip(*parts, strict=True)], whole)
        turned = stream.batch(step, np.array([rows + 1, *reversed(range(rows))]))
        assert not any(array[0].any() for array in turned)  # padding
        assert same([array[1:] for array in turned], [array[::-1] for array in whole])


def test_counts_are_those_of_the_whole_batch(stream):
    for step in range(4):
        assert stream.counts(step) == counts_of(stream.batch(step))


def counts_of(batch):
    return BatchCounts(
        examples=count_targets(batch, ROLE_LABEL),
        source_tokens=np.count_nonzero(batch.encoder_segment_ids),
        target_tokens=np.count_nonzero(batch.decoder_segment_ids),
    )


def test_without_rationales_the_same_examples_come_without_their_rationales(
    stream, config, cache_dir, examples, vocabulary
):
    bare = open_stream(config, cache_dir, use_rationales=False)
    assert bare.num_rationales == 0 and bare.num_examples == stream.num_examples
    window = range(bare.order.window_batches)
    names = sorted(name for step in window for name in bare.examples(step))
    assert names == sorted(name for step in window for name in stream.examples(step))
    by_id = {f"{example.dataset}/{example.id}": example for example in examples}
    found = sorted(segment for step in window for segment in segments_of(bare.batch(step)))
    expected = expected_segments([by_id[name] for name in names], vocabulary, use_rationales=False)
    assert found == sorted(expected)


def test_teacher_labels(config, cache_dir, examples, vocabulary):
    config = dataclasses.replace(config, label_source="teacher")
    stream = open_stream(config, cache_dir)
    learnt = labelled(examples, "teacher_label")
    by_id = {f"{example.dataset}/{example.id}": example for example in learnt}
    assert stream.num_examples == len(learnt)
    chosen = [by_id[name] for name in stream.examples(2)]
    expected = sorted(expected_segments(chosen, vocabulary, label="teacher_label"))
    assert sorted(segments_of(stream.batch(2))) == expected


def test_a_mixture_follows_its_rates_and_ignores_the_order_of_files(mixed_config, cache_dir):
    config = dataclasses.replace(mixed_config, mixture_rates={"sums": 1.0, "more": 3.0})
    stream = open_stream(config, cache_dir)
    steps = 6 * stream.order.window_batches
    names = [name for step in range(steps) for name in stream.examples(step)]
    share = sum(name.startswith("more/") for name in names) / len(names)
    assert share == pytest.approx(0.75, abs=1 / len(names) * 2)
    swapped = dataclasses.replace(config, records=config.records[::-1])
    assert same(open_stream(swapped, cache_dir).batch(5), stream.batch(5))


def test_mixing_agrees_with_seqios_own_frequencies(mixed_config, cache_dir, vocabulary):
    import seqio

    from dslt.data.tasks import register_mixtures, register_tasks
    from dslt.data.token_cache import scan_records

    for path in mixed_config.records:
        register_tasks(scan_records(path), vocabulary, mixed_config.task_settings())
    rates = {"sums": 2.0, "more": 1.0}
    register_mixtures("both", rates)
    mixture = seqio.get_mixture_or_task("both_label")
    rows = mixture.get_dataset(
        {"inputs": 99, "targets": 99},
        "train",
        shuffle=False,
        passthrough_features=["inputs_pretokenized"],
    )
    drawn = 1500
    is_sums = [b"Ann" in row["inputs_pretokenized"] for row in rows.take(drawn).as_numpy_iterator()]
    config = dataclasses.replace(mixed_config, mixture_rates=rates)
    stream = open_stream(config, cache_dir)
    names = [name for step in range(300) for name in stream.examples(step)]
    ours = sum(name.startswith("sums/") for name in names) / len(names)
    # Their draws are independent: four standard errors of a share of 2/3.
    assert abs(np.mean(is_sums) - ours) < 4 * (2 / 9 / drawn) ** 0.5


def test_prefetching_passes_errors_on(stream, monkeypatch):
    batches = stream.batches(0)
    next(batches)
    monkeypatch.setattr(stream, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(itertools.islice(batches, 5))


def test_fill_is_the_share_of_cells_with_tokens(stream):
    batches = [stream.batch(step) for step in range(stream.order.window_batches)]
    fill = stream.fill()
    assert fill.source == pytest.approx(np.mean([b.encoder_segment_ids > 0 for b in batches]))
    assert fill.target == pytest.approx(np.mean([b.decoder_segment_ids > 0 for b in batches]))
    assert min(fill.source, fill.target) > 0.75  # four examples a step


def test_the_report_tells_what_is_left_out_cut_and_unknown(config, cache_dir, tmp_path):
    rows = [Example(str(i), "odd", "train", "Ann has 日 hats", label="( 3 + 4 )") for i in range(9)]
    rows += [Example("x", "odd", "train", "Ann has", rationale="none")]
    write_rows(tmp_path / "odd.jsonl", rows)
    config = dataclasses.replace(
        config, records=(str(tmp_path / "odd.jsonl"),), max_target_length=4
    )
    stream = open_stream(config, cache_dir, use_rationales=False)
    report = "\n".join(stream.report())
    assert "9 examples, 0 with a rationale; a batch is 4 examples in" in report
    assert "odd: 1 train examples have no label and are left out" in report
    assert "odd_label: 9 of 9 targets are cut to max_target_length" in report
    assert "odd_label: 9 of " in report and "input tokens are unknown" in report


def test_eval_inputs_are_the_tasks_tokens_and_keep_what_has_no_label(
    config, cache_dir, examples, vocabulary
):
    from dslt.data.token_cache import open_index, open_task

    inputs = eval_inputs(config, "validation", vocabulary)
    assert [item.example for item in inputs] == [e for e in examples if e.split == "validation"]
    index = open_index(cache_dir, config.records[0])
    for task in ("label", "rationale"):
        settings = config.task_settings()
        cached = open_task(cache_dir, index, "sums", task, vocabulary, settings).split("validation")
        sequences = np.split(cached.inputs.tokens, cached.inputs.offsets[1:-1])
        ours = {item.example.id: getattr(item, f"{task}_input_tokens") for item in inputs}
        for row, tokens in zip(cached.rows, sequences, strict=True):
            assert ours[index.example_id(row)].tolist() == tokens.tolist()
    assert not any(item.is_truncated for item in inputs)
    short = dataclasses.replace(config, max_input_length=10)
    for item in eval_inputs(short, "validation", vocabulary):
        assert item.is_truncated and len(item.label_input_tokens) == 10
        assert item.label_input_tokens[-1] == 1


def test_a_vocabulary_trained_on_the_records_is_the_same_each_time(config, tmp_path):
    trained = dataclasses.replace(config, vocabulary="train:90")
    first = make_vocabulary(trained, tmp_path / "a")
    again = make_vocabulary(trained, tmp_path / "b")
    assert first.digest == again.digest
    assert 2 not in first.encode("predict: Ann has 4 hats. explain: ( 1 + 2 )")
    stream = open_stream(dataclasses.replace(config, vocabulary=str(again.path)), tmp_path)
    assert stream.batch(0).encoder_input_tokens.max() < load_vocabulary(again.path).num_pieces


def test_given_row_lengths_are_kept(config, cache_dir):
    config = dataclasses.replace(config, source_length=150, target_length=101)
    stream = open_stream(config, cache_dir)
    assert stream.batch(0).encoder_input_tokens.shape == (stream.row_shape.rows, 150)
    assert stream.batch(0).decoder_target_tokens.shape == (stream.row_shape.rows, 101)


def example(number, split="train", **fields):
    return Example(str(number), "sums", split, "Ann has 2 hats", **fields)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([example(1, "test", label="2")], {}, "no example of split 'train' has a gold label"),
        ([example(1, label="2")], {"label_source": "teacher"}, "has a teacher label"),
        ([example(1, label="2")], {}, "none of the 1 train examples .* has a rationale"),
        ([example(1, label="2", rationale="two")], {"mixture_rates": {"more": 1.0}}, "exactly the"),
        ([example(1, label="2", rationale="two")], {"mixture_rates": {"sums": 0.0}}, "above zero"),
        ([example(1, label="2", rationale="two")], {"source_length": 4}, "the longest source has"),
        ([example(1, label="2", rationale="two")], {"label_source": "gilt"}, "label_source is"),
        ([example(1, label="2", rationale="two")], {"records": ()}, "no records file"),
        ([example(1, label="2", rationale="two")], {"vocabulary": "none.model"}, "cannot be read"),
    ],
)
def test_what_cannot_be_trained_on_is_an_input_error(
    rows, changes, message, config, tmp_path, cache_dir
):
    write_rows(tmp_path / "r.jsonl", rows)
    config = dataclasses.replace(config, records=(str(tmp_path / "r.jsonl"),))
    with pytest.raises(InputError, match=message):
        open_stream(dataclasses.replace(config, **changes), cache_dir)


def test_a_dataset_in_two_files_is_an_input_error(config, cache_dir, tmp_path):
    write_rows(tmp_path / "r.jsonl", [example(1, label="2", rationale="two")])
    config = dataclasses.replace(config, records=(*config.records, str(tmp_path / "r.jsonl")))
    with pytest.raises(InputError, match=r"dataset 'sums' is in .* and in "):
        open_stream(config, cache_dir)


def test_an_augmentation_is_learnt_from_and_not_judged(
    config, cache_dir, examples, vocabulary, tmp_path
):
    """Its held-out rows are nobody's; its train rows teach the vocabulary too."""
    path = tmp_path / "more.jsonl"
    renamed = {"dataset": "more", "input": "Zoe has 3 hats."}
    write_rows(path, [dataclasses.replace(example, **renamed) for example in examples])
    augmented = dataclasses.replace(config, augmentation=(str(path),))
    stream = open_stream(augmented, cache_dir)
    assert stream.num_examples == 2 * open_stream(config, cache_dir).num_examples
    assert stream.records_digests.keys() == {*config.records, str(path)}
    assert stream.records_digests == records_digests(augmented.train_files)
    splits = ("validation", "test")
    found, expected = (read_eval_inputs(c, splits, vocabulary) for c in (augmented, config))
    for split in splits:
        assert [e.example for e in found[split]] == [e.example for e in expected[split]]
    trained = dataclasses.replace(augmented, vocabulary="train:60")
    both = dataclasses.replace(trained, records=augmented.train_files, augmentation=())
    alone = dataclasses.replace(trained, augmentation=())
    configs = (trained, both, alone)
    digests = [make_vocabulary(c, tmp_path / "v").digest for c in configs]
    assert digests[0] == digests[1] != digests[2]
    twice = dataclasses.replace(config, augmentation=config.records)
    with pytest.raises(InputError, match=r"dataset 'sums' is in .* and in "):
        open_stream(twice, cache_dir)


def test_an_unknown_or_empty_split_is_an_input_error(config, second_records_path, vocabulary):
    with pytest.raises(InputError, match="split is 'dev'; expected one of train, validation, test"):
        eval_inputs(config, "dev", vocabulary)
    config = dataclasses.replace(config, records=(str(second_records_path),))
    with pytest.raises(InputError, match=r"no example is in split 'test' \(20 in train\)"):
        eval_inputs(config, "test", vocabulary)


def test_a_run_gets_a_copy_of_its_vocabulary(config, vocabulary, tmp_path):
    made = make_vocabulary(config, tmp_path / "copied")
    assert made.digest == vocabulary.digest == load_vocabulary(tmp_path / "copied").digest
    trained = make_vocabulary(dataclasses.replace(config, vocabulary="train:90"), tmp_path / "own")
    assert load_vocabulary(tmp_path / "own").digest == trained.digest != vocabulary.digest
    for size in ("x", "9" * 25):
        with pytest.raises(InputError, match="expected a number of pieces"):
            wrong = dataclasses.replace(config, vocabulary=f"train:{size}")
            make_vocabulary(wrong, tmp_path / "other")


def test_a_vocabulary_replaces_another_one_and_no_other_file(config, vocabulary, tmp_path):
    keep_in = tmp_path / "vocabulary"
    make_vocabulary(dataclasses.replace(config, vocabulary="bytes"), keep_in)
    (keep_in / "notes.txt").write_text("mine")
    make_vocabulary(config, keep_in)
    assert load_vocabulary(keep_in).digest == vocabulary.digest
    assert (keep_in / "notes.txt").read_text() == "mine"
    own = dataclasses.replace(config, vocabulary=str(keep_in / "spiece.model"))
    with pytest.raises(InputError, match=r"give the directory, '.*vocabulary', or move the file"):
        make_vocabulary(own, keep_in)
    assert load_vocabulary(keep_in).digest == vocabulary.digest


def all_examples(stream):
    """Of a few windows: one need not see every example."""
    steps = range(4 * stream.order.window_batches)
    return {name for step in steps for name in stream.examples(step)}


def test_fractions_of_a_seed_are_nested_and_seeds_differ(config, cache_dir):
    def taken(fraction, seed=0):
        part = dataclasses.replace(config, train_fraction=fraction)
        stream = open_stream(part, cache_dir, seed=seed)
        found = all_examples(stream)
        assert len(found) == stream.num_examples
        return found

    whole = taken(1.0)
    parts = [taken(fraction) for fraction in (0.1, 0.3, 0.75)]
    assert [len(part) for part in parts] == [round(f * len(whole)) for f in (0.1, 0.3, 0.75)]
    assert parts[0] < parts[1] < parts[2] < whole
    assert taken(0.3, seed=1) not in (parts[1], whole)


def test_a_fraction_leaves_the_held_out_splits_and_each_pair_whole(
    config, cache_dir, examples, vocabulary
):
    part = dataclasses.replace(config, train_fraction=0.4)
    stream = open_stream(part, cache_dir)
    by_id = {f"{example.dataset}/{example.id}": example for example in examples}
    for step in range(3):
        chosen = [by_id[name] for name in stream.examples(step)]
        expected = expected_segments(chosen, vocabulary)
        assert sorted(segments_of(stream.batch(step))) == sorted(expected)
    assert len(eval_inputs(part, "test", vocabulary)) == len(
        eval_inputs(config, "test", vocabulary)
    )


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction, config):
    with pytest.raises(InputError, match="train_fraction"):
        dataclasses.replace(config, train_fraction=fraction)


def test_shuffled_rationales_are_the_same_texts_at_other_examples(config, cache_dir, vocabulary):
    """Each source keeps its place; the targets of a window are the same, and none stays."""

    def rationales(shuffled):
        stream = open_stream(
            dataclasses.replace(config, shuffle_rationales=shuffled, train_fraction=0.5), cache_dir
        )
        found = {}
        for entry, number in zip(
            stream._sets[0].rationale_entry[:, 0], stream._sets[0].rows, strict=True
        ):
            if entry >= 0:
                inputs, targets = stream._sets[0].rationale
                found[number] = tuple(
                    tuple(table.tokens[slice(*table.offsets[entry : entry + 2])].tolist())
                    for table in (inputs, targets)
                )
        return found, list(segments_of(stream.batch(0)))

    (plain, _), (shuffled, segments) = rationales(False), rationales(True)
    assert {n: pair[0] for n, pair in plain.items()} == {n: s[0] for n, s in shuffled.items()}
    assert sorted(pair[1] for pair in plain.values()) == sorted(s[1] for s in shuffled.values())
    assert sum(plain[n][1] == shuffled[n][1] for n in plain) < len(plain) / 2  # equal texts alone
    in_batch = {(source, target) for source, target, role in segments if role == ROLE_RATIONALE}
    assert in_batch <= set(shuffled.values())
