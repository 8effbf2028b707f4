"""`dslt serve` over a real socket, in a process of its own, and its page in a browser.

The browser tests need playwright and a Chromium at /usr/bin/chromium (or $CHROMIUM).
"""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

reason = "`dslt serve` needs fastapi and uvicorn: pip install '.[serve]'"
for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=reason)

import fastapi  # noqa: E402

from dslt.checkpoint import hf_t5  # noqa: E402
from dslt.commands.serve import is_loopback  # noqa: E402
from dslt.core import t5  # noqa: E402
from dslt.data.vocabulary import ByteVocabulary  # noqa: E402
from dslt.main import main  # noqa: E402
from dslt.serve import _Gate  # noqa: E402
from dslt.serve_engine import ServeConfig  # noqa: E402
from dslt.signals import INTERRUPTED  # noqa: E402
from dslt.workdir import StudentFormat  # noqa: E402

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SLOW_SECS, STOP_SECS = 60, 1
# `dslt serve` of a student whose every text takes SLOW_SECS; what fills it is the time to stop.
SLOW = f"""
import dataclasses, sys, time
from dslt import main, serve_engine

@dataclasses.dataclass(frozen=True)
class ServeConfig(serve_engine.ServeConfig):
    stop_secs: int = %d

class Engine(serve_engine.Engine):
    def _result(self, work, tokens):
        print("decoding", flush=True)
        time.sleep({SLOW_SECS})
        return super()._result(work, tokens)

serve_engine.ServeConfig, serve_engine.Engine = ServeConfig, Engine
sys.exit(main.main())
"""
LENGTHS = ["--max_label_length", "8", "--max_rationale_length", "24"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Random weights, bytes; most answers go on to the end, a few do not."""
    directory = tmp_path_factory.mktemp("students") / "<b>student"
    config = t5.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, num_decoder_layers=2
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = t5.abstract_params(config)[1]
    import jax

    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    ByteVocabulary().save(vocabulary)
    hf_t5.save(directory, config, params, vocabulary)
    StudentFormat(max_input_length=128, max_target_length=24).write(directory / "student.json")
    return directory


class Server:
    """A `dslt serve` of its own; `program` is what Python runs."""

    def __init__(self, student: Path, *flags: str, program: Sequence[str] = ("-m", "dslt.main")):
        command = [sys.executable, *program, "serve", "--student", str(student)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment["GLIBC_TUNABLES"] = environment.get("GLIBC_TUNABLES", "")  # start once
        self.process = subprocess.Popen(
            [*command, "--port", "0", *LENGTHS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd="/",
        )
        self.output = []
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("listening on "):
                break
        else:
            raise AssertionError("".join(self.output))
        self.port = int(line.rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}/"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while self.request("GET", "/health")[0] != 200:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.1)

    def request(self, method: str, path: str, body=None, headers=None) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()

    def predict(self, *inputs: str, **fields) -> tuple[int, dict]:
        body = json.dumps({"inputs": inputs, **fields})
        headers = {"Content-Type": "application/json"}
        status, _, content = self.request("POST", "/predict", body, headers)
        return status, json.loads(content)

    def ask_slowly(self, clients, *inputs, **fields) -> concurrent.futures.Future:
        """What `predict` will give from a SLOW server, which decodes by now."""
        asked = clients.submit(self.predict, *inputs, **fields)
        while "decoding" not in self.process.stdout.readline():
            pass
        return asked

    def wait(self) -> int:
        self.output += self.process.communicate(timeout=60)[0].splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture(scope="module")
def server(student):
    limits = ["--max_queue", "20", "--max_inputs", "12", "--max_bytes", "9000"]
    with Server(student, *limits) as server:
        server.states = [server.request("GET", "/health"), server.predict("too early")]
        server.wait_until_ready()
        yield server


def test_ready_comes_after_all_is_compiled(server):
    (status, headers, body), (early, _) = server.states
    assert (status, json.loads(body), headers["retry-after"]) == (503, {"state": "starting"}, "1")
    assert early == 503
    assert server.request("GET", "/health")[0] == 200


def test_many_clients_get_what_dslt_predict_says(server, student, tmp_path, capsys):
    inputs = [f"problem {i} x" + "x" * (3 * i) for i in range(16)]
    (tmp_path / "inputs.txt").write_text("\n".join(inputs))
    args = ["predict", "--student", str(student), "--rationales", *LENGTHS, "--rows", "8"]
    assert main([*args, str(tmp_path / "inputs.txt")]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        ask = clients.map(lambda text: server.predict(text, rationales=True), inputs)
        answers = [(status, found["predictions"][0]) for status, found in ask]
    assert [status for status, _ in answers] == [200] * 16
    assert [found["label"] for _, found in answers] == [row["prediction"] for row in expected]
    assert [found["rationale"] for _, found in answers] == [row["rationale"] for row in expected]
    assert len({row["rationale"] for row in expected}) > 3  # the test would see rows swapped
    status, found = server.predict(*inputs[:12])
    assert status == 200
    assert [row["label"] for row in found["predictions"]] == [a["label"] for _, a in answers[:12]]
    assert "rationale" not in found["predictions"][0]


def test_the_probability_is_the_models_for_the_decoded_tokens(server, student):
    """By the model's own logits, one token after another."""
    import jax
    from flax import nnx

    from dslt.core.batch import EOS_ID
    from dslt.core.decode import decode_batch
    from tests.checkpoint.test_hf_t5 import one_example_a_row

    _, found = server.predict("premise: a hypothesis: b")
    config, params = hf_t5.load_params(student)
    graphdef, _ = t5.abstract_params(config)
    source = [*ByteVocabulary().encode("predict: premise: a hypothesis: b"), EOS_ID]
    source = np.array([source], np.int32)
    decode = jax.jit(decode_batch, static_argnames=("graphdef", "max_length"))
    tokens = np.asarray(decode(params, source, graphdef=graphdef, max_length=8))
    batch = one_example_a_row({"encoder_input_tokens": source, "decoder_target_tokens": tokens})
    logits = np.asarray(jax.jit(lambda p: nnx.merge(graphdef, p)(batch))(params), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    length = int((tokens[0] > 0).sum())
    expected = np.exp(logs[np.arange(length), tokens[0, :length]].sum())
    assert 0 < expected < 1
    np.testing.assert_allclose(found["predictions"][0]["probability"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"inputs": ["' + b"a" * 200 + b'"]}', 422),  # more tokens than the student takes
        (b'{"inputs": []}', 422),
        (b'{"inputs": "a"}', 422),
        (b'{"inputs": ["  "]}', 422),
        (b'{"inputs": ["a"], "explain": true}', 422),
        (b'{"inputs": ["\\ud800"]}', 422),
        (b'{"inputs": ["a"]', 422),
        (b"\xff", 400),
        (b"[" * 5000, 400),
        (json.dumps({"inputs": ["a"] * 13}).encode(), 413),
        (b'{"inputs": ["' + b"a" * 9000 + b'"]}', 413),
    ],
)
def test_what_cannot_be_answered_is_refused_and_never_cut(server, body, status):
    headers = {"Content-Type": "application/json"}
    found, _, content = server.request("POST", "/predict", body, headers)
    assert found == status, content
    assert json.loads(content)["detail"]
    assert server.predict("still there")[0] == 200


def test_a_body_without_a_length_is_bounded_too(server):
    chunks = iter([b"a" * 5000] * 3)
    headers = {"Content-Type": "application/json"}  # http.client sends these in chunks
    assert server.request("POST", "/predict", chunks, headers)[0] == 413


def test_a_full_queue_says_when_to_come_again(server):
    inputs = [f"{i} {'y' * 60}" for i in range(10)]
    body = json.dumps({"inputs": inputs, "rationales": True})  # 20 texts, and so many may wait
    headers = {"Content-Type": "application/json"}
    with concurrent.futures.ThreadPoolExecutor(10) as clients:
        asked = [
            clients.submit(server.request, "POST", "/predict", body, headers) for _ in range(10)
        ]
        found = [future.result() for future in asked]
    assert {status for status, _, _ in found} == {200, 503}
    refused = next(row for row in found if row[0] == 503)
    assert refused[1]["retry-after"] == "1"
    assert "at most 20" in json.loads(refused[2])["detail"]
    assert server.predict(*inputs, "one too many", rationales=True)[0] == 422  # never has room
    assert server.predict("still there")[0] == 200


def test_a_body_that_does_not_come_whole_is_waited_for_so_long_alone():
    """What is awaited after the body, the end of the connection, may take longer."""

    async def read_body(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await receive()

    def receive_from(*messages):
        waiting = list(messages)

        async def receive():
            if not waiting:
                await asyncio.sleep(0.2)
                return {"type": "http.disconnect"}
            return waiting.pop(0)

        return receive

    engine = types.SimpleNamespace(config=ServeConfig(body_secs=0.1))
    bodies = set()
    gate = _Gate(read_body, engine, bodies, [])
    scope = {"type": "http", "path": "/predict"}
    part, end = (
        {"type": "http.request", "body": b"{", "more_body": more} for more in (True, False)
    )
    asyncio.run(gate(scope, receive_from(part, end), None))
    with pytest.raises(fastapi.HTTPException, match="1 bytes of the body have come") as refused:
        asyncio.run(gate(scope, receive_from(part), None))
    assert refused.value.status_code == 408 and not bodies


def test_a_refusal_does_not_repeat_what_was_sent(server):
    body = json.dumps({"inputs": ["a"], "k" * 8000: 1})
    headers = {"Content-Type": "application/json"}
    status, _, content = server.request("POST", "/predict", body, headers)
    [fault] = json.loads(content)["detail"]
    assert status == 422 and len(content) < 300
    assert fault["where"][0] == "body" and fault["where"][1].startswith("kkkk")


def test_metrics_count(server):
    def read() -> dict[str, float]:
        lines = server.request("GET", "/metrics")[2].decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    before = read()
    assert server.predict("one", "two", rationales=True)[0] == 200
    assert server.predict("")[0] == 422
    after = read()
    for name, count in {
        'dslt_requests_total{status="200"}': 1,
        'dslt_requests_total{status="422"}': 1,
        "dslt_request_seconds_count": 1,
        'dslt_texts_total{kind="label"}': 2,
        'dslt_texts_total{kind="rationale"}': 2,
    }.items():
        assert after[name] - before.get(name, 0) == count, name
    assert after["dslt_waiting"] == after["dslt_live"] == 0


def test_the_schema_is_there_and_loads_nothing(server):
    _, _, content = server.request("GET", "/openapi.json")
    assert "/predict" in json.loads(content)["paths"]
    assert server.request("GET", "/docs")[0] == 404  # FastAPI's own pages load scripts


def test_sigterm_answers_what_has_come_and_ends_well(student):
    """But not a request that is still on its way. With a set of labels: their probabilities sum to
    one."""
    flags = ["--label", "yes", "--label", "no", "--host", "0.0.0.0"]
    with Server(student, *flags) as server, contextlib.ExitStack() as stack:
        server.wait_until_ready()
        unfinished = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        unfinished.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        with concurrent.futures.ThreadPoolExecutor(1) as clients:
            texts = [f"text {i}" for i in range(64)]
            asked = clients.submit(server.predict, *texts, rationales=True)
            while b"dslt_waiting 0.0" in server.request("GET", "/metrics")[2]:
                time.sleep(0.001)
            server.process.send_signal(signal.SIGTERM)
            unfinished.settimeout(ServeConfig.body_secs / 2)
            assert unfinished.recv(12) == b"HTTP/1.1 408"
            assert server.wait() == 0
            status, found = asked.result()
    assert status == 200 and len(found["predictions"]) == 64
    answer = found["predictions"][0]
    assert set(answer["distribution"]) == {"yes", "no"}
    assert sum(answer["distribution"].values()) == pytest.approx(1)
    assert answer["probability"] == answer["distribution"][answer["label"]] >= 0.5
    output = "".join(server.output)
    assert "warning: 0.0.0.0 can be reached from other machines" in output
    assert "Traceback" not in output
    with pytest.raises(ConnectionRefusedError):
        server.request("GET", "/health")


def test_what_takes_longer_than_the_time_to_stop_is_cut_off_and_counted(student):
    """One that is being decoded, and one that waits for it; whoever asked is told so."""
    with (
        Server(student, program=("-c", SLOW % STOP_SECS)) as server,
        concurrent.futures.ThreadPoolExecutor(2) as clients,
    ):
        server.wait_until_ready()
        asked = [server.ask_slowly(clients, "decoded", rationales=True)]
        asked.append(clients.submit(server.predict, "waits"))
        while b"dslt_waiting 1.0" not in server.request("GET", "/metrics")[2]:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        started_secs = time.monotonic()
        assert server.wait() == INTERRUPTED
        assert STOP_SECS <= time.monotonic() - started_secs < SLOW_SECS / 2
        for status, found in (future.result() for future in asked):
            assert (status, found["detail"][:25]) == (503, "the server was told to st")
    last = "".join(server.output[-1:])
    assert last.startswith("dslt serve: stopped on SIGTERM; ") and last.endswith("with 503: 2\n")
    assert len(server.output) == 2  # the other is where it listens


def test_a_second_interrupt_cuts_off_at_once(student):
    with (
        Server(student, program=("-c", SLOW % SLOW_SECS)) as server,
        concurrent.futures.ThreadPoolExecutor(1) as clients,
    ):
        server.wait_until_ready()
        asked = server.ask_slowly(clients, "decoded")
        started_secs = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # closer ones may arrive as one
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == INTERRUPTED
        assert time.monotonic() - started_secs < SLOW_SECS / 2
        assert asked.result()[0] == 503
    last = "".join(server.output[-1:])
    assert last.startswith("dslt serve: stopped on SIGINT; ") and last.endswith("with 503: 1\n")
    assert len(server.output) == 2


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_is_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_there_cannot_be_is_refused_before_the_student_is_read(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--student", "none", "--port", port])
    assert "argument --port: " in capsys.readouterr().err


def test_a_blank_label_is_refused_before_anything_is_compiled(student, capsys):
    assert main(["serve", "--student", str(student), "--label", "a", "--label", " "]) == 2
    assert "the label ' ' is blank; expected text" in capsys.readouterr().err


def test_a_port_in_use_is_said_without_a_traceback(student, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--student", str(student), "--port", port]) == 2
    assert "Address already in use" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM}; install Chromium or set CHROMIUM")
    flags = "no-sandbox disable-gpu disable-background-networking disable-component-update"
    flags = [f"--{flag}" for flag in [*flags.split(), "disable-sync", "no-first-run"]]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_answers_to_the_keyboard_and_runs_nothing_that_it_shows(server, browser, scheme):
    page = browser.new_page(color_scheme=scheme, viewport={"width": 800, "height": 700})
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    assert page.title() == "<b>student" == page.inner_text("h1")
    page.keyboard.type(HOSTILE[:60])  # the box has the focus
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # with rationale
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer:not([hidden])")
    _, expected = server.predict(HOSTILE[:60], rationales=True)
    answer = expected["predictions"][0]
    assert page.text_content("#label") == answer["label"]
    assert page.text_content("#rationale") == answer["rationale"]
    assert page.is_visible("#rationale")
    assert page.text_content("#probability").endswith("%")

    hostile = {"label": HOSTILE, "probability": 0.5, "distribution": {HOSTILE: 0.5}}
    page.evaluate("(found) => show({...found, rationale: found.label})", hostile)
    assert page.text_content("#label") == page.text_content("#rationale") == HOSTILE
    assert page.text_content("#distribution td") == HOSTILE
    assert page.locator("img").count() == 0 and page.title() == "<b>student"

    page.fill("#input", "z" * 300)
    page.press("#input", "Control+Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "takes 128 at most" in page.text_content("#error")
    assert page.is_hidden("#answer")
    assert all(url.startswith(server.url) or url.startswith("data:") for url in asked)
    assert [fault for fault in faults if "status of 422" not in fault] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(245, 246, 248)") is (scheme == "light")
    if directory := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{directory}/{scheme}_error.png")
        page.evaluate("(found) => { byId('error').hidden = true; show(found); }", answer)
        page.screenshot(path=f"{directory}/{scheme}.png")
    page.close()
