"""Damages a checkpoint in every way and place, and looks what a resuming run makes of it.

    python tests/checkpoint/fault_injection.py              # every file, 8 flipped bits in each
    python tests/checkpoint/fault_injection.py --every 5    # every fifth fault, as the tests do

A run has the checkpoints 1 and 2. Each fault of 2 must be noticed, and then 1 is taken and comes
back bit by bit, or else 2 must come back bit by bit: some files are read by nobody.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.core import sharding, t5
from dslt.core.optimizer import OptimizerConfig, make_optimizer
from dslt.core.train_step import TrainState, init_state
from dslt.start import newest_whole

CONFIG = t5.T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1
)


def make_state(step: int) -> TrainState:
    """A state whose parameters and moments are all random."""
    params = t5.init_params(CONFIG, seed=step)[1]
    state = init_state(params, make_optimizer(OptimizerConfig(), num_steps=9))
    rng = np.random.default_rng(step)
    moments = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(size=x.shape).astype(x.dtype)), state.opt_state
    )
    return TrainState(jax.numpy.int32(step), params, moments)


def faults(directory: Path, flips: int, seed: int) -> Iterator[tuple[str, Path, Callable]]:
    """(kind, what is damaged, a function that damages it) for one step's directory."""
    rng = random.Random(seed)
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            yield "delete a directory", path, lambda path=path: shutil.rmtree(path)
            yield "delete half of a directory", path, lambda path=path: _delete_half(path)
            continue
        size = path.stat().st_size
        yield "delete a file", path, path.unlink
        for length in sorted({0, size // 2, size - 1}):
            yield "truncate a file", path, lambda p=path, n=length: os.truncate(p, n)
        for _ in range(flips):
            bit = rng.randrange(8 * size)
            yield "flip a bit", path, lambda path=path, bit=bit: _flip(path, bit)


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _delete_half(directory: Path) -> None:
    for path in sorted(path for path in directory.rglob("*") if path.is_file())[::2]:
        path.unlink()


def inject(directory: Path, flips: int, every: int, seed: int = 0) -> collections.Counter:
    """Makes a run in `directory`, injects every `every`-th fault, and counts (kind, outcome).

    Raises:
      AssertionError: a fault was neither noticed nor harmless.
    """
    states = {step: make_state(step) for step in (1, 2)}
    mesh = sharding.make_mesh(sharding.MeshConfig())
    abstract = sharding.with_shardings(mesh, jax.eval_shape(lambda: states[1]))
    checkpoints, spare = directory / "checkpoints", directory / "spare"
    with CheckpointManager(checkpoints, together=True) as manager:
        for state in states.values():
            manager.save(state, Layout(CONFIG))
    shutil.copytree(checkpoints / "2", spare)
    counts = collections.Counter()
    todo = list(faults(checkpoints / "2", flips, seed))[seed % every :: every]
    for kind, path, damage in todo:
        damage()
        with CheckpointManager(checkpoints, together=True) as manager:
            with contextlib.redirect_stdout(io.StringIO()):  # a warning each
                step = newest_whole(manager, manager.steps())
            restored = manager.restore(step, abstract)
        where = f"{kind}: {path.relative_to(checkpoints)}"
        is_same = jax.tree.map(np.array_equal, restored, states[step])
        assert all(jax.tree.leaves(is_same)), f"{where} gave other arrays of step {step}"
        counts[kind, "noticed" if step == 1 else "harmless"] += 1
        aside = directory / "damaged"
        assert aside.exists() == (step == 1), f"{where}: step {step} was taken, and {aside}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(checkpoints / "2", ignore_errors=True)
        shutil.copytree(spare, checkpoints / "2")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=8, help="bits flipped in each file")
    parser.add_argument("--every", type=int, default=1, help="take every n-th fault alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = inject(Path(directory), args.flips, args.every, args.seed)
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{kind:<28} {outcome:<9} {number:>5}")
    print(f"{counts.total()} faults: all noticed, or harmless")


if __name__ == "__main__":
    main()
