"""setup, launch, stop, logs, ssh, tunnel, profile: what reaches the workers' shells, and what they do with it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tpu_fakes import Cloud

from tpu import workers
from tpu.checks import REPOSITORY

AWKWARD = ["--data.corpus", '/my books/it\'s; rm -rf $HOME `x` "q" *.txt', "--name=a  b", "", "ü\n2"]
RUN_DIR = "gs://bucket/a 'run'; here"


def worker(cloud: Cloud, python: str) -> Path:
    """A worker's home with a commit set up, its Python replaced by the shell script `python`."""
    file = cloud.home / "engram_jax" / ".venv" / "bin" / "python"
    file.parent.mkdir(parents=True)
    (cloud.home / "engram_jax" / "tpu").symlink_to(REPOSITORY / "tpu")
    file.write_text(f"#!/bin/sh\n{python}\n")
    file.chmod(0o755)
    return cloud.home


RECORD = f"""exec {sys.executable} -c 'import json, sys; json.dump(sys.argv[1:], open("argv.json", "w"))' "$@" """
# The supervisor is the real one; the run is a stand-in that says so.
STAND_IN = (
    f"""if [ "$2" = tpu.child ]; then echo "token $WANDB_API_KEY, run $3"; exit 0; fi; exec {sys.executable} "$@" """
)


def test_what_the_user_writes_reaches_the_run_unchanged(cloud, trusting):
    home = worker(cloud, RECORD)
    cloud.has_vm()
    assert cloud.run("launch", "mine", "engram_small", "--run-dir", RUN_DIR, "--", *AWKWARD)[0] == 0
    python = ".venv/bin/python"
    assert json.loads((home / "engram_jax" / "argv.json").read_text()) == [
        *["-m", "tpu.supervise", "--run-dir", RUN_DIR, "--", python, "-m", "tpu.child"],
        *["engram_small", "--run_dir", f"{home}/buckets/bucket/a 'run'; here", *AWKWARD],
    ]


def test_launch_supervises_and_refuses_a_second_one(cloud, trusting, tmp_path):
    home = worker(cloud, STAND_IN.replace("exit 0", "sleep 30"))
    cloud.has_vm()
    launch = ["launch", "mine", "engram_small", "--run-dir", str(tmp_path / "r")]
    status, output, _ = cloud.run(*launch)
    assert status == 0 and "started under supervisor" in output
    status, _, error = cloud.run(*launch)
    assert status == 1 and "a run is going on here already" in error
    assert "supervisor: running" in cloud.run("status", "mine")[1]
    assert cloud.run("stop", "mine")[0] == 0
    assert "supervisor: stopped" in cloud.run("status", "mine")[1]
    assert "run engram_small" in (home / ".engram_jax" / "run.log").read_text()
    assert "run engram_small" in cloud.run("logs", "mine")[1]


def test_secrets_reach_the_run_and_nothing_else(cloud, trusting, tmp_path):
    home = worker(cloud, STAND_IN)
    cloud.has_vm()
    secrets = tmp_path / "my secrets.env"
    secrets.write_text("# for wandb\nWANDB_API_KEY=s3cret=;'\n")
    launch = ["launch", "mine", "engram_small", "--run-dir", str(tmp_path / "r"), "--secrets", str(secrets)]
    secrets.chmod(0o644)
    status, _, error = cloud.run(*launch)
    assert status == 2 and "chmod 600" in error and cloud.calls == []
    secrets.chmod(0o600)
    status, output, error = cloud.run(*launch)
    assert status == 0
    wait_for(home, "finished")
    log = (home / ".engram_jax" / "run.log").read_text()
    assert "token ***, run engram_small" in log
    assert "s3cret" not in log + output + error + str(cloud.calls)
    assert (home / ".engram_jax").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("line", ["no equals sign", "2x=1"])
def test_a_line_of_secrets_that_is_none_is_not_shown(cloud, trusting, tmp_path, line):
    secrets = tmp_path / "s"
    secrets.write_text(f"A=1\n{line}\n")
    secrets.chmod(0o600)
    status, _, error = cloud.run("launch", "mine", "x", "--run-dir", "gs://bucket/r", "--secrets", str(secrets))
    assert status == 2 and "line 2" in error and line not in error and cloud.calls == []


def wait_for(home: Path, state: str) -> None:
    for _ in range(100):
        file = home / ".engram_jax" / "state.json"
        if file.exists() and json.loads(file.read_text())["state"] == state:
            return
        time.sleep(0.05)
    raise AssertionError((home / ".engram_jax" / "run.log").read_text())


