"""What a short list keeps: nobody is left out who could be in a better pair than those who stay."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import EndpointId
from pdcoord.core.shortlist import LISTED_MAX, TROUBLED_MAX, Row, ShortList

figure = st.integers(0, 6)
Figures = tuple[int, int, int, int, int, int]


def rows_of(figures: list[Figures]) -> list[Row[int]]:
    return [(own, 0.0, 0, index, EndpointId(f"e{index}"), index) for index, own in enumerate(figures)]


def matches(one: Figures, two: Figures) -> bool:
    return all(a <= b for a, b in zip(one, two, strict=True))


@given(
    st.lists(st.tuples(*[figure] * 6), max_size=40),
    st.integers(1, 6),
    st.sets(st.integers(0, 39), max_size=TROUBLED_MAX),
)
def test_whoever_is_left_out_is_matched_by_as_many_as_there_is_room_for(
    figures: list[Figures], room: int, troubled: set[int]
) -> None:
    troubled_ids = {EndpointId(f"e{index}") for index in troubled}
    kept = ShortList(room, troubled_ids).kept(rows_of(figures))
    clear = [index for index in kept if index not in troubled]
    assert len(set(kept)) == len(kept)
    for index, own in enumerate(figures):
        matching = [other for other in clear if matches(figures[other], own)]
        assert index in kept or len(matching) >= room or len(clear) >= LISTED_MAX


@given(st.lists(st.tuples(*[figure] * 6), min_size=1, max_size=40), st.integers(1, 6))
def test_of_equals_no_more_stay_than_there_is_room_for(figures: list[Figures], room: int) -> None:
    kept = ShortList(room, ()).kept(rows_of(figures))
    stayed = [figures[index] for index in kept]
    assert all(stayed.count(own) <= room for own in stayed)
    assert min(figures) in stayed


def test_equals_stay_by_price_and_then_by_turn() -> None:
    prices = [(2.0, 1), (1.0, 9), (1.0, 3), (2.0, 0), (1.0, 5)]
    rows: list[Row[int]] = [
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), price, turn, index, EndpointId(f"e{index}"), index)
        for index, (price, turn) in enumerate(prices)
    ]
    assert ShortList(2, ()).kept(rows) == [2, 4]


def test_a_short_list_is_short_whatever_the_pool() -> None:
    # Each differs from every other in two figures, so that nobody is matched by anybody.
    rows = rows_of([(index, 1_000 - index, 0, 0, 0, 0) for index in range(1_000)])
    troubled = {EndpointId(f"e{index}") for index in range(0, 1_000, 2)}
    kept = ShortList(4, troubled).kept(rows)
    assert len(kept) == LISTED_MAX + TROUBLED_MAX
    assert {0, 1} <= set(kept)


def test_those_in_trouble_put_nobody_out() -> None:
    rows = rows_of([(0,) * 6] * 50 + [(9,) * 6])
    troubled = {EndpointId(f"e{index}") for index in range(50)}
    assert 50 in ShortList(4, troubled).kept(rows)


def test_an_empty_pool_has_an_empty_list() -> None:
    assert ShortList(4, ()).kept([]) == []
