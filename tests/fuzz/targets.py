"""Every reader of something from outside, as a function of bytes: TARGETS, by name.

A target hands the bytes to its reader. It returns True where they were read and False where the
reader refused them with an InputError; anything else that it raises is a fault of the reader. What
was read is compared with what another reader makes of the same bytes, or written and read again, so
that a wrong row is a fault too.

    python tests/fuzz/run.py --target read_examples --runs 100000  # by coverage: atheris
    pytest tests/fuzz                                             # by mutation of the seeds

`seeds(name)` gives valid inputs; mutations.py changes one as a file gets damaged or forged.
"""

import ast
import contextlib
import csv
import functools
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy

from dslt import config, metrics, records, workdir
from dslt.checkpoint import hf_t5, hf_tensors, hf_tokenizer
from dslt.checkpoint.manager import Layout
from dslt.commands.predict import read_inputs
from dslt.core import t5
from dslt.core.t5 import T5Config
from dslt.data import datasets, vocabulary
from dslt.data.token_cache import _load_table, _read_meta
from dslt.errors import InputError
from dslt.teacher import batch_files, panel, parse, prompts, released
from dslt.teacher.store import Answer, CompletionStore

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = T5Config(
    vocab_size=32, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_layers=1, num_decoder_layers=1
)
CHECKED_TEXT = "predict: ann has 2 hats . </s> <extra_id_0> é☃"
_abstract_params = functools.cache(t5.abstract_params)  # the same few configs, many times

Target = Callable[[bytes], bool]
TARGETS: dict[str, Target] = {}
_SEEDS: dict[str, Callable[[Path], list[bytes]]] = {}


def target(seeds: Callable[[Path], list[bytes]]):
    """Registers a function (bytes, scratch directory) under its name."""

    def register(read):
        @functools.wraps(read)
        def run(data: bytes) -> bool:
            scratch = _scratch()
            try:
                read(data, scratch)
            except InputError as error:
                assert len(str(error)) < 200_000 + 40 * len(data), "a refusal without end"
                return False
            return True

        TARGETS[read.__name__] = run
        _SEEDS[read.__name__] = seeds
        return run

    return register


def seeds(name: str) -> list[bytes]:
    """Inputs that the target reads."""
    with tempfile.TemporaryDirectory() as directory:
        return _SEEDS[name](Path(directory))


@functools.cache
def _scratch() -> Path:
    directory = tempfile.mkdtemp(prefix="dslt-fuzz-", dir=_memory())
    import atexit

    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# ---------------------------------------------------------------------------------- rows of JSON


def _examples() -> list[records.Example]:
    return [
        records.Example(
            id="a-1", dataset="sums", split="train", input="2 and 3?", label="( 2 + 3 )",
            teacher_label="( 3 + 2 )", rationale="Both ☃ count.", teacher="m", prompt="p",
            answer_form="equation", rationale_weight=0.5, is_hinted=True,
            more_rationales=(records.Rationale("Again.", 2.0, "n", None, False),),
        ),
        records.Example(id="a-2", dataset="sums", split="test", input="ann\nhas", label=None),
    ]  # fmt: skip


def _predictions() -> list[records.Prediction]:
    return [
        records.Prediction(
            "a", "sums", "test", "2?", "( 2 )", "( 2 )", None, "so", True, "text", 1
        ),
        records.Prediction("b", "sums", "validation", "3?", "", probability=0.25),
    ]


def _written(rows) -> Callable[[Path], list[bytes]]:
    def write(directory: Path) -> list[bytes]:
        records.write_rows(directory / "rows", rows())
        whole = (directory / "rows").read_bytes()
        return [whole, whole.splitlines(keepends=True)[-1], b"\xef\xbb\xbf" + whole]

    return write


def _json_lines(data: bytes) -> list[dict]:
    text = data.decode("utf-8-sig")
    return [json.loads(line.strip()) for line in text.split("\n") if line.strip()]


@target(_written(_examples))
def read_examples(data: bytes, scratch: Path) -> None:
    _check_rows(data, scratch, records.read_examples)


@target(_written(_predictions))
def read_predictions(data: bytes, scratch: Path) -> None:
    _check_rows(data, scratch, records.read_predictions)


def _check_rows(data: bytes, scratch: Path, read) -> None:
    path, again = scratch / "rows.jsonl", scratch / "again.jsonl"
    path.write_bytes(data)
    rows = list(read(path))
    found = _json_lines(data)
    assert [(row.id, row.input, row.label) for row in rows] == [
        (row["id"], row["input"], row.get("label")) for row in found
    ]
    records.write_rows(again, rows)
    assert _equal(list(read(again)), rows)


