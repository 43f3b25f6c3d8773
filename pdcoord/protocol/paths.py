"""What a sidecar tells of its paths: GET /paths on its metrics listener, as JSON."""

import msgspec

from pdcoord.protocol.headers import HostPort

REPORT_VERSION = 1
PATHS_MAX = 4_096
"""Paths in one report; a longer one is refused."""


class PathReport(msgspec.Struct, frozen=True, kw_only=True):
    """The last probe of one path.

    Attributes:
        target: the prefill address, as plans and the allowlist name it.
        kv_address: the KV side channel that was probed.
        probe_count: probes of this target so far; 0 while none has ended, and then the rest says nothing.
        age_s: time since the probe ended.
        failure: a `FailureKind` of transfer; empty if the known pattern came and was right.
        verdict: a `VerdictKind` as the engines themselves judged; empty if the producer did not answer.
        transport: what really carried the bytes.
        is_degraded: the transport is not one that the settings asked for.
    """

    target: HostPort
    kv_address: HostPort
    probe_count: int = 0
    age_s: float = 0.0
    failure: str = ""
    detail: str = ""
    verdict: str = ""
    verdict_reason: str = ""
    backend: str = ""
    transport: str = ""
    is_degraded: bool = False
    latency_s: float | None = None
    bandwidth_bytes_per_s: float | None = None


class ToldPath(msgspec.Struct, frozen=True, kw_only=True):
    """A path as a coordinator replica sees it, told over the control stream.

    Attributes:
        breaker: closed, open or half-open.
        is_connected: whether its stream is up; what it told holds for a while after that.
    """

    replica: str
    target: HostPort
    verdict: str
    verdict_reason: str
    breaker: str
    is_connected: bool


class PathsReport(msgspec.Struct, frozen=True, kw_only=True):
    """All paths of one sidecar.

    Attributes:
        interval_s: between two probes of a path; a report that is some of them old says nothing any more.
        is_agent_up: whether the agent inside this pod's engine answered when it was last asked.
        told: what coordinators say of paths.
    """

    interval_s: float
    is_agent_up: bool
    paths: tuple[PathReport, ...] = ()
    told: tuple[ToldPath, ...] = ()
    version: int = REPORT_VERSION


_decoder = msgspec.json.Decoder(PathsReport)


def encode_paths(report: PathsReport) -> bytes:
    return msgspec.json.encode(report)


def decode_paths(raw: bytes) -> PathsReport | None:
    """Read a report; None if it is malformed, of another version, or has figures that no path can have."""
    try:
        report = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    is_known = report.version == REPORT_VERSION and len(report.paths) <= PATHS_MAX
    if not is_known or not report.interval_s > 0.0 or not all(map(_is_sound, report.paths)):
        return None
    return report


def _is_sound(path: PathReport) -> bool:
    figures = (path.age_s, path.latency_s or 0.0, path.bandwidth_bytes_per_s or 0.0)
    return path.probe_count >= 0 and all(figure >= 0.0 for figure in figures)
