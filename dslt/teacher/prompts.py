"""Prompt files: few-shot exemplars with their answers, rendered to chat turns or to one text.

May import dslt.records. A prompt is a TOML file that can be copied and changed; those that come
with dslt lie in `dslt/prompts`. It declares its answer form once, to render and to parse by.

    prompt = load_prompt("nli")
    prompt.messages("premise: ... hypothesis: ...")   # chat
    prompt.text("premise: ... hypothesis: ...")        # plain completion

A problem's text and an answer are only ever put in as they are: nothing in them is a placeholder.
"""

import dataclasses
import hashlib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from dslt.errors import InputError
from dslt.files import write_text
from dslt.teacher.parse import AnswerForm

DIRECTORY = Path(__file__).parents[1] / "prompts"
PROMPT_BY_DATASET = {
    "esnli": "nli", "anli1": "nli", "facts": "nli",
    "cqa": "choice", "choice": "choice",
    "svamp": "equation", "sums": "equation",
}  # fmt: skip
GENERIC = "generic"
_PLACEHOLDER = re.compile(r"\{(input|rationale|answer|labels)\}")


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """A problem as the records have it, an explanation, and the answer as it should be written."""

    input: str
    rationale: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt file.

    Attributes:
      answer_kind: what is legal: `choice`, `label`, `equation` or `text`, as in AnswerForm.
      answer_mark: the words behind which the answer starts.
      exemplars: shown before the problem.
      labels: the label set of kind `label`.
      instruction: says the task.
      label_instruction: added to it where there are labels; `{labels}` stands for them.
      question: how a problem is asked; `{input}` stands for it.
      explanation: how it is answered; `{rationale}` and `{answer}` stand for its parts.
      reply_start: what a plain completion goes on from.
      separator: between exemplars of a plain completion.
      hint: added to a problem that is asked again with its answer; `{answer}` stands for it.
      stop: sequences that end the completion: where a next exemplar would begin.
      source: the file's text.
    """

    answer_kind: str
    answer_mark: str
    exemplars: tuple[Exemplar, ...] = ()
    labels: tuple[str, ...] = ()
    instruction: str = ""
    label_instruction: str = ""
    question: str = "Q: {input}"
    explanation: str = "{rationale} So the answer is {answer}."
    reply_start: str = "A:"
    separator: str = "\n\n"
    hint: str = "Hint: the answer is {answer}. Explain why, without speaking of this hint."
    stop: tuple[str, ...] = ("\nQ:",)
    source: str = ""

    @property
    def digest(self) -> str:
        """Names the prompt: 16 hex digits of the sha256 of its file and its labels."""
        text = "\0".join([self.source, *self.labels])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def form(self) -> AnswerForm:
        """What is legal, and behind which words it stands."""
        return AnswerForm(self.answer_kind, self.labels, self.answer_mark)

    def messages(self, problem: str, hint: str | None = None) -> list[dict[str, str]]:
        """Chat turns: the instruction, each exemplar as a turn of both, and the problem.

        Args:
          problem: an example's input.
          hint: its answer, where the teacher is to be told.
        """
        turns = [{"role": "system", "content": self._instruction}] if self._instruction else []
        for exemplar in self.exemplars:
            turns.append({"role": "user", "content": self._ask(exemplar.input)})
            turns.append({"role": "assistant", "content": self._explain(exemplar)})
        return [*turns, {"role": "user", "content": self._ask(problem, hint)}]

    def text(self, problem: str, hint: str | None = None) -> str:
        """One text that a plain completion goes on from; arguments as in `messages`."""
        parts = [self._instruction] if self._instruction else []
        for exemplar in self.exemplars:
            reply = f"{self.reply_start} {self._explain(exemplar)}"
            parts.append(f"{self._ask(exemplar.input)}\n{reply}")
        return self.separator.join([*parts, f"{self._ask(problem, hint)}\n{self.reply_start}"])

    @property
    def _instruction(self) -> str:
        parts = [self.instruction.strip()]
        if self.labels and self.label_instruction:
            parts.append(_fill(self.label_instruction, labels=", ".join(self.labels)))
        return " ".join(filter(None, parts))

    def _ask(self, problem: str, hint: str | None = None) -> str:
        question = _fill(self.question, input=problem)
        return question if hint is None else f"{question}\n{_fill(self.hint, answer=hint)}"

    def _explain(self, exemplar: Exemplar) -> str:
        return _fill(self.explanation, rationale=exemplar.rationale, answer=exemplar.answer)


def load_prompt(name: str, labels: Sequence[str] = ()) -> Prompt:
    """Reads a prompt that comes with dslt, by its bare name, or a file of one's own, by its path.

    Args:
      labels: of one's own; they replace the file's.

    Raises:
      InputError: no such prompt, or a file that is none.
    """
    path = Path(name)
    if path.name == name and path.suffix != ".toml":
        path = DIRECTORY / f"{name}.toml"
    try:
        source = path.read_text(encoding="utf-8-sig")
        fields = tomllib.loads(source)
    except FileNotFoundError:
        known = ", ".join(sorted(each.stem for each in DIRECTORY.glob("*.toml")))
        near = f"; there is {name}.toml" if Path(f"{name}.toml").is_file() else ""
        raise InputError(
            f"{name}: there is no such prompt{near}; expected {known}, or the path of a .toml file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # a number too long is a ValueError
        raise InputError(f"{path}: is no prompt file ({error}); expected TOML") from None
    try:
        return _to_prompt(fields, source, tuple(labels))
    except ValueError as error:
        raise InputError(f"{path}: {error}; compare with {DIRECTORY / 'generic.toml'}") from None


def prompt_of(dataset: str) -> str:
    """The name of the prompt that suits a dataset."""
    return PROMPT_BY_DATASET.get(dataset, GENERIC)


def store_prompt(prompt: Prompt, directory: str | os.PathLike) -> Path:
    """Keeps a prompt's file in an output directory, once, under its digest."""
    path = Path(directory) / "prompts" / f"{prompt.digest}.toml"
    if not path.exists():
        write_text(path, prompt.source)
    return path


