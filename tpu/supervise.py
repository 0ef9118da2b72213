"""Keeps a run going on one worker:  python -m tpu.supervise --run-dir DIR -- COMMAND ...

Detaches from the terminal, starts the command, and starts it again after a preemption or a kill. The run itself resumes
from its newest checkpoint. The command's exit status decides (python -m experiments.run):

  0   finished                                              not started again
  1   the run cannot continue; its log says why             not started again
  2   the settings are wrong                                not started again
  75  stopped and saved, on a preemption notice             started again at once
  130 stopped and saved, by a Ctrl-C                        not started again
  any other, or killed by a signal                          started again, after growing pauses

The supervisor gives up after five starts in a row without a newer checkpoint. `--status` prints one line of JSON;
`--stop` stops the run after it has saved. All files are in ~/.engram_jax: run.log, state.json, lock, and secrets.env
with lines NAME=value for the command's environment. This file uses the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tpu import STATUS_MARK

# The numbers of engram_jax/errors.py. An import of it would make the supervisor depend on the project's packages.
FINISHED, FAILED, MISTAKEN, TERMINATED, INTERRUPTED = 0, 1, 2, 75, 130


class Supervisor:
    def __init__(
        self,
        command: Sequence[str],
        run_dir: str,
        files: Files,
        attempts: int = 5,
        first_pause: float = 5,
        longest_pause: float = 60,  # the other workers wait five minutes in jax.distributed.initialize
        long_enough: float = 600,
    ):
        """`long_enough`: where the checkpoints cannot be listed, this many seconds of running count as progress."""
        self.command, self.run_dir, self.files = list(command), run_dir, files
        self.attempts, self.first_pause, self.longest_pause = attempts, first_pause, longest_pause
        self.long_enough = long_enough
        self.restarts = 0
        self._child: subprocess.Popen[str] | None = None
        self._stop = threading.Event()

    def run(self, lock: int) -> int:
        """Runs the command until it need not start again; returns its last exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        in_vain = 0
        while True:
            step, began = newest_step(self.run_dir), time.monotonic()
            status = self._once(lock)
            self.files.log(f"the run ended with status {status}")
            if status == FINISHED:
                return self._end("finished", status)
            if self._stop.is_set():
                return self._end("stopped" if self.files.stop.exists() else "interrupted", status)
            if status == INTERRUPTED:
                return self._end("stopped", status)
            if status in (FAILED, MISTAKEN):
                return self._end("failed", status)
            in_vain = 0 if self._progressed(step, time.monotonic() - began) else in_vain + 1
            if in_vain >= self.attempts:
                self.files.log(f"giving up: {in_vain} starts in a row without a newer checkpoint")
                return self._end("failed", status)
            pause = min(self.first_pause * 2 ** max(in_vain - 1, 0), self.longest_pause)
            pause = 0 if status == TERMINATED and in_vain <= 1 else pause
            self.restarts += 1
            self.files.log(f"starting it again in {pause:g} s ({self.restarts} restarts so far)")
            self._say("pausing", status)
            self._stop.wait(pause)
            if self._stop.is_set():
                return self._end("stopped" if self.files.stop.exists() else "interrupted", status)

    def _once(self, lock: int) -> int:
        secrets = read_secrets(self.files.secrets)
        # The run has its own session, so a Ctrl-C reaches it once, through us. It holds the lock too: if we are killed,
        # no second run starts beside it.
        self._child = child = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=(lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **secrets},
        )
        self._say("running", None)
        if self._stop.is_set():  # the request came between two starts
            self._signal(signal.SIGTERM)
        assert child.stdout is not None
        reader = threading.Thread(target=self._copy, args=(child.stdout, list(secrets.values())), daemon=True)
        reader.start()
        status = child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a remaining data worker would keep the chips
        reader.join(5)
        self._child = None
        return status

    def _copy(self, output: IO[str], secrets: list[str]) -> None:
        with output:
            for line in output:
                for secret in secrets:
                    line = line.replace(secret, "***") if secret else line
                self.files.log(line.rstrip("\n"))

    def _progressed(self, before: int | None, seconds: float) -> bool:
        after = newest_step(self.run_dir)
        if before is None or after is None:
            return seconds >= self.long_enough
        return after > before

    def _forward(self, number: int, _frame: Any) -> None:
        self._stop.set()
        self._signal(number)

    def _signal(self, number: int) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def _end(self, state: str, status: int) -> int:
        self._say(state, status)
        self.files.log(state)
        return status

    def _say(self, state: str, status: int | None) -> None:
        child = self._child.pid if self._child else None
        self.files.save(
            state=state, status=status, restarts=self.restarts, run_dir=self.run_dir, pid=os.getpid(), child=child
        )


