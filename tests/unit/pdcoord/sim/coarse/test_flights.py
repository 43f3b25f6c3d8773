"""A flight's book: routes anew, rungs in order, and what is reported in the end."""

from collections.abc import Callable

from pdcoord.core.fleet import Role
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind
from pdcoord.sim.coarse.flights import Flight
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.routers.base import Route
from pdcoord.sim.study.results import Fate
from pdcoord.sim.workload.call import Call

NOBODY = HostPort("10.9.9.9:1")


def test_rungs_are_taken_in_order_and_end_on_the_decode_place(call_of: Callable[..., Call]) -> None:
    flight = Flight(call_of(1, 100, 5))
    flight.take_route(Route(3, 0, "because", (1,)), 2.0)
    assert (flight.target, flight.why, flight.routed_s) == (0, "because", 2.0)
    flight.take_rung(RungReason.PREFILL_ERROR, NOBODY)
    assert (flight.target, flight.fell_back) == (1, False)
    flight.take_rung(RungReason.TRANSFER_FAILED, NOBODY)
    assert (flight.target, flight.fell_back) == (None, True)
    served = flight.served(None, 3.0)
    assert served.mode is Mode.COLOCATED
    assert [(rung.rung, rung.reason) for rung in served.rungs] == [
        (RungKind.OTHER_PREFILL, RungReason.PREFILL_ERROR),
        (RungKind.COLOCATED, RungReason.TRANSFER_FAILED),
    ]


def test_another_route_forgets_the_first_but_not_when_that_was_found(call_of: Callable[..., Call]) -> None:
    flight = Flight(call_of(1, 100, 5))
    flight.take_route(Route(3, 0), 2.0)
    flight.take_rung(RungReason.PREFILL_ERROR, NOBODY)
    flight.take_route(Route(2, 2, "again"), 4.0)
    assert (flight.turn, flight.tries, flight.routed_s) == (2, 2, 2.0)
    assert (flight.rungs, flight.fell_back, flight.target) == ([], False, None)


def test_what_is_reported(scene_of: Callable[..., Scene], call_of: Callable[..., Call]) -> None:
    places = tuple(scene_of(Role.PREFILL, Role.DECODE).places)
    flight = Flight(call_of(7, 100, 5, at_s=1.0, kind="chat", tenant="t", priority=2, tpot_s_max=0.5))
    waiting = flight.result(places, 2.0, 0.1)
    assert (waiting.fate, waiting.decode, waiting.prefill) == (Fate.UNFINISHED, "", "")
    flight.take_route(Route(1, 0, "split"), 1.5)
    flight.first_s, flight.ended_s, flight.fate = 2.0, 4.0, Fate.OK
    found = flight.result(places, 2.0, 0.1)
    assert (found.id, found.kind, found.tenant, found.priority) == (7, "chat", "t", 2)
    assert (found.prefill, found.decode, found.why) == ("p0/e0", "p1/e1", "split")
    assert (found.ttft_s, found.tpot_s, found.ttft_s_max, found.tpot_s_max) == (1.0, 0.5, 2.0, 0.5)
    flight.prefill_sent_s, flight.prefill_done_s, flight.cached_tokens = 1.5, 1.75, 64
    served = flight.served(places[0].endpoint.address, 2.0)
    assert (served.mode, served.prefill) == (Mode.SPLIT, "10.0.0.0:8000")
    assert (served.prefill_ms, served.transfer_ms, served.cached_tokens) == (250.0, 250.0, 64)
