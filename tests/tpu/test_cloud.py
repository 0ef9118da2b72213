"""create, wait, status, delete, account: against a fake gcloud."""

import datetime
import io
import json

import pytest
from tpu_fakes import queued, vm

from tpu import cloud as verbs
from tpu.errors import CloudError, NotFound
from tpu.gcloud import Gcloud, failure
from tpu.slices import from_node, from_queued

WHERE = ("--project", "my-project", "--zone", "us-west4-a")
TAIL = ["--project=my-project", "--zone=us-west4-a"]
EMAIL = "engram-jax@my-project.iam.gserviceaccount.com"


@pytest.mark.parametrize(
    ("options", "call"),
    [
        (
            ["--type", "v5e-8"],
            "compute tpus tpu-vm create mine --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite "
            "--labels=engram-jax=mine",
        ),
        (
            ["--type", "v4-8", "--spot"],
            "compute tpus tpu-vm create mine --accelerator-type=v4-8 --version=tpu-ubuntu2204-base "
            "--labels=engram-jax=mine --spot",
        ),
        (
            ["--type", "v5p-128", "--reserved", "--queued", "--service-account", EMAIL],
            "compute tpus queued-resources create mine --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
            f"--labels=engram-jax=mine --node-id=mine --reserved --service-account={EMAIL}",
        ),
        (
            [
                "--type",
                "v6e-256",
                "--slices",
                "2",
                "--spot",
                "--valid_until=6h",
                "--network",
                "net",
                "--runtime",
                "new",
            ],
            "compute tpus queued-resources create mine --accelerator-type=v6e-256 --runtime-version=new "
            "--labels=engram-jax=mine --node-count=2 --node-prefix=mine --spot --network=net --valid-until-duration=6h",
        ),
    ],
)
def test_create(cloud, options, call):
    status, _, error = cloud.run("create", "mine", *options, *WHERE)
    assert status == 0
    assert cloud.calls == [[*call.split(), "--quiet", *TAIL]]
    assert "$ an hour" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my run", "--type", "v5e-8"], "NAME 'my run'"),
        (["mine;ls", "--type", "v5e-8"], "NAME 'mine;ls'"),
        (["-x", "--type", "v5e-8"], "NAME"),
        (["mine", "--type", "v5e-9"], "v5e-1, 4, 8"),
        (["mine", "--type", "v5e-8", "--spot", "--reserved"], "exclude each other"),
        (["mine", "--type", "v5e-8", "--slices", "0"], "--slices 0"),
        (["mine", "--type", "v5e-8", "--valid-until", "soon"], "6h"),
        (["mine", "--type", "v5e-8", "--service-account", "me"], "--service-account 'me'"),
        (["mine", "--type", "v5e-8", "--run-dir", "gs://B"], "gs://BUCKET/FOLDER"),
        (["mine", "--type", "v5e-8", "--run-dir", "gs://bucket/a*"], "no *, ?"),
        (["mine", "--type", "v5e-8", "--run-dir", "gs://bucket/a/../../b"], "no //"),
        (["mine", "--type", "v5e-8", "--run-dir", "gs://bucket//a"], "no //"),
        (["mine", "--type", "v5e-8", "--run-dir", "runs/x"], "absolute path"),
        (["mine", "--type", "v5e-8", "--", "--spot"], "takes no words after --"),
    ],
)
def test_mistakes_are_one_line_and_cost_no_call(cloud, arguments, message):
    status, output, error = cloud.run("create", *arguments)
    assert (status, output, cloud.calls) == (2, "", [])
    assert message in error


def test_a_bucket_that_cannot_be_written_is_found_before_anything_is_created(cloud):
    cloud.on("storage cp", rc=1, stderr="ERROR: HTTPError 403: me@x.org does not have storage.objects.create access.\n")
    status, _, error = cloud.run("create", "mine", "--type", "v5e-8", "--run-dir", "gs://bucket/a 'run'; here")
    assert status == 2
    assert "gs://bucket/a 'run'; here: cannot be written" in error and error.count("\n") == 1
    assert cloud.calls == [["storage", "cp", "-", "gs://bucket/a 'run'; here/.engram_jax_write_test", "--quiet"]]


