"""Runs as their command lines, in processes of their own: alone, or several over the loopback; and their numbers."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import jax

from engram_jax.commands.command_line import field_paths
from engram_jax.training.metrics import read_metrics
from experiments.runs.registry import build

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""Of patience with processes that may wait for each other."""


def numbers(folder):
    """Every line of metrics.jsonl but for times and the room that the exchange was given: the session's numbers."""
    own = ("tokens_per_second", "goodput/", "memory/exchange_mb")
    return [{k: v for k, v in line.items() if not k.startswith(own)} for line in read_metrics(folder)]


class Command:
    """The run of a config as its command line: a process of its own, one device, the programs that users run."""

    def __init__(self, config, run_dir):
        base = build(config.name)
        self.arguments = ["--run_dir", str(run_dir)]
        for path in field_paths(config):
            value = attrgetter(path)(config)
            if value != attrgetter(path)(base):
                self.arguments += [f"--{path}", *map(str, value if isinstance(value, tuple) else (value,))]
        self.name, self.folder = config.name, run_dir
        programs = jax.config.values["jax_compilation_cache_dir"]
        settings = {"JAX_COMPILATION_CACHE_DIR": programs, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
        self.environment = os.environ | settings

    def start(self):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", self.name, *self.arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self):
        out, err = (process := self.start()).communicate()
        assert process.returncode == 0, out + err
        return out


class Together(Command):
    """The same command on several processes of several devices each, whose peers are given up after a few seconds."""

    PROGRAM = """
import sys
from engram_jax import distributed
distributed.HEARTBEAT_SECONDS, distributed.LEAVE_SECONDS = 10, 20
from experiments.run import main
sys.exit(main(sys.argv[1:]))
"""

    def __init__(self, config, run_dir, count, devices):
        super().__init__(config, run_dir)
        self.count = count
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        self.environment |= {"XLA_FLAGS": flags}

    @contextlib.contextmanager
    def started(self):
        """The processes; none outlives the context. Their output is in `self.outputs`."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.outputs = [self.folder.with_name(f"{self.folder.name}-{i}.log") for i in range(self.count)]
        processes = []
        try:
            for i, output in enumerate(self.outputs):
                where = f"--coordinator localhost:{port} --num_processes {self.count} --process_id {i}".split()
                command = [sys.executable, "-c", self.PROGRAM, self.name, *self.arguments]
                command += where if self.count > 1 else []
                with output.open("w") as file:
                    processes.append(
                        subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
                    )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def finish(self):
        """Runs to the end; what the first process said."""
        with self.started() as processes:
            statuses = self.wait(processes)
        assert statuses == [0] * self.count, self.said()
        return self.said(0)

    def wait(self, processes):
        """Their exit statuses."""
        until = time.monotonic() + SECONDS
        return [process.wait(max(until - time.monotonic(), 1)) for process in processes]

    def wait_for(self, text, processes):
        """Until the first process has said it."""
        until = time.monotonic() + SECONDS
        while text not in self.said(0):
            assert time.monotonic() < until and all(p.poll() is None for p in processes), self.said()
            time.sleep(0.05)

    def said(self, process=None):
        if process is None:
            return "\n".join(f"--- process {i}\n{output.read_text()}" for i, output in enumerate(self.outputs))
        return self.outputs[process].read_text()
