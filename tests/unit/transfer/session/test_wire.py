"""Layouts, parts and messages come back as they went; what no engine can have is refused."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.canonical import Form, PartShape, TokenRange
from transfer.errors import Failure, FailureKind, LayoutError, TransferError
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
from transfer.session.bounds import check_message
from transfer.session.messages import Denial, Done, Fetch, Offer, Renewal
from transfer.session.vocabulary import (
    Denied,
    DoneHeard,
    FetchAsked,
    Offered,
    Proof,
    RenewAsked,
    SendDenial,
    SendDone,
    SendFetch,
    SendOffer,
    SendRenewal,
    StagedPart,
    TransferId,
)
from transfer.session.wire import (
    inbox_event,
    message_of,
    outbox_event,
    rank_layout_from_wire,
    rank_layout_to_wire,
)

ID = TransferId("a" * 32)
PROOF = Proof(b"n" * 16, b"p" * 16)

FULL = RankLayout(
    layout=KvLayout(
        128, Order.BLHNC, KvDtype.FP8_E4M3FNUZ, 4, "rocm-shuffle", KvSplit.SEPARATE, head_dim_multiple=64
    ),
    rank=3,
    groups=(GroupShape(2, 8, 128, 128), GroupShape(1, 4, 64, 64, window_tokens=1024)),
    scales=((LayerScales(0.5, 2.0), LayerScales()), (LayerScales(1.0, 0.25),)),
    model="some/model",
)
MLA = RankLayout(KvLayout(64), 0, (GroupShape(61, 1, 576, 0),))


@st.composite
def rank_layouts(draw: st.DrawFn) -> RankLayout:
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    layout = KvLayout(
        block_tokens=draw(st.integers(1, 65_536)),
        order=draw(st.sampled_from(Order)),
        dtype=draw(st.sampled_from(KvDtype)),
        tensor_parallel=ranks,
        tiling=draw(st.sampled_from(["plain", "learned-12"])),
        split=draw(st.sampled_from(KvSplit)),
        head_dim_multiple=draw(st.integers(1, 256)),
    )
    groups = tuple(
        GroupShape(draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 8])), 64, 32, draw(windows))
        for _ in range(draw(st.integers(1, 3)))
    )
    scales = tuple(
        tuple(LayerScales(draw(factors), draw(factors)) for _ in range(g.layer_count)) for g in groups
    )
    return RankLayout(layout, draw(st.integers(0, ranks - 1)), groups, scales if draw(st.booleans()) else ())


windows = st.none() | st.integers(1, 10_000)
factors = st.floats(1e-20, 1e20)


@given(rank_layouts())
def test_a_layout_comes_back_as_it_went(layout: RankLayout) -> None:
    assert rank_layout_from_wire(rank_layout_to_wire(layout)) == layout


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("layout", "order"), "DHN", "order"),
        (("layout", "order"), [1], "order"),
        (("layout", "dtype"), "int4", "dtype"),
        (("layout", "split"), None, "split"),
        (("layout", "block_tokens"), 0, "block_tokens"),
        (("layout", "block_tokens"), True, "block_tokens"),
        (("layout", "block_tokens"), 1 << 70, "block_tokens"),
        (("layout", "block_tokens"), 16.0, "block_tokens"),
        (("layout", "tensor_parallel"), 1 << 40, "tensor_parallel"),
        (("layout", "tensor_parallel"), 5, "tensor_parallel"),
        (("layout", "tiling"), "x" * 2000, "tiling"),
        (("layout", "tiling"), "", "tiling"),
        (("layout", "head_dim_multiple"), -1, "head_dim_multiple"),
        (("layout",), None, "layout"),
        (("layout", "more"), 1, "layout"),
        (("rank",), -1, "rank"),
        (("rank",), 4, "rank"),
        (("model",), 7, "model"),
        (("groups",), [], "groups"),
        (("groups",), {}, "groups"),
        (("groups",), [None] * 65, "groups"),
        (("groups", 0), "x", "groups"),
        (("groups", 0, "layer_count"), 1 << 31, "layer_count"),
        (("groups", 0, "kv_heads"), 1 << 31, "kv_heads"),
        (("groups", 0, "key_dim"), 0, "key_dim"),
        (("groups", 0, "value_dim"), -1, "value_dim"),
        (("groups", 0, "value_dim"), 0, "kv_heads"),
        (("groups", 1, "window_tokens"), 0, "window_tokens"),
        (("scales",), [[]], "scales"),
        (("scales", 0), [], "scales"),
        (("scales", 0, 0), [1.0], "scales"),
        (("scales", 0, 0), [1.0, float("nan")], "scales"),
        (("scales", 0, 0), [1.0, float("inf")], "scales"),
        (("scales", 0, 0), [1.0, 0.0], "scales"),
        (("scales", 0, 0), [1.0, -1], "scales"),
        (("scales", 0, 0), [1.0, 1 << 2000], "scales"),
        (("scales", 0, 0), [1.0, "1"], "scales"),
    ],
)
def test_a_field_no_engine_can_have_is_named(path: tuple[str | int, ...], value: object, field: str) -> None:
    wire: Any = copy.deepcopy(rank_layout_to_wire(FULL))
    at = wire
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(LayoutError) as caught:
        rank_layout_from_wire(wire)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500, "a peer's own text is not repeated at length"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.tuples(st.sampled_from(["layout", "rank", "groups", "scales", "model"]), junk)), junk)
def test_junk_gives_a_layout_or_a_named_error(changes: list[tuple[str, object]], other: object) -> None:
    wire = rank_layout_to_wire(MLA) | dict(changes)
    for given_wire in (wire, other):
        try:
            rank_layout_from_wire(given_wire)
        except TransferError as error:
            assert isinstance(error, LayoutError)


def test_what_a_consumer_orders_is_what_the_producer_hears() -> None:
    fetch = message_of(SendFetch("source", ID, PROOF, 5, 2, 1.5))
    assert isinstance(fetch, Fetch)
    check_message(fetch)
    heard = outbox_event("me", fetch, is_layout_equal=True)
    assert heard == FetchAsked("me", ID, PROOF, 5, 2, is_layout_equal=True, wait_s=1.5)
    done = message_of(SendDone("source", ID, PROOF, 2))
    assert isinstance(done, Done)
    assert outbox_event("me", done, is_layout_equal=False) == DoneHeard("me", ID, PROOF, 2)
    renewal = message_of(SendRenewal("source", (ID,)))
    assert isinstance(renewal, Renewal)
    assert outbox_event("me", renewal, is_layout_equal=False) == RenewAsked("me", (ID,))


def test_what_a_producer_orders_is_what_the_consumer_hears() -> None:
    shape = PartShape(Form.PAGES, 1, HeadRange(2, 3), TokenRange(4, 5))
    part = StagedPart(shape, 256, 1000, b"d" * 16)
    offer = message_of(SendOffer("consumer", ID, (part,), 9, is_last=True))
    assert isinstance(offer, Offer)
    check_message(offer)
    assert inbox_event("me", offer) == Offered("me", ID, (part,), 9, is_last=True)
    failure = Failure(FailureKind.LEASE_EXPIRED, "x" * 5000)
    denial = message_of(SendDenial("consumer", ID, failure))
    assert isinstance(denial, Denial)
    check_message(denial)
    assert inbox_event("me", denial) == Denied("me", ID, Failure(FailureKind.LEASE_EXPIRED, "x" * 1024))


def test_a_wait_is_brought_within_what_peers_accept() -> None:
    for wait_s in (-3.0, 1e9):
        check_message(message_of(SendFetch("source", ID, PROOF, 5, 2, wait_s)))
