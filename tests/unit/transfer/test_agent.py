"""Two agents of one process over the loopback backend: faults on demand, and an end that tells everything."""

import asyncio
import gc
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfer.agent import Agent
from transfer.agent_state import Outcomes
from transfer.backends.base import Region
from transfer.backends.loopback import LoopbackBackend, LoopbackNetwork
from transfer.canonical import TokenRange
from transfer.digest import prompt_hash
from transfer.door import Identity
from transfer.errors import BackendError, Failure, FailureKind, SettingError
from transfer.layout import GroupShape, KvDtype, KvLayout, RankLayout
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.inbox import Inbox
from transfer.session.outbox import Outbox
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Proof, TransferId
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

WAIT_S = 30.0
SHAPE = GroupShape(2, 2, 16, 16)
TOKENS = 100
PART_TOKEN_BYTES = SHAPE.layer_count * SHAPE.kv_heads * SHAPE.row_elements * 4
BLOCKS = tuple(range(1, 20))
SETTINGS = AgentSettings(
    listen_host="127.0.0.1",
    advertise_host="127.0.0.1",
    port=0,
    staging_bytes=1 << 20,
    chunk_tokens_max=32,
    backoff_first_s=0.01,
    backoff_max_s=0.02,
)


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


class Faulty(NumpyRepacker):
    """Fails, or waits, when it is told to."""

    fails = False
    hold: threading.Event | None = None
    entered = threading.Event()

    def _meet_fault(self) -> None:
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(WAIT_S)
        if self.fails:
            raise RuntimeError("a prompt's secret text")

    def pack(self, *args: Any) -> tuple[bytes, ...]:
        self._meet_fault()
        return super().pack(*args)

    def unpack(self, *args: Any) -> bool:
        self._meet_fault()
        return super().unpack(*args)


class Side:
    """An agent with its blocks."""

    def __init__(
        self, network: LoopbackNetwork, block_tokens: int, settings: AgentSettings = SETTINGS
    ) -> None:
        layout = RankLayout(KvLayout(block_tokens, dtype=KvDtype.FLOAT32), 0, (SHAPE,))
        [tensor] = dense_tensors(layout.layout, SHAPE, SHAPE.kv_heads, len(BLOCKS) + 1)
        arrangement = arrangement_of(layout.layout, SHAPE, SHAPE.kv_heads, (tensor.strides,))
        self.whole = np.zeros(tensor.element_count, np.uint32)
        layers = tuple((self.whole[n * tensor.layer_stride :],) for n in range(SHAPE.layer_count))
        self.staging = HostStaging(settings.staging_bytes)
        memory = (GroupMemory(layers, arrangement),)
        self.repacker = Faulty(layout, memory, self.staging.numpy())
        self.repacker.entered = threading.Event()
        identity = Identity(secrets.token_hex(4), secrets.token_hex(8))
        self.agent = Agent(settings, identity, self.staging, self.repacker, [LoopbackBackend(network)])
        self.outcomes = Outcomes()

    def poll(self) -> Outcomes:
        told = self.agent.poll()
        self.outcomes = Outcomes(
            self.outcomes.free_blocks + told.free_blocks, self.outcomes.reports + told.reports
        )
        return self.outcomes

    def report(self, request: str) -> Failure | None:
        until(lambda: any(report.request == request for report in self.poll().reports))
        [found] = [report for report in self.outcomes.reports if report.request == request]
        return found.failure

    def kind(self, request: str) -> FailureKind:
        failure = self.report(request)
        assert failure is not None, "it should have failed"
        return failure.kind

    def drained(self) -> None:
        until(lambda: self.agent.stats().staging_used_bytes == 0)


class World:
    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.sides: list[Side] = []
        self.producer, self.consumer = self.add(16), self.add(8)
        self.count = 0

    def add(self, block_tokens: int, settings: AgentSettings = SETTINGS) -> Side:
        side = Side(self.network, block_tokens, settings)
        side.agent.start()
        self.sides.append(side)
        return side

    def offer(self, *, end: int | None = TOKENS, ready: Callable[[], None] | None = None) -> Opened:
        self.count += 1
        proof = Proof(secrets.token_bytes(16), prompt_hash([self.count]))
        opened = Opened(TransferId(secrets.token_hex(16)), f"prefill-{self.count}", proof, TOKENS)
        self.producer.whole[:] = np.random.default_rng(self.count).integers(
            1, 1 << 30, len(self.producer.whole)
        )
        self.producer.agent.open(opened)
        if end is not None:
            chunk = ChunkComputed(opened.transfer, TokenRange(0, end), (BLOCKS,), end == TOKENS)
            self.producer.agent.stage(chunk, ready)
        return opened

    def load(self, opened: Opened, first: int = 0) -> str:
        request = f"decode-{opened.request}"
        tokens = TokenRange(first, TOKENS - first)
        address = self.producer.agent.address
        asked = LoadAsked(request, opened.transfer, opened.proof, address, "", (BLOCKS,), tokens, 10.0)
        self.consumer.agent.load(asked)
        return request

    def works(self) -> None:
        """A transfer now ends well, with nothing held."""
        opened = self.offer()
        assert self.consumer.report(self.load(opened)) is None
        until(lambda: opened.request in self.producer.poll().free_blocks)
        self.consumer.drained()
        self.producer.drained()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for side in made.sides:
        side.agent.close()


