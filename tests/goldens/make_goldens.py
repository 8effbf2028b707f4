"""What PyTorch `transformers` computes for small random T5s: the oracle of the parity tests.

    python tests/goldens/make_goldens.py    # rewrites the goldens beside this file; needs torch

A golden is a Hugging Face directory (config.json as transformers 4 wrote them, model.safetensors)
with `expected.safetensors`: inputs, logits, gradients and greedy tokens. The tests compare with the
stored ones everywhere, and with larger ones made on the spot where torch is installed.
"""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES = {  # what a family's config.json says besides the sizes
    "t5_v1_0": {"model_type": "t5"},  # relu and tied by default
    "t5_v1_1": {"model_type": "t5", **GATED},
    "mt5": {"model_type": "mt5", **GATED},
    "byt5": {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 1, **GATED},
    "umt5": {"model_type": "umt5", **GATED},
}
SMALL = {
    "vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip
LARGE = {
    "vocab_size": 160, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_heads": 4, "num_layers": 3,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
IGNORED_LABEL = -100


def make_golden(
    directory: Path, family: str, sizes: dict, source_length: int, target_length: int
) -> transformers.PreTrainedModel:
    """Writes one golden and returns the model that made it."""
    fields = {**sizes, **FAMILIES[family]}
    write_model(directory, fields)
    model = load_model(directory)
    torch.manual_seed(1)
    lengths = [source_length, source_length // 2, 1]
    inputs = _padded_tokens(lengths, fields["vocab_size"])
    targets = _padded_tokens([target_length // 3, target_length, 2], fields["vocab_size"])
    labels = targets.masked_fill(targets == 0, IGNORED_LABEL)
    output = model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels)
    output.loss.backward()
    generated = model.generate(
        input_ids=inputs,
        attention_mask=(inputs != 0).long(),
        max_new_tokens=target_length,
        do_sample=False,
    )
    expected = {
        "encoder_input_tokens": inputs.int(),
        "decoder_target_tokens": targets.int(),
        "logits": output.logits.detach(),
        "loss": output.loss.detach(),
        "generated": generated[:, 1:].int().contiguous(),  # without the start token
    }
    gradients = {f"gradient.{name}": tensor.grad for name, tensor in model.named_parameters()}
    safetensors.torch.save_file({**expected, **gradients}, directory / "expected.safetensors")
    return model


def load_model(directory: Path) -> transformers.PreTrainedModel:
    """A model as `from_pretrained` gives it, in float32.

    transformers 5 claims that every umT5 is tied and scales its output even where it has an
    lm_head; the released ones are trained without that scale, so the claim is corrected here.
    """
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    if model.config.model_type == "umt5" and model.lm_head.weight is not model.shared.weight:
        model.config.tie_word_embeddings = False
    return model.eval()


def write_model(directory: Path, fields: dict) -> None:
    """Writes config.json and random weights of a scale that keeps logits near 1."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {**fields, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    tensors = {name: _random_like(name, tensor) for name, tensor in model.named_parameters()}
    if fields.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = _random_like("lm_head.weight", model.lm_head.weight)
    metadata = {"format": "pt"}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata)


def _random_like(name: str, tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape)
    if tensor.ndim == 1:
        return 1.0 + 0.2 * noise
    if name == "shared.weight" or "relative_attention_bias" in name:
        return noise
    return noise * tensor.shape[1] ** -0.5


def _padded_tokens(lengths: list[int], vocab_size: int) -> torch.Tensor:
    """[rows, longest] int64: random tokens that end in EOS, then padding."""
    tokens = torch.randint(2, vocab_size, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 1
        tokens[row, length:] = 0
    return tokens


if __name__ == "__main__":
    for family in FAMILIES:
        make_golden(Path(__file__).parent / family, family, SMALL, 24, 12)
