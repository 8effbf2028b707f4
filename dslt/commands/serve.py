"""`dslt serve`: a student behind HTTP."""

import argparse
import ipaddress
import sys

from dslt.commands.arguments import add_command, add_student_flag, fields_of, positive
from dslt.commands.remote import local_student
from dslt.commands.students import make_answer_sets, student_files
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(commands, "serve", serve, "answer over HTTP, with a page to try it")
    add_student_flag(command)
    command.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    command.add_argument("--port", type=port, default=8080, help="0 takes a free one")
    given = {"default": argparse.SUPPRESS}  # the defaults are ServeConfig's
    command.add_argument("--rows", type=positive, help="decoded at a time", **given)
    command.add_argument(
        "--max_queue", type=positive, help="labels and rationales that may wait", **given
    )
    command.add_argument("--max_inputs", type=positive, help="in a request", **given)
    command.add_argument("--max_bytes", type=positive, help="of a request", **given)
    command.add_argument("--max_label_length", type=positive, metavar="TOKENS", **given)
    command.add_argument("--max_rationale_length", type=positive, metavar="TOKENS", **given)
    command.add_argument(
        "--answers",
        choices=("open", "likelihood"),
        help="any text; or a set's most likely, with its probability in the set",
        **given,
    )
    command.add_argument(
        "--label",
        action="append",
        dest="labels",
        help="of the set, repeatable; without any an input's own `Answer Choices:`",
        **given,
    )


def serve(args) -> None:
    """Listens until it is told to stop."""
    try:
        from dslt import serve as http
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; `dslt serve` needs pip install 'dslt[serve]'"
        ) from None
    from dslt.data.target_layout import LABEL
    from dslt.data.vocabulary import check_embedded, load_vocabulary
    from dslt.evaluate import EvalConfig
    from dslt.serve_engine import Engine, ServeConfig

    given = fields_of(args, ServeConfig)
    if "labels" in given:
        given |= {"labels": tuple(args.labels), "answers": given.get("answers", "likelihood")}
    config = ServeConfig(**given)
    path = local_student(args.student)
    format, vocabulary_path = student_files(path)
    vocabulary = load_vocabulary(vocabulary_path)
    if format.target_layout != LABEL:
        raise InputError(
            f"{path}: was trained with target_layout {format.target_layout!r}, label and rationale "
            "in one text; `dslt serve` expects a student of two tasks. `dslt predict` answers"
        )
    choice = EvalConfig(
        answers=config.answers, labels=config.labels, max_label_length=config.max_label_length
    )

    def answers_of(text: str):
        return make_answer_sets([("the input", text)], choice, vocabulary, is_strict=True)[0]

    is_open = config.answers == "open"
    if config.labels:
        answers_of("")  # a label that cannot be answered is said now
    engine = Engine(
        path, format, vocabulary.encode, vocabulary.decode, config, None if is_open else answers_of
    )
    check_embedded(vocabulary, vocabulary_path, engine.model_config.vocab_size, path)
    if not is_loopback(args.host):
        print(
            f"warning: {args.host} can be reached from other machines: whoever reaches it may ask "
            "the student, unencrypted and without a password. Put a proxy before it that asks for "
            "both, or leave --host at 127.0.0.1",
            file=sys.stderr,
        )
    http.serve(http.make_app(engine, path.name), args.host, args.port, config.stop_secs)


def port(text: str) -> int:
    """An argparse type: 0 to 65535."""
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"found {text}; expected 0 to 65535")
    return value


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
