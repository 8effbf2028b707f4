"""`dslt extract`: problems and a teacher's completions → records.jsonl."""

import argparse
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path

from dslt import strict_json
from dslt.commands.arguments import add_command, fields_of, natural, positive, require
from dslt.errors import InputError
from dslt.signals import INTERRUPTED
from dslt.terminal import printable

KINDS = ("scripted", "released", "endpoint")  # of teachers
# What an entry of a --teachers file may say; what it leaves out is as the flags have it.
TEACHER_FIELDS = (
    "name", "teacher", "weight", "samples", "model", "prompt", "mode", "temperature", "max_tokens",
    "sampling_seed", "extra_body", "base_url", "api_key_env", "samples_per_request", "mistake_rate",
    "wording",
)  # fmt: skip


def add(commands) -> None:
    command = add_command(commands, "extract", extract, "turn problems and explanations to records")
    command.add_argument(
        "--dataset",
        required=True,
        help="facts, choice, sums (embedded); svamp, cqa, esnli, anli1 (released layout or TFDS); "
        "or a name for your own table",
    )
    command.add_argument("--teacher", default="none", choices=("none", *KINDS))
    command.add_argument("--output_dir", required=True, help="where records.jsonl goes")
    add_problem_flags(command)
    for add_flags in TEACHER_FLAGS:
        add_flags(command)


def add_problem_flags(command) -> None:
    command.add_argument("--data_dir", help="the released layout's directory, or TFDS's")
    command.add_argument("--tfds", action="store_true", help="read the problems through tfds.load")
    command.add_argument("--seed", type=natural, default=0, help="of problems and held-out rows")
    command.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        help="of train, held out where a dataset has no validation split",
    )

    embedded = command.add_argument_group("embedded problems")
    embedded.add_argument("--train", type=int, default=2000, metavar="EXAMPLES")
    embedded.add_argument("--validation", type=int, default=300, metavar="EXAMPLES")
    embedded.add_argument("--test", type=int, default=600, metavar="EXAMPLES")
    embedded.add_argument("--facts", type=int, default=3, help="stated a problem, for `facts`")

    table = command.add_argument_group("your own JSONL or CSV table")
    table.add_argument("--input_file", help="a .jsonl, .json or .csv file")
    table.add_argument("--input_column", action="append", default=[], help="may be repeated")
    table.add_argument("--label_column")
    table.add_argument(
        "--rationale_column", help="explanations that the table already has; without a teacher"
    )
    table.add_argument("--id_column")
    table.add_argument("--split_column", help="train, validation or test in each row")
    table.add_argument("--answer_form", default="text", choices=("text", "equation"))


def add_scripted_flags(command) -> None:
    group = command.add_argument_group("the scripted teacher, of embedded problems")
    group.add_argument(
        "--mistake_rate", type=float, default=0.0, help="share of problems that it misreads"
    )
    group.add_argument("--wording", type=int, default=0, help="0 or 1; --samples alternate")


def add_endpoint_flags(command) -> None:
    group = command.add_argument_group("the endpoint teacher: any OpenAI-compatible server")
    group.add_argument("--model", help="as the endpoint calls it")
    group.add_argument("--base_url", help="such as http://localhost:8000/v1; without it OpenAI's")
    group.add_argument(
        "--api_key_env", default="OPENAI_API_KEY", help="the environment variable with the key"
    )
    group.add_argument(
        "--prompt", help="nli, choice, equation, generic, or a .toml file; without it the dataset's"
    )
    group.add_argument("--label", action="append", default=[], help="of your label set; repeatable")
    group.add_argument("--mode", default="chat", choices=("chat", "completion"))
    group.add_argument("--temperature", type=float, default=0.7, help="below 0: the endpoint's own")
    group.add_argument("--max_tokens", type=natural, default=512, help="0: the endpoint's own")
    group.add_argument("--sampling_seed", type=int, help="sample i gets the seed plus i")
    group.add_argument("--extra_body", help="JSON: more fields of a request; null takes one out")
    group.add_argument("--samples", type=positive, default=1, help="answers a problem")
    group.add_argument(
        "--samples_per_request", type=positive, default=1, help="where the endpoint knows `n`"
    )
    group.add_argument("--name", help="of the teacher, in the records; without it the model's")
    group.add_argument("--weight", type=float, default=1.0, help="of its votes and rationales")
    group.add_argument(
        "--teachers",
        metavar="FILE",
        help="several teachers side by side: a JSON list of objects with "
        f"{', '.join(TEACHER_FIELDS)}; what one leaves out is as the flags have it",
    )


