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
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dslt.core import attention
from dslt.core.attention import SegmentMask
from dslt.core.batch import NUM_ROLES, Batch
from dslt.core.dropout import dropout
from dslt.core.embedding import look_up
from dslt.core.keys import seeded_key
from dslt.core.products import project
from dslt.core.sharding import gather_again, project_split, split_rows
from dslt.errors import InputError


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5. The defaults are T5 v1.1 small.

    Attributes:
      num_layers: encoder layers; `num_decoder_layers` may differ (ByT5).
      feed_forward_proj: `gated-gelu` (v1.1 and later) or `relu` (v1.0).
      tie_word_embeddings: the output projection is the input embedding (v1.0).
      scale_decoder_outputs: the decoder's output is multiplied by D**-0.5 (v1.0).
      relative_bias_per_layer: a bias table a layer (umT5) instead of one a stack.
      dtype: of activations, `float32` or `bfloat16`. float16 overflows in T5's feed-forward.
      remat: recompute each layer in the backward pass, for memory.
      scan_unroll: layers per iteration of the scan; more compiles longer and may run faster.
      attention: `plain`, `flash` (TPUs), `flash_gpu` or `cudnn` (GPUs); see attention.py. Cached
        decoding is always plain.
      attention_dropout_rate: of the softmax's weights; None is `dropout_rate`.
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
    attention: str = "plain"
    attention_dropout_rate: float | None = None

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
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            found = self.relative_attention_max_distance
            raise InputError(
                f"T5Config.relative_attention_max_distance is {found}; expected more than half of "
                f"relative_attention_num_buckets, {self.relative_attention_num_buckets}"
            )
        for field in ("dropout_rate", "attention_dropout_rate"):
            rate = getattr(self, field)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise InputError(f"T5Config.{field} is {rate}; expected 0 <= rate < 1")
        attention.check_settings(self.attention, self.dtype, self.d_kv, self.weights_dropout_rate)

    def is_unrolled(self, num_layers: int) -> bool:
        """Whether some of a stack's layers lie in no loop.

        Then no loop divides them from their gradient, and what that computes again XLA would find
        to be equal, and keep after all: `jax.checkpoint` must be told to prevent it.
        """
        return num_layers <= self.scan_unroll or num_layers % self.scan_unroll > 0

    @property
    def weights_dropout_rate(self) -> float:
        """The rate at which attention weights are dropped."""
        is_own = self.attention_dropout_rate is not None
        return self.attention_dropout_rate if is_own else self.dropout_rate


class LayerCache(NamedTuple):
    """What one decoder layer keeps between steps.

    The self-attention's N positions are a ring: step t writes column t mod N of all rows at once,
    whenever each row began. T5 knows relative positions alone, so a column's bias is that of its
    distance in steps, the same in all rows; which columns a row may see is a mask. N lies before K
    (heads before positions): each head's keys are one matrix.
    """

    self_keys: jax.Array  # [B, H, N * M, K]: a column holds the M beams of a row
    self_values: jax.Array
    cross_keys: jax.Array  # [B, H, S, K]: once, for all beams
    cross_values: jax.Array


class LayerNorm(nnx.Module):
    """Root-mean-square norm without mean or bias, computed in float32."""

    def __init__(self, config: T5Config):
        self.scale = nnx.Param(jnp.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    @jax.named_scope("norm")
    def __call__(self, x):
        return _rms_norm(x, self.scale[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, epsilon: float):
    """x / √(mean x² + ε) ⊙ scale over the last axis, in float32, to the dtype of x.

    Its gradient is written out, so that a scan keeps x as it is given and a number a token, and no
    float32 array of its shape.
    """
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _rms_norm_backward(epsilon, saved, d_out):
    x, inverse, scale = saved
    normed = x.astype(jnp.float32) * inverse
    d_out = d_out.astype(jnp.float32)
    d_scale = (d_out * normed).sum(tuple(range(x.ndim - 1)))
    d_normed = d_out * scale
    d_x = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdims=True))
    return d_x.astype(x.dtype), d_scale


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RelativeBias(nnx.Module):
    """T5's relative-position bias: one learnt scalar a head and a bucket of distances."""

    def __init__(self, config: T5Config, bidirectional: bool, rngs: nnx.Rngs):
        shape = (config.relative_attention_num_buckets, config.num_heads)
        self.embedding = _normal(rngs, shape, config.d_model**-0.5)
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance
        self.implementation = config.attention

    def __call__(self, length: int):
        """The bias of a sequence over itself, in the form that its attention takes."""
        bias = self.by_distance(jnp.arange(1 - length, length))
        return attention.bias_form(self.implementation, bias, length)

    def to_keys(self, distances):
        """The bias of one query over keys at these distances, [N] int32: [1, H, 1, N] float32."""
        return self.by_distance(distances)[None, :, None]

    def by_distance(self, distances):
        """[n] int32, key minus query position, to [H, n] float32."""
        num_buckets = self.embedding.shape[0]
        buckets = relative_position_bucket(
            distances, self.bidirectional, num_buckets, self.max_distance
        )
        # A matmul with the one-hot: its backward is a matmul too, where a gather's would scatter.
        one_hot = jax.nn.one_hot(buckets, num_buckets)
        return jnp.einsum("nc,ch->hn", one_hot, self.embedding[...], precision="highest")


