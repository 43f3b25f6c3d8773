"""Requests that wait for one model: by class, fair between tenants by work, by deadline within a tenant."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from pdcoord.core.request import Request, RequestId

WORK_S_MIN = 1e-3
"""What any request counts for at least, so that tenants of tiny ones take turns too."""
TENANTS_IDLE_MAX = 1_024
"""Tenants of a class that wait for nothing and are still ahead of their share; the oldest are forgotten."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request that waits.

    Attributes:
        due_s: when its first token is wanted; less goes first within its tenant.
        give_up_s: when it is refused if it still waits.
        is_deadline: whether that is its own deadline, not the longest wait that the policy allows.
        order: grows with each request; breaks ties.
        work_s: predicted seconds of an endpoint's time that it takes.
        predicted_s: its wait as it was predicted when it came, before anything learned.
    """

    request: Request
    arrived_s: float
    due_s: float
    give_up_s: float
    is_deadline: bool
    order: int
    work_s: float
    predicted_s: float = 0.0

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def key(self) -> tuple[float, int]:
        return self.due_s, self.order


@dataclass(slots=True)
class _Tenant:
    """One tenant's requests in a class, those due first in front.

    Attributes:
        start_s: virtual time at which its next request starts.
    """

    start_s: float
    items: list[Waiting] = field(default_factory=list)
    work_s: float = 0.0

    def add(self, waiting: Waiting) -> None:
        insort(self.items, waiting, key=_key)
        self.work_s += waiting.work_s

    def remove(self, waiting: Waiting) -> None:
        index = bisect_left(self.items, waiting.key, key=_key)
        assert self.items[index] is waiting, f"{waiting.id} is not in its tenant's queue"
        del self.items[index]
        self.work_s = self.work_s - waiting.work_s if self.items else 0.0


def _key(waiting: Waiting) -> tuple[float, int]:
    return waiting.key


class ClassQueue:
    """The requests of one priority class.

    Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996), which is deficit round robin without its
    quantum: each tenant has a virtual time that grows by the work it was given, and the tenant whose time
    is least goes next. Of two tenants that both wait all the time, neither is ahead by more than the
    work of one request of each.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._ahead: dict[str, float] = {}
        self._virtual_s = 0.0
        # Whose turn it is; what a tenant has moved on from stays in the heap until it comes up.
        self._turns: list[tuple[float, int, str]] = []
        self.count = 0
        self.work_s = 0.0

    @property
    def tenant_count(self) -> int:
        return len(self._tenants)

    def items(self) -> Iterator[Waiting]:
        for tenant in self._tenants.values():
            yield from tenant.items

    def tenant_work_s(self, name: str) -> float:
        """Predicted work of this tenant that waits."""
        tenant = self._tenants.get(name)
        return tenant.work_s if tenant is not None else 0.0

    def add(self, waiting: Waiting) -> None:
        name = waiting.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            start_s = max(self._virtual_s, self._ahead.pop(name, 0.0))
            tenant = self._tenants[name] = _Tenant(start_s)
        tenant.add(waiting)
        if tenant.items[0] is waiting:
            self._note_turn(name, tenant)
        self.count += 1
        self.work_s += waiting.work_s

    def head(self) -> Waiting:
        """Who is next; there is somebody."""
        while True:
            start_s, order, name = self._turns[0]
            tenant = self._tenants.get(name)
            if tenant is not None and (tenant.start_s, tenant.items[0].order) == (start_s, order):
                return tenant.items[0]
            heapq.heappop(self._turns)

    def heaviest(self) -> tuple[str, float]:
        """The tenant with the most work waiting, and how much that is; there is one."""
        name, tenant = max(self._tenants.items(), key=lambda item: (item[1].work_s, len(item[1].items)))
        return name, tenant.work_s

    def last_of(self, name: str) -> Waiting:
        """The request of a tenant that would be served last."""
        return self._tenants[name].items[-1]

    def take(self, waiting: Waiting, work_s: float) -> None:
        """Serve the next of a tenant; `work_s` is what it turned out to need."""
        tenant = self._tenants[waiting.request.tenant]
        assert tenant.items[0] is waiting, f"{waiting.id} is not its tenant's next"
        self._virtual_s = max(self._virtual_s, tenant.start_s)
        tenant.start_s += max(work_s, WORK_S_MIN)
        self.remove(waiting)

    def remove(self, waiting: Waiting) -> None:
        """One that is not served any more."""
        name = waiting.request.tenant
        tenant = self._tenants[name]
        was_next = tenant.items[0] is waiting
        tenant.remove(waiting)
        self.count -= 1
        self.work_s = self.work_s - waiting.work_s if self.count else 0.0
        if not tenant.items:
            del self._tenants[name]
            self._remember(name, tenant.start_s)
        elif was_next:
            self._note_turn(name, tenant)

    def _note_turn(self, name: str, tenant: _Tenant) -> None:
        heapq.heappush(self._turns, (tenant.start_s, tenant.items[0].order, name))
        if len(self._turns) > 2 * len(self._tenants) + 64:
            self._turns = [(each.start_s, each.items[0].order, n) for n, each in self._tenants.items()]
            heapq.heapify(self._turns)

    def _remember(self, name: str, start_s: float) -> None:
        """What a tenant had too much of counts against it when it comes back soon."""
        if start_s > self._virtual_s:
            self._ahead[name] = start_s
        if len(self._ahead) > TENANTS_IDLE_MAX:
            self._ahead = {n: s for n, s in self._ahead.items() if s > self._virtual_s}
            while len(self._ahead) > TENANTS_IDLE_MAX:
                del self._ahead[next(iter(self._ahead))]

    def validate(self) -> None:
        """Assert that the accounts are the sums of what waits."""
        items = list(self.items())
        assert self.count == len(items), "a class is miscounted"
        assert abs(self.work_s - sum(item.work_s for item in items)) < 1e-6 * (1.0 + self.work_s), "work"
        for name, tenant in self._tenants.items():
            assert tenant.items, f"{name}: a tenant without a request"
            assert tenant.items == sorted(tenant.items, key=_key), f"{name}: out of order"
            assert all(item.request.tenant == name for item in tenant.items), f"{name}: another's request"
            assert name not in self._ahead, f"{name}: both waiting and not"
            work_s = sum(item.work_s for item in tenant.items)
            assert abs(tenant.work_s - work_s) < 1e-6 * (1.0 + work_s), f"{name}: work"
        assert len(self._ahead) <= TENANTS_IDLE_MAX, "too many tenants remembered"
        turns = {(each.start_s, each.items[0].order, name) for name, each in self._tenants.items()}
        assert turns <= set(self._turns), "a tenant without a turn"
        assert len(self._turns) <= 2 * len(self._tenants) + 65, "turns pile up"


