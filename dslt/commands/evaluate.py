"""`dslt evaluate`: a run's checkpoints, or predictions that are written already."""

import contextlib
from functools import partial
from pathlib import Path

from dslt import mirror
from dslt.commands.arguments import add_command, add_gin_flag
from dslt.commands.processes import add_process_flags, start_processes
from dslt.commands.remote import local_run
from dslt.commands.students import answer_reader, make_answer_sets
from dslt.errors import InputError

USED_OF_DATA = (
    "records",
    "input_prefix_label",
    "input_prefix_rationale",
    "max_input_length",
    "max_target_length",
    "target_layout",
    "shared_encoder",
)


# Overrides that change no answer; of moved records train's digests tell.
NO_EFFECT_ON_ANSWERS = (
    "evaluate.EvalConfig.splits",
    "evaluate.EvalConfig.rows",
    "evaluate.EvalConfig.with_rationales",
    "evaluate.EvalConfig.max_rationale_length",
    "evaluate.EvalConfig.poll_secs",
    "evaluate.EvalConfig.silence_secs",
    "evaluate.EvalConfig.give_up_secs",
    "pipeline.DataConfig.records",
    "pipeline.DataConfig.input_prefix_rationale",
)


def add(commands) -> None:
    command = add_command(commands, "evaluate", evaluate, "judge checkpoints, or predictions again")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run_dir", help="judges its checkpoints that were not judged so yet; or its URL"
    )
    source.add_argument("--predictions", help="a predictions.jsonl to score again, without a model")
    command.add_argument(
        "--follow",
        action="store_true",
        help="waits for training to begin, until it has ended or gives no sign of life for "
        "EvalConfig.give_up_secs",
    )
    command.add_argument(
        "--step", type=int, action="append", help="this checkpoint, again if need be; repeatable"
    )
    add_gin_flag(command, example="evaluate.EvalConfig.with_rationales = True")
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
    if args.follow and args.step:
        raise InputError("--step names checkpoints that are there; expected no --follow beside it")
    if args.predictions:
        print(score_again(args))
        return None
    from dslt import distributed
    from dslt import evaluate as judge
    from dslt.workdir import OVERRIDES, RunDir, judged_alike

    run = RunDir(Path(args.run_dir))
    with contextlib.ExitStack() as stack:
        with distributed.main_first():
            if args.follow:
                judge.wait_for_start(run)
            if not run.config.exists():
                raise InputError(
                    f"{run.path}: has no config.gin; expected a directory of `dslt train`"
                )
            if distributed.is_main():
                stack.enter_context(run.held("evaluate"))
        rows = judge_run(run, args)
    best = judge.best_row(rows)
    if best is None:
        print("No checkpoint was judged on validation: no best one was chosen.")
    else:
        print(f"best on validation: {judge.describe(best)}")
        print(f"predictions: {run.evaluation(best['step']) / 'predictions.jsonl'}")
        alike = judged_alike(rows, best.get(OVERRIDES, ""))
        others = ", ".join(str(row["step"]) for row in rows if row not in alike)
        if others:
            print(f"judged with other settings, and not compared: step {others}")
    return 1 if args.follow and distributed.share(run.state() == "running") else 0


