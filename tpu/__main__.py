"""Runs on Cloud TPU, from nothing to deleted:  python -m tpu VERB ...

  types     the accelerator types, and what they cost
  account   make a service account that may do what a run needs, and nothing else
  create    ask for a slice, or several: on demand, --spot, --reserved, --queued
  wait      until it is there
  setup     ship this checkout's commit to all workers and install what uv.lock pins
  launch    start a run on all workers, under a supervisor that restarts it
  watch     launch, and bring the whole slice back when it is preempted
  status    state, age, preemptions and cost so far, of one slice or of all
  logs      what a worker's run prints
  ssh       a shell on a worker
  tunnel    TensorBoard of a run, at localhost
  profile   trace a few seconds of the run, and copy the trace here
  stop      let the run save and stop; the slice stays, and costs
  delete    delete the slice: says what, and asks

VERB --help says more; every verb takes --dry-run, which prints the exact commands and runs none. What comes after a
bare -- goes to the run. README.md in this folder is the quick start.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from tpu import accelerators, cloud, work
from tpu.buckets import FLAG
from tpu.errors import CloudError, TpuError
from tpu.gcloud import Gcloud
from tpu.slices import Slice
from tpu.watch import Watch

# Options of create that a slice has under the same name.
SHARED = ("spot", "reserved", "service_account", "runtime", "network", "subnetwork")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--project", help="Google Cloud project (default: gcloud's own setting)")
    common.add_argument("--zone", help="zone of the slice (default: gcloud's own setting)")
    common.add_argument("--dry-run", action="store_true", help="print the commands instead of running them")
    whole = argparse.ArgumentParser(
        prog="python -m tpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str, slice_name: bool = True) -> argparse.ArgumentParser:
        parts = verbs.add_parser(name, parents=[common], description=help, allow_abbrev=False)
        if slice_name:
            parts.add_argument("name", metavar="NAME", help="name of the slice")
        return parts

    verb("types", "The accelerator types, what they hold and what they cost.", slice_name=False)

    make = verb("account", "Makes a service account for runs: objects of one bucket, logs, metrics.", slice_name=False)
    make.add_argument("--bucket", required=True, metavar="gs://BUCKET", help="the bucket with the run folders")
    make.add_argument("--name", default="engram-jax", help="the account's name (default: %(default)s)")

    make = verb("create", "Asks for a slice. What is wrong is said before anything is created.")
    make.add_argument("--type", required=True, help="v5e-8, v5p-128, v6e-256, ...; python -m tpu types lists them")
    make.add_argument("--spot", action="store_true", help="cheaper; taken away when others need it")
    make.add_argument("--reserved", action="store_true", help="from your project's reservation")
    make.add_argument("--queued", action="store_true", help="wait in line, rather than fail if nothing is free now")
    make.add_argument("--slices", type=int, default=1, metavar="N", help="so many slices that train together (queued)")
    until = "leave the line after so long (queued); what watch asks for again stays in line"
    make.add_argument("--valid-until", default="", metavar="6h", help=until)
    make.add_argument("--run-dir", default="", metavar="gs://...", help="check that this can be written, first")
    make.add_argument("--service-account", default="", metavar="EMAIL", help="what the VMs act as; see: account")
    make.add_argument("--runtime", default="", help="image of the VMs (default: the one for the type)")
    make.add_argument("--network", default="", help="VPC network, if not default")
    make.add_argument("--subnetwork", default="", help="subnetwork of it")

    wait = verb("wait", "Waits until the slice can be used; fails if it never will.")
    wait.add_argument("--every", type=float, default=30, metavar="SECONDS", help="between looks (default: %(default)g)")
    wait.add_argument("--minutes", type=float, default=0, help="give up after so many (default: no limit)")

    setup = verb(
        "setup", "Ships this checkout's commit to all workers, and installs uv and what uv.lock pins, as user."
    )
    setup.add_argument(
        "--hugepages",
        action="store_true",
        help="switch transparent hugepages on (sudo): libtpu asks for them on v5e and newer",
    )
    install = "install gcsfuse where it is missing (sudo, apt): a run folder in a bucket needs it"
    setup.add_argument(FLAG, action="store_true", help=install)

    for name, help in (
        ("launch", "Starts a run on all workers, under a supervisor; the same command again resumes."),
        ("watch", "Launches, and stays: a slice that is preempted is asked for again, set up, and launched on."),
    ):
        run = verb(name, help)
        run.usage = f"python -m tpu {name} NAME RUN --run-dir gs://... [options] [-- --field value ...]"
        run.add_argument("run", metavar="RUN", help="name of the run: python -m experiments.run --list")
        run.add_argument("--run-dir", required=True, metavar="gs://...", help="where checkpoints and metrics go")
        run.add_argument(
            "--secrets", default="", metavar="FILE", help="NAME=value lines for the run's environment; mode 600"
        )
        run.add_argument("--libtpu-flags", action="store_true", help="the compiler flags of tpu/flags.py")
        if name == "watch":
            run.add_argument(
                "--every", type=float, default=60, metavar="SECONDS", help="between looks (default: %(default)g)"
            )
            run.add_argument(
                "--delete-when-done", action="store_true", help="delete the slice once the run has finished"
            )
            run.add_argument(FLAG, action="store_true", help=f"{install}; on every new slice")

    status = verb("status", "State, age, preemptions and cost so far.", slice_name=False)
    status.add_argument(
        "name", metavar="NAME", nargs="?", default="", help="one slice, and its supervisors (default: all)"
    )
    status.add_argument("--price", type=float, help="dollars per chip-hour that you pay (default: list price)")

    logs = verb("logs", "What a worker's run prints.")
    logs.add_argument("--worker", default="0", metavar="N", help="number of the worker, or all (default: %(default)s)")
    logs.add_argument("--lines", type=int, default=50, help="so many from the end (default: %(default)s)")
    logs.add_argument("--follow", action="store_true", help="and what comes, until Ctrl-C")

    ssh = verb("ssh", "A shell on a worker.")
    ssh.add_argument("--worker", default="0", metavar="N", help="number of the worker (default: %(default)s)")

    tunnel = verb("tunnel", "TensorBoard of a run, on worker 0, at localhost here.")
    tunnel.add_argument("--run-dir", required=True, metavar="gs://...", help="the run's folder")
    tunnel.add_argument("--port", type=int, default=6006, help="here and there (default: %(default)s)")

    profile = verb("profile", "Traces a few seconds of the run on worker 0, and copies the trace here.")
    profile.add_argument("--seconds", type=int, default=5, help="how long (default: %(default)s)")
    below = "each trace goes into a new folder below it (default: %(default)s)"
    profile.add_argument("--to", default="profiles", metavar="DIR", help=below)

    verb("stop", "Lets the run save and stop, on all workers. The slice stays, and costs.")
    delete = verb("delete", "Deletes the slice, if python -m tpu made it: says what, and asks.")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    return whole


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int | None:
    o, gcloud = options, Gcloud(options.project, options.zone, options.dry_run)
    match o.verb:
        case "types":
            print(accelerators.table())
        case "account":
            cloud.account(gcloud, o.bucket, o.name)
        case "create":
            wanted = Slice(
                name=o.name,
                type=accelerators.parse_type(o.type),
                queued=o.queued or o.slices > 1 or bool(o.valid_until),
                count=o.slices,
                **{field: getattr(o, field) for field in SHARED},
            )
            cloud.create(gcloud, wanted, o.run_dir, o.valid_until)
        case "wait":
            cloud.wait(gcloud, o.name, o.every, o.minutes)
        case "setup":
            work.setup(gcloud, o.name, o.hugepages, o.install_gcsfuse)
        case "launch":
            work.launch(gcloud, o.name, work.job(gcloud, o.run, o.run_dir, overrides, o.secrets), o.libtpu_flags)
        case "watch":
            job = work.job(gcloud, o.run, o.run_dir, overrides, o.secrets)
            return Watch(gcloud, o.name, job, o.libtpu_flags, o.delete_when_done, o.install_gcsfuse).run(o.every)
        case "status":
            work.status(gcloud, o.name, o.price)
        case "logs":
            work.logs(gcloud, o.name, o.worker, o.lines, o.follow)
        case "ssh":
            return work.ssh(gcloud, o.name, o.worker)
        case "tunnel":
            return work.tunnel(gcloud, o.name, o.run_dir, o.port)
        case "profile":
            work.profile(gcloud, o.name, o.seconds, o.to)
        case "stop":
            work.stop(gcloud, o.name)
        case "delete":
            cloud.delete(gcloud, o.name, o.yes)
    return None


def main(arguments: Sequence[str]) -> int:
    """Does what the command line says; returns the exit status: 2 after a mistake in it, 1 if the cloud refuses."""
    words = list(arguments)
    bare = words.index("--") if "--" in words else len(words)
    ours, overrides = words[:bare], words[bare + 1 :]
    # The runs' options are written with underscores, gcloud's with dashes: here both are.
    for i, word in enumerate(ours):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            ours[i] = flag.replace("_", "-") + equals + value
    try:
        options = parser().parse_args(ours or ["--help"])
        if overrides and options.verb not in ("launch", "watch"):
            raise TpuError(f"{options.verb} takes nothing behind --: {shlex.join(overrides)}")
        return run(options, overrides) or 0
    except TpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CloudError) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
