"""Checks of the user's arguments, before anything is created."""

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

# The name is also a label's value and, followed by "-0", "-1", ..., the name of a node. Both allow 63 characters.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
PROBE = ".engram_jax_write_test"


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise TpuError(
            f"NAME {name!r} is not valid. Use 1 to 50 lower-case letters, digits and dashes; begin with a letter, end "
            "with a letter or a digit."
        )
    return name


def check_word(flag: str, value: str, pattern: str, example: str) -> str:
    if not re.fullmatch(pattern, value):
        raise TpuError(f"{flag} {value!r} is not valid. Write it as {example}.")
    return value


def check_run_dir(run_dir: str) -> str:
    """Refuses folders that cannot hold checkpoints. `check_writable` asks the bucket."""
    if run_dir.startswith("gs:"):
        if not BUCKET.fullmatch(run_dir):
            raise TpuError(f"--run-dir {run_dir!r} is not valid. Write it as gs://BUCKET/FOLDER.")
        if {"", ".", ".."} & set(run_dir.removeprefix("gs://").rstrip("/").split("/")):
            raise TpuError(f"--run-dir {run_dir!r} must contain no //, /./ or /../, because it becomes a path.")
        if set(run_dir) & set("*?[]#\n\r"):  # gcloud storage reads these as wildcards, or cannot store them
            raise TpuError(f"--run-dir {run_dir!r} must contain no *, ?, [, ], # or line breaks.")
    elif not run_dir.startswith("/"):
        raise TpuError(
            f"--run-dir {run_dir!r} is relative. Give gs://BUCKET/FOLDER, or an absolute path (lost with the VM)."
        )
    return run_dir


def check_writable(gcloud: Gcloud, run_dir: str) -> None:
    """Writes and deletes a tiny object below `run_dir`, if it is in a bucket.

    Warns if the bucket has no hierarchical namespace.

    Raises:
      TpuError: the object cannot be written or deleted.
    """
    if not run_dir.startswith("gs://"):
        return
    probe = f"{run_dir.rstrip('/')}/{PROBE}"
    try:
        gcloud.change("storage", "cp", "-", probe, zonal=False)
    except CloudError as error:
        region = (gcloud.zone or "REGION").rsplit("-", 1)[0]
        raise TpuError(
            f"--run-dir {run_dir}: cannot be written ({error}) Check that you may write to the bucket, and that it "
            f"exists (gcloud storage buckets create gs://{bucket_of(run_dir)} --uniform-bucket-level-access "
            f"--enable-hierarchical-namespace --location={region})."
        ) from None
    try:
        gcloud.change("storage", "rm", probe, zonal=False)
    except CloudError as error:
        raise TpuError(
            f"--run-dir {run_dir}: can be written, but nothing can be deleted there ({error}) "
            "Old checkpoints must be deleted: give your account the role roles/storage.objectUser."
        ) from None
    _warn_without_folders(gcloud, bucket_of(run_dir))


def _warn_without_folders(gcloud: Gcloud, bucket: str) -> None:
    """Warns if the bucket has no hierarchical namespace. A bucket gets it at its creation or never."""
    try:
        # --raw: without it gcloud (SDK 528) leaves this field out.
        answer = gcloud.read("storage", "buckets", "describe", f"gs://{bucket}", "--raw", zonal=False)
    except CloudError:
        answer = None
    if gcloud.dry_run:
        return
    if not isinstance(answer, dict) or not answer:
        text = f"note: could not see whether gs://{bucket} has a hierarchical namespace (needs storage.buckets.get)."
    elif isinstance(folders := answer.get("hierarchicalNamespace"), dict) and folders.get("enabled") is True:
        return
    else:
        text = (
            f"warning: gs://{bucket} has no hierarchical namespace. Renaming a checkpoint's folder is then slow and "
            "not atomic: cut short, it leaves a part of the checkpoint, and gcsfuse may refuse it. A bucket gets the "
            "namespace at its creation only: gcloud storage buckets create --enable-hierarchical-namespace "
            "--uniform-bucket-level-access"
        )
    print(text, file=sys.stderr, flush=True)


def check_secrets(path: str) -> Path:
    """The path of a file of NAME=value lines that only its owner can read."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise TpuError(f"--secrets {path}: no such file. Give a file of NAME=value lines, such as WANDB_API_KEY=...")
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TpuError(f"--secrets {path}: other users can read this file. First run: chmod 600 {path}")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#") and not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line):
            raise TpuError(f"--secrets {path}, line {number} is not valid. Write NAME=value.")  # the line is not shown
    return file


def check_run(run: str, overrides: Sequence[str]) -> None:
    """Checks the run's arguments on this machine, where a mistake costs nothing.

    Raises:
      TpuError: the run command refuses them.
    """
    words = [sys.executable, "-m", "experiments.run", run, *overrides, "--print"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        raise TpuError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        print(
            "note: the run's settings were not checked, because this Python cannot import the project.", file=sys.stderr
        )
