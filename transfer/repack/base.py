"""What the agent asks of whoever knows the engine's memory: pack, unpack, verify."""

from collections.abc import Sequence
from typing import Protocol

from transfer.layout import RankLayout
from transfer.session.vocabulary import Slot, Tables, Unpack


class Repacker(Protocol):
    """Copies KV between one rank's blocks and its staging buffer. Called from the agent's own threads.

    Calls for different requests may overlap; the staging buffer is given at construction.
    """

    @property
    def layout(self) -> RankLayout: ...

    def pack(self, slots: Sequence[Slot], tables: Tables) -> tuple[bytes, ...]:
        """Fill the slots from the blocks; return the digest of each, by `digest.part_digest`.

        Raises:
            LayoutError: if a slot asks for what the tables do not hold.
        """

    def unpack(self, order: Unpack) -> bool:
        """Verify a landed part; if its digest is right, put its wanted tokens into the blocks.

        Returns False, with nothing written, if the digest is wrong.

        Raises:
            LayoutError: if the part does not fit its shape, or the blocks; nothing was written.
        """
