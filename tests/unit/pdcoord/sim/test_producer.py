"""The prefill side: tickets, leases, pins, rooms, NIC shares."""

from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.messages import (
    Abort,
    DenyPull,
    DenyReason,
    FailReason,
    FinishReason,
    GrantPull,
    HeartbeatHeard,
    PullAsk,
    PullAsked,
    PullClosed,
    Rejected,
    RejectReason,
    ReleaseHeard,
    RemoteTicket,
    RequestDone,
    RequestFailed,
    RoomCall,
    Submit,
    TellShare,
    TransferDone,
)
from pdcoord.sim.messages import EngineRequest as Request
from pdcoord.sim.tokens import prompt_digest
from transfer.verdict import Connector

SGLANG: dict[str, Any] = {"engine": EngineKind.SGLANG, "connector": Connector.SGLANG}


def ask_of(ticket: Any, **changes: Any) -> PullAsk:
    fields = {
        "engine_id": ticket.engine_id,
        "request_id": ticket.request_id,
        "block_ids": ticket.block_ids,
        **changes,
    }
    return PullAsk(**fields)


def test_a_prefill_leg_ends_after_one_token_and_keeps_its_blocks(bench: Any) -> None:
    engine = bench.start("p")
    ticket = bench.prefill("p", "r", range(100), output_tokens_max=50)
    assert len(bench.tokens("r")) == 1
    assert bench.done("r").finish is FinishReason.LENGTH
    assert ticket.engine_id == engine.engine_id
    assert ticket.request_id == "r"
    assert len(ticket.block_ids) == 1
    assert len(ticket.block_ids[0]) == engine.pool.pinned_count == 7
    assert ticket.token_count == 100


def test_an_aborted_prefill_leg_gives_no_ticket_and_pins_nothing(bench: Any) -> None:
    engine = bench.start("p")
    bench.submit("p", "r", range(1_000), is_prefill_leg=True)
    bench.send("p", Abort("r"))
    bench.run(2.0)
    assert bench.of(RequestDone) == []
    assert engine.pool.usage == 0.0


def test_a_lease_ends_when_nobody_comes(bench: Any) -> None:
    engine = bench.start("p", lease_s=30.0)
    bench.prefill("p", "r", range(100))
    ended_s = bench.done("r").at_s
    bench.run(ended_s + 29.9 - bench.now_s)
    assert engine.pool.pinned_count == 7
    bench.run(0.2)
    assert engine.pool.pinned_count == 0
    assert engine.counters.expired_leases == 1
    assert engine.pool.cached_count > 0  # The prefix stays cached all the same.


def test_heartbeats_extend_a_lease_by_two_thirds(bench: Any) -> None:
    engine = bench.start("p", lease_s=30.0)
    ticket = bench.prefill("p", "r", range(100))
    bench.run(25.0 - bench.now_s)
    bench.send("p", HeartbeatHeard(ticket.engine_id, ("r", "unknown")))
    bench.run(19.9)
    assert engine.pool.pinned_count == 7
    bench.run(0.2)
    assert engine.pool.pinned_count == 0


def test_an_early_heartbeat_shortens_nothing_and_a_foreign_one_is_ignored(bench: Any) -> None:
    engine = bench.start("p", lease_s=30.0)
    ticket = bench.prefill("p", "r", range(100))
    bench.send("p", HeartbeatHeard(ticket.engine_id, ("r",)))
    bench.run(29.0 - bench.now_s)
    assert engine.pool.pinned_count == 7
    bench.send("p", HeartbeatHeard("someone else", ("r",)))
    bench.run(2.0)
    assert engine.pool.pinned_count == 0


def test_a_lease_that_is_issued_expired_is_gone_at_once(bench: Any) -> None:
    engine = bench.start("p")
    bench.prefill("p", "r", range(100), lease_s=0.0)
    assert engine.pool.pinned_count == 0
    assert engine.counters.expired_leases == 1


