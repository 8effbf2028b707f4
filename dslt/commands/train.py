"""`dslt train`: a run, from nothing or from where it stopped."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dslt import mirror
from dslt.commands.arguments import add_command, add_gin_flag
from dslt.commands.processes import add_process_flags, start_processes
from dslt.commands.remote import local_run
from dslt.commands.students import check_start
from dslt.errors import InputError
from dslt.files import write_text
from dslt.signals import INTERRUPTED


def add(commands) -> None:
    command = add_command(commands, "train", train, "train a student, or go on with its training")
    command.add_argument("gin_files", nargs="+", help="later files override earlier ones")
    command.add_argument(
        "--run_dir",
        required=True,
        help="made, or resumed if it is this run's; or a URL such as gs://bucket/run",
    )
    command.add_argument(
        "--branch_from",
        metavar="RUN",
        help="go on from this run's newest checkpoint, or from RUN/checkpoints/STEP, with another "
        "config, in a --run_dir of its own; short for train.TrainConfig.branch_from",
    )
    add_gin_flag(command)
    add_process_flags(command)


def train(args) -> int:
    """Trains in a directory; one in a bucket is mirrored on this machine."""
    with local_run(args, mirror.training):
        return train_here(args)


def train_here(args) -> int:
    """Checks the configs, opens the data, says what will happen, and trains."""
    start_processes(args)
    from dslt import config, distributed
    from dslt.start import mesh_and_optimizer
    from dslt.train import train as run_training
    from dslt.workdir import RunDir

    branch = args.branch_from
    bindings = [f"train.TrainConfig.branch_from = {branch!r}"] if branch else []
    configs = config.parse(args.gin_files, [*args.gin, *bindings])
    mesh_and_optimizer(configs.train, configs.model, configs.optimizer, configs.mesh)  # may refuse
    run = RunDir(Path(args.run_dir))
    changes = []
    with contextlib.ExitStack() as stack:
        with distributed.main_first():
            if distributed.is_main():  # before it writes the config, which the others would find
                stack.enter_context(run.held("train"))
                changes = config.check_run(run, configs)
            stream, vocabulary = open_train_stream(run, configs)
            if distributed.is_main():
                write_text(run.config, configs.text)
        distributed.check_same("the config", configs.text)
        distributed.check_same("the digest of the records", list(stream.records_digests.values()))
        if distributed.is_main():
            stack.enter_context(run.beating())
            stack.enter_context(stopped_by_errors(run))
        describe_run(run, configs, stream, vocabulary)
        record_changes(run, changes)
        state = run_training(
            configs.train,
            configs.model,
            configs.optimizer,
            configs.mesh,
            stream=stream,
            run=run,
        )
    if stream.left_out:
        print(f"warning: {stream.left_out} examples found no room in an epoch and were left out")
    return 0 if int(state.step) >= configs.train.num_steps else INTERRUPTED


@contextlib.contextmanager
def stopped_by_errors(run) -> Iterator[None]:
    """Says in run.json that the run has stopped, where the block ends by an error or a signal."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, InputError):
            run.set_state("stopped")
        raise


def record_changes(run, changes) -> None:
    """Prints what of the config is another than before, and adds it to run.json."""
    from dslt import distributed
    from dslt.workdir import read_json

    if not changes or not distributed.is_main():
        return
    for change in changes:
        print(f"changed     {change}")
    before = read_json(run.info).get("config_changes", [])
    run.update_info(config_changes=[*before, [str(change) for change in changes]])


def open_train_stream(run, configs) -> tuple:
    """The batches of a run, and its vocabulary."""
    from dslt.data.pipeline import TrainStream

    vocabulary = open_vocabulary(run, configs)
    stream = TrainStream(
        configs.data,
        vocabulary,
        seed=configs.train.seed,
        use_rationales=configs.train.rationale_weight > 0,
    )
    if run.has_checkpoints():
        check_same_data(run, stream, vocabulary)
    return stream, vocabulary


def open_vocabulary(run, configs):
    """The vocabulary of a run, which a new one copies into its directory."""
    from dslt import distributed
    from dslt.data.pipeline import make_vocabulary
    from dslt.data.vocabulary import check_embedded, load_vocabulary
    from dslt.start import find_branch
    from dslt.workdir import RunDir

    if not distributed.is_main() and not run.vocabulary.is_dir():
        raise InputError(
            f"{run.vocabulary}: process 0 has written it, but it is not seen here; expected "
            "--run_dir on a file system that all processes share"
        )
    if run.has_checkpoints() or not distributed.is_main():
        vocabulary = load_vocabulary(run.vocabulary)
    else:
        data = configs.data
        if configs.train.branch_from:  # its tokens must mean what they meant
            other = RunDir(find_branch(Path(configs.train.branch_from))[0].parent)
            data = dataclasses.replace(data, vocabulary=str(other.vocabulary))
        vocabulary = make_vocabulary(data, run.vocabulary)
        if configs.train.init_from:
            check_start(Path(configs.train.init_from), vocabulary, configs.data.vocabulary)
    check_embedded(
        vocabulary, configs.data.vocabulary, configs.model.vocab_size, "the config's model"
    )
    return vocabulary


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

    from dslt import distributed, workdir
    from dslt.core import t5
    from dslt.start import find_branch

    if not distributed.is_main():
        return
    devices = jax.devices()
    num_params = t5.count_params(t5.abstract_params(configs.model)[1])
    print(configs.text)
    print(f"devices     {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    print(f"model       {num_params:,} parameters, {configs.model.dtype} activations")
    for line in stream.report():
        print(f"data        {line}")
    warmup_steps, num_steps = configs.optimizer.warmup_steps, configs.train.num_steps
    if warmup_steps >= num_steps:
        print(
            f"warning: the learning rate rises for {warmup_steps} steps (OptimizerConfig."
            f"warmup_steps), all of the {num_steps} of this run"
        )
    for role, source, target in first_of_each_role(stream.batch(0)):
        print(f"{role:<11} {vocabulary.decode(source)!r} -> {vocabulary.decode(target)!r}")
    names = [field.name for field in dataclasses.fields(workdir.StudentFormat)]
    format = workdir.StudentFormat(**{name: getattr(configs.data, name) for name in names})
    format.write(run.student)
    branch = {}
    if configs.train.branch_from and not run.has_checkpoints():
        checkpoints, step = find_branch(Path(configs.train.branch_from))
        branch["branched_from"] = {"checkpoints": str(checkpoints), "step": step}
    run.set_state(
        "running",
        **branch,
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
