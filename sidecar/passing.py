"""What a stream goes through on its way to a client if it may have to be continued; pure."""

from collections.abc import Callable

from pdcoord.resume.tape import Tape

Change = Callable[[bytes], bytes]

# Comments (vLLM's --sse-keep-alive-interval) and Anthropic's pings say that the server lives, not that the
# stream makes progress.
_PINGS = (b":", b"event: ping")


class Recorder:
    """A relay's Change that keeps what the client sees on a tape, and counts the stream's progress.

    Args:
        changes: applied before, in order.

    Attributes:
        step_count: parts that were more than a sign of life.
        last: what was passed on last.
    """

    __slots__ = ("_changes", "_tape", "last", "step_count")

    def __init__(self, tape: Tape, *changes: Change) -> None:
        self._tape = tape
        self._changes = changes
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
            if not passed.startswith(_PINGS):
                self.step_count += 1
        return passed

    def end(self, rest: bytes) -> bytes:
        """The stream has ended well: its last bytes, of which the changes held some back.

        Raises:
            TornError: as before.
        """
        passed = self._tape(rest) if rest else b""
        return passed + self._tape.pending
