"""Asks an OpenAI-compatible endpoint, many requests at a time, and stores what comes back.

May import dslt.errors; the `openai` library only inside `ask`. Its own retries are off: waiting,
counting and giving up are done here, once for all endpoints.

    stats = ask(requests, teacher, AskConfig(concurrency=64), store)
"""

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from dslt.errors import InputError
from dslt.teacher.questions import EndpointTeacher, Request
from dslt.teacher.responses import parse_response
from dslt.teacher.store import Answer, CompletionStore
from dslt.terminal import printable

FIRST_WAIT_SECS = 0.5  # before the second attempt; doubled with each, and drawn from its half up
LONGEST_WAIT_SECS = 60.0
TRANSIENT = (408, 409, 425, 429)  # and all from 500
FAILURES_TO_STOP = 50  # in a row without an answer among them
PROXY_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")  # in lower case too
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
MIN_KEY_CHARACTERS = 8  # shorter "keys" are words that local servers are given
LOG_SECS = 30  # between lines of progress where nobody watches


@dataclasses.dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency."""

    input: float = 0.0
    output: float = 0.0

    def __post_init__(self):
        for name, price in (("price_input", self.input), ("price_output", self.output)):
            if not 0 <= price < math.inf:
                raise InputError(f"{name} is {price}; expected a finite number, 0 or more")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """How hard an endpoint is asked.

    Attributes:
      concurrency: requests under way at a time.
      requests_per_minute, tokens_per_minute: limits; None: none.
      timeout_secs: of one attempt, from connecting to the last byte.
      max_attempts: of one request.
      max_wait_secs: an endpoint that asks for a longer wait is left, and asked by another run.
      prices: for the cost so far.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_secs: float = 120.0
    max_attempts: int = 8
    max_wait_secs: float = 600.0
    prices: Prices = Prices()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise InputError(f"{field.name} is {value}; expected a number above 0")


@dataclasses.dataclass
class AskStats:
    """What a run of `ask` did.

    Attributes:
      requests: that were begun.
      attempts: sent, retries included.
      answered, failed: samples.
      retries: attempts that came to nothing, by cause.
      input_tokens, output_tokens: as the endpoint counted them.
      secs: wall time.
      is_interrupted: whether a signal ended it early.
    """

    requests: int = 0
    attempts: int = 0
    answered: int = 0
    failed: int = 0
    retries: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    secs: float = 0.0
    is_interrupted: bool = False


class RateLimit:
    """Spaces events so that no minute holds more than `per_minute` of them; None: no limit."""

    def __init__(self, per_minute: float | None):
        self._secs_each = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def reserve(self, amount: float, now: float) -> float:
        """Takes the next free place for `amount` and returns the seconds until it."""
        start = max(now, self._free_at)
        self._free_at = start + amount * self._secs_each
        return start - now

    def give_back(self, amount: float) -> None:
        """Corrects an estimate that was too high (or, below zero, too low)."""
        self._free_at -= amount * self._secs_each


def ask(
    requests: Iterable[Request],
    teacher: EndpointTeacher,
    config: AskConfig,
    store: CompletionStore,
    *,
    total: int,
) -> AskStats:
    """Sends requests and stores every answer, or why there is none; shows a line of progress.

    SIGINT or SIGTERM sends no more, waits for what is under way, and returns; a second one gives
    that up too.

    Args:
      requests: all of one teacher.
      total: how many samples they ask for, for the progress line.

    Raises:
      InputError: no `openai` library, no key, an endpoint that refuses everything, a full disk.
        Everything that was answered before is stored.
    """
    openai = _import_openai()
    key = read_key(teacher)
    return asyncio.run(_Asker(openai, teacher, key, config, store, total).run(iter(requests)))


def read_key(teacher: EndpointTeacher) -> str:
    """The endpoint's key, from the environment; raises InputError where one is needed."""
    _check_base_url(teacher.base_url or os.environ.get("OPENAI_BASE_URL") or None)
    key = os.environ.get(teacher.api_key_env, "").strip()
    if not key and teacher.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise InputError(
            f"the environment variable {teacher.api_key_env} is not set; expected the endpoint's "
            "key in it (or --base_url of an endpoint that needs none)"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the environment variable {teacher.api_key_env} holds characters that no HTTP header "
            "can carry; expected a key of letters, digits and signs"
        )
    return key or "none"


class _Retry(Exception):
    """An attempt that may succeed when it is made again, `after` secs from now if that is known."""

    def __init__(self, cause: str, after: float | None = None):
        super().__init__(cause)
        self.cause, self.after = cause, after


class _Refused(Exception):
    """A request that the endpoint will never answer."""


