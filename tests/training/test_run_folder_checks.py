"""The run's folder before anything is compiled: writable, of one run, left clean."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from engram_jax.config import ConfigError
from engram_jax.training import run_folder_checks
from engram_jax.training.run_folder_checks import LOCK, folder_of_one_run

OWNER = """
import sys, time
from pathlib import Path
from engram_jax.training.run_folder_checks import folder_of_one_run
with folder_of_one_run(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def seconds(monkeypatch):
    """Waiting takes no time; the list of what was waited."""
    waited = []
    monkeypatch.setattr(run_folder_checks, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path, owner, seconds):
    lines = []
    message = rf"is being written by another run \(process {owner.pid} on .*\): stop"
    with pytest.raises(ConfigError, match=message), folder_of_one_run(tmp_path, lines.append):
        pytest.fail("two runs in one folder")
    assert len(lines) == 1 and sum(seconds) == run_folder_checks.PATIENCE["this host"]


def test_an_owner_on_another_host_has_more_time_to_go(tmp_path, owner, seconds):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), folder_of_one_run(tmp_path, lambda _: None):
        pytest.fail("two runs in one folder")
    assert sum(seconds) == run_folder_checks.PATIENCE["another host"]


def test_a_killed_owner_leaves_the_folder_free(tmp_path, owner, seconds):
    owner.kill()
    owner.wait()
    with folder_of_one_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert seconds == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    message = r"--run_dir .*file/run cannot be written \(Not a directory\): give a folder"
    with pytest.raises(ConfigError, match=message), folder_of_one_run(tmp_path / "file" / "run"):
        pytest.fail("no folder")


def test_a_bucket_must_be_mounted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"--run_dir gs:/+bucket/run: .* Mount the gs bucket on every host"
    with pytest.raises(ConfigError, match=message), folder_of_one_run(Path("gs://bucket/run")):
        pytest.fail("a folder called gs:")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_leaves_no_folder_and_a_run_leaves_its_own(tmp_path):
    def fail(run_dir, *files):
        with folder_of_one_run(run_dir):
            for file in files:
                (run_dir / file).touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "mistake")
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "run", "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
