"""The decode/eval loop: checkpoint → decode → predictions.jsonl → metrics. A process of its own.

Imports core, checkpoint, workdir, metrics and records. It reads checkpoints while a run writes
them, and writes beside them:

    rows = evaluate_run(run, config, mesh_config, examples=…, decode_text=vocabulary.decode)
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dslt import distributed, metrics, signals
from dslt.checkpoint import student
from dslt.checkpoint.integrity import DamagedCheckpoint
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager, finished_steps
from dslt.core import sharding, t5
from dslt.core.answers import AnswerSet, shares_of
from dslt.core.batch import PAD_ID
from dslt.core.continuous import ContinuousDecoder
from dslt.core.decode import DecodeConfig
from dslt.core.sharding import MeshConfig
from dslt.errors import InputError
from dslt.records import (
    EvalInput,
    Example,
    Prediction,
    labelled_splits,
    read_predictions,
    write_rows,
)
from dslt.workdir import (
    OVERRIDES,
    RunDir,
    best_row,
    judged_alike,
    judged_steps,
    read_json_rows,
    write_json,
    write_json_rows,
)

ANSWERS = ("open", "trie", "likelihood")
GREEDY = DecodeConfig()
START_POLL_SECS = 1.0  # between looks for a run that has not begun


@dataclasses.dataclass(frozen=True)
class EvalConfig(DecodeConfig):
    """How checkpoints are judged, and how their answers are decoded (see DecodeConfig).

    Attributes:
      splits: judged ones, at least one; the best checkpoint is always chosen on validation.
      rows: decoded at a time.
      max_label_length: tokens of an answer at most, EOS included.
      max_rationale_length: likewise of a rationale, where rationales are asked for.
      with_rationales: decode the student's rationales too (they do not enter the accuracy).
      answers: `open`: any text. Or one of a set, the `labels` or else the choices that the
        example's input lists: `trie` decodes greedily and takes at each position only a token that
        leads on to an answer of the set; `likelihood` takes the most likely answer of the set and
        reports its probability among them.
      labels: the set, where it is the same for all examples.
      poll_secs: between looks at the run while following it.
      silence_secs: without a sign of life from training, until a follower says so; a few times
        `workdir.HEARTBEAT_SECS`, and what the file system takes to show a change to other hosts.
      give_up_secs: without one, until a follower ends; 0 waits for ever. For a run to begin it
        waits for ever too.
    """

    splits: tuple[str, ...] = ("validation", "test")
    rows: int = 64
    max_label_length: int = 64
    max_rationale_length: int = 256
    with_rationales: bool = False
    answers: str = "open"
    labels: tuple[str, ...] = ()
    poll_secs: float = 2.0
    silence_secs: float = 120.0
    give_up_secs: float = 3600.0

    def __post_init__(self):
        super().__post_init__()
        if not self.splits:
            raise InputError("EvalConfig.splits is (); expected one or more, such as 'validation'")
        for field in ("rows", "max_label_length", "max_rationale_length"):
            if getattr(self, field) < 1:
                raise InputError(f"EvalConfig.{field} is {getattr(self, field)}; expected >= 1")
        for field in ("poll_secs", "silence_secs", "give_up_secs"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(
                    f"EvalConfig.{field} is {getattr(self, field)}; expected 0 or more seconds"
                )
        if self.answers not in ANSWERS:
            raise InputError(
                f"EvalConfig.answers is {self.answers!r}; expected one of {', '.join(ANSWERS)}"
            )
        if self.labels and self.answers == "open":
            raise InputError(
                f"EvalConfig.labels is {self.labels}, but EvalConfig.answers is 'open'; expected "
                "'trie' or 'likelihood' to answer with one of them"
            )
        if self.answers == "trie" and self.strategy != "greedy":
            raise InputError(
                f"EvalConfig.answers is 'trie' and strategy is {self.strategy!r}; expected "
                "strategy 'greedy', or answers 'likelihood', which looks at the whole set"
            )


class Decoder:
    """A student on a mesh, ready to decode: keeps its compiled functions between checkpoints.

    Of several processes each has the whole student on its own devices and decodes its share of the
    inputs, for as long as these take; then all get all results. All must call it alike.

    `params` are the student's in float32, in the host's memory.
    """

    def __init__(self, path: Path, mesh_config: MeshConfig, rows: int):
        """`path` is a run, a checkpoint or a Hugging Face directory; `rows` decode at a time."""
        distributed.check_joined()
        whole = sharding.make_mesh(mesh_config)
        self.config, graphdef, self.params = student.load_to_host(path, whole)
        self.mesh = sharding.decoding_mesh(whole, self.config.num_heads)
        self._continuous = ContinuousDecoder(graphdef, self.mesh, rows)
        self._place_params()

    def load_step(self, checkpoints: Path, step: int) -> None:
        """Takes the parameters of another checkpoint of the same run."""
        student.check_params(checkpoints, step)
        with CheckpointManager(checkpoints, read_only=True) as manager:
            self.params = manager.restore_params(step, student.host_arrays(self.config))
        self._place_params()

    def _place_params(self) -> None:
        """Prepares `params` on the devices, in `config.dtype`: no float32 copy is there beside."""
        self._prepared = None  # the last ones make room
        narrow = t5.narrow_matrices(self.params, self.config.dtype)
        shardings = sharding.state_shardings(self.mesh, narrow)
        self._prepared = self._continuous.prepare(jax.device_put(narrow, shardings))

    def __call__(
        self,
        inputs: Sequence[np.ndarray],
        max_length: int,
        description: str = "",
        config: DecodeConfig = GREEDY,
        answer_sets: Sequence[AnswerSet] | None = None,
        start_id: int = PAD_ID,
    ) -> list[list[int]]:
        """Decodes each input.

        Args:
          inputs: token sequences, int32, of any lengths.
          max_length: tokens decoded at most.
          description: of the progress bar.
          config: how tokens are chosen.
          answer_sets: what each input may be answered with; None: anything.
          start_id: the decoder's first input.

        Returns:
          The tokens before EOS, in the order of `inputs`.
        """

        def decode_share(numbers: range) -> list[list[int]]:
            with _progress(len(numbers), description) as bar:
                return self._continuous(
                    self._prepared,
                    [inputs[i] for i in numbers],
                    config=config.decoding(),
                    max_length=max_length,
                    answers=answer_sets and [answer_sets[i].tokens for i in numbers],
                    start_id=start_id,
                    numbers=numbers,
                    on_decoded=bar.update,
                )

        return distributed.divide(len(inputs), decode_share)

    def distributions(
        self, inputs: Sequence[np.ndarray], answer_sets: Sequence[AnswerSet], description: str = ""
    ) -> list[np.ndarray]:
        """For each input the probability of each answer among those of its set."""

        def score_share(numbers: range) -> list[list[float]]:
            tokens = [answer_sets[i].tokens for i in numbers]
            with _progress(len(numbers), description) as bar:
                scores = self._continuous.score(
                    self._prepared, [inputs[i] for i in numbers], tokens, bar.update
                )
            return [row.tolist() for row in scores]

        scores = distributed.divide(len(inputs), score_share)
        return [shares_of(np.asarray(row)) for row in scores]


def _progress(total: int, description: str) -> tqdm:
    hidden = distributed.hides_bars()
    return tqdm(total=total, desc=description, unit="row", leave=False, delay=2, disable=hidden)


def answer(
    decoder: Decoder,
    inputs: Sequence[np.ndarray],
    config: EvalConfig,
    decode_text: Callable[[Sequence[int]], str],
    answer_sets: Sequence[AnswerSet] | None = None,
) -> tuple[list[str], list[dict[str, float]] | None]:
    """The student's answer to each input and, for `answers = 'likelihood'`, its distribution.

    Args:
      inputs: tokens of the label task.
      answer_sets: of each input, unless `config.answers` is `open`.

    Returns:
      Texts, and for each input the probability of each answer of its set, the most likely first.
    """
    if config.answers == "likelihood":
        found = decoder.distributions(inputs, answer_sets, "labels")
        distributions = [of.ranked(row) for of, row in zip(answer_sets, found, strict=True)]
        return [next(iter(row)) for row in distributions], distributions
    if config.answers == "trie":
        tokens = decoder(inputs, config.max_label_length, "labels", config, answer_sets)
        return [of.text(row) for of, row in zip(answer_sets, tokens, strict=True)], None
    tokens = decoder(inputs, config.max_label_length, "labels", config)
    return [decode_text(row) for row in tokens], None


def explain(
    decoder: Decoder,
    inputs: Sequence[np.ndarray],
    config: EvalConfig,
    decode_text: Callable[[Sequence[int]], str],
    start_id: int = PAD_ID,
) -> list[str]:
    """The student's rationale for each input, the tokens of the rationale task.

    `start_id` is the decoder's first input.
    """
    length = config.max_rationale_length
    tokens = decoder(inputs, length, "rationales", config, start_id=start_id)
    return [decode_text(row) for row in tokens]


def predict(
    decoder: Decoder,
    examples: Sequence[EvalInput],
    config: EvalConfig,
    decode_text: Callable[[Sequence[int]], str],
    answer_sets: Sequence[AnswerSet] | None = None,
    rationale_start_id: int = PAD_ID,
) -> list[Prediction]:
    """The student's answer to each example, and its rationale if the config asks for it."""
    inputs = [e.label_input_tokens for e in examples]
    labels, distributions = answer(decoder, inputs, config, decode_text, answer_sets)
    rationales: list[str | None] = [None] * len(examples)
    if config.with_rationales:
        inputs = [e.rationale_input_tokens for e in examples]
        rationales = explain(decoder, inputs, config, decode_text, rationale_start_id)
    predictions = [
        to_prediction(e.example, label, rationale)
        for e, label, rationale in zip(examples, labels, rationales, strict=True)
    ]
    if distributions is None:
        return predictions
    return [
        dataclasses.replace(prediction, probability=max(row.values()))
        for prediction, row in zip(predictions, distributions, strict=True)
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
        teacher_rationale=example.rationale,
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
    answer_sets: Sequence[AnswerSet] | None = None,
    rationale_start_id: int = PAD_ID,
    overrides: str = "",
    follow: bool = False,
    steps: Sequence[int] | None = None,
) -> list[dict]:
    """Judges every checkpoint that has not been judged so yet, and keeps the best on validation.

    Several processes share the inputs (see `Decoder`), and process 0 alone writes.

    Args:
      examples: of the splits in `config.splits`.
      decode_text: tokens before EOS to text.
      answer_sets: of each example, unless `config.answers` is `open`.
      rationale_start_id: the decoder's first input where a rationale is asked for.
      overrides: what of the run's own settings is otherwise; its row says so, and it is compared
        with rows that say the same.
      follow: wait for further checkpoints until training has finished or was stopped, or has given
        no sign of life for `config.give_up_secs`.
      steps: judge these checkpoints instead, again if need be. A damaged or missing one is an error
        among these, and is named and skipped otherwise.

    Returns:
      The rows of evaluations.jsonl, those of earlier calls included.
    """
    if distributed.is_main():
        read_json_rows(run.evaluations)  # raises before anything is decoded
    decoder, skipped = None, []
    is_asked_for = steps is not None
    if steps is None:
        splits = labelled_splits(each.example for each in examples)
        steps = _unjudged_steps(run, config, splits, overrides, follow)
    for step in _share_steps(steps):
        started_secs = time.perf_counter()
        decoder, problem = _load(run, step, decoder, mesh_config, config.rows, is_asked_for)
        if problems := [text for text in distributed.gather(problem) if text]:
            print(f"step {step}: {problems[0]}; skipped", flush=True)
            skipped.append(problems[0])
            continue
        predictions = predict(
            decoder, examples, config, decode_text, answer_sets, rationale_start_id
        )
        values = {"step": step} | score(predictions)
        values["secs"] = round(time.perf_counter() - started_secs, 3)
        values |= {OVERRIDES: overrides} if overrides else {}
        if distributed.is_main():
            with signals.deferred():
                _write_evaluation(run, decoder, predictions, values)
        print(describe(values), flush=True)
    rows = distributed.share(read_json_rows(run.evaluations))
    if not rows:
        found = "no checkpoint that is whole" if skipped else "no checkpoint yet"
        raise InputError(f"{run.checkpoints}: has {found}; expected one from `dslt train`")
    return rows


