"""The verdict on a pair: total, symmetric in kind, and closed on what is unknown."""

from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import LayoutError
from transfer.layout import (
    LEARNED_PREFIX,
    PLAIN_TILING,
    GroupShape,
    KvDtype,
    KvLayout,
    KvSplit,
    LayerScales,
    Order,
    RankLayout,
)
from transfer.presets import PRESETS
from transfer.repack.arrangement import check
from transfer.repack.tilings import KNOWN_TILINGS as REPACKED_TILINGS
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.verdict import (
    KNOWN_TILINGS,
    Connector,
    Cost,
    Side,
    VerdictKind,
    judge_ranks,
    tiling_fault,
    verdict,
)

TILINGS = [PLAIN_TILING, "fractal-nz", *KNOWN_TILINGS, f"{LEARNED_PREFIX}ab12"]
layouts = st.builds(
    KvLayout,
    block_tokens=st.sampled_from([8, 16, 64, 128]),
    order=st.sampled_from(Order),
    dtype=st.sampled_from(KvDtype),
    tensor_parallel=st.integers(1, 4),
    tiling=st.sampled_from(TILINGS),
    split=st.sampled_from(KvSplit),
    head_dim_multiple=st.sampled_from([1, 128]),
)
sides = st.builds(Side, st.sampled_from(Connector), st.none() | layouts)
PLAIN = KvLayout(16)
VEC = PRESETS["cpu-vec"].layout
SHAPE = GroupShape(2, 4, 64, 64)
SCALES = ((LayerScales(), LayerScales()),)


def ours(producer: KvLayout, consumer: KvLayout) -> tuple[VerdictKind, str]:
    found = verdict(Side(Connector.PDCOORD, producer), Side(Connector.PDCOORD, consumer))
    return found.kind, found.reason


@given(sides, sides)
def test_every_pair_has_a_verdict_with_a_reason_and_its_kind_is_symmetric(one: Side, two: Side) -> None:
    found = verdict(one, two)
    assert found.reason
    assert found.kind is verdict(two, one).kind
    assert found.is_possible == (found.kind is not VerdictKind.IMPOSSIBLE)


@given(sides, sides)
def test_what_is_unknown_or_unlike_in_connector_is_closed(one: Side, two: Side) -> None:
    is_closed = (
        one.layout is None
        or two.layout is None
        or one.connector is not two.connector
        or one.connector is Connector.NONE
    )
    if is_closed:
        assert verdict(one, two).kind is VerdictKind.IMPOSSIBLE


@given(st.sampled_from([c for c in Connector if c is not Connector.NONE]), layouts)
def test_equal_layouts_move_as_they_are(connector: Connector, layout: KvLayout) -> None:
    assert verdict(Side(connector, layout), Side(connector, replace(layout))).kind is VerdictKind.NATIVE


@given(st.sampled_from([Connector.NIXL, Connector.SGLANG]), layouts, layouts)
def test_stock_connectors_are_given_equal_layouts_only(
    connector: Connector, one: KvLayout, two: KvLayout
) -> None:
    assert verdict(Side(connector, one), Side(connector, two)).is_possible == (one == two)


