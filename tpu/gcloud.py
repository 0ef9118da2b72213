"""Runs gcloud with argument lists, never through a shell. With --dry-run it prints them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from typing import Any

from tpu.errors import CloudError, NotFound

# Words in gcloud's message -> what to do about it. The first match counts.
REMEDIES = {
    "quota": "Ask for quota: https://cloud.google.com/tpu/docs/quota",
    "capacity|resource_exhausted|stockout": "Add --queued to wait in line, or try --spot or another --zone.",
    "has not been used in project|service_disabled": "First run: gcloud services enable tpu.googleapis.com",
    "already.?exists": "Choose another name, or delete that slice; python -m tpu status lists the slices.",
    "not currently set|required property|must be specified|underspecified": "Give --project and --zone, or set them: "
    "gcloud config set compute/zone ZONE",
    "reauth|gcloud auth login|no credentialed|active account": "First run: gcloud auth login",
    "permission|forbidden|403|does not have": "Your account lacks a right; see 'Rights' in tpu/README.md.",
}
# The API's status, or HTTP's status where the message calls it one. A 404 alone may be any number, and "could not be
# found" may speak of credentials.
NOT_FOUND = re.compile(r"\bnot_found\b|\bwas not found\b|\b(HTTPError|code|status)\W{0,2}404\b", re.IGNORECASE)


@dataclasses.dataclass
class Gcloud:
    project: str | None = None
    zone: str | None = None
    dry_run: bool = False
    patience: float = 180
    """Seconds that a gcloud command which only reads may take."""

    def words(self, *arguments: str, zonal: bool = True) -> list[str]:
        """The full command. Without project or zone, gcloud uses those of its own configuration."""
        where = {"project": self.project, "zone": self.zone if zonal else None}
        return ["gcloud", *arguments, *(f"--{name}={value}" for name, value in where.items() if value is not None)]

    def show(self, words: list[str], stdin: str = "") -> None:
        print(shlex.join(words) + stdin)

    def read(self, *arguments: str, zonal: bool = True) -> Any:
        """Runs a command that changes nothing; returns its JSON answer, or None on a dry run.

        Raises:
          NotFound: the resource does not exist.
          CloudError: the command failed for another reason.
        """
        words = self.words(*arguments, "--format=json", zonal=zonal)
        if self.dry_run:
            return self.show(words)
        output = self._capture(words, self.patience)
        try:
            return json.loads(output or "null")
        except json.JSONDecodeError:
            raise CloudError(f"gcloud did not answer with JSON to: {shlex.join(words)}") from None

    def change(self, *arguments: str, zonal: bool = True, seconds: float | None = None) -> str:
        """Runs a command without questions and without standard input; returns its output."""
        words = self.words(*arguments, "--quiet", zonal=zonal)
        if self.dry_run:
            self.show(words, " < /dev/null" if "-" in arguments else "")
            return ""
        return self._capture(words, seconds)

    def hand_over(self, *arguments: str) -> int:
        """Runs a command on the user's own terminal; returns its exit status, 130 after a Ctrl-C."""
        words = self.words(*arguments)
        if self.dry_run:
            self.show(words)
            return 0
        sys.stdout.flush()
        try:
            return subprocess.run(words).returncode
        except FileNotFoundError:
            raise CloudError(MISSING) from None
        except KeyboardInterrupt:  # the terminal sent it to gcloud too
            return 130

    def _capture(self, words: list[str], seconds: float | None) -> str:
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
        except FileNotFoundError:
            raise CloudError(MISSING) from None
        except subprocess.TimeoutExpired:
            raise CloudError(f"gcloud has not answered for {seconds:g} s to: {shlex.join(words)}") from None
        if done.returncode:
            raise failure(done.stderr, done.returncode)
        return done.stdout


MISSING = (
    "gcloud is not on the PATH. Install it (https://cloud.google.com/sdk/docs/install), then run gcloud auth login."
)


def failure(stderr: str, status: int) -> CloudError:
    """The error with gcloud's message as one line, and what to do about it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), max(len(lines) - 1, 0))
    message = " ".join(lines[first : first + 3]) or f"gcloud failed with status {status} and printed nothing."
    if NOT_FOUND.search(message):
        return NotFound(message)
    remedy = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, stderr, re.IGNORECASE)), "")
    return CloudError(f"{message} {remedy}".strip())