def test_a_corrupted_byte_leaves_the_blocks_as_they_were(world: World) -> None:
    world.works()
    before = world.consumer.whole.copy()
    world.network.faults.corrupt_byte = 77
    # One part, so that no other one is unpacked.
    request = world.load(world.offer(), first=TOKENS - 2)
    assert world.consumer.kind(request) is FailureKind.WRONG_DIGEST
    assert (world.consumer.whole == before).all()
    world.works()


@pytest.mark.parametrize("fault", ["fail", "lose", "refuse"])
def test_a_transport_that_fails(world: World, fault: str) -> None:
    faults = world.network.faults
    if fault == "fail":
        faults.fail_next(1)
        kind = FailureKind.READ_FAILED
    elif fault == "lose":
        faults.lose_after_bytes = 1_000
        kind = FailureKind.PEER_LOST
    else:
        faults.refuse_next(1)
        kind = FailureKind.UNREACHABLE
    assert world.consumer.kind(world.load(world.offer())) is kind
    world.consumer.drained()
    # A peer that the transport has lost, or could not connect, is connected anew.
    until(lambda: world.consumer.report(world.load(world.offer())) is None)


def test_a_repacker_that_raises_fails_that_transfer_only(world: World) -> None:
    world.producer.repacker.fails = True
    opened = world.offer()
    assert world.consumer.kind(world.load(opened)) is FailureKind.PACK_FAILED
    world.producer.repacker.fails = False
    world.consumer.repacker.fails = True
    failure = world.consumer.report(world.load(world.offer()))
    assert failure is not None
    assert failure.kind is FailureKind.UNPACK_FAILED
    assert "secret" not in str(failure), "what a device or an engine says may hold anything"
    world.consumer.repacker.fails = False
    world.works()
    assert world.producer.agent.stats().offer_failures == {"pack-failed": 1}


def test_what_must_be_seen_in_the_blocks_is_waited_for_before_packing(world: World) -> None:
    seen = threading.Event()
    done = threading.Event()

    def ready() -> None:
        seen.set()
        assert done.wait(WAIT_S)

    opened = world.offer(ready=ready)
    assert seen.wait(WAIT_S)
    agent = world.producer.agent
    assert agent.wait_packed([opened.request], 0.01) is False
    assert agent.wait_packed(["another"], WAIT_S) is True
    assert world.producer.poll().free_blocks == ()
    done.set()
    assert agent.wait_packed([opened.request], WAIT_S) is True
    until(lambda: opened.request in world.producer.poll().free_blocks)


def test_a_chunk_of_a_transfer_that_is_not_open_leaves_nothing_behind(world: World) -> None:
    called = threading.Event()
    stray = ChunkComputed(TransferId(secrets.token_hex(16)), TokenRange(0, 16), (BLOCKS,), is_last=False)
    world.producer.agent.stage(stray, called.set)
    world.works()
    assert not called.is_set()
    assert world.producer.agent._control._ready == {}


