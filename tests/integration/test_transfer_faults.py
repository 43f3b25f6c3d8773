"""Faults between agents in processes of their own: each ends by name, once, with nothing left held."""

import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from transfer.errors import FailureKind
from transfer.layout import GroupShape, KvLayout
from transfer.session.frames import Channel
from transfer.session.messages import VERSION, Hello, Refusal

Ranks = Callable[..., Any]

GROUP = (GroupShape(2, 4, 64, 64),)
LAYOUT = KvLayout(16)
TOKENS = 96
BIG_TOKENS = 8_192
"""32 MiB in one part: a read takes long enough to be in the middle of."""
BIG = {"staging_bytes": 128 << 20, "chunk_tokens_max": BIG_TOKENS, "transfer_timeout_s": 5.0}
QUICK = {"heartbeat_s": 0.5, "handshake_timeout_s": 0.5, "backoff_first_s": 0.05, "backoff_max_s": 30.0}
_names = itertools.count()


def new_proof() -> dict[str, str]:
    return {"transfer": secrets.token_hex(16), "nonce": secrets.token_hex(16), "hash": secrets.token_hex(16)}


def offer(producer: Any, tokens: int = TOKENS, *, is_staged: bool = True) -> dict[str, str]:
    """A prompt's KV stands ready at a producer; what a ticket says of it."""
    proof, blocks = new_proof(), list(range(1, 1 + -(-tokens // 16)))
    producer.ask("open", request=f"prefill-{next(_names)}", tokens=tokens, **proof)
    if is_staged:
        producer.ask("stage", first=0, count=tokens, blocks=blocks, is_last=True, **proof)
    return proof


def load(
    consumer: Any,
    address: str,
    proof: dict[str, str],
    tokens: int = TOKENS,
    *,
    epoch: str = "",
    wait_s: float = 5.0,
) -> str:
    request, blocks = f"decode-{next(_names)}", list(range(1, 1 + -(-tokens // 16)))
    order = {"request": request, "tokens": tokens, "first": 0, "blocks": blocks, "wait_s": wait_s}
    consumer.ask("load", address=address, epoch=epoch, **order, **proof)
    return request


def pair(rank_process: Ranks, blocks: int = 64, **settings: Any) -> tuple[Any, Any]:
    first = rank_process(LAYOUT, GROUP, blocks=blocks, settings=QUICK | settings)
    return first, rank_process(LAYOUT, GROUP, blocks=blocks, settings=QUICK | settings)


def works(producer: Any, consumer: Any) -> None:
    """A transfer now ends well, and then nothing is held."""
    request = load(consumer, producer.address, offer(producer), epoch=producer.epoch)
    assert consumer.report(request) == ""
    consumer.drained()
    producer.drained()


@pytest.mark.parametrize("kind", ["tcp", "nixl"])
def test_a_producer_killed_in_the_middle_of_a_read(rank_process: Ranks, kind: str) -> None:
    settings = QUICK | BIG
    producer = rank_process(LAYOUT, GROUP, kind=kind, blocks=520, settings=settings)
    consumer = rank_process(LAYOUT, GROUP, kind=kind, blocks=520, settings=settings)
    other = rank_process(LAYOUT, GROUP, kind=kind, settings=settings)
    proof = offer(producer, BIG_TOKENS)
    consumer.ask("kill_at_read", pid=producer.process.pid)
    request = load(consumer, producer.address, proof, BIG_TOKENS)
    assert consumer.report(request) in {"peer-lost", "read-failed"}
    assert producer.process.wait() == -9
    assert consumer.drained()["loads"] == 1
    works(other, consumer)


def test_a_consumer_killed_in_the_middle_of_a_read(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process, blocks=520, **BIG, lease_s=6.0)
    other = rank_process(LAYOUT, GROUP, settings=QUICK)
    proof = offer(producer, BIG_TOKENS)
    consumer.ask("kill_at_read", pid=0)
    with pytest.raises(AssertionError, match="ended with -9"):
        request = load(consumer, producer.address, proof, BIG_TOKENS)
        consumer.report(request)
    stats = producer.drained()
    assert stats["offer_failures"] == {"lease-expired": 1}
    works(producer, other)


def test_a_restart_on_the_same_port(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process, backoff_first_s=30.0)
    works(producer, consumer)
    stale, stale_epoch = offer(producer), producer.epoch
    producer.kill()
    # The first may still meet the connection that is just ending; then the address is backed off from.
    ends = [consumer.report(load(consumer, producer.address, new_proof())) for _ in range(4)]
    assert ends[1:] == ["unreachable"] * 3
    assert any("not tried again yet" in detail for _, detail in consumer.ask("poll")["reports"].values())
    port = int(producer.address.rpartition(":")[2])
    again = rank_process(LAYOUT, GROUP, settings=QUICK | {"port": port})
    works(again, consumer)  # At once: the new epoch in the ticket says that it is there again.
    request = load(consumer, again.address, stale, epoch=stale_epoch)
    assert consumer.report(request) == "stale-epoch"
    request = load(consumer, again.address, stale, wait_s=0.3)
    assert consumer.report(request) in {"unknown-transfer", "transfer-timeout"}
    works(again, consumer)


def test_a_ticket_is_good_once_and_only_with_its_proof(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process)
    proof = offer(producer)
    cases = (("nonce", "wrong-nonce"), ("hash", "wrong-prompt"))
    for field, kind in cases:
        wrong = proof | {field: secrets.token_hex(16)}
        assert consumer.report(load(consumer, producer.address, wrong)) == kind
    assert consumer.report(load(consumer, producer.address, proof)) == ""
    producer.drained()
    assert consumer.report(load(consumer, producer.address, proof)) == "replayed-ticket"
    works(producer, consumer)


def test_a_lease_that_ran_out(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process, lease_s=0.4, transfer_timeout_s=0.2)
    proof = offer(producer)
    ended = producer.until("stats", lambda told: told["offers"] == 1)
    assert ended["offer_failures"] == {"lease-expired": 1}
    producer.drained()
    assert consumer.report(load(consumer, producer.address, proof)) == "lease-expired"
    assert len(producer.ask("poll")["free"]) == 1


def test_staging_that_could_never_hold_a_prompt(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process, blocks=520, staging_bytes=1 << 20)
    proof = offer(producer, BIG_TOKENS)
    assert consumer.report(load(consumer, producer.address, proof, BIG_TOKENS)) == "staging-full"
    assert producer.until("stats", lambda told: told["offers"] == 1)["offer_failures"] == {"staging-full": 1}
    works(producer, consumer)


def test_aborted_and_cancelled_at_every_stage(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process)
    # Before the consumer came.
    proof = offer(producer, is_staged=False)
    producer.ask("abort", **proof)
    assert consumer.report(load(consumer, producer.address, proof)) == "prefill-aborted"
    # While the consumer waits, before and after a first chunk.
    for count in (0, 32):
        proof = offer(producer, is_staged=False)
        request = load(consumer, producer.address, proof)
        if count:
            producer.ask("stage", first=0, count=count, blocks=[1, 2, 3, 4, 5, 6], is_last=False, **proof)
            before = consumer.ask("stats")["read_bytes"]
            consumer.until("stats", lambda told, before=before: told["read_bytes"] > before)
        producer.ask("abort", **proof)
        assert consumer.report(request) == "prefill-aborted"
    # The consumer gives up: while it connects, while it waits, and of what it never asked.
    for is_settled in (False, True):
        proof = offer(producer, is_staged=False)
        request = load(consumer, producer.address, proof)
        if is_settled:
            consumer.until("stats", lambda told: told["staging_used_bytes"] == 0)
        consumer.ask("cancel", request=request)
        assert consumer.report(request) == "cancelled"
        producer.ask("abort", **proof)
    consumer.ask("cancel", request="nobody")
    works(producer, consumer)
    assert producer.ask("stats")["offers"] == 6
    producer.until("poll", lambda told: len(set(told["free"])) == 6)


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def test_nobody_there_and_somebody_else_there(rank_process: Ranks, dead: str, deaf: str) -> None:
    producer, consumer = pair(rank_process)
    for address, kind in ((dead, "unreachable"), (deaf, "handshake-timeout"), ("no address", "unreachable")):
        assert consumer.report(load(consumer, address, new_proof())) == kind
        told = consumer.ask("probe", address=address, timeout_s=3.0)
        assert told["failure"] == kind
        assert told["verdict"] == ""
    works(producer, consumer)


def test_an_impossible_pair_is_refused_with_its_verdict(rank_process: Ranks) -> None:
    producer = rank_process(LAYOUT, GROUP, settings=QUICK)
    consumer = rank_process(LAYOUT, (GroupShape(3, 4, 64, 64),), settings=QUICK)
    assert consumer.report(load(consumer, producer.address, new_proof())) == "impossible-layout"
    told = consumer.ask("probe", address=producer.address, timeout_s=3.0)
    assert (told["failure"], told["verdict"]) == ("impossible-layout", "impossible")


def key_file(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return {"key_file": str(path)}


def test_keys_must_be_the_same_on_both_sides(rank_process: Ranks, tmp_path: Path) -> None:
    keys = {name: key_file(tmp_path, name) for name in ("one", "other")} | {"none": {}}
    sides = {
        name: (
            rank_process(LAYOUT, GROUP, settings=QUICK | key),
            rank_process(LAYOUT, GROUP, settings=QUICK | key),
        )
        for name, key in keys.items()
    }
    for (ours, (_, consumer)), (theirs, (producer, _)) in itertools.product(sides.items(), sides.items()):
        if ours == theirs:
            works(producer, consumer)
        else:
            request = load(consumer, producer.address, new_proof())
            assert consumer.report(request) == "not-authenticated", (ours, theirs)


def dialled(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 20.0)


def said(connection: socket.socket) -> bytes:
    """All that the other side says until it closes."""
    data = b""
    try:
        while more := connection.recv(65_536):
            data += more
    except ConnectionResetError:
        pass
    return data


def hostile() -> Iterator[bytes]:
    yield b""
    yield b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
    yield b"\xff\xff\xff\xff" + bytes(64)
    yield (1 << 20).to_bytes(4, "big") + b"\0half"
    yield (0).to_bytes(4, "big")
    nonce = bytes(range(16))
    hello = Channel(b"", nonce, is_dialler=True).encode(
        Hello(version=VERSION, nonce=nonce, engine_id="x", epoch="y", layout={"layout": []})
    )
    yield hello
    yield hello[: len(hello) // 2]
    yield hello + hello
    yield from (secrets.token_bytes(size) for size in (1, 5, 300, 70_000))


def test_hostile_bytes_are_bounded_in_time_and_change_nothing(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process)
    before = producer.ask("usage")["fds"]
    for words in hostile():
        begun_s = time.monotonic()
        with closing(dialled(producer.address)) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(words)
            said(connection)
        assert time.monotonic() - begun_s < 15.0, "the agent ends it, not this side's timeout"
    works(producer, consumer)
    producer.until("usage", lambda told: told["fds"] <= before + 8)


def test_another_version_is_told_so(rank_process: Ranks) -> None:
    producer = rank_process(LAYOUT, GROUP, settings=QUICK)
    nonce = secrets.token_bytes(16)
    channel = Channel(b"", nonce, is_dialler=True)
    hello = Hello(version=VERSION + 1, nonce=nonce, engine_id="x", epoch="y")
    with closing(dialled(producer.address)) as connection:
        connection.sendall(channel.encode(hello))
        [answer] = channel.feed(said(connection))
    assert isinstance(answer, Refusal)
    assert answer.kind is FailureKind.VERSION_MISMATCH


def test_connections_beyond_the_bound_are_refused(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process, connections_max=1, handshake_timeout_s=30.0)
    works(producer, consumer)
    told = producer.ask("probe", address=producer.address, timeout_s=5.0)
    assert told["failure"] == "overloaded"
    before = producer.ask("usage")["fds"]
    held = [dialled(producer.address) for _ in range(120)]
    try:
        held[-1].settimeout(15.0)  # Half of a handshake's time.
        assert said(held[-1]) == b"", "one that nobody has time for is closed unheard"
        assert producer.ask("usage")["fds"] < before + 100
        works(producer, consumer)  # Its connection was there before.
    finally:
        for connection in held:
            connection.close()


def outside_address() -> str:
    """This host's address on a network, or empty."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Sends nothing.
        except OSError:
            return ""
        return str(probe.getsockname()[0])


@pytest.mark.skipif(not outside_address(), reason="this host has no address but its own loopback")
def test_a_loopback_address_is_no_address_for_a_remote_peer(rank_process: Ranks) -> None:
    here = outside_address()
    settings = QUICK | {"listen_host": "0.0.0.0"}
    producer = rank_process(LAYOUT, GROUP, settings=settings)
    consumer = rank_process(LAYOUT, GROUP, settings=settings)
    port = producer.address.rpartition(":")[2]
    assert consumer.report(load(consumer, f"{here}:{port}", new_proof())) == "unreachable"
    reports = consumer.ask("poll")["reports"].values()
    assert any("advertise_host" in detail for _, detail in reports)
    works(producer, consumer)


def test_closing_under_load_reports_everything(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process)
    waiting = [load(consumer, producer.address, offer(producer, is_staged=False)) for _ in range(20)]
    consumer.until("stats", lambda told: told["loads"] == 0)
    consumer.ask("close")
    reports = consumer.ask("poll")["reports"]
    assert {name: reports[name][0] for name in waiting} == dict.fromkeys(waiting, "closed")
    assert load(consumer, producer.address, new_proof()) in (consumer.ask("poll")["reports"])
    producer.ask("close")
    assert len(set(producer.ask("poll")["free"])) == 20
    assert consumer.ask("probe", address=producer.address, timeout_s=1.0)["failure"] == "closed"


def test_a_stopped_process_is_given_up_in_time(rank_process: Ranks) -> None:
    producer, consumer = pair(rank_process)
    works(producer, consumer)
    proof = offer(producer)
    os.kill(producer.process.pid, 19)
    try:
        request = load(consumer, producer.address, proof, wait_s=1.0)
        assert consumer.report(request) in {"transfer-timeout", "peer-lost"}
    finally:
        os.kill(producer.process.pid, 18)
    works(producer, consumer)