class _Asker:
    """One run of `ask`: what its workers share."""

    def __init__(self, openai, teacher, key: str, config: AskConfig, store, total: int):
        self._openai, self._config, self._store = openai, config, store
        self._secret = key if len(key) >= MIN_KEY_CHARACTERS else None
        self._client = _make_client(
            openai,
            base_url=teacher.base_url,
            api_key=key,
            max_retries=0,
            timeout=config.timeout_secs,
        )
        self._requests_limit = RateLimit(config.requests_per_minute)
        self._tokens_limit = RateLimit(config.tokens_per_minute)
        self._paused_until = 0.0
        self._failed_in_a_row = 0
        self._stop = asyncio.Event()
        self._stats = AskStats()
        self._bar = _progress_bar(total, printable(teacher.name, keep=""))

    async def run(self, requests: Iterator[Request]) -> AskStats:
        start = time.monotonic()
        workers = [
            asyncio.create_task(self._work(requests)) for _ in range(self._config.concurrency)
        ]
        try:
            with _stop_on_signals(self._stop, workers):
                done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                if not worker.cancelled() and worker.exception():
                    raise worker.exception()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._client.close()
            self._bar.close()
            self._stats.secs = time.monotonic() - start
        self._stats.is_interrupted = self._stop.is_set()
        return self._stats

    async def _work(self, requests: Iterator[Request]) -> None:
        """Takes requests from the shared iterator until there are none."""
        for request in requests:
            if self._stop.is_set():
                return
            self._stats.requests += 1
            await self._ask(request)

    async def _ask(self, request: Request) -> None:
        """Attempts until every sample has an answer or the request is given up."""
        keys, cause = list(request.keys), "stopped"
        for attempt in range(self._config.max_attempts):
            await self._wait_for_turn(request)
            if self._stop.is_set():
                break
            if not attempt:
                self._store.mark_sent(keys)
            try:
                keys = keys[self._store_answers(keys, await self._attempt(request, len(keys))) :]
                if not keys:
                    return
                cause = "fewer choices than asked"
            except _Retry as retry:
                cause = retry.cause
                self._stats.retries[cause] += 1
                self._tokens_limit.give_back(request.input_tokens() + request.output_tokens())
                await self._back_off(attempt, retry.after)
            except _Refused as refusal:
                cause = str(refusal)
                break
        if not self._stop.is_set() or attempt:
            self._give_up(keys, cause)

    def _give_up(self, keys: list[str], cause: str) -> None:
        for key in keys:
            self._store.add_failure(key, cause)
        self._stats.failed += len(keys)
        self._advance(len(keys))
        self._failed_in_a_row += 1
        if self._stop.is_set():
            return
        if self._failed_in_a_row >= max(FAILURES_TO_STOP, self._config.concurrency):
            raise InputError(
                f"the last {self._failed_in_a_row} requests all failed, the last one with: "
                f"{cause}. What was answered before is stored; look at the endpoint, then start "
                "the same command again"
            )

    async def _attempt(self, request: Request, samples: int) -> list[Answer]:
        """One HTTP exchange; returns its answers, at least one.

        Args:
          samples: how many of the request's last ones have no answer yet.

        Raises:
          _Retry, _Refused: nothing usable came back.
          InputError: and nothing will.
        """
        openai = self._openai
        body = {**request.body, "n": samples} if samples > 1 else dict(request.body)
        if samples == 1:
            body.pop("n", None)
        if "seed" in body:
            body["seed"] += len(request.keys) - samples  # its own is the first sample's
        self._stats.attempts += 1
        try:
            async with asyncio.timeout(self._config.timeout_secs):
                response = await self._client.post(request.path, cast_to=object, body=body)
        except (openai.APITimeoutError, TimeoutError):
            raise _Retry("timeout") from None
        except openai.APIConnectionError:
            raise _Retry("connection lost") from None
        except openai.APIStatusError as error:
            raise self._judge(error) from None
        except (openai.APIResponseValidationError, ValueError):
            raise _Retry("wrong JSON") from None
        answers = parse_response(response)
        if answers is None:
            raise _Retry("wrong JSON")
        if not answers:
            raise _Retry("empty choices")
        used = answers[0].input_tokens + answers[0].output_tokens
        self._tokens_limit.give_back(request.input_tokens() + request.output_tokens() - used)
        return answers

    def _judge(self, error) -> Exception:
        """What a status of 400 and above means."""
        status = error.status_code
        message = printable(self._hide_key(_message_of(error))[:300], keep="")
        if status == 429 and "insufficient_quota" in str(error.body):
            return InputError(f"the endpoint says that the quota is used up: {message}")
        if status in TRANSIENT or status >= 500:
            after = parse_retry_after(error.response.headers)
            if after is not None and after > self._config.max_wait_secs:
                return InputError(
                    f"the endpoint asks to wait {after:,.0f} s (status {status}); what was "
                    "answered before is stored. Start the same command again then"
                )
            return _Retry(str(status), after)
        if status == 401 or (status in (403, 404) and not self._store.answers):
            return InputError(
                f"the endpoint refuses with status {status}: {message}; check the key's variable, "
                "--base_url and --model"
            )
        return _Refused(f"{status}: {message}")

    def _store_answers(self, keys: list[str], answers: list[Answer]) -> int:
        """Stores answers under the first keys and returns their number."""
        answers = answers[: len(keys)]
        for key, answer in zip(keys, answers, strict=False):
            texts = {
                name: self._hide_key(text)
                for name in ("text", "model", "reasoning", "finish_reason")
                if (text := getattr(answer, name))
            }
            self._store.add_answer(key, dataclasses.replace(answer, **texts))
        self._stats.input_tokens += answers[0].input_tokens
        self._stats.output_tokens += answers[0].output_tokens
        self._stats.answered += len(answers)
        self._failed_in_a_row = 0
        self._advance(len(answers))
        return len(answers)

    async def _wait_for_turn(self, request: Request) -> None:
        """Waits for the limits, and while the endpoint has asked for a pause."""
        now = time.monotonic()
        tokens = request.input_tokens() + request.output_tokens()
        await self._sleep(
            max(
                self._paused_until - now,
                self._requests_limit.reserve(1, now),
                self._tokens_limit.reserve(tokens, now),
            )
        )

    async def _back_off(self, attempt: int, after: float | None) -> None:
        """Waits ever longer before the next attempt; what the endpoint asks for holds all up."""
        if after is not None:
            self._paused_until = max(self._paused_until, time.monotonic() + after)
        if attempt + 1 < self._config.max_attempts:
            longest = min(FIRST_WAIT_SECS * 2**attempt, LONGEST_WAIT_SECS)
            await self._sleep(longest * random.uniform(0.5, 1.0))

    async def _sleep(self, secs: float) -> None:
        """Sleeps, unless the run is stopped meanwhile."""
        if secs > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(secs):
                    await self._stop.wait()

    def _hide_key(self, text: str) -> str:
        """Whatever an endpoint echoes: the key is written nowhere."""
        text = text.replace(self._secret, "***") if self._secret else text
        return text.encode("utf-8", "replace").decode("utf-8")  # half surrogate pairs too

    def _advance(self, samples: int) -> None:
        stats, prices = self._stats, self._config.prices
        tokens = f"{stats.input_tokens:,} + {stats.output_tokens:,} tokens"
        cost = f", cost {prices.cost(stats.input_tokens, stats.output_tokens):.2f}"
        shown = f"failed {stats.failed}, {tokens}{cost if prices != Prices() else ''}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(samples)