def test_neither_side_can_take_all_of_the_staging_memory(world: World) -> None:
    # Offers nobody fetches fill the producer's share; as a consumer it still has room to land.
    both = world.producer
    for _ in range(60):
        world.offer()
    until(lambda: both.agent.stats().staging_used_bytes > both.agent.stats().staging_bytes // 2)
    assert both.agent.stats().staging_used_bytes <= both.agent.stats().staging_bytes * 3 // 4
    world.producer, world.consumer = world.consumer, both
    opened = world.offer()
    assert world.consumer.report(world.load(opened)) is None


@pytest.mark.parametrize("machine", [Inbox, Outbox])
def test_a_fault_in_a_machine_ends_everything_and_hangs_nobody(
    world: World, machine: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [world.load(world.offer(end=32)) for _ in range(3)]
    until(lambda: world.consumer.agent.stats().unpacked_bytes == 3 * 32 * PART_TOKEN_BYTES)

    def broken(*_: Any) -> None:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(machine, "handle", broken)
    if machine is Inbox:
        world.consumer.agent.cancel(waiting[0])
        for request in waiting:
            assert world.consumer.kind(request) is FailureKind.CLOSED
        assert world.consumer.kind(world.load(world.offer())) is FailureKind.CLOSED
        assert world.consumer.agent.wait_packed(["any"], WAIT_S) is True
    else:
        world.producer.agent.abort(TransferId("0" * 32))
        until(lambda: len(world.producer.poll().free_blocks) == 3)
        for request in waiting:
            assert world.consumer.kind(request) is FailureKind.PEER_LOST


def test_closing_waits_for_what_still_writes_to_the_blocks(world: World) -> None:
    hold = world.consumer.repacker.hold = threading.Event()
    request = world.load(world.offer())
    assert world.consumer.repacker.entered.wait(WAIT_S)
    closing = threading.Thread(target=world.consumer.agent.close)
    closing.start()
    until(lambda: not world.consumer.agent._mailbox.post(lambda: None))
    assert world.consumer.poll().reports == (), "the blocks are not the engine's yet"
    hold.set()
    closing.join(WAIT_S)
    assert world.consumer.kind(request) is FailureKind.CLOSED


def test_closing_while_reads_are_held_reports_them(world: World) -> None:
    world.network.faults.hold = threading.Event()
    requests = [world.load(world.offer()) for _ in range(4)]
    until(lambda: world.consumer.agent.stats().staging_used_bytes > 0)
    begun_s = time.monotonic()
    world.consumer.agent.close()
    assert time.monotonic() - begun_s < 10.0
    for request in requests:
        assert world.consumer.kind(request) is FailureKind.CLOSED
    world.consumer.agent.close()


def test_a_probe_waits_for_nobody_else(world: World) -> None:
    world.works()
    hold = world.network.faults.hold = threading.Event()
    address = world.producer.agent.address
    stuck = [world.consumer.agent.probe(address, 0.2) for _ in range(3)]
    assert {told.result(WAIT_S).failure for told in stuck} == {FailureKind.TRANSFER_TIMEOUT}
    hold.set()
    told = world.consumer.agent.probe(address, WAIT_S).result(WAIT_S)
    assert (told.failure, told.backend, told.verdict) == ("", "loopback", "regroup")
    world.works()


def test_a_probe_that_reads_other_bytes_says_so(world: World) -> None:
    world.network.faults.corrupt_byte = 9
    told = world.consumer.agent.probe(world.producer.agent.address, WAIT_S).result(WAIT_S)
    assert told.failure == FailureKind.WRONG_DIGEST
    world.consumer.agent.close()
    told = world.consumer.agent.probe(world.producer.agent.address, 1.0).result(WAIT_S)
    assert told.failure == FailureKind.CLOSED


def test_a_start_that_fails_leaves_nothing_open(world: World) -> None:
    port = int(world.producer.agent.address.rpartition(":")[2])
    taken = Side(world.network, 16, replace(SETTINGS, port=port))
    with pytest.raises(SettingError, match="port"):
        taken.agent.start()
    never = Side(world.network, 16)
    never.agent.close()
    assert never.kind(_loaded(never)) is FailureKind.CLOSED

    class Broken(LoopbackBackend):
        def start(self, region: Region) -> None:
            raise BackendError("no device")

    side = Side(world.network, 16)
    side.agent._backends["loopback"] = Broken(world.network)
    with pytest.raises(BackendError, match="no device"):
        side.agent.start()


def _loaded(side: Side) -> str:
    proof = Proof(bytes(16), bytes(16))
    tokens = TokenRange(0, TOKENS)
    asked = LoadAsked("late", TransferId("0" * 32), proof, "127.0.0.1:1", "", (BLOCKS,), tokens, 1.0)
    side.agent.load(asked)
    return "late"


def test_nothing_is_left_open_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()

    def open_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    threads, files = threading.active_count(), open_files()
    for _ in range(3):
        made = World()
        for side in made.sides:
            side.agent._loop.set_debug(True)
        made.works()
        made.load(made.offer(end=32))
        made.consumer.agent.probe(made.producer.agent.address, WAIT_S)
        for side in made.sides:
            side.agent.close()
            side.staging.close()
    gc.collect()  # Whatever was never awaited or closed is told of here, and a warning is an error.
    assert (threading.active_count(), open_files()) == (threads, files)
    assert [
        record.message for record in caplog.records if record.name == "asyncio" and record.levelno > 20
    ] == []
    assert asyncio._get_running_loop() is None


def test_a_drain_waits_until_what_was_handed_over_is_fetched_but_no_longer_than_a_lease(world: World) -> None:
    agent = world.producer.agent
    assert agent.drain()  # Nothing is left from here.
    opened = world.offer()
    until(lambda: opened.request in world.producer.poll().free_blocks)
    told: list[bool] = []
    waiting = threading.Thread(target=lambda: told.append(agent.drain()))
    waiting.start()
    assert world.consumer.report(world.load(opened)) is None
    waiting.join(WAIT_S)
    assert told == [True]
    side = world.add(16, replace(SETTINGS, transfer_timeout_s=0.1, lease_s=0.2))
    proof = Proof(secrets.token_bytes(16), prompt_hash([1]))
    side.agent.open(Opened(TransferId(secrets.token_hex(16)), "unstaged", proof, TOKENS))
    until(lambda: side.agent._control.offered_count == 1)
    assert not side.agent.drain()
