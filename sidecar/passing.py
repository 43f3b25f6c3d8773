"""What a stream goes through on its way to a client if it may have to be continued; pure."""

from collections.abc import Callable

from pdcoord.resume.opening import EVENT_STREAM, Opening, Seen
from pdcoord.resume.tape import Tape, seems_whole

Change = Callable[[bytes], bytes]

# Comments (vLLM's --sse-keep-alive-interval) and Anthropic's pings say that the server lives, not that the
# stream makes progress.
_PINGS = (b":", b"event: ping")


class Recorder:
    """A relay's Change that keeps what the client sees on a tape, and counts the stream's progress.

    Args:
        changes: applied before, in order.

    Attributes:
        step_count: parts that were more than a sign of life, from the first output on.
        last: what was passed on last.
    """

    __slots__ = ("_changes", "_has_output", "_tape", "last", "step_count")

    def __init__(self, tape: Tape, *changes: Change) -> None:
        self._tape = tape
        self._changes = changes
        self._has_output = False
        self.step_count = 0
        self.last = b""

    def __call__(self, part: bytes) -> bytes:
        """What may be passed on.

        Raises:
            TornError: if the engine itself said that it failed.
        """
        for change in self._changes:
            part = change(part)
        passed = self._tape(part)
        if passed:
            self.last = passed
            if self._has_output and not passed.startswith(_PINGS):
                self.step_count += 1
            elif shows_output(passed):
                self._has_output = True
                self.step_count += 1
        return passed

    def end(self, rest: bytes) -> bytes:
        """The stream has ended: what may be passed on of its last bytes, of which the changes held some back.

        What is then still pending on the tape ends a whole stream, and is none of one that `is_cut_short`.

        Raises:
            TornError: as before.
        """
        passed = self._tape(rest) if rest else b""
        self.last = passed or self.last
        return passed

    @property
    def pending(self) -> bytes:
        """An event without its blank line, not passed on."""
        return self._tape.pending

    @property
    def is_cut_short(self) -> bool:
        """Whether a stream that has ended without an error ended in its middle; False where nothing tells."""
        tape = self._tape
        return tape.is_whole and not (
            seems_whole(self.last + tape.pending) or seems_whole(tape.passed + tape.pending)
        )


def shows_output(events: bytes) -> bool:
    """Whether whole events of a stream have more than signs of life and what comes before any token."""
    return Opening(EVENT_STREAM).feed(events) is not Seen.NOTHING
