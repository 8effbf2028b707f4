"""`dslt evaluate`: a run's checkpoints, or predictions that are written already."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dslt import mirror
from dslt.commands.arguments import add_command, add_gin_flag
from dslt.commands.processes import add_process_flags, start_processes
from dslt.commands.remote import local_run
from dslt.commands.students import answer_reader
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(commands, "evaluate", evaluate, "judge checkpoints, or predictions again")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run_dir", help="judges its checkpoints that were not judged yet; or its URL"
    )
    source.add_argument("--predictions", help="a predictions.jsonl to score again, without a model")
    command.add_argument(
        "--follow",
        action="store_true",
        help="until training has ended, or gives no sign of life for EvalConfig.give_up_secs",
    )
    command.add_argument(
        "--step", type=int, action="append", help="this checkpoint, again if need be; repeatable"
    )
    add_gin_flag(command)
    add_process_flags(command)


def evaluate(args) -> int | None:
    """Judges in a directory; one in a bucket is mirrored on this machine."""
    with local_run(args, partial(mirror.evaluating, follow=args.follow)):
        return evaluate_here(args)


def evaluate_here(args) -> int | None:
    """Prints a line a checkpoint and which is the best on validation.

    Returns 1 where it followed a training that has given no sign of life for too long.
    """
    start_processes(args)
    from dslt import evaluate as judge

    if args.predictions:
        if args.follow or args.step or args.gin:
            raise InputError(
                "--predictions is scored as it is; expected no --follow, --step or --gin"
            )
        values = judge.rescore(Path(args.predictions))
        print(judge.describe(values) or "no row has a gold label")
        return None
    from dslt import config, distributed
    from dslt.data.pipeline import read_eval_inputs, records_digests
    from dslt.data.vocabulary import load_vocabulary
    from dslt.workdir import RunDir, read_json

    run = RunDir(Path(args.run_dir))
    with distributed.main_first():
        if args.follow:
            judge.wait_for_start(run)
    if not run.config.exists():
        raise InputError(f"{run.path}: has no config.gin; expected a directory of `dslt train`")
    configs = config.parse([str(run.config)], args.gin)
    layout, max_target_length = configs.data.target_layout, configs.data.max_target_length
    eval_config, read_answer = answer_reader(configs.evaluate, layout, max_target_length)
    vocabulary = load_vocabulary(run.vocabulary)
    found = read_eval_inputs(configs.data, eval_config.splits, vocabulary)
    for split in eval_config.splits:
        if split not in found:
            print(f"warning: no example is in split {split!r}")
    examples = [example for split in found.values() for example in split]
    trained_on = read_json(run.info).get("records", {}) if run.info.exists() else {}
    for path, digest in records_digests(configs.data).items():
        if trained_on.get(path, digest) != digest:
            print(f"warning: {path} has changed since the run began; its splits may be others")
    truncated = sum(example.is_truncated for example in examples)
    if truncated:
        print(f"warning: {truncated} of {len(examples)} inputs are cut to max_input_length")
    distributed.check_same("the number of inputs", len(examples))
    answer_sets = None
    if eval_config.answers != "open":
        answer_sets = make_answer_sets(
            [(f"example {e.example.id!r}", e.example.input) for e in examples],
            eval_config,
            vocabulary,
        )
    rows = judge.evaluate_run(
        run,
        eval_config,
        configs.mesh,
        examples=examples,
        decode_text=lambda tokens: read_answer(vocabulary.decode(tokens)),
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
    return 1 if args.follow and distributed.share(run.state() == "running") else 0


def make_answer_sets(inputs: Sequence[tuple[str, str]], config, vocabulary) -> list:
    """What each input may be answered with: the config's labels, or the choices that it lists.

    Of texts that are the same tokens to the student, the first stands for all.

    Args:
      inputs: how an error calls each, and its text.

    Raises:
      InputError: an input has no answers to choose from, or an answer is too long.
    """
    from dslt.core.answers import AnswerSet
    from dslt.core.batch import EOS_ID
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
