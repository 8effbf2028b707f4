"""The decode/eval loop: checkpoint → decode → predictions.jsonl → metrics. A process of its own.

Imports core, checkpoint, workdir, metrics and records. It reads checkpoints while a run writes
them, and writes beside them:

    rows = evaluate_run(run, config, mesh_config, examples=…, decode_text=vocabulary.decode)
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dslt import distributed, metrics
from dslt.checkpoint import student
from dslt.checkpoint.manager import CheckpointManager, Layout, finished_steps
from dslt.core import sharding, t5
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.decode import greedy_decode
from dslt.core.sharding import MeshConfig
from dslt.errors import InputError
from dslt.records import EvalInput, Example, Prediction, read_predictions, write_rows
from dslt.workdir import RunDir, read_json_rows, write_json, write_json_rows

SOURCE_BUCKET = 32  # source lengths are padded to multiples of this: one compilation each


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How checkpoints are judged.

    Attributes:
      splits: judged ones; the best checkpoint is always chosen on validation.
      rows: decoded at a time.
      max_label_length: tokens of an answer at most, EOS included.
      max_rationale_length: likewise of a rationale, where rationales are asked for.
      with_rationales: decode the student's rationales too (they do not enter the accuracy).
      poll_secs: between looks at the run while following it.
    """

    splits: tuple[str, ...] = ("validation", "test")
    rows: int = 64
    max_label_length: int = 64
    max_rationale_length: int = 256
    with_rationales: bool = False
    poll_secs: float = 2.0

    def __post_init__(self):
        for field in ("rows", "max_label_length", "max_rationale_length"):
            if getattr(self, field) < 1:
                raise InputError(f"EvalConfig.{field} is {getattr(self, field)}; expected >= 1")


