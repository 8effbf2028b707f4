"""A plan says what the compiled program needs; what cannot fit is said not to."""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import re
import types

import jax
import numpy as np
import pytest

from dslt import config, plan, plan_report, plan_search
from dslt.commands.plan import batch_shape
from dslt.core import gpu_target, t5
from dslt.core.continuous import ContinuousDecoder
from dslt.core.decode import DecodeConfig
from dslt.core.optimizer import OptimizerConfig
from dslt.core.sharding import MeshConfig, make_mesh
from dslt.core.t5 import T5Config
from dslt.core.topology import GIB, parse_topology
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.main import main
from dslt.train import TrainConfig

jax.devices()  # eight, before a plan asks for another number
CPU = parse_topology("cpu:8")
MODEL = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=3, num_decoder_layers=3
)
RUN = plan.Run(
    train=TrainConfig(num_steps=10),
    model=MODEL,
    optimizer=OptimizerConfig(),
    mesh=MeshConfig(data=1, fsdp=8),
    evaluate=EvalConfig(rows=13, max_label_length=8),
    max_input_length=40,
    shape=plan.BatchShape(
        16, 24, 12, examples=32, source_fill=0.5, target_fill=0.5, origin="as given"
    ),
)
BASE_SLICE = ["runs/step_by_step.gin", "settings/paper.gin", "slices/t5_v1_1_base_v5e_2x2.gin"]


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install '.[plan]'")


@pytest.fixture(scope="module")
def planned():
    return plan.plan_training(RUN, CPU)


