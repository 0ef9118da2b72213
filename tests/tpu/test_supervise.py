"""The supervisor, with small children in place of a run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engram_jax import errors
from tpu import supervise
from tpu.checks import REPOSITORY
from tpu.supervise import Files, Supervisor, hold, newest_step


@pytest.fixture
def handlers():
    """run() takes over the process's signals; they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def files(tmp_path: Path, handlers) -> Files:
    return Files(tmp_path / "files")


def supervised(files: Files, script: str, run_dir: str = "", **settings) -> tuple[int, dict, str]:
    """Runs the Python `script` under supervision; its working variables: n, how often it was started before."""
    counter = files.folder / "starts"
    head = f"import os, pathlib, signal, sys, time; c = pathlib.Path({str(counter)!r}); "
    head += "n = int(c.read_text()) if c.exists() else 0; c.write_text(str(n + 1))\n"
    with hold(files.lock) as lock:
        assert lock is not None
        settings = {"first_pause": 0.001, "long_enough": 0} | settings
        status = Supervisor([sys.executable, "-c", head + script], run_dir, files, **settings).run(lock)
        state = json.loads(files.state.read_text())
    return status, state, files.run_log.read_text()


@pytest.mark.parametrize(
    ("script", "status", "state", "restarts"),
    [
        ("", 0, "finished", 0),
        ("sys.exit(2)", 2, "failed", 0),
        ("sys.exit(1)", 1, "failed", 0),
        ("sys.exit(130)", 130, "stopped", 0),
        ("sys.exit(75 if n < 2 else 0)", 0, "finished", 2),
        ("sys.exit(134) if n == 0 else os.kill(os.getpid(), signal.SIGKILL) if n == 1 else None", 0, "finished", 2),
    ],
)
def test_what_an_exit_status_means(files, script, status, state, restarts):
    got, said, log = supervised(files, f"print('start', n)\n{script}")
    assert (got, said["state"], said["restarts"]) == (status, state, restarts)
    assert all(f"start {i}" in log for i in range(restarts + 1))
    assert all(line[:4].isdigit() and line[19] == "Z" for line in log.splitlines())  # every line has its time


def test_both_sides_mean_the_same_by_a_status():
    for name in ("FINISHED", "FAILED", "MISTAKEN", "TERMINATED", "INTERRUPTED"):
        assert getattr(supervise, name) == getattr(errors, name)
    assert errors.PEERS_LOST not in (0, 1, 2, 75, 130)  # which means: started again, later


def test_it_gives_up_without_progress(files, tmp_path):
    status, state, log = supervised(files, "sys.exit(134)", run_dir=str(tmp_path), attempts=3)
    assert (status, state["state"], state["restarts"]) == (134, "failed", 2)
    assert "giving up: 3 starts in a row" in log


def test_a_newer_checkpoint_is_progress(files, tmp_path):
    script = f"pathlib.Path({str(tmp_path)!r}, 'checkpoints', str(n)).mkdir(parents=True); sys.exit(9 if n < 6 else 0)"
    assert supervised(files, script, run_dir=str(tmp_path), attempts=2)[0] == 0


def test_pauses_grow_and_stay_below_the_longest(files, tmp_path):
    _, _, log = supervised(files, "sys.exit(3)", run_dir=str(tmp_path), longest_pause=0.003)
    assert [line.split()[6] for line in log.splitlines() if "starting it again" in line] == [
        "0.001",
        "0.002",
        "0.003",
        "0.003",
    ]


def test_after_a_preemption_notice_it_starts_at_once(files, tmp_path):
    _, _, log = supervised(files, "sys.exit(75 if n == 0 else 0)", run_dir=str(tmp_path), first_pause=60)
    assert "starting it again in 0 s" in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_nothing_is_started_again(files, number):
    script = "def bye(k, _): print('got', k, flush=True); sys.exit(75)\n"
    script += f"signal.signal({int(number)}, bye); print('ready', flush=True); time.sleep(20)"

    def send():
        while "ready" not in (files.run_log.read_text() if files.run_log.exists() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    status, state, log = supervised(files, script)
    sender.join()
    assert (status, state["state"], state["restarts"]) == (75, "interrupted", 0)
    assert f"got {int(number)}" in log


def test_what_the_run_leaves_behind_is_killed(files, tmp_path):
    script = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    script += f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid))"
    began = time.monotonic()
    assert supervised(files, script)[0] == 0
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.02)
    else:
        raise AssertionError("still alive")
    assert time.monotonic() - began < 20


