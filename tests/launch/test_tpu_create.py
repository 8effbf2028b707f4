"""launch/tpu.sh makes a slice, at once or from the queue, and deletes it."""

import pytest
from tpu_world import WHERE


def test_create_makes_a_slice_once(world):
    assert world.tpu("create", "--type", "v5litepod-16").status == 0
    again = world.tpu("create", "--type", "v5litepod-16")
    assert again.status == 2
    assert "found paper in us-west4-a: READY; expected none" in again.err
    assert "delete it: bash launch/tpu.sh delete" in again.err
    assert len(world.calls("tpu-vm create")) == 1


def test_create_waits_in_the_queue(world):
    world.faults({"on": "tpu-vm describe", "skip": 3, "vm": "READY", "queue": "ACTIVE"})
    result = world.tpu("create", "--type", "v5litepod-16", "--queued")
    assert result.status == 0 and "paper is READY: 2 workers" in result.err
    assert len(world.calls("tpu-vm describe")) == 4
    (world.path / "vm.json").unlink()
    again = world.tpu("create", "--type", "v5litepod-16", "--queued")
    assert again.status == 2 and "found paper in us-west4-a: not there, ACTIVE in" in again.err
    assert len(world.calls("queued-resources create")) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"on": "queued-resources describe", "skip": 2, "queue": "FAILED"},
            "is FAILED; expected",
        ),
        ({"on": "queued-resources create", "status": 1}, "gcloud did not take the request"),
        ({"on": "nothing"}, "CREATING, WAITING_FOR_RESOURCES in the queue after 0 minutes"),
    ],
)
def test_a_request_that_comes_to_nothing_says_so(world, fault, message):
    world.faults(fault)
    minutes = "0" if fault["on"] == "nothing" else "1"
    result = world.tpu("create", "--type", "v4-8", "--queued", "--wait_minutes", minutes)
    assert result.status == 2 and message in result.err


def test_no_capacity_is_said_with_what_next(world):
    stderr = "ERROR: (gcloud) There is no more capacity in the zone"
    world.faults({"on": "tpu-vm create", "status": 1, "stderr": stderr})
    result = world.tpu("create", "--type", "v4-8", "--spot")
    assert result.status == 2 and stderr in result.err and "--queued, or another" in result.err


def test_what_gcloud_cannot_say_is_not_taken_for_nothing_there(world):
    world.faults({"on": "describe", "status": 1, "stderr": "ERROR: not logged in"})
    result = world.tpu("create", "--type", "v4-8")
    assert result.status == 2 and "not logged in" in result.err and not world.calls("create")


def test_delete_takes_the_queued_resource_with_it(world):
    (world.path / "queue").write_text("ACTIVE")
    world.make_slice()
    assert world.tpu("delete").status == 0
    (call,) = world.calls("delete")
    assert call == f"compute tpus queued-resources delete paper {WHERE} --force --quiet"
    result = world.tpu("delete")
    assert result.status == 0 and "nothing to delete" in result.err
