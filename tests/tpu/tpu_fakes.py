"""A fake cloud: a gcloud on the PATH that answers as a test has scripted, and answers as the real one gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpu.__main__ import main


class Cloud:
    """The fake, and what a test wants of it."""

    def __init__(self, folder: Path, run: Callable[[], tuple[str, str]]):
        self.folder, self.home, self._output = folder, folder / "home", run
        self.home.mkdir()
        (folder / "rules.json").write_text("[]")
        (folder / "mounts").touch()

    def on(self, match: str, **answer: Any) -> None:
        rules = json.loads((self.folder / "rules.json").read_text())
        (self.folder / "rules.json").write_text(json.dumps([*rules, {"match": match, **answer}]))

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def called(self, *words: str) -> list[list[str]]:
        """The calls in which all of these occur."""
        return [call for call in self.calls if set(words) <= set(call)]

    @property
    def worker_calls(self) -> list[str]:
        """How gcsfuse, fusermount, ... were called on the worker."""
        file = self.folder / "worker.log"
        return file.read_text().splitlines() if file.exists() else []

    def lacks_gcsfuse(self) -> None:
        """On the worker; sudo apt-get install brings it."""
        (self.folder / "bin" / "gcsfuse").rename(self.folder / "gcsfuse")

    def loses_its_mount(self, bucket: str) -> None:
        """Its gcsfuse dies: the mount point is there and cannot be looked at."""
        at = self.home / "buckets" / bucket
        at.unlink()
        at.symlink_to("/nowhere")

    def is_recreated(self) -> None:
        """The VM comes back with an empty disk."""
        for path in sorted(self.home.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.folder / "mounts").write_text("")

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Status, standard output and error of python -m tpu."""
        self._output()
        try:
            status = main(arguments)
        except SystemExit as exit:  # argparse's own
            status = int(exit.code or 0)
        return status, *self._output()

    def has_vm(self, name: str = "mine", **fields: Any) -> None:
        self.on(rf"tpu-vm describe {name} ", stdout=json.dumps(vm(name, **fields)))

    def has_queued(
        self, name: str = "mine", state: str = "ACTIVE", count: int = 1, times: int | None = None, **node: Any
    ):
        answer = queued(name, state, count, **node)
        self.on(rf"queued-resources describe {name} ", stdout=json.dumps(answer), **({"times": times} if times else {}))

    def has_nothing(self, name: str = "mine", times: int = 1) -> None:
        """For so many looks: as a queued resource, then as a VM."""
        answer = {"rc": 1, "stderr": f"ERROR: (gcloud.describe) NOT_FOUND: Resource '{name}' was not found."}
        self.on(rf"(queued-resources|tpu-vm) describe {name} ", times=2 * times, **answer)


def vm(name: str = "mine", **fields: Any) -> dict[str, Any]:
    """As `gcloud compute tpus tpu-vm describe --format=json` has it."""
    return {
        "acceleratorType": "v5litepod-8",
        "createTime": "2025-06-01T10:00:00.123456789Z",
        "health": "HEALTHY",
        "labels": {"engram-jax": name},
        "name": f"projects/my-project/locations/us-west4-a/nodes/{name}",
        "networkConfig": {"enableExternalIps": True, "network": "projects/my-project/global/networks/default"},
        "runtimeVersion": "v2-alpha-tpuv5-lite",
        "schedulingConfig": {},
        "serviceAccount": {"email": "engram-jax@my-project.iam.gserviceaccount.com"},
        "state": "READY",
        **fields,
    }


def queued(name: str = "mine", state: str = "ACTIVE", count: int = 1, spot: bool = True, **node: Any) -> dict[str, Any]:
    """As `gcloud compute tpus queued-resources describe --format=json` has it."""
    whole = vm(name, **node)
    inner = {key: whole[key] for key in whole if key not in ("name", "state", "createTime", "health")}
    spec: dict[str, Any] = {"node": inner, "parent": "projects/my-project/locations/us-west4-a"}
    spec |= {"nodeId": name} if count == 1 else {"multisliceParams": {"nodeCount": count, "nodeIdPrefix": name}}
    answer: dict[str, Any] = {
        "name": f"projects/my-project/locations/us-west4-a/queuedResources/{name}",
        "createTime": "2025-06-01T09:00:00Z",
        "state": {"state": state},
        "tpu": {"nodeSpec": [spec]},
    }
    return answer | ({"spot": {}} if spot else {})