def _load(
    run: RunDir,
    step: int,
    decoder: Decoder | None,
    mesh_config: MeshConfig,
    rows: int,
    is_asked_for: bool,
) -> tuple[Decoder | None, str]:
    """The decoder, made if there is none yet, with a step's parameters; or why to skip the step.

    What is wrong with a step that is asked for is raised.
    """
    try:
        if decoder is None:
            return Decoder(run.checkpoints / str(step), mesh_config, rows), ""
        decoder.load_step(run.checkpoints, step)
        return decoder, ""
    except (OSError, KeyError, ValueError) as error:
        if is_asked_for:
            raise
        if student.is_gone(run.checkpoints, step):
            return decoder, "is no longer there, newer checkpoints replaced it"
        if isinstance(error, DamagedCheckpoint):
            return decoder, str(error)
        raise


def wait_for_start(run: RunDir) -> None:
    """Returns once training has written the run's config and vocabulary."""
    if not run.info.exists():
        print(f"waiting for `dslt train` to start {run.path}", flush=True)
    while not run.info.exists():
        time.sleep(START_POLL_SECS)


def describe(values: dict) -> str:
    """One line: `step 1000: test 70.5 % of 200, validation 71.3 % of 80`; no step, no prefix."""
    splits = [name.removesuffix("/accuracy") for name in values if name.endswith("/accuracy")]
    shown = [
        f"{split} {100 * values[f'{split}/accuracy']:.1f} % of {values[f'{split}/examples']}"
        for split in splits
    ]
    return (f"step {values['step']}: " if "step" in values else "") + ", ".join(shown)


