"""The torch repacker against the numpy one: on random pairs of engines the same bytes, both ways."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transfer.canonical import Form, PartShape, TokenRange, head_runs, part_bytes
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
)
from transfer.presets import PRESETS
from transfer.repack.numbers import bits_type, decode, encode
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tables import as_learned
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.vocabulary import Slot, Tables, Unpack

torch = pytest.importorskip("torch", reason="torch is not installed")
kernels = pytest.importorskip("transfer.repack.kernels")
torch_memory = pytest.importorskip("transfer.repack.torch_memory")
torch_repacker = pytest.importorskip("transfer.repack.torch_repacker")

BLOCKS = 23
STAGING_BYTES = 1 << 19
FULL = GroupShape(3, 4, 32, 32)
SHAPES = [FULL, GroupShape(2, 2, 16, 48), GroupShape(1, 4, 32, 32, window_tokens=40), GroupShape(2, 1, 40, 0)]
KERNELS = {"numpy": kernels.HostKernels, "torch": kernels.TorchKernels}
PLAIN = [
    KvLayout(1),
    KvLayout(16, Order.NHD),
    KvLayout(7, Order.HND),
    KvLayout(16, Order.BLNHC),
    KvLayout(32, Order.BHLNC),
    KvLayout(24, split=KvSplit.SEPARATE),
    KvLayout(16, Order.HND, split=KvSplit.HALVED),
    KvLayout(16, Order.NHD, head_dim_multiple=24),
]
TILED = [
    replace(preset.layout, block_tokens=32) for preset in PRESETS.values() if preset.layout.tiling != "plain"
]
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}


@dataclass
class Twins:
    """A rank with the same memory twice: in numpy, and in torch."""

    layout: RankLayout
    numpy_layers: list[list[Any]]
    torch_layers: list[list[Any]]
    numpy: NumpyRepacker
    torch: Any
    numpy_staging: Any
    torch_staging: Any

    def assert_equal(self) -> None:
        """Blocks of both are the same; elements are compared as bits, but a NaN only as one."""
        dtype = self.layout.layout.dtype
        for ours, theirs in zip(self.numpy_layers, self.torch_layers, strict=True):
            for flat, tensor in zip(ours, theirs, strict=True):
                found = tensor.numpy().view(flat.dtype)
                differs = flat != found
                if differs.any():
                    assert np.isnan(decode(flat[differs], dtype)).all()
                    assert np.isnan(decode(found[differs], dtype)).all()


def twins(
    layout: RankLayout,
    *,
    kernel: str | None = "numpy",
    is_learned: bool = False,
    is_apart: bool = False,
    seed: int = 0,
) -> Twins:
    """Engines whose blocks hold random numbers; `is_apart` gives each layer an allocation of its own."""
    random = np.random.default_rng(seed)
    kind = bits_type(layout.layout.dtype)
    numpy_layers: list[list[Any]] = []
    torch_layers: list[list[Any]] = []
    numpy_groups, torch_groups = [], []
    for index, shape in enumerate(layout.groups):
        heads = layout.heads(index).count
        tensors = dense_tensors(layout.layout, shape, heads, BLOCKS)
        arrangement: Any = arrangement_of(layout.layout, shape, heads, tuple(t.strides for t in tensors))
        arrangement = as_learned(arrangement) if is_learned else arrangement
        values = [random.normal(0, 3, t.element_count).astype(np.float32) for t in tensors]
        flats = [encode(each, layout.layout.dtype).astype(kind) for each in values]
        wholes = [torch.from_numpy(flat.view(SIGNED[flat.itemsize]).copy()) for flat in flats]
        ours, theirs = [], []
        for layer in range(shape.layer_count):
            starts = [layer * t.layer_stride for t in tensors]
            ends = [
                start + t.layer_stride if is_apart else None for start, t in zip(starts, tensors, strict=True)
            ]
            cuts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
            ours.append(tuple(flat[cut] for flat, cut in zip(flats, cuts, strict=True)))
            views = [whole[cut] for whole, cut in zip(wholes, cuts, strict=True)]
            theirs.append(tuple(view.clone() if is_apart else view for view in views))
        numpy_layers.extend(map(list, ours))
        torch_layers.extend(map(list, theirs))
        numpy_groups.append(GroupMemory(tuple(ours), arrangement))
        torch_groups.append(torch_memory.TorchGroup(arrangement, tuple(theirs)))
    numpy_staging = np.full(STAGING_BYTES, 0xA5, np.uint8)
    torch_staging = torch.full((STAGING_BYTES,), 0xA5, dtype=torch.uint8)
    chosen = KERNELS[kernel]() if kernel else None
    return Twins(
        layout,
        numpy_layers,
        torch_layers,
        NumpyRepacker(layout, numpy_groups, numpy_staging),
        torch_repacker.TorchRepacker(layout, torch_groups, torch_staging, kernels=chosen),
        numpy_staging,
        torch_staging,
    )


def tables_of(draw: Callable[..., Any], layout: RankLayout, token_count: int) -> Tables:
    """Blocks for so many tokens: in any order, in runs, and with holes where a group has a window."""
    found = []
    for shape in layout.groups:
        count = -(-token_count // layout.layout.block_tokens)
        ids = list(range(1, BLOCKS))
        if draw(st.booleans()):
            ids = draw(st.permutations(ids))
        ids = ids[:count]
        if shape.window_tokens is not None:
            kept = draw(st.integers(0, count))
            ids = [0] * (count - kept) + ids[count - kept :]
        found.append(tuple(ids))
    return tuple(found)


@st.composite
def hand_overs(draw: Callable[..., Any]) -> dict[str, Any]:
    """Two engines of one model, a part of a prompt, and the blocks of both."""
    shape = draw(st.sampled_from(SHAPES))
    usable = PLAIN if shape.is_mla or shape.key_dim != 32 else [*PLAIN, *TILED]
    dtypes = draw(st.sampled_from([(KvDtype.BFLOAT16,) * 2, (KvDtype.FP8_E4M3FN,) * 2, None]))
    if dtypes is None:
        dtypes = draw(st.tuples(st.sampled_from(KvDtype), st.sampled_from(KvDtype)))
    ranks = []
    for dtype in dtypes:
        layout = draw(st.sampled_from([each for each in usable if fits(each, dtype)]))
        parallel = draw(st.sampled_from([1, 2, 4] if shape.kv_heads > 1 else [1]))
        rank = draw(st.integers(0, parallel - 1))
        scales: tuple[tuple[LayerScales, ...], ...] = ()
        if dtype.is_fp8 and draw(st.booleans()):
            factors = st.sampled_from([1.0, 0.25, 0.37, 2.0])
            each = [LayerScales(draw(factors), draw(factors)) for _ in range(shape.layer_count)]
            scales = (tuple(each),)
        ranks.append(
            RankLayout(replace(layout, dtype=dtype, tensor_parallel=parallel), rank, (shape,), scales)
        )
    producer, consumer = ranks
    room = min(20, BLOCKS - 1) * min(rank.layout.block_tokens for rank in ranks)
    first = draw(st.integers(0, min(60, room - 1)))
    count = draw(st.integers(1, min(120, room - first)))
    tokens = TokenRange(first, count)
    skipped = draw(st.integers(0, count))
    wanted = TokenRange(first + skipped, draw(st.integers(0, count - skipped)))
    return {
        "producer": producer,
        "consumer": consumer,
        "heads": draw(st.sampled_from(head_runs(producer.heads(0), draw(st.sampled_from([1, 2]))))),
        "tokens": tokens,
        "wanted": wanted,
        "tables": (tables_of(draw, producer, tokens.end), tables_of(draw, consumer, tokens.end)),
        "learned": (draw(st.booleans()), draw(st.booleans())),
        "kernels": (draw(st.sampled_from(sorted(KERNELS))), draw(st.sampled_from(sorted(KERNELS)))),
        "seed": draw(st.integers(0, 1000)),
    }


def fits(layout: KvLayout, dtype: KvDtype) -> bool:
    """Whether the tiling's vectors divide a block and a head of 32 in this dtype."""
    try:
        arrangement_of(replace(layout, dtype=dtype, order=Order.HND), FULL, 4)
    except LayoutError:
        return False
    return True


