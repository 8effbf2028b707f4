"""Teachers, and the questions that they are asked: one for each sample of each problem.

May import dslt.records. A question's key is a hash of all that its answer depends on: model,
rendered prompt, sampling parameters, number of the sample. So an answer is found again whoever
asks, and nothing is paid twice. The endpoint's address and key are no part of it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dslt.errors import InputError
from dslt.records import MAX_WEIGHT, Example
from dslt.teacher.parse import AnswerForm, answer_form
from dslt.teacher.prompts import Prompt
from dslt.teacher.store import Answer, CompletionStore

CHARACTERS_PER_TOKEN = 4  # of English text, roughly; for estimates alone
MIN_WEIGHT = 1e-6  # what a teacher's rationales share of it stays a number in float32
OWN_FIELDS = ("messages", "prompt", "n")  # of a request: no extra_body may have them
PATHS = {"chat": "/chat/completions", "completion": "/completions"}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Somebody who explains.

    Attributes:
      name: as the records have it.
      weight: of its votes for an example's label, and of its rationales in the loss.
      samples: answers a problem.
      form: what is legal; None: what the dataset declares.
    """

    name: str
    weight: float = 1.0
    samples: int = 1
    form: AnswerForm | None = None

    def __post_init__(self):
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise InputError(
                f"teacher {self.name!r}: weight is {self.weight}; expected at least {MIN_WEIGHT}, "
                f"at most {MAX_WEIGHT:,.0f}"
            )
        if self.samples < 1:
            raise InputError(f"teacher {self.name!r}: samples is {self.samples}; expected above 0")

    @property
    def prompt_digest(self) -> str | None:
        return None

    def answer_form(self, example: Example) -> AnswerForm:
        """What a legal answer to an example is."""
        return self.form or answer_form(example)


@dataclasses.dataclass(frozen=True)
class LocalTeacher(Teacher):
    """A teacher in this process: the scripted one, or completions that are there already.

    Attributes:
      complete: (example, sample) to a completion, or None where it has none.
    """

    complete: Callable[[Example, int], str | None] = lambda example, sample: None


