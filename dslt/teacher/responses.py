"""A chat's or a completion's response → its answers. May import dslt.teacher.store.

The same fields come over HTTP and in batch results, and differ a little from server to server.
"""

from dslt.teacher.store import Answer


def parse_response(response: object) -> list[Answer] | None:
    """The answers of a response's choices, in order; None if it is no response.

    The tokens of the whole response stand with its first answer.
    """
    if not isinstance(response, dict):
        return None
    choices = response.get("choices")
    if choices is not None and not isinstance(choices, list):
        return None
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    model = response.get("model")
    answers = []
    for choice in choices or ():
        said = _parse_choice(choice)
        if said is None:
            return None
        text, reasoning, finish_reason = said
        answers.append(
            Answer(
                text=text,
                model=model if isinstance(model, str) else "",
                reasoning=reasoning,
                finish_reason=finish_reason,
                input_tokens=0 if answers else _count(usage.get("prompt_tokens")),
                output_tokens=0 if answers else _count(usage.get("completion_tokens")),
            )
        )
    return answers


def _parse_choice(choice: object) -> tuple[str, str | None, str | None] | None:
    """(text, reasoning, finish reason) of a chat's or a completion's choice; None if it is none."""
    if not isinstance(choice, dict):
        return None
    finish_reason = choice.get("finish_reason")
    finish_reason = finish_reason if isinstance(finish_reason, str) else None
    if isinstance(choice.get("text"), str):
        return choice["text"], None, finish_reason
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    content = message.get("content")
    if isinstance(content, list):  # parts, as some servers give them
        content = "".join(
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    reasoning = reasoning if isinstance(reasoning, str) else None
    if isinstance(content, str):
        return content, reasoning, finish_reason
    refusal = message.get("refusal")
    if isinstance(refusal, str):
        return refusal, reasoning, finish_reason
    is_said = reasoning or finish_reason in ("content_filter", "length")
    return ("", reasoning, finish_reason) if content is None and is_said else None


def _count(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0
