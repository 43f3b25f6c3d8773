"""Reading a prefill leg's answer: the ticket to the byte, and never a success without one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.tickets import (
    PREFILL_TICKET,
    ROOM_MAX,
    TICKET_FIELD,
    Pairing,
    decode_pairing,
    decode_prefill_answer,
    is_steering,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
tickets = st.dictionaries(st.text(max_size=8), values, min_size=1, max_size=5)
separators = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n ", "\t:  ")])


@given(ticket=tickets, separator=separators, is_ascii=st.booleans())
def test_a_ticket_passes_to_the_byte(
    ticket: dict[str, object], separator: tuple[str, str], *, is_ascii: bool
) -> None:
    raw = json.dumps(ticket, separators=separator, ensure_ascii=is_ascii).encode()
    answer = decode_prefill_answer(b'{"id": "x", "kv_transfer_params" :  ' + raw + b' , "choices": []}')
    assert answer.ticket == raw


def test_numbers_in_a_ticket_keep_their_spelling() -> None:
    raw = b'{"remote_block_ids": [[1e3, 12345678901234567890123, 1.50]], "x": "\\u00e9"}'
    assert decode_prefill_answer(b'{"kv_transfer_params":' + raw + b"}").ticket == raw


@pytest.mark.parametrize("given_ticket", [b"null", b"{}", b"{ }", b"{\n\t}"])
def test_an_empty_ticket_is_none(given_ticket: bytes) -> None:
    assert decode_prefill_answer(b'{"kv_transfer_params": ' + given_ticket + b"}").ticket is None


def test_an_answer_without_the_field_has_no_ticket() -> None:
    assert decode_prefill_answer(b'{"choices": []}').ticket is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"kv_transfer_params": 5}',
        b'{"kv_transfer_params": false}',
        b'{"kv_transfer_params": []}',
        b'{"kv_transfer_params": "ticket"}',
        b'{"kv_transfer_params": {"a": }}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff\xfe",
    ],
)
def test_what_is_no_prefill_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="prefill answer"):
        decode_prefill_answer(raw)


@given(st.binary())
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    try:
        decode_prefill_answer(raw)
    except ValueError:
        return


@pytest.mark.parametrize(
    ("usage", "cached_tokens"),
    [
        (b"null", None),
        (b"{}", None),
        (b'{"prompt_tokens_details": null}', None),
        (b'{"prompt_tokens_details": {"cached_tokens": 64}}', 64),
        (b'{"prompt_tokens_details": {"cached_tokens": 0}}', 0),
        (b'{"input_tokens_details": {"cached_tokens": 32}}', 32),
        (b'{"cache_read_input_tokens": 16}', 16),
        (b'{"prompt_tokens_details": {}, "cache_read_input_tokens": 16}', 16),
    ],
)
def test_cached_tokens_of_each_api(usage: bytes, cached_tokens: int | None) -> None:
    assert decode_prefill_answer(b'{"usage": ' + usage + b"}").cached_tokens == cached_tokens


def test_what_a_prefill_leg_carries_asks_for_a_remote_decode_and_names_nobody() -> None:
    assert PREFILL_TICKET["do_remote_decode"] is True
    assert PREFILL_TICKET["do_remote_prefill"] is False
    assert all(PREFILL_TICKET[name] is None for name in PREFILL_TICKET if name.startswith("remote_"))


def test_rooms_fit_a_signed_64_bit_integer() -> None:
    assert ROOM_MAX.bit_length() == 63


@pytest.mark.parametrize(
    "field", [TICKET_FIELD, "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"]
)
def test_fields_that_tell_an_engine_where_to_fetch_kv_are_known(field: str) -> None:
    assert is_steering(field)


@pytest.mark.parametrize("field", ["", "model", "prompt", "bootstrap", "kv_transfer", "cache_salt"])
def test_other_fields_are_the_clients_own(field: str) -> None:
    assert not is_steering(field)


# Both legs at once.

PAIRING = Pairing("0123456789abcdef" * 2, "fedcba9876543210" * 2)
MEMBER = {"version": 1, "transfer": PAIRING.transfer, "nonce": PAIRING.nonce}


def test_a_prefill_leg_that_is_paired_asks_as_any_other_and_names_the_transfer() -> None:
    assert PAIRING.asked() == {**PREFILL_TICKET, "pdcoord": MEMBER}


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.1", "10.0.0.1:14579"), ("fd00::1", "[fd00::1]:14579"), ("pod", "pod:14579")],
)
def test_a_decode_leg_that_is_paired_is_told_where_to_fetch_what(host: str, address: str) -> None:
    assert PAIRING.told(host, 14_579) == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": host,
        "remote_port": 14_579,
        "pdcoord": {**MEMBER, "address": address},
    }


def test_a_nonce_is_not_shown() -> None:
    assert PAIRING.nonce not in repr(PAIRING)


def test_a_pairing_is_read_as_it_was_written() -> None:
    assert decode_pairing(json.dumps(MEMBER).encode()) == PAIRING


@pytest.mark.parametrize(
    "member",
    [
        {},
        {**MEMBER, "version": 2},
        {**MEMBER, "version": True},
        {**MEMBER, "transfer": "0" * 31},
        {**MEMBER, "transfer": "0" * 31 + "G"},
        {**MEMBER, "transfer": "0" * 32 + "\n"},
        {**MEMBER, "nonce": 5},
        {**MEMBER, "address": "10.0.0.1:14579"},
        [MEMBER],
        None,
    ],
)
def test_what_is_not_exactly_a_pairing_is_none(member: object) -> None:
    assert decode_pairing(json.dumps(member).encode()) is None


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_no_pairing(raw: bytes) -> None:
    assert decode_pairing(raw) is None
