"""Who may import whom: read from the sources, and seen in fresh interpreters.

The tables hold for files that are yet to come too: modules are found by their place in the tree.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What of dslt a wing (a package, or a module at the top) may import. The root package, which holds
# the version alone, and OPEN are open to all; None joins everything.
# Stages are handed batches, and never see SeqIO.
OPEN = ("errors", "files", "strict_json", "terminal")
STAGE = ("core", "checkpoint", "workdir", "metrics", "records", "distributed", "signals")
MAY_IMPORT = {
    "errors": (),
    "files": (),
    "strict_json": (),
    "terminal": (),
    "records": (),
    "metrics": (),
    "workdir": ("records", "metrics"),
    "signals": (),
    "bucket": (),
    "mirror": ("signals", "bucket", "workdir"),
    "model_card": ("workdir", "records", "metrics"),
    "distributed": ("signals",),
    "report": ("report", "workdir", "records", "metrics", "teacher.parse"),
    "core": ("core",),
    "data": ("data", "core.batch", "records", "metrics"),
    "teacher": ("teacher", "records", "metrics"),
    "checkpoint": ("checkpoint", "core"),
    "step_log": ("core", "nonfinite"),
    "train": (*STAGE, "nonfinite", "start", "step_log"),
    "bench": (*STAGE, "train", "start", "bench_reference"),
    "bench_reference": ("core",),
    "plan": ("core", "train", "start", "evaluate"),
    "plan_search": ("core", "plan"),
    "plan_report": ("core", "plan", "plan_search"),
    "sweep": ("workdir", "records", "data.target_layout"),
    "serve": (*STAGE, "serve_engine"),
    "config": None,
    "commands": None,
    "main": None,
}

# What of elsewhere a wing may import besides the standard library, where that is a short list.
MAY_INSTALL = {
    "errors": (),
    "files": (),
    "signals": (),
    "bucket": ("fsspec",),
    "mirror": (),
    "strict_json": (),
    "terminal": (),
    "records": ("numpy",),
    "metrics": ("numpy",),
    "workdir": ("numpy", "tensorboardX", "google"),
    "distributed": ("jax", "numpy"),
    "core": ("jax", "flax", "optax", "numpy"),
}

# The only wings that may name these, inside functions too.
HOMES = {
    "argparse": ("main", "commands"),
    "gin": ("config",),
    "seqio": ("data",),
    "tensorflow": ("data",),
    "tensorflow_datasets": ("data",),
    "orbax": ("checkpoint",),
    "fsspec": ("bucket",),
    "fastapi": ("serve",),
    "uvicorn": ("serve",),
}
NEVER_JAX = ("teacher", "data", "report")


def imported_names(module: str, source: str) -> list[str]:
    """Full names of all that a module imports, wherever in it; relative ones resolved."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
            # `from package import module` names the module; `from module import x` its own self
            is_package = base == "dslt" or (ROOT / base.replace(".", "/")).is_dir()
            is_ours = base.split(".")[0] == "dslt"
            names += [f"{base}.{a.name}" for a in node.names] if is_ours and is_package else [base]
    return names


def find_violations(module: str, source: str) -> list[str]:
    """What a module of dslt imports and may not; `module` is its full dotted name."""
    wing = module.split(".")[1] if "." in module else "dslt"
    violations = []
    for name in imported_names(module, source):
        top, _, inside = name.partition(".")
        if top == "dslt":
            allowed = MAY_IMPORT.get(wing, STAGE)
            is_open = inside in ("", "__version__") or inside.split(".")[0] in OPEN
            if not is_open and allowed is not None:
                is_open = any(is_within(inside, part) for part in allowed)
            if not is_open and allowed is not None:
                violations.append(f"{module} imports {name}; expected of dslt: {allowed}")
        elif top not in sys.stdlib_module_names and top not in MAY_INSTALL.get(wing, (top,)):
            violations.append(f"{module} imports {name}; expected {MAY_INSTALL[wing]} at most")
        if wing not in HOMES.get(top, (wing,)):
            violations.append(f"{module} imports {name}, which belongs to {HOMES[top]}")
        if top in ("jax", "flax", "optax") and wing in NEVER_JAX:
            violations.append(f"{module} imports {name}, and {wing} must run without JAX")
    return violations


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules(pattern: str) -> list[str]:
    """Dotted names of the files of dslt that match, such as `core/*.py`; missing ones are none."""
    paths = sorted((ROOT / "dslt").glob(pattern))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return [name.removesuffix(".__init__") for name in names]


