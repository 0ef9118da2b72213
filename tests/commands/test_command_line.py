"""What all commands share: the exit status, and errors of one line."""

import subprocess
import sys

import pytest

from engram_jax.commands.command_line import NOBODY_READS, exit_status, training_status
from engram_jax.config import ConfigError
from engram_jax.errors import FAILED, FINISHED, MISTAKEN, PEERS_LOST, RunError


def test_the_status_is_the_commands():
    assert exit_status(lambda: FINISHED) == FINISHED
    assert exit_status(lambda: 3) == 3


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no."), MISTAKEN), (RunError("no."), FAILED)])
def test_a_mistake_is_one_line(capsys, error, status):
    def command():
        raise error

    assert exit_status(command) == status
    assert capsys.readouterr().err == "error: no.\n"


def test_a_bug_is_no_mistake():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)


def test_a_program_that_fails_while_it_trains_may_be_started_again(capsys):
    """A lone process as one among others; a second Ctrl-C is nobody's error."""
    assert training_status(lambda: 1 // 0) == PEERS_LOST
    assert "ZeroDivisionError" in capsys.readouterr().err.splitlines()[-1]

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training_status(interrupted)


@pytest.mark.parametrize("line", ["print('report')", "print('report' * 100_000, flush=True)"])
def test_a_reader_may_leave(line):
    imports = "import sys; from engram_jax.commands.command_line import exit_status"
    code = f"{imports}; sys.exit(exit_status(lambda: {line} or 0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == NOBODY_READS


def test_a_reader_of_a_run_may_leave():
    command = [sys.executable, "-m", "experiments.run", "moe_tiny", "--print"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == NOBODY_READS
