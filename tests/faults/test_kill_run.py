"""Kills at a count that every commit can bear; `-m long` is the whole of it."""

import pytest
from kill_run import run_with_kills


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