def test_a_wrong_setting_is_found_here(cloud, monkeypatch):
    # This one starts the run command itself, so it needs the machine's own PATH no more than a Python.
    cloud.has_vm()
    run = ["--run-dir", "gs://bucket/r", "--"]
    status, _, error = cloud.run("launch", "mine", "engram_smal", *run)
    assert status == 2 and "the nearest is 'engram_small'" in error
    status, _, error = cloud.run("launch", "mine", "engram_small", *run, "--train.step", "5")
    assert status == 2 and "--train.steps" in error
    assert cloud.calls == []


def test_a_bucket_is_tried_before_the_launch(cloud, trusting):
    cloud.on("storage cp", rc=1, stderr="ERROR: gs://bucket not found: 404.")
    status, _, error = cloud.run("launch", "mine", "engram_small", "--run-dir", "gs://bucket/r")
    assert status == 2 and "gcloud storage buckets create gs://bucket" in error and len(cloud.calls) == 1


def test_nothing_is_launched_on_what_is_not_ready(cloud, trusting):
    cloud.has_queued(state="WAITING_FOR_RESOURCES")
    status, _, error = cloud.run("launch", "mine", "engram_small", "--run-dir", "/r")
    assert status == 1 and "python -m tpu wait mine" in error and not cloud.called("ssh")


def test_a_launch_that_fails_on_a_worker(cloud, trusting):
    cloud.has_vm()  # but nothing was set up there
    status, _, error = cloud.run("launch", "mine", "engram_small", "--run-dir", "/r")
    assert status == 1 and "launch on mine failed" in error


def test_several_slices_are_addressed_as_one(cloud, trusting):
    worker(cloud, RECORD)
    cloud.has_queued(count=2)
    cloud.run("launch", "mine", "engram_small", "--run-dir", "/r", "--zone", "z")
    (ssh,) = cloud.called("ssh")
    assert ssh[:6] == ["compute", "tpus", "queued-resources", "ssh", "mine", "--node=all"]
    assert ssh[6] == "--worker=all" and ssh[-1] == "--zone=z"
    cloud.run("logs", "mine", "--worker", "0")
    assert cloud.called("ssh")[-1][5:7] == ["--node=0", "--worker=0"]


def test_compiler_flags_only_on_request(cloud, trusting):
    worker(cloud, f"exec {sys.executable} -c 'import os; print(os.environ.get(\"LIBTPU_INIT_ARGS\"))'")
    cloud.has_vm(acceleratorType="v6e-8")
    launch = ["launch", "mine", "engram_small", "--run-dir", "/r"]
    assert cloud.run(*launch)[1].strip() == "None"
    assert "sparse_core" in cloud.run(*launch, "--libtpu-flags")[1]


def test_set_up_ships_the_commit_and_installs_the_lock_file(cloud):
    cloud.has_vm()
    uv = cloud.home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    python = '.venv/bin/python; mkdir -p .venv/bin; printf "#!/bin/sh\\necho set up\\n" > $P; chmod +x $P'
    uv.write_text(f'#!/bin/sh\nP={python}\nif [ "$1" = --version ]; then echo "uv {workers.UV_VERSION} (x)"; fi\n'
                  'echo "uv $*" >> "$HOME"/uv.log\n')  # fmt: skip
    uv.chmod(0o755)
    status, output, error = cloud.run("setup", "mine")
    assert status == 0, error
    head = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (cloud.home / "engram_jax").resolve().name == f"engram_jax-{head[:12]}"
    assert (cloud.home / "engram_jax" / "uv.lock").exists()
    assert (cloud.home / "uv.log").read_text().splitlines() == ["uv --version", "uv sync --frozen --extra tpu"]
    assert "set up" in output and cloud.worker_calls == []
    assert [path.name for path in cloud.home.iterdir() if path.suffix == ".gz"] == []
    cloud.run("setup", "mine", "--dry-run", "--hugepages")
    assert cloud.run("setup", "mine")[0] == 0  # again, over what is there


def test_set_up_asks_for_root_only_when_told_to(cloud):
    def as_root(**flags: bool) -> list[str]:
        """What a worker on which nothing else is to be done does."""
        lines = workers.set_up_command("x", **flags).partition("jax.__version__)'\n")[2]
        assert subprocess.run(["sh", "-euc", lines]).returncode == 0
        calls = [call for call in cloud.worker_calls if call.startswith("sudo")]
        (cloud.folder / "worker.log").unlink(missing_ok=True)
        return calls

    cloud.lacks_gcsfuse()
    assert as_root(hugepages=False) == []
    assert [call.split()[1] for call in as_root(hugepages=True)] == ["sh"]
    assert [call.split()[1] for call in as_root(hugepages=False, install_gcsfuse=True)] == ["apt-get", "apt-get"]
    assert as_root(hugepages=False, install_gcsfuse=True) == []  # it is there


