"""Finds runs below directories and reads them, the unfinished and the broken ones too.

May import dslt.workdir and dslt.records. What a run's files hold is hostile: nothing in them ends
the report, everything that keeps a run out of the comparison is a sentence in its `problems`.

    runs, passed_over = find_runs([Path("runs/sweep")])
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dslt.errors import InputError
from dslt.records import Prediction, read_predictions
from dslt.workdir import OVERRIDES, RunDir, best_row, read_config

EXPERIMENT = "experiment.json"
# Any of these makes a directory a run's.
RUN_FILES = (EXPERIMENT, "run.json", "config.gin", "metrics.jsonl", "evaluations.jsonl")
MAX_PROBLEM_CHARACTERS = 300
ONE_TARGET = ("rationale_label", "label_rationale")  # what target_layout may say beside `label`
MAX_NUMBER = 10**15  # larger ones are no counts, losses or rates, and overflow in a picture's axes

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
      name: its path below the directory that was given, and of what is above it as much as tells it
        from the other runs.
      path: its directory.
      settings: `method`, `fraction`, `model`, `seed`, `rationale_weight` and whatever else
        experiment.json says; from the run's config where it says nothing.
      config: the bindings of config.gin by their full names.
      info: run.json.
      metrics: rows of metrics.jsonl, numbers alone; each has a `step`.
      evaluations: rows of evaluations.jsonl, likewise.
      best_step: of the checkpoint that is best on validation.
      predictions: of that checkpoint.
      problems: why the run does not enter the comparison; () where it does.
    """

    name: str
    path: Path
    settings: Mapping[str, str | int | float]
    config: Mapping
    info: Mapping
    metrics: tuple[Mapping[str, float], ...]
    evaluations: tuple[Mapping[str, float], ...]
    best_step: int | None
    predictions: tuple[Prediction, ...]
    problems: tuple[str, ...]

    @property
    def num_params(self) -> int | None:
        """Of the student."""
        found = self.info.get("num_params")
        return int(found) if _is_number(found) and found > 0 else None

    @property
    def datasets(self) -> str:
        """Of its predictions, or what it says of itself where it has none."""
        names = sorted({prediction.dataset for prediction in self.predictions})
        return " + ".join(names) or str(self.settings.get("dataset", "unknown"))


def is_run(path: Path) -> bool:
    """Whether it is a run's directory, of whatever state."""
    return any(os.path.exists(path / file) for file in RUN_FILES)  # Path's own raises


def find_runs(
    paths: Sequence[Path], skip: Path | None = None
) -> tuple[list[Run], list[tuple[str, str]]]:
    """Reads every run at or below `paths`, in the order of their names.

    Args:
      skip: a directory that is nobody's run: the report's own.

    Returns:
      The runs, and (directory, reason) for each directory in which there is none.

    Raises:
      InputError: a path is no directory, or there is no run at all.
    """
    names: dict[Path, str] = {}
    reasons: dict[Path, str] = {}
    for given in paths:
        path = RunDir(given).path  # refuses gs://
        if not path.is_dir():
            raise InputError(f"{path}: is no directory; expected a run's, or one that holds runs")
        for directory, has_run in _walk(path):
            if skip and directory.resolve() == skip.resolve():
                continue
            inside = directory.relative_to(path)
            name = printable(directory.resolve().name if directory == path else str(inside))
            if len(paths) > 1 and directory != path:
                name = f"{printable(path.name)}/{name}"
            names.setdefault(directory.resolve(), name)
            if not has_run:
                reasons[directory.resolve()] = _why_no_run(directory)
    names = _tell_apart(names)
    runs = [read_run(path, name) for path, name in names.items() if path not in reasons]
    if not runs:
        raise InputError(
            f"{', '.join(map(str, paths))}: holds no run; expected directories of `dslt train` "
            f"(with one of {', '.join(RUN_FILES)})"
        )
    passed_over = sorted((names[path], reason) for path, reason in reasons.items())
    return sorted(runs, key=lambda run: _natural(run.name)), passed_over


