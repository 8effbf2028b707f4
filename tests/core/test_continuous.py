"""Continuous refilling gives each input what a batch of all of them gives, and each once."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from dslt.core import continuous, hlo, sharding, t5
from dslt.core.answers import score_answers
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.continuous import (
    ContinuousDecoder,
    kept_length,
    pad_answers,
    pad_inputs,
    slot_shardings,
)
from dslt.core.decode import DecodeConfig, decode_batch, start
from dslt.core.sharding import MeshConfig

VOCAB_SIZE = 32
MAX_LENGTH = 40  # the cache begins with 32 positions
GREEDY = DecodeConfig()
CONFIGS = {
    "greedy": GREEDY,
    "sample": DecodeConfig(strategy="sample", top_p=0.9, seed=5),
    "beam": DecodeConfig(strategy="beam", num_beams=2, length_penalty=2.0),
}
batch_decoder = jax.jit(decode_batch, static_argnames=("graphdef", "config", "max_length"))


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    """Of one to seventy tokens: sources of five lengths, kept at three."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB_SIZE, n).astype(np.int32) for n in rng.integers(1, 71, 19)]


@pytest.fixture(scope="module")
def decoder(golden_t5):
    """Four slots on one device, and the golden_t5's parameters as it takes them."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = ContinuousDecoder(golden_t5[0], mesh, rows=4)
    params = decoder.prepare(golden_t5[1])
    return functools.partial(decoder, params), functools.partial(decoder.score, params)


def before_eos(tokens: np.ndarray) -> list[int]:
    ends = np.flatnonzero(tokens == EOS_ID)
    return tokens[: ends[0] if len(ends) else None].tolist()


def in_one_batch(golden_t5, inputs, config=GREEDY, answers=None) -> list[list[int]]:
    """What `decode_batch` gives, before EOS."""
    graphdef, params = golden_t5
    sources = pad_inputs(inputs, len(inputs), 1)
    if answers is not None:
        longest = max(len(answer) for answers_of_row in answers for answer in answers_of_row)
        shape = len(answers), max(map(len, answers)), longest
        answers = pad_answers(answers, shape)
    found = batch_decoder(
        params, sources, graphdef=graphdef, config=config, max_length=MAX_LENGTH, answers=answers
    )
    return [before_eos(row) for row in np.asarray(found)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_refilled_slots_decode_what_a_batch_does(golden_t5, inputs, decoder, config):
    decode, _ = decoder
    counts = []
    found = decode(inputs, config=config, max_length=MAX_LENGTH, on_decoded=counts.append)
    assert found == in_one_batch(golden_t5, inputs, config)
    assert sum(counts) == len(inputs)  # each once
    lengths = [len(row) for row in found]
    # The test would see rows swapped, a slot not cleared, a cache that does not grow or turn.
    assert len(set(lengths)) > 5 and max(lengths) > 32 and sum(lengths) > 4 * MAX_LENGTH


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_last_rows_go_on_in_a_smaller_batch(golden_t5, inputs, monkeypatch, config):
    """Of eight slots four remain, two, one; nothing that is decoded changes."""
    monkeypatch.setattr(continuous, "FEWEST_ROWS", 1)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = ContinuousDecoder(golden_t5[0], mesh, rows=8)
    kept = []
    keep_rows = decoder.keep_rows
    decoder.keep_rows = lambda slots, rows: kept.append(len(rows)) or keep_rows(slots, rows)
    params = decoder.prepare(golden_t5[1])
    found = decoder(params, inputs, config=config, max_length=MAX_LENGTH)
    assert found == in_one_batch(golden_t5, inputs, config)
    assert kept == [4, 2, 1]


def test_fewer_inputs_than_slots_and_inputs_again_change_nothing(golden_t5, inputs, decoder):
    decode, _ = decoder
    expected = in_one_batch(golden_t5, inputs)
    assert decode(inputs[:2], config=GREEDY, max_length=MAX_LENGTH) == expected[:2]
    twice = decode([*inputs[:5], *inputs[:5]], config=GREEDY, max_length=MAX_LENGTH)
    assert twice == [*expected[:5], *expected[:5]]


def test_slots_over_several_devices_decode_the_same(golden_t5, inputs):
    graphdef, params = golden_t5
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    decoder = ContinuousDecoder(graphdef, mesh, rows=3)
    assert decoder.rows == 4
    placed = jax.device_put(params, sharding.state_shardings(mesh, params))
    short = [i for i, tokens in enumerate(inputs) if len(tokens) <= 48]
    found = decoder(
        decoder.prepare(placed), [inputs[i] for i in short], config=GREEDY, max_length=MAX_LENGTH
    )
    expected = in_one_batch(golden_t5, inputs)
    assert found == [expected[i] for i in short] and len(found) > 8


def test_a_step_moves_activations_and_no_matrix(golden_t5):
    """Over fsdp XLA would gather each matrix for each token."""
    graphdef, params = golden_t5
    config = nnx.merge(graphdef, params).config
    whole = sharding.make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    mesh = sharding.decoding_mesh(whole, config.num_heads)
    assert mesh.shape["tensor"] > 1
    decoder = ContinuousDecoder(graphdef, mesh, rows=4)
    placed = decoder.prepare(jax.device_put(params, sharding.state_shardings(mesh, params)))
    inputs = np.ones((4, 32), np.int32), np.zeros(4, np.int32), np.zeros(4, np.int32)
    inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
    with sharding.inside(mesh):
        sources = decoder.encode(placed, *inputs, None, graphdef=graphdef)
        slots = start(sources, GREEDY, cache_length=MAX_LENGTH, max_length=MAX_LENGTH)
        slots = jax.device_put(slots, jax.tree.broadcast(slot_shardings(mesh), slots))
        lowered = decoder.run.lower(placed, slots, 0, graphdef=graphdef, config=GREEDY)
    keys = slots.self_cache[0][0]
    assert keys.sharding.shard_shape(keys.shape)[1] == config.num_heads // mesh.shape["tensor"]
    moved = hlo.find_collectives(lowered.compile().as_text(), mesh.shape)
    feed_forward = placed["decoder"]["layers"][0]["feed_forward"]
    matrices = {leaf.shape for leaf in (*feed_forward.values(), placed["token_embedding"])}
    shapes = re.findall(r"\[([\d,]+)\]", " ".join(each.type for each in moved))
    assert moved and matrices.isdisjoint(tuple(map(int, dims.split(","))) for dims in shapes)


def test_a_bfloat16_model_decodes_the_same_from_rounded_matrices(golden_t5, inputs):
    config = nnx.merge(*golden_t5).config
    graphdef, _ = t5.abstract_params(dataclasses.replace(config, dtype="bfloat16"))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = ContinuousDecoder(graphdef, mesh, rows=4)
    params = decoder.prepare(golden_t5[1])
    assert params["token_embedding"].dtype == "bfloat16"
    assert t5.count_params(params) == t5.count_params(golden_t5[1])  # nothing is held twice
    for path, leaf in jax.tree.leaves_with_path(params):
        names = {str(part) for part in path}
        is_wide = "['scale']" in names or "['relative_bias']" in names
        assert leaf.dtype == ("float32" if is_wide else "bfloat16"), path
    found = decoder(params, inputs, config=GREEDY, max_length=MAX_LENGTH)
    assert found == in_one_batch((graphdef, golden_t5[1]), inputs)


def test_an_empty_input_decodes_to_nothing(inputs, decoder):
    decode, _ = decoder
    empty = np.zeros(0, np.int32)
    mixed = [empty, inputs[0], empty, *inputs[1:4], empty]
    for config in (GREEDY, CONFIGS["beam"]):
        found = decode(mixed, config=config, max_length=MAX_LENGTH)
        expected = decode(inputs[:4], config=config, max_length=MAX_LENGTH)
        assert found == [[], expected[0], [], *expected[1:], []]
    assert decode([], config=GREEDY, max_length=MAX_LENGTH) == []
    assert decode([empty] * 9, config=GREEDY, max_length=MAX_LENGTH) == [[]] * 9


def test_rows_that_end_at_once_end(golden_t5, inputs, decoder):
    graphdef, params = golden_t5
    lm_head = np.array(params["lm_head"])
    lm_head[:, EOS_ID] *= 100.0
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = ContinuousDecoder(graphdef, mesh, rows=4)
    prepared = decoder.prepare({**params, "lm_head": lm_head})
    found = decoder(prepared, inputs, config=GREEDY, max_length=MAX_LENGTH)
    assert found == in_one_batch((graphdef, {**params, "lm_head": lm_head}), inputs)
    assert found.count([]) > 9


def test_another_start_token_decodes_another_text(golden_t5, inputs, decoder):
    graphdef, params = golden_t5
    sources = pad_inputs(inputs, len(inputs), 1)
    settings = {"config": GREEDY, "max_length": MAX_LENGTH, "start_id": 7}
    batch = jax.jit(functools.partial(decode_batch, graphdef=graphdef, **settings))
    found = decoder[0](inputs, **settings)
    assert found == [before_eos(row) for row in np.asarray(batch(params, sources))]
    assert found != decoder[0](inputs, config=GREEDY, max_length=MAX_LENGTH)


def random_answers(rng, most: int) -> list[list[int]]:
    """One to `most` answers of up to six tokens and EOS; some are others' beginnings."""
    longest = rng.integers(2, VOCAB_SIZE, 6).tolist()
    others = [rng.integers(2, VOCAB_SIZE, rng.integers(1, 7)).tolist() for _ in range(most)]
    answers = [longest[:3], longest, [*longest[:3], 9], *others]
    return [[*answer, EOS_ID] for answer in answers[: rng.integers(1, most + 1)]]


