"""Queues of waiting requests: order, fairness by work, and accounts, for any order of comings and goings."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdcoord.core.fleet import ModelName
from pdcoord.core.queues import TENANTS_IDLE_MAX, WORK_S_MIN, ClassQueue, ModelQueue, Waiting
from pdcoord.core.request import Request, RequestId

M = ModelName("m")
works = st.floats(0.01, 10.0)


def waiting(
    order: int, *, tenant: str = "", priority: int = 0, work_s: float = 1.0, due_s: float | None = None
) -> Waiting:
    request = Request(RequestId(f"r{order}"), M, 10, tenant=tenant, priority=priority)
    due_s = 30.0 + order if due_s is None else due_s
    return Waiting(request, float(order), due_s, 60.0 + order, False, order, work_s)


def drain(queue: ModelQueue) -> list[str]:
    """Everything in the order it is served; to serve one is to give it the work it was predicted."""
    served = []
    while (head := queue.next(())) is not None:
        served.append(str(head.id))
        queue.take(head, head.work_s)
        queue.validate()
    return served


def test_equals_go_in_the_order_of_their_arrival() -> None:
    queue = ModelQueue()
    for order in (1, 2, 3):
        queue.add(waiting(order))
    assert drain(queue) == ["r1", "r2", "r3"]


def test_within_a_tenant_the_earliest_deadline_goes_first() -> None:
    queue = ModelQueue()
    for order, due_s in ((1, 9.0), (2, 3.0), (3, 6.0)):
        queue.add(waiting(order, due_s=due_s))
    assert drain(queue) == ["r2", "r3", "r1"]


def test_a_deadline_helps_against_no_other_tenant() -> None:
    queue = ModelQueue()
    queue.add(waiting(1, tenant="a"))
    queue.add(waiting(2, tenant="a"))
    queue.add(waiting(3, tenant="b", due_s=0.0))
    queue.add(waiting(4, tenant="b", due_s=0.0))
    assert drain(queue) == ["r1", "r3", "r2", "r4"]


def test_without_a_share_priorities_are_strict() -> None:
    queue = ModelQueue(low_share=0.0)
    for order, priority in ((1, 0), (2, 5), (3, 0), (4, 9), (5, 5)):
        queue.add(waiting(order, priority=priority))
    assert drain(queue) == ["r4", "r2", "r5", "r1", "r3"]


def test_a_class_that_is_passed_over_has_no_say() -> None:
    queue = ModelQueue()
    queue.add(waiting(1, priority=5))
    queue.add(waiting(2, priority=0))
    head = queue.next({5})
    assert head is not None
    assert head.id == "r2"
    assert queue.next({5, 0}) is None


@settings(max_examples=60)
@given(
    a=st.lists(works, min_size=1, max_size=40),
    b=st.lists(works, min_size=1, max_size=400),
)
def test_of_two_tenants_that_wait_neither_gets_ahead_by_more_than_one_request_each(
    a: list[float], b: list[float]
) -> None:
    queue = ClassQueue()
    order = 0
    for tenant, sizes in (("b", b), ("a", a)):  # The flood comes first.
        for work_s in sizes:
            order += 1
            queue.add(waiting(order, tenant=tenant, work_s=work_s))
    given_s: Counter[str] = Counter()
    while queue.tenant_count == 2:
        head = queue.head()
        queue.take(head, head.work_s)
        given_s[head.request.tenant] += head.work_s  # type: ignore[assignment]
        assert abs(given_s["a"] - given_s["b"]) <= max(a) + max(b) + 1e-6
        queue.validate()


def test_a_tenant_that_comes_back_at_once_has_not_paid_for_it_yet() -> None:
    """One request at a time, each as long as ten of the other's: it gets its half, not ten elevenths."""
    queue = ClassQueue()
    given_s: Counter[str] = Counter()
    order = 0
    for _ in range(500):
        order += 1
        queue.add(waiting(order, tenant="short", work_s=1.0))
    for _ in range(300):
        if not queue.tenant_work_s("long"):
            order += 1
            queue.add(waiting(order, tenant="long", work_s=10.0))
        head = queue.head()
        queue.take(head, head.work_s)
        given_s[head.request.tenant] += head.work_s  # type: ignore[assignment]
    assert abs(given_s["long"] - given_s["short"]) <= 11.0


@given(low_share=st.floats(0.05, 0.5), high=works, low=works)
def test_lower_classes_get_their_share_and_no_more(low_share: float, high: float, low: float) -> None:
    queue = ModelQueue(low_share)
    given_s = {0: 0.0, 5: 0.0}
    for order in range(200):
        queue.add(waiting(order, priority=0 if order % 2 else 5, work_s=low if order % 2 else high))
    while queue.next({5}) is not None and queue.next({0}) is not None:
        head = queue.next(())
        assert head is not None
        queue.take(head, head.work_s)
        given_s[head.request.priority] += head.work_s
        assert abs(given_s[0] - low_share * given_s[5]) <= low + low_share * high + 1e-6


def test_the_oldest_of_all_lower_classes_gets_the_share() -> None:
    queue = ModelQueue(low_share=1.0)
    for order, priority in ((1, 0), (2, 3), (3, 9), (4, 9), (5, 9)):
        queue.add(waiting(order, priority=priority))
    assert drain(queue)[:4] == ["r3", "r1", "r4", "r2"]


def test_tenants_that_are_gone_are_forgotten_in_the_end() -> None:
    queue = ClassQueue()
    queue.add(waiting(0, tenant="stays", work_s=WORK_S_MIN))
    for order in range(1, 3 * TENANTS_IDLE_MAX):
        queue.add(waiting(order, tenant=f"t{order}"))
        queue.take(queue.head(), 1e6)
    queue.validate()


class QueueMachine(RuleBasedStateMachine):
    """Comings, services and goings at will; the accounts are the sums, and nobody is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = ModelQueue(0.1)
        self.here: dict[str, Waiting] = {}
        self.order = 0

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from([0, 1, 7]),
        work_s=works,
        due_s=st.sampled_from([0.0, 5.0, 9.0]),
    )
    def come(self, tenant: str, priority: int, work_s: float, due_s: float) -> None:
        self.order += 1
        one = waiting(self.order, tenant=tenant, priority=priority, work_s=work_s, due_s=due_s)
        self.here[one.id] = one
        self.queue.add(one)

    @precondition(lambda self: self.here)
    @rule(work_s=works, passed=st.sets(st.sampled_from([0, 1, 7]), max_size=2))
    def serve(self, work_s: float, passed: set[int]) -> None:
        head = self.queue.next(passed)
        fit = [one for one in self.here.values() if one.request.priority not in passed]
        assert (head is None) == (not fit)
        if head is not None:
            tenant = [
                one
                for one in fit
                if (one.request.tenant, one.request.priority) == (head.request.tenant, head.request.priority)
            ]
            assert head is min(tenant, key=lambda one: one.key)
            self.queue.take(self.here.pop(head.id), work_s, passed)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.queue.remove(self.here.pop(data.draw(st.sampled_from(sorted(self.here)))))

    @invariant()
    def accounts_agree(self) -> None:
        self.queue.validate()
        assert {one.id for one in self.queue.items()} == set(self.here)
        assert self.queue.count == len(self.here)
        assert abs(self.queue.work_s - sum(one.work_s for one in self.here.values())) < 1e-6


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=40)