def _why_no_run(directory: Path) -> str:
    if not os.access(directory, os.R_OK | os.X_OK):
        return "may not be read"
    return f"has none of {', '.join(RUN_FILES)}" if any(directory.iterdir()) else "is empty"


def _tell_apart(names: Mapping[Path, str]) -> dict[Path, str]:
    """The names of directories; those of several become the ends of their paths that differ."""
    names = dict(names)
    for length in range(2, max((len(path.parts) for path in names), default=0) + 1):
        counts = collections.Counter(names.values())
        names |= {
            path: printable(str(Path(*path.parts[-length:])))
            for path, name in names.items()
            if counts[name] > 1
        }
    return names


def _walk(path: Path) -> Iterator[tuple[Path, bool]]:
    """(directory, whether it is a run) for runs, and for the topmost directories without any.

    Hidden directories are nobody's run.
    """
    if is_run(path):
        yield path, True
        return
    try:
        children = sorted(
            child
            for child in path.iterdir()
            if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
        )
    except OSError:
        children = []
    below = [entry for child in children for entry in _walk(child)]
    yield from below if any(has_run for _, has_run in below) else [(path, False)]


def read_run(path: Path, name: str) -> Run:
    """Reads one run; whatever is wrong with it is in its `problems`."""
    run, problems = RunDir(path), []
    info = _read_object(run.info, problems, "training has not begun, or died at once")
    config = read_config(run.config)
    given = _read_object(path / EXPERIMENT, problems) if (path / EXPERIMENT).exists() else {}
    settings = _derived_settings(info, config) | _flat(given, problems)
    metrics = read_numbers(run.metrics, problems)
    evaluations = read_numbers(run.evaluations, problems)
    best = best_row(evaluations)
    predictions = ()
    _check_progress(info, config, evaluations, best, problems)
    if best is not None:
        try:
            predictions = tuple(
                read_predictions(run.evaluation(int(best["step"])) / "predictions.jsonl")
            )
        except (InputError, OSError) as error:
            problems.append(_shorten(error))
    return Run(
        name=name,
        path=path,
        settings=settings,
        config=config,
        info=info,
        metrics=tuple(metrics),
        evaluations=tuple(evaluations),
        best_step=None if best is None else int(best["step"]),
        predictions=predictions,
        problems=tuple(problems),
    )


