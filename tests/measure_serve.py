"""Requests a second and latency of `dslt serve` beside batch-1 `generate` of transformers.

    python tests/measure_serve.py runs/facts/student runs/facts/records/records.jsonl

One student, the same held-out problems, labels alone. `generate` runs in this process, one request
after another, as a server without batching would; the clients' waiting counts for both. Sides take
turns, round after round. Where ctranslate2 is installed its answers and latency are shown too.
"""

import argparse
import concurrent.futures
import http.client
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from dslt.records import read_examples

CLIENTS = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("records")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="a round, side and client count")
    args = parser.parse_args()
    problems = [row.input for row in read_examples(args.records) if row.split == "test"]
    torch.set_num_threads(1)  # a student so small is quicker on one
    process, port = start_server(args.student)
    try:
        sides = {"dslt serve": http_client(port), **make_engines(args.student)}
        answers = {name: [ask(text) for text in problems] for name, ask in sides.items()}
        for name, found in answers.items():
            same = sum(a == b for a, b in zip(found, answers["dslt serve"], strict=True))
            print(f"{name}: {same} of {len(problems)} answers as dslt serve's")
        measure(sides, problems, args.rounds, args.requests)
    finally:
        process.terminate()
        print("dslt serve ended with", process.wait())


def start_server(student: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "dslt.main", "serve", "--student", student, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = None
    for line in process.stdout:
        print(line, end="")
        if line.startswith("listening"):
            port = int(line.rsplit(":", 1)[1])
        if line.startswith("ready"):
            return process, port
    raise SystemExit("dslt serve did not start")


def http_client(port: int) -> Callable[[str], str]:
    local = threading.local()

    def ask(text: str) -> str:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({"inputs": [text]})
        local.connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = local.connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        return content["predictions"][0]["label"]

    return ask


def make_engines(student: str) -> dict[str, Callable[[str], str]]:
    """Functions that answer one problem; each one request at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(student).eval()
    lock = threading.Lock()

    def generate(text: str) -> str:
        ids = tokenizer("predict: " + text, return_tensors="pt").input_ids
        with lock, torch.inference_mode():
            found = model.generate(ids, max_new_tokens=64, do_sample=False)
        return tokenizer.decode(found[0], skip_special_tokens=True)

    engines = {"generate": generate}
    try:
        import ctranslate2
    except ModuleNotFoundError:
        return engines
    convert = runpy.run_path(str(Path(__file__).parents[1] / "launch/to_ctranslate2.py"))["main"]
    for kind in ("float32", "int8"):
        output = f"{tempfile.mkdtemp()}/{kind}"
        convert([student, output, "--quantization", kind])
        translator = ctranslate2.Translator(output, compute_type=kind, intra_threads=1)
        engines[f"ctranslate2 {kind}"] = translate_with(translator, tokenizer)
    return engines


def translate_with(translator, tokenizer) -> Callable[[str], str]:
    def translate(text: str) -> str:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("predict: " + text).input_ids)
        found = translator.translate_batch([tokens], beam_size=1, max_decoding_length=64)
        return tokenizer.decode(tokenizer.convert_tokens_to_ids(found[0].hypotheses[0]))

    return translate


def measure(sides: dict, problems: list[str], rounds: int, num_requests: int) -> None:
    for num_clients in CLIENTS:
        found: dict[str, list] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, ask in sides.items():
                found[name].append(load(ask, problems[:num_requests], num_clients))
        rates = {name: [rate for rate, _, _ in rows] for name, rows in found.items()}
        print(f"{num_clients} clients: median (min-max) of {rounds} rounds")
        for name, rows in found.items():
            pairs = zip(rates[name], rates["generate"], strict=True)
            ratios = [own / reference for own, reference in pairs]
            print(
                f"  {name}: {describe(rates[name])} a second, p50 "
                f"{describe([1e3 * p50 for _, p50, _ in rows])} ms, p99 "
                f"{describe([1e3 * p99 for _, _, p99 in rows])} ms; "
                f"{describe(ratios)} times generate's requests a second"
            )


def load(ask, problems: list[str], num_clients: int) -> tuple[float, float, float]:
    """(requests a second, p50 and p99 of the latency in seconds)."""

    def timed(text: str) -> float:
        started_secs = time.perf_counter()
        ask(text)
        return time.perf_counter() - started_secs

    started_secs = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as clients:
        secs = sorted(clients.map(timed, problems))
    rate = len(secs) / (time.perf_counter() - started_secs)
    return rate, statistics.median(secs), secs[int(0.99 * (len(secs) - 1))]


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
