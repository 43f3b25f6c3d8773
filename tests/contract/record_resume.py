"""Writes down how a vLLM server goes on with streams that were cut, one JSON file for each call.

    .venv/bin/python tests/contract/record_resume.py 127.0.0.1:8000 tests/contract/vllm-0.32.0

The server has the model of tests/e2e/tiny_model.py under the name "tiny"; its random weights make bytes that
are no character unless they are told not to. A file holds the call, its whole answer, where that was cut,
and the call and the answer that went on from there.
"""

import http.client
import json
import sys
from pathlib import Path
from typing import Any

from pdcoord.resume.continuation import Continuation, continue_stream, count_request

TIMEOUT_S = 120
PROMPT = "The quick brown fox jumps over the lazy dog. "
COMMON = {"model": "tiny", "stream": True, "temperature": 0, "ignore_eos": True, "max_tokens": 24}
USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
COMPLETION = ("/v1/completions", COMMON | {"prompt": PROMPT})
CHAT = ("/v1/chat/completions", COMMON | {"messages": [{"role": "user", "content": PROMPT}]})


def calls(letters: list[int]) -> dict[str, tuple[str, dict[str, Any]]]:
    # The token that ends an output is none of them, and would have no text.
    readable = {"allowed_token_ids": letters, "ignore_eos": False}
    ids = {"return_token_ids": True}
    return {
        "completions.ids": (COMPLETION[0], COMPLETION[1] | USAGE | ids),
        "completions.text": (COMPLETION[0], COMPLETION[1] | CONTINUOUS | readable),
        "completions.logprobs": (COMPLETION[0], COMPLETION[1] | USAGE | ids | readable | {"logprobs": 1}),
        "chat.ids": (CHAT[0], CHAT[1] | USAGE | ids),
        "chat.text": (CHAT[0], CHAT[1] | USAGE | readable),
        "chat.logprobs": (CHAT[0], CHAT[1] | USAGE | readable | {"logprobs": True, "top_logprobs": 1}),
    }


def post(address: str, path: str, body: bytes) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path} answered {response.status}: {raw.decode()}")
    return raw


def record(address: str, path: str, call: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps(call).encode()
    whole = post(address, path, body)
    ends = [at + 2 for at in range(len(whole)) if whole.startswith(b"\n\n", at)]
    cut = ends[len(ends) // 2]
    asked = count_request(path, body, whole[:cut])
    count = None if asked is None else json.loads(post(address, "/tokenize", asked))["count"]
    goes_on = continue_stream(path, body, whole[:cut], counted_tokens=count)
    if not isinstance(goes_on, Continuation):
        raise SystemExit(f"{path} does not go on: {goes_on}")
    return {
        "path": path,
        "body": call,
        "whole": whole.decode(),
        "cut": cut,
        "counted_tokens": count,
        "next_path": goes_on.path,
        "next_body": json.loads(goes_on.body),
        "next_answer": post(address, goes_on.path, goes_on.body).decode(),
    }


def main() -> None:
    address, folder = sys.argv[1], Path(sys.argv[2])
    asked = {"model": "tiny", "prompt": "abcdefghij klmno.", "add_special_tokens": False}
    letters = json.loads(post(address, "/tokenize", json.dumps(asked).encode()))["tokens"]
    for name, (path, call) in calls(letters).items():
        recorded = record(address, path, call)
        text = json.dumps(recorded, indent=1, ensure_ascii=False)
        (folder / f"resume.{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