def test_kinds_of_memory_are_those_of_the_shardings_and_sum_to_the_peak(planned):
    memory = planned.memory
    num_params = t5.count_params(t5.abstract_params(MODEL)[1])
    # Norm scales and the two bias tables [32, 4] are whole on each device, the rest is split.
    whole = (2 * 3 + 3 * 3 + 2) * 32 + 2 * 32 * 4
    of_params = ((num_params - whole) // 8 + whole) * 4
    assert memory.kinds["parameters"] == memory.kinds["gradients"] == of_params
    assert memory.kinds["optimizer state"] == 2 * of_params + 3 * 4  # two moments, three counters
    assert memory.kinds["batch"] == 2 * (2 * 24 + 6 * 12) * 4  # two rows a device
    assert sum(memory.kinds.values()) + memory.rest == memory.peak
    assert memory.rest > 0


def test_flops_are_those_of_real_tokens_and_of_all_of_them(planned):
    full = dataclasses.replace(
        RUN, shape=dataclasses.replace(RUN.shape, source_fill=1.0, target_fill=1.0)
    )
    from_formula = plan.flops.train_step_flops(MODEL, 16 * 24, 16 * 12)
    assert planned.model_flops == from_formula / 2
    assert plan.plan_training(full, CPU).model_flops == from_formula
    assert planned.traced_flops > from_formula  # attention scores too


def test_sources_and_targets_are_filled_each_to_its_share():
    shape = dataclasses.replace(RUN.shape, source_fill=0.75, target_fill=0.25)
    found = plan.plan_training(dataclasses.replace(RUN, shape=shape), CPU)
    assert found.model_flops == plan.flops.train_step_flops(MODEL, 16 * 18, 16 * 3)
    assert "fill 0.75 and 0.25 (as given)" in "\n".join(plan_report.report_training(found))


def test_collectives_span_the_axis_that_splits(planned):
    assert {c.axes for c in planned.collectives} == {("fsdp",)}
    assert {c.kind for c in planned.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert planned.host_transfers == []
    in_layers = [c for c in planned.collectives if c.times == 3]
    assert "f32[32,64]" in {c.type for c in in_layers if c.kind == "all-gather"}  # wi_0, whole


@pytest.mark.parametrize("remat", [False, True])
def test_each_matrix_of_a_layer_is_gathered_once_a_pass(remat):
    """In the forward and again in the backward: between them no device keeps it whole."""
    found = plan.plan_training(
        dataclasses.replace(RUN, model=dataclasses.replace(MODEL, remat=remat)), CPU
    )
    in_layers = [c for c in found.collectives if c.kind == "all-gather" and c.times == 3]
    assert len(in_layers) == 2 * ((4 + 3) + (8 + 3))  # attention and feed-forward of both stacks


def test_of_a_gradient_only_the_part_that_is_kept_crosses_data():
    """Beside data, a matrix is gathered and its gradient scattered over fsdp alone."""
    found = plan.plan_training(dataclasses.replace(RUN, mesh=MeshConfig(data=2, fsdp=4)), CPU)
    in_layers = [c for c in found.collectives if c.times == 3]
    gathered = [c for c in in_layers if c.kind == "all-gather"]
    scattered = [c for c in in_layers if c.kind == "reduce-scatter"]
    summed = [c for c in in_layers if c.axes == ("data",)]
    matrices = (4 + 3) + (8 + 3)
    assert len(gathered) == 2 * matrices and len(scattered) == matrices
    assert {c.axes for c in gathered + scattered} == {("fsdp",)}
    assert {c.kind for c in summed} == {"all-reduce"}
    assert sum(c.whole_bytes for c in summed) == sum(c.whole_bytes for c in scattered) / 4
    others = [c for c in in_layers if c not in gathered + scattered + summed]
    assert all("[32,32]" not in c.type and "64" not in c.type for c in others)  # no matrix


@pytest.mark.parametrize("mesh", [MeshConfig(1, 4, 2), MeshConfig(2, 2, 2)])
def test_activations_are_summed_over_tensor_as_often_as_without_fsdp(mesh):
    """A layer's two or three outputs, and the gradient of what its other products read."""

    def num_sums(mesh: MeshConfig) -> int:
        found = plan.plan_training(dataclasses.replace(RUN, mesh=mesh), CPU).collectives
        in_layers = [c for c in found if c.times == 3 and c.axes == ("tensor",)]
        return sum(c.type.count(",32]") for c in in_layers)

    outputs, readers = 2 + 3, (3 + 2) + (3 + 3 + 2)
    assert num_sums(mesh) == num_sums(MeshConfig(4, 1, 2)) == outputs + readers


def test_rows_are_padded_as_in_training():
    run = dataclasses.replace(RUN, shape=dataclasses.replace(RUN.shape, rows=17))
    assert plan.plan_training(run, CPU).rows == 24


def test_decoding_counts_its_cache():
    found = plan.plan_decoding(RUN, CPU)
    assert (found.rows, found.source_length, found.max_length) == (14, 48, 8)
    # Half of the rows and one of four heads a device: what split parameters splits heads.
    a_position = 2 * 3 * 1 * 8 * 4  # keys and values, layers, heads, head dimension, float32
    assert found.memory.kinds["KV cache"] == 7 * 8 * a_position
    assert found.memory.kinds["cross keys and values"] == 7 * 48 * a_position
    assert found.memory.fits()
    longer = dataclasses.replace(RUN.evaluate, with_rationales=True, max_rationale_length=16)
    assert plan.plan_decoding(dataclasses.replace(RUN, evaluate=longer), CPU).max_length == 16
    beam = dataclasses.replace(RUN.evaluate, strategy="beam", num_beams=3)
    beams = plan.plan_decoding(dataclasses.replace(RUN, evaluate=beam), CPU).memory
    assert beams.kinds["KV cache"] == 3 * found.memory.kinds["KV cache"]
    assert beams.peak > found.memory.peak


def test_where_slots_outgrow_their_sources_decoding_is_at_its_planned_peak():
    """Cross-attention's keys, much of all here, are there in two lengths."""
    model = dataclasses.replace(MODEL, d_kv=32, num_layers=1)
    mesh = MeshConfig(1, 1, 1)
    run = dataclasses.replace(RUN, model=model, mesh=mesh, max_input_length=128)
    planned = plan.plan_decoding(run, parse_topology("cpu:1")).memory.peak
    graphdef, params = t5.init_params(model, seed=0)
    decoder = ContinuousDecoder(graphdef, make_mesh(mesh, jax.devices()[:1]), run.evaluate.rows)
    before = held_bytes()
    params = decoder.prepare(params)
    widen, found = decoder.widen_sources, []

    def widen_and_look(*args, **kwargs):
        wider = jax.block_until_ready(widen(*args, **kwargs))
        found.append(held_bytes() - before)
        return wider

    decoder.widen_sources = widen_and_look
    inputs = [np.full(length, 5, np.int32) for length in (20,) * 13 + (90,) * 13 + (128,) * 13]
    decoder(params, inputs, config=DecodeConfig(), max_length=run.evaluate.max_label_length)
    assert 0.9 * planned < max(found) <= planned


def held_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_where_answers_are_scored_that_is_planned():
    """Of longer answers the logits are most, and no cache is kept; with rationales both run."""
    scored = dataclasses.replace(RUN.evaluate, answers="likelihood", max_label_length=256)
    found = plan.plan_decoding(dataclasses.replace(RUN, evaluate=scored), CPU)
    assert not found.decodes and list(found.memory.kinds) == ["parameters"]
    logits = 7 * 256 * MODEL.vocab_size * 4  # half of the rows a device
    assert logits < found.memory.rest < 10 * logits
    assert "score, one chip of the host's 8: 14 rows" in "\n".join(
        plan_report.report_decoding(found)
    )
    both = dataclasses.replace(scored, with_rationales=True)
    decoded = plan.plan_decoding(dataclasses.replace(RUN, evaluate=both), CPU)
    assert decoded.decodes and "KV cache" in decoded.memory.kinds


def test_what_does_not_fit_is_said_and_mended_by_changes_that_were_compiled(planned):
    enough = planned.memory.peak
    assert plan.plan_training(RUN, CPU, hbm_bytes=enough).memory.fits()
    found = plan.plan_training(RUN, CPU, hbm_bytes=enough - 1)
    assert not found.memory.fits()
    assert "DOES NOT FIT" in "\n".join(plan_report.report_training(found))
    suggested = plan_search.suggest(found, hbm_bytes=enough - 1)
    trials = {trial.overrides[0]: trial for trial in suggested}
    half = trials["pipeline.DataConfig.batch_examples = 16"]
    assert half.plan.rows == 8 and half.plan.memory.fits()
    assert (
        trials["optimizer.OptimizerConfig.name = 'adafactor'"].plan.memory.kinds["optimizer state"]
        != (planned.memory.kinds["optimizer state"])
    )
    for overrides in trials:  # they can be pasted behind --gin
        config.parse(["settings/paper.gin"], overrides.split(" and "))


def test_the_largest_batch_fits_and_one_row_a_device_more_does_not(planned):
    limit = int(planned.memory.peak * 2.5)
    best = plan_search.largest_batch(RUN, CPU, hbm_bytes=limit, say=lambda line: None)
    assert best.memory.fits(plan.MARGIN) and best.rows > planned.rows
    shape = dataclasses.replace(best.run.shape, rows=best.rows + 8)
    more = plan.plan_training(dataclasses.replace(RUN, shape=shape), CPU, hbm_bytes=limit)
    assert not more.memory.fits(plan.MARGIN)


def test_the_smallest_number_of_gpus(monkeypatch):
    monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    run = dataclasses.replace(RUN, mesh=MeshConfig(data=1, fsdp=-1))
    one = plan.plan_training(run, parse_topology("h100:1")).memory.peak
    lines = []
    h100 = parse_topology("h100:8")
    best = plan_search.smallest_slice(run, h100, hbm_bytes=int(0.9 * one), say=lines.append)
    assert best.topology.num_chips in (2, 4) and best.memory.fits(plan.MARGIN)
    assert len(lines) > 1 and lines[0].startswith("  h100:1: ") and lines[0].endswith("no")
    lines.clear()
    monkeypatch.setattr(plan_search, "slices", lambda version: [parse_topology("h100:1")])
    best = plan_search.smallest_slice(run, h100, hbm_bytes=int(0.9 * one), say=lines.append)
    assert best.topology == h100 and len(lines) == 2


def test_an_assembler_that_is_missing_is_named():
    def fail(**_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: No PTX compilation provider is available. …")

    lowered = types.SimpleNamespace(compile=fail)
    with pytest.raises(InputError, match=r"h100:1: .*ptxas.*'\.\[plan\]'"):
        plan._compile(lowered, {}, parse_topology("h100:1"), None, False, None)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: … Used 23.40G of 15.75G hbm. Exceeded by 7.66G.", 23.4),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (135.00G) …", 135),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INTERNAL: Used 1.0G of", None),
    ],
)
def test_what_a_compiler_wanted_is_read(message, gib):
    assert plan._wanted_bytes(message) == (gib and int(gib * GIB))


