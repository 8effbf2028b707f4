"""`dslt predict`: answers to new inputs."""

import argparse
import itertools
import sys
from pathlib import Path

from dslt import strict_json
from dslt.commands.arguments import add_command, add_student_flag, fields_of, positive
from dslt.commands.remote import local_student
from dslt.commands.students import answer_reader, make_answer_sets, student_files
from dslt.errors import InputError
from dslt.terminal import printable

STRATEGY_FLAGS = {  # what says nothing to another strategy
    "sample": ("temperature", "top_k", "top_p", "seed"),
    "beam": ("num_beams", "length_penalty", "early_stopping"),
}


def add(commands) -> None:
    command = add_command(commands, "predict", predict, "answer new inputs")
    add_student_flag(command)
    command.add_argument(
        "input_file",
        nargs="?",
        default="-",
        help="an input a line, or JSON objects with `input` such as records; - is standard input",
    )
    command.add_argument("--rationales", action="store_true", help="explain the answers too")
    command.add_argument("--split", help="of a records file: take these rows alone")
    command.add_argument("--limit", type=positive, help="take the first so many inputs")
    command.add_argument("--format", default="jsonl", choices=("jsonl", "text"))
    command.add_argument("--rows", type=positive, default=64, help="decoded at a time")
    command.add_argument("--max_label_length", type=positive, default=64, metavar="TOKENS")
    given = {"default": argparse.SUPPRESS}  # the defaults are EvalConfig's
    command.add_argument("--max_rationale_length", type=positive, metavar="TOKENS", **given)
    choice = command.add_argument_group("answers of a set")
    choice.add_argument(
        "--answers",
        choices=("open", "trie", "likelihood"),
        help="any text; greedily within the set; or the set's most likely, with its probability",
        **given,
    )
    choice.add_argument(
        "--label",
        action="append",
        dest="labels",
        help="of the set, repeatable; without any an input's own `Answer Choices:`",
        **given,
    )

    tokens = command.add_argument_group("choice of tokens")
    tokens.add_argument("--strategy", choices=("greedy", "sample", "beam"), **given)
    tokens.add_argument("--temperature", type=float, help="of sample", **given)
    tokens.add_argument("--top_k", type=int, help="of sample; 0 takes all tokens", **given)
    tokens.add_argument("--top_p", type=float, help="of sample; 1 takes all tokens", **given)
    tokens.add_argument("--seed", type=int, help="of sample", **given)
    tokens.add_argument("--num_beams", type=int, help="of beam", **given)
    tokens.add_argument("--length_penalty", type=float, help="of beam", **given)
    tokens.add_argument("--early_stopping", action="store_true", help="of beam", **given)


def predict(args) -> None:
    """Prints an object a line: input, prediction, rationale if asked, and the truth if known."""
    import dataclasses
    import json

    from dslt import evaluate as judge
    from dslt.core.sharding import MeshConfig
    from dslt.data.vocabulary import check_embedded, encode_with_eos, load_vocabulary

    given = fields_of(args, judge.EvalConfig)
    if "labels" in given:
        given |= {"labels": tuple(args.labels), "answers": given.get("answers", "likelihood")}
    config = judge.EvalConfig(**given)
    refuse_idle(given, config, args.rationales)
    path = local_student(args.student)
    format, vocabulary_path = student_files(path)
    config = dataclasses.replace(config, with_rationales=args.rationales)
    config, read_answer = answer_reader(config, format.target_layout, format.max_target_length)
    rows = read_inputs(args.input_file, args.split)[: args.limit]
    vocabulary = load_vocabulary(vocabulary_path)
    answer_sets = None
    if config.answers != "open":
        named = [(f"input {i}", row["input"]) for i, row in enumerate(rows, start=1)]
        answer_sets = make_answer_sets(named, config, vocabulary)
    decoder = judge.Decoder(path, MeshConfig(), args.rows)
    check_embedded(vocabulary, vocabulary_path, decoder.config.vocab_size, path)

    def encode(prefix: str) -> list:
        encoded = [
            encode_with_eos(vocabulary, prefix + row["input"], format.max_input_length)
            for row in rows
        ]
        truncated = sum(is_cut for _, is_cut in encoded)
        if truncated:
            cut = f"warning: {truncated} inputs were cut at {format.max_input_length} tokens"
            print(cut, file=sys.stderr)
        return [tokens for tokens, _ in encoded]

    inputs = encode(format.input_prefix_label)

    def decode_text(tokens) -> str:
        return read_answer(vocabulary.decode(tokens))

    texts, distributions = judge.answer(decoder, inputs, config, decode_text, answer_sets)
    answers = {"prediction": texts}
    if distributions:
        answers["probability"] = [max(row.values()) for row in distributions]
        answers["distribution"] = distributions
    if config.with_rationales:
        inputs = encode(format.input_prefix_rationale)
        start_id = format.rationale_start_id
        answers["rationale"] = judge.explain(decoder, inputs, config, decode_text, start_id)
    for i, row in enumerate(rows):
        row |= {name: values[i] for name, values in answers.items()}
        if args.format == "jsonl":
            print(json.dumps(row, ensure_ascii=False))
        else:
            lines = (f"{name:<17} {printable(str(text), keep='')}" for name, text in row.items())
            print("\n".join(lines), end="\n\n")


def refuse_idle(given: dict, config, with_rationales: bool) -> None:
    """Raises InputError where one of the given flags says nothing to what is asked for."""
    for strategy, flags in STRATEGY_FLAGS.items():
        idle = [f"--{flag}" for flag in flags if flag in given and strategy != config.strategy]
        if idle:
            raise InputError(
                f"{', '.join(idle)} given, but the strategy is {config.strategy!r}; expected "
                f"--strategy {strategy} with it"
            )
    if with_rationales:
        return
    of_tokens = ("strategy", *itertools.chain(*STRATEGY_FLAGS.values()))
    of_rationales = ("max_rationale_length", *(of_tokens if config.answers == "likelihood" else ()))
    idle = [f"--{flag}" for flag in of_rationales if flag in given]
    if idle:
        raise InputError(
            f"{', '.join(idle)} given, but answers is {config.answers!r} and no rationale is asked "
            "for; expected --rationales with it"
        )


def read_inputs(path: str, split: str | None) -> list[dict[str, str]]:
    """The inputs in a file or in standard input, a dict each with `input`.

    A line of plain text is an input; a JSON object must have a text `input`, and where it is a
    record its `label` and `rationale` come along as `label` and `teacher_rationale`. Blank lines
    are skipped. With a split, every line must be an object, and those of this split are taken.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected UTF-8 text") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        if not line.startswith("{"):
            if split is not None:
                raise InputError(
                    f"{path}:{number}: plain text has no split; expected records, or no --split"
                )
            rows.append({"input": line})
            continue
        try:
            found = strict_json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(found.get("input"), str):
            raise InputError(f"{path}:{number}: expected a JSON object with a text `input`")
        if split is None or found.get("split") == split:
            renamed = {"label": "label", "rationale": "teacher_rationale"}
            known = {new: found[old] for old, new in renamed.items() if found.get(old)}
            rows.append({"input": found["input"]} | known)
    if not rows:
        where = f" in split {split!r}" if split else ""
        raise InputError(f"{path}: has no input{where}; expected one a line")
    return rows
