"""Checkpoints: what is saved comes back, and what does not fit is said before anything is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import fault_injection
import jax
import numpy as np
import pytest

from dslt.checkpoint import integrity
from dslt.checkpoint.digests import named_leaves, tree_digests
from dslt.checkpoint.integrity import checksum
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.checkpoint.student import find_checkpoint
from dslt.core import sharding, t5
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.train_step import init_state
from dslt.errors import InputError
from dslt.start import newest_whole

GOLDENS = Path(__file__).parents[1] / "goldens" / "checkpoints"

CONFIG = t5.T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
)


def make_state(step):
    params = t5.init_params(CONFIG, seed=step)[1]
    state = init_state(params, make_optimizer(OptimizerConfig(name="adafactor"), num_steps=9))
    return state._replace(step=jax.numpy.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with CheckpointManager(directory / "checkpoints", keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(make_state(step), Layout(CONFIG))
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
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
    found |= {"format_version": 99, "written_by": "9.9"}
    path.write_text(json.dumps(found | {"checksum": checksum(found)}))
    message = r"checkpoint format 99; this .* reads 1 and 2. Use dslt 9\.9"
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(InputError, match=message),
    ):
        manager.layout(3)


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_each_format_that_was_ever_written_loads(version):
    """The goldens hold the same state: AdamW's of a model from seed 0, at step 5."""
    golden = GOLDENS / f"format_{version}"
    with CheckpointManager(golden, read_only=True) as manager:
        layout = manager.layout(5)
        assert manager.find_damage(5) is None
        params = manager.restore_params(5, t5.abstract_params(layout.model)[1])
    assert (layout.format_version, layout.family, layout.is_scanned) == (version, "t5", True)
    content = json.loads((GOLDENS / "format_2/5/layout/metadata").read_text())
    assert tree_digests(params) == content["digests"]["params"]


def test_what_differs_in_the_layout_is_shown_field_by_field(directory):
    expected = dataclasses.replace(
        Layout(dataclasses.replace(CONFIG, num_heads=4, dtype="bfloat16")), is_scanned=False
    )
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(InputError) as caught,
    ):
        manager.check_layout(3, expected)
    assert str(caught.value).splitlines()[1:] == [
        "  is_scanned: found True, expected False",
        "  num_heads: found 2, expected 4",
    ]


def test_a_later_versions_fields_are_refused_with_its_name(directory):
    found = Layout(CONFIG, written_by="7.0").to_json()
    found["model"]["num_experts"] = 8
    with pytest.raises(InputError, match=r"\['num_experts'\] are unknown .* Use dslt 7\.0"):
        Layout.from_json(found, directory)


@pytest.mark.parametrize("value", ["16", None, 1.5, True, [16]])
def test_a_models_field_of_another_type_is_refused(value, directory):
    found = Layout(CONFIG).to_json()
    found["model"]["d_model"] = value
    with pytest.raises(InputError, match=r"layout's d_model is .*; expected <class 'int'>"):
        Layout.from_json(found, directory)


def test_damage_is_noticed_whatever_its_place(tmp_path):
    """A share of the faults of `python tests/checkpoint/fault_injection.py`."""
    counts = fault_injection.inject(tmp_path, flips=1, every=15)
    assert counts.total() >= 8  # Orbax decides anew into how many files it writes
    assert any(outcome == "noticed" for _, outcome in counts)


def damage_params(step_directory):
    """Changes one bit in 64 bytes wherever the arrays of the parameters may be."""
    for path in (step_directory / "params").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::64] = (byte ^ 1 for byte in content[::64])
        path.write_bytes(content)


def test_an_array_that_can_be_read_but_is_another_is_damage(directory):
    path = directory / "3" / "layout" / "metadata"
    content = json.loads(path.read_text())
    content["digests"]["params"]["encoder/final_norm/scale"] = "00000000"
    path.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with CheckpointManager(directory, read_only=True) as manager:
        said = "3/params: is damaged: encoder/final_norm/scale is not what was saved"
        assert manager.find_damage(3).endswith(said)


def test_a_checkpoint_under_another_steps_name_is_damage(directory):
    (directory / "3").rename(directory / "7")
    with CheckpointManager(directory, read_only=True) as manager:
        assert manager.find_damage(7).endswith("checkpoints/7: is damaged: it is of step 3")


def test_each_process_reads_its_share(directory, monkeypatch):
    read = []

    def remember(handler, path, names):
        read.extend(names)
        return read_arrays(handler, path, names)

    read_arrays = integrity._read_arrays
    monkeypatch.setattr(integrity, "_read_arrays", remember)
    with CheckpointManager(directory, read_only=True) as manager:
        for part in range(3):
            assert manager.find_damage(3, ("params",), part, 3) is None
    named = [name for name, _ in named_leaves(make_state(3).params)]
    assert sorted(read) == sorted(named)


def test_without_a_whole_checkpoint_nothing_begins_and_nothing_moves(directory, capsys):
    for step in ("2", "3"):
        shutil.rmtree(directory / step / "params")
    before = sorted(directory.parent.rglob("*"))
    with (
        CheckpointManager(directory, together=True) as manager,
        pytest.raises(InputError, match="none of its checkpoints is whole") as caught,
    ):
        newest_whole(manager, manager.steps())
    assert str(caught.value).count("params: is damaged") == 2
    assert sorted(directory.parent.rglob("*")) == before


def test_a_step_that_was_set_aside_is_saved_again(directory, capsys):
    damage_params(directory / "3")
    with CheckpointManager(directory, keep=2, together=True) as manager:
        assert newest_whole(manager, manager.steps()) == 2
        manager.save(make_state(3), Layout(CONFIG))
        manager.wait()
        assert manager.steps() == [2, 3] and manager.find_damage(3) is None
    assert (directory.parent / "damaged/checkpoints-3").is_dir()
    assert "set aside" in capsys.readouterr().out


def test_a_checkpoint_without_optimizer_state_is_not_resumed(tmp_path):
    with CheckpointManager(tmp_path, read_only=False) as manager:
        manager.save_params(1, make_state(1).params, Layout(CONFIG))
        manager.wait()
        with pytest.raises(InputError, match="was written without opt_state, for use"):
            manager.find_damage(1)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_a_store_that_cannot_be_reached_now_is_no_damage(error, directory, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(integrity, "_read_arrays", refuse)
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(type(error)) as caught,
    ):
        manager.find_damage(3)
    assert caught.value is error
    error = ValueError("UNAVAILABLE: Error reading bucket")
    with (
        CheckpointManager(directory, read_only=True) as manager,
        pytest.raises(InputError, match="cannot be read now, so whether it is whole is not known"),
    ):
        manager.find_damage(3)


def test_a_damaged_best_checkpoint_is_named_and_the_newest_taken(directory, tmp_path, capsys):
    with CheckpointManager(tmp_path / "best") as manager:
        manager.save_params(2, make_state(2).params, Layout(CONFIG))
    damage_params(tmp_path / "best" / "2")
    assert find_checkpoint(tmp_path) == (directory, 3)
    said = capsys.readouterr().err
    assert "best/2/params: is damaged" in said and f"taking {directory / '3'} instead" in said
    with pytest.raises(InputError, match="best/2/params: is damaged"):
        find_checkpoint(tmp_path / "best" / "2")
    for step in ("2", "3"):
        damage_params(directory / step)
    with pytest.raises(InputError, match="has no checkpoint that is whole"):
        find_checkpoint(tmp_path)


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
