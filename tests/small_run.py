"""A student that trains in seconds: its settings, the command that trains it, its parameters."""

import jax
import numpy as np

from dslt.checkpoint.manager import CheckpointManager

SMALL = (
    "t5.T5Config.d_model = 16",
    "t5.T5Config.d_kv = 8",
    "t5.T5Config.d_ff = 32",
    "t5.T5Config.num_heads = 2",
    "pipeline.DataConfig.batch_examples = 8",
    "train.TrainConfig.num_steps = 6",
    "train.TrainConfig.save_every_steps = 3",
    "train.TrainConfig.log_every_steps = 2",
    "evaluate.EvalConfig.max_label_length = 8",
    "evaluate.EvalConfig.max_rationale_length = 16",
    "evaluate.EvalConfig.with_rationales = True",
)


def train_args(records, run_dir, *overrides, method="step_by_step"):
    bindings = (f"pipeline.DataConfig.records = ({str(records)!r},)", *SMALL, *overrides)
    gin = [part for binding in bindings for part in ("--gin", binding)]
    return ["train", f"runs/{method}.gin", "settings/facts.gin", "--run_dir", str(run_dir), *gin]


def final_params(run):
    with CheckpointManager(run.checkpoints, read_only=True) as manager:
        step = manager.steps()[-1]
    path = run.checkpoints / str(step)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path / "params")
    return step, jax.tree.map(np.asarray, tree)
