"""launch/tpu.sh runs a command on a slice's workers, attends it, and makes a lost slice again."""

import re
import shutil

from tpu_world import ROOT, TRAIN, World, git, write_script

from dslt.main import INTERRUPTED


def test_the_same_command_runs_on_every_worker(slice_of_two):
    world = slice_of_two
    world.program("print('hear', worker, arguments)\ntime.sleep(0.3)\nprint('done', worker)")
    command = [*TRAIN, "--gin", "train.TrainConfig.name = 'it is  two'"]
    result = world.run(command=command)
    assert result.status == 0, result.err
    expected = [*command, "--run_dir", str(world.shared / "run"), "--distributed"]
    assert result.out == f"hear 0 {expected}\ndone 0\n"
    log = world.path / "workers" / "1" / "dslt" / "job" / "log"
    assert log.read_text() == f"hear 1 {expected}\ndone 1\n"
    head = git(world.repository, "rev-parse", "HEAD")
    for worker in "01":
        assert git(world.path / "workers" / worker / "dslt" / "code", "rev-parse", "HEAD") == head


def test_what_is_installed_is_not_installed_again(slice_of_two):
    world = slice_of_two
    world.program("print('first')")
    world.run()
    world.program("print('second')")
    assert world.run().out == "second\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 1]
    (world.repository / "setup.py").write_text("# other packages\n")
    git(world.repository, "commit", "--all", "--message", "x")
    assert world.run().status == 0
    assert [world.installs(worker) for worker in (0, 1)] == [2, 2]


