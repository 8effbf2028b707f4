"""The endpoint's client against a real server on a real socket, which misbehaves on purpose."""

import asyncio
import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time

import pytest
from crash_run import KEY, extract_command, run_with_kills, start_extraction
from fault_server import serving

from dslt.errors import InputError
from dslt.records import Example
from dslt.teacher import endpoint
from dslt.teacher.endpoint import AskConfig, Prices, RateLimit, ask, parse_retry_after, read_key
from dslt.teacher.prompts import load_prompt
from dslt.teacher.questions import EndpointTeacher, plan_questions, to_requests
from dslt.teacher.responses import parse_response
from dslt.teacher.store import CompletionStore

pytest.importorskip("openai", reason="the openai library is not installed (extra `teacher`)")

EXAMPLES = [
    Example(f"e{number}", "esnli", "train", f"premise: {number} hypothesis: x", "neutral")
    for number in range(40)
]
FAST = AskConfig(concurrency=8, timeout_secs=0.5, max_attempts=3)


def make_teacher(base_url, **options):
    prompt = options.pop("prompt", load_prompt("nli"))
    return EndpointTeacher("t", model="m", prompt=prompt, base_url=base_url, **options)


def ask_all(teacher, directory, config=FAST, examples=EXAMPLES):
    with CompletionStore(directory) as store:
        questions = plan_questions(examples, range(len(examples)), teacher)
        pending = [q for q in questions if q.key not in store.answers]
        stats = ask(to_requests(pending), teacher, config, store, total=len(pending))
        return stats, dict(store.answers), dict(store.failures)


@contextlib.contextmanager
def answering(responses):
    """A server that gives these (status, headers, body text) in turn, then the last for good."""
    bodies, requests = list(responses), []

    async def handle(reader, writer):
        with contextlib.suppress(Exception):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                requests.append((head, json.loads(await reader.readexactly(length)), time.time()))
                status, headers, text = bodies.pop(0) if len(bodies) > 1 else bodies[0]
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{lines}"
                    f"Content-Length: {len(text.encode())}\r\n\r\n{text}".encode()
                )
                await writer.drain()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", requests
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def chat(text, **fields):
    message = {"role": "assistant", "content": text, **fields}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    return json.dumps({"model": "m-1", "choices": [choice], "usage": usage})


GOOD = (200, {}, chat("Why. So the answer is neutral."))


def test_every_problem_ends_as_a_record_or_a_listed_failure_across_kills(tmp_path):
    """The full size: python tests/teacher/crash_run.py"""
    report = run_with_kills(tmp_path, problems=120, concurrency=16, kills=3, fault_rate=0.2)
    assert report.examples == report.recorded + report.listed == 120
    assert report.recorded > 100 and report.doubled == 0
    assert report.paid_twice <= report.repeats <= 16 * report.kills
    assert report.kills >= 1 and len(report.faults) >= 8
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_answers_are_stored_with_what_they_cost(tmp_path, mode):
    with serving() as base_url:
        teacher = make_teacher(base_url, mode=mode)
        stats, answers, failures = ask_all(teacher, tmp_path)
    assert (stats.answered, stats.failed, len(answers)) == (40, 0, 40) and not failures
    answer = next(iter(answers.values()))
    assert answer.text.startswith("Reason ") and answer.model == "m-0001"
    assert answer.input_tokens > 0 and answer.output_tokens == 12
    assert stats.output_tokens == 12 * 40


def test_several_samples_come_from_one_request_or_from_many(tmp_path):
    with serving() as base_url:
        many = make_teacher(base_url, samples=4)
        stats, answers, _ = ask_all(many, tmp_path / "many", examples=EXAMPLES[:3])
        assert (stats.attempts, len(answers)) == (12, 12)
        one = dataclasses.replace(many, samples_per_request=3)
        stats, same, _ = ask_all(one, tmp_path / "one", examples=EXAMPLES[:3])
        assert (stats.attempts, len(same)) == (6, 12)  # of three samples and of one
    assert answers.keys() == same.keys()


def test_what_is_answered_is_not_asked_again_and_what_failed_is(tmp_path):
    with answering([(400, {}, "{}"), GOOD]) as (base_url, requests):
        teacher = make_teacher(base_url)
        one = AskConfig(concurrency=1)
        _, answers, failures = ask_all(teacher, tmp_path, one, EXAMPLES[:3])
        assert len(answers) == 2 and next(iter(failures.values())).startswith("400")
        _, answers, failures = ask_all(teacher, tmp_path, one, EXAMPLES[:3])
    assert len(answers) == 3 and not failures and len(requests) == 4


def test_retry_after_is_waited_for(tmp_path):
    with answering([(429, {"Retry-After": "0.6"}, "{}"), GOOD]) as (base_url, requests):
        stats, answers, _ = ask_all(make_teacher(base_url), tmp_path, FAST, EXAMPLES[:1])
    (_, _, first), (_, _, second) = requests
    assert second - first >= 0.6 and len(answers) == 1 and stats.retries == {"429": 1}


