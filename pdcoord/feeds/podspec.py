"""A Kubernetes pod to its endpoints, or to the reason why it has none; an InferencePool to its terms.

Formats: Pod v1 (Kubernetes 1.33 to 1.37), llm-d's pod labels (llm-d-router v0.10), InferencePool
inference.networking.k8s.io/v1 (Gateway API inference extension 1.0).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pdcoord.feeds.kubewatch import KubeObject, name_of
from pdcoord.policy.endpoints import EndpointEntrySpec
from pdcoord.policy.errors import quote
from pdcoord.policy.values import Labels
from pdcoord.protocol.headers import HostPort, format_host_port

PREFIX = "pdcoord.io/"
ROLE_LABEL = "llm-d.ai/role"
OWN_ROLE_LABEL = "pdcoord.io/role"
REVISION_LABEL = "pdcoord.io/revision"
DEFAULT_PORT = 8000
PORT_NAME = "http"
LABELS_MAX = 64
RANKS_MAX = 64
POOL_PORTS_MAX = 8
"""InferencePool v1, spec.targetPorts."""

_REVISION_SOURCES = ("pod-template-hash", "controller-revision-hash")
_ROLES = {
    "prefill": "prefill",
    "encode-prefill": "prefill",
    "decode": "decode",
    "encode-decode": "decode",
    "both": "both",
    "prefill-decode": "both",
    "encode-prefill-decode": "both",
}
"""llm-d's roles to the three that a pool has."""
_LABELS = TypeAdapter(Labels)


class SkipReason(StrEnum):
    """Why nothing is sent to a pod; closed, a label of metrics."""

    NOT_RUNNING = "not-running"
    NO_ADDRESS = "no-address"
    NOT_READY = "not-ready"
    NO_LABELS = "no-labels"
    BAD_LABEL = "bad-label"
    BAD_ANNOTATION = "bad-annotation"
    MALFORMED = "malformed"
    REPEATED = "repeated"
    TOO_MANY = "too-many"
    AMBIGUOUS = "ambiguous"
    UNPICKED = "unpicked"

    @property
    def is_fault(self) -> bool:
        """Whether somebody has to change something; the others pass by themselves."""
        return self not in {SkipReason.NOT_RUNNING, SkipReason.NO_ADDRESS, SkipReason.NOT_READY}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A pod that has no endpoints.

    Attributes:
        message: names the value at fault and the remedy; continues the sentence "pod x ...".
    """

    reason: SkipReason
    message: str


@dataclass(frozen=True, slots=True)
class PoolTerms:
    """What an InferencePool says of its pods.

    Attributes:
        match_labels: a pod has all of these.
        ports: each of them on each pod is an endpoint, in the order of ranks; none where pods say it.
    """

    match_labels: Mapping[str, str]
    ports: tuple[int, ...]

    @property
    def selector(self) -> str:
        """As the API takes a label selector."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.match_labels.items()))


class _SkipError(Exception):
    def __init__(self, reason: SkipReason, message: str) -> None:
        super().__init__(message)
        self.skipped = Skipped(reason, message)


def keep_of_pod(pod: KubeObject) -> KubeObject:
    """What `read_pod` reads of a pod, which is a hundredth of it; the rest may change unnoticed."""
    metadata, spec, status = _table(pod, "metadata"), _table(pod, "spec"), _table(pod, "status")
    annotations = _table(metadata, "annotations")
    return {
        "metadata": {
            **{
                key: metadata[key]
                for key in ("name", "uid", "labels", "deletionTimestamp")
                if key in metadata
            },
            "annotations": {key: annotations[key] for key in annotations if str(key).startswith(PREFIX)},
        },
        "spec": {
            kind: [
                {key: given[key] for key in ("name", "restartPolicy", "ports") if key in given}
                for given in _tables(spec, kind)
            ]
            for kind in ("containers", "initContainers")
        },
        "status": {
            **{key: status[key] for key in ("phase", "podIP") if key in status},
            "conditions": [
                {"type": "Ready", "status": given.get("status")}
                for given in _tables(status, "conditions")
                if given.get("type") == "Ready"
            ],
            "initContainerStatuses": [
                {"name": given.get("name"), "ready": given.get("ready")}
                for given in _tables(status, "initContainerStatuses")
            ],
        },
    }


