"""What carries routes out: legs on engines, hand-overs between them, and the rungs taken where one fails."""

from collections.abc import Sequence as Seq
from random import Random
from typing import Protocol

from pdcoord.protocol.errors import RungReason
from pdcoord.sim.coarse.agenda import Agenda
from pdcoord.sim.coarse.engine import CoarseEngine, News
from pdcoord.sim.coarse.flights import Flight
from pdcoord.sim.coarse.links import Links, Transfer
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.coarse.sequences import Sequence, Stage
from pdcoord.sim.virtual_engines import MESSAGE_S


class Desk(Protocol):
    """Who is told what becomes of flights."""

    def began(self, flight: Flight) -> None:
        """The first token was seen."""
        ...

    def ended(self, flight: Flight, *, is_ok: bool) -> None:
        """The last token was seen, or the call was lost."""
        ...

    def failed(self, flight: Flight) -> None:
        """The decode place is dead or full, and nothing was answered."""
        ...

    def cached(self, index: int, stored: Seq[int], removed: Seq[int]) -> None:
        """A place's prefix cache changed, a moment ago."""
        ...


class Host:
    """One place: its engine, and the flights that decode there.

    Attributes:
        life: grows with each death, so that what was agreed with an earlier one is void.
        lost_keys: what its prefix cache held when it died.
        scheduled_s: when the engine will be woken, as far as that is on the agenda.
    """

    __slots__ = ("engine", "flights", "index", "is_alive", "life", "lost_keys", "scheduled_s")

    def __init__(self, index: int, engine: CoarseEngine) -> None:
        self.index = index
        self.engine = engine
        self.flights: dict[Flight, None] = {}
        self.is_alive = True
        self.life = 0
        self.lost_keys: list[int] = []
        self.scheduled_s = engine.wake_s