def test_a_bucket_is_left_as_it_was(cloud):
    assert cloud.run("create", "mine", "--type", "v5e-8", "--run-dir", "gs://bucket/run")[0] == 0
    assert [call[:2] for call in cloud.calls] == [
        *[["storage", "cp"], ["storage", "rm"], ["storage", "buckets"], ["compute", "tpus"]]
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"stdout": '{"name": "bucket", "hierarchicalNamespace": {"enabled": true}}'}, None),
        ({"stdout": '{"name": "bucket", "hierarchicalNamespace": {"enabled": false}}'}, "not atomic"),
        ({"stdout": '{"name": "bucket", "hierarchicalNamespace": null}'}, "not atomic"),
        ({"stdout": '{"name": "bucket"}'}, "not atomic"),
        ({"stdout": "[]"}, "could not see"),
        ({"stdout": "what?"}, "could not see"),
        ({"rc": 1, "stderr": "ERROR: 403 me@x.org does not have storage.buckets.get access"}, "could not see"),
    ],
)
def test_a_bucket_whose_folders_are_none_is_warned_of_and_taken(cloud, answer, message):
    cloud.on("storage buckets describe", **answer)
    status, _, error = cloud.run("create", "mine", "--type", "v5e-8", "--run-dir", "gs://bucket/run", *WHERE)
    assert status == 0
    lines = [line for line in error.splitlines() if "hierarchical namespace" in line]
    assert len(lines) == (message is not None) and all("gs://bucket" in line and message in line for line in lines)
    (call,) = cloud.called("describe")
    assert call[2:] == ["describe", "gs://bucket", "--raw", "--format=json", "--project=my-project"]


def test_a_bucket_that_does_not_exist_is_answered_with_how_to_make_it(cloud):
    cloud.on("storage cp", rc=1, stderr="ERROR: gs://bucket not found: 404.")
    status, _, error = cloud.run("create", "mine", "--type", "v5e-8", "--run-dir", "gs://bucket/run", *WHERE)
    command = "storage buckets create gs://bucket --uniform-bucket-level-access --enable-hierarchical-namespace"
    assert status == 2 and f"{command} --location=us-west4)" in error


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        ('ERROR: There is no more capacity in the zone "us-west4-a"; you can try in another zone', "--queued"),
        ("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' exceeded", "tpu/docs/quota"),
        ("ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "Rights"),
        ("ERROR: ALREADY_EXISTS: Resource already exists", "another name"),
        ("ERROR: The required property [zone] is not currently set.", "--zone"),
        ("ERROR: Cloud TPU API has not been used in project 1 before or it is disabled", "services enable"),
        ("ERROR: You do not currently have an active account selected.", "gcloud auth login"),
        ("", "printed nothing"),
    ],
)
def test_what_gcloud_says_is_passed_on_with_a_remedy(cloud, stderr, remedy):
    cloud.on("create", rc=1, stderr=f"Create request issued for: [mine]\n{stderr}\n" if stderr else "")
    status, _, error = cloud.run("create", "mine", "--type", "v5e-8", *WHERE)
    assert status == 1
    last = error.splitlines()[-1]
    assert last.startswith("error: ") and remedy in last and stderr in last


@pytest.mark.parametrize(
    ("stderr", "is_not_found"),
    [
        ("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'projects/404/x' was not found.", True),
        ("ERROR: ResponseError: code=404, message=Requested entity", True),
        ("ERROR: HTTPError 404: no such thing", True),
        ("ERROR: UNAVAILABLE: try again (projects/640412/locations/us-west4-a)", False),
        ("ERROR: PERMISSION_DENIED: projects/404/locations/us-west4-a", False),
        ("ERROR: Could not find credentials to refresh", False),
        ("ssh: command not found", False),
    ],
)
def test_what_is_not_there_is_told_from_what_failed(stderr, is_not_found):
    assert isinstance(failure(stderr, 1), NotFound) == is_not_found