def _unjudged_steps(
    run: RunDir, config: EvalConfig, splits: set[str], overrides: str, follow: bool
) -> Iterator[int]:
    """Steps of checkpoints that were not judged so on each of the splits, ascending; waits for
    more if it is to follow.
    """
    seen = judged_steps(judged_alike(read_json_rows(run.evaluations), overrides), splits)
    silence = Silence(run)
    while True:
        # asked before the listing, so that no last checkpoint is missed
        is_over = run.state() in ("finished", "stopped")
        found = [step for step in finished_steps(run.checkpoints) if step not in seen]
        if found:
            seen.add(found[0])
            yield found[0]
        elif not follow or is_over or silence.is_final(config):
            return
        else:
            time.sleep(config.poll_secs)


class Silence:
    """For how long a run's training has given no sign of life, by this process's own clock.

    A trainer that is killed, or whose machine goes, cannot say so; its heartbeat stops changing.
    """

    def __init__(self, run: RunDir):
        self._run = run
        self._last: str | None = None
        self._since = time.monotonic()
        self._is_said = False

    def is_final(self, config: EvalConfig) -> bool:
        """Whether it has lasted for `config.give_up_secs`. Prints when it begins and ends."""
        now = time.monotonic()
        try:
            beat = self._run.heartbeat.read_text(encoding="utf-8")
        except OSError:  # none yet, or it is being replaced
            beat = self._last
        if beat != self._last:
            if self._is_said:
                print("training goes on", flush=True)
            self._last, self._since, self._is_said = beat, now, False
            return False
        secs = now - self._since
        if secs < config.silence_secs:
            return False
        if not self._is_said:
            self._is_said = True
            until = f"for {config.give_up_secs:.0f} s" if config.give_up_secs else "for ever"
            print(
                f"{self._run.path}: training has given no sign of life for {secs:.0f} s; it was "
                f"probably killed, and the same `dslt train` resumes it. Waiting {until} in all",
                flush=True,
            )
        if not config.give_up_secs or secs < config.give_up_secs:
            return False
        print(f"{self._run.path}: no sign of life for {secs:.0f} s; waits no more", flush=True)
        return True