def _equal(first: list, second: list) -> bool:
    return first == second or repr(first) == repr(second)  # NaN is not equal to itself


def _table_seeds(directory: Path) -> list[bytes]:
    rows = [
        {"q": "ann has 2", "a": "yes", "why": "so", "n": "r1", "part": "train"},
        {"q": "bob ☃", "a": None, "why": None, "n": "r2", "part": "dev"},
    ]
    return [
        "".join(json.dumps(row) + "\n" for row in rows).encode(),
        json.dumps(rows, ensure_ascii=False).encode(),
    ]


_COLUMNS = {
    "input_columns": ["q"], "label_column": "a", "rationale_column": "why", "id_column": "n",
    "split_column": "part",
}  # fmt: skip


@target(_table_seeds)
def read_jsonl_table(data: bytes, scratch: Path) -> None:
    path = scratch / "table.jsonl"
    path.write_bytes(data)
    rows = datasets.read_table(path, "mine", **_COLUMNS)
    text = data.decode("utf-8-sig")
    found = json.loads(text) if text.lstrip().startswith("[") else _json_lines(data)
    assert [(row.id, row.input, row.label) for row in rows] == [
        (row["n"], row["q"], row["a"]) for row in found
    ]
    _round_trip(rows, scratch)


def _csv_seeds(directory: Path) -> list[bytes]:
    rows = [
        ("q", "a", "why", "n", "part"),
        ("ann, 2", 'say "yes"', "so\nit is", "r1", "train"),
        ("bob ☃", "", "", "r2", "test"),
    ]
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    text = file.getvalue().encode()
    return [text, b"\xef\xbb\xbf" + text, text.replace(b"\r\n", b"\n")]


@target(_csv_seeds)
def read_csv_table(data: bytes, scratch: Path) -> None:
    path = scratch / "table.csv"
    path.write_bytes(data)
    rows = datasets.read_table(path, "mine", **_COLUMNS)
    table = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    header, *found = [cells for cells in table if cells]
    found = [dict(zip(map(str.strip, header), cells, strict=True)) for cells in found]
    assert [(row.id, row.input) for row in rows] == [(row["n"], row["q"]) for row in found]
    _round_trip(rows, scratch)


def _round_trip(rows: list[records.Example], scratch: Path) -> None:
    records.write_rows(scratch / "again.jsonl", rows)
    assert list(records.read_examples(scratch / "again.jsonl")) == rows


def _released_seeds(directory: Path) -> list[bytes]:
    rows = [
        {"input": "2 + 3?", "label": "( 2 + 3 )"},
        {"question": "where?", "choices": ["sea", "sky "], "answer": "sea"},
        {"premise": "a", "hypothesis": "b", "label": 2},
    ]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    return [*lines, json.dumps(rows[:1]).encode(), b'["So the answer is ( 2 + 3 )."]']


@target(_released_seeds)
def read_released(data: bytes, scratch: Path) -> None:
    """The released layout of each dataset, and its completions."""
    (scratch / "llm").mkdir(exist_ok=True)
    is_read = False
    for dataset in datasets.RELEASED_DATASETS:
        for word in ("train", "test"):
            (scratch / f"{dataset}_{word}.json").write_bytes(data)
        with contextlib.suppress(InputError):
            rows = datasets.read_released(scratch, dataset)
            _round_trip(rows, scratch)
            is_read = True
    (scratch / "llm" / "train_CoT_0.json").write_bytes(data)
    with contextlib.suppress(InputError):
        example = records.Example("svamp-train-0", "svamp", "train", "?")
        texts = released.read_completions(scratch, [example])
        assert list(texts.values()) == json.loads(data)
        is_read = True
    if not is_read:
        raise InputError("no dataset's")


def _store_seeds(directory: Path) -> list[bytes]:
    with CompletionStore(directory) as store:
        store.mark_sent(["k1", "k2", "k3"])
        store.add_answer("k1", Answer("so\u2028", "m", "thought", "stop", 3, 4))
        store.add_failure("k2", "500")
    whole = (directory / "completions.jsonl").read_bytes()
    return [whole, whole[:-20], whole + b'{"event": "answer", "key": "k9", "te']