def test_answers_are_of_each_inputs_own_set(golden_t5, inputs, decoder):
    """And the greedy ones where the set holds these."""
    rng = np.random.default_rng(1)
    greedy = in_one_batch(golden_t5, inputs)
    answers = [random_answers(rng, 6) for _ in inputs]
    is_held = [
        PAD_ID not in tokens and len(tokens) < 20 and i % 3 > 0 for i, tokens in enumerate(greedy)
    ]
    for tokens, own, is_in in zip(greedy, answers, is_held, strict=True):
        own += [[*tokens, EOS_ID]] * is_in
    found = decoder[0](inputs, config=GREEDY, max_length=MAX_LENGTH, answers=answers)
    assert found == in_one_batch(golden_t5, inputs, answers=answers)
    assert all([*tokens, EOS_ID] in own for tokens, own in zip(found, answers, strict=True))
    assert all(
        one == other for one, other, is_in in zip(found, greedy, is_held, strict=True) if is_in
    )
    assert 4 < sum(is_held) < 12
    assert sum([*tokens, EOS_ID] != own[0] for tokens, own in zip(found, answers, strict=True)) > 5


def test_scores_are_those_of_each_inputs_own_answers(golden_t5, inputs, decoder):
    """In four rows at a time, sorted by length, against one row each."""
    graphdef, params = golden_t5
    rng = np.random.default_rng(2)
    answers = [random_answers(rng, 5) for _ in inputs]
    counts = []
    found = decoder[1](inputs, answers, counts.append)
    assert sum(counts) == len(inputs)
    score = jax.jit(score_answers, static_argnames="graphdef")
    for tokens, own, scores in zip(inputs, answers, found, strict=True):
        padded = pad_inputs([tokens], 1, 70)
        alone = score(params, padded, pad_answers([own], (1, 5, 7)), graphdef=graphdef)
        np.testing.assert_allclose(scores, alone[0, : len(own)], atol=1e-4)  # float32 sums
        assert scores.shape == (len(own),)


def test_greedy_tokens_are_those_of_transformers(inputs, decoder, transformers_t5):
    import torch

    found = decoder[0](inputs, config=GREEDY, max_length=MAX_LENGTH)
    sources = torch.from_numpy(pad_inputs(inputs, len(inputs), 1)).long()
    with torch.inference_mode():
        generated = transformers_t5.generate(
            input_ids=sources,
            attention_mask=(sources != PAD_ID).long(),
            max_new_tokens=MAX_LENGTH,
            do_sample=False,
        )
    assert found == [before_eos(row) for row in generated[:, 1:].numpy()]


def test_kept_lengths_are_two_an_octave():
    lengths = [1, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 256, 500]
    kept = [32, 32, 48, 48, 64, 64, 96, 96, 128, 128, 192, 192, 256, 256, 512]
    assert [kept_length(length) for length in lengths] == kept
