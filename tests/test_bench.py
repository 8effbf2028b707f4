"""What `dslt bench` measures and says; the reference takes the same step as we do."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dslt import bench
from dslt.bench import StepBench, Times, where_time_goes
from dslt.checkpoint import hf_t5
from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE
from dslt.core.optimizer import OptimizerConfig
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.data.vocabulary import ByteVocabulary
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.main import main
from dslt.train import TrainConfig

ONE_DEVICE = MeshConfig(data=1)
MODEL = T5Config(
    vocab_size=259, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
    dropout_rate=0.0,
)  # fmt: skip
UMT5 = dataclasses.replace(MODEL, relative_bias_per_layer=True)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight simulated devices would compile and run each program eight times."""
    devices = jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices(*args)[:1])
        yield


@pytest.fixture(scope="module", autouse=True)
def denormals():
    """The reference flushes them for the rest of its process, in which other tests follow."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture
def batches(build_batch):
    rng = np.random.default_rng(0)

    def tokens(length):
        return [*rng.integers(3, 250, length - 1).tolist(), 1]

    def batch():
        rows = [
            [(tokens(5), tokens(3), ROLE_LABEL), (tokens(6), tokens(7), ROLE_RATIONALE)],
            [(tokens(4), tokens(2), ROLE_LABEL), (tokens(9), tokens(5), ROLE_RATIONALE)],
        ]
        return build_batch(rows, 16, 12)

    return [batch() for _ in range(3)]


def test_ratios_are_of_neighbours_in_time():
    ratios = Times((2.0, 9.0, 4.0)).over(Times((1.0, 3.0, 1.0)))
    assert ratios.values == (2.0, 3.0, 4.0)
    assert str(ratios) == "3 (2-4)"


def test_instructions_are_counted_where_they_were_traced():
    program = """
    ENTRY %main (a: f32[2]) -> f32[2] {
      %fusion.1 = f32[2]{0} fusion(%a), metadata={op_name="jit(f)/jvp(encoder)/attention/exp"}
      ROOT %dot.2 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/optimizer/mul"}
      %while.3 = f32[2]{0} while(%a), metadata={op_name="jit(f)/jvp(decoder)/norm/while"}
      %copy.4 = f32[2]{0} copy(%a)
      %add.5 = f32[2]{0} add(%a), metadata={op_name="jit(f)/decoder/transpose(jvp(norm))/add"}
      %dot.6 = f32[2]{0} dot(%a), metadata={op_name="jit(f)/output_layer/while/body/dot"}
      %fusion.7 = (f32[2]{0}, (f32[], f32[3]{0})) fusion(%a), metadata={op_name="jit(f)/norm/add"}
    }
    """
    assert bench._scopes(textwrap.dedent(program)) == {
        "fusion.1": "encoder attention",
        "dot.2": "optimizer",
        "copy.4": "other",
        "add.5": "decoder norm",
        "dot.6": "output_layer",
        "fusion.7": "norm",
    }


@pytest.mark.parametrize(
    ("layout", "jobs"),
    [("label", [("labels", 4), ("rationales", 8)]), ("rationale_label", [("answers", 16)])],
)
def test_what_a_student_answers_with_is_decoded(layout, jobs):
    """Where label and rationale are one target, as `dslt evaluate` does it: that text alone."""
    configs = types.SimpleNamespace(
        evaluate=EvalConfig(max_label_length=4, max_rationale_length=8),
        data=types.SimpleNamespace(
            target_layout=layout, max_target_length=16, rationale_start_id=0
        ),
    )
    found = bench._decode_jobs(configs, [])
    assert [(job.name, job.max_length) for job in found] == jobs


def test_attention_for_another_kind_of_device_is_refused(batches):
    model = dataclasses.replace(MODEL, attention="flash")
    with pytest.raises(InputError, match="'flash' is for TPUs"):
        StepBench(TrainConfig(), model, OptimizerConfig(), ONE_DEVICE, batches[0])


def test_the_time_of_a_step_is_shared_out(batches):
    step = StepBench(TrainConfig(), MODEL, OptimizerConfig(), ONE_DEVICE, batches[0])
    shares = dict(where_time_goes(step.compiled, lambda: step.run(batches[0])))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert {"encoder attention", "decoder feed_forward", "output_layer", "optimizer"} <= set(shares)
    assert step.peak_bytes() > 3 * 4 * sum(x.size for x in jax.tree.leaves(step.params))


def test_cuda_graphs_are_not_taken_for_a_few_operations(batches, monkeypatch):
    """Their profile names a graph where it should name what is in it."""
    step = StepBench(TrainConfig(), MODEL, OptimizerConfig(), ONE_DEVICE, batches[0])
    name = next(name for name, scope in bench._scopes(step.compiled.as_text()).items() if scope)
    monkeypatch.setattr(bench, "_operations", lambda path: [(name, 2), ("command_buffer_7", 3)])
    assert where_time_goes(step.compiled, lambda: None) == []
    monkeypatch.setattr(bench, "_operations", lambda path: [(name, 3), ("command_buffer_7", 2)])
    ((_, share),) = where_time_goes(step.compiled, lambda: None)
    assert share == 1


@pytest.mark.parametrize("model", [MODEL, UMT5], ids=["t5", "umt5"])
def test_the_reference_takes_the_same_steps(model, batches, tmp_path):
    """Without dropout, losses agree over three updates: the weights move alike."""
    pytest.importorskip("torch", reason="the reference is PyTorch: pip install '.[parity]'")
    from dslt.bench_reference import HuggingFaceT5

    config = TrainConfig(num_steps=10, rationale_weight=0.7)
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=0.5)
    step = StepBench(config, model, optimizer, ONE_DEVICE, batches[0])
    ByteVocabulary().save(tmp_path / "vocabulary")
    params = jax.device_get(step.params)
    hf_t5.save(tmp_path / "student", model, params, tmp_path / "vocabulary")
    reference = HuggingFaceT5(tmp_path / "student", model, optimizer, 0.7)
    for batch in [*batches, batches[0]]:
        step.run(batch)
        reference.run(batch)
        np.testing.assert_allclose(reference.loss, step.loss, rtol=1e-4)  # float32, other order


@pytest.fixture
def small_run(tmp_path):
    """Gin files and flags of a run on a few problems."""
    directory = tmp_path / "records"
    sizes = ["--train", "40", "--validation", "8", "--test", "8"]
    args = ["extract", "--dataset", "facts", "--teacher", "scripted", *sizes]
    assert main([*args, "--output_dir", str(directory)]) == 0
    small = dataclasses.asdict(MODEL) | {"vocab_size": 512}
    bindings = [f"t5.T5Config.{name} = {value!r}" for name, value in small.items()]
    bindings += [
        f"pipeline.DataConfig.records = ({str(directory / 'records.jsonl')!r},)",
        "pipeline.DataConfig.batch_examples = 8",
        "evaluate.EvalConfig.max_label_length = 4",
        "evaluate.EvalConfig.max_rationale_length = 8",
    ]
    gin = [part for binding in bindings for part in ("--gin", binding)]
    return ["runs/step_by_step.gin", "settings/facts.gin", *gin]


def test_the_core_alone_measures_prepared_batches(small_run, tmp_path):
    """`tests/measure_accelerator.py`, for machines without gin, SeqIO and TensorFlow."""
    script = [sys.executable, str(Path(__file__).with_name("measure_accelerator.py"))]
    prepared = str(tmp_path / "prepared")
    subprocess.run([*script, "prepare", prepared, *small_run], check=True, capture_output=True)
    command = [*script, "run", prepared, "--model", "num_layers=1", 'dtype="bfloat16"']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("devices", "train step", "real tokens/s", "MFU", "loss"):
        assert name in result.stdout


def test_the_command_prints_and_writes_its_figures(small_run, tmp_path, capsys):
    output = tmp_path / "figures.json"
    command = ["bench", *small_run]
    counts = ["--steps", "2", "--decode", "3", "--repetitions", "2", "--output", str(output)]
    capsys.readouterr()
    assert main([*command, *counts]) == 0
    printed = capsys.readouterr().out
    for name in ("labels", "rationales", "input", "train step", "MFU", "real tokens/s", "time"):
        assert name in printed
    figures = json.loads(output.read_text())
    assert (
        len(figures["step_secs"]) == len(figures["input_secs"]) == len(figures["labels_secs"]) == 2
    )
    assert 0 < figures["mfu"] < 1
    assert figures["labels_tokens"] <= 3 * 4
    assert not list(tmp_path.glob("*.gin"))


def test_triton_is_loaded_before_tensorflow(small_run, tmp_path):
    """The other order ends the process with a segmentation fault."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "triton.py").write_text(
        "import sys\nprint('tensorflow' in sys.modules, flush=True)\nsys.exit(77)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "dslt.main", "bench", *small_run, "--against", "hf"]
    environment = os.environ | {"PYTHONPATH": path}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (77, "False\n"), found.stderr
