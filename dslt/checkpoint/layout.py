"""What the arrays of a checkpoint mean, as JSON beside them; what differs, with both sides."""

import dataclasses
import typing
from pathlib import Path

from dslt import __version__
from dslt.core.t5 import T5Config
from dslt.errors import InputError

FORMAT_VERSION = 2
READABLE_FORMATS = (1, FORMAT_VERSION)  # 1 has neither digests nor the fields with defaults below

# Fields of T5Config that change how a model runs, not what its parameters are.
_RUNTIME_FIELDS = (
    "dropout_rate", "dtype", "remat", "scan_unroll", "attention", "attention_dropout_rate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the arrays of a checkpoint mean.

    Attributes:
      model: rebuilds the graph definition; _RUNTIME_FIELDS of it are choices, the rest must agree.
      format_version: of this directory layout.
      family: of architectures; the model's fields tell T5 v1.0, v1.1, mT5, ByT5 and umT5 apart.
      is_scanned: whether the layers of a stack are one array, the layer its first axis.
      param_dtype: of the parameters and of the optimizer's moments.
      written_by: the version of dslt; names no difference.
    """

    model: T5Config
    format_version: int = FORMAT_VERSION
    family: str = "t5"
    is_scanned: bool = True
    param_dtype: str = "float32"
    written_by: str = __version__

    def to_json(self) -> dict:
        """A JSON object that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: dict, where: Path) -> "Layout":
        """Raises InputError where a version wrote it that this one does not know, or where it is
        damaged.
        """
        if not isinstance(found, dict):
            raise InputError(f"{where}: the layout is {found!r}; expected an object")
        fields = {field.name for field in dataclasses.fields(cls)}
        model_fields = {field.name for field in dataclasses.fields(T5Config)}
        version, model = found.get("format_version"), found.get("model")
        writer = found.get("written_by", "the version named in the run's run.json")
        if version not in READABLE_FORMATS:
            raise InputError(
                f"{where}: checkpoint format {version!r}; this version of dslt, {__version__}, "
                f"reads {' and '.join(map(str, READABLE_FORMATS))}. Use dslt {writer}"
            )
        if not isinstance(model, dict) or not model.keys() <= model_fields:
            unknown = sorted(model.keys() - model_fields) if isinstance(model, dict) else model
            raise InputError(
                f"{where}: the model's fields {unknown} are unknown to this version of dslt, "
                f"{__version__}. Use dslt {writer}"
            )
        values = {name: found[name] for name in fields & found.keys()} | {"model": None}
        for owner, entries in ((T5Config, model), (cls, values)):
            hints = typing.get_type_hints(owner)
            for name, value in entries.items():
                if name != "model" and not _fits(value, hints[name]):
                    raise InputError(
                        f"{where}: the layout's {name} is {value!r}; expected {hints[name]}"
                    )
        try:
            return cls(**values | {"model": T5Config(**model)})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def differences(self, expected: "Layout") -> list[str]:
        """A line for each field in which arrays of the one are not arrays of the other."""
        sides = []
        for layout in (self, expected):
            fields = dataclasses.asdict(layout)
            model = fields.pop("model")
            shown = {name: fields[name] for name in ("family", "is_scanned", "param_dtype")}
            shown |= {name: model[name] for name in model if name not in _RUNTIME_FIELDS}
            sides.append(shown)
        return [
            f"{name}: found {value}, expected {sides[1][name]}"
            for name, value in sides[0].items()
            if value != sides[1][name]
        ]


def _fits(value: object, hint: type) -> bool:
    """Whether a JSON value is one of a field; a whole number will do for a float."""
    kinds = typing.get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)
