"""W3C Trace Context: what is taken over, what is written, and what counts as none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.trace import TraceContext, read_trace, with_trace

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01".encode()

ids = st.integers(1, (1 << 128) - 1).map(lambda number: f"{number:032x}")
spans = st.integers(1, (1 << 64) - 1).map(lambda number: f"{number:016x}")
keys = st.from_regex(r"[a-z][a-z0-9_*/-]{0,8}(@[a-z]{1,8})?", fullmatch=True)
values = st.from_regex(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,8}[\x21-\x2b\x2d-\x3c\x3e-\x7e]", fullmatch=True)
states = st.dictionaries(keys, values, max_size=8).map(
    lambda members: ",".join(f"{key}={value.strip()}" for key, value in members.items())
)
contexts = st.builds(TraceContext, ids, spans, st.integers(0, 255), states)


@given(contexts)
def test_what_is_written_is_read(context: TraceContext) -> None:
    assert read_trace(context.headers()) == context


@given(contexts, st.lists(st.tuples(st.sampled_from([b"a", b"traceparent", b"tracestate"]), st.binary())))
def test_headers_name_one_trace_afterwards(context: TraceContext, headers: list[tuple[bytes, bytes]]) -> None:
    changed = with_trace(headers, context)
    assert read_trace(changed) == context
    assert [pair for pair in changed if pair[0] == b"a"] == [pair for pair in headers if pair[0] == b"a"]


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_nothing_that_is_sent_breaks_it(parent: bytes, state: bytes) -> None:
    context = read_trace([(b"traceparent", parent), (b"tracestate", state)])
    assert context is None or read_trace(context.headers()) == context


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        GOOD[:-1],
        GOOD + b"-more",
        GOOD.upper(),
        b"ff" + GOOD[2:],
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        b"01-" + GOOD[3:] + b"-" + b"x" * 512,
    ],
)
def test_a_malformed_parent_names_no_trace(parent: bytes) -> None:
    assert read_trace([(b"traceparent", parent)]) is None


def test_two_parents_name_no_trace() -> None:
    assert read_trace([(b"traceparent", GOOD), (b"traceparent", GOOD)]) is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = read_trace([(b"traceparent", b"7b" + GOOD[2:] + b"-what-the-future-holds")])
    assert context == TraceContext(TRACE, SPAN, 1)
    assert context.headers() == [(b"traceparent", GOOD)]


@pytest.mark.parametrize(
    "state",
    [
        b"no-value",
        b"a=1,a=2",
        b"A=1",
        b"a=\xff",
        b"a=" + b"x" * 300,
        b",".join(b"k%d=1" % n for n in range(33)),
    ],
)
def test_a_malformed_state_is_left_out_and_the_trace_goes_on(state: bytes) -> None:
    assert read_trace([(b"traceparent", GOOD), (b"tracestate", state)]) == TraceContext(TRACE, SPAN, 1)


def test_several_states_are_one() -> None:
    headers = [(b"traceparent", GOOD), (b"tracestate", b"a=1, b=2"), (b"tracestate", b",c=3")]
    context = read_trace(headers)
    assert context is not None
    assert context.state == "a=1,b=2,c=3"
    assert context.is_sampled
