"""watch: a slice that goes away comes back, and what ends the watch."""

import json

import pytest
from tpu_fakes import queued, vm

from tpu import STATUS_MARK
from tpu.errors import NotFound
from tpu.gcloud import Gcloud
from tpu.watch import Watch
from tpu.workers import Job

JOB = Job("engram_small", "gs://bucket/r", ("--train.steps", "5 0"))


def watch(delete_when_done: bool = False) -> tuple[int, int]:
    """The exit status, and how often it looked."""
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        assert len(sleeps) < 30, "it never ends"

    status = Watch(Gcloud(zone="z"), "mine", JOB, False, delete_when_done).run(60, sleep)
    return status, len(sleeps)


def says(cloud, *states: str, times: int = 1) -> None:
    lines = [STATUS_MARK + json.dumps({"state": state}) for state in states]
    cloud.on(r"ssh .*--status", stdout="\n".join(lines), times=times)


def describes(cloud, state: str, times: int, **more) -> None:
    cloud.on("queued-resources describe", stdout=json.dumps(queued(state=state, **more)), times=times)


def is_preempted(cloud, times: int = 1, **more) -> None:
    cloud.on("tpu-vm describe", stdout=json.dumps(vm(state="PREEMPTED", **more)), times=times)


def not_there(cloud, times: int = 1) -> None:
    """For so many looks at a VM; that there is no queued resource, the fake says by itself."""
    cloud.on("tpu-vm describe", rc=1, stderr="ERROR: NOT_FOUND: Resource was not found", times=times)


def labels_asked_for(cloud) -> list[str]:
    words = [word for call in cloud.called("create") for word in call if word.startswith("--labels=")]
    return [pair for word in words for pair in word.removeprefix("--labels=").split(",")]


def changes(cloud) -> list[str]:
    """What was done, in order, in short."""
    words = []
    for call in cloud.calls:
        text = " ".join(call)
        for name, mark in {
            "create": " create ", "delete": " delete ", "set up": "uv sync", "launch": "tpu.supervise --run-dir",
            "stop": "tpu.supervise --stop",
        }.items():  # fmt: skip
            words += [name] * (mark in text)
    return words


@pytest.fixture(autouse=True)
def no_copying(cloud):
    cloud.on(" scp ")


def test_a_preempted_slice_comes_back_as_it_was(cloud):
    describes(cloud, "ACTIVE", 1)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm()), times=1)
    says(cloud, "running")
    describes(cloud, "SUSPENDED", 1)
    cloud.has_nothing(times=2)
    cloud.on("queued-resources create", rc=1, stderr="ERROR: no more capacity", times=1)
    describes(cloud, "WAITING_FOR_RESOURCES", 2)
    describes(cloud, "ACTIVE", 5)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm()))
    cloud.on("uv sync", rc=255, times=1)  # the VM is still booting
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "running", times=2)
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["delete", "create", "create", "set up", "set up", "launch"]
    create = cloud.called("create")[-1]
    labels = dict(pair.split("=") for pair in create[7].removeprefix("--labels=").split(","))
    assert labels.keys() == {"engram-jax", "engram-jax-preemptions", "engram-jax-chip-minutes"}
    assert labels["engram-jax-preemptions"] == "1" and int(labels["engram-jax-chip-minutes"]) > 0
    del create[7]
    assert create == [
        *["compute", "tpus", "queued-resources", "create", "mine", "--accelerator-type=v5litepod-8"],
        *["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=mine", "--spot"],
        "--service-account=engram-jax@my-project.iam.gserviceaccount.com",
        *["--network=projects/my-project/global/networks/default", "--quiet", "--zone=z"],
    ]


def test_a_preempted_vm_comes_back_too(cloud):
    spot = {"schedulingConfig": {"spot": True}}
    is_preempted(cloud, **spot)
    not_there(cloud)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm(**spot)))
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["delete", "create", "set up", "launch"]
    assert cloud.called("create")[0][2] == "tpu-vm" and "--spot" in cloud.called("create")[0]


@pytest.mark.parametrize(("state", "status"), [("failed", 1), ("finished", 0), ("stopped", 0)])
def test_what_ends_it(cloud, state, status):
    cloud.has_vm()
    says(cloud, "running")
    says(cloud, state)
    assert watch() == (status, 1)
    assert changes(cloud) == []


@pytest.mark.parametrize("state", ["failed", "finished", "stopped", "idle"])
def test_how_an_earlier_launch_ended_does_not_matter(cloud, state):
    cloud.has_vm()
    says(cloud, state)
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["launch"]