def test_a_wait_of_nothing_is_no_leave_to_hurry(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECS", 0.2)
    with answering([(429, {"Retry-After": "0"}, "{}")]) as (base_url, requests):
        stats, _, failures = ask_all(make_teacher(base_url), tmp_path, FAST, EXAMPLES[:1])
    first, second, third = (at for _, _, at in requests)
    assert second - first >= 0.1 and third - second >= 0.2 and len(failures) == 1
    assert stats.secs < third - first + 0.4  # nobody waits after the last attempt


def test_a_wait_of_hours_ends_the_run_instead(tmp_path):
    responses = [(429, {"Retry-After": "7200"}, "{}")]
    with (
        answering(responses) as (base_url, _),
        pytest.raises(InputError, match="asks to wait 7,200 s"),
    ):
        ask_all(make_teacher(base_url), tmp_path, FAST, EXAMPLES[:1])


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        ((500, {}, "{}"), "500"),
        ((429, {}, "{}"), "429"),
        ((200, {}, '{"choices": ['), "wrong JSON"),
        ((200, {}, "[1]"), "wrong JSON"),
        ((200, {}, '{"choices": [{}]}'), "wrong JSON"),
        ((200, {}, '{"choices": []}'), "empty choices"),
        ((200, {}, '{"object": "error"}'), "empty choices"),
    ],
)
def test_what_passes_is_tried_again_and_then_given_up(tmp_path, monkeypatch, response, cause):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECS", 0.01)
    with answering([response]) as (base_url, requests):
        stats, answers, failures = ask_all(make_teacher(base_url), tmp_path, FAST, EXAMPLES[:1])
    assert not answers and list(failures.values()) == [cause]
    assert len(requests) == stats.attempts == 3 and stats.retries[cause] == 3


def test_what_the_endpoint_refuses_for_good_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for number, (status, text, says) in enumerate(
        [
            (401, json.dumps({"error": {"message": f"Incorrect key {KEY}"}}), "status 401"),
            (404, "{}", "check the key's variable, --base_url and --model"),
            (429, json.dumps({"error": {"code": "insufficient_quota"}}), "the quota is used up"),
        ]
    ):
        with (
            answering([(status, {}, text)]) as (base_url, _),
            pytest.raises(InputError) as caught,
        ):
            ask_all(make_teacher(base_url), tmp_path / str(number), FAST)
        assert says in str(caught.value) and KEY not in str(caught.value)