@dataclasses.dataclass(frozen=True)
class EndpointTeacher(Teacher):
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
      model: as the endpoint calls it.
      prompt: what it is shown.
      mode: `chat` or `completion`.
      temperature, max_tokens, seed: of sampling; None leaves the choice to the endpoint. Sample i
        gets seed + i.
      extra_body: further fields of the request, none of OWN_FIELDS; null takes one out.
      base_url: of the endpoint; None: OpenAI's, or what OPENAI_BASE_URL says.
      api_key_env: the environment variable that holds the key.
      samples_per_request: the `n` of a request, for endpoints that know it.
    """

    model: str = ""
    prompt: Prompt | None = None
    mode: str = "chat"
    temperature: float | None = 0.7
    max_tokens: int | None = 512
    seed: int | None = None
    extra_body: Mapping[str, object] = dataclasses.field(default_factory=dict)
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    samples_per_request: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in PATHS:
            raise InputError(f"mode is {self.mode!r}; expected one of {', '.join(PATHS)}")
        if not self.model:
            raise InputError(f"teacher {self.name!r} has no model; expected what to ask for")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise InputError(
                f"teacher {self.name!r}: temperature is {self.temperature}; expected a finite "
                "number, or one below 0 for the endpoint's own"
            )
        if self.samples_per_request < 1:
            raise InputError(
                f"teacher {self.name!r}: samples_per_request is {self.samples_per_request}; "
                "expected above 0"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(
                f"teacher {self.name!r}: max_tokens is {self.max_tokens}; expected above 0, or 0 "
                "for the endpoint's own"
            )
        self._check_extra_body()

    def _check_extra_body(self) -> None:
        place = f"teacher {self.name!r}: extra_body"
        taken = [name for name in OWN_FIELDS if name in self.extra_body]
        if taken:
            raise InputError(
                f"{place} has {', '.join(taken)}; the prompt and samples_per_request say what a "
                "request holds there, so leave it out"
            )
        seed = self.extra_body.get("seed")
        if type(seed) not in (int, type(None)):
            raise InputError(
                f"{place} has the seed {seed!r}; expected a whole number, to which each sample "
                "adds its own"
            )
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except ValueError:
            raise InputError(
                f"{place} is {self.extra_body}; expected JSON, which has no NaN and no Infinity"
            ) from None

    @property
    def prompt_digest(self) -> str | None:
        return self.prompt.digest

    def answer_form(self, example: Example) -> AnswerForm:
        return self.form or self.prompt.form

    def body(self, example: Example, hint: str | None = None) -> dict:
        """The request's fields, without `n`."""
        if self.mode == "chat":
            asked = {"messages": self.prompt.messages(example.input, hint)}
        else:
            asked = {"prompt": self.prompt.text(example.input, hint)}
        body = {
            "model": self.model,
            **asked,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": list(self.prompt.stop) or None,
            "seed": self.seed,
            **self.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Question:
    """One sample that is asked of one teacher.

    Attributes:
      key: names the answer in the store.
      row: the example's place among the examples.
      teacher, sample, is_hinted: who is asked, which time, and whether the answer is told.
      body: of an endpoint's request, the same for all samples.
      completion: a local teacher's answer.
    """

    key: str
    row: int
    teacher: Teacher
    sample: int
    is_hinted: bool = False
    body: Mapping[str, object] = dataclasses.field(default_factory=dict)
    completion: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What is sent at once: one or more samples of one problem.

    Attributes:
      teacher: whose endpoint it goes to.
      keys: of its samples.
      body: its fields.
    """

    teacher: EndpointTeacher
    keys: tuple[str, ...]
    body: Mapping[str, object]

    @property
    def path(self) -> str:
        return PATHS[self.teacher.mode]

    def input_tokens(self) -> int:
        """An estimate, from the number of characters."""
        return estimate_input_tokens(self.body)

    def output_tokens(self) -> int:
        """The most that may come back."""
        return len(self.keys) * (self.teacher.max_tokens or 0)


def plan_questions(
    examples: Sequence[Example],
    rows: Iterable[int],
    teacher: Teacher,
    is_hinted: bool = False,
) -> list[Question]:
    """The questions to one teacher on some of the examples; a local teacher gets no hint.

    With `is_hinted` the teacher is told the gold label, and asked once.
    """
    if isinstance(teacher, EndpointTeacher):
        return list(_endpoint_questions(examples, rows, teacher, is_hinted))
    questions = []
    for row in () if is_hinted else rows:
        example = examples[row]
        for sample in range(teacher.samples):
            completion = teacher.complete(example, sample)
            if completion is not None:
                parts = [teacher.name, example.dataset, example.id, example.input, completion]
                key = _hash([*parts, sample])
                questions.append(Question(key, row, teacher, sample, completion=completion))
    return questions


def to_requests(questions: Iterable[Question]) -> Iterator[Request]:
    """The requests that ask an endpoint's questions, each key once."""
    seen: set[str] = set()
    group: list[Question] = []
    for question in questions:
        if question.key in seen:
            continue
        seen.add(question.key)
        is_full = len(group) == question.teacher.samples_per_request
        if group and (is_full or group[0].body is not question.body):
            yield _to_request(group)
            group = []
        group.append(question)
    if group:
        yield _to_request(group)


def answer_locally(questions: Iterable[Question], store: CompletionStore) -> None:
    """Stores what local teachers say."""
    for question in questions:
        store.add_answer(question.key, Answer(question.completion, question.teacher.name))


def estimate_input_tokens(body: Mapping[str, object]) -> int:
    """Roughly how many tokens a request's prompt has."""
    texts = [message["content"] for message in body.get("messages", ())]
    characters = sum(map(len, [*texts, str(body.get("prompt", ""))]))
    return -(-characters // CHARACTERS_PER_TOKEN)


def is_in_shard(example: Example, shard: tuple[int, int]) -> bool:
    """Whether an example belongs to shard (i, n), i from 1; equal inputs are in the same shard."""
    index, count = shard
    digest = hashlib.sha256(example.input.encode()).digest()
    return int.from_bytes(digest[:8], "big") % count == index - 1


def _endpoint_questions(
    examples: Sequence[Example], rows: Iterable[int], teacher: EndpointTeacher, is_hinted: bool
) -> Iterator[Question]:
    for row in rows:
        body = teacher.body(examples[row], examples[row].label if is_hinted else None)
        digest = hashlib.sha256(json.dumps([teacher.mode, body], sort_keys=True).encode())
        for sample in range(1 if is_hinted else teacher.samples):
            key = digest.copy()
            key.update(str(sample).encode())
            yield Question(key.hexdigest()[:32], row, teacher, sample, is_hinted, body)


def _to_request(group: list[Question]) -> Request:
    """A request of its own body; the first sample's seed and the number of samples go into it."""
    body = dict(group[0].body)
    if "seed" in body:
        body["seed"] += group[0].sample
    if len(group) > 1:
        body["n"] = len(group)
    return Request(group[0].teacher, tuple(question.key for question in group), body)


def _hash(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
