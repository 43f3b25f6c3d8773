"""Connector pdcoord with both legs under way: the decode asks by transfer, before there is a ticket."""

from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator_call import read_ticket
from pdcoord.sim.messages import Abort, FailReason, RemoteTicket, RequestFailed, TransferDone

TRANSFER = "0123456789abcdef" * 2
PROMPT = range(1_500)
EARLY = RemoteTicket("", TRANSFER, (), HostPort("p:1"))


def begin(bench: Any, **prefill_settings: Any) -> tuple[Any, Any]:
    producer = bench.start("p", **prefill_settings)
    return producer, bench.start("d", block_tokens=32, handshake_s=0.001, link_bytes_per_s=1e8)


def test_the_decode_waits_for_the_prefill_and_answers_what_it_would_alone(bench: Any) -> None:
    producer, consumer = begin(bench)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=8)
    bench.run(1.0)
    assert bench.tokens("leg-d") == []
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(10.0)
    bench.start("alone")
    bench.submit("alone", "same", PROMPT, output_tokens_max=8)
    bench.run(10.0)
    assert bench.tokens("leg-d") == bench.tokens("same")
    assert bench.done("leg-d").external_tokens == len(PROMPT)
    assert producer.pool.pinned_count == consumer.pool.pinned_count == 0


def test_a_prefill_that_is_done_first_is_found_by_its_transfer(bench: Any) -> None:
    producer, _ = begin(bench)
    bench.prefill("p", "leg-p", PROMPT, transfer=TRANSFER)
    assert producer.pool.pinned_count > 0
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.run(10.0)
    assert bench.done("leg-d").external_tokens == len(PROMPT)
    assert producer.pool.pinned_count == 0
    bench.submit("d", "again", range(1, 1_500), ticket=EARLY, output_tokens_max=2)
    bench.run(10.0)
    assert bench.of(RequestFailed, "again")[0].reason is FailReason.PULL_DENIED


def test_kv_of_earlier_chunks_leaves_while_later_ones_are_computed(bench: Any) -> None:
    _, consumer = begin(bench, step_tokens_max=500, link_bytes_per_s=1e8)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(10.0)
    (moved,) = bench.of(TransferDone, "leg-d")
    bytes_per_token = consumer.settings.kv_bytes_per_token
    # Whole blocks of the last step's tokens at least, and not the whole prompt.
    assert 500 * bytes_per_token <= moved.transfer_bytes < len(PROMPT) * bytes_per_token


def test_a_prefill_that_is_aborted_fails_the_decode_that_waits(bench: Any) -> None:
    begin(bench)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(0.01)
    bench.send("p", Abort("leg-p"))
    bench.run(1.0)
    assert bench.of(RequestFailed, "leg-d")[0].reason is FailReason.PULL_DENIED


@pytest.mark.parametrize("wait_s", [0.0, 0.6])
def test_a_decode_that_goes_away_leaves_nothing_pinned(bench: Any, wait_s: float) -> None:
    producer, consumer = begin(bench, lease_s=3.0)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.run(wait_s)
    bench.send("d", Abort("leg-d"))
    bench.prefill("p", "leg-p", PROMPT, transfer=TRANSFER)
    bench.run(4.0)
    assert producer.pool.pinned_count == consumer.pool.pinned_count == 0


def test_a_leg_that_names_a_transfer_and_no_engine_is_read_as_such() -> None:
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": "p",
        "remote_port": 1,
        "pdcoord": {"version": 1, "transfer": TRANSFER, "nonce": "ab" * 16, "address": "p:1"},
    }
    assert read_ticket(params) == EARLY
    assert read_ticket({**params, "pdcoord": {"transfer": TRANSFER.upper()}}) is None
    assert read_ticket({**params, "pdcoord": None}) is None
