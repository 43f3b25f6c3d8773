"""What can go wrong on a connection, cut by what the caller may do next.

WireError
|-- InvalidRequestError   the request cannot be put on the wire; nothing was sent, do not retry
|-- ConnectError          nothing was sent: any other target may be tried
|-- ResetError            no response byte came, the target may have seen the request: try another
|-- HeadTimeoutError      the same, after a wait
|-- StreamError           the response broke off or is not HTTP: too late to try another once relayed
|   `-- StalledError      nobody broke it off, but what comes is no progress
`-- BodyTooLargeError     a body is longer than its reader allows
"""


class WireError(Exception):
    """Root of what this package raises for a peer's or the network's sake."""


class InvalidRequestError(WireError, ValueError):
    """A method, target or header that would not be one request on the wire (CR, LF, NUL, ...)."""


class ConnectError(WireError):
    """Refused, unresolvable or not connected in time; nothing was sent."""


class ResetError(WireError):
    """The connection was lost before the first response byte, and so was the one retry."""


class HeadTimeoutError(WireError):
    """No response head came in time."""


class StreamError(WireError):
    """A response broke off, fell silent inside its body, or is malformed."""


class StalledError(StreamError):
    """A body made no progress for longer than whoever watches it allows."""


class BodyTooLargeError(WireError):
    """A body is longer than its reader allows.

    Attributes:
        bytes_max: the limit that was passed.
    """

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"body is longer than {bytes_max} bytes")
        self.bytes_max = bytes_max
