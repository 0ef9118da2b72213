"""Mounts a bucket on the workers: gs://BUCKET/FOLDER becomes a folder in which the run can lock, append and rename.

The functions return lines for a worker's shell, as in workers.py. They are plain sh, because the mount is the first
thing that runs on a worker. Only `install_lines` needs root.
"""

from __future__ import annotations

import shlex

# Flags of gcsfuse 3. On TPU VMs gcsfuse caches the names of files for ever. Here every worker writes, so the first two
# flags switch these caches off. The other two are for buckets without a hierarchical namespace: there a folder exists
# only in the names of objects, and gcsfuse refuses to rename it object by object without these flags.
FLAGS = "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --implicit-dirs --rename-dir-limit=200000"

# apt uses the repositories of the image. If they lack gcsfuse, the page has Google's steps to add its repository.
PAGE = "https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
INSTALL = f"""\
sudo apt-get update
sudo apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse || {{
echo "error: apt finds no gcsfuse; add its repository (steps: {PAGE}), then run setup again" >&2; exit 1
}}"""
FLAG = "--install-gcsfuse"


def bucket_of(run_dir: str) -> str:
    """BUCKET of gs://BUCKET/FOLDER; empty for any other folder."""
    return run_dir.removeprefix("gs://").partition("/")[0] if run_dir.startswith("gs://") else ""


def on_worker(run_dir: str) -> str:
    """The folder as a word of the worker's shell; gs://BUCKET/FOLDER becomes ~/buckets/BUCKET/FOLDER."""
    if not bucket_of(run_dir):
        return shlex.quote(run_dir)
    return '"$HOME"/' + shlex.quote("buckets/" + run_dir.removeprefix("gs://").rstrip("/"))


def mount_command(bucket: str) -> str:
    """Mounts the bucket at ~/buckets/BUCKET, as the user, unless it is mounted there already."""
    missing = f"is missing. To install it (with sudo): python -m tpu setup NAME {FLAG}; watch takes {FLAG} too."
    failed = (
        "failed with the lines above. The VM's service account needs roles/storage.objectUser on the bucket (python -m "
        "tpu account), and gcsfuse must be version 3 or newer (gcsfuse --version)."
    )
    return f"""\
set -eu
at={on_worker(f"gs://{bucket}")}
mountpoint -q "$at" 2> /dev/null && test -e "$at"/. && exit 0
fail() {{ echo "error: gs://{bucket} could not be mounted at $at on $(hostname): gcsfuse $1" >&2; exit 1; }}
command -v gcsfuse > /dev/null || fail {shlex.quote(missing)}
# A dead gcsfuse leaves a path that is neither a folder nor a mount point. Without such a path this line fails.
fusermount -u -z "$at" 2> /dev/null || true
mkdir -p "$HOME"/.engram_jax "$at"
chmod 700 "$HOME"/.engram_jax
# The output goes to a file: gcsfuse stays alive, so a pipe would never end.
log="$HOME"/.engram_jax/gcsfuse.log
if ! gcsfuse {FLAGS} {shlex.quote(bucket)} "$at" < /dev/null > "$log" 2>&1; then
  tail -n 5 "$log" >&2
  fail {shlex.quote(failed)}
fi
echo "mounted gs://{bucket} at $at on $(hostname)\""""


def install_lines(install: bool) -> list[str]:
    """The lines of setup that install gcsfuse where it is missing, or say how to install it."""
    if install:
        return [f"command -v gcsfuse > /dev/null || (\n{INSTALL}\n)"]
    note = f"note: gcsfuse is missing; a --run-dir in a bucket needs it. setup {FLAG} installs it with apt; see {PAGE}"
    return [f"command -v gcsfuse > /dev/null || echo {shlex.quote(note)} >&2"]
