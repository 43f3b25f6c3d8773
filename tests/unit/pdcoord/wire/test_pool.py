"""The idle pool: last used first, bounded per origin, in all and in time."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.pool import IdlePool

A, B, C = HostPort("a:1"), HostPort("b:1"), HostPort("c:1")


@dataclass(eq=False)
class Fake:
    address: HostPort


def make(*, idle_s_max: float = 4.0, per_origin_max: int = 8, total_max: int = 16) -> IdlePool[Fake]:
    return IdlePool(idle_s_max=idle_s_max, per_origin_max=per_origin_max, total_max=total_max)


def test_takes_the_last_used_of_the_same_origin() -> None:
    pool = make()
    first, second, other = Fake(A), Fake(A), Fake(B)
    for connection in (first, second, other):
        assert pool.put(connection, 0.0) == []
    assert pool.take(A, 1.0) is second
    assert pool.take(A, 1.0) is first
    assert pool.take(A, 1.0) is None
    assert pool.take(B, 1.0) is other
    assert len(pool) == 0


def test_an_expired_connection_is_never_taken_and_is_dropped_once() -> None:
    pool = make(idle_s_max=4.0)
    old, young = Fake(A), Fake(A)
    pool.put(old, 0.0)
    assert pool.next_expiry_s() == 4.0
    assert pool.take(A, 4.0) is None
    pool.put(young, 3.0)
    assert pool.expire(4.0) == [old]
    assert pool.expire(4.0) == []
    assert pool.next_expiry_s() == 7.0
    assert pool.take(A, 6.9) is young
    assert pool.next_expiry_s() is None


def test_past_the_bound_of_an_origin_its_longest_unused_is_dropped() -> None:
    pool = make(per_origin_max=2)
    connections = [Fake(A) for _ in range(3)]
    other = Fake(B)
    pool.put(other, 0.0)
    assert [pool.put(c, 1.0) for c in connections] == [[], [], [connections[0]]]
    assert len(pool) == 3


def test_past_the_bound_in_all_the_longest_unused_of_any_origin_is_dropped() -> None:
    pool = make(total_max=2)
    a, b, c = Fake(A), Fake(B), Fake(C)
    assert [pool.put(x, 0.0) for x in (a, b, c)] == [[], [], [a]]
    assert pool.take(A, 0.0) is None


def test_nothing_is_kept_where_nothing_may_be() -> None:
    pool = make(per_origin_max=0)
    connection = Fake(A)
    assert pool.put(connection, 0.0) == [connection]
    assert len(pool) == 0


def test_removing_what_is_not_there_does_nothing() -> None:
    pool = make()
    pool.remove(Fake(A))
    assert len(pool) == 0


class PoolMachine(RuleBasedStateMachine):
    """Against a plain list in order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make(idle_s_max=3.0, per_origin_max=3, total_max=5)
        self.kept: list[tuple[float, Fake]] = []
        self.now_s = 0.0

    @rule(address=st.sampled_from([A, B, C]))
    def put(self, address: HostPort) -> None:
        connection = Fake(address)
        dropped = self.pool.put(connection, self.now_s)
        self.kept.append((self.now_s + 3.0, connection))
        self.kept = [pair for pair in self.kept if pair[1] not in dropped]

    @rule(address=st.sampled_from([A, B, C]))
    def take(self, address: HostPort) -> None:
        usable = [c for expires_s, c in self.kept if c.address == address and expires_s > self.now_s]
        taken = self.pool.take(address, self.now_s)
        assert taken is (usable[-1] if usable else None)
        self.kept = [pair for pair in self.kept if pair[1] is not taken]

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.kept:
            index = data.draw(st.integers(0, len(self.kept) - 1))
            self.pool.remove(self.kept.pop(index)[1])

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        gone = self.pool.expire(self.now_s)
        assert gone == [c for expires_s, c in self.kept if expires_s <= self.now_s]
        self.kept = [pair for pair in self.kept if pair[1] not in gone]

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.pool) == len(self.kept) <= 5
        for address in (A, B, C):
            assert sum(c.address == address for _, c in self.kept) <= 3
        assert self.pool.next_expiry_s() == (self.kept[0][0] if self.kept else None)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(st.lists(st.sampled_from([A, B, C]), max_size=40))
def test_every_connection_is_either_kept_or_handed_back(addresses: list[HostPort]) -> None:
    pool = make(per_origin_max=2, total_max=3)
    handed_back = [c for address in addresses for c in pool.put(Fake(address), 0.0)]
    assert len(set(map(id, handed_back))) == len(handed_back)
    assert len(pool) + len(handed_back) == len(addresses)
