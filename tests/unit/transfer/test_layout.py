"""Layouts refuse what no engine can have, and say in what they differ."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import LayoutError
from transfer.layout import PLAIN_TILING, KvDtype, KvLayout, Order

layouts = st.builds(
    KvLayout,
    block_tokens=st.integers(1, 256),
    order=st.sampled_from(Order),
    dtype=st.sampled_from(KvDtype),
    tensor_parallel=st.integers(1, 8),
    tiling=st.sampled_from([PLAIN_TILING, "fractal-nz"]),
)


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_tokens", 0), ("block_tokens", -16), ("tensor_parallel", 0), ("tiling", "")],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(LayoutError) as caught:
        replace(KvLayout(16), **{field: value})
    assert caught.value.field == field
    assert caught.value.value == value


@given(layouts)
def test_a_layout_does_not_differ_from_itself(layout: KvLayout) -> None:
    assert layout.differences(replace(layout)) == []


@given(layouts, layouts)
def test_differences_are_symmetric_and_name_exactly_the_unequal_fields(one: KvLayout, two: KvLayout) -> None:
    names = one.differences(two)
    assert names == two.differences(one)
    assert names == [f.name for f in fields(KvLayout) if getattr(one, f.name) != getattr(two, f.name)]
    assert (names == []) == (one == two)
