"""Greedy decoding with the cache against teacher forcing and against the rules of its ends.

Refilled slots are tested in test_continuous.py, beams in test_beam_search.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dslt.core import t5
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.decode import DecodeConfig, decode_batch
from dslt.errors import InputError

SHAPE = {
    "vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2,
    "num_decoder_layers": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
FAST_COMPILE = {"xla_backend_optimization_level": 0}
decode = jax.jit(
    decode_batch, static_argnames=("graphdef", "max_length"), compiler_options=FAST_COMPILE
)


def random_sources(rows: int, length: int) -> np.ndarray:
    """[rows, length] int32: rows of different lengths, padded."""
    tokens = np.random.default_rng(0).integers(2, 24, (rows, length)).astype(np.int32)
    for row in range(rows):
        tokens[row, length - row :] = PAD_ID
    return tokens


@pytest.fixture(scope="module", params=[False, True], ids=["bias_shared", "bias_per_layer"])
def student(request):
    """(graphdef, params) of a random T5."""
    config = t5.T5Config(**SHAPE, relative_bias_per_layer=request.param)
    return t5.init_params(config, seed=14)  # of thirty seeds the one that repeats itself least


def make_eos_of(token: int, params: dict) -> dict:
    """Params that decode EOS where they decoded `token`: two columns swapped."""
    order = np.arange(params["lm_head"].shape[1])
    order[[token, EOS_ID]] = order[[EOS_ID, token]]
    return {**params, "lm_head": params["lm_head"][:, order]}


def test_cached_decoding_equals_teacher_forcing(student, build_batch):
    """Each decoded token is the argmax of a whole forward over the tokens before it."""
    graphdef, params = student
    sources = random_sources(3, 9)
    decoded = np.asarray(decode(params, sources, graphdef=graphdef, max_length=7))
    rows = [
        [(source[source != PAD_ID], tokens, 1)]
        for source, tokens in zip(sources, decoded, strict=True)
    ]
    batch = build_batch(rows, 9, 7)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(batch))(params)
    for row, tokens in enumerate(decoded):
        length = list(tokens).index(EOS_ID) + 1 if EOS_ID in tokens else 7
        np.testing.assert_array_equal(np.asarray(logits)[row, :length].argmax(-1), tokens[:length])
    assert len(np.unique(decoded)) > 6  # the test would see an off-by-one


@pytest.mark.parametrize("cache_length", [12, 6], ids=["roomy", "ring_wraps"])
def test_cached_logits_equal_teacher_forced_logits(student, build_batch, cache_length):
    """Rows that begin at steps 0, 3 and 5, the later ones where others' keys lay before."""
    graphdef, params = student
    begins, length = np.array([0, 3, 5]), 6
    rng = np.random.default_rng(1)
    targets = rng.integers(2, 24, (3, length)).astype(np.int32)
    sources = random_sources(3, 9)
    rows = [
        [(source[source != PAD_ID], target, 1)]
        for source, target in zip(sources, targets, strict=True)
    ]
    batch = build_batch(rows, 9, length)
    num_steps = begins.max() + length
    fed = rng.integers(2, 24, (num_steps, 3)).astype(np.int32)
    for row, begin in enumerate(begins):
        fed[begin : begin + length, row] = batch.decoder_input_tokens[row]
    step, column = np.arange(num_steps)[:, None, None], np.arange(cache_length)
    distance = (step - column) % cache_length
    age = step - np.where(step < begins[:, None], 0, begins[:, None])
    can_see = (distance <= age)[:, :, None, :, None]  # [steps, B, 1, N, 1]

    def both(params):
        model = nnx.merge(graphdef, params)
        layers = t5.unstack_layers(params)["decoder"]["layers"]
        encoded = model.encode(model.embed(sources), (sources != PAD_ID).astype(jnp.int32))
        shape = (3, SHAPE["num_heads"], cache_length, SHAPE["d_kv"])
        cache = [
            t5.LayerCache(jnp.zeros(shape), jnp.zeros(shape), *cross)
            for cross in model.cross_keys_values(encoded, layers)
        ]

        def take_step(cache, inputs):
            step, tokens, can_see = inputs
            logits, cache = model.decode_step(
                tokens[:, None], layers, cache, sources != PAD_ID, step, can_see
            )
            return cache, logits[:, 0]

        steps = jnp.arange(num_steps, dtype=jnp.int32), fed, can_see
        return jax.lax.scan(take_step, cache, steps)[1], model(batch)

    stepped, forced = jax.jit(both, compiler_options=FAST_COMPILE)(params)
    for row, begin in enumerate(begins):
        # float32 sums in another order
        np.testing.assert_allclose(stepped[begin : begin + length, row], forced[row], atol=1e-5)