def test_where_a_compiler_gives_up_no_kind_is_larger_than_what_it_wanted():
    def give_up(**_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: … Used 2.00G of 1.00G hbm.")

    lowered = types.SimpleNamespace(compile=give_up)
    found = plan._compile(lowered, {"parameters": 3 * GIB}, CPU, None, True, GIB)[1]
    assert found.rest == 0 and not found.fits()


NO_CUDA = "compiling for GPUs needs their compiler: pip install '.[plan]'"
FACTS = ["plan", "runs/step_by_step.gin", "settings/facts.gin"]
AT_HAND = f"pipeline.DataConfig.records = ({__file__!r},)"


def test_the_command_on_host_devices(capsys):
    shape = ["--rows", "8", "--source_length", "32", "--target_length", "16"]
    tiny = ["--gin", "evaluate.EvalConfig.rows = 8"]
    tiny += ["--gin", "pipeline.DataConfig.max_input_length = 32"]
    assert main([*FACTS, "--topology", "cpu:8", *shape, *tiny]) == 0
    text = capsys.readouterr().out
    assert "32 examples in 8 rows of 32 and 16 tokens, fill 1.00 and 1.00 (as given)" in text
    assert re.search(r"all-reduce +data ", text)
    assert text.count(": fits") == 2  # the step and the decode loop


@pytest.mark.parametrize(
    ("method", "rows", "target_length"),
    [("fine_tuning", 4, 20), ("step_by_step", 8, 20), ("step_by_step_shared", 4, 40)],
)
def test_rows_that_are_assumed_hold_what_a_method_encodes(method, rows, target_length):
    lengths = [
        "source_length = 30",
        "max_input_length = 30",
        "max_target_length = 20",
        "batch_examples = 4",
    ]
    data = [f"pipeline.DataConfig.{binding}" for binding in lengths]
    configs = config.parse([f"runs/{method}.gin", "settings/facts.gin"], data)
    given = argparse.Namespace(rows=None, source_length=None, target_length=None, fill=None)
    shape = batch_shape(given, configs)
    assert (shape.rows, shape.source_length, shape.target_length) == (rows, 30, target_length)


@pytest.mark.parametrize("has_compiler", [True, False])
def test_one_gpu_sends_nothing_and_has_roofs(has_compiler, monkeypatch, capsys):
    if has_compiler:
        pytest.importorskip("jax_plugins.xla_cuda13", reason=NO_CUDA)
    else:
        monkeypatch.setattr(gpu_target, "has_compiler", lambda: False)
    shape = ["--rows", "2", "--source_length", "32", "--target_length", "16"]
    assert main([*FACTS, "--topology", "h100:1", *shape]) == 0
    text = capsys.readouterr().out
    assert "links: 0.0 GB" in text and re.search(r"(compute|memory) binds", text)
    assert ("ESTIMATE" in text) == (not has_compiler)
    assert text.count(": fits") == 2


def test_gpus_are_planned_by_their_own_compiler():
    pytest.importorskip("jax_plugins.xla_cuda13", reason=NO_CUDA)
    sizes = dict(d_kv=16, num_layers=1, num_decoder_layers=1)
    model = dataclasses.replace(MODEL, attention="flash_gpu", dtype="bfloat16", **sizes)
    run = dataclasses.replace(RUN, model=model, mesh=MeshConfig(data=2, fsdp=2))
    found = plan.plan_training(run, parse_topology("h100:4"))
    kinds = {(each.kind, each.axes) for each in found.collectives}
    assert {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))} <= kinds
    assert found.memory.fits() and found.memory.peak > sum(found.memory.kinds.values())
    num_params = t5.count_params(t5.abstract_params(model)[1])
    state = found.memory.kinds["optimizer state"]
    assert state == pytest.approx(2 * 4 * num_params / 2, rel=0.1)