class ModelQueue:
    """All that waits for one model, higher classes first.

    Lower classes are owed a share of the work that is given to higher ones while they wait; as soon as
    anything is owed, the one of them that has waited longest goes first. A share of 0 is strict order.

    Attributes:
        low_share: that share, 0..1.
    """

    def __init__(self, low_share: float = 0.0) -> None:
        self.low_share = low_share
        self._classes: dict[int, ClassQueue] = {}
        self._owed_s = 0.0

    @property
    def count(self) -> int:
        return sum(queue.count for queue in self._classes.values())

    @property
    def work_s(self) -> float:
        return sum(queue.work_s for queue in self._classes.values())

    def classes(self) -> list[tuple[int, ClassQueue]]:
        """Those with a request, the highest first."""
        return sorted(self._classes.items(), reverse=True)

    def items(self) -> Iterator[Waiting]:
        for queue in self._classes.values():
            yield from queue.items()

    def add(self, waiting: Waiting) -> None:
        self._classes.setdefault(waiting.request.priority, ClassQueue()).add(waiting)

    def next(self, passed: Collection[int]) -> Waiting | None:
        """Who is next, of the classes that are not passed over; None if nobody is left."""
        classes = [queue for priority, queue in self.classes() if priority not in passed]
        if not classes:
            return None
        if self._owed_s > 0.0 and len(classes) > 1:
            return min((queue.head() for queue in classes[1:]), key=lambda head: head.order)
        return classes[0].head()

    def take(self, waiting: Waiting, work_s: float, passed: Collection[int] = ()) -> None:
        """Serve one; classes passed over have no claim on it."""
        priority = waiting.request.priority
        self._classes[priority].take(waiting, work_s)
        rivals = [other for other in self._classes if other not in passed and other != priority]
        if any(other > priority for other in rivals):
            self._owed_s -= max(work_s, WORK_S_MIN)
        elif rivals:
            self._owed_s += self.low_share * max(work_s, WORK_S_MIN)
        else:
            self._owed_s = min(self._owed_s, 0.0)
        self._tidy(priority)

    def remove(self, waiting: Waiting) -> None:
        self._classes[waiting.request.priority].remove(waiting)
        self._tidy(waiting.request.priority)

    def _tidy(self, priority: int) -> None:
        # With nobody left there is nobody to be fair to: what tenants were ahead is forgotten.
        if not self._classes[priority].count:
            del self._classes[priority]

    def validate(self) -> None:
        for priority, queue in self._classes.items():
            assert queue.count, f"class {priority} is kept empty"
            assert all(item.request.priority == priority for item in queue.items()), f"class {priority}"
            queue.validate()
