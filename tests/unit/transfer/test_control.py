"""What the machines order is done and told back: whole hand-overs between agents of one process."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transfer.canonical import TokenRange
from transfer.door import Identity
from transfer.errors import FailureKind, SettingError
from transfer.session.vocabulary import Proof, TransferId
from transfer.side_client import ask_probe_now

KEY = b"0123456789abcdef"
TOKENS = 100
WHOLE = TokenRange(0, TOKENS)
Until = Callable[[Callable[[], object]], None]


def kinds(rank: Any) -> list[FailureKind | None]:
    rank.poll()
    return [report.failure and report.failure.kind for report in rank.reports]


def is_same(one: Any, two: Any, tokens: TokenRange = WHOLE) -> bool:
    return bool((one.rows(tokens) == two.rows(tokens)).all())


def test_a_prompt_moves_to_blocks_of_another_size(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(16), world.start(32)
    producer.fill(1)
    producer.prefill(transfer, TOKENS)
    report = consumer.report(consumer.load(producer.agent.address, transfer, TOKENS))
    assert (report.failure, report.loaded_bytes) == (None, producer.rows(WHOLE).nbytes)
    assert is_same(producer, consumer)
    producer.wait_freed(transfer)
    producer.wait_empty()
    consumer.wait_empty()
    told = producer.agent.stats(), consumer.agent.stats()
    assert told[0].packed_bytes == told[1].read_bytes == told[1].unpacked_bytes == report.loaded_bytes
    assert (told[0].offers, told[1].loads, told[0].offer_failures, told[1].load_failures) == (1, 1, {}, {})


def test_a_load_may_come_before_the_prefill_and_is_fed_while_that_runs(
    world: Any, transfer: TransferId, until: Until
) -> None:
    producer, consumer = world.start(), world.start()
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    producer.fill(2)
    producer.open(transfer, TOKENS)
    producer.stage(transfer, 0, 48, TOKENS)
    until(lambda: consumer.agent.stats().unpacked_bytes)
    assert kinds(consumer) == []
    producer.stage(transfer, 48, TOKENS, TOKENS)
    assert consumer.report(request).failure is None
    assert is_same(producer, consumer)


def test_only_what_is_missing_is_moved_and_the_rest_is_left(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(16), world.start(32)
    producer.fill(3)
    producer.prefill(transfer, TOKENS)
    missing = TokenRange(64, TOKENS - 64)
    request = consumer.load(producer.agent.address, transfer, TOKENS, tokens=missing)
    assert consumer.report(request).failure is None
    assert is_same(producer, consumer, missing)
    assert not consumer.rows(TokenRange(0, 64)).any()


def test_a_load_of_nothing_ends_at_once_and_releases_the_producer(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.prefill(transfer, TOKENS)
    request = consumer.load(producer.agent.address, transfer, TOKENS, tokens=TokenRange(TOKENS, 0))
    assert consumer.report(request).failure is None
    producer.wait_empty()


@pytest.mark.parametrize(("producer_count", "consumer_count"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_read_from_the_ranks_that_hold_their_heads(
    world: Any, transfer: TransferId, producer_count: int, consumer_count: int
) -> None:
    engines = Identity("P", "first life"), Identity("D", "first life")
    producers = [world.start(16, ranks=(r, producer_count), engine=engines[0]) for r in range(producer_count)]
    consumers = [world.start(32, ranks=(r, consumer_count), engine=engines[1]) for r in range(consumer_count)]
    for producer in producers:
        producer.agent.set_ranks([p.agent.address for p in producers])
        producer.fill(producer.layout.rank)
        producer.prefill(transfer, TOKENS)
    requests = [c.load(producers[0].agent.address, transfer, TOKENS) for c in consumers]
    assert [c.report(r).failure for c, r in zip(consumers, requests, strict=True)] == [None] * consumer_count
    sent, come = (
        np.concatenate([rank.rows(WHOLE) for rank in side], axis=2) for side in (producers, consumers)
    )
    assert (sent == come).all()
    for rank in (*producers, *consumers):
        rank.wait_empty()


def test_two_producers_feed_one_consumer_at_once(world: Any) -> None:
    producers, consumer = [world.start(8), world.start(32)], world.start(16)
    transfers = [TransferId(f"{number:032x}") for number in range(12)]
    for number, transfer in enumerate(transfers):
        producers[number % 2].prefill(transfer, TOKENS)
    requests = [
        consumer.load(producers[number % 2].agent.address, transfer, TOKENS)
        for number, transfer in enumerate(transfers)
    ]
    assert {consumer.report(request).failure for request in requests} == {None}
    for rank in (*producers, consumer):
        rank.wait_empty()


# What goes wrong.


def test_a_wrong_digest_writes_nothing(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.fill(5)
    world.reads.faults.corrupt_byte = 17
    producer.prefill(transfer, TOKENS)
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    assert consumer.report(request).failure.kind is FailureKind.WRONG_DIGEST
    assert not consumer.memory.any()
    consumer.wait_empty()
    producer.wait_empty()


def test_wrong_proofs_and_old_epochs_are_refused(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.prefill(transfer, TOKENS)
    nonce = bytes.fromhex(transfer)
    for request, more, kind in [
        ("nonce", {"proof": Proof(bytes(16), bytes(16))}, FailureKind.WRONG_NONCE),
        ("prompt", {"proof": Proof(nonce, bytes(16))}, FailureKind.WRONG_PROMPT),
        ("epoch", {"epoch": "of another life"}, FailureKind.STALE_EPOCH),
    ]:
        consumer.load(producer.agent.address, transfer, TOKENS, request=request, **more)
        assert consumer.report(request).failure.kind is kind
    assert not consumer.memory.any()


def test_a_ticket_is_good_once(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.prefill(transfer, TOKENS)
    first = consumer.load(producer.agent.address, transfer, TOKENS, request="first")
    assert consumer.report(first).failure is None
    producer.wait_empty()
    second = consumer.load(producer.agent.address, transfer, TOKENS, request="second")
    assert consumer.report(second).failure.kind is FailureKind.REPLAYED_TICKET


def test_a_lease_that_runs_out_frees_staging_and_is_told(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(lease_s=0.1, transfer_timeout_s=0.05), world.start()
    producer.prefill(transfer, TOKENS)
    producer.wait_freed(transfer)
    producer.wait_empty()
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    assert consumer.report(request).failure.kind is FailureKind.LEASE_EXPIRED


def test_a_producer_that_is_not_there_is_not_dialled_for_each_load(world: Any, transfer: TransferId) -> None:
    consumer = world.start(backoff_first_s=60.0, backoff_max_s=60.0)
    for number in range(5):
        request = consumer.load("127.0.0.1:9", transfer, TOKENS, request=str(number))
        assert consumer.report(request).failure.kind is FailureKind.UNREACHABLE
    assert world.network.dialled == ["127.0.0.1:9"]


def test_reads_that_fail_fail_their_load_only(world: Any) -> None:
    producer, consumer = world.start(), world.start()
    first, second = TransferId("1" * 32), TransferId("2" * 32)
    world.reads.faults.fail_next(1)
    producer.prefill(first, 8)
    request = consumer.load(producer.agent.address, first, 8)
    assert consumer.report(request).failure.kind is FailureKind.READ_FAILED
    producer.prefill(second, 8)
    assert consumer.report(consumer.load(producer.agent.address, second, 8)).failure is None


@pytest.mark.parametrize("side", ["pack", "unpack"])
def test_what_a_device_raises_fails_the_transfer_and_is_not_told(
    world: Any, transfer: TransferId, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    producer, consumer = world.start(), world.start()
    (producer if side == "pack" else consumer).repacker.error = RuntimeError("the prompt was hello")
    producer.prefill(transfer, TOKENS)
    report = consumer.report(consumer.load(producer.agent.address, transfer, TOKENS))
    expected = FailureKind.PACK_FAILED if side == "pack" else FailureKind.UNPACK_FAILED
    assert report.failure.kind is expected
    assert "RuntimeError" in report.failure.detail
    assert "hello" not in report.failure.detail
    assert any(record.levelname == "WARNING" for record in caplog.records)
    producer.wait_freed(transfer)
    producer.wait_empty()
    consumer.wait_empty()


def test_an_abort_frees_the_blocks_and_fails_the_reader(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    producer.open(transfer, TOKENS)
    producer.stage(transfer, 0, 32, TOKENS)
    producer.agent.abort(transfer)
    assert consumer.report(request).failure.kind is FailureKind.PREFILL_ABORTED
    producer.wait_freed(transfer)
    producer.wait_empty()


def test_a_cancelled_load_is_reported_when_nothing_writes_any_more(
    world: Any, transfer: TransferId, until: Until
) -> None:
    producer, consumer = world.start(), world.start()
    consumer.repacker.may_unpack.clear()
    producer.prefill(transfer, TOKENS)
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    until(lambda: consumer.repacker.unpacking_count)
    consumer.agent.cancel(request)
    assert consumer.agent.wait_packed([request], 10.0)  # Passes behind the cancel.
    assert kinds(consumer) == []
    consumer.repacker.may_unpack.set()
    assert consumer.report(request).failure.kind is FailureKind.CANCELLED


def test_a_lost_peer_fails_what_is_read_from_it_and_lands_nowhere(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.prefill(transfer, TOKENS)
    world.reads.faults.lose_after_bytes = 100
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    assert consumer.report(request).failure.kind is FailureKind.PEER_LOST
    assert not consumer.memory.any()
    consumer.wait_empty()


def test_a_producer_that_stops_fails_its_loads_and_is_found_again(world: Any, until: Until) -> None:
    producer, consumer = world.start(port=45_000), world.start(backoff_first_s=0.01, backoff_max_s=0.02)
    first, second = TransferId("1" * 32), TransferId("2" * 32)
    request = consumer.load(producer.agent.address, first, TOKENS)
    producer.open(first, TOKENS)
    producer.stage(first, 0, 32, TOKENS)
    until(lambda: consumer.agent.stats().unpacked_bytes)
    producer.agent.close()
    assert consumer.report(request).failure.kind in {FailureKind.PEER_LOST, FailureKind.CLOSED}
    again = world.start(port=45_000)
    again.prefill(second, TOKENS)
    ended: list[Any] = []

    def is_loaded() -> bool:
        name = consumer.load(again.agent.address, second, TOKENS, request=f"try {len(ended)}")
        ended.append(consumer.report(name).failure)
        return ended[-1] is None

    until(is_loaded)
    consumer.wait_empty()
    again.wait_empty()


# What the engine waits for.


def test_blocks_that_are_about_to_be_read_are_waited_for(
    world: Any, transfer: TransferId, until: Until
) -> None:
    producer = world.start()
    producer.repacker.may_pack.clear()
    producer.prefill(transfer, TOKENS)
    until(lambda: producer.repacker.packing_count)
    assert not producer.agent.wait_packed([transfer], 0.02)
    assert producer.agent.wait_packed(["another"], 10.0)
    producer.repacker.may_pack.set()
    assert producer.agent.wait_packed([transfer], 10.0)


def test_packing_waits_for_the_engines_writes(world: Any, transfer: TransferId) -> None:
    producer = world.start()
    ready, asked = threading.Event(), threading.Event()

    def wait_for_writes() -> None:
        asked.set()
        assert ready.wait(10)

    producer.open(transfer, TOKENS)
    producer.stage(transfer, 0, TOKENS, TOKENS, ready=wait_for_writes)
    assert asked.wait(10)
    assert producer.agent.stats().packed_bytes == 0
    ready.set()
    producer.wait_freed(transfer)


# Probes.


def probe(rank: Any, address: str, timeout_s: float = 10.0) -> Any:
    return rank.agent.probe(address, timeout_s).result(20)


@pytest.mark.parametrize(("wanted", "is_degraded"), [((), False), (("rc", "LOOP"), False), (("rc",), True)])
def test_a_probe_tells_the_way_and_how_fast_it_is(
    world: Any, wanted: tuple[str, ...], *, is_degraded: bool
) -> None:
    producer, consumer = world.start(16), world.start(32, transports=wanted)
    told = probe(consumer, producer.agent.address)
    assert (told.failure, told.verdict, told.backend) == ("", "regroup", "loopback")
    assert (told.transport, told.is_degraded) == ("loopback", is_degraded)
    assert min(told.latency_s, told.bytes_per_s) > 0
    assert told.epoch
    assert producer.agent.stats().staging_used_bytes == consumer.agent.stats().staging_used_bytes == 0


def test_probes_that_fail_say_how_and_the_next_is_right(world: Any) -> None:
    producer, consumer = world.start(), world.start(backoff_first_s=0.01, backoff_max_s=0.01)
    faults = world.reads.faults
    for fault, kind in [
        (lambda: setattr(faults, "corrupt_byte", 5), "wrong-digest"),
        (lambda: faults.fail_next(1), "read-failed"),
        (lambda: setattr(faults, "delay_s", 30.0), "transfer-timeout"),
        (lambda: setattr(faults, "lose_after_bytes", 10), "peer-lost"),
    ]:
        fault()
        assert probe(consumer, producer.agent.address, 0.1 if faults.delay_s else 10.0).failure == kind
        faults.delay_s = 0.0
        if kind != "peer-lost":
            assert probe(consumer, producer.agent.address).failure == ""
    assert probe(consumer, "127.0.0.1:9").failure == "unreachable"


def test_many_probes_at_once_all_end(world: Any) -> None:
    producer, consumer = world.start(), world.start()
    futures = [consumer.agent.probe(producer.agent.address, 10.0) for _ in range(100)]
    told = [future.result(20).failure for future in futures]
    assert set(told) <= {"", "overloaded"}
    assert told.count("") >= 10


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_closing_agent_leaves_no_probe_open(world: Any, *, is_reading: bool) -> None:
    producer, consumer = world.start(), world.start()
    if is_reading:
        assert probe(consumer, producer.agent.address).failure == ""
    world.reads.faults.delay_s = 30.0
    future = consumer.agent.probe(producer.agent.address, 60.0)
    consumer.agent.close()
    assert future.result(10).failure
    assert probe(consumer, producer.agent.address).failure == "closed"


@pytest.mark.parametrize("key", [b"", KEY])
def test_an_agent_probes_for_its_sidecar(world: Any, key: bytes) -> None:
    producer, own = world.start(16, key=key), world.start(32, key=key)
    told = ask_probe_now(own.agent.address, producer.agent.address, key, 10.0)
    assert (told.failure, told.verdict, told.address) == ("", "regroup", producer.agent.address)
    told = ask_probe_now(own.agent.address, "127.0.0.1:9", key, 10.0)
    assert told.failure == "unreachable"
    assert "own agent" not in told.detail
    told = ask_probe_now(own.agent.address, "127.0.0.1:9", b"another key of it", 10.0)
    assert told.failure == "not-authenticated"
    assert told.detail.startswith("own agent")


def test_without_a_key_only_this_host_may_ask(world: Any) -> None:
    producer, own = world.start(), world.start(advertise_host="10.0.0.1")
    own_address = f"127.0.0.1:{own.agent.address.rpartition(':')[2]}"
    world.network.dialler_host = "10.0.0.9"
    told = ask_probe_now(own_address, producer.agent.address, b"", 10.0)
    assert told.failure
    assert producer.agent.address not in world.network.dialled


# Strangers.


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=120), is_framed=st.booleans())
def test_hostile_bytes_get_a_refusal_at_most(world: Any, data: bytes, *, is_framed: bool) -> None:
    rank = world.ranks[0] if world.ranks else world.start()

    async def say() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(rank.agent.address.split(":")[1]))
        writer.write(len(data).to_bytes(4, "big") + data if is_framed else data)
        writer.write_eof()
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        return answer

    assert b"welcome" not in asyncio.run(say())


def test_an_agent_works_on_after_strangers(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()

    async def say(words: bytes) -> None:
        port = int(producer.agent.address.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(words)
        writer.close()

    for words in (b"", b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1\0", b"\0\0\1"):
        asyncio.run(say(words))
    producer.prefill(transfer, TOKENS)
    assert consumer.report(consumer.load(producer.agent.address, transfer, TOKENS)).failure is None


# The end.


def test_close_ends_everything_that_is_under_way(world: Any, transfer: TransferId, until: Until) -> None:
    producer, consumer = world.start(), world.start()
    producer.open(transfer, TOKENS)
    producer.stage(transfer, 0, 32, TOKENS)
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    until(lambda: consumer.agent.stats().unpacked_bytes)
    consumer.agent.close()
    consumer.agent.close()
    producer.agent.close()
    assert consumer.report(request).failure.kind is FailureKind.CLOSED
    producer.wait_freed(transfer)


def test_what_is_asked_of_a_closed_agent_ends_too(world: Any, transfer: TransferId) -> None:
    rank = world.start()
    rank.agent.close()
    request = rank.load("127.0.0.1:9", transfer, TOKENS)
    assert rank.report(request).failure.kind is FailureKind.CLOSED
    rank.prefill(transfer, TOKENS)
    rank.wait_freed(transfer)
    rank.agent.abort(transfer)
    rank.agent.cancel(request)
    assert rank.agent.wait_packed([transfer], 10.0)
    rank.poll()
    assert (len(rank.reports), rank.free.count(transfer)) == (1, 1)


def test_ends_come_once(world: Any, transfer: TransferId) -> None:
    producer, consumer = world.start(), world.start()
    producer.prefill(transfer, TOKENS)
    request = consumer.load(producer.agent.address, transfer, TOKENS)
    consumer.report(request)
    producer.wait_freed(transfer)
    consumer.agent.cancel(request)
    producer.agent.abort(transfer)
    for rank in (producer, consumer):
        rank.agent.close()
        rank.poll()
    assert (len(consumer.reports), producer.free) == (1, [transfer])


def test_a_port_that_is_taken_is_named(world: Any) -> None:
    port = int(world.start().agent.address.rpartition(":")[2])
    with pytest.raises(SettingError) as caught:
        world.start(port=port)
    assert caught.value.field == "port"
