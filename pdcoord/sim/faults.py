"""Failures of an emulated engine, switched on and off while it runs."""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import msgspec
from pydantic import Field, model_validator

from pdcoord.policy.errors import KeyPath, PolicyError
from pdcoord.policy.values import Spec
from pdcoord.policy.yamltext import Document, FaultsError, validate


class FaultKind(StrEnum):
    """What goes wrong; closed.

    refuse closes the API's listener, running requests go on. Of generating calls: error answers a status, and
    in the middle of an answer reset drops the connection, stall sends nothing more, stream_error ends it as a
    failed engine does, abort as one that gives the request up. lost_ticket leaves kv_transfer_params out of a
    prefill leg's 200, expired_lease issues tickets whose lease is over. slow_link runs the NIC at a factor,
    slow the steps. stale_metrics freezes the metrics page, lying_metrics shows an idle engine on it. crash
    kills the engine as a process dies.
    """

    REFUSE = "refuse"
    RESET = "reset"
    STALL = "stall"
    ERROR = "error"
    STREAM_ERROR = "stream_error"
    ABORT = "abort"
    LOST_TICKET = "lost_ticket"
    EXPIRED_LEASE = "expired_lease"
    SLOW_LINK = "slow_link"
    SLOW = "slow"
    STALE_METRICS = "stale_metrics"
    LYING_METRICS = "lying_metrics"
    CRASH = "crash"


BREAKS = (FaultKind.RESET, FaultKind.STALL, FaultKind.STREAM_ERROR, FaultKind.ABORT)
"""What befalls an answer in its middle; of several the first befalls a call."""
_PER_REQUEST = frozenset({*BREAKS, FaultKind.ERROR, FaultKind.LOST_TICKET, FaultKind.EXPIRED_LEASE})
_FACTORED = frozenset({FaultKind.SLOW_LINK, FaultKind.SLOW})
_KEYS: dict[str, frozenset[FaultKind]] = {
    "probability": _PER_REQUEST,
    "count": _PER_REQUEST,
    "duration_s": frozenset(FaultKind) - {FaultKind.CRASH},
    "after_tokens": frozenset(BREAKS),
    "status": frozenset({FaultKind.ERROR}),
    "factor": _FACTORED,
    "restart_after_s": frozenset({FaultKind.CRASH}),
}


class FaultSpec(Spec):
    """One failure."""

    kind: FaultKind = Field(description="What goes wrong.")
    probability: float = Field(default=1.0, gt=0, le=1, description="Share of requests that it befalls.")
    count: int | None = Field(default=None, ge=1, description="Requests it befalls before it is over.")
    duration_s: float | None = Field(default=None, gt=0, le=86_400, description="How long it lasts.")
    after_tokens: int | None = Field(
        default=None,
        ge=0,
        description="reset, stall, stream_error, abort: tokens of an answer that still arrive; 1 if not set, "
        "but a stall without it comes before the answer's head.",
    )
    status: int = Field(default=500, ge=400, le=599, description="error: the status.")
    factor: float | None = Field(
        default=None, gt=0, le=1, description="slow_link, slow: share of the speed left."
    )
    restart_after_s: float | None = Field(
        default=None, ge=0, le=86_400, description="crash: when the engine starts anew; never if not set."
    )

    @property
    def is_before_answer(self) -> bool:
        """Whether the call it befalls gets no answer at all."""
        return self.kind is FaultKind.STALL and self.after_tokens is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults: list[tuple[KeyPath, str]] = [
            ((key,), f"has no meaning with kind {self.kind}; remove it")
            for key, kinds in _KEYS.items()
            if key in self.model_fields_set and self.kind not in kinds
        ]
        if self.kind in _FACTORED and self.factor is None:
            faults.append((("factor",), "is missing, expected a number above 0 and at most 1"))
        if faults:
            raise FaultsError(faults)
        return self


class FaultsBody(Spec):
    """All failures of an engine from now on; those that ran before and are not named end."""

    faults: tuple[FaultSpec, ...] = Field(max_length=64, description="An empty list ends every failure.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [fault.kind for fault in self.faults]
        repeated: list[tuple[KeyPath, str]] = [
            (("faults", index, "kind"), f"is {kind}, which is in the list already; keep one")
            for index, kind in enumerate(kinds)
            if kinds.index(kind) != index
        ]
        if repeated:
            raise FaultsError(repeated)
        return self


class FaultsBodyError(ValueError):
    """The body of an admin call is refused; nothing changed."""


def parse_faults(raw: bytes) -> FaultsBody:
    """Read the body of an admin call.

    Raises:
        FaultsBodyError: naming each key at fault, its value and what is expected.
    """
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FaultsBodyError("the body is not JSON") from error
    try:
        return validate(Document("body", data, {(): 1}), FaultsBody)
    except PolicyError as error:
        messages = [str(problem).removeprefix("body:1: ") for problem in error.problems]
        raise FaultsBodyError("; ".join(messages)) from error


@dataclass(slots=True)
class _Active:
    spec: FaultSpec
    ends_s: float | None
    befallen: int = 0


class FaultSet:
    """The failures of one engine at one time; chance comes in."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._active: dict[FaultKind, _Active] = {}

    def replace(self, body: FaultsBody, now_s: float) -> None:
        """Put these failures in place of all there were."""
        self._active = {
            spec.kind: _Active(spec, None if spec.duration_s is None else now_s + spec.duration_s)
            for spec in body.faults
        }

    def active(self, kind: FaultKind, now_s: float) -> FaultSpec | None:
        """The failure of this kind, if it is on."""
        found = self._active.get(kind)
        if found is None or (found.ends_s is not None and now_s >= found.ends_s):
            return None
        if found.spec.count is not None and found.befallen >= found.spec.count:
            return None
        return found.spec

    def strike(self, kind: FaultKind, now_s: float) -> FaultSpec | None:
        """Whether a failure befalls the request at hand; counted if it does."""
        spec = self.active(kind, now_s)
        if spec is None or (spec.probability < 1.0 and self._rng.random() >= spec.probability):
            return None
        self._active[kind].befallen += 1
        return spec

    def factor(self, kind: FaultKind, now_s: float) -> float:
        """The share of the speed that a failure leaves; 1.0 without it."""
        spec = self.active(kind, now_s)
        return 1.0 if spec is None or spec.factor is None else spec.factor

    def next_end_s(self, now_s: float) -> float | None:
        """When the next failure ends of its own accord."""
        ends = [a.ends_s for a in self._active.values() if a.ends_s is not None and a.ends_s > now_s]
        return min(ends, default=None)

    def state(self, now_s: float) -> list[dict[str, Any]]:
        """What is on, as JSON: the failure as it was given, how often it struck, how long it lasts."""
        return [
            {
                **each.spec.model_dump(mode="json", exclude_unset=True),
                "befallen": each.befallen,
                "ends_in_s": None if each.ends_s is None else round(each.ends_s - now_s, 3),
            }
            for kind, each in self._active.items()
            if self.active(kind, now_s) is not None
        ]
