"""A whole fleet under traffic in virtual time: calls come, a router sends them, and what came of each."""

import math
from collections.abc import Callable, Sequence

from pdcoord.core.fleet import Sample
from pdcoord.sim.coarse.agenda import Agenda
from pdcoord.sim.coarse.flights import Flight
from pdcoord.sim.coarse.legs import Legs
from pdcoord.sim.coarse.scene import Scene, Trouble, TroubleKind
from pdcoord.sim.routers.base import Hold, Route, Router, Shed, Surroundings
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.workload.call import Call, Workload

QUIET_S = 600.0
"""A run in which nothing came, began or ended for so long is over: whoever is left waits for ever."""
PROGRESS_CALLS = 100
"""Calls that end between two reports of progress."""


class Cluster:
    """One run. `run` may be called once."""

    def __init__(self, scene: Scene, router: Router, workload: Workload, surroundings: Surroundings) -> None:
        place_count = len(scene.places)
        if place_count != len(scene.settings):
            raise ValueError(
                f"settings has {len(scene.settings)} entries, expected one for each of {place_count} places"
            )
        if workload.key_tokens != surroundings.key_tokens:
            raise ValueError(
                f"key_tokens is {surroundings.key_tokens}, expected the workload's {workload.key_tokens}"
            )
        self.agenda = Agenda()
        self.flights: list[Flight] = []
        self.legs = Legs(scene, surroundings.key_tokens, self.agenda, self, surroundings.seed)
        self._scene = scene
        self._router = router
        self._workload = workload
        self._calls = workload.calls()
        self._held: dict[int, Flight] = {}
        self._open_count = 0
        self._to_come = 0
        self._done_count = 0
        self._asked_s = math.inf
        self._moved_s = 0.0
        self._progress: Callable[[int], None] | None = None

    def run(self, until_s: float | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Let it all happen, until every call has ended or `until_s`."""
        self._progress = progress
        agenda = self.agenda
        for trouble in self._scene.troubles:
            agenda.at(trouble.at_s, self._strike, trouble)
        # What a router knows before the first call: that all places are there and idle.
        for host in self.legs.hosts:
            self._router.sampled(host.index, host.engine.sample(0.0), 0.0)
        self._scrape()
        self._call_next()
        while (next_s := agenda.next_s()) is not None and (until_s is None or next_s <= until_s):
            if not self._open_count and not self._to_come:
                break
            if next_s - self._moved_s > QUIET_S and not self._to_come:
                break
            do, subject = agenda.take()
            do(subject)
        if progress is not None:
            progress(self._done_count)

    # Calls come.

    def _call_next(self) -> None:
        call = next(self._calls, None)
        if call is not None:
            self._to_come += 1
            self.agenda.at(call.at_s, self._arrive_first, call)

    def _arrive_first(self, call: Call) -> None:
        self._call_next()
        self._arrive(call)

    def _arrive(self, call: Call) -> None:
        self._to_come -= 1
        self._open_count += 1
        flight = Flight(call)
        self.flights.append(flight)
        self._moved_s = self.agenda.now_s
        if self._scene.sheds_after_s is not None:
            self.agenda.after(self._scene.sheds_after_s, self._lose_patience, flight)
        answer = self._router.route(call, self.agenda.now_s)
        if isinstance(answer, Hold):
            self._held[call.id] = flight
        else:
            self._take_answer(flight, answer)
        self._ask_released()

    def _take_answer(self, flight: Flight, answer: Route | Shed) -> None:
        if isinstance(answer, Route):
            flight.take_route(answer, self.agenda.now_s)
            self.legs.send(flight)
        else:
            flight.why = answer.why
            self._end(flight, Fate.SHED if flight.route is None else Fate.FAILED)

    def _ask_released(self) -> None:
        """Calls that were held and may go now; and when to ask again."""
        if not self._held:
            return
        router, now_s = self._router, self.agenda.now_s
        for call, answer in router.released(now_s).routes:
            flight = self._held.pop(call.id)
            if flight.fate is None:
                self._take_answer(flight, answer)
            elif isinstance(answer, Route):
                # Its client has left meanwhile.
                router.ended(call, answer, 0, now_s, is_ok=False)
        next_s = router.next_event_s() if self._held else None
        if next_s is not None and next_s != self._asked_s:
            self._asked_s = next_s
            self.agenda.at(max(next_s, now_s), self._ask_again, next_s)

    def _ask_again(self, asked_s: float) -> None:
        if self._asked_s == asked_s:
            self._asked_s = math.inf
        self._ask_released()

    def _lose_patience(self, flight: Flight) -> None:
        if flight.fate is not None:
            return
        route = flight.route
        if route is not None:
            if not self.legs.leave(flight):
                return
            self._router.ended(flight.call, route, 0, self.agenda.now_s, is_ok=False)
        self._end(flight, Fate.FAILED)
        self._ask_released()

    # What legs tell.

    def began(self, flight: Flight) -> None:
        route = flight.route
        assert route is not None, "a call began that was sent nowhere"
        now_s = self.agenda.now_s
        self._moved_s = now_s
        flight.has_begun = True
        target = flight.target
        prefill = None if target is None else self._scene.places[target].endpoint.address
        self._router.began(flight.call, route, flight.served(prefill, now_s), now_s)
        self._ask_released()

    def ended(self, flight: Flight, *, is_ok: bool) -> None:
        route = flight.route
        assert route is not None, "a call ended that was sent nowhere"
        output_tokens = flight.output_tokens if is_ok else 0
        self._router.ended(flight.call, route, output_tokens, self.agenda.now_s, is_ok=is_ok)
        self._end(flight, Fate.OK if is_ok else Fate.FAILED)
        self._ask_released()

    def failed(self, flight: Flight) -> None:
        route = flight.route
        assert route is not None, "a call failed that was sent nowhere"
        if flight.tries > len(self._scene.places):
            self.ended(flight, is_ok=False)
            return
        self._take_answer(flight, self._router.failed(flight.call, route, self.agenda.now_s))
        self._ask_released()

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        self._router.cached(index, stored, removed, self.agenda.now_s)

    def _end(self, flight: Flight, fate: Fate) -> None:
        now_s = self.agenda.now_s
        flight.fate = fate
        flight.ended_s = now_s
        self._moved_s = now_s
        self._open_count -= 1
        self._done_count += 1
        if self._progress is not None and self._done_count % PROGRESS_CALLS == 0:
            self._progress(self._done_count)
        following = self._workload.after(flight.call, now_s)
        if following is not None:
            self._to_come += 1
            self.agenda.at(max(following.at_s, now_s), self._arrive, following)

    # Signals.

    def _scrape(self, _subject: None = None) -> None:
        """Sample every engine; the router hears of it when the signal is as old as the scene says."""
        now_s = self.agenda.now_s
        samples = [host.engine.sample(now_s) if host.is_alive else None for host in self.legs.hosts]
        if self._scene.signal_age_s > 0.0:
            self.agenda.after(self._scene.signal_age_s, self._tell_samples, samples)
        else:
            self._tell_samples(samples)
        self.agenda.after(self._scene.scrape_interval_s, self._scrape)

    def _tell_samples(self, samples: list[Sample | None]) -> None:
        now_s = self.agenda.now_s
        for index, sample in enumerate(samples):
            self._router.sampled(index, sample, now_s)
        self._ask_released()

    # Trouble.

    def _strike(self, trouble: Trouble) -> None:
        legs, place = self.legs, trouble.place
        match trouble.kind:
            case TroubleKind.KILL:
                legs.kill(place)
            case TroubleKind.SLOW_ENGINE:
                legs.slow(place, trouble.factor)
            case TroubleKind.SLOW_LINK:
                legs.links.slow(place, trouble.factor)
            case TroubleKind.BREAK_PATH:
                assert trouble.other is not None, "a path has two ends"
                legs.break_path(place, trouble.other)
        if trouble.ends_s is not None:
            self.agenda.at(trouble.ends_s, self._mend, trouble)

    def _mend(self, trouble: Trouble) -> None:
        legs, place = self.legs, trouble.place
        match trouble.kind:
            case TroubleKind.KILL:
                legs.start(place)
            case TroubleKind.SLOW_ENGINE:
                legs.slow(place, 1.0)
            case TroubleKind.SLOW_LINK:
                legs.links.slow(place, 1.0)
            case TroubleKind.BREAK_PATH:
                assert trouble.other is not None, "a path has two ends"
                legs.broken.discard((place, trouble.other))

    def validate(self) -> None:
        """Assert every account: tests call this after every event."""
        self.legs.validate()
        open_flights = [flight for flight in self.flights if flight.fate is None]
        assert len(open_flights) == self._open_count, "calls are miscounted"
        for flight in open_flights:
            is_held = self._held.get(flight.call.id) is flight
            assert is_held != (flight.route is not None), "a call is neither held nor routed, or both"


def run(
    scene: Scene,
    router: Router,
    workload: Workload,
    *,
    surroundings: Surroundings,
    until_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    ttft_s_max: float | None = None,
    tpot_s_max: float | None = None,
) -> list[CallResult]:
    """Simulate a workload on a fleet under a router.

    Deterministic: equal arguments give equal results, as far as router and workload do.

    Args:
        surroundings: those that the router was made with.
        until_s: calls that have not ended by then are unfinished; None to wait for all.
        progress: called with the number of calls that have ended, now and then and at the end.
        ttft_s_max: objective of calls that have none of their own; tpot_s_max alike.

    Returns:
        One result for each call that arrived, in that order.

    Raises:
        ValueError: if scene and surroundings, or workload and surroundings, do not fit together.
    """
    cluster = Cluster(scene, router, workload, surroundings)
    cluster.run(until_s, progress)
    places = tuple(scene.places)
    return [flight.result(places, ttft_s_max, tpot_s_max) for flight in cluster.flights]
