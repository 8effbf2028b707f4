"""What people train and decode T5 with today, for `dslt bench --against hf`: PyTorch.

The train step is that of the authors' script: a `transformers` T5, the label batch and the
rationale batch padded each to its own longest row, two forwards, one backward of the weighted sum,
clipping, AdamW. Weights, examples, vocabulary and precision are ours; bfloat16 is autocast.
Denormal numbers are flushed, as XLA does: fresh weights make gradients that are full of them.

Source: Hsieh et al. 2023, github.com/google-research/distilling-step-by-step.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import logging

from dslt.core.batch import PAD_ID, ROLE_LABEL, ROLE_RATIONALE, Batch
from dslt.core.optimizer import OptimizerConfig
from dslt.core.t5 import T5Config

WARM_UP = 3  # batches
IGNORED = -100  # what PyTorch's cross-entropy leaves out


class HuggingFaceT5:
    """A T5 of `transformers` on the accelerator, if PyTorch sees one, else on the CPU.

    `loss` is that of the last step.
    """

    def __init__(
        self,
        directory: Path,
        model_config: T5Config,
        optimizer_config: OptimizerConfig,
        rationale_weight: float,
        is_compiled: bool = False,
    ):
        """Loads the weights of a Hugging Face directory.

        Args:
          directory: as `hf_t5.save` writes it.
          model_config: for its precision and dropout.
          is_compiled: through `torch.compile`, for shapes that vary.
        """
        torch.set_flush_denormal(True)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate = model_config.dropout_rate
        # The class is the config's: T5's own passes over umT5's biases of each layer.
        self.model = AutoModelForSeq2SeqLM.from_pretrained(directory, dropout_rate=rate)
        self.model.to(self.device)
        self._forward = torch.compile(self.model, dynamic=True) if is_compiled else self.model
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer_config.learning_rate,
            betas=(optimizer_config.beta1, optimizer_config.beta2),
            weight_decay=optimizer_config.weight_decay,
            fused=True,
        )
        self._clip_norm = optimizer_config.clip_norm
        self._rationale_weight = rationale_weight
        self._is_narrow = model_config.dtype == "bfloat16"

    def run(self, batch: Batch) -> float:
        """Seconds of one step over the batch's examples, collation not included."""
        label = self._collate(unpack(batch, ROLE_LABEL))
        rationale = self._collate(unpack(batch, ROLE_RATIONALE))
        self.model.train()
        self._wait()
        started_secs = time.perf_counter()
        with self._precision():
            loss = self._forward(**label).loss
            if rationale and self._rationale_weight:
                loss = loss + self._rationale_weight * self._forward(**rationale).loss
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._wait()
        secs = time.perf_counter() - started_secs
        self.loss = loss.item()
        return secs

    def generate(
        self, inputs: Sequence[np.ndarray], rows: int, max_length: int, start_id: int
    ) -> list[list[int]]:
        """Greedy answers, `rows` inputs at a time, sorted by length; tokens before EOS."""
        self.model.eval()
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        outputs: list[list[int]] = [[] for _ in inputs]
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            tokens = self._pad([inputs[i] for i in chosen], PAD_ID)
            with torch.inference_mode(), self._precision():
                decoded = self.model.generate(
                    input_ids=tokens,
                    attention_mask=(tokens != PAD_ID).long(),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_length,
                    decoder_start_token_id=start_id,
                )
            for i, row in zip(chosen, decoded[:, 1:].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in (1, PAD_ID)]
                outputs[i] = row[: ends[0] if ends else None]
        return outputs

    def _collate(self, segments: list[tuple[np.ndarray, np.ndarray]]) -> dict | None:
        """Padded to the longest, as `DataCollatorForSeq2Seq` does."""
        if not segments:
            return None
        sources, targets = zip(*segments, strict=True)
        tokens = self._pad(sources, PAD_ID)
        return {
            "input_ids": tokens,
            "attention_mask": (tokens != PAD_ID).long(),
            "labels": self._pad(targets, IGNORED),
        }

    def _pad(self, sequences: Sequence[np.ndarray], value: int) -> torch.Tensor:
        padded = np.full((len(sequences), max(map(len, sequences))), value, np.int64)
        for row, tokens in zip(padded, sequences, strict=True):
            row[: len(tokens)] = tokens
        return torch.from_numpy(padded).to(self.device)

    def _precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_narrow)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def fastest(batches: Sequence[Batch], *arguments) -> tuple[HuggingFaceT5, str]:
    """Eager or compiled, whichever is faster after a warm-up, and its name.

    The compiled one has seen all of these batches then: lengths that it meets for the first time
    may be compilations, which a longer run has behind it.
    """
    eager = HuggingFaceT5(*arguments)
    compiled = HuggingFaceT5(*arguments, is_compiled=True)
    few = batches[:WARM_UP]
    for batch in few:
        eager.run(batch)
    eager_secs = min(map(eager.run, few))
    try:
        for batch in batches:
            compiled.run(batch)
        compiled_secs = min(map(compiled.run, few))
    except Exception as error:  # no compiler here, or a graph that it cannot take: say so, go on
        return eager, f"eager (torch.compile failed: {type(error).__name__})"
    secs = f"eager {eager_secs:.3g} s, compiled {compiled_secs:.3g} s a step"
    if eager_secs <= compiled_secs:
        return eager, f"eager ({secs})"
    return compiled, f"compiled ({secs})"


def unpack(batch: Batch, role: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(source tokens, target tokens) of each of a batch's targets of this role."""
    return list(_segments(batch, role))


def _segments(batch: Batch, role: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for row in range(len(batch.encoder_segment_ids)):
        is_role = batch.decoder_loss_roles[row] == role
        for segment in np.unique(batch.decoder_segment_ids[row][is_role]):
            is_source = batch.encoder_segment_ids[row] == segment
            is_target = is_role & (batch.decoder_segment_ids[row] == segment)
            yield (
                batch.encoder_input_tokens[row][is_source],
                batch.decoder_target_tokens[row][is_target],
            )