def test_without_gcloud(cloud, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cloud.run("status")[2].startswith("error: gcloud is not on the PATH")


def test_a_gcloud_that_hangs_is_given_up(cloud):
    cloud.on("describe", sleep=5)
    with pytest.raises(CloudError, match=r"has not answered for 0.05 s"):
        Gcloud(patience=0.05).read("compute", "tpus", "tpu-vm", "describe", "mine")


def test_wait_through_the_queue_and_a_blip(cloud):
    cloud.has_queued(state="WAITING_FOR_RESOURCES", times=2)
    cloud.on("queued-resources describe", rc=1, stderr="ERROR: Unable to connect to the server", times=1)
    cloud.has_queued(state="ACTIVE")
    cloud.has_vm()
    status, _, error = cloud.run("wait", "mine", "--every", "0")
    assert status == 0
    assert [word for word in ("WAITING_FOR_RESOURCES", "trying again", "ACTIVE") if word in error] == [
        "WAITING_FOR_RESOURCES",
        "trying again",
        "ACTIVE",
    ]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_wait_fails_if_it_never_will_be(cloud, state):
    answer = queued(state=state)
    answer["state"]["failedData"] = {"error": {"code": 8, "message": "no reservation"}}
    cloud.on("queued-resources describe", stdout=json.dumps(answer))
    status, _, error = cloud.run("wait", "mine", "--every", "0")
    assert status == 1 and f"error: mine is {state} no reservation" in error


def test_wait_no_longer_than_asked(cloud):
    cloud.has_queued(state="WAITING_FOR_RESOURCES")
    slept = []
    with pytest.raises(CloudError, match="still WAITING_FOR_RESOURCES after 1 minutes"):
        verbs.wait(Gcloud(), "mine", every=20, minutes=1, sleep=slept.append)
    assert slept == [20, 20, 20]


def test_a_vm_that_was_preempted_under_an_active_queued_resource(cloud):
    cloud.has_queued(state="ACTIVE")
    cloud.has_vm(state="PREEMPTED")
    assert "PREEMPTED" in cloud.run("wait", "mine")[2]


def test_status(cloud):
    labels = {"engram-jax": "two", "engram-jax-preemptions": "3", "engram-jax-chip-minutes": "6000"}
    cloud.on("tpu-vm list", stdout=json.dumps([vm(), vm("other", labels={}), vm("part", queuedResource="projects/x")]))
    cloud.on("queued-resources list", stdout=json.dumps([queued("two", "SUSPENDED", 2, labels=labels)]))
    status, output, _ = cloud.run("status", "--zone", "us-west4-a")
    lines = output.splitlines()
    assert status == 0 and len(lines) == 4
    assert lines[1].split()[:3] == ["two", "SUSPENDED", "2"] and lines[1].split()[-3:] == ["3", "19.20", "120.00"]
    assert lines[2].split()[:3] == ["mine", "READY", "v5e-8"] and "estimate" in lines[3]
    assert cloud.run("status", "--price", "2")[1].splitlines()[1].split()[-1] == "200.00"


def test_status_of_nothing(cloud):
    assert "No slice has the label" in cloud.run("status")[1]


def test_status_asks_the_supervisors(cloud):
    cloud.has_vm()
    mark = 'engram_jax supervisor: {"state": "running", "restarts": 2, "run_dir": "gs://b/r", "last_line": "step 7"}'
    cloud.on("tpu-vm ssh", stdout=f"Using ssh batch size of 1.\n{mark}\n")
    assert cloud.run("status", "mine")[1].splitlines()[-1] == "supervisor: running  2 restarts, gs://b/r  step 7"


def test_cost_is_chips_times_hours_from_when_the_vms_were_there(cloud):
    mine = from_node(vm(), "mine")
    later = datetime.datetime(2025, 6, 1, 12, 30, 0, 123456, tzinfo=datetime.UTC)
    assert mine.chip_hours(later) == pytest.approx(20)
    assert from_queued(queued(state="WAITING_FOR_RESOURCES"), "mine").chip_hours(later) == 0


@pytest.mark.parametrize("answer", [None, {}, [], {"state": None, "tpu": {"nodeSpec": None}}, {"tpu": []}])
def test_answers_with_nothing_in_them(answer):
    for found in (from_node(answer, "mine"), from_queued(answer, "mine")):
        assert (found.name, found.state, found.type, found.labels) == ("mine", "UNKNOWN", None, {})


def test_a_type_given_as_topology():
    node = vm(acceleratorType="", acceleratorConfig={"type": "V5P", "topology": "4x4x4"})
    assert str(from_node(node, "").type) == "v5p-128 (64 chips, 16 hosts, 6080 GB of HBM)"


def test_delete_names_what_it_deletes_and_asks(cloud):
    cloud.has_queued(count=2)
    typed = []
    verbs.delete(Gcloud(), "mine", yes=False, ask=lambda question: typed.append(question) or "mine")
    assert typed == ["Type mine to delete it: "]
    assert cloud.calls[-1] == ["compute", "tpus", "queued-resources", "delete", "mine", "--force", "--quiet"]


def test_delete_shows_all_of_it(cloud):
    cloud.has_queued(count=2)
    _, output, _ = cloud.run("delete", "mine", "--yes")
    assert "projects/my-project/locations/us-west4-a/queuedResources/mine" in output
    assert "mine-0" in output and "mine-1" in output


def test_delete_of_a_vm(cloud):
    cloud.has_vm()
    assert cloud.run("delete", "mine", "--yes", *WHERE)[0] == 0
    assert cloud.calls[-1] == ["compute", "tpus", "tpu-vm", "delete", "mine", "--quiet", *TAIL]


def test_a_hitch_does_not_make_a_queued_slice_a_vm(cloud):
    cloud.on("queued-resources describe", rc=1, stderr="ERROR: UNAVAILABLE: The service is unavailable.", times=1)
    cloud.has_queued()
    cloud.has_vm(queuedResource="projects/my-project/locations/us-west4-a/queuedResources/mine")
    status, _, error = cloud.run("delete", "mine", "--yes")
    assert status == 1 and "UNAVAILABLE" in error and not cloud.called("delete")
    assert cloud.run("delete", "mine", "--yes")[0] == 0
    assert cloud.calls[-1][2:6] == ["queued-resources", "delete", "mine", "--force"]


def test_delete_refuses_what_is_not_ours(cloud):
    cloud.has_vm(labels={"team": "other"})
    status, _, error = cloud.run("delete", "mine", "--yes")
    assert status == 2 and "lacks the label 'engram-jax'" in error
    assert not cloud.called("delete")


def test_delete_with_nobody_to_ask_or_another_name_typed(cloud, monkeypatch):
    cloud.has_vm()
    for answer in ("", "\n", "yes\n", "other\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        status, _, error = cloud.run("delete", "mine")
        assert status == 2 and "nothing was deleted" in error
    assert not cloud.called("delete")


def test_delete_of_what_does_not_exist(cloud):
    status, _, error = cloud.run("delete", "mine", "--yes", "--zone", "us-west4-a")
    assert status == 1 and "There is no slice 'mine' in us-west4-a" in error


def test_account_gives_the_least(cloud):
    assert cloud.run("account", "--project", "my-project", "--bucket", "gs://bucket")[0] == 0
    member = f"--member=serviceAccount:{EMAIL}"
    assert [" ".join(call) for call in cloud.calls] == [
        "iam service-accounts create engram-jax --display-name=engram_jax runs --quiet --project=my-project",
        f"storage buckets add-iam-policy-binding gs://bucket {member} --role=roles/storage.objectUser --quiet "
        "--project=my-project",
        f"projects add-iam-policy-binding my-project {member} --role=roles/logging.logWriter --condition=None --quiet "
        "--project=my-project",
        f"projects add-iam-policy-binding my-project {member} --role=roles/monitoring.metricWriter --condition=None "
        "--quiet --project=my-project",
    ]


def test_account_may_exist_already_and_needs_a_project(cloud):
    cloud.on("service-accounts create", rc=1, stderr="ERROR: Resource in projects [x] already exists.")
    assert cloud.run("account", "--project", "my-project", "--bucket", "gs://bucket")[0] == 0
    assert len(cloud.calls) == 4
    assert "--project" in cloud.run("account", "--bucket", "gs://bucket")[2]


def test_types_and_help(cloud):
    assert "v5p-8, 16, 32, 64 and multiples" in cloud.run("types")[1]
    status, output, _ = cloud.run("--help")
    assert status == 0 and "quick start" in output
    verbs = "account create wait setup launch watch status logs ssh tunnel profile stop delete"
    for verb in verbs.split():
        status, output, _ = cloud.run(verb, "--help")
        assert status == 0 and "--dry-run" in output
    assert cloud.calls == []
