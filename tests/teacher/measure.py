"""How fast the teacher is: answers a second at a server that answers at once, and re-parsing.

python tests/teacher/measure.py --requests 3000 --completions 10000
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from fault_server import serving

from dslt.data import embedded
from dslt.teacher.endpoint import AskConfig, ask
from dslt.teacher.extract import plan_all, write_extraction
from dslt.teacher.filters import FilterConfig
from dslt.teacher.prompts import load_prompt
from dslt.teacher.questions import EndpointTeacher, to_requests
from dslt.teacher.store import Answer, CompletionStore


def measure_asking(directory: Path, requests: int, windows: int = 5) -> list[tuple[float, float]]:
    """(answers a second of wall time, of this process's CPU time) in each of some windows."""
    examples = embedded.generate("facts", train=requests, validation=0, test=0, seed=0)
    rates = []
    with serving() as base_url, CompletionStore(directory) as store:
        teacher = EndpointTeacher("t", model="m", prompt=load_prompt("nli"), base_url=base_url)
        questions = plan_all(examples, range(requests), [teacher])
        size = requests // windows
        for start in range(0, size * windows, size):
            part = questions[start : start + size]
            cpu = time.process_time()
            stats = ask(to_requests(part), teacher, AskConfig(concurrency=64), store, total=size)
            cpu = time.process_time() - cpu
            rates.append((stats.answered / stats.secs, stats.answered / cpu))
    return rates


def measure_parsing(directory: Path, completions: int) -> tuple[float, float]:
    """(wall, CPU) seconds from a stored run to its records, all filters on."""
    samples = 4
    examples = embedded.generate(
        "facts", train=completions // samples, validation=0, test=0, seed=0
    )
    teacher = EndpointTeacher("t", model="m", prompt=load_prompt("nli"), samples=samples)
    rows = range(len(examples))
    with CompletionStore(directory) as store:
        for number, question in enumerate(plan_all(examples, rows, [teacher])):
            words = " ".join(f"word{number * 7 % 97 + i * i % 89}" for i in range(60))
            label = ("neutral", "entailment", "contradiction")[number % 3]
            store.add_answer(question.key, Answer(f"{words}. So the answer is {label}.", "m"))
    filters = FilterConfig(
        max_rationales=4, min_words=3, max_words=200, max_similarity=0.8, max_question_overlap=0.9
    )
    wall, cpu = time.perf_counter(), time.process_time()
    with CompletionStore(directory) as store:
        write_extraction(examples, rows, plan_all(examples, rows, [teacher]), store, filters)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--completions", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rates = measure_asking(Path(scratch) / "ask", args.requests)
        for name, column in zip(("wall", "CPU"), zip(*rates, strict=True), strict=True):
            print(
                f"answers a second of {name} time: median {statistics.median(column):.0f}, "
                f"{min(column):.0f} to {max(column):.0f}"
            )
        wall, cpu = measure_parsing(Path(scratch) / "parse", args.completions)
        print(f"{args.completions:,} completions to records: {wall:.1f} s, {cpu:.1f} s of CPU time")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
