"""Buckets on the workers: mounted before the run, again when they are gone, and said so when they cannot be.

The worker's gcsfuse, mountpoint and fusermount are those of conftest.py; its shell is real.
"""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_fakes import Cloud, vm

from tpu import STATUS_MARK, buckets, workers
from tpu.checks import REPOSITORY
from tpu.errors import NotMounted
from tpu.gcloud import Gcloud
from tpu.watch import Watch
from tpu.workers import Job

MOUNT = "gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --implicit-dirs"
# A run that writes into its folder what it was called with, in place of the supervisor.
RECORD = f"""exec {sys.executable} -c '
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--run_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "argv.json").write_text(json.dumps(words))' "$@"
"""
AWKWARD = "gs://my.bucket_1/a 'run'; $HOME `x` \"q\" ü/-x"


@pytest.fixture
def home(cloud: Cloud) -> Path:
    """A worker that is set up."""
    return set_up(cloud)


def set_up(cloud: Cloud) -> Path:
    python = cloud.home / "engram_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (cloud.home / "engram_jax" / "tpu").symlink_to(REPOSITORY / "tpu")
    python.write_text(f"#!/bin/sh\n{RECORD}")
    python.chmod(0o755)
    return cloud.home


def launch(cloud: Cloud, run_dir: str = "gs://bucket/r") -> tuple[int, str, str]:
    return cloud.run("launch", "mine", "engram_small", "--run-dir", run_dir)


def tools(cloud: Cloud) -> list[str]:
    return [call.split()[0] for call in cloud.worker_calls if not call.startswith("mountpoint")]


def test_the_run_gets_what_is_mounted_and_the_supervisor_the_address(cloud, home, trusting):
    cloud.has_vm()
    status, output, error = launch(cloud)
    assert status == 0, error
    assert f"mounted gs://bucket at {home}/buckets/bucket on " in output
    words = json.loads((cloud.folder / "buckets" / "bucket" / "r" / "argv.json").read_text())
    assert words[words.index("--run_dir") + 1] == f"{home}/buckets/bucket/r"
    assert words[words.index("--run-dir") + 1] == "gs://bucket/r"
    (mount,) = [call for call in cloud.worker_calls if call.startswith("gcsfuse")]
    assert mount.startswith(MOUNT) and mount.endswith(f" bucket {home}/buckets/bucket")
    assert stat.S_IMODE((home / ".engram_jax").stat().st_mode) == 0o700


def test_it_mounts_once(cloud, home, trusting):
    cloud.has_vm()
    assert [launch(cloud)[0] for _ in range(3)] == [0, 0, 0]
    assert tools(cloud) == ["fusermount", "gcsfuse"]


def test_names_with_odd_characters(cloud, home, trusting):
    cloud.has_vm()
    status, _, error = launch(cloud, AWKWARD + "/")
    assert status == 0, error
    bucket, _, folder = AWKWARD.removeprefix("gs://").partition("/")
    assert (cloud.folder / "buckets" / bucket / folder / "argv.json").exists()


def test_a_mount_that_is_stale_is_undone_first(cloud, home, trusting):
    cloud.has_vm()
    launch(cloud)
    cloud.loses_its_mount("bucket")
    (cloud.folder / "worker.log").unlink()
    status, _, error = launch(cloud)
    assert status == 0, error
    assert tools(cloud) == ["fusermount", "gcsfuse"]
    assert f"fusermount -u -z {home}/buckets/bucket" in cloud.worker_calls
    assert (cloud.folder / "mounts").read_text().strip() == f"{home}/buckets/bucket"


def test_a_mount_that_fails_is_one_message_and_nothing_is_launched(cloud, home, trusting):
    cloud.has_vm()
    (cloud.folder / "refuse").touch()
    status, _, error = launch(cloud)
    assert status == 1 and "unknown flag or 403" in error
    (message,) = [line for line in error.splitlines() if line.startswith("error: gs://bucket could not be mounted")]
    assert "roles/storage.objectUser" in message and "version 3" in message
    assert error.splitlines()[-1].startswith("error: mounting gs://bucket on mine failed")
    assert not any("tpu.supervise" in word for call in cloud.calls for word in call)


