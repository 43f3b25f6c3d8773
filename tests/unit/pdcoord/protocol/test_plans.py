"""The plan and served headers survive their trip, and nothing else passes for one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import (
    PLAN_VERSION,
    DialectName,
    Mode,
    PlanHeader,
    PlanHeaderError,
    PrefillTarget,
    RungKind,
    RungTaken,
    ServedHeader,
    decode_plan,
    decode_served,
    encode_plan,
    encode_served,
)

addresses = st.sampled_from(["10.0.0.1:8000", "[fd00::1]:8000", "pod-0.svc:8200"]).map(HostPort)
milliseconds = st.floats(0.001, 1e9, allow_nan=False)
targets = st.builds(PrefillTarget, address=addresses, bootstrap_port=st.none() | st.integers(1, 65_535))
plans = st.builds(
    PlanHeader,
    prefills=st.lists(targets, max_size=4).map(tuple),
    dialect=st.sampled_from(DialectName),
    is_colocated_allowed=st.booleans(),
    prefill_deadline_ms=milliseconds,
    transfer_deadline_ms=milliseconds,
)
rungs = st.builds(
    RungTaken, rung=st.sampled_from(RungKind), reason=st.sampled_from(RungReason), target=addresses
)
served_headers = st.builds(
    ServedHeader,
    mode=st.sampled_from(Mode),
    prefill=st.none() | addresses,
    rungs=st.lists(rungs, max_size=4).map(tuple),
    prefill_ms=st.none() | milliseconds,
    transfer_ms=st.none() | milliseconds,
    cached_tokens=st.none() | st.integers(0, 1 << 40),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
DEEP = b"[" * 100_000 + b"]" * 100_000


@given(plans)
def test_a_plan_survives_its_trip(plan: PlanHeader) -> None:
    raw = encode_plan(plan)
    assert decode_plan(raw) == plan
    assert raw.isascii()
    assert b"\n" not in raw


@given(served_headers)
def test_a_served_header_survives_its_trip(served: ServedHeader) -> None:
    assert decode_served(encode_served(served)) == served


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_nothing_else_passes_and_nothing_escapes(raw: bytes) -> None:
    assert decode_served(raw) is None or isinstance(decode_served(raw), ServedHeader)
    try:
        plan = decode_plan(raw)
    except PlanHeaderError:
        return
    assert plan.version == PLAN_VERSION


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"version": 2}',
        b'{"prefill_deadline_ms": 0}',
        b'{"transfer_deadline_ms": -1}',
        b'{"dialect": "other"}',
        b'{"prefills": [{}]}',
        b'{"prefills": "10.0.0.1:8000"}',
        b'{"prefills": [{"address": "\xff"}]}',
        b'{"later": ' + DEEP + b"}",
    ],
)
def test_a_plan_that_cannot_be_executed_is_refused(raw: bytes) -> None:
    with pytest.raises(PlanHeaderError, match="x-pdcoord-plan"):
        decode_plan(raw)


def test_an_empty_plan_is_colocated_with_the_defaults() -> None:
    assert decode_plan(b"{}") == PlanHeader()
    assert encode_plan(PlanHeader()) == b"{}"


def test_a_field_of_a_later_minor_is_ignored() -> None:
    assert decode_plan(b'{"is_colocated_allowed": false, "colour": "red"}').is_colocated_allowed is False


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b'{"mode": "half"}', b'{"mode": "split", "x": ' + DEEP + b"}", b"\xff"]
)
def test_a_served_header_only_informs(raw: bytes) -> None:
    assert decode_served(raw) is None
