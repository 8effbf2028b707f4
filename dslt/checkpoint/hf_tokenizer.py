"""The tokenizer's files of an exported T5, such that `AutoTokenizer` of transformers 4 and 5 reads
the tokens that the student was trained on.

May import sentencepiece and tokenizers.
"""

import shutil
from pathlib import Path

from dslt.checkpoint.hf_config import write_json
from dslt.core.batch import EOS_ID, PAD_ID
from dslt.errors import InputError

TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def write_tokenizer(directory: Path, source: Path, model_type: str) -> None:
    """Copies a vocabulary's files and adds what `AutoTokenizer` needs besides.

    transformers 5 rebuilds a T5Tokenizer's normaliser by its own rules when it reads a
    tokenizer.json, so a bare one is given the class that takes it as it is; and it does not read
    the spiece.model of a umT5.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"spiece.model", "tokenizer.json", "tokenizer_config.json"} & set(names):
        raise InputError(
            f"{source}: has no vocabulary; expected spiece.model, tokenizer.json or a "
            "tokenizer_config.json of ByT5"
        )
    for name in names:
        shutil.copyfile(source / name, directory / name)
    if model_type == "umt5" and "spiece.model" in names and "tokenizer.json" not in names:
        write_tokenizer_json(directory / "spiece.model", directory / "tokenizer.json")
    if "tokenizer_config.json" not in names:
        is_fast = (directory / "tokenizer.json").is_file()
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast" if is_fast else "T5Tokenizer",
            **({} if is_fast else {"extra_ids": 100}),
            "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        }
        write_json(directory / "tokenizer_config.json", fields)


def write_tokenizer_json(spiece_path: Path, path: Path) -> None:
    """The tokenizer.json of T5's SentencePiece models: unigram pieces and 100 sentinels."""
    from sentencepiece import sentencepiece_model_pb2  # protobuf: only umT5 exports need it
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = sentencepiece_model_pb2.ModelProto.FromString(spiece_path.read_bytes())
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unk_id = model.trainer_spec.unk_id
    vocab = pieces + [(sentinel, 0.0) for sentinel in sentinels]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    tokenizer.add_special_tokens([pieces[id_][0] for id_ in (PAD_ID, EOS_ID, unk_id)] + sentinels)
    tokenizer.save(str(path))
