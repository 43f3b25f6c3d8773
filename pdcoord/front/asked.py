"""What a call's headers ask of admission: whose call it is, how important, and by when; pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pdcoord.core.model import Model, Slo
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import (
    FAIRNESS_ID,
    NAME_BYTES_MAX,
    OBJECTIVE,
    SLO_MS_MAX,
    SLO_TPOT_MS,
    SLO_TTFT_MS,
    is_name,
)

_NUMBER = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?")
_BLANKS = b" \t"
_VALUE_SHOWN_MAX = 32
_FIRST_LETTERS = (b"x-llm-d-", b"x-gateway-", b"x-slo-")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call's headers ask of admission.

    Attributes:
        objective: name of one; "" if none was named.
        is_lowered: the objective is not for the call's API key, and counts as none.
    """

    tenant: str = ""
    objective: str = ""
    slo: Slo = field(default_factory=Slo)
    is_lowered: bool = False

    def priority(self, model: Model) -> int:
        return 0 if self.is_lowered else model.admission.objectives.get(self.objective, 0)

    def has_unknown_objective(self, model: Model) -> bool:
        """Whether an objective was named that gives the call no priority."""
        return self.is_lowered or (bool(self.objective) and self.objective not in model.admission.objectives)


def asked_of(headers: Iterable[tuple[bytes, bytes]]) -> Asked:
    """Read tenant, objective and SLO headers of a call.

    Those without a value count as absent: proxies send such.

    Raises:
        RefusedError: 400 naming the header, its value and what is expected. To ignore what cannot be read
            would serve a call as somebody else's, or too late, without a word.
    """
    own = ((name, value.strip(_BLANKS)) for name, value in headers if name.startswith(_FIRST_LETTERS))
    found = {name: value for name, value in own if value}
    if not found:
        return NOTHING_ASKED
    return Asked(
        tenant=_name(found, FAIRNESS_ID, has_spaces=True),
        objective=_name(found, OBJECTIVE),
        slo=Slo(_seconds(found, SLO_TTFT_MS), _seconds(found, SLO_TPOT_MS)),
    )


NOTHING_ASKED = Asked()


def _name(found: Mapping[bytes, bytes], names: tuple[bytes, ...], *, has_spaces: bool = False) -> str:
    """A name without blanks around it; `has_spaces` where it may have some inside."""
    for name in names:
        value = found.get(name)
        if value is not None:
            if not is_name(value.replace(b" ", b"_") if has_spaces else value):
                spaces = " and inner spaces" if has_spaces else ""
                raise _bad_header(name, value, f"1 to {NAME_BYTES_MAX} visible ASCII characters{spaces}")
            return value.decode("ascii")
    return ""


def _seconds(found: Mapping[bytes, bytes], names: tuple[bytes, ...]) -> float | None:
    for name in names:
        value = found.get(name)
        if value is not None:
            is_number = _NUMBER.fullmatch(value) is not None
            if not is_number or not 0.0 < float(value) <= SLO_MS_MAX:
                raise _bad_header(name, value, f"milliseconds above 0 and up to {SLO_MS_MAX:.0f}")
            return float(value) / 1e3
    return None


def _bad_header(name: bytes, value: bytes, expected: str) -> RefusedError:
    shown = ascii(value[:_VALUE_SHOWN_MAX].decode("latin-1")) + (
        "..." if len(value) > _VALUE_SHOWN_MAX else ""
    )
    message = f"Header {name.decode()} is {shown}, expected {expected}; correct it or leave it out."
    return RefusedError(Refusal(RefuseReason.INVALID_FIELD, message, name.decode()))
