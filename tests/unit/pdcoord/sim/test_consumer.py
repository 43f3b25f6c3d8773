"""The decode side, against real producers: pulls, handshakes, failures, rooms."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.messages import (
    Abort,
    AskHandshake,
    AskPull,
    ClosePull,
    EngineRequest,
    FailReason,
    HandshakeAnswered,
    LinkSlowed,
    PullCancelled,
    PullGrant,
    PullGranted,
    Rejected,
    RequestDone,
    RequestFailed,
    RoomCall,
    Submit,
    TransferDone,
)
from pdcoord.sim.settings import LoadFailurePolicy
from transfer.layout import KvDtype, KvLayout
from transfer.verdict import Connector

SGLANG: dict[str, Any] = {"engine": EngineKind.SGLANG, "connector": Connector.SGLANG}
RECOMPUTE = {"load_failure_policy": LoadFailurePolicy.RECOMPUTE}


def colocated(bench: Any, prompt: Any, count: int) -> list[int]:
    """What an engine alone answers."""
    if "alone" not in bench.cluster.names():
        bench.start("alone")
    name = f"alone-{len(bench.outputs)}"
    bench.submit("alone", name, prompt, output_tokens_max=count)
    bench.run(5.0)
    return list(bench.tokens(name))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 128, 129, 1_000])
@pytest.mark.parametrize(("produced", "consumed"), [(16, 16), (128, 16), (16, 128)])
def test_a_split_answer_equals_a_colocated_one(bench: Any, length: int, produced: int, consumed: int) -> None:
    producer = bench.start("p", block_tokens=produced)
    consumer = bench.start("d", block_tokens=consumed)
    ticket = bench.prefill("p", "leg", range(length))
    bench.submit("d", "r", range(length), ticket=ticket, output_tokens_max=20)
    bench.run(10.0)
    assert bench.tokens("r") == colocated(bench, range(length), 20)
    assert bench.tokens("leg") == bench.tokens("r")[:1]
    assert bench.done("r").external_tokens == length
    assert producer.pool.pinned_count == 0
    assert consumer.pool.usage == 0.0
    assert consumer.counters.computed_tokens == 0


def test_the_time_of_a_hand_over_is_handshake_setup_transfer_and_a_step(bench: Any) -> None:
    bench.start("p", link_bytes_per_s=1e6)
    consumer = bench.start("d", link_bytes_per_s=5e5, handshake_s=0.5)
    ticket = bench.prefill("p", "leg", range(160))
    began_s = bench.now_s
    bench.submit("d", "r", range(160), ticket=ticket, output_tokens_max=1)
    bench.run(10.0)
    transfer_s = 160 * 1_000 / 5e5  # The slower NIC decides.
    step_s = consumer.settings.speed.step_s(1, 159)
    assert bench.done("r").at_s - began_s == pytest.approx(0.5 + 0.001 + transfer_s + step_s)
    (transfer,) = bench.of(TransferDone)
    assert (transfer.transfer_bytes, transfer.descriptor_count) == (160_000, 10)
    assert transfer.transfer_s == pytest.approx(transfer_s)
    # The second request of the pair needs no handshake.
    ticket = bench.prefill("p", "leg-2", range(1_000, 1_160))
    began_s = bench.now_s
    bench.submit("d", "again", range(1_000, 1_160), ticket=ticket, output_tokens_max=1)
    bench.run(10.0)
    assert bench.done("again").at_s - began_s == pytest.approx(0.001 + transfer_s + step_s)


def test_concurrent_pulls_share_the_producers_nic(bench: Any) -> None:
    bench.start("p", link_bytes_per_s=1e6)
    for name in ("d1", "d2"):
        bench.start(name, link_bytes_per_s=1e9)
        warm = bench.prefill("p", f"warm-{name}", range(10))
        bench.submit(name, f"first-{name}", range(10), ticket=warm, output_tokens_max=1)
        bench.run(5.0)
    tickets = {
        name: bench.prefill("p", f"leg-{name}", range(n, n + 160)) for n, name in enumerate(["d1", "d2"])
    }
    before = len(bench.of(TransferDone))
    for n, name in enumerate(tickets):
        bench.submit(name, name, range(n, n + 160), ticket=tickets[name], output_tokens_max=1)
    bench.run(10.0)
    for transfer in bench.of(TransferDone)[before:]:
        assert transfer.transfer_s == pytest.approx(2 * 160_000 / 1e6)


def test_only_what_the_local_cache_lacks_is_moved(bench: Any) -> None:
    bench.start("p")
    bench.start("d")
    bench.submit("d", "turn-1", range(96), output_tokens_max=1)
    ticket = bench.prefill("p", "leg", range(160))
    bench.submit("d", "turn-2", range(160), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    done = bench.done("turn-2")
    assert (done.cached_tokens, done.external_tokens) == (96, 64)
    assert bench.of(TransferDone)[0].transfer_bytes == 64_000
    assert bench.tokens("turn-2") == colocated(bench, range(160), 5)


def test_a_ticket_whose_tokens_are_all_here_is_released_and_not_pulled(bench: Any) -> None:
    producer = bench.start("p")
    bench.start("d")
    bench.submit("d", "turn-1", range(200), output_tokens_max=1)
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "turn-2", range(200), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    assert bench.of(TransferDone) == []
    assert producer.pool.pinned_count == 0
    assert bench.tokens("turn-2") == colocated(bench, range(200), 5)


def test_the_rest_of_a_longer_prompt_is_computed_here(bench: Any) -> None:
    bench.start("p")
    consumer = bench.start("d")
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "r", range(250), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    assert bench.tokens("r") == colocated(bench, range(250), 5)
    assert bench.done("r").external_tokens == 100
    assert consumer.counters.computed_tokens == 150


def test_another_prompts_kv_gives_other_tokens_and_poisons_the_cache(bench: Any) -> None:
    bench.start("p")
    bench.start("d")
    ticket = bench.prefill("p", "leg", range(100))
    mixed_up = range(500, 600)
    bench.submit("d", "wrong", mixed_up, ticket=ticket, output_tokens_max=10)
    bench.run(10.0)
    right = colocated(bench, mixed_up, 10)
    assert bench.tokens("wrong") != right
    bench.submit("d", "later", mixed_up, output_tokens_max=10)
    bench.run(10.0)
    assert bench.done("later").cached_tokens == 96
    assert bench.tokens("later") != right


@pytest.mark.parametrize("policy", list(LoadFailurePolicy))
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"engine_id": "p-0"}, FailReason.HANDSHAKE_FAILED),
        ({"request_id": "forged"}, FailReason.PULL_DENIED),
        ({"block_ids": ((9, 8),)}, FailReason.PULL_DENIED),
        ({"address": HostPort("nobody:1")}, FailReason.HANDSHAKE_FAILED),
    ],
)
def test_a_ticket_that_does_not_hold_fails_or_is_computed_here(
    bench: Any, broken: dict[str, Any], reason: FailReason, policy: LoadFailurePolicy
) -> None:
    bench.start("p")
    consumer = bench.start("d", load_failure_policy=policy)
    ticket = replace(bench.prefill("p", "leg", range(100)), **broken)
    bench.submit("d", "r", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    assert consumer.counters.failed_transfers == 1
    if policy is LoadFailurePolicy.FAIL:
        assert [out.reason for out in bench.of(RequestFailed)] == [reason]
    else:
        assert bench.of(RequestFailed) == []
        assert bench.tokens("r") == colocated(bench, range(100), 5)
        assert bench.done("r").external_tokens == 0
    assert consumer.pool.usage == 0.0


def test_an_expired_lease_fails_the_pull(bench: Any) -> None:
    bench.start("p", lease_s=10.0)
    bench.start("d")
    ticket = bench.prefill("p", "leg", range(100))
    bench.run(30.0)
    bench.submit("d", "r", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    (failed,) = bench.of(RequestFailed)
    assert failed.reason is FailReason.PULL_DENIED
    assert "lease-expired" in failed.detail


def test_a_queued_decode_keeps_its_ticket_alive(bench: Any) -> None:
    producer = bench.start("p", lease_s=6.0)
    bench.start("d", lease_s=6.0, running_max=1, block_total=128)
    bench.submit("d", "busy", range(500), output_tokens_max=1_400)
    ticket = bench.prefill("p", "leg", range(1_000, 1_900))
    bench.submit("d", "r", range(1_000, 1_900), ticket=ticket, output_tokens_max=5)
    bench.run(12.0)
    assert bench.tokens("r") == []
    assert producer.pool.pinned_count > 0
    bench.run(30.0)
    assert bench.done("r").external_tokens == 900
    assert producer.counters.expired_leases == 0


def test_a_restarted_producer_is_noticed_and_works_again(bench: Any) -> None:
    bench.start("p")
    bench.start("d")
    for turn in ("a", "b"):
        ticket = bench.prefill("p", f"leg-{turn}", range(100))
        bench.submit("d", turn, [*range(100)], ticket=ticket, output_tokens_max=3)
        bench.run(5.0)
    stale = bench.prefill("p", "leg-stale", range(200, 300))
    bench.kill("p")
    bench.start("p")
    bench.submit("d", "stale", range(200, 300), ticket=stale, output_tokens_max=3)
    bench.run(5.0)
    (failed,) = bench.of(RequestFailed)
    assert failed.reason is FailReason.PULL_DENIED
    assert "stale-engine" in failed.detail
    fresh = bench.prefill("p", "leg-fresh", range(300, 400))
    bench.submit("d", "fresh", range(300, 400), ticket=fresh, output_tokens_max=3)
    bench.run(5.0)
    assert bench.tokens("fresh") == colocated(bench, range(300, 400), 3)


def test_a_stale_ticket_does_not_cost_the_pair_another_handshake(bench: Any) -> None:
    bench.start("p")
    consumer = bench.start("d", handshake_s=0.5)
    tickets = {name: bench.prefill("p", name, range(n * 100, n * 100 + 50)) for n, name in enumerate("abc")}
    bench.submit("d", "first", range(50), ticket=tickets["a"], output_tokens_max=1)
    bench.run(5.0)
    stale = replace(tickets["b"], engine_id="p-0")
    began_s = bench.now_s
    bench.submit("d", "stale", range(100, 150), ticket=stale, output_tokens_max=1)
    bench.submit("d", "good", range(200, 250), ticket=tickets["c"], output_tokens_max=1)
    bench.run(5.0)
    assert [out.request_id for out in bench.of(RequestFailed)] == ["stale"]
    transfer_s = 64 * 1_000 / consumer.settings.link_bytes_per_s
    expected_s = 0.001 + transfer_s + consumer.settings.speed.step_s(1, 49)
    assert bench.done("good").at_s - began_s == pytest.approx(expected_s)


@pytest.mark.parametrize("policy", list(LoadFailurePolicy))
def test_a_producer_killed_during_a_pull(bench: Any, policy: LoadFailurePolicy) -> None:
    bench.start("p", link_bytes_per_s=1e4)
    consumer = bench.start("d", load_failure_policy=policy)
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "r", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(3.0)
    assert len(consumer.consumer.nic) == 1
    bench.kill("p")
    bench.run(5.0)
    if policy is LoadFailurePolicy.FAIL:
        assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.PULL_BROKEN]
    else:
        assert bench.tokens("r") == colocated(bench, range(100), 5)
    assert consumer.pool.usage == 0.0


def test_a_consumer_killed_during_a_pull_leaves_the_ticket_for_another(bench: Any) -> None:
    producer = bench.start("p", link_bytes_per_s=1e4)
    bench.start("d")
    bench.start("other")
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "r", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(3.0)
    bench.kill("d")
    assert len(producer.producer.nic) == 0
    bench.submit("other", "retry", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(60.0)
    assert bench.tokens("retry") == colocated(bench, range(100), 5)
    assert producer.pool.pinned_count == 0


def test_a_slow_link_and_its_healing_show_in_the_transfer(bench: Any) -> None:
    bench.start("p", link_bytes_per_s=1e6)
    bench.start("d", link_bytes_per_s=1e6, handshake_s=0.0)
    bench.send("p", LinkSlowed(0.1))
    ticket = bench.prefill("p", "leg", range(160))
    bench.submit("d", "r", range(160), ticket=ticket, output_tokens_max=1)
    bench.run(0.8)
    bench.send("p", LinkSlowed(1.0))
    bench.run(5.0)
    # 0.799 s at a tenth, the rest at full speed.
    moved = 0.799 * 1e5
    expected = 0.799 + (160_000 - moved) / 1e6
    assert bench.of(TransferDone)[0].transfer_s == pytest.approx(expected)


def test_a_pull_that_takes_too_long_is_given_up(bench: Any) -> None:
    producer = bench.start("p", link_bytes_per_s=10.0)
    consumer = bench.start("d", pull_s_max=8.0)
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "r", range(100), ticket=ticket, output_tokens_max=5)
    bench.run(10.0)
    assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.PULL_TIMEOUT]
    assert consumer.pool.usage == 0.0
    assert len(producer.producer.nic) == 0


def test_a_full_queue_releases_the_ticket_it_turns_away(bench: Any) -> None:
    producer = bench.start("p")
    bench.start("d", running_max=1, queued_max=1)
    for index in range(2):
        bench.submit("d", str(index), range(50), output_tokens_max=500)
        bench.run(0.02)
    ticket = bench.prefill("p", "leg", range(100))
    bench.submit("d", "r", range(100), ticket=ticket)
    assert len(bench.of(Rejected, "r")) == 1
    assert producer.pool.pinned_count == 0


def test_an_abort_before_blocks_were_given_releases_the_ticket(bench: Any) -> None:
    producer = bench.start("p")
    bench.start("d", running_max=1, block_total=128)
    ticket = bench.prefill("p", "leg", range(5_000, 5_900))
    bench.submit("d", "busy", range(1_900), output_tokens_max=140)
    bench.run(0.5)
    bench.submit("d", "r", range(5_000, 5_900), ticket=ticket)
    bench.send("d", Abort("r"))
    assert producer.pool.pinned_count == 0


def test_an_abort_during_a_pull_frees_blocks_only_once_nothing_writes(bench: Any) -> None:
    """A transcript: the consumer alone, its driver played by the test."""
    producer = bench.start("p")
    ticket = bench.prefill("p", "leg", range(100))
    engine = bench.start("d", handshake_s=0.0)
    now_s = bench.now_s
    asked = engine.handle(Submit(EngineRequest("r", tuple(range(100)), 5, ticket=ticket)), now_s)
    assert asked == [AskHandshake(HostPort("p:1"))]
    (pull,) = engine.handle(HandshakeAnswered(HostPort("p:1"), producer.info), now_s)
    assert isinstance(pull, AskPull)
    assert (pull.ask.request_id, pull.ask.block_ids) == ("leg", ticket.block_ids)
    grant = PullGrant(
        token_count=100, digest=0, kv_bytes_per_token=1_000, share_bytes_per_s=1.0, block_tokens=16
    )
    assert engine.handle(PullGranted(pull.pull_id, grant), now_s) == []
    assert engine.handle(Abort("r"), now_s + 1.0) == [ClosePull(pull.pull_id, is_done=False)]
    assert engine.pool.usage > 0.0
    engine.validate()
    assert engine.handle(Abort("r"), now_s + 1.0) == []
    assert engine.handle(PullCancelled(pull.pull_id), now_s + 2.0) == []
    assert engine.pool.usage == 0.0
    assert engine.handle(PullCancelled(pull.pull_id), now_s + 2.0) == []
    engine.validate()


def test_an_abort_during_the_handshake_frees_at_once(bench: Any) -> None:
    engine = bench.start("d")
    producer = bench.start("p")
    ticket = bench.prefill("p", "leg", range(100))
    engine.handle(Submit(EngineRequest("r", tuple(range(100)), 5, ticket=ticket)), bench.now_s)
    assert engine.handle(Abort("r"), bench.now_s) == []
    assert engine.pool.usage == 0.0
    engine.handle(HandshakeAnswered(HostPort("p:1"), producer.info), bench.now_s)
    engine.validate()


BF16_32 = KvLayout(32)
BF16_64 = KvLayout(64)
FP16_64 = KvLayout(64, dtype=KvDtype.FLOAT16)


@pytest.mark.parametrize(
    ("produced", "consumed", "is_stock", "outcome"),
    [
        (BF16_64, BF16_64, False, "same"),
        (BF16_32, BF16_64, False, "fails"),
        (BF16_32, BF16_64, True, "differs"),
        (BF16_64, BF16_32, True, "fails"),
        (FP16_64, BF16_64, True, "fails"),
    ],
)
def test_stock_nixl_with_unlike_layouts(
    bench: Any, produced: KvLayout, consumed: KvLayout, is_stock: bool, outcome: str
) -> None:
    bench.start("p", layout=produced, connector=Connector.NIXL)
    bench.start("d", layout=consumed, connector=Connector.NIXL, is_silent_corruption_stock=is_stock)
    ticket = bench.prefill("p", "leg", range(300))
    bench.submit("d", "r", range(300), ticket=ticket, output_tokens_max=10)
    bench.run(10.0)
    failed = bench.of(RequestFailed)
    if outcome == "fails":
        assert [out.reason for out in failed] == [FailReason.INCOMPATIBLE]
        assert "mismatch" in failed[0].detail
    else:
        assert failed == []
        assert (bench.tokens("r") == colocated(bench, range(300), 10)) == (outcome == "same")


def test_another_model_is_incompatible(bench: Any) -> None:
    bench.start("p", model="demo/other")
    bench.start("d")
    ticket = bench.prefill("p", "leg", range(300))
    bench.submit("d", "r", range(300), ticket=ticket)
    bench.run(5.0)
    assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.INCOMPATIBLE]


def rooms(bench: Any, **decode: Any) -> None:
    bench.start("p", role=Role.PREFILL, **SGLANG)
    bench.start("d", role=Role.DECODE, **SGLANG, **decode)


def room(number: int) -> RoomCall:
    return RoomCall(HostPort("p:1"), number)


@pytest.mark.parametrize("first", ["p", "d"])
@pytest.mark.parametrize("length", [1, 16, 100])
@pytest.mark.parametrize("count", [1, 12])
def test_both_legs_meet_in_a_room_whichever_comes_first(
    bench: Any, first: str, length: int, count: int
) -> None:
    rooms(bench)
    for name in (first, "d" if first == "p" else "p"):
        bench.submit(name, name, range(length), room=room(7), output_tokens_max=count)
        bench.run(1.0)
    bench.run(5.0)
    assert bench.tokens("d") == colocated(bench, range(length), count)
    assert bench.tokens("p") == bench.tokens("d")[:1]
    assert bench.done("p").at_s <= bench.done("d").at_s
    for name in ("p", "d"):
        engine = bench.cluster.engine(name)
        assert engine.pool.usage == 0.0
        assert engine.next_event_s() is None
    assert bench.cluster.engine("p").producer.room_count == 0


def test_a_decode_whose_prefill_never_comes_gives_up(bench: Any) -> None:
    rooms(bench, pull_s_max=300.0)
    bench.submit("d", "r", range(100), room=room(7), output_tokens_max=5)
    bench.run(299.0)
    assert bench.of(RequestFailed) == []
    bench.run(3.0)
    assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.PULL_TIMEOUT]
    assert bench.cluster.engine("p").producer.room_count == 0


def test_an_sglang_decode_does_not_compute_what_it_could_not_fetch(bench: Any) -> None:
    rooms(bench, **RECOMPUTE)
    bench.submit("d", "r", range(100), room=room(7))
    bench.run(2.0)
    bench.kill("p")
    bench.run(2.0)
    assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.PULL_BROKEN]


def test_an_sglang_decode_fetches_a_prefix_again(bench: Any) -> None:
    rooms(bench)
    for number in (1, 2):
        for name in ("p", "d"):
            bench.submit(name, f"{name}{number}", range(100), room=room(number), output_tokens_max=2)
        bench.run(5.0)
    assert bench.done("d2").external_tokens == 100
    assert bench.done("p2").cached_tokens == 96


def test_sglang_page_sizes_must_match(bench: Any) -> None:
    bench.start("p", role=Role.PREFILL, block_tokens=32, **SGLANG)
    bench.start("d", role=Role.DECODE, block_tokens=16, **SGLANG)
    for name in ("p", "d"):
        bench.submit(name, name, range(100), room=room(7))
    bench.run(5.0)
    assert bench.of(RequestFailed, "d")[0].reason is FailReason.INCOMPATIBLE


@given(seed=st.integers(0, 2**32), policy=st.sampled_from(LoadFailurePolicy))
@settings(max_examples=25, deadline=None)
def test_whatever_breaks_every_request_ends_once_and_nothing_stays(
    bench_of: Any, seed: int, policy: LoadFailurePolicy
) -> None:
    bench = bench_of()
    rng = Random(seed)
    bench.start("alone")
    small = {"block_total": 64, "context_tokens_max": 512, "lease_s": 3.0, "running_max": 3}
    for name in ("p0", "p1"):
        bench.start(name, link_bytes_per_s=rng.choice([2e4, 1e6]), **small)
    for name in ("d0", "d1"):
        bench.start(name, load_failure_policy=policy, **small)
    sent: dict[str, tuple[str, range]] = {}
    lost, aborted = set(), set()
    for index in range(12):
        prompt = range(index % 4 * 100, index % 4 * 100 + rng.randrange(1, 400))
        prefill = rng.choice(["p0", "p1"])
        bench.submit(prefill, f"leg{index}", prompt, is_prefill_leg=True)
        bench.run(rng.choice([0.05, 0.5, 4.0]))
        legs = bench.of(RequestDone, f"leg{index}")
        if not legs or legs[0].ticket is None:
            continue
        issued = legs[0].ticket
        ticket = replace(
            bench.prefill("alone", f"x{index}", prompt),
            engine_id=issued.engine_id,
            request_id=issued.request_id,
            block_ids=issued.block_ids,
            address=HostPort(f"{prefill}:1"),
        )
        decode = rng.choice(["d0", "d1"])
        bench.submit(decode, str(index), prompt, ticket=ticket, output_tokens_max=rng.choice([1, 30]))
        sent[str(index)] = (decode, prompt)
        bench.run(rng.choice([0.0, 0.3, 2.0]))
        event = rng.random()
        if event < 0.15:
            victim = rng.choice(["p0", "p1", "d0", "d1"])
            lost |= {r for r, (where, _) in sent.items() if where == victim}
            bench.kill(victim)
            bench.start(victim, **small, load_failure_policy=policy)
        elif event < 0.35:
            victim = str(rng.randrange(index + 1))
            if victim in sent:
                aborted.add(victim)
                bench.send(sent[victim][0], Abort(victim))
        elif event < 0.5:
            bench.send(rng.choice(["p0", "d1"]), LinkSlowed(rng.choice([0.01, 1.0])))
    bench.run(2_000.0)
    done = {out.request_id for out in bench.of(RequestDone)}
    failed = [out.request_id for out in bench.of(RequestFailed)]
    assert len(failed) == len(set(failed))
    assert not done & set(failed)
    rejected = {out.request_id for out in bench.of(Rejected)}
    for request_id, (_, prompt) in sent.items():
        assert request_id in done | set(failed) | rejected | lost | aborted
        if request_id in done:
            count = bench.done(request_id).output_tokens
            assert bench.tokens(request_id) == colocated(bench, prompt, count)
    for name in bench.cluster.names():
        engine = bench.cluster.engine(name)
        assert engine.pool.usage == 0.0, name
        assert engine.next_event_s() is None, name
