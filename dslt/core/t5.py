"""T5 in Flax NNX: v1.0, v1.1/FLAN, mT5, ByT5 and umT5 by configuration.

Modules hold parameters only. Layers are stacked: every parameter under `layers` has a leading axis
L and the forward is a `jax.lax.scan` over it. Dropout keys and KV caches are arguments. Parameters
are float32, and so are softmax, normalisation and logits; the other activations have
`config.dtype`.

    graphdef, params = init_params(config, seed=0)       # params: a nested dict of arrays
    model = nnx.merge(graphdef, params)                  # inside the loss
    logits = model(batch, key)                           # [B, T, V] float32

Letters: B rows, S source, T target, V vocab, D model, F feed-forward, H heads, K head dimension,
L layers; N stands for whichever of S and T is attended to.

Source: the architecture of Raffel et al. 2020 (arXiv 1910.10683) and Shazeer 2020 (arXiv
2002.05202); names of the config fields follow Hugging Face's `config.json` of T5.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dslt.core.batch import PAD_ID, Batch
from dslt.core.sharding import gather_again, gather_matrix, gather_width, split_rows
from dslt.errors import InputError

MASKED = -1e9  # finite, so that a row of padding has a softmax too


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5. The defaults are T5 v1.1 small.

    Attributes:
      num_layers: encoder layers; `num_decoder_layers` may differ (ByT5).
      feed_forward_proj: `gated-gelu` (v1.1 and later) or `relu` (v1.0).
      tie_word_embeddings: the output projection is the input embedding (v1.0).
      scale_decoder_outputs: the decoder's output is multiplied by D**-0.5 before a tied projection.
      relative_bias_per_layer: a bias table a layer (umT5) instead of one a stack.
      dtype: of activations, `float32` or `bfloat16`. float16 overflows in T5's feed-forward.
      remat: recompute each layer in the backward pass, for memory.
      scan_unroll: layers per iteration of the scan; more compiles longer and may run faster.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_heads: int = 6
    num_layers: int = 8
    num_decoder_layers: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    relative_bias_per_layer: bool = False
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"T5Config.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16' (T5's "
                "feed-forward overflows float16)"
            )
        if self.feed_forward_proj not in ("gated-gelu", "relu"):
            raise InputError(
                f"T5Config.feed_forward_proj is {self.feed_forward_proj!r}; expected 'gated-gelu' "
                "or 'relu'"
            )
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "scan_unroll")
        for field in (*sizes, "num_layers", "num_decoder_layers"):
            if getattr(self, field) < 1:
                raise InputError(f"T5Config.{field} is {getattr(self, field)}; expected >= 1")
        if self.relative_attention_num_buckets < 4:
            found = self.relative_attention_num_buckets
            raise InputError(
                f"T5Config.relative_attention_num_buckets is {found}; expected at least 4"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise InputError(
                f"T5Config.dropout_rate is {self.dropout_rate}; expected 0 <= rate < 1"
            )


class KVCache(NamedTuple):
    """What the decoder keeps between steps. Keys and values: [L, B, length, H, K]."""

    self_keys: jax.Array  # [L, B, T, H, K]
    self_values: jax.Array
    cross_keys: jax.Array  # [L, B, S, H, K]
    cross_values: jax.Array


class LayerNorm(nnx.Module):
    """Root-mean-square norm without mean or bias, computed in float32."""

    def __init__(self, config: T5Config):
        self.scale = nnx.Param(jnp.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...]).astype(x.dtype)


class RelativeBias(nnx.Module):
    """T5's relative-position bias: one learnt scalar a head and a bucket of distances."""

    def __init__(self, config: T5Config, bidirectional: bool, rngs: nnx.Rngs):
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.embedding = _normal(rngs, shape, config.d_model**-0.5)
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance

    def __call__(self, query_positions, key_positions):
        """[Q] and [N] int32 positions to a bias [1, H, Q, N] float32."""
        distances = key_positions[None, :] - query_positions[:, None]
        num_buckets = self.embedding.shape[0]
        buckets = relative_position_bucket(
            distances, self.bidirectional, num_buckets, self.max_distance
        )
        # A matmul with the one-hot: its backward is a matmul too, where a gather's would scatter.
        one_hot = jax.nn.one_hot(buckets, num_buckets)
        return jnp.einsum("qnc,ch->hqn", one_hot, self.embedding[...])[None]