def order_of(source: RankLayout, part: PartShape, length: int, digest: bytes, tables: Tables) -> Unpack:
    return Unpack("r", 0, part, source, 512, length, digest, tables, part.tokens)


SLOW_SETUP = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW_SETUP)
@given(hand_overs())
def test_tokens_form_is_as_with_numpy(case: dict[str, Any]) -> None:
    shape = case["producer"].groups[0]
    part = PartShape(Form.TOKENS, 0, case["heads"], case["tokens"])
    length = part_bytes(part, shape, case["producer"].layout)
    producer = twins(
        case["producer"], kernel=case["kernels"][0], is_learned=case["learned"][0], seed=case["seed"]
    )
    slot = Slot(part, 256, length)
    digests = producer.torch.pack([slot], case["tables"][0])
    assert digests == producer.numpy.pack([slot], case["tables"][0])
    assert np.array_equal(producer.torch_staging.numpy(), producer.numpy_staging)

    consumer = twins(
        case["consumer"], kernel=case["kernels"][1], is_learned=case["learned"][1], seed=case["seed"] + 1
    )
    part_data = producer.numpy_staging[256 : 256 + length]
    consumer.numpy_staging[512 : 512 + length] = part_data
    consumer.torch_staging.numpy()[512 : 512 + length] = part_data
    order = replace(
        order_of(case["producer"], part, length, digests[0], case["tables"][1]), tokens=case["wanted"]
    )
    if consumer.layout.heads(0).overlap(part.heads) is None:
        with pytest.raises(LayoutError, match="heads"):
            consumer.torch.unpack(order)
        return
    assert consumer.torch.unpack(order)
    assert consumer.numpy.unpack(order)
    consumer.assert_equal()


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW_SETUP)
@given(hand_overs(), st.booleans())
def test_pages_form_is_as_with_numpy(case: dict[str, Any], is_learned: bool) -> None:
    layout = case["producer"]
    block = layout.layout.block_tokens
    first = case["tokens"].first // block * block
    part = PartShape(Form.PAGES, 0, layout.heads(0), TokenRange(first, case["tokens"].end - first))
    length = part_bytes(part, layout.groups[0], layout.layout)
    if length > STAGING_BYTES - 512:
        return
    tables = case["tables"][0]
    producer = twins(layout, kernel=case["kernels"][0], is_learned=is_learned, seed=case["seed"])
    slot = Slot(part, 256, length)
    digests = producer.torch.pack([slot], tables)
    assert digests == producer.numpy.pack([slot], tables)

    consumer = twins(layout, kernel=case["kernels"][1], is_learned=is_learned, seed=case["seed"] + 1)
    part_data = producer.numpy_staging[256 : 256 + length]
    consumer.numpy_staging[512 : 512 + length] = part_data
    consumer.torch_staging.numpy()[512 : 512 + length] = part_data
    order = replace(order_of(layout, part, length, digests[0], tables), tokens=case["wanted"])
    assert consumer.torch.unpack(order)
    assert consumer.numpy.unpack(order)
    consumer.assert_equal()


