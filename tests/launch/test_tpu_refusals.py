"""What launch/tpu.sh refuses before anything is made."""

import shlex

import pytest
from tpu_world import git


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("launch", "found 'launch'; expected create, run, status"),
        ("status --nmae x", "found '--nmae'; expected a flag of --help"),
        ("status --name", "--name needs a value"),
        ("status --name=", "--name is missing; give it, or set DSLT_TPU_NAME"),
        ("status --wait_minutes soon", "--wait_minutes is 'soon'; expected a whole number"),
        ("create --idle_minutes 0", "--idle_minutes is 0; expected at least 1"),
        ("create", "found no accelerator type; give --slice slices/"),
        ("create --type tpu", "--type is 'tpu'; expected v4-N"),
        ("create --slice slices/none.gin", "there are: slices/small.gin"),
        ("create --slice slices/small.gin --type v4-8", "planned for v5litepod-16; expected the"),
        ("create --filestore x", "expected SERVER:/SHARE, such as"),
        ("create --bucket a/b", "--bucket is 'a/b'; expected a bucket's name alone"),
        ("run", "found no dslt command; expected it after --"),
        ("run -- train --run_dir runs/x", "the command writes to runs/x; expected a directory"),
        ("run -- train --run_dir gs://b/x", "found 'gs://b/x'; dslt reads and writes plain paths"),
        ("run --bucket= -- train --run_dir SHARED/x", "give the --bucket or the --filestore that"),
        ("run -- evaluate --run_dir SHARED/x --follow", "a chip serves one process"),
        ("run --fetch x -- bench", "--fetch: the command has no --run_dir"),
        ("run --recreate 1 -- bench", "--recreate needs to know what to make"),
        ("run --repo url -- bench", "--repo needs --commit"),
        ("run --type v5e-16 --recreate 1 -- sweep s", "v5e-16 has several workers, and a sweep"),
        ("run --commit 1234567 -- bench", "commit 1234567 is not in the history of"),
        ("run -- bench", "the slice paper in us-west4-a is not there; expected READY. Make it"),
        ("stop", "expected READY. Make it: bash launch/tpu.sh create"),
    ],
)
def test_a_mistake_is_named_before_anything_is_made(world, line, message):
    result = world.tpu(*shlex.split(line.replace("SHARED", str(world.shared))))
    assert result.status == 2 and message in result.err
    assert not world.calls("create|ssh|scp|delete")


def test_uncommitted_changes_are_not_run_unseen(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    (world.repository / "dslt" / "main.py").write_text("print('changed')")
    result = world.run()
    head = git(world.repository, "rev-parse", "--short", "HEAD")
    assert result.status == 2 and "found 1 uncommitted changes" in result.err
    assert f"run without them: --commit {head}" in result.err
    assert world.run("--commit", head).out == "it runs\n"


def test_a_bucket_that_renames_file_by_file_is_refused(slice_of_two):
    (slice_of_two.path / "hierarchical").write_text("")
    result = slice_of_two.run()
    assert result.status == 2
    assert "gs://my-bucket has no hierarchical namespace; expected one" in result.err
    assert "--location=us-west4 --project=my-project" in result.err


def test_another_slice_than_was_planned_for_is_refused(world):
    world.make_slice("v5litepod-8")
    result = world.run()
    assert result.status == 2
    assert "is a v5litepod-8, but slices/small.gin says v5litepod-16" in result.err
