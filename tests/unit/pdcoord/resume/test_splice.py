"""What the client gets of a continuing stream: its own head, nothing twice, the counts of both streams."""

import json
from typing import Any

import msgspec
import pytest

from pdcoord.resume.errors import DivergedError, TornError
from pdcoord.resume.splice import Overlap, Seam, Splice

Body = dict[str, Any]
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
OTHER = HEAD | {"id": "chatcmpl-2", "created": 2, "model": "tiny-2"}


def raw_head(head: Body = HEAD) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in head.items()}


def event(chunk: Body) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def chat(content: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    top = {name: more.pop(name) for name in ("usage", "prompt_token_ids") if name in more}
    return event(OTHER | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish} | more]} | top)


def completion(text: str, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return event(OTHER | {"object": "text_completion", "choices": [choice | more]})


def chunks(raw: bytes) -> list[Body]:
    return [json.loads(each.removeprefix(b"data: ")) for each in raw.split(b"\n\n") if each]


def spliced(*events: bytes, overlap: Overlap | None = None, **seam: Any) -> list[Body]:
    seam = {"head": raw_head(), "has_role": True, "has_begun": True} | seam
    return chunks(Splice(Seam(**seam), overlap)(b"".join(events)))


def test_each_chunk_gets_the_first_streams_head() -> None:
    (chunk,) = spliced(chat("x"))
    assert {name: chunk[name] for name in HEAD} == HEAD
    assert chunk["choices"][0]["delta"] == {"content": "x"}


def test_nothing_is_changed_where_nothing_was_passed_on() -> None:
    raw = event(OTHER | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}) + chat(
        "x"
    )
    assert chunks(Splice(Seam())(raw)) == chunks(raw)


@pytest.mark.parametrize("size", [1, 5, 77, 10_000])
@pytest.mark.parametrize("line", [b"\n", b"\r\n"])
def test_how_it_is_cut_does_not_matter(size: int, line: bytes) -> None:
    raw = b": ping\n\n" + chat("a") + b"event: e\n" + chat("b") + b"data: [DONE]\n\n" + b"data: half"
    expected = Splice(Seam(head=raw_head()))(raw)
    assert expected.startswith(b": ping\n\n")
    assert b"event: e\ndata: " in expected
    assert expected.endswith(b"data: [DONE]\n\n")
    raw = raw.replace(b"\n", line)
    splice = Splice(Seam(head=raw_head()))
    out = b"".join(splice(raw[at : at + size]) for at in range(0, len(raw), size))
    assert out.replace(b"\r\n", b"\n") == expected


def test_data_on_several_lines_is_one_value() -> None:
    raw = chat("x").replace(b', "created"', b'\ndata: , "created"')
    assert spliced(raw) == spliced(chat("x"))


def test_the_role_and_the_prompts_ids_are_not_told_again() -> None:
    role = {"role": "assistant", "content": ""}
    told = chat(delta=role, prompt_token_ids=[1, 2])
    assert spliced(told) == []
    (chunk,) = spliced(chat(delta={"role": "assistant", "content": "Hi"}, prompt_token_ids=[1]))
    assert chunk["choices"][0]["delta"] == {"content": "Hi"}
    assert chunk["prompt_token_ids"] is None
    (chunk,) = spliced(completion("x", prompt_token_ids=[1, 2], token_ids=[3]))
    assert chunk["choices"][0]["prompt_token_ids"] is None
    assert chunk["choices"][0]["token_ids"] == [3]


def test_the_engines_own_empty_events_stay() -> None:
    assert len(spliced(chat(""), chat(), chat("", "stop"))) == 3


def test_an_event_without_output_whose_usage_is_told_is_left_out() -> None:
    def used(done: int) -> Body:
        return {"prompt_tokens": 9, "completion_tokens": done, "total_tokens": 9 + done}

    got = spliced(chat("", usage=used(1)), chat("", usage=used(2)), done_tokens=3, told_tokens=4)
    assert [chunk["usage"]["completion_tokens"] for chunk in got] == [5]


def test_a_completion_becomes_a_chat() -> None:
    got = spliced(
        completion("x", token_ids=[7], prompt_token_ids=[1]),
        completion("", "stop", stop_reason="END"),
        is_chat_of_completion=True,
    )
    assert got[0]["object"] == "chat.completion.chunk"
    first, last = (chunk["choices"][0] for chunk in got)
    assert first == {
        "index": 0,
        "delta": {"content": "x"},
        "logprobs": None,
        "finish_reason": None,
        "token_ids": [7],
    }
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "END")


