"""The repacker of engines that keep their KV in torch tensors, on whatever device torch knows."""

from collections.abc import Iterator, Sequence
from typing import Any

from transfer.canonical import Form, page_bytes
from transfer.digest import part_digest
from transfer.errors import LayoutError
from transfer.layout import LayerScales, RankLayout
from transfer.repack.arrangement import Learned
from transfer.repack.jobs import MISSING, Job, check_place, pack_job, scales_of, unpack_job
from transfer.repack.kernels import HostKernels, Kernels, TorchKernels
from transfer.repack.moves import Dense
from transfer.repack.torch_lanes import HOST, Lanes
from transfer.repack.torch_memory import INTEGERS, GroupFlats, Layers, TorchGroup, flats_of
from transfer.repack.torch_numbers import Converter
from transfer.repack.torch_pages import (
    Move,
    SplitPages,
    hole_copies,
    mover,
    page_moves,
    token_moves,
    whole_and_split,
)
from transfer.session.vocabulary import Slot, Tables, Unpack

BATCH_BYTES = 64 << 20
"""Layers of so many bytes are moved at a time, by way of as much device memory where staging is elsewhere.

More layers at a time are fewer calls, which is what short blocks cost.
"""
CONVERTED_BATCH_BYTES = 8 << 20
"""The same where numbers are converted on the way, which needs room for what came of them."""