class Files:
    """The files in ~/.engram_jax, which only their owner can read."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or Path.home() / ".engram_jax"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.run_log, self.state = self.folder / "run.log", self.folder / "state.json"
        self.lock, self.stop = self.folder / "lock", self.folder / "stop"
        self.secrets = self.folder / "secrets.env"

    def log(self, line: str) -> None:
        with self.run_log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())} {line}\n")

    def save(self, **state: Any) -> None:
        whole = self.folder / "state.new"
        whole.write_text(json.dumps(state))
        whole.replace(self.state)

    def read(self) -> dict[str, Any]:
        try:
            state = json.loads(self.state.read_text())
        except (OSError, ValueError):
            return {"state": "idle"}
        if state["state"] in ("running", "pausing") and not self.locked():
            state["state"] = "dead"  # the VM was restarted, or the supervisor killed
        with contextlib.suppress(OSError), self.run_log.open("rb") as file:
            file.seek(max(0, self.run_log.stat().st_size - 4096))
            state["last_line"] = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
        return state

    def locked(self) -> bool:
        with hold(self.lock) as lock:
            return lock is None


@contextlib.contextmanager
def hold(path: Path) -> Iterator[int | None]:
    """The file's lock, or None if another process holds it. The kernel frees it when the last holder is gone."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)


def newest_step(run_dir: str) -> int | None:
    """The step of the newest checkpoint; -1 without a checkpoint; None if the folder cannot be listed."""
    folder = f"{run_dir.rstrip('/')}/checkpoints/"
    if run_dir.startswith("gs://"):
        try:
            words = ["gcloud", "storage", "ls", folder]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return -1 if "matched no objects" in done.stderr else None
        names = [line.rstrip("/").rpartition("/")[2] for line in done.stdout.splitlines()]
    else:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def read_secrets(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    lines = (line.strip() for line in file.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def launch(command: Sequence[str], run_dir: str, files: Files) -> int:
    """Detaches and supervises. Returns the status of the start, not of the run."""
    with hold(files.lock) as lock:
        if lock is None:
            print(
                f"error: a run is going on here already ({files.read().get('run_dir')}). Stop it first.",
                file=sys.stderr,
            )
            return 1
        files.stop.unlink(missing_ok=True)
        files.save(state="running", status=None, restarts=0, run_dir=run_dir, pid=None, child=None)
        sys.stdout.flush()
        if pid := os.fork():
            print(f"started under supervisor {pid}; its log is {files.run_log}")
            return 0
        os.setsid()
        with open(os.devnull, "r+b") as null, files.run_log.open("ab") as log:
            os.dup2(null.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = FAILED
        try:
            status = Supervisor(command, run_dir, files).run(lock)
        except Exception as error:  # such as a command that does not exist
            files.log(f"the supervisor failed: {error}")
            files.save(state="failed", status=status, restarts=0, run_dir=run_dir, pid=os.getpid(), child=None)
        os._exit(status & 0xFF)


def stop(files: Files, seconds: float = 600) -> int:
    """Asks the run to save and stop, and waits until it has ended; returns the exit status."""
    if not files.locked():
        print("nothing is running")
        return 0
    files.stop.touch()
    asked: set[int] = set()
    until = time.monotonic() + seconds
    while files.locked():
        if time.monotonic() > until:
            print(
                f"error: the run has not stopped after {seconds:g} s. Look at the log, or try again.", file=sys.stderr
            )
            return 1
        state = files.read()
        # The supervisor, as soon as its process id is known. If it was killed, the run that it left.
        pid = state.get("pid") if _alive(state.get("pid")) else state.get("child")
        if pid and pid not in asked:
            asked.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    print("stopped")
    return 0


def _alive(pid: int | None) -> bool:
    try:
        return pid is not None and os.kill(pid, 0) is None
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tpu.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", default="", help="the folder with the run's checkpoints")
    parser.add_argument("--status", action="store_true", help="print the state as JSON")
    parser.add_argument("--stop", action="store_true", help="stop the run after it has saved")
    parser.add_argument("command", nargs="*", help="the command to run, after --")
    options = parser.parse_args(arguments)
    files = Files()
    if options.status:
        print(STATUS_MARK + json.dumps(files.read()))
        return 0
    if options.stop:
        return stop(files)
    if not options.command:
        parser.error("the command is missing: give it after --")
    return launch(options.command, options.run_dir, files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