def _share_steps(steps: Iterable[int]) -> Iterator[int]:
    """Process 0's steps on every process: the others neither look at the disk nor wait alone."""
    own = iter(steps)
    while True:
        step = distributed.share(next(own, None) if distributed.is_main() else None)
        if step is None:
            return
        yield step


def _write_evaluation(
    run: RunDir, decoder: Decoder, predictions: Sequence[Prediction], values: dict
) -> None:
    """Writes what became of a step, its row last; where it is the best, its parameters too.

    Of a step that is judged again, likewise, what is known of other splits stays.
    """
    step = values["step"]
    path = run.evaluation(step) / "predictions.jsonl"
    rows = {row["step"]: row for row in read_json_rows(run.evaluations)}
    is_alike = rows.get(step, {}).get(OVERRIDES) == values.get(OVERRIDES)
    if step in rows and is_alike and path.exists():
        judged = {prediction.split for prediction in predictions}
        others = [p for p in read_predictions(path) if p.split not in judged]
        predictions = [*predictions, *others]
        splits = {prediction.split for prediction in others}
        values |= {name: x for name, x in rows[step].items() if name.split("/")[0] in splits}
    write_rows(path, predictions)
    write_json(run.evaluation(step) / "metrics.json", values)
    rows = [row for row in rows.values() if row["step"] != step] + [values]
    best, held = best_row(rows), finished_steps(run.best)
    if best is values:
        _keep_as_best(run, decoder, step)
    elif best and held and held != [best["step"]]:  # judged again: worse, or with other settings
        if best["step"] in finished_steps(run.checkpoints):
            decoder.load_step(run.checkpoints, best["step"])
            _keep_as_best(run, decoder, best["step"])
        else:
            print(
                f"warning: step {best['step']} is the best on validation now, but its checkpoint "
                f"is gone; {run.best} still holds step {held[-1]}"
            )
    write_json_rows(run.evaluations, sorted(rows, key=lambda row: row["step"]))


def _keep_as_best(run: RunDir, decoder: Decoder, step: int) -> None:
    """Writes the parameters to `best/`, where training's clean-up does not reach."""
    with CheckpointManager(run.best) as manager:
        manager.replace_all(step, decoder.params, Layout(decoder.config))
