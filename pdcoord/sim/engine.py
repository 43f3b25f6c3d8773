"""An emulated engine: a step loop over a KV pool, with hand-over to and from other engines.

Pure: time comes in with every event, chance from the generator it was made with. The same model runs in
virtual time and behind HTTP.
"""

from random import Random

from pdcoord.core.fleet import Role
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.consumer import Consumer, FetchEnded
from pdcoord.sim.counters import EngineCounters
from pdcoord.sim.kvpool import KvPool
from pdcoord.sim.live import LiveRequest, Shared, State, TimerKey, make_live, misfit
from pdcoord.sim.messages import (
    Abort,
    CacheCleared,
    EngineEffect,
    EngineEvent,
    EngineRequest,
    FailReason,
    FinishReason,
    HeartbeatHeard,
    IssuedTicket,
    KvChanged,
    LinkSlowed,
    PeerInfo,
    ProducerEvent,
    PullAsked,
    PullClosed,
    Rejected,
    RejectReason,
    ReleaseHeard,
    RequestFailed,
    ShutDown,
    StepsSlowed,
    Submit,
    Tick,
    TokenOut,
)
from pdcoord.sim.producer import Producer
from pdcoord.sim.settings import EngineSettings, LoadFailurePolicy
from pdcoord.sim.steps import Batch, Step, step_s, store_full_blocks
from pdcoord.sim.timers import Timers


