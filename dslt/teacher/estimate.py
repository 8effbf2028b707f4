"""What a run would send, before anything is sent. May import dslt.records."""

import json
from collections.abc import Sequence

from dslt.records import Example
from dslt.teacher.endpoint import Prices
from dslt.teacher.questions import (
    CHARACTERS_PER_TOKEN,
    EndpointTeacher,
    Question,
    Request,
    to_requests,
)

SHOWN_ROWS = 2


def describe_run(
    examples: Sequence[Example],
    questions: Sequence[Question],
    possible: Sequence[Question],
    prices: Prices,
) -> str:
    """The prompts of the first rows, and the requests, tokens and cost of all, by teacher.

    Args:
      questions: those that would be asked.
      possible: those that may follow, should the answers be wrong.
    """
    if not questions:
        return "nothing to ask: every question has its answer"
    lines = []
    for teacher in dict.fromkeys(question.teacher.name for question in questions):
        mine = [question for question in questions if question.teacher.name == teacher]
        if isinstance(mine[0].teacher, EndpointTeacher):
            more = [question for question in possible if question.teacher.name == teacher]
            lines += _describe_endpoint(mine[0].teacher, examples, mine, more, prices)
        else:
            lines.append(f"{teacher}: {len(mine):,} completions, none of them over the network")
    return "\n".join(lines)


def _describe_endpoint(
    teacher: EndpointTeacher,
    examples: Sequence[Example],
    questions: Sequence[Question],
    possible: Sequence[Question],
    prices: Prices,
) -> list[str]:
    lines = []
    for row in list(dict.fromkeys(question.row for question in questions))[:SHOWN_ROWS]:
        body = next(question.body for question in questions if question.row == row)
        lines += [f"--- {teacher.name}: example {examples[row].id}", _show(body)]
    requests, more = list(to_requests(questions)), list(to_requests(possible))
    samples = sum(len(request.keys) for request in requests)
    input_tokens, most_output = _count_tokens(requests)
    more_input, more_output = _count_tokens(more)
    output_tokens = samples * _exemplar_tokens(teacher)
    lines += [
        f"--- {teacher.name}: model {teacher.model}, prompt {teacher.prompt_digest}",
        f"requests: {len(requests):,} for {samples:,} answers",
        f"tokens: about {input_tokens:,} in; about {output_tokens:,} out if answers are as long as "
        f"the exemplars', at most {most_output:,}",
    ]
    if more:
        lines.append(
            f"hinted, should all answers be wrong: at most {len(more):,} more requests, about "
            f"{more_input:,} tokens in, at most {more_output:,} out"
        )
    if prices != Prices():
        most = prices.cost(input_tokens + more_input, most_output + more_output)
        about = prices.cost(input_tokens, output_tokens)
        lines.append(f"cost: about {about:,.2f}, at most {most:,.2f}")
    return lines


def _count_tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """About how many tokens go in, and how many come out at most."""
    return (
        sum(request.input_tokens() for request in requests),
        sum(request.output_tokens() for request in requests),
    )


def _exemplar_tokens(teacher: EndpointTeacher) -> int:
    """The mean length of an exemplar's explanation and answer."""
    texts = [each.rationale + each.answer for each in teacher.prompt.exemplars]
    if not texts:
        return teacher.max_tokens or 0
    frame = len(teacher.prompt.explanation)
    return round((sum(map(len, texts)) / len(texts) + frame) / CHARACTERS_PER_TOKEN)


def _show(body) -> str:
    """A request's prompt as text, and its other fields as JSON."""
    rest = {name: value for name, value in body.items() if name not in ("messages", "prompt")}
    turns = [f"[{turn['role']}]\n{turn['content']}" for turn in body.get("messages", ())]
    return "\n".join([*turns, *filter(None, [body.get("prompt")]), json.dumps(rest)])
