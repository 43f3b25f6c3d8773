"""Another engine takes over after a whole token and a whole character, and before what may come again."""

import json
from typing import Any

import pytest

from pdcoord.resume.call import CHAT, COMPLETIONS, read_call
from pdcoord.resume.passed import read_passed
from pdcoord.resume.takeover import DRAWN_EVENTS_MAX, Takeover, find_takeover
from pdcoord.resume.unresumable import Unresumable

Event = tuple[str, list[int]]


def found(
    events: list[Event], *, path: str = COMPLETIONS, from_ids: bool = False, **fields: Any
) -> Takeover | Unresumable:
    """The point in a stream of events, each a text and its token ids; without ids where none has any."""
    raw = b""
    for text, ids in events:
        choice: dict[str, Any] = {"index": 0, "token_ids": ids or None}
        choice |= {"delta": {"content": text}} if path == CHAT else {"text": text}
        raw += b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"
    body = {"prompt": "p", "stream": True} | fields
    return find_takeover(read_call(path, json.dumps(body).encode()), read_passed(raw), from_ids=from_ids)


def split(takeover: Takeover | Unresumable) -> tuple[str, str, list[int], list[int], int]:
    assert isinstance(takeover, Takeover)
    overlap = takeover.overlap
    return takeover.text, overlap.text, takeover.ids, overlap.ids, takeover.tokens


def test_the_end_of_what_was_passed_on() -> None:
    events: list[Event] = [("He", [1]), ("llo", [2])]
    assert split(found(events, from_ids=True)) == ("Hello", "", [1, 2], [], 2)
    without: list[Event] = [("He", []), ("llo", [])]
    takeover = found(without)
    assert split(takeover) == ("Hello", "", [], [], 2)
    assert isinstance(takeover, Takeover)
    assert not takeover.is_exact


def test_ids_that_have_no_text_yet_come_again() -> None:
    assert split(found([("a", [1]), ("", [2]), ("", [3])], from_ids=True)) == ("a", "", [1], [2, 3], 1)
    assert split(found([("a", []), ("", []), ("", [])])) == ("a", "", [], [], 1)


@pytest.mark.parametrize(("following", "ids"), [("c", [1, 2, 3]), ("é", [1]), ("\ufffd", [1])])
def test_an_event_of_several_tokens_may_have_begun_a_character(following: str, ids: list[int]) -> None:
    got = found([("a", [1]), ("b", [2, 3]), (following, [4, 5])], from_ids=True)
    assert isinstance(got, Takeover)
    assert got.ids == ids
    assert got.ids + got.overlap.ids == [1, 2, 3, 4, 5]
    assert got.text + got.overlap.text == "ab" + following


def test_held_back_text_sets_the_point_back() -> None:
    # Three characters are held back: after the event that brought "c" the engine was past "f".
    events: list[Event] = [("", [1]), ("abc", [2]), ("de", [3]), ("f", [4])]
    assert split(found(events, from_ids=True, stop="wxyz")) == ("abcdef", "", [1, 2], [3, 4], 2)
    events = [("", [1]), ("abc", [2]), ("de", [3])]
    assert split(found(events, from_ids=True, stop="wxyz")) == ("", "abcde", [], [1, 2, 3], 0)
    without = [(text, list[int]()) for text, _ in [*events, ("fg", [])]]
    assert split(found(without, stop="wxyz", temperature=0)) == ("abcdef", "g", [], [], 1)
    assert split(found(without, stop="wxyz")) == ("abcdefg", "", [], [], 1)
    drawn = found(without, stop="wxyz")
    assert isinstance(drawn, Takeover)
    assert not drawn.is_exact


@pytest.mark.parametrize(("stop", "kept"), [("bcd", "a"), ("cx", "ab"), ("xy", "abc"), ("abcd", "")])
def test_a_stop_string_that_may_have_begun_comes_again(stop: str, kept: str) -> None:
    events: list[Event] = [("a", [1]), ("b", [2]), ("c", [3])]
    got = found(events, from_ids=True, stop=[stop], include_stop_str_in_output=True)
    assert isinstance(got, Takeover)
    assert (got.text, got.text + got.overlap.text) == (kept, "abc")