def judge_run(run, args) -> list[dict]:
    """Judges the checkpoints of a run; returns the rows of evaluations.jsonl."""
    from dslt import config, distributed
    from dslt import evaluate as judge
    from dslt.data.vocabulary import check_embedded, load_vocabulary

    configs = config.parse([str(run.config)], args.gin)
    changes = config.find_changes(config.parse([str(run.config)]), configs)
    check_overrides(changes)
    overrides = "; ".join(
        f"{change.name} = {change.now!r}"
        for change in changes
        if not change.name.startswith("sharding.") and change.name not in NO_EFFECT_ON_ANSWERS
    )
    layout, max_target_length = configs.data.target_layout, configs.data.max_target_length
    eval_config, read_answer = answer_reader(configs.evaluate, layout, max_target_length)
    vocabulary = load_vocabulary(run.vocabulary)
    # before there is a checkpoint, whose model is always the config's
    check_embedded(vocabulary, run.vocabulary, configs.model.vocab_size, run.path)
    examples = open_examples(run, configs.data, eval_config.splits, vocabulary)
    for warning in warn_of_labels(examples, eval_config, vocabulary):
        print(warning)
    distributed.check_same("the number of inputs", len(examples))
    answer_sets = None
    if eval_config.answers != "open":
        answer_sets = make_answer_sets(
            [(f"example {e.example.id!r}", e.example.input) for e in examples],
            eval_config,
            vocabulary,
        )
    return judge.evaluate_run(
        run,
        eval_config,
        configs.mesh,
        examples=examples,
        decode_text=lambda tokens: read_answer(vocabulary.decode(tokens)),
        rationale_start_id=configs.data.rationale_start_id,
        answer_sets=answer_sets,
        overrides=overrides,
        follow=args.follow,
        steps=args.step,
    )


def check_overrides(changes) -> None:
    """Raises InputError where an override is of what evaluation does not use, such as the model's
    shape, which is the checkpoint's.
    """
    used = [f"pipeline.DataConfig.{name}" for name in USED_OF_DATA]
    unused = [
        str(change)
        for change in changes
        if not change.name.startswith(("evaluate.", "sharding.")) and change.name not in used
    ]
    if unused:
        raise InputError(
            "--gin: found overrides that evaluation does not use:\n  "
            + "\n  ".join(unused)
            + "\nThe student is as it was trained. Expected fields of evaluate.EvalConfig, of "
            f"sharding.MeshConfig, or {', '.join(used)}; leave the others out"
        )


def score_again(args) -> str:
    """What --predictions are worth, in a line."""
    from dslt import evaluate as judge

    if args.follow or args.step or args.gin:
        raise InputError("--predictions is scored as it is; expected no --follow, --step or --gin")
    return judge.describe(judge.rescore(Path(args.predictions))) or "no row has a gold label"


def open_examples(run, data, splits, vocabulary) -> list:
    """The inputs of the judged splits; says what may be wrong with them."""
    from dslt.data.pipeline import read_eval_inputs, records_digests
    from dslt.workdir import read_json

    found = read_eval_inputs(data, splits, vocabulary)
    for split in splits:
        if split not in found:
            print(f"warning: no example is in split {split!r}")
    trained_on = read_json(run.info).get("records", {}) if run.info.exists() else {}
    for path, digest in records_digests(data.records).items():
        if trained_on.get(path, digest) != digest:
            print(f"warning: {path} has changed since the run began; its splits may be others")
    examples = [example for split in found.values() for example in split]
    truncated = sum(example.is_truncated for example in examples)
    if truncated:
        print(f"warning: {truncated} of {len(examples)} inputs are cut to max_input_length")
    return examples


def warn_of_labels(examples, config, vocabulary) -> list[str]:
    """Lines on gold labels that no answer can match, whatever the student has learnt."""
    from dslt.metrics import is_correct

    if config.answers != "open":
        return []
    labels = [(e.example.label, e.example.answer_form) for e in examples if e.example.label]
    tokens = {label: vocabulary.encode(label) for label, _ in labels}
    is_long = {label: len(found) > config.max_label_length for label, found in tokens.items()}
    long = [label for label, _ in labels if is_long[label]]
    unlike = [
        label
        for label, form in labels
        if not is_long[label] and not is_correct(vocabulary.decode(tokens[label]), label, form)
    ]
    lines = []
    if long:
        lines.append(
            f"warning: {len(long)} of {len(labels)} gold labels have more tokens than "
            f"max_label_length = {config.max_label_length}: no answer matches them. Give "
            "evaluate.EvalConfig.max_label_length"
        )
    if unlike:
        lines.append(
            f"warning: {len(unlike)} of {len(labels)} gold labels, such as {unlike[0]!r}, are not "
            "what their own tokens say, by the vocabulary and the answer form: no answer matches "
            "them"
        )
    return lines
