"""A network in memory for the side channel, and engine ranks of one process with their agents on it."""

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from transfer.agent import Agent
from transfer.backends.loopback import LoopbackBackend, LoopbackNetwork
from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.digest import prompt_hash
from transfer.door import Identity
from transfer.layout import GroupShape, KvDtype, KvLayout, RankLayout
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.vocabulary import (
    ChunkComputed,
    LoadAsked,
    Opened,
    Proof,
    Report,
    Slot,
    Tables,
    TransferId,
    Unpack,
)
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

WAIT_S = 10.0
SHAPE = GroupShape(layer_count=2, kv_heads=2, key_dim=4, value_dim=4)


class MemoryTransport(asyncio.Transport):
    """One end of a connection; the other may live in another thread's loop.

    Attributes:
        holds: what is written stays here, as if the peer did not read.
        sent: all that was written.
    """

    def __init__(self, protocol: asyncio.StreamReaderProtocol, peer_host: str) -> None:
        super().__init__({"peername": (peer_host, 1)})
        self.loop = asyncio.get_running_loop()
        self.protocol = protocol
        self.other: MemoryTransport | None = None
        self.holds = False
        self.held = b""
        self.sent = b""
        self.is_over = False
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        if self.is_over:
            return
        self.sent += bytes(data)
        if self.holds:
            self.held += bytes(data)
        elif self.other is not None:
            self.other.tell(self.other.take, bytes(data))

    def take(self, data: bytes) -> None:
        if not self.is_over:
            self.protocol.data_received(data)

    def take_end(self) -> None:
        if not self.is_over:
            self.protocol.eof_received()

    def tell(self, work: Callable[..., object], *more: object) -> None:
        with contextlib.suppress(RuntimeError):  # That side's loop is gone, and who would have heard it.
            self.loop.call_soon_threadsafe(work, *more)

    def get_write_buffer_size(self) -> int:
        return len(self.held)

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.tell(self.protocol.connection_lost, None)
            if self.other is not None:
                self.other.tell(self.other.take_end)

    def abort(self) -> None:
        self.close()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self.other is not None:
            self.other.tell(self.other.take_end)

    def pause_reading(self) -> None:
        """Memory is large enough."""

    def resume_reading(self) -> None:
        """See `pause_reading`."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
ComeIn = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def open_end(peer_host: str) -> Streams:
    """One end of a connection, not joined to another yet."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    return reader, asyncio.StreamWriter(MemoryTransport(protocol, peer_host), protocol, reader, loop)


def join(one: asyncio.StreamWriter, two: asyncio.StreamWriter) -> None:
    ends = one.transport, two.transport
    assert isinstance(ends[0], MemoryTransport)
    assert isinstance(ends[1], MemoryTransport)
    ends[0].other, ends[1].other = ends[1], ends[0]


class MemoryServer:
    """What `asyncio.start_server` gives, as far as it is used."""

    def __init__(self, network: "MemoryNetwork", port: int, come_in: ComeIn) -> None:
        self._network = network
        self._port = port
        self._come_in = come_in
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.sockets = (self,)

    def getsockname(self) -> tuple[str, int]:
        return ("127.0.0.1", self._port)

    def close(self) -> None:
        self._network.servers.pop(self._port, None)

    async def accept(self, other: asyncio.StreamWriter, peer_host: str) -> None:
        accepted = threading.Event()

        def begin() -> None:
            reader, writer = open_end(peer_host)
            join(writer, other)
            task = self._loop.create_task(self._come_in(reader, writer))  # type: ignore[arg-type]
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            accepted.set()

        if self._loop is asyncio.get_running_loop():
            begin()
        else:
            self._loop.call_soon_threadsafe(begin)
            await asyncio.to_thread(accepted.wait, WAIT_S)


