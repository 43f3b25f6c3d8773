import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.study.lines import encode_result
from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.trafficlog import KEY_TOKENS, SPAN_S_MAX, STEP_S, LogWorkload, read_traffic

MakeResult = Callable[..., CallResult]


def done(**changed: Any) -> bytes:
    """A line as the gateway writes it."""
    fields = {
        "timestamp": "2026-11-21T10:00:10Z",
        "level": "info",
        "event": "request.done",
        "id": "a",
        "path": "/v1/completions",
        "model": "m",
        "mode": "split",
        "why": "split-faster",
        "prefill": "p/0",
        "decode": "d/0",
        "attempts": 1,
        "prompt_tokens": 1_000,
        "cached_tokens": 0,
        "ttft_ms": 500.0,
        "duration_ms": 2_500.0,
        "outcome": "ok",
        "status": 200,
        "reason": None,
    }
    return json.dumps({**fields, **changed}).encode() + b"\n"


def test_results_come_back_as_calls_in_the_order_of_arrival(make_result: MakeResult) -> None:
    raw = b"\n".join(encode_result(make_result(number)) for number in (7, 5, 6))
    log = read_traffic(raw)
    assert [(each.name, each.call.id, each.call.at_s) for each in log.recorded] == [
        ("5", 0, 0.0),
        ("6", 1, 1.0),
        ("7", 2, 2.0),
    ]
    assert log.recorded[0].ttft_s == 1.0
    workload = LogWorkload(log.recorded, rate_scale=2.0)
    assert [call.at_s for call in workload.calls()] == [0.0, 0.5, 1.0]
    assert workload.call_count == 3


def test_the_gateways_lines_are_read() -> None:
    raw = (
        done(id="late", timestamp="2026-11-21T10:00:11.5Z")
        + done(id="early", ttft_ms=None, outcome="client-gone")
        + done(decode=None)
        + b'{"event": "policy.replaced", "timestamp": "2026-11-21T10:00:00Z"}\n'
    )
    log = read_traffic(raw)
    assert [(each.name, each.call.at_s, each.fate) for each in log.recorded] == [
        ("early", 0.0, "client-gone"),
        ("late", 1.5, "ok"),
    ]
    assert (log.refused_count, log.other_count, log.output_guessed_count, log.bad) == (1, 1, 1, [])
    assert log.recorded[1].call.output_tokens == round(2.0 / STEP_S) + 1
    assert log.recorded[0].call.output_tokens == 1
    counted = read_traffic(done(output_tokens=17))
    assert counted.recorded[0].call.output_tokens == 17
    assert counted.output_guessed_count == 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (done(prompt_tokens=None), "prompt_tokens"),
        (done(prompt_tokens=0), "expected 1"),
        (done(prompt_tokens=1 << 60), "expected 1"),
        (done(output_tokens=-1), "output_tokens"),
        (done(timestamp="yesterday"), "ISO 8601"),
        (done(duration_ms="long"), "duration_ms"),
        (b"nonsense\n", "malformed"),
        (b"[]\n", "list"),
        (b"\xff\n", ""),
        (b'{"fate": "ok"}\n', "missing"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(line: bytes, why: str) -> None:
    log = read_traffic(done() + line + done(id="b"))
    assert [each.name for each in log.recorded] == ["a", "b"]
    assert [bad.number for bad in log.bad] == [2]
    assert why in log.bad[0].why


def test_a_line_with_a_wrong_clock_does_not_make_the_run_endless() -> None:
    log = read_traffic(done() + done(id="b", timestamp="1970-01-01T00:00:00Z") + done(id="c"))
    assert [each.name for each in log.recorded] == ["a", "c"]
    assert log.bad[0].number == 2
    assert log.recorded[-1].call.at_s < SPAN_S_MAX


def test_what_was_cached_is_shared_again_and_the_first_call_brings_it_in() -> None:
    raw = b"".join(
        done(
            id=str(number), cached_tokens=0 if number == 0 else 640, timestamp=f"2026-11-21T10:00:1{number}Z"
        )
        for number in range(3)
    )
    first, second, third = (each.call.keys for each in read_traffic(raw).recorded)
    assert len(first) == 1_000 // KEY_TOKENS
    assert first[:10] == second[:10] == third[:10]
    assert not set(second[10:]) & set(third[10:])
    elsewhere = read_traffic(raw + done(id="x", prefill="p/1", cached_tokens=640)).recorded
    (other,) = (each.call.keys for each in elsewhere if each.name == "x")
    assert not set(first) & set(other)


def test_calls_of_different_adapters_share_nothing() -> None:
    asked = [None, "sql", "law", "sql", None]
    raw = b"".join(
        done(
            id=str(number),
            cached_tokens=640,
            timestamp=f"2026-11-21T10:00:1{number}Z",
            **({} if adapter is None else {"adapter": adapter}),
        )
        for number, adapter in enumerate(asked)
    )
    calls = [each.call for each in read_traffic(raw).recorded]
    assert [call.kind for call in calls] == ["m", "sql", "law", "sql", "m"]
    for one, adapter in zip(calls, asked, strict=True):
        for other, another in zip(calls, asked, strict=True):
            assert bool(set(one.keys) & set(other.keys)) is (adapter == another)


@given(st.lists(st.tuples(st.integers(1, 5_000), st.integers(0, 6_000)), max_size=20))
def test_keys_never_say_more_than_the_prompt_holds(sizes: list[tuple[int, int]]) -> None:
    raw = b"".join(done(prompt_tokens=size, cached_tokens=cached) for size, cached in sizes)
    for each in read_traffic(raw).recorded:
        assert len(each.call.keys) == each.call.prompt_tokens // KEY_TOKENS
        assert len(set(each.call.keys)) == len(each.call.keys)


@given(st.binary(max_size=300))
def test_no_bytes_break_it(raw: bytes) -> None:
    read_traffic(raw)
