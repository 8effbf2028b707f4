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
from collections.abc import Sequence
from pathlib import Path

import gin
from gin import config_parser

from dslt.core.optimizer import OptimizerConfig
from dslt.core.sharding import MeshConfig
from dslt.core.t5 import T5Config
from dslt.data.pipeline import DataConfig
from dslt.errors import InputError
from dslt.evaluate import EvalConfig
from dslt.train import TrainConfig
from dslt.workdir import RunDir

# In front of overrides, so that they may name any config without an import of their own.
OVERRIDE_HEADER = """\
from __gin__ import dynamic_registration
from dslt import evaluate
from dslt import train
from dslt.core import optimizer
from dslt.core import sharding
from dslt.core import t5
from dslt.data import pipeline
"""
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
    gin.clear_config()
    _parse_text("defaults", "\n".join([OVERRIDE_HEADER, *_defaults()]))
    for file in files:
        _parse_text(file, _read_with_includes(file))
    for override in overrides:
        _parse_text(f"override {override!r}", OVERRIDE_HEADER + override)
    _check_names(gin.config_str())
    built = {}
    for field in dataclasses.fields(Configs)[:-1]:
        check_types(field.type, gin.get_bindings(field.type))
        try:
            built[field.name] = gin.get_configurable(field.type)()
        except ValueError as error:  # what the config's own checks found; gin adds lines to it
            raise InputError(str(error).splitlines()[0]) from None
    return Configs(**built, text=gin.operative_config_str())


def check_run(run: RunDir, configs: Configs) -> None:
    """Holds the config against that of a run which has trained already.

    Raises:
      InputError: the directory is of a run with another config; the difference is shown.
    """
    if not run.has_checkpoints():
        if run.evaluations.exists() or run.best.exists():
            raise InputError(
                f"{run.path}: holds evaluations of an earlier training whose checkpoints are gone; "
                "choose another --run_dir"
            )
        return
    if not run.config.exists():
        raise InputError(
            f"{run.path}: has checkpoints but no config.gin; use it as train.TrainConfig.init_from "
            "with another --run_dir"
        )
    found = run.config.read_text(encoding="utf-8").splitlines()
    difference = difflib.unified_diff(
        found, configs.text.splitlines(), "in the directory", "asked for", lineterm="", n=0
    )
    changed = [line for line in difference if not line.startswith("@@")]
    if changed:
        raise InputError(
            f"{run.config}: this directory is of a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --run_dir, or ask for the same config to resume."
        )


def _parse_text(name: str, text: str) -> None:
    """Adds the bindings of `text`; `name` is what an error calls it."""
    try:
        _check_statements(text)
        gin.parse_config(text)
    except (AttributeError, NameError) as error:
        raise InputError(f"{name}: {error}. Expected one of: {', '.join(_names())}") from None
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


def _check_statements(text: str, is_included: bool = False) -> None:
    """Raises InputError for what is more than binding values: gin would import and call anything.

    Python's tokenizer raises other errors for what is no gin file.
    """
    for statement in config_parser.ConfigParser(text, _NoReferences()):
        if isinstance(statement, config_parser.ImportStatement):
            if statement.format() not in OVERRIDE_HEADER.splitlines():
                raise InputError(
                    f"found `{statement.format()}`; expected one of: "
                    + "; ".join(OVERRIDE_HEADER.splitlines())
                )
        elif isinstance(statement, config_parser.IncludeStatement):
            path = Path(statement.filename)
            if is_included or not path.is_absolute():
                raise InputError(
                    f"found the include of {statement.filename!r}; expected one that begins its "
                    "line, in a file that is not itself included"
                )
            _check_statements(_read(path), is_included=True)


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
        return path.read_text(encoding="utf-8")
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
    raise InputError(
        f"{name}: is no file here and no shipped gin file. Shipped gin files: {', '.join(shipped)}"
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
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and abs(value) <= MAX_INT
    if hint is str:
        return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
    return hint is typing.Any or isinstance(value, hint)


def _names() -> list[str]:
    """How gin files call the configs: `train.TrainConfig` and so on."""
    return [
        f"{field.type.__module__.rpartition('.')[2]}.{field.type.__name__}"
        for field in dataclasses.fields(Configs)[:-1]
    ]


def _defaults() -> list[str]:
    """A binding for each default: gin knows a class, and reports its values, once it is bound."""
    return [
        f"{name}.{entry.name} = {entry.default!r}"
        for name, field in zip(_names(), dataclasses.fields(Configs)[:-1], strict=True)
        for entry in dataclasses.fields(field.type)
    ]