@target(_store_seeds)
def completion_store(data: bytes, scratch: Path) -> None:
    """Opened, written to and opened again; what was answered stays."""
    path = scratch / "store" / "completions.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with CompletionStore(path.parent) as store:
        answers, failures, in_flight = store.answers, store.failures, store.in_flight
        for answer in answers.values():
            parse.parse_completion(
                answer.text, parse.TEXT, reasoning=answer.reasoning,
                finish_reason=answer.finish_reason,
            )  # fmt: skip
            json.dumps([answer.text, answer.model], ensure_ascii=False).encode()
            assert answer.input_tokens + answer.output_tokens >= 0
        json.dumps([*answers, *failures.items(), *in_flight], ensure_ascii=False).encode()
        store.add_answer("new\n", Answer("text"))
    with CompletionStore(path.parent) as store:
        assert store.answers == answers and not store.torn_bytes
        assert store.failures.keys() | {"new\n"} >= failures.keys() - {"new\n"}


def _batch_seeds(directory: Path) -> list[bytes]:
    choice = {"finish_reason": "stop", "message": {"content": "So the answer is yes."}}
    body = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3}}
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "yes"}]}}]}
    rows = [
        {"custom_id": "k1", "response": {"status_code": 200, "body": body}, "error": None},
        {"custom_id": "k2", "response": {"status_code": 200, "body": parts}},
        {"custom_id": "k3", "response": {"status_code": 500, "body": {"error": "x"}}},
        {"custom_id": "k4", "response": None, "error": {"message": "expired"}},
    ]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


@target(_batch_seeds)
def read_batch(data: bytes, scratch: Path) -> None:
    path, directory = scratch / "results.jsonl", scratch / "batch"
    path.write_bytes(data)
    shutil.rmtree(directory, ignore_errors=True)
    with CompletionStore(directory) as store:
        results = batch_files.read_batch([str(path)], store, {"k1", "k2", "k3", "k4"})
        answers, failures = store.answers, store.failures
        assert results.answers == len(answers)
    with CompletionStore(directory) as store:
        assert (store.answers, store.failures) == (answers, failures)


def _teachers_seeds(directory: Path) -> list[bytes]:
    entries = [{"name": "a", "weight": 2, "model": "m", "extra_body": {"top_k": 3}}, {"samples": 2}]
    return [json.dumps(entries).encode()]


@target(_teachers_seeds)
def read_teachers(data: bytes, scratch: Path) -> None:
    path = scratch / "teachers.json"
    path.write_bytes(data)
    fields = ("name", "weight", "model", "samples", "temperature", "extra_body")
    panel.read_teachers(str(path), fields)


def _inputs_seeds(directory: Path) -> list[bytes]:
    return [
        "ann has 2 hats .\n\nbob ☃\n".encode(),
        b'{"input": "a", "label": "b", "rationale": "c", "split": "test"}\n{"input": "d"}\n',
        b"\xef\xbb\xbf" + b'{"input": "a"}\r\n',
    ]


@target(_inputs_seeds)
def predict_inputs(data: bytes, scratch: Path) -> None:
    path = scratch / "inputs.txt"
    path.write_bytes(data)
    rows = read_inputs(str(path), None)
    lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    lines = [line for line in lines if line]
    found = [json.loads(x)["input"] if x.startswith("{") else x for x in lines]
    assert [row["input"] for row in rows] == found
    for row in rows:
        json.dumps(row, ensure_ascii=False).encode("utf-8")


# ---------------------------------------------------------------------------- settings and files


def _prompt_seeds(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(prompts.DIRECTORY.glob("*.toml"))]


@target(_prompt_seeds)
def load_prompt(data: bytes, scratch: Path) -> None:
    path = scratch / "prompt.toml"
    path.write_bytes(data)
    prompt = prompts.load_prompt(str(path))
    problem = "{input} {rationale} %s"
    assert prompt.messages(problem)[-1]["content"].count(problem) == prompt.question.count(
        "{input}"
    )
    prompt.text(problem, hint="{answer}")
    prompt.digest.encode()


def _gin_seeds(directory: Path) -> list[bytes]:
    root = config.gin_directory()
    names = ("runs/step_by_step.gin", "settings/facts.gin", "models/tiny.gin", "settings/paper.gin")
    return [(root / name).read_bytes() for name in names]


@target(_gin_seeds)
def parse_gin(data: bytes, scratch: Path) -> None:
    """A gin file; it starts nothing, and what was read is read again from the operative config."""
    path = scratch / "run.gin"
    path.write_bytes(data)
    configs = config.parse([str(path)])
    again = scratch / "again.gin"
    again.write_text(configs.text, encoding="utf-8")
    assert config.parse([str(again)]).text == configs.text


@functools.cache
def _tiny_params() -> dict:
    abstract = _abstract_params(TINY)[1]
    rng = np.random.default_rng(0)
    import jax

    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