@pytest.mark.parametrize("connector", [Connector.NIXL, Connector.SGLANG])
@pytest.mark.parametrize(
    "change",
    [
        {"split": KvSplit.HALVED},
        {"head_dim_multiple": 128},
        {"order": Order.BLNHC},
        {"dtype": KvDtype.FP8_E4M3FN},
    ],
)
def test_no_field_is_overlooked_for_a_stock_connector(
    connector: Connector, change: dict[str, object]
) -> None:
    other = replace(PLAIN, **change)  # type: ignore[arg-type]
    found = verdict(Side(connector, PLAIN), Side(connector, other))
    assert not found.is_possible
    assert next(iter(change)) in found.reason


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (replace(PLAIN, block_tokens=128), VerdictKind.REGROUP),
        (replace(PLAIN, order=Order.HND), VerdictKind.REGROUP),
        (replace(PLAIN, order=Order.BHLNC), VerdictKind.REGROUP),
        (replace(PLAIN, tensor_parallel=4), VerdictKind.REGROUP),
        (replace(PLAIN, split=KvSplit.SEPARATE), VerdictKind.REGROUP),
        (replace(PLAIN, head_dim_multiple=128), VerdictKind.REGROUP),
        (replace(PLAIN, tiling="learned-0f"), VerdictKind.REGROUP),
        (VEC, VerdictKind.REGROUP),
        (replace(PLAIN, dtype=KvDtype.FLOAT16), VerdictKind.CONVERT),
        (replace(PLAIN, dtype=KvDtype.FLOAT16, block_tokens=128), VerdictKind.CONVERT),
        (replace(PLAIN, tiling="fractal-nz"), VerdictKind.IMPOSSIBLE),
        (replace(PLAIN, tiling="fractal-nz", block_tokens=128), VerdictKind.IMPOSSIBLE),
    ],
)
def test_our_connector_regroups_and_converts_what_it_knows(other: KvLayout, kind: VerdictKind) -> None:
    found, reason = ours(PLAIN, other)
    assert found is kind
    assert all(name in reason for name in PLAIN.differences(other))


def test_equal_private_tilings_with_other_differences_are_closed() -> None:
    one, two = replace(PLAIN, tiling="fractal-nz"), KvLayout(128, tiling="fractal-nz")
    kind, reason = ours(one, two)
    assert kind is VerdictKind.IMPOSSIBLE
    assert "nothing here can unpack tiling fractal-nz" in reason


@pytest.mark.parametrize("one", PRESETS)
@pytest.mark.parametrize("two", PRESETS)
def test_every_two_presets_can_be_paired_by_our_connector(one: str, two: str) -> None:
    producer, consumer = PRESETS[one].layout, PRESETS[two].layout
    kind, _ = ours(producer, consumer)
    assert kind is (VerdictKind.NATIVE if producer == consumer else VerdictKind.REGROUP)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (replace(VEC, split=KvSplit.PACKED), "split is packed, but cpu-vec pages are halved"),
        (replace(VEC, order=Order.NHD), "order is NHD, but cpu-vec pages are one of HND, LHBNC"),
        (
            replace(VEC, tiling="cpu-amx", dtype=KvDtype.FLOAT16),
            "dtype is float16, but cpu-amx pages hold bfloat16",
        ),
        (
            replace(VEC, tiling="cpu-amx", block_tokens=24),
            "block_tokens is 24, but cpu-amx pages hold a multiple of 16",
        ),
        (
            replace(VEC, tiling="rocm-aiter-shuffle", dtype=KvDtype.FP8_E4M3FNUZ, block_tokens=24),
            "block_tokens is 24, but rocm-aiter-shuffle pages hold a multiple of 16",
        ),
        (replace(VEC, tiling="t"), "nothing here can unpack tiling t; known are plain, cpu-vec"),
    ],
)
def test_a_page_that_no_engine_has_is_closed_with_its_field(layout: KvLayout, said: str) -> None:
    assert (tiling_fault(layout) or "").startswith(said)
    for one, two in ((PLAIN, layout), (layout, PLAIN)):
        kind, reason = ours(one, two)
        assert kind is VerdictKind.IMPOSSIBLE
        assert said in reason


@given(layouts)
def test_a_page_without_fault_is_one_that_can_be_repacked(layout: KvLayout) -> None:
    """Head sizes of 128 suit every tiling, so what is left to find fault with is the layout."""
    if layout.tiling.startswith(LEARNED_PREFIX) or layout.dtype is not KvDtype.BFLOAT16:
        return
    shape = GroupShape(2, 4, 128, 128)
    strides = tuple(tensor.strides for tensor in dense_tensors(layout, shape, 4, 3))
    if tiling_fault(layout) is None:
        check(arrangement_of(layout, shape, 4, strides), 3)
    else:
        with pytest.raises(LayoutError):
            arrangement_of(layout, shape, 4, strides)


