"""The verdict on a pair: total, symmetric in kind, and closed on what is unknown."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.layout import PLAIN_TILING, KvDtype, KvLayout, Order
from transfer.verdict import Connector, Side, VerdictKind, verdict

layouts = st.builds(
    KvLayout,
    block_tokens=st.sampled_from([16, 64, 128]),
    order=st.sampled_from(Order),
    dtype=st.sampled_from(KvDtype),
    tensor_parallel=st.sampled_from([1, 2]),
    tiling=st.sampled_from([PLAIN_TILING, PLAIN_TILING, "fractal-nz"]),
)
sides = st.builds(Side, st.sampled_from(Connector), st.none() | layouts)
PLAIN = KvLayout(16)


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


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (replace(PLAIN, block_tokens=128), VerdictKind.REGROUP),
        (replace(PLAIN, order=Order.HND), VerdictKind.REGROUP),
        (replace(PLAIN, tensor_parallel=4), VerdictKind.REGROUP),
        (replace(PLAIN, dtype=KvDtype.FLOAT16), VerdictKind.CONVERT),
        (replace(PLAIN, dtype=KvDtype.FLOAT16, block_tokens=128), VerdictKind.CONVERT),
        (replace(PLAIN, tiling="fractal-nz"), VerdictKind.IMPOSSIBLE),
        (replace(PLAIN, tiling="fractal-nz", block_tokens=128), VerdictKind.IMPOSSIBLE),
    ],
)
def test_our_connector_regroups_and_converts_what_it_knows(other: KvLayout, kind: VerdictKind) -> None:
    found = verdict(Side(Connector.PDCOORD, PLAIN), Side(Connector.PDCOORD, other))
    assert found.kind is kind
    assert all(name in found.reason for name in PLAIN.differences(other))


def test_equal_private_tilings_with_other_differences_are_closed() -> None:
    one, two = replace(PLAIN, tiling="fractal-nz"), KvLayout(128, tiling="fractal-nz")
    assert not verdict(Side(Connector.PDCOORD, one), Side(Connector.PDCOORD, two)).is_possible


def test_the_reason_names_both_connectors() -> None:
    found = verdict(Side(Connector.NIXL, PLAIN), Side(Connector.SGLANG, PLAIN))
    assert "nixl" in found.reason
    assert "sglang" in found.reason
