"""Whole small runs: every account holds after every event, and each call ends once, whatever goes wrong."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import Mode, RungKind
from pdcoord.sim.coarse.cluster import Cluster, run
from pdcoord.sim.coarse.scene import Scene, Trouble, TroubleKind
from pdcoord.sim.routers.base import Hold, Route, Shed, Surroundings
from pdcoord.sim.study.results import Fate
from pdcoord.sim.workload.call import Call

Make = Callable[..., Any]
MESSAGE_S = 0.0005


def test_a_call_on_one_place(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    router = told({1: Route(0, why="here")})
    cluster = cluster_of(scene_of(Role.BOTH), router, listed([call_of(1, 200, 11, at_s=1.0)]))
    counts: list[int] = []
    cluster.run(progress=counts.append)
    (flight,) = cluster.flights
    prefill_s = 0.004 + 200 * 0.0001
    assert flight.fate is Fate.OK
    assert flight.first_s == pytest.approx(1.0 + prefill_s + 2 * MESSAGE_S)
    assert flight.ended_s == pytest.approx(1.0 + prefill_s + 10 * 0.011 + 2 * MESSAGE_S, rel=0.01)
    assert router.served[1].mode is Mode.COLOCATED
    assert [each[0] for each in router.of("route", "began", "ended")] == ["route", "began", "ended"]
    assert router.of("ended") == [("ended", 1, 11, True)]
    assert counts == [1]


def test_a_split_call_pays_prefill_greeting_transfer_and_step(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    router = told({1: Route(1, 0)})
    calls = [call_of(1, 160, 5), call_of(2, 160, 5, at_s=10.0)]
    scene = scene_of(Role.PREFILL, Role.DECODE, engine={"handshake_s": 0.2, "pull_setup_s": 0.01})
    cluster = cluster_of(scene, router, listed(calls))
    cluster.run()
    first, second = cluster.flights
    prefill_s, transfer_s, step_s = 0.020, 0.160, 0.011
    # Two legs' ways there and back, a greeting's and an asking's.
    known_s = prefill_s + transfer_s + step_s + 0.01 + 6 * MESSAGE_S
    assert second.first_s == pytest.approx(10.0 + known_s, abs=1e-3)
    assert first.first_s == pytest.approx(known_s + 0.2 + 2 * MESSAGE_S, abs=1e-3)
    served = router.served[2]
    assert (served.mode, served.prefill, served.rungs) == (Mode.SPLIT, "10.0.0.0:8000", ())
    assert served.prefill_ms == pytest.approx(20.0 + 1.0)
    assert served.transfer_ms == pytest.approx(160.0 + 11.0 + 10.0 + 2.0, abs=0.5)


def test_what_the_decode_place_has_cached_is_not_moved(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    keys = tuple(range(10))
    router = told({1: Route(1, 0)})
    calls = [call_of(1, 165, 5, keys=keys), call_of(2, 165, 5, at_s=10.0, keys=keys)]
    cluster = cluster_of(scene_of(Role.PREFILL, Role.DECODE), router, listed(calls))
    cluster.run()
    first, second = cluster.flights
    assert second.first_s - 10.0 < 0.05 < first.first_s
    assert second.cached_tokens == 160
    stored = [each for each in router.of("cached") if each[2]]
    assert stored == [("cached", 0, keys, ()), ("cached", 1, keys, ())]


def test_calls_are_held_shed_and_followed(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    held = call_of(1, 100, 5)
    router = told({1: Hold(), 2: Shed("too-much"), 3: Route(0)}, wakes_s=4.0)
    router.held.append((held, Route(0, why="at last")))
    following = {2: call_of(3, 100, 5, at_s=0.5)}
    cluster = cluster_of(scene_of(Role.BOTH), router, listed([held, call_of(2, 100, 5, at_s=1.0)], following))
    cluster.run()
    first, shed, after = cluster.flights
    assert (first.fate, first.why, first.routed_s) == (Fate.OK, "at last", 4.0)
    assert (shed.fate, shed.why, shed.ended_s) == (Fate.SHED, "too-much", 1.0)
    assert (after.call.at_s, after.fate) == (1.5, Fate.OK)


def test_a_client_without_patience_leaves_held_or_routed(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    calls = [call_of(n, 100, 400, at_s=0.01 * n) for n in range(1, 5)]
    router = told({1: Route(0), 2: Route(0), 3: Hold()}, wakes_s=5.0)
    router.held.append((calls[2], Route(0)))
    scene = scene_of(Role.BOTH, engine={"running_max": 1}, sheds_after_s=1.0)
    cluster = cluster_of(scene, router, listed(calls[:3]))
    cluster.run()
    assert [flight.fate for flight in cluster.flights] == [Fate.OK, Fate.FAILED, Fate.FAILED]
    assert cluster.flights[1].ended_s == pytest.approx(1.02)
    assert router.of("ended")[0] == ("ended", 2, 0, False)


def test_a_call_that_is_held_for_ever_is_unfinished(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    cluster = cluster_of(scene_of(Role.BOTH), told({1: Hold()}), listed([call_of(1, 10, 5)]))
    cluster.run()
    assert cluster.flights[0].fate is None
    early = cluster_of(scene_of(Role.BOTH), told({1: Route(0)}), listed([call_of(1, 10, 500)]))
    early.run(until_s=0.5)
    assert (early.flights[0].fate, early.flights[0].has_begun) == (None, True)


def test_a_prompt_beyond_the_context_fails_and_an_answer_is_cut(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    calls = [call_of(1, 4_000, 5), call_of(2, 2_040, 50)]
    cluster = cluster_of(scene_of(Role.BOTH), told({1: Route(0)}), listed(calls))
    cluster.run()
    assert [flight.fate for flight in cluster.flights] == [Fate.FAILED, Fate.OK]
    assert cluster.flights[1].output_tokens == 8


def trouble_of(kind: TroubleKind, at_s: float, place: int, **more: Any) -> Trouble:
    return Trouble(at_s, kind, place, **more)


def test_a_killed_prefill_turns_to_another_and_then_to_the_decode_place(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    kills = (trouble_of(TroubleKind.KILL, 0.01, 0), trouble_of(TroubleKind.KILL, 0.02, 1))
    scene = scene_of(Role.PREFILL, Role.PREFILL, Role.DECODE, troubles=kills)
    router = told({1: Route(2, 0, other_prefills=(1,))})
    cluster = cluster_of(scene, router, listed([call_of(1, 400, 5)]))
    cluster.run()
    (flight,) = cluster.flights
    assert (flight.fate, flight.fell_back) == (Fate.OK, True)
    rungs = [(rung.rung, rung.reason, rung.target) for rung in router.served[1].rungs]
    assert rungs == [
        (RungKind.OTHER_PREFILL, RungReason.PREFILL_ERROR, "10.0.0.0:8000"),
        (RungKind.COLOCATED, RungReason.PREFILL_ERROR, "10.0.0.1:8000"),
    ]


@pytest.mark.parametrize("at_s", [0.0, 0.3])
def test_a_broken_path_is_a_failed_transfer(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make, at_s: float
) -> None:
    cut = trouble_of(TroubleKind.BREAK_PATH, at_s, 0, other=1, ends_s=5.0)
    router = told({1: Route(1, 0)})
    calls = [call_of(1, 400, 5), call_of(2, 400, 5, at_s=6.0)]
    cluster = cluster_of(scene_of(Role.PREFILL, Role.DECODE, troubles=[cut]), router, listed(calls))
    cluster.run()
    first, second = cluster.flights
    assert [rung.reason for rung in router.served[1].rungs] == [RungReason.TRANSFER_FAILED]
    assert (first.fell_back, second.fell_back) == (True, False)
    assert router.served[2].mode is Mode.SPLIT


def test_late_hand_overs_meet_their_deadlines(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    router = told({1: Route(1, 0)})
    scene = scene_of(Role.PREFILL, Role.DECODE, engine={"link_bytes_per_s": 1e3}, transfer_s_max=0.7)
    cluster = cluster_of(scene, router, listed([call_of(1, 400, 5)]))
    cluster.run()
    assert [rung.reason for rung in router.served[1].rungs] == [RungReason.TRANSFER_TIMEOUT]
    slow = trouble_of(TroubleKind.SLOW_ENGINE, 0.0, 0, factor=0.01)
    scene = scene_of(Role.PREFILL, Role.DECODE, troubles=[slow], prefill_s_max=0.5)
    cluster = cluster_of(scene, router, listed([call_of(1, 400, 5)]))
    cluster.run()
    assert [rung.reason for rung in router.served[1].rungs] == [RungReason.PREFILL_TIMEOUT]


def test_a_killed_decode_place_breaks_streams_off_and_fails_the_others_over(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    kill = trouble_of(TroubleKind.KILL, 0.5, 0, ends_s=0.9)
    calls = [call_of(1, 100, 200), call_of(2, 100, 10, at_s=0.499), call_of(3, 100, 10, at_s=0.6)]
    router = told({1: Route(0)}, again=[Route(1, why="other"), Route(1)])
    scene = scene_of(Role.BOTH, Role.BOTH, troubles=[kill])
    cluster = cluster_of(scene, router, listed(calls))
    cluster.run()
    assert [flight.fate for flight in cluster.flights] == [Fate.FAILED, Fate.OK, Fate.OK]
    assert [each[1] for each in router.of("failed")] == [2, 3]
    assert router.of("ended")[0] == ("ended", 1, 0, False)
    assert any(each[1:3] == (0, None) for each in router.of("sampled"))


def test_nobody_left_is_a_failure(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    kill = trouble_of(TroubleKind.KILL, 0.0, 0)
    scene = scene_of(Role.BOTH, troubles=[kill])
    gives_up = cluster_of(scene, told({1: Route(0)}), listed([call_of(1, 100, 5, at_s=1.0)]))
    gives_up.run()
    assert (gives_up.flights[0].fate, gives_up.flights[0].why) == (Fate.FAILED, "nobody-left")
    insists = told({1: Route(0)}, again=[Route(0)] * 9)
    cluster = cluster_of(scene, insists, listed([call_of(1, 100, 5, at_s=1.0)]))
    cluster.run()
    assert cluster.flights[0].fate is Fate.FAILED
    assert len(insists.of("failed")) == 1


def test_a_full_queue_fails_over(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    calls = [call_of(n, 100, 50) for n in range(1, 4)]
    router = told({1: Route(0)}, again=[Route(1)])
    scene = scene_of(Role.BOTH, Role.BOTH, engine={"running_max": 1, "queued_max": 1})
    cluster = cluster_of(scene, router, listed(calls))
    cluster.run()
    assert [flight.fate for flight in cluster.flights] == [Fate.OK] * 3
    assert [each[1] for each in router.of("failed")] == [3]


def test_signals_are_as_old_as_the_scene_says(
    cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    router = told({1: Route(0)})
    scene = scene_of(Role.BOTH, signal_age_s=5.0, scrape_interval_s=0.5)
    cluster = cluster_of(scene, router, listed([call_of(1, 100, 900)]))
    cluster.run()
    samples = router.of("sampled")
    assert samples[0][2:] == (samples[0][2], 0.0)
    assert {round(now_s - sample.at_s, 6) for _, _, sample, now_s in samples[1:]} == {5.0}
    assert samples[2][2].running == 1


def draw(seed: int, scene_of: Make, told: Make, listed: Make, call_of: Make) -> tuple[Scene, Any, Any]:
    """A fleet, its traffic, where it goes and what goes wrong, from a seed."""
    rng = Random(seed)
    roles = [Role.BOTH, *(rng.choice(list(Role)) for _ in range(rng.randrange(1, 5)))]
    decodes = [index for index, role in enumerate(roles) if role is not Role.PREFILL]
    workers = [index for index, role in enumerate(roles) if role is not Role.DECODE]
    calls, routes, at_s = [], {}, 0.0
    for number in range(60):
        at_s += rng.expovariate(12.0)
        prompt = rng.randrange(1, 400)
        keys = tuple(rng.randrange(3) * 100 + index for index in range(prompt // 16))
        keys = tuple(keys[0] // 100 * 100 + index for index in range(len(keys)))
        after = (*keys, number * 1_000 + 500) if rng.random() < 0.3 else ()
        calls.append(call_of(number, prompt, rng.randrange(1, 80), at_s=at_s, keys=keys, keys_after=after))
        prefill = rng.choice([None, rng.choice(workers)])
        others = tuple(rng.sample(workers, rng.randrange(min(3, len(workers) + 1))))
        routes[number] = Route(rng.choice(decodes), prefill, "drawn", others)
    troubles = [
        Trouble(
            at_s=rng.uniform(0.0, at_s),
            kind=rng.choice(list(TroubleKind)),
            place=rng.randrange(len(roles)),
            other=rng.randrange(len(roles)),
            factor=rng.choice([0.1, 0.5]),
            ends_s=rng.choice([None, at_s + 2.0]),
        )
        for _ in range(rng.randrange(6))
    ]
    engine = {
        "block_total": rng.choice([40, 256]),
        "context_tokens_max": 512,
        "running_max": rng.choice([2, 8]),
        "step_tokens_max": rng.choice([64, 512]),
        "queued_max": rng.choice([3, 100]),
        "lease_s": rng.choice([0.5, 5.0]),
    }
    scene = scene_of(
        *roles,
        engine=engine,
        troubles=troubles,
        transfer_s_max=rng.choice([0.5, 20.0]),
        sheds_after_s=rng.choice([None, 2.0]),
        signal_age_s=rng.choice([0.0, 1.0]),
    )
    router = told(routes, again=[Route(rng.choice(decodes)) for _ in range(40)])
    return scene, router, listed(calls)


@pytest.mark.parametrize("seed", range(25))
def test_each_call_ends_once_whatever_goes_wrong(
    seed: int, cluster_of: Make, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    scene, router, workload = draw(seed, scene_of, told, listed, call_of)
    cluster: Cluster = cluster_of(scene, router, workload)
    cluster.run()
    assert len(cluster.flights) == 60
    fates = {flight.call.id: flight.fate for flight in cluster.flights}
    assert set(fates.values()) <= {Fate.OK, Fate.FAILED}
    told_ends = [each[1] for each in router.of("ended")]
    assert len(told_ends) == len(set(told_ends))
    ok = {number for number, fate in fates.items() if fate is Fate.OK}
    assert ok == {each[1] for each in router.of("ended") if each[3]}
    assert ok
    for host in cluster.legs.hosts:
        assert not host.flights
        assert (host.engine.running_count, host.engine.waiting_count) == (0, 0)


@pytest.mark.parametrize("seed", [4, 11])
def test_a_seed_gives_the_same_run_again(
    seed: int, scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    def results() -> tuple[Any, Any]:
        scene, router, workload = draw(seed, scene_of, told, listed, call_of)
        surroundings = Surroundings(scene.places, 16, [[True] * len(scene.places)] * len(scene.places), seed)
        found = run(scene, router, workload, surroundings=surroundings, ttft_s_max=1.0, tpot_s_max=0.1)
        return found, router.heard

    assert results() == results()


def test_what_does_not_fit_together_is_refused(
    scene_of: Make, told: Make, listed: Make, call_of: Make
) -> None:
    scene = scene_of(Role.BOTH)
    with pytest.raises(ValueError, match="key_tokens is 32"):
        run(scene, told({}), listed([]), surroundings=Surroundings(scene.places, 32, [[False]]))
    lame = Scene(scene.places, ())
    with pytest.raises(ValueError, match="settings has 0 entries"):
        run(lame, told({}), listed([]), surroundings=Surroundings(scene.places, 16, [[False]]))
    assert isinstance(call_of(1, 1, 1), Call)
