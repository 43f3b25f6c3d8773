"""What recorded streams of vLLM 0.32.0 show before their first token, cut anywhere."""

from pathlib import Path

import pytest

from sidecar.opening import Opening, Seen

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
