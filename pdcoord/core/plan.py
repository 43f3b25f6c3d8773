"""The choice: legs, path, fallbacks, and why, with the numbers it was made on."""

from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.request import RequestId
from pdcoord.protocol.plans import DialectName, Mode, RungKind
from transfer.verdict import Verdict


class Why(StrEnum):
    """Why the plan is split or colocated; closed, and the reason label of metrics."""

    SPLIT_FASTER = "split-faster"
    SPLIT_ALWAYS = "split-always"
    SPLIT_PREFERRED = "split-preferred"
    SPLIT_ONLY_WAY = "split-only-way"
    COLOCATED_FASTER = "colocated-faster"
    COLOCATED_PREFERRED = "colocated-preferred"
    SAVING_BELOW_NOISE = "saving-below-noise"
    MODE_NEVER = "mode-never"
    NOT_GENERATIVE = "not-generative"
    MANY_CHOICES = "many-choices"
    ONE_ENGINE_CALL = "one-engine-call"
    PROMPT_BELOW_BLOCK = "prompt-below-block"
    PROMPT_BELOW_THRESHOLD = "prompt-below-threshold"
    PREFIX_CACHED = "prefix-cached"
    NO_PREFILL_ENDPOINT = "no-prefill-endpoint"
    NO_OPEN_PATH = "no-open-path"


class DropReason(StrEnum):
    """Why an endpoint or a pair was not a candidate; closed."""

    NOT_READY = "not-ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    AT_LIMIT = "at-limit"
    CANNOT_SERVE_ALONE = "cannot-serve-alone"
    CONTEXT_TOO_LONG = "context-too-long"
    VERDICT_IMPOSSIBLE = "verdict-impossible"
    BREAKER_OPEN = "breaker-open"
    PROBE_FAILED = "probe-failed"
    CANARY_UNTRIED = "canary-untried"
    CANARY_FAILED = "canary-failed"
    BANDWIDTH_UNKNOWN = "bandwidth-unknown"
    BANDWIDTH_TOO_LOW = "bandwidth-too-low"
    EXCLUDED = "excluded"
    NOT_ALLOWED = "not-allowed"
    QUARANTINED = "quarantined"
    """It passes for ready and serves badly; used only where nobody else can serve."""


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class Figures:
    """The prediction behind one candidate; seconds unless the name says otherwise.

    Attributes:
        queue_s: wait before the prefill can start, on whichever endpoint does it.
        transfer_s: 0.0 when colocated.
        stall_s: delay that a prefill beside running streams causes them, summed over the streams.
        slo_excess: how far the prediction is past the objectives, as a ratio, and `harm`; 0.0 within them.
        uncached_tokens: prompt tokens to compute on the endpoint that prefills.
        cached_tokens: prompt tokens expected in that endpoint's prefix cache.
        pace_s: time per output token, with the prefills between that come to the endpoint lately.
        others_s: what prefill, KV and answer cost others, as it counts beside the request's own time.
        harm: requests of others that the prefill is expected to push past their objectives.
        room_s: wait for room in the KV pool of the endpoint that decodes.
        landing_tokens: prompt tokens to be written into that pool.
        unfit: legs on pools that the policy keeps for other priorities, 0..2.
        spread_s: how far the time of prefill and transfer may be from this: about one standard deviation.
    """

    queue_s: float
    prefill_s: float
    transfer_s: float
    step_s: float
    stall_s: float
    slo_excess: float
    cost: float
    uncached_tokens: int
    cached_tokens: int
    transfer_bytes: int = 0
    room_s: float = 0.0
    pace_s: float = 0.0
    harm: float = 0.0
    others_s: float = 0.0
    landing_tokens: int = 0
    unfit: int = 0
    spread_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s + self.transfer_s + self.room_s + self.step_s

    @property
    def split_time_s(self) -> float:
        """What decides whether to split: streams' delay in full, since to spare them is what it is for."""
        return self.ttft_s + self.stall_s

    @property
    def time_s(self) -> float:
        """What is compared: the request's own first token, and what it costs others."""
        return self.ttft_s + self.others_s


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class Candidate:
    """One way to serve a request."""

    decode: Endpoint
    prefill: Endpoint | None
    verdict: Verdict | None
    figures: Figures

    @property
    def mode(self) -> Mode:
        return Mode.COLOCATED if self.prefill is None else Mode.SPLIT


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the fallback ladder that this plan may take."""

    kind: RungKind
    prefill: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice for one request.

    Attributes:
        rungs: the fallbacks the sidecar may take, in order; empty leaves only refuse.
        runner_up: the best candidate of the other mode, or the second best; None if alone.
        drops: how many endpoints and pairs were dropped, by reason.
        is_outage: the request stays together because no path is open; counts as a fallback.
        attempt: 0 for the first plan of a request, one more for each other decode tried.
        replica: the coordinator process that made it; empty where no sidecar tells others of it.
        hedge_after_s: without any output for so long it may be asked of another endpoint too; None for never.
    """

    request_id: RequestId
    chosen: Candidate
    why: Why
    dialect: DialectName
    rungs: tuple[Rung, ...] = ()
    runner_up: Candidate | None = None
    drops: dict[DropReason, int] = field(default_factory=dict)
    prefill_deadline_s: float = 60.0
    transfer_deadline_s: float = 20.0
    attempt: int = 0
    is_outage: bool = False
    replica: str = ""
    hedge_after_s: float | None = None

    @property
    def mode(self) -> Mode:
        return self.chosen.mode

    @property
    def decode(self) -> Endpoint:
        return self.chosen.decode

    @property
    def prefill(self) -> Endpoint | None:
        return self.chosen.prefill

    def endpoint_ids(self) -> set[EndpointId]:
        """Every endpoint that this plan may send work to."""
        endpoints = [self.decode, self.prefill, *(rung.prefill for rung in self.rungs)]
        return {endpoint.id for endpoint in endpoints if endpoint is not None}
