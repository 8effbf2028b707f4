"""A run's train step on an accelerator that has no gin, SeqIO or TensorFlow: from prepared batches.

    python tests/measure_accelerator.py prepare prepared runs/step_by_step.gin settings/paper.gin \\
      --gin "…records = ('runs/svamp/records/records.jsonl',)"
    python tests/measure_accelerator.py run prepared --model 'attention="flash_gpu"' scan_unroll=12

The first writes batches, vocabulary and configs into a directory, wherever dslt is installed whole;
the second needs this checkout, that directory and what core imports. `--against hf` measures the
reference of `dslt bench` beside it. What is printed is what `dslt bench` prints of a step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 10
CONFIGS = ("train", "model", "optimizer", "mesh")
ABSENT = ("gin", "seqio", "tensorflow")


def prepare(args) -> None:
    from dslt import config
    from dslt.commands.train import open_train_stream
    from dslt.workdir import RunDir

    configs = config.parse(args.gin_files, args.gin)
    directory = Path(args.directory)
    stream, _ = open_train_stream(RunDir(directory), configs)
    for line in stream.report():
        print(line)
    arrays = {
        f"{field}_{step}": array
        for step in range(STEPS + 1)
        for field, array in stream.batch(step)._asdict().items()
    }
    np.savez_compressed(directory / "batches.npz", **arrays)
    fields = {name: dataclasses.asdict(getattr(configs, name)) for name in CONFIGS}
    (directory / "configs.json").write_text(json.dumps(fields, indent=1))


def run(args) -> None:
    if args.against:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from dslt import bench
    from dslt.core.batch import Batch
    from dslt.core.optimizer import OptimizerConfig
    from dslt.core.sharding import MeshConfig
    from dslt.core.t5 import T5Config
    from dslt.train import TrainConfig

    directory = Path(args.directory)
    fields = json.loads((directory / "configs.json").read_text())
    for change in args.model:
        name, value = change.split("=", 1)
        fields["model"][name] = json.loads(value)
    kinds = zip(CONFIGS, (TrainConfig, T5Config, OptimizerConfig, MeshConfig), strict=True)
    configs = types.SimpleNamespace(**{name: kind(**fields[name]) for name, kind in kinds})
    with np.load(directory / "batches.npz") as arrays:
        batches = [
            Batch(*(arrays[f"{field}_{step}"] for field in Batch._fields))
            for step in range(STEPS + 1)
        ]
    devices = jax.devices()
    print(f"devices     {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}")
    step = bench.StepBench(
        configs.train, configs.model, configs.optimizer, configs.mesh, batches[0]
    )
    with contextlib.ExitStack() as stack:
        reference = None
        if args.against:
            from dslt import bench_reference

            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "student"
            settings = bench.save_reference(path, configs, step.params, directory / "vocabulary")
            reference, how = bench_reference.fastest(batches, *settings)
            print(f"reference   transformers T5, {how}")
        ours, theirs = bench.step_secs(step, batches, reference)
    for line, _ in bench.describe_steps(step, batches[1:], ours):
        print(line)
    if theirs:
        print(f"against hf  {theirs} s a step: dslt is {theirs.over(ours)} times as fast")
    print(f"loss        {step.loss:.4g} after {2 * STEPS} steps")
    if found := [name for name in ABSENT if name in sys.modules]:
        sys.exit(f"found {', '.join(found)} imported; expected the core to do without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare")
    command.add_argument("directory")
    command.add_argument("gin_files", nargs="+")
    command.add_argument("--gin", action="append", default=[])
    command.set_defaults(run=prepare)
    command = commands.add_parser("run")
    command.add_argument("directory")
    command.add_argument("--model", nargs="*", default=[], metavar="FIELD=JSON", help="of T5Config")
    command.add_argument("--against", choices=("hf",))
    command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
