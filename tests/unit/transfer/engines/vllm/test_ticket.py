"""Tickets: what is written is read back, nixlv2's names stay, and nothing malformed gets through."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.engines.vllm.ticket import Ask, Producer, Ticket, TicketError, parse_ask, parse_ticket, ticket
from transfer.session.vocabulary import TransferId

TRANSFER = TransferId("0123456789abcdef" * 2)
NONCE = bytes(range(16))
PRODUCER = Producer("engine", "10.0.0.1:14579", "e-1", 2)
OURS = {"version": 1, "transfer": TRANSFER, "nonce": NONCE.hex()}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def good() -> dict[str, Any]:
    return ticket(PRODUCER, "cmpl-1", ([1, 2], [3]), 150, Ask(TRANSFER, NONCE))


def test_a_ticket_is_read_back_after_json() -> None:
    assert parse_ticket(json.loads(json.dumps(good()))) == Ticket(
        TRANSFER, NONCE, "10.0.0.1:14579", "e-1", 150
    )


def test_a_ticket_has_the_names_of_nixlv2_and_one_of_ours() -> None:
    assert good() | {"pdcoord": None} == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[1, 2], [3]],
        "remote_engine_id": "engine",
        "remote_request_id": "cmpl-1",
        "remote_host": "10.0.0.1",
        "remote_port": 14579,
        "tp_size": 2,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": 150,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "pdcoord": None,
    }


def test_an_ipv6_address_keeps_its_brackets_in_ours_only() -> None:
    made = ticket(Producer("e", "[::1]:7000", "", 1), "r", (), 1, Ask(TRANSFER, NONCE))
    assert (made["remote_host"], made["remote_port"]) == ("::1", 7000)
    assert parse_ticket(made) == Ticket(TRANSFER, NONCE, "[::1]:7000", "", 1)


def test_a_ticket_needs_a_transfer() -> None:
    with pytest.raises(ValueError, match="transfer"):
        ticket(PRODUCER, "r", (), 1, Ask(None, None))


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, {"do_remote_prefill": True}])
def test_who_does_not_ask_gets_nothing(params: Any) -> None:
    assert parse_ask(params) is None


def test_a_plain_prefill_leg_leaves_the_transfer_to_the_engine() -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
    assert parse_ask(params) == Ask(None, None)
    assert parse_ticket(params) is None


def test_both_legs_of_a_sidecar_that_mints_are_read() -> None:
    assert parse_ask({"do_remote_decode": True, "pdcoord": OURS}) == Ask(TRANSFER, NONCE)
    decode = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": "h",
        "remote_port": 14579,
        "pdcoord": OURS | {"address": "h:14579"},
    }
    assert parse_ticket(decode) == Ticket(TRANSFER, NONCE, "h:14579")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("version", True),
        ("version", None),
        ("transfer", TRANSFER.upper()),
        ("transfer", TRANSFER[:-1]),
        ("transfer", TRANSFER + "\n"),
        ("transfer", 7),
        ("nonce", "zz" * 16),
        ("nonce", None),
        ("address", "nowhere"),
        ("address", "h:0"),
        ("address", "h:65536"),
        ("address", "h h:1"),
        ("address", "user@h:1"),
        ("address", "a" * 300 + ":1"),
        ("address", None),
        ("epoch", 1),
        ("epoch", "e" * 65),
        ("epoch", "a b"),
    ],
)
def test_a_wrong_member_is_named_and_its_value_is_not_told(field: str, value: Any) -> None:
    params = good()
    params["pdcoord"] = params["pdcoord"] | {field: value}
    with pytest.raises(TicketError, match=field) as raised:
        parse_ticket(params)
    assert raised.value.field == f"pdcoord.{field}"
    assert NONCE.hex() not in str(raised.value)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "7"])
def test_a_wrong_token_count_is_malformed(count: Any) -> None:
    with pytest.raises(TicketError, match="remote_num_tokens"):
        parse_ticket(good() | {"remote_num_tokens": count})


def test_the_ticket_of_another_connector_is_malformed_here() -> None:
    params = good()
    del params["pdcoord"]
    with pytest.raises(TicketError, match="another connector"):
        parse_ticket(params)


@given(anything, st.sampled_from(["do_remote_decode", "do_remote_prefill"]), anything)
def test_nothing_but_a_ticket_error_comes_out_of_anything(params: Any, flag: str, ours: Any) -> None:
    candidates = [params, {flag: True, "pdcoord": ours}, {flag: params}, {flag: True, "pdcoord": params}]
    for candidate in candidates:
        for parse in (parse_ask, parse_ticket):
            try:
                parse(candidate)
            except TicketError:
                continue


@given(st.sampled_from(sorted(good()["pdcoord"])), anything)
def test_a_ticket_with_one_member_replaced_is_read_strictly_or_not_at_all(name: str, value: Any) -> None:
    params = good()
    params["pdcoord"] = params["pdcoord"] | {name: value}
    try:
        found = parse_ticket(params)
    except TicketError:
        return
    assert found is not None
    assert (len(found.transfer), len(found.nonce)) == (32, 16)