def test_ssh_and_tunnel(cloud):
    cloud.has_vm()
    cloud.on(" ssh ", rc=3)
    assert cloud.run("ssh", "mine", "--worker", "1", "--zone", "z")[0] == 3
    assert cloud.calls[-1] == ["compute", "tpus", "tpu-vm", "ssh", "mine", "--worker=1", "--zone=z"]
    cloud.run("tunnel", "mine", "--run-dir", RUN_DIR, "--port", "7007", "--zone", "z")
    *_, command, terminal, forward, zone = cloud.calls[-1]
    assert (terminal, forward, zone) == ("--ssh-flag=-t -t", "--ssh-flag=-L 7007:localhost:7007", "--zone=z")
    command = command.removeprefix("--command=")
    uv = cloud.home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\nfor word; do :; done; echo "$word"\n')
    uv.chmod(0o755)

    def read() -> str:
        environment = {**os.environ, "HOME": str(cloud.home)}
        return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True).stdout.strip()

    assert read() == RUN_DIR
    mounted = cloud.home / "buckets" / RUN_DIR.removeprefix("gs://")
    mounted.mkdir(parents=True)
    assert read() == str(mounted)  # which has what the run has not closed yet


def test_profile_copies_the_trace_here(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker(cloud, RECORD)
    cloud.has_vm()
    cloud.on(" scp ")
    assert cloud.run("profile", "mine", "--seconds", "3", "--to", "my traces")[0] == 0
    assert json.loads((cloud.home / "engram_jax" / "argv.json").read_text()) == ["-m", "tpu.child", "--profile", "3"]
    *words, target, worker_0, recurse = cloud.calls[-1][3:]
    assert [*words, worker_0, recurse] == ["scp", "mine:~/.engram_jax/profile", "--worker=0", "--recurse"]
    assert Path(target).parent == tmp_path / "my traces" and re.fullmatch(r"mine-\d{8}T\d{6}Z", Path(target).name)
    assert cloud.run("profile", "mine", "--seconds", "600")[0] == 2


def test_profile_leaves_alone_what_has_the_slices_name(cloud, tmp_path):
    worker(cloud, RECORD)
    cloud.has_vm()
    cloud.on(" scp ")
    run = tmp_path / "runs" / "mine" / "metrics.jsonl"
    run.parent.mkdir(parents=True)
    run.write_text("{}\n")
    assert cloud.run("profile", "mine", "--to", str(tmp_path / "runs"))[0] == 0
    assert run.read_text() == "{}\n" and str(run.parent) not in cloud.calls[-1]


@pytest.mark.parametrize("verb", ["setup", "profile", "stop"])
def test_ctrl_c_is_no_failure(cloud, tmp_path, verb):
    cloud.has_vm()
    cloud.on(r" scp |--stop|uv sync", rc=130)
    cloud.on("--profile")
    status, _, error = cloud.run(verb, "mine", *(["--to", str(tmp_path)] if verb == "profile" else []))
    assert status == 130 and "error" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["account", "--project", "p", "--bucket", "gs://bucket"],
        ["create", "mine", "--type", "v5e-8", "--run-dir", RUN_DIR],
        ["wait", "mine"],
        ["setup", "mine"],
        ["launch", "mine", "engram_small", "--run-dir", RUN_DIR, "--", *AWKWARD],
        ["watch", "mine", "engram_small", "--run-dir", RUN_DIR, "--", *AWKWARD],
        ["status"],
        ["status", "mine"],
        ["logs", "mine"],
        ["ssh", "mine"],
        ["tunnel", "mine", "--run-dir", RUN_DIR],
        ["profile", "mine"],
        ["stop", "mine"],
        ["delete", "mine"],
    ],
)
def test_a_dry_run_prints_commands_that_a_shell_takes_and_runs_none(cloud, trusting, arguments):
    bare = arguments.index("--") if "--" in arguments else len(arguments)
    status, output, _ = cloud.run(*arguments[:bare], "--dry-run", *arguments[bare:])
    assert status == 0 and cloud.calls == []
    printed = shlex.split(output, comments=True)
    assert "gcloud" in printed and set(arguments[1:2]) <= {w.removeprefix("--bucket=") for w in printed} | {"--project"}
    assert subprocess.run(["sh", "-n"], input=output, text=True).returncode == 0


def test_what_a_dry_run_prints_is_what_is_run(cloud, trusting):
    worker(cloud, RECORD)
    cloud.has_vm()
    launch = ["launch", "mine", "engram_small", "--run-dir", RUN_DIR, "--zone", "z", "--", *AWKWARD]
    assert cloud.run(*launch)[0] == 0
    real = [call for call in cloud.calls if "queued-resources" not in call]
    printed = cloud.run(*launch[:7], "--dry-run", *launch[7:])[1]
    (cloud.folder / "calls.jsonl").unlink()
    subprocess.run(["sh"], input=printed, text=True, capture_output=True)
    assert [call for call in cloud.calls if "queued-resources" not in call] == real