def test_an_endpoint_that_is_down_is_not_asked_all_night(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECS", 0.01)
    monkeypatch.setattr(endpoint, "FAILURES_TO_STOP", 12)
    with pytest.raises(InputError, match=r"the last 1\d requests all failed.*connection lost"):
        ask_all(make_teacher("http://127.0.0.1:9/v1"), tmp_path)


def test_a_key_that_the_endpoint_echoes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = chat(f"Your key is {KEY}. So the answer is neutral.", reasoning_content=KEY)
    with answering([(200, {}, said)]) as (base_url, requests):
        _, answers, _ = ask_all(make_teacher(base_url), tmp_path, FAST, EXAMPLES[:1])
    assert f"Bearer {KEY}".encode() in requests[0][0]  # it was sent, as it must be
    assert next(iter(answers.values())).text.startswith("Your key is ***.")
    assert KEY not in (tmp_path / "completions.jsonl").read_text()


def test_keys_come_from_the_environment_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        read_key(make_teacher(None))
    assert read_key(make_teacher("http://localhost:1/v1")) == "none"
    for bad in ("http://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(InputError, match="belongs into the environment") as caught:
            read_key(make_teacher(bad))
        assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="expected an address"):
        read_key(make_teacher("localhost:8000"))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "ftp://me:secret@127.0.0.1:1", "expected http://HOST:PORT"),
        ("https_proxy", "ftp://me:secret@127.0.0.1:1", "expected http://HOST:PORT"),
        ("SSL_CERT_FILE", "/nonexistent", "expected certificates that can be read there"),
    ],
)
def test_an_environment_that_no_client_can_use_is_named(tmp_path, monkeypatch, name, value, says):
    for each in (*endpoint.PROXY_VARIABLES, *endpoint.CERTIFICATE_VARIABLES):
        monkeypatch.delenv(each, raising=False)
        monkeypatch.delenv(each.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        ask_all(make_teacher("http://127.0.0.1:9/v1"), tmp_path)
    message = str(caught.value)
    assert f"variable {name} cannot be used" in message and says in message
    assert "secret" not in message


def test_a_proxy_that_needs_another_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(InputError, match="socks5:// proxy needs pip install socksio"):
        ask_all(make_teacher("http://127.0.0.1:9/v1"), tmp_path)


def test_request_fields(tmp_path):
    with answering([GOOD]) as (base_url, requests):
        teacher = make_teacher(
            base_url, seed=10, samples=2, temperature=None, extra_body={"max_tokens": None, "x": 1}
        )
        ask_all(teacher, tmp_path, AskConfig(concurrency=1), EXAMPLES[:1])
    first, second = (body for _, body, _ in requests)
    assert (first.pop("seed"), second.pop("seed")) == (10, 11) and first == second
    assert sorted(first) == ["messages", "model", "stop", "x"]
    assert first["stop"] == ["\nQ:", "\npremise:", "\nPremise:"]


def test_a_server_that_ignores_n_gets_another_seed_for_each_sample(tmp_path):
    with answering([GOOD]) as (base_url, requests):
        teacher = make_teacher(base_url, seed=10, samples=3, samples_per_request=3)
        ask_all(teacher, tmp_path, AskConfig(concurrency=1), EXAMPLES[:1])
    sent = [(body["seed"], body.get("n")) for _, body, _ in requests]
    assert sent == [(10, 3), (11, 2), (12, None)]


def test_a_signal_waits_for_what_is_under_way_and_the_next_run_goes_on(tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    with serving(log, delay_secs=0.1) as base_url:
        command = extract_command(base_url, output, 200, 8)
        process = start_extraction(command)
        while not log.exists() or log.read_text().count("\n") < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "stopped; " in text, text
        again = start_extraction(command)
        text, _ = again.communicate(timeout=60)
        assert again.returncode == 0, text
    asked = [json.loads(line)["prompt"] for line in log.open()]
    assert len(asked) == len(set(asked)) == 200  # nothing twice
    assert json.loads((output / "summary.json").read_text())["repeats"] == 0


def test_prices_are_checked():
    for price in (-3.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"price_input is {price}; expected"):
            Prices(input=price)
        with pytest.raises(InputError, match=f"price_output is {price}; expected"):
            Prices(output=price)
    assert Prices(0.0, 15.0).cost(5, 2_000_000) == 30.0


def test_limits_space_requests_and_tokens():
    limit = RateLimit(per_minute=120)
    waits = [limit.reserve(1, now=100.0) for _ in range(4)]
    assert waits == [0.0, 0.5, 1.0, 1.5]
    assert limit.reserve(1, now=110.0) == 0.0  # what was not used is not saved up
    tokens = RateLimit(per_minute=6000)
    assert [tokens.reserve(500, now=0.0), tokens.reserve(1, now=0.0)] == [0.0, 5.0]
    tokens.give_back(400)
    assert tokens.reserve(1, now=0.0) == pytest.approx(1.01)
    assert RateLimit(None).reserve(1e9, 0.0) == RateLimit(None).reserve(1, 0.0) == 0.0


def test_a_requests_limit_holds_over_a_run(tmp_path):
    with serving() as base_url:
        config = AskConfig(concurrency=8, requests_per_minute=1200)
        stats, _, _ = ask_all(make_teacher(base_url), tmp_path, config, EXAMPLES[:20])
    assert stats.secs >= 19 * 0.05


def test_retry_after_as_a_number_and_as_a_date():
    assert parse_retry_after({"retry-after": "3"}) == 3.0
    assert parse_retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    date = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert parse_retry_after(date, now=1445412470.0) == 10.0
    assert parse_retry_after(date) == 0.0  # long past
    assert parse_retry_after({"retry-after": "soon"}) is None
    assert parse_retry_after({"retry-after": "inf"}) is None
    assert parse_retry_after({}) is None


def test_responses_as_servers_give_them():
    def parse(message, **choice):
        (answer,) = parse_response({"choices": [{"message": message, **choice}]})
        return answer.text, answer.reasoning, answer.finish_reason

    assert parse({"content": "x"}, finish_reason="stop") == ("x", None, "stop")
    assert parse({"content": "x", "reasoning_content": "y"}) == ("x", "y", None)
    assert parse({"content": None, "reasoning": "y"}) == ("", "y", None)
    assert parse({"content": [{"type": "text", "text": "a"}, {"text": "b"}, 1]})[0] == "ab"
    assert parse({"content": None}, finish_reason="content_filter") == ("", None, "content_filter")
    assert parse({"content": None, "refusal": "I cannot."})[0] == "I cannot."
    assert parse_response({"choices": [{"text": "x"}]})[0].text == "x"
    for bad in (None, [], {"choices": {}}, {"choices": [1]}, {"choices": [{"message": {}}]}):
        assert parse_response(bad) is None
    usage = {"prompt_tokens": "many", "completion_tokens": 3}
    assert parse_response({"choices": [{"text": "x"}], "usage": usage})[0].output_tokens == 3