def read_numbers(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """Rows of a JSONL file, of each its numbers up to MAX_NUMBER, and what `best_row` compares by;
    a row needs a `step` above 0.

    A last line without its newline was cut off by a kill and is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(_shorten(f"{path.name}: cannot be read ({error})"))
        return []
    rows, broken = {}, []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            found = json.loads(line)
            row = {name: value for name, value in found.items() if _is_number(value)}
            row |= {OVERRIDES: str(found[OVERRIDES])} if OVERRIDES in found else {}
            rows[int(row["step"])] = row
        except (ValueError, RecursionError, AttributeError, KeyError):
            broken.append(number)
    if broken:
        problems.append(
            f"{path.name}:{broken[0]}: no JSON object with a step"
            + (f"; likewise {len(broken) - 1} more lines" if len(broken) > 1 else "")
        )
    return [rows[step] for step in sorted(rows) if step > 0]


def printable(text: str) -> str:
    """Text that UTF-8 can hold and no terminal obeys: half surrogate pairs, also those of file
    names, become `?`, and control characters `\ufffd`."""
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def _check_progress(info, config, evaluations, best, problems: list[str]) -> None:
    """Appends why the run's best checkpoint may not be known yet."""
    state, num_steps = info.get("state"), config.get("train.TrainConfig.num_steps")
    judged = int(evaluations[-1]["step"]) if evaluations else 0
    if info and state != "finished":
        state = printable(str(state))
        said = {"running": "is still training, or was killed", "stopped": "was stopped"}
        problems.append(
            f"unfinished: {said.get(state, f'state is {state!r}')}; the same "
            "`dslt train` resumes it"
        )
    elif info and not evaluations:
        problems.append("not judged yet: no evaluations.jsonl; run `dslt evaluate --run_dir` on it")
    elif info and _is_number(num_steps) and judged < num_steps:
        problems.append(
            f"not judged to its end: step {judged} of {num_steps}; run `dslt evaluate --run_dir`"
        )
    if evaluations and best is None:
        problems.append("no validation split was judged: the best checkpoint cannot be chosen")


def _derived_settings(info: Mapping, config: Mapping) -> dict:
    """What a run that was started by hand is, as far as its own files say it.

    What only a sweep can say is as in its plain runs, so that both are on one line.
    """
    settings = {"method": "unknown", "model": "unknown", "fraction": 1.0, "seed": 0}
    weight = info.get("rationale_weight", config.get("train.TrainConfig.rationale_weight"))
    if _is_number(weight):
        settings |= {"rationale_weight": weight, "method": _derived_method(weight, config)}
    if isinstance(source := config.get("pipeline.DataConfig.label_source"), str):
        settings["label_source"] = printable(source)
    fraction = config.get("pipeline.DataConfig.train_fraction")
    if _is_number(fraction) and 0 < fraction <= 1:
        settings["fraction"] = fraction
    if _is_number(info.get("seed")):
        settings["seed"] = info["seed"]
    if _is_number(info.get("num_params")):
        settings["model"] = f"{info['num_params']:,} parameters"
    is_augmented = bool(config.get("pipeline.DataConfig.augmentation"))
    return settings | {"variant": "", "budget": "steps", "is_augmented": str(is_augmented)}


def _derived_method(weight: float, config: Mapping) -> str:
    """The name of the file of gin/runs that makes such a run; several additions are all named."""
    is_teacher = config.get("pipeline.DataConfig.label_source") == "teacher"
    layout = config.get("pipeline.DataConfig.target_layout")
    if not weight and layout not in ONE_TARGET:
        return "distillation" if is_teacher else "fine_tuning"
    consistency = config.get("train.TrainConfig.consistency_weight")
    additions = {
        "_shared": weight and config.get("pipeline.DataConfig.shared_encoder") is True,
        "_shuffled": weight and config.get("pipeline.DataConfig.shuffle_rationales") is True,
        "_consistent": _is_number(consistency) and consistency > 0,
        "_teacher": is_teacher,
    }
    named = "".join(name for name, is_there in additions.items() if is_there)
    return ("step_by_step" if weight else layout) + named


def _flat(given: Mapping, problems: list[str]) -> dict:
    """The strings and numbers of experiment.json; a problem for each other value."""
    settings = {}
    for name, value in given.items():
        if isinstance(value, str | bool):
            settings[printable(name)] = printable(str(value))
        elif _is_number(value):
            settings[printable(name)] = value
        elif value is not None:
            problems.append(
                _shorten(f"{EXPERIMENT}: {name!r} is {value!r}; expected a string or a number")
            )
    fraction = settings.get("fraction", 1.0)
    if not _is_number(fraction) or not 0 < fraction <= 1:
        problems.append(
            _shorten(f"{EXPERIMENT}: fraction is {fraction!r}; expected a number in (0, 1]")
        )
        settings["fraction"] = 1.0
    for name in ("method", "model", "seed"):
        if settings.get(name) == "":
            del settings[name]
    return settings


def _read_object(path: Path, problems: list[str], why_missing: str = "") -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problems.append(f"{path.name}: expected a JSON object")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing: {why_missing}")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(_shorten(f"{path.name}: cannot be read as JSON ({error})"))
    return {}


def _is_number(value) -> bool:
    """Whether it is a number that a run can have measured; what is not finite is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_NUMBER <= value <= MAX_NUMBER


def _shorten(error) -> str:
    text = printable(" ".join(str(error).split()))
    cut = text[:MAX_PROBLEM_CHARACTERS]
    return cut if cut == text else cut + " …"


def _natural(name: str) -> list:
    """Sorts `s10` behind `s9`, and `0.25` before `0.5`."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", name)  # every other part is a number
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]