def _hf_directory(directory: Path, **options) -> Path:
    """A small exported model, made once for a scratch directory."""
    if not directory.exists():
        (directory.parent / "bytes").mkdir(exist_ok=True)
        vocabulary.ByteVocabulary().save(directory.parent / "bytes")
        hf_t5.save(directory, TINY, _tiny_params(), directory.parent / "bytes", **options)
    return directory


def _file_of_model(name: str, **options) -> Callable[[Path], list[bytes]]:
    return lambda directory: [(_hf_directory(directory / "hf", **options) / name).read_bytes()]


def _config_seeds(directory: Path) -> list[bytes]:
    paths = [_hf_directory(directory / "hf") / "config.json", *GOLDENS.glob("*/config.json")]
    return [path.read_bytes() for path in paths]


@target(_config_seeds)
def hf_config(data: bytes, scratch: Path) -> None:
    """config.json beside fixed weights: what is declared must be what the weights are."""
    directory = _hf_directory(scratch / "config")
    (directory / "config.json").write_bytes(data)
    found, params = hf_t5.load_params(directory)
    assert params["token_embedding"].shape == (found.vocab_size, found.d_model)
    assert np.array_equal(params["token_embedding"], _tiny_params()["token_embedding"])


@target(_file_of_model("model.safetensors"))
def hf_weights(data: bytes, scratch: Path) -> None:
    """model.safetensors beside a fixed config.json: every number is that of the file."""
    directory = _hf_directory(scratch / "weights")
    (directory / "model.safetensors").write_bytes(data)
    _check_weights(directory, safetensors.numpy.load(data) if _is_plain(data) else None)


def _is_plain(data: bytes) -> bool:
    """Whether the library that reads whole files does (it knows fewer dtypes)."""
    try:
        safetensors.numpy.load(data)
    except Exception:
        return False
    return True


def _check_weights(directory: Path, expected: dict | None) -> None:
    with _cached_shapes():
        _, params = hf_t5.load_params(directory)
    for name, spec in hf_tensors.tensor_specs(TINY).items() if expected is not None else ():
        found = hf_tensors.file_tensor(params, spec)
        name = name if name in expected else "encoder.embed_tokens.weight"
        assert np.array_equal(found, expected[name].astype(np.float32), equal_nan=True), name


@contextlib.contextmanager
def _cached_shapes() -> Iterator[None]:
    t5.abstract_params = _abstract_params
    try:
        yield
    finally:
        t5.abstract_params = _abstract_params.__wrapped__


@target(_file_of_model("model.safetensors.index.json", max_shard_bytes=1000))
def hf_index(data: bytes, scratch: Path) -> None:
    """An index beside fixed shards: it names files beside it alone."""
    directory = _hf_directory(scratch / "index", max_shard_bytes=1000)
    (scratch / "outside.safetensors").write_bytes(b"")
    (directory / "model.safetensors.index.json").write_bytes(data)
    with _cached_shapes():
        _, params = hf_t5.load_params(directory)
    assert _equal_trees(params, _tiny_params())


def _equal_trees(first: dict, second: dict) -> bool:
    import jax

    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def _spiece_seeds(directory: Path) -> list[bytes]:
    texts = [f"ann has {n} hats and bob has {m} .☃" for n in range(9) for m in range(9)]
    return [vocabulary.train_sentencepiece(texts, 60, directory / "s.model").path.read_bytes()]


@target(_spiece_seeds)
def sentencepiece_model(data: bytes, scratch: Path) -> None:
    path = scratch / "spiece.model"
    path.write_bytes(data)
    _check_vocabulary(vocabulary.load_vocabulary(path), scratch)


def _tokenizer_seeds(directory: Path) -> list[bytes]:
    _spiece_seeds(directory)
    hf_tokenizer.write_tokenizer_json(directory / "s.model", directory / "tokenizer.json")
    return [(directory / "tokenizer.json").read_bytes()]


@target(_tokenizer_seeds)
def tokenizer_json(data: bytes, scratch: Path) -> None:
    directory = scratch / "tokenizer"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(data)
    _check_vocabulary(vocabulary.load_vocabulary(directory), scratch)


def _check_vocabulary(found: vocabulary.Vocabulary, scratch: Path) -> None:
    """Ids fit the embedding, special ids never come from a text, and decoding takes any id."""
    ids = found.encode(CHECKED_TEXT)
    assert all(0 <= token < found.size for token in ids), (ids, found.size)
    assert not {0, 1} & set(ids), ids
    found.decode([*ids, 0, 1]).encode()
    found.decode(range(2, min(found.size, 500) + 3)).encode()
    assert found.unk_id is None or 0 <= found.unk_id < found.size