class Decoder:
    """A student on a mesh, ready to decode: keeps its compiled functions between checkpoints."""

    def __init__(self, path: Path, mesh_config: MeshConfig, rows: int):
        """`path` is a run, a checkpoint or a Hugging Face directory; `rows` decode at a time."""
        self.mesh = sharding.make_mesh(mesh_config)
        self.config, graphdef, self.params = student.load(path, self.mesh)
        self._placed = sharding.with_shardings(self.mesh, t5.abstract_params(self.config)[1])
        self.rows = rows
        self._decode = jax.jit(
            partial(greedy_decode, graphdef=graphdef), static_argnames=("max_length",)
        )

    def load_step(self, checkpoints: Path, step: int) -> None:
        """Takes the parameters of another checkpoint of the same run."""
        with CheckpointManager(checkpoints, read_only=True) as manager:
            self.params = manager.restore_params(step, self._placed)

    def __call__(
        self, inputs: Sequence[np.ndarray], max_length: int, description: str = ""
    ) -> list[list[int]]:
        """Decodes each input greedily.

        Args:
          inputs: token sequences, int32, of any lengths.
          max_length: tokens decoded at most.
          description: of the progress bar.

        Returns:
          The tokens before EOS, in the order of `inputs`.
        """
        outputs: list[list[int]] = [[] for _ in inputs]
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        multiple = sharding.row_multiple(self.mesh)
        rows = -(-max(min(self.rows, len(inputs)), 1) // multiple) * multiple
        with tqdm(total=len(inputs), desc=description, unit="row", leave=False, delay=2) as bar:
            for start in range(0, len(order), rows):
                chosen = order[start : start + rows]
                decoded = self._decode_rows([inputs[i] for i in chosen], rows, max_length)
                for i, tokens in zip(chosen, decoded, strict=False):
                    outputs[i] = _before_eos(tokens)
                bar.update(len(chosen))
        return outputs

    def _decode_rows(self, inputs: Sequence[np.ndarray], rows: int, max_length: int) -> np.ndarray:
        """At most `rows` inputs to [rows, max_length] int32."""
        longest = max(len(tokens) for tokens in inputs)
        padded = np.full((rows, -(-longest // SOURCE_BUCKET) * SOURCE_BUCKET), PAD_ID, np.int32)
        for row, tokens in zip(padded, inputs, strict=False):
            row[: len(tokens)] = tokens
        placed = sharding.put_rows(padded, self.mesh)
        with sharding.inside(self.mesh):
            return sharding.fetch(self._decode(self.params, placed, max_length=max_length))


def predict(
    decoder: Decoder,
    examples: Sequence[EvalInput],
    config: EvalConfig,
    decode_text: Callable[[Sequence[int]], str],
) -> list[Prediction]:
    """The student's answer to each example, and its rationale if the config asks for it."""
    labels = decoder([e.label_input_tokens for e in examples], config.max_label_length, "labels")
    rationales: list[list[int] | None] = [None] * len(examples)
    if config.with_rationales:
        inputs = [e.rationale_input_tokens for e in examples]
        rationales = decoder(inputs, config.max_rationale_length, "rationales")
    return [
        to_prediction(e.example, decode_text(label), rationale and decode_text(rationale))
        for e, label, rationale in zip(examples, labels, rationales, strict=True)
    ]


def to_prediction(example: Example, answer: str, rationale: str | None) -> Prediction:
    """A row of predictions.jsonl, judged where the example has a gold label."""
    is_correct = None
    if example.label is not None:
        is_correct = metrics.is_correct(answer, example.label, example.answer_form)
    return Prediction(
        id=example.id,
        dataset=example.dataset,
        split=example.split,
        input=example.input,
        prediction=answer,
        label=example.label,
        teacher_label=example.teacher_label,
        rationale=rationale,
        is_correct=is_correct,
        answer_form=example.answer_form,
    )


def score(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracies by split, and by split and dataset where there are several datasets.

    Every prediction is judged anew from its text, so that an old file follows today's rules.

    Returns:
      `<split>/accuracy` in [0, 1], `<split>/standard_error` (binomial, over examples) and
      `<split>/examples`; rows without a gold label count in none of them.
    """
    judged = [p for p in predictions if p.label is not None]
    groups: dict[str, list[bool]] = {}
    several = len({p.dataset for p in judged}) > 1
    for p in judged:
        is_correct = metrics.is_correct(p.prediction, p.label, p.answer_form)
        for name in [p.split] + ([f"{p.split}/{p.dataset}"] if several else []):
            groups.setdefault(name, []).append(is_correct)
    values = {}
    for name, hits in sorted(groups.items()):
        accuracy = metrics.accuracy(hits)
        values[f"{name}/accuracy"] = accuracy.value
        values[f"{name}/standard_error"] = accuracy.standard_error
        values[f"{name}/examples"] = accuracy.total
    return values


def rescore(path: Path) -> dict[str, float]:
    """`score` of a predictions.jsonl, without a model."""
    return score(list(read_predictions(path)))


def evaluate_run(
    run: RunDir,
    config: EvalConfig,
    mesh_config: MeshConfig,
    *,
    examples: Sequence[EvalInput],
    decode_text: Callable[[Sequence[int]], str],
    follow: bool = False,
    steps: Sequence[int] | None = None,
) -> list[dict]:
    """Judges every checkpoint that has not been judged yet, and keeps the best on validation.

    Several processes run the same decoding programs over all inputs, each on the rows of its own
    devices, and all see all answers; process 0 alone writes.

    Args:
      examples: of the splits in `config.splits`.
      decode_text: tokens before EOS to text.
      follow: wait for further checkpoints until training has finished or was stopped.
      steps: judge these checkpoints instead, again if need be.

    Returns:
      The rows of evaluations.jsonl, those of earlier calls included.
    """
    decoder = None
    if steps is None:
        steps = _unjudged_steps(run, config.poll_secs if follow else None)
    for step in _share_steps(steps):
        started_secs = time.perf_counter()
        is_loaded = True
        try:
            if decoder is None:
                decoder = Decoder(run.checkpoints / str(step), mesh_config, config.rows)
            else:
                decoder.load_step(run.checkpoints, step)
        except (OSError, KeyError, ValueError):
            if step in finished_steps(run.checkpoints):
                raise
            is_loaded = False
        if not all(distributed.gather(is_loaded)):
            print(f"step {step}: is no longer there, newer checkpoints replaced it; skipped")
            continue
        predictions = predict(decoder, examples, config, decode_text)
        values = {"step": step} | score(predictions)
        values["secs"] = round(time.perf_counter() - started_secs, 3)
        rows = [row for row in read_json_rows(run.evaluations) if row["step"] != step] + [values]
        if distributed.is_main():
            write_rows(run.evaluation(step) / "predictions.jsonl", predictions)
            write_json(run.evaluation(step) / "metrics.json", values)
        if distributed.share(best_row(rows) is values):
            _keep_as_best(run, decoder, step)
        if distributed.is_main():
            write_json_rows(run.evaluations, sorted(rows, key=lambda row: row["step"]))
        print(describe(values), flush=True)
    rows = distributed.share(read_json_rows(run.evaluations))
    if not rows:
        raise InputError(
            f"{run.checkpoints}: has no checkpoint yet; expected one from `dslt train`"
        )
    return rows


def wait_for_start(run: RunDir, poll_secs: float = 1.0) -> None:
    """Returns once training has written the run's config and vocabulary."""
    if not run.info.exists():
        print(f"waiting for `dslt train` to start {run.path}", flush=True)
    while not run.info.exists():
        time.sleep(poll_secs)


def best_row(rows: Sequence[dict]) -> dict | None:
    """The row with the highest validation accuracy, the earliest of equals; test plays no role."""
    judged = [row for row in rows if "validation/accuracy" in row]
    return max(judged, key=lambda row: (row["validation/accuracy"], -row["step"]), default=None)


def describe(values: dict) -> str:
    """One line: `step 1000: test 70.5 % of 200, validation 71.3 % of 80`; no step, no prefix."""
    splits = [name.removesuffix("/accuracy") for name in values if name.endswith("/accuracy")]
    shown = [
        f"{split} {100 * values[f'{split}/accuracy']:.1f} % of {values[f'{split}/examples']}"
        for split in splits
    ]
    return (f"step {values['step']}: " if "step" in values else "") + ", ".join(shown)


def _unjudged_steps(run: RunDir, poll_secs: float | None) -> Iterator[int]:
    """Steps of checkpoints without an evaluation, ascending; polls for more if told to."""
    seen = {row["step"] for row in read_json_rows(run.evaluations)}
    while True:
        is_over = run.state() in (
            "finished",
            "stopped",
        )  # asked first: no last checkpoint is missed
        found = [step for step in finished_steps(run.checkpoints) if step not in seen]
        if found:
            seen.add(found[0])
            yield found[0]
        elif poll_secs is None or is_over:
            return
        else:
            time.sleep(poll_secs)


def _share_steps(steps: Iterable[int]) -> Iterator[int]:
    """Process 0's steps on every process: the others neither look at the disk nor wait alone."""
    own = iter(steps)
    while True:
        step = distributed.share(next(own, None) if distributed.is_main() else None)
        if step is None:
            return
        yield step


def _keep_as_best(run: RunDir, decoder: Decoder, step: int) -> None:
    """Writes the parameters to `best/`, where training's clean-up does not reach."""
    with CheckpointManager(run.best) as manager:
        manager.replace_all(step, decoder.params, Layout(decoder.config))


def _before_eos(tokens: np.ndarray) -> list[int]:
    ends = np.flatnonzero(tokens == EOS_ID)
    return tokens[: ends[0] if len(ends) else None].tolist()
