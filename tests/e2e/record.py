"""Records what two stock vLLM servers answer to the legs of split requests, for tests/contract.

Run with `python tests/e2e/record.py --prefill HOST:PORT --decode HOST:PORT DIRECTORY`. Both servers serve
the model of tiny_model.py as "tiny", with --enable-prompt-tokens-details; the decode server has the
default kv_load_failure_policy, fail. Per call, NAME.KIND.json is a body and NAME.KIND.sse a streamed one:

prefill: of a prefill leg whose prompt has 256 of its tokens in the prefill server's cache.
decode: of a decode leg given that leg's ticket.
bare: the same, its ticket without remote_prefill_cached_tokens: the engine calls all it pulled cached.
failed: of a decode leg whose ticket names an engine that does not exist.
"""

import argparse
import http.client
import json
import random
from pathlib import Path
from typing import Any

PREFIX_CHARACTERS = 256
SUFFIX_CHARACTERS = 44
OUTPUT_TOKENS = 6
TIMEOUT_S = 60.0
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
CHAT_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
CALLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "completions": ("/v1/completions", CHAT_LIMITS),
    "chat": ("/v1/chat/completions", CHAT_LIMITS),
    "responses": ("/v1/responses", ("max_output_tokens",)),
    "messages": ("/v1/messages", ("max_tokens",)),
}

Body = dict[str, Any]


def post(address: str, path: str, body: Body) -> tuple[int, bytes]:
    """Status and body; a streamed body that breaks off counts as far as it came."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        try:
            return response.status, response.read()
        except http.client.IncompleteRead as error:
            return response.status, error.partial
    finally:
        connection.close()


def body_of(name: str, prompt: str) -> Body:
    common: Body = {"model": "tiny", "temperature": 0, "ignore_eos": True}
    messages = [{"role": "user", "content": prompt}]
    match name:
        case "completions":
            return common | {"prompt": prompt, "max_tokens": OUTPUT_TOKENS}
        case "responses":
            return common | {"input": prompt, "max_output_tokens": OUTPUT_TOKENS}
        case _:
            return common | {"messages": messages, "max_tokens": OUTPUT_TOKENS}


def record(name: str, prefill: str, decode: str, directory: Path, rng: random.Random) -> None:
    path, limits = CALLS[name]
    prefix = _text(PREFIX_CHARACTERS, rng)

    def leg() -> tuple[Body, Body, bytes]:
        """A new prompt with the common prefix: its body, its ticket and the prefill leg's answer."""
        body = body_of(name, prefix + _text(SUFFIX_CHARACTERS, rng))
        answer = _expect(
            200, post(prefill, path, body | dict.fromkeys(limits, 1) | {"kv_transfer_params": ASK})
        )
        return body, json.loads(answer)["kv_transfer_params"], answer

    body, ticket, _ = leg()
    _expect(200, post(decode, path, body | {"kv_transfer_params": ticket}))  # Releases the prefix's lease.
    for streamed, suffix in ((False, "json"), (True, "sse")):
        stream: Body = {"stream": True} if streamed else {}
        if streamed and limits is CHAT_LIMITS:
            stream["stream_options"] = {"include_usage": True}
        body, ticket, answer = leg()
        (directory / f"{name}.prefill.json").write_bytes(answer)
        decoded = _expect(200, post(decode, path, body | stream | {"kv_transfer_params": ticket}))
        (directory / f"{name}.decode.{suffix}").write_bytes(decoded)
        body, ticket, _ = leg()
        del ticket["remote_prefill_cached_tokens"]
        bare = _expect(200, post(decode, path, body | stream | {"kv_transfer_params": ticket}))
        (directory / f"{name}.bare.{suffix}").write_bytes(bare)
        body, ticket, _ = leg()
        ticket["remote_engine_id"] = "no-such-engine"
        failed = post(decode, path, body | stream | {"kv_transfer_params": ticket})
        (directory / f"{name}.failed.{suffix}").write_bytes(_expect(200 if streamed else 500, failed))


def _text(characters: int, rng: random.Random) -> str:
    return "".join(chr(rng.randrange(ord("a"), ord("z") + 1)) for _ in range(characters))


def _expect(status: int, answer: tuple[int, bytes]) -> bytes:
    if answer[0] != status:
        raise RuntimeError(f"status is {answer[0]}, expected {status}: {answer[1][:500]!r}")
    return answer[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefill", required=True, metavar="HOST:PORT")
    parser.add_argument("--decode", required=True, metavar="HOST:PORT")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in CALLS:
        record(name, arguments.prefill, arguments.decode, arguments.directory, random.Random(name))


if __name__ == "__main__":
    main()