class Attention(nnx.Module):
    """Multi-head attention, unscaled: T5 folds 1/√K into the initialisation of the query."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        d_model, heads, head_dim = config.d_model, config.num_heads, config.d_kv
        self.query = _normal(rngs, (d_model, heads, head_dim), (d_model * head_dim) ** -0.5)
        self.key = _normal(rngs, (d_model, heads, head_dim), d_model**-0.5)
        self.value = _normal(rngs, (d_model, heads, head_dim), d_model**-0.5)
        self.out = _normal(rngs, (heads, head_dim, d_model), (heads * head_dim) ** -0.5)
        self.dropout_rate = config.dropout_rate

    def keys_values(self, memory):
        """[B, N, D] to keys and values, each [B, N, H, K]."""
        return _project(memory, self.key), _project(memory, self.value)

    def attend(self, x, keys, values, bias, mask, dropout_key=None):
        """[B, Q, D] over keys [B, N, H, K]; bias [1, H, Q, N] or None; mask [B, 1, Q, N] bool."""
        queries = _project(x, self.query)
        scores = jnp.einsum("bqhk,bnhk->bhqn", queries, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(x.dtype)
        weights = dropout(weights, self.dropout_rate, dropout_key)
        mixed = jnp.einsum("bhqn,bnhk->bqhk", weights, values)
        return _project(mixed, self.out, num_contracted=2, is_split_last=True)


class FeedForward(nnx.Module):
    """`relu(x·wi)·wo`, or `(gelu(x·wi_0) ⊙ x·wi_1)·wo` when gated."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        d_model, d_ff = config.d_model, config.d_ff
        self.is_gated = config.feed_forward_proj == "gated-gelu"
        if self.is_gated:
            self.wi_0 = _normal(rngs, (d_model, d_ff), d_model**-0.5)
            self.wi_1 = _normal(rngs, (d_model, d_ff), d_model**-0.5)
        else:
            self.wi = _normal(rngs, (d_model, d_ff), d_model**-0.5)
        self.wo = _normal(rngs, (d_ff, d_model), d_ff**-0.5)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, dropout_key=None):
        if self.is_gated:
            hidden = jax.nn.gelu(_project(x, self.wi_0), approximate=True) * _project(x, self.wi_1)
        else:
            hidden = jax.nn.relu(_project(x, self.wi))
        hidden = dropout(hidden, self.dropout_rate, dropout_key)
        return _project(hidden, self.wo, is_split_last=True)


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward; each normalised before and added after."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.self_attention_norm = LayerNorm(config)
        self.self_attention = Attention(config, rngs)
        self.feed_forward_norm = LayerNorm(config)
        self.feed_forward = FeedForward(config, rngs)
        if config.relative_bias_per_layer:
            self.relative_bias = RelativeBias(config, bidirectional=True, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, bias, mask, dropout_key=None):
        """[B, S, D] to [B, S, D]; `bias` is None where each layer has its own."""
        keys = _split(dropout_key, 4)
        bias = _stack_or_own_bias(self, bias, jnp.arange(x.shape[1]), jnp.arange(x.shape[1]))
        normed = self.self_attention_norm(x)
        memory = self.self_attention.keys_values(normed)
        attended = self.self_attention.attend(normed, *memory, bias, mask, keys[0])
        x = x + dropout(attended, self.dropout_rate, keys[1])
        fed = self.feed_forward(self.feed_forward_norm(x), keys[2])
        return x + dropout(fed, self.dropout_rate, keys[3])


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention, feed-forward."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.self_attention_norm = LayerNorm(config)
        self.self_attention = Attention(config, rngs)
        self.cross_attention_norm = LayerNorm(config)
        self.cross_attention = Attention(config, rngs)
        self.feed_forward_norm = LayerNorm(config)
        self.feed_forward = FeedForward(config, rngs)
        if config.relative_bias_per_layer:
            self.relative_bias = RelativeBias(config, bidirectional=False, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, encoded, bias, self_mask, cross_mask, dropout_key=None):
        """Teacher forcing: [B, T, D] to [B, T, D] over `encoded` [B, S, D]."""
        keys = _split(dropout_key, 6)
        bias = _stack_or_own_bias(self, bias, jnp.arange(x.shape[1]), jnp.arange(x.shape[1]))
        normed = self.self_attention_norm(x)
        memory = self.self_attention.keys_values(normed)
        attended = self.self_attention.attend(normed, *memory, bias, self_mask, keys[0])
        x = x + dropout(attended, self.dropout_rate, keys[1])
        memory = self.cross_attention.keys_values(encoded)
        return self._after_self_attention(x, memory, cross_mask, keys[2:])

    def step(self, x, cache: KVCache, bias, cross_mask, index):
        """One position with a cache of this layer: [B, 1, D], and its self keys and values."""
        normed = self.self_attention_norm(x)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cached, new, index, axis=1)
            for cached, new in zip(cache[:2], self.self_attention.keys_values(normed), strict=True)
        )
        positions = jnp.arange(keys.shape[1])
        bias = _stack_or_own_bias(self, bias, index[None], positions)
        mask = (positions <= index)[None, None, None, :]
        x = x + self.self_attention.attend(normed, keys, values, bias, mask)
        memory = cache.cross_keys, cache.cross_values
        x = self._after_self_attention(x, memory, cross_mask, _split(None, 4))
        return x, (keys, values)

    def _after_self_attention(self, x, memory, cross_mask, keys):
        normed = self.cross_attention_norm(x)
        attended = self.cross_attention.attend(normed, *memory, None, cross_mask, keys[0])
        x = x + dropout(attended, self.dropout_rate, keys[1])
        fed = self.feed_forward(self.feed_forward_norm(x), keys[2])
        return x + dropout(fed, self.dropout_rate, keys[3])


