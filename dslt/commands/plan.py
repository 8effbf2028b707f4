"""`dslt plan`: a run on hardware that is not there."""

import functools
import os
import tempfile
from pathlib import Path

from dslt.commands.arguments import add_command, add_gin_flag, positive, positive_float, share
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(
        commands, "plan", plan, "compile a run for hardware that is not there: does it fit?"
    )
    command.add_argument("gin_files", nargs="+", help="as for train")
    add_gin_flag(command)
    command.add_argument(
        "--topology",
        required=True,
        help="v5e:4x8, v5litepod-32, v4-32, v5p:2x2x1, v6e-8; a100:8, h100:8, h200:8; cpu:8",
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="compile for TPUs with little effort: a fifth of the time, memory within 13 percent",
    )
    command.add_argument(
        "--search",
        action="store_true",
        help="find the largest batch and the smallest slice, or number of GPUs",
    )
    command.add_argument(
        "--hbm_gib", type=positive_float, help="memory of a chip, in place of what is known"
    )
    shape = command.add_argument_group("batch, where the records are not at hand")
    shape.add_argument("--rows", type=positive, help="of a step")
    shape.add_argument("--source_length", type=positive, help="tokens of a row's sources")
    shape.add_argument("--target_length", type=positive, help="tokens of a row's targets")
    shape.add_argument(
        "--fill", type=share, help="share of the cells that hold tokens, in (0, 1]; 1 if not given"
    )


def plan(args) -> None:
    """Prints what the run needs and sends, and what to change where it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run, and no accelerator is to be waited for
    # Programs for devices that are not there can be written to the cache and not be read back.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from dslt import config, plan_report, plan_search
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
    print("\n".join(plan_report.report_training(found)), flush=True)
    decoding = planning.plan_decoding(run, topology, args.quick, hbm_bytes)
    print("\n".join(plan_report.report_decoding(decoding)), flush=True)
    effort = ", compiled with little effort" if topology.is_tpu else ""
    if not found.memory.fits():
        print(f"\nwhat would help{effort}:", flush=True)
        for trial in plan_search.suggest(found, hbm_bytes):
            print(plan_report.report_trial(trial), flush=True)
    if args.search:
        say = functools.partial(print, flush=True)
        print(f"\nlargest batch on {topology}{effort}:")
        best = plan_search.largest_batch(run, topology, hbm_bytes, say)
        print(f"  largest found: {best.run.shape.examples} examples" if best else "  none fits")
        if topology.platform != "cpu" and not topology.is_estimate:
            kind = "slice" if topology.is_tpu else "number of GPUs"
            print(f"\nsmallest {topology.version} {kind} for this batch:")
            best = plan_search.smallest_slice(run, topology, hbm_bytes, say)
            name = best and str(best.topology)
            if best and topology.is_tpu:
                name += f" ({cloud_name(best.topology)})"
            print(f"  smallest: {name}" if best else "  none of these fits")


def batch_shape(args, configs):
    """The batches' shape: from flags, from the records, or assumed."""
    from dslt.plan import BatchShape

    data = configs.data
    roles = 2 if configs.train.rationale_weight > 0 else 1
    sources = 1 if data.shared_encoder else roles
    examples = data.batch_examples
    given = [args.rows, args.source_length, args.target_length]
    has_records = bool(data.records) and all(map(os.path.isfile, data.train_files))
    if any(given) or not has_records:
        origin = "as given" if all(given) else "no packing, each segment as long as allowed"
        if any(given) and not all(given):
            origin = "partly given, else " + origin
        return BatchShape(
            rows=args.rows or examples * sources,
            source_length=args.source_length or data.source_length or data.max_input_length,
            target_length=args.target_length
            or data.target_length
            or data.max_target_length * roles // sources,
            examples=examples,
            source_fill=args.fill or 1.0,
            target_fill=args.fill or 1.0,
            origin=origin,
        )

    if args.fill:
        raise InputError(
            "--fill given, but the records are at hand, which say how full the rows are; expected "
            "--rows, --source_length or --target_length with it"
        )

    from dslt.data.pipeline import TrainStream, make_vocabulary

    with tempfile.TemporaryDirectory() as directory:
        vocabulary = make_vocabulary(data, Path(directory) / "vocabulary")
        stream = TrainStream(data, vocabulary, seed=configs.train.seed, use_rationales=roles == 2)
        fill = stream.fill()
    found = stream.row_shape
    return BatchShape(
        found.rows,
        found.source_length,
        found.target_length,
        examples,
        fill.source,
        fill.target,
        "from the records",
    )
