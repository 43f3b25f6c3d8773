"""The plan as it travels to a sidecar in a header, and what the sidecar says it did."""

from enum import StrEnum

import msgspec

from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort

PLAN_VERSION = 1
LOAD_FIGURE_MAX = 1 << 50
KV_PORT = 14_579
"""KV side channel of a prefill engine that names none: the default of vLLM's `kv_port`."""


class Mode(StrEnum):
    """How a request is served."""

    SPLIT = "split"
    COLOCATED = "colocated"


class DialectName(StrEnum):
    """The wire habits of a pair of engines when they hand KV over.

    nixlv2 is sequential: any vLLM connector that answers a prefill leg with a ticket, ours included. pdcoord
    is our connector with both legs sent at once, as sglang always sends them.
    """

    NIXLV2 = "nixlv2"
    SGLANG = "sglang"
    PDCOORD = "pdcoord"


class RungKind(StrEnum):
    """Steps of the fallback ladder, in the order they are taken; refuse is always the last.

    resume: a stream that broke off in its middle goes on at another decode endpoint.
    """

    OTHER_PREFILL = "other-prefill"
    OTHER_DECODE = "other-decode"
    COLOCATED = "colocated"
    RESUME = "resume"
    REFUSE = "refuse"


class PrefillTarget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a prefill leg may go.

    Attributes:
        bootstrap_port: SGLang's rendezvous port on the prefill host; unused by the others.
        kv_port: pdcoord's KV side channel on the prefill host; None for the sidecar's default, KV_PORT.
    """

    address: HostPort
    bootstrap_port: int | None = None
    kv_port: int | None = None


class PlannedLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request is expected to cost, so that its sidecar can tell other coordinators.

    Attributes:
        replica: the coordinator process that planned it; empty if none of ours did.
        model: the policy's name of it, aliases resolved.
        prefill_us: predicted work of the prefill, in whole microseconds.
        landing_tokens: prompt tokens to be written into the decode endpoint's KV pool.
        transfer_bytes: KV to move; 0 when colocated.
    """

    replica: str = ""
    model: str = ""
    prefill_us: int = 0
    prompt_tokens: int = 0
    landing_tokens: int = 0
    transfer_bytes: int = 0


class PlanHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the coordinator asks of a sidecar for one request.

    Attributes:
        prefills: prefill targets in the order to try; empty means serve colocated.
        is_colocated_allowed: whether the sidecar may fall back to its own engine's prefill.
        prefill_deadline_ms: longest wait for one prefill leg's answer.
        transfer_deadline_ms: longest wait from sending the decode leg to its first byte; shorter
            than the producer's lease.
        load: for the control stream; None where the coordinator has none.
        is_resumed_above: whoever sent this continues a stream that breaks off, so the sidecar breaks off
            without an error event, and before its grace period ends.
        is_ended_above: whoever sent this cannot continue the stream but says why, so the sidecar breaks off
            without an error event of its own.
        resumes: decode endpoints at which the sidecar may continue a stream that its engine lost, in the
            order to try; empty where it is resumed above, or not at all.
        resume_tries_max: continuations of one stream.
        resume_age_ms_max: a stream that is older is not continued.
        resume_stall_ms: longest time in which a stream that may be continued makes no progress.
    """

    prefills: tuple[PrefillTarget, ...] = ()
    dialect: DialectName = DialectName.NIXLV2
    is_colocated_allowed: bool = True
    prefill_deadline_ms: float = 60_000.0
    transfer_deadline_ms: float = 20_000.0
    version: int = PLAN_VERSION
    load: PlannedLoad | None = None
    is_resumed_above: bool = False
    is_ended_above: bool = False
    resumes: tuple[HostPort, ...] = ()
    resume_tries_max: int = 0
    resume_age_ms_max: float = 600_000.0
    resume_stall_ms: float = 10_000.0


class RungTaken(msgspec.Struct, frozen=True, kw_only=True):
    """One fallback: which leg failed at which target, why, and what was done next.

    Attributes:
        target: of a transfer that failed the prefill pod that the KV was to come from.
    """

    rung: RungKind
    reason: RungReason
    target: HostPort


class ServedHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the sidecar did by the time the response's first byte was ready.

    Attributes:
        prefill: the prefill pod whose KV was used; None when colocated.
        rungs: fallbacks taken, in order.
        prefill_ms: from sending the prefill leg to its answer, of the leg that was used.
        transfer_ms: from sending the decode leg to its first byte, with the first step included.
        cached_tokens: the prefill engine's own count of prompt tokens it had cached.
    """

    mode: Mode
    prefill: HostPort | None = None
    rungs: tuple[RungTaken, ...] = ()
    prefill_ms: float | None = None
    transfer_ms: float | None = None
    cached_tokens: int | None = None


class PlanHeaderError(ValueError):
    """The plan header is not one that this version can execute."""


_plan_decoder = msgspec.json.Decoder(PlanHeader)
_served_decoder = msgspec.json.Decoder(ServedHeader)


def encode_plan(plan: PlanHeader) -> bytes:
    return msgspec.json.encode(plan)


def decode_plan(raw: bytes) -> PlanHeader:
    """Read a plan header.

    Raises:
        PlanHeaderError: if it is malformed or of another version.
    """
    try:
        plan = _plan_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanHeaderError(f"x-pdcoord-plan: {error}") from error
    if plan.version != PLAN_VERSION:
        raise PlanHeaderError(f"x-pdcoord-plan: version is {plan.version}, expected {PLAN_VERSION}")
    if plan.prefill_deadline_ms <= 0 or plan.transfer_deadline_ms <= 0:
        raise PlanHeaderError("x-pdcoord-plan: a deadline is not positive")
    if plan.resume_tries_max < 0 or plan.resume_age_ms_max <= 0 or plan.resume_stall_ms <= 0:
        raise PlanHeaderError("x-pdcoord-plan: a bound of resuming is not positive")
    if plan.load is not None and not _is_sane(plan.load):
        raise PlanHeaderError("x-pdcoord-plan: a figure of the load is negative or beyond reason")
    return plan


def _is_sane(load: PlannedLoad) -> bool:
    figures = (load.prefill_us, load.prompt_tokens, load.landing_tokens, load.transfer_bytes)
    return min(figures) >= 0 and max(figures) <= LOAD_FIGURE_MAX


def encode_served(served: ServedHeader) -> bytes:
    return msgspec.json.encode(served)


def decode_served(raw: bytes) -> ServedHeader | None:
    """Read a served header; None if it is malformed, since it only informs."""
    try:
        return _served_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