def _student_seeds(directory: Path) -> list[bytes]:
    workdir.StudentFormat().write(directory / "student.json")
    return [(directory / "student.json").read_bytes()]


@target(_student_seeds)
def student_format(data: bytes, scratch: Path) -> None:
    path = scratch / "student.json"
    path.write_bytes(data)
    found = workdir.StudentFormat.read(path)
    (found.input_prefix_label + found.input_prefix_rationale).encode()
    assert (
        min(found.max_input_length, found.max_target_length) >= 2 and found.rationale_start_id >= 0
    )
    found.write(path)
    assert workdir.StudentFormat.read(path) == found


def _layout_seeds(directory: Path) -> list[bytes]:
    return [json.dumps(Layout(TINY).to_json()).encode()]


@target(_layout_seeds)
def checkpoint_layout(data: bytes, scratch: Path) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("no JSON; Orbax's own business") from None
    layout = Layout.from_json(found, scratch)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json())), scratch) == layout


def _array_seeds(directory: Path) -> list[bytes]:
    file = io.BytesIO()
    np.save(file, np.array([0, 2, 5], np.int64))
    return [file.getvalue()]


@target(_array_seeds)
def token_cache_array(data: bytes, scratch: Path) -> None:
    """The offsets of a cached table; its meta.json is the same bytes."""
    np.save(scratch / "tokens.npy", np.arange(5, dtype=np.int32))
    (scratch / "offsets.npy").write_bytes(data)
    (scratch / "meta.json").write_bytes(data)
    with contextlib.suppress(InputError):
        _read_meta(scratch)
    table = _load_table(scratch, "tokens.npy", "offsets.npy", 2)
    parts = [table.tokens[table.offsets[i] : table.offsets[i + 1]] for i in range(2)]
    assert np.concatenate(parts).tolist() == list(range(5))


# -------------------------------------------------------------------------------- generated text


def _equation_seeds(directory: Path) -> list[bytes]:
    return [b"( ( 7.0 + 2.0 ) * 3.0 )", b"$1,000 / -(2 - .5).", "6 × 7 ÷ 2 − 1".encode(), b"9**9"]


@target(_equation_seeds)
def equation(data: bytes, scratch: Path) -> None:
    """Arithmetic of any text, against Python's own parser where it has a value."""
    text = data.decode("utf-8", "surrogateescape")
    value, spelt = metrics.evaluate_equation(text), metrics.normalize_equation(text)
    assert (value is None) == (spelt is None)
    assert metrics.is_correct(text, text, "equation") == (value is not None)
    if value is None:
        raise InputError("no value")
    assert math.isfinite(value) and metrics.evaluate_equation(spelt) == value
    tokens = [token.lstrip("0") or "0" if token[0].isdigit() else token for token in spelt.split()]
    tokens = [f"0{token}" if token.startswith(".") else token for token in tokens]
    expected = _value_of(ast.parse(" ".join(tokens), mode="eval").body)
    assert expected == value, (text, expected, value)


def _value_of(node: ast.expr) -> float:
    """The value of the four operations and the minus sign."""
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp):
        return -_value_of(node.operand)
    left, right = _value_of(node.left), _value_of(node.right)
    kind = type(node.op).__name__
    if kind in ("Add", "Sub"):
        return left + right if kind == "Add" else left - right
    return left * right if kind == "Mult" else left / right


def _completion_seeds(directory: Path) -> list[bytes]:
    return [
        b"Cats purr. So the answer is (b) water.",
        b"<think>x</think> The answer is **entailment**.\nQ: next",
        b'```json\n{"rationale": "a", "answer": "( 2 + 3 )"}\n```',
        b"2 and 3. The final answer is $\\boxed{( 2 + 3 )}$ = 5 hats.",
    ]


@target(_completion_seeds)
def completion(data: bytes, scratch: Path) -> None:
    """A teacher's text, read in every answer form; what is legal is one of what is allowed."""
    text = data.decode("utf-8", "replace")
    for form in (parse.CHOICE, parse.NLI, parse.EQUATION, parse.TEXT):
        for finish_reason in (None, "stop", "length"):
            found = parse.parse_completion(
                text, form, ["sand", "water"], reasoning=text[:20], finish_reason=finish_reason
            )
            assert (found.answer is None) == (found.reason is not None)
            if found.answer is None:
                assert found.reason in parse.REASONS and found.rationale is None
            elif form is parse.CHOICE:
                assert found.answer in ("sand", "water")
            elif form is parse.NLI:
                assert found.answer in parse.NLI_LABELS
            elif form is parse.EQUATION:
                assert metrics.evaluate_equation(found.answer) is not None
    parse.choices_in(text)