@dataclass(repr=False)
class MemoryNetwork:
    """Stands for TCP in one process.

    Attributes:
        dialler_host: address from which those who dial are seen to come.
        dialled: addresses in the order they were dialled.
        silent: ports that accept and never answer.
        writers: of those who dialled, in that order.
        held: the other ends of the silent; a writer closes when nobody holds it.
    """

    servers: dict[int, MemoryServer] = field(default_factory=dict)
    dialler_host: str = "127.0.0.1"
    dialled: list[str] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    held: list[asyncio.StreamWriter] = field(default_factory=list)
    _ports: "itertools.count[int]" = field(default_factory=lambda: itertools.count(40_001))

    async def start_server(self, come_in: ComeIn, host: str, port: int) -> MemoryServer:
        port = port or next(self._ports)
        if port in self.servers:
            raise OSError(98, "Address already in use")
        self.servers[port] = MemoryServer(self, port, come_in)
        return self.servers[port]

    async def open_connection(self, host: str, port: int) -> Streams:
        self.dialled.append(f"{host}:{port}")
        reader, writer = open_end(host)
        self.writers.append(writer)
        if port in self.silent:
            self.held.append(open_end(self.dialler_host)[1])
            join(writer, self.held[-1])
        elif port in self.servers:
            await self.servers[port].accept(writer, self.dialler_host)
        else:
            writer.close()
            raise ConnectionRefusedError(111, "Connection refused")
        return reader, writer


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryNetwork]:
    """All side channels of this process are in memory."""
    made = MemoryNetwork()
    monkeypatch.setattr(asyncio, "start_server", made.start_server)
    monkeypatch.setattr(asyncio, "open_connection", made.open_connection)
    yield made
    for writer in (*made.writers, *made.held):
        writer.close()


@pytest.fixture
async def network(in_memory: MemoryNetwork) -> AsyncIterator[MemoryNetwork]:
    """The same for a test that is itself in a loop, which ends after it."""
    yield in_memory
    for writer in (*in_memory.writers, *in_memory.held):
        writer.close()


@pytest.fixture
async def ends() -> AsyncIterator[Callable[[], tuple[Streams, Streams]]]:
    """Makes both ends of a connection."""
    writers: list[asyncio.StreamWriter] = []

    def make() -> tuple[Streams, Streams]:
        one, two = open_end("127.0.0.1"), open_end("127.0.0.1")
        join(one[1], two[1])
        writers.extend((one[1], two[1]))
        return one, two

    yield make
    for writer in writers:
        writer.close()


class GatedRepacker(NumpyRepacker):
    """Packs and unpacks only while it may.

    Attributes:
        error: raised in place of packing and unpacking.
    """

    def __init__(self, layout: RankLayout, memory: Sequence[GroupMemory], staging: NDArray[np.uint8]) -> None:
        super().__init__(layout, memory, staging)
        self.may_pack = threading.Event()
        self.may_unpack = threading.Event()
        self.may_pack.set()
        self.may_unpack.set()
        self.error: Exception | None = None
        self.packing_count = 0
        self.unpacking_count = 0

    def pack(self, slots: Sequence[Slot], tables: Tables) -> tuple[bytes, ...]:
        self.packing_count += 1
        try:
            self.may_pack.wait(WAIT_S)
            if self.error is not None:
                raise self.error
            return super().pack(slots, tables)
        finally:
            self.packing_count -= 1

    def unpack(self, order: Unpack) -> bool:
        self.unpacking_count += 1
        try:
            self.may_unpack.wait(WAIT_S)
            if self.error is not None:
                raise self.error
            return super().unpack(order)
        finally:
            self.unpacking_count -= 1


