"""Hugging Face directories against the oracle: stored goldens everywhere, torch where it is."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dslt.checkpoint import hf_t5, hf_tensors
from dslt.core import t5
from dslt.core.batch import Batch
from dslt.core.decode import decode_batch
from dslt.data.vocabulary import ByteVocabulary, load_vocabulary, train_sentencepiece
from dslt.errors import InputError

GOLDENS = Path(__file__).parent.parent / "goldens"
FAMILIES = ("t5_v1_0", "t5_v1_1", "mt5", "byt5", "umt5")
FAST_COMPILE = {"xla_backend_optimization_level": 0}
RELATIVE_TOLERANCE = 1e-4  # of the largest entry: float32 sums taken in another order

decode = jax.jit(
    decode_batch, static_argnames=("graphdef", "max_length"), compiler_options=FAST_COMPILE
)

TEXTS = [
    "predict: two  spaces and   three",
    " leads and trails ",
    "unknown 漢字 are unknown together",
    "ligature ﬁne, half ½, wide Ａ, non\u00a0breaking",
    "a line\nand a\ttab",
    "( 84.0 / 2.0 )",
    "",
]


def read_expected(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "expected.safetensors")


def one_example_a_row(expected: dict[str, np.ndarray]) -> Batch:
    """The golden's padded rows as a batch; padding has segment 0 on both sides."""
    inputs, targets = expected["encoder_input_tokens"], expected["decoder_target_tokens"]
    is_target = (targets != 0).astype(np.int32)
    return Batch(
        encoder_input_tokens=inputs,
        encoder_segment_ids=(inputs != 0).astype(np.int32),
        decoder_target_tokens=targets,
        decoder_segment_ids=is_target,
        decoder_input_tokens=np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        decoder_loss_roles=is_target,
        decoder_loss_weights=is_target.astype(np.float32),
        decoder_example_ids=is_target,
    )


def assert_near(found, expected, name: str = "") -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=RELATIVE_TOLERANCE * scale, err_msg=name
    )


def check_parity(directory: Path) -> None:
    """Asserts that our T5 does what the golden in `directory` says."""
    expected = read_expected(directory)
    config, params = hf_t5.load_params(directory)
    graphdef, _ = t5.abstract_params(config)
    batch = one_example_a_row(expected)

    def mean_nll(params):
        logits = nnx.merge(graphdef, params)(batch)
        log_probs = jax.nn.log_softmax(logits)
        targets = batch.decoder_target_tokens[..., None]
        nll = -jnp.take_along_axis(log_probs, targets, axis=-1)[..., 0]
        weights = batch.decoder_loss_weights
        return (nll * weights).sum() / weights.sum(), logits

    value_and_grad = jax.value_and_grad(mean_nll, has_aux=True)
    (loss, logits), grads = jax.jit(value_and_grad, compiler_options=FAST_COMPILE)(params)
    is_target = batch.decoder_loss_weights > 0
    assert_near(np.asarray(logits)[is_target], expected["logits"][is_target], "logits")
    assert_near(loss, expected["loss"], "loss")
    grads = jax.tree.map(np.asarray, grads)
    for name, spec in hf_tensors.tensor_specs(config).items():
        assert_near(hf_tensors.file_tensor(grads, spec), expected[f"gradient.{name}"], name)
    decoded = decode(
        params,
        batch.encoder_input_tokens,
        graphdef=graphdef,
        max_length=batch.decoder_target_tokens.shape[1],
    )
    generated = expected["generated"]  # ends where all its rows have ended
    np.testing.assert_array_equal(decoded[:, : generated.shape[1]], generated)
    assert not np.asarray(decoded[:, generated.shape[1] :]).any()


def copy_golden(family: str, to: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / family, to))


def edit_config(directory: Path, **changes) -> None:
    """Sets fields of config.json; a field set to `...` is removed."""
    path = directory / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value != ...}))