def test_a_release_frees_and_a_late_one_is_counted(bench: Any) -> None:
    engine = bench.start("p")
    ticket = bench.prefill("p", "r", range(100))
    bench.send("p", ReleaseHeard("someone else", "r"))
    assert engine.pool.pinned_count == 7
    bench.send("p", ReleaseHeard(ticket.engine_id, "r"))
    assert engine.pool.pinned_count == 0
    bench.send("p", ReleaseHeard(ticket.engine_id, "r"))
    assert engine.counters.late_notifications == 2


def test_a_pull_is_granted_with_what_the_blocks_hold_and_frees_them_when_done(bench: Any) -> None:
    engine = bench.start("p")
    ticket = bench.prefill("p", "r", range(100))
    effects = engine.handle(PullAsked("pull", ask_of(ticket)), bench.now_s)
    (grant,) = [e.grant for e in effects if isinstance(e, GrantPull)]
    assert grant.token_count == 100
    assert grant.digest == prompt_digest(range(100))
    assert (grant.kv_bytes_per_token, grant.block_tokens, grant.taint) == (1_000, 16, 0)
    assert grant.share_bytes_per_s == engine.settings.link_bytes_per_s
    engine.validate()
    engine.handle(PullClosed("pull", is_done=True), bench.now_s)
    assert engine.pool.pinned_count == 0
    engine.validate()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_id": "p-0"}, DenyReason.STALE_ENGINE),
        ({"request_id": "forged"}, DenyReason.UNKNOWN_REQUEST),
        ({"block_ids": ((1, 2, 3),)}, DenyReason.WRONG_BLOCKS),
        ({"block_ids": ()}, DenyReason.WRONG_BLOCKS),
    ],
)
def test_a_ticket_that_is_not_the_producers_is_denied(
    bench: Any, changes: dict[str, Any], reason: DenyReason
) -> None:
    engine = bench.start("p")
    ticket = bench.prefill("p", "r", range(100))
    effects = engine.handle(PullAsked("pull", ask_of(ticket, **changes)), bench.now_s)
    assert effects == [DenyPull("pull", reason)]
    assert engine.pool.pinned_count == 7


def test_a_used_or_expired_ticket_is_denied_as_expired(bench: Any) -> None:
    engine = bench.start("p", lease_s=10.0)
    used, expired = bench.prefill("p", "a", range(100)), bench.prefill("p", "b", range(500, 600))
    engine.handle(PullAsked("1", ask_of(used)), bench.now_s)
    engine.handle(PullClosed("1", is_done=True), bench.now_s)
    bench.run(30.0)
    for pull_id, ticket in (("2", used), ("3", expired)):
        effects = engine.handle(PullAsked(pull_id, ask_of(ticket)), bench.now_s)
        assert effects == [DenyPull(pull_id, DenyReason.LEASE_EXPIRED)]


def test_a_lease_that_ends_during_a_pull_breaks_it(bench: Any) -> None:
    engine = bench.start("p", lease_s=10.0)
    ticket = bench.prefill("p", "r", range(100))
    engine.handle(PullAsked("pull", ask_of(ticket)), bench.now_s)
    effects = engine.handle(HeartbeatHeard("nobody", ()), bench.now_s + 20.0)
    assert DenyPull("pull", DenyReason.LEASE_EXPIRED) in effects
    assert engine.pool.pinned_count == 0
    # The consumer's notice that it is done comes too late (vLLM: "potentially invalid KV blocks").
    engine.handle(PullClosed("pull", is_done=True), bench.now_s + 20.1)
    assert engine.counters.late_notifications == 1
    engine.validate()


def test_a_consumer_that_goes_away_leaves_the_lease_for_another(bench: Any) -> None:
    engine = bench.start("p")
    ticket = bench.prefill("p", "r", range(100))
    engine.handle(PullAsked("1", ask_of(ticket)), bench.now_s)
    engine.handle(PullClosed("1", is_done=False), bench.now_s)
    assert engine.pool.pinned_count == 7
    effects = engine.handle(PullAsked("2", ask_of(ticket)), bench.now_s)
    assert any(isinstance(e, GrantPull) for e in effects)