def add_asking_flags(command) -> None:
    group = command.add_argument_group("asking")
    group.add_argument("--concurrency", type=positive, default=16, help="requests under way")
    group.add_argument("--requests_per_minute", type=float)
    group.add_argument("--tokens_per_minute", type=float)
    group.add_argument("--timeout_secs", type=float, default=120.0, help="of one attempt")
    group.add_argument("--max_attempts", type=positive, default=8, help="of one request")
    group.add_argument("--price_input", type=float, default=0.0, help="of a million tokens")
    group.add_argument("--price_output", type=float, default=0.0, help="of a million tokens")
    group.add_argument(
        "--dry_run", action="store_true", help="show prompts, requests, tokens, cost; send nothing"
    )
    group.add_argument(
        "--offline", action="store_true", help="send nothing: parse and filter what is stored"
    )
    group.add_argument("--limit", type=positive, help="ask about the first so many examples alone")
    group.add_argument(
        "--ask_split", action="append", choices=("train", "validation", "test"), help="repeatable"
    )
    group.add_argument("--write_batch", metavar="FILE", help="write the requests for a batch job")
    group.add_argument(
        "--read_batch", action="append", default=[], metavar="FILE", help="a batch job's results"
    )
    group.add_argument("--shard", metavar="I/N", help="ask the I-th of N parts of the examples")
    group.add_argument(
        "--merge_from",
        action="append",
        default=[],
        metavar="DIR",
        help="join a shard's output directory; all must be there",
    )


def add_filter_flags(command) -> None:
    group = command.add_argument_group("which explanations are kept")
    group.add_argument(
        "--keep",
        default="majority",
        choices=("legal", "majority", "gold"),
        help="those of every legal answer, of the majority's, or of the gold one",
    )
    group.add_argument(
        "--retry_with_hint",
        action="store_true",
        help="ask once more, with the gold answer as a hint, where all answers to a train example "
        "are wrong",
    )
    group.add_argument(
        "--max_rationales", type=positive, default=1, help="of one teacher an example"
    )
    group.add_argument("--min_words", type=positive, help="of a rationale")
    group.add_argument("--max_words", type=positive, help="of a rationale")
    group.add_argument(
        "--max_similarity", type=float, default=1.0, help="of two rationales of an example, 0 to 1"
    )
    group.add_argument(
        "--max_question_overlap", type=float, help="share of a rationale found in the question"
    )


# What says nothing without a teacher.
TEACHER_FLAGS = (add_scripted_flags, add_endpoint_flags, add_asking_flags, add_filter_flags)
# Of these what not every kind of teacher uses, and the kinds that do.
USED_BY = {
    **dict.fromkeys(("mistake_rate", "wording"), ("scripted",)),
    "samples": ("scripted", "endpoint"),
    **dict.fromkeys(
        (
            "model", "prompt", "label", "mode", "temperature", "max_tokens", "sampling_seed",
            "extra_body", "base_url", "api_key_env", "samples_per_request", "concurrency",
            "requests_per_minute", "tokens_per_minute", "timeout_secs", "max_attempts",
            "price_input", "price_output", "write_batch", "read_batch", "retry_with_hint",
        ),
        ("endpoint",),
    ),
}  # fmt: skip
# Sources of problems, and what asks for each.
SOURCES = {
    "table": "--input_file",
    "embedded": "an embedded dataset",
    "TFDS": "a dataset of TFDS",
    "released": "one of the released layout",
}
# Of the problems' flags what not every source uses, and those that do.
READ_BY = {
    "data_dir": ("TFDS", "released"),
    "tfds": ("TFDS",),
    "validation_fraction": ("table", "TFDS", "released"),
    **dict.fromkeys(("train", "validation", "test", "facts"), ("embedded",)),
    **dict.fromkeys(
        (
            "input_file", "input_column", "label_column", "rationale_column", "id_column",
            "split_column", "answer_form",
        ),
        ("table",),
    ),
}  # fmt: skip
# With one of these nothing is sent.
SILENT_FLAGS = ("offline", "merge_from", "write_batch", "read_batch")