class EngineModel:
    """One engine from start to death.

    `handle` tells it what happened and returns what it does; `next_event_s` says when to tell it that
    time has passed. Time never runs backwards. Steps chain at their own ends even if the caller is late,
    so that a late caller does not slow the engine.
    """

    def __init__(self, settings: EngineSettings, rng: Random, engine_id: str, now_s: float = 0.0) -> None:
        """An idle engine.

        Args:
            engine_id: new for every start; tickets of an earlier one are refused.
        """
        self.settings = settings
        self.engine_id = engine_id
        self._rng = rng
        pool = KvPool(settings.block_total, settings.layout.block_tokens, is_caching=settings.caches_prefixes)
        timers: Timers[TimerKey] = Timers()
        self._shared = Shared(settings, pool, timers, EngineCounters(), [], now_s)
        self._producer = Producer(self._shared, engine_id)
        self._consumer = Consumer(self._shared, engine_id)
        self._batch = Batch(self._shared, self._begin_fetch)
        self._live: dict[str, LiveRequest] = {}
        self._step: Step | None = None
        self._speed = 1.0
        self._is_shutting_down = False

    # What anybody may look at.

    @property
    def counters(self) -> EngineCounters:
        return self._shared.counters

    @property
    def pool(self) -> KvPool:
        return self._shared.pool

    @property
    def producer(self) -> Producer:
        return self._producer

    @property
    def consumer(self) -> Consumer:
        return self._consumer

    @property
    def running_count(self) -> int:
        return len(self._batch.running)

    def count_in(self, *states: State) -> int:
        """Requests that are in one of these states."""
        return sum(live.state in states for live in self._live.values())

    @property
    def is_drained(self) -> bool:
        """Whether a shutdown waits for nothing more; in vLLM 0.32 a prefill's blocks are work too."""
        return self._is_shutting_down and not self._live and not self._producer.leases()

    @property
    def waiting_count(self) -> int:
        """As vLLM's num_requests_waiting: those that wait for remote KV are among them."""
        return self.count_in(State.WAITING, State.FETCHING, State.RENDEZVOUS)

    def cached_tokens_of(self, request_id: str) -> int:
        """Prompt tokens of a running request that were computed before, here or elsewhere."""
        live = self._live.get(request_id)
        return 0 if live is None else (live.cached_tokens or 0) + live.external_tokens

    @property
    def info(self) -> PeerInfo:
        """What this engine answers to a handshake."""
        return PeerInfo(
            engine_id=self.engine_id,
            model=self.settings.model,
            speaks=self.settings.connector,
            layout=self.settings.layout,
        )

    def next_event_s(self) -> float | None:
        """When something happens of its own accord; None if nothing will."""
        return self._shared.timers.next_s()

    # Time and events.

    def handle(self, event: EngineEvent, now_s: float) -> list[EngineEffect]:
        """Let time pass up to `now_s`, then let `event` happen.

        Returns:
            What the engine did in all that time, in order.
        """
        shared = self._shared
        self._pass_time(now_s)
        shared.now_s = max(shared.now_s, now_s)
        match event:
            case Submit():
                self._on_submit(event.request)
            case Abort():
                self._on_abort(event.request_id)
            case LinkSlowed():
                self._producer.set_link_factor(event.factor)
                self._consumer.set_link_factor(event.factor)
            case StepsSlowed():
                self._set_speed(event.factor)
            case ShutDown():
                self._is_shutting_down = True
            case CacheCleared():
                shared.pool.clear_cache()
            case Tick():
                pass
            case PullAsked() | PullClosed() | HeartbeatHeard() | ReleaseHeard():
                self._on_producer_event(event)
            case _:
                self._consumer.on_event(event)
        self._settle()
        self._pass_time(now_s)
        effects = list(shared.effects)
        shared.effects.clear()
        return effects

    def _pass_time(self, now_s: float) -> None:
        """Run every timer that is due, each at its own time."""
        shared = self._shared
        while (due := shared.timers.pop_due(now_s)) is not None:
            at_s, key = due
            shared.now_s = max(shared.now_s, at_s)
            self._on_timer(key)
            self._settle()

    def _on_timer(self, key: TimerKey) -> None:
        kind, name = key
        match kind:
            case "step":
                self._end_step()
            case "lease":
                self._producer.on_lease_timer(name)
            case "room":
                self._fail(self._live[name], FailReason.DECODE_GONE, "no decode came to the room in time")
            case "heartbeat":
                self._consumer.on_heartbeat_timer(self._live.values())
            case "nic":
                self._consumer.on_nic_timer()
            case "setup":
                self._consumer.on_setup_timer(name)
            case "peer":
                self._consumer.on_peer_timer(HostPort(name))
            case _:
                self._consumer.on_fetch_timer(name)

    def _settle(self) -> None:
        """After anything happened: take what arrived, begin a step if none runs, tell of cache changes."""
        shared = self._shared
        while self._consumer.ended:
            ended, self._consumer.ended = self._consumer.ended, []
            for each in ended:
                self._on_fetch_ended(each)
        if self._step is None:
            self._begin_step()
        if events := shared.pool.drain_events():
            shared.emit(KvChanged(tuple(events), shared.now_s))

    # Requests come and go.

    def _on_submit(self, request: EngineRequest) -> None:
        shared = self._shared
        refusal = self._refusal(request)
        if refusal is None:
            live = make_live(request, self.settings, shared.now_s)
            if self._is_shutting_down:
                shared.counters.aborted += 1
                self._consumer.release(request)
                self._tell_done(live, FinishReason.ABORT)
                return
            refusal = self._enter(live)
        if refusal is not None:
            reason, message = refusal
            shared.counters.rejected[reason] = shared.counters.rejected.get(reason, 0) + 1
            self._consumer.release(request)
            shared.emit(Rejected(request.id, reason, message))

    def _refusal(self, request: EngineRequest) -> tuple[RejectReason, str] | None:
        settings = self.settings
        if request.id in self._live or self._producer.has_lease(request.id):
            return RejectReason.ID_IN_USE, "a request of this id is under way"
        if (unfit := misfit(request, settings)) is not None:
            return unfit
        if self.waiting_count >= settings.queued_max:
            return RejectReason.QUEUE_FULL, f"{settings.queued_max} requests wait already"
        return None

    def _enter(self, live: LiveRequest) -> tuple[RejectReason, str] | None:
        request = live.request
        if self.settings.is_room_worker and request.room is not None:
            if self.settings.role is Role.PREFILL:
                return self._enter_room(live, request.room.room)
            live.awaits_fetch = True
        elif request.ticket is not None:
            live.awaits_fetch = True
            self._consumer.arm_heartbeat()
        self._live[live.id] = live
        self._shared.counters.prompt_tokens += live.prompt_tokens
        self._batch.waiting.append(live)
        return None

    def _enter_room(self, live: LiveRequest, room: int) -> tuple[RejectReason, str] | None:
        try:
            is_met = self._producer.enter_room(live, room)
        except ValueError as error:
            return RejectReason.ROOM_TAKEN, str(error)
        self._live[live.id] = live
        self._shared.counters.prompt_tokens += live.prompt_tokens
        if is_met:
            self._batch.waiting.append(live)
        else:
            live.state = State.RENDEZVOUS
            self._shared.timers.set(("room", live.id), self._shared.now_s + self.settings.pull_s_max)
        return None

    def _on_abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is None or live.state is State.CLOSING:
            return
        self._shared.counters.aborted += 1
        if live.state is State.FETCHING:
            # The KV may be on its way into these blocks: they are freed once nothing writes any more.
            live.state = State.CLOSING
            self._consumer.cancel(live)
            return
        if live.awaits_fetch:
            self._consumer.release(live.request)
        self._forget(live)

    def _fail(self, live: LiveRequest, reason: FailReason, detail: str) -> None:
        counters = self._shared.counters
        counters.failed[reason] = counters.failed.get(reason, 0) + 1
        self._forget(live)
        self._shared.emit(RequestFailed(live.id, reason, detail))

    def _forget(self, live: LiveRequest) -> None:
        """Take a request out of everything; its blocks become free or idle."""
        del self._live[live.id]
        self._batch.remove(live)
        if self._step is not None:
            self._step.parts.pop(live.id, None)
        self._shared.timers.clear(("room", live.id))
        if self.settings.is_room_worker and self.settings.role is Role.PREFILL and live.request.room:
            self._producer.leave_room(live.request.room.room)
        self._producer.give_up(live.request.transfer)
        self._shared.pool.release(live.blocks)
        live.blocks = []

    # Hand-over.

    def _on_producer_event(self, event: ProducerEvent) -> None:
        match event:
            case PullAsked():
                met = self._producer.on_pull_asked(event.pull_id, event.ask)
                if met is not None:
                    live = self._live[met]
                    self._shared.timers.clear(("room", met))
                    live.state = State.WAITING
                    self._batch.waiting.append(live)
            case PullClosed():
                closed = self._producer.on_pull_closed(event.pull_id, is_done=event.is_done)
                if closed is not None:
                    self._on_room_closed(*closed)
            case HeartbeatHeard():
                self._producer.on_heartbeat(event.engine_id, event.request_ids)
            case ReleaseHeard():
                self._producer.on_release(event.engine_id, event.request_id)

    def _on_room_closed(self, request_id: str, is_done: bool) -> None:  # noqa: FBT001  # one of a pair
        live = self._live[request_id]
        if is_done and live.state is State.SENDING:
            self._finish(live)
        else:
            self._fail(live, FailReason.DECODE_GONE, "the decode went away before its KV had arrived")

    def _begin_fetch(self, live: LiveRequest) -> None:
        request = live.request
        token_count = live.prompt_tokens
        if request.ticket is not None and request.ticket.token_count is not None:
            token_count = min(token_count, request.ticket.token_count)
        missing = token_count - live.computed
        self._shared.counters.external_queried_tokens += live.prompt_tokens - live.computed
        if request.ticket is not None:
            if missing > 0:
                self._consumer.begin(live, request.ticket.address, missing)
            else:
                # Everything is here already: the producer need not keep it.
                self._consumer.release(request)
                live.awaits_fetch = False
        elif request.room is not None:
            self._consumer.begin(live, request.room.address, missing)

    def _on_fetch_ended(self, ended: FetchEnded) -> None:
        live = ended.live
        live.awaits_fetch = False
        if live.state is State.CLOSING:
            self._forget(live)
            return
        if ended.grant is not None:
            self._take_fetched(live, ended)
            return
        reason, detail = ended.failure or (FailReason.PULL_BROKEN, "the pull was closed")
        may_recompute = not self.settings.is_room_worker
        if may_recompute and self.settings.load_failure_policy is LoadFailurePolicy.RECOMPUTE:
            self._shared.pool.release(live.blocks)
            live.restart()
            live.state = State.WAITING
            self._batch.waiting.appendleft(live)
        else:
            self._fail(live, reason, detail)

    def _take_fetched(self, live: LiveRequest, ended: FetchEnded) -> None:
        grant = ended.grant
        assert grant is not None, "nothing was fetched"
        loaded = min(grant.token_count, live.prompt_tokens)
        live.external_tokens = max(0, loaded - live.computed)
        self._shared.counters.external_hit_tokens += live.external_tokens
        live.taint = live.taint or self._consumer.taint_of(live, grant)
        live.has_fetched = True
        live.computed = max(live.computed, loaded)
        store_full_blocks(live, self._shared)
        if grant.first_token is not None:
            if live.output_goal > 0:
                self._say(live, grant.first_token)
            if live.output_tokens >= live.output_goal:
                self._finish(live)
                return
        elif live.computed == live.prompt_tokens:
            # The last token is computed again, for its logits.
            live.computed -= 1
        live.state = State.WAITING
        self._batch.waiting.appendleft(live)

    # Steps.

    def _begin_step(self) -> None:
        step = self._batch.plan()
        if step is None:
            return
        duration_s = step_s(self.settings.speed, step.work)
        if self.settings.jitter_share:
            duration_s *= 1.0 + self.settings.jitter_share * self._rng.uniform(-1.0, 1.0)
        duration_s /= self._speed
        self._step = step
        self._shared.counters.steps += 1
        self._shared.counters.busy_s += duration_s
        self._set_step_end(step, self._shared.now_s + duration_s)

    def _set_step_end(self, step: Step, ends_s: float) -> None:
        step.ends_s = ends_s
        self._shared.timers.set(("step", ""), ends_s)

    def _set_speed(self, factor: float) -> None:
        shared = self._shared
        if self._step is not None:
            left_s = (self._step.ends_s - shared.now_s) * self._speed / factor
            self._set_step_end(self._step, shared.now_s + left_s)
        self._speed = factor

    def _end_step(self) -> None:
        step, self._step = self._step, None
        assert step is not None, "a step ended that had not begun"
        for live, count in step.parts.values():
            live.computed += count
            store_full_blocks(live, self._shared)
            if live.remaining == 0:
                self._answer(live)

    def _answer(self, live: LiveRequest) -> None:
        """All tokens so far are computed: the next one comes out, or the request is done."""
        if live.output_tokens == 0:
            cached = (live.cached_tokens or 0) + live.external_tokens
            self._shared.counters.computed_tokens += live.prompt_tokens - cached
        if live.output_goal > 0:
            self._say(live, live.next_token())
        if live.output_tokens < live.output_goal:
            return
        room = live.request.room
        if self.settings.is_room_worker and self.settings.role is Role.PREFILL and room is not None:
            live.state = State.SENDING
            self._batch.remove(live)
            self._producer.push(live, room.room, live.ids[-1])
        else:
            self._finish(live)

    def _say(self, live: LiveRequest, token_id: int) -> None:
        now_s = self._shared.now_s
        if live.first_token_s is None:
            live.first_token_s = now_s
        position = live.output_tokens
        live.ids.append(token_id)
        live.output_tokens = position + 1
        self._shared.counters.generated_tokens += 1
        self._shared.emit(TokenOut(live.id, token_id, position, now_s))

    def _finish(self, live: LiveRequest) -> None:
        ticket = self._producer.issue(live) if live.request.is_prefill_leg else None
        self._forget(live)
        self._tell_done(live, live.planned_finish, ticket)

    def _tell_done(self, live: LiveRequest, finish: FinishReason, ticket: IssuedTicket | None = None) -> None:
        finished = self._shared.counters.finished
        finished[finish] = finished.get(finish, 0) + 1
        self._shared.emit(live.done(finish, self._shared.now_s, ticket))

    # For tests and the simulator.

    def validate(self) -> None:
        """Assert that every block, request, pull and timer is accounted for."""
        lives = self._live.values()
        self.pool.validate((block for live in lives for block in live.blocks), self._producer.pinned_blocks())
        self._producer.validate()
        self._consumer.validate()
        batch = self._batch
        assert len(batch.running) <= self.settings.running_max, "too many run"
        assert [live.id for live in batch.running] == list(dict.fromkeys(live.id for live in batch.running))
        for live in lives:
            assert (live in batch.running) == (live.state is State.RUNNING), "running list and state differ"
            assert (live in batch.waiting) == (live.state is State.WAITING), "waiting list and state differ"
            live.validate(self.pool.block_tokens)
        fetching = {live.id for live in lives if live.state in {State.FETCHING, State.CLOSING}}
        assert fetching == {fetch.live.id for fetch in self._consumer.fetches()}, "a fetch has no request"
        assert len(batch.running) + len(batch.waiting) == self.count_in(State.RUNNING, State.WAITING)
        if self._step is not None:
            assert ("step", "") in self._shared.timers, "a step never ends"
            assert all(live.state is State.RUNNING for live, _ in self._step.parts.values())
        else:
            assert not batch.running, "requests run without a step"