class Stack(nnx.Module):
    """An encoder's or a decoder's layers, stacked on axis 0, with what they share."""

    def __init__(self, layer_type, num_layers: int, config: T5Config, rngs: nnx.Rngs):
        self.layers = nnx.vmap(lambda keys: layer_type(config, keys))(rngs.split(num_layers))
        self.final_norm = LayerNorm(config)
        if not config.relative_bias_per_layer:
            bidirectional = layer_type is EncoderLayer
            self.relative_bias = RelativeBias(config, bidirectional, rngs)
        self.config = config
        self.num_layers = num_layers

    def shared_bias(self, query_positions, key_positions):
        """The bias of the whole stack [1, H, Q, N], or None where layers have their own."""
        if self.config.relative_bias_per_layer:
            return None
        return self.relative_bias(query_positions, key_positions)

    def __call__(self, x, *layer_inputs, dropout_key=None):
        """Runs `layer(x, *layer_inputs, key)` for each layer, then the final norm: [B, N, D]."""
        keys = _split(dropout_key, self.num_layers + 2)
        x = dropout(x, self.config.dropout_rate, keys[0])
        graphdef, params = nnx.split(self.layers)

        def run_layer(x, layer):
            layer_params, key = layer
            return split_rows(nnx.merge(graphdef, layer_params)(x, *layer_inputs, key)), None

        if self.config.remat:
            run_layer = jax.checkpoint(run_layer, prevent_cse=False)
        else:
            run_layer = gather_again(run_layer)
        layer_keys = None if dropout_key is None else keys[2:]
        x, _ = jax.lax.scan(run_layer, x, (params, layer_keys), unroll=self.config.scan_unroll)
        return dropout(self.final_norm(x), self.config.dropout_rate, keys[1])

    def step(self, x, cache: KVCache, bias, cross_mask, index):
        """One cached position through all layers: [B, 1, D] and the cache written."""
        graphdef, params = nnx.split(self.layers)

        def run_layer(x, layer):
            layer_params, layer_cache = layer
            return nnx.merge(graphdef, layer_params).step(x, layer_cache, bias, cross_mask, index)

        unroll = self.config.scan_unroll
        x, (keys, values) = jax.lax.scan(run_layer, x, (params, cache), unroll=unroll)
        return self.final_norm(x), cache._replace(self_keys=keys, self_values=values)


