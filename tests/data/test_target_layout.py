"""One target or two: what it holds, and the label found in it again."""

import dataclasses

import pytest

from dslt.core.batch import ROLE_LABEL
from dslt.data.pipeline import TrainStream
from dslt.data.target_layout import TARGET_LAYOUTS, join_target, label_of
from dslt.data.vocabulary import load_vocabulary
from dslt.errors import InputError


@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
@pytest.mark.parametrize("rationale", ["red is not blue .", None])
def test_the_label_is_found_in_the_target_again(layout, rationale):
    assert label_of(join_target(rationale, "( 4 + 3 )", layout), layout) == "( 4 + 3 )"


def test_the_name_says_what_comes_first():
    rationale, label = "red is not blue .", "no"
    found = {layout: join_target(rationale, label, layout) for layout in TARGET_LAYOUTS}
    assert found == {
        "label": "no",
        "rationale_label": "red is not blue . answer: no",
        "label_rationale": "no explanation: red is not blue .",
    }


def test_what_a_student_writes_without_the_mark_is_its_answer():
    assert label_of("contradiction", "rationale_label") == "contradiction"
    assert label_of("contradiction", "label_rationale") == "contradiction"
    assert label_of("a answer: b answer: c", "rationale_label") == "c"


@pytest.mark.parametrize("layout", ["rationale_label", "label_rationale"])
def test_train_targets_hold_both_and_held_out_ones_the_label(
    layout, config, cache_dir, examples, vocabulary
):
    config = dataclasses.replace(config, target_layout=layout, cache_dir=str(cache_dir))
    stream = TrainStream(config, vocabulary, seed=0, use_rationales=False)
    by_id = {f"{example.dataset}/{example.id}": example for example in examples}
    batch = stream.batch(0)
    expected = [
        join_target(by_id[name].rationale, by_id[name].label, layout) for name in stream.examples(0)
    ]
    found = []
    for row, ids in enumerate(batch.decoder_segment_ids):
        for segment in range(1, ids.max() + 1):
            assert set(batch.decoder_loss_roles[row][ids == segment]) == {ROLE_LABEL}
            tokens = batch.decoder_target_tokens[row][ids == segment].tolist()
            found.append(vocabulary.decode(tokens[:-1]))
    assert sorted(found) == sorted(expected)


def test_one_target_and_a_rationale_task_are_refused_together(config, cache_dir):
    config = dataclasses.replace(config, target_layout="rationale_label", cache_dir=str(cache_dir))
    with pytest.raises(InputError, match=r"expected train\.TrainConfig\.rationale_weight = 0"):
        TrainStream(config, load_vocabulary(config.vocabulary), seed=0, use_rationales=True)
