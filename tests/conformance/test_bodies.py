"""Request bodies in FULL_DUPLEX_STREAMED: all of it comes back, in order, in pieces that Envoy takes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

PIECE_BYTES_MAX = 62_000
"""What llm-d's picker sends at most; Envoy's own limit on a piece is 64 KiB."""


def prompt(target: Any, size: int) -> bytes:
    """A call of exactly that many bytes."""
    empty = len(json.dumps({"model": target.model, "max_tokens": 8, "prompt": ""}))
    body = json.dumps({"model": target.model, "max_tokens": 8, "prompt": ("word " * size)[: size - empty]})
    assert len(body) == size
    return body.encode()


def cut(body: bytes, length: int) -> Iterator[bytes]:
    return (body[start : start + length] for start in range(0, len(body), length))


CHUNKINGS = {
    "bytes": (300, 1),
    "odd": (4_099, 7),
    "one message": (30_000, 30_000),
    "pieces of 62000": (186_000, 62_000),
    "pieces of 64 KiB": (200_001, 65_536),
    "1 MiB in small pieces": (1 << 20, 4_096),
    "1 MiB at once": (1 << 20, 1 << 20),
}


@pytest.mark.parametrize("chunking", CHUNKINGS)
async def test_the_whole_body_comes_back(envoy: Any, target: Any, chunking: str) -> None:
    size, length = CHUNKINGS[chunking]
    body = prompt(target, size)
    told = await envoy.ask(body, chunks=cut(body, length))
    assert told.refusal is None
    assert told.body == body, "nothing of the call was to be changed"
    check_pieces(told)


def check_pieces(told: Any) -> None:
    assert told.kinds == ["request_headers", *["request_body"] * len(told.pieces)]
    assert max(length for length, _ in told.pieces) <= PIECE_BYTES_MAX
    assert [is_last for _, is_last in told.pieces] == [False] * (len(told.pieces) - 1) + [True]


async def test_an_end_that_comes_in_a_piece_of_its_own(envoy: Any, target: Any) -> None:
    body = prompt(target, 70_000)
    told = await envoy.ask(body, chunks=[body[:40_000], body[40_000:], b""])
    assert told.body == body
    check_pieces(told)


async def test_empty_pieces_on_the_way(envoy: Any, target: Any) -> None:
    body = prompt(target, 900)
    told = await envoy.ask(body, chunks=[b"", body[:10], b"", b"", body[10:]])
    assert told.body == body
    check_pieces(told)


async def test_trailers_end_a_body(envoy: Any, target: Any) -> None:
    """With trailers no piece of the body is marked as the last; they are answered after all of it."""
    body = prompt(target, 130_000)
    told = await envoy.ask(body, chunks=cut(body, 60_000), has_trailers=True)
    assert told.refusal is None
    assert told.body == body
    assert told.kinds[0] == "request_headers"
    assert told.kinds[-1] == "request_trailers"
    assert set(told.kinds[1:-1]) == {"request_body"}
    assert not any(is_last for _, is_last in told.pieces), "the stream does not end before its trailers"


async def test_a_length_that_is_told_is_the_bodys(envoy: Any, target: Any) -> None:
    body = prompt(target, 5_000)
    sent = envoy.post_headers(content_length=str(len(body)))
    told = await envoy.ask(body, headers=sent)
    assert told.headers(sent).get("content-length") in {None, str(len(told.body))}


async def test_a_body_that_is_changed_has_no_wrong_length(envoy: Any, target: Any) -> None:
    """A picker that replaces the model's name changes nothing else of the body."""
    fields = {"model": target.need("alias"), "prompt": "word " * 20_000, "max_tokens": 8}
    body = json.dumps(fields).encode()
    sent = envoy.post_headers(content_length=str(len(body)))
    told = await envoy.ask(body, headers=sent)
    assert json.loads(told.body) == fields | {"model": target.model}
    assert told.headers(sent).get("content-length") in {None, str(len(told.body))}
    check_pieces(told)


PATHS = {
    "/v1/completions": {"prompt": "Say it"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Say it"}]},
    "/v1/completions?x=1": {"prompt": [1, 2, 3]},
}


@pytest.mark.parametrize("path", PATHS)
async def test_openai_calls_are_picked_for(envoy: Any, target: Any, path: str) -> None:
    body = json.dumps({"model": target.model, "max_tokens": 8, **PATHS[path]}).encode()
    told = await envoy.ask(body, headers=envoy.post_headers(path))
    assert set(told.destinations) <= target.endpoints
    assert told.body == body


@pytest.mark.optional
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
async def test_other_calls_are_picked_for(envoy: Any, target: Any, path: str) -> None:
    content = (
        {"messages": [{"role": "user", "content": "Say it"}]} if "messages" in path else {"input": "Say it"}
    )
    body = json.dumps({"model": target.model, "max_tokens": 8, **content}).encode()
    told = await envoy.ask(body, headers=envoy.post_headers(path))
    assert set(told.destinations) <= target.endpoints
    assert told.body == body