class TorchRepacker:
    """Packs and unpacks the blocks of one rank; see `base.Repacker`.

    Works on a stream of its own for each calling thread, where the device has streams, and has waited for it
    when it returns. Whoever calls sees to it that the engine's own work on the blocks is done before.

    Digests are taken over host memory: of a staging buffer on a device each part is copied to the host first.

    Args:
        layout: the rank's.
        memory: for each KV cache group, in the layout's order, its tensors; all on one device. They are kept.
        staging: a flat torch.uint8 tensor, on that device or on the host, pinned or not.
        kernels: what moves elements; by default numpy where both ends are in host memory, else torch.

    Raises:
        LayoutError: if the memory does not fit the layout.
    """

    def __init__(
        self,
        layout: RankLayout,
        memory: Sequence[TorchGroup],
        staging: Any,
        *,
        kernels: Kernels | None = None,
    ) -> None:
        self._layout = layout
        self._groups = flats_of(layout, memory)
        self._staging = staging
        self._device = self._groups[0].device
        if staging.device.type != HOST and staging.device != self._device:
            raise LayoutError("staging", str(staging.device), f"{HOST} or {self._device}, where the KV is")
        is_host = self._device.type == HOST and staging.device.type == HOST
        self._is_direct = self._device == staging.device
        self._kernels: Kernels = kernels or (HostKernels() if is_host else TorchKernels())
        self._convert = Converter(self._device)
        self._lanes = Lanes(self._device)

    @property
    def layout(self) -> RankLayout:
        return self._layout

    def pack(self, slots: Sequence[Slot], tables: Tables) -> tuple[bytes, ...]:
        self.fill(slots, tables)
        return tuple(self._digest(slot.offset, slot.length_bytes) for slot in slots)

    def fill(self, slots: Sequence[Slot], tables: Tables) -> None:
        """Pack without digests, for whoever proves the bytes in another way; errors as in `pack`."""
        jobs = []
        for slot in slots:
            check_place("offset", slot.offset, slot.length_bytes, self._staging.numel())
            blocks = self._block_count(slot.shape.group)
            jobs.append((slot, pack_job(self._layout, slot, tables, blocks)))
        with self._lanes.entered():
            for slot, job in jobs:
                self._pack(job, slot.offset, slot.length_bytes)

    def unpack(self, order: Unpack) -> bool:
        job = self._checked(order)
        if self._digest(order.landing, order.length_bytes) != order.digest:
            return False
        with self._lanes.entered():
            self._unpack(job, order)
        return True

    def spread(self, order: Unpack) -> None:
        """Unpack a part that was verified already; errors as in `unpack`."""
        job = self._checked(order)
        with self._lanes.entered():
            self._unpack(job, order)

    def _checked(self, order: Unpack) -> Job:
        check_place("landing", order.landing, order.length_bytes, self._staging.numel())
        return unpack_job(self._layout, order, self._block_count(order.shape.group))

    def _block_count(self, group: int) -> int:
        """Of a group that may be none: `jobs` refuses that by name."""
        return self._groups[group].block_count if 0 <= group < len(self._groups) else 0

    def _page_elements(self, group: int) -> int:
        """Elements of a block's page in pages form."""
        layout = self._layout.layout
        page = page_bytes(self._layout.groups[group], layout, self._layout.heads(group).count)
        return page // layout.dtype.item_bytes

    def _digest(self, offset: int, length_bytes: int) -> bytes:
        part = self._staging[offset : offset + length_bytes]
        if part.device.type != HOST:
            with self._lanes.entered():
                host = self._lanes.host_scratch(length_bytes)
                host.copy_(part, non_blocking=True)
            part = host
        return part_digest(memoryview(part.numpy()))

    def _elements(self, offset: int, length_bytes: int, item_bytes: int) -> Any:
        """A part of the staging buffer as whole numbers of an element's size."""
        if (self._staging.data_ptr() + offset) % item_bytes:
            raise LayoutError("offset", offset, f"an address that is a multiple of {item_bytes}")
        return self._staging[offset : offset + length_bytes].view(INTEGERS[item_bytes])

    @staticmethod
    def _batches(layer_count: int, layer_bytes: int, bound: int = BATCH_BYTES) -> Iterator[tuple[int, int]]:
        """First layer and count of what is moved at a time."""
        step = max(1, bound // max(1, layer_bytes))
        for first in range(0, layer_count, step):
            yield first, min(step, layer_count - first)

    def _pack(self, job: Job, offset: int, length_bytes: int) -> None:
        group = self._groups[job.group]
        item_bytes = self._layout.layout.dtype.item_bytes
        staged = self._elements(offset, length_bytes, item_bytes)
        layer_count = job.shape.layer_count
        size = staged.numel() // layer_count
        row = job.shape.row_elements
        if job.form is Form.PAGES:
            page = self._page_elements(job.group)
            block_tokens = self._layout.layout.block_tokens
            moves = page_moves(group, job.runs, job.part.tokens.first, block_tokens, page)
        else:
            dense = Dense(0, job.part.heads.count * row, row)
            moves = token_moves(group, job.runs, job.tokens, job.heads, dense)
        move = mover(group, self._kernels, moves, is_gather=True)
        for first, count in self._batches(layer_count, size * item_bytes):
            target = staged[first * size : (first + count) * size]
            if self._is_direct:
                self._fill(job, target.view(count, size), move, Layers(first, count, size))
                continue
            buffer = self._lanes.scratch("dense", count * size, staged.dtype)
            self._fill(job, buffer.view(count, size), move, Layers(first, count, size))
            target.copy_(buffer, non_blocking=True)

    def _fill(self, job: Job, target: Any, move: Move, layers: Layers) -> None:
        """Gather some layers; what the group does not keep becomes zeros."""
        block_tokens = self._layout.layout.block_tokens
        block_count = -(-job.part.tokens.count // block_tokens)
        if job.form is Form.PAGES and isinstance(self._groups[job.group].arrangement, Learned):
            target.zero_()  # A table has no padding, so it may not fill its page.
        for run in job.runs:
            if run.block != MISSING:
                continue
            low, count = run.tokens.first - job.part.tokens.first, run.tokens.count
            each = target.shape[1] // job.part.tokens.count
            if job.form is Form.PAGES:
                low, count, each = low // block_tokens, run.block_count, target.shape[1] // block_count
            target[:, low * each : (low + count) * each].zero_()
        move(layers, target.view(-1))

    def _unpack(self, job: Job, order: Unpack) -> None:
        if not job.runs:
            return
        group = self._groups[job.group]
        source = order.source.layout.dtype
        landed = self._elements(order.landing, order.length_bytes, source.item_bytes)
        layer_count = job.shape.layer_count
        size = landed.numel() // layer_count
        is_converted = job.form is Form.TOKENS and self._is_converted(job, order)
        writes = self._writers(job, group, is_converted=is_converted)
        bound = CONVERTED_BATCH_BYTES if is_converted else BATCH_BYTES
        for first, count in self._batches(layer_count, size * source.item_bytes, bound):
            part = landed[first * size : (first + count) * size]
            if not self._is_direct:
                buffer = self._lanes.scratch("landed", count * size, part.dtype)
                buffer.copy_(part, non_blocking=True)
                part = buffer
            stride = size
            if is_converted:
                part, stride = self._converted(job, order, part, first, count)
            for write in writes:
                write(Layers(first, count, stride), part)

    def _writers(self, job: Job, group: GroupFlats, *, is_converted: bool) -> list[Move]:
        """What writes layers of a job into the blocks, one after the other; views are worked out once."""
        kernels = self._kernels
        holes = hole_copies(group, job.runs, job.heads)
        found: list[Move] = []
        if job.form is Form.TOKENS:
            if holes:
                found.append(lambda layers, _: kernels.zero(group, layers, holes))
            dense = _converted_dense(job) if is_converted else _landed_dense(job)
            moves = token_moves(group, job.runs, job.tokens, job.heads, dense)
            found.append(mover(group, kernels, moves, is_gather=False))
            return found
        block_tokens = self._layout.layout.block_tokens
        whole, split = whole_and_split(job.runs, block_tokens)
        page = self._page_elements(job.group)
        pages = page_moves(group, whole, job.part.tokens.first, block_tokens, page)
        found.append(mover(group, kernels, pages, is_gather=False))
        if split:
            holes = hole_copies(group, split, job.heads)
            if holes:
                found.append(lambda layers, _: kernels.zero(group, layers, holes))
            found.append(SplitPages(group, kernels, job, split, page))
        return found

    def _is_converted(self, job: Job, order: Unpack) -> bool:
        if order.source.layout.dtype is not self._layout.layout.dtype:
            return True
        return scales_of(order.source, job.group) != scales_of(self._layout, job.group)

    def _converted(self, job: Job, order: Unpack, part: Any, first: int, count: int) -> tuple[Any, int]:
        """Layers `[token][head][element]` of the wanted tokens and heads in this rank's own type."""
        source, target = order.source.layout.dtype, self._layout.layout.dtype
        theirs, ours = scales_of(order.source, job.group), scales_of(self._layout, job.group)
        row, key = job.shape.row_elements, job.shape.key_dim
        shape = (job.tokens.count, job.heads.count, row)
        size = job.tokens.count * job.heads.count * row
        found = self._lanes.scratch("converted", count * size, INTEGERS[target.item_bytes])
        landed = _landed_dense(job)
        layer_size = part.numel() // count
        for index in range(count):
            there = found[index * size : (index + 1) * size].view(shape)
            here = part.as_strided(
                shape,
                (landed.token_stride, landed.head_stride, 1),
                part.storage_offset() + index * layer_size + landed.offset,
            )
            for low, high, scale in _segments(theirs[first + index], ours[first + index], key, row):
                bits = here[..., low:high].contiguous()
                there[..., low:high].copy_(self._convert(bits, source, target, *scale))
        return found, size


def _landed_dense(job: Job) -> Dense:
    """Where the wanted tokens and heads stand in the part as it came."""
    row = job.shape.row_elements
    token = job.part.heads.count * row
    first = job.tokens.first - job.part.tokens.first
    return Dense(first * token + job.part_heads.first * row, token, row)


def _converted_dense(job: Job) -> Dense:
    row = job.shape.row_elements
    return Dense(0, job.heads.count * row, row)


def _segments(
    theirs: LayerScales, ours: LayerScales, key: int, row: int
) -> list[tuple[int, int, tuple[float, float]]]:
    """Elements of a row that share their scales, with the producer's and our own."""
    keys, values = (theirs.key, ours.key), (theirs.value, ours.value)
    if keys == values or key == row:
        return [(0, row, keys)]
    return [(0, key, keys), (key, row, values)]
