"""Several processes, one run: who they are, how they agree, and how the end of one becomes the end of all.

jax's coordination service, which process 0 carries, ends every process when one of them stops sending heartbeats. What
is added here is what jax leaves open: a process alone starts no service, errors that only one process can see are told
to all, and the last line of a process that was ended says why and what to do.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import jax
from jax._src import distributed  # the coordination service has no public client
from jax._src.clusters import ClusterEnv  # jax can join a cluster, but not say which one it would be

from engram_jax.config import ConfigError
from engram_jax.errors import GOES_ON, PeersError

HEARTBEAT_SECONDS = 50
"""Without a sign of life, after which a process counts as dead; the others end at most that much later."""
JOIN_SECONDS = 300
LEAVE_SECONDS = 50
"""For the others to come to the end too; a process that fails alone ends them when this is over."""
EXCHANGE_SECONDS = 240
"""Longer than the first process may wait for a folder (run_folder_checks.PATIENCE), so that its reason arrives."""

_LAST_LINE = (
    "Process {id} of {count} ended before the run was done: it was killed, or another process died or lost its "
    "connection (see above, and the other logs). " + GOES_ON
)


def start(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Joins the other processes: those given, or of the TPU slices, GKE or Slurm job that this process belongs to.

    Must be called before anything asks for devices. A process alone, on a TPU VM too, is left as it is.

    Raises:
      ConfigError: the arguments do not describe a set of processes.
      PeersError: the others did not come in time.
    """
    if distributed.global_state.client is not None:
        return  # this process has joined before: several runs, one after the other
    where = "as given"
    if (coordinator, num_processes, process_id) == ("", None, None):
        environment = _cluster()
        if environment is None or environment.get_process_count() == 1:
            return
        where, arguments = f"found by {environment.name or environment.__name__}", {}
        process_id, num_processes = environment.get_process_id(), environment.get_process_count()
    else:
        _check(coordinator, num_processes, process_id)
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    # The service would catch SIGTERM; stopping.py does, and tells the others itself. In the meantime SIGTERM ends.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except RuntimeError as error:
        raise PeersError(
            f"Process {process_id} of {num_processes} ({where}) could not join the others within {JOIN_SECONDS} s: "
            f"{str(error).splitlines()[0][:300]} Are all of them started, with the same coordinator, and can they "
            "reach its port?"
        ) from error
    _say_when_aborted(_LAST_LINE.format(id=process_id, count=num_processes))
    if process_id == 0:
        address = distributed.global_state.coordinator_address
        log(f"{num_processes} processes, {where}; process 0 coordinates them at {address}.")


def _cluster() -> type[ClusterEnv] | None:
    known = [env for env in ClusterEnv._cluster_types if not env.opt_in_only_method]
    return next((env for env in known if env.is_env_present()), None)


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    given = {"--coordinator": coordinator or None, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing or num_processes is None or process_id is None:
        raise ConfigError(
            f"{' and '.join(missing)} missing: give --coordinator HOST:PORT, --num_processes N and --process_id I "
            "together, or none of them (TPU slices, GKE and Slurm are found without)."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {coordinator!r} must be HOST:PORT, process 0's host and a free port of it.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id {process_id} must lie in 0..{num_processes - 1} (--num_processes - 1).")


_exchanges = itertools.count()


def exchange(text: str) -> list[str]:
    """What every process says, in order, on all of them. Every process must call it.

    It goes through the coordination service and not the devices: a process may come here because it could not follow
    the others into a collective.

    Raises:
      PeersError: the others did not come.
    """
    if jax.process_count() == 1:
        return [text]
    client, key = distributed.global_state.client, f"engram_jax/exchange/{next(_exchanges)}"
    assert client is not None
    client.key_value_set(f"{key}/{jax.process_index()}", f"={text}")
    try:
        client.wait_at_barrier(key, EXCHANGE_SECONDS * 1000)
    except RuntimeError as error:
        raise PeersError(
            f"The other processes did not come to compare notes within {EXCHANGE_SECONDS} s "
            f"({str(error).splitlines()[0][:300]}). This one says: {text or 'no problem here'}"
        ) from error
    said = {int(name.rsplit("/", 1)[1]): value[1:] for name, value in client.key_value_dir_get(f"{key}/")}
    return [said[i] for i in range(jax.process_count())]


def agree(problem: str) -> str:
    """The first problem that any process has, on all of them; "" if none has one. Every process must call it."""
    problems = enumerate(exchange(problem))
    return next((f"{said} (process {i})" if jax.process_count() > 1 else said for i, said in problems if said), "")


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def leave(status: int, together: bool) -> int:
    """Ends a process that failed among others: never returns there. A process alone gets `status` back.

    `together`: the others have probably failed as well, so all leave as from a finished run. If they do not come, and
    otherwise, this process vanishes, and the others are ended by its silence: the interpreter's own exit would wait for
    them in places that know no time limit, and end in abort() instead of `status`.
    """
    client = distributed.global_state.client
    if client is None:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    _stay_silent()
    if together:
        with contextlib.suppress(RuntimeError):
            client.wait_at_barrier("engram_jax/leave", LEAVE_SECONDS * 1000)
            jax.distributed.shutdown()  # process 0 carries the service, and must not be the first to go
    os._exit(status)


_watcher: subprocess.Popen | None = None


def _say_when_aborted(line: str) -> None:
    """jax ends a process whose peers died by abort() in a C++ thread, where no Python runs any more (its own callback
    dies of std::bad_cast, jax 0.10), with a stack trace as the last word. A shell waits for that and has it instead."""
    global _watcher
    script = "trap '' INT TERM HUP; read -r end || echo \"$1\" >&2"
    _watcher = subprocess.Popen(["/bin/sh", "-c", script, "sh", line], stdin=subprocess.PIPE)
    atexit.register(_stay_silent)


def _stay_silent() -> None:
    global _watcher
    if _watcher is not None and _watcher.stdin is not None:
        _watcher.stdin.write(b"end\n")
        _watcher.stdin.close()
        _watcher.wait()
        _watcher = None
