"""How a student's answers are decoded: freely, within a set, by likelihood; config errors."""

import jax
import numpy as np
import pytest

from dslt.checkpoint import hf_t5
from dslt.core import t5
from dslt.core.answers import AnswerSet, score_answers
from dslt.core.batch import EOS_ID
from dslt.core.continuous import pad_answers, pad_inputs
from dslt.core.decode import DecodeConfig, decode_batch
from dslt.core.sharding import MeshConfig
from dslt.data.vocabulary import ByteVocabulary
from dslt.errors import InputError
from dslt.evaluate import Decoder, EvalConfig, answer, predict
from dslt.records import EvalInput, Example

MODEL = t5.T5Config(
    vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2,
)  # fmt: skip
SETS = (
    AnswerSet(("yes", "no", "no idea"), ((5, 9, EOS_ID), (6, EOS_ID), (6, 7, 8, EOS_ID))),
    AnswerSet(("left", "right"), ((11, EOS_ID), (12, 13, EOS_ID))),
)


def in_digits(tokens) -> str:
    return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 40, n).astype(np.int32) for n in (5, 17, 3, 9, 20, 2)]


@pytest.fixture(scope="module")
def sets(inputs) -> list[AnswerSet]:
    return [SETS[i % 2] for i in range(len(inputs))]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Of a random student in a Hugging Face directory, on one device."""
    directory = tmp_path_factory.mktemp("student")
    ByteVocabulary().save(directory / "vocabulary")
    params = t5.init_params(MODEL, seed=0)[1]
    hf_t5.save(directory / "student", MODEL, params, directory / "vocabulary")
    devices = jax.devices
    with pytest.MonkeyPatch.context() as patch:  # eight would run each program eight times
        patch.setattr(jax, "devices", lambda *args: devices(*args)[:1])
        yield Decoder(directory / "student", MeshConfig(), rows=4)


def batch_answers(params, inputs, config: DecodeConfig, max_length: int, **settings) -> list[str]:
    graphdef = t5.abstract_params(MODEL)[0]
    decode = jax.jit(
        lambda params, sources: decode_batch(
            params, sources, graphdef=graphdef, config=config, max_length=max_length, **settings
        )
    )
    rows = np.asarray(decode(params, pad_inputs(inputs, len(inputs), 1))).tolist()
    return [in_digits(row[: row.index(EOS_ID) if EOS_ID in row else None]) for row in rows]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy": "sample", "temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 3},
        {"strategy": "beam", "num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
    ],
    ids=["greedy", "sample", "beam"],
)
def test_each_strategy_reaches_labels_and_rationales(decoder, inputs, fields):
    config = EvalConfig(**fields, max_label_length=5, max_rationale_length=7, with_rationales=True)
    examples = [
        EvalInput(
            Example(id=str(i), dataset="d", split="test", input="?", label="5"),
            label_input_tokens=inputs[i],
            rationale_input_tokens=inputs[-1 - i],
            is_truncated=False,
        )
        for i in range(len(inputs))
    ]
    found = predict(decoder, examples, config, in_digits, rationale_start_id=3)
    decoding = DecodeConfig(**fields)
    expected = batch_answers(decoder.params, inputs, decoding, 5)
    assert [p.prediction for p in found] == expected
    rationales = batch_answers(decoder.params, inputs[::-1], decoding, 7, start_id=3)
    assert [p.rationale for p in found] == rationales
    assert all(p.probability is None for p in found)
    assert len(set(expected)) > 3 and len(set(rationales)) > 3


def test_a_trie_answers_with_the_sets_own_texts(decoder, inputs, sets):
    """Not with what their tokens decode to: an unknown character would be lost."""
    config = EvalConfig(answers="trie", max_label_length=5)
    texts, distributions = answer(decoder, inputs, config, pytest.fail, sets)
    assert all(text in of.texts for text, of in zip(texts, sets, strict=True))
    assert len(set(texts)) > 2 and distributions is None


def test_likelihood_answers_with_the_most_likely_and_its_probability(decoder, inputs, sets):
    config = EvalConfig(answers="likelihood")
    texts, distributions = answer(decoder, inputs, config, pytest.fail, sets)
    graphdef = t5.abstract_params(MODEL)[0]
    answers = pad_answers([of.tokens for of in sets], (len(inputs), 3, 4))
    sources = pad_inputs(inputs, len(inputs), 1)
    score = jax.jit(lambda params: score_answers(params, sources, answers, graphdef=graphdef))
    expected = jax.nn.softmax(score(decoder.params))
    for text, found, of, row in zip(texts, distributions, sets, np.asarray(expected), strict=True):
        assert sum(found.values()) == pytest.approx(1.0)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert found == pytest.approx(dict(zip(of.texts, row, strict=False)), abs=1e-5)
        assert text == of.texts[row.argmax()] == next(iter(found))
    assert len(set(texts)) > 1


def test_a_prediction_keeps_its_probability(decoder, inputs, sets):
    example = Example(id="0", dataset="d", split="test", input="?", label="yes")
    examples = [EvalInput(example, inputs[0], inputs[0], is_truncated=False)]
    config = EvalConfig(answers="likelihood")
    [found] = predict(decoder, examples, config, in_digits, sets[:1])
    [distribution] = decoder.distributions(inputs[:1], sets[:1])
    assert found.probability == distribution.max()
    assert found.is_correct == (found.prediction == "yes")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answers": "free"}, "answers is 'free'; expected one of open, trie, likelihood"),
        ({"labels": ("a", "b")}, "expected 'trie' or 'likelihood' to answer with one of them"),
        ({"answers": "trie", "strategy": "beam"}, "expected strategy 'greedy', or answers"),
        ({"strategy": "sample", "top_p": 2.0}, "EvalConfig.top_p is 2.0; expected 0 < top_p <= 1"),
        ({"max_label_length": 0}, "max_label_length is 0; expected >= 1"),
        ({"poll_secs": -1.0}, "EvalConfig.poll_secs is -1.0; expected 0 or more seconds"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(fields, says):
    with pytest.raises(InputError) as error:
        EvalConfig(**fields)
    assert says in str(error.value)
