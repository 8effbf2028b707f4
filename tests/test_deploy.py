"""An exported student where it is deployed: every engine gives the tokens that dslt decodes.

What is not installed is skipped: transformers' generate needs torch, CTranslate2 `.[ctranslate2]`,
ONNX Runtime an environment of its own (onnx_requirements.txt).
"""

import contextlib
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from dslt.checkpoint import hf_t5
from dslt.core import sharding, t5
from dslt.core.batch import EOS_ID
from dslt.core.continuous import ContinuousDecoder
from dslt.core.decode import DecodeConfig
from dslt.data.embedded import generate
from dslt.data.vocabulary import encode_with_eos, load_vocabulary, train_sentencepiece

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 12


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A random T5 v1.1 with the embedded problems' vocabulary: (directory, graphdef, params)."""
    rows = generate("facts", train=80, validation=0, test=0, seed=0)
    texts = ["predict: " + row.input for row in rows]
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    size = train_sentencepiece(texts, 200, vocabulary / "spiece.model").size
    config = t5.T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2,
        num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        scale_decoder_outputs=False,
    )  # fmt: skip
    graphdef, abstract = t5.abstract_params(config)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)
    directory = tmp_path_factory.mktemp("exported") / "student"
    hf_t5.save(directory, config, params, vocabulary, max_target_tokens=MAX_LENGTH)
    return directory, graphdef, params


@pytest.fixture(scope="module")
def problems() -> list[str]:
    """Held out: the vocabulary has not seen them."""
    rows = generate("facts", train=0, validation=0, test=32, seed=1)
    return ["predict: " + row.input for row in rows]


@pytest.fixture(scope="module")
def decoded(student, problems):
    """What dslt answers: tokens before EOS, and the log-likelihood of each answer."""
    directory, graphdef, params = student
    vocabulary = load_vocabulary(directory)
    inputs = [encode_with_eos(vocabulary, text, 128)[0] for text in problems]
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    decoder = ContinuousDecoder(graphdef, mesh, rows=16)
    prepared = decoder.prepare(params)
    tokens = decoder(prepared, inputs, config=DecodeConfig(), max_length=MAX_LENGTH)
    answers = [[row + [EOS_ID] * (len(row) < MAX_LENGTH)] for row in tokens]
    scores = [float(row[0]) for row in decoder.score(prepared, inputs, answers)]
    assert len({tuple(row) for row in tokens}) > 8  # the comparisons would see answers swapped
    return tokens, scores


def ids_of(tokenizer, problems: list[str]) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in problems]


def assert_same(rows, decoded) -> None:
    """`rows` as `generate` gives them: a start token, the answer, EOS and padding."""
    answers = [[int(token) for token in row[1:]] for row in rows]
    answers = [row[: row.index(EOS_ID)] if EOS_ID in row else row for row in answers]
    assert answers == decoded[0]


@pytest.fixture(scope="module")
def tokenizer(student):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(student[0])


def generate_all(model, tokenizer, problems) -> list:
    import torch

    sources = [torch.tensor([ids]) for ids in ids_of(tokenizer, problems)]
    with one_thread():
        return [
            model.generate(ids, max_new_tokens=MAX_LENGTH, do_sample=False)[0].tolist()
            for ids in sources
        ]


@contextlib.contextmanager
def one_thread():
    """Products so small are done before a second thread of PyTorch's wakes up."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_transformers_generates_the_same(student, problems, decoded, tokenizer):
    pytest.importorskip("torch", reason="generate needs PyTorch: pip install '.[parity]'")
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(student[0])
    assert_same(generate_all(model, tokenizer, problems), decoded)


def test_transformers_pipeline_gives_the_same(student, problems, decoded):
    """transformers 5 has no pipeline for encoder-decoders; 4 has."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="pipelines need PyTorch: pip install '.[parity]'")
    if int(transformers.__version__.split(".")[0]) > 4:
        with pytest.raises(KeyError, match="has been removed"):
            transformers.pipeline("text2text-generation", model=str(student[0]))
        pytest.skip("transformers 5 has no text2text-generation pipeline (onnx_requirements.txt)")
    pipeline = transformers.pipeline("text2text-generation", model=str(student[0]), device="cpu")
    with one_thread():
        rows = pipeline(problems, max_new_tokens=MAX_LENGTH, num_beams=1)  # its own default is 4
    found = [row["generated_text"] for row in rows]
    vocabulary = load_vocabulary(student[0])
    assert found == [vocabulary.decode(row) for row in decoded[0]]


@pytest.fixture(scope="module")
def translators(student, tmp_path_factory):
    """CTranslate2's, converted by the script: float32 and int8."""
    reason = "CTranslate2 is not installed: pip install '.[ctranslate2]'"
    ctranslate2 = pytest.importorskip("ctranslate2", reason=reason)
    pytest.importorskip("torch", reason="the converter needs PyTorch: pip install '.[parity]'")
    convert = runpy.run_path(str(ROOT / "launch" / "to_ctranslate2.py"))["main"]
    translators = {}
    for quantization in ("float32", "int8"):
        output = str(tmp_path_factory.mktemp("converted") / quantization)
        convert([str(student[0]), output, "--quantization", quantization])
        translators[quantization] = ctranslate2.Translator(
            output, device="cpu", compute_type=quantization, intra_threads=1
        )
    return translators


def translate(translator, tokenizer, problems):
    sources = [tokenizer.convert_ids_to_tokens(ids) for ids in ids_of(tokenizer, problems)]
    found = translator.translate_batch(
        sources,
        beam_size=1,
        max_decoding_length=MAX_LENGTH,
        return_scores=True,
        length_penalty=0,  # the score is then the sum over the tokens
    )
    answers = [tokenizer.convert_tokens_to_ids(row.hypotheses[0]) for row in found]
    return answers, [row.scores[0] for row in found]


def test_ctranslate2_gives_the_same_tokens_and_scores(problems, decoded, tokenizer, translators):
    answers, scores = translate(translators["float32"], tokenizer, problems)
    assert answers == decoded[0]
    # float32 through twelve steps in another order
    np.testing.assert_allclose(scores, decoded[1], rtol=1e-3)


def test_ctranslate2_in_int8_nearly_always_gives_the_same(
    problems, decoded, tokenizer, translators
):
    """Random weights decide by less than trained ones: most answers are the same, not all."""
    answers, _ = translate(translators["int8"], tokenizer, problems)
    same = [found == expected for found, expected in zip(answers, decoded[0], strict=True)]
    assert np.mean(same) > 0.6


def test_onnx_runtime_gives_the_same(student, problems, decoded, tokenizer, tmp_path):
    onnx = pytest.importorskip(
        "optimum.onnxruntime", reason="optimum-onnx is not installed (see onnx_requirements.txt)"
    )
    model = onnx.ORTModelForSeq2SeqLM.from_pretrained(student[0], export=True)
    model.save_pretrained(tmp_path / "onnx")
    model = onnx.ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "onnx")
    assert_same(generate_all(model, tokenizer, problems), decoded)
