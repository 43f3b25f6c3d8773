"""Emulated engines in virtual time: they live, die, talk to each other and to whoever sent them work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from pdcoord.core.fleet import Sample
from pdcoord.protocol.headers import HostPort
from pdcoord.sim import messages as m
from pdcoord.sim.engine import EngineModel
from pdcoord.sim.loop import Timer, VirtualLoop
from pdcoord.sim.settings import EngineSettings

MESSAGE_S = 0.0005
"""One way on the network, the same for all, so that messages of one pair keep their order."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine died with the request, gave it up, or was never there."""

    request_id: str
    was_reached: bool


Heard = m.TokenOut | m.RequestDone | m.RequestFailed | m.Rejected | Lost
Listener = Callable[[Heard], None]


@dataclass(slots=True)
class _Node:
    """One engine's place; `model` is None while it is dead."""

    address: HostPort
    settings: EngineSettings
    model: EngineModel | None = None
    start_count: int = 0
    listeners: dict[str, Listener] = field(default_factory=dict)
    timer: Timer | None = None


class VirtualEngines:
    """All engines of a simulation, by address.

    Attributes:
        cuts: (prefill, decode) addresses between which nothing passes.
        kv_cuts: those between which no KV passes, while their sidecars hear each other.
    """

    def __init__(self, loop: VirtualLoop, rng: Random) -> None:
        self._loop = loop
        self._rng = rng
        self._nodes: dict[HostPort, _Node] = {}
        self._pulls: dict[str, tuple[HostPort, HostPort]] = {}
        self.cuts: set[tuple[HostPort, HostPort]] = set()
        self.kv_cuts: set[tuple[HostPort, HostPort]] = set()

    def add(self, address: HostPort, settings: EngineSettings) -> None:
        self._nodes[address] = _Node(address, settings)
        self.start(address)

    def start(self, address: HostPort) -> None:
        """Start a dead engine anew, with an empty pool and an id of its own."""
        node = self._nodes[address]
        assert node.model is None, f"{address} runs already"
        node.start_count += 1
        engine_id = f"{node.settings.name}.{node.start_count}"
        node.model = EngineModel(node.settings, self._rng, engine_id, self._loop.now_s)

    def kill(self, address: HostPort) -> None:
        """The engine dies: whoever waits for it finds out."""
        node = self._nodes[address]
        node.model = None
        if node.timer is not None:
            node.timer.cancel()
        listeners, node.listeners = node.listeners, {}
        for request_id, listener in listeners.items():
            self._later(partial(listener, Lost(request_id, was_reached=True)))
        for pull_id, (consumer, producer) in list(self._pulls.items()):
            if producer == address:
                del self._pulls[pull_id]
                self._tell(consumer, m.PullBroken(pull_id))
            elif consumer == address:
                del self._pulls[pull_id]
                self._tell(producer, m.PullClosed(pull_id, is_done=False))

    def is_alive(self, address: HostPort) -> bool:
        return self._nodes[address].model is not None

    def models(self) -> list[EngineModel]:
        """Every engine that lives."""
        return [node.model for node in self._nodes.values() if node.model is not None]

    def sample(self, address: HostPort) -> Sample | None:
        """What a scrape of the engine reads now; None if it is dead."""
        model = self._nodes[address].model
        if model is None:
            return None
        self._pass(address, m.Tick())
        settings = model.settings
        return Sample(
            model.running_count,
            model.waiting_count,
            model.pool.usage,
            self._loop.now_s,
            kv_tokens=settings.block_total * settings.layout.block_tokens,
            failed_pulls=model.counters.failed_transfers,
            arrived_pulls=model.counters.arrived_transfers,
            pulled_tokens=model.counters.external_hit_tokens,
            computed_tokens=model.counters.computed_tokens,
        )

    def submit(self, address: HostPort, request: m.EngineRequest, listener: Listener) -> None:
        """Send a request; the listener hears of it until its end, or until `abort`."""

        def arrive() -> None:
            node = self._nodes[address]
            if node.model is None:
                self._later(lambda: listener(Lost(request.id, was_reached=False)))
                return
            node.listeners[request.id] = listener
            self._pass(address, m.Submit(request))

        self._later(arrive)

    def abort(self, address: HostPort, request_id: str) -> None:
        """Close the request's connection: nothing more is heard of it."""

        def arrive() -> None:
            node = self._nodes[address]
            if node.listeners.pop(request_id, None) is not None:
                self._pass(address, m.Abort(request_id))

        self._later(arrive)

    def _later(self, call: Callable[[], None]) -> None:
        self._loop.after(MESSAGE_S, call)

    def _tell(self, address: HostPort, event: m.EngineEvent) -> None:
        self._later(lambda: self._pass(address, event))

    def _pass(self, address: HostPort, event: m.EngineEvent) -> None:
        node = self._nodes[address]
        if node.model is None:
            return
        effects = node.model.handle(event, self._loop.now_s)
        node.model.validate()
        for effect in effects:
            self._carry_out(node, effect)
        if node.timer is not None:
            node.timer.cancel()
        due_s = node.model.next_event_s()
        if due_s is not None:
            node.timer = self._loop.at(due_s, lambda: self._pass(address, m.Tick()))

    def _carry_out(self, node: _Node, effect: m.EngineEffect) -> None:
        match effect:
            case m.TokenOut(request_id):
                listener = node.listeners.get(request_id)
                if listener is not None:
                    self._later(lambda: listener(effect))
            case m.RequestDone(request_id, m.FinishReason.ABORT):
                turned_away = node.listeners.pop(request_id, None)
                if turned_away is not None:
                    self._later(lambda: turned_away(Lost(request_id, was_reached=True)))
            case m.RequestDone(request_id) | m.RequestFailed(request_id) | m.Rejected(request_id):
                last = node.listeners.pop(request_id, None)
                if last is not None:
                    self._later(lambda: last(effect))
            case m.KvChanged() | m.TransferDone():
                pass
            case m.AskHandshake() | m.AskPull() | m.SendHeartbeat() | m.SendRelease():
                self._ask_producer(node.address, effect)
            case _:
                self._answer_pull(node.address, effect)

    def _ask_producer(
        self,
        consumer: HostPort,
        effect: m.AskHandshake | m.AskPull | m.SendHeartbeat | m.SendRelease,
    ) -> None:
        producer = effect.address
        model = self._nodes[producer].model
        is_cut = model is None or (producer, consumer) in self.kv_cuts
        match effect:
            case m.AskHandshake():
                if model is None or is_cut:
                    self._tell(consumer, m.HandshakeFailed(producer))
                else:
                    self._tell(consumer, m.HandshakeAnswered(producer, model.info))
            case m.AskPull(pull_id, _, ask):
                if is_cut:
                    self._tell(consumer, m.PullBroken(pull_id))
                else:
                    self._pulls[pull_id] = (consumer, producer)
                    self._tell(producer, m.PullAsked(pull_id, ask))
            case m.SendHeartbeat(_, engine_id, request_ids):
                if not is_cut:
                    self._tell(producer, m.HeartbeatHeard(engine_id, request_ids))
            case m.SendRelease(_, engine_id, request_id):
                if not is_cut:
                    self._tell(producer, m.ReleaseHeard(engine_id, request_id))

    def _answer_pull(
        self, address: HostPort, effect: m.ClosePull | m.GrantPull | m.TellShare | m.DenyPull
    ) -> None:
        pair = self._pulls.get(effect.pull_id)
        if pair is None:
            if isinstance(effect, m.ClosePull) and not effect.is_done:
                self._tell(address, m.PullCancelled(effect.pull_id))
            return
        consumer, producer = pair
        match effect:
            case m.ClosePull(pull_id, is_done):
                del self._pulls[pull_id]
                self._tell(producer, m.PullClosed(pull_id, is_done))
                if not is_done:
                    self._tell(consumer, m.PullCancelled(pull_id))
            case m.GrantPull(pull_id, grant):
                self._tell(consumer, m.PullGranted(pull_id, grant))
            case m.TellShare(pull_id, share):
                self._tell(consumer, m.PullShareChanged(pull_id, share))
            case m.DenyPull(pull_id, reason):
                del self._pulls[pull_id]
                self._tell(consumer, m.PullDenied(pull_id, reason))

    def cut(self, producer: HostPort, consumer: HostPort) -> None:
        """Nothing passes between these two any more; pulls under way break."""
        self.cuts.add((producer, consumer))
        self.cut_kv(producer, consumer)

    def cut_kv(self, producer: HostPort, consumer: HostPort) -> None:
        """No KV passes between these two any more; pulls under way break."""
        self.kv_cuts.add((producer, consumer))
        for pull_id, pair in list(self._pulls.items()):
            if pair == (consumer, producer):
                del self._pulls[pull_id]
                self._tell(consumer, m.PullBroken(pull_id))
                self._tell(producer, m.PullClosed(pull_id, is_done=False))

    def mend(self, producer: HostPort, consumer: HostPort) -> None:
        self.cuts.discard((producer, consumer))
        self.kv_cuts.discard((producer, consumer))

    def slow_link(self, address: HostPort, factor: float) -> None:
        """The engine's NIC runs at this share of its speed; 1.0 heals it."""
        self._pass(address, m.LinkSlowed(factor))

    def slow_steps(self, address: HostPort, factor: float) -> None:
        """The engine computes at this share of its speed; 1.0 heals it."""
        self._pass(address, m.StepsSlowed(factor))

    def shut_down(self, address: HostPort) -> None:
        """The engine answers no further request, until it is killed and started anew."""
        self._pass(address, m.ShutDown())
