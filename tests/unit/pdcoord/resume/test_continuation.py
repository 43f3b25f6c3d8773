"""A stream that is cut anywhere, and goes on at another engine, says what it would have said undisturbed."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.resume.continuation import (
    Continuation,
    Finished,
    Unresumable,
    continue_stream,
    count_request,
)
from pdcoord.resume.errors import DivergedError
from pdcoord.resume.tape import Shelf, Tape

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
THINKING = [*USER, {"role": "assistant", "content": "<think>well"}]
OPEN = {"continue_final_message": True, "add_generation_prompt": False}
Body = dict[str, Any]
MakeEngine = Callable[..., Any]
Read = Callable[[bytes], Body]


def relay(change: Callable[[bytes], bytes], raw: bytes, part_bytes: int) -> bytes:
    return b"".join(change(raw[at : at + part_bytes]) for at in range(0, len(raw), part_bytes))


def play(
    engine: Any, path: str, body: Body, cuts: Sequence[float], part_bytes: int
) -> tuple[bytes, list[Any]]:
    """What a client gets of a call whose streams break off at each cut in turn, and what was decided."""
    raw_body = json.dumps(body).encode()
    tape = Tape(Shelf(1 << 24, 1 << 24), raw_body)
    stream, change = engine.stream(path, raw_body), tape
    out = b""
    decided = []
    for cut in cuts:
        out += relay(change, stream[: int(len(stream) * cut)], part_bytes)
        tape.begin_again()
        assert tape.passed == out
        counted = engine.count(count_request(path, raw_body, tape.passed))
        goes_on = continue_stream(path, raw_body, tape.passed, counted_tokens=counted, context_tokens_max=120)
        decided.append(goes_on)
        if isinstance(goes_on, Finished):
            return out + goes_on.rest, decided
        if isinstance(goes_on, Unresumable):
            return out, decided
        stream = engine.stream(goes_on.path, goes_on.body)
        splice = goes_on.splice

        def change(part: bytes, splice: Callable[[bytes], bytes] = splice) -> bytes:
            return tape(splice(part))

    out += relay(change, stream, part_bytes)
    return out, decided


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, Body]:
    path = draw(st.sampled_from([CHAT, COMPLETIONS]))
    body: Body = {"model": "tiny", "stream": True, "temperature": 0}
    words = draw(st.sampled_from(["hello", "Äpfel é", 'a "b" \\ c', " "]))
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": words}]
        if draw(st.booleans()):
            body["messages"].append({"role": "assistant", "content": "Well A"})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    else:
        body["prompt"] = draw(st.sampled_from([words, [words], [1, 2, 100]]))
    if draw(st.booleans()):
        body["max_completion_tokens" if path == CHAT else "max_tokens"] = draw(st.integers(1, 40))
    body |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "return_token_ids": st.just(True),
                "logprobs": st.just(True if path == CHAT else 1),
                "stream_options": st.sampled_from(
                    [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
                ),
                "stop": st.sampled_from([["Bb"], ["A the", "\n"], ["Q", "Zebra"]]),
                "min_tokens": st.integers(0, 1 if "max_tokens" in body else 12),
            },
        )
    )
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    body["min_tokens"] = min([body.get("min_tokens", 0), *limits])
    if draw(st.booleans()) and "stop" in body:
        body["include_stop_str_in_output"] = True
    return path, body


def without_usage(answer: Body) -> Body:
    return {name: value for name, value in answer.items() if name not in {"head", "usage", "last_usage"}}


@settings(max_examples=150, deadline=None)
@given(
    call=calls(),
    answers=st.integers(0, 255),
    groups=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    line=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    part_bytes=st.sampled_from([7, 64, 1000, 1 << 20]),
)
def test_a_stream_cut_anywhere_is_one_stream(
    make_engine: MakeEngine,
    read: Read,
    call: tuple[str, Body],
    answers: int,
    groups: list[int],
    line: bytes,
    cuts: list[float],
    part_bytes: int,
) -> None:
    path, body = call
    engine = make_engine(answers=answers, groups=tuple(groups), line=line)
    whole = read(engine.stream(path, json.dumps(body).encode()))
    engine.started = 0
    out, decided = play(engine, path, body, cuts, part_bytes)
    got = read(out)
    assert without_usage(got) == without_usage(whole)
    if decided and isinstance(decided[-1], Finished) and not got["usage"]:
        return  # Nobody had said how long the prompt is.
    assert got["usage"] == whole["usage"]


@settings(max_examples=60, deadline=None)
@given(
    call=calls(),
    answers=st.integers(0, 255),
    groups=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
def test_where_tokens_are_drawn_it_is_the_same_or_none(
    make_engine: MakeEngine,
    read: Read,
    call: tuple[str, Body],
    answers: int,
    groups: list[int],
    cuts: list[float],
) -> None:
    path, body = call
    body = {name: value for name, value in body.items() if name not in {"temperature", "stop"}}
    engine = make_engine(answers=answers, groups=tuple(groups))
    whole = read(engine.stream(path, json.dumps(body).encode()))
    out, decided = play(engine, path, body, cuts, 1 << 20)
    if decided and isinstance(decided[-1], Unresumable):
        assert decided[-1] in {Unresumable.HELD_BACK, Unresumable.TOKEN_PROMPT}
        return
    assert read(out)["text"] == whole["text"]
    assert read(out)["ids"] == whole["ids"]


@settings(max_examples=30, deadline=None)
@given(answers=st.integers(0, 255), cut=st.floats(0, 1), path=st.sampled_from([CHAT, COMPLETIONS]))
def test_bytes_that_are_no_character_go_on_from_ids_or_come_again(
    make_engine: MakeEngine, read: Read, answers: int, cut: float, path: str
) -> None:
    body: Body = {"stream": True, "temperature": 0, "max_tokens": 30}
    body |= {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    for wants in ({}, {"return_token_ids": True}):
        engine = make_engine(answers=answers, is_lossy=True)
        whole = read(engine.stream(path, json.dumps(body | wants).encode()))
        out, _ = play(engine, path, body | wants, [cut], 100)
        assert without_usage(read(out)) == without_usage(whole)
        drawn, decided = play(engine, path, body | wants | {"temperature": 1}, [cut], 100)
        if isinstance(decided[-1], Unresumable):
            expected = Unresumable.HELD_BACK if wants else Unresumable.LOSSY_TEXT
            assert decided[-1] is expected
        else:
            assert read(drawn)["text"] == whole["text"]


def event(choice: Body, **top: Any) -> bytes:
    chunk = {"id": "x", "object": "o", "created": 1, "model": "tiny"}
    choice = {"index": 0, "logprobs": None, "finish_reason": None} | choice
    return b"data: " + json.dumps(chunk | {"choices": [choice]} | top).encode() + b"\n\n"


def said(text: str, *, path: str = COMPLETIONS, **more: Any) -> bytes:
    return event(({"delta": {"content": text}} if path == CHAT else {"text": text}) | more)


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "stream": True} | fields).encode()


def sent(path: str, body: bytes, passed: bytes, **known: Any) -> tuple[str, Body]:
    goes_on = continue_stream(path, body, passed, **known)
    assert isinstance(goes_on, Continuation), goes_on
    return goes_on.path, json.loads(goes_on.body)


def test_a_text_is_appended_to_the_prompt_as_the_client_wrote_it() -> None:
    body = b'{"model":"tiny","prompt":"caf\\u00e9 \\/ ","stream":true,"temperature":7e-1}'
    goes_on = continue_stream(COMPLETIONS, body, said('Ho "ho" é\\'))
    assert isinstance(goes_on, Continuation)
    assert b'"prompt":"caf\\u00e9 \\/ Ho \\"ho\\" ' in goes_on.body
    assert b'"temperature":7e-1' in goes_on.body
    assert json.loads(goes_on.body)["max_tokens"] == 15
    assert goes_on.prompt_tokens_more == 1


@pytest.mark.parametrize("prompt", [["ab"], "ab"])
def test_one_prompt_in_a_list_is_one_prompt(prompt: Any) -> None:
    assert sent(COMPLETIONS, raw(prompt=prompt), said("c"))[1]["prompt"] == "abc"


def test_a_chat_goes_on_as_a_message_that_is_open() -> None:
    user = {"role": "user", "content": "Hi"}
    path, body = sent(
        CHAT, raw(messages=[user], max_completion_tokens=9, max_tokens=8), said("Ho", path=CHAT)
    )
    assert path == CHAT
    assert body["messages"] == [user, {"role": "assistant", "content": "Ho"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_completion_tokens"], body["max_tokens"]) == (8, 7)
    began = {"role": "assistant", "content": "Well, "}
    is_open = {"continue_final_message": True, "add_generation_prompt": False}
    _, body = sent(CHAT, raw(messages=[user, began], **is_open), said("Ho", path=CHAT))
    assert body["messages"] == [user, {"role": "assistant", "content": "Well, Ho"}]


def test_a_chat_with_ids_goes_on_as_a_completion_of_them() -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "return_token_ids": True, "logprobs": False}
    role = event({"delta": {"role": "assistant", "content": ""}}, prompt_token_ids=[1, 2, 3])
    passed = role + said("a", path=CHAT, token_ids=[7]) + said("b", path=CHAT, token_ids=[8])
    path, body = sent(CHAT, raw(max_completion_tokens=10, min_tokens=5, **fields), passed)
    assert path == COMPLETIONS
    expected = {"prompt": [1, 2, 3, 7, 8], "max_tokens": 8, "min_tokens": 3, "return_token_ids": True}
    assert body == {"model": "tiny", "stream": True} | expected
    # Without a limit a completion needs one; as long as nobody knows the context, the text goes on.
    assert sent(CHAT, raw(**fields), passed)[0] == CHAT
    path, body = sent(CHAT, raw(**fields), passed, context_tokens_max=100)
    assert (path, body["max_tokens"]) == (COMPLETIONS, 95)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True},
        {"tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
)
def test_a_chat_whose_chunks_a_completion_would_not_give_goes_on_from_text(fields: Body) -> None:
    role = event({"delta": {"role": "assistant", "content": ""}}, prompt_token_ids=[1])
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "return_token_ids": True,
    } | fields
    assert sent(CHAT, raw(**body), role + said("a", path=CHAT, token_ids=[7]))[0] == CHAT


def test_counts_are_asked_for_only_where_they_matter() -> None:
    user = [{"role": "user", "content": "Hi"}]
    asked = count_request(CHAT, raw(messages=user, max_tokens=9), said("Ho ho", path=CHAT))
    assert asked is not None
    assert json.loads(asked) == {"model": "tiny", "prompt": "Ho ho", "add_special_tokens": False}
    assert count_request(CHAT, raw(messages=user), said("Ho ho", path=CHAT)) is None
    assert (
        count_request(COMPLETIONS, raw(prompt="a", return_token_ids=True), said("b", token_ids=[1])) is None
    )
    assert count_request(COMPLETIONS, raw(prompt="a"), b"") is None
    assert count_request(COMPLETIONS, raw(prompt="a", echo=True), said("b")) is None
    assert count_request(COMPLETIONS, b"{", b"") is None
    usage = {"include_usage": True}
    assert count_request(CHAT, raw(messages=user, stream_options=usage), said("Ho", path=CHAT)) is not None


def test_a_count_is_more_than_the_events_that_merged_tokens() -> None:
    body, passed = raw(prompt="a", max_tokens=9), said("three tokens")
    assert sent(COMPLETIONS, body, passed)[1]["max_tokens"] == 8
    assert sent(COMPLETIONS, body, passed, counted_tokens=3)[1]["max_tokens"] == 6
    over = continue_stream(COMPLETIONS, body, passed, counted_tokens=9)
    assert isinstance(over, Finished)
    assert b'"length"' in over.rest
    assert over.rest.endswith(b"data: [DONE]\n\n")


def test_nothing_is_left_to_do_after_the_end() -> None:
    passed = said("a", token_ids=[1], prompt_token_ids=[5, 6]) + said("", finish_reason="stop", token_ids=[2])
    usage = {"include_usage": True}
    ended = continue_stream(COMPLETIONS, raw(prompt="p", stream_options=usage, guided_regex="a"), passed)
    assert isinstance(ended, Finished)
    assert b'"prompt_tokens":2,"total_tokens":4,"completion_tokens":2' in ended.rest
    assert continue_stream(COMPLETIONS, raw(prompt="p"), passed + b"data: [DONE]\n\n") == Finished(b"")


@pytest.mark.parametrize(
    "passed",
    [b"", b": ping\n\n", event({"delta": {"role": "assistant", "content": ""}}), said("", path=CHAT)],
)
def test_without_output_the_same_call_is_sent_again(passed: bytes) -> None:
    body = raw(
        messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}, bad_words=["x"]
    )
    goes_on = continue_stream(CHAT, body, passed)
    assert isinstance(goes_on, Continuation)
    assert (goes_on.path, goes_on.body, goes_on.prompt_tokens_more) == (CHAT, body, 0)


@pytest.mark.parametrize(
    ("path", "body", "passed", "why"),
    [
        ("/v1/responses", raw(input="a"), b"", Unresumable.API),
        ("/v1/messages", raw(messages=[]), b"", Unresumable.API),
        (COMPLETIONS, b'{"prompt":"a"}', b"", Unresumable.API),
        (COMPLETIONS, b"[", b"", Unresumable.UNREADABLE),
        (COMPLETIONS, raw(prompt="a"), b"data: {\n\n", Unresumable.UNREADABLE),
        (COMPLETIONS, raw(prompt=7), said("a"), Unresumable.UNREADABLE),
        (CHAT, raw(messages=7), said("a", path=CHAT), Unresumable.UNREADABLE),
        (COMPLETIONS, raw(prompt="a", n=2), b"", Unresumable.MANY_CHOICES),
        (COMPLETIONS, raw(prompt=["a", "b"]), said("a"), Unresumable.MANY_CHOICES),
        (COMPLETIONS, raw(prompt="a"), said("a", index=1), Unresumable.MANY_CHOICES),
        (COMPLETIONS, raw(prompt="a", use_beam_search=True), said("a"), Unresumable.BEAM_SEARCH),
        (COMPLETIONS, raw(prompt="a", echo=True), said("a"), Unresumable.ECHO),
        (COMPLETIONS, raw(prompt="a", suffix="b"), said("a"), Unresumable.SUFFIX),
        (COMPLETIONS, raw(prompt="a", regex="b"), said("a"), Unresumable.GUIDED_DECODING),
        (CHAT, raw(messages=USER), event({"delta": {"tool_calls": [{}]}}), Unresumable.TOOL_CALLS),
        (CHAT, raw(messages=USER), event({"delta": {"reasoning": "a"}}), Unresumable.REASONING),
        (CHAT, raw(messages=USER), said("hm</think>", path=CHAT), Unresumable.REASONING),
        (CHAT, raw(messages=USER), said("hm</think", path=CHAT), Unresumable.REASONING),
        (CHAT, raw(messages=USER), said("<think>hm</think>Yes", path=CHAT), Unresumable.REASONING),
        (CHAT, raw(messages=USER), said("<|START_THINKING|>hm", path=CHAT), Unresumable.REASONING),
        (
            CHAT,
            raw(messages=USER, chat_template_kwargs={"thinking": True}),
            said("hm", path=CHAT),
            Unresumable.REASONING,
        ),
        (CHAT, raw(messages=USER, chat_template="<think>"), said("hm", path=CHAT), Unresumable.REASONING),
        (CHAT, raw(messages=THINKING, **OPEN), said("hm", path=CHAT), Unresumable.REASONING),
        (COMPLETIONS, raw(prompt="a", presence_penalty=1), said("a"), Unresumable.PENALTIES),
        (COMPLETIONS, raw(prompt="a", bad_words=["b"]), said("a"), Unresumable.OUTPUT_HISTORY),
        (COMPLETIONS, raw(prompt="a", vllm_xargs={"a": 1}), said("a"), Unresumable.LOGITS_PROCESSORS),
        (COMPLETIONS, raw(prompt="a", truncate_prompt_tokens=4), said("a"), Unresumable.TRUNCATED_PROMPT),
        (COMPLETIONS, raw(prompt_embeds="AA"), said("a"), Unresumable.PROMPT_EMBEDS),
        (COMPLETIONS, raw(prompt=[1]), said("a"), Unresumable.TOKEN_PROMPT),
        (COMPLETIONS, raw(prompt="a"), said("\ufffda"), Unresumable.LOSSY_TEXT),
        (COMPLETIONS, raw(prompt=[1], stop="x" * 12), said("a", token_ids=[1]) * 10, Unresumable.HELD_BACK),
        (CHAT, raw(messages=USER, add_generation_prompt=False), said("a", path=CHAT), Unresumable.TEMPLATE),
        (CHAT, raw(messages=USER, continue_final_message=True), said("a", path=CHAT), Unresumable.TEMPLATE),
        (COMPLETIONS, raw(prompt="a", new_field=1), said("a"), Unresumable.UNKNOWN_FIELD),
    ],
)
def test_what_cannot_go_on_is_named(path: str, body: bytes, passed: bytes, why: Unresumable) -> None:
    assert continue_stream(path, body, passed) is why


def test_reasoning_that_a_template_opened_goes_on_from_token_ids() -> None:
    body = raw(messages=USER, max_tokens=9, return_token_ids=True, chat_template="<think>")
    passed = said("hm", path=CHAT, token_ids=[7], prompt_token_ids=[1, 2])
    goes_on = continue_stream(CHAT, body, passed)
    assert isinstance(goes_on, Continuation)
    assert goes_on.path == COMPLETIONS
    assert json.loads(goes_on.body)["prompt"] == [1, 2, 7]


def test_every_reason_that_is_found_here_has_a_case() -> None:
    (marker,) = (m for m in test_what_cannot_go_on_is_named.pytestmark if m.name == "parametrize")
    # The edge says the rest: it has the tape.
    assert set(Unresumable) - {case[-1] for case in marker.args[1]} == {Unresumable.TAPE_FULL}


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 500))
def test_bytes_of_any_kind_raise_nothing(junk: bytes, more: bytes, at: int) -> None:
    whole = said("a", token_ids=[1], prompt_token_ids=[2]) * 2
    body = raw(prompt="a", max_tokens=9, stop=["x"], stream_options={"include_usage": True})
    for path in (CHAT, COMPLETIONS):
        cut, keep = at % len(whole), at % len(body)
        continue_stream(path, body, whole[:cut] + junk + whole[cut:])
        continue_stream(path, body[:keep] + junk + body[keep:], whole)
        count_request(path, body[:keep] + more + body[keep:], whole[:cut] + junk + whole[cut:])


def test_a_chat_that_goes_on_from_text_has_to_be_proved() -> None:
    body, passed = raw(messages=USER, max_tokens=9), said("Ho", path=CHAT)
    goes_on = continue_stream(CHAT, body, passed)
    assert isinstance(goes_on, Continuation)
    assert goes_on.proof is not None
    _, begun, continued = map(json.loads, goes_on.proof.questions())
    assert begun["messages"] == USER
    assert continued["messages"] == json.loads(goes_on.body)["messages"]
    itself = continue_stream(CHAT, body, passed, appends_itself=True)
    assert isinstance(itself, Continuation)
    assert (itself.body, itself.proof) == (goes_on.body, None)
    for path, asked, stream in (
        (COMPLETIONS, raw(prompt="a"), said("b")),
        (CHAT, body, b""),
        (CHAT, body, said("a", path=CHAT, token_ids=[7], prompt_token_ids=[1])),
    ):
        other = continue_stream(path, asked, stream)
        assert isinstance(other, Continuation)
        assert other.proof is None


def test_reasoning_behind_a_chats_answer_does_not_go_on_with_it() -> None:
    goes_on = continue_stream(CHAT, raw(messages=USER), said("Ho", path=CHAT))
    assert isinstance(goes_on, Continuation)
    with pytest.raises(DivergedError):
        goes_on.splice(event({"delta": {"reasoning": "hm"}}))
    anew = continue_stream(CHAT, raw(messages=USER), event({"delta": {"role": "assistant", "content": ""}}))
    assert isinstance(anew, Continuation)
    assert b"hm" in anew.splice(event({"delta": {"reasoning": "hm"}}))


@pytest.mark.parametrize(
    ("limit", "finish", "context", "tokens"),
    [
        (9, "length", 11, 9),
        (9, "length", 10, None),
        (9, "length", None, None),
        (2, "length", None, 2),
        (9, "stop", 100, None),
        (None, "length", 100, None),
    ],
)
def test_the_usage_of_what_ended_for_its_length_is_known(
    limit: int | None, finish: str, context: int | None, tokens: int | None
) -> None:
    """Unless the context was full before; each event has at least one token."""
    asked = {"prompt": [5, 6], "stream_options": {"include_usage": True}}
    body = raw(**asked, **({} if limit is None else {"max_tokens": limit}))
    if limit is None:
        body = raw(messages=USER, stream_options=asked["stream_options"])
    path = CHAT if limit is None else COMPLETIONS
    passed = said("a", path=path) + said("b", path=path, finish_reason=finish)
    ended = continue_stream(path, body, passed, context_tokens_max=context)
    assert isinstance(ended, Finished)
    assert (b"usage" in ended.rest) is (tokens is not None)
    if tokens is not None:
        usage = json.loads(ended.rest.split(b"\n\n")[0].removeprefix(b"data: "))["usage"]
        assert usage == {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
