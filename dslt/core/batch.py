"""The arrays of one train step. Imports numpy alone, so that the data wing can build batches.

Letters used in shape comments throughout: B rows, S source length, T target length, V vocabulary,
D model, H heads, K head dimension, L layers.

A row is packed: it holds several examples' segments one behind the other. A segment is one source
and its target; the label task and the rationale task of one example are two segments of one batch.
With a shared encoder they are one segment: one source, and a target of each role, which see the
source but not each other.
"""

from typing import NamedTuple

import numpy as np

ROLE_NONE = 0  # padding, or a target that carries no loss
ROLE_LABEL = 1
ROLE_RATIONALE = 2
NUM_ROLES = 3

PAD_ID = 0  # T5: padding, and the decoder's start token
EOS_ID = 1  # T5: ends every source and every target
SHARED_RATIONALE_START_ID = EOS_ID  # starts a rationale where the source does not name the task


class Batch(NamedTuple):
    """One global batch (or a host's rows of it). Segment id 0 is padding; ids start at 1 a row.

    Attributes:
      encoder_input_tokens: [B, S] int32.
      encoder_segment_ids: [B, S] int32.
      decoder_input_tokens: [B, T] int32; the target token before, or the start token.
      decoder_target_tokens: [B, T] int32.
      decoder_segment_ids: [B, T] int32; attends to the encoder tokens of the same id, and to the
        decoder tokens before it of the same id and role.
      decoder_loss_roles: [B, T] int32; ROLE_LABEL or ROLE_RATIONALE on target tokens.
      decoder_loss_weights: [B, T] float32; 0 on padding.
      decoder_example_ids: [B, T] int32; numbers the batch's examples from 1. A label and the
        rationales of one example have the same number, in whatever rows they lie.
    """

    encoder_input_tokens: np.ndarray
    encoder_segment_ids: np.ndarray
    decoder_input_tokens: np.ndarray
    decoder_target_tokens: np.ndarray
    decoder_segment_ids: np.ndarray
    decoder_loss_roles: np.ndarray
    decoder_loss_weights: np.ndarray
    decoder_example_ids: np.ndarray


class BatchCounts(NamedTuple):
    """What a whole global batch holds, padding left out; a host's rows do not tell.

    Attributes:
      examples: segments of the label task.
      source_tokens, target_tokens: of both tasks.
    """

    examples: int
    source_tokens: int
    target_tokens: int


def empty_batch(rows: int, source_length: int, target_length: int) -> Batch:
    """A batch of padding alone, to be filled in place."""
    source = (rows, source_length)
    target = (rows, target_length)
    return Batch(
        encoder_input_tokens=np.zeros(source, np.int32),
        encoder_segment_ids=np.zeros(source, np.int32),
        decoder_input_tokens=np.zeros(target, np.int32),
        decoder_target_tokens=np.zeros(target, np.int32),
        decoder_segment_ids=np.zeros(target, np.int32),
        decoder_loss_roles=np.zeros(target, np.int32),
        decoder_loss_weights=np.zeros(target, np.float32),
        decoder_example_ids=np.zeros(target, np.int32),
    )


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Appends rows of padding until the row count is a multiple, so that devices divide it."""
    missing = -batch.encoder_input_tokens.shape[0] % multiple
    if not missing:
        return batch
    return Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in batch))


def count_targets(batch: Batch, role: int) -> int:
    """How many targets of this role begin in the batch."""
    targets = batch.decoder_segment_ids * NUM_ROLES + batch.decoder_loss_roles
    begins = np.diff(targets, axis=1, prepend=0) != 0
    return int((begins & (batch.decoder_loss_roles == role)).sum())
