"""However the decoding thread ends, whoever asked hears of it."""

import threading

import pytest

pytest.importorskip("prometheus_client", reason="the engine needs pip install '.[serve]'")

from dslt import serve_engine
from dslt.serve_engine import Engine, Overloaded, ServeConfig
from dslt.workdir import StudentFormat


class Panic(BaseException):
    """What an extension module in Rust raises where it is at its end."""


# What ends the thread, the state after it, and what those hear who wait.
ENDINGS = {
    "error": (ZeroDivisionError(), "failed", RuntimeError),
    "panic": (Panic(), "failed", RuntimeError),
    "stop": (None, "stopped", Overloaded),
}


class Ending:
    """An engine without a student, which decodes nothing until `end` is called, and then ends."""

    def __init__(self, monkeypatch, cause: BaseException | None):
        self.encode = lambda text: list(text.encode())
        self._is_over, is_ready = threading.Event(), threading.Event()

        def decode(engine, streams, accepted):
            is_ready.set()
            assert self._is_over.wait(60)
            if cause is not None:
                raise cause

        monkeypatch.setattr(serve_engine.student, "load", lambda path, mesh: (None, None, None))
        monkeypatch.setattr(serve_engine, "StreamPrograms", lambda graphdef, params: None)
        monkeypatch.setattr(Engine, "_make_streams", lambda engine: {})
        monkeypatch.setattr(Engine, "_decode_until_stopped", decode)
        format = StudentFormat()
        self.engine = Engine(None, format, lambda text: self.encode(text), str, ServeConfig())
        self.engine.start()
        assert is_ready.wait(60)

    def end(self) -> None:
        self._is_over.set()
        self.engine.stop()
        assert not self.engine._thread.is_alive()


@pytest.mark.parametrize(("cause", "state", "heard"), ENDINGS.values(), ids=ENDINGS)
def test_those_who_wait_hear_of_the_end_though_others_have_left(monkeypatch, cause, state, heard):
    ending = Ending(monkeypatch, cause)
    works = ending.engine.submit([f"text {i}" for i in range(20)], with_rationales=False)
    for work in works[::2]:
        assert work.future.cancel()
    ending.end()
    assert ending.engine.state == state
    for work in works[1::2]:
        assert isinstance(work.future.exception(timeout=5), heard)
    registry = ending.engine.metrics.registry
    assert registry.get_sample_value("dslt_waiting") == 0


@pytest.mark.parametrize(("cause", "state", "heard"), ENDINGS.values(), ids=ENDINGS)
def test_a_request_during_which_the_engine_ends_is_refused(monkeypatch, cause, state, heard):
    ending = Ending(monkeypatch, cause)

    def encode_and_end(text: str) -> list[int]:
        ending.end()
        return [5]

    ending.encode = encode_and_end
    with pytest.raises(Overloaded, match=f"the student is {state}"):
        ending.engine.submit(["text"], with_rationales=False)
