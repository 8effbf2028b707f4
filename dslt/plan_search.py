"""What of a run to change so that it fits, and how large a batch or how small a slice would.

Imports plan and core. Each trial is a compilation, with little effort.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from dslt.core import sharding
from dslt.core.topology import GIB, Topology, compile_devices, slices
from dslt.errors import InputError
from dslt.plan import MARGIN, Run, TrainPlan, plan_training

MOST_TRIALS = 6  # compilations to find the largest batch


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run with some overrides, compiled."""

    overrides: tuple[str, ...]
    plan: TrainPlan


def suggest(plan: TrainPlan, hbm_bytes: int | None = None) -> Iterator[Trial]:
    """Compiles changes of a run that does not fit: each alone, then together until it fits."""
    changes = list(_changes(plan))
    fitting = False
    for override, change in changes:
        trial = _try(plan, ((override, change),), hbm_bytes)
        fitting |= trial.plan.memory.fits()
        yield trial
    if fitting:
        return
    for count in range(2, len(changes) + 1):
        trial = _try(plan, changes[:count], hbm_bytes)
        yield trial
        if trial.plan.memory.fits():
            return


def _changes(plan: TrainPlan) -> Iterator[tuple[str, Callable[[Run], Run]]]:
    """Overrides that spare memory and are not in place yet, the cheapest in time first."""
    run = plan.run

    def change(field: str, **values) -> Callable[[Run], Run]:
        return lambda run: dataclasses.replace(
            run, **{field: dataclasses.replace(getattr(run, field), **values)}
        )

    if run.model.dtype == "float32":
        yield "t5.T5Config.dtype = 'bfloat16'", change("model", dtype="bfloat16")
    if plan.mesh_shape["data"] > 1:
        text = "sharding.MeshConfig.data = 1 and sharding.MeshConfig.fsdp = -1"
        yield text, change("mesh", data=1, fsdp=-1)
    if not run.model.remat:
        yield "t5.T5Config.remat = True", change("model", remat=True)
    if run.optimizer.name == "adamw":
        yield "optimizer.OptimizerConfig.name = 'adafactor'", change("optimizer", name="adafactor")
    devices = plan.mesh_shape["data"] * plan.mesh_shape["fsdp"]
    microbatches = run.train.accumulation_steps
    while microbatches * 2 * devices <= plan.rows:
        microbatches *= 2
    if microbatches > run.train.accumulation_steps:
        text = f"train.TrainConfig.accumulation_steps = {microbatches}"
        yield text, change("train", accumulation_steps=microbatches)
    if run.shape.examples > 1 and plan.rows > devices:
        half = run.shape.examples // 2
        text = f"pipeline.DataConfig.batch_examples = {half}"
        yield text, lambda run: dataclasses.replace(run, shape=run.shape.scaled(half))


def _try(plan: TrainPlan, changes, hbm_bytes) -> Trial:
    run = plan.run
    for _, change in changes:
        run = change(run)
    names = tuple(name for name, _ in changes)
    return Trial(names, plan_training(run, plan.topology, quick=True, hbm_bytes=hbm_bytes))


def largest_batch(
    run: Run, topology: Topology, hbm_bytes: int | None = None, say: Callable = print
) -> TrainPlan | None:
    """The plan of the largest batch that fits with MARGIN to spare; None where not one row does.

    Memory is nearly a line over the rows, so a trial lies where the line through the two largest
    says until one does not fit, and then in the middle; at most MOST_TRIALS, to one row a device.
    """
    mesh = sharding.make_mesh(run.mesh, compile_devices(topology))
    multiple = sharding.row_multiple(mesh, run.train.accumulation_steps)

    def attempt(count: int) -> TrainPlan:
        rows = count * multiple
        examples = max(rows * run.shape.examples // run.shape.rows, 1)
        shape = dataclasses.replace(run.shape, rows=rows, examples=examples)
        found = plan_training(
            dataclasses.replace(run, shape=shape), topology, quick=True, hbm_bytes=hbm_bytes
        )
        points[count] = found
        say(f"  {examples} examples in {rows} rows: {found.memory.peak / GIB:.2f} GiB a chip")
        return found

    points: dict[int, TrainPlan] = {}
    attempt(1)
    attempt(max(2, -(-run.shape.rows // multiple)))
    while len(points) < MOST_TRIALS:
        fitting = [count for count, plan in points.items() if plan.memory.fits(MARGIN)]
        others = [count for count in points if count not in fitting]
        low, high = max(fitting, default=0), min(others, default=math.inf)
        if not low or high - low <= 1:
            break
        guess = (low + high) // 2 if others else _where_full(points, 1 - MARGIN)
        attempt(max(guess, low + 1))
    fitting = [count for count, plan in points.items() if plan.memory.fits(MARGIN)]
    return points[max(fitting)] if fitting else None


def _where_full(points: dict[int, TrainPlan], share: float) -> int:
    """Rows a device at which the line through the two largest compiled plans meets the limit."""
    (x0, first), (x1, last) = sorted(points.items())[-2:]
    slope = (last.memory.peak - first.memory.peak) / (x1 - x0)
    room = last.memory.available * share - last.memory.peak
    return math.floor(x1 + room / slope) if slope > 0 else x1 * 2


def smallest_slice(
    run: Run, topology: Topology, hbm_bytes: int | None = None, say: Callable = print
) -> TrainPlan | None:
    """The plan on the smallest slice of this generation that the run fits with MARGIN to spare.

    Of GPUs one host's are tried, and `topology` itself.
    """
    candidates = slices(topology.version)
    if topology.is_gpu and topology not in candidates:
        candidates = sorted([*candidates, topology], key=lambda each: each.num_chips)
    for candidate in candidates:
        try:
            found = plan_training(run, candidate, quick=True, hbm_bytes=hbm_bytes)
        except InputError as error:  # the mesh's sizes are for other slices
            say(f"  {candidate}: {error}")
            continue
        fits = found.memory.fits(MARGIN)
        say(f"  {candidate}: {found.memory.peak / GIB:.2f} GiB a chip, {'fits' if fits else 'no'}")
        if fits:
            return found
    return None
