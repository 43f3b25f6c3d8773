"""When each path is probed, and what is remembered of it."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PrefillTarget
from sidecar.paths import RETRY_S_MIN, Path, PathBook
from transfer.session.messages import ProbeTold

INTERVAL_S = 30.0


def target(name: str, kv_port: int | None = None) -> PrefillTarget:
    return PrefillTarget(address=HostPort(f"{name}:8000"), kv_port=kv_port)


def told(failure: str = "", **more: object) -> ProbeTold:
    return ProbeTold(address="x:1", failure=failure, **more)  # type: ignore[arg-type]


def book(*names: str) -> PathBook:
    made = PathBook(interval_s=INTERVAL_S, kv_port=14_579, rng=random.Random(1))
    made.sync(map(target, names), 0.0)
    return made


def only(made: PathBook, now_s: float = 0.0) -> Path:
    (path,) = made.take_due(now_s, 9)
    return path


def test_new_targets_are_due_at_once_and_so_many_at_a_time() -> None:
    made = book("a", "b", "c")
    first = made.take_due(0.0, 2)
    assert [path.kv_address for path in first] == ["a:14579", "b:14579"]
    assert [path.kv_address for path in made.take_due(0.0, 2)] == ["c:14579"]
    assert made.take_due(0.0, 2) == []
    assert not made.is_warm


def test_the_kv_side_channel_is_at_the_targets_host() -> None:
    made = PathBook(interval_s=INTERVAL_S, kv_port=5, rng=random.Random(1))
    made.sync([target("a"), target("b", 7), target("[fd00::1]")], 0.0)
    assert [path.kv_address for path in made.take_due(0.0, 9)] == ["a:5", "b:7", "[fd00::1]:5"]


def test_it_is_warm_when_each_target_was_probed_once_with_whatever_outcome() -> None:
    made = book("a", "b")
    first, second = made.take_due(0.0, 9)
    made.note(first, told(), 1.0)
    made.note_agent_lost(second, 1.0)
    assert not made.is_warm
    (second,) = made.take_due(1.0 + RETRY_S_MIN, 9)
    made.note(second, told("unreachable"), 3.0)
    assert made.is_warm
    assert book().is_warm


def test_a_good_target_is_probed_again_within_the_interval_but_not_in_step() -> None:
    names = [f"p{n}" for n in range(40)]
    made = book(*names)
    for path in made.take_due(0.0, 99):
        made.note(path, told(), 0.0)
    assert made.take_due(INTERVAL_S / 2 - 0.01, 99) == []
    dues = {round(path.due_s) for path in made.take_due(INTERVAL_S, 99)}
    assert len(dues) > 5


def test_a_failed_target_is_probed_sooner_and_less_and_less_often() -> None:
    made, now_s, pauses = book("a"), 0.0, []
    for _ in range(8):
        path = only(made, now_s)
        made.note(path, told("unreachable"), now_s)
        pauses.append(path.due_s - now_s)
        now_s = path.due_s
    longest = [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    made.note(only(made, now_s), told(), now_s)
    path = only(made, now_s + INTERVAL_S)
    made.note(path, told("unreachable"), 100.0)
    assert path.due_s <= 102.0


def test_targets_that_go_are_forgotten_and_a_moved_kv_port_is_another_path() -> None:
    made = book("a", "b")
    gone, moved = made.take_due(0.0, 9)
    made.note(moved, told(), 0.0)
    assert made.sync([target("b", 9), target("c")], 1.0) == ["a:8000"]
    assert not made.is_current(gone)
    assert not made.is_current(moved)
    assert [path.kv_address for path in made.take_due(1.0, 9)] == ["b:9", "c:14579"]
    made.note(gone, told(), 2.0)
    assert [path.target for path in made.report(2.0).paths] == ["b:8000", "c:8000"]


@pytest.mark.parametrize(
    ("first", "second", "is_change"),
    [
        (told(), told(latency_s=9.0), False),
        (told(), told("unreachable"), True),
        (told("unreachable"), told("peer-lost"), True),
        (told(transport="rc_mlx5"), told(transport="tcp"), True),
        (told(), told(is_degraded=True), True),
        (told(verdict="native"), told(verdict="regroup"), True),
    ],
)
def test_what_is_worth_a_line_in_the_log(first: ProbeTold, second: ProbeTold, *, is_change: bool) -> None:
    made = book("a")
    assert made.note(only(made), first, 0.0)
    assert made.note(only(made, INTERVAL_S), second, INTERVAL_S) is is_change


def test_an_agent_that_does_not_answer_says_nothing_of_the_path() -> None:
    made = book("a")
    made.note(only(made), told(transport="tcp"), 0.0)
    path = only(made, INTERVAL_S)
    assert made.note_agent_lost(path, INTERVAL_S)
    report = made.report(INTERVAL_S)
    assert (report.is_agent_up, report.paths[0].transport, report.paths[0].age_s) == (
        False,
        "tcp",
        INTERVAL_S,
    )
    assert path.due_s == INTERVAL_S + RETRY_S_MIN
    assert not made.note_agent_lost(only(made, path.due_s), path.due_s)


def test_a_report_says_what_was_told_and_when() -> None:
    made = book("a", "b")
    first = made.take_due(0.0, 1)[0]
    made.note(
        first,
        told(verdict="convert", transport="nixl/tcp", is_degraded=True, latency_s=0.1, bytes_per_s=5.0),
        4.0,
    )
    known, unknown = made.report(10.0).paths
    assert (known.target, known.kv_address, known.probe_count, known.age_s) == ("a:8000", "a:14579", 1, 6.0)
    assert (known.verdict, known.transport, known.is_degraded) == ("convert", "nixl/tcp", True)
    assert (known.latency_s, known.bandwidth_bytes_per_s) == (0.1, 5.0)
    assert (unknown.target, unknown.probe_count, unknown.failure) == ("b:8000", 0, "")


def test_what_comes_over_the_network_is_bounded() -> None:
    made = book("a")
    path = only(made)
    made.note(
        path,
        told("x" * 999, detail="d" * 999, transport="t" * 999, latency_s=float("nan"), bytes_per_s=-1.0),
        0.0,
    )
    (shown,) = made.report(0.0).paths
    assert shown.failure == "malformed"
    assert max(len(shown.detail), len(shown.transport)) == 200
    assert (shown.latency_s, shown.bandwidth_bytes_per_s) == (None, None)


class BookMachine(RuleBasedStateMachine):
    """Targets come and go while probes end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.book = book()
        self.now_s = 0.0
        self.asked: list[Path] = []
        self.listed: set[str] = set()

    @rule(names=st.sets(st.sampled_from("abcde")), kv_port=st.sampled_from([None, 7]))
    def sync(self, names: set[str], kv_port: int | None) -> None:
        dropped = self.book.sync([target(name, kv_port) for name in sorted(names)], self.now_s)
        assert {name[0] for name in dropped} == self.listed - names
        self.listed = names

    @rule(room=st.integers(0, 3))
    def take(self, room: int) -> None:
        due = self.book.take_due(self.now_s, room)
        assert len(due) <= room
        assert not any(path in self.asked for path in due)
        self.asked += due

    @rule(data=st.data(), failure=st.sampled_from(["", "unreachable"]), is_agent_lost=st.booleans())
    def end(self, data: st.DataObject, failure: str, is_agent_lost: bool) -> None:
        if not self.asked:
            return
        path = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        if is_agent_lost:
            self.book.note_agent_lost(path, self.now_s)
        else:
            self.book.note(path, told(failure), self.now_s)
        assert self.now_s < path.due_s <= self.now_s + INTERVAL_S

    @rule(seconds=st.floats(0.0, 40.0))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def every_listed_target_is_asked_or_waits_for_its_turn(self) -> None:
        report = self.book.report(self.now_s)
        assert {path.target[0] for path in report.paths} == self.listed
        assert 0.0 <= self.book.wait_s(self.now_s, 1.0) <= 1.0
        assert all(path.age_s >= 0.0 for path in report.paths)


TestBookMachine = BookMachine.TestCase
TestBookMachine.settings = settings(max_examples=30, stateful_step_count=25)
