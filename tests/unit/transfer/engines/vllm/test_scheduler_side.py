"""The scheduler's half, told as a scheduler would: what it orders, step by step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from transfer.canonical import TokenRange
from transfer.digest import prompt_hash
from transfer.engines.vllm.metadata import Settle, StepOrders
from transfer.engines.vllm.scheduler_side import Arrival, Scheduled, SchedulerSide
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Proof, TransferId

ASK = {"do_remote_decode": True, "do_remote_prefill": False}
TRANSFER = TransferId("ab" * 16)
NONCE = bytes.fromhex("cd" * 16)
OURS = {"version": 1, "transfer": TRANSFER, "nonce": NONCE.hex()}
TICKET = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "pdcoord": OURS | {"address": "10.0.0.1:14579", "epoch": "e"},
}
BLOCK_TOKENS = 4


@dataclass
class Engine:
    """A scheduler with one group, in which block i of a request is `10 * number + i`."""

    has_windows: bool = False
    is_consumer: bool = True
    minted: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)
    side: SchedulerSide = field(init=False)

    def __post_init__(self) -> None:
        self.side = SchedulerSide(
            "engine",
            1,
            2.5,
            is_consumer=self.is_consumer,
            prefill_wait_s=30.0,
            has_windows=self.has_windows,
            mint=self.mint,
        )
        self.side.set_producer("10.0.0.2:14579", "epoch-1")

    def mint(self, count: int) -> bytes:
        self.minted += 1
        return bytes([self.minted]) * count

    def arrive(self, request: str, params: Any, tokens: int, extra: tuple[str, ...] = ()) -> None:
        self.side.arrived(Arrival(request, params, list(range(tokens)), extra))
        self.tables[request] = [10 * len(self.tables) + i + 1 for i in range(-(-tokens // BLOCK_TOKENS))]

    def table(self, request: str) -> tuple[tuple[int, ...], ...]:
        return (tuple(self.tables[request]),)

    def step(self, *parts: tuple[str, int], preempted: Iterable[str] = ()) -> StepOrders:
        return self.side.step([Scheduled(*part) for part in parts], preempted, self.table)

    def finish(self, request: str, *, is_served: bool = True) -> tuple[bool, dict[str, Any] | None]:
        return self.side.finished(request, (self.tables[request],), is_served=is_served)

    def allocate(self, request: str, external: int) -> None:
        self.side.allocated(request, lambda: self.table(request), external)


def proof(tokens: int, nonce: bytes, extra: tuple[str, ...] = ()) -> Proof:
    return Proof(nonce, prompt_hash(range(tokens), extra))


def chunk(transfer: str, first: int, count: int, table: Any, *, is_last: bool) -> ChunkComputed:
    return ChunkComputed(TransferId(transfer), TokenRange(first, count), table, is_last)


MINTED = "01" * 16


def test_a_prefill_is_opened_staged_in_chunks_and_held_until_it_was_sent() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 10)
    assert engine.step() == StepOrders(), "it is not opened before it is scheduled"
    table = engine.table("p")
    first = engine.step(("p", 4))
    opened = Opened(TransferId(MINTED), "p", proof(10, b"\x02" * 16), 10)
    assert first == StepOrders(opened=(opened,), chunks=(chunk(MINTED, 0, 4, table, is_last=False),))
    assert engine.step() == StepOrders(), "a step that does not schedule it orders nothing"
    assert engine.step(("p", 8)).chunks == (chunk(MINTED, 4, 4, table, is_last=False),)
    # With a speculative token past the prompt.
    assert engine.step(("p", 11)).chunks == (chunk(MINTED, 8, 2, table, is_last=True),)
    is_held, answer = engine.finish("p")
    assert is_held
    assert answer is not None
    assert answer["remote_num_tokens"] == 10
    assert (answer["remote_host"], answer["remote_port"]) == ("10.0.0.2", 14579)
    assert answer["pdcoord"] == {
        "version": 1,
        "transfer": MINTED,
        "nonce": "02" * 16,
        "epoch": "epoch-1",
        "address": "10.0.0.2:14579",
    }
    assert engine.step() == StepOrders(held=("p",))
    engine.side.sent(["p"])
    assert engine.step() == StepOrders()


def test_what_a_prefill_has_in_its_cache_is_staged_with_its_first_chunk() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 9)
    # 8 tokens were cached, one is computed.
    (only,) = engine.step(("p", 9)).chunks
    assert (only.tokens, only.is_last) == (TokenRange(0, 9), True)


def test_a_prompt_of_one_token_is_handed_over() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 1)
    (only,) = engine.step(("p", 1)).chunks
    assert (only.tokens, only.is_last) == (TokenRange(0, 1), True)
    assert engine.finish("p")[1] is not None


def test_decoding_after_the_prompt_stages_nothing() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 4)
    engine.step(("p", 4))
    assert engine.step(("p", 5)) == StepOrders()


def test_a_preempted_prefill_settles_and_stages_only_what_is_missing_from_its_new_blocks() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 12)
    engine.step(("p", 8))
    settled = engine.step(preempted=["p", "other"])
    assert settled == StepOrders(settle=(Settle("p", TransferId(MINTED)),))
    engine.tables["p"] = [91, 92, 93]
    assert engine.step(("p", 4)) == StepOrders(), "staged before"
    assert engine.step(("p", 8)) == StepOrders(), "staged before"
    assert engine.step(("p", 12)).chunks == (chunk(MINTED, 8, 4, ((91, 92, 93),), is_last=True),)


def test_a_prefill_preempted_before_its_first_chunk_has_nothing_to_settle() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 12)
    assert engine.step(preempted=["p"]) == StepOrders()


def test_with_sliding_windows_every_step_settles_until_all_was_sent() -> None:
    engine = Engine(has_windows=True)
    settle = (Settle("p", TransferId(MINTED)),)
    engine.arrive("p", ASK, 8)
    assert engine.step(("p", 4)).settle == ()
    assert engine.step(("p", 8)).settle == settle
    engine.finish("p")
    assert engine.step() == StepOrders(settle=settle, held=("p",))
    assert engine.step().settle == settle
    engine.side.sent(["p"])
    assert engine.step().settle == ()


@pytest.mark.parametrize("computed", [4, 8], ids=["midway", "all staged"])
def test_an_aborted_prefill_of_our_own_minting_is_given_up_and_held(computed: int) -> None:
    engine = Engine()
    engine.arrive("p", ASK, 8)
    engine.step(("p", computed))
    assert engine.finish("p", is_served=False) == (True, None)
    assert engine.step() == StepOrders(aborted=(TransferId(MINTED),), held=("p",))


def test_an_aborted_prefill_that_was_never_scheduled_leaves_no_trace() -> None:
    engine = Engine()
    engine.arrive("p", ASK, 8)
    assert engine.finish("p", is_served=False) == (False, None)
    assert engine.step() == StepOrders()


def test_the_consumer_of_a_sidecars_transfer_learns_that_its_prefill_never_began() -> None:
    engine = Engine()
    engine.arrive("p", ASK | {"pdcoord": OURS}, 8)
    assert engine.finish("p", is_served=False) == (False, None)
    assert engine.step() == StepOrders(stillborn=(Opened(TRANSFER, "p", proof(8, NONCE), 8),))
    assert engine.step() == StepOrders()


def test_a_sidecars_transfer_that_is_staged_outlives_its_prefill_leg() -> None:
    engine = Engine()
    engine.arrive("p", ASK | {"pdcoord": OURS}, 8)
    engine.step(("p", 8))
    assert engine.finish("p", is_served=False) == (True, None)
    assert engine.step() == StepOrders(held=("p",))


def test_a_sidecars_transfer_is_opened_under_its_name_and_stands_in_the_answer() -> None:
    engine = Engine()
    engine.arrive("p", ASK | {"pdcoord": OURS}, 4)
    assert engine.step(("p", 4)).opened == (Opened(TRANSFER, "p", proof(4, NONCE), 4),)
    answer = engine.finish("p")[1]
    assert answer is not None
    assert (answer["pdcoord"]["transfer"], answer["pdcoord"]["nonce"]) == (TRANSFER, NONCE.hex())
    assert engine.minted == 0


def test_of_several_choices_only_one_hands_over_and_only_one_fetches() -> None:
    engine = Engine()
    for request in ("0_r", "1_r"):
        engine.arrive(request, ASK | {"pdcoord": OURS}, 4)
    assert len(engine.step(("0_r", 4), ("1_r", 4)).opened) == 1
    for request in ("0_d", "1_d"):
        engine.arrive(request, TICKET, 4)
    assert [engine.side.matched_tokens(request, 0) for request in ("0_d", "1_d")] == [4, 0]


def test_an_engine_may_fetch_from_itself() -> None:
    engine = Engine()
    engine.arrive("p", ASK | {"pdcoord": OURS}, 4)
    engine.arrive("d", TICKET, 4)
    assert engine.side.matched_tokens("d", 0) == 4


def load(tokens: int, first: int, count: int, table: Any, extra: tuple[str, ...] = ()) -> LoadAsked:
    return LoadAsked(
        "d",
        TRANSFER,
        proof(tokens, NONCE, extra),
        "10.0.0.1:14579",
        "e",
        table,
        TokenRange(first, count),
        2.5,
    )


def test_an_engine_that_only_produces_computes_what_it_is_sent() -> None:
    engine = Engine(is_consumer=False)
    engine.arrive("d", TICKET, 10)
    assert engine.side.matched_tokens("d", 0) == 0
    assert engine.side.take_failures() == {"not-a-consumer": 1}
    engine.arrive("p", ASK, 4)
    assert len(engine.step(("p", 4)).opened) == 1


def test_a_decode_leg_sent_with_its_prefill_leg_waits_for_the_prompt_as_well() -> None:
    engine = Engine()
    early = TICKET | {"pdcoord": OURS | {"address": "10.0.0.1:14579"}}
    engine.arrive("d", early, 10)
    assert engine.side.matched_tokens("d", 0) == 10
    engine.allocate("d", 10)
    (asked,) = engine.step().loads
    assert (asked.epoch, asked.wait_s) == ("", 32.5)


def test_a_decode_loads_once_whatever_is_asked_how_often() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 10)
    assert [engine.side.matched_tokens("d", 4) for _ in range(3)] == [6, 6, 6]
    engine.allocate("d", 6)
    table = engine.table("d")
    assert engine.side.matched_tokens("d", 4) == 0
    assert engine.step() == StepOrders(loads=(load(10, 4, 6, table),))
    engine.allocate("d", 0)
    engine.side.received(["d"])
    engine.allocate("d", 0)
    assert engine.side.matched_tokens("d", 0) == 0, "preempted later, it computes by itself"
    assert engine.step() == StepOrders()
    assert engine.finish("d") == (False, None)
    assert engine.step() == StepOrders()


def test_where_nothing_is_missing_the_producer_is_only_released() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 8)
    engine.allocate("d", 0)
    assert engine.step() == StepOrders(loads=(load(8, 8, 0, ()),))
    assert engine.finish("d") == (False, None)
    assert engine.step() == StepOrders()


def test_a_decode_aborted_in_the_queue_releases_its_producer() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 8)
    assert engine.finish("d", is_served=False) == (False, None)
    assert engine.step() == StepOrders(loads=(load(8, 8, 0, ()),))


def test_a_decode_aborted_while_loading_is_cancelled_once() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 8)
    engine.allocate("d", 8)
    engine.step()
    # The scheduler itself holds the blocks of a request that waits for a load.
    assert engine.finish("d", is_served=False) == (False, None)
    assert engine.step() == StepOrders(cancelled=("d",))
    engine.side.received(["d"])
    assert engine.step() == StepOrders()


def test_an_abort_in_the_step_of_the_allocation_loads_and_cancels() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 8)
    engine.allocate("d", 8)
    engine.finish("d", is_served=False)
    orders = engine.step()
    assert (len(orders.loads), orders.cancelled) == (1, ("d",))


def test_the_same_tokens_with_another_adapter_are_another_prompt() -> None:
    engine = Engine()
    engine.arrive("d", TICKET, 8, extra=("adapter",))
    engine.allocate("d", 8)
    (asked,) = engine.step().loads
    assert asked == load(8, 0, 8, engine.table("d"), ("adapter",))
    assert asked.proof != proof(8, NONCE)


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"do_remote_prefill": True}, "malformed"),
        ({"do_remote_decode": True, "pdcoord": {"version": 9}}, "malformed"),
        ("nonsense", "malformed"),
        (TICKET | {"remote_num_tokens": 99}, "wrong-prompt"),
    ],
)
def test_a_bad_ticket_is_counted_and_served_without_a_transfer(params: Any, kind: str) -> None:
    engine = Engine()
    engine.arrive("r", params, 8)
    assert engine.side.take_failures() == {kind: 1}
    assert engine.side.take_failures() == {}
    assert engine.side.matched_tokens("r", 0) == 0
    engine.allocate("r", 0)
    assert engine.step(("r", 8)) == StepOrders()
    assert engine.finish("r") == (False, None)


@pytest.mark.parametrize("params", [ASK, TICKET, None])
def test_a_prompt_that_is_not_token_ids_is_left_alone(params: Any) -> None:
    engine = Engine()
    engine.side.arrived(Arrival("r", params, None))
    assert engine.side.matched_tokens("r", 0) == 0
    assert engine.step(("r", 8)) == StepOrders()
    assert engine.side.finished("r", (), is_served=True) == (False, None)
