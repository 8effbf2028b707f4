"""Log-likelihoods of answer sets against teacher forcing, one answer at a time."""

import jax
import numpy as np
import pytest
from flax import nnx

from dslt.core import t5
from dslt.core.answers import score_answers
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.continuous import pad_answers

SHAPE = {
    "vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
FAST_COMPILE = {"xla_backend_optimization_level": 0}
SOURCES = [[5, 9, 20, 3, 11, 8, EOS_ID], [7, 7, EOS_ID]]
ANSWERS = [
    [[4, EOS_ID], [4, 13, EOS_ID], [4, 13, 22, 6, EOS_ID], [EOS_ID]],
    [[19, 2, EOS_ID], [21, EOS_ID]],  # fewer than the other's
]
FLOAT32_SUMS = 1e-5  # sums in another order; log-likelihoods are near 10

score = jax.jit(score_answers, static_argnames="graphdef", compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module", params=[False, True], ids=["bias_shared", "bias_per_layer"])
def student(request):
    """(graphdef, params) of a random T5."""
    config = t5.T5Config(**SHAPE, relative_bias_per_layer=request.param)
    return t5.init_params(config, seed=0)


def padded_sources(length: int) -> np.ndarray:
    return np.array([source + [PAD_ID] * (length - len(source)) for source in SOURCES], np.int32)


def test_scores_are_the_sums_of_teacher_forced_log_probabilities(student, build_batch):
    graphdef, params = student
    pairs = [(i, answer) for i, answers in enumerate(ANSWERS) for answer in answers]
    batch = build_batch([[(SOURCES[i], answer, 1)] for i, answer in pairs], 7, 5)
    forward = jax.jit(
        lambda params: nnx.merge(graphdef, params)(batch), compiler_options=FAST_COMPILE
    )
    logits = np.asarray(forward(params), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [
        sum(row[position, token] for position, token in enumerate(answer))
        for row, (_, answer) in zip(log_probs, pairs, strict=True)
    ]
    found = score(params, padded_sources(9), pad_answers(ANSWERS, (2, 5, 6)), graphdef=graphdef)
    assert found.shape == (2, 5) and found.dtype == np.float32
    np.testing.assert_allclose([*found[0, :4], *found[1, :2]], expected, atol=FLOAT32_SUMS)
    assert np.ptp(expected) > 1  # they differ


def test_places_without_an_answer_have_no_likelihood(student):
    graphdef, params = student
    found = score(params, padded_sources(7), pad_answers(ANSWERS, (2, 5, 5)), graphdef=graphdef)
    np.testing.assert_array_equal(np.isneginf(found), [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
    assert np.isfinite(jax.nn.softmax(found)).all()
