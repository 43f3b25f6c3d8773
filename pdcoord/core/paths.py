"""Paths between prefill and decode endpoints: verdict, breaker and last probe of each."""

from collections import Counter
from collections.abc import Collection, Container
from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.bandwidths import PathBandwidths
from pdcoord.core.costs import PathFigures
from pdcoord.core.fleet import EndpointId, EngineKind, PathKey, Pool, Role
from pdcoord.core.gates import CanaryGates
from pdcoord.core.probes import Probe, ProbeState
from pdcoord.core.request import RequestId
from pdcoord.protocol.errors import RungReason
from transfer.verdict import Side, Verdict, VerdictKind, verdict

FAILURES_MAX = 3
"""Failures in a row that open a path; one timeout may be chance, three in a row are not."""
OPEN_S_MIN = 1.0
OPEN_S_MAX = 60.0
"""How long a path stays open (closed to traffic) before a probe: doubled with each failed probe."""

PROBES_MAX = 1 << 18
"""Paths of which the last probe is kept, some 60 MB; the probes of further ones are not looked at."""
POOL_PAIRS_MAX = 4_096
"""Pairs of pools whose verdicts are at hand; of more, all are looked up anew."""
SWEEP_S = 10.0
"""Time between two looks for probes that say nothing any more."""

# Overload is not a failure of the path (an open breaker under load turns a slow fleet into a dead
# one), and neither is anything the decode side did after the KV arrived. A target that a sidecar may not
# dial says nothing of the path: a new pod can be planned with before the sidecar is told of it.
_FAILURES: dict[RungReason, int] = {
    RungReason.PREFILL_UNREACHABLE: FAILURES_MAX,
    RungReason.PREFILL_TIMEOUT: 1,
    RungReason.PREFILL_ERROR: 1,
    RungReason.PREFILL_NO_TICKET: 1,
    RungReason.TRANSFER_FAILED: 1,
    RungReason.TRANSFER_TIMEOUT: 1,
}