class Rank:
    """An engine rank: 64 blocks of bf16 memory, and an agent."""

    def __init__(
        self,
        backend: Any,
        block_tokens: int,
        settings: AgentSettings,
        ranks: tuple[int, int],
        engine: Identity,
    ) -> None:
        rank, rank_count = ranks
        layout = KvLayout(block_tokens, dtype=KvDtype.BFLOAT16, tensor_parallel=rank_count)
        self.layout = RankLayout(layout, rank, (SHAPE,))
        head_count = self.layout.heads(0).count
        tensor = dense_tensors(layout, SHAPE, head_count, 64)[0]
        self.memory = np.zeros(tensor.element_count, dtype=np.uint16)
        layers = tuple((self.memory[layer * tensor.layer_stride :],) for layer in range(SHAPE.layer_count))
        self.groups = (GroupMemory(layers, arrangement_of(layout, SHAPE, head_count, (tensor.strides,))),)
        self.staging = HostStaging(settings.staging_bytes)
        self.repacker = GatedRepacker(self.layout, self.groups, self.staging.numpy())
        self.agent = Agent(settings, engine, self.staging, self.repacker, [backend])
        self.free: list[str] = []
        self.reports: list[Report] = []

    def table(self, token_count: int) -> Tables:
        return (tuple(range(1, 1 + -(-token_count // self.layout.layout.block_tokens))),)

    def fill(self, seed: int) -> None:
        self.memory[:] = np.random.default_rng(seed).integers(0, 65_535, len(self.memory), dtype=np.uint16)

    def rows(self, tokens: TokenRange) -> NDArray[np.uint16]:
        """The tokens as they would be staged: `[layer][token][head][key, value]`."""
        shape = PartShape(Form.TOKENS, 0, self.layout.heads(0), tokens)
        length_bytes = part_bytes(shape, SHAPE, self.layout.layout)
        packed = np.empty(length_bytes, dtype=np.uint8)
        slots = (Slot(shape, 0, length_bytes),)
        NumpyRepacker(self.layout, self.groups, packed).pack(slots, self.table(tokens.end))
        sizes = (SHAPE.layer_count, tokens.count, shape.heads.count, SHAPE.row_elements)
        return packed.view(np.uint16).reshape(sizes)

    def open(self, transfer: TransferId, token_count: int) -> None:
        self.agent.open(Opened(transfer, transfer, proof_of(transfer), token_count))

    def stage(
        self, transfer: TransferId, first: int, end: int, token_count: int, **more: Callable[[], None]
    ) -> None:
        tokens = TokenRange(first, end - first)
        chunk = ChunkComputed(transfer, tokens, self.table(token_count), end == token_count)
        self.agent.stage(chunk, **more)

    def prefill(self, transfer: TransferId, token_count: int) -> None:
        self.open(transfer, token_count)
        self.stage(transfer, 0, token_count, token_count)

    def load(self, address: str, transfer: TransferId, token_count: int, **more: Any) -> str:
        request = more.get("request", f"load-{transfer}")
        self.agent.load(
            LoadAsked(
                request,
                transfer,
                more.get("proof", proof_of(transfer)),
                address,
                more.get("epoch", ""),
                self.table(token_count),
                more.get("tokens", TokenRange(0, token_count)),
                more.get("wait_s", WAIT_S),
            )
        )
        return str(request)

    def poll(self) -> None:
        outcomes = self.agent.poll()
        self.free += outcomes.free_blocks
        self.reports += outcomes.reports

    def report(self, request: str) -> Report:
        """How a load ended; once."""

        def found() -> list[Report]:
            self.poll()
            return [report for report in self.reports if report.request == request]

        wait_for(found)
        (report,) = found()
        return report

    def wait_freed(self, request: str) -> None:
        def is_freed() -> bool:
            self.poll()
            return request in self.free

        wait_for(is_freed)

    def wait_empty(self) -> None:
        wait_for(lambda: self.agent.stats().staging_used_bytes == 0)


def proof_of(transfer: str) -> Proof:
    return Proof(bytes.fromhex(transfer), prompt_hash([len(transfer)]))


def wait_for(is_so: Callable[[], object]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < until_s, "it did not come about in time"
        time.sleep(0.001)


@dataclass
class World:
    """Ranks that reach each other, and the faults on the way."""

    network: MemoryNetwork
    reads: LoopbackNetwork = field(default_factory=LoopbackNetwork)
    ranks: list[Rank] = field(default_factory=list)

    def start(
        self,
        block_tokens: int = 16,
        *,
        ranks: tuple[int, int] = (0, 1),
        engine: Identity | None = None,
        **more: Any,
    ) -> Rank:
        settings = AgentSettings(
            **{
                "port": 0,
                "advertise_host": "127.0.0.1",
                "staging_bytes": 256 << 10,
                "pattern_bytes": 4 << 10,
                "handshake_timeout_s": WAIT_S,
                **more,
            }
        )
        engine = engine or Identity("engine", secrets.token_hex(8))
        rank = Rank(LoopbackBackend(self.reads), block_tokens, settings, ranks, engine)
        self.ranks.append(rank)
        rank.agent.start()
        return rank


def new_transfer() -> TransferId:
    return TransferId(secrets.token_hex(16))


@pytest.fixture
def world(in_memory: MemoryNetwork) -> Iterator[World]:
    made = World(in_memory)
    yield made
    for rank in made.ranks:
        rank.repacker.may_pack.set()
        rank.repacker.may_unpack.set()
        rank.agent.close()
        rank.staging.close()


@pytest.fixture
def transfer() -> TransferId:
    return new_transfer()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for a condition, with a deadline."""
    return wait_for