def test_a_worker_on_which_the_installation_fails_is_named_and_goes_on(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    (world.path / "no_pip.1").touch()
    result = world.run()
    assert result.status == 2 and "the installation failed on worker 1 of 2;" in result.err
    assert "worker 1: no network on worker 1" in result.err and "it runs" not in result.out
    (world.path / "no_pip.1").unlink()
    assert world.run().out == "it runs\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 2]


def test_a_half_installed_worker_is_installed_again(slice_of_two):
    """Killed at the worst times: in a checkout, and in a pip whose environment looks whole."""
    world = slice_of_two
    world.program("print('it runs')")
    world.run()
    code = world.path / "workers" / "1" / "dslt" / "code"
    (code / ".git" / "index.lock").touch()
    (code / "dslt" / "config.py").unlink()
    write_script(code / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    result = world.run()
    assert result.status == 0 and result.out == "it runs\n"
    assert [world.installs(worker) for worker in (0, 1)] == [1, 2]


def test_the_worker_that_failed_first_is_shown(tmp_path):
    world = World(tmp_path, workers=3)
    world.add_small_dslt()
    world.make_slice()
    world.program(
        "time.sleep(0.2 if worker == 1 else 0.6)\n"
        "print('worker 1 has no memory left' if worker == 1 else 'another failed')\n"
        "sys.exit(7 if worker == 1 else 1)"
    )
    result = world.run()
    assert result.status == 7 and result.out == "another failed\n"
    assert "worker 1 ended with status 7, before any other of the 3" in result.err
    assert "worker 1 has no memory left" in result.err.partition("its last lines")[2]
    assert "dslt ended with status 7; the slice paper stays" in result.err


def test_a_worker_that_was_killed_is_shown(slice_of_two):
    world = slice_of_two
    world.program(
        "import signal\n"
        "print('going on')\n"
        "if worker == 1: os.kill(os.getppid(), signal.SIGKILL); os._exit(1)\n"
        "time.sleep(0.5); sys.exit(1)"
    )
    result = world.run()
    assert result.status == 1 and "worker 1 was killed, or rebooted" in result.err


def test_a_worker_that_never_comes_up_is_named(slice_of_two):
    world = slice_of_two
    world.faults({"on": "scp.*--worker=1", "times": -1, "status": 255, "stderr": "timed out"})
    result = world.run("--wait_minutes", "0")
    assert result.status == 2 and "worker 1: timed out" in result.err
    assert "the code could not be copied in 0 minutes on worker 1 of 2" in result.err
    assert "never comes up needs a new slice" in result.err


def test_a_worker_that_comes_up_late_is_waited_for(slice_of_two):
    world = slice_of_two
    world.program("print('it runs')")
    world.faults({"on": "scp.*--worker=1", "times": 3, "status": 255})
    assert world.run().out == "it runs\n"
    first = world.calls("scp")[0]
    assert "--worker=0" in first  # alone, so that gcloud adds the ssh key once


def test_a_dropped_connection_loses_and_repeats_nothing(slice_of_two):
    world = slice_of_two
    world.program("for i in range(20): print('line', i, flush=True); time.sleep(0.05)")
    world.faults(
        {"on": "poll", "skip": 1, "status": 255},
        {"on": "describe", "skip": 3, "times": 2, "status": 1, "stderr": "no network"},
        {"on": "poll", "skip": 2, "status": 255},
    )
    result = world.run()
    assert result.status == 0
    assert result.out.splitlines() == [f"line {i}" for i in range(20)]


RESUMING = """
path = os.path.join(os.environ["DSLT_SHARED"], "step_of_" + os.environ["WORKER"])
if not os.path.exists(path):
    print("train from nothing", flush=True)
    open(path, "w").close()
    time.sleep(60)
print("resume and finish")
"""
PREEMPTION = {"on": "poll", "skip": 8, "preempt": True, "status": 1}


def test_a_preempted_slice_is_made_again_and_the_run_resumed(world):
    world.program(RESUMING)
    world.faults(PREEMPTION)
    flags = ("--recreate", "2", "--spot", "--delete", "--fetch", "here")
    result = world.run(*flags)
    assert result.status == 0, result.err
    assert result.out.startswith("train from nothing\nresume and finish\n")
    assert "copied gs://my-bucket/run to here" in result.out
    actions = [call.split()[3] for call in world.calls("tpu-vm (create|delete)")]
    assert actions == ["create", "delete", "create", "delete"]
    assert all("--spot" in call for call in world.calls("tpu-vm create"))
    assert not (world.path / "vm.json").exists()


def test_a_run_waits_for_a_slice_that_stands_in_line(world):
    """It is not asked for again, which would lose its place."""
    world.program("print('it runs')")
    world.faults({"on": "tpu-vm describe", "skip": 3, "vm": "READY", "queue": "ACTIVE"})
    world.tpu("create", "--type", "v5litepod-16", "--queued", "--wait_minutes", "0")
    assert world.run("--recreate", "1").out == "it runs\n"
    assert len(world.calls("queued-resources create")) == 1 and not world.calls("delete")


def test_a_preemption_too_many_says_what_next(slice_of_two):
    world = slice_of_two
    world.program(RESUMING)
    world.faults(PREEMPTION)
    result = world.run()
    assert result.status == 2
    assert f"the slice was preempted; what was saved is in {world.shared}/run." in result.err
    assert not world.calls("create|delete")


def test_a_preemption_during_the_installation_is_one_too(world):
    world.program("print('it runs')")
    fault = {"on": "install", "preempt": True, "status": 1}
    world.make_slice()
    world.faults(fault)
    assert world.run("--recreate", "1").out == "it runs\n"


def test_stop_lets_every_worker_save(slice_of_two):
    world = slice_of_two
    world.program(
        "import signal\n"
        "def save(*_): print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('training', flush=True)\n"
        "time.sleep(60)"
    )
    running = world.begin("run", "--", *TRAIN, "--run_dir", str(world.shared / "run"))
    line = running.stdout.readline()
    status = world.tpu("status").out
    busy = world.run()
    stopped = world.tpu("stop")
    result = world.end(running)
    assert line == "training\n" and "worker 1: running" in status
    assert busy.status == 2 and "runs 'dslt train" in busy.err  # a second run does not disturb it
    assert stopped.status == 0 and "the slice stays, and is paid for" in stopped.err
    assert result.status == INTERRUPTED and result.out == "saved\n"
    assert re.search("worker 1: ended 130 ", world.tpu("status").out)


def test_other_commands_run_on_worker_0s_cpu(slice_of_two):
    world = slice_of_two
    world.program("print(worker, arguments, os.environ['JAX_PLATFORMS'])")
    command = ["extract", "--output_dir", str(world.shared / "records")]
    result = world.tpu("run", "--", *command, JAX_PLATFORMS="tpu")
    assert result.out == f"0 {command} cpu\n", result.err
    assert not (world.path / "workers" / "1" / "dslt" / "job").exists()


def test_a_sweep_runs_on_the_chips_of_one_worker_and_of_no_more(slice_of_two):
    world = slice_of_two
    world.program("import os; print(arguments[0], os.environ.get('JAX_PLATFORMS'))")
    command = ["sweep", "s.gin", "--output_dir", str(world.shared / "sweep")]
    refused = world.tpu("run", "--", *command, "--only", "a-run")
    assert refused.status == 2
    assert "the slice paper has several workers, and a sweep trains in one" in refused.err
    assert not world.calls("scp")
    assert world.tpu("run", "--", *command, "--list").out == "sweep cpu\n"
    (world.path / "num_workers").write_text("1")
    world.make_slice()
    found = world.tpu("run", "--", "dslt", *command, "--only", "a-run", JAX_PLATFORMS="tpu")
    assert found.out == "sweep tpu\n", found.err


def test_a_run_of_a_sweep_that_another_works_on_costs_no_slice(slice_of_two):
    """dslt ends with 75, which is no preemption."""
    world = slice_of_two
    world.program("sys.exit(75)")
    result = world.run("--recreate", "1")
    assert result.status == 1 and "ended with status 75" in result.err
    assert not world.calls("tpu-vm (create|delete)")


def test_logs_of_many_workers_are_told_apart(tmp_path):
    world = World(tmp_path, workers=40)  # more than are asked at once
    world.make_slice()
    for worker in range(40):
        home = tmp_path / "workers" / str(worker)
        (home / "dslt" / "job").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "tpu_worker.sh", home)
        lines = [f"line {i} of {worker}\n" for i in range(30)]
        (home / "dslt" / "job" / "log").write_text("".join(lines))
    result = world.tpu("logs", "--worker", "all")
    expected = [f"worker {w}: line {i} of {w}" for w in range(40) for i in range(10, 30)]
    assert result.status == 0 and result.out.splitlines() == expected