def test_without_gcsfuse(cloud, home, trusting):
    cloud.has_vm()
    cloud.lacks_gcsfuse()
    status, _, error = launch(cloud)
    assert status == 1 and "gs://bucket" in error and "python -m tpu setup NAME --install-gcsfuse" in error
    assert tools(cloud) == [] and not (home / "buckets").exists()


def test_a_path_is_not_mounted(cloud, home, trusting, tmp_path):
    cloud.has_vm()
    cloud.lacks_gcsfuse()
    assert launch(cloud, str(tmp_path / "r"))[0] == 0
    assert cloud.worker_calls == []


def test_set_up_says_what_installs_it_and_installs_it_on_request(cloud):
    def run(install: bool) -> str:
        lines = "set -eu; umask 077\n" + "\n".join(buckets.install_lines(install))
        done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True)
        assert done.returncode == 0
        return done.stderr

    assert run(install=False) == ""  # it is there
    cloud.lacks_gcsfuse()
    said = run(install=False)
    assert "setup --install-gcsfuse" in said and buckets.PAGE in said and cloud.worker_calls == []
    assert run(install=True) == ""
    root = [call.removeprefix("sudo ") for call in cloud.worker_calls if call.startswith("sudo")]
    assert sorted(root) == [
        "apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse",
        "apt-get update",
    ]
    assert run(install=False) == ""


def test_where_apt_has_none_it_says_where_the_steps_are(cloud):
    cloud.lacks_gcsfuse()
    (cloud.folder / "bin" / "sudo").write_text('#!/bin/sh\ncase "$*" in *install*) exit 100;; esac\n')
    done = subprocess.run(["sh", "-ec", "\n".join(buckets.install_lines(True))], capture_output=True, text=True)
    assert done.returncode == 1 and buckets.PAGE in done.stderr


def test_watch_mounts_again_and_installs_again_when_the_vm_was_recreated(cloud, home):
    cloud.on(" scp ")
    cloud.on("uv sync")
    running, finished = (STATUS_MARK + json.dumps({"state": state}) for state in ("running", "finished"))
    cloud.on("tpu-vm describe", stdout=json.dumps(vm()), times=2)
    cloud.on(r"ssh .*--status", stdout=STATUS_MARK + '{"state": "idle"}', times=1)
    cloud.on(r"ssh .*--status", stdout=running, times=1)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm(state="PREEMPTED")), times=1)
    cloud.on("tpu-vm describe", rc=1, stderr="ERROR: NOT_FOUND: Resource was not found", times=1)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm()))
    cloud.on(r"ssh .*--status", stdout=finished)
    looks = []

    def sleep(_: float) -> None:
        looks.append(len(cloud.called("create")))
        assert len(looks) < 10
        if len(cloud.called("delete")) == 1 and not looks[-1]:
            cloud.is_recreated()
            set_up(cloud)  # set-up itself is answered by a rule

    job = Job("engram_small", "gs://bucket/r")
    assert Watch(Gcloud(zone="z"), "mine", job, False, False, install_gcsfuse=True).run(60, sleep) == 0
    assert tools(cloud) == ["fusermount", "gcsfuse"] * 2
    (set_ups,) = [word for call in cloud.calls for word in call if "uv sync" in word]
    assert "apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse ||" in set_ups


def test_watch_does_not_wait_for_a_bucket_for_ever_while_the_slice_costs(cloud, home):
    cloud.has_vm()
    cloud.lacks_gcsfuse()
    cloud.on(r"ssh .*--status", stdout=STATUS_MARK + '{"state": "idle"}')
    sleeps: list[float] = []
    with pytest.raises(NotMounted, match="gs://bucket"):
        Watch(Gcloud(zone="z"), "mine", Job("engram_small", "gs://bucket/r"), False, False).run(60, sleeps.append)
    assert len(sleeps) == 4


def test_all_workers_are_mounted_before_any_is_started(cloud, home, trusting):
    cloud.has_vm(acceleratorType="v5p-16")
    launch(cloud)
    mount, start = cloud.called("ssh")
    assert mount[5] == start[5] == "--worker=all"
    assert mount[6] == f"--command={buckets.mount_command('bucket')}" and "tpu.supervise" in start[6]


def test_a_mount_command_is_sh(cloud):
    for command in (buckets.mount_command("my.bucket_1"), workers.set_up_command("x", True, True)):
        assert subprocess.run(["sh", "-n"], input=command, text=True).returncode == 0
