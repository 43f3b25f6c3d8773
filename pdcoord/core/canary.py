"""Which unlike pair of pools is to be tried when, and what the result means for its paths.

Wrong KV comes from layouts and engine versions, which a pair of pools shares, or from one broken host. So
the gate is of a pair of pools: shut until one canary passed, and again where none of the processes that
passed is left. Single endpoints of an open pair are tried in turn, new ones first; one whose canary fails is
shut alone, and with FAILURES_MAX in a row without a pass between the whole pair is.
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdcoord.core.disagg import dialect
from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Fleet, Health, ModelName, Pool
from pdcoord.core.gates import PairKey
from pdcoord.core.ledger import Ledger
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import CanaryMode, Model
from pdcoord.core.paths import PathTable
from pdcoord.core.trials import (
    NEW,
    NOT_NEEDED,
    REPEAT,
    UNTOLD_S_MIN,
    CanaryOrder,
    End,
    PairState,
    Rank,
    UnlikePair,
    least_tried,
    neediest,
)
from transfer.verdict import VerdictKind

CONCURRENT_MAX = 4
"""Canaries under way at a time, over all pairs; of a pair there is one."""
LOOK_S = 5.0
SHUT_LOOK_S = 0.25
"""Time between two looks at a pair that had nobody to try: one that is open, and one that is not."""
REPEAT_S = 1.0
"""Least time between two canaries that only repeat what is known, over all pairs."""
BUSY_SHARE = 0.5
"""Of its most requests, with which an endpoint takes no canary of an open pair."""
LOST_S = 30.0
"""An order of which nothing is heard so long past its deadlines is void."""


@dataclass(frozen=True, slots=True)
class CanaryBegan:
    """An order that was due is being carried out; a CanaryJudged follows."""

    order: CanaryOrder


@dataclass(frozen=True, slots=True)
class CanaryJudged:
    """What came of it."""

    order: CanaryOrder
    finding: Finding


@dataclass(frozen=True, slots=True)
class CanaryView:
    """A pair of pools, or a path of it, as metrics and the admin listener show it.

    Attributes:
        fault: why it is shut, or would be were canaries enforced; empty if it is open.
        age_s: since the last canary of the pair that said something; None if none did.
        suspects: endpoints that failed while others of the pair pass.
    """

    model: ModelName
    prefill: Pool
    decode: Pool
    state: PairState
    fault: str
    is_enforced: bool
    finding: Finding | None
    age_s: float | None
    suspects: int


class Canaries:
    """The unlike pairs of a policy and what their canaries said.

    Args:
        replica: name of this process; replicas of different names repeat at different times.
        has_runner: whether anybody carries orders out; without it there are none, and no gates.
    """

    def __init__(
        self, fleet: Fleet, ledger: Ledger, paths: PathTable, *, replica: str = "", has_runner: bool = False
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._paths = paths
        self._seed = zlib.crc32(replica.encode("utf-8", "surrogatepass"))
        self._has_runner = has_runner
        self._pairs: dict[PairKey, UnlikePair] = {}
        self._ordinal = 0
        self._repeated_s = -math.inf
        self._heard: set[EndpointId] = set()

    # What changes.

    def replace_models(self, models: Iterable[Model]) -> None:
        """Take on the pairs of a new policy; results of those whose layouts and engines stay are kept."""
        before, self._pairs = self._pairs, {}
        for model in models if self._has_runner else ():
            if model.canary.mode is CanaryMode.OFF:
                continue
            for prefill, decode in self._unlike(model):
                pair = _fresh(model, prefill, decode)
                known = before.get(pair.key)
                if known is not None and known.revision == pair.revision:
                    known.model, known.prefill, known.decode = model, prefill, decode
                    pair = known
                self._pairs[pair.key] = pair
        for old in before.values():
            if self._pairs.get(old.key) is not old:
                self._open(old)
        for pair in self._pairs.values():
            self._set_gates(pair)

    def handle(self, event: CanaryBegan | CanaryJudged, now_s: float) -> None:
        """Note that an order is under way, or what came of it; of a void one nothing changes."""
        pair = self._pairs.get(event.order.pair)
        if pair is None:
            return
        match event:
            case CanaryBegan(order):
                self._ordinal = max(self._ordinal, order.ordinal + 1)
                pair.running = order
                pair.void_s = now_s + 2.0 * order.rules.timeout_s + LOST_S
            case CanaryJudged(order, finding) if pair.running is not None and pair.running == order:
                pair.running = None
                if finding.outcome is CanaryOutcome.PASSED:
                    self.heard(order.decode.id)
                pair.judge(order, finding, now_s)
                self._set_gates(pair, order.ends)

    def heard(self, decode: EndpointId) -> None:
        """A sidecar of ours speaks there: from now on what it does not say of a canary is not known."""
        if self._fleet.get(decode) is not None:
            self._heard.add(decode)

    def forget(self, endpoint_id: EndpointId, now_s: float) -> None:
        """The endpoint is gone, or is another process by now: what was known of it is void."""
        self._heard.discard(endpoint_id)
        for pair in self._pairs.values():
            if pair.running is not None and endpoint_id in pair.running.ends:
                pair.running = None
            for ends in (pair.prefills, pair.decodes):
                gone = ends.pop(endpoint_id, None)
                if gone is not None:
                    self._paths.gates.set_end(pair.key, endpoint_id, "")
                    pair.suspect_count -= bool(gone.fault)
                    self._look_anew(pair, now_s)

    def look(self, pool: Pool, now_s: float) -> None:
        """An endpoint of that pool became ready: see to it at once."""
        for pair in self._pairs.values():
            if pair.is_open and pool.name in pair.key:
                pair.due_s = min(pair.due_s, now_s)

    # What is asked.

    def due(self, now_s: float) -> list[CanaryOrder]:
        """Orders to carry out now; each counts as under way once CanaryBegan says so.

        Whom there was no use in looking at is not looked at again for a while; nothing else changes.
        """
        pairs = self._pairs.values()
        for pair in pairs:
            if pair.running is not None and now_s >= pair.void_s:
                pair.running = None
                pair.due_s = now_s + UNTOLD_S_MIN
        room = CONCURRENT_MAX - sum(pair.running is not None for pair in pairs)
        busy = {end for pair in pairs if pair.running for end in pair.running.ends}
        orders: list[CanaryOrder] = []
        # Shut pairs first: an open one can wait.
        waiting = [pair for pair in pairs if pair.running is None and pair.due_s <= now_s]
        for pair in sorted(waiting, key=lambda pair: (pair.is_open, pair.due_s)):
            if len(orders) >= room:
                break
            order = self._order(pair, busy, self._ordinal + len(orders), now_s)
            if order is None:
                pair.due_s = now_s + (LOOK_S if pair.is_open else SHUT_LOOK_S)
                continue
            if pair.is_repeat(order):
                self._repeated_s = now_s
            orders.append(order)
            busy |= set(order.ends)
        return orders

    def views(self, now_s: float) -> list[CanaryView]:
        """Every unlike pair of pools."""
        return [self._view(pair, "", now_s) for pair in self._pairs.values()]

    def view(self, prefill: Endpoint, decode: Endpoint, now_s: float) -> CanaryView | None:
        """What stands for one path; None where its pools need no canary."""
        pair = self._pairs.get((prefill.pool.name, decode.pool.name))
        if pair is None:
            return None
        ends = (pair.prefills.get(prefill.id), pair.decodes.get(decode.id))
        return self._view(pair, next((end.fault for end in ends if end and end.fault), ""), now_s)

    def validate(self) -> None:
        """Assert that gates are shut where they must be, and only there, and that bounds hold."""
        gates = self._paths.gates
        gates.validate()
        running = [pair.running for pair in self._pairs.values() if pair.running is not None]
        assert len(running) <= CONCURRENT_MAX, "too many canaries at a time"
        for pair in self._pairs.values():
            is_enforced = pair.model.canary.mode is CanaryMode.ENFORCE
            wanted = pair.fault if is_enforced else ""
            assert gates.pair_fault(pair.prefill, pair.decode) == wanted, f"{pair.key}: the gate is wrong"
            for endpoint_id, end in pair.ends():
                assert self._fleet.get(endpoint_id) is not None, f"{pair.key}: {endpoint_id} is gone"
                assert bool(end.failure_count) == bool(end.fault), f"{pair.key}: {endpoint_id} is miscounted"
            suspects = sum(bool(end.fault) for _, end in pair.ends())
            assert pair.suspect_count == suspects, f"{pair.key}: suspects are miscounted"
            assert not pair.is_open or pair.is_borne_out, f"{pair.key}: open, and nobody who passed is left"
        assert all(self._fleet.get(each) is not None for each in self._heard), "a sidecar of nobody was heard"

    # Inside.

    def _unlike(self, model: Model) -> Iterator[tuple[Pool, Pool]]:
        for prefill in model.pools:
            for decode in model.pools:
                if prefill is decode or not (prefill.can_prefill and decode.can_decode):
                    continue
                found = self._paths.verdict(prefill, decode)
                is_like = found.kind is VerdictKind.NATIVE and prefill.vendor == decode.vendor
                if found.is_possible and not is_like:
                    yield prefill, decode

    def _open(self, pair: UnlikePair) -> None:
        """A pair that is no longer: what is shut for it is shut no more."""
        if pair.key not in self._pairs:
            self._paths.gates.set_pair(pair.key, "")
        for endpoint_id, _ in pair.ends():
            self._paths.gates.set_end(pair.key, endpoint_id, "")

    def _set_gates(self, pair: UnlikePair, changed: tuple[EndpointId, ...] | None = None) -> None:
        """Have the gates say what the pair says: of these endpoints, or of all."""
        is_enforced = pair.model.canary.mode is CanaryMode.ENFORCE
        self._paths.gates.set_pair(pair.key, pair.fault if is_enforced else "")
        pair.suspect_count = sum(bool(end.fault) for _, end in pair.ends())
        for endpoint_id, end in pair.ends():
            if changed is None or endpoint_id in changed:
                self._paths.gates.set_end(pair.key, endpoint_id, end.fault if is_enforced else "")

    def _look_anew(self, pair: UnlikePair, now_s: float) -> None:
        """A process that was tried is gone."""
        if pair.is_open and not pair.is_borne_out:
            # All that is there may be of another version.
            pair.state, pair.failure_count = PairState.UNTRIED, 0
            self._set_gates(pair, ())
        pair.due_s = now_s

    def _order(
        self, pair: UnlikePair, busy: set[EndpointId], ordinal: int, now_s: float
    ) -> CanaryOrder | None:
        """Whom to try of this pair now; None if nobody needs it, or nobody has the time."""
        if pair.state is PairState.UNJUDGED:
            return None
        may_wait = pair.is_open
        sides = []
        for pool, ends in ((pair.prefill, pair.prefills), (pair.decode, pair.decodes)):
            ready = self._ready(pool, busy, may_wait=may_wait)
            interval_s = pair.model.canary.interval_s
            ranked = [(self._rank(s, ends.get(s.endpoint.id), interval_s, now_s), s.endpoint) for s in ready]
            if not ranked:
                return None
            sides.append(ranked)
        if may_wait and not self._is_needed(min(min(rank for rank, _ in side) for side in sides), now_s):
            return None
        prefill, decode = neediest(*sides) if may_wait else (least_tried(side) for side in sides)
        reference = self._reference(pair.model, decode, may_wait=may_wait)
        if reference is None or prefill.id == decode.id:
            return None
        return CanaryOrder(
            ordinal=ordinal,
            model=pair.model.name,
            prefill=prefill,
            decode=decode,
            reference=reference,
            rules=pair.model.canary,
            dialect=dialect(decode.pool, pair.model),
            prompt_tokens_min=pair.model.block_tokens_max * 5 // 2,
            bytes_per_token=pair.model.bytes_per_token,
            has_sidecar=decode.id in self._heard,
        )

    def _is_needed(self, rank: Rank, now_s: float) -> bool:
        need = rank[0]
        return need < NOT_NEEDED and (need < REPEAT or now_s >= self._repeated_s + REPEAT_S)

    def _rank(self, state: EndpointState, end: End | None, interval_s: float, now_s: float) -> Rank:
        load = self._ledger.load(state.endpoint.id).request_count
        if end is None:
            return NEW, 0, -math.inf, load, state.ordinal
        need = end.need(interval_s * self.phase(state.ordinal), now_s)
        return need, int(bool(end.fault)), end.tried_s, load, state.ordinal

    def phase(self, ordinal: int) -> float:
        """Of an interval, 0.75..1.25: neither replicas nor endpoints repeat their canaries at one time."""
        # Knuth's multiplicative hash: neighbouring ordinals are far apart.
        drawn = (self._seed + ordinal * 2_654_435_761) % 2**32
        return 0.75 + 0.5 * drawn / 2**32

    def _ready(self, pool: Pool, busy: set[EndpointId], *, may_wait: bool) -> list[EndpointState]:
        """Endpoints of a pool that may take a canary; loaded ones only where the pair waits for it."""
        states = [
            state
            for group in self._fleet.groups(pool.model)
            if group.pool.name == pool.name
            for state in group.by_health[Health.READY].values()
            if state.is_eligible and state.endpoint.id not in busy
        ]
        return [state for state in states if not self._is_loaded(state)] if may_wait else states

    def _is_loaded(self, state: EndpointState) -> bool:
        count = self._ledger.load(state.endpoint.id).request_count
        if state.sample is not None and state.sample.waiting:
            return True
        return count >= BUSY_SHARE * state.endpoint.pool.limits.in_flight_max

    def _reference(self, model: Model, decode: Endpoint, *, may_wait: bool) -> Endpoint | None:
        """Who serves the prompt alone: the decode endpoint where it can, else the least busy that can."""
        if decode.pool.can_serve_alone:
            return decode
        able = [pool for pool in model.pools if pool.can_serve_alone]
        states = [state for pool in able for state in self._ready(pool, set(), may_wait=may_wait)]
        load = self._ledger.load
        least = min(states, key=lambda s: (load(s.endpoint.id).request_count, s.ordinal), default=None)
        return least.endpoint if least is not None else None

    def _view(self, pair: UnlikePair, end_fault: str, now_s: float) -> CanaryView:
        return CanaryView(
            model=pair.model.name,
            prefill=pair.prefill,
            decode=pair.decode,
            state=pair.state,
            fault=pair.fault or end_fault,
            is_enforced=pair.model.canary.mode is CanaryMode.ENFORCE,
            finding=pair.finding,
            age_s=None if pair.judged_s is None else now_s - pair.judged_s,
            suspects=pair.suspect_count,
        )


def _fresh(model: Model, prefill: Pool, decode: Pool) -> UnlikePair:
    has_reference = any(pool.can_serve_alone for pool in model.pools)
    state = PairState.UNTRIED if has_reference else PairState.UNJUDGED
    return UnlikePair(model, prefill, decode, state, due_s=-math.inf)
