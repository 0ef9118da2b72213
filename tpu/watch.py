"""Keeps a run going through preemptions of the whole slice: asks for it again, sets it up, launches, until it is done.

The supervisor on the workers restarts a run whose VM lives. When a spot slice is preempted the VMs are gone, supervisor
and all; this loop, on a machine of yours, is what brings them back. Its memory is in the slice's labels, so it can be
stopped and started again anywhere.
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
        self.head = workers.commit()  # every life runs the same code
        self.lost: Slice | None = None
        """What we deleted, or tried to, and is not yet there again."""
        self.launched = False
        """By us, or found running."""
        self.fresh = False
        """Its VMs are new: nothing is set up there."""
        self.seen: tuple[Slice, datetime.datetime] | None = None
        """The slice and the time when it was last seen ready."""
        self.unmounted = 0
        """Launches in a row that failed for the bucket."""
        self._last = ""

    def run(self, every: float, sleep: Callable[[float], None] = time.sleep) -> int:
        """Returns 0 when the run has finished or was stopped with `stop`, 1 when it failed.

        Raises:
          Deleted: there is no such slice, and it was not we who deleted it.
          NotMounted: the run's bucket, five times in a row.
        """
        if self.gcloud.dry_run:
            print("# wherever nothing runs yet; a slice that is gone is deleted and created again first")
            found = slices.find(self.gcloud, self.name)
            workers.set_up(self.gcloud, found, self.head, install_gcsfuse=self.install_gcsfuse)
            workers.start(self.gcloud, found, self.job)
            return 0
        while True:
            try:
                done = self.step()
            except Deleted:  # not to be brought back
                raise
            except NotMounted as error:
                self.unmounted += 1
                if self.unmounted == ATTEMPTS:  # no network's fault, and the slice costs
                    raise
                done = self.say(f"{error} (trying again)")
            except CloudError as error:  # the network, capacity, a worker that is just booting
                done = self.say(f"{error} (trying again)")
            if done is not None:
                return done
            sleep(every)

    def step(self) -> int | None:
        """One look, and what it calls for; an exit status when there is nothing more to do."""
        try:
            found = slices.find(self.gcloud, self.name)
        except NotFound as error:  # what ssh does not find says less: a worker that is just going, or coming
            if self.lost is None:
                raise Deleted(str(error)) from None
            slices.create(self.gcloud, self.lost)
            self.is_new()
            return self.say("asked for it again")
        if found.gone:
            return self.replace(found)
        if self.lost is not None and found.state != "DELETING":  # asked for: gcloud failed, and the cloud did not
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
            return self.say(f"is {found.state}, the run goes on")
        # How an earlier launch has ended is no reason not to launch; how this one has, is.
        if self.launched and "failed" in states:
            self.say(f"the run cannot go on; see python -m tpu logs {self.name}")
            return 1
        if self.launched and states <= {"stopped", "finished"}:
            self.say("the run was stopped by hand")
            return 0
        if "absent" in states:
            workers.set_up(self.gcloud, found, self.head, install_gcsfuse=self.install_gcsfuse)
            self.fresh = False
        elif states & {"running", "pausing"}:  # some of its supervisors are gone: all begin together again
            workers.on_workers(self.gcloud, found, workers.stop_command(), "stop")
        workers.start(self.gcloud, found, work.with_flags(self.job, found, self.libtpu_flags))
        self.launched, self.unmounted = True, 0
        return self.say("launched")

    def finish(self, found: Slice) -> int:
        self.say("the run has finished")
        if self.delete_when_done:
            slices.delete(self.gcloud, found)
            self.say("deleted")
        else:
            self.say(f"and costs until you delete it: python -m tpu delete {self.name}")
        return 0

    def replace(self, found: Slice) -> None:
        """Deletes what is left of a preempted slice; a later step asks for it again, in the same way."""
        self.say(f"is {found.state} {found.why}".rstrip() + ": it is deleted and asked for again")
        spent = found.labels.get(CHIP_MINUTES, "0")
        if self.seen is not None:
            before, at = self.seen
            spent = str(round(before.chip_hours(at) * 60))
        labels = {**found.labels, CHIP_MINUTES: spent, PREEMPTIONS: str(found.preemptions + (found.state != "FAILED"))}
        # First, for a gcloud that fails may have deleted. Should it not have, all this is done, and counted, anew.
        self.lost = dataclasses.replace(found, labels=labels)
        slices.delete(self.gcloud, found)

    def is_new(self) -> None:
        self.lost, self.seen, self.fresh = None, None, True

    def say(self, text: str) -> None:
        """Each piece of news once, with the time."""
        if text != self._last:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name} {text}", file=sys.stderr, flush=True)
        self._last = text
