"""A TPU slice, or several as one: how to create, find and delete it, and how to run commands on it.

gcloud has two kinds of resource: a TPU VM (`tpu-vm`: ready at once or not at all) and a queued resource
(`queued-resources`: waits in line, may hold several slices, and creates the TPU VMs itself). Only this file knows the
differences between them.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence
from typing import Any

from tpu.accelerators import Type, parse_type
from tpu.errors import CloudError, NotFound, TpuError
from tpu.gcloud import Gcloud

VM = ("compute", "tpus", "tpu-vm")
QUEUED = ("compute", "tpus", "queued-resources")

# The first label marks slices that python -m tpu made; its value is the name. `watch` copies the other two to the slice
# that replaces a preempted one.
LABEL, PREEMPTIONS, CHIP_MINUTES = "engram-jax", "engram-jax-preemptions", "engram-jax-chip-minutes"

READY = ("ACTIVE", "READY")
GONE = ("PREEMPTED", "TERMINATED", "SUSPENDING", "SUSPENDED", "FAILED")


@dataclasses.dataclass(frozen=True)
class Slice:
    name: str
    type: Type | None
    queued: bool = False
    count: int = 1
    """Number of slices that train together over the data-centre network."""
    spot: bool = False
    reserved: bool = False
    runtime: str = ""
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    state: str = "UNKNOWN"
    why: str = ""
    path: str = ""
    """gcloud's full name: projects/.../locations/.../nodes/NAME."""
    created: datetime.datetime | None = None
    """Time when the VMs were created: from then on the slice costs."""

    @property
    def ready(self) -> bool:
        return self.state in READY

    @property
    def gone(self) -> bool:
        return self.state in GONE

    @property
    def nodes(self) -> list[str]:
        return [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(self.count)]

    @property
    def hosts(self) -> int:
        return self.count * self.type.hosts if self.type else self.count

    @property
    def chips(self) -> int:
        return self.count * self.type.chips if self.type else 0

    @property
    def how(self) -> str:
        return "spot" if self.spot else "reserved" if self.reserved else "on demand"

    @property
    def preemptions(self) -> int:
        return _number(self.labels.get(PREEMPTIONS))

    def hours(self, now: datetime.datetime) -> float:
        """Hours since the VMs were created; 0 for a waiting request, and for a slice whose VMs are gone."""
        return (now - self.created).total_seconds() / 3600 if self.created and not self.gone else 0.0

    def chip_hours(self, now: datetime.datetime) -> float:
        """Chip-hours of this slice and of the slices that it replaced."""
        return self.chips * self.hours(now) + _number(self.labels.get(CHIP_MINUTES)) / 60

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{self.name}: {times}{self.type or 'unknown type'}, {self.how}"


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def create(gcloud: Gcloud, wanted: Slice, valid_until: str = "") -> None:
    """Asks for a slice. A queued slice is not ready yet when this returns."""
    assert wanted.type is not None
    version = "--runtime-version" if wanted.queued else "--version"
    words = [
        *((*QUEUED, "create") if wanted.queued else (*VM, "create")),
        wanted.name,
        f"--accelerator-type={wanted.type.gcloud_name}",
        f"{version}={wanted.runtime or wanted.type.generation.runtime}",
        "--labels=" + ",".join(f"{key}={value}" for key, value in {**wanted.labels, LABEL: wanted.name}.items()),
    ]
    if wanted.count > 1:
        words += [f"--node-count={wanted.count}", f"--node-prefix={wanted.name}"]
    elif wanted.queued:
        words += [f"--node-id={wanted.name}"]
    words += ["--spot"] * wanted.spot + ["--reserved"] * wanted.reserved
    for flag in ("service_account", "network", "subnetwork"):
        if value := getattr(wanted, flag):
            words.append(f"--{flag.replace('_', '-')}={value}")
    if valid_until:
        words.append(f"--valid-until-duration={valid_until}")
    gcloud.change(*words)


def check_label(found: Slice) -> None:
    if LABEL not in found.labels:
        raise TpuError(
            f"{found.path or found.name} lacks the label {LABEL!r}: python -m tpu did not make it, and does not delete "
            "it. If it is yours, delete it with gcloud."
        )


def delete(gcloud: Gcloud, found: Slice) -> None:
    """Deletes a slice and its VMs. Refuses a slice without the label."""
    check_label(found)
    if found.queued:
        gcloud.change(*QUEUED, "delete", found.name, "--force")  # --force deletes its VMs too
    else:
        gcloud.change(*VM, "delete", found.name)


def find(gcloud: Gcloud, name: str) -> Slice:
    """The slice `name`, as gcloud describes it. On a dry run: one TPU VM that is ready.

    Raises:
      NotFound: no queued resource and no TPU VM has that name.
      CloudError: gcloud failed, so nobody knows whether the slice exists.
    """
    if gcloud.dry_run:
        print(f"# the first two commands look {name} up; the other commands assume one slice that is ready")
        gcloud.read(*QUEUED, "describe", name)
        gcloud.read(*VM, "describe", name)
        return Slice(name, None, state="READY", labels={LABEL: name})
    try:
        found = from_queued(gcloud.read(*QUEUED, "describe", name), name)
        return _with_nodes(gcloud, found) if found.ready else found
    except NotFound:  # only NotFound: after another error, a queued slice's VM would look like one never queued
        pass
    try:
        return from_node(gcloud.read(*VM, "describe", name), name)
    except NotFound:
        where = f" in {gcloud.zone}" if gcloud.zone else ""
        raise NotFound(f"There is no slice {name!r}{where}; python -m tpu status lists the slices.") from None