def read_pod(
    pod: KubeObject, ports: tuple[int, ...] = (), *, was_ready: bool = False
) -> tuple[EndpointEntrySpec, ...] | Skipped:
    """The endpoints of a pod, one for each data-parallel rank; draining from its deletion on.

    Args:
        pod: as the API answers it, or `keep_of_pod` of that.
        ports: of its InferencePool, which go before what the pod says.
        was_ready: whether it had endpoints before: then one that is not ready drains, so that what
            runs there finishes and what is known of it stays; else it is left out.
    """
    try:
        return _read_pod(pod, ports, was_ready=was_ready)
    except _SkipError as error:
        return error.skipped


def _read_pod(pod: KubeObject, ports: tuple[int, ...], *, was_ready: bool) -> tuple[EndpointEntrySpec, ...]:
    metadata, status = _table(pod, "metadata"), _table(pod, "status")
    name = name_of(pod)
    if not name:
        raise _SkipError(SkipReason.MALFORMED, "has no metadata.name")
    phase = status.get("phase")
    if phase in ("Succeeded", "Failed"):  # A malformed one may have no hash.
        raise _SkipError(SkipReason.NOT_RUNNING, f"is in phase {phase}")
    host = status.get("podIP")
    if not isinstance(host, str) or not host:
        raise _SkipError(SkipReason.NO_ADDRESS, "has no status.podIP yet")
    is_terminating = bool(metadata.get("deletionTimestamp"))
    unready = _why_unready(pod)
    if unready and not is_terminating and not was_ready:
        raise _SkipError(SkipReason.NOT_READY, unready)
    labels = _labels_of(metadata)
    annotations = _table(metadata, "annotations")
    try:
        return tuple(
            EndpointEntrySpec(
                address=HostPort(format_host_port(host, port)),
                # No pod has an underscore in its name, so none is called what a rank is.
                name=name if rank is None else f"{name}_{rank}",
                labels=labels,
                bootstrap_port=_port(annotations, "bootstrap-port", 0),
                kv_port=_port(annotations, "kv-port", rank),
                metrics_port=_port(annotations, "metrics-port", rank),
                kv_events_port=_port(annotations, "kv-events-port", rank),
                kv_events_replay_port=_port(annotations, "kv-events-replay-port", rank),
                is_draining=is_terminating or unready is not None,
            )
            for rank, port in _ranks(pod, annotations, ports)
        )
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise _SkipError(SkipReason.MALFORMED, f"gives no endpoint: {place}: {fault['msg']}") from error


def _why_unready(pod: KubeObject) -> str | None:
    """Why a pod takes no work: the Ready condition, or a sidecar that runs beside its containers.

    Kubernetes counts native sidecars in Ready, but through a version skew of kubelets not everywhere.
    """
    status = _table(pod, "status")
    ready = [given.get("status") for given in _tables(status, "conditions") if given.get("type") == "Ready"]
    if ready != ["True"]:
        return "is not ready"
    states = _tables(status, "initContainerStatuses")
    running = [given.get("name") for given in states if given.get("ready") is True]
    for container in _tables(_table(pod, "spec"), "initContainers"):
        if container.get("restartPolicy") == "Always" and container.get("name") not in running:
            return f"is not ready: its sidecar {quote(str(container.get('name')))} is not"
    return None


