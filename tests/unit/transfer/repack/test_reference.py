"""The numpy repacker against an oracle that looks at one element at a time."""

import itertools
import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transfer.canonical import Form, PartShape, TokenRange, head_runs, part_bytes
from transfer.digest import part_digest
from transfer.errors import LayoutError
from transfer.layout import (
    GroupShape,
    HeadRange,
    KvDtype,
    KvLayout,
    KvSplit,
    LayerScales,
    Order,
    RankLayout,
    heads_of_rank,
)
from transfer.repack.arrangement import Arrangement, Axis, Learned, Side
from transfer.repack.numbers import bits_type, decode, encode
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tables import as_learned
from transfer.repack.tilings import (
    CPU_AMX,
    CPU_VEC,
    ROCM_AITER_SHUFFLE,
    ROCM_ATTN,
    arrangement_of,
    dense_tensors,
)
from transfer.session.vocabulary import Slot, Unpack

BLOCKS = 13
FULL = GroupShape(2, 4, 16, 16)
WINDOW = GroupShape(1, 4, 16, 16, window_tokens=40)
LATENT = GroupShape(2, 1, 48, 0)
UNEVEN = GroupShape(1, 2, 6, 10)

LAYOUTS = [
    KvLayout(16, Order.NHD),
    KvLayout(16, Order.HND),
    KvLayout(1, Order.NHD),
    KvLayout(7, Order.BLNHC),
    KvLayout(32, Order.BLHNC),
    KvLayout(16, Order.BHLNC),
    KvLayout(32, Order.LHBNC),
    KvLayout(32, Order.HND, split=KvSplit.HALVED),
    KvLayout(16, Order.NHD, split=KvSplit.HALVED),
    KvLayout(24, Order.NHD, split=KvSplit.SEPARATE),
    KvLayout(16, Order.HND, split=KvSplit.SEPARATE, head_dim_multiple=24),
    KvLayout(16, Order.NHD, head_dim_multiple=64),
    KvLayout(32, Order.HND, split=KvSplit.HALVED, tiling=CPU_VEC),
    KvLayout(96, Order.HND, split=KvSplit.HALVED, tiling=CPU_VEC),
    KvLayout(32, Order.HND, split=KvSplit.HALVED, tiling=CPU_AMX),
    KvLayout(16, Order.LHBNC, split=KvSplit.HALVED, tiling=ROCM_ATTN),
    KvLayout(16, Order.HND, split=KvSplit.HALVED, tiling=ROCM_ATTN, head_dim_multiple=64),
    KvLayout(16, Order.LHBNC, split=KvSplit.HALVED, tiling=ROCM_AITER_SHUFFLE),
    KvLayout(32, Order.HND, split=KvSplit.HALVED, tiling=ROCM_AITER_SHUFFLE),
]


Places = dict[tuple[int, int, int, int], tuple[int, int]]


def places_of(arrangement: Arrangement | Learned) -> Places:
    """Tensor and position of each (side, token, head, element), from the definition of digits and tables."""
    found: Places = {}
    for index, side in enumerate(arrangement.sides):
        table = None if isinstance(side, Side) else struct.unpack(f"={len(side.table) // 8}q", side.table)
        lengths = [side.length(axis) for axis in Axis]
        for number, key in enumerate(itertools.product(*map(range, lengths))):
            if table is not None:
                found[index, *key] = side.tensor, table[number]
                continue
            assert isinstance(side, Side)
            position = side.offset
            left = dict(zip(Axis, key, strict=True))
            for digit in reversed(side.digits):
                position += left[digit.axis] % digit.size * digit.stride
                left[digit.axis] //= digit.size
            found[index, *key] = side.tensor, position
    return found


