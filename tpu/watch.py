"""Keeps a run going when the whole slice is preempted: asks for the slice again, sets it up, launches the run.

The supervisor on the workers restarts a run whose VM lives. A preemption deletes the VMs with their supervisors. This
loop runs on a machine of yours and brings the slice back. It keeps its memory in the slice's labels, so you can stop it
and start it again on any machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable

from tpu import slices, work, workers
from tpu.errors import CloudError, Deleted, NotFound, NotMounted
from tpu.gcloud import Gcloud
from tpu.slices import CHIP_MINUTES, PREEMPTIONS, Slice
from tpu.workers import Job

ATTEMPTS = 5


class Watch:
    def __init__(
        self,
        gcloud: Gcloud,
        name: str,
        job: Job,
        libtpu_flags: bool,
        delete_when_done: bool,
        install_gcsfuse: bool = False,
    ):
        self.gcloud, self.name, self.job = gcloud, name, job
        self.libtpu_flags, self.delete_when_done = libtpu_flags, delete_when_done
        self.install_gcsfuse = install_gcsfuse
        self.head = workers.commit()  # every new slice runs the same code
        self.lost: Slice | None = None
        """The slice that we deleted or tried to delete, until its replacement exists."""
        self.launched = False
        """Whether we launched the run, or found it running."""
        self.fresh = False
        """Whether the VMs are new, so that nothing is set up there."""
        self.seen: tuple[Slice, datetime.datetime] | None = None
        """The slice when it was last ready, and the time."""
        self.unmounted = 0
        """Number of launches in a row that could not mount the bucket."""
        self._last = ""

    def run(self, every: float, sleep: Callable[[float], None] = time.sleep) -> int:
        """Returns 0 when the run has finished or was stopped with `stop`, 1 when it failed.

        Raises:
          Deleted: the slice does not exist, and we did not delete it.
          NotMounted: the run's bucket could not be mounted, five times in a row.
        """
        if self.gcloud.dry_run:
            print("# if nothing runs yet; a slice that is gone is first deleted and created again")
            found = slices.find(self.gcloud, self.name)
            workers.set_up(self.gcloud, found, self.head, install_gcsfuse=self.install_gcsfuse)
            workers.start(self.gcloud, found, self.job)
            return 0
        while True:
            try:
                done = self.step()
            except Deleted:  # somebody wants it gone
                raise
            except NotMounted as error:
                self.unmounted += 1
                if self.unmounted == ATTEMPTS:  # the network is not the cause, and the slice costs
                    raise
                done = self.say(f"{error} (trying again)")
            except CloudError as error:  # the network, missing capacity, a worker that is booting
                done = self.say(f"{error} (trying again)")
            if done is not None:
                return done
            sleep(every)

    def step(self) -> int | None:
        """Checks the slice once and does what is needed; returns an exit status when nothing is left to do."""
        try:
            found = slices.find(self.gcloud, self.name)
        except NotFound as error:  # only here: ssh also finds nothing while a worker goes or comes
            if self.lost is None:
                raise Deleted(str(error)) from None
            slices.create(self.gcloud, self.lost)
            self.is_new()
            return self.say("was asked for again")
        if found.gone:
            return self.replace(found)
        if self.lost is not None and found.state != "DELETING":  # gcloud failed, but the cloud created the slice
            self.is_new()
        if not found.ready:
            return self.say(f"is {found.state}")
        self.seen = (found, datetime.datetime.now(datetime.UTC))
        answers = [] if self.fresh else workers.statuses(self.gcloud, found)
        states = {answer.get("state") for answer in answers} or {"absent"}
        if self.launched and states == {"finished"}:
            return self.finish(found)
        if states <= {"running", "pausing"} or (self.launched and states <= {"running", "pausing", "finished"}):
            self.launched = True
            return self.say(f"is {found.state}, and the run goes on")
        # Only the end of our own launch counts: an earlier launch may have failed, and we still launch.
        if self.launched and "failed" in states:
            self.say(f"cannot continue the run: see python -m tpu logs {self.name}")
            return 1
        if self.launched and states <= {"stopped", "finished"}:
            self.say("has a run that was stopped by hand")
            return 0
        if "absent" in states:
            workers.set_up(self.gcloud, found, self.head, install_gcsfuse=self.install_gcsfuse)
            self.fresh = False
        elif states & {"running", "pausing"}:  # some supervisors are gone, and all must begin together
            workers.on_workers(self.gcloud, found, workers.stop_command(), "stop")
        workers.start(self.gcloud, found, work.with_flags(self.job, found, self.libtpu_flags))
        self.launched, self.unmounted = True, 0
        return self.say("has the run launched")

    def finish(self, found: Slice) -> int:
        self.say("has finished the run")
        if self.delete_when_done:
            slices.delete(self.gcloud, found)
            self.say("is deleted")
        else:
            self.say(f"costs until you delete it: python -m tpu delete {self.name}")
        return 0

    def replace(self, found: Slice) -> None:
        """Deletes the remains of a preempted slice. A later step asks for the same slice again."""
        self.say(f"is {found.state} {found.why}".rstrip() + ": it is deleted and asked for again")
        spent = found.labels.get(CHIP_MINUTES, "0")
        if self.seen is not None:
            before, at = self.seen
            spent = str(round(before.chip_hours(at) * 60))
        labels = {**found.labels, CHIP_MINUTES: spent, PREEMPTIONS: str(found.preemptions + (found.state != "FAILED"))}
        # Set before the deletion: a gcloud that fails may have deleted. If not, the next step does all this again.
        self.lost = dataclasses.replace(found, labels=labels)
        slices.delete(self.gcloud, found)

    def is_new(self) -> None:
        self.lost, self.seen, self.fresh = None, None, True

    def say(self, text: str) -> None:
        """Prints a line with the time, unless it repeats the last line."""
        if text != self._last:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name} {text}", file=sys.stderr, flush=True)
        self._last = text
