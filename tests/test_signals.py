"""What a signal does, in processes of their own: that the main thread is busy hinders none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dslt import signals
from dslt.signals import INTERRUPTED

PROGRAM = """
import hashlib, os, signal, sys, threading, time
from dslt import signals

signals.LEAVE_SECS = 1.0

def compute():  # in C, for minutes, as XLA compiles
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def say(text):
    print(text, flush=True)

with signals.handled():
"""
RUN_IN_PYTHON = """
    try:
        say("ready")
        while True:
            time.sleep(0.01)
    finally:
        say("in order")
"""
COMPUTE = """
    def say_once_it_computes():
        main = threading.main_thread().ident
        while sys._current_frames()[main].f_code is not compute.__code__:
            time.sleep(0.01)
        time.sleep(0.2)  # from its frame into C
        say("ready")

    threading.Thread(target=say_once_it_computes, daemon=True).start()
    compute()
"""
LOOP = """
    with signals.deferred() as stop:
        say("ready")
        while not stop.is_requested:
            time.sleep(0.01)
        say(f"saves on {stop.name}")
        time.sleep(0.5)
    say("saved")
"""
SAVE_FOR_EVER = """
    with signals.deferred() as stop:
        say("ready")
        while not stop.is_requested:
            time.sleep(0.01)
        say("saves")
        compute()
"""


def run_program(
    text: str, *pauses: float, number=signal.SIGTERM, program=PROGRAM
) -> tuple[int, str, str, float]:
    """Sends a signal when the program is ready, and one more after each pause. Returns its status,
    what it wrote, and the seconds from the first signal to its end.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program + text],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        sent_secs = time.monotonic()
        process.send_signal(number)
        for pause in pauses:
            time.sleep(pause)
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - sent_secs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_what_goes_on_in_order(number):
    _, out, err, secs = run_program(RUN_IN_PYTHON, number=number)
    assert out == "in order\n" and f"Interrupted: {number.name}" in err and secs < 10


def test_a_program_that_computes_ends_too():
    status, _, err, secs = run_program(COMPUTE)
    assert status == INTERRUPTED and 0.9 < secs < 10
    assert "stopped on SIGTERM" in err and "the same command goes on" in err


def test_a_program_that_saves_nothing_does_not_say_so():
    _, _, err, _ = run_program(COMPUTE, program=PROGRAM.replace("handled()", "handled('')"))
    assert err == "\ndslt: stopped on SIGTERM\n"


@pytest.mark.parametrize("pauses", [(), (0.01,)])
def test_a_loop_that_looks_at_it_saves_first(pauses):
    """A script may hand a signal on that the whole group has got: then it comes twice at once."""
    status, out, _, _ = run_program(LOOP, *pauses)
    assert (status, out) == (0, "saves on SIGTERM\nsaved\n")


def test_a_second_signal_leaves_at_once():
    status, out, err, secs = run_program(SAVE_FOR_EVER, 2 * signals.SAME_SECS)
    assert status == INTERRUPTED and secs < 10
    assert out == "saves\n" and "left at once on a second signal, SIGTERM" in err


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signals.handled():
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
