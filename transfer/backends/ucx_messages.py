"""What two UCX backends say to each other: metadata by the side channel, the rest as UCX messages."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.errors import BackendError

CONTROL_TAG = 0x7064_636F_6F72_6401
"""UCX tag of control messages; data have the top bit set."""

DATA_TAG_BIT = 1 << 63
INDEX_BITS = 21
"""Low bits of a data tag, which count the pieces of a read; the rest is drawn for each read."""

ASK_PIECES_MAX = 512
"""Most pieces of one ask."""

CONTROL_BYTES_MAX = 64 << 10
METADATA_BYTES_MAX = 64 << 10
TOKEN_BYTES = 16


class UcxMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer needs to read from here; `token` shows that it has come by the side channel."""

    worker: bytes
    token: bytes
    length_bytes: int


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ask", array_like=True):
    """A wish for pieces: send piece i of `table` under the tag `first_tag` + i.

    Attributes:
        connection: drawn by the reader for each of its connections.
        worker: address that the reader's worker is reached at.
        table: little-endian int64 pairs of offset and length.
    """

    token: bytes
    connection: bytes
    worker: bytes
    first_tag: int
    table: bytes


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused", array_like=True):
    """No piece of the ask that began at `first_tag` will come."""

    first_tag: int
    reason: str


class Bye(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="bye", array_like=True):
    """The connection ends: what is being sent on it is not wanted any more."""

    token: bytes
    connection: bytes


Control = Ask | Refused | Bye

_control_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_metadata_decoder = msgspec.msgpack.Decoder(UcxMetadata)


def decode_control(data: bytes) -> Control:
    """One message of a peer.

    Raises:
        BackendError: if it is none.
    """
    try:
        return _control_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackendError(f"a UCX control message is malformed: {error}") from error


def decode_metadata(data: bytes) -> UcxMetadata:
    """The metadata of a peer.

    Raises:
        BackendError: if it is none.
    """
    if len(data) > METADATA_BYTES_MAX:
        raise BackendError(
            f"the peer's metadata has {len(data)} bytes, at most {METADATA_BYTES_MAX} are taken"
        )
    try:
        found = _metadata_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackendError(f"the peer's metadata is malformed: {error}") from error
    if not found.worker or len(found.token) != TOKEN_BYTES or not 0 <= found.length_bytes < 1 << 62:
        raise BackendError("the peer's metadata names no region")
    return found


def pack_table(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """The table of an ask."""
    return np.column_stack([offsets, lengths]).astype("<i8").tobytes()


def unpack_table(ask: Ask, region_bytes: int) -> list[tuple[int, int]]:
    """Offsets and lengths that an ask wants.

    Raises:
        BackendError: if the table is malformed, or a piece is empty or outside of the region.
    """
    if not ask.table or len(ask.table) % 16 or len(ask.table) > 16 * ASK_PIECES_MAX:
        raise BackendError("the table of an ask is malformed")
    table = np.frombuffer(ask.table, dtype="<i8").reshape(-1, 2)
    offsets, lengths = table[:, 0], table[:, 1]
    is_inside = (
        (offsets >= 0) & (lengths > 0) & (lengths <= region_bytes) & (offsets <= region_bytes - lengths)
    )
    if not is_inside.all():
        raise BackendError("a piece is outside of the region")
    last_tag = ask.first_tag + len(table) - 1
    if not DATA_TAG_BIT <= ask.first_tag <= last_tag < 1 << 64:
        raise BackendError("the tags of an ask are no data tags")
    return [(int(offset), int(length)) for offset, length in table]
