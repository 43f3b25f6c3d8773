"""Whether a request starts now, waits for its turn, or is refused before any work is done for it."""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdcoord.core import refusals
from pdcoord.core.events import Action, Dispatch, Refuse, Wait
from pdcoord.core.fleet import Endpoint, EndpointId, Fleet, Health, ModelName, PoolGroup
from pdcoord.core.ledger import Ledger
from pdcoord.core.legs import OUTPUT_TOKENS_COUNTED_MAX, OUTPUT_TOKENS_GUESS
from pdcoord.core.model import Model
from pdcoord.core.pacing import HOLD_SHARE, is_crowded
from pdcoord.core.plan import Candidate
from pdcoord.core.ports import SpeedModel
from pdcoord.core.queues import WORK_S_MIN, ClassQueue, ModelQueue, Waiting
from pdcoord.core.request import Request, RequestId
from pdcoord.core.turnover import Turnover
from pdcoord.protocol.errors import Refusal

TRIES_MAX = 8
"""Plans made for waiting requests of one model at a time; more follow at once, as an event of their own."""
RETRY_S_MIN = 0.005
"""After a try in vain the next one comes no sooner, however many events there are."""
TRIAL_S = 5.0
"""From one request that goes though its deadline seems lost to the next, for each model."""
RETRY_S_HELD = 0.05
"""The same after a try that failed for the pace of streams, which changes as they end."""
RETRY_S_MAX = 1.0
"""Though nothing is heard, whoever waits is looked at this often."""


@dataclass(frozen=True, slots=True)
class Later:
    """The request must wait; without an event another look is worth it after `retry_s`.

    Attributes:
        uncached_tokens: prompt tokens to compute for it, as far as that is known.
    """

    retry_s: float = RETRY_S_MAX
    uncached_tokens: int | None = None


Decide = Callable[[Waiting], Dispatch | Refuse | Later]


