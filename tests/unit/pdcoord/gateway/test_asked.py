"""What a call's headers ask of admission."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.model import AdmissionRules, Model, Slo
from pdcoord.gateway.asked import NOTHING_ASKED, asked_of
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


def test_empty_headers_as_proxies_send_them_ask_for_nothing() -> None:
    names = (b"x-llm-d-inference-fairness-id", b"x-llm-d-inference-objective", b"x-llm-d-slo-ttft-ms")
    assert (
        asked_of([(name, value) for name, value in zip(names, (b"", b" ", b""), strict=True)])
        == NOTHING_ASKED
    )


def test_of_two_names_the_newer_is_meant() -> None:
    headers = [(b"x-slo-ttft-ms", b"9"), (b"x-llm-d-slo-ttft-ms", b"250"), (b"x-slo-tpot-ms", b"12.5")]
    assert asked_of(headers).slo == Slo(0.25, 0.0125)


@pytest.mark.parametrize("value", [b"0", b"-1", b"1e3", b"nan", b"inf", b"soon", b"3600001", b"9" * 50])
def test_an_objective_in_no_known_number_is_refused_by_name_and_value(value: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        asked_of([(b"x-llm-d-slo-tpot-ms", value)])
    refusal = caught.value.refusal
    assert (refusal.reason, refusal.param) == (RefuseReason.INVALID_FIELD, "x-llm-d-slo-tpot-ms")
    assert "milliseconds" in refusal.message
    assert ascii(value[:32].decode()) in refusal.message


@pytest.mark.parametrize("value", [b"two words", b"x" * 129, b"caf\xc3\xa9", b"a\x00b"])
def test_a_name_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        asked_of([(b"x-llm-d-inference-fairness-id", value)])
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