def parse_retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds that a response asks to wait: of Retry-After as a number or a date, or None."""
    for name, secs in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            wait = float(value) * secs
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value).timestamp()
            except (ValueError, TypeError):
                continue
            wait = date - (time.time() if now is None else now)
        if math.isfinite(wait):
            return max(wait, 0.0)
    return None


def _message_of(error) -> str:
    """The endpoint's own words on one line."""
    return " ".join(str(getattr(error, "message", error)).split())


def _check_base_url(base_url: str | None) -> None:
    if base_url is None:
        return
    if re.search(r"[@?#]", base_url):  # first, so that no message shows what it may hold
        raise InputError(
            "base_url holds a user, a password or a query; a key belongs into the environment "
            "alone, in the variable that --api_key_env names"
        )
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets and ports
        is_address = False
    if not is_address:
        raise InputError(
            f"base_url is {base_url!r}; expected an address such as http://localhost:8000/v1"
        )


def _import_openai():
    try:
        import openai
    except ImportError:
        raise InputError(
            "the endpoint teacher needs the openai library; install it with: "
            "pip install 'dslt[teacher]', or pip install openai"
        ) from None
    return openai


def _make_client(openai, **options):
    """The client; raises InputError where the environment's proxies or certificates are none."""
    try:
        return openai.AsyncOpenAI(**options)
    except (ImportError, ValueError, OSError) as error:
        names, expected = CERTIFICATE_VARIABLES, "certificates that can be read there"
        if not isinstance(error, OSError):
            names = PROXY_VARIABLES
            expected = "http://HOST:PORT (a socks5:// proxy needs pip install socksio)"
        found = [name for name in sorted(os.environ) if name.upper() in names]
        if not found:
            raise
        raise InputError(  # without the error's text or a value: a proxy's may hold a password
            f"the environment variable {' or '.join(found)} cannot be used by the endpoint's "
            f"client ({type(error).__name__}); expected {expected}. Correct or unset it"
        ) from None


def _progress_bar(total: int, name: str):
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else LOG_SECS
    return tqdm(total=total, desc=name, unit="req", dynamic_ncols=True, mininterval=interval)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event, workers: list[asyncio.Task]) -> Iterator[None]:
    """The first signal sets `stop`, a second one cancels the workers."""
    loop = asyncio.get_running_loop()

    def handle() -> None:
        if stop.is_set():
            for worker in workers:
                worker.cancel()
        else:
            print("\nstopping: waiting for what is under way", file=sys.stderr)
            stop.set()

    previous = {}
    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # no main thread
        wakeup = signal.set_wakeup_fd(-1)  # asyncio takes both away, and gives neither back
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.getsignal(number)
            loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
        if previous:
            signal.set_wakeup_fd(wakeup)