def test_on_request_the_slice_goes_with_the_run(cloud):
    cloud.has_vm()
    says(cloud, "running")
    says(cloud, "finished")
    assert watch(delete_when_done=True)[0] == 0
    assert changes(cloud) == ["delete"]


@pytest.mark.parametrize("state", ["dead", "interrupted", "idle"])
def test_after_a_restart_of_the_vm_it_launches_again(cloud, state):
    cloud.has_vm()
    says(cloud, state)
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["launch"]


def test_what_was_never_set_up_is(cloud):
    cloud.has_vm()
    says(cloud, "absent")
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["set up", "launch"]


def test_if_one_worker_lost_its_supervisor_all_begin_again(cloud):
    cloud.has_vm(acceleratorType="v5p-16")
    says(cloud, "running", "dead")
    cloud.on("tpu.supervise --(stop|run-dir)")
    says(cloud, "finished", "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["stop", "launch"]


def test_workers_that_do_not_answer_are_asked_again(cloud, capfd):
    cloud.has_vm(acceleratorType="v5p-16")
    says(cloud, "running", "running")
    cloud.on(r"ssh .*--status", rc=255, stderr="ERROR: ssh: connect: Connection refused", times=3)
    says(cloud, "running")  # one of two
    says(cloud, "finished", "finished")
    assert watch() == (0, 5)
    assert "1 of 2 workers" in capfd.readouterr().err


def test_what_was_deleted_by_hand_stays_deleted(cloud):
    describes(cloud, "ACTIVE", 1)
    says(cloud, "running")
    with pytest.raises(NotFound):
        watch()
    assert changes(cloud) == []


@pytest.mark.parametrize("lost", ["create", "delete"])
def test_what_the_cloud_did_although_gcloud_failed_counts(cloud, lost):
    is_preempted(cloud)
    not_there(cloud)
    cloud.has_vm()
    cloud.on(f" {lost} ", rc=1, stderr="ERROR: the connection was reset", times=1)
    cloud.on(" create ", rc=1, stderr="ERROR: ALREADY_EXISTS: Resource already exists", times=30 * (lost == "create"))
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["delete", "create", "set up", "launch"]
    assert "engram-jax-preemptions=1" in labels_asked_for(cloud)


def test_what_is_left_is_deleted_again_and_a_preemption_counted_once(cloud):
    is_preempted(cloud, times=2)
    cloud.on(" delete ", rc=1, stderr="ERROR: the connection was reset", times=1)
    cloud.on("tpu-vm describe", stdout=json.dumps(vm(state="DELETING")), times=2)
    not_there(cloud)
    cloud.has_vm()
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert changes(cloud) == ["delete", "delete", "create", "set up", "launch"]
    assert "engram-jax-preemptions=1" in labels_asked_for(cloud)


def test_what_ssh_does_not_find_was_not_deleted_by_hand(cloud):
    cloud.has_vm()
    says(cloud, "running")
    cloud.on(r"ssh .*--status", rc=1, stderr="ERROR: (gcloud.ssh) NOT_FOUND: Resource was not found", times=1)
    says(cloud, "finished")
    assert watch() == (0, 2)
    assert changes(cloud) == []


def test_a_hitch_leaves_a_queued_slice_queued(cloud):
    cloud.on("queued-resources describe", rc=1, stderr="ERROR: UNAVAILABLE: 503", times=1)
    describes(cloud, "ACTIVE", 1)
    is_preempted(cloud)
    cloud.has_nothing()
    describes(cloud, "ACTIVE", 9)
    cloud.has_vm()
    cloud.on("uv sync")
    cloud.on("tpu.supervise --run-dir")
    says(cloud, "finished")
    assert watch()[0] == 0
    assert {call[2] for verb in ("delete", "create") for call in cloud.called(verb)} == {"queued-resources"}


@pytest.mark.parametrize("at", ["uv sync", "mountpoint", "tpu.supervise --run-dir"])
def test_ctrl_c_ends_it_whatever_it_is_at(cloud, at):
    cloud.has_vm()
    says(cloud, "absent")
    cloud.on(at, rc=130)
    cloud.on("uv sync")
    with pytest.raises(KeyboardInterrupt):
        watch()


def test_what_is_not_ours_is_not_deleted(cloud, trusting):
    cloud.on("tpu-vm describe", stdout=json.dumps(vm(state="PREEMPTED", labels={})))
    status, _, error = cloud.run("watch", "mine", "engram_small", "--run-dir", "gs://bucket/r")
    assert status == 2 and "lacks the label" in error and changes(cloud) == []
