"""What the admin listener says of endpoints, paths and the policy, as JSON: in words of the glossary.

Times are milliseconds; moments are ages, since the process's clock means nothing outside it.
"""

from typing import Any

import msgspec

from pdcoord.core.canary import CanaryView
from pdcoord.core.doubts import Doubt
from pdcoord.core.fleet import EndpointState
from pdcoord.core.ledger import Load
from pdcoord.core.model import Model
from pdcoord.core.pathview import PathView, layout_words
from pdcoord.core.probes import Probe
from pdcoord.core.trouble import Phase, Trouble

_GBIT_PER_BYTE = 8e-9


class QuarantineView(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint of which requests tell something bad.

    Attributes:
        phase: suspected, out, or readmitting.
        reason: the symptom that it is out for, or the last one.
        age_ms: of the phase.
        out_ms: how long it is or was out the last time; 0 before the first.
        left_ms: until a request is let in; 0 where it may be now.
        requests_max: that may be on trial there at a time, while it is being readmitted; None else.
    """

    phase: str
    reason: str
    age_ms: float
    out_ms: float
    left_ms: float
    requests_max: int | None


class EndpointView(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint with its last signals and the coordinator's own account of it.

    Attributes:
        doubt: why its own metrics are not believed; running, waiting and kv_usage are the account's then.
    """

    id: str
    model: str
    pool: str
    vendor: str
    role: str
    engine: str
    address: str
    health: str
    running: int | None
    waiting: int | None
    kv_usage: float | None
    sample_age_ms: float | None
    failed_samples: int
    requests: int
    pending_prefill_ms: float
    bytes_in_flight: int
    quarantine: QuarantineView | None
    doubt: str | None


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /fleet."""

    endpoints: list[EndpointView]


class ProbeView(msgspec.Struct, frozen=True, kw_only=True):
    """The last probe of a path, as the decode endpoint's sidecar told of it.

    Attributes:
        is_fresh: decisions heed it; a stale one is only shown.
        is_usable: nothing of it speaks against the path.
        failure: why the known pattern did not come; empty if it did.
        verdict: as the engines themselves judged; empty if the producer did not answer.
    """

    is_fresh: bool
    is_usable: bool
    failure: str
    detail: str
    verdict: str
    verdict_reason: str
    transport: str
    is_degraded: bool
    latency_ms: float | None
    bandwidth_gbit_per_s: float | None
    age_ms: float


class CanaryRow(msgspec.Struct, frozen=True, kw_only=True):
    """What canaries say of a path whose pools are unlike.

    Attributes:
        state: of the pair of pools: untried, passed, unproven, failed, unjudged.
        fault: why the path is shut, or would be were canaries enforced; empty if nothing speaks against it.
        detail: of the pair's last canary that said something; `position` is the output token, from 0, at
            which its answers parted first.
    """

    state: str
    is_enforced: bool
    fault: str
    detail: str
    position: int | None
    age_ms: float | None
    prefill_layout: str
    decode_layout: str


class PathRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of endpoints that could be a path.

    Attributes:
        breaker: open too where the last probe or its canary shuts the path; `fault` says why then, else it
            is empty.
        canary: None where the pools are alike, and where canaries are off.
        bandwidth_gbit_per_s: what decisions count with: of the policy, no more than measured lately.
        probe: None if nobody probed the path, or told of it.
    """

    prefill: str
    decode: str
    verdict: str
    verdict_reason: str
    breaker: str
    fault: str
    bandwidth_gbit_per_s: float
    bytes_in_flight: int
    probe: ProbeView | None
    canary: CanaryRow | None


class PathsView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /paths.

    Attributes:
        total: paths there are; `paths` holds at most the limit that was asked for.
    """

    total: int
    paths: list[PathRow]


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /policy.

    Attributes:
        models: as compiled, defaults filled in; times in seconds and sizes in bytes, as the core has them.
        problems: why what a file holds now is not in force, by file; empty when all is.
    """

    models: list[dict[str, Any]]
    warnings: list[str]
    problems: dict[str, list[str]]


def endpoint_view(
    state: EndpointState, load: Load, trouble: Trouble | None, doubt: Doubt | None, *, now_s: float
) -> EndpointView:
    endpoint, sample = state.endpoint, state.sample
    return EndpointView(
        id=endpoint.id,
        model=endpoint.pool.model,
        pool=endpoint.pool.name,
        vendor=endpoint.pool.vendor,
        role=endpoint.pool.role,
        engine=endpoint.pool.engine,
        address=endpoint.address,
        health=state.health,
        running=sample.running if sample is not None else None,
        waiting=sample.waiting if sample is not None else None,
        kv_usage=sample.kv_usage if sample is not None else None,
        sample_age_ms=(now_s - sample.at_s) * 1e3 if sample is not None else None,
        failed_samples=state.unreachable_count,
        requests=load.request_count,
        pending_prefill_ms=load.pending_prefill_s(now_s) * 1e3,
        bytes_in_flight=load.bytes_in_flight,
        quarantine=None if trouble is None else _quarantine_view(trouble, now_s),
        doubt=doubt,
    )


def _quarantine_view(trouble: Trouble, now_s: float) -> QuarantineView:
    is_out, is_back = trouble.phase is Phase.OUT, trouble.phase is Phase.READMITTING
    return QuarantineView(
        phase=trouble.phase,
        reason=trouble.symptom,
        age_ms=(now_s - trouble.since_s) * 1e3,
        out_ms=trouble.out_s * 1e3,
        left_ms=max(trouble.until_s - now_s, 0.0) * 1e3 if is_out else 0.0,
        requests_max=trouble.limit if is_back else None,
    )


def path_row(view: PathView, now_s: float) -> PathRow:
    return PathRow(
        prefill=view.prefill.id,
        decode=view.decode.id,
        verdict=view.verdict.kind,
        verdict_reason=view.verdict.reason,
        breaker=view.state,
        fault=view.fault,
        bandwidth_gbit_per_s=view.bandwidth_bytes_per_s * _GBIT_PER_BYTE,
        bytes_in_flight=view.bytes_in_flight,
        probe=None if view.probe is None else _probe_view(view.probe, now_s),
        canary=None if view.canary is None else _canary_row(view.canary),
    )


def _canary_row(canary: CanaryView) -> CanaryRow:
    finding = canary.finding
    return CanaryRow(
        state=canary.state,
        is_enforced=canary.is_enforced,
        fault=canary.fault,
        detail=finding.detail if finding is not None else "",
        position=finding.position if finding is not None else None,
        age_ms=None if canary.age_s is None else canary.age_s * 1e3,
        prefill_layout=layout_words(canary.prefill),
        decode_layout=layout_words(canary.decode),
    )


def _probe_view(probe: Probe, now_s: float) -> ProbeView:
    latency, bandwidth = probe.latency_s, probe.bandwidth_bytes_per_s
    return ProbeView(
        is_fresh=probe.is_fresh(now_s),
        is_usable=not probe.fault,
        failure=probe.failure,
        detail=probe.detail,
        verdict=probe.verdict,
        verdict_reason=probe.verdict_reason,
        transport=probe.transport,
        is_degraded=probe.is_degraded,
        latency_ms=None if latency is None else latency * 1e3,
        bandwidth_gbit_per_s=None if bandwidth is None else bandwidth * _GBIT_PER_BYTE,
        age_ms=(now_s - probe.at_s) * 1e3,
    )


def model_document(model: Model) -> dict[str, Any]:
    """A compiled model as plain data; endpoints are the fleet's, not the policy's."""
    document: dict[str, Any] = msgspec.to_builtins(model)
    return document