def test_white_space_at_the_end_of_a_message_comes_again() -> None:
    events: list[Event] = [("a b", []), (".\n", []), ("\n", [])]
    assert split(found(events, path=CHAT)) == ("a b", ".\n\n", [], [], 1)
    assert split(found(events)) == ("a b.\n\n", "", [], [], 3)
    assert split(found([(" ", [])], path=CHAT)) == ("", " ", [], [], 0)
    assert split(found([("a b", [1]), ("\n", [2])], path=CHAT, from_ids=True))[0] == "a b\n"
    assert split(found([("ab ", [])], path=CHAT, stop="xyz"))[:2] == ("ab", " ")


def test_text_that_is_no_character_comes_again_or_never() -> None:
    events: list[Event] = [("a", []), ("\ufffdb", []), ("c", [])]
    assert split(found(events, temperature=0)) == ("a", "\ufffdbc", [], [], 1)
    assert found(events) is Unresumable.LOSSY_TEXT


def test_a_prompt_of_ids_takes_no_text() -> None:
    assert split(found([("a", [])], prompt=[1, 2], temperature=0)) == ("", "a", [], [], 0)
    assert found([("a", [])], prompt=[1, 2]) is Unresumable.TOKEN_PROMPT


def test_drawn_tokens_come_again_only_a_few() -> None:
    few: list[Event] = [("a", [1]), *(("", [n]) for n in range(DRAWN_EVENTS_MAX))]
    assert isinstance(found(few, from_ids=True), Takeover)
    assert found([*few, ("", [9])], from_ids=True) is Unresumable.HELD_BACK
    assert isinstance(found([*few, ("", [9])], from_ids=True, temperature=0), Takeover)


def test_tokens_of_a_character_that_was_begun_are_not_counted() -> None:
    raw = b""
    for text, done in (("a", 1), ("b", 3)):
        usage = {"prompt_tokens": 1, "completion_tokens": done, "total_tokens": 1 + done}
        chunk = {"id": "x", "choices": [{"index": 0, "text": text}], "usage": usage}
        raw += b"data: " + json.dumps(chunk).encode() + b"\n\n"
    for fields, expected in (({}, ("ab", 1, False)), ({"temperature": 0}, ("a", 1, True))):
        call = read_call(COMPLETIONS, json.dumps({"prompt": "p", "stream": True} | fields).encode())
        got = find_takeover(call, read_passed(raw), from_ids=False)
        assert isinstance(got, Takeover)
        assert (got.text, got.tokens, got.is_exact) == expected


@pytest.mark.parametrize("is_greedy", [True, False])
def test_a_token_that_has_no_text_is_in_no_text(*, is_greedy: bool) -> None:
    """Where it may be: amid others, or anywhere once the end of the output is ignored."""
    fields = {"temperature": 0 if is_greedy else 1}
    amid: list[Event] = [("a", []), ("b", []), ("", []), ("c", [])]
    takeover = found(amid, **fields)
    assert takeover is Unresumable.LOSSY_TEXT or split(takeover) == ("ab", "c", [], [], 2)
    assert isinstance(takeover, Takeover) is is_greedy
    for ignores in ({"ignore_eos": True}, {"ignore_eos": True, "skip_special_tokens": True}):
        takeover = found([("a", []), ("b", [])], **fields, **ignores)
        assert takeover is Unresumable.LOSSY_TEXT or split(takeover) == ("", "ab", [], [], 0)
        assert isinstance(takeover, Takeover) is is_greedy


def test_a_token_that_only_seems_to_have_no_text() -> None:
    assert split(found([("a", []), ("", []), ("\u00e9", [])])) == ("a\u00e9", "", [], [], 2), (
        "half a character"
    )
    assert split(found([("", []), ("a", [])])) == ("a", "", [], [], 1), "before any other"
    shown = found([("a", []), ("b", [])], ignore_eos=True, skip_special_tokens=False)
    assert split(shown) == ("ab", "", [], [], 2)
    with_ids: list[Event] = [("a", [1]), ("", [2]), ("c", [3])]
    assert split(found(with_ids, from_ids=True, ignore_eos=True)) == ("ac", "", [1, 2, 3], [], 3)