def extract(args) -> int | None:
    """Asks what is not answered yet, writes the records, and prints what became of everything."""
    is_unexplained = args.teacher == "none" and not args.teachers
    changed = changed_flags(args, TEACHER_FLAGS)
    if is_unexplained and changed:
        raise InputError(
            f"{', '.join(changed)} given, but no teacher; expected --teacher endpoint, scripted or "
            "released with it"
        )
    entries = teacher_entries(args)
    refuse_idle(args, changed, entries)
    if args.rationale_column and not is_unexplained:
        raise InputError(
            f"--rationale_column is {args.rationale_column!r} beside a teacher, whose rationales "
            "would replace the table's; expected one of the two, so leave --rationale_column or "
            "the teacher out"
        )
    refuse_unread(args, entries)
    if args.tfds:
        from dslt.data.datasets import DATASET_OF_TFDS_NAME

        args.dataset = DATASET_OF_TFDS_NAME.get(args.dataset, args.dataset)
    examples = read_problems(args)
    if is_unexplained:
        print(write_unexplained(examples, args.output_dir))
        return 0
    return ask(args, examples, entries)


def changed_flags(args, groups: Iterable[Callable]) -> list[str]:
    """Those of the flags which `groups` add that are not at their defaults."""
    parser = argparse.ArgumentParser()
    for add_flags in groups:
        add_flags(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name}" for name, value in defaults.items() if getattr(args, name) != value]


def teacher_entries(args) -> list[dict]:
    """What a --teachers file says of each teacher; without one, nothing of the one teacher that the
    flags describe."""
    if not args.teachers:
        return [{}]
    from dslt.teacher.panel import read_teachers

    return read_teachers(args.teachers, TEACHER_FIELDS)


def refuse_idle(args, changed: Sequence[str], entries: Sequence[dict]) -> None:
    """Raises InputError where a flag says nothing to any of the teachers, or a field of a
    --teachers file nothing to its own."""
    kinds = [entry.get("teacher", args.teacher) for entry in entries]
    if not set(kinds) <= set(KINDS):
        return  # `make_teacher` says so
    check_used(changed, set(kinds), "the command line")
    for number, (kind, entry) in enumerate(zip(kinds, entries, strict=True)):
        check_used(entry, {kind}, f"{args.teachers}: teacher {number}")


def check_used(names: Iterable[str], kinds: set[str], place: str) -> None:
    """Raises InputError where none of the kinds of teacher uses one of the names."""
    idle, able = find_idle(names, USED_BY, kinds, KINDS)
    if idle:
        wanted = f"expected teacher {' or '.join(able)} beside them, or " if able else ""
        raise InputError(
            f"{place}: found {', '.join(idle)}, but a {' or '.join(sorted(kinds))} teacher does "
            f"not use them; {wanted}leave them out"
        )


def refuse_unread(args, entries: Sequence[dict]) -> None:
    """Raises InputError where a flag says nothing to the source of the problems."""
    source = source_of(args)
    changed = changed_flags(args, [add_problem_flags])
    if any(entry.get("teacher", args.teacher) == "released" for entry in entries):
        changed = [flag for flag in changed if flag != "--data_dir"]  # the completions' place
    idle, able = find_idle(changed, READ_BY, {source}, SOURCES)
    if idle:
        wanted = f"expected {' or '.join(SOURCES[each] for each in able)} with them, or "
        raise InputError(
            f"found {', '.join(idle)}, but the problems of dataset {args.dataset!r} are {source} "
            f"ones, which do not use them; {wanted if able else ''}leave them out"
        )


