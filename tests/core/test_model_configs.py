"""Every model in gin/models parses, builds, and has the parameters that its header says."""

import json
import re
from pathlib import Path

import gin
import jax
import pytest

from dslt.checkpoint import hf_t5
from dslt.core import t5

MODELS = Path(__file__).parent.parent.parent / "gin" / "models"
PATHS = sorted(MODELS.glob("*.gin"))
PUBLIC_COUNTS = {  # of the released checkpoints
    "t5_v1_0_small": 60_506_624,
    "t5_v1_0_base": 222_903_552,
    "t5_v1_0_large": 737_668_096,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
}
PAPER_MILLIONS = {  # Xue et al. 2022 (ByT5), table 1: both families, as printed
    "mt5_base": 582,
    "mt5_large": 1_230,
    "mt5_xl": 3_740,
    "mt5_xxl": 12_900,
    "byt5_small": 300,
    "byt5_base": 582,
    "byt5_large": 1_230,
    "byt5_xl": 3_740,
    "byt5_xxl": 12_900,
}


def parse_config(path: Path) -> t5.T5Config:
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings([str(path)], [])
        return gin.get_configurable(t5.T5Config)()
    finally:
        gin.clear_config()


def count(name: str) -> int:
    return t5.count_params(t5.abstract_params(parse_config(MODELS / f"{name}.gin"))[1])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_header_has_the_parameter_count(path):
    header = re.match(r"# .+: ([\d,]+) parameters\.\n# Vocabulary: .+\n", path.read_text())
    assert header, "the header names the model, its parameters and its vocabulary"
    assert int(header[1].replace(",", "")) == count(path.stem)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_field_of_the_shape_is_said(path):
    """So that another default of T5Config changes no shipped model."""
    required = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    required += ("num_decoder_layers", "feed_forward_proj", "tie_word_embeddings")
    for name in required:
        assert f"t5.T5Config.{name} = " in path.read_text()


@pytest.mark.parametrize("name", PUBLIC_COUNTS)
def test_public_counts(name):
    assert count(name) == PUBLIC_COUNTS[name]


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_counts_of_the_papers(name):
    assert count(name) / 1e6 == pytest.approx(PAPER_MILLIONS[name], rel=0.005)  # three digits


def test_all_sizes_are_there():
    v1_0 = [f"t5_v1_0_{size}" for size in ("small", "base", "large", "3b", "11b")]
    sizes = ("small", "base", "large", "xl", "xxl")
    later = [f"{family}_{size}" for family in ("t5_v1_1", "mt5", "byt5") for size in sizes]
    umt5 = [f"umt5_{size}" for size in ("small", "base", "xl", "xxl")]
    expected = {*v1_0, *later, *umt5, "tiny", "mini_256", "mini_512"}
    assert {path.stem for path in PATHS} == expected


@pytest.mark.parametrize("name", ["t5_v1_0_11b", "t5_v1_1_xxl", "byt5_base", "umt5_small"])
def test_transformers_has_the_same_tensors(name, tmp_path):
    """Names and shapes of a model built from our config.json, on torch's meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = parse_config(MODELS / f"{name}.gin")
    (tmp_path / "config.json").write_text(json.dumps(hf_t5.config_fields(config)))
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    found = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    expected = {name: spec.shape for name, spec in hf_t5.tensor_specs(config).items()}
    if not config.tie_word_embeddings:  # transformers 5 ties all until it sees the weights
        found["lm_head.weight"] = (config.vocab_size, config.d_model)
    assert found == expected


def test_specs_cover_every_parameter_once():
    config = parse_config(MODELS / "umt5_small.gin")
    specs = hf_t5.tensor_specs(config).values()
    paths_and_layers = [(spec.path, spec.layer) for spec in specs]
    assert len(set(paths_and_layers)) == len(paths_and_layers)
    leaves = jax.tree.leaves(t5.abstract_params(config)[1])
    assert sum(leaf.size for leaf in leaves) == count("umt5_small")
