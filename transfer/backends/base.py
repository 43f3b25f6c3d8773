"""What every backend offers: reading pieces of another process's staging buffer into one's own.

A backend owns its threads and is called from any; nothing here blocks for the network, results come as
futures. It knows no layout, no request and no lease.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of this process that peers may read and reads may land in.

    Attributes:
        address: of its first byte; it must outlive the backend.
        device: as torch names it: `cpu`, `cuda:0`, `xpu:1`, `hpu:0`.
    """

    address: int
    length_bytes: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes: from an offset in the peer's region to one in ours."""

    remote_offset: int
    local_offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class ReadReport:
    """How a read went.

    Attributes:
        posted_s: time spent handing it to the transport.
        moved_s: time until the last byte had come, posting included.
    """

    read_bytes: int
    descriptor_count: int
    posted_s: float
    moved_s: float


class Backend(Protocol):
    """Moves bytes between staging buffers.

    `name` is what both sides of a pair must have in common. Errors of futures are BackendError and its kinds.
    """

    @property
    def name(self) -> str: ...

    def start(self, region: Region) -> None:
        """Register the region and begin; once, before all else.

        Raises:
            SettingError: if the settings cannot work on this node.
            BackendError: if the region cannot be registered.
        """

    def metadata(self) -> bytes:
        """What a peer needs to read from here; goes over the side channel."""

    def transport(self, peer: str) -> str:
        """What carries bytes to this peer, as far as it can be told: `tcp`, `UCX rc_mlx5/mlx5_0:1`."""

    def connect(self, peer: str, metadata: bytes) -> Future[None]:
        """Make a peer readable under a name of the caller's; the name is not used again after `forget`."""

    def read(self, peer: str, pieces: Sequence[Piece], *, timeout_s: float) -> Future[ReadReport]:
        """Read pieces; adjacent ones are merged.

        The future ends only when nothing writes to the local pieces any more, whether it failed or not. It
        cannot be cancelled; `forget` makes its reads fail soon.

        Errors: PeerLostError, ReadTimeoutError, BackendError (such as a piece outside the peer's region).
        """

    def forget(self, peer: str) -> Future[None]:
        """Drop a peer and fail what is read from it; unknown names are fine."""

    def close(self) -> None:
        """Fail what is under way, stop the threads, deregister; blocks for a second at most. Idempotent."""
