"""pdcoord among the simulated routers: the real coordinator, driven by its events."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    Event,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    TimePassed,
    Wait,
)
from pdcoord.core.fleet import EndpointSeen, Sample, SampleFailed, SampleTaken
from pdcoord.core.kvcache import KvCleared
from pdcoord.core.model import Model, PrefixMode, Slo
from pdcoord.core.plan import Plan
from pdcoord.core.ports import SpeedModel
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import RungKind, ServedHeader
from pdcoord.sim.routers.base import Hold, Released, Route, Shed, Surroundings
from pdcoord.sim.routers.kvwords import KvWords
from pdcoord.sim.workload.call import Call

NAME = "pdcoord"


class OurRouter:
    """The coordinator as the gateway drives it, without the gateway.

    Which pairs may hand over is the policy's matter, by its pools' layouts; `can_hand_over` is not looked at.
    Where the policy has prefixes precise, KV events come from all places, in the workload's own blocks.
    """

    def __init__(self, model: Model, surroundings: Surroundings, speed: SpeedModel | None = None) -> None:
        self.coordinator = Coordinator(speed)
        self._model = model
        self._key_tokens = surroundings.key_tokens
        self._ids = [place.endpoint.id for place in surroundings.places]
        self._index_of = {endpoint_id: index for index, endpoint_id in enumerate(self._ids)}
        self._calls: dict[RequestId, Call] = {}
        self._released = Released()
        self._words: KvWords | None = None
        if model.prefix_mode is PrefixMode.PRECISE:
            self._words = KvWords(model.name, self._key_tokens)
            model = replace(model, precise_block_tokens=self._key_tokens)
        self.coordinator.handle(ModelsReplaced((model,)), 0.0)
        for place in surroundings.places:
            self.coordinator.handle(EndpointSeen(place.endpoint), 0.0)
            if self._words is not None:
                # Heard from its start, when it has nothing cached.
                self.coordinator.handle(KvCleared(place.endpoint.id), 0.0)

    @property
    def name(self) -> str:
        return NAME

    def route(self, call: Call, now_s: float) -> Route | Shed | Hold:
        request = self._request(call)
        answer: Route | Shed | Hold | None = None
        for action in self.coordinator.handle(RequestArrived(request), now_s):
            if action.id == request.id:
                answer = self._answer(action)
            else:
                self._release(action)
        assert answer is not None, f"call {call.id} was not answered"
        if isinstance(answer, Hold):
            self._calls[request.id] = call
        return answer

    def _request(self, call: Call) -> Request:
        # A client's max_tokens is usually far above what it gets, so it tells nothing.
        return Request(
            id=RequestId(str(call.id)),
            model=self._model.name,
            prompt_tokens=call.prompt_tokens,
            block_keys=cast("tuple[BlockKey, ...]", call.keys),
            block_tokens=self._key_tokens,
            is_prompt_counted=True,
            tenant=call.tenant,
            priority=call.priority,
            slo=Slo(call.ttft_s_max, call.tpot_s_max),
            token_keys=() if self._words is None else self._words.token_keys(call.keys),
            token_block_tokens=self._key_tokens,
        )

    def _answer(self, action: Action) -> Route | Shed | Hold:
        match action:
            case Dispatch(plan):
                return self._route_of(plan)
            case Refuse(_, refusal):
                return Shed(refusal.reason.value)
            case Wait():
                return Hold()

    def _route_of(self, plan: Plan) -> Route:
        prefill = None if plan.prefill is None else self._index_of[plan.prefill.id]
        return Route(
            self._index_of[plan.decode.id], prefill, plan.why.value, tuple(self._other_prefills(plan))
        )

    def _other_prefills(self, plan: Plan) -> Iterator[int]:
        for rung in plan.rungs:
            if rung.kind is RungKind.OTHER_PREFILL and rung.prefill is not None:
                yield self._index_of[rung.prefill.id]

    def _release(self, action: Action) -> None:
        """An answer to a call that was held."""
        answer = self._answer(action)
        if not isinstance(answer, Hold):
            self._released.routes.append((self._calls.pop(action.id), answer))

    def _tell(self, event: Event, now_s: float) -> None:
        for action in self.coordinator.handle(event, now_s):
            self._release(action)

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None:  # noqa: ARG002  # the port's
        self._tell(ResponseBegan(RequestId(str(call.id)), served), now_s)

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None:  # noqa: ARG002  # the port's
        if self._words is not None:
            # An event tells its tokens; here it is the call that does.
            self._words.token_keys(call.keys_after)
        outcome = Outcome.OK if is_ok else Outcome.UPSTREAM_ERROR
        counted = output_tokens if is_ok else None
        self._tell(RequestEnded(RequestId(str(call.id)), outcome, counted), now_s)

    def failed(self, call: Call, route: Route, now_s: float) -> Route | Shed:  # noqa: ARG002  # the port's
        request_id = RequestId(str(call.id))
        answer: Route | Shed | Hold | None = None
        event = DecodeFailed(request_id, RungReason.DECODE_UNREACHABLE)
        for action in self.coordinator.handle(event, now_s):
            if action.id == request_id:
                answer = self._answer(action)
            else:
                self._release(action)
        assert isinstance(answer, Route | Shed), f"call {call.id} failed over to nothing"
        return answer

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None:
        endpoint_id = self._ids[index]
        if sample is None:
            self._tell(SampleFailed(endpoint_id, "no answer"), now_s)
        else:
            self._tell(SampleTaken(endpoint_id, sample), now_s)

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:
        if self._words is None:
            return
        endpoint_id = self._ids[index]
        # Those that were evicted made room for those that were stored.
        if removed:
            self._tell(self._words.removed(endpoint_id, removed), now_s)
        for event in self._words.stored(endpoint_id, stored):
            self._tell(event, now_s)

    def released(self, now_s: float) -> Released:
        due_s = self.coordinator.next_event_s()
        if due_s is not None and due_s <= now_s:
            self._tell(TimePassed(), now_s)
        released, self._released = self._released, Released()
        return released

    def next_event_s(self) -> float | None:
        return self.coordinator.next_event_s()
