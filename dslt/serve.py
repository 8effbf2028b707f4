"""One student behind HTTP: JSON, a page, health and metrics. Needs `pip install '.[serve]'`.

    POST /predict       {"inputs": ["…"], "rationales": false} → {"predictions": [{…}]}
    GET  /              a page with a text box
    GET  /health        200 when ready, else 503
    GET  /metrics       Prometheus
    GET  /openapi.json  the schemas

What is refused: 408 a body that does not come whole in time, 413 a body or a list that is too long,
422 an input that is (none is cut), 503 with Retry-After what finds the queue full or the student
not ready, and what has no answer yet when the time to stop is over.
"""

import asyncio
import base64
import contextlib
import hashlib
import html
import re
import socket
import time
from pathlib import Path

import fastapi
import prometheus_client
import pydantic
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response

from dslt import __version__, signals
from dslt.errors import InputError
from dslt.serve_engine import Engine, Overloaded

PAGE = Path(__file__).with_name("serve_page.html")
RETRY_AFTER = {"Retry-After": "1"}  # seconds
MAX_KEY = 100  # characters of a key that an answer repeats
LEAVE_SECS = 1  # for answers to leave that were given at the last moment


class PredictRequest(pydantic.BaseModel):
    """Inputs as the student was trained on them, without a task prefix."""

    model_config = pydantic.ConfigDict(extra="forbid")
    inputs: list[str] = pydantic.Field(min_length=1)
    rationales: bool = pydantic.Field(False, description="explain the answers too")


class PredictedAnswer(pydantic.BaseModel):
    """What the student says to one input."""

    label: str
    probability: float = pydantic.Field(
        description="of this label among all texts; of one of a set of labels, among the set"
    )
    distribution: dict[str, float] | None = pydantic.Field(
        None, description="the probability of each label of the set, the most likely first"
    )
    rationale: str | None = pydantic.Field(None, description="where it was asked for")


class PredictResponse(pydantic.BaseModel):
    """An answer to each input, in their order."""

    predictions: list[PredictedAnswer]


def make_app(engine: Engine, title: str) -> fastapi.FastAPI:
    """The app; it starts the engine and stops it. `title` is shown on the page."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        if not app.state.cut_off:  # else what is being decoded is for nobody
            await asyncio.to_thread(engine.stop)

    app = fastapi.FastAPI(
        title=f"dslt: {title}",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={RequestValidationError: _refuse_malformed},
    )
    app.state.bodies = set()  # the time limits of those that are on their way
    app.state.cut_off = []  # the paths of requests that got no answer
    app.add_middleware(_Gate, engine=engine, bodies=app.state.bodies, cut_off=app.state.cut_off)
    page, headers = _read_page(title)

    @app.post("/predict", response_model_exclude_none=True)
    async def predict(request: PredictRequest) -> PredictResponse:
        if len(request.inputs) > engine.config.max_inputs:
            found = f"{len(request.inputs)} inputs; expected {engine.config.max_inputs} at most"
            raise fastapi.HTTPException(413, found)
        try:
            works = await asyncio.to_thread(engine.submit, request.inputs, request.rationales)
        except InputError as error:
            raise fastapi.HTTPException(422, str(error)) from None
        except Overloaded as error:
            raise fastapi.HTTPException(503, str(error), RETRY_AFTER) from None
        answers = []
        for work in works:
            result = await asyncio.wrap_future(work.future)
            if work.kind == "label":
                answers.append(result._asdict())
                answers[-1]["label"] = answers[-1].pop("text")
            else:
                answers[-1]["rationale"] = result
        return PredictResponse(predictions=answers)

    @app.get("/health")
    async def health() -> Response:
        is_ready = engine.state == "ready"
        headers = {} if is_ready else RETRY_AFTER
        return JSONResponse({"state": engine.state}, 200 if is_ready else 503, headers)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(engine.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=headers)

    return app


def serve(app: fastapi.FastAPI, host: str, port: int, stop_secs: int) -> None:
    """Listens until SIGTERM or SIGINT, then answers what has come and returns.

    Raises:
      OSError: the address is taken, or is not one of this machine's.
      Interrupted: not all had an answer `stop_secs` after the signal; the others were cut off.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    shown = f"[{host}]" if ":" in host else host
    print(f"listening on http://{shown}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=stop_secs + LEAVE_SECS
    )
    with signals.deferred() as stop:  # uvicorn hears of one, ends in order, and raises it again
        _Server(config, stop_secs).run(sockets=[listening])
    if count := len(app.state.cut_off):
        raise signals.Interrupted(
            f"{stop.name}; requests that had no answer in time, {stop_secs} s at most, and were "
            f"cut off with 503: {count}"
        )