@dataclass
class Engine:
    """A rank with memory full of noise, and the oracle's view of it."""

    layout: RankLayout
    memory: tuple[GroupMemory, ...]
    staging: NDArray[np.uint8]
    repacker: NumpyRepacker
    places: tuple[Places, ...]

    def place(self, group: int, block: int, token: int, head: int, element: int) -> tuple[int, int]:
        """Tensor and position of an element of a head's key, then value."""
        key_dim = self.layout.groups[group].key_dim
        index, within = (0, element) if element < key_dim else (1, element - key_dim)
        tensor, position = self.places[group][index, token, head, within]
        return tensor, position + block * self.memory[group].arrangement.block_strides[tensor]

    def stored(
        self, group: int, layer: int, table: tuple[int, ...], token: int, head: int, element: int
    ) -> int:
        size = self.layout.layout.block_tokens
        tensor, position = self.place(group, table[token // size], token % size, head, element)
        return int(self.memory[group].layers[layer][tensor][position])


def engine(
    layout: KvLayout,
    shapes: tuple[GroupShape, ...],
    *,
    rank: int = 0,
    seed: int = 0,
    scales: tuple[tuple[LayerScales, ...], ...] = (),
    is_learned: bool = False,
    blocks: int = BLOCKS,
) -> Engine:
    """An engine of one rank whose blocks hold random small numbers of its dtype."""
    random = np.random.default_rng(seed)
    dtype = bits_type(layout.dtype)
    groups = []
    for shape in shapes:
        heads = heads_of_rank(shape.kv_heads, layout.tensor_parallel, rank).count
        tensors = dense_tensors(layout, shape, heads, blocks)
        arrangement: Arrangement | Learned = arrangement_of(
            layout, shape, heads, tuple(tensor.strides for tensor in tensors)
        )
        flats = [
            encode(random.normal(0, 2, tensor.element_count).astype(np.float32), layout.dtype).astype(dtype)
            for tensor in tensors
        ]
        layers = tuple(
            tuple(flat[tensor.layer_stride * layer :] for flat, tensor in zip(flats, tensors, strict=True))
            for layer in range(shape.layer_count)
        )
        groups.append(GroupMemory(layers, as_learned(arrangement) if is_learned else arrangement))
    rank_layout = RankLayout(layout, rank, shapes, scales)
    staging = random.integers(0, 256, 1 << 20, np.uint8)
    places = tuple(places_of(group.arrangement) for group in groups)
    return Engine(rank_layout, tuple(groups), staging, NumpyRepacker(rank_layout, groups, staging), places)


def number(word: int, dtype: KvDtype) -> float:
    return float(decode(np.array([word], bits_type(dtype)), dtype)[0])


def table_for(
    random: np.random.Generator, layout: KvLayout, token_count: int, blocks: int
) -> tuple[int, ...]:
    count = -(-token_count // layout.block_tokens)
    return tuple(int(block) for block in random.permutation(np.arange(1, blocks))[:count])


def packed(
    made: Engine,
    group: int,
    tokens: TokenRange,
    table: tuple[int, ...],
    heads: HeadRange,
    form: Form = Form.TOKENS,
) -> tuple[PartShape, bytes, bytes]:
    """A part, its bytes and its digest."""
    part = PartShape(form, group, heads, tokens)
    length = part_bytes(part, made.layout.groups[group], made.layout.layout)
    tables = tuple(table if index == group else () for index in range(len(made.layout.groups)))
    (digest,) = made.repacker.pack([Slot(part, 256, length)], tables)
    data = made.staging[256 : 256 + length].tobytes()
    assert digest == part_digest(data)
    return part, data, digest


def unpack(
    target: Engine,
    source: RankLayout,
    got: tuple[PartShape, bytes, bytes],
    table: tuple[int, ...],
    tokens: TokenRange,
) -> bool:
    part, data, digest = got
    target.staging[512 : 512 + len(data)] = np.frombuffer(data, np.uint8)
    tables = tuple(table if index == part.group else () for index in range(len(target.layout.groups)))
    return target.repacker.unpack(Unpack("r", 0, part, source, 512, len(data), digest, tables, tokens))


def expected_word(
    value: int, source: RankLayout, target: RankLayout, group: int, layer: int, element: int
) -> int:
    """What the consumer must store for a stored element of the producer, by plain Python numbers."""
    shape = source.groups[group]
    name = "key" if element < shape.key_dim else "value"
    scale_in = getattr(source.scales[group][layer], name) if source.scales else 1.0
    scale_out = getattr(target.scales[group][layer], name) if target.scales else 1.0
    if source.layout.dtype is target.layout.dtype and scale_in == scale_out:
        return value
    meant = number(value, source.layout.dtype) * scale_in / scale_out
    nearest = encode(np.array([meant], np.float32), target.layout.dtype)
    return int(nearest[0])


def snapshot(made: Engine) -> list[list[list[NDArray[np.uint8]]]]:
    return [[[tensor.copy() for tensor in tensors] for tensors in group.layers] for group in made.memory]


def check_transfer(
    producer: Engine,
    consumer: Engine,
    group: int,
    tokens: TokenRange,
    wanted: TokenRange,
    tables: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Move tokens by parts of head runs, then compare every element of the consumer's memory."""
    before = snapshot(consumer)[group]
    shape = producer.layout.groups[group]
    own = consumer.layout.heads(group)
    for heads in head_runs(producer.layout.heads(group), 2):
        if own.overlap(heads):
            got = packed(producer, group, tokens, tables[0], heads)
            assert unpack(consumer, producer.layout, got, tables[1], wanted)
    layout = consumer.layout.layout
    due = [[tensor.copy() for tensor in tensors] for tensors in before]
    reach = producer.layout.heads(group).overlap(own)
    assert reach is not None
    for layer, token, head in itertools.product(
        range(shape.layer_count), range(wanted.first, wanted.end), range(reach.first, reach.end)
    ):
        block = tables[1][token // layout.block_tokens]
        if block <= 0:
            continue
        theirs = tables[0][token // producer.layout.layout.block_tokens]
        within, own_head = token % layout.block_tokens, head - own.first
        for element in range(shape.row_elements):
            word = 0
            if theirs > 0:
                their_head = head - producer.layout.heads(group).first
                word = producer.stored(group, layer, tables[0], token, their_head, element)
            tensor, position = consumer.place(group, block, within, own_head, element)
            due[layer][tensor][position] = expected_word(
                word, producer.layout, consumer.layout, group, layer, element
            )
        arrangement = consumer.memory[group].arrangement
        for index, side in enumerate(arrangement.sides):
            for element in range(side.dim, side.length(Axis.ELEMENT)):
                tensor, position = consumer.places[group][index, within, own_head, element]
                due[layer][tensor][position + block * arrangement.block_strides[tensor]] = 0
    # Layers of one allocation overlap in what their flat arrays reach, so each position is asked for once.
    compare(before, due, consumer, group)


def compare(
    before: list[list[NDArray[np.uint8]]],
    due: list[list[NDArray[np.uint8]]],
    consumer: Engine,
    group: int,
) -> None:
    layers = consumer.memory[group].layers
    changes: dict[tuple[int, int], int] = {}
    for tensors, olds, news in zip(layers, before, due, strict=True):
        for place, (tensor, old, new) in enumerate(zip(tensors, olds, news, strict=True)):
            start = (tensor.__array_interface__["data"][0]) // tensor.itemsize
            for position in np.flatnonzero(old != new):
                changes[place, start + int(position)] = int(new[position])
    for tensors, olds in zip(layers, before, strict=True):
        for place, (tensor, old) in enumerate(zip(tensors, olds, strict=True)):
            start = (tensor.__array_interface__["data"][0]) // tensor.itemsize
            wished = old.copy()
            for (index, position), word in changes.items():
                if index == place and 0 <= position - start < len(wished):
                    wished[position - start] = word
            assert np.array_equal(tensor, wished)


def ranges(total: int) -> st.SearchStrategy[TokenRange]:
    return st.integers(0, total - 1).flatmap(
        lambda first: st.integers(1, total - first).map(lambda count: TokenRange(first, count))
    )


QUICK = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.data_too_large])


@st.composite
def pairs(
    draw: st.DrawFn,
) -> tuple[Engine, Engine, TokenRange, TokenRange, tuple[tuple[int, ...], tuple[int, ...]]]:
    shape = draw(st.sampled_from([FULL, replace(FULL, layer_count=1, key_dim=32, value_dim=32)]))
    dtypes = st.sampled_from(list(KvDtype))
    engines = []
    for seed in range(2):
        layout = draw(st.sampled_from(LAYOUTS))
        parallel = draw(st.sampled_from([1, 2, 4, 8]))
        layout = replace(layout, dtype=draw(dtypes), tensor_parallel=parallel)
        if layout.tiling == CPU_AMX:
            layout = replace(layout, dtype=KvDtype.BFLOAT16)
        if layout.dtype.is_fp8 and layout.tiling == ROCM_AITER_SHUFFLE:
            layout = replace(layout, block_tokens=32)
        rank = draw(st.integers(0, parallel - 1))
        if seed == 1 and not engines[0].layout.heads(0).overlap(heads_of_rank(4, parallel, rank)):
            rank = next(
                rank
                for rank in range(parallel)
                if engines[0].layout.heads(0).overlap(heads_of_rank(4, parallel, rank))
            )
        scales: tuple[tuple[LayerScales, ...], ...] = ()
        if layout.dtype.is_fp8 and draw(st.booleans()):
            scales = (tuple(LayerScales(0.25 * 2**layer, 2.0) for layer in range(shape.layer_count)),)
        engines.append(
            engine(
                layout, (shape,), rank=rank, seed=seed, scales=scales, is_learned=draw(st.integers(0, 4)) == 0
            )
        )
    room = min((BLOCKS - 1) * made.layout.layout.block_tokens for made in engines)
    total = min(room, draw(st.integers(1, 70)))
    tokens = draw(ranges(total))
    low = draw(st.integers(tokens.first, tokens.end - 1))
    wanted = TokenRange(low, draw(st.integers(1, tokens.end - low)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    tables = tuple(table_for(random, made.layout.layout, total, BLOCKS) for made in engines)
    if draw(st.booleans()):
        tables = tuple(tuple(sorted(table)) for table in tables)
    return engines[0], engines[1], tokens, wanted, (tables[0], tables[1])


@given(pairs())
@QUICK
def test_any_pair_of_layouts_agrees_with_the_oracle(
    drawn: tuple[Engine, Engine, TokenRange, TokenRange, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    producer, consumer, tokens, wanted, tables = drawn
    check_transfer(producer, consumer, 0, tokens, wanted, tables)


@pytest.mark.parametrize("producer_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize("consumer_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_every_split_of_heads_arrives_whole(
    producer_parallel: int, consumer_parallel: int, kv_heads: int
) -> None:
    shape = GroupShape(1, kv_heads, 4, 4)
    table = (3, 1, 2)
    tokens = TokenRange(0, 10)
    producers = [
        engine(KvLayout(4, tensor_parallel=producer_parallel), (shape,), rank=rank, seed=rank, blocks=5)
        for rank in range(producer_parallel)
    ]
    for rank in range(consumer_parallel):
        layout = KvLayout(8, Order.HND, tensor_parallel=consumer_parallel)
        consumer = engine(layout, (shape,), rank=rank, seed=50, blocks=5)
        own = consumer.layout.heads(0)
        source: dict[int, Engine] = {}
        for producer in producers:
            heads = producer.layout.heads(0)
            if not own.overlap(heads) or heads.first in source:
                continue
            got = packed(producer, 0, tokens, table, heads)
            assert unpack(consumer, producer.layout, got, (2, 4), tokens)
            source.update(dict.fromkeys(range(heads.first, heads.end), producer))
        for token, head, element in itertools.product(range(10), range(own.first, own.end), range(8)):
            theirs = source[head]
            word = theirs.stored(0, 0, table, token, head - theirs.layout.heads(0).first, element)
            assert consumer.stored(0, 0, (2, 4), token, head - own.first, element) == word


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (KvLayout(16), KvLayout(48, Order.HND)),
        (KvLayout(64, split=KvSplit.SEPARATE), KvLayout(16, split=KvSplit.HALVED)),
        (KvLayout(16, Order.BLHNC, head_dim_multiple=32), KvLayout(1, dtype=KvDtype.FLOAT32)),
    ],
)
def test_a_latent_and_uneven_heads_move(source: KvLayout, target: KvLayout) -> None:
    for shape in (LATENT, UNEVEN):
        if shape is UNEVEN and KvSplit.HALVED in {source.split, target.split}:
            continue
        producer, consumer = engine(source, (shape,), seed=1), engine(target, (shape,), seed=2, blocks=80)
        tables = (5, 4, 3, 2), tuple(range(70, 2, -1))
        check_transfer(producer, consumer, 0, TokenRange(3, 50), TokenRange(5, 40), tables)


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pages_arrive_as_they_are_and_only_the_wanted_tokens(layout: KvLayout, is_learned: bool) -> None:
    shapes = (FULL, WINDOW)
    producer = engine(layout, shapes, seed=1, is_learned=is_learned)
    consumer = engine(layout, shapes, seed=2, is_learned=is_learned, blocks=BLOCKS + 2)
    size = layout.block_tokens
    tables = (9, 3, 4, 5, 6), (2, 3, 8, 12, 1)
    tokens = TokenRange(size, 3 * size - size // 3)
    wanted = TokenRange(tokens.first + size // 4, tokens.count - size // 4)
    before = snapshot(consumer)
    heads = producer.layout.heads(0)
    got = packed(producer, 0, tokens, tables[0], heads, Form.PAGES)
    assert unpack(consumer, producer.layout, got, tables[1], wanted)
    after = snapshot(consumer)
    for new, old in zip(consumer.memory[0].layers, before[0], strict=True):
        for tensor, kept in zip(new, old, strict=True):
            tensor[:] = kept
    check_transfer(producer, consumer, 0, tokens, wanted, tables)
    for one, other in zip(itertools.chain(*after[0]), itertools.chain(*snapshot(consumer)[0]), strict=True):
        if layout.head_dim_multiple == 1:
            assert np.array_equal(one, other)


def test_a_page_in_one_run_of_memory_travels_as_it_stands() -> None:
    made = engine(KvLayout(16, Order.HND), (FULL,))
    _, data, _ = packed(made, 0, TokenRange(0, 32), (5, 2), made.layout.heads(0), Form.PAGES)
    page = 16 * 4 * 32
    due = [
        made.memory[0].layers[layer][0][block * page : (block + 1) * page]
        for layer in range(2)
        for block in (5, 2)
    ]
    assert data == b"".join(part.tobytes() for part in due)


def test_blocks_that_left_a_window_are_packed_as_zeros_and_left_out() -> None:
    producer = engine(KvLayout(16), (FULL, WINDOW), seed=1)
    consumer = engine(KvLayout(8, Order.HND), (FULL, WINDOW), seed=2)
    tables = (0, -1, 4, 7), (0, 0, 0, 0, 3, 0, 9, 1)
    got = packed(producer, 1, TokenRange(0, 64), tables[0], producer.layout.heads(1))
    rows = np.frombuffer(got[1], np.uint16).reshape(1, 64, 4, 32)
    assert not rows[:, :32].any()
    assert rows[:, 32:].any()
    check_transfer(producer, consumer, 1, TokenRange(0, 64), TokenRange(0, 64), tables)
    check_transfer(
        producer, consumer, 1, TokenRange(0, 64), TokenRange(24, 20), (tables[0], (2, 0, 0, 6, 3, 9))
    )


def test_a_wrong_digest_writes_nothing() -> None:
    producer, consumer = engine(KvLayout(16), (FULL,), seed=1), engine(KvLayout(32), (FULL,), seed=2)
    part, data, digest = packed(producer, 0, TokenRange(0, 20), (1, 2), producer.layout.heads(0))
    before = snapshot(consumer)
    spoiled = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    assert not unpack(consumer, producer.layout, (part, spoiled, digest), (1,), TokenRange(0, 20))
    assert all(
        np.array_equal(one[0], other[0]) for one, other in zip(before[0], snapshot(consumer)[0], strict=True)
    )
    assert unpack(consumer, producer.layout, (part, data, digest), (1,), TokenRange(0, 20))


def test_nothing_wanted_writes_nothing() -> None:
    made = engine(KvLayout(16), (FULL,))
    before = snapshot(made)
    for form in Form:
        got = packed(made, 0, TokenRange(16, 8), (1, 2), made.layout.heads(0), form)
        assert unpack(made, made.layout, got, (), TokenRange(0, 0))
        empty = packed(made, 0, TokenRange(16, 0), (), made.layout.heads(0), form)
        assert unpack(made, made.layout, empty, (), TokenRange(16, 0))
    assert all(
        np.array_equal(one[0], other[0]) for one, other in zip(before[0], snapshot(made)[0], strict=True)
    )


def test_memory_that_is_not_the_layouts_is_refused() -> None:
    made = engine(KvLayout(16), (FULL,))
    layers, arrangement = made.memory[0].layers, made.memory[0].arrangement
    assert isinstance(arrangement, Arrangement)
    wrong = {
        "groups": [],
        "layers": [GroupMemory(layers[:1], arrangement)],
        "tensors each": [GroupMemory(tuple(tensors * 2 for tensors in layers), arrangement)],
        "of 2 bytes": [GroupMemory(tuple((tensors[0].view(np.uint8),) for tensors in layers), arrangement)],
        "sides": [GroupMemory(layers, replace(arrangement, sides=arrangement.sides[:1]))],
        "tokens of a block": [GroupMemory(layers, arrangement_of(KvLayout(8), FULL, 4))],
        "a padded head": [GroupMemory(layers, arrangement_of(KvLayout(16, head_dim_multiple=64), FULL, 4))],
        "collide": [GroupMemory(layers, replace(arrangement, block_strides=(64,)))],
    }
    for message, memory in wrong.items():
        with pytest.raises(LayoutError, match=message):
            NumpyRepacker(made.layout, memory, made.staging)


def test_scales_of_each_layer_and_side_are_applied() -> None:
    shape = GroupShape(2, 1, 4, 4)
    given = ((LayerScales(0.5, 4.0), LayerScales(2.0, 1.0)),)
    producer = engine(KvLayout(4, dtype=KvDtype.FP8_E4M3FN), (shape,), scales=given, seed=1)
    consumer = engine(KvLayout(4, dtype=KvDtype.FLOAT32), (shape,), seed=2)
    got = packed(producer, 0, TokenRange(0, 4), (1,), HeadRange(0, 1))
    assert unpack(consumer, producer.layout, got, (2,), TokenRange(0, 4))
    for layer, token, element in itertools.product(range(2), range(4), range(8)):
        stored = number(producer.stored(0, layer, (1,), token, 0, element), KvDtype.FP8_E4M3FN)
        scale = [[0.5, 4.0], [2.0, 1.0]][layer][element // 4]
        arrived = number(consumer.stored(0, layer, (2,), token, 0, element), KvDtype.FLOAT32)
        assert math.isclose(arrived, stored * scale, rel_tol=0)
