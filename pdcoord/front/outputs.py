"""How many tokens an answer has, from its bytes as they pass; nothing is decoded."""

import re
from collections import deque

TAIL_BYTES = 4_096
"""Where an answer's usage stands: in its last bytes, behind the text (vLLM 0.32, SGLang 0.5.23)."""

_END_OF_EVENT = b"\n\n"
_USAGE = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*([0-9]{1,9})')
_ROLE = b'"role"'
_DONE = b"data: [DONE]"
_COMMENT = b"\n\n:"
_TAIL_PARTS = 16
"""What ends a stream of several choices comes in as many parts: the last of each, the usage, [DONE]."""


def count_kept(passed: bytes) -> int:
    """Output tokens of an event stream, or of as much of it as there is, that was kept as a whole."""
    counter = OutputCounter(passed, is_stream=True, events_before=-passed.count(_COMMENT))
    return counter.count() or 0


class OutputCounter:
    """Sees every part of an answer go by and passes it on as it is, in less than half a microsecond.

    An engine's own usage is exact. Without it a stream has about one event for each token: fewer where an
    engine sends several tokens at once, so that this is a lower bound.

    Args:
        first: the answer's first part.
        events_before: those of parts that went by before it, without one that names a role.
    """

    __slots__ = ("_event_count", "_has_role", "_is_stream", "_keep", "_tail")

    def __init__(self, first: bytes, *, is_stream: bool, events_before: int = 0) -> None:
        self._is_stream = is_stream
        self._has_role = _ROLE in first[:TAIL_BYTES]
        self._event_count = events_before + first.count(_END_OF_EVENT)
        self._tail = deque([first[-TAIL_BYTES:]], _TAIL_PARTS)
        self._keep = self._tail.append

    def __call__(self, part: bytes) -> bytes:
        self._event_count += part.count(_END_OF_EVENT)
        self._keep(part[-TAIL_BYTES:])
        return part

    @property
    def tail(self) -> bytes:
        """The last bytes, of the last parts."""
        return b"".join(self._tail)[-TAIL_BYTES:]

    def count(self) -> int | None:
        """Tokens as far as they have been seen; None where nothing tells."""
        tail = self.tail
        found = _USAGE.findall(tail)
        if found:
            return int(found[-1])
        if not self._is_stream:
            return None
        # A chat begins with an event that names the role, and OpenAI's streams end with [DONE].
        return max(0, self._event_count - self._has_role - (_DONE in tail))
