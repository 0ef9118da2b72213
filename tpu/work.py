"""The verbs that set up a slice, start a run on it and show the run."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tpu import cloud, flags, slices, workers
from tpu.checks import check_name, check_run, check_run_dir, check_secrets, check_writable
from tpu.errors import CloudError, TpuError
from tpu.gcloud import Gcloud
from tpu.slices import Slice
from tpu.workers import Job


def ready(gcloud: Gcloud, name: str) -> Slice:
    found = slices.find(gcloud, check_name(name))
    if not found.ready:
        raise CloudError(f"{name} is {found.state}, not ready. First run: python -m tpu wait {name}")
    return found


def setup(gcloud: Gcloud, name: str, hugepages: bool, install_gcsfuse: bool) -> None:
    head = workers.commit()
    workers.set_up(gcloud, ready(gcloud, name), head, hugepages, install_gcsfuse)


def job(gcloud: Gcloud, run: str, run_dir: str, overrides: Sequence[str], secrets: str) -> Job:
    """The job, after every check that this machine can do.

    Raises:
      TpuError: a setting, the bucket or the file of secrets is wrong.
    """
    check_run_dir(run_dir)
    file = check_secrets(secrets) if secrets else None
    check_run(run, overrides)
    check_writable(gcloud, run_dir)
    return Job(run, run_dir, tuple(overrides), file)


def launch(gcloud: Gcloud, name: str, wanted: Job, libtpu_flags: bool) -> None:
    found = ready(gcloud, name)
    workers.start(gcloud, found, with_flags(wanted, found, libtpu_flags))


def with_flags(wanted: Job, found: Slice, libtpu_flags: bool) -> Job:
    if not libtpu_flags or found.type is None:
        return wanted
    return Job(
        wanted.run, wanted.run_dir, wanted.overrides, wanted.secrets, flags.libtpu_init_args(found.type.generation)
    )


def stop(gcloud: Gcloud, name: str) -> None:
    workers.on_workers(gcloud, ready(gcloud, name), workers.stop_command(), "stop")


def logs(gcloud: Gcloud, name: str, worker: str, lines: int, follow: bool) -> None:
    if worker != "all" and not worker.isdigit():
        raise TpuError(f"--worker {worker!r} must be a number, or all.")
    command = workers.log_command(lines, follow)
    status = gcloud.hand_over(*slices.ssh(ready(gcloud, name), command, worker))
    if status not in (0, 130):  # 130: Ctrl-C, which ends --follow
        raise CloudError(f"{name} has no log (status {status}). Start a run first: python -m tpu launch {name} ...")


def status(gcloud: Gcloud, name: str, price: float | None) -> None:
    """Prints the table of slices; for a single slice also the states of its supervisors."""
    found = [slices.find(gcloud, check_name(name))] if name else slices.list_all(gcloud)
    if not gcloud.dry_run:
        print(cloud.table(found, price, gcloud.zone))
    if not name or not found[0].ready:
        return
    for answer in workers.statuses(gcloud, found[0]):
        about = f"{answer['restarts']} restarts, {answer['run_dir']}" if "run_dir" in answer else ""
        print(f"supervisor: {answer.get('state')}  {about}  {answer.get('last_line', '')}".rstrip())


def ssh(gcloud: Gcloud, name: str, worker: str) -> int:
    return gcloud.hand_over(*slices.ssh(ready(gcloud, name), workers=worker))


def tunnel(gcloud: Gcloud, name: str, run_dir: str, port: int) -> int:
    """Runs TensorBoard on worker 0 and forwards it to localhost:PORT. Ctrl-C ends both."""
    check_run_dir(run_dir)
    found = ready(gcloud, name)
    print(f"TensorBoard starts at http://localhost:{port}. Ctrl-C ends it.", file=sys.stderr)
    command = workers.tensorboard_command(run_dir, port)
    return gcloud.hand_over(*slices.ssh(found, command, "0", workers.tunnel(port)))


def profile(gcloud: Gcloud, name: str, seconds: int, to: str) -> None:
    """Traces worker 0 and copies the trace to this machine, into a new folder, so that it replaces no other trace."""
    if not 1 <= seconds <= 60:
        raise TpuError(f"--seconds {seconds} must be 1 to 60: a few steps are enough, and traces are large.")
    found, now = ready(gcloud, name), datetime.datetime.now(datetime.UTC)
    target = Path(to).expanduser().absolute() / f"{name}-{now:%Y%m%dT%H%M%SZ}"
    workers.on_workers(gcloud, found, workers.profile_command(seconds), "profile", "0")
    if not gcloud.dry_run:
        target.parent.mkdir(parents=True, exist_ok=True)
    words = slices.scp(found, f"{name}:~/.engram_jax/profile", str(target), "0")
    workers.hand_over(gcloud, [*words, "--recurse"], f"copying the trace to {target}")
    print(f"To see the trace: uvx --with xprof tensorboard --logdir {shlex.quote(str(target))}", file=sys.stderr)