EACH = {
    **{name: replace(preset.layout, block_tokens=32) for name, preset in PRESETS.items()},
    **{f"plain {index}": replace(layout, block_tokens=32) for index, layout in enumerate(PLAIN)},
}


@pytest.mark.parametrize("name", sorted(EACH))
@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("is_apart", [False, True])
def test_each_layout_hands_a_prompt_over_in_short_and_long_runs(
    name: str, kernel: str, is_apart: bool
) -> None:
    is_apart = is_apart and EACH[name].order in {Order.NHD, Order.HND}
    rank = RankLayout(EACH[name], 0, (GroupShape(2, 2, 64, 64),))
    producer = twins(rank, kernel=kernel, is_apart=is_apart)
    consumer = twins(rank, kernel=kernel, is_apart=is_apart, seed=1)
    part = PartShape(Form.TOKENS, 0, HeadRange(0, 2), TokenRange(5, 330))
    length = part_bytes(part, rank.groups[0], rank.layout)
    tables = ((3, 1, 9, 13, 14, 15, 16, 6, 20, 19, 5),)
    digest = producer.torch.pack([Slot(part, 512, length)], tables)[0]
    assert digest == producer.numpy.pack([Slot(part, 512, length)], tables)[0]
    consumer.torch_staging.copy_(producer.torch_staging)
    consumer.numpy_staging[:] = producer.numpy_staging
    order = order_of(rank, part, length, digest, tables)
    assert consumer.torch.unpack(order)
    assert consumer.numpy.unpack(order)
    consumer.assert_equal()


