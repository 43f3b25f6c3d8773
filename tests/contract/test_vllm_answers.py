"""What vLLM 0.32.0 answered to prefill and decode legs, read by the code that has to understand it.

The bytes under vllm-0.32.0 are a server's own, recorded by tests/e2e/record.py; its docstring says what
each file is. Prompts had 300 tokens (317 with the chat template), 256 of them in the prefill server's
cache; the decode engine pulled all of them, and generated 6.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.tickets import decode_prefill_answer
from pdcoord.resume.opening import Opening, Seen
from sidecar.usage import UsageRewriter

FOLDER = Path(__file__).parent / "vllm-0.32.0"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
CACHED_TOKENS = 256

every_call = pytest.mark.parametrize("call", PATHS)
every_cut = pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])


def recorded(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def events(raw: bytes) -> list[bytes]:
    return [block + b"\n\n" for block in raw.split(b"\n\n") if block]


def usages(raw: bytes) -> list[dict[str, Any]]:
    """Every usage of an answer, whole or streamed, in order."""
    if raw.startswith(b"{"):
        documents = [json.loads(raw)]
    else:
        data = [line.removeprefix(b"data: ") for line in raw.splitlines() if line.startswith(b"data: {")]
        documents = [json.loads(line) for line in data]
    found = [
        holder.get("usage")
        for d in documents
        for holder in (d, d.get("response"), d.get("message"))
        if holder
    ]
    return [usage for usage in found if usage]


def cached_tokens(usage: dict[str, Any]) -> int | None:
    for name in ("prompt_tokens_details", "input_tokens_details"):
        if name in usage:
            return int(usage[name]["cached_tokens"])
    return usage.get("cache_read_input_tokens")


def rewritten(call: str, raw: bytes, chunk_bytes: int) -> bytes:
    rewriter = UsageRewriter(PATHS[call], CACHED_TOKENS)
    return b"".join(rewriter.feed(piece) for piece in pieces(raw, chunk_bytes)) + rewriter.finish()


@every_call
def test_a_prefill_answer_gives_its_ticket_to_the_byte(call: str) -> None:
    raw = recorded(f"{call}.prefill.json")
    answer = decode_prefill_answer(raw)
    assert answer.ticket is not None
    assert bytes(answer.ticket) in raw
    ticket = json.loads(answer.ticket)
    assert ticket == json.loads(raw)["kv_transfer_params"]
    assert ticket["do_remote_prefill"] is True
    assert len(ticket["remote_block_ids"][0]) == 3
    assert answer.cached_tokens == CACHED_TOKENS


@every_call
@pytest.mark.parametrize("kind", ["decode", "bare"])
def test_a_decode_answer_has_no_ticket(call: str, kind: str) -> None:
    assert decode_prefill_answer(recorded(f"{call}.{kind}.json")).ticket is None


@every_call
@pytest.mark.parametrize("suffix", ["json", "sse"])
def test_an_engine_that_is_told_reports_what_the_prefill_engine_had_cached(call: str, suffix: str) -> None:
    last = usages(recorded(f"{call}.decode.{suffix}"))[-1]
    assert cached_tokens(last) == CACHED_TOKENS
    assert cached_tokens(usages(recorded(f"{call}.bare.{suffix}"))[-1]) in {300, 317}


@every_call
@every_cut
@pytest.mark.parametrize("suffix", ["json", "sse"])
def test_usage_is_rewritten_to_what_the_prefill_engine_had_cached(
    call: str, suffix: str, chunk_bytes: int
) -> None:
    bare = recorded(f"{call}.bare.{suffix}")
    told = usages(recorded(f"{call}.decode.{suffix}"))
    assert usages(rewritten(call, bare, chunk_bytes)) == told


@every_call
@every_cut
@pytest.mark.parametrize("suffix", ["json", "sse"])
def test_rewriting_changes_no_other_byte(call: str, suffix: str, chunk_bytes: int) -> None:
    told = recorded(f"{call}.decode.{suffix}")
    assert rewritten(call, told, chunk_bytes) == told


@every_call
@every_cut
def test_a_stream_whose_pull_went_well_shows_output(call: str, chunk_bytes: int) -> None:
    opening = Opening(EVENT_STREAM)
    seen = [opening.feed(piece) for piece in pieces(recorded(f"{call}.decode.sse"), chunk_bytes)]
    assert Seen.OUTPUT in seen
    assert Seen.ERROR not in seen[: seen.index(Seen.OUTPUT)]


@every_call
@every_cut
def test_a_stream_whose_pull_failed_shows_no_output(call: str, chunk_bytes: int) -> None:
    """The engine sends its 200 before it pulls, and may send events before it knows that the pull failed."""
    opening = Opening(EVENT_STREAM)
    seen = Seen.NOTHING
    for piece in pieces(recorded(f"{call}.failed.sse"), chunk_bytes):
        seen = opening.feed(piece)
        if seen is not Seen.NOTHING:
            break
    if call == "responses":  # vLLM only breaks the stream off.
        assert seen is Seen.NOTHING
        assert opening.end() is not Seen.OUTPUT
    else:
        assert seen is Seen.ERROR


@every_call
def test_output_is_seen_at_the_first_event_that_has_some(call: str) -> None:
    """Holding back more than that would cost time to the first token."""
    opening = Opening(EVENT_STREAM)
    for event in events(recorded(f"{call}.decode.sse")):
        if opening.feed(event) is Seen.OUTPUT:
            break
    else:
        pytest.fail("no output was seen")
    first = {
        "completions": b'"choices":[{"index":0,"text":',
        "chat": b'"delta":{"content":',
        "responses": b"event: response.output_item.added",
        "messages": b"event: content_block_start",
    }[call]
    assert first in event