class Legs:
    """Executes routes as sidecars do, one leg after the other, and lives through what goes wrong."""

    def __init__(self, scene: Scene, key_tokens: int, agenda: Agenda, desk: Desk, seed: int) -> None:
        self._scene = scene
        self._agenda = agenda
        self._desk = desk
        self.hosts = tuple(
            Host(index, CoarseEngine(settings, key_tokens, Random(f"{seed}/{index}")))  # noqa: S311 - a seed's
            for index, settings in enumerate(scene.settings)
        )
        self.links = Links([each.link_bytes_per_s for each in scene.settings], agenda, self._moved)
        self.broken: set[tuple[int, int]] = set()
        # When a pair has greeted, by the lives of both.
        self._met: dict[tuple[int, int, int, int], float] = {}

    # Engines.

    def _wake(self, host: Host) -> None:
        if host.engine.wake_s == self._agenda.now_s:
            host.engine.wake()
            self.settle(host)

    def settle(self, host: Host) -> None:
        """After anything happened to an engine: hear its news, and say when it must be woken."""
        engine = host.engine
        while engine.news:
            news, engine.news = engine.news, []
            for kind, sequence in news:
                self._hear(kind, sequence)
        pool = engine.pool
        if pool.stored or pool.removed:
            self._agenda.after(MESSAGE_S, self._tell_cached, (host.index, pool.stored, pool.removed))
            pool.stored, pool.removed = [], []
        if engine.wake_s != host.scheduled_s:
            host.scheduled_s = engine.wake_s
            if engine.wake_s != float("inf"):
                self._agenda.at(engine.wake_s, self._wake, host)

    def _tell_cached(self, news: tuple[int, list[int], list[int]]) -> None:
        self._desk.cached(*news)

    def _hear(self, kind: News, sequence: Sequence) -> None:
        match kind:
            case News.BEGAN:
                if not sequence.is_prefill_leg:
                    sequence.flight.has_output = True
                    self._agenda.after(MESSAGE_S, self._see_first, sequence)
            case News.DONE:
                see = self._see_prefill if sequence.is_prefill_leg else self._see_last
                self._agenda.after(MESSAGE_S, see, sequence)
            case News.FETCH:
                self._greet(sequence)

    # A route's way.

    def send(self, flight: Flight) -> None:
        """Carry out the flight's route, from its first leg."""
        route = flight.route
        assert route is not None, "a flight without a route was sent"
        host = self.hosts[route.decode]
        host.flights[flight] = None
        if host.is_alive:
            self._send_leg(flight)
        else:
            self._agenda.after(MESSAGE_S, self._lose_decode, (flight, flight.turn))

    def _send_leg(self, flight: Flight) -> None:
        """The prefill leg where one is to be tried, else the whole call to its decode place."""
        route = flight.route
        assert route is not None, "a flight without a route was sent"
        place = route.decode if flight.target is None else flight.target
        leg = Sequence(flight.call, flight, place, is_prefill_leg=flight.target is not None)
        flight.leg = leg
        self._agenda.after(MESSAGE_S, self._arrive, leg)
        if flight.target is not None:
            flight.prefill_sent_s = self._agenda.now_s
            deadline = (leg, RungReason.PREFILL_TIMEOUT)
            self._agenda.after(self._scene.prefill_s_max, self._pass_deadline, deadline)

    def _arrive(self, leg: Sequence) -> None:
        if leg.flight.leg is not leg:
            return
        host = self.hosts[leg.place]
        if not host.is_alive:
            self._agenda.after(MESSAGE_S, self._fail_leg, (leg, RungReason.PREFILL_UNREACHABLE))
        elif not host.engine.goal_of(leg.prompt, leg.goal):
            self._finish(leg.flight, is_ok=False)
        elif host.engine.is_full:
            self._agenda.after(MESSAGE_S, self._fail_leg, (leg, RungReason.PREFILL_OVERLOADED))
        else:
            host.engine.submit(leg, self._agenda.now_s)
            self.settle(host)

    def _see_prefill(self, leg: Sequence) -> None:
        """The prefill is done: send the decode leg."""
        flight = leg.flight
        if flight.leg is not leg:
            return
        flight.prefill_done_s = self._agenda.now_s
        flight.cached_tokens = leg.cached_tokens or 0
        flight.source = leg
        pull = Sequence(flight.call, flight, flight.route.decode, awaits_fetch=True)
        flight.leg = pull
        self._agenda.after(MESSAGE_S, self._arrive, pull)
        deadline = (pull, RungReason.TRANSFER_TIMEOUT)
        self._agenda.after(self._scene.transfer_s_max, self._pass_deadline, deadline)

    def _see_first(self, leg: Sequence) -> None:
        flight = leg.flight
        if flight.leg is leg:
            if flight.target is None:
                flight.cached_tokens = leg.cached_tokens or 0
            flight.first_s = self._agenda.now_s
            self._desk.began(flight)

    def _see_last(self, leg: Sequence) -> None:
        if leg.flight.leg is leg:
            leg.flight.output_tokens = leg.goal
            self._finish(leg.flight, is_ok=True)

    def _finish(self, flight: Flight, *, is_ok: bool) -> None:
        self._forget(flight)
        self._desk.ended(flight, is_ok=is_ok)

    def leave(self, flight: Flight) -> bool:
        """The client goes; whether nothing had been answered yet, so that it could."""
        if flight.has_output:
            return False
        self._drop_legs(flight)
        self._forget(flight)
        return True

    def _forget(self, flight: Flight) -> None:
        flight.leg = None
        if flight.route is not None:
            self.hosts[flight.route.decode].flights.pop(flight, None)

    # Hand-over.

    def _greet(self, pull: Sequence) -> None:
        """A pull has its room: greet the producer if it is a stranger, and ask it."""
        source = pull.flight.source
        producer, consumer = self.hosts[source.place], self.hosts[pull.place]
        settings = consumer.engine.settings
        pair = (producer.index, producer.life, consumer.index, consumer.life)
        now_s = self._agenda.now_s
        ready_s = self._met.get(pair)
        if ready_s is None:
            ready_s = self._met[pair] = now_s + 2 * MESSAGE_S + settings.handshake_s
        begin_s = max(now_s, ready_s) + 2 * MESSAGE_S + settings.pull_setup_s
        self._agenda.at(begin_s, self._move, (pull, producer.life))

    def _move(self, due: tuple[Sequence, int]) -> None:
        pull, life = due
        flight = pull.flight
        if flight.leg is not pull:
            return
        source = flight.source
        producer = self.hosts[source.place]
        if producer.life != life or not producer.is_alive or (source.place, pull.place) in self.broken:
            self._take_rung(flight, RungReason.TRANSFER_FAILED)
            return
        settings = producer.engine.settings
        # Whole blocks move, the producer's.
        size = settings.layout.block_tokens
        tokens = -(-pull.fetch_tokens // size) * size
        flight.transfer = self.links.begin(
            source.place, pull.place, tokens * settings.kv_bytes_per_token, pull
        )

    def _moved(self, transfer: Transfer) -> None:
        pull = transfer.subject
        flight = pull.flight
        flight.transfer = None
        source, flight.source = flight.source, None
        self._agenda.after(MESSAGE_S, self._release, source)
        host = self.hosts[pull.place]
        host.engine.fetched(pull, self._agenda.now_s)
        self.settle(host)

    def _release(self, source: Sequence) -> None:
        host = self.hosts[source.place]
        host.engine.release(source, self._agenda.now_s)
        self.settle(host)

    # What goes wrong.

    def _pass_deadline(self, due: tuple[Sequence, RungReason]) -> None:
        leg, reason = due
        if leg.flight.leg is leg and not leg.flight.has_output:
            self._take_rung(leg.flight, reason)

    def _fail_leg(self, due: tuple[Sequence, RungReason]) -> None:
        """A leg was refused or lost before it answered."""
        leg, reason = due
        flight = leg.flight
        if flight.leg is not leg:
            return
        if leg.is_prefill_leg:
            self._take_rung(flight, reason)
        else:
            self._lose_decode((flight, flight.turn))

    def _lose_decode(self, due: tuple[Flight, int]) -> None:
        flight, turn = due
        if flight.turn == turn and flight.fate is None:
            self._drop_legs(flight)
            self._forget(flight)
            self._desk.failed(flight)

    def _take_rung(self, flight: Flight, reason: RungReason) -> None:
        """The prefill or its hand-over failed: try the next target, or the decode place itself."""
        failed = flight.target
        assert failed is not None, "a call of one place has no rung"
        self._drop_legs(flight)
        flight.take_rung(reason, self._scene.places[failed].endpoint.address)
        self._send_leg(flight)

    def _drop_legs(self, flight: Flight) -> None:
        """Cancel whatever runs for a flight."""
        leg, source, transfer = flight.leg, flight.source, flight.transfer
        flight.leg = flight.source = flight.transfer = None
        if transfer is not None:
            self.links.end(transfer)
        if source is not None:
            # A producer is told by a decode that had not begun to pull; else the lease runs out.
            has_pulled = leg is not None and leg.stage in {Stage.FETCHING, Stage.OVER}
            lease_s = self.hosts[source.place].engine.settings.lease_s
            self._agenda.after(lease_s if has_pulled else MESSAGE_S, self._release, source)
        if leg is not None and leg.has_arrived:
            host = self.hosts[leg.place]
            host.engine.abort(leg, self._agenda.now_s)
            self.settle(host)

    def kill(self, index: int) -> None:
        """A place dies with all that it holds."""
        host = self.hosts[index]
        if not host.is_alive:
            return
        host.is_alive = False
        host.life += 1
        host.lost_keys = sorted(host.engine.pool.cached_keys())
        lost = host.engine.kill()
        self.settle(host)
        for transfer in self.links.touching(index):
            if transfer.decode != index:
                self._break(transfer)
        for flight in list(host.flights):
            if flight.has_output:
                self._agenda.after(MESSAGE_S, self._break_off, flight)
                flight.leg = None
            else:
                self._drop_legs(flight)
                self._agenda.after(MESSAGE_S, self._lose_decode, (flight, flight.turn))
        for leg in lost:
            if leg.is_prefill_leg and leg.flight.leg is leg:
                self._agenda.after(MESSAGE_S, self._fail_leg, (leg, RungReason.PREFILL_ERROR))

    def _break(self, transfer: Transfer) -> None:
        self.links.end(transfer)
        pull = transfer.subject
        pull.flight.transfer = None
        self._agenda.after(MESSAGE_S, self._fail_pull, pull)

    def _fail_pull(self, pull: Sequence) -> None:
        if pull.flight.leg is pull:
            self._take_rung(pull.flight, RungReason.TRANSFER_FAILED)

    def _break_off(self, flight: Flight) -> None:
        if flight.fate is None:
            self._finish(flight, is_ok=False)

    def start(self, index: int) -> None:
        """A dead place comes back, empty; it says so to who follows its KV events."""
        host = self.hosts[index]
        if not host.is_alive:
            host.is_alive = True
            self._agenda.after(MESSAGE_S, self._tell_cached, (index, [], host.lost_keys))
            host.lost_keys = []

    def break_path(self, prefill: int, decode: int) -> None:
        """No KV passes between these two any more; what is under way breaks."""
        self.broken.add((prefill, decode))
        for transfer in self.links.between(prefill, decode):
            self._break(transfer)

    def slow(self, index: int, factor: float) -> None:
        """An engine runs at this share of its speed."""
        host = self.hosts[index]
        host.engine.slow(1.0 / factor, self._agenda.now_s)
        self.settle(host)

    def validate(self) -> None:
        """Assert every account of engines, links and flights."""
        self.links.validate()
        for host in self.hosts:
            host.engine.validate()
            for flight in host.flights:
                assert flight.fate is None, "an ended flight is still on a place"
                assert flight.route is not None, "a flight is on a place without a route"
                assert flight.route.decode == host.index, "a flight is on another's place"
