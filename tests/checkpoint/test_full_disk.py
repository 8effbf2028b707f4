"""A full disk: said with what is free, the checkpoint before is whole, and room is all it needs."""

import errno
import os

import fault_injection
import pytest

from dslt.checkpoint.layout import Layout
from dslt.checkpoint.manager import CheckpointManager
from dslt.errors import InputError
from dslt.start import newest_whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_background_save_becomes_a_message(number, tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught, CheckpointManager(tmp_path, together=True) as manager:
        manager.save(fault_injection.make_state(1), Layout(fault_injection.CONFIG))
        manager.wait()

        def fail(*_):
            raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(number)} [os_error_code]")

        monkeypatch.setattr(manager._manager, "wait_until_finished", fail)
        manager.wait()
    assert f"the disk is full ({os.strerror(number)});" in str(caught.value)
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.steps() == [1] and manager.find_damage(1) is None


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_room_heals_it(small_disk):
    path, resize = small_disk("1400k")
    checkpoints = path / "checkpoints"
    with pytest.raises(InputError, match=f"mounted at {path}. .* Make room there") as caught:
        save_until(checkpoints, 9)
    assert " of 1.4 MB are free" in str(caught.value)
    with CheckpointManager(checkpoints, together=True) as manager:
        newest = newest_whole(manager, manager.steps())
        assert 1 <= newest < 9 and newest == manager.steps()[-1]
    resize("20m")
    save_until(checkpoints, 9)
    with CheckpointManager(checkpoints, together=True) as manager:
        assert manager.steps() == list(range(1, 10))
        assert newest_whole(manager, manager.steps()) == 9


def save_until(checkpoints, last):
    with CheckpointManager(checkpoints, together=True) as manager:
        for step in range(max(manager.steps(), default=0) + 1, last + 1):
            manager.save(fault_injection.make_state(step), Layout(fault_injection.CONFIG))