def _to_prompt(fields: dict, source: str, labels: tuple[str, ...]) -> Prompt:
    """Checks names and types; raises ValueError with the first fault."""
    known = {field.name: field for field in dataclasses.fields(Prompt) if field.name != "source"}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"unknown key {name!r}; expected {', '.join(known)}")
        if name == "exemplars":
            if not isinstance(value, list):
                raise ValueError(f"exemplars is {value!r}; expected [[exemplars]] tables")
            fields[name] = tuple(_to_exemplar(each) for each in value)
        elif name in ("labels", "stop"):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{name} is {value!r}; expected a list of texts")
            fields[name] = tuple(value)
        elif not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; expected a text")
    for name in ("answer_kind", "answer_mark"):
        if not fields.get(name, "").strip():
            raise ValueError(f"{name} is missing")
    if labels:
        fields |= {"labels": labels, "answer_kind": "label"}
    empty = [label for label in fields.get("labels", ()) if not label.strip()]
    if empty:
        raise ValueError(f"a label is {empty[0]!r}; expected some text")
    prompt = Prompt(**fields, source=source)
    prompt.form  # noqa: B018  raises ValueError for what is no answer form
    for name, placeholders in (("question", ["input"]), ("explanation", ["rationale", "answer"])):
        for placeholder in placeholders:
            if f"{{{placeholder}}}" not in getattr(prompt, name):
                raise ValueError(f"{name} has no {{{placeholder}}}")
    return prompt


def _to_exemplar(fields: object) -> Exemplar:
    names = [field.name for field in dataclasses.fields(Exemplar)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(names):
        raise ValueError(f"an exemplar is {fields!r}; expected the keys {', '.join(names)}")
    return Exemplar(**{name: str(value).strip() for name, value in fields.items()})


def _fill(template: str, **values: str) -> str:
    """Replaces the placeholders in one pass: what is put in is never looked at again."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
