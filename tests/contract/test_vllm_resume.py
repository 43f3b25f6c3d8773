"""How vLLM 0.32.0 went on with streams that were cut, spliced to what it had said undisturbed.

The files are a server's own bytes, written by record_resume.py. Streams of the answers that
test_vllm_answers.py reads are cut here too.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pdcoord.resume.continuation import Continuation, Finished, Unresumable, continue_stream
from pdcoord.resume.tape import Shelf, Tape

FOLDER = Path(__file__).parent / "vllm-0.32.0"
DONE = b"data: [DONE]\n\n"


def answer(raw: bytes) -> dict[str, Any]:
    """What a client makes of a stream."""
    assert raw.endswith(DONE)
    chunks = [
        json.loads(each.removeprefix(b"data: ")) for each in raw.removesuffix(DONE).split(b"\n\n") if each
    ]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    (head,) = {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {
        "head": head,
        "text": "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices),
        "ids": [token for choice in choices for token in choice.get("token_ids") or ()],
        "finish": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "roles": [choice["delta"]["role"] for choice in choices if "role" in choice.get("delta", {})],
        "prompts": [c for c in chunks if c.get("prompt_token_ids")]
        + [choice for choice in choices if choice.get("prompt_token_ids")],
        "usage": [tuple(chunk["usage"][name] for name in names) for chunk in chunks if chunk.get("usage")],
        "offsets": [at for each in logprobs for at in each.get("text_offset", ())],
        "tokens": [token for each in logprobs for token in each.get("tokens", ())]
        + [entry["token"] for each in logprobs for entry in each.get("content", ())],
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("resume.*.json")), ids=lambda path: path.name)
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_recorded_continuation_is_the_rest(path: Path, size: int) -> None:
    recorded = json.loads(path.read_text())
    whole, more = recorded["whole"].encode(), recorded["next_answer"].encode()
    body = json.dumps(recorded["body"]).encode()
    passed = whole[: recorded["cut"]]
    goes_on = continue_stream(recorded["path"], body, passed, counted_tokens=recorded["counted_tokens"])
    assert isinstance(goes_on, Continuation)
    assert goes_on.path == recorded["next_path"]
    assert json.loads(goes_on.body) == recorded["next_body"]
    rest = b"".join(goes_on.splice(more[at : at + size]) for at in range(0, len(more), size))
    assert answer(passed + rest) == answer(whole)


BODIES = {
    "/v1/completions": {"prompt": "x" * 300},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize(
    ("name", "path"), [("completions.bare", "/v1/completions"), ("chat.bare", "/v1/chat/completions")]
)
def test_a_recorded_stream_may_be_cut_at_every_byte(name: str, path: str) -> None:
    raw = (FOLDER / f"{name}.sse").read_bytes()
    call = {"model": "tiny", "stream": True, "max_tokens": 6, "stream_options": {"include_usage": True}}
    body = json.dumps(call | BODIES[path] | {"temperature": 0}).encode()
    for cut in range(len(raw) + 1):
        tape = Tape(Shelf(1 << 20, 1 << 20), body)
        passed = tape(raw[:cut])
        tape.begin_again()
        goes_on = continue_stream(path, body, tape.passed)
        if b'"finish_reason":"length"' in passed:
            assert isinstance(goes_on, Finished)
            assert (passed + goes_on.rest).endswith(DONE)
            continue
        # All of its text is bytes that are no character: it comes again, from the same engine as it happens.
        assert isinstance(goes_on, Continuation)
        assert (goes_on.path, json.loads(goes_on.body)) == (path, json.loads(body))
        assert answer(passed + goes_on.splice(raw))["text"] == answer(raw)["text"]


@pytest.mark.parametrize("name", ["messages", "responses"])
def test_other_apis_are_named(name: str) -> None:
    raw = (FOLDER / f"{name}.bare.sse").read_bytes()
    assert continue_stream(f"/v1/{name}", b'{"stream":true}', raw) is Unresumable.API
