"""A TPU slice that launch/tpu.sh may make, and one that is there."""

import pytest
from tpu_world import World


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.add_small_dslt()
    return world


@pytest.fixture
def slice_of_two(world):
    world.make_slice()
    return world