def test_the_known_tilings_are_those_that_can_be_repacked() -> None:
    assert set(KNOWN_TILINGS) == set(REPACKED_TILINGS)


@given(st.sampled_from(KvDtype), st.sampled_from(KvDtype))
def test_unlike_numbers_are_always_converted_never_read_as_each_other(one: KvDtype, two: KvDtype) -> None:
    kind, reason = ours(replace(PLAIN, dtype=one), replace(PLAIN, dtype=two))
    assert kind is (VerdictKind.NATIVE if one is two else VerdictKind.CONVERT)
    if one is not two:
        assert one.value in reason
        assert two.value in reason


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (KvDtype.FP8_E4M3FN, KvDtype.FP8_E4M3FNUZ, "limited to 240 times the scale"),
        (KvDtype.BFLOAT16, KvDtype.FP8_E5M2, "limited to 57344 times the scale"),
        (KvDtype.FP8_E4M3FNUZ, KvDtype.BFLOAT16, "fp8_e4m3fnuz times its scale becomes bfloat16"),
        (KvDtype.BFLOAT16, KvDtype.FLOAT32, "bfloat16 becomes float32 exactly"),
        (KvDtype.FLOAT16, KvDtype.BFLOAT16, "float16 is rounded to bfloat16"),
    ],
)
def test_a_reason_says_what_becomes_of_the_numbers(one: KvDtype, two: KvDtype, said: str) -> None:
    assert said in ours(replace(PLAIN, dtype=one), replace(PLAIN, dtype=two))[1]


@pytest.mark.parametrize(
    ("one", "two", "is_possible"), [(2, 4, True), (8, 1, True), (2, 3, False), (6, 4, False)]
)
def test_rank_counts_of_which_neither_divides_the_other_wait_for_the_heads(
    one: int, two: int, is_possible: bool
) -> None:
    kind, reason = ours(replace(PLAIN, tensor_parallel=one), replace(PLAIN, tensor_parallel=two))
    assert (kind is not VerdictKind.IMPOSSIBLE) == is_possible
    assert is_possible or "KV heads are not known" in reason


def test_the_reason_names_both_connectors() -> None:
    found = verdict(Side(Connector.NIXL, PLAIN), Side(Connector.SGLANG, PLAIN))
    assert "nixl" in found.reason
    assert "sglang" in found.reason


@given(sides, sides)
def test_what_is_possible_has_a_cost(one: Side, two: Side) -> None:
    found = verdict(one, two)
    assert (found.cost is None) == (not found.is_possible)
    if found.cost is not None and one.connector is not Connector.PDCOORD:
        assert found.cost == Cost(0, 0, 1.0, 0.0)


def cost(producer: KvLayout, consumer: KvLayout) -> Cost:
    found = verdict(Side(Connector.PDCOORD, producer), Side(Connector.PDCOORD, consumer)).cost
    assert found is not None
    return found


@given(st.sampled_from(KvDtype), st.sampled_from(KvDtype))
def test_the_producers_numbers_travel_and_the_consumer_converts(one: KvDtype, two: KvDtype) -> None:
    found = cost(replace(PLAIN, dtype=one), replace(PLAIN, dtype=two))
    assert found.wire_factor == one.item_bytes / two.item_bytes
    assert (found.pack_passes, found.unpack_passes) == (2, 2 if one is two else 3)
    if one.item_bytes >= two.item_bytes and one is not two:
        assert found.core_s_per_gb > cost(PLAIN, PLAIN).core_s_per_gb


def test_the_more_is_done_the_more_it_costs() -> None:
    steps = [
        cost(PLAIN, PLAIN),
        cost(PLAIN, replace(PLAIN, block_tokens=32)),
        cost(PLAIN, VEC),
        cost(replace(VEC, block_tokens=32), VEC),
        cost(replace(VEC, dtype=KvDtype.FLOAT16), VEC),
    ]
    assert [step.core_s_per_gb for step in steps] == sorted({step.core_s_per_gb for step in steps})