def source_of(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", modules("**/*.py"))
def test_imports_stay_within_bounds(module):
    assert find_violations(module, source_of(module)) == []


def test_the_house_is_found():
    assert {"dslt", "dslt.records", "dslt.core", "dslt.core.t5"} <= set(modules("**/*.py"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dslt.core.t5", "import gin"),
        ("dslt.core.t5", "def load():\n    import gin.tf"),
        ("dslt.core.losses", "import torch"),
        ("dslt.core.losses", "from dslt.data import packing"),
        ("dslt.core.losses", "from dslt.data.packing import plan"),
        ("dslt.core.losses", "from dslt import records"),
        ("dslt.core.losses", "from ..data import packing"),
        ("dslt.core.losses", "from .. import data"),
        ("dslt.data.packing", "from dslt.core import t5"),
        ("dslt.data.packing", "import dslt.core.t5 as t5"),
        ("dslt.data.packing", "from dslt.core import batch, t5"),
        ("dslt.data.packing", "from jax import numpy as jnp"),
        ("dslt.data.packing", "from dslt.teacher.parse import parse_completion"),
        ("dslt.teacher.client", "from jax.numpy import array"),
        ("dslt.teacher.client", "from dslt.core.batch import EOS_ID"),
        ("dslt.checkpoint.manager", "from dslt.workdir import RunDir"),
        ("dslt.checkpoint.hf_t5", "import tensorflow as tf"),
        ("dslt.train", "from dslt.data.pipeline import TrainStream"),
        ("dslt.train", "try:\n    import seqio\nexcept ImportError:\n    seqio = None"),
        ("dslt.evaluate", "from dslt import config"),
        ("dslt.evaluate", "import argparse"),
        ("dslt.a_file_to_come", "from dslt.data import tasks"),
        ("dslt.records", "import pandas"),
        ("dslt.metrics", "from dslt.core.batch import PAD_ID"),
        ("dslt.report.page", "import jax"),
        ("dslt.report.page", "from dslt.evaluate import best_row"),
        ("dslt.report.rationales", "from dslt.teacher import extract"),
        ("dslt.errors", "from dslt import records"),
        ("dslt", "from dslt import train"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert find_violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dslt.core.losses", "from dslt.core import batch\nimport jax.numpy as jnp"),
        ("dslt.core.losses", "from .batch import Batch\nfrom . import batch"),
        ("dslt.data.packing", "from dslt.core.batch import Batch"),
        ("dslt.data.packing", "from dslt.core import batch"),
        ("dslt.data.tasks", "import seqio\nfrom dslt import metrics, records"),
        ("dslt.teacher.client", "from dslt.errors import InputError\nimport json"),
        ("dslt.checkpoint.manager", "import orbax.checkpoint as ocp\nfrom dslt.core import t5"),
        ("dslt.workdir", "from dslt import __version__"),
        ("dslt.train", "from dslt.checkpoint import manager\nfrom dslt.core import t5"),
        ("dslt.main", "from dslt import config\nfrom dslt.data import tasks\nimport argparse"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert find_violations(module, source) == []


TENSORFLOW = ("tensorflow", "tensorflow_datasets", "seqio", "gin", "torch")
# What is imported together in one fresh interpreter, and the packages that must not be loaded then.
LIGHT = {
    "rows": (
        ["records.py", "metrics.py", "workdir.py", "errors.py", "files.py"],
        ("jax", *TENSORFLOW),
    ),
    "batch": (["core/batch.py"], ("jax", "flax", *TENSORFLOW)),
    "core": (["core/*.py"], ("transformers", "orbax.checkpoint", "dslt.data", *TENSORFLOW)),
    "teacher": (["teacher/*.py"], ("jax", *TENSORFLOW)),
    "data": (
        [
            "data/packing.py",
            "data/row_shape.py",
            "data/token_cache.py",
            "data/vocabulary.py",
            "data/pipeline.py",
        ],
        ("jax", *TENSORFLOW),
    ),
    "report": (["report/*.py"], ("jax", "flax", "orbax.checkpoint", *TENSORFLOW)),
    "stages": (["checkpoint/*.py", "train.py", "evaluate.py"], ("dslt.data", *TENSORFLOW)),
    "main": (
        ["main.py", "commands/*.py"],
        ("jax", "numpy", "fsspec", "dslt.core", "dslt.data", *TENSORFLOW),
    ),
}
LIST_LOADED = "import importlib, json, sys; [importlib.import_module(m) for m in sys.argv[1:]]; "
LIST_LOADED += "print(json.dumps(sorted(sys.modules)))"


def loaded_after(names: list[str]) -> set[str]:
    """The modules in memory after a fresh interpreter has imported `names`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIST_LOADED, *names]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("group", LIGHT)
def test_a_fresh_interpreter_loads_no_more_than_it_needs(group):
    patterns, forbidden = LIGHT[group]
    names = [name for pattern in patterns for name in modules(pattern)]
    if not names:
        pytest.skip(f"none of {patterns} is written yet")
    loaded = loaded_after(names)
    assert set(names) <= loaded
    assert not loaded & set(forbidden)


def test_a_fresh_interpreter_is_seen_to_load():
    """The other side of the test above: what is imported does show."""
    assert {"dslt.core.losses", "jax"} <= loaded_after(["dslt.core.losses"])
