"""Beam search against an exhaustive search, teacher forcing, greedy decoding and transformers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dslt.core import decode, t5
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.decode import DecodeConfig, decode_batch

VOCAB_SIZE = 32
MAX_LENGTH = 10
FLOAT32_SUMS = 1e-4  # ten log-likelihoods near 3, each of sums in another order
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def sources():
    """[24, 12] int32: rows of different lengths, padded."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCAB_SIZE, (24, 12)).astype(np.int32)
    return np.where(np.arange(12) < rng.integers(1, 13, (24, 1)), tokens, PAD_ID)


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "config", "max_length"),
    compiler_options=FAST_COMPILE,
)
def search(params, sources, *, graphdef, config: DecodeConfig, max_length: int = MAX_LENGTH):
    """The finished beams [B, M, T] and their scores [B, M], best first."""
    numbers = jnp.arange(len(sources), dtype=jnp.int32)
    params = t5.unstack_layers(params)
    encoded = decode.encode_sources(
        params, sources, numbers, jnp.zeros_like(numbers), graphdef=graphdef
    )
    slots = decode.start(encoded, config, cache_length=max_length, max_length=max_length)
    slots = decode.run(params, slots, 0, graphdef=graphdef, config=config)
    return slots.beams.finished, slots.beams.finished_scores


def beam(num_beams: int, **fields) -> DecodeConfig:
    return DecodeConfig(strategy="beam", num_beams=num_beams, **fields)


@functools.partial(jax.jit, static_argnames="graphdef", compiler_options=FAST_COMPILE)
def log_likelihoods(params, batch, *, graphdef):
    """[B], by teacher forcing: of each row's target."""
    log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(batch))
    chosen = jnp.take_along_axis(log_probs, batch.decoder_target_tokens[..., None], axis=-1)
    return (chosen[..., 0] * batch.decoder_loss_weights).sum(-1)


def cut(tokens: np.ndarray) -> list[int]:
    """The tokens up to and including EOS."""
    ends = np.flatnonzero(tokens == EOS_ID)
    return tokens[: ends[0] + 1 if len(ends) else None].tolist()


def test_with_enough_beams_it_finds_the_most_likely_of_all_sequences(golden_t5, build_batch):
    """Three tokens: V² beams hold every beginning, so nothing is lost."""
    graphdef, params = golden_t5
    few = 6  # a vocabulary small enough to write out
    params = {**params, "lm_head": params["lm_head"][:, :few]}
    others = [token for token in range(few) if token != EOS_ID]
    sequences = [
        [*beginning, last]
        for length in range(3)
        for beginning in itertools.product(others, repeat=length)
        for last in (range(few) if length == 2 else [EOS_ID])
    ]
    source = np.array([9, 4, 17, 23], np.int32)
    batch = build_batch([[(source, sequence, 1)] for sequence in sequences], 4, 3)
    expected = np.asarray(log_likelihoods(params, batch, graphdef=graphdef))
    assert np.exp(expected).sum() == pytest.approx(1.0, abs=1e-5)
    config = beam(few**2, length_penalty=0.0)
    found, scores = search(params, source[None], graphdef=graphdef, config=config, max_length=3)
    order = np.argsort(-expected)[: few**2]
    np.testing.assert_allclose(scores[0], expected[order], atol=FLOAT32_SUMS)
    assert [cut(row) for row in np.asarray(found)[0, :10]] == [sequences[i] for i in order[:10]]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_a_score_is_the_log_likelihood_over_a_power_of_the_length(
    golden_t5, sources, build_batch, length_penalty
):
    graphdef, params = golden_t5
    config = beam(3, length_penalty=length_penalty)
    found, scores = search(params, sources, graphdef=graphdef, config=config)
    targets = [cut(tokens) for row in np.asarray(found) for tokens in row]
    own = np.repeat(sources, 3, axis=0)
    rows = [
        [(source[source != PAD_ID], target, 1)] for source, target in zip(own, targets, strict=True)
    ]
    batch = build_batch(rows, 12, MAX_LENGTH)
    expected = np.asarray(log_likelihoods(params, batch, graphdef=graphdef))
    expected = expected / np.array([len(target) for target in targets]) ** length_penalty
    np.testing.assert_allclose(scores, expected.reshape(-1, 3), atol=FLOAT32_SUMS)
    assert (np.diff(scores) <= 0).all()
    assert len({tuple(target) for target in targets[:3]}) == 3


def test_one_beam_is_greedy(golden_t5, sources):
    graphdef, params = golden_t5
    found, _ = search(params, sources, graphdef=graphdef, config=beam(1))
    greedy = jax.jit(decode_batch, static_argnames=("graphdef", "max_length"))
    expected = greedy(params, sources, graphdef=graphdef, max_length=MAX_LENGTH)
    np.testing.assert_array_equal(found[:, 0], expected)


def generate(model, sources: np.ndarray, **settings) -> tuple[list, np.ndarray]:
    """The finished beams of each row up to EOS, and their scores [B, M]."""
    import torch

    ids = torch.from_numpy(sources).long()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD_ID).long(),
            max_new_tokens=MAX_LENGTH,
            num_return_sequences=settings["num_beams"],
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    shape = len(sources), settings["num_beams"]
    beams = output.sequences[:, 1:].numpy()
    rows = [[cut(tokens) for tokens in row] for row in beams.reshape(*shape, -1)]
    return rows, output.sequences_scores.numpy().reshape(shape)


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"),
    [(0.0, False), (0.6, False), (1.0, False), (2.0, False), (2.0, True)],
)
def test_beams_and_scores_are_those_of_transformers(
    golden_t5, sources, transformers_t5, length_penalty, early_stopping
):
    graphdef, params = golden_t5
    settings = {
        "num_beams": 3,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    expected, expected_scores = generate(transformers_t5, sources, **settings)
    found, scores = search(params, sources, graphdef=graphdef, config=beam(**settings))
    found = [[cut(tokens) for tokens in row] for row in np.asarray(found)]
    assert found == expected
    np.testing.assert_allclose(scores, expected_scores, atol=FLOAT32_SUMS)


def test_early_stopping_and_the_penalty_matter(golden_t5, sources):
    """Or the comparisons above would not tell them apart."""
    graphdef, params = golden_t5
    configs = [
        beam(3, length_penalty=2.0),
        beam(3, length_penalty=2.0, early_stopping=True),
        beam(3, length_penalty=0.0),
    ]
    found = [np.asarray(search(params, sources, graphdef=graphdef, config=c)[0]) for c in configs]
    for one, other in itertools.combinations(found, 2):
        assert (one[:, 0] != other[:, 0]).any(-1).sum() > 3  # rows
    assert len({len(cut(tokens)) for tokens in found[2][:, 0]}) > 3
