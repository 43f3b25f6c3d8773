"""What a call's headers ask of admission."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.model import AdmissionRules, Model, Slo
from pdcoord.front.asked import NOTHING_ASKED, asked_of
from pdcoord.protocol.errors import RefusedError, RefuseReason


def test_a_call_without_such_headers_asks_for_nothing() -> None:
    assert asked_of([(b"host", b"x"), (b"x-request-id", b"1")]) is NOTHING_ASKED


@pytest.mark.parametrize("prefix", [b"x-llm-d-", b"x-gateway-"])
def test_tenant_and_objective_are_known_by_both_names(prefix: bytes, model: Model) -> None:
    asked = asked_of(
        [(prefix + b"inference-fairness-id", b"team"), (prefix + b"inference-objective", b"gold")]
    )
    assert (asked.tenant, asked.objective) == ("team", "gold")
    golden = replace(model, admission=AdmissionRules(objectives={"gold": 7}))
    assert (asked.priority(golden), asked.has_unknown_objective(golden)) == (7, False)
    assert (asked.priority(model), asked.has_unknown_objective(model)) == (0, True)
    assert not NOTHING_ASKED.has_unknown_objective(model)
    lowered = replace(asked, is_lowered=True)
    assert (lowered.priority(golden), lowered.has_unknown_objective(golden)) == (0, True)


def test_of_two_names_the_newer_is_meant() -> None:
    headers = [(b"x-slo-ttft-ms", b"9"), (b"x-llm-d-slo-ttft-ms", b"250"), (b"x-slo-tpot-ms", b"12.5")]
    assert asked_of(headers).slo == Slo(0.25, 0.0125)


@pytest.mark.parametrize("empty", [b"", b" ", b"\t  "])
def test_a_header_without_a_value_counts_as_absent(empty: bytes) -> None:
    names = [b"inference-fairness-id", b"inference-objective", b"slo-ttft-ms", b"slo-tpot-ms"]
    newer = [(b"x-llm-d-" + name, empty) for name in names]
    assert asked_of(newer) == NOTHING_ASKED
    older = [(b"x-gateway-inference-fairness-id", b"team"), (b"x-slo-ttft-ms", b"9")]
    asked = asked_of([*newer, *older])
    assert (asked.tenant, asked.objective, asked.slo) == ("team", "", Slo(0.009))


@pytest.mark.parametrize("value", [b"Team A (night shift), 50%", b"  padded ", b"!~", b"x " * 63 + b"xx"])
def test_a_tenant_is_any_visible_ascii_with_spaces_inside(value: bytes) -> None:
    assert asked_of([(b"x-llm-d-inference-fairness-id", value)]).tenant == value.strip().decode()


@pytest.mark.parametrize(
    "value", [b"0", b"-1", b"1e3", b"nan", b"inf", b"soon", b"3600001", b"9" * 50, b"1 2"]
)
def test_an_objective_in_no_known_number_is_refused_by_name_and_value(value: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        asked_of([(b"x-llm-d-slo-tpot-ms", value)])
    refusal = caught.value.refusal
    assert (refusal.reason, refusal.param) == (RefuseReason.INVALID_FIELD, "x-llm-d-slo-tpot-ms")
    assert "milliseconds" in refusal.message
    assert ascii(value[:32].decode()) in refusal.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (b"fairness-id", value)
            for value in (b"x" * 129, b"caf\xc3\xa9", b"a\x00b", b"a\tb", b"x " * 64 + b"x")
        ),
        (b"objective", b"two words"),
    ],
)
def test_a_name_that_is_none_is_refused(name: bytes, value: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        asked_of([(b"x-llm-d-inference-" + name, value)])
    assert len(caught.value.refusal.message) < 300
    assert caught.value.refusal.message.isascii()


@given(st.binary(max_size=200))
def test_whatever_comes_is_taken_or_refused(value: bytes) -> None:
    for name in (b"x-llm-d-slo-ttft-ms", b"x-llm-d-inference-objective"):
        try:
            asked = asked_of([(name, value)])
        except RefusedError as error:
            assert error.refusal.status == 400
        else:
            assert asked.slo.ttft_s is None or 0.0 < asked.slo.ttft_s <= 3_600.0
