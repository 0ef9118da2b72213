"""Command lines for the shells of the workers, with every word of the user quoted, and the workers' answers.

On a worker, ~/engram_jax links to the folder of the commit that was set up last. ~/.engram_jax holds the supervisor's
files and the secrets; only its owner can read it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpu import STATUS_MARK, buckets, slices
from tpu.checks import REPOSITORY
from tpu.errors import CloudError, NotMounted, TpuError
from tpu.gcloud import Gcloud
from tpu.slices import Slice

UV_VERSION = "0.13.9"
PYTHON = ".venv/bin/python"
HERE = 'cd "$HOME"/engram_jax'


@dataclasses.dataclass(frozen=True)
class Job:
    """The run that `launch` and `watch` start."""

    run: str
    run_dir: str
    overrides: tuple[str, ...] = ()
    secrets: Path | None = None
    libtpu_flags: str = ""


def on_workers(gcloud: Gcloud, found: Slice, command: str, doing: str, workers: str = "all") -> None:
    """Runs a line of shell on the workers; the terminal shows their output.

    Raises:
      CloudError: the line failed on a worker.
    """
    hand_over(gcloud, slices.ssh(found, command, workers), f"{doing} on {found.name}")


def send(gcloud: Gcloud, found: Slice, source: str, target: str) -> None:
    hand_over(gcloud, slices.scp(found, source, f"{found.name}:{target}"), f"copying {source} to {found.name}")


def hand_over(gcloud: Gcloud, words: Sequence[str], doing: str) -> None:
    """Runs a gcloud command on the user's own terminal.

    Raises:
      CloudError: the command failed.
      KeyboardInterrupt: Ctrl-C ended it. This must end the verb; after a CloudError, `watch` would try again.
    """
    status = gcloud.hand_over(*words)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise CloudError(f"{doing} failed with status {status}. Its output is above.")


def commit(repository: Path = REPOSITORY) -> str:
    """The commit that setup copies to the workers: HEAD of this checkout.

    Raises:
      TpuError: the project is not in a git checkout.
    """
    try:
        head = _git(repository, "rev-parse", "HEAD")
        dirty = _git(repository, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        raise TpuError(f"{repository} is not a git checkout. Clone the project: setup copies a commit.") from None
    if dirty:
        print(
            f"note: {len(dirty.splitlines())} changed files are not copied to the workers. Commit them if needed.",
            file=sys.stderr,
        )
    return head


def _git(repository: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def set_up(gcloud: Gcloud, found: Slice, head: str, hugepages: bool = False, install_gcsfuse: bool = False) -> None:
    """Copies the commit to all workers and installs the packages of uv.lock, without root."""
    folder = f"engram_jax-{head[:12]}"
    with tempfile.TemporaryDirectory() as temporary:
        archive = str(Path(temporary) / f"{folder}.tar.gz")
        pack = ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", "-o", archive, head]
        if gcloud.dry_run:
            print(shlex.join(["mkdir", "-p", temporary]))
            gcloud.show(pack)
        else:
            subprocess.run(pack, check=True)
        send(gcloud, found, archive, f"{folder}.tar.gz")
    on_workers(gcloud, found, set_up_command(folder, hugepages, install_gcsfuse), "set-up")


def set_up_command(folder: str, hugepages: bool, install_gcsfuse: bool = False) -> str:
    uv = '"$HOME"/.local/bin/uv'
    lines = [
        "set -eu; umask 077",
        f'cd "$HOME"; mkdir -p .engram_jax {folder}; tar -xzf {folder}.tar.gz -C {folder}; rm {folder}.tar.gz',
        # uv goes into ~/.local/bin; the shell's start-up files stay as they are.
        f"{uv} --version 2>/dev/null | grep -qF 'uv {UV_VERSION} ' || curl -LsSf https://astral.sh/uv/{UV_VERSION}/install.sh"
        ' | env UV_INSTALL_DIR="$HOME"/.local/bin UV_NO_MODIFY_PATH=1 sh',
        f"cd {folder}; {uv} sync --frozen --extra tpu",
        f'ln -sfn {folder} "$HOME"/engram_jax',
        f'{PYTHON} -c \'import jax, socket; print("set up:", socket.gethostname(), "jax", jax.__version__)\'',
    ]
    # Only the following lines may need root.
    lines += buckets.install_lines(install_gcsfuse)
    if hugepages:
        lines.append("sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'")
    return "\n".join(lines)


def start(gcloud: Gcloud, found: Slice, job: Job) -> None:
    """Starts the job under a supervisor on every worker; returns when all supervisors have started.

    Raises:
      NotMounted: the bucket of the run folder could not be mounted; no worker was started.
      CloudError: a worker refused.
    """
    if bucket := buckets.bucket_of(job.run_dir):
        mount(gcloud, found, bucket)
    if job.secrets:
        # The folder is closed to other users before the file arrives, so they can never read the file.
        on_workers(gcloud, found, 'mkdir -p -m 700 "$HOME"/.engram_jax && chmod 700 "$HOME"/.engram_jax', "launch")
        send(gcloud, found, str(job.secrets), ".engram_jax/secrets.env")
    on_workers(gcloud, found, start_command(job), "launch")


def mount(gcloud: Gcloud, found: Slice, bucket: str) -> None:
    """Mounts the bucket on all workers, because they must begin together."""
    try:
        on_workers(gcloud, found, buckets.mount_command(bucket), f"mounting gs://{bucket}")
    except CloudError as error:
        raise NotMounted(str(error)) from None


def start_command(job: Job) -> str:
    """The line that starts the supervisor with the address of the run folder, and the run with its mounted path."""
    child = f"{PYTHON} -m tpu.child {shlex.quote(job.run)} --run_dir {buckets.on_worker(job.run_dir)}"
    supervisor = f"{PYTHON} -m tpu.supervise --run-dir {shlex.quote(job.run_dir)} --"
    flags = f"LIBTPU_INIT_ARGS={shlex.quote(job.libtpu_flags)} " if job.libtpu_flags else ""
    return f"{HERE} && {flags}{supervisor} {child} {shlex.join(job.overrides)}".rstrip(" ")


def stop_command() -> str:
    return f"{HERE} && {PYTHON} -m tpu.supervise --stop"


def log_command(lines: int, follow: bool) -> str:
    return f'tail -n {lines} {"-F " * follow}"$HOME"/.engram_jax/run.log'


def status_command() -> str:
    return f'{HERE} 2>/dev/null && {PYTHON} -m tpu.supervise --status || echo \'{STATUS_MARK}{{"state": "absent"}}\''


def statuses(gcloud: Gcloud, found: Slice) -> list[dict[str, Any]]:
    """The status of each worker's supervisor; its state is "absent" where nothing was set up.

    Raises:
      CloudError: a worker cannot be reached, or does not answer with a status.
    """
    output = gcloud.change(*slices.ssh(found, status_command()), seconds=gcloud.patience)
    lines = re.findall(rf"^.*{re.escape(STATUS_MARK)}(.*)$", output, re.MULTILINE)
    try:
        answers = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        raise CloudError(f"the workers of {found.name} did not answer with a status: {output[:200]!r}") from None
    if len(answers) < found.hosts and not gcloud.dry_run:
        raise CloudError(f"only {len(answers)} of {found.hosts} workers of {found.name} answered.")
    return answers


def tensorboard_command(run_dir: str, port: int) -> str:
    # TensorBoard has its own environment, so that the training's stays as uv.lock has it. gcsfs reads gs:// folders,
    # but a file is in the bucket only after the run has closed it. A mounted bucket shows it at once, and comes first.
    words = [
        "tool",
        "run",
        "--from",
        "tensorboard==2.20.0",
        "--with",
        "gcsfs",
        "--with",
        "setuptools<81",
        "tensorboard",
    ]
    words += ["--host", "localhost", "--port", str(port)]
    where = f'at={buckets.on_worker(run_dir)}; test -d "$at" || at={shlex.quote(run_dir)}'
    return f'{where}; "$HOME"/.local/bin/uv {shlex.join(words)} --logdir "$at"'


def profile_command(seconds: int) -> str:
    return f"{HERE} && {PYTHON} -m tpu.child --profile {seconds}"


def tunnel(port: int) -> list[str]:
    """Flags of ssh that forward the port and end TensorBoard when the tunnel closes."""
    return ["-t -t", f"-L {port}:localhost:{port}"]