class _Server(uvicorn.Server):
    """Told to stop, it waits for no body that is still on its way, and so long for answers."""

    def __init__(self, config: uvicorn.Config, stop_secs: int):
        super().__init__(config)
        self._stop_secs = stop_secs

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for limit in self.config.app.state.bodies:
            if not limit.expired():
                limit.reschedule(0)
        # Before uvicorn does it, which says so in words of its own.
        asyncio.get_running_loop().call_later(self._stop_secs, self._cut_off)
        await super().shutdown(sockets)
        if self.force_exit:  # a second SIGINT: the rest uvicorn would leave to the event loop's end
            self._cut_off()
            if tasks := self.server_state.tasks:
                await asyncio.wait(tasks, timeout=LEAVE_SECS)
            await self.lifespan.shutdown()

    def _cut_off(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()


class _Gate:
    """ASGI middleware: bounds the body of a request and the time that it takes to come, answers one
    that is cut off, and counts and times those to /predict."""

    def __init__(self, app, engine: Engine, bodies: set[asyncio.Timeout], cut_off: list[str]):
        self._app, self._engine, self._bodies, self._cut_off = app, engine, bodies, cut_off

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_secs, max_bytes, received = time.perf_counter(), self._engine.config.max_bytes, 0
        body_secs, is_whole, is_answered = self._engine.config.body_secs, False, False
        deadline = asyncio.get_running_loop().time() + body_secs

        async def receive_bounded():
            nonlocal received, is_whole
            if is_whole:  # what is awaited now is the end of the connection
                return await receive()
            limit = asyncio.timeout_at(deadline)
            self._bodies.add(limit)
            try:
                async with limit:
                    message = await receive()
            except TimeoutError:
                raise fastapi.HTTPException(
                    408,
                    f"{received} bytes of the body have come, and not its end; expected it whole "
                    f"within {body_secs:g} s, and before the server stops",
                    {"Connection": "close"},
                ) from None
            finally:
                self._bodies.discard(limit)
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > max_bytes:
                raise fastapi.HTTPException(
                    413, f"the body has more than {max_bytes} bytes; send fewer inputs at once"
                )
            return message

        async def send_counted(message):
            nonlocal is_answered
            is_answered = True
            if scope["path"] == "/predict" and message["type"] == "http.response.start":
                self._engine.metrics.requests.labels(str(message["status"])).inc()
                if message["status"] == 200:
                    secs = time.perf_counter() - started_secs
                    self._engine.metrics.request_secs.observe(secs)
            await send(message)

        try:
            await self._app(scope, receive_bounded, send_counted)
        except asyncio.CancelledError:  # by `_Server`
            self._cut_off.append(scope["path"])
            if not is_answered:
                detail = "the server was told to stop before there was an answer"
                response = JSONResponse({"detail": detail}, 503, RETRY_AFTER)
                await response(scope, receive, send_counted)


async def _refuse_malformed(request, error: RequestValidationError) -> Response:
    """422 without what was sent: that may be long, or no text at all. Its keys are cut."""
    faults = [
        {
            "where": [part[:MAX_KEY] if isinstance(part, str) else part for part in fault["loc"]],
            "message": fault["msg"],
        }
        for fault in error.errors()[:20]
    ]
    return JSONResponse({"detail": faults}, 422)


def _read_page(title: str) -> tuple[str, dict[str, str]]:
    """The page, and the headers by which a browser runs its own script and loads nothing else."""
    page = PAGE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
