"""The `dslt` command: the only file that knows argv. It joins the wings, and imports lazily.

dslt extract --dataset facts --teacher scripted --output_dir runs/facts/records
dslt train runs/step_by_step.gin settings/facts.gin --run_dir runs/facts/step_by_step
dslt evaluate --run_dir runs/facts/step_by_step --follow
dslt export --student runs/facts/step_by_step --output_dir runs/facts/student
dslt predict --student runs/facts/student --rationales problems.txt
dslt plan runs/step_by_step.gin settings/paper.gin --topology v5e:2x4
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence

from dslt import __version__
from dslt.errors import InputError

INTERRUPTED = 130  # as a shell has it for SIGINT
STRATEGY_FLAGS = {  # what of `dslt predict` says nothing to another strategy
    "sample": ("temperature", "top_k", "top_p", "seed"),
    "beam": ("num_beams", "length_penalty", "early_stopping"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status.

    That is 0, 2 where the input cannot be used, or INTERRUPTED where a signal ended it early.
    """
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow looks for GPUs, and says so
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"dslt {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dslt predict … | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a missing right, a file where a directory should be
        print(f"dslt {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subparser a stage."""
    parser = argparse.ArgumentParser(
        prog="dslt",
        description="Distilling Step-by-Step for T5 on JAX: records → train → evaluate → export.",
    )
    parser.add_argument("--version", action="version", version=f"dslt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    stages = (add_extract, add_train, add_evaluate, add_predict, add_export, add_import)
    for add in (*stages, add_bench, add_plan):
        add(commands)
    return parser


def add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    """A subcommand whose help begins with `text`."""
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


# ---------------------------------------------------------------------------------------------
# extract: problems and a teacher's completions → records.jsonl


def add_extract(commands) -> None:
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
    from pathlib import Path

    from dslt.teacher.extract import write_records

    path = Path(output_dir) / "records.jsonl"
    write_records(path, examples)
    explained = sum(example.rationale is not None for example in examples)
    return f"{len(examples):,} examples, {explained:,} with a rationale\nrecords: {path}"


# ---------------------------------------------------------------------------------------------
# train


def add_train(commands) -> None:
    command = add_command(commands, "train", train, "train a student, or go on with its training")
    command.add_argument("gin_files", nargs="+", help="later files override earlier ones")
    command.add_argument("--run_dir", required=True, help="made, or resumed if it is this run's")
    add_gin_flag(command)


def train(args) -> int:
    """Checks the configs, opens the data, says what will happen, and trains."""
    from pathlib import Path

    from dslt import config
    from dslt.train import train as run_training
    from dslt.workdir import RunDir

    configs = config.parse(args.gin_files, args.gin)
    run = RunDir(Path(args.run_dir))
    config.check_run(run, configs)
    stream, vocabulary = open_train_stream(run, configs)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(configs.text, encoding="utf-8")
    describe_run(run, configs, stream, vocabulary)
    run_training(
        configs.train,
        configs.model,
        configs.optimizer,
        configs.mesh,
        batches_from=stream.batches,
        run=run,
    )
    if stream.left_out:
        print(f"warning: {stream.left_out} examples found no room in an epoch and were left out")
    return 0 if run.state() == "finished" else INTERRUPTED


def open_train_stream(run, configs) -> tuple:
    """The batches of a run and its vocabulary, which is copied into the run's directory."""
    from dslt.data.pipeline import TrainStream, make_vocabulary
    from dslt.data.vocabulary import load_vocabulary

    if run.has_checkpoints():
        vocabulary = load_vocabulary(run.vocabulary)
    else:
        vocabulary = make_vocabulary(configs.data, run.vocabulary)
    if vocabulary.size > configs.model.vocab_size:
        raise InputError(
            f"the vocabulary {configs.data.vocabulary!r} has {vocabulary.size:,} ids, but "
            f"t5.T5Config.vocab_size is {configs.model.vocab_size:,}; expected at least as many"
        )
    stream = TrainStream(
        configs.data,
        vocabulary,
        seed=configs.train.seed,
        use_rationales=configs.train.rationale_weight > 0,
    )
    if run.has_checkpoints():
        check_same_data(run, stream, vocabulary)
    return stream, vocabulary


def check_same_data(run, stream, vocabulary) -> None:
    """Raises InputError where a run would resume on other records or another vocabulary."""
    from dslt.workdir import read_json

    found = read_json(run.info)
    expected = {"vocabulary_digest": vocabulary.digest, "records": stream.records_digests}
    for name, value in expected.items():
        if found.get(name) != value:
            raise InputError(
                f"{run.info}: {name} is {found.get(name)}, but now it is {value}; the data changed "
                "since this run began. Restore it, or choose another --run_dir"
            )


def describe_run(run, configs, stream, vocabulary) -> None:
    """Prints devices, model, data and one example of each role; records what the run depends on."""
    import jax

    from dslt import workdir
    from dslt.core import t5

    devices = jax.devices()
    num_params = t5.count_params(t5.abstract_params(configs.model)[1])
    print(configs.text)
    print(f"devices     {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    print(f"model       {num_params:,} parameters, {configs.model.dtype} activations")
    for line in stream.report():
        print(f"data        {line}")
    for role, source, target in first_of_each_role(stream.batch(0)):
        print(f"{role:<11} {vocabulary.decode(source)!r} -> {vocabulary.decode(target)!r}")
    data = configs.data
    workdir.StudentFormat(
        input_prefix_label=data.input_prefix_label,
        input_prefix_rationale=data.input_prefix_rationale,
        max_input_length=data.max_input_length,
        max_target_length=data.max_target_length,
        rationale_start_id=data.rationale_start_id,
    ).write(run.student)
    run.update_info(
        state="running",
        seed=configs.train.seed,
        rationale_weight=configs.train.rationale_weight,
        num_params=num_params,
        devices=f"{len(devices)} x {devices[0].device_kind}",
        vocabulary_digest=vocabulary.digest,
        records=stream.records_digests,
        **workdir.environment(),
    )


def first_of_each_role(batch) -> list[tuple[str, list[int], list[int]]]:
    """The name, source and target tokens of a batch's first segment of each role it has."""
    import numpy as np

    from dslt.core.batch import ROLE_LABEL, ROLE_RATIONALE

    found = []
    for name, role in (("label", ROLE_LABEL), ("rationale", ROLE_RATIONALE)):
        places = np.argwhere(batch.decoder_loss_roles == role)
        if len(places):
            row, column = places[0]
            segment = batch.decoder_segment_ids[row, column]
            source = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == segment]
            is_target = (batch.decoder_segment_ids[row] == segment) & (
                batch.decoder_loss_roles[row] == role
            )
            target = batch.decoder_target_tokens[row][is_target]
            found.append((name, source.tolist(), target.tolist()))
    return found


# ---------------------------------------------------------------------------------------------
# evaluate: follows a run's checkpoints, or judges a predictions file again


def add_evaluate(commands) -> None:
    command = add_command(commands, "evaluate", evaluate, "judge checkpoints, or predictions again")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", help="judges its checkpoints that were not judged yet")
    source.add_argument("--predictions", help="a predictions.jsonl to score again, without a model")
    command.add_argument("--follow", action="store_true", help="until training has ended")
    command.add_argument(
        "--step", type=int, action="append", help="this checkpoint, again if need be; repeatable"
    )
    add_gin_flag(command)


def evaluate(args) -> None:
    """Prints a line a checkpoint and which is the best on validation."""
    from pathlib import Path

    from dslt import evaluate as judge

    if args.predictions:
        print(judge.describe(judge.rescore(Path(args.predictions))))
        return
    from dslt import config
    from dslt.data.pipeline import count_splits, eval_inputs
    from dslt.data.vocabulary import load_vocabulary
    from dslt.workdir import RunDir

    run = RunDir(Path(args.run_dir))
    if args.follow:
        judge.wait_for_start(run)
    if not run.config.exists():
        raise InputError(f"{run.path}: has no config.gin; expected a directory of `dslt train`")
    configs = config.parse([str(run.config)], args.gin)
    vocabulary = load_vocabulary(run.vocabulary)
    counts = count_splits(configs.data)
    splits = [split for split in configs.evaluate.splits if counts[split]]
    for split in configs.evaluate.splits:
        if split not in splits:
            print(f"warning: no example is in split {split!r}")
    examples = [
        example
        for split in splits or configs.evaluate.splits
        for example in eval_inputs(configs.data, split, vocabulary)
    ]
    truncated = sum(example.is_truncated for example in examples)
    if truncated:
        print(f"warning: {truncated} of {len(examples)} inputs are cut to max_input_length")
    answer_sets = None
    if configs.evaluate.answers != "open":
        answer_sets = make_answer_sets(
            [(f"example {e.example.id!r}", e.example.input) for e in examples],
            configs.evaluate,
            vocabulary,
        )
    rows = judge.evaluate_run(
        run,
        configs.evaluate,
        configs.mesh,
        examples=examples,
        decode_text=vocabulary.decode,
        rationale_start_id=configs.data.rationale_start_id,
        answer_sets=answer_sets,
        follow=args.follow,
        steps=args.step,
    )
    best = judge.best_row(rows)
    if best is None:
        print("No validation split: no best checkpoint was chosen.")
    else:
        print(f"best on validation: {judge.describe(best)}")
        print(f"predictions: {run.evaluation(best['step']) / 'predictions.jsonl'}")


def make_answer_sets(inputs: Sequence[tuple[str, str]], config, vocabulary) -> list:
    """What each input may be answered with: the config's labels, or the choices that it lists.

    Of texts that are the same tokens to the student, the first stands for all.

    Args:
      inputs: how an error calls each, and its text.

    Raises:
      InputError: an input has no answers to choose from, or an answer is too long.
    """
    from dslt.core.batch import EOS_ID
    from dslt.evaluate import AnswerSet
    from dslt.teacher.parse import choices_in

    sets: dict[tuple[str, ...], AnswerSet] = {}
    chosen = []
    for name, text in inputs:
        texts = tuple(dict.fromkeys(config.labels or choices_in(text)))
        if not texts:
            raise InputError(
                f"{name}: answers is {config.answers!r}, but its text lists no `Answer Choices:`; "
                "give the labels to choose from, or let answers be 'open'"
            )
        if texts not in sets:
            text_of: dict[tuple[int, ...], str] = {}
            for answer in texts:
                ids = (*vocabulary.encode(answer), EOS_ID)
                text_of.setdefault(ids, answer)
                if len(ids) > config.max_label_length:
                    raise InputError(
                        f"{name}: the answer {answer!r} has {len(ids)} tokens; expected at most "
                        f"max_label_length = {config.max_label_length}"
                    )
            sets[texts] = AnswerSet(tuple(text_of.values()), tuple(text_of))
        chosen.append(sets[texts])
    return chosen


# ---------------------------------------------------------------------------------------------
# predict, export, import: a student at work


def add_predict(commands) -> None:
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
    command.add_argument("--max_rationale_length", type=positive, default=256, metavar="TOKENS")

    given = {"default": argparse.SUPPRESS}  # the defaults are EvalConfig's
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
    from pathlib import Path

    from dslt import evaluate as judge
    from dslt.core.sharding import MeshConfig
    from dslt.data.vocabulary import encode_with_eos, load_vocabulary

    fields = {field.name for field in dataclasses.fields(judge.EvalConfig)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    if "labels" in given:
        given |= {"labels": tuple(args.labels), "answers": given.get("answers", "likelihood")}
    config = judge.EvalConfig(**given)
    for strategy, flags in STRATEGY_FLAGS.items():
        idle = [f"--{flag}" for flag in flags if flag in given and strategy != config.strategy]
        if idle:
            raise InputError(
                f"{', '.join(idle)} given, but the strategy is {config.strategy!r}; expected "
                f"--strategy {strategy} with it"
            )
    path = Path(args.student)
    format, vocabulary_path = student_files(path)
    rows = read_inputs(args.input_file, args.split)[: args.limit]
    vocabulary = load_vocabulary(vocabulary_path)
    answer_sets = None
    if config.answers != "open":
        named = [(f"input {i}", row["input"]) for i, row in enumerate(rows, start=1)]
        answer_sets = make_answer_sets(named, config, vocabulary)
    decoder = judge.Decoder(path, MeshConfig(), args.rows)

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
    texts, distributions = judge.answer(decoder, inputs, config, vocabulary.decode, answer_sets)
    answers = {"prediction": texts}
    if distributions:
        answers["probability"] = [max(row.values()) for row in distributions]
        answers["distribution"] = distributions
    if args.rationales:
        inputs = encode(format.input_prefix_rationale)
        decoded = decoder(
            inputs,
            config.max_rationale_length,
            "rationales",
            config,
            start_id=format.rationale_start_id,
        )
        answers["rationale"] = [vocabulary.decode(tokens) for tokens in decoded]
    for i, row in enumerate(rows):
        row |= {name: values[i] for name, values in answers.items()}
        if args.format == "jsonl":
            print(json.dumps(row, ensure_ascii=False))
        else:
            print("\n".join(f"{name:<17} {text}" for name, text in row.items()), end="\n\n")


def read_inputs(path: str, split: str | None) -> list[dict[str, str]]:
    """The inputs in a file or in standard input, a dict each with `input`.

    A line of plain text is an input; a JSON object must have a text `input`, and where it is a
    record its `label` and `rationale` come along as `label` and `teacher_rationale`. Blank lines
    are skipped.
    """
    import json
    from pathlib import Path

    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected UTF-8 text") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line.startswith("{"):
            rows += [{"input": line}] if line else []
            continue
        try:
            found = json.loads(line)
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


def student_files(path) -> tuple:
    """How to speak to the student in `path`, and where its vocabulary lies."""
    from dslt.checkpoint.student import is_hugging_face
    from dslt.workdir import RunDir, StudentFormat

    if not path.is_dir():
        raise InputError(
            f"{path}: is no directory; expected a run's, a checkpoint's or a Hugging Face model's"
        )
    if is_hugging_face(path):
        root, vocabulary = path, path
    else:
        is_checkpoint = (path / "params").is_dir()
        root = path.absolute().parent.parent if is_checkpoint else path
        vocabulary = RunDir(root).vocabulary
    if RunDir(root).student.exists():
        return StudentFormat.read(RunDir(root).student), vocabulary
    format = StudentFormat()
    print(f"{root}: has no student.json; taking {format}", file=sys.stderr)
    return format, vocabulary


def add_export(commands) -> None:
    command = add_command(commands, "export", export, "write a Hugging Face T5 directory")
    add_student_flag(command)
    command.add_argument("--output_dir", required=True, help="made; must not exist or be empty")


def export(args) -> None:
    """Writes safetensors, config, tokenizer and student.json."""
    from pathlib import Path

    import jax

    from dslt.checkpoint import hf_t5, student
    from dslt.core import sharding

    path, output = Path(args.student), Path(args.output_dir)
    format, vocabulary = student_files(path)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    model_config, _, params = student.load(path, mesh)
    hf_t5.save(
        output,
        model_config,
        jax.device_get(params),
        vocabulary,
        max_target_tokens=format.max_target_length,
    )
    format.write(output / "student.json")
    print(f"exported {path} to {output}: a Hugging Face T5 directory")


def add_import(commands) -> None:
    command = add_command(
        commands, "import", import_student, "turn a Hugging Face T5 into an Orbax checkpoint"
    )
    command.add_argument("--hugging_face", required=True, help="a directory with safetensors")
    command.add_argument("--output_dir", required=True, help="made; must not hold checkpoints")


def import_student(args) -> None:
    """Writes checkpoints/0, the vocabulary and student.json, for `init_from` and `predict`."""
    from pathlib import Path

    from dslt.checkpoint import hf_t5
    from dslt.checkpoint.manager import CheckpointManager, Layout
    from dslt.data.vocabulary import load_vocabulary
    from dslt.workdir import RunDir

    source, run = Path(args.hugging_face), RunDir(Path(args.output_dir))
    if run.checkpoints.exists():
        raise InputError(f"{run.checkpoints}: exists already; choose another --output_dir")
    model_config, params = hf_t5.load_params(source)
    format, vocabulary_path = student_files(source)
    vocabulary = load_vocabulary(vocabulary_path)
    with CheckpointManager(run.checkpoints) as manager:
        manager.save_params(0, params, Layout(model_config))
    vocabulary.save(run.vocabulary)
    format.write(run.student)
    print(f"imported {source} to {run.path}")


# ---------------------------------------------------------------------------------------------
# bench: how fast a run is on the devices at hand


def add_bench(commands) -> None:
    command = add_command(commands, "bench", bench, "measure a run's speed on this machine")
    command.add_argument("gin_files", nargs="+", help="as for `dslt train`")
    command.add_argument(
        "--against",
        choices=("hf",),
        help="the same beside PyTorch's `transformers`, in the same process",
    )
    command.add_argument("--steps", type=positive, default=10, help="measured train steps")
    command.add_argument(
        "--decode", type=int, default=64, metavar="INPUTS", help="decoded inputs; 0 for none"
    )
    command.add_argument("--repetitions", type=positive, default=3, help="of all decoded inputs")
    command.add_argument("--output", help="a JSON file for the figures")
    add_gin_flag(command)


def bench(args) -> None:
    """Prints what was measured, a line a figure."""
    import tempfile
    from pathlib import Path

    import jax

    from dslt import bench as measure
    from dslt import config
    from dslt.data.pipeline import count_splits, eval_inputs
    from dslt.workdir import RunDir, write_json

    configs = config.parse(args.gin_files, args.gin)
    if args.against:
        require_torch()
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        run = RunDir(Path(directory))
        stream, vocabulary = open_train_stream(run, configs)
        counts = count_splits(configs.data)
        split = next(name for name in ("validation", "test", "train") if counts[name])
        for line in stream.report():
            print(f"data        {line}")
        print(f"devices     {len(jax.devices())} x {jax.devices()[0].device_kind}")
        for text, values in measure.bench(
            configs,
            batch=stream.batch,
            inputs=eval_inputs(configs.data, split, vocabulary)[: args.decode],
            vocabulary=run.vocabulary,
            against=args.against,
            steps=args.steps,
            repetitions=args.repetitions,
        ):
            print(text, flush=True)
            figures |= values
    if args.output:
        write_json(Path(args.output), figures)


def require_torch() -> None:
    """Raises InputError where PyTorch is missing."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise InputError("--against hf needs PyTorch; install the extra: pip install '.[parity]'")


# ---------------------------------------------------------------------------------------------
# plan: a run on hardware that is not there


def add_plan(commands) -> None:
    command = add_command(
        commands, "plan", plan, "compile a run for hardware that is not there: does it fit?"
    )
    command.add_argument("gin_files", nargs="+", help="as for train")
    add_gin_flag(command)
    command.add_argument(
        "--topology",
        required=True,
        help="v5e:4x8, v5litepod-32, v4-32, v5p:2x2x1, v6e-8; h100:8 (an estimate); cpu:8",
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="compile with little effort: a tenth of the time, memory within 13 percent",
    )
    command.add_argument(
        "--search", action="store_true", help="find the largest batch and the smallest slice"
    )
    command.add_argument(
        "--hbm_gib", type=float, help="memory of a chip, in place of what is known"
    )
    shape = command.add_argument_group("batch, where the records are not at hand")
    shape.add_argument("--rows", type=positive, help="of a step")
    shape.add_argument("--source_length", type=positive, help="tokens of a row's sources")
    shape.add_argument("--target_length", type=positive, help="tokens of a row's targets")
    shape.add_argument(
        "--fill", type=float, default=1.0, help="share of the cells that hold tokens"
    )


def plan(args) -> None:
    """Prints what the run needs and sends, and what to change where it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run, and no accelerator is to be waited for
    # Programs for devices that are not there can be written to the cache and not be read back.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from dslt import config
    from dslt import plan as planning
    from dslt.core.topology import GIB, cloud_name, parse_topology

    topology = parse_topology(args.topology)
    configs = config.parse(args.gin_files, args.gin)
    run = planning.Run(
        train=configs.train,
        model=configs.model,
        optimizer=configs.optimizer,
        mesh=configs.mesh,
        evaluate=configs.evaluate,
        max_input_length=configs.data.max_input_length,
        shape=batch_shape(args, configs),
    )
    hbm_bytes = int(args.hbm_gib * GIB) if args.hbm_gib else None
    found = planning.plan_training(run, topology, args.quick, hbm_bytes)
    print("\n".join(planning.report_training(found)), flush=True)
    decoding = planning.plan_decoding(run, topology, args.quick, hbm_bytes)
    print("\n".join(planning.report_decoding(decoding)), flush=True)
    if not found.memory.fits():
        print("\nwhat would help, compiled with little effort:", flush=True)
        for trial in planning.suggest(found, hbm_bytes):
            print(planning.report_trial(trial), flush=True)
    if args.search:
        say = functools.partial(print, flush=True)
        print(f"\nlargest batch on {topology}, compiled with little effort:")
        best = planning.largest_batch(run, topology, hbm_bytes, say)
        print(f"  largest: {best.run.shape.examples} examples" if best else "  none fits")
        if topology.is_tpu:
            print(f"\nsmallest {topology.version} slice for this batch:")
            best = planning.smallest_slice(run, topology, hbm_bytes, say)
            name = best and f"{best.topology} ({cloud_name(best.topology)})"
            print(f"  smallest: {name}" if best else "  none fits")


def batch_shape(args, configs):
    """The batches' shape: from flags, from the records, or assumed."""
    from pathlib import Path

    from dslt.plan import BatchShape

    data = configs.data
    roles = 2 if configs.train.rationale_weight > 0 else 1
    examples = data.batch_examples
    given = [args.rows, args.source_length, args.target_length]
    has_records = bool(data.records) and all(Path(path).is_file() for path in data.records)
    if any(given) or not has_records:
        origin = "as given" if all(given) else "no packing, each segment as long as allowed"
        if any(given) and not all(given):
            origin = "partly given, else " + origin
        return BatchShape(
            rows=args.rows or examples * roles,
            source_length=args.source_length or data.source_length or data.max_input_length,
            target_length=args.target_length or data.target_length or data.max_target_length,
            examples=examples,
            fill=args.fill,
            origin=origin,
        )
    import tempfile

    from dslt.data.pipeline import TrainStream, make_vocabulary

    with tempfile.TemporaryDirectory() as directory:
        vocabulary = make_vocabulary(data, Path(directory) / "vocabulary")
        stream = TrainStream(data, vocabulary, seed=configs.train.seed, use_rationales=roles == 2)
        fill = stream.fill()
    found = stream.row_shape
    share = (fill.source * found.source_length + fill.target * found.target_length) / (
        found.source_length + found.target_length
    )
    return BatchShape(
        found.rows, found.source_length, found.target_length, examples, share, "from the records"
    )


def add_gin_flag(command) -> None:
    command.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help="an override such as 'train.TrainConfig.rationale_weight = 0.5'; may be repeated",
    )


def add_student_flag(command) -> None:
    command.add_argument(
        "--student",
        required=True,
        help="a run's directory (its best checkpoint), one checkpoint, or a Hugging Face directory",
    )


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def require(args, name: str) -> str:
    """A flag that the other flags make necessary."""
    value = getattr(args, name)
    if value is None:
        raise InputError(f"--{name} is missing; --teacher {args.teacher} needs it")
    return value


if __name__ == "__main__":
    sys.exit(main())
