"""W3C Trace Context: which trace a call belongs to, read from its headers and written into others; pure.

Source: W3C Recommendation "Trace Context" of 23 November 2021, version 00, sections 3.2, 3.3 and 4.3.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

TRACEPARENT = b"traceparent"
TRACESTATE = b"tracestate"
SAMPLED = 1
"""The flag that says that the caller records this trace."""

_NAMES = frozenset({TRACEPARENT, TRACESTATE})
# A later version may append fields behind another dash; only what version 00 has is read of it.
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_FORBIDDEN_VERSION = b"ff"
_PARENT_BYTES_MAX = 512
_MEMBERS_MAX = 32
_STATE_BYTES_MAX = 512
_KEY = rb"[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rb"(?:" + _KEY + rb")=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace, as headers name it.

    Attributes:
        trace_id: 32 lower-case hexadecimal digits, not all 0.
        span_id: 16 of them, not all 0.
        flags: 0..255, of which version 00 knows SAMPLED.
        state: members of vendors, as they came; empty for none.
    """

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)

    def headers(self) -> Headers:
        """What tells the next one; always of version 00."""
        parent = f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}".encode("ascii")
        headers = [(TRACEPARENT, parent)]
        return [*headers, (TRACESTATE, self.state.encode("ascii"))] if self.state else headers


def read_trace(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The trace that (lower-case) headers name; None if they name none, several, or one wrongly.

    A tracestate that is malformed or too long is left out, as if there were none.
    """
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == TRACEPARENT:
            parents.append(value)
        elif name == TRACESTATE:
            states.append(value)
    if len(parents) != 1 or len(parents[0]) > _PARENT_BYTES_MAX:
        return None
    match = _PARENT.fullmatch(parents[0].strip(b" \t"))
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    is_of_version = version != _FORBIDDEN_VERSION and (rest is None or version != b"00")
    if not is_of_version or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id.decode(), span_id.decode(), int(flags, 16), _state(states))


def with_trace(headers: Iterable[tuple[bytes, bytes]], context: TraceContext) -> Headers:
    """The (lower-case) headers with this trace in place of whichever they named."""
    return [*(pair for pair in headers if pair[0] not in _NAMES), *context.headers()]


def _state(values: list[bytes]) -> str:
    """The members of all tracestate headers as one; empty if any of them cannot be."""
    members = [member.strip(b" \t") for value in values for member in value.split(b",")]
    members = [member for member in members if member]
    joined = b",".join(members)
    keys = {member.partition(b"=")[0] for member in members}
    is_good = (
        len(members) <= _MEMBERS_MAX
        and len(joined) <= _STATE_BYTES_MAX
        and len(keys) == len(members)
        and all(map(_MEMBER.fullmatch, members))
    )
    return joined.decode("ascii") if is_good else ""
