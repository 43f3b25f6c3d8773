"""What goes wrong ends in a good answer, by computing here what did not come, and leaks nothing."""

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

PREFILL, DECODE = "bf16-32", "bf16-128"
NOBODY = "127.0.0.1:9"


def replaced(ticket: dict[str, Any], **members: Any) -> dict[str, Any]:
    return ticket | {"pdcoord": ticket["pdcoord"] | members}


Change = Callable[[dict[str, Any]], dict[str, Any]]
CHANGES: dict[str, tuple[Change, str]] = {
    "nobody there": (lambda t: replaced(t, address=NOBODY), "unreachable"),
    "another nonce": (lambda t: replaced(t, nonce="0" * 32), "wrong-nonce"),
    "another epoch": (lambda t: replaced(t, epoch="of-another-life"), "stale-epoch"),
    "unknown transfer": (lambda t: replaced(t, transfer="0" * 32), ""),
    "no transfer": (lambda t: replaced(t, transfer=None), "malformed"),
    "no key of ours": (lambda t: {n: v for n, v in t.items() if n != "pdcoord"}, "malformed"),
    "another length": (lambda t: t | {"remote_num_tokens": 7}, "wrong-prompt"),
    "only the flag": (lambda _: {"do_remote_prefill": True}, "malformed"),
}


@pytest.fixture
def pair(servers: Any) -> tuple[Any, Any]:
    prefill, decode = servers.up(PREFILL, DECODE)
    return prefill, decode


@pytest.mark.parametrize("case", CHANGES)
def test_a_ticket_that_is_not_right_is_served_here(
    pair: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any, case: str
) -> None:
    prefill, decode = pair
    change, kind = CHANGES[case]
    prompt = words.prompt(300)
    ticket = change(hand_over.ticket(prefill, prompt))
    failed = decode.failures(kind)
    answer = decode.complete(prompt, kv_transfer_params=ticket)
    assert is_right(read_tokens(answer), decode, prompt)
    assert decode.failures(kind) == failed + 1


def test_a_ticket_does_not_open_another_prompt(
    pair: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any
) -> None:
    prefill, decode = pair
    ticket = hand_over.ticket(prefill, words.prompt(300))
    prompt = words.prompt(300)
    failed = decode.failures("wrong-prompt")
    assert is_right(read_tokens(decode.complete(prompt, kv_transfer_params=ticket)), decode, prompt)
    assert decode.failures("wrong-prompt") == failed + 1


def test_a_ticket_works_once(pair: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any) -> None:
    prefill, decode = pair
    prompt = words.prompt(300)
    ticket = hand_over.ticket(prefill, prompt)
    failed = decode.failures()
    assert is_right(
        read_tokens(decode.complete(prompt, kv_transfer_params=ticket, cache_salt="a")), decode, prompt
    )
    assert decode.failures() == failed
    assert is_right(
        read_tokens(decode.complete(prompt, kv_transfer_params=ticket, cache_salt="b")), decode, prompt
    )
    assert decode.failures() == failed + 1


def leave(server: Any, body: dict[str, Any]) -> None:
    """Send a request and hang up without waiting for an answer."""
    connection = http.client.HTTPConnection(server.engine.address, timeout=10)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    connection.sock.close()


def test_clients_that_leave_free_everything(pair: Any, hand_over: Any, words: Any, wait: Any) -> None:
    prefill, decode = pair
    common = {"model": "tiny", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    for index in range(6):
        prompt = words.prompt(300 + 150 * index)
        asking = {"do_remote_decode": True, "do_remote_prefill": False}
        leave(prefill, common | {"prompt": prompt, "kv_transfer_params": asking})
        ticket = hand_over.ticket(prefill, prompt)
        leave(decode, common | {"prompt": prompt, "kv_transfer_params": ticket})
        # Waits for a producer that never comes, so that the abort meets a load.
        leave(
            decode,
            common | {"prompt": prompt, "kv_transfer_params": replaced(ticket, transfer=f"{index:032x}")},
        )
    for server in pair:
        wait(lambda server=server: server.used_blocks == 0, 60, "all blocks are free")
        wait(lambda server=server: server.engine.counter("vllm:num_requests_running") == 0, 60, "idle")
        server.complete("Still there.", max_tokens=1)


@pytest.mark.timeout(600, func_only=True)  # A server is started in it.
def test_a_killed_producer_and_its_successor_at_the_same_port(
    servers: Any,
    pair: Any,
    hand_over: Any,
    words: Any,
    read_tokens: Any,
    is_right: Any,
    threads: Any,
    wait: Any,
) -> None:
    prefill, decode = pair
    prompts = [words.prompt(200 + 100 * index) for index in range(6)]
    tickets = [hand_over.ticket(prefill, prompt) for prompt in prompts]
    assert read_tokens(decode.complete(prompts[0], kv_transfer_params=tickets[0], cache_salt="x"))

    def serve(index: int) -> list[int]:
        if index == 3:
            prefill.engine.process.kill()
        return read_tokens(decode.complete(prompts[index], kv_transfer_params=tickets[index]))

    served = threads(serve, range(1, len(prompts)))
    assert all(is_right(tokens, decode, prompt) for tokens, prompt in zip(served, prompts[1:], strict=True))
    wait(lambda: decode.used_blocks == 0, 60, "all blocks are free")

    del servers.running[PREFILL]
    servers.start([PREFILL], {PREFILL: prefill.kv_port})
    successor = servers.running[PREFILL]
    failed = decode.failures("stale-epoch")
    late = decode.complete(prompts[4], kv_transfer_params=tickets[4], cache_salt="y")
    assert is_right(read_tokens(late), decode, prompts[4])
    assert decode.failures("stale-epoch") == failed + 1
    prompt = words.prompt(700)
    pulled = decode.engine.pulled_tokens
    split = hand_over.one_after_the_other(successor, decode, prompt)
    assert is_right(read_tokens(split), decode, prompt)
    assert decode.engine.pulled_tokens - pulled == 700
