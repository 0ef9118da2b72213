"""The verbs create, wait, delete and account, and the table of status."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence

from tpu import slices
from tpu.accelerators import PRICES_ARE
from tpu.checks import check_name, check_run_dir, check_word, check_writable
from tpu.errors import CloudError, NotFound, TpuError
from tpu.gcloud import Gcloud
from tpu.slices import LABEL, Slice

EMAIL = r"[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com"
# Roles for logs and metrics, which the VM's own agents write. A run does not use the TPU API.
PROJECT_ROLES = ("roles/logging.logWriter", "roles/monitoring.metricWriter")
BUCKET_ROLE = "roles/storage.objectUser"


def create(gcloud: Gcloud, wanted: Slice, run_dir: str, valid_until: str) -> None:
    """Checks the arguments, then asks for a slice."""
    check_name(wanted.name)
    if wanted.spot and wanted.reserved:
        raise TpuError("--spot and --reserved exclude each other. Give one of them: a reservation is not preempted.")
    if wanted.count < 1:
        raise TpuError(f"--slices {wanted.count} must be at least 1.")
    if valid_until:
        check_word("--valid-until", valid_until, r"(\d+[smhd])+", "6h")
    if wanted.service_account:
        check_word("--service-account", wanted.service_account, EMAIL, "NAME@PROJECT.iam.gserviceaccount.com")
    if run_dir:
        check_writable(gcloud, check_run_dir(run_dir))
    if not wanted.service_account:
        _note("note: without --service-account the VMs use the project's default account, which may have many rights.")
    assert wanted.type is not None
    rate = wanted.count * wanted.type.dollars_per_hour
    _note(f"asking for {wanted}: {rate:.2f} $ an hour once it runs ({PRICES_ARE}).")
    slices.create(gcloud, wanted, valid_until)
    _note(f"next: python -m tpu {'wait' if wanted.queued else 'setup'} {wanted.name}")


def wait(gcloud: Gcloud, name: str, every: float, minutes: float, sleep: Callable[[float], None] = time.sleep) -> Slice:
    """Waits until the slice is ready, and returns it.

    Args:
      every: seconds between two checks.
      minutes: time limit; 0: no limit.

    Raises:
      CloudError: the slice cannot become ready, the time is over, or gcloud failed five times in a row.
    """
    waited, failures, last = 0.0, 0, ""
    while True:
        try:
            found, failures = slices.find(gcloud, check_name(name)), 0
        except NotFound:
            raise
        except CloudError as error:
            failures += 1
            if failures == 5:
                raise
            _note(f"{error} (trying again)")
        else:
            if found.state != last:
                _note(f"{found} is {found.state}{f': {found.why}' if found.why else ''}")
                last = found.state
            if found.ready:
                return found
            if found.gone:
                raise CloudError(f"{name} is {found.state} {found.why}".strip() + f"; python -m tpu delete {name}")
        if minutes and waited >= minutes * 60:
            raise CloudError(f"{name} is still {last or 'unknown'} after {minutes:g} minutes; it stays in the queue.")
        sleep(every)
        waited += every


def table(found: Sequence[Slice], price: float | None, zone: str | None) -> str:
    """A table with one line per slice and its cost so far. `price`: dollars per chip-hour; None: the list price."""
    if not found:
        return f"No slice has the label {LABEL!r}{f' in {zone}' if zone else ''}; --zone=- asks all zones."
    columns = ("NAME", "STATE", "TYPE", "HOW", "AGE", "PREEMPTIONS", "$/HOUR", "$ SO FAR")
    rows = [columns, *(_row(one, price) for one in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    basis = PRICES_ARE if price is None else f"{price:g} $ per chip-hour"
    lines.append(f"$ is an estimate: chips x hours x {basis}. Spot and committed use cost less. Waiting costs nothing.")
    return "\n".join(lines)


def _row(one: Slice, price: float | None) -> tuple[str, ...]:
    now = datetime.datetime.now(datetime.UTC)
    times = f"{one.count} x " if one.count > 1 else ""
    dollars = price if price is not None else one.type.generation.dollars if one.type else None
    age = f"{one.hours(now):.1f} h" if one.created and not one.gone else "-"
    cost = ("?", "?") if dollars is None else (f"{one.chips * dollars:.2f}", f"{one.chip_hours(now) * dollars:.2f}")
    type = f"{times}{one.type.name}" if one.type else "?"
    return (one.name, one.state, type, one.how, age, str(one.preemptions), *cost)


def delete(gcloud: Gcloud, name: str, yes: bool, ask: Callable[[str], str] = input) -> None:
    found = slices.find(gcloud, check_name(name))
    if gcloud.dry_run:
        print("# then, if the slice has the label and you type its name, one of these two commands:")
        for queued in (True, False):
            slices.delete(gcloud, dataclasses.replace(found, queued=queued))
        return
    slices.check_label(found)
    print("This deletes, with everything on its disks:")
    print(f"  {'queued resource' if found.queued else 'TPU VM'}  {found.path or name}  ({found.state}, {found})")
    if found.queued:
        for node in found.nodes:
            print(f"  TPU VM  {node}")
    print("Files in a bucket stay.")
    if not yes:
        try:
            typed = ask(f"Type {name} to delete it: ")
        except EOFError:
            raise TpuError(
                "the question was not answered, so nothing was deleted. Use a terminal, or add --yes."
            ) from None
        if typed.strip() != name:
            raise TpuError(f"{typed!r} is not {name!r}, so nothing was deleted.")
    slices.delete(gcloud, found)
    print(f"Deleted {name}.")


def account(gcloud: Gcloud, bucket: str, name: str) -> None:
    """Makes a service account with the rights that a run needs, and no others."""
    if not gcloud.project:
        raise TpuError("--project is missing. Give the project's ID, which is part of the account's address.")
    check_word("--bucket", bucket, r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/?", "gs://BUCKET")
    check_word("--name", name, r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "engram-jax, with 6 to 30 characters")
    email = f"{name}@{gcloud.project}.iam.gserviceaccount.com"
    member = f"--member=serviceAccount:{email}"
    try:
        gcloud.change("iam", "service-accounts", "create", name, "--display-name=engram_jax runs", zonal=False)
    except CloudError as error:
        if "already exists" not in str(error).lower():
            raise
    binding = "add-iam-policy-binding"
    gcloud.change("storage", "buckets", binding, bucket.rstrip("/"), member, f"--role={BUCKET_ROLE}", zonal=False)
    for role in PROJECT_ROLES:
        gcloud.change("projects", binding, gcloud.project, member, f"--role={role}", "--condition=None", zonal=False)
    _note(f"{email} may use the objects in {bucket} and write logs and metrics. Next: create --service-account {email}")


def _note(text: str) -> None:
    """Prints to standard error: the standard output of a dry run holds only commands."""
    print(text, file=sys.stderr, flush=True)
