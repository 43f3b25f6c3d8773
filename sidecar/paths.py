"""What this pod knows of its paths, and when each is probed next."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from pdcoord.protocol.headers import HostPort, format_host_port, parse_host_port
from pdcoord.protocol.paths import PATHS_MAX, PathReport, PathsReport
from pdcoord.protocol.plans import PrefillTarget
from transfer.errors import FailureKind
from transfer.session.messages import ProbeTold

RETRY_S_MIN = 1.0
"""A target that failed is probed again after this, doubled with each failure up to the interval: a path
that is back should be used again sooner than the next round."""
_TEXT_MAX = 200
_KINDS = frozenset(FailureKind)


@dataclass(slots=True, eq=False)
class Path:
    """One prefill target with its last probe.

    Attributes:
        told: None while none has ended.
        told_s: when it ended.
        is_asked: a probe is under way.
    """

    target: PrefillTarget
    kv_address: HostPort
    due_s: float
    probe_count: int = 0
    failure_count: int = 0
    told: ProbeTold | None = None
    told_s: float = 0.0
    is_asked: bool = False

    @property
    def state(self) -> tuple[object, ...]:
        """What is worth a line in the log when it changes."""
        told = self.told
        return () if told is None else (told.failure, told.verdict, told.transport, told.is_degraded)


class PathBook:
    """The paths to all allowed targets.

    Args:
        interval_s: longest time between two probes of a target that answers.
        kv_port: of a target that names none.
        rng: spreads the probes, so that not all sidecars ask one producer at the same time.
    """

    def __init__(self, *, interval_s: float, kv_port: int, rng: Random) -> None:
        self.is_agent_up = False
        self._interval_s = interval_s
        self._kv_port = kv_port
        self._rng = rng
        self._paths: dict[HostPort, Path] = {}

    @property
    def is_warm(self) -> bool:
        """Whether every target has been probed once, with whatever outcome."""
        return all(path.probe_count for path in self._paths.values())

    def sync(self, targets: Iterable[PrefillTarget], now_s: float) -> list[HostPort]:
        """Take on new targets, due at once, and drop the others; the addresses that were dropped."""
        known, self._paths = self._paths, {}
        for target in targets:
            if len(self._paths) == PATHS_MAX:
                break
            kv_address = self._kv_address(target)
            path = known.get(target.address)
            if path is None or path.kv_address != kv_address:
                path = Path(target, kv_address, due_s=now_s)
            self._paths[target.address] = path
        return [address for address in known if address not in self._paths]

    def take_due(self, now_s: float, count_max: int) -> list[Path]:
        """At most so many paths to probe now, the longest due first; each is to be told of exactly once."""
        due = [path for path in self._paths.values() if path.due_s <= now_s and not path.is_asked]
        due.sort(key=lambda path: path.due_s)
        for path in due[:count_max]:
            path.is_asked = True
        return due[:count_max]

    def wait_s(self, now_s: float, wait_s_max: float) -> float:
        """Until the next path is due, at most `wait_s_max`."""
        due_s = min((p.due_s for p in self._paths.values() if not p.is_asked), default=now_s + wait_s_max)
        return min(max(due_s - now_s, 0.0), wait_s_max)

    def note(self, path: Path, told: ProbeTold, now_s: float) -> bool:
        """A probe has ended; whether it says something else than the one before."""
        before = path.state
        path.is_asked = False
        path.told, path.told_s = _sound(told), now_s
        path.probe_count += 1
        path.failure_count = path.failure_count + 1 if path.told.failure else 0
        self.is_agent_up = True
        path.due_s = now_s + self._pause_s(path.failure_count)
        return path.state != before

    def note_agent_lost(self, path: Path, now_s: float) -> bool:
        """This pod's own agent did not answer, which says nothing of the path; whether it did before."""
        path.is_asked = False
        path.due_s = now_s + RETRY_S_MIN
        was_up, self.is_agent_up = self.is_agent_up, False
        return was_up

    def is_current(self, path: Path) -> bool:
        """Whether the path is still one of this book's."""
        return self._paths.get(path.target.address) is path

    def report(self, now_s: float) -> PathsReport:
        """All paths as GET /paths tells them."""
        return PathsReport(
            interval_s=self._interval_s,
            is_agent_up=self.is_agent_up,
            paths=tuple(_report(path, now_s) for path in self._paths.values()),
        )

    def _pause_s(self, failure_count: int) -> float:
        longest_s = self._interval_s
        if failure_count:
            longest_s = min(RETRY_S_MIN * 2.0 ** min(failure_count, 16), self._interval_s)
        return longest_s * self._rng.uniform(0.5, 1.0)

    def _kv_address(self, target: PrefillTarget) -> HostPort:
        host, _ = parse_host_port(target.address)
        return format_host_port(host, self._kv_port if target.kv_port is None else target.kv_port)


def _sound(told: ProbeTold) -> ProbeTold:
    """The same with what came over the network bounded: it goes into logs, labels and reports."""
    is_known = not told.failure or told.failure in _KINDS
    return ProbeTold(
        address=told.address[:_TEXT_MAX],
        failure=told.failure if is_known else FailureKind.MALFORMED.value,
        detail=told.detail[:_TEXT_MAX],
        verdict=told.verdict[:_TEXT_MAX],
        verdict_reason=told.verdict_reason[:_TEXT_MAX],
        backend=told.backend[:_TEXT_MAX],
        transport=told.transport[:_TEXT_MAX],
        is_degraded=told.is_degraded,
        latency_s=_figure(told.latency_s),
        bytes_per_s=_figure(told.bytes_per_s),
        epoch=told.epoch[:_TEXT_MAX],
    )


def _figure(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value >= 0.0 else None


def _report(path: Path, now_s: float) -> PathReport:
    address, told = path.target.address, path.told
    if told is None:
        return PathReport(target=address, kv_address=path.kv_address)
    return PathReport(
        target=address,
        kv_address=path.kv_address,
        probe_count=path.probe_count,
        age_s=max(now_s - path.told_s, 0.0),
        failure=told.failure,
        detail=told.detail,
        verdict=told.verdict,
        verdict_reason=told.verdict_reason,
        backend=told.backend,
        transport=told.transport,
        is_degraded=told.is_degraded,
        latency_s=told.latency_s,
        bandwidth_bytes_per_s=told.bytes_per_s,
    )
