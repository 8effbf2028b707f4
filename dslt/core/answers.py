"""How likely a student holds each answer of a set: exact log-likelihoods, by teacher forcing."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dslt.core import t5
from dslt.core.batch import EOS_ID, PAD_ID, Batch


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """What an example may be answered with: texts, and for each its own tokens, EOS included."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def text(self, tokens: Sequence[int]) -> str:
        """The answer of these tokens, EOS left off: its own text, whatever they decode to."""
        return self.texts[self.tokens.index((*tokens, EOS_ID))]

    def ranked(self, shares: np.ndarray) -> dict[str, float]:
        """Each answer's probability among those of the set [A], the most likely first."""
        pairs = zip(self.texts, shares.tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))


def shares_of(log_likelihoods: np.ndarray) -> np.ndarray:
    """[A] nats, of one set's answers, to their probabilities [A] among one another."""
    shares = np.exp(log_likelihoods - log_likelihoods.max())
    return shares / shares.sum()


def score_answers(
    params: dict, input_tokens: jax.Array, answers: jax.Array, *, graphdef: nnx.GraphDef
) -> jax.Array:
    """The log-likelihood of each answer of each source, EOS included.

    Args:
      params: of the T5 of `graphdef`; the decoder's layers may be one by one already.
      input_tokens: [B, S] int32, one source a row, padded with PAD_ID.
      answers: [B, A, T] int32, each ending in EOS, then PAD_ID; rows of padding alone are none.

    Returns:
      [B, A] float32, nats; -inf for those that are none. A softmax over A is the distribution over
      the set.
    """
    model, layers = t5.merge_unstacked(graphdef, t5.unstack_layers(params))
    source_segments = (input_tokens != PAD_ID).astype(jnp.int32)
    encoded = model.encode(model.embed(input_tokens), source_segments)

    def score(targets):  # [B, T]; one answer of each row at a time, for the logits' memory
        is_target = targets != PAD_ID
        batch = Batch(
            encoder_input_tokens=input_tokens,
            encoder_segment_ids=source_segments,
            decoder_input_tokens=jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID),
            decoder_target_tokens=targets,
            decoder_segment_ids=is_target.astype(jnp.int32),
            decoder_loss_roles=is_target.astype(jnp.int32),
            decoder_loss_weights=is_target.astype(jnp.float32),
            decoder_example_ids=is_target.astype(jnp.int32),
        )
        embedded = model.embed(batch.decoder_input_tokens)
        logits = model.logits(model.decode(encoded, embedded, batch, layers=layers))
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probs = target_logits - jax.nn.logsumexp(logits, axis=-1)
        total = jnp.where(is_target, log_probs, 0.0).sum(-1)
        return jnp.where(is_target.any(-1), total, -jnp.inf)

    return jax.lax.map(score, answers.swapaxes(0, 1)).T