def test_padding_of_the_source_changes_nothing(student):
    graphdef, params = student
    source = random_sources(1, 6)
    padded = np.pad(source, ((0, 0), (0, 5)))
    np.testing.assert_array_equal(
        decode(params, source, graphdef=graphdef, max_length=6),
        decode(params, padded, graphdef=graphdef, max_length=6),
    )


def test_rows_do_not_see_each_other(student):
    graphdef, params = student
    sources = random_sources(3, 9)
    together = np.asarray(decode(params, sources, graphdef=graphdef, max_length=7))
    for row in range(3):
        alone = decode(params, sources[row : row + 1], graphdef=graphdef, max_length=7)
        np.testing.assert_array_equal(alone[0], together[row])


def test_tokens_end_with_eos_and_then_padding(student):
    graphdef, params = student
    sources = random_sources(4, 9)
    endless = np.asarray(decode(params, sources, graphdef=graphdef, max_length=10))
    assert EOS_ID not in endless
    token = endless[0, 4]
    ended = decode(make_eos_of(token, params), sources, graphdef=graphdef, max_length=10)
    for row, tokens in zip(endless, np.asarray(ended), strict=True):
        length = list(row).index(token) if token in row else 10
        np.testing.assert_array_equal(tokens[:length], row[:length])
        np.testing.assert_array_equal(tokens[length : length + 1], [EOS_ID][: 10 - length])
        assert not tokens[length + 1 :].any()


def test_a_row_of_padding_decodes_to_padding(student):
    graphdef, params = student
    sources = np.concatenate([random_sources(1, 9), np.zeros((1, 9), np.int32)])
    decoded = np.asarray(decode(params, sources, graphdef=graphdef, max_length=5))
    assert not decoded[1].any()
    assert decoded[0].any()


def test_decoding_stops_when_all_rows_have_ended(student, monkeypatch):
    graphdef, params = student
    num_steps = 0
    step = t5.T5.decode_step

    def count_step():
        nonlocal num_steps
        num_steps += 1

    def counted_step(self, *args):
        jax.debug.callback(count_step)
        return step(self, *args)

    monkeypatch.setattr(t5.T5, "decode_step", counted_step)

    @jax.jit
    def run(params, sources):
        return decode_batch(params, sources, graphdef=graphdef, max_length=50)

    def steps_of(params, sources):
        nonlocal num_steps
        num_steps = 0
        decoded = np.asarray(run(params, sources))
        jax.effects_barrier()
        return decoded, num_steps

    source = np.repeat(random_sources(1, 9), 2, axis=0)
    decoded, _ = steps_of(params, source)
    first, *later = decoded[0]
    last = next(token for token in later if token not in (first, EOS_ID))
    ends = list(decoded[0]).index(last)
    assert steps_of(make_eos_of(last, params), source)[1] == ends + 1
    assert steps_of(params, np.zeros((2, 9), np.int32))[1] == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"strategy": "best"}, "strategy is 'best'; expected one of greedy, sample, beam"),
        ({"temperature": 0.0}, "temperature is 0.0; expected at least 1e-30"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; expected 0 (all tokens) or more"),
        ({"top_k": 2**31}, "top_k is 2147483648; expected 0 (all tokens) or more, below 2**31"),
        ({"top_p": 0.0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1; expected 0 <= seed"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"num_beams": 0}, "num_beams is 0; expected >= 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; expected a finite number"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(fields, says):
    with pytest.raises(InputError) as error:
        DecodeConfig(**fields)
    assert f"DecodeConfig.{says}" in str(error.value)
