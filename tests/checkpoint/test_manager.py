"""Checkpoints: what is saved comes back, and what does not fit is said before anything is read."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dslt.checkpoint.manager import CheckpointManager, Layout
from dslt.checkpoint.student import find_checkpoint
from dslt.core import sharding, t5
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.train_step import init_state
from dslt.errors import InputError

CONFIG = t5.T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
)


def make_state(step):
    params = t5.init_params(CONFIG, seed=step)[1]
    state = init_state(params, make_optimizer(OptimizerConfig(name="adafactor"), num_steps=9))
    return state._replace(step=jax.numpy.int32(step))


@pytest.fixture
def directory(tmp_path):
    with CheckpointManager(tmp_path / "checkpoints", keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(make_state(step), Layout(CONFIG))
    return tmp_path / "checkpoints"


def test_the_latest_few_stay_and_come_back_whole_on_another_mesh(directory):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    expected = make_state(3)
    abstract = sharding.with_shardings(mesh, jax.eval_shape(lambda: expected))
    with CheckpointManager(directory, read_only=True) as manager:
        assert manager.steps() == [2, 3]
        assert manager.layout(3) == Layout(CONFIG)
        restored = manager.restore(3, abstract)
        params = manager.restore_params(3, abstract.params)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected.params)
    shardings = jax.tree.map(lambda array: array.sharding, restored.params)
    assert shardings == sharding.state_shardings(mesh, abstract).params


def test_another_models_checkpoint_is_refused_with_both_shapes(directory):
    wider = dataclasses.replace(CONFIG, d_model=24)
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(InputError, match=r"final_norm/scale: found \(16,\), expected \(24,\)"),
    ):
        manager.restore_params(3, t5.abstract_params(wider)[1])


def test_another_format_version_is_refused(directory):
    path = directory / "3" / "layout" / "metadata"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"format_version": 99}))
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(InputError, match="checkpoint format 99; this version of dslt reads"),
    ):
        manager.layout(3)


def test_the_best_is_replaced_by_an_earlier_step_too(tmp_path):
    for step in (3, 2):
        with CheckpointManager(tmp_path / "best") as manager:
            manager.replace_all(step, make_state(step).params, Layout(CONFIG))
            assert manager.steps() == [step]
            restored = manager.restore_params(step, t5.abstract_params(CONFIG)[1])
        jax.tree.map(np.testing.assert_array_equal, restored, make_state(step).params)


def test_a_run_is_found_by_its_best_checkpoint_then_by_its_newest(directory, tmp_path):
    assert find_checkpoint(tmp_path) == (directory, 3)
    assert find_checkpoint(directory / "2") == (directory, 2)
    with CheckpointManager(tmp_path / "best", keep=1) as manager:
        manager.save_params(2, make_state(2).params, Layout(CONFIG))
    assert find_checkpoint(tmp_path) == (tmp_path / "best", 2)
    with pytest.raises(InputError, match="found neither a checkpoint nor a Hugging Face model"):
        find_checkpoint(directory / "2" / "params")


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"layers": 1}},
        {"model": {"d_model": "64"}},
        {"model": {"d_model": True}},
        {"model": {"d_model": 0}},
        {"model": {"tie_word_embeddings": "false"}},
        {"format_version": None},
    ],
)
def test_a_damaged_layout_is_an_input_error(change, tmp_path):
    found = Layout(t5.T5Config()).to_json()
    assert Layout.from_json(found, tmp_path) == Layout(t5.T5Config())
    with pytest.raises(InputError, match=str(tmp_path)):
        Layout.from_json(found | change, tmp_path)
    with pytest.raises(InputError):
        Layout.from_json([found], tmp_path)
