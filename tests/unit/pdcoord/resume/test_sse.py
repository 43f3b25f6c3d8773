"""Events are found where they end, and say what their data lines say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.resume.sse import data_of, end_of_last, other_lines, whole_events


@given(st.lists(st.sampled_from([b"data: x", b"\n", b"\r\n", b"\r", b":", b"a"])).map(b"".join))
def test_nothing_is_lost_and_both_agree_on_the_last_end(raw: bytes) -> None:
    events, rest = whole_events(raw)
    assert b"".join(events) + rest == raw
    # Three or more line ends in a row are an end and empty events, of which one reading joins two.
    assert data_of(raw[end_of_last(raw) :]) == data_of(rest)


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\r\n\r\n", b"x"),
        (b"data:  x \n\n", b" x "),
        (b"id: 7\nevent: e\ndata: a\ndata: b\n\n", b"a\nb"),
        (b"data\n\n", b""),
        (b": ping\n\n", None),
        (b"database: x\n\n", None),
    ],
)
def test_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


def test_other_lines_keep_their_order() -> None:
    assert other_lines(b": c\r\nevent: e\r\ndata: a\r\nid: 7\r\n\r\n") == b": c\nevent: e\nid: 7\n"