def _labels_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A pod's labels, with its role as pools have it and its revision; ours and llm-d's before the rest."""
    given = _table(metadata, "labels")
    if not given:
        raise _SkipError(SkipReason.NO_LABELS, "has no labels, so no pool's selector can pick it")
    try:
        labels = dict(_LABELS.validate_python(_most_telling(given), strict=True))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"][:1])
        raise _SkipError(SkipReason.BAD_LABEL, f"has a label that is none: {quote(place)}") from error
    role = labels.get(ROLE_LABEL)
    if role is not None:
        if role not in _ROLES:
            expected = ", ".join(_ROLES)
            raise _SkipError(
                SkipReason.BAD_LABEL,
                f"has {ROLE_LABEL}={quote(role)}, which takes no leg; expected {expected}",
            )
        labels.setdefault(OWN_ROLE_LABEL, _ROLES[role])
    revision = _table(metadata, "annotations").get(f"{PREFIX}revision")
    revision = revision or next((labels[key] for key in _REVISION_SOURCES if labels.get(key)), None)
    if revision:
        try:
            labels = _LABELS.validate_python({**labels, REVISION_LABEL: revision}, strict=True)
        except ValidationError as error:
            message = f"has {REVISION_LABEL}={quote(str(revision))}, expected a label's value"
            raise _SkipError(SkipReason.BAD_ANNOTATION, message) from error
    return labels


def _most_telling(labels: Mapping[str, Any]) -> dict[str, Any]:
    """What fits beside the two that are added; an entry has at most `LABELS_MAX`."""
    ours = (PREFIX, "llm-d.ai/", *_REVISION_SOURCES)
    ordered = sorted(labels, key=lambda key: (not str(key).startswith(ours), str(key)))
    return {key: labels[key] for key in ordered[: LABELS_MAX - 2]}


def _ranks(
    pod: KubeObject, annotations: Mapping[str, Any], ports: tuple[int, ...]
) -> Iterator[tuple[int | None, int]]:
    """Ranks with the port of each; one rank alone has no number."""
    if len(ports) > 1:
        yield from enumerate(ports)
        return
    size = _number(annotations, "data-parallel-size", RANKS_MAX) or 1
    first = ports[0] if ports else _port(annotations, "port", 0) or _named_port(pod) or DEFAULT_PORT
    if first + size - 1 > 65_535:
        message = f"has {size} ranks from port {first} on, expected ports up to 65535"
        raise _SkipError(SkipReason.BAD_ANNOTATION, message)
    for rank in range(size):
        yield (rank if size > 1 else None), first + rank


def _named_port(pod: KubeObject) -> int | None:
    """The container port called `http`; a sidecar's goes before the engine's behind it."""
    spec = _table(pod, "spec")
    for container in (*_tables(spec, "initContainers"), *_tables(spec, "containers")):
        for port in _tables(container, "ports"):
            number = port.get("containerPort")
            if port.get("name") == PORT_NAME and isinstance(number, int) and 1 <= number <= 65_535:
                return number
    return None


def _port(annotations: Mapping[str, Any], key: str, rank: int | None) -> int | None:
    """A port that an annotation gives to rank 0; each other has the one after the rank before it."""
    first = _number(annotations, key, 65_535)
    if first is None:
        return None
    if first + (rank or 0) > 65_535:
        message = f"has {PREFIX}{key}={quote(str(first))} for {(rank or 0) + 1} ranks, expected up to 65535"
        raise _SkipError(SkipReason.BAD_ANNOTATION, message)
    return first + (rank or 0)


def _number(annotations: Mapping[str, Any], key: str, number_max: int) -> int | None:
    text = annotations.get(f"{PREFIX}{key}")
    if text is None:
        return None
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 7:
        number = int(text)
        if 1 <= number <= number_max:
            return number
    message = f"has {PREFIX}{key}={quote(str(text))}, expected a whole number from 1 to {number_max}"
    raise _SkipError(SkipReason.BAD_ANNOTATION, message)


def read_inference_pool(pool: KubeObject) -> PoolTerms | str:
    """The terms of an InferencePool v1, or what is wrong with it."""
    spec = _table(pool, "spec")
    match_labels = _table(_table(spec, "selector"), "matchLabels")
    if not match_labels:
        return "spec.selector.matchLabels is empty, expected the labels of the pool's pods"
    try:
        labels = dict(_LABELS.validate_python(dict(match_labels), strict=True))
    except ValidationError:
        return "spec.selector.matchLabels has what is no label"
    ports = [given.get("number") for given in _tables(spec, "targetPorts")]
    is_sound = all(type(port) is int and 1 <= port <= 65_535 for port in ports)
    if not is_sound or not 1 <= len(ports) <= POOL_PORTS_MAX or len(set(ports)) < len(ports):
        return (
            f"spec.targetPorts is {quote(str(ports))}, expected 1 to {POOL_PORTS_MAX} different port numbers"
        )
    return PoolTerms(labels, tuple(port for port in ports if isinstance(port, int)))


def _table(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = given.get(key)
    return found if isinstance(found, Mapping) else {}


def _tables(given: Mapping[str, Any], key: str) -> Iterable[Mapping[str, Any]]:
    found = given.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []
