"""The thread of a server that decodes: what is asked together is decoded together.

Imports core, checkpoint and workdir. The thread alone touches the decoder. It takes texts from a
queue whenever there is room for them, between any two steps, and never waits for more to come.

    engine = Engine(path, format, encode, decode_text, config=ServeConfig())
    engine.start()
    works = engine.submit(["premise: …"], with_rationales=False)
    works[0].future.result()  # a Label; a rationale is text
"""

import collections
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import prometheus_client

from dslt.checkpoint import student
from dslt.core import sharding
from dslt.core.answers import AnswerSet, shares_of
from dslt.core.batch import EOS_ID
from dslt.core.stream import Stream, StreamPrograms, sizes
from dslt.errors import InputError
from dslt.workdir import StudentFormat

ANSWERS = ("open", "likelihood")
SHORTEST_SOURCE = 128  # tokens; lengths and counts are rounded up to these, or to `sizes` above
SHORTEST_ANSWER = 8
FEWEST_ANSWERS = 8
MAX_ANSWERS = 64
STEPS_AT_ONCE = 8  # tokens of each live text, before the queue is looked at again


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What one server takes on.

    Attributes:
      rows: texts decoded at a time, of each kind and length.
      max_queue: labels and rationales that may wait for a place; what is more is refused.
      max_inputs: in a request.
      max_bytes: of a request's body.
      body_secs: for a request's body to come whole.
      max_label_length: tokens of a label at most, EOS included.
      max_rationale_length: likewise of a rationale.
      answers: `open`: any text. `likelihood`: the most likely one of a set.
      labels: the set; without any an input's own choices.
      stop_secs: to answer what has been accepted, once told to stop.
    """

    rows: int = 8
    max_queue: int = 256
    max_inputs: int = 64
    max_bytes: int = 1_000_000
    body_secs: float = 10.0
    max_label_length: int = 64
    max_rationale_length: int = 256
    answers: str = "open"
    labels: tuple[str, ...] = ()
    stop_secs: int = 60

    def __post_init__(self):
        if self.answers not in ANSWERS:
            raise InputError(
                f"ServeConfig.answers is {self.answers!r}; expected one of {', '.join(ANSWERS)}"
            )
        if self.labels and self.answers == "open":
            raise InputError(
                f"ServeConfig.labels is {self.labels}, but ServeConfig.answers is 'open'; expected "
                "'likelihood' to answer with one of them"
            )
        if len(self.labels) > MAX_ANSWERS:
            raise InputError(f"{len(self.labels)} labels; expected {MAX_ANSWERS} at most")


class Label(NamedTuple):
    """An answer.

    Attributes:
      probability: exp of the log-likelihood of the label's tokens and EOS (without EOS where the
        length ended it): its share of all texts. Of a set: its share of the set.
      distribution: of a set, each answer's probability, the most likely first; else None.
    """

    text: str
    probability: float
    distribution: dict[str, float] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One text to decode, or, with `answers`, to score.

    Attributes:
      kind: `label` or `rationale`.
      tokens: [length] int32, EOS included.
    """

    kind: str
    tokens: np.ndarray
    answers: AnswerSet | None
    future: Future = dataclasses.field(default_factory=Future)


class Overloaded(Exception):
    """There is no room for a request now; later there may be."""


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self):
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "dslt_requests", "Requests to /predict.", ["status"], registry=registry
        )
        self.request_secs = prometheus_client.Histogram(
            "dslt_request_seconds", "Time from a request to its answer.", registry=registry
        )
        self.texts = prometheus_client.Counter(
            "dslt_texts", "Labels and rationales given.", ["kind"], registry=registry
        )
        self.tokens = prometheus_client.Counter(
            "dslt_tokens", "Tokens decoded, EOS left out.", ["kind"], registry=registry
        )
        self.waiting = prometheus_client.Gauge(
            "dslt_waiting", "Labels and rationales that wait for a place.", registry=registry
        )
        self.live = prometheus_client.Gauge(
            "dslt_live", "Labels and rationales that are being decoded.", registry=registry
        )


