"""Tells from the first bytes of an answer whether its engine has begun to generate."""

import re
from enum import StrEnum

from pdcoord.resume.failure import tells_failure
from pdcoord.resume.sse import EVENT_END

# The longest stretch that is held back before any output. /v1/responses echoes instructions and tools in
# each of the events that come before it.
OPENING_BYTES_MAX = 1 << 20

EVENT_STREAM = b"text/event-stream"

# Sent before it is known whether there will be a token: by Anthropic's API, and by vLLM 0.32, whose
# first result opens the stream even where it is a failed pull (tests/contract/vllm-0.32.0/*.failed.sse).
_PREAMBLE = frozenset(
    {b"ping", b"message_start", b"response.created", b"response.queued", b"response.in_progress"}
)
# The same in /v1/chat/completions: a chunk that names the role and says nothing.
_ROLE_ONLY = re.compile(
    rb'"delta"\s*:\s*\{\s*"role"\s*:\s*"assistant"\s*(?:,\s*"content"\s*:\s*(?:""|null)\s*)?\}'
)
_CHOSEN = re.compile(rb'"delta"\s*:')
_ERRORS = frozenset({b"error", b"response.failed"})
_ERROR_DATA = re.compile(rb'\{\s*"(?:error"\s*:(?!\s*null)|(?:type|object)"\s*:\s*"error")')
# Without any of these no event says that its engine failed or gave up; in text the quotes are escaped.
_FAILURE_WORDS = (b'"error"', b'"abort"', b'"response.failed"')
_TYPE = re.compile(rb'\{\s*"type"\s*:\s*"([a-z_.]{1,64})"')


class Seen(StrEnum):
    """What an answer has shown so far."""

    NOTHING = "nothing"
    OUTPUT = "output"
    ERROR = "error"


def names_event_stream(content_type: bytes | None) -> bool:
    """Whether a head with this content type, or none, is of an event stream."""
    return content_type is not None and content_type.lower().startswith(EVENT_STREAM)


class Opening:
    """Reads a body until its first output; what was read is in `held`.

    Only an event stream can begin before there is output: keep-alive comments (vLLM's
    --sse-keep-alive-interval), pings and preambles. Of any other body the first byte is output.
    """

    def __init__(self, content_type: bytes) -> None:
        self._is_event_stream = names_event_stream(content_type)
        self._scanned_bytes = 0
        self.held = bytearray()

    def feed(self, chunk: bytes) -> Seen:
        self.held += chunk
        if not self._is_event_stream:
            return Seen.OUTPUT
        while (end := EVENT_END.search(self.held, self._scanned_bytes)) is not None:
            seen = _read_event(bytes(self.held[self._scanned_bytes : end.start()]))
            self._scanned_bytes = end.end()
            if seen is not Seen.NOTHING:
                return seen
        return Seen.OUTPUT if len(self.held) > OPENING_BYTES_MAX else Seen.NOTHING

    def end(self) -> Seen:
        """The body has ended; an event without its blank line counts."""
        return _read_event(bytes(self.held[self._scanned_bytes :]))


def shows_first_token(beginning: bytes) -> bool:
    """Whether whole events at the beginning of an event stream say that its engine has made a token.

    Here a chat chunk that names only the role says so, which to an `Opening` is nothing: vLLM 0.32 and SGLang
    0.5.23 send it with the result of their first step, so that it tells when the prompt was computed. What
    it does not tell is that the answer goes on: a failed pull, of which an `Opening` must learn, comes behind
    it. An error, or the end of an answer that its engine gave up, in any of the events is none.
    """
    start = 0
    for end in EVENT_END.finditer(beginning):
        seen = _read_event(beginning[start : end.start()], is_role_output=True)
        if seen is not Seen.NOTHING:
            return seen is Seen.OUTPUT and not _tells_failure(beginning)
        start = end.end()
    return False


def _tells_failure(beginning: bytes) -> bool:
    return any(word in beginning for word in _FAILURE_WORDS) and tells_failure(beginning)


def _read_event(block: bytes, *, is_role_output: bool = False) -> Seen:
    """What one server-sent event shows (WHATWG HTML, 9.2.6); an empty or comment-only one shows nothing."""
    name = data = b""
    for line in block.splitlines():
        field, _, value = line.partition(b":")
        if field == b"event":
            name = value.strip()
        elif field == b"data" and not data:
            data = value.strip()
    if not name and (typed := _TYPE.match(data)) is not None:
        name = typed[1]
    if name in _ERRORS or _ERROR_DATA.match(data) is not None:
        return Seen.ERROR
    if name in _PREAMBLE or not data or (not is_role_output and _is_role_only(data)):
        return Seen.NOTHING
    return Seen.OUTPUT


def _is_role_only(data: bytes) -> bool:
    """Whether every choice of a chat chunk names its role and nothing else."""
    said = len(_CHOSEN.findall(data))
    return said > 0 and said == len(_ROLE_ONLY.findall(data))
