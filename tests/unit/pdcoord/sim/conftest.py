"""Engines wired to each other without sockets, and builders of engines that tests have in common."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.engine import EngineModel
from pdcoord.sim.messages import (
    AskHandshake,
    AskPull,
    ClosePull,
    DenyPull,
    EngineEffect,
    EngineEvent,
    EngineRequest,
    GrantPull,
    HandshakeAnswered,
    HandshakeFailed,
    HeartbeatHeard,
    KvChanged,
    PullAsked,
    PullBroken,
    PullCancelled,
    PullClosed,
    PullDenied,
    PullGranted,
    PullShareChanged,
    Rejected,
    ReleaseHeard,
    RemoteTicket,
    RequestDone,
    RequestFailed,
    SendHeartbeat,
    SendRelease,
    Submit,
    TellShare,
    Tick,
    TokenOut,
    TransferDone,
)
from pdcoord.sim.settings import EngineSettings
from transfer.layout import KvLayout

T = TypeVar("T")

Output = Rejected | TokenOut | RequestDone | RequestFailed | KvChanged | TransferDone
"""Effects that leave the cluster; the others are heard by another engine in it."""


@dataclass(frozen=True, slots=True)
class _Pull:
    consumer: str
    producer: str


@dataclass(slots=True)
class Cluster:
    """Engines by name, and the side channel address of each.

    Attributes:
        is_checked: validate an engine after every event it handles.
    """

    is_checked: bool = False
    _engines: dict[str, EngineModel] = field(default_factory=dict)
    _addresses: dict[HostPort, str] = field(default_factory=dict)
    _pulls: dict[str, _Pull] = field(default_factory=dict)

    def add(self, name: str, engine: EngineModel, side_channel: HostPort) -> None:
        """Start an engine, in place of a dead one of that name."""
        if name in self._engines:
            raise ValueError(f"engine {name!r} is already in the cluster")
        self._engines[name] = engine
        self._addresses[side_channel] = name

    def engine(self, name: str) -> EngineModel:
        return self._engines[name]

    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def kill(self, name: str, now_s: float) -> list[tuple[str, Output]]:
        """Take an engine away as if its process died; whoever pulled from or fed it notices.

        Its requests end without a word: the caller knows which they were.
        """
        del self._engines[name]
        self._addresses = {address: n for address, n in self._addresses.items() if n != name}
        outputs: list[tuple[str, Output]] = []
        for pull_id, pull in list(self._pulls.items()):
            if name not in {pull.consumer, pull.producer}:
                continue
            del self._pulls[pull_id]
            if pull.consumer in self._engines:
                outputs += self.handle(pull.consumer, PullBroken(pull_id), now_s)
            if pull.producer in self._engines:
                outputs += self.handle(pull.producer, PullClosed(pull_id, is_done=False), now_s)
        return outputs

    def next_event_s(self) -> float | None:
        """When the next thing happens of its own accord in any engine."""
        times = [at_s for e in self._engines.values() if (at_s := e.next_event_s()) is not None]
        return min(times, default=None)

    def advance(self, now_s: float) -> list[tuple[str, Output]]:
        """Let time pass up to `now_s`, event by event over all engines."""
        outputs: list[tuple[str, Output]] = []
        while (at_s := self.next_event_s()) is not None and at_s <= now_s:
            for name, engine in list(self._engines.items()):
                due_s = engine.next_event_s()
                if due_s is not None and due_s <= at_s:
                    outputs += self.handle(name, Tick(), at_s)
        return outputs

    def handle(self, name: str, event: EngineEvent, now_s: float) -> list[tuple[str, Output]]:
        """Tell one engine something and carry what follows between engines.

        Returns:
            What left the cluster, with the engine it came from, in order. An engine whose own time was
            behind catches up first: call `advance` before for exact times.
        """
        outputs: list[tuple[str, Output]] = []
        todo: deque[tuple[str, EngineEvent]] = deque([(name, event)])
        while todo:
            target, each = todo.popleft()
            engine = self._engines.get(target)
            if engine is None:
                continue
            for effect in engine.handle(each, now_s):
                if isinstance(effect, Output):
                    outputs.append((target, effect))
                else:
                    todo.extend(self._carry(target, effect))
            if self.is_checked:
                engine.validate()
        return outputs

    def _carry(self, sender: str, effect: EngineEffect) -> list[tuple[str, EngineEvent]]:
        match effect:
            case AskHandshake():
                return [(sender, self._greet(effect.address))]
            case AskPull():
                return self._open(sender, effect)
            case SendHeartbeat():
                heard = HeartbeatHeard(effect.engine_id, effect.request_ids)
                return self._to_address(effect.address, heard)
            case SendRelease():
                return self._to_address(effect.address, ReleaseHeard(effect.engine_id, effect.request_id))
            case ClosePull() | GrantPull() | TellShare() | DenyPull():
                return self._along_pull(effect)
            case _:  # Outputs: nobody in the cluster hears them.
                return []

    def _greet(self, address: HostPort) -> HandshakeAnswered | HandshakeFailed:
        name = self._addresses.get(address)
        if name is None:
            return HandshakeFailed(address)
        return HandshakeAnswered(address, self._engines[name].info)

    def _open(self, sender: str, effect: AskPull) -> list[tuple[str, EngineEvent]]:
        producer = self._addresses.get(effect.address)
        if producer is None:
            return [(sender, PullBroken(effect.pull_id))]
        self._pulls[effect.pull_id] = _Pull(sender, producer)
        return [(producer, PullAsked(effect.pull_id, effect.ask))]

    def _to_address(self, address: HostPort, event: EngineEvent) -> list[tuple[str, EngineEvent]]:
        name = self._addresses.get(address)
        return [] if name is None else [(name, event)]

    def _along_pull(
        self, effect: ClosePull | GrantPull | TellShare | DenyPull
    ) -> list[tuple[str, EngineEvent]]:
        pull = self._pulls.get(effect.pull_id)
        if pull is None:
            return []
        match effect:
            case GrantPull():
                return [(pull.consumer, PullGranted(effect.pull_id, effect.grant))]
            case TellShare():
                return [(pull.consumer, PullShareChanged(effect.pull_id, effect.share_bytes_per_s))]
            case DenyPull():
                del self._pulls[effect.pull_id]
                return [(pull.consumer, PullDenied(effect.pull_id, effect.reason))]
            case ClosePull():
                del self._pulls[effect.pull_id]
                heard: list[tuple[str, EngineEvent]] = [
                    (pull.producer, PullClosed(effect.pull_id, effect.is_done))
                ]
                if not effect.is_done:
                    heard.append((pull.consumer, PullCancelled(effect.pull_id)))
                return heard


SPEED = SpeedFigures(
    prefill_base_s=0.004,
    prefill_s_per_token=0.0001,
    step_base_s=0.010,
    prefill_s_per_token_squared=1e-9,
    step_s_per_context_token=1e-8,
    step_s_per_sequence=1e-5,
)


class Bench:
    """A checked cluster whose engines are known by name and listen at `<name>:1`."""

    def __init__(self) -> None:
        self.cluster = Cluster(is_checked=True)
        self.now_s = 0.0
        self.outputs: list[tuple[str, Output]] = []
        self._starts = 0

    def start(self, name: str, *, block_tokens: int = 16, seed: int = 1, **settings: Any) -> EngineModel:
        """Start an engine; settings not given are those of an engine of 4,096 tokens."""
        self._starts += 1
        layout = settings.pop("layout", KvLayout(block_tokens))
        defaults: dict[str, Any] = {
            "name": name,
            "model": "demo/tiny",
            "speed": SPEED,
            "layout": layout,
            "block_total": 4_096 // layout.block_tokens,
            "kv_bytes_per_token": 1_000,
            "link_bytes_per_s": 1e6,
            "context_tokens_max": 2_048,
            "handshake_s": 0.5,
        }
        made = EngineSettings(**{**defaults, **settings})
        engine = EngineModel(made, Random(seed), f"{name}-{self._starts}", self.now_s)
        self.cluster.add(name, engine, HostPort(f"{name}:1"))
        return engine

    def send(self, name: str, event: EngineEvent) -> None:
        self.outputs += self.cluster.handle(name, event, self.now_s)

    def submit(self, name: str, request_id: str, prompt: Sequence[int], **fields: Any) -> None:
        self.send(name, Submit(EngineRequest(request_id, tuple(prompt), **fields)))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
        self.outputs += self.cluster.advance(self.now_s)

    def kill(self, name: str) -> None:
        self.outputs += self.cluster.kill(name, self.now_s)

    def of(self, kind: type[T], request_id: str | None = None) -> list[T]:
        """Outputs of one kind, of one request if it is named."""
        return [
            output
            for _, output in self.outputs
            if isinstance(output, kind) and request_id in {None, getattr(output, "request_id", None)}
        ]

    def tokens(self, request_id: str) -> list[int]:
        return [out.token_id for out in self.of(TokenOut, request_id)]

    def times(self, request_id: str) -> list[float]:
        return [out.at_s for out in self.of(TokenOut, request_id)]

    def done(self, request_id: str) -> RequestDone:
        (done,) = self.of(RequestDone, request_id)
        return done

    def prefill(self, name: str, request_id: str, prompt: Sequence[int], **fields: Any) -> RemoteTicket:
        """Run a prefill leg to its end and give its ticket."""
        self.submit(name, request_id, prompt, is_prefill_leg=True, **fields)
        self.run(2.0)
        ticket = self.done(request_id).ticket
        assert ticket is not None
        return RemoteTicket(
            ticket.engine_id,
            ticket.request_id,
            ticket.block_ids,
            HostPort(f"{name}:1"),
            ticket.token_count,
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="session")
def bench_of() -> type[Bench]:
    """For properties, which need a fresh bench for every example."""
    return Bench