def edit_weights(directory: Path, **changes) -> None:
    """Sets tensors of model.safetensors; a tensor set to `...` is removed."""
    path = directory / "model.safetensors"
    tensors = {**safetensors.numpy.load_file(path), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not ...}
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture(scope="session")
def vocabulary_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vocabulary")
    path = tmp_path_factory.mktemp("raw") / "trained.model"
    train_sentencepiece([text for text in TEXTS if text] * 3, 70, path).save(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_goldens(family):
    check_parity(GOLDENS / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_parity(family, make_goldens, tmp_path):
    """Three layers, 150 source tokens: every bucket of the distances is used."""
    make_goldens.make_golden(tmp_path, family, make_goldens.LARGE, 150, 40)
    check_parity(tmp_path)


@pytest.fixture(scope="session")
def make_goldens():
    pytest.importorskip("torch", reason="the oracle needs torch; the stored goldens were compared")
    spec = importlib.util.spec_from_file_location("make_goldens", GOLDENS / "make_goldens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_params(found: dict, expected: dict) -> None:
    """Bitwise."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_after_import_writes_the_same_tensors(family, tmp_path, vocabulary_directory):
    config, params = hf_t5.load_params(GOLDENS / family)
    hf_t5.save(tmp_path / "out", config, params, vocabulary_directory)
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    expected = safetensors.numpy.load_file(GOLDENS / family / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("is_umt5", [True, False])
def test_import_after_export_is_the_identity(
    is_tied, is_scaled, is_umt5, tmp_path, vocabulary_directory
):
    config = t5.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=12, num_heads=3, num_layers=2, num_decoder_layers=1,
        relative_attention_num_buckets=8, relative_attention_max_distance=30, dropout_rate=0.2,
        layer_norm_epsilon=1e-5, feed_forward_proj="relu", tie_word_embeddings=is_tied,
        scale_decoder_outputs=is_scaled, relative_bias_per_layer=is_umt5,
    )  # fmt: skip
    params = t5.init_params(config, seed=0)[1]
    if is_umt5 and is_tied and not is_scaled:
        with pytest.raises(InputError, match="scale_decoder_outputs"):
            hf_t5.save(tmp_path / "out", config, params, vocabulary_directory)
        assert list(tmp_path.iterdir()) == []
        return
    hf_t5.save(tmp_path / "out", config, params, vocabulary_directory)
    found_config, found_params = hf_t5.load_params(tmp_path / "out")
    assert found_config == config == hf_t5.read_config(tmp_path / "out")
    assert_same_params(found_params, params)


def test_shards(tmp_path, vocabulary_directory):
    config, params = hf_t5.load_params(GOLDENS / "byt5")
    hf_t5.save(tmp_path / "out", config, params, vocabulary_directory, max_shard_bytes=4000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = [safetensors.numpy.load_file(shard) for shard in shards]
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 4000 for shard in tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total_bytes = sum(tensor.nbytes for shard in tensors for tensor in shard.values())
    assert index["metadata"]["total_size"] == total_bytes
    found_config, found_params = hf_t5.load_params(tmp_path / "out")
    assert found_config == config
    assert_same_params(found_params, params)


def test_save_leaves_nothing_half_done(tmp_path, vocabulary_directory, monkeypatch):
    config, params = hf_t5.load_params(GOLDENS / "t5_v1_1")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        hf_t5.save(tmp_path / "out", config, params, vocabulary_directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["4k", "8k", "16k"], ids=["config", "vocabulary", "weights"])
def test_a_full_disk_is_the_one_that_is_named(size, small_disk, vocabulary_directory):
    config, params = hf_t5.load_params(GOLDENS / "t5_v1_1")
    disk, resize = small_disk(size)
    with pytest.raises(InputError, match=f"the disk is full .* mounted at {disk}. "):
        hf_t5.save(disk / "out", config, params, vocabulary_directory)
    assert list(disk.iterdir()) == [] and resize("20m")
    hf_t5.save(disk / "out", config, params, vocabulary_directory)


def test_save_overwrites_nothing(tmp_path, vocabulary_directory):
    config, params = hf_t5.load_params(GOLDENS / "t5_v1_1")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        hf_t5.save(tmp_path, config, params, vocabulary_directory)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    hf_t5.save(tmp_path / "empty", config, params, vocabulary_directory)
    with pytest.raises(InputError, match="has no vocabulary"):
        hf_t5.save(tmp_path / "other", config, params, tmp_path)


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys; from dslt.checkpoint import hf_t5; "
        f"hf_t5.load_params({str(GOLDENS / 't5_v1_1')!r}); "
        "assert not {'torch', 'transformers', 'tensorflow', 'gin'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ})


def test_half_precision_files_are_widened(tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    edit_weights(directory, **{k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    params = hf_t5.load_params(directory)[1]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    expected = tensors["shared.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["token_embedding"], expected)


def test_copies_of_the_embedding_and_the_unused_table_are_taken(tmp_path):
    """As in the released T5 v1.0 files and in those of older conversions."""
    directory = copy_golden("t5_v1_0", tmp_path / "model")
    expected = hf_t5.load_params(directory)
    embedding = np.array(expected[1]["token_embedding"])
    table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = dict.fromkeys(("encoder.embed_tokens.weight", "lm_head.weight"), embedding)
    edit_weights(directory, **copies, **{table: np.zeros((8, 2), np.float32)})
    found = hf_t5.load_params(directory)
    assert found[0] == expected[0]
    assert_same_params(found[1], expected[1])
    edit_weights(directory, **{"shared.weight": ...}, **{"lm_head.weight": ...})
    assert_same_params(hf_t5.load_params(directory)[1], expected[1])
    edit_weights(directory, **{"shared.weight": embedding + 1})
    with pytest.raises(InputError, match=r"encoder.embed_tokens.weight: differs from shared"):
        hf_t5.load_params(directory)


def test_config_as_transformers_5_saves_it(tmp_path):
    """It claims every T5 to be tied; the tensors say otherwise."""
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    edit_config(directory, tie_word_embeddings=True, scale_decoder_outputs=False)
    config = hf_t5.read_config(directory)
    assert config == hf_t5.read_config(GOLDENS / "t5_v1_1")
    assert not config.tie_word_embeddings


def test_defaults_of_old_configs(tmp_path):
    directory = copy_golden("t5_v1_0", tmp_path / "model")
    edit_config(
        directory, relative_attention_max_distance=..., eos_token_id=None, num_decoder_layers=None
    )
    config = hf_t5.read_config(directory)
    assert config.relative_attention_max_distance == 128
    assert (config.num_layers, config.num_decoder_layers) == (2, 2)
    assert config.feed_forward_proj == "relu"
    assert config.tie_word_embeddings
    assert config.scale_decoder_outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "model_type is 'bart'; expected one of t5, mt5, umt5"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj is"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu'; expected 'gelu_new'"),
        ({"d_kv": ..., "num_heads": "many"}, r"'d_kv' is missing\n.*'num_heads' is 'many'"),
        ({"num_layers": 0}, "'num_layers' is 0; expected a positive integer"),
        ({"d_model": True}, "'d_model' is True"),
        ({"eos_token_id": 2}, "eos_token_id is 2; expected 1"),
        ({"dropout_rate": 1.5}, "field 'dropout_rate' is 1.5"),
    ],
)
def test_configs_that_are_refused(changes, message, tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    edit_config(directory, **changes)
    with pytest.raises(InputError, match=message) as caught:
        hf_t5.read_config(directory)
    assert str(directory / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", None, "\udcff"])
def test_broken_config_files(content, tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        InputError, match=r"config\.json: (cannot be read|is not JSON|found a JSON)"
    ):
        hf_t5.read_config(directory)


def test_all_wrong_tensors_are_listed(tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    edit_weights(
        directory,
        **{
            name: np.zeros((3, 8), np.float32),
            "decoder.final_layer_norm.weight": ...,
            "decoder.block.7.layer.0.layer_norm.weight": np.zeros(8, np.float32),
            "shared.weight": np.zeros((32, 8), np.int64),
        },
    )
    with pytest.raises(InputError) as caught:
        hf_t5.load_params(directory)
    message = str(caught.value)
    assert f"{name}: found [3, 8], expected [8, 8]" in message
    assert "missing decoder.final_layer_norm.weight [8]" in message
    assert "unexpected decoder.block.7.layer.0.layer_norm.weight [8]" in message
    assert "shared.weight: found dtype I64" in message


def test_weights_of_another_config_name_twenty_and_count_the_rest(tmp_path):
    config, other = (hf_t5.read_config(GOLDENS / name) for name in ("t5_v1_1", "umt5"))
    with pytest.raises(InputError, match="… and") as caught:
        hf_t5.load_params(GOLDENS / "umt5", dataclasses.replace(other, d_model=4, d_ff=4))
    assert len(str(caught.value).splitlines()) == 22
    assert hf_t5.load_params(GOLDENS / "t5_v1_1", config)[0] == config


@pytest.mark.parametrize("num_bytes", [0, 5, 500, -7])
def test_truncated_weights(num_bytes, tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match=r"model\.safetensors: found \d+ bytes"):
        hf_t5.load_params(directory)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    directory = copy_golden("t5_v1_1", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        hf_t5.load_params(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        hf_t5.load_params(directory)


def test_broken_shards(tmp_path, vocabulary_directory):
    directory = tmp_path / "out"
    config, params = hf_t5.load_params(GOLDENS / "t5_v1_1")
    hf_t5.save(directory, config, params, vocabulary_directory, max_shard_bytes=9000)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first, *_, last = sorted(directory.glob("*.safetensors"))

    def check(weight_map, message):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            hf_t5.load_params(directory)

    swapped = {**index["weight_map"], "shared.weight": first.name}
    assert index["weight_map"]["shared.weight"] == last.name
    check(swapped, f"{first.name}: has no tensor 'shared.weight'")
    check({"shared.weight": "../model.safetensors"}, "no weight_map of tensor names")
    check([], "no weight_map of tensor names")
    last.unlink()
    check(index["weight_map"], f"{last.name}: cannot be read")


def load_oracle(directory: Path):
    """(model, tokenizer) as a user of transformers loads them."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_umt5", [True, False])
def test_exports_answer_in_transformers(is_tied, is_umt5, tmp_path, vocabulary_directory):
    """Text in, the same tokens out as ours: tokenizer, weights and generation config together."""
    torch = pytest.importorskip("torch")
    vocabulary = load_vocabulary(vocabulary_directory)
    config = t5.T5Config(
        vocab_size=vocabulary.size + 8, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2,
        num_decoder_layers=2, tie_word_embeddings=is_tied, scale_decoder_outputs=is_tied,
        relative_bias_per_layer=is_umt5,
    )  # fmt: skip
    graphdef, params = t5.init_params(config, seed=2)
    hf_t5.save(tmp_path / "out", config, params, vocabulary_directory, max_target_tokens=30)
    model, tokenizer = load_oracle(tmp_path / "out")
    encoded = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**encoded)[:, 1:].numpy()
    sources = encoded.input_ids.numpy().astype(np.int32)
    decoded = np.asarray(decode(params, sources, graphdef=graphdef, max_length=30))
    np.testing.assert_array_equal(decoded[:, : generated.shape[1]], generated)
    assert (model.lm_head.weight is model.shared.weight) == is_tied


@pytest.mark.parametrize("is_umt5", [True, False])
def test_exported_tokenizer_spells_as_sentencepiece(is_umt5, tmp_path, vocabulary_directory):
    config = t5.T5Config(vocab_size=200, d_model=8, relative_bias_per_layer=is_umt5)
    params = t5.init_params(config, seed=0)[1]
    hf_t5.save(tmp_path / "out", config, params, vocabulary_directory)
    tokenizer = load_oracle(tmp_path / "out")[1]
    vocabulary = load_vocabulary(vocabulary_directory)
    for text in TEXTS:
        ids = vocabulary.encode(text)
        assert tokenizer(text).input_ids == [*ids, 1], text
        assert tokenizer.decode(ids) == vocabulary.decode(ids).replace("⁇", "<unk>").strip()
    assert len(tokenizer) == vocabulary.size
    special_ids = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special_ids == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == vocabulary.size - 1


def test_exported_bytes_are_byt5(tmp_path):
    config = t5.T5Config(vocab_size=384, d_model=8)
    ByteVocabulary().save(tmp_path / "vocabulary")
    params = t5.init_params(config, seed=0)[1]
    hf_t5.save(tmp_path / "out", config, params, tmp_path / "vocabulary")
    tokenizer = load_oracle(tmp_path / "out")[1]
    assert type(tokenizer).__name__ == "ByT5Tokenizer"
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*ByteVocabulary().encode(text), 1]


