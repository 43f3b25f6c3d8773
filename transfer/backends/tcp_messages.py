"""What two tcp backends say to each other: metadata by the side channel, the rest in frames with fixed heads.

A reader opens with HELLO and gets WELCOME. Then it sends ASK frames, each a head and a table of pieces, and
gets for each, in order, either MOVED and the bytes of its pieces one after the other, or REFUSED and a
reason. All numbers are little-endian. A connection on which anything else comes is closed.
"""

import struct

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.errors import BackendError, FrameError

MAGIC = b"PDKVTCP1"
TOKEN_BYTES = 16
HELLO = struct.Struct(f"<8s{TOKEN_BYTES}s")
"""MAGIC and the token."""

HEAD = struct.Struct("<IIQ")
"""Kind, size, number.

ASK: size is the count of pieces, number is echoed in the answer. REFUSED: size is the length of the reason.
WELCOME: number is the length of the region.
"""

WELCOME, ASK, MOVED, REFUSED = 1, 2, 3, 4

PIECE_BYTES = 16
"""A piece in a table: its offset and its length."""

ASK_PIECES_MAX = 1_024
"""Most pieces of one ASK. Two of them wait in the smallest buffers that a socket has, so that a reader which
sends the next while an answer comes does not wait for ever."""

REASON_BYTES_MAX = 256
METADATA_BYTES_MAX = 4 << 10
HOSTS_MAX = 16


class TcpMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer needs to read from here; `token` shows that it has come by the side channel."""

    hosts: tuple[str, ...]
    port: int
    token: bytes
    length_bytes: int
    boot_id: str


_metadata_decoder = msgspec.msgpack.Decoder(TcpMetadata)


def decode_metadata(data: bytes) -> TcpMetadata:
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
    except msgspec.MsgspecError as error:
        raise BackendError(f"the peer's metadata is malformed: {error}") from error
    if not 1 <= len(found.hosts) <= HOSTS_MAX or not all(found.hosts) or not 1 <= found.port <= 65_535:
        raise BackendError("the peer's metadata names no address")
    if len(found.token) != TOKEN_BYTES or not 0 <= found.length_bytes < 1 << 62:
        raise BackendError("the peer's metadata names no region")
    return found


def pack_table(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """The table of an ASK."""
    return np.column_stack([offsets, lengths]).astype("<i8").tobytes()


def check_ask(kind: int, count: int) -> None:
    """Whether a head may be followed by a table.

    Raises:
        FrameError: if it may not.
    """
    if kind != ASK or not 1 <= count <= ASK_PIECES_MAX:
        raise FrameError("a frame is no request for pieces, or has too many of them")


def unpack_table(table: bytes | bytearray | memoryview, region_bytes: int) -> list[tuple[int, int]]:
    """Offsets and lengths that an ASK wants.

    Raises:
        BackendError: if a piece is empty or outside of the region.
    """
    rows = np.frombuffer(table, dtype="<i8").reshape(-1, 2)
    offsets, lengths = rows[:, 0], rows[:, 1]
    # Compared without adding: a hostile sum could wrap.
    is_inside = (
        (offsets >= 0) & (lengths > 0) & (lengths <= region_bytes) & (offsets <= region_bytes - lengths)
    )
    if not is_inside.all():
        index = int(np.flatnonzero(~is_inside)[0])
        raise BackendError(f"piece {index} of a request is outside of the region of {region_bytes} bytes")
    return [(int(offset), int(length)) for offset, length in rows.tolist()]
