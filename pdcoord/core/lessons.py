"""What the coordinator sees of a request's life, turned into what speed is learned from.

A prefill starts when its leg was sent or when the one before it ended, whichever is later: of what came
between nothing else is known. What is not certain is left out: a response that fell back, or whose endpoint
is another process by now, says nothing of its prefill.
"""

from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from pdcoord.core.events import Outcome, ResponseBegan
from pdcoord.core.fleet import Endpoint, Fleet, ModelName
from pdcoord.core.ledger import Ledger
from pdcoord.core.observations import (
    ObservationKind,
    OutputSeen,
    PrefillSeen,
    StepsSeen,
    TransferSeen,
    is_sane,
)
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Plan
from pdcoord.core.ports import SpeedModel
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.plans import DialectName, Mode, ServedHeader

STREAMS_MAX = 8
"""Beside more streams than these a prefill shares its engine's steps so much that its time says little."""
OUTPUT_TOKENS_MIN = 8
"""Shorter answers say nothing of a step: their times are those of the network."""
PREFILLED_SHARE_MAX = 0.5
"""Of an answer's time: where prefills took more of it, what is left for steps is a guess."""
TRANSFER_EXCESS_S = 0.02
"""Within this of its prediction a transfer is as fast as its links: what it took has waits in it too."""
OWN_SHARE_MIN = 0.2
"""Of the time to the first token, what is left of it at least when the first step is taken off."""
TTFTS_MAX = 1_024
"""First tokens kept for whoever asks how good the predictions are; of more, the oldest are forgotten."""
_ALONE = ServedHeader(mode=Mode.COLOCATED)
"""What an engine without a sidecar did with a request that was sent to it whole."""


@dataclass(frozen=True, slots=True)
class TtftSeen:
    """The first token of a request that was served as planned, from its dispatch on."""

    model: ModelName
    mode: Mode
    predicted_s: float
    took_s: float


@dataclass(slots=True)
class _Watch:
    """One request under way.

    Attributes:
        sent_ordinal: `begun_ordinal` of the worker as it was sent; who comes later raises it.
        was_alone: nothing else was in the worker's account then.
        bytes_ahead: what was under way on its links then, without its own.
        begun_s: when the first byte came; None before it, and where its time says nothing of steps.
        batch_s, context_token_s, prefilled_us: of the decode endpoint's account then.
        tokens_before: of its answer, from endpoints that it was at before.
    """

    request: Request
    plan: Plan
    sent_s: float
    sent_ordinal: int
    was_alone: bool
    bytes_ahead: int
    begun_s: float | None = None
    batch_s: float = 0.0
    context_token_s: float = 0.0
    prefilled_us: int = 0
    tokens_before: int = 0


