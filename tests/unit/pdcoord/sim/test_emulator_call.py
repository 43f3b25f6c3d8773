"""Reading calls: prompts, tickets, rooms."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, Role
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator_call import CallError, Generation, read_call, read_generation, read_ticket
from pdcoord.sim.messages import KvTicket, RemoteTicket, RoomCall
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.text import decode
from transfer.layout import KvLayout
from transfer.verdict import Connector

TICKET = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[4, 5]],
    "remote_engine_id": "p-1",
    "remote_request_id": "cmpl-1-0-ab",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 20,
}


def settings(**fields: Any) -> EngineSettings:
    return EngineSettings(
        **{
            "name": "e",
            "model": "m",
            "speed": SpeedFigures(0.0, 0.0, 0.001),
            "layout": KvLayout(16),
            "block_total": 1_000,
            "kv_bytes_per_token": 1,
            "link_bytes_per_s": 1.0,
            "context_tokens_max": 1_000,
            **fields,
        }
    )


def generation(
    body: dict[str, Any], path: str = "/v1/completions", headers: Any = (), **fields: Any
) -> Generation:
    made = settings(**fields)
    return read_generation(read_call(path, json.dumps(body).encode(), made), headers, made)


def test_prompts_come_as_text_ids_or_lists_of_either() -> None:
    for prompt, expected in (
        ("abcdefgh", 1),
        (["abcd", "efgh"], 2),
        ([1, 2, 3], 1),
        ([[1], [2, 3]], 2),
    ):
        made = generation({"prompt": prompt, "n": 3})
        assert len(made.prompts) == expected
        assert made.choices_each == 3
    assert generation({"prompt": [[1], [2, 3]]}).prompts[1].ids == (2, 3)


def test_a_chat_is_rendered_with_roles_parts_and_tools() -> None:
    made = generation(
        {
            "tools": [{"type": "function"}],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url"}]},
                {"role": "assistant", "content": None, "tool_calls": [1]},
            ],
        },
        "/v1/chat/completions",
    )
    text = decode(made.prompts[0].ids)
    assert text == (
        '<|tools|>\n[{"type":"function"}]\n'[:11]
        + '{"type":"function"}\n'
        + "<|system|>\nBe brief.\n<|user|>\nLook:"
        + '{"type":"image_url"}\n<|assistant|>\n{"tool_calls":[1]}\n<|assistant|>\n'
    ).replace("[{", "{")


def test_equal_conversations_begin_with_equal_tokens() -> None:
    turns: list[dict[str, str]] = [{"role": "user", "content": "A question of some length?"}]
    first = generation({"messages": turns}, "/v1/chat/completions").prompts[0].ids
    turns = [*turns, {"role": "assistant", "content": "An answer."}, {"role": "user", "content": "More"}]
    second = generation({"messages": turns}, "/v1/chat/completions").prompts[0].ids
    assert second[: len(first) - 4] == first[:-4]


def test_a_whole_ticket_is_read_and_a_flat_one_too() -> None:
    expected = RemoteTicket("p-1", "cmpl-1-0-ab", ((4, 5),), HostPort("10.0.0.1:5600"), 20)
    assert read_ticket(TICKET) == expected
    assert read_ticket({**TICKET, "remote_block_ids": [4, 5]}) == expected
    assert generation({"prompt": "x", "kv_transfer_params": TICKET}).ticket == expected
    without = generation({"prompt": "x", "kv_transfer_params": TICKET}, connector=Connector.NONE)
    assert without.ticket is None


@pytest.mark.parametrize("name", [name for name in TICKET if name.startswith("remote_")])
@pytest.mark.parametrize("value", [None, [], "", -1, {"a": 1}, True])
def test_a_ticket_that_is_not_whole_is_none_and_never_an_error(name: str, value: Any) -> None:
    ticket = read_ticket({**TICKET, name: value})
    if name in {"remote_num_tokens", "remote_engine_id", "remote_request_id", "remote_host"}:
        return
    assert ticket is None or value is True


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(TICKET, junk)))
def test_any_junk_for_a_ticket_is_read_without_an_error(params: dict[str, Any]) -> None:
    ticket = read_ticket(params)
    assert ticket is None or isinstance(ticket, RemoteTicket)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            (
                *("prompt", "messages", "input", "max_tokens", "n", "stop", "stream", "stream_options"),
                *("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "cache_salt"),
            ),
            junk,
        ),
    ),
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]),
    st.sampled_from([EngineKind.VLLM, EngineKind.SGLANG]),
)  # fmt: skip
def test_any_body_is_read_or_refused_with_a_status(body: dict[str, Any], path: str, kind: EngineKind) -> None:
    is_sglang = kind is EngineKind.SGLANG
    connector = Connector.SGLANG if is_sglang else Connector.PDCOORD
    try:
        made = generation(body, path, engine=kind, role=Role.PREFILL, connector=connector)
    except CallError as error:
        assert 400 <= error.status < 500
    else:
        assert all(prompt.ids for prompt in made.prompts)


SGLANG: dict[str, Any] = {
    "engine": EngineKind.SGLANG,
    "role": Role.DECODE,
    "connector": Connector.SGLANG,
}
ROOM = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}


def test_a_room_comes_in_the_body_or_in_headers() -> None:
    expected = RoomCall(HostPort("10.0.0.1:8998"), 2**63 - 1)
    assert generation({"prompt": "x", **ROOM}, **SGLANG).prompts[0].room == expected
    assert generation({"prompt": "x", **ROOM, "bootstrap_port": None}, **SGLANG).prompts[0].room == expected
    headers = [
        (b"x-override-bootstrap-host", b"10.0.0.1"),
        (b"x-override-bootstrap-port", b"8998"),
        (b"x-override-bootstrap-room", b"9223372036854775807"),
    ]
    assert generation({"prompt": "x"}, headers=headers, **SGLANG).prompts[0].room == expected
    both = generation({"prompt": "x", **ROOM}, engine=EngineKind.SGLANG, connector=Connector.SGLANG)
    assert both.prompts[0].room is None


def test_a_batch_has_a_room_for_each_prompt() -> None:
    lists = {name: [value, value] for name, value in ROOM.items()}
    made = generation({"prompt": ["a", "b"], **lists, "bootstrap_room": [1, 2]}, **SGLANG)
    assert [prompt.room.room for prompt in made.prompts if prompt.room] == [1, 2]
    with pytest.raises(CallError, match="another length"):
        generation({"prompt": ["a", "b"], **ROOM, "bootstrap_room": [1]}, **SGLANG)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bootstrap_room", None),
        ("bootstrap_room", -1),
        ("bootstrap_room", 2**63),
        ("bootstrap_room", "x"),
        ("bootstrap_room", True),
        ("bootstrap_host", ""),
        ("bootstrap_host", 5),
        ("bootstrap_port", 0),
        ("bootstrap_port", 70_000),
    ],
)
def test_a_room_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CallError) as caught:
        generation({"prompt": "x", **ROOM, name: value}, **SGLANG)
    assert caught.value.status == 400


def test_the_context_is_for_prompt_and_answer_together() -> None:
    assert generation({"prompt": [1] * 900, "max_tokens": 100}).output_tokens_max == 100
    with pytest.raises(CallError, match="maximum context length is 1000 tokens"):
        generation({"prompt": [1] * 900, "max_tokens": 101})
    with pytest.raises(CallError, match="maximum context length is 1000 tokens"):
        generation({"prompt": [1] * 1_000})


TRANSFER = "0123456789abcdef" * 2


def test_a_leg_that_names_a_transfer_and_no_engine_is_read_as_such() -> None:
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": "p",
        "remote_port": 1,
        "pdcoord": {"version": 1, "transfer": TRANSFER, "nonce": "ab" * 16, "address": "p:1"},
    }
    kv = KvTicket(TRANSFER, "ab" * 16, "p:1")
    assert read_ticket(params) == RemoteTicket("", TRANSFER, (), HostPort("p:1"), kv=kv)
    assert read_ticket({**params, "pdcoord": {"transfer": TRANSFER.upper(), "nonce": "ab" * 16}}) is None
    assert read_ticket({**params, "pdcoord": None}) is None
