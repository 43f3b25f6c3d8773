"""A call's body as it arrives, within the bounds of one call and of all calls together."""

from dataclasses import dataclass

from pdcoord.front.answers import bodies_full, body_too_large, body_too_slow
from pdcoord.front.ports import Limits
from pdcoord.protocol.errors import RefusedError
from pdcoord.wire.asgi import BodyTimeoutError, NoRoomError, Receive, read_body
from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.heads import Headers
from pdcoord.wire.room import ByteRoom


@dataclass(slots=True)
class Body:
    """What goes upstream of a call.

    Attributes:
        room: that all bodies share.
        raw: what goes upstream: as it came, until somebody changes it.
    """

    room: ByteRoom
    raw: bytes = b""
    _bytes_held: int = 0

    async def read(self, headers: Headers, receive: Receive, limits: Limits) -> None:
        """Read it whole.

        Raises:
            RefusedError: if it is too long, too slow, or there is no room for it.
            ClientGoneError: if the client left.
        """
        too_large = body_too_large(limits.body_bytes_max)
        for name, value in headers:
            # Answered before the body is sent where the client says how long it will be.
            if name == b"content-length" and value.isdigit() and int(value) > limits.body_bytes_max:
                raise RefusedError(too_large)
        try:
            self.raw = await read_body(
                receive, bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s, room=self.room
            )
        except BodyTooLargeError as error:
            raise RefusedError(too_large) from error
        except BodyTimeoutError as error:
            raise RefusedError(body_too_slow(limits.body_timeout_s)) from error
        except NoRoomError as error:
            raise RefusedError(bodies_full()) from error
        self._bytes_held = len(self.raw)

    def let_go(self) -> None:
        """Give its room back; idempotent."""
        self.raw = b""
        self.room.give(self._bytes_held)
        self._bytes_held = 0