def rank(layout: KvLayout, number: int = 0, *, groups: tuple[GroupShape, ...] = (SHAPE,)) -> RankLayout:
    scales = tuple((LayerScales(),) * g.layer_count for g in groups) if layout.dtype.is_fp8 else ()
    return RankLayout(layout, number, groups, scales)


@given(layouts.filter(lambda layout: layout.tensor_parallel != 3), layouts)
def test_ranks_are_judged_as_their_layouts_are_where_shapes_are_equal(one: KvLayout, two: KvLayout) -> None:
    two = replace(two, tensor_parallel=one.tensor_parallel)
    declared = verdict(Side(Connector.PDCOORD, one), Side(Connector.PDCOORD, two))
    assert judge_ranks(rank(one), rank(two)) == declared


def test_ranks_whose_counts_do_not_divide_each_other_are_judged_by_their_heads() -> None:
    groups = (GroupShape(2, 6, 64, 64),)
    two = rank(replace(PLAIN, tensor_parallel=2), 1, groups=groups)
    three = rank(replace(PLAIN, tensor_parallel=3), 2, groups=groups)
    assert judge_ranks(two, three).kind is VerdictKind.REGROUP
    assert judge_ranks(three, two).kind is VerdictKind.REGROUP


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            (replace(SHAPE, layer_count=3),),
            "layer_count of group 0 is 2 at the producer and 3 at the consumer",
        ),
        ((replace(SHAPE, kv_heads=8),), "kv_heads of group 0 is 4 at the producer and 8 at the consumer"),
        ((replace(SHAPE, key_dim=80),), "key_dim of group 0 is 64 at the producer and 80 at the consumer"),
        ((replace(SHAPE, value_dim=80),), "value_dim of group 0 is 64 at the producer and 80"),
        ((replace(SHAPE, window_tokens=9),), "window_tokens of group 0 is None at the producer and 9"),
        ((SHAPE, SHAPE), "the producer has 1 KV cache groups, the consumer 2"),
    ],
)
def test_ranks_of_unlike_shapes_are_closed(groups: tuple[GroupShape, ...], said: str) -> None:
    found = judge_ranks(rank(PLAIN), rank(PLAIN, groups=groups))
    assert found.kind is VerdictKind.IMPOSSIBLE
    assert found.reason.startswith(said)


FP8 = replace(PLAIN, dtype=KvDtype.FP8_E4M3FN)


@pytest.mark.parametrize("layout", [FP8, replace(FP8, block_tokens=64)])
def test_equal_bytes_under_unlike_scales_are_unlike_numbers(layout: KvLayout) -> None:
    one = RankLayout(FP8, 0, (SHAPE,), SCALES)
    assert judge_ranks(one, RankLayout(layout, 0, (SHAPE,), SCALES)).kind is not VerdictKind.CONVERT
    other = ((LayerScales(), LayerScales(key=0.5)),)
    found = judge_ranks(one, RankLayout(layout, 0, (SHAPE,), other))
    assert found.kind is VerdictKind.CONVERT
    assert "scales differ" in found.reason
    assert found.cost is not None
    assert found.cost.unpack_passes == 3


@pytest.mark.parametrize("factor", [nan, inf, 0.0, -1.0])
def test_scales_that_are_missing_or_no_factors_are_closed(factor: float) -> None:
    good = RankLayout(FP8, 0, (SHAPE,), SCALES)
    without = RankLayout(FP8, 0, (SHAPE,))
    wrong = RankLayout(FP8, 0, (SHAPE,), ((LayerScales(), LayerScales(value=factor)),))
    for bad, said in ((without, "stores fp8_e4m3fn and tells no scales"), (wrong, f"is {factor}, expected")):
        for one, two, name in ((bad, good, "producer"), (good, bad, "consumer")):
            found = judge_ranks(one, two)
            assert found.kind is VerdictKind.IMPOSSIBLE
            assert said in found.reason
            assert f"the {name}" in found.reason
