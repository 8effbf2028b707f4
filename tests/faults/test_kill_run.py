"""Kills at a count that every commit can bear; `-m long` is the whole of it."""

import signal
import time

import pytest
from kill_run import make_records, run_with_kills, start, train_command, wait_for

from dslt.signals import INTERRUPTED
from dslt.workdir import RunDir


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    check(run_with_kills(tmp_path, kills=2, aims=("compile", "save")), 2)


@pytest.mark.long
def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    report = run_with_kills(tmp_path, kills=20)
    check(report, 20)
    assert report.kills.keys() == {"start-up", "compile", "step", "save"}


def check(report, kills):
    assert sum(report.kills.values()) == kills and max(report.resumed_from) > 0
    assert (report.unequal, report.rows, report.events) == ([], [], [])


@pytest.mark.slow
def test_a_signal_while_the_step_is_compiled_ends_the_process_within_ten_seconds(tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(train_command(make_records(tmp_path / "records"), run.path, 10, 10))
    try:
        assert wait_for(run.heartbeat.exists, process)
        begun_secs = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == INTERRUPTED and time.monotonic() - begun_secs < 10
    finally:
        process.kill()
    assert not run.has_checkpoints()
