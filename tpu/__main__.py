"""Creates TPU slices on Google Cloud, runs training on them, and deletes them:  python -m tpu VERB ...

  types     print the accelerator types and their prices
  account   make a service account with the rights that a run needs, and no others
  create    ask for a slice, or several: on demand, --spot, --reserved, --queued
  wait      wait until the slice is ready
  setup     copy this checkout's commit to all workers and install the packages of uv.lock
  launch    start a run on all workers, under a supervisor that restarts it
  watch     launch, and create the slice again when it is preempted
  status    print state, age, preemptions and cost so far, of one slice or of all slices
  logs      print the output of a run
  ssh       open a shell on a worker
  tunnel    show TensorBoard of a run at localhost
  profile   trace a few seconds of the run, and copy the trace to this machine
  stop      stop the run after it has saved; the slice stays, and costs
  delete    delete the slice, after a question

python -m tpu VERB --help explains a verb. Every verb takes --dry-run: it prints the exact commands and runs none. Words
after a bare -- go to the run. README.md in this folder is the quick start.
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

# Options of create that are fields of a Slice, under the same names.
SHARED = ("spot", "reserved", "service_account", "runtime", "network", "subnetwork")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--project", help="Google Cloud project (default: the one that gcloud is set to)")
    common.add_argument("--zone", help="zone of the slice (default: the one that gcloud is set to)")
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

    verb("types", "Prints the accelerator types, their memory and their prices.", slice_name=False)

    make = verb(
        "account",
        "Makes a service account for runs. It may use the objects of one bucket, and write logs and metrics.",
        slice_name=False,
    )
    make.add_argument("--bucket", required=True, metavar="gs://BUCKET", help="the bucket with the run folders")
    make.add_argument("--name", default="engram-jax", help="the account's name (default: %(default)s)")

    make = verb("create", "Asks for a slice. Mistakes are reported before anything is created.")
    make.add_argument("--type", required=True, help="v5e-8, v5p-128, v6e-256, ...; python -m tpu types lists them")
    make.add_argument("--spot", action="store_true", help="cheaper; Google takes the slice away when others need it")
    make.add_argument("--reserved", action="store_true", help="from your project's reservation")
    make.add_argument("--queued", action="store_true", help="wait in line if no slice is free now")
    make.add_argument(
        "--slices", type=int, default=1, metavar="N", help="N slices that train together; implies --queued"
    )
    until = "leave the line after this time; implies --queued. Requests that watch repeats stay in line"
    make.add_argument("--valid-until", default="", metavar="6h", help=until)
    make.add_argument("--run-dir", default="", metavar="gs://...", help="first check that this folder is writable")
    make.add_argument(
        "--service-account", default="", metavar="EMAIL", help="account of the VMs; the verb account makes one"
    )
    make.add_argument("--runtime", default="", help="image of the VMs (default: depends on the type)")
    make.add_argument("--network", default="", help="VPC network (default: the network default)")
    make.add_argument("--subnetwork", default="", help="subnetwork of that network")

    wait = verb("wait", "Waits until the slice is ready; fails if it cannot become ready.")
    wait.add_argument(
        "--every", type=float, default=30, metavar="SECONDS", help="seconds between checks (default: %(default)g)"
    )
    wait.add_argument("--minutes", type=float, default=0, help="give up after this many minutes (default: no limit)")

    setup = verb(
        "setup",
        "Copies this checkout's commit to all workers, and installs uv and the packages of uv.lock, without root.",
    )
    setup.add_argument(
        "--hugepages",
        action="store_true",
        help="switch transparent hugepages on (with sudo); libtpu asks for them on v5e and newer",
    )
    install = "install gcsfuse where it is missing (with sudo and apt); a run folder in a bucket needs it"
    setup.add_argument(FLAG, action="store_true", help=install)

    for name, help in (
        ("launch", "Starts a run on all workers, under a supervisor. The same command again resumes the run."),
        (
            "watch",
            "Launches a run and stays: asks for a preempted slice again, sets it up, and launches the run again.",
        ),
    ):
        run = verb(name, help)
        run.usage = f"python -m tpu {name} NAME RUN --run-dir gs://... [options] [-- --field value ...]"
        run.add_argument("run", metavar="RUN", help="name of the run: python -m experiments.run --list")
        run.add_argument("--run-dir", required=True, metavar="gs://...", help="folder for checkpoints and metrics")
        run.add_argument(
            "--secrets",
            default="",
            metavar="FILE",
            help="file of NAME=value lines for the run's environment; its mode must be 600",
        )
        run.add_argument("--libtpu-flags", action="store_true", help="set the compiler flags of tpu/flags.py")
        if name == "watch":
            run.add_argument(
                "--every",
                type=float,
                default=60,
                metavar="SECONDS",
                help="seconds between checks (default: %(default)g)",
            )
            run.add_argument(
                "--delete-when-done", action="store_true", help="delete the slice once the run has finished"
            )
            run.add_argument(FLAG, action="store_true", help=f"{install}. Done on every new slice")

    status = verb("status", "Prints state, age, preemptions and cost so far.", slice_name=False)
    status.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="",
        help="name of one slice: prints also its supervisors (default: all slices)",
    )
    status.add_argument("--price", type=float, help="dollars per chip-hour that you pay (default: list price)")

    logs = verb("logs", "Prints the output of the run on a worker.")
    logs.add_argument("--worker", default="0", metavar="N", help="number of the worker, or all (default: %(default)s)")
    logs.add_argument("--lines", type=int, default=50, help="number of lines, from the end (default: %(default)s)")
    logs.add_argument("--follow", action="store_true", help="print new lines too, until Ctrl-C")

    ssh = verb("ssh", "Opens a shell on a worker.")
    ssh.add_argument("--worker", default="0", metavar="N", help="number of the worker (default: %(default)s)")

    tunnel = verb("tunnel", "Starts TensorBoard of a run on worker 0, and shows it at localhost.")
    tunnel.add_argument("--run-dir", required=True, metavar="gs://...", help="the run's folder")
    tunnel.add_argument(
        "--port", type=int, default=6006, help="port on this machine and on the worker (default: %(default)s)"
    )

    profile = verb("profile", "Traces a few seconds of the run on worker 0, and copies the trace to this machine.")
    profile.add_argument("--seconds", type=int, default=5, help="seconds to trace, 1 to 60 (default: %(default)s)")
    below = "folder on this machine; each trace gets a new folder in it (default: %(default)s)"
    profile.add_argument("--to", default="profiles", metavar="DIR", help=below)

    verb("stop", "Stops the run on all workers after it has saved. The slice stays, and costs.")
    delete = verb("delete", "Deletes a slice that python -m tpu made, after a question.")
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
    """Runs the command line; returns the exit status: 2 after a mistake in the arguments, 1 if the cloud refuses."""
    words = list(arguments)
    bare = words.index("--") if "--" in words else len(words)
    ours, overrides = words[:bare], words[bare + 1 :]
    # Options of runs are written with underscores, options of gcloud with dashes. Here both spellings work.
    for i, word in enumerate(ours):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            ours[i] = flag.replace("_", "-") + equals + value
    try:
        options = parser().parse_args(ours or ["--help"])
        if overrides and options.verb not in ("launch", "watch"):
            raise TpuError(f"{options.verb} takes no words after --, but got: {shlex.join(overrides)}")
        return run(options, overrides) or 0
    except TpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CloudError) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
