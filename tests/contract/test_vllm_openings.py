"""What recorded streams of vLLM 0.32.0 show before their first token, cut anywhere."""

import gzip
from pathlib import Path
from typing import cast

import pytest

from pdcoord.gateway.first import has_first_token
from pdcoord.resume.opening import Opening, Seen, shows_first_token
from pdcoord.wire.response import Response

RECORDED = Path(__file__).parent / "vllm-0.32.0"
SSE = b"text/event-stream; charset=utf-8"


def first_seen(path: Path, chunk_bytes: int) -> Seen:
    opening = Opening(SSE)
    raw = path.read_bytes()
    for start in range(0, len(raw), chunk_bytes):
        seen = opening.feed(raw[start : start + chunk_bytes])
        if seen is not Seen.NOTHING:
            return seen
    return opening.end()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 300, 1 << 20])
@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.failed.sse")), ids=lambda path: path.name)
def test_a_failed_pull_is_seen_before_anything_is_given_to_the_client(path: Path, chunk_bytes: int) -> None:
    # /v1/responses does not say error: the stream just ends, which the reader of the socket tells.
    expected = {Seen.NOTHING, Seen.ERROR} if path.name.startswith("responses") else {Seen.ERROR}
    assert first_seen(path, chunk_bytes) in expected


@pytest.mark.parametrize("chunk_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.decode.sse")), ids=lambda path: path.name)
def test_an_answer_is_seen_as_output(path: Path, chunk_bytes: int) -> None:
    assert first_seen(path, chunk_bytes) is Seen.OUTPUT


def events(path: Path) -> list[bytes]:
    return [block + b"\n\n" for block in path.read_bytes().split(b"\n\n") if block.strip()]


@pytest.mark.parametrize("kind", ["decode", "bare"])
@pytest.mark.parametrize(
    ("call", "preamble_count"), [("completions", 0), ("chat", 0), ("responses", 2), ("messages", 1)]
)
def test_the_first_token_is_shown_by_the_event_behind_the_preamble(
    call: str, kind: str, preamble_count: int
) -> None:
    recorded = events(RECORDED / f"{call}.{kind}.sse")
    assert not shows_first_token(b"".join(recorded[:preamble_count]))
    assert shows_first_token(recorded[preamble_count])
    assert shows_first_token(b"".join(recorded[: preamble_count + 1]))
    assert shows_first_token(b"".join(recorded)), "all in one read"


@pytest.mark.parametrize("call", ["completions", "chat", "responses", "messages"])
def test_a_failed_pull_shows_no_token_where_it_is_seen(call: str) -> None:
    recorded = events(RECORDED / f"{call}.failed.sse")
    assert not shows_first_token(b"".join(recorded))
    # The role of a chat is all that is there of a failed one, too, and alone it does not tell.
    alone = [shows_first_token(event) for event in recorded if b"[DONE]" not in event]
    assert alone == [call == "chat", *[False] * (len(alone) - 1)]


class Head:
    """An upstream's answer, of which only headers are read."""

    def __init__(self, encoding: bytes | None) -> None:
        self._headers = {b"content-type": SSE, b"content-encoding": encoding}

    def header(self, name: bytes) -> bytes | None:
        return self._headers[name]


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.decode.sse")), ids=lambda path: path.name)
def test_a_compressed_stream_shows_the_gateway_no_token(path: Path) -> None:
    raw = path.read_bytes()
    assert has_first_token(cast("Response", Head(None)), raw)
    packed = cast("Response", Head(b"gzip"))
    assert not has_first_token(packed, gzip.compress(raw, mtime=0))
    assert not has_first_token(packed, raw), "whatever its bytes look like"
