"""What a stream can end in besides its end.

TornError: the engine says in mid-stream that it failed; continue elsewhere.
DivergedError, a TornError: a continuation did not go where the stream had gone; continue elsewhere again.
UnreadableError: bytes that are not what their API says; stays in this package.
"""


class TornError(Exception):
    """The engine itself says in mid-stream that it failed.

    Attributes:
        error_event: the engine's own event, whole and not passed on; empty where it wrote none.
    """

    def __init__(
        self, error_event: bytes = b"", why: str = "the engine ended its stream with an error"
    ) -> None:
        super().__init__(why)
        self.error_event = error_event


class DivergedError(TornError):
    """A continuation did not go where the stream had gone: no fault of the engine that made it.

    It generated other tokens than those of the overlap that the client already has, which drawn ones may be,
    or reasons behind an answer that had begun.
    """


class UnreadableError(ValueError):
    """Bytes that cannot be read as what they should be; says nothing about their content."""