def test_detached_it_outlives_its_terminal_and_holds_the_lock(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "tpu.supervise", *arguments]
        return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=REPOSITORY)

    def status() -> dict:
        return json.loads(command("--status").stdout.partition(": ")[2])

    assert status()["state"] == "idle"
    assert command("--run-dir", "/r").returncode == 2  # no command
    script = "import time; print('hello', flush=True); time.sleep(60)"
    start = ["--run-dir", "/r", "--", sys.executable, "-c", script]
    first, second = command(*start), command(*start)
    assert first.returncode == 0 and "started under supervisor" in first.stdout
    assert second.returncode == 1 and "a run is going on here already (/r)" in second.stderr
    while not status().get("last_line", "").endswith("hello"):
        time.sleep(0.05)
    state = status()
    assert state["state"] == "running" and os.getsid(state["pid"]) == state["pid"]
    assert "stopped" in command("--stop").stdout
    assert status()["state"] == "stopped"
    assert "nothing is running" in command("--stop").stdout


def test_a_supervisor_that_was_killed(tmp_path):
    files = Files(tmp_path)
    files.save(state="running", pid=2**22 + 1, child=None, restarts=0, run_dir="/r", status=None)
    assert files.read()["state"] == "dead"
    assert supervise.stop(files) == 0  # nothing is running
    # Its run lives on, and holds the lock: no second one is started beside it, and `stop` reaches it.
    with hold(files.lock) as lock:
        assert lock is not None
        words = [sys.executable, "-c", "import time; time.sleep(60)"]
        run = subprocess.Popen(words, pass_fds=(lock,))
    files.save(state="running", pid=2**22 + 1, child=run.pid, restarts=0, run_dir="/r", status=None)
    reaper = threading.Thread(target=run.wait)
    reaper.start()
    assert files.read()["state"] == "running"
    assert supervise.launch(["true"], "/other", files) == 1
    assert supervise.stop(files) == 0
    reaper.join()
    assert run.returncode == -signal.SIGTERM


def test_a_command_that_does_not_exist(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "tpu.supervise", "--run-dir", "/r", "--", "/no/such/python"]
    assert subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True).returncode == 0
    files = Files(tmp_path / ".engram_jax")
    while files.locked():
        time.sleep(0.02)
    assert files.read()["state"] == "failed" and "/no/such/python" in files.run_log.read_text()


def test_the_newest_step_of_a_bucket(cloud):
    cloud.on(r"storage ls gs://b/r/checkpoints/", stdout="gs://b/r/checkpoints/500/\ngs://b/r/checkpoints/1000/\n")
    cloud.on(r"storage ls gs://b/none/", rc=1, stderr="ERROR: One or more URLs matched no objects.")
    cloud.on(r"storage ls gs://b/shut/", rc=1, stderr="ERROR: 403")
    assert [newest_step(f"gs://b/{name}") for name in ("r", "none", "shut")] == [1000, -1, None]


def test_where_checkpoints_cannot_be_listed_time_counts(files, cloud):
    cloud.on("storage ls", rc=1, stderr="ERROR: 403")
    assert supervised(files, "sys.exit(9 if n < 6 else 0)", "gs://b/r", attempts=2, long_enough=0)[0] == 0
    (files.folder / "starts").unlink()
    assert supervised(files, "sys.exit(9)", "gs://b/r", attempts=2, long_enough=60)[0] == 9


def test_secrets_are_read_from_the_file(tmp_path):
    file = tmp_path / "secrets.env"
    assert supervise.read_secrets(file) == {}
    file.write_text("# a comment = no\n\nA=1=2\nB= x \n")
    assert supervise.read_secrets(file) == {"A": "1=2", "B": " x"}
