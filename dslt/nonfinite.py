"""A step whose loss or gradient is not finite: what is kept of it, and how it is looked at again.

Imports core, checkpoint, workdir and errors.

    RUN/nonfinite/37/batch.npz     the arrays of the global batch, named as in core.batch.Batch
    RUN/nonfinite/37/report.json   the step, its loss and gradient norm, the examples' ids

`dslt replay RUN/nonfinite/37` computes the step again, or by hand:

    batch = Batch(**np.load("RUN/nonfinite/37/batch.npz"))
    config, graphdef, params = student.load(Path("RUN/checkpoints/36"), make_mesh(MeshConfig()))
    model = nnx.merge(graphdef, params)
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from dslt.checkpoint import student
from dslt.checkpoint.manager import finished_steps
from dslt.core import sharding
from dslt.core.batch import Batch, pad_rows
from dslt.core.sharding import MeshConfig
from dslt.core.train_step import gradient_of
from dslt.errors import InputError
from dslt.files import replacing
from dslt.workdir import RunDir, read_json, write_json

MAX_KEPT = 10  # batches a run; later ones are counted alone


@dataclasses.dataclass(frozen=True)
class NonfiniteStep:
    """What a step reported that was not finite."""

    step: int
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss}, gradient norm {self.grad_norm}"


def keep_batch(run: RunDir, found: NonfiniteStep, batch: Batch, examples: list[str]) -> Path | None:
    """Writes the batch of a step and what is known of it; None where MAX_KEPT are there."""
    directory = run.nonfinite(found.step)
    others = directory.parent.iterdir() if directory.parent.is_dir() else ()
    if not directory.exists() and len(list(others)) >= MAX_KEPT:
        return None
    with replacing(directory / "batch.npz", "wb") as file:
        np.savez_compressed(file, **batch._asdict())
    values = {"loss": str(found.loss), "grad_norm": str(found.grad_norm)}  # JSON has no NaN
    write_json(directory / "report.json", {"step": found.step} | values | {"examples": examples})
    return directory


def read_batch(directory: Path) -> tuple[int, Batch, list[str]]:
    """The step, the batch and the examples' ids of `keep_batch`."""
    expected = "expected what `dslt train` wrote"
    report = read_json(directory / "report.json")
    if missing := {"step", "examples"} - report.keys():
        raise InputError(f"{directory / 'report.json'}: has no {min(missing)!r}; {expected}")
    try:
        with np.load(directory / "batch.npz", allow_pickle=False) as arrays:
            batch = Batch(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{directory / 'batch.npz'}: cannot be read ({error}); {expected}"
        ) from None
    return report["step"], batch, report["examples"]


def replay(directory: Path, config) -> Iterator[str]:
    """Lines that say what is not finite when the step is computed again on this machine.

    The parameters are those of the newest checkpoint before the step: the very ones it began with,
    where `on_nonfinite` was `stop`. `config` is the run's TrainConfig.
    """
    step, batch, examples = read_batch(directory)
    checkpoints = RunDir(directory.absolute().parent.parent).checkpoints
    before = [found for found in finished_steps(checkpoints) if found < step]
    if not before:
        raise InputError(f"{checkpoints}: has no checkpoint before step {step}; expected one")
    mesh = sharding.make_mesh(MeshConfig())
    _, graphdef, params = student.load(checkpoints / str(before[-1]), mesh)
    yield f"step {step} with the parameters after step {before[-1]}, {len(examples)} examples"
    batch = pad_rows(batch, sharding.row_multiple(mesh, config.accumulation_steps))
    settings = config.gradient_settings()
    compute = partial(gradient_of, graphdef=graphdef, settings=settings, mesh=mesh)
    placed = sharding.put_batch(batch, mesh)
    (loss, (sums, _)), grads = jax.device_get(jax.jit(compute)(params, placed, np.int32(step - 1)))
    yield f"loss {loss}, label and rationale nats {sums.nll.tolist()}"
    for name, tree in (("parameter", jax.device_get(params)), ("gradient", grads)):
        lines = list(_not_finite(tree))
        yield from (f"{name} {line}" for line in lines)
        if not lines:
            yield f"every {name} is finite"


def _not_finite(tree) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if count := int((~np.isfinite(leaf)).sum()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield f"{name}: {count:,} of {leaf.size:,} are not finite"
