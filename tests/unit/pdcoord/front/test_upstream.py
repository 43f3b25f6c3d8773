"""What goes to a decode endpoint, and what its answer means."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdcoord.core.model import Fallback
from pdcoord.core.plan import Plan, Rung
from pdcoord.front.upstream import (
    error_body,
    failure_of_answer,
    failure_of_error,
    headers_for,
    plan_header,
    resumed_below,
    served_of,
    with_fields,
)
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.headers import ROUTING_FROM_OUTSIDE
from pdcoord.protocol.plans import Mode, PlanHeader, RungKind, ServedHeader, decode_plan, encode_served
from pdcoord.protocol.signing import PLAN_SIGNATURE, Steering
from pdcoord.wire.errors import ConnectError, HeadTimeoutError, ResetError, StreamError, WireError
from pdcoord.wire.heads import Headers

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=5), st.text(min_size=1, max_size=20))
def test_only_the_model_changes(body: dict[str, object], name: str) -> None:
    raw = json.dumps(body | {"model": "alias"}).encode()
    assert json.loads(with_fields(raw, {"model": name})) == body | {"model": name}


def test_a_nested_model_stays_and_of_two_the_last_counts() -> None:
    raw = b'{"model":"a","x":{"model":"alias"},"model":"alias"}'
    assert json.loads(with_fields(raw, {"model": "m"})) == {"model": "m", "x": {"model": "alias"}}


def test_a_colocated_plan_names_no_prefill(plan: Callable[..., Plan]) -> None:
    assert plan_header(plan("r")) == PlanHeader()
    assert plan_header(plan("r"), is_resumed_above=True) == PlanHeader(is_resumed_above=True)
    assert plan_header(plan("r"), is_ended_above=True) == PlanHeader(is_ended_above=True)


def test_a_split_plan_names_prefills_in_order_with_its_deadlines(plan: Callable[..., Plan]) -> None:
    made = replace(plan("r", is_split=True), prefill_deadline_s=1.5, transfer_deadline_s=0.5)
    header = plan_header(made)
    assert [target.address for target in header.prefills] == ["10.0.0.1:8000", "10.0.0.3:8000"]
    assert (header.prefill_deadline_ms, header.transfer_deadline_ms) == (1_500.0, 500.0)
    assert header.is_colocated_allowed


def test_a_sidecar_that_continues_its_streams_is_told_where_and_within_what(
    plan: Callable[..., Plan],
) -> None:
    made = plan("r", is_split=True)
    others = [each for each in (made.prefill, made.decode) if each is not None]
    rules = Fallback(resume_tries_max=1, resume_age_s_max=2.0, resume_stall_s_min=3.0)
    header = resumed_below(made, rules, others)
    assert header.resumes == ("10.0.0.1:8000",)
    assert (header.resume_tries_max, header.resume_age_ms_max, header.resume_stall_ms) == (
        1,
        2_000.0,
        3_000.0,
    )
    slow = replace(made, chosen=replace(made.chosen, figures=replace(made.chosen.figures, step_s=0.1)))
    assert resumed_below(slow, rules, []).resume_stall_ms == 10_000.0
    assert resumed_below(made, Fallback(rungs=(RungKind.COLOCATED,)), others) == plan_header(made)


def test_without_the_rung_a_split_plan_may_not_fall_back(plan: Callable[..., Plan]) -> None:
    made = plan("r", is_split=True)
    others = tuple(rung for rung in made.rungs if rung.kind is RungKind.OTHER_PREFILL)
    assert not plan_header(replace(made, rungs=others)).is_colocated_allowed
    assert plan_header(replace(made, rungs=(Rung(RungKind.COLOCATED),))).is_colocated_allowed


@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    *sorted(ROUTING_FROM_OUTSIDE),
                    b"x-pdcoord-plan",
                    b"X-Pdcoord-Plan",
                    b"accept",
                    b"connection",
                ]
            ),
            st.sampled_from([b"v", b"x-pdcoord-plan", b"x-request-id, accept"]),
        )
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # The fixture is a pure function.
def test_nothing_from_outside_can_steer(plan: Callable[..., Plan], pairs: list[tuple[bytes, bytes]]) -> None:
    made = plan("r", is_split=True)
    sent = headers_for(made, pairs, b"r", "/v1/completions")
    assert [decode_plan(value) for name, value in sent if name == b"x-pdcoord-plan"] == [plan_header(made)]
    assert [value for name, value in sent if name == b"x-prefiller-host-port"] == [b"10.0.0.1:8000"]
    others = {name for name, _ in sent} - {
        b"x-pdcoord-plan",
        b"x-prefiller-host-port",
        b"x-request-id",
        b"accept",
    }
    assert others == set()


def test_what_is_signed_is_what_is_sent(plan: Callable[..., Plan]) -> None:
    signed: list[Steering] = []

    def sign(what: Steering) -> Headers:
        signed.append(what)
        return [(PLAN_SIGNATURE, b"v1")]

    mine = [(PLAN_SIGNATURE, b"mine")]
    sent = dict(headers_for(plan("r", is_split=True), mine, b"r", "/v1/completions?a=1", sign))
    assert sent[PLAN_SIGNATURE] == b"v1"
    call = (b"POST", b"/v1/completions?a=1", b"r")
    assert signed == [Steering(*call, plan=sent[b"x-pdcoord-plan"], prefills=b"10.0.0.1:8000")]
    assert sent[b"x-prefiller-host-port"] == b"10.0.0.1:8000"
    assert sent[b"x-request-id"] == b"r"
    assert PLAN_SIGNATURE not in dict(headers_for(plan("r"), mine, b"r", "/v1/completions"))


@pytest.mark.parametrize("reason", list(RefuseReason))
def test_every_reason_of_a_sidecar_is_either_a_failure_or_relayed(reason: RefuseReason) -> None:
    relayed = {
        RefuseReason.MALFORMED_HTTP,
        RefuseReason.HEAD_TOO_LARGE,
        RefuseReason.MALFORMED_JSON,
        RefuseReason.INVALID_FIELD,
        RefuseReason.BODY_TOO_LARGE,
        RefuseReason.CONTEXT_TOO_LONG,
        RefuseReason.MODEL_UNKNOWN,
        RefuseReason.PATH_UNKNOWN,
        RefuseReason.METHOD_NOT_ALLOWED,
        RefuseReason.NOT_SERVED,
        RefuseReason.BODY_TOO_SLOW,
        RefuseReason.UNAUTHORIZED,
        RefuseReason.MODEL_FORBIDDEN,
        RefuseReason.RATE_LIMITED,
    }
    assert (failure_of_answer(400, reason.value.encode()) is None) == (reason in relayed)


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (200, None),
        (302, None),
        (404, None),
        (429, None),
        (500, RungReason.DECODE_ERROR),
        (502, RungReason.DECODE_ERROR),
        (504, RungReason.DECODE_TIMEOUT),
    ],
)
def test_an_engines_own_status(status: int, failure: RungReason | None) -> None:
    assert failure_of_answer(status, None) is failure
    assert failure_of_answer(status, b"\xff unheard of") is failure


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectError(""), RungReason.DECODE_UNREACHABLE),
        (ResetError(""), RungReason.DECODE_UNREACHABLE),
        (HeadTimeoutError(""), RungReason.DECODE_TIMEOUT),
        (StreamError(""), RungReason.DECODE_ERROR),
    ],
)
def test_an_attempt_without_an_answer(error: WireError, failure: RungReason) -> None:
    assert failure_of_error(error) is failure


def test_a_split_report_without_a_prefill_is_not_believed() -> None:
    assert served_of(encode_served(ServedHeader(mode=Mode.SPLIT))) is None
    assert served_of(b"[") is None
    assert served_of(None) is None
    assert served_of(encode_served(ServedHeader(mode=Mode.COLOCATED))) == ServedHeader(mode=Mode.COLOCATED)


def test_an_error_that_no_openai_client_can_read_is_put_in_its_form() -> None:
    shown = msgspec.json.decode(error_body(404, b'{"detail":"Not Found"}'))
    assert shown["error"]["code"] == "not-served"
    assert msgspec.json.decode(error_body(500, b"oops"))["error"]["code"] == "upstream-failed"


def test_an_engines_own_error_keeps_its_bytes() -> None:
    body = b'{"error":{"message":"x"}}'
    assert error_body(400, body) is body


def test_an_error_written_at_the_top_is_put_under_its_name() -> None:
    shown = msgspec.json.decode(error_body(400, b'{"object":"error","message":"x","code":400}'))
    assert (shown["error"]["message"], shown["error"]["code"]) == ("x", 400)


def test_the_page_lists_every_reason_under_its_status() -> None:
    page = (Path(__file__).parents[4] / "docs" / "gateway.md").read_text()
    for reason in RefuseReason:
        status = Refusal(reason, "").status
        row = next((line for line in page.splitlines() if line.startswith(f"| {status} |")), "")
        assert f"`{reason}`" in row, f"docs/gateway.md: {reason} is missing under {status}"


def test_an_engines_own_explanation_is_carried_over() -> None:
    shown = msgspec.json.decode(error_body(422, b'{"detail":[{"loc":["body","n"],"msg":"too many"}]}'))
    assert (shown["error"]["code"], "too many" in shown["error"]["message"]) == ("invalid-field", True)
    assert msgspec.json.decode(error_body(500, b'{"a":' * 5_000))["error"]["code"] == "upstream-failed"
