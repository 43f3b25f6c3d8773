"""Outboxes and Inboxes speak to each other in virtual time, with and without faults."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from transfer.canonical import Form, TokenRange
from transfer.errors import Failure, FailureKind
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.plan import sources_of, wanted_heads
from transfer.session.arena import Arena
from transfer.session.inbox import Inbox, InboxLimits
from transfer.session.outbox import Outbox, OutboxLimits
from transfer.session.vocabulary import (
    Aborted,
    BlocksFree,
    ChunkComputed,
    Connect,
    ConsumerGone,
    Denied,
    DoneHeard,
    DropConsumer,
    FetchAsked,
    InboxAction,
    InboxEvent,
    LoadAsked,
    LoadCancelled,
    Offered,
    Opened,
    OutboxAction,
    OutboxEvent,
    Pack,
    Packed,
    PackFailed,
    PartArrived,
    PartFailed,
    PartUnpacked,
    PeerFailed,
    PeerReady,
    Proof,
    ReadPart,
    RenewAsked,
    Report,
    SendDenial,
    SendDone,
    SendFetch,
    SendOffer,
    SendRenewal,
    Source,
    SourceLost,
    Tables,
    Tick,
    TransferEnded,
    TransferId,
    Unpack,
)

PROMPT_HASH = b"p" * 16
STEPS_MAX = 40_000


@dataclass(frozen=True)
class Odds:
    """How often something goes wrong, each for one step of its kind."""

    pack_fails: float = 0.0
    read_fails: float = 0.0
    unpack_fails: float = 0.0
    link_breaks: float = 0.0
    is_cancelled: float = 0.0
    is_aborted: float = 0.0
    is_never_opened: float = 0.0
    is_forged: float = 0.0
    is_stale: float = 0.0
    is_unreachable: float = 0.0
    stalls: float = 0.0


FAULTS = Odds(0.02, 0.02, 0.02, 0.02, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.02)


@dataclass
class Prompt:
    """One hand-over: what the producer computes and what the consumer wants."""

    name: str
    transfer: TransferId
    token_count: int
    first_token: int
    proof: Proof = field(init=False)

    def __post_init__(self) -> None:
        self.proof = Proof(self.transfer.encode()[:16], PROMPT_HASH)


@dataclass
class Link:
    """A connection of one consumer rank to one producer rank; messages keep their order each way."""

    name: str
    consumer: int
    producer: int
    is_open: bool = True
    last_s: dict[str, float] = field(default_factory=dict)


class World:
    """Two engines, their agents' machines, and a network that takes its time."""

    def __init__(self, rng: random.Random, odds: Odds, *, staging_bytes: int, is_same: bool = False) -> None:
        self.rng, self.odds = rng, odds
        producer_ranks = rng.choice([1, 2, 4])
        consumer_ranks = producer_ranks if is_same else rng.choice([1, 2, 4])
        kv_heads = rng.choice([1, 2, 4, 8])
        block_tokens = rng.choice([4, 16])
        self.groups = (
            GroupShape(2, kv_heads, 4, 0 if kv_heads == 1 and rng.random() < 0.5 else 4),
            GroupShape(1, rng.choice([1, 4]), 8, 8, window_tokens=rng.choice([3, 24])),
        )[: rng.choice([1, 2])]
        other_block = block_tokens if is_same else rng.choice([4, 8, 32])
        own = KvLayout(block_tokens, tensor_parallel=producer_ranks)
        other = own if is_same else KvLayout(other_block, tensor_parallel=consumer_ranks)
        self.producers = [RankLayout(own, rank, self.groups) for rank in range(producer_ranks)]
        self.consumers = [RankLayout(other, rank, self.groups) for rank in range(consumer_ranks)]
        limits = OutboxLimits(
            chunk_tokens_max=rng.choice([8, 32]),
            head_runs=rng.choice([1, 2]),
            window_slack_tokens=64,
            remembered_max=1000,
        )
        landing = InboxLimits(reads_in_flight_max=rng.choice([1, 3, 8]), load_s_max=60.0)
        self.arenas = [Arena(staging_bytes) for _ in range(producer_ranks + consumer_ranks)]
        self.outboxes = [
            Outbox(layout, limits, arena) for layout, arena in zip(self.producers, self.arenas, strict=False)
        ]
        self.inboxes = [
            Inbox(layout, landing, arena)
            for layout, arena in zip(self.consumers, self.arenas[producer_ranks:], strict=True)
        ]
        self.staging_bytes = staging_bytes
        self.now_s = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.links: dict[tuple[int, int], Link] = {}
        self.prompts: dict[TransferId, Prompt] = {}
        self.opened: Counter[tuple[int, str]] = Counter()
        self.freed: Counter[tuple[int, str]] = Counter()
        self.ended: list[tuple[int, TransferId, Failure | None]] = []
        self.asked: dict[tuple[int, str], LoadAsked] = {}
        self.reports: dict[tuple[int, str], Failure | None] = {}
        self.packing: Counter[tuple[int, TransferId]] = Counter()
        self.reading: Counter[tuple[str, TransferId]] = Counter()
        self.written: dict[tuple[int, str], Counter[tuple[int, int, int]]] = {}
        self.forms: Counter[Form] = Counter()

    # Time.

    def later(self, action: Callable[[], None], delay_s: float | None = None) -> None:
        delay_s = self.rng.uniform(0.001, 0.2) if delay_s is None else delay_s
        if self.rng.random() < self.odds.stalls:
            delay_s += self.rng.uniform(5.0, 40.0)
        self.count += 1
        heapq.heappush(self.heap, (self.now_s + delay_s, self.count, action))

    def say(self, link: Link, way: str, action: Callable[[], None]) -> None:
        """Deliver over a link, in order, unless it breaks first."""
        at_s = max(self.now_s + self.rng.uniform(0.001, 0.05), link.last_s.get(way, 0.0))
        link.last_s[way] = at_s
        self.count += 1
        heapq.heappush(self.heap, (at_s, self.count, lambda: action() if link.is_open else None))
        if self.rng.random() < self.odds.link_breaks:
            self.later(lambda: self.break_link(link))

    def run(self) -> None:
        for _ in range(STEPS_MAX):
            machines = [*self.outboxes, *self.inboxes]
            due = [m.deadline_s for m in machines if m.deadline_s is not None]
            if not self.heap and not due:
                return
            if self.heap and (not due or self.heap[0][0] <= min(due)):
                self.now_s, _, action = heapq.heappop(self.heap)
                action()
                continue
            self.now_s = max(self.now_s, min(due))
            for index, outbox in enumerate(self.outboxes):
                if outbox.deadline_s is not None and outbox.deadline_s <= self.now_s:
                    self.tell_outbox(index, Tick())
            for index, inbox in enumerate(self.inboxes):
                if inbox.deadline_s is not None and inbox.deadline_s <= self.now_s:
                    self.tell_inbox(index, Tick())
        pytest.fail("the machines never come to rest")

    # The producer's agent.

    def tell_outbox(self, rank: int, event: OutboxEvent) -> None:
        actions = self.outboxes[rank].handle(event, self.now_s)
        self.outboxes[rank].validate()
        self.arenas[rank].validate()
        for action in actions:
            self.do_outbox(rank, action)

    def do_outbox(self, rank: int, action: OutboxAction) -> None:
        match action:
            case Pack():
                self.packing[rank, action.transfer] += 1
                assert not self.freed[rank, self.prompts[action.transfer].name], (
                    "blocks that are free are read"
                )
                self.forms.update(slot.shape.form for slot in action.slots)
                self.later(lambda: self.end_pack(rank, action))
            case BlocksFree():
                self.freed[rank, action.request] += 1
                transfers = [p.transfer for p in self.prompts.values() if p.name == action.request]
                assert not any(self.packing[rank, t] for t in transfers), "blocks are freed under a Pack"
            case TransferEnded():
                self.ended.append((rank, action.transfer, action.failure))
                links = [x.name for x in self.links.values() if x.producer == rank and x.is_open]
                assert not any(self.reading[x, action.transfer] for x in links), (
                    "memory is freed under a read"
                )
            case DropConsumer():
                for link in [x for x in self.links.values() if x.name == action.consumer]:
                    self.later(lambda link=link: self.break_link(link))
            case SendOffer(consumer, transfer, parts, token_count, is_last):
                self.to_consumer(consumer, Offered(consumer, transfer, parts, token_count, is_last))
            case SendDenial(consumer, transfer, failure):
                self.to_consumer(consumer, Denied(consumer, transfer, failure))

    def to_consumer(self, name: str, event: InboxEvent) -> None:
        for link in [x for x in self.links.values() if x.name == name and x.is_open]:
            self.say(link, "down", lambda link=link: self.tell_inbox(link.consumer, event))

    def end_pack(self, rank: int, order: Pack) -> None:
        self.packing[rank, order.transfer] -= 1
        if self.rng.random() < self.odds.pack_fails:
            self.tell_outbox(rank, PackFailed(order.transfer, order.chunk, "the copy failed"))
        else:
            digests = tuple(b"d" * 16 for _ in order.slots)
            self.tell_outbox(rank, Packed(order.transfer, order.chunk, digests))

    # The consumer's agent.

    def tell_inbox(self, rank: int, event: InboxEvent) -> None:
        actions = self.inboxes[rank].handle(event, self.now_s)
        self.inboxes[rank].validate()
        self.arenas[len(self.producers) + rank].validate()
        for action in actions:
            self.do_inbox(rank, action)

    def do_inbox(self, rank: int, action: InboxAction) -> None:
        match action:
            case Connect(address):
                self.later(lambda: self.connect(rank, address))
            case SendFetch(source, transfer, proof, first, readers, wait_s):
                link = self.link_of(source)
                own, other = self.producers[link.producer].layout, self.consumers[rank].layout
                fetch = FetchAsked(source, transfer, proof, first, readers, own == other, wait_s)
                self.to_producer(source, fetch)
            case SendDone(source, transfer, proof, readers):
                assert not self.reading[source, transfer], "a source is released under a read"
                self.to_producer(source, DoneHeard(source, transfer, proof, readers))
            case SendRenewal(source, transfers):
                self.to_producer(source, RenewAsked(source, transfers))
            case ReadPart():
                transfer = self.asked[rank, action.request].transfer
                self.reading[action.source, transfer] += 1
                delay_s = min(self.rng.uniform(0.001, 0.02), action.wait_s)
                self.later(lambda: self.end_read(rank, action, transfer), delay_s)
            case Unpack():
                self.later(lambda: self.end_unpack(rank, action), self.rng.uniform(0.001, 0.02))
            case Report(request, failure, _):
                assert (rank, request) not in self.reports, "a load is reported twice"
                self.reports[rank, request] = failure

    def link_of(self, name: str) -> Link:
        return next(link for link in self.links.values() if link.name == name)

    def to_producer(self, name: str, event: OutboxEvent) -> None:
        for link in [x for x in self.links.values() if x.name == name and x.is_open]:
            self.say(link, "up", lambda link=link: self.tell_outbox(link.producer, event))

    def connect(self, rank: int, address: str) -> None:
        if self.rng.random() < self.odds.is_unreachable:
            failure = Failure(FailureKind.UNREACHABLE)
            self.tell_inbox(rank, PeerFailed(address, failure))
            return
        sources = []
        for need in sources_of(self.consumers[rank], len(self.producers)):
            link = self.links.get((rank, need.rank))
            if link is None or not link.is_open:
                self.count += 1
                link = Link(f"{rank}-{need.rank}-{self.count}", rank, need.rank)
                self.links[rank, need.rank] = link
            layout = self.producers[need.rank]
            sources.append(Source(link.name, layout, need.reader_count, self.staging_bytes))
        self.tell_inbox(rank, PeerReady(address, "epoch", tuple(sources)))

    def break_link(self, link: Link) -> None:
        if link.is_open:
            link.is_open = False
            lost = SourceLost(link.name, Failure(FailureKind.PEER_LOST))
            ends = [
                lambda: self.tell_outbox(link.producer, ConsumerGone(link.name)),
                lambda: self.tell_inbox(link.consumer, lost),
            ]
            self.rng.shuffle(ends)
            for end in ends:
                end()

    def end_read(self, rank: int, order: ReadPart, transfer: TransferId) -> None:
        self.reading[order.source, transfer] -= 1
        is_open = any(x.name == order.source and x.is_open for x in self.links.values())
        if not is_open or self.rng.random() < self.odds.read_fails:
            failure = Failure(FailureKind.READ_FAILED)
            self.tell_inbox(rank, PartFailed(order.request, order.part, failure, order.read))
        else:
            self.tell_inbox(rank, PartArrived(order.request, order.part, order.read))

    def end_unpack(self, rank: int, order: Unpack) -> None:
        assert (rank, order.request) not in self.reports, "a load is reported under an unpack"
        if self.rng.random() < self.odds.unpack_fails:
            failure = Failure(FailureKind.WRONG_DIGEST)
            self.tell_inbox(rank, PartFailed(order.request, order.part, failure))
            return
        heads = order.shape.heads.overlap(wanted_heads(self.consumers[rank], order.shape.group))
        assert heads is not None
        written = self.written.setdefault((rank, order.request), Counter())
        for head in range(heads.first, heads.end):
            for token in range(order.tokens.first, order.tokens.end):
                written[order.shape.group, head, token] += 1
        self.tell_inbox(rank, PartUnpacked(order.request, order.part))

    # The engines.

    def hand_over(self, number: int, *, is_together: bool) -> None:
        token_count = self.rng.choice([1, 2, 15, 16, 17, 63, 64, 120, 200])
        first = self.rng.choice([0, 0, token_count // 2, token_count])
        prompt = Prompt(f"r{number}", TransferId(f"{number:032x}"), token_count, first)
        self.prompts[prompt.transfer] = prompt
        start_s = self.rng.uniform(0.0, 3.0)
        load_s = start_s - 0.5 if is_together else start_s + 4.0
        if self.rng.random() >= self.odds.is_never_opened:
            is_aborted = self.rng.random() < self.odds.is_aborted
            for rank in range(len(self.producers)):
                self.later(lambda rank=rank: self.prefill(rank, prompt, is_aborted), max(start_s, 0.0))
        for rank in range(len(self.consumers)):
            self.later(lambda rank=rank: self.load(rank, prompt), max(load_s, 0.0))

    def prefill(self, rank: int, prompt: Prompt, is_aborted: bool) -> None:
        self.opened[rank, prompt.name] += 1
        proof = prompt.proof
        self.tell_outbox(rank, Opened(prompt.transfer, prompt.name, proof, prompt.token_count))
        self.step(rank, prompt, 0, is_aborted)

    def step(self, rank: int, prompt: Prompt, first: int, is_aborted: bool) -> None:
        """One step of chunked prefill; at times the engine begins again before what it had, as preempted."""
        if is_aborted and self.rng.random() < 0.3:
            self.tell_outbox(rank, Aborted(prompt.transfer))
            return
        end = min(first + self.rng.choice([5, 16, 48]), prompt.token_count)
        again = self.rng.randrange(first + 1) if self.rng.random() < 0.1 else first
        tokens = TokenRange(again, end - again)
        tables = self.tables(self.producers[rank], prompt.token_count, end)
        is_last = end == prompt.token_count
        self.tell_outbox(rank, ChunkComputed(prompt.transfer, tokens, tables, is_last=is_last))
        if not is_last:
            self.later(lambda: self.step(rank, prompt, end, is_aborted))

    def tables(self, layout: RankLayout, token_count: int, end: int) -> Tables:
        """Block tables for the tokens so far; a window's group has let go of what lies well before it."""
        block_tokens = layout.layout.block_tokens
        blocks = -(-end // block_tokens)
        full = []
        for shape in layout.groups:
            skipped = 0 if shape.window_tokens is None else max(0, token_count - shape.window_tokens - 64)
            full.append(tuple(0 if (i + 1) * block_tokens <= skipped else i + 1 for i in range(blocks)))
        return tuple(full)

    def load(self, rank: int, prompt: Prompt) -> None:
        layout = self.consumers[rank]
        block_tokens = layout.layout.block_tokens
        tables = []
        for shape in layout.groups:
            window = prompt.token_count if shape.window_tokens is None else shape.window_tokens
            skipped = max(0, prompt.token_count - window + 1) if shape.window_tokens else 0
            blocks = -(-prompt.token_count // block_tokens)
            tables.append(tuple(0 if (i + 1) * block_tokens <= skipped else i + 7 for i in range(blocks)))
        is_forged = self.rng.random() < self.odds.is_forged
        proof = Proof(b"x" * 16, PROMPT_HASH) if is_forged else prompt.proof
        epoch = "old" if self.rng.random() < self.odds.is_stale else self.rng.choice(["", "epoch"])
        tokens = TokenRange(prompt.first_token, prompt.token_count - prompt.first_token)
        asked = LoadAsked(prompt.name, prompt.transfer, proof, "p:1", epoch, tuple(tables), tokens, 30.0)
        self.asked[rank, prompt.name] = asked
        if self.rng.random() < self.odds.is_cancelled:
            self.later(lambda: self.tell_inbox(rank, LoadCancelled(prompt.name)), self.rng.uniform(0.0, 3.0))
        self.tell_inbox(rank, asked)

    def check_rest(self) -> None:
        """Nothing is held, and everything was answered once."""
        assert all(arena.used_bytes == 0 for arena in self.arenas)
        assert all(machine.live_count == 0 for machine in [*self.outboxes, *self.inboxes])
        assert self.freed == self.opened
        assert Counter((rank, self.prompts[t].name) for rank, t, _ in self.ended) == self.opened
        assert set(self.reports) == set(self.asked)
        for key, failure in self.reports.items():
            if failure is None:
                self.check_written(key)

    def check_written(self, key: tuple[int, str]) -> None:
        asked, layout = self.asked[key], self.consumers[key[0]]
        block_tokens = layout.layout.block_tokens
        wanted: Counter[tuple[int, int, int]] = Counter()
        for group, table in enumerate(asked.tables):
            heads = wanted_heads(layout, group)
            for token in range(asked.tokens.first, asked.tokens.end):
                if table[token // block_tokens] > 0:
                    wanted.update((group, head, token) for head in range(heads.first, heads.end))
        assert self.written.get(key, Counter()) == wanted, "every wanted token of every head, once"


@pytest.mark.parametrize("seed", range(20))
def test_without_faults_every_part_is_delivered_and_nothing_is_held(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, Odds(), staging_bytes=1 << 20)
    for number in range(12):
        world.hand_over(number, is_together=rng.random() < 0.5)
    world.run()
    world.check_rest()
    assert {k: f for k, f in world.reports.items() if f is not None} == {}
    assert [failure for _, _, failure in world.ended if failure is not None] == []


@pytest.mark.parametrize("seed", range(10))
def test_equal_engines_that_start_together_move_pages(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, Odds(), staging_bytes=1 << 20, is_same=True)
    for number in range(6):
        world.hand_over(number, is_together=True)
    world.run()
    world.check_rest()
    assert set(world.reports.values()) == {None}
    assert world.forms[Form.PAGES] > 0


@pytest.mark.parametrize("seed", range(50))
def test_under_faults_all_is_answered_once_and_nothing_is_held(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, FAULTS, staging_bytes=rng.choice([1 << 12, 1 << 14, 1 << 18]))
    for number in range(14):
        world.hand_over(number, is_together=rng.random() < 0.5)
    world.run()
    world.check_rest()


@pytest.mark.parametrize("seed", range(20))
def test_under_pressure_all_that_can_fit_alone_is_delivered_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, Odds(), staging_bytes=1 << 16)
    for number in range(8):
        world.hand_over(number, is_together=rng.random() < 0.5)
    world.run()
    world.check_rest()
    failures = {str(f.kind) for f in world.reports.values() if f is not None}
    assert failures <= {FailureKind.STAGING_FULL}
