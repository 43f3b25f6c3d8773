"""The fallback section of a policy: what is tried when a leg fails, breaks off, or shows no output."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from pdcoord.policy.values import Milliseconds, Share, Spec
from pdcoord.policy.yamltext import FaultsError
from pdcoord.protocol.plans import RungKind


def _rung(rung: RungKind) -> RungKind:
    if rung is RungKind.REFUSE:
        raise ValueError("is refuse, which always comes last and is not listed; remove it")
    return rung


_RUNGS = [rung.value for rung in RungKind if rung is not RungKind.REFUSE]
LadderRung = Annotated[RungKind, AfterValidator(_rung), Field(json_schema_extra={"enum": _RUNGS})]


class BudgetSpec(Spec):
    """What keeps a prefill outage from becoming a decode outage."""

    colocated_share_max: Share = Field(
        default=1.0,
        description=(
            "Share of requests that may fall back to a prefill on their decode endpoint, 0 to 1; beyond it "
            "they take the next rung. 1 refuses nobody, and a prefill outage slows every stream instead."
        ),
    )
    decode_kv_usage_max: Share = Field(
        default=0.95,
        description=(
            "No such prefill on a decode endpoint whose KV pool is fuller than this, 0 to 1: above 0.95 it "
            "would push running requests out."
        ),
    )
    window_requests: int = Field(
        default=200,
        ge=1,
        le=100_000,
        description="Requests over which the share is counted; 200 tell shares 0.1 apart.",
    )


class ResumeSpec(Spec):
    """Bounds on the resume rung."""

    tries_max: int = Field(
        default=3,
        ge=1,
        le=8,
        description=(
            "Continuations of one stream, those that fail included. 3 outlives a dead pod, one that is "
            "restarting and one more. Those made since an endpoint drained are not counted; with them there "
            "are 16 at most."
        ),
    )
    age_s_max: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description=(
            "A stream whose first byte is longer ago, in s, is not continued: the older it is, the longer "
            "the prompt that it has become. Where its endpoint drains it is, however old."
        ),
    )
    stall_ms_min: Annotated[float, Field(ge=100, le=600_000)] = Field(
        default=10_000.0,
        description=(
            "A stream without a token for so long, in ms, goes on elsewhere, though its engine is reachable: "
            "this, or 100 expected steps if they are longer, and the time of the prompts that its endpoint "
            "has yet to compute. 10000 is more than an engine's longest pause (capturing a graph, making "
            "room by preemption) where prompts are computed in chunks."
        ),
    )


class HedgeSpec(Spec):
    """A second decode endpoint asked beside one that shows no output; who is first serves.

    It is asked when the request's ttft objective leaves it just time enough, or when the first is late; needs
    the rung other-decode.
    """

    share_max: Share = Field(
        default=0.05,
        description=(
            "Share of attempts that may be second ones, 0 to 1, over budget.window_requests; 0 has none. "
            "0.05 does not double the load of a fleet that is slow as a whole. What waits at an endpoint in "
            "quarantine may have one in any case: it is moved rather than doubled."
        ),
    )
    after_ms_min: Milliseconds = Field(
        default=250.0,
        description="No second endpoint is asked before this, in ms: 250 outlasts a pause of an engine.",
    )


class QuarantineSpec(Spec):
    """Endpoints that pass for ready and serve badly."""

    share_max: Share = Field(
        default=0.5,
        description=(
            "Share of the endpoints that could stand in for each other that may be out of the choice at a "
            "time, 0 to 1, rounded down. 0 leaves all in it; 0.5 takes out one of two, never the only one."
        ),
    )


class FallbackSpec(Spec):
    """What is tried, in order, when a leg of a request fails."""

    ladder: tuple[LadderRung, ...] = Field(
        default=(RungKind.OTHER_PREFILL, RungKind.COLOCATED, RungKind.OTHER_DECODE, RungKind.RESUME),
        description=(
            "other-prefill: another prefill endpoint. colocated: prefill on the decode endpoint itself. "
            "other-decode: another decode endpoint. resume: a stream that breaks off in its middle goes on "
            "at another decode endpoint. Each at most once; refuse follows the last."
        ),
    )
    other_prefill_max: int = Field(
        default=2,
        ge=0,
        le=16,
        description="Prefill endpoints to try after the first. 2 outlives one dead pod and one restarting.",
    )
    other_decode_max: int = Field(
        default=2, ge=0, le=16, description="Decode endpoints to try after the first, for the same reason."
    )
    budget: BudgetSpec = Field(default_factory=BudgetSpec, description="Bounds on the colocated rung.")
    resume: ResumeSpec = Field(default_factory=ResumeSpec, description="Bounds on the resume rung.")
    hedge: HedgeSpec = Field(default_factory=HedgeSpec, description="Second attempts before any output.")
    quarantine: QuarantineSpec = Field(
        default_factory=QuarantineSpec, description="Endpoints found at fault by what they serve."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [
            (("ladder", i), f"is {rung} a second time; list it once")
            for i, rung in enumerate(self.ladder)
            if rung in self.ladder[:i]
        ]
        if faults:
            raise FaultsError(faults)
        return self
