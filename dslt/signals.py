"""SIGTERM and SIGINT, in every command. Imports the standard library alone.

    with signals.handled():            # main: a signal ends what goes on here
        ...
        with signals.deferred() as stop:     # but here the loop looks at it
            while not stop.is_requested:
                step()

The first signal raises Interrupted in the main thread, unless it is deferred; what was written lies
whole under its name, as after a kill. Python runs a handler between two of its own instructions
alone, and XLA compiles for seconds or minutes in one: so a thread hears of signals too, and ends
the process where the main thread has not done it after LEAVE_SECS. A second signal ends it at once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

INTERRUPTED = 130  # the exit status after either signal, as a shell has it for SIGINT
LEAVE_SECS = 5.0  # for the main thread to leave in order
SAME_SECS = 0.3  # closer ones are one signal that came twice: to a group, and handed on by a script

GOES_ON = "; what was finished is saved, and the same command goes on from there"

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal, named in `str()`, ended what went on."""


class _Request:
    """What the handlers know of this process."""

    def __init__(self):
        self.name = ""
        self.is_deferred = False
        self.outlook = ""


class StopRequest:
    """Whether a signal has come, and its name."""

    def __init__(self, request: _Request):
        self._request = request

    @property
    def is_requested(self) -> bool:
        return bool(self._request.name)

    @property
    def name(self) -> str:
        return self._request.name


_request = _Request()


@contextlib.contextmanager
def handled(outlook: str = GOES_ON) -> Iterator[None]:
    """Handles both signals inside. In another thread than the main one it does nothing.

    `outlook` ends the line of a process that is ended: GOES_ON, or nothing where nothing is saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.name, _request.is_deferred, _request.outlook = "", False, outlook
    heard, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    watcher = threading.Thread(target=_watch, args=(heard,), daemon=True)
    watcher.start()
    previous_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, _handle) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(wakeup)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(heard)
        _request.name = ""


@contextlib.contextmanager
def deferred() -> Iterator[StopRequest]:
    """Inside, the first signal only makes a request. Outside of `handled` there is never one."""
    before, _request.is_deferred = _request.is_deferred, True
    try:
        yield StopRequest(_request)
    finally:
        _request.is_deferred = before


def leave(status: int) -> None:
    """Ends this process without Python's own ending, during which a thread that still compiles
    would crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _handle(number: int, _frame) -> None:
    """In the main thread."""
    if _request.name:
        return  # the watcher ends the process
    _request.name = signal.Signals(number).name
    if not _request.is_deferred:
        raise Interrupted(_request.name)


def _watch(heard: int) -> None:
    """Reads the numbers of signals, as they come, until the pipe is closed."""
    first_secs = None
    leaves = None
    while numbers := os.read(heard, 1):
        if numbers[0] not in _NUMBERS:
            continue
        name = signal.Signals(numbers[0]).name
        if first_secs is None:
            first_secs = time.monotonic()
            if not _request.is_deferred:
                leaves = threading.Timer(LEAVE_SECS, _leave_in_the_end, [name])
                leaves.daemon = True
                leaves.start()
        elif time.monotonic() - first_secs > SAME_SECS:
            _leave(f"left at once on a second signal, {name}")
    if leaves:
        leaves.cancel()


def _leave_in_the_end(name: str) -> None:
    if not _request.is_deferred:  # else it came just before: the loop looks at it
        _leave(f"stopped on {name}")


def _leave(why: str) -> None:
    print(f"\ndslt: {why}{_request.outlook}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
