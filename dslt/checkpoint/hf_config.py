"""config.json of a Hugging Face T5: to a T5Config and back, and the JSON files beside it.

May import `core`. The model types are t5 (T5, FLAN-T5, ByT5), mt5 and umt5.

    config = parse_config(Path("flan-t5-small/config.json"), lambda: True)
"""

import json
from collections.abc import Callable
from pathlib import Path

from dslt import strict_json
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.core.t5 import T5Config
from dslt.errors import InputError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MODEL_TYPES = ("t5", "mt5", "umt5")

_REQUIRED_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
_OPTIONAL_FIELDS = {  # old files leave them out; the values are those of transformers
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
}
TOKEN_IDS = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "decoder_start_token_id": PAD_ID}
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj: dense_act_fn


def parse_config(path: Path, has_own_lm_head: Callable[[], bool]) -> T5Config:
    """The T5Config of a config.json; its run-time fields (`dtype`, …) have defaults.

    Args:
      has_own_lm_head: whether the weights hold an output projection that is not the embedding;
        asked only where config.json leaves it open.

    Raises:
      InputError: the file is missing or cannot be read, or the model is no T5 that dslt can run.
    """
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    _check_is_t5(path, fields)
    model_type = fields["model_type"]
    is_untied_by_name = fields.get("tie_word_embeddings") is False
    is_scaled = model_type != "mt5" and not is_untied_by_name
    if model_type == "t5" and "scale_decoder_outputs" in fields:
        is_scaled = bool(fields["scale_decoder_outputs"])
    try:
        return T5Config(
            **{name: fields[name] for name in _REQUIRED_FIELDS},
            **{name: fields.get(name, value) for name, value in _OPTIONAL_FIELDS.items()},
            num_decoder_layers=fields.get("num_decoder_layers") or fields["num_layers"],
            feed_forward_proj=_feed_forward_proj(fields),
            tie_word_embeddings=not is_untied_by_name and not has_own_lm_head(),
            scale_decoder_outputs=is_scaled,
            relative_bias_per_layer=model_type == "umt5",
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def config_fields(config: T5Config) -> dict:
    """The content of config.json for a T5Config.

    transformers 4 knows only scaled tied and unscaled untied outputs; the other two are said in the
    way of transformers 5, by `scale_decoder_outputs`.

    Raises:
      InputError: for a umT5 with a tied, unscaled output, which transformers always scales.
    """
    is_umt5 = config.relative_bias_per_layer
    is_tied = config.tie_word_embeddings
    if is_umt5 and is_tied and not config.scale_decoder_outputs:
        raise InputError(
            "a T5Config with relative_bias_per_layer, tie_word_embeddings and without "
            "scale_decoder_outputs has no Hugging Face form: found a tied umT5 that does not scale "
            "its output, expected one that does, as transformers' always do. Train it with "
            "T5Config.scale_decoder_outputs = True or T5Config.tie_word_embeddings = False"
        )
    names = (*_REQUIRED_FIELDS, "num_decoder_layers", *_OPTIONAL_FIELDS, "feed_forward_proj")
    fields = {
        "architectures": [
            "UMT5ForConditionalGeneration" if is_umt5 else "T5ForConditionalGeneration"
        ],
        "model_type": "umt5" if is_umt5 else "t5",
        **{name: getattr(config, name) for name in names},
        "is_gated_act": config.feed_forward_proj.startswith("gated-"),
        "dense_act_fn": _ACTIVATIONS[config.feed_forward_proj],
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": is_tied,
        **TOKEN_IDS,
    }
    if is_umt5:  # its scale follows `tie_word_embeddings`, and the tying the tensors
        fields["tie_word_embeddings"] = config.scale_decoder_outputs
    else:
        fields["scale_decoder_outputs"] = config.scale_decoder_outputs
    return fields


def _check_is_t5(path: Path, fields: dict) -> None:
    """Raises InputError with all that keeps config.json from being a T5 that dslt can run."""
    found_type = fields.get("model_type")
    if found_type not in MODEL_TYPES:
        raise InputError(
            f"{path}: model_type is {found_type!r}; expected one of {', '.join(MODEL_TYPES)}"
        )
    faults = [f"field {name!r} is missing" for name in _REQUIRED_FIELDS if name not in fields]
    for name in (*_REQUIRED_FIELDS, "num_decoder_layers", *_OPTIONAL_FIELDS):
        value = fields.get(name)
        is_float = name in ("dropout_rate", "layer_norm_epsilon")
        allowed = (int, float) if is_float else (int,)
        in_range = type(value) in allowed and (0 <= value < 1 if is_float else 0 < value < 2**31)
        if value is not None and not in_range:
            kind = "a number from 0 to 1" if is_float else "a positive integer"
            faults.append(f"field {name!r} is {value!r}; expected {kind}")
    proj = _feed_forward_proj(fields)
    if not isinstance(proj, str) or proj not in _ACTIVATIONS:
        faults.append(f"feed_forward_proj is {proj!r}; expected {' or '.join(_ACTIVATIONS)}")
    elif fields.get("dense_act_fn") not in (None, _ACTIVATIONS[proj]):
        faults.append(
            f"dense_act_fn is {fields['dense_act_fn']!r}; expected {_ACTIVATIONS[proj]!r} with "
            f"feed_forward_proj {proj!r}"
        )
    for name, expected in TOKEN_IDS.items():
        if fields.get(name, expected) != expected:
            faults.append(f"{name} is {fields[name]!r}; expected {expected}, as every T5 has it")
    if faults:
        raise InputError(f"{path}: is no T5 that dslt can run:\n  " + "\n  ".join(faults))


def _feed_forward_proj(fields: dict) -> str:
    return fields.get("feed_forward_proj", "relu" if fields["model_type"] == "t5" else "gated-gelu")


def read_json(path: Path) -> dict:
    """The object in a file; InputError where there is none."""
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected that of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a JSON {type(content).__name__}; expected an object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes it as transformers does, indented by two."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
