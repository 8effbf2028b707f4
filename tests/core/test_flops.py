"""The FLOPs formula against a count by hand."""

import dataclasses

from dslt.core.flops import train_step_flops
from dslt.core.t5 import T5Config, abstract_params, count_params

CONFIG = T5Config(
    vocab_size=11, d_model=4, d_kv=3, d_ff=5, num_heads=2, num_layers=1, num_decoder_layers=1
)


def test_each_matrix_counts_once_for_each_token_that_passes_it():
    attention, feed_forward = 4 * 4 * 6, 3 * 4 * 5  # query, key, value, out; wi_0, wi_1, wo
    assert train_step_flops(CONFIG, 1, 0) == 6 * (attention + feed_forward + 2 * 4 * 6)
    assert train_step_flops(CONFIG, 0, 1) == 6 * (attention + 2 * 4 * 6 + feed_forward + 4 * 11)


def test_all_parameters_but_the_embedding_norms_and_biases_are_matrices():
    params = abstract_params(CONFIG)[1]
    others = 11 * 4 + 2 * 32 * 2 + 7 * 4  # token embedding, two bias tables, seven norms
    assert train_step_flops(CONFIG, 1, 1) == 6 * (count_params(params) - others)


def test_relu_has_one_matrix_less():
    relu = dataclasses.replace(CONFIG, feed_forward_proj="relu")
    assert train_step_flops(CONFIG, 1, 0) - train_step_flops(relu, 1, 0) == 6 * 4 * 5
