"""A partial answer is continued where its tokens are those of the chat and those of the text behind them."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.resume.proof import Proof, Tokenized, read_tokenized, text_question

CHAT = {"model": b'"m"', "messages": b'[{"role":"user","content":"hi"}]', "temperature": b"1"}
OPEN = {"continue_final_message": b"true", "add_generation_prompt": b"false"}
CHAT_OPEN = CHAT | OPEN | {"messages": b"[7]", "tools": b"[]"}


def fields(given_fields: dict[str, bytes]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(value) for name, value in given_fields.items()}


def tokens(spelled: str, *, is_spelled: bool = True) -> Tokenized:
    strings = spelled.split("|") if spelled else []
    ids = [hash(each) for each in strings]
    return Tokenized(len(ids), ids, strings if is_spelled else None)


def holds(alone: str, begun: str, continued: str, *, text: str = "Once", is_spelled: bool = True) -> bool:
    proof = Proof(fields(CHAT), fields(CHAT_OPEN), text)
    return proof.holds(*(tokens(each, is_spelled=is_spelled) for each in (alone, begun, continued)))


def test_what_is_asked() -> None:
    alone, begun, continued = Proof(fields(CHAT), fields(CHAT_OPEN), 'a "b"').questions()
    wanted = {"return_token_strs": True}
    assert json.loads(alone) == {"model": "m", "prompt": 'a "b"', "add_special_tokens": False} | wanted
    user = {"role": "user", "content": "hi"}
    assert json.loads(begun) == {"model": "m", "messages": [user]} | wanted
    is_open = {"continue_final_message": True, "add_generation_prompt": False}
    assert json.loads(continued) == {"model": "m", "messages": [7], "tools": []} | is_open | wanted
    assert "model" not in json.loads(text_question({}, ""))


@pytest.mark.parametrize("is_spelled", [True, False])
def test_the_chats_tokens_and_the_texts_behind_them(*, is_spelled: bool) -> None:
    assert holds("Once| upon", "<a>|hi|<b>", "<a>|hi|<b>|Once| upon", is_spelled=is_spelled)


@pytest.mark.parametrize(
    "continued",
    [
        "<a>|hi|<b>|Once| upon|</s>",  # Ended.
        "<a>|hi|<b>| upon",  # Its beginning is gone,
        "<a>|hi|<b>|Once",  # or its end,
        "<a>|hi|<b>",  # or all.
        "<a>|hi|</s>|Once| upon",  # No answer was begun.
        "<a>|hi|<b>|<think>|</think>|Once| upon",
        "",
    ],
)
def test_anything_else_does_not_hold(continued: str) -> None:
    assert not holds("Once| upon", "<a>|hi|<b>", continued)


def test_tokens_at_the_seam_may_have_merged() -> None:
    assert holds("\\n|Once", "<a>|:\\n", "<a>|:|\\n\\n|Once")
    assert not holds("\\n|Once", "<a>|:\\n", "<a>|:|\\n|Once")
    assert not holds("\\n|Once", "<a>|:\\n", "<a>|:|\\n\\n|Once", is_spelled=False)
    assert not holds("\\n\\n|Once", "<a>", "<a>|Once"), "trimmed"


def test_a_tokenizer_that_puts_a_space_before_a_text() -> None:
    assert holds("▁Once|▁upon", "<a>", "<a>|Once|▁upon", text="Once upon")
    assert not holds("▁Once|▁upon", "<a>", "<a>|▁Once|▁upon", text="Once upon"), "the template put one there"
    assert holds("▁Once|▁upon", "<a>", "<a>|▁Once|▁upon", text=" Once upon")
    assert not holds("▁Once|▁upon", "<a>", "<a>|Once|▁upon", text=" Once upon")


@given(
    begun=st.text("ab", max_size=8),
    text=st.text("ab", max_size=8),
    cuts=st.lists(st.integers(1, 3)),
    is_other=st.booleans(),
)
def test_however_it_is_cut_what_it_spells_decides(
    begun: str, text: str, cuts: list[int], *, is_other: bool
) -> None:
    whole, pieces = begun + text + "c" * is_other, []
    for cut in [*cuts, len(whole)]:
        if whole:
            pieces.append(whole[:cut])
            whole = whole[cut:]
    assert holds("|".join(text), "|".join(begun), "|".join(pieces), text=text) is not is_other


def test_an_answer_that_is_none() -> None:
    for raw in (b"{", b"[]", b'{"count":"1"}', b'{"count":1,"tokens":[1],"token_strs":[null]}', b"\xff"):
        assert read_tokenized(raw) is None
    assert read_tokenized(b'{"count":1,"max_model_len":9}') == Tokenized(1)
