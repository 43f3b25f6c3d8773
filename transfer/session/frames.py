"""The side channel's bytes: frames of a length and a msgpack message, signed where a key is set.

    frame    4 bytes, big endian: length of what follows | 1 byte: 0 plain, 1 signed | 32 bytes tag, if signed
             | message

The tag is HMAC-SHA256 over the direction, the frame's number in that direction from 0, and the message. The
first frame of each direction is signed with the shared key, and the answer also covers the dialling side's
nonce; later frames are signed with a key derived from the shared key and both nonces. So a frame of another
connection, of the other direction, twice, out of order or after a gap is refused. Nothing is encrypted.
"""

import hashlib
import hmac
from typing import Final

import msgspec

from transfer.errors import FrameError, NotAuthenticatedError
from transfer.session.bounds import NONCE_BYTES, check_message
from transfer.session.messages import Hello, Message, Refusal, Welcome

FRAME_BYTES_MAX: Final = 1 << 20
"""An offer of 256 parts is about 40 KiB, a NIXL metadata blob a few; a peer cannot make us hold more."""

_LENGTH_BYTES = 4
_TAG_BYTES = 32
_PLAIN, _SIGNED = b"\0", b"\1"
_DIALLER, _DIALLED = b"D", b"L"
_FIRST_LABEL, _SESSION_LABEL = b"pdcoord-kv-1 first", b"pdcoord-kv-1 session"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message as one plain frame, length included."""
    return _framed(_PLAIN + _encoder.encode(message))


def decode(payload: bytes) -> Message:
    """The message of a frame, its fields checked against their bounds.

    Raises:
        FrameError: if it is no message, or a field of it is out of bounds.
    """
    try:
        message: Message = _decoder.decode(payload)
    # Not only msgspec's own: a deep nest recurses too far, and a map's key may not be hashable.
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FrameError(f"a frame of {len(payload)} bytes is no message ({type(error).__name__})") from error
    check_message(message)
    return message


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Cuts a stream of bytes into frame bodies; holds at most one unfinished frame.

    Attributes:
        bytes_max: length of a frame body that is accepted.
    """

    def __init__(self, bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    @property
    def held_bytes(self) -> int:
        """Bytes of a frame that has not ended yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes as they came; return the frame bodies that ended with them.

        Raises:
            FrameError: if a frame is empty or longer than `bytes_max`; nothing may be fed after that.
        """
        self._buffer += data
        bodies: list[bytes] = []
        at = 0
        while len(self._buffer) - at >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[at : at + _LENGTH_BYTES], "big")
            if not 0 < length <= self.bytes_max:
                self._buffer.clear()
                raise FrameError(f"a frame of {length} bytes; 1 to {self.bytes_max} are accepted")
            start = at + _LENGTH_BYTES
            if len(self._buffer) - start < length:
                break
            bodies.append(bytes(self._buffer[start : start + length]))
            at = start + length
        del self._buffer[:at]
        return bodies

    def close(self) -> None:
        """The stream has ended.

        Raises:
            FrameError: if it ended inside a frame.
        """
        if self._buffer:
            raise FrameError(f"the stream ended {len(self._buffer)} bytes into a frame")


class Seal:
    """Signs the frames of one side of one connection and checks those of the other.

    Without a key frames are plain, and a signed one is refused; with one a plain frame is refused.
    """

    def __init__(self, key: bytes, *, is_dialler: bool) -> None:
        self._key = key
        self._session_key = b""
        self._own, self._other = (_DIALLER, _DIALLED) if is_dialler else (_DIALLED, _DIALLER)
        self._dialler_nonce = b""
        self._sealed_count = 0
        self._opened_count = 0

    def greet(self, dialler_nonce: bytes) -> None:
        """The dialling side's nonce, as soon as it is known: the first answer's tag covers it."""
        self._dialler_nonce = dialler_nonce

    def agree(self, dialled_nonce: bytes) -> None:
        """Both nonces are known: from here on frames are signed with the session's own key."""
        message = _SESSION_LABEL + self._dialler_nonce + dialled_nonce
        self._session_key = hmac.digest(self._key, message, hashlib.sha256) if self._key else b""

    def seal(self, payload: bytes) -> bytes:
        """A frame body for the next message in our direction."""
        number, self._sealed_count = self._sealed_count, self._sealed_count + 1
        if not self._key:
            return _PLAIN + payload
        return _SIGNED + self._tag(self._own, number, payload) + payload

    def open(self, body: bytes) -> bytes:
        """The message of the next frame body of the other direction.

        Raises:
            NotAuthenticatedError: if it is plain and should not be, or the other way round, or its tag is
                not that of the next frame.
            FrameError: if it is neither plain nor signed.
        """
        number, self._opened_count = self._opened_count, self._opened_count + 1
        kind = body[:1]
        if kind not in (_PLAIN, _SIGNED):
            raise FrameError("a frame is neither plain nor signed: the peer speaks something else")
        if kind == _PLAIN:
            if self._key:
                raise NotAuthenticatedError("a frame is not signed: give the peer this side's key")
            return body[1:]
        if not self._key:
            raise NotAuthenticatedError("a frame is signed: give this side the peer's key")
        tag, payload = body[1 : 1 + _TAG_BYTES], body[1 + _TAG_BYTES :]
        if not hmac.compare_digest(tag, self._tag(self._other, number, payload)):
            raise NotAuthenticatedError(
                "a frame's signature is wrong: the keys differ, or it was tampered with"
            )
        return payload

    def _tag(self, direction: bytes, number: int, payload: bytes) -> bytes:
        if number == 0:
            nonce = self._dialler_nonce if direction == _DIALLED else b""
            key, context = self._key, _FIRST_LABEL + nonce.rjust(NONCE_BYTES, b"\0")
        else:
            assert self._session_key, "both nonces are known after the first frames"
            key, context = self._session_key, b""
        message = context + direction + number.to_bytes(8, "big") + payload
        return hmac.digest(key, message, hashlib.sha256)