class Attention(nnx.Module):
    """Multi-head attention, unscaled: T5 folds 1/√K into the initialisation of the query."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        d_model, heads, head_dim = config.d_model, config.num_heads, config.d_kv
        self.query = _normal(rngs, (d_model, heads, head_dim), (d_model * head_dim) ** -0.5)
        self.key = _normal(rngs, (d_model, heads, head_dim), d_model**-0.5)
        self.value = _normal(rngs, (d_model, heads, head_dim), d_model**-0.5)
        self.out = _normal(rngs, (heads, head_dim, d_model), (heads * head_dim) ** -0.5)
        self.dropout_rate = config.weights_dropout_rate
        self.implementation = config.attention

    @jax.named_scope("attention")
    def keys_values(self, memory):
        """[B, N, D] to keys and values, each [B, N, H, K]."""
        return _project(memory, self.key), _project(memory, self.value)

    @jax.named_scope("attention")
    def attend(self, x, keys, values, bias, mask, dropout_key=None):
        """[B, Q, D] over keys [B, N, H, K]; `bias` and `mask` are those of `attention.attend`."""
        mixed = attention.attend(
            self.implementation,
            _project(x, self.query),
            keys,
            values,
            bias,
            mask,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
        )
        return _project(mixed, self.out, num_contracted=2, is_split_last=True)

    @jax.named_scope("attention")
    def attend_cached(self, x, keys, values, bias, mask):
        """[B, Q, D] over cached keys [B, H, N, K]; bias [1, H, 1, N] or None; mask [B, 1, Q, N]."""
        queries = _project(x, self.query)
        mixed = attention.cached_attention(queries, keys, values, bias, mask)
        return _project(mixed, self.out, num_contracted=2, is_split_last=True)


class FeedForward(nnx.Module):
    """`relu(x·wi)·wo`, or `(gelu(x·wi_0) ⊙ x·wi_1)·wo` when gated."""

    def __init__(self, config: T5Config, num_layers: int, rngs: nnx.Rngs):
        d_model, d_ff = config.d_model, config.d_ff
        self.is_gated = config.feed_forward_proj == "gated-gelu"
        if self.is_gated:
            self.wi_0 = _normal(rngs, (d_model, d_ff), d_model**-0.5)
            self.wi_1 = _normal(rngs, (d_model, d_ff), d_model**-0.5)
        else:
            self.wi = _normal(rngs, (d_model, d_ff), d_model**-0.5)
        self.wo = _normal(rngs, (d_ff, d_model), d_ff**-0.5)
        self.dropout_rate = config.dropout_rate
        self.prevent_cse = config.is_unrolled(num_layers)

    @jax.named_scope("feed_forward")
    def __call__(self, x, dropout_key=None):
        if self.is_gated:
            inputs = _project(x, self.wi_0), _project(x, self.wi_1)
        else:
            inputs = (_project(x, self.wi),)
        activate = _recomputed(functools.partial(_activate, self.dropout_rate), self.prevent_cse)
        return _project(activate(dropout_key, *inputs), self.wo, is_split_last=True)


def _activate(dropout_rate, dropout_key, gate, up=None):
    """`gelu(gate) ⊙ up`, or `relu(gate)` alone, then dropout: in float32, but saved as given.

    Recomputed on the way back, so that two narrow arrays are kept and nothing in between.
    """
    wide = gate.astype(jnp.float32)
    hidden = jax.nn.relu(wide) if up is None else jax.nn.gelu(wide, approximate=True) * up
    return dropout(hidden, dropout_rate, dropout_key).astype(gate.dtype)


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward; each normalised before and added after."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.self_attention_norm = LayerNorm(config)
        self.self_attention = Attention(config, rngs)
        self.feed_forward_norm = LayerNorm(config)
        self.feed_forward = FeedForward(config, config.num_layers, rngs)
        if config.relative_bias_per_layer:
            self.relative_bias = RelativeBias(config, bidirectional=True, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, bias, mask, dropout_key=None):
        """[B, S, D] to [B, S, D]; `bias` is None where each layer has its own."""
        keys = _split(dropout_key, 4)
        bias = self.relative_bias(x.shape[1]) if bias is None else bias
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
        self.feed_forward = FeedForward(config, config.num_decoder_layers, rngs)
        if config.relative_bias_per_layer:
            self.relative_bias = RelativeBias(config, bidirectional=False, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, encoded, bias, self_mask, cross_mask, dropout_key=None):
        """Teacher forcing: [B, T, D] to [B, T, D] over `encoded` [B, S, D]."""
        keys = _split(dropout_key, 6)
        bias = self.relative_bias(x.shape[1]) if bias is None else bias
        normed = self.self_attention_norm(x)
        memory = self.self_attention.keys_values(normed)
        attended = self.self_attention.attend(normed, *memory, bias, self_mask, keys[0])
        x = x + dropout(attended, self.dropout_rate, keys[1])
        normed = self.cross_attention_norm(x)
        memory = self.cross_attention.keys_values(encoded)
        attended = self.cross_attention.attend(normed, *memory, None, cross_mask, keys[2])
        x = x + dropout(attended, self.dropout_rate, keys[3])
        fed = self.feed_forward(self.feed_forward_norm(x), keys[4])
        return x + dropout(fed, self.dropout_rate, keys[5])

    def step(self, x, cache: LayerCache, column, bias, self_mask, cross_mask, distances):
        """One token of each beam: [B, M, D], and the cache with `column` written."""
        normed = self.self_attention_norm(x)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(
                cached, new.swapaxes(1, 2), column * x.shape[1], axis=2
            )
            for cached, new in zip(cache[:2], self.self_attention.keys_values(normed), strict=True)
        )
        bias = self.relative_bias.to_keys(distances) if bias is None else bias
        x = x + self.self_attention.attend_cached(normed, keys, values, bias, self_mask)
        memory = cache.cross_keys, cache.cross_values
        normed = self.cross_attention_norm(x)
        x = x + self.cross_attention.attend_cached(normed, *memory, None, cross_mask)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, cache._replace(self_keys=keys, self_values=values)


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

    @jax.named_scope("attention")
    def shared_bias(self, length: int):
        """The RelativeBias of the whole stack, or None where layers have their own."""
        if self.config.relative_bias_per_layer:
            return None
        return self.relative_bias(length)

    def __call__(self, x, *layer_inputs, dropout_key=None, layers: list[dict] | None = None):
        """Runs `layer(x, *layer_inputs, key)` for each layer, then the final norm: [B, N, D].

        `layers` stand in for the stack, without dropout.
        """
        keys = _split(dropout_key, self.num_layers + 2)
        x = dropout(x, self.config.dropout_rate, keys[0])
        graphdef, params = nnx.split(self.layers)

        def run_layer(x, layer):
            layer_params, key = layer
            return split_rows(nnx.merge(graphdef, layer_params)(x, *layer_inputs, key)), None

        prevent_cse = self.config.is_unrolled(self.num_layers)
        if self.config.remat:
            run_layer = jax.checkpoint(run_layer, prevent_cse=prevent_cse)
        else:
            run_layer = gather_again(run_layer, prevent_cse)
        if layers is None:
            layer_keys = None if dropout_key is None else keys[2:]
            x, _ = jax.lax.scan(run_layer, x, (params, layer_keys), unroll=self.config.scan_unroll)
        else:
            for layer_params in layers:
                x, _ = run_layer(x, (layer_params, None))
        return dropout(self.final_norm(x), self.config.dropout_rate, keys[1])

    def step(self, x, layers, cache: list[LayerCache], *layer_inputs):
        """One cached token through all `layers`: [B, M, D] and the cache written."""
        graphdef = nnx.graphdef(self.layers)
        written = []
        for layer_params, layer_cache in zip(layers, cache, strict=True):
            x, layer_cache = nnx.merge(graphdef, layer_params).step(x, layer_cache, *layer_inputs)
            written.append(layer_cache)
        return self.final_norm(x), written


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
        return self.logits(self.hidden(batch, dropout_key))

    def hidden(self, batch: Batch, dropout_key=None):
        """Teacher-forced: what the output layer sees, [B, T, D]."""
        encoder_key, decoder_key = _split(dropout_key, 2)
        sources, targets = batch.encoder_input_tokens, batch.decoder_input_tokens
        # At once: on a mesh the table is gathered once, and its gradient sent once.
        embedded = self.embed(jnp.concatenate([sources, targets], axis=1))
        sources, targets = jnp.split(embedded, [sources.shape[1]], axis=1)
        encoded = self.encode(sources, batch.encoder_segment_ids, encoder_key)
        return self.decode(encoded, targets, batch, decoder_key)

    @jax.named_scope("encoder")
    def encode(self, embedded, segment_ids, dropout_key=None):
        """Embedded sources [B, S, D] to [B, S, D]; a token attends to its own segment."""
        bias = self.encoder.shared_bias(embedded.shape[1])
        mask = SegmentMask(segment_ids, segment_ids, is_causal=False)
        return self.encoder(embedded, bias, mask, dropout_key=dropout_key)

    @jax.named_scope("decoder")
    def decode(
        self, encoded, embedded, batch: Batch, dropout_key=None, layers: list[dict] | None = None
    ):
        """[B, S, D] encodings and the batch's targets to hidden states [B, T, D].

        Args:
          embedded: the decoder's inputs [B, T, D].
          layers: of `merge_unstacked`, of a model that comes from there.
        """
        segment_ids = batch.decoder_segment_ids
        target_ids = segment_ids * NUM_ROLES + batch.decoder_loss_roles
        bias = self.decoder.shared_bias(embedded.shape[1])
        self_mask = SegmentMask(target_ids, target_ids, is_causal=True)
        cross_mask = SegmentMask(segment_ids, batch.encoder_segment_ids, is_causal=False)
        layer_inputs = encoded, bias, self_mask, cross_mask
        hidden = self.decoder(embedded, *layer_inputs, dropout_key=dropout_key, layers=layers)
        return self.scale_outputs(hidden)

    def cross_keys_values(self, encoded, layers) -> list[tuple[jax.Array, jax.Array]]:
        """The cross-attention's keys and values of [B, S, D], [B, H, S, K] in each layer."""
        graphdef = nnx.graphdef(self.decoder.layers)
        projected = []
        for layer_params in layers:
            layer = nnx.merge(graphdef, layer_params)
            keys_values = layer.cross_attention.keys_values(encoded)
            projected.append(tuple(x.swapaxes(1, 2) for x in keys_values))
        return projected

    def decode_step(self, tokens, layers, cache, source_mask, step, can_see):
        """The logits after one more token of each row, or of each of its M beams.

        The layers are not scanned: the cache of a scan is copied at every step.

        Args:
          tokens: [B, M] int32, each beam's newest token.
          layers: of `merge_unstacked`, as in `cross_keys_values`.
          cache: a LayerCache a layer.
          source_mask: [B, S] bool, true at the source's tokens.
          step: scalar int32; writes column `step` mod N of the cache.
          can_see: [B, M, N, M] bool; whose keys in which columns a beam attends to.

        Returns:
          Logits [B, M, V] float32 and the cache with a column written.
        """
        rows, beams, length, _ = can_see.shape
        distances = jnp.repeat(-ring_distances(step, length), beams)
        has_shared_bias = not self.config.relative_bias_per_layer
        inputs = (
            step % length,
            self.decoder.relative_bias.to_keys(distances) if has_shared_bias else None,
            can_see.reshape(rows, 1, beams, length * beams),
            source_mask[:, None, None, :],
            distances,
        )
        hidden, cache = self.decoder.step(self.embed(tokens), layers, cache, *inputs)
        return self.logits(self.scale_outputs(hidden)), cache

    def embed(self, tokens):
        """[B, N] int32 to [B, N, D]."""
        return look_up(self.token_embedding[...], tokens, self.config.dtype)

    def scale_outputs(self, hidden):
        """The decoder's last state as the output layer takes it."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def output_weight(self):
        """[D, V] float32."""
        if self.config.tie_word_embeddings:
            return self.token_embedding[...].T
        return self.lm_head[...]

    @jax.named_scope("output_layer")
    def logits(self, hidden):
        """[B, N, D], as `hidden` gives it, to [B, N, V] float32."""
        weight = self.output_weight().astype(hidden.dtype)
        return split_rows(jnp.matmul(hidden, weight, preferred_element_type=jnp.float32))


def init_params(config: T5Config, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A graph definition and freshly initialised parameters, a nested dict of float32 arrays."""
    graphdef, state = nnx.split(T5(config, nnx.Rngs(seeded_key(seed))), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def abstract_params(config: T5Config) -> tuple[nnx.GraphDef, dict]:
    """As `init_params`, with `jax.ShapeDtypeStruct` in place of arrays: nothing is computed."""
    model = nnx.eval_shape(lambda: T5(config, nnx.Rngs(seeded_key(0))))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def count_params(params: dict) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def narrow_matrices(params: dict, dtype: str) -> dict:
    """The parameters with what products take in `dtype`: the model computes the same with them.

    Norms' scales and the tables of biases stay as they are, since they are used in float32.
    """
    wide = {"scale", "relative_bias"}

    def narrow(path, leaf):
        return leaf if wide & {part.key for part in path} else leaf.astype(dtype)

    return jax.tree.map_with_path(narrow, params)


def unstack_layers(params: dict) -> dict:
    """The parameters with the decoder's layers one by one, a list of trees, as decoding takes them.

    What is so already stays as it is.
    """
    layers = params["decoder"]["layers"]
    if isinstance(layers, dict):
        num_layers = jax.tree.leaves(layers)[0].shape[0]
        layers = [jax.tree.map(operator.itemgetter(i), layers) for i in range(num_layers)]
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def merge_unstacked(graphdef: nnx.GraphDef, params: dict) -> tuple[T5, list[dict]]:
    """The model of parameters of `unstack_layers`, and the decoder's layers, which it lacks.

    In place of the stack the model holds shapes: what would use it fails.
    """
    layers = params["decoder"]["layers"]
    stack = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype), layers[0]
    )
    model = nnx.merge(graphdef, {**params, "decoder": {**params["decoder"], "layers": stack}})
    return model, layers