class T5(nnx.Module):
    """The encoder-decoder. Shapes are those of `Batch`."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = _normal(rngs, (config.vocab_size, config.d_model), 1.0)
        self.encoder = Stack(EncoderLayer, config.num_layers, config, rngs)
        self.decoder = Stack(DecoderLayer, config.num_decoder_layers, config, rngs)
        if not config.tie_word_embeddings:
            shape = (config.d_model, config.vocab_size)
            self.lm_head = _normal(rngs, shape, config.d_model**-0.5)

    def __call__(self, batch: Batch, dropout_key=None):
        """Teacher-forced logits [B, T, V] float32; dropout is off where the key is None."""
        encoder_key, decoder_key = _split(dropout_key, 2)
        encoded = self.encode(batch.encoder_input_tokens, batch.encoder_segment_ids, encoder_key)
        hidden = self.decode(encoded, batch, decoder_key)
        return self.logits(hidden)

    def encode(self, tokens, segment_ids, dropout_key=None):
        """[B, S] int32 tokens to [B, S, D]; a token attends to its own segment."""
        positions = jnp.arange(tokens.shape[1])
        bias = self.encoder.shared_bias(positions, positions)
        mask = segment_mask(segment_ids, segment_ids)
        return self.encoder(self.embed(tokens), bias, mask, dropout_key=dropout_key)

    def decode(self, encoded, batch: Batch, dropout_key=None):
        """[B, S, D] encodings and the batch's targets to hidden states [B, T, D]."""
        inputs = shift_right(batch.decoder_target_tokens, batch.decoder_positions)
        segment_ids = batch.decoder_segment_ids
        positions = jnp.arange(inputs.shape[1])
        bias = self.decoder.shared_bias(positions, positions)
        causal = positions[:, None] >= positions[None, :]
        self_mask = segment_mask(segment_ids, segment_ids) & causal
        cross_mask = segment_mask(segment_ids, batch.encoder_segment_ids)
        layer_inputs = encoded, bias, self_mask, cross_mask
        return self.decoder(self.embed(inputs), *layer_inputs, dropout_key=dropout_key)

    def init_cache(self, encoded, max_length: int) -> KVCache:
        """Cross keys and values of [B, S, D], once, and room for `max_length` decoded positions."""
        graphdef, params = nnx.split(self.decoder.layers)

        def project(layer_params):
            return nnx.merge(graphdef, layer_params).cross_attention.keys_values(encoded)

        cross_keys, cross_values = jax.lax.map(project, params)
        layers, rows, _, heads, head_dim = cross_keys.shape
        empty = jnp.zeros((layers, rows, max_length, heads, head_dim), encoded.dtype)
        return KVCache(empty, empty, cross_keys, cross_values)

    def decode_step(self, tokens, cache: KVCache, source_mask, index):
        """The logits after one more token.

        Args:
          tokens: [B] int32, the token at position `index` of the decoder's input.
          cache: of the positions before `index`.
          source_mask: [B, S] bool, true at the source's tokens.
          index: scalar int32.

        Returns:
          Logits [B, V] float32 and the cache with position `index` written.
        """
        bias = self.decoder.shared_bias(index[None], jnp.arange(cache.self_keys.shape[2]))
        cross_mask = source_mask[:, None, None, :]
        hidden, cache = self.decoder.step(
            self.embed(tokens[:, None]), cache, bias, cross_mask, index
        )
        return self.logits(hidden)[:, 0], cache

    def embed(self, tokens):
        """[B, N] int32 to [B, N, D]."""
        embedded = jnp.take(gather_width(self.token_embedding[...]), tokens, axis=0)
        return split_rows(embedded.astype(self.config.dtype))

    def logits(self, hidden):
        """[B, N, D] to [B, N, V] float32."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        if self.config.tie_word_embeddings:
            weight = self.token_embedding[...].T
        else:
            weight = self.lm_head[...]
        weight = weight.astype(hidden.dtype)
        return split_rows(jnp.matmul(hidden, weight, preferred_element_type=jnp.float32))


def init_params(config: T5Config, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A graph definition and freshly initialised parameters, a nested dict of float32 arrays."""
    graphdef, state = nnx.split(T5(config, nnx.Rngs(seed)), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def abstract_params(config: T5Config) -> tuple[nnx.GraphDef, dict]:
    """As `init_params`, with `jax.ShapeDtypeStruct` in place of arrays: nothing is computed."""
    model = nnx.eval_shape(lambda: T5(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def count_params(params: dict) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def segment_mask(query_segments, key_segments):
    """[B, Q] and [B, N] segment ids to [B, 1, Q, N] bool: same segment. Padding sees padding."""
    return query_segments[:, None, :, None] == key_segments[:, None, None, :]


def shift_right(target_tokens, positions):
    """[B, T] targets to decoder inputs: the token before, and the start token at position 0."""
    shifted = jnp.roll(target_tokens, 1, axis=1)
    return jnp.where(positions == 0, PAD_ID, shifted)


def relative_position_bucket(distances, bidirectional: bool, num_buckets: int, max_distance: int):
    """Buckets of key minus query position: exact when near, logarithmic up to `max_distance`.

    Args:
      distances: int32, any shape.
      bidirectional: half the buckets for keys behind the query, half for those ahead; otherwise
        every key ahead shares bucket 0 (causal attention masks it).

    Returns:
      int32 in [0, num_buckets), the shape of `distances`.

    Source: Raffel et al. 2020, section 2.1; the rounding is that of the released models.
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        distance = jnp.abs(distances)
    else:
        distance = jnp.maximum(-distances, 0)
    # Where the buckets after the first start, as integers: the logarithm of the released models,
    # float32 on the device, rounds differently on each kind of accelerator.
    num_exact = num_buckets // 2
    growth = (max_distance / num_exact) ** (1 / (num_buckets - num_exact))
    far_starts = [
        math.ceil(num_exact * growth**step - 1e-6) for step in range(1, num_buckets - num_exact)
    ]
    starts = jnp.array([*range(1, num_exact + 1), *far_starts])
    return offset + (distance[..., None] >= starts).sum(-1)


def dropout(x, rate: float, key):
    """Zeroes a share `rate` of the entries and scales the rest up; x itself where key is None.

    Every token draws its own mask. The original T5 shares one along the length, which in a packed
    row would tie different examples together.
    """
    if key is None or rate == 0.0:
        return x
    keep = _hashed_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _hashed_bits(key, shape: tuple[int, ...]):
    """Random uint32 for dropout: each entry's index, hashed with the key's two words.

    `jax.random.bits` spends a threefry block on each entry, which on a CPU is most of a train step;
    a mask needs less. As there, the bits depend on key and shape alone, not on the sharding.

    Source: the finaliser of MurmurHash3 (Appleby, public domain), twice.
    """
    first, second = jax.random.key_data(key)
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        index = index * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(_mix(index ^ first) + second)


def _mix(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape))


def _project(x, weight: nnx.Param, num_contracted: int = 1, is_split_last: bool = False):
    """x [B, N, ...] by a weight whose first `num_contracted` dimensions are x's last: [B, N, ...].

    `is_split_last` says that the weight's last dimension is the one over fsdp, not its first.

    Written as one product of matrices: the gradient of a three-dimensional product transposes its
    operands on a CPU, and the feed-forward's backward then takes four times as long.
    """
    weight = weight[...].astype(x.dtype)
    contracted, kept = weight.shape[:num_contracted], weight.shape[num_contracted:]
    matrix = weight.reshape(math.prod(contracted), math.prod(kept))
    if x.shape[1] > 1:  # to decode one position, moving activations is cheaper: XLA may choose
        matrix = gather_matrix(matrix, is_split_last)
    return (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(*x.shape[:2], *kept)


def _split(key, num: int):
    return [None] * num if key is None else jax.random.split(key, num)


def _stack_or_own_bias(layer, bias, query_positions, key_positions):
    return layer.relative_bias(query_positions, key_positions) if bias is None else bias
