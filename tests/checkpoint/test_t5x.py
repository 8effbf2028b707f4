"""T5X checkpoints, built here in their layout from the goldens' weights."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import nnx, serialization, traverse_util

from dslt.checkpoint import hf_t5, t5x
from dslt.core import t5
from dslt.data.vocabulary import ByteVocabulary
from dslt.errors import InputError
from dslt.main import main
from tests.checkpoint.test_hf_t5 import GOLDENS, one_example_a_row, read_expected


def t5x_arrays(family: str) -> dict[str, np.ndarray]:
    """The golden's tensors, one layer each, under T5X's names and in its shapes.

    Written from the published names and the Hugging Face file alone: not by what is tested.
    """
    import safetensors.numpy

    arrays = {}
    for name, tensor in safetensors.numpy.load_file(GOLDENS / family / "model.safetensors").items():
        parts = name.split(".")
        stack = parts[0]
        if name == "shared.weight":
            arrays["token_embedder/embedding"] = tensor
        elif name == "lm_head.weight":
            arrays["decoder/logits_dense/kernel"] = tensor.T
        elif parts[1] == "final_layer_norm":
            arrays[f"{stack}/{stack}_norm/scale"] = tensor
        else:
            layer, place, module = f"{stack}/layers_{parts[2]}", int(parts[4]), parts[5]
            kinds = ["attention", "mlp"]
            if stack == "decoder":
                kinds = ["self_attention", "cross_attention", "mlp"]
            if module == "layer_norm":
                arrays[f"{layer}/pre_{kinds[place]}_layer_norm/scale"] = tensor
            elif parts[6] == "relative_attention_bias":
                where = layer if family == "umt5" else stack
                arrays[f"{where}/relpos_bias/rel_embedding"] = tensor.T
            elif module == "DenseReluDense":
                arrays[f"{layer}/mlp/{parts[6]}/kernel"] = tensor.T
            else:
                own = "self_attention" if stack == "decoder" else "attention"
                attention = own if module == "SelfAttention" else "encoder_decoder_attention"
                kinds = {"q": "query", "k": "key", "v": "value", "o": "out"}
                arrays[f"{layer}/{attention}/{kinds[parts[6]]}/kernel"] = tensor.T
    return arrays


def scanned(arrays: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """The layers stacked along axis 1, heads and head size apart, as scalable_t5 has them."""
    found: dict[str, list] = {}
    for name, array in arrays.items():
        stack, layer, *rest = name.split("/")
        if not layer.startswith("layers_"):
            found[name] = array
            continue
        if "attention" in rest[0] and rest[-1] == "kernel":
            is_out = rest[1] == "out"
            size = (array.shape[0] if is_out else array.shape[1]) // num_heads
            shape = (num_heads, size, -1) if is_out else (-1, num_heads, size)
            array = array.reshape(shape)
        found.setdefault("/".join([stack, stack, *rest]), []).append(array)
    return {k: np.stack(v, axis=1) if isinstance(v, list) else v for k, v in found.items()}


def write_checkpoint(directory: Path, arrays: dict[str, np.ndarray], dtype="<f4") -> dict:
    """Matrices in zarr directories, vectors in the index, as T5X does; returns the index."""
    directory.mkdir(parents=True)
    leaves = {}
    for name, array in arrays.items():
        if array.ndim == 1:
            leaves[name] = array
            continue
        store = "target." + name.replace("/", ".")
        metadata = {
            "shape": list(array.shape),
            "chunks": [max(1, -(-size // 2)) for size in array.shape],
            "compressor": {"id": "gzip", "level": 1},
            "dtype": dtype,
        }
        kvstore = {"driver": "file", "path": str(directory / store)}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        opened = tensorstore.open(spec, create=True).result()
        opened.write(array.astype(opened.dtype.numpy_dtype)).result()
        leaves[name] = {**spec, "kvstore": {"driver": "file", "path": store}}
    target = traverse_util.unflatten_dict(leaves, sep="/")
    state = {"step": np.int32(7), "param_states": {"token_embedder": {"v_row": np.ones(4)}}}
    index = {"version": 3, "optimizer": {"target": target, "state": state}}
    write_index(directory, index)
    return index


def write_index(directory: Path, index) -> None:
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(index, in_place=False))


def logits_of(config, params, family: str) -> np.ndarray:
    batch = one_example_a_row(read_expected(GOLDENS / family))
    graphdef, _ = t5.abstract_params(config)
    run = jax.jit(
        lambda params: nnx.merge(graphdef, params)(batch),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return np.asarray(run(params))[np.asarray(batch.decoder_loss_weights) > 0]


@pytest.mark.parametrize("is_scanned", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("family", ["t5_v1_0", "t5_v1_1", "byt5", "umt5"])
def test_parity_with_the_same_weights_from_hugging_face(family, is_scanned, tmp_path):
    expected_config, expected = hf_t5.load_params(GOLDENS / family)
    arrays = t5x_arrays(family)
    if is_scanned:
        arrays = scanned(arrays, expected_config.num_heads)
    write_checkpoint(tmp_path / "checkpoint_7", arrays)
    config, params = t5x.load_params(tmp_path / "checkpoint_7")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # the goldens' distances are short to test them; no T5X checkpoint says its own
    assert config.relative_attention_max_distance == 128
    fields = {"relative_attention_max_distance": expected_config.relative_attention_max_distance}
    config = t5.T5Config(**{**vars(config), **fields})
    assert config == expected_config
    if not is_scanned:
        golden = read_expected(GOLDENS / family)
        weights = golden["decoder_target_tokens"] > 0
        found = logits_of(config, params, family)
        scale = np.abs(golden["logits"]).max()
        np.testing.assert_allclose(found, golden["logits"][weights], rtol=0, atol=1e-4 * scale)


def test_a_shared_table_in_a_scanned_checkpoint(tmp_path):
    arrays = scanned(t5x_arrays("t5_v1_1"), 2)
    for stack in ("encoder", "decoder"):
        table = arrays.pop(f"{stack}/relpos_bias/rel_embedding")
        arrays[f"{stack}/{stack}/relpos_bias/rel_embedding"] = table[:, None]
    write_checkpoint(tmp_path / "one", arrays)
    config, params = t5x.load_params(tmp_path / "one")
    assert not config.relative_bias_per_layer
    jax.tree.map(np.testing.assert_array_equal, params, hf_t5.load_params(GOLDENS / "t5_v1_1")[1])


def test_bfloat16_is_widened(tmp_path):
    write_checkpoint(tmp_path / "one", t5x_arrays("t5_v1_1"), dtype="bfloat16")
    _, params = t5x.load_params(tmp_path / "one")
    _, expected = hf_t5.load_params(GOLDENS / "t5_v1_1")
    rounded = expected["token_embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert params["token_embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["token_embedding"], rounded)


@pytest.fixture
def checkpoint(tmp_path):
    """A directory and its index."""
    directory = tmp_path / "checkpoint_7"
    return directory, write_checkpoint(directory, t5x_arrays("t5_v1_1"))


@pytest.mark.parametrize("path", ["../secret", "/etc", "..", "", "a/b", "sub/../../secret", "link"])
def test_a_name_that_leads_elsewhere_is_refused(checkpoint, path):
    directory, index = checkpoint
    (directory / "link").symlink_to(directory.parent)
    index["optimizer"]["target"]["token_embedder"]["embedding"]["kvstore"]["path"] = path
    write_index(directory, index)
    with pytest.raises(InputError, match="beside the index"):
        t5x.load_params(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"\x81" * 3000,
        b"\xdd\xff\xff\xff\xff",
        serialization.msgpack_serialize({"optimizer": 3}),
        serialization.msgpack_serialize({"optimizer": {"target": np.ones(3)}}),
    ],
)
def test_a_broken_index_is_the_users_to_mend(checkpoint, content):
    directory, _ = checkpoint
    (directory / "checkpoint").write_bytes(content)
    with pytest.raises(InputError):
        t5x.load_params(directory)


def test_an_array_that_claims_a_giant_shape_is_refused_unread(checkpoint):
    directory, _ = checkpoint
    path = directory / "target.token_embedder.embedding" / ".zarray"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "chunks": [1 << 40, 8]}))
    with pytest.raises(InputError, match="chunks of"):
        t5x.load_params(directory)
    path.write_text(json.dumps({**metadata, "shape": [1 << 40, 8]}))
    with pytest.raises(InputError):
        t5x.load_params(directory)


def test_a_missing_piece_is_no_array_of_zeros(checkpoint):
    directory, _ = checkpoint
    (directory / "target.token_embedder.embedding" / "1.1").unlink()
    with pytest.raises(InputError, match="token_embedder/embedding"):
        t5x.load_params(directory)


def test_missing_unexpected_and_misshapen_arrays_are_listed_together(checkpoint):
    directory, index = checkpoint
    target = index["optimizer"]["target"]
    del target["decoder"]["layers_1"]["mlp"]["wo"]
    target["encoder"]["adapter"] = {"scale": np.ones(3, np.float32)}
    target["decoder"]["decoder_norm"]["scale"] = np.ones(5, np.float32)
    write_index(directory, index)
    with pytest.raises(InputError) as raised:
        t5x.load_params(directory)
    message = str(raised.value)
    assert "missing decoder/layers_1/mlp/wo/kernel" in message
    assert "unexpected encoder/adapter/scale [3]" in message
    assert "decoder/decoder_norm/scale: found [5], expected [8]" in message


def test_the_command_imports_what_predict_can_load(tmp_path, capsys):
    arrays = t5x_arrays("t5_v1_1")
    rng = np.random.default_rng(0)
    shape = (ByteVocabulary.size, 8)  # rows for the bytes
    arrays["token_embedder/embedding"] = rng.normal(size=shape).astype(np.float32)
    arrays["decoder/logits_dense/kernel"] = rng.normal(size=shape[::-1]).astype(np.float32)
    write_checkpoint(tmp_path / "checkpoint_7", arrays)
    args = ["import", "--t5x", str(tmp_path / "checkpoint_7"), "--output_dir", str(tmp_path / "to")]
    assert main([*args]) == 2 and "--vocabulary" in capsys.readouterr().err
    assert main([*args, "--vocabulary", "bytes"]) == 0
    exported = str(tmp_path / "hf")
    assert main(["export", "--student", str(tmp_path / "to"), "--output_dir", exported]) == 0
    _, params = hf_t5.load_params(exported)
    np.testing.assert_array_equal(params["token_embedding"], arrays["token_embedder/embedding"])
    shutil.rmtree(tmp_path / "checkpoint_7")


def test_a_vocabulary_that_is_too_large_is_refused(checkpoint, tmp_path, capsys):
    args = ["import", "--t5x", str(checkpoint[0]), "--output_dir", str(tmp_path / "to")]
    assert main([*args, "--vocabulary", "bytes"]) == 2
    assert "embeds 32" in capsys.readouterr().err
