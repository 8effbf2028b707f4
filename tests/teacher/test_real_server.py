"""Against a server program not ours: `transformers serve` with a model that speaks nonsense.

Needs torch and the packages of `transformers[serving]`; skipped where they are not installed.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from dslt.main import main
from dslt.records import read_examples

MISSING = [
    name
    for name in ("torch", "fastapi", "uvicorn", "accelerate", "openai")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not installed (pip install 'transformers[serving]')",
)
START_SECS = 120


def make_model(directory):
    """A Llama of some thousand random weights, with a tokenizer of bytes and a chat template."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


@contextlib.contextmanager
def serving_transformers(directory, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(directory), "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            end = time.monotonic() + START_SECS
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.slow
def test_nonsense_is_asked_answered_and_not_kept(tmp_path, capsys):
    model = tmp_path / "model"
    make_model(model)
    output = tmp_path / "records"
    with serving_transformers(model, tmp_path / "serve.log") as base_url:
        status = main([
            "extract", "--dataset", "facts", "--teacher", "endpoint", "--model", str(model),
            "--base_url", base_url, "--output_dir", str(output), "--train", "6",
            "--validation", "2", "--test", "2", "--concurrency", "2", "--max_tokens", "16",
            "--sampling_seed", "0", "--name", "nonsense",
        ])  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed
    funnel = json.loads((output / "summary.json").read_text())["funnels"]["nonsense"]
    assert funnel == {"asked": 10, "answered": 10, "parsed": 0, "legal": 0, "kept": 0}
    assert "asked 10 → answered 10 → parsed 0 → legal 0 → kept 0" in printed.out
    assert all(record.rationale is None for record in read_examples(output / "records.jsonl"))
    events = [json.loads(line) for line in (output / "completions.jsonl").open()]
    answers = [event for event in events if event["event"] == "answer"]
    assert len(answers) == 10 and all(answer["output_tokens"] > 0 for answer in answers)
