"""What a user may get wrong, found before anything is created."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tpu.buckets import bucket_of
from tpu.errors import CloudError, TpuError
from tpu.gcloud import Gcloud

REPOSITORY = Path(__file__).resolve().parent.parent

# Also a label's value and, with "-0", "-1", ... behind it, the name of a node: both end at 63 characters.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
PROBE = ".engram_jax_write_test"


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise TpuError(
            f"NAME {name!r}: use lower-case letters, digits and dashes, a letter first, no dash last, 50 at most."
        )
    return name


def check_word(flag: str, value: str, pattern: str, example: str) -> str:
    if not re.fullmatch(pattern, value):
        raise TpuError(f"{flag} {value!r} is not of the form {example}.")
    return value


def check_run_dir(run_dir: str) -> str:
    """Refuses folders that no checkpoint should go to; `check_writable` asks the bucket."""
    if run_dir.startswith("gs:"):
        if not BUCKET.fullmatch(run_dir):
            raise TpuError(f"--run-dir {run_dir!r} is not of the form gs://BUCKET/FOLDER.")
        if {"", ".", ".."} & set(run_dir.removeprefix("gs://").rstrip("/").split("/")):
            raise TpuError(f"--run-dir {run_dir!r}: it becomes a path, so no //, /./ or /../ in it.")
        if set(run_dir) & set("*?[]#\n\r"):  # gcloud storage reads these as wildcards, or cannot store them
            raise TpuError(f"--run-dir {run_dir!r}: no *, ?, [, ], # or line breaks in the name of a folder.")
    elif not run_dir.startswith("/"):
        raise TpuError(
            f"--run-dir {run_dir!r}: give gs://BUCKET/FOLDER, or an absolute path if losing it with the VM is fine."
        )
    return run_dir


def check_writable(gcloud: Gcloud, run_dir: str) -> None:
    """Writes and deletes a tiny object below `run_dir`, if that is a bucket, and warns if its folders are none.

    Raises:
      TpuError: it cannot be written, or not deleted.
    """
    if not run_dir.startswith("gs://"):
        return
    probe = f"{run_dir.rstrip('/')}/{PROBE}"
    try:
        gcloud.change("storage", "cp", "-", probe, zonal=False)
    except CloudError as error:
        region = (gcloud.zone or "REGION").rsplit("-", 1)[0]
        raise TpuError(
            f"--run-dir {run_dir}: cannot be written ({error}) Does the bucket exist (gcloud storage buckets create "
            f"gs://{bucket_of(run_dir)} --uniform-bucket-level-access --enable-hierarchical-namespace "
            f"--location={region}), and may you write to it?"
        ) from None
    try:
        gcloud.change("storage", "rm", probe, zonal=False)
    except CloudError as error:
        raise TpuError(
            f"--run-dir {run_dir}: can be written but not cleaned ({error}) "
            "Old checkpoints are deleted, so the role must allow it: roles/storage.objectUser."
        ) from None
    _warn_without_folders(gcloud, bucket_of(run_dir))


def _warn_without_folders(gcloud: Gcloud, bucket: str) -> None:
    """Says so if the bucket has no hierarchical namespace, which nobody can give it later."""
    try:
        # --raw: without it gcloud (SDK 528) leaves this field out.
        answer = gcloud.read("storage", "buckets", "describe", f"gs://{bucket}", "--raw", zonal=False)
    except CloudError:
        answer = None
    if gcloud.dry_run:
        return
    if not isinstance(answer, dict) or not answer:
        text = f"note: whether gs://{bucket} has a hierarchical namespace could not be seen (storage.buckets.get)."
    elif isinstance(folders := answer.get("hierarchicalNamespace"), dict) and folders.get("enabled") is True:
        return
    else:
        text = (
            f"warning: gs://{bucket} has no hierarchical namespace. A checkpoint becomes whole by renaming its folder; "
            "there that is many copies, slow and not atomic: cut short it leaves a part of one, and gcsfuse may refuse "
            "it. Buckets get the namespace at their creation only: gcloud storage buckets create "
            "--enable-hierarchical-namespace --uniform-bucket-level-access"
        )
    print(text, file=sys.stderr, flush=True)


def check_secrets(path: str) -> Path:
    """A file of NAME=value lines that only its owner can read."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise TpuError(f"--secrets {path}: no such file; it holds NAME=value lines, such as WANDB_API_KEY=...")
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TpuError(f"--secrets {path}: others can read it; first: chmod 600 {path}")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#") and not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line):
            raise TpuError(f"--secrets {path}, line {number}: not of the form NAME=value.")  # the line is not shown
    return file


def check_run(run: str, overrides: Sequence[str]) -> None:
    """Has the run command look at its arguments here, where a mistake costs nothing.

    Raises:
      TpuError: the run command refuses them.
    """
    words = [sys.executable, "-m", "experiments.run", run, *overrides, "--print"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        raise TpuError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        print("The run's settings were not checked here: this Python cannot import the project.", file=sys.stderr)
