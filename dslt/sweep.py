"""A sweep: methods × records × fractions × models × seeds as ordinary runs with stable names.

May import dslt.workdir, dslt.records and the names of target layouts. What a run is called depends
on the run alone, so that a larger sweep finds the runs of a smaller one:

    for run in expand(config, parse):
        print(run.name)    # facts-step_by_step-25pct-seed0
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from dslt.data.target_layout import LABEL
from dslt.errors import InputError
from dslt.records import read_examples
from dslt.workdir import RunDir, judged_steps, read_json_rows

STEPS = "steps"
COMPUTE = "compute"
BUDGETS = (STEPS, COMPUTE)
EXPERIMENT = "experiment.json"  # in a run's directory: what of the sweep it is
# What a sweep itself sets in each run, and the field of SweepConfig that says it.
SET_BY = {
    "pipeline.DataConfig.records": "records",
    "pipeline.DataConfig.augmentation": "augmentation",
    "pipeline.DataConfig.train_fraction": "fractions",
    "train.TrainConfig.seed": "seeds",
    "train.TrainConfig.rationale_weight": "rationale_weights",
}


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What is compared.

    Attributes:
      records: a records file each dataset; every dataset is an experiment of its own.
      variants: a name each records file, where several have the same problems explained otherwise
        (another teacher, other filters, several rationales); '' for the plain one. Methods that
        learn nothing of the teacher are run on the first of them alone. () is no names.
      settings: gin files that name model, optimizer and lengths: one for all, or one each records
        file.
      methods: gin files, such as those under runs/.
      fractions: of the train split (see DataConfig.train_fraction); held-out splits stay whole.
      models: gin files after the setting; () is the setting's own model.
      rationale_weights: a grid of λ for the methods that have a rationale task; () is their own.
      seeds: of parameters, order, dropout and subset. A seed's subsets are nested.
      budgets: `steps` gives every method the setting's number of steps. `compute` gives a method
        without rationale task as many steps as the FLOPs of the two tasks would buy it; the others
        are what it is compared with.
      augmentation: records files whose train problems join those of the methods that learn the
        teacher's labels, in runs of their own; the others of their problems are not judged.
      overrides: bindings for every run, but of what SET_BY names.
    """

    records: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    methods: tuple[str, ...] = (
        "runs/fine_tuning.gin",
        "runs/distillation.gin",
        "runs/step_by_step.gin",
        "runs/step_by_step_teacher.gin",
    )
    fractions: tuple[float, ...] = (1.0,)
    models: tuple[str, ...] = ()
    rationale_weights: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[str, ...] = (STEPS,)
    augmentation: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("records", "settings", "methods", "fractions", "seeds", "budgets"):
            if not getattr(self, name):
                raise InputError(f"SweepConfig.{name} is empty; expected at least one entry")
        if len(self.settings) not in (1, len(self.records)):
            raise InputError(
                f"SweepConfig.settings has {len(self.settings)} files and records has "
                f"{len(self.records)}; expected one setting for all, or one each"
            )
        for variant in self.variants:
            if "/" in variant or variant.startswith("."):
                raise InputError(
                    f"SweepConfig.variants has {variant!r}; expected what a directory can be called"
                )
        if self.variants and len(self.variants) != len(self.records):
            raise InputError(
                f"SweepConfig.variants has {len(self.variants)} names and records has "
                f"{len(self.records)} files; expected one each, or none at all"
            )
        for budget in self.budgets:
            if budget not in BUDGETS:
                raise InputError(
                    f"SweepConfig.budgets has {budget!r}; expected some of {', '.join(BUDGETS)}"
                )
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise InputError(f"SweepConfig.fractions has {fraction}; expected 0 < f <= 1")
        for name in re.findall(r"^\s*([\w.]+)\s*=", "\n".join(self.overrides), re.M):
            if name in SET_BY:
                raise InputError(
                    f"SweepConfig.overrides binds {name}, which the sweep sets in each run; "
                    f"expected SweepConfig.{SET_BY[name]} to say it"
                )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of a sweep.

    Attributes:
      name: of its directory.
      gin_files, overrides: what `dslt train` is given.
      facts: what the report groups by: method, dataset, variant, fraction, model, seed,
        rationale_weight, label_source, budget, is_augmented.
    """

    name: str
    gin_files: tuple[str, ...]
    overrides: tuple[str, ...]
    facts: dict


def expand(
    config: SweepConfig, parse: Callable[[Sequence[str], Sequence[str]], object]
) -> list[Experiment]:
    """All runs, the first seed of everything first.

    Args:
      parse: gin files and overrides to Configs.

    Raises:
      InputError: a file cannot be used, or two runs would have the same name.
    """
    datasets = [_dataset_of(path) for path in config.records]
    variants = config.variants or ("",) * len(datasets)
    _check_told_apart(config.records, datasets, variants)
    settings = config.settings * (len(datasets) if len(config.settings) == 1 else 1)
    read = functools.cache(lambda files: parse(files, config.overrides))
    axes = (config.seeds, config.fractions, range(len(datasets)), config.methods)
    experiments = []
    for seed, fraction, number, method, model in itertools.product(*axes, config.models or ("",)):
        files = tuple(filter(None, (method, settings[number], model)))
        configs = read(files)
        learns_from_teacher = _learns_from_teacher(configs)
        if not learns_from_teacher and datasets[number] in datasets[:number]:
            continue
        for rationale_weight, budget, is_augmented in _choices(config, configs):
            facts = {
                "method": Path(method).stem,
                "dataset": datasets[number],
                "variant": variants[number] if learns_from_teacher else "",
                "fraction": fraction,
                "model": Path(model).stem,
                "seed": seed,
                "rationale_weight": rationale_weight,
                "label_source": configs.data.label_source,
                "budget": budget,
                "is_augmented": is_augmented,
            }
            bindings = {
                "pipeline.DataConfig.records": (config.records[number],),
                "pipeline.DataConfig.augmentation": config.augmentation if is_augmented else (),
                "pipeline.DataConfig.train_fraction": fraction,
                "train.TrainConfig.seed": seed,
                "train.TrainConfig.rationale_weight": rationale_weight,
            }
            overrides = tuple(f"{name} = {value!r}" for name, value in bindings.items())
            name = _name(facts, is_other_weight=rationale_weight != configs.train.rationale_weight)
            experiments.append(Experiment(name, files, (*config.overrides, *overrides), facts))
    _check_names([experiment.name for experiment in experiments])
    return experiments


def _learns_from_teacher(configs) -> bool:
    data = configs.data
    has_rationales = configs.train.rationale_weight > 0 or data.target_layout != LABEL
    return has_rationales or data.label_source == "teacher"


def _choices(config: SweepConfig, configs) -> Iterator[tuple[float, str, bool]]:
    """(λ, budget, whether augmented): the runs of one method on one subset."""
    has_rationale_task = configs.train.rationale_weight > 0
    grid = config.rationale_weights if has_rationale_task else ()
    has_teacher_labels = configs.data.label_source == "teacher"
    return itertools.product(
        grid or (configs.train.rationale_weight,),
        (STEPS,) if has_rationale_task else config.budgets,
        (False, True) if has_teacher_labels and config.augmentation else (False,),
    )


def _name(facts: dict, is_other_weight: bool) -> str:
    parts = (
        facts["dataset"],
        facts["method"],
        facts["variant"],
        facts["model"],
        f"lambda{facts['rationale_weight']:g}" if is_other_weight else "",
        "augmented" if facts["is_augmented"] else "",
        "compute" if facts["budget"] == COMPUTE else "",
        f"{100 * facts['fraction']:g}pct",
        f"seed{facts['seed']}",
    )
    return "-".join(filter(None, parts))


def _dataset_of(path: str) -> str:
    """The dataset of a records file's first row: what its runs are named after."""
    return next(iter(read_examples(path))).dataset


def _check_told_apart(
    records: Sequence[str], datasets: Sequence[str], variants: Sequence[str]
) -> None:
    first: dict[tuple[str, str], str] = {}
    for path, place in zip(records, zip(datasets, variants, strict=True), strict=True):
        if place in first:
            raise InputError(
                f"{first[place]} and {path} both hold {place[0]!r}; expected another dataset, or "
                "another name each in SweepConfig.variants"
            )
        first[place] = path


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"the sweep has two runs named {twice[0]}; expected methods, models and datasets with "
            "different file names, and no entry twice"
        )


def is_done(run: RunDir, splits: Collection[str]) -> bool:
    """Whether a run has finished and every checkpoint that it kept has been judged on each of these
    splits."""
    if run.state() != "finished":
        return False
    return run.checkpoint_steps() <= judged_steps(read_json_rows(run.evaluations), splits)


def equal_compute_steps(num_steps: int, own_flops: float, two_task_flops: float) -> int:
    """Steps that cost, at `own_flops` each, what `num_steps` of both tasks cost; at least one."""
    return max(1, round(num_steps * two_task_flops / own_flops))