class BreakerState(StrEnum):
    """Closed lets traffic pass; half-open lets one request probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True)
class Breaker:
    """Circuit breaker of one path.

    Attributes:
        failure_count: failures in a row, weighted.
        open_s: length of the current or last open period.
        open_until_s: when a request may try it; meaningful once tripped.
        failed_s: when the last failure was heard of.
        probe: the request that tries a tripped path, while it is under way.
    """

    failure_count: int = 0
    open_s: float = 0.0
    open_until_s: float = 0.0
    failed_s: float = 0.0
    is_tripped: bool = False
    probe: RequestId | None = None

    def state(self, now_s: float) -> BreakerState:
        if not self.is_tripped:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now_s >= self.open_until_s else BreakerState.OPEN

    def lets_pass(self, now_s: float) -> bool:
        if not self.is_tripped:
            return True
        return now_s >= self.open_until_s and self.probe is None

    def begin(self, request_id: RequestId) -> None:
        """A request was sent over this path; where it is tripped that is the probe."""
        if self.is_tripped:
            self.probe = request_id

    def fail(self, weight: int, request_id: RequestId, now_s: float) -> None:
        if self.is_tripped and self.probe != request_id:
            # Sent before the path opened: old news, and a burst of it is still one failure.
            return
        self.failure_count += weight
        self.failed_s = now_s
        self.probe = None
        if self.is_tripped or self.failure_count >= FAILURES_MAX:
            self.is_tripped = True
            self.open_s = min(max(self.open_s * 2.0, OPEN_S_MIN), OPEN_S_MAX)
            self.open_until_s = now_s + self.open_s

    def trip(self, open_s: float, now_s: float) -> None:
        """Open for this long, whatever was counted."""
        self.is_tripped = True
        self.probe = None
        self.failed_s = now_s
        self.open_s = open_s
        self.open_until_s = now_s + open_s

    def abandon(self, request_id: RequestId) -> None:
        if self.probe == request_id:
            self.probe = None

    def retry_after(self, good_s: float) -> None:
        """A sidecar's probe was good: what failed before it may be tried again at once.

        Not closed: a probe does not compute a prompt, so it cannot tell whether the prefill leg works.
        """
        if self.failed_s < good_s:
            self.open_until_s = min(self.open_until_s, good_s)


class PathTable:
    """Verdicts by pair of pools; breakers and last probes by pair of endpoints.

    Only paths that failed since their last success have a breaker, so memory follows trouble, not
    the square of the fleet. Probes do follow the square where sidecars probe; their number is bounded.

    Attributes:
        gates: what canaries keep shut besides; sidecars are not told, or no canary could open it again.
    """

    def __init__(self) -> None:
        self.gates = CanaryGates()
        self._verdicts: dict[tuple[Side, Side], Verdict] = {}
        self._of_pools: dict[tuple[int, int], tuple[Pool, Pool, Verdict]] = {}
        self._breakers: dict[PathKey, Breaker] = {}
        self._probes: dict[PathKey, Probe] = {}
        self._slow: set[PathKey] = set()
        self._troubled_paths: set[PathKey] = set()
        self._trouble_counts: dict[EndpointId, int] = {}
        self._silent_s: dict[PathKey, float] = {}
        self._bandwidths = PathBandwidths()
        self._swept_s = 0.0

    @property
    def has_measured(self) -> bool:
        """Whether `figures` may say anything but what it is given."""
        return bool(self._probes) or self._bandwidths.has_short

    @property
    def breaker_count(self) -> int:
        return len(self._breakers)

    @property
    def probe_count(self) -> int:
        return len(self._probes)

    @property
    def troubled(self) -> Collection[EndpointId]:
        """Endpoints with a path that is tripped, shut by a probe or canary, or slow by probes or transfers.

        Every path between others lets requests pass and is as fast as its pools' links, or nearly so.
        """
        shut = self.gates.endpoints
        return self._trouble_counts.keys() | shut if shut else self._trouble_counts

    def verdict(self, prefill: Pool, decode: Pool) -> Verdict:
        """What the layouts of two pools allow; also impossible where the engines differ in dialect."""
        if prefill.engine is not decode.engine:
            return _engines_differ(prefill, decode)
        if prefill.engine is EngineKind.SGLANG and (prefill.role, decode.role) != _SGLANG_ROLES:
            return _SGLANG_MODES
        # A side's hash is that of all its fields: too slow for every decision. The pools are kept with the
        # verdict, so that their ids are not others'.
        key = (id(prefill), id(decode))
        known = self._of_pools.get(key)
        if known is not None:
            return known[2]
        pair = (prefill.side, decode.side)
        found = self._verdicts.get(pair)
        if found is None:
            found = self._verdicts[pair] = verdict(*pair)
        if len(self._of_pools) >= POOL_PAIRS_MAX:
            self._of_pools.clear()
        self._of_pools[key] = prefill, decode, found
        return found

    def state(self, prefill: EndpointId, decode: EndpointId, now_s: float) -> BreakerState:
        if self.fault(prefill, decode, now_s):
            return BreakerState.OPEN
        breaker = self._breakers.get((prefill, decode))
        return BreakerState.CLOSED if breaker is None else breaker.state(now_s)

    def fault(self, prefill: EndpointId, decode: EndpointId, now_s: float) -> str:
        """Why the last probe shuts the path: a FailureKind or `impossible`; empty if it does not."""
        probe = self._probes.get((prefill, decode))
        return probe.fault if probe is not None and probe.is_fresh(now_s) else ""

    def probe(self, prefill: EndpointId, decode: EndpointId) -> Probe | None:
        """The last probe, be it fresh or not."""
        return self._probes.get((prefill, decode))

    def probe_states(self, now_s: float) -> Counter[ProbeState]:
        """How many probed paths are in which state."""
        return Counter(self._probe_state(path, probe, now_s) for path, probe in self._probes.items())

    def _probe_state(self, path: PathKey, probe: Probe, now_s: float) -> ProbeState:
        if not probe.is_fresh(now_s):
            return ProbeState.STALE
        if probe.fault:
            return ProbeState.SHUT
        return ProbeState.SLOW if path in self._slow else ProbeState.GOOD

    def figures(
        self, prefill: EndpointId, decode: EndpointId, seeded: PathFigures, now_s: float
    ) -> PathFigures:
        """The policy's figures of a path, no better than what was measured lately."""
        path = (prefill, decode)
        figures, probe = seeded, self._probes.get(path)
        if probe is not None and probe.is_fresh(now_s):
            figures = probe.cap(figures)
        return self._bandwidths.cap(path, figures, now_s) if self._bandwidths.has_short else figures

    def lets_pass(self, prefill: EndpointId, decode: EndpointId, now_s: float) -> bool:
        if self.fault(prefill, decode, now_s):
            return False
        breaker = self._breakers.get((prefill, decode))
        return breaker is None or breaker.lets_pass(now_s)

    def begin(self, prefill: EndpointId, decode: EndpointId, request_id: RequestId) -> None:
        """A request was sent over this path."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.begin(request_id)

    def succeed(self, prefill: EndpointId, decode: EndpointId) -> None:
        """A sidecar says that KV came over this path; of one that fails silently it cannot know."""
        path = (prefill, decode)
        if path not in self._silent_s:
            self._drop(path)
        elif (breaker := self._breakers.get(path)) is not None:
            breaker.probe = None

    def note_probe(self, path: PathKey, probe: Probe, *, is_slow: bool, now_s: float) -> None:
        """A sidecar probed this path; `is_slow` as `Probe.is_slow` says beside the policy's figures."""
        self._sweep(now_s)
        known = self._probes.get(path)
        is_old = known is not None and probe.at_s <= known.at_s
        is_full = known is None and len(self._probes) >= PROBES_MAX
        if is_old or is_full or probe.tells_nothing or not probe.is_fresh(now_s):
            return
        self._probes[path] = probe
        (self._slow.add if is_slow else self._slow.discard)(path)
        breaker = self._breakers.get(path)
        if breaker is not None and not probe.fault:
            breaker.retry_after(probe.at_s)
        self._count_trouble(path)

    def note_transfer(
        self,
        path: PathKey,
        bytes_per_s: float,
        *,
        seeded_bytes_per_s: float,
        bytes_per_s_min: float,
        now_s: float,
    ) -> None:
        """KV came over this path at so many bytes a second; all above 0 but the least that is used."""
        learn = self._bandwidths.learn
        learn(path, bytes_per_s, seeded=seeded_bytes_per_s, bytes_per_s_min=bytes_per_s_min, now_s=now_s)
        self._count_trouble(path)
        for old in self._bandwidths.surplus(now_s):
            self._drop_bandwidth(old)

    def fail(self, path: PathKey, reason: RungReason, request_id: RequestId, now_s: float) -> None:
        """A leg over this path was given up; reasons that are not the path's fault end a probe only."""
        weight = _FAILURES.get(reason, 0)
        if not weight:
            self.abandon(*path, request_id)
            return
        self._breakers.setdefault(path, Breaker()).fail(weight, request_id, now_s)
        self._count_trouble(path)

    def fail_silently(self, path: PathKey, now_s: float) -> None:
        """The decode engine's own counters say that KV does not come over this path.

        Opens it at once, for twice as long as the last time: sidecars see good answers meanwhile, so that
        what they tell must not make it short again.
        """
        open_s = min(max(self._silent_s.get(path, 0.0) * 2.0, OPEN_S_MIN), OPEN_S_MAX)
        self._silent_s[path] = open_s
        self._breakers.setdefault(path, Breaker()).trip(open_s, now_s)
        self._count_trouble(path)

    def work_silently(self, path: PathKey) -> None:
        """They say that it does: a path that was opened for them is closed."""
        if self._silent_s.pop(path, None) is not None:
            self._drop(path)

    def abandon(self, prefill: EndpointId, decode: EndpointId, request_id: RequestId) -> None:
        """A request over this path ended without telling whether the path works."""
        breaker = self._breakers.get((prefill, decode))
        if breaker is not None:
            breaker.abandon(request_id)

    def forget(self, endpoint_id: EndpointId) -> None:
        """The endpoint is gone, and with it every path it was part of."""
        for path in [path for path in self._breakers.keys() | self._probes.keys() if endpoint_id in path]:
            self._breakers.pop(path, None)
            self._drop_probe(path)
        for path in [path for path in self._silent_s if endpoint_id in path]:
            del self._silent_s[path]
        for path in self._bandwidths.of(endpoint_id):
            self._drop_bandwidth(path)

    def forget_verdicts(self) -> None:
        """Layouts may have changed with a new policy."""
        self._verdicts.clear()
        self._of_pools.clear()

    def validate(self, endpoints: Container[EndpointId], live: Container[RequestId]) -> None:
        """Assert that breakers are of endpoints that exist, and probes of requests under way."""
        for path in (*self._breakers, *self._probes, *self._silent_s):
            assert all(endpoint_id in endpoints for endpoint_id in path), f"{path}: no path of this fleet"
        for path, breaker in self._breakers.items():
            assert breaker.probe is None or breaker.is_tripped, f"{path}: a probe of a closed path"
            assert breaker.probe is None or breaker.probe in live, f"{path}: its probe has ended"
        assert self._slow <= self._probes.keys(), "a slow path that was not probed"
        assert len(self._probes) <= PROBES_MAX, "too many probes"
        self._bandwidths.validate(endpoints)
        known = {path for endpoint_id in self._trouble_counts for path in self._bandwidths.of(endpoint_id)}
        known |= self._breakers.keys() | self._probes.keys()
        troubled = {path for path in known if self._is_troubled(path)}
        assert troubled == self._troubled_paths, "the troubled paths are wrong"
        counts = Counter(endpoint_id for path in troubled for endpoint_id in path)
        assert counts == self._trouble_counts, "the count of troubled paths is wrong"

    def _drop(self, path: PathKey) -> None:
        if self._breakers.pop(path, None) is not None:
            self._count_trouble(path)

    def _drop_probe(self, path: PathKey) -> None:
        self._probes.pop(path, None)
        self._slow.discard(path)
        self._count_trouble(path)

    def _drop_bandwidth(self, path: PathKey) -> None:
        self._bandwidths.forget(path)
        self._count_trouble(path)

    def _sweep(self, now_s: float) -> None:
        """Forget probes that say nothing any more, now and then."""
        if now_s < self._swept_s + SWEEP_S:
            return
        self._swept_s = now_s
        for path in [path for path, probe in self._probes.items() if not probe.is_fresh(now_s)]:
            self._drop_probe(path)
        for path in self._bandwidths.surplus(now_s):
            self._drop_bandwidth(path)

    def _is_troubled(self, path: PathKey) -> bool:
        breaker, probe = self._breakers.get(path), self._probes.get(path)
        is_tripped = breaker is not None and breaker.is_tripped
        is_slow = path in self._slow or self._bandwidths.is_slow(path)
        return is_tripped or is_slow or (probe is not None and bool(probe.fault))

    def _count_trouble(self, path: PathKey) -> None:
        """Keep `troubled` true to this path."""
        is_troubled = self._is_troubled(path)
        if is_troubled == (path in self._troubled_paths):
            return
        (self._troubled_paths.add if is_troubled else self._troubled_paths.discard)(path)
        for endpoint_id in path:
            count = self._trouble_counts.pop(endpoint_id, 0) + (1 if is_troubled else -1)
            if count:
                self._trouble_counts[endpoint_id] = count


_SGLANG_ROLES = (Role.PREFILL, Role.DECODE)
# SGLang 0.5.23 starts a worker in one mode: prefill, decode, or null, which serves alone and knows no rooms.
_SGLANG_MODES = Verdict(
    VerdictKind.IMPOSSIBLE,
    "sglang hands over from a prefill worker to a decode worker only, not from or to both",
)


def _engines_differ(prefill: Pool, decode: Pool) -> Verdict:
    return Verdict(
        VerdictKind.IMPOSSIBLE, f"a {prefill.engine} prefill cannot hand over to a {decode.engine} decode"
    )