def ring_distances(step, length: int):
    """[length] int32: how many steps ago each column of a ring was last written; 0 is `step`."""
    return (step - jnp.arange(length, dtype=jnp.int32)) % length


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


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape))


def _project(x, weight: nnx.Param, num_contracted: int = 1, is_split_last: bool = False):
    """x [B, N, ...] by a weight whose first `num_contracted` dimensions are x's last: [B, N, ...].

    `is_split_last` says that the weight's last dimension is the one over fsdp, not its first.
    """
    weight = weight[...].astype(x.dtype)
    contracted, kept = weight.shape[:num_contracted], weight.shape[num_contracted:]
    matrix = weight.reshape(math.prod(contracted), math.prod(kept))
    out = project_split(project, x.reshape(*x.shape[:2], -1), matrix, is_split_last)
    return out.reshape(*x.shape[:2], *kept)


def _recomputed(function, prevent_cse: bool):
    """`function`, computed again on the way back from its arguments; nothing else is kept.

    `jax.checkpoint` says the same, but inside of another one it is the outer policy that decides,
    and `gather_again` keeps all it may. `prevent_cse` is as there.
    """

    @jax.custom_vjp
    def call(*inputs):
        return function(*inputs)

    def forward(*inputs):
        return function(*inputs), inputs

    def backward(inputs, d_out):
        if prevent_cse:
            inputs, d_out = jax.lax.optimization_barrier((inputs, d_out))
        return jax.vjp(function, *inputs)[1](d_out)

    call.defvjp(forward, backward)
    return call


def _split(key, num: int):
    return [None] * num if key is None else jax.random.split(key, num)
