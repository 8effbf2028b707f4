"""`dslt extract`: problems and a teacher's completions → records.jsonl."""

from pathlib import Path

from dslt.commands.arguments import add_command, require
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(commands, "extract", extract, "turn problems and explanations to records")
    command.add_argument(
        "--dataset",
        required=True,
        help="facts, choice, sums (embedded); svamp, cqa, esnli, anli1 (released layout or TFDS); "
        "or a name for your own table",
    )
    command.add_argument("--teacher", default="none", choices=("none", "scripted", "released"))
    command.add_argument("--output_dir", required=True, help="where records.jsonl goes")
    command.add_argument("--data_dir", help="the released layout's directory, or TFDS's")
    command.add_argument("--tfds", action="store_true", help="read the problems through tfds.load")
    command.add_argument("--seed", type=int, default=0, help="of problems and held-out rows")
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
    embedded.add_argument("--mistake_rate", type=float, default=0.0, help="of the scripted teacher")

    table = command.add_argument_group("your own JSONL or CSV table")
    table.add_argument("--input_file", help="a .jsonl, .json or .csv file")
    table.add_argument("--input_column", action="append", default=[], help="may be repeated")
    table.add_argument("--label_column")
    table.add_argument("--rationale_column", help="explanations that the table already has")
    table.add_argument("--id_column")
    table.add_argument("--split_column", help="train, validation or test in each row")
    table.add_argument("--answer_form", default="text", choices=("text", "equation"))


def extract(args) -> None:
    """Writes records.jsonl, what was rejected and why, and a summary; prints the summary."""
    from dslt.teacher import extract as extraction

    examples = read_problems(args)
    if args.teacher == "none":
        summary = write_unexplained(examples, args.output_dir)
        print(summary)
        return
    if args.teacher == "scripted":
        from dslt.teacher import scripted

        completions = {
            example.id: scripted.complete(example, mistake_rate=args.mistake_rate, seed=args.seed)
            for example in examples
        }
    else:
        from dslt.teacher.released import read_completions

        completions = read_completions(require(args, "data_dir"), examples)
    summary = extraction.extract(
        examples, completions, teacher=args.teacher, prompt=None, output_dir=args.output_dir
    )
    print(extraction.format_summary(summary))
    print(f"records: {summary.records_path}")


def read_problems(args) -> list:
    """The examples that the command line names, with a validation split if there is a train one."""
    from dslt.data import datasets, embedded

    if args.input_file:
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
    elif args.dataset in embedded.FAMILIES:
        return embedded.generate(
            args.dataset,
            train=args.train,
            validation=args.validation,
            test=args.test,
            seed=args.seed,
            facts=args.facts,
        )
    elif args.tfds:
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
    from dslt.teacher.extract import write_records

    path = Path(output_dir) / "records.jsonl"
    write_records(path, examples)
    explained = sum(example.rationale is not None for example in examples)
    return f"{len(examples):,} examples, {explained:,} with a rationale\nrecords: {path}"
