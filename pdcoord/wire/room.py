"""Bounds what all request bodies of a process hold in memory together."""


class ByteRoom:
    """So many bytes; whoever takes some gives them back.

    Attributes:
        held_bytes: taken now.
    """

    __slots__ = ("_bytes_max", "held_bytes")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.held_bytes = 0

    def take(self, count: int) -> bool:
        """Take so many bytes; False, and nothing is taken, if there are not as many left."""
        if self.held_bytes + count > self._bytes_max:
            return False
        self.held_bytes += count
        return True

    def give(self, count: int) -> None:
        self.held_bytes -= count
        assert self.held_bytes >= 0, "more was given back than taken"