class Engine:
    """A student, a queue and the thread that decodes."""

    def __init__(
        self,
        path: Path,
        format: StudentFormat,
        encode: Callable[[str], list[int]],
        decode_text: Callable[[Sequence[int]], str],
        config: ServeConfig,
        answers_of: Callable[[str], AnswerSet] | None = None,
    ):
        """Reads the student; raises InputError where there is none.

        Args:
          encode: text to tokens, without EOS.
          decode_text: tokens before EOS to text.
          answers_of: an input's answers unless `config.answers` is `open`; raises InputError where
            it has none.
        """
        self.config, self.format, self.metrics = config, format, Metrics()
        self.state = "starting"  # then ready; at last stopped or failed
        self._encode, self._decode_text, self._answers_of = encode, decode_text, answers_of
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
        self.model_config, self._graphdef, self._params = student.load(path, mesh)
        self._source_lengths = sizes(SHORTEST_SOURCE, format.max_input_length)
        self._label_lengths = sizes(SHORTEST_ANSWER, config.max_label_length)
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)

    def start(self) -> None:
        """Compiles in the background, and is ready then."""
        self._thread.start()

    def stop(self) -> None:
        """Returns once all that was accepted is answered, or after `config.stop_secs`."""
        self._queue.put(None)
        self._thread.join(self.config.stop_secs)

    def submit(self, texts: Sequence[str], with_rationales: bool) -> list[Work]:
        """Queues each text's label and, if asked for, its rationale; all of them or none.

        Raises:
          InputError: a text is empty or too long, or has no answers to choose from; or there would
            never be room for so many.
          Overloaded: there is no room for all of them, or the engine is not ready.
        """
        if self.state != "ready":
            raise Overloaded(f"the student is {self.state}")
        works = []
        for number, text in enumerate(texts):
            works.append(self._prepare(f"input {number}", "label", text))
            if with_rationales:
                works.append(self._prepare(f"input {number}", "rationale", text))
        if len(works) > self.config.max_queue:
            raise InputError(
                f"{len(works)} labels and rationales at once; at most {self.config.max_queue} may "
                "wait. Send fewer inputs"
            )
        with self._lock:
            if self.state != "ready":  # it has ended since
                raise Overloaded(f"the student is {self.state}")
            if self._num_waiting + len(works) > self.config.max_queue:
                raise Overloaded(
                    f"{self._num_waiting} labels and rationales are waiting; at most "
                    f"{self.config.max_queue} may, and these are {len(works)}"
                )
            self._num_waiting += len(works)
            self.metrics.waiting.set(self._num_waiting)
            for work in works:
                self._queue.put(work)
        return works

    def _prepare(self, name: str, kind: str, text: str) -> Work:
        if not text.strip():
            raise InputError(f"{name} is empty; expected text")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(f"{name} is no Unicode text ({error.reason})") from None
        prefix = getattr(self.format, f"input_prefix_{kind}")
        tokens = np.array([*self._encode(prefix + text), EOS_ID], np.int32)
        if len(tokens) > self.format.max_input_length:
            raise InputError(
                f"{name} has {len(tokens)} tokens, prefix and end included; the student takes "
                f"{self.format.max_input_length} at most. Shorten it"
            )
        answers = None
        if kind == "label" and self._answers_of:
            answers = self._answers_of(text)
            if len(answers.texts) > MAX_ANSWERS:
                raise InputError(
                    f"{name} lists {len(answers.texts)} answers; expected {MAX_ANSWERS} at most"
                )
        return Work(kind, tokens, answers)

    def _work(self) -> None:
        """The thread. Whatever ends it, nobody is left waiting."""
        accepted: set[Work] = set()
        try:
            started_secs = time.perf_counter()
            self._programs = StreamPrograms(self._graphdef, self._params)
            streams = self._make_streams()
            self.state = "ready"
            print(f"ready after {time.perf_counter() - started_secs:.1f} s", flush=True)
            self._decode_until_stopped(streams, accepted)
            state, reason = "stopped", Overloaded("the student is stopped")
        except BaseException as error:  # a panic of a tokenizer in Rust is no Exception
            traceback.print_exc()
            state, reason = "failed", RuntimeError(f"the student failed: {error!r}")
        with self._lock:  # `submit` looks at the state and puts under it too: nothing comes after
            self.state = state
            while not self._queue.empty():
                work = self._queue.get()
                if work is not None and work.future.set_running_or_notify_cancel():
                    accepted.add(work)
            self._num_waiting = 0
        self.metrics.waiting.set(0)
        self.metrics.live.set(0)
        for work in accepted:
            work.future.set_exception(reason)

    def _decode_until_stopped(self, streams: dict, accepted: set[Work]) -> None:
        waiting = {place: collections.deque() for place in streams}
        to_score: collections.deque[Work] = collections.deque()
        is_stopping = False
        while accepted or not is_stopping:
            while not (accepted and self._queue.empty()):  # waits where there is nothing to do
                work = self._queue.get()
                if work is None:
                    is_stopping = True
                    break
                if not work.future.set_running_or_notify_cancel():  # whoever asked has left
                    self._leave_queue(1)
                    continue
                accepted.add(work)
                if work.answers is None:
                    waiting[work.kind, self._source_length(work)].append((work, work.tokens))
                else:
                    to_score.append(work)
            ended = []
            if to_score:
                self._leave_queue(1)
                ended.append((to_score.popleft(), None))
            for place, stream in streams.items():
                self._leave_queue(stream.fill(waiting[place]))
            for stream in streams.values():
                ended += stream.advance(STEPS_AT_ONCE)
            self.metrics.live.set(sum(stream.num_live for stream in streams.values()))
            for work, tokens in ended:
                result = self._result(work, tokens)
                self.metrics.texts.labels(work.kind).inc()
                accepted.remove(work)
                work.future.set_result(result)

    def _leave_queue(self, count: int) -> None:
        with self._lock:
            self._num_waiting -= count
            self.metrics.waiting.set(self._num_waiting)

    def _result(self, work: Work, tokens: list[int] | None) -> Label | str:
        if tokens is not None:
            self.metrics.tokens.labels(work.kind).inc(len(tokens))
        if work.kind == "rationale":
            return self._decode_text(tokens)
        if work.answers is not None:
            scores = self._score(work, work.answers.tokens)
            distribution = work.answers.ranked(shares_of(scores))
            return Label(*next(iter(distribution.items())), distribution)
        has_ended = len(tokens) < self.config.max_label_length
        scores = self._score(work, [[*tokens, EOS_ID] if has_ended else tokens])
        return Label(self._decode_text(tokens), float(np.exp(scores[0])), None)

    def _score(self, work: Work, answers: Sequence[Sequence[int]]) -> np.ndarray:
        shape = self._score_shape(answers)
        return self._programs.score(work.tokens, self._source_length(work), answers, shape)

    def _source_length(self, work: Work) -> int:
        return next(length for length in self._source_lengths if length >= len(work.tokens))

    def _score_shape(self, answers: Sequence[Sequence[int]]) -> tuple[int, int]:
        """What sets of answers are padded to: their number and their length."""
        counts = (1, *sizes(FEWEST_ANSWERS, MAX_ANSWERS))
        longest = max(map(len, answers))
        return (
            next(count for count in counts if count >= len(answers)),
            next(length for length in self._label_lengths if length >= longest),
        )

    def _make_streams(self) -> dict[tuple[str, int], Stream]:
        """A stream for each kind and length of source; compiles all that may be needed."""
        kinds = {
            "label": (self.config.max_label_length, 0),
            "rationale": (self.config.max_rationale_length, self.format.rationale_start_id),
        }
        if self.config.answers != "open":
            del kinds["label"]
        streams = {}
        for kind, (max_length, start_id) in kinds.items():
            for length in self._source_lengths:
                streams[kind, length] = stream = Stream(
                    self._programs,
                    source_length=length,
                    max_length=max_length,
                    start_id=start_id,
                    max_rows=self.config.rows,
                )
                stream.compile()
        counts = (1,) if self.config.answers == "open" else sizes(FEWEST_ANSWERS, MAX_ANSWERS)
        shapes = [(count, length) for count in counts for length in self._label_lengths]
        if self.config.labels:
            shapes = [self._score_shape(self._answers_of("").tokens)]
        eos = np.array([EOS_ID], np.int32)
        for length in self._source_lengths:
            for shape in shapes:
                self._programs.score(eos, length, [(EOS_ID,)], shape)
        return streams
