"""Bodies of the legs: what is set, what is kept to the byte, what no client may say."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.errors import RefusedError, RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import APIS
from pdcoord.protocol.plans import DialectName, PrefillTarget
from pdcoord.protocol.tickets import PREFILL_TICKET, Pairing, Ticket
from sidecar import dialects

CHAT = APIS["/v1/chat/completions"]
COMPLETIONS = APIS["/v1/completions"]
RESPONSES = APIS["/v1/responses"]
MESSAGES = APIS["/v1/messages"]
PEER = PrefillTarget(address=HostPort("10.0.0.1:8000"))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def chat(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def test_a_prefill_leg_asks_for_one_token_a_ticket_and_no_stream() -> None:
    raw = chat(stream=True, stream_options={"include_usage": True}, max_tokens=50, temperature=0.5)
    prefill = json.loads(dialects.nixlv2_prefill(dialects.read_body(CHAT, raw)))
    assert prefill == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "min_tokens": 1,
        "temperature": 0.5,
        "kv_transfer_params": PREFILL_TICKET,
    }


@pytest.mark.parametrize(
    ("path", "limits"),
    [
        ("/v1/completions", {"max_tokens", "max_completion_tokens", "min_tokens"}),
        ("/v1/responses", {"max_output_tokens"}),
        ("/v1/messages", {"max_tokens"}),
    ],
)
def test_only_the_limits_of_the_api_are_set(path: str, limits: set[str]) -> None:
    prefill = json.loads(dialects.nixlv2_prefill(dialects.read_body(APIS[path], b'{"model":"m"}')))
    assert set(prefill) == limits | {"model", "stream", "kv_transfer_params"}


def test_a_responses_prefill_leg_is_not_stored() -> None:
    raw = b'{"model":"m","input":"x","store":true}'
    body = dialects.read_body(RESPONSES, raw)
    assert json.loads(dialects.nixlv2_prefill(body))["store"] is False
    assert json.loads(dialects.nixlv2_decode(body, Ticket(b"{}")))["store"] is True


def test_a_decode_leg_is_the_clients_bytes_with_the_ticket_to_the_byte() -> None:
    raw = b'  { "model" : "m",\n "max_tokens":9, "stream":true , "x": 1.50e1 } '
    ticket = Ticket(b'{"remote_host" : "p" ,"n":[ [1,2] ],  "big": 123456789012345678901234567890}')
    decode = dialects.nixlv2_decode(dialects.read_body(CHAT, raw), ticket)
    assert decode == b'  {"kv_transfer_params":' + ticket + b"," + raw[3:]


def test_an_empty_object_gets_no_comma() -> None:
    assert dialects.nixlv2_decode(dialects.read_body(CHAT, b"{ }"), Ticket(b"{}")) == (
        b'{"kv_transfer_params":{} }'
    )


@given(body=st.dictionaries(st.text(max_size=12), json_values, max_size=6), is_ascii=st.booleans())
def test_every_other_member_reaches_both_legs_unchanged(body: dict[str, Any], *, is_ascii: bool) -> None:
    raw = json.dumps(body, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        read = dialects.read_body(CHAT, raw)
    except RefusedError:
        assert any("\ud800" <= c <= "\udfff" for c in str(body)), "only lone surrogates are refused"
        return
    decode = json.loads(dialects.nixlv2_decode(read, Ticket(b'{"a":1}')))
    assert decode == {
        **{name: value for name, value in body.items() if not name.startswith("bootstrap_")},
        "kv_transfer_params": {"a": 1},
    }
    prefill = json.loads(dialects.nixlv2_prefill(read))
    own = {"stream", "stream_options", "store", "kv_transfer_params", *CHAT.token_limit_fields}
    for name, value in body.items():
        if name not in own and not name.startswith("bootstrap_"):
            assert prefill[name] == value


def test_sglang_gives_both_legs_the_same_rendezvous() -> None:
    body = dialects.read_body(CHAT, chat(stream=True, max_tokens=7))
    prefill = json.loads(dialects.sglang_prefill(body, PEER, bootstrap_port=8998, room=2**63 - 1))
    decode = json.loads(dialects.sglang_decode(body, PEER, bootstrap_port=8998, room=2**63 - 1))
    rendezvous = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}
    assert decode == {**json.loads(chat(stream=True, max_tokens=7)), **rendezvous}
    assert prefill == {**decode, "stream": False}


def test_sglang_uses_the_targets_own_port_and_brackets_ipv6() -> None:
    body = dialects.read_body(CHAT, chat())
    peer = PrefillTarget(address=HostPort("[fd00::1]:8000"), bootstrap_port=9001)
    decode = json.loads(dialects.sglang_decode(body, peer, bootstrap_port=8998, room=1))
    assert (decode["bootstrap_host"], decode["bootstrap_port"]) == ("[fd00::1]", 9001)


# What no client may say.

TICKET_OF_A_CLIENT = {"do_remote_prefill": True, "remote_host": "10.9.9.9", "remote_port": 1}


@pytest.mark.parametrize(
    "raw",
    [
        chat(kv_transfer_params=TICKET_OF_A_CLIENT),
        chat(ec_transfer_params={"a": 1}),
        chat(bootstrap_host="10.9.9.9", bootstrap_port=1, bootstrap_room=1),
        chat(bootstrap_pair_key="x"),
        chat(kv_transfer_params=TICKET_OF_A_CLIENT).replace(b"kv_", b"kv\\u005f"),
        chat(kv_transfer_params=TICKET_OF_A_CLIENT)[:-1] + b', "kv_transfer_params": null}',
        chat(vllm_xargs={"kv_transfer_params": "x"}),
        chat(sampling_params={"extra_args": {"kv_transfer_params": TICKET_OF_A_CLIENT}}),
    ],
)
def test_members_that_name_hosts_are_taken_out_of_every_leg(raw: bytes) -> None:
    body = dialects.read_body(CHAT, raw)
    forbidden = (b"10.9.9.9", b"_transfer_params", b"bootstrap_", b"u005f")
    assert not [word for word in forbidden if word in body.raw]
    assert json.loads(body.raw)["messages"] == [{"role": "user", "content": "hi"}]
    ticket = Ticket(b'{"mine":1}')
    assert json.loads(dialects.nixlv2_decode(body, ticket))["kv_transfer_params"] == {"mine": 1}
    assert b"10.9.9.9" not in dialects.nixlv2_prefill(body)
    assert b"10.9.9.9" not in dialects.sglang_decode(body, PEER, bootstrap_port=1, room=1)
    assert dialects.scrub(raw, b"application/json") == body.raw


def test_the_same_words_in_text_stay() -> None:
    raw = chat(user='say "kv_transfer_params": and bootstrap_host')
    assert dialects.read_body(CHAT, raw).raw is raw
    assert dialects.scrub(raw, b"") is raw


def test_nesting_is_searched_only_as_deep_as_engines_look() -> None:
    inner: dict[str, Any] = {"kv_transfer_params": 1}
    for _ in range(4):
        inner = {"extra_args": inner}
    raw = json.dumps(inner).encode()
    assert dialects.scrub(raw, b"") == raw


@pytest.mark.parametrize(
    ("raw", "is_kept"),
    [
        (chat(kv_transfer_params=PREFILL_TICKET), True),
        (chat(kv_transfer_params={"do_remote_decode": True}), True),
        (chat(kv_transfer_params={**PREFILL_TICKET, "remote_host": "10.9.9.9"}), False),
        (chat(kv_transfer_params={**PREFILL_TICKET, "do_remote_prefill": True}), False),
        (chat(kv_transfer_params={}), False),
        (chat(kv_transfer_params=[1]), False),
    ],
)
def test_another_sidecars_prefill_leg_may_ask_for_a_ticket_and_no_more(raw: bytes, *, is_kept: bool) -> None:
    kept = json.loads(dialects.read_body(CHAT, raw, is_prefill_leg=True).raw)
    assert kept.get("kv_transfer_params") == (PREFILL_TICKET if is_kept else None)
    assert "kv_transfer_params" not in json.loads(dialects.read_body(CHAT, raw).raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a":}',
        b'{"a":NaN}',
        b'{"a":1} x',
        b"\xef\xbb\xbf{}",
        chat().decode().encode("utf-16"),
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        dialects.read_body(CHAT, raw)
    assert (caught.value.refusal.status, caught.value.refusal.reason) == (400, RefuseReason.MALFORMED_JSON)


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"1", b"null"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RefusedError, match="JSON object"):
        dialects.read_body(CHAT, raw)
    assert dialects.scrub(raw, b"") is raw


def test_what_passes_through_is_read_only_where_it_may_hold_such_a_member() -> None:
    binary = b"\0\xff kv_transfer_params"
    assert dialects.scrub(binary, b"multipart/form-data; boundary=x") is binary
    assert dialects.scrub(b"not json", b"") == b"not json"
    for raw in (chat(kv_transfer_params={}).decode().encode("utf-16"), b'kv_transfer_params" {'):
        with pytest.raises(RefusedError):
            dialects.scrub(raw, b"application/json")


# What may not be split.


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"n": 2}, "n"),
        ({"n": "2"}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"background": True}, "background"),
        ({"previous_response_id": "r"}, "previous_response_id"),
    ],
)
def test_some_calls_stay_on_one_engine(more: dict[str, Any], field: str) -> None:
    body = dialects.read_body(CHAT, chat(**more))
    assert body.unsplittable == field
    assert not body.splittable_in(DialectName.NIXLV2)


@pytest.mark.parametrize(
    "more",
    [{}, {"n": 1}, {"n": None}, {"echo": False}, {"prompt_logprobs": None}, {"previous_response_id": None}],
)
def test_others_may_be_split(more: dict[str, Any]) -> None:
    assert dialects.read_body(CHAT, chat(**more)).splittable_in(DialectName.NIXLV2)


@pytest.mark.parametrize(
    ("prompt", "is_one"),
    [
        ("text", True),
        (["text"], True),
        ([1, 2, 3], True),
        ([[1, 2, 3]], True),
        (["a", "b"], False),
        ([[1], [2]], False),
        ([], False),
        (None, False),
        ({"a": 1}, False),
    ],
)
def test_a_completion_is_split_only_for_one_prompt(prompt: object, *, is_one: bool) -> None:
    raw = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert dialects.read_body(COMPLETIONS, raw).splittable_in(DialectName.NIXLV2) is is_one


def test_sglang_splits_only_where_it_has_the_members() -> None:
    raw = b'{"model":"m","prompt":"x"}'
    assert dialects.read_body(COMPLETIONS, raw).splittable_in(DialectName.SGLANG)
    assert not dialects.read_body(MESSAGES, raw).splittable_in(DialectName.SGLANG)
    assert dialects.read_body(MESSAGES, raw).splittable_in(DialectName.NIXLV2)


@pytest.mark.parametrize(("value", "is_stream"), [(True, True), (False, False), (None, False), ("x", False)])
def test_is_stream(value: object, *, is_stream: bool) -> None:
    assert dialects.read_body(CHAT, chat(stream=value)).is_stream is is_stream


# pdcoord: both legs at once.

PAIRING = Pairing("ab" * 16, "cd" * 16)
MEMBER = {"version": 1, "transfer": "ab" * 16, "nonce": "cd" * 16}


def test_a_paired_prefill_leg_is_nixlv2s_with_the_transfer() -> None:
    body = dialects.read_body(CHAT, chat(stream=True, max_tokens=50))
    alone = json.loads(dialects.nixlv2_prefill(body))
    paired = json.loads(dialects.pdcoord_prefill(body, PAIRING))
    assert paired.pop("kv_transfer_params") == {**alone.pop("kv_transfer_params"), "pdcoord": MEMBER}
    assert paired == alone


@pytest.mark.parametrize(
    ("peer", "host", "port", "address"),
    [
        (PEER, "10.0.0.1", 14_579, "10.0.0.1:14579"),
        (PrefillTarget(address=HostPort("pod:1"), kv_port=7), "pod", 7, "pod:7"),
        (PrefillTarget(address=HostPort("[fd00::1]:1")), "fd00::1", 14_579, "[fd00::1]:14579"),
    ],
)
def test_a_paired_decode_leg_is_the_clients_bytes_with_the_place_to_fetch_from(
    peer: PrefillTarget, host: str, port: int, address: str
) -> None:
    raw = chat(stream=True, max_tokens=50)
    decode = dialects.pdcoord_decode(dialects.read_body(CHAT, raw), peer, PAIRING, kv_port=14_579)
    assert decode.endswith(raw[1:])
    assert json.loads(decode)["kv_transfer_params"] == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": host,
        "remote_port": port,
        "pdcoord": {**MEMBER, "address": address},
    }


def test_all_apis_are_split_in_pdcoord() -> None:
    for api in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        assert dialects.read_body(api, chat(prompt="p")).splittable_in(DialectName.PDCOORD)


def test_another_sidecars_prefill_leg_may_name_a_transfer() -> None:
    leg = dialects.pdcoord_prefill(dialects.read_body(CHAT, chat()), PAIRING)
    body = dialects.read_body(CHAT, leg, is_prefill_leg=True)
    assert json.loads(body.raw) == json.loads(leg)
    assert "kv_transfer_params" not in json.loads(dialects.read_body(CHAT, leg).raw)


@pytest.mark.parametrize(
    "asked",
    [
        {"do_remote_decode": True, "pdcoord": {**MEMBER, "address": "10.0.0.9:1"}},
        {"do_remote_decode": True, "pdcoord": {**MEMBER, "transfer": "x"}},
        {"do_remote_decode": True, "pdcoord": 5},
        {"do_remote_prefill": True, "pdcoord": MEMBER},
        {"do_remote_decode": True, "remote_host": "h", "pdcoord": MEMBER},
    ],
)
def test_a_prefill_leg_may_say_no_more_than_that(asked: dict[str, Any]) -> None:
    body = dialects.read_body(CHAT, chat(kv_transfer_params=asked), is_prefill_leg=True)
    assert "kv_transfer_params" not in json.loads(body.raw)
