"""Which processes belong together, from what each finds in its environment; and one real pair that disagrees."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from engram_jax import distributed
from engram_jax.config import ConfigError, RunConfig, replace, to_dict
from engram_jax.errors import PeersError
from engram_jax.runs import run_folder

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "host-0,host-1,host-2,host-3", "TPU_WORKER_ID": "3"}
TWO_SLICES = GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


@pytest.fixture
def joined(monkeypatch):
    """The arguments of jax.distributed.initialize, which is not called; a machine with TPUs, without its metadata."""
    calls = []

    def initialize(**arguments):
        calls.append(arguments)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "_say_when_aborted", lambda line: None)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: ("", 404))
    for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "KUBERNETES_SERVICE_HOST", *SLURM, *GKE):
        monkeypatch.delenv(name, raising=False)
    service = jax.config.values["jax_enable_preemption_service"]
    yield calls
    jax.config.update("jax_enable_preemption_service", service)


@pytest.mark.parametrize(
    ("environment", "where"),
    [(SLURM, "slurm"), (GKE, "gketpu"), (TWO_SLICES, "gketpu")],
    ids=["slurm", "gke", "slices"],
)
def test_clusters_are_found(monkeypatch, joined, environment, where):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_tpu_env_value_from_metadata", lambda key: None)
    assert distributed._cluster().name == where
    distributed.start()
    [arguments] = joined
    assert "coordinator_address" not in arguments
    assert arguments["heartbeat_timeout_seconds"] <= 60 and arguments["shutdown_timeout_seconds"] <= 60


def test_a_tpu_vm_is_found_by_its_metadata(monkeypatch, joined):
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2", "tpu-env": ""}
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert distributed._cluster().name == "gcetpu"
    distributed.start()
    assert len(joined) == 1
    metadata["worker-network-endpoints"] = "a:1:10.0.0.1"
    distributed.start()
    assert len(joined) == 1


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    ],
    ids=["nothing", "slurm", "gke"],
)
def test_a_process_alone_is_left_alone(monkeypatch, joined, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_tpu_env_value_from_metadata", lambda key: None)
    distributed.start(log=pytest.fail)
    assert joined == []


def test_given_processes_are_joined_without_looking_around(monkeypatch, joined):
    monkeypatch.setattr(distributed, "_cluster", lambda: pytest.fail("looked around"))
    lines = []
    distributed.start("host:1234", 2, 0, lines.append)
    [arguments] = joined
    assert (arguments["coordinator_address"], arguments["num_processes"], arguments["process_id"]) == (
        "host:1234",
        2,
        0,
    )
    assert lines[0].startswith("2 processes, as given")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "--process_id missing: give"),
        (("", 2, 0), "--coordinator missing"),
        (("", None, 0), "--coordinator and --num_processes missing"),
        (("host", 2, 0), "--coordinator 'host' must be HOST:PORT"),
        (("host:port", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"--process_id 2 must lie in 0\.\.1"),
    ],
)
def test_what_does_not_describe_processes(joined, given, message):
    with pytest.raises(ConfigError, match=message):
        distributed.start(*given)
    assert joined == []


def test_missing_peers(monkeypatch, joined):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(PeersError, match=r"Process 1 of 2 \(as given\) could not join .* timed out\. Are all"):
        distributed.start("host:1234", 2, 1)


def test_a_lone_machine_with_the_tpu_library_asks_nobody():
    """No metadata server, no port, no device: with libtpu installed and no TPU, this is where a start could hang."""
    code = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a connection")
socket.socket.connect = socket.getaddrinfo = refuse
from engram_jax import distributed
distributed.start(log=refuse)
import jax
from jax._src import xla_bridge
assert not jax.distributed.is_initialized() and not xla_bridge.backends_are_initialized()
"""
    hidden = {*SLURM, *GKE, "KUBERNETES_SERVICE_HOST"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, timeout=120)


PAIR = """
import sys, types
from pathlib import Path
from engram_jax import distributed
from engram_jax.training import run_folder_checks
from engram_jax.distributed import agree, exchange
port, me = sys.argv[1], int(sys.argv[2])
distributed.EXCHANGE_SECONDS, distributed.LEAVE_SECONDS = 2, 2
distributed.start(f"localhost:{port}", 2, me)
assert exchange(f"I am {me}") == ["I am 0", "I am 1"]
assert agree("") == ""
assert agree("no room" if me == 1 else "") == "no room (process 1)"
run_folder_checks.time = types.SimpleNamespace(sleep=lambda _: None)
for shared in (True, False):
    try:
        with run_folder_checks.folder_of_one_run(Path(sys.argv[3]) / ("shared" if shared else str(me))):
            assert shared
    except run_folder_checks.ConfigError as error:
        assert not shared and "is not the folder that process 0 has" in str(error)
if me == 1:
    try:
        agree("alone")
    except distributed.PeersError as error:
        print(error)
        distributed.leave(70, together=True)
else:
    import time
    time.sleep(100)
"""


def test_two_processes_tell_each_other_and_notice_when_one_does_not_come(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PAIR, str(port)]
    pair = [subprocess.Popen([*command, str(i), tmp_path], stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        out, _ = pair[1].communicate(timeout=120)
        assert pair[1].returncode == 70
        assert list(tmp_path.iterdir()) == []
        assert "did not come to compare notes within 2 s" in out and out.endswith("This one says: alone\n")
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_processes_of_other_settings_or_text_are_refused_on_all(monkeypatch):
    config = RunConfig()
    ours = {"config": to_dict(config), "corpus_sha256": "a" * 64, "tokenizer_sha256": "b" * 64}
    meant = {
        "": {},
        "another settings than": {"config": to_dict(replace(config, train__steps=7))},
        "another corpus and other tokenizer than": {"corpus_sha256": "c" * 64, "tokenizer_sha256": "d" * 64},
        None: {"config": to_dict(replace(config, data__cache_dir="/own"))},
    }
    for says, changes in meant.items():
        said = []
        monkeypatch.setattr(run_folder, "exchange", lambda text, said=said: said.append(text) or [text])
        run_folder.check_alike(ours), run_folder.check_alike(ours | changes)
        monkeypatch.setattr(run_folder, "exchange", lambda _, said=said: said)
        if not says:
            run_folder.check_alike(ours)
            continue
        for side in (ours, ours | changes):
            with pytest.raises(ConfigError, match=f"Process 1 has {says} process 0"):
                run_folder.check_alike(side)


def test_alone_there_is_nobody_to_ask():
    assert distributed.exchange("text") == ["text"] and distributed.agree("") == "" and distributed.agree("x") == "x"
    assert distributed.leave(3, together=True) == 3
