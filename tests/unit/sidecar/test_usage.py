"""Usage of split requests: the prefill engine's number, all other bytes as they came, however cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.usage import UsageRewriter

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"

CHAT_STREAM = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"the \\"cached_tokens\\": 5 member"}}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":318,"total_tokens":320,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":317}}}\n\n'
    b"data: [DONE]\n\n"
)
MESSAGES_STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"content":[],"usage":'
    b'{"input_tokens":1,"output_tokens":0,"cache_read_input_tokens":317}}}\n\n'
    b'event: content_block_delta\ndata: {"delta":{"text":"\\"input_tokens\\":4"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"input_tokens":1,"output_tokens":9,'
    b'"cache_creation_input_tokens":null,"cache_read_input_tokens":317}}\n\n'
)


def whole(path: str, cached_tokens: int, data: bytes) -> bytes:
    rewriter = UsageRewriter(path, cached_tokens)
    return rewriter.feed(data) + rewriter.finish()


def cut_up(path: str, cached_tokens: int, data: bytes, cuts: list[int]) -> bytes:
    rewriter = UsageRewriter(path, cached_tokens)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    parts = [rewriter.feed(data[a:b]) for a, b in itertools.pairwise(edges)]
    return b"".join([*parts, rewriter.finish()])


def test_only_the_number_changes() -> None:
    assert whole(CHAT, 64, CHAT_STREAM) == CHAT_STREAM.replace(b":317}", b":64}")


def test_anthropics_input_tokens_leave_out_what_was_cached() -> None:
    expected = MESSAGES_STREAM.replace(b'"input_tokens":1,', b'"input_tokens":254,').replace(b"317", b"64")
    assert whole(MESSAGES, 64, MESSAGES_STREAM) == expected


def test_anthropics_sum_is_never_exceeded() -> None:
    assert b'"input_tokens":0,"output_tokens":0,"cache_read_input_tokens":318' in whole(
        MESSAGES, 1000, MESSAGES_STREAM
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", CHAT])
def test_a_whole_body_is_rewritten_in_either_spelling(path: str) -> None:
    body = {"input_tokens_details": {"cached_tokens": 12, "cached_tokens_per_turn": [12]}}
    for text in (json.dumps(body), json.dumps(body, separators=(",", ":"))):
        changed = json.loads(whole(path, 3, text.encode()))
        assert changed["input_tokens_details"] == {"cached_tokens": 3, "cached_tokens_per_turn": [12]}


@pytest.mark.parametrize(
    "data",
    [
        b'{"cached_tokens":null}',
        b'{"cached_tokens":1.5}',
        b'{"cached_tokens":"7"}',
        b'{"cached_tokens":1234567890123456}',
        b'{"cached_tokens":     7}',
        b'{"cached_tokens":12',
        b'{"cached_tok',
        b"",
    ],
)
def test_what_is_no_count_stays(data: bytes) -> None:
    assert whole(CHAT, 5, data) == data


def test_a_chunk_that_ends_a_line_is_passed_on_as_it_is() -> None:
    rewriter = UsageRewriter(CHAT, 5)
    chunk = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    assert rewriter.feed(chunk) is chunk


def test_no_more_than_the_span_is_held_back() -> None:
    for path, data in ((CHAT, CHAT_STREAM), (MESSAGES, MESSAGES_STREAM)):
        rewriter = UsageRewriter(path, 5)
        taken_bytes = 0
        for given_bytes in range(1, len(data) + 1):
            taken_bytes += len(rewriter.feed(data[given_bytes - 1 : given_bytes]))
            # Numbers change their length: 2 digits at most here, for each usage object.
            assert given_bytes - taken_bytes <= 280 + 8


fragments = st.sampled_from(
    [
        b'"cached_tokens":',
        b'"input_tokens":',
        b'"cache_read_input_tokens":',
        b'\\"cached_tokens\\":',
        b'"cached_',
        b'"',
        b" ",
        b"     ",
        b"12",
        b"7",
        b",",
        b"}",
        b"{",
        b"\n",
        b'"output_tokens":3',
        b"x" * 170,
        b"9" * 16,
    ]
)


@given(
    pieces=st.lists(fragments, max_size=14),
    cuts=st.lists(st.integers(0, 5000), max_size=6),
    path=st.sampled_from([CHAT, MESSAGES]),
)
def test_how_the_answer_is_cut_changes_nothing(pieces: list[bytes], cuts: list[int], path: str) -> None:
    data = b"".join(pieces)
    assert cut_up(path, 5, data, cuts) == whole(path, 5, data)


@given(cuts=st.lists(st.integers(0, 5000), max_size=12))
def test_how_a_real_stream_is_cut_changes_nothing(cuts: list[int]) -> None:
    for path, data in ((CHAT, CHAT_STREAM), (MESSAGES, MESSAGES_STREAM)):
        assert cut_up(path, 64, data, cuts) == whole(path, 64, data)


def test_every_single_cut_of_a_real_stream() -> None:
    for path, data in ((CHAT, CHAT_STREAM), (MESSAGES, MESSAGES_STREAM)):
        expected = whole(path, 64, data)
        for cut in range(len(data)):
            assert cut_up(path, 64, data, [cut]) == expected, cut