@pytest.mark.parametrize("dtype", [KvDtype.BFLOAT16, KvDtype.FLOAT32])
@pytest.mark.parametrize("form", list(Form))
def test_layers_go_through_device_memory_in_batches_where_staging_is_elsewhere(
    form: Form, dtype: KvDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with KV on an accelerator and staging on the host; here both are in host memory."""
    for bound in ("BATCH_BYTES", "CONVERTED_BATCH_BYTES"):
        monkeypatch.setattr(torch_repacker, bound, 1)
    rank = RankLayout(KvLayout(16, Order.HND), 0, (FULL,))
    other = RankLayout(
        KvLayout(16, Order.HND, dtype=dtype if form is Form.TOKENS else rank.layout.dtype), 0, (FULL,)
    )
    producer, consumer = twins(rank, kernel="torch"), twins(other, kernel="torch", seed=1)
    for engine in (producer, consumer):
        monkeypatch.setattr(engine.torch, "_is_direct", False)
    part = PartShape(form, 0, HeadRange(0, 4), TokenRange(16, 70))
    length = part_bytes(part, FULL, rank.layout)
    tables = ((2, 5, 3, 7, 8, 9),)
    digest = producer.torch.pack([Slot(part, 512, length)], tables)[0]
    assert digest == producer.numpy.pack([Slot(part, 512, length)], tables)[0]
    consumer.torch_staging.copy_(producer.torch_staging)
    consumer.numpy_staging[:] = producer.numpy_staging
    order = order_of(rank, part, length, digest, tables)
    assert consumer.torch.unpack(order)
    assert consumer.numpy.unpack(order)
    consumer.assert_equal()


def small() -> tuple[RankLayout, PartShape, int, Tables]:
    rank = RankLayout(KvLayout(16), 0, (FULL,))
    part = PartShape(Form.TOKENS, 0, HeadRange(0, 4), TokenRange(0, 40))
    return rank, part, part_bytes(part, FULL, rank.layout), ((2, 5, 3),)


def test_a_wrong_digest_writes_nothing() -> None:
    rank, part, length, tables = small()
    engine, untouched = twins(rank), twins(rank)
    assert not engine.torch.unpack(order_of(rank, part, length, bytes(16), tables))
    engine.numpy_layers = untouched.numpy_layers
    engine.assert_equal()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"landing": STAGING_BYTES}, "landing"),
        ({"length_bytes": 4}, "length_bytes"),
        ({"tables": ((2, 5),)}, "tables"),
        ({"tables": ((2, 5, BLOCKS + 1),)}, "tables"),
        ({"tokens": TokenRange(30, 20)}, "tokens"),
        ({"landing": 513}, "offset"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(change: dict[str, Any], field: str) -> None:
    rank, part, length, tables = small()
    engine = twins(rank)
    start = change.get("landing", 512)
    digest = torch_repacker.part_digest(engine.torch_staging[start : start + length].numpy().data)
    order = replace(order_of(rank, part, length, digest, tables), **change)
    with pytest.raises(LayoutError) as caught:
        engine.torch.unpack(order)
    assert caught.value.field == field


def test_memory_that_does_not_fit_is_refused() -> None:
    rank, *_ = small()
    arrangement = arrangement_of(rank.layout, FULL, 4)
    staging = torch.zeros(16, dtype=torch.uint8)

    def refused(*groups: Any) -> str:
        with pytest.raises(LayoutError) as caught:
            torch_repacker.TorchRepacker(rank, groups, staging)
        return caught.value.field

    def group(*layers: Any, of: Any = arrangement) -> Any:
        return torch_memory.TorchGroup(of, tuple((layer,) for layer in layers))

    good = torch.zeros(1 << 16, dtype=torch.int16)
    assert refused() == "memory"
    assert refused(group(good)) == "layers"
    assert refused(group(good, good, good.float())) == "dtype"
    assert refused(group(good, good, torch.zeros(1 << 16, dtype=torch.int16, device="meta"))) == "device"
    assert refused(torch_memory.TorchGroup(arrangement, ((good, good),) * 3)) == "tensors"
    assert refused(group(good, good, good, of=arrangement_of(KvLayout(32), FULL, 4))) == "arrangement"


@pytest.mark.parametrize("places", [(0, 1, 2), (0, 1, 3), (2, 1, 0)])
def test_registered_tensors_may_have_any_shape_and_strides(places: tuple[int, ...]) -> None:
    """As vLLM registers them: `[block, head, token, content]` views of one int8 allocation of all layers."""
    rank, part, length, tables = small()
    engine = twins(rank)
    size = BLOCKS * 16 * 4 * 64
    backing = torch.zeros(4 * size * 2, dtype=torch.int8)
    layers = []
    for place, (flat,) in zip(places, engine.numpy_layers, strict=True):
        view = backing[place * size * 2 : (place + 1) * size * 2].view(torch.bfloat16)
        view.view(torch.int16).numpy()[:] = flat[:size].view(np.int16)
        layers.append((view.view(BLOCKS, 16, 4, 64).permute(0, 2, 1, 3),))
    group = torch_memory.TorchGroup(arrangement_of(rank.layout, FULL, 4), tuple(layers))
    repacker = torch_repacker.TorchRepacker(rank, [group], engine.torch_staging)
    slot = Slot(part, 0, length)
    assert repacker.pack([slot], tables) == engine.numpy.pack([slot], tables)


def test_threads_work_side_by_side() -> None:
    rank = RankLayout(KvLayout(32, Order.HND, split=KvSplit.HALVED, tiling="cpu-vec"), 0, (FULL,))
    engine = twins(rank)
    part = PartShape(Form.TOKENS, 0, HeadRange(0, 4), TokenRange(0, 64))
    length = part_bytes(part, FULL, rank.layout)
    found: dict[int, tuple[bytes, ...]] = {}

    def work(index: int) -> None:
        for _ in range(20):
            found[index] = engine.torch.pack([Slot(part, index * length, length)], ((index + 1, index + 2),))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in range(4):
        slot = Slot(part, index * length, length)
        assert found[index] == engine.numpy.pack([slot], ((index + 1, index + 2),))