@pytest.mark.usefixtures("libtpu")
def test_decoding_is_planned_on_one_hosts_chips():
    """As `dslt evaluate` does it: each host has the whole student."""
    run = dataclasses.replace(RUN, mesh=MeshConfig(data=1, fsdp=16))
    found = plan.plan_decoding(run, parse_topology("v5e:4x4"), quick=True)
    assert found.num_chips == 4
    num_params = t5.count_params(t5.abstract_params(MODEL)[1])
    assert found.memory.kinds["parameters"] > num_params * 4 / 4


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--topology", "v5:4x8"], "expected a TPU slice"),
        (
            ["--topology", "cpu:1", "--gin", "t5.T5Config.attention = 'flash'"],
            "'flash' is for TPUs",
        ),
        (
            [
                *("--topology", "h100:1", "--gin", "t5.T5Config.attention = 'cudnn'"),
                *("--gin", "t5.T5Config.dtype = 'bfloat16'", "--gin"),
                "t5.T5Config.attention_dropout_rate = 0.0",
            ],
            "is compiled where cuDNN and",
        ),
        (["--topology", "cpu:8", "--gin", "sharding.MeshConfig.fsdp = 3"], "MeshConfig"),
        (["--topology", "cpu:99"], "host devices"),
        (["--topology", "cpu:1", "--fill", "0.5", "--gin", AT_HAND], "the records are at hand"),
    ],
)
def test_bad_input_is_no_traceback(args, says, capsys):
    assert main([*FACTS, *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("fill", ["-3", "0", "nan", "7"])
def test_a_fill_is_a_share(fill, capsys):
    with pytest.raises(SystemExit):
        main([*FACTS, "--topology", "cpu:1", "--fill", fill])
    assert f"argument --fill: invalid share value: '{fill}'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def base_slice(libtpu):
    """The shipped file, compiled for its slice."""
    return plan_base_slice()


def plan_base_slice(*overrides: str) -> plan.TrainPlan:
    configs = config.parse(BASE_SLICE, overrides)
    data = configs.data
    rows = 2 * data.batch_examples
    run = plan.Run(
        configs.train,
        configs.model,
        configs.optimizer,
        configs.mesh,
        configs.evaluate,
        data.max_input_length,
        plan.BatchShape(
            rows,
            data.max_input_length,
            data.max_target_length,
            data.batch_examples,
            1.0,
            1.0,
            "full",
        ),
    )
    return plan.plan_training(run, parse_topology("v5e:2x2"), quick=True)


def test_a_shipped_slice_fits_as_its_header_says(base_slice):
    header = (config.gin_directory() / BASE_SLICE[-1]).read_text()
    assert f"--topology {base_slice.topology}" in header
    said = float(re.search(r"peak ([\d.]+) GiB", header)[1])
    assert base_slice.memory.fits()
    # The header's is of full effort, this one of little.
    assert base_slice.memory.peak / GIB == pytest.approx(said, rel=0.15)


def test_fsdp_gathers_a_matrix_once_a_pass_and_scatters_its_gradient_once(base_slice):
    """Of all matrices in layers: bfloat16, in the forward and again in the backward."""
    layers = [c for c in base_slice.collectives if c.times == 12]
    whole = {
        kind: sum(c.whole_bytes * c.times for c in layers if c.kind == kind and "bf16" in c.type)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    d, f = 768, 2048
    matrices = 12 * ((4 * d * d + 3 * d * f) + (8 * d * d + 3 * d * f))
    assert whole["all-gather"] == 2 * 2 * matrices
    assert whole["reduce-scatter"] == 2 * matrices
    assert whole["all-reduce"] == 0


def test_of_the_embedding_and_the_output_layer_too(base_slice):
    """Gathered in bfloat16, their gradients scattered in float32 (columns padded to 256s)."""
    table = [c for c in base_slice.collectives if c.times == 1 and c.whole_bytes > 768 * 32128]
    assert sorted(c.kind for c in table) == ["all-gather"] * 2 + ["reduce-scatter"] * 2
    sizes = [c.whole_bytes for c in sorted(table, key=lambda c: c.kind)]
    assert sizes[:2] == [2 * 768 * 32128] * 2 and max(sizes[2:]) <= 4 * 768 * 32256


@pytest.mark.usefixtures("libtpu")
def test_plain_attention_with_dropout_compiles_for_tpus():
    """In a process of its own: it overflowed libtpu's stack, which ends the process."""
    bindings = ["attention = 'plain'", "num_layers = 2", "num_decoder_layers = 2"]
    overrides = [f"t5.T5Config.{binding}" for binding in bindings]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        found = pool.submit(plan_base_slice, *overrides).result()
    assert found.memory.fits()
    assert found.run.model.dropout_rate > 0


def test_nothing_else_moves(base_slice):
    """But one number, a permutation, that libtpu has."""
    arrays = [c for c in base_slice.collectives if c.whole_bytes > 4]
    assert {c.kind for c in arrays} <= {
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    }
    assert {c.axes for c in arrays} == {("fsdp",)}
    assert base_slice.host_transfers == []
