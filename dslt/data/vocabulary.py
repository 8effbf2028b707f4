"""Text to token ids and back: SentencePiece files, Hugging Face tokenizers, bytes.

May import numpy, sentencepiece, tokenizers and `dslt.core.batch`; never SeqIO or TensorFlow.

    vocabulary = load_vocabulary("spiece.model")  # or a tokenizer's directory, or "bytes"
    vocabulary.decode(vocabulary.encode("predict: two and two"))

Text is data: the words `</s>`, `<pad>` or `<extra_id_0>` in a text never become the special ids.
SentencePiece and bytes spell them out; in a tokenizer.json, whose model knows them as pieces, they
become unknown. In this the encoders differ from `transformers`.
"""

import collections
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dslt import strict_json
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.errors import InputError
from dslt.files import replacing

UNK_ID = 2  # T5's; every trained vocabulary here has it
NUM_SENTINELS = 100  # T5 appends 100 sentinel ids to a SentencePiece file's pieces
OWN_SENTINEL = "▁<extra_id_0>"  # in mT5's file they are among the pieces

BYTES_SPEC = "bytes"
BYTE_OFFSET = 3  # ByT5: pad, EOS and unknown come before the 256 bytes
NUM_BYTE_IDS = 384  # ByT5: 3 + 256 bytes + 125 sentinels

WORD_START = "▁"  # SentencePiece's mark for a space
MAX_PIECE_CHARACTERS = 16  # SentencePiece's own limits
MAX_CANDIDATES = 1_000_000

SENTENCEPIECE_FILE = "spiece.model"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class Vocabulary(Protocol):
    """What the data wing needs of a tokenizer. Pad is 0 and EOS is 1 in every one.

    Attributes:
      size: how many embedding rows its ids need, sentinels included.
      unk_id: the id of what it cannot spell, or None where it can spell everything.
      digest: sha256 hex of its content; equal digests tokenize alike.
    """

    size: int
    unk_id: int | None
    digest: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first EOS; padding, sentinels and ids beyond `size` say nothing."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the file that `load_vocabulary(directory)` and `transformers` read."""