@pytest.mark.parametrize(
    ("prompt_tokens", "cached", "expected"),
    [(None, 3, (10, 9, 19, 3)), (12, 3, (12, 9, 21, 3)), (12, 14, (12, 9, 21, 12))],
)
def test_usage_is_that_of_both_streams(
    prompt_tokens: int | None, cached: int, expected: tuple[int, int, int, int]
) -> None:
    details = {"cached_tokens": cached, "created_cache_tokens": 1}
    usage = {
        "prompt_tokens": 14,
        "completion_tokens": 5,
        "total_tokens": 19,
        "prompt_tokens_details": details,
    }
    last = event(OTHER | {"choices": [], "usage": usage | {"more": 1.50}})
    (chunk,) = spliced(last, done_tokens=4, prompt_tokens=prompt_tokens)
    got = chunk["usage"]
    told = got["prompt_tokens_details"]
    counts = (got["prompt_tokens"], got["completion_tokens"], got["total_tokens"], told["cached_tokens"])
    assert counts == expected
    assert (told["created_cache_tokens"], got["more"]) == (1, 1.5)


def test_offsets_of_logprobs_go_on() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "text_offset": [0, 1]}
    (chunk,) = spliced(completion("ab", logprobs=logprobs), offset=40)
    assert chunk["choices"][0]["logprobs"] == logprobs | {"text_offset": [40, 41]}


def test_numbers_stay_as_they_were_written() -> None:
    raw = b'data: {"id":"x","choices":[{"text":"a","score":1.2300e5}],"big":12345678901234567890}\n\n'
    out = Splice(Seam(head=raw_head()))(raw)
    assert b"1.2300e5" in out
    assert b"12345678901234567890" in out


def entry(token: str) -> Body:
    return {"token": token, "logprob": -1.0}


def test_what_the_client_has_is_left_out() -> None:
    overlap = Overlap("abc", [1, 2, 3], ["a", "b", "c"])
    events = [
        chat("", token_ids=[1], logprobs={"content": [entry("a")]}),
        chat("abcd", token_ids=[2, 3, 4], logprobs={"content": [entry("b"), entry("c"), entry("d")]}),
        chat("e", token_ids=[5]),
    ]
    first, second = (chunk["choices"][0] for chunk in spliced(*events, overlap=overlap))
    assert first["delta"] == {"content": "d"}
    assert (first["token_ids"], first["logprobs"]) == ([4], {"content": [entry("d")]})
    assert (second["delta"], second["token_ids"]) == ({"content": "e"}, [5])


def test_a_completions_overlap_leaves_the_offsets_of_the_rest() -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
        "text_offset": [0, 1],
    }
    got = spliced(completion("ab", logprobs=logprobs), overlap=Overlap("a", [], ["a"]), offset=10)
    assert got[0]["choices"][0]["logprobs"] == {
        "tokens": ["b"],
        "token_logprobs": [-2.0],
        "top_logprobs": [{"b": -2.0}],
        "text_offset": [11],
    }


@pytest.mark.parametrize(
    ("overlap", "came"),
    [
        (Overlap("abc"), chat("ax")),
        (Overlap("", [1, 2]), chat("", token_ids=[1, 3])),
        (Overlap("", [], ["a"]), chat("", logprobs={"content": [entry("b")]})),
        (Overlap("abc"), chat("a", "stop")),
        (Overlap("a", [1]), chat("ab")),
    ],
)
def test_a_continuation_that_goes_elsewhere_is_broken_off(overlap: Overlap, came: bytes) -> None:
    with pytest.raises(DivergedError):
        spliced(came, overlap=overlap)


def test_the_engines_own_failure_passes_for_the_tape_to_find() -> None:
    raw = b'data: {"error": {"message": "EngineCore died"}}\n\n'
    assert Splice(Seam(head=raw_head()))(raw) == raw


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"choices":3}',
        b'{"choices":[{"delta":3}]}',
        b'{"choices":[],"usage":3}',
    ],
)
def test_an_event_that_cannot_be_read_breaks_it_off(data: bytes) -> None:
    with pytest.raises(TornError):
        Splice(Seam(head=raw_head(), has_begun=True))(b"data: " + data + b"\n\n")


def test_an_event_without_end_breaks_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdcoord.resume.splice.EVENT_BYTES_MAX", 100)
    splice = Splice(Seam())
    assert splice(b"x" * 100) == b""
    with pytest.raises(TornError):
        splice(b"x")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_behind_an_answer_is_another_answer(name: str) -> None:
    said = event(OTHER | {"choices": [{"index": 0, "delta": {name: "hm"}, "finish_reason": None}]})
    with pytest.raises(DivergedError):
        spliced(said, is_answer=True)
    assert spliced(said)[0]["choices"][0]["delta"] == {name: "hm"}, "nothing was said before"
    empty = event(OTHER | {"choices": [{"index": 0, "delta": {name: "", "content": "x"}}]})
    assert spliced(empty, is_answer=True)