def test_shares_are_told_as_pulls_come_and_go(bench: Any) -> None:
    engine = bench.start("p", link_bytes_per_s=100.0)
    tickets = [bench.prefill("p", name, range(n, n + 100)) for n, name in enumerate("abc")]
    told: list[Any] = []
    for index, ticket in enumerate(tickets):
        told += engine.handle(PullAsked(str(index), ask_of(ticket)), bench.now_s)
    told += engine.handle(PullClosed("0", is_done=True), bench.now_s)
    shares = [
        (e.pull_id, e.grant.share_bytes_per_s if isinstance(e, GrantPull) else e.share_bytes_per_s)
        for e in told
        if isinstance(e, GrantPull | TellShare)
    ]
    third = pytest.approx(100 / 3)
    assert shares == [
        ("0", 100.0), ("0", 50.0), ("1", 50.0), ("0", third), ("1", third), ("2", third),
        ("1", 50.0), ("2", 50.0),
    ]  # fmt: skip


def room(number: int) -> RoomCall:
    return RoomCall(HostPort("p:1"), number)


def test_a_room_worker_refuses_a_request_without_a_room(bench: Any) -> None:
    for role in (Role.PREFILL, Role.DECODE):
        bench.start(role, role=role, **SGLANG)
        bench.submit(role, role, range(10))
        assert bench.of(Rejected, role)[0].reason is RejectReason.ROOM_REQUIRED
    bench.start("both", role=Role.BOTH, **SGLANG)
    bench.submit("both", "r", range(10), output_tokens_max=2)
    bench.run(1.0)
    assert len(bench.tokens("r")) == 2


def test_a_prefill_waits_in_its_room_and_pushes_when_its_decode_comes(bench: Any) -> None:
    engine = bench.start("p", role=Role.PREFILL, **SGLANG)
    bench.submit("p", "r", range(100), room=room(7), output_tokens_max=30)
    bench.run(5.0)
    assert bench.tokens("r") == []  # Nothing is computed for a decode that may never come.
    assert engine.waiting_count == 1
    effects = engine.handle(PullAsked("pull", PullAsk(room=7)), bench.now_s)
    assert effects == []
    at_s = engine.next_event_s()
    effects = engine.handle(HeartbeatHeard("", ()), at_s)
    (grant,) = [e.grant for e in effects if isinstance(e, GrantPull)]
    (token,) = [e.token_id for e in effects if e.__class__.__name__ == "TokenOut"]
    assert grant.first_token == token
    assert not any(isinstance(e, RequestDone) for e in effects)
    effects = engine.handle(PullClosed("pull", is_done=True), at_s)
    assert any(isinstance(e, RequestDone) for e in effects)
    assert engine.pool.usage == 0.0
    engine.validate()


def test_a_prefill_whose_decode_never_comes_fails(bench: Any) -> None:
    engine = bench.start("p", role=Role.PREFILL, pull_s_max=300.0, **SGLANG)
    bench.submit("p", "r", range(100), room=room(7))
    bench.run(299.0)
    assert bench.of(RequestFailed) == []
    bench.run(2.0)
    assert [out.reason for out in bench.of(RequestFailed)] == [FailReason.DECODE_GONE]
    assert engine.producer.room_count == 0


@pytest.mark.parametrize("after_s", [0.0, 0.5])
def test_a_decode_that_goes_away_fails_its_prefill(bench: Any, after_s: float) -> None:
    engine = bench.start("p", role=Role.PREFILL, **SGLANG)
    bench.submit("p", "r", range(100), room=room(7))
    engine.handle(PullAsked("pull", PullAsk(room=7)), bench.now_s)
    engine.handle(HeartbeatHeard("", ()), bench.now_s + after_s)
    effects = engine.handle(PullClosed("pull", is_done=False), bench.now_s + after_s)
    assert [e.reason for e in effects if isinstance(e, RequestFailed)] == [FailReason.DECODE_GONE]
    assert engine.pool.usage == 0.0
    engine.validate()


def test_an_aborted_prefill_tells_the_decode_in_its_room(bench: Any) -> None:
    engine = bench.start("p", role=Role.PREFILL, **SGLANG)
    bench.submit("p", "r", range(100), room=room(7))
    engine.handle(PullAsked("pull", PullAsk(room=7)), bench.now_s)
    effects = engine.handle(Abort("r"), bench.now_s)
    assert effects == [DenyPull("pull", DenyReason.PREFILL_FAILED)]
    engine.validate()