class SentencePieceVocabulary:
    """T5's own kind: a SentencePiece model file, with sentinel ids behind or among its pieces."""

    def __init__(self, path: str | os.PathLike):
        """Reads and checks a model file; raises InputError if it is none or not in T5's layout."""
        self.path = Path(path)
        self._model = _read_bytes(self.path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError:
            raise InputError(
                f"{self.path}: found {len(self._model)} bytes that are no SentencePiece model; "
                "expected a .model file as T5 has it"
            ) from None
        _check_special_ids(self.path, self._processor.pad_id(), self._processor.eos_id())
        self.num_pieces = self._processor.GetPieceSize()
        self.unk_id = self._processor.unk_id()
        has_own = self._processor.PieceToId(OWN_SENTINEL) != self.unk_id
        self.size = self.num_pieces + (0 if has_own else NUM_SENTINELS)
        self.digest = hashlib.sha256(self._model).hexdigest()

    @property
    def model_proto(self) -> bytes:
        """The model as the library writes it, to compare with what another reader holds."""
        return self._processor.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds(
            [token for token in _until_eos(ids) if token < self.num_pieces]
        )

    def save(self, directory: str | os.PathLike) -> None:
        _write_bytes(Path(directory) / SENTENCEPIECE_FILE, self._model)


class TokenizerVocabulary:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: str | os.PathLike):
        """Reads and checks a tokenizer.json; raises InputError if it is none or not T5's layout."""
        self.path = Path(path)
        self._json = _read_bytes(self.path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(self._json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain Exception for most faults; a panic in Rust is none
            raise InputError(
                f"{self.path}: is no tokenizer.json ({error}); expected the file that "
                "`save_pretrained` writes"
            ) from None
        self.tokenizer.encode_special_tokens = True  # they are no words that a text may use
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        _check_special_ids(
            self.path, self.tokenizer.token_to_id("<pad>"), self.tokenizer.token_to_id("</s>")
        )
        if self.tokenizer.token_to_id("<unk>") is None:
            raise InputError(f"{self.path}: has no <unk>; expected a T5 tokenizer, which has one")
        self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.unk_id = self.tokenizer.token_to_id("<unk>")
        self.digest = hashlib.sha256(self._json).hexdigest()
        added = self.tokenizer.get_added_tokens_decoder()
        self._special_ids = {PAD_ID, EOS_ID, *(i for i, token in added.items() if token.special)}

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        return [self.unk_id if token in self._special_ids else token for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        known = [token for token in _until_eos(ids) if token < self.size]
        return self.tokenizer.decode(known, skip_special_tokens=True)

    def save(self, directory: str | os.PathLike) -> None:
        _write_bytes(Path(directory) / TOKENIZER_FILE, self._json)


class ByteVocabulary:
    """ByT5's kind: a text's UTF-8 bytes, each plus three."""

    size = NUM_BYTE_IDS
    unk_id = None
    digest = hashlib.sha256(b"ByT5: 3 special ids, 256 bytes, 125 sentinels").hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + BYTE_OFFSET for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        in_range = range(BYTE_OFFSET, BYTE_OFFSET + 256)
        data = bytes(token - BYTE_OFFSET for token in _until_eos(ids) if token in in_range)
        return data.decode("utf-8", errors="ignore")

    def save(self, directory: str | os.PathLike) -> None:
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": NUM_BYTE_IDS - 256 - BYTE_OFFSET}
        _write_bytes(Path(directory) / TOKENIZER_CONFIG_FILE, json.dumps(config).encode())


def load_vocabulary(spec: str | os.PathLike) -> Vocabulary:
    """Opens the vocabulary that `spec` names.

    Args:
      spec: `bytes`; the path of a SentencePiece model; or a Hugging Face tokenizer's directory,
        in which `tokenizer.json` goes before `spiece.model` and a ByT5 configuration comes last.

    Raises:
      InputError: nothing usable is there, or its pad and EOS are not T5's 0 and 1.
    """
    if os.fspath(spec) == BYTES_SPEC:
        return ByteVocabulary()
    path = Path(spec)
    if not path.is_dir():
        return SentencePieceVocabulary(path)
    if (path / TOKENIZER_FILE).is_file():
        return TokenizerVocabulary(path / TOKENIZER_FILE)
    if (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceVocabulary(path / SENTENCEPIECE_FILE)
    if _is_byt5(path / TOKENIZER_CONFIG_FILE):
        return ByteVocabulary()
    raise InputError(
        f"{path}: has no vocabulary; expected {TOKENIZER_FILE}, {SENTENCEPIECE_FILE} or a "
        f"{TOKENIZER_CONFIG_FILE} of ByT5. Give a SentencePiece file, a tokenizer's directory or "
        f"{BYTES_SPEC!r}"
    )


def check_embedded(vocabulary: Vocabulary, name: object, vocab_size: int, model: object) -> None:
    """Raises InputError, with both names, where a model embeds fewer ids than the vocabulary has.

    More it may embed: T5's 32,100 ids have a table of 32,128 rows.
    """
    if vocabulary.size > vocab_size:
        raise InputError(
            f"the vocabulary {str(name)!r} has {vocabulary.size:,} ids, but {model} embeds "
            f"{vocab_size:,}; expected at least as many. Give the vocabulary that the model "
            "was trained with; of a new model, t5.T5Config.vocab_size"
        )


def has_same_pieces(first: Vocabulary, second: Vocabulary) -> bool:
    """Whether the ids that both have mean the same, in whatever files they lie; one may have more.

    A SentencePiece file and a tokenizer.json show a few of the same pieces differently, so nine of
    ten must agree; an id that says nothing in either, such as a sentinel, is not counted.
    """
    if first.digest == second.digest:
        return True
    num_ids = min(first.size, second.size)
    pieces = [
        tuple(one.decode([token]).replace(WORD_START, " ").strip() for one in (first, second))
        for token in range(UNK_ID + 1, num_ids, 1 + num_ids // 4096)
    ]
    pieces = [pair for pair in pieces if any(pair)]
    return sum(one == other for one, other in pieces) >= 0.9 * len(pieces)


def remove_vocabulary(directory: str | os.PathLike) -> None:
    """Deletes what `load_vocabulary` would read in a directory, and nothing else there."""
    for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE, TOKENIZER_CONFIG_FILE):
        (Path(directory) / name).unlink(missing_ok=True)


def train_sentencepiece(
    texts: Iterable[str], size: int, path: str | os.PathLike
) -> SentencePieceVocabulary:
    """Trains unigram pieces on `texts` and writes them to `path`; the same texts, the same file.

    The candidates are all parts of words. SentencePiece's own must occur in two different words,
    which cuts a text of few words to bits (the embedded problems: 44 tokens a text instead of 18).
    Unigram pieces, as T5's own, because a Hugging Face T5 tokenizer reads no others.

    Args:
      texts: the lines to learn from; line breaks in them count as spaces, as they do in encoding.
      size: how many pieces at most, special ids included; few texts give fewer.
      path: the .model file to write.

    Raises:
      InputError: there is no text, or `size` is below the number of distinct characters.
    """
    lines = [" ".join(text.split()) for text in texts]
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as candidates:
            candidates.writelines(f"{piece}\t{score}\n" for piece, score in _candidates(lines))
            candidates.flush()
            model = _train_unigram(lines, size, candidates.name)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path}: no vocabulary of {size} pieces can be trained ({error}); give more text or "
            "another size"
        ) from None
    _write_bytes(Path(path), model)
    return SentencePieceVocabulary(path)


def _train_unigram(lines: Sequence[str], size: int, candidates: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        seed_sentencepieces_file=candidates,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        # What is longer is passed over without a word; 4,192 bytes unless told.
        max_sentence_length=max([1, *(len(line.encode()) for line in lines)]),
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        bos_id=-1,
        num_threads=1,  # more of them sum in another order, and so may choose other pieces
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # the path of a temporary file
    return proto.SerializeToString(deterministic=True)


def _candidates(lines: Iterable[str]) -> list[tuple[str, int]]:
    """The parts of words that may become pieces, each with its count times its length."""
    words = collections.Counter(word for line in lines for word in line.split())
    scores: collections.Counter = collections.Counter()
    for word, count in words.items():
        word = WORD_START + word
        for start in range(len(word)):
            for stop in range(start + 2, min(start + MAX_PIECE_CHARACTERS, len(word)) + 1):
                scores[word[start:stop]] += count * (stop - start)
    return scores.most_common(MAX_CANDIDATES)


def encode_with_eos(vocabulary: Vocabulary, text: str, max_length: int) -> tuple[np.ndarray, bool]:
    """The tokens as a Task gives them: cut so that EOS is the last.

    Returns:
      ([length] int32 with length <= max_length, whether anything was cut off).
    """
    ids = vocabulary.encode(text)
    kept = ids[: max_length - 1]
    return np.array([*kept, EOS_ID], np.int32), len(kept) < len(ids)


def _until_eos(ids: Sequence[int]) -> list[int]:
    """The ids before the first EOS, without padding, as Python ints."""
    ids = [int(token) for token in ids]
    end = ids.index(EOS_ID) if EOS_ID in ids else len(ids)
    return [token for token in ids[:end] if token > PAD_ID]


def _check_special_ids(path: Path, pad_id: int | None, eos_id: int | None) -> None:
    if (pad_id, eos_id) != (PAD_ID, EOS_ID):
        raise InputError(
            f"{path}: pad is id {pad_id} and end of sequence is id {eos_id}; expected {PAD_ID} and "
            f"{EOS_ID} as every T5 has them. Give a T5 vocabulary"
        )


def _is_byt5(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        config = strict_json.loads(_read_bytes(path))
    except ValueError:
        raise InputError(f"{path}: is not JSON; expected a tokenizer's configuration") from None
    name = config.get("tokenizer_class") if isinstance(config, dict) else None
    return name == "ByT5Tokenizer"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a vocabulary: a SentencePiece "
            f"file, a tokenizer's directory or {BYTES_SPEC!r}"
        ) from None


def _write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that it appears whole or not at all."""
    with replacing(path, "wb") as file:
        file.write(data)
