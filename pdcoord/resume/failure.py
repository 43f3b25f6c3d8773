"""Tells from how an answer ends whether its engine gave it up, and where an event of ours may follow.

Nothing of an answer that goes by is parsed: only its last bytes, or a whole answer once, when it is there.
"""

import re
from collections import deque
from collections.abc import Callable

import msgspec

from pdcoord.resume.sse import DONE, data_of, whole_events

TAIL_BYTES = 4_096
"""What of a stream's end is looked at."""
TAIL_PARTS = 16
"""What ends a stream of several choices comes in as many parts: the last of each, the usage, [DONE]."""

_NULL = b"null"
_GIVEN_UP = frozenset({"abort", "error"})
_ERROR_TYPES = frozenset({"error", "response.failed"})
_LAST_RESPONSE_TYPES = frozenset({"response.completed", "response.incomplete", "response.cancelled"})
_GIVEN_UP_STATUSES = frozenset({"cancelled", "failed"})
# An event without any of these is no word of an engine's about its answer; in text the quotes are escaped.
_MAY_TELL = re.compile(
    rb'"(?:error|abort|message_delta|response\.(?:failed|completed|incomplete|cancelled))"'
)
_LAST_RESPONSE = re.compile(rb'"response\.(?:completed|incomplete|cancelled)"')
_STATUS = re.compile(rb'"status"\s*:\s*"([a-z_]{1,16})"')
_ABORTED = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number"\s*:\s*([0-9]{1,12})')


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    type: str | None = None
    error: msgspec.Raw = msgspec.Raw(_NULL)
    choices: list[_Choice] | None = None
    delta: msgspec.Raw = msgspec.Raw(_NULL)
    response: msgspec.Raw = msgspec.Raw(_NULL)


class _Delta(msgspec.Struct):
    stop_reason: str | msgspec.UnsetType | None = msgspec.UNSET


class _Response(msgspec.Struct):
    status: str | None = None
    incomplete_details: msgspec.Raw = msgspec.Raw(_NULL)


class _Whole(msgspec.Struct):
    type: msgspec.Raw = msgspec.Raw(_NULL)
    object: msgspec.Raw = msgspec.Raw(_NULL)
    stop_reason: msgspec.Raw = msgspec.Raw(_NULL)


_event_decoder = msgspec.json.Decoder(_Event)
_delta_decoder = msgspec.json.Decoder(_Delta)
_response_decoder = msgspec.json.Decoder(_Response)
_whole_decoder = msgspec.json.Decoder(_Whole)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Tail:
    """A relay's Change that keeps a stream's last bytes and passes everything on, at the cost of one append.

    Args:
        change: applied before.
    """

    __slots__ = ("_change", "_keep", "_parts")

    def __init__(self, change: Callable[[bytes], bytes] | None = None) -> None:
        self._change = change
        self._parts: deque[bytes] = deque(maxlen=TAIL_PARTS)
        self._keep = self._parts.append

    def __call__(self, part: bytes) -> bytes:
        if self._change is not None:
            part = self._change(part)
        self._keep(part[-TAIL_BYTES:])
        return part

    @property
    def data(self) -> bytes:
        """The last bytes that were passed on."""
        return b"".join(self._parts)[-TAIL_BYTES:]


def tells_failure(tail: bytes) -> bool:
    """Whether a stream that ended well for HTTP says in its last events that its engine failed or gave up.

    An error event of any API; a finish_reason "abort" (vLLM 0.32 and SGLang 0.5.23 as they shut down), which
    vLLM 0.32 makes a stop_reason of null in /v1/messages, and a status "cancelled" in /v1/responses if it
    serves the model through Harmony. Of other models' aborted responses it says "completed": nothing tells.

    Args:
        tail: the stream's last bytes, whose first event may lack its beginning.
    """
    events, rest = whole_events(tail)
    return any(_ends_failed(event) for event in (*events, rest) if _MAY_TELL.search(event) is not None)


def ends_in_error(tail: bytes) -> bool:
    """Whether the last event of a stream's tail is an error already; a [DONE] behind it is none."""
    events, rest = whole_events(tail)
    said = (data_of(event) for event in (rest, *reversed(events)))
    last = next((data for data in said if data is not None and data != DONE), b"")
    event = _read(last)
    return event is not None and _is_error(event)


def next_sequence_number(tail: bytes) -> int:
    """What the number of an event of /v1/responses is that follows a tail; 0 where nothing tells."""
    numbers = _SEQUENCE_NUMBER.findall(tail)
    return int(numbers[-1]) + 1 if numbers else 0


def was_given_up(body: bytes) -> bool:
    """Whether an answer in one piece is what there was when its engine gave the request up.

    As `tells_failure`. In a whole answer of /v1/messages vLLM 0.32 leaves a stop_reason of null out.
    """
    try:
        whole = _whole_decoder.decode(body)
        if bytes(whole.type) == b'"message"':
            return bytes(whole.stop_reason) == _NULL
        if bytes(whole.object) == b'"response"':
            return _is_given_up(_response_decoder.decode(body))
    except _UNREADABLE:
        pass
    return _ABORTED.search(body) is not None


def says_failed(event: bytes) -> bool:
    """Whether an event says that its engine failed, wherever it stands, rather than generated the word.

    vLLM 0.32 writes `{"error": {...}}` when its engine dies, finish_reason "abort" when it shuts down without
    a grace period; SGLang 0.5.23 both; Anthropic's API `event: error` with `{"type": "error", ...}`.
    """
    said = _read(data_of(event) or b"")
    return said is not None and _is_failure(said)


def _ends_failed(event: bytes) -> bool:
    data = data_of(event)
    if data is None:
        return _cut_response_says_failed(event)
    said = _read(data)
    if said is None:
        return False
    if _is_failure(said):
        return True
    try:
        if said.type == "message_delta":
            return _delta_decoder.decode(said.delta).stop_reason is None
        return said.type in _LAST_RESPONSE_TYPES and _is_given_up(_response_decoder.decode(said.response))
    except _UNREADABLE:
        return False


def _cut_response_says_failed(event: bytes) -> bool:
    """The same of what is left of a last event of /v1/responses: it repeats the answer, and may be long."""
    if _LAST_RESPONSE.search(event) is None:
        return False
    statuses = _STATUS.findall(event)  # Behind those of the output's items there is the response's own.
    return bool(statuses) and statuses[-1].decode() in _GIVEN_UP_STATUSES


def _is_given_up(response: _Response) -> bool:
    is_without_reason = response.status == "incomplete" and bytes(response.incomplete_details) == _NULL
    return response.status in _GIVEN_UP_STATUSES or is_without_reason


def _is_failure(event: _Event) -> bool:
    return _is_error(event) or any(choice.finish_reason in _GIVEN_UP for choice in event.choices or ())


def _is_error(event: _Event) -> bool:
    return event.type in _ERROR_TYPES or bytes(event.error) != _NULL


def _read(data: bytes) -> _Event | None:
    try:
        return _event_decoder.decode(data or b"{}")
    except _UNREADABLE:
        return None
