"""Vocabularies: ids by hand, T5's layout held, text never taken for special ids."""

import json

import numpy as np
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dslt.checkpoint.hf_tokenizer import write_tokenizer_json
from dslt.data.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    encode_with_eos,
    has_same_pieces,
    load_vocabulary,
    train_sentencepiece,
)
from dslt.errors import InputError

TEXTS = ["ann has two red hats", "bob has no hat", "has ann a hat ?", "two and two is four"]
HOSTILE = ["</s>", "a </s> b", "<pad><unk>", "<extra_id_0>", "▁", "", "\x00", "{0} %s ../ $(x)"]

SENTINELS = {ByteVocabulary: 125, SentencePieceVocabulary: 100, TokenizerVocabulary: 2}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A unigram tokenizer.json in T5's layout: three special ids, pieces, two sentinels."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁ann", -1.0), ("▁has", -1.5)]
    pieces += [(letter, -4.0) for letter in "▁abdhnst</>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(params=["sentencepiece", "tokenizer", "bytes"])
def any_vocabulary(request, vocabulary, tokenizer_dir):
    if request.param == "sentencepiece":
        return vocabulary
    return load_vocabulary(tokenizer_dir if request.param == "tokenizer" else "bytes")


def test_byt5_ids_by_hand():
    vocabulary = load_vocabulary("bytes")
    assert vocabulary.encode("Aé") == [ord("A") + 3, 0xC3 + 3, 0xA9 + 3]
    assert vocabulary.decode([68, 0, 0xC3 + 3, 0xA9 + 3, 1, 68]) == "Aé"
    assert vocabulary.decode([0xC3 + 3, 68, 383, 2]) == "A"  # half a character says nothing
    assert (vocabulary.size, vocabulary.unk_id) == (384, None)


def test_the_same_pieces_in_two_kinds_of_file_are_told_from_other_pieces(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    write_tokenizer_json(tmp_path / "spiece.model", tmp_path / "tokenizer.json")
    in_json = load_vocabulary(tmp_path)
    assert in_json.digest != vocabulary.digest and has_same_pieces(in_json, vocabulary)
    texts = [text.translate(str.maketrans("abdehn", "hndaeb")) for text in TEXTS]
    other = train_sentencepiece(texts, vocabulary.num_pieces, tmp_path / "other.model")
    assert not has_same_pieces(vocabulary, other)
    assert not has_same_pieces(in_json, ByteVocabulary())


def test_sentinels_that_are_among_the_pieces_are_counted_once(vocabulary, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model_proto)
    for number in reversed(range(100)):  # as in mT5's file
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0)
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    assert load_vocabulary(tmp_path).size == vocabulary.size


def test_trained_pieces_have_t5s_special_ids_and_room_for_the_sentinels(vocabulary):
    assert vocabulary.size == vocabulary.num_pieces + 100
    assert vocabulary.unk_id == 2
    assert vocabulary.decode([*vocabulary.encode("Ann has 3 hats."), 1, 7]) == "Ann has 3 hats."
    assert 2 in vocabulary.encode("日")


def test_the_same_texts_train_the_same_file(tmp_path):
    first = train_sentencepiece(TEXTS, 40, tmp_path / "a.model")
    again = train_sentencepiece(iter(TEXTS), 40, tmp_path / "b.model")
    other = train_sentencepiece(TEXTS[:3], 40, tmp_path / "c.model")
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.digest == again.digest != other.digest


def test_line_breaks_in_training_texts_count_as_spaces(tmp_path):
    spaced = train_sentencepiece([" ".join(TEXTS)], 40, tmp_path / "a.model")
    broken = train_sentencepiece(["\n".join(TEXTS)], 40, tmp_path / "b.model")
    assert spaced.digest == broken.digest


def test_long_training_texts_count(tmp_path):
    vocabulary = train_sentencepiece([*TEXTS, "ann has ж . " * 600], 60, tmp_path / "a.model")
    assert vocabulary.unk_id not in vocabulary.encode("ж")


def test_tokenizer_appends_no_eos_and_counts_added_tokens(tokenizer_dir):
    vocabulary = load_vocabulary(tokenizer_dir)
    assert isinstance(vocabulary, TokenizerVocabulary)
    assert vocabulary.encode("ann has") == [3, 4]
    assert vocabulary.size == 5 + len("▁abdhnst</>") + 2
    assert vocabulary.decode([3, vocabulary.size - 1, 4, 1, 3]) == "ann has"


@pytest.mark.parametrize("text", HOSTILE)
def test_special_words_in_a_text_never_become_special_ids(any_vocabulary, text):
    ids = any_vocabulary.encode(text)
    sentinels = SENTINELS[type(any_vocabulary)]
    assert all(1 < token < any_vocabulary.size - sentinels for token in ids)


def test_decode_stops_at_eos_and_survives_any_id(any_vocabulary):
    ids = any_vocabulary.encode("ann has")
    text = any_vocabulary.decode(np.array([0, *ids, 1, *ids], np.int32))
    assert text == "ann has"
    assert any_vocabulary.decode([0, *ids, any_vocabulary.size + 5, 2**31 - 1]) == "ann has"
    assert any_vocabulary.decode([]) == any_vocabulary.decode([1, *ids]) == ""


def test_what_is_saved_loads_as_the_same_vocabulary(any_vocabulary, tmp_path):
    any_vocabulary.save(tmp_path / "export")
    loaded = load_vocabulary(tmp_path / "export")
    assert type(loaded) is type(any_vocabulary)
    assert (loaded.digest, loaded.size) == (any_vocabulary.digest, any_vocabulary.size)


def test_a_directory_with_only_a_sentencepiece_file(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == vocabulary.path.read_bytes()
    assert isinstance(load_vocabulary(tmp_path), SentencePieceVocabulary)


def test_truncation_keeps_eos_last(any_vocabulary):
    ids = any_vocabulary.encode("ann has ann")
    whole, is_cut = encode_with_eos(any_vocabulary, "ann has ann", len(ids) + 1)
    assert whole.tolist() == [*ids, 1] and whole.dtype == np.int32 and not is_cut
    cut, is_cut = encode_with_eos(any_vocabulary, "ann has ann", len(ids))
    assert cut.tolist() == [*ids[:-1], 1] and is_cut


def _other_layout(path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path / "other"), vocab_size=40,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return path / "other.model"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing.model", "cannot be read"),
        (lambda path: _written(path / "x.model", b"no model at all"), "no SentencePiece model"),
        (lambda path: _written(path / "x.model", b""), "no SentencePiece model"),
        (_other_layout, "pad is id -1"),
        (lambda path: path, "has no vocabulary"),
        (lambda path: _written(path / "tokenizer.json", b"{}").parent, "is no tokenizer.json"),
        (lambda path: _written(path / "tokenizer.json", b"\xff").parent, "is no tokenizer.json"),
        (lambda path: _written(path / "tokenizer_config.json", b"[").parent, "is not JSON"),
        (lambda path: _written(path / "tokenizer_config.json", b"[]").parent, "has no vocabulary"),
    ],
)
def test_what_is_no_t5_vocabulary_is_the_users_to_mend(tmp_path, make, message):
    with pytest.raises(InputError, match=message) as caught:
        load_vocabulary(make(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_byt5_tokenizers_directory_is_bytes(tmp_path):
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    _written(tmp_path / "tokenizer_config.json", json.dumps(config).encode())
    assert isinstance(load_vocabulary(tmp_path), ByteVocabulary)


@pytest.mark.parametrize(("texts", "size"), [([], 40), (["", " "], 40), (TEXTS, 5)])
def test_training_on_too_little_is_an_input_error(texts, size, tmp_path):
    with pytest.raises(InputError, match="no vocabulary of"):
        train_sentencepiece(texts, size, tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()


def _written(path, data):
    path.write_bytes(data)
    return path


def word_level(vocab):
    unk = {"id": 2, "content": "<unk>", "single_word": False, "lstrip": False, "rstrip": False}
    unk |= {"normalized": False, "special": True}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    return {"version": "1.0", "added_tokens": [unk], "model": model} | dict.fromkeys(names)


def test_the_size_holds_the_largest_id_of_a_vocabulary_with_gaps(tmp_path):
    tokenizer = word_level({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 700})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.encode("a") == [700] and vocabulary.size == 701


def test_a_tokenizer_at_which_its_library_panics_is_an_input_error(tmp_path):
    tokenizer = word_level({"<pad>": 0, "</s>": 1, "<unk>": 2})
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "="}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"tokenizer.json: is no tokenizer.json"):
        load_vocabulary(tmp_path)
