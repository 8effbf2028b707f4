"""gin files and overrides → one frozen dataclass each stage reads. The only file that knows gin.

    configs = parse(["runs/step_by_step.gin"], ["train.TrainConfig.rationale_weight = 0.5"])
    configs.train.rationale_weight

A gin file begins with `from __gin__ import dynamic_registration` and the imports of what it binds,
and binds by full name: `t5.T5Config.d_model = 64`. Macros and scopes are not used: a mistyped macro
is silently ignored, a mistyped parameter is an error. Overrides need no imports.
"""

import dataclasses
import difflib
import re
import sys
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin
from gin import config_parser

from dslt.core.optimizer import OptimizerConfig, is_decaying
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.data.pipeline import DataConfig
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.sweep import SweepConfig
from dslt.train import TrainConfig
from dslt.workdir import RunDir

MAX_INT = 2**31 - 1  # steps, sizes and seeds are int32 on the devices


@dataclasses.dataclass(frozen=True)
class Configs:
    """All that can be configured, and `text`, the operative config that says it again."""

    train: TrainConfig
    model: T5Config
    optimizer: OptimizerConfig
    mesh: MeshConfig
    data: DataConfig
    evaluate: EvalConfig
    text: str


def gin_directory() -> Path:
    """Where the shipped gin files lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "gin"
    return inside if inside.is_dir() else package.parent / "gin"


def parse(files: Sequence[str], overrides: Sequence[str] = ()) -> Configs:
    """Reads gin files, each looked for here and among the shipped ones, then the overrides.

    Args:
      files: later ones override earlier ones.
      overrides: bindings such as `t5.T5Config.num_layers = 4`.

    Raises:
      InputError: a file, a name, a value or its type is wrong.
    """
    fields = dataclasses.fields(Configs)[:-1]
    built = _build([field.type for field in fields], files, overrides)
    by_name = {field.name: value for field, value in zip(fields, built, strict=True)}
    return Configs(**by_name, text=gin.operative_config_str())


def parse_sweep(files: Sequence[str], overrides: Sequence[str] = ()) -> SweepConfig:
    """As `parse`, of the files that describe a sweep; what its runs share is in its `overrides`."""
    return _build([SweepConfig], files, overrides)[0]


def _build(classes: Sequence[type], files: Sequence[str], overrides: Sequence[str]) -> list:
    """One instance of each class, from the files and then the overrides."""
    gin.clear_config()
    header = _header(classes)
    _parse_text("defaults", "\n".join([header, *_defaults(classes)]), classes)
    for file in files:
        _parse_text(file, _read_with_includes(file), classes)
    for override in overrides:
        _parse_text(f"override {override!r}", header + override, classes)
    _check_names(gin.config_str())
    built = []
    for each in classes:
        check_types(each, gin.get_bindings(each))
        try:
            built.append(gin.get_configurable(each)())
        except ValueError as error:  # what the config's own checks found; gin adds lines to it
            raise InputError(str(error).splitlines()[0]) from None
    return built


# What a run may be resumed with otherwise: it changes what is kept, or where and in which order
# the same is computed, and of the result at most the rounding. `*`: all fields.
MAY_CHANGE = {
    "train": ("save_every_steps", "keep_checkpoints", "log_every_steps", "on_nonfinite"),
    "model": ("remat", "scan_unroll"),
    "mesh": "*",
    "data": ("cache_dir",),
    "evaluate": "*",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that a run has otherwise than it is asked for.

    Attributes:
      name: as gin files have it.
      was: in the run's directory.
      now: asked for.
      is_allowed: whether a run may go on with it.
    """

    name: str
    was: object
    now: object
    is_allowed: bool

    def __str__(self) -> str:
        return f"{self.name}: was {self.was!r}, now {self.now!r}"


def find_changes(was: Configs, now: Configs) -> list[Change]:
    """The fields whose values differ."""
    changes = []
    fields = dataclasses.fields(Configs)[:-1]
    for stage, field in zip(_names([field.type for field in fields]), fields, strict=True):
        before, after = getattr(was, field.name), getattr(now, field.name)
        allowed = MAY_CHANGE.get(field.name, ())
        for entry in dataclasses.fields(field.type):
            old, new = getattr(before, entry.name), getattr(after, entry.name)
            if old != new:
                is_allowed = allowed == "*" or entry.name in allowed
                if entry.name == "num_steps" and field.name == "train":
                    is_allowed = not is_decaying(now.optimizer)
                changes.append(Change(f"{stage}.{entry.name}", old, new, is_allowed))
    return changes


def check_run(run: RunDir, configs: Configs) -> list[Change]:
    """Holds the config against that of a run which has trained already.

    Returns:
      What differs and may: the run goes on with it.

    Raises:
      InputError: the directory is of a run with another config; the difference is shown. Or its
        config.gin is of no run.
    """
    if not run.has_checkpoints():
        every = configs.train.save_every_steps
        if run.evaluations.exists() or run.best.exists() or run.has_saved(every):
            raise InputError(
                f"{run.path}: holds an earlier training, and its checkpoints are gone; restore "
                "them from a copy, or choose another --run_dir to begin anew"
            )
        # A start that was cut off may have left the config alone, but then the same.
        is_alone = run.config.exists() and not run.info.exists()
        if is_alone and _read(run.config) != configs.text:
            raise InputError(
                f"{run.config}: there is no run.json beside it, so it is no run's, and the run's "
                "own config would replace it; choose another --run_dir, or another name for the "
                "file"
            )
        return []
    if not run.config.exists():
        raise InputError(
            f"{run.path}: has checkpoints but no config.gin; use it as train.TrainConfig.init_from "
            "with another --run_dir"
        )
    changes = find_changes(parse([str(run.config)]), configs)
    refused = [str(change) for change in changes if not change.is_allowed]
    if refused:
        raise InputError(
            f"{run.config}: this directory is of a run with another config:\n  "
            + "\n  ".join(refused)
            + "\nAsk for the same config to resume it. To go on from its newest checkpoint with "
            "the new config, and leave this run as it is, branch: give another --run_dir and "
            f"--branch_from {run.path}"
        )
    return changes


