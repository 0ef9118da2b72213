"""The run that can be profiled, with the real jax on CPU and a stand-in for the run."""

import os
import subprocess
import sys

from tpu.checks import REPOSITORY
from tpu.child import Requests


def test_the_exit_status_and_arguments_are_the_runs(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    for arguments, status, message in ((["engram_smal"], 2, "engram_small"), (["--list"], 0, "engram_27b")):
        words = [sys.executable, "-m", "tpu.child", *arguments]
        done = subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == status and message in done.stdout + done.stderr


def test_a_trace_is_written_when_asked_for(tmp_path):
    script = """
import sys, threading, pathlib
from tpu.child import Requests
threading.Thread(target=Requests().serve, args=(0.01,), daemon=True).start()
import jax, jax.numpy as jnp
f, x = jax.jit(lambda x: x @ x), jnp.ones((64, 64))
while not pathlib.Path(sys.argv[1]).exists():
    x = f(x) / 64
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    over = tmp_path / "over"
    words = [sys.executable, "-c", script, str(over)]
    with subprocess.Popen(words, env=environment, cwd=REPOSITORY) as run:
        try:
            requests = Requests(tmp_path / ".engram_jax")
            assert requests.ask(0.1) == 0
            assert list(requests.trace.rglob("*.xplane.pb"))
        finally:
            over.touch()
        assert run.wait(60) == 0


def test_without_a_run_nobody_answers(tmp_path, capsys):
    requests = Requests(tmp_path)
    assert requests.ask(0, patience=0.05) == 1
    assert "no run answered" in capsys.readouterr().err and not requests.asked.exists()