class Lessons:
    """Watches requests from dispatch to end."""

    def __init__(self, fleet: Fleet, ledger: Ledger, paths: PathTable, speed: SpeedModel) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._paths = paths
        self._speed = speed
        self._watches: dict[RequestId, _Watch] = {}
        self._ttfts: deque[TtftSeen] = deque(maxlen=TTFTS_MAX)

    @property
    def left_out(self) -> Mapping[ObservationKind, int]:
        """How many observations were nonsense."""
        return self._speed.left_out

    def take_ttfts(self) -> list[TtftSeen]:
        """First tokens seen since this was last asked."""
        taken = list(self._ttfts)
        self._ttfts.clear()
        return taken

    def dispatched(self, request: Request, plan: Plan, now_s: float, tokens_before: int = 0) -> None:
        """It was sent; told right after the ledger has its entry.

        Args:
            tokens_before: of its answer, where it is continued; its prompt has them.
        """
        worker = self._ledger.load((plan.prefill or plan.decode).id)
        own_bytes = plan.chosen.figures.transfer_bytes
        self._watches[request.id] = _Watch(
            request,
            plan,
            now_s,
            worker.begun_ordinal,
            worker.request_count == 1,
            self._bytes_in_flight(plan) - own_bytes if own_bytes else 0,
            tokens_before=tokens_before,
        )

    def began(self, began: ResponseBegan, bandwidth_min: float, now_s: float) -> None:
        """Its first byte came; told while the ledger still has its prefill.

        Args:
            began: with neither a sidecar's word nor output its head may be long before the first token.
            bandwidth_min: bytes a second; a path with less is not used.
        """
        request_id, served = began.id, began.served
        watch = self._watches.get(request_id)
        if watch is None or (served is None and not began.has_output):
            return
        plan = watch.plan
        if served is None:
            if plan.prefill is not None:
                return  # Whether it was split, and how long that took, only a sidecar of ours tells.
            served = _ALONE
        # Without a sidecar's word an engine that crawls for a while would look slow long after.
        elif self._is_there(plan.decode) and watch.request.is_streamed:
            load = self._ledger.summed_load(plan.decode.id, now_s)
            watch.begun_s = now_s
            watch.batch_s, watch.context_token_s = load.batch_s, load.context_token_s
            # With its own, if that was done here: it was before the first step.
            watch.prefilled_us = load.prefilled_us + load.prefills.get(request_id, 0)
        if served.rungs or not watch.request.is_generative or served.mode is not plan.mode:
            return
        if watch.request.is_streamed:
            predicted_s, took_s = plan.chosen.figures.ttft_s, now_s - watch.sent_s
            self._ttfts.append(TtftSeen(watch.request.model, plan.mode, predicted_s, took_s))
        if plan.prefill is None:
            self._learn_colocated(watch, now_s)
        elif served.prefill_ms is not None and served.transfer_ms is not None:
            self._learn_split(watch, served, plan.prefill, now_s)
            self._learn_transfer(watch, served.transfer_ms / 1e3, bandwidth_min, now_s)

    def ended(
        self, request_id: RequestId, outcome: Outcome, output_tokens: int | None, now_s: float
    ) -> float | None:
        """It ended; told while the ledger still has it.

        Returns how many times longer its steps took than its pool's do; None where that cannot be told.

        Args:
            output_tokens: of the whole answer, wherever they came from.
        """
        watch = self._watches.get(request_id)
        if watch is None or outcome is not Outcome.OK or output_tokens is None:
            return None
        request = watch.request
        if not request.is_generative or request.choice_count > 1:
            return None
        self._speed.learn(OutputSeen(request.model, request.tenant, output_tokens))
        own_tokens = output_tokens - watch.tokens_before
        if watch.begun_s is not None and own_tokens >= OUTPUT_TOKENS_MIN:
            return self._learn_steps(watch, watch.begun_s, own_tokens, now_s)
        return None

    def dropped(self, request_id: RequestId, now_s: float) -> None:
        """It is sent nowhere any more; told while the ledger still has it."""
        watch = self._watches.pop(request_id, None)
        if watch is not None:
            worker = (watch.plan.prefill or watch.plan.decode).id
            if request_id in self._ledger.load(worker).prefills:
                self._ledger.note_prefilled(worker, now_s)

    def rename(self, request_id: RequestId, to: RequestId, plan: Plan) -> None:
        """Its account goes on under another id, and with a plan of that."""
        watch = self._watches.pop(request_id, None)
        if watch is not None:
            watch.request, watch.plan = replace(watch.request, id=to), plan
            self._watches[to] = watch

    def validate(self, live: Container[RequestId]) -> None:
        """Assert that only requests under way are watched."""
        assert all(request_id in live for request_id in self._watches), "a watch of a request that ended"

    def _learn_colocated(self, watch: _Watch, now_s: float) -> None:
        decode, figures = watch.plan.decode, watch.plan.chosen.figures
        load = self._ledger.load(decode.id)
        if watch.request.is_streamed and load.streaming_count <= STREAMS_MAX and not figures.room_s:
            waited_s = now_s - watch.sent_s
            done_s = watch.sent_s + max(waited_s - figures.step_s, OWN_SHARE_MIN * waited_s)
            self._learn_prefill(watch, decode, figures.uncached_tokens, watch.sent_s, done_s)

    def _learn_split(self, watch: _Watch, served: ServedHeader, prefill: Endpoint, now_s: float) -> None:
        prefill_s, transfer_s = (served.prefill_ms or 0.0) / 1e3, (served.transfer_ms or 0.0) / 1e3
        if served.prefill != prefill.address or not 0.0 <= transfer_s <= now_s - watch.sent_s:
            return
        uncached_tokens = watch.plan.chosen.figures.uncached_tokens
        if served.cached_tokens is not None:
            uncached_tokens = max(1, watch.request.prompt_tokens - served.cached_tokens)
        done_s = now_s - transfer_s
        self._learn_prefill(watch, prefill, uncached_tokens, done_s - prefill_s, done_s)

    def _learn_prefill(
        self, watch: _Watch, worker: Endpoint, uncached_tokens: int, sent_s: float, done_s: float
    ) -> None:
        load = self._ledger.load(worker.id)
        is_next = next(iter(load.prefills), None) == watch.request.id
        # Behind one that is not known to be done nobody can tell when this one began.
        is_known = is_next and load.prefilled_s <= done_s
        if not is_known or not self._is_there(worker) or uncached_tokens <= 0:
            return
        # Whatever a sidecar says, it was not before the request was sent.
        took_s = done_s - max(sent_s, watch.sent_s, load.prefilled_s)
        self._ledger.note_prefilled(worker.id, done_s)
        # An engine computes prompts together, so that those behind it may have had a part of the time.
        own_us = load.prefills[watch.request.id]
        expected_s, others_s = own_us / 1e6, (load.prefill_us - own_us) / 1e6
        if others_s and took_s > expected_s:
            if took_s <= expected_s + others_s:
                return
            took_s -= others_s
        state = self._fleet.get(worker.id)
        is_alone = (
            watch.was_alone
            and load.begun_ordinal == watch.sent_ordinal
            and not load.others(state.sample if state is not None else None)
        )
        self._speed.learn(PrefillSeen(worker, uncached_tokens, took_s, is_alone))

    def _learn_transfer(self, watch: _Watch, waited_s: float, bandwidth_min: float, now_s: float) -> None:
        plan, figures = watch.plan, watch.plan.chosen.figures
        prefill, decode = plan.prefill, plan.decode
        # Where both legs are sent at once, most of the transfer is over when the prefill is.
        if prefill is None or plan.dialect is not DialectName.NIXLV2 or not watch.request.is_streamed:
            return
        state = self._fleet.get(decode.id)
        if state is None or state.sample is None or state.sample.waiting or figures.room_s:
            return  # It may have waited for its place in the engine.
        if not figures.transfer_bytes or not (self._is_there(prefill) and self._is_there(decode)):
            return
        took_s = max(waited_s - figures.step_s, OWN_SHARE_MIN * waited_s)
        ahead = max(watch.bytes_ahead, self._bytes_in_flight(plan) - figures.transfer_bytes)
        self.transferred(
            TransferSeen(prefill, decode, figures.transfer_bytes, ahead, took_s), bandwidth_min, now_s
        )

    def transferred(self, seen: TransferSeen, bandwidth_min: float, now_s: float) -> None:
        """KV came over a path, of a request of ours or of another coordinator.

        Args:
            bandwidth_min: bytes a second; a path with less is not used.
        """
        prefill, decode, ahead, took_s = seen.prefill, seen.decode, seen.bytes_ahead, seen.took_s
        link = self._speed.path(prefill, decode)
        self._speed.learn(seen)
        seeded = link.bandwidth_bytes_per_s
        if seeded <= 0.0 or not is_sane(seen):
            return
        moved_bytes = seen.transfer_bytes + ahead
        excess_s = took_s - link.latency_s - moved_bytes / seeded
        bandwidth = moved_bytes / (took_s - link.latency_s) if excess_s > TRANSFER_EXCESS_S else seeded
        self._paths.note_transfer(
            (prefill.id, decode.id),
            bandwidth,
            seeded_bytes_per_s=seeded,
            bytes_per_s_min=bandwidth_min,
            now_s=now_s,
        )

    def _learn_steps(self, watch: _Watch, begun_s: float, output_tokens: int, now_s: float) -> float | None:
        decode = watch.plan.decode
        state = self._fleet.get(decode.id)
        wall_s = now_s - begun_s
        if state is None or not self._is_there(decode) or wall_s <= 0.0:
            return None
        load = self._ledger.summed_load(decode.id, now_s)
        prefilled_s = (load.prefilled_us - watch.prefilled_us) / 1e6
        if prefilled_s > PREFILLED_SHARE_MAX * wall_s:
            return None
        others = load.others(state.sample)
        batch = max(1.0, (load.batch_s - watch.batch_s) / wall_s) + others
        # Half of the answers are there on average; nothing is known of others' prompts.
        context = (load.context_token_s - watch.context_token_s) / wall_s + batch * output_tokens / 2.0
        seen = StepsSeen(decode, output_tokens - 1, wall_s - prefilled_s, batch, context)
        pace = self._speed.pace(seen)
        self._speed.learn(seen)
        return pace

    def _bytes_in_flight(self, plan: Plan) -> int:
        bytes_in_flight = self._ledger.load(plan.decode.id).bytes_in_flight
        if plan.prefill is None:
            return bytes_in_flight
        return max(bytes_in_flight, self._ledger.load(plan.prefill.id).bytes_in_flight)

    def _is_there(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint of a plan is still the same process."""
        state = self._fleet.get(endpoint.id)
        return state is not None and state.endpoint.address == endpoint.address