class Admission:
    """Keeps the requests that wait and says who is next.

    Saturation is predicted time: a request is kept here while its best endpoint would have it wait longer
    than the policy's `queue_s_max` itself, so that it is bound as late as possible to where it goes.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger, speed: SpeedModel) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._speed = speed
        self._queues: dict[ModelName, ModelQueue] = {}
        self._waiting: dict[RequestId, Waiting] = {}
        self._give_up: list[tuple[float, int, RequestId]] = []
        self._retry_s: dict[ModelName, float] = {}
        self._tried_s: dict[ModelName, float] = {}
        self._trial_s: dict[ModelName, float] = {}
        self._turnover = Turnover()
        self._order = 0

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    @property
    def count(self) -> int:
        return len(self._waiting)

    def classes(self) -> Iterator[tuple[ModelName, int, ClassQueue]]:
        """What waits, by model and priority; read only."""
        for name, queue in self._queues.items():
            for priority, waiting in queue.classes():
                yield name, priority, waiting

    def work_s(self, request: Request, uncached_tokens: int) -> float:
        """Predicted seconds of an endpoint's time that a request takes, on the fastest there is.

        The prompt's computation, and its answer as one of as many as an endpoint may have at a time. One
        measure for all of a model's requests, wherever each is served.
        """
        expected = self._speed.output_tokens(request.model, request.tenant)
        tokens = OUTPUT_TOKENS_GUESS if expected is None else expected
        if request.output_tokens_max is not None:
            tokens = min(tokens, request.output_tokens_max)
        tokens = min(tokens, OUTPUT_TOKENS_COUNTED_MAX) if request.is_generative else 0.0
        prefill_s: list[float] = []
        decode_s: list[float] = []
        for group in self._fleet.groups(request.model):
            endpoint = _any_of(group)
            if endpoint.pool.can_prefill or endpoint.pool.can_serve_alone:
                prefill_s.append(self._speed.prefill_s(endpoint, uncached_tokens))
            if endpoint.pool.can_decode:
                step_s = self._speed.step_s(endpoint, 1, request.prompt_tokens)
                decode_s.append(tokens * step_s / endpoint.pool.limits.in_flight_max)
        return max(min(prefill_s, default=0.0) + min(decode_s, default=0.0), WORK_S_MIN)

    def drain_s(self, model: ModelName, engine_wait_s: float = 0.0) -> float:
        """How long what waits for a model is predicted to keep its endpoints busy."""
        queue = self._queues.get(model)
        if queue is None:
            return engine_wait_s
        return engine_wait_s + self._turnover.wait_s(model, queue.work_s / self._worker_count(model))

    def is_behind(self, request: Request) -> bool:
        """Whether others wait whose class is before this one's.

        Of its own class none is: who waits has been looked at since room was made, so what is left is room
        that this one can use and they cannot, on endpoints that are too small for them, say.
        """
        queue = self._queues.get(request.model)
        return queue is not None and any(priority > request.priority for priority, _ in queue.classes())

    def judge(
        self,
        request: Request,
        model: Model,
        best: Candidate | None,
        waited_s: float,
        *,
        now_s: float,
    ) -> Refusal | Later | None:
        """Rule on a request whose best way is known; None if it may start.

        Args:
            best: its best way; None if all that could serve it are at their limits.
            waited_s: since it arrived.
        """
        rules = model.admission
        engine_wait_s = 0.0
        figures = best.figures if best is not None else None
        if best is not None and figures is not None:
            engine_wait_s = figures.queue_s + figures.room_s
            wanted_s = self._wanted_s(request, model)
            ttft_s = waited_s + figures.ttft_s
            latest_s = math.inf if wanted_s is None else wanted_s * (1.0 + rules.deadline_excess_max)
            is_slow = figures.ttft_s > latest_s and engine_wait_s <= 0.0
            if wanted_s is not None and ttft_s > latest_s and not (is_slow and self._tries(model, now_s)):
                return refusals.deadline(ttft_s, wanted_s, self.drain_s(model.name, engine_wait_s))
            if engine_wait_s <= rules.queue_s_max:
                return self._hold_back(request, model, best, ttft_s)
        if request.is_sheddable:
            return refusals.shed(self.drain_s(model.name, engine_wait_s))
        if not rules.wait_s_max:
            return refusals.AT_LIMIT if figures is None else None
        if figures is None:
            return Later()
        too_long_s = engine_wait_s - rules.queue_s_max
        return Later(min(max(too_long_s, RETRY_S_MIN), RETRY_S_MAX), figures.uncached_tokens)

    def _hold_back(
        self, request: Request, model: Model, best: Candidate, ttft_s: float
    ) -> Refusal | Later | None:
        """Rule on a request that would find no queue; None if it may start.

        It waits while its streams' pace would be past the objective, for as long as its own first token
        allows. Then the model's objective is a wish, but one that the request named itself refuses it.

        Args:
            ttft_s: its first token, from its arrival.
        """
        rules, figures = model.admission, best.figures
        tpot_s = request.slo.tpot_s or model.slo.tpot_s
        alone_s = self._speed.step_s(best.decode, 1, request.prompt_tokens) if tpot_s is not None else 0.0
        if not rules.wait_s_max or not is_crowded(
            figures.pace_s, tpot_s, alone_s=alone_s, neighbour_count=self._count_on(best.decode.id)
        ):
            return None
        if request.is_sheddable:
            return refusals.shed(self.drain_s(model.name))
        wanted_s = request.slo.ttft_s or model.slo.ttft_s or rules.queue_s_max
        if ttft_s <= HOLD_SHARE * wanted_s:
            return Later(RETRY_S_HELD, figures.uncached_tokens)
        if request.slo.tpot_s is None:
            return None
        return refusals.pace(figures.pace_s, request.slo.tpot_s, self.drain_s(model.name))

    def _count_on(self, endpoint_id: EndpointId) -> int:
        """Requests on an endpoint, with those that others sent there."""
        state, load = self._fleet.get(endpoint_id), self._ledger.load(endpoint_id)
        return load.request_count + load.others(state.sample if state is not None else None)

    def _tries(self, model: Model, now_s: float) -> bool:
        """Whether this request goes though its deadline seems lost where nobody is before it.

        One in a while does, the first TRIAL_S after a refusal: who is refused teaches nothing, and a fleet
        that was slow once would be slow for ever.
        """
        refused_s = self._trial_s.setdefault(model.name, now_s)
        if now_s < refused_s + TRIAL_S:
            return False
        self._trial_s[model.name] = now_s
        return True

    def enqueue(self, request: Request, model: Model, later: Later, now_s: float) -> list[Action]:
        """Have a request wait, if there is place; others may lose theirs to it."""
        tokens = later.uncached_tokens
        work_s = self.work_s(request, request.prompt_tokens if tokens is None else tokens)
        if request.is_sheddable:
            return [Refuse(request.id, refusals.shed(self.drain_s(model.name)))]
        predicted_s = self._wait_s(request)
        evicted = self._make_place(request, model, work_s, predicted_s)
        if evicted is None:
            return [Refuse(request.id, refusals.queue_full(self.drain_s(model.name)))]
        self._order += 1
        rules, own_s = model.admission, request.slo.ttft_s
        give_up_s = now_s + rules.wait_s_max
        own_end_s = give_up_s if own_s is None else now_s + own_s * (1.0 + rules.deadline_excess_max)
        wanted_s = own_s if own_s is not None else model.slo.ttft_s
        waiting = Waiting(
            request=request,
            arrived_s=now_s,
            due_s=give_up_s if wanted_s is None else min(now_s + wanted_s, give_up_s),
            give_up_s=min(give_up_s, own_end_s),
            is_deadline=own_end_s < give_up_s,
            order=self._order,
            work_s=work_s,
            predicted_s=predicted_s,
        )
        self._waiting[request.id] = waiting
        queue = self._queues.setdefault(model.name, ModelQueue())
        queue.low_share = rules.low_share_min
        queue.add(waiting)
        heapq.heappush(self._give_up, (waiting.give_up_s, waiting.order, waiting.id))
        self._wait_until(model.name, now_s + later.retry_s)
        refusal = refusals.shed(self.drain_s(model.name)) if evicted else None
        return [Wait(request.id), *(Refuse(each.id, refusal) for each in evicted if refusal is not None)]

    def wake(self, now_s: float) -> None:
        """Something happened that may have made room."""
        for name in self._queues:
            self._wait_until(name, max(now_s, self._tried_s.get(name, -RETRY_S_MIN) + RETRY_S_MIN))

    def serve(self, decide: Decide, now_s: float) -> list[Action]:
        """Refuse whom time has run out for, and start those for whom there is room by now."""
        actions = self._expire(now_s)
        for name in [name for name, at_s in self._retry_s.items() if at_s <= now_s]:
            actions += self._serve_model(name, decide, now_s)
        return actions

    def drop(self, request_id: RequestId) -> bool:
        """Forget a request that waits; whether it did."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            self._remove(waiting)
        return waiting is not None

    def next_event_s(self) -> float | None:
        """When `serve` should be asked though nothing happens; None while nobody waits."""
        while self._give_up and self._give_up[0][2] not in self._waiting:
            heapq.heappop(self._give_up)
        times = [*self._retry_s.values(), *(entry[0] for entry in self._give_up[:1])]
        return min(times, default=None)

    def keep_only(self, models: dict[str, Model]) -> list[Action]:
        """There are other models by now: refuse those who wait for one that is gone."""
        self._trial_s = {name: at_s for name, at_s in self._trial_s.items() if name in models}
        self._turnover.keep_only(models)
        gone = [waiting for waiting in self._waiting.values() if waiting.request.model not in models]
        for waiting in gone:
            self._remove(waiting)
        return [Refuse(each.id, refusals.model_unknown(each.request.model)) for each in gone]

    def validate(self) -> None:
        """Assert that the queues hold what waits, and that each who waits will be looked at."""
        self._turnover.validate()
        queued = [waiting for queue in self._queues.values() for waiting in queue.items()]
        assert len(queued) == len(self._waiting), "the queues and those who wait disagree"
        assert all(self._waiting.get(each.id) is each for each in queued), "another of the same id waits"
        assert set(self._retry_s) == set(self._queues), "a queue that nobody looks at"
        listed = {entry[2] for entry in self._give_up}
        assert listed >= set(self._waiting), "a wait without an end"
        assert len(self._give_up) <= 2 * len(self._waiting) + 64, "ends of waits pile up"
        for name, queue in self._queues.items():
            assert queue.count, f"{name}: an empty queue is kept"
            assert all(waiting.request.model == name for waiting in queue.items()), f"{name}: a stranger"
            queue.validate()

    def _serve_model(self, name: ModelName, decide: Decide, now_s: float) -> list[Action]:
        queue = self._queues[name]
        actions: list[Action] = []
        passed: set[int] = set()
        retry_s = RETRY_S_MAX
        self._retry_s[name] = now_s + RETRY_S_MAX
        for _ in range(TRIES_MAX):
            waiting = queue.next(passed)
            if waiting is None:
                break
            decided = decide(waiting)
            if isinstance(decided, Later):
                # The first that must wait speaks for its class: who would come behind it, waits too.
                passed.add(waiting.request.priority)
                self._tried_s[name] = now_s
                retry_s = min(retry_s, decided.retry_s)
                continue
            actions.append(decided)
            if isinstance(decided, Dispatch):
                tokens = decided.plan.chosen.figures.uncached_tokens
                queue.take(waiting, self.work_s(waiting.request, tokens), passed)
                self._turnover.note(name, waiting.predicted_s, now_s - waiting.arrived_s)
                self._forget(waiting)
            else:
                self._remove(waiting)
        else:
            retry_s = RETRY_S_MIN if passed else 0.0
        if name in self._queues:
            self._retry_s[name] = now_s + retry_s
        return actions

    def _expire(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        while self._give_up and self._give_up[0][0] <= now_s:
            _, _, request_id = heapq.heappop(self._give_up)
            waiting = self._waiting.get(request_id)
            if waiting is None:
                continue
            self._remove(waiting)
            waited_s = now_s - waiting.arrived_s
            self._turnover.note(waiting.request.model, waiting.predicted_s, waited_s)
            drain_s = self.drain_s(waiting.request.model)
            own_s = waiting.request.slo.ttft_s
            if waiting.is_deadline and own_s is not None:
                refusal = refusals.deadline(waited_s, own_s, drain_s)
            else:
                refusal = refusals.waited_too_long(waited_s, drain_s)
            actions.append(Refuse(request_id, refusal))
        return actions

    def _make_place(
        self, request: Request, model: Model, work_s: float, predicted_s: float
    ) -> list[Waiting] | None:
        """Whom to turn out so that one more may wait: nobody, one, or None if the newcomer may not.

        The lowest class goes first, and in the newcomer's own class whoever has most of the places: a
        tenant that floods the queue shuts out itself and nobody else.
        """
        queue = self._queues.get(model.name)
        if queue is None:
            return []
        if self._turnover.wait_s(model.name, predicted_s) > model.admission.wait_s_max:
            return None
        if queue.count < model.admission.requests_max:
            return []
        priority, lowest = queue.classes()[-1]
        if priority > request.priority:
            return None
        name, most_s = lowest.heaviest()
        own_s = lowest.tenant_work_s(request.tenant)
        if priority == request.priority and (name == request.tenant or most_s <= own_s + work_s):
            return None
        evicted = lowest.last_of(name)
        self._remove(evicted)
        return [evicted]

    def _wait_s(self, request: Request) -> float:
        """Predicted wait of a newcomer: behind higher classes, and its tenant's share of its own class."""
        queue = self._queues.get(request.model)
        if queue is None:
            return 0.0
        ahead_s = 0.0
        for priority, waiting in queue.classes():
            if priority > request.priority:
                ahead_s += waiting.work_s
            elif priority == request.priority:
                own_s = waiting.tenant_work_s(request.tenant)
                ahead_s += min(waiting.work_s, own_s * waiting.tenant_count)
        return ahead_s / self._worker_count(request.model)

    def _worker_count(self, model: ModelName) -> int:
        groups = self._fleet.groups(model)
        return max(1, sum(len(group.by_health[Health.READY]) for group in groups))

    @staticmethod
    def _wanted_s(request: Request, model: Model) -> float | None:
        """When its first token must be there. The model's own objective is a wish, but for the sheddable."""
        if request.slo.ttft_s is not None or not request.is_sheddable:
            return request.slo.ttft_s
        return model.slo.ttft_s

    def _wait_until(self, name: ModelName, at_s: float) -> None:
        self._retry_s[name] = min(self._retry_s.get(name, at_s), at_s)

    def _remove(self, waiting: Waiting) -> None:
        self._queues[waiting.request.model].remove(waiting)
        self._forget(waiting)

    def _forget(self, waiting: Waiting) -> None:
        name = waiting.request.model
        del self._waiting[waiting.id]
        if not self._queues[name].count:
            del self._queues[name]
            self._retry_s.pop(name, None)
            self._tried_s.pop(name, None)
        if len(self._give_up) > 2 * len(self._waiting) + 64:
            self._give_up = [entry for entry in self._give_up if entry[2] in self._waiting]
            heapq.heapify(self._give_up)


def _any_of(group: PoolGroup) -> Endpoint:
    """An endpoint to ask speeds of, a ready one if there is one; a group has at least one endpoint."""
    ready = group.by_health[Health.READY]
    return next(iter(ready.values())).endpoint if ready else next(group.states()).endpoint
