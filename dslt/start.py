"""What a run starts from: its own newest checkpoint, another's, weights, or nothing.

Imports core, checkpoint, workdir and distributed. `config` is a TrainConfig throughout.

    graphdef, state = initial_state(config, model_config, optimizer, mesh, manager)
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from dslt import distributed
from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager, finished_steps
from dslt.checkpoint.student import read_params
from dslt.core import attention, sharding, t5
from dslt.core.optimizer import make_optimizer
from dslt.core.t5 import T5Config
from dslt.core.train_step import init_state
from dslt.errors import InputError
from dslt.workdir import RunDir


def mesh_and_optimizer(config, model_config, optimizer_config, mesh_config) -> tuple:
    """What a run is computed on, and what updates it.

    Raises:
      InputError: these devices cannot compute it.
    """
    mesh = sharding.make_mesh(mesh_config)
    attention.check_platform(model_config.attention, mesh.devices.flat[0].platform)
    return mesh, make_optimizer(optimizer_config, config.num_steps)


def initial_state(config, model_config, optimizer, mesh, manager) -> tuple:
    """The graph definition and the state to start from, placed on the mesh. The first that holds:

    1. this run has checkpoints: resume the newest;
    2. `branch_from` is a run's directory or one of its checkpoints: its whole state;
    3. `init_from` is a run's directory or an Orbax checkpoint: its parameters, step 0;
    4. `init_from` is a Hugging Face directory: its parameters, step 0;
    5. from scratch, by `seed`.
    """
    graphdef, abstract = abstract_state(model_config, optimizer, mesh)
    if steps := distributed.share(manager.steps()):
        newest = newest_whole(manager, steps)
        manager.check_layout(newest, Layout(model_config))
        print(f"Resuming {manager.directory} after step {newest}.")
        return graphdef, manager.restore(newest, abstract)
    if config.branch_from:
        directory, step = find_branch(Path(config.branch_from))
        step = distributed.share(step)
        print(f"Branching from {directory} after step {step}.")
        with CheckpointManager(directory, read_only=True, together=True) as other:
            other.check_layout(step, Layout(model_config))
            if damage := find_damage(other, step):
                raise InputError(f"{damage}; give --branch_from another of the run's checkpoints")
            return graphdef, other.restore(step, abstract)
    return new_state(config, model_config, optimizer, mesh)


def find_branch(path: Path) -> tuple[Path, int]:
    """The directory of checkpoints and the step to branch from.

    Raises:
      InputError: `path` is neither a run with checkpoints nor one of them.
    """
    path = path.absolute()
    if path.name.isdigit() and (path / "opt_state").is_dir():
        return path.parent, int(path.name)
    directory = RunDir(path).checkpoints
    if steps := finished_steps(directory):
        return directory, steps[-1]
    raise InputError(
        f"{path}: has no checkpoint with optimizer state to branch from; expected a run's "
        "directory or RUN/checkpoints/STEP. A student without it is for train.TrainConfig.init_from"
    )


def find_damage(manager: CheckpointManager, step: int) -> str | None:
    """What is wrong with a checkpoint, if anything; each process reads its share of the arrays."""
    found = manager.find_damage(step, part=jax.process_index(), parts=jax.process_count())
    return next((damage for damage in distributed.gather(found) if damage), None)


def newest_whole(manager: CheckpointManager, steps: Sequence[int]) -> int:
    """The newest of these steps whose checkpoint is what was saved.

    Damaged ones after it are named and set aside, for their steps will be saved again.

    Raises:
      InputError: none is whole; nothing is moved then, and nothing begins anew.
    """
    damaged = {}
    for step in reversed(steps):
        damage = find_damage(manager, step)
        if damage is None:
            break
        damaged[step] = damage
    else:
        raise InputError(
            f"{manager.directory}: none of its checkpoints is whole, so there is nothing to resume;"
            " restore one from a copy, or choose another --run_dir to begin anew:\n  "
            + "\n  ".join(damaged.values())
        )
    for other, damage in damaged.items():
        print(f"warning: {damage}")
        where = distributed.share(str(manager.set_aside(other)) if distributed.is_main() else None)
        print(f"warning: set aside as {where}; taking the checkpoint before it")
    manager.steps()  # all see what is left
    return step


def abstract_state(model_config: T5Config, optimizer, mesh) -> tuple:
    """The graph definition and a TrainState of `jax.ShapeDtypeStruct`s with their shardings."""
    graphdef, abstract_params = t5.abstract_params(model_config)
    abstract = jax.eval_shape(partial(init_state, optimizer=optimizer), abstract_params)
    return graphdef, sharding.with_shardings(mesh, abstract)


def new_state(config, model_config: T5Config, optimizer, mesh) -> tuple:
    """As `initial_state`, of a run that has no checkpoints and no branch: 3, 4 or 5."""
    graphdef, abstract = abstract_state(model_config, optimizer, mesh)
    shardings = sharding.state_shardings(mesh, abstract)
    if config.init_from:
        print(f"Starting from the parameters in {config.init_from}.")
        params = read_params(Path(config.init_from), model_config, abstract.params)
    else:
        print(f"Starting from scratch with seed {config.seed}.")
        initialise = jax.jit(
            lambda: t5.init_params(model_config, config.seed)[1], out_shardings=shardings.params
        )
        params = initialise()
    make_state = jax.jit(partial(init_state, optimizer=optimizer), out_shardings=shardings)
    return graphdef, make_state(params)