class Channel:
    """The codec of one side of one connection: framing, signatures, and who speaks first.

    The dialling side's first message is Hello, the dialled side's Welcome or Refusal. Before that nothing
    else is sent or accepted.
    """

    def __init__(
        self, key: bytes, nonce: bytes, *, is_dialler: bool, bytes_max: int = FRAME_BYTES_MAX
    ) -> None:
        """Begin a connection.

        Args:
            key: shared secret; empty for plain frames.
            nonce: 16 random bytes of this connection, the same that goes into our Hello or Welcome.
            is_dialler: whether this side has dialled.
            bytes_max: longest frame body, both ways.
        """
        assert len(nonce) == NONCE_BYTES, "a nonce has 16 bytes"
        self._seal = Seal(key, is_dialler=is_dialler)
        self._reader = FrameReader(bytes_max)
        self._nonce = nonce
        self._is_dialler = is_dialler
        self._has_greeted = False  # The dialling side's Hello has passed.
        self._is_agreed = False  # The dialled side's Welcome has passed.
        self._is_dead = False

    @property
    def is_agreed(self) -> bool:
        """Whether Hello and Welcome have been exchanged."""
        return self._is_agreed

    def encode(self, message: Message) -> bytes:
        """The next frame to send, length included.

        A dialled side may send a Refusal even after `feed` raised.

        Raises:
            FrameError: if the message is longer than a frame may be.
        """
        payload = _encoder.encode(message)
        if len(payload) + 1 + _TAG_BYTES > self._reader.bytes_max:
            raise FrameError(f"a {type(message).__name__} of {len(payload)} bytes does not fit a frame")
        if self._is_agreed:
            return _framed(self._seal.seal(payload))
        if self._is_dialler:
            assert isinstance(message, Hello), "the dialling side says Hello first"
            assert not self._has_greeted, "and then waits for the answer"
            assert message.nonce == self._nonce, "Hello carries this connection's nonce"
            self._has_greeted = True
            self._seal.greet(self._nonce)
            return _framed(self._seal.seal(payload))
        body = self._seal.seal(payload)
        if isinstance(message, Welcome):
            assert self._has_greeted, "Welcome answers Hello"
            assert message.nonce == self._nonce, "Welcome carries this connection's nonce"
            self._is_agreed = True
            self._seal.agree(self._nonce)
        else:
            assert isinstance(message, Refusal), "the dialled side answers with Welcome or Refusal"
            self._is_dead = True
        return _framed(body)

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes as they came; return the messages that ended with them.

        Raises:
            NotAuthenticatedError: if a frame does not prove the shared key.
            FrameError: if the bytes are not what should come. Every later call raises too.
        """
        if self._is_dead:
            raise FrameError("this connection is over")
        messages: list[Message] = []
        try:
            for body in self._reader.feed(data):
                messages.append(self._accept(body))
                if isinstance(messages[-1], Refusal):
                    self._is_dead = True  # Whatever follows is of no meaning.
                    break
        except FrameError:
            self._is_dead = True
            raise
        return messages

    def close(self) -> None:
        """The peer ended the stream.

        Raises:
            FrameError: if it ended inside a frame.
        """
        self._is_dead = True
        self._reader.close()

    def _accept(self, body: bytes) -> Message:
        if not self._is_agreed and self._has_greeted is not self._is_dialler:
            # A dialled side that has not answered yet, or a peer that speaks before our own Hello.
            raise FrameError("a frame came out of turn: Hello, then its answer, come first")
        message = decode(self._seal.open(body))
        if not self._is_agreed:
            self._meet(message)
        elif isinstance(message, Hello | Welcome | Refusal):
            raise FrameError(f"a {type(message).__name__} in the middle of a connection")
        return message

    def _meet(self, message: Message) -> None:
        """Take the peer's first message."""
        if isinstance(message, Hello | Welcome) and hmac.compare_digest(message.nonce, self._nonce):
            raise FrameError("the peer's nonce is our own: a frame was sent back")
        match message:
            case Hello() if not self._is_dialler:
                self._has_greeted = True
                self._seal.greet(message.nonce)
            case Welcome() if self._is_dialler:
                self._is_agreed = True
                self._seal.agree(message.nonce)
            case Refusal() if self._is_dialler:
                return
            case _:
                raise FrameError(f"the peer's first message is {type(message).__name__}")
