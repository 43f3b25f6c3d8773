"""The allocator of one staging buffer: aligned pieces of a fixed size, first fit."""

from bisect import bisect_left, insort

from transfer.errors import SettingError

ALIGN_BYTES = 256


class Arena:
    """Hands out pieces of `0 .. capacity - 1`; pure bookkeeping, the memory itself is elsewhere.

    Both sides of an agent share one arena. What is staged grows from the low end and what lands from the high
    end, so that long-lived and short-lived pieces do not break up each other's room.

    Attributes:
        capacity: bytes of the buffer, rounded down to whole `align_bytes`.

    Raises:
        SettingError: if there is not even room for one aligned piece.
    """

    def __init__(self, capacity_bytes: int, align_bytes: int = ALIGN_BYTES) -> None:
        if align_bytes < 1:
            raise SettingError("align_bytes", align_bytes, "give at least 1")
        if capacity_bytes < align_bytes:
            raise SettingError("staging_bytes", capacity_bytes, f"give at least {align_bytes}")
        self.capacity = capacity_bytes - capacity_bytes % align_bytes
        self._align_bytes = align_bytes
        self._free: list[tuple[int, int]] = [(0, self.capacity)]
        """Free runs as (offset, length), ascending, never adjacent."""
        self._taken: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes handed out, alignment included."""
        return self.capacity - self.free_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes not handed out, perhaps in many runs."""
        return sum(length for _, length in self._free)

    def rounded(self, length_bytes: int) -> int:
        """What a piece of this length really takes."""
        return -(-length_bytes // self._align_bytes) * self._align_bytes

    def allocate(self, length_bytes: int, *, from_end: bool = False) -> int | None:
        """Offset of a new piece, aligned; None if no free run is long enough."""
        assert length_bytes > 0, "a piece has at least one byte"
        length = self.rounded(length_bytes)
        runs = range(len(self._free))
        for index in reversed(runs) if from_end else runs:
            offset, room = self._free[index]
            if room < length:
                continue
            if room == length:
                del self._free[index]
            elif from_end:
                self._free[index] = (offset, room - length)
            else:
                self._free[index] = (offset + length, room - length)
            at = offset + room - length if from_end else offset
            self._taken[at] = length
            return at
        return None

    def free(self, offset: int) -> None:
        """Take a piece back. That it was handed out, and once, is the caller's promise."""
        assert offset in self._taken, "only what was handed out is freed, and once"
        length = self._taken.pop(offset)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + length:
            length += self._free.pop(index)[1]
        if index > 0:
            before, room = self._free[index - 1]
            if before + room == offset:
                self._free[index - 1] = (before, room + length)
                return
        insort(self._free, (offset, length))

    def validate(self) -> None:
        """Assert that free and taken runs tile the buffer, and that no two free runs are adjacent."""
        runs = sorted([(o, n, True) for o, n in self._free] + [(o, n, False) for o, n in self._taken.items()])
        at, was_free = 0, False
        for offset, length, is_free in runs:
            assert offset == at, "runs follow each other without gap or overlap"
            assert length > 0, "no run is empty"
            assert offset % self._align_bytes == 0, "every run is aligned"
            assert not (was_free and is_free), "adjacent free runs are merged"
            at, was_free = offset + length, is_free
        assert at == self.capacity, "runs end where the buffer ends"


class Share:
    """One side's part of an arena: at most `bytes_max` of it at a time.

    Attributes:
        bytes_max: bound of what this side holds; None for the whole arena.
        used_bytes: what it holds, alignment included.
        is_crowded: the last allocation would have kept the bound, but the arena had no room: what the other
            side holds is in the way, and nobody tells when that changes.
    """

    def __init__(self, arena: Arena, bytes_max: int | None = None, *, from_end: bool = False) -> None:
        self.bytes_max = arena.capacity if bytes_max is None else min(bytes_max, arena.capacity)
        self.used_bytes = 0
        self.is_crowded = False
        self._arena = arena
        self._from_end = from_end
        self._held: dict[int, int] = {}

    def can_ever_hold(self, length_bytes: int) -> bool:
        """Whether a piece of this length fits when nothing else is held."""
        return self._arena.rounded(length_bytes) <= self.bytes_max

    def rounded(self, length_bytes: int) -> int:
        """What a piece of this length really takes."""
        return self._arena.rounded(length_bytes)

    def allocate(self, length_bytes: int) -> int | None:
        """Offset of a new piece; None if the share or the arena has no room for it now."""
        length = self._arena.rounded(length_bytes)
        self.is_crowded = False
        if self.used_bytes + length > self.bytes_max:
            return None
        offset = self._arena.allocate(length_bytes, from_end=self._from_end)
        self.is_crowded = offset is None
        if offset is not None:
            self._held[offset] = length
            self.used_bytes += length
        return offset

    def free(self, offset: int) -> None:
        """Take a piece of this share back."""
        assert offset in self._held, "a side frees its own pieces, and once"
        self.used_bytes -= self._held.pop(offset)
        self._arena.free(offset)

    def validate(self) -> None:
        assert self.used_bytes == sum(self._held.values()), "the share's sum is what it holds"
        assert self.used_bytes <= self.bytes_max, "a share stays under its bound"