def test_exported_tokenizer_json_keeps_its_own_rules(tmp_path, vocabulary_directory):
    """A T5Tokenizer would put its own normaliser in the place of this one, which lowers case."""
    tokenizers = pytest.importorskip("tokenizers")
    umt5 = t5.T5Config(vocab_size=200, d_model=8, relative_bias_per_layer=True)
    params = t5.init_params(umt5, seed=0)[1]
    hf_t5.save(tmp_path / "first", umt5, params, vocabulary_directory)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "first" / "tokenizer.json"))
    own.normalizer = tokenizers.normalizers.Lowercase()
    (tmp_path / "own").mkdir()
    own.save(str(tmp_path / "own" / "tokenizer.json"))
    config = t5.T5Config(vocab_size=200, d_model=8)
    params = t5.init_params(config, seed=0)[1]
    hf_t5.save(tmp_path / "out", config, params, tmp_path / "own")
    tokenizer = load_oracle(tmp_path / "out")[1]
    assert tokenizer("LEADS and Trails").input_ids == tokenizer("leads and trails").input_ids
    assert tokenizer("LEADS").input_ids == own.encode("LEADS").ids


def test_directories_that_transformers_5_saves(tmp_path):
    """Its config.json differs from transformers 4's; the model that we read must not."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for family in FAMILIES:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(GOLDENS / family)
        model.save_pretrained(tmp_path / family)
        found, params = hf_t5.load_params(tmp_path / family)
        expected, expected_params = hf_t5.load_params(GOLDENS / family)
        if family == "umt5" and transformers.__version__.startswith("5."):
            # It scales every umT5's output, and says so when it saves one.
            expected = dataclasses.replace(expected, scale_decoder_outputs=True)
        assert found == expected, family
        assert_same_params(params, expected_params)


def copy_of_golden(tmp_path, **changes):
    directory = tmp_path / "model"
    shutil.copytree(GOLDENS / "t5_v1_1", directory)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | changes))
    return directory


@pytest.mark.parametrize("field", ["num_layers", "num_decoder_layers", "d_ff", "vocab_size"])
@pytest.mark.parametrize("size", [10**6, 10**9, 10**30])
def test_declared_sizes_take_no_memory(tmp_path, field, size):
    """A million layers would be millions of names, a large table terabytes."""
    directory = copy_of_golden(tmp_path, **{field: size})
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=field):
            hf_t5.load_params(directory)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.5, 1, 10**400])
def test_rates_out_of_range_are_refused(tmp_path, rate):
    directory = copy_of_golden(tmp_path, layer_norm_epsilon=rate)
    with pytest.raises(InputError, match="layer_norm_epsilon"):
        hf_t5.load_params(directory)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../model.safetensors", "/dev/zero", "a\0", "x.bin"]
)
def test_an_index_names_weights_beside_it_alone(tmp_path, name):
    directory = copy_of_golden(tmp_path)
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"shared.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no weight_map"):
        hf_t5.load_params(directory)


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 17])
def test_a_header_that_lies_about_its_length_is_refused(tmp_path, length):
    directory = copy_of_golden(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match="no whole safetensors file"):
        hf_t5.load_params(directory)