def find_idle(
    names: Iterable[str], used_by: Mapping, found: Set[str], every: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The names that none of `found` uses, and who of `every` would use all of those.

    Args:
      used_by: the users of a name, without its dashes; it has those that not `every` one uses.
    """
    users = {name: used_by.get(name.removeprefix("--"), every) for name in names}
    idle = [name for name, able in users.items() if found.isdisjoint(able)]
    return idle, [each for each in every if all(each in users[name] for name in idle)]


def ask(args, examples: list, entries: list[dict]) -> int:
    """Asks the teachers what is not answered yet, and writes the records of what they said."""
    from dslt.teacher import extract as extraction
    from dslt.teacher import shards
    from dslt.teacher.batch_files import write_batch
    from dslt.teacher.questions import is_in_shard, to_requests
    from dslt.teacher.store import CompletionStore

    if args.shard:
        shard = shards.parse_shard(args.shard)
        examples = [example for example in examples if is_in_shard(example, shard)]
    rows = [
        row for row, e in enumerate(examples) if not args.ask_split or e.split in args.ask_split
    ][: args.limit]
    teachers = [
        make_teacher(argparse.Namespace(**vars(args) | entry), examples) for entry in entries
    ]
    config, filters = ask_config(args), filter_config(args)
    if args.dry_run:
        questions = extraction.plan_all(examples, rows, teachers)
        print(printable(describe_dry_run(args, examples, questions, config.prices)))
        return 0
    silent = [f"--{flag}" for flag in SILENT_FLAGS if getattr(args, flag)]
    with CompletionStore(args.output_dir) as store:
        say_what_was_found(store)
        for directory, answers in shards.merge_stores(store, args.merge_from).items():
            print(f"{directory}: {answers:,} answers")
        if args.read_batch:
            print(take_in_batches(args, examples, rows, teachers, store))
        questions, stats = extraction.ask_teachers(
            examples, rows, teachers, store, None if silent else config, args.retry_with_hint
        )
        if stats.attempts:
            print(extraction.format_stats(stats))
        unanswered = extraction.pending(questions, store.answers)
        if stats.is_interrupted:
            print(
                f"stopped; {len(unanswered):,} of {len(questions):,} questions have no answer "
                "yet. The same command goes on"
            )
            return INTERRUPTED
        if args.write_batch:
            paths = write_batch(to_requests(unanswered), args.write_batch)
            print(f"{len(unanswered):,} requests: {', '.join(map(str, paths))}")
            return 0
        if args.merge_from:
            shards.check_complete(questions, store, [example.id for example in examples])
        without = f" without {', '.join(silent)}" if silent else ""
        if questions and len(unanswered) == len(questions):
            raise InputError(
                f"{describe_silence(questions, store)}. No records are written, and those that are "
                f"there stay; look at the endpoint, then start the same command{without} again"
            )
        summary = extraction.write_extraction(examples, rows, questions, store, filters)
    print(printable(extraction.format_summary(summary, config.prices)))
    if unanswered:
        print(
            f"{len(unanswered):,} questions have no answer; the same command{without} asks them "
            "again"
        )
    print(f"records: {summary.records_path}")
    return 0


def describe_silence(questions: list, store) -> str:
    """That not one question has an answer, with the most frequent cause."""
    causes = collections.Counter(store.failures.get(q.key, "not asked") for q in questions)
    cause, count = causes.most_common(1)[0]
    return (
        f"{store.directory}: none of {len(questions):,} questions has an answer; {cause}: {count:,}"
    )


def describe_dry_run(args, examples, questions, prices) -> str:
    """What would be asked, and what it would cost; what is answered already is not asked."""
    from dslt.teacher import estimate
    from dslt.teacher.extract import pending, plan_hinted
    from dslt.teacher.store import CompletionStore, has_store

    answers = {}
    if has_store(args.output_dir):
        with CompletionStore(args.output_dir) as store:
            answers = store.answers
    asked, possible = pending(questions, answers), []
    if args.retry_with_hint:
        open_rows = {(question.teacher.name, question.row) for question in asked}
        hinted = plan_hinted(examples, questions, answers, is_bound=True)
        for question in pending(hinted, answers):
            is_open = (question.teacher.name, question.row) in open_rows
            (possible if is_open else asked).append(question)
    return estimate.describe_run(examples, asked, possible, prices)


def take_in_batches(args, examples, rows, teachers, store) -> str:
    """Stores the answers of --read_batch files, and says how many were new."""
    from dslt.teacher.batch_files import read_batch
    from dslt.teacher.extract import plan_all, plan_hinted

    planned = plan_all(examples, rows, teachers)
    if args.retry_with_hint:
        planned += plan_hinted(examples, planned, store.answers)
    results = read_batch(args.read_batch, store, {question.key for question in planned})
    unused = ", ".join(f"{cause} {count:,}" for cause, count in results.unused.items())
    return f"batch results: {results.answers:,} new answers; not used: {unused or 'none'}"


def say_what_was_found(store) -> None:
    """Says what an earlier run left, so that nobody wonders what is paid again."""
    if store.answers:
        print(f"{store.directory}: {len(store.answers):,} answers are there and are not asked for")
    if store.torn_bytes:
        print(f"{store.path}: cut {store.torn_bytes} bytes of a half-written last line")
    if store.in_flight:
        print(f"{len(store.in_flight):,} requests were under way when the last run was killed")


def make_teacher(args, examples: list):
    """One teacher of the kind that `args.teacher` names."""
    from dslt.teacher import scripted
    from dslt.teacher.prompts import load_prompt, prompt_of
    from dslt.teacher.questions import EndpointTeacher, LocalTeacher
    from dslt.teacher.released import read_completions

    shared = {"weight": args.weight, "samples": args.samples}
    if args.teacher == "scripted":
        return LocalTeacher(
            args.name or "scripted",
            **shared,
            complete=lambda example, sample: scripted.complete(
                example,
                mistake_rate=args.mistake_rate,
                seed=args.seed + sample,
                wording=args.wording + sample,
            ),
        )
    if args.teacher == "released":
        if args.shard:
            raise InputError(
                f"--shard is {args.shard}, but the released completions are found by their rows, "
                "all of them, and nobody is asked; expected --teacher released without --shard"
            )
        completions = read_completions(require(args, "data_dir"), examples)
        return LocalTeacher(
            args.name or "released",
            **shared | {"samples": 1},
            complete=lambda example, sample: completions.get(example.id),
        )
    if args.teacher != "endpoint":
        raise InputError(f"teacher is {args.teacher!r}; expected endpoint, scripted or released")
    model = require(args, "model")
    try:
        extra_body = strict_json.loads(args.extra_body or "{}")
    except ValueError as error:
        raise InputError(f"--extra_body is no JSON ({error}); expected an object") from None
    if not isinstance(extra_body, dict):
        raise InputError(f"--extra_body is {args.extra_body}; expected a JSON object")
    return EndpointTeacher(
        args.name or model,
        **shared,
        model=model,
        prompt=load_prompt(args.prompt or prompt_of(args.dataset), args.label),
        mode=args.mode,
        temperature=None if args.temperature < 0 else args.temperature,
        max_tokens=args.max_tokens or None,
        seed=args.sampling_seed,
        extra_body=extra_body,
        base_url=args.base_url,
        api_key_env=args.api_key_env,
        samples_per_request=1 if args.write_batch else args.samples_per_request,
    )


def ask_config(args):
    from dslt.teacher.endpoint import AskConfig, Prices

    prices = Prices(args.price_input, args.price_output)
    return AskConfig(**fields_of(args, AskConfig), prices=prices)


def filter_config(args):
    from dslt.teacher.filters import FilterConfig

    return FilterConfig(**fields_of(args, FilterConfig))


def source_of(args) -> str:
    """Which of SOURCES has the problems that the command line names."""
    from dslt.data.embedded import FAMILIES

    if args.input_file:
        return "table"
    if args.dataset in FAMILIES:
        return "embedded"
    return "TFDS" if args.tfds else "released"


def read_problems(args) -> list:
    """The examples that the command line names, with a validation split if there is a train one."""
    from dslt.data import datasets, embedded

    source = source_of(args)
    if source == "table":
        examples = datasets.read_table(
            args.input_file,
            args.dataset,
            input_columns=args.input_column,
            label_column=args.label_column,
            rationale_column=args.rationale_column,
            id_column=args.id_column,
            split_column=args.split_column,
            answer_form=args.answer_form,
        )
    elif source == "embedded":
        return embedded.generate(
            args.dataset,
            train=args.train,
            validation=args.validation,
            test=args.test,
            seed=args.seed,
            facts=args.facts,
        )
    elif source == "TFDS":
        examples = datasets.read_tfds(args.dataset, args.data_dir)
    elif args.data_dir:
        examples = datasets.read_released(args.data_dir, args.dataset)
    else:
        raise InputError(
            f"dataset {args.dataset!r} is not embedded ({', '.join(embedded.FAMILIES)}); expected "
            "--data_dir with the released layout, --tfds, or --input_file with a table of yours"
        )
    return datasets.hold_out_validation(examples, fraction=args.validation_fraction, seed=args.seed)


def write_unexplained(examples: list, output_dir: str) -> str:
    """Writes records that keep what explanations the table has; no teacher is asked."""
    from dslt.teacher.extract import RECORDS, write_records

    path = Path(output_dir) / RECORDS
    set_aside = write_records(path, examples)
    explained = sum(example.rationale is not None for example in examples)
    moved = f"\nthe records that were here before are now {set_aside}" if set_aside else ""
    return f"{len(examples):,} examples, {explained:,} with a rationale{moved}\nrecords: {path}"
