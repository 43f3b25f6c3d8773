"""Keeps the raw bytes of an event stream that were passed on, within bounds, in case it must be continued."""

from collections.abc import Callable

import msgspec

from pdcoord.resume.errors import TornError
from pdcoord.resume.failure import says_failed
from pdcoord.resume.sse import DONE, data_of, end_of_last, whole_events

__all__ = ["Shelf", "Tape", "TornError", "seems_whole"]

BLOCK_BYTES = 4_096
"""A tape takes room from its shelf in blocks of so much, so that most parts cost no bookkeeping."""
_ERROR = b'"error"'
_ABORT = b'"abort"'
_LAST_TYPES = frozenset({"message_stop", "response.completed", "response.incomplete"})


class Shelf:
    """What the tapes of a process keep together.

    Args:
        bytes_max: of all tapes.
        tape_bytes_max: of one tape: its client's request, and what it passed on or holds back.

    Attributes:
        bytes_held: of all tapes that are not closed, with what they have taken and not yet filled.
    """

    __slots__ = ("bytes_held", "bytes_max", "tape_bytes_max")

    def __init__(self, bytes_max: int, tape_bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.tape_bytes_max = tape_bytes_max
        self.bytes_held = 0


class Tape:
    """One relayed event stream: a relay's Change, called once for each part that arrives.

    Only whole events are passed on; an unfinished one is held back until the rest of it comes, so that what
    the client has always ends where another engine's stream can begin. Nothing is parsed but an event that
    may say that the engine failed.

    After a break the same tape goes on with the continuing stream: call `begin_again`, then feed it what the
    Splice makes of that stream; what it keeps is what the client has seen of all of them.

    Args:
        body: the client's own request as it went upstream.

    Attributes:
        after: the Change that parts go through once it let go.
        pending: an unfinished event, not passed on; after a TornError what came before the error in the same
            part, which must still be passed on. A stream that ends well ends with none.
        is_whole: False once a bound made it let go. It then passes everything on and keeps nothing, and the
            stream cannot be continued (Unresumable.TAPE_FULL).
    """

    __slots__ = (
        "_append",
        "_held_bytes",
        "_is_torn",
        "_left_bytes",
        "_parts",
        "_shelf",
        "after",
        "body",
        "is_whole",
        "pending",
    )

    def __init__(self, shelf: Shelf, body: bytes) -> None:
        self._shelf = shelf
        self._parts: list[bytes] = []
        self._append = self._parts.append
        self._held_bytes = 0
        self._left_bytes = 0
        self._is_torn = False
        self.after: Callable[[bytes], bytes] = _as_it_is
        self.body = body
        self.pending = b""
        self.is_whole = True
        if not self._has_room(len(body)):
            self._let_go()

    @property
    def passed(self) -> bytes:
        """Everything that was passed on, from all streams, as the client has it; b"" once it let go."""
        # Joined once for all who ask: at its end each stream is asked for its tail and for its tokens.
        joined = b"".join(self._parts)
        self._parts[:] = [joined]
        return joined

    def __call__(self, part: bytes) -> bytes:
        """What may be passed on of a part and of what was held back before it.

        Raises:
            TornError: if the part has an event in which the engine says that it failed.
        """
        left = self._left_bytes - len(part)
        # rfind takes half the time of `in`.
        if (
            left >= 0
            and not self.pending
            and part.endswith(b"\n\n")
            and part.rfind(_ERROR) < 0
            and part.rfind(_ABORT) < 0
        ):
            # All that a token costs here.
            self._left_bytes = left
            self._append(part)
            return part
        return self._keep(part)

    def _keep(self, part: bytes) -> bytes:
        if not self.is_whole:
            return self.after(part)
        if not self._has_room(len(part)):
            part = self.pending + part
            self._let_go()
            return self.after(part)
        if self.pending:
            part = self.pending + part
            self.pending = b""
        if not part.endswith(b"\n\n"):
            end = end_of_last(part)
            self.pending = part[end:]
            part = part[:end]
        if part.rfind(_ERROR) >= 0 or part.rfind(_ABORT) >= 0:
            self._look_for_failure(part)
        if part:
            self._append(part)
        return part

    def begin_again(self) -> None:
        """Forget the unfinished event of a stream that broke off, before another stream goes on."""
        if not self._is_torn:
            self._left_bytes += len(self.pending)
        self._is_torn = False
        self.pending = b""

    def close(self) -> None:
        """Give the bytes back; idempotent. A closed tape keeps nothing more."""
        self._let_go()

    def _look_for_failure(self, data: bytes) -> None:
        start = _failure(data)
        if start < 0:
            return
        self._left_bytes += len(data) - start + len(self.pending)
        self.pending = data[:start]
        self._append(self.pending)
        self._is_torn = True
        raise TornError(whole_events(data[start:])[0][0])

    def _has_room(self, byte_count: int) -> bool:
        """Use room for so many bytes, taking more from the shelf if need be; False if a bound forbids it."""
        shelf = self._shelf
        missing = byte_count - self._left_bytes
        if missing > 0:
            free = min(shelf.tape_bytes_max - self._held_bytes, shelf.bytes_max - shelf.bytes_held)
            if missing > free:
                return False
            taken = max(missing, BLOCK_BYTES if free >= BLOCK_BYTES else 0)
            self._held_bytes += taken
            self._left_bytes += taken
            shelf.bytes_held += taken
        self._left_bytes -= byte_count
        return True

    def _let_go(self) -> None:
        self._shelf.bytes_held -= self._held_bytes
        self._held_bytes = 0
        self._left_bytes = -1  # No part is small enough for it.
        self._parts.clear()
        self.pending = b""
        self.is_whole = False


def _as_it_is(part: bytes) -> bytes:
    return part


def seems_whole(passed: bytes) -> bool:
    """Whether a stream that ended without an error ends with what streams end with.

    That is a last event `data: [DONE]`, or one whose type says so: Anthropic's message_stop, and what ends a
    stream of /v1/responses. Comments may follow it; the same words inside an event's text are none.

    Args:
        passed: the stream or no less than its last event, which may lack its blank line.
    """
    events, rest = whole_events(passed)
    said = next((data for event in (rest, *reversed(events)) if (data := data_of(event)) is not None), b"")
    if said == DONE:
        return True
    try:
        return _event_decoder.decode(said or b"{}").type in _LAST_TYPES
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class _Event(msgspec.Struct):
    type: str | None = None


_event_decoder = msgspec.json.Decoder(_Event)


def _failure(data: bytes) -> int:
    """Where the first event begins in which an engine says that it failed; -1 if there is none."""
    start = 0
    for event in whole_events(data)[0]:
        if (_ERROR in event or _ABORT in event) and says_failed(event):
            return start
        start += len(event)
    return -1