def test_two_of_a_kind_cannot_share_a_room(bench: Any) -> None:
    engine = bench.start("p", role=Role.PREFILL, **SGLANG)
    first = Request("a", tuple(range(9)), room=room(7))
    engine.handle(Submit(first), 0.0)
    effects = engine.handle(Submit(replace(first, id="b")), 0.0)
    assert [e.reason for e in effects if isinstance(e, Rejected)] == [RejectReason.ROOM_TAKEN]
    engine.handle(PullAsked("1", PullAsk(room=7)), 0.0)
    assert engine.handle(PullAsked("2", PullAsk(room=7)), 0.0) == [DenyPull("2", DenyReason.ROOM_IN_USE)]
    engine.validate()


# Connector pdcoord with both legs under way: the decode asks by transfer, before there is a ticket.

TRANSFER = "0123456789abcdef" * 2
PROMPT = range(1_500)
EARLY = RemoteTicket("", TRANSFER, (), HostPort("p:1"))


def begin(bench: Any, **prefill_settings: Any) -> tuple[Any, Any]:
    producer = bench.start("p", **prefill_settings)
    return producer, bench.start("d", block_tokens=32, handshake_s=0.001, link_bytes_per_s=1e8)


def test_the_decode_waits_for_the_prefill_and_answers_what_it_would_alone(bench: Any) -> None:
    producer, consumer = begin(bench)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=8)
    bench.run(1.0)
    assert bench.tokens("leg-d") == []
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(10.0)
    bench.start("alone")
    bench.submit("alone", "same", PROMPT, output_tokens_max=8)
    bench.run(10.0)
    assert bench.tokens("leg-d") == bench.tokens("same")
    assert bench.done("leg-d").external_tokens == len(PROMPT)
    assert producer.pool.pinned_count == consumer.pool.pinned_count == 0


def test_a_prefill_that_is_done_first_is_found_by_its_transfer(bench: Any) -> None:
    producer, _ = begin(bench)
    bench.prefill("p", "leg-p", PROMPT, transfer=TRANSFER)
    assert producer.pool.pinned_count > 0
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.run(10.0)
    assert bench.done("leg-d").external_tokens == len(PROMPT)
    assert producer.pool.pinned_count == 0
    bench.submit("d", "again", range(1, 1_500), ticket=EARLY, output_tokens_max=2)
    bench.run(10.0)
    assert bench.of(RequestFailed, "again")[0].reason is FailReason.PULL_DENIED


def test_kv_of_earlier_chunks_leaves_while_later_ones_are_computed(bench: Any) -> None:
    _, consumer = begin(bench, step_tokens_max=500, link_bytes_per_s=1e8)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(10.0)
    (moved,) = bench.of(TransferDone, "leg-d")
    bytes_per_token = consumer.settings.kv_bytes_per_token
    # Whole blocks of the last step's tokens at least, and not the whole prompt.
    assert 500 * bytes_per_token <= moved.transfer_bytes < len(PROMPT) * bytes_per_token


def test_a_prefill_that_is_aborted_fails_the_decode_that_waits(bench: Any) -> None:
    begin(bench)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.submit("p", "leg-p", PROMPT, is_prefill_leg=True, transfer=TRANSFER)
    bench.run(0.01)
    bench.send("p", Abort("leg-p"))
    bench.run(1.0)
    assert bench.of(RequestFailed, "leg-d")[0].reason is FailReason.PULL_DENIED


@pytest.mark.parametrize("wait_s", [0.0, 0.6])
def test_a_decode_that_goes_away_leaves_nothing_pinned(bench: Any, wait_s: float) -> None:
    producer, consumer = begin(bench, lease_s=3.0)
    bench.submit("d", "leg-d", PROMPT, ticket=EARLY, output_tokens_max=2)
    bench.run(wait_s)
    bench.send("d", Abort("leg-d"))
    bench.prefill("p", "leg-p", PROMPT, transfer=TRANSFER)
    bench.run(4.0)
    assert producer.pool.pinned_count == consumer.pool.pinned_count == 0