def _parse_text(name: str, text: str, classes: Sequence[type]) -> None:
    """Adds the bindings of `text`; `name` is what an error calls it."""
    try:
        _check_statements(text, classes)
        gin.parse_config(text)
    except (AttributeError, NameError) as error:
        raise InputError(
            f"{name}: {error}. Expected one of: {', '.join(_names(classes))}"
        ) from None
    except (OSError, ImportError, ValueError, TypeError, LookupError, SyntaxError) as error:
        raise InputError(f"{name}: {error}") from None
    except (tokenize.TokenError, RecursionError, MemoryError) as error:  # of Python's own readers
        raise InputError(f"{name}: is no gin file ({error})") from None


class _NoReferences(config_parser.ParserDelegate):
    """gin calls what an `@` names, whatever it is: a config file could run anything."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        raise InputError(f"found @{scoped_configurable_name}; expected a value, nothing is called")

    def macro(self, macro_name):
        raise InputError(f"found %{macro_name}; expected a value, macros are not used")


def _check_statements(text: str, classes: Sequence[type], is_included: bool = False) -> None:
    """Raises InputError for what is more than binding values: gin would import and call anything.

    And for a field that its class does not have, since gin does not say which there are.

    Python's tokenizer raises other errors for what is no gin file.
    """
    imports = _header(classes).splitlines()
    for statement in config_parser.ConfigParser(text, _NoReferences()):
        if isinstance(statement, config_parser.ImportStatement):
            if statement.format() not in imports:
                raise InputError(
                    f"found `{statement.format()}`; expected one of: {'; '.join(imports)}"
                )
        elif isinstance(statement, config_parser.IncludeStatement):
            path = Path(statement.filename)
            if is_included or not path.is_absolute():
                raise InputError(
                    f"found the include of {statement.filename!r}; expected one that begins its "
                    "line, in a file that is not itself included"
                )
            _check_statements(_read(path), classes, is_included=True)
        elif isinstance(statement, config_parser.BindingStatement):
            _check_field(statement.selector, statement.arg_name, classes)


def _check_field(class_name: str, name: str, classes: Sequence[type]) -> None:
    known = dict(zip(_names(classes), classes, strict=True)).get(class_name)
    names = [field.name for field in dataclasses.fields(known)] if known else [name]
    if name in names:
        return
    near = difflib.get_close_matches(name, names)
    raise InputError(
        f"{class_name} has no field {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(names)}")
    )


def _read_with_includes(name: str) -> str:
    """The text of a gin file, its includes made absolute.

    gin itself also looks for files in Python packages, and a directory `runs` in the working
    directory passes for one.
    """
    return re.sub(
        r"^include\s+(['\"])(.*?)\1",
        lambda found: f"include {str(_find(found[2]))!r}",
        _read(_find(name)),
        flags=re.M,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a gin file") from None


def _find(name: str) -> Path:
    """A gin file of this name: here, else among the shipped ones."""
    for path in (Path(name).absolute(), gin_directory() / name):
        if path.is_file():
            return path
    shipped = sorted(
        str(path.relative_to(gin_directory())) for path in gin_directory().rglob("*.gin")
    )
    near = difflib.get_close_matches(name, shipped)
    raise InputError(
        f"{name}: is no file here and no shipped gin file. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"Shipped gin files: {', '.join(shipped)}"
    )


def _check_names(text: str) -> None:
    """Raises InputError for what gin accepts and nobody reads: macros and scoped bindings."""
    for name in re.findall(r"^([\w./]+) = ", text, re.M):
        if "." not in name or "/" in name:
            raise InputError(
                f"{name} binds nothing here; write the full name, such as "
                "train.TrainConfig.rationale_weight (macros and scopes are not used)"
            )


def check_types(config_type: type, values: dict) -> None:
    """Raises InputError for the first value that is not of its field's annotated type."""
    hints = typing.get_type_hints(config_type)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", None) or str(hints[name])
            raise InputError(
                f"{config_type.__name__}.{name} is {value!r}; expected {expected} (an integer of "
                f"at most {MAX_INT:,}, a finite number, a text without NUL)"
            )


def _fits(value, hint) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        is_sequence = isinstance(value, tuple | list)
        return is_sequence and all(_fits(entry, arguments[0]) for entry in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(part, part_hint)
            for entry in value.items()
            for part, part_hint in zip(entry, arguments, strict=True)
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and abs(value) <= MAX_INT
    if hint is str:
        return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
    return hint is typing.Any or isinstance(value, hint)


def _names(classes: Sequence[type]) -> list[str]:
    """How gin files call the configs: `train.TrainConfig` and so on."""
    return [f"{each.__module__.rpartition('.')[2]}.{each.__name__}" for each in classes]


def _header(classes: Sequence[type]) -> str:
    """In front of overrides, so that they may name any config without an import of their own."""
    modules = [each.__module__.rpartition(".") for each in classes]
    imports = [f"from {package} import {module}" for package, _, module in modules]
    return "\n".join(["from __gin__ import dynamic_registration", *imports, ""])


def _defaults(classes: Sequence[type]) -> list[str]:
    """A binding for each default: gin knows a class, and reports its values, once it is bound."""
    return [
        f"{name}.{entry.name} = {entry.default!r}"
        for name, each in zip(_names(classes), classes, strict=True)
        for entry in dataclasses.fields(each)
    ]
