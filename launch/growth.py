"""How a step's cost grows with batch, length, depth and chips: prints a table in Markdown.

Compiles T5 v1.1 Large for slices of v5e that need not be there, with little effort (about half a
minute each on two cores); needs `pip install '.[tpu]'`, no TPU.

    python launch/growth.py
"""

import dataclasses
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from dslt import config
from dslt.core.topology import GIB, parse_topology
from dslt.plan import BatchShape, Run, TrainPlan, plan_training

GIN_FILES = ["runs/step_by_step.gin", "settings/paper.gin", "slices/t5_v1_1_large_v5e_2x4.gin"]
# Name, then what differs from 64 rows of 512 and 128 tokens and 24 + 24 layers on v5e:2x4.
CASES = {
    "base": {},
    "batch × 2": {"rows": 128},
    "batch × 4": {"rows": 256},
    "length × 2": {"source_length": 1024, "target_length": 256},
    "length × 4": {"source_length": 2048, "target_length": 512},
    "depth × ½": {"layers": 12},
    "depth × 2": {"layers": 48},
    "chips × 2": {"topology": "v5e:4x4"},
    "chips × 2, data 2 × fsdp 8": {"topology": "v5e:4x4", "data": 2},
    "chips × 4": {"topology": "v5e:4x8"},
    "chips × 4, data 4 × fsdp 8": {"topology": "v5e:4x8", "data": 4},
}
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def main() -> None:
    print("| | model PFLOPs | program PFLOPs | HBM GB | " + " | ".join(KINDS), end="")
    print(" GB | state GiB | temporary GiB | bound ms, by |\n|---" + "|---" * 9 + "|")
    for name, changes in CASES.items():
        print(row(name, compile_case(**changes)), flush=True)


def compile_case(
    rows: int = 64,
    source_length: int = 512,
    target_length: int = 128,
    layers: int = 24,
    topology: str = "v5e:2x4",
    data: int = 1,
) -> TrainPlan:
    """One plan, compiled with little effort."""
    configs = config.parse(GIN_FILES)
    model = dataclasses.replace(configs.model, num_layers=layers, num_decoder_layers=layers)
    name = Path(__file__).name
    shape = BatchShape(rows, source_length, target_length, rows // 2, 1.0, 1.0, name)
    run = Run(
        train=configs.train,
        model=model,
        optimizer=configs.optimizer,
        mesh=dataclasses.replace(configs.mesh, data=data),
        evaluate=configs.evaluate,
        max_input_length=source_length,
        shape=shape,
    )
    return plan_training(run, parse_topology(topology), quick=True)


def row(name: str, plan: TrainPlan) -> str:
    """A line of the table; bytes are those of one chip."""
    sent = [
        sum(c.sent_bytes * (c.times or 1) for c in plan.collectives if c.kind == kind) / 1e9
        for kind in KINDS
    ]
    bounds, memory = plan.bounds(), plan.memory
    binding = max(bounds, key=bounds.get)
    state = sum(size for kind, size in memory.kinds.items() if kind != "gradients")
    cells = [
        name,
        f"{plan.model_flops / 1e15:.3f}",
        f"{plan.traced_flops / 1e15:.3f}",
        f"{plan.hbm_bytes / 1e9:.1f}",
        *(f"{size:.2f}" for size in sent),
        f"{state / GIB:.2f}",
        f"{(memory.peak - state) / GIB:.2f}",
        f"{bounds[binding] * 1e3:.0f}, {binding}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
