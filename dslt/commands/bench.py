"""`dslt bench`: how fast a run is on the devices at hand."""

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

from dslt.commands.arguments import add_command, add_gin_flag, natural, positive
from dslt.commands.train import open_train_stream
from dslt.errors import InputError


def add(commands) -> None:
    command = add_command(commands, "bench", bench, "measure a run's speed on this machine")
    command.add_argument("gin_files", nargs="+", help="as for `dslt train`")
    command.add_argument(
        "--against",
        choices=("hf",),
        help="the same beside PyTorch's `transformers`, in the same process",
    )
    command.add_argument("--steps", type=positive, default=10, help="measured train steps")
    command.add_argument(
        "--decode", type=natural, default=64, metavar="INPUTS", help="decoded inputs; 0 for none"
    )
    command.add_argument("--repetitions", type=positive, default=3, help="of all decoded inputs")
    command.add_argument("--output", help="a JSON file for the figures")
    add_gin_flag(command)


def bench(args) -> None:
    """Prints what was measured, a line a figure."""
    if args.against:
        # Two libraries on one GPU: JAX would take three quarters of its memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from dslt import bench as measure
    from dslt import config
    from dslt.data.pipeline import count_splits, eval_inputs
    from dslt.workdir import RunDir, write_json

    configs = config.parse(args.gin_files, args.gin)
    if args.against:
        require_torch()
        load_triton()
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
    if importlib.util.find_spec("torch") is None:
        raise InputError("--against hf needs PyTorch; install the extra: pip install '.[parity]'")


def load_triton() -> None:
    """Loads PyTorch's Triton, where it is installed, before TensorFlow comes for a token cache.

    TensorFlow gives its LLVM's symbols to all, and Triton would begin with those and end the
    process. Source: github.com/tensorflow/tensorflow/issues/124205.
    """
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
