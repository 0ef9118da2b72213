"""A bucket on the workers: gs://BUCKET/FOLDER becomes a folder that the run can lock, append to and rename in.

Lines for a worker's shell, as in workers.py, but of sh alone: a mount comes before all else. Only `install_lines` needs
root.
"""

from __future__ import annotations

import shlex

# Of gcsfuse 3. On TPU VMs it takes what it once knew of a file for true for ever, but here every worker writes: no
# caches of names. A bucket with folders of its own needs neither of the other two. In one without them, folders are
# what names of objects suggest, and are renamed object by object, which gcsfuse otherwise refuses.
FLAGS = "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --implicit-dirs --rename-dir-limit=200000"

# From the repositories that the image has. One without gcsfuse's needs Google's steps first, which the page has.
PAGE = "https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
INSTALL = f"""\
sudo apt-get update
sudo apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse || {{
echo "error: apt finds no gcsfuse here; add its repository as {PAGE} says, then set up again" >&2; exit 1
}}"""
FLAG = "--install-gcsfuse"


def bucket_of(run_dir: str) -> str:
    """BUCKET of gs://BUCKET/FOLDER; nothing if the folder is none of a bucket."""
    return run_dir.removeprefix("gs://").partition("/")[0] if run_dir.startswith("gs://") else ""


def on_worker(run_dir: str) -> str:
    """The folder as a word of the worker's shell; that of a bucket lies below where the bucket is mounted."""
    if not bucket_of(run_dir):
        return shlex.quote(run_dir)
    return '"$HOME"/' + shlex.quote("buckets/" + run_dir.removeprefix("gs://").rstrip("/"))


def mount_command(bucket: str) -> str:
    """Mounts the bucket at ~/buckets/BUCKET, as the user, unless it is mounted there already."""
    missing = f"is missing there. To install it (sudo): python -m tpu setup NAME {FLAG}; watch takes {FLAG} too."
    failed = (
        "gave the lines above. Remedies: the service account of the VM needs roles/storage.objectUser on the bucket "
        "(python -m tpu account), and gcsfuse has to be version 3 or newer (gcsfuse --version)."
    )
    return f"""\
set -eu
at={on_worker(f"gs://{bucket}")}
mountpoint -q "$at" 2> /dev/null && test -e "$at"/. && exit 0
fail() {{ echo "error: gs://{bucket} could not be mounted at $at on $(hostname): gcsfuse $1" >&2; exit 1; }}
command -v gcsfuse > /dev/null || fail {shlex.quote(missing)}
# A gcsfuse that has died leaves what is neither a folder nor a mount point; if there is no such thing, this fails.
fusermount -u -z "$at" 2> /dev/null || true
mkdir -p "$HOME"/.engram_jax "$at"
chmod 700 "$HOME"/.engram_jax
# Into a file: a pipe would not end before gcsfuse does, and it stays.
log="$HOME"/.engram_jax/gcsfuse.log
if ! gcsfuse {FLAGS} {shlex.quote(bucket)} "$at" < /dev/null > "$log" 2>&1; then
  tail -n 5 "$log" >&2
  fail {shlex.quote(failed)}
fi
echo "mounted gs://{bucket} at $at on $(hostname)\""""


def install_lines(install: bool) -> list[str]:
    """Of set-up: installs gcsfuse where it is missing, or says how to."""
    if install:
        return [f"command -v gcsfuse > /dev/null || (\n{INSTALL}\n)"]
    note = f"note: gcsfuse is missing; a --run-dir in a bucket needs it. setup {FLAG} installs it with apt; see {PAGE}"
    return [f"command -v gcsfuse > /dev/null || echo {shlex.quote(note)} >&2"]
