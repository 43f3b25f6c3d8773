"""Staging memory of a producer rank: which pieces of which transfers get room, and in which order."""

from dataclasses import dataclass, field

from transfer.canonical import Form, PartShape, part_bytes
from transfer.errors import Failure, FailureKind, LayoutError
from transfer.layout import RankLayout
from transfer.session.arena import Share
from transfer.session.cutting import Cutter
from transfer.session.staged import Chunk, Piece, Transfer
from transfer.session.vocabulary import Pack, Slot, TransferId


@dataclass(slots=True)
class Ordered:
    """What a look at the queue led to.

    Attributes:
        emptied: transfers none of whose pieces waits any more.
        failed: transfers whose blocks are not what their tables say.
        is_crowded: a piece waits for room that the other side of the arena holds.
    """

    packs: list[Pack] = field(default_factory=list)
    emptied: list[Transfer] = field(default_factory=list)
    failed: list[tuple[Transfer, Failure]] = field(default_factory=list)
    is_crowded: bool = False


class Packing:
    """Pieces that wait for room, and the memory of those that got it.

    A transfer is admitted when all of it will fit beside what the others were promised, in order of their
    first pieces: of two half-staged transfers each could wait for the other until both fail.
    """

    def __init__(self, layout: RankLayout, cutter: Cutter, share: Share) -> None:
        self._layout = layout
        self._cutter = cutter
        self._share = share
        self._queue: dict[TransferId, Transfer] = {}
        self._promised_bytes = 0

    def refusal(self, token_count: int) -> Failure | None:
        """Why a prompt of this length could never be staged."""
        need_bytes = self._cutter.bytes_needed(Form.TOKENS, token_count)
        if need_bytes <= self._share.bytes_max:
            return None
        detail = f"the prompt takes {need_bytes} bytes, staging has {self._share.bytes_max}"
        return Failure(FailureKind.STAGING_FULL, detail)

    def add(self, transfer: Transfer, now_s: float) -> None:
        """Cut what a transfer's prefill has newly computed into pieces that wait for room."""
        if transfer.form is None:
            transfer.form = transfer.choose_form()
        end = transfer.computed_end
        if transfer.form is Form.PAGES and not transfer.is_computed:
            end -= end % self._layout.layout.block_tokens  # The rest of a page comes with the next chunk.
        if end <= transfer.cut_end:
            return
        pieces = self._cutter.pieces(transfer.form, transfer.cut_end, end)
        transfer.pieces.extend(Piece(tokens, now_s) for tokens in pieces)
        transfer.cut_end = end
        self._queue.setdefault(transfer.id, transfer)

    def look(self) -> Ordered:
        """Give room to the pieces that wait, in order, as far as it goes."""
        ordered = Ordered()
        is_closed = False  # Somebody further ahead waits to be admitted.
        for transfer in list(self._queue.values()):
            if not transfer.is_admitted:
                is_closed = is_closed or not self._admit(transfer)
                if is_closed:
                    continue
            if not self._place(transfer, ordered):
                break
        return ordered

    def _admit(self, transfer: Transfer) -> bool:
        assert transfer.form is not None, "the form is chosen with the first piece"
        need_bytes = self._cutter.bytes_needed(transfer.form, transfer.token_count)
        # A prompt that fits alone is let in alone, even where pages are larger than their tokens.
        if self._promised_bytes and self._promised_bytes + need_bytes > self._share.bytes_max:
            return False
        transfer.is_admitted = True
        transfer.promised_bytes = need_bytes
        self._promised_bytes += need_bytes
        return True

    def _place(self, transfer: Transfer, ordered: Ordered) -> bool:
        """Give room to a transfer's pieces; False if there is none for the next."""
        assert transfer.form is not None, "the form is chosen with the first piece"
        while transfer.pieces:
            tokens = transfer.pieces[0].tokens
            try:
                shapes = self._cutter.shapes(transfer.form, tokens, transfer.tables, transfer.token_count)
            except LayoutError as error:
                ordered.failed.append((transfer, Failure(FailureKind.PACK_FAILED, str(error))))
                break
            if shapes:
                pack = self._pack(transfer, shapes)
                if pack is None:
                    ordered.is_crowded = self._share.is_crowded
                    return False
                ordered.packs.append(pack)
            transfer.pieces.popleft()
        del self._queue[transfer.id]
        if not transfer.pieces:
            ordered.emptied.append(transfer)
        return True

    def _pack(self, transfer: Transfer, shapes: list[PartShape]) -> Pack | None:
        """One piece of memory for all parts of a piece of the prompt; None if there is no room."""
        groups = self._layout.groups
        sizes = [part_bytes(shape, groups[shape.group], self._layout.layout) for shape in shapes]
        at = self._share.allocate(sum(map(self._share.rounded, sizes)))
        if at is None:
            return None
        slots: list[Slot] = []
        chunk = Chunk(at)
        for shape, size in zip(shapes, sizes, strict=True):
            slots.append(Slot(shape, at, size))
            at += self._share.rounded(size)
        chunk.slots = tuple(slots)
        transfer.chunks.append(chunk)
        transfer.packing_count += 1
        return Pack(transfer.id, len(transfer.chunks) - 1, chunk.slots, transfer.tables)

    def withdraw(self, transfer: Transfer) -> None:
        """Drop a transfer's pieces that wait; what it is promised is what it holds."""
        transfer.pieces.clear()
        self._queue.pop(transfer.id, None)
        held_bytes = sum(self._share.rounded(s.length_bytes) for c in transfer.chunks for s in c.slots)
        self._promise(transfer, held_bytes)

    def free(self, transfer: Transfer) -> None:
        """Take all memory of a transfer back."""
        assert not transfer.packing_count, "memory that is written to is not freed"
        for chunk in transfer.chunks:
            self._share.free(chunk.offset)
        transfer.chunks.clear()
        self._promise(transfer, 0)

    def _promise(self, transfer: Transfer, promised_bytes: int) -> None:
        self._promised_bytes += promised_bytes - transfer.promised_bytes
        transfer.promised_bytes = promised_bytes

    def validate(self, live: list[Transfer]) -> None:
        self._share.validate()
        assert self._promised_bytes == sum(t.promised_bytes for t in live), "promises are what was promised"
        held = [s for t in live for c in t.chunks for s in c.slots]
        held_bytes = sum(self._share.rounded(s.length_bytes) for s in held)
        assert held_bytes == self._share.used_bytes, "only chunks of live transfers hold memory"
        waiting = {t.id for t in live if t.pieces}
        assert set(self._queue) == waiting, "exactly the transfers with pieces wait"