def _with_nodes(gcloud: Gcloud, found: Slice) -> Slice:
    """The state by its VMs: a queued resource says ACTIVE for a while after one of its VMs was preempted."""
    created = []
    for node in found.nodes:
        try:
            one = from_node(gcloud.read(*VM, "describe", node), node)
        except CloudError:
            continue
        created.append(one.created)
        if one.gone:
            found = dataclasses.replace(found, state=one.state, why=one.why)
    return dataclasses.replace(found, created=min(filter(None, created), default=found.created))


def list_all(gcloud: Gcloud) -> list[Slice]:
    """All slices with the label."""
    nodes = [from_node(answer, "") for answer in gcloud.read(*VM, "list") or [] if not answer.get("queuedResource")]
    queued = [from_queued(answer, "") for answer in gcloud.read(*QUEUED, "list") or []]
    queued = [_with_nodes(gcloud, s) if s.ready and LABEL in s.labels else s for s in queued]
    parts = {node for s in queued for node in s.nodes}
    return [s for s in [*queued, *(n for n in nodes if n.name not in parts)] if LABEL in s.labels]


def from_node(answer: Any, name: str) -> Slice:
    """The slice that `tpu-vm describe` answers. Missing fields keep their defaults."""
    answer = _table(answer)
    scheduling, network = _table(answer.get("schedulingConfig")), _table(answer.get("networkConfig"))
    return Slice(
        name=_last(answer.get("name")) or name,
        type=_type(answer),
        spot=bool(scheduling.get("spot") or scheduling.get("preemptible")),
        reserved=bool(scheduling.get("reserved")),
        runtime=_last(answer.get("runtimeVersion")),
        service_account=_table(answer.get("serviceAccount")).get("email") or "",
        network=network.get("network") or "",
        subnetwork=network.get("subnetwork") or "",
        labels=_table(answer.get("labels")),
        state=_state(answer.get("state")),
        why=answer.get("healthDescription") or "",
        path=answer.get("name") or "",
        created=_time(answer.get("createTime")),
    )


def from_queued(answer: Any, name: str) -> Slice:
    """The slice that `queued-resources describe` answers."""
    answer = _table(answer)
    specs = [_table(spec) for spec in _table(answer.get("tpu")).get("nodeSpec") or []] or [{}]
    first, state, guaranteed = specs[0], answer.get("state"), _table(answer.get("guaranteed"))
    several = _table(first.get("multisliceParams")) or _table(first.get("multiNodeParams"))
    labels = _table(answer.get("labels"))
    for spec in specs:
        labels = labels | _table(_table(spec.get("node")).get("labels"))
    node = from_node(first.get("node"), name)
    return dataclasses.replace(
        node,
        name=_last(answer.get("name")) or name,
        queued=True,
        count=max(len(specs), _number(str(several.get("nodeCount", "")))),
        spot=node.spot or answer.get("spot") is not None,
        reserved=node.reserved or bool(guaranteed.get("reserved") or answer.get("reservationName")),
        labels=labels,
        state=_state(state),
        why=next(iter(_errors(state)), ""),
        path=answer.get("name") or "",
        created=_time(answer.get("createTime")) if _state(state) in READY else None,
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last(path: Any) -> str:
    return str(path or "").rsplit("/", 1)[-1]


def _state(value: Any) -> str:
    """The state, from `state: READY` of a TPU VM or `state: {state: ACTIVE}` of a queued resource."""
    return str((value.get("state") if isinstance(value, dict) else value) or "UNKNOWN").upper()


def _errors(value: Any) -> list[str]:
    """The messages at any depth of `state`, such as failedData.error.message."""
    if not isinstance(value, dict):
        return []
    own = [str(value["message"])] if "message" in value else []
    return own + [message for part in value.values() for message in _errors(part)]


def _type(node: dict[str, Any]) -> Type | None:
    try:
        return parse_type(_last(node.get("acceleratorType")))
    except TpuError:
        return _type_of_topology(_table(node.get("acceleratorConfig")))


def _type_of_topology(config: dict[str, Any]) -> Type | None:
    """The type from {type: V5LITE_POD, topology: 2x4}, the other form in which gcloud answers."""
    generation = {"V4": "v4", "V5LITE_POD": "v5e", "V5P": "v5p", "V6E": "v6e"}.get(str(config.get("type")))
    sides = re.findall(r"\d+", str(config.get("topology", "")))
    if generation is None or not sides:
        return None
    chips = 1
    for side in sides:
        chips *= int(side)
    try:
        return parse_type(f"{generation}-{chips * (2 if generation in ('v4', 'v5p') else 1)}")
    except TpuError:
        return None


def _time(text: Any) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def ssh(found: Slice, command: str = "", workers: str = "all", ssh_flags: Sequence[str] = ()) -> list[str]:
    """The gcloud command that runs `command`, a line for the remote shell, on one worker or on all workers."""
    words = [*(QUEUED if found.count > 1 else VM), "ssh", found.name]
    if found.count > 1:
        words.append(f"--node={'all' if workers == 'all' else 0}")
    words.append(f"--worker={workers}")
    if command:
        words.append(f"--command={command}")
    return [*words, *(f"--ssh-flag={flag}" for flag in ssh_flags)]


def scp(found: Slice, source: str, target: str, workers: str = "all") -> list[str]:
    """The gcloud command that copies a file. The path on the workers begins with NAME:."""
    words = [*(QUEUED if found.count > 1 else VM), "scp", source, target]
    if found.count > 1:
        words.append(f"--node={'all' if workers == 'all' else 0}")
    return [*words, f"--worker={workers}"]
