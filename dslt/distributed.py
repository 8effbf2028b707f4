"""Several processes that run one program: how they meet, agree, and end together.

Imports JAX and dslt.signals. In one process everything here does nothing and answers at once.

    distributed.initialize("10.0.0.1:8476", num_processes=2, process_id=0, timeout_secs=300)
    with distributed.main_first():       # process 0 builds, the others find it built
        stream = TrainStream(...)
    distributed.check_same("records", stream.records_digests)

Process 0 alone prints and writes; each process computes with the rows of its own devices. What is
said between them goes through JAX's coordination service, whose messages need no device and may
take as long as they take.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

# JAX has no public name for the client; Orbax speaks through it too.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dslt import signals
from dslt.errors import InputError

READ_TIMEOUT_SECS = 600  # for all to read what all have said
GRACE_SECS = 5.0  # for the others to fail likewise, or to hear of it

# What jaxlib's preemption_sync_manager.cc waits for in the coordination service.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_FAILURES = "dslt/failures/"
_is_failing = threading.Event()
_step_numbers = itertools.count(1)  # of this process: a sync point is never met again
_names = itertools.count()  # of what is said: all processes say the same things in one order


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_secs: int
) -> None:
    """Waits for the other processes. To be called before JAX looks at its devices.

    What is None is found by JAX: on a Cloud TPU pod, in a Slurm step, under Open MPI. Afterwards
    process 0 alone prints to standard output and shows progress bars. A second call does nothing.

    Args:
      coordinator: host:port at which process 0 listens.
      process_id: of this process, from 0.
      timeout_secs: until all have come. Where some do not, this process ends itself with a message:
        JAX would abort it with a stack trace.

    Raises:
      InputError: what is None cannot be found, or what is given cannot be.
    """
    if global_state.client is not None:
        return
    if coordinator is not None:
        _check_address(coordinator)
    jax.config.update("jax_enable_preemption_service", True)  # for `AnyProcess`
    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    too_late = threading.Timer(timeout_secs, _give_up, [coordinator, num_processes, timeout_secs])
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout_secs + 60,  # _give_up speaks first
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # JAX's handler would swallow every SIGTERM
        jax.devices()  # on TPUs this waits for the others too
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"the processes of this run cannot be found ({_first_line(error)}); expected a Cloud "
            "TPU pod, a Slurm step or Open MPI, or else --coordinator host:port (a free port of "
            "process 0's host) with --num_processes and --process_id"
        ) from None
    finally:
        too_late.cancel()
    threading.Thread(target=_watch, daemon=True).start()
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, to the end


def is_main() -> bool:
    """Whether this process prints and writes. True in a single process."""
    return global_state.process_id == 0


def hides_bars() -> bool:
    """Whether this process draws no progress bar: another does, or nobody looks or wants to."""
    is_unwanted = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return is_unwanted or not (is_main() and sys.stderr.isatty())


def is_alone() -> bool:
    """Whether there is no other process."""
    return global_state.client is None or global_state.num_processes == 1


def check_joined() -> None:
    """Raises InputError where JAX sees several processes that were not told to work together.

    So it is on a Cloud TPU pod, whose runtime finds all devices by itself.
    """
    if global_state.client is None and jax.process_count() > 1:
        raise InputError(
            f"this is one of {jax.process_count()} processes whose devices JAX sees, but they were "
            "not told to work together; expected --distributed on every worker"
        )


def share(value):
    """Process 0's value, on every process; waits for it however long. JSON's types alone."""
    if is_alone():
        return value
    name = f"dslt/share/{next(_names)}"
    if is_main():
        global_state.client.key_value_set(name, json.dumps(value))
        return value
    return json.loads(_wait_for(name))


def gather(value) -> list:
    """Every process's value, by process; waits for them however long. JSON's types alone."""
    if is_alone():
        return [value]
    name = f"dslt/gather/{next(_names)}/"
    own = f"{name}{global_state.process_id}"
    global_state.client.key_value_set(own, json.dumps(value))
    values = [
        json.loads(_wait_for(f"{name}{process}")) for process in range(global_state.num_processes)
    ]
    global_state.client.wait_at_barrier(name, READ_TIMEOUT_SECS * 1000)  # all have read
    global_state.client.key_value_delete(own)
    return values


def divide(count: int, work: Callable[[range], list]) -> list:
    """The results of `work` for the items 0 … count - 1, of which each process does its share.

    Args:
      work: the numbers of some items (every n-th of n processes, perhaps none) to a result for
        each, of JSON's types. It must not need the other processes.

    Returns:
      All results, in the order of the items, on every process.
    """
    processes = 1 if is_alone() else global_state.num_processes
    results = [None] * count
    for process, part in enumerate(gather(work(range(global_state.process_id, count, processes)))):
        results[process::processes] = part
    return results


def check_same(name: str, value) -> None:
    """Raises InputError on every process if one of them has another `value` (JSON's types)."""
    for process, found in enumerate(values := gather(value)):
        if found != values[0]:
            raise InputError(
                f"{name} is {found} on process {process}, but {values[0]} on process 0; expected "
                "the same on all: give each the same files and the same command"
            )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block before the others do; where it fails there, they fail alike."""
    if not is_main() and (message := share(None)):
        raise InputError(message)
    try:
        yield
    except (InputError, OSError) as error:
        if is_main():
            share(str(error))
        raise
    if is_main():
        share(None)


class AnyProcess:
    """Whether any process is to stop, which all learn at the same step.

    Through the preemption sync point of `jax.distributed`: a process that is told to stop gives
    notice, and a thread of JAX's in each agrees with the others on the first step that none has
    begun. Until there is a notice, that costs a look at a number.
    """

    def __init__(self, mesh: Mesh):
        self._is_cpu = mesh.devices.flat[0].platform == "cpu"
        self._has_told = False

    def ask(self, says_so: bool, results) -> bool:
        """To be called by all processes after every step, with the arrays that the step made."""
        if is_alone():
            return says_so
        if self._is_cpu:
            # Two programs in flight on several CPU devices, with Gloo between the processes, were
            # seen to stand still for ever: each held a device that the other waited for.
            jax.block_until_ready(results)
        if says_so:
            self.tell()
        return multihost_utils.reached_preemption_sync_point(next(_step_numbers))

    def tell(self) -> None:
        """Gives notice, once, as JAX's own handler of SIGTERM would; ours has taken its place."""
        if not self._has_told:
            self._has_told = True
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            global_state.client.key_value_set(_NOTICE, now, allow_overwrite=True)


def fail(message: str, status: int) -> None:
    """Prints an error, ends this process, and with it the others, which would wait for it for ever.

    What process 0 says too is left to it. Where others had failed before, their messages come last:
    that a connection broke is no cause. A single process does nothing; several do not return: an
    orderly exit would wait for the rest.
    """
    if is_alone():
        return
    _is_failing.set()
    causes = []
    try:
        causes = _failures()
        own = json.dumps([message, status])
        global_state.client.key_value_set(f"{_FAILURES}{global_state.process_id}", own)
        if not is_main() and own == _wait_for(f"{_FAILURES}0", GRACE_SECS):
            message = ""
    except (jax.errors.JaxRuntimeError, TimeoutError):
        pass  # process 0 is gone, or has no error of its own
    if message:
        prefix = "" if is_main() else f"process {global_state.process_id}: "
        print(prefix + message, file=sys.stderr, flush=True)
        for process, cause, _ in causes:
            if cause != message:
                print(f"process {process} failed before: {cause}", file=sys.stderr, flush=True)
    if is_main() or not message:
        # Process 0 goes last: JAX aborts the processes that it leaves behind.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.wait_at_barrier("dslt/failed", int(2 * GRACE_SECS * 1000))
        time.sleep(0.5 if is_main() else 0.0)
    os._exit(status)


def _watch() -> None:
    """Ends this process a while after another has failed."""
    while True:
        time.sleep(1.0)
        try:
            failures = _failures()
        except (jax.errors.JaxRuntimeError, AttributeError):  # the run is over
            return
        if failures:
            time.sleep(GRACE_SECS + is_main())  # if it fails likewise, it says so itself
            if _is_failing.is_set():
                return
            process, message, status = failures[0]
            print(
                f"process {global_state.process_id}: ends, because process {process} failed: "
                f"{message}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(status if status == signals.INTERRUPTED else 1)


def _failures() -> list[tuple[str, str, int]]:
    """Processes that have failed, their messages and exit statuses."""
    found = global_state.client.key_value_dir_get(_FAILURES)
    return [(name.removeprefix(_FAILURES), *json.loads(said)) for name, said in found]


def _wait_for(name: str, timeout_secs: float = math.inf) -> str:
    """What is said under a name; raises TimeoutError where nobody says it in time."""
    deadline = time.monotonic() + timeout_secs
    while True:
        try:
            return global_state.client.blocking_key_value_get(name, 1000)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process said nothing for {timeout_secs:.0f} s ({name})")


def _give_up(coordinator: str | None, num_processes: int | None, timeout_secs: int) -> None:
    where = f" at {coordinator}" if coordinator else ""
    print(
        f"the {num_processes or ''} processes of this run have not met{where} within "
        f"{timeout_secs} s; expected the same command on every worker. Start it where it is "
        "missing, look whether all reach process 0's port, or wait longer: --start_timeout_secs",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"the coordinator is {coordinator!r}; expected host:port, such as 10.0.0.1:8476: where "
            "process 0 runs, and a port of it that is free"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
